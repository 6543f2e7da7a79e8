"""The training loop: accumulation is the big batch, a resumed run is the same run, bad input ends in one
line."""

import json
import math
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

import train
from minicot import runs
from minicot.config import AlignConfig, LoopConfig, SampleConfig, TrainConfig, parse
from minicot.model import ModelConfig, Transformer
from minicot.runs import load_checkpoint, save_checkpoint
from minicot.training import lr_at, make_optimizer
from tests.helpers import SCRIPTS, assert_one_line_error, finished, script, start

ROOT = Path(__file__).parent.parent
TINY = dict(
    model_type="llama",
    hidden_size=16,
    intermediate_size=32,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=8,
    max_position_embeddings=128,
    rms_norm_eps=1e-6,
    rope_theta=10000.0,
    hidden_act="silu",
    attention_bias=False,
    mlp_bias=False,
    tie_word_embeddings=True,
    initializer_range=0.02,
)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A folder with a tiny config.json (random weights) and the toy tokenizer."""
    folder = tmp_path_factory.mktemp("base")
    toy = ROOT / "minicot" / "toy" / "base"
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        (folder / name).write_bytes((toy / name).read_bytes())
    vocab = json.loads((toy / "config.json").read_text())["vocab_size"]
    (folder / "config.json").write_text(json.dumps({**TINY, "vocab_size": vocab}))
    return folder


def run_train(base, out, *argv, cwd):
    return script("train.py", *words(base, out), *argv, cwd=cwd)


def words(base, out):
    quick = ["--limit", 60, "--batch-size", 8, "--steps", 6, "--device", "cpu", "--eval-split", ""]
    return ["--init", base / "config.json", *quick, "--out", out]


def test_learning_rate_warms_up_then_falls_along_a_cosine_to_a_tenth():
    rates = [lr_at(step, 100, 2.0, 0.1) for step in range(1, 101)]
    assert rates[0] == pytest.approx(0.2) and rates[9] == 2.0 and rates[-1] == pytest.approx(0.2)
    assert rates[54] == pytest.approx(0.2 + 0.9)  # half way down
    assert rates == sorted(rates[:10]) + sorted(rates[10:], reverse=True)


def test_norms_and_biases_do_not_decay():
    model = Transformer(
        ModelConfig(
            **{k: v for k, v in TINY.items() if k not in ("hidden_act", "attention_bias")},
            vocab_size=8,
            qkv_bias=True,
        )
    )
    decay, rest = make_optimizer(model, 1e-3, 0.1).param_groups
    names = {id(p): name for name, p in model.named_parameters()}
    assert (
        all("norm" in names[id(p)] or "bias" in names[id(p)] for p in rest["params"])
        and rest["weight_decay"] == 0
    )
    assert all("norm" not in names[id(p)] and "bias" not in names[id(p)] for p in decay["params"])
    assert decay["weight_decay"] == 0.1 and len(decay["params"]) + len(rest["params"]) == len(names)


def test_a_checkpoint_restores_weights_and_optimizer_and_older_ones_go(tmp_path):
    config = ModelConfig(
        **{k: v for k, v in TINY.items() if k not in ("hidden_act", "attention_bias")}, vocab_size=8
    )
    model = Transformer(config, torch.Generator().manual_seed(0))
    optimizer = make_optimizer(model, 1e-2, 0.1)

    def step(model, optimizer):
        model(torch.tensor([[1, 2, 3]])).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    step(model, optimizer)
    save_checkpoint(tmp_path, 1, model, optimizer)
    step(model, optimizer)
    save_checkpoint(tmp_path, 2, model, optimizer)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-2"]
    other = Transformer(config, torch.Generator().manual_seed(5))
    other_optimizer = make_optimizer(other, 1e-2, 0.1)
    assert load_checkpoint(tmp_path, other, other_optimizer) == 2
    step(model, optimizer), step(other, other_optimizer)
    for a, b in zip(model.parameters(), other.parameters()):
        assert torch.equal(a, b)


def test_a_checkpoint_of_another_torch_goes_on_and_says_so(base, tmp_path):
    run_train(base, "out", "--stop-at", 3, cwd=tmp_path)
    file = tmp_path / "out" / "checkpoint-3" / "state.json"
    state = json.loads(file.read_text())
    assert state["torch"] == torch.__version__
    file.write_text(json.dumps(state | {"torch": "2.4.0"}))
    resumed = run_train(base, "out", "--resume", cwd=tmp_path)
    assert resumed.returncode == 0, resumed.stderr
    assert f"is of torch 2.4.0, this is {torch.__version__}: the last digits may differ" in resumed.stdout


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has"),
        RuntimeError("[enforce fail] . DefaultCPUAllocator: can't allocate memory: you tried to allocate 9"),
        MemoryError(),
    ],
)
@pytest.mark.parametrize("name", ["train.py", "align.py", "sample.py"])
def test_out_of_memory_names_the_flags_that_take_less(name, error, tmp_path, monkeypatch):
    def fail(config):
        raise error

    monkeypatch.setattr(SCRIPTS[name][0], "main", fail)
    done = script(name, cwd=tmp_path)
    assert_one_line_error(done, "error: out of memory (", "--batch-size", "--dtype")
    assert ("--checkpoint-activations" in done.stderr) == (name != "sample.py")


def test_another_runtime_error_keeps_its_traceback(tmp_path, monkeypatch):
    def fail(config):
        raise RuntimeError("shapes differ")

    monkeypatch.setattr(SCRIPTS["train.py"][0], "main", fail)
    with pytest.raises(RuntimeError, match="shapes differ"):
        script("train.py", cwd=tmp_path)


def test_an_allocation_that_no_machine_has_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(SCRIPTS["train.py"][0], "main", lambda config: torch.empty(2**60))
    assert_one_line_error(script("train.py", cwd=tmp_path), "out of memory", "--batch-size")


def test_a_stopped_and_resumed_run_ends_with_the_same_bits(base, tmp_path):
    whole = run_train(base, "whole", cwd=tmp_path)
    assert whole.returncode == 0, whole.stderr
    stopped = run_train(base, "halves", "--stop-at", 3, cwd=tmp_path)
    assert "go on with --resume" in stopped.stdout
    assert not (tmp_path / "halves" / "model.safetensors").exists()
    resumed = run_train(base, "halves", "--resume", cwd=tmp_path)
    assert resumed.returncode == 0, resumed.stderr
    for name, value in load_file(tmp_path / "whole" / "model.safetensors").items():
        assert torch.equal(value, load_file(tmp_path / "halves" / "model.safetensors")[name]), name
    lines = [json.loads(line) for line in (tmp_path / "halves" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert (tmp_path / "whole" / "loss.svg").stat().st_size > 1000


def test_accumulated_micro_batches_give_the_big_batch(base, tmp_path):
    for out, accumulate in (("one", 1), ("three", 3)):
        done = run_train(base, out, "--accumulate", accumulate, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    one, three = (load_file(tmp_path / out / "model.safetensors") for out in ("one", "three"))
    read = lambda out: [
        json.loads(line)["loss"] for line in (tmp_path / out / "metrics.jsonl").read_text().splitlines()
    ]
    assert read("one") == pytest.approx(read("three"), rel=1e-5)
    assert all(torch.allclose(one[name], three[name], atol=2e-5) for name in one)


def lines(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_a_run_is_never_replaced_unasked_nor_lost_by_a_failing_one(base, tmp_path):
    assert run_train(base, "out", "--steps", 4, "--save-every", 3, cwd=tmp_path).returncode == 0
    before = (tmp_path / "out" / "model.safetensors").read_bytes()

    def refused(*argv, parts):
        assert_one_line_error(run_train(base, "out", *argv, cwd=tmp_path), *parts)
        assert (tmp_path / "out" / "model.safetensors").read_bytes() == before

    refused(parts=["already holds a run", "--overwrite"])
    refused("--resume", "--steps", 4, "--lr", 1, parts=["the same settings"])
    refused("--resume", "--overwrite", parts=["both given"])
    refused("--overwrite", "--data", "gone.jsonl", parts=["gone.jsonl"])
    refused("--overwrite", "--init", "out", parts=["an input of this run"])
    refused("--overwrite", "--tokenizer", "out", parts=["an input of this run"])
    # a run that fails in its first step: what it was to replace stands beside
    done = run_train(base, "out", "--overwrite", "--lr", "1e30", "--clip", 0, "--warmup", 0, cwd=tmp_path)
    assert_one_line_error(done, "step ")
    assert (tmp_path / "out.old" / "model.safetensors").read_bytes() == before
    assert run_train(base, "out", "--overwrite", cwd=tmp_path).returncode == 0
    assert not (tmp_path / "out.old").exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("mine")
    assert_one_line_error(run_train(base, "mine", "--overwrite", cwd=tmp_path), "no run of ours")


def test_a_broken_or_foreign_checkpoint_is_refused_by_name(base, tmp_path):
    def start(change):
        run_train(base, "out", "--stop-at", 3, "--overwrite", cwd=tmp_path)
        change(tmp_path / "out" / "checkpoint-3")
        return run_train(base, "out", "--resume", cwd=tmp_path)

    def edit(folder, change):
        tensors = load_file(folder / "weights.safetensors")
        change(tensors)
        save_file(tensors, folder / "weights.safetensors")

    name = "model.embed_tokens.weight"
    changes = {
        "tensor model.embed_tokens.weight": lambda f: edit(
            f, lambda t: t.update({name: t[name][:1].clone()})
        ),
        "other tensors than the model": lambda f: edit(f, lambda t: t.pop(name)),
        "expected finite values": lambda f: edit(f, lambda t: t.update({name: t[name] * math.nan})),
        "cannot be read": lambda f: (f / "optimizer.safetensors").write_bytes(b"123"),
        "step is 3, the folder is checkpoint-99": lambda f: f.rename(f.with_name("checkpoint-99")),
    }
    for message, change in changes.items():
        assert_one_line_error(start(change), message, "checkpoint-")


def test_a_log_line_that_was_cut_off_is_left_out_when_resuming(base, tmp_path):
    run_train(base, "out", "--stop-at", 3, cwd=tmp_path)
    with open(tmp_path / "out" / "metrics.jsonl", "a") as file:
        file.write('{"step": 4, "lo')
    assert run_train(base, "out", "--resume", cwd=tmp_path).returncode == 0
    assert [line["step"] for line in lines(tmp_path / "out")] == [1, 2, 3, 4, 5, 6]


def test_resuming_with_other_data_is_refused(base, tmp_path):
    rows = [{"question": f"What is {i}?", "solution": f"#### {i}"} for i in range(20)]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert run_train(base, "out", "--data", path, "--stop-at", 2, cwd=tmp_path).returncode == 0
    path.write_text("".join(json.dumps(row) + "\n" for row in rows[:-1]))
    assert_one_line_error(run_train(base, "out", "--data", path, "--resume", cwd=tmp_path), "data_digest")


def test_resuming_from_another_base_model_is_refused(base, tmp_path):
    """The weights in the folder of --init, not its name, are what a run starts from."""
    own = tmp_path / "own"
    own.mkdir()
    for file in base.iterdir():
        (own / file.name).write_bytes(file.read_bytes())
    assert run_train(own, "out", "--stop-at", 2, cwd=tmp_path).returncode == 0
    config = json.loads((own / "config.json").read_text())
    (own / "config.json").write_text(json.dumps(config | {"initializer_range": 0.05}))
    done = run_train(own, "out", "--resume", cwd=tmp_path)
    assert_one_line_error(done, "--resume: init_digest is", "allowed: the same")


def test_held_out_problems_are_never_the_trained_ones(base, tmp_path):
    rows = [{"question": f"What is {i}?", "solution": f"#### {i}"} for i in range(20)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    argv = ["--data", tmp_path / "rows.jsonl", "--eval-split"]
    done = run_train(base, "out", *argv, "test", cwd=tmp_path)
    assert_one_line_error(done, "--eval-split", "20 held-out problems are among the trained", "train[900:]")
    done = run_train(base, "out", *argv, "train[15:]", "--split", "train[:15]", cwd=tmp_path)
    assert done.returncode == 0 and "NLL of 5 held-out solutions" in done.stdout


@pytest.mark.parametrize(
    "argv, parts",
    [
        (["--init", "nowhere"], ["nowhere"]),
        (["--data", "nowhere.jsonl"], ["nowhere.jsonl"]),
        (["--data", "gsm8k:nowhere"], ["nowhere"]),
        (["--batch-size", "0"], ["--batch-size is 0; allowed: at least 1"]),
        (["--lr", "inf"], ["--lr is inf"]),
        (["--warmup", "nan"], ["--warmup is nan; allowed: at least 0 and at most 1"]),
        (["--clip", "-1"], ["--clip is -1.0"]),
        (["--peek", "-1"], ["--peek"]),
        (["--limit", "-4"], ["--limit"]),
        (["--lr", "-1"], ["--lr"]),
        (["--lr", "fast"], ["--lr", "fast"]),
        (["--flag"], ["--flag"]),
        (["--train", "head"], ["--train", "head"]),
        (["--max-length", "20"], ["longer than 20 tokens", "--overlong skip"]),
        (["--max-length", "999999"], ["--max-length"]),
        *([] if torch.cuda.is_available() else [(["--device", "cuda"], ["--device", "cuda", "cpu"])]),
    ],
)
def test_bad_input_ends_in_one_line(base, tmp_path, argv, parts):
    assert_one_line_error(run_train(base, "out", *argv, cwd=tmp_path), *parts)
    assert not (tmp_path / "out").exists()


def test_a_loss_that_is_not_finite_stops_the_run_and_names_step_and_problems(base, tmp_path):
    done = run_train(base, "out", "--lr", "1e30", "--clip", "0", "--warmup", "0", cwd=tmp_path)
    assert_one_line_error(done, "step ", "problems toy-", "nan")
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_flags_are_the_fields_of_the_config():
    config = parse(TrainConfig, ["--batch-size", "3", "--lr", "1e-4", "--resume"])
    assert (config.batch_size, config.lr, config.resume, config.overwrite) == (3, 1e-4, True, False)
    assert parse(TrainConfig, []) == TrainConfig() and math.isfinite(TrainConfig().lr)


def test_a_script_started_as_a_process_ends_in_one_line_and_code_2(tmp_path):
    done = subprocess.run(
        [sys.executable, ROOT / "train.py", "--data", "gone.jsonl"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert_one_line_error(done, "gone.jsonl", "no such file")


def test_peek_shows_the_trained_tokens_in_green_behind_the_prompt(base, tmp_path):
    done = run_train(base, "out", "--peek", 1, "--steps", 1, cwd=tmp_path)
    prompt, trained = done.stdout.split("\033[90m")[1].split("\033[0m|\033[32m")
    assert prompt.startswith("<|user|>|") and prompt.endswith("<|assistant|>")
    assert "####" in trained and "<|end|>\033[0m" in trained and "####" not in prompt


def test_bfloat16_autocast_stays_near_float32(base, tmp_path):
    for dtype in ("float32", "bfloat16"):
        assert run_train(base, dtype, "--dtype", dtype, cwd=tmp_path).returncode == 0
    a, b = ([line["loss"] for line in lines(tmp_path / dtype)] for dtype in ("float32", "bfloat16"))
    assert a != b and a == pytest.approx(b, rel=1e-2)


# ---- the run folder ----------------------------------------------------------------------------------


def test_overwrite_leaves_what_is_not_of_its_own_run(base, tmp_path):
    assert run_train(base, "out", "--save-every", 3, cwd=tmp_path).returncode == 0
    out = tmp_path / "out"
    (out / "notes").mkdir()
    others = [out / "notes" / "model.safetensors", out / "thesis.txt", out / "film.part"]
    for file in others:
        file.write_text("mine")
    before = (out / "model.safetensors").read_bytes()
    failing = ["--overwrite", "--lr", "1e30", "--clip", 0, "--warmup", 0]
    for _ in range(2):  # the second failing run replaces the first, not the good one
        assert_one_line_error(run_train(base, "out", *failing, cwd=tmp_path), "step ")
        assert [file.read_text() for file in others] == ["mine"] * 3
        assert (tmp_path / "out.old" / "model.safetensors").read_bytes() == before
        assert not list(out.glob("checkpoint-*")) and not (out / "model.safetensors").exists()
    (tmp_path / "out.old" / "also.txt").write_text("mine")
    assert run_train(base, "out", "--overwrite", "--seed", 1, cwd=tmp_path).returncode == 0
    assert [file.read_text() for file in others] == ["mine"] * 3
    assert (out / "model.safetensors").read_bytes() != before
    assert [file.name for file in (tmp_path / "out.old").iterdir()] == ["also.txt"]


def test_overwrite_never_deletes_a_folder_that_only_has_the_name_of_the_old_run(base, tmp_path):
    assert run_train(base, "out", cwd=tmp_path).returncode == 0
    (tmp_path / "out.old").mkdir()
    (tmp_path / "out.old" / "model.safetensors").write_text("a copy of mine")
    assert_one_line_error(run_train(base, "out", "--overwrite", cwd=tmp_path), "out.old", "move it away")
    assert (tmp_path / "out.old" / "model.safetensors").read_text() == "a copy of mine"


@pytest.mark.parametrize("error", [SafetensorError("I/O error: No space left"), OSError(28, "No space left")])
def test_a_full_disk_ends_in_one_line_and_keeps_the_older_checkpoint(base, tmp_path, monkeypatch, error):
    whole, calls = runs.save_file, []

    def full(tensors, path, **options):
        calls.append(path)
        if len(calls) == 4:  # the second checkpoint's second file
            path.write_bytes(b"half of it")
            raise error
        whole(tensors, path, **options)

    monkeypatch.setattr(runs, "save_file", full)
    done = run_train(base, "out", "--save-every", 2, cwd=tmp_path)
    assert_one_line_error(done, "checkpoint-4", "No space left", "what was there before is kept")
    assert [path.name for path in (tmp_path / "out").glob("checkpoint-*")] == ["checkpoint-2"]
    monkeypatch.undo()
    assert run_train(base, "out", "--save-every", 2, "--resume", cwd=tmp_path).returncode == 0


def test_a_disk_that_is_full_when_the_model_is_saved_leaves_nothing_half_written(base, tmp_path):
    limited = "import resource, runpy, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000)); "
    code = limited + "sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    command = [sys.executable, "-c", code, ROOT / "train.py", *words(base, "out"), "--save-every", 0]
    options = dict(cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    done = subprocess.run(list(map(str, command)), **options)
    assert_one_line_error(done, "cannot be written")
    assert {file.name for file in (tmp_path / "out").iterdir()} == {"settings.json", "metrics.jsonl"}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_run_with_a_checkpoint_from_which_it_goes_on(base, tmp_path, number):
    """Meanwhile nobody else may write there."""
    argv = ["--steps", 150, "--save-every", 0]
    assert run_train(base, "whole", *argv, cwd=tmp_path).returncode == 0
    process = start("train.py", *words(base, "out"), *argv, cwd=tmp_path, ready="out/metrics.jsonl")
    for switch in ("--overwrite", "--resume"):
        done = run_train(base, "out", *argv, switch, cwd=tmp_path)
        assert_one_line_error(done, f"process {process.pid} on {socket.gethostname()} is writing there")
    while (tmp_path / "out" / "metrics.jsonl").read_bytes().count(b"\n") < 2:
        time.sleep(0.01)
    process.send_signal(number)
    done = finished(process, timeout=10)
    assert done.returncode == 128 + number and "Traceback" not in done.stderr, done.stderr
    assert f"stopped by {number.name} after step" in done.stdout and "--resume" in done.stdout
    [checkpoint] = (tmp_path / "out").glob("checkpoint-*")
    assert 2 <= int(checkpoint.name.removeprefix("checkpoint-")) < 150
    assert not (tmp_path / "out" / "lock.json").exists()
    assert run_train(base, "out", *argv, "--resume", cwd=tmp_path).returncode == 0
    one, two = (load_file(tmp_path / out / "model.safetensors") for out in ("whole", "out"))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_a_signal_while_the_model_is_saved_waits_for_it(base, tmp_path, monkeypatch):
    save = runs.save_model

    def saved_under_fire(*arguments):
        os.kill(os.getpid(), signal.SIGTERM)
        save(*arguments)

    monkeypatch.setattr(runs, "save_model", saved_under_fire)
    done = run_train(base, "out", cwd=tmp_path)
    assert done.returncode == 143 and "the model is saved in out" in done.stdout, done.stderr
    assert load_file(tmp_path / "out" / "model.safetensors")


def test_a_signal_before_the_loop_ends_in_one_line(tmp_path):
    argv = ["--limit", 8, "--eval-limit", 1000]
    process = start("train.py", *argv, cwd=tmp_path, ready="runs/sft/settings.json")
    process.terminate()
    done = finished(process)
    assert done.returncode == 143 and done.stderr.splitlines()[-1] == "ended by SIGTERM", done.stderr
    assert "Traceback" not in done.stderr and not (tmp_path / "runs/sft/lock.json").exists()


def test_a_lock_is_believed_while_its_owner_may_live(base, tmp_path):
    (tmp_path / "out").mkdir()
    lock, host = tmp_path / "out" / "lock.json", socket.gethostname()
    dead = subprocess.Popen(["true"])
    dead.wait()
    for pid, machine in ((os.getppid(), host), (dead.pid, "another-host")):
        lock.write_text(json.dumps({"pid": pid, "host": machine}))
        done = run_train(base, "out", cwd=tmp_path)
        assert_one_line_error(done, f"process {pid} on {machine}", "delete out/lock.json")
        assert json.loads(lock.read_text()) == {"pid": pid, "host": machine}
    lock.write_text("half a line")
    assert_one_line_error(run_train(base, "out", cwd=tmp_path), "delete out/lock.json")
    lock.write_text(json.dumps({"pid": dead.pid, "host": host}))
    assert run_train(base, "out", cwd=tmp_path).returncode == 0 and not lock.exists()
    done = run_train(base, "out", "--overwrite", "--lr", "1e30", "--clip", 0, "--warmup", 0, cwd=tmp_path)
    assert_one_line_error(done, "step ")
    assert not lock.exists()


def test_the_training_that_align_starts_first_ends_with_it(tmp_path):
    process = start("align.py", cwd=tmp_path)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    while not children.read_text():
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    child = int(children.read_text())
    process.terminate()
    done = finished(process)
    assert done.returncode == 143 and "Traceback" not in done.stderr, done.stderr
    with pytest.raises(ProcessLookupError):
        os.kill(child, 0)


def test_a_bug_of_ours_keeps_its_traceback(base, tmp_path, monkeypatch):
    def broken(*_, **__):
        raise ValueError("loss_mask is torch.int64; a mask must be torch.bool")

    monkeypatch.setattr(train, "sft_loss", broken)
    with pytest.raises(ValueError, match="a mask must be"):
        run_train(base, "out", cwd=tmp_path)
    assert not (tmp_path / "out" / "lock.json").exists()


# ---- pictures ----------------------------------------------------------------------------------------


def test_a_picture_model_that_saw_no_picture_before_the_checkpoint_is_resumed(tmp_path):
    argv = ["--init", "toy-vision", "--limit", 16, "--batch-size", 4, "--steps", 3, "--eval-split", ""]
    assert script("train.py", *argv, "--out", "whole", cwd=tmp_path).returncode == 0
    assert script("train.py", *argv, "--out", "halves", "--stop-at", 2, cwd=tmp_path).returncode == 0
    about = json.loads((tmp_path / "halves" / "checkpoint-2" / "state.json").read_text())
    assert any(name.startswith("multi_modal_projector.") for name in about["untouched"])
    done = script("train.py", *argv, "--out", "halves", "--resume", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    one, two = (load_file(tmp_path / out / "model.safetensors") for out in ("whole", "halves"))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_a_picture_that_cannot_be_read_costs_its_own_problem_before_the_first_step(tmp_path):
    for name in "abcd":
        Image.new("RGB", (64, 64), "white").save(tmp_path / f"{name}.png")
    for name in "bd":
        (tmp_path / f"{name}.png").write_bytes((tmp_path / f"{name}.png").read_bytes()[:60])
    rows = [
        {"id": name, "question": "How many?", "answer": "3", "solution": "#### 3", "image": f"{name}.png"}
        for name in "abcd"
    ]
    (tmp_path / "set.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    argv = ["--init", "toy-vision", "--data", "set.jsonl", "--steps", 2, "--max-new-tokens", 4]
    splits = ["--split", "train[:2]", "--eval-split", "train[2:]"]
    done = script("train.py", *argv, *splits, "--out", "out", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "2 problems left out, as their picture can't be read; the first is b: image 'b.png'" in done.stdout
    assert "1 rows and 1 held-out problems" in done.stdout
    done = script("train.py", *argv, "--split", "train[1:2]", "--out", "none", cwd=tmp_path)
    assert_one_line_error(done, "no problem has a picture that can be read", "b.png")
    samples = [row | {"responses": [{"text": "#### 4", "correct": False}]} for row in rows]
    (tmp_path / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in samples))
    aligned = ["--init", "toy-vision", "--samples", "samples.jsonl", "--steps", 2, "--out", "aft"]
    done = script("align.py", *aligned, cwd=tmp_path)
    assert done.returncode == 0 and "2 groups, 4 responses" in done.stdout, done.stderr
    assert "2 problems left out, as their picture can't be read; the first is b" in done.stdout


# ---- held-out problems -------------------------------------------------------------------------------


def held_out(out):
    return json.loads((out / "eval.json").read_text())


def test_the_built_in_world_is_evaluated_without_a_flag_and_a_resumed_run_keeps_its_before(tmp_path):
    argv = ["--limit", 64, "--steps", 3, "--eval-limit", 30, "--max-new-tokens", 30]
    done = script("train.py", *argv, "--out", "whole", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    measured = held_out(tmp_path / "whole")
    right = measured["after"]["accuracy"]
    assert len(right) == len(measured["before"]["nll"]) == 30
    assert f"greedy accuracy on 30 held-out problems: {sum(measured['before']['accuracy']) / 30:.1%} -> " in (
        done.stdout
    )
    assert measured["difference"]["nll"]["high"] < 0  # three steps are enough for that
    assert script("train.py", *argv, "--out", "halves", "--stop-at", 2, cwd=tmp_path).returncode == 0
    assert list(held_out(tmp_path / "halves")) == ["before"]
    assert script("train.py", *argv, "--out", "halves", "--resume", cwd=tmp_path).returncode == 0
    assert held_out(tmp_path / "halves") == measured
    done = script("train.py", *argv, "--split", "test", "--out", "test", cwd=tmp_path)
    assert done.returncode == 0 and "held-out problems:" not in done.stdout


def test_accuracy_is_that_of_what_the_model_does(tmp_path):
    """A model learns four bare answers by heart and is asked the same questions, under other ids."""
    names = ("Tom", "Ana", "Max", "Zoe")
    rows = [
        {"id": f"{k}{i}", "question": f"How many has {name}?", "answer": str(31 + 7 * i)}
        for k in "ab"
        for i, name in enumerate(names)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    argv = ["--data", "rows.jsonl", "--split", "train[:4]", "--eval-split", "train[4:]", "--mode", "direct"]
    more = ["--max-new-tokens", 4, "--steps", 60, "--batch-size", 4, "--out", "out"]
    done = script("train.py", *argv, *more, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    measured = held_out(tmp_path / "out")
    assert measured["before"]["accuracy"] == [0] * 4 and measured["after"]["accuracy"] == [1] * 4
    assert "greedy accuracy on 4 held-out problems: 0.0% -> 100.0% [51.0%, 100.0%]" in done.stdout
    assert "difference +100.0%" in done.stdout and "NLL of 4 held-out solutions" in done.stdout


def test_what_is_there_is_measured_answers_and_solutions(base, tmp_path):
    row = lambda i, **fields: {"id": f"r{i}", "question": f"Say {i}."} | fields
    rows = [row(i, solution=f"#### {i}", answer="1") for i in range(6)]
    rows += [row(6, solution="#### 6", answer="6"), row(7, answer="7"), row(8, solution="#### 8"), row(9)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    argv = ["--data", "rows.jsonl", "--split", "train[:6]", "--max-new-tokens", 4]
    for mode, n_rows in (("cot", 2), ("plain", 2), ("direct", 2), ("both", 2)):
        done = run_train(base, mode, *argv, "--mode", mode, "--eval-split", "train[6:]", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        measured = held_out(tmp_path / mode)["after"]
        assert (len(measured["accuracy"]), len(measured["nll"])) == (2, n_rows), mode
    done = run_train(base, "without", *argv, "--eval-split", "auto", cwd=tmp_path)
    assert done.returncode == 0 and not (tmp_path / "without" / "eval.json").exists()


# ---- flags -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [TrainConfig, AlignConfig, SampleConfig])
def test_help_groups_the_flags_and_fits_two_screens(config, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit):
        parse(config, ["--help"], **({"method": ["aft", "dpo"]} if config is AlignConfig else {}))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 100 and max(map(len, lines)) <= 100
    headings = [line for line in lines if line.endswith(":") and not line.startswith(" ")]
    assert headings == ["options:", "data:", "model:", "method:", "loop:", "output:"]


def test_train_and_align_have_the_same_loop_flags():
    shared = {field for field in LoopConfig.__dataclass_fields__}
    for config in (TrainConfig, AlignConfig):
        assert issubclass(config, LoopConfig) and shared <= set(config.__dataclass_fields__)
    assert {"lr", "save_every", "stop_at", "resume", "overwrite", "dtype", "chat_template"} <= shared


def test_the_chat_template_is_one_of_a_runs_settings(base, tmp_path):
    done = run_train(base, "out", "--chat-template", "plain", "--stop-at", 2, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "out" / "settings.json").read_text())["chat_template"] == "plain"
    assert_one_line_error(run_train(base, "out", "--resume", cwd=tmp_path), "--resume", "chat_template")


def test_the_fused_kernel_that_cuda_takes_makes_the_same_steps():
    """AdamW's fused kernel exists on a CPU too."""
    results = []
    for fused in (True, False):
        policy = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.Linear(5, 2))
        with torch.no_grad():
            for i, parameter in enumerate(policy.parameters()):
                parameter.copy_(torch.linspace(-1, 1 + i, parameter.numel()).view_as(parameter))
        optimizer = make_optimizer(policy, 1e-2, 0.1)
        assert optimizer.defaults["fused"] is False
        optimizer = torch.optim.AdamW(optimizer.param_groups, betas=(0.9, 0.95), fused=fused)
        for _ in range(3):
            policy(torch.linspace(-1, 1, 12).view(4, 3)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        results.append([parameter.detach() for parameter in policy.parameters()])
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)
