"""Plugins: finding, loading and starting them, and the code versions that a result depends on.

Callers use :class:`Plugins`, never pluggy's manager.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
