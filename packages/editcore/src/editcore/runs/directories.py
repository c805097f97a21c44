"""Files and folders that are written whole or not at all, for the commands of plugins that make run directories."""

from __future__ import annotations

from editcore._util.files import json_text, replacing, write_tensors, write_text
from editcore._util.folders import new_folder, refuse_existing
from editcore._util.records import record_text

__all__ = ["json_text", "new_folder", "record_text", "refuse_existing", "replacing", "write_tensors", "write_text"]
