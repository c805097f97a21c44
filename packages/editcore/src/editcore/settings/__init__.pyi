from .hparams import (
    HParams as HParams,
    Layer as Layer,
    Setting as Setting,
    build as build,
    describe as describe,
    layers_named as layers_named,
    list_presets as list_presets,
    load_preset as load_preset,
    parse_assignment as parse_assignment,
    preset_models as preset_models,
    to_toml as to_toml,
    toml_lines as toml_lines,
)
from .presets import (
    Preset as Preset,
    get_preset as get_preset,
    model_stem as model_stem,
    own_folder as own_folder,
    preset_for as preset_for,
    presets_of as presets_of,
)
from .reference import Imported as Imported, import_file as import_file
from .toml import parse_toml as parse_toml, read_toml as read_toml, run_values as run_values
