"""Prepares a model that nobody has edited yet: causal tracing, trials with real edits, and presets from them."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
