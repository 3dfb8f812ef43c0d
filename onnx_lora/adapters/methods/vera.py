"""VeRA: two random matrices are shared by all modules, and each module has two vectors.

VeRA (Kopiczko et al. 2024), equation 2: `W = W0 + diag(b) · B · diag(d) · A`. There is no scale. The reference is PEFT
0.21: `vera/layer.py`, `get_delta_weight`.
"""

from __future__ import annotations

from dataclasses import dataclass

from onnx_lora.adapters.adapter import MatrixDelta
from onnx_lora.adapters.methods.method import Contribution, DocsRow, Method, Module, bare_parameters
from onnx_lora.adapters.methods.weights import Floats, explain_kind, factors_pay, flatten_shape, widen
from onnx_lora.kinds import Kind, Linear
from onnx_lora.points import Array

__all__ = ["METHOD", "VeRA", "read_vera"]


@dataclass(frozen=True)
class VeRA:
    """`a` `[r, most inputs]` and `b` `[most outputs, r]`, of which a module uses as many inputs and outputs as it has;
    `by_rank` `[r]` and `by_output` `[out]`, its own. `name`: of the method, in messages."""

    a: Array
    b: Array
    by_rank: Array
    by_output: Array
    name: str = "VeRA"

    @property
    def method(self) -> str:
        return self.name

    def explain_misfit(self, shape: tuple[int, ...], kind: Kind) -> str | None:
        if not isinstance(kind, Linear) or len(shape) != 2:
            return explain_kind(self.name, "linear modules", shape, kind)
        outputs, inputs = shape
        most_outputs, most_inputs = len(self.b), self.a.shape[1]
        if outputs == self.by_output.size and outputs <= most_outputs and inputs <= most_inputs:
            return None
        return (
            f"{self.name} must meet a weight of {self.by_output.size} outputs, within the shape "
            f"{(most_outputs, most_inputs)} of its projections, and this one has shape {shape}"
        )

    def apply_to(self, weight: Array) -> Array:
        a, b = self._factors(weight.shape)
        return widen(weight) + b @ a

    def as_factors(self, weight: Array) -> MatrixDelta | None:
        return MatrixDelta(*self._factors(weight.shape)) if factors_pay(len(self.a), weight.shape) else None

    def output_scale(self) -> Array | None:
        return None

    def _factors(self, shape: tuple[int, ...]) -> tuple[Floats, Floats]:
        """`[r, in]` and `[out, r]`: the module's part of the projections, with its vectors in them."""
        outputs, inputs = flatten_shape(shape)
        a = widen(self.by_rank)[:, None] * widen(self.a[:, :inputs])
        b = widen(self.by_output)[:, None] * widen(self.b[:outputs])
        return a, b


def read_vera(module: Module) -> Contribution:
    """The shared `vera_A` `[r, most inputs]` and `vera_B` `[most outputs, r]`; the module's own `vera_lambda_d` `[r]`
    and `vera_lambda_b` `[out]`.

    Raises TensorError: one of them is missing, or they are not of one rank.
    """
    a = module.tensor("vera_A", 2)
    b = module.tensor("vera_B", 2)
    by_rank = module.vector("vera_lambda_d")
    by_output = module.vector("vera_lambda_b")
    module.must(len(a) == b.shape[1] == by_rank.size, f"VeRA's projections {a.shape}, {b.shape} must be of its rank")
    return Contribution(change=VeRA(a, b, by_rank, by_output))


METHOD = Method(
    peft_type="VERA",
    name="VeRA",
    read=read_vera,
    docs=(DocsRow("`VERA`", "delta; refused without the projections (`save_projection=False`)"),),
    tensors=bare_parameters("vera_lambda_b", "vera_lambda_d"),
    shared=("vera_A", "vera_B"),
    fields=frozenset({"d_initial", "init_vera_weights", "projection_prng_key", "r", "save_projection", "vera_dropout"}),
)
