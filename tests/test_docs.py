"""Every command and snippet of README and docs runs, in the order a reader would type them."""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import pytest

import onnx_lora
import onnx_lora.errors
from onnx_lora.cli import COMMANDS

ROOT = Path(onnx_lora.__file__).parent.parent
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")])
# These make what the other pages go on with.
FIRST = ["commands.md", "README.md"]
PAGES.sort(key=lambda page: -FIRST.index(page.name) if page.name in FIRST else 1)

_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)

# Commands of a reader's environment, and of downloads.
UNRUN = ["python3", ".", "git", ["pip", "download"], ["unzip", "-q"]]

# Languages of blocks that are no commands.
_PICTURES = {"", "text", "json", "yaml"}

Make = Callable[[str], Path]


def _blocks(page: Path) -> Iterator[tuple[str, str]]:
    for match in _BLOCK.finditer(page.read_text("utf-8")):
        yield match[1], match[2]


def _commands(block: str) -> Iterator[list[str]]:
    for line in block.replace("\\\n", " ").splitlines():
        if words := shlex.split(line, comments=True):
            yield words


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory, checkpoints: Make) -> Path:
    """A folder with what a reader has: a clone, a checkpoint, and two adapters."""
    import shutil

    from tests.support.models import make_adapter, make_model

    folder = tmp_path_factory.mktemp("desk")
    shutil.copytree(checkpoints("llama"), folder / "my-model")
    for part in ("onnx_lora", "constraints.txt"):
        (folder / part).symlink_to(ROOT / part)
    for name, options in {"sql": {"r": 4, "target_modules": ["q_proj", "v_proj"]}, "polite": {"r": 2}}.items():
        targets: dict[str, Any] = {"target_modules": "all-linear"} | options
        make_adapter(make_model("llama"), folder / "adapters" / name, seed=len(name), **targets)
    _make_llm(folder)
    if importlib.util.find_spec("diffusers"):
        _make_pipeline(folder)
    return folder


def _make_llm(folder: Path) -> None:
    """A checkpoint with a tokenizer, and with heads wide enough for GenAI's builder; two adapters for it."""
    import transformers as hf

    from benchmarks.subject import make_tokenizer
    from tests.support.models import make_adapter

    sizes = {"vocab_size": 500, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2}

    def model() -> Any:
        return hf.LlamaForCausalLM(hf.LlamaConfig(**sizes, **heads))

    model().save_pretrained(folder / "my-llm")
    make_tokenizer(folder / "my-llm")
    (folder / "texts.txt").write_text("once upon a time\nthe king said no\n", "utf-8")
    make_adapter(model(), folder / "llm-adapters" / "sql", r=4, target_modules=["q_proj", "v_proj"])
    make_adapter(model(), folder / "llm-adapters" / "polite", r=2, target_modules="all-linear", seed=2)


def _make_pipeline(folder: Path) -> None:
    """A pipeline of diffusers, and two styles for it."""
    from tests.support.diffusion import make_pipeline, make_style

    pipeline = make_pipeline(folder / "my-pipeline")
    make_style(pipeline, folder / "styles" / "ink.safetensors")
    make_style(pipeline, folder / "styles" / "oil.safetensors", seed=2)


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_block_runs(page: Path, desk: Path) -> None:
    if page.name == "genai.md":
        pytest.importorskip("onnxruntime_genai", reason="needs ONNX Runtime GenAI: pip install onnx-lora[genai]")
    if page.name in ("diffusion.md", "diffusion-styles.md"):
        pytest.importorskip("diffusers", reason="needs diffusers: pip install onnx-lora[diffusion]")
    for language, block in _blocks(page):
        if language == "python":
            _run([sys.executable, "-c", block], desk)
        elif language == "bash":
            for words in _commands(block):
                _run_command(words, desk)
        else:
            assert language in _PICTURES, f"{page.name}: a block in {language!r} that nothing runs"


def _run_command(words: list[str], desk: Path) -> None:
    if words[0] == "onnx-lora":
        _run([sys.executable, "-m", "onnx_lora", *words[1:]], desk)
    elif words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE), words
    elif words[:2] == ["pip", "install"]:
        extras = re.fullmatch(r"(?:onnx-lora|\.)\[(.*)\]", words[-1])
        known = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["optional-dependencies"]
        assert extras, words
        assert set(extras[1].split(",")) <= set(known), words
    elif words[0] == "python" and words[1:2] == ["-m"]:
        __import__(words[2])
    elif words[0] == "python":
        assert (ROOT / words[1]).is_file(), words
        _run([sys.executable, str(ROOT / words[1]), "--help"], desk)
    else:
        assert words[0] in UNRUN or words[:2] in UNRUN, f"a command that nothing runs: {words}"


def _run(command: list[str], desk: Path) -> None:
    result = subprocess.run(command, cwd=desk, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, f"{' '.join(command)[:300]}\n{result.stdout[-1000:]}\n{result.stderr[-3000:]}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text("utf-8")):
        assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_the_figure_in_the_readme_is_the_measured_one() -> None:
    results = json.loads((ROOT / "benchmarks" / "results" / "decode.json").read_text("utf-8"))
    milliseconds = results["int4"]["milliseconds a token"]
    shown = {
        "onnx-lora, int4": milliseconds["r=16 on all seven"],
        "GenAI, int4": milliseconds["GenAI: package, r=16 on all seven"],
        "llama.cpp, Q4_0": milliseconds["llama.cpp: r=16 on all seven"],
        "PEFT, PyTorch": milliseconds["PEFT (fp32): r=16 on all seven"],
    }
    best = 1000 / min(shown.values())
    lines = []
    for name, each in shown.items():
        speed = 1000 / each  # tokens a second
        bar = "█" * round(40 * speed / best)
        lines.append(f"{name:18}{bar:40}  {speed:3.0f}")
    figure = "\n".join(lines)
    assert figure in (ROOT / "README.md").read_text("utf-8"), f"the README must show\n{figure}"


def test_the_ratios_in_the_docs_are_the_measured_ones() -> None:
    results = json.loads((ROOT / "benchmarks" / "results" / "main.json").read_text("utf-8"))
    page = (ROOT / "docs" / "performance.md").read_text("utf-8")
    for kind, ratio in results["decode"]["ratio"].items():
        assert f"| {ratio:.2f} | {results['prefill']['ratio'][kind]:.2f} |" in page, f"{kind}: not what was measured"
    assert f"| {results['starting']['fold / plain session']:.2f} |" in page


def test_the_costs_of_many_points_are_those_measured() -> None:
    results = json.loads((ROOT / "benchmarks" / "results" / "points.json").read_text("utf-8"))
    page = (ROOT / "docs" / "performance.md").read_text("utf-8")
    sizes = list(results["CPU seconds"])
    for name in results["CPU seconds"][sizes[0]]:
        cells = [results["CPU seconds"][size].get(name) for size in sizes]
        row = " | ".join("" if cell is None else f"{cell:.2f}" for cell in cells)
        assert f"| {name} | {row} |" in page, f"{name}: not what was measured"


def test_the_decode_table_in_the_docs_is_the_measured_one() -> None:
    results = json.loads((ROOT / "benchmarks" / "results" / "decode.json").read_text("utf-8"))
    page = (ROOT / "docs" / "performance.md").read_text("utf-8")
    for name, milliseconds in results["fp32"]["milliseconds a token"].items():
        own = f"| {name} | {milliseconds:.1f} | {results['fp32']['ratio, token'][name]:.2f} |"
        quantized = results["int4"]
        own += f" {quantized['milliseconds a token'][name]:.1f} | {quantized['ratio, token'][name]:.2f} |"
        assert own in page, f"{name}: not what was measured"


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_every_command_has_an_example_that_names_real_options(name: str) -> None:
    command = COMMANDS[name].load(name)
    text = (command.help or "").replace("\b", "")
    example = re.search(rf"onnx-lora {name}( .*)?$", text, re.MULTILINE)
    assert example, f"onnx-lora {name} --help shows no example"
    known = {option for parameter in command.params for option in parameter.opts}
    assert set(re.findall(r"(--[\w-]+)", example[0])) <= known
    assert all(parameter.help for parameter in command.params if isinstance(parameter, click.Option)), name


def test_the_site_shows_every_page_once() -> None:
    """The site's builder refuses broken links, and says nothing of pages that its navigation misses."""
    from scripts.build_site import page_names

    configuration = (ROOT / "mkdocs.yml").read_text("utf-8")
    shown = re.findall(r"^\s+- .*: ([\w-]+\.md)$", configuration, re.MULTILINE)
    assert sorted(shown) == sorted(page_names().values())


def test_the_reference_has_every_public_name() -> None:
    page = (ROOT / "docs" / "reference.md").read_text("utf-8")
    named = set(re.findall(r"^::: onnx_lora\.(\w+)$", page, re.MULTILINE))
    errors = {name for name in onnx_lora.__all__ if name in onnx_lora.errors.__all__}
    assert named - {"errors"} == set(onnx_lora.__all__) - errors - {"__version__"}


def test_a_page_of_the_site_has_the_links_of_the_site() -> None:
    from scripts.build_site import in_site

    text, linked = in_site(
        "[a](../README.md) [b](genai.md#x) [c](../tests/test_docs.py) [d](https://x/y) [e](#f)", "docs"
    )
    assert text == "[a](index.md) [b](genai.md#x) [c](source/tests/test_docs.py) [d](https://x/y) [e](#f)"
    assert linked == {"tests/test_docs.py"}
