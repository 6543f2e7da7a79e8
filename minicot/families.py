"""Families of models: the dict of a config.json <-> ModelConfig (a row of FAMILIES) or VisionLanguageConfig.

A config that leaves out what the maths needs, or asks for what model.py and vision.py do not compute, is an
error. Every error is one line that names the file, the field, and what is allowed.
"""

from dataclasses import asdict, dataclass, field, fields

from minicot.errors import InputError
from minicot.model import Llama3Rope, ModelConfig
from minicot.vision import ACTIVATIONS, VisionConfig, VisionLanguageConfig

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
MISTRAL_7B = LLAMA_7B | {
    "intermediate_size": 14_336,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131_072,
}  # but its sliding_window must be said
QWEN2 = LLAMA_7B | {
    "vocab_size": 151_936,
    "intermediate_size": 22_016,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32_768,
}


@dataclass(frozen=True)
class Family:
    """How the config.json of a family of decoders reads, and what its models are: one row of FAMILIES.

    qkv_bias, o_bias, mlp_bias and qk_norm are ModelConfig's: True or False in every model of the family, or
    the name of the field that says which (absent: false).
    """

    architecture: str  # transformers' class of its language model
    # What may be absent, and what its absence means: the family's published defaults. Any other absent field
    # is an error, also where transformers has a default that no published file relies on (8 kv heads and a
    # sliding window of 4,096 in Mistral, 32 kv heads in Qwen, head_dim 128 in Qwen3). None means as many kv
    # heads as heads, and a head_dim of hidden_size / heads.
    optional: dict
    class_defaults: dict  # what may be absent besides in the text_config of a Llava folder
    only: dict = field(default_factory=dict)  # fields with one value that model.py computes; absent means it
    qkv_bias: bool | str = False
    o_bias: bool | str = False
    mlp_bias: bool | str = False
    qk_norm: bool | str = False
    sliding_window: bool = False  # the field must be there; a number in it caps the context


FAMILIES = {
    "llama": Family(
        "LlamaForCausalLM",
        optional={"num_key_value_heads": None, "head_dim": None, "bos_token_id": 1, "eos_token_id": 2},
        class_defaults=LLAMA_7B,
        only={"rope_interleaved": False},
        qkv_bias="attention_bias",
        o_bias="attention_bias",
        mlp_bias="mlp_bias",
    ),
    "mistral": Family(
        "MistralForCausalLM",
        optional={"head_dim": None, "bos_token_id": 1, "eos_token_id": 2},
        class_defaults=MISTRAL_7B,
        sliding_window=True,
    ),
    "qwen2": Family(
        "Qwen2ForCausalLM",
        optional={"head_dim": None},
        class_defaults=QWEN2,
        only={"use_sliding_window": False},
        qkv_bias=True,
    ),
    "qwen3": Family(
        "Qwen3ForCausalLM",
        optional={},
        class_defaults=QWEN2 | {"head_dim": 128},
        only={"use_sliding_window": False},
        qkv_bias="attention_bias",
        o_bias="attention_bias",
        qk_norm=True,
    ),
}
FLAGS = ("qkv_bias", "o_bias", "mlp_bias", "qk_norm")
# In every family: optional fields, and fields of which one value is computed.
OPTIONAL = {
    "tie_word_embeddings": False,
    "initializer_range": 0.02,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
ONLY = {"attention_dropout": 0.0, "partial_rotary_factor": 1.0, "quantization_config": None}
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
}  # what is beyond is no size of a model
LLAMA3_FIELDS = tuple(field.name for field in fields(Llama3Rope))

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


def parse_model(config: dict, where: str) -> ModelConfig | VisionLanguageConfig:
    """The dict of a model folder's config.json -> what its model is built from; see parse_config."""
    if is_llava(config, where):
        return parse_llava(config, where)
    one_of(config, "model_type", (*FAMILIES, "llava"), where)
    return parse_config(config, where)


def parse_config(config: dict, where: str) -> ModelConfig:
    """A language model's config.json -> ModelConfig, refusing to guess. `where` opens every error's message.

    Reads the rotary parameters as transformers 4 wrote them (rope_theta, rope_scaling) and as 5 does
    (rope_parameters). Fields that change no number (use_cache, torch_dtype, pretraining_tp, ...) are passed
    over.

    A sliding window of W tokens hides no token from another in a text of at most W, so a Mistral that has one
    is read as a model of full attention whose context ends there: max_position_embeddings is the lesser of
    the two. config_to_hf writes that context and no window.
    """
    model_type = one_of(config, "model_type", tuple(FAMILIES), where)
    family = FAMILIES[model_type]
    sources = {name: getattr(family, name) for name in FLAGS}
    only = ONLY | family.only
    for name, constant in (("attention_bias", family.qkv_bias), ("mlp_bias", family.mlp_bias)):
        if name not in sources.values():  # no flag of this family reads the field
            only[name] = constant
    for name, value in only.items():
        if config.get(name, value) != value:
            raise InputError(f"{where}: {name} {config[name]!r}; for {model_type} only {value!r} is known")
    one_of(config, "hidden_act", ("silu",), where)
    read = {source: False for source in sources.values() if isinstance(source, str)}
    values = OPTIONAL | read | family.optional | config
    layer_types = values.get("layer_types") or []
    if not isinstance(layer_types, list) or any(kind != "full_attention" for kind in layer_types):
        raise InputError(f"{where}: layer_types {values['layer_types']}; only 'full_attention' is known")

    heads = number(values, "num_attention_heads", where)
    hidden_size = number(values, "hidden_size", where)
    derived = [name for name, default in family.optional.items() if default is values[name] is None]
    if "num_key_value_heads" in derived:
        values["num_key_value_heads"] = heads
    if "head_dim" in derived:
        if hidden_size % heads:
            raise InputError(f"{where}: hidden_size {hidden_size} is no multiple of its {heads} heads")
        values["head_dim"] = hidden_size // heads
    kv_heads, head_dim = number(values, "num_key_value_heads", where), number(values, "head_dim", where)
    if heads % kv_heads:
        raise InputError(f"{where}: {heads} heads are no multiple of num_key_value_heads {kv_heads}")
    if head_dim % 2:
        raise InputError(f"{where}: head_dim {head_dim} is odd; rotary positions turn channels in pairs")
    context = number(values, "max_position_embeddings", where)
    if family.sliding_window and values.get("sliding_window", 0) is not None:
        context = min(context, number(values, "sliding_window", where))
    rope_theta, rope_scaling = parse_rope(config, where)
    return ModelConfig(
        model_type=model_type,
        hidden_size=hidden_size,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        rope_theta=rope_theta,
        rope_scaling=rope_scaling,
        vocab_size=number(values, "vocab_size", where),
        intermediate_size=number(values, "intermediate_size", where),
        num_hidden_layers=number(values, "num_hidden_layers", where),
        max_position_embeddings=context,
        rms_norm_eps=number(values, "rms_norm_eps", where, float),
        initializer_range=number(values, "initializer_range", where, float),
        tie_word_embeddings=flag(values, "tie_word_embeddings", where),
        bos_token_id=token_id(values, "bos_token_id", where),
        eos_token_id=token_id(values, "eos_token_id", where),
        pad_token_id=token_id(values, "pad_token_id", where),
        **{
            name: flag(values, source, where) if isinstance(source, str) else source
            for name, source in sources.items()
        },
    )


def parse_rope(config: dict, where: str) -> tuple[float, Llama3Rope | None]:
    """(rope_theta, scaling) of a config.json's dict. 10,000 is assumed only where there is nothing at all."""
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
    sources = [source for source in (config, rope) if "rope_theta" in source]
    if nested and not sources:
        raise InputError(f"{where}: rope_parameters {nested} has no rope_theta")
    thetas = {number(source, "rope_theta", where, float) for source in sources or [{"rope_theta": 10_000.0}]}
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
    ids = value if isinstance(value, list) and name == "eos_token_id" else [value]
    if value is not None and any(not isinstance(i, int) or isinstance(i, bool) for i in ids):
        raise InputError(f"{where}: {name} {value!r} is not a token id")
    return tuple(value) if isinstance(value, list) else value


def one_of(values: dict, name: str, allowed: tuple, where: str):
    """A value that is one of these; None among them means that it may be absent."""
    value = values.get(name)
    if value not in allowed:
        given = repr(value) if name in values else "is absent"
        raise InputError(f"{where}: {name} {given}; known are {', '.join(map(str, allowed))}")
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
    head = flag(values, "vision_use_head", where) and VISION_DEFAULTS[family]["vision_use_head"]
    return VisionConfig(model_type=family, hidden_act=act, vision_use_head=head, **numbers)


def is_llava(config: dict, where: str) -> bool:
    """Whether a config.json is one of transformers' Llava layout; InputError where it is of LLaVA's own."""
    if "mm_vision_tower" in config:
        raise InputError(
            f"{where}: has a mm_vision_tower, so it is in LLaVA's own layout; allowed is transformers' own, "
            "which llava-hf's converted folders have (llava-hf/llava-1.5-7b-hf, say)"
        )
    return config.get("model_type") == "llava"


def parse_llava(config: dict, where: str) -> VisionLanguageConfig:
    """The config.json of a Llava folder -> VisionLanguageConfig."""
    for name in ("text_config", "vision_config"):
        if not isinstance(config.get(name), dict):
            raise InputError(f"{where}: {name} {config.get(name)!r} is not an object")
    text, text_where = config["text_config"], f"{where}, text_config"
    text = FAMILIES[one_of(text, "model_type", tuple(FAMILIES), text_where)].class_defaults | text
    one_of(config, "quantization_config", (None,), where)
    if flag({"tie_word_embeddings": False} | config, "tie_word_embeddings", where):
        text["tie_word_embeddings"] = True  # either says it; the weights tell whether it is true
    tower = parse_vision(config["vision_config"], f"{where}, vision_config")
    layer, last = config.get("vision_feature_layer"), tower.num_hidden_layers
    if type(layer) is not int or not -last - 1 <= layer <= last:
        raise InputError(
            f"{where}: vision_feature_layer {layer!r}; allowed is one integer from {-last - 1} to {last}, "
            f"as the tower has {last} layers"
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
            raise ValueError(f"{config} cannot be written as a llava config.json")
        return out
    family = FAMILIES[config.model_type]
    out = {"architectures": [family.architecture], "hidden_act": "silu"} | asdict(config)
    for name in FLAGS:
        value, source = out.pop(name), getattr(family, name)
        if isinstance(source, str):
            out[source] = value
    if family.sliding_window:
        out["sliding_window"] = None
    if config.rope_scaling is not None:
        out["rope_scaling"] = {"rope_type": "llama3"} | out["rope_scaling"]
    if isinstance(config.eos_token_id, tuple):
        out["eos_token_id"] = list(config.eos_token_id)
    if parse_config(out, "ModelConfig") != config:
        raise ValueError(f"{config} cannot be written as a {config.model_type} config.json")
    return out
