"""The training loop: accumulation is the big batch, a resumed run is the same run, bad input ends in one
line."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from minicot.config import TrainConfig, parse
from minicot.model import ModelConfig, Transformer
from minicot.training import load_checkpoint, lr_at, make_optimizer, save_checkpoint
from tests.helpers import assert_one_line_error, script

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
    return script(
        "train.py",
        "--init",
        base / "config.json",
        "--limit",
        60,
        "--batch-size",
        8,
        "--steps",
        6,
        "--device",
        "cpu",
        "--eval-split",
        "",
        "--out",
        out,
        *argv,
        cwd=cwd,
    )


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
        (["--task", "rl"], ["--task", "rl"]),
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
