from .causal_tracing import TracingOptions as TracingOptions, trace as trace
from .onboard import (
    SEARCH as SEARCH,
    Bench as Bench,
    Trial as Trial,
    best as best,
    candidate_layers as candidate_layers,
    preset_paths as preset_paths,
    span_below as span_below,
    tunable_editors as tunable_editors,
    write_presets as write_presets,
)
