"""Windows of an image and how they are stitched: a method that is always right stands for a model,
so whatever is wrong is wrong about the stitching.
"""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from config import CUSTOM, MINI
from data import Sample, weak_view
from engine import begin
from engine.evaluation import predict_image
from engine.idle import idle
from engine.parser import parser
from engine.stored import Stored
from engine.windows import Grid, Stitcher, in_windows, predict_in_windows, shown_size
from inference import Prediction
from readers.ground_truth import DataSet, Taxonomy, Truth
from readers.scale import object_width, scale_text, widths

SIDE = 64  # of a window
WINDOWS = replace(MINI, window=SIDE, seen_width=10.0, object_width=10.0, eval_batch=5)
DISC, BAR, SKY, GROUND = range(4)
TAXONOMY = Taxonomy(("disc", "bar", "sky", "ground"), (True, True, False, False), (1, 2, 3, 4))


class Oracle:
    """Says of a window what its pixels say: red and green are the number of a segment, blue its
    class. alter(prediction, window): changes the answer for window number `window`."""

    taxonomy, device = TAXONOMY, torch.device("cpu")

    def __init__(self, cfg=WINDOWS, alter=lambda prediction, window: prediction):
        self.cfg, self.alter, self.calls, self.shapes = cfg, alter, 0, []

    def predict(self, images, sizes, readings, t=None, semantic=True, sums=False):
        assert len(images) <= max(1, self.cfg.eval_batch)
        for k, image in enumerate(images.numpy().astype(np.int64)):
            self.shapes.append(image.shape[1:])
            ids, labels = image[0] + 256 * image[1], image[2]
            numbers, inverse = np.unique(ids, return_inverse=True)
            segment_map = inverse.reshape(ids.shape).astype(np.int32) + 1
            of_segment = np.array([labels[ids == n][0] for n in numbers])
            one_hot = (labels == np.arange(4)[:, None, None]).astype(np.float32)
            answer = Prediction(segment_map, of_segment, np.full(len(numbers), 0.9), sums=one_hot)
            for reading in readings:
                yield k, reading, self.alter(answer, self.calls)
            self.calls += 1


def scene(height, width, seed, discs=40, radius=(2, 14)):
    """An image for the oracle, its segment_map and the classes of its segments."""
    rng, (ys, xs) = np.random.default_rng(seed), np.mgrid[:height, :width]
    ids = np.where(ys < height // 3, 1, 2)
    labels = [0, SKY, GROUND]
    for _ in range(discs):
        y, x, r = rng.integers(height), rng.integers(width), rng.integers(*radius)
        ids[(ys - y) ** 2 + (xs - x) ** 2 <= r * r] = len(labels)
        labels.append(DISC)
    return coded(ids, labels)


def coded(ids, labels):
    classes = np.array(labels)[ids]
    image = np.stack([ids % 256, ids // 256, classes], -1).astype(np.uint8)
    return Image.fromarray(image), ids, np.array(labels)


def require_equal(answer, ids, labels):
    """Every segment of the truth is one of the answer, pixel by pixel, and the reverse."""
    pairs = np.unique(np.stack([ids.ravel(), answer.segment_map.ravel()]), axis=1)
    assert (pairs[1] > 0).all()
    assert len(np.unique(pairs[0])) == len(np.unique(pairs[1])) == pairs.shape[1]
    assert (labels[pairs[0]] == answer.labels[pairs[1] - 1]).all()
    assert len(answer.labels) == len(answer.scores) == pairs.shape[1]


@pytest.mark.parametrize("size", [(200, 200), (65, 64), (64, 131), (97, 300), (40, 90), (129, 33)])
def test_windows_of_a_method_that_is_right_give_the_whole_image(size):
    for seed in range(4):
        image, ids, labels = scene(*size, seed)
        # discs that others cut in two are one object all the same: no window may join or part them
        answer = predict_in_windows(Oracle(), image, ["student/decoder"])["student/decoder"]
        require_equal(answer, ids, labels)
        assert (answer.semantic - 1 == labels[ids]).all()


def test_an_object_that_no_window_shows_whole_is_joined_and_its_neighbours_are_not():
    ids, (ys, xs) = np.full((300, 260), 1), np.mgrid[:300, :260]
    ids[20:40, 5:255] = 2  # a bar, wider than three windows
    ids[40:60, 5:255] = 3  # another one, which touches it
    ids[(ys - 180) ** 2 + (xs - 130) ** 2 <= 90**2] = 4  # a disc, larger than a window both ways
    ids[(ys - 180) ** 2 + (xs - 130) ** 2 <= 8**2] = 5  # a small one in the middle of it
    image, ids, labels = coded(ids, [0, SKY, BAR, BAR, DISC, DISC])
    answer = predict_in_windows(Oracle(), image, ["student/decoder"])["student/decoder"]
    require_equal(answer, ids, labels)


def test_the_surer_of_two_views_draws_the_object_and_it_is_counted_once():
    ids = np.full((64, 128), 1)
    ids[20:40, 36:60] = 2  # whole in the windows at 0 and 32
    image, ids, labels = coded(ids, [0, SKY, DISC])

    def alter(prediction, window):
        """The second window is surer, and draws two columns less."""
        if window != 1:
            return prediction
        segment_map = prediction.segment_map.copy()
        disc = 1 + int(np.flatnonzero(prediction.labels == DISC)[0])
        segment_map[:, :6][segment_map[:, :6] == disc] = 1
        scores = np.where(prediction.labels == DISC, 0.95, prediction.scores)
        return replace(prediction, segment_map=segment_map, scores=scores)

    answer = predict_in_windows(Oracle(alter=alter), image, ["a/b"])["a/b"]
    (disc,) = np.flatnonzero(answer.labels == DISC)
    assert answer.scores[disc] == np.float32(0.95)
    assert (answer.segment_map == disc + 1).sum() == 20 * 22
    # what is left of the other view is no second disc, and no void: its posterior says disc
    assert (answer.labels == DISC).sum() == 1 and (answer.segment_map == 0).sum() == 20 * 2


def test_a_view_that_a_border_cuts_yields_even_where_the_whole_one_saw_nothing():
    ids = np.full((64, 128), 1)
    ids[20:40, 50:75] = 2  # the windows at 0 and 64 cut it, the one at 32 shows it whole
    image, ids, labels = coded(ids, [0, SKY, DISC])

    def blind(prediction, window):
        if window != 1:
            return prediction
        sky = np.ones_like(prediction.segment_map)
        ones = np.zeros_like(prediction.sums)
        ones[SKY] = 5
        return replace(
            prediction,
            segment_map=sky,
            labels=np.array([SKY]),
            scores=np.array([0.9]),
            sums=ones,
        )

    assert len(predict_in_windows(Oracle(), image, ["a/b"])["a/b"].labels) == 2
    answer = predict_in_windows(Oracle(alter=blind), image, ["a/b"])["a/b"]
    assert answer.labels.tolist() == [SKY]


def test_a_whole_object_keeps_its_pixels_beside_surer_parts_of_a_larger_one():
    ids, (ys, xs) = np.full((64, 260), 1), np.mgrid[:64, :260]
    ids[20:40, 5:255] = 2  # a bar, wider than three windows
    ids[(ys - 30) ** 2 + (xs - 100) ** 2 <= 6**2] = 3  # a disc on it
    image, ids, labels = coded(ids, [0, SKY, BAR, DISC])

    def alter(prediction, window):
        """Windows of even numbers take the disc for a piece of the bar; all are sure of bars."""
        bar = prediction.labels == BAR
        segment_map = prediction.segment_map.copy()
        for k in np.flatnonzero(prediction.labels == DISC) + 1:
            if window % 2 == 0 and bar.any():
                segment_map[segment_map == k] = np.flatnonzero(bar)[0] + 1
        scores = np.where(bar, 0.95, prediction.scores)
        return replace(prediction, segment_map=segment_map, scores=scores)

    answer = predict_in_windows(Oracle(alter=alter), image, ["a/b"])["a/b"]
    require_equal(answer, ids, labels)


def test_stuff_is_the_class_with_the_largest_sum_over_windows():
    image, ids, labels = coded(np.full((64, 96), 1), [0, SKY])

    def alter(prediction, window):
        sums = np.zeros_like(prediction.sums)
        sums[SKY], sums[GROUND] = ((0.6, 0.4), (0.3, 0.7))[window]
        return replace(prediction, sums=sums)

    answer = predict_in_windows(Oracle(alter=alter), image, ["a/b"])["a/b"]
    # columns 0 to 31: the first window alone; 32 to 63: 0.9 against 1.1; from 64: the second alone
    assert (answer.semantic[:, :32] == SKY + 1).all()
    assert (answer.semantic[:, 32:] == GROUND + 1).all()
    assert sorted(answer.labels.tolist()) == [SKY, GROUND]
    shares = {k: s for k, s in zip(answer.labels.tolist(), answer.scores.tolist())}
    assert shares[SKY] == pytest.approx(0.6)
    assert shares[GROUND] == pytest.approx((0.55 + 0.7) / 2)


def test_classes_that_a_window_hardly_shows_take_no_memory():
    image, ids, labels = coded(np.full((64, 96), 1), [0, SKY])

    def alter(prediction, window):
        sums = np.full_like(prediction.sums, 1e-4)  # as a softmax leaves them
        sums[SKY], sums[GROUND, 0, 0] = 0.9, 0.2
        return replace(prediction, sums=sums)

    grid = Grid.of(image.size, WINDOWS)
    maps = np.zeros((64, 96), np.int32), np.zeros((64, 96), np.uint16)
    stitcher = Stitcher(grid, np.array(TAXONOMY.things), *maps)
    oracle = Oracle(alter=alter)
    view = torch.zeros(1, 3, 64, 64)
    (_, _, answer), *_ = oracle.predict(view, [], ["a/b"])
    stitcher.add(0, 0, answer)
    assert sorted(stitcher.sums) == [SKY, GROUND]
    assert (predict_in_windows(oracle, image, ["a/b"])["a/b"].semantic == SKY + 1).all()


def test_windows_cover_the_image_overlap_by_half_and_are_shown_at_one_size():
    rng = np.random.default_rng(0)
    for _ in range(200):
        width, height = rng.integers(20, 900, 2).tolist()
        cfg = replace(WINDOWS, seen_width=float(rng.uniform(3, 40)))
        size = width, height
        if not in_windows(size, cfg):
            assert max(shown_size(*size, cfg)) <= SIDE
            continue
        grid = Grid.of(size, cfg)
        for starts, side, length in (
            (grid.tops, grid.height, height),
            (grid.lefts, grid.width, width),
        ):
            assert starts[0] == 0 and starts[-1] + side == length
            steps = np.diff(starts)
            assert (steps <= side // 2 + 1).all() or side == 1
            assert len(starts) == 1 or (steps > 0).all()
        assert max(grid.shown) <= SIDE
        times = np.array(grid.shown) / (grid.height, grid.width)
        assert (
            np.abs(times / cfg.magnification - 1).max() < 0.12 or min(grid.height, grid.width) < 9
        )


def test_an_image_no_larger_than_a_window_is_one_view_and_a_larger_one_is_many():
    image, *_ = scene(64, 64, 0)
    oracle = Oracle()

    class Whole(Oracle):
        def predict(self, images, sizes, readings, t=None, semantic=True, sums=False):
            self.seen = images.shape, sizes, sums
            return iter(())

    whole = Whole(WINDOWS)
    predict_image(whole, image, ["a/b"])
    assert whole.seen == ((1, 3, 64, 64), [((64, 64), (64, 64))], False)
    image, ids, labels = scene(100, 150, 1)
    answer = predict_image(oracle, image, ["a/b"])["a/b"]
    require_equal(answer, ids, labels)
    assert answer.semantic.dtype == np.int64 and (answer.semantic == labels[ids]).all()
    assert set(oracle.shapes) == {(64, 64)}


def test_small_objects_are_shown_larger_in_training_and_in_windows():
    cfg = replace(CUSTOM, seen_width=24.0, object_width=12.0, scale_min=1.0, scale_max=1.0)
    cfg = replace(cfg, turns=False)
    image = Image.new("RGB", (300, 200))
    assert shown_size(300, 200, cfg) == (600, 400)
    view = SimpleNamespace(
        choice=lambda values: values[0], randint=lambda a, b: b, random=lambda: 1
    )
    pixels = np.zeros((200, 300), np.int32)
    pixels[-10:, -10:] = 1  # 10 pixels wide, in the corner that the crop shows
    _, (layer,) = weak_view(Sample(image, [pixels]), cfg, view)
    assert layer.shape == (cfg.crop, cfg.crop) and layer.sum() == 20 * 20
    grid = Grid.of((300, 200), cfg)
    assert grid.shown == (128, 128) and (grid.height, grid.width) == (64, 64)


class Drawn:
    """Labelled images of one size, each with its segments: (label, area, crowd)."""

    def __init__(self, size, *images):
        self.size, self.images = size, images

    def image(self, i):
        return Image.new("RGB", self.size)

    def truth(self, i):
        labels, areas, crowd = map(np.array, zip(*self.images[i]))
        return Truth(np.zeros((1, 1), np.int32), labels, areas, crowd.astype(bool))


def measured(cfg, size, *images):
    dataset = DataSet("drawn", TAXONOMY, Drawn(size, *images), None, range(len(images)), [])
    return object_width(dataset, cfg), dataset


def test_objects_are_as_wide_as_discs_of_their_area_and_the_smaller_ones_count():
    cfg = replace(CUSTOM, seen_width=20.0, object_width=0.0, window=128)
    ten, twenty, forty = (np.pi * r * r for r in (5, 10, 20))
    first = [(DISC, ten, 0), (DISC, forty, 0), (SKY, 9999, 0)]
    second = [(BAR, twenty, 0), (DISC, 1e6, 1), (DISC, twenty, 0)]  # one of them is crowd
    width, dataset = measured(cfg, (900, 700), first, second)
    assert width == 17.5 and np.allclose(sorted(widths(dataset)), [10, 20, 20, 40])
    cfg = replace(cfg, object_width=width, seen_width=35.0)
    assert cfg.magnification == 2 and "are 20 pixels wide" in scale_text(dataset, cfg)
    assert "in windows of 64 pixels (128 as shown)" in scale_text(dataset, cfg)


def test_large_objects_are_shown_as_large_as_lets_the_image_fill_a_window():
    cfg = replace(CUSTOM, seen_width=20.0, object_width=0.0, window=128)
    width, _ = measured(cfg, (640, 480), [(DISC, np.pi * 150**2, 0)])
    assert shown_size(640, 480, replace(cfg, object_width=width)) == (128, 96)
    assert not in_windows((640, 480), replace(cfg, object_width=width))


def test_a_run_says_that_what_it_starts_from_saw_another_scale(capsys):
    cfg = replace(CUSTOM, seen_width=20.0, object_width=10.0, stretch=False)
    for config, said in (
        ({"seen_width": 20.0, "object_width": 10.5}, False),
        ({"seen_width": 20.0, "object_width": 15.0}, True),
        ({"seen_width": 0.0, "object_width": 0.0}, False),
        ({}, False),
    ):
        begin.say_other_sight(Stored(Path("warm"), {"config": config}), cfg)
        told = capsys.readouterr().out
        assert ("warm: saw images 1.33 times" in told and "2.00 times" in told) == said
        assert bool(told) == said


def test_stuff_alone_is_shown_by_the_short_side_of_evaluation():
    cfg = replace(CUSTOM, seen_width=20.0, object_width=0.0, window=128, test_size=256)
    width, dataset = measured(cfg, (640, 512), [(SKY, 100, 0), (GROUND, 100, 0)])
    cfg = replace(cfg, object_width=width)
    assert shown_size(640, 512, cfg) == (320, 256)
    assert "no labelled object is a thing" in scale_text(dataset, cfg)


def test_a_run_shown_by_the_width_of_its_objects_refuses_a_short_side():
    cfg = replace(CUSTOM, object_width=20.0)
    for stage, refused in (("predict", True), ("eval", True), ("export", False), ("sup", False)):
        onnx = ["--format", "onnx"] if stage == "export" else []
        args = parser().parse_args(["--stage", stage, "--test-size", "300", *onnx])
        assert ("test_size" in idle(args, cfg)) == refused
        assert "test_size" not in idle(args, replace(cfg, seen_width=0.0))


def test_an_object_in_two_pieces_is_one_where_a_window_shows_only_one_of_them():
    """A pole lies across a disc: half of it is whole in a window, and no border cuts it."""
    counted = []
    for seed in range(40):
        rng, (ys, xs) = np.random.default_rng(seed), np.mgrid[:64, :256]
        x, y = int(rng.integers(20, 236)), int(rng.integers(14, 50))
        ids = np.ones((64, 256), int)
        ids[(ys - y) ** 2 + (xs - x) ** 2 < 144] = 2
        ids[abs(xs - x) < 4] = 3
        image, ids, labels = coded(ids, [0, SKY, DISC, BAR])

        def alter(prediction, window, rng=rng):
            scores = rng.uniform(0.9, 0.95, len(prediction.labels))
            return replace(prediction, scores=scores.astype(np.float32))

        answer = predict_in_windows(Oracle(alter=alter), image, ["student/decoder"])
        labels = answer["student/decoder"].labels.tolist()
        counted.append((labels.count(DISC), labels.count(BAR)))
    assert {*counted} == {(1, 1)}
