"""The range of an axis, worked by hand."""

import pytest

from grpo_jax.report.axes import fitted, percent


@pytest.mark.parametrize(
    ("values", "room", "low", "high"),
    [
        ([0.01, 0.05], 0.0, 0.0, 0.05),  # 0 is nearer to 1 % than half of the range of 4 points: the axis begins there
        ([0.95, 0.99], 0.0, 0.95, 1.0),
        ([0.40, 0.44], 0.0, 0.40, 0.44),  # far from both ends: only what the values take up
        ([0.2, 0.9], 0.0, 0.0, 1.0),  # more than half of the whole: all of it
        ([0.02, 0.04], 0.3, 0.0, 0.046),  # 0.3 of 2 points is 0.6 points on either side
        ([0.0, 0.0], 0.0, 0.0, 0.05),  # a constant gets 5 points on either side, and none below 0
        ([1.0], 0.0, 0.95, 1.0),
        ([float("nan"), 0.01, 0.05], 0.0, 0.0, 0.05),
    ],
)
def test_the_axis_of_shares_fits_them_and_has_room_for_a_dot_at_either_end(values, room, low, high):
    edge = 0.05 * (high - low)
    assert fitted(values, is_share=True, room=room) == pytest.approx((low - edge, high + edge))


@pytest.mark.parametrize(
    ("values", "low", "high"),
    [([2.0, 4.0], 1.9, 4.1), ([-3.0, -3.0], -4.65, -1.35), ([0.0], -0.55, 0.55), ([], -0.05, 1.05)],
)
def test_the_axis_of_other_numbers_fits_them(values, low, high):
    """A constant c gets half of itself on either side: from -4.5 to -1.5, with 5 % of 3 at either end."""
    assert fitted(values) == pytest.approx((low, high))


def test_small_and_large_shares_have_digits():
    shares = (0.0, 0.045, 0.05, 0.333, 0.7, 0.996, 1.0)
    assert [percent(share) for share in shares] == ["0%", "4.5%", "5%", "33%", "70%", "99.6%", "100%"]
