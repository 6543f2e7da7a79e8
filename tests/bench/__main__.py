"""Speed beside transformers: python -m tests.bench [cpu|cuda]

Same weights, data and dtype, both sides in turn in one process (A B A B ...), so that a noisy machine hits
both; what is printed is the ratio theirs / ours (above 1: minicot is faster) as min / median / max over the
rounds. No timed test: this is a table to read.

P prompt tokens   n samples a prompt   new tokens a sample   V vocabulary
"""

import statistics
import sys
import tempfile
import time

import torch
import transformers

from minicot.model import ModelConfig, Transformer
from minicot.sampling import generate
from minicot.weights import save_model

COMMON = dict(
    model_type="llama",
    rms_norm_eps=1e-5,
    rope_theta=10000.0,
    max_position_embeddings=2048,
    tie_word_embeddings=True,
)
MODELS = {
    "toy 1M": ModelConfig(
        vocab_size=1024,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=32,
        **COMMON,
    ),
    "SmolLM2-135M, 4 layers": ModelConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=4,
        num_attention_heads=9,
        num_key_value_heads=3,
        head_dim=64,
        **COMMON,
    ),
}


def pair_of_models(config, device, dtype):
    """The same random weights in minicot and in transformers."""
    ours = Transformer(config, torch.Generator().manual_seed(0)).to(dtype)
    with tempfile.TemporaryDirectory() as folder:
        save_model(ours, folder)
        theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    return ours.to(device).eval(), theirs.to(device).eval()


def in_turn(ours, theirs, device, rounds=5):
    """Ratios theirs / ours of the wall time, a round each, after one uncounted round; and our best
    seconds."""

    def timed(work):
        if device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    ours(), theirs()
    times = [(timed(ours), timed(theirs)) for _ in range(rounds)]
    return [b / a for a, b in times], min(a for a, _ in times)


def generation_row(name, device, dtype, *, prompts, P, n, new):
    """Sampling at temperature 1 without a stop id: `prompts` prompts of P tokens, n samples each, `new`
    tokens a sample."""
    config = MODELS[name]
    ours, theirs = pair_of_models(config, device, dtype)
    ids = torch.randint(5, config.vocab_size, (prompts, P), generator=torch.Generator().manual_seed(1))
    theirs.generation_config.eos_token_id = None
    theirs.generation_config.pad_token_id = 0

    def run_ours():
        generate(ours, ids.tolist(), n=n, max_new_tokens=new, stop_ids=[], seed=0)

    def run_theirs():
        with torch.inference_mode():
            theirs.generate(
                ids.to(device),
                do_sample=True,
                top_k=0,
                max_new_tokens=new,
                min_new_tokens=new,
                num_return_sequences=n,
            )

    ratios, seconds = in_turn(run_ours, run_theirs, device)
    print(
        f"| generate | {name} | {prompts} prompts, P {P}, n {n}, {new} new | {min(ratios):.2f} / "
        f"{statistics.median(ratios):.2f} / {max(ratios):.2f} "
        f"| {prompts * n * new / seconds:,.0f} tokens/s |",
        flush=True,
    )


def main():
    kind = sys.argv[1] if len(sys.argv) > 1 else "cpu"
    device = torch.device(kind)
    dtype = torch.float32 if kind == "cpu" else torch.bfloat16
    where = torch.cuda.get_device_name() if kind == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"{where}, {dtype}, torch {torch.__version__}, transformers {transformers.__version__}\n")
    print(
        "| work | model | shape | transformers / minicot (min / median / max) | minicot |\n"
        "|---|---|---|---|---|"
    )
    for name in MODELS:
        generation_row(name, device, dtype, prompts=32, P=64, n=1, new=48)
        generation_row(name, device, dtype, prompts=8, P=256, n=8, new=48)


if __name__ == "__main__":
    main()
