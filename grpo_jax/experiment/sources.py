"""The files that an experiment is made of: the user's modules that it runs or imports, and the data that they read.

A result depends on them as on the config, so a run keeps a copy of each, and the hash that names a run counts them.
The user's files are all Python files but those of libraries: the standard library, site-packages and this package.
Their content is kept as it was when they were loaded, since a file may be edited while a run goes on.

A module uses what it imports (also inside of functions), the files that `run_file` runs for it, and the data files that
are opened while it is loaded. Data that are opened later, or by a library that does not open them through Python, are
not seen.
"""

import ast
import hashlib
import os
import shutil
import sys
import sysconfig
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from importlib.machinery import PathFinder
from importlib.util import resolve_name
from pathlib import Path
from types import FrameType
from typing import Any

LARGEST_COPY = 64 * 2**20  # bytes: a larger data file counts by its content, but a run holds no copy of it
PACKAGE = Path(__file__).resolve().parents[1]
# What no number of a run comes from.
WITHOUT_NUMBERS = (
    *("cli/", "report/", "statistics/", "reward_lab/", "research/", "doctor/", "errors.py", "text.py"),
    *("__init__.py", "api.py", "experiment/ablation.py", "experiment/sources.py", "experiment/fingerprint.py"),
    *("experiment/files.py", "experiment/recorded.py"),
    *("runs/log.py", "runs/record.py", "runs/display.py", "runs/files.py", "runs/run.py", "runs/tensorboard.py"),
    *("runs/trackers.py", "runs/retention.py", "runs/rows.py", "runs/sums.py"),
    *("runs/difference.py", "runs/code_difference.py", "replay.py"),
    *("sweep/processes.py", "sweep/progress.py", "sweep/worker.py"),
)
LIBRARIES = tuple(
    {os.path.realpath(sysconfig.get_path(name)) + os.sep for name in ("stdlib", "platstdlib", "purelib", "platlib")}
    | {str(PACKAGE) + os.sep}
)


@dataclass
class _File:
    """A file as it was loaded: its digest, its source (None for data), and the files that it uses.

    `home` is the folder from which it was imported, such as `lib` for `lib/package/module.py`. `declares` names the
    variables of an experiment's file that are configs, which count by their values and not by how they are written.
    """

    digest: str
    source: bytes | None
    home: Path
    uses: set[Path] = field(default_factory=set)
    declares: frozenset[str] = frozenset()


_files: dict[Path, _File] = {}
_digests: dict[Path, str] = {}  # of `code_digest`, until another file is loaded
_opened: dict[Path, set[Path]] = {}  # what files that are being loaded have opened or run
_loading: list[Path] = []


def is_users(path: str | os.PathLike[str]) -> bool:
    """Whether this is a Python file of the user, and not one of a library."""
    return _is_users(os.fspath(path))


@cache
def _is_users(path: str) -> bool:
    real = os.path.realpath(path)
    return path.endswith(".py") and os.path.isfile(real) and not _is_librarys(real)


def _is_librarys(path: str) -> bool:
    return path.startswith(LIBRARIES) or "site-packages" in path or "dist-packages" in path


@contextmanager
def loading(path: Path) -> Iterator[None]:
    """While a file is executed: notes which data files its modules open, and which files they run."""
    path = path.resolve()
    if (user := _users_frame(sys._getframe())) is not None:
        _opened.setdefault(user, set()).add(path)
    _opened[path] = set()
    _watch_open()
    _loading.append(path)
    try:
        yield
    finally:
        _loading.pop()


@cache
def _watch_open() -> None:
    sys.addaudithook(_note_open)  # a hook cannot be removed again, so there is one, which mostly does nothing


def _note_open(event: str, arguments: tuple[Any, ...]) -> None:
    if event != "open" or not _loading or not isinstance(arguments[0], (str, os.PathLike)):
        return
    path, (mode, flags) = os.path.realpath(arguments[0]), arguments[1:]
    is_written = set(mode or "r") & set("wax+") or (flags or 0) & (os.O_WRONLY | os.O_RDWR)
    hidden = any(part.startswith(".") for part in path.split(os.sep))
    if is_written or hidden or path.endswith((".py", ".pyc")) or _is_librarys(path) or not os.path.isfile(path):
        return
    reader = _users_frame(sys._getframe(1)) or _loading[-1]
    _opened.setdefault(reader, set()).add(Path(path))


def _users_frame(frame: FrameType | None) -> Path | None:
    """The innermost file of the user that is being executed."""
    while frame is not None:
        if is_users(frame.f_code.co_filename):
            return Path(frame.f_code.co_filename).resolve()
        frame = frame.f_back
    return None


def calling_folder() -> Path | None:
    """The folder of the innermost file of the user that is being executed; None if there is none."""
    path = _users_frame(sys._getframe(1))
    return None if path is None else path.parent


def is_loading() -> bool:
    """Whether a file is being executed now."""
    return bool(_loading)


def is_loading_me() -> bool:
    """Whether the caller was called by a file that is being loaded, and not by another thread meanwhile."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and _loading:
        if os.path.realpath(frame.f_code.co_filename) in map(str, _loading):
            return True
        frame = frame.f_back
    return False


def record(path: Path, *, declares: Collection[str] = ()) -> None:
    """Keeps a Python file that was executed, as it is now, with all that it uses; `declares` names its configs."""
    _record(path.resolve(), "", frozenset(declares), set())
    _digests.clear()


def _record(path: Path, name: str, declares: frozenset[str], seen: set[Path]) -> None:
    """The same for a file that was imported by a name, unless it was seen already."""
    if path in seen:
        return
    seen.add(path)
    source, earlier = path.read_bytes(), _files.get(path)
    read = _opened.pop(path, set())
    for data in (data for data in read if data.suffix != ".py"):
        _files[data] = _File(_digest_of(data), None, data.parent)
    if earlier is not None and earlier.source == source:  # imported before, so not executed again
        read, declares = read | earlier.uses, declares | earlier.declares
    parts = name.split(".") if name else []
    home = path.parents[max(len(parts) - (path.name != "__init__.py"), 0)]
    found = _files[path] = _File(hashlib.sha256(source).hexdigest(), source, home, read, declares)
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for imported, other in _imports(_parse(source) or ast.Module([], []), package):
        found.uses.add(other)
        _record(other, imported, frozenset(), seen)


def are_stale(names: Iterable[str]) -> bool:
    """Whether one of these imported modules is not what an import would find now, or if a file of it was edited."""
    for name in names:
        path = getattr(sys.modules.get(name), "__file__", None)
        found = dict(_modules(name, as_loaded=False)).get(name)
        if path is None or found != Path(path).resolve() or _is_new(found):
            return True
        if any(not data.is_file() or _digest_of(data) != _files[data].digest for data in _data(found)):
            return True
    return False


def _is_new(path: Path) -> bool:
    """Whether a Python file is not kept, or was edited since."""
    return path not in _files or _files[path].source != path.read_bytes()


def _data(path: Path) -> list[Path]:
    return [other for other in _files[path].uses if other in _files and _files[other].source is None]


def _digest_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _parse(source: bytes) -> ast.Module | None:
    """The tree of a Python file; None for one with a syntax error, which only an import that is never made can have."""
    try:
        return ast.parse(source)
    except SyntaxError:
        return None


def _imports(tree: ast.AST, package: str) -> Iterator[tuple[str, Path]]:
    """The user's modules that a file imports, also inside of functions: their names and files."""
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and (package or not node.level):
            base = resolve_name("." * node.level + (node.module or ""), package) if node.level else node.module or ""
            names = [base, *(f"{base}.{alias.name}" for alias in node.names)]
        for name in names:
            yield from _modules(name)


def _modules(name: str, *, as_loaded: bool = True) -> Iterator[tuple[str, Path]]:
    """The user's files of a dotted name, its packages and itself: as they are loaded, or as an import would find them.

    Nothing is imported for that, since a module may be meant to be imported later.
    """
    parts, where = name.split("."), None
    if parts[0] in sys.stdlib_module_names or parts[0] == PACKAGE.name:
        return
    for end in range(1, len(parts) + 1):
        part = ".".join(parts[:end])
        loaded = getattr(sys.modules.get(part), "__spec__", None) if as_loaded else None
        spec = loaded or PathFinder.find_spec(part, where)
        if spec is None or not (spec.origin is None or is_users(spec.origin)):
            return  # there is no such module, or it is a library's
        if spec.origin is not None:
            yield part, Path(spec.origin).resolve()
        where = spec.submodule_search_locations


def files_of(path: Path) -> dict[Path, str]:
    """A file and everything that it uses, directly or not: paths and digests."""
    path = path.resolve()
    if path not in _files:
        record(path)
    found: dict[Path, str] = {}
    waiting = [path]
    while waiting:
        if (one := waiting.pop()) not in found and one in _files:
            found[one] = _files[one].digest
            waiting += _files[one].uses
    return found


def code_digest(path: str | os.PathLike[str]) -> str | None:
    """A name for what a user's Python file and all that it uses say, without comments and docstrings.

    The `config` and `ablation` of an experiment's file do not count. None for a file of a library.
    """
    if not is_users(path):
        return None
    real = Path(path).resolve()
    if real not in _digests:
        parts = sorted(f"{one.name} {_normalized(one)}" for one in files_of(real))
        _digests[real] = hashlib.sha256("\n".join(parts).encode()).hexdigest()
    return _digests[real]


def _normalized(path: Path) -> str:
    """A file's digest, of a Python file without its layout, comments, docstrings and configs."""
    found = _files[path]
    if found.source is None:
        return found.digest
    return _code_of(found.source, found.declares)


def _code_of(source: bytes, without: Collection[str] = ()) -> str:
    """A digest of Python source without its layout, comments and docstrings, and without the variables `without`."""
    if (tree := tree_of(source)) is None:
        return hashlib.sha256(source).hexdigest()
    tree.body = [node for node in tree.body if not _assigned(node) & set(without)]
    return hashlib.sha256(ast.unparse(tree).encode()).hexdigest()


def tree_of(source: bytes) -> ast.Module | None:
    """The tree of Python source without its docstrings; None for source with a syntax error."""
    tree = _parse(source)
    for node in () if tree is None else ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list) and body and _is_text(body[0]):
            node.body = body[1:] or [ast.Pass()]  # type: ignore[attr-defined]
    return tree


def _assigned(node: ast.stmt) -> set[str]:
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return {target.id for target in targets if isinstance(target, ast.Name)}


def _is_text(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def describe(path: Path) -> dict[str, Any]:
    """What run.json says of an experiment's files.

    `entry` is the file that is run, `files` each file's digest, `paths` the folders that imports are found from, and
    `not_copied` the data files that are too large to copy; all paths are relative to the folder that holds them all.
    """
    path, files = path.resolve(), files_of(path)
    root = _root(files)
    homes = [_files[one].home for one in files if _files[one].source is not None]
    return {
        "entry": os.path.relpath(path, root),
        "paths": sorted({os.path.relpath(home, root) for home in homes}),
        "files": {os.path.relpath(one, root): digest for one, digest in sorted(files.items())},
        "not_copied": sorted(os.path.relpath(one, root) for one in files if not _is_copied(one)),
    }


def copy(path: Path, directory: Path) -> None:
    """Copies an experiment's file and all that it uses to a new directory, at the places that `describe` names."""
    files = files_of(path)
    root = _root(files)
    for one in filter(_is_copied, files):
        target = directory / os.path.relpath(one, root)
        target.parent.mkdir(parents=True, exist_ok=True)
        if (source := _files[one].source) is not None:
            target.write_bytes(source)
        else:
            shutil.copyfile(one, target)


def changed(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """The files that differ between two descriptions, as seen from their entries."""

    def seen(described: dict[str, Any]) -> dict[str, str]:
        start = os.path.dirname(described["entry"])
        return {os.path.relpath(name, start or "."): digest for name, digest in described["files"].items()}

    one, other = seen(before), seen(now)
    return sorted(name for name in one.keys() | other.keys() if one.get(name) != other.get(name))


def _root(files: Iterable[Path]) -> Path:
    return Path(os.path.commonpath([one.parent for one in files]))


def _is_copied(path: Path) -> bool:
    return _files[path].source is not None or path.stat().st_size <= LARGEST_COPY


@cache
def package_digest() -> str:
    """A name for the code of this package that a run's numbers come from, without comments and docstrings.

    Two runs with the same digest were trained and evaluated by the same code. The command, reports and statistics may
    differ.
    """
    digest = hashlib.sha256()
    for path in sorted(PACKAGE.rglob("*.py")):
        name = path.relative_to(PACKAGE).as_posix()
        if not name.startswith(WITHOUT_NUMBERS):
            digest.update(f"{name} {_code_of(path.read_bytes())}\n".encode())
    return digest.hexdigest()[:12]
