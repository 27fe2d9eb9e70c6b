"""The error type for everything that a user can fix."""

import contextlib
import difflib
import errno
import re
import traceback
from collections.abc import Collection, Iterable, Iterator


class CmpError(Exception):
    """An error whose message says what is wrong, where (file and key), and how to fix it.

    The command line prints it without a traceback and exits with status 2. Any other uncaught
    exception is a bug in this package.

    Example:
        >>> try:
        ...     cmp.run("quick", method="lorra")
        ... except cmp.CmpError as error:
        ...     print(str(error)[:72])
        run 'quick': method.name: no method is called 'lorra'; did you mean 'lor
    """


def find_closest(name: str, names: Iterable[str]) -> str | None:
    """Return the closest of some names, or None if none is close."""
    lower = {each.lower(): each for each in sorted(names)}
    near = difflib.get_close_matches(name.lower(), lower, n=1)
    return lower[near[0]] if near else None


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """Return "; did you mean 'NAME'?" with the closest of some names, or "" if none is close."""
    near = find_closest(name, names)
    return f"; did you mean {near!r}?" if near else ""


def name_choices(name: str, names: Collection[str], there_are: str = "there are") -> str:
    """Return "; did you mean 'NAME'? There are NAMES", without the question if no name is close.

    Args:
        name: The name that was given.
        names: The possible names.
        there_are: How the list of names begins.
    """
    near, choices = did_you_mean(name, names), f"{there_are} {', '.join(names)}"
    return f"{near} {choices[0].upper()}{choices[1:]}" if near else f"; {choices}"


_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")
"""Characters that control a terminal, break lines, or reverse text."""


def clean_text(text: str) -> str:
    """Return a text for a terminal or a page, with spaces in place of control characters other than
    tabs and line breaks."""
    return _CONTROLS.sub(" ", text)


def check_line(text: str) -> str:
    """Return a name or sentence of a user if it is one line.

    Raises:
        ValueError: It has line breaks or other control characters.
    """
    if clean_text(text) != text or {*"\t\n"} & {*text}:
        raise ValueError(f"{text!r:.80} must be one line, without tabs and control characters")
    return text


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or the name of its type if the message is
    empty."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def weights_fault(error: Exception) -> str:
    """Return in one line why weights cannot be read: only the type of error if it has no message or
    one in which torch advises to run what the file contains."""
    words = " ".join(str(error).split())
    return type(error).__name__ if not words or "weights_only" in words else words


class Diverged(CmpError):
    """An error for a loss, a gradient or weights that are not finite.

    Attributes:
        report: What is known about the step, ready for JSON.
    """

    def __init__(self, message: str, report: dict):
        super().__init__(message, report)  # both, so that processes can send the error
        self.report = report

    def __str__(self) -> str:
        return self.args[0]


class Interrupted(BaseException):
    """Raised when a run was asked to stop and has stopped after a full step, with its state saved.

    It is not an `Exception`, so that code that skips failures does not swallow a request to stop.

    Attributes:
        signal: The signal's number; a shell's exit status is 128 more.
    """

    def __init__(self, message: str, signal: int):
        super().__init__(message, signal)
        self.signal = signal

    def __str__(self) -> str:
        return self.args[0]

    def _render_traceback_(self) -> list[str]:
        """Return what a notebook shows; there is no traceback, since nothing went wrong."""
        return [f"{self}; in a notebook, run the cell again"]


_NO_THREAD = re.compile("start new thread|Resource temporarily unavailable|os error 11")
_NO_MEMORY = re.compile("allocate memory|bad_alloc|os error 12")
"""What libraries say, in errors of many types, if a limit of the machine is reached."""


def explain_limit(error: BaseException) -> str:
    """Return which limit of the machine an error comes from, and what needs less; "" if from none.

    Such an error says nothing about the file that was being read.
    """
    if isinstance(error, CmpError):  # it has been explained
        return ""
    number = getattr(error, "errno", None)
    text = traceback.format_exception_only(error)[-1]  # the text of some errors fails
    if number == errno.EAGAIN or _NO_THREAD.search(text):
        return (
            f"this machine allows no further thread or process ({first_line(error):.200}); lower "
            "--threads or CMP_WORKERS, or raise `ulimit -u`"
        )
    if isinstance(error, MemoryError) or number == errno.ENOMEM or _NO_MEMORY.search(text):
        return (
            f"memory ran out ({first_line(error):.200}); use --micro-batch or a smaller "
            "training.batch, set CMP_WORKERS to a smaller number, or raise `ulimit -v`"
        )
    return ""


@contextlib.contextmanager
def explain_errors(what: str, then: str = "", *errors: type[Exception]) -> Iterator[None]:
    """Turn the errors that a bad file raises, and those of `explain_limit`, into a `CmpError`.

    Args:
        what: What is wrong; the original message follows in brackets.
        then: Text after the brackets, unless a limit of the machine is the reason.
        *errors: Exceptions to turn besides `OSError` and `ValueError`.
    """
    try:
        yield
    except Exception as error:
        if limit := explain_limit(error):
            raise CmpError(f"{what}: {limit}") from error
        if not isinstance(error, (OSError, ValueError, *errors)):
            raise
        raise CmpError(f"{what} ({str(error) or type(error).__name__}){then}") from error
