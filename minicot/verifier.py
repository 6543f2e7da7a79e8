"""Verifiers: score K responses to a question, then choose among them.

A DPO model is a verifier without further training (Rafailov et al., arXiv 2305.18290, section 5; used so by
LLaVA-Reasoner, arXiv 2410.16198, section 4.3): r(y) = log pi(y|x) - log pi_ref(y|x), summed over the
response's tokens, is the reward that it has learned up to a constant of the question.

    best-of-n       the answer of the response with the highest score
    weighted vote   argmax over answers a of the sum over responses with answer a of weight(score)
    majority vote   the same with weight 1 (self-consistency, Wang et al., arXiv 2203.11171)
"""

import math
from dataclasses import replace
from functools import partial

import torch

from minicot.answers import is_correct, majority_vote, normalize
from minicot.data import collate, encode_row, truncate_words
from minicot.errors import InputError
from minicot.losses import sequence_logps
from minicot.scoring import score

# weight of a vote from beta * r, shifted by the question's largest (which no argmax of sums sees)
WEIGHTS = {
    "exp": lambda x, largest: math.exp(x - largest),
    "sigmoid": lambda x, _: 1 / (1 + math.exp(-x)),
    "raw": lambda x, _: x,
}


@torch.no_grad()
def token_log_ratios(model, ref, tokenizer, samples, *, mode, reader=None):
    """One question's Samples -> for each response (its scored ids, log pi - log pi_ref of each of them)."""
    rows = [
        encode_row(
            tokenizer, samples.problem, response.text, mode=mode, finish=response.finish, ids=response.ids
        )
        for response in samples.responses
    ]
    batch = collate([rows], tokenizer.pad_id, reader).to(next(model.parameters()).device)
    ratios = score(model, batch) - score(ref, batch)
    return [(batch.ids[n][mask].tolist(), ratios[n][mask].tolist()) for n, mask in enumerate(batch.loss_mask)]


@torch.no_grad()
def log_ratio_scores(model, ref, tokenizer, groups, *, name, mode, words=0, reader=None, batch_size=8):
    """Yield the Samples with scores[name] = sum over the response of log pi(y|x) - log pi_ref(y|x); with
    `words` over its first words alone, as DPO sees it where it is trained on truncate_words."""
    for start in range(0, len(groups), batch_size):
        part = groups[start : start + batch_size]
        seen = truncate_words(part, words) if words else part
        rows = [
            [
                encode_row(
                    tokenizer,
                    samples.problem,
                    response.text,
                    mode=mode,
                    finish=response.finish,
                    ids=response.ids,
                )
                for response in samples.responses
            ]
            for samples in seen
        ]
        batch = collate(rows, tokenizer.pad_id, reader).to(next(model.parameters()).device)
        ratios = score(model, batch) - score(ref, batch)
        values = iter(sequence_logps(ratios, batch.loss_mask, reduce="sum").tolist())
        for samples in part:
            yield replace(
                samples,
                responses=[
                    replace(response, scores={**(response.scores or {}), name: next(values)})
                    for response in samples.responses
                ],
            )


def step_sums(tokens, values):
    """Values of a chain's tokens (texts) summed over each line, a step; a line break counts to the line that
    it ends."""
    sums = [0.0]
    for token, value in zip(tokens, values):
        sums[-1] += value
        sums += [0.0] * ("\n" in token)
    return sums


def best_of_n(answers, scores):
    """The answer of the highest score; the first of equals; None answers lose to all others."""
    answered = [(score, answer) for score, answer in zip(scores, answers) if answer is not None]
    return max(answered, key=lambda pair: pair[0])[1] if answered else None


def weighted_vote(answers, scores, *, beta=0.1, weight="exp"):
    """argmax_a sum_{y: answer(y) = a} weight(beta r(y)); answers are equal as in majority_vote."""
    if weight not in WEIGHTS:
        raise ValueError(f"weight is {weight!r}; allowed: {', '.join(WEIGHTS)}")
    if not all(map(math.isfinite, scores)):
        raise ValueError(f"scores are {scores}; allowed: finite numbers")
    largest, votes = max((beta * s for s in scores), default=0.0), {}
    for answer, score_ in zip(answers, scores):
        if answer is not None:
            first, total = votes.get(normalize(answer), (answer, 0.0))
            votes[normalize(answer)] = first, total + WEIGHTS[weight](beta * score_, largest)
    return max(votes.values(), key=lambda vote: vote[1])[0] if votes else None


def curves(groups, name, *, beta=0.1, sizes=(1, 2, 4, 8, 16, 32)):
    """Right or not (as a share) of each problem when n of its K responses are chosen among, for each n:
    {n: {"majority", "best", "vote" (weighted, exp), "sigmoid vote", "raw vote", "pass": list over problems}}.

    The K responses are cut into K // n blocks of n, over which a problem's share is the mean: the same
    samples for every n and every way of choosing."""
    vote = partial(weighted_vote, beta=beta)
    ways = {
        "majority": lambda a, s: majority_vote(a),
        "best": best_of_n,
        "vote": vote,
        "sigmoid vote": partial(vote, weight="sigmoid"),
        "raw vote": partial(vote, weight="raw"),
    }
    found = {}
    for n in sizes:
        found[n] = {way: [] for way in (*ways, "pass")}
        for samples in groups:
            if len(samples.responses) < n:
                raise InputError(
                    f"problem {samples.problem.id!r} has {len(samples.responses)} responses; "
                    f"allowed: at least {n}"
                )
            gold, blocks = samples.problem.answer, len(samples.responses) // n
            cut = [samples.responses[n * b : n * (b + 1)] for b in range(blocks)]
            for way, choose in ways.items():
                right = [
                    is_correct(choose([r.answer for r in block], [r.scores[name] for r in block]), gold)
                    for block in cut
                ]
                found[n][way].append(sum(right) / blocks)
            found[n]["pass"].append(sum(any(r.correct for r in block) for block in cut) / blocks)
    return found
