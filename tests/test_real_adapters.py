"""Every adapter of the test data on a base of its architecture: PEFT's numbers, or a refusal that says what to do.

The verdicts must be what docs/real-adapters.md holds; with --write-docs they are written there."""

from __future__ import annotations

import gc
import json
import math
import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftConfig, PeftModel
from safetensors.torch import load_file, save_file

from onnx_lora import AdapterSession, BoundAdapter, OnnxLoraError, Package, fold, read_adapter
from onnx_lora.adapters.formats.files.reading import open_reading
from onnx_lora.adapters.formats.files.safetensors_file import read_safetensors
from onnx_lora.adapters.formats.files.torch_pickle import read_torch_pickle
from onnx_lora.adapters.other_versions import other_names
from onnx_lora.errors import AdapterFileError, BindError, UnsupportedAdapterError
from tests.support.bases import BASES, Answers, Base
from tests.support.exporters import HAS_OPTIMUM
from tests.support.numbers import TOLERANCE, assert_close, assert_same_bits

# Old configs hold fields that PEFT has dropped; what they mean is the readers' business.
pytestmark = pytest.mark.filterwarnings("ignore:Unexpected keyword arguments:UserWarning")

DOCS = Path(__file__).parent.parent / "docs" / "real-adapters.md"

INTRO = """# Adapters that people published

Each of these adapters was put on a base of its architecture with random weights, of exactly the dimensions that its
tensors need. "Runs exactly" means that delta, fold and PEFT 0.21 in PyTorch give the same outputs: the largest
difference, relative to the largest output (at least 1), is rounded up to a power of ten. All others are refused, with a
message that names the file, what is wrong in it, and what to do. `make docs` writes this table.

| folder | architecture | method | what it holds | verdict | largest difference | note |
|---|---|---|---|---|---|---|
"""


@dataclass(frozen=True)
class Runs:
    """An adapter that runs. `options`: for `export`, where a default package lacks what it needs."""

    base: str
    note: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)
    refused_by_default: tuple[str, ...] = ()  # words of the message
    formula: str = ""  # how it was computed by hand, where PEFT 0.21 cannot load it
    completed: Mapping[str, Any] = field(default_factory=dict)  # what PEFT 0.21 asks of the config of an older one


@dataclass(frozen=True)
class Refused:
    """An adapter that is refused: the error, the file it is about, and words of its message, the cure among them."""

    architecture: str
    method: str
    error: type[OnnxLoraError]
    file: str
    words: tuple[str, ...]
    note: str = ""


# Neighbours share their base.
RUNS = {
    "berttiny_vqa_rishabh": Runs(
        "bert",
        "never trained: every B is zero, the base's outputs stay; a CAUSAL_LM of BERT, "
        "which Optimum exports as its twin for masked tokens",
        completed={} if HAS_OPTIMUM else {"task_type": None},
    ),
    "bloom_bin_oldmerged_wujindou": Runs(
        "bloom",
        "MergedLinear of PEFT before 0.4, which PEFT 0.21 does not load; it was compared with that PEFT's formula put "
        "into the weights",
        formula="MergedLinear",
    ),
    "distilbert_bin_sidkris": Runs("distilbert, 2 labels"),
    "distilbert_hate_karan": Runs("distilbert, 2 labels"),
    "distilbert_emotion6": Runs("distilbert, 6 labels"),
    "distilbert_classifieronly_kuntya": Runs(
        "distilbert, 6 labels",
        'needs `targets=["classifier"]`; PEFT 0.21 itself finds no module to adapt, so it was compared with '
        "W + alpha/r · B · A put into the head",
        {"targets": ["classifier"]},
        ("classifier", "export again with `targets=` including classifier"),
        formula="head",
    ),
    "gemma3_270m_svg_0112LY": Runs("gemma3"),
    "gpt2_chess_a": Runs("gpt2"),
    "gpt2_chess_b": Runs("gpt2"),
    "gpt2_pseudocode": Runs("gpt2, wide"),
    "gpt2_seqcls6_anirudh": Runs("gpt2, 6 labels", "a head in the file, and no modules_to_save in the config"),
    "gpt2_untrained_sukhmandhawan": Runs("gpt2, 10 labels", "every B is zero: only the head has an effect"),
    "llama_desmason": Runs("llama"),
    "opt125m_bf16_guilherme": Runs("opt", "bfloat16"),
    "peft_regression/adalora_mlp_0.6.1": Runs(
        "mlp", "PEFT 0.21 loads it when its config gets `total_step`", completed={"total_step": 1}
    ),
    "peft_regression/lora_conv2d_0.6.1": Runs(
        "conv2d", 'needs `targets=["conv2d"]`', {"targets": ["conv2d"]}, ("conv2d", "export again with `targets=`")
    ),
    "peft_regression/lora_emb_conv1d_0.6.1": Runs(
        "embedding",
        'needs `targets=["emb", "conv1d"]`',
        {"targets": ["emb", "conv1d"]},
        ("emb", "export again with `targets=` including emb"),
    ),
    "peft_regression/lora_mlp_modules_to_save_0.6.1": Runs(
        "mlp",
        'needs `targets=["lin0"], replaceable=["lin1"]`',
        {"targets": ["lin0"], "replaceable": ["lin1"]},
        ("lin1.weight", "export again with `replaceable=` including lin1"),
    ),
    "pythia_r1_f16_bk7195": Runs("gpt_neox", "float16"),
    "roberta_sidmahurkar": Runs("roberta"),
    "segformer_polarbeargo": Runs(
        "segformer",
        'needs `replaceable=["decode_head"]`; its saved head holds a batch norm, whose statistics are replaced too',
        {"replaceable": ["decode_head"]},
        ("decode_head.batch_norm.running_var", "`replaceable=` including decode_head.batch_norm"),
    ),
    "t5small_bin_recommender": Runs("t5", "three graphs: encoder, decoder, decoder with past"),
    "vit_food_lockheed": Runs("vit"),
    "whisper_small_erika": Runs("whisper", "three graphs: encoder, decoder, decoder with past"),
}
SLOW = ("bloom", "gemma3", "gpt2, wide", "gpt_neox", "llama", "whisper")

MERGE = "merge it into the base with PEFT (merge_and_unload) and export that"
REFUSED = {
    "finegates_mrpc_peftPR": Refused(
        "RobertaForSequenceClassification",
        "FINEGATES",
        UnsupportedAdapterError,
        "adapter_config.json",
        ("FINEGATES", MERGE),
        "a pull request of PEFT, never merged",
    ),
    "gptneo_movies_sara": Refused(
        "GPTNeoForCausalLM",
        "LoRA",
        AdapterFileError,
        "",
        ("'Copy of adapter_model.safetensors'", "rename it to adapter_model.safetensors"),
        "renamed, it runs exactly",
    ),
    "lerobot_odd_inishpy": Refused(
        "SmolVLA",
        "unknown",
        AdapterFileError,
        "adapter_config.json",
        ("peft_type", "convert the adapter to PEFT's format"),
        "not PEFT's; holds no factor at all",
    ),
    "llama_truncated_sherry": Refused(
        "LlamaForCausalLM", "LoRA", AdapterFileError, "adapter_model.bin", ("cut off", "get it again")
    ),
    "t5small_noconfig_rajpreet": Refused(
        "T5ForConditionalGeneration",
        "LoRA",
        AdapterFileError,
        "",
        ("must hold adapter_config.json", "get it from where the adapter was trained"),
    ),
}


@dataclass(frozen=True)
class Packages:
    """Exports bases and keeps the last one only: together they would take 5 GB of disk."""

    folder: Path
    made: dict[str, Package] = field(default_factory=dict)

    def get(self, base: str, **options: Any) -> Package:
        key = repr((base, options))
        if key not in self.made:
            self.made.clear()
            shutil.rmtree(self.folder, ignore_errors=True)
            self.folder.mkdir()
            self.made[key] = BASES[base].export(self.folder, **options)
        return self.made[key]

    def answers(self, base: str, change: Callable[[Any], object], package: Package) -> list[Answers]:
        return BASES[base].answers(self.folder, package, change)


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Packages]:
    folder = tmp_path_factory.mktemp("bases") / "one"
    yield Packages(folder)
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def rows() -> dict[str, str]:
    """The lines of the table, by folder."""
    return {}


def _run(session: Any, answers: Answers, **choice: Any) -> dict[str, Any]:
    names = [value.name for value in session.get_outputs()]
    return dict(zip(names, session.run(None, answers.feeds, **choice), strict=True))


def _difference(actual: Mapping[str, Any], expected: Mapping[str, Any]) -> float:
    """The largest, as `assert_close` measures it."""
    return max(
        float(np.abs(value - expected[name]).max(initial=0.0))
        / max(1.0, float(np.abs(expected[name]).max(initial=0.0)))
        for name, value in actual.items()
    )


def _assert_runs(package: Package, answers: list[Answers], adapter: Path) -> tuple[float, BoundAdapter]:
    """Delta and fold give what PyTorch gives; the largest difference, and the adapter as it was bound."""
    largest = moved = 0.0
    for case in answers:
        session = AdapterSession(package, graph=case.graph)
        bound = session.load_adapter("it", adapter)
        base, delta = _run(session, case), _run(session, case, adapter="it")
        del session  # the largest base has 1.6 GB, and a session two copies of it
        folded = _run(fold(package, adapter, graph=case.graph), case)
        for name, expected in case.changed.items():
            if name in delta:
                assert_close(base[name], case.base[name])
                assert_close(delta[name], expected)
                assert_close(folded[name], expected)
        largest = max(largest, _difference(delta, case.changed), _difference(folded, case.changed))
        moved = max(moved, _difference(delta, case.base))
    if set(bound.coverage.silent) == set(bound.coverage.applied) and not bound.coverage.replaced:
        for name, value in delta.items():
            assert_same_bits(value, base[name])
    else:
        assert moved > 5 * TOLERANCE["float32"], "the adapter must be seen in the outputs, or nothing was compared"
    return largest, bound


def _load_by_hand(folder: Path) -> Callable[[torch.nn.Module], object]:
    """LoRA on a head that was saved whole, as the PEFT that wrote it computed it: W + alpha/r · B · A."""

    def change(model: torch.nn.Module) -> None:
        config = json.loads((folder / "adapter_config.json").read_text("utf-8"))
        tensors = {
            key.removeprefix("base_model.model."): value
            for key, value in load_file(folder / "adapter_model.safetensors").items()
        }
        head = {key.replace(".base_layer", ""): value for key, value in tensors.items() if "lora_" not in key}
        product = tensors["classifier.lora_B.weight"] @ tensors["classifier.lora_A.weight"]
        head["classifier.weight"] = head["classifier.weight"] + config["lora_alpha"] / config["r"] * product
        assert not model.load_state_dict(head, strict=False).unexpected_keys

    return change


def _load_merged(folder: Path) -> Callable[[torch.nn.Module], object]:
    """PEFT 0.2, `MergedLinear.forward`: a convolution in two groups, and zeros for the projections without factors."""

    def change(model: torch.nn.Module) -> None:
        config = json.loads((folder / "adapter_config.json").read_text("utf-8"))
        tensors = torch.load(folder / "adapter_model.bin", map_location="cpu", weights_only=True)
        enabled = torch.tensor(config["enable_lora"])
        for key in [key for key in tensors if "lora_A" in key]:
            weight = model.get_submodule(key.split("base_model.model.")[1].removesuffix(".lora_A.weight")).weight
            product = torch.nn.functional.conv1d(
                tensors[key].T[..., None], tensors[key.replace("_A.", "_B.")], groups=2
            )
            rows = enabled.repeat_interleave(len(weight) // len(enabled))
            weight.data[rows] += config["lora_alpha"] / config["r"] * product[..., 0].T

    return change


# What PEFT puts in front of a module's name.
_PEFT = "base_model.model."


def _load_by_peft(folder: Path, completed: Mapping[str, Any] | None = None) -> Callable[[torch.nn.Module], object]:
    fields = json.loads((folder / "adapter_config.json").read_text("utf-8")) | dict(completed or {})
    config = PeftConfig.from_peft_type(**fields) if completed else None

    def load(model: torch.nn.Module) -> object:
        with tempfile.TemporaryDirectory() as scratch:
            return PeftModel.from_pretrained(model, _in_this_version(folder, model, Path(scratch)), config=config)

    return load


def _in_this_version(folder: Path, model: Any, scratch: Path) -> Path:
    """The adapter with the names that the installed transformers has for its modules: under others PEFT loads nothing,
    or a part. tests/test_other_versions.py compares what is read under both names with either version's numbers."""
    file = folder / "adapter_model.safetensors"
    if not file.is_file():
        return folder
    modules = {name for name, _ in model.named_modules()}
    renamed: dict[str, Any] = {}
    targets: set[str] = set()
    for name, values in load_file(file).items():
        own = name.removeprefix(_PEFT)
        module = own.partition(".lora_")[0] if ".lora_" in own else own.rpartition(".")[0]
        other = [found for found in other_names(module, [model.config.model_type]) if found in modules]
        renamed[f"{_PEFT}{other[0]}{own.removeprefix(module)}" if other else name] = values
        if ".lora_" in own:
            targets.update(other)
    if not targets:
        return folder
    config = json.loads((folder / "adapter_config.json").read_text("utf-8"))
    (scratch / "adapter_config.json").write_text(json.dumps(config | {"target_modules": sorted(targets)}))
    save_file(renamed, scratch / file.name)
    return scratch


@pytest.mark.parametrize(
    "folder", [pytest.param(name, marks=pytest.mark.slow if case.base in SLOW else ()) for name, case in RUNS.items()]
)
def test_a_published_adapter_runs_with_pefts_numbers(
    folder: str, data: Path, bases: Packages, rows: dict[str, str]
) -> None:
    case, path = RUNS[folder], data / "adapters" / folder
    package = bases.get(case.base, **case.options)
    by_hand = {"head": _load_by_hand, "MergedLinear": _load_merged}
    load = by_hand[case.formula](path) if case.formula else _load_by_peft(path, case.completed)
    answers = bases.answers(case.base, load, package)
    gc.collect()  # PEFT's models hold themselves
    largest, bound = _assert_runs(package, answers, path)
    cells = [_architecture(BASES[case.base]), bound.origin.method, _holdings(path), "runs exactly"]
    rows[folder] = _row(folder, *cells, f"1e{math.ceil(math.log10(max(largest, 1e-9)))}", case.note)


@pytest.mark.parametrize("folder", [name for name, case in RUNS.items() if case.formula == "head"])
def test_where_the_formula_was_used_peft_refuses_the_file(folder: str, data: Path) -> None:
    with pytest.raises(ValueError, match="No modules were targeted"):
        PeftModel.from_pretrained(BASES[RUNS[folder].base].model(), data / "adapters" / folder)


@pytest.mark.parametrize("folder", [name for name, case in RUNS.items() if case.refused_by_default])
def test_what_a_default_package_lacks_is_said_with_the_cure(folder: str, data: Path, bases: Packages) -> None:
    case, path = RUNS[folder], data / "adapters" / folder
    with pytest.raises(BindError) as caught:
        AdapterSession(bases.get(case.base)).load_adapter("it", path)
    assert str(caught.value).startswith(str(path))
    assert [word for word in case.refused_by_default if word not in str(caught.value)] == []


@pytest.mark.parametrize("folder", REFUSED)
def test_a_published_adapter_is_refused_with_file_tensor_and_cure(
    folder: str, data: Path, rows: dict[str, str]
) -> None:
    case, path = REFUSED[folder], data / "adapters" / folder
    with pytest.raises(case.error) as caught:
        read_adapter(path)
    error = caught.value
    assert type(error) is case.error
    assert str(error).startswith(f"{path / case.file}: ")
    assert [word for word in case.words if word not in str(error)] == []
    telling = [problem for problem in error.problems if case.words[0] in problem] or error.problems
    verdict = f"refused: {'; '.join([error.message, *telling[:1]])}"
    rows[folder] = _row(folder, case.architecture, case.method, _tensors(path), verdict, "", case.note)


def test_renamed_as_its_refusal_says_an_adapter_runs(data: Path, bases: Packages, tmp_path: Path) -> None:
    for name in ("adapter_config.json", "Copy of adapter_model.safetensors"):
        shutil.copyfile(data / "adapters" / "gptneo_movies_sara" / name, tmp_path / name.removeprefix("Copy of "))
    package = bases.get("gpt_neo")
    _assert_runs(package, bases.answers("gpt_neo", _load_by_peft(tmp_path), package), tmp_path)


def test_no_adapter_is_without_a_verdict(data: Path) -> None:
    root = data / "adapters"
    folders = {path.parent.relative_to(root).as_posix() for path in root.rglob("SOURCE.txt")}
    assert folders == set(RUNS) | set(REFUSED)


def test_the_table_in_the_docs_is_what_was_found(request: pytest.FixtureRequest, rows: dict[str, str]) -> None:
    if missing := sorted((set(RUNS) | set(REFUSED)) - set(rows)):
        pytest.skip(f"needs all verdicts of this file; {len(missing)} were not made, the first of {missing[0]}")
    text = INTRO + "\n".join(rows[folder] for folder in sorted(rows)) + "\n"
    if request.config.getoption("--write-docs"):
        DOCS.write_text(text, "utf-8")
    assert _agree(DOCS.read_text("utf-8"), text), "the table is another now: write it with `make docs`, and look at it"


def _agree(written: str, found: str) -> bool:
    """Equal, where a difference may be ten times another machine's."""
    magnitude = re.compile(r"(?<=\| 1e-)\d+(?= \|)")
    numbers = zip(magnitude.findall(written), magnitude.findall(found), strict=False)
    return magnitude.sub("", written) == magnitude.sub("", found) and all(abs(int(a) - int(b)) <= 1 for a, b in numbers)


def _row(*cells: str) -> str:
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def _architecture(base: Base) -> str:
    with torch.device("meta"):
        return type(base.make()).__name__


def _holdings(folder: Path) -> str:
    """The modules by their last name, with rank and scale, and those that come whole."""
    adapter = read_adapter(folder)
    kinds: dict[str, Counter[str]] = {}
    for module, delta in adapter.deltas.items():
        kinds.setdefault(f"r = {delta.a.shape[0]}, scale {delta.scale:g}", Counter())[module.rpartition(".")[2]] += 1
    parts = [
        f"{', '.join(f'{count} × {name}' for name, count in sorted(names.items()))} ({kind})"
        for kind, names in sorted(kinds.items())
    ]
    whole = sorted({name.rpartition(".")[0] for name in adapter.replacements})
    return "; ".join(parts + [f"whole: {', '.join(whole)}"] * bool(whole))


def _tensors(folder: Path) -> str:
    """What the file holds, as it is: how many tensors of what name and shape."""
    try:
        (file,) = [*folder.glob("*.safetensors"), *folder.glob("*.bin")]
        with open_reading(file) as reading:
            read = read_safetensors if file.suffix == ".safetensors" else read_torch_pickle
            tensors = read(reading).tensors
    except AdapterFileError:
        return "cannot be read"
    kinds: dict[str, list[tuple[int, ...]]] = {}
    for name, value in tensors.items():
        kind = re.search(r"lora_.*|[^.]+$", name)
        kinds.setdefault(kind[0] if kind else name, []).append(value.shape)
    return "; ".join(
        f"{len(shapes)} × {kind}" + (f" {list(shapes[0])}" if len(set(shapes)) == 1 and shapes[0] else "")
        for kind, shapes in sorted(kinds.items())
    )
