"""Worked examples before a question: where they come from, and plain ways to fit them into a budget.

A problem brings its own candidate shots (`shots`, texts as records.shot_text makes them), or they are
retrieved from a pool of problems by the nearest question (TopK). A way to fit them is a row of METHODS, a
function of what a Case holds, a budget and `size` (a text -> its LM tokens): CoT-Influx's baselines (arXiv
2312.08901), complexity, and random words. All keep the order of the candidates and never exceed the budget,
which counts the LM tokens of each kept text. pruner.py is the way that learns.

The layout of a shot, "Q:", the line break and "A:", the empty line at its end, is kept by the ways that drop
parts of it; a shot that has nothing else left goes as a whole.
Letters: k shots, L tokens of the longest, D width of the encoder's states.
"""

import math
import re
from collections import OrderedDict
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Callable

import numpy as np
import torch

from minicot.data import Row, seed_of
from minicot.errors import InputError
from minicot.records import shot_text
from minicot.scoring import score
from minicot.verifier import values_of

LAYOUT = re.compile(r"\AQ:|\nA:|\s+\Z")
SENTENCE_END = re.compile(r"[.!?](?=\s|\Z)")


def size_by(tokenizer):
    """text -> its number of tokens; the last 65,536 texts are remembered."""
    return lru_cache(2**16)(lambda text: len(tokenizer.encode(text)))


def layout(text):
    """The places of the characters that belong to a shot's layout."""
    return sorted({place for match in LAYOUT.finditer(text) for place in range(*match.span())})


def question_of(shot):
    """The question of a shot's text; of a text of another form all of it."""
    match = re.match(r"Q:(.*?)\nA:", shot, re.DOTALL)
    return match[1].strip() if match else shot


def normalised(question):
    """A question's words and numbers alone: questions that agree in these are the same question."""
    return " ".join(re.findall(r"\w+", question.casefold()))


# ---- a frozen encoder ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Shot:
    """A shot as the encoder reads it: ids, which of its L tokens may be dropped (`free`, not the layout), and
    the last hidden states (L,D)."""

    ids: list
    free: torch.Tensor
    states: torch.Tensor


class Encoder:
    """The last hidden states of a frozen model under its own tokenizer. Those of a shot are computed once:
    the newest `remember` tokens of them are kept."""

    def __init__(self, model, tokenizer, *, remember=2**19, batch_size=32):
        self.model, self.tokenizer = model.eval(), tokenizer
        self.remember, self.batch_size = remember, batch_size
        self.cache, self.vectors, self.tokens = OrderedDict(), {}, 0

    def encode(self, text, n_before=0):
        """Ids of a text; one that does not fit into the context behind n_before tokens, or is empty, is
        refused."""
        ids, context = self.tokenizer.encode(text), self.model.config.max_position_embeddings
        if not 0 < len(ids) <= context - n_before:
            behind = f" behind {n_before} others" if n_before else ""
            raise InputError(
                f"a text of {len(ids)} tokens{behind}, {text!r:.60}; the encoder {self.tokenizer.folder} "
                f"reads 1 to {context} in all"
            )
        return ids

    @torch.no_grad()
    def read(self, texts, before=""):
        """Yield (ids, states (L,D)) of each text, read behind the text `before`, if there is one."""
        prefix, device = self.tokenizer.encode(before), next(self.model.parameters()).device
        for start in range(0, len(texts), self.batch_size):
            part = [self.encode(text, len(prefix)) for text in texts[start : start + self.batch_size]]
            rows = [torch.tensor(prefix + ids, device=device) for ids in part]
            ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
            real = torch.arange(ids.shape[1], device=device) < torch.tensor([[len(row)] for row in rows]).to(
                device
            )
            states = self.model.hidden_states(self.model.embed(ids), pad_mask=real).float()
            yield from ((one, row[len(prefix) : len(prefix) + len(one)]) for one, row in zip(part, states))

    def shots(self, texts, before=""):
        """Texts of shots -> a list of Shot. Kept ids are decoded to text, so a tokenizer that does not give a
        text back as it was is refused."""
        new = [text for text in dict.fromkeys(texts) if (before, text) not in self.cache]
        for text, (ids, states) in zip(new, self.read(new, before)):
            if self.tokenizer.decode(ids) != text:
                raise InputError(
                    f"the tokenizer of the encoder {self.tokenizer.folder} reads {text!r:.60} as "
                    f"{self.tokenizer.decode(ids)!r:.60}; allowed: one that gives a text back as it was"
                )
            forced = set(self.tokenizer.tokens_at(text, layout(text)))
            free = torch.tensor([i not in forced for i in range(len(ids))], device=states.device)
            self.cache[before, text] = Shot(ids, free, states.clone())
            self.tokens += len(ids)
        found = [self.cache[before, text] for text in texts]
        while self.tokens > self.remember:
            self.tokens -= len(self.cache.popitem(last=False)[1].ids)
        return found

    def embed(self, questions):
        """Questions -> (number,D) unit vectors: the mean state of each."""
        new = [text for text in dict.fromkeys(questions) if text not in self.vectors]
        for text, (_, states) in zip(new, self.read(new)):
            self.vectors[text] = torch.nn.functional.normalize(states.mean(0), dim=0)
        return torch.stack([self.vectors[text] for text in questions])

    def decode(self, ids):
        """Kept ids -> text. Of a character whose bytes were not all kept nothing is left."""
        return self.tokenizer.decode(ids).replace("\ufffd", "")


# ---- candidates ----------------------------------------------------------------------------------


def with_candidates(problems, pool, encoder, k, *, training=False, seed=None):
    """Problems -> the same with candidate `shots`: their own where they bring some, else the k of the pool
    whose questions are nearest (with a seed: k random ones). A problem's own question is never among them:
    with `training` the pool's is passed over (as the pool may be the training set), else a pool that holds
    any of the problems' questions is refused, by normalised text, and so is a problem among whose own shots
    its question stands. (The official prompts hold eight questions of their test set.)"""
    for problem in problems:
        if any(normalised(question_of(s)) == normalised(problem.question) for s in problem.shots or []):
            raise InputError(f"problem {problem.id!r}: its question is among its own shots, with the answer")
        if not all(shot.strip() for shot in problem.shots or []):
            raise InputError(f"problem {problem.id!r}: a shot is empty; allowed: some words")
    refuse_pool(problems if not training else [], pool)
    lacking = [problem for problem in problems if not problem.shots]
    if not lacking:
        return problems
    if not pool:
        raise InputError(
            f"problem {lacking[0].id!r} brings no shots; allowed: rows with shots, or --shots FILE"
        )
    texts, names = [shot_text(p.question, p.solution) for p in pool], [normalised(p.question) for p in pool]
    vectors = encoder.embed([problem.question for problem in pool]) if seed is None else None
    found = {}
    for problem in lacking:
        if seed is None:
            order = (vectors @ encoder.embed([problem.question])[0]).sort(descending=True, stable=True)[1]
        else:
            order = np.random.default_rng(seed_of(seed, "candidates", problem.id)).permutation(len(pool))
        others = [i for i in order.tolist() if names[i] != normalised(problem.question)][:k]
        if not others:
            raise InputError(f"problem {problem.id!r}: the pool of shots holds nothing but its question")
        found[problem.id] = replace(problem, shots=[texts[i] for i in others])
    return [found.get(problem.id, problem) for problem in problems]


def refuse_pool(problems, pool):
    """Refuse a pool with a row that is no shot, or with one of the problems' questions."""
    asked = {normalised(problem.question): problem.id for problem in problems}
    for shot in pool:
        if not shot.solution:
            raise InputError(f"--shots: row {shot.id!r} has no solution, which a shot needs")
        if (id_ := asked.get(normalised(shot.question))) is not None:
            raise InputError(
                f"--shots: row {shot.id!r} of the pool holds the question of problem {id_!r}; allowed: a "
                "pool without the questions that are asked"
            )


# ---- ways to fit a budget ------------------------------------------------------------------------


def whole(sizes, order, budget, share=1.0):
    """Whole shots (their numbers) in the order in which they are to be taken -> those that fit, in source
    order. One of which not even `share` fits any more is passed over: a later one may be smaller."""
    taken, left = [], budget
    for i in order:
        if share * sizes[i] <= left:
            taken, left = [*taken, i], left - sizes[i]
    return sorted(taken)


def squeeze(pieces, scores, budget, size, join="".join, least=-math.inf):
    """Drop the pieces of the lowest score until the texts fit the budget: pieces of each shot, scores of the
    same shape (inf: layout, never dropped by itself) -> which are kept, a list of bools a shot.

    Pieces with a score below `least` go in any case; of equal scores the earlier goes first. A shot that has
    nothing but its layout left goes too, so any budget >= 0 is met, at the last by no shot. Pieces go a few
    at a time, about half as many as there are tokens too many, as the tokens of a text are not the sum of its
    pieces' tokens."""
    free = [(s, i, j) for i, row in enumerate(scores) for j, s in enumerate(row) if s < math.inf]
    order, dropped = sorted(free), sum(s < least for s, _, _ in free)
    while True:
        gone = {(i, j) for _, i, j in order[:dropped]}
        keep = [[(i, j) not in gone for j in range(len(row))] for i, row in enumerate(scores)]
        for mask, row in zip(keep, scores):
            if not any(kept and s < math.inf for kept, s in zip(mask, row)):
                mask[:] = [False] * len(mask)
        excess = sum(map(size, texts_of(pieces, keep, join))) - budget
        if excess <= 0:
            return keep
        while excess > 0 and dropped < len(order):
            _, i, j = order[dropped]
            excess, dropped = excess - 2 * max(1, size(join([pieces[i][j]]))), dropped + 1


def texts_of(pieces, keep, join="".join):
    """The texts of the kept pieces, in source order; a shot of which nothing is kept is none."""
    return [join([p for p, kept in zip(row, mask) if kept]) for row, mask in zip(pieces, keep) if any(mask)]


def n_steps(shot):
    """Reasoning steps of a shot: the sentences behind its "A:" (Fu et al., arXiv 2210.00720, count lines; a
    shot's solution stands on one)."""
    return len(SENTENCE_END.findall(shot.rpartition("\nA:")[2]))


def units(text):
    """A text cut into words, each with the blanks before it; joined they are the text."""
    return re.findall(r"\s*\S+|\s+\Z", text)


def unit_at(text):
    """The number of the unit that each character of a text stands in."""
    return [i for i, unit in enumerate(units(text)) for _ in unit]


def with_layout(text, scores):
    """Scores of a text's units, inf where a unit holds some of the layout."""
    fixed = {unit_at(text)[place] for place in layout(text)}
    return [math.inf if i in fixed else score_ for i, score_ in enumerate(scores)]


def self_information(model, tokenizer, texts, batch_size=32):
    """Selective Context (Li et al., arXiv 2310.06201): for each text, -log p of each of its `units` under a
    causal LM that reads the shot alone, a sum over the unit's tokens (a token counts to the unit in which it
    begins, the text's first token 0); inf for layout."""
    groups = [[Row("shot", tokenizer.encode(text), 1)] for text in texts]
    logps = lambda batch: (score(model, batch), batch.loss_mask)
    values = values_of(logps, model, tokenizer, groups, reader=None, batch_size=batch_size)
    found = []
    for text, of_tokens in zip(texts, values):
        unit_of, nats = {}, [0.0] * len(units(text))
        places = zip(tokenizer.tokens_at(text, range(len(text))), unit_at(text))
        for token, unit in reversed([*places]):
            unit_of[token] = unit
        for token, value in enumerate([0.0, *of_tokens.tolist()]):
            nats[unit_of[token]] -= value
        found.append(with_layout(text, nats))
    return found


@dataclass(frozen=True)
class Case:
    """What a way may look at. What costs a model is a function, called by who needs it."""

    texts: list  # the candidates
    similarity: Callable  # () -> how near each candidate's question is to the one asked, (k,)
    information: Callable  # () -> self_information of the candidates
    fixed: list  # the same shots for all problems: the pool's first, else the first problem's
    seed: int


def of_whole(texts, order, budget, size):
    return [texts[i] for i in whole([*map(size, texts)], order, budget)]


def by_score(texts, values):
    """Numbers of the texts, the highest value first, the first of equals before."""
    return sorted(range(len(texts)), key=lambda i: -values[i])


def selective_context(texts, information, budget, size):
    pieces = [units(text) for text in texts]
    return texts_of(pieces, squeeze(pieces, information, budget, size))


def random_tokens(texts, seed, budget, size):
    """selective_context with random numbers for the words' information."""
    rng = np.random.default_rng(seed)
    scores = [with_layout(text, rng.random(len(units(text))).tolist()) for text in texts]
    return selective_context(texts, scores, budget, size)


METHODS = {  # (Case, budget, size) -> kept texts; those of whole shots leave none where none fits
    "zero-shot": lambda c, budget, size: [],
    "fixed": lambda c, budget, size: of_whole(c.fixed, range(len(c.fixed)), budget, size),
    "random": lambda c, budget, size: of_whole(
        c.texts, np.random.default_rng(c.seed).permutation(len(c.texts)).tolist(), budget, size
    ),
    "topk": lambda c, budget, size: of_whole(c.texts, by_score(c.texts, c.similarity()), budget, size),
    "complexity": lambda c, budget, size: of_whole(
        c.texts, by_score(c.texts, [*map(n_steps, c.texts)]), budget, size
    ),
    "selective-context": lambda c, budget, size: selective_context(c.texts, c.information(), budget, size),
    "random-tokens": lambda c, budget, size: random_tokens(c.texts, c.seed, budget, size),
}


def fit(method, problems, budget, *, size, encoder, model, tokenizer, fixed, seed):
    """Yield the problems with their candidate shots cut down to the budget by one of METHODS."""
    for problem in problems:
        questions = [question_of(text) for text in problem.shots]
        similarity = lambda p=problem, q=questions: (
            encoder.embed(q) @ encoder.embed([p.question])[0]
        ).tolist()
        information = lambda p=problem: self_information(model, tokenizer, p.shots)
        case = Case(problem.shots, similarity, information, fixed, seed_of(seed, problem.id))
        yield replace(problem, shots=METHODS[method](case, budget, size))
