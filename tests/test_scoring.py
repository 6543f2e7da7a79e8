"""score() against its plain twin: the same numbers and gradients, from fewer tokens and no unread logits."""

import itertools
from dataclasses import replace

import pytest
import torch

from minicot import scoring
from minicot.data import Row, collate, to_groups
from minicot.losses import aft_loss, better_than, sequence_logps, token_logps
from minicot.model import ModelConfig, Transformer
from minicot.scoring import TwoParts, chunked_logps, common_beginning, pack, score, score_plain

CONFIG = ModelConfig(
    model_type="llama",
    vocab_size=60,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=256,
    rms_norm_eps=1e-5,
    rope_theta=1e4,
)


def model(dtype=torch.float32):
    made = Transformer(CONFIG, torch.Generator().manual_seed(0)).to(dtype)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.mul_(8 if parameter.dim() == 2 else 1)  # far from uniform, so that a wrong mask shows
    return made


def groups(shape, seed=0):
    """shape: a list of (prompt length, list of response lengths) -> groups of Rows of random tokens."""
    draw = torch.Generator().manual_seed(seed)
    text = lambda n: torch.randint(1, 60, (n,), generator=draw).tolist()
    made = []
    for b, (n_prompt, lengths) in enumerate(shape):
        prompt = text(n_prompt)
        made.append(
            [
                Row(f"p{b}", prompt + text(n), n_prompt, reward=float(k == 0), correct=k == 0)
                for k, n in enumerate(lengths)
            ]
        )
    return made


RAGGED = [(7, [3, 9, 1]), (2, [4]), (12, [2, 2, 2, 6]), (1, [5, 8])]
SFT = [(4, [6]), (1, [3]), (9, [2])]


def left_padded(batch):
    """The same batch with its padding on the left."""
    turned = {name: getattr(batch, name).clone() for name in ("ids", "loss_mask", "pad_mask")}
    for n, width in enumerate((~batch.pad_mask).sum(1).tolist()):
        for name in turned:
            turned[name][n] = turned[name][n].roll(width)
    return replace(batch, **turned)


def both(batch, dtype=torch.float32):
    """(log-probabilities, gradients) by score and by its plain twin under a loss that weighs each token."""
    weights = torch.randn(batch.ids.shape, generator=torch.Generator().manual_seed(1), dtype=dtype)
    found = []
    for function in (score, score_plain):
        policy = model(dtype)
        logps = function(policy, batch).masked_fill(~batch.loss_mask, 0)
        (logps * weights).sum().backward()
        found.append((logps.detach(), [parameter.grad for parameter in policy.parameters()]))
    return found


@pytest.mark.parametrize("shape", [RAGGED, SFT, [(5, [4, 4])]], ids=["ragged", "one row a group", "a pair"])
@pytest.mark.parametrize("side", ["right", "left"])
def test_score_equals_the_plain_path_with_gradients(shape, side):
    batch = collate(groups(shape), pad_id=0)
    batch = left_padded(batch) if side == "left" else batch
    (fast, fast_grads), (plain, plain_grads) = both(batch, torch.float64)
    torch.testing.assert_close(fast, plain, rtol=0, atol=1e-10)
    torch.testing.assert_close(fast_grads, plain_grads, rtol=1e-9, atol=1e-10)
    (fast, fast_grads), (plain, plain_grads) = both(batch)
    torch.testing.assert_close(fast, plain, rtol=0, atol=1e-4)  # logits here reach about 50


def test_an_alignment_loss_does_not_see_which_path_ran():
    batch, losses = collate(groups(RAGGED), pad_id=0), []
    for function in (score, score_plain):
        scores = to_groups(
            sequence_logps(function(model(torch.float64), batch), batch.loss_mask, reduce="mean"), batch
        )
        losses.append(aft_loss(scores, better_than(batch.rewards, batch.present)))
    torch.testing.assert_close(*losses, rtol=1e-10, atol=1e-12)


def test_a_prompt_is_computed_once_a_group_and_padding_never():
    packed = pack(collate(groups(RAGGED), pad_id=0))
    assert packed.ids.shape == (1, (7 + 13) + (2 + 4) + (12 + 12) + (1 + 13))
    assert packed.positions[0, : 7 + 3].tolist() == list(range(10))  # positions go on from the prompt's
    assert packed.positions[0, 10 : 10 + 9].tolist() == list(range(7, 16))
    sft = pack(collate(groups(SFT), pad_id=0))
    assert sft.ids.shape == (1, 10 + 4 + 11) and sft.prompt_at.shape == (3, 0)


def test_the_head_reads_only_what_predicts_a_scored_token():
    batch, seen, policy = collate(groups(RAGGED), pad_id=0), [], model()
    policy.head = lambda hidden: (seen.append(hidden.shape[0]), type(policy).head(policy, hidden))[1]
    score(policy, batch)
    assert max(seen) == int(batch.loss_mask.sum())


def test_each_token_sees_its_prompt_and_its_own_row_alone():
    packed = pack(collate(groups([(2, [1, 2]), (1, [2])]), pad_id=0))
    expected = [
        "10000000",
        "11000000",
        "11100000",
        "11010000",
        "11011000",  # prompt, row 0, row 1
        "00000100",
        "00000110",
        "00000111",
    ]  # the other group
    assert ["".join(map(str, row)) for row in packed.dense_mask().int().tolist()] == expected


def test_two_parts_and_flex_attention_agree_with_the_dense_mask():
    policy, packed = model(), pack(collate(groups(RAGGED), pad_id=0))
    attentions = [packed.dense_mask(), TwoParts(packed), packed.block_mask()]
    with torch.no_grad():
        dense, parts, flex = (
            policy.hidden_states(policy.embed(packed.ids), positions=packed.positions, attention=attention)
            for attention in attentions
        )
    torch.testing.assert_close(parts, dense, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(flex, dense, rtol=1e-5, atol=1e-5)


def test_responses_that_begin_alike_share_no_scored_token():
    row = lambda *response: Row("p", [5, 6, *response], 2)
    packed = pack(collate([[row(7, 8, 9), row(7, 8, 4)]], pad_id=0))
    assert packed.prompt_at.tolist() == [[0, 1]]
    assert common_beginning([[1, 2, 3], [1, 2, 3, 4]], 9) == 2  # a row keeps a token of its own
    assert common_beginning([[1, 2, 3], [1, 4, 3]], 9) == 1 and common_beginning([[1, 2]], 9) == 0


def test_prompts_that_were_tokenised_apart_share_only_what_is_equal():
    rows = [Row("p", [5, 6, 7, 8], 3), Row("p", [5, 9, 8], 2)]  # the boundary fell otherwise
    batch = collate([rows], pad_id=0)
    assert pack(batch).prompt_at.shape == (1, 1)
    (fast, _), (plain, _) = both(batch, torch.float64)
    torch.testing.assert_close(fast, plain, rtol=0, atol=1e-10)


@pytest.mark.parametrize("chunk", [1, 60 * 7, 60 * 100])
def test_chunks_change_neither_values_nor_gradients(chunk, monkeypatch):
    monkeypatch.setattr(scoring, "CHUNK", chunk)
    draw = torch.Generator().manual_seed(3)
    weight, hidden = torch.randn(60, 16, generator=draw), torch.randn(23, 16, generator=draw)
    ids, found = torch.randint(0, 60, (23,), generator=draw), []
    for chunks in (True, False):
        w, h = weight.clone().requires_grad_(), hidden.clone().requires_grad_()
        head = lambda x: x @ w.T
        if chunks:
            logps = chunked_logps(head, h, ids)
        else:  # the plain twin: the shifted, all-logits path
            logits, shifted = torch.cat([head(h), head(h)[:1]]), torch.cat([ids[:1], ids])
            logps = token_logps(logits[None], shifted[None])[0, 1:]
        logps.square().sum().backward()
        found.append((logps.detach(), w.grad, h.grad))
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-4)


def test_a_chunk_keeps_no_logits_for_backward(monkeypatch):
    monkeypatch.setattr(scoring, "CHUNK", 60 * 4)
    kept = []
    weight, hidden = torch.randn(60, 16, requires_grad=True), torch.randn(64, 16, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: (kept.append(x.numel()), x)[1], lambda x: x):
        chunked_logps(lambda x: x @ weight.T, hidden, torch.zeros(64, dtype=torch.long))
    assert max(itertools.chain(kept, [0])) <= 64 * 16 + 60 * 16
