"""What papers on GRPO and its relatives claim: identities and limits that a CPU can check, headlines that need GPUs.

Expected: the formulas and the floors and ceilings of Wordle agree (about a minute on one core). A headline is listed
with the hardware that its own setting needs; none of those is within the reach of a CPU.

    python scripts/reproduce_tables.py experiments/papers/claims.py
"""

from functools import cache, partial
from itertools import product

import numpy as np

from grpo_jax.advantages import group_advantages
from grpo_jax.evaluation import pass_at_k
from grpo_jax.research.reproduction import Cell
from grpo_jax.rewards.wordle_rules import answers, words
from grpo_jax.tasks.wordle import blind, random_consistent, win_rate

REWARDS = np.random.default_rng(0).normal(size=(1000, 8))
EXACT = 1e-5  # float32
GPU_NODE = "8 GPUs of 80 GB for days (full fine-tuning of a 7B to 32B model, long completions)"
ONE_GPU = "1 GPU of 80 GB for about a day (1.5B model, GSM8K or MATH)"


def leave_one_out_ratio(size: int) -> float:
    """The largest |RLOO / Dr. GRPO| advantage over 1,000 groups of `size`."""
    rewards = REWARDS[:, :size]
    ours = group_advantages(rewards, baseline="leave_one_out", scale="none")
    return float(np.max(np.abs(ours / group_advantages(rewards, scale="none"))))


def pair_advantage() -> float:
    """The smallest |advantage| of 1,000 groups of two different rewards."""
    return float(np.min(np.abs(group_advantages(REWARDS[:, :2]))))


def dead_groups(p: float, size: int) -> float:
    """The chance that a group has no signal, from the advantages of every possible group of right and wrong answers."""
    groups = np.array(list(product((0.0, 1.0), repeat=size)))
    dead = ~np.asarray(group_advantages(groups)).any(axis=1)
    chance = np.prod(np.where(groups == 1, p, 1 - p), axis=1)
    return float(chance[dead].sum())


@cache
def wins(player: str, num_games: int) -> float:
    """The win rate in percent over games whose secret is drawn from the 2,315 answers."""
    players = {
        "blind": lambda: blind(answers()),
        "consistent, answers": lambda: random_consistent(answers()),
        "consistent, all words": lambda: random_consistent(words()),
    }
    return 100 * win_rate(players[player](), answers(), num_games)


def three_standard_errors(percent: float, num_games: int) -> float:
    """Of a win rate in percent."""
    return 3 * (percent * (100 - percent) / num_games) ** 0.5


identities = [
    *(Cell("2402.14740 RLOO", f"advantage over Dr. GRPO's, G = {size}", "RLOO = G/(G-1) · Dr. GRPO's advantage",
           size / (size - 1), "agrees", compute=partial(leave_one_out_ratio, size), tolerance=EXACT)
      for size in (2, 8)),
    Cell("2510.00977 2-GRPO", "|A| in a group of two different rewards", "A = ±1 or 0", 1.0, "agrees",
         compute=pair_advantage, tolerance=EXACT),
    Cell("2107.03374 pass@k", "n 16, c 4, k 4", "1 - C(n-c, k) / C(n, k)", 0.728, "agrees",
         compute=lambda: pass_at_k([4], 16, 4), tolerance=5e-4),
    *(Cell("dead groups", f"p = {p}, G = {size}", "p^G + (1-p)^G", p**size + (1 - p) ** size, "agrees",
           compute=partial(dead_groups, p, size), tolerance=1e-9) for p, size in ((0.1, 8), (0.5, 8), (0.5, 2))),
]  # fmt: skip

WORDLE = "Wordle's limits: 2,315 answers, 12,972 allowed guesses"
wordle = [
    Cell("Wordle", "answers", WORDLE, 2315, "agrees", compute=lambda: len(answers())),
    Cell("Wordle", "allowed guesses", WORDLE, 12972, "agrees", compute=lambda: len(words())),
    Cell("Wordle", "blind answer wins, %", WORDLE, 0.26, "agrees", compute=partial(wins, "blind", 40_000),
         tolerance=0.005 + three_standard_errors(0.26, 40_000), note="40,000 games"),
    Cell("Wordle", "random consistent answer wins, %", WORDLE, 98.2, "agrees",
         compute=partial(wins, "consistent, answers", 3000), tolerance=0.05 + three_standard_errors(98.2, 3000),
         note="3,000 games"),
    Cell("Wordle", "random consistent word wins, %", WORDLE, 90.4, "agrees",
         compute=partial(wins, "consistent, all words", 1500), tolerance=0.8 + three_standard_errors(90.4, 1500),
         note="1,500 games; printed as 90.4 ± .8"),
    Cell("Wordle", "guesses of the best possible play", WORDLE, 3.4212, "not run here",
         hardware="a CPU for hours, and an exact search that grpo_jax does not have"),
    Cell("Wordle", "Qwen2.5-7B wins after 35 steps, %", WORDLE, 14.5, "not run here", hardware=GPU_NODE),
    Cell("Wordle", "Qwen3-1.7B wins on a shorter list, %", WORDLE, 60, "not run here", hardware=ONE_GPU),
]  # fmt: skip

# Numbers that are known at second hand (a dagger in the project's list) are not among the printed values.
HEADLINES: list[tuple[str, str, float | str, str]] = [
    ("2402.03300 DeepSeekMath", "GSM8K after GRPO, 7B", 88.2, GPU_NODE),
    ("2402.03300 DeepSeekMath", "MATH after GRPO, 7B", 51.7, GPU_NODE),
    ("2501.12948 DeepSeek-R1", "AIME24 before", 15.6, "hundreds of GPUs for weeks (a 671B model)"),
    ("2501.12948 DeepSeek-R1", "AIME24 after", 77.9, "hundreds of GPUs for weeks (a 671B model)"),
    ("2503.20783 Dr. GRPO", "wrong answers' length", "stops growing", ONE_GPU),
    ("2503.20783 Dr. GRPO", "MATH500, 1.5B", 74.2, ONE_GPU),
    *(("2503.14476 DAPO", f"AIME24, {rung}", score, GPU_NODE) for rung, score in (
        ("GRPO", 30), ("overlong filter", 36), ("clip-higher", 38), ("soft overlong penalty", 41), ("token loss", 42),
        ("dynamic sampling", 50))),
    ("2507.18071 GSPO", "clipped tokens against GRPO's", "about 100 × more", GPU_NODE),
    ("2506.13585 CISPO", "steps against DAPO's", "half as many", GPU_NODE),
    ("2501.03262 REINFORCE++", "GRPO on 30 questions, train", 95.0, GPU_NODE),
    ("2501.03262 REINFORCE++", "GRPO on 30 questions, test", 0.0, GPU_NODE),
    ("2501.03262 REINFORCE++", "RF++ on 30 questions, train", 71.0, GPU_NODE),
    ("2501.03262 REINFORCE++", "RF++ on 30 questions, test", 2.5, GPU_NODE),
    ("2508.08221 Lite PPO", "Llama3-8B", 25.53, GPU_NODE),
    ("2508.08221 Lite PPO", "Llama3-8B, GRPO", 22.63, GPU_NODE),
    ("2510.00977 2-GRPO", "share of the score at G = 16, %", 97.6, ONE_GPU),
    ("2506.10947 spurious rewards", "MATH500, true reward", 29.1, GPU_NODE),
    ("2506.10947 spurious rewards", "MATH500, random reward", 21.4, GPU_NODE),
    ("2504.20571 1-shot RLVR", "MATH500 before, 1.5B", 36.0, ONE_GPU),
    ("2504.20571 1-shot RLVR", "MATH500 after, 1.5B", 73.6, ONE_GPU),
    ("2510.13786 ScaleRL", "A with a bfloat16 head", 0.52, "thousands of GPU hours"),
    ("2510.13786 ScaleRL", "A with a float32 head", 0.61, "thousands of GPU hours"),
    *(("2603.19335 oxRL", f"GSM8K strict, Qwen2.5-{size}-Instruct, {arm}", score, ONE_GPU) for size, arm, score in (
        ("0.5B", "base", 19.56), ("0.5B", "DPO", 33.97), ("0.5B", "SGRPO", 32.45),
        ("1.5B", "base", 31.16), ("1.5B", "DPO", 49.08), ("1.5B", "SGRPO", 58.00))),
    ("2504.07086 seeds", "spread of Pass@1 over seeds, points", "5 to 15", ONE_GPU),
]  # fmt: skip

headlines = [
    Cell(table, cell, "the paper's abstract and tables", printed, "not run here", hardware=hardware)
    for table, cell, printed, hardware in HEADLINES
]

cells = [*identities, *wordle, *headlines]
