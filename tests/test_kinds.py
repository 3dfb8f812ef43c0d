"""Embeddings, convolutions and DoRA: delta equals fold equals PEFT in PyTorch, row by row too."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from onnx_lora import AdapterSession, Package, bind, fold, fold_to, read_adapter, write_bound
from onnx_lora.adapters import Delta
from onnx_lora.errors import BindError, SelectionError
from onnx_lora.exporter import export
from onnx_lora.kinds import Conv
from tests.adapters.building import adapter
from tests.support.numbers import assert_close, assert_same_bits

# PEFT's, of convolutions in groups.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

IDS = torch.tensor([[3, 1, 4, 1, 5, 9], [2, 6, 5, 3, 5, 8], [9, 7, 9, 3, 2, 3]])
GROUPED = ["space_1", "grouped"]


class Net(nn.Module):
    """One of every kind, with and without biases, two of them called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 8)
        self.line = nn.Conv1d(8, 6, 3, stride=2, padding=1)
        self.grouped = nn.Conv1d(6, 6, 1, groups=2)
        self.plane = nn.Conv2d(1, 4, (3, 2), padding=(1, 0), bias=False)
        self.transposed = Conv1D(7, 4 * 5)
        self.head = nn.Linear(7, 5)

    def forward(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = self.embed(ids).transpose(1, 2)
        x = torch.tanh(self.grouped(self.line(x)))
        x = torch.tanh(self.plane(x.unsqueeze(1)))
        x = torch.tanh(self.transposed(x[:, :, :5].permute(0, 3, 1, 2).flatten(2)))
        return self.head(x), self.head(x.mean(1))


def _net() -> Net:
    torch.manual_seed(0)
    return Net().eval()


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Package:
    return _export(tmp_path_factory.mktemp("kinds") / "plain")


@pytest.fixture(scope="module")
def dora(tmp_path_factory: pytest.TempPathFactory) -> Package:
    return _export(tmp_path_factory.mktemp("kinds") / "dora", dora=True)


def _export(out: Path, **options: Any) -> Package:
    """Verified against PyTorch and PEFT on the way."""
    return export(
        _net(),
        out,
        example_inputs=(IDS,),
        input_names=["ids"],
        output_names=["tokens", "pooled"],
        targets="all",
        **options,
    )


EVERY = ["embed", "line", "grouped", "plane", "transposed", "head"]


def _adapter(folder: Path, *, seed: int = 1, targets: list[str] = EVERY, **config: Any) -> Path:
    torch.manual_seed(seed)
    settings = {"r": 4, "lora_alpha": 6, "init_lora_weights": False, "rank_pattern": {"embed": 2}} | config
    model = get_peft_model(_net(), LoraConfig(target_modules=targets, **settings))  # type: ignore[arg-type]
    for name, parameter in model.named_parameters():
        if "magnitude" in name:
            parameter.data *= 1 + torch.rand_like(parameter)
    model.save_pretrained(folder)
    return folder


def _peft(folder: Path) -> list[np.ndarray[Any, Any]]:
    model = PeftModel.from_pretrained(_net(), folder).eval()  # type: ignore[arg-type]
    with torch.inference_mode():
        return [value.numpy() for value in model(IDS)]


def _feeds() -> dict[str, Any]:
    return {"ids": IDS.numpy()}


def _all_close(actual: list[Any], expected: list[Any]) -> None:
    for one, other in zip(actual, expected, strict=True):
        assert_close(one, other)


def _sessions(package: Package, *paths: Path) -> Iterator[AdapterSession]:
    session = AdapterSession(package)
    for path in paths:
        session.load_adapter(path.name, path)
    yield session


def test_every_kind_gets_a_point(package: Package) -> None:
    kinds = {name: point.kind.name for name, point in package.points.items()}
    assert kinds == {
        "embed": "embedding",
        "line": "conv",
        "grouped": "conv",
        "plane": "conv",
        "transposed": "linear",
        "head": "linear",
    }
    # Of `transposed`, torch merges positions and channels into one Reshape before it.
    assert all(point.per_row for point in package.points.values())
    assert {name: point.bias for name, point in package.points.items()} == {
        **dict.fromkeys(["line", "grouped", "transposed", "head"], "added"),
        **dict.fromkeys(["embed", "plane"], "none"),
    }


def test_all_linear_leaves_embeddings_and_convolutions_out(tmp_path: Path) -> None:
    out = export(_net(), tmp_path / "out", example_inputs=(IDS,), verify=False)
    assert set(out.points) == {"transposed", "head"}
    folder = _adapter(tmp_path / "a", targets=["embed", "line"])
    with pytest.raises(BindError, match="export again with `targets=` including embed"):
        bind(read_adapter(folder), out)


def test_rank_zero_equals_the_base_graph(package: Package, dora: Package) -> None:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    for each in (package, dora):
        graph = each.graph()
        files = (graph.file, graph.base_file)
        answers = [ort.InferenceSession(str(each.path / file), options).run(None, _feeds()) for file in files]
        for one, other in zip(*answers, strict=True):
            assert_same_bits(one, other)


def test_delta_equals_fold_equals_peft(package: Package, tmp_path: Path) -> None:
    folder = _adapter(tmp_path / "a", targets=[name for name in EVERY if name != "grouped"])
    (session,) = _sessions(package, folder)
    expected = _peft(folder)
    _all_close(session.run(None, _feeds(), adapter="a"), expected)
    _all_close(fold(package, folder).run(None, _feeds()), expected)
    fold_to(package, folder, tmp_path / "folded")
    _all_close(ort.InferenceSession(str(tmp_path / "folded" / "model.onnx")).run(None, _feeds()), expected)


def test_a_convolution_in_groups_runs_and_does_not_fold(package: Package, tmp_path: Path) -> None:
    folder = _adapter(tmp_path / "a")
    (session,) = _sessions(package, folder)
    _all_close(session.run(None, _feeds(), adapter="a"), _peft(folder))
    with pytest.raises(BindError, match="grouped: LoRA on a convolution in 2 groups"):
        fold(package, folder)


@pytest.mark.parametrize("rslora", [False, True])
def test_dora_equals_fold_equals_peft(dora: Package, tmp_path: Path, rslora: bool) -> None:
    targets = [name for name in EVERY if name != "grouped"]
    folder = _adapter(tmp_path / "a", targets=targets, use_dora=True, use_rslora=rslora)
    (session,) = _sessions(dora, folder)
    expected = _peft(folder)
    _all_close(session.run(None, _feeds(), adapter="a"), expected)
    _all_close(fold(dora, folder).run(None, _feeds()), expected)


def test_dora_without_its_input_folds_and_says_so(package: Package, tmp_path: Path) -> None:
    folder = _adapter(tmp_path / "a", targets=["embed", "head"], use_dora=True)
    bound = bind(read_adapter(folder), package)
    assert set(bound.coverage.fold_only) == {"embed", "head"}
    _all_close(fold(package, folder).run(None, _feeds()), _peft(folder))
    with pytest.raises(BindError, match="head: the package takes no scale of its outputs: export again with"):
        AdapterSession(package).load_adapter("a", folder)
    with pytest.raises(BindError, match="export again with `dora=True`"):
        write_bound(bound, tmp_path / "a.onnx_adapter", format="onnx_adapter")


def test_rows_equal_the_single_runs(dora: Package, tmp_path: Path) -> None:
    targets = ["embed", "line", "plane", "head"]
    one = _adapter(tmp_path / "one", targets=targets, use_dora=True)
    other = _adapter(tmp_path / "other", seed=2, r=8, targets=["embed", "line", "grouped", "head"])
    (session,) = _sessions(dora, one, other)
    singles = [session.run(None, _feeds(), adapter=name) for name in ("one", None, "other")]
    rows = session.run(None, _feeds(), adapter=["one", None, "other"])
    for index, single in enumerate(singles):
        _all_close([value[index] for value in rows], [value[index] for value in single])


def test_blends_add_and_dora_does_not(dora: Package, tmp_path: Path) -> None:
    folding = [name for name in EVERY if name != "grouped"]
    one, other = (_adapter(tmp_path / name, seed=seed, targets=folding) for seed, name in enumerate(("one", "other")))
    magnitude = _adapter(tmp_path / "magnitude", targets=["head"], use_dora=True)
    (session,) = _sessions(dora, one, other, magnitude)
    half = session.run(None, _feeds(), adapter={"one": 0.25, "other": 0.75})
    _all_close(half, fold(dora, {one: 0.25, other: 0.75}).run(None, _feeds()))
    _all_close(
        session.run(None, _feeds(), adapter={"one": 1.0, "other": 0.0}), session.run(None, _feeds(), adapter="one")
    )
    with pytest.raises(SelectionError, match=r"head: its change .* does not add"):
        session.run(None, _feeds(), adapter={"one": 0.5, "magnitude": 0.5})


@pytest.mark.parametrize("kind", ["safetensors", "onnx_adapter"])
def test_converted_files_bind_to_the_same_tensors(dora: Package, tmp_path: Path, kind: Any) -> None:
    for index, options in enumerate(({}, {"use_dora": True, "targets": ["embed", "plane", "head"]})):
        bound = bind(read_adapter(_adapter(tmp_path / f"a{index}", **options)), dora)  # type: ignore[arg-type]
        file = write_bound(bound, tmp_path / f"a{index}.{kind}", format=kind)
        again = bind(read_adapter(file), dora)
        assert set(again.tensors) == set(bound.tensors)
        for name, tensor in bound.tensors.items():
            assert_same_bits(again.tensors[name], tensor)


def test_a_delta_of_another_kind_or_kernel_is_refused(package: Package) -> None:
    numbers = np.ones((2, 7), np.float32)
    wrong = {
        "embed": Delta(np.ones((2, 10), np.float32), np.ones((8, 2), np.float32), 1.0),
        "line": Delta(np.ones((2, 12, 2), np.float32), np.ones((6, 2), np.float32), 1.0, Conv((2,))),
        "head": Delta(numbers, np.ones((5, 2), np.float32), 1.0, magnitude=np.ones(4, np.float32)),
    }
    with pytest.raises(BindError) as caught:
        bind(adapter(wrong), package)
    text = str(caught.value)
    assert "embed: the delta is for a linear module, and the package has an embedding there" in text
    assert "line: lora_A must have shape (rank, 8, 3), and has (2, 12, 2)" in text
    assert "head: DoRA's magnitude must have shape (5,), and has (4,)" in text


def test_biases_can_be_replaced_alone(tmp_path: Path) -> None:
    package = _export(tmp_path / "out", replaceable=["line.bias"])
    assert set(package.replaceable) == {"line.bias"}
    folder = _adapter(tmp_path / "a", targets=["line"], rank_pattern={}, bias="lora_only")
    model = PeftModel.from_pretrained(_net(), folder)  # type: ignore[arg-type]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("base_layer.bias"):
                parameter += 1.0
    model.save_pretrained(folder)
    (session,) = _sessions(package, folder)
    _all_close(session.run(None, _feeds(), adapter="a"), _peft(folder))
    _all_close(fold(package, folder).run(None, _feeds()), _peft(folder))


def test_a_table_of_another_length_takes_the_place_of_the_base_s(tmp_path: Path) -> None:
    package = export(
        _net(), tmp_path / "out", example_inputs=(IDS,), input_names=["ids"], replaceable=["embed"], verify=False
    )
    values = np.random.default_rng(0).standard_normal((12, 8)).astype(np.float32)
    bound = bind(adapter({}, {"embed.weight": values}), package)
    net = _net()
    net.embed = nn.Embedding.from_pretrained(torch.from_numpy(values))
    ids = torch.full_like(IDS, 11)
    with torch.inference_mode():
        expected = [value.numpy() for value in net(ids)]
    session = AdapterSession(package)
    session.load_adapter("resized", bound)
    _all_close(session.run(None, {"ids": ids.numpy()}, adapter="resized"), expected)
    _all_close(fold(package, bound).run(None, {"ids": ids.numpy()}), expected)
