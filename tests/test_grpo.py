"""GRPO: its advantages, its loss, and align.py --method grpo, which draws its groups from the policy.

    A_i   = (r_i - mean r) / (std r + 1e-4)                                    GRPO, arXiv 2402.03300, 4.1.2
          =  r_i - mean r                                                      Dr. GRPO, arXiv 2503.20783
    c_it  = -min(ratio_it A_i, clip(ratio_it, 1 - low, 1 + high) A_i) + kl k3_it           GRPO, Eq. 3 and 4
    ratio = pi / pi_old,   k3 = pi_ref / pi - log(pi_ref / pi) - 1
    loss  = mean over i of  (sum over t of c_it) / |o_i|                       GRPO
          = mean over i of  (sum over t of c_it) / the largest length          Dr. GRPO
          = (sum over i and t of c_it) / (sum over i of |o_i|)                 DAPO, arXiv 2503.14476, Eq. 8

golden/grpo_golden.json holds what TRL's GRPOTrainer computes of the same tensors; where trl is installed,
`python -m tests.test_grpo` writes it anew, and a test compares with TRL itself.
"""

import dataclasses
import importlib.metadata
import json
import math
import signal
import tempfile
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import align
from minicot import rollouts
from minicot.config import AlignConfig
from minicot.data import Row, collate
from minicot.errors import InputError
from minicot.losses import clipped, group_advantages, grpo_loss, k3
from minicot.records import Problem, Response, Samples
from minicot.runs import Run, checkpoints
from minicot.tokenizer import Tokenizer
from minicot.training import make_optimizer
from tests.helpers import assert_one_line_error, assert_shapes_named, assert_value_named, jsonl, script
from tests.test_align import BASE, lines, small_policy
from tests.test_losses import INF, NAN, close, f64, grad, leaf

FILE = Path(__file__).parent / "golden" / "grpo_golden.json"
ONE_TOKEN = torch.tensor([[False, True]])


# ---- advantages ----------------------------------------------------------------------------------


def test_advantages_by_hand():
    rewards = f64([[1.0, 0.0, 0.0, 1.0], [3.0, 1.0, 2.0, 2.0]])
    close(group_advantages(rewards, scale="none"), [[0.5, -0.5, -0.5, 0.5], [1.0, -1.0, 0.0, 0.0]])
    stds = [math.sqrt(1 / 3), math.sqrt(2 / 3)]  # 4 (1/2)^2 / 3 and 2 / 3
    halves = [0.5 / (stds[0] + 1e-4), 1 / (stds[1] + 1e-4)]
    expected = [[halves[0], -halves[0], -halves[0], halves[0]], [halves[1], -halves[1], 0.0, 0.0]]
    close(group_advantages(rewards), expected)
    close(group_advantages(torch.tensor([[True, False]]), scale="none"), [[0.5, -0.5]])


def test_absent_responses_are_in_neither_mean_nor_std():
    rewards, present = f64([[1.0, NAN, 0.0, INF, 0.0]]), torch.tensor([[True, False, True, False, True]])
    three = f64([[1.0, 0.0, 0.0]])
    for scale in ("std", "none"):
        found = group_advantages(rewards, present, scale=scale)
        close(found[:, [0, 2, 4]], group_advantages(three, scale=scale))
        assert found[0, [1, 3]].tolist() == [0.0, 0.0]
    close(group_advantages(three, scale="none"), [[2 / 3, -1 / 3, -1 / 3]])


@pytest.mark.parametrize("scale", ["std", "none"])
def test_a_dead_group_has_advantages_of_exactly_0(scale):
    """All equal, one response, none. (The mean of three times 0.1 is not 0.1.)"""
    rewards = f64([[0.1, 0.1, 0.1], [1.0, 1.0, 1.0], [0.7, NAN, NAN], [NAN, NAN, NAN], [1.0, 0.0, 0.0]])
    present = torch.tensor([[True] * 3, [True] * 3, [True, False, False], [False] * 3, [True] * 3])
    found = group_advantages(rewards, present, scale=scale)
    assert found[:4].tolist() == [[0.0] * 3] * 4 and found[4].abs().min() > 0


def test_the_advantage_is_the_mean_difference_to_the_group():
    rewards = torch.rand(5, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    differences = (rewards[:, :, None] - rewards[:, None, :]).mean(2)
    close(group_advantages(rewards, scale="none"), differences, rtol=1e-7, atol=1e-12)
    scaled = differences / (rewards.std(1, keepdim=True) + 1e-4)
    close(group_advantages(rewards), scaled, rtol=1e-7, atol=1e-12)


# ---- the loss ------------------------------------------------------------------------------------


def random_step(seed, N=6, T=7, apart=0.6, dtype=torch.float64):
    """Token log-probabilities of policy, old policy and reference, advantages, a mask; each of the rows has
    another length, and the ratios lie on all sides of the clip."""
    g = torch.Generator().manual_seed(seed)
    old = -2 * torch.rand(N, T, generator=g, dtype=torch.float64)
    policy = old + apart * torch.randn(N, T, generator=g, dtype=torch.float64)
    ref = old + apart * torch.randn(N, T, generator=g, dtype=torch.float64)
    advantages = torch.randn(N, generator=g, dtype=torch.float64)
    mask = torch.arange(T) >= 2
    mask = mask & (torch.arange(T) < 3 + torch.arange(N)[:, None] % (T - 2))
    return [x.to(dtype) for x in (policy, old, ref, advantages)] + [mask]


def loops(policy, old, ref, advantages, mask, low, high, kl, denominator):
    """The equations above, token by token."""
    losses = []
    for i in range(len(policy)):
        at = mask[i].nonzero()[:, 0].tolist()
        total = policy.new_zeros(())
        for t in at:
            A, ratio = advantages[i], (policy[i, t] - old[i, t]).exp()
            total = total - torch.minimum(ratio * A, ratio.clamp(1 - low, 1 + high) * A)
            if kl:
                apart = ref[i, t] - policy[i, t]
                total = total + kl * (apart.exp() - apart - 1)
        losses.append(total / (len(at) if denominator is None else denominator))
    return torch.stack(losses)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("low, high, kl", [(0.2, 0.2, 0.0), (0.2, 0.28, 0.04), (0.1, 0.5, 1.0)])
@pytest.mark.parametrize("denominator", [None, 5, 3.5])
def test_the_loss_equals_its_loops_in_value_and_gradient(seed, low, high, kl, denominator):
    policy, old, ref, advantages, mask = random_step(seed)
    ours, twin = leaf(policy), leaf(policy)
    settings = dict(clip_low=low, clip_high=high, kl=kl, denominator=denominator)
    loss = grpo_loss(ours, old, ref if kl else None, advantages, mask, **settings)
    expected = loops(twin, old, ref, advantages, mask, low, high, kl, denominator)
    close(loss, expected)
    close(grad(loss, ours)[0], grad(expected, twin)[0])
    hit = clipped(policy, old, advantages[:, None].expand_as(old), clip_low=low, clip_high=high) & mask
    assert 0 < hit.sum() < mask.sum()
    if not kl:
        assert torch.equal(
            grad(grpo_loss(ours, old, None, advantages, mask, **settings), ours)[0] == 0, hit | ~mask
        )


@pytest.mark.parametrize(
    "A, ratio, value, slope",  # -A min or max of the ratio and its bound; slope by log pi
    [
        (2.0, 1.0, -2.0, -2.0),
        (2.0, 1.1, -2.2, -2.2),
        (2.0, 1.5, -2.4, 0.0),  # moved up enough
        (2.0, 0.5, -1.0, -1.0),  # moved against the push: nothing is cut
        (-2.0, 0.5, 1.6, 0.0),  # moved down enough
        (-2.0, 1.5, 3.0, 3.0),
        (0.0, 1.5, 0.0, 0.0),
    ],
)
def test_the_clip_by_hand(A, ratio, value, slope):
    policy, old = leaf([[0.0, math.log(ratio) - 1]]), f64([[0.0, -1.0]])
    loss = grpo_loss(policy, old, None, f64([A]), ONE_TOKEN)
    close(loss, [value])
    close(grad(loss, policy)[0], [[0.0, slope]])
    assert clipped(policy, old, f64([[A, A]]))[0, 1].item() == (slope == 0 and A != 0)


def test_clip_higher_and_the_whole_range():
    policy, old = f64([[0.0, math.log(1.25) - 1]]), f64([[0.0, -1.0]])
    cost = partial(grpo_loss, policy, old, None, f64([1.0]), ONE_TOKEN)
    close(cost(), [-1.2])
    close(cost(clip_high=0.28), [-1.25])
    close(cost(clip_high=INF), [-1.25])
    vanished = f64([[0.0, -30.0]])
    close(grpo_loss(vanished, old, None, f64([-1.0]), ONE_TOKEN, clip_low=1.0), [math.exp(-29)])


def test_each_normalisation_by_hand():
    """Ratio 1: a right response of one token, A = 1, and a wrong one of three, A = -1."""
    logps = torch.zeros(2, 4, dtype=torch.float64)
    mask = torch.tensor([[False, True, False, False], [False, True, True, True]])
    cost = lambda denominator: grpo_loss(logps, logps, None, f64([1.0, -1.0]), mask, denominator=denominator)
    close(cost(None), [-1.0, 1.0])  # GRPO: both weigh the same, so each wrong token a third
    close(cost(10), [-0.1, 0.3])  # Dr. GRPO: at most 10 tokens
    close(cost(mask.sum() / 2), [-0.5, 1.5])  # DAPO: the mean of the two is a sum over 4 tokens
    assert cost(mask.sum() / 2).mean().item() == (-1 + 3) / 4


def test_k3_by_hand():
    close(k3(f64([[0.0, -1.0]]), f64([[0.0, -1.0 + math.log(2)]])), [[0.0, 1 - math.log(2)]])
    probabilities, others = f64([0.2, 0.5, 0.3]), f64([0.6, 0.1, 0.3])
    mean = (probabilities * k3(probabilities.log()[None], others.log()[None])[0]).sum()
    close(mean, (probabilities * (probabilities / others).log()).sum())  # the KL divergence
    logits = leaf(probabilities.log())
    logps = logits.log_softmax(0)
    slope = grad((probabilities * k3(logps[None], others.log()[None])[0]), logits)[0]
    close(slope, probabilities - others)  # as that of KL(pi_ref || pi)
    policy = leaf([[0.0, -1.0]])
    loss = grpo_loss(policy, policy, f64([[0.0, -1.0 + math.log(2)]]), f64([0.0]), ONE_TOKEN, kl=0.5)
    close(loss, [0.5 * (1 - math.log(2))])
    close(grad(loss, policy)[0], [[0.0, 0.5 * (1 - 2)]])  # pulled up, where the reference finds it likelier


def test_at_ratio_1_it_is_the_policy_gradient_and_a_sum_over_pairs():
    """The line in the table at the top of losses.py: sum over pairs of (r_i - r_j)(s_j - s_i) / K."""
    policy, *_, mask = random_step(5)
    rewards, K = f64([[2.0, 0.0, 1.0, 1.0, 0.0, 0.5]]), 6
    ours, twin = leaf(policy), leaf(policy)
    advantages = group_advantages(rewards, scale="none")[0]
    slope = grad(grpo_loss(ours, ours, None, advantages, mask), ours)[0]
    s = torch.where(mask, twin, 0.0).sum(1) / mask.sum(1)
    pairs = [(i, j) for i in range(K) for j in range(K) if rewards[0, i] > rewards[0, j]]
    ranking = sum((rewards[0, i] - rewards[0, j]) * (s[j] - s[i]) for i, j in pairs) / K
    close(slope, grad(ranking, twin)[0], rtol=1e-7)


def test_an_advantage_may_belong_to_a_token():
    policy, old, _, advantages, mask = random_step(6)
    wide = advantages[:, None].expand_as(policy)
    close(grpo_loss(policy, old, None, wide, mask), grpo_loss(policy, old, None, advantages, mask))
    halved = torch.where(torch.arange(7) < 3, 0.0, wide)
    assert not torch.equal(
        grpo_loss(policy, old, None, halved, mask), grpo_loss(policy, old, None, wide, mask)
    )


@pytest.mark.parametrize("kl", [0.0, 0.1])
def test_gradients_pass_gradcheck(kl):
    policy, old, ref, advantages, mask = random_step(7, N=3, T=5)
    loss = lambda x: grpo_loss(x, old, ref, advantages, mask, kl=kl, clip_high=0.3)
    assert torch.autograd.gradcheck(loss, leaf(policy))


def test_old_ref_and_advantages_are_constants():
    policy, old, ref, advantages, mask = (leaf(x) if x.is_floating_point() else x for x in random_step(8))
    loss = grpo_loss(policy, old, ref, advantages, mask, kl=0.1)
    assert torch.autograd.grad(loss.sum(), [old, ref, advantages], allow_unused=True) == (None,) * 3


@pytest.mark.parametrize("garbage", [NAN, INF, -INF, 1e30])
def test_garbage_outside_the_mask_changes_neither_value_nor_gradient(garbage):
    policy, old, ref, advantages, mask = random_step(9)
    clean, dirty = leaf(policy), leaf(torch.where(mask, policy, garbage))
    wide = advantages[:, None].expand_as(policy)
    expected = grpo_loss(clean, old, ref, wide, mask, kl=0.1)
    others = [torch.where(mask, x, garbage) for x in (old, ref, wide)]
    found = grpo_loss(dirty, *others, mask, kl=0.1)
    close(found, expected.detach())
    close(grad(found, dirty)[0], grad(expected, clean)[0])


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("A", [1.0, -1.0, 0.0])
def test_a_broken_log_probability_is_never_clipped_into_a_finite_loss(bad, A):
    for policy, old in ((bad, -1.0), (-1.0, bad)):
        loss = grpo_loss(f64([[0.0, policy]]), f64([[0.0, old]]), None, f64([A]), ONE_TOKEN)
        assert loss.isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_ratios_of_e_to_the_1e4(dtype):
    """Where the clip cuts: gradient 0, not 0 times infinity. Where it does not, the loss is no number."""
    policy, old = leaf([[0.0, 1e4], [0.0, -1e4], [0.0, -1e4]], dtype), torch.zeros(3, 2, dtype=dtype)
    loss = grpo_loss(policy, old, None, torch.tensor([1.0, 1.0, -1.0], dtype=dtype), ONE_TOKEN.expand(3, 2))
    close(loss, [-1.2, 0.0, 0.8], rtol=1e-6)
    assert grad(loss, policy)[0].tolist() == [[0.0, 0.0]] * 3
    assert grpo_loss(policy[:1], old[:1], None, torch.tensor([-1.0]), ONE_TOKEN).item() == INF


def test_a_dead_group_costs_exactly_0_unless_there_is_a_kl_term():
    policy, old, ref, _, mask = random_step(10)
    policy, nothing = leaf(policy), torch.zeros(6)
    loss = grpo_loss(policy, old, None, nothing, mask)
    assert (loss == 0).all() and (grad(loss, policy)[0] == 0).all()
    loss = grpo_loss(policy, old, ref, nothing, mask, kl=0.1)
    close(loss, 0.1 * torch.where(mask, k3(policy, ref), 0.0).sum(1) / mask.sum(1))
    empty = grpo_loss(policy, old, ref, nothing + 1, mask & False, kl=0.1)
    assert (empty == 0).all() and (grad(empty, policy)[0] == 0).all()


def test_bfloat16_is_computed_in_float32_and_no_argument_changes():
    tensors = random_step(11, dtype=torch.bfloat16)
    before = [x.clone() for x in tensors]
    policy = leaf(tensors[0], torch.bfloat16)
    loss = grpo_loss(policy, *tensors[1:], kl=0.1)
    assert loss.dtype == torch.float32 and grad(loss, policy)[0].dtype == torch.bfloat16
    assert group_advantages(tensors[3][None]).dtype == torch.float32
    close(loss, grpo_loss(*[x.double() if x.is_floating_point() else x for x in tensors], kl=0.1), rtol=1e-4)
    assert all(torch.equal(x, y) for x, y in zip(before, tensors))


L, M, A1 = torch.zeros(1, 2), torch.ones(1, 2, dtype=torch.bool), torch.ones(1)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: group_advantages(L, scale="batch"), "scale is 'batch'; allowed: 'std', 'none'"),
        (lambda: group_advantages(L, L), "present is torch.float32"),
        (lambda: group_advantages(f64([[1.0, NAN]])), r"rewards\[0, 1\] is nan"),
        (lambda: grpo_loss(L, L, None, A1, M, kl=0.1), "kl is 0.1 with no ref_token_logps"),
        (lambda: grpo_loss(L, L, L, A1, M, kl=-0.1), "kl is -0.1"),
        (lambda: grpo_loss(L, L, L, A1, M, kl=NAN), "kl is nan"),
        (lambda: grpo_loss(L, L, None, A1, M, clip_low=1.2), "clip_low is 1.2"),
        (lambda: grpo_loss(L, L, None, A1, M, clip_high=-0.2), "clip_high -0.2"),
        (lambda: grpo_loss(L, L, None, A1, M, denominator=0), "denominator is 0; allowed: None, or"),
        (lambda: grpo_loss(L, L, None, A1, L), "loss_mask is torch.float32"),
    ],
)
def test_bad_values_are_named(call, message):
    assert_value_named(call, message)


@pytest.mark.parametrize(
    "call, shapes",
    [
        (lambda: group_advantages(A1), [r"\(1,\)", r"\(B, K\)"]),
        (lambda: grpo_loss(L, torch.zeros(2, 2), None, A1, M), ["old_token_logps", r"\(2, 2\)"]),
        (lambda: grpo_loss(L, L, None, torch.ones(2), M), ["advantages", r"\(2, 2\)", r"\(1, 2\)"]),
        (lambda: grpo_loss(L, L, None, A1, M[:, :1]), ["loss_mask", r"\(1, 1\)", r"\(1, 2\)"]),
    ],
)
def test_wrong_shapes_are_named(call, shapes):
    assert_shapes_named(call, shapes)


# ---- a two-armed bandit --------------------------------------------------------------------------


def pull(lr=0.5, sign=1, updates=1, steps=120, **settings):
    """Probability of the arm that wins 8 of 10 times (the other: 2), after steps of 8 pulls each."""
    g, logits = torch.Generator().manual_seed(0), torch.zeros(2, dtype=torch.float64, requires_grad=True)
    chance, mask = f64([0.2, 0.8]), ONE_TOKEN.expand(8, 2)
    for _ in range(steps):
        arms = torch.multinomial(logits.detach().softmax(0), 8, replacement=True, generator=g)
        rewards = (torch.rand(8, generator=g, dtype=torch.float64) < chance[arms]).double()
        advantages = sign * group_advantages(rewards[None], scale=settings.get("scale", "std"))[0]
        old = logits.detach().log_softmax(0)[arms, None].expand(8, 2)
        for _ in range(updates):
            logps = logits.log_softmax(0)[arms, None].expand(8, 2)
            slope = grad(grpo_loss(logps, old, None, advantages, mask).mean(), logits)[0]
            logits = (logits - lr * slope).detach().requires_grad_()
    return logits.softmax(0)[1].item()


def test_on_a_bandit_it_finds_the_better_arm():
    for settings in ({}, {"scale": "none"}, {"updates": 3}):
        assert pull(**settings) > 0.9, settings
        assert pull(sign=-1, **settings) < 0.1, settings  # the control: what is better is worse
    assert pull(lr=0.0) == 0.5


def test_the_clip_holds_the_policy_near_the_one_that_drew():
    """100 steps on the same two pulls: with the clip they end one step behind its edge (0.6 of 0.5 is ratio
    1.2), without it they run away."""
    arms, advantages = torch.tensor([0, 1]), f64([-1.0, 1.0])
    found = {}
    for clip in (0.2, INF):
        logits = leaf([0.0, 0.0])
        for _ in range(100):
            logps = logits.log_softmax(0)[arms, None].expand(2, 2)
            old = f64([[math.log(0.5)] * 2] * 2)
            loss = grpo_loss(
                logps, old, None, advantages, ONE_TOKEN.expand(2, 2), clip_low=min(clip, 1), clip_high=clip
            )
            logits = leaf(logits.detach() - 0.1 * grad(loss, logits)[0])
        found[clip] = logits.softmax(0)[1].item()
    assert 0.6 <= found[0.2] < 0.65 and found[INF] > 0.95


# ---- beside TRL ----------------------------------------------------------------------------------

TRL_CASES = {  # name -> TRL's settings and ours; max_completion_length is 6, the prompt has one token
    f"{kind}{name}": (
        dict(loss_type=kind, scale_rewards="none" if kind == "dr_grpo" else "group", **theirs),
        ours,
    )
    for kind in ("grpo", "dr_grpo", "dapo")
    for name, theirs, ours in (
        ("", dict(beta=0.0), {}),
        (", kl", dict(beta=0.04), dict(kl=0.04)),
        (", clip higher", dict(beta=0.0, epsilon=0.2, epsilon_high=0.28), dict(clip_high=0.28)),
    )
}
LONGEST, REWARDS = 6, [[1.0, 0.0, 0.0, 1.0], [0.0, 0.0, 1.0, 0.0], [1.0, 1.0, 1.0, 1.0]]


def made_up():
    """12 responses of up to LONGEST tokens to 3 questions, behind one prompt token, in float32."""
    tensors = random_step(20, N=12, T=1 + LONGEST, dtype=torch.float32)[:3]
    return [[[round(x, 4) for x in row] for row in tensor.tolist()] for tensor in tensors]


def trl_inputs(numbers):
    policy, old, ref = map(torch.tensor, numbers)
    mask = torch.arange(1 + LONGEST) <= torch.tensor([6, 1, 3, 2, 5, 4, 6, 2, 1, 3, 4, 5])[:, None]
    mask[:, 0] = False
    return policy, old, ref, mask


def ours_on(case, policy, old, ref, mask):
    """(advantages (B, K), loss) of a case, in our names."""
    theirs, settings = TRL_CASES[case]
    kind = theirs["loss_type"]
    advantages = group_advantages(torch.tensor(REWARDS), scale="none" if kind == "dr_grpo" else "std")
    denominator = {"grpo": None, "dr_grpo": LONGEST, "dapo": mask.sum() / len(mask)}[kind]
    losses = grpo_loss(
        policy,
        old,
        ref if "kl" in settings else None,
        advantages.flatten(),
        mask,
        denominator=denominator,
        **settings,
    )
    return advantages, losses.mean()


def trl_on(case, policy, old, ref, mask):
    """The same of TRL's GRPOTrainer: the advantages from the rewards of a step of its own, then its loss of
    the given log-probabilities. use_bias_correction_kl, on by default, is not the paper's KL term: off."""
    import datasets
    import tokenizers
    import transformers
    import trl

    datasets.disable_progress_bars()
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({f"t{i}": i for i in range(9)}, unk_token="t0"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, eos_token="t0", pad_token="t1")
    small = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=9)
    config = transformers.LlamaConfig(**small, eos_token_id=0, pad_token_id=1)
    prompts = [{"prompt": f"t{i}"} for i in (2, 3, 4)]
    flat = [reward for group in REWARDS for reward in group]
    with tempfile.TemporaryDirectory() as folder:
        transformers.LlamaForCausalLM(config).save_pretrained(folder)
        args = trl.GRPOConfig(
            folder,
            num_generations=4,
            per_device_train_batch_size=12,
            max_completion_length=LONGEST,
            gradient_checkpointing=False,
            bf16=False,
            use_cpu=True,
            report_to="none",
            use_bias_correction_kl=False,
            **TRL_CASES[case][0],
        )
        trainer = trl.GRPOTrainer(
            folder,
            reward_funcs=lambda completions, **_: flat,
            args=args,
            train_dataset=datasets.Dataset.from_list(prompts),
            processing_class=tokenizer,
        )
        trainer.model.train()
        trainer.current_gradient_accumulation_steps = 1
        made = trainer._generate_and_score_completions([row for row in prompts for _ in range(4)])
    made |= dict(
        prompt_ids=torch.zeros(12, 1, dtype=torch.long),
        prompt_mask=torch.ones(12, 1, dtype=torch.long),
        completion_ids=torch.zeros(12, LONGEST, dtype=torch.long),
        completion_mask=mask[:, 1:].long(),
        old_per_token_logps=old[:, 1:],
        ref_per_token_logps=ref[:, 1:],
        num_items_in_batch=mask.sum(),
    )
    forward = lambda *_, **__: (policy[:, 1:], torch.zeros(12, LONGEST), None)
    trainer._get_per_token_logps_and_entropies = forward
    return made["advantages"].view(3, 4), trainer._compute_loss(trainer.model, made)


def measured(side, case, numbers):
    """(advantages, loss, gradient by the policy's log-probabilities)."""
    policy, *others = trl_inputs(numbers)
    policy = leaf(policy, torch.float32)
    advantages, loss = side(case, policy, *others)
    return advantages, loss.detach(), grad(loss, policy)[0]


@pytest.mark.parametrize("case", TRL_CASES)
def test_advantages_loss_and_gradient_equal_trls(case):
    pytest.importorskip("trl")
    for ours, theirs in zip(*(measured(side, case, made_up()) for side in (ours_on, trl_on))):
        close(ours, theirs, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("case", TRL_CASES)
def test_advantages_loss_and_gradient_equal_what_trl_has_computed(case):
    golden = json.loads(FILE.read_text())
    found = measured(ours_on, case, golden["inputs"])
    for ours, name in zip(found, ("advantages", "loss", "gradient")):
        close(ours, golden["cases"][case][name], rtol=2e-5, atol=1e-6)


# ---- align.py --method grpo ----------------------------------------------------------------------

LOGGED = {"loss", "reward", "length", "entropy", "clip_share", "kl", "dead_groups", "dead_groups_left"}
LOGGED |= {"resampled", "unreadable", "cut_off", "rollout_tokens_per_s", "train_tokens_per_s", "tokens_per_s"}
FIRST_HALF = lambda response: float(response.ids[0] < 256)  # a random policy gets about half of it right


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    return small_policy(tmp_path_factory.mktemp("policy"))


@pytest.fixture
def first_half(monkeypatch):
    reward_by(monkeypatch, FIRST_HALF)


def reward_by(monkeypatch, reward):
    """What a paper's own reward is: one function in a row of METHODS."""
    row = dataclasses.replace(align.METHODS["grpo"], reward=reward)
    monkeypatch.setitem(align.METHODS, "grpo", row)


def run_grpo(policy, *argv, cwd):
    common = ["--method", "grpo", "--init", policy, "--device", "cpu", "--steps", 4, "--batch-size", 2]
    common += ["--k", 4, "--limit", 20, "--max-new-tokens", 3, "--eval-split", "", "--out", "out"]
    return script("align.py", *common, *argv, cwd=cwd)


def weights(folder):
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("kl", [0.0, 0.05])
@pytest.mark.parametrize("normalisation", ["grpo", "dr-grpo", "dapo"])
def test_the_flags_give_the_papers_losses(normalisation, kl):
    """The equations at the top, written out, of two groups of three with unlike lengths."""
    policy, old, ref, _, mask = random_step(3)
    rewards = [[1.0, 0.0, 0.5], [0.0, 0.0, 1.0]]
    ids = [[5] * int(row.nonzero().max() + 1) for row in mask]  # scored from the third token on
    groups = [[Row(str(g), ids[3 * g + k], 2, rewards[g][k]) for k in range(3)] for g in range(2)]
    batch = collate(groups, 0)
    assert torch.equal(batch.loss_mask, mask)
    c = AlignConfig(method="grpo", normalisation=normalisation, clip_low=0.1, clip_high=0.4, kl=kl)
    c = dataclasses.replace(c, max_new_tokens=9)
    micro = rollouts.Micro(batch, old_token_logps=old, ref_token_logps=ref if kl else None)
    ours, twin = leaf(policy), leaf(policy)
    mean_length = mask.sum().item() / 6
    loss = align.grpo(align.tabulate(ours, micro, mean_length, True), c, None)

    advantages = f64(rewards) - f64(rewards).mean(1, keepdim=True)
    if normalisation != "dr-grpo":
        advantages = advantages / (f64(rewards).std(1, keepdim=True) + 1e-4)
    denominator = {"grpo": None, "dr-grpo": 9, "dapo": mean_length}[normalisation]
    expected = loops(twin, old, ref, advantages.flatten(), mask, 0.1, 0.4, kl, denominator)
    close(loss.sum(), expected.sum() / 3)
    close(grad(loss, ours)[0], grad(expected / 3, twin)[0])


@pytest.mark.parametrize("normalisation", align.NORMALISATIONS)
def test_each_normalisation_trains_and_logs(policy, first_half, tmp_path, normalisation):
    argv = [
        "--normalisation",
        normalisation,
        "--updates",
        2,
        "--kl",
        0.1,
        "--clip-high",
        0.28,
        "--resample",
        1,
    ]
    done = run_grpo(policy, *argv, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    log = lines(tmp_path)
    assert [line["step"] for line in log] == [1, 2, 3, 4] and all(LOGGED <= line.keys() for line in log)
    assert log[0]["kl"] == 0 < log[3]["kl"] and log[0]["clip_share"] == log[2]["clip_share"] == 0
    assert log[0]["reward"] == log[1]["reward"] and log[0]["entropy"] > 0 and 1 <= log[0]["length"] <= 3
    before, after = weights(policy), weights(tmp_path / "out")
    assert before.keys() == after.keys() and any(not torch.equal(before[k], after[k]) for k in before)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_ratio_is_exactly_1_at_the_first_step_on_each_batch_of_rollouts(
    policy, first_half, tmp_path, monkeypatch, dtype
):
    apart = []

    def watched(logps, old, *arguments, **settings):
        apart.append((logps - old).detach().abs().max().item())
        return grpo_loss(logps, old, *arguments, **settings)

    monkeypatch.setattr(align, "grpo_loss", watched)
    argv = ["--updates", 2, "--accumulate", 2, "--lr", 1e-2, "--dtype", dtype, "--temperature", 0.7]
    assert run_grpo(policy, *argv, cwd=tmp_path).returncode == 0
    first, second = apart[0:2] + apart[4:6], apart[2:4] + apart[6:8]
    assert len(apart) == 8 and first == [0.0] * 4 and min(second) > 0


def test_the_loop_finds_what_is_rewarded(policy, first_half, tmp_path, monkeypatch):
    """A bandit through the whole script: each answer begins with one of 512 tokens, half of which win."""
    argv = ["--steps", 40, "--batch-size", 4, "--k", 8, "--lr", 3e-2, "--max-new-tokens", 1]
    assert run_grpo(policy, *argv, cwd=tmp_path).returncode == 0
    rewards = [line["reward"] for line in lines(tmp_path)]
    assert 0.3 < rewards[0] < 0.7 and sum(rewards[-5:]) / 5 > 0.9
    reward_by(monkeypatch, lambda response: -FIRST_HALF(response))  # the control
    assert run_grpo(policy, *argv, "--out", "other", cwd=tmp_path).returncode == 0
    assert sum(line["reward"] for line in lines(tmp_path, "other")[-5:]) / 5 > -0.1


def test_accumulation_gives_the_big_batch(policy, first_half, tmp_path):
    for normalisation in align.NORMALISATIONS:
        argv = [
            "--normalisation",
            normalisation,
            "--updates",
            2,
            "--batch-size",
            4,
            "--kl",
            0.1,
            "--overwrite",
        ]
        for out, accumulate in (("one", 1), ("two", 3)):
            more = ["--accumulate", accumulate, "--max-new-tokens", 8, "--out", out]
            assert run_grpo(policy, *argv, *more, cwd=tmp_path).returncode == 0
        for name in ("grad_norm", "length", "reward", "entropy"):
            one, two = ([line[name] for line in lines(tmp_path, out)] for out in ("one", "two"))
            assert one == pytest.approx(two, rel=1e-4), (normalisation, name)


def test_a_stopped_and_resumed_run_ends_with_the_same_bits(policy, first_half, tmp_path):
    argv = ["--updates", 2, "--kl", 0.1, "--resample", 1, "--steps", 7, "--lr", 1e-2]
    assert run_grpo(policy, *argv, cwd=tmp_path).returncode == 0
    assert run_grpo(policy, *argv, "--out", "halves", "--stop-at", 4, cwd=tmp_path).returncode == 0
    done = run_grpo(policy, *argv, "--out", "halves", "--resume", cwd=tmp_path)
    assert done.returncode == 0 and "steps 5 to 7" in done.stdout, done.stderr
    one, two = weights(tmp_path / "out"), weights(tmp_path / "halves")
    assert all(torch.equal(one[name], two[name]) for name in one)
    timeless = [
        [{k: v for k, v in line.items() if not k.endswith("per_s")} for line in lines(tmp_path, out)]
        for out in ("out", "halves")
    ]
    assert timeless[0] == timeless[1] and len(timeless[0]) == 7


def test_a_run_is_not_resumed_on_other_answers(policy, first_half, tmp_path):
    rows = [{"question": "How many?", "answer": "3"}, {"question": "And now?", "answer": "4"}]
    argv = ["--data", jsonl(tmp_path / "q.jsonl", *rows)]
    assert run_grpo(policy, *argv, "--stop-at", 2, cwd=tmp_path).returncode == 0
    jsonl(tmp_path / "q.jsonl", rows[0], rows[1] | {"answer": "5"})
    assert_one_line_error(run_grpo(policy, *argv, "--resume", cwd=tmp_path), "--resume: data_digest is")
    jsonl(tmp_path / "q.jsonl", *rows)
    assert run_grpo(policy, *argv, "--resume", cwd=tmp_path).returncode == 0


def test_a_run_is_not_resumed_under_another_reference(policy, first_half, tmp_path):
    ref = small_policy(tmp_path / "ref", seed=3)
    argv = ["--ref", ref, "--kl", 0.1]
    assert run_grpo(policy, *argv, "--stop-at", 2, cwd=tmp_path).returncode == 0
    small_policy(ref, seed=4)
    assert_one_line_error(run_grpo(policy, *argv, "--resume", cwd=tmp_path), "--resume: ref_digest is")
    small_policy(ref, seed=3)
    assert run_grpo(policy, *argv, "--resume", cwd=tmp_path).returncode == 0


def test_steps_that_share_rollouts_are_not_parted(policy, tmp_path):
    """A checkpoint holds no rollouts: it, --stop-at and a signal wait for the last step on them."""
    config = AlignConfig(out=str(tmp_path / "run"), save_every=3)
    model = torch.nn.Linear(2, 2)
    optimizer = make_optimizer(model, 1e-3, 0.0)
    with Run(config) as run:
        saved = []
        for step in range(1, 9):
            run.end_step(step, 12, model, optimizer, together=2)
            saved.append(max(checkpoints(run.out), default=0))
        assert saved == [0, 0, 0, 4, 4, 6, 6, 6]
        run.signal = signal.SIGTERM
        run.end_step(9, 12, model, optimizer, together=2)
        with pytest.raises(SystemExit) as stop:
            run.end_step(10, 12, model, optimizer, together=2)
        assert stop.value.code == 128 + signal.SIGTERM and list(checkpoints(run.out)) == [10]


def test_a_reference_is_loaded_only_for_a_kl_term(policy, first_half, tmp_path, monkeypatch):
    loaded, load = [], align.load_model
    monkeypatch.setattr(align, "load_model", lambda f, **k: loaded.append(str(f)) or load(f, **k))
    assert run_grpo(policy, cwd=tmp_path).returncode == 0
    assert loaded == [str(policy)] and all(line["kl"] is None for line in lines(tmp_path))
    loaded.clear()
    assert run_grpo(policy, "--kl", 0.1, "--ref", BASE, "--overwrite", cwd=tmp_path).returncode == 0
    assert loaded == [str(policy), str(BASE)] and lines(tmp_path)[0]["kl"] > 0  # another model: apart at once


def test_a_run_of_dead_groups_learns_nothing_and_ends_well(policy, tmp_path, monkeypatch):
    """A random policy is never right, nor is it by a reward that is always 0.7."""
    for out, reward in (("wrong", align.outcome), ("same", lambda response: 0.7)):
        reward_by(monkeypatch, reward)
        assert run_grpo(policy, "--out", out, cwd=tmp_path).returncode == 0
        log = lines(tmp_path, out)
        assert all(line["loss"] == line["grad_norm"] == 0 and line["dead_groups"] == 1 for line in log)
        before, after = weights(policy), weights(tmp_path / out)
        assert all(torch.equal(before[name], after[name]) for name in before)
    assert {line["cut_off"] for line in lines(tmp_path, "wrong")} <= {1.0, 0.875}  # of 3 tokens at most


def test_what_was_cut_off_is_wrong():
    assert align.outcome(Response("#### 7", True)) == 1
    assert align.outcome(Response("#### 7 and so", True, finish="length")) == 0
    assert align.outcome(Response("#### 8", False)) == align.outcome(Response("?", None)) == 0


# ---- rollouts ------------------------------------------------------------------------------------


def test_no_batch_of_rollouts_asks_a_problem_twice():
    """Asked twice in a step, it would give the same responses twice, as their seeds are the same."""
    config = AlignConfig(method="grpo", steps=11, updates=2, batch_size=4)
    plan = rollouts.plan_rollouts(10, config)
    assert len(plan) == 6 and {len(batch) for batch in plan} == {2, 4}
    for one_pass in (plan[:3], plan[3:]):
        assert sorted(number for batch in one_pass for number in batch) == list(range(10))
    assert plan[:3] != plan[3:] and plan == rollouts.plan_rollouts(10, config)
    other = dataclasses.replace(config, steps=0, epochs=0.5, seed=1)
    assert len(rollouts.plan_rollouts(10, other)) == 2  # half of 3, rounded up
    assert rollouts.plan_rollouts(10, other) != plan[:2]
    assert [sorted(batch) for batch in rollouts.plan_rollouts(3, config)] == [[0, 1, 2]] * 6


def roll_out(monkeypatch, live, resample, step=1, chosen=(0, 1, 2), n_problems=8):
    """rollouts.roll_out with a sampler whose groups are dead but those of the problems in `live` ->
    (the problems' numbers that are left, what is logged, the numbers in each call of the sampler)."""
    calls = []

    def sample_groups(model, tokenizer, problems, *, n, seed, **asking):
        calls.append([int(problem.id) for problem in problems])
        for problem in problems:
            marks = [int(problem.id) in live and i == 0 for i in range(n)]
            cut = "length" if problem.id == "1" else "stop"
            yield Samples(
                problem, [Response(f"{i}", mark, ids=[5, 6, 7], finish=cut) for i, mark in enumerate(marks)]
            )

    monkeypatch.setattr(rollouts, "sample_groups", sample_groups)
    problems = [Problem(f"{i}", "How many?", "3") for i in range(n_problems)]
    config = AlignConfig(method="grpo", k=2, resample=resample)
    reward = lambda response: float(response.correct)
    left, about = rollouts.roll_out(
        torch.nn.Linear(1, 1), None, problems, list(chosen), step, config, {}, reward
    )
    return [int(samples.problem.id) for samples in left], about, calls


def test_dead_groups_are_replaced_by_other_problems_a_bounded_number_of_times(monkeypatch):
    left, about, calls = roll_out(monkeypatch, live={0}, resample=0)
    assert left == [0, 1, 2] and calls == [[0, 1, 2]]
    assert about["dead_groups"] == about["dead_groups_left"] == 2 / 3 and about["resampled"] == 0
    assert about["cut_off"] == 1 / 3 and about["rollout_tokens_per_s"] > 0
    left, about, calls = roll_out(monkeypatch, live={0}, resample=2)
    assert [len(call) for call in calls] == [3, 2, 2] and left[0] == 0 and left[1:] == calls[2]
    drawn = [number for call in calls for number in call]
    assert len(set(drawn)) == 7 and about["resampled"] == 4
    assert about["dead_groups"] == 6 / 7 and about["dead_groups_left"] == 2 / 3
    left, about, calls = roll_out(monkeypatch, live=set(range(8)) - {1}, resample=5)
    assert [len(call) for call in calls] == [3, 1] and left == [0, calls[1][0], 2]
    assert about["dead_groups_left"] == 0 and about["dead_groups"] == 1 / 4


def test_dynamic_sampling_ends_when_no_other_problem_is_left(monkeypatch):
    left, about, calls = roll_out(monkeypatch, live=set(), resample=100, n_problems=5)
    assert calls[0] == [0, 1, 2] and sorted(calls[1]) == [3, 4] and len(calls) == 2
    assert about["resampled"] == 2 and about["dead_groups_left"] == 1
    assert roll_out(monkeypatch, live=set(), resample=9, n_problems=3)[2] == [[0, 1, 2]]


def test_what_takes_the_dead_ones_place_depends_on_the_step_alone(monkeypatch):
    others = [roll_out(monkeypatch, set(), 1, step=step, n_problems=50)[2][1] for step in (1, 1, 2)]
    assert others[0] == others[1] != others[2]


def test_a_picture_that_is_gone_costs_its_own_problem_alone(monkeypatch):
    def sample_groups(model, tokenizer, problems, **_):
        for problem in problems:
            responses = [Response("3", mark, ids=[5]) for mark in (True, False)]
            yield Samples(problem, responses) if problem.id in live else Samples(problem, error="gone.png")

    monkeypatch.setattr(rollouts, "sample_groups", sample_groups)
    problems = [Problem(name, "How many?", "3") for name in "ab"]
    arguments = [
        torch.nn.Linear(1, 1),
        None,
        problems,
        [0, 1],
        3,
        AlignConfig(method="grpo"),
        {},
        align.outcome,
    ]
    live = "b"
    left, about = rollouts.roll_out(*arguments)
    assert [samples.problem.id for samples in left] == ["b"] and about["unreadable"] == 1
    live = ""
    with pytest.raises(InputError, match="step 3: no problem has a response; the first: gone.png"):
        rollouts.roll_out(*arguments)


def test_repeated_and_empty_responses_are_trained_as_often_as_they_were_drawn(policy):
    tokenizer = Tokenizer(policy)
    ids = tokenizer.encode("3") + [tokenizer.eos_id]
    drawn = [("3", ids, "stop"), ("3", ids, "stop"), ("", ids[-1:], "stop"), ("3", ids[:-1], "length")]
    responses = [Response(text, False, 0.0, ids=ids, finish=finish) for text, ids, finish in drawn]
    problem, config = Problem("1", "How many?", "3"), AlignConfig(method="grpo")
    rows = rollouts.as_drawn(tokenizer, Samples(problem, responses), config)
    assert [row.ids[row.n_prompt :] for row in rows] == [
        ids,
        ids,
        ids[-1:],
        ids[:-1],
    ]  # EOS where it was drawn


def test_the_temperature_reaches_the_sampler(policy, first_half, tmp_path):
    """Nearly greedy: all responses to a question are the same one, so that no group is alive."""
    assert run_grpo(policy, "--temperature", 1e-4, "--steps", 1, cwd=tmp_path).returncode == 0
    assert lines(tmp_path)[0]["dead_groups"] == 1


def test_peek_shows_the_first_rollouts(policy, first_half, tmp_path):
    done = run_grpo(policy, "--peek", 1, "--steps", 2, cwd=tmp_path)
    assert done.returncode == 0 and done.stdout.count("  reward ") == 4, done.stdout


def test_what_is_logged_of_a_policy_by_hand():
    rows = [[Row("1", [9, 1], 1, 1.0, True), Row("1", [9, 1, 2, 3], 1, 0.0, False)]]
    micro = rollouts.Micro(collate(rows, 0))
    micro.old_token_logps = -f64([[0, 1, 0, 0], [0, 2, 3, 6]])
    micro.ref_token_logps = micro.old_token_logps
    logps = micro.old_token_logps + f64([[0, 0.5, 9, 9], [0, -0.5, 0.5, 0.0]])
    config = AlignConfig(method="grpo", kl=0.1)
    table = align.tabulate(logps, micro, 2.0, True)
    watched = align.watch_policy([table], config)
    k3s = [math.exp(-0.5) + 0.5 - 1, math.exp(0.5) - 0.5 - 1, math.exp(-0.5) + 0.5 - 1, 0.0]
    expected = dict(reward=0.5, length=2.0, entropy=12 / 4, clip_share=2 / 4, kl=sum(k3s) / 4)
    assert watched == pytest.approx(expected)  # clipped: the right one's token, the wrong one's first
    assert align.watch_policy([table], AlignConfig(method="grpo"))["kl"] is None


@pytest.mark.parametrize(
    "argv, parts",
    [
        (["--samples", "s.jsonl"], ["--samples is 's.jsonl'", "grpo draws its own responses", "--data"]),
        (["--ref-logps", "r.safetensors"], ["--ref-logps"]),
        (["--truncate-words", 5], ["--truncate-words"]),
        (["--ref", BASE], ["--ref", "--kl 0 loads no reference"]),
        (["--constraint", "detached"], ["--constraint", "none, for grpo"]),
        (["--sft-weight", 1], ["--sft-weight", "grpo has no SFT term"]),
        (["--updates", 2, "--stop-at", 3], ["--stop-at is 3", "multiple of --updates (2)"]),
        (["--updates", 0], ["--updates is 0", "at least 1"]),
        (["--k", 1], ["--k is 1"]),
        (["--kl", -0.1], ["--kl is -0.1"]),
        (["--clip-low", 1.5], ["--clip-low is 1.5"]),
        (["--temperature", 0], ["--temperature is 0.0", "above 0"]),
        (["--normalisation", "bnpo"], ["--normalisation", "bnpo"]),
        (["--max-new-tokens", 4000], ["4000 new ones do not fit into the context"]),
        (["--data", "q.jsonl"], ["--data", "problems with an answer, 1 have none"]),
        (["--method", "aft", "--kl", 0.1], ["--kl is 0.1", "its default, 0.0: aft does not use it"]),
        (["--method", "dpo", "--updates", 2], ["--updates is 2", "its default, 1"]),
    ],
)
def test_bad_input_ends_in_one_line(policy, tmp_path, argv, parts):
    jsonl(tmp_path / "q.jsonl", {"question": "Why?"}, {"question": "How many?", "answer": "3"})
    assert_one_line_error(run_grpo(policy, *argv, cwd=tmp_path), *parts)
    assert not (tmp_path / "out").exists()


if __name__ == "__main__":
    inputs, results = made_up(), {}
    for case in TRL_CASES:
        numbers = [
            [round(x, 8) for x in value.flatten().tolist()] for value in measured(trl_on, case, inputs)
        ]
        results[case] = dict(
            advantages=[numbers[0][i : i + 4] for i in (0, 4, 8)],
            loss=numbers[1][0],
            gradient=[numbers[2][i : i + 1 + LONGEST] for i in range(0, len(numbers[2]), 1 + LONGEST)],
        )
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("trl", "torch"))
    made = (
        f"python -m tests.test_grpo: TRL's GRPOTrainer, float32 ({versions}); inputs: policy, old, reference"
    )
    FILE.write_text(json.dumps({"made": made, "inputs": inputs, "cases": results}) + "\n")
