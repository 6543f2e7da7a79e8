"""What the shipped base models were made from: tokenizer, config.json and texts.

    python -m minicot.toy.base_text --rows 60000 --out runs/base-text
    python train.py --init runs/base-text/config.json --data runs/base-text/text.jsonl --out runs/text \\
        --batch-size 64 --lr 3e-3 --save-every 0
    stage() { python train.py --mode plain --no-group-by-length --save-every 0 "$@"; }
    stage --init runs/text --data runs/base-text/pairs.jsonl --out runs/pairs
    stage --init runs/pairs --data runs/base-text/recall.jsonl --out runs/recall
    stage --init runs/recall --data runs/base-text/words.jsonl --out runs/words
    stage --init runs/words --data runs/base-text/listed.jsonl --out runs/listed
    stage --init runs/listed --data runs/base-text/more.jsonl --out runs/base

    python -m minicot.toy.base_text --pictures --rows 40000 --out runs/seeing
    see() { stage --feature-layer -1 --lr 1.5e-3 "$@"; }
    see --init runs/text --vision runs/seeing/tower/config.json --data runs/seeing/captions.jsonl \\
        --out runs/captions
    see --init runs/recall --vision runs/captions --data runs/seeing/tables.jsonl --out runs/tables
    see --init runs/tables --data runs/seeing/readings.jsonl --out runs/readings
    see --init runs/readings --data runs/seeing/solutions.jsonl --out runs/vision-base

The first made the text base (--init toy). Its text is the world's language and arithmetic, not its reasoning:
problems as they are told, one comparison said twice, sums, differences, products and halves, and questions
that are answered by reading one fact. No row computes a quantity that a problem asks for. Then it learns to
look a number up by its name (pairs, recall), once more the text, of which that drill costs some (words), and
worked solutions of problems whose numbers are listed ("Tom, Ana. pens: 7, 3."), not told (listed, more): no
row works on a told problem.

The others give it eyes (--init toy-vision), as LLaVA does it: a random tower learns to see from captions
alone; a language model that can look up takes that tower and projector, and learns to read pictures; and both
meet worked solutions of problems that are told or listed in words, for the papers' models, too, reason in
text before they do about pictures. No row works on a picture. Scenes come from the train split alone.

What is hard here is to find something by its name, in words (whose number?) and in a table (which column?).
Drilled alone, look-ups are learned whole within minutes: pairs, then recall, whose loss falls from 0.5 to 0.3
between its rows 22,000 and 32,000 (its echo rows are a part of pairs). Other orders failed, one run each:
recall after captions and readings (a loss of 0.53); captions after recall (0.48 after 1,165 steps, 0.07 with
the text base); no recall (look-ups at chance after 6,600 steps of readings and solutions). Columns are
drilled by tables and cells, with the thing just before its number; said as "Zoe has 13." the column stays a
draw. Rows and bars pay for the drill (12 and 21 of 100 are read whole after it) until the next stage (93 and
100), arithmetic pays for recall until the last. Of the readings half are of JPEG files of other sizes.
Batches of mixed rows matter: grouped by length they are of one kind of picture each, and a probe's loss after
300 steps was 1.06 instead of 0.88.
"""

import argparse
import json
import random
from pathlib import Path

import tokenizers
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers

from minicot.toy import pictures, problems
from minicot.toy.problems import ITEMS, NAMES, WORDINGS, make_scene, perception_questions, row_of, split_of

SPECIAL = ("<|pad|>", "<|user|>", "<|assistant|>", "<|end|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
VOCAB_SIZE = 512
FIRST_SEED = 10_000_000  # far from the seeds that problems.rows walks through
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": True,
    "initializer_range": 0.05,
    "bos_token_id": None,
    "eos_token_id": 3,
    "pad_token_id": 0,
}


TOWER = {
    "model_type": "clip_vision_model",
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": pictures.SIZE,
    "patch_size": 2 * pictures.PATCH,
    "num_channels": 3,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
    "projection_dim": 128,
    "attention_dropout": 0.0,
    "initializer_range": 0.1,
    "position_initializer_range": 1.0,
}
PROCESSOR = {
    "image_processor_type": "CLIPImageProcessor",
    "do_convert_rgb": True,
    "do_resize": True,
    "resample": 4,
    "size": {"height": pictures.SIZE, "width": pictures.SIZE},
    "do_center_crop": False,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.5] * 3,
    "image_std": [0.5] * 3,
}


def arithmetic(rng):
    """A line of true equations, in symbols and in words."""
    equations = []
    for _ in range(rng.randint(3, 7)):
        a, b = rng.randint(2, 60), rng.randint(2, 20)
        small, factor = rng.randint(2, 20), rng.randint(2, 9)
        equations.append(
            rng.choice(
                (
                    f"{a} + {b} = {a + b}",
                    f"{a + b} - {b} = {a}",
                    f"{a + b} - {a} = {b}",
                    f"{small} x {factor} = {small * factor}",
                    f"{2 * small} / 2 = {small}",
                    f"half of {2 * small} is {small}",
                    f"twice {small} is {2 * small}",
                    f"{b} more than {a} is {a + b}",
                    f"{b} less than {a + b} is {a}",
                    f"{factor} times {small} is {small * factor}",
                    f"{a} and {b} together are {a + b}",
                )
            )
        )
    return rng.choice((". ", ", ", "\n")).join(equations)


def paraphrase(rng):
    """One comparison said twice."""
    (p, q), item, n = rng.sample(NAMES, 2), rng.choice(ITEMS), rng.randint(2, 20)
    more = [
        f"{p} has {n} more {item} than {q}.",
        f"{p} has {n} {item} more than {q}.",
        f"{q} has {n} fewer {item} than {p}.",
        f"{q} has {n} {item} fewer than {p}.",
    ]
    half = [
        f"{p} has twice as many {item} as {q}.",
        f"{p} has twice the {item} of {q}.",
        f"{q} has half as many {item} as {p}.",
        f"{q} has half the {item} of {p}.",
    ]
    return " ".join(rng.sample(rng.choice((more, half)), 2))


def base_rows(n):
    """n rows {question: "", solution: text} for train.py: pretraining is SFT on rows with an empty prompt."""
    rng, rows, scene_seed = random.Random("base text 0"), [], FIRST_SEED
    while len(rows) < n:
        kind = rng.choices(("problem", "read", "arithmetic", "paraphrase"), (3, 4, 4, 1))[0]
        if kind in ("problem", "read"):
            scene = make_scene(scene_seed)
            scene_seed += 1
            if split_of(scene) != "train":
                continue
        if kind == "read":
            asked = rng.choice(perception_questions(scene.id))
            text = f"<|user|>{asked['question']}\nAnswer briefly.<|assistant|>{asked['answer']}"
        elif kind == "problem":
            text = row_of(scene)["question"]
        else:
            text = arithmetic(rng) if kind == "arithmetic" else paraphrase(rng)
        rows.append({"question": "", "solution": text})
    return rows


# What the two bases learn, one after the other: file -> its size n for each of --rows, the first picture or
# scene (the first 20,000 of the train split are data.py's), and the rows of each kind for each of n.
DRILLS = {
    "pairs": (1 / 3, 0, {"echo": 1}),
    "recall": (14 / 15, 0, {"echo": 0.2, "say": 0.2, "plain": 0.2, "lines": 0.4}),
    "listed": (0.4, 20_000, {"listed": 0.7, "sums": 0.15, "lines": 0.15}),
    "more": (0.8, 40_000, {"listed": 0.7, "sums": 0.15, "lines": 0.15}),
}
STAGES = {
    "captions": (1.0, 20_000, {"caption": 1}),
    "tables": (
        1.5,
        20_000,
        {
            "reading": 0.15,
            "table": 0.25,
            "cells": 0.25,
            "listed": 0.2,
            "number": 0.05,
            "caption": 0.05,
            "told": 0.05,
            "lines": 0.1,
        },
    ),
    "readings": (
        0.9375,
        60_000,
        {"reading": 0.5, "cells": 0.05, "listed": 0.2, "number": 0.05, "told": 0.05, "lines": 0.1},
    ),
    "solutions": (1.2, 90_000, {"listed": 0.45, "told": 0.15, "sums": 0.1, "lines": 0.1, "reading": 0.2}),
}


def listed(row):
    """What a picture shows, the names apart from the numbers: "Tom, Ana. pens: 7, 3. cups: 4, 11." A chain
    must then look up a name's number in what it has itself written, as it must with a picture."""
    shown = pictures.in_picture(pictures.scene_of(row))
    numbers = {
        item: [str(one.value) for one in shown if one.item == item]
        for item in dict.fromkeys(one.item for one in shown)
    }
    names = ", ".join(dict.fromkeys(one.who for one in shown))
    return " ".join([f"{names}.", *(f"{item}: {', '.join(said)}." for item, said in numbers.items())])


def recall(rng, how):
    """A row that looks numbers up by name: who has what as the question, then some of it said again.

    "echo": "Ana 7 Ana Ben 3 Ben", four people, one digit. The name behind the number is the point: to say it,
    the number's place must know whose it is, and that is what a look-up searches for. Rows without it ("Ana 7
    Ben 3") stay at chance for thousands of rows; with it look-ups form within 10,000 to 30,000. "say": "Ana
    has 7 Ana." "plain": "Ana has 7." "lines", as a solution: "Ana: cups 7." a line, then "Ben has 3 and Ana
    has 7." """
    names = rng.sample(NAMES, 4 if how == "echo" else rng.randint(3, 5))
    has = {name: rng.randint(*((0, 9) if how == "echo" else (2, 20))) for name in names}
    asked = [rng.choice(names) for _ in range(2 * len(names))]
    if how == "lines":  # what a chain reads, then as it uses that
        item, has_it = rng.choice(ITEMS), [f"{p} has {has[p]}" for p in asked]
        return {
            "question": "\n".join(f"{p}: {item} {has[p]}." for p in names),
            "solution": "\n".join(f"{a} and {b}." for a, b in zip(has_it[::2], has_it[1::2])),
        }
    words = {"echo": "{p} {n} {p}", "say": "{p} has {n} {p}.", "plain": "{p} has {n}."}[how]
    say = lambda who: " ".join(words.format(p=p, n=has[p]) for p in who)
    return {"question": say(names), "solution": say(asked)}


def caption_rows(split: str, n: int, *, start: int = 0, kind: str | None = None) -> list[dict]:
    """Pictures with all that they show as the solution: {id, question, solution, image}. The scenes of
    pictures.rows(split, n, ...)."""
    return [
        {
            "id": f"{scene.id}-caption",
            "question": "How many does each have?" + pictures.PLACEHOLDER,
            "solution": pictures.row_of(scene)["caption"],
            "image": f"toy:{scene.id}",
        }
        for scene in pictures.scenes(split, n, start, kind)
    ]


def cell_rows(split: str, n: int, *, start: int = 0) -> list[dict]:
    """Tables, line by line: "Zoe: pears 13, cards 9." {id, question, solution, image}. Which column is said
    first is drawn for each person, so that a number must be found by the thing that is named before it."""
    rows = []
    for scene in pictures.scenes(split, n, start, "table"):
        rng, cells = random.Random(f"cells {scene.id}"), {}
        for one in pictures.in_picture(scene):
            cells.setdefault(one.who, []).append(f"{one.item} {one.value}")
        lines = [f"{who}: {', '.join(rng.sample(two, len(two)))}." for who, two in cells.items()]
        rows.append(
            {
                "id": f"{scene.id}-cells",
                "question": "How many of what does each have?" + pictures.PLACEHOLDER,
                "solution": " ".join(lines),
                "image": f"toy:{scene.id}",
            }
        )
    return rows


def as_files(rows, folder):
    """Yield the rows; half of the readings, drawn, name a JPEG of their picture in another size, made in
    `folder`: who has only seen the arrays misreads such files."""
    folder.mkdir(exist_ok=True)
    for row in rows:
        rng = random.Random(f"file {row['id']}")
        if row["id"].endswith("-reading") and rng.random() < 0.5:
            side, how = rng.randint(pictures.SIZE, 5 * pictures.SIZE), rng.choice((0, 2, 3))  # resampling
            picture, file = pictures.draw(row["image"][4:]).resize((side, side), how), f"{row['id']}.jpg"
            picture.save(folder / file, quality=rng.randint(75, 95))
            row = {**row, "image": f"{folder.name}/{file}"}
        yield row


def ask(rows, how):
    """Rows with the prompt's last line, which train.py --mode plain does not add."""
    return [{**row, "question": f"{row['question']}\n{how}"} for row in rows]


# Kind of row -> its rows (k, start) of the train split. No row works on a picture.
THINK, BRIEF = "Think step by step.", "Answer briefly."
ROWS = {
    "caption": lambda k, start: caption_rows("train", k, start=start),
    "cells": lambda k, start: cell_rows("train", k, start=start),
    "reading": lambda k, start: ask(pictures.reading_rows("train", k, start=start), THINK),
    "table": lambda k, start: ask(pictures.reading_rows("train", k, start=start, kind="table"), THINK),
    "number": lambda k, start: ask(
        [{**row, "solution": row["answer"]} for row in pictures.perception_rows("train", k, start=start)],
        BRIEF,
    ),
    "told": lambda k, start: ask(problems.rows("train", k, start=start), THINK),
    "listed": lambda k, start: ask(
        [
            {
                "id": f"{row['id']}-listed",
                "solution": row["solution"],
                "question": row["question"].replace("<image>", listed(row)),
            }
            for row in pictures.rows("train", k, start=start)
        ],
        THINK,
    ),
    **{
        how: lambda k, start, how=how: drawn_rows(how, k, start)
        for how in ("sums", "echo", "say", "plain", "lines")
    },
}


def drawn_rows(how, k, start):
    """k rows of arithmetic ("sums") or recall, drawn from `start`."""
    rng = random.Random(f"{how} {start}")
    return [
        {
            "id": f"{how}-{i}",
            "question": "",
            **({"solution": arithmetic(rng)} if how == "sums" else recall(rng, how)),
        }
        for i in range(k)
    ]


def seeing_rows(n, start, shares):
    """About n rows, {kind of ROWS: share}; a table that two kinds read is there once."""
    rows = [row for kind, share in shares.items() for row in ROWS[kind](int(share * n), start)]
    return list({row["id"]: row for row in rows}.values())


def word_rows(n):
    """n rows: seven tenths the text once more, the rest recall, in mixed order."""
    rng, kinds = random.Random("words 0"), ["lines"] * (n // 4) + ["plain"] * (n // 20)
    rows = base_rows(n - len(kinds)) + [{"question": "", **recall(rng, how)} for how in kinds]
    rng.shuffle(rows)
    return rows


def train_tokenizer(texts):
    """Byte-level BPE: the world's words are one token each, so is each digit; any text round-trips."""
    backend = tokenizers.Tokenizer(models.BPE())
    pieces = Regex(r" ?\d| ?\p{L}+|\n| ?[^\s\p{L}\d]+|\s+")
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(pieces, "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=list(SPECIAL),
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    backend.train_from_iterator(texts, trainer)
    return backend


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=60_000)
    parser.add_argument("--pictures", action="store_true", help="what gives the text base eyes")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.pictures:
        tower = args.out / "tower"
        tower.mkdir(exist_ok=True)
        (tower / "config.json").write_text(json.dumps(TOWER, indent=1) + "\n")
        (tower / "preprocessor_config.json").write_text(json.dumps(PROCESSOR, indent=1) + "\n")
        for name, (times, start, shares) in STAGES.items():
            rows = seeing_rows(int(times * args.rows), start, shares)
            write_rows(list(as_files(rows, args.out / "pictures")), args.out / f"{name}.jsonl")
        return
    for name, (times, start, shares) in DRILLS.items():
        write_rows(seeing_rows(round(times * args.rows), start, shares), args.out / f"{name}.jsonl")
    write_rows(word_rows(round(args.rows * 2 / 3)), args.out / "words.jsonl")
    rows = base_rows(args.rows)
    words = [
        row_of(make_scene(seed), wording=wording)["solution"] for seed in range(300) for wording in WORDINGS
    ]
    texts = [row["solution"] for row in rows[:20_000]] + words + [THINK, BRIEF] * 300
    train_tokenizer(texts).save(str(args.out / "tokenizer.json"))
    files = {
        "tokenizer_config.json": {
            "eos_token": "<|end|>",
            "pad_token": "<|pad|>",
            "chat_template": CHAT_TEMPLATE,
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
        },
        "generation_config.json": {"eos_token_id": 3, "pad_token_id": 0},
        "config.json": CONFIG,
    }
    for name, value in files.items():
        (args.out / name).write_text(json.dumps(value, indent=1) + "\n")
    write_rows(rows, args.out / "text.jsonl")


def write_rows(rows, out):
    with open(out, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    print(f"{len(rows)} rows -> {out}")


if __name__ == "__main__":
    main()
