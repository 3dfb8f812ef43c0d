"""An adapter out of the tensors of a PEFT file and its config: what the methods read, with PEFT's rules about which
modules and parameters count. It knows no folder and no file."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np

from onnx_lora.adapters.adapter import Replacement
from onnx_lora.adapters.formats.builder import AdapterBuilder
from onnx_lora.adapters.formats.peft.keys import Names
from onnx_lora.adapters.formats.peft.loralib import with_peft_names
from onnx_lora.adapters.formats.peft.parameters import find_parameter_pairs
from onnx_lora.adapters.formats.peft.rules import PeftConfig
from onnx_lora.adapters.formats.peft.tensors import FileTensors, sort_tensors
from onnx_lora.adapters.formats.peft.ties import Ties
from onnx_lora.adapters.language_models import readings
from onnx_lora.adapters.methods.method import Contribution, Module
from onnx_lora.adapters.methods.registry import METHODS
from onnx_lora.adapters.methods.tokens import LORA_TOKENS
from onnx_lora.expressions import ExpressionError
from onnx_lora.points import Array, matches

__all__ = ["build_adapter"]


def build_adapter(tensors: Mapping[str, Array], config: PeftConfig) -> AdapterBuilder:
    """What the tensors of a file come to. `tensors`: by the keys that PEFT writes. Everything that is wrong is in the
    builder's `problems` and `unsupported`."""
    builder = AdapterBuilder()
    names = Names(config.method, METHODS)
    found = sort_tensors(with_peft_names(tensors, config, builder), names, builder)
    building = _Building(config, found, builder)
    try:
        building.run()
    except ExpressionError as error:
        builder.problems.append(f"the config: {error}")
    for name, replacement in building.replacements().items():
        builder.put_replacement(name, replacement)
    builder.methods = {config.method_name}
    return builder


@dataclass
class _Building:
    """The steps from the tensors of a file to what the builder holds. `added`: what the methods' tensors do to whole
    parameters, by parameter. `names_in_config`: the names by which the config's rules know modules, where they are
    others than the file's."""

    config: PeftConfig
    found: FileTensors
    builder: AdapterBuilder
    added: dict[str, Replacement] = field(default_factory=dict)
    names_in_config: Mapping[str, str] = field(default_factory=dict)

    def run(self) -> None:
        """Check the modules against the config, and read each. Raises ExpressionError: the config's expressions take
        too much work."""
        missing = [name for name in self.config.method.shared if name not in self.found.shared]
        if self.found.modules and missing:
            self.builder.problems.append(
                f"must hold {' and '.join(missing)}, which all modules share, and does not (PEFT leaves it out with "
                "save_projection=False); save it again with it"
            )
            return
        for tensor, values in self.found.shared.items():
            self.builder.check_finite(tensor, values)
        pairs = find_parameter_pairs(self.found.modules, self.config)
        self.builder.changes.update(pairs.changes)
        self.builder.problems += pairs.problems
        if not pairs.taken:
            self._read_names()
        for name, tensors in self.found.modules.items():
            if name not in pairs.taken:
                self._check_place(name, tensors)
                self._read(name, tensors)
        self.builder.problems += self.ties.problems()
        self._check_added_shapes()
        self._check_promises()

    @cached_property
    def ties(self) -> Ties:
        """Which modules PEFT tied."""
        return Ties(self.found.modules, self.config)

    def _read_names(self) -> None:
        """Find out by which names the config's rules know the modules: their own, or those of another class of the
        model, as where a tool renamed the tensors and left the config as it was."""
        rejects = self.config.targets.rejects
        modules = [name for name, tensors in self.found.modules.items() if LORA_TOKENS not in tensors]
        if not modules or any(rejects(module) is None for module in modules):
            return
        fitting = readings(modules, lambda name: rejects(name) is None)
        outcomes = {self._ranks_of(reading.names.values()) for reading in fitting}
        if len(outcomes) > 1:
            meanings = " or ".join(reading.other for reading in fitting)
            self.builder.problems.append(
                f"the config knows the modules by other names, which may begin with {meanings}, and their ranks and "
                "alphas depend on it; correct target_modules, rank_pattern and alpha_pattern"
            )
        elif fitting:
            self.names_in_config = fitting[0].names
            self.builder.notes.append(
                f"the config is of another class of this model: its rules were read with {fitting[0].other}… for the "
                f"file's {fitting[0].own}…"
            )

    def _ranks_of(self, names: Iterable[str]) -> tuple[tuple[int, float], ...]:
        """The config's rank and alpha for each of the names."""
        return tuple((self.config.ranks.rank_of(name), self.config.ranks.alpha_of(name)) for name in names)

    def _name_in_config(self, module: str) -> str:
        return self.names_in_config.get(module, module)

    def _check_place(self, module: str, tensors: Mapping[str, Array]) -> None:
        """Whether PEFT would load the tensors of a module at all."""
        name = self._name_in_config(module)
        if self.config.ranks.alpha_is_ambiguous(name):
            self.builder.notes.append(
                f"{module}: several alphas of alpha_pattern match; as in PEFT the file's first counts, which is "
                "not the one of the training where PEFT sorted them on saving"
            )
        reason = self.config.targets.rejects(name)
        if reason is not None and LORA_TOKENS not in tensors and not self.ties.twins(module):
            self.builder.problems.append(
                f"{module}: has {self.config.method.name} tensors that PEFT would ignore, because {reason}; correct "
                "adapter_config.json, or remove them"
            )
        elif matches(module, self.config.task_heads):
            self.builder.notes.append(
                f"{module}: an adapter on a head that PEFT saves whole; read as the PEFT that wrote it did"
            )
        whole = self.found.parameters.get(f"{module}.weight")
        if whole is not None and not whole.is_in_base_layer:
            self.builder.problems.append(
                f"{module}: has both {self.config.method.name} and a whole weight, and versions of PEFT differ in "
                "which counts; save it again with a current PEFT"
            )

    def _read(self, name: str, tensors: Mapping[str, Array]) -> None:
        """Let the method read a module."""
        ranks = self.config.ranks
        in_config = self._name_in_config(name)
        module = Module(
            name=name,
            tensors=tensors,
            shared=self.found.shared,
            fields=self.config.fields,
            rank=ranks.rank_of(in_config),
            alpha=ranks.alpha_of(in_config),
            scale=ranks.scale_of(in_config),
        )
        with self.builder.reading(name):
            self._take(module, self.config.method.read(module))

    def _take(self, module: Module, read: Contribution) -> None:
        """Put in what the method read. A tensor that it did not ask for is a problem."""
        unread = sorted(module.tensors.keys() - module.asked - self.config.method.unread)
        if unread:
            applied = sorted(module.asked & module.tensors.keys())
            self.builder.problems.append(
                f"{module.name}: has {', '.join(unread)} beside {', '.join(applied)}, and PEFT would ignore it; save "
                "it again with a current PEFT"
            )
        if read.delta is not None:
            self.builder.put_delta(module.name, read.delta)
        if read.change is not None:
            own = {tensor: values for tensor, values in module.tensors.items() if tensor not in self.found.shared}
            self.builder.put_change(module.name, read.change, own)
        if read.delta is None and read.change is None and not read.whole:
            self.builder.at_base.add(module.name)
        if read.note:
            self.builder.notes.append(read.note)
        self.added.update(read.whole)

    def _check_added_shapes(self) -> None:
        """Whether whole parameters have the shapes of what is added to them."""
        for name, addition in self.added.items():
            whole = self.found.parameters.get(name)
            if whole is not None and whole.value.shape != addition.value.shape:
                self.builder.problems.append(
                    f"{name}: must have shape {addition.value.shape}, as what its module adds, and has shape "
                    f"{whole.value.shape}"
                )

    def _check_promises(self) -> None:
        """Whether the file holds what the config says that it holds."""
        has_tokens = any(LORA_TOKENS in tensors for tensors in self.found.modules.values())
        if self.config.fields.get("trainable_token_indices") and not has_tokens:
            self.builder.problems.append(
                "the config says trainable_token_indices, and the file holds none; get the whole file"
            )
        has_bias = any(name.endswith(".bias") for name in self.found.parameters)
        if self.config.bias != "none" and not has_bias:
            self.builder.notes.append(
                f"the config says bias {self.config.bias!r}, and the file holds no bias: none was changed"
            )

    def replacements(self) -> dict[str, Replacement]:
        """The whole parameters of the file, together with what the methods' tensors do to them."""
        found: dict[str, Replacement] = {}
        for name, parameter in self.found.parameters.items():
            has_own_storage = parameter.is_of_copy or self.config.saved_whole.covers(name.rpartition(".")[0])
            found[name] = Replacement(parameter.value, in_place=not has_own_storage)
        found = self.ties.mark_copies(found)
        for name, addition in self.added.items():
            found[name] = _combine(found[name], addition) if name in found else addition
        return found


def _combine(whole: Replacement, addition: Replacement) -> Replacement:
    """A whole parameter, with what a method's tensors do to it. Where the shapes differ a problem says so already."""
    if whole.value.shape != addition.value.shape:
        return whole
    own = whole.value.astype(np.float64)
    other = addition.value.astype(np.float64)
    value = own + other if addition.operation == "add" else own * other
    wide = np.promote_types(whole.value.dtype, np.float32)
    return replace(whole, value=value.astype(wide))
