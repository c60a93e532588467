"""``python -m graft``, as launchers start it."""

from graft.cli import main

main()
