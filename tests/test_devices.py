"""What a step makes stands on its inputs' device, and the host waits for a device only where it has to.

No GPU is here, so three things stand in for one. Meta tensors have a device and no values: a step on them
fails at the first stray CPU tensor and at the first value that Python asks for. Where values are asked for,
and may be, the step runs on CPU tensors while everything that names no device lands on meta: a stray tensor
meets one of the CPU then, and fails too. And a list says which functions ask, and for what.
"""

from collections import Counter

import numpy as np
import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode

from minicot import sampling, scoring
from minicot.losses import CONSTRAINTS, aft_loss, better_than, dpo_loss, group_advantages, grpo_loss, ipo_loss
from minicot.losses import pro_loss, prm_loss, rrhf_loss, sequence_logps, sft_loss, token_logps
from minicot.model import RewardModel, Transformer
from minicot.sampling import DecodeCache, decode, generate, prefill
from minicot.scoring import TwoParts, chunked_logps, pack, score, score_plain, step_logits
from minicot.scoring import step_logits_plain
from minicot.training import clip_gradients, make_optimizer
from minicot.vision import VisionLanguageModel
from tests.test_cuda import CONFIG, IMAGE_ID, SHAPES, VISION, batch_of

META, CPU = torch.device("meta"), torch.device("cpu")
SHAPE = [(7, [3, 9, 1]), (2, [4]), (12, [2, 2, 2, 6])]


def made(kind=Transformer, config=CONFIG, device=CPU):
    return kind(config, torch.Generator().manual_seed(0)).to(device)


def batch(pictures=None, shape=SHAPE):
    return batch_of(shape, pictures, CPU)


# ---- on meta: no value, so no value is asked for -------------------------------------------------


@pytest.mark.parametrize("padded", [False, True])
def test_a_forward_and_its_backward(padded):
    policy, ids = made(device=META), torch.zeros(3, 9, dtype=torch.long, device=META)
    mask = torch.ones(9, 9, dtype=torch.bool, device=META).tril() if padded else None
    hidden = policy.hidden_states(policy.embed(ids), attention=mask)
    logps = token_logps(policy.head(hidden), ids)
    few = chunked_logps(policy.head, hidden.flatten(0, 1), ids.flatten())
    (logps.sum() + few.sum()).backward()
    assert logps.device == few.device == META and all(p.grad.device == META for p in policy.parameters())


def test_the_packed_attention():
    packed = pack(batch())
    parts = TwoParts(packed)
    for part in (packed, parts):
        for name, value in vars(part).items():
            if isinstance(value, torch.Tensor):
                object.__setattr__(part, name, value.to(META))
    policy = made(device=META)
    hidden = policy.hidden_states(policy.embed(packed.ids), positions=packed.positions, attention=parts)
    hidden.sum().backward()
    assert hidden.device == META


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("block", [1, 64])
def test_a_prompt_and_its_decoding_steps(n, block):
    policy, R = made(device=META), 2 * n
    cache = DecodeCache(CONFIG, 2, n, 9, 12, dtype=torch.float32, device=META, block=block)
    logits = prefill(policy, cache, np.arange(2), [[5] * 4, [6] * 9], [[], []])
    assert logits.shape == (2, CONFIG.vocab_size) and logits.device == META
    for live in (np.ones(R, bool), np.arange(R) > 0):
        cache.plan(live)
        tokens, at_work = torch.zeros(R, dtype=torch.long, device=META), torch.ones(R, device=META).bool()
        hidden = decode(policy, cache, tokens, at_work)
        assert hidden.shape == (R, CONFIG.hidden_size) and hidden.device == META
    cache.select(np.array([1]))
    cache.plan(np.ones(n, bool))
    decode(policy, cache, tokens[:n], at_work[:n])


@pytest.mark.parametrize("kind", ["clip_vision_model", "siglip_vision_model"])
def test_the_vision_encoder(kind):
    import dataclasses

    config = dataclasses.replace(VISION, vision=dataclasses.replace(VISION.vision, model_type=kind))
    if kind != "clip_vision_model":
        config = dataclasses.replace(config, vision_feature_select_strategy="full")
    policy = made(VisionLanguageModel, config, META)
    features = policy.encode_images(torch.zeros(2, 3, 16, 16, device=META))
    features.sum().backward()
    assert features.shape == (2, config.image_seq_length, CONFIG.hidden_size) and features.device == META


def scores(*shape):
    return torch.zeros(*shape, device=META, requires_grad=True)


def booleans(*shape):
    return torch.zeros(*shape, dtype=torch.bool, device=META)


ON_META = {
    **{
        f"aft-{c}": lambda c=c: aft_loss(scores(2, 3), booleans(2, 3, 3), constraint=c, margin=margin(c))
        for c in CONSTRAINTS
    },
    **{
        f"rrhf-{c}": lambda c=c: rrhf_loss(scores(2, 3), booleans(2, 3, 3), constraint=c, margin=margin(c))
        for c in CONSTRAINTS
    },
    "dpo": lambda: dpo_loss(scores(2, 2), scores(2, 2), beta=0.1),
    "dpo-smoothed": lambda: dpo_loss(scores(2, 2), scores(2, 2), beta=0.1, label_smoothing=0.1),
    "ipo": lambda: ipo_loss(scores(2, 2), scores(2, 2), beta=0.1),
    "sft": lambda: sft_loss(scores(3, 7), booleans(3, 7), n_tokens=5),
    "sums": lambda: sequence_logps(scores(3, 7), booleans(3, 7), reduce="sum"),
    **{
        f"grpo-{kl}": lambda kl=kl: grpo_loss(
            scores(3, 7), scores(3, 7), scores(3, 7), scores(3), booleans(3, 7), kl=kl
        )
        for kl in (0.0, 0.04)
    },
}


def margin(constraint):
    return 0.1 if constraint == "boundary" else None


@pytest.mark.parametrize("name", ON_META)
def test_a_loss(name):
    value = ON_META[name]()
    value.sum().backward()
    assert value.device == META


# ---- strays land on meta -------------------------------------------------------------------------


def policy_and_batch(sees):
    if sees:
        return made(VisionLanguageModel, VISION), batch([2, 0, 1])
    return made(), batch()


def with_steps(b):
    import dataclasses

    last = b.pad_mask.sum(1, keepdim=True) - 1
    return dataclasses.replace(b, step_ends=last, step_labels=torch.ones_like(last).bool())


@pytest.fixture(params=["packed", "padded"])
def path(request, monkeypatch):
    monkeypatch.setattr(scoring, "pays", lambda packed, config: request.param == "packed")


@pytest.mark.parametrize("sees", [False, True], ids=["text", "pictures"])
@pytest.mark.parametrize("function", [score, score_plain])
def test_score_makes_no_stray_tensor(function, sees, path):
    policy, b = policy_and_batch(sees)
    expected = function(policy, b).detach()
    with META:
        logps = function(policy, b)
        sft_loss(logps, b.loss_mask).backward()
        clip_gradients(policy, 1.0)
        make_optimizer(policy, 0.0, 0.1).step()
    assert torch.equal(logps, expected)


@pytest.mark.parametrize("function", [step_logits, step_logits_plain])
def test_step_logits_make_no_stray_tensor(function, path):
    policy, b = RewardModel(made(), "prm", torch.Generator().manual_seed(3)), with_steps(batch())
    expected = function(policy, b).detach()
    with META:
        found = function(policy, b)
        prm_loss(found, b.step_labels, b.step_ends >= 0).sum().backward()
    assert torch.equal(found, expected)


def test_the_block_mask_makes_no_stray_tensor():
    packed = pack(batch(shape=SHAPES["long"]))
    expected = packed.block_mask()
    with META:
        found = packed.block_mask()
    for name in ("kv_num_blocks", "kv_indices", "full_kv_num_blocks", "full_kv_indices", "q_indices"):
        assert torch.equal(getattr(found, name), getattr(expected, name))


@pytest.mark.parametrize("n", [1, 3])
def test_generate_makes_no_stray_tensor(n):
    policy, prompts = made(), [[5, 9, 2], [7], [11, 3, 8, 1], [7]]
    options = dict(
        n=n, max_new_tokens=9, stop_ids=[3, 8, 12, 40], seed=1, max_rows=2 * n, top_p=0.9, top_k=50
    )
    expected = generate(policy, prompts, **options)
    with META:
        assert generate(policy, prompts, **options) == expected


def test_losses_that_look_at_values_make_no_stray_tensor():
    rewards, s = torch.tensor([[1.0, 0.0, 0.5]]), torch.tensor([[0.1, 0.2, 0.3]], requires_grad=True)
    mask = torch.tensor([[True, True, False]])
    with META:
        for value in (
            pro_loss(s, rewards),
            aft_loss(s, better_than(rewards, mask)),
            group_advantages(rewards),
            sequence_logps(s, mask, reduce="mean"),
            sft_loss(s, mask),
            prm_loss(s, mask, mask),
        ):
            assert value.device == CPU


# ---- who asks ------------------------------------------------------------------------------------

ASKS = {"item", "tolist", "__bool__", "__int__", "__float__", "__index__", "nonzero", "cpu", "numpy"}
ASKS |= {"masked_select", "unique"}


class Syncs(TorchFunctionMode):
    """Notes each call for which a GPU would be waited for: {(module.function, what): how often}."""

    def __init__(self):
        super().__init__()
        self.found = Counter()

    def __torch_function__(self, function, _types, args=(), kwargs=None):
        import sys

        name = getattr(function, "__name__", "")
        index = args[1] if name in ("__getitem__", "__setitem__") and len(args) > 1 else ()
        index = index if isinstance(index, tuple) else (index,)
        if any(isinstance(i, torch.Tensor) and i.dtype == torch.bool for i in index):
            name = "a bool index"
        if name in ASKS or name == "a bool index":
            frame = sys._getframe(1)
            while frame and not frame.f_globals.get("__name__", "").startswith("minicot."):
                frame = frame.f_back
            if frame:
                module = frame.f_globals["__name__"].removeprefix("minicot.")
                self.found[f"{module}.{frame.f_code.co_name}", name] += 1
        return function(*args, **(kwargs or {}))


def asked(work):
    with Syncs() as syncs:
        work()
    return {f"{where}: {what}" for where, what in syncs.found}


PACKING = {
    "scoring.score: __bool__",  # is a first token scored?
    "scoring.score: nonzero",  # which tokens are scored
    "scoring.hidden_at: __bool__",  # is a place padding?
    "scoring.hidden_at: a bool index",
    "scoring.pack: cpu",  # the plan of the packed row is made by numpy
    "scoring.pack: numpy",
    "scoring.<genexpr>: cpu",
    "scoring.<genexpr>: numpy",
    "scoring.__init__: nonzero",  # TwoParts, on the CPU alone
    "scoring.__init__: a bool index",
}


def test_score_asks_before_the_model_runs_and_not_after(monkeypatch):
    policy, b, at_work = made(), batch(), []
    monkeypatch.setattr(scoring, "pays", lambda packed, config: True)
    run = policy.hidden_states

    def noting(*args, **options):
        before = Counter(syncs.found)
        hidden = run(*args, **options)
        at_work.append(syncs.found - before)
        syncs.found.clear()
        return hidden

    policy.hidden_states = noting
    with Syncs() as syncs:
        score(policy, b)
    assert at_work == [Counter()] and not syncs.found
    assert asked(lambda: score(made(), b)) == PACKING


def test_a_decoding_step_asks_once():
    """Of a whole generation: what was drawn, once for each step and prefill."""
    policy, syncs, steps = made(), Syncs(), []
    head = policy.head
    policy.head = lambda hidden: (steps.append(1), head(hidden))[1]
    with syncs:
        generate(policy, [[5, 9, 2], [7]], n=3, max_new_tokens=9, stop_ids=[3, 8], seed=1, top_k=9, top_p=0.9)
    read = {key: n for key, n in syncs.found.items() if key[1] != "numpy"}
    # the tensor is on the CPU by then: asking it, and numpy's view of it, cost nothing
    assert read == {("sampling.choose", "cpu"): len(steps), ("sampling.choose", "__bool__"): len(steps)}
    assert len(steps) > 5


def test_what_the_losses_ask():
    rewards, s = torch.tensor([[1.0, 0.0]]), torch.zeros(1, 2, requires_grad=True)
    mask = torch.ones(1, 2, dtype=torch.bool)
    values = {"losses._present: nonzero", "losses._present: tolist"}  # is a reward finite?
    assert asked(lambda: better_than(rewards)) == asked(lambda: group_advantages(rewards)) == values
    assert asked(lambda: sequence_logps(s, mask, reduce="mean")) == {"losses.sequence_logps: __bool__"}
    assert asked(lambda: sft_loss(s, mask)) == {"losses.sft_loss: __bool__"}
    assert asked(lambda: prm_loss(s, mask, mask)) == {"losses.prm_loss: __bool__"}


# ---- a step that is recorded once and launched again ---------------------------------------------


def caches(n, block, slots=3, max_prompt=5, steps=8):
    """(model, DecodeCache with prefilled prompts of unequal lengths)."""
    policy = made().double()
    cache = DecodeCache(CONFIG, slots, n, max_prompt, steps, dtype=torch.float64, device=CPU, block=block)
    with torch.no_grad():
        prefill(policy, cache, np.arange(slots), [[5, 9, 2], [7], [11, 3, 8, 1, 20]], [[]] * slots)
    return policy, cache


def steps_of(n, count=8):
    """Tokens and live rows of each step; a row goes after another."""
    draw = torch.Generator().manual_seed(5)
    for t in range(count):
        yield torch.randint(1, IMAGE_ID, (3 * n,), generator=draw), np.arange(3 * n) * 3 >= t


@torch.no_grad()
@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("block", [4, 64])
def test_steps_of_fixed_shapes_are_the_growing_ones(n, block):
    (policy, growing), (_, fixed) = caches(n, 1), caches(n, block)
    shapes = set()
    for tokens, live in steps_of(n, 6):
        found = []
        for cache in (growing, fixed):
            cache.plan(live)
            found.append(decode(policy, cache, tokens, torch.from_numpy(live)))
        shapes.add(fixed.reads)
        torch.testing.assert_close(*(x[torch.from_numpy(live)] for x in found), rtol=0, atol=1e-6)
    assert len(shapes) == (1 if block == 64 else 2)


def test_the_keys_that_a_step_reads_double():
    """The longest of three prompts has 5 tokens; a step reads its own token too. The buffer holds 13."""
    _, cache = caches(1, 2)
    ends = []
    for _ in range(8):
        cache.plan(np.ones(3, bool))
        ends.append(cache.reads[0])
    assert ends == [8, 8, 8, 13, 13, 13, 13, 13]


@torch.no_grad()
@pytest.mark.parametrize("n", [1, 3])
def test_a_recorded_step_is_launched_again_with_other_tokens(n, monkeypatch):
    """Graphs with make_fx in the place of CUDA's recorder: both note each operation on the addresses that it
    had, and neither sees Python again."""

    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    (policy, plain), (_, cache) = caches(n, 1), caches(n, 64)
    graphs = sampling.Graphs(policy, cache)
    buffers = [cache.own_length, cache.prompt_length, *cache.own.keys, *cache.own.values]
    recorded = []

    def step(tokens, live, *held):
        """decode on the cache's buffers, as inputs: so that they are traced too."""
        L, (cache.own_length, cache.prompt_length, *rest) = CONFIG.num_hidden_layers, held
        before = cache.own.keys, cache.own.values
        cache.own.keys, cache.own.values = list(rest[:L]), list(rest[L:])
        hidden = decode(policy, cache, tokens, live)
        cache.own.keys, cache.own.values = before
        return hidden

    def record(tokens, live):
        inputs = tokens.clone(), torch.zeros_like(live)
        traced = make_fx(step)(*inputs, *[buffer.clone() for buffer in buffers])
        cache.own_length, cache.prompt_length = buffers[:2]
        recorded.append(traced)

        class Replayed:
            def replay(self):
                hidden.copy_(traced(*inputs, *buffers))

        hidden = torch.zeros(len(tokens), CONFIG.hidden_size, dtype=torch.float64)
        return Replayed(), inputs, hidden

    monkeypatch.setattr(graphs, "record", record)
    for tokens, live in steps_of(n, 6):
        plain.plan(live)
        expected = decode(policy, plain, tokens, torch.from_numpy(live))
        cache.plan(live)
        found = graphs(tokens, torch.from_numpy(live))
        torch.testing.assert_close(found[torch.from_numpy(live)], expected[torch.from_numpy(live)])
    assert len(recorded) == 1
