"""JSON of somebody else's: what is refused, and with whose error."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from onnx_lora.errors import AdapterFileError, ModelError, StorageError
from onnx_lora.json_file import read_json
from onnx_lora.json_text import parse_json


def test_an_object_is_read(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"a": [1, 2.5, "ü"]}', "utf-8")
    assert read_json(tmp_path / "config.json", ModelError) == {"a": [1, 2.5, "ü"]}


@pytest.mark.parametrize(
    "content, message",
    [
        (b"{", "must be JSON"),
        (b"\xff", "must be JSON"),
        (b"[1]", "must be a JSON object, not list"),
        (b"null", "must be a JSON object, not NoneType"),
        (b"[" * 100_000, "must be JSON"),
        (b'{"a": ' + b"9" * 400 + b"}", "a number of 400 digits"),
        (b'{"a": "\\ud800"}', "must be JSON"),
        (b"[" + b"0," * 2_000_001 + b"0]", "at most 2000000 values"),
    ],
    ids=["cut off", "no text", "a list", "nothing", "deep", "a long number", "half a character", "many values"],
)
def test_what_is_no_object_or_hostile_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    file = tmp_path / "config.json"
    file.write_bytes(content)
    with pytest.raises(AdapterFileError, match=message) as caught:
        read_json(file, AdapterFileError)
    assert caught.value.path == str(file)


def test_a_file_beyond_the_limit_is_refused_unread(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"a": 1}')
    with pytest.raises(ModelError, match=r"too large for an index \(limit 7 bytes\)"):
        read_json(tmp_path / "config.json", ModelError, what="an index", limit=7)
    assert read_json(tmp_path / "config.json", ModelError, what="an index", limit=8) == {"a": 1}


@pytest.mark.parametrize("name", ["missing", "folder", "pipe", "a\0b"])
def test_what_is_no_file_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ModelError, match="there is none"):
        read_json(tmp_path / name, ModelError)


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_what_the_system_forbids_is_no_fault_of_the_file(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "config.json").chmod(0)
    with pytest.raises(StorageError):
        read_json(tmp_path / "config.json", ModelError)


def test_text_is_parsed_as_files_are(tmp_path: Path) -> None:
    assert parse_json(b"{}", tmp_path, ModelError, what="the header") == {}
    with pytest.raises(ModelError, match="the header must be a JSON object"):
        parse_json(b"3", tmp_path, ModelError, what="the header")
