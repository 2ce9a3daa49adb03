"""The files that an experiment is made of: which they are, what they change, and the copies of them."""

import json
import shutil
import sys
import textwrap

import pytest

from grpo_jax.experiment import load, load_ablation, load_run, sources
from grpo_jax.experiment.fingerprint import fingerprint

EXPERIMENT = """
    from types import SimpleNamespace
    from grpo_jax.experiment import Experiment
    from my_rewards import graded

    task = SimpleNamespace(name="toy", train=[{"prompt": "a"}], held_out=[{"prompt": "b"}])
    config = Experiment(task=task, rewards={"graded": graded}, steps=7)
"""
ABLATION = """
    from toy import config
    from grpo_jax.experiment import Ablation
    ablation = Ablation(base=config, arms={"slow": {}, "fast": {"optimizer.learning_rate": 1.0}}, seeds=range(2))
"""
REWARDS = '''
    """Rewards of ours."""
    from my_lib.scale import scaled
    from pathlib import Path
    WORDS = Path(__file__).with_name("words.txt").read_text().split()

    def graded(*, completions, **columns):
        """A docstring."""
        return [scaled(c in WORDS) for c in completions]
'''
SCALE = """
    SCALE = -5.0

    def scaled(x):
        from my_late import shift  # imported when it is called
        return SCALE * x + shift()
"""


@pytest.fixture
def project(tmp_path):
    """An experiment whose reward calls a helper in a package, which uses a constant and imports one more module."""
    files = {
        "toy.py": EXPERIMENT,
        "arms.py": ABLATION,
        "my_rewards.py": REWARDS,
        "my_lib/__init__.py": "",
        "my_lib/scale.py": SCALE,
        "my_late.py": "def shift():\n    return 0.25\n",
        "words.txt": "crane pound",
        "unused.py": "x = 1",
    }
    for name, text in files.items():
        path = tmp_path / "project" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text))
    yield tmp_path / "project"
    for name in [name for name in sys.modules if name.startswith("my_") or name == "toy"]:
        del sys.modules[name]


def edit(path, old, new):
    text = path.read_text()
    assert old in text
    # One more line, since Python takes a file of the same size and second for the one that it has compiled.
    path.write_text(text.replace(old, new) + ("\n" if path.suffix == ".py" else ""))


def key(project) -> str:
    return load_ablation(project / "arms.py").runs()[0].key


def call(config) -> list[float]:
    return config.rewards["graded"](completions=["crane", "xxxxx"])


def test_a_module_that_is_imported_when_a_function_is_called_is_found(project):
    assert call(load(project / "toy.py")) == [-5.0 + 0.25, 0.25]


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("my_rewards.py", "c in WORDS", "c not in WORDS"),  # the reward itself
        ("my_lib/scale.py", "SCALE * x", "SCALE * x * 2"),  # a helper that it calls
        ("my_lib/scale.py", "-5.0", "-4.0"),  # a constant of the helper's module
        ("my_late.py", "0.25", "0.5"),  # what the helper imports when it is called
        ("words.txt", "pound", "train"),  # data
    ],
)
def test_a_run_is_another_one_when_code_or_data_that_its_reward_uses_has_changed(project, name, old, new):
    before = key(project)
    assert key(project) == before
    edit(project / name, old, new)
    assert key(project) != before


def test_a_reward_in_the_experiments_own_file_counts_with_its_constants(project):
    (project / "own.py").write_text(
        textwrap.dedent("""
            from types import SimpleNamespace
            from grpo_jax.experiment import Ablation, Experiment
            BONUS = 1
            def reward(*, completions, **columns):
                return [float(BONUS) for _ in completions]
            task = SimpleNamespace(name="toy", train=[{"prompt": "a"}], held_out=[])
            ablation = Ablation(base=Experiment(task=task, rewards={"r": reward}), arms={"a": {}})
        """)
    )
    before = load_ablation(project / "own.py").runs()[0].key
    edit(project / "own.py", 'arms={"a": {}}', 'arms={"a": {}, "b": {"group_size": 3}}')  # one more arm
    assert load_ablation(project / "own.py").runs()[0].key == before
    edit(project / "own.py", "BONUS = 1", "BONUS = 2")
    assert load_ablation(project / "own.py").runs()[0].key != before


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("my_rewards.py", "Rewards of ours.", "Our rewards."),
        ("my_lib/scale.py", "SCALE = -5.0", "SCALE   =  -5.0  # a comment"),
        ("unused.py", "1", "2"),
        ("toy.py", "steps=7", "steps=7,"),
    ],
)
def test_a_run_is_the_same_when_only_words_layout_or_files_that_it_does_not_use_have_changed(project, name, old, new):
    before = key(project)
    edit(project / name, old, new)
    assert key(project) == before


def test_without_files_a_name_is_that_of_the_first_versions(project):
    config = load(project / "toy.py")
    before = fingerprint(config, files=False)
    edit(project / "my_lib/scale.py", "-5.0", "-4.0")
    assert fingerprint(load(project / "toy.py"), files=False) == before != fingerprint(config)


def copied(project, tmp_path, name="run"):
    """A run's directory, as far as loading it needs one."""
    load(project / "toy.py")
    described = {"directory": "code", **sources.describe(project / "toy.py")}
    sources.copy(project / "toy.py", tmp_path / name / "code")
    info = {"source": str(project / "toy.py"), "overrides": ["seed=4"], "code": described}
    (tmp_path / name / "run.json").write_text(json.dumps(info))
    return tmp_path / name


def test_a_run_holds_all_files_that_it_uses_and_needs_no_other(project, tmp_path):
    name = fingerprint(load(project / "toy.py"))
    run = copied(project, tmp_path)
    found = {str(path.relative_to(run / "code")) for path in (run / "code").rglob("*") if path.is_file()}
    assert found == {"toy.py", "my_rewards.py", "my_lib/__init__.py", "my_lib/scale.py", "my_late.py", "words.txt"}
    shutil.rmtree(project)
    config = load_run(run)
    assert (config.seed, call(config)) == (4, [-4.75, 0.25])
    assert fingerprint(load(run / "code" / "toy.py")) == name  # the copies have the name of the originals


def test_two_runs_in_one_process_each_use_their_own_copies(project, tmp_path):
    one = copied(project, tmp_path, "one")
    edit(project / "my_lib/scale.py", "-5.0", "-4.0")
    other = copied(project, tmp_path, "other")
    first, second = load_run(one), load_run(other)
    assert (call(first)[0], call(second)[0]) == (-4.75, -3.75)


def test_an_edit_in_the_same_process_is_seen_by_the_next_load(project):
    assert call(load(project / "toy.py"))[0] == -4.75
    edit(project / "my_rewards.py", "scaled(c in WORDS)", "0.125")
    assert call(load(project / "toy.py"))[0] == 0.125
    edit(project / "words.txt", "crane", "other")
    assert call(load(project / "toy.py")) == [0.125, 0.125]


def test_files_in_other_folders_keep_their_places_beside_each_other(project, tmp_path):
    (project / "experiments").mkdir()
    (project / "experiments" / "far.py").write_text(
        "from pathlib import Path\nfrom grpo_jax.experiment import load, override\n"
        "config = override(load(Path(__file__).resolve().parents[1] / 'toy.py'), {'steps': 3})\n"
    )
    config = load(project / "experiments" / "far.py")
    described = sources.describe(project / "experiments" / "far.py")
    assert described["entry"] == "experiments/far.py" and set(described["paths"]) == {".", "experiments"}
    assert {"toy.py", "my_lib/scale.py", "words.txt"} < set(described["files"]) and config.steps == 3
    sources.copy(project / "experiments" / "far.py", tmp_path / "code")
    shutil.rmtree(project)
    assert call(load(tmp_path / "code" / "experiments" / "far.py"))[0] == -4.75


def test_what_changed_is_named_as_seen_from_the_experiments_file(project):
    load(project / "toy.py")
    before = sources.describe(project / "toy.py")
    assert sources.changed(before, before) == []
    edit(project / "my_lib/scale.py", "-5.0", "-4.0")
    (project / "my_late.py").write_text("from unused import x\ndef shift():\n    return 0.25\n")
    load(project / "toy.py")
    now = sources.describe(project / "toy.py")
    assert sources.changed(before, now) == ["my_late.py", "my_lib/scale.py", "unused.py"]


def test_data_that_are_too_large_are_named_and_not_copied(project, tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "LARGEST_COPY", 5)
    load(project / "toy.py")
    assert sources.describe(project / "toy.py")["not_copied"] == ["words.txt"]
    sources.copy(project / "toy.py", tmp_path / "code")
    assert not (tmp_path / "code" / "words.txt").exists()


def test_a_module_with_a_syntax_error_that_is_not_imported_yet_stops_nothing(project):
    (project / "my_late.py").write_text("def shift(:\n")
    config = load(project / "toy.py")
    assert "my_late.py" in sources.describe(project / "toy.py")["files"] and len(fingerprint(config)) == 12
    with pytest.raises(SyntaxError):
        call(config)


def test_the_code_that_numbers_come_from_is_named_without_what_shows_them(monkeypatch, tmp_path):
    (tmp_path / "cli").mkdir()
    (tmp_path / "cli" / "show.py").write_text("x = 1")
    (tmp_path / "update.py").write_text("def update():\n    return 1\n")
    monkeypatch.setattr(sources, "PACKAGE", tmp_path)
    digest = sources.package_digest.__wrapped__
    before = digest()
    (tmp_path / "cli" / "show.py").write_text("x = 2")
    (tmp_path / "update.py").write_text("# A comment.\ndef update():\n    return 1\n")
    assert digest() == before
    (tmp_path / "update.py").write_text("def update():\n    return 2\n")
    assert digest() != before


def test_libraries_are_not_the_users():
    import numpy

    import grpo_jax.rewards.wordle

    assert not any(map(sources.is_users, (numpy.__file__, json.__file__, grpo_jax.rewards.wordle.__file__, "<string>")))
    assert sources.code_digest(numpy.__file__) is None and sources.is_users(__file__)


def write(folder, files: dict[str, str]):
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text))


def used(folder, name: str) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in sources.files_of(folder / name)}


def test_only_the_modules_named_here_make_no_number(monkeypatch, tmp_path):
    shown = [f"{folder}/x.py" for folder in ("cli", "report", "statistics", "reward_lab", "research")] + ["errors.py"]
    shown += [f"experiment/{name}.py" for name in ("ablation", "sources", "fingerprint", "files")]
    shown += [f"runs/{name}.py" for name in ("log", "record", "display", "files")]
    shown += [f"sweep/{name}.py" for name in ("processes", "progress", "worker")]
    made = [f"{name}.py" for name in ("advantages", "confidence", "evaluation", "training", "update", "losses/x")]
    made += [f"experiment/{name}.py" for name in ("experiment", "overrides", "configs", "methods", "requirements")]
    made += ["runs/checkpoints.py", "runs/restore.py", "sweep/vectorized.py", "sweep/warm_starts.py", "rewards/x.py"]
    for name in (*shown, *made):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x = 1")
    monkeypatch.setattr(sources, "PACKAGE", tmp_path)
    digest = sources.package_digest.__wrapped__
    before = digest()
    assert len(before) == 12

    def counts(name: str) -> bool:
        (tmp_path / name).write_text("x = 2")
        changed = digest() != before
        (tmp_path / name).write_text("x = 1")
        return changed

    assert [name for name in (*shown, *made) if counts(name)] == made
    (tmp_path / "update.py").rename(tmp_path / "updates.py")  # a name counts, too
    assert digest() != before


def test_imports_that_are_relative_to_their_package_are_followed(tmp_path):
    deep = "from . import other\nfrom ..top import b\nfrom .far import c as d\n"
    inner = {"__init__.py": "from .beside import a\n", "deep.py": deep, "beside.py": "a = 1\n", "other.py": "",
             "far.py": "c = 3\n", "not_used.py": ""}  # fmt: skip
    toy = EXPERIMENT.replace("from my_rewards import graded", "from my_pkg2.inner import deep\n    graded = len")
    top = {"pkg_toy.py": toy, "my_pkg2/__init__.py": "", "my_pkg2/top.py": "b = 2\n", "my_pkg2/beside.py": ""}
    write(tmp_path, top | {f"my_pkg2/inner/{name}": text for name, text in inner.items()})
    load(tmp_path / "pkg_toy.py")
    assert used(tmp_path, "pkg_toy.py") == {
        "pkg_toy.py", "my_pkg2/__init__.py", "my_pkg2/top.py",
        *(f"my_pkg2/inner/{name}.py" for name in ("__init__", "deep", "beside", "other", "far")),
    }  # fmt: skip
    described = sources.describe(tmp_path / "pkg_toy.py")
    assert (described["entry"], described["paths"], described["not_copied"]) == ("pkg_toy.py", ["."], [])


READER = """
    from pathlib import Path
    HERE = Path(__file__).parent
    WORDS = (HERE / "words.txt").read_text()
    with open(str(HERE / "plain.txt")) as file:
        PLAIN = file.read()
    (HERE / "written.txt").write_text("x")
    with (HERE / "log.txt").open("a") as file:
        file.write("x")
    (HERE / ".hidden").read_text()
    if (HERE / "absent.txt").exists():
        pass
"""
LETTERS = """
    from types import SimpleNamespace
    from grpo_jax.experiment import Experiment
    from my_reader import WORDS

    def length(*, completions, **columns):
        return [float(len(WORDS)) for _ in completions]

    config: Experiment = Experiment(
        task=SimpleNamespace(name="t", train=[], held_out=[]), rewards={"length": length}, steps=7)
"""


@pytest.fixture
def reader(tmp_path):
    write(tmp_path, {"my_reader.py": READER, "one.py": LETTERS, "two.py": LETTERS})
    for name in ("words.txt", "plain.txt", ".hidden", "log.txt"):
        (tmp_path / name).write_text("abc")
    yield tmp_path
    sys.modules.pop("my_reader", None)


def test_data_are_files_that_are_read_and_not_those_that_are_written_or_hidden(reader):
    load(reader / "one.py")
    expected = {"one.py", "my_reader.py", "words.txt", "plain.txt"}
    assert used(reader, "one.py") == expected
    load(reader / "two.py")  # its reader was imported already, and not executed again
    assert used(reader, "two.py") == expected - {"one.py"} | {"two.py"}
    load(reader / "one.py")
    assert used(reader, "one.py") == expected


def test_data_that_were_edited_or_removed_are_read_again(reader):
    def value() -> list[float]:
        return load(reader / "one.py").rewards["length"](completions=["x"])

    assert value() == [3.0]
    (reader / "words.txt").write_text("abcde")
    assert value() == [5.0]
    (reader / "words.txt").unlink()
    with pytest.raises(Exception, match="FileNotFoundError"):
        value()


def test_the_variables_that_hold_a_config_do_not_count_whichever_way_they_are_written(reader):
    digests = []
    for old, new in (("7", "7"), ("steps=7", "steps=8"), ("float(len", "2.0 * float(len"), ("steps=8", "steps=9")):
        text = (reader / "one.py").read_text()
        assert old in text
        (reader / "one.py").write_text(text.replace(old, new))
        load(reader / "one.py")
        digests.append(sources.code_digest(reader / "one.py"))
    assert digests[0] == digests[1] != digests[2] == digests[3]


def test_words_alone_leave_a_files_digest_as_it_is(tmp_path):
    def digest(text: str) -> str | None:
        (tmp_path / "file.py").write_text(text)
        sources.record(tmp_path / "file.py")
        return sources.code_digest(tmp_path / "file.py")

    empty = digest('class A:\n    """One."""\n')
    assert empty == digest('class A:\n    """Two."""\n') == digest("class A:\n    pass\n")
    assert empty != digest("class B:\n    pass\n") != digest('x = """One."""\n') != digest('x = """Two."""\n')
    assert digest("x = 1 +") is not None  # not Python, and named by its bytes


def test_what_lies_among_libraries_is_not_the_users(tmp_path):
    for folder, expected in (("site-packages", False), ("dist-packages", False), ("mine", True)):
        path = tmp_path / folder / "module.py"
        path.parent.mkdir()
        path.write_text("x = 1")
        assert sources.is_users(path) is expected
    (tmp_path / "mine" / "data.txt").write_text("x")
    assert not sources.is_users(tmp_path / "mine" / "data.txt") and not sources.is_users(tmp_path / "mine" / "none.py")
