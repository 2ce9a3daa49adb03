"""The live display of a run and its tables, with hostile completions."""

import io
import math
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


def lines_of(display: Display) -> list[str]:
    return display.console.file.getvalue().splitlines()


def test_a_line_comes_with_the_first_step_then_only_when_its_time_has_come_and_with_the_last():
    now = [100.0]
    display = Display(5, console=screen(), every=10, clock=lambda: now[0])
    for step, second in enumerate((103.0, 112.9, 113.0, 114.0, 115.0)):
        now[0] = second
        display.update(step, {"reward": 0.5})
    assert lines_of(display) == [
        "training step 1/5  reward 0.50  3 s",
        "training step 3/5  reward 0.50  13 s",
        "training step 5/5  reward 0.50  15 s",
    ]


def test_the_last_step_of_a_budget_is_the_one_that_uses_it_up():
    display = Display(9, 1000, console=screen(), clock=lambda: 0.0)
    for step, tokens in enumerate((400, 999, 1000)):
        display.update(step, {"reward": 0.5, "num_sampled_tokens": tokens})
    assert lines_of(display) == [
        "training step 1 (400 of 1,000 tokens)  reward 0.50  0 s",
        "training step 3 (1,000 of 1,000 tokens)  reward 0.50  0 s",
    ]


def test_the_last_step_of_all_is_shown_though_a_budget_is_not_used_up():
    display = Display(3, 1000, console=screen(), clock=lambda: 0.0)
    for step, tokens in enumerate((10, 20, 30)):
        display.update(step, {"reward": 0.5, "num_sampled_tokens": tokens})
    assert [line.split("  ")[0] for line in lines_of(display)] == [
        "training step 1 (10 of 1,000 tokens)", "training step 3 (30 of 1,000 tokens)"]  # fmt: skip


@pytest.mark.parametrize(
    ("rewards", "metrics", "figures"),
    [
        # The mean of the last five, 2 to 6, against that of the ones before them (at most five).
        ([1.0, 2.0, 3.0, 4.0, 5.0, 6.0], {}, "reward 6.00 (+3.00)"),
        ([9.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0], {}, "reward 0.00 (-1.00)"),
        ([1.0, 2.0, 3.0, 4.0, 5.0], {}, "reward 5.00"),
        ([0.5], {"loss": 1.0, "success": 0.256}, "reward 0.50  success 26%"),
        ([math.nan], {"loss": 1.25, "tokens_per_second": 12345.6}, "loss 1.250  12,346 tokens/s"),
        ([math.nan], {}, ""),
    ],
)
def test_the_figures_of_a_step(rewards, metrics, figures):
    display = Display(len(rewards), console=screen(), clock=lambda: 0.0)
    for step, reward in enumerate(rewards):
        display.update(step, {"reward": reward, **(metrics if step == len(rewards) - 1 else {})})
    assert lines_of(display)[-1] == f"training step {len(rewards)}/{len(rewards)}  {figures}  0 s"


def test_the_success_that_is_shown_is_that_of_the_step_or_else_of_the_last_evaluation():
    display = Display(3, title="control", console=screen(), every=0, clock=lambda: 0.0)
    display.update(0, {})
    display.evaluation(1, evaluation(0.25, 0.2, 0.3, split="train"))
    display.update(1, {})
    display.update(2, {"success": 0.75})
    assert lines_of(display) == [
        "control step 1/3    0 s",
        "control: after 1 steps: train success 25.0 % [20.0, 30.0]",
        "control step 2/3  success 25%  0 s",
        "control step 3/3  success 75%  0 s",
    ]


def test_a_group_is_a_row_for_each_completion_with_its_numbers():
    def cells(groups, **options):
        lines = shown(display.group_table(groups, **options)).splitlines()
        return [[c.strip() for c in line.split("│")[1:-1]] for line in lines if line.startswith("│")]

    rows = completions(group=3)
    assert cells({"": rows[:2]}) == [["abc", "1.000", "-0.50"], ["abc", "2.000", "+0.50"]]
    assert cells({"a": rows[:1], "b": rows[1:]}) == [
        ["a", "abc", "1.000", "-0.50"], ["b", "abc", "2.000", "+0.50"], ["", "abc", "3.000", "+1.50"]]  # fmt: skip
    assert cells({"a": rows}, limit=2)[1:] == [["", "abc", "2.000", "+0.50"], ["", "and 1 more", "", ""]]
    assert cells({"a": rows}, limit=3)[-1] == ["", "abc", "3.000", "+1.50"]
    empty = shown(display.group_table({"a": [], "b": [row | {"prompt": "second"} for row in rows]}))
    assert "prompt: second" in empty and "prompt:" not in shown(display.group_table({"": []}))


def test_the_prompt_of_a_chat_is_its_last_message_and_a_long_one_is_cut():
    chat = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "why?"}]
    text = shown(display.group_table({"": [completions(group=1)[0] | {"prompt": chat}]}))
    assert "prompt: why?" in text and "brief" not in text
    table = display.group_table({"": [completions(group=1)[0] | {"prompt": "x" * 300}]})
    assert table.title.plain == "prompt: " + "x" * 159 + "…"


def test_markdown_of_a_group_has_every_number_in_its_column():
    rows = completions("a b", group=2)
    rows[1] |= {"reward": None, "completion": [{"content": "c"}, {"content": "d"}]}
    assert display.markdown_table(rows).splitlines() == [
        "say", "", "| completion | reward | advantage |", "|---|---|---|", "| a b | 1.000 | -0.50 |",
        "| c&#9166;d | – | +0.50 |",
    ]  # fmt: skip


def test_the_summary_has_every_number_in_its_column():
    one = evaluation(0.25, 0.2, 0.31, num_prompts=1, split="train", mean_turns=1.5, reward=None, mean_length=7.25)
    lines = shown(display.summary_table({"before": None, "after": one})).splitlines()
    assert lines[0].strip() == "1 train prompt, greedy"
    header = [cell.strip() for cell in lines[2].split("┃")[1:-1]]
    row = [cell.strip() for cell in next(line for line in lines if "after" in line).split("│")[1:-1]]
    assert header == ["", "success", "95 % interval", "reward", "tokens", "turns"]
    assert row == ["after", "25.0 %", "20.0 – 31.0 %", "–", "7.2", "1.50"]


def test_a_long_completion_is_whole_beside_another_policys_and_cut_while_a_run_goes_on():
    rows = completions("x" * 200, group=1)
    for groups, letters in (({"before": rows, "after": []}, 200), ({"": rows}, 119)):
        text = shown(display.group_table(groups))  # 120 wide
        assert text.count("x") == 200 if letters == 200 else 0 < text.count("x") < letters
        assert ("…" in text) == (letters < 200)
