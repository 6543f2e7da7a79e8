"""Speed and memory beside peers: python -m tests.bench [cpu|cuda] [--only REGEX] [--rounds N] [--minutes M]
[--write]

Prints one Markdown table; with --write it also becomes results.json and README.md beside this file: a whole
run, or with --only the rows of that name, beside those of a run before on the same machine.
That page says what is raced and how to read it, sides.py what each side computes. On CUDA the rows come in
the order of their worth (WORTH), so that --minutes 20 measures what matters most; rows left out are named.

CPU: float32. CUDA: steps in bfloat16 autocast over float32 weights, generation with bfloat16 weights.
TRL needs tests/bench/requirements.txt; without it there are no rows of it. No timed test: this is a table to
read.
P prompt tokens   R response tokens   K responses a prompt   n samples a prompt   V vocabulary
"""

import os

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # as the scripts do it
os.environ.setdefault("TQDM_DISABLE", "1")

import argparse
import importlib.metadata
import importlib.util
import json
import re
import statistics
import subprocess
import time
import warnings

import torch

from minicot.sampling import generate
from minicot.training import mfu
from tests.bench import memory, page, ranks, sides
from tests.bench.sides import (
    WITH_TOWER,
    check_same_work,
    grpo_sides,
    gsm8k_lengths,
    make_batch,
    make_sides,
    multiplications,
    policy_sides,
    prm_sides,
)
from tests.bench.sides import our_model, step, their_model


BANDWIDTH = {"A100": 2.0e12, "H100": 3.35e12, "H200": 4.8e12}  # bytes a second, from the data sheets
WORTH = (  # CUDA: what of the names comes first
    "group_row group SmolLM2-135M B=8 K=8 P=512",
    "mfu_row",
    "generation_row SmolLM2-135M P=256 n=8",
    "decode_row",
    "group_row DPO SmolLM2-135M B=16 K=2 P=512",
    "sft_row SmolLM2-135M rows",
    "memory_row group SmolLM2-135M",
    "SmolLM2-135M",
    "",
)


def in_turn(sides, device, rounds):
    """{side: function} -> {side: seconds of each round}, all sides once a round; at most 3 rounds where a
    step takes more than 10 seconds. On CUDA two uncounted rounds come first (kernels are compiled)."""
    seconds = {side: [] for side in sides}
    warm_up, wait = (2, torch.cuda.synchronize) if device.type == "cuda" else (0, lambda: None)
    while len(seconds["minicot"]) < warm_up + rounds:
        for side, work in sides.items():
            wait()
            start = time.perf_counter()
            work()
            wait()
            seconds[side].append(time.perf_counter() - start)
        if max(times[-1] for times in seconds.values()) > 10:
            rounds = min(rounds, 3)
    return {side: times[warm_up:] for side, times in seconds.items()}


def against(seconds, tokens, **about):
    """Seconds of all sides -> a result for each peer."""
    ours = seconds["minicot"]
    for peer in list(seconds)[1:]:
        ratios = [b / a for a, b in zip(ours, seconds[peer])]
        yield dict(
            **about,
            peer=peer,
            unit="seconds",
            ours=ours,
            theirs=seconds[peer],
            tokens=tokens,
            ratio=[min(ratios), statistics.median(ratios), max(ratios)],
            tokens_per_second=tokens / statistics.median(ours),
        )


# ---- the rows ------------------------------------------------------------------------------------


def step_row(work, model, lengths, peers, device, rounds, **about):
    """Forward and backward of one batch, no optimizer; making the batch is not timed, packing it is."""
    batch = make_batch(model, lengths, device)
    sides = make_sides(work, model, batch, ["minicot", *peers])
    check_same_work(sides)
    seconds = in_turn({side: lambda pair=pair: step(*pair) for side, pair in sides.items()}, device, rounds)
    yield from against(seconds, int(batch.pad_mask.sum()), work=f"{work} step", model=model, **about)


def sft_row(model, device, rounds, *, rows):
    """`rows` rows with lengths as in GSM8K, in random order: packed by score(), padded by transformers. A
    model with a tower gets a picture a row on top; all of it learns."""
    lengths = [[P, [R]] for P, R in gsm8k_lengths(rows)]
    yield from step_row(
        "SFT",
        model,
        lengths,
        ["transformers"] if model.endswith(WITH_TOWER) else ["padded", "transformers"],
        device,
        rounds,
        rows=rows,
        P="GSM8K",
        R="GSM8K",
        K=1,
        shape=f"{rows} rows as GSM8K",
    )


def group_row(work, model, device, rounds, *, B, K, P, R, peers):
    """B groups of one prompt and K responses: DPO (K = 2) or AFT. Nothing is padded, as all lengths are
    equal. Two bounds on what sharing prompts can give over "padded": the token bound, as if all work were a
    token's own, and the work bound, which counts what sharing doesn't spare: the head on scored tokens, and
    each response's attention to the prompt."""
    work_bound = multiplications(model, K, P, R, shared=False) / multiplications(model, K, P, R, shared=True)
    bounds = {"tokens": K * (P + R) / (P + K * R), "work": work_bound}
    for result in step_row(
        work,
        model,
        [[P, [R] * K]] * B,
        peers,
        device,
        rounds,
        B=B,
        P=P,
        R=R,
        K=K,
        shape=f"B {B}, K {K}, P/R {P}/{R}",
        bounds=bounds,
    ):
        reached = {name: result["ratio"][1] / bound for name, bound in bounds.items()}
        yield result | ({"reached": reached} if result["peer"] == "padded" else {})


def generation_row(model, device, rounds, *, prompts, P, n, new):
    """Sampling at temperature 1 without a stop id, prefill included. Before: equal greedy ids in float32."""
    ours = our_model(model, device).eval()
    theirs = their_model(ours).eval()
    ids = torch.randint(1, ours.config.vocab_size, (prompts, P), generator=torch.Generator().manual_seed(1))
    few = ids[:2, :16]
    greedy = generate(ours, few.tolist(), n=2, max_new_tokens=8, temperature=0, stop_ids=[], seed=0)
    drawn = theirs.generate(
        few.to(device), attention_mask=torch.ones_like(few).to(device), do_sample=False, max_new_tokens=8
    )
    assert greedy == [[row, row] for row in drawn[:, few.shape[1] :].tolist()], "greedy ids differ"
    if device.type == "cuda":
        ours, theirs = ours.bfloat16(), theirs.bfloat16()
    there = dict(input_ids=ids.to(device), attention_mask=torch.ones_like(ids).to(device))

    def run_ours():
        generate(ours, ids.tolist(), n=n, max_new_tokens=new, stop_ids=[], seed=0)

    @torch.inference_mode()
    def run_theirs():
        theirs.generate(
            **there, do_sample=True, top_k=0, max_new_tokens=new, min_new_tokens=new, num_return_sequences=n
        )

    seconds = in_turn({"minicot": run_ours, "transformers": run_theirs}, device, rounds)
    yield from against(
        seconds,
        prompts * n * new,
        work="generate",
        model=model,
        P=P,
        R=new,
        K=None,
        n=n,
        prompts=prompts,
        shape=f"{prompts} prompts, P {P}, n {n}, {new} new",
    )


def grpo_row(model, device, rounds, *, B, K, P, new):
    """A whole GRPO step, rollouts and update, beside TRL's with transformers' generate."""
    seconds = in_turn(grpo_sides(model, device, B=B, K=K, P=P, new=new), device, rounds)
    shape, tokens = f"B {B}, K {K}, P {P}, {new} new", B * K * (P + new)
    yield from against(
        seconds, tokens, work="GRPO step", model=model, B=B, K=K, P=P, n=K, new=new, shape=shape
    )


def prm_row(model, device, rounds, *, K, P, R):
    """A PRM's scores of the steps of K solutions to one question, beside one padded forward."""
    seconds = in_turn(prm_sides(model, device, K=K, P=P, R=R), device, rounds)
    shape, bounds = f"{K} solutions, P/R {P}/{R}", {"tokens": K * (P + R) / (P + K * R)}
    about = dict(work="PRM scoring", model=model, B=1, K=K, P=P, R=R, shape=shape, bounds=bounds)
    for result in against(seconds, K * (P + R), **about):
        yield result | {"reached": {"tokens": result["ratio"][1] / bounds["tokens"]}}


def policy_row(model, device, rounds, *, B, R, k, new):
    """A step of CoT-Influx's pruner beside the naive loop: one prompt at a time, its shots encoded anew."""
    seconds = in_turn(policy_sides(model, device, B=B, R=R, k=k, new=new), device, rounds)
    shape = f"B {B}, {R} repeats, {k} shots, {new} new"
    yield from against(seconds, B * R * new, work="policy step", model=model, B=B, R=R, K=k, shape=shape)


def mfu_row(model, device, rounds, *, rows, T):
    """SFT on rows of T tokens, half of them scored; reached: of the GPU's dense bfloat16 peak."""
    about = dict(rows=rows, P=T // 2, R=T // 2, K=1, shape=f"{rows} rows of {T}")
    for result in step_row(
        "SFT", model, [[T // 2, [T // 2]]] * rows, ["transformers"], device, rounds, **about
    ):
        reached = mfu(our_model(model, "meta"), result["tokens_per_second"], device)
        yield result | ({"reached": {"MFU": reached}} if reached else {})


def decode_row(model, device, rounds, *, P, new):
    """One sequence, whose every step reads all weights; reached: of the GPU's memory bandwidth.
    (Prefill counts as time in which nothing is read.)"""
    for result in generation_row(model, device, rounds, prompts=1, P=P, n=1, new=new):
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
        peak = next((speed for gpu, speed in BANDWIDTH.items() if gpu in name), None)
        read = new * 2 * sum(p.numel() for p in our_model(model, "meta").parameters())
        reached = {"bandwidth": read / statistics.median(result["ours"]) / peak} if peak else {}
        yield result | {"reached": reached}


def processes_row(model, _device, rounds, *, rows, steps=2):
    """SFT steps of two processes beside one, each of one thread, the first step of a start not counted."""
    seconds = {"minicot": [], "one process": []}
    for _ in range(rounds):
        for side, processes in (("minicot", 2), ("one process", 1)):
            job = dict(model=model, rows=rows, count=1 + steps, compile=sides.COMPILE)
            seconds[side].append(statistics.median(ranks.measure(processes, **job)[1:]))
    tokens = sum(P + R for P, R in gsm8k_lengths(rows))
    about = dict(rows=rows, K=1, P="GSM8K", R="GSM8K", shape=f"{rows} rows as GSM8K, 2 processes")
    yield from against(seconds, tokens, work="SFT step", model=model, **about)


def memory_row(work, model, device, _rounds, *, rows, K, P, R, peers):
    """Peak memory of a step above weights and batch, each side in a process of its own."""
    lengths = [[p, [r]] for p, r in gsm8k_lengths(rows)] if P == "GSM8K" else [[P, [R] * K]] * (rows // K)
    shape = f"{rows} rows as GSM8K" if P == "GSM8K" else f"B {rows // K}, K {K}, P/R {P}/{R}"
    job = dict(work=work, model=model, lengths=lengths, device=device.type, compile=sides.COMPILE)
    peaks = {side: memory.peak(**job, side=side) for side in ("minicot", *peers)}
    for peer in peers:
        ratio = peaks[peer] / peaks["minicot"]
        yield dict(
            work=f"memory of a {work} step",
            model=model,
            shape=shape,
            rows=rows,
            K=K,
            P=P,
            R=R,
            peer=peer,
            unit="bytes",
            ours=[peaks["minicot"]],
            theirs=[peaks[peer]],
            ratio=[ratio] * 3,
        )


def table(device):
    """[(row function, its first arguments, its other arguments)]."""
    cuda, toy = device.type == "cuda", "toy 1M"
    large = "SmolLM2-135M" if cuda else "SmolLM2-135M, 4 layers"
    trl = ["TRL"] if importlib.util.find_spec("trl") else []
    both = ["padded", "transformers"]
    scale = 8 if cuda else 1  # a GPU wants larger batches
    rows = []
    for model in (toy, large):
        B, n_rows = scale * (2 if model == toy else 1), 16 * (4 if cuda else 1)
        rows.append((sft_row, [model], dict(rows=n_rows)))
        rows.append((sft_row, [model + WITH_TOWER], dict(rows=n_rows)))
        for P in (64, 512):
            rows.append((group_row, ["DPO", model], dict(B=2 * B, K=2, P=P, R=128, peers=both + trl)))
        for P in (64, 512, 1024):
            peers = both if P < 1024 or model == toy or cuda else ["padded"]
            rows.append((group_row, ["group", model], dict(B=B, K=8, P=P, R=128, peers=peers)))
        for n, P in ((1, 64), (1, 256), (8, 256), (32, 256)):
            prompts = 32 if n < 32 or cuda else 4  # on a CPU a round of 32 prompts would take minutes
            rows.append((generation_row, [model], dict(prompts=prompts, P=P, n=n, new=48)))
        rows.append((prm_row, [model], dict(K=32, P=256, R=64)))
        rows.append((policy_row, [model], dict(B=2 * B, R=10, k=4, new=48)))
        for P in (64, 256) if trl else []:
            rows.append((grpo_row, [model], dict(B=2 * B, K=8, P=P, new=48)))
        plain = ["plain", "transformers"]
        rows.append((memory_row, ["SFT", model], dict(rows=n_rows, K=1, P="GSM8K", R="GSM8K", peers=plain)))
        for work, K, groups, peers in (("DPO", 2, 2 * B, plain + trl), ("group", 8, B, plain)):
            rows.append((memory_row, [work, model], dict(rows=groups * K, K=K, P=512, R=128, peers=peers)))
        rows.append(
            (
                memory_row,
                ["SFT", model + WITH_TOWER],
                dict(rows=n_rows, K=1, P="GSM8K", R="GSM8K", peers=plain),
            )
        )
    if cuda:
        rows.append((mfu_row, ["Llama 1.1B"], dict(rows=4, T=2048)))
        rows.append((decode_row, ["Llama 1.1B"], dict(P=256, new=256)))
        rows.sort(key=lambda row: next(i for i, words in enumerate(WORTH) if words in name_of(*row)))
    else:
        rows.append((processes_row, [large], dict(rows=16)))
        rows.append((group_row, ["DPO", toy], dict(B=1, K=2, P=512, R=128, peers=both)))
        # all layers: the head weighs less, as it does on a GPU
        rows.append((group_row, ["group", "SmolLM2-135M"], dict(B=1, K=8, P=512, R=128, peers=["padded"])))
    return rows


# ---- the run -------------------------------------------------------------------------------------


def name_of(function, first, other):
    """What --only searches and --list shows."""
    sizes = [f"{key}={value}" for key, value in other.items() if key in ("rows", "B", "K", "P", "R", "n")]
    return " ".join([function.__name__, *first, *sizes])


def about(kind, rounds):
    """Where a run comes from: command, commit, device, dtype, versions."""
    cuda = kind == "cuda"
    git = ["git", "-C", str(page.FOLDER), "describe", "--always", "--dirty"]
    return {
        "command": f"python -m tests.bench {kind} --rounds {rounds} --write",
        "commit": subprocess.run(git, capture_output=True, text=True).stdout.strip() or "unknown",
        "device": torch.cuda.get_device_name() if cuda else f"CPU, {torch.get_num_threads()} threads",
        "dtype": "bfloat16 autocast (generation: bfloat16 weights)" if cuda else "float32",
        "versions": {
            name: found and importlib.metadata.version(name).partition("+")[0]
            for name in ("torch", "transformers", "trl")
            for found in [importlib.util.find_spec(name)]
        },
    }


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__.splitlines()[0])
    parser.add_argument("device", nargs="?", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument(
        "--only", default="", help="rows whose name matches (see --list); --write keeps the others"
    )
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--compile", action="store_true", help="minicot's layers compiled, as by --compile")
    parser.add_argument("--minutes", type=float, default=0, help="begin no row after so long (0 = no limit)")
    parser.add_argument("--write", action="store_true", help="keep it: results.json and README.md")
    parser.add_argument("--page", action="store_true", help="make README.md from results.json, run nothing")
    args = parser.parse_args(argv)
    if args.write and args.only and args.device not in page.read_results():
        parser.error(f"--only replaces rows of a whole run; no whole run of {args.device} is there")
    if args.write or args.page:
        try:
            page.hand_written()  # before hours of work
        except ValueError as error:
            parser.error(str(error))
    if args.page:
        page.write_page()
        return
    device, sides.COMPILE = torch.device(args.device), args.compile
    named = [(name_of(*row), *row) for row in table(device)]
    chosen = [row for row in named if re.search(args.only, row[0])]
    if args.list or not chosen:
        print("\n".join(row[0] for row in named))
        return
    run = about(args.device, args.rounds) | {"rows": []}
    if args.write and args.only:
        kept = page.read_results()[args.device]
        for key in ("device", "dtype", "versions"):
            if run[key] != kept[key]:
                parser.error(f"{key} is {run[key]}, of the run that is there {kept[key]}; allowed: the same")
    if args.minutes:
        run["command"] += f" --minutes {args.minutes:g}"
    run["command"] += " --compile" * args.compile
    print(json.dumps({key: value for key, value in run.items() if key not in ("command", "rows")}))
    print(f"\n{page.HEADER}")
    warnings.filterwarnings("ignore")  # peers' advice would fall into the table
    start, left_out, failed = time.perf_counter(), [], []
    for name, function, first, other in chosen:
        if args.minutes and time.perf_counter() - start > 60 * args.minutes:
            left_out.append(name)
            continue
        if args.compile:
            torch._dynamo.reset()  # a row's kernels are of use to no other
        try:
            for result in function(*first, device, args.rounds, **other):
                print(page.line(result), flush=True)
                run["rows"].append(result)
        except subprocess.CalledProcessError as error:  # a child, which has said itself what is wrong
            failed.append(f"{name} (a process of its own ended with {error.returncode})")
        except (RuntimeError, AssertionError) as error:  # out of memory, or sides that do not agree
            failed.append(f"{name} ({(str(error) or type(error).__name__).splitlines()[0]})")
    late = f"Not measured, as {args.minutes:g} minutes were over"
    notes = [f"{why}: {'; '.join(names)}." for why, names in (("Failed", failed), (late, left_out)) if names]
    if notes:
        run["note"] = " ".join(notes)
        print(f"\n{run['note']}")
    if args.write:
        page.write_results(args.device, run, part=bool(args.only))
    if failed:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
