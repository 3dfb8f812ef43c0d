"""ONNX Runtime GenAI runs a package as it is, and its adapters are the files that `onnx-lora convert` writes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch
import transformers as hf
from click.testing import CliRunner
from tokenizers import Tokenizer, models, pre_tokenizers

from onnx_lora import Package, bind, read_adapter
from onnx_lora.cli import cli
from onnx_lora.errors import BindError
from onnx_lora.exporter import attach
from onnx_lora.runtime import Sampling, TextGenerator
from tests.support.models import make_adapter
from tests.support.numbers import assert_close

og: Any = pytest.importorskip("onnxruntime_genai", reason="needs ONNX Runtime GenAI: pip install onnx-lora[genai]")

VOCABULARY = 100
PROMPT = [11, 42, 7, 93, 5]
NEW = 12  # tokens

# Heads of 16 numbers: ONNX Runtime's GroupQueryAttention takes no smaller ones.
LLAMA = hf.LlamaConfig(
    vocab_size=VOCABULARY,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=256,
    bos_token_id=1,
    eos_token_id=2,
)
PACKED = "model.layers.0.self_attn.q_proj+k_proj+v_proj"


def _llama() -> Any:
    """Always with the same weights, of those whose text varies; larger than transformers makes them, so that adapters
    change it."""
    torch.manual_seed(11)
    model = hf.LlamaForCausalLM(LLAMA).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(3.0)
        model.lm_head.weight[LLAMA.eos_token_id] = 0.0  # never the likeliest: texts have their full length
    return model


@dataclass(frozen=True)
class Desk:
    """What a user has. `built`: the builder's folder, untouched; `package`: the same with points."""

    built: Path
    package: Path
    adapters: Path  # PEFT folders `all`, `all again` and `qv`
    files: Path  # for converted ones


@pytest.fixture(scope="module", params=["fp32", "int4"])
def desk(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Desk:
    folder = tmp_path_factory.mktemp(request.param)
    _llama().save_pretrained(folder / "checkpoint")
    _save_tokenizer(folder / "checkpoint")
    _build(folder, request.param)
    attach(folder / "built", folder / "package", checkpoint=folder / "checkpoint")
    make_adapter(_llama(), folder / "adapters" / "all", r=4, lora_alpha=9, target_modules="all-linear")
    make_adapter(_llama(), folder / "adapters" / "all again", r=2, target_modules="all-linear", seed=5)
    make_adapter(_llama(), folder / "adapters" / "qv", r=3, target_modules=["q_proj", "v_proj"], seed=2)
    return Desk(folder / "built", folder / "package", folder / "adapters", folder / "files")


def _save_tokenizer(folder: Path) -> None:
    words = Tokenizer(models.WordLevel({f"t{index}": index for index in range(VOCABULARY)}, unk_token="t0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"unk_token": "t0", "bos_token": "t1", "eos_token": "t2", "pad_token": "t0"}
    hf.PreTrainedTokenizerFast(tokenizer_object=words, **special).save_pretrained(folder)


def _build(folder: Path, precision: str) -> None:
    """The builder by itself, as its users run it."""
    options = ["hf_token=false", *(["accuracy_level=4", "block_size=32"] if precision == "int4" else [])]
    command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", "checkpoint", "-o", "built"]
    command += ["-p", precision, "-e", "cpu", "-c", "cache", "--extra_options", *options]
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


def _convert(desk: Desk, name: str, *arguments: object) -> Path:
    out = desk.files / f"{name}.onnx_adapter"
    if not out.exists():
        done = CliRunner().invoke(cli, ["convert", *map(str, arguments), str(out), "--package", str(desk.package)])
        assert done.exit_code == 0, (done.output, done.exception)
    return out


@dataclass(frozen=True)
class Answer:
    tokens: tuple[int, ...]
    logits: Any  # after the prompt: [vocabulary]


def _theirs(folder: Path, adapter: Path | None = None, prompt: Sequence[int] = PROMPT) -> Answer:
    """ONNX Runtime GenAI's own loop, greedy."""
    model = og.Model(str(folder))
    parameters = og.GeneratorParams(model)
    parameters.set_search_options(max_length=len(prompt) + NEW, do_sample=False)
    generator = og.Generator(model, parameters)
    adapters = og.Adapters(model)
    if adapter is not None:
        adapters.load(str(adapter), "it")
        generator.set_active_adapter(adapters, "it")
    generator.append_tokens(list(prompt))
    logits = np.array(generator.get_logits()).reshape(-1, VOCABULARY)[-1]
    tokens = []
    while not generator.is_done():
        generator.generate_next_token()
        tokens.append(int(generator.get_next_tokens()[0]))
    return Answer(tuple(tokens), logits)


def _ours(desk: Desk, adapter: Any = None, prompt: Sequence[int] = PROMPT, **loaded: Path) -> Answer:
    generator = TextGenerator(desk.package)
    for name, path in loaded.items():
        generator.load_adapter(name, path)
    logits = generator.session.run(["logits"], _feeds(generator, prompt), adapter=adapter)[0]
    tokens = generator.generate(list(prompt), adapter=adapter, sampling=Sampling(max_tokens=NEW)).tokens
    return Answer(tokens, logits[0, -1])


def _feeds(generator: TextGenerator, prompt: Sequence[int]) -> dict[str, Any]:
    """A prompt and an empty cache."""
    feeds: dict[str, Any] = {"input_ids": np.array([prompt]), "attention_mask": np.ones((1, len(prompt)), np.int64)}
    names = [value.name for value in generator.session.get_inputs()]
    past = np.zeros((1, LLAMA.num_key_value_heads, 0, 16), np.float32)
    feeds |= {name: past for name in names if name.startswith("past_key_values")}
    return {name: feeds[name] for name in names}


def _agree(theirs: Answer, ours: Answer) -> None:
    assert theirs.tokens == ours.tokens
    assert len(theirs.tokens) == NEW
    assert len(set(theirs.tokens)) > 1, "a text of one token over and over compares little"
    assert_close(theirs.logits, ours.logits)


def test_without_an_adapter_all_three_write_the_same(desk: Desk) -> None:
    builders = _theirs(desk.built)
    package = _theirs(desk.package)
    assert package.tokens == builders.tokens
    assert_close(package.logits, builders.logits)
    _agree(builders, _ours(desk))


def test_an_adapter_writes_the_same_in_both(desk: Desk) -> None:
    base = _theirs(desk.built)
    for name in ("all", "qv"):
        theirs = _theirs(desk.package, _convert(desk, name, desk.adapters / name))
        _agree(theirs, _ours(desk, "it", it=desk.adapters / name))
        assert np.abs(theirs.logits - base.logits).max() > 1e-2


def test_a_blend_in_one_file_writes_the_same_in_both(desk: Desk) -> None:
    parts = ["--adapter", f"{desk.adapters / 'all'}:0.7", "--adapter", f"{desk.adapters / 'qv'}:-0.3"]
    theirs = _theirs(desk.package, _convert(desk, "blend", *parts))
    _agree(theirs, _ours(desk, {"a": 0.7, "b": -0.3}, a=desk.adapters / "all", b=desk.adapters / "qv"))


def test_we_read_what_they_run(desk: Desk) -> None:
    """An .onnx_adapter has q, k and v in one pair; read again, they come apart."""
    file = _convert(desk, "all", desk.adapters / "all")
    _agree(_theirs(desk.package, file), _ours(desk, "it", it=file))


def test_adapters_that_touch_the_same_modules_are_switched_within_one_text(desk: Desk) -> None:
    """Each token under its adapter, on the cache that the others left."""
    names = ("all", "all again")
    model = og.Model(str(desk.package))
    adapters = og.Adapters(model)
    ours = TextGenerator(desk.package)
    for name in names:
        adapters.load(str(_convert(desk, name, desk.adapters / name)), name)
        ours.load_adapter(name, desk.adapters / name)
    parameters = og.GeneratorParams(model)
    parameters.set_search_options(max_length=len(PROMPT) + NEW, do_sample=False)
    theirs = og.Generator(model, parameters)
    theirs.set_active_adapter(adapters, names[0])
    theirs.append_tokens(PROMPT)
    cache, prompt = None, PROMPT
    one = Sampling(max_tokens=1)
    for step in range(NEW):
        name = names[step % 2]
        theirs.set_active_adapter(adapters, name)
        theirs.generate_next_token()
        part = ours.generate(prompt, adapter=name, sampling=one, cache=cache, keep_cache=True, allow_other_adapter=True)
        cache, prompt = part.cache, ""
        assert part.tokens == (int(theirs.get_next_tokens()[0]),), step


def test_a_converted_file_holds_the_graphs_own_inputs(desk: Desk) -> None:
    graph = Package.open(desk.package).graph()
    assert f"{PACKED}.lora_A.weight" in graph.adapter_inputs
    file = _convert(desk, "qv", desk.adapters / "qv")
    held = ort.AdapterFormat.read_adapter(str(file)).get_parameters()
    layers = [f"model.layers.{layer}.self_attn.q_proj+k_proj+v_proj" for layer in range(LLAMA.num_hidden_layers)]
    assert set(held) == {f"{layer}.lora_{factor}.weight" for layer in layers for factor in "AB"}
    # Two modules of rank 3 side by side; what k would get is zero.
    assert held[f"{PACKED}.lora_A.weight"].shape() == [1, 64, 6]
    b = held[f"{PACKED}.lora_B.weight"].numpy()
    assert b.shape == (1, 6, 64 + 32 + 32)
    assert not b[:, :, 64:96].any()


def test_the_number_of_a_base_disturbs_nobody_and_tells_bases_apart(desk: Desk, tmp_path: Path) -> None:
    """`model_version` is the one place of an .onnx_adapter that both load with anything in it."""
    file = _convert(desk, "all", desk.adapters / "all")
    held = ort.AdapterFormat.read_adapter(str(file))
    assert held.get_model_version() >= 2**30
    plain = _written(tmp_path / "plain.onnx_adapter", 1, held.get_parameters())
    with_number, without = (_theirs(desk.package, each) for each in (file, plain))
    assert with_number.tokens == without.tokens
    np.testing.assert_array_equal(with_number.logits, without.logits)
    whole = Package.open(desk.package)
    first, *others = whole.graph().points
    changed = replace(whole.graph(), points=(replace(first, sha256="0" * 64), *others))
    with pytest.raises(BindError, match="stands for its base weights"):
        bind(read_adapter(file), replace(whole, manifest=replace(whole.manifest, graphs=(changed,))))


def test_onnx_runtime_runs_a_file_with_a_number_and_refuses_what_is_no_input(desk: Desk, tmp_path: Path) -> None:
    file = _convert(desk, "all", desk.adapters / "all")
    ours = TextGenerator(desk.package)
    ours.load_adapter("it", file)
    feeds = _feeds(ours, PROMPT)
    settings = ort.SessionOptions()
    settings.log_severity_level = 3
    session = ort.InferenceSession(desk.package / "model.onnx", settings, providers=["CPUExecutionProvider"])

    def run(path: Path) -> Any:
        adapter = ort.LoraAdapter()
        adapter.Load(str(path))
        options = ort.RunOptions()
        options.add_active_adapter(adapter)
        return session.run(["logits"], feeds, options)[0]

    assert_close(run(file), ours.session.run(["logits"], feeds, adapter="it")[0])
    held = ort.AdapterFormat.read_adapter(str(file))
    extra = {"onnx_lora": ort.OrtValue.ortvalue_from_numpy(np.zeros(1, np.float32))}
    more = _written(tmp_path / "more.onnx_adapter", held.get_model_version(), held.get_parameters() | extra)
    with pytest.raises(Exception, match="Invalid input name"):
        run(more)


def _written(file: Path, number: int, parameters: dict[str, Any]) -> Path:
    adapter = ort.AdapterFormat()
    adapter.set_adapter_version(1)
    adapter.set_model_version(number)
    adapter.set_parameters(parameters)
    adapter.export_adapter(str(file))
    return file


def test_the_package_keeps_the_builders_files(desk: Desk) -> None:
    for name in ("genai_config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (desk.package / name).read_bytes() == (desk.built / name).read_bytes(), name
    config = json.loads((desk.package / "genai_config.json").read_text("utf-8"))
    assert (desk.package / config["model"]["decoder"]["filename"]).is_file()
