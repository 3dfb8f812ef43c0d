"""`onnx-lora generate`: what it prints is what the generator writes."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence

import pytest
from click.testing import CliRunner, Result

from onnx_lora import Chat, Sampling, TextGenerator
from onnx_lora.cli import cli, main
from onnx_lora.points import Array
from onnx_lora.runtime.generation import decoder as running
from tests.generation.conftest import Decoder
from tests.support.json_schema import check_result

TWENTY = Sampling(max_tokens=20)


def _run(decoder: Decoder, *words: str) -> Result:
    command = ["generate", str(decoder.package), "--max-tokens", "20", *words]
    return CliRunner().invoke(cli, command, catch_exceptions=True)


def _adapter(decoder: Decoder, name: str, weight: str = "") -> list[str]:
    return ["--adapter", f"{name}={decoder.adapters[name]}{weight}"]


def test_one_prompt_is_streamed_to_stdout(decoder: Decoder, generator: TextGenerator) -> None:
    found = _run(decoder, "--prompt", "the cat", *_adapter(decoder, "a"))
    expected = generator.generate("the cat", adapter="a", sampling=TWENTY)
    assert found.stdout == expected.text + "\n"
    assert f"{len(expected.tokens)} tokens" in found.stderr
    assert "a second" in found.stderr
    assert f"ended by {expected.reason}" in found.stderr


def test_several_prompts_are_one_batch_with_an_adapter_each(decoder: Decoder, generator: TextGenerator) -> None:
    words = ["--prompt", "the cat", "--prompt", "hat", *_adapter(decoder, "a"), *_adapter(decoder, "b", ":0.5")]
    expected = generator.generate(["the cat", "hat"], adapter=[{"b": 0.5}, None], sampling=TWENTY)
    found = _run(decoder, *words, "--rows", "b,-")
    assert found.stdout == f"=== 1: the cat\n{expected[0].text}\n\n=== 2: hat\n{expected[1].text}\n\n"
    blend = json.loads(_run(decoder, *words, "--json").stdout)
    check_result("generate", blend)
    expected = generator.generate(["the cat", "hat"], adapter={"a": 1.0, "b": 0.5}, sampling=TWENTY)
    assert [each["tokens"] for each in blend["generations"]] == [list(each.tokens) for each in expected]
    assert [each["text"] for each in blend["generations"]] == [each.text for each in expected]
    assert blend["tokens_per_second"] > 0


def test_settings_and_chat_reach_the_generator(decoder: Decoder, generator: TextGenerator) -> None:
    words = ["--temperature", "1.5", "--top-k", "30", "--top-p", "0.9", "--repetition-penalty", "1.1", "--seed", "5"]
    sampling = Sampling(20, 1.5, 30, 0.9, 1.1, 5, ("zz",))
    found = _run(decoder, "--prompt", "cat", "--chat", "--stop", "zz", *words)
    chat = Chat([{"role": "user", "content": "cat"}])
    assert found.stdout == generator.generate(chat, sampling=sampling).text + "\n"


def test_wrong_input_ends_with_2_and_says_what(decoder: Decoder) -> None:
    command = [sys.executable, "-m", "onnx_lora", "generate", str(decoder.package)]
    for words, message in (
        (["--prompt", "a", "--temperature", "-1", "--json"], "temperature must be"),
        (["--prompt", "a", "--rows", "c"], "no adapter 'c' is loaded"),
    ):
        done = subprocess.run([*command, *words], capture_output=True, text=True, check=False)
        assert done.returncode == 2
        assert message in done.stderr
        assert ("SamplingError" in done.stdout) == ("--json" in words)


def test_an_interrupt_ends_it_cleanly(
    decoder: Decoder, generator: TextGenerator, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pieces = list(generator.stream("the cat", sampling=TWENTY))
    runs = iter(range(5))
    feed = running.Decoder.feed

    def interrupted(self: running.Decoder, tokens: Sequence[Sequence[int]]) -> Array:
        if next(runs, None) is None:
            raise KeyboardInterrupt
        return feed(self, tokens)

    monkeypatch.setattr(running.Decoder, "feed", interrupted)
    monkeypatch.setattr(sys, "argv", ["onnx-lora", "generate", str(decoder.package), "--prompt", "the cat"])
    with pytest.raises(SystemExit) as left:
        main()
    written = capsys.readouterr()
    assert left.value.code == 130
    assert written.out == "".join(piece.text for piece in pieces[:5])
    assert "interrupted" in written.err
    assert "Traceback" not in written.err
