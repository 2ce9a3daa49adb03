"""Wordle's rewards, compared with the article's figures and with games worked by hand."""

import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path

import pytest

from grpo_jax.errors import UserError
from grpo_jax.rewards.wordle import (
    binary,
    guess_of,
    information_gain,
    partial_credit,
    partial_credit_strict,
    uses_feedback,
    valid_word,
)

# The figures that the article prints; a test below compares them with tests/golden/article.json.
GROUP = ["FOUND", "NOUDI", "FOUND", "WORD ", "CROWN", "INDOM", "DONUT", "FROWN"]
GROUP_REWARDS = [0.8, 0.6, 0.8, 0.0, 0.2, 0.3, 0.5, 0.2]
GROUP_ADVANTAGES = [1.3525, 0.6312, 1.3525, -1.5328, -0.8115, -0.4508, 0.2705, -0.8115]
TEMPERATURES = {  # temperature -> guesses, rewards, advantages
    0.0: (["DOWNY", "DOWNY", "DOWNY"], [0.5, 0.5, 0.5], [0, 0, 0]),
    0.7: (["FOUND", "NOUDI", "WORD"], [0.8, 0.6, 0.0], [1.35, None, -1.53]),
    1.3: (["GROUND", "SPIND", "FINDS"], [0.0, 0.5, 0.2], [-1.94, 0.74, -0.87]),
}
STEPS_REWARDS, STEPS_ADVANTAGES = [0.6, 0.7, -0.1, 0.7], [1.35, 0.63, -1.53, 0.27]


def credit(*guesses: str, secret: str = "POUND") -> list[float]:
    return partial_credit(completions=guesses, secret=[secret] * len(guesses))


def strict_credit(guess: str, secret: str = "POUND") -> float:
    return partial_credit_strict(completions=[guess], secret=[secret])[0]


def game(*guesses: str) -> list[dict[str, str]]:
    messages = [m for g in guesses for m in ({"role": "assistant", "content": g}, {"role": "user", "content": "xxxxx"})]
    return messages[:-1]


def standardized(rewards: Sequence[float]) -> list[float]:
    """The article's advantage: (r - mean) / population std."""
    mean, std = statistics.fmean(rewards), statistics.pstdev(rewards)
    return [(reward - mean) / std for reward in rewards]


class TestArticle:
    def test_the_figures_copied_here_are_the_articles(self) -> None:
        article = json.loads((Path(__file__).parents[1] / "golden" / "article.json").read_text())
        group, steps = article["group_of_eight"], article["three_step_figure"]
        assert (group["guess"], group["reward"], group["advantage"]) == (GROUP, GROUP_REWARDS, GROUP_ADVANTAGES)
        assert (steps["reward"], steps["advantage"]) == (STEPS_REWARDS, STEPS_ADVANTAGES)
        for row in article["temperature_figure"]:
            assert (row["guess"], row["reward"], row["advantage"]) == TEMPERATURES[row["temperature"]]

    def test_the_rewards_of_the_group_of_eight(self) -> None:
        assert credit(*GROUP) == pytest.approx(GROUP_REWARDS, abs=1e-9)

    def test_the_advantages_of_the_group_of_eight(self) -> None:
        assert standardized(credit(*GROUP)) == pytest.approx(GROUP_ADVANTAGES, abs=5e-5)  # four decimals are printed

    @pytest.mark.parametrize("temperature", TEMPERATURES)
    def test_the_rewards_of_the_temperature_figure(self, temperature: float) -> None:
        guesses, rewards, _ = TEMPERATURES[temperature]
        assert credit(*guesses) == pytest.approx(rewards, abs=1e-9)

    def test_word_with_its_space_is_worth_nothing_only_because_the_space_is_stripped(self) -> None:
        assert len("WORD ") == len("POUND")  # without stripping, O (in place) and D (elsewhere) would earn 0.3
        assert credit("WORDX") == [pytest.approx(0.3)]
        assert credit("WORD ") == [0.0]

    def test_the_advantages_of_the_temperature_figure_are_not_those_of_its_groups_of_three(self) -> None:
        assert standardized([0.8, 0.6, 0.0]) == pytest.approx([0.98, 0.39, -1.37], abs=5e-3)  # printed 1.35, -1.53
        assert standardized([0.0, 0.5, 0.2]) == pytest.approx([-1.14, 1.30, -0.16], abs=5e-3)  # -1.94, 0.74, -0.87
        # At 0.7 they are those of the group of eight. At 1.3 one mean and one std explain all three, so they could come
        # from a larger group whose other guesses the article does not print.
        std = (0.5 - 0.0) / (0.74 - -1.94)
        mean = 1.94 * std
        assert (0.2 - mean) / std == pytest.approx(-0.87, abs=5e-3)

    def test_the_three_step_figure_disagrees_with_the_rule_in_every_number(self) -> None:
        assert standardized(STEPS_REWARDS) == pytest.approx([0.37, 0.67, -1.72, 0.67], abs=5e-3)
        assert STEPS_REWARDS[1] == STEPS_REWARDS[3] and STEPS_ADVANTAGES[1] != STEPS_ADVANTAGES[3]
        by_advantage = dict(zip((round(a, 2) for a in GROUP_ADVANTAGES), GROUP_REWARDS, strict=True))
        assert [by_advantage[a] for a in STEPS_ADVANTAGES] == [0.8, 0.6, 0.0, 0.5]  # the rewards that it should print

    def test_a_binary_reward_gives_the_whole_group_the_same(self) -> None:
        assert binary(completions=GROUP, secret=["POUND"] * 8) == [0.0] * 8


class TestGuess:
    @pytest.mark.parametrize(
        ("turn", "expected"),
        [
            ("POUND", "POUND"),
            (" pound\n", "POUND"),
            ("<answer>Pound</answer>", "POUND"),
            ("<think>HOUND?</think> <answer> pound </answer>", "POUND"),
            ("<answer>HOUND</answer> no: <answer>POUND</answer>", "POUND"),
            ("<answer></answer>", ""),
            ("<answer>POUND", "<ANSWER>POUND"),  # a tag without its end is not repaired
            ("P O U N D", "P O U N D"),
            ("", ""),
        ],
    )
    def test_guess_of(self, turn: str, expected: str) -> None:
        assert guess_of(turn) == expected


class TestCredit:
    @pytest.mark.parametrize("guess", ["", "POUN", "POUNDS", "POUND!", "P O U N D", "     "])
    def test_a_wrong_length_is_worth_nothing(self, guess: str) -> None:
        assert credit(guess) == [0.0]
        assert strict_credit(guess) == 0.0
        assert binary(completions=[guess], secret=["POUND"]) == [0.0]

    @pytest.mark.parametrize("guess", ["pound", "\tPound ", "<answer>pOUND</answer>"])
    def test_case_and_surrounding_space_do_not_matter(self, guess: str) -> None:
        assert credit(guess) == credit(guess, secret=" pound") == [1.0]
        assert strict_credit(guess) == strict_credit(guess, secret=" pound") == 1.0
        assert binary(completions=[guess], secret=["pound "]) == [1.0]

    @pytest.mark.parametrize(
        ("guess", "secret", "lenient", "strict"),
        [
            ("ADDED", "POUND", 0.1 + 0.1 + 0.2, 0.2),  # the one D is in place: the article also rewards the others
            ("DADDY", "POUND", 0.1 + 0.1 + 0.1, 0.1),  # the one D is elsewhere: three times, or once
            ("EERIE", "THREE", 0.1 + 0.1 + 0.2 + 0.2, 0.1 + 0.2 + 0.2),  # two E's: one in place, one elsewhere
            ("LEVEL", "HELLO", 0.1 + 0.2 + 0.1 + 0.1, 0.1 + 0.2 + 0.1),  # two L's are found, and one E
            ("THREE", "THREE", 1.0, 1.0),
            ("-----", "POUND", 0.0, 0.0),
            ("P-U-D", "POUND", 0.2 + 0.2 + 0.2, 0.2 + 0.2 + 0.2),  # of the right length, but not a word
        ],
    )
    def test_repeated_letters(self, guess: str, secret: str, lenient: float, strict: float) -> None:
        assert credit(guess, secret=secret) == [pytest.approx(lenient)]
        assert strict_credit(guess, secret=secret) == pytest.approx(strict)

    def test_equal_credit_is_equal_to_the_last_bit(self) -> None:
        assert len(set(credit("FOUND", "HOUND", "MOUND", "ROUND", "SOUND", "WOUND"))) == 1

    def test_a_game_is_scored_by_its_last_guess(self) -> None:
        won, lost = game("CRANE", "FOUND", "POUND"), game("POINT", "MOUND", "CRANE")
        secret = ["POUND", "POUND"]
        assert binary(completions=[won, lost], secret=secret) == [1.0, 0.0]
        assert partial_credit(completions=[won, lost], secret=secret) == [1.0, 0.2]  # N of CRANE is in its place
        assert partial_credit_strict(completions=[won, lost], secret=secret) == [1.0, 0.2]

    def test_each_completion_has_its_own_secret(self) -> None:
        assert binary(completions=["POUND", "POUND"], secret=["POUND", "CRANE"]) == [1.0, 0.0]


class TestValidWord:
    @pytest.mark.parametrize(
        ("completion", "expected"),
        [
            ("POUND", 1.0),  # an answer
            ("aahed", 1.0),  # allowed only as a guess
            ("<answer>pound</answer>", 1.0),
            ("NOUDI", 0.0),
            ("WORD", 0.0),
            ("", 0.0),
            (game("POUND", "NOUDI", "CRANE", "XXXXX"), 0.5),
            ([], None),
        ],
    )
    def test_the_share_of_guesses_that_the_game_accepts(self, completion: str, expected: float | None) -> None:
        assert valid_word(completions=[completion]) == [expected]


class TestUsesFeedback:
    @pytest.mark.parametrize(
        ("guesses", "expected"),
        [
            (["POUND"], None),  # nothing to use yet
            ([], None),
            (["FOUND", "HOUND"], 1.0),  # XGGGG leaves HOUND
            (["FOUND", "FOUND"], 0.0),  # the same word again cannot be it
            (["FOUND", "CRANE", "HOUND"], 0.5),  # CRANE contradicts XGGGG, HOUND agrees with it
            (["FOUND", "HOUND", "POUND"], 1.0),
            (["CRANE", "FOUND", "FOUND"], 0.5),  # both agree with CRANE's XXXGX, the second not with its own XGGGG
            (["QQQQQ", "CRANE"], 1.0),  # a guess that is not accepted gives no information
            (["FOUND", "QOUND"], 0.0),  # agrees with the marks, but is not a word
        ],
    )
    def test_the_share_of_later_guesses_that_could_be_the_secret(
        self, guesses: list[str], expected: float | None
    ) -> None:
        assert uses_feedback(completions=[game(*guesses)], secret=["POUND"]) == [expected]


class TestInformationGain:
    def test_a_game_that_is_won_leaves_no_uncertainty(self) -> None:
        assert information_gain(completions=["POUND", game("CRANE", "pound")], secret=["POUND"] * 2) == [1.0, 1.0]

    @pytest.mark.parametrize("guesses", [["NOUDI"], ["", "POUNDS"]])
    def test_a_refused_guess_gains_nothing(self, guesses: list[str]) -> None:
        assert information_gain(completions=[game(*guesses)], secret=["POUND"]) == [0.0]

    def test_the_gain_is_in_bits_of_the_answers_left(self) -> None:
        # The feedback to FOUND with the secret POUND is XGGGG. Seven of the answers remain: BOUND HOUND MOUND POUND
        # ROUND SOUND WOUND.
        expected = math.log2(2315 / 7) / math.log2(2315)
        assert information_gain(completions=["FOUND"], secret=["POUND"]) == [pytest.approx(expected)]

    def test_a_guess_that_was_already_answered_adds_nothing(self) -> None:
        once, twice = game("CRANE"), game("CRANE", "CRANE")
        gains = information_gain(completions=[once, twice], secret=["POUND"] * 2)
        assert 0 < gains[0] == gains[1] < 1

    def test_a_secret_that_is_no_answer_is_refused(self) -> None:
        with pytest.raises(UserError, match="'AAHED'"):
            information_gain(completions=["POUND"], secret=["AAHED"])
