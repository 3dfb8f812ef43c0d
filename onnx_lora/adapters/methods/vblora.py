"""VB-LoRA: both factors are put together from one bank of vectors, which all modules share.

VB-LoRA (Li et al. 2024), equations 3 and 4: each piece of A and of B is a mixture of the k vectors with the largest
logits, by the softmax of those. There is no scale. The reference is PEFT 0.21: `vblora/layer.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from onnx_lora.adapters.adapter import MatrixDelta
from onnx_lora.adapters.methods.arrays import Floats, wide
from onnx_lora.adapters.methods.method import DocsRow, Method, Module, Part, bare_parameters
from onnx_lora.adapters.methods.shapes import kernel_unlike, not_for, pair, pays
from onnx_lora.kinds import Kind, Linear
from onnx_lora.points import Array

__all__ = ["METHOD", "VBLoRA", "read_vblora"]


@dataclass(frozen=True)
class VBLoRA:
    """`bank` `[vectors, length]`. Which vectors of it, and how much of each: `chosen_a` and `share_a`
    `[r, in / length, k]`, `chosen_b` and `share_b` `[out / length, r, k]`."""

    bank: Array
    chosen_a: Array
    share_a: Array
    chosen_b: Array
    share_b: Array

    @property
    def method(self) -> str:
        return "VB-LoRA"

    def explain_misfit(self, shape: tuple[int, ...], kind: Kind) -> str | None:
        if not isinstance(kind, Linear):
            return not_for("VB-LoRA", "linear modules", shape, kind)
        length = self.bank.shape[1]
        return kernel_unlike("VB-LoRA", (len(self.chosen_b) * length, self.chosen_a.shape[1] * length), shape)

    def apply_to(self, weight: Array) -> Array:
        a, b = self._factors()
        return wide(weight) + b @ a

    def as_factors(self, weight: Array) -> MatrixDelta | None:
        return pair(*self._factors()) if pays(len(self.chosen_a), weight.shape) else None

    def output_scale(self) -> Array | None:
        return None

    def _factors(self) -> tuple[Floats, Floats]:
        a, b = self._mixed(self.chosen_a, self.share_a), self._mixed(self.chosen_b, self.share_b)
        return a.reshape(len(a), -1), b.swapaxes(1, 2).reshape(-1, b.shape[1])

    def _mixed(self, chosen: Array, share: Array) -> Floats:
        """`[..., length]`."""
        vectors = wide(self.bank[chosen.astype(np.int64)])
        mixed: Floats = np.einsum("...k,...kl->...l", wide(share), vectors)
        return mixed


def read_vblora(module: Module) -> Part:
    """The shared `vblora_vector_bank` `[vectors, length]`; of each side the logits `vblora_logits_A` `[r, in / length,
    vectors]` and `vblora_logits_B` `[out / length, r, vectors]`, or with `save_only_topk_weights` the tensors
    `…_topk_indices` `[…, k]` and `…_topk_weights` `[…, k - 1]`.

    Raises TensorError: one of them is missing or out of range, or equal logits do not tell which vectors count.
    """
    bank, count = module.tensor("vblora_vector_bank", 2), module.count("topk")
    chosen_a, share_a = _read_shares(module, "vblora_logits_A", bank, count)
    chosen_b, share_b = _read_shares(module, "vblora_logits_B", bank, count)
    has_rank = len(chosen_a) == chosen_b.shape[1] == module.rank
    module.must(has_rank, "the factors of VB-LoRA must be of the config's r")
    return Part(change=VBLoRA(bank, chosen_a, share_a, chosen_b, share_b))


def _read_shares(module: Module, name: str, bank: Array, count: int) -> tuple[Array, Floats]:
    """The `count` vectors of the bank that each piece is a mixture of, and how much of each, both `[…, count]`."""
    if module.has(name):
        return _from_logits(module, name, bank, count)
    return _from_largest(module, name, bank, count)


def _from_logits(module: Module, name: str, bank: Array, count: int) -> tuple[Array, Floats]:
    logits = wide(module.tensor(name, 3))
    has_logits = logits.size > 0 and logits.shape[2] == len(bank) >= count
    module.must(has_logits, f"{name} must have a logit for each of {len(bank)} vectors")
    chosen: list[NDArray[np.intp]] = []
    shares: list[Floats] = []
    for part in logits:  # one at a time, for the memory it takes
        places, share, is_told = _largest(part, count)
        module.must(
            is_told, f"{name} has equal logits where only the largest {count} count, and does not tell which do"
        )
        chosen.append(places)
        shares.append(share)
    return np.stack(chosen), np.stack(shares)


def _from_largest(module: Module, name: str, bank: Array, count: int) -> tuple[Array, Floats]:
    chosen = module.tensor(f"{name}_topk_indices", 3).astype(np.int64)
    first = wide(module.tensor(f"{name}_topk_weights", 3))
    fits = chosen.shape == (*first.shape[:2], count) and first.shape[2] == count - 1 and chosen.size > 0
    module.must(fits, f"{name} must have {count} vectors, and the shares of all but the last")
    in_order = np.sort(chosen, axis=2)
    is_twice = bool((in_order[..., 1:] == in_order[..., :-1]).any())
    is_inside = chosen.min() >= 0 and chosen.max() < len(bank)
    module.must(is_inside and not is_twice, f"{name}'s vectors must be of the bank's {len(bank)}, each once")
    shares = np.concatenate([first, 1 - first.sum(axis=2, keepdims=True)], axis=2)
    module.must(
        bool((shares >= 0).all()), f"{name}'s shares must be of one whole, and PEFT makes NaN of a negative one"
    )
    return chosen, shares


def _largest(logits: Floats, count: int) -> tuple[NDArray[np.intp], Floats, bool]:
    """Of `[n, vectors]`: the places of the largest, their softmax, and whether the last of them is larger than the
    next."""
    order = np.argsort(-logits, axis=1, kind="stable")[:, : count + 1]
    ranked = np.take_along_axis(logits, order, axis=1)
    is_told = ranked.shape[1] == count or bool((ranked[:, -2] > ranked[:, -1]).all())
    powers = np.exp(ranked[:, :count] - ranked[:, :1])
    return order[:, :count], powers / powers.sum(axis=1, keepdims=True), is_told


METHOD = Method(
    peft_type="VBLORA",
    name="VB-LoRA",
    read=read_vblora,
    docs=(DocsRow("`VBLORA`", "delta, from all logits or only the largest"),),
    tensors=bare_parameters(
        "vblora_logits_A",
        "vblora_logits_A_topk_indices",
        "vblora_logits_A_topk_weights",
        "vblora_logits_B",
        "vblora_logits_B_topk_indices",
        "vblora_logits_B_topk_weights",
    ),
    shared=("vblora_vector_bank",),
    integers=frozenset({"vblora_logits_A_topk_indices", "vblora_logits_B_topk_indices"}),
    fields=frozenset(
        {
            "init_logits_std",
            "init_vector_bank_bound",
            "num_vectors",
            "r",
            "save_only_topk_weights",
            "topk",
            "vblora_dropout",
            "vector_length",
        }
    ),
    rank="r",
)
