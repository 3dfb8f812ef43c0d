"""A quantized package from a float one: ONNX Runtime's own quantizers on the base graph, the points put back where
they were. It knows packages and which quantizer to call; the quantizers know how to round a weight."""

from __future__ import annotations

import os
import re
import secrets
import tempfile
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import onnx
import onnx_ir as ir

from onnx_lora.boundary import public
from onnx_lora.errors import ExportError, MissingDependencyError, ModelError, OnnxLoraError, first_line
from onnx_lora.exporter.build import build
from onnx_lora.exporter.foreign_libraries import translate_failures
from onnx_lora.exporter.frontends.companion_files import companions_of
from onnx_lora.exporter.frontends.quiet import quiet_root, silence_root
from onnx_lora.exporter.frontends.source import Loaded
from onnx_lora.exporter.graph.values import WRAPPERS
from onnx_lora.exporter.intake.onnx_file import read_proto
from onnx_lora.exporter.precision import BLOCK_BITS, check_blocks
from onnx_lora.exporter.request import GraphFile, Points, Progress
from onnx_lora.exporter.weights.package_weights import read_package_weights
from onnx_lora.manifest import MANIFEST, GraphInfo
from onnx_lora.package import Package
from onnx_lora.points import InjectionPoint, WholeWeight
from onnx_lora.staging import staged

__all__ = ["Method", "quantize"]

# Bits of a weight that MatMulInteger multiplies with.
_DYNAMIC_BITS = (8,)

# The operator that a head gets while quantizers work: they take MatMul alone, and must leave heads as they are.
_HEAD = "Head"


@public
@dataclass(frozen=True, slots=True)
class Method:
    """How weights are quantized.

    `kind`: "blocks": MatMulNBits, symmetric, a scale for every block of weights; or "dynamic": MatMulInteger, 8 bits,
        one scale a weight, activations rounded to 8 bits on the way.
    `bits`: of a weight: 4 or 8 in blocks, 8 where it is dynamic.
    `block_size`: weights along the inputs that share a scale: 16, 32, 64, 128 or 256.
    `accuracy_level`: of blocks: 4 lets the kernel round activations to 8 bits too, which is the fastest; 1 multiplies
        in float32; 0 leaves it to the kernel.

    Raises ModelError: there is no such method.
    """

    kind: Literal["blocks", "dynamic"] = "blocks"
    bits: int = 4
    block_size: int = 32
    accuracy_level: int = 4

    def __post_init__(self) -> None:
        if self.kind not in ("blocks", "dynamic"):
            raise ModelError(f"the method must be blocks or dynamic, and is {self.kind!r}")
        allowed = BLOCK_BITS if self.kind == "blocks" else _DYNAMIC_BITS
        if self.bits not in allowed:
            raise ModelError(f"{self.kind} quantizes to {' or '.join(map(str, allowed))} bits, not {self.bits}")
        check_blocks(self.block_size, self.accuracy_level)

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

    package: the float package, or its folder.
    out: the quantized package's folder, which must not exist.
    method: how weights are quantized; by default to 4 bits in blocks of 32.
    progress: called with what is being done, how much of it is done, and how much there is.

    Raises ModelError: the package is quantized already, or nothing of it can be. PackageError: it is broken.
    ExportError: ONNX Runtime's quantizer failed. OutputExistsError: `out` exists. StorageError: it cannot be written.
    MissingDependencyError: ONNX Runtime, or sympy, is not installed.
    """
    whole = package if isinstance(package, Package) else Package.open(package)
    chosen = method or Method()
    if whole.quantized:
        raise ModelError(
            "must be a float package, and is quantized already; give the one it was made from", path=whole.path
        )
    with staged(out) as folder, tempfile.TemporaryDirectory(prefix=".onnx_lora.", dir=folder.parent) as scratch:
        graphs: list[GraphFile] = []
        for index, info in enumerate(whole.manifest.graphs):
            progress("quantize", index, len(whole.manifest.graphs))
            target = Path(scratch) / str(index) / f"{info.name}.onnx"
            target.parent.mkdir()
            with quiet_root(), translate_failures(partial(_as_ours, whole.path)):
                _quantize(whole, info, target, chosen)
            graphs.append(GraphFile(info.name, target))
        loaded = Loaded(
            graphs=tuple(graphs),
            record=whole.manifest.source | {"quantized": str(chosen)},
            weights=read_package_weights(whole),
            companions=companions_of(whole.path),
            scratch=Path(scratch),
            untrained=whole.manifest.untrained,
        )
        built = build(folder, loaded, _points_of(whole), progress=progress)
        if not built.quantized:
            raise ModelError("none of its points lies on a weight that the quantizers take", path=whole.path)
        _restore(built, whole)
    return Package.open(out)


def _points_of(package: Package) -> Points:
    """The options that give a package the same points again, with modules by their whole names."""
    names = "|".join(re.escape(name) for name in package.points)
    model = read_proto(package.path / package.manifest.graphs[0].file)
    ranks: set[int] = set()
    for value in model.graph.initializer:
        if value.name.endswith(".lora_A.weight"):
            ranks.add(value.dims[-1])
    dora = False
    for info in package.manifest.graphs:
        for branch in info.branches:
            dora = dora or branch.dora
    default_rank = 1 if ranks == {1} else 0
    return Points(names, tuple(package.replaceable), default_rank, dora)


def _quantize(package: Package, info: GraphInfo, target: Path, method: Method) -> None:
    """Write the base graph of `info` to `target`, its products quantized but for those of replaceable weights."""
    import onnxruntime.quantization.matmul_nbits_quantizer  # noqa: F401 - gives the root logger a level
    from onnxruntime.quantization.onnx_model import ONNXModel

    silence_root()
    model = read_proto(package.path / info.base_file)
    onnx.load_external_data_for_model(model, str(package.path))
    kept: set[str] = set()
    for weight in info.replaceable:
        kept.update(part.initializer for part in weight.parts)
    _name_nodes(model.graph)
    with _hide_heads(model.graph, kept) as heads:
        _own_transposed(model.graph)
        ONNXModel(model).replace_gemm_with_matmul()
    _drop_shapes_of_weights(model.graph)
    _name_nodes(model.graph)
    excluded: list[str] = []
    for head in heads:
        excluded.append(head)
        excluded.append(f"{head}_MatMul")  # what quantize_dynamic calls the MatMul that it makes of a Gemm
    if method.kind == "dynamic":
        quantized = _quantize_dynamic(model, target.parent, excluded)
    else:
        quantized = _quantize_blocks(model, method, excluded)
    ir.save(quantized, target, external_data=f"{target.name}.data")


@contextmanager
def _hide_heads(graph: onnx.GraphProto, kept: Collection[str]) -> Iterator[list[str]]:
    """Give products of `kept` weights an operator that ONNX Runtime's tools do not know, for as long as the block
    runs; gives the names of their nodes."""
    makers: dict[str, onnx.NodeProto] = {}
    for maker in graph.node:
        makers.update(dict.fromkeys(maker.output, maker))
    heads = [node for node in graph.node if _reaches(makers, node, kept)]
    names = [node.name for node in heads]
    kinds = [node.op_type for node in heads]
    for node in heads:
        node.op_type = _HEAD
    yield names
    # Other nodes than before: the tools write the graph anew, in the same order.
    hidden = [node for node in graph.node if node.op_type == _HEAD]
    for node, kind in zip(hidden, kinds, strict=True):
        node.op_type = kind


def _quantize_dynamic(model: onnx.ModelProto, scratch: Path, excluded: list[str]) -> ir.Model:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    # Not under its own name: ONNX refuses to write beside a data file of that name in the working folder.
    raw = scratch / f"{secrets.token_hex(8)}.onnx"
    quantize_dynamic(
        model,
        raw,
        weight_type=QuantType.QInt8,
        op_types_to_quantize=["MatMul"],
        nodes_to_exclude=excluded,
        use_external_data_format=True,
    )
    return ir.load(raw)


def _quantize_blocks(model: onnx.ModelProto, method: Method, excluded: list[str]) -> ir.Model:
    from onnxruntime.quantization.matmul_nbits_quantizer import DefaultWeightOnlyQuantConfig, MatMulNBitsQuantizer

    config = DefaultWeightOnlyQuantConfig(
        block_size=method.block_size, is_symmetric=True, bits=method.bits, accuracy_level=method.accuracy_level
    )
    quantizer = MatMulNBitsQuantizer(model, nodes_to_exclude=excluded, algo_config=config)
    quantizer.process()
    quantized: ir.Model = ir.from_proto(quantizer.model.model)
    return quantized


def _name_nodes(graph: onnx.GraphProto) -> None:
    """Give every node a name: quantizers know nodes by their names alone."""
    for index, node in enumerate(graph.node):
        node.name = node.name or f"{node.op_type}_{index}"


def _own_transposed(graph: onnx.GraphProto) -> None:
    """Give every Gemm that ONNX Runtime's tool will transpose a weight of its own: it does not look who else reads
    it."""
    weights = {value.name: value for value in graph.initializer}
    readers: Counter[str] = Counter()
    for node in graph.node:
        readers.update(node.input)
    for node in graph.node:
        if node.op_type != "Gemm":
            continue
        name = node.input[1]
        if name in weights and readers[name] > 1:
            copy = graph.initializer.add()
            copy.CopyFrom(weights[name])
            copy.name = f"{name}.{node.name}"
            node.input[1] = copy.name


def _drop_shapes_of_weights(graph: onnx.GraphProto) -> None:
    """Drop the shapes that the graph noted down for weights: those that were transposed have others now."""
    weights = {value.name for value in graph.initializer}
    noted = [value for value in graph.value_info if value.name not in weights]
    del graph.value_info[:]
    graph.value_info.extend(noted)


def _reaches(makers: Mapping[str, onnx.NodeProto], node: onnx.NodeProto, weights: Collection[str]) -> bool:
    """Whether a product's weight is one of `weights`."""
    if node.op_type not in ("MatMul", "Gemm") or not weights:
        return False
    name = node.input[1]
    while (maker := makers.get(name)) is not None and maker.op_type in WRAPPERS:
        name = maker.input[0]
    return name in weights


def _restore(built: Package, source: Package) -> None:
    """Let the manifest say of points and replaceable weights what the float package's says, but where they lie.

    Raises ModelError: a point is gone.
    """
    graphs: list[GraphInfo] = []
    for new, old in zip(built.manifest.graphs, source.manifest.graphs, strict=True):
        graphs.append(_restore_graph(new, old, source.path))
    manifest = replace(built.manifest, graphs=tuple(graphs))
    (built.path / MANIFEST).write_text(manifest.to_json(), "utf-8")


def _restore_graph(new: GraphInfo, old: GraphInfo, path: Path) -> GraphInfo:
    """What the float package in `path` says of a graph, with the places that the quantized one has."""
    places = {point.module: point for point in new.points}
    weights = {weight.name: weight for weight in new.replaceable}
    lost = [point.module for point in old.points if point.module not in places]
    lost += [weight.name for weight in old.replaceable if weight.name not in weights]
    if lost:
        raise ModelError(
            f"every point must stay, and {', '.join(lost)} cannot be found in the quantized graph",
            path=path,
            problems=[f"{entry.node}: {entry.reason}" for entry in new.unplaced],
        )
    points: list[InjectionPoint] = []
    for point in old.points:
        place = places[point.module]
        unproven = point.unproven or place.unproven
        points.append(replace(place, sha256=point.sha256, unproven=unproven))
    replaceable: list[WholeWeight] = []
    for weight in old.replaceable:
        parts = weights[weight.name].parts
        replaceable.append(replace(weight, parts=parts))
    return replace(
        new,
        points=tuple(points),
        replaceable=tuple(replaceable),
        untargeted=old.untargeted,
        unplaced=old.unplaced,
    )


def _as_ours(path: Path, error: Exception) -> OnnxLoraError | None:
    """An exception of ONNX Runtime's quantizers as ours; the disk's stay as they are."""
    if isinstance(error, ImportError):
        return MissingDependencyError(f"quantizing needs {error.name}: pip install 'onnx-lora[attach,cpu]'")
    if isinstance(error, OSError):
        return None
    return ExportError(f"ONNX Runtime's quantizer failed: {first_line(error)}", path=path)
