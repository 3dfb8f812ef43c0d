"""One test for each cause of refusal."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from onnx_lora import AdapterSession, Chat, Sampling, TextGenerator
from onnx_lora.errors import CacheError, InputError, MissingDependencyError, PackageError, PromptError, SelectionError
from tests.generation.conftest import Decoder, open_generator

SHORT = Sampling(max_tokens=3, ignore_eos=True)


@pytest.mark.parametrize(
    "prompt, message",
    [
        ([], "the prompt must have a token at least"),
        (np.zeros((0, 3), int), "a batch must have a prompt at least"),
        ([[]], "prompt 0 must have a token at least"),
        ([[5], []], "prompt 1 must have a token at least"),
        ([3] * 300, "the prompt has 300 tokens, and the context has room for 256"),
        ([3] * 256, "the prompt has 256 tokens, and the context has room for 256, one of them new"),
        ([[3], [3] * 300], "prompt 1 has 300 tokens"),
        ([5, 100], "ids from 0 below 100, and holds 100"),
        ([5, -1], "ids from 0 below 100, and holds -1"),
        ([5, 1.5], "prompt 0 must be text"),
        ([True, False], "prompt 0 must be text"),
        (b"text", "a prompt must be text"),
        (7, "a prompt must be text"),
        (np.array([1.0]), "an array of token ids"),
        (np.zeros((1, 1, 1), int), "an array of token ids"),
        ("\ud800", "must be valid Unicode"),
        ([2**70], "ids from 0 below 100, and holds a number of 71 bits"),
        (np.array([2**64 - 1], np.uint64), "ids from 0 below 100, and holds 18446744073709551615"),
        (np.zeros(0, int), "the prompt must have a token at least"),
        (np.zeros((2, 0), int), "prompt 1 must have a token at least"),
        (range(10**12), "must have 16777216 tokens or rows at most"),
        ([range(10**12)], "prompt 0 must be text, a Chat, or a list of token ids; it is a range"),
        (bytearray(b"text"), "a prompt must be text"),
        (memoryview(b"text"), "a prompt must be text"),
        ([[3], [None]], "prompt 1 must be text, a Chat, or a list of token ids; it holds a NoneType"),
        ([None], "prompt 0 must be text"),
        (["the", 10**400], "prompt 1 must be text, a Chat, or a list of token ids; it is a int"),
        (None, "a prompt must be text"),
        (Chat("the"), "a chat must be a list of messages"),
        (Chat([{"role": "user", "content": "\ud800"}]), "must be valid Unicode"),
        ([{"role": "user", "content": "Hi"}], "must be text, a Chat"),
    ],
)
def test_a_prompt_that_is_none_is_refused(generator: TextGenerator, prompt: Any, message: str) -> None:
    with pytest.raises(PromptError, match=message):
        generator.generate(prompt, sampling=SHORT)


@pytest.mark.parametrize("text", [None, 7, b"the", ["the"]])
def test_what_is_no_text_is_not_encoded(generator: TextGenerator, text: Any) -> None:
    with pytest.raises(PromptError, match="must be text or a Chat"):
        generator.encode(text)


@pytest.mark.parametrize("graph", ["none", 7, []])
def test_a_graph_that_is_not_there_is_refused(decoder: Decoder, graph: Any) -> None:
    with pytest.raises(PackageError, match="there is no graph"):
        TextGenerator(decoder.package, graph=graph)


def test_an_empty_text_has_its_start_token(generator: TextGenerator) -> None:
    assert generator.generate("", sampling=SHORT).prompt_tokens == 1


def test_arrays_are_prompts(generator: TextGenerator) -> None:
    found = generator.generate([5, 6], sampling=SHORT)
    assert generator.generate(np.array([5, 6]), sampling=SHORT) == found
    assert generator.generate(np.array([[5, 6], [5, 6]], np.int32), sampling=SHORT) == [found, found]
    assert generator.generate([np.array([5, 6])], sampling=SHORT) == [found]


def test_a_text_ends_at_the_contexts_end(generator: TextGenerator) -> None:
    found = generator.generate([3] * 250, sampling=Sampling(max_tokens=100, ignore_eos=True), keep_cache=True)
    assert (len(found.tokens), found.reason) == (6, "length")
    assert generator.context == 256
    with pytest.raises(PromptError, match="257 tokens with the 255 before it, and the context has room for 256"):
        generator.generate([7], cache=found.cache)


def test_choices_that_cannot_be_had_are_refused(generator: TextGenerator) -> None:
    with pytest.raises(SelectionError, match="no adapter 'c' is loaded"):
        generator.generate([5], adapter="c")
    with pytest.raises(SelectionError, match="2 were given for 3 prompts"):
        generator.generate([[5], [6], [7]], adapter=["a", None])
    with pytest.raises(SelectionError, match=r"2 were given for 1 prompt$"):
        generator.generate([5], adapter=["a", None])


def test_arguments_of_another_kind_are_refused(generator: TextGenerator, decoder: Decoder) -> None:
    with pytest.raises(InputError, match="sampling must be a Sampling"):
        generator.generate([5], sampling={"max_tokens": 3})
    with pytest.raises(CacheError, match="cache must be a result's cache"):
        generator.generate([5], cache="cache")
    with pytest.raises(InputError, match="over one"):
        TextGenerator(generator.session, graph="model")
    with pytest.raises(InputError, match="must be a path"):
        TextGenerator(7)


def test_a_session_that_is_open_can_be_used(decoder: Decoder, generator: TextGenerator) -> None:
    session = AdapterSession(decoder.package)
    session.load_adapter("a", decoder.adapters["a"])
    over = TextGenerator(session)
    assert set(over.adapters) == {"a"}
    assert over.generate([5], adapter="a", sampling=SHORT) == generator.generate([5], adapter="a", sampling=SHORT)


@pytest.fixture
def copy(decoder: Decoder, tmp_path: Path) -> Path:
    """The package, to be changed."""
    return Path(shutil.copytree(decoder.package, tmp_path / "copy"))


def test_without_a_tokenizer_ids_go_in_and_out(copy: Path, generator: TextGenerator) -> None:
    (copy / "tokenizer.json").unlink()
    plain = TextGenerator(copy)
    found = plain.generate([5, 6], sampling=SHORT)
    assert found.tokens == generator.generate([5, 6], sampling=SHORT).tokens
    assert found.text == ""
    for prompt, sampling in (("the", SHORT), ([5, 6], Sampling(stop="the")), (Chat([{"role": "user"}]), SHORT)):
        with pytest.raises(PackageError, match=r"must hold tokenizer\.json"):
            plain.generate(prompt, sampling=sampling)


def test_a_damaged_tokenizer_is_refused(copy: Path) -> None:
    (copy / "tokenizer.json").write_text("{")
    with pytest.raises(PackageError, match="cannot be read as a tokenizer"):
        TextGenerator(copy).generate([5])


def test_without_the_library_the_extra_is_named(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "tokenizers", None)
    with pytest.raises(MissingDependencyError, match=r"onnx-lora\[generate\]"):
        TextGenerator(copy).generate("the")


@pytest.mark.parametrize("name", ["config.json", "genai_config.json", "generation_config.json"])
def test_damaged_settings_are_refused(copy: Path, name: str) -> None:
    for text, message in (("{", "must be JSON"), ("[]", "must hold a JSON object")):
        (copy / name).write_text(text)
        with pytest.raises(PackageError, match=message):
            TextGenerator(copy)


def test_end_tokens_are_one_or_several(copy: Path) -> None:
    for name in ("config.json", "genai_config.json", "generation_config.json"):
        if (copy / name).exists():
            content = json.loads((copy / name).read_text())
            (content.get("model", content))["eos_token_id"] = [2, 3]
            (copy / name).write_text(json.dumps(content))
    assert TextGenerator(copy)._settings.end == {2, 3}
    (copy / "genai_config.json").write_text('{"model": {"eos_token_id": "x"}}')
    with pytest.raises(PackageError, match="eos_token_id must be"):
        TextGenerator(copy)


@pytest.mark.parametrize("graph, found", [(None, "it has the graphs "), ("decoder_model", "it has the input enc")])
def test_an_encoder_decoder_is_called_what_it_is(
    packages: Callable[[str], Path], graph: str | None, found: str
) -> None:
    with pytest.raises(
        PackageError, match="is of an encoder-decoder, and text is generated here with decoders"
    ) as caught:
        TextGenerator(packages("t5"), graph=graph)
    assert caught.value.problems[0].startswith(found)


def test_a_graph_that_is_no_decoder_is_refused(packages: Callable[[str], Path]) -> None:
    with pytest.raises(PackageError, match="must be a decoder with a cache") as caught:
        TextGenerator(packages("bert"))
    assert "it has no input past_key_values.0.key" in caught.value.problems


def test_an_input_that_nobody_knows_is_named(copy: Path) -> None:
    model = onnx.load(copy / "model.onnx", load_external_data=False)
    model.graph.input.append(helper.make_tensor_value_info("use_cache_branch", TensorProto.BOOL, [1]))
    model.graph.node.append(helper.make_node("Identity", ["use_cache_branch"], ["unused"]))
    model.graph.output.append(helper.make_tensor_value_info("unused", TensorProto.BOOL, [1]))
    onnx.save(model, copy / "model.onnx")
    with pytest.raises(PackageError, match="the input use_cache_branch is not known here"):
        TextGenerator(copy)


def test_a_missing_present_is_named(copy: Path) -> None:
    model = onnx.load(copy / "model.onnx", load_external_data=False)
    del model.graph.output[-1]
    onnx.save(model, copy / "model.onnx")
    with pytest.raises(PackageError, match=r"the output present\.1\.value is missing"):
        TextGenerator(copy)


def test_graphs_that_keep_the_last_logits_only_are_read_right(copy: Path, generator: TextGenerator) -> None:
    """Builders can cut the head to the last position, where shorter rows of a batch have their padding."""
    model = onnx.load(copy / "model.onnx", load_external_data=False)
    graph = model.graph
    for node in graph.node:
        node.output[:] = ["all_logits" if name == "logits" else name for name in node.output]
    graph.initializer.append(helper.make_tensor("last", TensorProto.INT64, [1], [-1]))
    graph.node.append(helper.make_node("Gather", ["all_logits", "last"], ["logits"], axis=1))
    del graph.value_info[:]
    onnx.save(model, copy / "model.onnx")
    prompts = [[5, 17, 42, 8], [9, 50], [7]]
    sampling = Sampling(max_tokens=10, ignore_eos=True)
    assert TextGenerator(copy).generate(prompts, sampling=sampling) == generator.generate(prompts, sampling=sampling)


def test_other_names_are_taken_from_the_config(copy: Path, generator: TextGenerator) -> None:
    """GenAI's config may call inputs and outputs otherwise."""
    model = onnx.load(copy / "model.onnx", load_external_data=False)
    renamed = {"input_ids": "tokens", "attention_mask": "mask", "position_ids": "places", "logits": "scores"}

    def new(name: str) -> str:
        return renamed.get(name, name).replace("past_key_values.", "cache_in_").replace("present.", "cache_out_")

    for value in (*model.graph.input, *model.graph.output):
        value.name = new(value.name)
    for node in model.graph.node:
        node.input[:] = map(new, node.input)
        node.output[:] = map(new, node.output)
    onnx.save(model, copy / "model.onnx")
    file = copy / "genai_config.json"
    config = json.loads(file.read_text()) if file.exists() else {"model": {"decoder": {}}}
    config["model"]["decoder"] |= {
        "inputs": {
            "input_ids": "tokens",
            "attention_mask": "mask",
            "position_ids": "places",
            "past_key_names": "cache_in_%d.key",
            "past_value_names": "cache_in_%d.value",
        },
        "outputs": {
            "logits": "scores",
            "present_key_names": "cache_out_%d.key",
            "present_value_names": "cache_out_%d.value",
        },
    }
    file.write_text(json.dumps(config))
    assert TextGenerator(copy).generate([5, 6], sampling=SHORT) == generator.generate([5, 6], sampling=SHORT)


def test_float16_caches_and_half_integers_are_fed_as_the_graph_wants(copy: Path) -> None:
    """A graph around the decoder that takes int32 ids and a float16 cache."""
    model = onnx.load(copy / "model.onnx", load_external_data=False)
    graph = model.graph
    before, after = [], []
    for value in graph.input:
        kind = {TensorProto.INT64: TensorProto.INT32, TensorProto.FLOAT: TensorProto.FLOAT16}
        if value.name.startswith(("input_ids", "attention_mask", "position_ids", "past_key_values")):
            old = value.type.tensor_type.elem_type
            value.type.tensor_type.elem_type = kind[old]
            for node in graph.node:
                node.input[:] = [f"{name}.cast" if name == value.name else name for name in node.input]
            before.append(helper.make_node("Cast", [value.name], [f"{value.name}.cast"], to=old))
    shared = any(node.op_type == "GroupQueryAttention" for node in graph.node)
    if shared:
        pytest.skip("past and present are one buffer there: nothing can be put between")
    for value in graph.output:
        value.type.tensor_type.elem_type = TensorProto.FLOAT16
        for node in graph.node:
            node.output[:] = [f"{name}.wide" if name == value.name else name for name in node.output]
            node.input[:] = [f"{name}.wide" if name == value.name else name for name in node.input]
        after.append(helper.make_node("Cast", [f"{value.name}.wide"], [value.name], to=TensorProto.FLOAT16))
    nodes = [*before, *graph.node, *after]
    del graph.node[:], graph.value_info[:]
    graph.node.extend(nodes)
    onnx.save(model, copy / "model.onnx")
    found = TextGenerator(copy).generate([[5, 6], [7]], sampling=Sampling(max_tokens=4, ignore_eos=True))
    assert [len(row.tokens) for row in found] == [4, 4]


def test_a_generator_frees_its_session(decoder: Decoder) -> None:
    import gc
    import weakref

    generator = open_generator(decoder, "a")
    cache = generator.generate([5], sampling=SHORT, keep_cache=True).cache
    session = weakref.ref(generator.session)
    del generator
    gc.collect()
    assert session() is None, "a kept cache keeps no session"
    with pytest.raises(CacheError):
        cache.copy()
