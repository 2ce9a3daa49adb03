"""Checkpoints: a saved state is restored exactly, and a state that cannot be restored is one clear sentence."""

import os
import subprocess
import sys
import threading
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from grpo_jax.errors import RunError, UserError
from grpo_jax.runs import checkpoints
from grpo_jax.runs.sums import SUMS


def make_state(scale: float = 1.0, width: int = 4) -> dict:
    trainable = {
        "layers": {"q": {"kernel": scale * jnp.arange(3.0 * width).reshape(3, width)}},
        "norm": [jnp.full((5,), scale, jnp.bfloat16)],
        "none": np.zeros((0, 2), np.float32),
    }
    return {"trainable": trainable, "optimizer": optax.adamw(1e-3).init(trainable), "step": 7}


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert np.asarray(x).dtype == np.asarray(y).dtype
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


def test_a_state_comes_back_bit_for_bit_with_its_structure(tmp_path):
    state = make_state(0.1)
    checkpoints.save(tmp_path / "c", 7, state)
    step, restored = checkpoints.restore(tmp_path / "c", make_state(0.0))
    assert step == 7 and type(restored["step"]) is int
    assert_same(restored, state)


def test_shapes_alone_are_enough_to_restore(tmp_path):
    state = make_state()
    checkpoints.save(tmp_path, 1, state)
    like = jax.eval_shape(lambda: {key: state[key] for key in ("trainable", "optimizer")}) | {"step": 0}
    assert_same(checkpoints.restore(tmp_path, like)[1], state)


def test_a_leaf_that_earlier_versions_did_not_save_keeps_the_callers_value(tmp_path):
    checkpoints.save(tmp_path, 1, make_state())
    wanted = {**make_state(), "tokens": 5}
    assert checkpoints.restore(tmp_path, wanted, optional_leaves=("tokens",))[1]["tokens"] == 5
    checkpoints.save(tmp_path, 2, {**make_state(), "tokens": 8})
    assert checkpoints.restore(tmp_path, wanted, optional_leaves=("tokens",))[1]["tokens"] == 8


def test_the_newest_two_remain_and_the_newest_is_restored(tmp_path):
    for step in (10, 20, 100):
        checkpoints.save(tmp_path, step, make_state(step))
    assert sorted(os.listdir(tmp_path)) == ["100", "20"]
    assert checkpoints.latest_step(tmp_path) == 100 and checkpoints.kept_steps(tmp_path) == [20, 100]
    assert checkpoints.restore(tmp_path, make_state())[1]["trainable"]["layers"]["q"]["kernel"][0, 1] == 100
    assert checkpoints.restore(tmp_path, make_state(), step=20)[0] == 20


def test_a_step_that_is_saved_already_is_not_saved_again(tmp_path):
    checkpoints.save(tmp_path, 3, make_state(1.0))
    checkpoints.save(tmp_path, 3, make_state(2.0))
    assert_same(checkpoints.restore(tmp_path, make_state())[1], make_state(1.0))


def test_a_leaf_with_a_sharding_comes_back_on_its_devices(tmp_path):
    checkpoints.save(tmp_path, 0, {"w": jnp.arange(16.0)})
    sharding = NamedSharding(Mesh(np.array(jax.devices()), ("x",)), PartitionSpec("x"))
    like = {"w": jax.ShapeDtypeStruct((16,), jnp.float32, sharding=sharding)}
    _, restored = checkpoints.restore(tmp_path, like)
    assert restored["w"].sharding == sharding
    np.testing.assert_array_equal(restored["w"], np.arange(16.0))


def test_without_a_checkpoint_there_is_no_step_and_nothing_to_restore(tmp_path):
    assert checkpoints.latest_step(tmp_path) is None
    assert checkpoints.latest_step(tmp_path / "absent") is None and checkpoints.kept_steps(tmp_path / "absent") == []
    assert not (tmp_path / "absent").exists()
    with pytest.raises(UserError, match="there is no checkpoint in"):
        checkpoints.restore(tmp_path / "absent", make_state())


@pytest.mark.parametrize(
    ("like", "says"),
    [
        (lambda: make_state(width=5), r"layers/q/kernel' with shape \[3, 4\], where \[3, 5\] is wanted"),
        (lambda: make_state() | {"extra": 1}, "holds no 'extra'"),
        (lambda: {"step": 0}, "'optimizer/0/count', which this policy and optimizer do not have"),
        (
            lambda: (
                make_state() | {"trainable": jax.tree.map(lambda x: x.astype("float16"), make_state()["trainable"])}
            ),
            "'trainable/layers/q/kernel' as float32, where float16 is wanted",
        ),
    ],
    ids=["shape", "missing", "unknown", "dtype"],
)
def test_a_state_that_differs_is_named_leaf_by_leaf(tmp_path, like, says):
    checkpoints.save(tmp_path, 1, make_state())
    with pytest.raises(UserError, match=says):
        checkpoints.restore(tmp_path, like())


def test_a_part_of_what_was_saved_is_read_alone(tmp_path):
    checkpoints.save(tmp_path, 1, {"trainable": {"w": jnp.arange(3.0)}, "optimizer": jnp.ones(2), "step": 4})
    step, found = checkpoints.restore(tmp_path, {"trainable": {"w": jnp.zeros(3)}}, partial=True)
    assert step == 1 and list(found) == ["trainable"]
    np.testing.assert_array_equal(found["trainable"]["w"], np.arange(3.0))
    with pytest.raises(UserError, match="holds 'optimizer', which this policy and optimizer do not have"):
        checkpoints.restore(tmp_path, {"trainable": {"w": jnp.zeros(3)}, "step": 0})
    with pytest.raises(UserError, match="holds no 'trainable/b': it was saved by a different policy or optimizer"):
        checkpoints.restore(tmp_path, {"trainable": {"b": jnp.zeros(3)}}, partial=True)


def test_the_saved_leaves_are_those_of_the_newest_checkpoint(tmp_path):
    assert checkpoints.saved_leaves(tmp_path / "none") == set()
    checkpoints.save(tmp_path, 1, {"a": {"b": np.ones(1)}})
    checkpoints.save(tmp_path, 2, {"a": {"b": np.ones(1), "c": 3}, "empty": np.zeros((0, 2))})
    assert checkpoints.saved_leaves(tmp_path) == {"a/b", "a/c"}
    (tmp_path / "3").mkdir()
    (tmp_path / "3" / "weights.bin").write_bytes(b"not of Orbax")
    assert checkpoints.saved_leaves(tmp_path) == set()


def test_as_many_checkpoints_remain_as_are_to_be_kept(tmp_path):
    for step in (1, 2, 3, 4):
        checkpoints.save(tmp_path, step, {"w": np.ones(1)}, keep=lambda steps: steps[-3:])
    assert sorted(os.listdir(tmp_path)) == ["2", "3", "4"]


def test_numbers_come_back_as_their_kind(tmp_path):
    checkpoints.save(tmp_path, 1, {"i": 7, "f": 0.5, "b": True})
    _, found = checkpoints.restore(tmp_path, {"i": 0, "f": 0.0, "b": False})
    assert found == {"i": 7, "f": 0.5, "b": True} and [type(value) for value in found.values()] == [bool, float, int]


@pytest.mark.parametrize("harm", ["truncated", "foreign"])
def test_a_damaged_checkpoint_is_refused_and_the_one_before_it_is_named(tmp_path, harm):
    for step in (1, 2):
        checkpoints.save(tmp_path, step, {"w": jnp.arange(1000.0)})
    if harm == "foreign":
        (tmp_path / "3").mkdir()
        (tmp_path / "3" / "weights.bin").write_bytes(b"not of Orbax")
    else:
        for path in (tmp_path / "2").rglob("d/*"):
            path.write_bytes(path.read_bytes()[:10])
        (tmp_path / "2" / SUMS).unlink()
        checkpoints.write_sums(tmp_path / "2")  # so that only Orbax can find it
    with pytest.raises(
        UserError, match=r"(cannot be read|SHA256SUMS is missing).*to go back to step [12]\)\.$"
    ) as caught:
        checkpoints.restore(tmp_path, {"w": jnp.zeros(1000)})
    assert "\n" not in str(caught.value)
    assert checkpoints.restore(tmp_path, {"w": jnp.zeros(1000)}, step=1)[0] == 1


def test_a_bit_that_has_flipped_in_any_file_is_found_and_the_file_is_named(tmp_path):
    for step in (1, 2):
        checkpoints.save(tmp_path, step, {"w": jnp.arange(1000.0)})
    files = [path for path in (tmp_path / "2").rglob("*") if path.is_file() and path.stat().st_size]
    assert len(files) > 5
    for path in files:
        good = path.read_bytes()
        middle = len(good) // 2
        path.write_bytes(good[:middle] + bytes([good[middle] ^ 1]) + good[middle + 1 :])
        with pytest.raises(UserError, match=r"damaged: its file .* is not what was saved.*to step 1\)\.$") as error:
            checkpoints.restore(tmp_path, {"w": jnp.zeros(1000)})
        assert path.name == SUMS or path.relative_to(tmp_path / "2").as_posix() in str(error.value)
        path.write_bytes(good)
    files[0].unlink()
    with pytest.raises(UserError, match="is damaged: its file"):
        checkpoints.restore(tmp_path, {"w": jnp.zeros(1000)})


def test_a_checkpoint_without_checksums_is_read_if_it_is_of_an_earlier_version(tmp_path):
    checkpoints.save(tmp_path, 1, make_state())
    checkpoints.save(tmp_path, 2, make_state())
    with ocp.CheckpointManager(tmp_path, item_handlers=ocp.PyTreeCheckpointHandler()) as manager:
        manager.save(3, args=ocp.args.PyTreeSave(checkpoints._flatten({"w": np.arange(3.0), "n": np.asarray(3)})))
    step, found = checkpoints.restore(tmp_path, {"w": np.zeros(3), "n": 0})
    assert step == 3 and found["n"] == 3 and found["w"].tolist() == [0, 1, 2]
    checkpoints.write_sums(tmp_path / "3")  # as they were written there
    assert checkpoints.restore(tmp_path, {"w": np.zeros(3), "n": 0})[0] == 3
    (tmp_path / "2" / SUMS).unlink()
    with pytest.raises(UserError, match=r"of step 2 .* is damaged: its file SHA256SUMS is missing .*step 1"):
        checkpoints.restore(tmp_path, make_state(0.0), step=2)


def test_the_checksums_are_those_that_sha256sum_checks(tmp_path):
    checkpoints.save(tmp_path, 1, make_state())
    subprocess.run(["sha256sum", "--check", "--quiet", SUMS], cwd=tmp_path / "1", check=True)


def test_the_newest_of_several_checkpoints_before_a_damaged_one_is_named(tmp_path):
    for step in (3, 5, 8):
        checkpoints.save(tmp_path, step, {"w": np.ones(1)}, keep=list)
    (tmp_path / "9").mkdir()
    (tmp_path / "9" / "weights.bin").write_bytes(b"not of Orbax")
    with pytest.raises(UserError, match=r"of step 9 in .* is damaged.*to go back to step 8\)\.$"):
        checkpoints.restore(tmp_path, {"w": np.zeros(1)})


def test_a_save_that_is_killed_leaves_the_checkpoint_before_it(tmp_path):
    # The process dies as soon as Orbax has begun to write the second step, before it can rename it into place.
    code = f"""
import os, pathlib, threading, time
import numpy as np
from grpo_jax.runs import checkpoints
from grpo_jax.runs.sums import SUMS
state = {{"w": np.random.default_rng(0).normal(size=5_000_000)}}
checkpoints.save({str(tmp_path)!r}, 1, {{"w": np.ones(3)}})
def kill():
    while not any(".2.part" in p.name for p in pathlib.Path({str(tmp_path)!r}).iterdir()):
        time.sleep(0.0005)
    os._exit(9)
threading.Thread(target=kill, daemon=True).start()
checkpoints.save({str(tmp_path)!r}, 2, state)
"""
    assert subprocess.run([sys.executable, "-c", code]).returncode == 9
    assert checkpoints.latest_step(tmp_path) == 1
    np.testing.assert_array_equal(checkpoints.restore(tmp_path, {"w": np.zeros(3)})[1]["w"], np.ones(3))
    checkpoints.save(tmp_path, 2, {"w": np.zeros(3)})
    assert checkpoints.latest_step(tmp_path) == 2


def test_a_place_that_cannot_be_written_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(RunError, match="the checkpoint of step 4 cannot be written to"):
        checkpoints.save(tmp_path / "file", 4, {"w": np.zeros(3)})


def test_why_it_cannot_be_written_is_the_first_line_or_the_kind_of_the_error():
    assert checkpoints._reason(ValueError("\n the disk is full. \n and more")) == "the disk is full"
    assert checkpoints._reason(OSError(28, "No space left on device", "a file")) == "No space left on device"
    assert checkpoints._reason(ValueError()) == "ValueError"
    assert checkpoints._reason(ValueError("No [os_error_code='28' x='y']")) == "No space left on device"


def slow_disk(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Nothing gets its checksums until the event is set."""
    ready, write_sums = threading.Event(), checkpoints.write_sums

    def wait(folder: Path) -> None:
        assert ready.wait(60)
        write_sums(folder)

    monkeypatch.setattr(checkpoints, "write_sums", wait)
    return ready


def test_the_state_is_saved_as_it_was_though_it_changes_while_it_is_written(tmp_path, monkeypatch):
    ready, array = slow_disk(monkeypatch), np.arange(1_000_000.0)
    with checkpoints.Saver(tmp_path) as saver:
        saver.save(1, {"w": array}, files={"note": "of step 1"})
        array[:] = -1
        assert checkpoints.kept_steps(tmp_path) == []  # it is there when all of it is
        ready.set()
        saver.wait()
        assert checkpoints.kept_steps(tmp_path) == [1] and checkpoints.read_file(tmp_path, 1, "note") == "of step 1"
        saver.save(2, {"w": array})
    assert checkpoints.kept_steps(tmp_path) == [1, 2] and not list(tmp_path.glob(".*"))
    np.testing.assert_array_equal(checkpoints.restore(tmp_path, {"w": array}, step=1)[1]["w"], np.arange(1_000_000.0))


def test_one_checkpoint_is_written_at_a_time(tmp_path, monkeypatch):
    ready, done = slow_disk(monkeypatch), []
    with checkpoints.Saver(tmp_path) as saver:
        saver.save(1, {"w": np.ones(3)})
        threading.Timer(0.3, lambda: (done.append(checkpoints.kept_steps(tmp_path)), ready.set())).start()
        saver.save(2, {"w": np.ones(3)})
        assert done == [[]] and checkpoints.kept_steps(tmp_path)[0] == 1


def full(*_: object) -> None:
    raise OSError(28, "No space left on device")


def test_a_checkpoint_that_cannot_be_finished_is_the_failure_of_the_next_call_and_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoints, "write_sums", full)
    says = "the checkpoint of step 1 cannot be written to .*: .*No space left on device"
    with pytest.raises(RunError, match=says):
        checkpoints.save(tmp_path, 1, {"w": np.ones(3)})
    with checkpoints.Saver(tmp_path) as saver:
        saver.save(1, {"w": np.ones(3)})
        with pytest.raises(RunError, match=says):
            saver.save(2, {"w": np.ones(3)})
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ZeroDivisionError), checkpoints.Saver(tmp_path) as saver:  # what went wrong first is told
        saver.save(1, {"w": np.ones(3)})
        raise ZeroDivisionError


def test_an_error_elsewhere_waits_for_the_checkpoint_that_is_being_written(tmp_path, monkeypatch):
    ready = slow_disk(monkeypatch)
    threading.Timer(0.3, ready.set).start()
    with pytest.raises(ZeroDivisionError), checkpoints.Saver(tmp_path) as saver:
        saver.save(1, {"w": np.ones(3)})
        raise ZeroDivisionError
    assert checkpoints.kept_steps(tmp_path) == [1]


def test_arrays_are_placed_one_after_the_other(tmp_path):
    checkpoints.save(tmp_path, 1, {"a": np.ones(3), "b": np.arange(4.0), "n": 5, "none": np.ones((0, 2))})
    placed: list[tuple[int, ...]] = []

    def place(array: np.ndarray) -> list[float]:
        placed.append(array.shape)
        return array.tolist()

    like = {"a": np.zeros(3), "b": np.zeros(4), "n": 0, "none": np.zeros((0, 2))}
    assert checkpoints.restore(tmp_path, like, place=place)[1] == {
        "a": [1.0] * 3,
        "b": [0, 1, 2, 3],
        "n": 5,
        "none": [],
    }
    assert placed == [(3,), (4,), (0, 2)]


def test_orbax_prints_nothing(tmp_path, capfd, caplog):
    checkpoints.save(tmp_path, 1, make_state())
    checkpoints.restore(tmp_path, make_state())
    assert caplog.records == []
    assert capfd.readouterr() == ("", "")
