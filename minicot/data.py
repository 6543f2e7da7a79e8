"""Rows and batches: from problems and graded responses to what a model reads and a loss looks at.

    problems -> rows of token ids -> Batch                                         (train.py)
    Samples (a problem, K graded responses) -> groups of rows -> Batch             (align.py)

`samples` is one problem's Samples, `sampled` a list of them (`pairs`, whose signature is fixed, calls its
list samples); a `group` is a list of Rows of one problem, and Batch.group says which group a row is of.
Letters: N rows, B groups (problems), K the largest group of the batch, T tokens of the longest row.
"""

import hashlib
import itertools
import math
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
import torch
from tqdm import tqdm

from minicot.answers import extract_answer, is_correct, split_steps, step_ends
from minicot.errors import InputError
from minicot.images import ImageProcessor, load_image
from minicot.records import LETTERS, Response
from minicot.toy import pictures

IMAGE = "<image>"  # where a picture stands in a text; one token of a vision-language folder's tokenizer
COT_PROMPT, DIRECT_PROMPT = "\nThink step by step.", "\nAnswer briefly."


# ---- text: what the model reads and writes -------------------------------------------------------


def render(problem, mode):
    """Problem -> the user turn. Choices are lettered; the last line asks for a chain ("cot") or the bare
    answer ("direct"); "plain" adds no such line, nor has a problem that is `plain` one in any mode. Behind
    shots a question is asked as they ask theirs, "Q: ...\\nA:", in any mode. An empty question (a pretraining
    row) renders to nothing."""
    if not problem.question:
        return ""
    turns = [turn["content"] for turn in problem.history or []] + [problem.question]
    placeholders = "" if any(IMAGE in turn for turn in turns) else f"{IMAGE}\n" * len(problem.images)
    choices = "".join(f"\n({LETTERS[i]}) {choice}" for i, choice in enumerate(problem.choices or []))
    asked = placeholders + problem.question + choices
    ask = {"cot": COT_PROMPT, "direct": DIRECT_PROMPT, "plain": ""}[mode]
    if problem.shots is not None:
        return "".join(problem.shots) + f"Q: {asked}\nA:"
    return asked + ("" if problem.plain else ask)


def prompt_text(tokenizer, problem, mode):
    """The user turn behind the turns before it, in the folder's chat template, ready for the response."""
    asked = {"role": "user", "content": render(problem, mode)}
    return tokenizer.chat_prompt([*(problem.history or []), asked]) if asked["content"] else ""


def target(problem, mode):
    """What SFT teaches: the worked solution ("cot", "plain") or the bare answer ("direct")."""
    text = problem.solution if mode != "direct" else problem.answer
    if text is None:
        raise InputError(
            f"problem {problem.id!r} has no {'solution' if mode != 'direct' else 'answer'}, "
            f"which training in mode {mode!r} needs"
        )
    return text


def grade(problem, text, *, mode, style):
    """(answer, correct) of a response: the marked answer ("cot", "plain") or all of it ("direct"); correct is
    None without a gold answer. An answer that spells out a choice counts as its letter."""
    answer = extract_answer(text, style) if mode != "direct" else text.strip() or None
    if answer is not None and problem.choices:
        spelled = [choice.strip().lower().rstrip(".") for choice in problem.choices]
        if answer.lower().rstrip(".") in spelled:
            answer = LETTERS[spelled.index(answer.lower().rstrip("."))]
    return answer, None if problem.answer is None else is_correct(answer, problem.answer)


def grade_answers(sampled, *, mode, style):
    """The grader by final answers: a list of Samples -> the same, each response with its `answer` and whether
    that is `correct`.

    A grader is any function from a list of Samples to graded Samples, in the same order: it gets many at
    once, so that one that asks a model can do so in batches."""
    graded = []
    for samples in sampled:
        marks = [grade(samples.problem, one.text, mode=mode, style=style) for one in samples.responses]
        responses = [replace(r, answer=a, correct=c) for r, (a, c) in zip(samples.responses, marks)]
        graded.append(replace(samples, responses=responses))
    return graded


# ---- rows ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """Token ids of one prompt and one response; ids[n_prompt:] is trained and scored. A picture is one
    placeholder id here."""

    problem_id: str
    ids: list
    n_prompt: int
    reward: float = 1.0
    correct: bool | None = None
    is_reference: bool = False
    images: tuple = ()
    step_ends: tuple = ()  # for a reward model: where in ids its head is read, and
    step_labels: tuple = ()  # whether all is right up to there
    advantages: tuple = ()  # of GRPO, where each token of ids[n_prompt:] has its own


def encode_row(tokenizer, problem, text, *, mode, finish="stop", ids=None, **row_fields):
    """One prompt and one response -> Row. Both are tokenised jointly; `ids` (a sampled response's own ids)
    are taken as they are, after checking that this tokenizer reads them as `text`. EOS is added where finish
    is "stop".

    An empty prompt starts with BOS where there is one; the very first token is never scored."""
    prompt = prompt_text(tokenizer, problem, mode)
    if ids is not None:
        if any(not 0 <= i < 2**31 for i in ids) or tokenizer.decode(ids) != text:
            raise InputError(
                f"problem {problem.id!r}: the response's ids do not read as its text; "
                "the samples were made with another tokenizer"
            )
        if (ids[-1:] != [] and ids[-1] in tokenizer.stop_ids) != (finish == "stop"):
            raise InputError(f"problem {problem.id!r}: finish is {finish!r}, but its ids end in {ids[-1:]}")
        prompt_ids = tokenizer.encode(prompt)
        all_ids, n_prompt = prompt_ids + list(ids), len(prompt_ids)
    else:
        all_ids, n_prompt = tokenizer.encode_pair(prompt, text)
        if finish == "stop":
            all_ids = all_ids + [tokenizer.eos_id]
    if not prompt and tokenizer.bos_id is not None:
        all_ids, n_prompt = [tokenizer.bos_id] + all_ids, 1
    if len(all_ids) <= max(n_prompt, 1):
        raise InputError(f"problem {problem.id!r}: no token to train or score; question and text are empty")
    return Row(problem.id, all_ids, max(n_prompt, 1), images=tuple(problem.images), **row_fields)


def encode_judged(tokenizer, problem, response, *, mode, kind):
    """A response as a reward model reads it -> Row with step_ends, or None where there is nothing to judge.
    kind "prm": an end for each of answers.split_steps, the answer line has none; "orm": one, the last token.

    A step's end is the token that holds the line break behind it; where the text ends first, the last token
    (EOS where the response is finished). A line break tells what no other token does, that the step is over:
    "4" may go on to "48". URSA's code puts a marker of its own there, " \u0438", a token that its vocabulary
    happens to have. Ours needs no token, and a sampled response is read as it was written. The solution
    stands where the model would write it, behind its own prompt, not in the user's turn with a request to
    check it as in URSA: the K solutions of a problem then share their prompt, and the model knows the layout
    from fine-tuning.

    The response is tokenised anew from its text: a solver's own ids may be another tokenizer's."""
    places = step_ends(response.text)
    if not (places if kind == "prm" else response.text.strip()):
        return None
    row = encode_row(tokenizer, problem, response.text, mode=mode, finish=response.finish)
    last, prompt = len(row.ids) - 1, prompt_text(tokenizer, problem, mode)
    bos = int(not prompt and tokenizer.bos_id is not None)
    broken = [len(prompt) + end for end in places if end < len(response.text)] if kind == "prm" else []
    ends = [bos + i for i in tokenizer.tokens_at(prompt + response.text, broken)]
    ends += [last] * (kind == "orm" or len(ends) < len(places))
    if any(after <= before for before, after in zip(ends, ends[1:])):
        raise InputError(f"problem {problem.id!r}: a token of this tokenizer holds the ends of two steps")
    return replace(row, step_ends=tuple(ends))


def encode_labelled(tokenizer, sampled, *, mode, kind):
    """A list of Samples -> (Rows that teach a reward model, counts of the responses that cannot). The labels
    of a "prm" are the steps' step_labels, that of an "orm" is whether the response is correct."""
    rows, counts = [], Counter()
    for samples in sampled:
        for response in samples.responses:
            labels = response.step_labels if kind == "prm" else response.correct
            row = encode_judged(tokenizer, samples.problem, response, mode=mode, kind=kind)
            if labels is None:
                counts["without a label"] += 1
            elif row is None:
                counts["without a step"] += 1
            else:
                labels = checked_labels(samples.problem, response) if kind == "prm" else [labels]
                rows.append(replace(row, step_labels=tuple(labels)))
    return rows, dict(counts)


def checked_labels(problem, response):
    """A response's step_labels, checked: one a step, true up to the first error and false from there on."""
    labels, n = response.step_labels, len(split_steps(response.text))
    if len(labels) != n or any(label not in (0, 1) for label in labels):
        raise InputError(
            f"problem {problem.id!r}: step_labels are {labels!r:.80} of a response with {n} steps; allowed: "
            "true or false for each of answers.split_steps"
        )
    if any(after > before for before, after in zip(labels, labels[1:])):
        raise InputError(
            f"problem {problem.id!r}: step_labels are {labels!r:.80}; allowed: true up to the first error, "
            "false from there on"
        )
    return list(map(bool, labels))


def fit(rows, max_length, overlong):
    """Rows that fit the context, and the number left out. overlong "refuse" raises instead: a response is
    never cut."""
    long = [row for row in rows if len(row.ids) > max_length]
    if long and overlong == "refuse":
        raise InputError(
            f"{len(long)} of {len(rows)} rows are longer than {max_length} tokens, the first is problem "
            f"{long[0].problem_id!r} with {len(long[0].ids)}; allowed: a larger --max-length (within the "
            "model's context) or --overlong skip"
        )
    kept = [row for row in rows if len(row.ids) <= max_length]
    if not kept:
        raise InputError(f"all {len(rows)} rows are longer than {max_length} tokens")
    return kept, len(long)


# ---- pictures ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ImageReader:
    """How a folder's model takes pictures: the placeholder's id, how many of them stand for a picture, the
    picture's height and width in pixels, and what makes pixels of a file."""

    token_id: int
    n_tokens: int
    side: int
    processor: ImageProcessor
    blind: bool = False  # control: grey pictures

    def pixels(self, images):
        """[(picture, root)] -> list of (C,H,W). InputError or OSError names the one that can't be read."""
        pixels = [self.processor(image) for image in open_pictures(images)]
        for (name, _), (_, H, W) in zip(images, (one.shape for one in pixels)):
            if (H, W) != (self.side, self.side):
                raise InputError(
                    f"image {name!r}: the folder's image processor makes {W} x {H} pixels of it; "
                    f"allowed: {self.side} x {self.side}, which the model reads"
                )
        return [torch.zeros_like(one) for one in pixels] if self.blind else pixels

    def expand(self, ids, problem_id, n_images):
        """Each placeholder id -> its n tokens. InputError where there are not as many as pictures."""
        if ids.count(self.token_id) != n_images:
            raise InputError(
                f"problem {problem_id!r}: {ids.count(self.token_id)} {IMAGE} in its text, {n_images} "
                "pictures; allowed: one for each, or none in the question"
            )
        return [token for i in ids for token in [i] * (self.n_tokens if i == self.token_id else 1)]


def open_pictures(images):
    """[(picture, root)] -> RGB pictures of PIL. InputError or OSError names the one that can't be read."""
    return [
        pictures.draw(name[4:]) if name.startswith("toy:") else load_image(name, root)
        for name, root in images
    ]


def image_reader(model, tokenizer, folder):
    """The ImageReader of a model, whose preprocessor_config.json is in `folder`; None for a model that reads
    text only."""
    if not hasattr(model, "vlm_config"):
        return None
    config = model.vlm_config
    if tokenizer.encode(IMAGE) != [config.image_token_id]:
        raise InputError(
            f"{tokenizer.folder}: its tokenizer reads {IMAGE} as {tokenizer.encode(IMAGE)}; "
            f"allowed: as the model's image token, [{config.image_token_id}]"
        )
    side = config.vision.image_size
    return ImageReader(config.image_token_id, config.image_seq_length, side, ImageProcessor(folder))


def longest_row(context, problems, reader):
    """How many tokens a Row may have, in which a picture is one, so that it fits the context when the picture
    becomes n."""
    per_picture = reader.n_tokens - 1 if reader else 0
    return context - per_picture * max((len(problem.images) for problem in problems), default=0)


def check_pictures(groups, reader, source):
    """Refuse, before any work, rows with pictures for a model that reads text only, or with not as many as
    their text has places for."""
    for row in (row for group in groups for row in group):
        if reader is not None:
            reader.expand(row.ids, row.problem_id, len(row.images))
        elif row.images:
            raise InputError(
                f"{source}: problem {row.problem_id!r} has a picture, but the model reads text "
                "only; allowed: a vision-language folder, or train.py --vision"
            )


def readable(problems, reader):
    """Before a run: (the problems whose pictures can all be decoded, "id: reason" of each other one).

    Every distinct picture is decoded once, a few at a time; what toy/pictures.py draws is taken as it is."""
    if reader is None:
        return problems, []
    named = dict.fromkeys(picture for problem in problems for picture in problem.images)
    files = [one for one in named if not (one[0].startswith("toy:") and pictures.is_id(one[0][4:]))]

    def reason(picture):
        try:
            reader.pixels([picture])
        except (InputError, OSError) as error:
            return str(error)

    with ThreadPoolExecutor(4) as pool:
        decoded = tqdm(pool.map(reason, files), total=len(files), desc="pictures", disable=not files or None)
        reasons = dict(zip(files, decoded))
    bad = {p.id: [why for picture in p.images if (why := reasons.get(picture))] for p in problems}
    left = [problem for problem in problems if not bad[problem.id]]
    return left, [f"{id_}: {why[0]}" for id_, why in bad.items() if why]


def ahead(function, items):
    """Yield function(item) for each item, in order; while the caller works on one, the next is made in a
    background thread, and no more than that. An exception comes at its item's turn; closing the generator
    ends the thread."""
    pool = ThreadPoolExecutor(1)
    try:
        future = None
        for item in items:
            before, future = future, pool.submit(function, item)
            if before:
                yield before.result()
        if future:
            yield future.result()
    finally:
        pool.shutdown(cancel_futures=True)


# ---- batches, and their order --------------------------------------------------------------------


@dataclass(frozen=True)
class Batch:
    """N response rows of B groups, at most K a group; only present responses are rows. Right-padded.

    ids (N,T); loss_mask, pad_mask (N,T) bool (True = scored, True = a real token); group, slot (N,) the row's
    place in (B,K); rewards (B,K) float64; correct (B,K) int8 (1, 0, -1 = unknown); present (B,K) bool;
    is_reference (N,) bool; images (I,C,H,W) or None, once a group, and image_group (I,); step_ends (N,S)
    where a reward model's head is read (-1 = no such step), step_labels (N,S) bool; advantages (N,T) float64
    where tokens have their own (0 where not scored), or None."""

    ids: torch.Tensor
    loss_mask: torch.Tensor
    pad_mask: torch.Tensor
    group: torch.Tensor
    slot: torch.Tensor
    rewards: torch.Tensor
    correct: torch.Tensor
    present: torch.Tensor
    is_reference: torch.Tensor
    problem_ids: list
    step_ends: torch.Tensor
    step_labels: torch.Tensor
    images: torch.Tensor | None = None
    image_group: torch.Tensor | None = None
    advantages: torch.Tensor | None = None

    def to(self, device):
        moved = {
            name: value.to(device) for name, value in vars(self).items() if isinstance(value, torch.Tensor)
        }
        return replace(self, **moved)


def collate(groups, pad_id, reader=None):
    """Groups (a list of lists of Row; for SFT each row is its own group) -> Batch. `reader` expands each
    image placeholder to its n tokens and reads the pictures, those of a group once."""
    images, image_group = [], []
    if reader is not None:
        groups = [
            [
                replace(
                    row,
                    ids=(ids := reader.expand(row.ids, row.problem_id, len(row.images))),
                    n_prompt=row.n_prompt + (more := len(ids) - len(row.ids)),
                    step_ends=tuple(end + more for end in row.step_ends),
                )
                for row in group
            ]
            for group in groups
        ]
        for b, group in enumerate(groups):
            pixels = reader.pixels(group[0].images)
            images, image_group = images + pixels, image_group + [b] * len(pixels)
    rows = [row for group in groups for row in group]
    N, T = len(rows), max(len(row.ids) for row in rows)
    B, K = len(groups), max(len(group) for group in groups)
    ids = torch.full((N, T), pad_id)
    loss_mask, pad_mask = torch.zeros(N, T, dtype=torch.bool), torch.zeros(N, T, dtype=torch.bool)
    S = max(len(row.step_ends) for row in rows)
    step_ends, step_labels = torch.full((N, S), -1), torch.zeros(N, S, dtype=torch.bool)
    advantages = torch.zeros(N, T, dtype=torch.float64) if rows[0].advantages else None
    for n, row in enumerate(rows):
        step_ends[n, : len(row.step_ends)] = torch.tensor(row.step_ends, dtype=torch.long)
        step_labels[n, : len(row.step_labels)] = torch.tensor(row.step_labels, dtype=torch.bool)
        ids[n, : len(row.ids)] = torch.tensor(row.ids)
        pad_mask[n, : len(row.ids)] = True
        loss_mask[n, row.n_prompt : len(row.ids)] = True
        if row.advantages:
            advantages[n, row.n_prompt : len(row.ids)] = torch.tensor(row.advantages, dtype=torch.float64)
    group_of = torch.tensor([b for b, group in enumerate(groups) for _ in group])
    slot_of = torch.tensor([k for group in groups for k in range(len(group))])
    rewards, correct = torch.zeros(B, K, dtype=torch.float64), torch.full((B, K), -1, dtype=torch.int8)
    present = torch.zeros(B, K, dtype=torch.bool)
    rewards[group_of, slot_of] = torch.tensor([row.reward for row in rows], dtype=torch.float64)
    correct[group_of, slot_of] = torch.tensor(
        [-1 if row.correct is None else int(row.correct) for row in rows], dtype=torch.int8
    )
    present[group_of, slot_of] = True
    return Batch(
        ids,
        loss_mask,
        pad_mask,
        group_of,
        slot_of,
        rewards,
        correct,
        present,
        torch.tensor([row.is_reference for row in rows]),
        [group[0].problem_id for group in groups],
        step_ends,
        step_labels,
        torch.stack(images) if images else None,
        torch.tensor(image_group) if images else None,
        advantages,
    )


def to_groups(values, batch):
    """Values of the rows (N,) -> (B,K); absent = 0."""
    grouped = values.new_zeros(batch.present.shape)
    return grouped.index_put((batch.group, batch.slot), values)


def schedule(lengths, batch_size, n_rows, seed):
    """Which items make which batch: a list of lists of indices that covers n_rows items, pass after pass,
    each pass in a new order. Batches are length-bucketed: within a window of 32 batches, items of like length
    stand together (equal lengths leave the order alone). A function of its arguments alone, so that a resumed
    run finds the same batches."""
    rng = np.random.default_rng(seed)
    passes = math.ceil(n_rows / len(lengths))
    order = np.concatenate([rng.permutation(len(lengths)) for _ in range(passes)])[:n_rows]
    batches = []
    for start in range(0, n_rows, 32 * batch_size):
        window = order[start : start + 32 * batch_size]
        window = window[np.argsort(np.asarray(lengths)[window], kind="stable")]
        cut = [window[i : i + batch_size].tolist() for i in range(0, len(window), batch_size)]
        batches += [cut[i] for i in rng.permutation(len(cut))]
    return batches


def seed_of(*parts):
    """A 63-bit seed that is a function of its parts (e.g. a run's seed and a problem's id), the same on
    every machine."""
    digest = hashlib.sha256("\0".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def peek(tokenizer, groups):
    """Print rows as the loss sees them: prompt tokens grey, trained tokens green, each token's edge marked
    by `|`. Of a reward model's rows: tokens at which it is to say right green, wrong red, the others grey."""
    for row in (row for group in groups for row in group):
        tokens = [tokenizer.decode([i], skip_special=False).replace("\n", "\\n") for i in row.ids]
        colours = [90] * row.n_prompt + [90 if row.step_ends else 32] * (len(tokens) - row.n_prompt)
        for end, right in zip(row.step_ends, row.step_labels):
            colours[end] = 32 if right else 31
        print(
            f"{row.problem_id}  reward {row.reward:g}  {row.n_prompt} + {len(tokens) - row.n_prompt} tokens"
        )
        runs = itertools.groupby(zip(colours, tokens), key=lambda pair: pair[0])
        print("|".join(f"\033[{c}m{'|'.join(token for _, token in run)}\033[0m" for c, run in runs))


# ---- groups for alignment ------------------------------------------------------------------------


def distinct(responses):
    """The responses without those that repeat an earlier one's text."""
    first = {}
    for response in responses:
        first.setdefault(response.text.strip(), response)
    return list(first.values())


def pairs(samples, *, max_pairs=3, window=(0.25, 0.85), seed):
    """Right x wrong pairs for DPO and IPO: a list of Samples -> Samples of two responses each, the chosen one
    first.

    Of each problem whose share of right responses lies in `window`, at most max_pairs random pairs of
    distinct responses (LLaVA-Reasoner, section 3.3). Rows of {prompt, chosen, rejected}, whose correctness is
    unknown, pass through."""
    chosen = []
    for one in (one for one in samples if one.responses):
        if all(response.correct is None for response in one.responses):
            rewards = [response.reward for response in one.responses]
            if len(rewards) != 2 or None in rewards or rewards[0] <= rewards[1]:
                raise InputError(
                    f"problem {one.problem.id!r}: without 'correct', its responses must be a chosen and a "
                    f"rejected one; found rewards {rewards}"
                )
            chosen.append(one)
            continue
        share = sum(bool(response.correct) for response in one.responses) / len(one.responses)
        if not window[0] <= share <= window[1]:
            continue
        responses = distinct(one.responses)
        wrong = [response for response in responses if response.correct is False]
        couples = [[r, w] for r in responses if r.correct for w in wrong]
        rng = np.random.default_rng(seed_of(seed, one.problem.id))
        order = rng.permutation(len(couples))[:max_pairs]
        chosen += [replace(one, responses=couples[i]) for i in order]
    if not chosen:
        raise InputError(
            f"no right x wrong pair in {len(samples)} groups whose share of right responses lies in "
            f"{list(window)}; allowed: a wider --pair-low, --pair-high, or more samples"
        )
    return chosen


def truncate_words(sampled, words):
    """Samples whose responses keep their first `words` words (split at blanks, as LLaVA-Reasoner's code does,
    which counts words and not tokens) and lose EOS: what is cut is not the model's to end, and that code
    never scores EOS in DPO."""

    def cut(response):
        kept = response.text.split(" ")[:words]
        ids = response.ids[:-1] if response.ids and response.finish == "stop" else response.ids
        return replace(
            response,
            text=" ".join(kept),
            finish="length",
            ids=ids if len(kept) == len(response.text.split(" ")) else None,
        )

    return [replace(samples, responses=list(map(cut, samples.responses))) for samples in sampled]


def make_groups(tokenizer, sampled, *, mode, max_length, reference):
    """A list of Samples -> (groups of Rows, counts of what was left out).

    Duplicates, empty responses and rows over max_length are left out and counted; reference True puts the
    problem's own solution first, as a right response with reward 1 (AFT: at least one positive). A group that
    ends up without a response is left out. counts also says how many groups have no pair (all right, all
    wrong, or one response)."""
    groups, counts = [], Counter()
    for samples in sampled:
        problem, responses = samples.problem, samples.responses
        if not responses:
            counts["without a response"] += 1
            continue
        if reference:
            best = max([1.0, *(r.reward for r in responses if r.reward is not None)])  # none ranks above it
            responses = [Response(target(problem, mode), correct=True, reward=best), *responses]
        counts["duplicates"] += len(responses) - len(distinct(responses))
        group = []
        for response in distinct(responses):
            reward = response.reward if response.reward is not None else response.correct
            if reward is None:
                raise InputError(f"problem {problem.id!r}: a response has neither 'reward' nor 'correct'")
            row = encode_row(
                tokenizer,
                problem,
                response.text,
                mode=mode,
                finish=response.finish,
                ids=response.ids,
                reward=float(reward),
                correct=response.correct,
                is_reference=reference and response is responses[0],
            )
            if not response.text.strip():
                counts["empty"] += 1
            elif len(row.ids) > max_length:
                counts["overlong"] += 1
            else:
                group.append(row)
        if group:
            groups.append(group)
            counts["without a pair"] += len({row.reward for row in group}) < 2
        else:
            counts["without a response"] += 1
    if not groups:
        raise InputError(f"no group is left of {len(sampled)}: {dict(counts)}")
    return groups, dict(counts)
