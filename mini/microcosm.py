"""The miniature world: procedural panoptic images, their captions and their parts.

A scene is a few stuff regions with things on top. It stands in for photographs, so that all three
stages of the method run on a laptop without a download. What a real pipeline would not have,
nothing here gives away: the labelled and unlabelled images, `dev` and `val`, and the images that
the mini CLIP and the mini SAM learn from all come from disjoint seeds.

Two properties are there on purpose, because the method lives on them:
* classes are long-tailed, so a labelled list of 16 images shows some classes once or never (what
  CLIP is for);
* things have shaded parts and stuff has stains outside the taxonomy, so "a segment" has several
  honest answers (what the paper calls granularity mismatch, section 3.3).

Axes: S image side in pixels, N segments.
Try: `python -c "from mini import microcosm; from PIL import Image;
Image.fromarray(microcosm.scene('val', 0).image).resize((512, 512)).save('scene.png')"`
"""

from dataclasses import dataclass

import numpy as np

SIZE = 128  # pixels, side of the square images of the data set `mini`
MIN_VISIBLE = 60  # pixels of a SIZE image; a thing that shows less is left out of the scene
RADIUS = (11.0, 24.0)  # pixels, half the extent of a thing

# Class names with synonyms, most frequent first. A thing is told by shape, pattern and two colours
# together: any one of them may be shared, so a hue shift or a loss of colour (the strong
# augmentation) does not turn one class into another.
APPEARANCE = {
    "tomato": ("disc", "plain", (205, 45, 40), (205, 45, 40)),
    "beach ball, striped ball": ("disc", "sectors", (235, 235, 230), (45, 95, 200)),
    "gold star": ("star", "plain", (240, 200, 50), (240, 200, 50)),
    "lifebuoy, life ring": ("ring", "sectors", (240, 240, 235), (215, 60, 40)),
    "die, dice": ("box", "dots", (240, 240, 235), (25, 25, 30)),
    "kite": ("triangle", "checks", (70, 175, 80), (240, 225, 90)),
    "cookie, biscuit": ("disc", "dots", (200, 150, 90), (70, 40, 25)),
    "gift, present": ("box", "ribbon", (200, 50, 150), (250, 215, 70)),
    "starfish, sea star": ("star", "dots", (225, 110, 60), (250, 215, 180)),
    "tire, wheel": ("ring", "plain", (45, 45, 50), (45, 45, 50)),
    "medical cross, green cross": ("cross", "plain", (30, 150, 90), (30, 150, 90)),
    "warning sign, danger sign": ("triangle", "rim", (245, 200, 40), (35, 30, 30)),
}
THINGS = tuple(APPEARANCE)
STUFF = tuple(
    "grass, lawn|water, sea|brick, brick wall|sand, beach|sky|"
    "wood, planks|tiles, tiled floor|snow".split("|")
)
CLASSES = THINGS + STUFF  # contiguous index: things first
FRAMES = "a photo of a {}.|There is a {} in the scene.|a {}|This is a photo of a {}.|{}"
THING_TAIL, STUFF_TAIL = 0.9, 0.5  # class frequency ~ rank ** -tail

# First seed of each collection; index i of a collection is drawn from SeedSequence((first, i)).
SEEDS = {"train": 1, "dev": 2, "val": 3, "clip": 10, "clip-test": 11, "sam": 20, "sam-test": 21}


@dataclass
class Scene:
    """One image with everything that is true of it.

    image: (S, S, 3) uint8 RGB.   segment_map: (S, S) int32, every pixel k >= 1 = k-th segment (no
        void).
    labels: (N,) int64, index into CLASSES.   part_map: (S, S) int32, 0 or k = k-th part, a part
        lies inside one segment.
    """

    image: np.ndarray
    segment_map: np.ndarray
    labels: np.ndarray
    part_map: np.ndarray


def scene(
    collection: str,
    index: int,
    size: int = SIZE,
    things: tuple[int, int] = (3, 6),
    stuff: tuple[int, int] = (1, 3),
    tail: bool = True,
) -> Scene:
    """Draw scene `index` of a collection (a key of SEEDS); equal arguments give equal pixels.

    Args:
        size: S, pixels; things keep their size in pixels, so a smaller image is a crop of the
            world, not a thumbnail.
        things, stuff: least and most number of things and of stuff regions.
        tail: long-tailed class frequencies; False draws all classes alike.
    """
    rng = np.random.default_rng(np.random.SeedSequence((SEEDS[collection], index)))
    yy, xx = np.mgrid[0:size, 0:size].astype(np.float32)
    regions = int(rng.integers(stuff[0], stuff[1] + 1))
    image, stuff_labels, region = _stuff(rng, xx, yy, regions, tail)
    owner = region + 1  # ids before renumbering: stuff first, then things
    ids = list(len(THINGS) + stuff_labels)
    part_map, parts = np.zeros((size, size), np.int32), 0
    for _ in range(int(rng.integers(0, 3))):  # stains: not in the taxonomy, part of the stuff below
        inside = _blob(rng, xx, yy) < 0
        tint = rng.uniform(0.55, 1.35, 3).astype(np.float32)
        image[inside] *= tint
        parts += 1
        if inside.any():  # a part lies inside one segment
            part_map[inside & (owner == owner[inside].min())] = parts
    weights = _tail(len(THINGS), THING_TAIL if tail else 0.0)
    for _ in range(int(rng.integers(things[0], things[1] + 1))):
        label = int(rng.choice(len(THINGS), p=weights))
        window, cover, colour, part = _thing(rng, xx, yy, label)
        mixed = image[window] * (1 - cover[..., None]) + colour * cover[..., None]
        image = image.astype(mixed.dtype, copy=False)
        image[window] = mixed
        inside = cover > 0.5
        ids.append(label)
        owner[window][inside] = len(ids)
        part_map[window][inside] = 0
        if part is not None:
            parts += 1
            part_map[window][inside & part] = parts
    # light and white balance
    image *= rng.uniform(0.8, 1.15) * rng.uniform(0.93, 1.07, 3).astype(np.float32)
    image += rng.normal(0, rng.uniform(2, 7), image.shape).astype(np.float32)  # sensor noise
    owner = _drop_slivers(owner, ids, len(stuff_labels))
    visible, segment_map = np.unique(owner, return_inverse=True)
    segment_map = segment_map.reshape(owner.shape).astype(np.int32) + 1
    areas = np.bincount(part_map.ravel(), minlength=parts + 1)
    part_map[areas[part_map] < MIN_VISIBLE // 3] = 0
    labels = np.array([ids[k - 1] for k in visible], np.int64)
    return Scene(image.clip(0, 255).astype(np.uint8), segment_map, labels, part_map)


def caption(
    labels: np.ndarray, rng: np.random.Generator, drop_thing: float = 0.15, drop_stuff: float = 0.5
) -> tuple[frozenset, str]:
    """What somebody might write under a picture: some of its classes, by any synonym, in any order.

    Args: labels (N,) of its segments;  drop_*: chances of a class not to be named.
    Returns: the classes that are named, and the caption.
    """
    drop = [drop_thing] * len(THINGS) + [drop_stuff] * len(STUFF)
    named = [label for label in dict.fromkeys(labels.tolist()) if rng.random() > drop[label]]
    named = named or [int(rng.choice(labels))]
    names = [str(rng.choice(CLASSES[label].split(", "))) for label in rng.permutation(named)]
    return frozenset(named), str(rng.choice(FRAMES.split("|"))).format(" and a ".join(names))


def _tail(n: int, exponent: float) -> np.ndarray:
    weights = np.arange(1, n + 1, dtype=np.float64) ** -exponent
    return weights / weights.sum()


def _noise(rng, size: int, cells: int, aspect: float = 1.0) -> np.ndarray:
    """(S, S) smooth noise, roughly in -1 to 1: a coarse random grid, interpolated."""
    gx, gy = max(2, int(cells)), max(2, int(cells * aspect))
    grid = rng.uniform(-1, 1, (gy + 1, gx + 1)).astype(np.float32)
    ys, xs = np.linspace(0, gy - 1e-3, size), np.linspace(0, gx - 1e-3, size)
    y0, x0 = ys.astype(int), xs.astype(int)
    fy, fx = (ys - y0).astype(np.float32)[:, None], (xs - x0).astype(np.float32)[None]
    top = grid[y0][:, x0] * (1 - fx) + grid[y0][:, x0 + 1] * fx
    bottom = grid[y0 + 1][:, x0] * (1 - fx) + grid[y0 + 1][:, x0 + 1] * fx
    return top * (1 - fy) + bottom * fy


def _stuff(rng, xx, yy, regions: int, tail: bool):
    """Image (S, S, 3) float32 of textures, labels of the regions, region index (S, S)."""
    size = xx.shape[0]
    weights = _tail(len(STUFF), STUFF_TAIL if tail else 0.0)
    labels = rng.choice(len(STUFF), regions, replace=False, p=weights)
    scores = [
        rng.normal() * (xx - size / 2) / size * 2
        + rng.normal() * (yy - size / 2) / size * 2
        + 0.35 * _noise(rng, size, 4)
        + rng.normal(0, 0.2)
        for _ in range(regions)
    ]
    region = np.argmax(scores, 0)
    image = np.zeros((size, size, 3), np.float32)
    for k, label in enumerate(labels):
        where = region == k
        image[where] = _texture(rng, xx, yy, int(label))[where]
    used = np.unique(region)
    return image, labels[used], np.searchsorted(used, region)


def _texture(rng, xx, yy, label: int) -> np.ndarray:
    """(S, S, 3) float32 in 0 to 255."""
    size = xx.shape[0]
    name = STUFF[label].split(",")[0]
    phase = rng.uniform(0, 6.28)
    fine = rng.normal(0, 1, xx.shape).astype(np.float32)
    coarse = _noise(rng, size, 5)

    def rgb(*colour):
        return np.array(colour, np.float32) * rng.uniform(0.9, 1.1, 3).astype(np.float32)

    if name == "grass":
        blades = _noise(rng, size, size / 2, 0.25)
        return rgb(70, 135, 55) * (1 + 0.3 * blades + 0.15 * coarse)[..., None]
    if name == "water":
        waves = np.sin(yy * rng.uniform(0.55, 0.8) + 2.5 * _noise(rng, size, 6) + phase)
        return rgb(35, 85, 140) * (1 + 0.22 * waves + 0.1 * coarse)[..., None]
    if name == "brick":
        height, width = rng.uniform(7, 9), rng.uniform(14, 18)
        row = np.floor(yy / height + phase)
        mortar = ((yy / height + phase) % 1 < 0.17) | (
            (xx / width + 0.5 * (row % 2) + phase) % 1 < 0.09
        )
        grout, bricks = rgb(180, 170, 160), rgb(150, 75, 55)
        return np.where(
            mortar[..., None], grout, bricks * (1 + 0.12 * coarse + 0.05 * fine)[..., None]
        )
    if name == "sand":
        return rgb(215, 190, 135) * (1 + 0.09 * fine + 0.08 * coarse)[..., None]
    if name == "sky":
        cloud = np.clip(_noise(rng, size, 3) + _noise(rng, size, 6) * 0.5, 0, 1)[..., None]
        return rgb(135, 190, 235) * (1 - cloud) + 245 * cloud
    if name == "wood":
        grain = np.sin(xx * rng.uniform(0.5, 0.8) + 3 * _noise(rng, size, 4, 0.4) + phase)
        board = (xx / rng.uniform(20, 26) + phase) % 1 < 0.07
        shade = np.where(board, 0.55, 1 + 0.13 * grain + 0.08 * coarse)
        return rgb(160, 110, 60) * shade[..., None]
    if name == "tiles":
        side = rng.uniform(9, 12)
        check = (np.floor(xx / side + phase) + np.floor(yy / side + phase)) % 2
        colour = np.where(check[..., None] > 0, rgb(205, 205, 200), rgb(95, 100, 105))
        return colour * (1 + 0.05 * coarse)[..., None]
    return rgb(238, 243, 250) * (1 + 0.05 * coarse + 0.015 * fine)[..., None]  # snow


def _thing(rng, xx, yy, label: int):
    """One thing: the window that it lies in, its cover, its colour, the mask of its part or None.

    cover: (h, w) in 0 to 1, antialiased.   colour: (h, w, 3).
    """
    size, radius = xx.shape[0], rng.uniform(*RADIUS)
    cx, cy = rng.uniform(0.06 * size, 0.94 * size, 2)
    angle = rng.uniform(0, 2 * np.pi)
    reach = 1.2 * radius  # no outline is farther from the centre
    window = tuple(slice(max(0, int(c - reach - 2)), int(c + reach + 3)) for c in (cy, cx))
    xx, yy = xx[window], yy[window]
    u = ((xx - cx) * np.cos(angle) + (yy - cy) * np.sin(angle)) / radius
    v = (-(xx - cx) * np.sin(angle) + (yy - cy) * np.cos(angle)) / radius
    shape, pattern, first, second = APPEARANCE[THINGS[label]]
    distance = _outline(u, v, shape)
    cover = np.clip(0.5 - distance * radius, 0, 1)
    mix = _pattern(u, v, pattern, distance, radius)[..., None]  # 0 first colour, 1 second
    first, second = (
        np.array(c, np.float32) + rng.normal(0, 12, 3).astype(np.float32) for c in (first, second)
    )
    colour = first * (1 - mix) + second * mix
    # lit from the upper left
    colour *= (1 - 0.22 * ((xx - cx) + (yy - cy)) / (2 * radius))[..., None]
    part = None
    if rng.random() < 0.65:  # darker or lighter, same class
        if rng.random() < 0.5:  # a cap
            part = v > rng.uniform(0.05, 0.45)
        else:  # a hub
            part = u * u + v * v < rng.uniform(0.35, 0.55) ** 2
        colour[part] *= rng.uniform(0.4, 0.6) if rng.random() < 0.6 else rng.uniform(1.3, 1.6)
        if not (part & (cover > 0.5)).any():
            part = None
    return window, cover.astype(np.float32), colour, part


def _pattern(u, v, pattern: str, distance, radius: float):
    """(S, S) in 0 to 1: how much of the second colour shows; u, v in units of the radius."""
    if pattern == "sectors":
        return (np.floor((np.arctan2(v, u) / (2 * np.pi) + 0.5) * 8) % 2).astype(np.float32)
    if pattern == "dots":
        x, y = (u * 1.7 + 0.5) % 1 - 0.5, (v * 1.7 + 0.5) % 1 - 0.5
        return np.clip((0.24 - np.sqrt(x * x + y * y)) * radius / 1.7 + 0.5, 0, 1)
    if pattern == "ribbon":
        return ((abs(u) < 0.16) | (abs(v) < 0.16)).astype(np.float32)
    if pattern == "checks":
        return ((np.floor(u * 2.2) + np.floor(v * 2.2)) % 2).astype(np.float32)
    if pattern == "rim":
        return (distance > -0.17).astype(np.float32)
    return np.zeros_like(u)


def _outline(u, v, shape: str):
    """Signed distance to the outline of a shape, about, in radii; negative inside."""
    r = np.sqrt(u * u + v * v)
    if shape == "disc":
        return r - 0.95
    if shape == "box":
        return np.maximum(abs(u), abs(v)) - 0.82
    if shape == "star":
        wave = abs((np.arctan2(v, u) * 5 / (2 * np.pi)) % 1 - 0.5) * 2
        return (r - (0.42 + 0.68 * wave)) * 0.6
    if shape == "ring":
        return abs(r - 0.72) - 0.28
    if shape == "cross":
        bars = np.maximum(abs(u) - 1, abs(v) - 0.36), np.maximum(abs(u) - 0.36, abs(v) - 1)
        return np.minimum(*bars)
    return np.maximum(v - 0.6, abs(u) * 0.866 - v * 0.5 - 0.55)  # triangle


def _blob(rng, xx, yy) -> np.ndarray:
    """(S, S): negative inside of a stain somewhere."""
    size = xx.shape[0]
    cx, cy = rng.uniform(0, size, 2)
    r = rng.uniform(8, 20)
    a, b = rng.uniform(0.6, 1.6, 2)
    distance = np.sqrt(((xx - cx) * a) ** 2 + ((yy - cy) * b) ** 2)
    return distance - r * (1 + 0.3 * _noise(rng, size, 6))


def _drop_slivers(owner, ids, num_stuff: int):
    """Give things that show less than MIN_VISIBLE pixels to the segment most around them."""
    areas = np.bincount(owner.ravel(), minlength=len(ids) + 1)
    for k in range(num_stuff + 1, len(ids) + 1):
        if 0 < areas[k] < MIN_VISIBLE:
            mask = owner == k
            rolled = [np.roll(mask, shift, axis) for axis in (0, 1) for shift in (-1, 1)]
            around = owner[np.any(rolled, 0) & ~mask]
            owner[mask] = np.bincount(around).argmax() if len(around) else 1
    return owner
