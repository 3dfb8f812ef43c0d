"""A PEFT folder as an adapter: `adapter_config.json` and one weight file. What PEFT would load is
read, what it would ignore or read otherwise is refused by name. It knows no package."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from onnx_lora.adapters.formats.files import sha256_of
from onnx_lora.adapters.formats.peft_config import CONFIG, LoraRules, read_config
from onnx_lora.adapters.formats.peft_keys import Key, adapter_names, parse_key
from onnx_lora.adapters.formats.safetensors_file import read_safetensors
from onnx_lora.adapters.formats.torch_pickle import read_torch_pickle
from onnx_lora.adapters.model import Adapter, Delta, Origin, Replacement
from onnx_lora.errors import AdapterFileError, UnsupportedAdapterError
from onnx_lora.points import Array, matches

__all__ = ["read_peft"]

_SAFETENSORS = "adapter_model.safetensors"
_PICKLE = "adapter_model.bin"


def read_peft(folder: Path, name: str) -> Adapter:
    """Read a PEFT folder.

    Raises AdapterFileError: a file is missing or damaged, or its tensors and its config disagree.
    UnsupportedAdapterError: a method, or a tensor of one, that is refused.
    """
    config, weights, notes = _find_files(folder)
    rules = read_config(config)
    tensors = read_safetensors(weights).tensors if weights.suffix == ".safetensors" else read_torch_pickle(weights)
    sorter = _Sorter(rules)
    sorter.take(tensors)
    sorter.judge()
    _raise(sorter, weights)
    return Adapter(
        name=name,
        deltas={
            module: Delta(pair["A"], pair["B"], rules.scale_of(module)) for module, pair in sorter.factors.items()
        },
        replacements=sorter.replacements(),
        origin=Origin(str(folder), sha256_of(weights), "peft", rules.method, rules.base_model),
        saved_modules=(*rules.saved, *rules.task_heads),
        notes=(*notes, *sorter.notes),
    )


def _raise(sorter: _Sorter, weights: Path) -> None:
    if sorter.unsupported:
        problems = [*sorter.unsupported, *sorter.problems]
        raise UnsupportedAdapterError("holds what cannot be applied exactly", path=weights, problems=problems)
    if sorter.problems:
        raise AdapterFileError(
            f"its tensors must be what {CONFIG} says, and are not", path=weights, problems=sorter.problems
        )


def _find_files(folder: Path) -> tuple[Path, Path, list[str]]:
    """The config and the weights beside it, and what to note about them."""
    try:
        present = sorted(entry.name for entry in folder.iterdir())
    except OSError as error:
        raise AdapterFileError(f"cannot be read: {error}", path=folder) from error
    weights = [name for name in (_SAFETENSORS, _PICKLE) if name in present]
    missing = [] if CONFIG in present else [f"no {CONFIG}"]
    if not weights:
        missing.append(f"no {_SAFETENSORS} (or {_PICKLE})")
    if missing:
        below = [entry for entry in present if (folder / entry / CONFIG).is_file()]
        cure = f"; there is one in {', '.join(below[:5])}" if below else _cure(present, bool(weights))
        found = ", ".join(present[:12]) or "nothing"
        raise AdapterFileError(
            f"must be a folder that PEFT wrote, and has {' and '.join(missing)}; found {found}{cure}", path=folder
        )
    notes = [f"both {_SAFETENSORS} and {_PICKLE} are there; PEFT reads the first, and so was done"][: len(weights) - 1]
    return folder / CONFIG, folder / weights[0], notes


def _cure(present: list[str], has_weights: bool) -> str:
    if "onnx_lora.json" in present:
        return ": it is a package of onnx-lora, not an adapter"
    if has_weights:
        return f"; without {CONFIG} the scale is unknown: get it from where the adapter was trained"
    likely = [name for name in present if name.endswith((".safetensors", ".bin"))]
    return f"; if {likely[0]!r} holds the adapter, rename it to {_SAFETENSORS}" if len(likely) == 1 else ""


@dataclass
class _Sorter:
    """Puts every tensor of a file in its place, and collects what has none."""

    rules: LoraRules
    factors: dict[str, dict[str, Array]] = field(default_factory=dict)
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
            else:
                self._put_factor(key, parsed, values)
        if not self.factors and not self.whole and not self.problems and not self.unsupported:
            self.problems.append("holds no tensor of an adapter")

    def _put_factor(self, key: str, parsed: Key, values: Array) -> None:
        if values.ndim != 2:
            kind = "a convolution's, or a grouped one of an old PEFT" if values.ndim > 2 else "not gathered from shards"
            self.unsupported.append(
                f"{key}: must have 2 axes, and has shape {values.shape}: {kind}; only LoRA on linear layers is applied"
            )
            return
        pair = self.factors.setdefault(parsed.name, {})
        if parsed.kind in pair and not np.array_equal(pair[parsed.kind], values):
            self.problems.append(f"{key}: there are two different tensors for lora_{parsed.kind} of {parsed.name}")
        pair[parsed.kind] = values

    def _put_parameter(self, key: str, parsed: Key, values: Array) -> None:
        known = self.whole.get(parsed.name)
        if known is not None and not np.array_equal(known[0], values):
            self.problems.append(f"{key}: there are two different tensors for {parsed.name}")
        self.whole[parsed.name] = values, parsed

    def judge(self) -> None:
        """Check the factors against the config and against each other."""
        for module, pair in self.factors.items():
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
        if self.rules.bias != "none" and not any(name.endswith(".bias") for name in self.whole):
            self.notes.append(f"the config says bias {self.rules.bias!r}, and the file holds no bias: none was changed")

    def _judge_ranks(self, module: str, a: Array, b: Array) -> None:
        rank = self.rules.rank_of(module)
        if a.shape[0] == rank == b.shape[1] and a.size and b.size:
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
