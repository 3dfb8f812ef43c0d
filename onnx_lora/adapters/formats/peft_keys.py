"""The names of tensors in PEFT's weight files, in one table: what each means, or why it is refused."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

__all__ = ["Key", "adapter_names", "parse_key"]

# What PEFT and torch.compile put around a model; PEFT within PEFT does it twice.
_PREFIX = re.compile(r"^(?:base_model\.model\.|_orig_mod\.)+")

# Of an embedding the factors are parameters, and have no `.weight`.
_FACTOR = re.compile(
    r"^(?P<module>.+)\.lora_(?:(?P<side>[AB])(?:\.(?P<adapter>[^.]+))?\.weight"
    r"|embedding_(?P<table>[AB])(?:\.(?P<named>[^.]+))?)$"
)

# DoRA's m; until PEFT 0.11 a parameter, a module with a `.weight` since.
_MAGNITUDE = re.compile(r"^(?P<module>.+)\.lora_magnitude_vector(?:\.(?!weight$)(?P<adapter>[^.]+))?(?:\.weight)?$")

# What a key says of itself; the first match counts.
_REFUSED = (
    (re.compile(r"\.lora_[AB](\.[^.]+)?\.bias$"), "a bias on LoRA (lora_bias) is not applied"),
    (re.compile(r"\.lora_E(\.|$)|\.ranknum(\.|$)|\.lora_[AB]$"), "AdaLoRA's: convert it to LoRA with PEFT"),
    (re.compile(r"\.lora_diag(\.|$)"), "KaSA's diagonal is not applied"),
    (re.compile(r"\.(token_adapter|trainable_tokens_\w+)(\.|$)"), "single trained tokens are not applied"),
    (re.compile(r"\.lora_[^.]*(\.|$)"), "a tensor of LoRA that is not known here; upgrade onnx-lora"),
    (re.compile(r"\.(hada_|lokr_|oft_|boft_|ia3_l|vera_|hra_)"), "a tensor of another method than LoRA"),
)


@dataclass(frozen=True)
class Key:
    """What a tensor is. `name`: the module of a factor, the parameter of a whole weight, or the reason."""

    kind: Literal["A", "B", "magnitude", "parameter", "refused", "base copy"]
    name: str
    adapter: str = ""  # the adapter's name, where the key holds it
    saved: bool = False  # from a wrapper of modules_to_save
    base_layer: bool = False  # the weight below a LoRA layer
    embedding: bool = False


def adapter_names(keys: Iterable[str]) -> frozenset[str]:
    """The adapter names left in the keys of factors."""
    found = (_FACTOR.match(key) for key in keys)
    names = (match["adapter"] or match["named"] for match in found if match)
    return frozenset(name for name in names if name)


def parse_key(key: str, adapters: frozenset[str]) -> Key:
    """What the tensor `key` is; `adapters` are names that wrappers of modules_to_save may hold too."""
    name = _PREFIX.sub("", key)
    if ".original_module." in name:
        return Key("base copy", name)
    module, wrapped, rest = name.partition(".modules_to_save.")
    if wrapped:
        first, _, below = rest.partition(".")
        name = f"{module}.{below}" if below and first in adapters | {"default"} else f"{module}.{rest}"
    factor = _FACTOR.match(name)
    if factor:
        side: Literal["A", "B"] = "A" if "A" in (factor["side"], factor["table"]) else "B"
        adapter = factor["adapter"] or factor["named"] or ""
        return Key(side, factor["module"], adapter, bool(wrapped), embedding=factor["table"] is not None)
    magnitude = _MAGNITUDE.match(name)
    if magnitude:
        return Key("magnitude", magnitude["module"], magnitude["adapter"] or "", bool(wrapped))
    for pattern, reason in _REFUSED:
        if pattern.search(f".{name}"):
            return Key("refused", reason)
    below_lora = ".base_layer." in name
    return Key("parameter", name.replace(".base_layer.", "."), "", bool(wrapped), below_lora)
