"""Every loss, as a pure function of tensors. Start reading here: this file knows no model and no data.

All preference losses share one picture. A group is one question with up to K responses; response i has a
score s_i (how likely the policy finds it) and better[i, j] says that response i is better than response j.
What each paper does with these pairs:

    RRHF   sum over pairs of  max(0, s_j - s_i)                 a hinge: silent once the order is right
    DPO    log(1 + e^(s_j - s_i)), a single pair                s = beta (log pi(y|x) - log pi_ref(y|x))
    PRO    sum over i of  log(1 + sum over j of e^(T_ij s_j - T_ii s_i))        T: gaps between the rewards
    AFT    log(1 + sum over pairs of e^(s_j - s_i))             one logarithm around all pairs of the group
    GRPO   sum over pairs of  (r_i - r_j) (s_j - s_i) / K       linear: a policy gradient, where it starts

Each of them pushes s_j, the worse response, down (RRHF while the order is wrong), and none bounds it from
below, although most of a wrong solution is good language: a model can degenerate this way. GRPO's guard is
where the responses come from: the policy draws them anew, so that what it no longer says is no longer pushed,
and the clip ends a push that has moved far. AFT's point is the constraint, taken by the other four:

    "none"      the loss as its own paper has it
    "detached"  AFT 4.3.1: s_j is a constant wherever j plays the loser: same value, no push downwards
    "boundary"  AFT 4.3.2: one more term pulls s_j up below  B_j = (min over i better than j of s_i) - margin

Rules of the group losses. Computed in float32 or wider; no argument is changed; masks are bool. A group
without a pair (one response, all right, all wrong) costs exactly 0 with a gradient of exactly 0. Equal
rewards never pair; the order of the responses never matters. What stands in absent slots and masked
positions, NaN too, has no effect; a score in a pair that is NaN or infinite makes the loss NaN, never 0.
Group losses return one value a group; average outside.

B groups   K response slots a group   N rows (responses)   T tokens   V vocabulary   better[i, j]: i beats j
S steps of a response (reward models)
Papers (arXiv): DPO 2305.18290, IPO 2310.12036, RRHF 2304.05302, PRO 2306.17492, AFT 2309.02144,
GRPO 2402.03300, Dr. GRPO 2503.20783, DAPO 2503.14476, URSA 2501.04686.
"""

import math

import torch
import torch.nn.functional as F

CONSTRAINTS = ("none", "detached", "boundary")


# -------------------------------------------------------------------- from logits to scores


def token_logps(logits, ids):
    """Log-probability of each token: [:, t] = log p(ids[:, t] | ids[:, :t]); column 0 is 0.

    logits (B, T, V) as the model returns them (logits[:, t] predicts token t + 1), ids (B, T) -> (B, T).
    The one place where anything is shifted: RRHF's official code shifts the labels in its collator, PRO's
    forgets to shift its mask. log p = logit - logsumexp: no (B, T, V) table of log-probabilities is kept.
    """
    assert ids.dim() == 2 and logits.shape[:-1] == ids.shape, (
        f"logits {tuple(logits.shape)}, ids {tuple(ids.shape)}"
    )
    logits = _wide(logits[:, :-1])
    chosen = logits.gather(-1, ids[:, 1:, None]).squeeze(-1) - logits.logsumexp(-1)
    return F.pad(chosen, (1, 0))


def sequence_logps(token_logps, loss_mask, *, reduce):
    """Sum or mean of a response's token log-probabilities: (N, T), bool (N, T) -> (N,).

    reduce="sum" is log pi(y|x), for DPO and IPO; reduce="mean" is the score of RRHF, PRO and AFT (AFT
    section 4). No default: mixing them up is a common bug. The mean of an empty response is a ValueError,
    its sum is 0. RRHF's official code means to divide by the response's length and divides by the padded
    width of the group: it overwrites the -100 labels in place before it counts them. PRO's counts, and
    scores, a pad token in every row shorter than the longest. Here both get what they intended.
    """
    _check_mask("loss_mask", loss_mask, token_logps)
    if reduce not in ("sum", "mean"):
        raise ValueError(f"reduce is {reduce!r}; allowed: 'sum', 'mean'")
    sums = torch.where(loss_mask, _wide(token_logps), 0.0).sum(-1)  # not a product: NaN * 0 is NaN
    if reduce == "sum":
        return sums
    lengths = loss_mask.sum(-1)
    if (lengths == 0).any():
        rows = (lengths == 0).nonzero()[:, 0].tolist()
        raise ValueError(f"loss_mask is all False in row(s) {rows}; the mean of no token does not exist")
    return sums / lengths


def sft_loss(token_logps, loss_mask, *, n_tokens=None):
    """Cross-entropy: minus the sum over scored tokens, divided by their number. (N, T), bool (N, T) -> ().

    n_tokens is the number in the whole optimizer step, when this call sees only a part of it (gradient
    accumulation, several ranks): the parts then add up to the step's token mean. The papers write a sum per
    response, PRO's official code sums too, RRHF's divides by the padded width. align.py passes the number of
    groups as n_tokens for PRO, whose term is a sum a group.
    """
    _check_mask("loss_mask", loss_mask, token_logps)
    count = loss_mask.sum() if n_tokens is None else n_tokens
    if not count > 0:
        raise ValueError(f"sft_loss over {float(count):g} tokens; loss_mask or n_tokens must count one")
    return -torch.where(loss_mask, _wide(token_logps), 0.0).sum() / count


# -------------------------------------------------------------------- who beats whom


def better_than(rewards, present=None):
    """[b, i, j]: response i has a strictly higher reward than j, both present. (B, K) -> bool (B, K, K).

    Two levels of reward (right, wrong) give AFT's positives x negatives, more levels its ranking form. Ties
    never pair. The reward of a present response must be finite (ValueError), an absent slot holds anything.
    """
    present = _present(rewards, present)
    return (rewards[:, :, None] > rewards[:, None, :]) & present[:, :, None] & present[:, None, :]


# -------------------------------------------------------------------- losses on groups


def rrhf_loss(scores, better, *, constraint="none", margin=None):
    """RRHF's ranking loss (section 3.1), a hinge on every pair.

        sum over pairs of  max(0, s_j - s_i)

    scores (B, K) token means, better (B, K, K) bool -> (B,)

    A wrongly ordered pair pushes with strength 1, however wrong it is; a rightly ordered one is silent. The
    paper adds SFT on the best response. The official code weighs this ranking term: 1 in its scripts, 100 by
    default.

    boundary (ours, no paper's):  + sum over j of max(0, B_j - s_j)
    """
    s, loser, bound = _constrain(scores, better, constraint, margin)
    gaps = loser[:, None, :] - s[:, :, None]  # [b, i, j] = s_j - s_i
    loss = torch.where(better, gaps.relu(), 0.0).sum((1, 2))
    if bound is not None:
        loss = loss + torch.where(better.any(1), (bound - s).relu(), 0.0).sum(1)
    return loss


def aft_loss(scores, better, *, constraint="detached", margin=None):
    """AFT's alignment loss (section 4), one logarithm around all pairs.

        none      log(1 + sum over pairs of  e^(s_j - s_i))
        detached  the same, s_j a constant                                                         (4.3.1)
        boundary  log(1 + sum over pairs of  e^(s_j - s_i) + e^(T_ij - s_j)),  T_ij = 2 B_j - s_i  (4.3.2)

    scores (B, K) token means, better (B, K, K) bool -> (B,)

    The second exponential is the first one mirrored at B_j = (min over i better than j of s_i) - margin:
    above B_j a worse response is pushed down, below it pulled up, on it left alone. margin is the paper's
    beta, in nats a token. T is a constant, which the paper leaves open: a gradient through the minimum
    would push the worst right response down to make room. With 0/1 rewards this is the paper's binary loss,
    with graded rewards its ranking loss. The paper adds SFT on the reference solution, weight 1. No official
    code was found; the golden numbers are double loops at 60 digits.
    """
    s, loser, bound = _constrain(scores, better, constraint, margin)
    terms = loser[:, None, :] - s[:, :, None]  # [b, i, j] = s_j - s_i
    pairs = better
    if bound is not None:
        mirrored = (2 * bound[:, None, :] - s[:, :, None]).detach() - s[:, None, :]  # T_ij - s_j
        terms, pairs = torch.cat([terms, mirrored], 2), torch.cat([pairs, pairs], 2)
    return _log_one_plus_sum_exp(terms.flatten(1), pairs.flatten(1))


def pro_loss(scores, rewards, present=None, *, constraint="none", margin=None):
    """PRO (its section "Preference Ranking Optimization"): each response in turn against all that are worse.

        sum over k of  -log( e^(T_kk s_k) / (e^(T_kk s_k) + sum over j worse than k of e^(T_kj s_j)) )
        T_kj = r_k - r_j (the paper's 1 / temperature),   T_kk = the largest of the T_kj

    scores (B, K) token means, rewards (B, K), present bool (B, K) or None (all) -> (B,)

    A response with none worse contributes 0. The official code takes j > k in a list that it expects sorted:
    ties then leave terms of T = 0 that depend on input order, unsorted rewards overflow. It also adds 1e-10
    inside the logarithm, which takes over where e^(T s) is small. On distinct rewards ours is its formula
    without the 1e-10. The paper adds SFT on the best response, summed over tokens, weight 0.05 (K - 1)^2.

    boundary (ours, no paper's):  rank k's denominator also holds  e^(T_kj (2 B_j - s_j)),  B_j a constant
    """
    assert scores.shape == rewards.shape, f"scores {tuple(scores.shape)}, rewards {tuple(rewards.shape)}"
    better = better_than(rewards, present)
    s, loser, bound = _constrain(scores, better, constraint, margin)
    r = _wide(rewards).detach()
    T = torch.where(better, r[:, :, None] - r[:, None, :], 0.0)  # [b, k, j] = r_k - r_j
    own = (T.amax(2) * s)[:, :, None]  # T_kk s_k
    terms = T * loser[:, None, :] - own
    pairs = better
    if bound is not None:
        mirrored = torch.where(better, 2 * bound[:, None, :] - s[:, None, :], 0.0)  # 2 B_j - s_j
        terms, pairs = torch.cat([terms, T * mirrored - own], 2), torch.cat([pairs, pairs], 2)
    return _log_one_plus_sum_exp(terms, pairs).sum(1)


# -------------------------------------------------------------------- losses with a reference model


def dpo_loss(logps, ref_logps, *, beta, label_smoothing=0.0, constraint="none", margin=None):
    """DPO (Eq. 7): logps, ref_logps (B, 2), sums over the response, column 0 chosen, 1 rejected -> (B,).

        -log sigmoid(x_0 - x_1) = log(1 + e^(x_1 - x_0)),     x = beta (log pi(y|x) - log pi_ref(y|x))

    So DPO is AFT on x with K = 2, and a constraint on it is AFT's (boundary: ours, no paper's; the margin is
    in units of x). label_smoothing e, the chance that a label is wrong, gives cDPO as in the official code,
    (1 - e) l(x_0 - x_1) + e l(x_1 - x_0). It excludes a constraint: smoothed labels have no fixed loser.
    """
    ratios = _log_ratios(logps, ref_logps, beta)
    x = beta * (ratios - ratios[:, :1].detach())  # only x_1 - x_0 counts; large sums keep their digits
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"label_smoothing is {label_smoothing}; it must lie in [0, 1)")
    if label_smoothing and constraint != "none":
        raise ValueError(f"label_smoothing {label_smoothing} with constraint {constraint!r}; use only one")
    chosen_wins = torch.tensor([[False, True], [False, False]], device=x.device).expand(len(x), 2, 2)
    loss = aft_loss(x, chosen_wins, constraint=constraint, margin=margin)
    if label_smoothing:
        flipped = aft_loss(x, chosen_wins.mT, constraint="none")
        loss = (1 - label_smoothing) * loss + label_smoothing * flipped
    return loss


def ipo_loss(logps, ref_logps, *, beta):
    """IPO (Eq. 17; beta is its tau): logps, ref_logps (B, 2), sums, column 0 chosen, 1 rejected -> (B,).

        (h_0 - h_1 - 1 / (2 beta))^2,     h = log pi(y|x) - log pi_ref(y|x)

    A target for the gap where DPO has a race: beyond 1 / (2 beta) it is closed again. On sums, as in the
    paper and the official DPO code; TRL takes token means, which shifts the useful beta by about a length.
    """
    h = _log_ratios(logps, ref_logps, beta)
    return (h[:, 0] - h[:, 1] - 1 / (2 * beta)) ** 2


# -------------------------------------------------------------------- losses on the policy's own responses


def group_advantages(rewards, present=None, *, scale="std"):
    """How much better than its group a response is: rewards (B, K), present bool (B, K) or None -> (B, K).

        "std"   A_i = (r_i - mean) / (std + 1e-4)      GRPO (section 4.1.2), DAPO (Eq. 9); as TRL has it, std
                                                       divides by K - 1 and 1e-4 keeps it off 0
        "none"  A_i =  r_i - mean                      Dr. GRPO (section 3): without the std, which weighs
                                                       nearly solved and nearly hopeless questions most

    mean and std over the present responses of the group. A_i is the mean over j of r_i - r_j: pairs again. A
    dead group (all rewards equal, one response, none) and an absent slot get exactly 0. The reward of a
    present response must be finite (ValueError), an absent slot holds anything.
    """
    if scale not in ("std", "none"):
        raise ValueError(f"scale is {scale!r}; allowed: 'std', 'none'")
    present = _present(rewards, present)
    count = present.sum(1, keepdim=True).clamp(min=1)
    r = torch.where(present, _wide(rewards).detach(), -torch.inf)
    r = torch.where(present, r - r.amax(1, keepdim=True), 0.0)  # equal rewards are exactly 0 from here on
    centred = torch.where(present, r - r.sum(1, keepdim=True) / count, 0.0)
    if scale == "none":
        return centred
    variance = centred.square().sum(1, keepdim=True) / (count - 1).clamp(min=1)
    return centred / (variance.sqrt() + 1e-4)


def grpo_loss(
    token_logps,
    old_token_logps,
    ref_token_logps,
    advantages,
    loss_mask,
    *,
    clip_low=0.2,
    clip_high=0.2,
    kl=0.0,
    denominator=None,
):
    """GRPO (Eq. 3), the clipped policy gradient, and its descendants' normalisations: one value a response.

        sum over its tokens of  -min(ratio A, clip(ratio, 1 - clip_low, 1 + clip_high) A) + kl k3
        ---------------------------------------------------------------------------------------------
                                             denominator

        ratio = pi / pi_old      k3 = pi_ref / pi - log(pi_ref / pi) - 1, see `k3`

                    denominator                                          advantages     clip_high    kl
        GRPO        None: |o|, its own number of tokens                  "std"          = clip_low   0.04
        Dr. GRPO    the largest number allowed, one for all responses    "none"         = clip_low   0
        DAPO        tokens of the step / N: a mean over tokens           "std"          0.28         0

    token_logps (N, T) of the policy, old_token_logps (N, T) of the policy that drew the responses,
    ref_token_logps (N, T), or None with kl 0 (then it is not looked at), advantages (N,) or one a token
    (N, T), loss_mask bool (N, T), denominator None or a number > 0 -> (N,); average over the step's N
    responses. old, ref and advantages are constants.

    By |o|, a token of a long wrong response weighs less than one of a short: wrong answers grow. A constant
    ends that; over DAPO's tokens a long response counts for more in all.

    At ratio 1, which is where a step begins, the gradient is that of -A log pi: RRHF's pairs without the
    hinge (see the top). The clip ends a token's push once it has moved it by clip_low or clip_high in the
    push's direction; against it nothing is cut. Computed as that, in log space: with A > 0 the minimum is
    min(ratio, 1 + clip_high) A, with A < 0 max(ratio, 1 - clip_low) A; a ratio that overflows where it is cut
    has gradient 0, not NaN. A dead group costs exactly 0, but for kl; a row without a scored token costs 0.
    """
    _check_mask("loss_mask", loss_mask, token_logps)
    if advantages.dim() == 1:
        advantages = advantages[:, None].expand(len(advantages), loss_mask.shape[1])
    for name, x in (("old_token_logps", old_token_logps), ("advantages", advantages)):
        assert x.shape == loss_mask.shape, f"{name} {tuple(x.shape)}, token_logps {tuple(token_logps.shape)}"
    if not (0 <= clip_low <= 1 and clip_high >= 0):
        raise ValueError(f"clip_low is {clip_low}, clip_high {clip_high}; allowed: 0 to 1, and 0 or more")
    if not 0 <= kl < math.inf or (kl and ref_token_logps is None):
        found = "no ref_token_logps" if ref_token_logps is None else "ref_token_logps"
        raise ValueError(f"kl is {kl} with {found}; allowed: 0, or a finite number > 0 with ref_token_logps")
    if denominator is not None and not 0 < denominator < math.inf:
        raise ValueError(f"denominator is {float(denominator):g}; allowed: None, or a finite number > 0")

    scored = lambda x: torch.where(loss_mask, _wide(x), 0.0)  # first of all: NaN elsewhere has no effect
    logps, A = scored(token_logps), scored(advantages.detach())
    log_ratio = logps - scored(old_token_logps.detach())
    log_ratio = torch.where(log_ratio.isfinite(), log_ratio, torch.nan)  # the clip would hide the fault
    rising, falling = log_ratio.clamp(max=math.log1p(clip_high)), log_ratio.clamp(min=_log_floor(clip_low))
    cost = -A * torch.where(A < 0, falling, rising).exp()
    if kl:
        cost = cost + kl * k3(logps, scored(ref_token_logps))
    return cost.sum(1) / (loss_mask.sum(1).clamp(min=1) if denominator is None else denominator)


def k3(token_logps, ref_token_logps):
    """Schulman's third estimate of KL(pi || pi_ref), at tokens drawn from pi: (N, T), (N, T) -> (N, T).

        k3 = pi_ref / pi - log(pi_ref / pi) - 1                                                    GRPO, Eq. 4

    Never negative, 0 where both agree; its mean over pi's own tokens is the KL. Its slope, 1 - pi_ref / pi,
    is in the mean that of KL(pi_ref || pi). TRL corrects this by default (DeepSeek-V3.2: k3 times the ratio),
    the paper does not, nor does `grpo_loss`."""
    log_ratio = _wide(ref_token_logps).detach() - _wide(token_logps)
    return log_ratio.expm1() - log_ratio


def clipped(token_logps, old_token_logps, advantages, *, clip_low=0.2, clip_high=0.2):
    """Which tokens `grpo_loss` no longer pushes: (N, T), (N, T), (N, T) or (N, 1) -> bool (N, T)."""
    log_ratio = _wide(token_logps) - _wide(old_token_logps)
    too_high = (advantages > 0) & (log_ratio > math.log1p(clip_high))
    return too_high | ((advantages < 0) & (log_ratio < _log_floor(clip_low)))


# -------------------------------------------------------------------- the loss of a reward model


def prm_loss(step_logits, step_labels, step_mask, *, reduce="sum"):
    """Process reward model (URSA, stage II): binary cross-entropy of each step, y = 1 where all is right
    so far.

        - sum over steps j of  y_j log p_j + (1 - y_j) log(1 - p_j),     p = sigmoid(logit)

    step_logits (N, S) at the ends of the steps, step_labels (N, S) bool or numbers from 0 to 1, step_mask
    bool (N, S) -> (N,) in nats; average over the responses. The gradient in a logit is p_j - y_j.

    reduce="sum" is the paper's: a long chain weighs more. "mean" is ours, over a response's steps; of none it
    is a ValueError, their sum is 0. An outcome reward model (ORM) is the case of one step, all of a response.
    A logit that is NaN or infinite makes the loss so, never 0. No code of the paper's loss was released.
    """
    _check_mask("step_mask", step_mask, step_logits)
    assert step_labels.shape == step_logits.shape, (
        f"step_labels {tuple(step_labels.shape)}, step_logits {tuple(step_logits.shape)}"
    )
    if reduce not in ("sum", "mean"):
        raise ValueError(f"reduce is {reduce!r}; allowed: 'sum', 'mean'")
    x = torch.where(step_mask, _wide(step_logits), 0.0)
    y = torch.where(step_mask, step_labels.detach().to(x.dtype), 0.0)
    if not ((0 <= y) & (y <= 1)).all():
        found = y[~((0 <= y) & (y <= 1))][0].item()
        raise ValueError(f"step_labels hold {found:g}; allowed: numbers from 0 to 1")
    costs = F.binary_cross_entropy_with_logits(x, y, reduction="none")
    sums = torch.where(step_mask, costs, 0.0).sum(1)
    if reduce == "sum":
        return sums
    counts = step_mask.sum(1)
    if (counts == 0).any():
        rows = (counts == 0).nonzero()[:, 0].tolist()
        raise ValueError(f"step_mask is all False in row(s) {rows}; the mean of no step does not exist")
    return sums / counts


# -------------------------------------------------------------------- shared pieces


def _wide(x):
    """At least float32: a bfloat16 sum near -500 is rounded to multiples of 2 nats."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _check_mask(name, mask, like):
    assert mask.shape == like.shape, f"{name} {tuple(mask.shape)} must have the shape {tuple(like.shape)}"
    if mask.dtype != torch.bool:
        raise ValueError(f"{name} is {mask.dtype}; a mask must be torch.bool")


def _present(rewards, present):
    """The mask (None: all), after refusing rewards of present responses that are not finite."""
    assert rewards.dim() == 2, f"rewards must be (B, K), found {tuple(rewards.shape)}"
    present = torch.ones_like(rewards, dtype=torch.bool) if present is None else present
    _check_mask("present", present, rewards)
    bad = (present & ~rewards.isfinite()).nonzero().tolist()
    if bad:
        b, k = bad[0]
        raise ValueError(f"rewards[{b}, {k}] is {rewards[b, k].item()}; a present reward must be finite")
    return present


def _log_floor(clip_low):
    """log(1 - clip_low), of clip_low 1 too."""
    return math.log1p(-clip_low) if clip_low < 1 else -math.inf


def _log_ratios(logps, ref_logps, beta):
    """log pi - log pi_ref, (B, 2): subtracted response by response, where large sums lose the least."""
    assert logps.shape == ref_logps.shape == (len(logps), 2), (
        f"logps {tuple(logps.shape)} and ref_logps {tuple(ref_logps.shape)} must both be (B, 2)"
    )
    if not 0 < beta < math.inf:
        raise ValueError(f"beta is {beta}; it must be a finite number > 0")
    return _wide(logps) - _wide(ref_logps)


def _constrain(scores, better, constraint, margin):
    """What the constraint makes of the scores: (s, s as the loser sees it, boundary B or None), each (B, K).

    B_j = (min over i better than j of s_i) - margin, a constant; +inf where no response is better than j.
    """
    assert scores.dim() == 2 and better.shape == (*scores.shape, scores.shape[1]), (
        f"scores {tuple(scores.shape)} must be (B, K) and better {tuple(better.shape)} (B, K, K)"
    )
    _check_mask("better", better, better)
    if constraint not in CONSTRAINTS:
        raise ValueError(f"constraint is {constraint!r}; allowed: 'none', 'detached', 'boundary'")
    if constraint != "boundary" and margin is not None:
        raise ValueError(f"margin is {margin} with constraint {constraint!r}; only 'boundary' takes a margin")
    if constraint == "boundary" and (margin is None or not 0 <= margin < math.inf):
        raise ValueError(f"margin is {margin} with constraint 'boundary'; it needs a finite margin >= 0")
    s = _wide(scores)
    s = torch.where(s.isfinite(), s, torch.nan)  # e^(-inf) = 0 would hide the fault
    if constraint == "boundary":
        winners = torch.where(better, s.detach()[:, :, None], torch.inf)
        return s, s, winners.amin(1) - margin
    return s, s.detach() if constraint == "detached" else s, None


def _log_one_plus_sum_exp(terms, mask):
    """log(1 + sum of e^terms where mask), over the last axis; 0 with gradient 0 where mask is all False.

    Masked terms become the lowest finite number, in effect -inf: its exponential is 0 too, but a row of
    nothing but -inf has NaN in its backward. logaddexp(x, 0) = log(1 + e^x), exact for large x and for small.
    """
    total = torch.where(mask, terms, torch.finfo(terms.dtype).min).logsumexp(-1)
    return torch.logaddexp(total, torch.zeros_like(total))
