"""Bias and variance of every policy-gradient estimator against the exact gradient of the expected reward.

    python scripts/estimator_bench.py --out runs/estimator_bench       # every batch listed, about a minute on two cores
    python scripts/estimator_bench.py --vocabulary 4 --horizon 4 --group-size 8 --samples 100000 --out DIR
    python scripts/estimator_bench.py --loss FILE.py:FUNCTION --out DIR       # a loss of your own beside them

Prints a table for an on-policy game and one whose sampler has drifted from the policy, and writes them as CSV,
Markdown and a picture to the output directory.
"""

import csv
import sys
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import tyro
from rich.console import Console
from rich.table import Table

from grpo_jax.errors import UserError, exit_status
from grpo_jax.experiment import AdvantageConfig, run_file
from grpo_jax.research.exact_gradient import (
    Estimator,
    compare,
    exact_moments,
    family,
    make_game,
    probabilities,
    sampled_moments,
)


@dataclass(frozen=True)
class Options:
    out: Path  # where the tables and the picture go
    vocabulary: int = 3  # tokens, the end among them
    horizon: int = 2
    prompts: int = 2
    group_size: int = 4
    drift: float = 0.5  # of the second game's sampler, in nats
    samples: int = 0  # random batches; 0 to list every batch
    seed: int = 0
    loss: str | None = None  # FILE.py:FUNCTION, a loss of your own, with GRPO's advantages


def own_estimator(where: str) -> dict[str, Estimator]:
    """The estimator of a loss that is given as FILE.py:FUNCTION."""
    path, _, name = where.rpartition(":")
    if not path:
        raise UserError(f"--loss {where!r} is not of the form FILE.py:FUNCTION, e.g. my_loss.py:my_loss.")
    loss = getattr(run_file(Path(path)), name, None)
    if not callable(loss):
        raise UserError(f"--loss {where!r}: {path} has no function {name!r}.")
    return {name: Estimator(AdvantageConfig(), loss)}


def measure(options: Options) -> list[dict[str, str | float]]:
    """One row for every game and estimator."""
    rows = []
    estimators = {**family(options.horizon), **(own_estimator(options.loss) if options.loss else {})}
    for name, drift in (("on policy", 0.0), (f"sampler drifted by {options.drift:g}", options.drift)):
        game = make_game(options.vocabulary, options.horizon, options.prompts, drift=drift, seed=options.seed)
        for estimator_name, estimator in estimators.items():
            if options.samples:
                moments = sampled_moments(
                    game, estimator, options.group_size, samples=options.samples, seed=options.seed
                )
            else:
                moments = exact_moments(game, estimator, options.group_size)
            rows.append({"game": name, "estimator": estimator_name, **compare(game, moments)})
        expected = (probabilities(game, game.logits) * game.rewards).sum(-1)
        print(f"{name}: expected reward of each prompt {[round(float(x), 3) for x in expected]}", file=sys.stderr)
    return rows


def cells(row: dict[str, str | float], options: Options) -> list[str]:
    def with_error(key: str) -> str:
        error = f" ± {row[f'{key} error']:.3f}" if options.samples else ""
        return f"{row[key] + 0.0:.3f}{error}"

    weights = " : ".join(f"{row[f'weight {p}']:.2f}" for p in range(options.prompts))
    return [
        row["estimator"], with_error("scale"), with_error("bias"), f"{row['noise']:.2f}",
        f"{round(row['length'], 3) + 0.0:+.3f}", weights,
    ]  # fmt: skip


HEAD = ["estimator", "scale", "bias", "noise", "length", "weights of the prompts"]


def show(rows: list[dict[str, str | float]], options: Options) -> str:
    """Prints the tables and returns them as Markdown."""
    markdown = []
    for game in dict.fromkeys(row["game"] for row in rows):
        table = Table(*HEAD, title=game)
        markdown += [f"### {str(game).capitalize()}", "", "| " + " | ".join(HEAD) + " |", "|---" * len(HEAD) + "|"]
        for row in (row for row in rows if row["game"] == game):
            table.add_row(*cells(row, options))
            markdown.append("| " + " | ".join(cells(row, options)) + " |")
        markdown.append("")
        Console().print(table)
    return "\n".join(markdown)


def plot(rows: list[dict[str, str | float]], path: Path) -> None:
    """Bias against noise, one panel for each game."""
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    games = list(dict.fromkeys(row["game"] for row in rows))
    names = list(dict.fromkeys(row["estimator"] for row in rows))
    figure, axes = plt.subplots(1, 2 * len(games), figsize=(13, 5), sharey=True, layout="constrained")
    for i, (game, key) in enumerate((game, key) for game in games for key in ("bias", "noise")):
        values = [row[key] for row in rows if row["game"] == game]
        axes[i].barh(names, values, color="tab:red" if key == "bias" else "tab:blue")
        axes[i].set(title=game, xlabel=f"{key}, relative to the gradient" if key == "bias" else "noise to signal")
        axes[i].spines[["top", "right"]].set_visible(False)
    axes[0].invert_yaxis()
    figure.savefig(path, dpi=120)


def main(options: Options) -> None:
    options.out.mkdir(parents=True, exist_ok=True)
    rows = measure(options)
    (options.out / "estimator_bench.md").write_text(show(rows, options))
    with (options.out / "estimator_bench.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    plot(rows, options.out / "estimator_bench.png")


if __name__ == "__main__":
    sys.exit(exit_status(lambda: main(tyro.cli(Options, description=__doc__))))
