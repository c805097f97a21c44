"""What all tests of the repository start from."""

from __future__ import annotations

import os

# Off a terminal editctl writes whole lines; COLUMNS, which some shells and runners export, would have it break them.
os.environ.pop("COLUMNS", None)
