"""URSA's data engines (arXiv 2501.04686): what a teacher writes is read strictly, and the first step that
cannot be rescued is found by binary search.

Algorithm 1, 0-based: mc(n) is the share of rollouts from the first n steps that reach the right answer. low =
0, high = K; while low < high: middle = (low + high) // 2; low = middle + 1 where mc(middle + 1) > 0, else
high = middle. Step `low` is the first that is lost: labels are True before it, False from it on.
"""

import json
import math
import random
from collections import Counter
from dataclasses import replace

import pytest
from PIL import Image

from minicot.answers import number_steps, split_steps, step_spans
from minicot.chat import ChatError, describe_failures
from minicot.data import image_reader, prompt_text
from minicot.errors import InputError
from minicot.records import Problem, Response, Samples, problem_from_row, read_samples, samples_to_row
from minicot.runs import write_jsonl
from minicot.sampling import generate, model_chat
from minicot.synthesis import TASKS, Rates, binary_search, exhaustive_search, locate_errors, misinterpret
from minicot.synthesis import model_rollouts, parse, prefixes, request, synthesise, teach
from minicot.tokenizer import Tokenizer
from minicot.toy import pictures, problems, teacher
from minicot.training import resolve
from minicot.weights import load_model

ANA = Problem("a", "Tom has 3 pens. Ana has 4 more. Together?", answer="10", solution="3+4=7;3+7=10\n#### 10")
GOOD = "Step 1: Ana has 3 + 4 = 7.\nStep 2: Together 3 + 7 = 10.\n†Answer: 10"


def fails(call, reason):
    with pytest.raises(ChatError) as error:
        call()
    assert error.value.reason == reason, error.value


# ---- the form ------------------------------------------------------------------------------------


def test_steps_and_answer_are_read_at_the_start_of_their_lines():
    text = (
        "Step 1: By Step 2: we mean the sum.\nSee step 3, and †Answer: 5 is no answer.\n\n"
        "  **Step 2:** 3 + 4 = 7 €, “naïve”\u00a0π\r\nStep 3 is left out\n † Answer : 7 €.\n"
    )
    steps = [
        "By Step 2: we mean the sum.\nSee step 3, and †Answer: 5 is no answer.",
        "3 + 4 = 7 €, “naïve”\u00a0π\nStep 3 is left out",
    ]
    assert parse(text) == (steps, "7 €")


def test_numbered_steps_are_read_back_as_they_were():
    steps = ["a = 3\nb = 4", "Step two.", "2.5 x 2 = 5 ½", "Then step 7: no."]
    text = number_steps(steps, "5")
    assert parse(text) == (steps, "5")
    assert split_steps(text) == [f"Step {k}: {step}" for k, step in enumerate(steps, 1)]


@pytest.mark.parametrize(
    "reply, reason",
    [
        ("", "no steps"),
        ("†Answer: 10", "no steps"),
        ("<html>\n<body>502 Bad Gateway</body>\n</html>", "words outside the steps"),
        ("I'm sorry, but I can't help with that.", "words outside the steps"),
        ("Sure!\n" + GOOD, "words outside the steps"),
        (GOOD + "\nI hope this helps.", "words outside the steps"),
        ("Step " + "9" * 5000 + ": 3\n†Answer: 10", "words outside the steps"),
        ("Step 1.5 litres\n†Answer: 10", "words outside the steps"),
        ("Step 2: a\nStep 3: b\n†Answer: 10", "steps are not numbered 1, 2, 3, ..."),
        ("Step 1: a\nStep 1: b\n†Answer: 10", "steps are not numbered 1, 2, 3, ..."),
        ("Step 1: a\nStep 2:\n†Answer: 10", "an empty step"),
        ("Step 1: <neg>\n†Answer: 10", "an empty step"),
        ("Step 1: a", "no answer in the last line"),
        ("Step 1: a\n†Answer:", "no answer in the last line"),
        ("Step 1: the †Answer: 10", "no answer in the last line"),
        ("Step 1: a\n†Answer: 10\nStep 2: b", "no answer in the last line"),
        ("Step 1: a\n†Answer: 10\n†Answer: 11", "several answers"),
        ("Step 1: so a = 3\nStep 2: so b = 4\nStep 3: so a = 3\n†Answer: 10", "it goes in circles"),
        ("Step 1: " + "one two three four five " * 40 + "\n†Answer: 10", "it goes in circles"),
    ],
)
def test_another_form_is_refused_by_its_reason(reply, reason):
    fails(lambda: parse(reply), reason)


# ---- expansion, rewriting, unification -----------------------------------------------------------


@pytest.mark.parametrize("task", TASKS)
def test_a_request_shows_the_question_and_what_the_task_works_on_alone(task):
    [message] = request(ANA, task)
    shown, other = (ANA.answer, ANA.solution) if task == "expand" else (ANA.solution, None)
    assert message["role"] == "user" and message["content"].startswith(TASKS[task][0])
    head = f"\n\nQuestion:\n{ANA.question}\n\n{'Answer' if task == 'expand' else 'Solution'}:\n{shown}"
    assert message["content"].endswith(head) and (other is None or other not in message["content"])


def test_a_request_shows_pictures_in_their_place(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "p.png")
    seen = replace(ANA, question="Is <image> blue?", image="p.png", image_root=str(tmp_path))
    [message] = request(seen, "expand")
    kinds = [part["type"] for part in message["content"]]
    assert kinds == ["text", "image_url", "text"]
    assert message["content"][0]["text"].endswith("\n\nQuestion:\nIs")
    assert message["content"][2]["text"] == "blue?\n\nAnswer:\n10"
    with pytest.raises(InputError, match="2 <image> in the text, 1 pictures"):
        request(replace(seen, question="<image> or <image>?"), "expand")
    with pytest.raises(InputError, match="gone.png"):
        request(replace(seen, image="gone.png"), "expand")


def test_a_task_says_what_it_lacks():
    for task, problem, name in [
        ("expand", replace(ANA, answer=None), "answer"),
        ("rewrite", replace(ANA, solution=None), "solution"),
        ("rewrite", replace(ANA, answer=None), "answer"),
    ]:
        with pytest.raises(InputError, match=f"problem 'a' has no {name}, which the task '{task}' needs"):
            request(problem, task)
    with pytest.raises(InputError, match="task is 'expnd'; allowed: expand, rewrite, unify, misinterpret"):
        request(ANA, "expnd")


def test_a_good_reply_becomes_the_problems_solution():
    made = teach(replace(ANA, meta={"source": "x"}), "rewrite", lambda messages: GOOD + "  \n")
    assert made.solution == GOOD and made.steps == ["Ana has 3 + 4 = 7.", "Together 3 + 7 = 10."]
    assert (made.id, made.question, made.answer) == ("a", ANA.question, "10")
    assert made.meta == {"source": "x", "synthesis": "rewrite"}
    assert teach(ANA, "unify", lambda messages: GOOD.replace(": 10", ": 10.00 pens")).answer == "10"


@pytest.mark.parametrize(
    "step",
    [
        "We assume that the answer is 10.",
        "The given answer is 10.",
        "This matches the answer.",
        "Trusting the annotated answer, 10.",
        "The answer that was provided says 10.",
        "But the answer 10 seems to be wrong.",
        "Since we know the answer is 10, 3 + 7 = 10.",
        "We are told that the answer equals 10.",
        "The gold answer is 10.",
        "The correct answer should be 10, as provided.",
        "The answer key says 10.",
        "The reference solution says 10.",
        "I doubt that 10 is right, but 3 + 7 = 10.",
    ],
)
def test_a_step_that_leans_on_the_answer_is_refused(step):
    fails(
        lambda: teach(ANA, "expand", lambda messages: f"Step 1: {step}\n†Answer: 10"),
        "it leans on the answer",
    )


def test_ordinary_steps_lean_on_nothing():
    for steps in (
        ["Assume x > 0, so x = 3.", "Given 3 and 7, the sum is the correct answer."],
        ["There is no doubt: as the answer must be whole, we round.", "The solution has 5 g of it."],
        ["We know 3 + 4 = 7, so the answer is 3 + 7 = 10.", "We take 10 as the answer."],
    ):
        text = number_steps(steps, "10")
        assert teach(ANA, "expand", lambda messages: text).solution == text


def test_the_judge_has_the_last_word_and_sees_no_gold_answer():
    asked = []

    def judge(messages):
        asked.append(messages[-1]["content"])
        return verdict

    for verdict in ("Yes.", "yes"):
        assert teach(ANA, "expand", lambda messages: GOOD, judge).solution == GOOD
    assert asked[0].endswith(f"Question:\n{ANA.question}\n\nSolution:\n{GOOD}")
    for verdict in ("No.", "", "I think yes", "yesterday"):
        fails(lambda: teach(ANA, "expand", lambda messages: GOOD, judge), "the judge does not say yes")


def test_bad_replies_are_counted_and_cost_themselves_alone():
    def chat(messages):
        reply = replies[int(messages[-1]["content"].partition("Number ")[2][:1])]
        if isinstance(reply, Exception):
            raise reply
        return reply

    replies = [
        GOOD,
        ChatError("ReadTimeout", "no byte for 120 s"),
        "<!doctype html><p>502</p>",
        "I cannot help with that.",
        "Step 1: so 3 + 4 = 7\nStep 2: so 3 + 4 = 7\n†Answer: 10",
        GOOD.replace(": 10", ": 11"),
        GOOD.replace(": 10", ": ten or so"),
        GOOD,
    ]
    asked = [replace(ANA, id=str(i), question=f"Number {i}?") for i in range(8)]
    made = list(synthesise(asked, "expand", chat))
    assert [one.id if isinstance(one, Problem) else None for one in made] == ["0", *[None] * 6, "7"]
    assert describe_failures(made) == (
        "6 of 8 requests failed (2 x words outside the steps, 2 x another answer, 1 x ReadTimeout, "
        "1 x it goes in circles); the first: ReadTimeout: no byte for 120 s"
    )
    lacks = list(synthesise([replace(ANA, answer=None), ANA], "expand", lambda messages: GOOD))
    assert "has no answer" in str(lacks[0]) and lacks[1].solution == GOOD


# ---- misinterpretation ---------------------------------------------------------------------------

RIGHT = replace(ANA, solution=GOOD)
WRONG = "Step 1: Ana has 3 + 4 = 7. <pos>\nStep 2: Together 5 + 7 = 12. <neg>\n†Answer: 12"


def test_a_misinterpretation_is_a_wrong_response_with_labels():
    asked = []
    made = misinterpret(RIGHT, lambda messages: asked.append(messages) or WRONG)
    assert made.text == "Step 1: Ana has 3 + 4 = 7.\nStep 2: Together 5 + 7 = 12.\n†Answer: 12"
    assert made.step_labels == [True, False] and made.correct is False and made.answer == "12"
    assert asked == [request(RIGHT, "misinterpret")] and len(split_steps(made.text)) == 2


@pytest.mark.parametrize(
    "old, new, reason",
    [
        (" <pos>", "", "tags are not one a step"),
        (" <pos>", " <pos> <pos>", "tags are not one a step"),
        (" <pos>", " <pos> Then.", "tags are not one a step"),
        (": 12", ": 12 <neg>", "tags are not one a step"),
        ("<neg>", "<pos>", "no <neg>"),
        ("7. <pos>", "7. <neg>\nStep 2: 7 is kept. <pos>", "<pos> behind <neg>"),
        (": 12", ": 10", "the answer is still right"),
        ("Together", "With the altered number", "it gives the change away"),
        ("Together", "Wrongly together", "it gives the change away"),
        ("Together", "I changed the 3 to 5. Together", "it gives the change away"),
        ("Together", "Instead of 3 I read 5. Together", "it gives the change away"),
        (": 12", ": banana", "an answer of another kind"),
    ],
)
def test_a_bad_misinterpretation_is_refused(old, new, reason):
    text = WRONG.replace(old, new)
    text = text.replace("Step 2: Together", "Step 3: Together") if "kept" in new else text
    assert text != WRONG
    fails(lambda: misinterpret(RIGHT, lambda messages: text), reason)


def test_only_a_right_solution_is_misread():
    for solution in (ANA.solution, GOOD.replace(": 10", ": 11")):
        with pytest.raises(InputError, match="problem 'a': its solution does not end in its answer"):
            misinterpret(replace(ANA, solution=solution), lambda messages: pytest.fail("asked"))


# ---- the offline teachers ------------------------------------------------------------------------


def toy(world, n):
    rows = world.rows("train", n)
    return rows, [problem_from_row(row, "toy:1", 1) for row in rows]


@pytest.mark.parametrize("world", [problems, pictures])
@pytest.mark.parametrize("task", ["expand", "rewrite", "unify"])
def test_the_toy_teacher_writes_right_solutions_in_every_module(world, task):
    rows, asked = toy(world, 30)
    made = list(synthesise(asked, task, teacher.chat(task, rows)))
    assert describe_failures(made) == "" and len(made) == 30
    for row, one in zip(rows, made):
        assert pictures.grade(row, one.solution, "dagger") == 1.0
        assert [f"Step {k}: {step}" for k, step in enumerate(one.steps, 1)] == split_steps(one.solution)
    changed = sum(one.steps != row["steps"] for row, one in zip(rows, made))
    assert changed > 9 or (world is pictures and task != "unify")  # pictures have one default wording
    plain = [world.row_of(pictures.scene_of(row), wording="plain")["steps"] for row in rows]
    assert ([one.steps for one in made] == plain) == (task == "unify")
    assert [one.solution for one in synthesise(asked, task, teacher.chat(task, rows))] == [
        one.solution for one in made
    ]


def test_the_filter_refuses_every_changed_answer_of_a_noisy_teacher_and_no_other():
    rows, asked = toy(problems, 200)
    noisy = list(synthesise(asked, "expand", teacher.chat("expand", rows, error_rate=0.5)))
    kept = [(row, one) for row, one in zip(rows, noisy) if isinstance(one, Problem)]
    assert {one.reason for one in noisy if isinstance(one, InputError)} == {"another answer"}
    assert 60 < 200 - len(kept) < 100
    grades = Counter(pictures.grade(row, one.solution, "dagger") == 1.0 for row, one in kept)
    assert grades[True] > 80 and 5 < grades[False] < 35  # a skipped step, which no answer shows
    wrong = replace(asked[0], answer=str(int(asked[0].answer) + 1))  # a wrong annotation
    assert "there is no chain to another" in str(
        next(synthesise([wrong], "expand", teacher.chat("expand", rows)))
    )


@pytest.mark.parametrize("world", [problems, pictures])
def test_the_toy_teachers_misreadings_are_labelled_as_the_oracle_does(world):
    rows, asked = toy(world, 40)
    right = list(synthesise(asked, "rewrite", teacher.chat("rewrite", rows)))
    made = list(synthesise(right, "misinterpret", teacher.chat("misinterpret", rows)))
    firsts = Counter()
    for row, one in zip(rows, made, strict=True):
        oracle = pictures.label_steps(row, split_steps(one.text))
        first = oracle.index(False)
        assert one.step_labels == [j < first for j in range(len(oracle))]
        assert one.correct is False
        assert int(one.answer) != int(row["answer"])
        firsts[first] += 1
    assert len(firsts) > 2, firsts


def test_the_toy_teacher_says_what_it_is_not_asked():
    with pytest.raises(InputError, match="task is 'solve'; allowed: expand, rewrite, unify, misinterpret"):
        teacher.chat("solve", [])
    with pytest.raises(InputError, match="which is none of its 1 rows"):
        teacher.chat("expand", problems.rows("train", 1))(request(ANA, "expand"))


def test_the_toy_teacher_looks_at_the_picture_where_questions_are_the_same():
    rows = pictures.rows("train", 300, difficulty=1)
    asked = [problem_from_row(row, "toy:1", 1) for row in rows]
    times = Counter(row["question"] for row in rows)
    twins = [i for i, row in enumerate(rows) if times[row["question"]] > 1]
    assert len(twins) > 1 and len({rows[i]["answer"] for i in twins}) > 1
    made = list(synthesise([asked[i] for i in twins], "rewrite", teacher.chat("rewrite", rows)))
    assert describe_failures(made) == ""
    other = replace(asked[0], image=asked[1].image)
    with pytest.raises(InputError, match="none of its 300 rows"):
        teacher.chat("expand", rows)(request(other, "expand"))


@pytest.fixture(scope="module")
def base():
    folder = resolve("toy")
    return load_model(folder).eval(), Tokenizer(folder)


def test_a_model_is_a_chat(base):
    model, tokenizer = base
    chat = model_chat(model, tokenizer, max_new_tokens=5, temperature=0)
    messages = [{"role": "user", "content": "Tom has 3 pens."}]
    prompt = tokenizer.encode(tokenizer.chat_prompt(messages))
    ids = generate(model, [prompt], max_new_tokens=5, temperature=0, stop_ids=tokenizer.stop_ids, seed=0)
    assert chat(messages) == tokenizer.decode(ids[0][0]) != ""
    warm = [model_chat(model, tokenizer, max_new_tokens=20, seed=seed) for seed in (1, 1, 2)]
    first, again, other = [chat(messages) for chat in warm]
    assert first == again != other
    made = list(synthesise([ANA, replace(ANA, question="x " * 600)], "expand", chat, limit=1))
    assert made[0].reason in ("words outside the steps", "no steps") and "context of 512" in str(made[1])
    with pytest.raises(InputError, match="holds a picture"):
        chat([{"role": "user", "content": [{"type": "text", "text": "a"}]}])


# ---- binary search against exhaustive search -----------------------------------------------------


def monotone(firsts, log):
    """The first `firsts[i]` steps of solution i can be rescued, and no more."""

    def rescued(asked):
        log.append(asked)
        return [n <= firsts[i] for i, n in asked]

    return rescued


def test_binary_search_equals_exhaustive_search_and_costs_a_logarithm():
    for K in [*range(1, 18), 60]:
        firsts, lengths, log = list(range(K + 1)), [K] * (K + 1), []
        assert binary_search(lengths, monotone(firsts, log)) == firsts
        assert len(log) == math.ceil(math.log2(K + 1))  # all solutions share the rounds
        per_solution = Counter(i for asked in log for i, _ in asked)
        assert max(per_solution.values()) <= len(log)
        log.clear()
        assert exhaustive_search(lengths, monotone(firsts, log)) == firsts
        assert [len(asked) for asked in log] == [K * (K + 1)]


def test_the_search_by_hand():
    """K = 6, steps 0 to 2 right: middle 3 (4 steps: lost), 1 (2 steps: saved), 2 (3 steps: saved) -> 3."""
    log = []
    assert binary_search([6], monotone([3], log)) == [3]
    assert log == [[(0, 4)], [(0, 2)], [(0, 3)]]
    assert binary_search([], monotone([], log)) == [] == exhaustive_search([], lambda asked: [])


def test_a_prefix_that_is_not_known_costs_its_own_solution():
    can = {(0, 1): True, (0, 2): None, (1, 1): True, (1, 2): True, (1, 3): False, (0, 3): True}
    for search in (binary_search, exhaustive_search):
        assert search([3, 3], lambda asked: [can[one] for one in asked]) == [None, 2]


def noisy(before, behind, n, *, above=0, seed=0, size=3000):
    """Agreement on solutions of 2 to 12 steps whose prefixes are rescued by a rollout with probability
    `before` up to the first wrong step and `behind` after it, n rollouts a prefix, the same for both searches
    -> (binary = exhaustive, binary = truth, exhaustive = truth), prefixes a solution (binary, exhaustive)."""
    rng = random.Random(seed)
    lengths = [rng.randint(2, 12) for _ in range(size)]
    truth, drawn, asked_for = [rng.randrange(K) for K in lengths], {}, []

    def rescued(asked):
        asked_for.append(len(asked))
        for i, m in (one for one in asked if one not in drawn):
            rate = before if m <= truth[i] else behind
            drawn[i, m] = sum(rng.random() < rate for _ in range(n)) > above
        return [drawn[one] for one in asked]

    binary = binary_search(lengths, rescued)
    cost = sum(asked_for) / size
    exhaustive = exhaustive_search(lengths, rescued)
    pairs = ((binary, exhaustive), (binary, truth), (exhaustive, truth))
    share = lambda a, b: sum(x == y for x, y in zip(a, b)) / size
    return [share(a, b) for a, b in pairs], (cost, asked_for[-1] / size)


def test_noise_that_misses_a_rescue_hurts_binary_search_less_than_exhaustive_search():
    """Each prefix asked for may be taken for lost: fewer are asked for."""
    (both, binary, exhaustive), cost = noisy(0.5, 0, 16)
    assert both == binary == exhaustive == 1.0  # a miss has a chance of 2^-16
    assert cost == pytest.approx((3.0, 7.0), abs=0.1)
    (both, binary, exhaustive), _ = noisy(0.2, 0, 16)
    assert both > 0.94 and binary > 0.96 and binary > exhaustive + 0.02
    (both, binary, exhaustive), _ = noisy(0.3, 0, 4)
    assert 0.7 < both < 0.8 and binary > exhaustive + 0.15


def test_luck_behind_an_error_hurts_binary_search_more_and_a_threshold_mends_it():
    (both, binary, exhaustive), _ = noisy(0.5, 0.05, 16)
    assert 0.25 < binary < 0.29 and 0.41 < exhaustive < 0.45 and both > 0.7
    (both, binary, exhaustive), _ = noisy(0.5, 0.05, 16, above=2)
    assert 0.90 < binary < 0.93 and 0.93 < exhaustive and both > 0.93


# ---- labels --------------------------------------------------------------------------------------


def test_a_prefix_is_the_response_to_the_letter_up_to_the_next_step():
    text = "  Step 1: add\n  3 + 4 = 7\n\n\nStep 2: double\r\n\r\nStep 3: done \n\n†Answer: 14\n"
    cuts = [one.text for one in prefixes(ANA, text)]
    assert cuts == [
        "  Step 1: add\n  3 + 4 = 7\n\n\n",
        "  Step 1: add\n  3 + 4 = 7\n\n\nStep 2: double\r\n\r\n",
        "  Step 1: add\n  3 + 4 = 7\n\n\nStep 2: double\r\n\r\nStep 3: done \n\n",
    ]
    assert [split_steps(cut) for cut in cuts] == [split_steps(text)[:n] for n in (1, 2, 3)]
    assert [text[a:b] for a, b in step_spans(text)] == [
        "Step 1: add\n  3 + 4 = 7",
        "Step 2: double",
        "Step 3: done",
    ]
    assert prefixes(ANA, "†Answer: 14") == [] == prefixes(ANA, "")
    assert [one.text for one in prefixes(ANA, "7\n7")] == ["7\n", "7\n7"]


def response(n, *, wrong_from=None, correct=False, answer="11"):
    """n steps "s0", "s1", ...; from wrong_from on "w2", "w3", ..."""
    steps = [f"{'s' if wrong_from is None or j < wrong_from else 'w'}{j}" for j in range(n)]
    return Response("\n".join([*steps, f"†Answer: {answer}"]), correct)


def simulated(log, rate=lambda wrong: 0.0 if wrong else 0.5, n=16):
    """Rollouts that reach 10 at a rate that depends on whether a wrong step, "w...", stands in the prefix."""

    def roll_out(asked):
        log.append([one.text for one in asked])
        right = [round(rate("w" in one.text) * n) for one in asked]
        return [["†Answer: 10"] * k + ["†Answer: 11"] * (n - k - 1) + ["and so on " * 9] for k in right]

    return roll_out


def test_labels_are_true_before_the_first_lost_step_and_never_behind_it():
    """Every number of steps to 8 and every place of the first wrong step, at once."""
    places = [(K, first) for K in range(1, 9) for first in range(K)]
    sampled = [Samples(replace(ANA, id=f"{p}"), [response(p[0], wrong_from=p[1])]) for p in places]
    for search in (binary_search, exhaustive_search):
        log = []
        labelled, report = locate_errors(sampled, Rates(simulated(log)), search=search)
        for (K, first), one in zip(places, labelled):
            assert one.responses[0].step_labels == [True] * first + [False] * (K - first)
        assert report.startswith("36 responses: 36 located; rolled out:")
        assert len(log) == (4 if search is binary_search else 1)


def test_a_prefix_is_rolled_out_once_whoever_asks():
    log, rates = [], None
    rates = Rates(simulated(log))
    two = Samples(ANA, [response(4, wrong_from=2), response(4, wrong_from=3)])
    [labelled], report = locate_errors([two], rates)
    assert [one.step_labels for one in labelled.responses] == [
        [True, True, False, False],
        [True] * 3 + [False],
    ]
    asked = [text for texts in log for text in texts]
    # three steps each; then two of the first, four of the second; both begin with "s0\ns1\n"
    assert asked == ["s0\ns1\nw2\n", "s0\ns1\ns2\n", "s0\ns1\n", "s0\ns1\ns2\nw3\n"]
    assert report.endswith("rolled out: 4 prefixes, 64 rollouts, 4 without an answer")
    assert [one.meta["step_rates"] for one in labelled.responses] == [
        [None, 0.5, 0.0, None],
        [None, 0.5, 0.5, 0.0],
    ]
    locate_errors([two], rates, search=exhaustive_search)
    assert [text for texts in log[len(log) - 1 :] for text in texts] == ["s0\n", "s0\ns1\nw2\nw3\n"]
    before = len(log)
    locate_errors([two], rates)
    assert len(log) == before


def test_every_kind_of_response_is_counted_and_none_is_fatal_to_the_rest():
    def roll_out(asked):
        rolled = simulated([])(asked)
        for i, one in enumerate(asked):
            if "long" in one.problem.id:
                rolled[i] = InputError("a prompt of 900 tokens does not fit")
            if "none" in one.problem.id:
                rolled[i] = []
        return rolled

    kinds = {
        "right": response(3, correct=True, answer="10"),
        "located": response(3, wrong_from=1),
        "sixty": response(60, wrong_from=41),
        "answer alone": response(3),
        "no steps": Response("†Answer: 11", False),
        "empty": Response("", False),
        "ungraded": response(3, correct=None),
        "long": response(3, wrong_from=1),
        "none": response(3, wrong_from=1),
    }
    sampled = [Samples(replace(ANA, id=name), [one]) for name, one in kinds.items()]
    sampled.append(Samples(replace(ANA, id="no gold", answer=None), [response(3)]))
    sampled.append(Samples(replace(ANA, id="unread"), error="image 'a.png': no such file"))
    labelled, report = locate_errors(sampled, Rates(roll_out))
    labels = {one.problem.id: one.responses[0].step_labels for one in labelled if one.responses}
    assert labels == {
        "right": [True] * 3,
        "located": [True, False, False],
        "sixty": [True] * 41 + [False] * 19,
        "answer alone": [True] * 3,
        **dict.fromkeys(["no steps", "empty", "ungraded", "long", "none", "no gold"]),
    }
    assert report.startswith(
        "10 responses: 2 located, 2 not graded, 2 not rolled out, 1 right, 2 without steps, "
        "1 wrong in the answer alone; rolled out: "
    )
    assert labelled[-1] == sampled[-1] and [one.problem for one in labelled] == [s.problem for s in sampled]
    assert locate_errors([], Rates(roll_out))[0] == []


def test_a_failed_prefix_of_another_response_leaves_no_trace_in_the_file(tmp_path):
    def roll_out(asked):
        rolled = simulated([])(asked)
        return [InputError("no") if one.text == "s0\n" else texts for one, texts in zip(asked, rolled)]

    both = Samples(ANA, [response(1), response(3, wrong_from=2)])
    [labelled], _ = locate_errors([both], Rates(roll_out))
    assert [one.step_labels for one in labelled.responses] == [None, [True, True, False]]
    assert labelled.responses[1].meta == {"step_rates": [None, 0.5, 0.0]}
    write_jsonl(tmp_path / "l.jsonl", [samples_to_row(labelled)])
    assert read_samples(tmp_path / "l.jsonl") == [labelled]


def test_rates_above_a_threshold_count_as_rescued():
    luck = lambda wrong: 1 / 16 if wrong else 0.5
    one = [Samples(ANA, [response(4, wrong_from=1)])]
    [by_luck], _ = locate_errors(one, Rates(simulated([], luck)))
    [above], _ = locate_errors(one, Rates(simulated([], luck)), above=2 / 16)
    assert by_luck.responses[0].step_labels == [True] * 4
    assert above.responses[0].step_labels == [True, False, False, False]


def test_a_rollout_is_graded_with_its_prefix():
    """A response that was cut within its line goes on there."""
    cut = Response("Ana has 7.\nSo the final", False, finish="length")
    rates = Rates(lambda asked: [[" answer is 10.", "#### 10"] for _ in asked], style="sentence")
    locate_errors([Samples(ANA, [cut])], rates, search=exhaustive_search)
    assert {text: rate for (_, text), rate in rates.known.items()} == {"Ana has 7.\n": 0, cut.text: 0.5}
    assert rates.counts["without an answer"] == 3


def test_labels_are_written_and_read_as_samples(tmp_path):
    sampled = [Samples(ANA, [response(3, wrong_from=1), response(2, correct=True, answer="10")])]
    write_jsonl(tmp_path / "s.jsonl", map(samples_to_row, sampled))  # as before: no labels
    labelled, _ = locate_errors(read_samples(tmp_path / "s.jsonl"), Rates(simulated([])))
    labelled[0].responses.append(misinterpret(RIGHT, lambda messages: WRONG))
    write_jsonl(tmp_path / "l.jsonl", map(samples_to_row, labelled))
    assert read_samples(tmp_path / "l.jsonl") == labelled
    row = json.loads((tmp_path / "l.jsonl").read_text())
    assert [one.get("step_labels") for one in row["responses"]] == [
        [True, False, False],
        [True, True],
        [True, False],
    ]
    assert [one.get("step_rates") for one in row["responses"]] == [[0.5, 0.0, None], None, None]


# ---- a model's rollouts --------------------------------------------------------------------------


def test_rollouts_go_on_from_the_prefix_and_depend_on_nothing_else(base):
    model, tokenizer = base
    rows, asked = toy(problems, 3)
    begun = [one for problem in asked for one in prefixes(problem, problem.solution)]
    assert len(begun) > 6
    options = dict(n=3, max_new_tokens=12, batch_size=6)
    rolled = model_rollouts(model, tokenizer, **options)(begun)
    assert [len(texts) for texts in rolled] == [3] * len(begun)
    assert model_rollouts(model, tokenizer, **options)(begun[4:5]) == rolled[4:5]
    assert model_rollouts(model, tokenizer, **options, seed=1)(begun) != rolled
    greedy = model_rollouts(model, tokenizer, n=1, max_new_tokens=12, temperature=0)(begun[:2])
    for one, [text] in zip(begun, greedy):
        prompt = tokenizer.encode(prompt_text(tokenizer, one.problem, "cot") + one.text)
        ids = generate(model, [prompt], max_new_tokens=12, temperature=0, stop_ids=tokenizer.stop_ids, seed=0)
        assert text == tokenizer.decode(ids[0][0])


def test_a_prefix_without_room_costs_itself_and_rollouts_that_never_end_count_as_wrong(base):
    model, tokenizer = base
    [row], [problem] = toy(problems, 1)
    wrong = [
        Response(f"{step}\n" * k + "#### 1", False) for step, k in (("Tom has 1 + 1 = 3.", 3), ("a b", 400))
    ]
    rates = Rates(model_rollouts(model, tokenizer, n=4, max_new_tokens=2), style="hash")
    [labelled], report = locate_errors([Samples(problem, wrong)], rates)
    assert [one.step_labels for one in labelled.responses] == [[False] * 3, None]
    assert report.startswith(
        "2 responses: 1 located, 1 not rolled out; rolled out: 3 prefixes, 8 rollouts, 8 w"
    )
    [error] = [one for one in rates.known.values() if isinstance(one, InputError)]
    assert "do not fit into the context of 512" in str(error)


def test_rollouts_see_the_picture(tmp_path):
    folder = resolve("toy-vision")
    model, tokenizer = load_model(folder).eval(), Tokenizer(folder)
    reader = image_reader(model, tokenizer, folder)
    _, [one, two] = toy(pictures, 2)
    options = dict(n=1, max_new_tokens=8, temperature=0)
    (tmp_path / "broken.png").write_bytes(b"no picture")
    begun = [
        prefixes(one, one.solution)[0],
        prefixes(replace(one, image="broken.png", image_root=str(tmp_path)), one.solution)[0],
        prefixes(replace(one, id="other", image=two.image), one.solution)[0],
    ]
    own, broken, other = model_rollouts(model, tokenizer, reader=reader, **options)(begun)
    assert isinstance(broken, InputError) and "broken.png" in str(broken)
    prompt = reader.expand(tokenizer.encode(prompt_text(tokenizer, one, "cot") + begun[0].text), one.id, 1)
    for texts, problem in ((own, one), (other, two)):
        pixels = [reader.pixels(problem.images)]
        room = dict(max_new_tokens=8, temperature=0, stop_ids=tokenizer.stop_ids, seed=0)
        ids = generate(model, [prompt], images=pixels, **room)
        assert texts == [tokenizer.decode(ids[0][0])]
    assert own != other
    blind = model_rollouts(model, tokenizer, **options)(begun[:1])
    assert "the model reads text only" in str(blind[0])
