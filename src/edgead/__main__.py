"""`python -m edgead` is the `edgead` command."""

from edgead.cli import main

main()
