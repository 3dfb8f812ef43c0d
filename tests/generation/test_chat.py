"""Chat templates: transformers' renderer is the reference, and a template may not do what it likes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from onnx_lora import Chat
from onnx_lora.errors import PackageError, PromptError
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
    "options": (
        "{{ {'b': 1, 'a': 'é<'} | tojson(ensure_ascii=true, sort_keys=true, separators=(',', ':')) }}"
        "{{ [1.0, none, true] | tojson(indent=4) }}{{ strftime_now('%Y-%m') }}"
    ),
    "scopes": (
        "{% set x = 'outer' %}{% for m in messages %}{% generation %}{% set x = m.role %}{{ x }}{{ loop.index }}"
        "{% endgeneration %}{{ x }}{% endfor %}"
    ),
    "filters": (
        "{% for m in messages | selectattr('role', 'ne', 'system') %}{{ m | items | list }}{{ m.content | length }}"
        "{{ m.get('name', 'nobody') }}{{ m is mapping }}{{ m.nothing is defined }}{% endfor %}{{ messages | string }}"
    ),
    "llama3": """
{{- bos_token }}
{%- if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}{%- set messages = messages[1:] %}
{%- else %}{%- set system_message = '' %}{%- endif %}
{{- '<|start_header_id|>system<|end_header_id|>\n\nToday Date: ' + date_string + '\n\n' }}
{%- if tools is not none %}{%- for t in tools %}{{- t | tojson(indent=4) }}{{- '\n\n' }}{%- endfor %}{%- endif %}
{{- system_message }}{{- '<|eot_id|>' }}
{%- for message in messages %}
    {%- if not (message.role == 'ipython' or message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}
        {{- message['content'] | trim + '<|eot_id|>' }}
    {%- elif 'tool_calls' in message %}
        {%- if not message.tool_calls|length == 1 %}{{- raise_exception('one tool-call at once!') }}{%- endif %}
        {{- message.tool_calls[0].function.name + ': ' + message.tool_calls[0].function.arguments | tojson }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}
""",
    "qwen2.5": """{%- if tools %}
    {{- '<|im_start|>system\n' }}{{- "# Tools\n<tools>" }}
    {%- for tool in tools %}{{- "\n" }}{{- tool | tojson }}{%- endfor %}
    {{- '\n</tools>\n<tool_call>\n{"name": <function-name>}\n</tool_call><|im_end|>\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + '\n' }}
    {%- elif message.role == "assistant" %}
        {{- '<|im_start|>' + message.role }}{%- if message.content %}{{- '\n' + message.content }}{%- endif %}
        {%- for tool_call in message.tool_calls or [] %}
            {%- if tool_call.function is defined %}{%- set tool_call = tool_call.function %}{%- endif %}
            {{- '\n<tool_call>\n{"name": "' }}{{- tool_call.name }}{{- '", "arguments": ' }}
            {{- tool_call.arguments | tojson }}{{- '}\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}
""",
    "mistral": """{{ bos_token }}{% set loop_messages = messages if messages[0].role != 'system' else messages[1:] %}
{%- set ns = namespace(index=0) %}
{%- for m in loop_messages %}
    {%- if (m['role'] == 'user') != (ns.index % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}
    {%- set ns.index = ns.index + 1 %}
    {%- if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}
    {%- else %}{{ m['content'] | trim + eos_token }}{% endif %}
{%- endfor %}""",
    "gemma": (
        "{{ bos_token }}{% for message in messages if message['role'] != 'system' %}"
        "{% if (message['role'] == 'assistant') %}{% set role = 'model' %}{% else %}{% set role = message['role'] %}"
        "{% endif %}{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}"
    ),
    "macros": "{% macro say(m) %}[{{ m.content }}]{% endmacro %}{% for m in messages %}{{ say(m) }}{% endfor %}",
}


# Python refuses to write it.
HUGE = 10**5000

# As transformers describes a function.
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather <now> at a place, in °C.",
        "parameters": {"type": "object", "properties": {"place": {"type": "string"}}, "required": ["place"]},
    },
}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"place": "Zürich", "days": 2}}}
CALLING = [*MESSAGES, {"role": "assistant", "content": "", "tool_calls": [CALL]}]


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


@pytest.mark.parametrize("name", ["llama3", "qwen2.5"])
def test_tools_are_written_as_transformers_writes_them(name: str) -> None:
    chat = Chat(CALLING, {"tools": [TOOL], "date_string": "1 May"})
    expected, _ = render_jinja_template(
        [CALLING],
        chat_template=TEMPLATES[name],
        tools=[TOOL],
        date_string="1 May",
        add_generation_prompt=True,
        bos_token="<s>",
        eos_token="</s>",
    )
    assert _template(TEMPLATES[name]).text(chat) == expected[0]


def test_variables_reach_the_template() -> None:
    assert _template("{{ thinking }}").text(Chat(MESSAGES, {"thinking": False})) == "False"


def test_what_json_holds_arrives_as_it_is() -> None:
    content = {"n": [1, 2.5, None, True, 2**70, float("inf")], "text": "\x00é😀\u2028"}
    source = "{% for n in messages[0].content.n %}{{ n }} {% endfor %}{{ messages[0].content.text }}"
    expected = "1 2.5 None True 1180591620717411303424 inf \x00é😀\u2028"
    assert _template(source).text(Chat([{"role": "user", "content": content}])) == expected


@pytest.mark.parametrize(
    "content, message",
    [
        (object(), r"messages\[0\]\.content must be what JSON can hold .* is a object"),
        ([{"at": b"x"}], r"messages\[0\]\.content\[0\]\.at must be what JSON"),
        ({1: "x"}, "must have texts as keys, and has a int"),
        pytest.param(HUGE, "has 16610 bits", id="huge"),
    ],
)
def test_what_json_cannot_hold_is_refused_where_it_lies(content: Any, message: str) -> None:
    with pytest.raises(PromptError, match=message):
        _template("x").text(Chat([{"role": "user", "content": content}]))


def test_a_list_that_holds_itself_is_refused() -> None:
    endless: list[Any] = []
    endless.append(endless)
    with pytest.raises(PromptError, match="must not nest deeper"):
        _template("x").text(Chat([{"role": "user", "content": endless}]))


@pytest.mark.parametrize("variables", [7, {1: 2}])
def test_variables_that_are_none_are_refused(variables: Any) -> None:
    with pytest.raises(PromptError, match="variables must be a mapping"):
        _template("x").text(Chat(MESSAGES, variables))


@pytest.mark.parametrize(
    "messages",
    [[], "Hi", {"role": "user"}, ["Hi"], [{"content": "Hi"}], [{"role": 1}], pytest.param([HUGE], id="huge")],
)
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
        ({"tokenizer_config.json": {"chat_template": [7, {"name": []}, {"name": {}, "template": "r"}]}}, "r"),
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
