"""Hugging Face model folders in and out: config.json + model.safetensors (or shards) <-> model.Transformer.

Strict both ways: a tensor that is missing, extra, misshapen, not finite or no float is an error, and so is a
config.json that leaves out what the maths needs or asks for what model.py does not compute. Every error is
one line that names the file and what is wrong in it.
"""

import json
import os
from dataclasses import asdict, fields
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from minicot.model import Llama3Rope, ModelConfig, Transformer, rope_frequencies

WEIGHTS, INDEX, CONFIG = "model.safetensors", "model.safetensors.index.json", "config.json"
ARCHITECTURES = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM",
                 "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}

# What a config.json may leave out, and what its absence means: the family's published defaults. Any other
# absent field is an error, also where transformers has a default that no published file relies on (8 kv heads
# and a sliding window of 4,096 in Mistral, 32 kv heads in Qwen, head_dim 128 in Qwen3). None means as many kv
# heads as heads, and a head_dim of hidden_size / heads.
ANY = {"tie_word_embeddings": False, "initializer_range": 0.02,
       "bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
DEFAULTS = {
    "llama": ANY | {"num_key_value_heads": None, "head_dim": None, "attention_bias": False, "mlp_bias": False,
                    "bos_token_id": 1, "eos_token_id": 2},
    "mistral": ANY | {"head_dim": None, "bos_token_id": 1, "eos_token_id": 2},
    "qwen2": ANY | {"head_dim": None},
    "qwen3": ANY | {"attention_bias": False},
}
# Fields of which model.py computes one value only. Absence means that value, except for those in REQUIRED.
REQUIRED = {"hidden_act", "sliding_window"}
ALL = {"hidden_act": "silu", "attention_dropout": 0.0, "partial_rotary_factor": 1.0,
       "quantization_config": None}
ONLY = {
    "llama": ALL | {"rope_interleaved": False},
    "mistral": ALL | {"sliding_window": None, "attention_bias": False, "mlp_bias": False},
    "qwen2": ALL | {"use_sliding_window": False, "attention_bias": True, "mlp_bias": False},
    "qwen3": ALL | {"use_sliding_window": False, "mlp_bias": False},
}
LIMITS = {"vocab_size": 10**8, "num_hidden_layers": 10**4, "hidden_size": 10**6,
          "intermediate_size": 10**7, "num_attention_heads": 10**4,
          "num_key_value_heads": 10**4, "head_dim": 10**5}  # beyond: broken
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
LLAMA3_FIELDS = tuple(field.name for field in fields(Llama3Rope))


def parse_config(config: dict, where: str) -> ModelConfig:
    """A config.json's dict -> ModelConfig, refusing to guess. `where` opens the message of every ValueError.

    Reads the rotary parameters as transformers 4 wrote them (rope_theta, rope_scaling) and as 5 does
    (rope_parameters). Fields that change no number (use_cache, torch_dtype, pretraining_tp, ...) are passed
    over.
    """
    family = config.get("model_type")
    if not isinstance(family, str) or family not in ARCHITECTURES:
        raise ValueError(f"{where}: model_type {family!r}; known are {', '.join(ARCHITECTURES)}")
    values = DEFAULTS[family] | config
    for name, allowed in ONLY[family].items():
        if name in REQUIRED and name not in config:
            raise ValueError(f"{where}: {name} is absent; for {family} only {allowed!r} is known")
        if config.get(name, allowed) != allowed:
            raise ValueError(f"{where}: {name} {config[name]!r}; for {family} only {allowed!r} is known")
    layer_types = values.get("layer_types") or []
    if not isinstance(layer_types, list) or any(kind != "full_attention" for kind in layer_types):
        raise ValueError(f"{where}: layer_types {values['layer_types']}; only 'full_attention' is known")

    heads = number(values, "num_attention_heads", where)
    hidden_size = number(values, "hidden_size", where)
    if values.get("num_key_value_heads", 0) is None and family == "llama":
        values["num_key_value_heads"] = heads
    if values.get("head_dim", 0) is None and family != "qwen3":
        if hidden_size % heads:
            raise ValueError(f"{where}: hidden_size {hidden_size} is no multiple of its {heads} heads")
        values["head_dim"] = hidden_size // heads
    kv_heads, head_dim = number(values, "num_key_value_heads", where), number(values, "head_dim", where)
    if heads % kv_heads:
        raise ValueError(f"{where}: {heads} heads are no multiple of num_key_value_heads {kv_heads}")
    if head_dim % 2:
        raise ValueError(f"{where}: head_dim {head_dim} is odd; rotary positions turn channels in pairs")
    rope_theta, rope_scaling = parse_rope(config, where)
    bias = flag(values, "attention_bias", where) if family in ("llama", "qwen3") else False
    return ModelConfig(
        model_type=family, hidden_size=hidden_size, num_attention_heads=heads, num_key_value_heads=kv_heads,
        head_dim=head_dim, rope_theta=rope_theta, rope_scaling=rope_scaling,
        vocab_size=number(values, "vocab_size", where),
        intermediate_size=number(values, "intermediate_size", where),
        num_hidden_layers=number(values, "num_hidden_layers", where),
        max_position_embeddings=number(values, "max_position_embeddings", where),
        rms_norm_eps=number(values, "rms_norm_eps", where, float),
        initializer_range=number(values, "initializer_range", where, float),
        tie_word_embeddings=flag(values, "tie_word_embeddings", where),
        qkv_bias=bias or family == "qwen2", o_bias=bias,
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
            raise ValueError(f"{where}: {name} {value!r} is neither an object nor null")
    if nested and scaling and nested != scaling:
        raise ValueError(f"{where}: rope_parameters {nested} and rope_scaling {scaling} disagree")
    rope = nested or scaling or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "llama3"):
        raise ValueError(f"{where}: rope_type {kind!r}; implemented are 'default' and 'llama3'")
    known = ("rope_type", "type", "rope_theta", "partial_rotary_factor") + LLAMA3_FIELDS * (kind == "llama3")
    if extra := sorted(rope.keys() - set(known)):
        raise ValueError(f"{where}: rope_type {kind!r} has no use for {', '.join(extra)}")
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError(f"{where}: partial_rotary_factor is not 1.0 in {rope}")
    said = [source for source in (config, rope) if "rope_theta" in source]
    if nested and not said:
        raise ValueError(f"{where}: rope_parameters {nested} has no rope_theta")
    thetas = {number(source, "rope_theta", where, float) for source in said or [{"rope_theta": 10_000.0}]}
    if len(thetas) > 1:
        raise ValueError(f"{where}: rope_theta is given twice, as {sorted(thetas)}")
    stretch = None
    if kind == "llama3":
        stretch = Llama3Rope(*(number(rope, name, where, float) for name in LLAMA3_FIELDS[:3]),
                             number(rope, LLAMA3_FIELDS[3], where))
        if stretch.high_freq_factor <= stretch.low_freq_factor:
            raise ValueError(f"{where}: high_freq_factor {stretch.high_freq_factor} is not above "
                             f"low_freq_factor {stretch.low_freq_factor}")
    return thetas.pop(), stretch


def number(values: dict, name: str, where: str, kind: type = int):
    """A positive number of this kind; a float may be written as an integer."""
    if name not in values:
        raise ValueError(f"{where}: {name} is absent")
    value = values[name]
    if not isinstance(value, int | kind) or isinstance(value, bool) or not 0 < value < LIMITS.get(name, 1e12):
        raise ValueError(f"{where}: {name} {value!r:.40} is not a positive {kind.__name__} of a sane size")
    return kind(value)


def flag(values: dict, name: str, where: str) -> bool:
    if not isinstance(values[name], bool):
        raise ValueError(f"{where}: {name} {values[name]!r} is neither true nor false")
    return values[name]


def token_id(values: dict, name: str, where: str) -> int | tuple[int, ...] | None:
    value = values[name]
    listed = value if isinstance(value, list) and name == "eos_token_id" else [value]
    if value is not None and any(not isinstance(i, int) or isinstance(i, bool) for i in listed):
        raise ValueError(f"{where}: {name} {value!r} is not a token id")
    return tuple(value) if isinstance(value, list) else value


def config_to_hf(config: ModelConfig) -> dict:
    """ModelConfig -> the dict of a config.json, in the spelling that old and new transformers both read.

    ValueError where the family cannot say what the config asks for (biases in a Mistral, say)."""
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
        raise ValueError(f"{config} cannot be written as a {family} config.json")
    return out


def load_model(path, *, dtype: torch.dtype | None = None, device=None, seed: int = 0) -> Transformer:
    """A Hugging Face folder -> model with its weights, memory-mapped; dtype None: as stored.

    `path` may also be a config.json itself: then the weights are random, drawn from `seed` (float32 by
    default), the same on every device. A folder without weights is an error.
    """
    path = Path(path)
    if path.is_file():
        model = Transformer(read_config(path), torch.Generator().manual_seed(seed))
        return model.to(device=device, dtype=dtype)
    if not path.is_dir():
        raise FileNotFoundError(f"{path}: no such model folder")
    config = read_config(path / CONFIG)
    with torch.device("meta"):
        model = Transformer(config)
    tensors = read_tensors(path, {name: value.shape for name, value in model.state_dict().items()}, config)
    stored = {tensor.dtype for tensor in tensors.values()}
    if dtype is None and len(stored) > 1:
        raise ValueError(f"{path}: weights are stored as {sorted(map(str, stored))}; choose one dtype")
    for name, tensor in tensors.items():
        tensors[name] = tensor = tensor.to(device=device, dtype=dtype)
        if not torch.isfinite(torch.stack(tensor.aminmax())).all():       # a NaN is both least and most
            raise ValueError(f"{path}: tensor {name} holds values that are not finite as {tensor.dtype}")
    model.load_state_dict(tensors, strict=True, assign=True)
    return model


def read_tensors(folder: Path, shapes: dict, config: ModelConfig) -> dict[str, torch.Tensor]:
    """The tensors named in `shapes`, of these shapes, and no others, from a folder's safetensors file(s)."""
    found = {}
    for file, names in weight_files(folder).items():
        with open_safetensors(file) as handle:
            keys = set(handle.keys())
            if names is not None and names != keys:
                raise ValueError(f"{file}: by {INDEX} it should hold {listing(names - keys)}, which it does "
                                 f"not, and should not hold {listing(keys - names)}, which it does")
            for name in keys:
                shape = tuple(handle.get_slice(name).get_shape())
                if name in shapes and shape != tuple(shapes[name]):
                    raise ValueError(f"{file}: tensor {name} has shape {shape}; by {CONFIG} it should "
                                     f"have {tuple(shapes[name])}")
                found[name] = handle.get_tensor(name)
                if found[name].dtype not in FLOATS:
                    raise ValueError(f"{file}: tensor {name} is {found[name].dtype}; allowed are {FLOATS}")
    for name in [name for name in found if name.endswith(".self_attn.rotary_emb.inv_freq")]:
        stored = found.pop(name).float()            # Llama 1 and 2 files hold what we compute
        if stored.numel() != config.head_dim // 2 or not stored.allclose(rope_frequencies(config), rtol=1e-2):
            raise ValueError(f"{folder}: tensor {name} differs from the frequencies that {CONFIG} gives")
    if config.tie_word_embeddings and {"lm_head.weight", "model.embed_tokens.weight"} <= found.keys():
        same = torch.equal(found.pop("lm_head.weight"), found["model.embed_tokens.weight"])
        if not same:
            raise ValueError(f"{folder}: lm_head.weight differs from model.embed_tokens.weight, to which "
                             f"{CONFIG} ties it")
    if found.keys() != shapes.keys():
        raise ValueError(f"{folder}: by {CONFIG}, missing tensors: {listing(shapes.keys() - found.keys())}; "
                         f"extra tensors: {listing(found.keys() - shapes.keys())}")
    return found


def weight_files(folder: Path) -> dict[Path, set[str] | None]:
    """safetensors file -> the tensors that it should hold; None where there is one file and no index."""
    single, index = folder / WEIGHTS, folder / INDEX
    if single.exists() and index.exists():
        raise ValueError(f"{folder}: has both {WEIGHTS} and {INDEX}; remove the one that is not meant")
    if single.exists():
        return {single: None}
    if not index.exists():
        raise FileNotFoundError(f"{folder}: neither {WEIGHTS} nor {INDEX} (for random weights give the path "
                                f"of {CONFIG} itself)")
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index}: weight_map {weight_map!r} is not an object from tensor to file name")
    files = {}
    for name, file in weight_map.items():
        if not isinstance(file, str) or Path(file).name != file:
            raise ValueError(f"{index}: tensor {name} is in {file!r}, which names no file beside it")
        if not (folder / file).is_file():
            raise FileNotFoundError(f"{index}: tensor {name} is in {file}, which is not there")
        files.setdefault(folder / file, set()).add(name)
    return files


def open_safetensors(file: Path):
    """safe_open with the error of a truncated or corrupt file in one line."""
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file}: not a whole safetensors file ({' '.join(str(error).split())})") from None


def read_config(file: Path) -> ModelConfig:
    return parse_config(read_json(file), str(file))


def read_json(file: Path) -> dict:
    """A JSON object from a file; errors name the file and the line."""
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such file")
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{file}:{error.lineno}: not JSON ({error.msg})") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: not UTF-8 ({error.reason} at byte {error.start})") from None
    if not isinstance(value, dict):
        raise ValueError(f"{file}: holds {type(value).__name__}, not an object")
    return value


def listing(names) -> str:
    """Names for an error's one line: the first few, and how many more."""
    names = sorted(names)
    return (", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")) or "none"


def save_model(model: Transformer, folder) -> None:
    """Write config.json and model.safetensors, which load_model and transformers read back with the same
    logits.

    Each file is written beside its place and then moved there, so a crash leaves the old one whole.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().contiguous() for name, tensor in model.state_dict().items()}
    dtypes = {tensor.dtype for tensor in tensors.values()}
    assert len(dtypes) == 1, f"weights of one dtype can be saved, these are {sorted(map(str, dtypes))}"
    config = config_to_hf(model.config) | {"torch_dtype": str(dtypes.pop()).removeprefix("torch.")}
    partial = folder / (WEIGHTS + ".partial")
    save_file(tensors, partial, metadata={"format": "pt"})
    os.replace(partial, folder / WEIGHTS)
    partial = folder / (CONFIG + ".partial")
    partial.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    os.replace(partial, folder / CONFIG)
    (folder / INDEX).unlink(missing_ok=True)        # it would speak of shards that this model is not in
