"""The losses against the papers' equations: numbers by hand, golden data, double loops, bad input.

    token    log p(y_t | x, y_<t) = logit[y_t] - log sum_v e^logit[v];   S = sum over it, s = S / length
    SFT      - sum_t log p(y_t) / number of tokens
    DPO      - log sigmoid( beta (S_w - Sref_w) - beta (S_l - Sref_l) )                arXiv 2305.18290, Eq. 7
    cDPO     (1 - e) DPO(w, l) + e DPO(l, w)                                           its official code
    IPO      ( (S_w - Sref_w) - (S_l - Sref_l) - 1 / (2 beta) )^2                     arXiv 2310.12036, Eq. 17
    RRHF     sum_{r_i > r_j} max(0, s_j - s_i)                                         arXiv 2304.05302, 3.1
    PRO      sum_k - log( e^(s_k T_kk) / (e^(s_k T_kk) + sum_{r_j < r_k} e^(s_j T_kj)) ),    arXiv 2306.17492
             T_kj = r_k - r_j,  T_kk = max_j T_kj
    AFT      see test_aft.py

golden/losses_golden.json holds what the official codes compute (DPO, IPO, RRHF) and what their authors meant
(RRHF "as_intended", PRO "derived_exact"). Where ours differs on purpose, a test says so.
"""

import json
import math
from functools import partial
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from minicot.losses import aft_loss, better_than, dpo_loss, ipo_loss, pro_loss, rrhf_loss, sequence_logps
from minicot.losses import sft_loss, token_logps
from tests.helpers import assert_shapes_named, assert_value_named

GOLDEN = json.loads((Path(__file__).parent / "golden" / "losses_golden.json").read_text())
SETTINGS = [("none", None), ("detached", None), ("boundary", 0.0), ("boundary", 0.3)]
NAN, INF = math.nan, math.inf


def cases(name):
    return [pytest.param(case, id=case["id"]) for case in GOLDEN[name]]


def f64(values):
    """Golden numbers as float64; non-finite ones are stored as the strings "nan", "inf", "-inf"."""

    def number(v):
        return [number(x) for x in v] if isinstance(v, list) else float(v)

    return torch.tensor(number(values), dtype=torch.float64)


def close(found, expected, rtol=1e-9, atol=1e-14):
    expected = expected if isinstance(expected, torch.Tensor) else f64(expected)
    torch.testing.assert_close(found.detach().double(), expected.double(), rtol=rtol, atol=atol)


def leaf(values, dtype=torch.float64):
    values = values if isinstance(values, torch.Tensor) else f64(values)
    return values.detach().clone().to(dtype).requires_grad_()


def grad(loss, *inputs):
    return torch.autograd.grad(loss.sum(), inputs)


# -------------------------------------------------- the oracle: double loops over plain numbers


def loops(name, s, rewards, constraint, margin, frozen=None):
    """One group's loss, as the papers write it. `s` gets the gradient, `frozen` is its constant twin."""
    frozen = s.detach() if frozen is None else frozen
    K = len(rewards)
    pairs = [(i, j) for i in range(K) for j in range(K) if rewards[i] > rewards[j]]
    loser = frozen if constraint == "detached" else s
    B = {}
    if constraint == "boundary":
        B = {j: min(frozen[i] for i, k in pairs if k == j) - margin for _, j in pairs}
    loss = s.new_zeros(()) + 0 * s.sum()
    if name == "rrhf":
        for i, j in pairs:
            loss = loss + (loser[j] - s[i]).clamp(min=0)
        for j, bound in B.items():
            loss = loss + (bound - s[j]).clamp(min=0)
    elif name == "aft":
        total = 1 + loss
        for i, j in pairs:
            total = total + torch.exp(loser[j] - s[i])
            if B:
                total = total + torch.exp(2 * B[j] - frozen[i] - s[j])
        loss = torch.log(total)
    else:
        for k in range(K):
            worse = [j for i, j in pairs if i == k]
            if worse:
                own = max(rewards[k] - rewards[j] for j in worse) * s[k]
                total = torch.exp(own)
                for j in worse:
                    total = total + torch.exp((rewards[k] - rewards[j]) * loser[j])
                    if B:
                        total = total + torch.exp((rewards[k] - rewards[j]) * (2 * B[j] - s[j]))
                loss = loss + torch.log(total) - own
    return loss


def group_loss(name, scores, rewards, present=None, **constraint):
    if name == "pro":
        return pro_loss(scores, rewards, present, **constraint)
    return {"aft": aft_loss, "rrhf": rrhf_loss}[name](scores, better_than(rewards, present), **constraint)


every_group_loss = pytest.mark.parametrize("name", ["rrhf", "pro", "aft"])
every_setting = pytest.mark.parametrize("constraint, margin", SETTINGS)


def random_group(seed, B=7, K=5, dtype=torch.float64):
    """Scores, rewards with ties and out of order, some slots absent; the last groups: one response, none."""
    g = torch.Generator().manual_seed(seed)
    scores = -2 * torch.rand(B, K, generator=g, dtype=torch.float64)
    rewards = torch.randint(0, 3, (B, K), generator=g).double() * 0.75
    present = torch.rand(B, K, generator=g) < 0.8
    present[-2:] = False
    present[-2, 1] = True
    return scores.to(dtype), rewards.to(dtype), present


@every_group_loss
@every_setting
@pytest.mark.parametrize("seed", range(4))
def test_group_losses_equal_their_double_loops_in_value_and_gradient(name, constraint, margin, seed):
    scores, rewards, present = random_group(seed)
    s = leaf(scores)
    loss = group_loss(name, s, rewards, present, constraint=constraint, margin=margin)
    for b in range(len(s)):
        here = present[b].nonzero()[:, 0]
        twin = leaf(scores[b, here])
        expected = loops(name, twin, rewards[b, here].tolist(), constraint, margin)
        close(loss[b], expected.detach())
        slope = torch.zeros_like(s[b])
        if len(here):
            slope[here] = grad(expected, twin)[0]
        close(torch.autograd.grad(loss[b], s, retain_graph=True)[0][b], slope)


@every_group_loss
@every_setting
def test_gradients_of_group_losses_pass_gradcheck(name, constraint, margin):
    """Numerical differences know no detach: where a constraint detaches, the loops with `frozen` stand in."""
    scores, rewards, present = random_group(11, B=2, K=4)
    present[:] = True
    rewards = torch.tensor([[3.0, 1.0, 0.0, 1.0], [0.0, 1.0, 1.0, 0.0]], dtype=torch.float64)
    if constraint == "none":
        plain = partial(group_loss, name, rewards=rewards, constraint="none")
        assert torch.autograd.gradcheck(lambda s: plain(s), leaf(scores))
    for b in range(2):
        twin, settings = leaf(scores[b]), (rewards[b].tolist(), constraint, margin, scores[b])
        assert torch.autograd.gradcheck(lambda s, settings=settings: loops(name, s, *settings), twin)
        ours = leaf(scores[b : b + 1])
        loss = group_loss(name, ours, rewards[b : b + 1], constraint=constraint, margin=margin)
        close(grad(loss, ours)[0][0], grad(loops(name, twin, *settings), twin)[0])


@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
def test_gradients_of_pair_losses_pass_gradcheck(label_smoothing):
    logps, ref = leaf([[-3.0, -2.0], [-1.0, -4.0]]), leaf([[-2.5, -2.5], [-1.5, -3.0]])
    smoothed = partial(dpo_loss, beta=0.4, label_smoothing=label_smoothing)
    assert torch.autograd.gradcheck(smoothed, (logps, ref))
    assert torch.autograd.gradcheck(partial(ipo_loss, beta=0.4), (logps, ref))


def test_gradients_of_token_logps_and_sums_pass_gradcheck():
    logits = leaf(torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
    ids = torch.tensor([[0, 2, 1, 1], [2, 2, 0, 1]])
    mask = torch.tensor([[False, False, True, True], [False, True, True, False]])
    for loss in (partial(sequence_logps, reduce="mean"), partial(sequence_logps, reduce="sum"), sft_loss):
        assert torch.autograd.gradcheck(lambda x, loss=loss: loss(token_logps(x, ids), mask), logits)


# -------------------------------------------------- tokens, sequences, SFT


def test_token_logps_column_t_reads_the_logits_of_column_t_minus_1():
    """The off-by-one test: only logits[0, 0] prefers token 2, so only a token 2 at column 1 is likely."""
    logits = torch.zeros(1, 3, 4, dtype=torch.float64)
    logits[0, 0, 2] = 5.0
    logps = token_logps(logits, torch.tensor([[1, 2, 2]]))
    close(logps, [[0.0, 5 - math.log(3 + math.e**5), -math.log(4)]])


def test_token_logps_equal_log_softmax():
    g = torch.Generator().manual_seed(1)
    logits, ids = torch.randn(3, 6, 11, generator=g) * 5, torch.randint(0, 11, (3, 6), generator=g)
    expected = logits.double().log_softmax(-1)[:, :-1].gather(-1, ids[:, 1:, None])[..., 0]
    close(token_logps(logits.double(), ids)[:, 1:], expected)
    close(token_logps(logits, ids)[:, 1:], expected, rtol=1e-5, atol=1e-5)
    assert (token_logps(logits, ids)[:, 0] == 0).all()
    assert token_logps(logits[:, :1], ids[:, :1]).tolist() == [[0.0]] * 3


def test_bfloat16_is_computed_in_float32():
    g = torch.Generator().manual_seed(2)
    logits, ids = torch.randn(2, 5, 9, generator=g).bfloat16(), torch.randint(0, 9, (2, 5), generator=g)
    assert token_logps(logits, ids).dtype == torch.float32
    close(token_logps(logits, ids), token_logps(logits.double(), ids), rtol=1e-5, atol=1e-6)
    mask = torch.ones(1, 300, dtype=torch.bool)
    tokens = torch.full((1, 300), -1.8828125, dtype=torch.bfloat16)
    assert sequence_logps(tokens, mask, reduce="sum").item() == pytest.approx(-564.84375, abs=1e-3)
    scores = torch.tensor([[-0.5, -0.75]], dtype=torch.bfloat16, requires_grad=True)
    rewards = torch.tensor([[1.0, 0.0]], dtype=torch.bfloat16)
    for loss in (
        aft_loss(scores, better_than(rewards)),
        rrhf_loss(scores, better_than(rewards)),
        pro_loss(scores, rewards),
        dpo_loss(scores, scores, beta=1.0),
        ipo_loss(scores, scores, beta=1.0),
        sft_loss(scores, torch.ones(1, 2, dtype=torch.bool)),
    ):
        assert loss.dtype == torch.float32
        assert grad(loss, scores)[0].dtype == torch.bfloat16


def test_sequence_logps_by_hand():
    tokens = torch.tensor([[0.0, -1.0, -2.0, -4.0], [0.0, -8.0, -16.0, -32.0]], dtype=torch.float64)
    mask = torch.tensor([[False, True, True, False], [False, False, False, True]])
    assert sequence_logps(tokens, mask, reduce="sum").tolist() == [-3.0, -32.0]
    assert sequence_logps(tokens, mask, reduce="mean").tolist() == [-1.5, -32.0]


def test_an_empty_response_has_a_sum_of_0_and_no_mean():
    tokens, mask = torch.zeros(3, 2), torch.tensor([[True, True], [False, False], [False, False]])
    assert sequence_logps(tokens, mask, reduce="sum").tolist() == [0.0, 0.0, 0.0]
    with pytest.raises(ValueError, match=r"row\(s\) \[1, 2\]"):
        sequence_logps(tokens, mask, reduce="mean")


def test_sft_loss_by_hand_and_in_parts():
    tokens = torch.tensor([[0.0, -1.0, -2.0], [0.0, -6.0, -9.0]], dtype=torch.float64)
    mask = torch.tensor([[False, True, True], [False, True, False]])
    assert sft_loss(tokens, mask).item() == 3.0  # (1 + 2 + 6) / 3, not the mean of 1.5 and 6
    parts = [sft_loss(tokens[i : i + 1], mask[i : i + 1], n_tokens=mask.sum()) for i in range(2)]
    assert sum(parts).item() == 3.0
    nothing = leaf(tokens[:1])
    empty = sft_loss(nothing, torch.zeros(1, 3, dtype=torch.bool), n_tokens=3)
    assert empty.item() == 0.0 and (grad(empty, nothing)[0] == 0).all()


@pytest.mark.parametrize("reduce", ["sum", "mean", "sft"])
def test_nan_in_masked_positions_leaks_into_neither_value_nor_gradient(reduce):
    tokens = leaf([[NAN, -1.0, -3.0, NAN], [-INF, -2.0, INF, NAN]])
    mask = torch.tensor([[False, True, True, False], [False, True, False, False]])
    out = sft_loss(tokens, mask) if reduce == "sft" else sequence_logps(tokens, mask, reduce=reduce)
    assert out.isfinite().all()
    slope = grad(out, tokens)[0]
    assert (slope[~mask] == 0).all() and (slope[mask] != 0).all()


def test_nan_in_scored_positions_stays_visible():
    tokens, mask = torch.tensor([[0.0, NAN], [0.0, -1.0]]), torch.tensor([[False, True], [False, True]])
    assert sequence_logps(tokens, mask, reduce="sum").isnan().tolist() == [True, False]
    assert sft_loss(tokens, mask).isnan()


# -------------------------------------------------- who beats whom


def test_better_than_by_hand():
    rewards = torch.tensor([[0.5, 2.0, 0.5, NAN]])
    better = better_than(rewards, torch.tensor([[True, True, True, False]]))
    assert better.dtype == torch.bool and better.nonzero().tolist() == [[0, 1, 0], [0, 1, 2]]
    assert better_than(torch.tensor([[True, False]])).nonzero().tolist() == [[0, 0, 1]]


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_a_present_reward_that_is_not_finite_is_an_error_naming_its_place(bad):
    rewards = torch.tensor([[1.0, 0.0], [0.0, bad]])
    with pytest.raises(ValueError, match=r"rewards\[1, 1\] is " + str(bad)):
        better_than(rewards)
    with pytest.raises(ValueError, match=r"rewards\[1, 1\]"):
        pro_loss(torch.zeros(2, 2), rewards)


# -------------------------------------------------- golden data: DPO and IPO


def dpo_variants(case):
    yield "sigmoid", lambda p, r: dpo_loss(p, r, beta=case["beta"])
    yield "cdpo", lambda p, r: dpo_loss(p, r, beta=case["beta"], label_smoothing=case["label_smoothing"])
    yield "ipo", lambda p, r: ipo_loss(p, r, beta=case["beta"])


@pytest.mark.parametrize("case", cases("dpo_score"))
def test_dpo_and_ipo_equal_the_official_code_on_scores(case):
    logps = torch.stack([f64(case["policy_chosen_logps"]), f64(case["policy_rejected_logps"])], 1)
    ref = torch.stack([f64(case["reference_chosen_logps"]), f64(case["reference_rejected_logps"])], 1)
    runs = [(name, fn, ref) for name, fn in dpo_variants(case)]
    runs.append(("sigmoid_reference_free", runs[0][1], torch.zeros_like(ref)))
    for name, loss_fn, reference in runs:
        expected = case["variants"][name]
        policy = leaf(logps)
        losses = loss_fn(policy, reference)
        close(losses, expected["losses"])
        close(losses.mean(), expected["loss_mean"])
        slope = torch.stack([f64(expected["grad_policy_chosen"]), f64(expected["grad_policy_rejected"])], 1)
        close(grad(losses.mean(), policy)[0], slope)
        close(loss_fn(logps.float(), reference.float()), expected["losses_float32"], rtol=1e-5, atol=1e-5)


def pairs_of_rows(values):
    """Golden logit cases hold the chosen rows first, then the rejected ones; ours are (B, 2)."""
    return values.reshape(2, -1).T


@pytest.mark.parametrize("case", cases("dpo_logit"))
@pytest.mark.parametrize("dtype, rtol, atol", [(torch.float64, 1e-9, 1e-14), (torch.float32, 1e-5, 1e-5)])
def test_dpo_and_ipo_equal_the_official_code_from_logits(case, dtype, rtol, atol):
    ids, labels = torch.tensor(case["input_ids"]), torch.tensor(case["labels"])
    policy, mask = leaf(case["policy_logits"], dtype), labels != -100
    tokens = token_logps(policy, ids)
    close(torch.where(mask, tokens, 0.0)[:, 1:], case["policy_token_logps"], rtol, atol)
    sums = sequence_logps(tokens, mask, reduce="sum")
    ref = sequence_logps(token_logps(f64(case["ref_logits"]).to(dtype), ids), mask, reduce="sum")
    close(sums, case["policy_sum_logps"], rtol, atol)
    close(ref, case["ref_sum_logps"], rtol, atol)
    full = mask.any(1)
    means = sequence_logps(tokens[full], mask[full], reduce="mean")
    close(means, f64(case["policy_avg_logps"])[full], rtol, atol)
    for name, loss_fn in dpo_variants(case):
        expected = case["official"][name]
        losses = loss_fn(pairs_of_rows(sums), pairs_of_rows(ref))
        close(losses, expected["losses"], rtol, atol)
        slope = torch.autograd.grad(losses.mean(), [sums, policy], retain_graph=True)
        close(slope[0], expected["grad_policy_sum_logps"], rtol, atol)
        if "grad_policy_logits" in expected:
            close(slope[1], expected["grad_policy_logits"], rtol, atol)


def padded(x, side, width, value=0):
    extra = torch.full((x.shape[0], width, *x.shape[2:]), value, dtype=x.dtype)
    return torch.cat([extra, x] if side == "left" else [x, extra], 1)


@pytest.mark.parametrize("case", cases("dpo_logit"))
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_on_either_side_changes_nothing(case, side):
    """The official RRHF (divides by the padded width) and PRO (scores one pad token) fail this."""
    ids, mask = torch.tensor(case["input_ids"]), torch.tensor(case["labels"]) != -100
    logits = f64(case["policy_logits"])
    wide = padded(logits, side, 3, 1e4), padded(ids, side, 3), padded(mask, side, 3, False)
    for reduce in ("sum", "mean"):
        close(
            sequence_logps(token_logps(*wide[:2]), wide[2], reduce=reduce),
            sequence_logps(token_logps(logits, ids), mask, reduce=reduce),
        )


# -------------------------------------------------- golden data: RRHF and PRO


@pytest.mark.parametrize("case", cases("rrhf_score"))
def test_rrhf_equals_the_official_ranking_loss_on_scores(case):
    better = better_than(f64([case["rewards"]]))
    for constraint, expected in (("none", case), ("detached", case["derived_dc"])):
        scores = leaf([case["scores"]])
        loss = rrhf_loss(scores, better, constraint=constraint)
        close(loss, [expected["rrhf_loss"]])
        close(grad(loss, scores)[0], [expected["grad_scores"]])
        close(rrhf_loss(scores.float(), better, constraint=constraint), [expected["rrhf_loss"]], 1e-5, 1e-5)
    assert (better & (scores[:, None, :] > scores[:, :, None])).sum() == case["n_violating_pairs"]


@pytest.mark.parametrize("case", cases("rrhf_logit"))
@pytest.mark.parametrize("dtype, rtol, atol", [(torch.float64, 1e-9, 1e-14), (torch.float32, 1e-5, 1e-5)])
def test_rrhf_equals_what_the_official_code_intended_from_logits(case, dtype, rtol, atol):
    """Its labels are shifted already (label t belongs to logits t); ours shifts inside token_logps.

    Where length_penalty is not 1, its scores are not token means: then S / length^penalty, by hand. Its
    sft_loss divides by the padded width (as executed and as intended); ours is derived_sft_masked_mean.
    """
    labels, logits = torch.tensor(case["labels"]), leaf(case["logits"], dtype)
    assert (labels[:, -1] == -100).all()
    mask = torch.cat([torch.zeros(len(labels), 1, dtype=torch.bool), labels[:, :-1] != -100], 1)
    ids = torch.cat([torch.zeros(len(labels), 1, dtype=torch.long), labels[:, :-1].clamp(min=0)], 1)
    tokens = token_logps(logits, ids)
    close(torch.where(mask, tokens, 0.0)[:, 1:], f64(case["token_logps"])[:, :-1], rtol, atol)
    if case["length_penalty"] == 1:
        scores = sequence_logps(tokens, mask, reduce="mean")
    else:
        rtol = max(rtol, 1e-6)  # L ** 0.5 is float32 in the official code
        scores = sequence_logps(tokens, mask, reduce="sum") / mask.sum(1) ** case["length_penalty"]
    expected = case["as_intended"]
    close(scores, expected["scores"], rtol, atol)
    rank = rrhf_loss(scores[None], better_than(f64([case["rewards"]])), constraint="none")[0]
    close(rank, expected["rrhf_loss"], rtol, atol)
    weight = case["rrhf_weight"]
    close(
        torch.autograd.grad(weight * rank, scores, retain_graph=True)[0],
        expected["grad_scores_through_rank_term"],
        rtol,
        atol,
    )
    best = case["sft_index"]
    close(
        sft_loss(tokens[best : best + 1], mask[best : best + 1]), case["derived_sft_masked_mean"], rtol, atol
    )
    official_sft = -sequence_logps(tokens, mask, reduce="sum")[best] / case["padded_length"]
    close(grad(weight * rank + official_sft, logits)[0], expected["grad_logits"], rtol, atol)


def pro_scores(case, logits):
    """The official PRO code's scores: its mask is not shifted, so one pad token may be among the scored."""
    ids, mask = torch.tensor(case["input_ids"]), torch.tensor(case["token_mask"]).bool()
    B, K, L = ids.shape
    tokens = token_logps(logits.flatten(0, 1), ids.flatten(0, 1))
    close(tokens[:, 1:].reshape(B, K, L - 1), case["token_logps"], 1e-5, 1e-5)
    mask = torch.cat([torch.zeros(B * K, 1, dtype=torch.bool), mask.flatten(0, 1)], 1)
    means, sums = (sequence_logps(tokens, mask, reduce=reduce) for reduce in ("mean", "sum"))
    return means.reshape(B, K), sums


def distinct_and_sorted(case):
    return all(a > b for row in case["rewards"] for a, b in pairwise(row))


@pytest.mark.parametrize("case", cases("pro"))
def test_pro_equals_the_exact_form_of_the_official_formula_from_logits(case):
    """Without its 1e-10. On ties and unsorted rewards ours is another loss, so the double loops take over."""
    logits, rewards = leaf(case["logits"]), f64(case["rewards"])
    scores, sums = pro_scores(case, logits)
    close(scores, case["scores"])
    K = rewards.shape[1]
    if not distinct_and_sorted(case):
        for b, row in enumerate(rewards.tolist()):
            expected = loops("pro", scores[b].detach(), row, "none", None)
            if expected.isfinite():
                close(pro_loss(scores, rewards)[b], expected)
        return
    exact, official = case["derived_exact"], f64(case["rank_losses"])
    ranks = f64(exact["rank_losses"])
    loss = pro_loss(scores, rewards)
    close(loss.mean(), ranks.sum())
    close(torch.autograd.grad(loss.mean(), scores, retain_graph=True)[0], exact["grad_scores_rank_terms"])
    index = torch.tensor(case["sft_index"]) + K * torch.arange(len(rewards))
    sft = case["sft_weight"] * (K - 1) ** 2 * -sums[index].mean()
    close(loss.mean() + sft, exact["total"])
    if (ranks - official).abs().max() < 1e-7:  # where its 1e-10 does not count
        close(grad(loss.mean() + sft, logits)[0], case["grad_logits"], rtol=1e-6, atol=1e-8)
    constant = leaf(case["scores"])
    detached = pro_loss(constant, rewards, constraint="detached")
    close(detached.mean(), ranks.sum())
    close(grad(detached.mean(), constant)[0], case["derived_dc"]["grad_scores_rank_terms"])
    close(pro_loss(constant.float(), rewards.float()).mean(), ranks.sum(), 1e-5, 1e-5)


def test_pro_takes_rewards_as_constants():
    """A reward may come from a model; the policy's loss must not train it."""
    scores, rewards = leaf([[-1.0, -2.0]]), leaf([[1.0, 0.0]])
    _, unused = torch.autograd.grad(pro_loss(scores, rewards).sum(), [scores, rewards], allow_unused=True)
    assert unused is None


def test_pro_on_ties_and_unsorted_rewards_reads_the_rewards_not_the_positions():
    """Rewards 0, 2, 2, 1: responses 1 and 2 each face 3 (gap 1) and 0 (gap 2), 3 faces 0 (gap 1)."""
    s = [-1.0, -0.5, -2.0, -0.25]
    e = math.exp
    expected = (
        math.log(e(2 * s[1]) + e(2 * s[0]) + e(s[3]))
        - 2 * s[1]
        + math.log(e(2 * s[2]) + e(2 * s[0]) + e(s[3]))
        - 2 * s[2]
        + math.log(e(s[3]) + e(s[0]))
        - s[3]
    )
    close(pro_loss(f64([s]), f64([[0.0, 2.0, 2.0, 1.0]])), [expected])


# -------------------------------------------------- numbers by hand, signs, identities


def test_rrhf_by_hand():
    """Rewards 2 > 1 > 0. Wrong pairs: (0, 1) by 1.0, (0, 2) by 0.5; (1, 2) is right."""
    scores, better = leaf([[-2.0, -1.0, -1.5]]), better_than(f64([[2.0, 1.0, 0.0]]))
    assert rrhf_loss(scores, better).item() == 1.5
    assert grad(rrhf_loss(scores, better), scores)[0].tolist() == [[-2.0, 1.0, 1.0]]
    assert grad(rrhf_loss(scores, better, constraint="detached"), scores)[0].tolist() == [[-2.0, 0.0, 0.0]]
    # margin 0.25: B_1 = -2.25 (below -1.0), B_2 = min(-2, -1) - 0.25 = -2.25: both hinges silent
    assert rrhf_loss(scores, better, constraint="boundary", margin=0.25).item() == 1.5
    low = leaf([[-1.0, -4.0]])
    loss = rrhf_loss(low, better_than(f64([[1.0, 0.0]])), constraint="boundary", margin=0.5)
    assert loss.item() == 2.5 and grad(loss, low)[0].tolist() == [[0.0, -1.0]]  # B = -1.5 lifts it from -4


def test_pro_by_hand():
    """Rewards 3, 1, 0: T_0 = (3; 2, 3), T_1 = (1; 1). With all scores s: log(1 + e^-s + 1), then log 2."""
    s = -0.7
    close(pro_loss(f64([[s, s, s]]), f64([[3.0, 1.0, 0.0]])), [math.log(2 + math.exp(-s)) + math.log(2)])
    # boundary, K = 2, gap 1, margin 0.5: log(e^-1 + e^-2 + e^(2 * -1.5 + 2)) + 1
    close(
        pro_loss(f64([[-1.0, -2.0]]), f64([[1.0, 0.0]]), constraint="boundary", margin=0.5),
        [math.log(2 * math.exp(-1) + math.exp(-2)) + 1],
    )


def test_dpo_and_ipo_by_hand():
    """beta 0.5: x = 0.5 * (-1 - -3, -4 - -2) = (1, -1): -log sigmoid(2). IPO: (2 - -2 - 1)^2."""
    logps, ref = f64([[-1.0, -4.0]]), f64([[-3.0, -2.0]])
    close(dpo_loss(logps, ref, beta=0.5), [math.log(1 + math.exp(-2))])
    close(
        dpo_loss(logps, ref, beta=0.5, label_smoothing=0.25),
        [0.75 * math.log(1 + math.exp(-2)) + 0.25 * math.log(1 + math.exp(2))],
    )
    assert ipo_loss(logps, ref, beta=0.5).tolist() == [9.0]


def test_dpo_at_policy_equal_to_reference_is_ln_2():
    logps = -torch.rand(5, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(3)) * 100
    for label_smoothing in (0.0, 0.3):
        close(dpo_loss(logps, logps, beta=0.1, label_smoothing=label_smoothing), [math.log(2)] * 5)


def test_ipo_is_0_at_its_target_and_pushes_back_beyond():
    ref = torch.zeros(3, 2, dtype=torch.float64)
    logps = leaf([[5.0, 0.0], [4.0, 0.0], [6.0, 0.0]])  # beta 0.1: the target is 5
    loss = ipo_loss(logps, ref, beta=0.1)
    assert loss.tolist() == [0.0, 1.0, 1.0]
    assert grad(loss, logps)[0].sign().tolist() == [[0, 0], [-1, 1], [1, -1]]


@every_group_loss
def test_plain_loss_pushes_the_best_up_and_the_worst_down(name):
    scores = leaf([[-2.0, -1.5, -1.0]])  # in the wrong order throughout
    slope = grad(group_loss(name, scores, f64([[2.0, 1.0, 0.0]]), constraint="none"), scores)[0][0]
    assert slope[0] < 0 < slope[2]  # descent goes against the gradient


@every_group_loss
def test_detached_constraint_keeps_the_value_and_sends_no_gradient_to_worse(name):
    scores, rewards, present = random_group(5)
    s = leaf(scores)
    plain = group_loss(name, s, rewards, present, constraint="none")
    detached = group_loss(name, s, rewards, present, constraint="detached")
    assert (plain == detached).all()
    slope, before = grad(detached, s)[0], grad(plain, s)[0]
    wins = better_than(rewards, present).any(2)
    assert (slope[~wins] == 0).all() and (slope[wins] < 0).any() and (slope <= 0).all()
    assert (before[~wins] > 0).any()


@every_group_loss
def test_boundary_lifts_a_response_far_below_and_costs_no_less_than_plain(name):
    scores = leaf([[-0.5, -9.0], [-0.5, -0.4]])
    rewards = f64([[1.0, 0.0], [1.0, 0.0]])
    loss = group_loss(name, scores, rewards, constraint="boundary", margin=0.2)
    slope = grad(loss, scores)[0]
    assert slope[0, 1] < 0 < slope[1, 1]
    assert (loss >= group_loss(name, scores, rewards, constraint="none")).all()


@every_group_loss
def test_a_large_margin_makes_the_boundary_vanish(name):
    scores, rewards, present = random_group(6)
    s = leaf(scores)
    plain = group_loss(name, s, rewards, present, constraint="none")
    far = group_loss(name, s, rewards, present, constraint="boundary", margin=1e6)
    close(far, plain)
    close(grad(far, s)[0], grad(plain, s)[0])


@pytest.mark.parametrize("constraint, margin", SETTINGS)
def test_dpo_is_aft_on_beta_times_the_log_ratio(constraint, margin):
    g = torch.Generator().manual_seed(8)
    logps, ref = (-20 * torch.rand(6, 2, generator=g, dtype=torch.float64) for _ in range(2))
    better = better_than(torch.tensor([[1.0, 0.0]]).expand(6, 2))
    p, q = leaf(logps), leaf(logps)
    dpo = dpo_loss(p, ref, beta=0.3, constraint=constraint, margin=margin)
    aft = aft_loss(0.3 * (q - ref), better, constraint=constraint, margin=margin)
    close(dpo, aft)
    close(grad(dpo, p)[0], grad(aft, q)[0])


def test_dpo_is_minus_log_sigmoid():
    g = torch.Generator().manual_seed(9)
    logps, ref = (-20 * torch.rand(6, 2, generator=g, dtype=torch.float64) for _ in range(2))
    h = (logps[:, 0] - logps[:, 1]) - (ref[:, 0] - ref[:, 1])
    close(dpo_loss(logps, ref, beta=0.3), -torch.nn.functional.logsigmoid(0.3 * h))


@every_group_loss
@every_setting
def test_losses_of_score_differences_ignore_a_common_shift(name, constraint, margin):
    """True of RRHF and AFT. PRO weighs its scores differently in one sum, so a shift does change it."""
    scores, rewards, present = random_group(10)
    before, after = (
        group_loss(name, s, rewards, present, constraint=constraint, margin=margin)
        for s in (scores, scores + 3.0)
    )
    if name == "pro":
        assert (before - after).abs().max() > 0.1
    else:
        close(before, after)


# -------------------------------------------------- order, padding, degenerate groups, extremes


@every_group_loss
@every_setting
def test_the_order_of_responses_changes_nothing(name, constraint, margin):
    scores, rewards, present = random_group(12)
    order = torch.tensor([3, 0, 4, 2, 1])
    s, t = leaf(scores), leaf(scores[:, order])
    first = group_loss(name, s, rewards, present, constraint=constraint, margin=margin)
    second = group_loss(name, t, rewards[:, order], present[:, order], constraint=constraint, margin=margin)
    close(second, first.detach())
    close(grad(second, t)[0], grad(first, s)[0][:, order])


@every_group_loss
@every_setting
@pytest.mark.parametrize("garbage", [NAN, INF, -INF, 1e30])
def test_garbage_in_absent_slots_changes_neither_value_nor_gradient(name, constraint, margin, garbage):
    scores, rewards, present = random_group(13)
    extra = torch.full((len(scores), 2), garbage, dtype=torch.float64)
    s, wide = leaf(torch.where(present, scores, garbage)), leaf(torch.cat([scores, extra], 1))
    base = leaf(scores)
    clean = group_loss(name, base, rewards, present, constraint=constraint, margin=margin)
    slope = grad(clean, base)[0]
    kept = torch.where(present, rewards, garbage)
    inside = group_loss(name, s, kept, present, constraint=constraint, margin=margin)
    close(inside, clean.detach())
    close(grad(inside, s)[0], slope)
    more = torch.cat([present, torch.zeros_like(extra, dtype=torch.bool)], 1)
    longer = torch.cat([rewards, extra], 1)
    padded_loss = group_loss(name, wide, longer, more, constraint=constraint, margin=margin)
    close(padded_loss, clean.detach())
    close(grad(padded_loss, wide)[0], torch.cat([slope, torch.zeros_like(extra)], 1))


@every_group_loss
@every_setting
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_group_without_a_pair_costs_exactly_0_with_zero_gradient(name, constraint, margin, dtype):
    """All right, all wrong, one present, none present, beside a group with a pair: no NaN on the way back."""
    scores = leaf([[-1.0, -2.0], [-1e4, -0.5], [-1.0, NAN], [NAN, NAN], [-1.0, -2.0]], dtype)
    rewards = torch.tensor([[1.0, 1.0], [0.0, 0.0], [1.0, NAN], [NAN, NAN], [1.0, 0.0]], dtype=dtype)
    present = torch.tensor([[True, True], [True, True], [True, False], [False, False], [True, True]])
    loss = group_loss(name, scores, rewards, present, constraint=constraint, margin=margin)
    assert loss.shape == (5,) and loss.dtype == dtype and (loss[:4] == 0).all()
    assert (grad(loss, scores)[0][:4] == 0).all()
    with pytest.warns(UserWarning, match="Anomaly"), torch.autograd.detect_anomaly():
        group_loss(name, scores, rewards, present, constraint=constraint, margin=margin).sum().backward()
    alone = leaf([[-1.0]], dtype)
    loss = group_loss(name, alone, torch.ones(1, 1, dtype=dtype), constraint=constraint, margin=margin)
    assert loss.requires_grad and loss.item() == 0 and grad(loss, alone)[0].item() == 0


@every_group_loss
@every_setting
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_scores_of_1e4_neither_overflow_nor_lose_their_gradient(name, constraint, margin, dtype):
    scores = leaf([[-1e4, 1e4, 0.0], [1e4, -1e4, 0.0], [-1e4, -1e4, -1e4], [1e4, 1e4, 1e4]], dtype)
    rewards = torch.tensor([[2.0, 1.0, 0.0]], dtype=dtype).expand(4, 3)
    loss = group_loss(name, scores, rewards, constraint=constraint, margin=margin)
    slope = grad(loss, scores)[0]
    assert loss.isfinite().all() and slope.isfinite().all() and (loss >= 0).all()
    assert loss[0] >= 1e4 and slope[0, 0] <= -0.99  # the best is last by far: pull it up


@pytest.mark.parametrize("gap, plain", [(-2e4, 2e4), (2e4, 0.0)])
def test_a_pair_2e4_apart_by_hand(gap, plain):
    scores, better = leaf([[gap / 2, -gap / 2]]), better_than(f64([[1.0, 0.0]]))
    for loss in (
        aft_loss(scores, better, constraint="none"),
        pro_loss(scores, f64([[1.0, 0.0]])),
        rrhf_loss(scores, better),
        dpo_loss(scores, torch.zeros(1, 2), beta=1.0),
    ):
        assert loss.item() == plain
        assert grad(loss, scores)[0].tolist() == ([[-1.0, 1.0]] if plain else [[0.0, 0.0]])


@every_group_loss
@every_setting
@pytest.mark.parametrize("slot", [0, 1])
@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_a_broken_score_in_a_pair_is_never_turned_into_a_finite_loss(name, constraint, margin, slot, bad):
    """A right response at +inf, or a wrong one at -inf, would otherwise be a perfect 0."""
    scores = f64([[-1.0, -2.0], [-1.0, -2.0]])
    scores[0, slot] = bad
    loss = group_loss(name, scores, f64([[1.0, 0.0]] * 2), constraint=constraint, margin=margin)
    assert loss.isnan().tolist() == [True, False]


@pytest.mark.parametrize("slot", [0, 1])
@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_a_broken_log_probability_is_never_turned_into_a_finite_pair_loss(slot, bad):
    logps, ref = f64([[-1.0, -2.0]]), f64([[-1.0, -1.0]])
    logps[0, slot] = bad
    assert not dpo_loss(logps, ref, beta=0.1).isfinite().any()
    assert not dpo_loss(logps, ref, beta=0.1, label_smoothing=0.1).isfinite().any()
    assert not ipo_loss(logps, ref, beta=0.1).isfinite().any()


def test_no_loss_changes_its_arguments():
    """RRHF's official code overwrites its labels in place; its lengths are wrong from then on."""
    scores, rewards, present = random_group(14, dtype=torch.float32)
    better, mask = better_than(rewards, present), present.clone()
    mask[:, 0] = True
    logits, ids = torch.randn(2, 3, 4), torch.randint(0, 4, (2, 3))
    inputs = [scores, rewards, present, better, mask, logits, ids]
    before = [x.clone() for x in inputs]
    token_logps(logits, ids), sequence_logps(scores, mask, reduce="mean"), sft_loss(scores, mask)
    for constraint, margin in SETTINGS:
        for name in ("rrhf", "pro", "aft"):
            group_loss(name, scores, rewards, present, constraint=constraint, margin=margin)
        dpo_loss(scores[:, :2], scores[:, 1:3], beta=0.1, constraint=constraint, margin=margin)
    ipo_loss(scores[:, :2], scores[:, 1:3], beta=0.1)
    assert all(torch.equal(x, y) for x, y in zip(inputs, before))


# -------------------------------------------------- bad input

S2, B2 = torch.zeros(1, 2), torch.zeros(1, 2, 2, dtype=torch.bool)
OVER_CONSTRAINT = [
    lambda **kw: aft_loss(S2, B2, **kw),
    lambda **kw: rrhf_loss(S2, B2, **kw),
    lambda **kw: pro_loss(S2, S2, **kw),
    lambda **kw: dpo_loss(S2, S2, beta=0.1, **kw),
]


@pytest.mark.parametrize("loss", OVER_CONSTRAINT, ids=["aft", "rrhf", "pro", "dpo"])
@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"constraint": "clamped"}, r"constraint is 'clamped'; allowed: 'none', 'detached', 'boundary'"),
        ({"constraint": None}, r"constraint is None"),
        (
            {"constraint": "boundary"},
            r"margin is None with constraint 'boundary'; it needs a finite margin >= 0",
        ),
        ({"constraint": "boundary", "margin": -0.1}, r"margin is -0.1"),
        ({"constraint": "boundary", "margin": INF}, r"margin is inf"),
        ({"constraint": "boundary", "margin": NAN}, r"margin is nan"),
        ({"constraint": "none", "margin": 0.1}, r"with constraint 'none'; only 'boundary' takes a margin"),
        ({"constraint": "detached", "margin": 0.0}, r"margin is 0.0 with constraint 'detached'"),
    ],
)
def test_constraint_and_margin_are_checked(loss, arguments, message):
    with pytest.raises(ValueError, match=message):
        loss(**arguments)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: dpo_loss(S2, S2, beta=1, label_smoothing=0.1, constraint="detached"), "0.1 with"),
        (
            lambda: dpo_loss(S2, S2, beta=1, label_smoothing=0.1, constraint="boundary", margin=1.0),
            "'boundary'",
        ),
        (lambda: dpo_loss(S2, S2, beta=1, label_smoothing=1.0), r"is 1.0; it must lie in \[0, 1\)"),
        (lambda: dpo_loss(S2, S2, beta=0.1, label_smoothing=-0.1), "label_smoothing is -0.1"),
        (lambda: dpo_loss(S2, S2, beta=0.0), "beta is 0.0; it must be a finite number > 0"),
        (lambda: dpo_loss(S2, S2, beta=NAN), "beta is nan"),
        (lambda: ipo_loss(S2, S2, beta=-1.0), "beta is -1.0"),
        (lambda: ipo_loss(S2, S2, beta=INF), "beta is inf"),
        (lambda: sequence_logps(S2, S2 == 0, reduce="max"), "reduce is 'max'; allowed: 'sum', 'mean'"),
        (
            lambda: sequence_logps(S2, S2, reduce="sum"),
            "loss_mask is torch.float32; a mask must be torch.bool",
        ),
        (lambda: sft_loss(S2, S2.long()), "loss_mask is torch.int64"),
        (lambda: sft_loss(S2, S2 > 0), "sft_loss over 0 tokens"),
        (lambda: sft_loss(S2, S2 == 0, n_tokens=0), "sft_loss over 0 tokens"),
        (lambda: better_than(S2, S2), "present is torch.float32"),
        (lambda: pro_loss(S2, S2, S2), "present is torch.float32"),
        (lambda: aft_loss(S2, B2.float()), "better is torch.float32"),
        (lambda: rrhf_loss(S2, B2.int()), "better is torch.int32"),
    ],
)
def test_bad_values_are_named(call, message):
    assert_value_named(call, message)


@pytest.mark.parametrize(
    "call, shapes",
    [
        (lambda: token_logps(torch.zeros(2, 3, 5), torch.zeros(2, 4).long()), [r"\(2, 3, 5\)", r"\(2, 4\)"]),
        (lambda: sequence_logps(S2, torch.ones(2, 4) > 0, reduce="sum"), [r"\(2, 4\)", r"\(1, 2\)"]),
        (lambda: sft_loss(torch.zeros(2, 3), torch.ones(3).bool()), [r"\(3,\)", r"\(2, 3\)"]),
        (lambda: better_than(torch.zeros(3)), [r"\(3,\)", r"\(B, K\)"]),
        (lambda: better_than(torch.zeros(1, 3), torch.ones(1, 2).bool()), [r"\(1, 2\)", r"\(1, 3\)"]),
        (lambda: aft_loss(torch.zeros(2, 3), B2), [r"\(2, 3\)", r"\(1, 2, 2\)"]),
        (lambda: rrhf_loss(torch.zeros(2), B2), [r"\(2,\)", r"\(1, 2, 2\)"]),
        (lambda: pro_loss(torch.zeros(2, 3), torch.zeros(2, 4)), [r"\(2, 3\)", r"\(2, 4\)"]),
        (lambda: dpo_loss(torch.zeros(2, 3), torch.zeros(2, 3), beta=0.1), [r"\(2, 3\)", r"\(B, 2\)"]),
        (lambda: ipo_loss(torch.zeros(4, 2), torch.zeros(3, 2), beta=0.1), [r"\(4, 2\)", r"\(3, 2\)"]),
    ],
)
def test_wrong_shapes_are_named(call, shapes):
    assert_shapes_named(call, shapes)
