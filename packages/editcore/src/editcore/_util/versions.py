"""The version of an installed package."""

from __future__ import annotations

import hashlib
import json
from importlib.metadata import distribution, version
from pathlib import Path
from urllib.parse import unquote, urlparse

__all__ = ["version_of"]


def version_of(package: str) -> str:
    """The version of a package. An editable installation has a hash of its sources after it, because the version does
    not change with them.

    Raises:
        PackageNotFoundError: it is not installed.
    """
    return version(package) + _sources_hash(package)


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
