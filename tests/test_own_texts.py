"""How far a package is from the float model on the user's own texts: not at all where it is float itself."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from click.testing import CliRunner

from onnx_lora import Package, bind, read_adapter
from onnx_lora.cli import cli
from onnx_lora.errors import InputError, ModelError
from onnx_lora.exporter import TextComparison, TriedAdapter, compare_texts, export, quantize
from tests.support.exporters import VIA
from tests.support.llama2c import read_model, read_tokens
from tests.support.models import make_adapter

pytestmark = pytest.mark.slow

TEXTS = ["once upon a time there was a king", "the queen said no", "", "and so they lived"]


def _decoder() -> Any:
    torch.manual_seed(0)
    sizes = {"vocab_size": 500, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2}
    return hf.LlamaForCausalLM(hf.LlamaConfig(**sizes, **heads, initializer_range=0.2)).eval()


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from benchmarks.subject import make_tokenizer

    folder = tmp_path_factory.mktemp("texts")
    _decoder().save_pretrained(folder / "base")
    make_tokenizer(folder / "base")
    make_adapter(_decoder(), folder / "adapter", r=4, target_modules=["q_proj", "v_proj"])
    export(folder / "base", folder / "float", via=VIA, verify=False)
    quantize(folder / "float", folder / "int4")
    (folder / "texts.txt").write_text("\n".join(TEXTS), "utf-8")
    return folder


def _compare(desk: Path, name: str, texts: Sequence[str] = TEXTS) -> list[TextComparison]:
    package = Package.open(desk / name)
    tensors = bind(read_adapter(desk / "adapter"), package).tensors
    return compare_texts(package, desk / "base", texts, [TriedAdapter("sql", desk / "adapter", tensors)])


def test_a_float_package_says_what_the_float_model_says(desk: Path) -> None:
    base, adapted = _compare(desk, "float")
    assert (base.adapter, adapted.adapter) == ("", "sql")
    for one in (base, adapted):
        assert one.agreement == 1.0
        assert one.answers > 10
        assert one.loss_package == pytest.approx(one.loss_float, abs=1e-4)
    # The losses are PyTorch's own, and the adapter's another than the base's.
    tokenizer = hf.AutoTokenizer.from_pretrained(desk / "base")
    sums, count = 0.0, 0
    for text in TEXTS:
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        if ids.shape[1] > 1:
            with torch.inference_mode():
                sums += float(_decoder()(input_ids=ids.long(), labels=ids.long()).loss) * (ids.shape[1] - 1)
            count += ids.shape[1] - 1
    assert count == base.answers
    assert base.loss_float == pytest.approx(sums / count, abs=1e-5)
    assert abs(adapted.loss_float - base.loss_float) > 1e-3  # type: ignore[operator]


def test_a_quantized_package_shows_how_far_it_is(desk: Path) -> None:
    base, adapted = _compare(desk, "int4")
    for one, exact in zip((base, adapted), _compare(desk, "float"), strict=True):
        assert one.agreement < 1.0
        assert one.loss_float == exact.loss_float
        assert abs(one.loss_package - one.loss_float) > 1e-3  # type: ignore[operator]


def test_a_trained_decoder_keeps_most_of_its_answers_in_int4(data: Path, tmp_path: Path) -> None:
    base = data / "base" / "stories260K"
    if not base.is_dir():
        pytest.skip(f"needs the trained model stories260K: {base} is not there")
    read_model(base / "checkpoint_legacy.bin").save_pretrained(tmp_path / "base")
    read_tokens(base / "tokenizer.bin").save_pretrained(tmp_path / "base")
    package = quantize(export(tmp_path / "base", tmp_path / "float", via=VIA, verify=False), tmp_path / "int4")
    story = ["Once upon a time, there was a boy named Tim. He had a red ball", "Lily went home. She was happy."]
    (one,) = compare_texts(package, tmp_path / "base", story)
    assert 0.5 < one.agreement < 1.0
    assert one.loss_float is not None
    assert one.loss_package is not None
    assert one.loss_float < one.loss_package < 2.0 < np.log(512)  # of a model that knows nothing


def test_long_texts_and_many_are_cut(desk: Path) -> None:
    (one, _) = _compare(desk, "float", [" ".join(["the king"] * 2000)] * 20)
    assert one.answers == 8 * (512 - 1)


def test_the_command_says_it_in_a_line_for_each(desk: Path) -> None:
    command = ["verify", str(desk / "int4"), "--reference", str(desk / "base"), "--text", str(desk / "texts.txt")]
    done = CliRunner().invoke(cli, [*command, "--adapter", f"sql={desk / 'adapter'}"], catch_exceptions=False)
    assert "base: " in done.output
    assert "sql: " in done.output
    assert "answers are the float model's; loss" in done.output


def test_what_has_no_texts_or_tokens_is_refused(desk: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there must be a text of at least two tokens"):
        compare_texts(Package.open(desk / "float"), desk / "base", [""])
    for content in (b"", b"\xff\xfe\xfa", b"\n \n"):
        (tmp_path / "t.txt").write_bytes(content)
        command = ["verify", str(desk / "float"), "--reference", str(desk / "base"), "--text", str(tmp_path / "t.txt")]
        with pytest.raises(InputError, match=r"must (be a text file|hold texts)"):
            CliRunner().invoke(cli, command, catch_exceptions=False)
    _decoder().save_pretrained(tmp_path / "bare")
    with pytest.raises(ModelError, match="must hold a tokenizer"):
        compare_texts(Package.open(desk / "float"), tmp_path / "bare", TEXTS)


def test_a_classifiers_labels_are_compared(tmp_path: Path) -> None:
    from benchmarks.subject import make_tokenizer

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    model = hf.BertForSequenceClassification(hf.BertConfig(vocab_size=500, num_labels=5, pad_token_id=0, **sizes))
    model.save_pretrained(tmp_path / "base")
    make_tokenizer(tmp_path / "base")
    package = export(tmp_path / "base", tmp_path / "package", via=VIA, verify=False)
    (one,) = compare_texts(package, tmp_path / "base", TEXTS)
    assert (one.answers, one.agreement, one.loss_float, one.loss_package) == (3, 1.0, None, None)
