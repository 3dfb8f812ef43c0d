"""What the whole suite shares: no hub, quiet libraries, the real data if it is there, models exported once."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest

_ROOT = Path(__file__).parent.parent


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
    """The checkpoint folder of an architecture, made once a session."""
    made: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in made:
            from tests.support.models import make_model

            made[name] = tmp_path_factory.mktemp("checkpoints") / name
            model: Any = make_model(name)
            if model.config.pad_token_id is None:
                model.config.pad_token_id = 0
            model.save_pretrained(made[name])
        return made[name]

    return make


@pytest.fixture(scope="session")
def packages(tmp_path_factory: pytest.TempPathFactory, checkpoints: Callable[[str], Path]) -> Callable[[str], Path]:
    """The package of an architecture with points on every linear module, exported once a session."""
    made: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in made:
            from onnx_lora.exporter import export

            folder = tmp_path_factory.mktemp("packages") / name
            export(checkpoints(name), folder, via="optimum", verify=False)
            made[name] = folder
        return made[name]

    return make
