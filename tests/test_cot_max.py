"""recipes/cot_max.py: what it declares, and what it counts of a pruned prompt."""

import json

import pytest

from minicot.pruner import Kept
from minicot.recipes import cot_max
from minicot.toy import shots

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
    assert {flag(words, "--max-new-tokens") for words in trained} == {"60"}  # a file's default has no room
    assert models["w-0"].seeds == 1


def test_what_is_kept_by_hand(tmp_path, monkeypatch):
    shot = "Q: Kim has 2 Zoe bags. It is day 7. How many pens?\nA: 2 Zoe x 6 = 12. #### 12\n\n"
    words = [word for word, _ in shots.word_kinds(shot)]
    keep = [word.strip() in ("Q", ":", "A", "2", "x", "12") for word in words]
    monkeypatch.setattr(cot_max, "prune_by", lambda *_, **__: [Kept(None, [words], [keep])] * 2)
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
