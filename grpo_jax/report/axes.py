"""The range of an axis: that of what is drawn on it, so that a metric that lives between 0 and 5 % can be read.

This is for points and lines, whose height is read off the axis. The length of a bar is read from 0: its axis keeps it.
"""

from collections.abc import Iterable

import numpy as np

EDGE = 0.05  # of the range, beyond its ends, so that a dot at 0 or 100 % is drawn whole


def fitted(values: Iterable[float], *, is_share: bool = False, room: float = 0.0) -> tuple[float, float]:
    """The ends of an axis for some values.

    A share never leaves [0, 1] by more than the edge. Its axis begins at 0 (or ends at 1) if that is near, and is the
    whole of [0, 1] if the values take up more than half of it.

    Args:
      room: how much further than the values the axis goes on either side, as a part of their range.
    """
    known = np.array(list(values), float)
    known = known[np.isfinite(known)]
    low, high = (float(known.min()), float(known.max())) if known.size else (0.0, 1.0)
    if low == high:
        half = 0.05 if is_share else abs(low) / 2 or 0.5
        low, high = low - half, high + half
    size = room * (high - low)
    low, high = low - size, high + size
    if is_share:
        low, high = max(low, 0.0), min(high, 1.0)
        span = high - low
        low, high = 0.0 if low < span / 2 else low, 1.0 if 1 - high < span / 2 else high
        low, high = (0.0, 1.0) if span > 0.5 else (low, high)
    edge = EDGE * (high - low)
    return low - edge, high + edge


def percent(share: float) -> str:
    """A share in percent: in whole ones, but in three digits below 10 % and above 90 %, where they matter."""
    return f"{share:.0%}" if 0.1 <= share <= 0.9 else f"{100 * share:.3g}%"
