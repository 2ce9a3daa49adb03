"""Cells, columns and comments of a table that is made by hand."""

import csv
import dataclasses
import html
import io
import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from malformed import fuzz

from grpo_jax import text
from grpo_jax.errors import UserError
from grpo_jax.statistics import Difference, Estimate
from grpo_jax.statistics.layouts import COLUMNS, Style, render
from grpo_jax.statistics.tables import Row, Table
from grpo_jax.text import on_line

DIFFERENCE = Difference(
    0.2, -0.05, 0.45, p_value=0.0002, detectable=0.375, num_pairs=4, num_higher=3, num_lower=1, inner_low=-0.04,
    inner_high=0.04, adjusted_p=0.0004, num_comparisons=2, limit=1.0,
)  # fmt: skip
ROWS = [
    Row("old", 5, Estimate(0.25, 0.125, 0.375), 0.3, None, None, 1234567.0),
    Row("new", 4, Estimate(0.5, 0.4, 0.61), 0.45, DIFFERENCE, 0.875, 1000.4),
    Row("lone", 1, Estimate(0.75, -math.inf, math.inf), 0.75, None, None, math.nan),
    Row("none", 0, None, None, None, None, None),
]
NOTES = [("command", "grpo-jax sweep toy.py"), ("code", "c0ffee")]
TABLE = Table("success", "old", ROWS, NOTES, ["none seed 3 (abc): not run"], margin=0.1, has_noise=True)


def cells(text: str) -> list[list[str]]:
    """The cells of a Markdown table, without its ruler."""
    rows = [line.removeprefix("| ").removesuffix(" |").split(" | ") for line in text.splitlines() if line[:2] == "| "]
    assert "|" + "---|" * len(rows[0]) in text.splitlines()
    return rows


def test_every_cell_of_a_table_is_its_number():
    assert cells(render(TABLE, "md")) == [
        ["arm", "seeds", "success [95 %]", "IQM", "difference [95 %]", "P(better)", "p (Holm)", "sampled tokens",
         "verdict"],
        ["old", "5", "0.250 [0.125, 0.375]", "0.300", "–", "–", "–", "1,234,567", "baseline"],
        ["new", "4", "0.500 [0.400, 0.610]", "0.450", "+0.200 [-0.050, +0.450]", "0.88", "< .001", "1,000",
         "the same as the baseline within ±0.1"],
        ["lone", "1", "0.750 [–]", "0.750", "–", "–", "–", "–", "no pair with the baseline"],
        ["none", "0", "–", "–", "–", "–", "–", "–", "no finished run"],
    ]  # fmt: skip


def test_shares_may_be_percent_and_their_differences_points():
    style = Style(("verdict", "iqm", "difference", "mean", "arm"), percent=True)
    found = cells(render(TABLE, "md", style))
    assert found[0] == ["verdict", "IQM", "difference, points [95 %]", "success, % [95 %]", "arm"]
    assert found[2] == [
        "the same as the baseline within ±10 points", "45.0", "+20.0 [-5.0, +45.0]", "50.0 [40.0, 61.0]", "new",
    ]  # fmt: skip
    assert found[1] == ["baseline", "30.0", "–", "25.0 [12.5, 37.5]", "old"]


@pytest.mark.parametrize(("p", "shown"), [(0.00099, "< .001"), (0.001, "0.001"), (0.0625, "0.062"), (1.0, "1.000")])
def test_the_p_value_that_is_shown_is_the_corrected_one(p, shown):
    row = dataclasses.replace(ROWS[1], difference=dataclasses.replace(DIFFERENCE, adjusted_p=p))
    table = dataclasses.replace(TABLE, rows=[row])
    assert cells(render(table, "md", Style(("p",))))[1] == [shown]


def test_what_stands_below_a_markdown_table_is_in_order():
    lines = render(TABLE, "md").split("\n")
    below = lines[lines.index("") + 1 :]
    assert below[:4] == ["- missing: none seed 3 (abc): not run", "- command: `grpo-jax sweep toy.py`",
                         "- code: `c0ffee`", ""]  # fmt: skip
    assert below[4].startswith("Intervals: 95 %, over seeds, with the evaluation's own 95 % interval")
    assert below[4].endswith("±0.1. IQM: interquartile mean. P(better): over all pairs of runs.") and below[5:] == [""]


def test_a_bar_in_a_name_does_not_end_its_cell():
    table = dataclasses.replace(TABLE, rows=[dataclasses.replace(ROWS[0], arm="a|b_c")])
    assert "| a&#124;b_c | 5 |" in render(table, "md")


def test_a_csv_row_holds_every_number_under_its_name():
    text = render(TABLE, "csv", Style(("arm",), percent=True))
    comments = [line for line in text.splitlines() if line.startswith("#")]
    assert comments[:3] == [
        "# command: grpo-jax sweep toy.py",
        "# code: c0ffee",
        "# missing: none seed 3 (abc): not run",
    ]
    assert comments[3].startswith("# explanation: Intervals: 95 %") and len(comments) == 4
    rows = list(csv.DictReader(io.StringIO("\n".join(line for line in text.splitlines() if line[0] != "#"))))
    assert rows[1] == {
        "arm": "new", "metric": "success", "seeds": "4", "mean": "0.5", "mean_low": "0.4", "mean_high": "0.61",
        "iqm": "0.45", "difference": "0.2", "difference_low": "-0.05", "difference_high": "0.45", "p_better": "0.875",
        "p_value": "0.0002", "p_holm": "0.0004", "detectable": "0.375", "sampled_tokens": "1000.4",
        "verdict": "the same as the baseline within ±0.1",
    }  # fmt: skip
    assert {name: value for name, value in rows[3].items() if value} == {
        "arm": "none", "metric": "success", "seeds": "0", "verdict": "no finished run",
    }  # fmt: skip
    assert (rows[2]["mean_low"], rows[2]["sampled_tokens"], rows[2]["p_value"]) == ("-inf", "", "")


def test_a_latex_table_aligns_words_left_and_numbers_right():
    lines = render(TABLE, "latex").splitlines()
    assert lines[:4] == [
        r"% \usepackage{booktabs}", "% command: grpo-jax sweep toy.py", "% code: c0ffee",
        "% missing: none seed 3 (abc): not run",
    ]  # fmt: skip
    body = lines[lines.index(r"\begin{tabular}{lrrrrrrrl}") :]
    assert [body[1], body[3], body[-2], body[-1]] == [r"  \toprule", r"  \midrule", r"  \bottomrule", r"\end{tabular}"]
    assert body[2].startswith(r"  {}arm & seeds & success [95 \%] & IQM &")
    assert body[5] == (
        r"  {}new & 4 & 0.500 [0.400, 0.610] & 0.450 & +0.200 [-0.050, +0.450] & 0.88 & $<$ .001 & 1,000 & "
        r"the same as the baseline within $\pm$0.1 \\"
    )
    assert r"\begin{tabular}{lr}" in render(TABLE, "latex", Style(("arm", "mean")))
    assert r"{}50.0 [40.0, 61.0] & new \\" in render(TABLE, "latex", Style(("mean", "arm"), percent=True))


def test_a_column_or_a_percent_that_cannot_be_shown_is_refused_in_every_layout():
    for layout in ("md", "csv", "latex"):
        with pytest.raises(UserError, match="a table has no column 'means'; did you mean 'mean'"):
            render(TABLE, layout, Style(("means",)))
        with pytest.raises(UserError, match="'reward' is no share, so --percent cannot show it"):
            render(Table("reward", "old", ROWS, [], []), layout, Style(percent=True))
    assert COLUMNS == ("arm", "seeds", "mean", "iqm", "difference", "better", "p", "tokens", "verdict")


def test_greek_letters_are_mathematics_and_omicron_is_a_letter():
    table = dataclasses.replace(TABLE, rows=[dataclasses.replace(ROWS[3], arm="α Γ λ Α ο ≥ − – × _")])
    text = render(table, "latex", Style(("arm",)))
    assert r"{}$\alpha$ $\Gamma$ $\lambda$ Α ο $\geq$ $-$ -- $\times$ \_ \\" in text


# Names that are not words ---------------------------------------------------------------------------------------------

NASTY = [
    "a\nb", "a | b", "*a*_b_`c`", "<img src=x>", "[a](b)", "\x1b[31mred", "=1+1", "@me", "#1", "'", '"', "", " ",
    "100 % & $x^2$ {a}_b \\end{tabular} ~", "#$%&_{}", "[red]", "\r\u2028\u202e", "\0", "\ud800", "a,b;c\td", "α ≥ β",
]  # fmt: skip
names = st.lists(st.sampled_from(NASTY) | st.text(max_size=12), min_size=1, max_size=4, unique=True)


def named(arms: list[str]) -> Table:
    rows = [dataclasses.replace(ROWS[3], arm=arm) for arm in arms]
    return dataclasses.replace(TABLE, rows=rows, missing=[*arms], notes=[(f"runs of {arm}", arm) for arm in arms])


def is_safe(text: str) -> bool:
    return all(c.isprintable() or c == "\n" for c in text)


@given(names)
@fuzz(60)
def test_a_markdown_table_has_a_row_for_each_arm_whatever_its_name(arms):
    said = render(named(arms), "md")
    rows = [line for line in said.split("\n") if line.startswith("| ")]
    assert is_safe(said) and len(rows) == 1 + len(arms) and {row.count("|") for row in rows} == {len(COLUMNS) + 1}
    for arm, row in zip(arms, rows[1:], strict=True):
        cell = row[2:].split(" | ")[0]
        assert html.unescape(cell) == on_line(arm) and not set(cell) & set("<>*`[]\\")
    assert len([line for line in said.split("\n") if line.startswith("- ")]) == 2 * len(arms)


@given(names)
@fuzz(60)
def test_a_csv_file_has_a_row_for_each_arm_whatever_its_name(arms):
    said = render(named(arms), "csv")
    lines = [line for line in said.split("\n") if not line.startswith("#")]
    found = [row["arm"] for row in csv.DictReader(lines)]
    assert is_safe(said) and [arm.removeprefix("'") for arm in found] == [
        on_line(arm).removeprefix("'") for arm in arms
    ]
    assert not any(arm.lstrip()[:1] in set("=+-@") for arm in found)


@given(names)
@fuzz(60)
def test_a_latex_table_has_a_row_for_each_arm_whatever_its_name(arms):
    said = render(named(arms), "latex")
    body = said[said.index(r"\midrule") : said.index(r"\bottomrule")].split("\n")[1:-1]
    assert is_safe(said) and len(body) == len(arms)
    for line in body:
        bare = re.sub(r"\\[_%&#{}$]", "", line.removesuffix(r" \\"))  # without the characters that are escaped
        assert bare.count("&") == len(COLUMNS) - 1 and bare.count("{") == bare.count("}") and bare.count("$") % 2 == 0
        assert not set(bare) & set("%#_^~\n")
        assert set(re.findall(r"\\[a-zA-Z]+", bare)) <= COMMANDS


COMMANDS = {r"\textbackslash", r"\textasciitilde", r"\textasciicircum", r"\hookleftarrow", r"\geq", r"\pm", r"\times"}
COMMANDS |= {rf"\{letter}" for letter in text._GREEK}
