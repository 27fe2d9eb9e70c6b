"""The one error type for what a user can mend."""

import contextlib
import difflib
from collections.abc import Collection, Iterable, Iterator


class CmpError(Exception):
    """What is wrong, where (file and key), and how to mend it, in a sentence.

    The command line prints it without a traceback and exits with status 2; anything else that
    escapes is a bug of this package.

    Example:
        >>> try:
        ...     cmp.run("quick", method="lorra")
        ... except cmp.CmpError as error:
        ...     print(str(error)[:72])
        run 'quick': method.name: no method is called 'lorra'; did you mean 'lor
    """


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """Return "; did you mean 'NAME'?" with the nearest of some names, or "" where none is near."""
    lower = {each.lower(): each for each in sorted(names)}
    near = difflib.get_close_matches(name.lower(), lower, n=1)
    return f"; did you mean {lower[near[0]]!r}?" if near else ""


def name_choices(name: str, names: Collection[str], there_are: str = "there are") -> str:
    """Return "; did you mean 'NAME'? There are NAMES", without the question where none is near.

    Args:
        name: What was given.
        names: What could have been.
        there_are: How the list of them begins.
    """
    near, choices = did_you_mean(name, names), f"{there_are} {', '.join(names)}"
    return f"{near} {choices[0].upper()}{choices[1:]}" if near else f"; {choices}"


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text, or its type's name where it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


class Diverged(CmpError):
    """Training met a loss, a gradient or weights that are not finite.

    Attributes:
        report: What is known of the step, ready for JSON.
    """

    def __init__(self, message: str, report: dict):
        super().__init__(message, report)  # both, so that it survives the way between processes
        self.report = report

    def __str__(self) -> str:
        return self.args[0]


class Interrupted(BaseException):
    """A run was asked to stop and did, after a whole step, with its state saved.

    It is no `Exception`, since a request to stop must not be taken for a failure that one can skip.

    Attributes:
        signal: The signal's number; a shell's exit status is 128 more.
    """

    def __init__(self, message: str, signal: int):
        super().__init__(message, signal)
        self.signal = signal

    def __str__(self) -> str:
        return self.args[0]

    def _render_traceback_(self) -> list[str]:
        """Return what a notebook shows: no traceback, since nothing went wrong."""
        return [f"{self}; in a notebook, run the cell again"]


@contextlib.contextmanager
def explain_errors(what: str, then: str = "", *errors: type[Exception]) -> Iterator[None]:
    """Turn what reading raises at a bad file into a `CmpError`.

    Args:
        what: What is wrong, in words; the error's own follow in brackets.
        then: What follows those.
        *errors: What may be raised beside `OSError` and `ValueError`.
    """
    try:
        yield
    except (OSError, ValueError, *errors) as error:
        raise CmpError(f"{what} ({error}){then}") from error
