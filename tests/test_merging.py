"""Panoptic inference by masks (--merging masks): the surest mask takes its pixels first."""

import dataclasses
import json

import pytest
import torch

import inference
from config import CUSTOM, MINI, numbers_of
from engine.sameness import differing
from inference import merge_masks, panoptic_inference, sure_things
from mean_teacher import MeanTeacher
from mini import scenes
from report import run_folder
from tests.helpers import TINY

CFG = dataclasses.replace(MINI, merging="masks", least_quality=0.6)
THINGS = torch.tensor([True, False])  # a thing, stuff


def sizes(height, width):
    return ((height, width),) * 3


def mask(*rows):
    """(1, W) logits of a mask by the probabilities of its pixels."""
    return torch.logit(torch.tensor(rows))[None]


def thing(*rows, chance=0.9):
    return mask(*rows), [chance, 0.0, 1 - chance]


def stuff(*rows, chance=0.9):
    return mask(*rows), [0.0, chance, 1 - chance]


def merged(*queries, cfg=CFG):
    masks, posterior = zip(*queries)
    masks = torch.stack(masks)
    posterior = torch.tensor(posterior)
    return merge_masks(posterior, masks, THINGS, sizes(1, masks.shape[-1]), cfg)


def test_two_queries_of_one_object_are_one_segment_where_pixels_would_lose_it():
    # each wins half of the object: competing for pixels, neither keeps four fifths of its mask
    two = thing(0.9, 0.9, 0.8, 0.8, 0.1), thing(0.7, 0.7, 0.9, 0.9, 0.1)
    masks, posterior = zip(*two)
    lost, labels, _ = panoptic_inference(
        torch.tensor(posterior), torch.stack(masks), THINGS, sizes(1, 5)
    )
    assert len(labels) == 0 and lost.eq(0).all()
    segment_map, labels, scores = merged(*two)
    assert segment_map.tolist() == [[1, 1, 1, 1, 0]] and labels.tolist() == [0]
    assert scores.tolist() == pytest.approx([0.85])  # the quality of the surer mask


def test_the_surer_mask_is_first_whatever_the_order_and_the_class():
    sure, vague = thing(0.9, 0.9, 0.1, 0.1, chance=0.6), thing(0.1, 0.7, 0.7, 0.7, chance=0.99)
    for queries in ((sure, vague), (vague, sure)):
        segment_map, labels, scores = merged(*queries)
        assert segment_map.tolist() == [[1, 1, 2, 2]] and labels.tolist() == [0, 0]
        assert scores.tolist() == pytest.approx([0.9, 0.7])


def test_a_mask_that_keeps_half_of_its_pixels_stays_and_one_that_keeps_less_goes():
    first = thing(0.9, 0.9, 0.9, 0.1, 0.1, 0.1)
    half = thing(0.1, 0.7, 0.7, 0.7, 0.7, 0.1)
    less = thing(0.7, 0.7, 0.7, 0.7, 0.1, 0.1)
    assert merged(first, half)[0].tolist() == [[1, 1, 1, 2, 2, 0]]
    assert merged(first, less)[0].tolist() == [[1, 1, 1, 0, 0, 0]]


@pytest.mark.parametrize("least, count", [(0.0, 2), (0.75, 1), (0.95, 0)])
def test_masks_below_the_least_quality_are_no_things(least, count):
    cfg = dataclasses.replace(CFG, least_quality=least)
    _, labels, _ = merged(thing(0.9, 0.9, 0.1, 0.1), thing(0.1, 0.1, 0.7, 0.7), cfg=cfg)
    assert len(labels) == count


def test_classes_below_the_threshold_and_the_no_object_class_are_no_things():
    cfg = dataclasses.replace(CFG, object_mask_threshold=0.7)
    one, other = thing(0.9, 0.1, chance=0.6), thing(0.1, 0.9, chance=0.8)
    assert merged(one, other, cfg=cfg)[0].tolist() == [[0, 1]]
    assert len(merged(thing(0.9, 0.9, chance=0.4))[1]) == 0


def test_stuff_has_what_is_left_and_its_queries_compete_for_that_alone():
    # stuff covers all, and things take three fifths of it: of what is left it keeps everything
    background = stuff(0.95, 0.95, 0.95, 0.95, 0.95)
    segment_map, labels, scores = merged(background, thing(0.9, 0.9, 0.9, 0.1, 0.1))
    assert segment_map.tolist() == [[1, 1, 1, 2, 2]] and labels.tolist() == [0, 1]
    assert scores.tolist() == pytest.approx([0.9, 0.9])
    # two queries of one class of stuff are one segment; what no mask covers is void
    segment_map, labels, _ = merged(
        stuff(0.9, 0.1, 0.1, 0.1), thing(0.1, 0.9, 0.1, 0.1), stuff(0.1, 0.1, 0.9, 0.1)
    )
    assert segment_map.tolist() == [[2, 1, 2, 0]] and labels.tolist() == [0, 1]
    # stuff below things everywhere is no segment
    assert merged(background, thing(*[0.97] * 5))[1].tolist() == [0]


def test_without_a_sure_query_all_is_void():
    segment_map, labels, scores = merged((mask(0.9, 0.9), [0.1, 0.1, 0.8]))
    assert segment_map.tolist() == [[0, 0]] and len(labels) == len(scores) == 0
    assert segment_map.dtype == torch.int32 and labels.dtype == torch.int64


def test_few_masks_at_once_and_given_masks_say_the_same(monkeypatch):
    g = torch.Generator().manual_seed(0)
    posterior = torch.randn(40, 4, generator=g).mul(2).softmax(-1)
    masks = torch.nn.functional.interpolate(
        torch.randn(1, 40, 6, 6, generator=g) * 4 - 4, size=(24, 24), mode="bilinear"
    )[0]
    things, shown = torch.tensor([True, True, False]), ((96, 96), (90, 80), (45, 40))
    together = merge_masks(posterior, masks, things, shown, CFG)
    assert (together[1] < 2).sum() > 3 and (together[1] == 2).sum() == 1
    numbers = together[0].unique().tolist()
    assert numbers[-1] == len(together[1]) and set(numbers) >= set(range(1, len(together[1]) + 1))
    monkeypatch.setattr(inference, "CPU_CHUNK", 3 * 45 * 40)
    full = inference.resize_masks(masks, *shown).sigmoid()
    for given in (None, full):
        again = merge_masks(posterior, masks, things, shown, CFG, given)
        segment_map, labels, scores = again
        assert torch.equal(segment_map, together[0]) and torch.equal(labels, together[1])
        assert torch.allclose(scores, together[2], rtol=0, atol=1e-6)  # sums of other parts


def test_a_window_gives_whole_masks_of_what_merging_keeps():
    first, half = thing(0.9, 0.9, 0.9, 0.1, 0.1), thing(0.1, 0.1, 0.8, 0.8, 0.1)
    less = thing(0.1, 0.7, 0.7, 0.1, 0.1)  # another view of the first
    queries = less, first, half, stuff(0.1, 0.1, 0.1, 0.1, 0.9)
    masks, posterior = zip(*queries)
    masks, posterior = torch.stack(masks), torch.tensor(posterior)
    given = posterior, masks, THINGS, sizes(1, 5), CFG
    assert len(sure_things(*given)[0]) == 3
    painted, labels, scores, instances = inference._segments(*given, None, parts=True)
    assert instances.flatten(1).int().tolist() == [[1, 1, 1, 0, 0], [0, 0, 1, 1, 0]]
    assert painted.tolist() == [[1, 1, 1, 2, 0]]
    assert labels.tolist() == [0, 0] and scores.tolist() == pytest.approx([0.9, 0.8])
    whole = inference._segments(*given, None, parts=False)
    assert whole[0].tolist() == [[1, 1, 1, 2, 3]] and whole[3] is None


def test_a_window_without_a_sure_thing_has_no_instance():
    posterior, masks = torch.tensor([[0.0, 0.9, 0.1]]), mask(0.9, 0.9)[None]
    painted, labels, scores, instances = inference._segments(
        posterior, masks, THINGS, sizes(1, 2), CFG, None, parts=True
    )
    assert painted.eq(0).all() and len(labels) == len(scores) == 0
    assert instances.shape == (0, 1, 2)


def test_the_paper_has_queries_compete_and_the_preset_of_small_objects_has_not():
    assert MINI.merging == "pixels" and CUSTOM.merging == "masks"


def test_of_two_classes_on_one_object_the_surer_mask_stays():
    both = torch.tensor([True, True])
    masks = torch.stack([mask(0.7, 0.7, 0.1), mask(0.9, 0.9, 0.1)])
    posterior = torch.tensor([[0.9, 0.0, 0.1], [0.0, 0.6, 0.4]])
    segment_map, labels, _ = merge_masks(posterior, masks, both, sizes(1, 3), CFG)
    assert segment_map.tolist() == [[1, 1, 0]] and labels.tolist() == [1]


class Sees(MeanTeacher):
    """A teacher with two queries of one object, each surer of its own half."""

    def teacher_answer(self, features, t):
        rows = torch.empty(2, 16, 16)
        rows[0, :, :8], rows[0, :, 8:] = 2.0, 1.0
        rows[1, :, :8], rows[1, :, 8:] = 0.9, 2.2
        posterior = torch.zeros(1, 2, len(self.taxonomy) + 1)
        posterior[:, :, 0] = 1.0
        return posterior, rows[None]


@pytest.mark.parametrize("merging, count", [("pixels", 0), ("masks", 1)])
def test_pseudo_labels_are_merged_as_the_configuration_says(merging, count):
    cfg = dataclasses.replace(TINY, merging=merging, overlap_threshold=0.8)
    made = Sees(cfg, scenes.mini_taxonomy(), torch.device("cpu"))
    (target,) = made.pseudo_labels([], ((64, 64),) * 3, 0)
    assert len(target) == count and (target.segment_map > 0).any() == bool(count)


def test_windows_get_masks_that_overlap_and_whole_images_a_partition():
    cfg = dataclasses.replace(TINY, merging="masks")
    made = MeanTeacher(cfg, scenes.mini_taxonomy(), torch.device("cpu"))
    images = torch.randint(0, 256, (1, 3, 64, 64), dtype=torch.uint8)
    for parts in (True, False):
        given = ([((64, 64), (64, 64))], ["student/decoder"])
        ((_, _, answer),) = made.predict(images, *given, sums=parts)
        assert (answer.masks is not None) == parts


def test_runs_of_before_had_queries_compete():
    assert numbers_of({"lr": 1.0})["merging"] == "pixels"
    old = {"stage": "sup", "lr": 1.0, "overlap_threshold": 0.8}
    now = {**old, "merging": "pixels", "least_quality": 0.85}
    assert differing(old, now) == [] and differing(old, {**now, "merging": "masks"}) == [
        "merging",
        "least_quality",
    ]


def test_the_page_of_an_old_run_says_that_its_queries_competed(tmp_path):
    config = {"stage": "sup", "dataset": "custom", "data_root": "set", **vars(CUSTOM.settled())}
    for merging in ("masks", None):
        stored = {key: value for key, value in config.items() if merging or key != "merging"}
        if not merging:
            del stored["least_quality"]
        (tmp_path / "config.json").write_text(json.dumps(stored))
        (command,) = run_folder.commands(run_folder.read(tmp_path))
        assert ("--merging pixels" in command) == (merging is None), command
        assert "--least-quality" not in command
