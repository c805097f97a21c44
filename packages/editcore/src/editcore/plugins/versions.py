"""Which code a run's result depends on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping
from importlib.metadata import PackageNotFoundError, distribution, version
from pathlib import Path
from urllib.parse import unquote, urlparse

from editcore.plugins.registry import Plugins

__all__ = ["code_versions"]

_ALWAYS = ("editcore", "torch", "transformers", "tokenizers", "numpy")


def code_versions(plugins: Plugins, names: Collection[str] | None = None) -> Mapping[str, str]:
    """Versions by package, of those that always count and of those that offer ``names`` or parts for them; without
    names, of all plugins.

    A package that is installed from its sources has a hash of them behind its version, which does not change with them.
    """
    found = {}
    offering = plugins.distributions_of(names) if names is not None else {row.distribution for row in plugins.listing()}
    for name in sorted({*_ALWAYS, *offering}):
        try:
            found[name] = version(name) + _sources(name)
        except PackageNotFoundError:
            continue
    return found


def _sources(name: str) -> str:
    """``+HASH`` of an editable installation's sources; empty for others."""
    try:
        record = json.loads(distribution(name).read_text("direct_url.json") or "{}")
    except ValueError:
        return ""
    if not record.get("dir_info", {}).get("editable"):
        return ""
    root = Path(unquote(urlparse(record["url"]).path)) / "src"
    digest = hashlib.sha256()
    for path in sorted(path for kind in ("py", "toml", "jsonl", "gz") for path in root.rglob(f"*.{kind}")):
        digest.update(f"{path.relative_to(root)}\n".encode() + path.read_bytes())
    return f"+{digest.hexdigest()[:12]}"
