"""Many switches, many threads: the answers, the base and the memory stay what they are.

ONNX_LORA_STRESS_SECONDS sets how long each of the threaded tests goes on (5 by default)."""

from __future__ import annotations

import gc
import os
import threading
import time
from collections.abc import Callable

import numpy as np
import psutil
import pytest

from onnx_lora.errors import SelectionError
from onnx_lora.runtime import fold
from tests.runtime import tiny
from tests.runtime.conftest import CPU, contents, one_thread, open_session
from tests.support.numbers import assert_close, assert_same_bits

SECONDS = float(os.environ.get("ONNX_LORA_STRESS_SECONDS", "5"))
THREADS = 8
DATA = tiny.batch()


@pytest.mark.slow
def test_after_10000_random_switches_nothing_has_changed_or_grown(tmp_path):
    package = tiny.make_package(tmp_path / "p")
    files = contents(package.path)
    session = open_session(package, composed_bytes=2**20)
    base = session.run(None, DATA.feeds)
    rng = np.random.default_rng(0)
    switch = _switcher(session, rng)
    for _ in range(2000):
        switch()
    settled = _resident()
    for _ in range(10_000):
        switch()
    for seed in range(20):
        fold(package, tiny.adapter("f", seed, labels=3 + seed % 2), providers=CPU, sess_options=one_thread())
    grown = _resident() - settled
    assert grown < 16 * 2**20, f"grew by {grown / 2**20:.1f} MiB"
    assert session._store._size <= 2**20
    for actual, expected in zip(session.run(None, DATA.feeds), base, strict=True):
        assert_same_bits(actual, expected)
    assert contents(package.path) == files


def _switcher(session, rng: np.random.Generator) -> Callable[[], None]:
    def switch() -> None:
        kind = rng.integers(5)
        weight = float(rng.normal())
        if kind == 4:
            session.unload_adapter("b")
            session.load_adapter("b", tiny.adapter("b", int(rng.integers(1000)), rank=int(rng.integers(1, 40))))
        choices = ["a", None, {"a": weight, "b": 1 - weight}, [{"b": weight}, "a"], ["b", None]]
        session.run(None, DATA.feeds, adapter=choices[kind])

    return switch


def _resident() -> int:
    gc.collect()
    return int(psutil.Process().memory_info().rss)


def test_a_cache_within_its_limit_drops_the_oldest(package):
    session = open_session(package, composed_bytes=10_000)
    for weight in range(50):
        session.run(None, DATA.feeds, adapter={"a": weight / 7})
        assert 0 < session._store._size <= 10_000
    sizes = [entry.size for entry in session._store._composed.values()]
    assert sum(sizes) == session._store._size


def test_unloading_drops_what_was_composed_of_it(package):
    session = open_session(package)
    session.run(None, DATA.feeds, adapter={"a": 0.5, "b": 0.5})
    session.run(None, DATA.feeds, adapter={"b": 0.5})
    session.unload_adapter("a")
    assert len(session._store._composed) == 1
    session.unload_adapter("b")
    assert session._store._size == 0


def test_a_mixture_of_an_adapter_unloaded_meanwhile_is_not_kept(package):
    session = open_session(package)
    store = session._store
    loaded = store.loaded
    session.unload_adapter("a")
    gone = loaded["a"]
    store._compose((((gone, 0.5),),))
    assert not store._composed


def _in_threads(work: Callable[[int], None]) -> None:
    """Run `work(index)` again and again in eight threads; the first failure is raised here."""
    failures: list[BaseException] = []
    end = time.monotonic() + SECONDS

    def loop(index: int) -> None:
        try:
            while time.monotonic() < end and not failures:
                work(index)
        except BaseException as failure:  # noqa: BLE001
            failures.append(failure)

    threads = [threading.Thread(target=loop, args=(index,)) for index in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]


@pytest.mark.slow
def test_threads_with_different_adapters_get_their_own_answers(package):
    session = open_session(package, composed_bytes=4096)
    for index in range(THREADS):
        session.load_adapter(f"t{index}", tiny.adapter(f"t{index}", 100 + index, rank=1 + index))
    choices = [[f"t{index}", {f"t{index}": 0.5, "a": 0.25}, [f"t{index}", "b"], None] for index in range(THREADS)]
    expected = [[session.run(None, DATA.feeds, adapter=choice)[0] for choice in own] for own in choices]
    rounds = [0] * THREADS

    def work(index: int) -> None:
        rounds[index] += 1
        turn = rounds[index] % len(choices[index])
        assert_same_bits(session.run(None, DATA.feeds, adapter=choices[index][turn])[0], expected[index][turn])

    _in_threads(work)
    assert min(rounds) > 10


@pytest.mark.slow
def test_loading_and_unloading_while_others_run_is_safe(package):
    session = open_session(package)
    versions = {rank: tiny.adapter("v", rank, rank=rank) for rank in range(1, 9)}
    allowed = [tiny.oracle(DATA, (version, 1.0)) for version in versions.values()]
    steady = session.run(None, DATA.feeds, adapter={"a": 0.5, "b": 0.5})[0]
    answers = [0] * THREADS

    def work(index: int) -> None:
        if index == 0:
            for version in versions.values():
                session.load_adapter("v", version)
                time.sleep(0.001)
                session.unload_adapter("v")
        elif index % 2:
            assert_same_bits(session.run(None, DATA.feeds, adapter={"a": 0.5, "b": 0.5})[0], steady)
            answers[index] += 1
        else:
            try:
                answer = session.run(None, DATA.feeds, adapter="v")[0]
            except SelectionError:
                return
            nearest = min(allowed, key=lambda each: np.abs(each - answer).max())
            assert_close(answer, nearest)
            answers[index] += 1

    _in_threads(work)
    assert sum(answers[2::2]) > 10
    assert min(answers[1::2]) > 10


@pytest.mark.slow
def test_no_call_finds_the_name_of_a_replaced_adapter_empty(package):
    session = open_session(package)
    versions = [tiny.adapter("v", rank, rank=rank) for rank in range(1, 9)]
    allowed = [tiny.oracle(DATA, (version, 1.0)) for version in versions]
    session.load_adapter("v", versions[0])
    answers = [0] * THREADS

    def work(index: int) -> None:
        if index < 2:
            session.load_adapter("v", versions[answers[index] % len(versions)], replace=True)
        else:
            answer = session.run(None, DATA.feeds, adapter={"v": 1.0})[0]
            assert_close(answer, min(allowed, key=lambda each: np.abs(each - answer).max()))
        answers[index] += 1

    _in_threads(work)
    assert min(answers) > 10
