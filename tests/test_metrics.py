"""The metrics against numbers worked by hand.

Wilson       (p + z^2/2n +- z sqrt(p (1-p)/n + z^2/4n^2)) / (1 + z^2/n),  z = 1.95996
pass@k       1 - C(n - c, k) / C(n, k)                                       arXiv 2107.03374, Eq. 1
A-accuracy   rightly ordered (right, wrong) pairs / all such pairs           arXiv 2309.02144, section 2
perplexity   exp( - mean log p )
"""

import itertools
import math

import numpy as np
import pytest

from minicot.metrics import accuracy, assessment, assessment_accuracy, degeneration, judge, majority_accuracy
from minicot.metrics import mean_interval
from minicot.metrics import paired_difference, pass_at_k, perplexity, repeated_4grams, rerank_accuracy
from minicot.metrics import ratio_values, share_with_pair, verdict
from tests.helpers import assert_value_named


def better_of(rewards):
    rewards = np.asarray(rewards, dtype=float)
    return rewards[:, :, None] > rewards[:, None, :]


# -------------------------------------------------- accuracy and intervals


def test_accuracy_has_wilsons_interval():
    """8 of 10: the textbook interval is 0.490 to 0.943."""
    share, low, high = accuracy([1] * 8 + [0] * 2)
    assert share == 0.8
    assert (low, high) == (pytest.approx(0.4901625, abs=1e-6), pytest.approx(0.9433178, abs=1e-6))


def test_accuracy_of_all_right_still_has_an_interval():
    """n of n: low = n / (n + z^2); 0 of n mirrors it."""
    z2 = 1.959963984540054**2
    assert accuracy([True] * 10) == (1.0, pytest.approx(10 / (10 + z2)), 1.0)
    assert accuracy([False] * 10) == (0.0, 0.0, pytest.approx(z2 / (10 + z2)))


def test_paired_difference_counts_what_b_gains_over_a():
    a, b = [[1, 0, 0, 0]], [[1, 1, 1, 0]]
    difference, low, high = paired_difference(a, b)
    assert difference == 0.5 and (low, high) == (0.0, 1.0)
    assert paired_difference(b, a)[0] == -0.5


def test_paired_difference_of_equal_answers_is_0_without_doubt():
    a = np.random.default_rng(0).integers(0, 2, (3, 50))
    assert paired_difference(a, a) == (0.0, 0.0, 0.0)


def test_pairing_makes_the_interval_narrower_than_two_separate_ones():
    """b is right wherever a is and on 20 more of 400: sharp when paired, lost in the noise when not."""
    a = np.tile([1, 0], 200)
    b = a.copy()
    b[1:40:2] = 1
    difference, low, high = paired_difference([a], [b])
    assert difference == 0.05 and low > 0.02 and high < 0.08
    assert verdict(low, high, direction="up") == "holds"
    assert accuracy(a)[2] > accuracy(b)[1]  # the separate intervals overlap


def test_bootstrap_agrees_with_the_exact_distribution_of_resamples():
    """Two seeds, two problems: all 2^2 x 2^2 resamples can be listed."""
    d = np.array([[0.0, 1.0], [2.0, 5.0]])
    means = [
        d[np.ix_(rows, columns)].mean()
        for rows in itertools.product(range(2), repeat=2)
        for columns in itertools.product(range(2), repeat=2)
    ]
    exact = np.quantile(np.repeat(means, 1000), [0.025, 0.975])
    assert mean_interval(d, resamples=40_000) == (2.0, pytest.approx(exact[0]), pytest.approx(exact[1]))


def test_seeds_add_their_own_uncertainty():
    """Every problem agrees, but the seeds do not: an interval over problems alone would have width 0."""
    a = np.zeros((3, 200))
    b = np.stack([np.zeros(200), np.zeros(200), np.ones(200)])
    difference, low, high = paired_difference(a, b)
    assert difference == pytest.approx(1 / 3) and low == 0.0 and high == 1.0
    assert verdict(low, high, direction="up") == "not seen"


def test_bootstrap_interval_has_the_width_that_theory_gives():
    """One seed: 1.96 standard errors on either side, for many problems."""
    b = np.random.default_rng(1).random((1, 2000)) < 0.3
    mean, low, high = mean_interval(b)
    half = 1.96 * math.sqrt(mean * (1 - mean) / 2000)
    assert (high - low) / 2 == pytest.approx(half, rel=0.05)


def test_bootstrap_is_deterministic_given_its_seed():
    rng = np.random.default_rng(2)
    a, b = rng.random((2, 3, 40))
    assert paired_difference(a, b, seed=5) == paired_difference(a, b, seed=5)
    assert paired_difference(a, b, seed=5) != paired_difference(a, b, seed=6)


@pytest.mark.parametrize(
    "low, high, expected",
    [
        (0.01, 0.05, "holds"),
        (-0.01, 0.05, "not seen"),
        (-0.05, -0.01, "reversed"),
        (0.0, 0.05, "not seen"),
        (-0.05, 0.0, "not seen"),
        (0.0, 0.0, "not seen"),
    ],
)
def test_verdict_on_a_direction(low, high, expected):
    assert verdict(low, high, direction="up") == expected
    assert verdict(-high, -low, direction="down") == expected


@pytest.mark.parametrize(
    "low, high, expected",
    [
        (-0.01, 0.01, "holds"),
        (-0.03, 0.01, "not seen"),
        (-0.05, -0.03, "reversed"),
        (-0.02, 0.01, "not seen"),
    ],
)
def test_verdict_on_level_with(low, high, expected):
    assert verdict(low, high, at_least=-0.02) == expected


# -------------------------------------------------- K responses a problem


def test_pass_at_k_by_hand():
    """n = 4, c = 1: pass@1 = 1/4, pass@2 = 1 - C(3,2)/C(4,2) = 1/2, pass@4 = 1."""
    assert [pass_at_k(4, 1, k) for k in (1, 2, 4)] == [0.25, 0.5, 1.0]
    assert pass_at_k(5, 0, 3) == 0.0 and pass_at_k(5, 3, 3) == 1.0


def test_pass_at_k_is_the_mean_over_all_subsets():
    right = [1, 1, 0, 0, 0, 0, 1]
    for k in range(1, 8):
        draws = [any(draw) for draw in itertools.combinations(right, k)]
        assert pass_at_k(7, 3, k) == pytest.approx(sum(draws) / len(draws))


def test_majority_accuracy_by_hand():
    answers = [["1", "2", "2"], ["7", None, None], [None, None, None], ["3", "3.0", "4"]]
    gold = ["2", "7", "5", "3"]
    assert majority_accuracy(answers, gold) == 0.75
    assert majority_accuracy(answers, gold, k=1) == 0.5  # "1" is wrong, no vote is wrong


def test_assessment_accuracy_by_hand():
    """Right at -1 and -3, wrong at -2: 1 of 2 pairs. Tied scores are not in order, tied rewards no pair."""
    assert assessment_accuracy([[-1.0, -3.0, -2.0]], better_of([[1, 1, 0]])) == (1, 2)
    assert assessment_accuracy([[-1.0, -1.0]], better_of([[1, 0]])) == (0, 1)
    assert assessment_accuracy([[-1.0, -2.0]], better_of([[1, 1]])) == (0, 0)
    assert assessment_accuracy([[-1.0, -2.0, math.nan]], better_of([[2, 1, math.nan]])) == (1, 1)


def test_share_with_pair_by_hand():
    assert share_with_pair(better_of([[1, 0], [1, 1], [0, 0], [0, 1]])) == 0.5


def test_rerank_accuracy_by_hand():
    """Chosen: right; wrong; a tie of one right and one wrong; the absent slot's high score does not count."""
    scores = [[-1.0, -2.0], [-1.0, -2.0], [-1.0, -1.0], [9.0, -5.0]]
    correct = [[1, 0], [0, 1], [1, 0], [0, 1]]
    present = [[True, True], [True, True], [True, True], [False, True]]
    assert rerank_accuracy(scores, correct, present) == (1 + 0 + 0.5 + 1) / 4
    assert rerank_accuracy(scores, correct) == (1 + 0 + 0.5 + 0) / 4


def test_ratio_values_have_the_ratio_as_their_mean_and_its_spread():
    """1 of 2 and 4 of 4: the ratio is 5/6, not the mean of the two shares; delete-one pulls by hand."""
    values = ratio_values([[1, 2], [4, 4]])
    assert values == [pytest.approx(5 / 6 + (1 - 10 / 6) / 3), pytest.approx(5 / 6 + (4 - 20 / 6) / 3)]
    assert sum(values) / 2 == pytest.approx(5 / 6)
    assert ratio_values([[3, 4]] * 5) == pytest.approx([0.75] * 5)  # equal problems: no doubt
    drawn = np.random.default_rng(0).integers(1, 30, 4000)
    counts = np.stack([np.random.default_rng(1).binomial(drawn, 0.7), drawn], 1)
    means = [c[:, 0].sum() / c[:, 1].sum() for c in counts.reshape(40, 100, 2)]
    expected = np.std([np.mean(ratio_values(c)) for c in counts.reshape(40, 100, 2)])
    assert np.std(means) == pytest.approx(expected)
    _, low, high = mean_interval([ratio_values(counts)])
    assert (high - low) / 2 == pytest.approx(1.96 * np.std(means) / np.sqrt(40), rel=0.3)


def test_assessment_numbers_by_hand():
    """Problem a: right at -1, wrong at -2 and -0.5: 1 of 2 pairs, a wrong one on top. b: right alone. c: two
    right over one wrong: 2 of 2."""
    judged = {
        "scores": [[-1.0, -2.0, -0.5], [-3.0], [-1.0, -1.5, -4.0]],
        "tokens": [[2, 1, 4], [1], [2, 2, 1]],
        "rewards": [[1.0, 0.0, 0.0], [1.0], [1.0, 1.0, 0.0]],
        "correct": [[True, False, False], [True], [True, True, False]],
        "reference_nlls": [0.5, 1.5],
    }
    numbers = assessment(judged)
    assert numbers["ordered_pairs"] == [[1, 2], [0, 0], [2, 2]] and numbers["pairs"] == 4
    assert numbers["assessment_accuracy"] == pytest.approx(3 / 4) and numbers["problems"] == 3
    assert numbers["by_length"] == pytest.approx(
        1 / 4
    )  # 2 of 1, 4 tokens; 2, 2 of 1 (none): one pair of four
    assert numbers["share_with_pair"] == numbers["rerank_accuracy"] == pytest.approx(2 / 3)
    assert numbers["perplexity_right"] == pytest.approx(math.exp((2 + 3 + 2 + 3) / 7))
    assert numbers["perplexity_wrong"] == pytest.approx(math.exp((2 + 2 + 4) / 6))
    assert numbers["reference_nll"] == 1.0


def test_an_assessment_of_nothing_is_none():
    judged = {
        "scores": [[-1.0, -2.0]],
        "tokens": [[2, 1]],
        "rewards": [[1.0, 0.0]],
        "correct": [[None, None]],
    }
    numbers = assessment(judged | {"reference_nlls": []})
    assert numbers["assessment_accuracy"] == 1.0 and numbers["reference_nll"] is None
    assert numbers["rerank_accuracy"] is numbers["perplexity_right"] is numbers["perplexity_wrong"] is None
    numbers = assessment(
        judged | {"rewards": [[0.0, 0.0]], "correct": [[False, False]], "reference_nlls": []}
    )
    assert numbers["assessment_accuracy"] is numbers["low"] is numbers["high"] is None
    assert numbers["pairs"] == 0 and numbers["perplexity_wrong"] == pytest.approx(math.exp(4 / 3))


# -------------------------------------------------- degeneration


def test_perplexity_by_hand():
    assert perplexity([[math.log(0.5), math.log(0.125)], [math.log(0.25)]]) == pytest.approx(4.0)


def test_repeated_4grams_by_hand():
    """1 2 3 4 1 2 3 4 has 4-grams 1234 2341 3412 4123 1234: one of five has occurred before."""
    assert repeated_4grams([1, 2, 3, 4, 1, 2, 3, 4]) == pytest.approx(1 / 5)
    assert repeated_4grams([7] * 10) == pytest.approx(6 / 7)
    assert repeated_4grams([1, 2, 3, 4, 5]) == 0.0
    assert repeated_4grams([1, 1, 1]) == 0.0 and repeated_4grams([]) == 0.0


def test_degeneration_by_hand():
    signs = degeneration([[7] * 10, [1, 2, 3, 4]], [None, "3"])
    assert signs == {"missing_answers": 0.5, "mean_length": 7.0, "repeated_4grams": pytest.approx(3 / 7)}


# -------------------------------------------------- bad input


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: accuracy([]), r"correct has shape \(0,\)"),
        (lambda: accuracy([[1, 0]]), r"shape \(1, 2\)"),
        (lambda: accuracy([1, 0.5]), r"correct holds 0.5; allowed: 0 and 1"),
        (lambda: accuracy([1, None]), r"correct holds nan"),
        (lambda: paired_difference([[1, 0]], [[1, 0, 1]]), r"a is \(1, 2\) and b is \(1, 3\)"),
        (lambda: paired_difference([[]], [[]]), r"a has shape \(1, 0\)"),
        (lambda: paired_difference([1, 0], [1, 0]), r"a has shape \(2,\); needs \(seeds, problems\)"),
        (lambda: mean_interval([[math.nan]]), "values holds a value that is not finite"),
        (lambda: verdict(0.0, 1.0), "give exactly one"),
        (lambda: verdict(0.0, 1.0, direction="up", at_least=0.0), "give exactly one"),
        (lambda: verdict(0.0, 1.0, direction="left"), "direction is 'left'; allowed: 'up', 'down'"),
        (lambda: verdict(1.0, 0.0, direction="up"), r"\[1.0, 0.0\] is not in order"),
        (lambda: verdict(math.nan, 1.0, direction="up"), "not in order"),
        (lambda: pass_at_k(4, 5, 1), "n=4, c=5, k=1"),
        (lambda: pass_at_k(4, 1, 5), "k=5"),
        (lambda: pass_at_k(4, 1, 0), "k=0"),
        (lambda: majority_accuracy([], []), "0 lists of answers for 0 problems"),
        (lambda: majority_accuracy([["1"]], ["1", "2"]), "1 lists of answers for 2 problems"),
        (lambda: majority_accuracy([["1"], ["1"]], ["1", "1"], k=2), "majority@2 of problem 0, which has 1"),
        (lambda: majority_accuracy([[]], ["1"]), "majority@all of problem 0, which has 0"),
        (lambda: assessment_accuracy([[1.0, 2.0]], np.zeros((1, 3, 3), bool)), r"scores \(1, 2\) need bool"),
        (lambda: assessment_accuracy([[1.0, 2.0]], np.zeros((1, 2, 2))), "not float64"),
        (lambda: assessment_accuracy([[1.0, math.nan]], better_of([[1, 0]])), r"scores\[0, 1\] is nan"),
        (lambda: share_with_pair(np.zeros((0, 2, 2), bool)), r"better is \(0, 2, 2\)"),
        (lambda: rerank_accuracy(np.zeros((0, 2)), np.zeros((0, 2))), r"scores \(0, 2\)"),
        (lambda: rerank_accuracy([[1.0]], [[1]], [[False]]), "problem 0 has no response"),
        (lambda: rerank_accuracy([[1.0, math.nan]], [[1, 0]]), r"scores\[0, 1\] is nan"),
        (lambda: ratio_values([[0, 0], [0, 0]]), "a ratio to nothing: 2 problems, all of size 0"),
        (lambda: perplexity([[], []]), "perplexity of no token"),
        (lambda: degeneration([], []), "0 responses with 0 answers"),
        (lambda: degeneration([[1]], ["1", "2"]), "1 responses with 2 answers"),
    ],
)
def test_bad_input_is_named(call, message):
    assert_value_named(call, message)


# -------------------------------------------------- claims


def test_a_claim_is_judged_by_its_rule():
    low, high = [[0, 0, 0, 1] * 50], [[1, 1, 0, 1] * 50]
    rules = ("up", "down", "level 0.02", "within 0.2", "within 0.9", "below 0.1")
    words = {rule: judge(rule, high, low)["verdict"] for rule in rules}
    assert list(words.values()) == ["holds", "reversed", "holds", "reversed", "holds", "reversed"]
    assert list(judge(rule, low, high)["verdict"] for rule in rules) == [
        "reversed", "holds", "reversed", "reversed", "holds", "holds",
    ]  # fmt: skip
    assert judge("up", high, high)["verdict"] == "not seen"
    alone = judge("below 0.4", low)
    assert alone["verdict"] == "holds" and alone["difference"] == 0.25 and alone["problems"] == 200


def test_equal_models_are_level_only_where_a_control_is_not():
    low, high = [[0, 0, 0, 1] * 50], [[1, 1, 0, 1] * 50]
    for rule in ("level 0.01", "within 0.01"):
        words = [judge(rule, high, high, control)["verdict"] for control in (low, high)]
        assert words == ["holds", "no test"]
    assert judge("level 0.01", low, low, high)["verdict"] == "no test"  # a control that lies above
    assert judge("within 0.01", low, low, high)["verdict"] == "holds"  # is apart
    assert judge("level 0.01", low, high, low)["verdict"] == "reversed"


@pytest.mark.parametrize(
    "problems, seeds, spread, widest", [(1000, 3, 0.0, 0.06), (1000, 3, 0.01, 0.065), (2000, 5, 0.01, 0.042)]
)
def test_the_bootstrap_over_seeds_and_problems_covers_what_it_says(problems, seeds, spread, widest):
    """Experiments of two models 3 points apart: problems of unequal difficulty, and seeds that move each
    model's accuracy by `spread`. The 95 % interval holds the 3 points in about 95 % of the experiments."""
    rng, true, intervals = np.random.default_rng(0), 0.03, []
    density = 1 / math.sqrt(2 * math.pi * (0.3**2 + 0.2**2))  # of ease at its threshold: accuracy over shift
    for _ in range(100):
        ease = rng.normal(0, 0.3, problems)

        def answers(gain):
            moved = rng.normal(gain, spread, (seeds, 1)) / density
            return (ease + moved + rng.normal(0, 0.2, (seeds, problems)) > 0).astype(int)

        intervals.append(paired_difference(answers(0.0), answers(true), resamples=300)[1:])
    assert 0.91 <= np.mean([low <= true <= high for low, high in intervals])
    assert np.mean([high - low for low, high in intervals]) < widest
    assert np.mean([low <= 0 <= high for low, high in intervals]) < 0.7  # it is not wide enough for all
