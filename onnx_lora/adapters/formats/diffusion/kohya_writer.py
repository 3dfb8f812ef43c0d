"""Kohya's single file out of an adapter. SDXL's UNet gets Stability's names, which are all that sd-scripts reads."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import safetensors.numpy

from onnx_lora.adapters.adapter import Delta, PortableAdapter
from onnx_lora.adapters.formats.diffusion.kohya import COMPONENTS
from onnx_lora.adapters.formats.diffusion.sgm import to_sgm
from onnx_lora.adapters.formats.peft.writer import contiguous, refuse
from onnx_lora.kinds import Embedding
from onnx_lora.points import Array

__all__ = ["write_kohya"]

# Modules that only SDXL has, by how their names begin.
_XL = ("text_encoder_2.", "unet.add_embedding.")


def write_kohya(adapter: PortableAdapter, file: Path, modules: Iterable[str]) -> None:
    """`modules`: all that the package has, which say whether it is SDXL.

    Raises UnsupportedAdapterError: embeddings, whole weights other than what is added to a norm or a bias, two modules
    of one flat name.
    """
    is_xl = any(name.startswith(_XL) for name in (*modules, *adapter.deltas))
    problems: list[str] = []
    tensors: dict[str, Array] = {}
    flat: dict[str, str] = {}
    for module, delta in adapter.deltas.items():
        name = _flat(module, is_xl=is_xl)
        if flat.setdefault(name, module) != module:
            problems.append(f"{module}: has the flat name {name} that {flat[name]} has too")
        if isinstance(delta.kind, Embedding):
            problems.append(f"{module}: is an embedding")
        tensors |= {f"{name}.{tensor}": values for tensor, values in _tensors(delta).items()}
    for name, replacement in adapter.replacements.items():
        module, _, parameter = name.rpartition(".")
        if replacement.operation != "add" or replacement.value.ndim != 1 or parameter not in ("weight", "bias"):
            problems.append(f"{name}: is a whole weight, and kohya's files hold differences")
        else:
            tensor = {"weight": "w_norm", "bias": "b_norm"}[parameter]
            if f"{module}.weight" not in adapter.replacements:
                tensor = {"weight": "w_norm", "bias": "diff_b"}[parameter]
            tensors[f"{_flat(module, is_xl=is_xl)}.{tensor}"] = replacement.value
    refuse(adapter, "a file of kohya's", problems)
    file.write_bytes(
        safetensors.numpy.save(contiguous(tensors), {"format": "pt", "ss_network_module": "networks.lora"})
    )


def _flat(module: str, *, is_xl: bool) -> str:
    part, _, rest = module.partition(".")
    # The same parts have two spellings; SDXL counts its text encoders.
    spellings = {own: prefix for prefix, own in COMPONENTS.items() if prefix != ("lora_te_" if is_xl else "lora_te1_")}
    if part not in spellings or not rest:
        return f"lycoris_{module.replace('.', '_')}"
    theirs = to_sgm(rest) if is_xl and part == "unet" else None
    return f"{spellings[part]}{theirs or rest.replace('.', '_')}"


def _tensors(delta: Delta) -> Mapping[str, Array]:
    kernel = (1,) * (delta.a.ndim - 2)
    wide = np.promote_types(delta.b.dtype, np.float32)
    tensors: dict[str, Array] = {
        "alpha": np.array(delta.scale * len(delta.a), wide),
        "lora_down.weight": delta.a,
        "lora_up.weight": delta.b.reshape(*delta.b.shape, *kernel),
    }
    if delta.magnitude is not None:
        tensors["dora_scale"] = delta.magnitude.reshape(-1, 1, *kernel)
    return tensors
