"""What the tensors of a foreign file come to, and what is wrong with them. It knows no format."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from onnx_lora.adapters.adapter import Adapter, Change, Delta, MatrixDelta, Origin, Replacement
from onnx_lora.errors import AdapterFileError, UnsupportedAdapterError
from onnx_lora.kinds import Conv
from onnx_lora.points import Array

__all__ = ["Collected", "alpha_of", "as_matrix", "two_factors"]


@dataclass
class Collected:
    """`problems`: what is damaged; `unsupported`: what is known, and refused. Both name the tensor first."""

    deltas: dict[str, Delta | MatrixDelta] = field(default_factory=dict)
    changes: dict[str, Change] = field(default_factory=dict)
    replacements: dict[str, Replacement] = field(default_factory=dict)
    methods: set[str] = field(default_factory=set)
    problems: list[str] = field(default_factory=list)
    unsupported: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    with_tied_heads: set[str] = field(default_factory=set)

    def put_delta(self, module: str, delta: Delta | MatrixDelta) -> None:
        self.deltas[module] = delta
        self.methods.add("LoRA" if delta.magnitude is None else "DoRA")

    def put_change(self, module: str, change: Change, tensors: Mapping[str, Array]) -> None:
        """`tensors`: what the change is made of; nothing looks into it later."""
        self.changes[module] = change
        self.methods.add(change.method)
        for name, values in tensors.items():
            bad = values.size - int(np.isfinite(values).sum()) if values.dtype.kind == "f" else 0
            if bad:
                self.problems.append(
                    f"{module}, {name}: {bad} of {values.size} values are NaN or infinite; train or save it again"
                )

    def floats(self, tensors: Mapping[str, Array]) -> dict[str, Array]:
        """The tensors that are floating point; the others are problems."""
        wrong = {name: values for name, values in tensors.items() if values.dtype.kind != "f"}
        self.problems += [f"{name}: must be floating point, and is {values.dtype}" for name, values in wrong.items()]
        return {name: values for name, values in tensors.items() if name not in wrong}

    def adapter(
        self, path: Path, name: str, *, format: str, base_model: str = "", flat_names: bool = False, sha256: str
    ) -> Adapter:
        """`sha256`: of the file of weights.

        Raises UnsupportedAdapterError, AdapterFileError: what is wrong, all of it.
        """
        if not (self.deltas or self.changes or self.replacements or self.problems or self.unsupported):
            self.problems.append("holds no tensor of an adapter")
        if self.unsupported:
            raise UnsupportedAdapterError(
                "holds what cannot be applied exactly", path=path, problems=[*self.unsupported, *self.problems]
            )
        if self.problems:
            raise AdapterFileError(f"is no adapter of {format} that can be read", path=path, problems=self.problems)
        method = ", ".join(sorted(self.methods)) or "whole weights"
        return Adapter(
            name=name,
            deltas=self.deltas,
            replacements=self.replacements,
            origin=Origin(str(path), sha256, format, method, base_model),
            notes=tuple(self.notes),
            changes=self.changes,
            flat_names=flat_names,
            with_tied_heads=frozenset(self.with_tied_heads),
        )


def alpha_of(values: Array) -> float | str:
    """The number that an alpha tensor holds, or what is wrong with it.

    Zero is refused: some readers take it for 0, others for an alpha that is missing.
    """
    if values.size != 1 or values.dtype.kind not in "fiu":
        return f"alpha must be one number, and is {values.dtype} of shape {values.shape}"
    alpha = float(values.reshape(()))
    return alpha if math.isfinite(alpha) and alpha else f"alpha must be a finite number other than 0, and is {alpha}"


def as_matrix(values: Array) -> Array | None:
    """`[n, m]` of a tensor whose further axes all have size 1, or None."""
    if values.ndim < 2 or math.prod(values.shape[2:]) != 1:
        return None
    return values.reshape(values.shape[:2])


def two_factors(down: Array, up: Array, scale: float) -> Delta | MatrixDelta | str:
    """`down` `[r, in]` or `[r, channels, *kernel]`, `up` `[out, r]` with axes of size 1 behind; or what is wrong.

    Without a kernel it fits a linear module as well as a convolution, whichever the package has.
    """
    b = as_matrix(up)
    if down.ndim < 2 or b is None or len(down) != b.shape[1] or not down.size or not b.size:
        return (
            "the factors must be [rank, in] (with a kernel behind) and [out, rank] of one rank, and have shapes "
            f"{down.shape} and {up.shape}"
        )
    a = as_matrix(down)
    if a is None:
        return Delta(down, b, scale, Conv(down.shape[2:]))
    return MatrixDelta(a, b, scale)
