"""What only a GPU can show: the same numbers as on the CPU, the fused attention, bf16 training. Skipped
without one."""

import json

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from minicot.model import ModelConfig, Transformer
from minicot.sampling import generate
from tests.helpers import script

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
CONFIG = ModelConfig(
    model_type="llama",
    vocab_size=97,
    hidden_size=128,
    intermediate_size=256,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
    max_position_embeddings=256,
    rms_norm_eps=1e-5,
    rope_theta=1e4,
    initializer_range=0.2,
)


def test_logits_and_greedy_ids_are_those_of_the_cpu():
    model = Transformer(CONFIG, torch.Generator().manual_seed(0))
    ids = torch.randint(0, 97, (3, 40), generator=torch.Generator().manual_seed(1))
    pad_mask = torch.arange(40) >= torch.tensor([[0], [7], [20]])
    prompts = [row[mask].tolist() for row, mask in zip(ids, pad_mask)]
    options = dict(max_new_tokens=32, temperature=0, stop_ids=[], seed=0)
    here, drawn = model(ids, pad_mask=pad_mask), generate(model, prompts, **options)
    model.cuda()
    there = model(ids.cuda(), pad_mask=pad_mask.cuda()).cpu()
    assert (here - there)[pad_mask].abs().max() <= 1e-3  # other summation orders, TF32 off by default
    assert generate(model, prompts, **options) == drawn


@pytest.mark.parametrize("padded", [False, True])
def test_attention_takes_a_fused_kernel_in_bfloat16(padded):
    model = Transformer(CONFIG, torch.Generator().manual_seed(0)).cuda().bfloat16()
    ids = torch.randint(0, 97, (2, 64), device="cuda")
    pad_mask = torch.arange(64, device="cuda") >= torch.tensor([[0], [9]], device="cuda") if padded else None
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]):
        model(ids, pad_mask=pad_mask).sum().backward()  # raises where only the unfused kernel would do


def test_training_in_bfloat16_lowers_the_loss(tmp_path):
    argv = ["--limit", 2000, "--steps", 30, "--save-every", 0, "--device", "cuda", "--dtype", "bfloat16"]
    done = script("train.py", *argv, "--out", "out", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    lines = (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()
    losses = [json.loads(line)["loss"] for line in lines]
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])
