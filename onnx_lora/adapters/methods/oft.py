"""OFT: the inputs of a weight are rotated in blocks.

OFT (Qiu et al. 2023), section 4: `W = W0 · Rᵀ`, with R the rotations `(I - Q) · (I + Q)⁻¹` of skew-symmetric matrices Q
on a diagonal. PEFT's default takes a few terms of a Neumann series in the place of the inverse. The reference is PEFT
0.21: `oft/layer.py`, `OFTRotationModule`; that series is another one in PEFT before 0.18.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

import numpy as np

from onnx_lora.adapters.adapter import MatrixDelta
from onnx_lora.adapters.methods.method import Contribution, DocsRow, Method, Module
from onnx_lora.adapters.methods.rotations import make_rotations, rotate_inputs
from onnx_lora.adapters.methods.weights import Floats, explain_kind, flatten_shape, widen
from onnx_lora.kinds import Embedding, Kind
from onnx_lora.points import Array

__all__ = ["METHOD", "OFT", "read_oft"]


# PEFT's default is 5; far more than a sum of powers needs.
_MOST_TERMS = 1000


@dataclass(frozen=True)
class OFT:
    """`angles` `[blocks, b · (b - 1) / 2]`, above the diagonals of skew-symmetric matrices.

    `shared`: one block for all. `terms`: of the Neumann series in the place of the inverse, or None. `bound`: COFT's
    eps, the most a block's norm may be (with √blocks), or None. `on_embedding`: an embedding's features are rotated.
    """

    angles: Array
    shared: bool
    terms: int | None
    bound: float | None
    on_embedding: bool = False

    @property
    def method(self) -> str:
        return "OFT"

    @property
    def block(self) -> int:
        """b, rows of a block."""
        return (1 + math.isqrt(1 + 8 * self.angles.shape[1])) // 2

    def explain_misfit(self, shape: tuple[int, ...], kind: Kind) -> str | None:
        if isinstance(kind, Embedding) != self.on_embedding:
            return explain_kind("OFT of this file", "embeddings" if self.on_embedding else "other modules", shape, kind)
        if math.prod(shape[2:]) != 1:
            return (
                f"OFT on a weight of shape {shape}: PEFT adds up rotated windows that overlap, and its own merge is "
                "another thing; train another method on this convolution"
            )
        inputs = flatten_shape(shape)[1] if len(shape) > 1 else 0
        fits = inputs > 0 and inputs % self.block == 0 if self.shared else inputs == self.block * len(self.angles)
        if fits:
            return None
        blocks = "blocks" if self.shared else f"{len(self.angles)} blocks"
        return f"OFT must meet a weight whose inputs are {blocks} of {self.block}, and this one has shape {shape}"

    def apply_to(self, weight: Array) -> Array:
        blocks = self._rotations()
        matrix = widen(weight).reshape(flatten_shape(weight.shape))
        if self.shared:
            blocks = np.broadcast_to(blocks, (matrix.shape[1] // self.block, *blocks.shape[1:]))
        if self.on_embedding:
            blocks = blocks.swapaxes(1, 2)
        return rotate_inputs(matrix, blocks).reshape(weight.shape)

    def as_factors(self, weight: Array) -> MatrixDelta | None:
        del weight
        return None

    def output_scale(self) -> Array | None:
        return None

    def _rotations(self) -> Floats:
        """`[blocks, b, b]`."""
        angles = widen(self.angles)
        upper = np.triu_indices(self.block, 1)
        skew = np.zeros((len(angles), self.block, self.block), angles.dtype)
        skew[:, upper[0], upper[1]] = angles
        skew -= skew.swapaxes(1, 2)
        if self.bound is not None:
            norms = np.linalg.norm(skew, axis=(1, 2), keepdims=True)
            bound = self.bound / math.sqrt(len(skew))
            skew = np.where(norms <= bound, skew, skew * (bound / np.maximum(norms, bound))).astype(skew.dtype)
        return make_rotations(skew) if self.terms is None else _neumann(skew, self.terms)


def _neumann(skew: Floats, terms: int) -> Floats:
    """`I + 2Q + 2Q² + … + Qⁿ`, as PEFT has it since 0.18: the last of three and more powers counts once."""
    total = np.broadcast_to(np.eye(skew.shape[-1], dtype=skew.dtype), skew.shape).copy()
    if terms > 1:
        total += 2 * skew
    if terms > 2:
        power = skew @ skew
        total += 2 * power
        for _ in range(3, terms - 1):
            power = power @ skew
            total += 2 * power
        total += power @ skew
    return total


def read_oft(module: Module) -> Contribution:
    """`oft_R` `[blocks, b · (b - 1) / 2]`, or `oft_embedding_R` for the features of an embedding.

    Raises TensorError: it is missing, its numbers are not those above a diagonal, or the config's `use_cayley_neumann`,
    `num_cayley_neumann_terms`, `block_share` or `eps` cannot be what PEFT 0.21 means by them.
    """
    fields, embedding = module.fields, module.has("oft_embedding_R")
    angles = module.tensor("oft_embedding_R" if embedding else "oft_R", 2)
    series = bool(fields.get("use_cayley_neumann", True))
    module.must(
        not series or _is_since_0_18(fields.get("peft_version")),
        "use_cayley_neumann: PEFT 0.18 made another series of it, and the config names no PEFT as new; merge it with "
        "the PEFT that trained it, and export that",
    )
    root = math.isqrt(1 + 8 * angles.shape[1])
    is_triangle = root * root == 1 + 8 * angles.shape[1]
    module.must(is_triangle and angles.size > 0, "OFT's angles must be those above a diagonal")
    shared = bool(fields.get("block_share"))
    module.must(not shared or len(angles) == 1, "block_share of the config says that there is one block")
    terms = module.count("num_cayley_neumann_terms") if series else None
    module.must(terms is None or terms <= _MOST_TERMS, f"num_cayley_neumann_terms must be at most {_MOST_TERMS}")
    bound = module.number("eps") if fields.get("coft") else None
    return Contribution(change=OFT(angles, shared, terms, bound, embedding))


def _is_since_0_18(version: object) -> bool:
    """Whether `peft_version` of a config is 0.18 or newer."""
    found = re.match(r"(\d+)\.(\d+)", version) if isinstance(version, str) else None
    return found is not None and (int(found[1]), int(found[2])) >= (0, 18)


METHOD = Method(
    peft_type="OFT",
    name="OFT",
    read=read_oft,
    docs=(
        DocsRow(
            "`OFT`",
            "fold. On a kernel larger than 1, of PEFT before 0.14, and with the Cayley-Neumann series of PEFT before "
            "0.18 it is refused",
        ),
    ),
    tensors=dict.fromkeys(("oft_R", "oft_embedding_R"), ("weight",)),
    fields=frozenset(
        {
            "block_share",
            "coft",
            "eps",
            "module_dropout",
            "num_cayley_neumann_terms",
            "oft_block_size",
            "r",
            "use_cayley_neumann",
        }
    ),
)
