"""The procedural image sets: what the labels promise is in the pixels."""

import colorsys

import numpy as np
import pytest

from benchmark import drawn
from benchmark.drawn import SCENES, draw_scene

# written down apart from the module's own table, as a reader would name them
RGB = {
    "red": (220, 30, 30),
    "green": (40, 160, 60),
    "blue": (40, 90, 220),
    "yellow": (245, 220, 20),
    "purple": (130, 40, 165),
    "orange": (250, 125, 20),
}


def make_images(scene: str, per_class: int = 4, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """`per_class` images of each class and their labels: int [N], RGB float [N, 3, 32, 32]."""
    labels = np.tile(np.arange(len(SCENES[scene])), per_class)
    return labels, draw_scene(scene, labels, np.random.default_rng(seed))[:, :3].astype(float)


def foreground(images: np.ndarray) -> np.ndarray:
    """Where [N, 3, 32, 32] differs from its top left corner: bool [N, 32, 32]."""
    return (images != images[:, :, :1, :1]).any(1)


def components(mask: np.ndarray) -> int:
    """The number of 8-connected regions of a bool [32, 32]."""
    todo, count = set(map(tuple, np.argwhere(mask).tolist())), 0
    while todo:
        stack, count = [todo.pop()], count + 1
        while stack:
            y, x = stack.pop()
            near = {(y + i, x + j) for i in (-1, 0, 1) for j in (-1, 0, 1)} & todo
            todo -= near
            stack += near
    return count


def nearest_colour(rgb: np.ndarray) -> list[str]:
    """[N, 3] -> the names of the nearest reference colours."""
    distance = np.linalg.norm(rgb[:, None] - np.array(list(RGB.values())), axis=-1)
    return [list(RGB)[k] for k in distance.argmin(1)]


@pytest.mark.parametrize(
    ("scene", "count", "first", "last"),
    [
        ("shapes", 42, "red circle", "orange heart"),
        ("sprites", 24, "small square, top left", "large heart, bottom right"),
        ("solids", 24, "red cube", "orange cone"),
        ("counting", 8, "one object", "eight objects"),
    ],
)
def test_class_names(scene, count, first, last):
    names = SCENES[scene]
    assert (len(set(names)), names[0], names[-1]) == (count, first, last)


@pytest.mark.parametrize("scene", SCENES)
def test_images_are_opaque_rgba_that_vary_within_a_class(scene):
    images = draw_scene(scene, np.zeros(5, int), np.random.default_rng(0))
    assert (images.shape, images.dtype) == ((5, 4, 32, 32), np.uint8)
    assert (images[:, 3] == 255).all()
    assert len(np.unique(images.reshape(5, -1), axis=0)) == 5
    assert draw_scene(scene, np.zeros(0, int), np.random.default_rng(0)).shape == (0, 4, 32, 32)


@pytest.mark.parametrize("scene", SCENES)
def test_a_seed_decides_the_images_and_chunks_do_not(scene, monkeypatch):
    _, images = make_images(scene, seed=1)
    assert not np.array_equal(images, make_images(scene, seed=2)[1])
    monkeypatch.setattr(drawn, "_CHUNK", 7)
    np.testing.assert_array_equal(images, make_images(scene, seed=1)[1])


@pytest.mark.parametrize("scene", ["shapes", "sprites", "counting"])
def test_nothing_is_cropped(scene):
    _, images = make_images(scene, per_class=40)
    mask = foreground(images)
    assert mask.any((1, 2)).all()
    assert not (mask[:, [0, -1]].any() or mask[:, :, [0, -1]].any())


def test_shapes_have_their_colour():
    labels, images = make_images("shapes", per_class=20)
    # the quarter farthest from the paper: without the softened outline
    contrast = np.linalg.norm(images - images[:, :, :1, :1], axis=1)
    core = contrast >= 0.95 * contrast.max((1, 2), keepdims=True)
    mean = (images * core[:, None]).sum((2, 3)) / core.sum((1, 2))[:, None]
    assert nearest_colour(mean) == [SCENES["shapes"][k].split()[0] for k in labels]


@pytest.mark.parametrize("scene", ["shapes", "sprites", "counting"])
def test_objects_stand_out_from_their_background(scene):
    _, images = make_images(scene, per_class=20)
    contrast = np.linalg.norm(images - images[:, :, :1, :1], axis=1)
    assert contrast.max((1, 2)).min() > 100


@pytest.mark.parametrize(
    ("shape", "compactness"),
    [("circle", 1), ("square", 3 / np.pi), ("triangle", 0.827), ("bar", 0.446)],
)
def test_shapes_have_their_outline(shape, compactness):
    """Area squared over polar moment is greatest for a disc, and blind to size and rotation."""
    labels = np.repeat([k for k, name in enumerate(SCENES["shapes"]) if shape in name], 20)
    images = draw_scene("shapes", labels, np.random.default_rng(0))[:, :3].astype(float)
    contrast = np.linalg.norm(images - images[:, :, :1, :1], axis=1)
    cover = contrast / contrast.max((1, 2), keepdims=True)
    area = cover.sum((1, 2))
    y, x = np.mgrid[:32, :32]
    moment = sum((cover * a**2).sum((1, 2)) - (cover * a).sum((1, 2)) ** 2 / area for a in (y, x))
    measured = np.median(area**2 / (2 * np.pi * moment))
    assert measured == pytest.approx(compactness, abs=0.025)


def test_sprites_have_their_size_and_quadrant():
    labels, images = make_images("sprites", per_class=40)
    cover = images[:, 0] / 255
    area = cover.sum((1, 2))
    size, shape, quadrant = np.unravel_index(labels, (2, 3, 4))
    for k in range(3):
        small, large = (area[(shape == k) & (size == z)] for z in (0, 1))
        assert large.min() > 1.8 * small.max()
    y, x = ((cover * a).sum((1, 2)) / area for a in np.mgrid[:32, :32])
    np.testing.assert_array_equal(quadrant, 2 * (y > 15.5) + (x > 15.5))
    assert min(abs(y - 15.5).min(), abs(x - 15.5).min()) > 2


def test_solids_have_the_only_vivid_colour():
    labels, images = make_images("solids", per_class=20)
    high, low = images.max(1), images.min(1)
    vivid = (high - low) > 0.6 * high
    assert (vivid.sum((1, 2)) > 12).all()
    mean = (images * vivid[:, None]).sum((2, 3)) / vivid.sum((1, 2))[:, None]
    bright = mean * (np.array([max(c) for c in RGB.values()])[labels // 4] / mean.max(1))[:, None]
    assert nearest_colour(bright) == [SCENES["solids"][k].split()[0] for k in labels]
    assert not (vivid[:, [0, -1]].any() or vivid[:, :, [0, -1]].any())


def test_solids_stand_before_other_hues():
    labels, images = make_images("solids", per_class=20)
    own = [360 * colorsys.rgb_to_hsv(*rgb)[0] for rgb in RGB.values()]
    for row in (0, -1):  # the wall, the floor
        hues = [360 * colorsys.rgb_to_hsv(*rgb)[0] for rgb in images[:, :, row, 0]]
        away = abs((np.array(hues) - np.array(own)[labels // 4] + 180) % 360 - 180)
        assert away.min() > 50


def test_counting_counts():
    labels, images = make_images("counting", per_class=25)
    assert [components(mask) for mask in foreground(images)] == (labels + 1).tolist()
