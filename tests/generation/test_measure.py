"""A decoder is measured as it writes: a prefill, and steps of one token behind it."""

from __future__ import annotations

import json
import sys

import pytest

from onnx_lora import measure
from onnx_lora.cli import main
from tests.generation.conftest import FAMILIES, Decoder, Make
from tests.support.json_schema import check_result


@pytest.mark.parametrize("family", ["growing", "shared"])
def test_a_decoder_is_measured_at_prefill_and_decode(family: str, decoders_of: Make) -> None:
    assert ("llama", family) in FAMILIES
    decoder = decoders_of("llama", family)
    result = measure(decoder.package, decoder.adapters["a"], tokens=7, rounds=140, seconds=20, threads=1)
    prefill, step = result.graphs[0].calls
    assert (prefill.call, step.call) == ("prefill of 7 tokens", "one token")
    # More steps than the context of 256 has room for: a text begins anew.
    assert step.rounds == 140
    for call in (prefill, step):
        assert call.delta is not None
        assert call.folded is not None


def test_the_command_shows_a_table_or_json(
    decoder: Decoder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["onnx-lora", "measure", str(decoder.package), "--adapter", str(decoder.adapters["a"]), "--rounds", "2"]
    command += ["--threads", "1", "--providers", "CPUExecutionProvider"]
    monkeypatch.setattr(sys, "argv", command)
    main()
    shown = capsys.readouterr().out
    assert "adapter folded" in shown
    assert "one token" in shown
    assert "if adapters switch" in shown
    monkeypatch.setattr(sys, "argv", [*command, "--json"])
    main()
    result = json.loads(capsys.readouterr().out)
    check_result("measure", result)
    assert [call["call"] for call in result["graphs"][0]["calls"]] == ["prefill of 32 tokens", "one token"]
    assert result["advice"]["switching"] == "delta"


def test_ctrl_c_ends_it_with_one_line(
    decoder: Decoder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("onnx_lora.runtime.measuring.take_turns", interrupt)
    monkeypatch.setattr(
        sys, "argv", ["onnx-lora", "measure", str(decoder.package), "--adapter", str(decoder.adapters["a"])]
    )
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 130
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.strip() == "interrupted; nothing half done is left"
