"""Choosing among n responses, and DPO's log-ratio as the score to choose by."""

import json
import math
from dataclasses import replace

import pytest
import torch

from minicot.data import encode_row
from minicot.records import Problem, Response, Samples, read_samples, samples_to_row
from minicot.sets import read_problems
from minicot.data import truncate_words
from minicot.losses import token_logps
from minicot.tokenizer import Tokenizer
from minicot.training import resolve
from minicot.verifier import best_of_n, curves, log_ratio_scores, token_log_ratios, weighted_vote
from minicot.weights import load_model, save_model
from tests.helpers import assert_one_line_error, script


def test_best_of_n_takes_the_answer_of_the_highest_score():
    assert best_of_n(["1", "2", "3"], [0.1, 0.5, 0.2]) == "2"
    assert best_of_n(["1", None], [-5.0, 9.0]) == "1" and best_of_n([None], [0.0]) is None
    assert best_of_n(["1", "2"], [0.5, 0.5]) == "1"


def test_a_weighted_vote_sums_the_weights_of_equal_answers():
    answers, scores = ["7", "7.0", "9", None], [0.0, 0.0, 5.0, 99.0]
    assert weighted_vote(answers, scores, beta=0.1) == "7"  # 2 against exp(0.5) = 1.65
    assert weighted_vote(answers, scores, beta=0.2) == "9"  # 2 against exp(1) = 2.72
    assert weighted_vote(answers, scores, beta=0.2, weight="sigmoid") == "7"  # 1 against 0.73
    assert weighted_vote(["1", "2", "2"], [0.0] * 3) == "2"  # equal scores: majority
    assert weighted_vote(["1", "2", "2"], [1.0, 0.6, 0.6], weight="raw") == "2"  # 1 against 1.2
    assert weighted_vote(["1", "2", "2"], [-1.0, -0.6, -0.6], weight="raw") == "1"  # a second vote can cost
    assert weighted_vote(["1", "2"], [1e5, -1e5]) == "1" and weighted_vote([None], [0.0]) is None


def test_scores_and_weights_that_mean_nothing_are_refused():
    with pytest.raises(ValueError, match="allowed: finite"):
        weighted_vote(["1"], [math.nan])
    with pytest.raises(ValueError, match="'cube'; allowed: exp, sigmoid, raw"):
        weighted_vote(["1"], [0.0], weight="cube")


def pool(answers, scores, gold="1"):
    responses = [
        Response(a or "", correct=a == gold, answer=a, scores={"dpo": s}) for a, s in zip(answers, scores)
    ]
    return Samples(Problem("p", "q", answer=gold), responses)


WAYS = ("majority", "best", "vote", "sigmoid vote", "raw vote", "pass")


def test_curves_use_every_sample_at_every_n():
    found = curves([pool(["1", "2", "2", "1"], [0.0, 1.0, 0.0, 9.0])], "dpo", beta=1.0, sizes=(1, 2, 4))
    assert found[1] == {way: [0.5] for way in WAYS}
    assert found[2]["best"] == [0.5] and found[2]["pass"] == [1.0]  # blocks (1, 2) and (2, 1)
    assert found[2]["majority"] == [0.5]  # a tie goes to the first
    assert found[4]["best"] == [1.0] and found[4]["vote"] == [1.0] and found[4]["majority"] == [1.0]
    with pytest.raises(ValueError, match="has 4 responses; allowed: at least 8"):
        curves([pool(["1"] * 4, [0.0] * 4)], "dpo", sizes=(8,))


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """The toy base as reference, and a model a little off it as the verifier."""
    folder, tokenizer = tmp_path_factory.mktemp("verifier"), Tokenizer(resolve("toy"))
    model = load_model(resolve("toy"), dtype=torch.float32)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    save_model(model, folder)
    tokenizer.save(folder)
    return folder, load_model(folder), load_model(resolve("toy"), dtype=torch.float32), tokenizer


def groups(n=2):
    found = []
    for problem in read_problems("toy", "train", limit=n):
        responses = [
            Response(problem.solution, True, answer=problem.answer),
            Response("Tom has 3.\n#### 3", False, answer="3"),
            Response("Tom has", False, finish="length"),
        ]
        found.append(Samples(problem, responses))
    return found


def test_the_score_is_the_summed_log_ratio_of_the_response(models):
    _, model, ref, tokenizer = models
    [scored] = log_ratio_scores(model, ref, tokenizer, groups(1), name="dpo", mode="cot")
    for response in scored.responses:
        row = encode_row(tokenizer, scored.problem, response.text, mode="cot", finish=response.finish)
        ids = torch.tensor([row.ids])
        by_hand = [token_logps(one(ids), ids)[0, row.n_prompt :].sum().item() for one in (model, ref)]
        assert response.scores["dpo"] == pytest.approx(by_hand[0] - by_hand[1], abs=1e-4)
    tokens = token_log_ratios(model, ref, tokenizer, groups(1)[0], mode="cot")
    sums = [sum(ratios) for _, ratios in tokens]
    assert sums == pytest.approx([r.scores["dpo"] for r in scored.responses], abs=1e-4)
    assert tokens[0][0][-1] == tokenizer.eos_id and tokens[2][0][-1] != tokenizer.eos_id


def test_cut_scores_are_of_the_first_words_without_eos(models):
    _, model, ref, tokenizer = models
    for words in (3, 90):
        [scored] = log_ratio_scores(model, ref, tokenizer, groups(1), name="cut", mode="cot", words=words)
        short = truncate_words(groups(1), words)[0]
        tokens = token_log_ratios(model, ref, tokenizer, short, mode="cot")
        assert [r.scores["cut"] for r in scored.responses] == pytest.approx(
            [sum(ratios) for _, ratios in tokens], abs=1e-4
        )
        assert all(ids[-1] != tokenizer.eos_id for ids, _ in tokens)
        assert [replace(r, scores=None) for r in scored.responses] == groups(1)[0].responses  # kept whole


def test_a_model_against_itself_scores_zero(models):
    _, model, _, tokenizer = models
    [scored, _] = log_ratio_scores(model, model, tokenizer, groups(), name="dpo", mode="cot")
    assert [r.scores["dpo"] for r in scored.responses] == [0.0] * 3


def test_sample_adds_the_scores_and_shows_the_curves(models, tmp_path):
    folder = models[0]
    (tmp_path / "pool.jsonl").write_text("".join(json.dumps(samples_to_row(g)) + "\n" for g in groups()))
    words = [
        "sample.py",
        "--verifier",
        folder,
        "--ref",
        "toy",
        "--samples",
        "pool.jsonl",
        "--out",
        "scored.jsonl",
    ]
    done = script(*words, cwd=tmp_path)
    assert done.returncode == 0 and "n = 2: majority" in done.stdout, done.stderr
    scored = read_samples(tmp_path / "scored.jsonl")
    assert all(len(r.scores) == 1 for samples in scored for r in samples.responses)
    assert_one_line_error(script(*words, cwd=tmp_path), "--out", "scored.jsonl")
    again = ["--samples", "scored.jsonl", "--truncate-words", 3, "--out", "both.jsonl"]
    done = script(*words[:5], *again, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    alone = script("sample.py", "--model", folder, "--truncate-words", 3, "Hi?", cwd=tmp_path)
    assert_one_line_error(alone, "--truncate-words", "--verifier")
    both = [r.scores for samples in read_samples(tmp_path / "both.jsonl") for r in samples.responses]
    assert all(set(one) == {"dpo", "dpo-cut"} for one in both)
    assert any(one["dpo"] != one["dpo-cut"] for one in both)
    assert_one_line_error(script(*words[:3], "--out", "x.jsonl", cwd=tmp_path), "--samples")
