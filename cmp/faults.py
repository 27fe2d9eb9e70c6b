"""Tell a user's mistakes and a machine's limits from bugs in this program."""

import contextlib
import importlib.metadata
import re
import sys
import traceback

from cmp.errors import CmpError, Interrupted, explain_limit, first_line
from cmp.project import DISTRIBUTION


def explain_failure(error: BaseException) -> str:
    """Explain to a user an error that is not a bug in this program; return "" for a bug."""
    torch = sys.modules.get("torch")
    if isinstance(error, CmpError | Interrupted):
        return str(error)
    if isinstance(error, getattr(torch, "OutOfMemoryError", ())):
        return (
            f"the device has too little memory ({first_line(error):.300}); use --micro-batch or a "
            "smaller training.batch"
        )
    if isinstance(error, RuntimeError) and str(error).startswith("DataLoader worker (pid"):
        return (
            f"a process that decodes images was killed ({first_line(error):.300}); memory or "
            "/dev/shm may be full: set CMP_WORKERS to a smaller number, or to 0"
        )
    dynamo = sys.modules.get("torch._dynamo.exc")
    if isinstance(error, getattr(dynamo, "TorchDynamoException", ())):  # such as without Triton
        reason = first_line(getattr(error, "inner_exception", error))
        return f"the towers cannot be compiled here ({reason:.300}); leave out --compile"
    if limit := explain_limit(error):
        return limit
    if isinstance(error, OSError):  # such as a full disk
        return f"cannot read or write: {error}"
    if isinstance(error, ModuleNotFoundError) and error.name in sys.stdlib_module_names:
        return "cmpt runs on Linux and macOS; on Windows, use WSL"
    if isinstance(error, ModuleNotFoundError) and error.name and error.name[:3] != "cmp":
        install = f"pip install '{DISTRIBUTION}{extras_with(error.name)}'"
        return f"this command needs the package {error.name!r}: {install}"
    return ""


def describe_bug(error: BaseException) -> str:
    """Return a sentence on a bug and how to report it, and below it the traceback."""
    return (
        "a bug in this program or in a package that it uses, not a mistake in your command; "
        "please open an issue in the project's repository with the lines below, and describe "
        f"what you did\n{''.join(traceback.format_exception(error)).strip()}"
    )


def extras_with(module: str) -> str:
    """Return the extra that installs a module, such as "[experiments]".

    Returns:
        "" for a package that is always installed; all extras except those for clusters and tests if
        the module comes with one of their packages.
    """
    from packaging.requirements import Requirement  # slow, and few commands need it
    from packaging.utils import canonicalize_name

    package = canonicalize_name(module.partition(".")[0])
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):  # not installed
        for requirement in map(Requirement, importlib.metadata.requires(DISTRIBUTION) or ()):
            if canonicalize_name(requirement.name) == package:
                extra = re.search(r'extra == "(\w+)"', str(requirement.marker))
                return f"[{extra[1]}]" if extra else ""
    return "[experiments,book]"
