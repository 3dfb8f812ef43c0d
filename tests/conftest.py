"""What the whole suite shares: no hub, quiet libraries, the real data if it is there, models exported once; and which
tests `make fast` leaves out."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest

from tests.support.once import made_once

_ROOT = Path(__file__).parent.parent

# Files and folders whose tests `make fast` leaves out: they export with torch, start the fuzzer or a foreign program,
# or run whole pages of the docs. A test elsewhere that takes more than a few seconds is marked by itself.
_SLOW = (
    "exporter/test_attacks.py",
    "exporter/test_diffusion.py",
    "exporter/test_export.py",
    "exporter/test_genai.py",
    "exporter/test_genai_embeddings.py",
    "exporter/test_newer_configs.py",
    "exporter/test_scale.py",
    "exporter/test_unproven.py",
    "generation",
    "test_architectures.py",
    "test_boundary.py",
    "test_demo.py",
    "test_fuzz.py",
    "test_genai_interop.py",
    "test_interop.py",
    "test_kinds.py",
    "test_methods.py",
    "test_real_adapters.py",
    "test_trained_bases.py",
    "test_verdicts.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    tests = Path(__file__).parent
    slow = [tests / place for place in _SLOW]
    for item in items:
        if any(item.path.is_relative_to(place) for place in slow):
            item.add_marker(pytest.mark.slow)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--write-docs", action="store_true", help="rewrite the tables in docs that tests compare with")


@pytest.fixture(scope="session")
def data() -> Path:
    """The folder of real adapters and bases; tests that need it are skipped where it is not."""
    folder = Path(os.environ.get("ONNX_LORA_TEST_DATA", _ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"needs the real data: {folder} is not there (set ONNX_LORA_TEST_DATA)")
    return folder


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The checkpoint folder of an architecture, made once a run."""

    def make(name: str) -> Path:
        return made_once(tmp_path_factory, f"checkpoint.{name}", lambda folder: _save(name, folder))

    return make


@pytest.fixture(scope="session")
def packages(tmp_path_factory: pytest.TempPathFactory, checkpoints: Callable[[str], Path]) -> Callable[[str], Path]:
    """The package of an architecture with points on every linear module, exported once a run."""

    def make(name: str) -> Path:
        return made_once(tmp_path_factory, f"package.{name}", lambda folder: _export(checkpoints(name), folder))

    return make


def _save(name: str, folder: Path) -> None:
    from tests.support.models import make_model

    model: Any = make_model(name)
    if model.config.pad_token_id is None:
        model.config.pad_token_id = 0
    model.save_pretrained(folder)


def _export(checkpoint: Path, folder: Path) -> None:
    from onnx_lora.exporter import export

    export(checkpoint, folder, via="optimum", verify=False)
