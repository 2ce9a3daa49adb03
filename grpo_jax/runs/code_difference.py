"""In what the user's files of two runs differ: which files, and which functions in them. None of them is executed."""

import ast
import difflib
import os
from pathlib import Path
from typing import NamedTuple

from grpo_jax.experiment import code_of
from grpo_jax.experiment.sources import tree_of
from grpo_jax.runs.run import Run

NO_CODE = "comments, docstrings or layout alone"
NO_PYTHON = "its content"


class FileDifference(NamedTuple):
    """A file of the user that differs.

    Attributes:
      name: its path as seen from the experiment's file.
      where: what differs: the functions, methods and variables; or that only one run has the file.
      diff: the lines of a unified diff; none for a file that is not Python, or that only one run has.
    """

    name: str
    where: list[str]
    diff: list[str]


def code_differences(one: Run, other: Run) -> list[FileDifference]:
    """The user's files in which two runs differ, as each run uses them now; both must keep copies of them.

    The experiments' own files are compared with each other, whatever their names are.
    """
    files, others = _files(one), _files(other)
    found = []
    for name in dict.fromkeys([*files, *others]):
        if name not in files or name not in others:
            found.append(FileDifference(name, ["only A has it" if name in files else "only B has it"], []))
            continue
        (path, digest), (other_path, other_digest) = files[name], others[name]
        if digest != other_digest:
            found.append(_difference(name, path, other_path))
    return found


def changed_names(source: bytes, other: bytes) -> list[str]:
    """The functions, methods and variables at the top level of a Python file whose code is not the same in another."""
    parts, others = _parts(source), _parts(other)
    return [name for name in dict.fromkeys([*parts, *others]) if parts.get(name) != others.get(name)]


def _files(run: Run) -> dict[str, tuple[Path, str]]:
    """A run's files as seen from its experiment's file, which has no name here: the copy and the digest of each."""
    code = code_of(run.info) or {}
    entry = code.get("entry", "")
    start = os.path.dirname(entry) or "."
    return {
        "" if name == entry else os.path.relpath(name, start): (run.run_dir / code["directory"] / name, digest)
        for name, digest in code.get("files", {}).items()
    }


def _difference(name: str, path: Path, other: Path) -> FileDifference:
    name = name or (path.name if path.name == other.name else f"{path.name} / {other.name}")
    if path.suffix != ".py" or not (path.is_file() and other.is_file()):
        return FileDifference(name, [NO_PYTHON], [])
    lines, others = (each.read_text("utf-8", errors="replace").splitlines() for each in (path, other))
    diff = difflib.unified_diff(lines, others, f"A/{path.name}", f"B/{other.name}", lineterm="", n=2)
    return FileDifference(name, changed_names(path.read_bytes(), other.read_bytes()) or [NO_CODE], list(diff))


def _parts(source: bytes) -> dict[str, str]:
    """The parts of a Python file by name, without comments and docstrings; of a class, each of its methods."""
    tree = tree_of(source)
    if tree is None:
        return {"a syntax error": source.decode("utf-8", errors="replace")}
    found: dict[str, str] = {}
    for node in tree.body:
        if isinstance(node, ast.ClassDef):
            methods = [part for part in node.body if isinstance(part, (ast.FunctionDef, ast.AsyncFunctionDef))]
            found |= {f"{node.name}.{method.name}": ast.unparse(method) for method in methods}
            node.body = [part for part in node.body if part not in methods] or [ast.Pass()]
        name = _name(node)
        found[name] = f"{found.get(name, '')}\n{ast.unparse(node)}"
    return found


def _name(node: ast.stmt) -> str:
    """What a statement at the top level defines."""
    match node:
        case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
            return name
        case ast.Import() | ast.ImportFrom():
            return "imports"
        case ast.Assign():
            return ", ".join(map(ast.unparse, node.targets))
        case ast.AnnAssign() | ast.AugAssign():
            return ast.unparse(node.target)
    return "other statements"
