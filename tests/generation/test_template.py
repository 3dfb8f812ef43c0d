"""The process that renders chat templates: what a template may take, and what becomes of the process."""

from __future__ import annotations

import ast
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from onnx_lora import Chat
from onnx_lora.errors import MissingDependencyError, PromptError, RunError
from onnx_lora.runtime.generation import template as rendering
from onnx_lora.runtime.generation.chat import ChatTemplate

HELLO = Chat([{"role": "user", "content": "Hi"}])

limited = pytest.mark.skipif(sys.platform != "linux", reason="only Linux limits a process's memory")


def _text(source: str) -> str:
    return ChatTemplate(source, {"bos_token": "<s>"}, Path("template")).text(HELLO)


def _child() -> int:
    """The process's id, after it answered."""
    assert _text("{{ 1 }}") == "1"
    assert rendering._renderer._child is not None
    return rendering._renderer._child._process.pid


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    _child()
    monkeypatch.setattr(rendering, "_SECONDS", 0.5)


@pytest.mark.parametrize(
    "source, message",
    [
        ("{{ raise_exception('roles must alternate') }}", "messages: roles must alternate$"),
        ("{{ raise_exception('a' * 10 ** 6) }}", "messages: a{1000}$"),
        ("{{ raise_exception(10 ** (5000 * messages | length)) }}", "messages: TemplateError$"),
        ("{% if %}", "Expected an expression"),
        ("{% break %}", "SyntaxError"),
        ("{{ cycler() }}", "RuntimeError"),
        ("{{ 'aaaaaaaaaaaaaaa'|truncate(true) }}", "AssertionError"),
        ("{{ messages[0].nothing.at_all }}", "nothing"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{{ messages + 1 }}", "TypeError"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{% include '/etc/passwd' %}", "no loader"),
        ("{% for i in range(10 ** 9) %}{% endfor %}", "Range too big"),
        ("{% for i in range(99999) %}{{ 'x' * 999 }}{% endfor %}", "writes more than 16777216 characters"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
        ("{{ '(' * 99999 }}" + "{{ " + "(" * 999 + "1" + ")" * 999 + " }}", "RecursionError|MemoryError|memory"),
    ],
)
def test_a_template_that_fails_says_why(source: str, message: str) -> None:
    with pytest.raises(PromptError, match=message):
        _text(source)


@limited
@pytest.mark.parametrize(
    "source",
    [
        "{{ 'a' * 10 ** 12 }}",
        "{{ ('a'|center(2000000000))|length }}",
        "{{ '%2000000000d' % 1 }}",
        "{{ '{:>2000000000}'.format(1)|length }}",
        "{{ ('a' * 40000)|replace('a', 'b' * 50000)|length }}",
        "{{ [1]|batch(200000000, 1)|list|length }}",
        "{{ (1).to_bytes(2000000000, 'big')|length }}",
        "{% set n=namespace(s='a'*10**6) %}{% for i in range(11) %}{% set n.s = n.s + n.s %}{% endfor %}",
    ],
)
def test_memory_is_limited(source: str) -> None:
    before = _child()
    with pytest.raises(PromptError, match="more memory than 512 MiB"):
        _text(source)
    assert _child() == before, "the process goes on"


@pytest.mark.parametrize(
    "source",
    [
        "".join(f"{{% for {name} in range(9999) %}}" for name in "abcde") + "{% endfor %}" * 5,
        "{{ 9 ** (9 ** 9) }}",  # one operation of C, which no Python code interrupts
        "{% set n=namespace(x=2**63) %}{% for i in range(99) %}{% set n.x = n.x * n.x %}{% endfor %}",
    ],
)
def test_time_is_limited(source: str, impatient: None) -> None:
    start = time.monotonic()
    with pytest.raises(PromptError, match=r"more than 0\.5 seconds"):
        _text(source)
    assert time.monotonic() - start < 5
    assert _text("{{ bos_token }}") == "<s>", "another process answers the next"


def test_the_longest_prompt_is_whole() -> None:
    long = "é😀" * (4 * 2**20)
    chat = Chat([{"role": "user", "content": long[: 2**21]}])
    assert ChatTemplate("{{ messages[0].content * 4 }}", {}, Path("template")).text(chat) == long


def test_messages_are_limited() -> None:
    with pytest.raises(PromptError, match="may take 33554432"):
        ChatTemplate("x", {}, Path("t")).text(Chat([{"role": "user", "content": "x" * (32 * 2**20)}]))


def test_calls_share_a_process_which_is_replaced_when_it_dies() -> None:
    first = _child()
    assert _child() == first
    os.kill(first, signal.SIGTERM)
    _wait_for_end(first)
    assert _child() != first


def test_threads_get_their_own_answers() -> None:
    def ask(index: int) -> str:
        return _text(f"{{% for i in range(99) %}}{{{{ {index} }}}};{{% endfor %}}")

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(ask, range(200))) == [f"{index};" * 99 for index in range(200)]


def test_an_interrupted_call_leaves_no_answer_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    _child()

    def interrupted(self: Any) -> bytes:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(rendering._Child, "_receive", interrupted)
        with pytest.raises(KeyboardInterrupt):
            _text("old")
    assert _text("new") == "new"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")  # threads and fork, which is what is tested
def test_a_copy_of_this_process_starts_its_own() -> None:
    mine = _child()
    copy = os.fork()
    if copy == 0:
        os._exit(7 if _child() != mine else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(copy, 0)[1]) == 7
    assert _child() == mine


HOST = """
import sys, time
from onnx_lora.runtime.generation import template
assert template.render("{{ a }}", {"a": 1}) == "1"
print(template._renderer._child._process.pid, *sorted(set(sys.modules) & {"jinja2"}), flush=True)
"""


def _host(code: str, *, folder: Path | None = None) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", HOST + code], stdout=subprocess.PIPE, text=True, cwd=folder)


@pytest.mark.skipif(sys.platform == "win32", reason="processes are looked at by signals")
@pytest.mark.parametrize(
    "code, end", [("", None), ("time.sleep(60)", signal.SIGKILL), ("time.sleep(60)", signal.SIGTERM)]
)
def test_the_process_ends_with_its_host(code: str, end: signal.Signals | None) -> None:
    with _host(code) as host:
        assert host.stdout is not None
        child = int(host.stdout.readline())
        if end is not None:
            host.send_signal(end)
    _wait_for_end(child)


@limited
def test_a_busy_process_ends_after_its_host() -> None:
    """It reads no request, and so does not see that nobody sends one."""
    busy = "template._SECONDS = 0; template.render('{{ 9 ** (9 ** 9) }}', {})"
    with _host("template._Child._kill_late = lambda self: None; " + busy) as host:
        assert host.stdout is not None
        child = int(host.stdout.readline())
        time.sleep(0.3)
        host.kill()
    _wait_for_end(child)


def _wait_for_end(process: int) -> None:
    end = time.monotonic() + 120
    while time.monotonic() < end:
        if rendering._renderer._child is not None:
            rendering._renderer._child._process.poll()  # reaps our own
        try:
            os.kill(process, 0)
        except ProcessLookupError:
            return
        time.sleep(0.02)
    raise AssertionError(f"process {process} still runs")


@pytest.mark.parametrize("name", ["jinja2.py", "json.py", "markupsafe.py", "onnx_lora.py"])
def test_files_of_the_working_folder_are_not_loaded(name: str, tmp_path: Path) -> None:
    """The host is started elsewhere and goes there: what it has loaded by then is its own."""
    (tmp_path / name).write_text("raise SystemExit('loaded')")
    with _host(f"import os; os.chdir({str(tmp_path)!r}); template._renderer.close(); " + HOST) as host:
        assert host.stdout is not None
        assert len(host.stdout.read().splitlines()) == 2
    assert host.returncode == 0


def test_the_program_needs_python_and_jinja_only() -> None:
    tree = ast.parse(rendering._PROGRAM.read_text("utf-8"))
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert {name.split(".")[0] for name in names} <= {"jinja2"} | set(sys.stdlib_module_names)


@pytest.fixture
def started_anew() -> Iterator[None]:
    rendering._renderer.close()
    yield
    rendering._renderer.close()


def _python_with(folder: Path, code: str) -> Callable[[], str]:
    """A Python that does something else than it is told."""
    file = folder / "python"
    file.write_text(f"#!{sys.executable}\n{code}\n")
    file.chmod(0o700)
    return lambda: str(file)


@pytest.mark.skipif(sys.platform == "win32", reason="no scripts with a first line there")
@pytest.mark.parametrize(
    "code, kind, message",
    [
        ("raise SystemExit(3)", MissingDependencyError, r"onnx-lora\[generate\]"),
        ("raise SystemExit(1)", RunError, "it ended with code 1"),
        ("print('this is no answer at all')", RunError, "cannot be started"),
    ],
)
def test_a_process_that_does_not_start_is_our_error(
    code: str, kind: type[Exception], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, started_anew: None
) -> None:
    monkeypatch.setattr(rendering, "_python", _python_with(tmp_path, code))
    with pytest.raises(kind, match=message):
        _text("x")


@pytest.mark.parametrize("executable", ["/usr/bin/uwsgi", "", "/nowhere/python3"])
def test_a_program_that_is_no_python_is_not_started(
    executable: str, monkeypatch: pytest.MonkeyPatch, started_anew: None
) -> None:
    monkeypatch.setattr(sys, "executable", executable)
    with pytest.raises(RunError, match="give the prompt as plain text"):
        _text("x")
