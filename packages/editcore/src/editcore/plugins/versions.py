"""The versions of the code that a run's result depends on."""

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
    """Versions by package: editcore, torch and other libraries, and the packages of plugins.

    An editable installation has a hash of its sources after its version, because the version does not change with them.

    Args:
        names: names of editors, extensions, ...; only packages that offer these, or components for them, are included.
            Left out, the packages of all plugins are.
    """
    if names is None:
        offering = {plugin.distribution for plugin in plugins.listing()}
    else:
        offering = plugins.distributions_of(names)
    found = {}
    for package in sorted({*_ALWAYS, *offering}):
        try:
            found[package] = version(package) + _sources_hash(package)
        except PackageNotFoundError:
            continue
    return found


def _sources_hash(name: str) -> str:
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
