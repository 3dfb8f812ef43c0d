"""What a user may write: every public name, in a file that `mypy --strict` must accept (`tests/test_public.py`).

It is checked and never run.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import onnx_lora
from onnx_lora import (
    Adapter,
    AdapterError,
    AdapterFileError,
    AdapterSession,
    BindError,
    BoundAdapter,
    Cache,
    CacheError,
    Chat,
    Checkpoint,
    Converted,
    ConvertedFolder,
    ExportError,
    FeedError,
    Generation,
    InputError,
    InternalError,
    MissingDependencyError,
    ModelError,
    OnnxFiles,
    OnnxLoraError,
    OutputExistsError,
    OutsideError,
    Package,
    PackageError,
    Piece,
    Pipeline,
    PluginError,
    Points,
    Precision,
    PromptError,
    Requantize,
    RunError,
    Sampling,
    SamplingError,
    SelectionError,
    SeveralAdaptersError,
    StorageError,
    Stream,
    TextGenerator,
    TorchModule,
    UnsupportedAdapterError,
    VerificationError,
    attach,
    bind,
    convert_all,
    export,
    fold,
    fold_to,
    measure,
    quantize,
    read_adapter,
    verify,
    write_adapter,
    write_bound,
)

Array = np.ndarray[Any, Any]


def make_packages(checkpoint: Path, graphs: Path, out: Path) -> list[Package]:
    exported: Package = export(str(checkpoint), out / "exported", task="text-generation")
    attached: Package = attach(graphs, out / "attached", targets=["q_proj", "v_proj"])
    quantized: Package = quantize(exported, out / "int4")
    for comparison in verify(exported, str(checkpoint)):
        print(comparison)
    return [exported, attached, quantized]


def make_from_sources(module: Any, example: Any, out: Path) -> list[Package]:
    points = Points(targets="all", default_rank=1)
    checkpoint = Checkpoint("my-model", task="text-generation-with-past", precision=Precision("int4", block_size=32))
    return [
        export(checkpoint, out / "checkpoint", points=points),
        export(OnnxFiles("model.onnx", checkpoint="my-model"), out / "files", points=points),
        export(Pipeline("my-pipeline"), out / "pipeline", points=points),
        export(TorchModule(module, example_inputs=example), out / "module", points=points),
    ]


def convert(file: Path, package: Package, out: Path) -> BoundAdapter:
    adapter: Adapter = read_adapter(file)
    tensors: dict[str, Array] = {"q.lora_A.weight": np.ones((2, 4)), "q.lora_B.weight": np.ones((4, 2))}
    print(read_adapter(tensors, config={"peft_type": "LORA", "r": 2}, name="sql"))
    bound: BoundAdapter = bind(adapter, package)
    written: Path = write_adapter(adapter, out / "peft", format="peft")
    print(written, write_bound(bound, out / "bound.safetensors"))
    return bound


def switch(folder: Path, feeds: Mapping[str, Array]) -> Iterable[Any]:
    session = AdapterSession(folder)
    session.load_adapter("sql", folder / "sql")
    yield session.run(None, feeds)
    yield session.run(None, feeds, adapter="sql")
    yield session.run(None, feeds, adapter={"sql": 0.5})
    yield session.run(None, feeds, adapter=["sql", None])


def merge(package: Package, adapter: BoundAdapter, out: Path) -> Any:
    leave = Requantize()
    fold_to(package, adapter, out, requantize=leave)
    print(leave.rounding)
    print(measure(package, adapter, rounds=5))
    return fold(package, adapter).run(None, {})


def write(folder: Path) -> str:
    generator = TextGenerator(folder)
    sampling = Sampling(max_tokens=8, temperature=0.7)
    stream: Stream = generator.stream("The king", sampling=sampling)
    pieces: list[Piece] = list(stream)
    results: list[Generation] = generator.generate([Chat([{"role": "user", "content": "Hello"}])], sampling=sampling)
    cache: Cache | None = results[0].cache
    return "".join(piece.text for piece in pieces) + str(cache)


# A program that tells every error apart, the narrow ones first.
def convert_everything(folder: str, package: Package) -> list[str]:
    done: ConvertedFolder = convert_all(folder, "converted", format="safetensors", package=package)
    failed: Sequence[Converted] = done.failed
    return [f"{one.name}: {one.error}" for one in failed]


REASONS: Mapping[type[OnnxLoraError], str] = {
    SeveralAdaptersError: "a file of several adapters",
    AdapterFileError: "a damaged file",
    UnsupportedAdapterError: "a method that is refused",
    BindError: "an adapter of another model",
    AdapterError: "an adapter",
    PluginError: "a format or method of somebody else's",
    ModelError: "a model",
    PackageError: "a package",
    SelectionError: "a choice of adapters",
    FeedError: "inputs",
    PromptError: "a prompt",
    SamplingError: "settings",
    CacheError: "a cache",
    OutputExistsError: "a place that is taken",
    InputError: "what was given",
    MissingDependencyError: "a library that is not installed",
    StorageError: "the disk",
    ExportError: "an exporter",
    RunError: "a run",
    VerificationError: "other numbers than the reference's",
    OutsideError: "the world",
    InternalError: "a fault of the library",
}


def explain(error: OnnxLoraError) -> tuple[str, int, tuple[str, ...]]:
    for kind, reason in REASONS.items():
        if isinstance(error, kind):
            return f"{onnx_lora.__version__}: {reason}", error.exit_code, error.problems
    return str(error), error.exit_code, error.problems
