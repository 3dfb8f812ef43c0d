"""GGUF LoRA files, as llama.cpp's `convert_lora_to_gguf.py` writes them: which tensor of which module each name means,
and what scale. The reference is llama.cpp: `src/llama-adapter.cpp`, `build_lora_mm`, `build_inp_embd`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from onnx_lora.adapters.adapter import Adapter, Delta, MatrixDelta
from onnx_lora.adapters.formats.collected import Collected
from onnx_lora.adapters.formats.files.gguf import GgufFile
from onnx_lora.adapters.formats.files.reading import shown
from onnx_lora.adapters.formats.gguf.names import ARCHITECTURES, Architecture
from onnx_lora.errors import AdapterFileError, UnsupportedAdapterError
from onnx_lora.kinds import EMBEDDING, LINEAR, Kind
from onnx_lora.points import Array

__all__ = ["HEADS", "InterleavedRows", "read_gguf", "rows_interleaved", "rows_of_halves"]

# Where a GGUF model says how many heads it has, by the field of Hugging Face's config; ours put it in adapters too.
HEADS = {
    "num_attention_heads": "{}.attention.head_count",
    "num_key_value_heads": "{}.attention.head_count_kv",
}
_ENDS = {".lora_a": "a", ".lora_b": "b"}


@dataclass(frozen=True)
class InterleavedRows:
    """A delta whose B has its rows in llama.cpp's order, as long as nobody knows the number of heads.

    `heads`: the field of Hugging Face's config that says it. `names.py` looks into the package's.
    """

    interleaved: Delta
    heads: str

    @property
    def method(self) -> str:
        return "LoRA"

    def explain_misfit(self, shape: tuple[int, ...], kind: Kind) -> str | None:
        del shape, kind
        return (
            "llama.cpp orders the outputs of this module by heads, and neither the file nor the package's config.json "
            f"says how many there are ({self.heads}); put the model's config.json into the package's folder"
        )

    def apply_to(self, weight: Array) -> Array:
        raise NotImplementedError

    def as_factors(self, weight: Array) -> MatrixDelta | None:
        del weight
        return None

    def output_scale(self) -> Array | None:
        return None

    def with_heads(self, count: int) -> Delta | None:
        """In PyTorch's order; None: the outputs are no such number of heads."""
        b = self.interleaved.b
        if count < 1 or len(b) % (2 * count):
            return None
        return Delta(self.interleaved.a, rows_of_halves(b, count), self.interleaved.scale)


def rows_of_halves(b: Array, heads: int) -> Array:
    """`[out, r]` in PyTorch's order: each head's first half, then its second. Undoes `rows_interleaved`."""
    return b.reshape(heads, len(b) // heads // 2, 2, -1).swapaxes(1, 2).reshape(b.shape)


def rows_interleaved(b: Array, heads: int) -> Array:
    """`[out, r]` in llama.cpp's order: `LlamaModel.permute` of its converter."""
    return b.reshape(heads, 2, len(b) // heads // 2, -1).swapaxes(1, 2).reshape(b.shape)


def read_gguf(file: GgufFile, path: Path, name: str) -> Adapter:
    """Raises AdapterFileError: no adapter. UnsupportedAdapterError: an architecture or a tensor that is refused."""
    architecture = _architecture(file, path)
    alpha = file.fields.get("adapter.lora.alpha", 0.0)
    if not isinstance(alpha, (int, float)) or isinstance(alpha, bool) or not abs(alpha) < 1e30:
        raise AdapterFileError(f"adapter.lora.alpha must be a number, and is {shown(alpha)}", path=path)
    collected = Collected()
    pairs: dict[str, dict[str, Array]] = {}
    for key, values in collected.floats(file.tensors).items():
        end = next((end for end in _ENDS if key.endswith(end)), None)
        if end is None:
            collected.unsupported.append(
                f"{key}: is a whole weight, which llama.cpp itself ignores in an adapter; convert the PEFT adapter"
            )
        else:
            pairs.setdefault(key.removesuffix(end), {})[_ENDS[end]] = values
    for tensor, pair in pairs.items():
        _take(collected, tensor, pair, architecture, float(alpha), file.fields)
    base = file.fields.get("general.base_model.0.name")
    own = base if isinstance(base, str) else ""
    return collected.adapter(path, name, format="gguf", base_model=own, sha256=file.sha256)


def _architecture(file: GgufFile, path: Path) -> Architecture:
    kind, method = file.fields.get("general.type"), file.fields.get("adapter.type")
    if kind != "adapter" or method != "lora":
        raise AdapterFileError(
            f"must be a LoRA adapter (general.type adapter, adapter.type lora), and is {shown(kind)}, {shown(method)}",
            path=path,
        )
    if file.fields.get("adapter.alora.invocation_tokens"):
        raise UnsupportedAdapterError("aLoRA, which acts only behind certain tokens, is not applied", path=path)
    name = file.fields.get("general.architecture")
    if not isinstance(name, str) or name not in ARCHITECTURES:
        raise UnsupportedAdapterError(
            f"the names of architecture {shown(name)} are not known here; known are {', '.join(ARCHITECTURES)}; "
            "convert the PEFT adapter instead",
            path=path,
        )
    return ARCHITECTURES[name]


def _take(
    collected: Collected,
    tensor: str,
    pair: Mapping[str, Array],
    architecture: Architecture,
    alpha: float,
    fields: Mapping[str, object],
) -> None:
    module = architecture.to_module(tensor)
    if module is None:
        collected.unsupported.append(f"{tensor}: has no counterpart known here in Hugging Face's model")
        return
    if len(pair) < 2:
        collected.problems.append(f"{tensor}: has lora_{next(iter(pair))} alone; get the whole file")
        return
    embedding = tensor.startswith("token_embd.")
    a, b = pair["a"].T if embedding else pair["a"], pair["b"]
    if a.ndim != 2 or b.ndim != 2 or len(a) != b.shape[1] or not a.size or not b.size:
        collected.problems.append(
            f"{tensor}: lora_a and lora_b must be of one rank, and have shapes {pair['a'].shape} and {b.shape}"
        )
        return
    # llama.cpp: no alpha, or 0, means a scale of 1.
    delta = Delta(a, b, alpha / len(a) if alpha else 1.0, EMBEDDING if embedding else LINEAR)
    heads = architecture.heads_of(tensor)
    if heads is None:
        collected.put_delta(module, delta)
        return
    rows = InterleavedRows(delta, heads)
    count = fields.get(HEADS[heads].format(fields["general.architecture"]))
    known = rows.with_heads(count) if isinstance(count, int) else None
    if known is not None:
        collected.put_delta(module, known)
    else:
        collected.put_change(module, rows, {f"lora_{side}": values for side, values in pair.items()})
