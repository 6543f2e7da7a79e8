"""LLaVA-Reasoner (arXiv 2410.16198): what the paper does to its data, and the recipe.

SFT targets: chains of a teacher whose final answer equals the annotation (section 3.1)
DPO pairs:   from 32 chains a question where 0.25 <= share right <= 0.85, at most 3 (section 3.3)
L = -log sigmoid( beta [ (log pi(y_w) - log pi_ref(y_w)) - (log pi(y_l) - log pi_ref(y_l)) ] ), sums over the
    first W words of a response, EOS never scored (appendix; run_dpo.py, DPODataCollator)
verifier:    r(y) = log pi(y) - log pi_ref(y)
"""

import json
import re
from types import SimpleNamespace

import pytest

from minicot.answers import extract_answer, is_correct
from minicot.data import make_groups, truncate_words
from minicot.errors import InputError
from minicot.recipes import llava_diagnose as diagnose
from minicot.recipes import llava_reasoner as recipe
from minicot.recipes import llava_verifier as ranking
from minicot.recipes.tables import judge_all, markdown, pack, tables
from minicot.records import Problem, Response, Samples, read_jsonl, samples_to_row
from minicot.tokenizer import Tokenizer
from minicot.toy import pictures, teacher
from minicot.runs import write_jsonl
from minicot.training import resolve
from minicot.verifier import best_of_n, best_of_repeated, step_sums

TOKENIZER = Tokenizer(resolve("toy"))


def cut(response, words):
    [samples] = truncate_words([Samples(Problem("p", "q"), [response])], words)
    return samples.responses[0]


def test_responses_keep_their_first_words_and_lose_eos():
    long = cut(Response("Tom has 3.\nAna has 7. #### 7", True), 3)
    assert (
        long.text == "Tom has 3.\nAna" and long.finish == "length" and long.correct
    )  # split at blanks alone
    ids = [*TOKENIZER.encode("Tom has 3."), TOKENIZER.eos_id]
    whole = cut(Response("Tom has 3.", True, ids=ids), 90)
    assert whole.ids == ids[:-1] and whole.finish == "length"  # EOS is not scored
    open_end = cut(Response("Tom has 3.", True, ids=ids[:-1], finish="length"), 90)
    assert open_end.ids == ids[:-1]
    assert cut(Response("Tom has 3.", True, ids=ids), 2).ids is None  # tokenised anew


def test_cut_pairs_train_the_first_words_alone():
    pair = Samples(
        Problem("p", "How many?"),
        [Response("Tom has 3 more apples.", True, reward=1.0), Response("Tom has 4.", False, reward=0.0)],
    )
    [rows], _ = make_groups(TOKENIZER, truncate_words([pair], 3), mode="cot", max_length=512, reference=False)
    trained = [TOKENIZER.decode(row.ids[row.n_prompt :], skip_special=False) for row in rows]
    assert trained == ["Tom has 3", "Tom has 4."]


def taught(problems, error_rate):
    size = SimpleNamespace(taught=problems, error_rate=error_rate)
    return recipe.teach(SimpleNamespace(data="toy-pictures", train="train", toy=True, size=size))


def test_the_filter_lets_through_only_chains_that_reach_the_gold_answer():
    kept, counts = taught(300, 0.5)
    answers = {row["id"]: row["answer"] for row in pictures.rows("train", 300)}
    assert all(is_correct(extract_answer(one.solution, "hash"), answers[one.id]) for one in kept)
    assert counts["right"][1] == 0 and counts["label"][0] == 0
    dropped = sum(drop for _, drop in counts.values())
    assert 300 * 0.25 < dropped < 300 * 0.55  # it really rejects, though not every mistake


def test_data_that_is_not_the_built_in_world_brings_its_own_chains(tmp_path):
    rows = [{"question": "1 + 1?", "answer": "2", "solution": text} for text in ("#### 2", "#### 3")]
    write_jsonl(tmp_path / "own.jsonl", [*rows, {"question": "2 + 2?", "answer": "4"}])
    own = SimpleNamespace(data=str(tmp_path / "own.jsonl"), train="train", toy=False)
    kept, counts = recipe.teach(SimpleNamespace(**vars(own), size=SimpleNamespace(taught=3)))
    assert [problem.solution for problem in kept] == ["#### 2"] and counts == {"own": [1, 2]}


def test_a_solution_that_spells_out_the_right_choice_is_taught(tmp_path):
    """As TabMWP's solutions do, whose gold answers are letters."""
    row = {"question": "Linear?", "choices": ["yes", "no"], "answer": "B"}
    write_jsonl(
        tmp_path / "own.jsonl", [{**row, "solution": f"So it is.\n#### {word}"} for word in ("no", "yes")]
    )
    own = SimpleNamespace(data=str(tmp_path / "own.jsonl"), train="train", toy=False)
    E = SimpleNamespace(**vars(own), size=SimpleNamespace(taught=2))
    assert [problem.solution for problem in recipe.teach(E)[0]] == ["So it is.\n#### no"]
    E.size.taught, E.data = 0, str(tmp_path / "none.jsonl")
    write_jsonl(tmp_path / "none.jsonl", [{**row, "solution": "#### yes"}])
    with pytest.raises(InputError, match="--data is .*none.jsonl'; allowed: problems with a solution"):
        recipe.teach(E)


def scored(answers, ratios, gold="1"):
    """A problem's row with a response of these token log-ratios for each answer."""
    made = [
        {"text": f"#### {a}", "answer": a, "correct": a == gold, "tokens": ["x"] * len(r)}
        | {"scores": {"dpo": sum(r)}, "token_scores": {"dpo": r}}
        for a, r in zip(answers, ratios)
    ]
    return {"question": "?", "answer": gold, "responses": made}


def test_the_score_and_the_vote_are_chosen_on_validation_and_read_out_on_test(tmp_path):
    """A wrong chain whose one token has a huge ratio wins by the sum and the mean; clipped, it loses."""
    right, wrong = [0.9] * 4, [50.0, -1.0, -1.0, -1.0]
    rows = [{**scored("1232", [right, wrong, [0.1], wrong]), "id": f"p{i}"} for i in range(3)]
    rows.append({"question": "?", "id": "unread", "answer": "1", "responses": []})
    write_jsonl(tmp_path / "validation", rows)
    ranking.choose_score(tmp_path / "chosen", tmp_path / "validation", seed=0)
    chosen = json.loads((tmp_path / "chosen").read_text())
    assert chosen == {"score": 1.0, "by": "clipped", "beta": 0.3}  # at 0.1 two of the wrong ones outvote it
    ranking.all_curves(tmp_path / "curves", tmp_path / "chosen", tmp_path / "validation", seed=0)
    curves = json.loads((tmp_path / "curves").read_text())
    assert curves["vote@4"] == curves["best@4"] == [1.0] * 3 and curves["majority@4"] == [0.0] * 3
    assert curves["best repeated@4"] == [0.0] * 3 and set(curves) >= {"pass@1", "vote@2"}


def test_the_second_rounds_rejected_chains_are_the_wrong_ones_that_score_highest(tmp_path):
    rows = [
        {**scored("11234", [[0.0], [0.0], [3.0], [-9.0], [5.0]]), "id": "mixed"},
        {**scored("1111", [[0.0]] * 4), "id": "solved"},
        {**scored("2345", [[0.0]] * 4), "id": "unsolved"},
    ]
    rows[0]["responses"].append({"text": "#### 5", "answer": "5", "correct": False, "scores": {"dpo": 4.0}})
    write_jsonl(tmp_path / "scored", rows)
    ranking.hardest_pairs(tmp_path / "pairs", tmp_path / "scored", seed=0)
    made = [row for _, row in read_jsonl(tmp_path / "pairs")]
    assert [row["id"] for row in made] == ["mixed/0", "mixed/1", "mixed/2"]
    assert [row["responses"][1]["answer"] for row in made] == ["4", "5", "2"]
    assert all(row["responses"][0]["correct"] for row in made)


def test_a_quarter_of_the_pairs_and_thrice_as_many(tmp_path):
    pool = [Response(f"{i}\n#### {i % 4}", i % 4 == 0, answer=str(i % 4)) for i in range(16)]
    sampled = [Samples(Problem(name, "q"), pool) for name in "ab"]
    write_jsonl(tmp_path / "samples", map(samples_to_row, sampled))
    samples = tmp_path / "samples"
    recipe.as_many_pairs(tmp_path / "own", samples, samples, "own", seed=1)
    ranking.more_pairs(tmp_path / "more", samples, seed=1)
    ranking.a_quarter(tmp_path / "few", tmp_path / "more", seed=1)
    read = lambda name: [row for _, row in read_jsonl(tmp_path / name)]
    texts = lambda name: {tuple(one["text"] for one in row["responses"]) for row in read(name)}
    assert [len(read(name)) for name in ("few", "own", "more")] == [4, 6, 18]
    assert texts("few") | texts("own") <= texts("more")  # the same, and more of them
    assert len({row["id"] for row in read("more")}) == 18


def test_generic_pairs_misread_one_number_of_the_picture(tmp_path):
    write_jsonl(tmp_path / "own", [{"id": str(i)} for i in range(9)])
    recipe.generic_pairs(tmp_path / "pairs", tmp_path / "own", seed=0)
    made = [row for _, row in read_jsonl(tmp_path / "pairs")]
    assert len(made) == 9 and sum(row["id"].endswith("-caption") for row in made) == 4
    for row in made:
        right, wrong = (one["text"].split() for one in row["responses"])
        assert row["responses"][0]["correct"] and not row["responses"][1]["correct"]
        assert len(right) == len(wrong) and sum(a != b for a, b in zip(right, wrong)) == 1


def test_pairs_without_tables_and_the_commonest_answer(tmp_path):
    write_jsonl(tmp_path / "own", [{"id": f"{kind}-1-2/0"} for kind in pictures.KINDS])
    recipe.without_tables(tmp_path / "pairs", tmp_path / "own", seed=0)
    assert [row["id"] for _, row in read_jsonl(tmp_path / "pairs")] == ["rows-1-2/0", "bars-1-2/0"]
    for name, answers in (("train.jsonl", "1223"), ("test.jsonl", "213")):
        write_jsonl(tmp_path / name, [{"question": "?", "answer": answer} for answer in answers])
    recipe.commonest(tmp_path / "out", tmp_path / "train.jsonl", tmp_path / "test.jsonl", seed=0)
    assert json.loads((tmp_path / "out").read_text()) == {"cot": [True, False, False]}


def test_long_problems_have_four_and_five_operations():
    rows = pictures.long_rows("train", 12)
    assert {row["id"].rsplit("-", 1)[1] for row in rows} == {"4", "5"}
    words = [len(row["solution"].split(" ")) for row in rows]
    assert min(words) > 45 and all(all(pictures.label_steps(row, row["steps"])) for row in rows)


def results():
    """Made-up results: CoT SFT lifts CoT by far, nothing else differs."""
    shares = {
        "format": (0.1, 0.05),
        "direct": (0.3, 0.06),
        "cot": (0.3, 0.4),
        "both": (0.3, 0.4),
        "dpo": (0.3, 0.4),
        "blind": (0.1, 0.1),
        "commonest": (0.1, 0.095),
    }
    cells = []
    for model, both in shares.items():
        lists = {mode: [int(i < 400 * share) for i in range(400)] for mode, share in zip(recipe.MODES, both)}
        lists |= {"both": {"sampled": [[4, 8]] * 50}, "dpo": {"sampled": [[6, 8]] * 50}}.get(model, {})
        means = {name: 0.75 if name == "sampled" else sum(v) / len(v) for name, v in lists.items()}
        packed = {name: pack(values) for name, values in lists.items()}
        row = {"name": model, "settings": {}, "metrics": means | {"cot_missing": 0.0}, "lists": packed}
        cells += [{**row, "seed": seed} for seed in range(3)]
    found = {"cells": cells, "grid": [], "extra": {}}
    return {**found, "claims": judge_all(found, recipe.CLAIMS)}


def test_claims_are_judged_by_what_their_names_stand_for():
    verdicts = {claim["id"]: claim["verdict"] for claim in results()["claims"]}
    assert verdicts["a1"] == "holds" and verdicts["a2"] == "holds"  # +1 point; far below CoT SFT
    assert verdicts["b1*"] == "holds" and verdicts["c1"] == "holds"  # the mean of both prompts
    assert verdicts["d1*"] == "not seen" and "d2*" not in verdicts  # its control did not run
    assert verdicts["d5"] == "holds" and "d6" not in verdicts
    assert verdicts["g1"] == "holds"  # within 2 points of the commonest answer


def test_the_tables_show_each_model_each_way_and_each_claim():
    lines = tables(results(), recipe.COLUMNS)
    assert sum(line.startswith("| cot | 30.0% | 40.0% |") for line in lines) == 1
    assert any(line.startswith("| dpo | 30.0% | 40.0% | +0.0% [+0.0%, +0.0%] | 75.0% |") for line in lines)
    assert sum(line.startswith("| a1. ") for line in lines) == 1
    ways = {"majority@16": [0, 1] * 50, "best@16": [1] * 100, "vote@16": [0, 1] * 50}
    cells = [
        {"name": "dpo", "seed": seed, "settings": {}, "metrics": {"best@16": 1.0}}
        | {"lists": {name: pack(values) for name, values in ways.items()}}
        for seed in range(3)
    ]
    found = {"cells": cells, "grid": [], "extra": {}}
    found["claims"] = judge_all(found, ranking.CLAIMS)
    verdicts = {claim["id"]: claim["verdict"] for claim in found["claims"]}
    assert verdicts == {"e1*": "not seen", "e2": "holds"}
    lines = tables(found, ranking.COLUMNS, ranking.PIVOTS)
    assert sum(line.startswith("| best |  |  |  |  | 100.0% |") for line in lines) == 1


def test_figures_are_drawn(tmp_path):
    chain = {"tokens": ["Tom", " has"], "ratios": [0.5, -1.0], "wrong": 0}
    cells = [{"name": "dpo", "metrics": {"best@1": 0.5, "best@2": 0.6}}]
    ranking.draw({"cells": cells, "extra": {"chain": chain}}, tmp_path / "x")
    assert all((tmp_path / f"x_{name}.svg").stat().st_size > 1000 for name in ("curves", "chain"))


def test_every_mix_holds_the_format_rows_and_its_own():
    kept, _ = taught(40, 0.25)
    rows = {name: recipe.mix_rows(name, kept, 5) for name in recipe.MIXES}
    ids = {name: [row["id"] for row in mix] for name, mix in rows.items()}
    assert len(ids["format"]) == 10 and set(ids["format"]) == set(ids["direct"]) & set(ids["cot"])
    assert set(ids["both"]) == set(ids["direct"]) | set(ids["cot"]) and len(ids["both"]) == 2 * len(kept)
    asked = [row["question"].rsplit("\n", 1)[-1] for row in rows["direct"]]
    assert asked.count("Answer briefly.") == len(kept) and asked.count("Think step by step.") == 5
    for row in rows["both"]:
        bare = row["question"].endswith("Answer briefly.")
        assert row["solution"].isdigit() == bare == row["id"].endswith("/direct")


def test_own_and_other_pairs_are_as_many_and_numbered(tmp_path):
    problem = lambda i: Problem(f"p{i}", f"{i}?", answer="1")
    draw = lambda n: [
        Samples(problem(i), [Response(f"{j} #### {j % 2}", bool(j % 2)) for j in range(4)]) for i in range(n)
    ]
    for name, n in (("own", 3), ("other", 2)):
        write_jsonl(tmp_path / name, map(samples_to_row, draw(n)))
    made = []
    for which in ("own", "other"):
        recipe.as_many_pairs(tmp_path / "out", tmp_path / "own", tmp_path / "other", which, seed=0)
        made.append([row for _, row in read_jsonl(tmp_path / "out")])
    assert [len(rows) for rows in made] == [6, 6]  # 3 a question, as many as the smaller side has
    assert {row["id"].split("/")[0] for row in made[1]} == {"p0", "p1"}
    assert all(row["responses"][0]["correct"] and not row["responses"][1]["correct"] for row in made[0])


def chains_of(row, *responses):
    """A Samples of (text, score) responses to a row; right where the answer is."""
    made = [
        Response(text, is_correct(answer, row["answer"]), answer=answer, scores={"dpo": score})
        for text, score in responses
        for answer in [extract_answer(text, "hash")]
    ]
    return Samples(Problem(row["id"], row["question"], answer=row["answer"]), made)


TABLE = pictures.make_problem(1, kind="table", difficulty=2, wording="because")


def wrong_chains(row):
    """Kinds of first mistake -> a chain with a wrong answer that makes it."""
    scene, steps = pictures.scene_of(row), row["steps"]
    reads = len(pictures.read_from(scene))
    known, claim = steps[reads].rsplit(", so ", 1)
    first, number = steps[0].rsplit(" ", 1), known.rsplit(" ", 1)[1]
    a, sign, b, c = re.search(r"(\d+) ([-+x/]) (\d+) = (\d+)", claim).groups()
    change = lambda place, step: "\n".join([*steps[:place], step, *steps[place + 1 :], "#### 99"])
    turned, value = {
        "+": ("x", int(a) * int(b)),
        "x": ("+", int(a) + int(b)),
        "-": ("+", int(a) + int(b)),
        "/": ("-", int(a) - int(b)),
    }[sign]
    found = {
        "misread": change(0, f"{first[0]} 99."),
        "look-up": change(reads, steps[reads].replace(f"has {number}, so", "has 99, so", 1)),
        "arithmetic": change(reads, steps[reads].replace(f"= {c}", f"= {int(c) + 1}")),
        "operation": change(
            reads, f"{known}, so {claim}".replace(f"{a} {sign} {b} = {c}", f"{a} {turned} {b} = {value}")
        ),
        "unreadable": change(reads, "Zoe has"),
        "answer": "\n".join([*steps, "#### 99"]),
    }
    other = [
        one
        for one in pictures.in_picture(scene)
        if one.who == first[0].split(":")[0] and one.item != scene.asked.item
    ]
    if other and f"{other[0].value}." != first[1]:
        found["other column"] = change(0, f"{first[0]} {other[0].value}.")
    return found


@pytest.mark.parametrize("kind", pictures.KINDS)
def test_the_first_mistake_of_a_chain_is_named(kind):
    seen, signs = set(), set()
    for row in (pictures.make_problem(seed, kind=kind, difficulty=2) for seed in range(40)):
        signs.update(re.findall(r" ([-+x/]) ", row["solution"]))
        for mistake, text in wrong_chains(row).items():
            assert teacher.first_error(row["id"], text) == mistake, (mistake, text)
            seen.add(mistake)
    assert signs == set("+-x/")
    assert seen | {"operand"} | ({"other column"} - seen if kind != "table" else set()) == {*teacher.ERRORS}


BARS = "Ben: books 3.\nTom: books 9.\nMia: books 10.\n"


@pytest.mark.parametrize(
    "step, mistake",
    [
        ("Tom has 9, so Lea has 9 + 7 = 16.", "operand"),
        ("Mia has 10, so Lea has 10 + 8 = 18.", "operand"),
        ("Mia has 10, so Lea has 10 - 7 = 3.", "operation"),
        ("Mia has 10, so Lea has 10 + 7 = 3.", "arithmetic"),
        ("Mia has 10, so Lea has 11 + 7 = 18.", "look-up"),
        ("Lea has 17, so they have 3.", "unreadable"),
        ("Mia has 10, so Lea has 7 / 0 = 0.", "look-up"),
        ("Lea has 7 / 0 = 0.", "arithmetic"),
        ("Mia has 10, so Tom has 10 + 7 = 17.", "operation"),
        ("Mia has 10, so Lea has 10 + 7 = 17 more.", "operation"),
        ("Mia has 10, so together they have 10 + 3 = 13.", "operand"),
        ("Ben: books 4.", "misread"),
        ("Ben: coins 3.", "misread"),
        ("Ben: books 3. Tom: books 9.", "unreadable"),
        ("Mia has 10, so Lea has 10 + 7 = 17.", "answer"),
        ("", "answer"),
    ],
)
def test_what_is_said_of_a_step(step, mistake):
    """Lea has 7 more books than Mia. How many books do Lea and Ben have together?"""
    assert teacher.first_error("bars-0-2", f"{BARS}{step}\n#### 99") == mistake
    assert teacher.first_error("bars-0-2", f"Mia: books 10.\n{step}\n#### 99") == mistake
    assert teacher.first_error("bars-0-2", "") == "answer"


def test_what_scores_order_and_answers_that_nobody_else_gives():
    right, wrong = TABLE["solution"], wrong_chains(TABLE)["misread"]
    odd = "#### 7"
    samples = chains_of(TABLE, (right, 0.5), (right, -1.0), (wrong, 0.0), (wrong, -2.0), (odd, 3.0))
    assert diagnose.orders(samples, "dpo") == (2 + 1) / 6  # 0.5 beats two of three, -1 one
    assert diagnose.orders(samples, "short") == (1 + 1) / 6  # a tie with both of the same length
    assert diagnose.orders(chains_of(TABLE, (right, 0.5)), "dpo") is None
    assert diagnose.orders(chains_of(TABLE, (right, 0.5), (wrong, 0.5)), "dpo") == 0.5
    both = diagnose.answers_and_scores(samples, "dpo")
    assert best_of_n(*both) == "7" and best_of_repeated(*both) == TABLE["answer"]
    assert best_of_repeated(["1", "2", None, None], [0.5, 3.0, 9.0, 9.0]) == "2"  # none is repeated


def test_the_diagnosis_prints_shares_and_differences():
    right, wrong = TABLE["solution"], wrong_chains(TABLE)["misread"]
    found = [chains_of(TABLE, (right, 0.5), (wrong, 0.0), (wrong, -1.0), ("#### 7", -2.0))]
    found += [
        chains_of(make, (make["solution"], 1.0), ("#### 7", 0.0))
        for make in (pictures.make_problem(1, kind=kind, difficulty=2) for kind in ("rows", "bars"))
    ]
    shown = lambda table: "\n".join(markdown(*table))
    table = shown(diagnose.errors_table([found]))
    assert "| table | 25.0% | 0.0% | 50.0% | 0.0% | 0.0% | 0.0% | 0.0% | 0.0% | 25.0% |" in table
    orders = shown(diagnose.orders_table([found] * 2, "dpo", "sum"))
    votes = shown(diagnose.betas_table([found] * 2, "dpo", "sum", (0.01, 30)))
    assert orders.count("| 100.0% | 100.0% | 100.0% | 100.0% | 100.0% | 66.7% | 66.7% |") == 2
    assert votes.count("| +0.0% [+0.0%, +0.0%] | +33.3% [") == 2  # at beta 30 the best response decides


def test_how_early_a_rejected_chain_goes_wrong():
    steps = list(TABLE["steps"])
    said = lambda lines: Response("\n".join([*lines, "#### 99"]), False)
    first, second = said(["Zoe has 99.", *steps[1:]]), said([steps[0], "Zoe has 99.", *steps[2:]])
    right = Response(TABLE["solution"], True)
    problem = Problem(f"{TABLE['id']}/0", "q")
    pairs = [Samples(problem, [right, wrong]) for wrong in (first, second, right, said(steps))]
    widths = 3, 2 + len(steps[0].split(" ")), 2 + len(steps[0].split(" ")) - 1
    head, [row] = diagnose.cut_table(pairs, widths)
    assert head == ("4 pairs, W", *widths)
    assert row == ("wrong within W", "25.0%", "50.0%", "25.0%")  # a break is no blank: two words are one


def test_a_line_break_counts_to_the_step_that_it_ends():
    tokens, ratios = ["Tom", " has", " 3", ".", "\n", "Ana", ".\n", "####"], [1, 1, 1, 1, 10, 100, 200, 5000]
    assert step_sums(tokens, ratios) == [14, 300, 5000]


def test_wrong_chains_are_the_first_that_begin_rightly_and_say_where_the_blame_lies(tmp_path):
    wrong, [first, *rest] = wrong_chains(TABLE), TABLE["steps"]
    late = wrong["look-up"]
    from_the_start = "\n".join(["Zoe has", first, *rest, "#### 99"])
    made = chains_of(
        TABLE, *((text, 0.0) for text in (TABLE["solution"], from_the_start, late, wrong["answer"]))
    )
    lines = lambda text: [line + "\n" for line in text.split("\n")]

    def blamed(place):
        """The chain's lines as its tokens; the lowest ratio is at this line."""
        responses = [
            Response(**{**vars(one), "tokens": lines(one.text)}
                     | {"token_scores": {"dpo": [-float(i == place) for i in range(len(lines(one.text)))]}})
            for one in made.responses
        ]  # fmt: skip
        write_jsonl(tmp_path / "scored", [samples_to_row(Samples(made.problem, responses))])
        ranking.wrong_chains(tmp_path / "chains", tmp_path / "scored", seed=0)
        [(_, chain)] = read_jsonl(tmp_path / "chains")
        return chain

    steps = len(TABLE["steps"])
    chain = blamed(3)
    assert chain["tokens"] == lines(late) and "has 99, so" in late.split("\n")[3] and chain["wrong"] == 3
    assert chain["hit"] == 1.0 and chain["chance"] == 1 / steps
    assert blamed(0)["hit"] == 0.0
    assert blamed(steps)["hit"] == 0.0  # the answer line is no step
