"""The names of tensors in PEFT's weight files: what each means for a method, or why it is refused."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

__all__ = ["Key", "Names"]

# What PEFT and torch.compile put around a model; PEFT within PEFT does it twice.
_PREFIX = re.compile(r"^(?:base_model\.model\.|_orig_mod\.)+")

# Modules of which a whole copy is trained: modules_to_save, and LN tuning's.
_COPIES = (".modules_to_save.", ".ln_tuning_layers.")

_LAYERS = re.compile(r"(?:\.base_layer|\.token_adapter)++(?=\.)")

# The beginnings of other methods' names of tensors. A name with none of them counts as a whole parameter's, and `bind`
# refuses that where the base has none.
_OTHERS = (
    "hada_",
    "lokr_",
    "oft_",
    "boft_",
    "ia3_l",
    "p?vera_",
    "hra_",
    "hira_",
    "shira_",
    "fourierft_",
    "c3a_",
    "vblora_",
    "randlora_",
    "miss_",
    "delora_",
    "gralora_",
    "road_",
    "waveft_",
)

# Why a key that is none of the method's is refused; the first match counts. Others are whole parameters.
_REFUSED = (
    (re.compile(r"\.lora_E(\.|$)|\.ranknum(\.|$)|\.lora_[AB]$"), "AdaLoRA's, and the config is another method's"),
    (re.compile(r"\.lora_diag(\.|$)"), "KaSA's diagonal is not applied"),
    (re.compile(r"\.oft_r(\.|$)"), "OFT's of PEFT before 0.14, which no later PEFT reads; train it again"),
    (re.compile(r"\.lora_[^.]*(\.|$)"), "a tensor of LoRA that is not known here; upgrade onnx-lora"),
    (re.compile(r"\.(token_adapter|trainable_tokens_\w+)(\.|$)"), "single trained tokens, which this method has not"),
    (re.compile(rf"\.({'|'.join(_OTHERS)})"), "a tensor of another method than the config's"),
)


@dataclass(frozen=True)
class Key:
    """What a tensor is, by its key.

    kind          name                       what it is
    "module"      the module                 a tensor of the method's
    "shared"      the tensor                 a tensor of the method's, for all modules
    "parameter"   the parameter              a whole weight or bias
    "base copy"   the key                    the base's own weight beside a module of which a copy was trained
    "refused"     the reason                 nothing that is applied
    """

    kind: Literal["module", "shared", "parameter", "refused", "base copy"]
    name: str
    tensor: str = ""  # by PEFT's name, "lora_A" or "lora_B.bias"
    adapter: str = ""  # the adapter's name, where the key holds it
    saved: bool = False  # from a module of which a copy was trained
    base_layer: bool = False  # below a layer of the method


@dataclass(frozen=True)
class Names:
    """The tensors of one method: of each module, with what may stand behind an adapter's name ("weight", or nothing),
    and those of the whole file."""

    tensors: Mapping[str, Collection[str]]
    shared: Collection[str] = ()

    @cached_property
    def _of_modules(self) -> re.Pattern[str]:
        names = "|".join(re.escape(name) for name in sorted(self.tensors, key=len, reverse=True))
        return re.compile(rf"^(?P<module>.+)\.(?P<tensor>{names or '(?!)'})(?P<rest>(?:\.[^.]+){{0,2}})$")

    @cached_property
    def _of_files(self) -> re.Pattern[str]:
        names = "|".join(map(re.escape, self.shared))
        return re.compile(rf"^(?:base_model\.)*(?P<tensor>{names or '(?!)'})(?:\.(?P<adapter>[^.]+))?$")

    def adapters(self, keys: Iterable[str]) -> frozenset[str]:
        """The adapter names left in the keys of the method's own tensors."""
        names: set[str] = set()
        for key in keys:
            own = self._own(_PREFIX.sub("", key), saved=False)
            if own is not None and own.adapter:
                names.add(own.adapter)
        return frozenset(names)

    def parse(self, key: str, adapters: frozenset[str]) -> Key:
        """What the tensor `key` is; `adapters` are names that copies of whole modules may hold too."""
        name = _PREFIX.sub("", key)
        if ".original_module." in name:
            return Key("base copy", name)
        saved = False
        for copies in _COPIES:
            module, wrapped, rest = name.partition(copies)
            if wrapped:
                first, _, below = rest.partition(".")
                is_adapter = below != "" and first in adapters | {"default"}
                name = f"{module}.{below if is_adapter else rest}"
                saved = True
        own = self._own(name, saved=saved)
        if own is not None:
            return own
        for pattern, reason in _REFUSED:
            if pattern.search(f".{name}"):
                return Key("refused", reason)
        return Key("parameter", _without_layers(name), saved=saved, base_layer=".base_layer." in name)

    def _own(self, name: str, *, saved: bool) -> Key | None:
        """The key of one of the method's tensors, or None."""
        shared = self._of_files.match(name)
        if shared:
            return Key("shared", shared["tensor"], shared["tensor"], shared["adapter"] or "")
        found = self._of_modules.match(name)
        if not found:
            return None
        tensor, endings = found["tensor"], self.tensors[found["tensor"]]
        pieces = found["rest"].split(".")[1:]
        ending = ""
        if pieces and pieces[-1] in endings:
            ending = pieces.pop()
        if ending not in endings or len(pieces) > 1:
            return None
        full = tensor if ending in ("", "weight") else f"{tensor}.{ending}"
        module = _without_layers(found["module"])
        return Key("module", module, full, "".join(pieces), saved, base_layer=module != found["module"])


def _without_layers(name: str) -> str:
    """Without PEFT's layers on the way. Those at the end of a module's name stay: pairs for several parameters of one
    module lie in each other's `base_layer`."""
    return _LAYERS.sub("", name)
