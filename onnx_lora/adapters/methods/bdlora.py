"""BD-LoRA: LoRA with A or B in blocks on a diagonal.

BD-LoRA (Wang et al. 2025), section 3: `W = W0 + scale · B · A`, one of the two block-diagonal. The reference is PEFT
0.21: `lora/variants.py`, `BdLoraLinearVariant`, and `lora/layer.py`, `BlockDiagonalLinear`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from onnx_lora.adapters.adapter import MatrixDelta
from onnx_lora.adapters.formats.problem import TensorError, shown
from onnx_lora.adapters.methods.arrays import Floats, wide
from onnx_lora.adapters.methods.method import DocsRow, Fields, Module
from onnx_lora.adapters.methods.shapes import kernel_unlike, not_for, pair, pays
from onnx_lora.kinds import Kind, Linear
from onnx_lora.points import Array

__all__ = ["DOCS", "BDLoRA", "read_bdlora"]


_FIELDS = {"target_modules_bd_a", "target_modules_bd_b", "nblocks", "match_strict"}

# Each of them is looked for in every module's name.
_MOST_NAMES = 1000


@dataclass(frozen=True)
class BDLoRA:
    """`a` `[r, in]` and `b` `[out, r]`; the one of the two that lies in blocks has 1 / `blocks` of the columns."""

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
            return not_for("BD-LoRA", "linear modules", shape, kind)
        inputs = self.a.shape[1] * (self.blocks if self.in_a else 1)
        return kernel_unlike("BD-LoRA", (len(self.b), inputs), shape)

    def apply_to(self, weight: Array) -> Array:
        a, b = self._factors()
        return wide(weight) + b @ a

    def as_factors(self, weight: Array) -> MatrixDelta | None:
        return pair(*self._factors()) if pays(len(self.a), weight.shape) else None

    def output_scale(self) -> Array | None:
        return None

    def _factors(self) -> tuple[Floats, Floats]:
        a, b = wide(self.a), wide(self.b) * np.float32(self.scale)
        return (_diagonal(a, self.blocks), b) if self.in_a else (a, _diagonal(b, self.blocks))


def _diagonal(factor: Floats, blocks: int) -> Floats:
    each = factor.reshape(blocks, len(factor) // blocks, -1)
    placed = np.einsum("krc,kj->krjc", each, np.eye(blocks, dtype=factor.dtype))
    expanded: Floats = placed.reshape(len(factor), -1)
    return expanded


def read_bdlora(module: Module, a: Array, b: Array) -> BDLoRA | None:
    """`lora_A` `[r, in]` and `lora_B` `[out, r]`, one of them with 1 / `nblocks` of its columns. None: the config makes
    plain factors of this module's.

    Raises TensorError: `use_bdlora` of the config makes no sense or both factors of blocks, the rank is not the
    config's, or the rows of a factor are no blocks.
    """
    settings = module.fields.once(_settings)
    in_a = settings.covers("a", module.name)
    in_b = settings.covers("b", module.name)
    if (in_a and in_b) or (settings.strict and not (in_a or in_b)):
        raise TensorError("use_bdlora of the config must make one of A and B of blocks; PEFT would not load it")
    if not (in_a or in_b):
        return None
    blocks = settings.blocks
    rank_of_b = b.shape[1] if in_a else b.shape[1] * blocks
    has_rank = len(a) == rank_of_b == module.rank
    blocked = a if in_a else b
    module.must(
        has_rank and len(blocked) % blocks == 0 and a.size > 0 and b.size > 0,
        f"the rank must be {module.rank} by adapter_config.json, with a factor in {blocks} blocks",
    )
    if module.fields.get("use_dora") or module.fields.get("use_qalora"):
        raise TensorError("use_bdlora does not go with use_dora or use_qalora; PEFT itself refuses it")
    return BDLoRA(a, b, module.scale, blocks, in_a)


@dataclass(frozen=True)
class _Settings:
    """`use_bdlora` of a config. `names`: of modules whose A, or whose B, is of blocks."""

    blocks: int
    strict: bool
    names: Mapping[str, list[str]]

    def covers(self, side: str, module: str) -> bool:
        """Whether the factor is of blocks in `module`. As in PEFT, a name may stand anywhere in the module's."""
        return any(name in module for name in self.names[side])


def _settings(config: Fields) -> _Settings:
    """Raises TensorError: the fields of `use_bdlora` are not PEFT's."""
    fields = config.get("use_bdlora")
    if not isinstance(fields, dict) or not set(fields) <= _FIELDS:
        raise TensorError(f"use_bdlora of the config must hold {', '.join(sorted(_FIELDS))}, and is {shown(fields)}")
    names = {side: fields.get(f"target_modules_bd_{side}") or [] for side in "ab"}
    blocks = fields.get("nblocks", 1)
    if type(blocks) is not int or blocks < 1 or not all(map(_are_names, names.values())):
        raise TensorError(f"use_bdlora of the config must hold names and a number of blocks, and is {shown(fields)}")
    if max(map(len, names.values())) > _MOST_NAMES:
        raise TensorError(f"use_bdlora of the config must hold at most {_MOST_NAMES} names; write the ends of names")
    return _Settings(blocks, bool(fields.get("match_strict", True)), names)


def _are_names(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


DOCS = DocsRow("`use_bdlora` (BD-LoRA)", "delta, its blocks on the diagonal of A or B")
