"""Facts to edit: the data set that comes with editcore, file formats, and checks of records."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
