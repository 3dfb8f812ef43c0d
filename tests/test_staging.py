"""An output appears whole or not at all, and what a killed run left is taken away by the next."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from onnx_lora import staging
from onnx_lora.errors import OutputExistsError, StorageError
from onnx_lora.staging import replacing, scratch, staged, staged_place

pytest.importorskip("fcntl", reason="without locks nothing is swept")

# Stages the folder "out" here, says so, and waits.
WAITING = """
import sys, time
from onnx_lora.staging import staged
with staged("out") as folder:
    (folder / "half").write_text("half")
    print("here", flush=True)
    time.sleep(60)
"""


def _left(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def _waiting(folder: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen([sys.executable, "-c", WAITING], cwd=folder, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "here\n"
    return process


def test_a_folder_and_a_file_appear_at_the_end(tmp_path: Path) -> None:
    with staged(tmp_path / "new" / "folder") as folder:
        (folder / "a").write_text("a")
        assert not (tmp_path / "new" / "folder").exists()
    with staged_place(tmp_path / "lock") as place:  # as our own lock is called
        place.write_text("b")
    assert (tmp_path / "new" / "folder" / "a").read_text() == "a"
    assert (tmp_path / "lock").read_text() == "b"
    assert _left(tmp_path) == ["lock", "new"]
    assert (tmp_path / "lock").stat().st_nlink == 1


@pytest.mark.parametrize("failure", [ValueError(), KeyboardInterrupt(), SystemExit(143)], ids=repr)
def test_what_fails_leaves_nothing_and_no_new_folders(tmp_path: Path, failure: BaseException) -> None:
    def fail() -> None:
        with staged(tmp_path / "new" / "deep" / "out") as folder:
            (folder / "half").write_text("half")
            raise failure

    with pytest.raises(type(failure)):
        fail()
    assert _left(tmp_path) == []


def test_the_next_run_takes_away_what_a_killed_one_left(tmp_path: Path) -> None:
    process = _waiting(tmp_path)
    process.kill()
    process.wait()
    assert len(_left(tmp_path)) == 1
    with staged(tmp_path / "other"):
        pass
    assert _left(tmp_path) == ["other"]


def test_a_living_run_is_left_alone(tmp_path: Path) -> None:
    process = _waiting(tmp_path)
    try:
        before = _left(tmp_path)
        with staged(tmp_path / "other"):
            pass
        assert _left(tmp_path) == sorted([*before, "other"])
    finally:
        process.kill()
        process.wait()


def test_folders_of_another_host_and_of_other_programs_are_left_alone(tmp_path: Path) -> None:
    for name in (".onnx-lora-00000000-abc", ".onnx-lora-notes", "onnx-lora"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "lock").touch()
    before = _left(tmp_path)
    with staged(tmp_path / "out"):
        pass
    assert _left(tmp_path) == sorted([*before, "out"])


def test_a_link_named_like_a_leftover_leads_nowhere(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "lock").write_text("mine")
    (tmp_path / f"{staging._OURS}x").symlink_to(tmp_path / "mine")
    trap = tmp_path / f"{staging._OURS}y"
    trap.mkdir()
    os.mkfifo(trap / "lock")  # opening it would wait for ever
    with staged(tmp_path / "out"):
        pass
    assert (tmp_path / "mine" / "lock").read_text() == "mine"


@pytest.mark.parametrize("left", [(), ("files",), ("lock",), ("lock", "files")])
def test_a_run_killed_at_any_moment_of_its_end_is_swept(tmp_path: Path, left: tuple[str, ...]) -> None:
    folder = tmp_path / f"{staging._OURS}x"
    folder.mkdir()
    if "lock" in left:
        (folder / "lock").touch()
    if "files" in left:
        (folder / "files" / "deep").mkdir(parents=True)
    with staged(tmp_path / "out"):
        pass
    # The files go before the lock: files without a lock are nobody's way to end.
    expected = [folder.name, "out"] if left == ("files",) else ["out"]
    assert _left(tmp_path) == expected


def test_a_sweep_between_making_and_locking_harms_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = staging.tempfile.mkdtemp
    swept: list[str] = []

    def swept_at_once(**options: Any) -> str:
        folder = made(**options)
        if not swept:
            swept.append(folder)
            staging._sweep(tmp_path)
        return folder

    monkeypatch.setattr(staging.tempfile, "mkdtemp", swept_at_once)
    with staged(tmp_path / "out") as folder:
        assert not Path(swept[0]).exists()
        assert folder.is_dir()
    assert _left(tmp_path) == ["out"]


@pytest.mark.parametrize("stage", [staged, staged_place])
def test_of_many_that_race_one_wins_and_the_others_say_so(tmp_path: Path, stage: Callable[[Path], Any]) -> None:
    ends: list[str] = []
    together = threading.Barrier(8)

    def write(index: int) -> None:
        try:
            with stage(tmp_path / "out") as place:
                (place / "who" if place.is_dir() else place).write_text(str(index))
                together.wait(30)
            ends.append("done")
        except OutputExistsError:
            ends.append("exists")

    threads = [threading.Thread(target=write, args=(index,)) for index in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(ends) == ["done"] + ["exists"] * 7
    assert _left(tmp_path) == ["out"]


def test_a_disk_without_links_and_locks_will_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    monkeypatch.setattr(staging.fcntl, "flock", refuse)
    with staged_place(tmp_path / "out") as place:
        place.write_text("a")
    assert (tmp_path / "out").read_text() == "a"
    assert _left(tmp_path) == ["out"]


@pytest.mark.parametrize("number", [errno.EMFILE, errno.EFBIG, errno.ENOSPC, errno.EACCES, errno.EROFS])
def test_what_the_disk_refuses_is_a_storage_error_of_the_output(tmp_path: Path, number: int) -> None:
    with pytest.raises(StorageError, match="nothing was written") as caught, staged(tmp_path / "out"):
        raise OSError(number, os.strerror(number))
    assert caught.value.path == str(tmp_path / "out")
    assert _left(tmp_path) == []


def test_what_cannot_be_read_is_not_blamed_on_the_output(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), staged(tmp_path / "deep" / "out"):
        Path("/nowhere/input").read_text()


def test_scratch_vanishes(tmp_path: Path) -> None:
    with scratch(tmp_path) as folder:
        (folder / "x").write_text("x")
    assert _left(tmp_path) == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_the_command_tidies_up_when_it_is_told_to_end(tmp_path: Path, number: signal.Signals) -> None:
    code = WAITING.replace("\n", "\n    ").replace("import sys", "import sys, signal")
    script = f"""
import sys, onnx_lora.cli, onnx_lora.__main__
def command():
    {code}
onnx_lora.cli.main = command
onnx_lora.__main__.main()
"""
    process = subprocess.Popen(
        [sys.executable, "-c", script], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "here\n"
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    said = "" if number == signal.SIGINT else "told to end; nothing half done is left\n"
    assert (process.returncode, errors) == (128 + number, said)
    assert _left(tmp_path) == []


def test_an_interrupt_while_modules_load_is_quiet(tmp_path: Path) -> None:
    script = """
import sys, onnx_lora.__main__
class Interrupting:
    def find_spec(self, name, *_):
        if name == "click":
            raise KeyboardInterrupt
sys.meta_path.insert(0, Interrupting())
onnx_lora.__main__.main()
"""
    result = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stdout, result.stderr) == (130, "", "")


def test_a_replaced_file_is_the_old_one_or_the_new_one(tmp_path: Path) -> None:
    file = tmp_path / "manifest.json"
    file.write_text("old")
    with replacing(file) as place:
        place.write_text("new")
        assert file.read_text() == "old"
    assert file.read_text() == "new"
    with suppress(RuntimeError), replacing(file) as place:
        place.write_text("half")
        raise RuntimeError
    assert file.read_text() == "new"
    assert [entry.name for entry in tmp_path.iterdir()] == ["manifest.json"]
