"""A run whose files were damaged is made to its end as if nothing had happened, or refused in one sentence.

The run of these tests was interrupted in its fifth step of six, and has the checkpoints of steps 2 and 4. Its update
and its sampler are simple functions, so that little is compiled.
"""

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import letters
import pytest
from malformed import ASKED
from simple_run import assert_same_run, lines, simple_training

from grpo_jax import cli, training
from grpo_jax.errors import UserError
from grpo_jax.experiment import load
from grpo_jax.runs import checkpoints
from grpo_jax.runs.log import RunLog, display_of
from grpo_jax.runs.rows import kept_log

OVERRIDES = ["steps=6", "evaluation.every=2", "evaluation.num_prompts=2", "evaluation.num_samples=1"]


@pytest.fixture(scope="module", autouse=True)
def _simple():
    with simple_training():
        yield


def train(source: Path, run_dir: Path, *callbacks: Any) -> None:
    config = load(source, OVERRIDES)
    display = display_of(config, quiet=True)
    training.run(
        config, RunLog(run_dir, config, source=source, overrides=OVERRIDES, display=display, callbacks=callbacks)
    )


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return Path(shutil.copy(letters.__file__, tmp_path_factory.mktemp("experiment") / "toy.py"))


@pytest.fixture(scope="module")
def whole(source, tmp_path_factory) -> Path:
    """The run that nothing has interrupted."""
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    train(source, run_dir)
    return run_dir


@pytest.fixture(scope="module")
def interrupted(source, tmp_path_factory) -> Path:
    def stop(event: Any) -> None:
        if event.step == 4:
            raise KeyboardInterrupt

    run_dir = tmp_path_factory.mktemp("interrupted") / "run"
    with pytest.raises(KeyboardInterrupt):
        train(source, run_dir, SimpleNamespace(on_step=stop))
    assert checkpoints.kept_steps(run_dir / "checkpoints") == [2, 4]
    assert [json.loads(line)["step"] for line in lines(run_dir, "metrics.jsonl")] == [0, 0, 1, 2, 2, 3, 4, 4]
    return run_dir


def content(directory: Path) -> dict[str, bytes | None]:
    """All files and folders but the lock, which says who looked at the run last."""
    paths = [path for path in directory.rglob("*") if path.name != ".lock"]
    return {str(path.relative_to(directory)): path.read_bytes() if path.is_file() else None for path in paths}


# Kinds of damage -----------------------------------------------------------------------------------------------------

Damage = Callable[[Path], None]


def removed(name: str) -> Damage:
    def damage(run: Path) -> None:
        path = run / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()

    return damage


def replaced(name: str, data: bytes) -> Damage:
    return lambda run: none((run / name).write_bytes(data))


def cut(name: str, share: float) -> Damage:
    return lambda run: os.truncate(run / name, int((run / name).stat().st_size * share))


def flipped(name: str, share: float = 0.5) -> Damage:
    return lambda run: flip(run / name, int((run / name).stat().st_size * share) * 8 + 1)


def flip(path: Path, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)


def none(_: object) -> None:
    pass


def edited(name: str, change: Callable[[list[bytes]], list[bytes]]) -> Damage:
    """A change of a file's lines."""
    return lambda run: none((run / name).write_bytes(b"".join(change(lines(run, name)))))


def line(name: str, number: int, change: Callable[[bytes], bytes]) -> Damage:
    """A change of one line, counted from 0."""
    return edited(name, lambda rows: [change(row) if i == number else row for i, row in enumerate(rows)])


def without(name: str, number: int) -> Damage:
    return edited(name, lambda rows: [row for i, row in enumerate(rows) if i != number])


def swapped(name: str, one: int, other: int) -> Damage:
    def change(rows: list[bytes]) -> list[bytes]:
        rows[one], rows[other] = rows[other], rows[one]
        return rows

    return edited(name, change)


def directory(name: str) -> Damage:
    """A directory where a file should be."""

    def damage(run: Path) -> None:
        removed(name)(run)
        (run / name).mkdir()

    return damage


def a_file(name: str) -> Damage:
    """A file where a directory should be."""

    def damage(run: Path) -> None:
        removed(name)(run)
        (run / name).write_bytes(b"x")

    return damage


def loop(name: str) -> Damage:
    """A link to itself where a file or a directory should be."""

    def damage(run: Path) -> None:
        removed(name)(run)
        (run / name).symlink_to(run / name)

    return damage


def field(name: str, key: str, value: Any) -> Damage:
    """Another value of a field of a JSON file."""

    def damage(run: Path) -> None:
        (run / name).write_text(json.dumps(json.loads((run / name).read_text()) | {key: value}))

    return damage


def exchange(one: str, other: str) -> Damage:
    """Two files or folders under each other's names."""

    def damage(run: Path) -> None:
        (run / one).rename(run / "between")
        (run / other).rename(run / one)
        (run / "between").rename(run / other)

    return damage


def unfinished(run: Path) -> None:
    """What processes leave that were killed while they saved, of this version and of earlier ones."""
    for name in (".6.part", ".6.part.orbax-checkpoint-tmp", "6.orbax-checkpoint-tmp-12", ".2.part"):
        shutil.copytree(run / "checkpoints" / "4", run / "checkpoints" / name)


def of_another_run(run: Path) -> None:
    """The config of another run of the same experiment."""
    config = json.loads((run / "config.json").read_text())
    config["optimizer"]["learning_rate"] *= 2
    (run / "config.json").write_text(json.dumps(config, indent=2))


def every_line(name: str, change: Callable[[bytes], bytes]) -> Damage:
    return edited(name, lambda rows: [change(row) for row in rows])


METRICS, COMPLETIONS = "metrics.jsonl", "completions.jsonl"
# Lines of metrics.jsonl: the evaluation before step 0, steps 0 and 1, the evaluation after 2, steps 2 and 3, the
# evaluation after 4, step 4. Each step has 16 lines of completions.
HEALED: dict[str, Damage] = {
    "nothing": none,
    "a row after the checkpoint cut off": lambda run: os.truncate(run / METRICS, (run / METRICS).stat().st_size - 9),
    "a bit in a row after the checkpoint": flipped(METRICS, 0.99),
    "no row after the checkpoint": without(METRICS, 7),
    "a row after the checkpoint doubled": edited(METRICS, lambda rows: [*rows, rows[-1]]),
    "NUL bytes after the checkpoint": edited(METRICS, lambda rows: [*rows, b"\0" * 4096]),
    "rows of another step after the checkpoint": edited(METRICS, lambda rows: [*rows, rows[1]]),
    "no evaluation after the checkpoint's step": without(METRICS, 6),
    "another evaluation after the checkpoint's step": line(METRICS, 6, lambda row: row.replace(b"1.0", b"0.5")),
    "a bit in the evaluation after the checkpoint's step": line(METRICS, 6, lambda row: row[:40] + b"#" + row[41:]),
    "another evaluation before training": line(METRICS, 0, lambda row: row.replace(b"1.0", b"0.5")),
    "completions after the checkpoint cut off": cut(COMPLETIONS, 0.95),
    "no completions after the checkpoint": edited(COMPLETIONS, lambda rows: rows[: 4 * 16]),
    "a bit in the completions after the checkpoint": flipped(COMPLETIONS, 0.99),
    "a status that there is not": field("run.json", "status", "nonsense"),
    "the status of a run that was killed": field("run.json", "status", "running"),
    "the newest checkpoint removed": removed("checkpoints/4"),
    "an earlier checkpoint removed": removed("checkpoints/2"),
    "an earlier checkpoint damaged": removed("checkpoints/2/_METADATA"),
    "all checkpoints removed": removed("checkpoints"),
    "saves that were killed": unfinished,
    "a file of a file manager in a checkpoint": replaced("checkpoints/4/.DS_Store", b"x"),
    "the events damaged": lambda run: flip(next(run.glob("events*")), 99),
    "the events removed": lambda run: next(run.glob("events*")).unlink(),
    "the lock of a process that is dead": replaced(".lock", b'{"pid": 1, "host": "elsewhere"}'),
    "a lock with nothing in it that can be read": replaced(".lock", b"\0\xff{"),
    "no lock": removed(".lock"),
    "a summary that cannot be read": replaced("summary.json", b"{"),
    "a half-written record": replaced(".run.json.part", b'{"status"'),
}  # fmt: skip
REFUSED: dict[str, Damage] = {
    "no metrics": removed(METRICS),
    "empty metrics": replaced(METRICS, b""),
    "metrics cut off in the first row": cut(METRICS, 0.02),
    "metrics cut off in the middle": cut(METRICS, 0.5),
    "metrics cut off after a row": edited(METRICS, lambda rows: rows[:5]),
    "metrics without the last newline that counts": edited(METRICS, lambda rows: [*rows[:5], rows[5][:-1]]),
    "a bit in the metrics' first half": flipped(METRICS, 0.3),
    "another digit in a metric": line(METRICS, 2, lambda row: row.replace(b'"reward": 0.', b'"reward": 1.')),
    "two rows of metrics swapped": swapped(METRICS, 1, 2),
    "a row of metrics doubled": edited(METRICS, lambda rows: [*rows[:3], rows[2], *rows[3:]]),
    "the first row of metrics removed": edited(METRICS, lambda rows: rows[2:]),
    "a row of metrics removed from the middle": without(METRICS, 2),
    "the last row of metrics that counts removed": without(METRICS, 5),
    "an evaluation removed": without(METRICS, 3),
    "an evaluation doubled": edited(METRICS, lambda rows: [*rows[:4], rows[3], *rows[4:]]),
    "another result of an evaluation": line(METRICS, 3, lambda row: row.replace(b"0", b"1", 1).replace(b"2", b"2")),
    "NUL bytes in a row of metrics": line(METRICS, 4, lambda row: b"\0" * (len(row) - 1) + b"\n"),
    "a step that is a text": line(METRICS, 4, lambda row: row.replace(b'"step": 2', b'"step": "2"')),
    "a row that is a list": line(METRICS, 4, lambda row: b"[2]\n"),
    "a metric that is NaN": line(METRICS, 4, lambda row: row.replace(b'"step": 2', b'"step": 2, "x": NaN')),
    "a metric that is a text": line(METRICS, 4, lambda row: row.replace(b'"step": 2', b'"step": 2, "x": "y"')),
    "one more metric": line(METRICS, 4, lambda row: row.replace(b'"step": 2', b'"step": 2, "x": 1')),
    "metrics with other line ends": every_line(METRICS, lambda row: row[:-1] + b"\r\n"),
    "a directory for the metrics": directory(METRICS),
    "a link to itself for the metrics": loop(METRICS),
    "no completions": removed(COMPLETIONS),
    "empty completions": replaced(COMPLETIONS, b""),
    "completions cut off": cut(COMPLETIONS, 0.5),
    "a bit in the completions": flipped(COMPLETIONS),
    "two completions of a step swapped": swapped(COMPLETIONS, 0, 1),
    "two steps of completions swapped": swapped(COMPLETIONS, 0, 40),
    "a completion doubled": edited(COMPLETIONS, lambda rows: [*rows[:5], rows[4], *rows[5:]]),
    "the first completion removed": without(COMPLETIONS, 0),
    "a completion removed from the middle": without(COMPLETIONS, 30),
    "the last completion that counts removed": without(COMPLETIONS, 63),
    "NUL bytes in the completions": line(COMPLETIONS, 30, lambda row: b"\0" * 9 + row[9:]),
    "a directory for the completions": directory(COMPLETIONS),
    "a link to itself for the completions": loop(COMPLETIONS),
    "no config": removed("config.json"),
    "an empty config": replaced("config.json", b""),
    "a config cut off": cut("config.json", 0.5),
    "a bit in the config": flipped("config.json"),
    "the config of another run": of_another_run,
    "a directory for the config": directory("config.json"),
    "no record": removed("run.json"),
    "an empty record": replaced("run.json", b""),
    "a record cut off": cut("run.json", 0.9),
    "a bit in the record": flipped("run.json"),
    "another command in the record": field("run.json", "command", "grpo-jax train other.py"),
    "another seed in the record": field("run.json", "seed", 7),
    "a directory for the record": directory("run.json"),
    "no copy of the experiment": removed("code/toy.py"),
    "an edited copy of the experiment": edited("code/toy.py", lambda rows: [*rows, b"# edited\n"]),
    "an empty copy of the experiment": replaced("code/toy.py", b""),
    "no copies": removed("code"),
    "the newest checkpoint empty": directory("checkpoints/4"),
    "a file for the newest checkpoint": a_file("checkpoints/4"),
    "a link to itself for the newest checkpoint": loop("checkpoints/4"),
    "a file for the checkpoints": a_file("checkpoints"),
    "a link to itself for the checkpoints": loop("checkpoints"),
    "checkpoints under each other's names": exchange("checkpoints/2", "checkpoints/4"),
    "the checksums removed": removed("checkpoints/4/SHA256SUMS"),
    "the checksums empty": replaced("checkpoints/4/SHA256SUMS", b""),
    "a checksum removed": without("checkpoints/4/SHA256SUMS", 0),
    "a bit in the checksums": flipped("checkpoints/4/SHA256SUMS"),
    "a directory for the checksums": directory("checkpoints/4/SHA256SUMS"),
    "another file in a checkpoint": replaced("checkpoints/4/more.bin", b"x"),
    "a directory for the lock": directory(".lock"),
}  # fmt: skip


def resume(source: Path, run: Path, capfd: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """The exit status of the command, and what it said on stderr."""
    capfd.readouterr()
    status = cli.main(["train", str(source), "--run-dir", str(run), "--resume", "--quiet"])
    return status, capfd.readouterr().err


@pytest.mark.parametrize("name", HEALED)
def test_a_run_with_damage_that_can_be_healed_ends_as_if_nothing_had_happened(
    source, whole, interrupted, tmp_path, capfd, name
):
    run = Path(shutil.copytree(interrupted, tmp_path / "run"))
    HEALED[name](run)
    assert name == "nothing" or content(run) != content(interrupted) or "lock" in name
    assert resume(source, run, capfd) == (0, "")
    assert_same_run(run, whole)
    assert json.loads((run / "run.json").read_text())["status"] == "finished"
    assert checkpoints.kept_steps(run / "checkpoints") == [4, 6]
    assert not [path for path in (run / "checkpoints").iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("name", REFUSED)
def test_a_run_with_other_damage_is_refused_in_one_sentence_and_left_as_it_is(
    source, interrupted, tmp_path, capfd, name
):
    run = Path(shutil.copytree(interrupted, tmp_path / "run"))
    REFUSED[name](run)
    before = content(run)
    assert before != content(interrupted) or "lock" in name
    status, said = resume(source, run, capfd)
    assert status in (1, 2), said
    assert said.startswith("error: ") and said.count("\n") == 1 and said.endswith(".\n"), said
    assert "Traceback" not in said and "Error:" not in said
    assert content(run) == before


def test_what_is_wrong_with_a_row_is_said_with_its_line_and_the_step_to_go_back_to(interrupted, tmp_path):
    run = Path(shutil.copytree(interrupted, tmp_path / "run"))
    line(METRICS, 4, lambda row: row.replace(b"0.", b"1.", 1))(run)
    with pytest.raises(UserError) as error:
        kept_log(run)
    assert str(error.value) == (
        f"{run / METRICS}:5 is not what the run wrote of step 2, though the run has a checkpoint of step 4: put the "
        f"file back as it was, or remove {run / 'checkpoints' / '4'} to go back to step 2."
    )
    without(COMPLETIONS, 20)(run)
    with pytest.raises(UserError, match=r"checkpoint of step 4: put the file back as it was, or begin a new run "):
        kept_log(run)


def test_damage_of_any_file_of_a_checkpoint_is_found(interrupted, tmp_path):
    run = Path(shutil.copytree(interrupted, tmp_path / "run"))
    newest, earlier = run / "checkpoints" / "4", run / "checkpoints" / "2"
    files = [path for path in newest.rglob("*") if path.is_file()]
    assert len(files) > 6
    for path in files:
        good, other = path.read_bytes(), earlier / path.relative_to(newest)
        damaged = [b"", good[:-2], good[: len(good) // 2], good + b"\0", good[:9] + b"\0" * len(good[9:]), None]
        damaged += [other.read_bytes()] if other.is_file() else []
        for data in damaged:
            if data == good:
                continue
            path.unlink() if data is None else path.write_bytes(data)
            with pytest.raises(
                UserError, match=r"checkpoint of step 4 in .* is damaged: its file .* to go back to step 2"
            ):
                kept_log(run)
            path.write_bytes(good)
    assert kept_log(run).step == 4


def test_any_bit_of_a_checkpoint_that_has_flipped_is_found(interrupted, tmp_path):
    run, chosen = Path(shutil.copytree(interrupted, tmp_path / "run")), random.Random(0)
    files = [path for path in (run / "checkpoints" / "4").rglob("*") if path.is_file() and path.stat().st_size]
    for _ in range(ASKED or 12):
        path = chosen.choices(files, [path.stat().st_size for path in files])[0]
        bit = chosen.randrange(path.stat().st_size * 8)
        flip(path, bit)
        with pytest.raises(UserError, match="is damaged"):
            kept_log(run)
        flip(path, bit)
    assert kept_log(run).step == 4
