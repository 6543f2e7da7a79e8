"""align.py: every method runs and logs, a new loss needs no new loop, bad groups are refused or counted."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import align
from minicot import evaluation
from minicot.data import Row, collate, make_groups
from minicot.losses import aft_loss
from minicot.records import Problem, Response, Samples, samples_to_row
from minicot.rollouts import Micro
from minicot.sets import read_problems
from minicot.model import Transformer
from minicot.sampling import sample_groups
from minicot.tokenizer import Tokenizer
from minicot.training import resolve
from minicot.weights import load_model, save_model
from tests.helpers import assert_one_line_error, script

BASE, ROOT = resolve("toy"), Path(__file__).parent.parent


def small_policy(folder, layers=1, seed=0):
    """A small random model with the toy tokenizer, in a folder."""
    folder.mkdir(exist_ok=True)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        (folder / name).write_bytes((BASE / name).read_bytes())
    small = dict(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=8,
    )
    save_model(
        Transformer(
            dataclasses.replace(load_model(BASE / "config.json").config, **small),
            torch.Generator().manual_seed(seed),
        ),
        folder,
    )
    return folder


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    return small_policy(tmp_path_factory.mktemp("policy"))


def groups(marks):
    """Toy problems with one response for each mark: right where it is 1."""
    found = []
    for problem, row in zip(read_problems("toy", "train", limit=len(marks)), marks):
        responses = [
            Response(f"{i}\n#### {problem.answer if mark else 1000 + i}", bool(mark))
            for i, mark in enumerate(row)
        ]
        found.append(Samples(problem, responses))
    return found


def write(path, samples):
    path.write_text("".join(json.dumps(samples_to_row(s)) + "\n" for s in samples))
    return path


@pytest.fixture
def samples(tmp_path):
    return write(
        tmp_path / "samples.jsonl", groups([[1, 0, 0, 1], [1, 0], [0, 1, 0], [1, 1, 0], [0, 0], [1, 1]])
    )


def run_align(policy, samples, *argv, cwd):
    common = ["--init", policy, "--samples", samples, "--device", "cpu", "--steps", 3, "--batch-size", 2]
    return script("align.py", *common, "--out", "out", *argv, cwd=cwd)


def lines(tmp_path, out="out"):
    return [json.loads(line) for line in (tmp_path / out / "metrics.jsonl").read_text().splitlines()]


CELLS = [("rft", "none")] + [
    (m, c) for m in ("dpo", "rrhf", "pro", "aft") for c in ("none", "detached", "boundary")
]


@pytest.mark.parametrize("method, constraint", CELLS + [("ipo", "none")])
def test_every_method_trains_and_logs(policy, samples, tmp_path, method, constraint):
    margin = ["--margin", 0.1] if constraint == "boundary" else []
    done = run_align(policy, samples, "--method", method, "--constraint", constraint, *margin, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    log = lines(tmp_path)
    assert [line["step"] for line in log] == [1, 2, 3]
    expected = {"loss", "score_right", "score_wrong", "margin", "ranking_accuracy", "grad_norm"}
    assert all(expected <= line.keys() for line in log)
    before, after = load_file(policy / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    assert before.keys() == after.keys() and any(not torch.equal(before[k], after[k]) for k in before)


def test_dpo_starts_at_ln_2_because_policy_and_reference_agree(policy, samples, tmp_path):
    run_align(policy, samples, "--method", "dpo", "--constraint", "none", cwd=tmp_path)
    assert lines(tmp_path)[0]["loss"] == pytest.approx(0.693147, abs=1e-5)


def test_accumulation_gives_the_big_batch(policy, samples, tmp_path):
    for method in ("aft", "pro", "rft"):
        c = ["--constraint", "none" if method == "rft" else "detached"]
        for out, accumulate in (("one", 1), ("two", 2)):
            argv = ["--method", method, *c, "--accumulate", accumulate, "--overwrite", "--out", out]
            assert run_align(policy, samples, *argv, cwd=tmp_path).returncode == 0
        losses = [[line["loss"] for line in lines(tmp_path, out)] for out in ("one", "two")]
        assert losses[0] == pytest.approx(losses[1], rel=1e-5), method


def test_a_stopped_and_resumed_run_ends_with_the_same_bits(policy, samples, tmp_path):
    assert run_align(policy, samples, cwd=tmp_path).returncode == 0
    assert run_align(policy, samples, "--out", "halves", "--stop-at", 2, cwd=tmp_path).returncode == 0
    assert run_align(policy, samples, "--out", "halves", "--resume", cwd=tmp_path).returncode == 0
    one, two = (load_file(tmp_path / out / "model.safetensors") for out in ("out", "halves"))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_a_loss_may_look_at_tokens(policy, samples, tmp_path, monkeypatch):
    """The table's tokens and the mask of its batch give the table's sums and means again."""
    tables = []

    def look(g, c, k):
        tables.append(g)
        return aft_loss(g.scores, g.better, **k)

    row = dataclasses.replace(align.METHODS["aft"], loss=look)
    monkeypatch.setitem(align.METHODS, "aft", row)
    assert run_align(policy, samples, cwd=tmp_path).returncode == 0
    for g in tables:
        assert g.token_logps.shape == g.batch.loss_mask.shape == g.batch.ids.shape
        sums = (g.token_logps * g.batch.loss_mask).sum(1)
        torch.testing.assert_close(sums, g.logps[g.batch.group, g.batch.slot])
        torch.testing.assert_close(sums / g.batch.loss_mask.sum(1), g.scores[g.batch.group, g.batch.slot])


def test_sft_rows_are_the_reference_the_best_or_the_right_ones(policy, tmp_path):
    rows, _ = make_groups(Tokenizer(policy), groups([[0, 1, 1]]), mode="cot", max_length=256, reference=True)
    batch = collate(rows, 0)
    assert align.sft_rows(batch, "reference").tolist() == [True, False, False, False]
    assert align.sft_rows(batch, "right").tolist() == [True, False, True, True]
    assert align.sft_rows(batch, "best").tolist() == [True, False, False, False]
    assert not align.sft_rows(batch, None).any()
    micro, logps = Micro(batch), torch.zeros(batch.ids.shape)
    ranked = [align.tabulate(logps, micro, 1.0, keep) for keep in (True, False)]
    assert ranked[0].present.all() and ranked[0].better.sum() == 3
    assert ranked[1].present.tolist() == [[False, True, True, True]] and ranked[1].better.sum() == 2


def test_the_reference_cache_is_reused_and_refused_for_other_weights(policy, samples, tmp_path):
    argv = ["--method", "dpo", "--ref-logps", tmp_path / "ref.safetensors"]
    assert run_align(policy, samples, *argv, cwd=tmp_path).returncode == 0
    first, kept = lines(tmp_path), (tmp_path / "ref.safetensors").read_bytes()
    assert run_align(policy, samples, *argv, "--overwrite", cwd=tmp_path).returncode == 0
    assert (tmp_path / "ref.safetensors").read_bytes() == kept
    assert [line["loss"] for line in lines(tmp_path)] == [line["loss"] for line in first]
    for other in (["--ref", BASE], ["--dtype", "bfloat16"]):
        done = run_align(policy, samples, *argv, "--overwrite", *other, cwd=tmp_path)
        assert_one_line_error(done, "other weights, data or tokenizer, or of another --dtype")
        assert (tmp_path / "ref.safetensors").read_bytes() == kept


def test_dpo_and_ipo_log_the_pairs_by_what_they_rank(policy, samples, tmp_path):
    """beta (log pi - log pi_ref): all 0 at the first step, whatever the scores are; then the pairs part."""
    for method in ("dpo", "ipo"):
        argv = ["--method", method, "--lr", "1e-2", "--pair-low", 0, "--pair-high", 1, "--out", method]
        assert run_align(policy, samples, *argv, cwd=tmp_path).returncode == 0
        log = lines(tmp_path, method)
        assert abs(log[0]["margin"]) < 1e-5 and log[0]["score_right"] != log[0]["score_wrong"]
        assert log[-1]["margin"] > 1e-3 and log[-1]["ranking_accuracy"] > 0.5
    batch = collate([[Row("1", [1, 2, 3], 1, 1.0, True), Row("1", [1, 4], 1, 0.0, False)]], 0)
    micro = Micro(batch, ref_logps=torch.tensor([-5.0, -1.0]))
    table = align.tabulate(torch.full((2, 3), -2.0), micro, 1.5, True)
    # log pi: -4 and -2; log-ratios: 1 and -1
    assert align.watch([table], align.METHODS["dpo"], 0.1)["margin"] == pytest.approx(0.1 * 2)
    by_scores = align.watch([table], align.METHODS["aft"], 0.1)
    assert by_scores["margin"] == 0 and by_scores["score_right"] == -2


def test_trl_pairs_are_aligned_without_a_grade(policy, tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text('{"prompt": "How many?", "chosen": "It is 3.", "rejected": "It is 4."}\n' * 1)
    done = run_align(policy, path, "--method", "dpo", "--constraint", "none", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert lines(tmp_path)[-1]["margin"] is not None


@pytest.mark.parametrize(
    "argv, parts",
    [
        (["--constraint", "boundary"], ["--margin", "None"]),
        (["--constraint", "boundary", "--margin", "-1"], ["--margin", "-1"]),
        (["--margin", "0.1"], ["--margin"]),
        (["--method", "rft", "--constraint", "detached"], ["--constraint"]),
        (["--method", "ppo"], ["--method", "ppo"]),
        (["--beta", "0"], ["--beta"]),
        (["--samples", "nowhere.jsonl"], ["nowhere.jsonl"]),
        (["--init", "nowhere"], ["nowhere"]),
        (["--method", "dpo", "--constraint", "detached", "--label-smoothing", "0.1"], ["--label-smoothing"]),
        (["--method", "dpo", "--label-smoothing", "1"], ["--label-smoothing is 1.0", "below 1"]),
        (["--method", "dpo", "--sft-weight", "1"], ["--sft-weight is 1.0", "dpo has no SFT term"]),
        (["--method", "ipo", "--constraint", "detached"], ["--constraint", "none, for ipo"]),
        (["--no-reference"], ["--reference", "--sft-weight 0"]),
    ],
)
def test_bad_input_ends_in_one_line(policy, samples, tmp_path, argv, parts):
    assert_one_line_error(run_align(policy, samples, *argv, cwd=tmp_path), *parts)


def test_groups_that_cannot_be_used_are_counted_or_refused(policy, tmp_path):
    path = write(tmp_path / "s.jsonl", groups([[1, 1], [0, 0], [1], [0, 1]]))
    done = run_align(policy, path, cwd=tmp_path)
    assert (
        done.returncode == 0 and "'without a pair': 2" in done.stdout
    )  # the reference makes a pair of [0, 0]
    path = write(tmp_path / "none.jsonl", groups([[1, 1], [1]]))
    assert_one_line_error(
        run_align(policy, path, "--method", "dpo", "--overwrite", cwd=tmp_path), "no right x wrong pair"
    )


def test_aft_without_its_sft_term_needs_no_written_solution(policy, tmp_path):
    bare = [
        dataclasses.replace(one, problem=dataclasses.replace(one.problem, solution=None))
        for one in groups([[1, 0], [0, 1]])
    ]
    path = write(tmp_path / "s.jsonl", bare)
    done = run_align(policy, path, "--no-reference", "--sft-weight", 0, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert lines(tmp_path)[0]["ranking_accuracy"] is not None
    assert_one_line_error(run_align(policy, path, "--sft-weight", 0, "--overwrite", cwd=tmp_path), "solution")


def test_samples_of_another_tokenizer_are_refused(policy, tmp_path):
    problem = Problem("1", "How many?", "3", solution="#### 3")
    path = write(tmp_path / "s.jsonl", [Samples(problem, [Response("#### 4", False, ids=[400, 401, 402])])])
    assert_one_line_error(run_align(policy, path, cwd=tmp_path), "another tokenizer")


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_checkpoint(policy, samples, tmp_path):
    argv = ["--lr", "1e30", "--clip", 0, "--warmup", 0, "--save-every", 1]
    done = run_align(policy, samples, *argv, cwd=tmp_path)
    assert_one_line_error(done, "step ", "problems toy-")
    assert (
        list((tmp_path / "out").glob("checkpoint-*"))
        and not (tmp_path / "out" / "model.safetensors").exists()
    )


def test_a_pair_that_lost_a_member_is_counted_not_trained(policy, tmp_path):
    rows = [{"prompt": "How many?", "chosen": "It is 3.", "rejected": "It is 4."}] * 3
    rows[1] = {**rows[1], "chosen": "   "}
    rows[2] = {**rows[2], "chosen": "It is 4."}
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = run_align(policy, path, "--method", "dpo", cwd=tmp_path)
    assert (
        done.returncode == 0 and "1 groups, 2 responses" in done.stdout and "'broken pairs': 2" in done.stdout
    )
    path.write_text(json.dumps(rows[1]) + "\n")
    done = run_align(policy, path, "--method", "dpo", "--out", "b", cwd=tmp_path)
    assert_one_line_error(done, "samples that dpo can use")


def test_the_papers_constraints_are_the_defaults(policy, samples, tmp_path):
    for method, constraint in (("aft", "detached"), ("dpo", "none"), ("rrhf", "none"), ("rft", "none")):
        done = run_align(policy, samples, "--method", method, "--out", method, cwd=tmp_path)
        assert f"{method}, constraint {constraint}:" in done.stdout, done.stderr


def test_what_overwrite_would_replace_is_never_an_input(policy, samples, tmp_path):
    assert run_align(policy, samples, cwd=tmp_path).returncode == 0
    kept = tmp_path / "out" / "samples.jsonl"
    kept.write_text(samples.read_text())
    for argv in (["--samples", kept], ["--init", tmp_path / "out"], ["--ref", tmp_path / "out"]):
        done = run_align(policy, samples, "--overwrite", *argv, cwd=tmp_path)
        assert_one_line_error(done, "an input of this run")
    assert kept.read_text() == samples.read_text()


def test_a_truncated_reference_cache_is_refused_by_name(policy, samples, tmp_path):
    (tmp_path / "ref.safetensors").write_bytes(b"12345678")
    argv = ["--method", "dpo", "--ref-logps", tmp_path / "ref.safetensors"]
    assert_one_line_error(run_align(policy, samples, *argv, cwd=tmp_path), "ref.safetensors")


def test_held_out_problems_need_an_answer_and_must_not_be_trained(policy, samples, tmp_path):
    done = run_align(policy, samples, "--data", "toy", "--eval-split", "train", cwd=tmp_path)
    assert_one_line_error(done, "--eval-split", "among the trained")
    (tmp_path / "q.jsonl").write_text('{"question": "Why?"}\n')
    done = run_align(policy, samples, "--data", tmp_path / "q.jsonl", cwd=tmp_path)
    assert_one_line_error(done, "problems with an answer")
    assert not (tmp_path / "out").exists()
    done = run_align(policy, samples, "--data", "toy", "--eval-limit", 8, "--max-new-tokens", 4, cwd=tmp_path)
    assert "greedy accuracy on 8 held-out problems: 0.0% -> 0.0%" in done.stdout, done.stderr
    assert {"held_out_accuracy", "held_out_reference_nll", "held_out_repeated_4grams"} <= lines(tmp_path)[
        0
    ].keys()


def test_each_method_has_a_folder_of_its_own(policy, samples, tmp_path):
    for method in ("aft", "rrhf"):
        argv = ["--init", policy, "--samples", samples, "--steps", 1, "--method", method]
        done = script("align.py", *argv, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    assert {path.name for path in (tmp_path / "runs").iterdir()} == {"aft", "rrhf"}
    assert (tmp_path / "runs" / "rrhf" / "model.safetensors").is_file()


def test_what_a_weak_model_has_sampled_is_kept(policy, tmp_path):
    argv = ["--init", policy, "--limit", 3, "--k", 2, "--max-new-tokens", 4, "--eval-split", ""]
    done = script("align.py", "--method", "dpo", *argv, cwd=tmp_path)
    assert_one_line_error(done, "no right x wrong pair")
    assert "--samples runs/dpo/samples.jsonl" in done.stdout
    again = ["--init", policy, "--samples", "runs/dpo/samples.jsonl", "--method", "aft", "--steps", 1]
    done = script("align.py", *again, cwd=tmp_path)
    assert done.returncode == 0 and "3 groups" in done.stdout, done.stderr
    assert not (tmp_path / "runs" / "dpo" / "lock.json").exists()


def test_a_resumed_run_takes_the_samples_and_the_before_of_the_run(policy, tmp_path):
    argv = ["--init", policy, "--limit", 6, "--k", 2, "--max-new-tokens", 4, "--eval-limit", 8, "--steps", 3]
    assert script("align.py", *argv, "--out", "whole", cwd=tmp_path).returncode == 0
    assert script("align.py", *argv, "--out", "halves", "--stop-at", 2, cwd=tmp_path).returncode == 0
    done = script("align.py", *argv, "--out", "halves", "--resume", cwd=tmp_path)
    assert done.returncode == 0 and "responses each" not in done.stdout, done.stderr
    for name in ("eval.json", "samples.jsonl", "model.safetensors"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "halves" / name).read_bytes(), name


def test_sampling_and_evaluation_run_under_dtype_with_one_model_in_memory(policy, tmp_path, monkeypatch):
    loaded, sampled_under = [], []
    load, sample = align.load_model, sample_groups
    monkeypatch.setattr(align, "load_model", lambda *a, **k: loaded.append(1) or load(*a, **k))

    def watched(*arguments, **options):
        for samples in sample(*arguments, **options):
            sampled_under.append(torch.is_autocast_enabled("cpu"))
            yield samples

    for module in (align, evaluation):
        monkeypatch.setattr(module, "sample_groups", watched)
    argv = ["--limit", 4, "--k", 2, "--max-new-tokens", 4, "--eval-limit", 5, "--steps", 1, "--device", "cpu"]
    for dtype in ("bfloat16", "float32"):
        loaded.clear(), sampled_under.clear()
        done = script("align.py", "--init", policy, *argv, "--dtype", dtype, "--out", dtype, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert sampled_under == [dtype == "bfloat16"] * (4 + 5 + 5 + 5)  # samples, before, a probe, after
        assert len(loaded) == 1
