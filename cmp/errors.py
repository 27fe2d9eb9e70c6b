"""The one error type that this package raises for what a user can mend."""


class CmpError(Exception):
    """A sentence for the user: what is wrong, where (file and key), and how to mend it.

    The command line prints it without a traceback and exits with status 2; anything else that
    escapes is a bug of ours.
    """
