"""``editctl``, the command line of editcore.

Commands of plugins import from here: the installed plugins, tables, and the progress of long work.
"""

from __future__ import annotations

import os
import sys

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)


def main() -> None:
    """Run ``editctl`` with the arguments of the process, and end it.

    An error that the user can fix is printed as one paragraph, with exit code 2. The exit code is 130 after an
    interrupt. A bug keeps its traceback.
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
        # The reader of the output has closed the pipe. The interpreter flushes once more at its end, so give it a sink.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
