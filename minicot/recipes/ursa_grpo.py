"""URSA (arXiv 2501.04686), stage III, on toy pictures: GRPO, PS-GRPO, two rewards that the paper warns of.

    python -m minicot.recipes.ursa_grpo             # 2 seeds
    python -m minicot.recipes.ursa_grpo --fast      # a small part of the work, one seed

From one start, the SFT model of the recipe ursa, with its process reward model (PRM): both are taken from
where that recipe leaves them, runs/recipes/ursa, and made there if absent. Every arm learns from the same
problems, which SFT has not seen. GRPO and PS-GRPO each have the rate at which they answer most validation
problems rightly; V1 and V2 have GRPO's, as what is warned of would hide at a rate that accuracy chooses:

    grpo       the outcome, 1 or 0
    ps-grpo    the outcome, less 0.5 of a right one where the PRM's step scores drop by 30 %
    v1         the outcome + the mean step score
    v2         advantages a step: its score times the normed mean score, + the normed outcome

The PRM's scores are logged in all of them. Differs from the paper: batches of 64 responses, not 512, in one
update; questions that are always or never solved are not filtered out before.
"""

from minicot import plots
from minicot.answers import split_steps
from minicot.recipes import ursa
from minicot.recipes.experiment import Experiment
from minicot.recipes.llava_reasoner import PICTURES
from minicot.recipes.tables import claims
from minicot.records import fields_of, read_samples
from minicot.rewards import largest_drop
from minicot.runs import write_json
from minicot.sets import read_problems
from minicot.toy import pictures

SIZES = {
    "seeds": 2,
    "first_seed": ursa.SIZES["first_seed"],
    "asked": 1600,  # training problems, behind those of SFT
    "grpo_steps": 150,
    "questions": 8,  # a step
    "responses": 8,  # to each
    "kl": 0.003,
    "grpo_lrs": (3e-5, 1e-4, 3e-4),
    "validation": 300,
    "test": 2000,
    "drawn": 500,  # test problems that are sampled
    "draws": 4,  # samples of each
}
FAST = dict(seeds=1, asked=100, grpo_steps=20, grpo_lrs=(1e-4,), validation=50, test=200, drawn=50)
ARMS = {"grpo": "outcome", "ps-grpo": "ps-grpo", "v1": "mean", "v2": "steps"}

# Metrics: accuracy: greedy. Of samples at temperature 1: sampled: accuracy; prm: the PRM's mean score;
# length: in tokens; drops: share of the right ones whose step scores drop by 30 % (rho) somewhere.
# Added after the run, no claim: faulty: share of the right ones that have a wrong step, by the oracle;
# caught: of these, share with a drop.
# Claims written down before the run; an interval of 2 seeds x 2,000 problems: about 1.3 points to each side.
CLAIMS = claims("""
d1*|accuracy|ps-grpo|grpo|up             |PS-GRPO beats GRPO
d2 |accuracy|grpo   |sft |up             |GRPO beats SFT
d3 |prm     |v1     |grpo|up             |V1 pleases the PRM more than GRPO does ...
d4*|accuracy|v1     |grpo|down           |... and answers worse
d5 |length  |v1     |grpo|down           |... and its chains are shorter
d6 |prm     |v2     |grpo|up             |V2 pleases the PRM more than GRPO does ...
d7 |accuracy|v2     |grpo|down           |... and answers worse
d8 |length  |v2     |grpo|down           |... and its chains are shorter
d9 |accuracy|ps-grpo|grpo|level .02, sft |PS-GRPO is level with GRPO
d10|drops   |ps-grpo|grpo|down           |PS-GRPO leaves fewer drops in right chains
d11|sampled |grpo   |sft |up             |GRPO's samples are right more often than SFT's
d12|accuracy|ps-grpo|v1  |up             |PS-GRPO beats V1
""")
PAPER = {"sft": "54.7 (six sets)", "grpo": "+3.1 % of it", "ps-grpo": "58.2"}
COLUMNS = {
    "model": {
        "greedy": "{accuracy:.1%}",
        "over SFT": ("accuracy", "sft"),
        "samples": "{sampled:.1%}",
        "PRM's mean score": "{prm:.3f}",
        "tokens": "{length:.1f}",
        "right ones with a drop": "{drops:.1%}",
        "with a wrong step, of these with a drop": "{faulty:.1%}, {caught:.0%}",
        "in the form asked for": "{form:.1%}",
        "paper": PAPER,
    }
}
TRACKED = {"right": "right samples (share)", "prm_score": "PRM's mean score", "length": "tokens"}


def habits(out, scored, *, seed):
    """{"sampled", "prm", "length", "form" (has it an answer?): of each problem's samples the mean; "drops":
    [with a drop, right]; "faulty": [with a wrong step, right]; "caught": [with a drop, faulty]}."""
    read = [one for one in read_samples(scored) if one.responses]
    sampled = [one.responses for one in read]
    mean = lambda value: [round(sum(map(value, rs)) / len(rs), 3) for rs in sampled]
    drop = lambda r: largest_drop(r.step_scores["prm"]) >= 0.3
    right = [[(drop(r), not sound(one, r)) for r in one.responses if r.correct] for one in read]
    drops = [[sum(a for a, _ in one), len(one)] for one in right]
    faulty = [[sum(b for _, b in one), len(one)] for one in right]
    caught = [[sum(a and b for a, b in one), sum(b for _, b in one)] for one in right]
    lists = {"sampled": mean(lambda r: r.correct), "prm": mean(lambda r: r.scores["prm"])}
    lists["form"] = mean(lambda r: r.answer is not None)
    lists |= {"length": mean(lambda r: len(r.ids)), "drops": drops, "faulty": faulty, "caught": caught}
    write_json(out, lists)


def sound(samples, response):
    """Whether every step of a response about a toy picture is right."""
    return all(pictures.label_steps(samples.problem.id, split_steps(response.text)))


def declare(E):
    s, home = E.size, Experiment("ursa", "", ursa.SIZES, ursa.FAST, **PICTURES)
    there = E.borrow(home, ursa.declare, ("sft", "prm"))
    sft, prm = there["sft"], there["prm"]
    fresh = read_problems(E.data, E.train, limit=home.size.taught + s.asked)[home.size.taught :]
    asked = ursa.FORM | {"data": E.write("train.jsonl", map(fields_of, fresh))}
    arms = []
    for name, reward in ARMS.items():
        own = reward in ("outcome", "ps-grpo")
        rate = dict(grid=dict(lr=s.grpo_lrs)) if own else dict(at=(arms[0], "lr"))
        model = E.model(
            name, "align.py", init=sft, method="grpo", reward=reward, verifier=prm, limit=0, eval_split="",
            k=s.responses, batch_size=s.questions, steps=s.grpo_steps, kl=s.kl, save_every=0, probe_every=0,
            **asked, **rate,
        )  # fmt: skip
        arms.append(model)
    E.choose_by("metrics.accuracy", of=arms[:2], **E.problems(E.validation, s.validation) | ursa.FORM)
    read = [sft, *arms]
    E.read("answers", of=read, take={"accuracy": "correct"}, **E.problems(E.test, s.test) | ursa.FORM)
    drawing = dict(n=s.draws) | E.problems(E.test, s.drawn) | ursa.FORM
    for model in read:
        drawn = E.samples("drawn", model, **drawing)
        scored = E.samples("drawn-scored", model, verifier=prm, samples=drawn)
        E.read("habits", habits, scored, of=[model])


def extra(E):
    models = {model.name: model for model in E.models if model.name in ARMS}
    logs = {name: E.path(model, 0) / "metrics.jsonl" for name, model in models.items()}
    return {"training": {name: plots.smooth(log, TRACKED) for name, log in logs.items()}}


def draw(results, stem):
    plots.over_steps(results["extra"]["training"], TRACKED, f"{stem}_hacking.svg")


E = Experiment(
    "ursa_grpo",
    "URSA's PS-GRPO: Unlocking Multimodal Mathematical Reasoning via Process Reward Model (arXiv 2501.04686)",
    SIZES,
    FAST,
    **PICTURES,
)

if __name__ == "__main__":
    E.main(declare, CLAIMS, COLUMNS, extra=extra, draw=draw)
