"""Loading an experiment from a file, checking it, and overriding its fields."""

import dataclasses
import json
import subprocess
import sys
import textwrap
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grpo_jax import experiment
from grpo_jax.errors import UserError
from grpo_jax.experiment import Experiment, LoRAConfig, LossConfig, OptimizerConfig, PolicyConfig, RewardConfig

FILE = """
    from types import SimpleNamespace
    from grpo_jax.experiment import *

    def length(*, completions, **columns):
        return [float(len(c)) for c in completions]

    task = SimpleNamespace(name="toy", train=[{"prompt": "a"}], held_out=[{"prompt": "b"}])
    config = Experiment(task=task, rewards={"length": length}, steps=7)
"""


def toy(**fields) -> Experiment:
    task = SimpleNamespace(name="toy", train=[{"prompt": "a"}], held_out=[])
    return Experiment(**{"task": task, "rewards": {"length": len}, **fields})


@pytest.fixture
def write(tmp_path):
    def write(text, name="toy.py"):
        path = tmp_path / name
        path.write_text(textwrap.dedent(text))
        return path

    return write


def message(call) -> str:
    with pytest.raises(UserError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_file_loads_with_typed_overrides(write):
    assignments = ["loss.beta=0.04", "steps=9", "policy.dtype=bfloat16", "optimizer.max_grad_norm=none"]
    config = experiment.load(write(FILE), assignments)
    assert (config.loss.beta, config.steps, config.policy.dtype) == (0.04, 9, "bfloat16")
    assert config.optimizer.max_grad_norm is None
    assert config.seed == 0


def test_an_experiment_may_import_a_file_that_lies_beside_it(write):
    write("STEPS = 3", name="beside_toy.py")
    text = FILE.replace("steps=7", "steps=STEPS").replace(
        "def length", "from beside_toy import STEPS\n\n    def length"
    )
    assert experiment.load(write(text)).steps == 3


def test_a_runs_copy_of_its_experiment_finds_what_lay_beside_the_original(write, tmp_path):
    """Imported from there, or loaded by a path from `__file__`."""
    write("STEPS = 3", name="beside_copied_toy.py")
    write(FILE, name="base.py")
    source = write("""
        from pathlib import Path
        from beside_copied_toy import STEPS
        from grpo_jax.experiment import load, override
        config = override(load(Path(__file__).with_name("base.py")), {"steps": STEPS})
    """)
    run_dir = tmp_path / "runs" / "one"
    run_dir.mkdir(parents=True)
    (run_dir / "experiment.py").write_text(source.read_text())
    (run_dir / "run.json").write_text(json.dumps({"source": str(source), "overrides": ["seed=4"]}))
    config = experiment.load_run(run_dir)
    assert (config.steps, config.seed) == (3, 4)
    before = list(sys.path)
    assert experiment.load_run(run_dir).steps == 3
    assert sys.path == before  # nothing accumulates


def test_an_unknown_field_suggests_the_nearest_name(write):
    assert "did you mean 'beta'?" in message(lambda: experiment.load(write(FILE), ["loss.betta=0.1"]))
    assert "did you mean 'optimizer'?" in message(lambda: experiment.load(write(FILE), ["optimiser.b1=0.1"]))
    text = message(lambda: experiment.load(write(FILE.replace("steps=7", "step=7"))))
    assert "did you mean 'steps'?" in text and "toy.py:9" in text


@pytest.mark.parametrize(
    ("assignment", "says"),
    [
        ("steps=many", "wrong type"),
        ("steps=1.5", "wrong type"),
        ("loss.loss_type=ppo", "wrong type"),
        ("optimizer.b1=1", "in [0, 1)"),
        ("group_size=1", "at least 2"),
        ("prompts_per_step", "field=value"),
        ("steps.more=1", "no fields of its own"),
        ("policy.lora.rank=8", "is None here"),
        ("gradient_accumulation_steps=3", "divides the 8 groups of 8 completions of a step into equal parts"),
        ("loss.loss_type=dr_grpo", "dr_grpo_length"),
    ],
)
def test_a_wrong_override_is_one_sentence(write, assignment, says):
    assert says in message(lambda: experiment.load(write(FILE), [assignment]))


def test_overrides_that_are_only_valid_together_can_be_given_in_the_right_order(write):
    config = experiment.override(toy(), {"prompts_per_step": 9, "gradient_accumulation_steps": 3})
    assert config.prompts_per_step // config.gradient_accumulation_steps == 3


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("x = 1", "exports no experiment"),
        ("import nothing_of_this_name", "ModuleNotFoundError"),
        ("def f(:", "SyntaxError"),
        ("x = 1\n1 / 0", "toy.py:2: ZeroDivisionError"),
    ],
)
def test_a_broken_file_is_one_sentence_that_says_where(write, text, says):
    assert says in message(lambda: experiment.load(write(text)))


def test_a_missing_file_and_a_file_that_is_not_python_are_named(write):
    assert "no experiment file" in message(lambda: experiment.load("nowhere.py"))
    assert "ends in .py" in message(lambda: experiment.load(write(FILE, name="toy.txt")))


def test_values_are_checked_where_they_are_written():
    assert "OptimizerConfig.learning_rate" in message(lambda: OptimizerConfig(learning_rate="fast"))
    assert "LoRAConfig.targets" in message(lambda: LoRAConfig(targets=("query",)))
    assert "LossConfig.epsilon" in message(lambda: LossConfig(epsilon=2.0))
    assert "no reward of this experiment" in message(lambda: toy(reward=RewardConfig(weights={"lenght": 1.0})))
    assert "at least one reward" in message(lambda: toy(rewards={}))
    assert "needs demonstrations" in message(lambda: toy(method="sft"))


def test_an_override_changes_nothing_else_and_nothing_in_place():
    config = toy()
    changed = experiment.override(config, {"optimizer.learning_rate": 0.5, "policy.lora": LoRAConfig(rank=4)})
    assert config.optimizer.learning_rate == 1e-3 and config.policy.lora is None
    same = dataclasses.replace(changed, optimizer=config.optimizer, policy=config.policy)
    assert same == config


def test_a_mapping_takes_new_keys_from_the_command_line():
    overrides = experiment.parse_overrides(toy(), ["reward.weights.length=2.0"])
    assert experiment.override(toy(), overrides).reward.weights == {"length": 2.0}


def test_a_variant_takes_overrides_of_fields_that_it_does_not_name_yet():
    config = toy(warm_start={"optimizer.learning_rate": 0.5})
    config = experiment.override(config, {"warm_start.optimizer.schedule": "linear"})
    warm = experiment.variant_of(config, config.warm_start)
    assert (warm.optimizer.learning_rate, warm.optimizer.schedule) == (0.5, "linear")


def test_a_mistake_in_a_variant_is_found_before_anything_runs():
    assert "Experiment.control: 'optimiser'" in message(lambda: toy(control={"optimiser": None}))
    assert "Experiment.warm_start: OptimizerConfig.b1" in message(lambda: toy(warm_start={"optimizer.b1": 2.0}))


@given(st.floats(0, 10), st.integers(0, 2**31 - 1), st.booleans())
def test_any_number_survives_the_way_through_the_command_line(beta, seed, clip):
    assignments = [f"loss.beta={beta!r}", f"seed={seed}", f"optimizer.max_grad_norm={1.0 if clip else None}"]
    config = experiment.override(toy(), experiment.parse_overrides(toy(), assignments))
    assert (config.loss.beta, config.seed) == (beta, seed)
    assert (config.optimizer.max_grad_norm is None) != clip


def test_a_config_becomes_json_that_tells_data_apart():
    config = toy(policy=PolicyConfig(lora=LoRAConfig(rank=4)), warm_start={"steps": 5})
    described = json.loads(json.dumps(experiment.to_dict(config)))
    assert described["policy"]["lora"]["rank"] == 4
    assert described["rewards"] == {"length": "builtins.len"}
    assert described["warm_start"] == {"steps": 5}
    assert (described["task"]["name"], described["task"]["train"]) == ("toy", 1)
    other = toy(task=SimpleNamespace(name="toy", train=[{"prompt": "z"}], held_out=[]))
    assert experiment.to_dict(other)["task"]["sha256"] != described["task"]["sha256"]


def test_loading_an_experiment_imports_no_jax(write):
    code = f"import sys; from grpo_jax.experiment import load; load({str(write(FILE))!r}); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "grpo_jax.experiment" in done.stdout
    assert not {"jax", "flax", "optax", "transformers", "torch"} & set(done.stdout.split())


@pytest.mark.parametrize(
    "fields, why",
    [
        (dict(loss_type="sapo", epsilon_high=0.3), "loss_type 'sapo' does not read it"),
        (dict(loss_type="vespo", importance_sampling_level="sequence"), "loss_type 'vespo' does not read it"),
        (dict(loss_type="cispo", epsilon=0.1, epsilon_high=5.0), "loss_type 'cispo' does not read it"),
        (dict(loss_type="grpo", sapo_temperature_neg=2.0), "loss_type 'grpo' does not read it"),
        (dict(loss_type="reinforce", delta=3.0), "loss_type 'reinforce' does not read it"),
        (dict(loss_type="dapo", dr_grpo_length=8), "loss_type 'dapo' does not read it"),
        (dict(kl_estimator="k1"), "there is no reference policy without beta"),
        (dict(sync_ref_model=True), "there is no reference policy without beta"),
        (dict(beta=0.1, ref_model_sync_steps=4), "it is read with sync_ref_model alone"),
        (dict(importance_sampling_clip_max=2.0), "it is read with importance_sampling_mode alone"),
    ],
)
def test_what_a_loss_does_not_read_is_an_error(fields, why):
    *_, name = fields
    name = "epsilon" if "epsilon" in fields and fields["loss_type"] == "cispo" else name
    with pytest.raises(UserError, match=f"LossConfig.{name} = .* must be left at .*, since {why}"):
        LossConfig(**fields)


def test_every_loss_has_a_config_and_dr_grpo_its_length():
    for loss_type in ("grpo", "bnpo", "dapo", "cispo", "sapo", "luspo", "vespo", "reinforce"):
        assert LossConfig(loss_type).loss_type == loss_type
    with pytest.raises(UserError, match=r"dr_grpo_length = None .* a positive number for loss_type 'dr_grpo'"):
        LossConfig("dr_grpo")


def test_fields_that_depend_on_each_other_are_set_in_any_order():
    base = dict(task=None, rewards={"one": len})
    changes = {"loss.loss_type": "dr_grpo", "loss.dr_grpo_length": 8, "steps": 3}
    for order in (list(changes), list(changes)[::-1]):
        changed = experiment.override(Experiment(**base), {name: changes[name] for name in order})
        assert (changed.loss, changed.steps) == (LossConfig("dr_grpo", dr_grpo_length=8), 3)
        assignments = [f"{name}={changes[name]}" for name in order]
        assert experiment.parse_overrides(Experiment(**base), assignments) == changes
    changed = experiment.override(changed, {"num_iterations": 2})
    back = experiment.override(changed, {"loss": LossConfig("sapo"), "loss.sapo_temperature_pos": 2.0})
    assert back.loss == LossConfig("sapo", sapo_temperature_pos=2.0)


# Ablations -----------------------------------------------------------------------------------------------------------

ABLATION = (
    FILE
    + """
    arms = {"base": {}, "same": {"loss.beta": 0.0}, "small": {"group_size": 2}}
    ablation = Ablation(base=config, arms=arms, seeds=(3, 4))
"""
)


def test_an_ablation_plans_every_arm_at_every_seed_seed_by_seed_and_nothing_twice(write):
    runs = experiment.load_ablation(write(ABLATION)).runs()
    assert [(run.arms, run.seed) for run in runs] == [
        (("base", "same"), 3),
        (("small",), 3),
        (("base", "same"), 4),
        (("small",), 4),
    ]
    assert [(run.config.group_size, run.config.seed) for run in runs] == [(8, 3), (2, 3), (8, 4), (2, 4)]
    assert len({run.key for run in runs}) == 4


def test_an_arm_with_another_reward_of_the_same_name_is_another_run():
    rewards = {"less": {"rewards": {"r": lambda **_: 0}}, "more": {"rewards": {"r": lambda **_: 1}}}
    assert len(experiment.Ablation(base=toy(), arms=rewards, seeds=[0]).runs()) == 2


def test_a_budget_of_tokens_ends_every_arm_where_the_base_has_no_room_left(write):
    path = write(ABLATION)
    ends = {run.arms[-1]: (run.config.steps, run.config.token_budget) for run in experiment.load_ablation(path).runs()}
    assert ends == {"same": (7, None), "small": (7, None)}
    room = 7 * 8 * 8 * 16  # steps x prompts x group x max_tokens
    runs = {run.arms[-1]: run.config for run in experiment.load_ablation(path, "tokens").runs()}
    assert [runs[arm].token_budget for arm in ("same", "small")] == [room, room]
    # Even completions of one token each use it up.
    assert runs["same"].steps * 8 * 8 == runs["small"].steps * 8 * 2 == room


def test_a_budget_of_tokens_has_room_for_every_turn_of_a_game():
    task = SimpleNamespace(name="game", train=[{"prompt": "a"}], held_out=[], max_turns=6)
    (run,) = experiment.Ablation(base=toy(task=task, steps=7), arms={"base": {}}, seeds=[0], budget="tokens").runs()
    assert run.config.token_budget == 7 * 8 * 8 * 6 * 16  # steps x prompts x group x turns x max_tokens


def test_a_budget_of_tokens_leaves_a_warm_start_its_steps():
    base = toy(steps=7, warm_start={"group_size": 4})
    (run,) = experiment.Ablation(base=base, arms={"base": {}}, seeds=[0], budget="tokens").runs()
    start = experiment.variant_of(run.config, run.config.warm_start)
    assert (start.steps, start.token_budget, start.group_size) == (7, None, 4)


def test_a_budget_of_tokens_needs_a_schedule_that_does_not_know_the_last_step():
    base = toy(optimizer=experiment.OptimizerConfig(schedule="linear"))
    said = message(lambda: experiment.Ablation(base=base, arms={"base": {}}, budget="tokens"))
    assert "arm 'base'" in said and "Experiment.token_budget" in said and "'constant'" in said


def test_one_arm_of_an_ablation_loads_as_an_experiment(write):
    path = write(ABLATION)
    config = experiment.load(path, ["arm=small", "seed=4", "budget=tokens"])
    assert (config.group_size, config.seed, config.token_budget) == (2, 4, 7 * 8 * 8 * 16)
    planned = {(run.arms[-1], run.seed): run.config for run in experiment.load_ablation(path, "tokens").runs()}
    assert experiment.to_dict(config) == experiment.to_dict(planned["small", 4])
    assert "choose one of its arms: --set arm=base|same|small" in message(lambda: experiment.load(path))


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"arms": {}}, "at least one arm"),
        ({"seeds": ()}, "at least one seed"),
        ({"seeds": (1, 1)}, "each once"),
        ({"baseline": "bse"}, "one of ['base']"),
        ({"arms": {"base": {}, "typo": {"loss.betta": 1.0}}}, "arm 'typo': 'loss.betta' is not a field"),
        ({"arms": {"base": {"seed": 1}}}, "arm 'base' sets 'seed': that is for the ablation's `seeds`"),
        ({"arms": {"base": {"steps": 1}}}, "arm 'base' sets 'steps': that is for the ablation's `budget`"),
        ({"budget": "time"}, "wrong type"),
    ],
)
def test_a_wrong_ablation_is_one_sentence(fields, says):
    assert says in message(lambda: experiment.Ablation(**{"base": toy(), "arms": {"base": {}}, **fields}))


def test_a_file_without_an_ablation_says_what_it_lacks(write):
    assert "exports no ablation" in message(lambda: experiment.load_ablation(write(FILE)))
