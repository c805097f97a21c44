"""llama.cpp's own server on a GGUF file, in a process of its own, for as long as it is needed.

The package ``xllamacpp`` has the server. A process of its own, because llama.cpp ends its process when a file does not
fit. As a script, this module is that process: it prints the address of the server and ends with its standard input.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path

from editcore import ModelError

__all__ = ["check_installed", "llama_server"]

_CONTEXT = 1024
"""Tokens that the server reads at once."""


def check_installed() -> None:
    """Refuse where the package with llama.cpp is missing.

    Raises:
        ModelError: it is.
    """
    if find_spec("xllamacpp") is None:
        raise ModelError(
            "GGUF files are run with llama.cpp, of the package xllamacpp: pip install edit-lora[llama-cpp]"
        )


@contextlib.contextmanager
def llama_server(model: Path, adapter: Path | None = None, *, threads: int = 1) -> Iterator[str]:
    """The address of a server on a GGUF file, inside the block only.

    Args:
        adapter: a GGUF adapter, which the server loads at the strength 0.

    Raises:
        ModelError: llama.cpp is not installed, or cannot load a file.
    """
    check_installed()
    command = [sys.executable, "-m", "edit_lora.llama_server", str(model), str(threads)]
    command += [] if adapter is None else [str(adapter)]
    pipe = subprocess.PIPE
    with (
        tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as log,
        subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=log, text=True) as process,
    ):
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            for line in process.stdout:
                if line.startswith(_READY):
                    yield str(json.loads(line.removeprefix(_READY)))
                    return
            process.wait()
            log.seek(0)
            raise ModelError(
                f"llama.cpp cannot run {model}{'' if adapter is None else f' with {adapter}'}: {_reason(log)}"
            )
        finally:
            process.kill()


_READY = "listening at "


def _reason(log: Iterator[str]) -> str:
    """What llama.cpp said before it ended, in one line."""
    lines = [line.strip() for line in log if line.strip()]
    told = [line.partition(" E ")[2] for line in lines if " E " in line]
    told += [line for line in lines if "GGML_ASSERT" in line]
    return " ".join((told or lines[-1:] or ["it ended without a word."])[0].split())


def _serve(arguments: Sequence[str]) -> None:
    import xllamacpp

    model, threads, *adapters = arguments
    parameters = xllamacpp.CommonParams()
    parameters.model.path = model
    parameters.n_ctx = _CONTEXT
    parameters.n_parallel = 1
    parameters.warmup = False
    parameters.n_gpu_layers = 0
    parameters.cache_type_k = parameters.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    parameters.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    parameters.port = 0
    parameters.cpuparams.n_threads = int(threads)
    parameters.cpuparams_batch.n_threads = int(threads)
    parameters.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(path, 0.0) for path in adapters]
    server = xllamacpp.Server(parameters)
    sys.stdout.write(f"{_READY}{json.dumps(server.listening_address)}\n")
    sys.stdout.flush()
    sys.stdin.read()


if __name__ == "__main__":
    _serve(sys.argv[1:])
