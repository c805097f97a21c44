"""Runs: configuration, the main job, its records and results, sessions, backends, checkpoints, packs and composition.

:func:`run` is ``editctl run``; :class:`EditSession` edits without a run directory. A run draws nothing: whoever shows
it calls :mod:`editcore.figures`.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
