"""Choosing among n responses, and DPO's log-ratio as the score to choose by."""

import json
import math
from dataclasses import replace
from functools import partial

import pytest
import torch

from minicot import verifier
from minicot.data import encode_row, truncate_words
from minicot.errors import InputError
from minicot.losses import token_logps
from minicot.metrics import assessment
from minicot.records import Problem, Response, Samples, read_samples, samples_to_row
from minicot.sets import read_problems
from minicot.tokenizer import Tokenizer
from minicot.training import resolve
from minicot.verifier import assess, best_of_n, curves, log_ratio_scores, log_ratios, rows_of, weighted_vote
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
    for weight in ("exp", "sigmoid", "raw"):  # sums of 10,000 tokens
        assert weighted_vote(["1", "2"], [1e5, -1e5], weight=weight) == "1"
    assert weighted_vote([None], [0.0]) is None


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


WAYS = ("majority", "best", "best repeated", "vote", "sigmoid vote", "raw vote", "pass")


def test_curves_use_every_sample_at_every_n():
    right = curves([pool(["1", "2", "2", "1"], [0.0, 1.0, 0.0, 9.0])], "dpo", beta=1.0, sizes=(1, 2, 4))
    assert right[1] == {way: [0.5] for way in WAYS}
    assert right[2]["best"] == [0.5] and right[2]["pass"] == [1.0]  # blocks (1, 2) and (2, 1)
    assert right[2]["majority"] == [0.5]  # a tie goes to the first
    assert right[4]["best"] == [1.0] and right[4]["vote"] == [1.0] and right[4]["majority"] == [1.0]
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


def some_samples(n=2):
    sampled = []
    for problem in read_problems("toy", "train", limit=n):
        responses = [
            Response(problem.solution, True, answer=problem.answer),
            Response("Tom has 3.\n#### 3", False, answer="3"),
            Response("Tom has", False, finish="length"),
        ]
        sampled.append(Samples(problem, responses))
    return sampled


def token_log_ratios(model, ref, tokenizer, samples, *, batch_size=64):
    """One question's Samples -> for each response (its scored ids, log pi - log pi_ref of each of them)."""
    rows = rows_of(tokenizer, samples, "cot")
    ratios = log_ratios(model, ref, tokenizer, [rows], reader=None, batch_size=batch_size)
    return [(row.ids[row.n_prompt :], values.tolist()) for row, values in zip(rows, ratios)]


def test_token_scores_of_other_tokens_are_not_mixed(models):
    """The cut response's tokens are fewer: the whole one's numbers would stand beside the wrong ones."""
    _, model, ref, tokenizer = models
    score = partial(log_ratio_scores, model, ref, tokenizer, mode="cot")
    whole = list(score(some_samples(1), name="dpo", tokens=True))
    again = next(score(whole, name="other", tokens=True))
    assert all(len(r.tokens) == len(one) for r in again.responses for one in r.token_scores.values())
    with pytest.raises(InputError, match="problem '.*': its token_scores are of other tokens"):
        next(score(whole, name="dpo-cut", words=2, tokens=True))


def test_the_score_is_the_summed_log_ratio_of_the_response(models):
    _, model, ref, tokenizer = models
    [scored] = log_ratio_scores(model, ref, tokenizer, some_samples(1), name="dpo", mode="cot")
    for response in scored.responses:
        row = encode_row(tokenizer, scored.problem, response.text, mode="cot", finish=response.finish)
        ids = torch.tensor([row.ids])
        by_hand = [token_logps(one(ids), ids)[0, row.n_prompt :].sum().item() for one in (model, ref)]
        assert response.scores["dpo"] == pytest.approx(by_hand[0] - by_hand[1], abs=1e-4)
    tokens = token_log_ratios(model, ref, tokenizer, some_samples(1)[0])
    sums = [sum(ratios) for _, ratios in tokens]
    assert sums == pytest.approx([r.scores["dpo"] for r in scored.responses], abs=1e-4)
    assert tokens[0][0][-1] == tokenizer.eos_id and tokens[2][0][-1] != tokenizer.eos_id


def test_cut_scores_are_of_the_first_words_without_eos(models):
    _, model, ref, tokenizer = models
    for words in (3, 90):
        [scored] = log_ratio_scores(
            model, ref, tokenizer, some_samples(1), name="cut", mode="cot", words=words
        )
        short = truncate_words(some_samples(1), words)[0]
        tokens = token_log_ratios(model, ref, tokenizer, short)
        assert [r.scores["cut"] for r in scored.responses] == pytest.approx(
            [sum(ratios) for _, ratios in tokens], abs=1e-4
        )
        assert all(ids[-1] != tokenizer.eos_id for ids, _ in tokens)
        assert [replace(r, scores=None) for r in scored.responses] == some_samples(1)[
            0
        ].responses  # kept whole


def test_a_model_against_itself_scores_zero(models):
    _, model, _, tokenizer = models
    [scored, _] = log_ratio_scores(model, model, tokenizer, some_samples(), name="dpo", mode="cot")
    assert [r.scores["dpo"] for r in scored.responses] == [0.0] * 3


def test_sample_adds_the_scores_and_shows_the_curves(models, tmp_path):
    folder = models[0]
    (tmp_path / "pool.jsonl").write_text(
        "".join(json.dumps(samples_to_row(samples)) + "\n" for samples in some_samples())
    )
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


# ---- parts of a bounded size ---------------------------------------------------------------------


def many(n):
    """A question with n distinct responses, then two more questions."""
    first, *others = some_samples(3)
    responses = [Response(f"Tom has {k}.\n#### {k}", k == 3) for k in range(n)]
    return [replace(first, responses=responses), *others]


@pytest.mark.parametrize("batch_size", [1, 2, 4, 7, 64])
def test_scores_do_not_depend_on_the_cut_and_no_batch_is_larger(models, batch_size, monkeypatch):
    _, model, ref, tokenizer = models
    expected = [
        r.scores["dpo"]
        for samples in many(9)  # each response by itself
        for response in samples.responses
        for one in log_ratio_scores(
            model, ref, tokenizer, [replace(samples, responses=[response])], name="dpo", mode="cot"
        )
        for r in one.responses
    ]
    sizes, plain = [], verifier.score
    monkeypatch.setattr(
        verifier, "score", lambda model, batch: (sizes.append(batch.ids.shape[0]), plain(model, batch))[1]
    )
    options = dict(name="dpo", mode="cot", batch_size=batch_size)
    scored = list(log_ratio_scores(model, ref, tokenizer, many(9), **options))
    assert max(sizes) == min(batch_size, 15)  # 9 + 3 + 3 responses
    assert len(sizes) / 2 <= {1: 15, 2: 9, 4: 5, 7: 3, 64: 1}[batch_size]
    assert [len(samples.responses) for samples in scored] == [9, 3, 3]
    ours = [r.scores["dpo"] for samples in scored for r in samples.responses]
    assert ours == pytest.approx(expected, abs=1e-4) and len(set(ours)) == 15
    tokens = token_log_ratios(model, ref, tokenizer, many(9)[0], batch_size=batch_size)
    assert [sum(ratios) for _, ratios in tokens] == pytest.approx(expected[:9], abs=1e-4)
    judged = [assess(model, tokenizer, many(9), mode="cot", batch_size=size) for size in (batch_size, 64)]
    assert max(sizes) <= 64 and judged[0]["tokens"] == judged[1]["tokens"]
    for ours, expected in zip(judged[0]["scores"], judged[1]["scores"]):
        assert ours == pytest.approx(expected, abs=1e-5)
    assert judged[0]["reference_nlls"] == pytest.approx(judged[1]["reference_nlls"], abs=1e-5)


def test_the_parts_of_a_question_share_its_prompt():
    parts = list(verifier.in_parts([[1, 2, 3, 4, 5], [6], [], [7, 8]], 2))
    assert parts == [[[1, 2]], [[3, 4]], [[5], [6]], [[7, 8]]]


def test_sample_hands_its_batch_size_to_the_verifier(models, tmp_path, monkeypatch):
    sizes, plain = [], verifier.score
    monkeypatch.setattr(
        verifier, "score", lambda model, batch: (sizes.append(batch.ids.shape[0]), plain(model, batch))[1]
    )
    write(tmp_path / "pool.jsonl", many(9))
    words = ["--samples", "pool.jsonl", "--batch-size", 4]
    for flags in (
        ["--verifier", models[0], "--ref", "toy", "--out", "s.jsonl"],
        ["--assess", "--model", "toy"],
    ):
        out = [] if "--out" in flags else ["--out", "a.json"]
        done = script("sample.py", *flags, *words, *out, cwd=tmp_path)
        assert done.returncode == 0 and max(sizes) == 4, (done.stderr, sizes)


def write(path, sampled):
    path.write_text("".join(json.dumps(samples_to_row(samples)) + "\n" for samples in sampled))


def test_what_cannot_be_scored_is_named(models):
    _, model, ref, tokenizer = models
    broken = load_model(models[0])
    with torch.no_grad():
        broken.model.norm.weight.fill_(torch.nan)
    with pytest.raises(InputError, match="'toy-0-3-0': log-probabilities are not finite"):
        list(log_ratio_scores(broken, ref, tokenizer, some_samples(1), name="dpo", mode="cot"))
    seen = [replace(s, problem=replace(s.problem, image="toy:x")) for s in some_samples(1)]
    with pytest.raises(InputError, match="has a picture, but the model reads text only"):
        list(log_ratio_scores(model, ref, tokenizer, seen, name="dpo", mode="cot"))


# ---- a model's own scores ------------------------------------------------------------------------


def test_assessment_by_hand(models):
    """A model that gives every token the probability 1/V: all scores are -log V, nothing is in order."""
    _, _, _, tokenizer = models
    flat = load_model(models[0])
    with torch.no_grad():
        flat.model.embed_tokens.weight.zero_()
        flat.lm_head is None or flat.lm_head.weight.zero_()
    judged = assess(flat, tokenizer, some_samples(2), mode="cot")
    log_v = math.log(flat.config.vocab_size)
    assert [len(row) for row in judged["scores"]] == [3, 3]
    assert all(score == pytest.approx(-log_v, abs=1e-5) for row in judged["scores"] for score in row)
    assert judged["correct"] == [[True, False, False]] * 2 and judged["rewards"] == [[1.0, 0.0, 0.0]] * 2
    numbers = assessment(judged | {"scores": [[-log_v] * 3] * 2})
    assert numbers["pairs"] == 4 and numbers["assessment_accuracy"] == 0.0
    assert numbers["rerank_accuracy"] == pytest.approx(1 / 3)  # of equals each counts in proportion
    assert numbers["perplexity_right"] == pytest.approx(flat.config.vocab_size)
    assert numbers["reference_nll"] == pytest.approx(log_v, abs=1e-4)


def by_plain_forwards(model, tokenizer, sampled, reference):
    """The numbers of `assess` and `assessment`, response by response, each a forward of its own."""

    def logps(problem, response):
        row = encode_row(tokenizer, problem, response.text, mode="cot", finish=response.finish)
        ids = torch.tensor([row.ids])
        with torch.no_grad():
            return token_logps(model(ids), ids)[0, row.n_prompt :].tolist()

    mean = lambda values: sum(values) / len(values)
    ordered, reranked, of, nlls = [], [], {True: [], False: []}, []
    for samples in sampled:
        solution = Response(samples.problem.solution, True)
        texts = {}
        for response in [solution] * reference + samples.responses:
            texts.setdefault(response.text, (response.correct, logps(samples.problem, response)))
        right = [mean(values) for correct, values in texts.values() if correct]
        wrong = [mean(values) for correct, values in texts.values() if not correct]
        ordered.append([sum(r > w for r in right for w in wrong), len(right) * len(wrong)])
        reranked.append(max([-math.inf, *right]) > max([-math.inf, *wrong]))
        for correct, values in texts.values():
            of[correct] += values
        nlls.append(-mean(logps(samples.problem, solution)))
    return {
        "assessment_accuracy": sum(r for r, _ in ordered) / sum(n for _, n in ordered),
        "share_with_pair": mean([n > 0 for _, n in ordered]),
        "rerank_accuracy": mean(reranked),
        "perplexity_right": math.exp(-mean(of[True])),
        "perplexity_wrong": math.exp(-mean(of[False])),
        "reference_nll": mean(nlls),
        "ordered_pairs": ordered,
    }, nlls


@pytest.mark.parametrize("reference", [False, True])
def test_assessment_is_that_of_plain_forwards(models, reference):
    """With repeated responses, a problem without a right and one without a wrong response."""
    _, model, _, tokenizer = models
    sampled = some_samples(7)
    for i in range(1, 4):  # some responses that the model may like better
        steps = sampled[i].problem.solution.split("\n")
        extra = [Response("\n".join(steps[:-1] + ["#### 1"]), False), sampled[i].responses[1]]
        sampled[i] = replace(sampled[i], responses=sampled[i].responses + extra)
    sampled[4] = replace(sampled[4], responses=sampled[4].responses[1:])
    sampled[5] = replace(sampled[5], responses=sampled[5].responses[:1])
    judged = assess(model, tokenizer, sampled, mode="cot", reference=reference, batch_size=4)
    numbers, (expected, nlls) = assessment(judged), by_plain_forwards(model, tokenizer, sampled, reference)
    assert numbers["ordered_pairs"] == expected.pop("ordered_pairs")
    assert {name: numbers[name] for name in expected} == pytest.approx(expected, rel=1e-4)
    assert judged["reference_nlls"] == pytest.approx(nlls, rel=1e-4)
    assert judged["problem_ids"] == judged["solution_ids"] == [s.problem.id for s in sampled]
    assert judged["left_out"]["duplicates"] == 3 + (6 if reference else 0)
    assert numbers["low"] <= numbers["assessment_accuracy"] <= numbers["high"]


def test_sample_assesses_a_model(models, tmp_path):
    sampled = some_samples(4)
    sampled[3] = replace(sampled[3], problem=replace(sampled[3].problem, solution=None))
    write(tmp_path / "pool.jsonl", sampled)
    words = ["sample.py", "--assess", "--model", models[0], "--samples", "pool.jsonl", "--out", "a/b.json"]
    done = script(*words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "a" / "b.json").read_text())
    metrics, judged = results["metrics"], assess(models[1], models[3], sampled, mode="cot")
    assert f"A-accuracy {metrics['assessment_accuracy']:.1%} [" in done.stdout
    assert (
        f"of {metrics['pairs']:,} pairs on 4 problems; reference NLL {metrics['reference_nll']:.3f}"
        in done.stdout
    )
    numbers = assessment(results)
    assert numbers.pop("ordered_pairs") == results["ordered_pairs"] and numbers == pytest.approx(metrics)
    assert results["scores"][0] == pytest.approx(judged["scores"][0], abs=1e-5)
    assert len(results["problem_ids"]) == 4 and len(results["reference_nlls"]) == 3
    assert results["model"] == str(models[0]) and results["command"].startswith("python sample.py")

    assert_one_line_error(script(*words, cwd=tmp_path), "--out", "a new file, or --overwrite")
    done = script(*words, "--overwrite", "--limit", 2, "--reference", cwd=tmp_path)
    results = json.loads((tmp_path / "a" / "b.json").read_text())
    assert len(results["problem_ids"]) == 2, done.stderr
    write(tmp_path / "wrong.jsonl", [replace(s, responses=s.responses[1:]) for s in sampled[3:]])
    words[words.index("pool.jsonl")] = "wrong.jsonl"
    done = script(*words, "--overwrite", cwd=tmp_path)
    assert "no pair of a better and a worse response on 1 problems; reference NLL no solution" in done.stdout
    assert_one_line_error(script(*words, "--overwrite", "--reference", cwd=tmp_path), "no solution")
    assert_one_line_error(script("sample.py", "--reference", cwd=tmp_path), "--reference", "--assess")
    assert_one_line_error(script(*words, "--verifier", "toy", cwd=tmp_path), "--assess", "--verifier")
    assert_one_line_error(
        script("sample.py", "--assess", "--out", "x", cwd=tmp_path), "--samples", "--assess"
    )
