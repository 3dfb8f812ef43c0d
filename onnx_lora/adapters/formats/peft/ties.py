"""Modules that PEFT tied to one another: the file holds their tensors twice, and the config names one of them.

The reference is PEFT 0.21: `trainable_token_indices` and `ensure_weight_tying` of `LoraConfig`,
`BaseTuner._add_targets_to_tie`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from hashlib import sha256

import numpy as np

from onnx_lora.adapters.adapter import Replacement
from onnx_lora.adapters.formats.peft.rules import PeftConfig
from onnx_lora.adapters.methods.tokens import TOKENS
from onnx_lora.points import Array

__all__ = ["Ties"]


@dataclass(frozen=True)
class Ties:
    """The tensors of a file's modules, and the config that says whether PEFT looked for ties."""

    modules: Mapping[str, Mapping[str, Array]]
    config: PeftConfig

    @property
    def is_ensured(self) -> bool:
        """Whether the config says `ensure_weight_tying`."""
        return bool(self.config.fields.get("ensure_weight_tying"))

    def twins(self, module: str) -> list[str]:
        """The embeddings to which `module` is tied. Its tensors show it: PEFT gave it their trained tokens or, with
        `ensure_weight_tying`, their factors, A as B and B as A. Raises ExpressionError: too much work."""
        own = self.modules[module]
        if TOKENS in own:
            same_tokens = self._with_tokens.get(_identity(own[TOKENS]), [])
            return [name for name in same_tokens if name != module]
        if not self.is_ensured or "lora_A" not in own or "lora_B" not in own:
            return []
        factors = _identity(own["lora_A"]), _identity(own["lora_B"])
        return self._with_factors.get(factors, [])

    def problems(self) -> list[str]:
        """Embeddings that are tied to a module by the config, and for which the file holds no such module. Raises
        ExpressionError: too much work."""
        if not self.is_ensured:
            return []
        tied: set[str] = set()
        for module in self.modules:
            tied.update(self.twins(module))
        problems: list[str] = []
        for module, tensors in self.modules.items():
            if "lora_embedding_A" in tensors and module not in tied:
                problems.append(
                    f"{module}: the config says ensure_weight_tying, and the file holds no factors of a module that is "
                    "tied to it; save it again with a current PEFT, or train without ensure_weight_tying"
                )
        return problems

    def mark_copies(self, replacements: Mapping[str, Replacement]) -> dict[str, Replacement]:
        """The whole weights, with storage of their own (`in_place=False`) for those that are copies of a saved
        module's: a saved module has storage of its own, and so have the modules that are tied to it."""
        found = dict(replacements)
        if not self.is_ensured:
            return found
        own_storage = {_identity(each.value) for each in found.values() if not each.in_place}
        for name, replacement in found.items():
            if replacement.in_place and _identity(replacement.value) in own_storage:
                found[name] = replace(replacement, in_place=False)
        return found

    @cached_property
    def _with_tokens(self) -> Mapping[str, list[str]]:
        """Modules with trained tokens that the config chooses, by the identity of the tokens."""
        found: dict[str, list[str]] = {}
        for name, tensors in self.modules.items():
            if TOKENS in tensors and self.config.targets.rejects(name) is None:
                found.setdefault(_identity(tensors[TOKENS]), []).append(name)
        return found

    @cached_property
    def _with_factors(self) -> Mapping[tuple[str, str], list[str]]:
        """Embeddings with factors, by the identity of what those are in a linear module that is tied to them."""
        found: dict[tuple[str, str], list[str]] = {}
        for name, tensors in self.modules.items():
            if "lora_embedding_A" not in tensors or "lora_embedding_B" not in tensors:
                continue
            linear_a = tensors["lora_embedding_B"].T
            linear_b = tensors["lora_embedding_A"].T
            found.setdefault((_identity(linear_a), _identity(linear_b)), []).append(name)
        return found


def _identity(array: Array) -> str:
    """A text that is the same for arrays of the same shape and numbers, whatever their types."""
    exact = np.ascontiguousarray(array, dtype=np.float64) + 0.0  # makes -0 the 0 that it equals
    return f"{array.shape} {sha256(exact.data).hexdigest()}"
