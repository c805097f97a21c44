from .calls import boundary as boundary, resolve as resolve
from .extensions import Lifecycle as Lifecycle, lifecycle as lifecycle
from .installed import PluginInfo as PluginInfo
from .registry import Offer as Offer, Plugins as Plugins
from .versions import code_versions as code_versions
