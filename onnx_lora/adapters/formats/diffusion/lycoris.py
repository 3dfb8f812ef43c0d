"""What LyCORIS files hold beside plain factors: a module's tensors as a change. It knows no file and no module's name.

The reference is LyCORIS 4.1: `modules/*.py`."""

from __future__ import annotations

from collections.abc import Mapping

from onnx_lora.adapters.adapter import Change
from onnx_lora.adapters.formats.builder import TensorError, as_matrix
from onnx_lora.adapters.formats.diffusion.lycoris_changes import Decomposed
from onnx_lora.adapters.methods.loha import LoHa
from onnx_lora.adapters.methods.lokr import LoKr
from onnx_lora.adapters.methods.products import CoredProduct, Product, Whole
from onnx_lora.adapters.scale import lora_scale
from onnx_lora.points import Array

__all__ = ["build_loha", "build_lokr", "decompose"]


def decompose(change: Change, dora_scale: Array) -> Decomposed:
    """DoRA on a change. `dora_scale` is `[out, 1, …]` or, of `wd_on_output=False`, `[1, in, 1, …]`.

    Raises TensorError: another shape.
    """
    matrix = as_matrix(dora_scale)
    if matrix is None or 1 not in matrix.shape or not matrix.size:
        raise TensorError(f"dora_scale must have shape [out, 1] or [1, in], and has {dora_scale.shape}")
    return Decomposed(change, matrix.reshape(-1), by_input=matrix.shape[1] != 1)


def build_loha(tensors: Mapping[str, Array], alpha: float | None) -> LoHa:
    """alpha / r times the elementwise product of two products, `hada_w1_a` `[out, r]` · `hada_w1_b` `[r, in · kernel]`
    and the same of `hada_w2`; or of two cores `hada_t1`, `hada_t2` `[r, r, *kernel]` with a factor for each mode.

    LyCORIS (Yeh et al. 2023), section 3.2. Without an alpha the scale is 1.

    Raises TensorError: a tensor is missing, or they do not fit each other.
    """
    left = _product(tensors, "hada_w1", "hada_t1")
    right = _product(tensors, "hada_w2", "hada_t2")
    if (left.outputs, left.inputs) != (right.outputs, right.inputs):
        raise TensorError("the two products of LoHa must have one shape")
    scale = 1.0 if alpha is None else lora_scale(alpha, left.rank)
    return LoHa(left, right, scale)


def build_lokr(tensors: Mapping[str, Array], alpha: float | None) -> LoKr:
    """alpha / r times the Kronecker product of `lokr_w1` and `lokr_w2`, each whole or made of factors `[n, r]` and
    `[r, m · kernel]`; the second may have a core `lokr_t2` `[r, r, *kernel]`.

    LyCORIS (Yeh et al. 2023), section 3.2. With both parts whole there is no rank, and alpha does not count.

    Raises TensorError: a tensor is missing, or they do not fit each other.
    """
    first = _whole(tensors, "lokr_w1") or _product(tensors, "lokr_w1")
    second = _whole(tensors, "lokr_w2") or _product(tensors, "lokr_w2", "lokr_t2")
    ranks = {part.rank for part in (first, second) if not isinstance(part, Whole)}
    if len(ranks) > 1:
        raise TensorError(f"the factors of LoKr must have one rank, and have {sorted(ranks)}")
    scale = 1.0 if alpha is None or not ranks else lora_scale(alpha, ranks.pop())
    return LoKr(first, second, scale)


def _whole(tensors: Mapping[str, Array], name: str) -> Whole | None:
    """The tensor of a part of LoKr that is not made of factors; None where there is none. Raises TensorError."""
    values = tensors.get(name)
    if values is None:
        return None
    if f"{name}_a" in tensors or f"{name}_b" in tensors or values.ndim < 2 or not values.size:
        raise TensorError(f"{name} must be whole, with 2 axes or more, or made of factors")
    return Whole(values)


def _product(tensors: Mapping[str, Array], name: str, core: str | None = None) -> Product | CoredProduct:
    """A pair, `[out, r]` and `[r, in · kernel]`; or a core with a factor for each mode, `[r, out]` and `[r, in]`.

    Raises TensorError: a factor is missing, or they do not fit each other.
    """
    missing = [f"{name}_{side}" for side in "ab" if f"{name}_{side}" not in tensors]
    if missing:
        raise TensorError(f"has no {' and no '.join(missing)}; get the whole file")
    w_a, w_b = tensors[f"{name}_a"], tensors[f"{name}_b"]
    if w_a.ndim < 2 or w_b.ndim < 2 or not w_a.size or not w_b.size:
        raise TensorError(
            f"the factors of {name} must have 2 axes or more, and have shapes {w_a.shape} and {w_b.shape}"
        )
    if core is None or core not in tensors:
        a, b = w_a.reshape(len(w_a), -1), w_b.reshape(len(w_b), -1)
        if a.shape[1] != len(b):
            raise TensorError(f"the factors of {name} must have one rank, and have shapes {w_a.shape} and {w_b.shape}")
        return Product(a, b)
    values = tensors[core]
    are_square = len(w_a) == len(w_b) and w_a.ndim == w_b.ndim == 2
    if values.ndim < 3 or values.shape[:2] != (len(w_a), len(w_b)) or not are_square:
        raise TensorError(f"{core} {values.shape} must fit the factors {w_a.shape} and {w_b.shape}")
    return CoredProduct(values, w_a, w_b)
