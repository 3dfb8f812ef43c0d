"""DoRA: LoRA with a magnitude for each output.

DoRA (Liu et al. 2024), equation 5: `W = m · (W0 + scale · B · A) / ‖W0 + scale · B · A‖`, the norm that of each
output's weights. The factors are LoRA's; here is the magnitude. The reference is PEFT 0.21: `lora/dora.py`.
"""

from __future__ import annotations

from onnx_lora.adapters.methods.method import DocsRow, Module
from onnx_lora.adapters.problems import TensorError
from onnx_lora.points import Array

__all__ = ["DOCS", "MAGNITUDE", "read_magnitude"]

MAGNITUDE = "lora_magnitude_vector"

DOCS = DocsRow("`use_dora`", "delta and scale")


def read_magnitude(module: Module, outputs: int) -> Array | None:
    """`lora_magnitude_vector` `[out]`, with axes of size 1 in front or behind. None: the module is plain LoRA.

    Raises TensorError: the config says use_dora and the tensor is missing, or the other way round; or it has not one
    value for each of the `outputs`.
    """
    wanted = bool(module.fields.get("use_dora"))
    found = module.has(MAGNITUDE)
    if wanted and not found:
        raise TensorError(f"has no {MAGNITUDE}, and the config says use_dora; get the whole file")
    if found and not wanted:
        raise TensorError(
            f"has {MAGNITUDE}, DoRA's, and PEFT would ignore it: the config does not say use_dora; correct "
            "adapter_config.json, or remove it"
        )
    if not found:
        return None
    vector = module.vector(MAGNITUDE)
    if vector.size != outputs:
        raise TensorError(f"{MAGNITUDE} must have {outputs} values, one for each output, and has {vector.size}")
    return vector
