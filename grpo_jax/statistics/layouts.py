"""The table of an ablation as text: Markdown, CSV or LaTeX."""

import csv
import io
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from grpo_jax import statistics
from grpo_jax.errors import UserError
from grpo_jax.experiment.overrides import nearest
from grpo_jax.statistics.intervals import Estimate
from grpo_jax.statistics.tables import Row, Table, verdict_of
from grpo_jax.text import in_csv, in_latex, in_markdown, in_markdown_code, on_line

Layout = Literal["md", "csv", "latex"]
COLUMNS = ("arm", "seeds", "mean", "iqm", "difference", "better", "p", "tokens", "verdict")


@dataclass(frozen=True)
class Style:
    """Which columns a table shows, and whether shares are percent (their differences are then points).

    A CSV file always has all numbers as they are.
    """

    columns: Sequence[str] = COLUMNS
    percent: bool = False


def render(table: Table, layout: Layout, style: Style = Style()) -> str:
    """The table as text that ends with a newline.

    Raises `UserError` for percent of a metric that is no share, and for a column that does not exist.
    """
    for column in style.columns:
        if column not in COLUMNS:
            raise UserError(f"a table has no column {column!r}{nearest(column, COLUMNS)}")
    if style.percent and statistics.bounds_of(table.metric) != (0.0, 1.0):
        raise UserError(f"{table.metric!r} is no share, so --percent cannot show it.")
    return _csv(table) if layout == "csv" else _TEXT[layout](table, style)


def _cells(row: Row, table: Table, style: Style, safe: Callable[[str], str] = str) -> list[str]:
    """The cells of a row, in the columns of the style. `safe` is what the user's names are passed through."""
    cells = {**dict.fromkeys(COLUMNS, "–"), "arm": safe(row.arm), "seeds": str(row.seeds)}
    if row.mean is not None and row.iqm is not None:
        cells |= {"mean": _interval(row.mean, style), "iqm": _number(row.iqm, style)}
    if row.difference is not None and row.better is not None:
        p = row.difference.adjusted_p
        cells |= {"difference": _interval(row.difference, style, "+"), "better": f"{row.better:.2f}"}
        cells["p"] = "< .001" if p < 0.001 else f"{p:.3f}"
    if row.tokens is not None and not math.isnan(row.tokens):
        cells["tokens"] = f"{row.tokens:,.0f}"
    cells["verdict"] = verdict_of(row, table, points=style.percent)
    return [cells[column] for column in style.columns]


def _header(table: Table, style: Style, safe: Callable[[str], str] = str) -> list[str]:
    names: Mapping[str, str] = {
        "mean": f"{safe(table.metric)}{', %' if style.percent else ''} [95 %]",
        "iqm": "IQM",
        "difference": f"difference{', points' if style.percent else ''} [95 %]",
        "better": "P(better)",
        "p": "p (Holm)",
        "tokens": "sampled tokens",
    }
    return [names.get(column, column) for column in style.columns]


def _interval(estimate: Estimate, style: Style, sign: str = "") -> str:
    value = _number(estimate.value, style, sign)
    if math.isinf(estimate.low):
        return f"{value} [–]"
    return f"{value} [{_number(estimate.low, style, sign)}, {_number(estimate.high, style, sign)}]"


def _number(value: float, style: Style, sign: str = "") -> str:
    return f"{100 * value:{sign}.1f}" if style.percent else f"{value:{sign}.3f}"


def _explanation(table: Table) -> str:
    bounds = statistics.bounds_of(table.metric)
    said = statistics.explanation(bounds, has_noise=table.has_noise, margin=table.margin)
    return f"{said} IQM: interquartile mean. P(better): over all pairs of runs."


def _comments(table: Table) -> list[tuple[str, str]]:
    """The notes of a layout that has comments, by name."""
    return [*table.notes, *(("missing", text) for text in table.missing), ("explanation", _explanation(table))]


def _markdown(table: Table, style: Style) -> str:
    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cells) + " |"

    header = _header(table, style, in_markdown)
    rows = [line(_cells(row, table, style, in_markdown)) for row in table.rows]
    lines = [line(header), "|" + "---|" * len(header), *rows, ""]
    lines += [f"- missing: {in_markdown(text)}" for text in table.missing]
    lines += [f"- {in_markdown(name)}: {in_markdown_code(text)}" for name, text in table.notes]
    return "\n".join([*lines, "", _explanation(table), ""])


def _csv(table: Table) -> str:
    out = io.StringIO()
    out.writelines(f"# {on_line(name)}: {on_line(text)}\n" for name, text in _comments(table))
    writer = csv.writer(out, lineterminator="\n")
    numbers = ["mean", "mean_low", "mean_high", "iqm", "difference", "difference_low"]
    numbers += ["difference_high", "p_better", "p_value", "p_holm", "detectable", "sampled_tokens"]
    writer.writerow(["arm", "metric", "seeds", *numbers, "verdict"])
    for row in table.rows:
        values: list[float | None] = []
        values += [*_values(row.mean), row.iqm, *_values(row.difference), row.better]
        found = row.difference
        values += [None] * 3 if found is None else [found.p_value, found.adjusted_p, found.detectable]
        values.append(row.tokens)
        cells = ["" if value is None or math.isnan(value) else f"{value:.6g}" for value in values]
        writer.writerow([in_csv(row.arm), in_csv(table.metric), row.seeds, *cells, verdict_of(row, table)])
    return out.getvalue()


def _values(estimate: Estimate | None) -> list[float | None]:
    return [None] * 3 if estimate is None else [estimate.value, estimate.low, estimate.high]


def _latex(table: Table, style: Style) -> str:
    def line(cells: Sequence[str]) -> str:
        # The group keeps a cell that begins with a bracket from being read as an option of the line break before it.
        return "  {}" + " & ".join(map(in_latex, cells)) + r" \\"

    comments = [f"% {on_line(name)}: {on_line(text)}" for name, text in _comments(table)]
    header = _header(table, style)
    columns = "".join("l" if column in ("arm", "verdict") else "r" for column in style.columns)
    return "\n".join([
        "% \\usepackage{booktabs}",
        *comments,
        rf"\begin{{tabular}}{{{columns}}}",
        r"  \toprule",
        line(header),
        r"  \midrule",
        *(line(_cells(row, table, style)) for row in table.rows),
        r"  \bottomrule",
        r"\end{tabular}",
        "",
    ])  # fmt: skip


_TEXT: dict[str, Callable[[Table, Style], str]] = {"md": _markdown, "latex": _latex}
