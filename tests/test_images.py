"""Image files and processors, against transformers' processors on Pillow (equal to the last bit)."""

import io
import json
import os
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, CLIPImageProcessorPil, LlavaImageProcessorPil, LlavaProcessor
from transformers import PreTrainedTokenizerFast, SiglipImageProcessorPil
from transformers.image_utils import load_image as their_load_image

from minicot.errors import InputError
from minicot.images import FORMATS, MAX_PIXELS, ImageProcessor, load_image, to_rgb

SIZES = [(64, 64), (1, 1), (300, 7), (7, 300), (97, 61), (231, 225), (512, 384)]
MODES = {
    "PNG": ("RGB", "L", "1", "P", "LA", "RGBA", "PA"),
    "JPEG": ("RGB", "L", "1", "CMYK"),
    "WEBP": ("RGB", "L", "P", "CMYK", "LA", "RGBA"),
}  # what each format can be made from
CLIP = {"image_processor_type": "CLIPImageProcessor"}


def noise(size=(40, 30), mode="RGB", seed=0):
    """A picture with smooth parts and sharp edges; alpha of all values where the mode has it."""
    width, height = size
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 256, (4, 4, 4), np.uint8)
    values = np.array(Image.fromarray(small).resize(size, Image.BICUBIC))
    values[: height // 2, : width // 2] = rng.integers(0, 256, (height // 2, width // 2, 4), np.uint8)
    image = Image.fromarray(values)
    if mode == "PA":
        palette = image.convert("RGB").convert("P")
        return Image.merge("LA", (Image.fromarray(np.array(palette)), image.getchannel("A")))
    return image.convert(mode)


def theirs(processor, image):
    return processor(image, return_tensors="pt")["pixel_values"][0].float()


def saved(processor, folder):
    processor.save_pretrained(folder)
    return ImageProcessor(folder)


def message_of(call, *args, kind=InputError):
    with pytest.raises(kind) as caught:
        call(*args)
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


# ---- processors --------------------------------------------------------------------------------------------

PROCESSORS = {
    "clip": (CLIPImageProcessorPil, {}),
    "clip 336": (CLIPImageProcessorPil, {"size": {"shortest_edge": 336}, "crop_size": 336}),
    "clip, squashed, no crop": (
        CLIPImageProcessorPil,
        {"size": {"height": 40, "width": 56}, "do_center_crop": False},
    ),
    "clip, a crop that is larger": (CLIPImageProcessorPil, {"size": {"shortest_edge": 36}, "crop_size": 51}),
    "clip, crop alone": (
        CLIPImageProcessorPil,
        {"do_resize": False, "crop_size": {"height": 33, "width": 50}},
    ),
    "clip, no normalising": (CLIPImageProcessorPil, {"do_normalize": False}),
    "clip, no rescaling": (CLIPImageProcessorPil, {"do_rescale": False}),
    "clip, bytes": (CLIPImageProcessorPil, {"do_rescale": False, "do_normalize": False}),
    "siglip": (SiglipImageProcessorPil, {}),
    "siglip with a crop": (
        SiglipImageProcessorPil,
        {"size": {"height": 70, "width": 60}, "crop_size": 48, "do_center_crop": True},
    ),
    "siglip, another factor": (SiglipImageProcessorPil, {"rescale_factor": 1 / 127.5}),
    "llava": (LlavaImageProcessorPil, {}),
    "llava, padded": (LlavaImageProcessorPil, {"do_pad": True, "size": {"shortest_edge": 112}}),
}


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("name", PROCESSORS)
def test_pixels_equal_those_of_transformers_at_every_size(name, size, tmp_path):
    kind, options = PROCESSORS[name]
    processor, image = kind(**options), noise(size)
    ours, expected = saved(processor, tmp_path)(image), theirs(processor, image)
    assert ours.dtype == torch.float32 and ours.shape == expected.shape and torch.equal(ours, expected)


@pytest.mark.parametrize("resample", range(6))
def test_pixels_equal_those_of_transformers_with_every_filter(resample, tmp_path):
    processor = SiglipImageProcessorPil(size={"height": 32, "width": 48}, resample=resample)
    for size in SIZES:
        assert torch.equal(saved(processor, tmp_path)(noise(size)), theirs(processor, noise(size)))


@pytest.mark.parametrize("format, mode", [(format, mode) for format in FORMATS for mode in MODES[format]])
def test_a_file_of_every_mode_becomes_the_pixels_of_transformers(format, mode, tmp_path):
    processor, path = CLIPImageProcessorPil(size={"shortest_edge": 24}, crop_size=24), tmp_path / "picture"
    noise(mode=mode).save(path, format)
    ours = saved(processor, tmp_path)
    with Image.open(path) as opened:
        expected = theirs(processor, opened)
        assert torch.equal(ours(opened), expected)
    assert load_image(path).mode == "RGB" and torch.equal(ours(load_image(path)), expected)


def test_what_is_transparent_shows_white_also_by_palette_and_by_one_colour(tmp_path):
    pixels = np.zeros((2, 3, 3), np.uint8)
    pixels[0, 0] = (10, 20, 30)
    Image.fromarray(pixels).save(tmp_path / "colour.png", transparency=(0, 0, 0))
    Image.fromarray(pixels).quantize(2).save(tmp_path / "palette.png", transparency=1)
    Image.fromarray(pixels[..., 0]).save(tmp_path / "grey.png", transparency=0)
    processor = CLIPImageProcessorPil(do_resize=False, do_center_crop=False)
    for name in ("colour", "palette", "grey"):
        with Image.open(tmp_path / f"{name}.png") as opened:
            expected = theirs(processor, opened)
        loaded = load_image(tmp_path / f"{name}.png")
        assert torch.equal(
            ImageProcessor.from_dict({**CLIP, "do_resize": False, "do_center_crop": False})(loaded), expected
        )
        assert {(255, 255, 255)} < {loaded.getpixel((x, y)) for x in range(3) for y in range(2)}


def test_16_bit_grey_keeps_its_greys(tmp_path):
    """Guards against Pillow's conversion, which turns all above 255 of 65,535 white."""
    grey = np.array([[0, 255, 256, 32768, 65535]], np.uint16)
    Image.fromarray(grey).save(tmp_path / "deep.png")
    loaded = np.array(load_image(tmp_path / "deep.png"))
    assert loaded[0, :, 0].tolist() == [0, 0, 1, 128, 255] and (loaded == loaded[..., :1]).all()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_photograph_is_turned_upright_as_transformers_turns_it(orientation, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = orientation
    for format in FORMATS:
        noise().save(tmp_path / "photo", format, exif=exif)
        loaded, expected = load_image(tmp_path / "photo"), their_load_image(str(tmp_path / "photo"))
        assert loaded.size == expected.size == ((40, 30) if orientation < 5 else (30, 40))
        assert loaded.tobytes() == expected.tobytes()


def test_a_list_becomes_one_tensor_and_different_sizes_are_refused():
    processor = ImageProcessor.from_dict({**CLIP, "size": {"shortest_edge": 20}, "crop_size": 16})
    batch = processor([noise(), noise((60, 50), "L")])
    assert batch.shape == (2, 3, 16, 16) and torch.equal(batch[1], processor(noise((60, 50), "L")))
    uncut = ImageProcessor.from_dict({**CLIP, "size": {"shortest_edge": 20}, "do_center_crop": False})
    assert "[(20, 26), (26, 20)]" in message_of(uncut, [noise((40, 30)), noise((30, 40))])
    assert "none" in message_of(uncut, [])


def test_only_rgb_is_taken_where_nothing_converts():
    processor = ImageProcessor.from_dict({**CLIP, "do_convert_rgb": False})
    assert "mode L" in message_of(processor, noise(mode="L"))
    assert torch.equal(processor(noise()), ImageProcessor.from_dict(CLIP)(noise()))


def test_an_endless_strip_is_refused_before_it_is_resized():
    processor = ImageProcessor.from_dict({**CLIP, "size": {"shortest_edge": 336}})
    message = message_of(processor, Image.new("RGB", (1, 2000)))
    assert "1 x 2000" in message and f"{MAX_PIXELS:,}" in message


# ---- configs -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PROCESSORS)
def test_transformers_reads_what_we_save_as_the_same_processor(name, tmp_path):
    kind, options = PROCESSORS[name]
    ours = saved(kind(**options), tmp_path / "theirs")
    ours.save(tmp_path / "ours")
    assert ImageProcessor(tmp_path / "ours").to_dict() == ours.to_dict()
    again = AutoImageProcessor.from_pretrained(tmp_path / "ours", backend="pil")
    assert type(again) is kind and torch.equal(ours(noise()), theirs(again, noise()))


def test_options_nested_in_a_processor_config_are_read_and_come_first(tmp_path, tokenizer_folder):
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tokenizer_folder)
    inner = CLIPImageProcessorPil(size={"shortest_edge": 20}, crop_size=20)
    LlavaProcessor(inner, tokenizer, patch_size=4).save_pretrained(tmp_path)
    assert not (tmp_path / "preprocessor_config.json").exists()
    SiglipImageProcessorPil().save_pretrained(tmp_path)
    assert torch.equal(ImageProcessor(tmp_path)(noise()), theirs(inner, noise()))
    (tmp_path / "processor_config.json").write_text('{"processor_class": "LlavaProcessor", "patch_size": 14}')
    assert ImageProcessor(tmp_path).options["image_processor_type"] == "SiglipImageProcessor"


@pytest.mark.parametrize(
    "config",
    [
        {
            "feature_extractor_type": "CLIPFeatureExtractor",
            "size": 48,
            "crop_size": 32,
            "do_resize": True,
            "do_center_crop": True,
            "do_normalize": True,
            "resample": 3,
        },  # openai/clip-*, 2021
        {
            **CLIP,
            "size": {"shortest_edge": 48},
            "crop_size": {"height": 32, "width": 32},  # llava-1.5-7b-hf
            "_valid_processor_keys": ["images", "do_resize"],
            "processor_class": "LlavaProcessor",
        },
        {
            "image_processor_type": "CLIPImageProcessorFast",
            "size": 48,
            "crop_size": 32,
            "image_mean": None,
            "data_format": "channels_first",
            "device": None,
            "do_pad": None,
            "pad_size": None,  # transformers 4.5x
            "default_to_square": False,
            "return_tensors": None,
            "disable_grouping": None,
        },
    ],
)
def test_published_configs_of_several_years_are_read_alike(config):
    expected = theirs(CLIPImageProcessorPil(size={"shortest_edge": 48}, crop_size=32), noise())
    assert torch.equal(ImageProcessor.from_dict(config)(noise()), expected)


def test_a_lone_number_is_the_shorter_edge_or_a_square_as_transformers_reads_it(tmp_path):
    for squares in (True, False):
        processor = SiglipImageProcessorPil(size=20, default_to_square=squares)
        (tmp_path / "preprocessor_config.json").write_text(
            json.dumps(
                {"image_processor_type": "SiglipImageProcessor", "size": 20, "default_to_square": squares}
            )
        )
        assert torch.equal(ImageProcessor(tmp_path)(noise()), theirs(processor, noise()))


@pytest.mark.parametrize(
    "config, parts",
    [
        ({}, ["image_processor_type is None", "SiglipImageProcessor"]),
        ({"image_processor_type": "Qwen2VLImageProcessor"}, ["Qwen2VLImageProcessor", "CLIPImageProcessor"]),
        ({"image_processor_type": ["CLIPImageProcessor"]}, ["image_processor_type"]),
        ({**CLIP, "do_flip_channel_order": True}, ["do_flip_channel_order is True"]),
        ({**CLIP, "image_grid_pinpoints": [[336, 672]]}, ["image_grid_pinpoints"]),
        ({**CLIP, "auto_map": {"AutoImageProcessor": "x.Y"}}, ["auto_map"]),
        ({**CLIP, "data_format": "channels_last"}, ["data_format is 'channels_last'"]),
        ({**CLIP, "do_pad": True}, ["do_pad is true", "LlavaImageProcessor"]),
        ({**CLIP, "do_resize": "yes"}, ["do_resize is 'yes'", "true, false"]),
        ({**CLIP, "do_rescale": 1}, ["do_rescale is 1"]),
        ({**CLIP, "size": {"longest_edge": 384}}, ["size", "longest_edge", "shortest_edge"]),
        ({**CLIP, "size": {"shortest_edge": 20, "longest_edge": 40}}, ["size"]),
        ({**CLIP, "size": {"height": 20}}, ["size is {'height': 20}"]),
        ({**CLIP, "size": {"height": 20, "width": 0}}, ["from 1 to 8192"]),
        ({**CLIP, "size": {"shortest_edge": 10**6}}, ["from 1 to 8192"]),
        ({**CLIP, "size": 22.5}, ["size"]),
        ({**CLIP, "size": True}, ["size is True"]),
        ({**CLIP, "crop_size": {"shortest_edge": 20}}, ["crop_size"]),
        ({"image_processor_type": "SiglipImageProcessor", "do_center_crop": True}, ["crop_size is None"]),
        ({**CLIP, "resample": 7}, ["resample is 7", "0 to 5"]),
        ({**CLIP, "resample": "bicubic"}, ["resample is 'bicubic'"]),
        ({**CLIP, "image_mean": [0.5, 0.5]}, ["image_mean", "3 numbers"]),
        ({**CLIP, "image_mean": 0.5}, ["image_mean is 0.5"]),
        ({**CLIP, "image_std": [1, 0, 1]}, ["image_std", "0"]),
        ({**CLIP, "image_std": [1, 1, float("nan")]}, ["image_std"]),
        ({**CLIP, "rescale_factor": "1/255"}, ["rescale_factor is '1/255'"]),
    ],
)
def test_what_is_not_computed_is_refused_by_its_name(config, parts, tmp_path):
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(config))
    message = message_of(ImageProcessor, tmp_path)
    assert str(tmp_path / "preprocessor_config.json") in message
    assert all(part in message for part in parts), message


def test_a_folder_without_a_readable_config_is_refused(tmp_path):
    file = tmp_path / "preprocessor_config.json"
    assert str(tmp_path) in message_of(ImageProcessor, tmp_path)
    for text, part in (("{", "not JSON"), ("[1]", "JSON list"), ("\xff", "not JSON")):
        file.write_bytes(text.encode("latin-1"))
        assert str(file) in (message := message_of(ImageProcessor, tmp_path)) and part in message
    (tmp_path / "processor_config.json").write_text('{"image_processor": "clip"}')
    assert "image_processor is 'clip'" in message_of(ImageProcessor, tmp_path)


# ---- files that are no pictures ----------------------------------------------------------------------------


def encoded(format="PNG", image=None):
    file = io.BytesIO()
    (image or noise()).save(file, format)
    return file.getvalue()


def png_header(width, height):
    """A PNG that claims a size and has no pixels."""
    chunks = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0), b"IDAT"
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk)) for chunk in chunks
    )


@pytest.mark.parametrize(
    "content, parts",
    [
        (b"", ["an empty file", "PNG"]),
        (b"hello, this is a text", ["b'hello, this '", "PNG, JPEG, WEBP"]),
        (encoded("GIF"), ["b'GIF8", "PNG, JPEG, WEBP"]),
        (encoded("TIFF"), ["PNG, JPEG, WEBP"]),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", ["<svg"]),
        (encoded("PNG")[:20], ["PNG"]),
        (encoded("PNG")[:200], ["broken or truncated PNG"]),
        (encoded("JPEG")[:-40], ["broken or truncated JPEG"]),
        (encoded("WEBP")[:-40], ["WEBP"]),
        (encoded("PNG")[:60] + b"\0\1\2" + encoded("PNG")[63:], ["PNG"]),
        (png_header(8193, 8192), ["8193 x 8192", f"{MAX_PIXELS:,}"]),
        (png_header(2**31 - 1, 2**31 - 1), [f"{MAX_PIXELS:,}"]),
        (png_header(15_000, 15_000), [f"{MAX_PIXELS:,}"]),
        (png_header(0, 5), ["PNG"]),
    ],
    ids=range(14),
)
def test_a_file_that_is_no_whole_picture_is_refused_in_one_line_with_its_name(content, parts, tmp_path):
    (tmp_path / "picture.png").write_bytes(content)
    message = message_of(load_image, tmp_path / "picture.png")
    assert "picture.png" in message and all(part in message for part in parts), message
    assert message_of(load_image, "picture.png", tmp_path).endswith(message.partition("': ")[2])


def test_broken_bytes_anywhere_never_raise_anything_but_one_line(tmp_path):
    """Guards against a decoder's own errors, which are of a dozen types."""
    rng, path = np.random.default_rng(0), tmp_path / "picture"
    refused = 0
    for format in FORMATS:
        whole = encoded(format, noise((24, 20)))
        for _ in range(150):
            broken = bytearray(whole)
            for place in rng.integers(0, len(whole), rng.integers(1, 6)):
                broken[place] = rng.integers(256)
            path.write_bytes(broken[: rng.integers(1, len(whole) + 1)] if rng.random() < 0.3 else broken)
            try:
                assert load_image(path).mode == "RGB"
            except InputError as error:
                refused += 1
                assert len(str(error).splitlines()) == 1 and str(path) in str(error)
    assert refused > 200


def test_what_is_no_file_is_refused(tmp_path):
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    os.symlink(tmp_path / "loop", tmp_path / "loop")
    for root in (None, tmp_path):
        where = tmp_path if root is None else ""
        assert "no such file" in message_of(
            load_image, os.path.join(where, "absent.png"), root, kind=FileNotFoundError
        )
        assert "a folder" in message_of(load_image, os.path.join(where, "folder"), root)
        assert "no regular file" in message_of(load_image, os.path.join(where, "pipe"), root)
        assert "loop" in message_of(load_image, os.path.join(where, "loop"), root)
        assert "no readable file" in message_of(load_image, os.path.join(where, "a\0b"), root)
        assert "no readable file" in message_of(load_image, os.path.join(where, "x" * 300), root)


def test_a_path_that_leaves_its_folder_is_refused_and_one_inside_is_read(tmp_path):
    root = tmp_path / "root"
    (root / "inner").mkdir(parents=True)
    noise().save(tmp_path / "outside.png")
    noise().save(root / "inner" / "inside.png")
    os.symlink(tmp_path / "outside.png", root / "link.png")
    os.symlink(root / "inner" / "inside.png", root / "inner" / "link.png")
    os.symlink(tmp_path, root / "up")
    for path in (
        "../outside.png",
        "inner/../../outside.png",
        str(tmp_path / "outside.png"),
        "link.png",
        "up/outside.png",
        "../absent.png",
        "/etc/passwd",
    ):
        message = message_of(load_image, path, root)
        assert repr(path) in message and "leaves its folder" in message and str(root) in message
    for path in ("inner/inside.png", "inner/../inner/link.png", str(root / "inner" / "inside.png")):
        assert load_image(path, root).size == (40, 30)
    assert load_image(tmp_path / "outside.png").size == (40, 30)


def test_an_animation_shows_its_first_frame(tmp_path):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    for format in ("PNG", "WEBP"):
        frames[0].save(tmp_path / "moving", format, save_all=True, append_images=frames[1:], lossless=True)
        assert load_image(tmp_path / "moving").getpixel((3, 3)) == (255, 0, 0)


def test_a_loaded_picture_needs_its_file_no_more(tmp_path):
    noise().save(tmp_path / "picture.png")
    loaded = load_image(tmp_path / "picture.png")
    (tmp_path / "picture.png").unlink()
    assert loaded.tobytes() == noise().tobytes() and to_rgb(loaded) is loaded
