"""The decoder against transformers on every family, against a naive twin, and against its own promises."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
import transformers

from minicot.families import parse_config
from minicot.model import KVCache, ModelConfig, Transformer, attend, attention_mask, rope_frequencies
from minicot.weights import load_model

SIZES = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
PLAIN = {"rope_type": "default", "rope_theta": 1e6}
FAMILIES = {
    "llama": ("Llama", {}),
    "llama-mha-tied": ("Llama", {"num_key_value_heads": 4, "tie_word_embeddings": True}),
    "llama-mqa-biases": ("Llama", {"num_key_value_heads": 1, "attention_bias": True, "mlp_bias": True}),
    "llama3.1": ("Llama", {"rope_parameters": LLAMA3}),
    "llama3.2-head-dim": ("Llama", {"rope_parameters": LLAMA3, "head_dim": 16, "tie_word_embeddings": True}),
    "mistral": ("Mistral", {"sliding_window": None, "rope_parameters": PLAIN}),
    "qwen2": ("Qwen2", {"rope_parameters": PLAIN}),
    "qwen2-tied": ("Qwen2", {"tie_word_embeddings": True, "num_key_value_heads": 1}),
    "qwen3": ("Qwen3", {"head_dim": 24, "tie_word_embeddings": True}),
    "qwen3-biases": ("Qwen3", {"head_dim": 8, "attention_bias": True}),
}


def oracle(name, **changes):
    """A random transformers model of a family, its norms and biases random too and its weights so large
    that attention is far from uniform and logits are of order 1."""
    family, options = FAMILIES[name]
    config = getattr(transformers, f"{family}Config")(**SIZES | options | changes)
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(0, 0.15)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return model


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request, tmp_path_factory):
    """(transformers model, minicot model) with the same weights, through the former's own folder."""
    theirs = oracle(request.param)
    folder = tmp_path_factory.mktemp("model")
    theirs.save_pretrained(folder)
    return theirs, load_model(folder).eval()


def tiny(**changes):
    config = ModelConfig("llama", 97, 48, 80, 3, 4, 2, 12, 256, 1e-5, 10_000.0, initializer_range=0.15)
    return Transformer(replace(config, **changes), torch.Generator().manual_seed(0)).eval()


def random_ids(rows, length, seed=0):
    return torch.randint(0, 97, (rows, length), generator=torch.Generator().manual_seed(seed))


def padded(lengths, side):
    """pad_mask (N,T) of rows of these lengths."""
    steps = torch.arange(max(lengths))[None]
    lengths = torch.tensor(lengths)[:, None]
    return steps < lengths if side == "right" else steps >= steps.shape[1] - lengths


# ---- against transformers ----------------------------------------------------


@torch.no_grad()
def test_logits_equal_transformers_on_every_family(pair):
    theirs, ours = pair
    ids = random_ids(3, 50)
    expected = theirs(ids).logits
    assert expected.std() > 0.3  # else a small difference would say nothing
    assert (ours(ids) - expected).abs().max() <= 1e-5


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_padded_prefill_and_cached_decode_equal_transformers(pair, side):
    theirs, ours = pair
    pad_mask = padded([20, 7, 13], side)
    ids = random_ids(3, 20)
    positions = (pad_mask.cumsum(1) - 1).clamp(min=0)
    expected = theirs(ids, attention_mask=pad_mask.long(), position_ids=positions, use_cache=True)
    cache = KVCache(ours.config, 3, 30)
    logits = ours.head(ours.hidden_states(ours.embed(ids), pad_mask=pad_mask, cache=cache))
    assert (logits - expected.logits)[pad_mask].abs().max() <= 1e-5
    past, seen, positions = expected.past_key_values, pad_mask.long(), positions.amax(1, keepdim=True)
    for step in range(5):
        new = random_ids(3, 1, seed=step)
        seen, positions = torch.cat((seen, torch.ones(3, 1, dtype=torch.long)), 1), positions + 1
        expected = theirs(new, attention_mask=seen, position_ids=positions, past_key_values=past)
        logits = ours.head(ours.hidden_states(ours.embed(new), cache=cache))
        assert (logits - expected.logits).abs().max() <= 1e-5


@torch.no_grad()
def test_greedy_ids_equal_transformers_generate_over_64_tokens(pair):
    theirs, ours = pair
    pad_mask = padded([9, 4], "left")
    ids = random_ids(2, 9, seed=3)
    expected = theirs.generate(
        ids,
        attention_mask=pad_mask.long(),
        do_sample=False,
        max_new_tokens=64,
        min_new_tokens=64,
        pad_token_id=0,
        eos_token_id=None,
    )[:, 9:]
    cache, new = KVCache(ours.config, 2, 9 + 64), []
    logits = ours.head(ours.hidden_states(ours.embed(ids), pad_mask=pad_mask, cache=cache))
    for _ in range(64):
        new.append(logits[:, -1:].argmax(-1))
        logits = ours.head(ours.hidden_states(ours.embed(new[-1]), cache=cache))
    assert torch.equal(torch.cat(new, 1), expected)


def test_gradients_equal_transformers(pair):
    theirs, ours = pair
    ids = random_ids(2, 12)
    theirs(ids).logits.square().mean().backward()
    ours(ids).square().mean().backward()
    expected = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    for name, parameter in ours.named_parameters():
        # absolute to the gradient's own size: a sum of 24 positions in another order
        assert (parameter.grad - expected[name]).abs().max() <= 1e-5 * expected[name].abs().max() + 1e-7, name
    theirs.zero_grad()
    ours.zero_grad()


@torch.no_grad()
def test_llama3_frequencies_stretch_long_waves_only():
    config = parse_config(oracle("llama3.1").config.to_dict(), "here")
    plain = rope_frequencies(replace(config, rope_scaling=None))
    ratio = plain / rope_frequencies(config)
    wavelength = 2 * torch.pi / plain
    assert torch.allclose(ratio[wavelength < 32 / 4], torch.tensor(1.0))
    assert torch.allclose(ratio[wavelength > 32 / 1], torch.tensor(8.0))
    assert ((ratio >= 1) & (ratio <= 8 + 1e-5)).all()


# ---- against a naive twin ----------------------------------------------------


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("mask", ["causal", "left", "custom", "decode"])
def test_attention_equals_a_loop_over_rows_heads_and_queries(kv_heads, mask):
    generator = torch.Generator().manual_seed(1)
    T, S = (1, 6) if mask == "decode" else (6, 6)
    q = torch.randn(2, 4, T, 8, generator=generator, dtype=torch.float64)
    k, v = (torch.randn(2, kv_heads, S, 8, generator=generator, dtype=torch.float64) for _ in range(2))
    real = padded([6, 3], "left") if mask in ("left", "decode") else None
    custom = torch.rand(2, 1, T, S, generator=generator) < 0.6 if mask == "custom" else None
    out = attend(q, k, v, attention_mask(custom, real, T, S, q.device))
    for n in range(2):
        for h in range(4):
            for t in range(T):
                if custom is not None:
                    seen = [s for s in range(S) if custom[n, 0, t, s]]
                else:
                    seen = [s for s in range(S - T + t + 1) if real is None or real[n, s]]
                if not seen:
                    assert out[n, h, t].isfinite().all()
                    continue
                keys, values = k[n, h * kv_heads // 4, seen], v[n, h * kv_heads // 4, seen]
                expected = torch.softmax(keys @ q[n, h, t] / 8**0.5, dim=0) @ values
                assert torch.allclose(out[n, h, t], expected, atol=1e-12)


# ---- its own promises ----------------------------------------------------


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kv_heads", [2, 4])
@torch.no_grad()
def test_cached_pieces_equal_one_full_forward(side, kv_heads):
    model, lengths = tiny(num_key_value_heads=kv_heads).double(), [9, 5, 2]
    pad_mask, ids, new = padded(lengths, side), random_ids(3, 9), random_ids(3, 6, seed=1)
    cache = KVCache(model.config, 3, 15, dtype=torch.float64)
    hidden = [model.hidden_states(model.embed(ids), pad_mask=pad_mask, cache=cache)[:, -1:]]
    for piece in (new[:, :1], new[:, 1:4], new[:, 4:]):  # one at a time and several at a time
        hidden.append(model.hidden_states(model.embed(piece), cache=cache))
    cached = model.head(torch.cat(hidden, 1))[:, 1:]
    for row in range(3):
        whole = torch.cat((ids[row][pad_mask[row]], new[row]))[None]
        assert torch.allclose(cached[row], model(whole)[0, -6:], atol=1e-12)


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_padding_changes_nothing_and_its_content_reaches_nobody(side):
    model, pad_mask, ids = tiny().double(), padded([9, 5, 2], side), random_ids(3, 9)
    logits = model(ids, pad_mask=pad_mask)
    assert logits.isfinite().all()
    other = model(torch.where(pad_mask, ids, 96 - ids), pad_mask=pad_mask)
    assert torch.equal(logits[pad_mask], other[pad_mask])
    for row in range(3):
        alone = model(ids[row][pad_mask[row]][None])[0]
        assert torch.allclose(logits[row][pad_mask[row]], alone, atol=1e-12)


@torch.no_grad()
def test_right_padding_may_be_left_out_of_the_mask():
    model, pad_mask, ids = tiny(), padded([9, 5], "right"), random_ids(2, 9)
    assert torch.equal(model(ids)[pad_mask], model(ids, pad_mask=pad_mask)[pad_mask])
    assert attention_mask(None, pad_mask, 9, 9, "cpu") is None  # so the fused kernels get is_causal


@torch.no_grad()
def test_an_empty_row_and_a_padded_query_are_finite_and_harm_no_gradient():
    model, ids = tiny(), random_ids(3, 6)
    pad_mask = padded([6, 3, 0], "left")
    with torch.enable_grad():
        logits = model(ids, pad_mask=pad_mask)
        logits[pad_mask].sum().backward()
    assert logits.isfinite().all()
    # not every kernel survives a query that may see nothing, so none may be asked to
    assert attention_mask(None, pad_mask, 6, 6, "cpu").expand(3, 1, 6, 6).any(-1).all()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


@torch.no_grad()
def test_selecting_cache_rows_keeps_reorders_and_repeats_them():
    model, ids, new = tiny(), random_ids(3, 7), random_ids(4, 1, seed=1)
    pad_mask = padded([7, 4, 6], "left")
    rows = torch.tensor([2, 0, 0, 1])
    cache, repeated = KVCache(model.config, 3, 8), KVCache(model.config, 4, 8)
    model.hidden_states(model.embed(ids), pad_mask=pad_mask, cache=cache)
    cache.select(rows)
    model.hidden_states(model.embed(ids[rows]), pad_mask=pad_mask[rows], cache=repeated)
    ours, expected = (model.hidden_states(model.embed(new), cache=c) for c in (cache, repeated))
    assert torch.allclose(ours, expected, atol=1e-6)
    assert cache.length == 8
    cache.select(torch.tensor([True, False, False, True]))
    assert cache.keys[0].shape[0] == cache.real.shape[0] == 2


@torch.no_grad()
def test_a_cache_that_is_full_or_of_other_rows_is_refused():
    model = tiny()
    with pytest.raises(AssertionError, match="3 rows x 4 got 3 rows x 5"):
        model.hidden_states(model.embed(random_ids(3, 5)), cache=KVCache(model.config, 3, 4))
    with pytest.raises(AssertionError, match="got 2 rows"):
        model.hidden_states(model.embed(random_ids(2, 3)), cache=KVCache(model.config, 3, 4))


@torch.no_grad()
def test_a_custom_mask_packs_two_sequences_in_one_row():
    model, ids = tiny().double(), random_ids(1, 9)
    segment = torch.tensor([0] * 4 + [1] * 5)
    mask = (segment[:, None] == segment[None]).tril()
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]])
    packed = model.head(model.hidden_states(model.embed(ids), positions=positions, attention=mask))
    apart = torch.cat((model(ids[:, :4]), model(ids[:, 4:])), 1)
    assert torch.allclose(packed, apart, atol=1e-12)


@pytest.mark.filterwarnings("ignore")
@torch.no_grad()
def test_a_block_mask_does_what_the_bool_mask_does():
    from torch.nn.attention.flex_attention import create_block_mask

    model, ids, segment = tiny(), random_ids(1, 128), torch.arange(128) // 50
    positions = (torch.arange(128) % 50)[None]

    def seen(b, h, q, k):
        return (q >= k) & (segment[q] == segment[k])

    block = create_block_mask(seen, None, None, 128, 128, "cpu")
    mask = (segment[:, None] == segment[None]).tril()
    ours, expected = (
        model.hidden_states(model.embed(ids), positions=positions, attention=attention)
        for attention in (block, mask)
    )
    assert torch.allclose(ours, expected, atol=1e-5)


@torch.no_grad()
def test_the_future_is_not_seen():
    model, ids = tiny(), random_ids(1, 10)
    changed = ids.clone()
    changed[0, 6:] = 96 - changed[0, 6:]
    difference = (model(ids) - model(changed)).abs().amax(-1)[0]
    assert difference[:6].max() == 0
    assert difference[6:].min() > 0


@torch.no_grad()
def test_bfloat16_runs_and_stays_near_float32():
    model, ids = tiny(), random_ids(2, 30)
    pad_mask = padded([30, 11], "left")
    expected = model(ids, pad_mask=pad_mask)[pad_mask]
    logits = model.to(torch.bfloat16)(ids, pad_mask=pad_mask)[pad_mask]
    assert logits.dtype == torch.bfloat16
    # 8 bits of mantissa: 2^-8 a rounding, some tens of them in a row
    assert (logits.float() - expected).abs().max() < 0.05 * expected.abs().max()
    cache = KVCache(model.config, 2, 40, dtype=torch.bfloat16)
    cached = model.head(model.hidden_states(model.embed(ids), pad_mask=pad_mask, cache=cache))
    assert torch.equal(cached[pad_mask], logits)


@torch.no_grad()
def test_float64_is_float64_all_the_way():
    """A float32 step anywhere would leave a difference of about 1e-7 between two ways to the same logits."""
    model, ids = tiny(qk_norm=True, qkv_bias=True).double(), random_ids(1, 40)
    logits = model(ids)
    assert logits.dtype == torch.float64
    cos = torch.tensor([39.0], dtype=torch.float64) * rope_frequencies(model.config, dtype=torch.float64)
    assert cos.dtype == torch.float64
    shifted = model.head(model.hidden_states(model.embed(ids), positions=torch.arange(1000, 1040)[None]))
    assert torch.allclose(logits, shifted, atol=1e-11)  # rotary attention depends on distances only


def test_gradient_reaches_every_parameter():
    model = tiny(qk_norm=True, qkv_bias=True, o_bias=True, mlp_bias=True)
    logits = model(random_ids(2, 8), pad_mask=padded([8, 5], "left"))
    logits.logsumexp(-1).sum().backward()
    for name, parameter in model.named_parameters():
        if "k_proj.bias" not in name or model.config.qk_norm:  # without a norm, softmax is blind to it
            assert parameter.grad.abs().sum() > 0, name


def test_random_weights_come_from_the_generator_alone():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    a, b = tiny(), tiny()
    assert torch.equal(torch.get_rng_state(), before)
    for (name, x), y in zip(a.named_parameters(), b.parameters(), strict=True):
        assert torch.equal(x, y), name
    assert abs(a.model.embed_tokens.weight.std() - 0.15) < 0.01
    with torch.device("meta"):
        assert all(parameter.is_meta for parameter in tiny().parameters())


@pytest.mark.parametrize("rows", [1, 2, 6])
@pytest.mark.parametrize("tied", [True, False])
def test_a_wide_head_a_block_at_a_time_equals_the_plain_product(monkeypatch, rows, tied):
    model = tiny(tie_word_embeddings=tied)
    hidden = torch.randn(rows, 1, model.config.hidden_size, generator=torch.Generator().manual_seed(1))
    plain = model.head(hidden)
    assert plain.requires_grad
    blocks, linear = [], F.linear
    monkeypatch.setattr("minicot.model.WIDE", 0)
    monkeypatch.setattr("minicot.model.BLOCK", 40)
    monkeypatch.setattr(F, "linear", lambda x, w: (blocks.append(len(w)), linear(x, w))[1])
    with torch.no_grad():
        found = model.head(hidden)
    V = model.config.vocab_size
    assert blocks == ([V] if rows == 1 else [40] * (V // 40) + [V % 40] * (V % 40 > 0))
    torch.testing.assert_close(found, plain, atol=1e-6, rtol=1e-6)
    blocks.clear()
    model.head(hidden)  # a product that is trained through is not cut
    assert blocks == [V]


def test_images_are_refused_by_a_text_model():
    with pytest.raises(AssertionError, match="reads text only"):
        tiny()(random_ids(1, 3), images=torch.zeros(1, 3, 2, 2))
