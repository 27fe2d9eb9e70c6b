"""`python -m cmp` is `cmp`."""

from cmp.cli import main

main()
