"""Uses plugins beside the editcore that is installed, and prints what came of it, in lines of JSON.

    python use_plugins.py CORPUS NAME=FOLDER ...

Three times for each NAME: with its folder alone, with all others, and with all of them but disabled. A folder holds a
plugin. ``tests/test_wheels.py`` runs it.
"""

from __future__ import annotations

import importlib
import importlib.resources
import json
import os
import pkgutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import editcore
from editcore import EditRequest, EditSession, LanguageModel, Plugins, SessionConfig
from editcore.evaluation import score_targets
from editcore.plugins import resolve
from editcore.testing import repeating_model, tiny_model, tiny_requests

QUICK = {"layers": [1], "context_templates": ["{}"], "v_num_grad_steps": 5}
SETTINGS: Mapping[str, Mapping[str, Any]] = {
    "alphaedit": QUICK,
    "emmet": QUICK,
    "memit": QUICK,
    "memit-seq": QUICK,
    "rome": QUICK,
    "memory": QUICK,
    "ft": {"layer": 1, "epochs": 3, "learning_rate": 1e-2},
    "ultra": {"weights": [["mlp.up_proj", [1]]], "learning_rate": 1e-3, "warmup_facts": 4},
    "retrieval": {},
    "trust": {"trust_threshold": 0.0, "trust_measure": False},
    "replay": {"replay_rate": 1.0},
}

SOLVING = {"emmet", "memit", "rome"}
"""The editors that edit when a plugin is taken away; the others only when they are alone, because each costs time."""


def main() -> None:
    corpus, *arguments = sys.argv[1:]
    sites = dict(argument.split("=", 1) for argument in arguments)
    import_what_plugins_import()
    for name, site in sites.items():
        others = [path for path in sites.values() if path != site]
        for how, seen in (("alone", [site]), ("absent", others), ("disabled", [*others, site])):
            child = os.fork()  # so that editcore and slow libraries are imported once, and each plugin anew
            if not child:
                sys.path += seen
                if how == "disabled":
                    os.environ["EDITCORE_DISABLE_PLUGINS"] = name
                sys.stdout.write(json.dumps({"plugin": name, "how": how, **use(corpus)}) + "\n")
                sys.stdout.flush()
                os._exit(0)  # taking everything down takes as long as an edit
            _, status = os.waitpid(child, 0)
            if status:
                raise SystemExit(f"with {name} {how}, plugins do not work")


def import_what_plugins_import() -> None:
    """editcore and other people's libraries; at this time no plugin can be imported."""
    for name in ("peft", "ray"):
        importlib.import_module(name)
    for module in pkgutil.walk_packages(editcore.__path__, "editcore."):
        importlib.import_module(module.name)
    tiny_model().generate(["So"], max_new_tokens=1)


def use(corpus: str) -> dict[str, Any]:
    """Load everything that is announced; edit with each editor, and all extensions and backends beside it."""
    plugins = Plugins.load()
    rows = plugins.listing()
    for name in {name for row in rows for names in row.offers.values() for name in names}:
        for offer in plugins.named(name):
            load(offer.spec)
    return {
        "rows": {
            row.name: {
                **{field: getattr(row, field) for field in ("distribution", "version", "status", "reason")},
                "offers": sorted(row.offers),
            }
            for row in rows
        },
        "edited": {
            name: edit(name, plugins, corpus)
            for name in plugins.editors()
            if name in SOLVING or len(plugins.editors()) <= 2  # one package
        },
        "imported": {
            name: str(Path(str(module.__file__)).parents[1])
            for name, module in sys.modules.items()
            if name.startswith("edit_") and "." not in name
        },
    }


def load(spec: Any) -> None:
    """What a spec leads to: a class, a function, a file; its hyperparameters, too."""
    if getattr(spec, "hparams", None) is not None:
        resolve(spec.hparams)
    if getattr(spec, "kind", None) == "study":
        package, _, file = spec.target.partition(":")
        assert importlib.resources.files(package).joinpath(file).is_file(), spec.target
    else:
        resolve(spec.target)


def edit(name: str, plugins: Plugins, corpus: str) -> dict[str, Any]:
    """Two batches and an undo; what shows that each part took part."""
    extensions = sorted(set(plugins.extensions()) & set(SETTINGS))  # those of editcore itself listen only
    [backend] = set(plugins.backends()) - {"raw"} or {"raw"}
    session = EditSession.open(
        repeating_model() if name == "retrieval" else tiny_model(),
        SessionConfig(
            editor=name,
            plugins=extensions,
            backend=backend,
            settings={part: SETTINGS[part] for part in (name, *extensions)},
            corpus=corpus,
            corpus_tokens=1024,
        ),
        registry=plugins,
    )
    requests = tiny_requests(2)
    losses = [loss(session.model, requests[1])]
    session.edit(requests, batch_size=1)
    losses.append(loss(session.model, requests[1]))
    last = session.ledger.entries[-1]
    session.undo(requests[0].id)
    active = len(session.requests)
    session.close()
    losses.append(loss(session.model, requests[1]))
    return {
        "backend": session.edited.spec.name,
        "replayed": len(last.requests) - last.num_new,
        "verdicts": sorted(last.verdicts),
        "likelier": losses[1] < losses[0],
        "restored": losses[2] == losses[0],
        "active": active,
    }


def loss(model: LanguageModel, request: EditRequest) -> float:
    """Mean NLL of the target's tokens."""
    [score] = score_targets(model, [request.text], [request.target_new])
    return score.nll


if __name__ == "__main__":
    main()
