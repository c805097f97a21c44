"""Second moments of a model's keys: the text they are of, how they are computed and kept, and the solves with them.

The mathematics that editors share. Solves run in float64 on the device of their tensors.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
