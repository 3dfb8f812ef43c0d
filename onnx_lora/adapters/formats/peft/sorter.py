"""The tensors of a PEFT file, each put in its place or refused by name. It knows no folder and no file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from hashlib import sha256

import numpy as np

from onnx_lora.adapters.adapter import Change, Delta, MatrixDelta, Replacement
from onnx_lora.adapters.formats.peft.keys import Key
from onnx_lora.adapters.formats.peft.method import Method, Module, TensorError
from onnx_lora.adapters.formats.peft.parameters import parameter_changes
from onnx_lora.adapters.formats.peft.rules import PeftConfig
from onnx_lora.adapters.formats.peft.tokens import LORA_TOKENS, TOKENS
from onnx_lora.expressions import ExpressionError
from onnx_lora.points import Array, matches

__all__ = ["Sorter"]

# A batch norm's count of the batches that it was trained on: PEFT saves it with a head, and evaluation never reads it.
_COUNTER = "num_batches_tracked"


@dataclass
class Sorter:
    """Puts every tensor of a file in its place, and collects what has none."""

    config: PeftConfig
    method: Method
    modules: dict[str, dict[str, Array]] = field(default_factory=dict)
    shared: dict[str, Array] = field(default_factory=dict)
    whole: dict[str, tuple[Array, Key]] = field(default_factory=dict)
    deltas: dict[str, Delta | MatrixDelta] = field(default_factory=dict)
    changes: dict[str, Change] = field(default_factory=dict)
    added: dict[str, Replacement] = field(default_factory=dict)  # what modules do to parameters, by parameter
    problems: list[str] = field(default_factory=list)
    unsupported: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def take(self, tensors: Mapping[str, Array]) -> None:
        names = self.method.names.adapters(tensors)
        if len(names) > 1:
            self.problems.append(
                f"holds more than one adapter: {', '.join(sorted(names))}; save each of them in a folder of its own"
            )
        for key, values in tensors.items():
            parsed = self.method.names.parse(key, names)
            if parsed.kind == "refused":
                self.unsupported.append(f"{key}: {parsed.name}")
            elif parsed.kind == "module" and parsed.base_layer:
                self.unsupported.append(f"{key}: of torch's MultiheadAttention, of which no part is applied")
            elif parsed.kind == "base copy":
                self.notes.append(f"{key}: the base's own copy beside a saved module, which PEFT does not use")
            elif _is_counter(parsed, values):
                self.notes.append(f"{key}: counts the batches of a training, and changes no answer")
            elif values.dtype.kind != "f" and not (parsed.tensor in self.method.integers and values.dtype.kind in "iu"):
                self.problems.append(f"{key}: must be floating point, and is {values.dtype.name}")
            elif parsed.kind == "parameter":
                self._put_parameter(key, parsed, values)
            else:
                place = self.shared if parsed.kind == "shared" else self.modules.setdefault(parsed.name, {})
                if parsed.tensor in place and not _same(place[parsed.tensor], values):
                    self.problems.append(f"{key}: there are two different tensors for {parsed.tensor} of {parsed.name}")
                place[parsed.tensor] = values
        if not self.modules and not self.whole and not self.problems and not self.unsupported:
            self.problems.append("holds no tensor of an adapter")

    def _put_parameter(self, key: str, parsed: Key, values: Array) -> None:
        known = self.whole.get(parsed.name)
        if known is not None and not _same(known[0], values):
            self.problems.append(f"{key}: there are two different tensors for {parsed.name}")
        self.whole[parsed.name] = values, parsed

    def judge(self) -> None:
        """Check the modules against the config, and make of their tensors what they are."""
        try:
            self._judge()
        except ExpressionError as error:
            self.problems.append(f"the config: {error}")

    def _judge(self) -> None:
        missing = [name for name in self.method.names.shared if name not in self.shared]
        if self.modules and missing:
            self.problems.append(
                f"must hold {' and '.join(missing)}, which all modules share, and does not (PEFT leaves it out with "
                "save_projection=False); save it again with it"
            )
            return
        for tensor, values in self.shared.items():
            self._check_values(tensor, values)
        changes, taken, problems = parameter_changes(self.modules, self.config)
        self.changes.update(changes)
        self.problems += problems
        for name, tensors in self.modules.items():
            if name not in taken:
                self._check_place(name, tensors)
                self._build(name, tensors)
        self._check_ties()
        self.problems += [
            f"{name}: must have shape {addition.value.shape}, as what its module adds, and has shape "
            f"{self.whole[name][0].shape}"
            for name, addition in self.added.items()
            if name in self.whole and self.whole[name][0].shape != addition.value.shape
        ]
        if self.config.fields.get("trainable_token_indices") and not any(
            LORA_TOKENS in tensors for tensors in self.modules.values()
        ):
            self.problems.append("the config says trainable_token_indices, and the file holds none; get the whole file")
        if self.config.bias != "none" and not any(name.endswith(".bias") for name in self.whole):
            self.notes.append(
                f"the config says bias {self.config.bias!r}, and the file holds no bias: none was changed"
            )

    def _check_place(self, module: str, tensors: Mapping[str, Array]) -> None:
        if self.config.ranks.alpha_is_ambiguous(module):
            self.notes.append(
                f"{module}: several alphas of alpha_pattern match; as in PEFT the file's first counts, which is "
                "not the one of the training where PEFT sorted them on saving"
            )
        reason = self.config.targets.rejects(module)
        if reason is not None and LORA_TOKENS not in tensors and not self._twins(module):
            self.problems.append(
                f"{module}: has {self.method.name} tensors that PEFT would ignore, because {reason}; correct "
                "adapter_config.json, or remove them"
            )
        elif matches(module, self.config.task_heads):
            self.notes.append(
                f"{module}: an adapter on a head that PEFT saves whole; read as the PEFT that wrote it did"
            )
        whole = self.whole.get(f"{module}.weight")
        if whole is not None and not whole[1].base_layer:
            self.problems.append(
                f"{module}: has both {self.method.name} and a whole weight, and versions of PEFT differ in which "
                "counts; save it again with a current PEFT"
            )

    def _build(self, name: str, tensors: Mapping[str, Array]) -> None:
        module = Module(name, tensors, self.shared, self.config)
        try:
            part = self.method.build(module)
        except TensorError as error:
            self.problems.append(f"{name}: {error}")
            return
        if unread := sorted(tensors.keys() - module.read - self.method.unread):
            self.problems.append(
                f"{name}: has {', '.join(unread)} beside {', '.join(sorted(module.read & tensors.keys()))}, and PEFT "
                "would ignore it; save it again with a current PEFT"
            )
        if part.delta is not None:
            self.deltas[name] = part.delta
        if part.change is not None:
            for tensor, values in tensors.items():
                if tensor not in self.shared:
                    self._check_values(f"{name}.{tensor}", values)
            self.changes[name] = part.change
        if part.note:
            self.notes.append(part.note)
        self.added.update(part.whole)

    def _check_values(self, name: str, values: Array) -> None:
        """A change is a function of the base's weight, which nothing looks into later."""
        bad = values.size - int(np.isfinite(values).sum()) if values.dtype.kind == "f" else 0
        if bad:
            self.problems.append(f"{name}: {bad} of {values.size} values are NaN or infinite; train or save it again")

    # --- tied weights ----------------------------------------------------------------------------

    @cached_property
    def _chosen_tokens(self) -> Mapping[str, list[str]]:
        """Modules with trained tokens that the config chooses, by what the tokens are."""
        found: dict[str, list[str]] = {}
        for name, tensors in self.modules.items():
            if TOKENS in tensors and self.config.targets.rejects(name) is None:
                found.setdefault(_values(tensors[TOKENS]), []).append(name)
        return found

    @cached_property
    def _tables(self) -> Mapping[tuple[str, str], list[str]]:
        """Embeddings with factors, by what those are in a linear module that is tied to them."""
        found: dict[tuple[str, str], list[str]] = {}
        for name, tensors in self.modules.items():
            if {"lora_embedding_A", "lora_embedding_B"} <= set(tensors):
                turned = _values(tensors["lora_embedding_B"].T), _values(tensors["lora_embedding_A"].T)
                found.setdefault(turned, []).append(name)
        return found

    def _twins(self, module: str) -> list[str]:
        """Embeddings of which PEFT gave this module, which is tied to them, the trained tokens; or, with
        `ensure_weight_tying`, the factors, the other way round."""
        own = self.modules[module]
        if TOKENS in own:
            return [name for name in self._chosen_tokens.get(_values(own[TOKENS]), []) if name != module]
        if not self.config.fields.get("ensure_weight_tying") or not {"lora_A", "lora_B"} <= set(own):
            return []
        return self._tables.get((_values(own["lora_A"]), _values(own["lora_B"])), [])

    def _check_ties(self) -> None:
        if not self.config.fields.get("ensure_weight_tying"):
            return
        tied = {twin for module in self.modules for twin in self._twins(module)}
        self.problems += [
            f"{module}: the config says ensure_weight_tying, and the file holds no factors of a module that is "
            "tied to it; save it again with a current PEFT, or train without ensure_weight_tying"
            for module, tensors in self.modules.items()
            if "lora_embedding_A" in tensors and module not in tied
        ]

    def replacements(self) -> dict[str, Replacement]:
        whole = self.config.whole
        found = {
            name: Replacement(values, in_place=not (key.saved or whole.take(name.rpartition(".")[0])))
            for name, (values, key) in self.whole.items()
        }
        if self.config.fields.get("ensure_weight_tying"):
            own = {_values(replacement.value) for replacement in found.values() if not replacement.in_place}
            for name, replacement in found.items():
                if replacement.in_place and _values(replacement.value) in own:
                    found[name] = replace(replacement, in_place=False)
        for name, addition in self.added.items():
            found[name] = _onto(found[name], addition) if name in found else addition
        return found


def _is_counter(key: Key, values: Array) -> bool:
    last = key.name.rpartition(".")[2]
    return key.kind == "parameter" and last == _COUNTER and values.dtype.kind in "iu" and values.size == 1


def _same(one: Array, other: Array) -> bool:
    return one is other or np.array_equal(one, other)


def _values(array: Array) -> str:
    """What is the same for arrays of the same shape and numbers, whatever their types."""
    exact = np.ascontiguousarray(array, dtype=np.float64) + 0.0  # makes -0 the 0 that it equals
    return f"{array.shape} {sha256(exact.data).hexdigest()}"


def _onto(whole: Replacement, addition: Replacement) -> Replacement:
    """A whole parameter, and what a module does to it."""
    if addition.operation == "add":
        value = whole.value.astype(np.float64) + addition.value.astype(np.float64)
    else:
        value = whole.value.astype(np.float64) * addition.value.astype(np.float64)
    return replace(whole, value=value.astype(np.promote_types(whole.value.dtype, np.float32)))
