"""Hyperparameters: their classes, presets, TOML files, and the settings files of other projects.

A plugin's ``hparams.py`` derives from :class:`HParams`. Nothing here imports torch.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
