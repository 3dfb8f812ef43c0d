"""What is done with mutants: one target a kind of file. A target ends, or raises one of our errors; anything else that
it does is a bug.

"memory" targets read files and compute in Python, a thousand a second; "model" targets start exporters or ONNX
Runtime."""

from __future__ import annotations

import atexit
import shutil
import tempfile
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from onnx_lora import (
    Adapter,
    AdapterSession,
    OnnxLoraError,
    Package,
    Sampling,
    bind,
    fold,
    fold_to,
    read_adapter,
    write_bound,
)
from onnx_lora.adapters import Delta, Origin
from onnx_lora.adapters.formats.registry import find_format
from onnx_lora.adapters.write import FORMATS, write_adapter
from onnx_lora.exporter import attach, export
from onnx_lora.exporter.quantization import quantize
from onnx_lora.kinds import Linear
from onnx_lora.runtime import Chat, TextGenerator
from onnx_lora.runtime.generation.chat import ChatTemplate
from onnx_lora.runtime.generation.settings import Settings
from onnx_lora.runtime.generation.text import TextTokenizer
from tests.fuzz import seeds
from tests.fuzz.worker import Target
from tests.support.exporters import VIA

__all__ = ["TARGETS"]


# Formats that need no package to be written.
_WRITTEN = tuple(name for name in FORMATS if find_format(name).writes_portable and name != "gguf")


@cache
def _package() -> Package:
    """What adapters are bound to, once a process."""
    place = Path(tempfile.mkdtemp(prefix="onnx_lora.fuzz."))
    atexit.register(shutil.rmtree, place, ignore_errors=True)
    return seeds.adapter_package(place / "package")


def _only(folder: Path) -> Path:
    """The one file in a folder, or the folder."""
    entries = list(folder.iterdir())
    return entries[0] if len(entries) == 1 else folder


def _attempt(*uses: Callable[[], object]) -> None:
    """Each use by itself: one that is refused does not keep the next from being tried."""
    for use in uses:
        try:
            use()
        except OnnxLoraError:
            continue


def _adapter(folder: Path, out: Path) -> None:
    own = read_adapter(_only(folder))

    def to_package() -> None:
        bound = bind(own, _package())
        if chosen == 0:
            write_bound(bound, out / "bound.safetensors")

    # Writing takes ten times as long as reading: one format a file, or none.
    chosen = int(own.origin.sha256[:4], 16) % 12
    uses: list[Callable[[], object]] = [to_package]
    if chosen < len(_WRITTEN):
        name = _WRITTEN[chosen]
        uses.append(partial(write_adapter, own, out / name, format=name))
    _attempt(*uses)


def _open(folder: Path, out: Path) -> None:
    package = Package.open(folder)
    for point in package.points.values():
        package.mark(point)
    for weight in package.replaceable.values():
        package.default(weight)
    assert len(package.fingerprint) == 64


def _texts(folder: Path, out: Path) -> None:
    chat = Chat([{"role": "user", "content": "a b"}], {"documents": []})
    _attempt(
        lambda: Settings.read(folder),
        lambda: ChatTemplate.read(folder).text(chat),
        lambda: _tokenized(TextTokenizer.open(folder)),
    )


def _tokenized(tokenizer: TextTokenizer) -> None:
    tokenizer.decode(tokenizer.encode("ab c", special=True))


def _attach(folder: Path, out: Path) -> None:
    checkpoint = folder / "checkpoint"
    package = attach(
        folder / "m.onnx",
        out / "package",
        targets="all",
        checkpoint=checkpoint if checkpoint.is_dir() else None,
    )
    assert package.points


def _quiet() -> Any:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    return options


def _use(folder: Path, out: Path) -> None:
    package = Package.open(folder)

    def run() -> None:
        session = AdapterSession(package, sess_options=_quiet(), providers=["CPUExecutionProvider"])
        feeds = {arg.name: _fed(arg) for arg in session.get_inputs()}
        session.run(None, feeds)
        session.load_adapter("a", _delta(package))
        session.run(None, feeds, adapter="a")
        session.run(None, feeds, adapter=["a", None])

    _attempt(
        run,
        lambda: fold(package, _delta(package), sess_options=_quiet(), providers=["CPUExecutionProvider"]),
        lambda: fold_to(package, _delta(package), out / "folded"),
        lambda: quantize(package, out / "quantized"),
    )


def _delta(package: Package) -> Any:
    """An adapter on one point."""
    deltas = {
        module: Delta(np.ones((2, point.in_features), np.float32), np.ones((point.out_features, 2), np.float32), 1.0)
        for module, point in package.points.items()
        if isinstance(point.kind, Linear) and point.in_features * point.out_features < 2**20
    }
    return Adapter("a", dict(list(deltas.items())[:1]), {}, Origin("memory", "", "", "", ""))


def _fed(arg: Any) -> Any:
    """Two rows of ones for a graph's input."""
    shape = [size if isinstance(size, int) and size < 64 else 2 for size in arg.shape]
    return np.ones(shape, np.int64 if "int64" in arg.type else np.float32)


def _generate(folder: Path, out: Path) -> None:
    generator = TextGenerator(folder, sess_options=_quiet(), providers=["CPUExecutionProvider"])
    few = Sampling(max_tokens=3)
    _attempt(
        lambda: generator.generate([3, 4], sampling=few),
        lambda: generator.generate("ab c", sampling=few),
        lambda: generator.generate(Chat([{"role": "user", "content": "a b"}]), sampling=few),
    )


def _export(folder: Path, out: Path) -> None:
    assert export(folder, out / "package", via=VIA, verify=False).points


TARGETS: tuple[Target, ...] = (
    Target("peft", "memory", seeds.peft_folders, _adapter, 3),
    Target("peft methods", "memory", seeds.peft_methods, _adapter, 3, ("peft",)),
    Target("peft .bin", "memory", seeds.peft_pickles, _adapter, 2, ("torch",)),
    Target("kohya and lycoris", "memory", seeds.kohya_files, _adapter, 2),
    Target("diffusers and olive", "memory", seeds.diffusion_files, _adapter, 2),
    Target("mlx", "memory", seeds.mlx_folders, _adapter, 2),
    Target("gguf", "memory", seeds.ggufs, _adapter, 2, ("gguf",)),
    Target("converted", "memory", seeds.converted, _adapter, 2),
    Target("manifest", "memory", seeds.manifests, _open, 1),
    Target("texts", "memory", seeds.texts, _texts, 1, ("tokenizers", "jinja2")),
    Target("attach", "model", seeds.graphs, _attach, 8),
    Target("checkpoint", "model", seeds.checkpoints, _attach, 4),
    Target("package", "model", seeds.packages, _use, 6),
    Target("generate", "model", seeds.decoders, _generate, 2, ("tokenizers", "jinja2")),
    Target("export", "model", seeds.exports, _export, 0.2, ("torch", "optimum")),
)
