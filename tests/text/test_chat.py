"""Chat templates: what they render, and what a hostile one cannot do."""

from __future__ import annotations

import subprocess
import sys
import time
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import cast

import pytest

from orthrus_gguf.errors import OrthrusError
from orthrus_gguf.gguf.reader import Value
from orthrus_gguf.text import chat
from orthrus_gguf.text.chat import ChatTemplate, Limits, Message
from orthrus_gguf.text.tokenizer import Tokenizer

# In the manner of Qwen3's own: ChatML, tools in the system turn, reasoning of past turns dropped,
# tool results as user turns, and a switch that opens the answer with an empty thought.
QWEN3 = """
{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0].role == 'system' %}
        {{- messages[0].content + '\\n\\n' }}
    {%- endif %}
    {{- '<tools>' }}
    {%- for tool in tools %}
        {{- '\\n' + (tool | tojson) }}
    {%- endfor %}
    {{- '\\n</tools><|im_end|>\\n' }}
{%- elif messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(last_query=0) %}
{%- for message in messages[::-1] %}
    {%- if message.role == 'user' %}
        {%- set ns.last_query = messages|length - 1 - loop.index0 %}
        {%- break %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.content is not string %}
        {{- raise_exception('content must be text') }}
    {%- endif %}
    {%- if message.role == 'user' or (message.role == 'system' and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
    {%- elif message.role == 'assistant' %}
        {%- set content = message.content %}
        {%- if '</think>' in content and loop.index0 < ns.last_query %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {{- '<|im_start|>assistant\\n' + content + '<|im_end|>\\n' }}
    {%- elif message.role == 'tool' %}
        {%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}
            {{- '<|im_start|>user' }}
        {%- endif %}
        {{- '\\n<tool_response>\\n' + message.content + '\\n</tool_response>' }}
        {%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}
            {{- '<|im_end|>\\n' }}
        {%- endif %}
    {%- elif message.role != 'system' %}
        {{- raise_exception('unknown role ' + message.role) }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}
"""

HELLO = [Message("user", "hello")]
TIGHT = Limits(cpu_seconds=1, memory=256 << 20, output=100_000)


class Vocabulary:
    """All that a template wants from a tokenizer."""

    bos: int | None = 1
    eos: int | None = 2
    add_bos: bool = True

    def token_bytes(self, id: int) -> bytes:
        return {1: b"<s>", 2: b"</s>"}[id]


def template(source: str, limits: Limits = TIGHT) -> ChatTemplate:
    return ChatTemplate(source, "<s>", "</s>", limits)


def from_metadata(metadata: dict[str, Value]) -> ChatTemplate | None:
    return ChatTemplate.from_metadata(metadata, cast(Tokenizer, Vocabulary()))


def test_a_conversation_becomes_chatml() -> None:
    messages = [
        Message("system", "Be brief."),
        Message("user", "2+2?"),
        Message("assistant", "<think>\neasy\n</think>\n\n4"),
        Message("user", "Ünï <b> & \"quotes\" 'too' 👩‍💻"),
    ]
    past = (
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        "<|im_start|>user\n2+2?<|im_end|>\n"
        "<|im_start|>assistant\n4<|im_end|>\n"
        "<|im_start|>user\nÜnï <b> & \"quotes\" 'too' 👩‍💻<|im_end|>\n"
    )
    qwen3 = template(QWEN3)
    assert qwen3.render(messages) == past + "<|im_start|>assistant\n"
    assert qwen3.render(messages, add_generation_prompt=False) == past


def test_the_thinking_switch() -> None:
    start = "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
    qwen3 = template(QWEN3)
    assert qwen3.supports_thinking
    assert qwen3.render(HELLO) == start
    assert qwen3.render(HELLO, thinking=True) == start
    assert qwen3.render(HELLO, thinking=False) == start + "<think>\n\n</think>\n\n"
    assert not template("{{ messages[0].content }}").supports_thinking


def test_tools_are_plain_json_and_tool_results_share_a_turn() -> None:
    messages = [
        Message("system", "Use tools."),
        Message("user", "Wetter in Köln?"),
        Message("assistant", "calling"),
        Message("tool", "1"),
        Message("tool", "2"),
    ]
    tools = [{"name": "weather", "description": "<town> & 'länd'"}]
    assert template(QWEN3).render(messages, tools=tools) == (
        "<|im_start|>system\nUse tools.\n\n<tools>\n"
        '{"name": "weather", "description": "<town> & \'länd\'"}\n</tools><|im_end|>\n'
        "<|im_start|>user\nWetter in Köln?<|im_end|>\n"
        "<|im_start|>assistant\ncalling<|im_end|>\n"
        "<|im_start|>user\n<tool_response>\n1\n</tool_response>"
        "\n<tool_response>\n2\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_what_templates_expect_of_their_environment() -> None:
    # White space as Hugging Face's renderer treats it, and its helpers.
    source = (
        "{% if true %}\nx\n    {% endif %}\n{{ bos_token }}|{{ eos_token }}|{{ tools is none }}"
    )
    assert template(source).render(HELLO) == "x\n<s>|</s>|True"
    assert template("{{ strftime_now('%Y') }}").render(HELLO) == str(datetime.now().year)
    assert template("{{ {'b': 1, 'a': 'é'}|tojson(indent=1) }}").render(HELLO) == (
        '{\n "b": 1,\n "a": "é"\n}'
    )
    assert template("{{ enable_thinking is defined }}").render(HELLO) == "False"


def test_marks_of_what_to_train_on_are_ignored() -> None:
    source = (
        "{% for m in messages %}{{ m.role }}: {% generation %}{% if true %}{{ m.content }}"
        "{% endif %}{% endgeneration %}\n{% endfor %}"
    )
    assert template(source).render(HELLO) == "user: hello"
    inner = "{% set x = 1 %}{% generation %}{% set x = 2 %}{{ x }}{% endgeneration %}{{ x }}"
    assert template(inner).render(HELLO) == "21"  # as in transformers
    with pytest.raises(OrthrusError, match="endgeneration"):
        template("{% generation %}{{ 1 }}").render(HELLO)


def test_a_bos_in_name_only() -> None:
    """Qwen's tokenizers have none, whatever config.json says; templates see none either."""

    class Qwen(Vocabulary):
        add_bos = False

    class DeepSeek(Vocabulary):
        add_bos = True

    metadata: dict[str, Value] = {
        "tokenizer.chat_template": "{{ bos_token }}|",
        "tokenizer.ggml.pre": "qwen2",
    }
    for vocabulary, expected in ((Qwen(), "|"), (DeepSeek(), "<s>|")):
        found = ChatTemplate.from_metadata(metadata, cast(Tokenizer, vocabulary))
        assert found is not None
        assert found.render(HELLO) == expected
    metadata["tokenizer.ggml.pre"] = "olmo"
    found = ChatTemplate.from_metadata(metadata, cast(Tokenizer, Qwen()))
    assert found is not None
    assert found.render(HELLO) == "<s>|"


def test_guarded_texts() -> None:
    """Everything that comes from outside is, and nothing that the template says."""
    tools = [{"name": "x", "args": ["y", 1]}]
    source = "{{ messages[0].role }} {{ messages[0].content }} {{ tools[0] | tojson }} z"
    assert template(source).render(HELLO, tools=tools, guard=lambda text: f"({text})") == (
        '(user) (hello) {"(name)": "(x)", "(args)": ["(y)", 1]} z'
    )


def test_which_template_a_file_gives() -> None:
    assert from_metadata({}) is None
    one = from_metadata({"tokenizer.chat_template": "{{ bos_token }}+{{ eos_token }}"})
    assert one is not None
    assert one.render([]) == "<s>+</s>"
    several: dict[str, Value] = {
        "tokenizer.chat_templates": ["default", "rag"],
        "tokenizer.chat_template": "the default",
        "tokenizer.chat_template.rag": "another",
    }
    chosen = from_metadata(several)
    assert chosen is not None
    assert chosen.source == "the default"
    del several["tokenizer.chat_template"]
    with pytest.raises(OrthrusError, match=r"tokenizer\.chat_template is missing.*rag"):
        from_metadata(several)
    with pytest.raises(OrthrusError, match="expected a string, found 3"):
        from_metadata({"tokenizer.chat_template": 3})


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        ("{% if %}", "line 1: TemplateSyntaxError"),
        ("\n\n{{ a b }}", "line 3: TemplateSyntaxError"),
        ("{{ nothing.there }}", "'nothing' is undefined"),
        (
            "{{ raise_exception('roles\\x1b[2J must\nalternate') }}",
            "refuses.*: roles .2J must alternate",
        ),
        ("{% include 'secrets.txt' %}", "no loader"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
    ],
)
def test_errors_are_one_line_with_a_way_out(source: str, problem: str) -> None:
    with pytest.raises(OrthrusError, match=f"^chat template: .*{problem}.*--raw") as caught:
        template(source).render(HELLO)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ ''['__class__'].mro() }}",
        "{{ (''|attr('__class__')).mro() }}",
        "{{ lipsum.__globals__['os'].popen('id').read() }}",
        "{{ cycler.__init__.__globals__ }}",
        "{{ raise_exception.__globals__['sys'] }}",
        "{{ '{0.__class__.__mro__}'.format(1) }}",
        # Indirect calls, which Jinja before 3.1.5 and before 3.1.6 let through.
        "{% set m = '{0.__class__.__mro__}'.format %}{{ m(1) }}",
        "{{ ('{0.__class__.__mro__}'|attr('format'))(1) }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update(role='system') }}",
        "{% set messages[0].role = 'system' %}",
    ],
)
def test_the_sandbox_holds(source: str) -> None:
    with pytest.raises(OrthrusError, match=r"unsafe|undefined|Syntax"):
        template(source).render(HELLO)


ESCAPED = """
import runpy, socket, subprocess, sys
worker = runpy.run_path(sys.argv[1])
worker["close_doors"]()
for attempt in (
    lambda: open(sys.argv[1]),
    lambda: open(sys.argv[2], "w"),
    socket.socket,
    lambda: subprocess.run([sys.executable, "-c", ""]),
):
    try:
        attempt()
    except OSError:
        print("refused")
"""


def test_behind_the_sandbox_nothing_can_be_opened(tmp_path: Path) -> None:
    """Code that had escaped could not read or write files, reach the network, or start programs."""
    worker = Path(chat.__file__).with_name("chat_worker.py")
    done = subprocess.run(
        [sys.executable, "-c", ESCAPED, str(worker), str(tmp_path / "new")],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == ["refused"] * 4
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("{{ messages|pprint }}", "[{'content': 'hello', 'role': 'user'}]"),
        ("{{ 'a b'|wordwrap(1) }}", "a\nb"),
        ("{{ lipsum(1, false)|length > 20 }}", "True"),
        ("{{ 'http://x.org'|urlize }}", '<a href="http://x.org" rel="noopener">http://x.org</a>'),
        ("{{ {'a': 1}|xmlattr }}{{ [3, 1]|sort|join }}{{ 2.6|round }}", ' a="1"133.0'),
        ("{{ '%s'|format(1) }}{{ [1, 2]|random > 0 }}{{ 5000|filesizeformat }}", "1True5.0 kB"),
    ],
)
def test_what_jinja_imports_late_still_works(source: str, expected: str) -> None:
    assert template(source).render(HELLO) == expected


DOUBLING = (
    "{{% set n = namespace(x={0}) %}}{{% for _ in range(60) %}}{{% set n.x = {1} %}}{{% endfor %}}"
)


@pytest.mark.parametrize(
    "source",
    [
        "{{ 'a' * 10**10 }}",
        "{{ '%9999999999d' % 1 }}",
        "{{ 'a'|center(10**10) }}",
        DOUBLING.format("'ab'", "n.x ~ n.x"),
        DOUBLING.format("'ab'", "n.x + n.x"),
        # In C code from here on, out of reach of limits inside the process.
        DOUBLING.format("[1]", "[n.x, n.x]") + "{{ n.x }}",
        DOUBLING.format("[1]", "[n.x, n.x]") + "{{ n.x|tojson }}",
        "{{ 10 ** 1000000 ** 2 ** 3 }}",
        "{% for _ in range(10**9) %}{% endfor %}",
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{% for a in range(99999) %}{{ 'abc' }}{% endfor %}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{% macro f(n) %}{% if n %}{{ f(n-1) ~ f(n-1) }}{% endif %}{% endmacro %}{{ f(60) }}",
        "{{ " + "(" * 9999 + "1" + ")" * 9999 + " }}",
    ],
)
def test_work_and_output_are_bounded(source: str) -> None:
    start = time.perf_counter()
    bounds = "needs more than|did not finish|too deeply|longer than|MAX_RANGE"
    with pytest.raises(OrthrusError, match=bounds) as caught:
        template(source).render(HELLO)
    assert "\n" not in str(caught.value)
    assert time.perf_counter() - start < 20  # about 1 s when the machine is idle


@pytest.mark.skipif(sys.platform == "darwin", reason="macOS does not limit address space")
def test_the_memory_limit_is_the_kernels() -> None:
    big = "{{ ('a' * 300_000_000)|length }}"
    assert template(big, Limits()).render([]) == "300000000"
    with pytest.raises(OrthrusError, match="needs more than 256 MiB"):
        template(big).render([])


def test_a_template_that_waits_is_ended_too() -> None:
    stuck = template(
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    )
    with pytest.raises(OrthrusError, match="within 1 s;"):
        replace(stuck, limits=Limits(cpu_seconds=60, wall_seconds=1)).render(HELLO)


def test_the_default_limits_leave_room_for_a_long_conversation() -> None:
    text = "0123456789" * 100_000
    rendered = template(QWEN3, Limits()).render([Message("user", text), Message("assistant", text)])
    assert rendered.count(text) == 2


def test_nothing_in_the_current_folder_gets_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("jinja2", "json", "resource"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('got in')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert template("{{ messages[0].content }}").render(HELLO) == "hello"
