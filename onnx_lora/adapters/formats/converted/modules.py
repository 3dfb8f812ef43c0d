"""The tensors of a bound adapter, by the names of graph inputs, sorted into the modules to which they belong. It knows
no file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from onnx_lora.adapters.adapter import MatrixDelta, Replacement
from onnx_lora.adapters.methods.output_scale import OutputScale
from onnx_lora.adapters.problems import TensorError
from onnx_lora.errors import AdapterFileError
from onnx_lora.points import Array

__all__ = ["MAGNITUDE", "BoundModules", "split_modules"]

MAGNITUDE = ".lora_magnitude_vector"

_A = ".lora_A.weight"
_B = ".lora_B.weight"
_SCALE = ".dora_scale"
_ENDS = (_A, _B, _SCALE, MAGNITUDE)


@dataclass(frozen=True)
class BoundModules:
    """`deltas`: factors, with DoRA's scale and magnitude where the file has them. `scales`: the scales of modules that
    have no factors. `replacements`: whole weights, by parameter."""

    deltas: Mapping[str, MatrixDelta]
    scales: Mapping[str, OutputScale]
    replacements: Mapping[str, Replacement]


def split_modules(tensors: Mapping[str, Array], path: Path) -> BoundModules:
    """`M.lora_A.weight` `[1, in, r]`, `M.lora_B.weight` `[1, r, out]`, `M.dora_scale` `[1, 1, out]`,
    `M.lora_magnitude_vector` `[out]`, and whole weights by other names.

    Raises AdapterFileError: a factor is missing, or has another shape.
    """
    modules: dict[str, dict[str, Array]] = {}
    replacements: dict[str, Replacement] = {}
    for name, values in tensors.items():
        end = next((end for end in _ENDS if name.endswith(end)), None)
        if end is None:
            replacements[name] = Replacement(values, in_graph_layout=True)
        else:
            modules.setdefault(name.removesuffix(end), {})[end] = values
    deltas: dict[str, MatrixDelta] = {}
    scales: dict[str, OutputScale] = {}
    problems: list[str] = []
    for module, own in modules.items():
        try:
            change = _read_module(own)
        except TensorError as error:
            problems.append(f"{module}: {error}")
            continue
        if isinstance(change, OutputScale):
            scales[module] = change
        else:
            deltas[module] = change
    if problems:
        raise AdapterFileError("is no adapter that onnx-lora wrote", path=path, problems=problems)
    return BoundModules(deltas, scales, replacements)


def _read_module(tensors: Mapping[str, Array]) -> MatrixDelta | OutputScale:
    """A pair of factors, or a scale that comes alone. Raises TensorError."""
    a, b, scale = tensors.get(_A), tensors.get(_B), tensors.get(_SCALE)
    if (a is None) != (b is None):
        raise TensorError("must have both lora_A and lora_B, and has one of them")
    if scale is not None and (scale.ndim != 3 or scale.shape[:2] != (1, 1)):
        raise TensorError(f"dora_scale must have shape [1, 1, out], and has {scale.shape}")
    if a is None or b is None:
        if scale is None:
            raise TensorError("must have both lora_A and lora_B, and has neither of them")
        return OutputScale(scale[0, 0])
    if a.ndim != 3 or b.ndim != 3 or len(a) != 1 or len(b) != 1:
        raise TensorError(f"must have shapes [1, in, rank] and [1, rank, out], and has {a.shape} and {b.shape}")
    output_scale = None if scale is None else scale[0, 0]
    return MatrixDelta(a[0].T, b[0].T, 1.0, tensors.get(MAGNITUDE), output_scale)
