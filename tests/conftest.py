"""Shared fixtures: a folder with a small tokenizer, made here so that no test needs the network."""

import json

import pytest
import tokenizers
import torch
from tokenizers import decoders, models, pre_tokenizers, trainers

torch.set_num_threads(1)  # small tensors: more threads only wait for each other

CHATML = """{%- for message in messages %}
    {{- '<|im_start|>' + message['role'] + '\\n' + message['content'] | trim + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
CORPUS = [
    "Anna has 12 red apples and gives 5 of them to Ben.",
    "How many apples are left? 12 - 5 = 7",
    "The answer is 7.",
    "user assistant system\n\n",
    "What is the capital of France? Paris.",
] * 4


@pytest.fixture
def tokenizer_folder(tmp_path):
    """A folder with a byte-level BPE tokenizer (special ids 0 to 2), its configs and a ChatML template."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    backend.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(
            vocab_size=360,
            special_tokens=special,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "bos_token": "<|im_start|>",
                "eos_token": {"content": "<|im_end|>", "__type": "AddedToken"},
                "chat_template": CHATML,
            }
        )
    )
    return folder
