from .registry import Lifecycle as Lifecycle
from .registry import PluginInfo as PluginInfo
from .registry import Plugins as Plugins
from .registry import boundary as boundary
from .registry import lifecycle as lifecycle
from .registry import resolve as resolve
from .versions import code_versions as code_versions
