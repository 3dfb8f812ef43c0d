"""FourierFT: a few frequencies of the change are trained.

FourierFT (Gao et al. 2024), section 3.2: `W = W0 + scaling · Re(IDFT(F))`, with F zero but for n numbers, at places
that are drawn at random. The reference is PEFT 0.21: `fourierft/layer.py`, `get_delta_weight`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from onnx_lora.adapters.adapter import MatrixDelta
from onnx_lora.adapters.methods.method import Contribution, DocsRow, Method, Module, bare_parameters
from onnx_lora.adapters.methods.weights import explain_kind, widen
from onnx_lora.kinds import Kind, Linear
from onnx_lora.points import Array

__all__ = ["METHOD", "FourierFT", "read_fourierft"]


# From here on PyTorch's `randperm` draws numbers of 64 bits.
_LARGE = (2**32 - 1) // 20


@dataclass(frozen=True)
class FourierFT:
    """`spectrum` `[n]` at places that PyTorch draws from `seed`."""

    spectrum: Array
    scale: float
    seed: int

    @property
    def method(self) -> str:
        return "FourierFT"

    def explain_misfit(self, shape: tuple[int, ...], kind: Kind) -> str | None:
        if not isinstance(kind, Linear) or len(shape) != 2:
            return explain_kind("FourierFT", "linear modules", shape, kind)
        if self.spectrum.size > shape[0] * shape[1]:
            return f"FourierFT has {self.spectrum.size} frequencies, and a weight of shape {shape} has fewer places"
        if shape[0] * shape[1] >= _LARGE:
            return f"FourierFT on a weight of shape {shape}: PyTorch draws places of so large a one in another way"
        return None

    def apply_to(self, weight: Array) -> Array:
        spectrum = widen(self.spectrum)
        dense = np.zeros(weight.shape, spectrum.dtype)
        dense.reshape(-1)[_first_of_permutation(self.seed, weight.size, spectrum.size)] = spectrum
        return widen(weight) + np.fft.ifft2(dense).real.astype(spectrum.dtype) * np.float32(self.scale)

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


def read_fourierft(module: Module) -> Contribution:
    """`fourierft_spectrum` `[n]`, with `scaling` and `random_loc_seed` of the config.

    Raises TensorError: one of them is missing.
    """
    spectrum, seed = module.tensor("fourierft_spectrum", 1), module.count("random_loc_seed", least=0)
    scale = module.number("scaling", least=-1e30)
    note = "the places of FourierFT's frequencies are not in the file: drawn from random_loc_seed, as PyTorch does"
    return Contribution(change=FourierFT(spectrum, scale, seed), note=note)


METHOD = Method(
    peft_type="FOURIERFT",
    name="FourierFT",
    read=read_fourierft,
    docs=(
        DocsRow(
            "`FOURIERFT`",
            "fold; the places of the frequencies are drawn from `random_loc_seed`, as PyTorch draws them",
        ),
    ),
    tensors=bare_parameters("fourierft_spectrum"),
    fields=frozenset({"n_frequency", "n_frequency_pattern", "random_loc_seed", "scaling"}),
)
