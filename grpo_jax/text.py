"""Names and texts of users and models, made safe for what they are written to: one function for each format.

Whoever names an arm, a reward or a column, or writes a completion, must not be able to move the cursor of a terminal,
to begin another row of a table, or to have a program carry something out. A text of several lines for a terminal is
made safe by `grpo_jax.errors.printable`, and HTML by its template.
"""

import re
import unicodedata

from grpo_jax.errors import printable


def on_line(text: str) -> str:
    """For one line of a terminal: newlines are ⏎, and control and invisible characters are escape sequences."""
    return printable(text.replace("\n", "⏎"))


def in_markdown(text: str) -> str:
    """For one line or one cell of Markdown: what Markdown or HTML would read as markup is a character reference."""
    line = on_line(text)
    # At its very beginning a line may also be a list or a rule.
    return re.sub(r"^[^\w\s]|[^\w\s.,:;=/%()'+-]|\b_|_\b", lambda found: f"&#{ord(found[0])};", line)


def in_markdown_code(text: str) -> str:
    """For Markdown, as code: between more backticks than the text has in a row."""
    line = on_line(text)
    fence = "`" * (1 + max(map(len, re.findall("`+", line)), default=0))
    space = " " if line.startswith("`") or line.endswith("`") or not line.strip() else ""
    return f"{fence}{space}{line}{space}{fence}"


_LATEX = {"\\": r"\textbackslash{}", "≥": r"$\geq$", "±": r"$\pm$", "–": "--", "−": "$-$", "~": r"\textasciitilde{}",
          "×": r"$\times$", "^": r"\textasciicircum{}", "<": "$<$", ">": "$>$", "⏎": r"$\hookleftarrow$",
          **{c: f"\\{c}" for c in "_%&#{}$"}}  # fmt: skip

_GREEK = {  # the letters that LaTeX has; the others look like Latin ones
    "alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "iota", "kappa", "lambda", "mu", "nu", "xi",
    "pi", "rho", "sigma", "tau", "upsilon", "phi", "chi", "psi", "omega", "Gamma", "Delta", "Theta", "Lambda", "Xi",
    "Pi", "Sigma", "Upsilon", "Phi", "Psi", "Omega",
}  # fmt: skip


def in_latex(text: str) -> str:
    """For LaTeX; Greek letters are in mathematics. Other letters that are not Latin ask for LuaLaTeX or XeLaTeX."""
    return "".join(map(_in_latex, on_line(text)))


def _in_latex(character: str) -> str:
    known = re.fullmatch(r"GREEK (SMALL|CAPITAL) LETTER (\w+)", unicodedata.name(character, ""))
    letter = known[2].lower().replace("lamda", "lambda") if known else ""
    letter = letter.capitalize() if known and known[1] == "CAPITAL" else letter
    return rf"$\{letter}$" if letter in _GREEK else _LATEX.get(character, character)


def in_csv(text: str) -> str:
    """For a cell of a CSV file, which the module csv then quotes.

    A spreadsheet computes what begins with `=`, `+`, `-` or `@`, and many readers leave a line out that begins with
    `#`: an apostrophe before them makes them text.
    """
    line = on_line(text)
    return f"'{line}" if line.lstrip()[:1] in set("=+-@#＝＋－＠") else line
