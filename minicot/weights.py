"""Hugging Face model folders in and out: config.json + model.safetensors (or shards) <-> model.Transformer,
or vision.VisionLanguageModel where model_type is llava.

Strict both ways: a tensor that is missing, extra, misshapen, not finite or no float is an error, and so is a
config.json that leaves out what the maths needs or asks for what model.py does not compute. Every error is
one line that names the file and what is wrong in it.
"""

import json
import os
import re
from dataclasses import asdict, fields, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from minicot.errors import InputError
from minicot.model import Llama3Rope, ModelConfig, Transformer, rope_frequencies
from minicot.vision import ACTIVATIONS, VisionConfig, VisionLanguageConfig, VisionLanguageModel

WEIGHTS, INDEX, CONFIG = "model.safetensors", "model.safetensors.index.json", "config.json"
ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}

# What a config.json may leave out, and what its absence means: the family's published defaults. Any other
# absent field is an error, also where transformers has a default that no published file relies on (8 kv heads
# and a sliding window of 4,096 in Mistral, 32 kv heads in Qwen, head_dim 128 in Qwen3). None means as many kv
# heads as heads, and a head_dim of hidden_size / heads.
ANY = {
    "tie_word_embeddings": False,
    "initializer_range": 0.02,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
DEFAULTS = {
    "llama": ANY
    | {
        "num_key_value_heads": None,
        "head_dim": None,
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    "mistral": ANY | {"head_dim": None, "bos_token_id": 1, "eos_token_id": 2},
    "qwen2": ANY | {"head_dim": None},
    "qwen3": ANY | {"attention_bias": False},
}
# Fields of which model.py computes one value only. Absence means that value, except for those in REQUIRED.
REQUIRED = {"hidden_act", "sliding_window"}
ALL = {
    "hidden_act": "silu",
    "attention_dropout": 0.0,
    "partial_rotary_factor": 1.0,
    "quantization_config": None,
}
ONLY = {
    "llama": ALL | {"rope_interleaved": False},
    "mistral": ALL | {"sliding_window": None, "attention_bias": False, "mlp_bias": False},
    "qwen2": ALL | {"use_sliding_window": False, "attention_bias": True, "mlp_bias": False},
    "qwen3": ALL | {"use_sliding_window": False, "mlp_bias": False},
}
LIMITS = {
    "vocab_size": 10**8,
    "num_hidden_layers": 10**4,
    "hidden_size": 10**6,
    "intermediate_size": 10**7,
    "num_attention_heads": 10**4,
    "num_key_value_heads": 10**4,
    "head_dim": 10**5,
    "image_size": 10**5,
    "patch_size": 10**4,
    "num_channels": 10**3,
}  # beyond: broken
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
LLAMA3_FIELDS = tuple(field.name for field in fields(Llama3Rope))

# The sub-configs of a Llava folder leave out what equals the default of their class in transformers (a whole
# CLIP's or SigLIP's folder does so too), so there, and only there, absence means these.
LLAMA_7B = {
    "vocab_size": 32_000,
    "hidden_size": 4096,
    "intermediate_size": 11_008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
}
QWEN2 = LLAMA_7B | {
    "vocab_size": 151_936,
    "intermediate_size": 22_016,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32_768,
}
TEXT_DEFAULTS = {
    "llama": LLAMA_7B,
    "mistral": LLAMA_7B
    | {
        "intermediate_size": 14_336,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131_072,
    },  # but its sliding_window must be said
    "qwen2": QWEN2,
    "qwen3": QWEN2 | {"head_dim": 128},
}
VIT_BASE = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_channels": 3,
    "image_size": 224,
    "initializer_range": 0.02,
    "position_initializer_range": 0.02,
    "vision_use_head": False,
}
VISION_DEFAULTS = {
    "clip_vision_model": VIT_BASE | {"patch_size": 32, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5},
    "siglip_vision_model": VIT_BASE
    | {"patch_size": 16, "hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6, "vision_use_head": True},
}
VISION_NUMBERS = dict.fromkeys(
    (
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "image_size",
        "patch_size",
        "num_channels",
    ),
    int,
) | dict.fromkeys(("layer_norm_eps", "initializer_range", "position_initializer_range"), float)

# LLaVA's own folders: the config.json of a text model of this family, with fields that begin with mm_.
LLAVA = {"llava": "llama", "llava_llama": "llama", "llava_mistral": "mistral", "llava_qwen": "qwen2"}
LLAVA_ONLY = {
    "mm_projector_type": ("mlp2x_gelu",),
    "mm_vision_select_feature": ("patch", "cls_patch", None),
    "mm_patch_merge_type": ("flat", None),
    "image_aspect_ratio": ("square", "pad", None),
    "s2": (False, None),
}
LLAVA_IMAGE_TOKEN = -200  # what LLaVA's code puts where an image goes; it is in no vocabulary

# How the names in a Llava folder may begin, and how ours do: as in transformers' files since the first one.
# Later files may say it in the other order, or leave out "vision_model."; model.mm_projector, a second
# vision_tower and a text without a name are LLaVA's own. The first that fits counts.
LLAVA_NAMES = {
    "model.language_model.": "language_model.model.",
    "model.multi_modal_projector.": "multi_modal_projector.",
    "lm_head.": "language_model.lm_head.",
    "model.vision_tower.vision_tower.": "vision_tower.",
    "model.vision_tower.": "vision_tower.",
    "model.mm_projector.0.": "multi_modal_projector.linear_1.",
    "model.mm_projector.2.": "multi_modal_projector.linear_2.",
    "model.": "language_model.model.",
}
EYES = ("vision_tower", "multi_modal_projector")
NOT_THE_TOWER = ("text_model.", "text_projection.", "visual_projection.", "logit_scale", "logit_bias")


def parse_config(config: dict, where: str) -> ModelConfig:
    """A config.json's dict -> ModelConfig, refusing to guess. `where` opens the message of every ValueError.

    Reads the rotary parameters as transformers 4 wrote them (rope_theta, rope_scaling) and as 5 does
    (rope_parameters). Fields that change no number (use_cache, torch_dtype, pretraining_tp, ...) are passed
    over.
    """
    family = config.get("model_type")
    if not isinstance(family, str) or family not in ARCHITECTURES:
        raise InputError(f"{where}: model_type {family!r}; known are {', '.join(ARCHITECTURES)}")
    values = DEFAULTS[family] | config
    for name, allowed in ONLY[family].items():
        if name in REQUIRED and name not in config:
            raise InputError(f"{where}: {name} is absent; for {family} only {allowed!r} is known")
        if config.get(name, allowed) != allowed:
            raise InputError(f"{where}: {name} {config[name]!r}; for {family} only {allowed!r} is known")
    layer_types = values.get("layer_types") or []
    if not isinstance(layer_types, list) or any(kind != "full_attention" for kind in layer_types):
        raise InputError(f"{where}: layer_types {values['layer_types']}; only 'full_attention' is known")

    heads = number(values, "num_attention_heads", where)
    hidden_size = number(values, "hidden_size", where)
    if values.get("num_key_value_heads", 0) is None and family == "llama":
        values["num_key_value_heads"] = heads
    if values.get("head_dim", 0) is None and family != "qwen3":
        if hidden_size % heads:
            raise InputError(f"{where}: hidden_size {hidden_size} is no multiple of its {heads} heads")
        values["head_dim"] = hidden_size // heads
    kv_heads, head_dim = number(values, "num_key_value_heads", where), number(values, "head_dim", where)
    if heads % kv_heads:
        raise InputError(f"{where}: {heads} heads are no multiple of num_key_value_heads {kv_heads}")
    if head_dim % 2:
        raise InputError(f"{where}: head_dim {head_dim} is odd; rotary positions turn channels in pairs")
    rope_theta, rope_scaling = parse_rope(config, where)
    bias = flag(values, "attention_bias", where) if family in ("llama", "qwen3") else False
    return ModelConfig(
        model_type=family,
        hidden_size=hidden_size,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        rope_theta=rope_theta,
        rope_scaling=rope_scaling,
        vocab_size=number(values, "vocab_size", where),
        intermediate_size=number(values, "intermediate_size", where),
        num_hidden_layers=number(values, "num_hidden_layers", where),
        max_position_embeddings=number(values, "max_position_embeddings", where),
        rms_norm_eps=number(values, "rms_norm_eps", where, float),
        initializer_range=number(values, "initializer_range", where, float),
        tie_word_embeddings=flag(values, "tie_word_embeddings", where),
        qkv_bias=bias or family == "qwen2",
        o_bias=bias,
        mlp_bias=family == "llama" and flag(values, "mlp_bias", where),
        qk_norm=family == "qwen3",
        bos_token_id=token_id(values, "bos_token_id", where),
        eos_token_id=token_id(values, "eos_token_id", where),
        pad_token_id=token_id(values, "pad_token_id", where),
    )


def parse_rope(config: dict, where: str) -> tuple[float, Llama3Rope | None]:
    """(rope_theta, scaling) of a config.json's dict. 10,000 is assumed only where nothing at all is said."""
    nested, scaling = config.get("rope_parameters"), config.get("rope_scaling")
    for name, value in (("rope_parameters", nested), ("rope_scaling", scaling)):
        if not isinstance(value, dict | None):
            raise InputError(f"{where}: {name} {value!r} is neither an object nor null")
    if nested and scaling and nested != scaling:
        raise InputError(f"{where}: rope_parameters {nested} and rope_scaling {scaling} disagree")
    rope = nested or scaling or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "llama3"):
        raise InputError(f"{where}: rope_type {kind!r}; implemented are 'default' and 'llama3'")
    known = ("rope_type", "type", "rope_theta", "partial_rotary_factor") + LLAMA3_FIELDS * (kind == "llama3")
    if extra := sorted(rope.keys() - set(known)):
        raise InputError(f"{where}: rope_type {kind!r} has no use for {', '.join(extra)}")
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise InputError(f"{where}: partial_rotary_factor is not 1.0 in {rope}")
    said = [source for source in (config, rope) if "rope_theta" in source]
    if nested and not said:
        raise InputError(f"{where}: rope_parameters {nested} has no rope_theta")
    thetas = {number(source, "rope_theta", where, float) for source in said or [{"rope_theta": 10_000.0}]}
    if len(thetas) > 1:
        raise InputError(f"{where}: rope_theta is given twice, as {sorted(thetas)}")
    stretch = None
    if kind == "llama3":
        stretch = Llama3Rope(
            *(number(rope, name, where, float) for name in LLAMA3_FIELDS[:3]),
            number(rope, LLAMA3_FIELDS[3], where),
        )
        if stretch.high_freq_factor <= stretch.low_freq_factor:
            raise InputError(
                f"{where}: high_freq_factor {stretch.high_freq_factor} is not above "
                f"low_freq_factor {stretch.low_freq_factor}"
            )
    return thetas.pop(), stretch


def number(values: dict, name: str, where: str, kind: type = int):
    """A positive number of this kind; a float may be written as an integer."""
    if name not in values:
        raise InputError(f"{where}: {name} is absent")
    value = values[name]
    if not isinstance(value, int | kind) or isinstance(value, bool) or not 0 < value < LIMITS.get(name, 1e12):
        raise InputError(f"{where}: {name} {value!r:.40} is not a positive {kind.__name__} of a sane size")
    return kind(value)


def flag(values: dict, name: str, where: str) -> bool:
    if not isinstance(values[name], bool):
        raise InputError(f"{where}: {name} {values[name]!r} is neither true nor false")
    return values[name]


def token_id(values: dict, name: str, where: str) -> int | tuple[int, ...] | None:
    value = values[name]
    listed = value if isinstance(value, list) and name == "eos_token_id" else [value]
    if value is not None and any(not isinstance(i, int) or isinstance(i, bool) for i in listed):
        raise InputError(f"{where}: {name} {value!r} is not a token id")
    return tuple(value) if isinstance(value, list) else value


def one_of(values: dict, name: str, allowed: tuple, where: str):
    """A value that is one of these; None among them means that it may be absent."""
    value = values.get(name)
    if value not in allowed:
        raise InputError(f"{where}: {name} {value!r}; known are {', '.join(map(str, allowed))}")
    return value


def parse_vision(config: dict, where: str) -> VisionConfig:
    """A vision_config's dict -> VisionConfig; what it leaves out has its class's default."""
    family = one_of(config, "model_type", tuple(VISION_DEFAULTS), where)
    values = VISION_DEFAULTS[family] | config
    one_of(values, "attention_dropout", (0.0, None), where)
    one_of(values, "quantization_config", (None,), where)
    numbers = {name: number(values, name, where, kind) for name, kind in VISION_NUMBERS.items()}
    if numbers["hidden_size"] % numbers["num_attention_heads"]:
        raise InputError(
            f"{where}: hidden_size {numbers['hidden_size']} is no multiple of its "
            f"{numbers['num_attention_heads']} heads"
        )
    if numbers["image_size"] < numbers["patch_size"]:
        raise InputError(
            f"{where}: image_size {numbers['image_size']} is less than patch_size {numbers['patch_size']}"
        )
    act = one_of(values, "hidden_act", tuple(ACTIVATIONS), where)
    head = flag(values, "vision_use_head", where) and family == "siglip_vision_model"
    return VisionConfig(model_type=family, hidden_act=act, vision_use_head=head, **numbers)


def parse_llava(config: dict, where: str, vision=None) -> VisionLanguageConfig:
    """A Llava folder's config.json -> VisionLanguageConfig.

    In transformers' layout, or in LLaVA's own, which names its vision tower but does not describe it:
    `vision` is then that tower's folder or config.json.
    """
    if "mm_vision_tower" in config:
        config = llava_to_hf(config, where, vision)
        text, text_where = config["text_config"], where
    else:
        for name in ("text_config", "vision_config"):
            if not isinstance(config.get(name), dict):
                raise InputError(
                    f"{where}: {name} {config.get(name)!r} is not an object, and there is no "
                    "mm_vision_tower either, as LLaVA's own config.json has it"
                )
        text, text_where = config["text_config"], f"{where}, text_config"
        text = TEXT_DEFAULTS.get(str(text.get("model_type")), {}) | text
    one_of(config, "quantization_config", (None,), where)
    if flag({"tie_word_embeddings": False} | config, "tie_word_embeddings", where):
        text["tie_word_embeddings"] = True  # either says it; the weights tell whether it is true
    tower = parse_vision(config["vision_config"], f"{where}, vision_config")
    layer, last = config.get("vision_feature_layer"), tower.num_hidden_layers
    if type(layer) is not int or not -last - 1 <= layer <= last:
        raise InputError(
            f"{where}: vision_feature_layer (LLaVA's mm_vision_select_layer) {layer!r}; allowed "
            f"is one integer from {-last - 1} to {last}, as the tower has {last} layers"
        )
    tokens = [config[name] for name in ("image_token_index", "image_token_id") if name in config]
    if not tokens or any(type(token) is not int or token != tokens[0] for token in tokens):
        raise InputError(f"{where}: image_token_index is {tokens or 'absent'}; needed is one integer")
    return VisionLanguageConfig(
        text=parse_config(text, text_where),
        vision=tower,
        image_token_id=tokens[0],
        vision_feature_layer=layer,
        vision_feature_select_strategy=one_of(
            config, "vision_feature_select_strategy", ("default", "full"), where
        ),
        projector_hidden_act=one_of(config, "projector_hidden_act", tuple(ACTIVATIONS), where),
        multimodal_projector_bias=flag(
            {"multimodal_projector_bias": True} | config, "multimodal_projector_bias", where
        ),
    )


def llava_to_hf(config: dict, where: str, vision) -> dict:
    """LLaVA's own config.json in transformers' words. Its placeholder is LLaVA's IMAGE_TOKEN_INDEX."""
    for name, allowed in LLAVA_ONLY.items():
        one_of(config, name, allowed, where)
    if vision is None:
        raise InputError(
            f"{where}: is LLaVA's own and does not describe its vision tower, mm_vision_tower "
            f"{config['mm_vision_tower']!r}; give load_model that tower's folder, or its "
            f"{CONFIG}, as vision=PATH"
        )
    tower = asdict(read_vision_config(Path(vision)))
    one_of(tower, "model_type", ("clip_vision_model",), f"{vision}")
    one_of(config, "mm_hidden_size", (tower["hidden_size"], None), where)
    full = config.get("mm_vision_select_feature") == "cls_patch"
    return {
        "text_config": config | {"model_type": LLAVA[config["model_type"]]},
        "vision_config": tower,
        "image_token_index": LLAVA_IMAGE_TOKEN,
        "projector_hidden_act": "gelu",
        "vision_feature_layer": config.get("mm_vision_select_layer"),
        "vision_feature_select_strategy": "full" if full else "default",
    }


def config_to_hf(config: ModelConfig | VisionLanguageConfig) -> dict:
    """A config -> the dict of a config.json, in the spelling that old and new transformers both read.

    ValueError where the family cannot say what the config asks for (biases in a Mistral, say)."""
    if isinstance(config, VisionLanguageConfig):
        out = {
            "architectures": ["LlavaForConditionalGeneration"],
            "model_type": "llava",
            "text_config": config_to_hf(config.text),
            "vision_config": asdict(config.vision),
            "image_token_index": config.image_token_id,
            "image_seq_length": config.image_seq_length,
            "vision_feature_layer": config.vision_feature_layer,
            "vision_feature_select_strategy": config.vision_feature_select_strategy,
            "projector_hidden_act": config.projector_hidden_act,
            "multimodal_projector_bias": config.multimodal_projector_bias,
            "tie_word_embeddings": config.text.tie_word_embeddings,
        }
        if parse_llava(out, "VisionLanguageConfig") != config:
            raise InputError(f"{config} cannot be written as a llava config.json")
        return out
    family = config.model_type
    out = {"architectures": [ARCHITECTURES[family]]} | asdict(config)
    for name in ("qkv_bias", "o_bias", "qk_norm"):
        del out[name]
    out |= {name: value for name, value in ONLY[family].items() if name in REQUIRED}
    if config.rope_scaling is not None:
        out["rope_scaling"] = {"rope_type": "llama3"} | out["rope_scaling"]
    if family in ("llama", "qwen3"):
        out["attention_bias"] = config.o_bias
    if isinstance(config.eos_token_id, tuple):
        out["eos_token_id"] = list(config.eos_token_id)
    if parse_config(out, "ModelConfig") != config:
        raise InputError(f"{config} cannot be written as a {family} config.json")
    return out


def load_model(path, *, dtype: torch.dtype | None = None, device=None, seed: int = 0, vision=None):
    """A Hugging Face folder -> Transformer or VisionLanguageModel, memory-mapped; dtype None: as stored.

    `path` may also be a config.json itself: then the weights are random, drawn from `seed` (float32 by
    default), the same on every device. A folder without weights is an error. `vision` is for LLaVA's own
    folders alone: the folder (or config.json) of the CLIP tower that the folder names; the tower's weights
    come from there if the folder has none.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such model folder")
    config = read_config(path / CONFIG if path.is_dir() else path, vision)
    pictures = isinstance(config, VisionLanguageConfig)
    build = VisionLanguageModel if pictures else Transformer
    if path.is_file():
        model = build(config, torch.Generator().manual_seed(seed))
        return model.to(device=device, dtype=dtype)
    with torch.device("meta"):
        model = build(config)
    tensors = read_tensors(path, model, llava_name if pictures else str)
    if vision is not None and not any(name.startswith("vision_tower.") for name in tensors):
        tower = read_tensors(Path(vision), model.vision_tower, tower_name)
        tensors |= {f"vision_tower.{name}": tensor for name, tensor in tower.items()}
    drop_derived(tensors, path, model.config, "language_model." if pictures else "")
    fill(model, tensors, path, dtype, device)
    return model


def attach_vision(
    text_model: Transformer, path, *, image_token_id: int, feature_layer: int = -2, seed: int = 0
) -> VisionLanguageModel:
    """Give a language model eyes: itself (not a copy), a CLIP or SigLIP tower, and a random projector.

    path: a folder of the tower, alone or within the whole CLIP or SigLIP (whose text half is passed over); or
        a Llava folder, whose tower and projector are taken; or a config.json, then the tower is random, too.
        Random weights come from `seed`, on every device alike.
    image_token_id: the placeholder, a token of the vocabulary that ordinary text does not have.
    feature_layer: see VisionLanguageConfig. CLIP's class token is dropped; SigLIP has none. A Llava folder's
        own settings stay; its layer must be this one.
    """
    path, vocabulary = Path(path), text_model.config.vocab_size
    if not 0 <= image_token_id < vocabulary:
        raise InputError(
            f"image_token_id {image_token_id} is not in the vocabulary; allowed are 0 to {vocabulary - 1}"
        )
    hf = read_json(path / CONFIG) if path.is_dir() else {}
    if other := hf.get("model_type") == "llava":
        config = replace(
            parse_llava(hf, str(path / CONFIG)), text=text_model.config, image_token_id=image_token_id
        )
        if config.vision_feature_layer != feature_layer:
            raise InputError(
                f"{path}: its projector reads hidden state {config.vision_feature_layer} of the "
                f"tower; feature_layer is {feature_layer}; allowed: the same"
            )
    else:
        vision = read_vision_config(path)
        strategy = "default" if vision.class_token else "full"
        config = VisionLanguageConfig(text_model.config, vision, image_token_id, feature_layer, strategy)
    config_to_hf(config)  # refuses what it could not write
    model = VisionLanguageModel(config, torch.Generator().manual_seed(seed), text_model)
    like = next(text_model.parameters())
    eyes = torch.nn.ModuleDict({name: getattr(model, name) for name in EYES})
    if path.is_dir():
        part, rename = (eyes, eyes_name) if other else (model.vision_tower, tower_name)
        fill(part, read_tensors(path, part, rename), path, like.dtype, None)
    eyes.to(device=like.device, dtype=like.dtype)
    return model


def llava_name(name: str) -> str:
    """Our name of a tensor in a Llava folder."""
    for theirs, ours in LLAVA_NAMES.items():
        if name.startswith(theirs):
            name = ours + name.removeprefix(theirs)
            break
    return re.sub(r"^vision_tower\.(?!vision_model\.)", "vision_tower.vision_model.", name)


def eyes_name(name: str) -> str | None:
    """llava_name of a tensor of the tower or the projector; None if it is the language model's."""
    name = llava_name(name)
    return name if name.startswith(EYES) else None


def tower_name(name: str) -> str | None:
    """Our name of a tensor in a CLIP's or SigLIP's folder; None if it is not the vision tower's."""
    if name.startswith(NOT_THE_TOWER):
        return None
    return name if name.startswith("vision_model.") else f"vision_model.{name}"


def read_tensors(folder: Path, model, rename) -> dict[str, torch.Tensor]:
    """The tensors in a folder's safetensors file(s) by our names, their shapes checked against the model's.

    rename(name) is our name; None: passed over.
    """
    found, shapes = {}, {name: value.shape for name, value in model.state_dict().items()}
    for file, names in weight_files(folder).items():
        with open_safetensors(file) as handle:
            keys = set(handle.keys())
            if names is not None and names != keys:
                raise InputError(
                    f"{file}: by {INDEX} it should hold {listing(names - keys)}, which it does "
                    f"not, and should not hold {listing(keys - names)}, which it does"
                )
            for name in keys:
                ours, shape = rename(name), tuple(handle.get_slice(name).get_shape())
                if ours is None or ours.endswith("vision_model.embeddings.position_ids"):
                    continue  # the latter: 0, 1, 2, ... in old files
                if ours in found:
                    raise InputError(f"{file}: tensor {name} is there twice, under two names for {ours}")
                if ours in shapes and shape != tuple(shapes[ours]):
                    raise InputError(
                        f"{file}: tensor {name} has shape {shape}; by {CONFIG} it should "
                        f"have {tuple(shapes[ours])}"
                    )
                found[ours] = handle.get_tensor(name)
                if found[ours].dtype not in FLOATS:
                    raise InputError(f"{file}: tensor {name} is {found[ours].dtype}; allowed are {FLOATS}")
    return found


def drop_derived(tensors: dict, folder: Path, config: ModelConfig, prefix: str) -> None:
    """Take out what the model computes from its config, or holds once only, if it is what it should be."""
    for name in [name for name in tensors if name.endswith(".self_attn.rotary_emb.inv_freq")]:
        stored = tensors.pop(name).float()  # Llama 1 and 2 files hold what we compute
        if stored.numel() != config.head_dim // 2 or not stored.allclose(rope_frequencies(config), rtol=1e-2):
            raise InputError(f"{folder}: tensor {name} differs from the frequencies that {CONFIG} gives")
    head, embedding = f"{prefix}lm_head.weight", f"{prefix}model.embed_tokens.weight"
    if config.tie_word_embeddings and {head, embedding} <= tensors.keys():
        same = torch.equal(tensors.pop(head), tensors[embedding])
        if not same:
            raise InputError(f"{folder}: {head} differs from {embedding}, to which {CONFIG} ties it")


def fill(model, tensors: dict, folder: Path, dtype, device) -> None:
    """Make these finite tensors, all and no others, the weights of the model."""
    needed = model.state_dict().keys()
    if tensors.keys() != needed:
        raise InputError(
            f"{folder}: by {CONFIG}, missing tensors: {listing(needed - tensors.keys())}; "
            f"extra tensors: {listing(tensors.keys() - needed)}"
        )
    stored = {tensor.dtype for tensor in tensors.values()}
    if dtype is None and len(stored) > 1:
        raise InputError(f"{folder}: weights are stored as {sorted(map(str, stored))}; choose one dtype")
    for name, tensor in tensors.items():
        tensors[name] = tensor = tensor.to(device=device, dtype=dtype)
        if not torch.isfinite(torch.stack(tensor.aminmax())).all():  # a NaN is both least and most
            raise InputError(f"{folder}: tensor {name} holds values that are not finite as {tensor.dtype}")
    model.load_state_dict(tensors, strict=True, assign=True)


def weight_files(folder: Path) -> dict[Path, set[str] | None]:
    """safetensors file -> the tensors that it should hold; None where there is one file and no index."""
    single, index = folder / WEIGHTS, folder / INDEX
    if single.exists() and index.exists():
        raise InputError(f"{folder}: has both {WEIGHTS} and {INDEX}; remove the one that is not meant")
    if single.exists():
        return {single: None}
    if not index.exists():
        raise FileNotFoundError(
            f"{folder}: neither {WEIGHTS} nor {INDEX} (for random weights give the path of {CONFIG} itself)"
        )
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(f"{index}: weight_map {weight_map!r} is not an object from tensor to file name")
    files = {}
    for name, file in weight_map.items():
        if not isinstance(file, str) or Path(file).name != file:
            raise InputError(f"{index}: tensor {name} is in {file!r}, which names no file beside it")
        if not (folder / file).is_file():
            raise FileNotFoundError(f"{index}: tensor {name} is in {file}, which is not there")
        files.setdefault(folder / file, set()).add(name)
    return files


def open_safetensors(file: Path):
    """safe_open with the error of a truncated or corrupt file in one line."""
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise InputError(f"{file}: not a whole safetensors file ({' '.join(str(error).split())})") from None


def read_config(file: Path, vision=None) -> ModelConfig | VisionLanguageConfig:
    config = read_json(file)
    family = one_of(config, "model_type", (*ARCHITECTURES, *LLAVA), str(file))
    if vision is not None and "mm_vision_tower" not in config:
        raise InputError(
            f"{file}: vision={vision} is given, but this is not LLaVA's own folder (there is no "
            "mm_vision_tower); attach_vision gives a text model a tower"
        )
    return parse_llava(config, str(file), vision) if family in LLAVA else parse_config(config, str(file))


def read_vision_config(path: Path) -> VisionConfig:
    """The tower's config: of a folder of the tower alone or of the whole CLIP or SigLIP, or a config.json."""
    file = path if path.is_file() else path / CONFIG
    config, where = read_json(file), str(file)
    if config.get("model_type") in ("clip", "siglip"):
        config, where = config.get("vision_config"), f"{file}, vision_config"
        if not isinstance(config, dict):
            raise InputError(f"{where} {config!r} is not an object")
    return parse_vision(config, where)


def read_json(file: Path) -> dict:
    """A JSON object from a file; errors name the file and the line."""
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such file")
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise InputError(f"{file}:{error.lineno}: not JSON ({error.msg})") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{file}: not UTF-8 ({error.reason} at byte {error.start})") from None
    if not isinstance(value, dict):
        raise InputError(f"{file}: holds {type(value).__name__}, not an object")
    return value


def listing(names) -> str:
    """Names for an error's one line: the first few, and how many more."""
    names = sorted(names)
    return (", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")) or "none"


def save_model(model: Transformer | VisionLanguageModel, folder) -> None:
    """Write config.json and model.safetensors, which load_model and transformers read back with the same
    logits.

    Each file is written beside its place and then moved there, so a crash leaves the old one whole.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().contiguous() for name, tensor in model.state_dict().items()}
    dtypes = {tensor.dtype for tensor in tensors.values()}
    assert len(dtypes) == 1, f"weights of one dtype can be saved, these are {sorted(map(str, dtypes))}"
    config = config_to_hf(getattr(model, "vlm_config", model.config))
    config["torch_dtype"] = str(dtypes.pop()).removeprefix("torch.")
    partial = folder / (WEIGHTS + ".partial")
    save_file(tensors, partial, metadata={"format": "pt"})
    os.replace(partial, folder / WEIGHTS)
    partial = folder / (CONFIG + ".partial")
    partial.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    os.replace(partial, folder / CONFIG)
    (folder / INDEX).unlink(missing_ok=True)  # it would speak of shards that this model is not in
