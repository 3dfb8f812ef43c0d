"""What diffusers calls the files of adapters, the parts of a pipeline, and the tensors of LoRA, in every spelling that
it ever had. It knows no tensor's values.

The reference is diffusers 0.35: `loaders/lora_base.py`, `utils/state_dict_utils.py`."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from onnx_lora.adapters.module_names import PIPELINE_PARTS

__all__ = ["FILE", "METADATA", "PICKLE", "TensorName", "has_own_names", "parse_name"]

FILE = "pytorch_lora_weights.safetensors"
PICKLE = "pytorch_lora_weights.bin"

# Of the header: the PEFT configs of all parts in one JSON object, their fields behind the part's name.
METADATA = "lora_adapter_metadata"

# Ends of names, by what they are in PEFT's words; the first that matches counts. `processor` stands where attention
# had its factors apart from the modules.
_TENSORS = (
    (re.compile(r"\.lora_A\.weight$"), "lora_A"),
    (re.compile(r"\.lora_B\.weight$"), "lora_B"),
    (re.compile(r"\.lora_B\.bias$"), "lora_B.bias"),
    (re.compile(r"\.lora_magnitude_vector(\.weight)?$"), "lora_magnitude_vector"),
    (re.compile(r"(\.lora|\.lora_linear_layer|(?<=\.to_[qkv])_lora|(?<=\.to_out)_lora)\.down\.weight$"), "lora_A"),
    (re.compile(r"(\.lora|\.lora_linear_layer|(?<=\.to_[qkv])_lora|(?<=\.to_out)_lora)\.up\.weight$"), "lora_B"),
    (re.compile(r"\.alpha$"), "alpha"),
)

# How PEFT spells tensors. Files of PEFT have these, too.
_PEFT_SPELLINGS = (".lora_A.", ".lora_B.", ".lora_magnitude_vector")

# Modules by what the oldest names call them, of text encoders and of UNets.
_OLD_TEXT = {".to_q": ".q_proj", ".to_k": ".k_proj", ".to_v": ".v_proj", ".to_out": ".out_proj"}
_OLD_UNET = {".to_out": ".to_out.0"}


@dataclass(frozen=True)
class TensorName:
    """`component`: the part of the pipeline; empty where the file is of one part and names none. `module`: its name
    within the part. `tensor`: its name in PEFT's words."""

    component: str
    module: str
    tensor: str


def parse_name(key: str) -> TensorName | None:
    """What a tensor's name says; None: it is no tensor of LoRA."""
    first, _, rest = key.partition(".")
    component, name = (first, rest) if first in PIPELINE_PARTS and rest else ("", key)
    dotted = f".{name}"  # the patterns begin with the dot behind the module
    for pattern, tensor in _TENSORS:
        found = pattern.search(dotted)
        if found is None:
            continue
        module = dotted[: found.start()].replace(".processor.", ".")
        is_old = found[0].startswith("_lora")
        is_magnitude_of_attention = tensor == "lora_magnitude_vector" and ".to_" in module
        if is_old or is_magnitude_of_attention:
            module = _rename_old(component, module)
        module = module.removeprefix(".")
        return TensorName(component, module, tensor) if module else None
    return None


def _rename_old(component: str, module: str) -> str:
    """The module of attention by today's name."""
    is_text = component.startswith("text_encoder") or ".self_attn." in module
    names = _OLD_TEXT if is_text else _OLD_UNET
    for old, new in names.items():
        if module.endswith(old):
            module = module.removesuffix(old) + new
    return module


def has_own_names(names: Iterable[str], metadata: Mapping[str, str]) -> bool:
    """Whether a file with these names and this metadata is diffusers'.

    PEFT's spelling counts only behind a part's name, or with diffusers' metadata: else the file is half of a PEFT
    folder, and its scale is in the other half.
    """
    return METADATA in metadata or any(_is_own(name) for name in names)


def _is_own(name: str) -> bool:
    tensor = next((tensor for pattern, tensor in _TENSORS if pattern.search(name)), None)
    if tensor is None or tensor == "alpha" or name.startswith("base_model."):
        return False
    if not any(spelling in name for spelling in _PEFT_SPELLINGS):
        return True
    part = name.partition(".")[0]
    # GPT-2's modules begin with `transformer` too.
    return part in PIPELINE_PARTS and (part != "transformer" or "transformer_blocks." in name)
