"""BD-LoRA: LoRA with A or B in blocks on a diagonal.

BD-LoRA (Wang et al. 2025), section 3: `W = W0 + scale · B · A`, one of the two block-diagonal. The reference is PEFT
0.21: `lora/variants.py`, `BdLoraLinearVariant`, and `lora/layer.py`, `BlockDiagonalLinear`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from onnx_lora.adapters.adapter import MatrixDelta
from onnx_lora.adapters.methods.method import DocsRow, Fields, Module
from onnx_lora.adapters.methods.weights import Floats, explain_kind, explain_sizes, factors_pay, widen
from onnx_lora.adapters.problems import TensorError, abbreviate
from onnx_lora.kinds import Kind, Linear
from onnx_lora.points import Array

__all__ = ["DOCS", "BDLoRA", "read_bdlora"]


_FIELDS = {"target_modules_bd_a", "target_modules_bd_b", "nblocks", "match_strict"}

# Each of them is looked for in every module's name.
_MOST_NAMES = 1000


@dataclass(frozen=True)
class BDLoRA:
    """`a` `[r, in]` and `b` `[out, r]`. One of the two, A where `in_a` says so, is made of `blocks` blocks, which lie
    below each other here: it has 1 / `blocks` of the columns."""

    a: Array
    b: Array
    scale: float
    blocks: int
    in_a: bool

    @property
    def method(self) -> str:
        return "BD-LoRA"

    def explain_misfit(self, shape: tuple[int, ...], kind: Kind) -> str | None:
        if not isinstance(kind, Linear):
            return explain_kind("BD-LoRA", "linear modules", shape, kind)
        inputs = self.a.shape[1] * (self.blocks if self.in_a else 1)
        return explain_sizes("BD-LoRA", (len(self.b), inputs), shape)

    def apply_to(self, weight: Array) -> Array:
        a, b = self._factors()
        return widen(weight) + b @ a

    def as_factors(self, weight: Array) -> MatrixDelta | None:
        return MatrixDelta(*self._factors()) if factors_pay(len(self.a), weight.shape) else None

    def output_scale(self) -> Array | None:
        return None

    def _factors(self) -> tuple[Floats, Floats]:
        """`[r, in]` and `[out, r]`, with the scale in B."""
        a = widen(self.a)
        b = widen(self.b) * np.float32(self.scale)
        if self.in_a:
            return _place_on_diagonal(a, self.blocks), b
        return a, _place_on_diagonal(b, self.blocks)


def _place_on_diagonal(factor: Floats, blocks: int) -> Floats:
    """A factor `[rows, columns]`, whose rows are `blocks` blocks, as `[rows, blocks · columns]`."""
    rows = len(factor)
    by_block = factor.reshape(blocks, rows // blocks, -1)
    identity = np.eye(blocks, dtype=factor.dtype)
    placed: Floats = np.einsum("krc,kj->krjc", by_block, identity)
    return placed.reshape(rows, -1)


def read_bdlora(module: Module, a: Array, b: Array) -> BDLoRA | None:
    """`lora_A` `[r, in]` and `lora_B` `[out, r]`, one of them with 1 / `nblocks` of its columns. None: by the config
    neither of this module's factors is made of blocks.

    Raises TensorError: `use_bdlora` of the config makes no sense, or makes both factors of blocks; the rank is not the
    config's; or the rows of a factor are no blocks.
    """
    settings = module.fields.once(_read_settings)
    in_a = settings.covers("a", module.name)
    in_b = settings.covers("b", module.name)
    in_neither = not in_a and not in_b
    if (in_a and in_b) or (settings.strict and in_neither):
        raise TensorError("use_bdlora of the config must make one of A and B of blocks; PEFT would not load it")
    if in_neither:
        return None
    blocks = settings.blocks
    blocked = a if in_a else b
    rank_of_b = b.shape[1] if in_a else b.shape[1] * blocks
    has_rank = len(a) == rank_of_b == module.rank
    has_blocks = len(blocked) % blocks == 0 and a.size > 0 and b.size > 0
    module.must(
        has_rank and has_blocks,
        f"the rank must be {module.rank} by adapter_config.json, with a factor in {blocks} blocks",
    )
    if module.fields.get("use_dora") or module.fields.get("use_qalora"):
        raise TensorError("use_bdlora does not go with use_dora or use_qalora; PEFT itself refuses it")
    return BDLoRA(a, b, module.scale, blocks, in_a)


@dataclass(frozen=True)
class _Settings:
    """`use_bdlora` of a config. `names`: by factor ("a", "b"), the modules in which it is made of blocks. `strict`: in
    every module one of the two must be."""

    blocks: int
    strict: bool
    names: Mapping[str, list[str]]

    def covers(self, side: str, module: str) -> bool:
        """Whether the factor `side` is made of blocks in `module`. As in PEFT, a name may stand anywhere in the
        module's."""
        return any(name in module for name in self.names[side])


def _read_settings(config: Fields) -> _Settings:
    """`use_bdlora` of the config. Raises TensorError: it has other fields, or other values, than PEFT's."""
    fields = config.get("use_bdlora")
    if not isinstance(fields, dict) or not set(fields) <= _FIELDS:
        known = ", ".join(sorted(_FIELDS))
        raise TensorError(f"use_bdlora of the config must hold {known}, and is {abbreviate(fields)}")
    names: dict[str, list[str]] = {}
    for side in ("a", "b"):
        names[side] = fields.get(f"target_modules_bd_{side}") or []
    blocks = fields.get("nblocks", 1)
    is_count = type(blocks) is int and blocks >= 1
    if not is_count or not all(_are_names(each) for each in names.values()):
        raise TensorError(
            f"use_bdlora of the config must hold names and a number of blocks, and is {abbreviate(fields)}"
        )
    if max(len(each) for each in names.values()) > _MOST_NAMES:
        raise TensorError(f"use_bdlora of the config must hold at most {_MOST_NAMES} names; write the ends of names")
    strict = bool(fields.get("match_strict", True))
    return _Settings(blocks, strict, names)


def _are_names(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


DOCS = DocsRow("`use_bdlora` (BD-LoRA)", "delta, its blocks on the diagonal of A or B")
