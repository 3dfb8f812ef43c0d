"""Chat templates: transformers' renderer is the reference, and a template may not do what it likes."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from onnx_lora import Chat
from onnx_lora.errors import MissingDependencyError, PackageError, PromptError
from onnx_lora.runtime.generation import template as rendering
from onnx_lora.runtime.generation.chat import ChatTemplate

MESSAGES = [
    {"role": "system", "content": 'Be <brief> & "kind".'},
    {"role": "user", "content": "Hi é"},
    {"role": "assistant", "content": " Yes. "},
    {"role": "user", "content": "So?"},
]

TEMPLATES = {
    "chatml": (
        "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' "
        "+ '\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    "blocks": """
{%- set ns = namespace(first=true) -%}
{% for message in messages %}
    {% if message.role == 'system' %}
        {% continue %}
    {% endif %}
    {{ message.role | upper }}: {{ message.content | trim }}{{ eos_token }}
    {%- if loop.last %}{% break %}{% endif %}
{% endfor %}
{{ bos_token }}""",
    "json": "{{ messages | tojson }}{{ {'é': [1, 2]} | tojson(indent=2) }}{{ tools }}{{ documents is none }}",
    "generation": (
        "{% for m in messages %}{% generation %}{% set x = m.content %}{{ x }}{% endgeneration %}{{ x }}{% endfor %}"
    ),
    "formats": "{{ '%02d' % 7 }}{{ '{:>4}'.format(3) }}{{ 'ab' * 3 }}{{ 2 ** 10 }}{{ 7 % 3 }}{{ strftime_now('%%') }}",
    "macros": "{% macro say(m) %}[{{ m.content }}]{% endmacro %}{% for m in messages %}{{ say(m) }}{% endfor %}",
}


def _template(source: str) -> ChatTemplate:
    return ChatTemplate(source, {"bos_token": "<s>", "eos_token": "</s>"}, Path("template"))


@pytest.mark.parametrize("name", TEMPLATES)
def test_templates_give_what_transformers_gives(name: str) -> None:
    expected, _ = render_jinja_template(
        [MESSAGES],
        chat_template=TEMPLATES[name],
        add_generation_prompt=True,
        bos_token="<s>",
        eos_token="</s>",
    )
    assert _template(TEMPLATES[name]).text(Chat(MESSAGES)) == expected[0]


def test_variables_reach_the_template() -> None:
    assert _template("{{ thinking }}").text(Chat(MESSAGES, {"thinking": False})) == "False"


@pytest.mark.parametrize(
    "source, message",
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{% if %}", "gives no prompt"),
        ("{{ messages[0].nothing.at_all }}", "gives no prompt"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{{ messages + 1 }}", "TypeError"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "gives no prompt"),
        ("{% include '/etc/passwd' %}", "gives no prompt"),
        ("{{ 'a' * 10 ** 12 }}", "repeats a text"),
        ("{{ 9 ** (9 ** 9) }}", "power"),
        ("{{ '%1000000000d' % 1 }}", "great width"),
        ("{% for i in range(10 ** 9) %}{% endfor %}", "OverflowError|Range too big"),
        ("{% for i in range(99999) %}{{ 'x' * 999 }}{% endfor %}", "more than"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
        ("{{ lipsum(n=10 ** 9) }}", "lipsum"),
    ],
)
def test_a_template_that_fails_or_is_hostile_gives_our_error(source: str, message: str) -> None:
    with pytest.raises(PromptError, match=message):
        _template(source).text(Chat(MESSAGES))


def test_a_template_that_does_not_end_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendering, "_SECONDS", 0.3)
    start = time.monotonic()
    loops = "".join(f"{{% for {name} in range(9999) %}}" for name in "abcde") + "{% endfor %}" * 5
    with pytest.raises(PromptError, match=r"more than 0\.3 seconds"):
        _template(loops).text(Chat(MESSAGES))
    assert time.monotonic() - start < 5


@pytest.mark.parametrize("messages", [[], "Hi", {"role": "user"}, ["Hi"], [{"content": "Hi"}], [{"role": 1}]])
def test_messages_that_are_none_are_refused(messages: Any) -> None:
    with pytest.raises(PromptError, match="messages"):
        _template("x").text(Chat(messages))


@pytest.mark.parametrize(
    "files, expected",
    [
        ({"tokenizer_config.json": {"chat_template": "one"}}, "one"),
        ({"tokenizer_config.json": {"chat_template": "one"}, "chat_template.jinja": "file"}, "file"),
        (
            {
                "tokenizer_config.json": {
                    "chat_template": [{"name": "rag", "template": "r"}, {"name": "default", "template": "d"}]
                }
            },
            "d",
        ),
        ({"tokenizer_config.json": {"chat_template": [{"name": "rag", "template": "r"}]}}, "r"),
        (
            {
                "tokenizer_config.json": {"chat_template": "{{ bos_token }}{{ eos_token }}", "bos_token": "B"},
                "special_tokens_map.json": {"bos_token": "old", "eos_token": {"content": "E"}},
            },
            "BE",
        ),
    ],
)
def test_templates_are_found_where_models_have_them(files: dict[str, Any], expected: str, tmp_path: Path) -> None:
    for name, content in files.items():
        (tmp_path / name).write_text(content if isinstance(content, str) else json.dumps(content))
    assert ChatTemplate.read(tmp_path).text(Chat(MESSAGES)) == expected


@pytest.mark.parametrize("config", [{}, {"chat_template": None}, {"chat_template": []}, {"chat_template": 7}])
def test_a_package_without_a_template_says_so(config: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(PackageError, match="must hold a chat template"):
        ChatTemplate.read(tmp_path)


def test_without_jinja_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "onnx_lora.runtime.generation.template", None)
    with pytest.raises(MissingDependencyError, match=r"onnx-lora\[generate\]"):
        _template("x").text(Chat(MESSAGES))
