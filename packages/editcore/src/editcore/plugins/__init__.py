"""Plugins: finding, loading and starting them, what editcore itself announces, and which code a result depends on.

Callers use :class:`Plugins`, never pluggy's manager.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
