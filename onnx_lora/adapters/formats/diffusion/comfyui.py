"""Single files with dotted names, as ComfyUI loads them and as DiffSynth, XLabs and most trainers of diffusion
transformers write them: a module's own name, mostly behind `diffusion_model.`, and kohya's or PEFT's tensors behind it.

The reference is ComfyUI's `comfy/lora.py` and `comfy/weight_adapter` (without an alpha the scale is 1), and for XLabs'
names diffusers 0.35, `_convert_xlabs_flux_lora_to_diffusers`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from onnx_lora.adapters.adapter import Adapter, Origin
from onnx_lora.adapters.formats.builder import AdapterBuilder
from onnx_lora.adapters.formats.diffusion.kohya import take_module
from onnx_lora.adapters.formats.files.reading import TensorFile
from onnx_lora.adapters.formats.format import Row
from onnx_lora.adapters.formats.place import Place
from onnx_lora.adapters.module_names import PIPELINE_PARTS
from onnx_lora.points import Array

__all__ = ["FORMAT"]

# What ComfyUI puts in front of the denoiser's own names, whichever network that is.
_DENOISER = "diffusion_model."

# How the blocks of denoisers are called, by diffusers and by the models' own code. A file that names no part of a
# pipeline is known by them.
_BLOCKS = re.compile(
    r"^(?:transformer_blocks|single_transformer_blocks|double_blocks|single_blocks|joint_blocks|down_blocks|up_blocks"
    r"|mid_block|input_blocks|output_blocks|middle_block)\."
)

# Ends of names, by kohya's name of the tensor. DiffSynth leaves the adapter's name in.
_PEFT = re.compile(r"\.lora_(?P<which>[AB])(?:\.default)?\.weight$")
_KOHYA = re.compile(
    r"\.(?P<tensor>lora_(?:down|up|mid)\.weight|alpha|dora_scale|diff|diff_b|hada_(?:w[12]_[ab]|t[12])"
    r"|lokr_(?:w[12](?:_[ab])?|t2)|w_norm|b_norm)$"
)
_TENSOR_OF_PEFT = {"A": "lora_down.weight", "B": "lora_up.weight"}

# XLabs' processors of Flux: the block, the factors' name, which of the pair.
_XLABS = re.compile(
    r"^(?:diffusion_model\.)?(?P<blocks>double_blocks|single_blocks)\.(?P<number>\d+)\.processor\."
    r"(?P<name>(?:qkv|proj)_lora[12]?)\.(?P<which>down|up)\.weight$"
)

# The modules of diffusers that XLabs' factors are of; a packed projection's outputs are those of three, side by side.
_XLABS_MODULES: Mapping[tuple[str, str], tuple[str, ...]] = {
    ("double_blocks", "qkv_lora1"): ("attn.to_q", "attn.to_k", "attn.to_v"),
    ("double_blocks", "qkv_lora2"): ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    ("double_blocks", "proj_lora1"): ("attn.to_out.0",),
    ("double_blocks", "proj_lora2"): ("attn.to_add_out",),
    ("single_blocks", "qkv_lora"): ("attn.to_q", "attn.to_k", "attn.to_v"),
    ("single_blocks", "proj_lora"): ("proj_out",),
}
_XLABS_BLOCKS = {"double_blocks": "transformer_blocks", "single_blocks": "single_transformer_blocks"}


@dataclass(frozen=True)
class _Name:
    """What a key says: the module, kohya's name of the tensor, and whether the factors are spelled as PEFT does."""

    module: str
    tensor: str
    is_peft: bool = False


class ComfyuiFormat:
    name = "comfyui"
    ending = ".safetensors"
    row = Row(
        "ComfyUI, DiffSynth, XLabs (`.safetensors`)",
        "`diffusion_model.`, or a denoiser's blocks, before dotted names; `lora_down`, `lora_A.default` behind them",
        "alpha / rank; without `.alpha` 1",
        "factors as PEFT spells them of several ranks and no alpha; what kohya's are refused for",
    )

    def recognises(self, place: Place) -> bool:
        if place.header is None:
            return False
        return any(_is_own(key) for key in place.header.names)

    def read(self, place: Place, name: str | None) -> Adapter:
        return _read(place.tensors(), place.path, name or place.default_name)


FORMAT = ComfyuiFormat()


def _is_own(key: str) -> bool:
    """Whether a file with this key is read here. PEFT's spelling counts only behind names of denoisers: else the file
    is half of a PEFT folder."""
    if _XLABS.match(key) is not None:
        return True
    found = _parse(key)
    if found is None or key.startswith("base_model."):
        return False
    first, _, rest = key.partition(".")
    own = rest if first in PIPELINE_PARTS else key
    is_of_denoiser = key.startswith(_DENOISER) or _BLOCKS.match(own) is not None
    return is_of_denoiser or (not found.is_peft and found.tensor.startswith("lora_") and "." in found.module)


def _parse(key: str) -> _Name | None:
    """What a key says; None: it is no tensor known here."""
    peft = _PEFT.search(key)
    if peft is not None:
        return _Name(_own_name(key[: peft.start()]), _TENSOR_OF_PEFT[peft["which"]], is_peft=True)
    kohya = _KOHYA.search(key)
    return None if kohya is None else _Name(_own_name(key[: kohya.start()]), kohya["tensor"])


def _own_name(module: str) -> str:
    return module.removeprefix(_DENOISER)


def _read(file: TensorFile, path: Path, name: str) -> Adapter:
    """The scale is alpha / r by module; without `.alpha` it is 1.

    Tensors as `kohya.py` has them; `lora_A` and `lora_B` are `lora_down` and `lora_up`.

    Raises AdapterFileError: damaged, or a scale that the file does not tell. UnsupportedAdapterError: what is refused.
    """
    builder = AdapterBuilder()
    modules: dict[str, dict[str, Array]] = {}
    of_peft: set[str] = set()
    for key, values in file.tensors.items():
        if _XLABS.match(key) is not None:
            _put_xlabs(builder, modules, key, values)
            continue
        found = _parse(key)
        if found is None:
            builder.unsupported.append(f"{key}: is no tensor of LoRA known here; {_explain_other(key)}")
            continue
        if found.is_peft:
            of_peft.add(found.module)
        _put(builder, modules, found.module, found.tensor, values, key)
    _check_scales(builder, modules, of_peft)
    for module, tensors in modules.items():
        with builder.reading(module):
            take_module(builder, module, tensors)
    return builder.adapter(name, Origin(str(path), file.sha256, "comfyui", "", ""))


def _put(
    builder: AdapterBuilder, modules: dict[str, dict[str, Array]], module: str, tensor: str, values: Array, key: str
) -> None:
    own = modules.setdefault(module, {})
    if tensor in own:
        builder.problems.append(f"{key}: there are two tensors for {tensor} of {module}")
    own[tensor] = values


def _put_xlabs(builder: AdapterBuilder, modules: dict[str, dict[str, Array]], key: str, values: Array) -> None:
    """XLabs' factors by diffusers' names: `down` is shared by the modules of a packed projection, `up` is cut."""
    found = _XLABS.match(key)
    assert found is not None
    names = _XLABS_MODULES.get((found["blocks"], found["name"]))
    if names is None:
        builder.unsupported.append(f"{key}: is no tensor of XLabs' Flux known here; upgrade onnx-lora")
        return
    if found["which"] == "up" and (values.ndim != 2 or len(values) % len(names)):
        builder.problems.append(f"{key}: must have the outputs of {len(names)} modules, and has shape {values.shape}")
        return
    pieces = np.split(values, len(names)) if found["which"] == "up" else [values] * len(names)
    block = f"{_XLABS_BLOCKS[found['blocks']]}.{found['number']}"
    for name, piece in zip(names, pieces, strict=True):
        _put(builder, modules, f"{block}.{name}", f"lora_{found['which']}.weight", piece, key)


def _check_scales(builder: AdapterBuilder, modules: Mapping[str, Mapping[str, Array]], of_peft: set[str]) -> None:
    """Refuse what tools read in different ways: PEFT's spelling of several ranks without alphas, for which diffusers
    takes the first module's rank for the alpha of all, and ComfyUI each its own; and alphas at some modules only."""
    with_alpha = [module for module, tensors in modules.items() if "alpha" in tensors]
    factors = [module for module, tensors in modules.items() if "lora_down.weight" in tensors]
    lacking = [module for module in factors if module not in with_alpha]
    if with_alpha and lacking:
        builder.problems.append(f"{lacking[0]} (and {len(lacking) - 1} more): has no alpha, and other modules have one")
    ranks = {len(modules[module]["lora_down.weight"]) for module in factors if modules[module]["lora_down.weight"].ndim}
    if not with_alpha and of_peft and len(ranks) > 1:
        builder.problems.append(
            f"the modules have ranks {', '.join(map(str, sorted(ranks)))} and no alpha, and tools differ in what their "
            "scale is: add an alpha to each module, its rank for a scale of 1"
        )


def _explain_other(key: str) -> str:
    """What a key is that is no tensor of LoRA, and what to do."""
    if "string_to_param" in key or key.startswith("bundle_emb."):
        return "it is a trained token, which changes prompts; save the file without bundled embeddings"
    return "upgrade onnx-lora"
