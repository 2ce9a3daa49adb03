"""The whole study behind `grpo-jax rewards`: readings and attacks together, printed as tables and saved with a plot."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from rich.text import Text

from grpo_jax.experiment import Experiment
from grpo_jax.policy import Tokenizer
from grpo_jax.report.plots import BLUE, GREEN, GREY, ORANGE, PURPLE, STYLE
from grpo_jax.reward_lab.attacks import Attack, AttackConfig, Honest, Target, attack, warning
from grpo_jax.reward_lab.groups import Groups
from grpo_jax.reward_lab.readings import TOTAL, Reading, read, score_variants
from grpo_jax.reward_lab.shaping import sentence as shaping_sentence
from grpo_jax.rewards import RewardFunction, turns
from grpo_jax.rollout import Prompts, demonstrations, example_row, name_noise
from grpo_jax.runs.display import example_title, visible
from grpo_jax.runs.files import append_rows, write_json, writing
from grpo_jax.text import on_line

SEARCH_EXAMPLES, JUDGE_EXAMPLES = 8, 64  # that attacks are chosen on, and judged on
DEMONSTRATIONS = 512  # the most honest answers of each source that attacks are made from
SHOWN = 8  # completions of a group in its table


@dataclass(frozen=True)
class Study:
    """A reading of each set of groups, and for each variant the honest attempts and the attacks."""

    readings: list[Reading]
    honest: dict[str, list[Honest]]
    attacks: dict[str, list[Attack]]
    warnings: list[str]


def study(
    sets: Sequence[Groups],
    experiment: Experiment,
    tokenizer: Tokenizer,
    extra: Mapping[str, RewardFunction],
    *,
    budget: int,
) -> Study:
    """Scores every set of groups under every variant, and attacks each variant.

    An attack may score `budget` completions for each variant; with 0 there are no attacks. The honest attempts, with
    which attacks are compared, are the completions of the first set and the task's demonstrations.
    """
    readings = [read(groups, experiment, extra) for groups in sets]
    if budget == 0:
        return Study(readings, {}, {}, [])
    honest = {name: [Honest("completions", values[~np.isnan(values)])] for name, values in readings[0].rewards.items()}
    texts, arguments = _demonstrations(experiment, tokenizer)
    if texts:
        for name, values in score_variants(arguments, 1, experiment, extra).items():
            honest[name].append(Honest("demonstrations", values[~np.isnan(values)]))
    # A total that is standardised within its group has no meaning for a single answer.
    attackable = [name for name in honest if name != TOTAL or experiment.reward.combine == "sum"]
    task = experiment.task
    config = AttackConfig(
        search_on=task.train[:SEARCH_EXAMPLES],
        judge_on=task.held_out[:JUDGE_EXAMPLES],
        demonstrations=texts,
        completions=[turn for each in sets[0].arguments["completions"][:DEMONSTRATIONS] for turn in turns(each)],
        max_tokens=experiment.sampling.max_tokens,
        budget=budget,
        seed=experiment.seed,
    )
    attacks = attack(Target(experiment, extra, tokenizer), attackable, config)
    warnings = [warning(name, found, honest[name]) for name, found in attacks.items()]
    return Study(readings, honest, attacks, [sentence for sentence in warnings if sentence is not None])


def _demonstrations(experiment: Experiment, tokenizer: Tokenizer) -> tuple[list[str], dict[str, list[Any]]]:
    """The turns of the task's demonstrations and the rewards' arguments for them; both empty if it has none."""
    task = experiment.task
    if task.demonstrate is None:
        return [], {}
    num_prompts = min(len(task.train), DEMONSTRATIONS)
    indices, samples = range(num_prompts), range(DEMONSTRATIONS // num_prompts)
    prompts = Prompts(task, {"train": [[0]] * num_prompts})  # only the completions are used here
    noise = name_noise(experiment.seed, 0, indices, samples)
    shown = demonstrations(task, prompts.batch("train", indices), noise, tokenizer, experiment.reward.time_limit)
    return [turn for group in shown.episodes for episode in group for turn in episode.turns], shown.reward_arguments()


def save(found: Study, directory: Path) -> list[Path]:
    """Writes `rewards.json`, `groups.jsonl` (which `read_groups` can read) and `rewards.png`; returns their paths."""
    figures, rows = directory / "rewards.json", directory / "groups.jsonl"
    write_json(
        figures,
        {
            "readings": [
                {
                    "groups": reading.groups.label,
                    "num_groups": len(reading.groups.prompts),
                    "group_size": reading.groups.group_size,
                    "signals": {name: asdict(each) for name, each in reading.signals.items()},
                    "agreements": [asdict(each) for each in reading.agreements],
                    "components": reading.components,
                    "shaping": {**asdict(reading.shaping), "share": reading.shaping.share},
                }
                for reading in found.readings
            ],
            "honest": {
                name: [
                    {"source": h.source, "num": len(h.values), "mean": h.mean, "median": np.median(h.values)}
                    for h in sources
                    if len(h.values)
                ]
                for name, sources in found.honest.items()
            },
            "attacks": {name: [asdict(each) for each in attacks] for name, attacks in found.attacks.items()},
            "warnings": found.warnings,
        },
    )
    rows.unlink(missing_ok=True)
    for reading in found.readings:
        append_rows(rows, _rows(reading))
    return [figures, rows, draw(found, directory / "rewards.png")]


def _rows(reading: Reading) -> list[dict[str, Any]]:
    """A row of groups.jsonl for each completion."""
    groups, size = reading.groups, reading.groups.group_size
    return [
        {
            "step": groups.label,
            "prompt_id": f"{groups.prompts[p]}.{p}",
            "sample": g,
            **example_row(groups.example(p)),
            "completion": groups.arguments["completions"][p * size + g],
            "rewards": {name: values[p, g] for name, values in reading.rewards.items()},
            "advantages": {name: values[p, g] for name, values in reading.advantages.items()},
        }
        for p in range(len(groups.prompts))
        for g in range(size)
    ]


def show(found: Study, console: Console, *, num_groups: int = 1) -> None:
    """Prints the study: `num_groups` groups of each set, then signal, agreement, components, shaping and attacks."""
    for reading in found.readings:
        for p in range(min(num_groups, len(reading.groups.prompts))):
            console.print(group_table(reading, p))
    console.print(signal_table(found.readings))
    for table in (agreement_table(found.readings), component_table(found.readings)):
        if table.row_count:
            console.print(table)
    for reading in found.readings:
        if (said := shaping_sentence(reading.shaping, reading.groups.label)) is not None:
            console.print(Text.assemble(("shaping: ", "bold yellow"), visible(said)), soft_wrap=True)
    for name, attacks in found.attacks.items():
        console.print(attack_table(name, attacks, found.honest[name]))
    for sentence in found.warnings:
        console.print(Text.assemble(("warning: ", "bold yellow"), visible(sentence)), soft_wrap=True)


def group_table(reading: Reading, p: int) -> Table:
    """The completions of group p, with reward and advantage (A) under each variant; equal ones once, with a count."""
    size = reading.groups.group_size
    texts = ["\n".join(turns(c)) for c in reading.groups.arguments["completions"][p * size : (p + 1) * size]]
    first = {text: texts.index(text) for text in dict.fromkeys(texts)}
    title = visible(f"{reading.groups.label}: group {p + 1} of {len(reading.groups.prompts)}")
    asked = example_row(reading.groups.example(p))
    if (example := example_title(asked["prompt"], asked["columns"])) is not None:
        title = Text("\n").join([title, example])
    table = Table(title=title, title_justify="left")
    table.add_column("completion", overflow="fold")
    table.add_column("×", justify="right")
    for name in reading.rewards:
        table.add_column(visible(name), justify="right")
        table.add_column("A", justify="right")
    for text, g in list(first.items())[:SHOWN]:
        cells = [
            cell
            for name in reading.rewards
            for cell in (_number(reading.rewards[name][p, g]), _signed(reading.advantages[name][p, g]))
        ]
        table.add_row(visible(text), str(texts.count(text)), *cells)
    if len(first) > SHOWN:
        table.add_row(Text(f"and {len(first) - SHOWN} more", style="dim"))
    return table


def signal_table(readings: Sequence[Reading]) -> Table:
    """The signal of each variant in each set of groups."""
    table = Table(title="signal: how well each reward tells a group's members apart", title_justify="left")
    for column in ("groups", "reward"):
        table.add_column(column, overflow="fold")
    for column in ("mean", "range", "values", "std", "std in group", "no signal", "by theory"):
        table.add_column(column, justify="right")
    for reading in readings:
        for i, (name, s) in enumerate(reading.signals.items()):
            label = f"{reading.groups.label} (n = {len(reading.groups.prompts)})" if i == 0 else ""
            table.add_row(
                visible(label), visible(name), _number(s.mean), f"{s.low:g} – {s.high:g}", str(s.num_values),
                _number(s.std), _number(s.group_std), _percent(s.no_signal), _percent(s.predicted),
            )  # fmt: skip
        table.add_section()
    return table


def agreement_table(readings: Sequence[Reading]) -> Table:
    """The agreement of each two variants in each set of groups."""
    table = Table(title="agreement: Kendall's tau within groups, and advantages of opposite sign", title_justify="left")
    for column in ("groups", "rewards", "tau", "sign flips"):
        table.add_column(column, justify="left" if column in ("groups", "rewards") else "right")
    for reading in readings:
        for i, a in enumerate(reading.agreements):
            tau = "–" if math.isnan(a.tau) else f"{a.tau:+.2f}"
            pair = visible(f"{a.first} and {a.second}")
            table.add_row(visible(reading.groups.label if i == 0 else ""), pair, tau, _percent(a.flips))
        table.add_section()
    return table


def component_table(readings: Sequence[Reading]) -> Table:
    """How much of the total's advantages comes from each of the experiment's rewards."""
    table = Table(title="components: share of the variance of the total's advantages", title_justify="left")
    names = next((list(reading.components) for reading in readings if reading.components), [])
    for column in ("groups", *names):
        table.add_column(visible(column), justify="right" if names and column in names else "left")
    for reading in readings:
        if reading.components:
            table.add_row(visible(reading.groups.label), *(_percent(reading.components[name]) for name in names))
    return table


def attack_table(variant: str, attacks: Sequence[Attack], honest: Sequence[Honest]) -> Table:
    """The best answer of each family, its reward where it is wrong, and the share of honest attempts that earn less."""
    table = Table(title=visible(f"attacks on {variant}"), title_justify="left")
    table.add_column("attack")
    table.add_column("answer", overflow="fold")
    table.add_column("earns", justify="right")
    for source in honest:
        table.add_column(visible(f"beats {source.source}"), justify="right")
    for each in attacks:
        text = visible(each.text)
        text.truncate(40, overflow="ellipsis")
        style = "yellow" if any(source.is_beaten_by(each.value) for source in honest) else None
        beaten = ["–" if math.isnan(each.value) else _percent(source.share_below(each.value)) for source in honest]
        table.add_row(each.family, text, _number(each.value), *beaten, style=style)
    table.add_section()
    for source in honest:
        if len(source.values):
            what = f"{len(source.values)} {source.source}, median {np.median(source.values):.3f}"
            table.add_row(Text("honest, mean", style="dim"), Text(on_line(what), style="dim"), _number(source.mean))
    return table


def draw(found: Study, path: Path) -> Path:
    """Draws for each variant: its rewards, the groups without signal by group size, and the rewards of attacks."""
    variants = list(found.readings[0].rewards)
    colours = [BLUE, ORANGE, GREEN, PURPLE, GREY]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(12, 2.7 * len(variants) + 0.5), layout="constrained")
        grid = figure.subplots(len(variants), 3, squeeze=False)
        for row, name in zip(grid, variants, strict=True):
            _draw_rewards(row[0], found.readings, name, colours)
            _draw_signal(row[1], found.readings, name, colours)
            _draw_attacks(row[2], found.attacks.get(name, ()), found.honest.get(name, ()))
        with writing(path):
            figure.savefig(path, dpi=130)
    return path


def _draw_rewards(axes: Axes, readings: Sequence[Reading], name: str, colours: Sequence[str]) -> None:
    axes.set_title(f"{name}: rewards")
    values = [reading.rewards[name][~np.isnan(reading.rewards[name])] for reading in readings]
    levels = np.unique(np.round(np.concatenate(values), 6))
    if not len(levels):  # the reward applies to none of the completions
        axes.set_axis_off()
        return
    bins = np.linspace(levels.min(), levels.max(), 25)
    if len(levels) <= 24:  # a bin around each value that occurs
        half = np.diff(levels).min() / 2 if len(levels) > 1 else 0.05
        bins = np.unique(np.concatenate([levels - half, levels + half]).round(6))
    for i, (reading, each) in enumerate(zip(readings, values, strict=True)):
        weights = np.full(len(each), 1 / max(len(each), 1))
        style: dict[str, Any] = {"histtype": "stepfilled" if len(readings) == 1 else "step", "linewidth": 1.8}
        axes.hist(each, bins.tolist(), weights=weights, color=colours[i % 5], label=reading.groups.label, **style)
    axes.set_ylabel("share of completions")
    axes.margins(x=0.1)
    axes.legend(frameon=False, fontsize=8)


def _draw_signal(axes: Axes, readings: Sequence[Reading], name: str, colours: Sequence[str]) -> None:
    axes.set_title("groups without signal, by group size")
    for i, reading in enumerate(readings):
        s = reading.signals[name]
        axes.plot(*zip(*s.predicted_by_size.items(), strict=True), color=colours[i % 5], linewidth=1.6, marker=".")
        axes.plot(reading.groups.group_size, s.no_signal, "o", color=colours[i % 5], ms=8, markerfacecolor="none")
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:.0f}")
    axes.set_ylim(-0.03, 1.03)
    axes.set_xlabel("line: theory; ring: observed", color=GREY, fontsize=8)


def _draw_attacks(axes: Axes, attacks: Sequence[Attack], honest: Sequence[Honest]) -> None:
    known = [each for each in attacks if not math.isnan(each.value)]
    axes.set_title("attacks: reward where wrong")
    if not known:
        axes.set_axis_off()
        return
    names = [f"{each.family}\n{visible(each.text).plain[:24]}" for each in known]
    beats = [any(source.is_beaten_by(each.value) for source in honest) for each in known]
    axes.barh(names, [each.value for each in known], color=[ORANGE if b else GREY for b in beats], height=0.6)
    for source, colour in zip(honest, (BLUE, GREEN), strict=False):
        if len(source.values):
            axes.axvline(source.mean, color=colour, linewidth=1.6, label=f"honest: {source.source}")
    axes.tick_params(axis="y", labelsize=7)
    axes.grid(axis="y", visible=False)
    axes.invert_yaxis()
    axes.legend(frameon=False, fontsize=7, loc="upper center", bbox_to_anchor=(0.4, -0.08))


def _number(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.3f}"


def _percent(value: float) -> str:
    return "–" if math.isnan(value) else f"{100 * value:.0f} %" if value in (0, 1) else f"{100 * value:.1f} %"


def _signed(value: float) -> Text:
    return Text(f"{value:+.2f}", style="green" if value > 0 else "red" if value < 0 else "dim")
