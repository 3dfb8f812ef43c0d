"""IA3: a factor for every output of a weight, or for every input.

(IA)³ (Liu et al. 2022), section 3.3: `W = diag(l) · W0`, and the bias is scaled too; in a feed-forward module
`W = W0 · diag(l)`. The reference is PEFT 0.21: `ia3/layer.py`, `ia3/model.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

from onnx_lora.adapters.adapter import MatrixDelta, Replacement
from onnx_lora.adapters.methods.endings import Endings
from onnx_lora.adapters.methods.method import Contribution, DocsRow, Fields, Method, Module, bare_parameters
from onnx_lora.adapters.methods.weights import explain_kind, widen
from onnx_lora.adapters.problems import TensorError, abbreviate
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
            return explain_kind("IA3", "linear modules and convolutions", shape, kind)
        size = self.vector.size
        scaled = "inputs" if self.feedforward else "outputs"
        fits = self._fits_inputs(shape, kind) if self.feedforward else size == shape[0]
        if fits:
            return None
        return f"IA3 must meet a weight of {size} {scaled}, and this one has shape {shape}"

    def _fits_inputs(self, shape: tuple[int, ...], kind: Kind) -> bool:
        """Whether there is a number for each input. A convolution in groups has more inputs than its weight's axis."""
        outputs, inputs = shape[:2]
        if inputs == 0 or self.vector.size % inputs:
            return False
        groups = self.vector.size // inputs
        if groups == 1:
            return True
        return isinstance(kind, Conv) and groups > 1 and outputs % groups == 0

    def apply_to(self, weight: Array) -> Array:
        vector = widen(self.vector)
        kernel = (1,) * (weight.ndim - 2)
        if not self.feedforward:
            return widen(weight) * vector.reshape(-1, 1, *kernel)
        outputs, inputs = weight.shape[:2]
        groups = vector.size // inputs
        by_output = vector.reshape(groups, -1).repeat(outputs // groups, axis=0)
        return widen(weight) * by_output.reshape(outputs, inputs, *kernel)

    def as_factors(self, weight: Array) -> MatrixDelta | None:
        del weight
        return None

    def output_scale(self) -> Array | None:
        return None if self.feedforward else widen(self.vector)


def read_ia3(module: Module) -> Contribution:
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
        return Contribution(change=change)
    return Contribution(change=change, whole={f"{module.name}.bias": Replacement(widen(vector), operation="multiply")})


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
        raise TensorError(f"feedforward_modules of the config must be names, and is {abbreviate(names)}")
    return Endings(names)


METHOD = Method(
    peft_type="IA3",
    name="IA3",
    read=read_ia3,
    docs=(DocsRow("`IA3`", "scale of the outputs, and of the bias; of the inputs (feed-forward modules): fold"),),
    tensors=bare_parameters("ia3_l"),
    fields=frozenset({"feedforward_modules", "init_ia3_weights"}),
)
