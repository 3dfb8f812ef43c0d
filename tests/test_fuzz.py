"""The fuzzer finds what is planted, goes on where it stopped, and finds nothing in a short run over everything."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from random import Random

import onnx
import pytest

from tests.fuzz import campaign, planted, seeds, worker
from tests.fuzz.campaign import Plan, run
from tests.fuzz.mutate import mutate

PLANTED = "tests.fuzz.planted"
FOUND = {"_throw": "foreign", "_panic": "foreign", "_die": "crash", "_allocate": "memory", "_litter": "left behind"}


@pytest.mark.parametrize("name", FOUND)
def test_what_is_planted_is_found_and_seen_again(name: str, tmp_path: Path) -> None:
    summary = run(Plan(tmp_path, memory=60, model=0, only=[name], table=PLANTED))
    assert summary.finished
    assert {signature.split(": ")[1] for signature in summary.failures} == {FOUND[name]}
    report = json.loads((Path(summary.kept[0]) / "report.json").read_text())
    mutant = (Path(summary.kept[0]) / "files" / "file").read_bytes()
    assert len(mutant) < len(planted.WHOLE) - 3
    assert report["again"].endswith(summary.kept[0])
    if name == "_throw":
        command = [sys.executable, "-m", *report["again"].split()[2:], "--table", PLANTED]
        again = subprocess.run(command, capture_output=True, text=True, check=False)
        assert again.returncode == 1
        assert "KeyError: 'foreign'" in again.stderr


def test_what_does_not_end_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(campaign.LIMITS, "memory", worker.Limits(0.5, 2**30, 250))
    summary = run(Plan(tmp_path, memory=8, model=0, only=["_loop"], table=PLANTED))
    assert summary.finished
    assert [signature.split(": ")[1] for signature in summary.failures] == ["hang"]


def test_a_stopped_run_goes_on_and_does_nothing_twice(tmp_path: Path) -> None:
    size = worker.LIMITS["memory"].batch
    first = run(Plan(tmp_path, memory=size, model=0, only=["none"], table=PLANTED))
    second = run(Plan(tmp_path, memory=3 * size, model=0, only=["none"], table=PLANTED))
    assert (first.tried, second.tried, second.finished, second.failures) == (size, 3 * size, True, {})
    assert sorted(second.done["none"]) == [0, 1, 2]
    assert run(Plan(tmp_path, memory=3 * size, model=0, only=["none"], table=PLANTED)).tried == 3 * size
    with pytest.raises(SystemExit, match="this run has seed 0"):
        run(Plan(tmp_path, seed=1, table=PLANTED))


def test_an_input_is_told_by_its_number(tmp_path: Path) -> None:
    seeds.mlx_folders(tmp_path)
    samples = worker.samples_of(tmp_path)
    made = [worker.mutant(samples, "t", 0, index).changed for index in range(50)]
    assert made == [worker.mutant(samples, "t", 0, index).changed for index in range(50)]
    assert made != [worker.mutant(samples, "t", 1, index).changed for index in range(50)]


def test_changes_reach_what_stands_inside_containers(tmp_path: Path) -> None:
    """Of many mutants some are whole containers still: readers get past their first check."""
    seeds.graphs(tmp_path)
    whole = (tmp_path / "inline" / "m.onnx").read_bytes()
    read = 0
    for index in range(60):
        try:
            model = onnx.ModelProto.FromString(mutate(whole, "m.onnx", Random(index)))
        except Exception:  # noqa: BLE001 - damaged, as half of them should be
            continue
        read += model != onnx.ModelProto.FromString(whole)
    assert read > 15


def test_a_short_run_over_everything_finds_nothing(tmp_path: Path) -> None:
    """`make fuzz` is the long one. Its failures are named with the command that shows them again."""
    plan = Plan(tmp_path / "fuzz", memory=6_000, model=160, seconds=60, jobs=2)
    summary = run(plan)
    assert summary.tried > 200
    reports = [json.loads((Path(kept) / "report.json").read_text()) for kept in summary.kept]
    assert not summary.failures, "\n".join(f"{report['message']}\n{report['trace']}" for report in reports)
