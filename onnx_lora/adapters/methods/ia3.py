"""IA3: a factor for every output of a weight, or for every input.

(IA)³ (Liu et al. 2022), section 3.3: `W = diag(l) · W0`, and the bias is scaled too; in a feed-forward module
`W = W0 · diag(l)`. The reference is PEFT 0.21: `ia3/layer.py`, `ia3/model.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

from onnx_lora.adapters.adapter import MatrixDelta, Replacement
from onnx_lora.adapters.formats.problem import TensorError, shown
from onnx_lora.adapters.methods.arrays import wide
from onnx_lora.adapters.methods.endings import Endings
from onnx_lora.adapters.methods.method import DocsRow, Fields, Method, Module, Part, bare_parameters
from onnx_lora.adapters.methods.shapes import not_for
from onnx_lora.expressions import Expression
from onnx_lora.kinds import Conv, Embedding, Kind
from onnx_lora.points import Array

__all__ = ["IA3", "METHOD", "read_ia3"]


@dataclass(frozen=True)
class IA3:
    """`vector` `[out]`; of a feed-forward module `[in]`, of a convolution `[channels]`. A bias is scaled apart."""

    vector: Array
    feedforward: bool

    @property
    def method(self) -> str:
        return "IA3"

    def explain_misfit(self, shape: tuple[int, ...], kind: Kind) -> str | None:
        if isinstance(kind, Embedding) or len(shape) < 2:
            return not_for("IA3", "linear modules and convolutions", shape, kind)
        size = self.vector.size
        if not self.feedforward:
            wanted, fits = "outputs", size == shape[0]
        else:
            groups = size // shape[1] if shape[1] and size % shape[1] == 0 else 0
            wanted, fits = "inputs", groups == 1 or (isinstance(kind, Conv) and groups > 1 and shape[0] % groups == 0)
        return None if fits else f"IA3 must meet a weight of {size} {wanted}, and this one has shape {shape}"

    def apply_to(self, weight: Array) -> Array:
        vector, kernel = wide(self.vector), (1,) * (weight.ndim - 2)
        if not self.feedforward:
            return wide(weight) * vector.reshape(-1, 1, *kernel)
        groups = vector.size // weight.shape[1]
        by_group = vector.reshape(groups, -1).repeat(weight.shape[0] // groups, axis=0)
        return wide(weight) * by_group.reshape(*weight.shape[:2], *kernel)

    def as_factors(self, weight: Array) -> MatrixDelta | None:
        del weight
        return None

    def output_scale(self) -> Array | None:
        return None if self.feedforward else wide(self.vector)


def read_ia3(module: Module) -> Part:
    """`ia3_l` `[out, 1]`, or `[1, in]` in a feed-forward module; of a convolution `[1, n, 1, …]` both times.

    Raises TensorError: it is missing or no vector, `feedforward_modules` of the config says another thing than the
    shape, or neither tells whether it is for inputs. ExpressionError: `feedforward_modules` is no expression.
    """
    values = module.tensor("ia3_l")
    vector = module.vector("ia3_l")
    said = _says_feedforward(module)
    if values.ndim == 2 and values.shape != (1, 1):
        feedforward = len(values) == 1
        module.must(said in (None, feedforward), "feedforward_modules of the config says otherwise than the shape")
    else:
        module.must(said is not None, "feedforward_modules of the config must say whether inputs or outputs are scaled")
        feedforward = bool(said)
    change = IA3(vector, feedforward)
    if feedforward:
        return Part(change=change)
    return Part(change=change, whole={f"{module.name}.bias": Replacement(wide(vector), operation="multiply")})


def _says_feedforward(module: Module) -> bool | None:
    """Whether the config calls the module feed-forward; None where it says nothing. As in PEFT, it gives one regular
    expression, or ends of names without a dot before them."""
    names = module.fields.once(_feedforward)
    if names is None:
        return None
    if isinstance(names, Expression):
        return names.fullmatch(module.name)
    return names.first(module.name) is not None


def _feedforward(fields: Fields) -> Expression | Endings | None:
    """Raises TensorError: no names. ExpressionError: no expression."""
    names = fields.get("feedforward_modules")
    if names is None:
        return None
    if isinstance(names, str):
        return Expression(names)
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise TensorError(f"feedforward_modules of the config must be names, and is {shown(names)}")
    return Endings(names)


METHOD = Method(
    peft_type="IA3",
    name="IA3",
    read=read_ia3,
    docs=(DocsRow("`IA3`", "scale of the outputs, and of the bias; of the inputs (feed-forward modules): fold"),),
    tensors=bare_parameters("ia3_l"),
    fields=frozenset({"feedforward_modules", "init_ia3_weights"}),
)
