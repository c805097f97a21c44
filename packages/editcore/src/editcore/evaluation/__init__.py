"""Measures what a model says: evaluators and their averages, target scores, perplexity and divergence.

Nothing here imports torch before a model is measured.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
