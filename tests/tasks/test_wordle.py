"""Wordle's rules, tasks and reference players."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grpo_jax.errors import UserError
from grpo_jax.rewards.wordle_rules import consistent_indices, encode
from grpo_jax.tasks.wordle import (
    PLAIN_ALPHABET,
    allowed,
    answers,
    blind,
    consistent,
    feedback,
    play,
    random_consistent,
    single_guess,
    six_turns,
    win_rate,
    words,
)

few_letters = st.text(alphabet="ABC", min_size=5, max_size=5)  # so that letters repeat


class TestLists:
    def test_they_are_those_that_the_original_game_shipped(self) -> None:
        assert (len(answers()), len(allowed()), len(words())) == (2315, 10657, 12972)
        assert not set(answers()) & set(allowed())
        assert {"POUND", "CRANE", "ABACK", "ZONAL"} <= set(answers())
        assert {"AAHED", "ZYMIC", "SOARE"} <= set(allowed())

    def test_every_word_is_five_capital_letters_and_stands_once_in_order(self) -> None:
        for listed in (answers(), allowed(), words()):
            assert list(listed) == sorted(set(listed))
            assert all(len(word) == 5 and word.isascii() and word.isalpha() and word.isupper() for word in listed)


class TestFeedback:
    @pytest.mark.parametrize(
        ("guess", "secret", "marks"),
        [
            ("POUND", "POUND", "GGGGG"),
            ("CRANE", "POUND", "XXXGX"),
            ("DONUT", "POUND", "YGYYX"),
            ("SPEED", "ABIDE", "XXYXY"),  # the one E: the first is elsewhere, the second is one too many
            ("SPEED", "ERASE", "YXYYX"),  # two E's: both elsewhere
            ("SPEED", "STEAL", "GXGXX"),  # the one E is in place, so the other is none
            ("SPEED", "CREPE", "XYGYX"),  # one E in place, one elsewhere
            ("EERIE", "THREE", "YXGXG"),  # three E's against two: the last is in place, so one more counts
            ("LEVEL", "HELLO", "YGXXY"),
            ("ALLOY", "LLAMA", "YGYXX"),
            ("GEESE", "THESE", "XXGGG"),  # a letter in place is matched before one to its left
            ("ADDED", "POUND", "XXXXG"),
            ("BANAL", "ANNAL", "XYGGG"),
        ],
    )
    def test_games_worked_by_hand(self, guess: str, secret: str, marks: str) -> None:
        assert feedback(guess, secret) == marks

    def test_case_and_surrounding_space_do_not_matter(self) -> None:
        assert feedback(" crane\n", "pound") == "XXXGX"

    @pytest.mark.parametrize("guess", ["", "WORD", "POUNDS"])
    def test_a_guess_of_another_length_is_refused(self, guess: str) -> None:
        with pytest.raises(UserError, match=f"{len(guess)} letters, the secret has 5"):
            feedback(guess, "POUND")

    @given(few_letters, few_letters)
    def test_no_letter_is_matched_more_often_than_the_secret_has_it(self, guess: str, secret: str) -> None:
        marks = feedback(guess, secret)
        for letter in "ABC":
            matched = sum(g == letter and m != "X" for g, m in zip(guess, marks, strict=True))
            assert matched == min(guess.count(letter), secret.count(letter))

    @given(few_letters, few_letters)
    def test_green_is_where_the_letters_agree(self, guess: str, secret: str) -> None:
        assert [m == "G" for m in feedback(guess, secret)] == [g == s for g, s in zip(guess, secret, strict=True)]


class TestConsistency:
    def test_a_word_is_consistent_if_it_would_have_had_the_same_feedback(self) -> None:
        history = [("CRANE", "XXXGX"), ("DONUT", "YGYYX")]
        assert consistent("POUND", history) and consistent("found", history)
        assert not consistent("SOUTH", history)  # its N is missing
        assert not consistent("DONUT", history)
        assert not consistent("POUNDS", history)
        assert consistent("ANYTHING", [])

    @given(few_letters, st.lists(few_letters, max_size=3), st.lists(few_letters, min_size=1, max_size=30))
    def test_the_filter_over_many_words_is_the_rule_for_one(
        self, secret: str, guesses: list[str], candidates: list[str]
    ) -> None:
        history = [(guess, feedback(guess, secret)) for guess in guesses]
        expected = [i for i, word in enumerate(candidates) if consistent(word, history)]
        assert consistent_indices(encode(candidates), history).tolist() == expected


class TestSingleGuess:
    def test_it_is_one_example_in_both_splits(self) -> None:
        task = single_guess()
        assert task.train == task.held_out == [{"prompt": "", "secret": "POUND"}]
        assert (task.name, task.max_turns, task.reply) == ("wordle_pound", 1, None)

    def test_success_is_the_exact_word(self) -> None:
        task = single_guess("crane")
        assert task.success(completions=["CRANE", "crate"], secret=["CRANE"] * 2) == [True, False]

    def test_demonstrations_are_words_of_the_game_but_never_the_secret(self) -> None:
        task, rng = single_guess(), random.Random(0)
        assert task.demonstrate is not None
        shown = {task.demonstrate(task.train[0], rng)[0] for _ in range(50_000)}
        assert shown <= set(words()) - {"POUND"}
        assert len(shown) > 12_000

    def test_a_secret_that_is_no_word_is_refused(self) -> None:
        with pytest.raises(UserError, match="'NOUDI'"):
            single_guess("noudi")


class TestSixTurns:
    def test_the_secrets_are_disjoint_and_decided_by_the_seed(self) -> None:
        task = six_turns(300, 100, seed=1)
        train, held_out = ({example["secret"] for example in split} for split in (task.train, task.held_out))
        assert (len(train), len(held_out), len(train | held_out)) == (300, 100, 400)
        assert train | held_out <= set(answers())
        assert six_turns(300, 100, seed=1).train == task.train
        assert six_turns(300, 100, seed=2).train != task.train

    @pytest.mark.parametrize("sizes", [(0, 10), (10, -1), (2000, 316)])
    def test_more_secrets_than_there_are_or_none_are_refused(self, sizes: tuple[int, int]) -> None:
        with pytest.raises(UserError, match="2315"):
            six_turns(*sizes)

    def test_with_no_held_out_secret_the_training_secrets_are_played(self) -> None:
        task = six_turns(2315, 0)
        assert task.held_out == task.train and {e["secret"] for e in task.train} == set(answers())

    def test_an_unknown_style_is_refused(self) -> None:
        with pytest.raises(UserError, match="'fancy'"):
            six_turns(style="fancy")  # type: ignore[arg-type]

    def test_a_plain_game(self) -> None:
        reply = six_turns(style="plain").reply
        assert reply is not None
        example = {"prompt": "", "secret": "POUND"}
        guesses = ["CRANE", "WORD", "NOUDI", "DONUT", "POUND"]
        replies = [reply(example, guesses[: turn + 1]) for turn in range(5)]
        assert replies == ["ⓒⓡⓐNⓔ", "-----", "-----", "dOnuⓣ", None]  # not five letters, not a word, won
        assert set("".join(guesses + replies[:4])) <= set(PLAIN_ALPHABET)

    def test_a_chat_game(self) -> None:
        reply = six_turns(style="chat").reply
        assert reply is not None
        example = {"prompt": [], "secret": "POUND"}
        turns = ["<think>Vowels.</think><answer>crane</answer>", "I do not know", "ROUND", "HOUND", "MOUND", "SOUND"]
        assert reply(example, turns[:1]) == "CRANE: X X X G X. 5 guesses left."
        assert reply(example, turns[:2]) == "That is no English word of 5 letters. 4 guesses left."
        assert reply(example, turns[:5]) == "MOUND: X G G G G. 1 guess left."
        assert reply(example, turns) is None
        assert reply(example, ["<answer>POUND</answer>"]) is None

    def test_the_game_ends_after_six_guesses_even_if_all_were_refused(self) -> None:
        task = six_turns()
        assert task.reply is not None
        assert task.max_turns == 6
        assert task.reply(task.train[0], ["?"] * 5) == "-----"
        assert task.reply(task.train[0], ["?"] * 6) is None

    def test_the_chat_prompt_explains_the_marks_and_the_tags(self) -> None:
        (message,) = six_turns(style="chat").train[0]["prompt"]
        assert message["role"] == "user"
        assert "<answer></answer>" in message["content"]

    @pytest.mark.parametrize("style", ["plain", "chat"])
    def test_demonstrations_are_games_with_consistent_guesses_among_the_training_secrets(self, style: str) -> None:
        task = six_turns(100, 10, style=style)  # type: ignore[arg-type]
        assert task.demonstrate is not None and task.reply is not None
        known = {example["secret"] for example in task.train}
        for number, example in enumerate(task.train[:20]):
            turns = task.demonstrate(example, random.Random(number))
            guesses = [turn.removeprefix("<answer>").removesuffix("</answer>") for turn in turns]
            assert guesses == turns or style == "chat"
            history = [(guess, feedback(guess, example["secret"])) for guess in guesses]
            assert set(guesses) <= known
            assert all(consistent(guess, history[:turn]) for turn, guess in enumerate(guesses))
            assert task.reply(example, turns) is None
            assert all(task.reply(example, turns[:turn]) is not None for turn in range(1, len(turns)))

    def test_success_is_a_won_game(self) -> None:
        games = [[{"role": "assistant", "content": guess} for guess in ("CRANE", last)] for last in ("POUND", "FOUND")]
        assert six_turns().success(completions=games, secret=["POUND"] * 2) == [True, False]


class TestReferences:
    def test_they_are_the_win_rates_of_the_two_players_on_the_training_secrets(self) -> None:
        task = six_turns(30, 10, seed=3)
        known = [example["secret"] for example in task.train]
        players = {"blind": blind(known), "random consistent": random_consistent(known)}
        assert task.references == {name: win_rate(player, known, 1000) for name, player in players.items()}
        assert task.references["blind"] < task.references["random consistent"]
        assert dict(single_guess().references) == {}

    def test_the_defaults_are_200_secrets_of_either_kind_in_the_plain_style(self) -> None:
        task = six_turns()
        assert (len(task.train), len(task.held_out), task.name) == (200, 200, "wordle_six_turns_plain")
        assert task.train == six_turns(seed=0).train and {e["prompt"] for e in task.train} == {""}
        assert six_turns(1, 1, style="chat").name == "wordle_six_turns_chat"

    def test_a_win_rate_is_that_of_its_own_games(self) -> None:
        wins = iter([True, False, False, True])
        games: list[str] = []

        def player(history: object, rng: random.Random) -> str:
            if not history:
                games.append("won" if next(wins) else "lost")
            return "CRANE" if games[-1] == "won" else "POUND"

        assert win_rate(player, ["CRANE"], 4) == 1 / 2 and len(games) == 4
        player = random_consistent(answers())
        assert win_rate(player, answers()[:9], 20, seed=1) == win_rate(player, answers()[:9], 20, seed=1)

    def test_a_single_guess_may_have_a_prompt(self) -> None:
        task = single_guess("crane", prompt="Guess.")
        assert task.train == task.held_out == [{"prompt": "Guess.", "secret": "CRANE"}] and task.name == "wordle_crane"


class TestPlayers:
    """The intervals are 3.5 standard errors around the known win rates, so the tests do not depend on the seeds."""

    def test_a_game_ends_when_it_is_won_or_after_six_guesses(self) -> None:
        assert play(blind(["CRANE"]), "CRANE", random.Random(0)) == ["CRANE"]
        assert play(blind(["CRANE"]), "POUND", random.Random(0)) == ["CRANE"] * 6

    def test_the_floor_is_six_draws_among_the_answers(self) -> None:
        # 1 - (1 - 1/2315)^6 = 0.26 %; with 20 answers 1 - (19/20)^6 = 26.49 %, which needs fewer games
        chance, n = 1 - (19 / 20) ** 6, 4000
        error = (chance * (1 - chance) / n) ** 0.5
        few = answers()[:20]
        assert win_rate(blind(few), few, n) == pytest.approx(chance, abs=3.5 * error)
        assert win_rate(blind(answers()), answers(), n) < 0.0026 + 3.5 * (0.0026 / n) ** 0.5

    @pytest.mark.parametrize(("candidates", "chance", "n"), [(answers, 0.982, 800), (words, 0.904, 200)])
    def test_the_ceiling_is_the_random_consistent_player(self, candidates, chance: float, n: int) -> None:
        error = (chance * (1 - chance) / n) ** 0.5
        player = random_consistent(candidates())
        assert win_rate(player, answers(), n) == pytest.approx(chance, abs=3.5 * error)

    def test_the_consistent_player_guesses_on_when_the_secret_is_not_among_its_words(self) -> None:
        guesses = play(random_consistent(["FOUND", "HOUND"]), "POUND", random.Random(0))
        assert len(guesses) == 6 and set(guesses) == {"FOUND", "HOUND"}
