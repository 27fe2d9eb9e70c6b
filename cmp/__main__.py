"""`python -m cmp` is `cmpt`."""

from cmp.cli import main

main()
