"""CoT-Influx (CoT-Max, arXiv 2312.08901): a pruner that keeps some worked examples and some of their tokens.

R = (1 / (1 + L) + R_acc) * (t / T)^w,  w = 1 where t <= T, else -1
t / T:     1/4   1/2   1   2     4
factor:    1/4   1/2   1   1/2   1/4

log pi = mean over shots of log pi(a_j) + mean over free tokens of kept shots of log pi(a_ji)
P(keep) = sigmoid(z),  d log pi(a) / dz = (a - P(keep)) / number of decisions,  0 where nothing was decided
gradient = - mean over repeats of (R - mean R of the other repeats) d log pi
"""

import contextlib
import io
import json
import itertools
import math
import os
import random
import types
from dataclasses import replace

import pytest
import torch

from minicot import pruner as module
from minicot.config import InputError
from minicot.data import encode_row, target
from minicot.model import ModelConfig, Transformer
from minicot.pruner import (
    Pruner,
    PrunerConfig,
    choose,
    folder_digest,
    entropy,
    judge_by,
    kept_by_kind,
    kind_of,
)
from minicot.pruner import leave_one_out, learn, load_encoder, load_pruner, log_policy, look, marked, prune
from minicot.pruner import reward, rollout, sample_actions
from minicot.records import Problem, fields_of, shot_text
from minicot.runs import Log
from minicot.sampling import generate
from minicot.scoring import score_plain
from minicot.selection import (
    METHODS,
    Encoder,
    fit,
    layout,
    n_steps,
    normalised,
    question_of,
    self_information,
)
from minicot.selection import size_by, squeeze, texts_of, units, whole, with_candidates
from minicot.sets import read_problems
from minicot.tokenizer import Tokenizer
from minicot.training import resolve
from minicot.weights import save_model
from tests.bench import sides
from tests.helpers import assert_one_line_error, jsonl, script

WAYS = (*METHODS, "learned")


@pytest.fixture(scope="module")
def encoder():
    return load_encoder("toy", None, torch.float32)


@pytest.fixture(scope="module")
def size(encoder):
    return size_by(encoder.tokenizer)


@pytest.fixture
def other_folder(tokenizer_folder):
    """A tiny random model with a tokenizer that is not the toy's."""
    sizes = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, head_dim=8)
    sizes |= dict(num_key_value_heads=1, vocab_size=360, max_position_embeddings=512, rope_theta=1e4)
    config = ModelConfig(model_type="llama", rms_norm_eps=1e-5, tie_word_embeddings=True, **sizes)
    save_model(Transformer(config, torch.Generator().manual_seed(5)), tokenizer_folder)
    return tokenizer_folder


def pruner_main(*argv, cwd):
    """Run `python -m minicot.pruner argv` in the folder cwd, without starting a process."""
    before, out, err, code = os.getcwd(), io.StringIO(), io.StringIO(), 0
    os.chdir(cwd)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            module.main([str(word) for word in argv])
    except SystemExit as stop:
        code = stop.code
    finally:
        os.chdir(before)
    return types.SimpleNamespace(returncode=code, stdout=out.getvalue(), stderr=err.getvalue())


def toy_problems(n, k=4):
    """Toy problems that bring k shots each, made of others."""
    rows = read_problems("toy", "train", limit=n * (k + 1))
    texts = [shot_text(row.question, row.solution) for row in rows[n:]]
    return [replace(row, shots=texts[i * k : i * k + k]) for i, row in enumerate(rows[:n])]


def is_part_of(short, long):
    """Are all characters of `short` in `long`, in this order?"""
    rest = iter(long)
    return all(letter in rest for letter in short)


# ---- the reward ----------------------------------------------------------------------------------


def test_the_length_factor_peaks_at_the_target():
    t = [32, 64, 128, 256, 512]
    assert reward([0.0] * 5, [0] * 5, t, 128).tolist() == [0.25, 0.5, 1.0, 0.5, 0.25]
    assert reward([0.0] * 5, [1] * 5, t, 128).tolist() == [0.5, 1.0, 2.0, 1.0, 0.5]
    assert reward([0.0] * 5, [0] * 5, t, 128, w=(0.0, -2.0)).tolist() == [1, 1, 1, 1 / 4, 1 / 16]


def test_the_reward_of_loss_and_answer():
    rewards = reward(
        torch.tensor([[0.0, 1.0, 3.0, math.inf]]), torch.tensor([[True, False, True, False]]), 7, 7
    )
    assert rewards.tolist() == [[2.0, 0.5, 1.25, 0.0]]  # a prompt that does not fit is worth nothing
    for loss, goal in ((-0.1, 7), (math.nan, 7), (1.0, 0)):
        with pytest.raises(ValueError, match="target >= 1, losses >= 0"):
            reward(loss, 0, 7, goal)


def test_leave_one_out_by_hand():
    rewards = torch.tensor([[1.0, 2.0, 6.0], [5.0, 5.0, 5.0]])
    assert leave_one_out(rewards).tolist() == [[1 - 4, 2 - 3.5, 6 - 1.5], [0, 0, 0]]


# ---- the policies --------------------------------------------------------------------------------


def test_at_first_nearly_nine_in_ten_are_kept_and_the_seed_decides():
    states = torch.randn(50, 20, 64, generator=torch.Generator().manual_seed(0))
    real = torch.ones(50, 20, dtype=torch.bool)
    pruner = Pruner(64, seed=1)
    z_shot, z_token = pruner(states, real)
    for z in (z_shot, z_token):
        assert z.sigmoid().mean().item() == pytest.approx(0.88, abs=0.03)
    for one in (pruner.shot, pruner.token):
        assert [type(layer).__name__ for layer in one] == [
            "LayerNorm",
            "Linear",
            "LayerNorm",
            "GELU",
            "Linear",
        ]
        assert one[1].out_features == 512 and one[-1].out_features == 2
        assert one[-1].weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert torch.equal(Pruner(64, seed=1)(states, real)[1], z_token)
    assert not torch.equal(Pruner(64, seed=2)(states, real)[1], z_token)


def test_padding_changes_neither_the_policies_nor_log_pi_nor_entropy():
    draw = torch.Generator().manual_seed(0)
    states, real = torch.randn(2, 3, 8, generator=draw), torch.ones(2, 3, dtype=torch.bool)
    free = torch.tensor([[0, 1, 1], [0, 0, 1]]).bool()
    shots, tokens = torch.tensor([[1, 0], [1, 1]]).bool(), torch.rand(2, 2, 3, generator=draw) < 0.5
    pruner = Pruner(8, 16)
    pad = lambda x, value=0: torch.nn.functional.pad(x, (0, 2), value=value)
    longer = torch.cat([states, torch.randn(2, 2, 8, generator=draw) * 100], 1)
    z, z_longer = pruner(states, real), pruner(longer, pad(real))
    assert torch.allclose(z[0], z_longer[0], atol=1e-6) and torch.allclose(
        z[1], z_longer[1][:, :3], atol=1e-6
    )
    for filling in (0, 1):
        padded = log_policy(*z_longer, shots, pad(tokens, filling), pad(free))
        assert torch.allclose(padded, log_policy(*z, shots, tokens, free), atol=1e-6)
    assert torch.allclose(entropy(*z, free), entropy(*z_longer, pad(free)), atol=1e-6)


def test_log_pi_and_its_gradient_by_hand():
    z_shot = torch.tensor([0.5, -1.0, 2.0], requires_grad=True)
    z_token = torch.tensor([[0.3, -0.2], [1.0, 0.0], [-0.7, 0.4]], requires_grad=True)
    free = torch.tensor([[0, 1], [0, 1], [1, 1]]).bool()  # the first tokens of two shots are forced
    shots = torch.tensor([[1, 0, 1], [1, 1, 0]]).bool()
    tokens = torch.tensor([[[0, 1], [1, 1], [1, 0]], [[1, 0], [0, 0], [0, 1]]]).bool()
    p, q = z_shot.detach().sigmoid(), z_token.detach().sigmoid()
    logps = log_policy(z_shot, z_token, shots, tokens, free)
    first = (p[0] * (1 - p[1]) * p[2]).log() / 3 + (q[0, 1] * q[2, 0] * (1 - q[2, 1])).log() / 3
    second = (p[0] * p[1] * (1 - p[2])).log() / 3 + ((1 - q[0, 1]) * (1 - q[1, 1])).log() / 2
    assert logps.tolist() == pytest.approx([first.item(), second.item()])

    advantages = leave_one_out(torch.tensor([[3.0, 1.0]]))
    assert advantages.tolist() == [[2.0, -2.0]]
    (-(advantages * logps[None]).mean()).backward()
    of_shots = -(2 * (shots[0].float() - p) / 3 - 2 * (shots[1].float() - p) / 3) / 2
    assert torch.allclose(z_shot.grad, of_shots)
    of_tokens = torch.zeros(3, 2)
    of_tokens[0, 1] = -(2 * (1 - q[0, 1]) / 3 - 2 * (0 - q[0, 1]) / 2) / 2
    of_tokens[1, 1] = -(-2 * (0 - q[1, 1]) / 2) / 2  # only the second repeat has kept this shot
    of_tokens[2] = -(2 * (tokens[0, 2].float() - q[2]) / 3) / 2
    assert torch.allclose(z_token.grad, of_tokens)
    assert z_token.grad[0, 0] == z_token.grad[1, 0] == 0  # forced: nothing was chosen


def test_a_shot_is_always_kept_and_each_with_its_probability():
    draw = lambda z, seed=0: sample_actions(
        torch.full((3,), z), torch.tensor([[1.0, -1.0]] * 3), 4000, torch.Generator().manual_seed(seed)
    )
    shots, tokens = draw(-2.0)
    assert shots.any(1).all()
    p = 1 / (1 + math.e**2)
    assert shots.float().mean().item() == pytest.approx(p / (1 - (1 - p) ** 3), abs=0.01)
    assert tokens.float().mean((0, 1)).tolist() == pytest.approx([0.731, 0.269], abs=0.02)
    assert torch.equal(draw(-2.0)[0], shots) and not torch.equal(draw(-2.0, seed=1)[0], shots)
    shots, _ = draw(-40.0)  # where all are unlikely: one alone, each as often as the others
    assert (shots.sum(1) == 1).all()
    assert shots.float().mean(0).tolist() == pytest.approx([1 / 3] * 3, abs=0.03)


def test_entropy_by_hand():
    free = torch.tensor([[True, False], [True, True]])
    z_shot, z_token = torch.tensor([0.0, 0.0]), torch.tensor([[0.0, 9.0], [math.log(3.0), -math.log(3.0)]])
    of = lambda p: -p * math.log(p) - (1 - p) * math.log(1 - p)
    expected = of(0.5) + (of(0.5) + 2 * of(0.25)) / 3
    assert entropy(z_shot, z_token, free).item() == pytest.approx(expected)


def test_shots_are_drawn_as_if_again_until_one_is_kept():
    z, seed = torch.tensor([-1.0, 0.5, -2.0]), torch.Generator().manual_seed(0)
    shots, _ = sample_actions(z, torch.zeros(3, 1), 40_000, seed)
    p = z.sigmoid().tolist()
    none = math.prod(1 - x for x in p)
    for pattern in itertools.product((False, True), repeat=3):
        chance = math.prod(x if kept else 1 - x for x, kept in zip(p, pattern)) / (1 - none)
        share = (shots == torch.tensor(pattern)).all(1).float().mean().item()
        assert share == pytest.approx(chance if any(pattern) else 0.0, abs=0.01)


def test_a_rollout_keeps_the_layout_and_the_order(encoder):
    [problem] = toy_problems(1)
    torch.manual_seed(0)
    pruner = Pruner(128, 32)
    one = rollout(pruner, encoder, problem, 8, seed=1)
    assert len(one.pruned) == 8 and one.logps.shape == (8,) and one.logps.requires_grad
    for pruned in one.pruned:
        assert 1 <= len(pruned.shots) <= 4 and is_part_of("".join(pruned.shots), "".join(problem.shots))
        for text in pruned.shots:
            assert text.startswith("Q:") and "\nA:" in text and text.endswith("\n\n")
    again = rollout(pruner, encoder, problem, 8, seed=1)
    assert [p.shots for p in again.pruned] == [p.shots for p in one.pruned]
    for stages in ({"shot_stage": False}, {"token_stage": False}):
        one = rollout(Pruner(128, 32, **stages), encoder, problem, 20, seed=1)
        counts = {len(pruned.shots) for pruned in one.pruned}
        whole_shots = all(text in problem.shots for pruned in one.pruned for text in pruned.shots)
        assert (counts == {4}, whole_shots) == ("shot_stage" in stages, "token_stage" in stages)


def test_encoder_states_are_computed_once_and_are_those_of_a_single_text(encoder):
    texts = toy_problems(1)[0].shots
    fresh = Encoder(encoder.model, encoder.tokenizer)
    shots = fresh.shots(texts)
    for text, shot in zip(texts, shots):
        ids = torch.tensor([encoder.tokenizer.encode(text)])
        alone = encoder.model.hidden_states(encoder.model.embed(ids))[0]
        assert shot.ids == ids[0].tolist() and torch.allclose(shot.states, alone, atol=1e-4)
        forced = [encoder.tokenizer.decode([i]) for i, free in zip(shot.ids, shot.free) if not free]
        assert "".join(forced) == "Q:\nA:\n\n"
    assert fresh.shots(texts)[0] is shots[0]
    seeing = fresh.shots(texts, "Which one?\n\n")
    assert seeing[0].ids == shots[0].ids and not torch.allclose(seeing[0].states, shots[0].states, atol=0.1)
    small = Encoder(encoder.model, encoder.tokenizer, remember=len(shots[-1].ids))
    assert torch.allclose(small.shots(texts)[0].states, shots[0].states, atol=1e-5)
    assert [text for _, text in small.cache] == texts[-1:]
    with pytest.raises(InputError, match="a text of 601 tokens.*reads 1 to 512"):
        fresh.shots(["Q" * 601])
    with pytest.raises(InputError, match="a text of 500 tokens behind 30 others.*reads 1 to 512"):
        fresh.shots(["Q" * 500], "A" * 30)


def test_a_tokenizer_that_changes_a_text_is_no_encoders(other_folder):
    file = other_folder / "tokenizer.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"normalizer": {"type": "Lowercase"}}))
    with pytest.raises(InputError, match="reads 'Q: Why.* as 'q: why.*allowed: one that gives a text back"):
        load_encoder(other_folder, None, torch.float32).shots(["Q: Why?\nA: So.\n\n"])


# ---- the frozen model as judge -------------------------------------------------------------------


def test_the_judge_equals_one_prompt_at_a_time(encoder):
    model, tokenizer = encoder.model, encoder.tokenizer
    problems = toy_problems(2, k=3)
    groups = [[replace(p, shots=p.shots[:n]) for n in (3, 1, 3)] for p in problems]
    groups[1][1] = replace(groups[1][1], shots=problems[1].shots * 5)  # more than the context holds
    judge = judge_by(model, tokenizer, mode="plain", style="hash", max_new_tokens=12)
    losses, correct = judge(groups)
    assert losses[1, 1] == math.inf and not correct[1, 1]
    for b, r in ((0, 0), (0, 1), (0, 2), (1, 0), (1, 2)):
        one = groups[b][r]
        row = encode_row(tokenizer, one, target(one, "plain"), mode="plain")
        batch = sides.collate([[row]], tokenizer.pad_id)
        nll = -score_plain(model, batch)[batch.loss_mask].mean().item()
        assert losses[b, r].item() == pytest.approx(nll, abs=1e-4)
        [[ids]] = generate(
            model,
            [row.ids[: row.n_prompt]],
            max_new_tokens=12,
            temperature=0,
            stop_ids=tokenizer.stop_ids,
            seed=0,
        )
        gold = replace(one, answer=tokenizer.decode(ids).strip())  # "direct": what it says is the answer
        direct = judge_by(model, tokenizer, mode="direct", style="hash", max_new_tokens=12)
        assert [direct([[p]])[1].item() for p in (gold, one)] == [True, False]
    losses_alone, none_right = judge_by(
        model, tokenizer, mode="plain", style="hash", max_new_tokens=12, accuracy=False
    )(groups)
    assert torch.allclose(losses_alone, losses) and not none_right.any()


def test_a_step_in_batches_equals_the_naive_loop():
    """`policy_sides` asserts equal rewards and gradients."""
    made = sides.policy_sides("toy 1M", torch.device("cpu"), B=2, R=3, k=2, new=4)
    assert list(made) == ["minicot", "naive"]


def test_a_step_with_other_rewards_or_gradients_is_refused(monkeypatch):
    real, calls = sides.log_policy, []
    monkeypatch.setattr(sides, "log_policy", lambda *a: calls.append(1) or 2 * real(*a))
    with pytest.raises(AssertionError, match="gradients 5.0e-01 apart"):
        sides.policy_sides("toy 1M", torch.device("cpu"), B=1, R=3, k=2, new=4)
    assert len(calls) == 3


# ---- a bandit: only some shots and tokens pay ----------------------------------------------------


def bandit(n, seed):
    """Problems of which two of six shots pay, with the two numbers in each: 30 of 250 tokens hold them."""
    rng, problems = random.Random(seed), []
    name = lambda: rng.choice(["Tom", "Ana", "Jon", "Kim", "Max", "Eva"])
    thing = lambda: rng.choice(["apples", "balls", "books", "coins", "pens", "cups"])
    for i in range(n):
        shots, need = [], []
        for _ in range(2):
            a, w, x, y = name(), thing(), rng.randint(11, 99), rng.randint(11, 99)
            asked = f"One day {a} has {x} {w} at home in the garden."
            shots.append(shot_text(asked, f"So {a} owns them, and then it is {y} {w} today."))
            need += [str(x), str(y)]
        for _ in range(4):
            asked = f"{name()} likes the {thing()} of {name()} and {name()}."
            shots.append(shot_text(asked, f"They all play with {thing()} and with {thing()}."))
        rng.shuffle(shots)
        problems.append(Problem(str(i), f"Number {i}?", shots=shots, meta={"need": need}))
    return problems


def pays(groups):
    """A judge: the share of the needed numbers that the prompt still holds."""
    there = lambda p: (
        sum(number in "".join(p.shots).split() for number in p.meta["need"]) / len(p.meta["need"])
    )
    share = torch.tensor([[there(p) for p in group] for group in groups], dtype=torch.float64)
    return 3 * (1 - share), share == 1


def taught(encoder, size, tmp_path, steps=120, **flags):
    settings = dict(target=36, lr=1e-3, steps=steps, batch_size=4, hidden=64, save_every=0) | flags
    config = PrunerConfig(**settings)
    stages = dict(shot_stage=config.shot_stage, token_stage=config.token_stage)
    pruner = Pruner(128, config.hidden, seed=config.seed, **stages)
    learn(pruner, encoder, bandit(64, 1), pays, size, config, log := Log(tmp_path / "metrics.jsonl"))
    return pruner, log.read()


def share_right(problems):
    return pays([[problem] for problem in problems])[1].double().mean().item()


def test_on_a_bandit_the_learned_policy_beats_the_others_by_far(encoder, size, tmp_path, capsys):
    held_out, how = bandit(40, 2), dict(size=size, encoder=encoder, seed=0, fixed=bandit(1, 3)[0].shots)
    how |= dict(model=encoder.model, tokenizer=encoder.tokenizer)
    pruner, log = taught(encoder, size, tmp_path)
    kept = list(prune(pruner, encoder, held_out, 36, size))
    assert share_right([one.problem for one in kept]) >= 0.9
    others = [taught(encoder, size, tmp_path, seed=seed)[0] for seed in (1, 2)]
    for other in others:
        assert share_right([one.problem for one in prune(other, encoder, held_out, 36, size)]) >= 0.9
    for method in METHODS:
        assert share_right(fit(method, held_out, 36, **how)) <= 0.2, method
    assert max(sum(map(size, one.problem.shots)) for one in kept) <= 36
    of = {kind: some / all_ for kind, (some, all_) in kept_by_kind(kept).items()}
    assert of["number"] > 0.9 and of["word"] < 0.2
    begin, end = log[0], log[-1]
    assert begin["reward"] < 0.5 < end["reward"] and begin["t_over_target"] > 4 and end["t_over_target"] < 2
    assert begin["shots_kept"] > 0.8 and end["shots_kept"] < 0.6 and end["tokens_kept"] < begin["tokens_kept"]
    assert end["entropy"] < begin["entropy"] and end["nll"] < 0.5 and end["accuracy"] > 0.8
    lines = capsys.readouterr().out.splitlines()[:120]
    assert (
        len(lines) == 120 and lines[-1].startswith("step 120/120: reward ") and "t over target" in lines[-1]
    )


def test_the_entropy_bonus_keeps_the_policy_open(encoder, size, tmp_path):
    without, bonus = (
        taught(encoder, size, tmp_path, steps=30, entropy=weight)[1][-1]["entropy"] for weight in (0.0, 0.05)
    )
    assert bonus > without + 0.2


def test_the_same_seed_learns_the_same_and_a_stage_left_out_does_not_move(encoder, size, tmp_path):
    (a, log), (b, again) = (taught(encoder, size, tmp_path, steps=2) for _ in range(2))
    timeless = lambda lines: [{k: v for k, v in line.items() if k != "tokens_per_s"} for line in lines]
    assert timeless(log) == timeless(again)
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters()))
    start = Pruner(128, 64)
    for stage, moving in (("shot_stage", "token"), ("token_stage", "shot")):
        after = taught(encoder, size, tmp_path, steps=2, **{stage: False})[0]
        moved = {
            name.split(".")[0]
            for name, p in after.named_parameters()
            if not torch.equal(p, start.state_dict()[name])
        }
        assert moved == {moving}


# ---- pruning, deterministically ------------------------------------------------------------------


def test_choose_by_hand():
    texts = ["abcd", "efgh", "ijkl"]
    run = lambda p_shot, p_token, budget: texts_of(
        texts, choose(p_shot, p_token, texts, budget, len, "".join)
    )
    inf, sure = math.inf, [[math.inf, 0.9, 0.9, 0.9]] * 3
    assert run([0.9, 0.8, 0.7], sure, 12) == texts
    assert run([0.9, 0.3, 0.7], sure, 12) == ["abcd", "ijkl"]  # P < 1/2 is dropped, whatever the budget
    assert run([0.6, 0.8, 0.7], sure, 8) == ["efgh", "ijkl"]  # the likeliest, in source order
    assert run([0.1, 0.2, 0.1], sure, 12) == ["efgh"]  # the likeliest in any case
    graded = [[inf, 0.9, 0.4, 0.6], [inf, 0.8, 0.7, 0.51], [inf, 0.1, 0.2, 0.3]]
    assert run(None, graded, 5) == ["ab", "efg"]  # no shot stage: the likeliest tokens of all shots
    assert run([0.9, 0.9, 0.9], graded, 12) == ["abd", "efgh"]  # only layout is left of the third
    assert run([0.9, 0.9, 0.1], graded, 6) == [
        "abd",
        "efg",
    ]  # expected sizes 2.9 and 3.01; h is the least likely
    assert run([0.9, 0.9, 0.1], graded, 4) == ["abd"]
    assert run([0.9, 0.9, 0.1], graded, 2) == ["ab"]
    assert run([0.9, 0.9, 0.1], graded, 1) == []  # below one token and the layout
    assert run([0.9, 0.8, 0.7], sure, 10) == ["ad", "efgh", "ijkl"]  # 2.6 are left, half of 3.7 fits
    assert run([0.9, 0.8, 0.7], None, 11) == ["abcd", "efgh"] and run([0.4, 0.3, 0.2], None, 9) == ["abcd"]
    assert run([0.9, 0.8, 0.7], None, 3) == []


def test_whole_and_squeeze_by_hand():
    assert whole([5, 3, 4, 1], [0, 1, 2, 3], 9) == [0, 1, 3]  # the third no longer fits, the fourth does
    assert whole([5, 3, 4, 1], [2, 0, 1, 3], 8) == [1, 2, 3]
    assert whole([5], [0], 4) == whole([], [], 4) == []
    pieces = [["Q", "a", "b"], ["Q", "c"]]
    scores = [[math.inf, 2.0, 1.0], [math.inf, 3.0]]
    of = lambda budget, **more: texts_of(pieces, squeeze(pieces, scores, budget, len, **more))
    assert [of(b) for b in (9, 5, 4, 3, 2, 1, 0)] == [
        *[["Qab", "Qc"]] * 2,
        ["Qa", "Qc"],
        *[["Qc"]] * 2,
        [],
        [],
    ]
    assert of(9, least=2.5) == ["Qc"]


@pytest.mark.parametrize("method", WAYS)
@pytest.mark.parametrize("foreign", [False, True], ids=["own tokenizer", "encoder with another tokenizer"])
def test_every_way_meets_the_budget_in_the_models_tokens(method, foreign, encoder, size, other_folder):
    """... keeps the order, and does the same again; a budget below any shot leaves none to whole ways."""
    problems = toy_problems(2)
    reader = load_encoder(other_folder, None, torch.float32) if foreign else encoder
    assert not foreign or reader.tokenizer.fingerprint != encoder.tokenizer.fingerprint
    model, tokenizer = encoder.model, encoder.tokenizer
    how = dict(encoder=reader, model=model, tokenizer=tokenizer, fixed=problems[0].shots, seed=0)
    pruner = Pruner(reader.model.config.hidden_size, 32)

    def made(budget):
        if method == "learned":
            return [kept.problem for kept in prune(pruner, reader, problems, budget, size)]
        return list(fit(method, problems, budget, size=size, **how))

    smallest = min(size(text) for problem in problems for text in problem.shots)
    for budget in (10_000, 100, smallest - 1, 1):
        pruned = made(budget)
        assert [p.shots for p in made(budget)] == [p.shots for p in pruned]
        for before, after in zip(problems, pruned):
            assert sum(len(tokenizer.encode(text)) for text in after.shots) <= budget
            source = problems[0].shots if method == "fixed" else before.shots
            assert is_part_of("".join(after.shots), "".join(source))
            assert replace(after, shots=before.shots) == before
        if budget == 10_000 and method not in ("zero-shot", "learned"):
            assert all(len(p.shots) == 4 for p in pruned)
        if method in ("random", "topk", "complexity", "fixed", "zero-shot") and budget < smallest:
            assert not any(p.shots for p in pruned)
    if method in ("selective-context", "random-tokens", "learned"):
        assert all(p.shots and sum(map(size, p.shots)) >= 70 for p in made(100))


def test_the_ways_that_choose_whole_shots(encoder, size):
    shots = [shot_text(f"Case {i}?", "It is so. " * n) for i, n in enumerate([2, 5, 5, 1, 3])]
    problem = Problem("p", "Case 3?", shots=shots)
    how = dict(size=lambda text: 1, encoder=encoder, model=None, tokenizer=None, seed=0)
    of = lambda method, budget: next(iter(fit(method, [problem], budget, fixed=["x", "y", "z"], **how))).shots
    assert of("complexity", 2) == [shots[1], shots[2]] and of("complexity", 3) == [
        shots[1],
        shots[2],
        shots[4],
    ]
    assert of("topk", 1) == [shots[3]] and of("fixed", 2) == ["x", "y"] and of("zero-shot", 9) == []
    many = [replace(problem, id=str(i)) for i in range(60)]
    first = [p.shots[0] for p in fit("random", many, 1, fixed=[], **how)]
    assert {first.count(shot) > 4 for shot in shots} == {True}
    assert [n_steps(shot) for shot in shots] == [2, 5, 5, 1, 3]
    assert n_steps(shot_text("Why? Ah.", "3.5 x 2 = 7. So #### 7")) == 1


def test_self_information_is_the_models_and_the_least_informative_words_go(encoder):
    model, tokenizer = encoder.model, encoder.tokenizer
    texts = toy_problems(1)[0].shots[:2]
    for text, nats in zip(texts, self_information(model, tokenizer, texts)):
        assert "".join(units(text)) == text and len(nats) == len(units(text))
        ids = torch.tensor([tokenizer.encode(text)])
        logps = model(ids)[0].log_softmax(-1)[:-1].gather(1, ids[0, 1:, None])[:, 0].tolist()
        words, left = units(text), [tokenizer.decode([i]) for i in ids[0]]
        for unit, value in zip(words, nats):  # here no token spans two words
            pieces = ""
            n = len(ids[0]) - len(left)
            own = []
            while len(pieces) < len(unit):
                pieces, own = pieces + left.pop(0), [*own, len(ids[0]) - len(left) - 1]
            assert pieces == unit and n == own[0]
            fixed = unit in ("Q:", "\nA:", "\n\n")
            expected = math.inf if fixed else -sum(logps[t - 1] for t in own)
            assert value == pytest.approx(expected, abs=1e-3)
    text, size = texts[0], size_by(tokenizer)
    [nats] = self_information(model, tokenizer, [text])
    [short] = METHODS["selective-context"](
        types.SimpleNamespace(texts=[text], information=lambda: [nats]), size(text) - 6, size
    )
    words = units(text)
    dropped = sorted(range(len(words)), key=lambda i: nats[i])[: len(words) - len(units(short))]
    assert short == "".join(word for i, word in enumerate(words) if i not in dropped) and dropped


# ---- candidates ----------------------------------------------------------------------------------


def pool_of(n):
    return [replace(p, answer=None) for p in read_problems("toy", "validation", limit=n)]


def test_the_nearest_questions_come_first_and_a_questions_own_is_passed_over_in_training(encoder):
    pool = pool_of(12)
    asked = [replace(pool[3], id="asked", question=f"  {pool[3].question.upper()}")]
    [found] = with_candidates(asked, pool, encoder, 5, training=True)
    vectors = [encoder.model.hidden_states(encoder.model.embed(torch.tensor([ids])))[0].mean(0) for ids in
               [encoder.tokenizer.encode(p.question) for p in (*asked, *pool)]]  # fmt: skip
    near = torch.cosine_similarity(vectors[0][None], torch.stack(vectors[1:]))
    near[3] = -2
    expected = [shot_text(pool[i].question, pool[i].solution) for i in near.argsort(descending=True)[:5]]
    assert found.shots == expected and normalised(question_of(expected[0])) != normalised(asked[0].question)
    [few] = with_candidates(asked, pool[3:5], encoder, 5, training=True)
    assert few.shots == [shot_text(pool[4].question, pool[4].solution)]
    random_ones = with_candidates([Problem("x", "What?"), Problem("y", "What?")], pool, encoder, 5, seed=0)
    assert len({*random_ones[0].shots}) == 5 and random_ones[0].shots != random_ones[1].shots
    own = Problem("own", "And this?", shots=["Q: It?\nA: Yes.\n\n"])
    assert with_candidates([own], [], encoder, 5) == [own]


def test_no_question_that_is_asked_is_among_the_shots(encoder):
    pool = pool_of(6)
    leak = Problem("t7", pool[2].question.lower().replace(".", " . ").replace("?", ""))
    brings = replace(leak, shots=["Q: It?\nA: Yes.\n\n"])  # "fixed" shows it the pool all the same
    for one in (leak, brings):
        with pytest.raises(
            InputError, match=f"row '{pool[2].id}' of the pool holds the question of problem 't7'"
        ):
            with_candidates([Problem("t6", "Another?"), one], pool, encoder, 3)
    own = replace(leak, shots=[shot_text(pool[2].question, pool[2].solution)])
    for training in (False, True):
        with pytest.raises(InputError, match="'t7': its question is among its own shots"):
            with_candidates([own], [], encoder, 3, training=training)


@pytest.mark.parametrize(
    "problem, pool, training, message",
    [
        (Problem("a", "B?"), [], False, "'a' brings no shots; allowed: rows with shots, or --shots"),
        (Problem("a", "B?", shots=[]), [], True, "'a' brings no shots"),
        (Problem("a", "B?", shots=[" \n"]), [], True, "'a': a shot is empty"),
        (Problem("a", "B?"), [Problem("s", "C?", answer="1")], False, "row 's' has no solution"),
        (Problem("a", "B?"), [Problem("s", "b", solution="1")], True, "holds nothing but its question"),
    ],
)
def test_what_gives_no_candidates_is_refused(problem, pool, training, message, encoder):
    with pytest.raises(InputError, match=message):
        with_candidates([problem], pool, encoder, 3, training=training)


# ---- what it looks like --------------------------------------------------------------------------


def test_a_marked_prompt_and_kinds_of_tokens():
    pieces = [["Q", ":", " <2", " +", " cats", "\n\n"], ["Q", ":", " no"]]
    keep = [[True, True, True, False, True, True], [False] * 3]
    kept = module.Kept(None, pieces, keep)
    assert marked(kept) == "<p><b>Q: &lt;2</b><del> +</del><b> cats  </b><br>\n<del>Q: no</del></p>\n"
    kinds = {"12": "number", " x": "operator", " =": "operator", " Tom": "word", ".": "other", "x4": "number"}
    assert {piece: kind_of(piece) for piece in kinds} == kinds
    assert kept_by_kind([kept]) == {"word": [2, 4], "other": [2, 3], "number": [1, 1], "operator": [0, 1]}
    assert kept_by_kind([kept], kind=len)[1] == [2, 4]


def test_layout_is_found_in_any_shot():
    text = "Q: Is A: it?\nA: Yes. Q: no\n\n"
    assert "".join(text[i] for i in layout(text)) == "Q:\nA:\n\n"
    assert (
        layout("free text") == []
        and question_of(text) == "Is A: it?"
        and question_of("free text") == "free text"
    )


# ---- the commands --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with train.jsonl and test.jsonl (problems with shots), pool.jsonl, a pruner of three steps."""
    folder = tmp_path_factory.mktemp("pruner")
    problems = toy_problems(8, k=3)
    rows = [fields_of(p) | {"difficulty": str(1 + i % 2)} for i, p in enumerate(problems)]
    jsonl(folder / "train.jsonl", *rows[:5])
    jsonl(folder / "test.jsonl", *rows[5:])
    jsonl(folder / "plain.jsonl", *({k: v for k, v in row.items() if k != "shots"} for row in rows[5:]))
    jsonl(folder / "pool.jsonl", *map(fields_of, pool_of(8)))
    return folder, pruner_main(*TRAIN, "--steps", 3, "--out", "pruner", cwd=folder)


TRAIN = ["--data", "train.jsonl", "--repeats", 3, "--batch-size", 2, "--hidden", 16, "--target", 60]
TRAIN += ["--max-new-tokens", 8, "--device", "cpu"]


def test_training_leaves_a_folder_and_prints_a_line_a_step(trained):
    folder, done = trained
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("5 of 5 questions, 3 prunings of each on cpu\nstep 1/3: reward 0.")
    assert len(done.stdout.splitlines()) == 5
    lines = [json.loads(line) for line in (folder / "pruner" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3]
    for line in lines:
        assert line["too_long"] == 0 and 0 < line["shots_kept"] <= 1 and 0 < line["tokens_kept"] < 1
        assert line["nll"] > 0 and 0 < line["reward"] < 2 and line["t_over_target"] > 0
    pruner, encoder, about = load_pruner(folder / "pruner")
    assert about["target"] == 60 and about["encoder_digest"] == about["model_digest"] == folder_digest(
        resolve("toy")
    )
    assert about["settings"]["repeats"] == 3 and pruner.hidden == 16
    again = pruner_main(*TRAIN, "--steps", 3, "--out", "again", cwd=folder)
    assert again.stdout.replace("again", "pruner") == done.stdout
    same = [(folder / name / "pruner.safetensors").read_bytes() for name in ("pruner", "again")]
    assert same[0] == same[1]


def test_pruned_problems_are_a_file_that_sample_py_takes(trained):
    folder, _ = trained
    words = ["prune", "--pruner", "pruner", "--data", "test.jsonl", "--device", "cpu"]
    done = pruner_main(*words, "--out", "pruned.jsonl", "--marked", "marked.md", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert "of a budget of 60" in done.stdout and "kept: " in done.stdout and "-> pruned.jsonl" in done.stdout
    before, after = (read_problems(str(folder / name)) for name in ("test.jsonl", "pruned.jsonl"))
    assert [replace(p, shots=None) for p in before] == [replace(p, shots=None) for p in after]
    assert (folder / "marked.md").read_text().count("<p>") == 3
    ask = ["--evaluate", "--model", "toy", "--mode", "plain", "--max-new-tokens", 8, "--device", "cpu"]
    of_file = script("sample.py", *ask, "--data", "pruned.jsonl", "--out", "file.json", cwd=folder)
    at_once = ["--data", "test.jsonl", "--prune", "pruner", "--budget", 60, "--out", "once.json"]
    at_once = script("sample.py", *ask, *at_once, cwd=folder)
    assert of_file.returncode == at_once.returncode == 0, of_file.stderr + at_once.stderr
    assert "of a budget of 60" in at_once.stdout
    results = [json.loads((folder / name).read_text()) for name in ("file.json", "once.json")]
    assert results[0]["metrics"] == results[1]["metrics"] and results[0]["correct"] == results[1]["correct"]


def test_shots_come_from_a_pool_where_problems_bring_none(trained):
    folder, _ = trained
    ask = ["--model", "toy", "--mode", "plain", "--n", 1, "--max-new-tokens", 4, "--device", "cpu"]
    words = ["--data", "plain.jsonl", "--prune", "pruner", "--shots", "pool.jsonl", "--budget", 50]
    done = script("sample.py", *ask, *words, "--out", "samples.jsonl", cwd=folder)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    texts = [shot_text(p.question, p.solution) for p in read_problems(str(folder / "pool.jsonl"))]
    assert all(row["shots"] for row in rows)
    assert all(any(is_part_of(shot, text) for text in texts) for row in rows for shot in row["shots"])
    for method in ("topk", "fixed", "random"):
        words = ["prune", "--method", method, "--data", "plain.jsonl", "--shots", "pool.jsonl", "--k", 2]
        done = pruner_main(*words, "--budget", 150, "--device", "cpu", "--out", f"{method}.jsonl", cwd=folder)
        assert done.returncode == 0, done.stderr
        assert "3 problems, " in done.stdout and "of a budget of 150" in done.stdout
        kept = [p.shots for p in read_problems(str(folder / f"{method}.jsonl"))]
        assert (kept[0] == kept[1] == kept[2]) == (method == "fixed") and all(kept)
    leak = jsonl(folder / "leak.jsonl", *map(json.loads, open(folder / "test.jsonl")))
    for done in (
        pruner_main(*words[:5], "--shots", leak, "--budget", 150, "--out", "x.jsonl", cwd=folder),
        script("sample.py", *ask, "--data", "plain.jsonl", "--prune", "pruner", "--shots", leak, cwd=folder),
    ):
        assert_one_line_error(done, "holds the question of problem", "allowed: a pool without")


def test_an_encoder_of_its_own_with_another_tokenizer(trained, other_folder):
    folder, _ = trained
    words = [
        *TRAIN,
        "--steps",
        1,
        "--no-accuracy",
        "--encoder",
        other_folder,
        "--see-question",
        "--out",
        "far",
    ]
    done = pruner_main(*words, cwd=folder)
    assert done.returncode == 0, done.stderr
    about = json.loads((folder / "far" / "pruner.json").read_text())
    assert (
        about["encoder_digest"] == folder_digest(other_folder) != about["model_digest"]
        and about["see_question"]
    )
    prune_it = ["prune", "--pruner", "far", "--data", "test.jsonl", "--budget", 40, "--out"]
    done = pruner_main(*prune_it, "far.jsonl", cwd=folder)
    assert done.returncode == 0, done.stderr
    size = size_by(Tokenizer(resolve("toy")))
    assert all(0 < sum(map(size, p.shots)) <= 40 for p in read_problems(str(folder / "far.jsonl")))
    done = pruner_main(*prune_it, "no.jsonl", "--encoder", "toy", cwd=folder)
    assert_one_line_error(done, "reads the states of another encoder", str(other_folder), "--encoder")
    (other_folder / "config.json").rename(other_folder / "gone.json")
    assert_one_line_error(pruner_main(*prune_it, "no.jsonl", cwd=folder), "config.json")


def test_the_difficulty_filter(trained):
    folder, _ = trained
    done = pruner_main(*TRAIN, "--steps", 1, "--difficulty", 1, "--out", "easy", cwd=folder)
    assert done.stdout.startswith("3 of 5 questions"), done.stderr
    problems = [replace(p, meta={}) for p in read_problems(str(folder / "train.jsonl"))]
    judge = lambda groups: (None, torch.tensor([[group[0].id == problems[1].id] for group in groups]))
    assert module.easy(problems, PrunerConfig(easy_only=True), judge) == problems[1:2]
    with pytest.raises(InputError, match="--easy-only"):
        module.easy(problems[2:], PrunerConfig(easy_only=True), judge)
    with pytest.raises(InputError, match="a field difficulty is None; allowed: in every row"):
        module.easy(problems, PrunerConfig(difficulty=3), judge)


@pytest.mark.parametrize(
    "words, parts",
    [
        (["--out", "x"], ["--data", "problems that bring shots"]),
        (["--data", "train.jsonl"], ["--out", "a path"]),
        (["--data", "plain.jsonl", "--out", "x"], ["brings no shots", "--shots FILE"]),
        (
            ["--data", "plain.jsonl", "--shots", "empty.jsonl", "--out", "x"],
            ["empty.jsonl: no problems in it"],
        ),
        ([*TRAIN, "--out", "pruner"], ["--out", "--overwrite"]),
        ([*TRAIN, "--out", "."], ["--out", "a new folder"]),
        ([*TRAIN, "--no-shot-stage", "--no-token-stage", "--out", "x"], ["--no-token-stage", "one stage"]),
        ([*TRAIN, "--easy-only", "--no-accuracy", "--out", "x"], ["--easy-only", "without --no-accuracy"]),
        ([*TRAIN, "--difficulty", 0.5, "--out", "x"], ["--difficulty is 0.5", "one that some rows have"]),
        ([*TRAIN, "--repeats", 1, "--out", "x"], ["--repeats is 1", "at least 2"]),
        ([*TRAIN, "--style", "loud", "--out", "x"], ["--style is 'loud'"]),
        (["--data", "long.jsonl", "--out", "x"], ["a text of", "the encoder", "reads 1 to 512"]),
        ([*TRAIN, "--target", 512, "--out", "x"], ["--target is 512", "less than the model's context, 512"]),
        (["prune", "--data", "test.jsonl", "--out", "x"], ["--pruner", "a folder"]),
        (["prune", "--method", "topk", "--data", "test.jsonl", "--out", "x"], ["--budget is 0"]),
        (
            ["prune", "--method", "best", "--data", "test.jsonl", "--out", "x"],
            ["'best'", "'learned', 'zero-shot'"],
        ),
        (
            ["prune", "--method", "topk", "--pruner", "pruner", "--data", "test.jsonl", "--out", "x"],
            ["--pruner", "with --method learned alone"],
        ),
        (
            ["prune", "--pruner", "pruner", "--data", "test.jsonl", "--out", "test.jsonl"],
            ["--out", "a new file"],
        ),
        (["prune", "--pruner", ".", "--data", "test.jsonl", "--out", "x"], ["pruner.json"]),
        (
            ["prune", "--pruner", "broken", "--data", "test.jsonl", "--out", "x"],
            ["broken: no pruner of ours"],
        ),
    ],
)
def test_bad_input_ends_in_one_line(words, parts, trained):
    folder, _ = trained
    (folder / "empty.jsonl").write_text("")
    problem = json.loads((folder / "train.jsonl").read_text().splitlines()[0])
    jsonl(folder / "long.jsonl", problem | {"shots": [shot_text("Why? " * 600, "So.")]})
    (folder / "broken").mkdir(exist_ok=True)
    (folder / "broken" / "pruner.json").write_text('{"width": 128}')
    assert_one_line_error(pruner_main(*words, cwd=folder), *parts)
    assert not (folder / "x").exists()


@pytest.mark.parametrize(
    "words, parts",
    [
        (["--budget", 9], ["--budget is 9", "only with --prune"]),
        (["--shots", "pool.jsonl"], ["--shots", "only with --prune"]),
        (
            ["--prune", "pruner", "--assess", "--samples", "x"],
            ["--prune", "nothing, where --samples are read"],
        ),
        (
            ["--prune", "pruner", "--endpoint", "http://localhost:1/v1", "--model", "m"],
            ["--prune", "without --end"],
        ),
    ],
)
def test_what_sample_py_does_not_take_is_refused(words, parts, trained):
    assert_one_line_error(script("sample.py", "--data", "test.jsonl", *words, cwd=trained[0]), *parts)


def test_one_shot_is_enough_and_looks_like_the_others(encoder, size):
    problem = toy_problems(1, k=1)[0]
    one = rollout(Pruner(128, 16), encoder, problem, 3, seed=0)
    assert all(len(pruned.shots) == 1 for pruned in one.pruned) and one.kept_shots == 1
    seen = look(encoder, problem)
    assert seen.states.shape == (1, size(problem.shots[0]), 128) and seen.real.all()
    [kept] = prune(Pruner(128, 16), encoder, [problem], 10, size)
    assert len(kept.problem.shots) == 1 and size(kept.problem.shots[0]) <= 10
