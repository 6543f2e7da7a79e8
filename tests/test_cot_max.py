"""recipes/cot_max.py: what it declares, and what it counts of a pruned prompt."""

import inspect
import json

import pytest
import torch

from minicot.data import encode_row, target
from minicot.pruner import Kept
from minicot.recipes import cot_max, cot_max_text
from minicot.recipes.tables import sides
from minicot.records import Problem, fields_of, read_jsonl
from minicot.runs import write_jsonl
from minicot.tokenizer import Tokenizer
from minicot.toy import shots
from minicot.training import resolve
from minicot.weights import load_model

SMALL = ["--fast", "--set", "taught=4", "asked=4", "validation=3", "test=3"]


@pytest.fixture
def E(tmp_path, monkeypatch):
    """The recipe, small, declared below a folder of its own."""
    E = cot_max.E
    monkeypatch.chdir(tmp_path)
    E.parse(SMALL)
    cot_max.declare(E)
    yield E
    E.models.clear(), E.reads.clear(), E.chosen.clear(), E.validations.clear(), E.made.clear()
    E.__dict__.pop("command", None)


def test_every_claim_names_what_a_cell_gives(E):
    E.check(cot_max.CLAIMS)
    assert 3 <= sum(claim["id"].endswith("*") for claim in cot_max.CLAIMS) <= 5
    assert cot_max.SIZES["target"] in cot_max.SIZES["budgets"]  # at96 in claims is at T
    assert cot_max.SIZES["target"] == 96


def test_pruners_and_baselines_answer_the_same_problems_by_the_same_base(E):
    ran = []
    E.command = lambda words, log: (
        ran.append(words) or json.dump({}, open(words[words.index("--out") + 1], "w"))
    )
    models = {model.name: model for model in E.models}
    E.chosen["pruner"] = {"lr": 3e-4}
    for name in ("topk", "pruner", "no-tokens"):
        reading = next(one for one, _ in E.reads[name] if one.name == "at96")
        E.path(reading, 0)
    flag = lambda words, name: words[words.index(name) + 1]
    bases = [words for words in ran if words[0] == "train.py"]
    assert [flag(words, "--init") for words in bases][0] == "toy" and len(bases) == 4
    base = flag(bases[-1], "--out")
    prunes = [words for words in ran if words[:3] == ["-m", "minicot.pruner", "prune"]]
    assert [
        flag(words, "--method") if "--method" in words else flag(words, "--pruner") for words in prunes
    ] == [
        "topk",
        *(f"runs/recipes/cot_max-fast/{name}-lr0.0003-s10/model" for name in ("pruner", "no-tokens")),
    ]
    assert {flag(words, "--model") for words in ran if words not in bases} == {base}
    assert {flag(words, "--budget") for words in prunes} == {"96"}
    assert len({flag(words, "--data") for words in prunes}) == 1
    trained = [words for words in ran if words[:2] == ["-m", "minicot.pruner"] and words[2] != "prune"]
    assert ["--no-token-stage" in words for words in trained] == [False, True]
    assert all("--easy-only" in words for words in trained)
    assert {flag(words, "--max-new-tokens") for words in trained} == {"48"}  # a file's default has no room
    switches = {"no-shots": "--no-shot-stage", "no-tokens": "--no-token-stage", "loss-alone": "--no-accuracy"}
    for name, switch in switches.items():
        assert switch in models[name].work and switch not in models["pruner"].work
    assert "--easy-only" not in models["no-filter"].work and "--see-question" in models["see-question"].work
    assert models["w-0"].seeds == 1 and models["w-0"].flags["w_below"] == 0
    assert [models[f"T-{target}"].flags["target"] for target in (48, 192)] == [48, 192]


def test_what_is_kept_by_hand(tmp_path, monkeypatch):
    shot = "Q: Kim has 2 Zoe bags. It is day 7. How many pens?\nA: 2 Zoe x 6 = 12. #### 12\n\n"
    words = [word for word, _ in shots.word_kinds(shot)]
    keep = [word.strip() in ("Q", ":", "A", "2", "x", "12") for word in words]
    signature = inspect.signature(cot_max.prune_by)

    def pruned(*args, **how):
        signature.bind(*args, **how)
        return [Kept(None, [words], [keep])] * 2

    monkeypatch.setattr(cot_max, "prune_by", pruned)
    monkeypatch.setattr(cot_max, "read_problems", lambda path: [])
    monkeypatch.setattr(cot_max, "Tokenizer", lambda folder: None)
    cot_max.what_is_kept(tmp_path / "out", "pruner", "base", "data", seed=0)
    found = json.loads((tmp_path / "out").read_text())
    assert found.keys() == {f"kept_{kind}" for kind in cot_max.KINDS}
    kinds = dict.fromkeys(cot_max.KINDS, (0, 0))
    for (word, kind), kept in zip(shots.word_kinds(shot), keep):
        kinds[kind] = kinds[kind][0] + kept * len(word), kinds[kind][1] + len(word)
    assert found == {f"kept_{kind}": [kept / all_] * 2 for kind, (kept, all_) in kinds.items()}
    assert found["kept_filler"] == [0, 0] and found["kept_operator"][0] == 0.5  # "x" stays, "=" goes


def test_the_figures_have_a_line_for_each_way(tmp_path):
    cells = [
        {"name": name, "metrics": {"at24": 0.1, "at96": 0.2, "kept_number": 0.3}}
        for name in (*cot_max.BASELINES, "pruner", "w-0")
    ]
    training = {"pruner": {key: [[1, 0.5], [2, 0.6]] for key in cot_max.TRACKED}}
    cot_max.draw({"cells": cells, "extra": {"training": training}}, tmp_path / "page")
    svg = (tmp_path / "page_budgets.svg").read_text()
    assert all(f">{name}<" in svg for name in (*cot_max.BASELINES, "pruner")) and ">w-0<" not in svg
    assert ">tokens of the shots<" in svg and (tmp_path / "page_training.svg").is_file()


# ---- real text -----------------------------------------------------------------------------------


@pytest.fixture
def text(tmp_path, monkeypatch):
    """cot_max_text on small files of one's own, declared below a folder of its own."""
    monkeypatch.chdir(tmp_path)
    told = lambda i: {"question": f"What is {i} + 1?", "answer": i + 1, "solution": f"{i}+1. #### {i + 1}"}
    row = lambda i: {"id": str(i), **told(i)}
    for name, numbers in (("own", range(9)), ("far", range(20, 24)), ("farther", range(30, 34))):
        write_jsonl(f"{name}.jsonl", map(row, numbers))
    E = cot_max_text.E
    splits = ["--splits", "train[:3]", "train[3:5]", "train[5:]"]
    others = ["--others", "far.jsonl", "farther.jsonl"]
    sizes = ["--fast", "--set", "answers=1", "budgets=256,512"]
    E.parse(["--data", "own.jsonl", *splits, *others, *sizes])
    cot_max_text.declare(E)
    yield E
    E.models.clear(), E.reads.clear(), E.made.clear(), E.__dict__.pop("command", None)


def test_real_text_reads_every_way_at_every_budget_and_every_claim_names_one(text):
    named = {side for claim in cot_max_text.CLAIMS for side in sides(claim)}
    names = {model.name for model in text.models}
    given = {(name, metric) for name in names for _, take in text.reads[name] for metric in take}
    assert named <= given
    assert given == {
        (name, f"{what}{b}") for name in names for what in ("nll", "solved", "at") for b in (256, 512)
    }
    rows = lambda name: [row["id"] for _, row in read_jsonl(text.root / f"{name}.jsonl")]
    assert rows("pool") == ["0", "1", "2"] and rows("solved") == ["5", "6"]
    assert rows("answered") == ["20", "21", "30", "31"]


def test_real_text_prunes_for_the_same_language_model_by_the_same_pool(text):
    ran = []
    text.command = lambda words, log: (
        ran.append(words) or json.dump({}, open(words[words.index("--out") + 1], "w"))
    )
    for name in ("pruner", "topk"):
        reading = next(one for one, _ in text.reads[name] if one.name == "at512")
        text.path(reading, 0)
    flag = lambda words, name: words[words.index(name) + 1]
    learn, *others = ran
    assert "--no-accuracy" not in learn and flag(learn, "--split") == "train[3:5]"
    assert [words[:3] for words in others[::2]] == [["-m", "minicot.pruner", "prune"]] * 2
    assert {(flag(words, "--budget"), flag(words, "--shots")) for words in others[::2]} == {
        ("512", str(text.root / "pool.jsonl"))
    }
    assert {flag(words, "--model") for words in ran} == {"toy"}


def test_the_losses_of_gold_answers_by_hand(text, tmp_path):
    base = resolve("toy")
    shot = "Q: What is 1 + 1?\nA: 1+1. #### 2\n\n"
    told = ("What is 2 + 2?", "4", "2+2. #### 4")
    problems = [Problem("with", *told, shots=[shot]), Problem("without", *told, shots=[])]
    write_jsonl(tmp_path / "rows.jsonl", map(fields_of, problems))
    out = tmp_path / "out.json"
    cot_max_text.losses(out, tmp_path / "rows.jsonl", tmp_path / "rows.jsonl", base, "float32", seed=0)
    found, tokenizer, model = json.loads(out.read_text()), Tokenizer(base), load_model(base)
    for name, mode in (("nll", "direct"), ("solved", "plain")):
        for problem, loss in zip(problems, found[name], strict=True):
            row = encode_row(tokenizer, problem, target(problem, mode), mode=mode)
            logp = model(torch.tensor([row.ids])).log_softmax(-1)[0, :-1]
            own = -logp.gather(1, torch.tensor(row.ids[1:])[:, None])[row.n_prompt - 1 :].mean()
            assert loss == pytest.approx(own.item(), abs=1e-5)
    assert found["nll"][0] != found["nll"][1]
