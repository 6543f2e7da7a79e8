"""Every path that a GPU takes: score by FlexAttention, generation, the three scripts, pictures; and the same
numbers as on the CPU. Skipped without a GPU.

    MINICOT_CUDA_TESTS_ON=cpu python -m pytest tests/test_cuda.py

runs the bodies on a CPU, where score takes its two-part attention. What only a GPU has is not run then: the
fused attention kernels, FlexAttention's kernels forward and backward, CUDA's memory. (FlexAttention has no
backward on a CPU; its forward, compiled, is in test_scoring.py.)
"""

import json
import os
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask

from minicot.data import Row, collate
from minicot.model import ModelConfig, Transformer
from minicot.records import Response, Samples, read_samples, samples_to_row
from minicot.sampling import generate
from minicot.scoring import TwoParts, hidden_at, hidden_plain, pack, score, score_plain
from minicot.sets import read_problems
from minicot.training import set_layers
from minicot.vision import VisionConfig, VisionLanguageConfig, VisionLanguageModel
from tests.helpers import script

DEVICE = os.environ.get("MINICOT_CUDA_TESTS_ON", "cuda")
needs_kernels = pytest.mark.skipif(DEVICE == "cpu", reason="a CUDA kernel")
pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(DEVICE == "cuda" and not torch.cuda.is_available(), reason="needs a CUDA device"),
]
IMAGE_ID = 96
CONFIG = ModelConfig(
    model_type="llama",
    vocab_size=97,
    hidden_size=128,
    intermediate_size=256,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
    max_position_embeddings=1024,
    rms_norm_eps=1e-5,
    rope_theta=1e4,
    initializer_range=0.1,
)
VISION = VisionLanguageConfig(
    CONFIG,
    VisionConfig(
        model_type="clip_vision_model",
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=16,
        patch_size=4,
        num_channels=3,
        hidden_act="quick_gelu",
        layer_norm_eps=1e-5,
        position_initializer_range=0.5,
    ),
    IMAGE_ID,
    vision_feature_layer=-1,
)


def model(sees, device=DEVICE, dtype=torch.float32):
    kind, config = (VisionLanguageModel, VISION) if sees else (Transformer, CONFIG)
    return kind(config, torch.Generator().manual_seed(0)).to(device, dtype)


def batch_of(shape, pictures=None, device=DEVICE):
    """shape: (prompt length, response lengths) of each group -> a Batch of random tokens on the device;
    pictures: how many stand in each group's prompt."""
    draw, groups = torch.Generator().manual_seed(1), []
    text = lambda n: torch.randint(1, IMAGE_ID, (n,), generator=draw).tolist()
    counts = pictures or [0] * len(shape)
    for b, ((n_prompt, lengths), count) in enumerate(zip(shape, counts)):
        prompt = text(n_prompt) + [IMAGE_ID] * (VISION.image_seq_length * count)
        groups.append(
            [Row(f"p{b}", prompt + text(n), len(prompt), reward=float(k == 0)) for k, n in enumerate(lengths)]
        )
    batch = collate(groups, pad_id=0)
    if pictures:
        images = torch.randn(sum(counts), 3, 16, 16, generator=draw)
        image_group = torch.tensor([b for b, count in enumerate(counts) for _ in range(count)])
        batch = replace(batch, images=images, image_group=image_group)
    return batch.to(device)


# ---- the model -----------------------------------------------------------------------------------


def test_logits_and_greedy_tokens_are_those_of_the_cpu():
    here = model(False, "cpu")
    ids = torch.randint(0, 97, (3, 40), generator=torch.Generator().manual_seed(1))
    pad_mask = torch.arange(40) >= torch.tensor([[0], [7], [20]])
    prompts = [row[mask].tolist() for row, mask in zip(ids, pad_mask)]
    options = dict(max_new_tokens=32, temperature=0, stop_ids=[], seed=0)
    expected, drawn, there = here(ids, pad_mask=pad_mask), generate(here, prompts, **options), model(False)
    logits = there(ids.to(DEVICE), pad_mask=pad_mask.to(DEVICE)).cpu()
    assert (expected - logits)[pad_mask].abs().max() <= 1e-3  # other summation orders, TF32 off by default
    assert generate(there, prompts, **options) == drawn


@needs_kernels
@pytest.mark.parametrize("padded", [False, True])
def test_attention_takes_a_fused_kernel_in_bfloat16(padded):
    policy = model(False, dtype=torch.bfloat16)
    ids = torch.randint(0, 97, (2, 64), device="cuda")
    pad_mask = torch.arange(64, device="cuda") >= torch.tensor([[0], [9]], device="cuda") if padded else None
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]):
        policy(ids, pad_mask=pad_mask).sum().backward()  # raises where only the unfused kernel would do


@pytest.mark.parametrize("sees", [False, True], ids=["text", "pictures"])
@pytest.mark.parametrize("n", [1, 3])
def test_samples_are_those_of_the_cpu(n, sees):
    """In float64, so that no token is drawn otherwise for another rounding; slots are refilled."""
    draw = torch.Generator().manual_seed(2)
    pictures = [torch.randn(3, 16, 16, generator=draw, dtype=torch.float64) for _ in range(4)]
    images = [[pictures[0]], [], pictures[1:3], [pictures[3]], []] if sees else None
    prompts = [
        torch.randint(1, IMAGE_ID, (4 + 3 * b,), generator=draw).tolist()
        + [IMAGE_ID] * (VISION.image_seq_length * len(images[b]) if sees else 0)
        for b in range(5)
    ]
    options = dict(n=n, max_new_tokens=12, top_k=50, top_p=0.95, stop_ids=[3], seed=5, max_rows=2 * n)
    on = lambda device: generate(model(sees, device, torch.float64), prompts, images=images, **options)
    expected = on("cpu")
    assert on(DEVICE) == expected and len({str(row) for rows in expected for row in rows}) == 5 * n


# ---- score ---------------------------------------------------------------------------------------

SHAPES = {  # of one block of the mask, of some with whole ones among them, of rows without a shared prompt
    "ragged": [(7, [3, 9, 1]), (2, [4]), (12, [2, 2, 2, 6]), (1, [5, 8])],
    "long": [(300, [90, 40, 130, 7]), (20, [3]), (150, [200, 180])],
    "128 tokens": [(64, [32, 32])],
    "one row a group": [(40, [60]), (130, [3]), (9, [200])],
}
PICTURES = {"ragged": [2, 0, 1, 1], "long": [1, 0, 2], "128 tokens": [0], "one row a group": [1, 1, 0]}


def log_probabilities_and_gradients(function, sees, batch, dtype):
    policy = model(sees)
    with torch.autocast(DEVICE, torch.bfloat16, enabled=dtype == torch.bfloat16):
        logps = function(policy, batch).masked_fill(~batch.loss_mask, 0)
    weights = torch.linspace(-1, 1, logps.numel(), device=DEVICE).view_as(logps)
    (logps.float() * weights).sum().backward()
    return logps.detach().float(), {n: p.grad for n, p in policy.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("sees", [False, True], ids=["text", "pictures"])
@pytest.mark.parametrize("shape", SHAPES)
def test_score_is_score_plain_with_gradients(shape, sees, dtype):
    batch = batch_of(SHAPES[shape], PICTURES[shape] if sees and any(PICTURES[shape]) else None)
    (fast, fast_grads), (plain, plain_grads) = (
        log_probabilities_and_gradients(function, sees, batch, dtype) for function in (score, score_plain)
    )
    values, gradients = (1e-4, 1e-3) if dtype == torch.float32 else (0.05, 0.05)
    # bfloat16 has 8 bits: the mean over tokens is far closer than the worst token
    assert (fast - plain).abs().sum() <= values * plain.abs().sum()
    assert fast_grads.keys() == plain_grads.keys()
    apart = sum((fast_grads[name] - g).double().square().sum() for name, g in plain_grads.items()).sqrt()
    length = sum(g.double().square().sum() for g in plain_grads.values()).sqrt()
    assert apart <= gradients * length, f"gradients {apart / length:.1e} apart"


def test_hidden_states_at_shared_places_have_their_gradients():
    batch = batch_of(SHAPES["long"])
    places = batch.pad_mask & (torch.arange(batch.ids.shape[1], device=DEVICE) % 3 == 0)
    results = []
    for hidden in (lambda p: hidden_at(p, batch, places), lambda p: hidden_plain(p, batch)[places]):
        policy = model(False)
        states = hidden(policy)
        (states * torch.linspace(-1, 1, states.numel(), device=DEVICE).view_as(states)).sum().backward()
        results.append([states.detach(), *(p.grad for p in policy.parameters() if p.grad is not None)])
    for fast, plain in zip(*results):
        assert (fast - plain).norm() <= 1e-3 * plain.norm()


def test_the_block_mask_is_that_of_create_block_mask():
    packed = pack(batch_of(SHAPES["long"]))
    L = len(packed.row)
    ours, whole = packed.block_mask(), create_block_mask(packed.visible(), None, None, L, L, device=DEVICE)
    for name in ("kv_num_blocks", "kv_indices", "full_kv_num_blocks", "full_kv_indices", "q_indices"):
        assert torch.equal(getattr(ours, name), getattr(whole, name)), name
    assert torch.equal(ours.to_dense(), whole.to_dense())


@needs_kernels
def test_flex_attention_agrees_with_the_two_parts():
    policy, packed = model(False), pack(batch_of(SHAPES["long"]))
    with torch.no_grad():
        flex, parts = (
            policy.hidden_states(policy.embed(packed.ids), positions=packed.positions, attention=attention)
            for attention in (packed.block_mask(), TwoParts(packed))
        )
    torch.testing.assert_close(flex, parts, rtol=1e-3, atol=1e-3)


@needs_kernels
def test_a_long_row_is_scored_in_little_memory():
    """33,000 tokens: the (L,L) mask alone took 11 GB."""
    policy, batch = model(False), batch_of([(500, [500] * 13)] * 5)
    assert pack(batch).ids.shape[1] > 32_000
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with torch.no_grad():
        score(policy, batch)
    assert torch.cuda.max_memory_allocated() - before < 2e9


@needs_kernels
@pytest.mark.parametrize("shape", ["ragged", "one row a group"])
def test_compiled_layers_compute_what_plain_ones_do(shape):
    compiled, plain, batch = model(False), model(False), batch_of(SHAPES[shape])
    set_layers(compiled, compile=True)
    found, expected = score(compiled, batch), score_plain(plain, batch).masked_fill(~batch.loss_mask, 0)
    assert (found - expected).abs().sum() <= 1e-4 * expected.abs().sum()
    found.sum().backward()
    expected.sum().backward()
    for ours, theirs in zip(compiled.parameters(), plain.parameters()):
        assert (ours.grad - theirs.grad).norm() <= 1e-3 * theirs.grad.norm()
    prompts, options = [[5, 9, 2], [7], [11, 3, 8]], dict(n=3, max_new_tokens=70, stop_ids=[3], seed=5)
    compiled, plain = compiled.double(), plain.double()  # drawn as without rounding
    assert generate(compiled, prompts, **options) == generate(plain, prompts, **options)


# ---- the scripts ---------------------------------------------------------------------------------


def run(name, *argv, cwd, device=DEVICE):
    done = script(name, *argv, "--device", device, cwd=cwd)
    assert done.returncode == 0, done.stderr
    return done.stdout


def losses(folder):
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def same_weights(one, other):
    one, other = (load_file(folder / "model.safetensors") for folder in (one, other))
    assert one.keys() == other.keys()
    return all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture
def samples(tmp_path):
    """samples.jsonl of toy problems, two right and two wrong responses each; and with pictures."""
    for data in ("toy", "toy-pictures"):
        lines = []
        for problem in read_problems(data, "train", limit=16):
            *steps, last = problem.solution.split("\n")
            right = [Response("\n".join([*steps[::-1], last]), True), Response(last, True)]
            wrong = [Response(f"{steps[0]}\n#### {int(problem.answer) + k}", False) for k in (1, 2)]
            lines.append(json.dumps(samples_to_row(Samples(problem, right + wrong))) + "\n")
        (tmp_path / f"{data}.jsonl").write_text("".join(lines))
    return tmp_path


BASES = {"toy": "toy", "toy-pictures": "toy-vision"}
METHODS = {
    "dpo": ["--pair-low", 0, "--pair-high", 1, "--constraint", "detached"],
    "aft": ["--constraint", "boundary", "--margin", 0.1],
}


def test_training_in_bfloat16_lowers_the_loss(tmp_path):
    argv = ["--limit", 2000, "--steps", 30, "--batch-size", 16, "--save-every", 0, "--dtype", "bfloat16"]
    argv += ["--out", "out"]
    run("train.py", *argv, cwd=tmp_path)
    curve = losses(tmp_path / "out")
    assert sum(curve[-5:]) < 0.5 * sum(curve[:5])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("data", BASES)
def test_training_follows_the_cpus_curve(data, dtype, tmp_path):
    argv = ["--init", BASES[data], "--data", data, "--limit", 64, "--steps", 8, "--batch-size", 8]
    argv += ["--lr", 3e-4, "--save-every", 0, "--mode", "both"]
    run("train.py", *argv, "--dtype", dtype, "--out", "there", cwd=tmp_path)
    run("train.py", *argv, "--out", "here", cwd=tmp_path, device="cpu")
    expected = pytest.approx(losses(tmp_path / "here"), rel=1e-3 if dtype == "float32" else 3e-2)
    assert losses(tmp_path / "there") == expected


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("data", BASES)
@pytest.mark.parametrize("method", METHODS)
def test_alignment_follows_the_cpus_curve(method, data, dtype, samples):
    argv = ["--method", method, *METHODS[method], "--init", BASES[data], "--samples", f"{data}.jsonl"]
    argv += ["--steps", 4, "--batch-size", 4, "--lr", 1e-4, "--save-every", 0]
    run("align.py", *argv, "--dtype", dtype, "--out", "there", cwd=samples)
    run("align.py", *argv, "--out", "here", cwd=samples, device="cpu")
    expected = pytest.approx(losses(samples / "here"), rel=2e-3 if dtype == "float32" else 5e-2)
    assert losses(samples / "there") == expected


@pytest.mark.parametrize("data", BASES)
def test_a_resumed_training_ends_with_the_same_bits(data, tmp_path):
    argv = ["--init", BASES[data], "--data", data, "--limit", 48, "--steps", 6, "--batch-size", 8]
    argv += ["--dtype", "bfloat16"]
    run("train.py", *argv, "--out", "whole", cwd=tmp_path)
    run("train.py", *argv, "--out", "halves", "--stop-at", 3, cwd=tmp_path)
    run("train.py", *argv, "--out", "halves", "--resume", cwd=tmp_path)
    assert losses(tmp_path / "whole") == losses(tmp_path / "halves")
    assert same_weights(tmp_path / "whole", tmp_path / "halves")


@pytest.mark.parametrize("method", METHODS)
def test_a_resumed_alignment_ends_with_the_same_bits(method, samples):
    argv = ["--method", method, *METHODS[method], "--init", "toy", "--samples", "toy.jsonl"]
    argv += ["--steps", 6, "--batch-size", 4, "--lr", 1e-4, "--dtype", "bfloat16"]
    run("align.py", *argv, "--out", "whole", cwd=samples)
    run("align.py", *argv, "--out", "halves", "--stop-at", 3, cwd=samples)
    run("align.py", *argv, "--out", "halves", "--resume", cwd=samples)
    assert losses(samples / "whole") == losses(samples / "halves")
    assert same_weights(samples / "whole", samples / "halves")


@pytest.mark.parametrize("data", BASES)
def test_sample_draws_what_it_draws_on_the_cpu(data, tmp_path):
    argv = ["--model", BASES[data], "--data", data, "--limit", 4, "--n", 3, "--max-new-tokens", 16]
    argv += ["--dtype", "float64", "--batch-size", 6]
    for out, device in (("there.jsonl", DEVICE), ("here.jsonl", "cpu")):
        run("sample.py", *argv, "--out", out, cwd=tmp_path, device=device)
    assert read_samples(tmp_path / "there.jsonl") == read_samples(tmp_path / "here.jsonl")


@pytest.mark.parametrize("data", BASES)
def test_verifier_and_assessment_say_what_they_say_on_the_cpu(data, samples):
    tune = ["--data", data, "--limit", 16, "--steps", 4, "--batch-size", 4, "--lr", 1e-4, "--save-every", 0]
    run("train.py", "--init", BASES[data], *tune, "--out", "tuned", cwd=samples)
    scores, assessed = {}, {}
    for device in dict.fromkeys([DEVICE, "cpu"]):
        common = ["--samples", f"{data}.jsonl", "--batch-size", 3]  # cuts every group
        pair = ["--verifier", "tuned", "--ref", BASES[data]]
        run("sample.py", *pair, *common, "--out", f"{device}.jsonl", cwd=samples, device=device)
        own = ["--assess", "--model", "tuned", "--out", f"{device}.json"]
        run("sample.py", *own, *common, cwd=samples, device=device)
        scored = read_samples(samples / f"{device}.jsonl")
        scores[device] = [r.scores["dpo"] for group in scored for r in group.responses]
        assessed[device] = json.loads((samples / f"{device}.json").read_text())
    assert scores[DEVICE] == pytest.approx(scores["cpu"], abs=1e-3) and len(set(scores["cpu"])) > 32
    for name in ("reference_nlls", *(("scores", b) for b in range(16))):
        one, other = (
            judged[name] if isinstance(name, str) else judged[name[0]][name[1]]
            for judged in (assessed[DEVICE], assessed["cpu"])
        )
        assert one == pytest.approx(other, abs=1e-3)
