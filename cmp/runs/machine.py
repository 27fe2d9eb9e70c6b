"""Record the machine of a run, and compare it with another."""

import platform
from typing import Any

import numpy as np
import open_clip
import torch

from cmp import NUMERICS, __version__
from cmp.arithmetic import lacks_bf16_kernels
from cmp.scale.devices import device_name

CPU_FLAGS = ("avx2", "avx512_f", "avx512_bf16", "avx512_fp16", "amx_bf16", "amx_fp16", "amx_tile")


def machine_record(device: str = "cpu") -> dict[str, Any]:
    """Return everything about this machine that may affect the last bits of a result."""
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()
    record = {
        "cmp": __version__,
        "numerics": NUMERICS,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "open_clip": open_clip.__version__,
        "numpy": np.__version__,
        "processor": platform.machine(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cpu_name": capabilities.get("cpu_name", ""),
        "cpu_flags": " ".join(flag for flag in CPU_FLAGS if capabilities.get(flag)),
        "device": device_name(device),
        "threads": torch.get_num_threads(),
    }
    if device != "cpu":
        convolutions = getattr(torch.backends.cudnn, "conv", torch.backends.cudnn)
        backends = {"products": torch.backends.cuda.matmul, "convolutions": convolutions}
        record["tf32"] = ", ".join(name for name, part in backends.items() if _uses_tf32(part))
    elif lacks_bf16_kernels("cpu"):
        record["bf16"] = "products in fp32"
    return record


def _uses_tf32(backend: Any) -> bool:
    """Return whether a part of torch may compute in TF32."""
    # from torch 2.9 on; if it was set, reading `allow_tf32` is an error
    precision = getattr(backend, "fp32_precision", None)
    return backend.allow_tf32 if precision is None else precision == "tf32"


def machine_differences(one: dict[str, Any], other: dict[str, Any]) -> str:
    """Return the differences between two machine records, such as "threads 1 and 2", or "".

    The version of `cmp` is ignored, since `NUMERICS` tracks changes to results. Only the vendor
    part of the processor's name is compared, because linear algebra libraries select kernels by
    vendor and CPU flags, not by model.
    """
    keys = (machine_record().keys() | {"execution", "tf32", "bf16"}) - {"cmp"}
    pairs: dict[str, tuple] = {key: (one.get(key), other.get(key)) for key in sorted(keys)}
    pairs["cpu_name"] = tuple(str(name or "").partition(" ")[0] for name in pairs["cpu_name"])
    return ", ".join(f"{key} {a} and {b}" for key, (a, b) in pairs.items() if a != b)
