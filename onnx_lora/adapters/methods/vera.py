"""VeRA: two random matrices are shared by all modules, and each module has two vectors.

VeRA (Kopiczko et al. 2024), equation 2: `W = W0 + diag(b) · B · diag(d) · A`. There is no scale. The reference is PEFT
0.21: `vera/layer.py`, `get_delta_weight`.
"""

from __future__ import annotations

from dataclasses import dataclass

from onnx_lora.adapters.adapter import MatrixDelta
from onnx_lora.adapters.methods.arrays import Floats, flat, wide
from onnx_lora.adapters.methods.method import DocsRow, Method, Module, Part, bare_parameters
from onnx_lora.adapters.methods.shapes import not_for, pair, pays
from onnx_lora.kinds import Kind, Linear
from onnx_lora.points import Array

__all__ = ["METHOD", "VeRA", "read_vera"]


@dataclass(frozen=True)
class VeRA:
    """`a` `[r, most inputs]`, `b` `[most outputs, r]`, of which the module takes as much as it is wide; `by_rank`
    `[r]`, `by_output` `[out]`. `name`: of the method, in messages."""

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
            return not_for(self.name, "linear modules", shape, kind)
        most = (len(self.b), self.a.shape[1])
        if shape[0] != self.by_output.size or shape[0] > most[0] or shape[1] > most[1]:
            return (
                f"{self.name} must meet a weight of {self.by_output.size} outputs, within the shape {most} of its "
                f"projections, and this one has shape {shape}"
            )
        return None

    def apply_to(self, weight: Array) -> Array:
        a, b = self._factors(weight.shape)
        return wide(weight) + b @ a

    def as_factors(self, weight: Array) -> MatrixDelta | None:
        return pair(*self._factors(weight.shape)) if pays(len(self.a), weight.shape) else None

    def output_scale(self) -> Array | None:
        return None

    def _factors(self, shape: tuple[int, ...]) -> tuple[Floats, Floats]:
        outputs, inputs = flat(shape)
        a = wide(self.by_rank)[:, None] * wide(self.a[:, :inputs])
        return a, wide(self.by_output)[:, None] * wide(self.b[:outputs])


def read_vera(module: Module) -> Part:
    """The shared `vera_A` `[r, most inputs]` and `vera_B` `[most outputs, r]`; the module's own `vera_lambda_d` `[r]`
    and `vera_lambda_b` `[out]`.

    Raises TensorError: one of them is missing, or they are not of one rank.
    """
    a, b = module.tensor("vera_A", 2), module.tensor("vera_B", 2)
    by_rank, by_output = module.vector("vera_lambda_d"), module.vector("vera_lambda_b")
    module.must(len(a) == b.shape[1] == by_rank.size, f"VeRA's projections {a.shape}, {b.shape} must be of its rank")
    return Part(change=VeRA(a, b, by_rank, by_output))


METHOD = Method(
    peft_type="VERA",
    name="VeRA",
    read=read_vera,
    docs=(DocsRow("`VERA`", "delta; refused without the projections (`save_projection=False`)"),),
    tensors=bare_parameters("vera_lambda_b", "vera_lambda_d"),
    shared=("vera_A", "vera_B"),
    fields=frozenset({"d_initial", "init_vera_weights", "projection_prng_key", "r", "save_projection", "vera_dropout"}),
)
