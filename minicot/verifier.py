"""Verifiers: score K responses to a question, then choose among them; and what a model thinks of responses.

A DPO model is a verifier without further training (Rafailov et al., arXiv 2305.18290, section 5; used so by
LLaVA-Reasoner, arXiv 2410.16198, section 4.3): r(y) = log pi(y|x) - log pi_ref(y|x), summed over the
response's tokens, is the reward that it has learned up to a constant of the question.

    best-of-n       the answer of the response with the highest score
    weighted vote   argmax over answers a of the sum over responses with answer a of weight(score)
    majority vote   the same with weight 1 (self-consistency, Wang et al., arXiv 2203.11171)

A process reward model (PRM: URSA, arXiv 2501.04686, stage II) is trained to be one: at the end of
each step it gives the probability that all is right so far, and a solution's score is the mean of these (the
paper's), their least, last or product. An outcome reward model (ORM) gives one, at the end of the response.
The sum of weight "raw" is the vote by probabilities.

A model is its own verifier too: AFT (arXiv 2309.02144, section 2) asks how often its mean log-probability a
token is higher for a right response than for a wrong one. `assess` gives these scores, metrics.assessment
the numbers.

"Samples" is one problem with its K responses, `sampled` a list of them. All functions score at most
batch_size responses at once; a question with more is cut into parts, each with the prompt that they share.
"""

import math
from collections import Counter
from dataclasses import replace
from functools import partial

import torch

from minicot.answers import is_correct, majority_vote, normalize
from minicot.data import check_pictures, collate, encode_judged, encode_row, longest_row, make_groups, target
from minicot.data import truncate_words
from minicot.errors import InputError
from minicot.scoring import score, step_logits

# weight of a vote from beta * r, shifted by the question's largest (which no argmax of sums sees)
WEIGHTS = {
    "exp": lambda x, largest: math.exp(x - largest),
    "sigmoid": lambda x, _: 1 / (1 + math.exp(min(-x, 700.0))),  # exp(710) overflows
    "raw": lambda x, _: x,
}
AGGREGATES = {
    "mean": lambda scores: sum(scores) / len(scores),
    "min": min,
    "last": lambda scores: scores[-1],
    "product": math.prod,
}


# ---- scoring -------------------------------------------------------------------------------------


def in_parts(groups, batch_size):
    """Groups of rows -> lists of groups of at most batch_size rows in all, in order; a larger one is cut."""
    part, size = [], 0
    for group in groups:
        for start in range(0, len(group), batch_size):
            piece = group[start : start + batch_size]
            if size + len(piece) > batch_size:
                yield part
                part, size = [], 0
            part, size = [*part, piece], size + len(piece)
    if part:
        yield part


@torch.no_grad()
def values_of(function, model, tokenizer, groups, *, reader, batch_size, what="log-probabilities"):
    """Yield for each Row of the groups its values, on the CPU: function(batch) gives those of all rows, (N,T)
    or (N,S), and a mask that says which are there. InputError names the problem where one is not finite."""
    device = next(model.parameters()).device
    for part in in_parts(groups, batch_size):
        check_pictures(part, reader, "samples")
        batch = collate(part, tokenizer.pad_id, reader).to(device)
        values, there = function(batch)
        rows = [row for group in part for row in group]
        for row, its_values, its_mask in zip(rows, values.cpu(), there.cpu()):
            if not its_values[its_mask].isfinite().all():
                raise InputError(
                    f"problem {row.problem_id!r}: {what} are not finite; "
                    "a model's weights are broken or have diverged"
                )
            yield its_values[its_mask]


def log_ratios(model, ref, tokenizer, groups, **options):
    """Yield log pi - log pi_ref of each scored token of each Row of the groups; without a ref, log pi."""
    difference = lambda batch: (score(model, batch) - (score(ref, batch) if ref else 0), batch.loss_mask)
    return values_of(difference, model, tokenizer, groups, **options)


def too_long(row, samples, reader, *models):
    """Whether a Row of these Samples is longer than the context of one of the models (None: no model)."""
    context = min(model.config.max_position_embeddings for model in models if model)
    return len(row.ids) > longest_row(context, [samples.problem], reader)


def rows_of(tokenizer, samples, mode):
    """A question's Samples -> a Row for each response."""
    return [
        encode_row(
            tokenizer, samples.problem, response.text, mode=mode, finish=response.finish, ids=response.ids
        )
        for response in samples.responses
    ]


def log_ratio_scores(
    model, ref, tokenizer, sampled, *, name, mode, words=0, tokens=False, reader=None, batch_size=64
):
    """Yield the Samples with scores[name] = sum over the response of log pi(y|x) - log pi_ref(y|x); without a
    ref, of log pi(y|x). With `words` over its first words alone, as DPO sees it where it is trained on
    truncate_words; with `tokens` also `tokens`, the scored tokens as texts, and token_scores[name], the
    log-ratio of each. InputError: token_scores are there that are of other tokens; a response is longer than
    the model's context."""
    seen = truncate_words(sampled, words) if words else sampled
    groups = [rows_of(tokenizer, samples, mode) for samples in seen]
    for row in (r for s, rows in zip(seen, groups) for r in rows if too_long(r, s, reader, model, ref)):
        raise InputError(
            f"problem {row.problem_id!r}: a response of {len(row.ids)} tokens with its prompt; allowed: up "
            "to the context of the models (--truncate-words scores the beginning alone)"
        )
    ratios = log_ratios(model, ref, tokenizer, groups, reader=reader, batch_size=batch_size)
    for samples, rows in zip(sampled, groups):
        scored = []
        for response, row in zip(samples.responses, rows):
            values = next(ratios)
            more = {"scores": {**(response.scores or {}), name: values.sum().item()}}
            if tokens:
                texts = [tokenizer.decode([i], skip_special=False) for i in row.ids[row.n_prompt :]]
                if response.token_scores and response.tokens != texts:
                    raise InputError(
                        f"problem {row.problem_id!r}: its token_scores are of other tokens; allowed: samples "
                        "without token_scores, or no --token-scores"
                    )
                ratios_of = {**(response.token_scores or {}), name: values.tolist()}
                more |= {"tokens": texts, "token_scores": ratios_of}
            scored.append(replace(response, **more))
        yield replace(samples, responses=scored)


def reward_scores(model, tokenizer, sampled, *, name, mode, how="mean", reader=None, batch_size=64):
    """Yield the Samples with what a RewardModel makes of them: step_scores[name], for each step (an ORM: the
    whole response) the probability that all is right so far, and scores[name], their aggregate `how`. One
    without a step, or longer than the model's context, has no step_scores: [], and the score 0."""
    encode = partial(encode_judged, tokenizer, mode=mode, kind=model.kind)
    judged = [[encode(samples.problem, response) for response in samples.responses] for samples in sampled]
    fits = lambda row, samples: row if row and not too_long(row, samples, reader, model) else None
    judged = [[fits(row, samples) for row in rows] for samples, rows in zip(sampled, judged)]
    groups = [[row for row in rows if row] for rows in judged]
    options = dict(reader=reader, batch_size=batch_size, what="step scores")
    logits = lambda batch: (step_logits(model, batch), batch.step_ends >= 0)
    values = values_of(logits, model, tokenizer, groups, **options)
    for samples, rows in zip(sampled, judged):
        scored = []
        for response, row in zip(samples.responses, rows):
            steps = next(values).double().sigmoid().tolist() if row else []
            scores = {**(response.scores or {}), name: aggregate(steps, how)}
            step_scores = {**(response.step_scores or {}), name: steps}
            scored.append(replace(response, scores=scores, step_scores=step_scores))
        yield replace(samples, responses=scored)


def assess(
    model,
    tokenizer,
    sampled,
    *,
    mode,
    reader=None,
    reference=False,
    batch_size=16,
    watch=lambda groups: groups,
):
    """What a model thinks of graded responses and of written solutions: a list of Samples -> plain lists.

    Of each problem that has a response left ("problem_ids"), of each distinct response: "scores" (mean
    log-probability a token), "tokens", "rewards" and "correct" (None: unknown). `reference` puts the written
    solution among the responses, as a right one; every problem must then have one. Of each problem that has
    a solution ("solution_ids"; mode "direct": an answer): "reference_nlls" (minus its mean log-probability a
    token). "left_out" counts what is missing. `watch` is handed each list of groups as work on it begins
    (tqdm). metrics.assessment makes numbers of this."""
    problems = [samples.problem for samples in sampled]
    longest = longest_row(model.config.max_position_embeddings, problems, reader)
    groups, left_out = make_groups(tokenizer, sampled, mode=mode, max_length=longest, reference=reference)
    solved = [p for p in problems if (p.answer if mode == "direct" else p.solution) is not None]
    solutions = [encode_row(tokenizer, p, target(p, mode), mode=mode) for p in solved]
    solutions = [[row] for row in solutions if len(row.ids) <= longest]

    def means(groups):
        """[problem][response] -> (mean log-probability of its tokens, their number)."""
        logps = lambda batch: (score(model, batch), batch.loss_mask)
        values = values_of(logps, model, tokenizer, watch(groups), reader=reader, batch_size=batch_size)
        return [[(logps.mean().item(), len(logps)) for _, logps in zip(group, values)] for group in groups]

    judged, references = means(groups), means(solutions)
    return {
        "problem_ids": [group[0].problem_id for group in groups],
        "scores": [[mean for mean, _ in group] for group in judged],
        "tokens": [[tokens for _, tokens in group] for group in judged],
        "rewards": [[row.reward for row in group] for group in groups],
        "correct": [[row.correct for row in group] for group in groups],
        "solution_ids": [row.problem_id for [row] in solutions],
        "reference_nlls": [-mean for [(mean, _)] in references],
        "left_out": left_out | {"overlong solutions": len(solved) - len(solutions)},
    }


# ---- choosing ------------------------------------------------------------------------------------


def step_sums(tokens, values):
    """Values of a chain's tokens (texts) summed over each line, a step; a line break counts to the line that
    it ends."""
    sums = [0.0]
    for token, value in zip(tokens, values):
        sums[-1] += value
        sums += [0.0] * ("\n" in token)
    return sums


def aggregate(step_scores, how="mean"):
    """A solution's score from those of its steps: their "mean" (URSA, Eq. 10), "min", "last" or "product". A
    solution without a step has 0, the lowest: it shows nothing that a process verifier could vouch for (and
    the empty product would be 1). Mean and min both lean to short solutions, the product more so."""
    if how not in AGGREGATES:
        raise ValueError(f"aggregate is {how!r}; allowed: {', '.join(AGGREGATES)}")
    if not all(map(math.isfinite, step_scores)):
        raise ValueError(f"step scores are {step_scores}; allowed: finite numbers")
    return AGGREGATES[how](step_scores) if step_scores else 0.0


def best_of_n(answers, scores):
    """The answer of the highest score; the first of equals; None answers lose to all others."""
    answered = [(score, answer) for score, answer in zip(scores, answers) if answer is not None]
    return max(answered, key=lambda pair: pair[0])[1] if answered else None


def best_of_repeated(answers, scores):
    """best_of_n among the answers that at least two responses give (among all where none is)."""
    votes = Counter(normalize(answer) for answer in answers if answer is not None)
    twice = [answer if answer is not None and votes[normalize(answer)] > 1 else None for answer in answers]
    return best_of_n(twice if any(answer is not None for answer in twice) else answers, scores)


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


def curves(sampled, name, *, beta=0.1, sizes=(1, 2, 4, 8, 16, 32)):
    """Right or not (as a share) of each problem when n of its K responses are chosen among, for each n:
    {n: {"majority", "best", "best repeated" (among answers given twice), "vote" (weighted, exp), "sigmoid
    vote", "raw vote", "pass": list over problems}}.

    The K responses are cut into K // n blocks of n, over which a problem's share is the mean: the same
    samples for every n and every way of choosing."""
    vote = partial(weighted_vote, beta=beta)
    ways = {
        "majority": lambda a, s: majority_vote(a),
        "best": best_of_n,
        "best repeated": best_of_repeated,
        "vote": vote,
        "sigmoid vote": partial(vote, weight="sigmoid"),
        "raw vote": partial(vote, weight="raw"),
    }
    shares = {}
    for n in sizes:
        shares[n] = {way: [] for way in (*ways, "pass")}
        for samples in sampled:
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
                shares[n][way].append(sum(right) / blocks)
            shares[n]["pass"].append(sum(any(r.correct for r in block) for block in cut) / blocks)
    return shares
