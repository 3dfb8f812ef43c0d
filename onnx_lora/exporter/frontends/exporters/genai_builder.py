"""ONNX Runtime GenAI's model builder as a child process: what it is asked, what it says, and how it ends. It
knows command lines and log lines; it knows no graph.

A process of its own, because the builder imports `builders` as a top-level package, prints on both channels,
and takes memory that should be given back before its graph is opened."""

from __future__ import annotations

import importlib.util
import os
import re
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from onnx_lora.errors import ExportError, ModelError, StorageError
from onnx_lora.exporter.precision import Precision
from onnx_lora.exporter.request import Progress

__all__ = ["Wish", "build_graph", "builder_version", "knows_architecture"]

# Where a precision is meant to run: the pairs that the builder calls valid. For fp16 on the CPU it would write
# another attention, without GroupQueryAttention; the graph for CUDA runs on both.
_PROVIDERS = {"fp32": "cpu", "fp16": "cuda", "int8": "cpu", "int4": "cpu"}

_KEPT_LINES = 200  # of the child's, for its last words
_LAST_WORDS = 2  # lines of an exception's message: of some the second says what is wrong

_LAYER = re.compile(r"Reading layer (\d+)")
_QUANTIZED = re.compile(r"complete quantization of \S*?/layers\.(\d+)/")
_SAVED = re.compile(r"Saving .*\| (\d+)/(\d+) \[")

# Foreign exceptions that say the checkpoint's files are missing, damaged or of another shape.
_DAMAGED = ("OSError", "SafetensorError", "JSONDecodeError", "UnpicklingError", "ValueError")
_MISSHAPEN = ("loading state_dict", "out of meta tensor")


@dataclass(frozen=True, slots=True)
class Wish:
    """What is built: a local folder's checkpoint or a hub id, where to, how. `layers`: as many as it has, or 0.
    `read` is what the builder is given for it: the same, or a folder in the words of this transformers."""

    model: str | os.PathLike[str]
    folder: Path
    precision: Precision
    layers: int
    read: str | os.PathLike[str]

    @property
    def is_local(self) -> bool:
        return Path(self.read).is_dir()


def knows_architecture(name: str) -> bool:
    """Whether the builder's own text names an architecture, which it compares a checkpoint's with; true where there is
    no name, or the text cannot be found. The builder is not loaded: that takes torch."""
    if not name:
        return True
    found = importlib.util.find_spec("onnxruntime_genai")
    for folder in (found.submodule_search_locations or ()) if found is not None else ():
        source = Path(folder) / "models" / "builder.py"
        if source.is_file():
            return f'"{name}"' in source.read_text("utf-8", "replace")
    return True


def builder_version() -> str:
    """Of the distribution that brings `onnxruntime_genai`, be it for CPU, CUDA or DirectML."""
    names = metadata.packages_distributions().get("onnxruntime_genai", [])
    return metadata.version(names[0]) if names else "unknown"


def build_graph(wish: Wish, scratch: Path, progress: Progress) -> None:
    """Write `model.onnx`, `genai_config.json` and the tokenizer's files into `wish.folder`.

    Raises ModelError: the builder does not know the architecture, or weights are missing or damaged. ExportError:
    the builder failed. StorageError: the disk is full.
    """
    last: deque[str] = deque(maxlen=_KEPT_LINES)
    with _child(wish, scratch) as process:
        assert process.stdout is not None
        for line in process.stdout:  # a progress bar's carriage returns end lines too
            if text := line.rstrip():
                last.append(text)
                _report(text, wish.layers, progress)
        code = process.wait()
    if code:
        _raise(wish, code, list(last))


@contextmanager
def _child(wish: Wish, scratch: Path) -> Iterator[subprocess.Popen[str]]:
    """The running builder, killed when the block ends by an exception: Ctrl-C leaves nothing running."""
    process = subprocess.Popen(
        _command(wish, scratch),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        errors="replace",
        env=_environment(wish, scratch),
        cwd=scratch,  # `-m` imports from here first: nothing of the user's may be taken for the builder's
        start_new_session=True,  # Ctrl-C comes to us; the child would print a traceback of its own
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
        if process.stdout is not None:
            process.stdout.close()


def _command(wish: Wish, scratch: Path) -> list[str]:
    """Its paths are absolute: the child starts elsewhere."""
    source = ["-i", str(Path(wish.read).resolve())] if wish.is_local else ["-m", str(wish.read)]
    name = wish.precision.name
    options = ["hf_remote=false"]  # no code out of a checkpoint is run
    # A cache of a window's length cannot be empty; with all of it the mask says what a window sees.
    options += ["windowed_kv_cache=false"]
    if wish.precision.quantized:
        options += [f"block_size={wish.precision.block_size}", f"accuracy_level={wish.precision.accuracy_level}"]
        options += ["is_symmetric=true"]
    if name == "int8":
        # The builder ties a quantized embedding to the head by the name of a 4-bit weight: no valid graph.
        options += ["shared_embeddings=false"]
    if not _has_token():
        options += ["hf_token=false"]  # else public models are refused without one
    return [
        *(sys.executable, "-m", "onnxruntime_genai.models.builder", *source),
        *("-o", str(wish.folder.resolve()), "-p", name, "-e", _PROVIDERS[name]),
        *("-c", str(scratch.resolve() / "cache" if wish.is_local else _hub_cache())),
        *("--extra_options", *options),
    ]


def _environment(wish: Wish, scratch: Path) -> dict[str, str]:
    ours = {"PYTHONUNBUFFERED": "1", "PYTHONIOENCODING": "utf-8", "TMPDIR": str(scratch.resolve())}
    return os.environ | ours | ({"HF_HUB_OFFLINE": "1"} if wish.is_local else {})


def _has_token() -> bool:
    from huggingface_hub import get_token

    return get_token() is not None


def _hub_cache() -> str:
    """Where transformers keeps hub files: the same model, loaded to compare with, is not fetched twice."""
    from huggingface_hub.constants import HF_HUB_CACHE

    return str(Path(HF_HUB_CACHE).resolve())


def _report(line: str, layers: int, progress: Progress) -> None:
    if match := _LAYER.match(line):
        progress("build layers", int(match[1]) + 1, layers)
    elif match := _QUANTIZED.search(line):
        progress("quantize layers", int(match[1]) + 1, layers)
    elif match := _SAVED.match(line):
        progress("save weights", int(match[1]), int(match[2]))


def _raise(wish: Wish, code: int, lines: list[str]) -> None:
    said = _last_words(lines)
    kind, _, message = said.partition(": ")
    kind = kind.rpartition(".")[2]
    if "No space left on device" in said or "Disk quota exceeded" in said:
        raise StorageError("the disk is full; nothing was written")
    if code < 0:
        name = signal.Signals(-code).name if -code in set(signal.Signals) else str(-code)
        raise ExportError(f"the GenAI builder was killed ({name}), often for lack of memory", path=wish.model)
    if kind == "NotImplementedError" and "is not currently supported" in message:
        raise ModelError(
            'the GenAI builder does not know this architecture; export it with `via="transformers"`', path=wish.model
        )
    if kind in _DAMAGED or any(phrase in said for phrase in _MISSHAPEN):
        raise ModelError(f"the GenAI builder cannot read it: {said}", path=wish.model)
    raise ExportError(f"the GenAI builder failed: {said}", path=wish.model)


def _last_words(lines: list[str]) -> str:
    """The message of the last traceback, whose frames are indented; else the last line."""
    for index in range(len(lines) - 1, -1, -1):
        if lines[index].startswith("Traceback (most recent call last)"):
            start = next((at for at in range(index + 1, len(lines)) if not lines[at].startswith(" ")), index)
            return " ".join(line.strip() for line in lines[start : start + _LAST_WORDS])
    return lines[-1] if lines else "it said nothing"
