"""Random adapters: PEFT puts them on the model in PyTorch, and the same tensors become inputs of a package's graphs.
This file uses no code that reads adapters for users: a mistake there would stand on both sides of the comparison."""

from __future__ import annotations

import re
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from onnx_lora.errors import MissingDependencyError, ModelError
from onnx_lora.exporter.verification.comparison import SMALL

if TYPE_CHECKING:
    from onnx_lora.package import Package
    from onnx_lora.points import Array, InjectionPoint

__all__ = ["peft_failures", "put_adapter", "put_weights"]

# Modules have different ranks in turn.
_RANKS = (2, 3, 5)

# The scale is not 1, and makes deltas that are large enough to be seen and small enough to stay finite in float16.
_SCALE = 0.25


@contextmanager
def put_adapter(package: Package, model: Any) -> Iterator[dict[str, Array]]:
    """Let PEFT put a random adapter on every point's module, for as long as the block runs; gives its tensors as
    graph inputs.

    Raises ModelError: PEFT cannot. MissingDependencyError: it is not installed.
    """
    with peft_failures():
        import peft
        import torch

    class AnyModule(peft.tuners.lora.LoraModel):  # type: ignore[misc]  # PEFT has no types
        """Takes the modules too that PEFT refuses for Mamba: its CUDA kernels read `out_proj` without calling it, and
        the model here runs in plain PyTorch."""

        def _check_target_module_compatiblity(self, *args: Any) -> None:
            pass

    config = _configure(package)
    with torch.random.fork_rng(devices=[]), peft_failures(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's, of convolutions in groups
        torch.manual_seed(0)
        tuned = AnyModule(model, config, "default")
        if config.use_dora:
            _move_magnitudes(tuned)
    model.eval()
    tensors: dict[str, Array] = {}
    try:
        for name, module in model.named_modules():
            if name in package.points:
                tensors.update(_tensors_of(module, package.points[name]))
        yield tensors
    finally:
        tuned.unload()


@contextmanager
def put_weights(package: Package, model: Any) -> Iterator[dict[str, Array]]:
    """Put other values into the replaceable weights of the model, for as long as the block runs, as if an adapter
    brought them; gives them as graph inputs.

    Weights that the model shares between modules stay out: changing one here would change the other.
    """
    import torch

    shared = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    parameters = {name: parameter for name, parameter in model.named_parameters() if shared[id(parameter)] == 1}
    tensors: dict[str, Array] = {}
    before: dict[str, Any] = {}
    generator = torch.Generator().manual_seed(0)
    try:
        for name, weight in package.replaceable.items():
            if name not in parameters:
                continue
            values = parameters[name].data
            before[name] = values.clone()
            noise = torch.rand(values.shape, generator=generator) - 0.5
            size = max(float(values.abs().max()), SMALL)
            values += noise.to(values.dtype) * size
            array = values.float().numpy().astype(weight.dtype)
            tensors[name] = weight.to_graph(array)
        yield tensors
    finally:
        for name, values in before.items():
            parameters[name].data.copy_(values)


@contextmanager
def peft_failures() -> Iterator[None]:
    """PEFT's exceptions as ours. Raises MissingDependencyError: it is not installed. ModelError: it cannot load the
    adapter into the model."""
    try:
        yield
    except ImportError as error:
        raise MissingDependencyError(f"verifying needs {error.name}: pip install 'onnx-lora[export,cpu]'") from error
    except (ValueError, RuntimeError, OSError) as error:
        raise ModelError(f"PEFT cannot load the adapter into the model: {error}") from error


def _configure(package: Package) -> Any:
    """PEFT's config of an adapter that has every point of a package."""
    import peft

    modules = list(package.points)
    ranks: dict[str, int] = {}
    for index, name in enumerate(modules):
        # Whole names: PEFT takes a plain name for a suffix, and every pattern for a regular expression.
        pattern = f"^{re.escape(name)}"
        ranks[pattern] = _RANKS[index % len(_RANKS)] * _groups(package.points[name])
    return peft.LoraConfig(
        r=_RANKS[0],
        lora_alpha=_SCALE,
        target_modules="|".join(re.escape(name) for name in modules),
        rank_pattern=ranks,
        alpha_pattern={name: rank * _SCALE for name, rank in ranks.items()},
        init_lora_weights=False,
        use_dora=bool(modules) and package.dora >= set(modules),
    )


def _move_magnitudes(tuned: Any) -> None:
    """Let DoRA's magnitudes differ from the weights' norms, with which PEFT begins."""
    import torch

    for layer in tuned.modules():
        for magnitude in getattr(layer, "lora_magnitude_vector", {}).values():
            magnitude.weight.data *= 1 + _SCALE * torch.rand_like(magnitude.weight)


def _groups(point: InjectionPoint) -> int:
    """Into how many groups a module is cut, each of which has a rank of its own in PEFT."""
    return point.kind.dense_rank(1)


def _tensors_of(layer: Any, point: InjectionPoint) -> dict[str, Array]:
    """A layer of PEFT's as graph inputs: A `[1, in, rank]`, B `[1, rank, out]`, DoRA's scale `[1, 1, out]`."""
    a_name, b_name = point.kind.factor_names
    a = _factor_of(layer, a_name)  # [rank, in]
    b = _factor_of(layer, b_name)  # [out, rank]
    b = _unfold_groups(b, _groups(point)) * layer.scaling["default"]
    tensors = {point.lora_a: a.T[None], point.lora_b: b.T[None]}
    if "default" in layer.lora_magnitude_vector:
        scale = _dora_scale(layer, point, b @ a)
        tensors[point.dora_scale] = scale[None, None]
    inputs: dict[str, Array] = {}
    for name, value in tensors.items():
        inputs[name] = np.ascontiguousarray(value).astype(point.dtype)
    return inputs


def _factor_of(layer: Any, name: str) -> Array:
    """A factor as a matrix: a parameter of PEFT's layer, or the weight of a module in it."""
    factor = getattr(layer, name)["default"]
    parameter = getattr(factor, "weight", factor)
    matrix: Array = parameter.detach().double().flatten(1).numpy()
    return matrix


def _dora_scale(layer: Any, point: InjectionPoint, delta: Array) -> Array:
    """DoRA (Liu et al. 2024), equation 5: magnitude / ‖W0 + B A‖, by output. `delta`: B A `[out, in]`."""
    magnitude = layer.lora_magnitude_vector["default"].weight.detach().double().numpy().reshape(-1)
    weight = layer.get_base_layer().weight.detach().double().numpy()
    if not getattr(layer, "fan_in_fan_out", False):  # transformers' Conv1D keeps W0 `[in, out]`
        weight = point.kind.from_torch(weight)
    scale: Array = magnitude / np.linalg.norm(weight.T + delta, axis=1)
    return scale


def _unfold_groups(b: Array, groups: int) -> Array:
    """B of a convolution in groups as a matrix that multiplies all groups' factors at once: `[out, rank]` becomes
    `[out, groups · rank]`, each group's outputs beside its own columns, zeros elsewhere."""
    if groups == 1:
        return b
    outputs, rank = len(b) // groups, b.shape[1]
    blocks = np.zeros((len(b), rank * groups))
    for group in range(groups):
        rows = slice(group * outputs, (group + 1) * outputs)
        columns = slice(group * rank, (group + 1) * rank)
        blocks[rows, columns] = b[rows]
    return blocks
