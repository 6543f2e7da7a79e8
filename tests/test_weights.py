"""Model folders in and out, and broken folders refused in one line."""

import json
import os
import re
import resource
import shutil
from dataclasses import replace

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from minicot import families
from minicot.errors import InputError
from minicot.families import config_to_hf, parse_config
from minicot.model import KVCache, Llama3Rope, Transformer
from minicot.tokenizer import Tokenizer
from minicot.weights import attach_vision, load_model, save_model
from tests.test_model import FAMILIES, LLAMA3, SIZES, oracle, random_ids, tiny

LLAMA = SIZES | {"model_type": "llama", "hidden_act": "silu"}
EMBED, NAME = "model.embed_tokens.weight", "model.layers.1.self_attn.q_proj.weight"


@pytest.fixture
def folder(tmp_path):
    """A model folder as minicot writes it."""
    save_model(tiny(), tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def sharded(tmp_path):
    """A model folder in many shards, as transformers writes it."""
    oracle("llama").save_pretrained(tmp_path / "sharded", max_shard_size="40KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    return tmp_path / "sharded"


def refused(path, *parts, error=InputError):
    """load_model refuses with one line that holds all parts."""
    with pytest.raises(error) as caught:
        load_model(path)
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message, message


def edit(file, change):
    """Change a JSON file in place."""
    value = json.loads(file.read_text())
    change(value)
    file.write_text(json.dumps(value))


def edit_tensors(file, change):
    tensors = load_file(file)
    change(tensors)
    save_file({name: value.clone() for name, value in tensors.items()}, file)


# ---- round trips ----------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_what_minicot_saves_transformers_loads_with_the_same_logits(family, tmp_path):
    oracle(family).save_pretrained(tmp_path / "theirs")
    ours = load_model(tmp_path / "theirs")
    save_model(ours, tmp_path / "ours")
    auto = transformers.AutoModelForCausalLM
    again, info = auto.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    ids = random_ids(2, 40)
    assert (again(ids).logits - ours(ids)).abs().max() <= 1e-5
    assert load_model(tmp_path / "ours").config == ours.config
    assert again.config.eos_token_id == ours.config.eos_token_id


@torch.no_grad()
def test_shards_and_a_single_file_hold_the_same_model(sharded, tmp_path):
    oracle("llama").save_pretrained(tmp_path / "single")
    one, many = load_model(tmp_path / "single"), load_model(sharded)
    for (name, a), b in zip(one.named_parameters(), many.parameters(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_a_round_trip_keeps_dtype_and_every_bit(dtype, tmp_path):
    model = tiny().to(dtype)
    save_model(model, tmp_path)
    again = load_model(tmp_path)
    for (name, a), b in zip(model.named_parameters(), again.parameters(), strict=True):
        assert a.dtype == b.dtype == dtype and torch.equal(a, b), name
    assert transformers.AutoModelForCausalLM.from_pretrained(tmp_path).dtype == dtype
    assert {p.dtype for p in load_model(tmp_path, dtype=torch.float32).parameters()} == {torch.float32}


def test_loaded_weights_are_trainable_and_saving_over_their_own_folder_is_safe(folder):
    model, mapped = load_model(folder), load_model(folder)
    before = load_file(folder / "model.safetensors")[NAME].clone()
    with torch.no_grad():
        for parameter in model.parameters():
            assert parameter.requires_grad
            parameter.add_(1.0)
    assert torch.equal(load_file(folder / "model.safetensors")[NAME], before)  # the mapping is private
    save_model(model, folder)
    assert torch.equal(load_file(folder / "model.safetensors")[NAME], before + 1.0)
    assert torch.equal(mapped.state_dict()[NAME], before)  # its file was replaced, not written into
    with safe_open(folder / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
    assert sorted(os.listdir(folder)) == ["config.json", "model.safetensors"]


def test_saving_that_fails_leaves_the_old_model_whole(folder, monkeypatch):
    before = (folder / "model.safetensors").read_bytes()

    def disk_full(tensors, file, metadata):
        file.write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr("minicot.weights.save_file", disk_full)
    with pytest.raises(OSError, match="no space"):
        save_model(tiny(), folder)
    assert (folder / "model.safetensors").read_bytes() == before
    assert sorted(os.listdir(folder)) == ["config.json", "model.safetensors"]


@pytest.mark.parametrize("limit", [50_000, 500_000])
def test_a_disk_that_is_full_is_one_line_and_the_old_model_stays(limit, folder):
    """The system writes no file beyond the limit: it cuts the weights, or only the config (many eos ids)."""
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    model = tiny(eos_token_id=tuple(range(60_000)))
    assert 50_000 < len(before["model.safetensors"]) < 500_000
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        with pytest.raises(OSError) as caught:
            save_model(model, folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "\n" not in str(caught.value) and str(folder) in str(caught.value)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before


def test_saving_into_a_sharded_folder_replaces_its_model(sharded):
    save_model(tiny(), sharded)
    for (name, a), b in zip(tiny().named_parameters(), load_model(sharded).parameters(), strict=True):
        assert torch.equal(a, b), name


def test_a_config_file_means_random_weights_from_the_seed(folder):
    (folder / "model.safetensors").unlink()
    a, b, c = (load_model(folder / "config.json", seed=seed).lm_head.weight for seed in (1, 1, 2))
    assert torch.equal(a, b) and not torch.equal(a, c) and a.dtype == torch.float32
    assert load_model(folder / "config.json", dtype=torch.bfloat16).lm_head.weight.dtype == torch.bfloat16
    refused(folder, "model.safetensors", "config.json itself", error=FileNotFoundError)


def test_a_tied_head_may_be_absent_or_equal_but_not_different(tmp_path):
    save_model(tiny(tie_word_embeddings=True), tmp_path)
    file = tmp_path / "model.safetensors"
    assert "lm_head.weight" not in load_file(file)
    edit_tensors(file, lambda tensors: tensors.update({"lm_head.weight": tensors[EMBED]}))
    load_model(tmp_path)
    edit_tensors(file, lambda tensors: tensors.update({"lm_head.weight": tensors["lm_head.weight"] + 1}))
    refused(tmp_path, "lm_head.weight differs from model.embed_tokens.weight")


def test_the_frequencies_in_llama_2_files_are_checked_not_loaded(folder):
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    right = 1.0 / 10_000 ** (torch.arange(0, 12, 2) / 12)
    half = right.to(torch.bfloat16)
    edit_tensors(folder / "model.safetensors", lambda tensors: tensors.update({name: half}))
    load_model(folder)
    edit_tensors(folder / "model.safetensors", lambda tensors: tensors.update({name: right * 2}))
    refused(folder, name)


# ---- broken folders ----------------------------------------------------


def test_missing_extra_and_misshapen_tensors_are_named(folder):
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    edit_tensors(file, lambda tensors: tensors.pop(NAME))
    refused(folder, "missing tensors: " + NAME, "extra tensors: none")
    file.write_bytes(whole)
    extra = "model.layers.3.mlp.up_proj.weight"
    edit_tensors(file, lambda tensors: tensors.update({extra: torch.zeros(2, 2)}))
    refused(folder, "missing tensors: none", "extra tensors: " + extra)
    file.write_bytes(whole)
    edit(folder / "config.json", lambda config: config.update(intermediate_size=81))
    refused(folder, "model.safetensors", "mlp.", "80", "81", "config.json")


def test_many_missing_tensors_still_make_one_line(folder):
    edit(folder / "config.json", lambda config: config.update(num_hidden_layers=300))
    refused(folder, "and 2668 more")


@pytest.mark.parametrize("keep", [0, 4, 100, 3000, -1])
def test_a_truncated_file_is_refused(folder, keep):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    refused(folder, str(file), "not a whole safetensors file")


@pytest.mark.parametrize("byte", [0, 7, 8, 40])
def test_a_bit_flip_in_the_header_is_refused(folder, byte):
    file = folder / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[byte] ^= 0x80
    file.write_bytes(content)
    refused(folder, str(file), "not a whole safetensors file")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite_are_refused_by_tensor(folder, value):
    edit_tensors(folder / "model.safetensors", lambda tensors: tensors[NAME].view(-1)[17].fill_(value))
    refused(folder, NAME, "not finite")


def test_float16_that_overflows_is_refused(folder):
    edit_tensors(folder / "model.safetensors", lambda tensors: tensors[NAME].view(-1)[17].fill_(1e6))
    with pytest.raises(InputError, match="not finite as torch.float16"):
        load_model(folder, dtype=torch.float16)


def test_integer_tensors_and_mixed_dtypes_are_refused(folder):
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    edit_tensors(file, lambda tensors: tensors.update({NAME: tensors[NAME].to(torch.int8)}))
    refused(folder, NAME, "torch.int8")
    file.write_bytes(whole)
    edit_tensors(file, lambda tensors: tensors.update({NAME: tensors[NAME].to(torch.bfloat16)}))
    refused(folder, "torch.bfloat16", "torch.float32", "choose one dtype")
    assert load_model(folder, dtype=torch.float32).lm_head.weight.dtype == torch.float32


def test_a_missing_shard_is_named(sharded):
    shard = sorted(sharded.glob("*.safetensors"))[1]
    shard.unlink()
    refused(sharded, shard.name, "not there", error=FileNotFoundError)


def test_an_index_that_misplaces_or_forgets_a_tensor_is_refused(sharded):
    index = sharded / "model.safetensors.index.json"
    whole = index.read_text()
    weight_map = json.loads(whole)["weight_map"]
    shard = next(file for file in weight_map.values() if file != weight_map[NAME])
    edit(index, lambda value: value["weight_map"].update({NAME: shard}))
    refused(sharded, NAME, "index.json", ".safetensors:")
    index.write_text(whole)
    edit(index, lambda value: value["weight_map"].pop(NAME))
    refused(sharded, NAME)
    for bad in ("../elsewhere.safetensors", 3):
        index.write_text(whole)
        edit(index, lambda value, bad=bad: value["weight_map"].update({NAME: bad}))
        refused(sharded, NAME, repr(bad))
    index.write_text('{"metadata": {}}')
    refused(sharded, "weight_map")
    index.write_text('{"weight_map": {')
    refused(sharded, "index.json:1: not JSON")


def test_a_folder_with_two_models_is_refused(sharded, folder):
    shutil.copy(folder / "model.safetensors", sharded)
    refused(sharded, "model.safetensors", "model.safetensors.index.json", "both")


def test_absent_folders_and_configs_are_named(folder, tmp_path):
    refused(tmp_path / "nowhere", "nowhere", error=FileNotFoundError)
    (folder / "config.json").unlink()
    refused(folder, "config.json", error=FileNotFoundError)
    (folder / "config.json").write_text('{\n "model_type": llama}')
    refused(folder, "config.json:2: not JSON")
    (folder / "config.json").write_text("[]")
    refused(folder, "config.json", "list")
    (folder / "config.json").write_bytes(b"\xff\xfe{}")
    refused(folder, "config.json", "not UTF-8")


# ---- configs ----------------------------------------------------


def test_published_defaults_are_the_only_ones():
    """The whole table of what may be absent; each other field's absence is an error that names it."""
    without = {key: value for key, value in LLAMA.items() if key != "num_key_value_heads"}
    config = parse_config(without, "here")
    assert (config.num_key_value_heads, config.head_dim, config.rope_theta) == (4, 12, 10_000.0)
    for name in ("tie_word_embeddings", "qkv_bias", "o_bias", "mlp_bias", "qk_norm"):
        assert getattr(config, name) is False
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (1, 2, None)
    qwen2 = parse_config(LLAMA | {"model_type": "qwen2"}, "here")
    assert qwen2.qkv_bias and not qwen2.o_bias and qwen2.head_dim == 12 and qwen2.eos_token_id is None
    assert parse_config(LLAMA | {"model_type": "mistral", "sliding_window": None}, "here").head_dim == 12
    needed = [
        ("mistral", "num_key_value_heads"),
        ("qwen2", "num_key_value_heads"),
        ("qwen3", "head_dim"),
        ("mistral", "sliding_window"),
        *[("llama", name) for name in without if name != "model_type"],
    ]
    for family, name in needed:
        config = LLAMA | {"model_type": family, "head_dim": 12, "sliding_window": None}
        del config[name]
        with pytest.raises(InputError, match=f"here: {name} is absent"):
            parse_config(config, "here")


@pytest.mark.parametrize(
    "family, field, value",
    [
        ("llama", "model_type", "mamba"),
        ("llama", "model_type", None),
        ("llama", "hidden_act", "gelu"),
        ("llama", "rope_scaling", {"rope_type": "yarn", "factor": 4.0}),
        ("llama", "rope_scaling", {"type": "linear"}),
        ("llama", "rope_scaling", {"rope_type": "default", "factor": 4.0}),
        ("llama", "rope_scaling", "llama3"),
        ("llama", "rope_parameters", {"rope_type": "default"}),
        ("llama", "rope_theta", "1e4"),
        ("llama", "rope_scaling", {key: value for key, value in LLAMA3.items() if key != "factor"}),
        ("llama", "attention_dropout", 0.1),
        ("llama", "partial_rotary_factor", 0.5),
        ("llama", "rope_interleaved", True),
        ("llama", "quantization_config", {"bits": 4}),
        ("llama", "attention_bias", "no"),
        ("llama", "hidden_size", "48"),
        ("llama", "hidden_size", 50),
        ("llama", "num_key_value_heads", 3),
        ("llama", "num_hidden_layers", 0),
        ("llama", "vocab_size", True),
        ("llama", "rms_norm_eps", None),
        ("llama", "head_dim", 7),
        ("llama", "eos_token_id", "</s>"),
        ("llama", "eos_token_id", [2, "x"]),
        ("llama", "tie_word_embeddings", 1),
        ("mistral", "sliding_window", 0),
        ("mistral", "sliding_window", "4096"),
        ("mistral", "mlp_bias", True),
        ("mistral", "attention_bias", True),
        ("qwen2", "use_sliding_window", True),
        ("qwen2", "layer_types", ["full_attention", "sliding_attention"]),
        ("qwen3", "use_sliding_window", True),
        ("qwen3", "head_dim", None),
        ("qwen3", "mlp_bias", True),
    ],
)
def test_a_config_that_model_py_does_not_compute_is_refused_by_field(family, field, value):
    config = LLAMA | {"model_type": family, "sliding_window": None}
    if family == "qwen3":
        config["head_dim"] = 12
    parse_config(config, "here")
    with pytest.raises(InputError) as caught:
        parse_config(config | {field: value}, "folder/config.json")
    message = str(caught.value)
    assert message.startswith("folder/config.json: ") and "\n" not in message
    named = "rope_type|rope_theta|factor" if field.startswith("rope_") and isinstance(value, dict) else field
    assert re.search(named, message), message


def test_both_spellings_of_rope_say_the_same_and_contradictions_are_refused():
    new = parse_config(LLAMA | {"rope_parameters": LLAMA3}, "here")
    scaling = {key: value for key, value in LLAMA3.items() if key != "rope_theta"}
    old = parse_config(LLAMA | {"rope_theta": 500_000, "rope_scaling": scaling}, "here")
    assert new == old
    assert new.rope_scaling == Llama3Rope(8.0, 1.0, 4.0, 32)
    plain = parse_config(LLAMA | {"rope_theta": 5.0, "rope_scaling": {"type": "default"}}, "here")
    assert (plain.rope_theta, plain.rope_scaling) == (5.0, None)
    with pytest.raises(InputError, match="given twice"):
        parse_config(LLAMA | {"rope_parameters": LLAMA3, "rope_theta": 10_000}, "here")
    with pytest.raises(InputError, match="disagree"):
        parse_config(LLAMA | {"rope_parameters": LLAMA3, "rope_scaling": scaling}, "here")


def test_a_config_that_its_family_cannot_say_is_not_written():
    config = tiny().config
    assert parse_config(config_to_hf(config), "here") == config
    several = replace(config, eos_token_id=(2, 5))
    assert config_to_hf(several)["eos_token_id"] == [2, 5]
    with pytest.raises(ValueError, match="cannot be written as a llama") as caught:
        config_to_hf(replace(config, qkv_bias=True))
    assert not isinstance(caught.value, InputError)  # no user asked for it


# ---- families ----------------------------------------------------


@pytest.mark.parametrize("context", [24, 12])
@torch.no_grad()
def test_a_window_caps_the_context_where_it_equals_full_attention(context, tmp_path):
    """Up to the window logits are transformers'; one token further on they would not be, so it ends there."""
    theirs = oracle("mistral", sliding_window=16, max_position_embeddings=context)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load_model(tmp_path / "theirs")
    assert ours.config.max_position_embeddings == min(context, 16)
    save_model(ours, tmp_path / "ours")
    saved = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert (saved["max_position_embeddings"], saved["sliding_window"]) == (min(context, 16), None)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    for length in (1, 9, ours.config.max_position_embeddings):
        ids = random_ids(2, length)
        assert (ours(ids) - theirs(ids).logits).abs().max() <= 1e-5
        assert (ours(ids) - again(ids).logits).abs().max() <= 1e-5
    ids = random_ids(2, 17)
    difference = (ours(ids) - theirs(ids).logits).abs().amax((0, 2))
    assert difference[:16].max() <= 1e-5 < 1e-3 < difference[16]
    assert load_model(tmp_path / "ours").config == ours.config


@pytest.mark.parametrize("name, kind", [("qk_norm", "q_norm"), ("o_bias", "o_proj.bias")])
@torch.no_grad()
def test_a_family_that_is_llama_but_for_one_flag_is_one_row(name, kind, monkeypatch, tmp_path):
    """Every weight random; saved, loaded and computed with no other line changed."""
    row = replace(families.FAMILIES["llama"], architecture="MadeUpForCausalLM", **{name: True})
    monkeypatch.setitem(families.FAMILIES, "made-up", row)
    model = tiny(model_type="made-up", **{name: True})
    for parameter in model.parameters():
        parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.1)
    save_model(model, tmp_path)
    again = load_model(tmp_path)
    assert again.config == model.config and any(kind in name for name in again.state_dict())
    assert torch.equal(again(random_ids(2, 9)), model(random_ids(2, 9)))
    assert not torch.equal(again(random_ids(2, 9)), tiny()(random_ids(2, 9)))
    saved = json.loads((tmp_path / "config.json").read_text())
    assert (saved["model_type"], saved["architectures"]) == ("made-up", ["MadeUpForCausalLM"])
    assert (saved["attention_bias"], saved["mlp_bias"]) == (False, False)  # Llama's own fields
    edit(tmp_path / "config.json", lambda config: config.update(mlp_bias=True))
    assert load_model(tmp_path / "config.json").config.mlp_bias
    edit(tmp_path / "config.json", lambda config: config.update(model_type="llama"))
    refused(tmp_path, kind)


def test_a_bias_that_a_row_fixes_cannot_be_asked_for_otherwise(monkeypatch):
    row = replace(families.FAMILIES["llama"], mlp_bias=True)
    monkeypatch.setitem(families.FAMILIES, "made-up", row)
    config = LLAMA | {"model_type": "made-up"}
    assert (
        parse_config(config, "here").mlp_bias and parse_config(config | {"mlp_bias": True}, "here").mlp_bias
    )
    with pytest.raises(InputError, match="here: mlp_bias False; for made-up only True is known"):
        parse_config(config | {"mlp_bias": False}, "here")


# ---- other heads ----------------------------------------------------


@pytest.mark.parametrize("kind", ["TokenClassification", "SequenceClassification"])
@pytest.mark.parametrize("family", ["Llama", "Qwen2"])
def test_a_reward_model_is_not_taken_for_a_language_model_but_refused_by_name(family, kind, tmp_path):
    """By its architecture; where that is missing or wrong, by its tensors."""
    config = getattr(transformers, f"{family}Config")(**SIZES | {"num_labels": 1})
    getattr(transformers, f"{family}For{kind}")(config).save_pretrained(tmp_path)
    reason = "is a reward model (architectures is ['{}']); allowed: a language model".format(
        f"{family}For{kind}"
    )
    refused(tmp_path, str(tmp_path), reason)
    refused(tmp_path / "config.json", reason)
    for architectures in (None, [f"{family}ForCausalLM"]):
        edit(tmp_path / "config.json", lambda config: config.update(architectures=architectures))
        refused(tmp_path, "is a reward model (tensor score.", "and no lm_head)")
    assert isinstance(load_model(tmp_path / "config.json"), Transformer)


@pytest.mark.parametrize("name", ["Qwen2ForProcessRewardModel", "Qwen2ForRewardModel"])
def test_the_names_that_qwens_reward_models_give_themselves_are_known(name, folder):
    edit(folder / "config.json", lambda config: config.update(architectures=[name]))
    refused(folder, name, "is a reward model")


def test_a_language_model_with_a_score_besides_is_neither(folder):
    edit_tensors(
        folder / "model.safetensors", lambda tensors: tensors.update({"score.weight": torch.ones(1, 48)})
    )
    refused(folder, "extra tensors: score.weight")


def test_llavas_own_layout_is_refused_with_the_name_of_the_converted_one(folder):
    for family in ("llava_llama", "llava", "llava_qwen"):
        edit(
            folder / "config.json",
            lambda config: config.update(
                model_type=family, mm_vision_tower="openai/clip-vit-large-patch14-336"
            ),
        )
        for path in (folder, folder / "config.json"):
            refused(path, "config.json: has a mm_vision_tower", "llava-hf/llava-1.5-7b-hf")
    with pytest.raises(InputError, match="config.json: has a mm_vision_tower.*llava-hf/llava-1.5-7b-hf"):
        attach_vision(tiny(), folder, image_token_id=5)


# ---- real weights ----------------------------------------------------

PARAGRAPH = """The river rises in the hills north of the town and runs for about forty miles before it meets
the sea. In spring, when the snow melts, it floods the lower fields, and the farmers who live
there have learned to build their barns on the small hills that the water does not reach. In
summer it is shallow enough for children to cross on foot, and in autumn the salmon return to
the gravel where they were born.""".replace("\n", " ")


@pytest.mark.weights
@torch.no_grad()
def test_smollm2_has_transformers_perplexity_and_knows_the_capital_of_france():
    folder = os.environ.get("MINICOT_SMOLLM2")
    if not folder:
        pytest.skip("MINICOT_SMOLLM2 does not name a folder with SmolLM2-135M-Instruct")
    model, tokenizer = load_model(folder, dtype=torch.float32), Tokenizer(folder)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = torch.tensor([tokenizer.encode(PARAGRAPH)])
    ours, expected = (
        torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:]).exp().item()
        for logits in (model(ids), theirs(ids).logits)
    )
    print(f"perplexity {ours:.6f}, transformers {expected:.6f}, {ids.shape[1]} tokens")
    assert f"{ours:.3e}" == f"{expected:.3e}"

    prompt = tokenizer.chat_prompt([{"role": "user", "content": "What is the capital of France?"}])
    step, answer = torch.tensor([tokenizer.encode(prompt)]), []
    cache = KVCache(model.config, 1, step.shape[1] + 40)
    while len(answer) < 40 and (not answer or answer[-1] not in tokenizer.stop_ids):
        step = model.head(model.hidden_states(model.embed(step), cache=cache)[:, -1:]).argmax(-1)
        answer.append(step.item())
    print(tokenizer.decode(answer))
    assert "Paris" in tokenizer.decode(answer)
