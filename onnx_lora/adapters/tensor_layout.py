"""The tensors of an adapter that is being bound: each cast to its input's type, checked to fit that, and frozen."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from onnx_lora.points import Array, in_memory

__all__ = ["TensorLayout", "frozen_copy"]


@dataclass
class TensorLayout:
    """`tensors`: by the name of their input. `problems`: why some of them cannot be applied."""

    tensors: dict[str, Array] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def put(self, name: str, value: Array, dtype: str) -> None:
        """Put in a tensor that has the layout of its input, cast to the input's type `dtype`. A value that is too large
        for the type is a problem."""
        cast = frozen_copy(value, np.dtype(dtype))
        if not np.isfinite(cast).all():
            found = float(np.abs(value).max())
            most = float(np.finfo(dtype).max)
            self.problems.append(
                f"{name}: its largest value {found:.6g} does not fit {dtype} (at most {most:.6g}); use a package of a "
                "wider type"
            )
        self.tensors[name] = cast


def frozen_copy(value: Array, dtype: np.dtype[np.generic]) -> Array:
    """The values as an array in memory that is C-contiguous, read-only and of `dtype`; `value` itself if it is that."""
    value = in_memory(value)
    if value.dtype == dtype and value.flags.c_contiguous and not value.flags.writeable:
        return value
    with np.errstate(over="ignore"):
        copy: Array = np.array(value, dtype=dtype, order="C")
    copy.flags.writeable = False
    return copy
