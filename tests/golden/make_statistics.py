"""Writes statistics.json: what rliable and statsmodels make of the numbers below. Neither is needed to run the tests.

pip install rliable statsmodels 'pandas<3' && python tests/golden/make_statistics.py
"""

import json
from importlib.metadata import version
from pathlib import Path

import numpy as np
from rliable import library, metrics
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.power import TTestPower

rng = np.random.default_rng(0)
scores = np.round(rng.beta([2, 5, 3], [3, 2, 3], size=(7, 3)), 2)  # seven runs on three tasks
baseline = np.round(rng.beta([2, 4, 2], [3, 3, 3], size=(5, 3)), 2)

values, intervals = library.get_interval_estimates(
    {"scores": scores},
    lambda x: np.array([metrics.aggregate_iqm(x)]),
    reps=50_000,
    random_state=np.random.RandomState(1),
)
tables = [[[794, 150], [86, 570]], [[3, 9], [1, 7]], [[10, 0], [6, 4]]]  # the first: Agresti, approval ratings
p_values = [[0.01, 0.04, 0.03, 0.005], [0.03125, 0.03125, 0.5], [0.2], [0.001, 0.02, 0.02, 0.9, 0.04]]
golden = {
    "versions": {name: version(name) for name in ("rliable", "statsmodels")},
    "scores": scores.tolist(),
    "baseline": baseline.tolist(),
    "interquartile_mean": float(values["scores"][0]),
    "interval": intervals["scores"][:, 0].tolist(),
    "probability_of_improvement": float(metrics.probability_of_improvement(scores, baseline)),
    "mcnemar": [{"table": table, "p": float(mcnemar(table, exact=True).pvalue)} for table in tables],
    "detectable": {str(n): float(TTestPower().solve_power(nobs=n, alpha=0.05, power=0.8)) for n in (3, 5, 10, 34)},
    "holm": [{"p": p, "adjusted": multipletests(p, method="holm")[1].tolist()} for p in p_values],
}
(Path(__file__).parent / "statistics.json").write_text(json.dumps(golden, indent=2) + "\n")
