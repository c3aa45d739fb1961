"""Templates render as in transformers, and cannot run away."""

from __future__ import annotations

import time
from typing import Any

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from hasten.models import chat_template
from hasten.models.chat_template import ChatTemplate, ChatTemplateError

TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}

TURNS = """\
{% for message in messages %}
    {%- if message['role'] not in ['system', 'user', 'assistant', 'tool'] %}
        {{- raise_exception('unknown role ' + message['role']) }}
    {%- endif %}
    {{- '<|' + message['role'] + '|>\\n' + message['content'] | trim + '<|end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|assistant|>\\n' }}
{%- endif %}
"""

ALTERNATING = """\
{{ bos_token }}
{%- if messages[0]['role'] == 'system' -%}
  {%- set system = messages[0]['content'] + '\\n\\n' %}{% set rest = messages[1:] -%}
{%- else -%}
  {%- set system = '' %}{% set rest = messages -%}
{%- endif -%}
{% for m in rest %}
  {%- if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}
    {{- raise_exception('roles must alternate') }}
  {%- endif %}
  {%- if loop.first %}{% set text = system ~ m.content %}
  {%- else %}{% set text = m.content %}{% endif %}
  {%- if m.role == 'user' %}{{ '[INST] ' ~ text ~ ' [/INST]' }}
  {%- else %}{{ ' ' ~ text | trim ~ ' ' ~ eos_token }}{% endif %}
{%- endfor %}
"""

TOOLS = """\
{%- set ns = namespace(last=-1, calls=0) %}
{%- for m in messages %}
{%- if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}
{%- if tools is defined and tools %}
# Tools
{% for tool in tools %}
{{ tool | tojson }}
{% endfor %}
{{ tools | tojson(indent=2) }}
{%- endif %}
{% for m in messages %}
{%- if m.tool_calls is defined and m.tool_calls %}
{%- for call in m.tool_calls %}
{%- set ns.calls = ns.calls + 1 %}
<call {{ ns.calls }}>{"name": "{{ call.function.name }}", "arguments":
{{- call.function.arguments | tojson }}}</call>
{%- endfor %}
{%- elif m.role == 'tool' %}
{%- if loop.previtem is defined and loop.previtem.role != 'tool' %}<results>{% endif %}
{{ m.content }}
{%- if loop.last or loop.nextitem.role != 'tool' %}</results>{% endif %}
{%- else %}
{{ m.role | upper }}{{ '*' if loop.index0 == ns.last else '' }}
{{- ': ' }}{{ m.content if m.content is string else m.content | length }}
{%- endif %}
{% endfor %}
{{ 'calls=%d' % ns.calls }}{% generation %} marked {% endgeneration %}
"""

PARTS = """\
{%- for m in messages %}
{%- if m.content is string %}{{ m.role }}={{ m.content }};{% else %}
{%- for part in m['content'] if part.type == 'text' %}{{ m.role }}<{{ part.text }}>{% endfor %}
{%- endif %}{%- endfor %}
"""

MACROS = """\
{%- macro show(m, depth=0) -%}
  {{ '  ' * depth }}{{ m.role | capitalize }}: {{ m.content | replace('\\n', ' ') }}
  {{- m.nothing | default('none', true) }}
{%- endmacro -%}
{%- set date = strftime_now('%d %b %Y') %}
{%- set names = messages | map(attribute='role') | list %}
{%- for m in messages if m.role != 'system' %}
{%- if loop.index > 3 %}{% break %}{% endif %}
{{ show(m, loop.index) }}
{%- endfor %}
{{ names | join(', ') }} {{ messages | selectattr('role', 'equalto', 'user') | list | length }}
{%- filter upper %} done {{ (messages | last).role }}{% endfilter %}
{%- set block %}{{ enable_thinking }}{% endset %}{{ block }}
{%- for k, v in messages[0] | dictsort %} {{ k }}={{ v | string | length }}{% endfor %}
{%- for k, v in {'a': 1}.items() %}{{ '{}-{}'.format(k, v) }}{% endfor %}
{{- messages[-1].content.split('a')[0].rstrip() }}{{ messages[-1].content.startswith('x') }}
"""

CHAT = [
    {"role": "system", "content": "  Be brief. <b>&amp;</b>"},
    {"role": "user", "content": "What is\n2 + 2? “ü” 日本"},
    {"role": "assistant", "content": " 4 "},
    {"role": "user", "content": "Thanks, that's all"},
]
TOOL_CHAT = [
    *CHAT,
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [
            {
                "type": "function",
                "function": {"name": "f", "arguments": {"x": 1.5, "s": "<é>", "n": None}},
            },
            {"type": "function", "function": {"name": "g", "arguments": {}}},
        ],
    },
    {"role": "tool", "content": "1"},
    {"role": "tool", "content": "2"},
    {"role": "user", "content": [{"type": "text", "text": "go"}]},
]
TOOL_LIST = [
    {
        "type": "function",
        "function": {"name": "f", "description": "a < b & c", "parameters": {"type": "object"}},
    }
]


@pytest.mark.parametrize("generate", [True, False])
@pytest.mark.parametrize(
    ("source", "messages"),
    [
        (TURNS, CHAT),
        (ALTERNATING, CHAT),
        (ALTERNATING, CHAT[1:2]),
        (TOOLS + PARTS, TOOL_CHAT),
        (TOOLS, CHAT),
        (PARTS, [*CHAT, {"role": "user", "content": [{"type": "text", "text": "part"}]}]),
        (MACROS, CHAT),
    ],
)
def test_renders_as_transformers(source: str, messages: Any, generate: bool) -> None:
    options = {"tools": TOOL_LIST, "add_generation_prompt": generate}
    expected, _ = render_jinja_template(
        [messages], chat_template=source, enable_thinking=False, **options, **TOKENS
    )
    template = ChatTemplate(source, TOKENS)
    assert template.render(messages, enable_thinking=False, **options) == expected[0]
    assert len(expected[0]) > 20


def test_text_parts_for_a_template_that_knows_strings() -> None:
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    text = ChatTemplate(TURNS).render([{"role": "user", "content": parts}])
    assert text == "<|user|>\none\ntwo<|end|>\n<|assistant|>\n"


def test_messages_are_checked() -> None:
    template = ChatTemplate(TURNS)
    for messages in (["hello"], [{"content": "x"}], [{"role": "user", "content": object()}]):
        with pytest.raises(ChatTemplateError):
            template.render(messages)  # type: ignore[arg-type]
    image = {"type": "image_url", "image_url": {"url": "http://x"}}
    with pytest.raises(ChatTemplateError, match="image_url"):
        template.render([{"role": "user", "content": [image]}])


def test_refusals_of_the_template_are_told() -> None:
    with pytest.raises(ChatTemplateError, match="roles must alternate"):
        ChatTemplate(ALTERNATING, TOKENS).render([*CHAT, CHAT[-1]])
    with pytest.raises(ChatTemplateError, match="invalid"):
        ChatTemplate("{% for %}")
    with pytest.raises(ChatTemplateError, match="TypeError"):
        ChatTemplate("{{ 1 + 'a' }}").render([])
    with pytest.raises(ChatTemplateError, match="undefined"):
        ChatTemplate("{{ nothing.at.all }}").render([])


def test_messages_of_the_caller_stay_as_they_are() -> None:
    messages = [{"role": "user", "content": [{"type": "text", "text": "x"}]}]
    ChatTemplate("{% set _ = messages[0] %}{{ dict.__name__ }}").render(messages)
    assert messages == [{"role": "user", "content": [{"type": "text", "text": "x"}]}]


ENDLESS = {
    "loops that write nothing": "{% for a in range(99999) %}{% for b in range(99999) %}"
    "{% for c in range(99999) %}{% endfor %}{% endfor %}{% endfor %}",
    "recursive macros": "{% macro f(n) %}{% for i in range(9) %}{{ f(n + 1) }}{% endfor %}"
    "{% endmacro %}{{ f(0) }}",
    "a recursive loop": "{% for x in [[[1]]] recursive %}{{ loop([x, x, x]) }}{% endfor %}",
}
BLOATED = {
    "much output": "{% for a in range(99999) %}{{ 'x' * 1000 }}{% endfor %}",
    "range": "{{ range(10 ** 9) | list | length }}",
    "repetition": "{{ 'x' * 10 ** 10 }}",
    "a list": "{{ [0] * 10 ** 10 }}",
    "power": "{{ 9 ** 999999999 }}",
    "squares": "{% set n = namespace(v=3) %}{% for i in range(99) %}{% set n.v = n.v * n.v %}"
    "{% endfor %}",
    "doubling with +": "{% set n = namespace(v='x') %}{% for i in range(99) %}"
    "{% set n.v = n.v + n.v %}{% endfor %}",
    "doubling with ~": "{% set n = namespace(v='x') %}{% for i in range(99) %}"
    "{% set n.v = n.v ~ n.v %}{% endfor %}",
    "doubling in a block": "{% set n = namespace(v='x') %}{% for i in range(99) %}"
    "{% set b %}{{ n.v }}{{ n.v }}{% endset %}{% set n.v = b %}{% endfor %}",
    "join": "{{ (['x' * 8000000] * 8000) | join('') }}",
    "join method": "{{ ''.join(['x' * 8000000] * 8000) }}",
    "replace": "{{ ('x' * 8000000) | replace('x', 'y' * 100000) }}",
    "replace method": "{{ ('x' * 8000000).replace('x', 'y' * 100000) }}",
    "replace of nothing": "{{ ('x' * 8000000).replace('', 'y' * 100000) }}",
    "center": "{{ 'x' | center(10000000000) }}",
    "ljust": "{{ 'x'.ljust(10000000000) }}",
    "zfill": "{{ 'x'.zfill(10000000000) }}",
    "expandtabs": "{{ '\\t'.expandtabs(10000000000) }}",
    "indent": "{{ ('\\n' * 1000000) | indent(1000000) }}",
    "json": "{{ [1, 2] | tojson(indent=10000000000) }}",
    "format width": "{{ '%10000000000d' % 1 }}",
    "format filter": "{{ '%10000000000d' | format(1) }}",
    "format method": "{{ '{:>10000000000}'.format(1) }}",
    "nested format": "{{ '{:>{}}'.format(1, 10000000000) }}",
    "format pair": "{{ '%*d' % (10000000000, 1) }}",
    "join of a generator": "{{ ''.join(range(99999) | map('replace', '1', 'y' * 8000000)) }}",
    "held values": "{% set n = namespace(v=[]) %}{% for i in range(9999) %}"
    "{% set n.v = n.v + ['x' * (8000000 - i)] %}{% endfor %}",
    "held copies": "{% set s = 'x' * 8000000 %}{% set n = namespace(v=[]) %}"
    "{% for i in range(9999) %}{% set n.v = n.v + [s | upper] %}{% endfor %}",
    "held slices": "{% set s = 'x' * 8000000 %}{% set n = namespace(v=[]) %}"
    "{% for i in range(9999) %}{% set n.v = n.v + [s[1:]] %}{% endfor %}",
    "held pieces": "{{ ('x ' * 4000000).split() }}",
    "format star": "{{ '%*d' | format(10000000000, 1) }}",
    "precision star": "{{ '%-5.*f' % (200000000, 1) }}",
    "many stars": "{{ ('%*d' * 1000) % (8000000, 1) }}",
    "nested in a map": "{{ '{x:{w}}'.format_map({'x': 1, 'w': 200000000}) }}",
    "nested item": "{{ '{0:{1[0]}}'.format('a', [200000000]) }}",
    "nested, converted": "{{ '{0!r:>{1[w]}}'.format('a', {'w': 200000000}) }}",
    "many widths": "{{ ('{0:9999}' * 100000).format(1) }}",
    "many widths of %": "{{ ('%(a)9999d' * 100000) % {'a': 1} }}",
    "many fields": "{{ ('{0}' * 10000).format('x' * 8000000) }}",
}


@pytest.mark.parametrize("name", ENDLESS)
def test_endless_templates_are_stopped(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_template, "MAX_SECONDS", 0.2)
    start = time.perf_counter()
    with pytest.raises(ChatTemplateError, match=r"seconds|recursion"):
        ChatTemplate(ENDLESS[name]).render([])
    assert time.perf_counter() - start < 10


@pytest.mark.parametrize("name", BLOATED)
def test_bloated_templates_are_stopped(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped before the memory is taken: each would need gigabytes."""
    monkeypatch.setattr(chat_template, "MAX_SECONDS", 60.0)
    with pytest.raises(ChatTemplateError) as error:
        ChatTemplate(BLOATED[name]).render([])
    assert "seconds" not in str(error.value), "stopped by the clock, not by a limit of its own"


def test_ordinary_formats_pass() -> None:
    source = "{{ '{{a: {0:>4}}} {1!r} {x[k]}'.format(1, 'b', x={'k': 2}) }}"
    source += """{{ '{"a": {"b": "%5s"}, "c": %d}' % ('x', 1700000000) }}"""
    source += "{{ '%s of 100%%' | format(50) }}{{ '{}'.format(1700000000) }}"
    expected = "{a:    1} 'b' 2" + '{"a": {"b": "    x"}, "c": 1700000000}'
    assert ChatTemplate(source).render([]) == expected + "50 of 100%1700000000"


def test_limits_leave_room_for_long_conversations() -> None:
    text = "word " * 20000  # 100 kB a message
    messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i in range(60)]
    assert len(ChatTemplate(ALTERNATING, TOKENS).render(messages)) > 60 * 99_000
