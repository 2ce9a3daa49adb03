"""`Ablation`: one experiment under several variations, at several seeds."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from grpo_jax.errors import UserError
from grpo_jax.experiment.checked import Checked, Ranges
from grpo_jax.experiment.experiment import Experiment
from grpo_jax.experiment.fingerprint import fingerprint
from grpo_jax.experiment.overrides import override

Budget = Literal["steps", "tokens"]


@dataclass(frozen=True)
class PlannedRun:
    """One run of an ablation: the arms that it stands for, its seed, its resolved config, and its names.

    `key` is the hash of the config and of the user's files that it uses; `config_key` is that of the config alone.
    """

    arms: tuple[str, ...]
    seed: int
    config: Experiment
    key: str

    @property
    def config_key(self) -> str:
        return fingerprint(self.config, files=False)


@dataclass(frozen=True)
class Ablation(Checked):
    """One experiment under several variations, at several seeds.

    Arms are overrides of `base`, as in `{"article": {}, "strict": {"rewards": {"strict": partial_credit_strict}}}`. At
    equal seeds they share their prompts and the names of their sampling noise, so they are compared seed by
    seed, each with `baseline` (None: the first arm).

    Ten seeds are the default because fewer than six can never show a difference: see
    `grpo_jax.statistics.verdicts.verdict`.

    `metric` is a name in `metrics.jsonl`; its last value is what a run came to. `budget` is what the arms have in
    common: `steps` as many updates as the base; `tokens` as many sampled tokens as the base's steps have room for
    (steps × prompts × group size × turns × `max_tokens`). Every arm, the base too, then takes the steps that it needs
    to sample them; the last one may sample a few more.
    """

    base: Experiment
    arms: Mapping[str, Mapping[str, Any]]
    seeds: Sequence[int] = range(10)
    metric: str = "evaluation/success"
    baseline: str | None = None
    budget: Budget = "steps"

    def _ranges(self) -> Ranges:
        return dict(
            arms=(bool(self.arms), "at least one arm, {name: overrides}"),
            seeds=(0 < len(self.seeds) == len(set(self.seeds)), "at least one seed, each once"),
            baseline=(self.baseline is None or self.baseline in self.arms, f"None or one of {sorted(self.arms)}"),
        )

    def __post_init__(self) -> None:
        if isinstance(self.seeds, Sequence) and len(self.seeds) > 10_000:  # before each of them is looked at
            raise UserError(f"Ablation.seeds has {len(self.seeds)} seeds: it must have at most 10,000.")
        super().__post_init__()
        for arm, overrides in self.arms.items():
            for field_of_sweep, instead in (
                ("seed", "`seeds`"),
                ("steps", "`budget`, which gives every arm its steps"),
                ("token_budget", "`budget`, which gives every arm its tokens"),
            ):
                if field_of_sweep in overrides:
                    raise UserError(f"arm {arm!r} sets {field_of_sweep!r}: that is for the ablation's {instead}.")
            try:
                self.experiment(arm, self.seeds[0])
            except UserError as error:
                raise UserError(f"arm {arm!r}: {error}") from None

    @property
    def baseline_arm(self) -> str:
        """The arm that the others are compared with."""
        return next(iter(self.arms)) if self.baseline is None else self.baseline

    def experiment(self, arm: str, seed: int) -> Experiment:
        """The resolved config of an arm at a seed."""
        config = override(self.base, {**self.arms[arm], "seed": seed})
        if self.budget == "steps":
            return config
        tokens = self.base.num_steps * _room(self.base)
        # A completion has at least one token, its end: more steps than this no run can need.
        epochs = {} if config.epochs is None else {"epochs": config.epochs}
        shared: dict[str, Any] = {
            **dict.fromkeys(epochs),
            "token_budget": tokens,
            "steps": math.ceil(tokens / (config.prompts_per_step * config.group_size)),
        }
        if config.warm_start is not None:
            shared["warm_start"] = {"steps": config.steps, **epochs, "token_budget": None, **config.warm_start}
        return override(config, shared)

    def runs(self) -> list[PlannedRun]:
        """Every run, seed by seed so that what is finished first can be compared; arms that are alike share one.

        Raises `UserError` for an arm whose runs would have other names in another process.
        """
        return list(self._runs)

    @cached_property
    def _runs(self) -> list[PlannedRun]:
        # Once, since the hash of a run counts every example of its task.
        planned: dict[str, PlannedRun] = {}
        for seed in self.seeds:
            for arm in self.arms:
                config = self.experiment(arm, seed)
                try:
                    key = fingerprint(config)
                except UserError as error:
                    raise UserError(f"arm {arm!r}: {error}") from None
                earlier = planned[key].arms if key in planned else ()
                planned[key] = PlannedRun((*earlier, arm), seed, config, key)
        return list(planned.values())


def _room(config: Experiment) -> int:
    """The most tokens that one step may sample."""
    turns = getattr(config.task, "max_turns", 1)
    return config.prompts_per_step * config.group_size * turns * config.sampling.max_tokens
