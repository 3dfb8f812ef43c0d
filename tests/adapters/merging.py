"""PEFT's merge as the oracle: a small model of every kind of module, adapters of it with random numbers, and what an
adapter that was read makes of its weights."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from onnx_lora import read_adapter
from onnx_lora.adapters import Adapter, Change, Delta, MatrixDelta
from onnx_lora.errors import OnnxLoraError
from onnx_lora.kinds import EMBEDDING, LINEAR, Conv, Embedding, Kind
from onnx_lora.points import Array
from tests.adapters.building import BASE_CONFIG, peft_folder
from tests.support.numbers import assert_close

os.environ["HF_HUB_OFFLINE"] = "1"
torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
Conv1D = pytest.importorskip("transformers.pytorch_utils").Conv1D


class Net(torch.nn.Module):
    """Modules side by side, each with an output of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = torch.nn.Embedding(11, 12)
        self.lin = torch.nn.Linear(12, 8)
        self.wide = torch.nn.Linear(12, 24, bias=False)
        self.mlp = Conv1D(10, 12)
        self.conv1 = torch.nn.Conv1d(4, 6, 3, padding=1)
        self.conv2 = torch.nn.Conv2d(4, 6, 3, padding=1, stride=2)
        self.point = torch.nn.Conv2d(4, 6, 1)
        self.conv3 = torch.nn.Conv3d(2, 4, 2)
        self.grouped = torch.nn.Conv2d(4, 6, 3, groups=2)
        self.norm = torch.nn.LayerNorm(12)
        self.head = torch.nn.Linear(12, 3)

    def forward(self, ids, rows, line, image, volume):
        return (
            self.emb(ids),
            *(module(rows) for module in (self.lin, self.wide, self.mlp, self.norm, self.head)),
            self.conv1(line),
            *(module(image) for module in (self.conv2, self.point, self.grouped)),
            self.conv3(volume),
        )


def net(dtype: Any = torch.float32) -> Any:
    torch.manual_seed(3)
    model = Net()
    with torch.no_grad():  # Conv1D's own start is small, and its bias zero.
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.5)
    return model.to(dtype).eval()


def inputs(dtype: Any = torch.float32) -> tuple[Any, ...]:
    torch.manual_seed(4)
    shapes = ((2, 3, 12), (2, 4, 9), (2, 4, 6, 6), (2, 2, 4, 4, 4))
    return (torch.tensor([[0, 3, 10], [5, 5, 1]]), *(torch.randn(shape).to(dtype) for shape in shapes))


def wrapped(config: Any, *, spread: float = 0.3, dtype: Any = torch.float32, model: Any = None) -> Any:
    """The model with an adapter of random numbers that change something."""
    peft_model = peft.get_peft_model(model or net(dtype), config, autocast_adapter_dtype=False).eval()
    torch.manual_seed(5)
    with torch.no_grad():
        for name, parameter in peft_model.named_parameters():
            if parameter.requires_grad:
                factor = 0.1 if "magnitude" in name else spread
                parameter.add_(torch.randn_like(parameter) * factor)
    return peft_model


def saved(peft_model: Any, folder: Path) -> Adapter:
    peft_model.save_pretrained(folder)
    return read_adapter(folder)


def applied(weight: Array, delta: Delta | MatrixDelta, kind: Kind = LINEAR) -> Array:
    """A weight in torch's layout with a delta, in float64."""
    is_table = isinstance(delta.kind if isinstance(delta, Delta) else kind, Embedding)
    groups = len(delta.a) // delta.b.shape[1]
    assert groups == 1, "of a convolution in groups there is no sum"
    product = delta.b.astype(np.float64) @ delta.a.astype(np.float64).reshape(len(delta.a), -1) * delta.scale
    total = weight.astype(np.float64) + (product.T if is_table else product).reshape(weight.shape)
    if delta.magnitude is None:
        return total
    axes = (0,) if is_table else tuple(range(1, weight.ndim))
    norms = np.sqrt((total**2).sum(axis=axes, keepdims=True))
    return total * delta.magnitude.astype(np.float64).reshape(norms.shape) / norms


def changed(weight: Array, change: Change, kind: Kind) -> Array:
    """The weight that a change makes; its other faces must say the same."""
    before = weight.copy()
    assert change.explain_misfit(weight.shape, kind) is None
    merged = change.apply_to(weight)
    assert merged.dtype == weight.dtype
    assert np.array_equal(weight, before)
    delta, scale = change.as_factors(weight), change.output_scale()
    if delta is not None:
        assert len(delta.a) * (weight.size // len(weight) + len(weight)) <= weight.size
        assert_close(applied(weight, delta, kind), merged)
    if scale is not None:
        assert_close(weight * scale.reshape(-1, *(1,) * (weight.ndim - 1)), merged)
    return merged


def kind_of(module: Any) -> Kind:
    if isinstance(module, torch.nn.Embedding):
        return EMBEDDING
    return LINEAR if isinstance(module, (torch.nn.Linear, Conv1D)) else Conv(tuple(module.kernel_size), module.groups)


def weights_with(model: Any, adapter: Adapter) -> dict[str, Array]:
    """All parameters of the base model under an adapter."""
    state = {name: value.numpy().copy() for name, value in model.state_dict().items()}
    for name, replacement in adapter.replacements.items():
        if replacement.operation == "set":
            state[name] = replacement.value
        elif name in state or replacement.operation == "add":
            own = state[name].astype(np.float64)
            state[name] = own + replacement.value if replacement.operation == "add" else own * replacement.value
    for name in (*adapter.deltas, *adapter.changes):
        module = model.get_submodule(name)
        stored = state[f"{name}.weight"]
        weight = np.ascontiguousarray(stored.T) if isinstance(module, Conv1D) else stored
        if name in adapter.deltas:
            new = applied(weight, adapter.deltas[name])
        else:
            new = changed(weight, adapter.changes[name], kind_of(module))
        state[f"{name}.weight"] = new.T if isinstance(module, Conv1D) else new
    return state


def assert_is_peft(
    peft_model: Any, folder: Path, *, merge: bool = True, base: Any = None, runs: bool = True
) -> Adapter:
    """What is read from the saved adapter gives PEFT's merged weights, and its unmerged outputs."""
    adapter = saved(peft_model, folder)
    model = base or net()
    state = weights_with(model, adapter)
    if runs:
        model.load_state_dict({name: torch.from_numpy(np.array(value)) for name, value in state.items()})
        with torch.no_grad():
            expected, actual = peft_model(*inputs()), model(*inputs())
        for index, (own, reference) in enumerate(zip(actual, expected, strict=True)):
            assert_close(own.numpy(), reference.numpy()), f"output {index}"
    if merge:
        with torch.no_grad():
            reference = peft_model.merge_and_unload().state_dict()
        assert set(reference) == set(state)
        for name, value in reference.items():
            assert_close(np.asarray(state[name]), value.detach().numpy())
    return adapter


def assert_refuses_other_shapes(adapter: Adapter, model: Any) -> None:
    """A weight that the tensors are not for is named with its shape."""
    for name, change in adapter.changes.items():
        module = model.get_submodule(name)
        for wrong in ((1,) * module.weight.ndim, (7,)):
            text = change.explain_misfit(wrong, kind_of(module))
            assert text is not None, name
            assert str(wrong) in text, text
        assert change.explain_misfit(tuple(module.weight.shape), Conv() if kind_of(module) == EMBEDDING else EMBEDDING)


def assert_no_tensor_is_ignored(folder: Path, unread: str = "nothing") -> None:
    """Whatever tensor of the file is another one, the weights are, or it is refused."""
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    before = weights_with(net(), read_adapter(folder))
    for name, values in tensors.items():
        other = values[..., ::-1] if values.dtype.kind in "iu" else values * np.float32(1.5) + np.float32(0.25)
        save_file({**tensors, name: np.ascontiguousarray(other)}, file)
        try:
            after = weights_with(net(), read_adapter(folder))
        except OnnxLoraError:
            continue
        same = all(np.array_equal(value, after[parameter]) for parameter, value in before.items())
        assert same == (unread in name), f"{name} changes {'nothing' if same else 'the weights'}"


def method_folder(folder: Path, tensors: Mapping[str, Array], method: str, **config: Any) -> Path:
    """A folder of another method than LoRA, with the fields that are given."""
    folder = peft_folder(folder, tensors, remove=[*BASE_CONFIG])
    fields = {"peft_type": method, "target_modules": ["q", "v"], **config}
    (folder / "adapter_config.json").write_text(json.dumps(fields))
    return folder
