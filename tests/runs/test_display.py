"""The live display of a run and its tables, with hostile completions."""

import io
import re
import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from grpo_jax.runs import display
from grpo_jax.runs.display import Display

HOSTILE = "[bold]x[/bold] \x1b[31mred\x1b[0m \x07\r\u202eevil | <b>&#60;</b>\nnext"


def evaluation(success: float = 0.5, low: float = 0.4, high: float = 0.6, **more) -> SimpleNamespace:
    """As much of an `Evaluation` as is printed."""
    values = {"split": "held_out", "num_prompts": 128, "num_samples": 1, "temperature": 0.0, "reward": 0.55}
    values |= {"success": success, "success_low": low, "success_high": high, "mean_length": 7.0, "mean_turns": 1.0}
    return SimpleNamespace(**values | more)


def completions(text: str = "abc", group: int = 2) -> list[dict]:
    return [{"prompt": "say", "completion": text, "reward": 1.0 + g, "advantage": g - 0.5} for g in range(group)]


def screen(terminal: bool = False, width: int = 120) -> Console:
    return Console(file=io.StringIO(), force_terminal=terminal, width=width, highlight=False)


def shown(renderable) -> str:
    console = screen()
    console.print(renderable)
    return console.file.getvalue()


def test_without_a_terminal_there_is_a_plain_line_every_so_often():
    seconds = iter(np.arange(0.0, 1000.0, 1.0))
    console = screen()
    display = Display(40, title="control", console=console, every=10, clock=lambda: next(seconds))
    for step in range(40):
        display.update(step, {"reward": step / 40, "tokens_per_second": 1234.4})
    lines = console.file.getvalue().splitlines()
    assert 4 <= len(lines) <= 8
    assert lines[0].startswith("control step 1/40  reward 0.00  1,234 tokens/s")
    assert "control step 40/40" in lines[-1]
    assert "(+0.12)" in lines[-1]  # the last five rewards against the five before: 5 steps of 1/40 each
    assert "\x1b" not in console.file.getvalue()


def test_progress_towards_a_budget_of_tokens_is_counted_in_tokens():
    for terminal, shown in ((False, "training step 2 (1,100 of 1,000 tokens)"), (True, "1100/1000")):
        console = screen(terminal=terminal)
        display = Display(640, 1000, console=console)
        for step, tokens in enumerate((550, 1100)):
            display.update(step, {"reward": 0.5, "num_sampled_tokens": tokens})
        assert shown in console.file.getvalue()


def test_on_a_terminal_there_is_a_bar_with_the_latest_group():
    console = screen(terminal=True)
    display = Display(2, console=console)
    display.note("compiling")
    display.update(0, {"reward": 0.25}, completions("first"))
    display.evaluation(1, evaluation())
    display.update(1, {"reward": 0.5}, completions(HOSTILE))
    output = console.file.getvalue()
    for part in ("compiling", "2/2", "reward 0.50", "success 50%", "[bold]x[/bold]", "held-out"):
        assert part in output
    assert "\x1b[31mred" not in output and "\x07" not in output and "\u202e" not in output


@pytest.mark.parametrize(
    ("width", "shows", "leaves_out"),
    [
        (120, ["━", "1000/1000", "reward 0.50 (+0.00)", "success 50%", "1,234 tokens/s"], []),
        (80, ["━", "1000/1000", "reward 0.50", "success 50%"], ["tokens/s", "(+0.00)"]),
        (60, ["1000/1000", "reward 0.50", "success 50%"], ["tokens/s", "(+0.00)", "━"]),
        (46, ["1000/1000", "reward 0.50"], ["success"]),
    ],
)
def test_the_live_line_is_one_line_of_the_terminal_and_what_matters_least_is_left_out(width, shows, leaves_out):
    console = screen(terminal=True, width=width)
    display = Display(1000, title="warm start", console=console)
    for step in (*range(10), 999):
        display.update(step, {"reward": 0.5, "success": 0.5, "tokens_per_second": 1234.4})
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", console.file.getvalue())
    lines = [line for line in re.split(r"[\r\n]+", text) if "warm start" in line]
    assert all(len(line) <= width and line.rstrip().endswith(("0:00:00", "-:--:--")) for line in lines), lines
    assert all(part in lines[-1] for part in shows) and not any(part in lines[-1] for part in leaves_out), lines[-1]


def test_a_group_before_and_after_is_one_table():
    text = shown(display.group_table({"before": completions("no"), "after": completions("yes")}))
    assert "prompt: say" in text
    assert text.index("before") < text.index("no") < text.index("after") < text.index("yes")
    assert "2.000" in text and "+0.50" in text and "-0.50" in text


def test_a_completion_cannot_write_markup_or_escape_sequences():
    row = completions(HOSTILE, group=1)[0] | {"prompt": [{"role": "user", "content": "[red]why\x1b[2J"}]}
    text = shown(display.group_table({"": [row]}))
    assert r"[bold]x[/bold] \x1b[31mred\x1b[0m \x07\r\u202eevil | <b>&#60;</b>⏎next" in text
    assert r"[red]why\x1b[2J" in text
    assert "\x1b" not in text


@given(st.text())
def test_no_text_reaches_the_terminal_unprintable(text):
    assert display.visible(text).plain.isprintable()


def test_a_large_group_is_cut_and_says_so():
    text = shown(display.group_table({"before": completions(group=20)}))
    assert text.count("abc") == 8 and "and 12 more" in text


def test_episodes_of_several_turns_and_missing_rewards_are_shown():
    turns = [{"role": "assistant", "content": "crane"}, {"role": "user", "content": "XGXXG"}]
    row = completions(group=1)[0] | {"completion": turns, "reward": float("nan"), "advantage": None}
    text = shown(display.group_table({"after": [row]}))
    assert "crane⏎XGXXG" in text and text.count("–") == 2


def test_the_summary_gives_each_policy_its_interval_and_leaves_out_the_absent():
    text = shown(
        display.summary_table({"before": evaluation(0.04, 0.01, 0.09), "after": evaluation(), "control": None})
    )
    assert "128 held-out prompts, greedy" in text
    assert "4.0 %" in text and "1.0 – 9.0 %" in text and "40.0 – 60.0 %" in text
    assert "control" not in text
    assert "turns" not in text and "4.12" in shown(display.summary_table({"after": evaluation(mean_turns=4.125)}))
    sampled = evaluation(num_samples=8, temperature=0.7)
    assert "128 held-out prompts × 8 samples, temperature 0.7" in shown(display.summary_table({"after": sampled}))


def test_columns_stand_above_a_group_and_are_cut_there_alone():
    rows = [row | {"columns": {"answer": 57, "[b]context\x1b": "x" * 500}} for row in completions()]
    text = shown(display.group_table({"after": rows}))
    assert "prompt: say" in text and "answer: 57" in text and r"[b]context\x1b:" in text
    assert 100 < text.count("x") < 200 and "…" in text and "\x1b" not in text
    full = display.markdown_table(rows)
    assert full.count("x") >= 500 and "answer&#58; 57" not in full and "answer: 57  " in full


def test_an_example_without_a_prompt_is_shown_by_its_columns():
    rows = [row | {"prompt": "", "columns": {"secret": "POUND"}} for row in completions()]
    text = shown(display.group_table({"": rows}))
    assert "secret: POUND" in text and "prompt" not in text


def test_a_notebooks_cell_is_drawn_over_and_keeps_the_last_state(monkeypatch):
    drawn: list[str] = []

    class Handle:
        def update(self, picture) -> None:
            drawn[-1] = shown(picture)
            assert "text/html" in picture._repr_mimebundle_([], [])

    def show(picture, *, display_id) -> Handle:
        assert display_id
        drawn.append(shown(picture))
        return Handle()

    monkeypatch.setitem(sys.modules, "IPython", ModuleType("IPython"))
    monkeypatch.setitem(sys.modules, "IPython.display", SimpleNamespace(display=show))
    console = Console(file=io.StringIO(), force_jupyter=True, width=120, highlight=False)
    display = Display(3, console=console)
    for step in range(3):
        display.update(step, {"reward": step / 2}, completions("[bold]abc" if step == 2 else "first"))
    assert len(drawn) == 1
    assert "[bold]abc" in drawn[0] and "3/3" in drawn[0] and "reward 1.00" in drawn[0]
