"""Checkpoints through ONNX Runtime GenAI's builder: points, PEFT's numbers, what is refused, what is left behind."""

from __future__ import annotations

import importlib.util
import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
import transformers as hf
from peft import PeftModel
from tokenizers import Tokenizer, models, pre_tokenizers

from onnx_lora import AdapterSession, Package
from onnx_lora.errors import (
    ExportError,
    MissingDependencyError,
    ModelError,
    OutputExistsError,
    StorageError,
    VerificationError,
)
from onnx_lora.exporter import attach, export
from onnx_lora.exporter.frontends.checkpoint import Checkpoint
from onnx_lora.exporter.frontends.exporters import genai_builder
from onnx_lora.exporter.frontends.exporters.genai import MEASURED, load_causal_model, references
from onnx_lora.exporter.verification.verify import verify
from tests.support.models import make_adapter
from tests.support.numbers import assert_close

pytest.importorskip("onnxruntime_genai", reason="needs the GenAI builder: pip install onnx-lora[genai]")

# Heads of 16 numbers: ONNX Runtime's GroupQueryAttention takes no smaller ones.
_CORE: dict[str, Any] = {
    "vocab_size": 100,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GQA = _CORE | {"num_key_value_heads": 2}
_WIDE = _CORE | {"original_max_position_embeddings": 256}

MODELS: dict[str, Callable[[], Any]] = {
    "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**_GQA)),
    "qwen2": lambda: hf.Qwen2ForCausalLM(hf.Qwen2Config(**_GQA)),
    "mistral": lambda: hf.MistralForCausalLM(hf.MistralConfig(**_GQA)),
    "gemma": lambda: hf.GemmaForCausalLM(hf.GemmaConfig(**_GQA, head_dim=16)),
    "phi3": lambda: hf.Phi3ForCausalLM(hf.Phi3Config(**_WIDE)),
    "llama_tied": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**_GQA, tie_word_embeddings=True)),
}
BUILT = ["llama", "qwen2", "mistral", "gemma", "phi3"]

Make = Callable[[str], Path]


def _save_tokenizer(folder: Path) -> None:
    words = Tokenizer(models.WordLevel({f"t{index}": index for index in range(100)}, unk_token="t0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"unk_token": "t0", "bos_token": "t1", "eos_token": "t2", "pad_token": "t0"}
    hf.PreTrainedTokenizerFast(tokenizer_object=words, **special).save_pretrained(folder)


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """Checkpoints with heads that the builder's graphs can run; all but Mistral's with a tokenizer."""
    folder = tmp_path_factory.mktemp("wide")

    def make(name: str) -> Path:
        if not (folder / name).is_dir():
            torch.manual_seed(0)
            model = MODELS[name]().eval()
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.ndim == 2:
                        parameter.mul_(3.0)  # an adapter must not drown in a nearly linear model
            # In shards, as large models are; transformers draws a bar for them.
            model.save_pretrained(folder / name, max_shard_size="60KB")
            if name != "mistral":
                _save_tokenizer(folder / name)
        return folder / name

    return make


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory, wide: Make) -> Callable[[str], Package]:
    """Verified packages in fp32, each made once."""
    folder = tmp_path_factory.mktemp("built")

    def make(name: str) -> Package:
        if not (folder / name).is_dir():
            return export(wide(name), folder / name, via="genai", precision="fp32")
        return Package.open(folder / name)

    return make


def _run(session: Any, feeds: dict[str, Any], **choice: Any) -> dict[str, Any]:
    names = [value.name for value in session.get_outputs()]
    return dict(zip(names, session.run(None, feeds, **choice), strict=True))


@pytest.mark.parametrize("name", BUILT)
def test_every_linear_module_gets_a_point_by_its_torch_name(
    name: str, wide: Make, built: Callable[[str], Package]
) -> None:
    model = load_causal_model(wide(name), precision="fp32")
    linear = {key for key, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    package = built(name)
    assert set(package.points) == linear - {"lm_head"}
    assert all(point.per_row for point in package.points.values())


@pytest.mark.parametrize("name", BUILT)
def test_adapters_give_pefts_numbers(name: str, wide: Make, built: Callable[[str], Package], tmp_path: Path) -> None:
    options = {"r": 3, "lora_alpha": 5, "target_modules": "all-linear", "rank_pattern": {"o_proj": 2}}
    adapter = make_adapter(load_causal_model(wide(name), precision="fp32"), tmp_path / "it", **options)
    session = AdapterSession(built(name))
    session.load_adapter("it", adapter)
    model = load_causal_model(wide(name), precision="fp32")
    (case,) = references(model)
    feeds = case.feeds([value.name for value in session.get_inputs()])
    base = case.answer()
    PeftModel.from_pretrained(model, adapter)
    adapted = case.answer()
    for key, value in _run(session, feeds).items():
        assert_close(value, base[key])
    for key, value in _run(session, feeds, adapter="it").items():
        assert_close(value, adapted[key])
    mixed = _run(session, feeds, adapter=[None, "it"])["logits"]
    assert_close(mixed, np.stack([base["logits"][0], adapted["logits"][1]]))
    assert np.abs(adapted["logits"] - base["logits"]).max() > 1e-2


def test_a_package_holds_what_onnxruntime_genai_needs(wide: Make, built: Callable[[str], Package]) -> None:
    package = built("llama")
    names = {file.name for file in package.path.iterdir()}
    assert names >= {"genai_config.json", "tokenizer.json", "config.json", "generation_config.json", "model.onnx.data"}
    import onnxruntime_genai as og

    model = og.Model(str(package.path))
    parameters = og.GeneratorParams(model)
    parameters.set_search_options(max_length=6, do_sample=False)
    generator = og.Generator(model, parameters)
    prompt = [11, 42, 7]
    generator.append_tokens(prompt)
    generator.generate_next_token()
    torch_model: Any = load_causal_model(wide("llama"), precision="fp32")
    with torch.inference_mode():
        logits = torch_model(torch.tensor([prompt])).logits
    assert generator.get_next_tokens()[0] == int(logits[0, -1].argmax())


def test_the_manifest_says_who_made_it(built: Callable[[str], Package]) -> None:
    source = built("llama").manifest.source
    assert source.pop("builder").startswith("onnxruntime-genai 0.")
    assert source == {
        "made_by": "genai",
        "from": "llama",
        "task": "text-generation-with-past",
        "precision": "fp32",
        "transformers": version("transformers"),
    }


def test_verify_takes_an_adapter(wide: Make, built: Callable[[str], Package], tmp_path: Path) -> None:
    package = built("llama")
    model = load_causal_model(wide("llama"), precision="fp32")
    adapter = make_adapter(model, tmp_path / "it", r=4, target_modules=["q_proj", "v_proj", "down_proj"])
    bound = AdapterSession(package).load_adapter("it", adapter)
    cases = {entry.case for entry in verify(package, wide("llama"), adapter=adapter, tensors=bound.tensors)}
    assert cases == {"base", "adapter"}
    with pytest.raises(VerificationError, match="adapter it, output logits"):
        verify(package, wide("llama"), adapter=adapter, tensors={})


def test_a_checkpoint_without_a_tokenizer_makes_a_package_without_one(
    built: Callable[[str], Package],
) -> None:
    names = {file.name for file in built("mistral").path.iterdir()}
    assert "genai_config.json" in names
    assert not {name for name in names if name.startswith("tokenizer")}


def test_attach_keeps_the_files_of_a_genai_folder(built: Callable[[str], Package], tmp_path: Path) -> None:
    folder = tmp_path / "theirs"
    folder.mkdir()
    for name in ("genai_config.json", "tokenizer.json", "model.onnx.data"):
        shutil.copyfile(built("llama").path / name, folder / name)
    config = json.loads((folder / "genai_config.json").read_text())
    config["model"]["decoder"]["filename"] = "decoder.onnx"
    (folder / "genai_config.json").write_text(json.dumps(config))
    shutil.copyfile(built("llama").path / "base.onnx", folder / "decoder.onnx")
    package = attach(folder, tmp_path / "out")
    names = {file.name for file in package.path.iterdir()}
    assert names >= {"genai_config.json", "tokenizer.json", "decoder.onnx"}, "the config names the graph"


def test_the_command_quantizes_and_verifies_and_says_nothing_else(wide: Make, tmp_path: Path) -> None:
    """A tied model: one 4-bit weight serves head and embedding."""
    command = [sys.executable, "-m", "onnx_lora", "export", str(wide("llama_tied")), "out", "--via", "genai"]
    done = subprocess.run(
        [*command, "--precision", "int4", "--json"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0
    assert all(line.startswith("exporting: ") for line in done.stderr.splitlines())
    facts = json.loads(done.stdout)
    assert facts["points"] == 14
    assert facts["made_from"]["precision"] == "int4"
    assert facts["made_from"]["accuracy_level"] == "4"
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]


def test_a_wrong_quantized_weight_is_seen(wide: Make, tmp_path: Path) -> None:
    """int8, tied: the head's weight is quantized, the embedding's is not. One weight emptied must be found."""
    package = export(wide("llama_tied"), tmp_path / "out", via="genai", precision="int8", block_size=64)
    cases = verify(package, wide("llama_tied"))
    assert {entry.case for entry in cases} == {"base", "int8", "adapter", "rows"}
    stored = package.points["model.layers.0.mlp.up_proj"].parts[0].stored
    data = package.path / stored.file
    content = bytearray(data.read_bytes())
    content[stored.offset : stored.offset + stored.size] = bytes(stored.size)
    data.write_bytes(content)
    with pytest.raises(VerificationError, match="base, output logits"):
        verify(package, wide("llama_tied"))


def test_half_precision_runs_on_the_cpu_too(wide: Make, tmp_path: Path) -> None:
    """Built for CUDA, as the config says, and verified here."""
    package = export(wide("llama_tied"), tmp_path / "out", via="genai", precision="fp16")
    assert {point.dtype for point in package.points.values()} == {"float16"}
    assert '"cuda"' in (package.path / "genai_config.json").read_text()


def test_an_interrupted_export_leaves_nothing(wide: Make, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "onnx_lora", "export", str(wide("llama")), "out", "--via", "genai"]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        children: list[psutil.Process] = []
        deadline = time.monotonic() + 60
        while not children and time.monotonic() < deadline:
            children = psutil.Process(process.pid).children()
            time.sleep(0.05)
        assert children, "the builder runs as a child"
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=30)
    finally:
        process.kill()
    assert (process.returncode, out, err.strip()) == (130, "", "interrupted; nothing half done is left")
    assert not [child for child in children if child.is_running() and child.status() != psutil.STATUS_ZOMBIE]
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_architecture_is_sent_to_optimum(checkpoints: Make, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="does not know the architecture"):
        export(_with_config(checkpoints("gpt2"), tmp_path / "gpt2", n_embd=64), tmp_path / "out", via="genai")
    assert [entry.name for entry in tmp_path.iterdir()] == ["gpt2"]


def test_a_damaged_checkpoint_is_named(wide: Make, tmp_path: Path) -> None:
    shutil.copytree(wide("llama"), tmp_path / "llama")
    weights = next((tmp_path / "llama").glob("model-00001-*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ModelError, match=r"cannot read it: .*SafetensorError"):
        export(tmp_path / "llama", tmp_path / "out", via="genai")
    assert [entry.name for entry in tmp_path.iterdir()] == ["llama"]


def test_weights_that_are_missing_are_not_invented(wide: Make, tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    shutil.copytree(wide("llama"), tmp_path / "llama")
    lost = "model.layers.1.mlp.up_proj.weight"
    file = tmp_path / "llama" / _shard_of(tmp_path / "llama", lost)
    weights = load_file(file)
    del weights[lost]
    save_file(weights, file, {"format": "pt"})
    with pytest.raises(ModelError, match="lacks weights"):
        export(tmp_path / "llama", tmp_path / "out", via="genai")
    index = json.loads((tmp_path / "llama" / "model.safetensors.index.json").read_text())
    del index["weight_map"][lost]
    (tmp_path / "llama" / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match=r"(?s)lacks weights: .*layers\.1\.mlp\.up_proj"):
        export(tmp_path / "llama", tmp_path / "out", via="genai")


def _shard_of(folder: Path, weight: str) -> str:
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    return str(index["weight_map"][weight])


def _with_config(source: Path, folder: Path, **change: Any) -> Path:
    shutil.copytree(source, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | change))
    return folder


@pytest.mark.parametrize(
    "options, message",
    [
        ({"precision": "fp8"}, "precision must be one of fp32, fp16, int8, int4, and is 'fp8'"),
        ({"precision": "int4", "block_size": 31}, "block_size must be one of .*, and is 31"),
        ({"precision": "int4", "block_size": 0}, "block_size must be one of .*, and is 0"),
        ({"precision": "int4", "accuracy_level": 5}, "accuracy_level must be one of .*, and is 5"),
        ({"block_size": 32}, "are for precision int4 and int8"),
        ({"via": "onnx"}, "via must be one of genai, transformers, optimum, and is 'onnx'"),
        ({"via": "optimum", "precision": "int4"}, "Optimum writes no int4"),
        ({"via": "genai", "task": "text-classification"}, "for text-generation-with-past"),
        (
            {"via": "genai", "task": "text-generation"},
            "for text-generation-with-past, and the task is 'text-generation'",
        ),
        ({"precision": "int4", "task": "text-classification"}, "'int4' is for text-generation-with-past"),
    ],
)
def test_options_that_cannot_be(wide: Make, tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        export(wide("llama"), tmp_path / "out", **options)
    assert list(tmp_path.iterdir()) == []


def test_small_heads_are_refused_before_anything_is_built(checkpoints: Make, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="multiple of 16 numbers, rotated ones too, and have 8"):
        export(checkpoints("llama"), tmp_path / "out", via="genai")


def test_a_folder_without_a_config_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match=r"config\.json"):
        export(tmp_path / "empty", tmp_path / "out", via="genai")
    with pytest.raises(ModelError, match="there is no such folder"):
        export(tmp_path / "nowhere", tmp_path / "out", via="genai")


def test_a_torch_module_takes_no_via(tmp_path: Path) -> None:
    for options in ({"via": "genai"}, {"precision": "int4"}):
        with pytest.raises(ModelError, match="via and precision are for checkpoints"):
            export(torch.nn.Linear(4, 4), tmp_path / "out", example_inputs=(torch.ones(2, 4),), **options)


def test_an_output_that_exists_is_not_built_over(wide: Make, tmp_path: Path) -> None:
    with pytest.raises(OutputExistsError):
        export(wide("llama"), tmp_path, via="genai")


def test_without_the_builder(wide: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime_genai", None)
    for options in ({"via": "genai"}, {"precision": "int4"}):
        with pytest.raises(MissingDependencyError, match=r"pip install 'onnx-lora\[export,genai,cpu\]'"):
            export(wide("llama"), tmp_path / "out", **options)
    assert Checkpoint(wide("llama")).choose_exporter().name == "transformers"


@pytest.mark.parametrize(
    "name, task, chosen",
    [
        ("llama", None, "genai"),
        ("llama", "text-generation", "transformers"),
        ("llama", "text-generation-with-past", "genai"),
        ("llama", "feature-extraction", "transformers"),
        ("gemma", "text-generation-with-past", "genai"),
    ],
)
def test_who_exports_by_default(wide: Make, name: str, task: str | None, chosen: str) -> None:
    assert Checkpoint(wide(name), task=task).choose_exporter().name == chosen


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])  # heads too small, and two unknown ones
def test_others_go_to_transformers_by_default(checkpoints: Make, name: str) -> None:
    assert Checkpoint(checkpoints(name)).choose_exporter().name == "transformers"


# What a config needs beside the sizes.
_SETTINGS: dict[str, dict[str, Any]] = {
    "Gemma2ForCausalLM": {"head_dim": 16, "sliding_window": 4},
    "GptOssForCausalLM": {
        **{"head_dim": 16, "sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]},
        **{"num_local_experts": 4, "num_experts_per_tok": 2},
    },
    "Phi3ForCausalLM": {"original_max_position_embeddings": 256},
}


@pytest.mark.parametrize("name", sorted(MEASURED))
def test_what_it_takes_by_default_was_measured_right(name: str, tmp_path: Path) -> None:
    """Verified as it is exported, on more tokens than a window has."""
    torch.manual_seed(0)
    kind = getattr(hf, name)
    config = {"num_key_value_heads": 2, "head_dim": 16, **_CORE, **_SETTINGS.get(name, {})}
    model = kind(kind.config_class(**config)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3.0 if parameter.ndim > 1 else 1.0)
    model.save_pretrained(tmp_path / "checkpoint")
    package = export(tmp_path / "checkpoint", tmp_path / "package")
    assert package.manifest.source["made_by"] == "genai"
    assert package.points


def test_gemma_3_is_refused_and_goes_to_transformers(tmp_path: Path) -> None:
    hf.Gemma3ForCausalLM(hf.Gemma3TextConfig(**_GQA, head_dim=16)).save_pretrained(tmp_path / "it")
    for options in ({"via": "genai"}, {"precision": "int4"}):
        with pytest.raises(ModelError, match="one for each kind of layer"):
            export(tmp_path / "it", tmp_path / "out", **options)
    assert Checkpoint(tmp_path / "it").choose_exporter().name == "transformers"


def test_layers_whose_caches_nobody_knows_here_are_refused(wide: Make, tmp_path: Path) -> None:
    folder = _with_config(wide("llama"), tmp_path / "it", layer_types=["linear_attention", "full_attention"])
    with pytest.raises(ModelError, match="layers of attention, and there is linear_attention"):
        export(folder, tmp_path / "out", via="genai")


@pytest.mark.parametrize("precision", ["fp32", "int4"])
def test_convolutions_between_layers_hide_no_point(tmp_path: Path, precision: str) -> None:
    """No tool of shape inference knows the builder's operator for them; the graph says the shapes behind it."""
    torch.manual_seed(0)
    config = hf.Lfm2Config(**_GQA, layer_types=["conv", "full_attention"])
    hf.Lfm2ForCausalLM(config).save_pretrained(tmp_path / "it")
    package = export(tmp_path / "it", tmp_path / "out", via="genai", precision=precision)
    model = load_causal_model(tmp_path / "it", precision="fp32")
    linear = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    assert set(package.points) == linear - {"lm_head"}
    assert all(point.per_row for point in package.points.values())


def test_the_builder_knows_what_we_say_it_knows() -> None:
    found = importlib.util.find_spec("onnxruntime_genai")
    assert found is not None
    assert found.origin is not None
    text = (Path(found.origin).parent / "models" / "builder.py").read_text("utf-8")
    assert not [name for name in MEASURED if f'"{name}"' not in text]


@pytest.mark.parametrize(
    "script, error, message",
    [
        ("raise OSError(28, 'No space left on device')", StorageError, "the disk is full"),
        ("raise RuntimeError('odd')", ExportError, "the GenAI builder failed: RuntimeError: odd"),
        ("import sys; sys.exit(3)", ExportError, "it said nothing"),
        ("import os; os.kill(os.getpid(), 9)", ExportError, r"was killed \(SIGKILL\)"),
    ],
)
def test_how_a_builder_fails(
    wide: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, error: type[Exception], message: str
) -> None:
    monkeypatch.setattr(genai_builder, "_command", lambda wish, scratch: [sys.executable, "-c", script])
    with pytest.raises(error, match=message):
        export(wide("llama"), tmp_path / "out", via="genai")
    assert list(tmp_path.iterdir()) == []


def test_progress_follows_the_builder(wide: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = (
        r"print('Reading layer 0\nReading layer 1');"
        r"print('Saving a (f32, [2]):  50%|##  | 1/2 [00:00<00:00, 9it/s]\r', end='');"
        r"print('x [INFO] - complete quantization of /model/layers.1/mlp/up_proj/MatMul with 4 bits ...');"
        r"raise SystemExit(1)"
    )
    monkeypatch.setattr(genai_builder, "_command", lambda wish, scratch: [sys.executable, "-c", script])
    seen: list[tuple[str, int, int]] = []
    with pytest.raises(ExportError):
        export(wide("llama"), tmp_path / "out", via="genai", progress=lambda *step: seen.append(step))
    assert seen[1:] == [
        ("build layers", 1, 2),
        ("build layers", 2, 2),
        ("save weights", 1, 2),
        ("quantize layers", 2, 2),
    ]
