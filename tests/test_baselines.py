"""tools.baselines: Otsu and a small U-Net, on drawn discs whose answer is known."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from panoptic_eval import PanopticQuality
from readers.ground_truth import Truth
from readers.panoptic import load_folder
from tests.helpers import REAL_DATA, needs_nuclei, write_coco_folder
from tools import baselines
from tools.prepare import encode

DISCS = ((14, 15, 8), (20, 44, 10), (48, 18, 11), (47, 48, 6))  # y, x, radius


def discs(places=DISCS, side=64):
    """(side, side) int32 map of discs, 1, 2, ..., the later ones below."""
    y, x = np.mgrid[:side, :side]
    objects = np.zeros((side, side), np.int32)
    for k, (cy, cx, r) in enumerate(places, 1):
        objects[(objects == 0) & ((y - cy) ** 2 + (x - cx) ** 2 <= r * r)] = k
    return objects


def picture(objects, inside=200, outside=40, seed=0):
    noise = np.random.default_rng(seed).normal(0, 8, objects.shape)
    grey = np.where(objects > 0, inside, outside) + noise
    return Image.fromarray(grey.clip(0, 255).astype(np.uint8)).convert("RGB")


def pq(found, objects):
    quality = PanopticQuality(1)
    quality.add(found, [0] * found.max(), objects, [0] * objects.max())
    return quality.result([True])["all"]["pq"]


def truth_of(objects):
    """Discs are things of class 0, the rest is one segment of class 1."""
    count = objects.max() + 1
    segment_map = np.where(objects > 0, objects, count).astype(np.int32)
    labels = np.array([0] * (count - 1) + [1])
    return Truth(segment_map, labels, np.bincount(segment_map.ravel())[1:], np.zeros(count, bool))


def write_discs(root, parts=(("train", 2), ("val", 2))):
    """A folder in COCO panoptic format with one thing class and one of stuff, 4 and 3 discs."""
    (root / "images").mkdir(parents=True)
    (root / "panoptic").mkdir()
    categories = [{"id": 5, "name": "disc", "isthing": 1}, {"id": 2, "name": "rest", "isthing": 0}]
    for part, count in parts:
        content = {"images": [], "annotations": [], "categories": categories}
        for i in range(count):
            truth = truth_of(discs(DISCS[: 4 - i]))
            name = f"{part}{i}.png"
            picture(truth.segment_map < truth.segment_map.max(), seed=i).save(
                root / "images" / name
            )
            encode(truth.segment_map).save(root / "panoptic" / name)
            segments = [
                {"id": k, "category_id": (5, 2)[c], "area": int(area), "iscrowd": 0}
                for k, (c, area) in enumerate(zip(truth.labels.tolist(), truth.areas), 1)
            ]
            row = {"id": i, "file_name": name}
            content["images"].append({**row, "height": 64, "width": 64})
            content["annotations"].append(
                {"image_id": i, "file_name": name, "segments_info": segments}
            )
        (root / f"panoptic_{part}.json").write_text(json.dumps(content))
    return root


@pytest.fixture
def small(monkeypatch):
    """A network and crops for small pictures; a second thread would only wait for the first."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setattr(baselines, "WIDTHS", (8, 16, 32))
    monkeypatch.setattr(baselines, "CROP", 64)
    monkeypatch.setattr(baselines, "BATCH", 2)
    monkeypatch.setattr(baselines, "ZOOM", (1.0, 1.0))
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("inside, outside", [(200, 40), (60, 220)])
def test_otsu_finds_bright_discs_on_dark_ground_and_dark_ones_on_bright(inside, outside):
    objects = discs()
    found = baselines.otsu(picture(objects, inside, outside))
    assert found.max() == 4 and pq(found, objects) > 0.9


def test_otsu_fills_holes_drops_specks_and_finds_nothing_where_nothing_is():
    objects = discs()
    ring = objects.copy()
    ring[48, 18] = 0  # a hole in the third disc
    ring[2:6, 30:34] = 9  # 16 pixels: a speck
    ring[30:35, 2:6] = 9  # 20 pixels: an object
    found = baselines.otsu(Image.fromarray(np.uint8(ring > 0) * 255).convert("RGB"))
    assert found[48, 18] == found[48, 20] > 0
    assert not found[2:6, 30:34].any() and found.max() == 5
    assert not baselines.otsu(Image.new("RGB", (9, 7), (50, 60, 70))).any()


def test_distances_are_one_in_the_middle_of_every_object_and_small_at_its_edge():
    distance = baselines.distances(discs())
    assert [distance[y, x] for y, x, _ in DISCS] == [1, 1, 1, 1]
    # of radius 8, its outermost pixel is 1 away from the background, its centre 65 ** 0.5 (1, 8)
    assert distance[14, 15 + 8] == pytest.approx(1 / 65**0.5)
    assert distance[0, 0] == 0
    # the edge of an image is an edge of what it cuts: the middle of 5 x 5 pixels is 3 away
    whole = baselines.distances(np.ones((5, 5), np.int32))
    assert whole[2] == pytest.approx(np.array([1, 2, 3, 2, 1]) / 3)


@pytest.mark.parametrize("radii", [(14, 14), (18, 8)])
def test_two_discs_that_touch_are_split_by_perfect_distances(radii):
    a, b = radii
    objects = discs([(32, 20, a), (32, 20 + a + b, b)])
    found = baselines.split(objects > 0, baselines.distances(objects))
    assert found.max() == 2 and pq(found, objects) > 0.95
    assert ((found > 0) == (objects > 0)).all()


def test_ripples_on_a_large_object_do_not_split_it(monkeypatch):
    objects = discs([(32, 32, 27)])
    noise = np.random.default_rng(0).normal(0, 0.03, objects.shape)
    distance = baselines.distances(objects).clip(max=0.6) + noise  # flat in the middle
    assert baselines.split(objects > 0, distance).max() == 1
    monkeypatch.setattr(baselines, "RISE", 0.0)
    assert baselines.split(objects > 0, distance).max() > 10


def test_a_part_whose_maximum_lies_beside_it_is_an_object_still():
    mask = np.zeros((9, 9), bool)
    mask[3:6, 3] = True
    ramp = np.tile(np.linspace(0, 1, 9), (9, 1))
    found = baselines.split(mask, ramp)
    assert found.max() == 1 and ((found > 0) == mask).all()


def test_void_and_crowd_are_not_learned():
    objects = discs()
    truth = truth_of(objects)
    truth.segment_map[:, :3] = 0
    truth.crowd[1] = True
    x = baselines.layers(picture(objects), truth, thing=0)
    foreground, distance, known = x[3:].numpy()
    assert not known[:, :3].any() and not known[objects == 2].any()
    assert known.sum() == 64 * 64 - 64 * 3 - (objects == 2).sum()
    assert not foreground[objects == 2].any() and not distance[objects == 2].any()
    assert foreground[objects == 1].all()


def test_a_crop_moves_image_and_maps_alike_and_does_not_know_what_is_outside(monkeypatch):
    monkeypatch.setattr(baselines, "ssd_colour", lambda image, rng: image)
    monkeypatch.setattr(baselines, "ZOOM", (1.0, 1.0))  # a crop of 192: the image and a border
    objects = discs()
    x = baselines.layers(picture(objects, 255, 0), truth_of(objects), thing=0)
    for seed in range(8):
        y = baselines.crop(x, baselines.random.Random(seed))
        assert y.shape == (6, baselines.CROP, baselines.CROP)
        assert y[5].sum() == 64 * 64 and torch.equal((y[0] > 128).float(), y[3])


def test_the_unet_learns_two_images_and_the_same_seed_gives_the_same(small):
    maps = [discs(), discs([(20, 20, 12), (20, 41, 9), (48, 30, 12)])]
    samples = [baselines.layers(picture(m), truth_of(m), thing=0) for m in maps]
    model = baselines.train(samples, steps=60, seed=0)
    for objects in maps:
        found = baselines.unet(model, picture(objects, seed=7))
        assert found.max() == objects.max() and pq(found, objects) > 0.8
    a, b, c = (baselines.train(samples, 2, seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert not torch.equal(a["last.weight"], c["last.weight"])


def test_sides_that_are_no_multiple_of_16_are_padded_and_cut_again():
    model = baselines.UNet().eval()
    assert 1.8e6 < sum(p.numel() for p in model.parameters()) < 2.1e6
    assert baselines.unet(model, picture(discs()[:45, :50])).shape == (45, 50)
    assert baselines.unet(model, picture(discs()[:5, :3])).shape == (5, 3)


@pytest.mark.parametrize("name", ["otsu", "unet"])
def test_a_baseline_writes_figures_as_runs_have_them(name, small, tmp_path, capsys):
    root, out = write_discs(tmp_path / "drawn"), tmp_path / "figures.json"
    flags = [] if name == "otsu" else ["--steps", "3", "--seed", "4"]
    asked = [name, "--data-root", root, "--split", "1", "--out", out, *flags]
    assert baselines.main([str(word) for word in asked]) == 0
    content = json.loads(out.read_text())
    figures = content[name]
    assert (content["images"], content["split"], content["data"]) == (2, "1", "drawn")
    assert figures["things"].keys() == {"pq", "sq", "rq", "n"}
    assert figures["per_class"].keys() == {"disc", "rest"} and "miou" in figures
    if name == "otsu":
        assert figures["per_class"]["disc"]["tp"] == 7 and figures["things"]["pq"] > 0.9
    else:
        keys = ("seed", "steps", "labelled images")
        assert [content[key] for key in keys] == [4, 3, 1]
        assert content["parameters"] == sum(p.numel() for p in baselines.UNet().parameters())
        assert content["seconds of training"] > 0
    assert "PQ things" in capsys.readouterr().out


def test_what_is_no_object_is_background(tmp_path):
    dataset = load_folder(write_discs(tmp_path / "drawn"), "all")

    def nothing(image):
        return np.zeros(image.size[::-1], np.int32)

    def all_of_it(image):
        return np.ones(image.size[::-1], np.int32)

    rows = baselines.measure(dataset, nothing)["per_class"]
    assert [rows["rest"][key] for key in ("tp", "fp", "fn")] == [2, 0, 0]
    assert [rows["disc"][key] for key in ("tp", "fp", "fn")] == [0, 0, 7]
    rows = baselines.measure(dataset, all_of_it)["per_class"]
    assert [rows["rest"][key] for key in ("tp", "fp", "fn")] == [0, 0, 2]
    assert rows["disc"]["fp"] == 2


def test_other_data_sets_and_numbers_of_steps_are_refused_in_one_line(tmp_path, capsys):
    root = write_coco_folder(tmp_path / "many")
    asked = ["--data-root", str(root), "--split", "1_3"]
    assert baselines.main(["otsu", *asked]) == 2
    line = capsys.readouterr().err.strip()
    assert line.startswith(f"error: {root}: has ") and "\n" not in line
    assert "need one thing class (the objects) and one stuff class" in line
    for steps in ("0", "-3", "many"):
        with pytest.raises(SystemExit):
            baselines.main(["unet", *asked, "--steps", steps])
        assert "--steps" in capsys.readouterr().err


@needs_nuclei
def test_otsu_on_the_nuclei(tmp_path):
    root, out = REAL_DATA / "nuclei_panoptic", tmp_path / "otsu.json"
    asked = ["otsu", "--data-root", root, "--split", "1_32", "--out", out]
    assert baselines.main([str(word) for word in asked]) == 0
    assert json.loads(out.read_text())["otsu"]["things"]["pq"] == pytest.approx(0.582, abs=0.005)
