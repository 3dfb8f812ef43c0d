"""GGUF LoRA files, as llama.cpp's `convert_lora_to_gguf.py` writes them: which module and which factor each tensor's
name means, and which scale the file means.

The reference is llama.cpp: `src/llama-adapter.cpp`, `build_lora_mm`, `build_inp_embd`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from onnx_lora.adapters.adapter import Adapter, Delta, Origin
from onnx_lora.adapters.formats.builder import AdapterBuilder
from onnx_lora.adapters.formats.files.gguf_file import GgufFile
from onnx_lora.adapters.formats.gguf.architectures import ARCHITECTURES, HEADS, Architecture
from onnx_lora.adapters.formats.gguf.rows import InterleavedRows
from onnx_lora.adapters.problems import TensorError, abbreviate
from onnx_lora.adapters.scale import lora_scale
from onnx_lora.errors import AdapterFileError, UnsupportedAdapterError
from onnx_lora.kinds import EMBEDDING, LINEAR
from onnx_lora.points import Array

__all__ = ["read_gguf"]

# Ends of tensors' names, by the factor that each is.
_ENDS = {".lora_a": "a", ".lora_b": "b"}

_LARGEST_ALPHA = 1e30

# The table of embeddings, whose A lies transposed.
_TABLE = "token_embd."


def read_gguf(file: GgufFile, path: Path, name: str) -> Adapter:
    """One alpha counts for all modules: the scale is alpha / r, and 1 where there is no alpha or it is 0.

    `lora_a` `[r, in]`, of the table of embeddings `[rows of the table, r]`; `lora_b` `[out, r]`, in some architectures
    with the rows of q and k in llama.cpp's order.

    Raises AdapterFileError: no adapter. UnsupportedAdapterError: an architecture or a tensor that is refused.
    """
    reader = _Reader(_architecture(file, path), _alpha(file, path), file.fields)
    reader.take(file.tensors)
    base = file.fields.get("general.base_model.0.name")
    base_model = base if isinstance(base, str) else ""
    return reader.builder.adapter(name, Origin(str(path), file.sha256, "gguf", "", base_model))


def _architecture(file: GgufFile, path: Path) -> Architecture:
    kind = file.fields.get("general.type")
    method = file.fields.get("adapter.type")
    if kind != "adapter" or method != "lora":
        raise AdapterFileError(
            "must be a LoRA adapter (general.type adapter, adapter.type lora), and is "
            f"{abbreviate(kind)}, {abbreviate(method)}",
            path=path,
        )
    if file.fields.get("adapter.alora.invocation_tokens"):
        raise UnsupportedAdapterError("aLoRA, which acts only behind certain tokens, is not applied", path=path)
    name = file.fields.get("general.architecture")
    if not isinstance(name, str) or name not in ARCHITECTURES:
        raise UnsupportedAdapterError(
            f"the names of architecture {abbreviate(name)} are not known here; known are {', '.join(ARCHITECTURES)}; "
            "convert the PEFT adapter instead",
            path=path,
        )
    return ARCHITECTURES[name]


def _alpha(file: GgufFile, path: Path) -> float:
    alpha = file.fields.get("adapter.lora.alpha", 0.0)
    is_number = isinstance(alpha, (int, float)) and not isinstance(alpha, bool)
    if not is_number or not abs(alpha) < _LARGEST_ALPHA:
        raise AdapterFileError(f"adapter.lora.alpha must be a number, and is {abbreviate(alpha)}", path=path)
    return float(alpha)


@dataclass
class _Reader:
    """`alpha`: 0 where there is none. `fields`: the file's own."""

    architecture: Architecture
    alpha: float
    fields: Mapping[str, object]
    builder: AdapterBuilder = field(default_factory=AdapterBuilder)

    def take(self, tensors: Mapping[str, Array]) -> None:
        pairs: dict[str, dict[str, Array]] = {}
        for key, values in self.builder.floats(tensors).items():
            tensor, dot, end = key.rpartition(".")
            side = _ENDS.get(dot + end)
            if side is None:
                self.builder.unsupported.append(
                    f"{key}: is a whole weight, which llama.cpp itself ignores in an adapter; convert the PEFT adapter"
                )
            else:
                pairs.setdefault(tensor, {})[side] = values
        for tensor, pair in pairs.items():
            with self.builder.reading(tensor):
                self.take_pair(tensor, pair)

    def take_pair(self, tensor: str, pair: Mapping[str, Array]) -> None:
        """Put in one pair of factors. Raises TensorError: one factor is alone, or the two do not fit each other."""
        module = self.architecture.to_module(tensor)
        if module is None:
            self.builder.unsupported.append(f"{tensor}: has no counterpart known here in Hugging Face's model")
            return
        delta = self.delta(tensor, pair)
        heads = self.architecture.heads_of(tensor)
        if heads is None:
            self.builder.put_delta(module, delta)
            return
        rows = InterleavedRows(delta, heads)
        count = self.fields.get(HEADS[heads].format(self.fields["general.architecture"]))
        known = rows.with_heads(count) if isinstance(count, int) else None
        if known is None:
            self.builder.put_change(module, rows, rows.tensors())
        else:
            self.builder.put_delta(module, known)

    def delta(self, tensor: str, pair: Mapping[str, Array]) -> Delta:
        """The pair as a delta, its rows as they lie in the file. Raises TensorError: as `take_pair`."""
        if len(pair) < 2:
            raise TensorError(f"has lora_{next(iter(pair))} alone; get the whole file")
        is_table = tensor.startswith(_TABLE)
        a = pair["a"].T if is_table else pair["a"]
        b = pair["b"]
        are_matrices = a.ndim == 2 and b.ndim == 2 and a.size > 0 and b.size > 0
        if not are_matrices or len(a) != b.shape[1]:
            raise TensorError(f"lora_a and lora_b must be of one rank, and have shapes {pair['a'].shape} and {b.shape}")
        scale = lora_scale(self.alpha, len(a)) if self.alpha else 1.0
        return Delta(a, b, scale, EMBEDDING if is_table else LINEAR)
