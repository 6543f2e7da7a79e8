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

import importlib.metadata
import json
import math
import tempfile
from functools import partial
from pathlib import Path

import pytest
import torch

from minicot.losses import clipped, group_advantages, grpo_loss, k3
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
    with pytest.raises(ValueError, match=message) as error:
        call()
    assert "\n" not in str(error.value)


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
    with pytest.raises(AssertionError) as error:
        call()
    for shape in shapes:
        error.match(shape)


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


def trl_inputs():
    """12 responses of up to LONGEST tokens to 3 questions, behind one prompt token, in float32."""
    policy, old, ref, _, _ = random_step(20, N=12, T=1 + LONGEST, dtype=torch.float32)
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


def measured(side, case):
    """(advantages, loss, gradient by the policy's log-probabilities)."""
    policy, *others = trl_inputs()
    policy = leaf(policy, torch.float32)
    advantages, loss = side(case, policy, *others)
    return advantages, loss.detach(), grad(loss, policy)[0]


@pytest.mark.parametrize("case", TRL_CASES)
def test_advantages_loss_and_gradient_equal_trls(case):
    pytest.importorskip("trl")
    for ours, theirs in zip(measured(ours_on, case), measured(trl_on, case)):
        close(ours, theirs, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("case", TRL_CASES)
def test_advantages_loss_and_gradient_equal_what_trl_has_computed(case):
    golden = json.loads(FILE.read_text())["cases"][case]
    for ours, name in zip(measured(ours_on, case), ("advantages", "loss", "gradient")):
        close(ours, golden[name], rtol=2e-5, atol=1e-6)


if __name__ == "__main__":
    results = {}
    for case in TRL_CASES:
        numbers = [[round(x, 8) for x in value.flatten().tolist()] for value in measured(trl_on, case)]
        results[case] = dict(
            advantages=[numbers[0][i : i + 4] for i in (0, 4, 8)],
            loss=numbers[1][0],
            gradient=[numbers[2][i : i + 1 + LONGEST] for i in range(0, len(numbers[2]), 1 + LONGEST)],
        )
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("trl", "torch"))
    made = f"python -m tests.test_grpo: TRL's GRPOTrainer._compute_loss on trl_inputs(), float32; {versions}"
    FILE.write_text(json.dumps({"made": made, "cases": results}) + "\n")
