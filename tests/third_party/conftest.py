"""The packages in here are a stranger's: their contract tests run where they are installed, and nowhere else.

``tests/test_third_party.py`` installs them into an environment of their own and runs pytest there.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

collect_ignore = [
    package.name
    for package in Path(__file__).parent.glob("third-*")
    if find_spec(package.name.replace("-", "_")) is None
]
