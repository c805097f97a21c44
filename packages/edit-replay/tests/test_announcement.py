"""What is announced, without torch, and the settings."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from edit_replay.hparams import ReplayHParams
from editcore import HParamsError, Plugins
from editcore.settings.hparams import build, describe


def test_the_extension_and_its_strategies_are_announced() -> None:
    plugins = Plugins.load()
    assert plugins.extension("replay").hparams == "edit_replay.hparams:ReplayHParams"
    assert set(plugins.components("replay.strategy")) >= {"random", "priority", "recent"}


def test_announcement_settings_buffer_and_strategies_import_no_torch() -> None:
    code = (
        "import sys, edit_replay.plugin, edit_replay.hparams, edit_replay.buffer, edit_replay.strategies; "
        "edit_replay.plugin.editcore_components(); "
        "print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    )
    answer = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert answer.stdout.strip() == "[]"


def test_every_setting_says_what_it_means() -> None:
    settings = describe(ReplayHParams)
    assert [setting.name for setting in settings] == [
        "replay_mode",
        "replay_rate",
        "replay_asked",
        "replay_adaptive",
        "adaptive_min",
        "adaptive_max",
        "replay_buffer_size",
        "replay_strategy",
        "replay_weight",
        "replay_statistics_weight",
        "replay_importance",
        "replay_eviction",
        "replay_duplicates",
        "replay_check",
        "replay_drift",
        "replay_refresh",
    ]
    assert all(setting.meaning and not setting.required for setting in settings)


@pytest.mark.parametrize(
    ("settings", "with_held_keys", "without"),
    [
        ({}, 0.0, 0.5),
        ({"replay_rate": 0.25}, 0.25, 0.25),
        ({"replay_rate": 0}, 0.0, 0.0),
        ({"replay_mode": "requests"}, 0.5, 0.5),
        ({"replay_adaptive": True}, 0.5, 0.5),
        ({"replay_statistics_weight": 0}, 0.5, 0.5),
        ({"replay_strategy": "recent"}, 0.5, 0.5),
        ({"replay_weight": 2}, 0.5, 0.5),
    ],
)
def test_the_rate_follows_what_the_editor_can_do(
    settings: dict[str, object], with_held_keys: float, without: float
) -> None:
    made = ReplayHParams.model_validate(settings)
    assert made.rate(editor_can=True) == with_held_keys
    assert made.rate(editor_can=False) == without


def test_settings_survive_json() -> None:
    made = ReplayHParams(replay_rate=0.25, replay_strategy="recent", replay_importance={"capital": 2.0})
    assert ReplayHParams.model_validate_json(json.dumps(made.model_dump(mode="json"))) == made


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"replay_rate": -0.1}, "replay_rate = -0.1 is out of range. Allowed: ≥ 0"),
        ({"replay_weight": 0}, "replay_weight = 0 is out of range. Allowed: > 0"),
        ({"replay_buffer_size": 0}, "replay_buffer_size = 0 is out of range"),
        ({"replay_eviction": "lfu"}, "replay_eviction"),
        ({"replay_mode": "keys"}, "replay_mode"),
        ({"replay_statistics_weight": -1}, "replay_statistics_weight = -1 is out of range. Allowed: ≥ 0"),
        ({"replay_refresh": 1.5}, "replay_refresh = 1.5 is out of range"),
        ({"replay_importance": {"capital": -1}}, "replay_importance"),
        ({"adaptive_min": 7, "adaptive_max": 3}, "adaptive_min is 7, more than adaptive_max, 3"),
        ({"replay_size": 5}, "unknown setting 'replay_size'"),
    ],
)
def test_bad_settings_are_named(bad: dict[str, object], message: str) -> None:
    with pytest.raises(HParamsError, match=f"^replay: .*{message}"):
        build(ReplayHParams, [bad], owner="replay")
