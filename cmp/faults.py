"""Tell a user's mistakes and a machine's limits from bugs in this program, and report the bugs."""

import contextlib
import datetime
import importlib.metadata
import os
import platform
import re
import shlex
import sys
import traceback

import cmp
from cmp.errors import CmpError, Interrupted, clean_text, explain_limit, first_line
from cmp.project import DISTRIBUTION, build_folder


def explain_failure(error: BaseException) -> str:
    """Explain to a user an error that is not a bug in this program; return "" for a bug."""
    torch = sys.modules.get("torch")
    if isinstance(error, CmpError | Interrupted):
        return clean_text(str(error))
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


def report_fault(error: BaseException) -> str:
    """Write a report of a bug to the build folder: versions, command and traceback, without data.

    Returns:
        A sentence that says what to send to the maintainers.
    """
    what = "".join(traceback.format_exception_only(error)).partition("\n")[0]
    fault = f"a bug in this program, not a mistake in your command ({what:.300})"
    try:
        from cmp.files import write_atomic  # takes time to import

        packages = {each.name: each.version for each in importlib.metadata.distributions()}
        lines = [
            f"cmpt {cmp.__version__}, Python {sys.version}, {platform.platform()}",
            f"command: {shlex.join(sys.argv)}",
            "".join(traceback.format_exception(error)),
            *(f"{name} {version}" for name, version in sorted(packages.items())),
        ]
        name = f"{datetime.datetime.now():%Y%m%d-%H%M%S}-{os.getpid()}.txt"
        path = build_folder().absolute() / "reports" / name
        text = "\n".join(lines) + "\n"  # names of files may not be UTF-8
        write_atomic(path, text.encode("utf-8", "backslashreplace").decode())
    except Exception as refused:  # a full disk, or a consequence of the first error
        why = f"no report could be written ({type(refused).__name__})"
        return f"{fault}; {why}: run the command again with CMP_DEBUG=1 and send the output"
    return f"{fault}; please send {path} to the maintainers, and describe what you did"


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
