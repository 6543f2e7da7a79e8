"""CoT-Influx (CoT-Max), "Fewer is More: Boosting LLM Reasoning with Reinforced Context Pruning" (arXiv
2312.08901), on real text: shots of GSM8K before questions of AddSub, MultiArith, SVAMP and SingleEq.

    python -m minicot.recipes.cot_max_text --init LM --data gsm8k:PATH --name cot_max_text \\
        --others addsub:FILE multiarith:FILE svamp:FILE singleeq:FILE                    # a CPU
    ... --device cuda --dtype bfloat16 --set answers=1 each=1000 steps=1000 repeats=10 k=16 \\
        target=512 budgets=512 --name cot_max_text_512        # a run for each budget, without claims

The pool of shots is the first of --splits, the pruner's questions the second. Every way fills the same budget
from the same pool; what is read is the loss of the gold answer that follows, of --others the bare answer and
of the third split the worked solution. On a CPU the pruner learns from the loss alone (its reward is then
1 / (1 + L) * (t / T)^w). No test question stands in the pool: the pruner refuses one that does.
"""

import torch

from minicot.pruner import judge_by
from minicot.recipes.cot_max import BASELINES
from minicot.recipes.experiment import Cell, Experiment
from minicot.recipes.tables import claims
from minicot.records import fields_of
from minicot.runs import write_json
from minicot.sets import read_problems
from minicot.tokenizer import Tokenizer
from minicot.weights import load_model

SIZES = {
    "seeds": 1,
    "k": 8,  # candidates a question
    "target": 256,
    "budgets": (256,),
    "each": 16,  # questions of each of --others
    "solved": 32,  # questions of the third split
    "steps": 20,
    "questions": 4,  # a step
    "repeats": 4,
    "lr": 1e-3,
    "answers": 0,  # 1: greedy answers are drawn, in the reward and of the test questions
}
FAST = dict(each=2, solved=2, steps=2, questions=2, repeats=2, k=2)

# Metrics: nll<B>: nats a token of the gold answers (--others) behind shots of B tokens; solved<B>: of the
# worked solutions (the third split). Written down before the run. By the spread of
# 8 questions in a trial of it, 64 see about 0.3 nats.
CLAIMS = claims("""
s1*|nll256   |topk  |zero-shot        |down|shots help this LM: gold answers cost less behind them
s2 |solved256|topk  |zero-shot        |down|... and worked solutions
a1*|nll256   |pruner|random           |down|at T, gold answers cost less behind the pruner's shots than random
a2*|nll256   |pruner|topk             |down|... TopK
a3*|nll256   |pruner|selective-context|down|... Selective Context
a4 |nll256   |pruner|random-tokens    |down|... random words
a5 |solved256|pruner|topk             |down|worked solutions cost less behind the pruner's shots than TopK
a6 |solved256|pruner|random-tokens    |down|... random words
""")
COLUMNS = {
    "model": {
        "gold answers, nats a token": "{nll256:.3f}",
        "worked solutions": "{solved256:.3f}",
        **{f"accuracy at {budget:,}": f"{{at{budget}:.1%}}" for budget in (256, 512, 1024, 2048)},
    }
}


def losses(out, answered, solved, base, dtype, *, seed):
    """{"nll": of each gold answer, "solved": of each worked solution}: mean nats a token under the LM."""
    model = load_model(base, device=E.args.device, dtype=getattr(torch, dtype))
    tokenizer, found = Tokenizer(base), {}
    for name, data, mode in (("nll", answered, "direct"), ("solved", solved, "plain")):
        how = dict(style="hash", max_new_tokens=1, batch_size=8, accuracy=False)
        judge = judge_by(model, tokenizer, mode=mode, **how)
        problems = read_problems(str(data))
        found[name] = judge([[problem] for problem in problems])[0][:, 0].tolist()
    write_json(out, found)


def declare(E):
    s = E.size
    pool = E.write("pool.jsonl", map(fields_of, read_problems(E.data, E.train)))
    tested = {
        "answered": [problem for data in E.others for problem in read_problems(data, limit=s.each)],
        "solved": read_problems(E.data, E.test, limit=s.solved),
    }
    tested = {name: E.write(f"{name}.jsonl", map(fields_of, rows)) for name, rows in tested.items()}
    pruner = E.model(
        "pruner", "minicot.pruner", *(() if s.answers else ("--no-accuracy",)), model=E.init, data=E.data,
        split=E.validation, shots=pool, k=s.k, target=s.target, steps=s.steps, batch_size=s.questions,
        repeats=s.repeats, lr=s.lr,
    )  # fmt: skip
    for name in ("pruner", "zero-shot", *BASELINES):
        model = pruner if name == "pruner" else E.alias(name, pruner)
        how = dict(pruner=pruner) if name == "pruner" else dict(method=name, k=s.k)
        for budget in s.budgets:
            cut = [
                Cell(
                    f"{part}-{budget}", ("minicot.pruner", "prune"), "pruned.jsonl",
                    dict(model=E.init, data=data, shots=pool, budget=budget, **how), of=model,
                )
                for part, data in tested.items()
            ]  # fmt: skip
            take = {f"nll{budget}": "nll", f"solved{budget}": "solved"}
            E.read(f"losses-{budget}", losses, *cut, E.init, E.args.dtype, of=[model], take=take)
            if s.answers:
                flags = dict(model=E.init, data=cut[0], style="hash", max_new_tokens=256)
                E.read(f"at{budget}", of=[model], take={f"at{budget}": "correct"}, mode="plain", **flags)


E = Experiment(
    "cot_max_text",
    "CoT-Influx (CoT-Max) on real text: Reinforced Context Pruning (arXiv 2312.08901)",
    SIZES,
    FAST,
    data="gsm8k:PATH",
    splits=("train[:200]", "train[200:264]", "test"),
)

if __name__ == "__main__":
    E.main(declare, CLAIMS, COLUMNS)
