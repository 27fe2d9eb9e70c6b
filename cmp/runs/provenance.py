"""What else may decide the last bits of a result: versions, processor, threads, device."""

import platform
from typing import Any

import numpy as np
import open_clip
import torch

from cmp import NUMERICS, __version__
from cmp.errors import CmpError

CPU_FLAGS = ("avx2", "avx512_f", "avx512_bf16", "avx512_fp16", "amx_bf16", "amx_fp16", "amx_tile")


def check_device(device: str) -> None:
    """`CmpError` if torch cannot compute there, such as on "cuda" without a card."""
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise CmpError(f"device {device!r}: cannot be used here ({reason}); choose cpu") from error


def here(device: str = "cpu") -> dict[str, Any]:
    """This process: two that agree in all of this give the same bits on a CPU."""
    found = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return {
        "cmp": __version__,
        "numerics": NUMERICS,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "open_clip": open_clip.__version__,
        "numpy": np.__version__,
        "processor": platform.machine(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cpu_name": found.get("cpu_name", ""),
        "cpu_flags": " ".join(flag for flag in CPU_FLAGS if found.get(flag)),
        "cpu_caches": f"{found.get('l1d_cache_size')} {found.get('l2_cache_size')}",
        "device": torch.cuda.get_device_name(device) if device != "cpu" else "cpu",
        "threads": torch.get_num_threads(),
    }


def differences(one: dict[str, Any], other: dict[str, Any]) -> str:
    """Where two processes differ, such as "threads 1 and 2"; empty if nowhere.

    The version of `cmp` is left out: what its code does to results is what `NUMERICS` counts.
    """
    keys = (here().keys() | {"execution"}) - {"cmp"}
    pairs = {key: (one.get(key), other.get(key)) for key in sorted(keys)}
    return ", ".join(f"{key} {a} and {b}" for key, (a, b) in pairs.items() if a != b)
