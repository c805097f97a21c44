"""Facts to edit: data sets that come along, formats that are read, and what is wrong with a set of records."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
