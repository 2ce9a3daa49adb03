"""Loading an experiment from a file, checking it, and overriding its fields."""

import dataclasses
import functools
import hashlib
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
from grpo_jax.experiment.fingerprint import fingerprint

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
        ("control.steps=8", "is None here"),
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


@given(st.floats(1e-30, 10), st.integers(0, 2**31 - 1), st.booleans())
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


def test_an_ablation_has_ten_seeds_and_is_about_held_out_success_at_equal_steps_unless_it_says_otherwise():
    ablation = experiment.Ablation(base=toy(), arms={"first": {}, "second": {"group_size": 2}})
    assert (list(ablation.seeds), ablation.metric, ablation.budget) == (list(range(10)), "evaluation/success", "steps")
    assert (ablation.baseline, ablation.baseline_arm) == (None, "first")
    assert dataclasses.replace(ablation, baseline="second").baseline_arm == "second"


def test_an_arm_at_a_seed_is_the_base_with_its_overrides_and_that_seed():
    ablation = experiment.Ablation(base=toy(seed=9), arms={"base": {}, "other": {"loss.beta": 0.25}}, seeds=(4, 5))
    configs = {(arm, seed): ablation.experiment(arm, seed) for arm in ("base", "other") for seed in (4, 5)}
    assert {key: (config.loss.beta, config.seed) for key, config in configs.items()} == {
        ("base", 4): (0.0, 4), ("base", 5): (0.0, 5), ("other", 4): (0.25, 4), ("other", 5): (0.25, 5),
    }  # fmt: skip
    assert [run.config for run in ablation.runs()] == [configs[arm, s] for s in (4, 5) for arm in ("base", "other")]


def test_a_run_is_named_by_its_config_and_by_its_config_without_files():
    arms = {"a": {}, "b": {"loss.beta": 0.5}, "c": {"loss.beta": 0.0}, "d": {}}
    ablation = experiment.Ablation(base=toy(rewards={"r": lambda **_: 1}), arms=arms, seeds=(7,))
    first, second = ablation.runs()
    assert (first.arms, second.arms, first.seed) == (("a", "c", "d"), ("b",), 7)
    for run in (first, second):
        assert run.key == fingerprint(run.config) != run.config_key == fingerprint(run.config, files=False)
    ablation.runs().clear()
    assert len(ablation.runs()) == 2


def test_a_budget_of_tokens_gives_every_arm_the_steps_that_the_shortest_completions_need():
    """The base has room for 3 x 4 x 5 x 7 = 420 tokens. An arm of 4 groups of 8 needs at most 420 / 32 = 13.1 steps."""
    base = toy(steps=3, prompts_per_step=4, group_size=5, sampling=experiment.SamplingConfig(max_tokens=7))
    arms = {"base": {}, "wide": {"group_size": 8}, "long": {"sampling.max_tokens": 70, "prompts_per_step": 2}}
    ablation = experiment.Ablation(base=base, arms=arms, seeds=[0], budget="tokens")
    found = {run.arms[0]: (run.config.token_budget, run.config.steps) for run in ablation.runs()}
    assert found == {"base": (420, 21), "wide": (420, 14), "long": (420, 42)}


def test_a_warm_start_keeps_the_steps_that_it_names_under_a_budget_of_tokens():
    base = toy(steps=7, warm_start={"steps": 3, "group_size": 4})
    arms = {"base": {}, "other": {"warm_start": {"loss.beta": 0.1}}}
    runs = experiment.Ablation(base=base, arms=arms, seeds=[0], budget="tokens").runs()
    starts = [experiment.variant_of(run.config, run.config.warm_start) for run in runs]
    assert [(start.steps, start.token_budget, start.loss.beta) for start in starts] == [(3, None, 0.0), (7, None, 0.1)]


@pytest.mark.parametrize(
    ("field", "instead"),
    [
        ("seed", "`seeds`"),
        ("steps", "`budget`, which gives every arm its steps"),
        ("token_budget", "`budget`, which gives every arm its tokens"),
    ],
)
def test_what_is_the_ablations_is_not_for_an_arm(field, instead):
    said = message(lambda: experiment.Ablation(base=toy(), arms={"base": {}, "bad": {field: 5}}))
    assert said == f"arm 'bad' sets {field!r}: that is for the ablation's {instead}."


def test_a_mistake_that_only_an_arm_makes_is_named_with_the_arm():
    said = message(lambda: experiment.Ablation(base=toy(), arms={"base": {}, "small": {"group_size": 1}}))
    assert said.startswith("arm 'small': Experiment.group_size = 1 is out of range: it must be at least 2")
    said = message(lambda: experiment.Ablation(base=toy(), arms={"b": {}, "a": {}}, baseline="c"))
    assert said == "Ablation.baseline = 'c' is out of range: it must be None or one of ['a', 'b']."


def test_assignments_of_an_ablation_are_for_its_base_and_an_arm_keeps_what_it_sets(write):
    path = write(ABLATION)
    ablation = experiment.load_ablation(path, None, ["group_size=6", "loss.beta=0.5", "prompts_per_step=3"])
    sizes = {run.arms[0]: run.config.group_size for run in ablation.runs()}
    assert sizes == {"base": 6, "same": 6, "small": 2} and ablation.budget == "steps"
    betas = {run.arms: run.config.loss.beta for run in ablation.runs()}
    assert betas == {("base",): 0.5, ("same",): 0.0, ("small",): 0.5}
    assert all(run.config.prompts_per_step == 3 for run in ablation.runs())
    tokens = write(ABLATION.replace("seeds=(3, 4))", 'seeds=(3, 4), budget="tokens")'), name="tokens.py")
    assert experiment.load_ablation(tokens).budget == "tokens"
    assert experiment.load_ablation(tokens, "steps").budget == "steps"


def test_an_arm_is_loaded_with_the_bases_seed_and_with_assignments_of_its_own(write):
    path = write(ABLATION.replace("steps=7", "steps=7, seed=6"))
    config = experiment.load(path, ["loss.beta=0.5", "arm=small", "steps=9"])
    assert (config.group_size, config.seed, config.loss.beta, config.steps) == (2, 6, 0.5, 9)
    assert "wrong type" in message(lambda: experiment.load(path, ["arm=small", "budget=time"]))
    assert "choose one of its arms" in message(lambda: experiment.load(path, ["arm=smal"]))


# Runs ----------------------------------------------------------------------------------------------------------------


def run_of(tmp_path, info: dict, name: str = "one"):
    run_dir = tmp_path / name
    run_dir.mkdir(parents=True)
    (run_dir / "run.json").write_text(json.dumps(info))
    return run_dir


def test_the_assignments_of_a_run_are_those_that_it_began_with_and_then_those_of_every_visit(write, tmp_path):
    visits = [{"overrides": ["steps=9", "seed=2"], "code": None}, {"overrides": ["steps=11"], "code": None}]
    info = {"source": None, "overrides": ["seed=1", "loss.beta=0.5"], "resumed": visits}
    assert experiment.all_overrides(info) == ["seed=1", "loss.beta=0.5", "steps=9", "seed=2", "steps=11"]
    assert experiment.all_overrides({"overrides": ["seed=1"]}) == ["seed=1"]
    run = run_of(tmp_path, info)
    (run / "experiment.py").write_text(textwrap.dedent(FILE))
    config = experiment.load_run(run, ["loss.beta=0.25"])
    assert (config.steps, config.seed, config.loss.beta) == (11, 2, 0.25)


def test_the_files_of_a_run_are_those_of_its_last_visit_that_changed_them(write, tmp_path):
    def code(name: str) -> dict:
        return {"directory": name, "entry": "sub/toy.py", "paths": ["."], "files": {}}

    none, two, three = {"code": None}, {"code": code("code-2")}, {"code": code("code-3")}
    assert experiment.code_of({"code": code("code")}) == code("code")
    assert experiment.code_of({"code": code("code"), "resumed": [none]}) == code("code")
    info = {"source": "x", "overrides": [], "code": code("code"), "resumed": [two, three, none]}
    assert experiment.code_of(info) == code("code-3") and experiment.code_of({"resumed": []}) is None
    run = run_of(tmp_path, {**info, "resumed": [{**visit, "overrides": []} for visit in info["resumed"]]})
    assert experiment.code_folder(run) == run / "code-3" / "sub"
    old = run_of(tmp_path, {"source": None}, "old")
    assert experiment.code_folder(old) == old
    for number, folder in enumerate(("code", "code-2", "code-3")):
        (run / folder / "sub").mkdir(parents=True)
        text = FILE.replace("steps=7", f"steps={number}")
        (run / folder / "sub" / "toy.py").write_text(textwrap.dedent(text))
    assert experiment.load_run(run).steps == 2


def test_a_warm_start_and_a_control_are_variants_of_the_run_that_they_lie_in(tmp_path):
    text = FILE.replace("steps=7", 'steps=7, warm_start={"steps": 2}, control={"loss.beta": 0.5}')
    run = run_of(tmp_path, {"source": None, "overrides": ["seed=4"]})
    (run / "experiment.py").write_text(textwrap.dedent(text))
    for name in ("warm_start", "control"):
        run_of(run, {"source": None, "overrides": []}, name)
    start, control = (experiment.load_run(run / name, ["group_size=3"]) for name in ("warm_start", "control"))
    assert (start.steps, start.loss.beta, start.seed, start.group_size) == (2, 0.0, 4, 3)
    assert (control.steps, control.loss.beta, control.seed, control.group_size) == (7, 0.5, 4, 3)
    assert start.warm_start is None and control.control is None
    named = run_of(tmp_path, {"source": str(run / "experiment.py"), "overrides": ["seed=5"]}, "control")
    (named / "experiment.py").write_text(textwrap.dedent(text))
    assert experiment.load_run(named).seed == 5  # a run that is only called so


def test_a_directory_without_a_run_and_one_with_a_damaged_record_are_told_apart(tmp_path):
    said = message(lambda: experiment.read_run(tmp_path))
    assert said == f"{str(tmp_path)!r} is not the directory of a run: there is no run.json in it."
    (tmp_path / "run.json").write_text("{")
    said = message(lambda: experiment.read_run(tmp_path))
    assert said == f"{str(tmp_path)!r} is not the directory of a run: its run.json cannot be read."


def test_a_config_becomes_json_with_all_its_parts():
    class Mine(experiment.Method):
        name = "mine"

        def __init__(self):
            self.strength = 3

    found = experiment.to_dict(toy(method=Mine(), rewards={"half": functools.partial(max, 1, key=2)}))
    assert found["method"]["name"] == "mine" and found["method"]["strength"] == 3
    assert found["method"]["class"].endswith(
        "test_experiment.test_a_config_becomes_json_with_all_its_parts.<locals>.Mine"
    )
    assert found["rewards"]["half"] == {"function": "builtins.max", "args": [1], "keywords": {"key": 2}}
    rows = [{"prompt": "a"}, {"prompt": "b"}]
    one = SimpleNamespace(name="toy", train=rows, held_out=rows[:1])
    described = experiment.to_dict(one)
    assert (described["name"], described["train"], described["held_out"]) == ("toy", 2, 1)
    text = json.dumps({"train": rows, "held_out": rows[:1]}, sort_keys=True)
    assert described["sha256"] == hashlib.sha256(text.encode()).hexdigest()[:16]
    assert experiment.to_dict((1, [2, {3: None}])) == [1, [2, {"3": None}]]


# Checks --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"steps": -1}, "Experiment.steps = -1 is out of range: it must be 0 or above, or None with epochs"),
        ({"token_budget": 0}, "Experiment.token_budget = 0 is out of range: it must be None, or positive"),
        ({"prompts_per_step": 0}, "Experiment.prompts_per_step = 0 is out of range: it must be positive."),
        ({"num_iterations": 0}, "Experiment.num_iterations = 0 is out of range: it must be positive, and 1 for"),
        ({"num_iterations": 2, "loss": LossConfig("reinforce")}, "Experiment.num_iterations = 2 is out of range"),
        ({"dynamic_sampling_rounds": -1}, "dynamic_sampling_rounds = -1 is out of range: it must be between 0"),
        ({"gradient_accumulation_steps": 0}, "divides the 8 groups of 8 completions of a step into equal parts."),
        ({"seed": -1}, "Experiment.seed = -1 is out of range: it must be between 0 and 2**31 - 1."),
        ({"seed": 2**31}, "is out of range: it must be between 0 and 2**31 - 1."),
        ({"devices": 0}, "Experiment.devices = 0 is out of range: it must be positive, or None for all local devices."),
        ({"checkpoint_every": 0}, "Experiment.checkpoint_every = 0 is out of range: it must be positive."),
        ({"method": "grppo"}, "there is no method 'grppo'; did you mean 'grpo'?"),
        ({"method": "sft", "dynamic_sampling_rounds": 1}, "dynamic_sampling_rounds is set, but method 'sft'"),
        ({"reward": RewardConfig(weights={"z": 1.0, "b": 1.0})}, "names 'b', which is no reward of this experiment"),
        ({"policy": PolicyConfig(lora=LoRAConfig()),
          "loss": LossConfig(beta=0.1, sync_ref_model=True, ref_model_mixup_alpha=0.5)}, "ref_model_mixup_alpha = 0.5"),
        ({"steps": "7"}, "Experiment.steps = '7' has the wrong type: it must be int | None."),
        ({"devices": 1.5}, "Experiment.devices = 1.5 has the wrong type: it must be int | None."),
    ],
)  # fmt: skip
def test_what_is_out_of_range_is_named_with_what_would_be_right(fields, says):
    assert says in message(lambda: toy(**fields))


def test_the_ends_of_the_ranges_are_in_them():
    lora = PolicyConfig(lora=LoRAConfig())
    for fields in (
        {"steps": 0, "seed": 2**31 - 1, "devices": 1, "checkpoint_every": 1, "prompts_per_step": 1},
        {"token_budget": 1}, {"num_iterations": 2}, {"num_iterations": 1, "loss": LossConfig("reinforce")},
        {"gradient_accumulation_steps": 8}, {"dynamic_sampling_rounds": 0}, {"loss": len, "num_iterations": 2},
        {"policy": lora, "loss": LossConfig(beta=0.1, sync_ref_model=True, ref_model_mixup_alpha=1.0)},
        {"loss": LossConfig(beta=0.1, sync_ref_model=True, ref_model_mixup_alpha=0.5)},
    ):  # fmt: skip
        assert toy(**fields).rewards == {"length": len}
    assert toy(loss=len).loss_config == LossConfig() and toy(loss=LossConfig(beta=0.5)).loss_config.beta == 0.5


def test_a_file_without_an_ablation_says_what_it_lacks(write):
    assert "exports no ablation" in message(lambda: experiment.load_ablation(write(FILE)))
