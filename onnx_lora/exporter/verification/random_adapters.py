"""Adapters that nobody trained, made by PEFT on the model in PyTorch, and the same as inputs of a package's graphs. It
uses nothing of what reads adapters for users: both would share its mistakes."""

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
from onnx_lora.kinds import Conv, Embedding

if TYPE_CHECKING:
    from onnx_lora.package import Package
    from onnx_lora.points import Array, InjectionPoint

__all__ = ["peft_failures", "put_adapter", "put_weights"]

# Ranks that differ by module, a scale that is not 1, and a delta large enough to be seen and small enough to leave the
# numbers finite in float16.
_RANKS = (2, 3, 5)
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

    config = _configure(package)
    with torch.random.fork_rng(devices=[]), peft_failures(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's, of convolutions in groups
        torch.manual_seed(0)
        tuned = peft.tuners.lora.LoraModel(model, config, "default")
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
            values += noise.to(values.dtype) * max(float(values.abs().max()), SMALL)
            tensors[name] = weight.to_graph(values.float().numpy().astype(weight.dtype))
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
        ranks[f"^{re.escape(name)}"] = _RANKS[index % len(_RANKS)] * _groups(package.points[name])
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
    return point.kind.groups if isinstance(point.kind, Conv) else 1


def _tensors_of(layer: Any, point: InjectionPoint) -> dict[str, Array]:
    """A layer of PEFT's as graph inputs: A `[1, in, rank]`, B `[1, rank, out]`, DoRA's scale `[1, 1, out]`."""
    is_embedding = isinstance(point.kind, Embedding)
    if is_embedding:
        a, b = layer.lora_embedding_A["default"], layer.lora_embedding_B["default"]
    else:
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    a = a.detach().double().flatten(1).numpy()  # [rank, in]
    b = _unfold_groups(b.detach().double().flatten(1).numpy(), _groups(point)) * layer.scaling["default"]
    tensors = {point.lora_a: a.T[None], point.lora_b: b.T[None]}
    if "default" in layer.lora_magnitude_vector:
        magnitude = layer.lora_magnitude_vector["default"].weight.detach().double().numpy().reshape(-1)
        weight = layer.get_base_layer().weight.detach().double().flatten(1).numpy()
        if is_embedding or getattr(layer, "fan_in_fan_out", False):
            weight = weight.T
        # DoRA (Liu et al. 2024), equation 5: magnitude / ‖W0 + B A‖, by output.
        tensors[point.dora_scale] = (magnitude / np.linalg.norm(weight + b @ a, axis=1))[None, None]
    return {name: np.ascontiguousarray(value).astype(point.dtype) for name, value in tensors.items()}


def _unfold_groups(b: Array, groups: int) -> Array:
    """B of a convolution in groups, `[out, rank]`, as the product of all groups' factors takes it: `[out, groups ·
    rank]`, each group's outputs beside its own columns."""
    if groups == 1:
        return b
    outputs, rank = len(b) // groups, b.shape[1]
    blocks = np.zeros((len(b), rank * groups))
    for group in range(groups):
        rows = slice(group * outputs, (group + 1) * outputs)
        blocks[rows, group * rank : (group + 1) * rank] = b[rows]
    return blocks
