"""Learn from groups of responses: RFT, DPO, IPO, RRHF, PRO and AFT on given ones, GRPO on the policy's own.

    python align.py                                 # AFT on what train.py left -> runs/aft; before and after
    python align.py --method dpo --beta 0.1 --init runs/sft --samples runs/samples.jsonl --out runs/dpo
    python align.py --method rrhf --constraint boundary --margin 0.1
    python align.py --method grpo --normalisation dapo --clip-high 0.28 --resample 4
    python align.py --method grpo --reward ps-grpo --verifier runs/prm --kl 0.003   # or mean, or steps

A new loss is one pure function in minicot/losses.py and one row in METHODS below; the loop does not change.
B groups (problems), K responses of the largest, N rows (all responses), T tokens.
"""

import os
import time

# before torch loads: waiting threads spin briefly, then sleep (tests/bench/README.md says what it is worth)
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Callable, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm import tqdm

from minicot.config import AlignConfig, check, run
from minicot.data import Batch, check_pictures, collate, encode_row, image_reader, make_groups, pairs
from minicot.data import peek, readable, schedule, seed_of, target, longest_row, to_groups, truncate_words
from minicot.errors import InputError
from minicot.evaluation import compare, how_to_ask, keep_before, measure
from minicot.losses import aft_loss, better_than, clipped, dpo_loss, group_advantages, grpo_loss, ipo_loss
from minicot.losses import k3, pro_loss, rrhf_loss, sequence_logps, sft_loss
from minicot.metrics import repeated_4grams
from minicot.parallel import first, means, put_together, quiet, said, size, spread, total, wrap
from minicot.records import read_samples, samples_to_row
from minicot.rewards import mean_reward, outcome, ps_grpo_reward
from minicot.rollouts import from_policy, from_samples, plan_rollouts, questions
from minicot.sampling import sample_groups
from minicot.scoring import score
from minicot.sets import default_length, read_problems, refuse_shared
from minicot.tokenizer import Tokenizer
from minicot.runs import Log, Run, check_out, load_checkpoint, write_jsonl, written_beside
from minicot.training import autocast, clip_gradients, digest_of, make_optimizer
from minicot.training import pick_device, refuse_non_finite, report_unreadable, resolve, set_layers, set_lr
from minicot.training import train_first, train_only, weights_digest
from minicot.verifier import reward_scores
from minicot.weights import load_model


# ---- the methods ---------------------------------------------------------------------------------


class Groups(NamedTuple):
    """What a loss may look at: tables over B questions and up to K responses each, and the tokens below."""

    scores: torch.Tensor  # (B,K) mean log-probability a token: s_i of RRHF, PRO and AFT
    logps: torch.Tensor  # (B,K) summed log-probability: log pi(y|x) of DPO
    ref_logps: torch.Tensor  # (B,K) the same under the reference model (0 where the method needs none)
    rewards: torch.Tensor  # (B,K)
    present: torch.Tensor  # (B,K) bool: takes part in the ranking
    better: torch.Tensor  # (B,K,K) bool: response i is strictly better than response j
    token_logps: torch.Tensor  # (N,T) log-probability of each token, for what needs more than sums
    old_token_logps: torch.Tensor  # (N,T) the same before the first step on these groups
    ref_token_logps: torch.Tensor | None  # (N,T) the same under the reference model, where GRPO has one
    mean_length: float  # scored tokens a response, in all of the step
    batch: Batch  # whose rows they are: loss_mask (N,T), group and slot (N,), correct (B,K), ...


@dataclass(frozen=True)
class Method:
    """A loss on groups, and what its paper puts around it."""

    loss: Callable | None  # (Groups, AlignConfig, {constraint, margin}) -> (B,); None: the SFT term alone
    sft: str | None = None  # rows of the SFT term: "reference", "best", "right", or no such term
    sft_mean: str = "tokens"  # mean over the step's trained tokens, or over its "groups"
    sft_weight: Callable = lambda l: 1.0  # its weight, given a group's number of responses l
    constraint: str | None = None  # as in its paper; None: it takes no constraint
    pairs: bool = False  # groups are right x wrong pairs, the chosen one first
    ref: bool = False  # needs a reference model
    reward: Callable | None = None  # Response -> float: on-policy, groups are drawn in the loop; see roll_out


NORMALISATIONS = {  # of GRPO: scale of the advantages, denominator; the equations stand in losses.grpo_loss
    "grpo": ("std", lambda g, c: None),
    "dr-grpo": ("none", lambda g, c: c.max_new_tokens),
    "dapo": ("std", lambda g, c: g.mean_length),
}


def advantages(g, c):
    """(N,T): of each token its response's, under --normalisation; with --reward steps its step's."""
    if g.batch.advantages is not None:
        return g.batch.advantages
    scale, _ = NORMALISATIONS[c.normalisation]
    of_rows = group_advantages(g.rewards, g.present, scale=scale)[g.batch.group, g.batch.slot]
    return of_rows[:, None].expand_as(g.batch.loss_mask)


def grpo(g, c, _):
    """GRPO's loss a group, the mean over its responses. (Each group has --k of them, so the mean over the
    groups is the mean over the step's responses.)"""
    _, denominator = NORMALISATIONS[c.normalisation]
    losses = grpo_loss(
        g.token_logps,
        g.old_token_logps,
        g.ref_token_logps,
        advantages(g, c),
        g.batch.loss_mask,
        **dict(clip_low=c.clip_low, clip_high=c.clip_high, kl=c.kl, denominator=denominator(g, c)),
    )
    return to_groups(losses, g.batch).sum(1) / g.present.sum(1)


REWARDS = {  # of GRPO, by --reward: what a Response is worth that --verifier has judged; see rewards.py
    "outcome": lambda r, c: outcome(r),  # the verifier is watched, not asked
    "ps-grpo": lambda r, c: ps_grpo_reward(outcome(r), r.step_scores["prm"], rho=c.rho, gamma=c.gamma),
    "mean": lambda r, c: mean_reward(outcome(r), r.step_scores["prm"]),
    "steps": lambda r, c: mean_reward(outcome(r), r.step_scores["prm"]),  # logged; see rollouts.as_drawn
}
METHODS = {  # g: Groups, c: the flags, k: constraint and margin
    "rft": Method(None, sft="right"),
    "rrhf": Method(lambda g, c, k: rrhf_loss(g.scores, g.better, **k), sft="best", constraint="none"),
    "aft": Method(lambda g, c, k: aft_loss(g.scores, g.better, **k), sft="reference", constraint="detached"),
    "pro": Method(
        lambda g, c, k: pro_loss(g.scores, g.rewards, g.present, **k),
        **dict(sft="best", sft_mean="groups", sft_weight=lambda l: 0.05 * (l - 1) ** 2, constraint="none"),
    ),
    "dpo": Method(
        lambda g, c, k: dpo_loss(g.logps, g.ref_logps, beta=c.beta, label_smoothing=c.label_smoothing, **k),
        **dict(pairs=True, ref=True, constraint="none"),
    ),
    "ipo": Method(lambda g, c, k: ipo_loss(g.logps, g.ref_logps, beta=c.beta), pairs=True, ref=True),
    "grpo": Method(grpo, reward=outcome),
}


def tabulate(token_logps, micro, mean_length, reference_in_positives):
    """Token log-probabilities (N,T) of a Micro -> Groups."""
    batch, present = micro.batch, micro.batch.present
    if not reference_in_positives:
        present = present & ~to_groups(batch.is_reference.long(), batch).bool()
    sums = to_groups(sequence_logps(token_logps, batch.loss_mask, reduce="sum"), batch)
    return Groups(
        scores=to_groups(sequence_logps(token_logps, batch.loss_mask, reduce="mean"), batch),
        logps=sums,
        ref_logps=torch.zeros_like(sums) if micro.ref_logps is None else to_groups(micro.ref_logps, batch),
        rewards=batch.rewards,
        present=present,
        better=better_than(batch.rewards, present),
        token_logps=token_logps,
        old_token_logps=micro.old_token_logps,
        ref_token_logps=micro.ref_token_logps,
        mean_length=mean_length,
        batch=batch,
    )


def sft_rows(batch, which):
    """(N,) bool: the rows that the SFT term trains."""
    if which == "reference":
        return batch.is_reference
    if which == "right":
        return (batch.correct == 1)[batch.group, batch.slot]
    if which == "best":  # the highest reward, the first of equals
        best = batch.rewards.masked_fill(~batch.present, -torch.inf).argmax(1)
        return batch.slot == best[batch.group]
    return torch.zeros_like(batch.is_reference)


def count(batches, method):
    """Of a step's batches on all ranks: groups, rows, scored tokens, those of the SFT term, all tokens."""
    counts = [
        (
            len(batch.problem_ids),
            len(batch.ids),
            int(batch.loss_mask.sum()),
            int(batch.loss_mask[sft_rows(batch, method.sft)].sum()),
            int(batch.pad_mask.sum()),
        )
        for batch in batches
    ]
    return total(*(sum(one[i] for one in counts) for i in range(5)))


def sft_term(table, method, weight, n_tokens, n_groups):
    """The SFT term of a micro-batch; n_tokens, n_groups count the whole step's. weight None: the paper's."""
    batch, logps = table.batch, table.token_logps
    rows = sft_rows(batch, method.sft)
    if not rows.any():
        return logps.new_zeros(())
    sizes = batch.present.sum(1).tolist()
    weights = logps.new_tensor([method.sft_weight(l) if weight is None else weight for l in sizes])
    return sft_loss(
        logps * weights[batch.group][:, None],
        batch.loss_mask & rows[:, None],
        n_tokens=n_tokens if method.sft_mean == "tokens" else n_groups,
    )


# ---- samples, and what is made of them ----------------------------------------------------------


def sample_now(run, folder, model, tokenizer, problems, asking, device):
    """--k responses a problem by the model itself -> Samples, in the run's samples.jsonl as well."""
    run.begin(folder)
    with autocast(run.config, device):
        settings = dict(n=run.config.k, temperature=run.config.temperature, seed=run.config.seed, **asking)
        stream = sample_groups(model, tokenizer, problems, **settings)
        samples = list(tqdm(stream, total=len(problems), desc="sampling", unit="problem", disable=quiet()))
    file = run.out / "samples.jsonl"
    write_jsonl(file, map(samples_to_row, samples))
    print(f"{len(samples)} problems, {run.config.k} responses each -> {file} (another run: --samples {file})")
    return samples


def read_groups(config, method, samples, tokenizer, model, reader):
    """Samples -> (groups of Rows: pairs for DPO and IPO, right responses for RFT, else all distinct ones;
    counts of what was left out)."""
    if method.pairs:
        window = (config.pair_low, config.pair_high)
        samples = pairs(samples, max_pairs=config.max_pairs, window=window, seed=config.seed)
    if config.truncate_words:
        samples = truncate_words(samples, config.truncate_words)
    context, vocabulary = model.config.max_position_embeddings, model.config.vocab_size
    groups, counts = make_groups(
        tokenizer,
        samples,
        mode=config.mode,
        max_length=longest_row(context, [group.problem for group in samples], reader),
        reference=config.reference and not method.pairs,
    )
    if method.pairs:  # a pair that lost a member is none
        unbroken = [group for group in groups if len(group) == 2]
        counts["broken pairs"], groups = len(groups) - len(unbroken), unbroken
    if method.loss is None:
        groups = [right for group in groups if (right := [row for row in group if row.correct])]
    check(groups, "--samples", config.samples, f"samples that {config.method} can use; left out: {counts}")
    check_pictures(groups, reader, config.samples or config.data)
    largest = max(max(row.ids) for group in groups for row in group)
    allowed = f"samples of this tokenizer, with ids below {vocabulary}"
    check(largest < vocabulary, "--samples", config.samples, allowed)
    if config.peek:
        peek(tokenizer, groups[: config.peek])
    return groups, counts


def plan(groups, config):
    """Which groups make which step: a list of lists of indices."""
    n_groups = config.steps * config.batch_size or int(config.epochs * len(groups))
    check(n_groups > 0, "--epochs", config.epochs, f"enough for one of the {len(groups)} groups")
    lengths = [max(len(row.ids) for row in group) for group in groups]
    return schedule(lengths, config.batch_size, n_groups, seed_of(config.seed, "order"))


# ---- reference log-probabilities: computed once, kept --------------------------------------------


@torch.no_grad()
def reference_logps(run, folder, tokenizer, groups, reader, device):
    """Summed log-probabilities under the reference model, a tensor (responses,) a group. Read from
    --ref-logps where it holds those of the same weights, tokenizer, rows and dtype; refused where of others;
    else computed."""
    config, folder = run.config, resolve(run.config.ref or folder)
    path = Path(config.ref_logps or run.out / "ref_logps.safetensors")
    key = " ".join([weights_digest(folder), digest_of(tokenizer, groups), config.dtype])
    if path.is_file():
        try:
            with safe_open(path, "pt") as file:
                key_there, flat = (file.metadata() or {}).get("key"), file.get_tensor("logps")
        except SafetensorError as error:
            raise InputError(f"{path}: not a file of reference log-probabilities ({error})") from None
        if key_there != key:
            raise InputError(
                f"{path} holds reference log-probabilities of other weights, data or tokenizer, or of "
                "another --dtype; allowed: another --ref-logps file, or delete it"
            )
    else:
        model = load_ref(folder, config, device)

        def sums(parts):
            for part in parts:
                batch = collate(part, tokenizer.pad_id, reader).to(device)
                with autocast(config, device):
                    logps = score(model, batch)
                yield sequence_logps(logps, batch.loss_mask, reduce="sum").cpu()

        parts = [groups[i : i + config.batch_size] for i in range(0, len(groups), config.batch_size)]
        done = tqdm(spread(sums, parts, 8), total=len(parts), desc="reference", disable=quiet())
        flat = torch.cat(list(done))
        if first():
            path.parent.mkdir(parents=True, exist_ok=True)
            with written_beside(path) as part:
                save_file({"logps": flat}, part, metadata={"key": key})
                os.replace(part, path)
    return flat.split([len(group) for group in groups])


# ---- watching: what a collapse would show in -----------------------------------------------------


def watch(tables, method, beta):
    """Mean score of right and of wrong responses; the gap of the pairs and the share of pairs in right order,
    by what the method ranks: scores, or beta (log pi - log pi_ref). Each over all of a step's tables, None
    where there are none."""
    scores, correct = [t.scores.detach() for t in tables], [t.batch.correct for t in tables]
    ranked = [beta * (t.logps.detach() - t.ref_logps) for t in tables] if method.ref else scores
    gaps = [(s[:, :, None] - s[:, None, :])[table.better] for s, table in zip(ranked, tables)]
    return means(
        {
            "score_right": [s[c == 1] for s, c in zip(scores, correct)],
            "score_wrong": [s[c == 0] for s, c in zip(scores, correct)],
            "margin": gaps,
            "ranking_accuracy": [gap > 0 for gap in gaps],
        }
    )


@torch.no_grad()
def watch_policy(tables, config):
    """Of a step on the policy's own responses: mean reward and length; the mean of -log pi over their tokens
    as the policy was when it drew them, at temperature 1 an unbiased estimate of its entropy; the share of
    tokens that the clip has silenced; the mean k3, an estimate of the KL to the reference (None without)."""
    at = [table.batch.loss_mask for table in tables]
    tokens = lambda values: [x[mask] for x, mask in zip(values, at)]
    sides = [(t.token_logps, t.old_token_logps, advantages(t, config)) for t in tables]
    bounds = dict(clip_low=config.clip_low, clip_high=config.clip_high)
    kls = [k3(t.token_logps, t.ref_token_logps) for t in tables] if config.kl else []
    values = {
        "reward": [t.rewards[t.present] for t in tables],
        "length": [mask.sum(1) for mask in at],
        "entropy": tokens([-t.old_token_logps for t in tables]),
        "clip_share": tokens([clipped(*side, **bounds) for side in sides]),
        "kl": tokens(kls),
    }
    return means(values)


@torch.no_grad()
def probe(model, tokenizer, problems, asking, config, device):
    """On held-out problems: accuracy, missing answers, repeated 4-grams, NLL of reference solutions."""
    with autocast(config, device):
        answered = list(sample_groups(model, tokenizer, problems, n=1, temperature=0.0, **asking))
    responses, mode = [samples.first for samples in answered], asking["mode"]
    share = lambda values: sum(values) / len(responses)
    values = {
        "held_out_accuracy": share(bool(r.correct) for r in responses),
        "held_out_missing_answers": share(r.answer is None for r in responses),
        "held_out_repeated_4grams": share(repeated_4grams(r.ids) for r in responses),
    }
    rows = [[encode_row(tokenizer, p, target(p, mode), mode=mode)] for p in problems if p.solution]
    if rows:
        batch = collate(rows, tokenizer.pad_id, asking["reader"]).to(device)
        with autocast(config, device):
            logps = score(model, batch)
        values["held_out_reference_nll"] = sft_loss(logps, batch.loss_mask).item()
    return values


# ---- the script ----------------------------------------------------------------------------------


def complete(config):
    """(flags with what depends on --method and --samples filled in, the row of METHODS), or what one flag's
    range cannot say refused."""
    check(config.method in METHODS, "--method", config.method, ", ".join(METHODS))
    method = METHODS[config.method]
    of_grpo = ("normalisation", "updates", "clip_low", "clip_high", "kl", "resample")
    of_grpo += ("reward", "verifier", "rho", "gamma")
    of_others = ("samples", "ref_logps", "truncate_words")
    why = "draws its own responses, to the problems of --data" if method.reward else "does not use it"
    for name in of_others if method.reward else of_grpo:
        value, unset = getattr(config, name), getattr(AlignConfig, name)
        allowed = f"its default, {unset!r}: {config.method} {why}"
        check(value == unset, "--" + name.replace("_", "-"), value, allowed)
    default, data = config.constraint == "default", config.data or ("" if config.samples else "toy")
    c = config = replace(
        config,
        constraint=(method.constraint or "none") if default else config.constraint,
        data=data,
        max_new_tokens=config.max_new_tokens or (default_length(data) if method.reward else 0),
        out=config.out or f"runs/{config.method}",
    )
    unset = (c.rho, c.gamma) == (AlignConfig.rho, AlignConfig.gamma)
    margin = "a number with --constraint boundary, and nothing without"
    together = f"a multiple of --updates ({c.updates}), whose steps share rollouts"
    needed = f"true, or --sft-weight 0: {c.method}'s SFT term needs it"
    for holds, name, allowed in (
        (c.verifier or c.reward == "outcome", "verifier", f"a PRM, with --reward {c.reward}"),
        (unset or c.reward == "ps-grpo", "reward", "ps-grpo, with --rho or --gamma"),
        ((c.reward, c.normalisation) != ("steps", "dr-grpo"), "reward", "another, with dr-grpo"),
        (c.kl or not (method.reward and c.ref), "ref", "nothing, as --kl 0 loads no reference"),
        (c.stop_at % c.updates == 0, "stop_at", together),
        (method.constraint or c.constraint == "none", "constraint", f"none, for {c.method}"),
        ((c.constraint == "boundary") == (c.margin is not None), "margin", margin),
        (not c.label_smoothing or c.constraint == "none", "label_smoothing", "0 with a --constraint"),
        (c.sft_weight is None or method.sft, "sft_weight", f"nothing: {c.method} has no SFT term"),
        (c.reference or method.sft != "reference" or c.sft_weight == 0, "reference", needed),
    ):
        check(holds, "--" + name.replace("_", "-"), getattr(c, name), allowed)
    return config, method


def load_policy(config, device):
    """(its folder, model, tokenizer, reader of pictures or None) of --init."""
    folder = resolve(config.init or train_first())
    tokenizer = Tokenizer(folder, config.chat_template)
    model = load_model(folder, dtype=torch.float32, device=device)
    allowed = f"a tokenizer of at most {model.config.vocab_size} ids"
    check(tokenizer.vocab_size <= model.config.vocab_size, "--init", str(folder), allowed)
    train_only(model, config.train)
    set_layers(model, compile=config.compile, checkpoint_activations=config.checkpoint_activations)
    return folder, model, tokenizer, image_reader(model, tokenizer, folder)


def load_ref(folder, config, device):
    """The reference policy, which stays as it is."""
    model = load_model(folder, dtype=torch.float32, device=device)
    set_layers(model, compile=config.compile)
    return model


def load_judge(config, device):
    """--reward and its PRM -> (a function from Samples to the same with step scores, Response -> reward)."""
    folder = resolve(config.verifier)
    prm, tokenizer = load_model(folder, device=device, reward=True).eval(), Tokenizer(folder)
    check(prm.kind == "prm", "--verifier", config.verifier, f"a PRM, this is an {prm.kind}")
    set_layers(prm, compile=config.compile)
    how = dict(name="prm", mode=config.mode, batch_size=config.eval_batch_size)
    judge = partial(reward_scores, prm, tokenizer, reader=image_reader(prm, tokenizer, folder), **how)
    return judge, lambda response: REWARDS[config.reward](response, config)


def read_data(config, method):
    """(samples, none where they are still to be drawn; the problems to learn from; held-out problems)."""
    before = config.resume and not method.reward
    file = config.samples or (Path(config.out) / "samples.jsonl" if before else "")
    samples, held_out = read_samples(file) if file else [], []
    problems = [s.problem for s in samples] or read_problems(config.data, config.split, limit=config.limit)
    if config.data and config.eval_split:
        held_out = read_problems(config.data, config.eval_split, limit=config.eval_limit)
        lacking = sum(problem.answer is None for problem in held_out)
        allowed = f"problems with an answer, {lacking} have none"
        check(not lacking, "--eval-split", config.eval_split, allowed)
    refuse_shared(problems, held_out, "--eval-split")
    return samples, problems, held_out


def leave_out_unreadable(samples, problems, held_out, reader):
    """The same without those whose picture can't be read."""
    problems, unreadable = readable(problems, reader)
    held_out, more = readable(held_out, reader)
    report_unreadable(unreadable + more, problems)
    ids = {problem.id for problem in problems}
    return [group for group in samples if group.problem.id in ids], problems, held_out


def main(config):
    config, method = complete(config)
    device, inputs = pick_device(config.device), [config.init, config.ref, config.samples, config.ref_logps]
    inputs.append(config.verifier)
    inputs = [path for path in inputs if path]
    check_out(config, inputs)
    data = read_data(config, method)
    folder, model, tokenizer, reader = load_policy(config, device)
    samples, problems, held_out = leave_out_unreadable(*data, reader)
    judge, reward = load_judge(config, device) if config.verifier else (None, method.reward)
    asking = how_to_ask(config, config.mode, reader)
    evaluate = partial(measure, tokenizer=tokenizer, problems=held_out, rows=[], asking=asking, config=config)
    constrained = {"constraint": config.constraint, "margin": config.margin} if method.constraint else {}

    with Run(config, inputs) as run:
        if method.reward:
            groups, counts = questions(config, model, tokenizer, problems, asking), {}
            batches = plan_rollouts(len(problems), config)
        else:
            samples = samples or sample_now(run, folder, model, tokenizer, problems, asking, device)
            groups, counts = read_groups(config, method, samples, tokenizer, model, reader)
            batches = plan(groups, config)
        n_steps = config.steps or len(batches) * config.updates
        run.begin(folder, digest_of(tokenizer, groups))
        ref = reference_logps(run, folder, tokenizer, groups, reader, device) if method.ref else None
        forward = wrap(model, score, config)
        optimizer = make_optimizer(model, config.lr, config.weight_decay)
        done = load_checkpoint(run.out, model, optimizer) if config.resume else 0
        log = Log(run.out / "metrics.jsonl", done)
        plain = put_together(model, lambda: load_policy(config, device)[1])
        print(
            f"{config.method}, constraint {config.constraint}: {len(groups)} groups, "
            f"{f'{config.k} responses each' if method.reward else f'{sum(map(len, groups))} responses'}; "
            f"left out: {counts}; steps {done + 1} to {n_steps} on {said(device)}"
        )
        if held_out and not done:
            keep_before(run.out, evaluate(plain()))

        run.listen()
        steps = range(done + 1, n_steps + 1)
        if method.reward:
            ref_model = load_ref(resolve(config.ref or folder), config, device) if config.kl else None
            asked = (steps, config, tokenizer, asking, reward, judge)
            source = from_policy(plain, ref_model, problems, batches, *asked)
        else:
            source = from_samples(groups, ref, batches, steps, config, tokenizer, reader)
        progress = tqdm(steps, unit="step", disable=quiet())
        for step, (micros, about) in zip(progress, source):
            began = time.perf_counter()
            lr = set_lr(optimizer, step, n_steps, config.warmup)
            for micro in micros:
                micro.move(device)
            ours = [micro.batch for micro in micros if micro.weight]
            ids = [problem_id for batch in ours for problem_id in batch.problem_ids]
            n_groups, n_rows, n_scored, n_sft, n_tokens = count(ours, method)
            loss, tables = 0.0, []
            for micro in micros:
                with autocast(config, device):
                    logps = forward(micro.batch)
                if micro.old_token_logps is None:  # new groups: GRPO's ratio begins at exactly 1
                    micro.old_token_logps = logps.detach()
                table = tabulate(logps, micro, n_scored / n_rows, config.reference_in_positives)
                part = sft_term(table, method, config.sft_weight, n_sft, n_groups)
                if method.loss:
                    part = part + method.loss(table, config, constrained).sum() / n_groups
                (part * micro.weight * size()).backward()  # the ranks' mean is taken, their sum is meant
                loss += part.item() * micro.weight
                tables += [table] if micro.weight else []
            (loss,) = total(loss)
            refuse_non_finite(loss, "the loss", step, ids)
            grad_norm = clip_gradients(model, config.clip)
            refuse_non_finite(grad_norm, "the gradient norm", step, ids)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

            line = about | {"train_tokens_per_s": round(n_tokens / (time.perf_counter() - began), 1)}
            line |= watch(tables, method, config.beta)
            line |= watch_policy(tables, config) if method.reward else {}
            shown = "reward" if method.reward else "ranking_accuracy"
            progress.set_postfix_str(f"loss {loss:.3f}, {shown.replace('_', ' ')} {line[shown] or 0:.0%}")
            due = config.probe_every and (step % config.probe_every == 0 or step in (1, steps[-1]))
            if held_out and due and not run.asked_to_stop():
                line |= probe(plain(), tokenizer, held_out[: config.probe_limit], asking, config, device)
            log.write(step, n_tokens, loss=loss, lr=lr, grad_norm=grad_norm, **line)
            run.end_step(step, n_steps, model, optimizer, together=config.updates)

        trained = plain()
        run.finish(trained, tokenizer, reader, log, device)
        if held_out:
            compare(run.out, evaluate(trained))


if __name__ == "__main__":
    run(main, AlignConfig, method=METHODS)
