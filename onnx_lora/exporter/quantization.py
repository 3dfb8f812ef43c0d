"""A quantized package from a float one: ONNX Runtime's own quantizers on the base graph, the points put back where
they were. It knows packages and quantizers; how a weight is rounded, they know."""

from __future__ import annotations

import logging
import os
import re
import secrets
import tempfile
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import onnx
import onnx_ir as ir

from onnx_lora.boundary import public
from onnx_lora.errors import ExportError, ModelError
from onnx_lora.exporter.build import build
from onnx_lora.exporter.checkpoint import Checkpoint
from onnx_lora.exporter.frontends.source import companions_of
from onnx_lora.exporter.graph_files import GraphFile, Loaded
from onnx_lora.exporter.intake import read_proto
from onnx_lora.exporter.options import Options, Progress
from onnx_lora.manifest import MANIFEST, GraphInfo
from onnx_lora.onnxruntime_errors import fail_in_tool, load_onnxruntime
from onnx_lora.package import Package
from onnx_lora.staging import staged

__all__ = ["Method", "quantize"]

# Operators through which a product reaches its weight.
_WRAPPERS = ("Cast", "Identity", "Transpose")


@public
@dataclass(frozen=True, slots=True)
class Method:
    """How weights are quantized.

    "blocks": MatMulNBits, symmetric, `bits` 4 or 8, a scale for every `block_size` weights;
        `accuracy_level` 4 lets the kernel round activations to 8 bits too, which is the fastest, 0 does not.
    "dynamic": MatMulInteger, 8 bits, one scale a weight, activations rounded to 8 bits on the way.
    """

    kind: Literal["blocks", "dynamic"] = "blocks"
    bits: int = 4
    block_size: int = 32
    accuracy_level: int = 4

    def __post_init__(self) -> None:
        """Raises ModelError: there is no such method."""
        if self.kind not in ("blocks", "dynamic"):
            raise ModelError(f"the method must be blocks or dynamic, and is {self.kind!r}")
        allowed = (4, 8) if self.kind == "blocks" else (8,)
        if self.bits not in allowed:
            raise ModelError(f"{self.kind} quantizes to {' or '.join(map(str, allowed))} bits, not {self.bits}")
        if self.block_size < 16 or self.block_size & (self.block_size - 1):
            raise ModelError(f"the block size must be a power of two from 16 on, and is {self.block_size}")
        if self.accuracy_level not in range(5):
            raise ModelError(f"the accuracy level must be 0 to 4, and is {self.accuracy_level}")

    def __str__(self) -> str:
        return "8 bits, dynamic" if self.kind == "dynamic" else f"{self.bits} bits in blocks of {self.block_size}"


@public
def quantize(
    package: str | os.PathLike[str] | Package,
    out: str | os.PathLike[str],
    *,
    method: Method | None = None,
    progress: Progress = lambda *_: None,
) -> Package:
    """Write `out`: the float package with its weights quantized, all points and replaceable weights as they were.

    Weights that adapters may replace stay in float, and so does what the quantizers leave alone (Gather, Conv).
    Points keep the digests of the float weights: adapters converted for the one package fit the other.

    Raises ModelError: the package is quantized already, or nothing of it can be. PackageError: it is broken.
    OutputExistsError, StorageError, MissingDependencyError.
    """
    whole = package if isinstance(package, Package) else Package.open(package)
    chosen = method or Method()
    if whole.quantized:
        raise ModelError(
            "must be a float package, and is quantized already; give the one it was made from", path=whole.path
        )
    with staged(out) as folder, tempfile.TemporaryDirectory(prefix=".onnx_lora.", dir=folder.parent) as scratch:
        sources: list[GraphFile] = []
        for index, info in enumerate(whole.manifest.graphs):
            progress("quantize", index, len(whole.manifest.graphs))
            target = Path(scratch) / str(index) / f"{info.name}.onnx"
            target.parent.mkdir()
            _quantize(whole, info, target, chosen)
            sources.append(GraphFile(info.name, target))
        loaded = Loaded(
            tuple(sources),
            origin=whole.manifest.source | {"quantized": str(chosen)},
            checkpoint=Checkpoint.of_package(whole),
            companions=companions_of(whole.path),
            scratch=Path(scratch),
        )
        built = build(folder, loaded, _options(whole), progress=progress)
        if not built.quantized:
            raise ModelError("none of its points lies on a weight that the quantizers take", path=whole.path)
        _restore(built, whole)
    return Package.open(out)


def _options(package: Package) -> Options:
    """What gave the package its points, in whole names."""
    names = "|".join(re.escape(name) for name in package.points)
    info = package.manifest.graphs[0]
    model = read_proto(package.path / info.file)
    ranks = {value.dims[-1] for value in model.graph.initializer if value.name.endswith(".lora_A.weight")}
    dora = any(branch.dora for graph in package.manifest.graphs for branch in graph.branches)
    return Options(names, tuple(package.replaceable), 1 if ranks == {1} else 0, dora)


def _quantize(package: Package, info: GraphInfo, target: Path, method: Method) -> None:
    with _run_quantizer(package.path):
        load_onnxruntime("quantizing needs", part="quantization.matmul_nbits_quantizer", extra="attach,cpu")
        from onnxruntime.quantization import QuantType, quantize_dynamic
        from onnxruntime.quantization.matmul_nbits_quantizer import DefaultWeightOnlyQuantConfig, MatMulNBitsQuantizer
        from onnxruntime.quantization.onnx_model import ONNXModel

        logging.getLogger().setLevel(logging.ERROR)
        model = read_proto(package.path / info.base_file)
        onnx.load_external_data_for_model(model, str(package.path))
        kept = {part.initializer for weight in info.replaceable for part in weight.parts}
        _name_nodes(model.graph)
        makers = {output: maker for maker in model.graph.node for output in maker.output}
        heads = [node for node in model.graph.node if _reaches(makers, node, kept)]
        # The second name is what quantize_dynamic gives to the MatMul it makes of a Gemm.
        excluded = [name for node in heads for name in (node.name, f"{node.name}_MatMul")]
        # The quantizers take MatMul alone; a head stays what it is, under a name they do not know.
        kinds = [node.op_type for node in heads]
        for node in heads:
            node.op_type = "Head"
        _own_transposed(model.graph)
        ONNXModel(model).replace_gemm_with_matmul()
        for node, kind in zip((node for node in model.graph.node if node.op_type == "Head"), kinds, strict=True):
            node.op_type = kind
        _drop_shapes_of_weights(model.graph)
        _name_nodes(model.graph)
        if method.kind == "dynamic":
            # Not under its own name: ONNX refuses to write beside a data file of that name in the working folder.
            raw = target.with_name(f"{secrets.token_hex(8)}.onnx")
            quantize_dynamic(
                model,
                raw,
                weight_type=QuantType.QInt8,
                op_types_to_quantize=["MatMul"],
                nodes_to_exclude=excluded,
                use_external_data_format=True,
            )
            quantized = ir.load(raw)
        else:
            config = DefaultWeightOnlyQuantConfig(
                block_size=method.block_size, is_symmetric=True, bits=method.bits, accuracy_level=method.accuracy_level
            )
            quantizer = MatMulNBitsQuantizer(model, nodes_to_exclude=excluded, algo_config=config)
            quantizer.process()
            quantized = ir.from_proto(quantizer.model.model)
        ir.save(quantized, target, external_data=f"{target.name}.data")


def _name_nodes(graph: onnx.GraphProto) -> None:
    """Quantizers know nodes by their names."""
    for index, node in enumerate(graph.node):
        node.name = node.name or f"{node.op_type}_{index}"


def _own_transposed(graph: onnx.GraphProto) -> None:
    """Give every Gemm that ONNX Runtime's tool will transpose a weight of its own: it does not look who else reads
    it."""
    weights = {value.name: value for value in graph.initializer}
    readers = Counter(name for node in graph.node for name in node.input)
    for node in graph.node:
        if node.op_type == "Gemm" and node.input[1] in weights and readers[node.input[1]] > 1:
            copy = graph.initializer.add()
            copy.CopyFrom(weights[node.input[1]])
            copy.name = f"{node.input[1]}.{node.name}"
            node.input[1] = copy.name


def _drop_shapes_of_weights(graph: onnx.GraphProto) -> None:
    """Weights that were transposed have other shapes than the graph noted down."""
    weights = {value.name for value in graph.initializer}
    noted = [value for value in graph.value_info if value.name not in weights]
    del graph.value_info[:]
    graph.value_info.extend(noted)


def _reaches(makers: Mapping[str, onnx.NodeProto], node: onnx.NodeProto, weights: Collection[str]) -> bool:
    """Whether a product's weight is one of `weights`."""
    if node.op_type not in ("MatMul", "Gemm") or not weights:
        return False
    name = node.input[1]
    while (maker := makers.get(name)) is not None and maker.op_type in _WRAPPERS:
        name = maker.input[0]
    return name in weights


def _restore(built: Package, source: Package) -> None:
    """Let the manifest say of points and replaceable weights what the float package's says, but where they lie.

    Raises ModelError: a point is gone.
    """
    graphs: list[GraphInfo] = []
    for new, old in zip(built.manifest.graphs, source.manifest.graphs, strict=True):
        points = {point.module: point for point in new.points}
        weights = {weight.name: weight for weight in new.replaceable}
        lost = [point.module for point in old.points if point.module not in points]
        lost += [weight.name for weight in old.replaceable if weight.name not in weights]
        if lost:
            raise ModelError(
                f"every point must stay, and {', '.join(lost)} cannot be found in the quantized graph",
                path=source.path,
                problems=[f"{entry.node}: {entry.reason}" for entry in new.unplaced],
            )
        graphs.append(
            replace(
                new,
                points=tuple(
                    replace(
                        points[point.module],
                        sha256=point.sha256,
                        unproven=point.unproven or points[point.module].unproven,
                    )
                    for point in old.points
                ),
                replaceable=tuple(replace(weight, parts=weights[weight.name].parts) for weight in old.replaceable),
                untargeted=old.untargeted,
                unplaced=old.unplaced,
            )
        )
    manifest = replace(built.manifest, graphs=tuple(graphs))
    (built.path / MANIFEST).write_text(manifest.to_json(), "utf-8")


@contextmanager
def _run_quantizer(path: Path) -> Iterator[None]:
    """The quantizers' exceptions as ours, and their notes kept out of the user's terminal: importing them gives the
    root logger a handler and a level."""
    root = logging.getLogger()
    level, handlers = root.level, list(root.handlers)
    try:
        with fail_in_tool(lambda said: ExportError(f"ONNX Runtime's quantizer failed: {said}", path=path)):
            yield
    finally:
        root.setLevel(level)
        root.handlers[:] = handlers
