"""Image files -> tensors, as a model folder's preprocessor_config.json says.

The steps are those of transformers' CLIPImageProcessor, SiglipImageProcessor and LlavaImageProcessor in their
Pillow versions, in their order: RGB, pad to a square (Llava), resize, crop the centre, rescale, normalise.
The results are equal to the last bit. The torchvision versions (once called ...Fast) resize with a filter of
their own: values differ by 1/255 here and there, by up to 20/255 at sharp edges of a picture that grows; and
where a picture is smaller than the crop it may lie one pixel further to the left or top.

Letters: I images, C channels (3), H height, W width.
"""

import json
import stat
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

from minicot.errors import InputError

FORMATS = ("PNG", "JPEG", "WEBP")
MAX_PIXELS = 2**26  # 8,192 x 8,192: what a file may hold, and what a resized picture may have
NESTED, PLAIN = "processor_config.json", "preprocessor_config.json"

# What a preprocessor_config.json may leave out, and what its absence means: the classes' defaults.
COMMON = {
    "do_convert_rgb": True,
    "do_pad": False,
    "do_resize": True,
    "resample": 3,
    "do_center_crop": False,
    "crop_size": None,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
}
CLIP = COMMON | {
    "size": {"shortest_edge": 224},
    "do_center_crop": True,
    "crop_size": {"height": 224, "width": 224},
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}
DEFAULTS = {
    "CLIPImageProcessor": CLIP,
    "LlavaImageProcessor": CLIP,
    "SiglipImageProcessor": COMMON
    | {"size": {"height": 224, "width": 224}, "image_mean": [0.5] * 3, "image_std": [0.5] * 3},
}
# Keys that change no pixel, and the one value of data_format that is ours.
IGNORED = {
    "image_processor_type",
    "feature_extractor_type",
    "processor_class",
    "_valid_processor_keys",
    "default_to_square",
    "return_tensors",
    "device",
    "disable_grouping",
    "image_seq_length",
}
ALLOWED_VALUES = {"data_format": "channels_first"}


# ---- files -------------------------------------------------------------------------------------------------


def load_image(path, root=None) -> Image.Image:
    """A PNG, JPEG or WebP file -> an RGB picture (to_rgb), turned upright as its EXIF says; an animation's
    first frame.

    With `root`, a relative path starts there, and the file must lie inside, links followed. FileNotFoundError
    where there is none; InputError for a path that leaves root, for what is no such picture, is broken, or
    holds more than MAX_PIXELS (read in the header, before anything is decoded)."""
    file, where = locate(path, root), f"image {str(path)!r}"
    try:
        image = Image.open(file, formats=FORMATS)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise InputError(f"{where}: found far too many pixels; allowed: at most {MAX_PIXELS:,}") from None
    except Exception:  # noqa: BLE001 - a broken header may raise anything
        with open(file, "rb") as opened:
            start = opened.read(12)
        raise InputError(
            f"{where}: found no picture that can be read (its first bytes are {start}); "
            f"allowed: {', '.join(FORMATS)}"
        ) from None
    with image:
        width, height = image.size
        if width * height > MAX_PIXELS:
            raise InputError(f"{where}: found {width} x {height} pixels; allowed: at most {MAX_PIXELS:,}")
        try:
            return to_rgb(ImageOps.exif_transpose(image))
        except Exception as error:  # noqa: BLE001 - a decoder may raise anything
            reason = " ".join(str(error).split()) or type(error).__name__
            raise InputError(
                f"{where}: found a broken or truncated {image.format} ({reason}); allowed: a whole one"
            ) from None


def locate(path, root):
    """The file of a path below root, checked to be inside it, to be there, a file, and not empty."""
    where, file = f"image {str(path)!r}", Path(path) if root is None else Path(root, path)
    try:
        inside = root is None or file.resolve().is_relative_to(Path(root).resolve())
        status = file.stat() if inside else None
    except FileNotFoundError:
        raise FileNotFoundError(f"{where}: no such file" + (f" in {root}" if root else "")) from None
    except (OSError, RuntimeError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{where}: found no readable file ({reason})") from None
    if not inside:
        raise InputError(f"{where}: found a path that leaves its folder; allowed: files inside {root}")
    regular = stat.S_ISREG(status.st_mode)
    if not regular or not status.st_size:
        folder = stat.S_ISDIR(status.st_mode)
        kind = "an empty file" if regular else "a folder" if folder else "no regular file"
        raise InputError(f"{where}: found {kind}; allowed: a {', '.join(FORMATS)} file")
    return file


def to_rgb(image: Image.Image) -> Image.Image:
    """Any picture -> mode RGB as transformers' processors do: what is transparent shows white. But 16-bit
    grey keeps its high byte, where Pillow (and so transformers) turns all above 255 white."""
    if image.mode == "RGB" and image.info.get("transparency") is None:
        return image
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8))
    if "A" in image.getbands() or image.info.get("transparency") is not None:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, (255, 255, 255, 255)), image)
    return image.convert("RGB")


# ---- pixels ------------------------------------------------------------------------------------------------


class ImageProcessor:
    """What a folder's preprocessor_config.json (or the image_processor inside processor_config.json, which
    comes first, as in transformers) does to a picture. `options` holds every option under its name there.

    InputError names file and field for an unknown processor, an option that would change pixels in a way that
    is not computed here, and a value that is not allowed."""

    def __init__(self, folder):
        self.options = parse_options(*_read_options(Path(folder)))

    @classmethod
    def from_dict(cls, config: dict, where: str = PLAIN) -> "ImageProcessor":
        """From the dict of a preprocessor_config.json; `where` opens every error's message."""
        processor = cls.__new__(cls)
        processor.options = parse_options(config, where)
        return processor

    def to_dict(self) -> dict:
        """The dict of a preprocessor_config.json that transformers reads as the same processor."""
        return {name: value for name, value in self.options.items() if value is not None}

    def save(self, folder) -> None:
        """Write preprocessor_config.json."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        (Path(folder) / PLAIN).write_text(json.dumps(self.to_dict(), indent=1) + "\n", encoding="utf-8")

    def __call__(self, images) -> torch.Tensor:
        """A picture -> (C,H,W), a list of pictures -> (I,C,H,W), float32. InputError where the pictures of a
        list come out in different sizes."""
        if isinstance(images, Image.Image):
            return self._pixels(images)
        pictures = [self._pixels(image) for image in images]
        sizes = sorted({(pixels.shape[2], pixels.shape[1]) for pixels in pictures})
        if len(sizes) != 1:
            raise InputError(f"pictures come out as {sizes or 'none'} (width, height); allowed: one size")
        return torch.stack(pictures)

    def _pixels(self, image):
        options = self.options
        if options["do_convert_rgb"]:
            image = to_rgb(image)
        elif image.mode != "RGB":
            raise InputError(f"found a picture of mode {image.mode}; allowed: RGB (do_convert_rgb is false)")
        if options["do_pad"] and image.width != image.height:
            side = max(image.size)
            square = Image.new("RGB", (side, side), tuple(int(x * 255) for x in options["image_mean"]))
            square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
            image = square
        if options["do_resize"]:
            image = image.resize(_resized(image, options["size"]), options["resample"])
        if options["do_center_crop"]:  # crop fills with black where the picture is too small
            width, height = options["crop_size"]["width"], options["crop_size"]["height"]
            left, top = (image.width - width) // 2, (image.height - height) // 2
            image = image.crop((left, top, left + width, top + height))
        values = np.asarray(image)  # (H,W,C)
        if options["do_rescale"]:
            values = values.astype(np.float64) * options["rescale_factor"]
        values = values.astype(np.float32)
        if options["do_normalize"]:
            values = values - np.array(options["image_mean"], np.float32)
            values = values / np.array(options["image_std"], np.float32)
        return torch.from_numpy(np.ascontiguousarray(values.transpose(2, 0, 1)))


def _resized(image, size):
    """(width, height) after resizing: as said, or with the shorter side as said and the other to match."""
    if "height" in size:
        return size["width"], size["height"]
    edge, short, long = size["shortest_edge"], min(image.size), max(image.size)
    longest = int(edge * long / short)
    if edge * longest > MAX_PIXELS:
        raise InputError(
            f"found a picture of {image.width} x {image.height} pixels, which become {edge} "
            f"x {longest} on resizing; allowed: at most {MAX_PIXELS:,} pixels"
        )
    return (edge, longest) if image.width <= image.height else (longest, edge)


# ---- options -----------------------------------------------------------------------------------------------


def _read_options(folder):
    """(the dict of options, where it stands)."""
    for name in (NESTED, PLAIN):
        file = folder / name
        if not file.is_file():
            continue
        try:
            config = json.loads(file.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise InputError(f"{file}: not JSON ({error})") from None
        if not isinstance(config, dict):
            raise InputError(f"{file}: holds a JSON {type(config).__name__}, expected an object")
        if name == PLAIN or "image_processor" in config:
            return (config if name == PLAIN else config["image_processor"]), str(file)
    raise InputError(f"{folder}: no {PLAIN}, and no image_processor in a {NESTED}")


def parse_options(config: dict, where: str) -> dict:
    """The options of a preprocessor_config.json, checked and without gaps; null means absent."""
    if not isinstance(config, dict):
        raise InputError(f"{where}: image_processor is {config!r:.60}; allowed: an object")
    config = {name: value for name, value in config.items() if value is not None}
    kind = config.get("image_processor_type", config.get("feature_extractor_type"))
    known = str(kind).replace("FeatureExtractor", "ImageProcessor").removesuffix("Fast").removesuffix("Pil")
    if known not in DEFAULTS:
        raise InputError(f"{where}: image_processor_type is {kind!r}; allowed: {', '.join(DEFAULTS)}")
    options = {"image_processor_type": known} | DEFAULTS[known]
    for name, value in config.items():
        if name in options and name != "image_processor_type":
            options[name] = value
        elif name not in IGNORED and ALLOWED_VALUES.get(name, False) != value:
            raise InputError(f"{where}: {name} is {value!r:.60}; allowed: {', '.join(options)}")
    for name, value in options.items():
        if name.startswith("do_") and not isinstance(value, bool):
            raise InputError(f"{where}: {name} is {value!r:.60}; allowed: true, false")
    if options["do_pad"] and known != "LlavaImageProcessor":
        raise InputError(f"{where}: do_pad is true; allowed: false, but for LlavaImageProcessor")
    squares = config.get("default_to_square", False)
    options["size"] = _size(options["size"], "size", where, square=squares is True, edge=True)
    if options["do_center_crop"]:
        options["crop_size"] = _size(options["crop_size"], "crop_size", where, square=True, edge=False)
    if type(options["resample"]) is not int or not 0 <= options["resample"] <= 5:
        raise InputError(f"{where}: resample is {options['resample']!r:.60}; allowed: Pillow's, 0 to 5")
    for name, count in (("image_mean", 3), ("image_std", 3), ("rescale_factor", 1)):
        numbers = options[name] if count == 3 else [options[name]]
        if not isinstance(numbers, list) or len(numbers) != count or not all(map(_is_number, numbers)):
            raise InputError(f"{where}: {name} is {options[name]!r:.60}; allowed: {count} numbers")
    if min(map(abs, options["image_std"])) < 1e-6:
        raise InputError(f"{where}: image_std is {options['image_std']}; allowed: none of it 0")
    return options


def _size(value, name, where, *, square, edge):
    """A size as {"height", "width"} or {"shortest_edge"}; a lone number is one of the two, as the caller
    says."""
    if _is_number(value):
        value = {"height": value, "width": value} if square else {"shortest_edge": value}
    shapes = [{"height", "width"}] + [{"shortest_edge"}] * edge
    if (
        not isinstance(value, dict)
        or set(value) not in shapes
        or not all(type(side) is int and 1 <= side <= 8192 for side in value.values())
    ):
        raise InputError(
            f"{where}: {name} is {value!r:.60}; allowed: a number, or an object of height and "
            f"width{' or of shortest_edge' * edge}, from 1 to 8192"
        )
    return dict(value)


def _is_number(value):
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e9
