"""URSA (arXiv 2501.04686): the recipe's labels, choices and claims. The engines are in test_synthesis.py, the
reward model in test_prm.py."""

import json

import pytest

from minicot import plots
from minicot.answers import split_steps
from minicot.metrics import auroc
from minicot.recipes.tables import sides
from minicot.records import Problem, Response, Samples, read_samples, samples_to_row
from minicot.recipes import ursa, ursa_grpo, ursa_labels
from minicot.runs import write_jsonl
from minicot.sets import read_problems
from minicot.synthesis import number_steps
from minicot.toy import lines, pictures, teacher


def written(path, *sampled):
    write_jsonl(path, map(samples_to_row, sampled))
    return path


def read(path):
    return json.loads(path.read_text())


SMALL = ["--fast", "--splits", "train", "validation", "test", "--set", "taught=40", "labelled=8"]
SMALL += ["validation=8", "test=8"]


def test_the_recipe_declares_what_its_claims_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ursa.E.parse([*SMALL, "n=32"])
    ursa.declare(ursa.E)
    ursa.E.check(ursa.CLAIMS)
    models = {model.name: model for model in ursa.E.models}
    ursa.E.models.clear(), ursa.E.reads.clear()
    assert set(models) == {"sft", "other", *ursa.SOURCES, "dpo"}
    flags = [
        {k: v for k, v in models[name].flags.items() if k not in ("task", "samples")} for name in ursa.SOURCES
    ]
    assert all(one == flags[0] for one in flags) and flags[0]["steps"] and flags[0]["train"] == "language"
    assert flags[0]["init"] == "toy-judge"
    assert models["orm"].flags["samples"].name == models["prm"].flags["samples"].name  # the same responses
    assert 3 <= sum(claim["id"].endswith("*") for claim in ursa.CLAIMS + ursa_grpo.CLAIMS) <= 5
    rows = [json.loads(line) for line in (ursa.E.root / "expand.jsonl").read_text().splitlines()]
    assert 20 < len(rows) < 40  # a quarter of the teacher's answers is wrong, most of these are dropped
    others = [json.loads(line)["id"] for line in (ursa.E.root / "rewrite.jsonl").read_text().splitlines()]
    assert len(others) > 20 and not {row["id"] for row in rows} & set(others)
    assert all(row["solution"].startswith("Step 1: ") and "†Answer: " in row["solution"] for row in rows)


def labelled(text, correct, labels, **fields):
    return Response(text, correct, step_labels=labels, **fields)


def test_a_reward_model_of_each_source_learns_a_right_response_for_two_wrong_ones(tmp_path):
    right = [labelled(f"right {i}", True, [True]) for i in range(5)]
    bel = [labelled(f"bel {i}", False, [False]) for i in range(5)] + [Response("not located", False)]
    mie = [labelled(f"mie {i}", False, [True, False]) for i in range(4)]
    sampled = written(tmp_path / "bel", Samples(Problem("p", "q"), right + bel))
    misread = written(tmp_path / "mie", *(Samples(Problem(f"m{i}", "q"), [one]) for i, one in enumerate(mie)))
    texts = {}
    for source in ("both", "bel", "mie"):
        ursa_labels.training_set(tmp_path / source, sampled, misread, source, seed=0)
        made = read_samples(tmp_path / source)
        assert len({one.problem.id for one in made}) == len(made)
        texts[source] = {one.text for samples in made for one in samples.responses}
    of_right = lambda source: {text for text in texts[source] if text.startswith("right")}
    counts = [len(of_right(source)) for source in ("both", "bel", "mie")]
    assert counts == [4, 2, 2]  # of 9, 5 and 4 wrong ones
    wrong = {name: {one.text for one in part[:5]} for name, part in (("bel", bel), ("mie", mie))}
    assert texts["bel"] - of_right("bel") == wrong["bel"] and texts["mie"] - of_right("mie") == wrong["mie"]
    assert texts["both"] - of_right("both") == wrong["bel"] | wrong["mie"]


def test_two_right_responses_to_a_problem_are_misread_each_in_its_way(tmp_path):
    [problem] = read_problems("toy-pictures", "train", limit=1)
    told = [number_steps([f"Well {i}.", *split_steps(problem.solution)], problem.answer) for i in range(3)]
    right = [Response(text, True, answer=problem.answer) for text in told]
    file = written(tmp_path / "samples", Samples(problem, [Response("no", False), *right]))
    ursa_labels.misread(tmp_path / "mie", file, seed=0)
    [found] = read_samples(tmp_path / "mie")
    made = found.responses
    assert len(made) == 2 and len({one.text for one in made}) == 2
    assert not any(one.correct for one in made) and all(False in one.step_labels for one in made)


ROW = pictures.make_problem(1, kind="table", difficulty=2)


def chain(wrong_from=None):
    """The row's solution in URSA's form; from this step on it is wrong."""
    steps = [
        step if wrong_from is None or j < wrong_from else "Zoe has" for j, step in enumerate(ROW["steps"])
    ]
    return number_steps(steps, ROW["answer"] if wrong_from is None else "99")


def test_labels_are_held_to_the_step_oracle(tmp_path):
    K = len(ROW["steps"])
    scores = lambda first: [0.9] * first + [0.2] * (K - first)
    told = [  # (chain, the first step that the model doubts)
        (chain(), K),
        (chain(2), 2),
        (chain(2), 3),
    ]
    made = [Response(text, False, step_scores={"prm": scores(first)}) for text, first in told]
    assert all(len(split_steps(text)) == K for text, _ in told)
    file = written(tmp_path / "scored", Samples(Problem(f"{ROW['id']}/3", "q"), made))
    ursa_labels.step_quality(tmp_path / "out", file, seed=0)
    found = read(tmp_path / "out")
    assert found["steps"] == [[3 * K - 1, 3 * K]] and found["first_error"] == [[1, 2]]
    right, wrong = K + 4, 2 * (K - 2)  # of the wrong steps one has 0.9
    assert found["auroc"] == pytest.approx((right * (wrong - 1) + right / 2) / (right * wrong))


def test_what_is_wrong_in_the_chains_that_a_reward_model_chose(tmp_path, monkeypatch, capsys):
    """Four mistakes of one chain, with scores; first_error names them in numbered steps, too."""
    [problem] = read_problems("toy-pictures", "validation", limit=1)
    steps = pictures.row_of(pictures.scene_of(problem.id))["steps"]
    place = next(i for i, step in enumerate(steps) if " = " in step)
    read, sum_of = steps[0], steps[place]
    head, _, result = sum_of.rstrip(".").rpartition(" = ")
    a, b = (int(part) for part in head.rsplit(" ", 3)[-3::2])
    other = {"+": (a + 1) + b, "-": (a + 1) - b, "x": (a + 1) * b, "/": 0}[head.split()[-2]]
    wrong = {
        "misread": [read.replace(read.split()[-1], "21."), *steps[1:]],
        "arithmetic": [*steps[:place], f"{head} = {int(result) + 1}.", *steps[place + 1 :]],
        "look-up": [*steps[:place], f"{head.rsplit(' ', 3)[0]} {a + 1} {head.split()[-2]} {b} = {other}."],
        "answer": steps[:place],
    }
    texts = {what: number_steps(lines, problem.answer) for what, lines in wrong.items()}
    assert {what: teacher.first_error(problem.id, text) for what, text in texts.items()} == {
        what: what for what in wrong
    }
    scores = {"misread": 0.9, "arithmetic": 0.1, "look-up": 0.2, "answer": 0.3}
    responses = [
        Response(text, False, answer=what[:1], step_scores={"prm": [scores[what]]})
        for what, text in texts.items()
    ]
    right = Response(number_steps(steps, problem.answer), True, answer="x", step_scores={"prm": [0.95]})
    write_jsonl(tmp_path / "a.jsonl", [samples_to_row(Samples(problem, responses))])
    write_jsonl(tmp_path / "b.jsonl", [samples_to_row(Samples(problem, [*responses, right]))])
    files = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    best, drawn, alone = ursa_labels.wrong_choices(files)
    assert best == {"misread": 1} and alone == 1 and drawn == {what: 2 for what in wrong}
    monkeypatch.setattr("sys.argv", ["", *map(str, files)])
    ursa_labels.main()
    said = capsys.readouterr().out
    assert "misread: 100.0% of the wrong choices, 25.0% of all wrong chains" in said
    assert "1 wrong choices, 1 of an answer given once; 8 wrong chains" in said


def test_auroc_is_the_share_of_pairs_in_order():
    assert auroc([0.1, 0.4, 0.4, 0.8], [0, 0, 1, 1]) == 3.5 / 4
    assert auroc([1, 2], [1, 1]) is None and auroc([1, 2], [0, 0]) is None
    assert auroc([3, 2, 1], [0, 1, 1]) == 0.0
    with pytest.raises(ValueError, match="labels holds 2"):
        auroc([1.0], [2])


def judged(answer, steps, kind="prm"):
    text = "x" * len(steps) + f"\n†Answer: {answer}"
    scores = {kind: sum(steps)}
    return Response(text, answer == "1", answer=answer, scores=scores, step_scores={"prm": steps})


def test_best_of_n_by_each_aggregate_and_its_controls(tmp_path):
    """Of four answers 2 is the commonest and the shortest; 1 has the highest mean, 3 the highest least."""
    pool = [judged("2", [0.1]), judged("2", [0.2]), judged("1", [0.9, 0.9, 0.5]), judged("3", [0.6, 0.6])]
    file = written(tmp_path / "scored", Samples(Problem("p", "q", answer="1"), pool))
    ursa.all_curves(tmp_path / "curves", file, seed=0)
    found = read(tmp_path / "curves")
    at = {way: found[f"{way}@4"] for way in ursa.WAYS}
    assert at["mean"] == at["vote"] == at["pass"] == [1.0]
    assert at["min"] == at["majority"] == at["shortest"] == [0.0]
    ursa.best_score(tmp_path / "score", file, seed=0)
    assert read(tmp_path / "score") == {"score": 1.0}
    ratios = [judged("1", [0.1], "dpo"), judged("2", [5.0], "dpo")]
    file = written(tmp_path / "ratios", Samples(Problem("p", "q", answer="1"), ratios))
    ursa.best_score(tmp_path / "score", file, seed=0)
    assert read(tmp_path / "score") == {"score": 0.0}


def test_every_metric_of_a_claim_is_read_out(tmp_path, monkeypatch):
    """What the readings write of a small pool, under the names that the claims ask for."""
    K = len(ROW["steps"])
    problem = Problem(ROW["id"], ROW["question"], answer=ROW["answer"])

    def response(text, correct, kind):
        how = {"scores": {kind: 0.5 + correct}, "step_scores": {kind: [0.5] * K}}
        return Response(text, correct, answer="99", ids=[1], **how)

    def pool(kind):
        made = [response(chain(), True, kind)] + [response(chain(2), False, kind)] * 31
        return written(tmp_path / kind, Samples(problem, made))

    roll_out = lambda asked: [
        ["\n" * (not p.text.endswith("\n")) + f"†Answer: {ROW['answer']}"] for p in asked
    ]
    monkeypatch.setattr(ursa_labels, "roll_outs", lambda model, seed: ursa_labels.Rates(roll_out))
    bel = written(
        tmp_path / "bel", Samples(problem, [labelled(chain(2), False, [True] * K), Response("x", False)])
    )
    names = {"greedy"}
    for number, (work, *inputs) in enumerate(
        (
            (ursa.all_curves, pool("prm")),
            (ursa.all_curves, pool("dpo")),
            (ursa_labels.step_quality, pool("prm")),
            (ursa_labels.length_matched, pool("orm")),
            (ursa_labels.bel_quality, bel, "sft", pool("prm")),
        )
    ):
        work(out := tmp_path / f"out-{number}", *inputs, seed=0)
        found = read(out)
        names |= found.keys() | {f"other {name}" for name in found if "@" in name}
    assert found["as_exhaustive"] == [[31, 31]] and found["bel_steps"] == [[2, K]]
    [[cost, most]] = found["bel_cost"]
    assert 0 < cost < most == K
    assert read(tmp_path / "out-3") == {"matched": [[31, 31]]}
    for claim in ursa.CLAIMS:
        assert {metric for _, metric in sides(claim)} <= names, claim


def test_a_right_and_a_wrong_chain_are_drawn_step_by_step(tmp_path):
    K = len(ROW["steps"])
    scored = lambda text, correct: Response(text, correct, step_scores={"prm": [0.9] * K})
    only_right = Samples(Problem("table-2-7", "q"), [])
    both = [scored(chain(0), False), scored(chain(2), False), scored(chain(), True)]
    file = written(tmp_path / "scored", only_right, Samples(Problem(ROW["id"], "q"), both))
    ursa_labels.two_chains(tmp_path / "out", file, seed=0)
    found = read(tmp_path / "out")
    assert [one["wrong"] for one in found.values()] == [None, 2]  # not the one that goes wrong at once
    assert all(len(one["steps"]) == len(one["scores"]) == K for one in found.values())
    ursa_labels.two_chains(tmp_path / "none", written(tmp_path / "one", only_right), seed=0)
    assert read(tmp_path / "none") == {}
    plots.step_scores(found, tmp_path / "steps.svg")
    svg = (tmp_path / "steps.svg").read_text()
    assert "a wrong one" in svg and svg.count("#d62728") == K - 2  # a red bar a wrong step


# ---- GRPO ----------------------------------------------------------------------------------------


@pytest.fixture
def declared(tmp_path, monkeypatch):
    """ursa_grpo, small, below a folder of its own -> {name: model}."""
    E = ursa_grpo.E
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ursa, "FAST", ursa.FAST | dict(taught=40, labelled=8, validation=8, test=8))
    E.parse(["--fast", "--set", "asked=8", "validation=8", "test=8", "drawn=8"])
    ursa_grpo.declare(E)
    E.check(ursa_grpo.CLAIMS)
    yield {model.name: model for model in E.models}
    E.models.clear(), E.reads.clear(), E.chosen.clear(), E.validations.clear()


def test_all_arms_start_from_ursas_models_in_ursas_folder(declared):
    E, models = ursa_grpo.E, declared
    arms = [models[name] for name in ursa_grpo.ARMS]
    assert list(models) == ["sft", "prm", *ursa_grpo.ARMS]
    assert len({repr({k: v for k, v in arm.flags.items() if k != "reward"}) for arm in arms}) == 1
    assert [arm.grid or arm.at for arm in arms] == 2 * [{"lr": (1e-4,)}] + 2 * [(models["grpo"], "lr")]
    assert all(arm.flags["init"] is models["sft"] for arm in arms)
    assert [arm.flags["reward"] for arm in arms] == ["outcome", "ps-grpo", "mean", "steps"]
    assert E.folder(models["sft"], 0).as_posix() == "runs/recipes/ursa-fast/sft-s10"
    assert E.folder(models["v1"], 0, {"lr": 1e-4}).as_posix() == "runs/recipes/ursa_grpo-fast/v1-lr0.0001-s10"
    assert ursa_grpo.SIZES["first_seed"] == ursa.SIZES["first_seed"]  # or its models would be others


def test_habits_by_hand(tmp_path):
    """Two right chains without a wrong step, two with one, of each kind one with a drop; wrong ones."""

    def one(text, correct, scores, n):
        mean = {"prm": sum(scores) / len(scores)}
        how = dict(answer="1" if correct else None, scores=mean, step_scores={"prm": scores})
        return Response(text, correct, ids=[7] * n, **how)

    def chain(scene, sound):
        chains = [lines.labelled(scene, draw).responses[0] for draw in range(30)]
        return next(r.text for r in chains if r.correct == sound)

    a, b, c = pictures.scenes("train", 3, 0, None)
    steady, falling = [0.9, 0.8], [0.9, 0.6]
    wrong = [one("x", False, falling, 40), one("x", False, steady, 50)]
    pool = [one(chain(a, True), True, steady, 10), one(chain(a, False), True, falling, 20), *wrong]
    more = [one(chain(c, True), True, falling, 30), one(chain(c, False), True, steady, 30)]
    problems = [Samples(Problem(s.id, "q"), own) for s, own in ((a, pool), (b, wrong), (c, more))]
    ursa_grpo.habits(tmp_path / "out", written(tmp_path / "scored", *problems), seed=0)
    assert read(tmp_path / "out") == {
        "sampled": [0.5, 0.0, 1.0],
        "prm": [0.8, 0.8, 0.8],
        "length": [30.0, 45.0, 30.0],
        "drops": [[1, 2], [0, 0], [1, 2]],
        "faulty": [[1, 2], [0, 0], [1, 2]],
        "caught": [[1, 1], [0, 0], [0, 1]],
        "form": [0.5, 0.0, 1.0],
    }


def test_the_figure_has_a_line_for_each_reward(tmp_path):
    history = {key: [[1, 0.5], [2, 0.6]] for key in ursa_grpo.TRACKED}
    training = {name: history for name in ursa_grpo.ARMS} | {"v1": history | {"prm_score": []}}
    ursa_grpo.draw({"extra": {"training": training}}, tmp_path / "page")
    svg = (tmp_path / "page_hacking.svg").read_text()
    assert all(f">{name}<" in svg for name in (*ursa_grpo.ARMS, *ursa_grpo.TRACKED.values()))
