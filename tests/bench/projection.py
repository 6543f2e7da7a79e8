"""What a 7B AFT run costs in GPU hours, on paper: python -m tests.bench.projection prints the page's tables.

Work is counted in FLOPs, two for a multiplication and its addition. A token that is read (forward) costs

    f(S) = 2 N + 4 L HD S        N weights that multiply (the head too where logits are made), L layers,
                                 HD width of all query heads, S keys that it looks at

and one that is trained 3 f(S): the backward costs twice the forward; with --checkpoint-activations 4 f(S).
This is the 6N rule (Kaplan et al., arXiv 2001.08361) with its attention term. A GPU does MFU times its peak.

A token that is drawn reads all weights and the keys of its row from memory, so a step of R rows takes

    max(bytes / (MBU bandwidth), FLOPs / (MFU peak)),     bytes = 2 N + 4 L KD (S_own R + P R / n)

P prompt keys are read once for the n rows that share them (sampling.py), KD the width of key and value heads.
`measured` counts the FLOPs of a step that runs here with PyTorch's counter: the test holds f to it.
"""

import re
from dataclasses import dataclass
from pathlib import Path

from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from minicot.losses import sft_loss
from minicot.model import ModelConfig
from minicot.scoring import score

PAGE = Path(__file__).with_name("PROJECTION.md")
LLAMA2_7B = ModelConfig(
    model_type="llama",
    vocab_size=32000,
    hidden_size=4096,
    intermediate_size=11008,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=32,
    head_dim=128,
    max_position_embeddings=4096,
    rms_norm_eps=1e-5,
    rope_theta=1e4,
)


@dataclass(frozen=True)
class Assumed:
    """What is assumed, not measured. Lengths: GSM8K's under SmolLM2's tokenizer (sides.gsm8k_lengths)."""

    questions: int = 7473  # GSM8K's training set
    test: int = 1319
    samples: int = 8
    epochs: int = 3
    P: int = 60  # prompt tokens
    R: int = 94  # response tokens, EOS included
    peak: float = 989e12  # H100, dense bfloat16
    bandwidth: float = 3.35e12
    mfu: float = 0.40  # of training and prefill
    mbu: float = 0.50  # of decoding
    rows: int = 256  # decoded together
    passes: int = 3  # trained token: 3 forwards' work; 4 with --checkpoint-activations


def weights(config):
    """(weights of the layers, of the head), those that multiply a token."""
    E, kv = config.hidden_size, config.num_key_value_heads * config.head_dim
    width = config.num_attention_heads * config.head_dim
    return config.num_hidden_layers * (2 * E * (width + kv) + 3 * E * config.intermediate_size), (
        E * config.vocab_size
    )


def forward(config, tokens, scored, pairs):
    """FLOPs of a forward pass: `tokens` through the layers, `scored` through the head, `pairs` of a query and
    a key that it looks at."""
    layers, head = weights(config)
    width = config.num_attention_heads * config.head_dim
    return 2 * layers * tokens + 2 * head * scored + 4 * config.num_hidden_layers * width * pairs


def group(config, P, R, K):
    """FLOPs of a forward pass over a group: the prompt once, K responses."""
    return forward(config, P + K * R, K * R, P**2 / 2 + K * (R * P + R**2 / 2))


def drawing(config, a, questions, n):
    """Seconds of one GPU that draws n responses to each question, `rows` at a time."""
    layers, head = weights(config)
    kv = 2 * 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim  # bytes a position
    prefill = questions * forward(config, a.P, 1, a.P**2 / 2) / (a.mfu * a.peak)
    read = 2 * (layers + head) + kv * a.rows * (a.R / 2 + a.P / n)  # of a step, at half of the response
    computed = forward(config, a.rows, a.rows, a.rows * (a.P + a.R / 2))
    step = max(read / (a.mbu * a.bandwidth), computed / (a.mfu * a.peak))
    return prefill + questions * n * a.R / a.rows * step


def stages(config=LLAMA2_7B, assumed=Assumed()):
    """{stage: GPU hours} of one run."""
    a = assumed
    trained = lambda flops: a.passes * flops / (a.mfu * a.peak)
    aft = a.epochs * a.questions * group(config, a.P, a.R, a.samples)
    padded = a.epochs * a.questions * a.samples * group(config, a.P, a.R, 1)
    seconds = {
        "VFT, 3 epochs": trained(a.epochs * a.questions * group(config, a.P, a.R, 1)),
        "sampling, 8 a question": drawing(config, a, a.questions, a.samples),
        "AFT, 3 epochs": trained(aft),
        "evaluation, greedy, twice": 2 * drawing(config, a, a.test, 1),
    }
    hours = {stage: s / 3600 for stage, s in seconds.items()}
    return hours | {"all": sum(hours.values()), "AFT without shared prompts": trained(padded) / 3600}


CASES = {
    "as assumed": Assumed(),
    "MFU 55 %, MBU 60 %": Assumed(mfu=0.55, mbu=0.60),
    "MFU 25 %, MBU 30 %": Assumed(mfu=0.25, mbu=0.30),
    "activations checkpointed": Assumed(passes=4),
    "A100": Assumed(peak=312e12, bandwidth=2.0e12),
}


def table():
    """The page's table: a line for each stage, a column for each case."""
    found = {case: stages(assumed=assumed) for case, assumed in CASES.items()}
    lines = ["| GPU hours | " + " | ".join(found) + " |", "|---|" + "---|" * len(found)]
    for stage in found["as assumed"]:
        lines.append(f"| {stage} | " + " | ".join(f"{hours[stage]:.2f}" for hours in found.values()) + " |")
    return "\n".join(lines)


def work():
    """What the first column stands on."""
    a, (layers, head) = Assumed(), weights(LLAMA2_7B)
    one, eight = (group(LLAMA2_7B, a.P, a.R, K) for K in (1, a.samples))
    return (
        "| of the run | |\n|---|---|\n"
        f"| weights that multiply | {layers / 1e9:.2f}e9 in the layers, {head / 1e9:.3f}e9 in the head |\n"
        f"| forward of one solution | {one / 1e12:.2f} TFLOPs |\n"
        f"| forward of a group of {a.samples} | {eight / 1e12:.2f} TFLOPs, padded "
        f"{a.samples * one / 1e12:.2f} |\n"
        f"| VFT, all | {3 * a.epochs * a.questions * one / 1e15:,.0f} PFLOPs |\n"
        f"| AFT, all | {3 * a.epochs * a.questions * eight / 1e15:,.0f} PFLOPs |"
    )


def measured(model, batch):
    """(FLOPs of a forward, of a forward and backward) of score on a batch, as PyTorch counts them, attention
    by its products (MATH): a causal mask spares nothing there."""
    counts = []
    for backward in (False, True):
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            loss = sft_loss(score(model, batch), batch.loss_mask)
            if backward:
                loss.backward()
        counts.append(counter.get_total_flops())
    return counts


def write_page():
    """Put the tables in the place of those between the page's markers."""
    text = PAGE.read_text()
    for name, made in (("work", work()), ("hours", table())):
        pattern = rf"(<!-- {name} -->\n).*?(<!-- end -->)"
        assert len(re.findall(pattern, text, re.S)) == 1, (
            f"{PAGE}: no part between <!-- {name} --> and its end"
        )
        text = re.sub(pattern, lambda found: found[1] + made + "\n" + found[2], text, flags=re.S)
    PAGE.write_text(text)


if __name__ == "__main__":
    write_page()
    print(work(), table(), sep="\n\n")
