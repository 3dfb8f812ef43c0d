"""The weights of a torch model's modules that can have LoRA, and what keeps a module from having it. It imports no
torch: classes are told by their names."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from onnx_lora.exporter.graph_kinds.graph_kind import GraphKind, graph_kinds
from onnx_lora.exporter.weights.checkpoint_weights import CheckpointWeight, CheckpointWeights
from onnx_lora.exporter.weights.never_called import NEVER_CALLED
from onnx_lora.points import Array, Bias

if TYPE_CHECKING:
    import torch
    from torch import nn

__all__ = ["overridden_class", "read_module_weights"]


def read_module_weights(model: nn.Module, *, heads: frozenset[str]) -> CheckpointWeights:
    """The modules of a torch model that can have LoRA: `nn.Linear`, transformers' `Conv1D`, convolutions and
    embeddings. `heads`: its output layers."""
    weights: list[CheckpointWeight] = []
    refused: dict[str, str] = {}
    names = Counter(id(module) for _, module in model.named_modules(remove_duplicate=False))
    for name, module in model.named_modules():
        plain = _plain_class(module)
        if plain is None:
            continue
        graph_kind = _kind_of_class(plain)
        assert graph_kind is not None  # of a plain class
        reason = _refusal(module, plain, graph_kind)
        if names[id(module)] > 1:
            reason = "PEFT wraps a module under its first name only: by others it is called without the adapter"
        if reason is not None:
            refused[name] = reason
            continue
        weight = module.weight
        shape = int(weight.shape[0]), math.prod(weight.shape[1:])
        bias: Bias = "none" if getattr(module, "bias", None) is None else "added"
        weights.append(CheckpointWeight(name, shape, partial(_read_tensor, weight), (graph_kind,), bias))
    modules = frozenset(weight.module for weight in weights)
    return CheckpointWeights(tuple(weights), modules, heads, refused=refused, vectors=_vectors_of(model))


def _vectors_of(model: nn.Module) -> dict[str, Callable[[], Array]]:
    """Every parameter and buffer of one axis, by each of its names."""
    vectors: dict[str, Callable[[], Array]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if tensor.ndim == 1 and tensor.is_floating_point():
            vectors[name] = partial(_read_vector, tensor)
    return vectors


def overridden_class(module: nn.Module) -> type[nn.Module] | None:
    """The class of torch's or transformers' whose forward a module has replaced by its own; None where it has not.

    PEFT adds its delta behind all of that, of which the graph shows only parts.
    """
    plain = _plain_class(module)
    # PEFT knows of one thing that a class of embeddings adds: a scale.
    if plain is None or (plain.__name__ == "Embedding" and hasattr(module, "embed_scale")):
        return None
    if type(module).forward is plain.forward and "forward" not in vars(module):
        return None
    return plain


def _plain_class(module: nn.Module) -> type[nn.Module] | None:
    """The class of torch's or transformers' that a module is or inherits from, if that computes x · W0."""
    for kind in type(module).__mro__:
        if _kind_of_class(kind) is not None:
            return kind
    return None


def _kind_of_class(plain: type) -> GraphKind | None:
    for graph_kind in graph_kinds():
        if plain.__name__ in graph_kind.torch_classes:
            return graph_kind
    return None


def _refusal(module: nn.Module, plain: type[nn.Module], graph_kind: GraphKind) -> str | None:
    """Why PEFT's delta beside a module's product would be something else than PEFT's delta beside the module, or
    None."""
    if module._forward_hooks or module._forward_pre_hooks:
        return "a hook may change what it takes in or gives"
    if any(kind.__name__ == "NonDynamicallyQuantizableLinear" for kind in type(module).__mro__):
        return NEVER_CALLED
    return graph_kind.refuse(module, plain)


def _read_tensor(tensor: torch.Tensor, part: tuple[slice, slice]) -> Array:
    return _as_array(tensor.detach().flatten(1)[part])


def _read_vector(tensor: torch.Tensor) -> Array:
    return _as_array(tensor.detach())


def _as_array(values: torch.Tensor) -> Array:
    # numpy has no bfloat16; float32 holds each of its values exactly.
    if str(values.dtype) == "torch.bfloat16":
        values = values.float()
    array: Array = values.cpu().numpy()
    return array
