"""Scenes of simple things on textured ground: what is in them, where, and how it is drawn.

A scene is a function of a random generator alone. Knows nothing about language or files.
"""

from __future__ import annotations

import colorsys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

SHAPES = ("circle", "square", "triangle", "cross")
TEXTURES = ("plain", "striped", "dotted")
COLOURS = {
    "red": (212, 42, 42),
    "green": (46, 160, 62),
    "blue": (44, 92, 220),
    "yellow": (246, 214, 44),
    "purple": (146, 58, 190),
    "white": (240, 240, 238),
}
"""RGB, 0 to 255. An object's own colour is a little off."""
HALF_EXTENTS = {"small": (0.13, 0.16), "large": (0.22, 0.28)}
"""The range of an object's half-extent, as a share of the image's short side."""

MIN_VISIBLE = 0.6
"""The least share of an object's pixels that others leave visible."""

_SIDES_PX = (160, 240)
_NUM_OBJECTS = (3, 5)
_REACH = 1.33  # the farthest any shape's outline lies from its centre, in half-extents
_PLAIN_SHARE = 0.6
_ROTATED_SHARE = 0.4
_MAX_ROTATION = np.deg2rad(25)
_OVERLAPPING_SHARE = 0.15  # of the objects: these may cover others at once, the rest only where there is no free room
_MIN_DISTANCE = 1.1  # between two centres, in half-extents of the larger one
_FREE_DISTANCE = 1.1  # between two centres, in the sum of both half-extents, where nothing is to overlap
_RIM_PX = 1.4
_ATTEMPTS = 60

Floats = NDArray[np.floating[Any]]
Mask = NDArray[np.bool_]


@dataclass(frozen=True, slots=True, eq=False)
class SceneObject:
    """One object. `centre` is (x, y) in pixels; `half_extent` is half its nominal width, in pixels.

    `visible` is the (H, W) mask of the pixels that no later object covers, `full_area` the number of pixels before
    anything covers them.
    """

    shape: str
    texture: str
    colour: str
    size: str
    centre: tuple[float, float]
    half_extent: float
    rotation: float
    visible: Mask
    full_area: int

    @property
    def visible_area(self) -> int:
        """Visible pixels."""
        return int(np.count_nonzero(self.visible))

    @property
    def box(self) -> tuple[int, int, int, int]:
        """The visible part's box (x0, y0, x1, y1) in pixels, x1 and y1 exclusive."""
        rows, columns = np.flatnonzero(self.visible.any(axis=1)), np.flatnonzero(self.visible.any(axis=0))
        return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


@dataclass(frozen=True, slots=True, eq=False)
class Scene:
    """`image` is (H, W, 3) uint8; `objects` are in drawing order: a later one lies on top."""

    image: NDArray[np.uint8]
    objects: tuple[SceneObject, ...]

    @property
    def size(self) -> tuple[int, int]:
        """(H, W) in pixels."""
        return self.image.shape[0], self.image.shape[1]


def make_scene(rng: np.random.Generator) -> Scene:
    """Draw a scene of 3 to 5 objects, each wholly inside the image and at least MIN_VISIBLE of it visible."""
    low, high = _SIDES_PX
    H, W = (int(side) for side in rng.choice(np.arange(low, high + 1), size=2, replace=False))
    objects: list[SceneObject] = []
    while len(objects) < _NUM_OBJECTS[0]:
        objects = _place_objects(rng, (H, W))
    canvas = _draw_ground(rng, (H, W))
    for item in objects:
        _draw_object(canvas, item, rng)
    return Scene(np.clip(canvas + 0.5, 0, 255).astype(np.uint8), tuple(objects))


def _place_objects(rng: np.random.Generator, size: tuple[int, int]) -> list[SceneObject]:
    """Objects out of a few colours and shapes, so that some share attributes and a prompt has to tell them apart."""
    colours = rng.permutation(list(COLOURS))[: rng.integers(3, 7)]
    shapes = rng.permutation(SHAPES)[: rng.integers(2, 5)]
    objects: list[SceneObject] = []
    for _ in range(rng.integers(_NUM_OBJECTS[0], _NUM_OBJECTS[1] + 1)):
        objects = _place(objects, _make_object(rng, colours, shapes, size), rng)
    return objects


def _make_object(
    rng: np.random.Generator, colours: NDArray[np.str_], shapes: NDArray[np.str_], size: tuple[int, int]
) -> SceneObject:
    """An object that is not anywhere yet."""
    shape = str(rng.choice(shapes))
    extent = str(rng.choice(list(HALF_EXTENTS)))
    turned = shape != "circle" and rng.random() < _ROTATED_SHARE
    return SceneObject(
        shape=shape,
        texture="plain" if rng.random() < _PLAIN_SHARE else str(rng.choice(TEXTURES[1:])),
        colour=str(rng.choice(colours)),
        size=extent,
        centre=(0.0, 0.0),
        half_extent=float(rng.uniform(*HALF_EXTENTS[extent])) * min(size),
        rotation=float(rng.uniform(-_MAX_ROTATION, _MAX_ROTATION)) if turned else 0.0,
        visible=np.zeros(size, np.bool_),
        full_area=0,
    )


def _place(objects: list[SceneObject], new: SceneObject, rng: np.random.Generator) -> list[SceneObject]:
    """The objects with `new` somewhere on top of them, or as they were if there is no room."""
    H, W = new.visible.shape
    margin = _REACH * new.half_extent + 1
    patience = 0 if rng.random() < _OVERLAPPING_SHARE else 3 * _ATTEMPTS // 4
    for attempt in range(_ATTEMPTS):
        centre = (float(rng.uniform(margin, W - margin)), float(rng.uniform(margin, H - margin)))
        candidate = replace(new, centre=centre)
        if all(_far_enough(candidate, other, may_overlap=attempt >= patience) for other in objects):
            covered = _cover(objects, candidate)
            if all(item.visible_area >= MIN_VISIBLE * item.full_area for item in covered):
                return covered
    return objects


def _far_enough(new: SceneObject, other: SceneObject, may_overlap: bool) -> bool:
    distance = np.hypot(new.centre[0] - other.centre[0], new.centre[1] - other.centre[1])
    if may_overlap:
        return bool(distance >= _MIN_DISTANCE * max(new.half_extent, other.half_extent))
    return bool(distance >= _FREE_DISTANCE * (new.half_extent + other.half_extent))


def _cover(objects: list[SceneObject], new: SceneObject) -> list[SceneObject]:
    """The objects with `new` on top, which takes its pixels from theirs."""
    window, distance_px = _signed_distance(new, new.visible.shape)
    mask = np.zeros(new.visible.shape, np.bool_)
    mask[window] = distance_px < 0
    uncovered = [replace(other, visible=other.visible & ~mask) for other in objects]
    return [*uncovered, replace(new, visible=mask, full_area=int(np.count_nonzero(mask)))]


def _signed_distance(item: SceneObject, size: Sequence[int]) -> tuple[tuple[slice, slice], Floats]:
    """The window of the image that holds the object, and each pixel's distance to the outline, negative inside."""
    window, x, y = _window(item, size)
    radius = item.half_extent
    if item.shape == "circle":
        return window, np.hypot(x, y) - radius
    return window, _distance_to_polygon(_corners(item.shape) * radius, x, y)


def _window(item: SceneObject, size: Sequence[int]) -> tuple[tuple[slice, slice], Floats, Floats]:
    """The image's window around an object, and its pixels' (h, w) coordinates from the centre, turned with it."""
    (cx, cy), reach = item.centre, _REACH * item.half_extent + 2
    x0, x1 = max(int(cx - reach), 0), min(int(cx + reach) + 1, size[1])
    y0, y1 = max(int(cy - reach), 0), min(int(cy + reach) + 1, size[0])
    x = np.arange(x0, x1, dtype=np.float32)[None, :] + np.float32(0.5 - cx)
    y = np.arange(y0, y1, dtype=np.float32)[:, None] + np.float32(0.5 - cy)
    cosine, sine = np.float32(np.cos(item.rotation)), np.float32(np.sin(item.rotation))
    return (slice(y0, y1), slice(x0, x1)), x * cosine + y * sine, y * cosine - x * sine


def _corners(shape: str) -> Floats:
    """The corners (K, 2) of a shape of half-extent 1, as x, y with y downwards."""
    if shape == "square":
        points = [(-0.88, -0.88), (0.88, -0.88), (0.88, 0.88), (-0.88, 0.88)]
    elif shape == "triangle":
        points = [(0.0, -1.06), (1.06, 0.8), (-1.06, 0.8)]
    elif shape == "cross":
        a, b = 0.42, 1.05
        quarter = [(a, -b), (a, -a), (b, -a)]
        points = [(x * c - y * s, x * s + y * c) for c, s in ((1, 0), (0, 1), (-1, 0), (0, -1)) for x, y in quarter]
    else:
        raise AssertionError(f"{shape} has no corners")
    return np.array(points, np.float32)


def _distance_to_polygon(corners: Floats, x: Floats, y: Floats) -> Floats:
    """Signed distance to a simple polygon: nearest edge, and parity of the edges a ray to the right crosses."""
    nearest = np.full(x.shape, np.inf, np.float32)
    inside = np.zeros(x.shape, np.bool_)
    for (ax, ay), (bx, by) in zip(corners, np.roll(corners, -1, axis=0), strict=True):
        ex, ey, wx, wy = bx - ax, by - ay, x - ax, y - ay
        along = np.clip((wx * ex + wy * ey) / (ex * ex + ey * ey), 0, 1)
        nearest = np.minimum(nearest, (wx - ex * along) ** 2 + (wy - ey * along) ** 2)
        inside ^= ((ay > y) != (by > y)) & ((wx * ey < ex * wy) == (ey > 0))
    distance: Floats = np.sqrt(nearest) * np.where(inside, np.float32(-1), np.float32(1))
    return distance


def _draw_object(canvas: Floats, item: SceneObject, rng: np.random.Generator) -> None:
    """Lay an object over the (H, W, 3) canvas, with a dark rim and soft edges."""
    window, distance_px = _signed_distance(item, canvas.shape)
    _, x, y = _window(item, canvas.shape)
    colour = np.clip(np.array(COLOURS[item.colour]) + rng.normal(0, 4, size=3), 0, 255).astype(np.float32)
    light = np.float32(1) - 0.1 * (x + y) / (2 * item.half_extent)  # a little lighter towards the upper left
    shade = light * (1 - 0.62 * _texture(item, x, y, rng))
    rim = np.clip(distance_px + _RIM_PX + 0.5, 0, 1)
    shade *= 1 - 0.6 * rim
    alpha = np.clip(0.5 - distance_px, 0, 1)[:, :, None]
    canvas[window] += alpha * (colour * shade[:, :, None] - canvas[window])


def _texture(item: SceneObject, x: Floats, y: Floats, rng: np.random.Generator) -> Any:
    """How dark the texture is at each pixel, 0 to 1, with edges about one pixel soft."""
    period_px = max(6.0, 0.44 * item.half_extent)
    wave = 2 * np.pi / period_px
    if item.texture == "striped":
        angle = rng.uniform(0, np.pi)
        field = np.sin(wave * (x * np.cos(angle) + y * np.sin(angle))) / wave
    elif item.texture == "dotted":
        offset_x, offset_y = (np.mod(axis, period_px) - period_px / 2 for axis in (x, y))
        field = 0.32 * period_px - np.hypot(offset_x, offset_y)
    else:
        return np.float32(0)
    return np.clip(0.5 + field, 0, 1)


def _draw_ground(rng: np.random.Generator, size: tuple[int, int]) -> Floats:
    """A muted (H, W, 3) background: two tones mixed by a gradient, a cloud, stripes or blobs, with a fine grain."""
    H, W = size
    dark, light = _muted_tone(rng, 0.26, 0.42), _muted_tone(rng, 0.44, 0.6)
    y, x = np.mgrid[0:H, 0:W].astype(np.float32) / np.float32(max(size))
    kind = rng.integers(4)
    angle = rng.uniform(0, 2 * np.pi)
    ramp = x * np.cos(angle) + y * np.sin(angle)
    if kind == 0:
        mix = (ramp - ramp.min()) / (ramp.max() - ramp.min())
    elif kind == 1:
        mix = 0.6 * _cloud(rng, size, 5) + 0.4 * _cloud(rng, size, 17)
    elif kind == 2:
        mix = 0.5 + 0.3 * np.sin(ramp * 2 * np.pi * rng.uniform(4, 9)) + 0.2 * (_cloud(rng, size, 4) - 0.5)
    else:
        mix = 1 / (1 + np.exp(-14 * (_cloud(rng, size, 6) - 0.5)))
    grain = rng.normal(0, rng.uniform(1.5, 5), size=size).astype(np.float32)
    ground: Floats = dark + (light - dark) * mix[:, :, None].astype(np.float32) + grain[:, :, None]
    return ground


def _muted_tone(rng: np.random.Generator, low: float, high: float) -> Floats:
    tone = colorsys.hsv_to_rgb(rng.random(), rng.uniform(0.05, 0.26), rng.uniform(low, high))
    return np.array(tone, np.float32) * 255


def _cloud(rng: np.random.Generator, size: tuple[int, int], cells: int) -> Floats:
    """Smooth noise (H, W) from 0 to 1 with about `cells` bumps a side."""
    coarse = Image.fromarray(rng.random((cells, cells), dtype=np.float32))
    cloud: Floats = np.asarray(coarse.resize((size[1], size[0]), Image.Resampling.BICUBIC))
    return np.clip(cloud, 0, 1)
