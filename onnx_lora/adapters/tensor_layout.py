"""The tensors of an adapter that is being bound: each cast to its input's type, checked to fit that, and frozen."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from onnx_lora.points import Array, in_memory

__all__ = ["TensorLayout", "frozen_copy"]


@dataclass
class TensorLayout:
    """Tensors by the name of their input, and why some of them cannot be applied."""

    tensors: dict[str, Array] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def put(self, name: str, value: Array, dtype: str) -> None:
        """Take a tensor, laid out as its input, in the type of that; what is too large for the type is a problem."""
        cast = frozen_copy(value, np.dtype(dtype))
        if not np.isfinite(cast).all():
            largest = float(np.abs(value).max())
            self.problems.append(
                f"{name}: its largest value {largest:.6g} does not fit {dtype} "
                f"(at most {float(np.finfo(dtype).max):.6g}); use a package of a wider type"
            )
        self.tensors[name] = cast


def frozen_copy(value: Array, dtype: np.dtype[np.generic]) -> Array:
    """The values C-contiguous, of `dtype`, read-only, in memory: the array itself where it is all that."""
    value = in_memory(value)
    if value.dtype == dtype and value.flags.c_contiguous and not value.flags.writeable:
        return value
    with np.errstate(over="ignore"):
        copy: Array = np.array(value, dtype=dtype, order="C")
    copy.flags.writeable = False
    return copy
