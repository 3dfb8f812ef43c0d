"""The first LoRA files of Stable Diffusion, by cloneofsimo's `lora_diffusion`: their tensors are numbered, in the order
in which PyTorch walks through the model. That order is known here for Stable Diffusion 1 and 2 alone.

The reference is `lora_diffusion/lora.py`: `save_safeloras`, `_find_modules_v2`."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeAlias

from onnx_lora.adapters.adapter import Adapter, Origin
from onnx_lora.adapters.formats.builder import AdapterBuilder, two_factors
from onnx_lora.adapters.formats.files.reading import TensorFile
from onnx_lora.adapters.formats.format import Row
from onnx_lora.adapters.formats.place import Place
from onnx_lora.adapters.problems import TensorError
from onnx_lora.points import Array

__all__ = ["FORMAT"]

_KEY = re.compile(r"^(?P<component>\w+):(?P<index>\d{1,6}):(?P<side>up|down)$")

# Blocks of the UNet in PyTorch's order, and how many attentions each has: the middle comes last, since it is made last.
_UNET_PARTS = (
    ("down_blocks.0", 2),
    ("down_blocks.1", 2),
    ("down_blocks.2", 2),
    ("up_blocks.1", 3),
    ("up_blocks.2", 3),
    ("up_blocks.3", 3),
    ("mid_block", 1),
)

# The modules of a transformer block, in the order that they had when these files were written: the feed-forward comes
# before the second attention.
_UNET_MODULES = (
    "attn1.to_q",
    "attn1.to_k",
    "attn1.to_v",
    "attn1.to_out.0",
    "ff.net.0.proj",
    "attn2.to_q",
    "attn2.to_k",
    "attn2.to_v",
    "attn2.to_out.0",
)
_TEXT_MODULES = ("k_proj", "v_proj", "q_proj", "out_proj")
_TEXT_LAYERS = (12, 23)  # of Stable Diffusion 1, and of 2


# The widths of blocks, as multiples of the first block's. Blocks that are not named have the largest.
_WIDTHS = {"down_blocks.0": 1, "up_blocks.3": 1, "down_blocks.1": 2, "up_blocks.2": 2}
_WIDEST = 4

# Tensors by the number of their module, and by side.
_Numbered: TypeAlias = dict[int, dict[str, Array]]


class CloneofsimoFormat:
    name = "cloneofsimo"
    ending = ".safetensors"
    row = Row(
        "cloneofsimo (`.safetensors`)",
        "`unet:0:up`",
        "1",
        "trained tokens, other models than Stable Diffusion 1 and 2",
    )

    def recognises(self, place: Place) -> bool:
        return place.header is not None and any(_KEY.match(name) for name in place.header.names)

    def read(self, place: Place, name: str | None) -> Adapter:
        return _read(place.tensors(), place.path, name or place.default_name)


FORMAT = CloneofsimoFormat()


def _read(file: TensorFile, path: Path, name: str) -> Adapter:
    """`down` `[r, in]` and `up` `[out, r]`, axes of size 1 behind. The scale is 1.

    Raises AdapterFileError: damaged. UnsupportedAdapterError: trained tokens, or another model's numbers.
    """
    builder = AdapterBuilder()
    components: dict[str, _Numbered] = {}
    for key, values in file.tensors.items():
        found = _KEY.match(key)
        if found:
            numbered = components.setdefault(found["component"], {})
            numbered.setdefault(int(found["index"]), {})[found["side"]] = values
        elif file.metadata.get(key) == "<embed>":
            builder.unsupported.append(
                f"{key}: is the embedding of a token that the base's tokenizer lacks; take the tensor out of the file, "
                "if your prompts do without the token"
            )
        else:
            builder.problems.append(f"{key}: must look like unet:0:up, and does not")
    for component, numbered in components.items():
        _take(builder, component, numbered)
    return builder.adapter(name, Origin(str(path), file.sha256, "cloneofsimo", "", ""))


def _take(builder: AdapterBuilder, component: str, numbered: _Numbered) -> None:
    modules = _find_modules(component, numbered)
    if modules is None:
        builder.unsupported.append(
            f"{component}: {len(numbered)} numbered modules of a model that is not known here (known are the UNet and "
            "the text encoder of Stable Diffusion 1 and 2, all modules of them); convert it with the tool that made it"
        )
        return
    for index, module in enumerate(modules):
        where = f"{component}:{index}"
        tensors = {f"{where}:{side}": values for side, values in numbered[index].items()}
        floats = builder.floats(tensors)
        if len(floats) < len(tensors):
            continue
        with builder.reading(where):
            if len(floats) < 2:
                raise TensorError("must have up and down, and has one of them")
            delta = two_factors(floats[f"{where}:down"], floats[f"{where}:up"], 1.0)
            builder.put_delta(f"{component}.{module}", delta)


def _find_modules(component: str, numbered: _Numbered) -> Sequence[str] | None:
    """The modules that the numbers mean; None: those of a model that is not known here."""
    count = len(numbered)
    if sorted(numbered) != list(range(count)):
        return None
    if component == "text_encoder":
        layers, rest = divmod(count, len(_TEXT_MODULES))
        is_known = rest == 0 and layers in _TEXT_LAYERS
        return _text_modules(layers) if is_known else None
    if component == "unet":
        modules = _unet_modules()
        return modules if count == len(modules) and _widths_fit(numbered) else None
    return None


def _text_modules(layers: int) -> list[str]:
    modules: list[str] = []
    for layer in range(layers):
        modules += [f"text_model.encoder.layers.{layer}.self_attn.{name}" for name in _TEXT_MODULES]
    return modules


def _unet_modules() -> list[str]:
    modules: list[str] = []
    for part, attentions in _UNET_PARTS:
        for index in range(attentions):
            modules += [f"{part}.attentions.{index}.transformer_blocks.0.{name}" for name in _UNET_MODULES]
    return modules


def _widths_fit(numbered: Mapping[int, Mapping[str, Array]]) -> bool:
    """Whether the order of the UNet's modules is the one known here, which their widths tell: each block's modules have
    the block's width, the second attention has the text's width as inputs, and the gated feed-forward has eight times
    the block's width as outputs."""
    sizes: list[tuple[int, int]] = []
    for index in range(len(numbered)):
        pair = numbered[index]
        if len(pair) < 2 or any(values.ndim < 2 for values in pair.values()):
            return True  # not the widths are at fault: the reader names this pair
        sizes.append((pair["down"].shape[1], len(pair["up"])))
    first = sizes[0][0]
    text = sizes[_UNET_MODULES.index("attn2.to_k")][0]
    wanted: list[tuple[int, int]] = []
    for part, attentions in _UNET_PARTS:
        wanted += _block_sizes(first * _WIDTHS.get(part, _WIDEST), text) * attentions
    return sizes == wanted


def _block_sizes(width: int, text: int) -> list[tuple[int, int]]:
    """Inputs and outputs of a transformer block's modules, in the order of `_UNET_MODULES`."""
    square = (width, width)
    first_attention = [square, square, square, square]
    feed_forward = [(width, 8 * width)]
    second_attention = [square, (text, width), (text, width), square]
    return first_attention + feed_forward + second_attention
