"""An extension of griffe, which reads the docstrings for the reference: one entry for each name.

In the docstrings of this package one entry may describe several names, as in `tokens, mask: both [B, T].` The parser of
Google's style knows entries of one name alone, so each name gets the entry before the docstring is parsed.
"""

import re
from typing import Any

import griffe

SECTION = re.compile(r"^( *)(?:Args|Attributes):$")
ENTRY = re.compile(r"^( *)(\w+(?:, \w+)+): (.*)$")


def split_entries(text: str) -> str:
    """The docstring with one entry for each name."""
    lines, done, i = text.split("\n"), [], 0
    indent = -1  # of the entries of the section under way; -1 outside of one
    while i < len(lines):
        line = lines[i]
        depth = len(line) - len(line.lstrip())
        if section := SECTION.match(line):
            indent = len(section[1]) + 2
        elif line.strip() and depth < indent:
            indent = -1
        entry = ENTRY.match(line) if depth == indent else None
        i += 1
        if entry is None:
            done.append(line)
            continue
        more = []
        while i < len(lines) and len(lines[i]) - len(lines[i].lstrip()) > depth:
            more.append(lines[i])
            i += 1
        for name in entry[2].split(", "):
            done += [f"{entry[1]}{name}: {entry[3]}", *more]
    return "\n".join(done)


class SplitEntries(griffe.Extension):
    """Applies `split_entries` to every docstring."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = split_entries(obj.docstring.value)
