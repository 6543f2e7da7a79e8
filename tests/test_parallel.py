"""torchrun: two and three processes end where one does, whatever is trained or sampled; and what they do when
something is wrong.

A start of torch costs seconds, so one torchrun of each size does all runs of this file (tests/many.py).
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from minicot import parallel
from minicot.records import read_samples
from minicot.runs import checkpoints, write_jsonl
from minicot.toy import pictures, problems
from tests.helpers import assert_one_line_error, script
from tests.test_align import groups, lines, small_policy, write

ROOT = Path(__file__).parent.parent
CPU = ["--device", "cpu"]
LOOP = [*CPU, "--lr", "1e-4", "--steps", "4", "--seed", "3"]
TOY = ["--init", "policy", "--data", "toy"]
SFT = ["train", *LOOP, *TOY, "--limit", "30", "--batch-size", "7", "--eval-limit", "5"]
GIVEN = ["align", *LOOP, "--init", "policy", "--samples", "samples.jsonl", "--batch-size", "3"]
GRPO = ["align", *LOOP, *TOY, "--method", "grpo", "--limit", "12", "--k", "4", "--batch-size", "5"]
GRPO += ["--eval-limit", "4", "--probe-every", "2", "--probe-limit", "4", "--max-new-tokens", "12"]
SEEN = ["--init", "toy-vision", "--data", "toy-pictures", "--limit", "6", "--eval-limit", "2"]
MIXED = ["--init", "toy-vision", "--data", "mixed.jsonl", "--mode", "plain", "--eval-limit", "2"]
DRAWN = ["sample", *CPU, "--model", "policy", "--data", "toy", "--limit", "23", "--max-new-tokens", "12"]
SHARD = ["--shard", "--checkpoint-activations"]
NARROW = ["--dtype", "bfloat16"]
RUNS = {  # name -> argv; each ends in a model folder
    "sft": SFT,
    "sft-accumulate": [*SFT, "--accumulate", "3"],
    "sft-last-batch-of-one": [*SFT, "--steps", "0", "--epochs", "1", "--limit", "8"],
    "aft": [*GIVEN, "--method", "aft", "--accumulate", "2"],
    "dpo": [*GIVEN, "--method", "dpo"],
    "grpo": [*GRPO, "--updates", "2", "--kl", "0.04", "--normalisation", "dapo"],
    # Adam makes a step of a gradient that is next to nothing but rounding: at 2e-5 one weight of 1.4 million
    # ended 1.7e-6 off on one processor, and none on another
    "pictures": ["train", *LOOP, *SEEN, "--batch-size", "3", "--lr", "5e-6", "--max-new-tokens", "8"],
    "mixed": ["train", *LOOP, *MIXED, "--batch-size", "2", "--lr", "1e-5", "--no-group-by-length"],
}
SHARDED = {f"{name}-shard": name for name in ("sft", "aft", "dpo", "grpo", "pictures", "mixed")}  # by FSDP2
FILES = {  # name -> argv; each ends in a file of the same bytes
    "drawn.jsonl": [*DRAWN, "--n", "3"],
    "few.jsonl": [*DRAWN, "--n", "2", "--limit", "2"],
    "results.json": [*DRAWN, "--n", "2", "--evaluate"],
}
SCORED = ["sample", *CPU, "--verifier", "policy", "--ref", "other", "--samples", "samples.jsonl"]
JOBS = RUNS | FILES | {"scored.jsonl": SCORED}
STOPPED = {"ddp": [], "fsdp2": SHARD}


def with_out(jobs):
    return [[*argv, "--out", name] for name, argv in jobs.items()]


def torchrun(ranks, *argv, cwd, **options):
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*launch, *argv], cwd=cwd, env=environment, text=True, stdout=-1, stderr=-1, **options
    )


def run_many(ranks, jobs, cwd):
    (cwd / "jobs.json").write_text(json.dumps(jobs))
    process = torchrun(ranks, "-m", "tests.many", "jobs.json", cwd=cwd)
    out, err = process.communicate(timeout=600)
    assert process.returncode == 0, out + err
    return out


def prepared(folder):
    small_policy(folder / "policy", layers=2)
    small_policy(folder / "other", layers=2, seed=1)
    write(
        folder / "samples.jsonl",
        groups([[1, 0, 0, 1], [1, 0], [0, 1, 0], [1, 1, 0], [0, 1], [1, 0, 1], [0, 1], [1, 0]]),
    )
    seen, told = pictures.rows("train", 4), problems.rows("train", 4)  # a rank's rows may have no picture
    write_jsonl(folder / "mixed.jsonl", [row for pair in zip(told, seen) for row in pair])
    return folder


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    folder = prepared(tmp_path_factory.mktemp("one"))
    for name, *argv in with_out(JOBS | {"narrow": [*SFT, *NARROW]}):
        done = script(f"{name}.py", *argv, cwd=folder)
        assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    folder = prepared(tmp_path_factory.mktemp("two"))
    jobs = JOBS | {name: [*RUNS[of], *SHARD] for name, of in SHARDED.items()}
    jobs |= {f"stopped-{how}": [*SFT, "--stop-at", "2", *more] for how, more in STOPPED.items()}
    begun = script("train.py", *SFT[1:], "--stop-at", "2", "--out", "begun", cwd=folder)
    assert begun.returncode == 0, begun.stderr
    jobs |= {"begun": [*SFT, "--resume", *SHARD], "narrow": [*SFT, *NARROW, *SHARD]}
    return folder, run_many(2, with_out(jobs), folder)


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    folder = prepared(tmp_path_factory.mktemp("three"))
    return folder, run_many(3, with_out(JOBS), folder)


def assert_same_run(a, b):
    """Losses and what is measured of each step, and the final weights, within 1e-6."""
    logs = [lines(folder, ".") for folder in (a, b)]
    assert len(logs[0]) == len(logs[1]) > 0
    for mine, its in zip(*logs):
        assert mine.keys() == its.keys()
        for name in (name for name in mine if "tokens_per_s" not in name and mine[name] is not None):
            assert its[name] == pytest.approx(mine[name], rel=1e-6, abs=1e-6), name
    weights = [load_file(folder / "model.safetensors") for folder in (a, b)]
    assert weights[0].keys() == weights[1].keys()
    for name, tensor in weights[0].items():
        if name.endswith("k_proj.bias"):
            continue  # softmax cancels it: its gradient is rounding, which Adam makes a step of
        torch.testing.assert_close(weights[1][name], tensor, rtol=0, atol=1e-6, msg=name)


@pytest.mark.parametrize("name", RUNS)
def test_two_processes_train_as_one(one, two, name):
    assert_same_run(one / name, two[0] / name)


@pytest.mark.parametrize("name", RUNS)
def test_three_processes_train_as_one(one, three, name):
    assert_same_run(one / name, three[0] / name)


@pytest.mark.parametrize("name", SHARDED)
def test_sharded_weights_train_as_one_process(one, two, name):
    assert_same_run(one / SHARDED[name], two[0] / name)


@pytest.mark.parametrize("name", FILES)
def test_ranks_share_the_problems_and_leave_one_file_of_the_same_bytes(one, two, three, name):
    for folder in (two[0], three[0]):
        mine, its = ((f / name).read_text() for f in (one, folder))
        if name == "results.json":
            mine, its = ({**json.loads(text), "command": ""} for text in (mine, its))
        assert mine == its


@pytest.mark.parametrize("how", STOPPED)
def test_one_process_goes_on_with_the_checkpoint_of_two(one, two, how):
    out = two[0] / f"stopped-{how}"
    assert list(checkpoints(out)) == [2] and not (out / "model.safetensors").exists()
    done = script("train.py", *SFT[1:], "--resume", "--out", out.name, cwd=two[0])
    assert done.returncode == 0, done.stderr
    assert_same_run(one / "sft", out)


def test_two_processes_go_on_sharded_with_the_checkpoint_of_one(one, two):
    assert_same_run(one / "sft", two[0] / "begun")


def test_sharded_bfloat16_keeps_near_one_process(one, two):
    losses = lambda folder, name: [line["loss"] for line in lines(folder, name)]
    logs, wide = [losses(folder, "narrow") for folder in (one, two[0])], losses(one, "sft")
    assert logs[1] == pytest.approx(logs[0], rel=1e-4)
    assert all(max(abs(a - b) for a, b in zip(log, wide)) > 2e-5 for log in logs)  # it is no float32


def test_ranks_share_the_scoring(one, two, three):
    mine, *others = (read_samples(folder / "scored.jsonl") for folder in (one, two[0], three[0]))
    ratios = lambda scored: [[r.scores["dpo"] for r in samples.responses] for samples in scored]
    for scored in others:
        assert [samples.problem.id for samples in scored] == [samples.problem.id for samples in mine]
        for a, b in zip(ratios(mine), ratios(scored), strict=True):
            assert b == pytest.approx(a, abs=1e-5)


def test_rank_0_alone_speaks(two):
    for name, said in {
        "sft": " -> sft\n",
        "grpo-shard": " -> grpo-shard\n",
        "drawn": " -> drawn.jsonl\n",
    }.items():
        assert two[1].count(said) == 1, name


def test_what_every_rank_refuses_is_said_once(tmp_path):
    process = torchrun(2, str(ROOT / "train.py"), "--lr", "-1", cwd=tmp_path)
    _, err = process.communicate(timeout=300)
    assert process.returncode != 0
    assert err.count("error: --lr is -1.0; allowed: above 0") == 1


def test_what_rank_0_alone_refuses_is_said_once(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "settings.json").write_text("{}")
    process = torchrun(3, str(ROOT / "train.py"), *CPU, "--limit", "4", "--out", "out", cwd=tmp_path)
    _, err = process.communicate(timeout=300)
    assert process.returncode != 0
    assert err.count("error: --out") == 1 and "another process" not in err and "closed by peer" not in err


@pytest.mark.parametrize("said_before, lost, lines", [(0, True, 1), (1, True, 0), (0, False, 0)])
def test_a_lost_peer_is_said_once_and_other_errors_pass(said_before, lost, lines, monkeypatch, capsys):
    count, error = [said_before], RuntimeError("Connection closed by peer\nmore" if lost else "a bug")
    store = types.SimpleNamespace(add=lambda key, n: count.append(count[-1] + n) or count[-1])
    for name, value in dict(
        rendezvous=lambda *_, **__: iter([(store, 1, 2)]), init_process_group=lambda **_: None,
        PrefixStore=lambda *_: store,
    ).items():  # fmt: skip
        monkeypatch.setattr(parallel.dist, name, value)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit if lost else RuntimeError), parallel.joined():
        raise error
    said = capsys.readouterr().err
    assert said.count("\n") == lines and said.count("error: another process ended") == lines


def test_a_port_in_use_is_said_in_one_line(monkeypatch, capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        for name, value in dict(WORLD_SIZE="2", RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=port).items():
            monkeypatch.setenv(name, value)
        with pytest.raises(SystemExit) as stop, parallel.joined():
            pass
    said = capsys.readouterr().err
    assert stop.value.code == 2 and said.count("\n") == 1
    assert f"cannot meet at 127.0.0.1:{port}" in said and "MASTER_PORT" in said


def test_when_a_rank_dies_the_run_ends_and_leaves_nothing_half_written(tmp_path):
    argv = [
        "--limit",
        "64",
        "--steps",
        "100000",
        "--batch-size",
        "2",
        "--save-every",
        "0",
        "--eval-limit",
        "2",
    ]
    process = torchrun(2, str(ROOT / "train.py"), *CPU, *argv, "--out", "out", cwd=tmp_path)
    log, deadline = tmp_path / "out" / "metrics.jsonl", time.time() + 300
    while not (log.is_file() and log.read_text().count("\n") > 1):
        assert process.poll() is None and time.time() < deadline, process.communicate()
        time.sleep(0.1)
    children = subprocess.run(
        ["pgrep", "-P", str(process.pid)], capture_output=True, text=True
    ).stdout.split()
    os.kill(int(children[-1]), signal.SIGKILL)
    killed = time.time()
    _, err = process.communicate(timeout=300)
    assert process.returncode != 0 and time.time() - killed < 60
    assert err.count("error: another process ended") == 1 and "RuntimeError" not in err
    left = {path.name for path in (tmp_path / "out").iterdir()} - {"lock.json"}
    assert left == {"settings.json", "metrics.jsonl", "eval.json"}


def test_one_process_does_not_shard(tmp_path):
    small_policy(tmp_path / "policy")
    done = script("train.py", *SFT[1:], "--shard", "--out", "out", cwd=tmp_path)
    assert_one_line_error(done, "--shard", "torchrun")


# ---- the parts, in one process -------------------------------------------------------------------


def test_one_process_has_all_of_a_step_and_every_sum():
    assert (parallel.rank(), parallel.size(), parallel.first(), parallel.quiet()) == (0, 1, True, None)
    assert parallel.share([1, 2, 3, 4, 5], 2) == [([1, 3, 5], 1.0), ([2, 4], 1.0)]
    assert parallel.share([1], 4) == [([1], 1.0)]
    assert parallel.total(1, 2.5) == [1, 2.5]
    found = parallel.means({"a": [torch.tensor([1.0, 2.0]), torch.tensor([[True]])], "none": []})
    assert found == {"a": pytest.approx(4 / 3), "none": None}
    assert list(parallel.spread(lambda part: (2 * x for x in part), [1, 2, 3], 2)) == [2, 4, 6]


@pytest.mark.parametrize("n_items, parts", [(7, 1), (7, 3), (2, 2), (1, 1), (3, 5)])
def test_shares_of_a_step_cover_it_once_and_are_as_many_on_every_rank(monkeypatch, n_items, parts):
    items, found = list(range(n_items)), []
    monkeypatch.setattr(parallel, "size", lambda: 3)
    for rank in range(3):
        monkeypatch.setattr(parallel, "rank", lambda rank=rank: rank)
        found.append(parallel.share(items, parts))
    assert len({len(shares) for shares in found}) == 1
    counted = [x for shares in found for part, weight in shares if weight for x in part]
    assert sorted(counted) == items
    assert all(part for shares in found for part, _ in shares)
