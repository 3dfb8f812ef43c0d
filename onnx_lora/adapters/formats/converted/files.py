"""Bound adapters as files: `.safetensors` with all that is known of them in its metadata, and ONNX
Runtime's `.onnx_adapter`, which holds what a graph is fed and nothing else."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Literal

import numpy as np
import safetensors.numpy

from onnx_lora.adapters.adapter import Adapter, BoundAdapter, MatrixDelta, Origin, Replacement, refuse_fold_only
from onnx_lora.adapters.bases import base_number, is_base_number
from onnx_lora.adapters.formats.converted.olive import from_olive
from onnx_lora.adapters.formats.files.reading import Reading, TensorFile, name_problems, parse_json
from onnx_lora.adapters.methods.output_scale import OutputScale
from onnx_lora.boundary import public, unwritten
from onnx_lora.errors import AdapterFileError, InputError, StorageError
from onnx_lora.onnxruntime_errors import fail_as, load_onnxruntime
from onnx_lora.points import Array
from onnx_lora.staging import scratch, staged_place

__all__ = [
    "is_onnx_adapter",
    "is_ours",
    "read_onnx_adapter",
    "read_onnx_file",
    "read_safetensors_adapter",
    "write_bound",
]

# Metadata key and the version of what stands beside it.
_MARK = "onnx_lora"
_VERSION = "1"

# Bytes 4 to 8 of a flatbuffer; ONNX Runtime's lora/adapter_format schema.
_ONNX_ADAPTER_MARK = b"TORT"

_OF_ONE_PRECISION = (
    "DoRA's scales in an .onnx_adapter are those of the package that it was converted for; in another precision the "
    "base has others, and the file does not say which these are"
)

_A, _B = ".lora_A.weight", ".lora_B.weight"
_SCALE, _MAGNITUDE = ".dora_scale", ".lora_magnitude_vector"


@public
def write_bound(
    bound: BoundAdapter,
    out: str | os.PathLike[str],
    *,
    format: Literal["safetensors", "onnx_adapter"] = "safetensors",
) -> Path:
    """Write a bound adapter to the file `out`, whole or not at all.

    Raises OutputExistsError: `out` exists. StorageError: it cannot be written. BindError: some of it can only be
    folded. MissingDependencyError: `.onnx_adapter`, and no ONNX Runtime. InputError: an unknown format.
    """
    target = Path(out)
    if format not in ("safetensors", "onnx_adapter"):
        raise InputError(f"the format must be safetensors or onnx_adapter, and is {format!r}", path=target)
    # A scale that the package does not take yet can be kept for one that does.
    refuse_fold_only(bound, bound.changes if format == "safetensors" else bound.coverage.fold_only)
    runtime = _onnxruntime(target) if format == "onnx_adapter" else None
    with staged_place(target) as place:
        if runtime is None:
            _write_safetensors(bound, place)
        else:
            _write_onnx_adapter(bound, place, runtime)
    return target


def _write_safetensors(bound: BoundAdapter, path: Path) -> None:
    metadata = {
        _MARK: _VERSION,
        "name": bound.name,
        "source": Path(bound.origin.path).name,
        "source_sha256": bound.origin.sha256,
        "method": bound.origin.method,
        "base_model": bound.origin.base_model,
        "package_base": ", ".join(bound.base_names),
        "coverage": json.dumps(asdict(bound.coverage)),
        "base_digests": json.dumps(dict(bound.base_digests)),
        # Of DoRA the magnitudes are there, and each package computes its own.
        "made_of": json.dumps({name: mark for name, mark in bound.made_of.items() if name not in bound.magnitudes}),
    }
    # Bytes first: what the disk refuses is then an OSError.
    path.write_bytes(safetensors.numpy.save(_kept(bound), metadata))


def _kept(bound: BoundAdapter) -> dict[str, Array]:
    """The tensors, and DoRA's magnitudes: its scale is the float weight's. A quantized one has norms of its own, and
    a package of that computes it again."""
    points = [point for graph in bound.graphs for point in graph.points if point.module in bound.magnitudes]
    again = {point.dora_scale for point in points if point.is_quantized}
    magnitudes = {f"{module}{_MAGNITUDE}": values for module, values in bound.magnitudes.items()}
    return {name: tensor for name, tensor in bound.tensors.items() if name not in again} | magnitudes


def _write_onnx_adapter(bound: BoundAdapter, path: Path, runtime: ModuleType) -> None:
    # The OrtValues are views of the arrays.
    inputs = bound.graph_inputs
    values = {name: runtime.OrtValue.ortvalue_from_numpy(array) for name, array in inputs.items()}
    adapter = runtime.AdapterFormat()
    adapter.set_adapter_version(1)
    # Neither ONNX Runtime nor GenAI looks at it, and both refuse a parameter that is no input of the graph.
    adapter.set_model_version(base_number(inputs, bound.graphs) if bound.graphs else 1)
    adapter.set_parameters(values)
    try:
        adapter.export_adapter(str(path))
    except RuntimeError as error:
        raise StorageError(f"ONNX Runtime could not write it: {error}", path=path.name) from error


def is_ours(metadata: Mapping[str, str]) -> bool:
    """Whether a safetensors file with this metadata is one that `write_bound` wrote."""
    return _MARK in metadata


def read_safetensors_adapter(file: TensorFile, path: Path, name: str | None) -> Adapter:
    """Raises AdapterFileError: damaged, or not written by `write_bound`."""
    metadata = file.metadata
    if not is_ours(metadata):
        raise AdapterFileError(
            "a single file must be one that onnx-lora wrote, and this has none of its metadata; a PEFT adapter is a "
            "folder with adapter_config.json beside the weights: give that folder",
            path=path,
        )
    if metadata[_MARK] != _VERSION:
        raise AdapterFileError(
            f"format version {metadata[_MARK]!r}, and this onnx-lora reads {_VERSION!r}; upgrade onnx-lora", path=path
        )
    coverage, digests, made_of = (parse_json(metadata.get(key, "{}").encode(), path, what=key) for key in _JSON_KEYS)
    notes, marks = coverage.get("notes", []), (*digests.values(), *made_of.values())
    if not isinstance(notes, list) or not all(isinstance(text, str) for text in (*notes, *marks)):
        raise AdapterFileError("its metadata is damaged; convert the adapter again", path=path)
    split = _split(file.tensors, path)
    own = name or metadata.get("name") or path.stem
    origin = Origin(str(path), file.sha256, "safetensors", metadata.get("method", ""), metadata.get("base_model", ""))
    return Adapter(
        own,
        split.deltas,
        split.replacements,
        origin,
        digests,
        notes=tuple(notes),
        changes=split.scales,
        made_of=made_of,
    )


# What the number for the base is called among what an `.onnx_adapter` says of itself.
_NUMBER = "model_version"

_JSON_KEYS = ("coverage", "base_digests", "made_of")


def is_onnx_adapter(beginning: bytes) -> bool:
    """Whether a file that begins so has the mark of ONNX Runtime's adapters."""
    return beginning[4:8] == _ONNX_ADAPTER_MARK


def read_onnx_file(file: Reading) -> TensorFile:
    """The tensors of an `.onnx_adapter`. Raises AdapterFileError: damaged. MissingDependencyError: no ONNX Runtime.
    StorageError: no place for a copy."""
    if not is_onnx_adapter(file.ahead(8)):
        raise AdapterFileError("is no adapter of ONNX Runtime, or cut off: its mark is missing", path=file.path)
    runtime = _onnxruntime(file.path)
    content = file.rest()
    # ONNX Runtime maps the file that it reads: it gets one that nobody else can change.
    with scratch() as folder:
        copy = folder / "adapter"
        try:
            copy.write_bytes(content)
        except OSError as error:
            raise unwritten(error, copy) from error
        tensors, number = _parameters(runtime, copy, file.path)
    if problems := name_problems(tensors):
        raise AdapterFileError("is damaged; convert the adapter again", path=file.path, problems=problems)
    return TensorFile(tensors, {_NUMBER: str(number)}, file.sha256())


def _parameters(runtime: ModuleType, copy: Path, path: Path) -> tuple[dict[str, Array], int]:
    """The tensors by name, and the number that stands for the base."""
    tensors: dict[str, Array] = {}
    with fail_as(lambda said: AdapterFileError(f"is damaged; convert the adapter again ({said})", path=path)):
        held = runtime.AdapterFormat.read_adapter(str(copy))
        number = int(held.get_model_version())
        for key, value in held.get_parameters().items():
            # Copied: the values are views of the mapped file.
            array = np.array(value.numpy())
            array.flags.writeable = False
            tensors[key] = array
    return tensors, number


def read_onnx_adapter(file: TensorFile, path: Path, name: str | None) -> Adapter:
    """Raises AdapterFileError: no adapter. UnsupportedAdapterError: quantized by Olive."""
    split = _split(from_olive(file.tensors, path), path)
    origin = Origin(str(path), file.sha256, "onnx_adapter", "", "")
    adapter = Adapter(name or path.stem, split.deltas, split.replacements, origin, changes=split.scales)
    number = int(file.metadata[_NUMBER])
    if is_base_number(number):
        scaled = bool(split.scales) or any(delta.output_scale is not None for delta in split.deltas.values())
        return replace(adapter, base_number=number, notes=(_OF_ONE_PRECISION,) * scaled)
    note = "this .onnx_adapter does not say which base it was bound to, so that was not checked"
    return replace(adapter, notes=(note,))


def _onnxruntime(path: Path) -> ModuleType:
    module: ModuleType = load_onnxruntime(".onnx_adapter files need", path=path)
    return module


@dataclass(frozen=True)
class _Split:
    deltas: Mapping[str, MatrixDelta]
    scales: Mapping[str, OutputScale]
    replacements: Mapping[str, Replacement]


def _split(tensors: Mapping[str, Array], path: Path) -> _Split:
    """Factors, with DoRA's scale and magnitude where they are, scales without factors, and whole weights."""
    problems: list[str] = []
    ends = (_A, _B, _SCALE, _MAGNITUDE)
    modules = dict.fromkeys(name.removesuffix(end) for name in tensors for end in ends if name.endswith(end))
    deltas: dict[str, MatrixDelta] = {}
    scales: dict[str, OutputScale] = {}
    for module in modules:
        made = _delta(*(tensors.get(module + end) for end in ends))
        if isinstance(made, str):
            problems.append(f"{module}: {made}")
        elif isinstance(made, OutputScale):
            scales[module] = made
        else:
            deltas[module] = made
    if problems:
        raise AdapterFileError("is no adapter that onnx-lora wrote", path=path, problems=problems)
    whole = {name: value for name, value in tensors.items() if not name.endswith(ends)}
    replacements = {name: Replacement(value, in_graph_layout=True) for name, value in whole.items()}
    return _Split(deltas, scales, replacements)


def _delta(
    a: Array | None, b: Array | None, scale: Array | None, magnitude: Array | None
) -> MatrixDelta | OutputScale | str:
    """What one module's tensors come to, or what is wrong with them. A scale may come alone."""
    if (a is None) != (b is None) or (a is None and scale is None):
        return "must have both lora_A and lora_B, and has one of them"
    if scale is not None and (scale.ndim != 3 or scale.shape[:2] != (1, 1)):
        return f"dora_scale must have shape [1, 1, out], and has {scale.shape}"
    if a is None or b is None:
        assert scale is not None  # checked above
        return OutputScale(scale[0, 0])
    if a.ndim != 3 or b.ndim != 3 or len(a) != 1 or len(b) != 1:
        return f"must have shapes [1, in, rank] and [1, rank, out], and has {a.shape} and {b.shape}"
    own_scale = None if scale is None else scale[0, 0]
    return MatrixDelta(a[0].T, b[0].T, 1.0, magnitude, own_scale)
