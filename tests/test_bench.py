"""The benchmark's rows at a tiny size, and that it refuses to race sides that do different work."""

import importlib.util
import json

import numpy as np
import pytest
import torch

from minicot import scoring
from minicot.losses import grpo_loss
from tests.bench import __main__ as bench
from tests.bench import memory, page, projection, sides

CPU = torch.device("cpu")
TRL = ["TRL"] if importlib.util.find_spec("trl") else []


def test_every_row_of_steps_and_generation_runs_and_prints():
    peers = ["padded", "plain", "transformers"]
    results = [
        *bench.sft_row("tiny", CPU, 1, rows=3),
        *bench.sft_row("tiny" + sides.WITH_TOWER, CPU, 1, rows=3),
        *bench.group_row("DPO", "tiny", CPU, 1, B=2, K=2, P=6, R=5, peers=peers + TRL),
        *bench.group_row("group", "tiny", CPU, 1, B=2, K=3, P=6, R=5, peers=peers),
        *bench.generation_row("tiny", CPU, 1, prompts=2, P=6, n=2, new=3),
        *bench.prm_row("tiny", CPU, 1, K=4, P=6, R=32),
        *bench.policy_row("toy 1M", CPU, 1, B=1, R=2, k=1, new=2),  # the toy tokenizer has 512 ids
    ]
    if TRL:
        results += bench.grpo_row("tiny", CPU, 1, B=2, K=4, P=6, new=5)
    assert len(results) == 2 + 1 + 3 + len(TRL) + 3 + 1 + 1 + 1 + len(TRL)
    for result in json.loads(json.dumps(results)):
        ratio = result["theirs"][0] / result["ours"][0]
        assert result["ratio"] == [ratio] * 3 and ratio > 0
        assert result["tokens_per_second"] == pytest.approx(result["tokens"] / result["ours"][0])
        assert f"| {result['peer']} | {ratio:.2f} /" in page.line(result)
    padded = next(result for result in results if result["work"] == "group step")
    assert padded["tokens"] == 2 * 3 * (6 + 5) and padded["bounds"]["tokens"] == 3 * (6 + 5) / (6 + 3 * 5)
    assert 1 < padded["bounds"]["work"] < padded["bounds"]["tokens"]
    assert padded["reached"]["tokens"] == pytest.approx(padded["ratio"][1] / padded["bounds"]["tokens"])


def test_multiplications_by_hand():
    weights = 2 * (16 * 16 + 16 * 8 + 16 * 8 + 16 * 16 + 3 * 16 * 24)  # 2 layers: q, k, v, o, SwiGLU
    head, width = 3 * 5 * 16 * 40, 16  # attention: q k^T and weights v
    plain = 33 * weights + head + 2 * 2 * width * 3 * 11 * 11 / 2
    shared = 21 * weights + head + 2 * 2 * width * (6 * 6 / 2 + 3 * (5 * 6 + 5 * 5 / 2))
    assert sides.multiplications("tiny", 3, 6, 5, shared=False) == plain
    assert sides.multiplications("tiny", 3, 6, 5, shared=True) == shared


def test_memory_counts_the_logits_of_the_plain_path():
    (result,) = bench.memory_row("group", "toy 1M", CPU, 1, rows=8, K=8, P=200, R=20, peers=["plain"])
    logits = 8 * 220 * sides.MODELS["toy 1M"].vocab_size * 4
    assert result["theirs"][0] > logits and result["ratio"][0] > 1.5


OTHERS = [("SFT", ["transformers"]), ("DPO", ["plain", *TRL]), ("group", ["padded"])]


@pytest.mark.parametrize("work, peers", OTHERS)
def test_a_side_that_does_other_work_is_refused(work, peers):
    K = {"SFT": 1, "DPO": 2, "group": 3}[work]
    batches = [sides.make_batch("tiny", [[6, [R] * K]] * 2, CPU) for R in (5, 4)]
    made, other = (sides.make_sides(work, "tiny", batch, ["minicot", *peers]) for batch in batches)
    sides.check_same_work(made)
    for side in peers:
        with pytest.raises(AssertionError, match=side):
            sides.check_same_work({**made, side: other[side]})


def test_step_scores_of_another_batch_are_refused(monkeypatch):
    plain = sides.step_logits_plain
    monkeypatch.setattr(sides, "step_logits_plain", lambda model, batch: plain(model, batch) + 1)
    with pytest.raises(AssertionError, match="logits 1.0e[+]00 apart"):
        sides.prm_sides("tiny", CPU, K=4, P=6, R=32)


def test_a_grpo_step_of_other_gradients_is_refused(monkeypatch):
    pytest.importorskip("trl")
    monkeypatch.setattr(sides, "grpo_loss", lambda *a: 2 * grpo_loss(*a))
    with pytest.raises(AssertionError, match="gradients 5.0e-01 apart"):
        sides.grpo_sides("tiny", CPU, B=2, K=4, P=6, new=5)


def test_equal_losses_with_other_gradients_are_refused():
    batch = sides.make_batch("tiny", [[6, [5, 5]]], CPU)
    made = sides.make_sides("group", "tiny", batch, ["minicot", "padded"])
    policy, loss = made["padded"]
    doubled = lambda: 2 * loss() - loss().detach()
    with pytest.raises(AssertionError, match="padded: gradients 1.0e[+]00 apart"):
        sides.check_same_work({**made, "padded": (policy, doubled)})


def test_lengths_resemble_gsm8k():
    lengths = np.array(sides.gsm8k_lengths(20_000))
    assert np.allclose(lengths.mean(0), [60.3, 94.0], rtol=0.02)  # with EOS
    assert np.allclose(lengths.std(0), [21.9, 42.2], rtol=0.05)
    padding = [16 * rows.max() / rows.sum() for rows in lengths.sum(1).reshape(-1, 16)]
    assert np.mean(padding) == pytest.approx(1.78, abs=0.05)  # as measured on the data


def test_the_table_names_each_row_once_for_both_devices():
    for device in ("cpu", "cuda"):
        rows = [(row.__name__, first, other) for row, first, other in bench.table(torch.device(device))]
        assert len({repr(row) for row in rows}) == len(rows)
        assert all(first[-1] in sides.MODELS for _, first, _ in rows)


def test_two_processes_share_a_step():
    (result,) = bench.processes_row("tiny", CPU, 1, rows=3, steps=1)
    assert result["peer"] == "one process" and len(result["ours"]) == 1 and result["ratio"][1] > 0
    assert result["tokens"] == sum(sum(pair) for pair in sides.gsm8k_lengths(3))


def test_shares_of_a_gpu_are_those_of_its_data_sheet(monkeypatch):
    monkeypatch.setattr(bench, "mfu", lambda model, speed, device: 1e-9 * speed)
    (result,) = bench.mfu_row("tiny", CPU, 1, rows=2, T=8)
    assert result["tokens"] == 2 * 8
    assert result["reached"] == {"MFU": pytest.approx(1e-9 * result["tokens_per_second"])}
    (result,) = bench.decode_row("tiny", CPU, 1, P=6, new=5)
    assert result["reached"] == {} and result["tokens"] == 5 and "| |" not in page.line(result)[:20]


def test_a_cuda_run_begins_with_what_is_worth_most_and_has_every_row():
    names = [bench.name_of(*row) for row in bench.table(torch.device("cuda"))]
    first = [next(name for name in names if words in name) for words in bench.WORTH[:4]]
    assert names[:4] == first and "toy" in names[-1]
    assert sorted(names) == sorted(set(names))
    on_cpu = {bench.name_of(*row) for row in bench.table(CPU)}
    kinds = {name.split()[0] for name in on_cpu} - {"processes_row"}
    assert {name.split()[0] for name in names} >= kinds | {"mfu_row", "decode_row"}


def test_a_row_that_would_begin_too_late_is_named(folder, capsys, monkeypatch):
    row = (bench.group_row, ["group", "tiny"], dict(B=1, K=2, P=4, R=3, peers=["padded"]))
    late = (bench.group_row, ["group", "tiny"], dict(B=1, K=3, P=4, R=3, peers=["padded"]))
    monkeypatch.setattr(bench, "table", lambda device: [row, late])
    bench.main(["cpu", "--rounds", "1", "--write", "--minutes", "1e-9"])
    named = "Not measured, as 1e-09 minutes were over: "
    out, run = capsys.readouterr().out, page.read_results()["cpu"]
    assert named in out and run["note"].startswith(named) and bench.name_of(*late) in run["note"]
    assert "--minutes 1e-09" in run["command"]
    bench.main(["cpu", "--rounds", "1", "--minutes", "60"])
    assert "Not measured" not in capsys.readouterr().out


def test_a_row_that_fails_is_named_and_the_others_are_measured(folder, capsys, monkeypatch):
    def fails(*_first, **_other):
        raise torch.OutOfMemoryError("no memory is left\nfor this")

    fails.__name__ = "sft_row"
    row = (bench.group_row, ["group", "tiny"], dict(B=1, K=2, P=4, R=3, peers=["padded"]))
    monkeypatch.setattr(bench, "table", lambda device: [(fails, ["tiny"], dict(rows=2)), row])
    with pytest.raises(SystemExit) as end:
        bench.main(["cpu", "--rounds", "1", "--write"])
    assert end.value.code == 1
    run = page.read_results()["cpu"]
    assert len(run["rows"]) == 1 and run["note"] == "Failed: sft_row tiny rows=2 (no memory is left)."


def test_the_memory_of_a_whole_training_is_said():
    said = memory.train("tiny", tokens=16, steps=2)
    assert said.startswith("tiny, 0M parameters, T 16, 2 steps: loss ") and " GiB, of which weights" in said


# ---- the projection ------------------------------------------------------------------------------


@pytest.mark.parametrize("K, P, R", [(1, 6, 5), (4, 6, 5), (8, 30, 7)])
def test_the_formula_counts_what_pytorch_counts(K, P, R, monkeypatch):
    """Of a step that runs. PyTorch counts a product for each pair of a query and a key, hidden or not."""
    monkeypatch.setattr(scoring, "pays", lambda packed, config: True)
    config = sides.MODELS["tiny"]
    counted, both = projection.measured(
        sides.our_model("tiny", CPU), sides.make_batch("tiny", [[P, [R] * K]], CPU)
    )
    shared = P if K > 1 else 0
    rest = P + R - shared
    pairs = shared**2 + K * rest * (shared + rest)
    assert counted == projection.forward(config, shared + K * rest, K * R, pairs)
    assert both == 3 * counted
    # what the page counts: without the hidden pairs
    whole = projection.group(config, P, R, K)
    hidden = pairs - (P**2 / 2 + K * (R * P + R**2 / 2))
    if K > 1:
        assert counted - whole == pytest.approx(projection.forward(config, 0, 0, hidden))


def test_a_7b_model_has_7b_weights_and_hours_by_hand():
    layers, head = projection.weights(projection.LLAMA2_7B)
    assert layers == 32 * (4 * 4096**2 + 3 * 4096 * 11008) and layers + head == pytest.approx(6.6e9, rel=0.01)
    hours, a = projection.stages(), projection.Assumed()
    # 6 N a token but for attention, and for the head, which reads the responses alone
    tokens = 3 * 7473 * (60 + 8 * 94)
    assert hours["AFT, 3 epochs"] == pytest.approx(6 * 6.6e9 * tokens / (0.4 * 989e12) / 3600, rel=0.02)
    assert hours["AFT without shared prompts"] / hours["AFT, 3 epochs"] == pytest.approx(
        8 * 154 / 812, rel=0.02
    )
    step = (2 * 6.6e9 + 4 * 32 * 4096 * 256 * (47 + 60 / 8)) / (0.5 * 3.35e12)  # bytes: the longer of the two
    assert step > 2 * 6.6e9 * 256 / (0.4 * 989e12)
    drawn = 7473 * 8 * 94 / 256 * step + 7473 * 2 * 6.5e9 * 60 / (0.4 * 989e12)
    assert hours["sampling, 8 a question"] == pytest.approx(drawn / 3600, rel=0.02)
    assert hours["all"] == pytest.approx(sum(list(hours.values())[:4])) and a.peak == 989e12


def test_the_projections_page_is_what_its_functions_say():
    text = projection.PAGE.read_text()
    assert f"<!-- work -->\n{projection.work()}\n<!-- end -->" in text
    assert f"<!-- hours -->\n{projection.table()}\n<!-- end -->" in text


# ---- the page ------------------------------------------------------------------------------------


def test_the_page_is_what_the_results_and_the_hand_written_part_make():
    text = (page.FOLDER / "README.md").read_text()
    assert text == page.render(page.read_results(), page.hand_written())
    for run in page.read_results().values():
        assert run["rows"] and all(page.line(row) in text for row in run["rows"])
        assert f"commit {run['commit']}, {run['dtype']}; torch {run['versions']['torch']}" in text


def test_every_row_of_the_page_is_one_of_the_table_that_is_raced():
    raced = [(first, other) for _, first, other in bench.table(CPU)]
    models = {first[-1] for first, _ in raced}
    rows = page.read_results()["cpu"]["rows"]
    assert {row["model"] for row in rows} == models
    for row in rows:
        low, middle, high = row["ratio"]
        assert low <= middle <= high
        if row["unit"] == "bytes":
            assert middle == pytest.approx(row["theirs"][0] / row["ours"][0], rel=0.01)
        for name, bound in row.get("bounds", {}).items():
            if "reached" in row:
                assert row["reached"][name] == pytest.approx(middle / bound, abs=0.01)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A page's folder of its own, and a table of one small row."""
    monkeypatch.setattr(page, "FOLDER", tmp_path)
    row = (bench.group_row, ["group", "tiny"], dict(B=1, K=2, P=4, R=3, peers=["padded"]))
    monkeypatch.setattr(bench, "table", lambda device: [row])
    (tmp_path / "README.md").write_text(f"old\n{page.BEGIN}\nSlow, but why?\n{page.END}\nold\n")
    return tmp_path


def test_a_whole_run_becomes_results_and_page_and_keeps_what_was_written_by_hand(folder, capsys):
    (folder / "results.json").write_text(json.dumps({"cuda": run_of("a GPU")}))
    bench.main(["cpu", "--rounds", "2", "--write"])
    results = page.read_results()
    assert results["cuda"] == run_of("a GPU")  # the other device's run stays
    run, text = results["cpu"], (folder / "README.md").read_text()
    assert run["command"] == "python -m tests.bench cpu --rounds 2 --write" and len(run["rows"]) == 1
    assert page.line(run["rows"][0]) in text and page.line(run["rows"][0]) in capsys.readouterr().out
    assert f"{page.BEGIN}\nSlow, but why?\n{page.END}" in text and "old" not in text
    (folder / "README.md").write_text(text.replace("but why?", "and why."))
    bench.main(["--page"])
    assert (folder / "README.md").read_text() == text.replace("but why?", "and why.")


def test_a_part_of_the_rows_takes_the_place_of_its_own_alone(folder):
    bench.main(["cpu", "--rounds", "1", "--write"])
    whole = page.read_results()["cpu"]
    [row] = whole["rows"]
    other = row | {"model": "another"}
    (folder / "results.json").write_text(json.dumps({"cpu": whole | {"rows": [row | {"tokens": -1}, other]}}))
    bench.main(["cpu", "--rounds", "2", "--write", "--only", "group"])
    run = page.read_results()["cpu"]
    assert run["rows"][1] == other and run["command"] == whole["command"]
    assert run["rows"][0]["tokens"] == row["tokens"] and len(run["rows"][0]["ours"]) == 2
    assert run["rows"][0]["commit"] == run["commit"]


def run_of(device):
    row = dict(work="SFT step", model="m", shape="s", peer="p", unit="seconds", ratio=[1.0, 2.0, 3.0])
    row |= dict(ours=[1.0], theirs=[2.0], tokens_per_second=5.0, commit="b2")
    versions = {"torch": "2", "trl": None}
    return dict(command="c", commit="a1", device=device, dtype="d", versions=versions, rows=[row, row])


def test_the_page_says_which_rows_are_of_another_commit_and_which_peer_is_missing():
    text = page.section(run_of("a GPU"))
    assert "Of commit b2: SFT step m s." in text and "commit a1, d; torch 2, no trl, no rows of it." in text


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--write"], "no part between <!-- hand-written -->"),
        (["--page"], "no part between <!-- hand-written -->"),
        (["--write", "--only", "group"], "no whole run of cpu is there"),
    ],
)
def test_what_would_lose_something_is_refused_before_any_work(folder, argv, message, capsys):
    (folder / "README.md").write_text("nothing by hand")
    with pytest.raises(SystemExit):
        bench.main(argv)
    assert message in capsys.readouterr().err
    assert (folder / "README.md").read_text() == "nothing by hand" and not (folder / "results.json").exists()
