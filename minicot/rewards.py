"""What a response is worth to GRPO: by its outcome, and by a process reward model as well (URSA, arXiv
2501.04686, stage III).

Each variant is one pure function of plain numbers: `correct`, whether the outcome is right, and
`step_scores`, a PRM's probability p_1 ... p_K at each step that all is right so far.

    outcome             o, 1 or 0: plain GRPO
    ps_grpo_reward      o, less gamma where the step scores drop somewhere: a right answer by a doubtful way
    mean_reward         o + mean of p: the paper's first warning (V1). Paid for the scores themselves, a
                        policy learns to please the PRM: they rise, responses shorten, accuracy stands still
    step_advantages     an advantage a step instead of a reward: the second warning (V2), the same end

PS-GRPO asks the PRM only whether there is a drop, and only of right answers: no score can buy a reward.
"""

import math

import torch

from minicot.losses import group_advantages


def outcome(response):
    """1 where a Response's final answer is right, else 0. One that was cut off is wrong, whatever stands in
    it: it never came to its end, and rewarded it would learn to go on."""
    return float(bool(response.correct) and response.finish == "stop")


def largest_drop(step_scores):
    """The largest relative drop from a step to the next, max over j of (p_j - p_{j+1}) / p_j; 0 where there
    is none: of scores that never fall and of fewer than two steps (our choice)."""
    check_scores(step_scores)
    drops = [(before - after) / before for before, after in zip(step_scores, step_scores[1:]) if before > 0]
    return max([0.0, *drops])


def ps_grpo_reward(correct, step_scores, *, rho=0.3, gamma=0.5):
    """PS-GRPO: 0 for a wrong outcome, 1 for a right one, less gamma where largest_drop >= rho."""
    return float(correct) * (1.0 - gamma * (largest_drop(step_scores) >= rho))


def mean_reward(correct, step_scores):
    """V1: o + mean of p (0 without a step)."""
    check_scores(step_scores)
    return float(correct) + sum(step_scores) / max(len(step_scores), 1)


def step_advantages(correct, step_scores):
    """V2: the advantage of step j of response i of a group of K, which all tokens of the step get:

        A_ij = p_ij * norm(mean over j of p)_i + norm(o)_i,     norm(x)_i = (x_i - mean) / (std + 1e-4)

    correct: K outcomes; step_scores: K lists -> K lists, each with one number more than it has steps: what
    stands behind them, the answer line and EOS, has no score and gets norm(o)_i alone (our choice). norm is
    losses.group_advantages.
    """
    for scores in step_scores:
        check_scores(scores)
    means = [sum(scores) / max(len(scores), 1) for scores in step_scores]
    table = torch.tensor([means, [float(o) for o in correct]], dtype=torch.float64)
    process, result = group_advantages(table).tolist()
    return [[p * a + b for p in [*scores, 0.0]] for scores, a, b in zip(step_scores, process, result)]


def check_scores(step_scores):
    if not all(math.isfinite(p) and 0 <= p <= 1 for p in step_scores):
        raise ValueError(f"step scores are {step_scores}; allowed: probabilities, 0 to 1")
