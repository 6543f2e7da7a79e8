"""Rows and batches: what the model reads, what is scored, which groups are made, and what is left out."""

import threading
import time
from dataclasses import replace

import pytest
import torch
from PIL import Image

from minicot import data
from minicot.data import Row
from minicot.images import ImageProcessor, load_image
from minicot.records import Problem, Response, Samples
from minicot.tokenizer import Tokenizer
from minicot.training import resolve


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer(resolve("toy"))


# ---- text ----------------------------------------------------------------------------------------


def test_plain_mode_leaves_the_question_as_it_is():
    problem = Problem("1", "What is the capital of France?", "Paris", solution="so\n#### Paris")
    assert data.render(problem, "plain") == problem.question
    assert data.target(problem, "plain") == problem.solution
    assert data.render(problem, "cot") == problem.question + data.COT_PROMPT
    assert data.grade(problem, "so\n#### Paris", mode="plain", style="hash") == ("Paris", True)


def test_earlier_turns_stand_before_the_question_and_may_hold_the_placeholder(tokenizer):
    history = [{"role": "user", "content": f"{data.IMAGE} See?"}, {"role": "assistant", "content": "Yes."}]
    problem = Problem("1", "How many?", image="p.png", history=history)
    asked = {"role": "user", "content": "How many?" + data.COT_PROMPT}
    assert data.prompt_text(tokenizer, problem, "cot") == tokenizer.chat_prompt([*history, asked])
    assert data.render(replace(problem, history=None), "plain") == f"{data.IMAGE}\nHow many?"


def test_the_grader_by_final_answers_grades_a_list():
    sampled = [
        Samples(Problem("1", "q", "3"), [Response("#### 3", meta={"a": 1}), Response("3")]),
        Samples(Problem("2", "q"), [Response("#### 4", reward=0.5)]),
    ]
    assert data.grade_answers(sampled, mode="cot", style="hash") == [
        Samples(
            sampled[0].problem, [Response("#### 3", True, answer="3", meta={"a": 1}), Response("3", False)]
        ),
        Samples(sampled[1].problem, [Response("#### 4", None, 0.5, answer="4")]),
    ]


def test_grading_is_strict_and_knows_choices():
    problem = Problem("1", "q", "1000")
    assert data.grade(problem, "so\n#### 1,000.0", mode="cot", style="hash") == ("1,000.0", True)
    assert data.grade(problem, "it is 1000", mode="cot", style="hash") == (None, False)
    assert data.grade(problem, " 1000 ", mode="direct", style="hash") == ("1000", True)
    choice = Problem("2", "q", "B", choices=["cat", "dog"])
    assert data.grade(choice, "dog", mode="direct", style="letter") == ("B", True)
    assert data.grade(Problem("3", "q"), "#### 4", mode="cot", style="hash") == ("4", None)


# ---- rows and batches ----------------------------------------------------------------------------


def test_row_is_prompt_then_response_then_eos_and_only_the_response_is_scored(tokenizer):
    problem = Problem("1", "Tom has 3 apples. How many apples does Tom have?", "3")
    row = data.encode_row(tokenizer, problem, "#### 3", mode="cot")
    assert tokenizer.decode(row.ids[: row.n_prompt]) == tokenizer.decode(
        tokenizer.encode(data.prompt_text(tokenizer, problem, "cot"))
    )
    assert tokenizer.decode(row.ids[row.n_prompt :]) == "#### 3" and row.ids[-1] == tokenizer.eos_id
    cut = data.encode_row(tokenizer, problem, "#### 3", mode="cot", finish="length")
    assert cut.ids == row.ids[:-1]


def test_sampled_ids_are_kept_as_they_are_and_foreign_ones_refused(tokenizer):
    problem, ids = Problem("1", "q?"), [tokenizer.encode("3")[0], tokenizer.eos_id]
    row = data.encode_row(tokenizer, problem, "3", mode="cot", ids=ids)
    assert row.ids[row.n_prompt :] == ids
    for bad in ([-1], tokenizer.encode("4")):
        with pytest.raises(ValueError, match="another tokenizer"):
            data.encode_row(tokenizer, problem, "3", mode="cot", ids=bad)


def test_finish_must_agree_with_the_sampled_ids(tokenizer):
    problem, ids = Problem("1", "q?"), tokenizer.encode("3")
    data.encode_row(tokenizer, problem, "3", mode="cot", ids=ids, finish="length")
    for finish, given in (("stop", ids), ("length", [*ids, tokenizer.eos_id])):
        with pytest.raises(ValueError, match="finish is"):
            data.encode_row(tokenizer, problem, "3", mode="cot", ids=given, finish=finish)
    with pytest.raises(ValueError, match="question and text are empty"):
        data.encode_row(tokenizer, Problem("1", ""), "", mode="cot")


def test_an_empty_prompt_never_scores_the_first_token(tokenizer):
    row = data.encode_row(tokenizer, Problem("1", "", solution="3 + 4 = 7"), "3 + 4 = 7", mode="cot")
    assert row.n_prompt == 1
    batch = data.collate([[row]], tokenizer.pad_id)
    assert not batch.loss_mask[0, 0] and batch.loss_mask[0, 1:].all()


def test_overlong_rows_are_refused_or_counted_never_cut():
    rows = [Row("a", [1] * 5, 2), Row("b", [1] * 9, 2)]
    with pytest.raises(
        ValueError, match="1 of 2 rows are longer than 8 tokens, the first is problem 'b' with 9"
    ):
        data.fit(rows, 8, "refuse")
    assert data.fit(rows, 8, "skip") == (rows[:1], 1)
    with pytest.raises(ValueError, match="all 2 rows"):
        data.fit(rows, 3, "skip")


def test_collate_places_rows_in_their_groups_and_masks_prompts_and_pads():
    batch = data.collate(
        [[Row("a", [5, 6, 7], 1, 1.0, True), Row("a", [5, 8], 1, 0.0, False)], [Row("b", [9, 4], 1, 0.5)]], 0
    )
    assert batch.ids.tolist() == [[5, 6, 7], [5, 8, 0], [9, 4, 0]]
    assert batch.loss_mask.int().tolist() == [[0, 1, 1], [0, 1, 0], [0, 1, 0]]
    assert batch.pad_mask.int().tolist() == [[1, 1, 1], [1, 1, 0], [1, 1, 0]]
    assert batch.rewards.tolist() == [[1, 0], [0.5, 0]] and batch.correct.tolist() == [[1, 0], [-1, -1]]
    assert batch.present.tolist() == [[True, True], [True, False]]
    assert data.to_groups(torch.tensor([1.0, 2.0, 3.0]), batch).tolist() == [[1, 2], [3, 0]]


def test_schedule_covers_each_pass_once_is_seeded_and_buckets_lengths():
    lengths = [7 * i % 101 for i in range(1000)]
    batches = data.schedule(lengths, 16, 2000, seed=3)
    flat = [i for batch in batches for i in batch]
    assert sorted(flat) == sorted(list(range(1000)) * 2) and all(len(batch) <= 16 for batch in batches)
    assert batches == data.schedule(lengths, 16, 2000, seed=3) != data.schedule(lengths, 16, 2000, seed=4)
    spread = sum(max(lengths[i] for i in b) - min(lengths[i] for i in b) for b in batches) / len(batches)
    assert spread < 15  # random batches would spread over about 90
    mixed = data.schedule([0] * 1000, 16, 2000, seed=3)  # --no-group-by-length
    assert all({lengths[i] < 50 for i in batch} == {True, False} for batch in mixed if len(batch) == 16)


# ---- pictures ------------------------------------------------------------------------------------


class Reader:
    """A reader that counts what it decodes, and in how many threads at once."""

    def __init__(self):
        self.opened, self.at_work, self.most = [], 0, 0

    def pixels(self, images):
        [(name, root)] = images
        self.opened.append(name)
        self.at_work += 1
        self.most = max(self.most, self.at_work)
        time.sleep(0.05)
        self.at_work -= 1
        processor = ImageProcessor.from_dict({"image_processor_type": "CLIPImageProcessor"})
        return [processor(load_image(name, root))]


def test_problems_whose_pictures_cannot_be_decoded_are_found_before_a_run(tmp_path):
    for name in ("a.png", "b.png", "c.png", "cut.png"):
        Image.new("RGB", (40, 30), "red").save(tmp_path / name)
    (tmp_path / "cut.png").write_bytes((tmp_path / "a.png").read_bytes()[:60])
    root, reader = str(tmp_path), Reader()
    images = ["a.png", "b.png", "a.png", ["a.png", "cut.png", "gone.png"], None, "toy:bars-0-2", "toy:pies-1"]
    problems = [Problem(str(i), "q", image=image, image_root=root) for i, image in enumerate(images)]
    good, unread = data.readable(problems, reader)
    assert [problem.id for problem in good] == ["0", "1", "2", "4", "5"]
    assert [line[:22] for line in unread] == ["3: image 'cut.png': fo", "6: image 'toy:pies-1':"]
    assert sorted(reader.opened) == ["a.png", "b.png", "cut.png", "gone.png", "toy:pies-1"]
    assert 1 < reader.most <= 4
    assert data.readable(problems, None) == (problems, [])
    assert data.readable([], reader) == ([], [])


def test_one_item_is_made_ahead_and_no_more():
    made, asked = [], []

    def make(item):
        made.append(item)
        return item * 10, threading.current_thread()

    def items():
        for item in range(5):
            asked.append(item)
            yield item

    stream = data.ahead(make, items())
    assert not made and not asked  # nothing before it is asked for
    for turn in range(5):
        value, thread = next(stream)
        assert value == turn * 10 and thread is not threading.current_thread()
        deadline = time.time() + 5
        while len(made) < min(turn + 2, 5) and time.time() < deadline:
            time.sleep(0.001)
        time.sleep(0.01)
        assert made == asked == list(range(min(turn + 2, 5)))  # the next is made while this one is used
    assert list(stream) == [] and not thread.is_alive()
    assert list(data.ahead(make, [])) == []


def test_an_exception_comes_at_its_items_turn():
    threads = []

    def make(item):
        threads.append(threading.current_thread())
        return 6 // item

    stream = data.ahead(make, [3, 2, 0, 1])
    assert [next(stream), next(stream)] == [2, 3]
    with pytest.raises(ZeroDivisionError):
        next(stream)
    assert next(stream, "ended") == "ended" and not threads[0].is_alive()


def test_closing_the_stream_ends_its_thread():
    threads = []
    stream = data.ahead(lambda item: threads.append(threading.current_thread()), range(1000))
    next(stream)
    stream.close()
    assert len(threads) <= 2 and not threads[0].is_alive()


# ---- groups --------------------------------------------------------------------------------------


def test_pairs_are_right_against_wrong_within_the_window_and_at_most_three():
    def group(id_, marks):
        return Samples(Problem(id_, "q", "1"), [Response(f"{id_} {i}", bool(m)) for i, m in enumerate(marks)])

    samples = [group("mixed", [1, 0, 1, 0]), group("right", [1, 1, 1, 1]), group("rare", [1] + [0] * 9)]
    found = data.pairs(samples, seed=1)
    assert [s.problem.id for s in found] == ["mixed"] * 3
    assert all(s.responses[0].correct and not s.responses[1].correct for s in found)
    assert len({(s.responses[0].text, s.responses[1].text) for s in found}) == 3
    assert found == data.pairs(samples, seed=1)
    assert {s.problem.id for s in data.pairs(samples, seed=1, window=(0, 1))} == {"mixed", "rare"}
    ungraded = Samples(Problem("u", "q"), [Response("a", True), Response("b"), Response("c", False)])
    assert [[r.text for r in s.responses] for s in data.pairs([ungraded], seed=0)] == [["a", "c"]]


def test_groups_count_duplicates_empties_and_pairless_ones(tokenizer):
    problem = Problem("1", "q?", "3", solution="#### 3")
    samples = [
        Samples(
            problem,
            [
                Response("#### 3", True),
                Response("#### 4", False),
                Response("#### 4", False),
                Response(" ", False),
            ],
        ),
        Samples(Problem("2", "q?", "3", solution="#### 3"), [Response("so #### 3", True)]),
    ]
    groups, counts = data.make_groups(tokenizer, samples, mode="cot", max_length=64, reference=True)
    assert [[row.is_reference for row in group] for group in groups] == [[True, False], [True, False]]
    assert counts == {"duplicates": 2, "empty": 1, "without a pair": 1}
    with pytest.raises(ValueError, match="neither 'reward' nor 'correct'"):
        data.make_groups(
            tokenizer, [Samples(problem, [Response("x")])], mode="cot", max_length=64, reference=False
        )
    with pytest.raises(ValueError, match="has no solution"):
        data.make_groups(
            tokenizer,
            [Samples(Problem("1", "q"), [Response("x", True)])],
            mode="cot",
            max_length=64,
            reference=True,
        )


def test_the_reference_ranks_below_no_response(tokenizer):
    problem = Problem("1", "q?", "3", solution="so 3\n#### 3")
    graded = Samples(problem, [Response("#### 3", True, 5.0), Response("#### 4", False, 2.0)])
    ((reference, *rest),), _ = data.make_groups(
        tokenizer, [graded], mode="cot", max_length=64, reference=True
    )
    assert reference.is_reference and reference.reward == 5.0 and [row.reward for row in rest] == [5.0, 2.0]


def test_a_problem_without_a_response_costs_no_pairs(tokenizer):
    unread = Samples(Problem("u", "q", "3"), [], "its picture can't be read")
    pair = Samples(Problem("1", "q", "3"), [Response("#### 3", True), Response("#### 4", False)])
    assert data.pairs([unread, pair], window=(0, 1), seed=0) == [pair]
    _, counts = data.make_groups(tokenizer, [unread, pair], mode="cot", max_length=64, reference=False)
    assert counts["without a response"] == 1
