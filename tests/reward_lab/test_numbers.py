"""What the reward laboratory passes on, prints and saves: which reward, group and column each number comes from."""

import io
import json
import math
import random
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console

from grpo_jax.experiment import AdvantageConfig, Experiment, RewardConfig, SamplingConfig
from grpo_jax.policy.tokenizer import CharacterTokenizer
from grpo_jax.report.plots import GREY, ORANGE
from grpo_jax.reward_lab import attacks, groups, readings
from grpo_jax.reward_lab import study as reward_study
from grpo_jax.reward_lab.attacks import Attack, AttackConfig, Honest, Target
from grpo_jax.reward_lab.groups import Groups
from grpo_jax.reward_lab.readings import Agreement, Reading, Signal, score_variants, signal
from grpo_jax.reward_lab.shaping import Shaping
from grpo_jax.tasks import Task

TOKENIZER = CharacterTokenizer("abc[]")


def never(*, completions, **_):
    return [False] * len(completions)


def length(*, completions, **_):
    return [float(len(c)) for c in completions]


def letter_a(*, completions, **_):
    return [float(c.count("a")) for c in completions]


TASK = Task("toy", [{"prompt": str(i)} for i in range(20)], [{"prompt": f"h{i}"} for i in range(80)], success=never)


def make_experiment(**fields) -> Experiment:
    rewards = {"length": length, "a": letter_a}
    return Experiment(
        **{"task": TASK, "rewards": rewards, "sampling": SamplingConfig(max_tokens=6), "seed": 3, **fields}
    )


def make_groups(*texts: str, size: int = 2) -> Groups:
    n = len(texts)
    arguments = {"prompts": [f"p{i}" for i in range(n)], "completions": list(texts), "completion_ids": [[0]] * n,
                 "number": list(range(n))}  # fmt: skip
    return Groups("by hand", arguments, size, [7] * (n // size))


def cells(table) -> tuple[list[str], list[list[str]]]:
    console = Console(file=io.StringIO(), width=250)
    console.print(table)
    lines = console.file.getvalue().splitlines()
    header = next(line for line in lines if "┃" in line)
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in lines if line.startswith("│")]
    return [cell.strip() for cell in header.split("┃")[1:-1]], rows


# Readings ------------------------------------------------------------------------------------------------------------


def test_variants_are_the_rewards_alone_their_weighted_total_and_further_ones_without_weights():
    config = RewardConfig(weights={"a": 10.0, "length": 0.5})
    arguments = make_groups("a", "bb", "ab", "aa").arguments
    found = score_variants(arguments, 2, make_experiment(reward=config), {"more": length})
    assert {name: list(values) for name, values in found.items()} == {
        "length": [1, 2, 2, 2], "a": [1, 0, 1, 2], "total": [10.5, 1, 11, 21], "more": [1, 2, 2, 2]}  # fmt: skip
    normalised = RewardConfig(combine="normalize_then_sum")
    experiment = make_experiment(reward=normalised, advantages=AdvantageConfig(scale="none"))
    found = score_variants(arguments, 2, experiment, {"more": length})
    assert list(found["more"]) == [1, 2, 2, 2] and found["total"][0] == pytest.approx(0, abs=1e-3)


def test_a_failing_reward_is_dropped_or_raised_as_it_is_asked_for():
    def fails(*, completions, **_):
        raise ValueError("no")

    experiment = make_experiment(rewards={"fails": fails}, reward=RewardConfig(on_failure="drop", max_failure_rate=1.0))
    arguments = make_groups("a", "b").arguments
    assert np.isnan(score_variants(arguments, 1, experiment, {})["fails"]).all()
    with pytest.raises(Exception, match="no"):
        score_variants(arguments, 1, experiment, {}, on_failure="raise")


def test_the_numbers_of_a_signal():
    """Prompt 4 has the values 0 0 4 4, prompt 5 the values 1 1, of groups of 2, one of which has a reward missing."""
    rewards = np.array([[0.0, 4.0], [0.0, 4.0], [1.0, 1.0], [math.nan, 1.0]])
    found = signal(rewards, [4, 4, 5, 5])
    assert (found.mean, found.low, found.high, found.num_values) == (11 / 7, 0, 4, 3)
    assert found.std == pytest.approx(np.std([0, 4, 0, 4, 1, 1, 1]))
    assert (found.group_std, found.no_signal) == ((2 + 2 + 0 + 0) / 4, 2 / 4)
    assert found.predicted == pytest.approx((0.5 + 0.5 + 1 + 1) / 4)
    assert found.predicted_by_size == pytest.approx({g: (2 * 0.5**g + 1) / 2 for g in (2, 4, 8, 16, 32, 64)})


def test_a_reading_is_of_its_own_groups():
    found = readings.read(make_groups("a", "bb", "b", "b"), make_experiment(), {"more": letter_a})
    assert list(found.signals) == ["length", "a", "total", "more"]
    assert (found.signals["a"].no_signal, found.signals["length"].no_signal, found.signals["a"].mean) == (
        0.5,
        0.5,
        0.25,
    )
    assert [f"{each.first} {each.second}" for each in found.agreements] == [
        "length a", "length total", "length more", "a total", "a more", "total more"]  # fmt: skip
    assert set(found.components) == {"length", "a"}


def test_components_are_of_the_completions_that_have_a_total():
    """Of the first group's two, the parts deviate by 1 and 3 of 4; the second's only one, and the third none, count."""
    nan = math.nan
    parts = {"length": np.array([[0.0, 2.0, 9.0], [1.0, 7.0, 3.0], [5.0, 6.0, 7.0]]),
             "a": np.array([[0.0, 6.0, 9.0], [1.0, 2.0, 3.0], [5.0, 6.0, 7.0]])}  # fmt: skip
    total = np.array([[0.0, 8.0, nan], [2.0, nan, nan], [nan] * 3])
    advantages = np.array([[-1.0, 1.0, 0.0], [0.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    found = readings.component_shares(parts, total, advantages, make_experiment())
    assert found == {"length": pytest.approx(0.25), "a": pytest.approx(0.75)}
    gone = signal(np.array([[nan, nan], [1.0, 2.0]]), [0, 1])
    assert (gone.group_std, gone.no_signal, gone.num_values) == (0.5, 0, 2)
    assert signal(np.full((1, 2), nan), [0]).num_values == 0


# Groups --------------------------------------------------------------------------------------------------------------


def test_groups_are_sampled_of_as_many_prompts_at_each_temperature_with_new_samples_for_each_group(monkeypatch):
    calls = []

    def rollout(generator, task, batch, noise, sampling, time_limit):
        assert time_limit == 60.0  # reward.time_limit
        calls.append((generator, task, batch, noise.samples.tolist(), sampling))
        n = noise.samples.size
        columns = {"prompts": ["p"] * n, "completions": [f"t{sampling.temperature}"] * n, "completion_ids": [[1]] * n}
        return SimpleNamespace(reward_arguments=lambda: columns)

    asked = SimpleNamespace(batch=lambda split, indices: (split, list(indices)))
    monkeypatch.setattr(groups, "rollout", rollout)
    monkeypatch.setattr(groups, "encode_prompts", lambda task, tokenizer, longest, room: asked)
    generator = SimpleNamespace(tokenizer=TOKENIZER, max_positions=64)
    experiment = make_experiment(group_size=3, sampling=SamplingConfig(max_tokens=6, top_k=2))
    found = groups.sample_groups(generator, experiment, temperatures=[0.0, 1.5], num_prompts=2, num_groups=2)
    indices, ids = groups.schedule(3, 0, 2, 20)
    assert [(each.label, each.group_size, list(each.prompts)) for each in found] == [
        ("temperature 0", 3, [*ids, *ids]), ("temperature 1.5", 3, [*ids, *ids])]  # fmt: skip
    assert [len(each.arguments["completions"]) for each in found] == [12, 12]
    assert set(found[1].arguments["completions"]) == {"t1.5"}
    assert [samples for *_, samples, _ in calls] == [[[0, 1, 2]] * 2, [[3, 4, 5]] * 2] * 2
    assert [sampling for *_, sampling in calls] == [
        SamplingConfig(max_tokens=6, top_k=2, temperature=t) for t in (0.0, 0.0, 1.5, 1.5)]  # fmt: skip
    assert {(split, *chosen) for _, _, (split, chosen), *_ in calls} == {("train", *indices)}
    few = groups.sample_groups(generator, experiment, temperatures=[1.0], num_prompts=90, num_groups=1)
    assert len(few[0].prompts) == 20


def test_a_second_reward_of_the_same_name_is_called_by_its_module_too(tmp_path):
    for name in ("first_of_two", "second_of_two"):
        (tmp_path / f"{name}.py").write_text(f"def one(**_): return {name!r}")
    names = ["first_of_two:one", "second_of_two:one"]
    found = groups.import_rewards(names, tmp_path)
    assert {name: reward() for name, reward in found.items()} == {
        "one": "first_of_two", "second_of_two:one": "second_of_two"}  # fmt: skip


def test_saved_turns_are_read_with_the_ids_of_all_of_them(tmp_path):
    turns = [{"role": "assistant", "content": "ab"}, {"role": "user", "content": "c"},
             {"role": "assistant", "content": "c"}]  # fmt: skip
    rows = [{"prompt": "1", "completion": turns}, {"prompt": "1", "completion": "a"}]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = groups.read_groups(tmp_path / "x.jsonl", make_experiment(), TOKENIZER)
    assert found.arguments["completion_ids"] == [TOKENIZER.encode("ab") + TOKENIZER.encode("c"), TOKENIZER.encode("a")]
    assert (found.label, found.arguments["prompts"]) == ("x.jsonl", ["1", "1"])


# Attacks -------------------------------------------------------------------------------------------------------------


def test_what_an_attack_beats():
    honest = Honest("some", np.array([0.0, 1.0, 2.0]))
    assert honest.mean == 1.0 and not honest.is_beaten_by(1.0) and honest.is_beaten_by(1.001)
    assert (honest.share_below(1.0), honest.share_below(1.5), honest.share_below(9.0)) == (1 / 3, 2 / 3, 1)
    none = Honest("none", np.array([]))
    assert math.isnan(none.mean) and math.isnan(none.share_below(1.0)) and not none.is_beaten_by(9.0)


def test_a_warning_names_the_attacks_from_the_dearest_and_what_honest_attempts_earn():
    tried = [Attack("one", "x" * 41, 0.5, 0.0), Attack("two", "b", 0.75, 0.0), Attack("three", "c", 0.25, 0.0),
             Attack("four", "d", math.nan, 0.0)]  # fmt: skip
    honest = [
        Honest("completions", np.array([0.25])),
        Honest("nothing", np.array([])),
        Honest("shown", np.array([0.9])),
    ]
    assert attacks.warning("credit", tried, honest) == (
        "credit pays answers that ignore the prompt and are wrong 0.750 for 'b' (two), 0.500 for "
        f"'{'x' * 39}…' (one); honest attempts earn 0.250 (completions) and 0.900 (shown) on average."
    )
    assert attacks.warning("credit", tried[2:], honest) is None


def test_families_have_the_length_of_the_middle_demonstration_and_fill_the_room():
    texts = ["[a]", "[abc]", "[bb]"]
    made = attacks.families(texts, texts, ["a", " "], TOKENIZER, 6)
    assert made["empty"] == ["", " ", "[]", "[ ]"]
    assert made["repeated letter"] == ["aa", "[aa]"]  # of middles of 1, 3 and 2 characters
    assert made["repeated token"][0] == "[[[" and "[aaa]" in made["repeated token"]  # 6 - 2 - the end
    assert made["over-long"][:2] == ["[a][a]", "[a]" * 6] and made["honest, but blind"] == texts
    plain = attacks.families(["ab"], [], ["c"], TOKENIZER, 1)
    assert plain["repeated letter"] == ["c"] and plain["over-long"] == ["abab", "abab"]


def test_a_search_starts_from_answers_honest_texts_and_random_ones_of_their_lengths():
    found = attacks._starts(["x", lambda example: "y"], ["aa", "bbb"], ["z"], random.Random(0))
    assert found[0] == "x" and set(found) == {"x", "aa", "bbb", "zz", "zzz"}
    assert attacks._starts([], ["aa"], [], random.Random(0)) == ["aa"]
    many = attacks._starts([], [str(i) for i in range(9)], [], random.Random(0))
    assert len(many) == attacks.STARTS


def test_answers_are_scored_for_every_example_in_batches(monkeypatch):
    sizes = []

    def numbered(*, completions, number, **_):
        sizes.append(len(completions))
        return [len(c) + 10.0 * n for c, n in zip(completions, number, strict=True)]

    def right(*, completions, number, **_):
        return [c == "a" and n == 1 for c, n in zip(completions, number, strict=True)]

    monkeypatch.setattr(attacks, "BATCH", 4)
    examples = [{"prompt": "", "number": i} for i in range(2)]
    experiment = make_experiment(task=Task("t", examples, examples, success=right), rewards={"numbered": numbered})
    rewards, success = Target(experiment, {"a": letter_a}, TOKENIZER).score(["", "a", "x", "bb"], examples)
    np.testing.assert_array_equal(rewards["numbered"], [[0, 10], [1, 11], [math.nan] * 2, [2, 12]])
    np.testing.assert_array_equal(rewards["a"], [[0, 0], [1, 1], [math.nan] * 2, [0, 0]])
    assert success.tolist() == [[False] * 2, [False, True], [False] * 2, [False] * 2] and sizes == [4, 2]


def test_attacks_are_judged_on_the_examples_for_that_and_the_best_of_a_family_is_taken():
    examples = [{"prompt": "ab"}, {"prompt": "c"}]
    experiment = make_experiment(task=Task("t", examples[:1], examples[1:], success=never), rewards={"length": length})
    config = AttackConfig(examples[:1], examples[1:], ["a", "aaa"], ["b"], max_tokens=6, budget=10)
    found = {
        each.family: each for each in attacks.attack(Target(experiment, {}, TOKENIZER), ["length"], config)["length"]
    }
    assert (found["honest, but blind"].text, found["honest, but blind"].value) == ("aaa", 3)
    assert found["echoed prompt"].text.count("c") == 1  # chosen on the first example, shown and judged on the second
    assert found["over-long"].value == 18 and found["empty"].success == 0


def test_an_episode_ends_with_the_policys_last_turn():
    def reply(example, turns):
        return f"heard {len(turns)}"

    seen = []
    rewards = {"spy": lambda *, completions, **_: [seen.append(c) or 0.0 for c in completions]}
    task = Task("game", [{"prompt": "b"}], [{"prompt": "c"}], success=never, reply=reply, max_turns=3)
    Target(make_experiment(task=task, rewards=rewards), {}, TOKENIZER).score(["a"], task.train)
    assert [message["content"] for message in seen[0]] == ["a", "heard 1", "a", "heard 2", "a"]


def test_without_demonstrations_the_template_and_the_lengths_are_those_of_the_completions(monkeypatch):
    asked = []
    monkeypatch.setattr(attacks, "families", lambda *arguments: asked.append(arguments) or {})
    monkeypatch.setattr(attacks, "_starts", lambda *arguments: asked.append(arguments) or [])
    experiment = make_experiment(task=Task("t", [{"prompt": ""}], [{"prompt": ""}], success=never))
    target = Target(experiment, {}, TOKENIZER)
    for shown in ([], ["[c]"]):
        config = AttackConfig(TASK.train, TASK.train, shown, ["ab", "a", "ab"], max_tokens=6, budget=10)
        assert attacks.attack(target, ["length"], config) == {"length": []}
    (first, starts, second, _) = asked
    assert first == (["ab", "a"], ["ab", "a", "ab"], ["a", "b"], TOKENIZER, 6)
    assert second[:2] == (["[c]", "ab", "a"], ["[c]"]) and starts[1:3] == (["ab", "a"], ["a", "b"])


# The study -----------------------------------------------------------------------------------------------------------


def test_a_study_attacks_with_these_examples_answers_and_limits(monkeypatch):
    asked = {}
    monkeypatch.setattr(reward_study, "attack", lambda *arguments: asked.update(found=arguments) or {})
    task = replace(TASK, demonstrate=lambda example, rng: [f"[{example['prompt']}]"])
    sets = [make_groups("a", "bb"), make_groups("c", "c")]
    tokenizer = CharacterTokenizer("0123456789abc[]")
    found = reward_study.study(sets, make_experiment(task=task), tokenizer, {"more": length}, budget=9)
    target, names, config = asked["found"]
    assert names == ["length", "a", "total", "more"] and list(target.extra) == ["more"]
    assert (list(config.search_on), list(config.judge_on)) == (task.train[:8], task.held_out[:64])
    assert (config.completions, config.max_tokens, config.budget, config.seed) == (["a", "bb"], 6, 9, 3)
    assert set(config.demonstrations) == {f"[{i}]" for i in range(20)} and len(config.demonstrations) == 20 * 25
    assert [(h.source, len(h.values)) for h in found.honest["length"]] == [("completions", 2), ("demonstrations", 500)]
    assert (found.honest["length"][0].mean, found.honest["length"][1].mean) == (1.5, 3.5)
    found = reward_study.study(sets, make_experiment(), TOKENIZER, {}, budget=9)
    assert asked["found"][2].demonstrations == []
    assert [h.source for h in found.honest["a"]] == ["completions"]


SHAPING = Shaping(2, 0, 0, 0, "one", {})
NUMBERS = Signal(0.25, 0.5, -1.0, 2.0, 3, 0.125, 0.75, 1.0, {2: 0.5})


def reading(*texts: str) -> Reading:
    found = make_groups(*texts)
    rewards = {"one": np.arange(float(len(texts))).reshape(-1, 2), "two": np.full((len(texts) // 2, 2), math.nan)}
    advantages = {"one": rewards["one"] - 1.0, "two": np.zeros_like(rewards["two"])}
    agreements = [Agreement("one", "two", -0.5, 3, 0.25), Agreement("two", "x", math.nan, 0, 0.0)]
    return Reading(
        found, rewards, advantages, {"one": NUMBERS, "two": NUMBERS}, agreements, {"one": 1.25, "two": -0.25}, SHAPING
    )


def test_every_table_has_its_numbers_in_their_columns():
    found = reading("a", "b", "c", "c")
    assert cells(reward_study.group_table(found, 0)) == (
        ["completion", "×", "one", "A", "two", "A"],
        [["a", "1", "0.000", "-1.00", "–", "+0.00"], ["b", "1", "1.000", "+0.00", "–", "+0.00"]],
    )
    assert cells(reward_study.group_table(found, 1))[1] == [["c", "2", "2.000", "+1.00", "–", "+0.00"]]
    header, rows = cells(reward_study.signal_table([found, found]))
    assert header == ["groups", "reward", "mean", "range", "values", "std", "std in group", "no signal", "by theory"]
    assert rows[:2] == [
        ["by hand (n = 2)", "one", "0.250", "-1 – 2", "3", "0.500", "0.125", "75.0 %", "100 %"],
        ["", "two", "0.250", "-1 – 2", "3", "0.500", "0.125", "75.0 %", "100 %"],
    ]
    assert len(rows) == 4 and rows[2][0] == "by hand (n = 2)"
    assert cells(reward_study.agreement_table([found])) == (
        ["groups", "rewards", "tau", "sign flips"],
        [["by hand", "one and two", "-0.50", "25.0 %"], ["", "two and x", "–", "0 %"]],
    )
    assert cells(reward_study.component_table([replace(found, components={}), found])) == (
        ["groups", "one", "two"], [["by hand", "125.0 %", "-25.0 %"]])  # fmt: skip
    assert reward_study.component_table([replace(found, components={})]).row_count == 0


def test_the_table_of_attacks_says_how_many_honest_attempts_earn_less():
    honest = [Honest("completions", np.array([0.0, 1.0])), Honest("demonstrations", np.array([]))]
    tried = [Attack("one", "abc", 0.75, 0.0), Attack("two", "x" * 50, math.nan, 1.0)]
    assert cells(reward_study.attack_table("credit", tried, honest)) == (
        ["attack", "answer", "earns", "beats completions", "beats demonstrations"],
        [["one", "abc", "0.750", "50.0 %", "–"], ["two", "x" * 39 + "…", "–", "–", "–"],
         ["honest, mean", "2 completions, median 0.500", "0.500", "", ""]],
    )  # fmt: skip


def test_a_long_group_is_cut_and_only_so_many_groups_are_shown():
    texts = [f"t{i}" for i in range(10)]
    many = replace(reading(*texts), groups=make_groups(*texts, size=10))
    many.rewards["one"], many.advantages["one"] = np.zeros((1, 10)), np.zeros((1, 10))
    many.rewards["two"], many.advantages["two"] = np.zeros((1, 10)), np.zeros((1, 10))
    _, rows = cells(reward_study.group_table(many, 0))
    assert [row[0] for row in rows] == [*texts[:8], "and 2 more"]
    for number in (0, 1, 9):
        console = Console(file=io.StringIO(), width=250)
        study = reward_study.Study([reading("a", "b", "c", "c")], {}, {}, ["careful"])
        reward_study.show(study, console, num_groups=number)
        shown = console.file.getvalue()
        assert [f"group {p} of 2" in shown for p in (1, 2)] == [number > 0, number > 1] and "warning: careful" in shown


def test_what_is_saved_is_under_its_name(tmp_path):
    honest = {"one": [Honest("completions", np.array([0.0, 1.0, 5.0])), Honest("none", np.array([]))]}
    tried = {"one": [Attack("empty", "", 0.5, 0.25)]}
    study = reward_study.Study([reading("a", "b", "c", "c")], honest, tried, ["careful"])
    (tmp_path / "groups.jsonl").write_text("old\n")
    assert reward_study.save(study, tmp_path) == [tmp_path / n for n in ("rewards.json", "groups.jsonl", "rewards.png")]
    found = json.loads((tmp_path / "rewards.json").read_text())
    numbers = {"mean": 0.25, "std": 0.5, "low": -1.0, "high": 2.0, "num_values": 3, "group_std": 0.125,
               "no_signal": 0.75, "predicted": 1.0, "predicted_by_size": {"2": 0.5}}  # fmt: skip
    assert found == {
        "readings": [{
            "groups": "by hand", "num_groups": 2, "group_size": 2, "signals": {"one": numbers, "two": numbers},
            "agreements": [
                {"first": "one", "second": "two", "tau": -0.5, "num_groups": 3, "flips": 0.25},
                {"first": "two", "second": "x", "tau": None, "num_groups": 0, "flips": 0.0},
            ],
            "components": {"one": 1.25, "two": -0.25},
            "shaping": {
                "num_groups": 2, "no_success": 0, "no_outcome": 0, "flagged": 0, "outcome": "one", "causes": {},
                "share": 0.0,
            },
        }],
        "honest": {"one": [{"source": "completions", "num": 3, "mean": 2.0, "median": 1.0}]},
        "attacks": {"one": [{"family": "empty", "text": "", "value": 0.5, "success": 0.25}]},
        "warnings": ["careful"],
    }  # fmt: skip
    rows = [json.loads(line) for line in (tmp_path / "groups.jsonl").read_text().splitlines()]
    assert rows[3] == {
        "step": "by hand", "prompt_id": "7.1", "sample": 1, "prompt": "p2", "completion": "c",
        "rewards": {"one": 3.0, "two": None}, "advantages": {"one": 2.0, "two": 0.0}, "columns": {"number": 2},
    }  # fmt: skip
    assert [(row["prompt_id"], row["sample"], row["columns"]["number"]) for row in rows] == [
        ("7.0", 0, 0), ("7.0", 1, 0), ("7.1", 0, 2), ("7.1", 1, 2)]  # fmt: skip


def test_the_picture_draws_theory_observation_attacks_and_honest_means(tmp_path, monkeypatch):
    drawn, bars = [], []
    barh = Axes.barh
    monkeypatch.setattr(Figure, "savefig", lambda self, *_, **__: drawn.append(self))
    monkeypatch.setattr(Axes, "barh", lambda self, *a, **k: bars.append((a, k)) or barh(self, *a, **k))
    one = reading("a", "b", "c", "c")
    one.rewards["two"] = np.ones((2, 2))
    honest = {"one": [Honest("completions", np.array([0.25]))]}
    tried = {"one": [Attack("x", "abc", 0.5, 0.0), Attack("y", "d", 0.125, 0.0), Attack("z", "e", math.nan, 1.0)]}
    reward_study.draw(reward_study.Study([one], honest, tried, []), tmp_path / "r.png")
    rewards, by_size, attacked, *second = drawn[0].axes
    assert rewards.get_title("left") == "one: rewards" and second[0].get_title("left") == "two: rewards"
    assert [line.get_xydata().tolist() for line in by_size.lines] == [[[2, 0.5]], [[2, 0.75]]]
    [((names, values), style)] = bars
    assert (names, values, style["color"]) == (["x\nabc", "y\nd"], [0.5, 0.125], [ORANGE, GREY])
    assert attacked.lines[0].get_xdata() == [0.25, 0.25] and attacked.lines[0].get_label() == "honest: completions"


def test_a_reward_that_applies_to_no_completion_is_studied_and_drawn_without_numbers(tmp_path):
    """Such as one of a column that no example has: the study is of the others, and does not end."""

    def nothing(*, completions, **_):
        return [None] * len(completions)

    experiment = make_experiment(rewards={"length": length, "nothing": nothing})
    found = reward_study.study([make_groups("a", "bb")], experiment, TOKENIZER, {}, budget=20)
    assert math.isnan(found.readings[0].signals["nothing"].mean) and found.readings[0].signals["length"].mean == 1.5
    reward_study.save(found, tmp_path)
    assert json.loads((tmp_path / "rewards.json").read_text())["readings"][0]["signals"]["nothing"]["mean"] is None
    reward_study.show(found, Console(file=io.StringIO()))


@pytest.mark.parametrize(("budget", "texts"), [(10, 1), (105, 5)])
def test_a_budget_of_completions_is_shared_by_the_examples_that_a_text_is_tried_on(monkeypatch, budget, texts):
    asked = []
    monkeypatch.setattr(attacks, "families", lambda *arguments: {})
    monkeypatch.setattr(attacks, "search", lambda value, starts, symbols, allowed, rng: asked.append(allowed))
    config = AttackConfig(TASK.train, TASK.held_out, [], ["ab"], max_tokens=6, budget=budget)
    attacks.attack(Target(make_experiment(), {}, TOKENIZER), ["length"], config)
    assert asked == [texts]  # of 20 examples
