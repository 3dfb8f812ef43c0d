"""Kohya's single file out of an adapter. SDXL's UNet gets Stability's names, which are all that sd-scripts reads."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from onnx_lora.adapters.adapter import Delta, PortableAdapter, Replacement
from onnx_lora.adapters.formats.diffusion.kohya_names import flat_name
from onnx_lora.adapters.formats.writing import refuse_writing, save_safetensors
from onnx_lora.kinds import Embedding
from onnx_lora.points import Array

__all__ = ["write_kohya"]

# Modules that only SDXL has, by how their names begin.
_XL = ("text_encoder_2.", "unet.add_embedding.")


def write_kohya(adapter: PortableAdapter, file: Path, modules: Iterable[str]) -> None:
    """Write the file. `modules`: all that the package has, which say whether it is SDXL.

    Raises UnsupportedAdapterError: embeddings, whole weights other than what is added to a norm or a bias, two modules
    of one flat name.
    """
    is_xl = any(name.startswith(_XL) for name in (*modules, *adapter.deltas))
    problems: list[str] = []
    tensors: dict[str, Array] = {}
    modules_by_flat_name: dict[str, str] = {}
    for module, delta in adapter.deltas.items():
        flat = flat_name(module, is_xl=is_xl)
        other = modules_by_flat_name.setdefault(flat, module)
        if other != module:
            problems.append(f"{module}: has the flat name {flat} that {other} has too")
        if isinstance(delta.kind, Embedding):
            problems.append(f"{module}: is an embedding")
        for tensor, values in _factor_tensors(delta).items():
            tensors[f"{flat}.{tensor}"] = values
    for name, replacement in adapter.replacements.items():
        module, _, parameter = name.rpartition(".")
        if not _is_added_vector(parameter, replacement):
            problems.append(f"{name}: is a whole weight, and kohya's files hold differences")
            continue
        is_norm = f"{module}.weight" in adapter.replacements
        tensor = _difference_name(parameter, is_norm=is_norm)
        flat = flat_name(module, is_xl=is_xl)
        tensors[f"{flat}.{tensor}"] = replacement.value
    refuse_writing(adapter, "a file of kohya's", problems)
    save_safetensors(file, tensors, {"format": "pt", "ss_network_module": "networks.lora"})


def _is_added_vector(parameter: str, replacement: Replacement) -> bool:
    """Whether it is added to a weight or a bias that has one axis."""
    is_added = replacement.operation == "add"
    return is_added and replacement.value.ndim == 1 and parameter in ("weight", "bias")


def _difference_name(parameter: str, *, is_norm: bool) -> str:
    """The tensor that adds to a vector: of a norm, whose weight is one too, or the bias of another module."""
    if parameter == "weight":
        return "w_norm"
    return "b_norm" if is_norm else "diff_b"


def _factor_tensors(delta: Delta) -> Mapping[str, Array]:
    """`lora_down` as A is, `lora_up` `[out, r]` and `dora_scale` `[out, 1]` with axes of size 1 for a kernel."""
    kernel = (1,) * (delta.a.ndim - 2)
    wide = np.promote_types(delta.b.dtype, np.float32)
    tensors: dict[str, Array] = {
        "alpha": np.array(delta.scale * delta.rank, wide),
        "lora_down.weight": delta.a,
        "lora_up.weight": delta.b.reshape(*delta.b.shape, *kernel),
    }
    if delta.magnitude is not None:
        tensors["dora_scale"] = delta.magnitude.reshape(-1, 1, *kernel)
    return tensors
