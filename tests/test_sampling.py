"""Generation: the same as a naive loop, as transformers' greedy, and independent of what else is in the
batch."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import transformers

from minicot.model import KVCache, ModelConfig, Transformer
from minicot.sampling import DecodeCache, choose, filter_logits, generate, sample_groups
from minicot.sets import read_problems
from minicot.tokenizer import Tokenizer
from minicot.training import resolve
from minicot.weights import load_model, save_model

CONFIG = ModelConfig(
    model_type="llama",
    vocab_size=61,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=64,
    rms_norm_eps=1e-6,
    rope_theta=10000.0,
    initializer_range=0.3,
)
PROMPTS = [[5, 9, 2], [7], [11, 3, 8, 1, 20, 4], [30, 31]]


@pytest.fixture(scope="module")
def model():
    return Transformer(CONFIG, torch.Generator().manual_seed(0)).double()


def naive_greedy(model, prompt, steps, stop_ids):
    ids = list(prompt)
    for _ in range(steps):
        ids.append(model(torch.tensor([ids]))[0, -1].argmax().item())
        if ids[-1] in stop_ids:
            break
    return ids[len(prompt) :]


def test_greedy_equals_a_naive_loop_without_cache_or_batch(model):
    free = [naive_greedy(model, prompt, 12, []) for prompt in PROMPTS]
    stop_ids = [free[0][4], free[2][7]]  # so that rows leave the batch one after another
    expected = [[naive_greedy(model, prompt, 12, stop_ids)] for prompt in PROMPTS]
    assert generate(model, PROMPTS, max_new_tokens=12, temperature=0, stop_ids=stop_ids, seed=0) == expected
    assert len({len(ids[0]) for ids in expected}) > 1


def test_a_sample_is_the_same_whatever_else_is_in_the_batch(model):
    options = dict(max_new_tokens=24, stop_ids=[3], temperature=0.9, top_p=0.9)
    together = generate(model, PROMPTS, n=3, seed=[10, 11, 12, 13], **options)
    for i, prompt in enumerate(PROMPTS):
        assert generate(model, [prompt], n=3, seed=[10 + i], **options) == [together[i]]
        assert generate(model, [prompt], n=1, seed=10 + i, **options)[0] == together[i][:1]
    assert len({tuple(ids) for group in together for ids in group}) > len(PROMPTS)
    assert generate(model, PROMPTS, n=3, seed=10, **options) == together  # an int s stands for s, s + 1, ...


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("max_rows", [1, 4, 6])
def test_rows_that_finish_make_room_for_the_next_prompts(model, n, max_rows):
    prompts, options = PROMPTS * 3, dict(max_new_tokens=20, stop_ids=[3, 8, 12], temperature=1.0)
    seeds = list(range(len(prompts)))
    widths, embed = [], model.embed
    model.embed = lambda ids, *images: (widths.append(ids.shape), embed(ids, *images))[1]
    found = generate(model, prompts, n=n, seed=seeds, max_rows=max_rows, **options)
    del model.embed
    assert found == [generate(model, [p], n=n, seed=[s], **options)[0] for p, s in zip(prompts, seeds)]
    assert max(rows for rows, _ in widths) <= max(max_rows, n)
    one_after_the_other = sum(max(map(len, group)) for group in found)
    assert max_rows < 2 * n or len(widths) < one_after_the_other  # slots are at work side by side


def test_equal_prompts_are_computed_once_but_keep_their_own_seeds(model):
    widths, embed = [], model.embed
    model.embed = lambda ids, *images: (widths.append(ids.shape), embed(ids, *images))[1]
    found = generate(
        model, [PROMPTS[0]] * 4 + [PROMPTS[2]], max_new_tokens=12, stop_ids=[], seed=[1, 2, 3, 4, 5]
    )
    del model.embed
    assert widths[0] == (2, 6) and len({tuple(ids[0]) for ids in found[:4]}) == 4


@pytest.mark.parametrize("piece", [1, 6, 12])
def test_prompts_are_computed_a_piece_at_a_time_and_equal_ones_once(model, monkeypatch, piece):
    prompts = [PROMPTS[0], PROMPTS[2], PROMPTS[0], PROMPTS[1], PROMPTS[2], PROMPTS[3]]
    options = dict(max_new_tokens=12, stop_ids=[3], seed=[1, 2, 3, 4, 5, 6])
    whole = generate(model, prompts, **options)
    monkeypatch.setattr("minicot.sampling.PIECE", piece)
    widths, embed = [], model.embed
    model.embed = lambda ids, *images: (widths.append(tuple(ids.shape)), embed(ids, *images))[1]
    found = generate(model, prompts, **options)
    del model.embed
    assert found == whole
    pieces = {1: [(1, 3), (1, 6), (1, 1), (1, 2)], 6: [(1, 3), (1, 6), (1, 1), (1, 2)], 12: [(2, 6), (2, 2)]}
    assert widths[: len(pieces[piece])] == pieces[piece]
    assert widths[len(pieces[piece])] == (6, 1)  # then they are decoded together


@torch.no_grad()
def test_rows_that_share_their_prompts_keys_attend_as_with_copies(model):
    lengths, n, steps = torch.tensor([3, 1, 5]), 2, 3
    draw = torch.Generator().manual_seed(0)
    prompts = torch.randint(0, 61, (3, 5), generator=draw)
    new = torch.randint(0, 61, (3 * n, steps), generator=draw)
    prefilled = KVCache(CONFIG, 3, 5, dtype=torch.float64)
    model.hidden_states(model.embed(prompts), pad_mask=torch.arange(5) < lengths[:, None], cache=prefilled)
    shared = DecodeCache(CONFIG, 3, n, 5, steps, dtype=torch.float64, device="cpu")
    shared.admit(np.arange(3), prefilled, lengths.numpy())
    for t in range(steps):
        embeds = model.embed(new[:, t : t + 1])
        positions = (lengths.repeat_interleave(n) + t)[:, None]
        shared.plan(np.ones(3 * n, bool))
        mine = shared.begin(torch.ones(3 * n, dtype=torch.bool))
        assert torch.equal(mine, positions)
        whole = torch.cat([prompts.repeat_interleave(n, 0), new[:, : t + 1]], 1)
        real = torch.cat(
            [
                torch.arange(5) < lengths.repeat_interleave(n)[:, None],
                torch.ones(3 * n, t + 1, dtype=torch.bool),
            ],
            1,
        )
        twin = model.hidden_states(model.embed(whole), pad_mask=real)[:, -1:]
        torch.testing.assert_close(model.hidden_states(embeds, positions=mine, cache=shared), twin)


def test_samples_follow_the_model_distribution(model):
    prompt, V = [5, 9, 2], CONFIG.vocab_size
    drawn = generate(model, [prompt], n=20_000, max_new_tokens=1, stop_ids=[], seed=3)[0]
    counts = torch.bincount(torch.tensor([ids[0] for ids in drawn]), minlength=V).double()
    expected = model(torch.tensor([prompt]))[0, -1].softmax(-1) * len(drawn)
    chi2 = ((counts - expected) ** 2 / expected).sum().item()
    assert chi2 < V - 1 + 5 * (2 * (V - 1)) ** 0.5  # five standard deviations


def test_top_k_and_top_p_keep_exactly_the_likeliest():
    logits = torch.tensor([[0.1, 0.4, 0.2, 0.3]]).log()
    kept = lambda filtered: filtered.isfinite()[0].tolist()
    assert kept(filter_logits(logits, 2, 1.0)) == [False, True, False, True]
    assert kept(filter_logits(logits, 0, 0.65)) == [False, True, False, True]
    assert kept(filter_logits(logits, 0, 0.75)) == [False, True, True, True]
    assert kept(filter_logits(logits, 0, 1e-6)) == [False, True, False, False]
    assert kept(filter_logits(logits, 9, 1.0)) == [True] * 4


def test_choose_never_draws_a_token_of_probability_zero():
    logits = torch.tensor([[-torch.inf, 0.0, -torch.inf, 0.0, -torch.inf]]).expand(3, -1)
    for u, token in ((0.0, 1), (0.4999, 1), (0.5, 3), (1 - 1e-16, 3)):
        assert (
            choose(logits.double(), torch.full((3,), u, dtype=torch.float64), 1.0, 0, 1.0).tolist()
            == [token] * 3
        )


def test_a_uniform_that_rounds_to_one_draws_a_token_that_is_left_in():
    u = torch.tensor([1 - 2**-40], dtype=torch.float64)
    assert choose(torch.arange(10.0, 0, -1)[None], u, 1.0, 1, 1.0).tolist() == [0]
    assert choose(torch.arange(10.0, 0, -1)[None], u, 1e-40, 0, 1.0).tolist() == [0]


def test_logits_that_are_not_finite_are_refused():
    for temperature in (0, 1.0):
        with pytest.raises(ValueError, match="not finite"):
            choose(torch.tensor([[0.0, torch.nan]]), torch.zeros(1), temperature, 0, 1.0)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"prompts": [[1], []]}, "each needs a token"),
        ({"prompts": []}, "each needs a token"),
        ({"n": 0}, "n >= 1"),
        ({"temperature": -1}, "temperature >= 0"),
        ({"top_p": 0}, "0 < top_p"),
        ({"seed": [1, 2]}, "2 seeds for 1 prompts"),
        ({"max_new_tokens": 64}, "exceed the context of 64"),
    ],
)
def test_impossible_requests_are_refused(model, change, message):
    with pytest.raises(ValueError, match=message):
        generate(model, **{"prompts": [[1, 2]], "max_new_tokens": 4, "stop_ids": [], "seed": 0, **change})


def test_greedy_equals_transformers_generate(tmp_path):
    ours = Transformer(CONFIG, torch.Generator().manual_seed(1))
    save_model(ours, tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    for prompt in PROMPTS:
        out = theirs.generate(
            torch.tensor([prompt]), max_new_tokens=32, do_sample=False, eos_token_id=None, pad_token_id=0
        )
        drawn = generate(ours, [prompt], max_new_tokens=32, temperature=0, stop_ids=[], seed=0)
        assert drawn[0][0] == out[0, len(prompt) :].tolist()


# ---- bfloat16 ------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("how", ["autocast", "weights"])
def test_bfloat16_sampling_keeps_bfloat16_keys_and_errs_as_a_whole_forward_does(monkeypatch, how, n):
    """The logits behind each drawn token, and those of one forward over the whole text, are compared with
    float32's."""
    model, caches, logits = Transformer(CONFIG, torch.Generator().manual_seed(0)), [], []
    exact = Transformer(CONFIG, torch.Generator().manual_seed(0))
    if how == "weights":
        exact.load_state_dict(model.bfloat16().state_dict())
    make, head = KVCache.__init__, model.head
    noting = lambda cache, *args, **options: (caches.append(cache), make(cache, *args, **options))[1]
    monkeypatch.setattr(KVCache, "__init__", noting)
    monkeypatch.setattr(model, "head", lambda hidden: (logits.append(head(hidden)), logits[-1])[1])
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        [drawn] = generate(model, [PROMPTS[0]], n=n, max_new_tokens=12, stop_ids=[], seed=1)
        steps = [rows.expand(n, -1) for rows in logits]
        wholes = [model(torch.tensor([PROMPTS[0] + ids]))[0, len(PROMPTS[0]) - 1 : -1] for ids in drawn]
    assert {cache.keys[0].dtype for cache in caches} == {torch.bfloat16} and len(set(map(tuple, drawn))) == n
    for j, ids in enumerate(drawn):
        truth = exact(torch.tensor([PROMPTS[0] + ids]))[0, len(PROMPTS[0]) - 1 : -1]
        step_by_step = torch.stack([rows[j] for rows in steps])
        mine, its = ((x.float() - truth).square().mean().sqrt() for x in (step_by_step, wholes[j]))
        assert 0 < mine < 2 * its, (mine, its)


# ---- graded groups -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def base():
    return load_model(resolve("toy"), dtype=torch.float32), Tokenizer(resolve("toy"))


OPTIONS = dict(mode="cot", style="hash", max_new_tokens=8)


def test_a_grader_gets_many_problems_at_once_in_their_order(base):
    problems, seen = read_problems("toy", "test", limit=20), []

    def grade(sampled):
        """As a reward model or a judge would: from the whole list."""
        seen.append([samples.problem.id for samples in sampled])
        assert all(r.correct is None and r.answer is None for samples in sampled for r in samples.responses)
        longest = max(len(r.ids) for samples in sampled for r in samples.responses)
        return [
            replace(s, responses=[replace(r, reward=len(r.ids) / longest) for r in s.responses])
            for s in sampled
        ]

    graded = list(sample_groups(*base, problems, n=2, batch_size=2, grade=grade, seed=3, **OPTIONS))
    plain = list(sample_groups(*base, problems, n=2, batch_size=2, seed=3, **OPTIONS))
    assert seen == [
        [p.id for p in problems[:8]],
        [p.id for p in problems[8:16]],
        [p.id for p in problems[16:]],
    ]
    assert [s.problem for s in graded] == problems and graded == [
        replace(
            s,
            responses=[
                replace(r, correct=None, answer=None, reward=g.reward)
                for r, g in zip(s.responses, graded[i].responses)
            ],
        )
        for i, s in enumerate(plain)
    ]
    assert all(r.reward is not None for s in graded for r in s.responses)
    assert all(r.correct is not None and r.reward is None for s in plain for r in s.responses)


def test_a_grader_that_loses_a_problem_is_a_bug_of_ours(base):
    problems = read_problems("toy", "test", limit=3)
    with pytest.raises(AssertionError, match="made 2 Samples of 3"):
        list(sample_groups(*base, problems, n=1, grade=lambda sampled: sampled[1:], **OPTIONS))
