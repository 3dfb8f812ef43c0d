"""What LyCORIS files hold beside plain factors: a module's tensors as a change. It knows no file and no module's name.

The reference is LyCORIS 4.1: `modules/*.py`."""

from __future__ import annotations

from collections.abc import Mapping

from onnx_lora.adapters.adapter import Change
from onnx_lora.adapters.formats.builder import as_matrix
from onnx_lora.adapters.formats.diffusion.lycoris_changes import Decomposed
from onnx_lora.adapters.methods.loha import LoHa
from onnx_lora.adapters.methods.lokr import LoKr
from onnx_lora.adapters.methods.products import CoredProduct, Product, Whole
from onnx_lora.adapters.problems import TensorError
from onnx_lora.adapters.scale import lora_scale
from onnx_lora.points import Array

__all__ = ["build_loha", "build_lokr", "decompose"]


def decompose(change: Change, dora_scale: Array) -> Decomposed:
    """The change with DoRA on top. `dora_scale` is `[out, 1, …]` or, of `wd_on_output=False`, `[1, in, 1, …]`.

    Raises TensorError: another shape.
    """
    matrix = as_matrix(dora_scale)
    is_vector = matrix is not None and matrix.size > 0 and 1 in matrix.shape
    if matrix is None or not is_vector:
        raise TensorError(f"dora_scale must have shape [out, 1] or [1, in], and has {dora_scale.shape}")
    return Decomposed(change, matrix.reshape(-1), by_input=matrix.shape[1] != 1)


def build_loha(tensors: Mapping[str, Array], alpha: float | None) -> LoHa:
    """alpha / r times the elementwise product of two products, `hada_w1_a` `[out, r]` · `hada_w1_b` `[r, in · kernel]`
    and the same of `hada_w2`. Both may have a core, `hada_t1` and `hada_t2` `[r, r, *kernel]`; then their factors are
    `[r, out]` and `[r, in]`.

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
    scale = 1.0
    if ranks and alpha is not None:
        scale = lora_scale(alpha, ranks.pop())
    return LoKr(first, second, scale)


def _whole(tensors: Mapping[str, Array], name: str) -> Whole | None:
    """The tensor of a part of LoKr that is not made of factors; None where there is none. Raises TensorError."""
    values = tensors.get(name)
    if values is None:
        return None
    has_factors = f"{name}_a" in tensors or f"{name}_b" in tensors
    is_whole = values.ndim >= 2 and values.size > 0
    if has_factors or not is_whole:
        raise TensorError(f"{name} must be whole, with 2 axes or more, or made of factors")
    return Whole(values)


def _product(tensors: Mapping[str, Array], name: str, core: str | None = None) -> Product | CoredProduct:
    """The pair of factors `NAME_a` `[out, r]` and `NAME_b` `[r, in · kernel]`; or, where there is the tensor `core`
    `[r, r, *kernel]`, that with `NAME_a` `[r, out]` and `NAME_b` `[r, in]`.

    Raises TensorError: a factor is missing, or they do not fit each other.
    """
    names = [f"{name}_a", f"{name}_b"]
    missing = [factor for factor in names if factor not in tensors]
    if missing:
        raise TensorError(f"has no {' and no '.join(missing)}; get the whole file")
    first, second = (tensors[factor] for factor in names)
    shapes = f"{first.shape} and {second.shape}"
    if min(first.ndim, second.ndim) < 2 or first.size == 0 or second.size == 0:
        raise TensorError(f"the factors of {name} must have 2 axes or more, and have shapes {shapes}")
    if core is not None and core in tensors:
        return _cored_product(core, tensors[core], first, second)
    left = first.reshape(len(first), -1)
    right = second.reshape(len(second), -1)
    if left.shape[1] != len(right):
        raise TensorError(f"the factors of {name} must have one rank, and have shapes {shapes}")
    return Product(left, right)


def _cored_product(name: str, core: Array, by_output: Array, by_input: Array) -> CoredProduct:
    """`core` `[r, r, *kernel]`, `by_output` `[r, out]`, `by_input` `[r, in]`. Raises TensorError: other shapes."""
    rank = len(by_output)
    are_factors = by_output.ndim == 2 and by_input.ndim == 2 and len(by_input) == rank
    is_core = core.ndim >= 3 and core.shape[:2] == (rank, rank)
    if not are_factors or not is_core:
        raise TensorError(f"{name} {core.shape} must fit the factors {by_output.shape} and {by_input.shape}")
    return CoredProduct(core, by_output, by_input)
