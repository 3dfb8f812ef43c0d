"""Names of modules in kohya's files: flat, with `_` for `.`, behind a prefix for the part of the pipeline. Only a
package can tell which of its modules a flat name means."""

from __future__ import annotations

from onnx_lora.adapters.formats.diffusion.sgm import from_sgm, to_sgm

__all__ = ["PREFIXES", "flat_name", "module_of"]

# What stands before a module's name, by the part of a pipeline; LyCORIS' own has no parts.
PREFIXES = {
    "lora_unet_": "unet",
    "lora_te1_": "text_encoder",
    "lora_te2_": "text_encoder_2",
    "lora_te3_": "text_encoder_3",
    "lora_te_": "text_encoder",
    "lora_transformer_": "transformer",
    "lycoris_": "",
}


def module_of(flat: str) -> str | None:
    """`lora_unet_input_blocks_4_1_proj_in` as `unet.down_blocks.1.attentions.0.proj_in`. What no table knows stays
    flat behind its part. None: no prefix of kohya's."""
    for prefix, component in PREFIXES.items():
        rest = flat.removeprefix(prefix)
        if not flat.startswith(prefix) or not rest:
            continue
        known = from_sgm(rest) if component == "unet" else None
        return f"{component}.{known or rest}" if component else rest
    return None


def flat_name(module: str, *, is_xl: bool) -> str:
    """`unet.conv_in` as `lora_unet_conv_in`. `is_xl`: of SDXL, whose UNet gets Stability's names, and whose text
    encoders are counted."""
    part, _, rest = module.partition(".")
    unused = "lora_te_" if is_xl else "lora_te1_"
    prefixes = {component: prefix for prefix, component in PREFIXES.items() if prefix != unused}
    if part not in prefixes or not rest:
        return f"lycoris_{module.replace('.', '_')}"
    theirs = to_sgm(rest) if is_xl and part == "unet" else None
    return f"{prefixes[part]}{theirs or rest.replace('.', '_')}"
