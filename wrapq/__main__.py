"""`python -m wrapq`."""

from wrapq.cli import main

main()
