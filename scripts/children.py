"""What `soak.py` and `kill.py` share: a command that is started again and again, and the comparison of what it wrote.

Linux only: it reads /proc.
"""

import glob
import json
import os
import subprocess
import sys
import tempfile
import uuid
import warnings
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from grpo_jax.runs.difference import TIMES

ROOT = Path(__file__).resolve().parents[1]
EXPERIMENT = ROOT / "experiments" / "robustness" / "soak.py"
MARK = "GRPO_JAX_SOAK"  # in the environment of every process that is started here, and of those that it starts
PATIENCE = 600  # seconds without a new step after which a command counts as stuck


@dataclass
class Command:
    """A command line of grpo-jax that is started again and again, and what its processes said and left behind.

    Attributes:
      directory: of the run, or of the runs of a sweep.
      mark: what the environment of its processes holds, and of all that they start.
    """

    arguments: list[str]
    directory: Path
    mark: str = field(default_factory=lambda: uuid.uuid4().hex)

    def start(self) -> subprocess.Popen[bytes]:
        """A new process in a session of its own."""
        program = "import sys; from grpo_jax.cli import main; sys.exit(main())"
        with (self.directory.with_suffix(".stderr")).open("ab") as errors:
            return subprocess.Popen(
                [sys.executable, "-c", program, *self.arguments],
                stdout=subprocess.DEVNULL,
                stderr=errors,
                env=os.environ | {MARK: self.mark, "PYTHONPATH": str(ROOT)},
                start_new_session=True,
            )

    def stderr(self) -> str:
        """What all of its processes have said."""
        return self.directory.with_suffix(".stderr").read_text(errors="replace")

    def processes(self) -> list[int]:
        """Every living process that has come from this command."""
        return [pid for pid in _pids() if f"{MARK}={self.mark}".encode() in read(f"/proc/{pid}/environ")]

    def steps_made(self) -> int:
        """How many steps are logged; of a sweep, those of all its runs together."""
        return sum(map(_last_step, self._found("metrics.jsonl")))

    def writes_checkpoint(self) -> bool:
        """Whether a checkpoint is half written now."""
        return bool(self._found("checkpoints/.*.part"))

    def _found(self, pattern: str) -> list[str]:
        """The files of the run and of those in it, at any depth; unlike Path.rglob, where some vanish meanwhile."""
        return glob.glob(f"{glob.escape(str(self.directory))}/**/{pattern}", recursive=True)


def _pids() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


def read(path: str | Path) -> bytes:
    """A file that may vanish."""
    try:
        return Path(path).read_bytes()
    except OSError:
        return b""


def _last_step(log: str) -> int:
    """After how many steps the last complete row of a log was written."""
    try:
        with open(log, "rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 20_000))
            lines = file.read().split(b"\n")[:-1]
        row = json.loads(lines[-1]) if lines else {}
        return row.get("step", 0) + ("step_time" in row)
    except (OSError, ValueError):
        return 0


def difference(run: Path, undisturbed: Path) -> str | None:
    """The first thing in which a run, or a directory of runs, differs from one that nobody disturbed; None if none."""
    logs = sorted(path.relative_to(undisturbed) for path in undisturbed.rglob("metrics.jsonl"))
    if logs != sorted(path.relative_to(run) for path in run.rglob("metrics.jsonl")):
        return "other runs"
    for log in logs:
        one, other = (run / log).parent, (undisturbed / log).parent
        for number, (row, wanted) in enumerate(zip_longest(rows_of(one), rows_of(other)), 1):
            if row != wanted:
                return f"{run / log}:{number}"
        if read(one / "completions.jsonl") != read(other / "completions.jsonl"):
            return f"{one / 'completions.jsonl'}"
        if (other / "summary.json").is_file() and not (one / "summary.json").is_file():
            return f"{one} has no summary.json"
        if not same_arrays(one / "checkpoints", other / "checkpoints"):
            return f"{one / 'checkpoints'}"
        if left := list(one.rglob("*.part")):
            return f"{left[0]} is left over"
    return None


def rows_of(run: Path) -> list[dict[str, Any]]:
    """The rows of a run's metrics.jsonl, without the times."""
    rows = map(json.loads, read(run / "metrics.jsonl").splitlines())
    return [{name: value for name, value in row.items() if name not in TIMES} for row in rows]


def same_arrays(one: Path, other: Path) -> bool:
    """Whether the newest checkpoints hold the same arrays, bit for bit. Orbax reads them as they were saved."""
    import orbax.checkpoint as ocp

    def newest(directory: Path) -> dict[str, np.ndarray]:
        step = max(int(path.name) for path in directory.iterdir() if path.name.isdigit())
        folder = next(path.parent for path in (directory / str(step)).rglob("_METADATA"))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Orbax recommends to say how each array is to be placed
            return ocp.PyTreeCheckpointHandler().restore(folder)

    found, wanted = newest(one), newest(other)
    same = (np.asarray(found[name]).tobytes() == np.asarray(wanted[name]).tobytes() for name in found if name in wanted)
    return found.keys() == wanted.keys() and all(same)


def train(run_dir: Path, *assignments: str) -> Command:
    """The command that trains the tiny policy, or goes on with it."""
    further = ["--set", *assignments] if assignments else []
    return Command(["train", str(EXPERIMENT), "--run-dir", str(run_dir), "--resume", *further], run_dir)


def main(parser: ArgumentParser, carry_out: Callable[[Path, Namespace], tuple[list[str], bool]]) -> NoReturn:
    """Carries a script out in a temporary place, prints its lines, and ends with 0 if all is well.

    Args:
      parser: of the script's own options; `--seed` and `--output` are added.
      carry_out: takes the place and the options, and returns the lines of a page, and whether all is well.
    """
    parser.add_argument("--seed", type=int, default=0, help="of the faults or kills, and of their moments")
    parser.add_argument("--output", type=Path, help="also write the table here")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as place:
        lines, is_well = carry_out(Path(place), options)
    text = "\n".join(lines) + "\n"
    print(text, end="")
    if options.output:
        options.output.write_text(text)
    sys.exit(0 if is_well else 1)
