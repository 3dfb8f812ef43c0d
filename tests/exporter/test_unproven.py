"""Graphs that optimisers changed: a point is exact, or proven against the checkpoint, or refused by name."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import peft
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from onnx_lora import AdapterSession, Package, bind, fold, read_adapter
from onnx_lora.errors import BindError, ModelError, VerificationError
from onnx_lora.exporter import attach, export
from onnx_lora.exporter.verification.verify import verify
from onnx_lora.quantized import Scheme, is_rounded, quantize
from tests.support.exporters import HAS_OPTIMUM, VIA
from tests.support.numbers import assert_close

Net = Callable[[], nn.Module]
Make = Callable[[str], Path]
X = torch.linspace(-1, 1, 18).reshape(3, 6)
SHAPES = ({0: torch.export.Dim("batch")},)


class CalledTwice(nn.Module):
    """`q` is applied to the input and to a constant, which exporters and optimisers compute in advance."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.fc = nn.Linear(6, 6), nn.Linear(6, 4)
        self.rel = nn.Parameter(torch.randn(5, 6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        answer: torch.Tensor = self.fc(torch.tanh(self.q(x) @ self.q(self.rel).T @ self.rel / 6))
        return answer


class UsedByAFunction(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.fc = nn.Linear(6, 6), nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        answer: torch.Tensor = self.fc(torch.tanh(self.q(x)) + nn.functional.linear(x.cos(), self.q.weight))
        return answer


class Doubled(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * 2


class OfASubclass(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.fc = Doubled(6, 6), nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        answer: torch.Tensor = self.fc(torch.tanh(self.q(x)))
        return answer


class Plain(OfASubclass):
    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(6, 6)


class Spelled(nn.Linear):
    """A forward of its own that computes what Linear's does, as Falcon has it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight.T + self.bias


class SpelledOut(OfASubclass):
    def __init__(self) -> None:
        super().__init__()
        self.q = Spelled(6, 6)


class Attending(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn, self.fc = nn.MultiheadAttention(6, 2, batch_first=True), nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = torch.stack([x, x * 2], 1)
        answer: torch.Tensor = self.fc(self.attn(rows, rows, rows, need_weights=False)[0].mean(1))
        return answer


def _made(net: Net) -> nn.Module:
    torch.manual_seed(0)
    return net().eval()


def _graph(net: Net, file: Path, *, dynamo: bool, x: torch.Tensor = X, **options: Any) -> Path:
    if dynamo:
        options = {"dynamic_shapes": SHAPES, "verbose": False} | options
    else:
        options = {"dynamic_axes": {"x": {0: "batch"}, "y": {0: "batch"}}} | options
    names = {"input_names": ["x"], "output_names": ["y"]}
    torch.onnx.export(_made(net), (x,), str(file), dynamo=dynamo, **names, **options)
    return file


def _optimised(file: Path, level: str = "ORT_ENABLE_BASIC") -> Path:
    """What ONNX Runtime saves of a graph."""
    target = file.with_name("optimised.onnx")
    options = ort.SessionOptions()
    options.graph_optimization_level = getattr(ort.GraphOptimizationLevel, level)
    options.optimized_model_filepath = str(target)
    ort.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    return target


def _checkpoint(net: Net, folder: Path) -> Path:
    folder.mkdir()
    save_file({key: value.clone() for key, value in _made(net).state_dict().items()}, folder / "model.safetensors")
    return folder


def _adapter(net: Net, folder: Path, *targets: str) -> Path:
    torch.manual_seed(1)
    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=list(targets), init_lora_weights=False)
    peft.get_peft_model(_made(net), config).save_pretrained(folder)
    return folder


def _by_peft(net: Net, adapter: Path, x: torch.Tensor = X) -> np.ndarray[Any, Any]:
    with torch.no_grad():
        answer: np.ndarray[Any, Any] = peft.PeftModel.from_pretrained(_made(net), adapter).eval()(x).numpy()
    return answer


def _reasons(package: Package) -> str:
    return "\n".join(entry.reason for graph in package.manifest.graphs for entry in graph.unplaced)


@pytest.mark.parametrize("dynamo", [False, True], ids=["torchscript", "dynamo"])
def test_a_plain_export_has_no_unproven_points(dynamo: bool, tmp_path: Path) -> None:
    package = attach(_graph(Plain, tmp_path / "m.onnx", dynamo=dynamo), tmp_path / "out")
    assert set(package.points) == {"q", "fc"}
    assert not package.unproven


@pytest.mark.parametrize(
    "name", ["bert", "deberta_v2", "falcon", "gemma", "gpt2", "llama_tied", "t5", "vit", "whisper"]
)
def test_optimums_graphs_have_no_unproven_points(name: str, packages: Make, checkpoints: Make, tmp_path: Path) -> None:
    package = Package.open(packages(name))
    assert not package.unproven
    for graph in package.manifest.graphs:
        file = package.path / graph.base_file
        assert not attach(file, tmp_path / graph.name, targets="all").unproven
        proven = attach(file, tmp_path / f"{graph.name} by weights", targets="all", checkpoint=checkpoints(name))
        assert not proven.unproven


@pytest.mark.parametrize("given", ["names", "checkpoint"])
@pytest.mark.parametrize("by", ["dynamo itself", "ONNX Runtime"])
def test_where_a_call_may_have_been_folded_points_are_unproven(by: str, given: str, tmp_path: Path) -> None:
    file = _graph(CalledTwice, tmp_path / "m.onnx", dynamo=by == "dynamo itself")
    file = file if by == "dynamo itself" else _optimised(file)
    checkpoint = _checkpoint(CalledTwice, tmp_path / "checkpoint") if given == "checkpoint" else None
    package = attach(file, tmp_path / "out", checkpoint=checkpoint)
    adapter = _adapter(CalledTwice, tmp_path / "adapter", "q", "fc")
    assert set(package.unproven) >= {"q", "fc"}
    with pytest.raises(BindError, match=r"fc, q: unproven, because .*`verify`"):
        AdapterSession(package).load_adapter("a", adapter)
    with pytest.raises(BindError, match="unproven"):
        fold(package, adapter)


def test_whoever_allows_unproven_points_is_told_of_them(tmp_path: Path) -> None:
    package = attach(_optimised(_graph(Plain, tmp_path / "m.onnx", dynamo=False)), tmp_path / "out")
    adapter = _adapter(Plain, tmp_path / "adapter", "q")
    session = AdapterSession(package)
    bound = session.load_adapter("a", adapter, allow_unproven=True)
    assert any("unproven, because the graph was optimised" in note for note in bound.coverage.notes)
    feeds = {"x": X.numpy()}
    assert_close(session.run(None, feeds, adapter="a")[0], _by_peft(Plain, adapter))
    assert_close(fold(package, adapter, allow_unproven=True).run(None, feeds)[0], _by_peft(Plain, adapter))
    opened = Package.open(package.path, allow_unproven=True)
    assert_close(fold(opened, adapter).run(None, feeds)[0], _by_peft(Plain, adapter))


def test_a_checkpoint_proves_the_weights_of_an_optimised_graph(tmp_path: Path) -> None:
    file = _optimised(_graph(Plain, tmp_path / "m.onnx", dynamo=False))
    assert attach(file, tmp_path / "by_name").unproven
    assert not attach(file, tmp_path / "proven", checkpoint=_checkpoint(Plain, tmp_path / "checkpoint")).unproven


class Clamped(nn.Linear):
    """The same as Linear on small inputs, which one example does not tell."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x).clamp(-30, 30)


class OfClamped(OfASubclass):
    def __init__(self) -> None:
        super().__init__()
        self.q = Clamped(6, 6)


class Twins(nn.Module):
    """Two modules with one weight on one input, of which exporters make one."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.other, self.fc = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 4)
        self.other.weight, self.other.bias = self.q.weight, self.q.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        answer: torch.Tensor = self.fc(torch.tanh(self.q(x)) + torch.sigmoid(self.other(x)))
        return answer


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(6, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.proj.weight, self.proj.bias)


class UsedByItsParent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block, self.fc = Block(), nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        answer: torch.Tensor = self.fc(torch.tanh(self.block(x)))
        return answer


@pytest.mark.parametrize("net", [CalledTwice, UsedByAFunction, OfASubclass, OfClamped, Twins, UsedByItsParent])
@pytest.mark.parametrize("verified", [False, True])
def test_where_torch_is_at_hand_only_what_is_exact_gets_a_point(net: Net, verified: bool, tmp_path: Path) -> None:
    names = {"input_names": ["x"], "output_names": ["y"], "dynamic_shapes": SHAPES}
    package = export(_made(net), tmp_path / "out", example_inputs=(X,), verify=verified, **names)
    assert set(package.points) == {"fc"}
    assert not package.unproven
    adapter = _adapter(net, tmp_path / "adapter", "fc")
    session = AdapterSession(package)
    session.load_adapter("a", adapter)
    assert_close(session.run(None, {"x": X.numpy()}, adapter="a")[0], _by_peft(net, adapter))


def test_a_subclass_that_computes_the_same_gets_its_point(tmp_path: Path) -> None:
    names = {"input_names": ["x"], "output_names": ["y"], "dynamic_shapes": SHAPES}
    package = export(_made(SpelledOut), tmp_path / "out", example_inputs=(X,), **names)
    assert set(package.points) == {"q", "fc"}


def test_a_module_that_computes_more_than_its_product_is_unproven(tmp_path: Path) -> None:
    scripted = attach(_graph(OfASubclass, tmp_path / "ts.onnx", dynamo=False), tmp_path / "ts")
    assert "computes a Mul (/q/Mul) beside" in scripted.unproven["q"]
    traced = attach(_graph(OfASubclass, tmp_path / "dynamo.onnx", dynamo=True), tmp_path / "dynamo")
    assert "test_unproven.Doubled may compute more" in traced.unproven["q"]
    assert set(scripted.unproven) == set(traced.unproven) == {"q"}


@pytest.mark.parametrize("dynamo", [False, True], ids=["torchscript", "dynamo"])
def test_the_projection_that_multihead_attention_never_calls_gets_no_point(dynamo: bool, tmp_path: Path) -> None:
    file = _graph(Attending, tmp_path / "m.onnx", dynamo=dynamo)
    checkpoint = _checkpoint(Attending, tmp_path / "checkpoint")
    # The names that other exporters leave: only those of the weights.
    model = onnx.load(file)
    for node in model.graph.node:
        node.name = ""
        del node.metadata_props[:]
    onnx.save(model, tmp_path / "nameless.onnx")
    packages = [
        attach(file, tmp_path / "names"),
        attach(file, tmp_path / "weights", checkpoint=checkpoint),
        attach(tmp_path / "nameless.onnx", tmp_path / "nameless"),
    ]
    for package in packages:
        assert "fc" in package.points
        assert "attn.out_proj" not in package.points


class Convolved(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.gamma, self.fc = nn.Parameter(torch.rand(1, 8, 1, 1) + 2), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        answer: torch.Tensor = self.fc(torch.relu(self.conv(x) * self.gamma).mean((2, 3)))
        return answer


@pytest.mark.parametrize("named", [True, False], ids=["names", "checkpoint"])
def test_a_kernel_into_which_a_scale_was_multiplied_gets_no_point(named: bool, tmp_path: Path) -> None:
    picture = torch.linspace(-1, 1, 216).reshape(2, 3, 6, 6)
    file = _optimised(_graph(Convolved, tmp_path / "m.onnx", dynamo=False, x=picture))
    checkpoint = None if named else _checkpoint(Convolved, tmp_path / "checkpoint")
    package = attach(file, tmp_path / "out", targets="all", checkpoint=checkpoint)
    assert set(package.points) == {"fc"}
    assert "fused batch norm" in _reasons(package)


class Normed(nn.Module):
    """The product is the last thing, so that rounding the base blurs nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.q_proj = nn.LayerNorm(64), nn.Linear(64, 64, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        answer: torch.Tensor = self.q_proj(self.norm(x))
        return answer


def _smoothed(spread: float) -> Net:
    """The same function with a scale of each input of the product moved into the norm before it (SmoothQuant, AWQ)."""

    def make() -> nn.Module:
        net = Normed()
        generator = torch.Generator().manual_seed(5)
        scales = torch.exp((torch.rand(64, generator=generator) * 2 - 1) * spread)
        with torch.no_grad():
            net.norm.weight /= scales
            net.norm.bias /= scales
            net.q_proj.weight *= scales
        return net

    return make


def _in_four_bits(file: Path) -> Path:
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    quantizer = MatMulNBitsQuantizer(onnx.load(file), bits=4, block_size=32, is_symmetric=True)
    quantizer.process()
    target = file.with_name("quantized.onnx")
    quantizer.model.save_model_to_file(str(target))
    return target


@pytest.mark.parametrize("quantized", [False, True], ids=["float", "int4"])
@pytest.mark.parametrize("spread", [0.15, 1.0])
def test_a_weight_whose_inputs_were_scaled_gets_no_point(spread: float, quantized: bool, tmp_path: Path) -> None:
    rows = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(3))
    file = _graph(_smoothed(spread), tmp_path / "m.onnx", dynamo=False, x=rows)
    file = _in_four_bits(file) if quantized else file
    with pytest.raises(ModelError) as caught:
        attach(file, tmp_path / "out", checkpoint=_checkpoint(Normed, tmp_path / "checkpoint"))
    if spread < 1:
        assert "with its inputs scaled (SmoothQuant, AWQ" in str(caught.value)


def test_a_scale_too_small_to_be_told_from_rounding_is_a_doubt(tmp_path: Path) -> None:
    rows = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(3))
    file = _in_four_bits(_graph(_smoothed(0.01), tmp_path / "m.onnx", dynamo=False, x=rows))
    package = attach(file, tmp_path / "out", checkpoint=_checkpoint(Normed, tmp_path / "checkpoint"))
    assert "not the checkpoint's rounded to nearest" in package.unproven["q_proj"]


def test_a_quantized_weight_is_proven_by_its_checkpoint_alone(tmp_path: Path) -> None:
    rows = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(3))
    file = _in_four_bits(_graph(Normed, tmp_path / "m.onnx", dynamo=False, x=rows))
    assert "quantizers may move a scale of" in attach(file, tmp_path / "named").unproven["q_proj"]
    package = attach(file, tmp_path / "proven", checkpoint=_checkpoint(Normed, tmp_path / "checkpoint"))
    assert not package.unproven
    adapter = _adapter(Normed, tmp_path / "adapter", "q_proj")
    session = AdapterSession(package)
    session.load_adapter("a", adapter)
    feeds = {"x": rows.numpy()}
    with torch.no_grad():
        base = _made(Normed)(rows).numpy()
    moved = session.run(None, feeds, adapter="a")[0] - session.run(None, feeds)[0]
    assert_close(moved, _by_peft(Normed, adapter, rows) - base)


@pytest.mark.parametrize("scheme", ["symmetric blocks", "blocks with zero points", "a tensor", "channels"])
def test_what_rounding_to_nearest_gives_is_known_from_what_it_does_not(scheme: str) -> None:
    weight = np.random.default_rng(0).standard_normal((8, 64)).astype(np.float32)
    blocks = Scheme("blocks", 4, 32, -1, 8, 64)
    int8 = np.full((8, 64), -128, np.int8)
    layout, sample, zeros = {
        "symmetric blocks": (blocks, np.zeros((8, 2, 16), np.uint8), None),
        "blocks with zero points": (blocks, np.zeros((8, 2, 16), np.uint8), np.zeros((8, 1), np.uint8)),
        "a tensor": (Scheme("affine", 8, 0, -1, 8, 64), int8, None),
        "channels": (Scheme("affine", 8, 0, 0, 8, 64), int8, None),
    }[scheme]
    values, scale, zero_point = quantize(layout, weight, sample, zeros)
    assert is_rounded(layout, weight, values, scale, zero_point)
    assert not is_rounded(layout, weight * np.float32(1.01), values, scale, zero_point)
    assert not is_rounded(layout, weight * np.linspace(0.98, 1.02, 64, dtype=np.float32), values, scale, zero_point)


def test_tools_that_leave_their_name_are_believed(tmp_path: Path) -> None:
    file = _graph(Plain, tmp_path / "m.onnx", dynamo=False)
    for index, (what, change) in enumerate(
        {
            "onnxsim": lambda model: model.metadata_props.add(key="onnxsim.constant_folding", value="true"),
            "transformers optimiser": lambda model: setattr(model, "producer_name", "onnxruntime.transformers"),
        }.items()
    ):
        model = onnx.load(file)
        change(model)
        onnx.save(model, tmp_path / f"{index}.onnx")
        package = attach(tmp_path / f"{index}.onnx", tmp_path / f"out{index}")
        assert what in package.unproven["q"]


by_names_of_nodes = pytest.mark.skipif(
    not HAS_OPTIMUM, reason="needs TorchScript's names of nodes, which ONNX Runtime's optimiser keeps"
)


def _deberta(spread: float = 0.3) -> Any:
    """Its keys and queries are applied to relative positions too, which are constant."""
    import transformers

    torch.manual_seed(0)
    config = transformers.DebertaV2Config(
        vocab_size=100,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        relative_attention=True,
        pos_att_type=["p2c", "c2p"],
        share_att_key=True,
        position_buckets=8,
        norm_rel_ebd="layer_norm",
        max_position_embeddings=64,
        type_vocab_size=0,
        num_labels=3,
        initializer_range=spread,
    )
    return transformers.DebertaV2ForSequenceClassification(config).eval()


@by_names_of_nodes
def test_verify_proves_what_it_compares_and_writes_it_down(tmp_path: Path) -> None:
    _deberta().save_pretrained(tmp_path / "checkpoint")
    plain = export(tmp_path / "checkpoint", tmp_path / "plain", via=VIA, targets=["query_proj", "value_proj"])
    assert not plain.unproven
    for level, exact in (("ORT_DISABLE_ALL", True), ("ORT_ENABLE_BASIC", False)):
        folder = shutil.copytree(plain.path, tmp_path / level)
        file = _optimised(folder / plain.graph().base_file, level)
        (folder / plain.graph().file).unlink()
        package = attach(file, tmp_path / f"out_{level}", targets=["query_proj", "value_proj"])
        assert set(package.unproven) >= set(package.points)
        if exact:
            verify(package, tmp_path / "checkpoint")
            assert not Package.open(package.path).unproven
        else:
            with pytest.raises(VerificationError, match="adapter"):
                verify(package, tmp_path / "checkpoint")
            assert Package.open(package.path).unproven == package.unproven


@by_names_of_nodes
def test_verify_proves_no_call_that_is_too_weak_to_be_seen(tmp_path: Path) -> None:
    """With weights as small as transformers makes them, the missing calls move the outputs less than rounding does."""
    _deberta(0.02).save_pretrained(tmp_path / "checkpoint")
    targets = ["query_proj", "value_proj"]
    plain = export(tmp_path / "checkpoint", tmp_path / "plain", via=VIA, targets=targets)
    file = _optimised(plain.path / plain.graph().base_file)
    package = attach(file.rename(plain.path / "base.onnx"), tmp_path / "out", targets=targets)
    with pytest.raises(VerificationError, match=r"query_proj: torch calls .*query_proj 2 times|graph model, adapter"):
        verify(package, tmp_path / "checkpoint")
    assert Package.open(package.path).unproven


def test_verify_knows_decoders_without_a_cache(tmp_path: Path) -> None:
    import transformers

    torch.manual_seed(0)
    config = transformers.GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=60, n_positions=32)
    transformers.GPT2LMHeadModel(config).eval().save_pretrained(tmp_path / "checkpoint")
    plain = export(tmp_path / "checkpoint", tmp_path / "plain", via=VIA, task="text-generation", verify=False)
    package = attach(plain.path / plain.graph().base_file, tmp_path / "out")
    assert all(entry.agrees for entry in verify(package, tmp_path / "checkpoint"))


class Normalised(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.fc = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Linear(8, 4)
        self.bn.running_var.uniform_(2, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        answer: torch.Tensor = self.fc(torch.relu(self.bn(self.conv(x))).mean((2, 3)))
        return answer


@pytest.mark.parametrize("given", ["names", "checkpoint"])
def test_a_kernel_with_a_batch_norm_in_it_is_not_replaced(given: str, tmp_path: Path) -> None:
    """torch.onnx (dynamo) leaves such a kernel its name."""
    picture = torch.linspace(-1, 1, 216).reshape(2, 3, 6, 6)
    whole: dict[str, Any] = {"targets": "all", "replaceable": ["conv"]}
    out, file = tmp_path / "out", _graph(Normalised, tmp_path / "m.onnx", dynamo=True, x=picture)
    checkpoint = _checkpoint(Normalised, tmp_path / "checkpoint")
    make: dict[str, Callable[[], Package]] = {
        "names": lambda: attach(file, out, **whole),
        "checkpoint": lambda: attach(file, out, checkpoint=checkpoint, **whole),
    }
    with pytest.raises(ModelError, match="a batch norm is multiplied into its weight"):
        make[given]()


@pytest.mark.parametrize("dynamo", [False, True], ids=["torchscript", "dynamo"])
@pytest.mark.parametrize(
    "net, module, reason",
    [(Twins, "q", "other has the same weight|counted a call"), (UsedByItsParent, "block.proj", "around it|its class")],
)
def test_a_checkpoint_does_not_prove_calls(net: Net, module: str, reason: str, dynamo: bool, tmp_path: Path) -> None:
    file = _graph(net, tmp_path / "m.onnx", dynamo=dynamo)
    package = attach(file, tmp_path / "out", checkpoint=_checkpoint(net, tmp_path / "checkpoint"))
    assert re.search(reason, package.unproven[module])


class PreAdded(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x + 1)


class OfPreAdded(OfASubclass):
    def __init__(self) -> None:
        super().__init__()
        self.q = PreAdded(6, 6)


def test_what_a_module_adds_before_its_product_is_no_bias(tmp_path: Path) -> None:
    package = attach(_graph(OfPreAdded, tmp_path / "m.onnx", dynamo=False), tmp_path / "out")
    assert "computes a Add (/q/Add)" in package.unproven["q"]


class LookedUpTwice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.emb, self.fc = nn.Embedding(9, 6), nn.Linear(6, 4)
        self.register_buffer("places", torch.arange(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        answer: torch.Tensor = self.fc(torch.tanh(self.emb(x)) + self.emb(self.places))
        return answer


@pytest.mark.parametrize("dynamo", [False, True], ids=["torchscript", "dynamo"])
def test_rows_that_an_exporter_looked_up_itself_are_known(dynamo: bool, tmp_path: Path) -> None:
    numbers = torch.tensor([[1, 2, 3], [4, 5, 6]])
    file = _graph(LookedUpTwice, tmp_path / "m.onnx", dynamo=dynamo, x=numbers)
    package = attach(file, tmp_path / "out", targets="all")
    assert "may be what a call of it gave" in package.unproven["emb"]
    assert "fc" not in package.unproven


class NormedTwice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.fc = nn.LayerNorm(6), nn.Linear(6, 4)
        self.rel = nn.Parameter(torch.randn(5, 6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        answer: torch.Tensor = self.fc(self.norm(x) @ self.norm(self.rel).T @ self.rel)
        return answer


def test_a_norm_whose_other_call_is_gone_is_not_replaced(tmp_path: Path) -> None:
    whole: dict[str, Any] = {"replaceable": ["norm"], "targets": ["fc"]}
    names = {"input_names": ["x"], "output_names": ["y"], "dynamic_shapes": SHAPES}
    with pytest.raises(ModelError, match=r"torch calls norm 2 times|used by 2 nodes"):
        export(_made(NormedTwice), tmp_path / "out", example_inputs=(X,), verify=False, **names, **whole)
    file = _optimised(_graph(NormedTwice, tmp_path / "m.onnx", dynamo=False))
    package = attach(file, tmp_path / "attached", checkpoint=_checkpoint(NormedTwice, tmp_path / "c"), **whole)
    assert set(package.unproven) >= {"norm.weight", "norm.bias"}


def test_an_adapter_bound_with_leave_needs_leave_again(tmp_path: Path) -> None:
    package = attach(_optimised(_graph(Plain, tmp_path / "m.onnx", dynamo=False)), tmp_path / "out")
    bound = bind(read_adapter(_adapter(Plain, tmp_path / "adapter", "q")), package, allow_unproven=True)
    with pytest.raises(BindError, match="unproven"):
        AdapterSession(package).load_adapter("a", bound)
    with pytest.raises(BindError, match="unproven"):
        fold(package, bound)
    AdapterSession(package).load_adapter("a", bound, allow_unproven=True)
