"""``python -m certipatch`` is the command ``certipatch``."""

from certipatch.cli import main

main()
