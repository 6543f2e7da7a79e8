"""AFT (Making Large Language Models Better Reasoners with Alignment, arXiv 2309.02144), section 4.

    score     s(y) = 1/|y| sum_t log p(y_t | x, y_<t)
    A         L = log( 1 + sum_{p in G_P} sum_{n in G_N} e^(s_n - s_p) )
    DC        L = log( 1 + sum_p sum_n e^(D(s_n) - s_p) ),   D(x) = x as a constant                  4.3.1
    BC        L = log( 1 + sum_p sum_n [ e^(s_n - s_p) + e^(T_p - s_n) ] ),                          4.3.2
              B = min_p s_p - beta,   T_p = 2 B - s_p
    ranking   the same sums over all pairs of different quality, B_j = min over i better than j of s_i, - beta

`beta` is `margin` in the code (DPO has a beta of its own). The golden numbers are naive double loops at 60
digits; T is detached ("bc_T_detached"), which the paper leaves open. See also test_losses.py.
"""

import json
import math
from pathlib import Path

import pytest
import torch

from minicot import plots
from minicot.data import pairs
from minicot.losses import aft_loss, better_than, dpo_loss, sequence_logps, sft_loss
from minicot.recipes import aft as recipe
from minicot.recipes.tables import pack
from minicot.records import Problem, Response, Samples, read_samples, samples_to_row
from minicot.runs import write_jsonl

GOLDEN = json.loads((Path(__file__).parent / "golden" / "losses_golden.json").read_text())
FORMS = [("plain", "none"), ("dc", "detached"), ("bc_T_detached", "boundary")]
every_form = pytest.mark.parametrize("form, constraint", FORMS)


def cases(name):
    return [pytest.param(case, id=case["id"]) for case in GOLDEN[name]]


def f64(values):
    return torch.tensor(values, dtype=torch.float64)


def close(found, expected, rtol=1e-9, atol=1e-14):
    expected = expected.double() if isinstance(expected, torch.Tensor) else f64(expected)
    torch.testing.assert_close(found.detach().double(), expected, rtol=rtol, atol=atol)


def leaf(values, dtype=torch.float64):
    return torch.as_tensor(values, dtype=dtype).detach().clone().requires_grad_()


def grad(loss, *inputs):
    return torch.autograd.grad(loss.sum(), inputs)


def margin_for(constraint, case):
    return case["beta"] if constraint == "boundary" else None


def two_levels(n_pos, n_neg):
    return better_than(torch.tensor([[1.0] * n_pos + [0.0] * n_neg]))


# -------------------------------------------------- golden data


@every_form
@pytest.mark.parametrize("case", cases("aft_binary"))
def test_binary_form_equals_the_golden_data(case, form, constraint):
    pos, neg, expected = case["pos_scores"], case["neg_scores"], case[form]
    scores, better = leaf([pos + neg]), two_levels(len(pos), len(neg))
    loss = aft_loss(scores, better, constraint=constraint, margin=margin_for(constraint, case))
    close(loss, [expected["loss"]])
    close(grad(loss, scores)[0], [expected["grad_pos"] + expected["grad_neg"]], atol=1e-15)
    single = leaf([pos + neg], torch.float32)
    loss = aft_loss(single, better, constraint=constraint, margin=margin_for(constraint, case))
    close(loss, [expected["loss"]], rtol=1e-5, atol=1e-5)
    close(grad(loss, single)[0], [expected["grad_pos"] + expected["grad_neg"]], rtol=1e-5, atol=1e-5)


@every_form
@pytest.mark.parametrize("case", cases("aft_ranking"))
def test_ranking_form_equals_the_golden_data(case, form, constraint):
    scores, better = leaf([case["scores"]]), better_than(f64([case["quality"]]))
    assert better.sum() == case["n_pairs"]
    loss = aft_loss(scores, better, constraint=constraint, margin=margin_for(constraint, case))
    close(loss, [case[form]["loss"]])
    close(grad(loss, scores)[0], [case[form]["grad"]], atol=1e-15)


@every_form
@pytest.mark.parametrize("case", cases("aft_batch"))
def test_batch_of_questions_equals_the_golden_data(case, form, constraint):
    """Questions of different size in one padded batch; without a right or without a wrong one: exactly 0."""
    K = max(len(q["pos"]) + len(q["neg"]) for q in case["questions"])
    rows = [(q["pos"] + q["neg"], [1.0] * len(q["pos"]) + [0.0] * len(q["neg"])) for q in case["questions"]]
    scores = f64([s + [math.nan] * (K - len(s)) for s, _ in rows])
    rewards = f64([r + [math.nan] * (K - len(r)) for _, r in rows])
    better = better_than(rewards, ~rewards.isnan())
    loss = aft_loss(scores, better, constraint=constraint, margin=margin_for(constraint, case))
    expected = case["variants"][form]
    close(loss, expected["per_question"])
    close(loss.mean(), expected["mean_over_questions"])
    active = [bool(q["pos"] and q["neg"]) for q in case["questions"]]
    assert (loss != 0).tolist() == active


@every_form
@pytest.mark.parametrize("case", cases("aft_token"))
def test_from_token_log_probabilities_equals_the_golden_data(case, form, constraint):
    rows = case["pos_token_logps"] + case["neg_token_logps"]
    T = max(map(len, rows))
    tokens = leaf([row + [math.nan] * (T - len(row)) for row in rows])
    mask = ~tokens.isnan()
    scores = sequence_logps(tokens, mask, reduce="mean")
    close(scores, case["pos_scores"] + case["neg_scores"])
    n_pos, n_neg = len(case["pos_token_logps"]), len(case["neg_token_logps"])
    margin = margin_for(constraint, case)
    loss = aft_loss(scores[None], two_levels(n_pos, n_neg), constraint=constraint, margin=margin)
    expected = case["variants"][form]
    close(loss, [expected["alignment"]])
    slope = grad(loss, tokens)[0]
    assert (slope[~mask] == 0).all()
    by_row = expected["grad_pos_token_logps"] + expected["grad_neg_token_logps"]
    close(slope[mask], [value for row in by_row for value in row])
    reference = leaf([case["vft_reference_token_logps"]])
    sft = sft_loss(reference, torch.ones_like(reference, dtype=torch.bool))
    close(sft, case["vft_token_mean"])
    close(sft + loss[0], expected["total_with_vft_mean"])
    close(grad(sft, reference)[0][0], expected["grad_vft_token_logps_mean"])


def test_the_golden_file_is_whole():
    sets = ("aft_binary", "aft_ranking", "aft_batch", "aft_token")
    assert all(len(GOLDEN[name]) >= least for name, least in zip(sets, (8, 3, 1, 1)))


# -------------------------------------------------- by hand


def test_aft_by_hand():
    """One right response at -1, wrong ones at -1 and -1 - ln 2: sum of e^(s_n - s_p) = 1 + 1/2, loss log 2.5.

    Gradients: w = e^(s_n - s_p) / 2.5 = 0.4 and 0.2 down on the wrong ones, 0.6 up on the right one.
    Boundary with margin ln 2: B = -1 - ln 2, T = -1 - 2 ln 2; T - s_n = -2 ln 2 and -ln 2: + 1/4 + 1/2, so
    the loss is log 3.25.
    There the wrong response on the boundary feels (1/2 - 1/2) / 3.25 = 0, the other (1 - 1/4) / 3.25.
    """
    scores, better = leaf([[-1.0, -1.0, -1.0 - math.log(2)]]), two_levels(1, 2)
    plain = aft_loss(scores, better, constraint="none")
    close(plain, [math.log(2.5)])
    close(grad(plain, scores)[0], [[-0.6, 0.4, 0.2]])
    detached = aft_loss(scores, better)  # detached is the default
    close(detached, [math.log(2.5)])
    close(grad(detached, scores)[0], [[-0.6, 0.0, 0.0]])
    boundary = aft_loss(scores, better, constraint="boundary", margin=math.log(2))
    close(boundary, [math.log(3.25)])
    close(grad(boundary, scores)[0], [[-1.5 / 3.25, 0.75 / 3.25, 0.0]])


def test_boundary_pushes_down_above_it_and_up_below_it_whatever_the_right_response():
    """Two right ones, -0.4 and -0.6, margin 0.15: B = -0.75. T depends on p, or it would not vanish."""
    scores = leaf([[-0.4, -0.6, -0.70, -0.75, -0.80]])
    slope = grad(aft_loss(scores, two_levels(2, 3), constraint="boundary", margin=0.15), scores)[0][0]
    assert slope[0] < 0 and slope[1] < 0 and slope[2] > 1e-3 and abs(slope[3]) < 1e-15 and slope[4] < -1e-3


def test_boundary_never_pushes_the_worst_right_response_down():
    """With the gradient through the minimum (golden bc_full_autograd) it would, to make room below itself."""
    for case in GOLDEN["aft_binary"]:
        if case["pos_scores"] and case["neg_scores"]:
            scores = leaf([case["pos_scores"] + case["neg_scores"]])
            better = two_levels(len(case["pos_scores"]), len(case["neg_scores"]))
            slope = grad(aft_loss(scores, better, constraint="boundary", margin=case["beta"]), scores)[0]
            assert (slope[0, : len(case["pos_scores"])] <= 0).all()


def test_the_floor_of_the_boundary_loss():
    """With each wrong response on B it is log(1 + 2 N sum_p e^(B - s_p)), not 0: a flat curve is fine."""
    scores = f64([[-0.5, -0.9, -1.1, -1.1, -1.1]])  # B = -0.9 - 0.2
    floor = math.log(1 + 2 * 3 * (math.exp(-1.1 + 0.5) + math.exp(-1.1 + 0.9)))
    close(aft_loss(scores, two_levels(2, 3), constraint="boundary", margin=0.2), [floor])


# -------------------------------------------------- identities


def test_unconstrained_aft_at_two_responses_is_dpo_with_beta_1_and_no_reference():
    g = torch.Generator().manual_seed(0)
    scores = leaf(-3 * torch.rand(8, 2, generator=g, dtype=torch.float64))
    aft = aft_loss(scores, two_levels(1, 1).expand(8, 2, 2), constraint="none")
    dpo = dpo_loss(scores, torch.zeros(8, 2, dtype=torch.float64), beta=1.0)
    assert torch.equal(aft, dpo)
    assert torch.equal(grad(aft, scores)[0], grad(dpo, scores)[0])


@pytest.mark.parametrize("constraint, margin", [("none", None), ("detached", None), ("boundary", 0.2)])
def test_two_quality_levels_reduce_the_ranking_form_to_the_binary_form(constraint, margin):
    """The binary form written out with its own B and T_p, against better_than on any two reward values."""
    pos, neg = leaf([-0.3, -0.8]), leaf([-0.2, -0.9, -0.6])
    loser = neg.detach() if constraint == "detached" else neg
    total = 1 + torch.exp(loser[None, :] - pos[:, None]).sum()
    if constraint == "boundary":
        T = (2 * (pos.min() - margin) - pos).detach()
        total = total + torch.exp(T[:, None] - neg[None, :]).sum()
    expected = torch.log(total)
    scores = leaf(torch.cat([pos, neg])[None])
    better = better_than(f64([[0.7, 0.7, 0.1, 0.1, 0.1]]))
    loss = aft_loss(scores, better, constraint=constraint, margin=margin)
    close(loss[0], expected.detach())
    close(
        grad(loss, scores)[0][0],
        torch.cat(
            grad(expected, pos, neg) if constraint != "detached" else (grad(expected, pos)[0], torch.zeros(3))
        ),
    )


def test_all_pairs_share_one_logarithm():
    """One log of all pairs, not a sum of logs: a pair's pull fades while another pair is worse."""
    scores = leaf([[-1.0, -1.0, 5.0]])
    slope = grad(aft_loss(scores, two_levels(1, 2), constraint="none"), scores)[0][0]
    assert slope[1] < 0.003 and slope[2] > 0.99


# -------------------------------------------------- the recipe


def test_the_recipe_declares_the_papers_methods_and_its_claims_name_them(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe.E.models.clear(), recipe.E.reads.clear()
    recipe.E.parse([])
    recipe.declare(recipe.E)
    recipe.E.check(recipe.CLAIMS)
    models = {model.name: model for model in recipe.E.models}
    recipe.E.models.clear(), recipe.E.reads.clear()
    assert {"vft", "rft", "dpo-none", "rrhf-boundary", "pro-detached", "rank-pro-boundary"} <= models.keys()
    sizes, aligned = recipe.SIZES, [model for name, model in models.items() if name != "vft"]
    for model in aligned:  # the same grid for all arms of a method, and one rate for all
        method = model.name.split("-")[0]
        own = sizes[{"dpo": "dpo_lrs", "rrhf": "few_lrs", "pro": "few_lrs"}.get(method, "lrs")]
        one = sizes["dpo_one_rate" if method == "dpo" else "one_rate"]
        grids = {"": {own, (one,)}, "@one-rate": {(one,)}}["@one-rate" if "@" in model.name else ""]
        assert model.grid["lr"] in grids and one in own
    same = {(m.flags["init"], m.flags["epochs"], m.flags["batch_size"]) for m in aligned}
    assert len(same) == 1  # and the same work
    weights = {name: m.flags.get("sft_weight") for name, m in models.items() if "pro" in name}
    assert weights.pop("pro-paper") is None and set(weights.values()) == {1}
    main = [models[name].seeds for name in ("vft", "rft@one-rate", "aft-none", "aft-boundary@one-rate")]
    assert min(main) >= sizes["seeds"] and models["dpo-none"].seeds == sizes["few_seeds"]


def test_right_wrong_feedback_leaves_the_grades_out_and_k_keeps_the_first(tmp_path):
    responses = [Response(f"#### {i}", bool(i), reward=i / 4) for i in range(4)]
    write_jsonl(tmp_path / "graded", [samples_to_row(Samples(Problem("p", "q", "1"), responses))])
    recipe.without_grades(tmp_path / "plain", tmp_path / "graded", seed=0)
    [plain] = read_samples(tmp_path / "plain")
    assert [one.reward for one in plain.responses] == [None] * 4
    assert [one.correct for one in plain.responses] == [False, True, True, True]
    recipe.first_responses(tmp_path / "few", tmp_path / "plain", 2, seed=0)
    [few] = read_samples(tmp_path / "few")
    assert few.responses == plain.responses[:2]


def test_on_a_real_set_dpo_may_choose_the_written_solution(tmp_path):
    """Where no sample is right, right and wrong still meet: the solution among them, the window met."""
    problem = Problem("1", "What is 2 + 2?", answer="4", solution="2 + 2 = 4\n#### 4")
    wrong = Samples(problem, [Response(text, correct=False) for text in ("#### 5", "#### 3")])
    with pytest.raises(ValueError):
        pairs([wrong], window=(0.001, 0.999), seed=0)
    write_jsonl(tmp_path / "samples", [samples_to_row(wrong)])
    recipe.with_reference(tmp_path / "referenced", tmp_path / "samples", seed=0)
    found = pairs(read_samples(tmp_path / "referenced"), window=(0.001, 0.999), seed=0)
    texts = sorted([one.text for one in pair.responses] for pair in found)
    assert texts == [[problem.solution, "#### 3"], [problem.solution, "#### 5"]]


def test_the_figures_are_drawn_from_the_results_alone(tmp_path):
    cells = [
        {"name": name, "seed": 0, "settings": {}, "metrics": {}, "lists": {"accuracy": pack(bits)}}
        for name, bits in (("vft", [0, 1] * 20), ("rft", [1, 1] * 20))
    ]
    line = {"score_right": [[1, -0.3], [2, -0.2]], "score_wrong": []}  # all responses are right
    scores = {"vft": [[-0.2, -0.3], [-0.4] * 5], "aft-boundary": [[-0.1], [-0.5, -2.0]]}
    accuracy = dict.fromkeys(recipe.CONSTRAINTS, {"held_out_accuracy": [[1, 0.5], [2, 0.25]]})
    shown = {"training": dict.fromkeys(recipe.CONSTRAINTS, line), "accuracy": accuracy, "scores": scores}
    recipe.draw({"cells": cells, "extra": shown}, tmp_path / "aft")
    sizes = [file.stat().st_size for file in tmp_path.glob("aft_*.svg")]
    assert len(sizes) == 3 and min(sizes) > 2000
    assert "detached" in (tmp_path / "aft_collapse.svg").read_text()


def test_a_logs_running_means_are_short_and_leave_out_what_is_missing(tmp_path):
    values = [None if step == 2 else float(step) for step in range(1, 201)]
    write_jsonl(tmp_path / "log", [{"step": i, "score": v} for i, v in enumerate(values, 1)])
    smoothed = plots.smooth(tmp_path / "log", ["score"], window=1, points=50)["score"]
    assert plots.smooth(tmp_path / "log", ["score_wrong"]) == {"score_wrong": []}
    assert smoothed[0] == [1, 1.0] and 50 <= len(smoothed) <= 70
    assert [step for step, _ in smoothed][:3] == [1, 5, 8] and smoothed[1][1] == (4 + 5) / 2


def test_assessed_scores_are_split_by_correctness():
    found = {"scores": [[-0.1, -0.2], [-0.3]], "correct": [[True, False], [None]]}
    assert recipe.right_and_wrong(found) == [[-0.1], [-0.2]]
