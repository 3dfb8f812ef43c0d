"""Results as JSON: what the docs and the schema say of them is what they are."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any

import jsonschema
import pytest

from onnx_lora.cli import COMMANDS
from onnx_lora.errors import VerificationError
from onnx_lora.exporter import Comparison
from onnx_lora.results import ErrorResult, OutputComparison, as_json
from onnx_lora.wording import in_words
from scripts import result_schema
from tests.support.json_schema import check_result


def test_the_schema_and_the_page_are_those_of_the_classes() -> None:
    schema = json.loads(result_schema.SCHEMA.read_text("utf-8"))
    assert schema == result_schema.make_schema(), "run make docs"
    page = result_schema.PAGE.read_text("utf-8")
    assert page == result_schema.render(page), "run make docs"
    jsonschema.Draft202012Validator.check_schema(schema)


def test_every_command_has_its_result() -> None:
    assert set(result_schema.COMMANDS) == {*COMMANDS, "error"}


def test_what_is_no_finite_number_is_null() -> None:
    @dataclass
    class Inner:
        numbers: Any

    assert as_json(Inner({"a": (1.5, math.nan, math.inf)})) == {"numbers": {"a": [1.5, None, None]}}


def test_a_result_that_lacks_a_field_is_found() -> None:
    whole = as_json(ErrorResult("InputError", "no", None, (), 2))
    check_result("error", whole)
    for name in whole:
        with pytest.raises(jsonschema.ValidationError, match=f"'{name}' is a required property"):
            check_result("error", {key: value for key, value in whole.items() if key != name})


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_every_result_is_said_in_words_or_drawn(command: str) -> None:
    drawn = {"demo", "generate", "measure"}  # by a function of their own in `report`
    for kind in result_schema.COMMANDS[command]:
        assert (in_words.dispatch(kind) is not in_words.dispatch(object)) == (command not in drawn)


def test_a_verification_that_failed_has_its_numbers() -> None:
    wrong = Comparison("model", "adapter", "logits", 0.5, 0.1)
    error = VerificationError("must reproduce the model", comparisons=[wrong])
    body = as_json(ErrorResult.of(error))
    check_result("error", body)
    assert body["verification"]["outputs"][0]["difference"] == 0.5
    assert not body["verification"]["agrees"]
    assert as_json(ErrorResult.of(VerificationError("no graph")))["verification"] is None


def test_a_difference_that_is_no_number_is_null() -> None:
    body = as_json(OutputComparison("model", "base", "", "logits", None, 0.1, agrees=False))
    assert body["difference"] is None
