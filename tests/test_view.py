"""The page to read chains in: what it tells of samples, what bad input does to it, the page in a browser."""

import base64
import hashlib
import html
import json
import math
import os
import re
import shutil

import pytest

from minicot import view
from minicot.records import Problem, Response, Samples, problem_from_row, samples_to_row
from minicot.runs import write_text
from minicot.toy import pictures, problems
from minicot.training import resolve
from tests.helpers import assert_one_line_error, jsonl, script

BASE = resolve("toy")
EVIL = '</script><script>window.ran = 1</script><img src=x onerror="window.ran = 2">'


def data_of(page):
    [block] = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)
    return json.loads(block)


def shown(*responses, problem=Problem("1", "How many?", "4"), **files):
    """The data of a page's one problem."""
    [one] = data_of(view.page({"a": [Samples(problem, list(responses))]}))["problems"]
    return one


def response(text="One has 4.\n#### 4", correct=True, answer="4", **fields):
    return Response(text, correct, answer=answer, **fields)


WRONG = response("One has 5.\n#### 5", False, "5")
SILENT = response("One has", False, None, finish="length")


# ---- what is told --------------------------------------------------------------------------------


def test_the_summary_by_hand():
    scored = lambda one, score: Response(**{**vars(one), "scores": {"prm": score}})
    sampled = [
        Samples(Problem("1", "?", "4"), [scored(response(), 0.9), scored(WRONG, 0.1)]),
        Samples(Problem("2", "?", "4"), [scored(WRONG, 0.8), scored(SILENT, 0.2)]),
        Samples(Problem("3", "?", "4"), error="no server"),
    ]
    facts = view.summary(sampled)
    assert facts["problems"] == "3" and facts["responses"] == "4" and facts["without response"] == "1"
    assert facts["accuracy [95 %]"].startswith("16.7% [")  # (1/2 + 0 + 0) / 3
    assert facts["majority"] == "33.3%" and facts["pass@2"] == "33.3%"  # a tie goes to the first answer
    assert facts["no answer"] == "25.0%"
    assert facts["best by prm, AUROC"] == "50.0%, 1.000"
    assert facts["mean length (words), cut off"] == "4.2, 25.0%"  # 5, 5, 5 and 2 words


def test_what_is_not_known_is_left_out():
    facts = view.summary([Samples(Problem("1", "?"), [Response("a b"), Response("c")])])
    assert facts == {"problems": "1", "responses": "2", "mean length (words), cut off": "1.5, 0.0%"}


def test_problems_of_two_files_meet_by_id_and_question():
    one = Samples(Problem("1", "How many?", "4"), [response()])
    other = Samples(Problem("1", "How many?", "4"), [WRONG])
    page = view.page({"a": [one], "b": [other]})
    [problem] = data_of(page)["problems"]
    assert [group["share"] for group in problem["groups"]] == [1, 0] and problem["apart"] == 1
    assert problem["disagree"] and problem["kind"] == "mixed"
    assert "1 of 1 problems are in each of the 2 files." in page
    apart = view.page({"a": [one], "b": [Samples(Problem("1", "Another?", "4"), [WRONG])]})
    assert [p["id"] for p in data_of(apart)["problems"]] == ["1", "1~"]
    assert [p["groups"][i] for p, i in zip(data_of(apart)["problems"], (1, 0))] == [None, None]
    assert "0 of 2 problems" in apart and "One id stands for different questions" in apart


@pytest.mark.parametrize("world", [problems, pictures])
def test_the_oracle_marks_the_first_wrong_step_of_a_problem_of_its_world(world):
    row = world.make_problem(7, difficulty=3, wording="because" if world is pictures else None)
    steps = [*row["steps"][:1], "Tom has 1 + 1 = 3.", *row["steps"][1:]]
    text = "\n".join([*steps, f"#### {row['answer']}"])
    problem = problem_from_row(row, "x:1", 1)
    [one] = shown(response(text), problem=problem)["groups"][0]["responses"]
    assert one["judge"] == "oracle" and one["wrong"] == 1
    assert [piece[:3] for piece in one["pieces"][:2]] == [[steps[0], 0, True], [steps[1], 1, False]]
    assert one["pieces"][-1][:3] == [f"#### {row['answer']}", None, None]
    other = problem_from_row(row | {"question": "Who is it?"}, "x:1", 1)  # only the id is of that world
    [one] = shown(response(text), problem=other)["groups"][0]["responses"]
    assert one["judge"] is None and one["wrong"] is None


def test_steps_are_judged_by_labels_then_by_scores():
    text = "One has 4.\nTwo has 5.\n#### 9"
    scores = {"step_scores": {"prm": [0.9, 0.25]}}
    [one] = shown(response(text, step_labels=[True, True], **scores))["groups"][0]["responses"]
    assert one["judge"] == "step_labels" and one["wrong"] is None
    assert one["pieces"][1] == ["Two has 5.", 1, True, {"prm": 0.25}, {}, []]
    [one] = shown(response(text, **scores))["groups"][0]["responses"]
    assert one["judge"] == "prm below 1/2" and one["wrong"] == 1


def test_tokens_fall_into_the_steps_that_they_write():
    """A line break counts to the line that it ends; blanks that a token has lost are found again; a token
    that is no part of the text stands where it was made."""
    tokens = ["One", "has", " 4.", "\n", "####", "4", "</s>"]
    values = [0.1, -0.2, 0.30004, 0.4, 0.5, 0.6, 0.7]
    [one] = shown(response(tokens=tokens, token_scores={"dpo": values}))["groups"][0]["responses"]
    first, last = one["pieces"]
    assert first[4:] == [{"dpo": [0.1, -0.2, 0.3, 0.4]}, ["One", " has", " 4.", "\n"]]
    assert last[4:] == [{"dpo": [0.5, 0.6, 0.7]}, ["####", " 4", "</s>"]]


def test_a_broken_letter_keeps_the_tokens_in_their_steps():
    tokens = ["Ein", " �", "�", "pfel.", "\n", "####", " 1"]
    placed = view.placed(tokens, "Ein Äpfel.\n#### 1")
    assert [written for _, written in placed][-1] == " 1" and placed[-1][0] == len("Ein Äpfel.\n#### ")


# ---- bad input -----------------------------------------------------------------------------------


def test_texts_are_never_html_and_the_policy_names_the_page_s_own_script():
    files = {EVIL: [Samples(Problem(EVIL, EVIL, EVIL, EVIL), [response(EVIL, False, EVIL)], error=EVIL)]}
    page = view.page(files)
    assert "<script>window" not in page and "<img" not in page
    assert page.count("<script") == 2 and page.count("</script>") == 2
    [problem] = data_of(page)["problems"]
    assert problem["question"] == problem["id"] == problem["groups"][0]["error"] == EVIL
    policy = html.unescape(re.search(r'Content-Security-Policy" content="(.*?)"', page)[1])
    for tag, kind in (("script", "script-src"), ("style", "style-src")):
        [own] = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.S)
        digest = base64.b64encode(hashlib.sha256(own.encode()).digest()).decode()
        assert f"{kind} 'sha256-{digest}'" in policy
    assert policy.startswith("default-src 'none';") and "unsafe" not in policy and "http" not in policy
    assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|eval|https?:", page)


def test_numbers_that_are_none_are_said_as_text():
    nan, inf = math.nan, math.inf
    tokens = {"tokens": ["One has 4.", "\n#### 4"], "token_scores": {"dpo": [nan, -inf]}}
    one = shown(response(reward=nan, scores={"prm": inf}, step_scores={"prm": [nan]}, **tokens))
    [one] = one["groups"][0]["responses"]
    assert one["scores"] == {"prm": "inf", "reward": "nan"} and one["wrong"] == 0
    assert [piece[3:5] for piece in one["pieces"]] == [
        [{"prm": "nan"}, {"dpo": ["nan"]}],
        [{}, {"dpo": ["-inf"]}],
    ]


def test_numbers_for_other_steps_or_tokens_are_noted():
    scores = {"step_scores": {"prm": [0.1, 0.2]}, "step_labels": [True] * 3}
    [one] = shown(response(**scores, tokens=["One"], token_scores={"dpo": [1, 2]}))["groups"][0]["responses"]
    assert one["notes"] == [
        "prm: 2 numbers for 1 steps, 0.1, 0.2",
        "3 step_labels for 1 steps: not shown",
        "token_scores that are not one for each of 1 tokens: not shown",
    ]
    orm = response(scores={"orm": 0.3}, step_scores={"orm": [0.3]}, text="One.\nTwo.")
    assert shown(orm)["groups"][0]["responses"][0]["notes"] == []


def test_a_picture_that_cannot_be_read_is_said(tmp_path):
    (tmp_path / "cut.png").write_bytes(b"\x89PNG\r\n")
    names = ["toy:rows-10-3", "cut.png", "away.png", "toy:nothing"]
    found = shown(problem=Problem("1", "?", image=names, image_root=str(tmp_path)))["pictures"]
    assert found[0]["uri"].startswith("data:image/webp;base64,") and found[0]["small"]
    assert [bool(one.get("error")) for one in found] == [False, True, True, True]


def test_empty_and_absent_things_make_a_page():
    page = view.page({"a": [Samples(Problem("", ""), [Response("")]), Samples(Problem("2", "?"))]})
    empty, none = data_of(page)["problems"]
    assert empty["id"] == "~" and empty["groups"][0]["responses"][0]["pieces"] == []
    assert none["groups"][0]["responses"] == [] and {empty["kind"], none["kind"]} == {"none"}


# ---- the script ----------------------------------------------------------------------------------


def toy_samples(path, n=6, k=3):
    """A file of toy problems with K responses: the solution, one with another answer, one cut off."""
    rows = []
    for row in problems.rows("test", n):
        steps, right = row["steps"], f"#### {row['answer']}"
        texts = ["\n".join([*steps, right]), "\n".join([*steps, "#### 1000"]), steps[0][:-1]]
        marks = [(True, row["answer"], "stop"), (False, "1000", "stop"), (False, None, "length")]
        its = [Response(t, c, answer=a, finish=f) for t, (c, a, f) in zip(texts, marks)][:k]
        rows.append(samples_to_row(Samples(problem_from_row(row, "x:1", 1), its)))
    return jsonl(path, *rows)


def sample(*argv, cwd):
    return script("sample.py", "--device", "cpu", *argv, cwd=cwd)


def test_sample_py_writes_the_page_of_several_files_scored_by_a_model(tmp_path):
    for name in ("a.jsonl", "b.jsonl"):
        toy_samples(tmp_path / name, 3)
    files = ["--samples", "a.jsonl", "b.jsonl", "--html", "pages/page.html"]
    for ref, name in ((["--ref", BASE], "dpo"), ([], "log p")):
        done = sample(*files, "--verifier", BASE, *ref, cwd=tmp_path)
        assert done.returncode == 0 and "6 problems, 18 responses -> pages/page.html" in done.stdout
        data = data_of((tmp_path / "pages" / "page.html").read_text())
        assert data["files"] == ["a.jsonl", "b.jsonl"] and data["scores"] == [name] == list(data["tints"])
        for one in (one for problem in data["problems"] for g in problem["groups"] for one in g["responses"]):
            values = [value for piece in one["pieces"] for value in piece[4][name]]
            assert sum(values) == pytest.approx(one["scores"][name], abs=0.05)
            assert all(value == 0 if ref else value <= 0 for value in values)  # the same model twice: 0


def test_sample_py_refuses_what_it_cannot_show(tmp_path):
    toy_samples(tmp_path / "a.jsonl", 1)
    refuse = lambda *argv: assert_one_line_error(sample(*argv[0], cwd=tmp_path), *argv[1:])
    refuse(["--html", "p.html"], "--samples", "one or several files")
    refuse(["--samples", "a.jsonl"], "--samples", "only with --html")
    refuse(["--samples", "a.jsonl", "--html", "a.jsonl"], "--html is 'a.jsonl'", ".html")
    refuse(["--samples", "a.jsonl", "a.jsonl", "--html", "p.html"], "each file once")
    refuse(["--samples", "a.jsonl", "--html", "p.html", "--out", "x.jsonl"], "--out is 'x.jsonl'")
    refuse(["--samples", "a.jsonl", "--html", "p.html", "--assess"], "--html", "no --assess")
    refuse(["--samples", "a.jsonl", "a.jsonl", "--verifier", BASE, "--out", "x.jsonl"], "one file")
    jsonl(tmp_path / "b.jsonl", '{"question": "?", "responses": [{"text": "", "reward": NaN}]}')
    refuse(["--samples", "b.jsonl", "--html", "p.html"], "b.jsonl:1", "finite")
    assert not (tmp_path / "p.html").exists() and (tmp_path / "a.jsonl").read_text().startswith("{")


# ---- in a browser --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser():
    """A headless Chromium: the one that MINICOT_CHROMIUM names, or of the path, or playwright's own."""
    api = pytest.importorskip("playwright.sync_api", reason="no playwright: pip install playwright")
    found = os.environ.get("MINICOT_CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
    with api.sync_playwright() as playwright:
        try:
            made = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        except api.Error as error:
            pytest.skip(f"no browser: apt-get install chromium ({str(error).splitlines()[0]})")
        yield made
        made.close()


def expect(locator):
    """Playwright's assertions, which wait: the fragment's change is drawn a moment later. (The page's policy
    forbids wait_for_function, which evaluates text in the page.)"""
    from playwright.sync_api import expect

    return expect(locator)


@pytest.fixture
def opened(browser, tmp_path):
    """open(files, fragment, **context) -> the page as a tab, and what it said and asked for meanwhile."""
    contexts, said = [], []

    def open_(files, fragment="", **how):
        write_text(tmp_path / "page.html", view.page(files))
        contexts.append(browser.new_context(**how))
        tab = contexts[-1].new_page()
        tab.on("console", lambda message: said.append(message.text))
        tab.on("pageerror", lambda error: said.append(str(error)))
        of_network = lambda request: not request.url.startswith(("file:", "data:"))
        tab.on("request", lambda request: said.append(request.url) if of_network(request) else None)
        tab.goto((tmp_path / "page.html").as_uri() + fragment)
        return tab

    yield open_
    assert said == []
    for context in contexts:
        context.close()


def files_of(*names):
    right, mixed, wrong = [response()] * 2, [response(), WRONG], [WRONG, SILENT]
    kinds = [right, mixed, wrong] * 20
    ask = lambda i: Problem(
        f"p{i}", f"Question number {i}?", "4", "One has 4.\n#### 4", image="toy:rows-10-3"
    )
    return {name: [Samples(ask(i), kinds[i + j]) for i in range(50)] for j, name in enumerate(names)}


def test_it_lists_filters_sorts_searches_and_opens_by_keyboard(opened):
    tab = opened(files_of("a"), viewport={"width": 1200, "height": 600})
    rows = tab.locator("#list a")
    assert tab.locator("#list li").count() == 50 and 0 < rows.count() < 40  # drawn when they come into view
    tab.locator("#list li").last.scroll_into_view_if_needed()
    tab.locator("#list li:last-child a").wait_for()
    tab.get_by_role("button", name="mixed").click()
    expect(tab.locator("#count")).to_have_text("17 of 50")
    assert "f=mixed" in tab.url
    tab.keyboard.press("/")
    tab.keyboard.type("number 4")
    expect(tab.locator("#count")).to_have_text("5 of 50")  # 4, 40, 43, 46, 49
    tab.keyboard.press("ArrowDown")
    tab.keyboard.press("j")
    tab.keyboard.press("Enter")
    tab.locator("#open h2", has_text="p40").wait_for()
    tab.keyboard.press("j")
    tab.locator("#open h2", has_text="p43").wait_for()
    cards = tab.locator("#open .card")
    assert (
        cards.count() == 2 and "✓ right" in cards.first.inner_text() and "✗ wrong" in cards.last.inner_text()
    )
    assert tab.locator("#open img").evaluate("one => one.naturalWidth") == 64
    tab.keyboard.press("Escape")
    expect(tab.locator("#open h2")).to_have_count(0)
    tab.get_by_label("Sort by").select_option("most right first")
    assert "p40" not in tab.url and "s=high" in tab.url


def test_a_link_opens_the_same_view_and_two_responses_beside_each_other(opened):
    tab = opened(files_of("a", "b"), "#f=apart&p=p1&c=0.0,1.0")
    assert tab.get_by_role("button", name="models disagree").get_attribute("aria-pressed") == "true"
    assert tab.locator("#open h2").inner_text() == "p1" and "First difference: line 1." in tab.inner_text(
        "#both"
    )
    assert tab.locator("#both mark").all_inner_texts() == ["4.", "5."]
    tab.goto(tab.url.partition("#")[0] + "#f=apart&p=p1&c=0.0,1.1")
    tab.get_by_text("(ends)").wait_for()
    assert tab.locator("#both mark").all_inner_texts() == ["4.", "(ends)"]
    tab.get_by_role("link", name="end the comparison").click()
    expect(tab.locator("#both")).to_have_count(0)
    tab.get_by_role("button", name="compare response 2").first.click()
    expect(tab.get_by_role("button", name="compare response 2").first).to_have_attribute(
        "aria-pressed", "true"
    )
    tab.get_by_role("button", name="compare response 1").last.click()
    expect(tab.locator("#both .card")).to_have_count(2)
    assert tab.url.endswith("c=0.1%2C1.0")
    tab.goto(tab.url.partition("#")[0] + "#p=nowhere&f=__proto__&s=constructor")
    tab.get_by_text("No problem nowhere is in this page.").wait_for()


def test_steps_and_tokens_show_what_the_scores_saw(opened):
    tokens = {
        "tokens": ["One", " has", " 5", ".", "\n", "#### 5"],
        "token_scores": {"dpo": [1, 0, -2, 0, 0, 1]},
    }
    one = response("One has 5.\n#### 5", False, "5", step_scores={"prm": [0.2]}, **tokens)
    tab = opened({"a": [Samples(Problem("1", "?", "4"), [one])]}, "#p=1")
    first = tab.locator(".steps li").first
    assert "first wrong step (prm below 1/2)" in first.inner_text()
    assert "prm 0.200 · Σ dpo −1.000" in first.inner_text()
    worst = tab.locator(".token.down[title]")
    assert worst.all_inner_texts() == [" 5"] and worst.get_attribute("title") == "dpo −2.000"
    worst.click()
    assert tab.locator("#told").inner_text() == "dpo −2.000"
    assert worst.evaluate("one => getComputedStyle(one).backgroundColor") != "rgba(0, 0, 0, 0)"
    tab.keyboard.press("t")
    expect(tab.locator(".token")).to_have_count(0)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_is_legible_in_light_and_dark_and_on_a_phone(opened, scheme):
    """WCAG AA: 4.5 : 1 between a text and what is behind it."""
    phone = dict(viewport={"width": 390, "height": 700}, color_scheme=scheme)
    tab = opened(files_of("a"), "#p=p1", **phone)
    assert tab.evaluate("document.documentElement.scrollWidth") <= 390
    assert not tab.locator("#browse").is_visible() and tab.locator("#open h2").is_visible()
    worst = tab.evaluate("""() => {
      const light = css => { const made = css.match(/[\\d.]+/g).map(Number).slice(0, 3).map(x => x / 255)
        .map(x => x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4);
        return 0.2126 * made[0] + 0.7152 * made[1] + 0.0722 * made[2]; };
      const behind = one => {
        while (one && getComputedStyle(one).backgroundColor.endsWith(", 0)")) one = one.parentElement;
        return getComputedStyle(one ?? document.body).backgroundColor; };
      return Math.min(...[...document.querySelectorAll("#open *")]
        .filter(one => one.innerText && !one.children.length)
        .map(one => [light(getComputedStyle(one).color), light(behind(one))].sort((a, b) => b - a))
        .map(([a, b]) => (a + 0.05) / (b + 0.05))); }""")
    assert worst >= 4.5
    dark = tab.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(20, 23, 27)"
    assert dark == (scheme == "dark")


def test_bad_texts_are_shown_and_never_run(opened):
    texts = [EVIL, "שלום (1) \u202e abc", "😀" * 50, "x" * 100_000, "a\x00b\u2028c", ""]
    asked = Problem(
        EVIL, EVIL, EVIL, EVIL, choices=None, image=[], history=[{"role": "user", "content": EVIL}]
    )
    told = [Samples(asked, [Response(text, scores={"prm": math.nan}) for text in texts], error=EVIL)]
    tab = opened({EVIL: told, "b": [Samples(Problem("2", "?"), [])]})
    tab.locator("#list a").first.click()
    expect(tab.locator("#open .card")).to_have_count(6)
    assert tab.evaluate("window.ran") is None and tab.locator("#open img").count() == 0
    assert tab.locator("#open .question").inner_text() == EVIL
    tab.get_by_role("button", name="show all 100,000 characters").click()
    assert len(tab.locator("#open .card").nth(3).locator(".text").inner_text()) == 100_000
    assert tab.locator("#open .card").nth(5).get_by_text("an empty response").count() == 1
    assert "0 of 2 problems are in each of the 2 files." in tab.inner_text("header")


def test_no_script_but_its_own_runs_in_it(browser, tmp_path):
    """Where a text did become HTML by a mistake of ours, the policy stops it."""
    page = view.page(files_of("a")).replace(
        '<ol id="list">', f'{EVIL.removeprefix("</script>")}<ol id="list">'
    )
    write_text(tmp_path / "page.html", page)
    tab = browser.new_page()
    tab.goto((tmp_path / "page.html").as_uri())
    assert tab.locator("#list a").count() > 0 and tab.evaluate("window.ran") is None
    tab.close()
