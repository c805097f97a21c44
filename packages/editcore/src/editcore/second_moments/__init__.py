"""Second moments of a model's keys: their text, how they are computed and cached, and the solves with them.

This is the mathematics that editors share. Solves run in float64 on the device of their tensors.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
