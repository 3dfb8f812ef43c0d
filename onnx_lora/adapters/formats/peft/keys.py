"""The names of tensors in PEFT's weight files: what each means for a method, or why it is refused."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Literal

from onnx_lora.adapters.methods.method import MERGE
from onnx_lora.adapters.wrappers import without_wrappers

if TYPE_CHECKING:
    from onnx_lora.adapters.methods.method import Method
    from onnx_lora.adapters.plugins import Plugins

__all__ = ["Key", "Names"]

# What PEFT puts around a model, and DDP around PEFT; PEFT within PEFT does it twice.
_PREFIX = re.compile(r"^(?:module\.)+(?=base_model\.)|^(?:base_model\.model\.)+")

# What stands before a trained copy of a whole module: of modules_to_save, and of LN tuning.
_COPIES = (".modules_to_save.", ".ln_tuning_layers.")

# The layers that PEFT puts between a module's name and its tensors.
_LAYERS = re.compile(r"(?:\.base_layer|\.token_adapter)++(?=\.)")

_ONE_TRAINING = "get the config and the weights of one training"

# Why a key that is none of the method's is refused; the first match counts. What none of them matches, and what is no
# tensor of another method, is a whole parameter: `bind` refuses one that the base does not have.
_REFUSED = (
    (re.compile(r"\.lora_E(\.|$)|\.ranknum(\.|$)"), f"AdaLoRA's, and the config is another method's; {_ONE_TRAINING}"),
    (
        re.compile(r"\.lora_[AB]$"),
        "named as loralib (microsoft/LoRA) and AdaLoRA name it, without .weight, and the config, or the rest of the "
        f"file, is of neither; {_ONE_TRAINING}",
    ),
    (re.compile(r"\.lora_diag(\.|$)"), f"KaSA's diagonal is not applied; {MERGE}"),
    (re.compile(r"\.oft_r(\.|$)"), "OFT's of PEFT before 0.14, which no later PEFT reads; train it again"),
    (re.compile(r"\.lora_[^.]*(\.|$)"), "a tensor of LoRA that is not known here; upgrade onnx-lora"),
    (
        re.compile(r"\.(token_adapter|trainable_tokens_\w+)(\.|$)"),
        f"single trained tokens, which this method has not; {_ONE_TRAINING}",
    ),
    (
        re.compile(r"\.adapter\.(linear_in|linear_out|layer_norm)\."),
        "NeMo's, of a module by Megatron's name; export the adapter in Hugging Face's format with Megatron Bridge "
        "(AutoBridge.export_adapter_ckpt)",
    ),
)
_OF_ANOTHER_METHOD = f"a tensor of another method than the config's; {_ONE_TRAINING}"

# The beginnings of the tensors' names of methods that are not read.
_METHODS_NOT_READ = frozenset({"road", "waveft"})

# Methods whose names of tensors `_REFUSED` knows, with reasons of their own.
_WITH_OWN_REASON = frozenset({"LORA", "ADALORA", "TRAINABLE_TOKENS"})


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
    is_of_copy: bool = False  # of a module of which a copy was trained
    is_in_base_layer: bool = False  # below a layer of the method


@dataclass(frozen=True)
class Names:
    """The names of the tensors in files of one method. `methods`: all that there are, whose tensors are refused."""

    method: Method
    methods: Plugins[Method]

    @cached_property
    def _of_modules(self) -> re.Pattern[str]:
        longest_first = sorted(self.method.tensors, key=len, reverse=True)
        tensor = _any_of(longest_first)
        return re.compile(rf"^(?P<module>.+)\.(?P<tensor>{tensor})(?P<rest>(?:\.[^.]+){{0,2}})$")

    @cached_property
    def _of_files(self) -> re.Pattern[str]:
        tensor = _any_of(self.method.shared)
        return re.compile(rf"^(?:base_model\.)*(?P<tensor>{tensor})(?:\.(?P<adapter>[^.]+))?$")

    @cached_property
    def _of_other_methods(self) -> re.Pattern[str]:
        """The beginnings of the methods' names of tensors: `.hada_` of LoHa's. Other distributions' methods are left
        out, so that a broken one does not break the reading of other files."""
        words = set(_METHODS_NOT_READ)
        for peft_type in self.methods.own:
            if peft_type in _WITH_OWN_REASON:
                continue
            method = self.methods[peft_type]
            for name in (*method.tensors, *method.shared):
                words.add(name.partition("_")[0])
        return re.compile(rf"\.(?:{_any_of(sorted(words))})_")

    def adapters(self, keys: Iterable[str]) -> frozenset[str]:
        """The adapter names left in the keys of the method's own tensors."""
        names: set[str] = set()
        for key in keys:
            own = self._parse_own(_without_prefix(key), is_of_copy=False)
            if own is not None and own.adapter:
                names.add(own.adapter)
        return frozenset(names)

    def parse(self, key: str, adapters: frozenset[str]) -> Key:
        """What the tensor `key` is; `adapters` are names that copies of whole modules may hold too."""
        name = _without_prefix(key)
        if ".original_module." in name:
            return Key("base copy", name)
        is_of_copy = False
        adapter = ""
        for marker in _COPIES:
            module, found, rest = name.partition(marker)
            if not found:
                continue
            first, _, below = rest.partition(".")
            is_adapter = below != "" and (first == "default" or first in adapters)
            adapter = first if is_adapter else adapter
            name = f"{module}.{below if is_adapter else rest}"
            is_of_copy = True
        own = self._parse_own(name, is_of_copy=is_of_copy)
        if own is not None:
            return replace(own, adapter=own.adapter or adapter)
        reason = self._explain_refusal(f".{name}")
        if reason is not None:
            return Key("refused", reason)
        parameter = _LAYERS.sub("", name)
        is_inside = ".base_layer." in name
        return Key("parameter", parameter, adapter=adapter, is_of_copy=is_of_copy, is_in_base_layer=is_inside)

    def _parse_own(self, name: str, *, is_of_copy: bool) -> Key | None:
        """The key of one of the method's tensors; None: it is none of them."""
        shared = self._of_files.match(name)
        if shared:
            return Key("shared", shared["tensor"], shared["tensor"], shared["adapter"] or "")
        found = self._of_modules.match(name)
        if not found:
            return None
        tensor = found["tensor"]
        endings = self.method.tensors[tensor]
        pieces = found["rest"].split(".")[1:]
        ending = ""
        if pieces and pieces[-1] in endings:
            ending = pieces.pop()
        if ending not in endings or len(pieces) > 1:
            return None
        if ending not in ("", "weight"):
            tensor = f"{tensor}.{ending}"
        # Layers at the end of a module's name stay: pairs for several parameters of one module lie in each other's
        # `base_layer`.
        module = _LAYERS.sub("", found["module"])
        is_inside = module != found["module"]
        return Key("module", module, tensor, "".join(pieces), is_of_copy, is_in_base_layer=is_inside)

    def _explain_refusal(self, dotted: str) -> str | None:
        """Why a key that is none of the method's is refused; None: it is not. `dotted`: the key with a dot in front."""
        for pattern, reason in _REFUSED:
            if pattern.search(dotted):
                return reason
        return _OF_ANOTHER_METHOD if self._of_other_methods.search(dotted) else None


def _without_prefix(key: str) -> str:
    """The key without what stands around the model's own names."""
    name = without_wrappers(key)
    while _PREFIX.match(name):
        name = _PREFIX.sub("", name)
    return name


def _any_of(names: Iterable[str]) -> str:
    """A regular expression for one of the names; where there are none, one that matches nothing."""
    return "|".join(re.escape(name) for name in names) or "(?!)"
