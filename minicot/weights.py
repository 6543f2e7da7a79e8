"""Hugging Face model folders in and out: config.json + model.safetensors (or shards) <-> model.Transformer,
or vision.VisionLanguageModel where model_type is llava; or a model.RewardModel of either.

families.py reads the config.json. The tensors are held to it strictly: one that is missing, extra, misshapen,
not finite or no float is an error. Every error is one line that names the file and what is wrong in it.
"""

import json
import os
import re
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from minicot.errors import InputError
from minicot.families import config_to_hf, is_llava, one_of, parse_llava, parse_model, parse_vision
from minicot.model import ModelConfig, RewardModel, Transformer, rope_frequencies
from minicot.vision import VisionConfig, VisionLanguageConfig, VisionLanguageModel

WEIGHTS, INDEX, CONFIG = "model.safetensors", "model.safetensors.index.json", "config.json"
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# How `architectures` ends, or what it says, where a head named `score` stands in the place of `lm_head`.
REWARD_HEADS = ("ForTokenClassification", "ForSequenceClassification", "RewardModel")

# How the names in a Llava folder may begin, and how ours do: as in transformers' files since the first one.
# Later files may say it in the other order, or leave out "vision_model.". The first that fits counts.
LLAVA_NAMES = {
    "model.language_model.": "language_model.model.",
    "model.multi_modal_projector.": "multi_modal_projector.",
    "lm_head.": "language_model.lm_head.",
    "model.vision_tower.": "vision_tower.",
}
PICTURE_PARTS = ("vision_tower", "multi_modal_projector")
NOT_THE_TOWER = ("text_model.", "text_projection.", "visual_projection.", "logit_scale", "logit_bias")


def load_model(path, *, dtype: torch.dtype | None = None, device=None, seed: int = 0, reward: bool = False):
    """A Hugging Face folder -> Transformer or VisionLanguageModel, memory-mapped; dtype None: as stored.

    `path` may also be a config.json itself: then the weights are random, drawn from `seed` (float32 by
    default), the same on every device. A folder without weights is an error. reward=True loads a RewardModel
    of either instead; to find one where a language model is asked for, or the reverse, is an error.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such model folder")
    file = path / CONFIG if path.is_dir() else path
    hf = read_json(file)
    config = parse_model(hf, str(file))
    pictures = isinstance(config, VisionLanguageConfig)

    def build(generator=None):
        model = (VisionLanguageModel if pictures else Transformer)(config, generator)
        return RewardModel(model, hf.get("reward_kind"), generator) if reward else model

    with torch.device("meta"):
        model = build()
    tensors = read_tensors(path, model, llava_name if pictures else str) if path.is_dir() else {}
    reason = reward_head(hf, tensors)
    if reason and not reward:
        raise InputError(f"{path}: is a reward model ({reason}); allowed: a language model, with an lm_head")
    if reward and not reason:
        raise InputError(
            f"{path}: is a language model (architectures is {hf.get('architectures')}); allowed: a reward "
            "model, as train.py --task prm or orm makes of one"
        )
    if reward:
        one_of(hf, "reward_kind", ("prm", "orm"), str(file))
    if path.is_file():
        return build(torch.Generator().manual_seed(seed)).to(device=device, dtype=dtype)
    drop_derived(tensors, path, model.config, "language_model." if pictures else "")
    fill(model, tensors, path, dtype, device)
    return model


def is_reward_model(path) -> bool:
    """Whether a folder says that it holds a reward model of ours."""
    return "reward_kind" in read_json(Path(path) / CONFIG)


def reward_head(hf: dict, tensors) -> str:
    """What tells a reward model's folder from a language model's, in its config.json's `architectures` or in
    the names of its tensors; "" where it is a language model's."""
    if any(head in str(hf.get("architectures")) for head in REWARD_HEADS):
        return f"architectures is {hf['architectures']}"
    heads = {part: name for name in tensors for part in name.split(".") if part in ("score", "lm_head")}
    return f"tensor {heads['score']} and no lm_head" if heads.keys() == {"score"} else ""


def attach_vision(
    text_model: Transformer, path, *, image_token_id: int, feature_layer: int = -2, seed: int = 0
) -> VisionLanguageModel:
    """Let a language model read pictures: itself (not a copy), a CLIP or SigLIP tower, a random projector.

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
    hf, where = read_json(path / CONFIG) if path.is_dir() else {}, str(path / CONFIG)
    if whole := is_llava(hf, where):
        config = replace(parse_llava(hf, where), text=text_model.config, image_token_id=image_token_id)
        if config.vision_feature_layer != feature_layer:
            raise InputError(
                f"{path}: its projector reads hidden state {config.vision_feature_layer} of the tower; "
                f"feature_layer is {feature_layer}; allowed: the same"
            )
    else:
        vision = read_vision_config(path)
        strategy = "default" if vision.class_token else "full"
        config = VisionLanguageConfig(text_model.config, vision, image_token_id, feature_layer, strategy)
    config_to_hf(config)  # refuses what it could not write
    model = VisionLanguageModel(config, torch.Generator().manual_seed(seed), text_model)
    weight = next(text_model.parameters())
    parts = torch.nn.ModuleDict({name: getattr(model, name) for name in PICTURE_PARTS})
    if path.is_dir():
        part, rename = (parts, picture_part_name) if whole else (model.vision_tower, tower_name)
        fill(part, read_tensors(path, part, rename), path, weight.dtype, None)
    parts.to(device=weight.device, dtype=weight.dtype)
    return model


def llava_name(name: str) -> str:
    """Our name of a tensor in a Llava folder."""
    for theirs, ours in LLAVA_NAMES.items():
        if name.startswith(theirs):
            name = ours + name.removeprefix(theirs)
            break
    return re.sub(r"^vision_tower\.(?!vision_model\.)", "vision_tower.vision_model.", name)


def picture_part_name(name: str) -> str | None:
    """llava_name of a tensor of the tower or the projector; None if it is the language model's."""
    name = llava_name(name)
    return name if name.startswith(PICTURE_PARTS) else None


def tower_name(name: str) -> str | None:
    """Our name of a tensor in a CLIP's or SigLIP's folder; None if it is not the vision tower's."""
    if name.startswith(NOT_THE_TOWER):
        return None
    return name if name.startswith("vision_model.") else f"vision_model.{name}"


def read_tensors(folder: Path, model, rename) -> dict[str, torch.Tensor]:
    """The tensors in a folder's safetensors file(s) by our names, their shapes checked against the model's.

    rename(name) is our name; None: passed over.
    """
    tensors, shapes = {}, {name: value.shape for name, value in model.state_dict().items()}
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
                if ours in tensors:
                    raise InputError(f"{file}: tensor {name} is there twice, under two names for {ours}")
                if ours in shapes and shape != tuple(shapes[ours]):
                    raise InputError(
                        f"{file}: tensor {name} has shape {shape}; by {CONFIG} it should "
                        f"have {tuple(shapes[ours])}"
                    )
                tensors[ours] = handle.get_tensor(name)
                if tensors[ours].dtype not in FLOATS:
                    raise InputError(f"{file}: tensor {name} is {tensors[ours].dtype}; allowed are {FLOATS}")
    return tensors


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


def save_model(model: Transformer | VisionLanguageModel | RewardModel, folder) -> None:
    """Write config.json and model.safetensors, which load_model and transformers read back with the same
    logits. A RewardModel of text goes out as transformers' ForTokenClassification with one label; one of
    pictures, for which transformers has no class, in the Llava layout with score.* in the place of lm_head.*.

    Both files are written beside their places and then moved there: where that fails (a full disk), the old
    ones stay whole and nothing is left beside them.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().contiguous() for name, tensor in model.state_dict().items()}
    dtypes = {tensor.dtype for tensor in tensors.values()}
    assert len(dtypes) == 1, f"weights of one dtype can be saved, these are {sorted(map(str, dtypes))}"
    config = config_to_hf(getattr(model, "vlm_config", model.config))
    if isinstance(model, RewardModel):
        architecture = re.sub("For[A-Z].*", "ForTokenClassification", config["architectures"][0])
        config |= {"architectures": [architecture], "num_labels": 1, "reward_kind": model.kind}
    config["torch_dtype"] = str(dtypes.pop()).removeprefix("torch.")
    partial = {name: folder / f"{name}.partial" for name in (WEIGHTS, CONFIG)}
    try:
        save_file(tensors, partial[WEIGHTS], metadata={"format": "pt"})
        partial[CONFIG].write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        for name, file in partial.items():
            os.replace(file, folder / name)
    except (SafetensorError, OSError) as error:
        raise OSError(f"{folder}: no model written ({' '.join(str(error).split())})") from None
    finally:
        for file in partial.values():
            file.unlink(missing_ok=True)
    (folder / INDEX).unlink(missing_ok=True)  # it would speak of shards that this model is not in
