"""LoRA with everything that it can hold, on every kind of module: what is read is what PEFT merges and computes."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from onnx_lora import read_adapter
from onnx_lora.errors import UnsupportedAdapterError
from onnx_lora.kinds import EMBEDDING, Conv, Linear
from tests.adapters import merging
from tests.adapters.merging import assert_is_peft, inputs, net, peft, saved, torch, wrapped
from tests.support.numbers import assert_close, assert_same_bits

pytestmark = [pytest.mark.filterwarnings("ignore")]

LINEAR = ["lin", "wide", "mlp"]
CONVOLUTIONS = ["conv1", "conv2", "point", "conv3"]

CASES: dict[str, dict[str, Any]] = {
    "linear": {"target_modules": LINEAR},
    "embedding": {"target_modules": ["emb", "lin"]},
    "convolutions": {"target_modules": CONVOLUTIONS},
    "rslora of every kind": {"target_modules": ["emb", "lin", *CONVOLUTIONS], "use_rslora": True},
    "patterns of every kind": {
        "target_modules": ["emb", "lin", "conv2"],
        "rank_pattern": {"emb": 3, "conv2": 5},
        "alpha_pattern": {"emb": 7, "lin": 1},
    },
    "dora, linear": {"target_modules": LINEAR, "use_dora": True},
    "dora, embedding": {"target_modules": ["emb", "lin"], "use_dora": True},
    "dora, convolutions": {"target_modules": CONVOLUTIONS, "use_dora": True},
    "dora with rslora": {"target_modules": LINEAR, "use_dora": True, "use_rslora": True},
    "bias on B": {"target_modules": ["lin", "mlp", "conv1", "conv2"], "lora_bias": True},
    "bias on B and trained biases": {"target_modules": ["lin", "mlp"], "lora_bias": True, "bias": "lora_only"},
    "all biases": {"target_modules": ["lin"], "bias": "all"},
    "trained norm": {"target_modules": ["lin"], "modules_to_save": ["norm"]},
    "saved head": {"target_modules": ["lin"], "modules_to_save": ["head"]},
    "eva": {"target_modules": ["lin"], "init_lora_weights": "eva"},
    "block-diagonal": {
        "target_modules": LINEAR,
        "r": 4,
        "use_bdlora": {
            "target_modules_bd_a": ["lin"],
            "target_modules_bd_b": ["wide"],
            "nblocks": 2,
            "match_strict": False,
        },
    },
    "velora": {"target_modules": ["lin"], "velora_config": {"num_groups": 4}},
    "a parameter beside modules": {"target_modules": ["conv2"], "target_parameters": ["lin.weight"]},
}


@pytest.mark.parametrize("settings", CASES.values(), ids=CASES.keys())
def test_lora_is_what_peft_merges_and_computes(tmp_path: Path, settings: dict[str, Any]) -> None:
    config = peft.LoraConfig(**({"r": 2, "lora_alpha": 3, "init_lora_weights": False} | settings))
    assert_is_peft(wrapped(config), tmp_path)
    merging.assert_no_tensor_is_ignored(tmp_path, "velora_embed")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("use_dora", [False, True])
def test_other_types_of_numbers_are_read(tmp_path: Path, dtype: Any, use_dora: bool) -> None:
    config = peft.LoraConfig(r=2, target_modules=["emb", "lin", "conv2"], use_dora=use_dora, init_lora_weights=False)
    model = wrapped(config, dtype=dtype)
    state = merging.weights_with(net(dtype).float(), saved(model, tmp_path))
    with torch.no_grad():
        reference = model.merge_and_unload().state_dict()
    for name, value in reference.items():
        assert_close(
            np.asarray(state[name]), value.double().numpy(), dtype="float32" if dtype is torch.float64 else "float16"
        )


def test_a_convolution_in_groups_has_a_grouped_b(tmp_path: Path) -> None:
    """PEFT merges none of it: its unmerged outputs are those of A on all channels, then B in groups."""
    model = wrapped(peft.LoraConfig(r=4, lora_alpha=3, target_modules=["grouped"], init_lora_weights=False))
    delta = saved(model, tmp_path).deltas["grouped"]
    assert (delta.a.shape, delta.b.shape, delta.kind) == ((4, 4, 3, 3), (6, 2), Conv((3, 3), 2))
    image = inputs()[3]
    with torch.no_grad():
        expected, base = model(*inputs())[9], net().grouped(image)
        inner = torch.nn.functional.conv2d(image, torch.from_numpy(np.array(delta.a)))
        b = torch.from_numpy(np.array(delta.b))[:, :, None, None]
        actual = base + torch.nn.functional.conv2d(inner, b, groups=2) * delta.scale
    assert_close(actual.numpy(), expected.numpy())


@pytest.mark.parametrize("spelling", ["", ".weight", ".default", ".default.weight"])
def test_every_spelling_of_doras_magnitude_is_read(tmp_path: Path, spelling: str) -> None:
    from safetensors.numpy import load_file, save_file

    adapter = saved(wrapped(peft.LoraConfig(r=2, target_modules=["lin"], use_dora=True)), tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file({key.replace("magnitude_vector", f"magnitude_vector{spelling}"): v for key, v in tensors.items()}, file)
    assert_same_bits(
        np.array(read_adapter(tmp_path).deltas["lin"].magnitude), np.array(adapter.deltas["lin"].magnitude)
    )


def test_methods_are_told_by_their_names(tmp_path: Path) -> None:
    for index, (settings, name) in enumerate(
        [({"use_dora": True}, "DoRA"), ({"use_rslora": True}, "rsLoRA"), ({}, "LoRA")]
    ):
        model = wrapped(peft.LoraConfig(r=2, target_modules=["lin"], **settings))
        assert saved(model, tmp_path / str(index)).origin.method == name


# --- QA-LoRA ---------------------------------------------------------------------------------------


def test_qalora_pools_the_inputs_of_gptqs_modules(tmp_path: Path) -> None:
    """PEFT's own variant on a stand-in of GPTQ's layer, which it needs a GPU for."""
    from peft.tuners.lora.variants import QALoraLinearVariant

    model = wrapped(peft.LoraConfig(r=2, lora_alpha=3, target_modules=["lin"], init_lora_weights=False))
    layer = model.base_model.model.lin
    with torch.no_grad():
        layer.lora_A["default"].weight = torch.nn.Parameter(layer.lora_A["default"].weight[:, :3])
    layer.qalora_group_size = {"default": 4}
    model.peft_config["default"].use_qalora, model.peft_config["default"].qalora_group_size = True, 4
    change = saved(model, tmp_path).changes["lin"]
    rows, base = inputs()[1], net().lin
    with torch.no_grad():
        expected = QALoraLinearVariant.forward(layer, "default", rows, base(rows))
        weight = torch.from_numpy(merging.changed(base.weight.numpy(), change, Linear()))
        assert_close((rows @ weight.T + base.bias).numpy(), expected.numpy())


def test_qalora_on_other_modules_is_plain(tmp_path: Path) -> None:
    config = peft.LoraConfig(r=2, target_modules=["lin"], use_qalora=True, qalora_group_size=4, init_lora_weights=False)
    adapter = assert_is_peft(wrapped(config), tmp_path)
    merging.assert_refuses_other_shapes(adapter, net())


def test_qalora_in_groups_of_one_is_ambiguous(tmp_path: Path) -> None:
    config = peft.LoraConfig(r=2, target_modules=["lin"], use_qalora=True, qalora_group_size=1, init_lora_weights=False)
    assert "does not tell" in (saved(wrapped(config), tmp_path).changes["lin"].explain_misfit((8, 12), Linear()) or "")


# --- bare parameters -------------------------------------------------------------------------------


class Experts(torch.nn.Module):
    def __init__(self, is_transposed: bool, hidden: int = 6, inner: int = 5) -> None:
        super().__init__()
        self.is_transposed = is_transposed
        self.gate_up_proj = torch.nn.Parameter(torch.randn(3, hidden, 2 * inner))
        self.down_proj = torch.nn.Parameter(torch.randn(3, inner, hidden))

    def forward(self, x):
        return x @ self.gate_up_proj, x[:, :, :5] @ self.down_proj


class Router(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(3, 6))
        self.other = torch.nn.Parameter(torch.randn(6, 4))

    def forward(self, x):
        return x @ self.weight.T, x @ self.other


class Mixture(torch.nn.Module):
    def __init__(self, is_transposed: bool, **sizes: int) -> None:
        super().__init__()
        self.experts, self.router = Experts(is_transposed, **sizes), Router()

    def forward(self, x):
        return (*self.experts(x), *self.router(x))


@pytest.mark.parametrize("is_transposed", [False, True])
@pytest.mark.parametrize(
    "targets, keys",
    [
        (["experts.down_proj"], {"experts.down_proj"}),
        (["experts.down_proj", "experts.gate_up_proj"], {"experts.down_proj", "experts.gate_up_proj"}),
        (["gate_up_proj", "router.weight"], {"experts.gate_up_proj", "router"}),
        (["router.weight", "router.other"], {"router", "router.other"}),
    ],
)
def test_lora_on_parameters_is_what_peft_merges(
    tmp_path: Path, is_transposed: bool, targets: list[str], keys: set[str]
) -> None:
    torch.manual_seed(1)
    base = Mixture(is_transposed)
    state = {name: value.numpy().copy() for name, value in base.state_dict().items()}
    config = peft.LoraConfig(
        r=2,
        lora_alpha=3,
        target_modules=[],
        target_parameters=targets,
        rank_pattern={r"experts\.down_proj": 3},
        init_lora_weights=False,
    )
    model = wrapped(config, model=base)
    adapter = saved(model, tmp_path)
    assert set(adapter.changes) == keys
    with torch.no_grad():
        reference = model.merge_and_unload().state_dict()
    for name, value in reference.items():
        change = adapter.changes.get(name.removesuffix(".weight"))
        weight = state[name]
        if change is not None:
            weight = merging.changed(weight, change, Linear())
            assert str((9, 9)) in (change.explain_misfit((9, 9), Linear()) or "")
        assert_close(weight, value.numpy())


def test_experts_of_equal_sides_are_ambiguous(tmp_path: Path) -> None:
    config = peft.LoraConfig(
        r=2, target_modules=[], target_parameters=["experts.gate_up_proj"], init_lora_weights=False
    )
    change = saved(wrapped(config, model=Mixture(False, hidden=10)), tmp_path).changes["experts.gate_up_proj"]
    problem = change.explain_misfit((3, 10, 10), Linear()) or ""
    assert "(3, 10, 10)" in problem
    assert "nothing in the file tells which axis" in problem


# --- trained tokens, tied and resized tables ---------------------------------------------------------


def llama(*, tied: bool) -> Any:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 2}
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(vocab_size=40, num_hidden_layers=1, tie_word_embeddings=tied, **sizes)
    ).eval()


def merged_llama(model: Any) -> dict[str, Any]:
    with torch.no_grad():
        return {name: value.numpy() for name, value in model.merge_and_unload().state_dict().items()}


@pytest.mark.parametrize("alone", [False, True])
def test_trained_tokens_are_what_peft_merges(tmp_path: Path, alone: bool) -> None:
    if alone:
        config = peft.TrainableTokensConfig(target_modules=["emb"], token_indices=[3, 10])
    else:
        config = peft.LoraConfig(r=2, target_modules=["lin"], trainable_token_indices={"emb": [3, 10]})
    adapter = assert_is_peft(wrapped(config), tmp_path)
    change = adapter.changes["emb"]
    assert change.as_factors(net().emb.weight.detach().numpy()).a.shape == (2, 11)
    for shape in ((10, 12), (11, 13), (11, 12, 1)):
        assert str(shape) in (change.explain_misfit(shape, EMBEDDING) or "")


def test_more_tokens_than_pay_fold_only(tmp_path: Path) -> None:
    config = peft.TrainableTokensConfig(target_modules=["emb"], token_indices=list(range(8)))
    adapter = assert_is_peft(wrapped(config), tmp_path)
    assert adapter.changes["emb"].as_factors(net().emb.weight.detach().numpy()) is None


def test_trained_tokens_of_a_tied_table_are_those_of_the_head_too(tmp_path: Path) -> None:
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=[1, 39])
    base = {name: value.numpy().copy() for name, value in llama(tied=True).state_dict().items()}
    model = wrapped(config, model=llama(tied=True))
    adapter = saved(model, tmp_path)
    change, reference = adapter.changes["model.embed_tokens"], merged_llama(model)
    assert not adapter.replacements
    table = base["model.embed_tokens.weight"]
    assert_close(merging.changed(table, change, EMBEDDING), reference["model.embed_tokens.weight"])
    assert_close(merging.changed(table, change.of_kind(Linear()), Linear()), reference["lm_head.weight"])


def test_tokens_of_several_modules_are_their_own(tmp_path: Path) -> None:
    indices = {"embed_tokens": [1, 2], "lm_head": [3]}
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=indices)
    changes = saved(wrapped(config, model=llama(tied=False)), tmp_path).changes
    assert {name: change.indices for name, change in changes.items()} == {
        "model.embed_tokens": (1, 2),
        "lm_head": (3,),
    }


def test_factors_of_tied_modules_are_both_read(tmp_path: Path) -> None:
    config = peft.LoraConfig(
        r=2, target_modules=["q_proj", "lm_head"], ensure_weight_tying=True, init_lora_weights=False
    )
    model = wrapped(config, model=llama(tied=True))
    base = llama(tied=True).state_dict()["lm_head.weight"].numpy()
    adapter = saved(model, tmp_path)
    assert {"model.embed_tokens", "lm_head"} < set(adapter.deltas)
    with torch.no_grad():
        head = model.base_model.model.lm_head.get_delta_weight("default").numpy()
        table = model.base_model.model.model.embed_tokens.get_delta_weight("default").numpy()
    assert_close(merging.applied(base, adapter.deltas["lm_head"]), base + head)
    assert_close(merging.applied(base, adapter.deltas["model.embed_tokens"]), base + table)


def test_a_saved_table_and_its_tied_head_are_both_whole(tmp_path: Path) -> None:
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["embed_tokens"], ensure_weight_tying=True)
    replacements = saved(wrapped(config, model=llama(tied=True)), tmp_path).replacements
    assert {name: whole.in_place for name, whole in replacements.items()} == {
        "model.embed_tokens.weight": False,
        "lm_head.weight": False,
    }


@pytest.mark.parametrize("targets", [["q_proj"], ["q_proj", "embed_tokens"]])
def test_resized_tables_are_whole_weights(tmp_path: Path, targets: list[str]) -> None:
    base = llama(tied=False)
    base.resize_token_embeddings(44)
    model = wrapped(peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False), model=base)
    model.save_pretrained(tmp_path, save_embedding_layers=True)
    adapter = read_adapter(tmp_path)
    assert adapter.replacements["model.embed_tokens.weight"].value.shape == (44, 16)
    assert ("model.embed_tokens" in adapter.deltas) == (len(targets) == 2)


# --- adapters that changed the base before training ---------------------------------------------------


def prepared(init: str) -> Any:
    """The model with what CorDA and LoRA-GA measure before they begin, made up."""
    model = net()
    for module in (model.lin, model.wide):
        rows, columns = module.weight.shape
        if init == "lora_ga":
            module._peft_loraga_grad = torch.randn(rows, columns)
        if init == "corda":
            module.eigens = SimpleNamespace(
                U_WC=torch.randn(rows, 2), S_WC=torch.rand(2) + 0.5, V_WC=torch.randn(columns, 2)
            )
    return model


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora", "corda", "lora_ga"])
@pytest.mark.parametrize("use_rslora", [False, True])
def test_with_its_initial_state_it_is_exact_on_the_published_base(tmp_path: Path, init: str, use_rslora: bool) -> None:
    from onnx_lora.adapters.formats.peft.reader import read_peft

    targets = LINEAR if init.startswith("pissa") else ["lin", "wide"]
    settings: dict[str, Any] = {"r": 2, "lora_alpha": 3, "target_modules": targets, "use_rslora": use_rslora}
    if init == "lora_ga":
        settings["lora_ga_config"] = peft.LoraGAConfig()
    model = peft.get_peft_model(prepared(init), peft.LoraConfig(**settings, init_lora_weights=init))
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(tmp_path / "start")
    model.peft_config["default"].init_lora_weights = init
    with torch.no_grad():
        for parameter in filter(lambda parameter: parameter.requires_grad, model.parameters()):
            parameter.add_(torch.randn_like(parameter) * 0.3)
    model.save_pretrained(tmp_path / "trained")
    adapter = read_peft(tmp_path / "trained", "x", tmp_path / "start")
    assert adapter.deltas["lin"].a.shape[0] == 4
    assert "'start'" in adapter.notes[-1]
    state = merging.weights_with(net(), adapter)
    with torch.no_grad():
        reference = model.eval().merge_and_unload().state_dict()
    for name, value in reference.items():
        assert_close(np.asarray(state[name]), value.numpy())


def test_lora_on_torchs_attention_is_refused_by_name(tmp_path: Path) -> None:
    base = torch.nn.ModuleDict({"attn": torch.nn.MultiheadAttention(4, 2)})
    with pytest.raises(UnsupportedAdapterError, match="is of torch's MultiheadAttention, no part of which is applied"):
        saved(wrapped(peft.LoraConfig(r=2, target_modules=["attn"]), model=base), tmp_path)
