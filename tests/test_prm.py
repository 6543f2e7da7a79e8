"""Reward models (URSA, arXiv 2501.04686): where steps end, their loss, their folders, their scores, PS-GRPO.

L      = - mean over solutions of sum over steps j of  y_j log p_j + (1 - y_j) log(1 - p_j)     (stage II)
score  = mean over steps of p_j, the best of n is the argmax                                    (Eq. 10)
drop   = max over j of (p_j - p_{j+1}) / p_j
R      = 1 right, drop < rho;  1 - gamma right, drop >= rho;  0 wrong                           (stage III)
"""

import json
import math
import shutil
from dataclasses import replace
from decimal import Decimal, getcontext
from functools import partial

import pytest
import torch
import transformers

import align
from minicot import rollouts, scoring, verifier
from minicot.answers import split_steps, step_ends
from minicot.config import AlignConfig
from minicot.data import ImageReader, Row, collate, encode_judged, encode_labelled
from minicot.errors import InputError
from minicot.losses import prm_loss
from minicot.model import RewardModel
from minicot.records import Problem, Response, Samples, read_samples, samples_to_row
from minicot.rewards import largest_drop, mean_reward, ps_grpo_reward, step_advantages
from minicot.scoring import pack, step_logits, step_logits_plain
from minicot.tokenizer import Tokenizer
from minicot.verifier import aggregate, reward_scores
from minicot.vision import VisionLanguageModel
from minicot.weights import is_reward_model, load_model, save_model
from tests.helpers import assert_one_line_error, assert_shapes_named, assert_value_named, jsonl, script
from tests.test_align import lines, small_policy
from tests.test_losses import close, f64, grad, leaf
from tests.test_model import SIZES, random_ids, tiny
from tests.test_scoring import VISION

# ---- the loss ------------------------------------------------------------------------------------

YES = lambda x: torch.ones_like(torch.as_tensor(x), dtype=torch.bool)
LABELS = torch.tensor([[True, False, False]])


def test_the_loss_and_its_gradient_by_hand():
    """p = 1/2, 3/4, 1/5 with labels 1, 0, 0: log 2 + log 4 + log 5/4 = log 10; the gradient is p - y."""
    logits = leaf([[0.0, math.log(3), -math.log(4)]])
    close(prm_loss(logits, LABELS, YES(logits)), f64([math.log(10)]))
    close(prm_loss(logits, LABELS, YES(logits), reduce="mean"), f64([math.log(10) / 3]))
    close(grad(prm_loss(logits, LABELS, YES(logits)), logits)[0], f64([[-1 / 2, 3 / 4, 1 / 5]]))
    soft = prm_loss(f64([[0.0]]), f64([[0.25]]), YES([[0.0]]))  # a share of rollouts, say
    close(soft, f64([math.log(2)]))


def test_the_loss_is_that_of_a_double_loop_at_60_digits():
    getcontext().prec = 60
    draw = torch.Generator().manual_seed(0)
    logits = 6 * torch.randn(5, 7, generator=draw, dtype=torch.float64)
    labels, mask = (torch.rand(5, 7, generator=draw) < share for share in (0.5, 0.8))
    expected = []
    for n in range(5):
        total = Decimal(0)
        for j in range(7):
            p = 1 / (1 + (-Decimal(logits[n, j].item())).exp())
            total -= mask[n, j].item() * (p if labels[n, j] else 1 - p).ln()
        expected.append(float(total))
    close(prm_loss(logits, labels, mask), f64(expected))
    assert torch.autograd.gradcheck(
        lambda x: prm_loss(x, labels, mask, reduce="mean"), logits.requires_grad_()
    )


def test_a_response_without_a_step_costs_nothing_and_has_no_mean():
    logits = leaf([[0.0, math.nan], [2.0, 5.0]])
    mask = torch.tensor([[False, False], [True, False]])
    losses = prm_loss(logits, mask, mask)
    close(losses, f64([0.0, math.log1p(math.exp(-2))]))
    assert grad(losses, logits)[0][0].tolist() == [0, 0]  # masked: NaN too
    assert_value_named(lambda: prm_loss(logits, mask, mask, reduce="mean"), r"row\(s\) \[0\]; the mean of no")


def test_extreme_logits_stay_finite_and_infinite_ones_do_not_hide():
    logits = leaf([[1e4, -1e4, 1e4]])
    close(prm_loss(logits, LABELS, YES(logits)), f64([1e4]))
    close(grad(prm_loss(logits, LABELS, YES(logits)), logits)[0], f64([[0.0, 0.0, 1.0]]))
    for x in (math.inf, -math.inf, math.nan):  # also on its right side
        for label in (True, False):
            assert not prm_loss(f64([[x]]), YES([[x]]) & label, YES([[x]])).isfinite().any()
    narrow = prm_loss(torch.tensor([[3.0]]).bfloat16(), LABELS[:, :1], YES([[0.0]]))
    assert narrow.dtype == torch.float32


def test_arguments_that_mean_nothing_are_refused():
    logits = f64([[0.0, 1.0]])
    assert_value_named(lambda: prm_loss(logits, logits + 1, YES(logits)), "step_labels hold 2; allowed: numb")
    assert_value_named(lambda: prm_loss(logits, logits, YES(logits), reduce="max"), "'max'; allowed: 'sum'")
    assert_value_named(lambda: prm_loss(logits, logits, logits), "step_mask is torch.float64")
    assert_shapes_named(lambda: prm_loss(logits, LABELS, YES(logits)), [r"\(1, 3\)", r"\(1, 2\)"])


# ---- where steps end -----------------------------------------------------------------------------

UGLY = {  # solution -> what stands before each end (of its last line)
    "Step 1: As Step 2 will show, 3.\nStep 2: by Step 1: 4.\n†Answer: 4": ["will show, 3.", "by Step 1: 4."],
    "Step 1: 3 apples\n  and 4 pears\n\nStep 2: 7.": ["and 4 pears", "Step 2: 7."],  # no answer line
    "Step 1:\nStep 2:\n#### 4": ["Step 1:", "Step 2:"],  # empty steps
    "\n\n  3 + 4 = 7  \r\n\r\nso 7\r\n#### 7\n": ["3 + 4 = 7  ", "so 7"],
    "naïve: ½ и 3 = 3½ 🍎\n„drei“ и\u2028vier\n#### 3½": ["3½ 🍎", "„drei“ и", "vier"],
    "so we stop": ["so we stop"],
    "#### 90": [],
    " \n": [],
}


@pytest.mark.parametrize("text", UGLY)
def test_steps_end_where_their_lines_do_and_the_answer_line_has_no_end(text):
    found = list(zip(split_steps(text), step_ends(text)))
    assert [step for step, _ in found] == split_steps(text) and len(found) == len(UGLY[text])
    for (_, end), last in zip(found, UGLY[text]):
        assert text[:end].endswith(last) and text[end : end + 1] in ("\n", "\r", "\u2028", "")


@pytest.mark.parametrize("kind", ["prm", "orm"])
@pytest.mark.parametrize("finish", ["stop", "length"])
@pytest.mark.parametrize("text", UGLY)
def test_the_head_is_read_at_the_token_that_ends_the_step(text, finish, kind, tokenizer_folder):
    """Byte-level tokens: what stands up to the end decodes to the text up to the line break."""
    for template in ("", "plain"):
        tokenizer, problem = Tokenizer(tokenizer_folder, template), Problem("1", "How many?")
        row = encode_judged(tokenizer, problem, Response(text, finish=finish), mode="plain", kind=kind)
        if not (UGLY[text] if kind == "prm" else text.strip()):
            assert row is None
            continue
        last = len(row.ids) - 1
        assert (row.ids[last] == tokenizer.eos_id) == (finish == "stop")
        if kind == "orm":
            assert row.step_ends == (last,)
            continue
        assert len(row.step_ends) == len(UGLY[text])
        for end, place in zip(row.step_ends, step_ends(text)):
            seen = tokenizer.decode(row.ids[: end + 1]).strip("\ufffd").rstrip()
            assert seen.endswith(text[:place].strip())
            before = tokenizer.decode(row.ids[:end])
            assert end == last if place == len(text) else before.endswith(text[:place].strip("\n"))


def test_an_empty_prompt_moves_the_ends_by_the_token_before_it(tokenizer_folder):
    tokenizer = Tokenizer(tokenizer_folder)
    row = encode_judged(tokenizer, Problem("1", ""), Response("3\n4\n#### 4"), mode="cot", kind="prm")
    assert row.ids[0] == tokenizer.bos_id
    assert [tokenizer.decode([row.ids[end]]) for end in row.step_ends] == ["\n", "\n"]


def test_a_token_that_ends_two_steps_is_refused(tokenizer_folder, monkeypatch):
    tokenizer = Tokenizer(tokenizer_folder)
    monkeypatch.setattr(tokenizer, "tokens_at", lambda text, places: [5 for _ in places])
    with pytest.raises(InputError, match="'1': a token of this tokenizer holds the ends of two steps"):
        encode_judged(tokenizer, Problem("1", "?"), Response("3\n4\n#### 4"), mode="cot", kind="prm")


# ---- labels --------------------------------------------------------------------------------------


def labelled(text, labels, correct=None):
    return [Samples(Problem("7", "How many?", "4"), [Response(text, correct, step_labels=labels)])]


def test_labels_stand_at_the_ends_and_never_behind_the_first_error(tokenizer_folder):
    tokenizer = Tokenizer(tokenizer_folder)
    encode = partial(encode_labelled, tokenizer, mode="cot", kind="prm")
    [row], counts = encode(labelled("3\n4\n5\n#### 5", [True, 0, 0]))
    assert row.step_labels == (True, False, False) and not counts
    batch = collate([[row], [replace(row, step_ends=row.step_ends[:1], step_labels=(True,))]], 0)
    assert batch.step_ends.tolist() == [list(row.step_ends), [row.step_ends[0], -1, -1]]
    assert batch.step_labels.tolist() == [[True, False, False], [True, False, False]]
    with pytest.raises(InputError, match=r"'7': step_labels are \[True, False, True\]; allowed: true up to"):
        encode(labelled("3\n4\n5\n#### 5", [True, False, True]))
    for labels in ([True], [True] * 4, [2, 0, 0]):
        with pytest.raises(InputError, match="'7': step_labels are .* of a response with 3 steps; allowed"):
            encode(labelled("3\n4\n5\n#### 5", labels))


def test_what_cannot_teach_is_counted(tokenizer_folder):
    tokenizer = Tokenizer(tokenizer_folder)
    sampled = labelled("#### 4", [], True) + labelled("3\n#### 4", None, None) + labelled("4", [1], True)
    rows, counts = encode_labelled(tokenizer, sampled, mode="cot", kind="prm")
    assert len(rows) == 1 and counts == {"without a step": 1, "without a label": 1}
    rows, counts = encode_labelled(tokenizer, sampled, mode="cot", kind="orm")
    assert [row.step_labels for row in rows] == [(True,), (True,)] and counts == {"without a label": 1}


# ---- folders -------------------------------------------------------------------------------------

THEIRS = {
    "Llama": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
    "Qwen2": {"tie_word_embeddings": True},
}


def shaken(model, seed=0):
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter + 0.2 * torch.randn_like(parameter))
    return model.eval()


@pytest.mark.parametrize("family", THEIRS)
@torch.no_grad()
def test_logits_equal_transformers_token_classification_both_ways(family, tmp_path):
    config = getattr(transformers, f"{family}Config")(**SIZES | THEIRS[family] | {"num_labels": 1})
    auto = getattr(transformers, f"{family}ForTokenClassification")
    theirs, ids = shaken(auto(config)), random_ids(3, 40)
    theirs.save_pretrained(tmp_path / "theirs")
    file = tmp_path / "theirs" / "config.json"
    with pytest.raises(InputError, match="config.json: reward_kind is absent; known are prm, orm"):
        load_model(tmp_path / "theirs", reward=True)
    file.write_text(json.dumps(json.loads(file.read_text()) | {"reward_kind": "prm"}))
    ours = load_model(tmp_path / "theirs", reward=True).eval()
    expected = theirs(ids).logits
    assert expected.shape == (3, 40, 1) and expected.std() > 0.1
    close(ours(ids), expected[..., 0], atol=1e-5)
    save_model(shaken(ours, 1), tmp_path / "ours")
    again, info = auto.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    close(ours(ids), again.eval()(ids).logits[..., 0], atol=1e-5)
    assert again.config.num_labels == 1 and (ours(ids) - expected[..., 0]).abs().max() > 0.1


def some_reward_model(pictures=False, kind="prm"):
    backbone = VisionLanguageModel(VISION, torch.Generator().manual_seed(3)) if pictures else tiny()
    return shaken(RewardModel(backbone, kind, torch.Generator().manual_seed(0)))


@pytest.mark.parametrize("pictures", [False, True])
@torch.no_grad()
def test_a_round_trip_keeps_every_weight_and_the_kind(pictures, tmp_path):
    model = some_reward_model(pictures, "orm")
    names = set(model.state_dict())
    assert {"score.weight", "score.bias"} < names and not any("lm_head" in name for name in names)
    if pictures:
        assert {name.split(".")[0] for name in names} == {
            "language_model",
            "vision_tower",
            "multi_modal_projector",
            "score",
        }
    save_model(model, tmp_path)
    again = load_model(tmp_path, reward=True)
    assert again.kind == "orm" and is_reward_model(tmp_path) and type(again) is RewardModel
    for (name, a), b in zip(model.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b), name
    ids = random_ids(2, 9).clamp(max=50)
    torch.testing.assert_close(model(ids), again(ids))
    assert again(ids).shape == (2, 9)


@pytest.mark.parametrize("pictures", [False, True])
def test_what_is_found_where_the_other_is_needed_is_named(pictures, tmp_path):
    reward = some_reward_model(pictures)
    save_model(reward, tmp_path / "reward")
    language = VisionLanguageModel(VISION, torch.Generator().manual_seed(3)) if pictures else tiny()
    save_model(language, tmp_path / "language")
    with pytest.raises(InputError, match=r"reward: is a reward model \(architectures is \['L\w+ForToken"):
        load_model(tmp_path / "reward")
    with pytest.raises(InputError, match=r"language: is a language model .*; allowed: a reward model"):
        load_model(tmp_path / "language", reward=True)
    file = tmp_path / "reward" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"reward_kind": "xrm"}))
    with pytest.raises(InputError, match="reward_kind 'xrm'; known are prm, orm"):
        load_model(tmp_path / "reward", reward=True)


def test_a_new_head_comes_from_its_generator_alone_and_the_backbone_is_not_copied():
    backbone = tiny()
    table, before = backbone.model.embed_tokens.weight, torch.get_rng_state()
    one, two = (RewardModel(m, "prm", torch.Generator().manual_seed(5)) for m in (backbone, tiny()))
    assert torch.equal(before, torch.get_rng_state())
    assert one.model.embed_tokens.weight is table and torch.equal(one.score.weight, two.score.weight)
    assert one.score.bias.tolist() == [0.0] and 0.1 < one.score.weight.std() < 0.2  # initializer_range 0.15


# ---- scores --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    return small_policy(tmp_path_factory.mktemp("policy"))


@pytest.fixture(scope="module")
def judge(policy):
    """(random PRM, tokenizer) of the toy's tokens."""
    model = RewardModel(load_model(policy), "prm", torch.Generator().manual_seed(0))
    return shaken(model), Tokenizer(policy)


PROMPT = Problem("1", "Tom has 3 balls. Kim has 4 more balls than Tom. How many balls do they have?", "10")
SOLUTIONS = [
    Response(f"Kim has {k} + 4 = {k + 4} balls.\n" * (k % 3 + 1) + f"#### {k}", k == 10, answer=str(k))
    for k in range(32)
]


def test_32_solutions_share_their_prompt_and_score_as_each_by_itself(judge):
    model, tokenizer = judge
    model = model.double()
    rows = [encode_judged(tokenizer, PROMPT, one, mode="cot", kind="prm") for one in SOLUTIONS]
    batch = collate([rows], tokenizer.pad_id)
    shared = len(rows[0].ids[: rows[0].n_prompt])
    assert pack(batch).ids.shape[1] <= batch.pad_mask.sum() - 31 * shared  # the prompt stands there once
    results = []
    for function in (step_logits, step_logits_plain):
        logits = function(model, batch)
        model.zero_grad()
        prm_loss(logits, torch.rand(logits.shape) < 2, batch.step_ends >= 0).sum().backward()
        results.append((logits.detach(), [p.grad.clone() for p in model.parameters()]))
    assert results[0][0].shape == (32, 3) and results[0][0].std() > 0.01
    torch.testing.assert_close(results[0], results[1], rtol=1e-9, atol=1e-10)
    for row, logits in zip(rows, results[0][0]):  # a forward of its own each
        alone = model(torch.tensor([row.ids]))[0, list(row.step_ends)]
        torch.testing.assert_close(logits[: len(alone)], alone.detach(), rtol=1e-9, atol=1e-10)
        assert not logits[len(alone) :].any()
    model.float()


@pytest.mark.parametrize("packed", [True, False])
def test_a_picture_moves_the_ends_by_its_tokens_and_is_encoded_once(packed, monkeypatch):
    monkeypatch.setattr(scoring, "pays", lambda *_: packed)
    model, n = some_reward_model(pictures=True).double(), VISION.image_seq_length
    draw = torch.Generator().manual_seed(1)
    pixels = torch.randn(1, 3, *[VISION.vision.image_size] * 2, generator=draw, dtype=torch.float64)

    class Reader(ImageReader):
        def pixels(self, images):
            return list(pixels)

    reader = Reader(VISION.image_token_id, n, VISION.vision.image_size, None)
    group = [
        Row("p", [5, VISION.image_token_id, 6, *tail], 3, images=("a",), step_ends=(len(tail) + 2,))
        for tail in ([7, 8], [9], [4, 3, 2])
    ]
    batch = collate([group], 0, reader)
    assert batch.step_ends[:, 0].tolist() == [len(row.ids) - 1 + n - 1 for row in group]
    seen, encode = [], model.encode_images
    counted = lambda x: (seen.append(len(x)), encode(x))[1]
    model.encode_images = model.embed.__self__.encode_images = counted
    with torch.no_grad():
        fast = step_logits(model, batch)
        assert seen == [1]
        plain = step_logits_plain(model, batch)
    torch.testing.assert_close(fast, plain, rtol=1e-9, atol=1e-10)


def test_scores_of_steps_are_sigmoids_and_their_mean_is_the_solutions(judge):
    model, tokenizer = judge
    [scored] = reward_scores(model, tokenizer, [Samples(PROMPT, SOLUTIONS)], name="prm", mode="cot")
    for response in scored.responses:
        row = encode_judged(tokenizer, PROMPT, response, mode="cot", kind="prm")
        logits = model(torch.tensor([row.ids]))[0, list(row.step_ends)].tolist()
        assert response.step_scores["prm"] == pytest.approx(
            [1 / (1 + math.exp(-x)) for x in logits], abs=1e-5
        )
        assert response.scores["prm"] == pytest.approx(sum(response.step_scores["prm"]) / len(logits))
    [again] = reward_scores(model, tokenizer, [scored], name="least", mode="cot", how="min", batch_size=5)
    for response in again.responses:
        assert set(response.scores) == set(response.step_scores) == {"prm", "least"}
        assert response.scores["least"] == pytest.approx(min(response.step_scores["prm"]), abs=1e-5)


def test_aggregates_by_hand():
    scores = [0.9, 0.5, 0.8]
    assert [aggregate(scores, how) for how in ("min", "last")] == [0.5, 0.8]
    assert aggregate(scores) == pytest.approx(2.2 / 3) and aggregate(scores, "product") == pytest.approx(0.36)
    assert [aggregate([], how) for how in verifier.AGGREGATES] == [0.0] * 4  # no step vouches for nothing
    assert_value_named(lambda: aggregate(scores, "median"), "'median'; allowed: mean, min, last, product")
    assert_value_named(lambda: aggregate([0.5, math.nan]), "allowed: finite numbers")


def test_no_step_scores_lowest_and_60_steps_are_as_good_as_any(judge):
    model, tokenizer = judge
    texts = ["#### 10", "", "Kim has 7.\n" * 60 + "#### 7", "Kim has 7.\n#### 7"]
    sampled = [Samples(PROMPT, [Response(text, finish="length") for text in texts]), Samples(PROMPT, [])]
    first, second = reward_scores(model, tokenizer, sampled, name="prm", mode="cot")
    lengths = [len(response.step_scores["prm"]) for response in first.responses]
    assert lengths == [0, 0, 60, 1] and not second.responses
    assert [response.scores["prm"] for response in first.responses][:2] == [0.0, 0.0]


def test_scores_that_are_not_finite_are_named(policy):
    broken = RewardModel(load_model(policy), "prm", torch.Generator().manual_seed(0))
    with torch.no_grad():
        broken.score.bias.fill_(math.inf)
    with pytest.raises(InputError, match="problem '1': step scores are not finite"):
        list(reward_scores(broken, Tokenizer(policy), [Samples(PROMPT, SOLUTIONS)], name="x", mode="cot"))


# ---- train.py --task prm, orm --------------------------------------------------------------------


def pool(problems, seed=0):
    """Chains of three steps; one that speaks of Kim is wrong, and so is all behind it."""
    draw, sampled = torch.Generator().manual_seed(seed), []
    for problem in problems:
        responses = []
        for k in range(6):
            first = [3, 3, 3, 0, 1, 2][k]  # the first wrong step
            numbers = torch.randint(1, 20, (3,), generator=draw).tolist()
            steps = [f"{'Kim' if j == first else 'Tom'} has {n} balls." for j, n in enumerate(numbers)]
            labels, right = [j < first for j in range(3)], first == 3
            answer = "1" if right else "2"
            text = "\n".join([*steps, "#### 5"])
            responses.append(Response(text, right, answer=answer, step_labels=labels))
        sampled.append(Samples(Problem(problem, "How many balls?", "1"), responses))
    return sampled


def write(path, sampled):
    return jsonl(path, *map(samples_to_row, sampled))


@pytest.fixture(scope="module")
def trained(policy, tmp_path_factory):
    """A folder with a PRM and an ORM, trained on the same few chains, and held-out ones."""
    folder = tmp_path_factory.mktemp("trained")
    write(folder / "train.jsonl", pool([f"t{i}" for i in range(24)]))
    write(folder / "test.jsonl", pool([f"e{i}" for i in range(8)], seed=1))
    for task in ("prm", "orm"):
        argv = ["--task", task, "--init", policy, "--samples", "train.jsonl", "--eval-samples", "test.jsonl"]
        argv += ["--steps", 60, "--batch-size", 16, "--lr", 1e-2, "--device", "cpu", "--out", task]
        done = script("train.py", *argv, cwd=folder)
        assert done.returncode == 0, done.stderr
        assert "144 rows and 48 held-out responses" in done.stdout
        assert "labels of 48 held-out responses told right:" in done.stdout and "nats a step" in done.stdout
    return folder


@pytest.mark.parametrize("task", ["prm", "orm"])
def test_a_trained_reward_model_orders_right_over_wrong(trained, task):
    model, sampled = load_model(trained / task, reward=True), read_samples(trained / "test.jsonl")
    assert model.kind == task
    scored = reward_scores(model, Tokenizer(trained / task), sampled, name=task, mode="cot", batch_size=6)
    for samples in scored:
        right, wrong = ([r.scores[task] for r in samples.responses if r.correct == c] for c in (True, False))
        assert min(right) > max(wrong)
        for response in samples.responses if task == "prm" else []:  # the first error is where it is
            assert [p > 0.5 for p in response.step_scores[task]] == response.step_labels
    measured = json.loads((trained / task / "eval.json").read_text())
    assert sum(measured["after"]["labels"]) > 47 > sum(measured["before"]["labels"])


def test_sample_takes_a_reward_model_where_it_takes_a_dpo_model(trained, policy):
    argv = ["sample.py", "--samples", "test.jsonl", "--verifier"]
    for task in ("prm", "orm"):
        done = script(*argv, task, "--out", f"by-{task}.jsonl", cwd=trained)
        assert done.returncode == 0 and "n = 4: majority" in done.stdout, done.stderr
        assert "best 100.0%" in done.stdout.splitlines()[-2]
    done = script(*argv, "prm", "--aggregate", "product", "--out", "by-product.jsonl", cwd=trained)
    assert done.returncode == 0, done.stderr
    for r in (r for s in read_samples(trained / "by-product.jsonl") for r in s.responses):
        assert r.scores["prm-product"] == pytest.approx(math.prod(r.step_scores["prm-product"]))
    error = partial(script, *argv, cwd=trained)
    assert_one_line_error(error("prm", "--ref", policy, "--out", "x"), "--ref", "prm is a reward model")
    assert_one_line_error(error("prm", "--token-scores", "--out", "x"), "--token-scores", "is a reward model")
    assert_one_line_error(error(policy, "--out", "x"), "--ref is ''", "a reward model alone needs none")
    more = ["--ref", policy, "--aggregate", "min", "--out", "x"]
    assert_one_line_error(error(policy, *more), "--aggregate is 'min'", "only with a reward model")
    assert_one_line_error(script("sample.py", "--aggregate", "min", cwd=trained), "--aggregate", "--verifier")
    asked = script("sample.py", "--model", "prm", "How many?", cwd=trained)
    assert_one_line_error(asked, "prm: is a reward model", "allowed: a language model")


def test_what_a_verifier_cannot_judge_is_counted_and_has_the_score_0(trained, policy, tmp_path):
    """No step, nothing at all, more tokens than the context; sixty steps are no more than two."""
    many = "\n".join(f"Kim has {i}." for i in range(60))
    texts = ["Tom has 3.\n#### 3", "#### 10", "", f"{many}\n#### 3", f"{many * 9}\n#### 3"]
    sampled = [Samples(replace(PROMPT, answer="3"), [Response(text, True, answer="3") for text in texts])]
    file = write(tmp_path / "s.jsonl", sampled)
    argv = ["sample.py", "--samples", file, "--out", "scored.jsonl", "--verifier"]
    done = script(*argv, trained / "prm", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    said = "3 of 5 responses were not judged and have the score 0: they have no step, or are longer than"
    assert said in done.stdout
    [samples] = read_samples(tmp_path / "scored.jsonl")
    found = [(len(r.step_scores["prm"]), r.scores["prm"] > 0) for r in samples.responses]
    assert found == [(1, True), (0, False), (0, False), (60, True), (0, False)]
    done = script(*argv, policy, "--ref", policy, "--overwrite", cwd=tmp_path)
    assert_one_line_error(
        done, "problem '1': a response of", "allowed: up to the context of", "--truncate-words"
    )
    write(file, [replace(sampled[0], responses=[r for r in sampled[0].responses if r.text])])
    short = ["--ref", policy, "--truncate-words", 5, "--overwrite"]
    assert script(*argv, policy, *short, cwd=tmp_path).returncode == 0


def test_a_stopped_and_resumed_run_ends_with_the_same_bits_and_needs_the_same_labels(trained, policy):
    argv = ["--task", "prm", "--init", policy, "--samples", "train.jsonl", "--steps", 6, "--batch-size", 8]
    argv += ["--device", "cpu", "--peek", 1]
    done = script("train.py", *argv, "--accumulate", 2, "--out", "whole", cwd=trained)
    assert done.returncode == 0 and "\033[32m\\n\033[0m" in done.stdout, done.stderr
    argv += ["--accumulate", 2, "--out", "halves"]
    assert script("train.py", *argv, "--stop-at", 3, cwd=trained).returncode == 0
    kept = (trained / "train.jsonl").read_text()
    (trained / "train.jsonl").write_text(kept.replace('"step_labels": [false', '"step_labels": [true', 1))
    assert_one_line_error(script("train.py", *argv, "--resume", cwd=trained), "--resume: data_digest")
    (trained / "train.jsonl").write_text(kept)
    assert script("train.py", *argv, "--resume", cwd=trained).returncode == 0
    one, two = (load_model(trained / out, reward=True).state_dict() for out in ("whole", "halves"))
    assert all(torch.equal(one[name], two[name]) for name in one)
    argv[argv.index("--accumulate") + 1] = 1
    assert script("train.py", *argv, "--overwrite", cwd=trained).returncode == 0
    for name in ("loss", "grad_norm"):  # parts add up to the whole
        big, small = ([line[name] for line in lines(trained, out)] for out in ("halves", "whole"))
        assert big == pytest.approx(small, rel=1e-4)


def test_what_a_reward_model_cannot_be_made_of_ends_in_one_line(trained, policy, tmp_path):
    train = partial(script, "train.py", "--init", policy, cwd=tmp_path)
    pool_file = ["--samples", trained / "train.jsonl"]
    assert_one_line_error(train("--task", "prm"), "--samples is ''", "--task prm")
    assert_one_line_error(train(*pool_file), "--samples", "--task sft does not use it")
    assert_one_line_error(train("--task", "orm", "--data", "svamp:x"), "--data is 'svamp:x'", "--task orm")
    assert_one_line_error(train("--task", "prm", "--mode", "both", *pool_file), "--mode is 'both'")
    same = train("--task", "prm", *pool_file, "--eval-samples", trained / "train.jsonl")
    assert_one_line_error(same, "--eval-samples: 24 held-out problems are among the trained")
    bare = write(tmp_path / "bare.jsonl", [Samples(PROMPT, [Response("3\n#### 3", True)])])
    done = train("--task", "prm", "--samples", bare)
    assert_one_line_error(done, "--samples", "responses with labels; left out: {'without a label': 1}")
    done = script("train.py", "--task", "prm", "--init", trained / "prm", *pool_file, cwd=tmp_path)
    assert_one_line_error(done, "is a reward model", "allowed: a language model")


# ---- PS-GRPO -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "scores, drop",
    [
        ([0.9, 0.45, 0.9], 0.5),
        ([0.8, 0.6, 0.3], 0.5),  # relative: from 0.6, not from 0.8
        ([0.8, 0.6, 0.51], 0.25),
        ([0.2, 0.9], 0.0),  # it only rises
        ([0.7], 0.0),
        ([], 0.0),
        ([0.0, 0.5], 0.0),  # from 0 nothing falls
        ([0.5, 0.0, 0.0], 1.0),
        ([1e-300, 1e-301], 0.9),
    ],
)
def test_the_drop_by_hand(scores, drop):
    assert largest_drop(scores) == pytest.approx(drop)


def test_rewards_by_hand():
    steady, falling = [0.9, 0.8, 0.85], [0.9, 0.8, 0.4]
    assert [ps_grpo_reward(o, p) for o in (1, 0) for p in (steady, falling)] == [1.0, 0.5, 0.0, 0.0]
    assert ps_grpo_reward(True, falling, rho=0.5) == 0.5 and ps_grpo_reward(True, falling, rho=0.51) == 1.0
    assert ps_grpo_reward(True, falling, gamma=0.7) == pytest.approx(0.3) and ps_grpo_reward(True, []) == 1.0
    assert ps_grpo_reward(True, [0.5, 0.25], rho=0.5) == 0.5  # at rho it costs
    assert mean_reward(True, [0.5, 1.0]) == 1.75 and mean_reward(False, [0.5]) == 0.5
    assert mean_reward(True, []) == 1.0
    for function in (largest_drop, partial(mean_reward, True), partial(ps_grpo_reward, True)):
        for bad in (math.nan, math.inf, 1.5, -0.1):
            assert_value_named(lambda: function([0.5, bad]), "allowed: probabilities, 0 to 1")


def test_step_advantages_by_hand():
    """Means 0.8 and 0.4, outcomes 1 and 0: both norms are 1/sqrt 2 and -1/sqrt 2 (std with K - 1)."""
    a, b = step_advantages([1, 0], [[0.7, 0.9], [0.4]])
    process, result = 0.2 / (0.2 * math.sqrt(2) + 1e-4), 0.5 / (0.5 * math.sqrt(2) + 1e-4)
    assert a == pytest.approx([0.7 * process + result, 0.9 * process + result, result])
    assert b == pytest.approx([-0.4 * process - result, -result])  # the last: what is behind the steps
    assert step_advantages([1, 1], [[0.5], [0.5, 0.5]]) == [[0.0] * 2, [0.0] * 3]  # a dead group
    assert step_advantages([1, 0], [[], []]) == [pytest.approx([result]), pytest.approx([-result])]


def drawn(tokenizer, text, correct, scores, finish="stop"):
    ids = tokenizer.encode(text) + [tokenizer.eos_id] * (finish == "stop")
    return Response(text, correct, 0.0, finish, ids, step_scores={"prm": scores})


def test_each_token_gets_the_advantage_of_its_step(policy):
    """Two steps, the first of two lines, an answer line and EOS; beside it a chain that was cut off in its
    only step."""
    tokenizer = Tokenizer(policy)
    whole = drawn(tokenizer, "Step 1: It is 3.\nand 4\nStep 2: So 7.\n#### 7", True, [0.7, 0.9])
    cut = drawn(tokenizer, "Tom has 48", False, [0.4], finish="length")
    at = rollouts.step_of_token(tokenizer, whole)
    parts = [tokenizer.decode([i for i, j in zip(whole.ids, at) if j == step]) for step in range(3)]
    assert parts == ["Step 1: It is 3.\nand 4\n", "Step 2: So 7.\n", "#### 7"]
    assert at == sorted(at) and at[-1] == 2 and set(rollouts.step_of_token(tokenizer, cut)) == {0}
    samples = Samples(Problem("1", "How many?", "7"), [whole, cut])
    config = AlignConfig(method="grpo", reward="steps", verifier="x")
    batch = collate([rollouts.as_drawn(tokenizer, samples, config)], tokenizer.pad_id)
    a, b = step_advantages([1, 0], [[0.7, 0.9], [0.4]])
    expected = [a[j] for j in at] + [b[0]] * len(cut.ids)
    assert batch.advantages[batch.loss_mask].tolist() == pytest.approx(expected)
    assert not batch.advantages[~batch.loss_mask].any()
    table = align.tabulate(torch.zeros(batch.ids.shape), rollouts.Micro(batch), 1.0, True)
    assert align.advantages(table, config) is batch.advantages
    long = drawn(tokenizer, "Kim has 7.\n" * 60 + "#### 7", True, [0.5] * 60)
    found = rollouts.step_of_token(tokenizer, long)
    assert sorted(set(found)) == list(range(61)) and found == sorted(found)
    none = drawn(tokenizer, "#### 7", True, [])  # no step: all of it has the outcome's
    assert set(rollouts.step_of_token(tokenizer, none)) == {0}
    unread = drawn(tokenizer, "It is 3.\nSo 7.\n#### 7", True, [])  # longer than the PRM's context
    for one in (none, unread):
        rows = rollouts.as_drawn(tokenizer, replace(samples, responses=[one, cut]), config)
        assert {*rows[0].advantages} == {*step_advantages([1, 0], [[], [0.4]])[0]}
    plain = rollouts.as_drawn(tokenizer, samples, AlignConfig(method="grpo"))
    assert collate([plain], tokenizer.pad_id).advantages is None


def test_a_picture_moves_the_advantages_with_their_tokens():
    class Reader(ImageReader):
        def pixels(self, images):
            return [torch.zeros(3, 2, 2) for _ in images]

    advantages = [(1.0, 2.0, 3.0), (-4.0,)]
    group = [
        Row("p", [5, 9, 6, *range(10, 10 + len(own))], 3, images=("a",), advantages=own) for own in advantages
    ]
    batch = collate([group], 0, Reader(9, 4, 2, None))
    expected = [[0.0] * 6 + [1.0, 2.0, 3.0], [0.0] * 6 + [-4.0, 0.0, 0.0]]
    assert batch.advantages.tolist() == expected and batch.ids[0, 6:].tolist() == [10, 11, 12]


def grpo(policy, *argv, cwd):
    common = ["--method", "grpo", "--init", policy, "--device", "cpu", "--steps", 2, "--batch-size", 2]
    common += ["--k", 4, "--limit", 20, "--max-new-tokens", 8, "--eval-split", "", "--out", "out"]
    return script("align.py", *common, *argv, cwd=cwd)


@pytest.mark.parametrize("reward", ["outcome", "ps-grpo", "mean", "steps"])
def test_grpo_learns_from_what_the_prm_says(trained, policy, tmp_path, reward):
    done = grpo(policy, "--reward", reward, "--verifier", trained / "prm", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    log = lines(tmp_path)
    assert all(0 <= line["prm_score"] <= 1 and line["right"] == 0 for line in log)
    if reward in ("outcome", "ps-grpo"):
        assert all(line["reward"] == line["grad_norm"] == 0 for line in log)
    else:  # a policy that is never right is paid for its scores alone
        assert log[0]["reward"] == pytest.approx(log[0]["prm_score"]) and log[0]["grad_norm"] > 0


def test_a_run_with_step_advantages_resumes_with_the_same_bits(trained, policy, tmp_path):
    argv = ["--reward", "steps", "--verifier", trained / "prm", "--steps", 4, "--updates", 2]
    assert grpo(policy, *argv, cwd=tmp_path).returncode == 0
    argv[argv.index("--verifier") + 1] = "prm"  # a copy, which can be spoiled
    shutil.copytree(trained / "prm", tmp_path / "prm")
    assert grpo(policy, *argv, "--out", "halves", "--overwrite", "--stop-at", 2, cwd=tmp_path).returncode == 0
    config = (tmp_path / "prm" / "config.json").read_text()
    (tmp_path / "prm" / "config.json").write_text(config + " ")
    done = grpo(policy, *argv, "--out", "halves", "--resume", cwd=tmp_path)
    assert_one_line_error(done, "--resume: verifier_digest is")
    (tmp_path / "prm" / "config.json").write_text(config)
    done = grpo(policy, *argv, "--out", "halves", "--resume", cwd=tmp_path)
    assert done.returncode == 0 and "steps 3 to 4" in done.stdout, done.stderr
    one, two = ((tmp_path / out / "model.safetensors").read_bytes() for out in ("out", "halves"))
    assert one == two


def test_a_right_answer_by_a_doubtful_way_is_worth_less(monkeypatch):
    config = AlignConfig(method="grpo", reward="ps-grpo", verifier="x", gamma=0.75)
    judged = lambda *p, **k: Response("", step_scores={"prm": list(p)}, **{"correct": True, **k})
    worth = lambda r: align.REWARDS["ps-grpo"](r, config)
    assert worth(judged(0.9, 0.5)) == 0.25 and worth(judged(0.9, 0.8)) == 1.0
    assert worth(judged(0.9, 0.8, finish="length")) == worth(judged(0.9, correct=False)) == 0.0


@pytest.mark.parametrize(
    "argv, parts",
    [
        (["--reward", "ps-grpo"], ["--verifier is ''", "a PRM, with --reward ps-grpo"]),
        (["--verifier", "orm"], ["--verifier is 'orm'", "a PRM, this is an orm"]),
        (["--reward", "mean", "--verifier", "orm"], ["--verifier is 'orm'", "a PRM, this is an orm"]),
        (["--reward", "mean", "--verifier", "lm"], ["is a language model", "allowed: a reward model"]),
        (["--reward", "mean", "--verifier", "prm", "--rho", 0.2], ["--reward is 'mean'", "ps-grpo"]),
        (["--reward", "ps-grpo", "--verifier", "prm", "--rho", 1.2], ["--rho is 1.2"]),
        (
            ["--reward", "steps", "--verifier", "prm", "--normalisation", "dr-grpo"],
            ["--reward is 'steps'", "dr-grpo"],
        ),
        (["--method", "aft", "--reward", "mean"], ["--reward is 'mean'", "aft does not use it"]),
        (["--init", "prm"], ["prm: is a reward model", "allowed: a language model"]),
    ],
)
def test_bad_rewards_end_in_one_line(trained, policy, argv, parts):
    argv = [policy if word == "lm" else word for word in argv]
    assert_one_line_error(grpo(policy, *argv, cwd=trained), *parts)
    assert not (trained / "out").exists()
