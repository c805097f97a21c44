"""Where independent work runs: executors, and second moments that are counted on their workers."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
