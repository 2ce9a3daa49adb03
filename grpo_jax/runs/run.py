"""A run's directory, read: its config, metrics, evaluations, completions and policy."""

from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grpo_jax.experiment import Experiment, SamplingConfig, load_run, read_config, read_run
from grpo_jax.experiment.recorded import changed_fields, current_config
from grpo_jax.runs.files import changed_since, is_evaluation, read_json, read_rows

if TYPE_CHECKING:
    from grpo_jax.policy import Policy


class Run:
    """What a run's directory holds. Everything is read when it is asked for, and then kept.

    Only `experiment` needs the user's code, which is loaded from the run's own copies.

    Attributes:
      run_dir: the directory.
    """

    def __init__(self, run_dir: str | Path) -> None:
        """Raises `UserError` if the directory holds no run."""
        self.run_dir = Path(run_dir)
        self.info  # noqa: B018 so that what is no run is found here

    def __repr__(self) -> str:
        return f"Run({str(self.run_dir)!r}, {self.status})"

    @cached_property
    def info(self) -> dict[str, Any]:
        """run.json: versions, times, the device, the files, and what the run was resumed with."""
        return read_run(self.run_dir)

    @property
    def status(self) -> str:
        """`running`, `finished`, `stopped` (by a callback), `interrupted` or `failed`."""
        return self.info.get("status", "unknown")

    @cached_property
    def config(self) -> dict[str, Any]:
        """The experiment as JSON, as it is now: functions by name, the task by its name and a digest of its data."""
        return current_config(read_config(self.run_dir), self.info)

    @cached_property
    def experiment(self) -> Experiment:
        """The experiment. Raises `UserError` if its task and functions are in no file, as those of a notebook."""
        return load_run(self.run_dir)

    def is_done(self, experiment: Experiment) -> bool:
        """Whether the run has finished with this very experiment, so that nothing is left to do."""
        return self.status == "finished" and not changed_fields(self.config, experiment)

    @cached_property
    def policy(self) -> "Policy":
        """The policy at the newest checkpoint. Raises `UserError` if there is none."""
        from grpo_jax.runs.restore import restore_policy  # not at the top: the other files are read without JAX

        return restore_policy(self.run_dir)

    @cached_property
    def metrics(self) -> list[dict[str, Any]]:
        """The metrics of each training step, in their order, with its `step`."""
        return [row for row in self._rows if not is_evaluation(row)]

    @cached_property
    def evaluations(self) -> list[dict[str, Any]]:
        """The metrics of each evaluation, in their order, with the `step` after which it was made."""
        return [row for row in self._rows if is_evaluation(row)]

    @cached_property
    def completions(self) -> list[dict[str, Any]]:
        """Every completion that was trained on, with its prompt, rewards and advantage; none for demonstrations."""
        return list(read_rows(self.run_dir / "completions.jsonl"))

    @cached_property
    def summary(self) -> dict[str, Any]:
        """What the run came to; empty as long as it has not ended."""
        return read_json(self.run_dir / "summary.json")

    @property
    def sampling(self) -> SamplingConfig:
        """How the run samples completions."""
        from grpo_jax.runs.restore import sampling_of

        return replace(sampling_of(self.run_dir), **changed_since(self.info, "sampling"))

    @property
    def first_prompt(self) -> Any:
        """A prompt that the run was trained on; None if there is none."""
        return next((row["prompt"] for row in read_rows(self.run_dir / "completions.jsonl")), None)

    @cached_property
    def _rows(self) -> list[dict[str, Any]]:
        return list(read_rows(self.run_dir / "metrics.jsonl"))
