"""Products of low rank as LoHa and LoKr have them: of two factors, or of a core and a factor for each of its modes.

FedPara (Hyeon-Woo et al. 2022), propositions 1 and 3; PEFT 0.21: `tuners/lycoris_utils.py`.
"""

from __future__ import annotations

import math

import numpy as np

from onnx_lora.adapters.methods.arrays import Floats, wide
from onnx_lora.adapters.methods.method import Module
from onnx_lora.points import Array

__all__ = ["LYCORIS_FIELDS", "columns", "read_product", "rows", "thin"]

# Fields of the configs of LoHa and LoKr alike.
LYCORIS_FIELDS = frozenset(
    {"alpha", "alpha_pattern", "module_dropout", "r", "rank_dropout", "rank_pattern", "use_effective_conv2d"}
)


def read_product(module: Module, name: str, core: str | None = None) -> tuple[Array, ...]:
    """The factors `NAME_a` `[out, r]` and `NAME_b` `[r, in · kernel]`; or, where the module has the tensor `core`
    `[r, r, *kernel]`, that before `NAME_a` `[r, out]` and `NAME_b` `[r, in]`.

    Raises TensorError: one of them is missing or empty, the rank is not the config's, or the shapes do not fit.
    """
    w_a, w_b = module.tensor(f"{name}_a", 2), module.tensor(f"{name}_b", 2)
    module.must_have_rank(len(w_b))
    module.must(w_a.size > 0 and w_b.size > 0, f"the factors of {name} must hold something")
    if core is None or not module.has(core):
        module.must(w_a.shape[1] == len(w_b), f"the factors of {name} must fit")
        return w_a, w_b
    values = module.tensor(core, 4)
    fits = values.shape[:2] == (len(w_a), len(w_b)) and values.size > 0
    module.must(fits, f"the factors of {core} must fit")
    return values, w_a, w_b


def thin(parts: tuple[Array, ...]) -> tuple[Floats, Floats]:
    """A product as a pair `[out, r]`, `[r, in · kernel]`: of two factors, or of a core `[r, r, *kernel]` with a factor
    for each mode, `[r, out]` and `[r, in]`. FedPara (Hyeon-Woo et al. 2022), proposition 3."""
    if len(parts) == 2:
        return wide(parts[0]), wide(parts[1])
    core, by_output, by_input = map(wide, parts)
    inner = np.einsum("ij...,jr->ir...", core, by_input)
    return by_output.T, inner.reshape(len(inner), -1)


def rows(parts: tuple[Array, ...]) -> int:
    """Outputs of one array, or of a product that `thin` knows."""
    return parts[1].shape[1] if len(parts) == 3 else len(parts[0])


def columns(parts: tuple[Array, ...]) -> int:
    """Inputs of one array, or of a product that `thin` knows, the axes of a kernel counted as inputs."""
    kernel: int = math.prod(parts[0].shape[2:]) if len(parts) != 2 else 1
    return int(parts[-1].shape[1]) * kernel
