"""The common part of ROME, MEMIT, EMMET and similar methods: editor, hyperparameters, keys, target values, templates.

A method derives from :class:`LocateThenEdit` and :class:`LocateThenEditHParams` and adds its own solve.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
