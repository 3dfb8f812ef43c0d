"""The names that Stability's own code gives to the UNet of Stable Diffusion, as kohya's SDXL files have them, and
diffusers' names for the same modules: one table, read in both directions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache

__all__ = ["from_sgm", "to_sgm"]

# Of a block, in every Stable Diffusion: `layers_per_block` of diffusers' configs.
_LAYERS = 2
_BLOCKS = 4

_RESNET = {
    "in_layers_0": "norm1",
    "in_layers_2": "conv1",
    "emb_layers_1": "time_emb_proj",
    "out_layers_0": "norm2",
    "out_layers_3": "conv2",
    "skip_connection": "conv_shortcut",
}


def _single() -> Iterator[tuple[str, str]]:
    """Whole modules."""
    yield "input_blocks_0_0", "conv_in"
    yield "out_0", "conv_norm_out"
    yield "out_2", "conv_out"
    for theirs, ours in (("time_embed", "time_embedding"), ("label_emb_0", "add_embedding")):
        yield f"{theirs}_0", f"{ours}.linear_1"
        yield f"{theirs}_2", f"{ours}.linear_2"
    for block in range(_BLOCKS):
        last = (_LAYERS + 1) * (block + 1)
        yield f"input_blocks_{last}_0_op", f"down_blocks.{block}.downsamplers.0.conv"
        # Behind an attention, and in a block without one. The first is what SDXL has.
        yield f"output_blocks_{last - 1}_2_conv", f"up_blocks.{block}.upsamplers.0.conv"
        yield f"output_blocks_{last - 1}_1_conv", f"up_blocks.{block}.upsamplers.0.conv"


def _blocks() -> Iterator[tuple[str, str, str]]:
    """Theirs, diffusers', and of what kind: whose names go on behind."""
    for block in range(_BLOCKS):
        for layer in range(_LAYERS + 1):
            place = (_LAYERS + 1) * block + layer
            if layer < _LAYERS:
                yield f"input_blocks_{place + 1}_0", f"down_blocks.{block}.resnets.{layer}", "resnet"
                yield f"input_blocks_{place + 1}_1", f"down_blocks.{block}.attentions.{layer}", "attention"
            yield f"output_blocks_{place}_0", f"up_blocks.{block}.resnets.{layer}", "resnet"
            yield f"output_blocks_{place}_1", f"up_blocks.{block}.attentions.{layer}", "attention"
    yield "middle_block_0", "mid_block.resnets.0", "resnet"
    yield "middle_block_1", "mid_block.attentions.0", "attention"
    yield "middle_block_2", "mid_block.resnets.1", "resnet"


@cache
def _modules() -> Mapping[str, str]:
    """Whole modules, and those of ResNets: theirs to diffusers'."""
    modules = dict(_single())
    for theirs, ours, kind in _blocks():
        if kind == "resnet":
            modules |= {f"{theirs}_{part}": f"{ours}.{own}" for part, own in _RESNET.items()}
    return modules


@cache
def _attentions() -> Mapping[str, str]:
    """Whose modules have the same names on both sides."""
    return {theirs: ours for theirs, ours, kind in _blocks() if kind == "attention"}


@cache
def _backwards() -> Mapping[str, str]:
    """Diffusers' whole modules to theirs; of two names for one module the first."""
    turned: dict[str, str] = {}
    for theirs, ours in _modules().items():
        turned.setdefault(ours, theirs)
    return turned


def from_sgm(flat: str) -> str | None:
    """`input_blocks_4_1_proj_in` as `down_blocks.1.attentions.0.proj_in`, the end still flat; None: no such name."""
    if flat in _modules():
        return _modules()[flat]
    pieces = flat.split("_")
    count = 3 if flat.startswith("middle_block_") else 4  # as `middle_block_1`, `input_blocks_4_1`
    block = "_".join(pieces[:count])
    rest = "_".join(pieces[count:])
    ours = _attentions().get(block)
    return f"{ours}.{rest}" if ours and rest else None


def to_sgm(module: str) -> str | None:
    """Diffusers' dotted name of a UNet's module as the flat one; None: no such module."""
    if module in _backwards():
        return _backwards()[module]
    for theirs, ours in _attentions().items():
        if module.startswith(f"{ours}."):
            rest = module.removeprefix(f"{ours}.")
            return f"{theirs}_{rest.replace('.', '_')}"
    return None
