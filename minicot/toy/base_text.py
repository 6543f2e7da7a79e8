"""What the shipped base models were made from: tokenizer, config.json and texts.

    python -m minicot.toy.base_text --rows 60000 --out runs/base-text
    python train.py --init runs/base-text/config.json --data runs/base-text/text.jsonl --out runs/base \\
        --batch-size 64 --lr 3e-3 --save-every 0

    python -m minicot.toy.base_text --pictures --rows 40000 --out runs/seeing
    flags="--mode plain --lr 1.5e-3 --no-group-by-length --save-every 0"
    python train.py $flags --init toy --vision runs/seeing/tower/config.json --feature-layer -1 \\
        --data runs/seeing/captions.jsonl --out runs/captions
    python train.py $flags --init runs/captions --data runs/seeing/readings.jsonl --out runs/readings
    python train.py $flags --init runs/readings --data runs/seeing/listed.jsonl --out runs/listed
    python train.py $flags --init runs/listed --data runs/seeing/more.jsonl --out runs/vision-base

The first pair made the text base (--init toy). Its text is the world's language and arithmetic, not its
reasoning: problems as they are told, one comparison said twice, sums, differences, products and halves, and
questions that are answered by reading one fact. No row computes a quantity that a problem asks for.

The others give it eyes (--init toy-vision), as LLaVA does it: captions alone, until a random tower sees; then
readings of pictures; and worked solutions of problems that are told or listed in words, for the papers'
models, too, reason in text before they do about pictures. No row works on a picture. Batches of mixed rows
matter: grouped by length they are of one kind of picture each, and a probe's loss after 300 steps was 1.06
instead of 0.88.
Scenes come from the train split alone.

What it then reads: rows and bars; of a table the right person's numbers, but not which column is asked for.
That and the look-up of a number by its name, in text too, are what this base has not learned. Captions, which
the last stage leaves out, it has unlearned.
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
    "model_type": "llama", "vocab_size": VOCAB_SIZE, "hidden_size": 128,
    "intermediate_size": 384, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 4,
    "head_dim": 32, "max_position_embeddings": 512, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
    "hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "tie_word_embeddings": True,
    "initializer_range": 0.05, "bos_token_id": None, "eos_token_id": 3, "pad_token_id": 0,
}  # fmt: skip


TOWER = {
    "model_type": "clip_vision_model", "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 2,
    "num_attention_heads": 4, "image_size": pictures.SIZE, "patch_size": 2 * pictures.PATCH,
    "num_channels": 3,
    "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5, "projection_dim": 128, "attention_dropout": 0.0,
    "initializer_range": 0.1, "position_initializer_range": 1.0,
}  # fmt: skip
PROCESSOR = {
    "image_processor_type": "CLIPImageProcessor", "do_convert_rgb": True, "do_resize": True, "resample": 4,
    "size": {"height": pictures.SIZE, "width": pictures.SIZE}, "do_center_crop": False, "do_rescale": True,
    "rescale_factor": 1 / 255, "do_normalize": True, "image_mean": [0.5] * 3, "image_std": [0.5] * 3,
}  # fmt: skip


def arithmetic(rng):
    """A line of true equations, in symbols and in words."""
    found = []
    for _ in range(rng.randint(3, 7)):
        a, b = rng.randint(2, 60), rng.randint(2, 20)
        small, factor = rng.randint(2, 20), rng.randint(2, 9)
        found.append(rng.choice((
            f"{a} + {b} = {a + b}", f"{a + b} - {b} = {a}", f"{a + b} - {a} = {b}",
            f"{small} x {factor} = {small * factor}", f"{2 * small} / 2 = {small}",
            f"half of {2 * small} is {small}",
            f"twice {small} is {2 * small}", f"{b} more than {a} is {a + b}", f"{b} less than {a + b} is {a}",
            f"{factor} times {small} is {small * factor}", f"{a} and {b} together are {a + b}",
        )))  # fmt: skip
    return rng.choice((". ", ", ", "\n")).join(found)


def paraphrase(rng):
    """One comparison said twice."""
    (p, q), item, n = rng.sample(NAMES, 2), rng.choice(ITEMS), rng.randint(2, 20)
    more = [f"{p} has {n} more {item} than {q}.", f"{p} has {n} {item} more than {q}.",
            f"{q} has {n} fewer {item} than {p}.", f"{q} has {n} {item} fewer than {p}."]  # fmt: skip
    half = [f"{p} has twice as many {item} as {q}.", f"{p} has twice the {item} of {q}.",
            f"{q} has half as many {item} as {p}.", f"{q} has half the {item} of {p}."]  # fmt: skip
    return " ".join(rng.sample(rng.choice((more, half)), 2))


def base_rows(n, seed=0):
    """n rows {question: "", solution: text} for train.py: pretraining is SFT on rows with an empty prompt."""
    rng, found, scene_seed = random.Random(f"base text {seed}"), [], FIRST_SEED
    while len(found) < n:
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
        found.append({"question": "", "solution": text})
    return found


# What gives the text base eyes: file -> rows for each of --rows, the first picture or scene (the first 20,000
# of the train split are data.py's), and the share of each kind of row.
STAGES = {
    "captions": (1.0, 20_000, {"caption": 1}),
    "readings": (1.5, 20_000, {"reading": 0.25, "table": 0.15, "listed": 0.25, "number": 0.05,
                               "caption": 0.15, "told": 0.1, "text": 0.05}),
    "listed": (1.5, 60_000, {"listed": 0.45, "reading": 0.2, "table": 0.1, "told": 0.15, "number": 0.05,
                             "caption": 0.05}),
    "more": (1.5, 100_000, {"listed": 0.5, "reading": 0.2, "table": 0.15, "told": 0.1, "number": 0.05}),
}


def listed(row):
    """What a picture shows, the names apart from the numbers: "Tom, Ana. pens: 7, 3. cups: 4, 11." A chain
    must then look up a name's number in what it has itself written, as it must with a picture."""
    shown = pictures.in_picture(pictures.scene_of(row))
    numbers = {item: [str(one.value) for one in shown if one.item == item] for item in
               dict.fromkeys(one.item for one in shown)}
    names = ", ".join(dict.fromkeys(one.who for one in shown))
    return " ".join([f"{names}.", *(f"{item}: {', '.join(found)}." for item, found in numbers.items())])


def seeing_rows(n, start, shares):
    """n rows of the train split: captions, readings of one thing in a picture ("table": of a table),
    questions for one number, problems with worked solutions that are told from the start, or whose picture is
    listed in words instead of shown, and base rows. No row works on a picture."""
    ask = lambda rows, how: [{**row, "question": row["question"] + how} for row in rows]
    think, brief, found = "\nThink step by step.", "\nAnswer briefly.", {}
    for kind, share in shares.items():
        k = int(share * n)
        if kind == "caption":
            rows = pictures.caption_rows("train", k, start=start)
        elif kind in ("reading", "table"):
            only = kind if kind == "table" else None
            rows = ask(pictures.reading_rows("train", k, start=start, kind=only), think)
        elif kind == "number":
            reads = pictures.perception_rows("train", k, start=start)
            rows = ask([{**row, "solution": row["answer"]} for row in reads], brief)
        elif kind == "told":
            rows = ask(problems.rows("train", k, start=start), think)
        elif kind == "listed":
            rows = ask([{"id": f"{row['id']}-listed", "solution": row["solution"],
                         "question": row["question"].replace("<image>", listed(row))}
                        for row in pictures.rows("train", k, start=start)], think)
        else:
            rows = [{"id": f"text-{i}", **row} for i, row in enumerate(base_rows(k, seed=1))]
        for row in rows:
            found.setdefault(row["id"], row)                # a table may be read in two of the kinds
    return list(found.values())


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
    parser.add_argument("--pictures", action="store_true", help="what makes the vision base of the text base")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.pictures:
        tower = args.out / "tower"
        tower.mkdir(exist_ok=True)
        (tower / "config.json").write_text(json.dumps(TOWER, indent=1) + "\n")
        (tower / "preprocessor_config.json").write_text(json.dumps(PROCESSOR, indent=1) + "\n")
        for name, (times, start, shares) in STAGES.items():
            write_rows(seeing_rows(int(times * args.rows), start, shares), args.out / f"{name}.jsonl")
        return
    rows = base_rows(args.rows)
    words = [
        row_of(make_scene(seed), wording=wording)["solution"] for seed in range(300) for wording in WORDINGS
    ]
    texts = (
        [row["solution"] for row in rows[:20_000]] + words + ["Think step by step.", "Answer briefly."] * 300
    )
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
