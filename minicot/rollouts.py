"""Where a step's groups come from: given samples, or the policy, which draws them itself (GRPO).

A source is a generator that align.py's loop asks for each step's groups in turn: `from_samples` collates what
is there already, `from_policy` samples new responses when the step before is done.
B groups (problems), K responses of the largest, N rows (all responses), T tokens.
"""

import math
import time
from dataclasses import dataclass, replace

import numpy as np
import torch

from minicot.answers import step_ends
from minicot.config import check
from minicot.data import Batch, ahead, collate, encode_row, peek, schedule, seed_of
from minicot.errors import InputError
from minicot.rewards import outcome, step_advantages
from minicot.sampling import encode_prompts, sample_groups
from minicot.parallel import share, size, spread
from minicot.scoring import score
from minicot.training import autocast


@dataclass
class Micro:
    """Groups that run through the model together, one of --accumulate parts of a step, and what is known of
    them."""

    batch: Batch
    ref_logps: torch.Tensor | None = None  # (N,) sums under the reference
    ref_token_logps: torch.Tensor | None = None  # (N,T) the same of tokens
    old_token_logps: torch.Tensor | None = None  # (N,T) under the policy, at the loop's first look at them
    weight: float = 1.0  # 0: another rank's groups, see parallel.share

    def move(self, device):
        self.batch = self.batch.to(device)
        self.ref_logps = None if self.ref_logps is None else self.ref_logps.to(device)


def from_samples(groups, ref, batches, steps, config, tokenizer, reader):
    """A source of groups: yields each step's ([Micro, ...], what to log of them); with torchrun this rank's.

    Here all groups are there before the first step, and the next step's are collated during this one. The
    loop asks for a step's groups when the step before it is done: from_policy samples them then."""

    def micro_batches(step):
        return [
            Micro(
                collate([groups[i] for i in part], tokenizer.pad_id, reader),
                torch.cat([ref[i] for i in part]) if ref else None,
                weight=weight,
            )
            for part, weight in share(batches[step - 1], config.accumulate)
        ], {}

    return ahead(micro_batches, steps)


def from_policy(policy, ref_model, problems, batches, steps, config, tokenizer, asking, reward, judge=None):
    """The other source: a batch of problems gets --k responses each from the policy as it is, when the loop
    asks for them, and they serve for --updates steps. policy() is the model; ref_model: None with --kl 0.

    A response's seed comes from --seed, the step and its problem, so that a resumed run draws the same. What
    the sampler saw of their probabilities is not used: it computes them in another order, which rounds
    otherwise, and at --temperature, while the loop trains the policy at temperature 1. The old
    log-probabilities are those that the loop itself finds before its first step on these groups."""
    for step in steps:
        if (step - 1) % config.updates == 0:
            chosen = batches[(step - 1) // config.updates]
            how = (step, config, asking, reward, judge)
            model = policy()
            sampled, about = roll_out(model, tokenizer, problems, chosen, *how)
            groups = [as_drawn(tokenizer, samples, config) for samples in sampled]
            if config.peek and step == 1:
                peek(tokenizer, groups[: config.peek])
            device = next(model.parameters()).device
            micros = [
                Micro(collate(part, tokenizer.pad_id, asking["reader"]), weight=weight)
                for part, weight in share(groups, config.accumulate)
            ]
            for micro in micros if ref_model else []:
                micro.move(device)
                with torch.no_grad(), autocast(config, device):
                    micro.ref_token_logps = score(ref_model, micro.batch)
        yield micros, about


def roll_out(model, tokenizer, problems, chosen, step, config, asking, reward, judge=None):
    """--k responses to each of the chosen problems (their numbers) -> (their Samples, what to log of them).
    reward: Response -> float, after judge: a list of Samples -> the same with a PRM's scores (None: without).

    A group whose rewards are all equal is dead: its advantages are 0. DAPO's dynamic sampling: up to
    --resample times, other problems, in an order that depends on seed and step, take the dead ones' places;
    those that are dead in the end stay, so that a step has as many groups as ever."""
    began, device, sampled, drawn = time.perf_counter(), next(model.parameters()).device, {}, []
    settings = dict(n=config.k, temperature=config.temperature, **asking)
    settings["seed"] = seed_of(config.seed, "rollouts", step)
    dead = lambda samples: len({response.reward for response in samples.responses}) < 2
    order = np.random.default_rng(seed_of(config.seed, "others", step)).permutation(len(problems)).tolist()
    others = [i for i in order if i not in set(chosen)]
    places, numbers = range(len(chosen)), chosen
    for _ in range(1 + config.resample):
        with autocast(config, device):
            stream = sample_groups(model, tokenizer, [problems[i] for i in numbers], **settings)
            stream = spread(judge, list(stream), -(-len(numbers) // size())) if judge else stream
            for place, samples in zip(places, stream):
                graded = [replace(r, reward=reward(r)) for r in samples.responses]
                sampled[place] = replace(samples, responses=graded)
                drawn.append(sampled[place])
        places = [place for place in sampled if dead(sampled[place])][: len(others)]
        numbers, others = others[: len(places)], others[len(places) :]
        if not places:
            break
    responses = [response for samples in drawn for response in samples.responses]
    seconds = time.perf_counter() - began
    left = [samples for samples in sampled.values() if samples.responses]
    if not left:
        raise InputError(f"step {step}: no problem has a response; the first: {drawn[0].error}")
    judged = [response.scores["prm"] for response in responses if judge]
    return left, {
        "prm_score": sum(judged) / len(judged) if judged else None,
        "right": sum(bool(response.correct) for response in responses) / max(len(responses), 1),
        "dead_groups": sum(map(dead, drawn)) / len(drawn),
        "dead_groups_left": sum(map(dead, left)) / len(left),
        "resampled": len(drawn) - len(chosen),
        "unreadable": sum(not samples.responses for samples in drawn),
        "cut_off": sum(response.finish == "length" for response in responses) / len(responses),
        "rollout_tokens_per_s": round(sum(len(response.ids) for response in responses) / seconds, 1),
    }


def as_drawn(tokenizer, samples, config):
    """A Samples -> Rows of all its responses. Repeated and empty ones stay: they show how likely they are.
    With --reward steps each token gets its step's advantage."""
    asked, drawn, rows = (tokenizer, samples.problem), samples.responses, []
    if by_step := config.reward == "steps":
        worth = step_advantages([outcome(r) for r in drawn], [r.step_scores["prm"] for r in drawn])
    for k, r in enumerate(drawn):
        fields = dict(ids=r.ids, finish=r.finish, reward=r.reward, correct=r.correct)
        if by_step:
            steps = step_of_token(tokenizer, r) if r.step_scores["prm"] else [0] * len(r.ids)
            fields["advantages"] = tuple(worth[k][j] for j in steps)
        rows.append(encode_row(*asked, r.text, mode=config.mode, **fields))
    return rows


def step_of_token(tokenizer, response):
    """Which step, from 0, each of a response's ids belongs to, a line break to the one that it ends; what
    stands behind the last step, the answer line and EOS, has the number of steps."""
    starts = [len(tokenizer.decode(response.ids[:i])) for i in range(len(response.ids))]
    return [sum(end < start for end in step_ends(response.text)) for start in starts]


def questions(config, model, tokenizer, problems, asking):
    """Problems -> groups of one Row, the prompt and the gold answer: what an on-policy run is made from. What
    cannot be graded, or has no room for a response, is refused before any work."""
    lacking = sum(problem.answer is None for problem in problems)
    check(not lacking, "--data", config.data, f"problems with an answer, {lacking} have none")
    room = {name: asking[name] for name in ("mode", "max_new_tokens", "reader")}
    encode_prompts(model, tokenizer, problems, **room)
    return [[encode_row(tokenizer, p, p.answer, mode=config.mode)] for p in problems]


def plan_rollouts(n_problems, config):
    """Which problems each batch of rollouts asks: a list of lists of indices. Each pass is cut by itself, one
    of its batches being smaller, so that none asks a problem twice (whose responses would be the same)."""
    one_pass = [1] * n_problems, config.batch_size, n_problems  # like lengths: a random order alone
    n_batches = math.ceil(n_problems / config.batch_size)
    rounds = math.ceil(config.steps / config.updates) or math.ceil(config.epochs * n_batches)
    seeds = [seed_of(config.seed, "order", number) for number in range(math.ceil(rounds / n_batches))]
    return [batch for seed in seeds for batch in schedule(*one_pass, seed)][:rounds]
