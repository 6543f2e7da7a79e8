"""The vision tower and the vision-language model against transformers, and Llava folders in and out."""

import json
import re
import shutil
from dataclasses import replace

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from minicot.errors import InputError
from minicot.families import FAMILIES, VISION_DEFAULTS, config_to_hf, parse_llava, parse_vision
from minicot.model import KVCache, Transformer
from minicot.vision import VisionEncoder, VisionLanguageModel
from minicot.weights import attach_vision, load_model, save_model
from tests.test_model import LLAMA3, SIZES, padded, tiny
from tests.test_weights import edit, edit_tensors, refused

# 20 pixels are three patches of 6 and a rest that nobody sees: n = 9 (10 with the class token)
TOWER = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 20,
    "patch_size": 6,
}
TOWERS = {
    "clip": ("CLIP", TOWER),
    "clip-gelu": ("CLIP", TOWER | {"hidden_act": "gelu", "layer_norm_eps": 1e-3, "num_channels": 1}),
    "siglip": ("Siglip", TOWER | {"layer_norm_eps": 1e-3}),
    "siglip-no-head": ("Siglip", TOWER | {"vision_use_head": False}),
}
IMAGE = 96
LLAVAS = {  # tower, text, text options, Llava options
    "clip-llama": ("clip", "Llama", {"rope_parameters": LLAMA3}, {}),
    "clip-full-mistral": (
        "clip-gelu",
        "Mistral",
        {"sliding_window": None},
        {"vision_feature_layer": 1, "vision_feature_select_strategy": "full"},
    ),
    "siglip-qwen2": (
        "siglip",
        "Qwen2",
        {"tie_word_embeddings": True},
        {"vision_feature_select_strategy": "full"},
    ),
    "siglip-qwen3": (
        "siglip-no-head",
        "Qwen3",
        {"head_dim": 24},
        {
            "vision_feature_layer": -1,
            "multimodal_projector_bias": False,
            "projector_hidden_act": "gelu_pytorch_tanh",
        },
    ),
}


def shaken(model):
    """Every weight random and large, norms and biases too, so that none can be left out unnoticed."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.normal_(0, 0.15)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return model.eval()


def tower_config(name):
    family, options = TOWERS[name]
    return getattr(transformers, f"{family}VisionConfig")(**options)


def tower_oracle(name):
    return shaken(getattr(transformers, f"{TOWERS[name][0]}VisionModel")(tower_config(name)))


def oracle(name):
    tower, text, text_options, options = LLAVAS[name]
    text = getattr(transformers, f"{text}Config")(**SIZES | text_options)
    return shaken(
        transformers.LlavaForConditionalGeneration(
            transformers.LlavaConfig(
                vision_config=tower_config(tower), text_config=text, image_token_index=IMAGE, **options
            )
        )
    )


@pytest.fixture(scope="module", params=LLAVAS)
def pair(request, tmp_path_factory):
    """(transformers model, minicot model, the folder that both have their weights from)."""
    theirs = oracle(request.param)
    folder = tmp_path_factory.mktemp("model")
    theirs.save_pretrained(folder)
    return theirs, load_model(folder).eval(), folder


@pytest.fixture
def folder(tmp_path):
    """A Llava folder (CLIP and Llama) as transformers writes it."""
    oracle("clip-llama").save_pretrained(tmp_path / "llava")
    return tmp_path / "llava"


@pytest.fixture
def tower_folder(tmp_path):
    tower_oracle("clip").save_pretrained(tmp_path / "tower")
    return tmp_path / "tower"


def pictures(config, count, seed=0):
    shape = (count, config.vision.num_channels, config.vision.image_size, config.vision.image_size)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def prompts(config, rows, side="right", seed=0):
    """ids (N,T) and pad_mask of rows such as "aa*a**": letters are random words, stars are images."""
    generator = torch.Generator().manual_seed(seed)
    rows = [
        [
            token
            for mark in row
            for token in (
                [config.image_token_id] * config.image_seq_length
                if mark == "*"
                else [torch.randint(1, 90, (), generator=generator).item()]
            )
        ]
        for row in rows
    ]
    pad_mask = padded([len(row) for row in rows], side)
    ids = torch.zeros(pad_mask.shape, dtype=torch.long)
    ids[pad_mask] = torch.tensor([token for row in rows for token in row])
    return ids, pad_mask


MIXED = ["aa*aaa*a", "aaaaaa", "**aa", "aaa*"]  # two images, none, two next to each other, one


def small(tower="clip", seed=0, **changes):
    """A small random model: parse_llava's own way to a config, then random weights."""
    values = {
        "model_type": "llava",
        "text_config": config_to_hf(tiny().config),
        "image_token_index": IMAGE,
        "vision_config": tower_config(tower).to_dict(),
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "full",
        "projector_hidden_act": "gelu",
    }
    config = parse_llava(values | changes, "here")
    return VisionLanguageModel(config, torch.Generator().manual_seed(seed)).eval()


# ---- the tower against transformers ----------------------------------------------------


@pytest.mark.parametrize("tower", TOWERS)
@torch.no_grad()
def test_every_hidden_state_of_a_bare_tower_equals_transformers(tower, tmp_path):
    theirs = tower_oracle(tower)
    theirs.save_pretrained(tmp_path)
    model = attach_vision(tiny(), tmp_path, image_token_id=IMAGE)
    pixels = pictures(model.vlm_config, 3)
    expected = theirs(pixels, output_hidden_states=True)
    assert len(expected.hidden_states) == 4
    for layer, hidden in enumerate(expected.hidden_states):
        assert hidden.std() > 0.3  # else a small difference would say nothing
        assert (model.vision_tower(pixels, layer) - hidden).abs().max() <= 1e-5
        assert torch.equal(model.vision_tower(pixels, layer), model.vision_tower(pixels, layer - 4))
    last = model.vision_tower.vision_model.post_layernorm(model.vision_tower(pixels, -1))
    if model.vlm_config.vision.class_token:
        assert (last[:, 0] - expected.pooler_output).abs().max() <= 1e-5
    else:
        assert (last - expected.last_hidden_state).abs().max() <= 1e-5
    assert model.vlm_config.image_seq_length == 9
    with pytest.raises(IndexError):
        model.vision_tower(pixels, 4)


@pytest.mark.parametrize("family", ["CLIP", "Siglip"])
@pytest.mark.parametrize("prefix", [True, False])
@torch.no_grad()
def test_a_tower_is_read_from_the_whole_clip_or_siglip_and_from_old_names(family, prefix, tmp_path):
    """prefix: the tower alone, its names as files before transformers 5 have them; else the whole model."""
    config = getattr(transformers, f"{family}Config")(
        vision_config=TOWER,
        text_config={
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "vocab_size": 9,
        },
    )
    theirs = shaken(getattr(transformers, f"{family}Model")(config))
    (theirs.vision_model if prefix else theirs).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    if prefix:
        tensors = {f"vision_model.{name}": value for name, value in load_file(file).items()}
        save_file(tensors | {"vision_model.embeddings.position_ids": torch.arange(10)[None]}, file)
    else:
        assert {"text_model", "logit_scale"} <= {name.split(".")[0] for name in load_file(file)}
    model = attach_vision(tiny(), tmp_path, image_token_id=IMAGE)
    pixels = pictures(model.vlm_config, 2)
    expected = theirs.vision_model(pixels, output_hidden_states=True).hidden_states[-2]
    assert (model.vision_tower(pixels, -2) - expected).abs().max() <= 1e-5
    assert model.vlm_config.vision_feature_select_strategy == ("default" if family == "CLIP" else "full")


@torch.no_grad()
def test_layers_behind_the_feature_are_not_computed():
    model = small(vision_feature_layer=1)
    for block in model.vision_tower.vision_model.encoder.layers[1:]:
        block.forward = None
    assert model.encode_images(pictures(model.vlm_config, 2)).shape == (2, 10, 48)


def test_pictures_of_another_size_are_refused_with_both_shapes():
    model = small()
    for shape in ((1, 3, 20, 26), (1, 3, 26, 14), (1, 1, 20, 20)):  # the second has nine patches too
        with pytest.raises(AssertionError, match=re.escape(f"{shape[1:]}, the tower reads (3, 20, 20)")):
            model.encode_images(torch.zeros(shape))


# ---- the whole model against transformers ----------------------------------------------------


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_logits_of_mixed_batches_equal_transformers(pair, side):
    theirs, ours, _ = pair
    ids, pad_mask = prompts(ours.vlm_config, MIXED, side)
    pixels = pictures(ours.vlm_config, 5)
    expected = theirs(
        ids,
        pixel_values=pixels,
        attention_mask=pad_mask.long(),
        position_ids=(pad_mask.cumsum(1) - 1).clamp(min=0),
    ).logits[pad_mask]
    assert expected.std() > 0.3
    logits = ours(ids, pixels, pad_mask)[pad_mask]
    assert (logits - expected).abs().max() <= 1e-5
    other = ours(ids, pixels.roll(1, 0), pad_mask)[pad_mask]
    assert (other - logits).abs().max() > 0.1  # the images are seen, and their order counts


@torch.no_grad()
def test_a_batch_without_images_equals_transformers(pair):
    theirs, ours, _ = pair
    ids, pad_mask = prompts(ours.vlm_config, ["aaaaaaaa", "aaaaa"])
    logits = ours(ids, pad_mask=pad_mask)
    assert (logits - theirs(ids, attention_mask=pad_mask.long()).logits)[pad_mask].abs().max() <= 1e-5


@torch.no_grad()
def test_greedy_ids_equal_transformers_generate_over_24_tokens(pair):
    theirs, ours, _ = pair
    ids, pad_mask = prompts(ours.vlm_config, ["aa*a*aa", "aaa*a"], "left")
    pixels = pictures(ours.vlm_config, 3)
    expected = theirs.generate(
        input_ids=ids,
        pixel_values=pixels,
        attention_mask=pad_mask.long(),
        do_sample=False,
        max_new_tokens=24,
        min_new_tokens=24,
        pad_token_id=0,
        eos_token_id=None,
        suppress_tokens=[IMAGE],
    )[:, ids.shape[1] :]
    cache, new = KVCache(ours.config, 2, ids.shape[1] + 24), []
    logits = ours.head(ours.hidden_states(ours.embed(ids, pixels), pad_mask=pad_mask, cache=cache))
    for _ in range(24):
        logits[..., IMAGE] = -torch.inf
        new.append(logits[:, -1:].argmax(-1))
        logits = ours.head(ours.hidden_states(ours.embed(new[-1]), cache=cache))
    assert torch.equal(torch.cat(new, 1), expected)


def test_gradients_equal_transformers_and_unused_weights_have_none(pair):
    theirs, ours, _ = pair
    ids, pad_mask = prompts(ours.vlm_config, MIXED)
    pixels = pictures(ours.vlm_config, 5)
    expected = theirs(ids, pixel_values=pixels, attention_mask=pad_mask.long()).logits
    for logits in (expected, ours(ids, pixels, pad_mask)):
        logits[pad_mask].square().mean().backward()
    expected = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    unused = 0
    for name, parameter in ours.named_parameters():
        name = name.replace("vision_tower.vision_model", "vision_tower")
        name = name.replace("language_model.model.", "language_model.")
        grad = expected["model." + name if "lm_head" not in name else "lm_head.weight"]
        if grad is None or not parameter.requires_grad:
            unused += 1
            assert grad is None or grad.abs().sum() == 0, name
            assert parameter.grad is None and not parameter.requires_grad, name
        elif not name.endswith("k_proj.bias"):  # softmax is blind to it, all but Qwen3's
            assert (parameter.grad - grad).abs().max() <= 1e-5 * grad.abs().max() + 1e-7, name
    layers = ours.vision_tower.layers_before(ours.vlm_config.vision_feature_layer)
    assert unused == 16 * (3 - len(layers)) + 2 + 11 * ours.vlm_config.vision.vision_use_head
    theirs.zero_grad()
    ours.zero_grad()


# ---- its own promises ----------------------------------------------------


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("tower", ["clip", "siglip"])
@torch.no_grad()
def test_cached_pieces_equal_one_full_forward(tower, side):
    model = small(tower).double()
    ids, pad_mask = prompts(model.vlm_config, MIXED, side)
    pixels, new = pictures(model.vlm_config, 5).double(), torch.randint(1, 90, (4, 5))
    cache = KVCache(model.config, 4, ids.shape[1] + 5, dtype=torch.float64)
    hidden = [model.hidden_states(model.embed(ids, pixels), pad_mask=pad_mask, cache=cache)[:, -1:]]
    for piece in (new[:, :1], new[:, 1:4], new[:, 4:]):
        hidden.append(model.hidden_states(model.embed(piece), cache=cache))
    cached, first = model.head(torch.cat(hidden, 1))[:, 1:], [0, 2, 2, 4, 5]  # first: images of a row
    for row in range(4):
        whole = torch.cat((ids[row][pad_mask[row]], new[row]))[None]
        mine = pixels[first[row] : first[row + 1]]
        alone = model(whole, mine if len(mine) else None)
        assert torch.allclose(cached[row], alone[0, -5:], atol=1e-12)


@torch.no_grad()
def test_features_stand_for_their_pixels_and_can_be_shared_by_rows():
    model = small()
    pixels = pictures(model.vlm_config, 2)
    features = model.encode_images(pixels)
    assert features.shape == (2, model.vlm_config.image_seq_length, model.config.hidden_size) == (2, 10, 48)
    ids, pad_mask = prompts(model.vlm_config, ["a*a*aaa", "aa**a"])
    four = model(ids, pixels[[0, 1, 1, 0]], pad_mask)
    assert torch.equal(model(ids, features[[0, 1, 1, 0]], pad_mask), four)


@torch.no_grad()
def test_the_features_stand_exactly_where_the_placeholders_are():
    model = small()
    ids, _ = prompts(model.vlm_config, ["aa*aaa*a"])
    features = torch.randn(2, 10, 48)
    embeds = model.embed(ids, features)[0]
    assert torch.equal(embeds[2:12], features[0]) and torch.equal(embeds[15:25], features[1])
    words = [0, 1, 12, 13, 14, 25]
    assert torch.equal(embeds[words], model.language_model.embed(ids)[0, words])


@pytest.mark.parametrize(
    "rows, images, message",
    [
        (["a*a", "aa"], 2, "hold 10 image placeholders (id 96), but 2 images need 20, 10 each"),
        (["a*a", "**"], 2, "hold 30 image placeholders (id 96), but 2 images need 20, 10 each"),
        (["a*a", "aa"], None, "hold 10 image placeholders (id 96), but 0 images need 0, 10 each"),
        (["aaa", "aa"], 1, "hold 0 image placeholders (id 96), but 1 images need 10, 10 each"),
    ],
)
def test_another_number_of_images_than_placeholders_is_an_error_with_both(rows, images, message):
    model = small()
    ids, pad_mask = prompts(model.vlm_config, rows)
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        model(ids, None if images is None else pictures(model.vlm_config, images), pad_mask)
    assert not isinstance(caught.value, InputError)  # collate makes the placeholders


def test_placeholders_that_are_not_whole_runs_are_refused():
    model = small()
    ids, _ = prompts(model.vlm_config, ["a*aa", "a*aa"])
    torn, moved = ids.clone(), ids.clone()
    torn[1, 5], torn[1, 12] = 7, IMAGE  # one word among the ten
    moved[0, 10], moved[1, 11] = 7, IMAGE  # nine in one row, eleven in the other
    for bad, image in ((torn, 1), (moved, 0)):
        with pytest.raises(ValueError, match=f"of image {image} do not stand next to each other, 10 in one"):
            model.embed(bad, pictures(model.vlm_config, 2))
    over = torch.full((2, 15), IMAGE)  # 30 make three images, the second one in two rows
    with pytest.raises(ValueError, match="of image 1 do not"):
        model.embed(over, pictures(model.vlm_config, 3))


@torch.no_grad()
def test_a_placeholder_may_lie_outside_the_vocabulary():
    model = small()
    ids, pad_mask = prompts(model.vlm_config, MIXED)
    pixels = pictures(model.vlm_config, 5)
    expected = model(ids, pixels, pad_mask)
    for token in (-200, 10_000):
        model.vlm_config = replace(model.vlm_config, image_token_id=token)
        assert torch.equal(model(ids.masked_fill(ids == IMAGE, token), pixels, pad_mask), expected)


@torch.no_grad()
def test_generate_takes_the_model_for_a_text_model():
    from minicot.sampling import generate

    model = small()
    text = Transformer(model.config)
    text.load_state_dict(model.language_model.state_dict())
    ours, expected = (
        generate(one, [[5, 6, 7], [8]], max_new_tokens=12, temperature=0, stop_ids=[0], seed=0)
        for one in (model, text)
    )
    assert ours == expected


@torch.no_grad()
def test_bfloat16_runs_and_stays_near_float32_and_float64_is_float64_all_the_way():
    model = small("siglip")
    ids, pad_mask = prompts(model.vlm_config, MIXED)
    pixels = pictures(model.vlm_config, 5)
    expected = model(ids, pixels, pad_mask)[pad_mask]
    wide = model.double()(ids, pixels, pad_mask)[pad_mask]
    assert wide.dtype == torch.float64 and 0 < (wide - expected).abs().max() < 1e-4
    again = model.head(
        model.hidden_states(model.embed(ids, pixels), pad_mask=pad_mask, positions=(pad_mask.cumsum(1) + 999))
    )[pad_mask]
    assert torch.allclose(wide, again, atol=1e-11)
    narrow = model.to(torch.bfloat16)(ids, pixels, pad_mask)[pad_mask]
    assert narrow.dtype == torch.bfloat16
    assert (narrow.float() - expected).abs().max() < 0.05 * expected.abs().max()


def test_random_weights_come_from_the_generator_alone_and_have_the_deviations_of_the_docstring():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    a, b = (
        small(
            "siglip",
            vision_config=tower_config("siglip").to_dict()
            | {"hidden_size": 64, "image_size": 60, "position_initializer_range": 0.5},
        )
        for _ in range(2)
    )
    assert torch.equal(torch.get_rng_state(), before)
    for (name, x), y in zip(a.named_parameters(), b.parameters(), strict=True):
        assert torch.equal(x, y), name
        assert x.isfinite().all(), name
    text = tiny()  # its weights come first: a tower changes none
    for (name, x), y in zip(text.named_parameters(), a.language_model.parameters(), strict=True):
        assert torch.equal(x, y), name
    parts = a.vision_tower.vision_model
    block = parts.encoder.layers[1]
    for weight, std in (
        (parts.embeddings.position_embedding.weight, 0.5),
        (parts.embeddings.patch_embedding.weight, 0.02),
        (block.self_attn.q_proj.weight, 64**-0.5 * 6**-0.5),
        (block.self_attn.out_proj.weight, 64**-0.5),
        (block.mlp.fc1.weight, 128**-0.5),
        (block.mlp.fc2.weight, 64**-0.5 * 6**-0.5),
        (parts.head.attention.in_proj_weight, 64**-0.5),
        (a.multi_modal_projector.linear_1.weight, 0.15),
    ):
        assert abs(weight.std() / std - 1) < 0.1
    for name, parameter in a.named_parameters():
        if name.endswith("bias"):
            assert (parameter == 0).all(), name
        elif "norm" in name:
            assert (parameter == 1).all(), name
    with torch.device("meta"):
        assert all(parameter.is_meta for parameter in VisionLanguageModel(a.vlm_config).parameters())


def test_positions_of_hugging_faces_deviation_unless_the_config_says_more():
    assert small().vlm_config.vision.position_initializer_range == 0.02
    assert abs(small().vision_tower.vision_model.embeddings.position_embedding.weight.std() - 0.02) < 0.004


# ---- folders out ----------------------------------------------------


@torch.no_grad()
def test_what_minicot_saves_transformers_loads_strictly_with_the_same_logits(pair, tmp_path):
    _, ours, _ = pair
    save_model(ours, tmp_path)
    again, info = transformers.LlavaForConditionalGeneration.from_pretrained(
        tmp_path, output_loading_info=True
    )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    ids, pad_mask = prompts(ours.vlm_config, MIXED)
    pixels = pictures(ours.vlm_config, 5)
    theirs = again.eval()(ids, pixel_values=pixels, attention_mask=pad_mask.long()).logits[pad_mask]
    assert (theirs - ours(ids, pixels, pad_mask)[pad_mask]).abs().max() <= 1e-5
    assert again.config.image_seq_length == ours.vlm_config.image_seq_length
    stored = json.loads((tmp_path / "config.json").read_text())
    assert stored["tie_word_embeddings"] == ours.config.tie_word_embeddings
    assert load_model(tmp_path).vlm_config == ours.vlm_config


def test_a_round_trip_keeps_every_weight_also_those_that_no_feature_needs(pair, tmp_path):
    theirs, ours, _ = pair
    save_model(ours, tmp_path)
    again, stored = load_model(tmp_path), load_file(tmp_path / "model.safetensors")
    for (name, a), b in zip(ours.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(a, b) and torch.equal(a, stored[name]), name
    unique = {parameter.data_ptr(): parameter.numel() for parameter in theirs.parameters()}
    assert sum(tensor.numel() for tensor in stored.values()) == sum(unique.values())
    assert {
        "language_model.model.norm.weight",
        "multi_modal_projector.linear_2.weight",
        "vision_tower.vision_model.encoder.layers.2.mlp.fc2.bias",
    } <= stored.keys()


def test_a_config_that_llava_cannot_say_is_not_written(tmp_path):
    model = small("clip")
    vision = replace(model.vlm_config.vision, vision_use_head=True)
    model.vlm_config = replace(model.vlm_config, vision=vision)
    with pytest.raises(ValueError, match="cannot be written as a llava") as caught:
        save_model(model, tmp_path)
    assert not isinstance(caught.value, InputError)  # no user asked for it


# ---- folders in ----------------------------------------------------

# our name -> the name in a file of another age
NAMINGS = {
    "first": {},
    "without vision_model": {"vision_tower.vision_model.": "vision_tower."},
    "model in front": {
        "language_model.lm_head.": "lm_head.",
        "language_model.model.": "model.language_model.",
        "vision_tower.vision_model.": "model.vision_tower.vision_model.",
        "multi_modal_projector.": "model.multi_modal_projector.",
    },
    "newest": {
        "language_model.lm_head.": "lm_head.",
        "language_model.model.": "model.language_model.",
        "vision_tower.vision_model.": "model.vision_tower.",
        "multi_modal_projector.": "model.multi_modal_projector.",
    },
}


def renamed(tensors, naming):
    def new(name):
        for ours, theirs in NAMINGS[naming].items():
            if name.startswith(ours):
                return theirs + name.removeprefix(ours)
        return name

    return {new(name): value for name, value in tensors.items()}


@pytest.mark.parametrize("naming", NAMINGS)
@torch.no_grad()
def test_a_folder_in_any_of_transformers_namings_is_the_same_model(pair, naming, tmp_path):
    _, ours, folder = pair
    shutil.copy(folder / "config.json", tmp_path)
    tensors = renamed(ours.state_dict(), naming)
    assert (naming == "first") == (tensors.keys() == ours.state_dict().keys())
    save_file(tensors, tmp_path / "model.safetensors")
    again = load_model(tmp_path).state_dict()
    for name, tensor in ours.state_dict().items():
        assert torch.equal(tensor, again.pop(name)), name
    assert not again


def test_a_config_file_means_random_weights_from_the_seed(folder):
    a, b, c = (load_model(folder / "config.json", seed=seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(a[name], b[name]) for name in a)
    for name in (
        "language_model.lm_head.weight",
        "multi_modal_projector.linear_1.weight",
        "vision_tower.vision_model.embeddings.class_embedding",
    ):
        assert not torch.equal(a[name], c[name]), name
    assert (
        load_model(folder / "config.json", dtype=torch.bfloat16)
        .encode_images(torch.zeros(1, 3, 20, 20))
        .dtype
        == torch.bfloat16
    )


def test_loaded_weights_are_trainable_but_for_those_behind_the_feature(folder):
    model = load_model(folder)
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert len(frozen) == 18
    assert all(
        name.startswith(
            ("vision_tower.vision_model.encoder.layers.2.", "vision_tower.vision_model.post_layernorm.")
        )
        for name in frozen
    )


@pytest.mark.parametrize(
    "change, parts",
    [
        (
            lambda tensors: tensors.pop("multi_modal_projector.linear_2.bias"),
            ("missing tensors: multi_modal_projector.linear_2.bias",),
        ),
        (
            lambda tensors: tensors.update({"vision_tower.head.probe": torch.zeros(1, 1, 32)}),
            ("extra tensors: vision_tower.vision_model.head.probe",),
        ),
        (
            lambda tensors: tensors.update({"vision_tower.embeddings.class_embedding": torch.zeros(31)}),
            ("vision_tower.embeddings.class_embedding has shape (31,)", "(32,)"),
        ),
        (
            lambda tensors: tensors["vision_tower.pre_layrnorm.bias"].fill_(float("nan")),
            ("pre_layrnorm.bias", "not finite"),
        ),
        (
            lambda tensors: tensors.update({"model.multi_modal_projector.linear_1.bias": torch.zeros(48)}),
            ("there twice", "multi_modal_projector.linear_1.bias"),
        ),
        (
            lambda tensors: tensors.update({"model.image_newline": torch.zeros(48)}),
            ("extra tensors: model.image_newline",),
        ),
        (
            lambda tensors: tensors.update({"vision_tower.pre_layrnorm.bias": torch.zeros(32).half()}),
            ("torch.float16", "torch.float32", "choose one dtype"),
        ),
    ],
)
def test_a_broken_llava_folder_is_refused_in_one_line(change, parts, folder):
    edit_tensors(folder / "model.safetensors", change)
    refused(folder, *parts)


def test_a_tied_head_may_be_stored_but_not_differ(tmp_path):
    oracle("siglip-qwen2").save_pretrained(tmp_path)
    file, head = tmp_path / "model.safetensors", "language_model.lm_head.weight"
    edit_tensors(
        file,
        lambda tensors: tensors.update({head: tensors["language_model.model.embed_tokens.weight"].clone()}),
    )
    assert head not in load_model(tmp_path).state_dict()
    edit(tmp_path / "config.json", lambda config: config["text_config"].pop("tie_word_embeddings"))
    assert load_model(tmp_path).config.tie_word_embeddings  # said in the outer config alone
    edit_tensors(file, lambda tensors: tensors[head].add_(1))
    refused(tmp_path, "language_model.lm_head.weight differs")


# ---- configs ----------------------------------------------------


def test_the_defaults_of_sub_configs_are_those_of_transformers_classes():
    assert list(FAMILIES) == ["llama", "mistral", "qwen2", "qwen3"]
    for name, family in FAMILIES.items():
        default, table = transformers.AutoConfig.for_model(name).to_dict(), family.class_defaults
        assert {field: default[field] for field in table} == table
    for family, table in VISION_DEFAULTS.items():
        default = transformers.AutoConfig.for_model(family).to_dict()
        for name, value in table.items():  # SigLIP's class has no such range
            assert default.get(name, 0.02 if name.endswith("initializer_range") else False) == value, name


def test_published_llava_configs_are_read_as_sparse_as_they_are():
    """The fields of llava-hf/llava-1.5-7b-hf and llava-hf/llava-interleave-qwen-0.5b-hf."""
    config = parse_llava(
        {
            "model_type": "llava",
            "ignore_index": -100,
            "image_token_index": 32000,
            "pad_token_id": 32001,
            "projector_hidden_act": "gelu",
            "tie_word_embeddings": False,
            "torch_dtype": "float16",
            "text_config": {
                "max_position_embeddings": 4096,
                "model_type": "llama",
                "rms_norm_eps": 1e-05,
                "torch_dtype": "float16",
                "vocab_size": 32064,
            },
            "vision_config": {
                "hidden_size": 1024,
                "image_size": 336,
                "intermediate_size": 4096,
                "model_type": "clip_vision_model",
                "num_attention_heads": 16,
                "num_hidden_layers": 24,
                "patch_size": 14,
                "projection_dim": 768,
                "vocab_size": 32000,
            },
            "vision_feature_layer": -2,
            "vision_feature_select_strategy": "default",
        },
        "here",
    )
    text, vision = config.text, config.vision
    assert (config.image_token_id, config.image_seq_length) == (32000, 576)
    assert config.multimodal_projector_bias
    assert (text.hidden_size, text.intermediate_size, text.num_hidden_layers) == (4096, 11008, 32)
    assert (text.num_attention_heads, text.num_key_value_heads, text.rope_theta) == (32, 32, 10_000)
    assert (text.vocab_size, text.rms_norm_eps, text.max_position_embeddings) == (32064, 1e-5, 4096)
    assert (vision.hidden_act, vision.layer_norm_eps, vision.num_channels) == ("quick_gelu", 1e-5, 3)

    config = parse_llava(
        {
            "model_type": "llava",
            "image_token_index": 151646,
            "projector_hidden_act": "gelu",
            "text_config": {
                "hidden_size": 1024,
                "intermediate_size": 2816,
                "model_type": "qwen2",
                "num_attention_heads": 16,
                "num_hidden_layers": 24,
                "num_key_value_heads": 16,
                "rope_theta": 1000000.0,
                "tie_word_embeddings": True,
                "vocab_size": 152000,
            },
            "vision_config": {
                "hidden_size": 1152,
                "image_size": 384,
                "intermediate_size": 4304,
                "model_type": "siglip_vision_model",
                "num_attention_heads": 16,
                "num_hidden_layers": 26,
                "patch_size": 14,
                "vision_use_head": False,
            },
            "vision_feature_layer": -1,
            "vision_feature_select_strategy": "full",
        },
        "here",
    )
    assert (config.image_seq_length, config.text.rope_theta, config.text.rms_norm_eps) == (729, 1e6, 1e-6)
    assert config.text.tie_word_embeddings and config.text.qkv_bias
    assert (config.vision.hidden_act, config.vision.layer_norm_eps) == ("gelu_pytorch_tanh", 1e-6)
    assert not config.vision.vision_use_head
    base = parse_vision({"model_type": "siglip_vision_model"}, "here")  # siglip-base-patch16-224
    assert (base.hidden_size, base.num_positions, base.vision_use_head) == (768, 196, True)


@torch.no_grad()
def test_a_folder_whose_sub_configs_leave_out_the_class_defaults_is_the_same_model(pair, tmp_path):
    """Sparse as transformers 4 wrote them."""
    theirs, ours, folder = pair
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    config, dropped = json.loads((folder / "config.json").read_text()), set()
    for name in ("text_config", "vision_config"):
        default = transformers.AutoConfig.for_model(config[name]["model_type"]).to_dict()
        for field, value in list(config[name].items()):
            if field != "model_type" and field in default and default[field] == value:
                dropped.add(field)
                del config[name][field]
    assert {"hidden_act", "attention_dropout", "initializer_range"} & dropped and len(dropped) > 8
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert load_model(tmp_path).vlm_config == ours.vlm_config


def test_defaults_of_sub_configs_hold_nowhere_else(tmp_path):
    save_model(tiny(), tmp_path)
    edit(tmp_path / "config.json", lambda config: config.pop("rms_norm_eps"))
    refused(tmp_path, "rms_norm_eps is absent")


@pytest.mark.parametrize(
    "sub, field, value",
    [
        (None, "model_type", "llava_next"),
        (None, "model_type", ["llava"]),
        (None, "text_config", "<absent>"),
        (None, "vision_config", None),
        (None, "vision_feature_layer", [-2, -5]),
        (None, "vision_feature_layer", -5),
        (None, "vision_feature_layer", 4),
        (None, "vision_feature_layer", True),
        (None, "vision_feature_layer", "<absent>"),
        (None, "vision_feature_select_strategy", "cls"),
        (None, "vision_feature_select_strategy", "<absent>"),
        (None, "projector_hidden_act", "relu"),
        (None, "image_token_index", "<absent>"),
        (None, "image_token_index", "<image>"),
        (None, "image_token_id", 95),
        (None, "multimodal_projector_bias", "no"),
        (None, "tie_word_embeddings", 1),
        (None, "quantization_config", {"bits": 4}),
        ("text_config", "model_type", "llava"),
        ("text_config", "model_type", "<absent>"),
        ("text_config", "hidden_act", "gelu"),
        ("text_config", "hidden_size", "48"),
        ("vision_config", "model_type", "dinov2"),
        ("vision_config", "model_type", "<absent>"),
        ("vision_config", "hidden_act", "gelu_new"),
        ("vision_config", "hidden_size", 33),
        ("vision_config", "image_size", [20, 20]),
        ("vision_config", "image_size", 5),
        ("vision_config", "patch_size", 0),
        ("vision_config", "attention_dropout", 0.1),
        ("vision_config", "num_hidden_layers", None),
        ("vision_config", "layer_norm_eps", -1.0),
        ("vision_config", "vision_use_head", 1),
        ("vision_config", "quantization_config", {"bits": 8}),
    ],
)
def test_a_config_that_vision_py_does_not_compute_is_refused_by_field(sub, field, value, folder):
    def change(config):
        part = config if sub is None else config[sub]
        part.pop(field, None)
        if value != "<absent>":
            part[field] = value

    edit(folder / "config.json", change)
    named = "image_token_index" if field == "image_token_id" else field
    shown = "" if value == "<absent>" else repr(value)
    refused(folder, f"config.json{', ' + sub if sub else ''}: ", named, shown)


def test_mistral_in_a_llava_folder_must_say_that_it_has_no_window(tmp_path):
    oracle("clip-full-mistral").save_pretrained(tmp_path)
    edit(tmp_path / "config.json", lambda config: config["text_config"].pop("sliding_window"))
    refused(tmp_path, "text_config: sliding_window is absent")


# ---- attach_vision ----------------------------------------------------


@torch.no_grad()
def test_attach_vision_takes_the_text_model_itself_and_saves_what_transformers_loads(tower_folder, tmp_path):
    text = tiny()
    model = attach_vision(text, tower_folder, image_token_id=IMAGE, seed=3)
    assert model.language_model is text and model.config is text.config
    save_model(model, tmp_path / "both")
    again = transformers.LlavaForConditionalGeneration.from_pretrained(tmp_path / "both").eval()
    ids, pad_mask = prompts(model.vlm_config, MIXED)
    pixels = pictures(model.vlm_config, 5)
    theirs = again(ids, pixel_values=pixels, attention_mask=pad_mask.long()).logits[pad_mask]
    assert (theirs - model(ids, pixels, pad_mask)[pad_mask]).abs().max() <= 1e-5


@torch.no_grad()
def test_attach_vision_draws_projector_and_unknown_tower_from_the_seed(tower_folder, tmp_path):
    before = torch.get_rng_state()
    known = [attach_vision(tiny(), tower_folder, image_token_id=IMAGE, seed=seed) for seed in (1, 1, 2)]
    edit(tower_folder / "config.json", lambda config: config.update(position_initializer_range=0.5))
    drawn = [
        attach_vision(tiny(), tower_folder / "config.json", image_token_id=IMAGE, seed=seed)
        for seed in (1, 1, 2)
    ]
    assert torch.equal(torch.get_rng_state(), before)
    position, projector = (
        "vision_tower.vision_model.embeddings.position_embedding.weight",
        ("multi_modal_projector.linear_1.weight"),
    )
    for models in (known, drawn):
        a, b, c = (model.state_dict() for model in models)
        assert all(torch.equal(a[name], b[name]) for name in a)
        assert not torch.equal(a[projector], c[projector])
        assert torch.equal(a[position], c[position]) == (models is known)
    assert 0.4 < drawn[0].state_dict()[position].std() < 0.6


@torch.no_grad()
def test_attach_vision_takes_tower_and_projector_of_a_llava_folder(tower_folder, tmp_path):
    other = attach_vision(tiny(), tower_folder, image_token_id=IMAGE, seed=5)
    save_model(other, tmp_path / "llava")
    text = tiny()
    words = {name: value.clone() for name, value in text.state_dict().items()}
    model = attach_vision(text, tmp_path / "llava", image_token_id=IMAGE)
    theirs = other.state_dict()
    for name, value in model.state_dict().items():
        own = name.startswith("language_model.")
        assert torch.equal(value, words[name.removeprefix("language_model.")] if own else theirs[name]), name
    edit(
        tmp_path / "llava" / "config.json",
        lambda config: config.update(
            projector_hidden_act="gelu_pytorch_tanh", vision_feature_select_strategy="full"
        ),
    )
    config = attach_vision(tiny(), tmp_path / "llava", image_token_id=IMAGE).vlm_config
    assert (config.projector_hidden_act, config.vision_feature_select_strategy) == (
        "gelu_pytorch_tanh",
        "full",
    )
    with pytest.raises(InputError, match="reads hidden state -2 .*feature_layer is -1"):
        attach_vision(tiny(), tmp_path / "llava", image_token_id=IMAGE, feature_layer=-1)
    edit_tensors(
        tmp_path / "llava" / "model.safetensors",
        lambda tensors: [tensors.pop(name) for name in list(tensors) if "projector.linear_2.bias" in name],
    )
    with pytest.raises(InputError, match="missing tensors: .*projector.linear_2.bias"):
        attach_vision(tiny(), tmp_path / "llava", image_token_id=IMAGE)


def test_attach_vision_follows_the_text_models_dtype_and_leaves_it_alone(tower_folder):
    text = tiny().to(torch.bfloat16)
    before = [parameter.data_ptr() for parameter in text.parameters()]
    model = attach_vision(text, tower_folder, image_token_id=IMAGE, feature_layer=-1)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert [parameter.data_ptr() for parameter in text.parameters()] == before
    assert model.vlm_config.vision_feature_layer == -1


def test_attach_vision_refuses_what_it_cannot_attach(tower_folder, tmp_path):
    for token in (-1, 97, -200):
        with pytest.raises(InputError, match=f"image_token_id {token} .*allowed are 0 to 96"):
            attach_vision(tiny(), tower_folder, image_token_id=token)
    with pytest.raises(InputError, match="vision_feature_layer .*-5; allowed is one integer from -4 to 3"):
        attach_vision(tiny(), tower_folder, image_token_id=IMAGE, feature_layer=-5)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        attach_vision(tiny(), tmp_path / "nowhere", image_token_id=IMAGE)
    save_model(tiny(), tmp_path / "text")
    with pytest.raises(InputError, match="model_type 'llama'; known are clip_vision_model, siglip"):
        attach_vision(tiny(), tmp_path / "text", image_token_id=IMAGE)
    edit(tower_folder / "config.json", lambda config: config.update(model_type="clip", vision_config=None))
    with pytest.raises(InputError, match="config.json, vision_config None is not an object"):
        attach_vision(tiny(), tower_folder, image_token_id=IMAGE)
    tower_oracle("siglip").save_pretrained(tmp_path / "siglip")
    edit(tmp_path / "siglip" / "config.json", lambda config: config.update(vision_use_head=False))
    with pytest.raises(InputError, match="extra tensors: vision_model.head"):
        attach_vision(tiny(), tmp_path / "siglip", image_token_id=IMAGE)


def test_the_class_token_is_clips_alone():
    for name in TOWERS:
        encoder = VisionEncoder(parse_vision(tower_config(name).to_dict(), "here"))
        expected = {key for key, _ in tower_oracle(name).named_parameters()}
        assert {key.removeprefix("vision_model.") for key, _ in encoder.named_parameters()} == expected
