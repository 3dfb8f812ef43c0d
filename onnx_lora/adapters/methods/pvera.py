"""PVeRA: VeRA that samples in training; what it samples around is VeRA's change.

PVeRA (2025, arXiv:2512.07703): A gives a mean and a deviation for each rank, and PEFT runs with the mean, the first
half of it, where `sample_at_inference` is not set. The reference is PEFT 0.21: `pvera/layer.py`.
"""

from __future__ import annotations

from onnx_lora.adapters.methods.method import Contribution, DocsRow, Method, Module, bare_parameters
from onnx_lora.adapters.methods.vera import VeRA

__all__ = ["METHOD", "read_pvera"]


def read_pvera(module: Module) -> Contribution:
    """The shared `pvera_A` `[2 · r, most inputs]` and `pvera_B` `[most outputs, r]`; the module's own `pvera_lambda_d`
    `[2 · r]` and `pvera_lambda_b` `[out]`.

    Raises TensorError: one of them is missing, they are not of one rank, or the config makes every run another one.
    """
    module.must(not module.fields.get("sample_at_inference"), "sample_at_inference makes every run another one")
    a, b = module.tensor("pvera_A", 2), module.tensor("pvera_B", 2)
    by_rank, by_output = module.vector("pvera_lambda_d"), module.vector("pvera_lambda_b")
    rank = b.shape[1]
    module.must(len(a) == by_rank.size == 2 * rank, f"PVeRA's projections {a.shape}, {b.shape} must be of its rank")
    return Contribution(change=VeRA(a[:rank], b, by_rank[:rank], by_output, "PVeRA"))


METHOD = Method(
    peft_type="PVERA",
    name="PVeRA",
    read=read_pvera,
    docs=(
        DocsRow(
            "`PVERA`",
            "delta; refused without the projections (`save_projection=False`), and with `sample_at_inference`",
        ),
    ),
    tensors=bare_parameters("pvera_lambda_b", "pvera_lambda_d"),
    shared=("pvera_A", "pvera_B"),
    fields=frozenset(
        {
            "d_initial",
            "generator_seed",
            "projection_prng_key",
            "pvera_dropout",
            "r",
            "sample_at_inference",
            "save_projection",
        }
    ),
)
