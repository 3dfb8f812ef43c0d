"""FourierFT: a few frequencies of the change. FourierFT (Gao et al. 2024), section 3.2; PEFT's `get_delta_weight`."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from onnx_lora.adapters.adapter import MatrixDelta
from onnx_lora.adapters.methods.shapes import not_for, wide
from onnx_lora.kinds import Kind, Linear
from onnx_lora.points import Array

__all__ = ["FourierFT"]


# From here on PyTorch's `randperm` draws numbers of 64 bits.
_LARGE = (2**32 - 1) // 20


@dataclass(frozen=True)
class FourierFT:
    """`spectrum` `[n]` at places that only `seed` tells, as PyTorch draws them."""

    spectrum: Array
    scale: float
    seed: int

    @property
    def method(self) -> str:
        return "FourierFT"

    def explain_misfit(self, shape: tuple[int, ...], kind: Kind) -> str | None:
        if not isinstance(kind, Linear) or len(shape) != 2:
            return not_for("FourierFT", "linear modules", shape, kind)
        if self.spectrum.size > shape[0] * shape[1]:
            return f"FourierFT has {self.spectrum.size} frequencies, and a weight of shape {shape} has fewer places"
        if shape[0] * shape[1] >= _LARGE:
            return f"FourierFT on a weight of shape {shape}: PyTorch draws places of so large a one in another way"
        return None

    def apply_to(self, weight: Array) -> Array:
        spectrum = wide(self.spectrum)
        dense = np.zeros(weight.shape, spectrum.dtype)
        dense.reshape(-1)[_first_of_permutation(self.seed, weight.size, spectrum.size)] = spectrum
        return wide(weight) + np.fft.ifft2(dense).real.astype(spectrum.dtype) * np.float32(self.scale)

    def as_factors(self, weight: Array) -> MatrixDelta | None:
        del weight
        return None

    def output_scale(self) -> Array | None:
        return None


def _first_of_permutation(seed: int, size: int, count: int) -> NDArray[np.int64]:
    """The first `count` of `torch.randperm(size, generator=torch.Generator().manual_seed(seed))`.

    PyTorch's generator on the CPU is the Mersenne Twister, as NumPy's; its `randperm_cpu` swaps each place with one at
    or behind it. Behind the first `count` steps these places change no more.
    """
    numbers = np.random.RandomState(seed & 0xFFFFFFFF).randint(0, 2**32, count, dtype=np.uint32)
    moved: dict[int, int] = {}
    first = np.empty(count, np.int64)
    for place, drawn in enumerate(numbers.tolist()):
        other = place + drawn % (size - place)
        first[place] = moved.get(other, other)
        moved[other] = moved.get(place, place)
    return first
