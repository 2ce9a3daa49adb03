"""Every number of the article, recomputed by the code that it describes.

"How to Fine-tune LLMs with GRPO" (August 2025), on one Wordle guess at the secret POUND. The numbers below are as
printed there. Expected: the group of eight agrees in every number. The other two figures contradict the article's own
rule, advantage = (r - mean) / population std: the advantages beside them are those of other groups.

    python scripts/reproduce_tables.py experiments/papers/article.py
"""

from functools import cache, partial
from itertools import product

import numpy as np

from grpo_jax.advantages import group_advantages
from grpo_jax.research.reproduction import Cell, Verdict
from grpo_jax.rewards.wordle import binary, partial_credit

SOURCE = "How to Fine-tune LLMs with GRPO, August 2025"
SECRET = "POUND"
ONE_DECIMAL, TWO_DECIMALS, FOUR_DECIMALS = 1e-6, 5e-3, 5e-5  # rewards are exact tenths; advantages are rounded

GROUP = ["FOUND", "NOUDI", "FOUND", "WORD ", "CROWN", "INDOM", "DONUT", "FROWN"]
GROUP_REWARDS = [0.8, 0.6, 0.8, 0.0, 0.2, 0.3, 0.5, 0.2]
GROUP_ADVANTAGES = [1.3525, 0.6312, 1.3525, -1.5328, -0.8115, -0.4508, 0.2705, -0.8115]

STEPS = "ABCD"
STEPS_REWARDS = [0.6, 0.7, -0.1, 0.7]
STEPS_ADVANTAGES = [1.35, 0.63, -1.53, 0.27]

TEMPERATURES: dict[float, tuple[list[str], list[float], list[float | None]]] = {
    0.0: (["DOWNY", "DOWNY", "DOWNY"], [0.5, 0.5, 0.5], [0, 0, 0]),
    0.7: (["FOUND", "NOUDI", "WORD"], [0.8, 0.6, 0.0], [1.35, None, -1.53]),
    1.3: (["GROUND", "SPIND", "FINDS"], [0.0, 0.5, 0.2], [-1.94, 0.74, -0.87]),
}


def credit(guess: str) -> float:
    """The article's reward of a guess."""
    return partial_credit(completions=[guess], secret=[SECRET])[0]


def advantage(rewards: list[float], place: int) -> float:
    """The article's advantage of one member of a group with these rewards."""
    return float(group_advantages(np.array([rewards]))[0, place])


@cache
def payable() -> frozenset[float]:
    """Every reward that some guess earns: each place holds its letter, another of the secret's, or neither."""
    choices = [(letter, SECRET[i - 1], "Z") for i, letter in enumerate(SECRET)]
    return frozenset(credit("".join(guess)) for guess in product(*choices)) | {credit("")}


def nearest_payable(reward: float) -> float:
    """The reward closest to this one that the rule can pay."""
    return min(payable(), key=lambda paid: abs(paid - reward))


def group_of_eight() -> list[Cell]:
    """Rewards and advantages of the one group that is printed whole."""
    found = []
    make = partial(Cell, "group_of_eight", source=SOURCE, expected="agrees")
    for i, guess in enumerate(GROUP):
        space = (
            "holds because the space is stripped: with it the rule would pay O and D 0.3" if guess == "WORD " else ""
        )
        found += [
            make(
                f"reward[{i}] {guess.strip()}", printed=GROUP_REWARDS[i], compute=partial(credit, guess),
                tolerance=ONE_DECIMAL, note=space,
            ),
            make(
                f"advantage[{i}] {guess.strip()}", printed=GROUP_ADVANTAGES[i],
                compute=lambda i=i: advantage([credit(g) for g in GROUP], i), tolerance=FOUR_DECIMALS,
            ),
        ]  # fmt: skip
    return found


def three_step_figure() -> list[Cell]:
    """Four responses whose guesses are not printed: can the rule pay these rewards, and do the advantages follow?"""
    found = []
    right = [advantage(STEPS_REWARDS, i) for i in range(len(STEPS))]
    meant = [
        0.8,
        0.6,
        0.0,
        0.5,
    ]  # the group of eight's rewards that have the printed advantages: FOUND NOUDI WORD DONUT
    for i, response in enumerate(STEPS):
        impossible = STEPS_REWARDS[i] < 0
        found.append(
            Cell(
                "three_step_figure", f"reward[{i}] {response}", SOURCE, STEPS_REWARDS[i],
                "disagrees" if impossible else "agrees",
                compute=partial(nearest_payable, STEPS_REWARDS[i]), tolerance=ONE_DECIMAL,
                why="the rule pays no less than 0; 0.0 is the right value, and the one that has the advantage -1.53 "
                "in the group of eight" if impossible else "",
                note=f"the guess is not printed, so what is checked is that the rule can pay it; the advantage beside "
                f"it belongs to a reward of {meant[i]}",
            )
        )  # fmt: skip
        twin = "; B and D have one reward and two advantages" if response in "BD" else ""
        found.append(
            Cell(
                "three_step_figure", f"advantage[{i}] {response}", SOURCE, STEPS_ADVANTAGES[i], "disagrees",
                compute=partial(advantage, STEPS_REWARDS, i), tolerance=TWO_DECIMALS,
                why=f"(r - mean) / std of the four printed rewards is {right[i]:.2f}; the printed value is the group "
                f"of eight's for a reward of {meant[i]}{twin}",
            )
        )  # fmt: skip
    return found


def temperature_figure() -> list[Cell]:
    """Three groups of three; at 0.7 and 1.3 the advantages are not those of the three rewards beside them."""
    found = []
    for temperature, (guesses, rewards, advantages) in TEMPERATURES.items():
        right = [advantage(rewards, i) for i in range(len(rewards))]
        origin = {
            0.7: "the printed value is this guess's in the group of eight",
            1.3: "the three printed values fit one mean, .36, and one std, .19, so they too are of a larger group, "
            "which is not shown",
        }.get(temperature, "")
        for i, guess in enumerate(guesses):
            found.append(
                Cell(
                    "temperature_figure", f"temperature {temperature} reward[{i}] {guess}", SOURCE, rewards[i],
                    "agrees", compute=partial(credit, guess), tolerance=ONE_DECIMAL,
                )
            )  # fmt: skip
            printed = advantages[i]
            expected: Verdict = "not run here" if printed is None else "disagrees" if temperature else "agrees"
            found.append(
                Cell(
                    "temperature_figure", f"temperature {temperature} advantage[{i}] {guess}", SOURCE, printed,
                    expected, compute=partial(advantage, rewards, i), tolerance=TWO_DECIMALS,
                    why=f"(r - mean) / std of the three rewards beside it is {right[i]:.2f}; {origin}" * bool(origin),
                )
            )  # fmt: skip
    return [*found, *temperature_claims()]


def temperature_claims() -> list[Cell]:
    """What the figure says of each temperature. Greedy groups can be computed; the other two must be trained."""
    make = partial(Cell, "temperature_figure", source=SOURCE, expected="not run here")
    train = "grpo-jax train experiments/wordle/pound.py --set sampling.temperature={} seed=0 (and seeds 1 to 4)"
    return [
        Cell(
            "temperature_figure", "temperature 0.0 claim: largest advantage", SOURCE, 0.0, "agrees",
            compute=lambda: max(abs(advantage([credit("DOWNY")] * 64, i)) for i in range(64)),
            note="a greedy group is one guess repeated, so whatever its reward nothing is learned from it",
        ),
        make("temperature 0.7 claim", printed="optimal balance", hardware="2 CPU cores, minutes",
             command=train.format(0.7), note="which temperature is best is a matter of seeds, not of one group"),
        make("temperature 1.3 claim", printed="diverse but low quality, slow learning",
             hardware="2 CPU cores, minutes", command=train.format(1.3)),
    ]  # fmt: skip


def claims() -> list[Cell]:
    """The article's claims, in its order."""
    make = partial(Cell, "claims", source=SOURCE)
    return [
        make("claims[0] binary reward: largest advantage in the group of eight", printed=0.0, expected="agrees",
             compute=lambda: max(abs(advantage(binary(completions=GROUP, secret=[SECRET] * 8), i)) for i in range(8)),
             note="holds for a group without the secret; one POUND among them would have a positive advantage"),
        make("claims[1] partial credit: share of the group of eight with a signal", printed=1.0, expected="agrees",
             compute=lambda: sum(advantage([credit(g) for g in GROUP], i) != 0 for i in range(8)) / 8,
             note="the differences are there; that they lead to the secret and not to a non-word is another matter"),
        make("claims[2]", printed="as few as 10 to 20 examples suffice", expected="not run here",
             hardware="2 CPU cores, an hour (sums with 10, 20, 100, 500 training examples at 5 seeds)"),
        make("claims[3]", printed="SFT needs thousands of labelled examples", expected="not run here",
             hardware="2 CPU cores, 10 minutes", command="scripts/quickstart.sh",
             note="the quickstart's control trains SFT on 192 labelled sums"),
    ]  # fmt: skip


cells = [*group_of_eight(), *three_step_figure(), *temperature_figure(), *claims()]
