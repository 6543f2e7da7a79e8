"""Pictures through the whole flow: problems -> train.py -> sample.py -> align.py, a small random tower."""

import json
import random
from dataclasses import replace
from textwrap import indent

import pytest
import torch
from PIL import Image

from minicot.data import IMAGE, check_pictures, collate, encode_row, image_reader, longest_row, readable
from minicot.data import render, target
from minicot.images import ImageProcessor
from minicot.recipes.llava_diagnose import readings, save_as
from minicot.records import Problem, read_samples, samples_to_row
from minicot.sampling import generate, sample_groups
from minicot.scoring import pack, score, score_plain
from minicot.sets import read_problems
from minicot.tokenizer import Tokenizer
from minicot.toy import pictures
from minicot.toy.base_text import PROCESSOR, TOWER, recall
from minicot.toy.lines import labelled
from minicot.training import resolve
from minicot.weights import load_model
from tests.helpers import assert_one_line_error, jsonl, script

N = 16  # placeholders a picture


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A vision-language folder, made as a user would: train.py gives the toy base a random tower."""
    home = tmp_path_factory.mktemp("home")
    tower = home / "tower"
    tower.mkdir()
    small = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    (tower / "config.json").write_text(json.dumps(TOWER | small))
    (tower / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))
    done = script(
        "train.py",
        "--init",
        "toy",
        "--vision",
        tower / "config.json",
        "--feature-layer",
        -1,
        "--data",
        "toy-pictures",
        "--eval-split",
        "",
        "--limit",
        16,
        "--steps",
        2,
        "--batch-size",
        4,
        "--out",
        "model",
        cwd=home,
    )
    assert done.returncode == 0, done.stderr
    return home / "model"


@pytest.fixture(scope="module")
def vlm(folder):
    model, tokenizer = load_model(folder).double().eval(), Tokenizer(folder)
    return model, tokenizer, image_reader(model, tokenizer, folder)


def rows_of(tokenizer, problems, k=1):
    """k rows a problem: its solution, then made-up wrong ones."""
    return [
        [
            encode_row(tokenizer, p, text, mode="cot")
            for text in [target(p, "cot"), "Tom has 3.\n#### 3", "#### 1000"][:k]
        ]
        for p in problems
    ]


def toy_problems(n):
    return read_problems("toy-pictures", "train", limit=n)


def test_the_flow_from_pictures_to_an_aligned_model(folder):
    home = folder.parent
    run = lambda name, *words: script(name, *words, cwd=home)
    done = run(
        "sample.py",
        "--model",
        "model",
        "--data",
        "toy-pictures",
        "--split",
        "train",
        "--limit",
        4,
        "--n",
        2,
        "--max-new-tokens",
        8,
        "--out",
        "samples.jsonl",
    )
    assert done.returncode == 0, done.stderr
    samples = read_samples(home / "samples.jsonl")
    assert [len(s.responses) for s in samples] == [2] * 4 and samples[0].problem.image.startswith("toy:")
    before = load_model(folder).state_dict()
    done = run(
        "align.py",
        "--init",
        "model",
        "--samples",
        "samples.jsonl",
        "--steps",
        2,
        "--lr",
        1e-2,
        "--out",
        "aft",
    )
    assert done.returncode == 0, done.stderr
    after = load_model(home / "aft").state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all(name.startswith("language_model.") for name in changed)  # what sees stays as it is
    assert (home / "aft" / "preprocessor_config.json").is_file()
    done = run("sample.py", "--model", "aft", "--data", "toy-pictures", "--limit", 4, "--evaluate", "--blind")
    assert done.returncode == 0 and "greedy accuracy" in done.stdout


def test_the_flow_from_labelled_pictures_to_ps_grpo(folder, tmp_path):
    """A PRM of chains about pictures, which judges others and pays a policy that sees."""
    drawn = [labelled(scene, draw) for draw in range(2) for scene in pictures.scenes("train", 6, 0, None)]
    jsonl(tmp_path / "labelled.jsonl", *map(samples_to_row, drawn))
    done = script(
        "train.py", "--task", "prm", "--init", folder, "--samples", "labelled.jsonl", "--steps", 2,
        "--batch-size", 4, "--out", "prm", cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "prm" / "preprocessor_config.json").is_file()
    argv = ["--verifier", "prm", "--samples", "labelled.jsonl", "--out", "scored.jsonl"]
    done = script("sample.py", *argv, cwd=tmp_path)
    assert done.returncode == 0 and "not judged" not in done.stdout, done.stderr
    for samples in read_samples(tmp_path / "scored.jsonl"):
        for r in samples.responses:
            assert len(r.step_scores["prm"]) == len(r.step_labels)
    done = script(
        "align.py", "--method", "grpo", "--reward", "steps", "--verifier", "prm", "--init", folder, "--data",
        "toy-pictures", "--limit", 4, "--eval-split", "", "--k", 2, "--batch-size", 2, "--steps", 1, "--kl",
        0.1, "--max-new-tokens", 12, "--out", "grpo", cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    [line] = map(json.loads, (tmp_path / "grpo" / "metrics.jsonl").read_text().splitlines())
    assert 0 < line["prm_score"] < 1 and line["reward"] >= line["prm_score"] - 1e-6 and line["grad_norm"] > 0


@pytest.mark.parametrize(
    "part, moved", [("projector", "multi_modal_projector."), ("language", "language_model.")]
)
def test_only_the_named_part_learns(folder, part, moved):
    home = folder.parent
    done = script(
        "train.py",
        "--init",
        "model",
        "--data",
        "toy-pictures",
        "--eval-split",
        "",
        "--limit",
        4,
        "--steps",
        1,
        "--lr",
        1e-2,
        "--train",
        part,
        "--overwrite",
        "--out",
        f"only-{part}",
        cwd=home,
    )
    assert done.returncode == 0, done.stderr
    before, after = load_model(folder).state_dict(), load_model(home / f"only-{part}").state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all(name.startswith(moved) for name in changed)


def test_rows_of_like_length_share_a_batch_unless_told_otherwise(folder):
    losses = {}
    for switch in ("--group-by-length", "--no-group-by-length"):
        done = script(
            "train.py",
            "--init",
            folder,
            "--data",
            "toy-pictures",
            "--eval-split",
            "",
            "--mode",
            "both",
            "--limit",
            8,
            switch,
            "--steps",
            4,
            "--batch-size",
            4,
            "--lr",
            1e-9,
            "--out",
            switch.strip("-"),
            cwd=folder.parent,
        )
        assert done.returncode == 0, done.stderr
        lines = (folder.parent / switch.strip("-") / "metrics.jsonl").read_text().splitlines()
        losses[switch] = [json.loads(line)["loss"] for line in lines]
    spread = {switch: max(found) - min(found) for switch, found in losses.items()}
    assert spread["--group-by-length"] > spread["--no-group-by-length"]  # bare answers and chains apart


def test_the_tower_has_its_own_learning_rate(folder):
    home, lines = folder.parent, ["--data", "toy-pictures", "--limit", 4, "--steps", 1, "--lr", 1e-2]
    lines += ["--eval-split", ""]
    done = script("train.py", "--init", "model", *lines, "--vision-lr", 0, "--out", "still", cwd=home)
    assert done.returncode == 0, done.stderr
    before, after = load_model(folder).state_dict(), load_model(home / "still").state_dict()
    changed = {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"language_model", "multi_modal_projector"}
    done = script(
        "train.py", "--init", "toy", "--data", "toy", "--limit", 4, "--train", "projector", cwd=home
    )
    assert_one_line_error(done, "--train", "projector", "language, all")
    done = script(
        "train.py", "--init", "toy-vision", "--data", "toy", "--limit", 4, "--train", "projector", cwd=home
    )
    assert_one_line_error(done, "--train", "projector", "rows have no picture")


def test_a_placeholder_becomes_n_tokens_and_a_picture_is_stored_once_a_group(vlm):
    model, tokenizer, reader = vlm
    groups = rows_of(tokenizer, toy_problems(3), k=3)
    batch = collate(groups, tokenizer.pad_id, reader)
    assert batch.images.shape == (3, 3, 64, 64) and batch.image_group.tolist() == [0, 1, 2]
    assert (batch.ids == reader.token_id).sum(1).tolist() == [N] * 9
    row = groups[0][0]
    assert batch.loss_mask[0].sum() == len(row.ids) - row.n_prompt  # the same tokens are trained
    assert batch.loss_mask[0].nonzero()[0] == row.n_prompt + N - 1
    assert pack(batch).ids.eq(reader.token_id).sum() == 3 * N  # computed once a group


def test_score_with_pictures_equals_the_plain_path(vlm):
    model, tokenizer, reader = vlm
    text = read_problems("toy", "train", limit=1)  # a mixed batch
    groups = rows_of(tokenizer, [*toy_problems(2), *text], k=3)
    batch, found = collate(groups, tokenizer.pad_id, reader), []
    batch = replace(batch, images=batch.images.double())
    for function in (score, score_plain):
        model.zero_grad()
        logps = function(model, batch).masked_fill(~batch.loss_mask, 0)
        (logps * torch.linspace(0.5, 1.5, logps.numel()).view_as(logps)).sum().backward()
        grads = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        found.append((logps.detach(), grads))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=0, atol=1e-9)
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-7, atol=1e-9)


def test_samples_depend_on_the_picture_and_not_on_the_batch(vlm):
    model, tokenizer, reader = vlm
    problems = [replace(p, question="How many?") for p in toy_problems(3)]
    options = dict(n=2, mode="cot", style="hash", max_new_tokens=12, temperature=1.0, reader=reader, seed=1)
    together = list(sample_groups(model, tokenizer, problems, **options))
    for i, problem in enumerate(problems):
        assert list(sample_groups(model, tokenizer, [problem], **options)) == [together[i]]
    other = replace(problems[0], image=problems[1].image)
    assert list(sample_groups(model, tokenizer, [other], **options))[0].responses != together[0].responses


def test_pictures_are_sampled_about_in_bfloat16(folder, vlm):
    model, tokenizer, reader = load_model(folder, dtype=torch.float32), *vlm[1:]
    options = dict(n=2, mode="cot", style="hash", max_new_tokens=6, temperature=0.0, reader=reader)
    with torch.autocast("cpu", torch.bfloat16):
        narrow = list(sample_groups(model, tokenizer, toy_problems(2), **options))
    assert [len(samples.responses) for samples in narrow] == [2, 2]
    narrow = list(sample_groups(model.bfloat16(), tokenizer, toy_problems(2), **options))
    assert [len(samples.responses) for samples in narrow] == [2, 2]


def test_no_model_draws_a_picture(vlm):
    model, tokenizer, reader = vlm
    head = model.head
    model.head = lambda hidden: head(hidden).index_fill(-1, torch.tensor([reader.token_id]), 1e4)
    try:
        drawn = generate(model, [[1, 5]], max_new_tokens=6, stop_ids=[], temperature=0, seed=0)[0][0]
    finally:
        del model.head
    assert reader.token_id not in drawn


def test_a_picture_of_another_size_and_format_reads_as_the_array(vlm, folder, tmp_path):
    model, tokenizer, reader = vlm
    name = toy_problems(1)[0].image
    picture = pictures.draw(name[4:])
    picture.resize((192, 192), Image.Resampling.NEAREST).save(tmp_path / "large.png")
    picture.save(tmp_path / "same.jpg", quality=95)
    array, large, jpeg = reader.pixels([(name, None), ("large.png", tmp_path), ("same.jpg", tmp_path)])
    assert (large - array).abs().mean() < 0.06 and (jpeg - array).abs().mean() < 0.06
    done = script(
        "sample.py", "--model", folder, "--image", tmp_path / "large.png", "How many?", cwd=tmp_path
    )
    assert done.returncode == 0 and "How many?" in done.stdout


@pytest.fixture(scope="module")
def shipped():
    folder = resolve("toy-vision")
    model, tokenizer = load_model(folder, dtype=torch.float32).eval(), Tokenizer(folder)
    return model, tokenizer, image_reader(model, tokenizer, folder)


def right_readings(shipped, rows, images, root=None):
    """Of how many reading_rows it reads every name, thing and number right."""
    found = readings(*shipped, rows, images, root)
    return sum(text == row["solution"] for text, row in zip(found, rows))


def recalled(model, tokenizer, n=64):
    """Of the digits that rows of base_text.recall say again, the share that comes first, given all before."""
    rng, right = random.Random("look up"), []
    for _ in range(n):
        row = recall(rng, "lines")
        problem = Problem("a", row["question"], solution=row["solution"])
        encoded = encode_row(tokenizer, problem, row["solution"], mode="plain")
        best = model(torch.tensor([encoded.ids]))[0].argmax(-1).tolist()
        right += [
            best[i - 1] == encoded.ids[i]
            for i in range(encoded.n_prompt, len(encoded.ids))
            if tokenizer.decode([encoded.ids[i]]).strip().isdigit()
        ]
    return sum(right) / len(right)


@torch.no_grad()
def test_both_shipped_bases_look_numbers_up_by_name(shipped):
    model, tokenizer, _ = shipped
    folder = resolve("toy")
    text_base = load_model(folder, dtype=torch.float32)
    assert recalled(model, tokenizer) > 0.95
    assert recalled(text_base, Tokenizer(folder)) > 0.95
    with torch.no_grad():  # a model that looks nothing up is at chance: half of the numbers begin with a 1
        for layer in text_base.model["layers"][1:3]:
            layer.self_attn.o_proj.weight.zero_()
    assert recalled(text_base, Tokenizer(folder)) < 0.6


@pytest.mark.parametrize("kind", pictures.KINDS)
def test_the_shipped_base_reads_files_of_other_sizes_and_formats_as_the_arrays(shipped, kind, tmp_path):
    rows = pictures.reading_rows("test", 24, kind=kind)
    of_arrays = right_readings(shipped, rows, [row["image"] for row in rows])
    assert of_arrays >= 0.9 * len(rows)
    for side, ending in ((192, "png"), (200, "png"), (320, "jpg"), (200, "jpg"), (64, "jpg")):
        images = save_as(rows, side, ending, tmp_path)
        assert right_readings(shipped, rows, images, str(tmp_path)) >= of_arrays - 2, (side, ending)
    Image.new("RGB", (64, 64), "white").save(tmp_path / "blank.png")
    assert right_readings(shipped, rows, ["blank.png"] * len(rows), str(tmp_path)) == 0


@pytest.mark.parametrize("name", ["large.png", "large.jpg"])
def test_a_question_typed_by_hand_about_a_file_is_answered_as_about_the_array(name, tmp_path):
    row = pictures.reading_rows("test", 1, kind="bars")[0]
    pictures.draw(row["image"][4:]).resize((200, 200), Image.Resampling.NEAREST).save(tmp_path / name)
    done = script(
        "sample.py",
        "--model",
        "toy-vision",
        "--temperature",
        0,
        "--image",
        tmp_path / name,
        row["question"],
        cwd=tmp_path,
    )
    assert done.returncode == 0 and indent(row["solution"], "    ") in done.stdout, done.stdout


def test_placeholders_stand_where_the_question_puts_them(vlm):
    model, tokenizer, reader = vlm
    two = [p.image for p in toy_problems(2)]
    before = Problem("a", "Which has more?", image=two)
    within = Problem("b", f"{IMAGE} or {IMAGE}: which has more?", image=two)
    assert render(before, "plain") == f"{IMAGE}\n{IMAGE}\nWhich has more?"
    assert render(within, "plain") == within.question
    rows = [[encode_row(tokenizer, p, "1", mode="plain")] for p in (before, within)]
    assert collate(rows, tokenizer.pad_id, reader).image_group.tolist() == [0, 0, 1, 1]


def test_pictures_that_disagree_with_the_text_are_refused(vlm, tmp_path):
    model, tokenizer, reader = vlm
    one = toy_problems(1)[0].image
    bad = Problem("b", f"{IMAGE}{IMAGE} How many?", image=one)
    row = encode_row(tokenizer, bad, "1", mode="plain")
    with pytest.raises(ValueError, match="'b': 2 <image> in its text, 1 pictures"):
        check_pictures([[row]], reader, "data.jsonl")
    with pytest.raises(ValueError, match="'b' has a picture, but the model reads text only"):
        check_pictures([[row]], None, "data.jsonl")
    done = script("train.py", "--data", "toy-pictures", "--limit", 4, cwd=tmp_path)
    assert_one_line_error(done, "toy-pictures", "reads text only", "--vision")
    text = load_model(tokenizer.folder).language_model
    with pytest.raises(ValueError, match="reads text only"):
        list(sample_groups(text, tokenizer, toy_problems(1), n=1, mode="cot", style="hash", max_new_tokens=4))


def test_one_bad_picture_costs_its_own_problem_alone(folder, tmp_path):
    good, bad = tmp_path / "good.png", tmp_path / "bad.png"
    pictures.draw(toy_problems(1)[0].image[4:]).save(good)
    bad.write_bytes(good.read_bytes()[:90])
    rows = [
        {"id": name, "question": "How many?", "answer": "3", "image": f"{name}.png"}
        for name in ("good", "bad")
    ]
    (tmp_path / "set.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["--model", folder, "--data", "set.jsonl", "--max-new-tokens", 4]
    done = script("sample.py", *words, "--out", "samples.jsonl", cwd=tmp_path)
    assert done.returncode == 0 and "1 of 2 problems without a response" in done.stdout, done.stderr
    assert "the first is 'bad': image 'bad.png'" in done.stdout
    found = {s.problem.id: s for s in read_samples(tmp_path / "samples.jsonl")}
    assert len(found["good"].responses) == 1 and "bad.png" in found["bad"].error
    done = script("sample.py", *words, "--evaluate", "--out", "results.json", cwd=tmp_path)
    assert done.returncode == 0 and "bad.png" in done.stdout
    assert len(json.loads((tmp_path / "results.json").read_text())["correct"]) == 2
    done = script("sample.py", *words, "--evaluate", "--n", 4, "--out", "results.json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "(they count as wrong); the first is 'bad': image 'bad.png'" in done.stdout
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["correct"][1] == 0 and results["metrics"]["k"] == 4 and results["metrics"]["problems"] == 2
    assert max(*results["metrics"]["pass"].values(), results["metrics"]["majority"]) <= 0.5
    words = ["--assess", "--model", folder, "--samples", "samples.jsonl", "--mode", "direct"]
    done = script("sample.py", *words, "--reference", "--out", "scores.json", cwd=tmp_path)
    assert done.returncode == 0 and "1 problems left out" in done.stdout, done.stderr
    assert json.loads((tmp_path / "scores.json").read_text())["solution_ids"] == ["good"]
    model, tokenizer = load_model(folder), Tokenizer(folder)
    problems = read_problems(str(tmp_path / "set.jsonl"))
    good, unread = readable(problems, image_reader(model, tokenizer, folder))
    assert good == problems[:1] and len(unread) == 1 and unread[0].startswith("bad: image 'bad.png': found")
    done = script(
        "train.py", "--init", folder, "--data", "set.jsonl", "--mode", "direct", "--out", "x", cwd=tmp_path
    )
    assert done.returncode == 0 and "1 problems left out" in done.stdout and "bad.png" in done.stdout


def test_a_verifier_keeps_the_problems_that_it_cannot_score(folder, tmp_path):
    problem = {"question": "How many?", "image": toy_problems(1)[0].image}
    rows = [problem | {"id": "a", "error": "unread", "responses": []}]
    rows += [
        problem | {"id": "b", "level": 2, "responses": [{"text": "3", "correct": None, "finish": "stop"}]}
    ]
    (tmp_path / "s.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["--verifier", folder, "--ref", folder, "--samples", "s.jsonl", "--out", "scored.jsonl"]
    done = script("sample.py", *words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    first, second = (json.loads(line) for line in (tmp_path / "scored.jsonl").read_text().splitlines())
    assert first["id"] == "a" and first["error"] == "unread" and second["level"] == 2
    assert second["responses"][0]["scores"] == {"dpo": 0.0}


def test_a_picture_that_comes_out_in_another_size_than_the_model_reads_is_named(vlm, tmp_path):
    """By a folder whose processor keeps the shape: square pictures fit, others don't."""
    options = PROCESSOR | {"size": {"shortest_edge": 64}}
    reader = replace(vlm[2], processor=ImageProcessor.from_dict(options))
    for name, size in (("square.png", (80, 80)), ("wide.png", (160, 80))):
        Image.new("RGB", size).save(tmp_path / name)
    problems = [
        Problem(name, "q", image=name, image_root=str(tmp_path)) for name in ("square.png", "wide.png")
    ]
    good, unread = readable(problems, reader)
    assert good == problems[:1] and "makes 128 x 64 pixels of it; allowed: 64 x 64" in unread[0]


def test_a_row_may_be_as_long_as_leaves_room_for_its_picture(vlm):
    reader, problems = vlm[2], toy_problems(1)
    assert longest_row(512, problems, reader) == 512 - (N - 1)
    assert (
        longest_row(512, [replace(problems[0], image=None)], reader)
        == longest_row(512, problems, None)
        == 512
    )


@pytest.mark.parametrize("image", ["../out.png", "missing.png"])
def test_a_picture_outside_its_folder_or_missing_is_named_with_its_row(folder, tmp_path, image):
    home = tmp_path / "data"
    home.mkdir()
    pictures.draw(toy_problems(1)[0].image[4:]).save(tmp_path / "out.png")
    (home / "set.jsonl").write_text(
        json.dumps({"question": "How many?", "answer": "3", "image": image}) + "\n"
    )
    done = script("sample.py", "--model", folder, "--data", "data/set.jsonl", "--evaluate", cwd=tmp_path)
    assert_one_line_error(done, "set.jsonl:1", image.removeprefix("../"))


def test_a_file_of_samples_finds_the_pictures_of_its_problems(folder, tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    pictures.draw(toy_problems(1)[0].image[4:]).save(data / "p.png")
    (data / "set.jsonl").write_text(
        json.dumps({"question": "How many?", "answer": "3", "image": "p.png"}) + "\n"
    )
    done = script(
        "sample.py",
        "--model",
        folder,
        "--data",
        "data/set.jsonl",
        "--max-new-tokens",
        4,
        "--out",
        "elsewhere/samples.jsonl",
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    [samples] = read_samples(tmp_path / "elsewhere" / "samples.jsonl")
    assert samples.problem.images == [("p.png", str(data.resolve()))]
