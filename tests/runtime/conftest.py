from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnxruntime
import pytest

from onnx_lora.package import Package
from onnx_lora.runtime import AdapterSession
from tests.runtime import tiny

CPU = ["CPUExecutionProvider"]


@pytest.fixture(scope="package")
def package(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Package]:
    """One for all tests: that none of them changes a byte of it is checked at the end."""
    package = tiny.make_package(tmp_path_factory.mktemp("runtime") / "tiny")
    before = contents(package.path)
    yield package
    assert contents(package.path) == before


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def session(package: Package) -> AdapterSession:
    """With "a" and "b" loaded: deltas of ranks 2 and 5."""
    return open_session(package)


def open_session(package: Package, **options: Any) -> AdapterSession:
    session = AdapterSession(package, providers=CPU, sess_options=one_thread(), **options)
    session.load_adapter("a", tiny.adapter("a", 1))
    session.load_adapter("b", tiny.adapter("b", 2, rank=5))
    return session


def one_thread() -> onnxruntime.SessionOptions:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    return options
