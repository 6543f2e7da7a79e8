"""CoT-Influx (CoT-Max, arXiv 2312.08901): learn which worked examples to keep before a question, and which of
their tokens, so that what helps a frozen language model (LM) most fits into a budget of T tokens.

    python -m minicot.pruner --model LM --data train.jsonl --target 128 --out runs/pruner  # rows with shots
    python -m minicot.pruner --model LM --data gsm8k:PATH --shots pool.jsonl --k 16 --out runs/pruner
    python -m minicot.pruner prune --pruner runs/pruner --budget 128 --model LM --data test.jsonl \\
        --out pruned.jsonl                           # or --method topk, a baseline of selection.py
    python sample.py --evaluate --model LM --data pruned.jsonl

Two stages, coarse to fine. H_j are the states of shot j's tokens under a frozen encoder, f and g small heads:

    pi(keep shot j)              = softmax(f(mean of H_j))[1]
    pi(keep token i of shot j)   = softmax(g(H_j,i))[1]           of the kept shots alone
    R = (1 / (1 + L) + R_acc) * (t / T)^w,   w = 1 where t <= T, else -1
    REINFORCE:  - E[R (log pi(shots) + log pi(tokens))]

L: the frozen LM's mean loss of the gold solution behind the pruned prompt; R_acc: 1 where its greedy answer
is right, else 0; t: the tokens of the pruned shots. No gradient passes through the LM or the encoder.

The training code was never published. Ours, not the paper's (or not known to be): Adam without a schedule;
the baseline, which is the mean reward of the question's other repeats (leave one out); the entropy bonus; the
log pi of a stage is a mean over its decisions, so that hundreds of tokens do not drown a few shots; a prompt
that the LM's context can't hold is worth 0; R_acc and L are those of the mode that is asked for.

Against the published modules (HuangOwen/CoT-Influx, modeling_skim_predictor.py):
- Padding is masked in the mean, in log pi and in t; there it counts in all three, as the encoder is called
  without an attention mask. t counts tokens of the LM, there those of the encoder.
- There BERT's three first positions, [CLS] "Q" ":", are forced to be kept, and about 20 string repairs put
  back "A:" and line breaks that were dropped. Here the layout of a shot ("Q:", line break and "A:", the last
  empty line) is forced, and nothing is repaired. Forced tokens have no log pi, as nothing was chosen.
- One shot is kept at least, as there (which draws again until one is). log pi is that of the drawn actions:
  given that one is kept it is more by a number that a question's repeats share, and the baseline takes away.
- Pruning is deterministic and never exceeds the budget (`choose`); there it is one more sampled pass, whose
  given targets are ignored.
- The encoder is the LM itself or another folder with its own tokenizer, not BERT-large. `--see-question` lets
  it read the question before each shot; the paper's pruner never sees the question.

Letters: B questions of a step, R repeats of each, k candidate shots, L tokens of the longest, D width of the
encoder's states, H of the heads.
"""

import dataclasses
import hashlib
import html
import itertools
import os
import re
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from minicot.answers import STYLES
from minicot.config import DEVICE, LENGTH, STYLE, Flags, check, flag, run
from minicot.data import encode_row, schedule, seed_of, target
from minicot.errors import InputError
from minicot.parallel import quiet
from minicot.records import fields_of, shot_text
from minicot.runs import Log, open_model, write_json, write_jsonl, write_text, written_beside
from minicot.sampling import sample_groups
from minicot.scoring import score
from minicot.selection import METHODS, Encoder, fit, size_by, squeeze, texts_of, whole, with_candidates
from minicot.sets import default_length, read_problems, style_of
from minicot.tokenizer import Tokenizer
from minicot.training import pick_device, refuse_non_finite, resolve, weights_digest
from minicot.verifier import values_of
from minicot.weights import load_model, read_json

CERTAIN = 1e4  # log-odds of a stage that is left out: it keeps everything


# ---- the policies --------------------------------------------------------------------------------


def head(width, hidden):
    """LayerNorm - Linear - LayerNorm - GELU - Linear, as published; two logits, index 1 = keep. The last
    weights are N(0, 0.02^2), its biases near -1 and 1: at first P(keep) is about sigmoid(2) = 0.88."""
    layers = [nn.LayerNorm(width), nn.Linear(width, hidden), nn.LayerNorm(hidden), nn.GELU()]
    last = nn.Linear(hidden, 2)
    nn.init.normal_(last.weight, 0.0, 0.02)
    with torch.no_grad():
        last.bias.copy_(torch.tensor([-1.0, 1.0]) + 0.02 * torch.randn(2))
    return nn.Sequential(*layers, last)


class Pruner(nn.Module):
    """The shot policy and the token policy; one of the stages may be left out. `seed` draws the weights."""

    def __init__(self, width, hidden=512, *, shot_stage=True, token_stage=True, seed=0):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.shot, self.token = head(width, hidden), head(width, hidden)
        self.stages = {"shot_stage": shot_stage, "token_stage": token_stage}
        self.width, self.hidden = width, hidden

    def forward(self, states, real):
        """states (k,L,D), real (k,L) bool, False = padding -> log-odds of keeping each shot (k,) and each
        token (k,L), which means nothing at padding."""
        log_odds = lambda logits: logits[..., 1] - logits[..., 0]
        pooled = (states * real[..., None]).sum(1) / real.sum(1, keepdim=True)
        shots, tokens = log_odds(self.shot(pooled)), log_odds(self.token(states))
        if not self.stages["shot_stage"]:
            shots = torch.full_like(shots, CERTAIN)
        return shots, tokens if self.stages["token_stage"] else torch.full_like(tokens, CERTAIN)


def sample_actions(z_shot, z_token, repeats, generator):
    """Log-odds (k,), (k,L) -> R times sampled actions, shots (R,k) and tokens (R,k,L) bool, True = keep.
    Shots are drawn given that one is kept, at least: the first that is kept is i with a probability in
    proportion to P(keep i) prod_{j<i} P(drop j), those behind it are drawn freely. (Drawing again until one
    is kept, as published, has the same law, but does not end where all P are small.)"""
    if not (z_shot.isfinite().all() and z_token.isfinite().all()):
        raise InputError("the pruner's log-odds are not finite; a lower --lr is the usual remedy")
    device, (z_shot, z_token) = z_shot.device, (z.detach().cpu().double() for z in (z_shot, z_token))
    draw = lambda z: torch.rand(repeats, *z.shape, generator=generator, dtype=torch.float64) < z.sigmoid()
    dropped = F.logsigmoid(-z_shot)
    law = (F.logsigmoid(z_shot) + dropped.cumsum(0) - dropped).softmax(0)
    first = torch.multinomial(law, repeats, replacement=True, generator=generator)[:, None]
    place = torch.arange(len(z_shot))
    shots = (place == first) | (place > first) & draw(z_shot)
    return shots.to(device), draw(z_token).to(device)


def log_policy(z_shot, z_token, shots, tokens, free):
    """log pi of sampled actions, a mean over each stage's decisions: (R,). The second stage's are the free
    tokens (k,L: real, and not forced) of the shots that the first has kept."""
    log_p = lambda z, keep: F.logsigmoid(torch.where(keep, z, -z))
    decided = shots[:, :, None] & free
    of_tokens = (log_p(z_token, tokens) * decided).sum((1, 2)) / decided.sum((1, 2)).clamp(min=1)
    return log_p(z_shot, shots).mean(1) + of_tokens


def entropy(z_shot, z_token, free):
    """Mean entropy of a shot's decision and of a free token's, summed: () nats, 2 log 2 at most."""
    of = lambda z: -(z.sigmoid() * F.logsigmoid(z) + (-z).sigmoid() * F.logsigmoid(-z))
    return of(z_shot).mean() + (of(z_token) * free).sum() / free.sum().clamp(min=1)


@dataclass(frozen=True)
class Seen:
    """A question's candidate shots as the policies see them."""

    ids: list  # of each shot, in the encoder's tokens
    states: torch.Tensor  # (k,L,D)
    real: torch.Tensor  # (k,L) bool: no padding
    free: torch.Tensor  # (k,L) bool: real, and no layout


def before(problem, see_question):
    """What the encoder reads before each shot."""
    return f"{problem.question}\n\n" if see_question else ""


def look(encoder, problem, see_question=False):
    """A problem's candidate shots -> Seen."""
    shots = encoder.shots(problem.shots, before(problem, see_question))
    padded = lambda rows: pad_sequence(rows, batch_first=True)
    real = padded([torch.ones_like(shot.free) for shot in shots])
    return Seen(
        [shot.ids for shot in shots], padded([s.states for s in shots]), real, padded([s.free for s in shots])
    )


@dataclass(frozen=True)
class Rollout:
    """R repeats of one question."""

    pruned: list  # R Problems with pruned shots
    logps: torch.Tensor  # (R,) log pi of what was done, with its gradient
    entropy: torch.Tensor  # ()
    kept_shots: float  # share


def rollout(pruner, encoder, problem, repeats, seed, see_question=False):
    """Sample R prunings of a problem's candidate shots."""
    seen = look(encoder, problem, see_question)
    z_shot, z_token = pruner(seen.states, seen.real)
    shots, tokens = sample_actions(z_shot, z_token, repeats, torch.Generator().manual_seed(seed))
    keep = (shots[:, :, None] & (tokens | ~seen.free) & seen.real).tolist()
    pruned = [replace(problem, shots=texts_of(seen.ids, one, encoder.decode)) for one in keep]
    logps = log_policy(z_shot, z_token, shots, tokens, seen.free)
    return Rollout(pruned, logps, entropy(z_shot, z_token, seen.free), shots.float().mean().item())


# ---- the reward ----------------------------------------------------------------------------------


def reward(loss, correct, t, target, w=(1.0, -1.0)):
    """(1 / (1 + L) + R_acc) * (t / T)^w, w[0] up to the target and w[1] above: the peak is at t = T.
    Tensors of one shape or numbers -> float64; an infinite loss is worth 0."""
    loss, correct, t = (torch.as_tensor(x, dtype=torch.float64) for x in (loss, correct, t))
    if target < 1 or (loss < 0).any() or loss.isnan().any():
        raise ValueError(f"target {target}, losses {loss}; allowed: target >= 1, losses >= 0")
    exponent = torch.where(t <= target, *(torch.tensor(x, dtype=torch.float64) for x in w))
    return (1 / (1 + loss) + correct) * (t / target) ** exponent


def leave_one_out(rewards):
    """Rewards (B,R) -> each minus the mean of the question's other repeats."""
    return rewards - (rewards.sum(1, keepdim=True) - rewards) / (rewards.shape[1] - 1)


def judge_by(model, tokenizer, *, mode, style, max_new_tokens, batch_size=64, accuracy=True):
    """The frozen LM as judge: a function from B lists of R Problems with shots -> their losses (B,R), and
    whether they are answered right (B,R). Repeats are scored as one group, whose common beginning is computed
    once, and all answers are drawn in one batch; equal prompts are computed once. A prompt that does not fit
    into the context, with the solution or max_new_tokens behind it, has an infinite loss and no right answer.
    accuracy False: no answers are drawn, none is right."""
    context = model.config.max_position_embeddings

    @torch.no_grad()
    def judge(groups):
        distinct = [list({tuple(one.shots): one for one in group}.values()) for group in groups]
        rows = [[encode_row(tokenizer, p, target(p, mode), mode=mode) for p in group] for group in distinct]
        room = max_new_tokens if accuracy else 0
        fits = lambda row: max(len(row.ids), row.n_prompt + room) <= context
        fitting = [[(p, row) for p, row in zip(*pair) if fits(row)] for pair in zip(distinct, rows)]
        fitting = [group for group in fitting if group]
        logps = lambda batch: (score(model, batch), batch.loss_mask)
        how = dict(reader=None, batch_size=batch_size)
        scored = values_of(logps, model, tokenizer, [[row for _, row in group] for group in fitting], **how)
        asked = [problem for group in fitting for problem, _ in group]
        found = {(p.id, *p.shots): (-of_tokens.mean().item(), False) for p, of_tokens in zip(asked, scored)}
        if accuracy and asked:
            how = dict(mode=mode, style=style, max_new_tokens=max_new_tokens, batch_size=batch_size)
            for one in sample_groups(model, tokenizer, asked, n=1, temperature=0.0, **how):
                key = (one.problem.id, *one.problem.shots)
                found[key] = (found[key][0], bool(one.first.correct))
        judged = [[found.get((p.id, *p.shots), (torch.inf, False)) for p in group] for group in groups]
        losses, correct = torch.tensor(judged, dtype=torch.float64).unbind(-1)
        return losses, correct.bool()

    return judge


# ---- the loop ------------------------------------------------------------------------------------


def learn(pruner, encoder, problems, judge, size, config, log, saved=lambda: None):
    """REINFORCE on problems with candidate shots. judge: B lists of R pruned Problems -> losses and right or
    not, (B,R) each (see judge_by); size: a text -> its LM tokens; log: a runs.Log; saved() keeps the
    pruner."""
    c = config
    optimizer = torch.optim.Adam(pruner.parameters(), lr=c.lr)
    n_rows, order = c.steps * c.batch_size, seed_of(c.seed, "order")
    tokens = lambda problem: sum(map(size, problem.shots))
    for step, chosen in enumerate(schedule([1] * len(problems), c.batch_size, n_rows, order), 1):
        asked = [problems[i] for i in chosen]
        seeds = [seed_of(c.seed, step, place) for place in range(len(asked))]
        rolled = [
            rollout(pruner, encoder, problem, c.repeats, seed, c.see_question)
            for problem, seed in zip(asked, seeds)
        ]
        losses, correct = judge([one.pruned for one in rolled])
        t = torch.tensor([[tokens(problem) for problem in one.pruned] for one in rolled])
        rewards = reward(losses, correct, t, c.target, (c.w_below, c.w_above))
        logps = torch.stack([one.logps for one in rolled])
        policy = -(leave_one_out(rewards).to(logps) * logps).mean()
        spread = torch.stack([one.entropy for one in rolled]).mean()
        loss = policy - c.entropy * spread
        refuse_non_finite(loss.item(), "the loss", step, [problem.id for problem in asked])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

        fits = losses.isfinite()
        line = {
            "reward": rewards.mean().item(),
            "t_over_target": t.double().mean().item() / c.target,
            "nll": losses[fits].mean().item() if fits.any() else None,
            "accuracy": correct.double().mean().item(),
            "shots_kept": sum(one.kept_shots for one in rolled) / len(rolled),
            "tokens_kept": t.sum().item() / (c.repeats * sum(map(tokens, asked))),
            "entropy": spread.item(),
            "too_long": 1 - fits.double().mean().item(),
        }
        log.write(step, int(t.sum()), loss=loss.item(), **line)
        said = ", ".join(f"{name.replace('_', ' ')} {value or 0:.3f}" for name, value in line.items())
        print(f"step {step}/{c.steps}: {said}", flush=True)
        if c.save_every and step % c.save_every == 0:
            saved()
    saved()


# ---- pruning, deterministically ------------------------------------------------------------------


def choose(p_shot, p_token, ids, budget, size, decode):
    """Which tokens of which shots are kept: P(keep) of each shot (None: no shot stage), of each of its tokens
    (inf: forced) -> a list of bools a shot, all False where it is dropped. The texts together have at most
    `budget` LM tokens.

    1. Shots, the likeliest first and the earlier of equals. One with P < 1/2 is dropped, and one is passed
       over of whose expected size, its LM tokens times the mean P(keep) of its tokens, not even half fits
       into what is left of the budget: so the expected total comes near to it from either side. The likeliest
       goes on to step 2 in any case.
    2. Of these shots' tokens those with P < 1/2 are dropped, then the least likely of all until the budget is
       met (selection.squeeze); a shot of which only its layout is left goes. A budget below one token and the
       layout of a shot leaves none.
    Without a shot stage step 2 has all shots; without a token stage (p_token None) the shots of step 1 that
    fit whole are kept. The published `fix_forward` has counts of shots and tokens in the budget's place, and
    is not called."""
    taken = range(len(ids))
    if p_shot is not None:
        sizes = [size(decode(one)) for one in ids]
        order = sorted(taken, key=lambda i: -p_shot[i])
        likely = [i for i in order if p_shot[i] >= 0.5] or order[:1]
        if p_token is None:
            taken = whole(sizes, likely, budget)
            return [[i in taken] * len(one) for i, one in enumerate(ids)]
        means = [sum(min(p, 1.0) for p in row) / len(row) for row in p_token]
        expected = [n * mean for n, mean in zip(sizes, means)]
        taken = whole(expected, likely, budget, share=0.5) or order[:1]
    pieces, scores = [ids[i] for i in taken], [p_token[i] for i in taken]
    kept = dict(zip(taken, squeeze(pieces, scores, budget, size, decode, least=0.5)))
    return [kept.get(i, [False] * len(one)) for i, one in enumerate(ids)]


@dataclass(frozen=True)
class Kept:
    """A pruned problem, and what became of its candidates: their tokens as texts, and which are kept."""

    problem: object
    pieces: list
    keep: list


@torch.no_grad()
def prune(pruner, encoder, problems, budget, size, see_question=False):
    """Yield a Kept for each problem with candidate shots."""
    for problem in problems:
        seen = look(encoder, problem, see_question)
        z_shot, z_token = pruner(seen.states, seen.real)
        p_token = z_token.sigmoid().masked_fill(~seen.free, torch.inf).tolist()
        p_token = [row[: len(ids)] for row, ids in zip(p_token, seen.ids)]
        p_token = p_token if pruner.stages["token_stage"] else None
        p_shot = z_shot.sigmoid().tolist() if pruner.stages["shot_stage"] else None
        keep = choose(p_shot, p_token, seen.ids, budget, size, encoder.decode)
        pieces = [[encoder.decode([i]) for i in ids] for ids in seen.ids]
        yield Kept(replace(problem, shots=texts_of(seen.ids, keep, encoder.decode)), pieces, keep)


def marked(kept):
    """A Kept as HTML that Markdown takes: what is kept bold, what is dropped struck out, a shot a line."""
    tags = {True: "<b>{}</b>", False: "<del>{}</del>"}
    lines = []
    for pieces, keep in zip(kept.pieces, kept.keep):
        runs = itertools.groupby(zip(keep, pieces), key=lambda pair: pair[0])
        cut = [tags[is_kept].format(html.escape("".join(p for _, p in part))) for is_kept, part in runs]
        lines.append("".join(cut).replace("\n", " "))
    return "<p>" + "<br>\n".join(lines) + "</p>\n"


def kind_of(piece):
    """A token's kind: number, operator, word or other."""
    if re.fullmatch(r"\s*[-+*/=x×÷<>%$]+\s*", piece):
        return "operator"
    return "number" if re.search(r"\d", piece) else "word" if re.search(r"[^\W\d_]", piece) else "other"


def kept_by_kind(all_kept, kind=kind_of):
    """What is kept by kind of token: {kind: [kept, all]}; kind: a token's text -> a name."""
    counts = {}
    for kept in all_kept:
        for piece, is_kept in zip(itertools.chain(*kept.pieces), itertools.chain(*kept.keep)):
            of = counts.setdefault(kind(piece), [0, 0])
            of[0], of[1] = of[0] + is_kept, of[1] + 1
    return counts


# ---- a pruner's folder ---------------------------------------------------------------------------


def folder_digest(folder):
    """Hex hash of a model folder's weights and tokenizer: what an encoder is known by."""
    return hashlib.sha256(f"{weights_digest(folder)} {Tokenizer(folder).fingerprint}".encode()).hexdigest()


def save_pruner(pruner, folder, about):
    """pruner.safetensors, and pruner.json: its sizes and stages, and `about`, which names encoder and LM."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    file = Path(folder) / "pruner.safetensors"
    with written_beside(file) as part:
        save_file({name: value.cpu().contiguous() for name, value in pruner.state_dict().items()}, part)
        os.replace(part, file)
    write_json(
        Path(folder) / "pruner.json",
        {"width": pruner.width, "hidden": pruner.hidden, **pruner.stages, **about},
    )


def load_pruner(folder, *, encoder="", device=None, dtype=torch.float32):
    """A pruner's folder -> (Pruner, its Encoder, pruner.json). The encoder is read from where it was, or from
    the folder `encoder`; one with other weights or another tokenizer is refused."""
    file, about = Path(folder) / "pruner.safetensors", read_json(Path(folder) / "pruner.json")
    try:
        sizes = {name: about[name] for name in ("width", "hidden", "shot_stage", "token_stage")}
        pruner, place, expected = Pruner(**sizes), encoder or about["encoder"], about["encoder_digest"]
        pruner.load_state_dict(load_file(file))
    except (KeyError, TypeError, RuntimeError, SafetensorError, FileNotFoundError) as error:
        raise InputError(f"{folder}: no pruner of ours ({error})") from None
    if (found := folder_digest(resolve(place))) != expected:
        raise InputError(
            f"{place}: the pruner {folder} reads the states of another encoder, {about['encoder']} (digest "
            f"{expected:.12}, found {found:.12}); allowed: that folder, named by --encoder where it has moved"
        )
    return pruner.to(device), load_encoder(place, device, dtype), about


def load_encoder(folder, device, dtype):
    folder = resolve(folder)
    return Encoder(load_model(folder, dtype=dtype, device=device), Tokenizer(folder))


def prune_by(folder, problems, shots, budget, *, tokenizer, encoder="", device=None, dtype=torch.float32):
    """Problems pruned by a pruner's folder -> a list of Kept. shots: a pool for those that bring none ("" =
    none); budget: LM tokens of `tokenizer` (0 = the target that the pruner was trained for)."""
    pruner, encoder, about = load_pruner(folder, encoder=encoder, device=device, dtype=dtype)
    pool = read_problems(shots) if shots else []
    problems = with_candidates(problems, pool, encoder, about["k"])
    budget, size = budget or about["target"], size_by(tokenizer)
    made = prune(pruner, encoder, problems, budget, size, about["see_question"])
    kept = list(tqdm(made, total=len(problems), unit="problem", desc="pruning", disable=quiet()))
    report([one.problem for one in kept], budget, size)
    return kept


def report(pruned, budget, size):
    tokens = [sum(map(size, problem.shots)) for problem in pruned]
    shots = sum(len(problem.shots) for problem in pruned) / len(pruned)
    print(
        f"{len(pruned)} problems, {shots:.1f} shots and {sum(tokens) / len(tokens):.1f} tokens each, "
        f"{max(tokens)} at most, of a budget of {budget}"
    )


# ---- commands ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Common(Flags):
    """What both commands take."""

    data: str = flag("data", "", "problems, rows with shots or, with --shots, without")
    split: str = flag("data", "train", "split to use; a slice is written train[:100]")
    limit: int = flag("data", 0, "use the first N problems (0 = all)", least=0)
    shots: str = flag("data", "", "pool of candidate shots: rows with question and solution")
    k: int = flag("data", 16, "candidates a problem from --shots, nearest question first", least=1)
    model: str = flag("model", "toy", "the language model's folder, which stays as it is")
    chat_template: str = flag(
        "model", "", "chat template: the folder's own, or plain (none), or a jinja FILE"
    )
    encoder: str = flag("model", "", "folder of the frozen encoder (default: --model, or the pruner's own)")
    device: Literal["auto", "cpu", "cuda"] = DEVICE
    dtype: Literal["float32", "bfloat16"] = flag("model", "float32", "of the frozen weights")
    seed: int = flag("loop", 0, "of all that is random", least=0, most=2**31)
    out: str = flag("output", "", "where it is written")
    overwrite: bool = flag("output", False, "replace what is in --out")


@dataclass(frozen=True)
class PrunerConfig(Common):
    """Learn to prune shots for a frozen language model."""

    target: int = flag("method", 128, "T: the length that is rewarded most, in the model's tokens", least=1)
    repeats: int = flag("method", 10, "prunings of a question a step (the paper: 10 for 13B)", least=2)
    shot_stage: bool = flag("method", True, "choose shots (else keep all)")
    token_stage: bool = flag("method", True, "choose tokens of the kept shots (else keep all)")
    see_question: bool = flag(
        "method", False, "the encoder reads the question before each shot; not the paper's"
    )
    easy_only: bool = flag(
        "method", False, "learn from questions answered right with all candidates unpruned"
    )
    difficulty: float = flag(
        "method", 0.0, "learn from rows with a `difficulty` of at most this (0 = all)", least=0
    )
    accuracy: bool = flag("method", True, "reward right answers (else L alone, which costs less)")
    w_below: float = flag("method", 1.0, "w up to the target")
    w_above: float = flag("method", -1.0, "w above it")
    entropy: float = flag("method", 0.0, "weight of the entropy bonus", least=0)
    mode: Literal["cot", "direct", "plain"] = flag(
        "method", "plain", "gold: the solution (direct: the answer)"
    )
    style: str = STYLE
    max_new_tokens: int = LENGTH
    hidden: int = flag("method", 512, "width of the policies' hidden layer", least=1)
    steps: int = flag("loop", 200, "optimizer steps", least=1, most=10**6)
    batch_size: int = flag("loop", 8, "questions a step", least=1)
    eval_batch_size: int = flag("loop", 128, "prompts scored or decoded together", least=1)
    lr: float = flag("loop", 1e-3, "Adam's learning rate", above=0)
    save_every: int = flag("output", 50, "steps between savings of the pruner (0 = at the end)", least=0)


@dataclass(frozen=True)
class PruneConfig(Common):
    """Write problems with their shots cut down to a budget."""

    method: str = flag("method", "learned", "learned, by --pruner, or a baseline of selection.py")
    pruner: str = flag("model", "", "--method learned: the pruner's folder")
    budget: int = flag("method", 0, "most tokens of a problem's shots (0 = the pruner's target)", least=0)
    split: str = flag("data", "test", "split to prune; a slice is written test[:100]")
    k: int = flag("data", 16, "candidates a problem from --shots; a pruner has its own number", least=1)
    marked: str = flag("output", "", "--method learned: a page of the first 3 prompts, kept tokens bold")


def read(config):
    """(problems, the pool of --shots, both as given)."""
    check(config.data, "--data", config.data, "problems that bring shots, or with --shots")
    check(config.out, "--out", config.out, "a path")
    problems = read_problems(config.data, config.split, limit=config.limit)
    return problems, read_problems(config.shots) if config.shots else []


def easy(problems, config, judge):
    """The questions that are learned from (the paper's difficulty-aware loading): where a question is
    answered wrong whatever the prompt, there is no signal."""
    if config.difficulty:
        for problem in problems:
            allowed = f"in every row, problem {problem.id!r} has none that is a number"
            number = re.fullmatch(r"\d+(\.\d+)?", str(problem.meta.get("difficulty")))
            check(number, "a field difficulty", problem.meta.get("difficulty"), allowed)
        problems = [p for p in problems if float(p.meta["difficulty"]) <= config.difficulty]
        check(problems, "--difficulty", config.difficulty, "one that some rows have")
    if config.easy_only:
        _, correct = judge([[problem] for problem in problems])
        problems = [problem for problem, (right,) in zip(problems, correct.tolist()) if right]
        check(problems, "--easy-only", "given", "a model that answers a question with all its candidates")
    return problems


def train(config):
    check(config.shot_stage or config.token_stage, "--no-token-stage", "given", "one stage, or both")
    check(config.accuracy or not config.easy_only, "--easy-only", "given", "without --no-accuracy")
    style, out = config.style or style_of(config.data), Path(config.out)
    check(style in STYLES, "--style", style, ", ".join(STYLES))
    problems, pool = read(config)
    new = not out.exists() or (out.is_dir() and not any(out.iterdir()))
    ours = config.overwrite and (out / "pruner.json").is_file()
    check(new or ours, "--out", config.out, "a new folder, or --overwrite of a pruner's")
    device = pick_device(config.device)
    model, tokenizer = open_model(resolve(config.model), config, device)
    context, place = model.config.max_position_embeddings, config.encoder or config.model
    check(config.target < context, "--target", config.target, f"less than the model's context, {context}")
    dtype = getattr(torch, config.dtype)
    encoder = (
        load_encoder(place, device, dtype) if config.encoder else Encoder(model, Tokenizer(resolve(place)))
    )
    how = dict(mode=config.mode, style=style, accuracy=config.accuracy, batch_size=config.eval_batch_size)
    how["max_new_tokens"] = config.max_new_tokens or default_length(config.data)
    judge, size = judge_by(model, tokenizer, **how), size_by(tokenizer)
    asked = with_candidates(problems, pool, encoder, config.k, training=True)
    for problem in asked:  # a shot that is too long is refused now, not in the middle of the run
        for text in problem.shots:
            encoder.encode(text, len(encoder.tokenizer.encode(before(problem, config.see_question))))
    problems = easy(asked, config, judge)
    pruner = Pruner(
        encoder.model.config.hidden_size,
        config.hidden,
        shot_stage=config.shot_stage,
        token_stage=config.token_stage,
        seed=config.seed,
    ).to(device)
    about = {"target": config.target, "k": config.k, "see_question": config.see_question}
    about |= {"encoder": place, "encoder_digest": folder_digest(resolve(place))}
    about |= {"model": config.model, "model_digest": folder_digest(resolve(config.model))}
    about["settings"] = dataclasses.asdict(config)
    keep = lambda: save_pruner(pruner, out, about)
    keep()
    print(f"{len(problems)} of {len(asked)} questions, {config.repeats} prunings of each on {device}")
    learn(pruner, encoder, problems, judge, size, config, Log(out / "metrics.jsonl"), keep)
    print(f"pruner -> {out}")


def prune_command(config):
    learned, out = config.method == "learned", Path(config.out)
    check(bool(config.pruner) == learned, "--pruner", config.pruner, "a folder, with --method learned alone")
    check(config.budget or learned, "--budget", config.budget, f"1 or more, with --method {config.method}")
    check(learned or not config.marked, "--marked", config.marked, "nothing, but with --method learned")
    problems, pool = read(config)
    check(config.overwrite or not out.exists(), "--out", config.out, "a new file, or --overwrite")
    device, dtype = pick_device(config.device), getattr(torch, config.dtype)
    if learned:
        tokenizer = Tokenizer(resolve(config.model), config.chat_template)
        how = dict(tokenizer=tokenizer, encoder=config.encoder, device=device, dtype=dtype)
        kept = prune_by(config.pruner, problems, config.shots, config.budget, **how)
        pruned = [one.problem for one in kept]
        counts = kept_by_kind(kept).items()
        print("kept: " + ", ".join(f"{kind} {some / all_:.1%} of {all_:,}" for kind, (some, all_) in counts))
        if config.marked:
            write_text(config.marked, "\n".join(map(marked, kept[:3])))
    else:
        model, tokenizer = open_model(resolve(config.model), config, device)
        encoder = load_encoder(config.encoder, device, dtype) if config.encoder else Encoder(model, tokenizer)
        seed = config.seed if config.method == "random" else None
        problems = with_candidates(problems, pool, encoder, config.k, seed=seed)
        fixed = [shot_text(p.question, p.solution) for p in pool] or problems[0].shots
        how = dict(size=size_by(tokenizer), encoder=encoder, model=model, tokenizer=tokenizer)
        made = fit(config.method, problems, config.budget, fixed=fixed, seed=config.seed, **how)
        pruned = list(tqdm(made, total=len(problems), unit="problem", disable=quiet()))
        report(pruned, config.budget, how["size"])
    out.parent.mkdir(parents=True, exist_ok=True)
    write_jsonl(out, map(fields_of, pruned))
    print(f"-> {out}")


def main(argv=None):
    """`prune ...`, or the flags of training."""
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["prune"]:
        run(prune_command, PruneConfig, argv[1:], method=("learned", *METHODS))
    else:
        run(train, PrunerConfig, argv)


if __name__ == "__main__":
    sys.argv[0] = "-m minicot.pruner"  # what --help says
    main()
