"""`cmpt`, which is also `python -m cmp`."""

import signal


def main() -> None:
    """Run the command line, see `cmp.cli.main`; Ctrl-C during its imports ends it silently."""
    before = signal.getsignal(signal.SIGINT)
    if before is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from cmp import cli

    signal.signal(signal.SIGINT, before)
    cli.main()


if __name__ == "__main__":
    main()
