"""The command line: one file a command. A user's mistake is one sentence on stderr and exit code 2."""

from __future__ import annotations

import sys


def main() -> None:
    """Entry point of ``graft``."""
    try:
        from graft.cli.app import app
    except ImportError as error:
        print(f"the command line needs the package {error.name}; run: pip install 'graft[cli]'", file=sys.stderr)
        sys.exit(2)
    app()
