"""."""

import numpy as np

from mini import microcosm

# ---------------------------------------------------------------------------------------------- mic


def test_scenes_are_partitions_that_never_change_and_collections_differ():
    s = microcosm.scene("train", 5)
    areas = np.bincount(s.segment_map.ravel(), minlength=len(s.labels) + 1)
    assert areas[0] == 0 and (areas[1:] > 0).all() and s.image.shape == (128, 128, 3)
    assert np.array_equal(s.image, microcosm.scene("train", 5).image) and not np.array_equal(
        s.image, microcosm.scene("val", 5).image
    )
    for part in range(1, s.part_map.max() + 1):
        assert (
            len(np.unique(s.segment_map[s.part_map == part])) <= 1
        )  # a part lies inside one segment
    assert len(set(microcosm.SEEDS.values())) == len(microcosm.SEEDS)


def test_captions_name_classes_that_are_there():
    rng = np.random.default_rng(0)
    for i in range(20):
        s = microcosm.scene("train", i)
        classes, text = microcosm.caption(s.labels, rng)
        assert classes <= set(s.labels.tolist()) and all(
            any(n in text for n in microcosm.CLASSES[k].split(", ")) for k in classes
        )


def test_mini_clip_knows_the_classes_of_ground_truth_masks():
    from mini import mini_clip

    quality = mini_clip.evaluate(mini_clip.load(), "val", images=40)
    assert quality["class_mean"] > 0.5  # chance 1/20


def test_the_mini_sam_is_remade_by_one_call(tmp_path):
    from mini import mini_sam

    phases = (
        dict(name="encoder", steps=1, images=1, points=3, lr=2e-3, prompts=False),
        dict(name="all", steps=2, images=2, points=3, lr=2e-3, prompts=True),
    )
    quality = mini_sam.train(tmp_path / "sam.safetensors", phases=phases, scenes=2, test_images=1)
    assert quality["steps"] == {"encoder": 1, "all": 2} and 0 <= quality["recall50"] <= 1
    assert (
        mini_sam.evaluate(mini_sam.load(tmp_path / "sam.safetensors"), images=1)["masks_max"]
        == quality["masks_max"]
    )


def test_mini_sam_draws_wholes_and_parts_through_the_automatic_generator():
    from mini import mini_sam

    quality = mini_sam.evaluate(mini_sam.load(), "val", images=16)
    assert quality["recall50"] > 0.7 and quality["part_recall50"] > 0 and quality["masks_max"] <= 40
