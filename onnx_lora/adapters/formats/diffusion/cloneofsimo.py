"""The first LoRA files of Stable Diffusion, of cloneofsimo's `lora_diffusion`: their tensors are numbered, in the order
in which PyTorch walks through the model. That order is known here for Stable Diffusion 1 and 2, and for nothing else.

The scale is 1. The reference is `lora_diffusion/lora.py`: `save_safeloras`, `_find_modules_v2`."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from onnx_lora.adapters.adapter import Adapter
from onnx_lora.adapters.formats.collected import Collected, two_factors
from onnx_lora.adapters.formats.files.reading import TensorFile
from onnx_lora.points import Array

__all__ = ["is_cloneofsimo", "read_cloneofsimo"]

_KEY = re.compile(r"^(?P<component>\w+):(?P<index>\d{1,6}):(?P<side>up|down)$")

# The attentions of the UNet in PyTorch's order: the middle comes last, since it is made last.
_UNET_BLOCKS = (
    *(f"down_blocks.{block}.attentions.{layer}" for block in (0, 1, 2) for layer in (0, 1)),
    *(f"up_blocks.{block}.attentions.{layer}" for block in (1, 2, 3) for layer in (0, 1, 2)),
    "mid_block.attentions.0",
)
_ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")

# Of a transformer block when these files were written: the feed-forward before the second attention.
_UNET_MODULES = (
    *(f"attn1.{name}" for name in _ATTENTION),
    "ff.net.0.proj",
    *(f"attn2.{name}" for name in _ATTENTION),
)
_TEXT_MODULES = ("k_proj", "v_proj", "q_proj", "out_proj")
_TEXT_LAYERS = (12, 23)  # of Stable Diffusion 1, and of 2


def is_cloneofsimo(names: Iterable[str]) -> bool:
    """Whether tensors have such names."""
    return any(_KEY.match(name) for name in names)


def read_cloneofsimo(file: TensorFile, path: Path, name: str) -> Adapter:
    """Raises AdapterFileError: damaged. UnsupportedAdapterError: trained tokens, or another model's numbers."""
    collected = Collected()
    parts: dict[str, dict[int, dict[str, Array]]] = {}
    for key, values in file.tensors.items():
        found = _KEY.match(key)
        if found:
            own = parts.setdefault(found["component"], {}).setdefault(int(found["index"]), {})
            own[found["side"]] = values
        elif file.metadata.get(key) == "<embed>":
            collected.unsupported.append(
                f"{key}: is the embedding of a token that the base's tokenizer lacks; take the tensor out of the file, "
                "if your prompts do without the token"
            )
        else:
            collected.problems.append(f"{key}: must look like unet:0:up, and does not")
    for component, tensors in parts.items():
        _take(collected, component, tensors)
    return collected.adapter(path, name, format="cloneofsimo", sha256=file.sha256)


def _take(collected: Collected, component: str, tensors: Mapping[int, Mapping[str, Array]]) -> None:
    modules = _modules(component, tensors)
    if modules is None:
        collected.unsupported.append(
            f"{component}: {len(tensors)} numbered modules of a model that is not known here (known are the UNet and "
            "the text encoder of Stable Diffusion 1 and 2, all modules of them); convert it with the tool that made it"
        )
        return
    for index, module in enumerate(modules):
        pair = collected.floats({f"{component}:{index}:{side}": values for side, values in tensors[index].items()})
        if len(pair) < len(tensors[index]):
            continue
        if len(pair) < 2:
            collected.problems.append(f"{component}:{index}: must have up and down, and has one of them")
            continue
        made = two_factors(tensors[index]["down"], tensors[index]["up"], 1.0)
        if isinstance(made, str):
            collected.problems.append(f"{component}:{index}: {made}")
        else:
            collected.put_delta(f"{component}.{module}", made)


def _modules(component: str, tensors: Mapping[int, Mapping[str, Array]]) -> Sequence[str] | None:
    """What the numbers mean, or None. The widths of the UNet's blocks say whether the order is the one known here."""
    if sorted(tensors) != list(range(len(tensors))):
        return None
    if component == "text_encoder" and len(tensors) // len(_TEXT_MODULES) in _TEXT_LAYERS and not len(tensors) % 4:
        return [
            f"text_model.encoder.layers.{index // 4}.self_attn.{_TEXT_MODULES[index % 4]}"
            for index in range(len(tensors))
        ]
    if component != "unet" or len(tensors) != len(_UNET_BLOCKS) * len(_UNET_MODULES) or not _widths_fit(tensors):
        return None
    return [f"{block}.transformer_blocks.0.{module}" for block in _UNET_BLOCKS for module in _UNET_MODULES]


def _widths_fit(tensors: Mapping[int, Mapping[str, Array]]) -> bool:
    """Whether each block's modules have its width, the text's as inputs of the second attention, and eight times the
    width as outputs of the gated feed-forward."""
    if not all(len(pair) == 2 and all(values.ndim >= 2 for values in pair.values()) for pair in tensors.values()):
        return True  # said of each later
    sizes = [(tensors[index]["down"].shape[1], len(tensors[index]["up"])) for index in range(len(tensors))]
    width, text = sizes[0][0], sizes[len(_ATTENTION) + 2][0]
    for index, block in enumerate(_UNET_BLOCKS):
        times = {"down_blocks.0": 1, "up_blocks.3": 1, "down_blocks.1": 2, "up_blocks.2": 2}.get(
            block[: block.index(".at")], 4
        )
        own = width * times
        wanted = [(own, own)] * 4 + [(own, 8 * own), (own, own), (text, own), (text, own), (own, own)]
        if sizes[index * len(wanted) : (index + 1) * len(wanted)] != wanted:
            return False
    return True
