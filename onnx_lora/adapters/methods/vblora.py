"""VB-LoRA: both factors are put together from one bank of vectors, which all modules share.

VB-LoRA (Li et al. 2024), equations 3 and 4: each piece of A and of B is a mixture of the k vectors with the largest
logits, by the softmax of those. There is no scale. The reference is PEFT 0.21: `vblora/layer.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from onnx_lora.adapters.adapter import MatrixDelta
from onnx_lora.adapters.methods.method import Contribution, DocsRow, Method, Module, bare_parameters
from onnx_lora.adapters.methods.weights import Floats, explain_kind, explain_sizes, factors_pay, widen
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
            return explain_kind("VB-LoRA", "linear modules", shape, kind)
        length = self.bank.shape[1]
        outputs = len(self.chosen_b) * length
        inputs = self.chosen_a.shape[1] * length
        return explain_sizes("VB-LoRA", (outputs, inputs), shape)

    def apply_to(self, weight: Array) -> Array:
        a, b = self._factors()
        return widen(weight) + b @ a

    def as_factors(self, weight: Array) -> MatrixDelta | None:
        return MatrixDelta(*self._factors()) if factors_pay(len(self.chosen_a), weight.shape) else None

    def output_scale(self) -> Array | None:
        return None

    def _factors(self) -> tuple[Floats, Floats]:
        """`[r, in]` and `[out, r]`."""
        a = self._mix(self.chosen_a, self.share_a)  # [r, in / length, length]
        b = self._mix(self.chosen_b, self.share_b)  # [out / length, r, length]
        rank = len(a)
        return a.reshape(rank, -1), b.swapaxes(1, 2).reshape(-1, rank)

    def _mix(self, chosen: Array, share: Array) -> Floats:
        """The mixtures of vectors, `[..., length]`."""
        vectors = widen(self.bank[chosen.astype(np.int64)])
        mixed: Floats = np.einsum("...k,...kl->...l", widen(share), vectors)
        return mixed


def read_vblora(module: Module) -> Contribution:
    """The shared `vblora_vector_bank` `[vectors, length]`; of each side the logits `vblora_logits_A` `[r, in / length,
    vectors]` and `vblora_logits_B` `[out / length, r, vectors]`, or with `save_only_topk_weights` the tensors
    `…_topk_indices` `[…, k]` and `…_topk_weights` `[…, k - 1]`.

    Raises TensorError: one of them is missing or out of range, or equal logits do not tell which vectors count.
    """
    bank = module.tensor("vblora_vector_bank", 2)
    count = module.count("topk")
    chosen_a, share_a = _read_shares(module, "vblora_logits_A", bank, count)
    chosen_b, share_b = _read_shares(module, "vblora_logits_B", bank, count)
    has_rank = len(chosen_a) == chosen_b.shape[1] == module.rank
    module.must(has_rank, "the factors of VB-LoRA must be of the config's r")
    return Contribution(change=VBLoRA(bank, chosen_a, share_a, chosen_b, share_b))


def _read_shares(module: Module, name: str, bank: Array, count: int) -> tuple[Array, Floats]:
    """The `count` vectors of the bank that each piece is a mixture of, and how much of each, both `[…, count]`."""
    if module.has(name):
        return _read_logits(module, name, bank, count)
    return _read_largest(module, name, bank, count)


def _read_logits(module: Module, name: str, bank: Array, count: int) -> tuple[Array, Floats]:
    logits = widen(module.tensor(name, 3))
    has_logits = logits.size > 0 and logits.shape[2] == len(bank) >= count
    module.must(has_logits, f"{name} must have a logit for each of {len(bank)} vectors")
    chosen: list[NDArray[np.intp]] = []
    shares: list[Floats] = []
    for part in logits:  # one at a time, for the memory it takes
        order = np.argsort(-part, axis=1, kind="stable")[:, : count + 1]
        ranked = np.take_along_axis(part, order, axis=1)
        is_decided = ranked.shape[1] == count or bool((ranked[:, -2] > ranked[:, -1]).all())
        module.must(
            is_decided, f"{name} has equal logits where only the largest {count} count, and does not tell which do"
        )
        chosen.append(order[:, :count])
        shares.append(_softmax(ranked[:, :count]))
    return np.stack(chosen), np.stack(shares)


def _softmax(ranked: Floats) -> Floats:
    """Of logits `[n, k]`, the largest first."""
    powers = np.exp(ranked - ranked[:, :1])
    shares: Floats = powers / powers.sum(axis=1, keepdims=True)
    return shares


def _read_largest(module: Module, name: str, bank: Array, count: int) -> tuple[Array, Floats]:
    chosen = module.tensor(f"{name}_topk_indices", 3).astype(np.int64)
    first = widen(module.tensor(f"{name}_topk_weights", 3))
    fits = chosen.shape == (*first.shape[:2], count) and first.shape[2] == count - 1
    module.must(fits and chosen.size > 0, f"{name} must have {count} vectors, and the shares of all but the last")
    in_order = np.sort(chosen, axis=2)
    is_twice = bool((in_order[..., 1:] == in_order[..., :-1]).any())
    is_inside = chosen.min() >= 0 and chosen.max() < len(bank)
    module.must(is_inside and not is_twice, f"{name}'s vectors must be of the bank's {len(bank)}, each once")
    last = 1 - first.sum(axis=2, keepdims=True)
    shares = np.concatenate([first, last], axis=2)
    are_shares = bool((shares >= 0).all())
    module.must(are_shares, f"{name}'s shares must be of one whole, and PEFT makes NaN of a negative one")
    return chosen, shares


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
