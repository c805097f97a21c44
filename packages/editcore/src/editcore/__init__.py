"""Edit what a language model knows: interfaces, mathematics and runs.

What a plugin needs first is re-exported here, and what belongs to one room by that room (:mod:`editcore.models`,
:mod:`editcore.second_moments`, ...). Names are loaded on first use: importing :mod:`editcore` imports no torch.
"""

from importlib.metadata import version

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
__version__ = version("editcore")
