"""What the whole suite shares: no hub, quiet libraries, the real data if it is there, models exported once; and which
tests `make fast` leaves out."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest

from onnx_lora.errors import MissingDependencyError
from tests.support.once import made_once

_ROOT = Path(__file__).parent.parent

# Files and folders whose tests `make fast` leaves out: they export with torch, start the fuzzer or a foreign program,
# or run whole pages of the docs. A test elsewhere that takes more than a few seconds is marked by itself.
_SLOW = (
    "exporter/test_attacks.py",
    "exporter/test_batch_norms.py",
    "exporter/test_fused_norms.py",
    "exporter/test_diffusion.py",
    "exporter/test_export.py",
    "exporter/test_genai.py",
    "exporter/test_genai_embeddings.py",
    "exporter/test_genai_whole_weights.py",
    "exporter/test_language_parts.py",
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


# What exports, trains and compares. Where it is not installed (`make matrix`), tests that need it are skipped aloud.
_HEAVY = ("torch", "transformers", "peft", "optimum", "diffusers", "onnxruntime_genai")
_ABSENT = tuple(name for name in _HEAVY if find_spec(name) is None)


def _needs_what_is_absent(file: Path) -> bool:
    """Whether a file of tests cannot even be imported."""
    modules = "|".join((*_ABSENT, r"tests\.support\.(?:models|bases|diffusion)" if "torch" in _ABSENT else "-"))
    return re.search(rf"^(?:import|from) (?:{modules})\b", file.read_text("utf-8"), re.MULTILINE) is not None


collect_ignore = [str(file) for file in _ROOT.glob("tests/**/test_*.py") if _ABSENT and _needs_what_is_absent(file)]
if "torch" in _ABSENT:
    collect_ignore.append(str(_ROOT / "tests" / "generation"))  # whose conftest makes decoders


def pytest_report_header() -> list[str]:
    if not _ABSENT:
        return []
    return [f"not installed: {', '.join(_ABSENT)}; {len(collect_ignore)} files of tests are left out for it"]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup(item: pytest.Item) -> Iterator[None]:
    yield from _skipping_what_is_absent()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    yield from _skipping_what_is_absent()


def _skipping_what_is_absent() -> Iterator[None]:
    """Skip a test that ended because a library is not installed that this environment was made without."""
    try:
        yield
    except ImportError as error:
        if (error.name or "").partition(".")[0] not in _ABSENT:
            raise
        pytest.skip(f"needs {error.name}")
    except MissingDependencyError as error:
        said = error.message.lower().replace("-", "_")
        if not any(name in said for name in _ABSENT):
            raise
        pytest.skip(f"needs what is not installed: {error.message}")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    tests = Path(__file__).parent
    slow = [tests / place for place in _SLOW]
    for item in items:
        if any(item.path.is_relative_to(place) for place in slow):
            item.add_marker(pytest.mark.slow)
        if "matrix" in item.keywords and not item.config.getoption("--matrix"):
            item.add_marker(pytest.mark.skip(reason="tried by `make matrix`"))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--matrix", action="store_true", help="also try the architectures that CI leaves out")
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
    if getattr(model.config, "pad_token_id", 0) is None:
        model.config.pad_token_id = 0
    model.save_pretrained(folder)


def _export(checkpoint: Path, folder: Path) -> None:
    from onnx_lora.exporter import export
    from tests.support.exporters import VIA

    export(checkpoint, folder, via=VIA, verify=False)
