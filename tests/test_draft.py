"""How JPEGs are decoded and cropped for training: options of the data, in the id of a run."""

import io
import itertools
import json

import numpy as np
import pytest
import torch
from pictures import classes
from PIL import Image

from cmp import config
from cmp.bench import jpegs
from cmp.data import load_data
from cmp.errors import CmpError
from cmp.readers import images
from cmp.readers.manifest import PictureReader
from cmp.runs import identity
from cmp.seeds import numpy_generator

SIDE = 224


def jpeg(width, height):
    """A smooth picture as the content of a file."""
    noise = numpy_generator("test/draft", 0, width).integers(0, 256, (12, 16, 3), np.uint8)
    image = Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)
    content = io.BytesIO()
    image.save(content, "JPEG", quality=95)
    return content.getvalue()


@pytest.mark.parametrize(
    ("size", "double", "side"),
    [((298, 224), 224, 224), ((500, 375), 375, 375), ((640, 480), 480, 240),
     ((1024, 768), 768, 384), ((2400, 1800), 450, 225)],
)  # fmt: skip
def test_a_jpeg_is_decoded_as_small_as_its_manifest_allows(size, double, side, monkeypatch):
    heights, see = [], images.open_upright

    def watch(*arguments):
        image = see(*arguments)
        heights.append(image.height)
        return image

    monkeypatch.setattr(images, "open_upright", watch)
    numbers, crops = np.full(4, 0.5), {}
    for draft in ("double", "side"):
        crops[draft] = images.random_crop(jpeg(*size), numbers, SIDE, PictureReader(draft=draft))
    assert heights == [double, side]
    difference = np.abs(crops["double"].astype(int) - crops["side"]).mean()
    assert (difference > 0) == (double != side)
    assert difference < 3, "the same picture"


@pytest.mark.parametrize("size", [(300, 240), (640, 480), (230, 1900)])
@pytest.mark.parametrize("numbers", [(0.0, 0.0, 0.0, 0.0), (0.5, 0.9, 0.3, 0.999), (0.99,) * 4])
def test_torch_crops_what_pillow_crops(size, numbers):
    """But for rounding: of values, and of the box to whole pixels."""
    content, row = jpeg(*size), np.array(numbers)
    one, other = (images.random_crop(content, row, SIDE, PictureReader(resize=resize))
                  for resize in ("pillow", "torch"))  # fmt: skip
    assert one.shape == other.shape == (3, SIDE, SIDE)
    assert one.dtype == other.dtype == np.uint8
    assert np.abs(one.astype(int) - other).mean() < 4


def test_a_thin_image_is_cropped_by_torch_too():
    crop = images.random_crop(jpeg(1, 40), np.zeros(4), SIDE, PictureReader(resize="torch"))
    assert crop.shape == (3, SIDE, SIDE)


TORCH = PictureReader(resize="torch")


@pytest.fixture
def decoded(monkeypatch):
    """The files that torchvision decodes."""
    seen, decode = [], images._decode_by_torchvision
    assert images.torchvision_equals_pillow(), "of the pinned versions"
    monkeypatch.setattr(
        images, "_decode_by_torchvision", lambda content: seen.append(content) or decode(content)
    )
    return seen


def crops_of(monkeypatch, content, reader=TORCH, side=48):
    """A crop as it is decoded, and as Pillow alone decodes it."""
    numbers = np.array([0.3, 0.8, 0.2, 0.6])
    found = images.random_crop(content, numbers, side, reader)
    with monkeypatch.context() as patch:
        patch.setattr(images, "torchvision_equals_pillow", lambda: False)
        return found, images.random_crop(content, numbers, side, reader)


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("size", [(1, 1), (17, 33), (95, 64)])
def test_torchvision_decodes_to_the_bits_of_pillow(mode, size, decoded, monkeypatch):
    noise = numpy_generator("test/draft", 1).integers(0, 256, (*size[::-1], 3), np.uint8)
    image, files = Image.fromarray(noise).convert(mode), []
    for quality, subsampling, progressive in itertools.product((30, 95), (0, 1, 2), (False, True)):
        for more in ({}, {"restart_marker_blocks": 3}, {"keep_rgb": True}):
            file, how = io.BytesIO(), {}
            if mode == "RGB":  # without subsampling, the file may keep RGB
                how = more if "keep_rgb" in more else {"subsampling": subsampling} | more
            image.save(file, "JPEG", quality=quality, progressive=progressive, **how)
            files.append(file.getvalue())
            one, other = crops_of(monkeypatch, files[-1])
            np.testing.assert_array_equal(one, other)
    assert decoded == (files if mode == "RGB" else [])


def test_pillow_decodes_what_torchvision_would_decode_otherwise(decoded, monkeypatch):
    plain, large = jpeg(90, 70), jpeg(300, 240)
    turned = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.open(io.BytesIO(plain)).save(turned, "JPEG", exif=exif)
    cases = [(large, TORCH), (turned.getvalue(), PictureReader(resize="torch", exif="apply"))]
    for content, reader in [*cases, (plain, PictureReader())]:
        one, other = crops_of(monkeypatch, content, reader)
        np.testing.assert_array_equal(one, other)
    assert decoded == [], "reduced, turned, or resized by Pillow"
    one, other = crops_of(monkeypatch, turned.getvalue())
    np.testing.assert_array_equal(one, other)
    assert len(decoded) == 1, "its orientation is ignored by both"
    with pytest.raises(OSError, match="truncated"):
        crops_of(monkeypatch, plain[: len(plain) // 2])
    assert len(decoded) == 1, "a part of a file"


def test_without_a_decoder_in_torchvision_pillow_decodes(monkeypatch):
    def refuse(*_, **__):
        raise RuntimeError("decode_jpeg: torchvision not compiled with libjpeg support")

    one, _ = crops_of(monkeypatch, jpeg(90, 70))
    monkeypatch.setattr(images, "decode_jpeg", refuse)
    assert not images.torchvision_equals_pillow.__wrapped__()
    np.testing.assert_array_equal(crops_of(monkeypatch, jpeg(90, 70))[0], one)
    monkeypatch.undo()
    monkeypatch.setattr(images, "_decode_by_torchvision", lambda content: torch.zeros(3, 70, 90))
    assert not images.torchvision_equals_pillow.__wrapped__()


def test_an_image_is_scored_the_same_whatever_the_draft():
    content = jpeg(1024, 768)
    how = images.Preprocessing()
    one, other = (images.prepare_image(content, how, PictureReader(draft=draft))
                  for draft in ("double", "side"))  # fmt: skip
    assert (one == other).all()


def test_both_are_part_of_a_run_s_id_and_the_defaults_change_none(tmp_path):
    def run_id(**reader):
        for place, role in enumerate(("adapt", "pool", "eval")):
            names = [f"{word} {place}" for word in ("fox", "owl", "oak", "elm")]
            classes(tmp_path / role, names, 12)
            about = {"name": role, "title": role, "role": role, "licence": "own",
                     "reader": {"kind": "folder", "path": role, **reader}}  # fmt: skip
            (tmp_path / f"{role}.yaml").write_text(json.dumps(about))
        settings = [f"data={tmp_path}", "model.name=tiny", "model.start=random"]
        run = config.parse(config.override(config.profile("quick"), settings))
        return identity.run_id_of(run, load_data(str(tmp_path)))

    plain = run_id()
    assert run_id(draft="double", resize="pillow") == plain
    assert len({plain, run_id(draft="side"), run_id(resize="torch")}) == 3
    with pytest.raises(CmpError, match="draft"):
        run_id(draft="none")


def test_bench_measures_usual_sizes(monkeypatch):
    monkeypatch.setattr(jpegs, "SIZES", ((298, 224), (640, 480)))
    rates = jpegs.decoding_rates(2)
    assert len(rates) == 2 * len(jpegs.WAYS)
    assert list(rates)[:2] == ["298 x 224", "298 x 224, draft: side"]
    assert all(rate > 0 for rate in rates.values())
