"""`python -m cognateforge.cli`."""

from cognateforge.cli import main

main()
