"""Models: loading them, finding their parts, encoding prompts, running forward passes, and writing weights.

Loaded on first use: ``from editcore.models import CATALOGUE`` imports no torch.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
