"""What ROME, MEMIT, EMMET and their kin share: the editor, its hyperparameters, keys, target values and templates.

A method derives from :class:`LocateThenEdit` and :class:`LocateThenEditHParams` and brings its solve.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
