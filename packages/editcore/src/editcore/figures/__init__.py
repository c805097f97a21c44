"""All pictures, in one style. They need no display and no global state, and torch is not imported."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
