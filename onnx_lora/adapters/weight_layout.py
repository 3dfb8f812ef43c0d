"""Whole weights of an adapter, laid out as their graph inputs: which of them replace something, and whether they fit.
It knows replaceable weights, and the names and weights of injection points."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from onnx_lora.adapters.adapter import Change, Replacement
from onnx_lora.adapters.factors import apply_change, finite_problems
from onnx_lora.adapters.problems import value_problems
from onnx_lora.adapters.tensor_layout import TensorLayout
from onnx_lora.kinds import LINEAR
from onnx_lora.points import WholeWeight

if TYPE_CHECKING:
    from onnx_lora.package import Package

__all__ = ["WeightLayout", "is_bare_parameter"]


def is_bare_parameter(name: str, package: Package) -> bool:
    """Whether `name` is a bare parameter that the package can replace, and no module."""
    weight = package.replaceable.get(name)
    return weight is not None and not weight.has_rows and name not in package.points


@dataclass
class WeightLayout:
    """The parameters that an adapter replaces, put in one by one.

    `replaced`: their names, whether the package can replace them or not. `outputs`: how many outputs the replaced
    weights and biases of linear modules have, by parameter.
    """

    package: Package
    layout: TensorLayout
    replaced: list[str] = field(default_factory=list)
    outputs: dict[str, int] = field(default_factory=dict)
    digests: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def add_change(self, weight: WholeWeight, change: Change) -> None:
        """A change of a bare parameter. The parameter's new value becomes its input."""
        misfit = change.explain_misfit(weight.shape, LINEAR)
        if misfit is not None:
            self.layout.problems.append(f"{weight.name}: {misfit}")
            return
        problems = finite_problems(weight.name, change)
        if problems:
            self.layout.problems.extend(problems)
            return
        self.replaced.append(weight.name)
        self.digests[weight.name] = weight.sha256
        base = self.package.default(weight)
        wide = np.promote_types(base.dtype, np.float32)
        changed = apply_change(change, base.astype(wide))
        self.layout.put(weight.name, changed, weight.dtype)

    def add_replacement(self, name: str, replacement: Replacement) -> None:
        """A whole weight, unless it leaves the base as it is."""
        if replacement.operation == "multiply" and not self._may_exist(name):
            return
        if replacement.in_place and self.package.has_value(name, replacement.value):
            self.notes.append(f"{name}: equal to the base's own, nothing to replace")
            return
        self.replaced.append(name)
        weight = self.package.replaceable.get(name)
        if weight is not None:
            self.digests[name] = weight.sha256
            self._lay_out(weight, replacement)

    def _lay_out(self, weight: WholeWeight, replacement: Replacement) -> None:
        """The weight's input, made of the replacement; or why it cannot be."""
        name = weight.name
        value = replacement.value
        shape = weight.role.torch_shape(value.shape) if replacement.in_graph_layout else value.shape
        if shape is None or not weight.fits(shape):
            free = " (the number of outputs is free)" if weight.free_outputs else ""
            self.layout.problems.append(f"{name}: must have shape {weight.shape}{free}, and has {value.shape}")
            return
        problems = value_problems(name, value)
        if replacement.operation != "set" and shape != weight.shape:
            problems.append(f"{name}: must have the base's shape {weight.shape}, and has {value.shape}")
        if problems:
            self.layout.problems.extend(problems)
            return
        if weight.has_rows:
            self.outputs[name] = weight.role.outputs(shape)
        laid_out = value if replacement.in_graph_layout else weight.to_graph(value)
        if replacement.operation == "add":
            laid_out = np.add(self.package.default(weight), laid_out, dtype=np.float64)
        elif replacement.operation == "multiply":
            laid_out = np.multiply(self.package.default(weight), laid_out, dtype=np.float64)
        self.layout.put(name, laid_out, weight.dtype)

    def check_heads(self) -> None:
        """Weight, bias and injection point of a module must agree in the number of outputs."""
        modules = {name.rpartition(".")[0] for name in self.outputs}
        for module in sorted(modules):
            outputs = self._outputs_of_module(module)
            if len(set(outputs.values())) > 1:
                sizes = ", ".join(f"{size} for {what}" for what, size in outputs.items())
                self.layout.problems.append(f"{module}: the number of outputs must agree, and is {sizes}")

    def _outputs_of_module(self, module: str) -> Mapping[str, int]:
        """The numbers of outputs that a module's weight, bias and point will have, by what each is in words."""
        outputs: dict[str, int] = {}
        for name in (f"{module}.weight", f"{module}.bias"):
            weight = self.package.replaceable.get(name)
            if weight is None or not weight.has_rows:
                continue
            if name in self.outputs:
                outputs[f"{name} (the adapter's)"] = self.outputs[name]
            else:
                outputs[f"{name} (the base's)"] = weight.outputs
        point = self.package.points.get(module)
        if point is not None:
            outputs[f"the injection point {module} (export again without it in `targets=`)"] = point.out_features
        return outputs

    def _may_exist(self, name: str) -> bool:
        """Whether the base may have this parameter: false of the bias of a module that is known to have none."""
        module, _, parameter = name.rpartition(".")
        point = self.package.points.get(module)
        return parameter != "bias" or point is None or point.bias != "none"
