"""What a plugin sees: errors, values, protocols, events, announcements, hooks and progress.

Everything here is public, and most of it is re-exported by :mod:`editcore` itself. Importing it loads no torch: tensors
and classes of other rooms appear in annotations only. This is the one room whose annotations name later rooms.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
