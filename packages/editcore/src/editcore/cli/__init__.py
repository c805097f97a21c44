"""``editctl``, the command line of editcore.

Commands of plugins take from here the installed plugins, tables, and the progress of long work.
"""

from __future__ import annotations

import os
import sys

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)


def main() -> None:
    """Run ``editctl`` with the arguments of the process, and end it.

    Exit code 2 and one paragraph for what the user can cure, 130 when interrupted; a bug keeps its traceback.
    """
    from editcore.interfaces.errors import EditcoreError

    try:
        from editcore.cli.app import app

        try:
            app(prog_name="editctl")
        finally:
            sys.stdout.flush()
    except EditcoreError as error:
        print(f"Error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        # Whoever read our output has gone. The interpreter flushes once more at its end: let it flush into nothing.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
