"""Damaged files of a package: they are refused in our words, or text is generated; nothing else comes out, and nothing
hangs or takes the machine's memory."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any

import pytest

from onnx_lora import AdapterSession, Chat, Sampling, TextGenerator
from onnx_lora.errors import MissingDependencyError, OnnxLoraError, PackageError, PromptError, RunError
from onnx_lora.runtime.generation import template as rendering
from onnx_lora.runtime.generation.text import translate_failures
from tests.fuzz.mutate import mutate
from tests.generation.conftest import Decoder

Change = Callable[[str, dict[str, Any]], Path]

CHAT = Chat([{"role": "user", "content": "the cat"}])
# The longest that a hostile context or vocabulary lets it write.
SHORT = Sampling(max_tokens=3)

# How many damaged files of each kind: seconds.
ROUNDS = int(os.environ.get("ONNX_LORA_FUZZ", "60"))

FILES = [
    "genai_config.json",
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
]


# A post-processor that names a token which nobody knows.
UNKNOWN_TOKEN = {
    "type": "TemplateProcessing",
    "single": [{"SpecialToken": {"id": "<none>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
    "pair": [],
    "special_tokens": {},
}

GENAI = {
    "context_length": 256,
    "eos_token_id": 2,
    "decoder": {
        "head_size": 16,
        "num_hidden_layers": 2,
        "inputs": {
            "input_ids": "input_ids",
            "attention_mask": "attention_mask",
            "position_ids": "position_ids",
            "past_key_names": "past_key_values.%d.key",
            "past_value_names": "past_key_values.%d.value",
        },
        "outputs": {
            "logits": "logits",
            "present_key_names": "present.%d.key",
            "present_value_names": "present.%d.value",
        },
    },
}


@pytest.fixture(scope="module")
def package(decoder: Decoder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a genai_config.json in both families: other tools may have written one."""
    folder = Path(shutil.copytree(decoder.package, tmp_path_factory.mktemp("hostile") / "package"))
    if not (folder / "genai_config.json").exists():
        (folder / "genai_config.json").write_text(json.dumps({"model": GENAI}))
    return folder


@pytest.fixture(scope="module")
def session(package: Path) -> AdapterSession:
    """Settings and tokenizer are read for each generator, the graph once."""
    return AdapterSession(package)


@pytest.fixture
def changed(package: Path) -> Iterator[Change]:
    """Writes a file of the package, which is itself again after the test."""
    kept: dict[Path, bytes] = {}

    def change(name: str, content: dict[str, Any]) -> Path:
        file = package / name
        kept[file] = file.read_bytes()
        file.write_text(json.dumps(content))
        return file

    yield change
    for file, content in kept.items():
        file.write_bytes(content)


def _use(session: AdapterSession) -> list[OnnxLoraError]:
    """All that reads a file."""
    refusals: list[OnnxLoraError] = []

    def call(action: Callable[[], Any]) -> Any:
        try:
            return action()
        except MissingDependencyError:
            raise
        except OnnxLoraError as error:
            refusals.append(error)
        return None

    generator = call(lambda: TextGenerator(session))
    if generator is not None:
        call(lambda: generator.generate([[5, 6], [7]], sampling=SHORT))
        call(lambda: list(generator.stream("the cat, é", sampling=SHORT)))
        call(lambda: generator.generate(CHAT, sampling=SHORT))
    return refusals


@pytest.mark.parametrize("name", FILES)
def test_damage_gives_our_errors_only(
    name: str, package: Path, session: AdapterSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rendering, "_SECONDS", 1.0)
    file = package / name
    content = file.read_text("utf-8")
    start = int(os.environ.get("ONNX_LORA_FUZZ_SEED", "0"))
    refused = 0
    try:
        for seed in range(start, start + ROUNDS):
            file.write_bytes(mutate(content.encode(), name, Random(seed)))
            try:
                refused += bool(_use(session))
            except BaseException:
                print("seed", seed)  # noqa: T201 - which file it was
                raise
    finally:
        file.write_text(content)
    assert refused > ROUNDS // 10, "the damage is none"
    assert not _use(session), "the package is whole again"


@pytest.mark.parametrize(
    "decoder_changes, problem",
    [
        # The same input for every layer: it was found for ever.
        ({"inputs": {"past_key_names": "input_ids"}}, "model.decoder.inputs.past_key_names must be a name with one %d"),
        ({"inputs": {"past_key_names": "%d.%d"}}, "model.decoder.inputs.past_key_names must be a name with one %d"),
        (
            {"outputs": {"present_key_names": "logits"}},
            "model.decoder.outputs.present_key_names must be a name with one",
        ),
        ({"inputs": {"past_key_names": 7}}, "model.decoder.inputs.past_key_names must be a name, and is 7"),
        ({"inputs": []}, "model.decoder.inputs must be a JSON object, and is a list of 0"),
        ({"head_size": 2**31}, "model.decoder.head_size must be a whole number from 1 to 65536, and is 2147483648"),
        ({"head_size": -1}, "model.decoder.head_size must be"),
        ({"head_size": "16"}, "model.decoder.head_size must be"),
        ({"head_size": 1.5}, "model.decoder.head_size must be"),
        ({"num_hidden_layers": 0}, "model.decoder.num_hidden_layers must be"),
    ],
)
def test_what_genai_config_cannot_say_is_named(
    decoder_changes: dict[str, Any], problem: str, package: Path, session: AdapterSession, changed: Change
) -> None:
    file = changed("genai_config.json", {"model": GENAI | {"decoder": decoder_changes}})
    with pytest.raises(PackageError) as caught:
        TextGenerator(session)
    assert str(caught.value).startswith(f"{file}: says what cannot be")
    assert caught.value.problems[0].startswith(problem)


@pytest.mark.parametrize(
    "decoder_changes, problem",
    [
        ({"num_hidden_layers": 3}, "its cache has 2 layers, and genai_config.json says 3"),
        ({"inputs": {"past_value_names": "past_key_values.%d.key"}}, "is named for two purposes"),
        ({"inputs": {"position_ids": "input_ids"}}, "the input input_ids is named for two purposes"),
        ({"outputs": {"present_key_names": "present.%d.value"}}, "is named for two purposes"),
        ({"outputs": {"present_key_names": "presents.%d.key"}}, "the output presents.0.key is missing"),
        ({"inputs": {"past_key_names": "pasts.%d.key"}}, "the input past_key_values.0.key is not known here"),
        ({"inputs": {"input_ids": "ids"}}, "it has no input ids"),
    ],
)
def test_what_the_graph_does_not_bear_out_is_named(
    decoder_changes: dict[str, Any], problem: str, session: AdapterSession, changed: Change
) -> None:
    changed("genai_config.json", {"model": GENAI | {"decoder": decoder_changes}})
    with pytest.raises(PackageError) as caught:
        TextGenerator(session)
    assert any(problem in each for each in caught.value.problems)


@pytest.mark.parametrize(
    "name, content, problems",
    [
        ("config.json", {"max_position_embeddings": 10**400}, ["max_position_embeddings must be"]),
        ("config.json", {"n_ctx": -1, "head_dim": float("nan")}, ["n_ctx must be", "head_dim must be"]),
        ("config.json", {"text_config": {"hidden_size": True}}, ["text_config.hidden_size must be"]),
        ("config.json", {"text_config": 7}, ["text_config must be a JSON object, and is 7"]),
        ("generation_config.json", {"eos_token_id": [2, "x"]}, ["eos_token_id must be a token id or a list of them"]),
        ("generation_config.json", {"eos_token_id": 2**31}, ["eos_token_id must be"]),
        ("generation_config.json", {"eos_token_id": -2}, ["eos_token_id must be"]),
        ("generation_config.json", {"eos_token_id": {}}, ["eos_token_id must be"]),
    ],
)
def test_all_that_a_config_cannot_say_is_named(
    name: str, content: dict[str, Any], problems: list[str], session: AdapterSession, changed: Change
) -> None:
    file = changed(name, content)
    with pytest.raises(PackageError) as caught:
        TextGenerator(session)
    assert str(caught.value).startswith(f"{file}: says what cannot be")
    assert [each[: len(wanted)] for each, wanted in zip(caught.value.problems, problems, strict=True)] == problems


def test_no_end_token_can_be_said(session: AdapterSession, changed: Change) -> None:
    changed("genai_config.json", {"model": {"eos_token_id": -1}})
    assert TextGenerator(session)._settings.end == frozenset()


def test_files_without_end_are_refused(package: Path, session: AdapterSession, changed: Change) -> None:
    file = changed("config.json", {})
    file.write_text('{"a": "' + "a" * 2**24 + '"}')
    with pytest.raises(PackageError, match="must not have more than 16777216 characters"):
        TextGenerator(session)
    file.unlink()
    file.mkdir()
    try:
        with pytest.raises(PackageError, match="must be a file, and is none"):
            TextGenerator(session)
    finally:
        file.rmdir()


@pytest.mark.parametrize(
    "name, axes, problem",
    [
        ("past_key_values.0.key", ["rows", 2**40, "past", 16], "must have heads and sizes from 1 to 65536"),
        ("past_key_values.0.key", ["rows", 2, "past", 2**40], "must have heads and sizes from 1 to 65536"),
        ("past_key_values.0.key", ["rows", 2, 7, 16], "for any number of tokens"),
        ("past_key_values.0.key", ["rows", "heads", "past", 16], "must be [rows, heads, tokens, size]"),
        ("past_key_values.0.key", ["rows", 2, "past"], "must be [rows, heads, tokens, size]"),
        ("present.0.key", ["rows", 4, "all", 16], "present.0.key must be as past_key_values.0.key is"),
        ("present.0.key", ["rows", 2, "all"], "present.0.key must be as past_key_values.0.key is"),
        ("logits", ["rows", "tokens", 2**40], "must be of a vocabulary of 1 to 16777216"),
        ("logits", ["rows", 100], "must be floats [rows, tokens, vocabulary]"),
        ("input_ids", ["tokens"], "must be int64 or int32 [rows, tokens]"),
    ],
)
def test_shapes_that_no_decoder_has_are_named(
    name: str, axes: list[Any], problem: str, session: AdapterSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ONNX Runtime itself opens some of these, and not others: the graph's own arguments are changed here."""

    def shaped(args: Sequence[Any]) -> list[Any]:
        return [SimpleNamespace(name=arg.name, type=arg.type, shape=axes) if arg.name == name else arg for arg in args]

    inputs, outputs = shaped(session.get_inputs()), shaped(session.get_outputs())
    monkeypatch.setattr(AdapterSession, "get_inputs", lambda self: inputs)
    monkeypatch.setattr(AdapterSession, "get_outputs", lambda self: outputs)
    with pytest.raises(PackageError) as caught:
        TextGenerator(session)
    assert any(problem in each for each in caught.value.problems)


@pytest.mark.parametrize("tokens", [10**6, 10**12, 10**400], ids=["a million", "too many", "no machine's number"])
def test_tokens_that_no_memory_holds_cost_what_is_written_or_are_refused(
    tokens: int, session: AdapterSession, changed: Change
) -> None:
    """A cache in place must be had before the first; a growing one is not."""
    changed("genai_config.json", {})
    changed("config.json", {"head_dim": 16})
    generator = TextGenerator(session)
    assert generator.context is None
    if generator._graph.shared and tokens > 10**6:
        with pytest.raises(RunError, match="smaller max_tokens"):
            generator.stream([5, 6], sampling=Sampling(max_tokens=tokens))
        return
    stream = generator.stream([5, 6], sampling=Sampling(max_tokens=tokens))
    try:
        assert next(stream).token >= 0
    finally:
        stream.close()


@pytest.mark.parametrize(
    "change, when",
    [
        ({"post_processor": {"type": "TemplateProcessing", "single": [], "pair": [], "special_tokens": {}}}, "never"),
        ({"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}}, "opened"),
        ({"post_processor": UNKNOWN_TOKEN}, "encoded"),
    ],
)
def test_panics_of_the_library_are_our_errors(
    change: dict[str, Any], when: str, package: Path, session: AdapterSession, changed: Change
) -> None:
    """They are exceptions of Python, and no `Exception`s."""
    content = json.loads((package / "tokenizer.json").read_text("utf-8"))
    changed("tokenizer.json", content | change)
    generator = TextGenerator(session)
    if when == "never":
        generator.encode("the cat")
    elif when == "opened":
        with pytest.raises(PackageError, match="cannot be read as a tokenizer"):
            generator.generate([5])
    else:
        with pytest.raises(PromptError, match="the tokenizer refuses 'the cat'"):
            generator.generate("the cat")


def test_an_interrupt_is_no_panic() -> None:
    for kind in (KeyboardInterrupt, SystemExit):
        with pytest.raises(kind), translate_failures(PackageError, "never"):
            raise kind
