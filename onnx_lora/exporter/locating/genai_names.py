"""ONNX Runtime GenAI's names for the modules of a checkpoint, for graphs that come without the checkpoint: one
table, used where no weights can be compared."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from onnx_lora.errors import ModelError
from onnx_lora.exporter.locating.located import Located, Occurrence, UnplacedNode, label_of
from onnx_lora.json_file import read_json

__all__ = ["GenaiNames", "rename"]

# Architectures whose modules the builder only renames and packs. Of others (Phi-3 and its like keep q, k and v,
# gate and up in one module, which the builder cuts up) only a checkpoint's weights tell.
_PLAIN = frozenset(
    ["gemma", "gemma2", "gemma3_text", "granite", "llama", "mistral", "olmo", "qwen2", "qwen3", "smollm3"]
)

# The builder's name of a part of a module's path -> transformers'.
_PARTS = {"attn": "self_attn"}

# Packed side by side, in this order.
_PACKED = {"qkv_proj": ("q_proj", "k_proj", "v_proj")}


@dataclass(frozen=True, slots=True)
class GenaiNames:
    """What a folder's `genai_config.json` says of its graph: the architecture, and outputs by projection."""

    architecture: str
    widths: dict[str, int]

    @staticmethod
    def of_folder(folder: Path) -> GenaiNames | None:
        """None: the folder is not GenAI's. Raises ModelError: its config cannot be used."""
        file = folder / "genai_config.json"
        if not file.is_file():
            return None
        config = read_json(file, ModelError)
        try:
            model = config["model"]
            decoder = model["decoder"]
            size = int(decoder["head_size"])
            heads, key_heads = int(decoder["num_attention_heads"]), int(decoder["num_key_value_heads"])
            widths = {"q_proj": heads * size, "k_proj": key_heads * size, "v_proj": key_heads * size}
            return GenaiNames(str(model["type"]), widths)
        except (ValueError, OverflowError, KeyError, TypeError, RecursionError) as error:
            raise ModelError(f"must be ONNX Runtime GenAI's config, and is not: {error!r}", path=file) from error

    def modules(self, one: Occurrence) -> list[Occurrence] | str:
        """What a product computes under transformers' names, packed modules one by one; or why that cannot be said."""
        if self.architecture not in _PLAIN:
            return (
                f"of a {self.architecture} model the names in the graph do not say which module this is; "
                "give the checkpoint too (`checkpoint=...`)"
            )
        *parents, name = (_PARTS.get(part, part) for part in one.module.split("."))
        pieces = _PACKED.get(name, (name,))
        sizes = [self.widths[piece] for piece in pieces] if len(pieces) > 1 else [one.outputs]
        if sum(sizes) != one.outputs:
            return f"by genai_config.json it must have {' + '.join(map(str, sizes))} outputs, and has {one.outputs}"
        modules: list[Occurrence] = []
        start = 0
        for piece, size in zip(pieces, sizes, strict=True):
            module = ".".join([*parents, piece])
            modules.append(replace(one, module=module, outputs=size, size=size, start=start))
            start += size
        return modules


def rename(located: Located, names: GenaiNames) -> Located:
    """The same under transformers' names; what has none for certain gets no place."""
    occurrences: list[Occurrence] = []
    unplaced = list(located.unplaced)
    for one in located.occurrences:
        modules = names.modules(one)
        if isinstance(modules, str):
            unplaced.append(UnplacedNode(label_of(one.node), modules, (one.module,)))
        else:
            occurrences.extend(modules)
    return Located(tuple(occurrences), tuple(unplaced))
