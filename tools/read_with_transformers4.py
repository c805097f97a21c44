"""Read model folders with an older transformers and compare: python tools/read_with_transformers4.py [FOLDER ...]

Without a folder, a tiny model of every family is saved and read. Makes an environment of its own (``--venv``, kept for
the next time) with transformers from the package registry; torch is that of the interpreter at hand. Both versions read
the same folder: the token ids of a few texts have to be the same, and logits to differ by float32 rounding alone.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import sysconfig
import tempfile
import venv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

__all__ = ["main"]

VERSION = "4.51.3"
TEXTS = ("The capital of France is", "In 1984, 3.14159 people; 2,500 more?", "Zoë's naïve café\n\n  東京", "")
_UNKNOWN = "an architecture that it does not have"
_READ = """
import json, sys
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, __version__
folder, texts = sys.argv[1], json.loads(sys.argv[2])
tokenizer = AutoTokenizer.from_pretrained(folder)
ids = [tokenizer(text)["input_ids"] for text in texts]
model = AutoModelForCausalLM.from_pretrained(folder, torch_dtype=torch.float32).eval()
rows = [row for row in ids if row] or [[3, 4, 5]]
with torch.inference_mode():
    logits = [model(input_ids=torch.tensor([row])).logits[0, -1].tolist() for row in rows]
print("\\n" + json.dumps({"version": __version__, "ids": ids, "logits": logits}))
"""


def main() -> int:
    """Print one line per folder; 1 if any is read differently."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="*", type=Path, metavar="FOLDER")
    parser.add_argument("--version", default=VERSION, help="of transformers (default: %(default)s)")
    parser.add_argument("--venv", type=Path, help="where the environment is kept (default: a temporary folder)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        older = _environment(arguments.venv or Path(scratch) / "venv", arguments.version)
        folders = arguments.folders or _tiny_folders(Path(scratch))
        read_alike = [_compare(folder, older) for folder in folders]
        return int(not all(read_alike))


def _environment(folder: Path, version: str) -> Path:
    """The interpreter of an environment with that transformers, and the torch of this one behind its own packages."""
    python = folder / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")
    if not python.exists():
        venv.create(folder, with_pip=True)
        install = [str(python), "-m", "pip", "install", "--quiet", f"transformers=={version}"]
        subprocess.run(install, check=True)
        purelib = subprocess.run(
            [str(python), "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])"],
            check=True,
            capture_output=True,
            text=True,
        ).stdout.strip()
        (Path(purelib) / "torch_of_another.pth").write_text(sysconfig.get_paths()["purelib"] + "\n", encoding="utf-8")
    return python


def _tiny_folders(scratch: Path) -> list[Path]:
    from editcore.testing import TINY_FAMILIES, tiny_model

    for family in TINY_FAMILIES:
        tiny_model(family).save(scratch / family)
    return [scratch / family for family in TINY_FAMILIES]


def _read(python: Path | str, folder: Path) -> dict[str, Any] | str:
    """What a version of transformers makes of a folder; its last words if it cannot read it."""
    done = subprocess.run(
        [str(python), "-c", _READ, str(folder), json.dumps(TEXTS)], capture_output=True, text=True, check=False
    )
    if "does not recognize this architecture" in done.stderr:
        return _UNKNOWN
    if done.returncode:
        return (done.stderr.strip().splitlines() or ["no message"])[-1]
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def _compare(folder: Path, older: Path) -> bool:
    here, there = _read(sys.executable, folder), _read(older, folder)
    if there == _UNKNOWN and not isinstance(here, str):
        print(f"{folder.name}: of an architecture that the older transformers does not have")
        return True
    if isinstance(here, str) or isinstance(there, str):
        print(f"{folder.name}: cannot be read: {there if isinstance(there, str) else here}")
        return False
    same_ids = here["ids"] == there["ids"]
    off, size = _difference(here["logits"], there["logits"]) if same_ids else (float("nan"), float("nan"))
    good = same_ids and off <= 1e-3 * max(size, 1.0)
    said = f"logits differ by {off:.1e} of {size:.1f}" if same_ids else f"ids {there['ids']} are not {here['ids']}"
    print(f"{folder.name}: {'same' if good else 'DIFFERENT'} in {here['version']} and {there['version']}: {said}")
    return good


def _difference(first: Sequence[Sequence[float]], second: Sequence[Sequence[float]]) -> tuple[float, float]:
    """The largest difference, and the largest number."""
    pairs = [
        (a, b)
        for first_row, second_row in zip(first, second, strict=True)
        for a, b in zip(first_row, second_row, strict=True)
    ]
    return max(abs(a - b) for a, b in pairs), max(abs(a) for a, _ in pairs)


if __name__ == "__main__":
    sys.exit(main())
