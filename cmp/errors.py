"""The one error type that this package raises for what a user can mend."""


class CmpError(Exception):
    """A sentence for the user: what is wrong, where (file and key), and how to mend it.

    The command line prints it without a traceback and exits with status 2; anything else that
    escapes is a bug of ours.
    """


class Diverged(CmpError):
    """Training met a loss, a gradient or weights that are not finite.

    `report`: what is known of the step, ready for JSON.
    """

    def __init__(self, message: str, report: dict):
        super().__init__(message, report)  # both, so that it survives the way between processes
        self.report = report

    def __str__(self) -> str:
        return self.args[0]


class Interrupted(BaseException):
    """A run was asked to stop and did, after a whole step, with its state saved.

    Not an `Exception`, as a request to stop must not be taken for a failure that one can skip.
    `signal`: the signal's number; a shell's exit status is 128 more.
    """

    def __init__(self, message: str, signal: int):
        super().__init__(message, signal)
        self.signal = signal

    def __str__(self) -> str:
        return self.args[0]

    def _render_traceback_(self) -> list[str]:
        """What a notebook shows: no traceback, for nothing went wrong."""
        return [f"{self}; in a notebook, run the cell again"]
