"""Which metrics of a run are bounded, so that an interval of their mean is bounded too."""

SHARES = (
    "frac_reward_zero_std",
    "completions/unique_fraction",
    "completions/top_share",
    "completions/most_common_ratio",
    "completions/clipped_ratio",
)
RATES = (*SHARES, "success", "evaluation/success", "evaluation/train/success")
_LAST = ("success", "win_rate", "accuracy", "accuracies", *(share.split("/")[-1] for share in SHARES[1:]))
_ANY = ("pass_at_k", "clip_ratio")  # evaluation/pass_at_k/4, clip_ratio/low_mean


def bounds_of(metric: str) -> tuple[float, float] | None:
    """The range of a metric: (0, 1) for success, pass@k and other shares; None for others, such as reward or length."""
    *groups, last = metric.split("/")
    is_share = last in _LAST or last.startswith(("frac_", "pass@")) or any(part in (*groups, last) for part in _ANY)
    return (0.0, 1.0) if is_share else None
