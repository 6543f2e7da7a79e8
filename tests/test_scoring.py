"""score() against its plain twin: the same numbers and gradients, from fewer tokens and no unread logits."""

import itertools
import shutil
import weakref
from dataclasses import replace
from functools import cache, partial
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.utils import counters
from torch.nn.attention.flex_attention import create_block_mask
from torch.utils.checkpoint import checkpoint

from minicot import scoring
from minicot.data import Row, collate, to_groups
from minicot.losses import aft_loss, better_than, sequence_logps, token_logps
from minicot.model import ModelConfig, Transformer, compiled, flex_attention
from minicot.scoring import TwoParts, chunked_logps, common_beginning, hidden_at, hidden_plain, pack, score
from minicot.sampling import generate
from minicot.scoring import PickedLogps, pays, score_plain
from minicot.training import set_layers
from minicot.vision import VisionConfig, VisionLanguageConfig, VisionLanguageModel
from tests.bench.memory import peak_of
from tests.bench.sides import MODELS, make_batch

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


@pytest.fixture(params=["packed", "padded"])
def path(request, monkeypatch):
    """Both paths of score, whichever the rule would pick."""
    monkeypatch.setattr(scoring, "pays", lambda packed, config: request.param == "packed")
    return request.param


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
    results = []
    for function in (score, score_plain):
        policy = model(dtype)
        logps = function(policy, batch).masked_fill(~batch.loss_mask, 0)
        (logps * weights).sum().backward()
        results.append((logps.detach(), [parameter.grad for parameter in policy.parameters()]))
    return results


@pytest.mark.parametrize("shape", [RAGGED, SFT, [(5, [4, 4])]], ids=["ragged", "one row a group", "a pair"])
@pytest.mark.parametrize("side", ["right", "left"])
def test_score_equals_the_plain_path_with_gradients(path, shape, side):
    batch = collate(groups(shape), pad_id=0)
    batch = left_padded(batch) if side == "left" else batch
    (fast, fast_grads), (plain, plain_grads) = both(batch, torch.float64)
    torch.testing.assert_close(fast, plain, rtol=0, atol=1e-10)
    torch.testing.assert_close(fast_grads, plain_grads, rtol=1e-9, atol=1e-10)
    (fast, fast_grads), (plain, plain_grads) = both(batch)
    torch.testing.assert_close(fast, plain, rtol=0, atol=1e-4)  # logits here reach about 50


def test_an_alignment_loss_does_not_see_which_path_ran(path):
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


def test_the_head_reads_only_what_predicts_a_scored_token(path):
    batch, seen, policy = collate(groups(RAGGED), pad_id=0), [], model()
    policy.head = lambda hidden: (seen.append(hidden.shape[0]), type(policy).head(policy, hidden))[1]
    score(policy, batch)
    assert max(seen) == int(batch.loss_mask.sum())


def test_a_scored_first_token_is_refused():
    batch = collate(groups(SFT), pad_id=0)
    batch.loss_mask[1, 0] = True
    with pytest.raises(AssertionError, match="nothing stands before it"):
        score(model(), batch)


# ---- packed or padded ----------------------------------------------------------------------------


def counted(shape, config=CONFIG):
    """(multiplications of a layer that packing spares, numbers that it gathers), one by one."""
    packed = pack(collate(groups(shape), pad_id=0))
    width, keys = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    E, longest = config.hidden_size, max(n_prompt + max(lengths) for n_prompt, lengths in shape)
    weights = 2 * E * width + 2 * E * keys + 3 * E * config.intermediate_size
    rows = sum(len(lengths) for _, lengths in shape)
    (B, P), R = packed.prompt_at.shape, packed.row_at.shape[1]
    padded = rows * longest * weights + rows * longest * longest * width
    of_rows = rows * R * (P + R) * 2 * width if P else rows * R * R * width
    spared = padded - packed.ids.numel() * weights - B * P * P * width - of_rows
    gathered = packed.ids.numel() * width  # back
    gathered += (B * P + rows * R) * width + 2 * (B * P + rows * (P + R)) * keys
    return spared, gathered


@pytest.mark.parametrize("shape", [RAGGED, SFT, [(5, [4, 4])], [(90, [2] * 8)], [(2, [40, 40])]])
def test_the_rule_weighs_multiplications_spared_against_numbers_gathered(shape, monkeypatch):
    spared, gathered = counted(shape)
    packed = pack(collate(groups(shape), pad_id=0))
    for fixed in (0, 1000):
        monkeypatch.setattr(scoring, "FIXED", fixed)
        for gather, picked in (
            ((spared - fixed) / gathered - 1e-6, True),
            ((spared - fixed) / gathered + 1e-6, False),
        ):
            monkeypatch.setattr(scoring, "GATHER", gather)
            assert pays(packed, CONFIG) is picked


@pytest.mark.parametrize("shape, tokens", [([(90, [2] * 8)], 90 + 8 * 2), ([(2, [40, 41])], 2 * 43)])
def test_score_takes_the_path_that_the_rule_picks(shape, tokens, monkeypatch):
    """A long prompt of many short responses is packed; a short one of two long responses is padded."""
    monkeypatch.setattr(scoring, "FIXED", 0)
    batch, seen, policy = collate(groups(shape), pad_id=0), [], model()
    embed = policy.embed
    policy.embed = lambda ids, *images: (seen.append(ids.numel()), embed(ids, *images))[1]
    score(policy, batch)
    assert seen == [tokens]


TABLE = [  # (B, K, P, R) of the toy with 1M parameters, and which path was the faster: 2 threads, in turns
    ((1, 2, 64, 128), False),  # packed 0.94 to 1.02x
    ((4, 2, 16, 128), False),  # 1.00x
    ((2, 2, 64, 128), True),  # 1.03x
    ((4, 2, 64, 128), True),  # 1.06x
    ((8, 2, 64, 128), True),  # 1.15x
    ((4, 2, 32, 64), True),  # 1.05x
    ((1, 2, 128, 128), True),  # 1.09x
    ((4, 2, 64, 64), True),  # 1.14x
    ((4, 4, 32, 96), True),  # 1.08x
    ((2, 8, 32, 64), True),  # 1.24x
    ((1, 2, 512, 128), True),  # 1.37x
    ((2, 8, 64, 128), True),  # 1.24x
    ((4, 2, 512, 128), True),  # 1.4x in the bench, as the two below
    ((2, 8, 512, 128), True),  # 2.4x
    ((2, 8, 1024, 128), True),  # 3.4x
]


@pytest.mark.parametrize("row, packed_is_faster", TABLE)
def test_the_rule_picks_the_path_that_the_bench_measured_as_faster(row, packed_is_faster):
    (B, K, P, R), config = row, MODELS["toy 1M"]
    assert pays(pack(make_batch("toy 1M", [[P, [R] * K]] * B, "cpu")), config) is packed_is_faster


@pytest.mark.parametrize("shape, packs", [([(7, [1]), (6, [1])], False), ([(7, [1]), (5, [1])], True)])
def test_on_cuda_the_rule_packs_where_an_eighth_of_the_tokens_is_spared(shape, packs):
    """Of 16 padded tokens one is spared, or two."""
    packed = pack(collate(groups(shape), pad_id=0))
    assert pays(replace(packed, ids=SimpleNamespace(is_cuda=True)), CONFIG) is packs


# ---- hidden states at places ---------------------------------------------------------------------

IMAGE_ID = 59
VISION = VisionLanguageConfig(
    CONFIG,
    VisionConfig(
        model_type="clip_vision_model",
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=8,
        patch_size=4,
        num_channels=3,
        hidden_act="quick_gelu",
        layer_norm_eps=1e-5,
    ),
    IMAGE_ID,
    vision_feature_layer=-1,
)


def with_pictures(dtype):
    """(model, batch): RAGGED's groups; the first has two pictures in its prompt, the last one, the others
    none."""
    pictures, made = [2, 0, 0, 1], groups([(p, [r for r in rs]) for p, rs in RAGGED])
    n = VISION.image_seq_length
    for group, count in zip(made, pictures):
        for k, row in enumerate(group):
            ids = [1 + i % (IMAGE_ID - 1) for i in row.ids]  # no placeholder by chance
            ids = [*ids[:1], *[IMAGE_ID] * (n * count), *ids[1:]]
            group[k] = replace(row, ids=ids, n_prompt=row.n_prompt + n * count)
    batch, draw = collate(made, pad_id=0), torch.Generator().manual_seed(7)
    images = torch.randn(sum(pictures), 3, 8, 8, generator=draw, dtype=dtype)
    of = torch.tensor([b for b, count in enumerate(pictures) for _ in range(count)])
    made = VisionLanguageModel(VISION, torch.Generator().manual_seed(0)).to(dtype)
    return made, replace(batch, images=images, image_group=of)


def places_of(batch, kind):
    """(N,T) bool: the real tokens that a head might stand on."""
    real, first = batch.pad_mask, torch.zeros_like(batch.pad_mask)
    n, count = torch.arange(len(real)), real.sum(1)
    pads_before = (real.int().argmax(1)).long()  # left padding
    if kind == "first":
        first[n, pads_before] = True
    elif kind == "last":
        first[n, pads_before + count - 1] = True
    elif kind == "prompt":  # shared by a group, two rows of which are asked, and not the same tokens
        first = real & ~batch.loss_mask & (n % 2 == 0)[:, None]
    elif kind == "random":
        first = real & (torch.rand(real.shape, generator=torch.Generator().manual_seed(3)) < 0.3)
    return first if kind != "all" else real


@pytest.mark.parametrize("kind", ["first", "last", "prompt", "random", "all"])
@pytest.mark.parametrize("sees", [False, True], ids=["text", "pictures"])
@pytest.mark.parametrize("side", ["right", "left"])
def test_hidden_states_at_places_equal_the_padded_forward_with_gradients(path, kind, sees, side):
    policy, batch = (
        with_pictures(torch.float64) if sees else (model(torch.float64), collate(groups(RAGGED), 0))
    )
    batch = left_padded(batch) if side == "left" else batch
    places, results = places_of(batch, kind), []
    for hidden in (lambda: hidden_at(policy, batch, places), lambda: hidden_plain(policy, batch)[places]):
        policy.zero_grad()
        states = hidden()
        (states * torch.linspace(-1, 1, states.numel()).view_as(states)).sum().backward()
        grads = [p.grad.clone() for p in policy.parameters() if p.grad is not None]
        results.append((states.detach(), grads))
    assert len(results[0][0]) == int(places.sum()) > 0
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-9)


def test_places_that_are_no_tokens_are_refused():
    batch = collate(groups(SFT), pad_id=0)
    with pytest.raises(AssertionError, match="a place is padding"):
        hidden_at(model(), batch, torch.ones_like(batch.pad_mask))
    with pytest.raises(AssertionError, match=r"places \(3, 2\), ids \(3, 11\)"):
        hidden_at(model(), batch, batch.pad_mask[:, :2])


# ---- the mask ------------------------------------------------------------------------------------


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


def in_one_piece(packed):
    """The oracle of block_mask: PyTorch's own, which makes the (L,L) mask."""
    L = len(packed.row)
    return create_block_mask(packed.visible(), None, None, L, L, device="cpu")


def random_shape(draw):
    """Groups of random sizes, of one row to five, with short and long prompts and responses."""
    size = lambda low, high: int(torch.randint(low, high, (1,), generator=draw))
    longest = (4, 40, 250)[size(0, 3)]
    return [(size(1, longest), [size(1, longest) for _ in range(size(1, 6))]) for _ in range(size(1, 8))]


def test_the_block_mask_made_by_blocks_is_the_one_made_whole(monkeypatch):
    draw, lengths, counts = torch.Generator().manual_seed(5), set(), [0, 0]
    shapes = [random_shape(draw) for _ in range(10)] + [[(100, [28])], [(700, [300, 24])], [(1, [127, 128])]]
    for shape in shapes:
        packed = pack(collate(groups(shape), pad_id=0))
        whole, at = in_one_piece(packed), torch.arange(len(packed.row))
        for entries in (1, 5 * 128 * 128, 2**24):  # one block of queries at a time, a few, all
            monkeypatch.setattr(scoring, "MASK", entries)
            ours = packed.block_mask()
            assert ours.seq_lengths == whole.seq_lengths and ours.BLOCK_SIZE == whole.BLOCK_SIZE
            names = ("kv_num_blocks", "kv_indices", "full_kv_num_blocks", "full_kv_indices")
            for name in (*names, *(name.replace("kv", "q") for name in names)):
                mine, theirs = getattr(ours, name), getattr(whole, name)
                assert mine.dtype == theirs.dtype and torch.equal(mine, theirs), (name, shape)
            assert torch.equal(ours.to_dense(), whole.to_dense())
            assert torch.equal(ours.mask_mod(None, None, at[:, None], at), packed.dense_mask())
        lengths.add(len(at) % 128)
        counts = [counts[0] + int(whole.kv_num_blocks.sum()), counts[1] + int(whole.full_kv_num_blocks.sum())]
    assert 0 in lengths and min(counts) > 20, (
        counts
    )  # the last block ends the row or not; blocks of each kind


def test_the_block_mask_of_a_long_row_takes_little_memory():
    """12,000 tokens: made whole it takes 10.5 bytes a pair of tokens, 1.5 GB; 52,000 took 28 GB."""
    packed = pack(collate(groups([(2000, [500] * 20)]), pad_id=0))
    assert len(packed.row) == 12_000
    _, bytes_held = peak_of(packed.block_mask)
    assert bytes_held < 300e6, bytes_held


@pytest.mark.skipif(not shutil.which("g++"), reason="needs a C++ compiler")
def test_flex_attention_compiled_agrees_with_the_dense_mask():
    """On a CPU, forward alone: what CUDA runs, but for the kernel. From the third length on, nothing is
    compiled anew."""
    policy, compiled, graphs = model(), flex_attention(True), []
    for shape in ([(150, [90, 30, 200])], [(300, [90] * 5), (20, [3])], [(200, [170, 80])]):
        packed = pack(collate(groups(shape), pad_id=0))
        block_mask = packed.block_mask()
        flex = lambda q, k, v: compiled(q, k, v, block_mask=block_mask, enable_gqa=True)
        with torch.no_grad():
            dense, parts = (
                policy.hidden_states(
                    policy.embed(packed.ids), positions=packed.positions, attention=attention
                )
                for attention in (packed.dense_mask(), flex)
            )
        torch.testing.assert_close(parts, dense, rtol=1e-5, atol=1e-5)
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert graphs[1] == graphs[2]


def test_responses_that_begin_alike_share_no_scored_token():
    row = lambda *response: Row("p", [5, 6, *response], 2)
    packed = pack(collate([[row(7, 8, 9), row(7, 8, 4)]], pad_id=0))
    assert packed.prompt_at.tolist() == [[0, 1]]
    assert common_beginning([[1, 2, 3], [1, 2, 3, 4]], 9) == 2  # a row keeps a token of its own
    assert common_beginning([[1, 2, 3], [1, 4, 3]], 9) == 1 and common_beginning([[1, 2]], 9) == 0


def test_prompts_that_were_tokenised_apart_share_only_what_is_equal(path):
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
    ids, results = torch.randint(0, 60, (23,), generator=draw), []
    for chunks in (True, False):
        w, h = weight.clone().requires_grad_(), hidden.clone().requires_grad_()
        head = lambda x: x @ w.T
        if chunks:
            logps = chunked_logps(head, h, ids)
        else:  # the plain twin: the shifted, all-logits path
            logits, shifted = torch.cat([head(h), head(h)[:1]]), torch.cat([ids[:1], ids])
            logps = token_logps(logits[None], shifted[None])[0, 1:]
        logps.square().sum().backward()
        results.append((logps.detach(), w.grad, h.grad))
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-4)


def test_a_chunk_keeps_no_logits_for_backward(monkeypatch):
    monkeypatch.setattr(scoring, "CHUNK", 60 * 4)
    saved = []
    weight, hidden = torch.randn(60, 16, requires_grad=True), torch.randn(64, 16, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: (saved.append(x.numel()), x)[1], lambda x: x):
        chunked_logps(lambda x: x @ weight.T, hidden, torch.zeros(64, dtype=torch.long))
    assert max(itertools.chain(saved, [0])) <= 64 * 16 + 60 * 16


# ---- the head's backward -------------------------------------------------------------------------


def test_picked_log_probabilities_by_gradcheck_and_beside_pytorchs():
    draw = torch.Generator().manual_seed(4)
    logits, ids = torch.randn(5, 7, generator=draw, dtype=torch.float64), torch.tensor([0, 6, 3, 3, 1])
    # checkpoint makes the table anew for each of gradcheck's backwards
    again = lambda logits: checkpoint(PickedLogps.apply, logits, ids, use_reentrant=False)
    assert torch.autograd.gradcheck(again, logits.requires_grad_())
    results, weights = [], torch.randn(5, generator=draw)
    for function in (PickedLogps.apply, lambda x, ids: -F.cross_entropy(x, ids, reduction="none")):
        x = (30 * logits.detach()).float().requires_grad_()
        logps = function(x, ids)
        (logps * weights).sum().backward()
        results.append((logps.detach(), x.grad))
    (mine, mine_grad), (its, its_grad) = results
    assert torch.equal(mine, its)
    torch.testing.assert_close(mine_grad, its_grad, rtol=1e-6, atol=1e-7)


def test_the_gradient_of_bfloat16_logits_is_bfloat16_and_their_log_probabilities_are_not():
    logits = torch.randn(3, 7, dtype=torch.bfloat16, requires_grad=True)
    logps = PickedLogps.apply(logits, torch.tensor([1, 0, 6]))
    logps.sum().backward()
    assert logps.dtype == torch.float32 and logits.grad.dtype == torch.bfloat16


def test_a_second_backward_through_what_was_overwritten_is_refused():
    logps = PickedLogps.apply(torch.randn(3, 7, requires_grad=True), torch.tensor([1, 0, 6]))
    logps.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        logps.sum().backward()


def test_backward_makes_no_second_table_of_logits():
    hidden, weight = torch.randn(1000, 4, requires_grad=True), torch.randn(20_000, 4, requires_grad=True)
    logps = chunked_logps(lambda x: x @ weight.T, hidden, torch.zeros(1000, dtype=torch.long))
    _, bytes_held = peak_of(logps.sum().backward)
    assert bytes_held < 40e6, bytes_held  # a table is 80 MB


# ---- compiled layers -----------------------------------------------------------------------------


def test_compiled_layers_are_traced_once_for_all_layers_and_lengths(monkeypatch):
    """--compile, with a backend that runs what was traced: what is shown is that no Python is left out of the
    traces, that layers and lengths share them, and that results and gradients are the plain ones. The kernels
    are tested in test_cuda.py."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    monkeypatch.setattr(scoring, "pays", lambda packed, config: True)
    monkeypatch.setattr("minicot.model.compiled", cache(compiled.__wrapped__))
    monkeypatch.setattr("minicot.sampling.compiled", cache(compiled.__wrapped__))
    torch._dynamo.reset()
    counters.clear()
    fast, plain = model(), model()
    set_layers(fast, compile=True)
    for shape in (RAGGED, [(3, [4, 4, 2])], SFT):
        batch = collate(groups(shape), pad_id=0)
        scores = [score(policy, batch) for policy in (fast, plain)]
        torch.testing.assert_close(*scores)
        for policy, logps in zip((fast, plain), scores):
            policy.zero_grad()
            logps.sum().backward()
        for ours, theirs in zip(fast.parameters(), plain.parameters()):
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-4)
    assert counters["stats"]["unique_graphs"] == 2 and not counters["graph_break"]  # before, after
    fast, plain = fast.double(), plain.double()
    for n in (1, 3):
        options = dict(n=n, max_new_tokens=9, stop_ids=[3, 8], seed=1, max_rows=2 * n)
        drawn = [generate(policy, [[5, 9, 2], [7], [11, 3, 8, 1]], **options) for policy in (fast, plain)]
        assert drawn[0] == drawn[1]
    assert not counters["graph_break"]
    held = weakref.ref(fast)
    del fast
    assert held() is None  # what is compiled holds no model
