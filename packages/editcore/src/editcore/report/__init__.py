"""Reports: what a run or a sweep came to, as one page without a network, a Markdown summary and the figures.

>>> from pathlib import Path
>>> make_report(Path("runs/emmet"))  # doctest: +SKIP
"""

from __future__ import annotations

from editcore.report._make import Report, make_report

__all__ = ["Report", "make_report"]
