"""What is measured, with its uncertainty: accuracy, paired differences, votes, assessment, degeneration.

Everything takes plain lists or arrays of what sample.py and align.py have written down, so that a test can
compute any published figure again. Rates are fractions in [0, 1]. An empty input is a ValueError: there is
no rate of nothing.

S seeds   P problems   K responses a problem   k drawn from them
"""

import math
from collections.abc import Sequence

import numpy as np

from minicot.answers import is_correct, majority_vote

Z95 = 1.959963984540054  # 97.5 % quantile of the normal distribution


# -------------------------------------------------- accuracy and its interval


def accuracy(correct: Sequence) -> tuple[float, float, float]:
    """Share of right answers of one model on P problems, with its 95 % interval: (share, low, high).

    Wilson's score interval (1927): unlike the normal approximation it stays within [0, 1] and is not of
    width 0 at 0 % and 100 %. To compare two models on the same problems use paired_difference, which is
    much sharper.
    """
    correct = _zeros_and_ones("correct", correct)
    n, p = len(correct), correct.mean()
    centre = (p + Z95**2 / (2 * n)) / (1 + Z95**2 / n)
    half = Z95 * math.sqrt(p * (1 - p) / n + Z95**2 / (4 * n**2)) / (1 + Z95**2 / n)
    low = 0.0 if p == 0 else centre - half  # exact there, but for the last bit
    high = 1.0 if p == 1 else centre + half
    return float(p), float(low), float(high)


def paired_difference(a, b, *, seed: int = 0, resamples: int = 10_000) -> tuple[float, float, float]:
    """How far b lies above a: mean of b - a with its 95 % bootstrap interval, (difference, low, high).

    a, b (S, P): 0/1 (or any number) for the same P problems under the same S seeds; a[s] and b[s] start
    from the same base model, a[:, p] and b[:, p] are the same problem. Each resample draws S seeds and,
    independently, P problems, with replacement, and takes the mean of b - a over the drawn rows and columns
    (both factors vary: the "pigeonhole" bootstrap of Owen, 2007). The interval goes from the 2.5 % to the
    97.5 % quantile of these means. With one seed only problems vary: say so beside the number. `seed` seeds
    the resampling, nothing else.
    """
    a, b = _table("a", a), _table("b", b)
    if a.shape != b.shape:
        raise ValueError(f"a is {a.shape} and b is {b.shape}; they must be the same seeds and problems")
    return _bootstrap(b - a, seed, resamples)


def mean_interval(values, *, seed: int = 0, resamples: int = 10_000) -> tuple[float, float, float]:
    """(mean, low, high) of values (S, P), bootstrapped as paired_difference is: for claims on one number."""
    return _bootstrap(_table("values", values), seed, resamples)


def verdict(low: float, high: float, *, direction: str | None = None, at_least: float | None = None) -> str:
    """What a 95 % interval says about a claim written down before the run: "holds", "not seen" or "reversed".

    direction "up" | "down": the difference lies above | below 0. It holds when the whole interval does, is
    reversed when the whole interval lies on the other side, not seen when the interval includes 0.

    at_least=m: the number does not lie below m ("level with" is at_least=-0.02). It holds when low > m, is
    reversed when high < m, not seen in between. Exactly one of the two is given.
    """
    if (direction is None) == (at_least is None):
        raise ValueError(f"direction is {direction!r} and at_least is {at_least!r}; give exactly one of them")
    if direction not in (None, "up", "down"):
        raise ValueError(f"direction is {direction!r}; allowed: 'up', 'down'")
    if not low <= high:
        raise ValueError(f"interval [{low}, {high}] is not in order")
    if direction == "down":
        low, high = -high, -low
    bound = 0.0 if at_least is None else at_least
    return "holds" if low > bound else "reversed" if high < bound else "not seen"


def judge(rule: str, ours, other=None, control=None) -> dict:
    """What cells' numbers (S, P) say about a claim: {verdict, difference, low, high, seeds, problems}.

    rule: "up" | "down" (the difference ours - other); "level X" (it does not lie below -X); "within X" (it
    lies between -X and X); "below X" (the difference, or without an other ours alone, lies below X). See
    `verdict`. Equal models are level: such a rule says something only where a control fails it. With a
    control the claim is "no test" unless the control surely lies below other ("level") or apart from it
    ("within").
    """
    interval = paired_difference(other, ours) if other else mean_interval(ours)
    kind, _, bound = rule.partition(" ")
    difference, low, high = interval
    if kind == "below":
        word = verdict(-high, -low, at_least=-float(bound))
    elif kind == "level":
        word = verdict(low, high, at_least=-float(bound))
    elif kind == "within":
        word = verdict(-max(high, -low), -max(low, -high), at_least=-float(bound))
    else:
        word = verdict(low, high, direction=rule)
    if control:
        _, lowest, highest = paired_difference(other, control)
        word = word if highest < 0 or (kind == "within" and lowest > 0) else "no test"
    rounded = {name: round(number, 5) for name, number in zip(("difference", "low", "high"), interval)}
    return {"verdict": word, **rounded, "seeds": len(ours), "problems": len(ours[0])}


# -------------------------------------------------- K responses a problem


def pass_at_k(n: int, c: int, k: int) -> float:
    """Chance that k of n samples hold a right one, c of the n being right: 1 - C(n-c, k) / C(n, k).

    The unbiased estimator of Chen et al. 2021 (arXiv 2107.03374, Eq. 1); average it over problems.
    """
    if not (0 <= c <= n and 1 <= k <= n):
        raise ValueError(f"pass@k with n={n}, c={c}, k={k}; needs 0 <= c <= n and 1 <= k <= n")
    return 1 - math.comb(n - c, k) / math.comb(n, k)


def majority_accuracy(answers: Sequence[Sequence], gold: Sequence[str], k: int | None = None) -> float:
    """majority@k: share of problems where the most frequent of the first k answers is right (k None: of all).

    answers[p] are the extracted answers of problem p, None where a response has none (it does not vote).
    """
    if len(answers) != len(gold) or not len(gold):
        raise ValueError(f"{len(answers)} lists of answers for {len(gold)} problems; needs one for each")
    for p, row in enumerate(answers):
        if not 1 <= (len(row) if k is None else k) <= len(row):
            raise ValueError(f"majority@{k or 'all'} of problem {p}, which has {len(row)} answers")
    votes = [majority_vote(list(row[:k])) for row in answers]
    return float(np.mean([is_correct(vote, right) for vote, right in zip(votes, gold)]))


def assessment_accuracy(scores, better) -> tuple[int, int]:
    """(rightly ordered pairs, pairs): AFT's A-accuracy (arXiv 2309.02144, section 2) is their ratio.

    scores (B, K): the model's own scores; better (B, K, K) bool as losses.better_than makes it. A pair is
    rightly ordered when the better response's score is strictly higher: a model that scores everything
    alike has ordered nothing. Counts, so that batches add up; the caller divides, and says so when there is
    no pair. Absent slots are in no pair.
    """
    scores, better = np.asarray(scores, dtype=np.float64), np.asarray(better)
    if better.shape != (*scores.shape, scores.shape[-1]) or better.dtype != bool:
        raise ValueError(f"scores {scores.shape} need bool (B, K, K), not {better.dtype} {better.shape}")
    paired = better.any(1) | better.any(2)
    if not np.isfinite(scores[paired]).all():
        b, k = np.argwhere(paired & ~np.isfinite(scores))[0]
        raise ValueError(f"scores[{b}, {k}] is {scores[b, k]}; a response in a pair needs a finite score")
    right = better & (scores[:, :, None] > scores[:, None, :])
    return int(right.sum()), int(better.sum())


def share_with_pair(better) -> float:
    """Share of groups that have a pair: on the others an alignment loss is 0. better (B, K, K) bool."""
    better = np.asarray(better)
    if better.ndim != 3 or not len(better):
        raise ValueError(f"better is {better.shape}; needs (B, K, K) with at least one group")
    return float(better.any((1, 2)).mean())


def rerank_accuracy(scores, correct, present=None) -> float:
    """Share of problems whose response with the highest score is right: scores, correct, present (B, K).

    Every problem needs a present response. Of equal highest scores each counts in proportion.
    """
    scores, correct = np.asarray(scores, dtype=np.float64), np.asarray(correct, dtype=np.float64)
    present = np.ones(scores.shape, dtype=bool) if present is None else np.asarray(present, dtype=bool)
    if not (scores.shape == correct.shape == present.shape and scores.ndim == 2 and len(scores)):
        raise ValueError(f"scores {scores.shape}, correct {correct.shape}, present {present.shape} differ")
    if not present.any(1).all():
        raise ValueError(f"problem {int(np.argmin(present.any(1)))} has no response to choose")
    if not np.isfinite(scores[present]).all():
        b, k = np.argwhere(present & ~np.isfinite(scores))[0]
        raise ValueError(f"scores[{b}, {k}] is {scores[b, k]}; a present response needs a finite score")
    best = present & (scores == np.where(present, scores, -np.inf).max(1, keepdims=True))
    return float((np.where(best, correct, 0.0).sum(1) / best.sum(1)).mean())


def auroc(scores, labels) -> float | None:
    """The chance that a right one of these has a higher score than a wrong one, a tie counting one half: the
    area under the ROC curve, by ranks (Mann and Whitney). scores (P,) numbers, labels (P,) 0 or 1. None where
    all are right, or none."""
    scores, labels = np.asarray(scores, dtype=np.float64), _zeros_and_ones("labels", labels) == 1
    _, place, counts = np.unique(scores, return_inverse=True, return_counts=True)
    ranks = (counts.cumsum() - (counts - 1) / 2)[place]  # of equals the mean of theirs
    right, wrong = int(labels.sum()), int((~labels).sum())
    return (
        float((ranks[labels].sum() - right * (right + 1) / 2) / (right * wrong)) if right and wrong else None
    )


def ratio_values(counts) -> list[float]:
    """[part, whole] of each problem -> numbers (P,) whose mean is sum(parts) / sum(wholes) and whose spread
    is the ratio's: the ratio, and each problem's pull on it (linearised). For paired_difference and
    mean_interval.
    """
    parts, wholes = np.asarray(counts, dtype=np.float64).reshape(-1, 2).T
    if not wholes.sum():
        raise ValueError(f"a ratio to nothing: {len(wholes)} problems, all of size 0")
    ratio = parts.sum() / wholes.sum()
    return (ratio + (parts - ratio * wholes) / wholes.mean()).tolist()


def assessment(judged: dict) -> dict:
    """Numbers of what verifier.assess says (lists over problems, of lists over their responses): A-accuracy
    over all pairs of unequal reward with its interval over problems, share of problems with a pair, accuracy
    of the response with the highest score, perplexity of right and of wrong responses, NLL of the reference
    solutions; "by_length", the share of the pairs that length alone puts in order (fewer tokens are better);
    and "ordered_pairs", [rightly ordered pairs, pairs] of each problem.

    None stands for a number of nothing: no pair, no right (wrong) response, no solution; and for the
    reranking accuracy where a response's correctness is unknown.
    """
    longest = max(map(len, judged["scores"]))
    table = lambda name: np.array(
        [[*row, *[math.nan] * (longest - len(row))] for row in judged[name]], dtype=np.float64
    )
    scores, rewards, correct = table("scores"), table("rewards"), table("correct")
    present = ~np.isnan(scores)
    better = rewards[:, :, None] > rewards[:, None, :]  # never where one is absent
    ordered = [list(assessment_accuracy(scores[b : b + 1], better[b : b + 1])) for b in range(len(scores))]
    pairs, nlls = sum(n for _, n in ordered), judged["reference_nlls"]
    share, low, high = mean_interval([ratio_values(ordered)]) if pairs else (None, None, None)
    lengths = table("tokens")
    by_length, _ = assessment_accuracy(-lengths, better)
    of = lambda kind: [[s] * int(n) for s, n in zip(scores[correct == kind], lengths[correct == kind])]
    return {
        "assessment_accuracy": share,
        "low": low,
        "high": high,
        "by_length": by_length / pairs if pairs else None,
        "pairs": pairs,
        "problems": len(scores),
        "share_with_pair": share_with_pair(better),
        "rerank_accuracy": None
        if np.isnan(correct[present]).any()
        else rerank_accuracy(scores, correct, present),
        "perplexity_right": perplexity(of(1)) if (correct == 1).any() else None,
        "perplexity_wrong": perplexity(of(0)) if (correct == 0).any() else None,
        "reference_nll": math.fsum(nlls) / len(nlls) if nlls else None,
        "ordered_pairs": ordered,
    }


# -------------------------------------------------- degeneration


def perplexity(token_logps: Sequence[Sequence[float]]) -> float:
    """exp of the mean negative log-probability over all tokens of all responses: a list of logps each."""
    logps = [float(value) for row in token_logps for value in row]
    if not logps:
        raise ValueError("perplexity of no token")
    return math.exp(-math.fsum(logps) / len(logps))


def repeated_4grams(tokens: Sequence) -> float:
    """Share of a response's 4-grams that occurred before in the same response; 0 if it has none."""
    grams = [tuple(tokens[i : i + 4]) for i in range(len(tokens) - 3)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def degeneration(ids: Sequence[Sequence[int]], answers: Sequence[str | None]) -> dict[str, float]:
    """What a collapse shows in: ids and extracted answers of the responses -> means over responses.

    {"missing_answers", "mean_length" (tokens), "repeated_4grams"}. The NLL of reference solutions, the
    fourth sign, is losses.sft_loss on them.
    """
    if len(ids) != len(answers) or not len(ids):
        raise ValueError(f"{len(ids)} responses with {len(answers)} answers; needs one each, at least one")
    return {
        "missing_answers": sum(answer is None for answer in answers) / len(answers),
        "mean_length": sum(map(len, ids)) / len(ids),
        "repeated_4grams": sum(map(repeated_4grams, ids)) / len(ids),
    }


# -------------------------------------------------- shared pieces


def _zeros_and_ones(name, values):
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 1 or not values.size:
        raise ValueError(f"{name} has shape {values.shape}; needs (P,), at least one entry")
    if not np.isin(values, (0, 1)).all():
        raise ValueError(f"{name} holds {values[~np.isin(values, (0, 1))][0]}; allowed: 0 and 1")
    return values


def _table(name, values):
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 2 or not values.size:
        raise ValueError(f"{name} has shape {values.shape}; needs (seeds, problems), at least one of each")
    if not np.isfinite(values).all():
        raise ValueError(f"{name} holds a value that is not finite")
    return values


def _bootstrap(values, seed, resamples):
    """Mean and 95 % interval of values (S, P), drawing seeds and problems independently.

    Drawing with replacement is drawing how often each row and column counts: two small tables of counts,
    one product.
    """
    rng = np.random.default_rng(seed)
    S, P = values.shape
    means = []
    for start in range(0, resamples, 1000):  # a thousand at a time keeps the table of counts small
        r = min(1000, resamples - start)
        rows = rng.multinomial(S, np.full(S, 1 / S), size=r)
        columns = rng.multinomial(P, np.full(P, 1 / P), size=r)
        means.append(((rows @ values) * columns).sum(1) / (S * P))
    low, high = np.quantile(np.concatenate(means), [0.025, 0.975])
    return float(values.mean()), float(low), float(high)
