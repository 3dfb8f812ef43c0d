"""A PEFT folder as an adapter: `adapter_config.json` and one weight file. What PEFT would load is
read, what it would ignore or read otherwise is refused by name. It knows no package."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from onnx_lora.adapters.formats.files import sha256_of
from onnx_lora.adapters.formats.peft_config import CONFIG, read_config
from onnx_lora.adapters.formats.peft_keys import Key, adapter_names, parse_key
from onnx_lora.adapters.formats.peft_refused import MERGE
from onnx_lora.adapters.formats.peft_rules import LoraRules
from onnx_lora.adapters.formats.safetensors_file import read_safetensors
from onnx_lora.adapters.formats.torch_pickle import read_torch_pickle
from onnx_lora.adapters.model import Adapter, Delta, Origin, Replacement
from onnx_lora.errors import AdapterFileError, UnsupportedAdapterError
from onnx_lora.points import Array, Kind, matches

__all__ = ["read_peft"]

_SAFETENSORS = "adapter_model.safetensors"
_PICKLE = "adapter_model.bin"


def read_peft(folder: Path, name: str) -> Adapter:
    """Read a PEFT folder.

    Raises AdapterFileError: a file is missing or damaged, or its tensors and its config disagree.
    UnsupportedAdapterError: a method, or a tensor of one, that is refused.
    """
    present = _list(folder)
    if CONFIG not in present:
        raise AdapterFileError(
            f"must hold {CONFIG} and does not; found {_without_config(folder, present)}", path=folder
        )
    rules = read_config(folder / CONFIG)
    weights = [folder / name for name in (_SAFETENSORS, _PICKLE) if name in present]
    if not weights:
        raise AdapterFileError(
            f"must hold {_SAFETENSORS} (or {_PICKLE}); found {_without_weights(present)}", path=folder
        )
    sorter = _Sorter(rules)
    if len(weights) > 1:
        sorter.notes.append(f"both {_SAFETENSORS} and {_PICKLE} are there; as in PEFT, the first was read")
    sorter.take(read_safetensors(weights[0]).tensors if _SAFETENSORS in present else read_torch_pickle(weights[0]))
    sorter.judge()
    _raise(sorter, weights[0])
    return Adapter(
        name=name,
        deltas=sorter.deltas(),
        replacements=sorter.replacements(),
        origin=Origin(str(folder), sha256_of(weights[0]), "peft", rules.method, rules.base_model),
        saved_modules=(*rules.saved, *rules.task_heads),
        notes=tuple(sorter.notes),
    )


def _raise(sorter: _Sorter, weights: Path) -> None:
    if sorter.unsupported:
        problems = [*sorter.unsupported, *sorter.problems]
        raise UnsupportedAdapterError(f"holds what cannot be applied exactly; {MERGE}", path=weights, problems=problems)
    if sorter.problems:
        raise AdapterFileError(
            f"its tensors must be what {CONFIG} says, and are not", path=weights, problems=sorter.problems
        )


def _list(folder: Path) -> list[str]:
    try:
        return sorted(entry.name for entry in folder.iterdir())
    except OSError as error:
        raise AdapterFileError(f"cannot be read: {error}", path=folder) from error


def _without_config(folder: Path, present: list[str]) -> str:
    """What there is instead of a config, and what to do."""
    found = ", ".join(present[:12]) or "nothing"
    below = [entry for entry in present if (folder / entry / CONFIG).is_file()]
    if below:
        return f"{found}; {', '.join(below[:5])} has one: give that folder"
    if "onnx_lora.json" in present:
        return f"{found}: it is a package of onnx-lora, not an adapter"
    if _SAFETENSORS in present or _PICKLE in present:
        return f"{found}; without the config the scale is unknown: get it from where the adapter was trained"
    return f"{found}; give the folder that PEFT's save_pretrained wrote"


def _without_weights(present: list[str]) -> str:
    likely = [name for name in present if name.endswith((".safetensors", ".bin"))]
    cure = f"; if {likely[0]!r} holds the adapter, rename it to {_SAFETENSORS}" if len(likely) == 1 else ""
    return ", ".join(present[:12]) + (cure or "; get the whole folder")


@dataclass
class _Sorter:
    """Puts every tensor of a file in its place, and collects what has none."""

    rules: LoraRules
    factors: dict[str, dict[str, Array]] = field(default_factory=dict)
    embeddings: set[str] = field(default_factory=set)
    magnitudes: dict[str, Array] = field(default_factory=dict)
    whole: dict[str, tuple[Array, Key]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    unsupported: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def take(self, tensors: Mapping[str, Array]) -> None:
        names = adapter_names(tensors)
        if len(names) > 1:
            self.problems.append(
                f"holds more than one adapter: {', '.join(sorted(names))}; save each of them in a folder of its own"
            )
        for key, values in tensors.items():
            parsed = parse_key(key, names)
            if parsed.kind == "refused":
                self.unsupported.append(f"{key}: {parsed.name}")
            elif parsed.kind == "base copy":
                self.notes.append(f"{key}: the base's own copy beside a saved module, which PEFT does not use")
            elif values.dtype.kind != "f":
                self.problems.append(f"{key}: must be floating point, and is {values.dtype.name}")
            elif parsed.kind == "parameter":
                self._put_parameter(key, parsed, values)
            elif parsed.kind == "magnitude":
                self._put_magnitude(key, parsed, values)
            else:
                self._put_factor(key, parsed, values)
        if not self.factors and not self.whole and not self.problems and not self.unsupported:
            self.problems.append("holds no tensor of an adapter")

    def _put_factor(self, key: str, parsed: Key, values: Array) -> None:
        axes = values.ndim
        if (
            axes < 2
            or axes > 5
            or (parsed.embedding and axes != 2)
            or (parsed.kind == "B" and set(values.shape[2:]) - {1})
        ):
            kind = "a grouped one of an old PEFT" if axes > 2 else "not gathered from shards"
            self.unsupported.append(
                f"{key}: must have 2 axes, or those of a convolution with a kernel of size 1 in lora_B, and has shape "
                f"{values.shape}: {kind}"
            )
            return
        pair = self.factors.setdefault(parsed.name, {})
        if parsed.kind in pair and not np.array_equal(pair[parsed.kind], values):
            self.problems.append(f"{key}: there are two different tensors for lora_{parsed.kind} of {parsed.name}")
        pair[parsed.kind] = values
        if parsed.embedding:
            self.embeddings.add(parsed.name)

    def _put_magnitude(self, key: str, parsed: Key, values: Array) -> None:
        if values.size != max(values.shape, default=0):
            self.problems.append(f"{key}: must have one number for each output, and has shape {values.shape}")
            return
        known = self.magnitudes.setdefault(parsed.name, values.reshape(-1))
        if not np.array_equal(known, values.reshape(-1)):
            self.problems.append(f"{key}: there are two different magnitudes of {parsed.name}")

    def deltas(self) -> dict[str, Delta]:
        """What was sorted, judged and found whole."""
        return {module: self._delta(module, pair["A"], pair["B"]) for module, pair in self.factors.items()}

    def _delta(self, module: str, a: Array, b: Array) -> Delta:
        kind: Kind = "embedding" if module in self.embeddings else "linear" if a.ndim == 2 else "conv"
        magnitude = self.magnitudes.get(module)
        return Delta(a, b.reshape(b.shape[:2]), self.rules.scale_of(module), kind, magnitude)

    def _put_parameter(self, key: str, parsed: Key, values: Array) -> None:
        known = self.whole.get(parsed.name)
        if known is not None and not np.array_equal(known[0], values):
            self.problems.append(f"{key}: there are two different tensors for {parsed.name}")
        self.whole[parsed.name] = values, parsed

    def judge(self) -> None:
        """Check the factors against the config and against each other."""
        for module, pair in self.factors.items():
            if self.rules.alpha_is_ambiguous(module):
                self.notes.append(
                    f"{module}: several alphas of alpha_pattern match; as in PEFT the file's first counts, which is "
                    "not the one of the training where PEFT sorted them on saving"
                )
            reason = self.rules.rejects(module)
            if reason is not None:
                self.problems.append(
                    f"{module}: has LoRA tensors that PEFT would ignore, because {reason}; correct {CONFIG}, "
                    "or remove them"
                )
            elif matches(module, self.rules.task_heads):
                self.notes.append(f"{module}: LoRA on a head that PEFT saves whole; read as the PEFT that wrote it did")
            if len(pair) == 1:
                found = next(iter(pair))
                self.problems.append(
                    f"{module}: has lora_{found} and no lora_{'AB'.replace(found, '')}; get the whole file"
                )
            else:
                self._judge_ranks(module, pair["A"], pair["B"])
            whole = self.whole.get(f"{module}.weight")
            if whole is not None and not whole[1].base_layer:
                self.problems.append(
                    f"{module}: has both LoRA and a whole weight, and versions of PEFT differ in which counts; "
                    "save it again with a current PEFT"
                )
        self._judge_magnitudes()
        if self.rules.bias != "none" and not any(name.endswith(".bias") for name in self.whole):
            self.notes.append(f"the config says bias {self.rules.bias!r}, and the file holds no bias: none was changed")

    def _judge_magnitudes(self) -> None:
        """DoRA is DoRA on every module, by the config and by the tensors."""
        if not self.rules.dora:
            self.problems += [
                f"{module}: has DoRA's magnitude, and {CONFIG} does not say use_dora; get the config of this training"
                for module in self.magnitudes
            ]
            return
        modules = dict.fromkeys([*self.factors, *self.magnitudes])
        self.problems += [
            f"{module}: must have lora_A, lora_B and lora_magnitude_vector (use_dora), and lacks one of them; get the "
            "whole file"
            for module in modules
            if module not in self.magnitudes or module not in self.factors
        ]

    def _judge_ranks(self, module: str, a: Array, b: Array) -> None:
        rank = self.rules.rank_of(module)
        # Of a convolution in groups B has a part of the rank for each; how many there are, only the base tells.
        groups = a.ndim > 2 and b.shape[1] and rank % b.shape[1] == 0
        if a.shape[0] == rank and (b.shape[1] == rank or groups) and a.size and b.size:
            return
        self.problems.append(
            f"{module}: the rank must be {rank} by {CONFIG}, and lora_A {a.shape} has rank {a.shape[0]}, "
            f"lora_B {b.shape} has {b.shape[1]}; get the config and the weights of one training"
        )

    def replacements(self) -> dict[str, Replacement]:
        wrapped = (*self.rules.saved, *self.rules.task_heads)
        return {
            name: Replacement(values, in_place=not (key.saved or matches(name.rpartition(".")[0], wrapped)))
            for name, (values, key) in self.whole.items()
        }
