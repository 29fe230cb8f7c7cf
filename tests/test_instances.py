"""Instances: inference, ground truth that overlaps, and mask AP."""

import contextlib
import io
import json
import random
from dataclasses import replace

import numpy as np
import pytest
import torch

import data
from config import MINI
from engine.windows import Grid, Stitcher
from ground.errors import UserError
from inference import Prediction, instance_inference, mask_quality, paint, resize_masks
from instance_eval import ErrorTypes, MaskAP
from mini import scenes
from readers.ground_truth import DataSet, Taxonomy, Truth
from readers.instances import things_only
from readers.runs import from_runs, to_runs

SIZE = 60, 200  # (H, W), pixels
TAXONOMY = Taxonomy(("cell", "nucleus, core", "vessel"), (True,) * 3, (7, 3, 90))


def disc(y: float, x: float, radius: float, size=SIZE) -> np.ndarray:
    ys, xs = np.mgrid[: size[0], : size[1]]
    return (ys - y) ** 2 + (xs - x) ** 2 <= radius**2


def truth_of(masks, labels, crowd=None, areas=None) -> Truth:
    masks = np.array(masks, bool).reshape(-1, *SIZE)
    areas = masks.sum((1, 2)) if areas is None else np.array(areas)
    crowd = np.zeros(len(masks), bool) if crowd is None else np.array(crowd, bool)
    painted = paint(torch.from_numpy(masks)).numpy()
    return Truth(painted, np.array(labels, np.int64), areas, crowd, masks=masks)


def found_of(masks, labels, scores) -> Prediction:
    masks = np.array(masks, bool).reshape(-1, *SIZE)
    painted = paint(torch.from_numpy(masks)).numpy()
    labels, scores = np.array(labels, np.int64), np.array(scores, np.float32)
    return Prediction(painted, labels, scores, masks=masks)


def scene(rng) -> tuple[Prediction, Truth]:
    """Discs of all COCO sizes that overlap, some of crowd, and what somebody has found of them."""
    true, labels, found, classes, scores = [], [], [], [], []
    for _ in range(rng.integers(0, 7)):
        y, x, radius = rng.uniform(0, 60), rng.uniform(0, 200), rng.choice([4, 12, 25, 70])
        true.append(disc(y, x, radius))
        labels.append(rng.integers(2))  # nobody sees a vessel
        for _ in range(rng.integers(0, 3)):
            dy, dx, times = rng.normal(0, radius / 8, 2).tolist() + [rng.uniform(0.8, 1.2)]
            found.append(disc(y + dy, x + dx, radius * times))
            classes.append(labels[-1] if rng.random() < 0.8 else rng.integers(3))
            scores.append(round(rng.random(), 1))  # with ties
    areas = [int(mask.sum() * rng.uniform(0.8, 1.2)) for mask in true]  # as polygons have them
    order = np.argsort(-np.array(scores), kind="stable")
    pick = lambda values: [values[k] for k in order]  # noqa: E731
    truth = truth_of(true, labels, rng.random(len(true)) < 0.2, areas)
    return found_of(pick(found), pick(classes), pick(scores)), truth


def by_files(scenes, folder) -> tuple[np.ndarray, np.ndarray]:
    """What pycocotools' own COCOeval says: its six APs, and its precision, of JSON files."""
    from pycocotools import mask as coco
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    def runs(mask):
        rle = coco.encode(np.asfortranarray(mask, np.uint8))
        return {"size": rle["size"], "counts": rle["counts"].decode()}

    annotations, results = [], []
    for i, (prediction, truth) in enumerate(scenes):
        for k, label in enumerate(truth.labels):
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": i + 1,
                    "category_id": TAXONOMY.ids[label],
                    "segmentation": runs(truth.masks[k]),
                    "area": int(truth.areas[k]),
                    "iscrowd": int(truth.crowd[k]),
                    "bbox": [0, 0, 1, 1],
                }
            )
        for k, label in enumerate(prediction.labels):
            results.append(
                {
                    "image_id": i + 1,
                    "category_id": TAXONOMY.ids[label],
                    "segmentation": runs(prediction.masks[k]),
                    "score": float(prediction.scores[k]),
                }
            )
    images = [{"id": i + 1, "height": SIZE[0], "width": SIZE[1]} for i in range(len(scenes))]
    categories = [{"id": i, "name": n} for i, n in zip(TAXONOMY.ids, TAXONOMY.names)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "true.json").write_text(json.dumps(content))
    (folder / "found.json").write_text(json.dumps(results))
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(folder / "true.json"))
        judge = COCOeval(truth, truth.loadRes(str(folder / "found.json")), "segm")
        judge.evaluate()
        judge.accumulate()
        judge.summarize()
    return judge.stats[:6], judge.eval["precision"][..., 0, -1]


# ------------------------------------------------------------------------------------ run lengths


def test_run_lengths_come_back_as_the_mask_whichever_way_they_are_written():
    rng = np.random.default_rng(0)
    for size in ((1, 1), (5, 3), (64, 48), (300, 200)):
        for density in (0.0, 0.02, 0.5, 1.0):
            mask = rng.random(size) < density
            rle = to_runs(mask)
            assert rle["size"] == [*size] and isinstance(rle["counts"], str)
            assert np.array_equal(from_runs(rle, size), mask)
            flat = mask.T.ravel()
            ends = np.flatnonzero(np.append(flat[1:] != flat[:-1], True)) + 1
            counts = [0] * bool(flat[0]) + np.diff(ends, prepend=0).tolist()
            assert np.array_equal(from_runs({**rle, "counts": counts}, size), mask)


@pytest.mark.parametrize(
    "counts",
    # the last one would be two runs of 2 ** 31 and -(2 ** 31), together one
    [
        "",
        "X",
        "X1",
        "5",
        "~~~~",
        "é",
        "P" * 12 + "1",
        [42.0],
        [43, -1],
        [41],
        [],
        None,
        42,
        "0PPPPPP2PPPPPPN",
    ],
)
def test_damaged_run_lengths_never_get_to_pycocotools(counts, monkeypatch):
    monkeypatch.setattr("readers.runs.coco", None)
    with pytest.raises(ValueError):
        from_runs({"size": [6, 7], "counts": counts}, (6, 7))


def test_run_lengths_of_another_size_are_refused():
    for rle in (
        {"size": [7, 6], "counts": [42]},
        {"counts": [42]},
        [42],
        {"size": 6, "counts": [42]},
    ):
        with pytest.raises(ValueError):
            from_runs(rle, (6, 7))
    assert not from_runs({"size": [6, 7], "counts": [42]}, (6, 7)).any()


# ------------------------------------------------------------------------------------- inference


def test_mask_quality_is_the_mean_of_what_is_above_a_half():
    p = torch.tensor([[[0.9, 0.7], [0.2, 0.5]], [[0.5, 0.5], [0.5, 0.5]], [[0.1, 0.6], [0.0, 0.3]]])
    assert mask_quality(p.logit()).tolist() == pytest.approx([0.8, 0.0, 0.6])
    assert mask_quality(p.logit()[0]).shape == () and mask_quality(p.logit()[None]).shape == (1, 3)


def test_instances_are_the_surest_pairs_of_query_and_class_as_in_mask2former():
    generator = torch.Generator().manual_seed(0)
    posterior = torch.randn(6, 4, generator=generator).mul(2).softmax(-1)
    logits = torch.randn(6, 5, 7, generator=generator) * 4
    sizes = (20, 28), (18, 27), (36, 54)
    masks, labels, scores = instance_inference(posterior, logits, sizes, top=10)
    # Mask2Former's own steps, one at a time.
    flat = posterior[:, :3].flatten()
    best = flat.argsort(descending=True)[:10]
    full = resize_masks(logits, *sizes)
    rows = []
    for pair in best.tolist():
        mask = full[pair // 3] > 0
        quality = (full[pair // 3].sigmoid() * mask).sum() / mask.sum()
        rows.append((float(flat[pair] * quality), pair % 3, mask))
    rows.sort(key=lambda row: -row[0])
    assert scores.tolist() == pytest.approx([row[0] for row in rows], abs=1e-6)
    assert labels.tolist() == [row[1] for row in rows] and len(set(best.tolist())) == 10
    assert torch.equal(masks, torch.stack([row[2] for row in rows]))
    shared = resize_masks(logits, *sizes).sigmoid()
    again = instance_inference(posterior, logits, sizes, 10, shared)
    assert all(torch.equal(a, b) for a, b in zip(again, (masks, labels, scores)))


def test_a_mask_without_a_pixel_is_no_instance_and_no_query_gives_none():
    posterior = torch.tensor([[0.9, 0.1], [0.5, 0.5]])
    logits = torch.stack([torch.full((4, 4), -3.0), torch.full((4, 4), 3.0)])
    sizes = ((16, 16),) * 3
    masks, labels, scores = instance_inference(posterior, logits, sizes)
    assert labels.tolist() == [0] and masks.all()
    assert scores.tolist() == pytest.approx([0.5 * torch.tensor(3.0).sigmoid().item()])
    masks, labels, scores = instance_inference(posterior[:0], logits[:0], sizes)
    assert masks.shape == (0, 16, 16) and len(labels) == len(scores) == 0


def test_the_surest_instance_lies_on_top():
    masks = torch.tensor([[[1, 1, 0, 0]], [[0, 1, 1, 0]]], dtype=torch.bool)
    assert paint(masks).tolist() == [[1, 1, 2, 0]]


def test_what_is_drawn_is_sure_and_not_hidden():
    one, inside, beside, faint = (
        disc(30, x, r) for x, r in ((50, 20), (52, 19), (90, 25), (150, 9))
    )
    found = found_of([one, inside, beside, faint], [0, 1, 2, 0], [0.9, 0.8, 0.7, 0.3])
    sure = found.sure(0.5)
    assert sure.labels.tolist() == [0, 2] and sure.scores.tolist() == pytest.approx([0.9, 0.7])
    assert np.array_equal(sure.segment_map == 1, one)
    assert np.array_equal(sure.segment_map == 2, beside & ~one)  # `inside` is not there
    assert np.array_equal(sure.masks[1], beside)
    assert len(replace(found, masks=None).sure(0.95).labels) == 0


def test_what_a_hidden_one_covers_is_not_hidden():
    """The one that goes is on top of one that stays: its pixels are free."""
    one, beside = disc(30, 50, 20), disc(30, 75, 20)
    both = one | beside  # seen to less than a half beside the first, so not drawn
    found = found_of([one, both & (disc(30, 62, 24)), beside], [0, 1, 2], [0.9, 0.8, 0.7])
    sure = found.sure(0.5)
    assert sure.labels.tolist() == [0, 2]
    assert np.array_equal(sure.segment_map == 2, beside & ~one)


def test_in_windows_a_sure_part_goes_before_a_whole_one_that_nobody_believes():
    things, maps = np.ones(3, bool), (np.zeros((60, 90), np.int32), np.zeros((60, 90), np.uint16))
    stitcher = Stitcher(Grid((0,), (0, 30), 60, 60, (60, 60)), things, *maps, sure=0.5)
    bar = np.zeros((60, 90), bool)
    bar[20:40, 5:85] = True  # in no window whole
    blob = np.zeros((60, 90), bool)
    blob[18:42, 32:58] = True  # whole in both, and nothing
    for left in (0, 30):
        masks = np.stack([bar, blob])[:, :, left : left + 60]
        arrays = np.array([0, 0]), np.array([0.95, 0.01], np.float32)
        found = Prediction(paint(torch.from_numpy(masks)).numpy(), *arrays, masks=masks)
        stitcher.add(0, left, replace(found, sums=np.ones((3, 60, 60), np.float32)))
    stitcher.finish_row(60)
    answer = stitcher.result()
    best = answer.segment_map == 1 + int(answer.scores.argmax())
    assert np.array_equal(best, bar)


def test_windows_stitch_instances_by_their_masks():
    # two that overlap, in one window: by what is seen of it, the lower one would lose its middle
    grid = Grid((0,), (0,), *SIZE, SIZE)
    one, two = disc(30, 80, 20), disc(30, 110, 20)
    found = replace(found_of([one, two], [0, 1], [0.9, 0.4]), sums=np.ones((3, *SIZE), np.float32))
    for least, labels in ((0.0, [0, 1]), (0.5, [0])):
        maps = np.zeros(SIZE, np.int32), np.zeros(SIZE, np.uint16)
        stitcher = Stitcher(grid, np.ones(3, bool), *maps, least)
        stitcher.add(0, 0, found)
        assert [instance.label for instance in stitcher.waiting] == labels
        assert [instance.area for instance in stitcher.waiting] == [one.sum(), two.sum()][
            : len(labels)
        ]
        stitcher.finish_row(SIZE[0])
        answer = stitcher.result()
        assert np.array_equal(answer.segment_map == 1, one) and answer.labels.tolist() == labels


# ------------------------------------------------------------------------------------ ground truth


def test_stuff_becomes_void_and_things_keep_their_names():
    whole = scenes.load_mini("4")
    dataset = things_only(whole)
    things = [n for n, t in zip(whole.taxonomy.short_names, whole.taxonomy.things) if t]
    assert dataset.taxonomy.short_names == things and all(dataset.taxonomy.things)
    for i in range(3):
        before, after = whole.train.truth(i), dataset.train.truth(i)
        names = np.append("", [whole.taxonomy.short_names[k] for k in before.labels])
        mine = np.append("", [dataset.taxonomy.short_names[k] for k in after.labels])
        kept = np.where(np.isin(names, things), names, "")
        assert np.array_equal(kept[before.segment_map], mine[after.segment_map])
        assert after.segment_map.max() == len(after.labels) == len(after.areas)
    order = list(range(len(things)))[::-1]
    dataset.follow(dataset.taxonomy.select(np.array(order)), "a run")
    assert dataset.taxonomy.short_names == things[::-1]
    back = dataset.train.truth(0)
    first = things_only(whole).train.truth(0)
    assert (back.labels == len(things) - 1 - first.labels).all()


def test_a_data_set_without_things_has_no_instances():
    stuff = Taxonomy(("sky", "sea"), (False, False), (1, 2))
    with pytest.raises(UserError, match="has no class that is a thing"):
        things_only(DataSet("coast", stuff, None, None, [], []))


def test_masks_that_overlap_move_along_with_their_image():
    size = 50, 70
    masks = np.stack([disc(20, 30, 14, size), disc(25, 40, 14, size), disc(48, 2, 3, size)])
    shown = (masks * np.array([90, 160, 255])[:, None, None]).max(0).astype(np.uint8)
    picture = data.Image.fromarray(np.stack([shown] * 3, -1))
    truth = Truth(shown, np.array([2, 0, 1]), masks.sum((1, 2)), np.zeros(3, bool), masks=masks)
    cfg = replace(MINI, labels="instances", crop=64, turns=True)
    for seed in range(4):
        image, target = data.labeled_view(picture, truth, cfg, random.Random(seed))
        plain, (x, y, z) = data.weak_view(
            data.Sample(picture, list(masks)), cfg, random.Random(seed), colour=True
        )
        assert torch.equal(image, data.pad_image(plain, (64, 64)))
        kept = [k for k, layer in zip((2, 0, 1), (x, y, z)) if layer.any()]
        assert target.labels.tolist() == kept and target.masks.shape == (len(kept), 64, 64)
        assert np.array_equal(target.masks[0, : x.shape[0], : x.shape[1]].numpy(), x)
        assert (target.masks[0] & target.masks[1]).any()


def test_crowd_is_no_target():
    masks = np.ones((2, 40, 40), bool)
    truth = Truth(masks[0] * 1, np.array([1, 0]), np.ones(2), np.array([True, False]), masks=masks)
    picture = data.Image.new("RGB", (40, 40))
    _, target = data.labeled_view(picture, truth, MINI, random.Random(0))
    assert target.labels.tolist() == [0] and len(target.masks) == 1


# --------------------------------------------------------------------------------------- mask AP


def test_ap_is_that_of_pycocotools_on_the_same_files(tmp_path):
    rng = np.random.default_rng(1)
    found = [scene(rng) for _ in range(30)]
    score = MaskAP(TAXONOMY)
    for pair in found:
        score.add(*pair)
    result = score.result()
    stats, precision = by_files(found, tmp_path)
    mine = [result[name] for name in ("ap", "ap50", "ap75", "aps", "apm", "apl")]
    assert mine == pytest.approx(stats.tolist(), abs=1e-6) and 0.05 < mine[0] < 0.95
    # its categories are sorted by id: nucleus, cell, vessel
    cell, nucleus = result["per_class"]["cell"], result["per_class"]["nucleus"]
    assert cell["ap"] == pytest.approx(precision[:, :, 1].mean(), abs=1e-6)
    assert nucleus["ap75"] == pytest.approx(precision[5, :, 0].mean(), abs=1e-6)
    assert result["per_class"]["vessel"]["ap"] is None  # there is none


def test_ap_by_hand():
    # Two true discs. The surer answer is one of them, the next one is wrong, the last one is the
    # other disc: precision is 1 up to a recall of 1/2 (51 of the 101 recalls), then 2/3.
    one, two, wrong = disc(30, 30, 20), disc(30, 150, 20), disc(30, 90, 20)
    score = MaskAP(TAXONOMY)
    score.add(found_of([one, wrong, two], [0, 0, 0], [0.9, 0.5, 0.1]), truth_of([one, two], [0, 0]))
    result = score.result()
    hand = pytest.approx((51 + 50 * 2 / 3) / 101)
    assert result["ap"] == hand and result["ap50"] == hand
    assert result["apm"] == pytest.approx(result["ap"]) and result["apl"] is None
    assert result["instances"] == 2 and result["per_class"]["cell"]["instances"] == 2


def test_a_crowd_swallows_what_lies_in_it_and_is_not_to_be_found():
    crowd, one = np.zeros(SIZE, bool), disc(30, 30, 20)
    crowd[:, 100:] = True
    inside = [disc(30, x, 10) for x in (120, 150, 180)]
    found = found_of([*inside, one], [0] * 4, [0.9, 0.8, 0.7, 0.6])
    score = MaskAP(TAXONOMY)
    score.add(found, truth_of([crowd, one], [0, 0], [True, False]))
    assert score.result()["ap"] == pytest.approx(1) and score.result()["instances"] == 1


def test_nothing_to_find_is_no_figure():
    assert {MaskAP(TAXONOMY).result()[name] for name in ("ap", "ap50", "aps")} == {None}
    score = MaskAP(TAXONOMY)
    score.add(found_of([disc(30, 30, 9)], [0], [0.9]), truth_of([], []))
    assert score.result()["ap"] is None and score.result()["per_class"]["cell"]["ap"] is None
    score.add(found_of([], [], []), truth_of([disc(30, 30, 20)], [1]))
    assert score.result()["ap"] == 0 and score.result()["per_class"]["cell"]["ap"] is None


def test_processes_that_take_images_in_turn_have_the_ap_of_one():
    rng = np.random.default_rng(2)
    found = [scene(rng) for _ in range(9)]
    whole, parts = MaskAP(TAXONOMY), [MaskAP(TAXONOMY), MaskAP(TAXONOMY)]
    for rank, part in enumerate(parts):
        part.rank = rank
    for i, pair in enumerate(found):
        whole.add(*pair)
        parts[i % 2].add(*pair)
    for part, other in (parts, parts[::-1]):
        both = MaskAP(TAXONOMY)
        both.merge(part)
        both.merge(other)
        assert both.result() == whole.result()


def test_segments_that_do_not_overlap_are_masks_too():
    one, two = disc(30, 30, 20), disc(30, 100, 12)
    masks, flat = truth_of([one, two], [0, 1]), truth_of([one, two], [0, 1])
    flat.masks = None
    found = found_of([one, two], [0, 1], [0.9, 0.8])
    for truth in (masks, flat):
        for prediction in (found, replace(found, masks=None)):
            score = MaskAP(TAXONOMY)
            score.add(prediction, truth)
            assert score.result()["ap"] == pytest.approx(1)


def test_a_prediction_of_another_size_is_refused():
    other = Prediction(np.zeros((3, 4), np.int32), np.zeros(0, np.int64), np.zeros(0, np.float32))
    with pytest.raises(ValueError, match=r"expected one size, got \(3, 4\) and \(60, 200\)"):
        MaskAP(TAXONOMY).add(other, truth_of([], []))


# ---------------------------------------------------------------------------------- kinds of errors


def types_of(taxonomy, *pairs) -> dict:
    score = ErrorTypes(taxonomy)
    for found, truth in pairs:
        score.add(found, truth)
    return score.result()["types"]


def test_every_instance_has_the_first_type_that_holds():
    """Figure 5 of PL-DC, an instance at a time: IoUs are those of boxes, counted by hand."""
    grouped = replace(TAXONOMY, groups=("small", "small", "large"))

    def box(left, right):
        mask = np.zeros(SIZE, bool)
        mask[:, left:right] = True
        return mask

    truth = truth_of([box(0, 40), box(100, 140)], [0, 2])
    cases = {
        "correct": (box(0, 39), 0),  # IoU 39/40
        "similar": (box(0, 39), 1),
        "other": (box(0, 39), 2),  # covers the cell, of another group; touches no vessel
        "localisation": (box(20, 60), 0),  # IoU 20/60, and
        "background": (box(50, 90), 0),
    }
    for kind, (mask, label) in cases.items():
        types = types_of(grouped, (found_of([mask], [label], [0.5]), truth))
        assert types == {**dict.fromkeys(cases, 0.0), kind: 1.0, "n": 1}, kind
    # exactly half is not above it; a neighbour of another class alone is none of the paper's types
    assert types_of(grouped, (found_of([box(0, 20)], [0], [0.9]), truth))["localisation"] == 1
    assert types_of(grouped, (found_of([box(20, 60)], [1], [0.9]), truth))["background"] == 1
    # two of the same are both right; one below the least score is not looked at
    mixed = found_of([box(0, 40)] * 2 + [box(50, 90)] * 2, [0, 0, 0, 0], [0.9, 0.8, 0.6, 0.49])
    types = types_of(grouped, (mixed, truth))
    assert (types["correct"], types["background"], types["n"]) == (2 / 3, 1 / 3, 3)
    # no groups: nobody says what is similar
    types = types_of(TAXONOMY, (found_of([box(0, 39)], [1], [0.9]), truth))
    assert types["similar"] is None and types["other"] == 1


def test_a_crowd_hides_what_lies_in_it_and_nothing_is_no_figure():
    left, right = disc(30, 40, 20), disc(30, 140, 20)
    truth = truth_of([left, right], [0, 0], crowd=[True, False])
    inside = found_of([disc(30, 40, 10), right], [0, 0], [0.9, 0.8])
    assert types_of(TAXONOMY, (inside, truth))["n"] == 1  # the right one, correct
    empty = types_of(TAXONOMY, (found_of([], [], []), truth_of([], [])))
    assert empty["n"] == 0
    assert types_of(TAXONOMY, (found_of([left], [0], [0.9]), truth_of([], [])))["background"] == 1
    one, two = ErrorTypes(TAXONOMY), ErrorTypes(TAXONOMY)
    one.add(inside, truth)
    two.add(found_of([left], [0], [0.9]), truth_of([], []))
    one.merge(two)
    assert one.result()["types"] == {
        **{"correct": 0.5, "localisation": 0.0, "similar": None, "other": 0.0, "background": 0.5},
        "n": 2,
    }
