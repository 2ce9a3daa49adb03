#!/usr/bin/env python
"""Simulates how often 95 % intervals cover the true mean, and writes tables of coverage and mean width.

    python scripts/interval_coverage.py [--repetitions 10000] [--output docs/results/interval_coverage.md]

The intervals that the package prints are computed by the package; the others are candidates that it could have taken.
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
from scipy import stats

from grpo_jax import statistics
from grpo_jax.confidence import EXACT, bounded_limits
from grpo_jax.statistics.differences import ALPHA

SEEDS = (3, 5, 10, 20)
RESAMPLES = 1000
CHUNK = 1000  # repetitions that are computed together
TAILS = np.array([0.025, 0.975])
Z = stats.norm.ppf(TAILS[1])

Limits = tuple[np.ndarray, np.ndarray]
Interval = Callable[[np.ndarray, tuple[float, float]], Limits]
Sampler = Callable[[np.random.Generator, tuple[int, int]], np.ndarray]


# Intervals of the mean of each row [R, N] ----------------------------------------------------------------------------


def gaffke(rows: np.ndarray, bounds: tuple[float, float]) -> Limits:
    distinct, which = np.unique(np.sort(rows, axis=1), axis=0, return_inverse=True)
    low, high = bounded_limits(distinct, bounds)
    return low[which], high[which]


def student(rows: np.ndarray, bounds: tuple[float, float]) -> Limits:
    n, centre = rows.shape[1], rows.mean(1)
    half = stats.t.ppf(TAILS[1], n - 1) * rows.std(1, ddof=1) / np.sqrt(n)
    return centre - half, centre + half


def logit_student(rows: np.ndarray, bounds: tuple[float, float]) -> Limits:
    """Student's interval of the mean on the logit scale, by the delta method."""
    n, (bottom, top) = rows.shape[1], bounds
    centre = np.clip((rows.mean(1) - bottom) / (top - bottom), 1e-9, 1 - 1e-9)
    error = rows.std(1, ddof=1) / (top - bottom) / np.sqrt(n) / (centre * (1 - centre))
    half = stats.t.ppf(TAILS[1], n - 1) * error
    odds = np.log(centre / (1 - centre))
    low, high = (1 / (1 + np.exp(-np.clip(x, -500, 500))) for x in (odds - half, odds + half))
    return bottom + (top - bottom) * low, bottom + (top - bottom) * high


def resampled_means(rows: np.ndarray, statistic: Callable[..., np.ndarray] = np.mean) -> np.ndarray:
    """A statistic of resamples of each row [R, B]; all rows share the places that are drawn."""
    places = np.random.default_rng(0).integers(rows.shape[1], size=(RESAMPLES, rows.shape[1]))
    return statistic(rows[:, places], axis=2)


def percentile(rows: np.ndarray, bounds: tuple[float, float], statistic: Callable[..., np.ndarray] = np.mean) -> Limits:
    low, high = np.quantile(resampled_means(rows, statistic), TAILS, axis=1)
    return low, high


def bca(rows: np.ndarray, bounds: tuple[float, float]) -> Limits:
    """The bias-corrected and accelerated bootstrap (Efron 1987)."""
    n, centre = rows.shape[1], rows.mean(1, keepdims=True)
    found = np.sort(resampled_means(rows), axis=1)
    share = ((found < centre).mean(1) + (found <= centre).mean(1)) / 2
    bias = stats.norm.ppf(np.clip(share, 1 / RESAMPLES, 1 - 1 / RESAMPLES))
    jackknife = (rows - centre) / (n - 1)  # each mean without one value, minus their mean, with the opposite sign
    scale = 6 * (jackknife**2).sum(1) ** 1.5
    acceleration = (jackknife**3).sum(1) / np.where(scale > 0, scale, 1.0)
    limits = []
    for z in (-Z, Z):
        order = stats.norm.cdf(bias + (bias + z) / (1 - acceleration * (bias + z)))
        place = np.clip((order * RESAMPLES).astype(int), 0, RESAMPLES - 1)
        limits.append(np.take_along_axis(found, place[:, None], axis=1)[:, 0])
    return limits[0], limits[1]


OF_MEANS: dict[str, Interval] = {
    "Gaffke (printed)": gaffke,
    "Student": student,
    "Student on logits": logit_student,
    "percentile bootstrap": percentile,
    "BCa bootstrap": bca,
}


# Distributions -------------------------------------------------------------------------------------------------------


def two_values(usual: float, other: float, chance: float) -> Sampler:
    return lambda rng, shape: np.where(rng.random(shape) < chance, other, usual)


OUTCOMES: dict[str, tuple[Sampler, float]] = {
    ".65 ± .02, normal": (lambda rng, shape: np.clip(rng.normal(0.65, 0.02, shape), 0, 1), 0.65),
    "uniform": (lambda rng, shape: rng.random(shape), 0.5),
    ".99, but 0 once in five": (two_values(0.99, 0.0, 0.2), 0.8 * 0.99),
    ".99, but 0 once in ten": (two_values(0.99, 0.0, 0.1), 0.9 * 0.99),
    "1, but 0 once in two": (two_values(1.0, 0.0, 0.5), 0.5),
}
DIFFERENCES: dict[str, tuple[Sampler, float]] = {
    "0 ± .03, normal": (lambda rng, shape: rng.normal(0, 0.03, shape), 0.0),
    "+.004, but −.076 once in twenty": (two_values(0.004, -0.076, 0.05), 0.0),
    "+.04, but −.76 once in twenty": (two_values(0.04, -0.76, 0.05), 0.0),
    "+.09, but −.81 once in ten": (two_values(0.09, -0.81, 0.1), 0.0),
    "both .99, but 0 once in five": (
        lambda rng, shape: two_values(0.99, 0.0, 0.2)(rng, shape) - two_values(0.99, 0.0, 0.2)(rng, shape),
        0.0,
    ),
}


def outcomes_of(
    rng: np.random.Generator, questions: tuple[int, int], samples: int, success: float, alike: float
) -> np.ndarray:
    """Shares [R, Q] of S samples that succeeded; the correlation of a question's samples is `alike`."""
    chance = np.full(questions, success)
    if alike:
        chance = rng.beta(success * (1 / alike - 1), (1 - success) * (1 / alike - 1), questions)
    return rng.binomial(samples, chance) / samples


# Intervals of success over questions, from the questions' shares [R, Q] of S samples ---------------------------------


def effective_samples(shares: np.ndarray, samples: int) -> np.ndarray:
    """p (1 - p) / var(mean), held between the number of questions and of samples (Miller 2024)."""
    questions, p = shares.shape[1], shares.mean(1)
    if questions == 1:
        return np.full(len(shares), float(samples))
    variance = shares.var(1, ddof=1) / questions
    found = p * (1 - p) / np.where(variance > 0, variance, 1.0)
    return np.where(variance > 0, np.clip(found, questions, questions * samples), questions)


def wilson(shares: np.ndarray, samples: int) -> Limits:
    n, p = effective_samples(shares, samples), shares.mean(1)
    centre = (p + Z * Z / (2 * n)) / (1 + Z * Z / n)
    half = Z * np.sqrt(p * (1 - p) / n + Z * Z / (4 * n * n)) / (1 + Z * Z / n)
    return centre - half, centre + half


def korn_graubard(shares: np.ndarray, samples: int) -> Limits:
    """Clopper and Pearson's with an effective number of samples (Korn & Graubard 1998)."""
    n, questions = effective_samples(shares, samples), shares.shape[1]
    if samples > 1 and questions > 1:
        n = n * (Z / stats.t.ppf(TAILS[1], questions - 1)) ** 2
    won = shares.mean(1) * n
    low = stats.beta.ppf(TAILS[0], np.maximum(won, 1e-12), n - won + 1)
    high = stats.beta.ppf(TAILS[1], won + 1, np.maximum(n - won, 1e-12))
    return np.where(won > 0, low, 0.0), np.where(won < n, high, 1.0)


def printed_success(shares: np.ndarray, samples: int) -> Limits:
    """What `evaluation.success_interval` does, without its import of JAX."""
    if shares.shape[1] > 1:
        return gaffke(shares, (0, 1))
    won = np.rint(shares * samples)
    return gaffke((np.arange(samples) < won).astype(float), (0, 1))


OF_SUCCESS = {
    "Gaffke (printed)": printed_success,
    "Wilson, effective samples": wilson,
    "Korn-Graubard": korn_graubard,
}


# Tables --------------------------------------------------------------------------------------------------------------


def score(limits: Limits, truth: float) -> tuple[float, float]:
    """The coverage and the mean width; limits that miss by rounding alone cover."""
    low, high = limits
    return float(((low <= truth + 1e-9) & (truth <= high + 1e-9)).mean()), float((high - low).mean())


def chunked(interval: Callable[[np.ndarray], Limits], rows: np.ndarray) -> Limits:
    parts = [interval(rows[start : start + CHUNK]) for start in range(0, len(rows), CHUNK)]
    return np.concatenate([part[0] for part in parts]), np.concatenate([part[1] for part in parts])


def cell(limits: Limits, truth: float) -> str:
    coverage, width = score(limits, truth)
    return f"{coverage:.1%} ({width:.2g})"


def means_table(
    sources: dict[str, tuple[Sampler, float]], bounds: tuple[float, float], repetitions: int
) -> Iterator[list[str]]:
    """A row for each distribution and number of seeds: what each interval of the mean covers."""
    yield ["values", "seeds", *OF_MEANS]
    for name, (sampler, truth) in sources.items():
        for n in SEEDS:
            rows = sampler(np.random.default_rng(n), (repetitions, n))
            found = [chunked(partial(interval, bounds=bounds), rows) for interval in OF_MEANS.values()]
            yield [name, str(n), *(cell(limits, truth) for limits in found)]


def calls_table(repetitions: int) -> Iterator[list[str]]:
    """How often two arms of equal means are called better or worse."""
    yield ["differences", "seeds", "Student's interval excludes 0", "p ≤ .05", "the verdict"]
    for name, (sampler, _) in DIFFERENCES.items():
        for n in SEEDS:
            rows = sampler(np.random.default_rng(n), (repetitions, n))
            low, high = student(rows, (-1, 1))
            few = rows[: max(repetitions // 20, 1)]  # all 2^20 sums take a while
            rejected = np.array([statistics.sign_flip_test(row) <= ALPHA for row in few])
            limits = gaffke(few, (-1, 1))
            shown = rejected & ((limits[0] > 0) | (limits[1] < 0))
            calls = [((low > 1e-12) | (high < -1e-12)).mean(), rejected.mean(), shown.mean()]
            yield [name, str(n), *(f"{share:.1%}" for share in calls)]


def iqm_table(repetitions: int) -> Iterator[list[str]]:
    """What the percentile bootstrap of the interquartile mean covers; the truth is that of a million values."""
    yield ["values", *(f"{n} seeds" for n in SEEDS)]
    for name, (sampler, _) in OUTCOMES.items():
        truth = float(statistics.interquartile_mean(sampler(np.random.default_rng(0), (1, 1_000_000))[0]))
        cells = []
        for n in SEEDS:
            rows = sampler(np.random.default_rng(n), (max(repetitions // 5, 1), n))
            interval = partial(percentile, bounds=(0, 1), statistic=partial(stats.trim_mean, proportiontocut=0.25))
            coverage, _ = score(chunked(interval, rows), truth)
            cells.append(f"{coverage:.1%}")
        yield [name, *cells]


def question_designs(sizes: tuple[int, ...]) -> Iterator[tuple[int, int, float, float]]:
    """The numbers of questions and of samples, the success rate, and how alike a question's samples are."""
    for questions in sizes:
        for samples in (1, 8):
            for success in (0.02, 0.5, 0.98):
                for alike in (0.0, 0.3) if samples > 1 and questions > 1 else (0.0,):
                    yield questions, samples, success, alike


def repetitions_of(questions: int, samples: int, repetitions: int) -> int:
    """Fewer for many questions with several samples, whose intervals take long."""
    return max(repetitions // 20, 1) if questions > 30 and samples > 1 else repetitions


def success_table(sizes: tuple[int, ...], repetitions: int) -> Iterator[list[str]]:
    yield ["questions", "samples", "success", "correlation", *OF_SUCCESS]
    for questions, samples, success, alike in question_designs(sizes):
        shape = (repetitions_of(questions, samples, repetitions), questions)
        shares = outcomes_of(np.random.default_rng(questions), shape, samples, success, alike)
        found = [chunked(partial(interval, samples=samples), shares) for interval in OF_SUCCESS.values()]
        design = [str(questions), str(samples), f"{success:g}", f"{alike:g}"]
        yield [*design, *(cell(limits, success) for limits in found)]


def question_table(sizes: tuple[int, ...], repetitions: int) -> Iterator[list[str]]:
    """Two policies that are equally good at every question."""
    yield ["questions", "samples", "success", "correlation", "Gaffke (printed)", "Student"]
    for questions, samples, success, alike in question_designs(sizes):
        shape = (repetitions_of(questions, samples, repetitions), questions)
        rng = np.random.default_rng(questions)
        if questions < statistics.FEW_QUESTIONS:  # the samples are the pairs
            shape, samples, each = (shape[0], questions * samples), 1, samples
        else:
            each = samples
        if shape[1] < 2:
            continue
        chance = np.full(shape, success)
        if alike:
            chance = rng.beta(success * (1 / alike - 1), (1 - success) * (1 / alike - 1), shape)
        rows = (rng.binomial(samples, chance) - rng.binomial(samples, chance)) / samples
        found = [chunked(partial(interval, bounds=(-1, 1)), rows) for interval in (gaffke, student)]
        yield [str(questions), str(each), f"{success:g}", f"{alike:g}", *(cell(limits, 0.0) for limits in found)]


def shared_prompts_table(repetitions: int) -> Iterator[list[str]]:
    """Means over seeds that are all evaluated on the same 30 prompts, whose difficulty varies; one sample of each."""
    yield ["seeds", "over seeds alone", "with the evaluations' intervals (printed)"]
    repetitions = max(repetitions // 20, 1)
    for n in SEEDS:
        rng = np.random.default_rng(n)
        chance = rng.beta(0.35, 0.35, (repetitions, 1, 30))  # a correlation of .6
        shares = rng.binomial(1, np.broadcast_to(chance, (repetitions, n, 30)))
        rows = shares.mean(2)
        low, high = gaffke(shares.reshape(-1, 30).astype(float), (0, 1))
        noise = ((high - low) / 2).reshape(repetitions, n).mean(1)
        _, *wide = statistics.interval(rows, (0, 1), noise)
        yield [str(n), cell(gaffke(rows, (0, 1)), 0.5), cell((wide[0], wide[1]), 0.5)]


def markdown(rows: list[list[str]]) -> str:
    head, *lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([head, "|" + "---|" * len(rows[0]), *lines])


def lowest(rows: list[list[str]]) -> float:
    """The lowest coverage in the columns of printed intervals, in percent."""
    columns = [place for place, name in enumerate(rows[0]) if "(printed)" in name]
    return min(float(row[column].split("%")[0]) for row in rows[1:] for column in columns)


def standard_error(repetitions: int) -> str:
    return f"{np.sqrt(0.95 * 0.05 / repetitions):.1%}"


def page(repetitions: int, sizes: tuple[int, ...], command: str) -> str:
    few = max(repetitions // 20, 1)
    means = list(means_table(OUTCOMES, (0, 1), repetitions))
    differences = list(means_table(DIFFERENCES, (-1, 1), repetitions))
    success, questions = list(success_table(sizes, repetitions)), list(question_table(sizes, repetitions))
    shared = list(shared_prompts_table(repetitions))
    covered = min(map(lowest, (means, differences, success, questions, shared)))
    return f"""# Coverage of the intervals

    {command}

How often does a 95 % interval contain the true mean? Each cell has the coverage and, in brackets, the mean width of the
interval, from {repetitions:,} repetitions where nothing else is said. The standard error of a coverage of 95 % is then
{standard_error(repetitions)}.

Tables, reports and comparisons print Gaffke's interval for success rates and other bounded metrics. Its lowest coverage
on this page is {covered:.1f} %. It is often above 96 %: the interval is conservative. After three seeds that all score
.65 it must allow that more than half of all runs collapse, because three seeds cannot exclude that. An interval that is
narrower there misses the mean where runs do collapse. So no interval covers exactly 95 % for all these distributions at
three seeds. The other candidates are narrower where the values are roughly normal. With three seeds, and one run in ten
that collapses, they cover the mean in less than a third of the repetitions.

Unbounded metrics, such as rewards and lengths, have Student's interval. Where they collapse in some runs it is too
narrow, as the column "Student" shows.

## Means of a success rate over seeds

{markdown(means)}

## Paired differences of two arms with equal means

{markdown(differences)}

## How often arms of equal means are called better or worse

The sign-flip test asks whether differences are symmetric about 0. It rightly rejects that for an arm that is usually a
little higher and sometimes collapses. So a verdict needs the interval too. Its price: with twenty seeds or fewer, no
difference of less than 20 points is called better. The last two columns have {few:,} repetitions (standard error of
5 %: {standard_error(few)}).

{markdown(list(calls_table(repetitions)))}

## Interquartile means

The percentile bootstrap of rliable, for one task, from {max(repetitions // 5, 1):,} repetitions. It covers less than
95 % where the values are spread out, so tables print the interquartile mean without an interval.

{markdown(list(iqm_table(repetitions)))}

## The success rate of an evaluation

`correlation` is that of the samples of one question. With one question the truth is the success rate at that question.
Rows with more than 30 questions and 8 samples have {few:,} repetitions (standard error: {standard_error(few)}). Beyond
{EXACT} questions the limits are quantiles of random draws.

{markdown(success)}

## Differences of two evaluations on the same questions

Both policies are equally good at every question. With fewer than {statistics.FEW_QUESTIONS} questions the pairs are
samples.

{markdown(questions)}

## Seeds that are evaluated on the same prompts

The spread over seeds lacks the variation between prompts. The evaluations' own intervals, added in quadrature, bring it
in. {few:,} repetitions.

{markdown(shared)}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=10_000)
    parser.add_argument("--questions", type=int, nargs="+", default=[1, 10, 30, 128, 600])
    parser.add_argument("--output", type=Path, help="write the page here instead of printing it")
    options = parser.parse_args()
    text = page(options.repetitions, tuple(options.questions), f"python {' '.join(sys.argv)}")
    if options.output:
        options.output.write_text(text)
    else:
        print(text, end="")


if __name__ == "__main__":
    main()
