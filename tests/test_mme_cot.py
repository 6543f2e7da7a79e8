"""MME-CoT (arXiv 2502.09621): scores equal to the official scripts' on golden data, caches made by judges,
the built-in world's judge, and bad input.

golden/mme_cot was made by running the official scripts (MME-Benchmarks/MME-CoT, 08fa4e9) on invented inputs.
"""

import contextlib
import io
import json
import os
import random
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest

from minicot.chat import ChatError
from minicot.errors import InputError
from minicot.mme_cot import __main__ as mme_cot
from minicot.mme_cot.judge import extract_by_rule, gt_annotation, judge_by_rule, make_cache, official, request
from minicot.mme_cot.judge import schema_of
from minicot.mme_cot.questions import METRICS, STEPS, SUFFIX, build_prompt, read_dataset, read_predictions
from minicot.mme_cot.repair import find_list, read_list
from minicot.mme_cot.scoring import DUMMY, score
from minicot.toy import benchmark, pictures, teacher
from tests import test_chat
from tests.helpers import assert_one_line_error, jsonl
from tests.test_layout import ROOT

completion, serve, no_proxy = test_chat.completion, test_chat.serve, test_chat.no_proxy_and_no_key  # fixtures

GOLDEN = Path(__file__).parent / "golden" / "mme_cot"
golden = lambda name: json.loads((GOLDEN / f"{name}.json").read_text())
CACHE, EXPECTED, UNITS = golden("main_cache")["files"], golden("main_expected")["outputs"], golden("units")
DATASET = GOLDEN / "dataset.json"
QUESTIONS = read_dataset(DATASET, [])


def write(folder, files):
    """{path: object, text or bytes} -> files below the folder."""
    for name, content in files.items():
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        content = content if isinstance(content, (str, bytes)) else json.dumps(content)
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


def command(*argv):
    out, err, code = io.StringIO(), io.StringIO(), 0
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            mme_cot.main([str(word) for word in argv])
    except SystemExit as stop:
        code = stop.code
    return types.SimpleNamespace(returncode=code, stdout=out.getvalue(), stderr=err.getvalue())


def scored(folder, *argv, dataset=DATASET):
    """Score folder/cache into folder/out -> ({path: object} of what was written, the finished command)."""
    done = command("score", folder / "cache", "--dataset", dataset, "--out", folder / "out", *argv)
    out = folder / "out"
    return {str(f.relative_to(out)): json.loads(f.read_text()) for f in out.rglob("*.json")}, done


def in_memory(folder, files, questions=QUESTIONS, **settings):
    """score() of these files -> (result files, notes)."""
    notes = []
    return score(write(folder, files), questions, notes, **settings)[0], notes


def failed(errors):
    return {model: sorted(entry["file"] for entry in entries) for model, entries in errors.items()}


def snapshot(folder):
    return {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def steps_reply(*marks, kind="logical inference"):
    """A judge's reply to precision: one step a mark."""
    return json.dumps([{"step_type": kind, "judgment": mark} for mark in marks])


def file_of(reply, index=1, **columns):
    return {"valid_outputs": reply, "index": index, **columns}


# ---- the official numbers ------------------------------------------------------------------------


def test_golden_cache_gives_the_official_files_on_every_run(tmp_path):
    write(tmp_path / "cache", CACHE)
    before = snapshot(tmp_path / "cache")
    for _ in range(2):
        files, done = scored(tmp_path)
        assert done.returncode == 0, done.stderr
        for name, expected in EXPECTED.items():
            same = failed if name.endswith("_errors.json") else lambda value: value
            assert same(files[name]) == same(expected), name
        assert files.keys() - EXPECTED.keys() == {"per_sample.json", "coverage.json"}
    assert snapshot(tmp_path / "cache") == before, "the cache is only read"


def test_golden_values_that_the_scripts_write_back(tmp_path):
    official = {name: entry["keys_added_to_cache_file"] for name, entry in golden("main_per_sample").items()}
    files, _ = in_memory(tmp_path, CACHE)
    assert files["per_sample.json"] == {name: added for name, added in official.items() if added}


@pytest.mark.parametrize("unit", UNITS["extract_json"], ids=lambda unit: str(unit["text"])[:20])
def test_golden_lists_in_replies(unit):
    for name, own_line in (("precision_recall_reflection", False), ("relevance_rate", True)):
        assert read_list(unit["text"] or "", own_line=own_line) == unit[name].get("loaded")


@pytest.mark.parametrize("unit", UNITS["extract_answer_from_item"], ids=lambda unit: unit["out"])
def test_golden_answers_by_rule(unit):
    prediction = float("nan") if unit["prediction_is_nan"] else unit["prediction"]
    row = {**unit["options"], "answer": unit["answer"], "prediction": prediction}
    assert extract_by_rule(row) == unit["out"]


def test_golden_verdicts_by_rule_and_references():
    for unit in UNITS["judge_shortcut"]:
        assert judge_by_rule(unit["extract"], unit["answer"]) == unit["pre_answer"]
    for unit in UNITS["gt_annotation"]:
        assert gt_annotation(unit, "recall") == unit["recall"]["gt_annotation"]
        assert gt_annotation(unit, "precision") == unit["others"]["gt_annotation"]


def test_precision_worked_by_hand(tmp_path):
    """2 Match, 1 Reasonable, 1 Wrong: 3/4, ratio 2/3. The type that is absent counts 0, not nothing."""
    files, _ = in_memory(
        tmp_path, {"precision/m/1.json": file_of(steps_reply("Match", "Match", "Reasonable", "Wrong"))}
    )
    table = files["precision/precision_results.json"]["m"]
    assert table["overall_metrics"] == {"average_precision": 0.75, "average_ratio": 0.6667}
    assert table["type_metrics"]["image description"] == {"average_precision": 0, "average_ratio": None}
    assert table["category"] == {"Math": 0.75} and table["subcategory"] == {"Plane Geometry": 0.75}


def test_relevance_is_rescaled_overall_and_by_type_but_not_by_category(tmp_path):
    reply = json.dumps(
        [{"step_type": "logical inference", "relevant": mark} for mark in ("Yes", "No")], indent=1
    )
    files, _ = in_memory(tmp_path, {"relevance_rate/m/1.json": file_of(reply)})
    table = files["relevance_rate/relevance_rate_results.json"]["m"]
    assert table["overall_metrics"]["average_relevance_rate"] == -1.5  # (0.5 - 0.8) * 5
    assert table["type_metrics"] == {"logical inference": {"average_relevance_rate": -1.5}}
    assert table["category"] == {"Math": 0.5}
    efficiency = files["efficiency/efficiency_results.json"]["m"]
    assert efficiency["overall_metrics"]["efficiency"] == -0.25
    assert efficiency["category"]["Math"]["efficiency"] == 0.75


def test_labels_are_exact_and_the_last_digit_is_rounded_from_the_mean(tmp_path):
    files = {f"precision/m/{i}.json": file_of(steps_reply("Match", "match", "Wrong"), i) for i in (1, 2)}
    files["precision/m/3.json"] = file_of(steps_reply("Match", "Match", "Wrong"), 3)
    made, _ = in_memory(tmp_path, files)
    assert made["precision/precision_results.json"]["m"]["overall_metrics"]["average_precision"] == 0.4444


@pytest.mark.parametrize(
    "said, value",
    [("1", 1), (" 1\n", 1), (1, 1), (True, 1), (1.0, 1), ("0", 0), ("1.", 0), ("", 0), (None, 0), ("2", 0)],
)
def test_a_verdict_is_what_int_takes_for_one(tmp_path, said, value):
    row = {"index": "13", "question_type": "Perception", "valid_outputs": said}
    files, notes = in_memory(
        tmp_path, {"judge/m_cot/13.json": row, "judge/m_dir/13.json": {**row, "valid_outputs": "0"}}
    )
    assert files["robustness/robustness.json"]["m"]["stability"] == {
        "overall": value,
        "category": {"OCR": value},
        "subcategory": {"Diagram": value},
    }
    assert any("neither 1 nor 0" in kind for kind, _ in notes) == (said in ("1.", "", None, "2"))


# ---- properties ----------------------------------------------------------------------------------


def test_permuting_files_changes_nothing(tmp_path):
    rng, first = random.Random(0), in_memory(tmp_path / "0", CACHE)[0]
    for turn in range(3):
        files, names = {}, {}
        for name in CACHE:
            names.setdefault(name.rpartition("/")[0], []).append(name)
        for folder in names.values():
            shuffled = rng.sample(folder, len(folder))
            files |= {new: CACHE[old] for new, old in zip(folder, shuffled)}
        made = in_memory(tmp_path / str(turn + 1), files)[0]
        for name in EXPECTED.keys() - {name for name in EXPECTED if name.endswith("_errors.json")}:
            assert made[name] == first[name], name


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("reply", ["I cannot help with that.", '[{"step_type": "log', "", None, 7, {"a": 1}])
def test_an_added_unparsable_reply_changes_coverage_and_not_the_mean(tmp_path, metric, reply):
    before = in_memory(tmp_path, CACHE)[0]
    added = {
        f"{metric}/toyA/77.json": file_of(reply, 4, key_annotation_steps=QUESTIONS[4]["key_annotation_steps"])
    }
    after = in_memory(tmp_path, added)[0]
    name = f"{metric}/{metric}_results.json"
    assert after[name] == before[name]
    was, now = (files["coverage.json"][metric]["toyA"] for files in (before, after))
    assert now == {**was, "files": was["files"] + 1}
    assert "77.json" in failed(after[f"{metric}/{metric}_errors.json"])["toyA"]


def test_1130_questions_are_scored_in_two_seconds(tmp_path):
    """Processor time, since the machine may be shared; and the least of three tries."""
    questions = {
        i: {**QUESTIONS[1], "index": i, "question_type": "Reasoning" if i <= 837 else "Perception"}
        for i in range(1, 1131)
    }
    typed = [
        {"step_type": "logical inference", "premise": "p" * 80, "conclusion": "c" * 120} for _ in range(12)
    ]
    replies = {
        "precision": [{**step, "judgment": "Match"} for step in typed],
        "recall": [{"step_index": i, "judgment": "Matched"} for i in range(3)],
        "relevance_rate": [{**step, "relevant": "Yes"} for step in typed],
        "reflection_quality": [{"conclusion": "c" * 120, "judgment": "Correct", "error_type": "N/A"}] * 3,
    }
    answer = {"prediction": "so it goes on and on " * 60}
    for index, row in questions.items():
        for metric, reply in replies.items() if index <= 837 else ():
            write(
                tmp_path,
                {f"{metric}/m/{index}.json": row | answer | {"valid_outputs": json.dumps(reply, indent=2)}},
            )
        for prompt in ("cot", "dir"):
            write(tmp_path, {f"judge/m_{prompt}/{index}.json": row | answer | {"valid_outputs": "1"}})
    times = []
    for _ in range(3):
        began = time.process_time()
        files, _, _ = score(tmp_path, questions, [])
        times.append(time.process_time() - began)
    assert files["quality/quality_results.json"]["m"]["overall_metrics"]["f1"] == 1
    assert files["coverage.json"]["precision"]["m"] == {"valid": 837, "files": 837, "questions": 837}
    assert min(times) < 2, times


# ---- replies that are no JSON --------------------------------------------------------------------

STEP = {"step_type": "logical inference", "conclusion": 'it says "7", so x = 1', "judgment": "Match"}
WHOLE = json.dumps([STEP, {**STEP, "judgment": "Wrong"}], indent=2)
BROKEN = {
    "comma too many": WHOLE.replace("}", ",}").replace("\n]", ",\n]"),
    "no comma": WHOLE.replace("},", "}"),
    "no comma between fields": WHOLE.replace('",\n', '"\n'),
    "single quotes": WHOLE.replace('\\"', "").replace('"', "'"),
    "quotes within": WHOLE.replace('\\"', '"'),
    "names without quotes": WHOLE.replace('"judgment"', "judgment"),
    "values without quotes": WHOLE.replace('"Match"', "Match").replace('"Wrong"', "Wrong"),
    "line breaks in a text": WHOLE.replace("so x", "so\n\tx"),
    "latex": WHOLE.replace("x = 1", r"\frac{1}{2} \( \alpha \) \\ \u00e9"),
    "no closing quote": WHOLE.replace('x = 1",', "x = 1,"),
    "no opening quote": WHOLE.replace('"it says \\"7\\"', "it says"),
    "backslash at the end of a text": WHOLE.replace("x = 1", "x = 1\\"),
    "no colon": WHOLE.replace('"judgment":', '"judgment"'),
    "no closing brace": WHOLE.replace("},", ",", 1),
    "comment": WHOLE.replace("},", "}, // the next", 1),
    "ellipsis": WHOLE.replace("\n]", ",\n...\n]"),
    "words around": f"Here you see:\n```json\n{WHOLE}\n```\nDone [1].",
    "curly quotes": WHOLE.replace('"Match"', "“Match”"),
}


@pytest.mark.parametrize("reply", BROKEN.values(), ids=BROKEN)
def test_broken_json_is_mended(reply):
    found = [(step["step_type"], step["judgment"]) for step in read_list(reply)]
    assert found == [("logical inference", "Match"), ("logical inference", "Wrong")]


def test_brackets_are_counted_within_strings_too():
    """A8 item 5: `]` in a text ends the list there, `[` leaves it open; balanced ones do no harm."""
    ended = read_list(WHOLE.replace("x = 1", "x in (0, 1]"))
    assert [(step["conclusion"], "judgment" in step) for step in ended] == [
        ('it says "7", so x in (0, 1', False)
    ]
    assert read_list(WHOLE.replace("x = 1", "x in [0, 1)")) is None
    assert len(read_list(WHOLE.replace("x = 1", "x in [0, 1]"))) == 2


def test_a_list_may_have_to_close_on_a_line_of_its_own():
    assert find_list("[1\n]", own_line=True) == "[1\n]"
    assert find_list("[1]", own_line=True) is None and find_list("[1]") == "[1]"


def test_words_names_and_ends_are_read_as_meant():
    assert read_list("[True, None, 2.5, x y]") == [True, None, 2.5, "x y"]
    assert read_list("[{]") == [{}] and read_list("[,]") == [] and read_list("[{'a':}]") == [{"a": ""}]
    assert read_list('[{"a": NaN}]')[0]["a"] != 1 and read_list("[[{}]]") == [[{}]]


@pytest.mark.parametrize(
    "text", ["[" * 10**6, "[" * 10**6 + "]" * 10**6, "[" * 900 + "]" * 900, "[" + "'\\'" * 20_000]
)
def test_deep_and_long_rubbish_ends_soon(text):
    began = time.process_time()
    with contextlib.suppress(ValueError, RecursionError):
        read_list(text)
    assert time.process_time() - began < 5


# ---- bad input -----------------------------------------------------------------------------------

STEPS_OF_1 = QUESTIONS[1]["key_annotation_steps"]
BAD_FILES = {  # file of the cache -> None where it is an error, else its score for precision
    "not json": (b"{", None),
    "empty": (b"", None),
    "a list": (b"[]", None),
    "a number": (b"3", None),
    "utf-16": ('{"valid_outputs": "[]"}'.encode("utf-16"), None),
    "latin-1": ('{"valid_outputs": "é"}'.encode("latin-1"), None),
    "byte order mark": (b"\xef\xbb\xbf" + json.dumps(file_of(steps_reply("Match"))).encode(), None),
    "deep": (b"[" * 100_000, None),
    "deep reply": (file_of("[" * 100_000 + "]" * 100_000), None),
    "a list of texts": (file_of('["a"]'), None),
    "index of a list": (file_of(steps_reply("Match"), [1]), None),
    "no columns": ({}, None),
    "long integer": (b'{"index": ' + b"9" * 5000 + b"}", None),
    "half a character": (
        b'{"index": 1, "valid_outputs": ' + json.dumps(steps_reply("Match")).encode() + b', "q": "\\ud800"}',
        1,
    ),
    "nan": (
        b'{"index": NaN, "A": NaN, "valid_outputs": ' + json.dumps(steps_reply("Match")).encode() + b"}",
        1,
    ),
    "nan in the reply": (
        file_of('[{"step_type": NaN}, {"step_type": "logical inference", "judgment": "Match"}]'),
        1,
    ),
    "no index": ({"valid_outputs": steps_reply("Match")}, 1),
}


@pytest.mark.parametrize("content, value", BAD_FILES.values(), ids=BAD_FILES)
def test_a_bad_file_costs_itself_alone(tmp_path, content, value):
    good = file_of(steps_reply("Match"), 1)
    files, _ = in_memory(tmp_path, {"precision/m/1.json": good, "precision/m/2.json": content})
    assert files["precision/precision_results.json"]["m"]["overall_metrics"]["average_precision"] == 1
    errors = failed(files.get("precision/precision_errors.json", {}))
    assert errors == ({"m": ["2.json"]} if value is None else {})
    assert files["coverage.json"]["precision"]["m"]["valid"] == 1 + (value is not None)


def test_half_a_character_fails_the_scripts_that_write_back(tmp_path):
    """They cannot write the file, so officially it is an error there, and none for precision."""
    reply = json.dumps([{"judgment": "Correct"}])
    files, _ = in_memory(
        tmp_path,
        {
            "reflection_quality/m/1.json": file_of(reply, q="\ud800"),
            "reflection_quality/m/2.json": file_of(reply, 2, q="\U0001f600"),
        },
    )
    assert failed(files["reflection_quality/reflection_quality_errors.json"]) == {"m": ["1.json"]}


def test_key_steps_that_are_none_are_errors_of_recall(tmp_path):
    reply = json.dumps([{"judgment": "Matched"}] * 3)
    given = [
        None,
        "{}",
        {},
        [],
        {"solution1": "a"},
        {"solution1": {"logical_conclusion": None}},
        {"solution1": {"logical_conclusion": [3]}},
        {"solution5": STEPS_OF_1["solution1"]},
    ]
    files = {
        f"recall/m/{i}.json": file_of(reply, i, key_annotation_steps=keys) for i, keys in enumerate(given, 2)
    }
    files["recall/m/1.json"] = file_of(reply, key_annotation_steps=STEPS_OF_1)
    made, _ = in_memory(tmp_path, files)
    assert made["recall/recall_results.json"]["m"]["overall_metrics"]["average_recall"] == 1
    assert len(failed(made["recall/recall_errors.json"])["m"]) == len(given)


def test_a_50_megabyte_reply_is_read(tmp_path):
    long = json.dumps([{**STEP, "conclusion": "x" * 50_000_000}])
    files, _ = in_memory(
        tmp_path,
        {"precision/m/1.json": file_of(long), "precision/m/2.json": file_of("[" + "x" * 50_000_000, 2)},
    )
    assert files["coverage.json"]["precision"]["m"] == {"valid": 1, "files": 2, "questions": 12}


def test_names_that_are_no_index_duplicates_and_strays_are_named(tmp_path):
    good, bad = file_of(steps_reply("Match")), file_of(steps_reply("Wrong"))
    files = {f"precision/m/{name}": good for name in ("1.json", "01.json", "abc.json")}
    files |= {
        "precision/m/notes.txt": "hello",
        "precision/.DS_Store": "x",
        "reflection_quality/readme": "x",
        "judge/stray": "x",
    }
    files["precision/m/2.json"] = {**bad, "index": 2}
    made, notes = in_memory(tmp_path, files)
    kinds = {kind for kind, _ in notes}
    assert {"file name that is no index", "index twice", "not a .json file, not read", "stray file"} <= kinds
    assert (
        made["precision/precision_results.json"]["m"]["overall_metrics"]["average_precision"] == 0.75
    )  # of 4
    assert made["reflection_quality/reflection_quality_results.json"] == {"readme": DUMMY}
    fixed, _ = in_memory(tmp_path, {}, {i: QUESTIONS[i] for i in (1, 2)}, fixed=True)
    assert (
        fixed["precision/precision_results.json"]["m"]["overall_metrics"]["average_precision"] == 0.5
    )  # of 2


def test_what_crashes_the_official_scripts_is_named_and_the_rest_scored(tmp_path):
    files = {
        name: content
        for name, content in CACHE.items()
        if "recall/toy_B" not in name and "reflection" not in name
    }
    verdict = {"index": 1, "question_type": "Reasoning", "valid_outputs": "1"}
    files |= {
        "precision/empty/1.json": file_of("no"),
        "recall/empty/1.json": file_of("no"),
        "relevance_rate/empty/1.json": file_of("no"),
        "judge/onlycot_cot/1.json": verdict,
        "judge/noprompt/1.json": verdict,
        "judge/m_cot/1.json": verdict,
        "judge/m_dir/2.json": {**verdict, "index": 2},
        "judge/m_dir/3.json": {**verdict, "index": 777},
        "judge/m_dir/4.json": {**verdict, "question_type": "cot"},
        "judge/m_dir/5.json": {"index": 5, "question_type": "Reasoning"},
        "judge/m_dir/x.txt": "{",
        "judge/m_dir/y.txt": {**verdict, "index": 3},
    }
    made, notes = in_memory(tmp_path, files)
    told = " | ".join(f"{kind}: {where}" for kind, where in notes)
    assert made["quality/quality_results.json"].keys() == {"toyA"}
    for name in ("toy_B-7b", "empty"):
        assert f"no quality: no recall, or no precision file that reads: {name}" in told
    assert "folder missing" in told and "reflection_quality" in told
    assert made["efficiency/efficiency_results.json"]["toyA"]["overall_metrics"]["reflection_quality"] == 1
    assert made["relevance_rate/relevance_rate_results.json"]["empty"]["overall_metrics"] == {
        "average_relevance_rate": None
    }
    assert made["robustness/robustness.json"].keys() == {"toyA", "toy_B-7b", "m"}
    assert made["robustness/robustness.json"]["toyA"] == EXPECTED["robustness/robustness.json"]["toyA"]
    assert "one prompt alone: onlycot: cot" in told and "judge/noprompt" in told
    assert "not in dir, so no difference: m: Reasoning Plane Geometry" in told
    assert failed(made["robustness/robustness_errors.json"]) == {
        "m_dir": ["3.json", "4.json", "5.json", "x.txt"]
    }
    assert made["robustness/robustness_extrainfo.json"]["m"]["dir"]["Reasoning"]["overall"] == 1  # of 2 and 3


def test_reflections_that_are_no_objects_have_no_score(tmp_path):
    replies = {1: '["Wait"]', 2: json.dumps([{"judgment": "Correct"}])}
    files, _ = in_memory(
        tmp_path, {f"reflection_quality/m/{i}.json": file_of(reply, i) for i, reply in replies.items()}
    )
    table = files["reflection_quality/reflection_quality_results.json"]["m"]
    assert table["overall_metrics"] == {"average_reflection_quality": 1, "average_repetition_ratio": None}
    assert table["subcategory"] == {"Algebra": 1}
    assert files["per_sample.json"]["reflection_quality/m/1.json"]["reflection_quality"]["score"] is None


def test_results_of_an_earlier_run_are_not_left_behind(tmp_path):
    write(tmp_path / "cache", CACHE)
    assert "recall/recall_errors.json" in scored(tmp_path)[0]
    for file in (tmp_path / "cache" / "recall").rglob("*.json"):
        file.unlink()
    (tmp_path / "cache" / "recall" / "toyA").rmdir()
    (tmp_path / "cache" / "recall" / "toy_B-7b").rmdir()
    files, done = scored(tmp_path)
    assert done.returncode == 0 and files["recall/recall_results.json"] == {}
    assert files["quality/quality_results.json"] == {} and "recall/recall_errors.json" not in files


def test_exit_code_2_where_nothing_could_be_scored(tmp_path):
    write(tmp_path / "cache", {"precision/m/1.json": file_of("no")})
    files, done = scored(tmp_path)
    assert_one_line_error(done, "no reply could be scored")
    assert files["coverage.json"]["precision"]["m"] == {"valid": 0, "files": 1, "questions": 12}
    (tmp_path / "else").mkdir()
    assert_one_line_error(
        command("score", tmp_path / "else", "--dataset", DATASET, "--out", tmp_path / "o"), "nothing to score"
    )
    assert_one_line_error(
        command("score", tmp_path / "cache", "--dataset", tmp_path / "none", "--out", tmp_path / "o"),
        "No such file",
    )
    assert_one_line_error(
        command("score", tmp_path / "cache", "--dataset", DATASET, "--out", tmp_path / "cache"), "only read"
    )
    assert_one_line_error(command("score", "--dataset", DATASET, "--out", tmp_path), "FOLDER")
    assert_one_line_error(command("sort"), "'sort'", "score, judge")


def test_the_package_is_a_command(tmp_path):
    run = lambda *argv: subprocess.run(
        [sys.executable, "-m", "minicot.mme_cot", *argv], cwd=ROOT, capture_output=True, text=True
    )
    assert run("score", "--help").stdout.startswith("usage: python -m minicot.mme_cot [--flag value ...]")
    assert_one_line_error(run("score", str(tmp_path), "--dataset", str(DATASET), "--out", "o"), "to score")


def test_names_that_no_terminal_takes_are_printed_all_the_same(tmp_path):
    os.makedirs(os.fsencode(tmp_path) + b"/cache/precision/m\xff")
    write(tmp_path / "cache", {"precision/m\udcff/1.json": file_of(steps_reply("Match"))})
    files, done = scored(tmp_path)
    assert done.returncode == 0 and "m\\udcff" in done.stdout


def test_a_dataset_may_be_lines_and_its_bad_rows_are_named(tmp_path):
    rows = golden("dataset")
    notes = []
    lines = [
        *map(json.dumps, rows),
        "{",
        '{"index": "3"}',
        "[]",
        json.dumps({**rows[0], "category": 3}),
        json.dumps({**rows[0], "question_type": "cot"}),
    ]
    found = read_dataset(jsonl(tmp_path / "d.json", *lines), notes)
    assert found.keys() == QUESTIONS.keys() and found[1]["question_type"] == "cot"
    kinds = [kind for kind, _ in notes]
    assert (
        kinds.count("dataset row left out") == 4
        and "index twice in the dataset" in kinds
        and "unknown question_type" in kinds
    )
    with pytest.raises(InputError, match="no questions"):
        read_dataset(jsonl(tmp_path / "e.json", "nothing"), [])


# ---- --fixed -------------------------------------------------------------------------------------


def test_fixed_counts_missing_replies_as_0_and_pairs_by_index(tmp_path):
    questions = [QUESTIONS[i] for i in (1, 2, 13, 15)]
    write(tmp_path, {"d.json": questions})
    ok = lambda index, said: {
        "index": index,
        "question_type": QUESTIONS[index]["question_type"],
        "valid_outputs": said,
    }
    write(
        tmp_path / "cache",
        {
            "precision/m/1.json": file_of(steps_reply("Match")),
            "recall/m/1.json": file_of(
                json.dumps([{"judgment": "Matched"}] * 3), "1", key_annotation_steps=STEPS_OF_1
            ),
            "reflection_quality/m/1.json": file_of("[]"),
            "reflection_quality/m/2.json": file_of(json.dumps([{"judgment": "Correct"}]), 2),
            "judge/m_cot/13.json": ok(13, "1"),
            "judge/m_dir/15.json": ok(15, "1"),
            "judge/m_cot/1.json": ok(1, "1"),
            "judge/m_dir/1.json": ok(1, "0"),
        },
    )
    plain, _ = scored(tmp_path, dataset=tmp_path / "d.json")
    fixed, done = scored(tmp_path, "--fixed", dataset=tmp_path / "d.json")
    mean = lambda files, metric: files[f"{metric}/{metric}_results.json"]["m"]["overall_metrics"][
        f"average_{metric}"
    ]
    assert (mean(plain, "precision"), mean(fixed, "precision")) == (1, 0.5)
    assert (mean(plain, "recall"), mean(fixed, "recall")) == (1, 0.5)
    assert fixed["recall/recall_results.json"]["m"]["category"] == {"Math": 0.5}
    assert mean(fixed, "reflection_quality") == 1  # no reflections in 1: a usable reply, still skipped
    assert plain["robustness/robustness.json"]["m"]["stability"]["overall"] == 0
    assert fixed["robustness/robustness.json"]["m"]["stability"]["category"] == {
        "OCR": 1,
        "Spatial-Temporal": -1,
    }
    assert fixed["robustness/robustness.json"]["m"]["efficacy"]["overall"] == 0.5
    assert "m efficacy: 100.0 -> 50.0" in done.stdout and "precision: m 1 questions count 0" in done.stdout
    assert (
        fixed["coverage.json"] == plain["coverage.json"]
        and fixed["per_sample.json"] == plain["per_sample.json"]
    )


# ---- making a cache ------------------------------------------------------------------------------


def predictions(*indices, text="word " * 11 + "Answer: 7"):
    return {i: {**QUESTIONS[i], "prediction": text} for i in indices}


def test_a_cache_has_the_official_layout_and_is_gone_on_with(tmp_path):
    asked = []

    def chat_of(step):
        def chat(messages):
            asked.append(step)
            given = json.loads(messages[1]["content"].partition("\n\n")[2])
            if given["index"] == 2 and len(asked) < 20:
                raise ChatError("HTTP 500")
            return {"extract": "seven", "judge": "1"}.get(step, '{"steps": [{"judgment": "Correct"}]}')

        return chat

    rows = predictions(1, 2, 13, text="word " * 12)
    run = lambda prompt, notes: list(make_cache(rows, tmp_path, prompt, "a_b", chat_of, limit=1, notes=notes))
    notes = []
    first = run("cot", notes)
    assert first == [
        *((metric, 0, 1, "1 of 2 requests failed (1 x HTTP 500); the first: HTTP 500") for metric in METRICS),
        ("extract", 0, 2, "1 of 3 requests failed (1 x HTTP 500); the first: HTTP 500"),
        ("judge", 0, 2, ""),
    ]
    assert notes == [("no extracted answer", "index 2")]
    asked += ["more"] * 20
    assert [row[1:3] for row in run("cot", [])] == [(1, 1)] * 4 + [(2, 1)] * 2
    assert {row[0] for row in run("dir", [])} == {"extract", "judge"}
    n = len(asked)
    assert [row[1:3] for row in run("cot", [])] == [(2, 0)] * 4 + [(3, 0)] * 2 and len(asked) == n
    names = {str(file.relative_to(tmp_path)) for file in tmp_path.rglob("*") if file.is_file()}
    assert names == {f"{metric}/a_b/{i}.json" for metric in METRICS for i in (1, 2)} | {
        f"{step}/a_b_{prompt}/{i}.json"
        for step in ("extract", "judge")
        for prompt in ("cot", "dir")
        for i in (1, 2, 13)
    }
    file = json.loads((tmp_path / "judge/a_b_cot/13.json").read_text())
    assert (
        file.items()
        >= {
            "valid_outputs": "1",
            "index": 13,
            "task": "judge",
            "extract_answer": "seven",
            "pre_answer": None,
            "question_type": "Perception",
        }.items()
    )
    file = json.loads((tmp_path / "relevance_rate/a_b/1.json").read_text())
    assert file["valid_outputs"] == '[\n  {\n    "judgment": "Correct"\n  }\n]' and "task" not in file
    assert file["key_annotation_steps"] == STEPS_OF_1 and file["pre_answer"] is None


def test_files_of_a_cache_that_were_cut_are_made_again_and_strays_left_alone(tmp_path):
    write(
        tmp_path,
        {"precision/m/1.json": "{", "precision/m/readme.txt": "x", "precision/m/2.json": file_of("[]", 2)},
    )
    notes, rows = [], predictions(1, 2)
    made = list(
        make_cache(
            rows, tmp_path, "cot", "m", lambda step: lambda messages: "[]", steps=["precision"], notes=notes
        )
    )
    assert made == [("precision", 1, 1, "")] and len(notes) == 2
    assert json.loads((tmp_path / "precision/m/1.json").read_text())["index"] == 1
    for name in ("", "a/b", "..", ".hidden"):
        with pytest.raises(InputError, match="model's name"):
            list(make_cache(rows, tmp_path, "cot", name, None, notes=[]))


def test_answers_by_rule_ask_nobody(tmp_path):
    rows = predictions(1, 13, 14)
    rows[14]["prediction"] = "7"
    list(make_cache(rows, tmp_path, "dir", "m", lambda step: None, notes=[]))
    verdicts = {i: json.loads((tmp_path / f"judge/m_dir/{i}.json").read_text()) for i in rows}
    assert {i: file["valid_outputs"] for i, file in verdicts.items()} == {1: "0", 13: "0", 14: "1"}
    assert {file["pre_answer"] for file in verdicts.values()} == {"0", "1"}


def test_requests_show_what_their_step_is_given():
    row = {**QUESTIONS[2], "prediction": "P", "extract_answer": "X"}
    fields = {}
    for step in STEPS:
        system, user = request(step, row)
        assert system == {
            "role": "system",
            "content": "You are an AI assistant that helps people solve their questions.",
        }
        fields[step] = json.loads(user["content"].partition("\n\n")[2])
        assert fields[step]["question"] == "Solve the drawn equation.\nA. 1\nB. 2\nC. 3"
    keys = {step: given.keys() - {"index", "question"} for step, given in fields.items()}
    assert keys == {
        "precision": {"answer", "solution", "gt_annotation"},
        "recall": {"answer", "solution", "gt_annotation"},
        "relevance_rate": {"solution"},
        "reflection_quality": {"answer", "solution", "gt_annotation"},
        "extract": {"solution"},
        "judge": {"answer", "extract_answer"},
    }


def test_prompts_of_the_model_under_test():
    assert (
        build_prompt(QUESTIONS[2], "dir") == f"Solve the drawn equation.\nA. 1\nB. 2\nC. 3\n{SUFFIX['dir']}"
    )
    assert build_prompt(QUESTIONS[1], "cot") == f"{QUESTIONS[1]['question']}\n{SUFFIX['cot']}"


def test_schemas_have_the_official_labels_and_replies_their_form():
    for step in METRICS:
        item = schema_of(step)["properties"]["steps"]["items"]
        assert item["additionalProperties"] is False and set(item["required"]) == set(item["properties"])
    assert schema_of("precision")["properties"]["steps"]["items"]["properties"]["judgment"]["enum"] == [
        "Match",
        "Reasonable",
        "Wrong",
        "N/A",
    ]
    assert schema_of("extract") is None and schema_of("judge") is None
    assert official('{"steps": [{"a": 1}]}') == official('[{"a": 1}]') == '[\n  {\n    "a": 1\n  }\n]'
    for text in ("No steps.", '{"a": 1}', "[" * 100_000):
        assert official(text) == text


def test_predictions_are_official_rows_or_samples_and_bad_ones_are_named(tmp_path):
    sample = {
        "id": "2",
        "question": "Solve the drawn  <image> equation.",
        "responses": [{"text": "first"}, {"text": "second"}],
    }
    lines = [
        {
            "index": 1,
            "prediction": "P",
            "question": "A square has side 3. Area?",
            "extra": 5,
            "question_type": "cot",
            "A": float("nan"),
        },
        sample,
        {"index": 3.5, "prediction": "x"},
        {"index": "abc", "prediction": "x"},
        {"prediction": "x"},
        {"index": 4},
        {"index": 1, "prediction": "again"},
        {"index": 500, "prediction": "x"},
        {"index": 5, "prediction": "x", "question": "Quite another question?"},
        {**sample, "id": "6", "responses": []},
        {**sample, "id": "7", "responses": "none"},
        "{",
        "[" * 100_000,
        "3",
    ]
    file = jsonl(tmp_path / "p.jsonl", *lines, {"index": 8, "prediction": float("nan")})
    file.write_bytes(file.read_bytes() + b'{"index": 9, "prediction": "\xff"}\n')
    notes = []
    found = read_predictions(file, QUESTIONS, notes)
    assert found.keys() == {1, 2, 8}
    assert (
        found[1].items()
        >= {"index": 1, "prediction": "P", "extra": 5, "question_type": "Reasoning", "A": None}.items()
    )
    assert (
        found[2]["prediction"] == "first"
        and found[2]["key_annotation_steps"] == QUESTIONS[2]["key_annotation_steps"]
    )
    kinds = [kind for kind, _ in notes]
    assert kinds.count("prediction left out") == 13 and kinds.count("no text as a prediction") == 1
    with pytest.raises(InputError, match="no prediction for a question"):
        read_predictions(jsonl(tmp_path / "q.jsonl", {"index": 500, "prediction": "x"}), QUESTIONS, [])


# ---- judges behind a server ----------------------------------------------------------------------

GOOD = {
    "Match": [{"step_type": "logical inference", "premise": "", "conclusion": "c", "judgment": "Match"}],
    "Unmatched": [{"step_index": i, "judgment": "Matched"} for i in range(9)],
    "relevant is": [{"step_type": "logical inference", "conclusion": "c", "relevant": "Yes"}],
    "error_type": [{"conclusion": "c", "judgment": "Correct", "error_type": "N/A"}],
}


def judge_server(trouble):
    """A plan for the loopback server: a judge that likes everything; `trouble(index, step, number)` -> what
    is sent instead, None for nothing."""

    def plan(request):
        text = request.body["messages"][1]["content"]
        index = json.loads(text.partition("\n\n")[2])["index"]
        step = next(
            (word for word in ("error_type", "relevant is", "Unmatched", "Match") if word in text), "bare"
        )
        made = trouble(index, step, request.number)
        bare = "1" if "extract_answer" in text else "seven"
        return made if made is not None else bare if step == "bare" else json.dumps({"steps": GOOD[step]})

    return plan


def judged(server, folder, *argv, n=4):
    rows = [{"index": i, "prediction": "word " * 12} for i in range(1, n + 1)]
    file = jsonl(folder / "m_cot.jsonl", *rows)
    url = ["--endpoint", server.url, "--model", "tiny", "--cache", folder / "chat"]
    return command(
        "judge", file, "--prompt", "cot", "--dataset", DATASET, "--out", folder / "cache", *url, *argv
    )


def test_a_server_judges_and_what_it_said_is_scored(serve, tmp_path):
    server = serve(judge_server(lambda index, step, number: None))
    done = judged(server, tmp_path)
    assert done.returncode == 0, done.stderr
    assert len(server.seen) == 4 * 6
    body = server.seen[0].body
    assert (body["temperature"], body["top_p"], body["max_tokens"]) == (0, 0.1, 4096)
    formats = ["response_format" in request.body for request in server.seen]
    assert sum(formats) == 4 * 4
    files, done = scored(tmp_path)
    assert done.returncode == 0 and "100.0" in done.stdout
    assert files["quality/quality_results.json"]["m"]["overall_metrics"] == {
        "precision": 1,
        "recall": 1,
        "f1": 1,
    }
    assert files["coverage.json"]["relevance_rate"]["m"]["valid"] == 4
    again = judged(server, tmp_path)
    assert again.returncode == 0 and len(server.seen) == 4 * 6
    assert "precision: 0 written, 4 were there" in again.stdout


def test_a_server_that_errs_stalls_and_breaks_json_costs_its_own_questions(serve, tmp_path, monkeypatch):
    monkeypatch.setattr("minicot.chat.random", types.SimpleNamespace(uniform=lambda low, high: 0.01))
    healed = []

    def trouble(index, step, number):
        if healed or step not in ("Match", "bare"):
            return None
        return {
            1: (400, {}, b"too long"),
            2: 2.0,
            3: completion('{"steps": [{"ste') if step == "Match" else (200, {}, b"<html>"),
        }.get(index)

    server = serve(judge_server(trouble))
    done = judged(server, tmp_path, "--timeout", 0.1, "--concurrency", 4)
    assert done.returncode == 0, done.stderr
    line = next(line for line in done.stdout.splitlines() if line.startswith("precision:"))
    assert "1 written" in line and "3 of 4 requests failed" in line
    for reason in ("HTTP 400", "ReadTimeout", "broken reply"):
        assert reason in line
    assert "extract: 1 written" in done.stdout and "judge: 1 written" in done.stdout
    assert "3 x no extracted answer" in done.stdout and "recall: 4 written, 0 were there\n" in done.stdout
    assert [file.name for file in (tmp_path / "cache/precision/m").iterdir()] == ["4.json"]
    assert scored(tmp_path)[0]["coverage.json"]["precision"]["m"] == {"valid": 1, "files": 1, "questions": 12}
    healed.append(True)
    done = judged(server, tmp_path)
    assert "precision: 3 written, 1 were there\n" in done.stdout and "judge: 3 written" in done.stdout


def test_a_judge_that_lets_nobody_in_is_exit_code_2(serve, tmp_path):
    server = serve(lambda request: (401, {}, b"who are you?"))
    assert_one_line_error(judged(server, tmp_path, n=2), "nothing was judged")


@pytest.mark.parametrize(
    "argv, parts",
    [
        (["--prompt", "TEST"], ["--prompt", "cot", "dir"]),
        (["--steps", "precision,style"], ["--steps", "relevance_rate"]),
        (["--endpoint", ""], ["--endpoint", "server"]),
        (["--name", "a/b"], ["model's name"]),
        (["--dataset", ""], ["--dataset", "a path"]),
    ],
)
def test_flags_of_judge_are_checked(serve, tmp_path, argv, parts):
    server = serve(lambda request: "1")
    assert_one_line_error(judged(server, tmp_path, *argv), *parts)
    assert server.seen == []


# ---- the built-in world --------------------------------------------------------------------------

TOY = benchmark.rows("test", 24, 12)


def toy_row(row):
    return pictures.row_of(pictures.scene_of(row["image"].removeprefix("toy:")))


def toy_run(folder, solution_of, prompts=("cot", "dir"), steps=STEPS):
    """Score a model whose answer to a Reasoning question is solution_of(toy row)."""
    rng, rows = random.Random(0), {}
    for row in TOY:
        bare = f"#### {row['answer'] if rng.random() < 0.8 else 99}"
        text = bare if row["question_type"] == "Perception" else solution_of(toy_row(row))
        rows[row["index"]] = {**row, "prediction": text}
    for prompt in prompts:
        chat_of = lambda step: benchmark.judge(step, TOY)
        reports = list(make_cache(rows, folder, prompt, "m", chat_of, steps=steps, notes=[]))
        assert all(not failures for *_, failures in reports)
    files, _, _ = score(folder, {row["index"]: row for row in TOY}, [])
    return files


def overall(files, metric):
    return files[f"{metric}/{metric}_results.json"]["m"]["overall_metrics"][f"average_{metric}"]


def test_toy_rows_are_official_rows():
    columns = golden("dataset")[0].keys() | {"meta_info", "image"}
    assert all(row.keys() == columns for row in TOY)
    assert [row["index"] for row in TOY] == list(range(1, 37)) and TOY == benchmark.rows("test", 24, 12)
    for kind in ("Reasoning", "Perception"):
        shown = [row for row in TOY if row["question_type"] == kind]
        assert {row["category"] for row in shown} == {"OCR", "Spatial-Temporal", "General Reasoning"}
        assert all((row["key_annotation_steps"] is None) == (kind == "Perception") for row in shown)
    keys, toy = TOY[0]["key_annotation_steps"]["solution1"], toy_row(TOY[0])
    assert keys["image_caption"] + keys["logical_conclusion"] == toy["steps"]
    assert TOY[0]["reference_caption"] == [f"Image 1: {toy['caption']}"]
    assert len({row["image"] for row in TOY}) == 36 and benchmark.problem_of(TOY[3])["id"] == "4"


def test_right_solutions_get_full_marks_from_the_toy_judge(tmp_path):
    files = toy_run(tmp_path, lambda row: row["solution"], steps=set(STEPS) - {"reflection_quality"})
    assert [overall(files, metric) for metric in ("precision", "recall", "relevance_rate")] == [1, 1, 1]
    assert files["quality/quality_results.json"]["m"]["type_metrics"]["image caption"]["f1"] == 1
    assert files["efficiency/efficiency_results.json"]["m"]["overall_metrics"]["efficiency"] == 1  # the dummy
    cot, dir = (files["robustness/robustness_extrainfo.json"]["m"][prompt] for prompt in ("cot", "dir"))
    assert cot["Reasoning"]["overall"] == dir["Reasoning"]["overall"] == 1
    assert 0 < cot["Perception"]["overall"] < 1


def test_mistakes_cost_precision_and_recall_and_not_relevance(tmp_path):
    rng = random.Random(0)
    files = toy_run(tmp_path, lambda row: teacher.corrupt(row, rng, "misread")["solution"], ["cot"])
    assert 0.2 < overall(files, "precision") < 0.7 and 0.2 < overall(files, "recall") < 0.7
    assert overall(files, "relevance_rate") == 1
    assert files["robustness/robustness_extrainfo.json"]["m"]["cot"]["Reasoning"]["overall"] == 0


def test_reflections_are_found_judged_and_cost_relevance(tmp_path):
    """Half of the second thoughts put a step right (Correct), half say it again (Repetition)."""
    mends, repeats = (
        toy_run(
            tmp_path / name,
            lambda row: benchmark.reflective(row, random.Random(row["id"]), slip=slip)["solution"],
            ["cot"],
        )
        for name, slip in (("mends", 1), ("repeats", 0))
    )
    assert overall(mends, "reflection_quality") == 1 and overall(repeats, "reflection_quality") == 0
    table = repeats["reflection_quality/reflection_quality_results.json"]["m"]["overall_metrics"]
    assert table["average_repetition_ratio"] == 1
    assert overall(mends, "recall") == overall(repeats, "recall") == 1
    assert overall(mends, "precision") < 1 == overall(repeats, "precision")
    assert overall(repeats, "relevance_rate") < 1


def test_the_toy_judge_names_what_is_not_its_own():
    with pytest.raises(InputError, match="step is 'style'"):
        benchmark.judge("style", TOY)
    with pytest.raises(InputError, match="index 99"):
        benchmark.judge("precision", TOY)(request("precision", {**TOY[0], "index": 99, "prediction": ""}))


@pytest.mark.parametrize(
    "text", ["", "#### ", "Hello.\n\nWait, what?", "Tom: apples 7\n" * 50, "1 + 1 = 2\nx" * 3, "\\boxed{" * 9]
)
def test_the_toy_judge_takes_any_text(text):
    for step in STEPS:
        row = {**TOY[0], "prediction": text, "extract_answer": text}
        made = benchmark.judge(step, TOY)(request(step, row))
        assert isinstance(made, str) and made == benchmark.judge(step, TOY)(request(step, row))
        assert step in ("extract", "judge") or isinstance(json.loads(made), list)
