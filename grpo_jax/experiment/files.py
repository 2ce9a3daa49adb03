"""Experiments and ablations from Python files and run directories, and as JSON."""

import dataclasses
import importlib.util
import os
import re
import sys
import traceback
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any, cast

import grpo_jax.experiment
from grpo_jax.errors import UserError, failure_of, one_line, warn
from grpo_jax.experiment import records, sources
from grpo_jax.experiment.ablation import Ablation, Budget
from grpo_jax.experiment.experiment import Experiment
from grpo_jax.experiment.overrides import nearest, override, parse_overrides, variant_of
from grpo_jax.experiment.recorded import current_config, with_recorded_fields


def load(path: str | Path, assignments: Iterable[str] = (), *, home: Path | None = None) -> Experiment:
    """Runs a Python file (see `run_file`) and returns its `config`, overridden by `field=value` assignments.

    Of a file that exports an `ablation`, one arm is meant: `arm=NAME` among the assignments (and `budget=…`, where
    another one than the file's is wanted).
    Raises `UserError` if the file is missing, fails, or exports no `Experiment` named `config`.
    """
    return _experiment_of(run_file(path, home), path, assignments)


# The tasks of the experiments that were loaded last, and the files that they came from.
_loaded: deque[tuple[Any, Path]] = deque(maxlen=64)


def source_of(experiment: Experiment) -> Path | None:
    """The file that an experiment of a program came from: the one that it was loaded from, or the script that runs.

    An experiment that was loaded and then overridden still has its file's task, by which it is known. None in a
    notebook, at a prompt, and where the program that runs belongs to a library.
    """
    for task, path in reversed(_loaded):
        if task is experiment.task and path.is_file():
            return path
    main = sys.modules.get("__main__")
    script = getattr(main, "__file__", None)
    if script is None or not sources.is_users(script):
        return None
    configs = [name for name, value in vars(main).items() if isinstance(value, (Experiment, Ablation))]
    sources.record(Path(script), declares=configs)
    return Path(script)


class NotWhileLoading(BaseException):
    """What `train` raises while a file is loaded for its experiment: the file is a script, and is not to train again.

    Not an `Exception`, so that no `except Exception` of the script goes on after it.
    """

    def __init__(self, experiment: Experiment) -> None:
        super().__init__("a file that is loaded for its experiment does not train")
        self.experiment = experiment


def _experiment_of(module: Any, path: str | Path, assignments: Iterable[str]) -> Experiment:
    """The `config` of a module, or an arm of its `ablation`, overridden by assignments."""
    assignments = list(assignments)
    config, ablation = getattr(module, "config", None), getattr(module, "ablation", None)
    if isinstance(ablation, Ablation):
        given = dict(a.split("=", 1) for a in assignments if a.startswith(("arm=", "budget=")))
        if given.get("arm") not in ablation.arms:
            raise UserError(f"{path} holds an ablation; choose one of its arms: --set arm={'|'.join(ablation.arms)}.")
        if "budget" in given:
            ablation = dataclasses.replace(ablation, budget=cast(Budget, given["budget"]))  # `Ablation` checks it
        config = ablation.experiment(given["arm"], ablation.base.seed)
        assignments = [a for a in assignments if not a.startswith(("arm=", "budget="))]
    if not isinstance(config, Experiment):
        raise UserError(f"{path} exports no experiment: it must define `config = grpo_jax.experiment.Experiment(...)`.")
    _warn(config.task)
    _loaded.append((config.task, Path(path)))
    return override(config, parse_overrides(config, assignments))


def _warn(task: Any) -> None:
    """Says on stderr what is probably a mistake in a task."""
    for sentence in task.warnings() if hasattr(task, "warnings") else ():
        warn(sentence)


def load_ablation(
    path: str | Path, budget: Budget | None = None, assignments: Iterable[str] = (), *, home: Path | None = None
) -> Ablation:
    """Runs a Python file (see `run_file`) and returns its `ablation`, with another budget where one is given.

    `assignments` (`field=value`) override its base; an arm that sets the same field keeps its own value.
    Raises `UserError` if the file is missing, fails, or exports no `Ablation` named `ablation`.
    """
    ablation = getattr(run_file(path, home), "ablation", None)
    if not isinstance(ablation, Ablation):
        raise UserError(
            f"{path} exports no ablation: it must define `ablation = grpo_jax.experiment.Ablation(base=…, arms=…)`."
        )
    _warn(ablation.base.task)
    _loaded.append((ablation.base.task, Path(path)))
    overrides = parse_overrides(ablation.base, assignments)
    base = override(ablation.base, overrides) if overrides else ablation.base
    return dataclasses.replace(ablation, base=base, budget=budget or ablation.budget)


def load_run(run_dir: str | Path, assignments: Iterable[str] = (), *, step: int | None = None) -> Experiment:
    """The experiment of a run, with the overrides that the run had and then those of `assignments`.

    It is loaded from the run's own copies of the user's files. Of a run that a program made (see `grpo_jax.train`), the
    copies give the task and the functions, and the recorded config all else. The warm start and the control of a run
    are runs too, whose experiment is a variant of their parent's.
    A run that was resumed may have changed: with `step`, it is the experiment with which that step was made.
    Raises `UserError` if the directory holds no run, or one whose task and functions are in no file.
    """
    run_dir = Path(run_dir)
    info = info_at(read_run(run_dir), step)
    name = run_dir.resolve().name
    if name in ("warm_start", "control") and info.get("source") is None:
        parent = load_run(run_dir.resolve().parent)
        config = variant_of(parent, getattr(parent, name) or {})
        return override(config, parse_overrides(config, assignments))
    overrides = [*all_overrides(info), *assignments]
    code = code_of(info)
    if code is None and info.get("by_program"):
        raise UserError(
            f"{str(run_dir)!r} was made in a notebook or at a prompt, so there is no file to load its task and rewards "
            f"from: in Python, pass them as grpo_jax.evaluate({str(run_dir)!r}, experiment)."
        )
    if code is not None:
        directory = run_dir / code["directory"]
        paths = [directory / path for path in code["paths"]]
        if info.get("by_program"):
            # The original's place, since data that a script opened before it trained are not among the copies.
            home = Path(info["source"]) if info.get("source") else None
            return load_by_config(directory / code["entry"], run_dir, assignments, home=home, paths=paths, step=step)
        module = run_file(directory / code["entry"], paths=paths)
        return _experiment_of(module, directory / code["entry"], overrides)
    home = Path(info["source"]) if info.get("source") else None  # a run of the first versions
    return load(run_dir / "experiment.py", overrides, home=home)


def load_by_config(
    path: Path,
    run_dir: Path,
    assignments: Iterable[str] = (),
    *,
    home: Path | None = None,
    paths: Iterable[Path] = (),
    step: int | None = None,
) -> Experiment:
    """The experiment of a run that a program made, from a file that declares its task and its functions.

    These may belong to any experiment or ablation that the file has at its top level, or to the first that it trains.
    All other fields are those that the run has, or had when it made `step`.
    Raises `UserError` if no experiment of the file is about the same task with the same functions.
    """
    info = info_at(read_run(run_dir), step)
    recorded = current_config(read_config(run_dir), info)
    module = run_file(path, home, paths)
    declared = [*getattr(module, _TRAINED, ()), *vars(module).values()]
    ablations = [value for value in declared if isinstance(value, Ablation)]
    candidates = [value for value in declared if isinstance(value, Experiment)]
    candidates += [ablation.experiment(arm, recorded["seed"]) for ablation in ablations for arm in ablation.arms]
    for candidate in candidates:
        found = with_recorded_fields(candidate, recorded, lambda text: text.replace(f"{module.__name__}.", "__main__."))
        if found is not None:
            _loaded.append((found.task, path))
            return override(found, parse_overrides(found, assignments))
    raise UserError(
        f"{path} defines no experiment with the task and the functions of the run {str(run_dir)!r} at its top level: "
        f"define it there, or in Python, pass it as grpo_jax.evaluate({str(run_dir)!r}, experiment)."
    )


def read_run(run_dir: Path) -> dict[str, Any]:
    """The content of a run's run.json. Raises `UserError` if the directory holds no run."""
    try:
        return records.read(run_dir / "run.json")
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{str(run_dir)!r} is not the directory of a run: there is no run.json in it.") from None


def read_config(run_dir: Path) -> dict[str, Any]:
    """The content of a run's config.json, as the run began. Raises `UserError` if there is none."""
    try:
        return records.read(run_dir / "config.json")
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{str(run_dir)!r} is not the directory of a run: there is no config.json in it.") from None


def info_at(info: Mapping[str, Any], step: int | None) -> dict[str, Any]:
    """What run.json said when the run made a step: without what it was resumed with after that; None for today."""
    visits = [v for v in info.get("resumed", ()) if step is None or v.get("step", 0) <= step]
    return {**info, "resumed": visits}


def code_folder(run_dir: Path) -> Path:
    """Where a run's copy of its experiment's file is."""
    code = code_of(read_run(run_dir))
    return run_dir if code is None else (run_dir / code["directory"] / code["entry"]).parent


def all_overrides(info: Mapping[str, Any]) -> list[str]:
    """The assignments that a run began with, and then those that it was resumed with."""
    return [*info.get("overrides", ()), *(a for visit in info.get("resumed", ()) for a in visit.get("overrides", ()))]


def code_of(info: Mapping[str, Any]) -> dict[str, Any] | None:
    """The files that a run uses now (see `sources.describe`); None for a run that keeps no copies of them."""
    return next((v["code"] for v in reversed(info.get("resumed", ())) if v.get("code")), info.get("code"))


_is_forbidden: ContextVar[bool] = ContextVar("is_forbidden", default=False)


@contextmanager
def without_code() -> Iterator[None]:
    """Refuses to execute any Python file of the user, such as the copies that a run of somebody else holds."""
    token = _is_forbidden.set(True)
    try:
        yield
    finally:
        _is_forbidden.reset(token)


def is_code_allowed() -> bool:
    """Whether a Python file of the user may be executed."""
    return not _is_forbidden.get()


def require_code_allowed(what: str) -> None:
    """Raises `UserError` where `what`, a file or a module of the user, may not be executed."""
    if not is_code_allowed():
        raise UserError(f"this needs the code of {what!r}, its task and its functions, and --no-code lets none run.")


def run_file(path: str | Path, home: Path | None = None, paths: Iterable[Path] = ()) -> Any:
    """Executes a Python file as a module and returns it; its own mistakes become one-sentence `UserError`s.

    The file finds what it imports from beside it and from the folders `paths`. All files that it uses are kept as they
    are now (see `grpo_jax.experiment.sources`).
    Of a copy, such as the directory of an old run holds, `home` is the path of the original: the copy's `__file__`, and
    where it finds what it imports from beside it or loads by a path from there, if that is still there.
    """
    path = Path(path)
    if path.is_dir():
        raise UserError(f"{str(path)!r} is a directory, where the Python file of an experiment is needed.")
    if not path.is_file():
        raise UserError(f"there is no experiment file {str(path)!r}.")
    require_code_allowed(str(path))
    spec = importlib.util.spec_from_file_location(f"grpo_jax_experiment_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise UserError(f"{path} is not a Python file: an experiment file ends in .py.")
    module = importlib.util.module_from_spec(spec)
    if home is not None:
        module.__file__ = str(home)
    beside = [str(p.parent.resolve()) for p in (path, home) if p is not None] + [str(p.resolve()) for p in paths]
    with _importing_from(beside), sources.loading(path):
        sys.modules[spec.name] = module
        try:
            spec.loader.exec_module(module)
        except NotWhileLoading as script:
            setattr(module, _TRAINED, [script.experiment])
        except UserError as error:
            raise UserError(f"{_where(path, error)}: {one_line(error)}") from None
        except TypeError as error:
            raise UserError(f"{_where(path, error)}: {_explain(error)}") from error
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # `sys.exit(0)` in the file is a failure too: it leaves no experiment
            raise UserError(f"{_where(path, error)}: {failure_of(error)}") from error
        declared = {name: getattr(module, name, None) for name in ("config", "ablation")}
        configs = [name for name, value in declared.items() if isinstance(value, (Experiment, Ablation))]
        sources.record(path, declares=configs)
    return module


_TRAINED = "__grpo_jax_trained__"  # the attribute of a module that notes which experiment it would have trained

_imported: set[str] = set()  # the user's modules that experiments have imported
_appended: list[str] = []  # the folders that stay on sys.path for them


@contextmanager
def _importing_from(folders: Sequence[str]) -> Iterator[None]:
    """Lets a file import what lies in some folders, as it is now.

    A module that an earlier file has imported is imported anew if it was edited, or if it came from elsewhere: a run's
    copies differ from one run to the next. The folders stay at the end of `sys.path`, where a function that imports
    something when it is called finds them, and where they hide no library.
    """
    outermost = not sources.is_loading()
    if outermost:
        sys.path[:] = [folder for folder in sys.path if folder not in _appended]
        _appended.clear()
    sys.path[:0] = folders
    if outermost and sources.are_stale(_imported):
        for name in _imported:
            sys.modules.pop(name, None)
        _imported.clear()
    before = set(sys.modules)
    try:
        yield
    finally:
        _imported.update(name for name in set(sys.modules) - before if _is_users_module(name))
        del sys.path[: len(folders)]
        new = [folder for folder in dict.fromkeys(folders) if folder not in sys.path]
        sys.path += new
        _appended.extend(new)


def _is_users_module(name: str) -> bool:
    file = getattr(sys.modules[name], "__file__", None)
    return file is not None and sources.is_users(file) and not name.startswith("grpo_jax_experiment_")


def _where(path: Path, error: BaseException) -> str:
    """The last line of `path` itself in the error's traceback, as `file:line`."""
    places = (str(path), os.path.abspath(path))
    lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename in places]
    if isinstance(error, SyntaxError) and error.lineno:
        lines = [error.lineno]
    return f"{path}:{lines[-1]}" if lines else str(path)


def _explain(error: TypeError) -> str:
    """An unknown keyword of one of this package's dataclasses, with the nearest name that exists."""
    unknown = re.match(r"(\w+)\.__init__\(\) got an unexpected keyword argument '(\w+)'", str(error))
    known = getattr(grpo_jax.experiment, unknown[1], None) if unknown else None
    if unknown is None or not dataclasses.is_dataclass(known):
        return failure_of(error)
    names = [f.name for f in dataclasses.fields(known)]
    return f"{unknown[1]} has no field {unknown[2]!r}{nearest(unknown[2], names)}"
