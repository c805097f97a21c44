from .registry import (
    Lifecycle as Lifecycle,
    Offer as Offer,
    PluginInfo as PluginInfo,
    Plugins as Plugins,
    boundary as boundary,
    lifecycle as lifecycle,
    resolve as resolve,
)
from .versions import code_versions as code_versions
