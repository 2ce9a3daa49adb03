"""What a run's directory says of how it was made: its config, files and versions, and what changed on resumption.

The record of a run's beginning is never written again. When a run is resumed, run.json gets one more entry under
`resumed`: when, from which step, by which command, with which assignments, and what has changed in the config
(`changes`: field -> [before, now]) and in the user's files (`code`: all of them, copied again; None if they are the
same).
"""

import hashlib
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from grpo_jax import sharding
from grpo_jax.errors import UserError
from grpo_jax.experiment import Experiment, code_of, read_config, read_run, sources, to_dict
from grpo_jax.experiment.fingerprint import fingerprint_or_none
from grpo_jax.experiment.recorded import changed_fields, current_config, jsonable
from grpo_jax.runs import checkpoints
from grpo_jax.runs.files import read_json, write_json, writing
from grpo_jax.runs.lock import NAME as LOCK

PACKAGES = ("grpo_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "transformers", "numpy")
# What a run that was killed before it had written run.json may have left; a sweep puts a warm start there before.
BEGINNING = {"code", ".code.part", "config.json", ".config.json.part", ".run.json.part", "warm_start"}
CERTIFICATE = "certificate.json"  # what `grpo-jax doctor` has found before the run
OUTPUT = (".log", ".out", ".err", ".txt")  # where a scheduler may write what the run prints
CHANGING = ("status", "finished", "stop", "error", "sha256")  # of run.json, what is no part of the record
FIXED = ("policy", "seed", "method", "warm_start")  # what a run's checkpoints were made from


def require_place(run_dir: Path, *, resume: bool) -> None:
    """Raises `UserError` for a directory that a run cannot be written to.

    That is one with anything in it but a certificate; with `resume`, one that holds neither a run nor the beginning of
    one. Files of printed output are no obstacle then.
    """
    if not run_dir.exists():
        return
    if not run_dir.is_dir():
        raise UserError(f"{str(run_dir)!r} is a file, where a run needs a directory: choose another with --run-dir.")
    found = {path.name for path in run_dir.iterdir()} - {LOCK, CERTIFICATE}
    if found and not resume:
        raise UserError(
            f"the run directory {str(run_dir)!r} is not empty: choose another with --run-dir, or add --resume to go on "
            "with the run that it holds (in Python: resume=True)."
        )
    others = sorted(name for name in found - BEGINNING if Path(name).suffix not in OUTPUT)
    if others and "run.json" not in found:
        raise UserError(
            f"{str(run_dir)!r} holds no run.json but other files, such as {others[0]!r}: to go on with a run, name its "
            "directory; to begin one, a new or an empty directory."
        )


def begin_run(
    run_dir: Path, experiment: Experiment, source: Path | None, overrides: Sequence[str] | None
) -> dict[str, Any]:
    """Copies the experiment's files, writes config.json, and returns what run.json says.

    Together they are all that is needed to run it again.

    Args:
      source: the experiment's file, or the script that made it; None for a notebook.
      overrides: the assignments for the file; None for an experiment that a program made, whatever its file declares.
    """
    code = None if source is None else _keep_files(run_dir, source, "code")  # again, if a run was killed right here
    write_json(run_dir / "config.json", to_dict(experiment))
    return {
        "status": "running",
        "started": now(),
        "finished": None,
        "source": None if source is None else str(source.resolve()),
        "overrides": list(overrides or ()),
        "by_program": overrides is None,
        "command": shlex.join(sys.argv),
        "seed": experiment.seed,
        "key": fingerprint_or_none(experiment),
        "config_key": fingerprint_or_none(experiment, files=False),
        "config_sha256": _sha256((run_dir / "config.json").read_bytes()),
        "git": None if source is None else _git(source.resolve().parent),
        "code": code,
        **conditions(),
    }


def continue_run(
    run_dir: Path, experiment: Experiment, source: Path | None, overrides: Sequence[str] | None
) -> dict[str, Any]:
    """What run.json says of a run that is resumed: its record, with one more visit.

    Raises:
      UserError: if the run was made with another policy, seed, method or warm start.
    """
    info = read_run(run_dir)
    begun_with = read_config(run_dir)
    changes = changed_fields(current_config(begun_with, info), experiment)
    for name, (before, after) in changes.items():
        if name.split(".")[0] in FIXED:
            raise UserError(
                f"{str(run_dir)!r} was begun with {name} = {before}, and cannot go on with {after}: start another run "
                "with another --run-dir."
            )
    visits = list(info.get("resumed", ()))
    earlier, code = code_of(info), None
    if source is not None and earlier is not None and sources.changed(earlier, sources.describe(source)):
        code = _keep_files(run_dir, source, f"code-{len(visits) + 2}")
    visit = {
        "started": now(),
        "step": checkpoints.latest_step(run_dir / "checkpoints") or 0,
        "overrides": list(overrides or ()),
        "command": shlex.join(sys.argv),
        "changes": changes,
        "code": code,
        "package": sources.package_digest(),
    }
    by_program = info.get("by_program", False) or overrides is None
    return {**info, "by_program": by_program, "resumed": [*visits, visit]}


def with_checksum(info: Mapping[str, Any]) -> dict[str, Any]:
    """The content of run.json with the checksum of its record, which is all but the run's status."""
    record = {name: value for name, value in info.items() if name not in CHANGING}
    return {**info, "sha256": _sha256(json.dumps(jsonable(record), sort_keys=True).encode())}


def require_whole(run_dir: Path) -> None:
    """Raises `UserError` if the record of a run, or a copy of its files, is not what was written.

    A run of an earlier version has no checksums, and is not checked.
    """
    info = read_run(run_dir)
    if "sha256" not in info:
        return
    path = run_dir / "run.json"
    if info != with_checksum(info):
        raise UserError(f"{path} is damaged, or was edited: put it back as it was, or begin a new run elsewhere.")
    wanted: dict[str, str] = {"config.json": info["config_sha256"]} if "config_sha256" in info else {}
    for code in (info.get("code"), *(visit.get("code") for visit in info.get("resumed", ()))):
        wanted |= copies(code)
    for path in edited(run_dir, wanted):
        what = "is damaged, or was edited" if path.exists() else "is missing"
        raise UserError(f"{path} {what}: put it back as it was, or begin a new run elsewhere.")


def copies(code: Mapping[str, Any] | None) -> dict[str, str]:
    """The checksums of a run's copies of the user's files, by their paths in the run's directory.

    `code` is an entry of run.json; None for the run of a notebook, which has no copies.
    """
    if code is None:
        return {}
    files, left_out = code.get("files", {}), code.get("not_copied", ())
    return {f"{code['directory']}/{name}": digest for name, digest in files.items() if name not in left_out}


def edited(run_dir: Path, wanted: Mapping[str, str]) -> list[Path]:
    """Of some files of a run, those that are missing or do not have their checksum."""
    paths = {run_dir / name: digest for name, digest in wanted.items()}
    return [path for path, digest in paths.items() if not path.is_file() or _sha256(path.read_bytes()) != digest]


def conditions() -> dict[str, Any]:
    """What a run's numbers come from besides its experiment, as it is here and now: versions, devices, this package."""
    return {
        "versions": versions(),
        "platform": platform.platform(),
        "device": sharding.describe(),
        "processor": processor(),
        "package": {"digest": sources.package_digest(), "git": _git_of_package()},
    }


def versions() -> dict[str, str | None]:
    """The versions of Python and of the packages that numbers come from."""
    return {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}}


def certificate_note(run_dir: Path, experiment: Experiment) -> str | None:
    """What to say of a certificate in a run's directory that is not this experiment's; None if there is none."""
    path = run_dir / CERTIFICATE
    if not path.is_file() or read_json(path).get("key") == fingerprint_or_none(experiment):
        return None
    return f"{path} is about another config or other files than this run's: it says nothing of this run"


def processor() -> dict[str, Any]:
    """What rounding depends on besides versions: the processor, its widest instructions, the cores of this process."""
    try:
        lines = [line.partition(":") for line in Path("/proc/cpuinfo").read_text().splitlines()]
    except OSError:
        lines = []
    said = {name.strip(): text.strip() for name, _, text in reversed(lines)}
    known = ("amx_tile", "avx512_bf16", "avx512f", "avx2", "asimd")
    flags = (said.get("flags") or said.get("Features") or "").split()
    return {
        "name": said.get("model name") or platform.processor() or platform.machine(),
        "instructions": [name for name in known if name in flags],
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
    }


def now() -> str:
    """The time, as run.json states it."""
    return datetime.now().astimezone().isoformat(timespec="seconds")


def _keep_files(run_dir: Path, source: Path, name: str) -> dict[str, Any]:
    """Copies the files of an experiment into the run's directory."""
    part = run_dir / f".{name}.part"
    with writing(run_dir / name):
        shutil.rmtree(part, ignore_errors=True)
        sources.copy(source, part)
        shutil.rmtree(run_dir / name, ignore_errors=True)  # of a process that was killed before it had noted them
        part.rename(run_dir / name)
    return {"directory": name, **sources.describe(source)}


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _git_of_package() -> dict[str, Any] | None:
    """The commit of this package; None where it is installed from an archive, perhaps inside of another repository."""
    return None if "site-packages" in str(sources.PACKAGE) else _git(sources.PACKAGE)


def _git(folder: Path) -> dict[str, Any] | None:
    """The commit of the repository around `folder`, and whether tracked files differ from it; None outside of one."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(folder), *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=10).stdout.strip()

    try:
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain", "-uno"))}
    except (OSError, subprocess.SubprocessError):
        return None
