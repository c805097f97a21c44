"""Reports on a run or a sweep: one page that needs no network, a Markdown summary, and the figures.

>>> from pathlib import Path
>>> make_report(Path("runs/emmet"))  # doctest: +SKIP
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
