"""."""

import dataclasses
import hashlib
import itertools
import json
import re
import shlex
import shutil
import signal
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFont

import dearli
import inference
from config import DEEPLAB_FIELDS, Config
from engine import checkpoint, sameness, stored
from engine.evaluation import evaluate
from engine.flags import READS
from ground import colours, files, tensor_files
from ground.errors import UserError
from inference import resize_masks, semantic_inference, shared_masks
from mean_teacher import MeanTeacher
from mini import microcosm, scenes
from panoptic_eval import MeanIoU, PanopticQuality
from readers import ground_truth, panoptic
from report import drawing, tables
from tests.helpers import (
    ROOT,
    TINY,
    ended,
    fingerprint,
    fork,
    png_of_16_bits,
    predict_stage,
    rewrite,
    run,
    square,
    wait_for,
    write_coco_folder,
)
from tools import exchange, importer, outlines, predict, prepare


def test_colours_of_classes_are_far_apart_for_every_eye_and_do_not_depend_on_their_number():
    for count, least in ((7, 0.07), (20, 0.06), (150, 0.01)):
        views = colours.seen(np.array(colours.palette(count)))
        distances = np.linalg.norm(views[:, :, None] - views[:, None], axis=-1) + 9 * np.eye(count)
        assert distances.min() > least, (count, distances.min((1, 2)))
    assert colours.palette(20) == colours.palette(150)[:20] and colours.palette(3) == list(
        colours.OKABE_ITO[:3]
    )
    red, green = colours.seen(np.array([[200, 60, 60], [100, 130, 60]])).transpose(1, 0, 2)
    assert (
        np.linalg.norm(red - green, axis=-1)[2] < 0.4 * np.linalg.norm(red - green, axis=-1)[0]
    )  # an eye without green cones does mistake these
    assert len({colours.shade(colours.OKABE_ITO[0], n) for n in range(40)}) == 40 and colours.shade(
        (10, 20, 30), 0
    ) == (10, 20, 30)


def test_figures_over_nothing_are_not_printed_as_0():
    quality = PanopticQuality(2)
    quality.add(np.array([[1, 1]]), np.array([0]), np.array([[1, 1]]), np.array([0]))
    metrics = {**quality.result([True, False]), "miou": 0.0, "miou_classes": 0}
    assert [tables.figure(metrics, keys) for _, keys in tables.COLUMNS] == [
        1.0,
        1.0,
        None,
        1.0,
        1.0,
        None,
    ]
    assert tables.table([("a run", metrics)]).splitlines()[1].split() == [
        "a",
        "run",
        "100.0",
        "100.0",
        "n/a",
        "100.0",
        "100.0",
        "n/a",
    ]
    assert (
        tables.figure({**metrics, "miou_classes": 1}, ("miou",)) == 0.0
        and tables.figure({}, ("things", "pq")) is None
    )
    del metrics["miou_classes"]  # as older versions stored it
    assert tables.figure(metrics, ("miou",)) == 0.0


def test_what_was_found_is_said_in_words_of_things_alone():
    counts = {"cell": {"tp": 3, "fp": 1, "fn": 2}, "rod": {"tp": 0, "fp": 4, "fn": 1}}
    metrics = {"per_class": {**counts, "glass": {"tp": 9, "fp": 9, "fn": 9}}}
    said = "3 of 6 things are found (IoU above 0.5); 5 answers match none: "
    assert tables.found(metrics, ["cell", "rod"]).startswith(said)
    assert tables.found(metrics, ["cell"], short=True) == "3 of 5 things found, 1 without a match"
    assert tables.found(metrics, []) == tables.found({}, ["cell"]) == ""


def test_instances_of_a_class_differ_in_an_overlay_and_look_the_same_in_every_image(tmp_path):
    image, segment_map, labels = square()
    taxonomy = ground_truth.Taxonomy(("cat", "grass"), (True, False), (1, 2))
    drawn = np.asarray(drawing.overlay(image, segment_map, labels, taxonomy, names=False)).astype(
        int
    )  # ten times as large
    assert drawn.shape == (640, 640, 3)
    first, second, stuff, void = drawn[150, 50], drawn[150, 350], drawn[500, 100], drawn[300, 600]

    def mixed(colour):
        return np.round(128 * (1 - drawing.PAINT) + drawing.PAINT * np.array(colour))

    assert (
        np.abs(first - mixed(taxonomy.colours[0])).max() <= 1
        and np.abs(stuff - mixed(taxonomy.colours[1])).max() <= 1
    )
    assert np.abs(first - second).max() > 20 and len(set(void)) == 1 and void[0] < 60
    assert drawn[150, 240].min() > 240 and drawn[150, 235:246].min() < 80, (
        "no white border with dark sides"
    )
    other = np.asarray(
        drawing.overlay(image, segment_map[::-1].copy(), labels, taxonomy, names=False)
    ).astype(int)
    assert (other[490, 50] == first).all() and (other[490, 350] == second).all()
    own = dataclasses.replace(taxonomy, palette=((1, 2, 3), (4, 5, 6)))
    assert own.colours == [(1, 2, 3), (4, 5, 6)]
    root = write_coco_folder(tmp_path / "set", images=1)
    assert panoptic.load_folder(root, "1").taxonomy.palette is None
    rewrite(
        root / "panoptic_train.json",
        lambda content: (
            [c.update(color=[k, 7, 9]) for k, c in enumerate(content["categories"])] and None
        ),
    )
    assert panoptic.load_folder(root, "1").taxonomy.colours[3] == (3, 7, 9)


def test_names_are_written_on_segments_that_have_room_and_inside_the_image():
    image, segment_map, labels = square()
    taxonomy = ground_truth.Taxonomy(("cat, feline", "grass"), (True, False), (1, 2))

    def drawn(taxonomy, **flags):
        return np.asarray(drawing.overlay(image, segment_map, labels, taxonomy, **flags))

    def written(**flags):
        return (drawn(taxonomy, **flags) != drawn(taxonomy, names=False)).any(-1)

    plain, scored = written(), written(scores=[0.5, 0.75, 1.0])
    for part in (np.s_[:320, :240], np.s_[:320, 240:480], np.s_[320:, :480]):
        assert plain[part].sum() > 100 and scored[part].sum() > plain[part].sum()
    assert not plain[:, 480:].any()  # nothing on void
    long = dataclasses.replace(taxonomy, names=("cat" * 99, "grass"))
    assert (drawn(long)[:300] == drawn(taxonomy, names=False)[:300]).all()
    # a name that would hang over too far is not written, nor one whose place another name has taken
    width = ImageFont.load_default(640 // drawing.PIXELS_A_FONT_SIZE).getlength("m" * 12) + 4

    def names_of(*shares):
        bars, x = (
            np.zeros((640, 640), np.int32),
            640 - sum(round(share * width) for share in shares),
        )  # up to the right side of the image
        for k, share in enumerate(shares, 1):
            bars[300:322, x : x + round(share * width)] = k
            x += round(share * width)
        plain, named = (
            np.asarray(
                drawing.overlay(
                    Image.new("RGB", (640, 640)),
                    bars,
                    np.zeros(len(shares), int),
                    dataclasses.replace(taxonomy, names=("m" * 12, "grass")),
                    names=names,
                )
            )
            for names in (False, True)
        )
        return [(plain != named).any(-1)[bars == k].sum() > 500 for k in range(1, len(shares) + 1)]

    assert names_of(1.1) == names_of(0.7) == [True] and names_of(0.5) == [False]
    assert names_of(0.8, 0.02, 0.64)[::2] == [True, False] and names_of(1.1, 0.02, 0.7)[::2] == [
        True,
        True,
    ]
    for size in ((1, 1), (5000, 20), (20, 5000)):
        image = Image.new("RGB", size)
        for segment_map, labels in (
            (np.ones(size[::-1], np.int32), np.array([1])),
            (np.zeros(size[::-1], np.int32), np.zeros(0, int)),
        ):
            assert max(drawing.overlay(image, segment_map, labels, taxonomy).size) == (
                640 if size == (1, 1) else 2560
            )
    with pytest.raises(ValueError, match="segment_map: expected"):
        drawing.overlay(image, segment_map[1:], labels, taxonomy)


def test_names_that_no_font_writes_are_category_ids_and_are_said_once(monkeypatch, capsys):
    if drawing.font_of("cat") is None or drawing.FONTS is None:
        pytest.skip("no scalable font")
    monkeypatch.setattr(
        drawing, "FONTS", ()
    )  # a system without fonts: only Pillow's own, of Latin letters
    for function in (drawing.font_of, drawing.written):
        function.cache_clear()
    image, segment_map, labels = square()
    taxonomy = ground_truth.Taxonomy(("\u732b", "grass"), (True, False), (17, 2))

    def draw(name):
        named = dataclasses.replace(taxonomy, names=(name, "grass"))
        return np.asarray(drawing.overlay(image, segment_map, labels, named))

    unknown = draw("\u732b")
    said = capsys.readouterr().out
    assert said.count("warning") == 1 and "#17 \u732b" in said and "grass" not in said
    assert np.array_equal(unknown, draw("#17")) and not np.array_equal(unknown, draw("#1"))
    draw("\u732b")
    assert capsys.readouterr().out == ""  # not for every picture
    for text in (
        "\u0642\u0637\u0629",
        "\u0915\u0941\u0924\u094d\u0924\u093e",
        "\ud55c\uad6d",
        "cat \u732b",
    ):
        assert drawing.font_of(text) is None
    assert drawing.font_of("traffic light (2)") == "" and drawing.written(
        ("a b", "\u732b"), (1, 2)
    ) == ("a b", "#2")
    # scripts that must be shaped are in no font without what shapes them
    monkeypatch.setattr(drawing, "FONTS", ("DejaVuSans.ttf",))
    monkeypatch.setattr(drawing.features, "check", lambda name: False)
    drawing.font_of.cache_clear()
    assert drawing.font_of("\u0642\u0637\u0629") is None
    for function in (drawing.font_of, drawing.written):
        function.cache_clear()


def test_names_are_written_by_a_font_of_the_system_that_has_their_letters(monkeypatch, capsys):
    if drawing._font("DejaVuSans.ttf", 20) is None:
        pytest.skip("no DejaVu Sans here")
    monkeypatch.setattr(drawing, "FONTS", ("no such font.ttf", "DejaVuSans.ttf"))
    for function in (drawing.font_of, drawing.written):
        function.cache_clear()
    name = "\u0441\u043e\u0431\u0430\u043a\u0430"  # dog, in Cyrillic
    assert drawing.font_of(name) == "DejaVuSans.ttf" and drawing.written((name,), (3,)) == (name,)
    image, segment_map, labels = square()
    pictures = [
        np.asarray(
            drawing.overlay(
                image,
                segment_map,
                labels,
                ground_truth.Taxonomy((text, "grass"), (True, False), (3, 2)),
            )
        )
        for text in (name, name[::-1], "#3")
    ]
    assert (
        not any(np.array_equal(a, b) for a, b in itertools.combinations(pictures, 2))
        and capsys.readouterr().out == ""
    )
    for function in (drawing.font_of, drawing.written):
        function.cache_clear()


@pytest.mark.parametrize(
    "image, output",
    [((16, 24), (50, 37)), ((16, 24), (16, 24)), ((16, 24), (3, 5)), ((1, 24), (2, 90))],
)
def test_semantic_inference_by_rows_is_that_of_the_whole(image, output, monkeypatch):
    g = torch.Generator().manual_seed(0)
    logits, posterior, sizes = (
        torch.randn(4, 8, 8, generator=g),
        torch.rand(4, 6, generator=g),
        ((32, 32), image, output),
    )
    whole = semantic_inference(posterior, logits, sizes, resize_masks(logits, *sizes).sigmoid())
    for values in (1, 4 * output[1] * 7, 10**9):  # one row, seven rows, all rows at once
        monkeypatch.setattr(inference, "CPU_CHUNK", values)
        assert torch.equal(semantic_inference(posterior, logits, sizes), whole)


def test_large_images_are_evaluated_in_parts_with_the_figures_of_the_whole(small_mini, monkeypatch):
    # 100 queries: 1.6 GB at 2000 x 2000, for every model
    large = shared_masks(torch.zeros(100, 128, 128), ((512, 512), (512, 512), (2000, 2000)))
    assert large is None
    assert shared_masks(torch.zeros(5, 16, 16), ((64, 64), (64, 48), (30, 20))).shape == (5, 30, 20)
    cfg = dataclasses.replace(TINY, object_mask_threshold=0.0, overlap_threshold=0.0)
    dataset = scenes.load_mini("4", "val")
    method = MeanTeacher(cfg, dataset.taxonomy, torch.device("cpu"))
    whole = evaluate(method, dataset, title="")

    parts, share = [], inference.shared_masks
    monkeypatch.setattr(inference, "SHARED_MASKS", 0)
    monkeypatch.setattr(inference, "shared_masks", lambda *args: parts.append(share(*args)))
    monkeypatch.setattr(inference, "CPU_CHUNK", 2 * 128 * 128)  # two of six queries at a time
    assert evaluate(method, dataset, title="") == whole
    assert parts and all(masks is None for masks in parts)
    assert any(
        reading["confusion"] != whole["student/decoder"]["confusion"] for reading in whole.values()
    )


def truth_of(folder, names, root):
    """A data set of mini ground truth for these pictures."""
    (root / "maps").mkdir(parents=True)
    taxonomy, content = scenes.mini_taxonomy(), {"images": [], "annotations": []}
    content["categories"] = [
        {"id": i, "name": n, "isthing": int(t)}
        for i, n, t in zip(taxonomy.ids, taxonomy.names, taxonomy.things)
    ]
    for i, name in enumerate(names):
        s = microcosm.scene("val", i)
        prepare.encode(s.segment_map).save(root / "maps" / f"{i}.png")
        content["images"].append({"id": name, "file_name": name})
        content["annotations"].append(
            {
                "image_id": name,
                "file_name": f"{i}.png",
                "segments_info": [
                    {
                        "id": k,
                        "category_id": int(label) + 1,
                        "area": int((s.segment_map == k).sum()),
                        "iscrowd": 0,
                    }
                    for k, label in enumerate(s.labels, 1)
                ],
            }
        )
    (root / "truth.json").write_text(json.dumps(content))
    return panoptic.PanopticFolder(
        root / "truth.json", folder, root / "maps", taxonomy, validation=True
    )


@pytest.mark.parametrize("posterior, which", [("ensemble", "student"), ("decoder", "teacher")])
def test_predictions_are_those_of_evaluation_and_valid_coco_panoptic_files(
    posterior, which, small_run, tmp_path, monkeypatch
):
    pictures, out, names = (
        small_run / "pictures",
        tmp_path / "out",
        ["a.png", "b.png", "more/c.png"],
    )
    flags = (
        ["--posterior", "decoder", "--which", "teacher"] if which == "teacher" else []
    )  # the others are the defaults
    assert predict_stage(small_run, "--input", pictures, "--output", out, *flags) == 0
    content, taxonomy = json.loads((out / "panoptic.json").read_text()), scenes.mini_taxonomy()
    assert panoptic.read_taxonomy(out / "panoptic.json") == dataclasses.replace(
        taxonomy, palette=tuple(taxonomy.colours)
    )
    predicted = panoptic.PanopticFolder(
        out / "panoptic.json", pictures, out / "panoptic", taxonomy, validation=True
    )
    assert [predicted.name(i) for i in range(3)] == names and content["info"][
        "posterior"
    ] == posterior
    # against itself: every segment is found; its area and box are those of its pixels
    quality, mine = PanopticQuality(20), PanopticQuality(20)
    truth = truth_of(pictures, names, tmp_path / "truth")
    for i in range(3):
        p, t = predicted.truth(i), truth.truth(i)
        quality.add(p.segment_map, p.labels, p.segment_map, p.labels, p.areas, p.crowd)
        mine.add(p.segment_map, p.labels, t.segment_map, t.labels, t.areas, t.crowd)
        for k, segment in enumerate(content["annotations"][i]["segments_info"], 1):
            assert (
                segment["area"] == (p.segment_map == k).sum()
                and segment["bbox"] == prepare.box(p.segment_map == k)
                and 0 < segment["score"] <= 1
            )
    things = np.array(taxonomy.things)
    found = sum(len(a["segments_info"]) for a in content["annotations"])
    assert found > 3 and quality.result(things, taxonomy.short_names)["all"]["pq"] == 1
    # evaluation on the same images sees the same maps, and the files have its PQ
    seen = {"pq": [], "miou": []}
    add, add_classes = PanopticQuality.add, MeanIoU.add
    monkeypatch.setattr(
        PanopticQuality, "add", lambda self, *a: (seen["pq"].append(a), add(self, *a))
    )
    monkeypatch.setattr(
        MeanIoU, "add", lambda self, *a: (seen["miou"].append(a[0]), add_classes(self, *a))
    )
    state = checkpoint.newest(small_run / "run")
    cfg = Config(**{f.name: state["config"][f.name] for f in dataclasses.fields(Config)})
    method = stored.restore(
        stored.Stored(small_run / "run", {which: state[which], "config": state["config"]}),
        cfg,
        taxonomy,
        torch.device("cpu"),
        "mini",
    )
    images = ground_truth.DataSet("t", taxonomy, truth, truth, [], [])
    metrics = evaluate(method, images)[f"{which}/{posterior}"]
    of = ["decoder", "ensemble"].index(posterior)
    for i, (name, segments) in enumerate(zip(names, seen["pq"][of::2])):
        assert np.array_equal(segments[0], predicted.truth(i).segment_map) and np.array_equal(
            segments[1], predicted.truth(i).labels
        )
        classes = np.asarray(Image.open(out / "semantic" / f"{name}.png"))
        assert classes.dtype == np.uint8 and np.array_equal(
            classes.astype(int) - 1, seen["miou"][of::2][i]
        )
    listed = (out / "semantic" / "classes.txt").read_text().splitlines()
    assert listed == [f"{k}:{name}" for k, name in enumerate(taxonomy.short_names, 1)]
    assert mine.result(things, taxonomy.short_names)["all"] == metrics["all"]


def test_a_predictor_takes_a_path_and_arrays_that_mean_one_thing(small_run):
    model, path = dearli.load(small_run / "run", device="cpu"), small_run / "pictures" / "a.png"
    pixels = np.asarray(Image.open(path))
    expected = model(Image.open(path)).segment_map
    opaque = np.dstack([pixels, np.full(pixels.shape[:2], 255, np.uint8)])
    for same in (
        path,
        str(path),
        pixels,
        torch.from_numpy(pixels.copy()),
        opaque,
        pixels[:, ::-1][:, ::-1],
    ):
        assert np.array_equal(model(same).segment_map, expected)
    grey = pixels[..., 0]
    assert np.array_equal(model(grey[..., None]).segment_map, model(grey).segment_map)
    for wrong, words in (
        (
            pixels / 255,
            r"array \(128, 128, 3\) of float64: expected .* uint8, 0 to 255; of values from 0 to 1: \(255 \* x\)",
        ),
        (pixels.astype(np.float32), "of float32"),
        (pixels.astype(np.int64), r"x.astype\(np.uint8\)"),
        (pixels > 99, "of bool"),
        (torch.from_numpy(pixels.copy()).permute(2, 0, 1), "channels come last"),
        (pixels[None], "of a batch, call it for each image"),
        ([pixels, pixels], "a list: .* call it for each"),
        (pixels[..., :2], r"array \(128, 128, 2\)"),
        (pixels[:0], r"array \(0, 128, 3\)"),
        (None, "NoneType: expected"),
    ):
        with pytest.raises(TypeError, match=words) as error:
            model(wrong)
        assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="nowhere.png"):
        model(small_run / "nowhere.png")


def test_fault_34_predictions_overwrite_nothing_meet_nowhere_and_name_what_is_no_image(
    small_run, tmp_path, capsys, monkeypatch
):
    pictures, out = (
        tmp_path / "pictures",
        tmp_path / "pictures" / "out",
    )  # predictions beside the pictures are not taken for pictures
    shutil.copytree(small_run / "pictures", pictures)
    Image.open(pictures / "a.png").convert("L").save(pictures / "a.jpg", quality=5)
    Image.open(pictures / "b.png").save(pictures / "a.png.png")
    for name, content in (
        ("notes.txt", b"no image"),
        (".hidden.jpg", b"no image"),
        ("cut.png", (pictures / "a.png").read_bytes()[:500]),
        ("empty.jpg", b""),
        ("more/text.jpg", b"no image"),
        (f"{'n' * 245}.png", (pictures / "a.png").read_bytes()),
    ):
        (pictures / name).write_bytes(content)
    assert predict_stage(small_run, "--input", pictures, "--out", out) == 2
    said, error = capsys.readouterr()
    assert (
        f"error: {pictures}: 4 of 9 pictures could not be read (see above); the others are in {out}\n"
        in error
    )
    assert (
        "2 files passed over, by their endings no images: '.hidden.jpg', 'notes.txt'\n" in said
        and said.count("warning: ") == 4
    )
    for name in (
        "cut.png: not a readable image",
        "empty.jpg: not a readable image (empty file)",
        "more/text.jpg: not a readable image",
        "leaves no room for the names",
    ):
        assert name in said
    names = ["a.jpg", "a.png", "a.png.png", "b.png", "more/c.png"]
    content = json.loads((out / "panoptic.json").read_text())
    assert [image["file_name"] for image in content["images"]] == names
    assert all(
        {str(p.relative_to(out / kind)) for p in (out / kind).rglob("*.*")} - {"classes.txt"}
        == {f"{name}.png" for name in names}
        for kind in predict.KINDS
    )
    assert (out / "panoptic" / "a.jpg.png").read_bytes() != (
        out / "panoptic" / "a.png.png"
    ).read_bytes()
    assert (
        len(predict.Pictures(pictures, out, resume=True).names) == 8
    )  # what was predicted is not taken for a picture
    files.release(out)
    # a second call changes nothing, and is refused before there is a model
    monkeypatch.setattr(predict, "restore", lambda *a: pytest.fail("a model was built"))
    for kept in (
        "panoptic.jsonl",
        "panoptic.json",
        *exchange.FILES,
        "panoptic/a.jpg.png",
        "labelme/a.jpg.json",
        "overlay/b.png.png",
    ):
        before = fingerprint(pictures)
        assert predict_stage(small_run, "--input", pictures, "--out", out) == 2
        error = capsys.readouterr().err
        assert (
            f"error: {out / kept}: exists already; " in error
            and "--force" in error
            and error.count("\n") == 1
        )
        assert fingerprint(pictures) == before
        for path in (
            [p for p in out.rglob("*.png") if p != out / "overlay/b.png.png"]
            if kept.startswith("panoptic/")
            else [p for p in (out / "labelme").rglob("*.*")]
            if kept.startswith("labelme/")
            else [out / kept]
        ):
            path.unlink()
        (out / "overlay/b.png.png").touch()
    monkeypatch.undo()
    assert predict_stage(small_run, "--input", pictures / "b.png", "--out", out, "--force") == 0
    assert [image["id"] for image in json.loads((out / "panoptic.json").read_text())["images"]] == [
        "b.png"
    ] and Image.open(out / "overlay/b.png.png").size == (640, 640)


def test_a_labelme_file_that_was_corrected_is_never_replaced(small_run, tmp_path, capsys):
    pictures, out = small_run / "pictures", tmp_path / "out"
    call = (small_run, "--input", pictures / "b.png", "--out", out)
    assert predict_stage(*call) == 0
    (file,) = (out / "labelme").glob("*.json")
    content = json.loads(file.read_text())
    again = [
        {**s, "points": [[float(v) for v in p] for p in s["points"]]} for s in content["shapes"]
    ]
    # opened and saved by labelme, which writes floats, and its own version
    file.write_text(json.dumps({**content, "version": "6.1.0", "shapes": again}, indent=2))
    assert predict_stage(*call, "--force") == 0
    mine = {"label": "sky", "points": [[0, 0], [9, 0], [9, 9]], "group_id": None}
    for changed in ({**content, "shapes": [mine]}, {"shapes": content["shapes"]}, [], "no JSON"):
        text = changed if isinstance(changed, str) else json.dumps(changed)
        file.write_text(text)
        capsys.readouterr()
        assert predict_stage(*call, "--force") == 2
        error = capsys.readouterr().err
        assert f"labelme: {file.name}: not as predict wrote it" in error and error.count("\n") == 1
        (out / "overlay" / "b.png.png").unlink(missing_ok=True)
        assert predict_stage(*call, "--resume") == 2 and file.read_text() == text
    file.unlink()
    assert predict_stage(*call, "--resume") == 0 and file.exists()


def test_a_run_sees_16_bit_pictures_by_its_own_white_point(small_run, tmp_path, capsys):
    eight = np.asarray(Image.open(small_run / "pictures" / "a.png").convert("L"))
    (tmp_path / "deep").mkdir()
    (tmp_path / "plain").mkdir()
    Image.fromarray(eight).save(tmp_path / "plain" / "a.png")
    png_of_16_bits(
        tmp_path / "deep" / "a.png", eight.astype(np.uint16) << 4
    )  # the same in 12 of 16 bits

    def maps(name, *flags):
        assert (
            predict_stage(
                small_run, "--input", tmp_path / name, "--out", tmp_path / "out", "--force", *flags
            )
            == 0
        )
        return (tmp_path / "out" / "panoptic" / "a.png.png").read_bytes(), capsys.readouterr().out

    assert (
        maps("deep", "--white", "4095")[0] == maps("plain")[0]
        and "warning" not in maps("deep", "--white", "4095")[1]
    )
    dark = maps("deep")  # the run was trained on 8 bits: divided by 256
    assert (
        "warning: " in dark[1]
        and "1 pictures that use less than 1/16 of their range" in dark[1]
        and "--white, here 65535; 4095 is that of 12 bits): 'a.png'" in dark[1]
    )
    assert (
        "1 pictures of 16 bits that lose what is brighter than --white 255: 'a.png'"
        in maps("deep", "--white", "255")[1]
    )
    model = dearli.load(small_run / "run", device="cpu", white=4095)
    assert np.array_equal(
        model(tmp_path / "deep" / "a.png").segment_map,
        model(str(tmp_path / "plain" / "a.png")).segment_map,
    )
    assert np.array_equal(model(eight.astype(np.uint16) << 4).segment_map, model(eight).segment_map)


def test_predictions_that_were_killed_are_continued_and_equal_those_that_were_not(
    small_run, tmp_path, capsys
):
    pictures, out = small_run / "pictures", tmp_path / "out"
    assert predict_stage(small_run, "--input", pictures, "--out", tmp_path / "whole") == 0
    write = files.write_atomic

    def slow(path, content):
        write(path, content)
        time.sleep(0.2)

    def killed(*flags):
        files.write_atomic = slow  # in the forked process only
        return predict_stage(small_run, "--input", pictures, "--out", out, *flags)

    for done, file, flags in (
        (0, "semantic/a.png.png", []),
        (1, "panoptic/b.png.png", ["--resume"]),
    ):  # between the files of a picture
        process = fork(lambda: killed(*flags), tmp_path / "said.txt")
        try:
            wait_for(lambda: (out / file).exists())
        finally:
            process.kill()
        assert ended(process) == -signal.SIGKILL
        assert (
            len((out / "panoptic.jsonl").read_text().splitlines()) == 1 + done
            and not (out / "panoptic.json").exists()
        )
    with open(out / "panoptic.jsonl", "a") as log:
        log.write('{"image": {"id": "b.p')  # as if the power had gone in the middle of a line
    (out / "panoptic" / ".a.png.png.1.tmp").write_text("half")
    first = (out / "panoptic" / "a.png.png").stat().st_mtime_ns
    capsys.readouterr()
    assert (
        predict_stage(small_run, "--input", pictures, "--out", out) == 2
        and "--resume" in capsys.readouterr().err
    )
    assert predict_stage(small_run, "--input", pictures, "--out", out, "--resume") == 0
    assert (
        "3 pictures, 2 of them made now" in capsys.readouterr().out
        and (out / "panoptic" / "a.png.png").stat().st_mtime_ns == first
    )

    def relative(folder):
        return {
            path.replace(str(folder), ""): value
            for path, value in fingerprint(folder).items()
            if not path.endswith(".jsonl")
        }

    assert relative(out) == relative(tmp_path / "whole")
    assert (
        predict_stage(small_run, "--input", pictures, "--out", out, "--resume") == 0
        and "0 of them made now" in capsys.readouterr().out
    )
    (out / "overlay" / "b.png.png").unlink()  # what is gone is made again
    assert predict_stage(
        small_run, "--input", pictures, "--out", out, "--resume"
    ) == 0 and relative(out) == relative(tmp_path / "whole")
    capsys.readouterr()
    assert (
        predict_stage(
            small_run, "--input", pictures, "--out", out, "--resume", "--which", "teacher"
        )
        == 2
    )
    assert (
        "cannot go on with what another model began (which: student there, teacher now"
        in capsys.readouterr().err
        and relative(out) == relative(tmp_path / "whole")
    )


def test_fault_43_a_picture_that_has_become_another_is_predicted_anew(small_run, tmp_path, capsys):
    pictures, out = shutil.copytree(small_run / "pictures", tmp_path / "pictures"), tmp_path / "out"
    assert predict_stage(small_run, "--input", pictures, "--out", out) == 0
    rows = {row["id"]: row for row in json.loads((out / "panoptic.json").read_text())["images"]}
    assert rows["a.png"]["sha256"] == hashlib.sha256((pictures / "a.png").read_bytes()).hexdigest()
    shutil.copy(pictures / "b.png", pictures / "a.png")
    capsys.readouterr()
    assert predict_stage(small_run, "--input", pictures, "--out", out, "--resume") == 0
    assert "3 pictures, 1 of them made now" in capsys.readouterr().out
    assert (out / "panoptic" / "a.png.png").read_bytes() == (
        out / "panoptic" / "b.png.png"
    ).read_bytes()


def test_rows_of_before_there_were_labelme_files_are_predicted_anew(small_run, tmp_path, capsys):
    pictures, out = small_run / "pictures", tmp_path / "out"
    assert predict_stage(small_run, "--input", pictures, "--out", out) == 0
    before = fingerprint(out)
    rows = [json.loads(line) for line in (out / "panoptic.jsonl").read_text().splitlines()]
    for row in rows:
        row.pop("objects", None)
    (out / "panoptic.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    shutil.rmtree(out / "labelme")
    capsys.readouterr()
    assert predict_stage(small_run, "--input", pictures, "--out", out, "--resume") == 0
    assert "3 of them made now" in capsys.readouterr().out and fingerprint(out) == before


CELLS = ground_truth.Taxonomy(("cell, blood cell", "rod", "glass"), (True, True, False), (7, 3, 9))


def drawn_map(*masks):
    """Segments in this order, the later ones on top."""
    segment_map = np.zeros(masks[0].shape, np.int32)
    for k, mask in enumerate(masks, 1):
        segment_map[mask] = k
    return segment_map


def write_exchange(root, maps, taxonomy=CELLS):
    """What `--stage predict` writes for programs of others. maps: segment map and labels by name
    of the picture. Returns the rows."""
    rows = []
    for name, (segment_map, labels) in sorted(maps.items()):
        picture = root / "pictures" / name
        picture.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.zeros((*segment_map.shape, 3), np.uint8)).save(picture)
        scores = np.linspace(0.5, 0.9, len(labels))
        result = predict.Prediction(None, segment_map, np.array(labels), scores, None, taxonomy)
        file = root / "out" / "labelme" / exchange.labelme_files(maps)[name]
        segments = result.segments_info()
        objects = exchange.write_picture(picture, file, segment_map, segments, taxonomy)
        height, width = segment_map.shape
        image = {"id": name, "file_name": name, "width": width, "height": height}
        annotation = {"image_id": name, "file_name": f"{name}.png", "segments_info": segments}
        rows.append({"image": image, "annotation": annotation, "objects": objects})
    exchange.write_folder(root / "out", rows, taxonomy, {"weights": "none"})
    return rows


def brought_back(target, maps, taxonomy):
    """Of a folder that was imported: the smallest IoU of a drawn segment with one of its class, and
    how many segments of drawn classes there are. maps: as in `write_exchange`."""
    drawn, found, least, count = exchange.drawn(taxonomy), {}, 1.0, 0
    kinds = {taxonomy.names[k] for k in np.flatnonzero(drawn)}
    for part in ("train", "val"):
        content = json.loads((target / f"panoptic_{part}.json").read_text())
        names = {c["id"]: c["name"] for c in content["categories"]}
        for a in content["annotations"]:
            ids = panoptic.segment_ids(target / "panoptic" / a["file_name"])
            found[Path(a["file_name"]).stem] = (
                ids,
                [(names[s["category_id"]], s["id"]) for s in a["segments_info"]],
            )
    for name, (segment_map, labels) in maps.items():
        ids, segments = found.get(name.replace("/", "_").rsplit(".", 1)[0], (None, []))
        count += sum(kind in kinds for kind, _ in segments)
        for k in (k for k, label in enumerate(labels, 1) if drawn[label]):
            mask, own = segment_map == k, taxonomy.names[labels[k - 1]]
            same = [ids == i for kind, i in segments if kind == own]
            least = min(least, max(((m & mask).sum() / (m | mask).sum() for m in same), default=0))
    return least, count


def import_exchange(kind, root, maps, taxonomy=CELLS, **flags):
    """`brought_back` of what `write_exchange` wrote."""
    source = root / "out" / ("labelme" if kind == "labelme" else "")
    importer.import_folder(kind, source, root / kind, **flags)
    return brought_back(root / kind, maps, taxonomy)


def hard_maps():
    """Segment maps with what is hard to draw as a polygon, and labels of CELLS."""
    ys, xs = np.mgrid[:60, :80]

    def disc(y, x, radius):
        return (ys - y) ** 2 + (xs - x) ** 2 <= radius**2

    def line(*places):
        mask = np.zeros(ys.shape, bool)
        mask[places] = True
        return mask

    ring = disc(20, 20, 15) & ~disc(20, 20, 11) & ~disc(20, 6, 1)
    holes = disc(20, 60, 14) & ~disc(16, 55, 3) & ~disc(24, 62, 4) & ~line(20, 70)
    inner = disc(20, 20, 5)
    thread = line(50, np.arange(5, 60)) | line(np.arange(44, 50), 40)
    slope = line(np.arange(36, 48), np.arange(10, 22))
    dust = line(2, 2), line(0, 79), line(59, 0)
    apart = disc(55, 70, 3) | disc(45, 74, 2) | line(40, 60)
    edge = (ys >= 56) & (xs >= 20) & (xs < 30)
    ten = line([40, 40, 40, 41, 41, 41, 42, 42, 42, 43], [50, 51, 52, 50, 51, 52, 50, 51, 52, 51])
    shapes = (ring, holes, inner, thread, slope, *dust, apart, edge, ten)
    touching = disc(15, 20, 9), disc(15, 37, 9) & (xs > 28), (ys > 24) & (ys < 30), disc(24, 50, 2)
    return {
        "hard.png": (drawn_map(*shapes), [0, 1] + 9 * [0]),
        "day 1/touching.png": (drawn_map(xs >= 0, *touching), [2, 0, 0, 1, 1]),
        "day 1/nothing.png": (np.zeros((40, 30), np.int32), []),
        "glass.png": (drawn_map(xs >= 0), [2]),
        "all.png": (drawn_map(xs >= 0), [1]),
    }


def test_a_call_that_could_read_no_picture_is_in_nobodys_way(small_run, tmp_path, capsys):
    pictures, out = tmp_path / "pictures", tmp_path / "out"
    pictures.mkdir()
    (pictures / "a.png").write_bytes(b"no image")
    assert predict_stage(small_run, "--input", pictures, "--out", out) == 2
    assert "1 of 1 pictures could not be read" in capsys.readouterr().err
    shutil.copy(small_run / "pictures" / "a.png", pictures / "a.png")
    assert predict_stage(small_run, "--input", pictures, "--out", out) == 0


def test_the_command_that_predict_prints_brings_its_files_back(small_run, tmp_path, capsys):
    pictures, out = shutil.copytree(small_run / "pictures", tmp_path / "pictures"), tmp_path / "out"
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.open(pictures / "b.png").resize((96, 64)).save(pictures / "turned.jpg", exif=exif)
    assert predict_stage(small_run, "--input", pictures, "--out", out) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "to correct" in line]
    then = "; then, with --join DIR into the data set DIR: python "
    labelme, command = line.removeprefix("to correct them: labelme ").split(then)
    script, *flags, to, new = shlex.split(command)
    assert labelme == str(out / "labelme") and script == "dearli.py"
    assert (to, new) == ("--out", "NEW") and dearli.main([*flags, to, str(tmp_path / "one")]) == 0
    assert "4 of 4 files are as --stage predict wrote them" in capsys.readouterr().out
    flags = "--stage", "import", "--from", "coco-instances", "--input", out
    assert run(*flags, "--out", tmp_path / "two") == 0
    maps, taxonomy = {}, scenes.mini_taxonomy()
    for a in json.loads((out / "panoptic.json").read_text())["annotations"]:
        labels = [taxonomy.ids.index(s["category_id"]) for s in a["segments_info"]]
        maps[a["image_id"]] = panoptic.segment_ids(out / "panoptic" / a["file_name"]), labels
    assert maps["turned.jpg"][0].shape == (96, 64)
    for folder in ("one", "two"):
        least, count = brought_back(tmp_path / folder, maps, taxonomy)
        assert least >= 0.95 and count == sum(len(labels) for _, labels in maps.values()) > 3


def test_borders_of_any_mask_fill_exactly_its_pixels():
    rng = np.random.default_rng(0)
    for _ in range(300):
        mask = rng.random(rng.integers(1, 16, 2)) < rng.choice([0.1, 0.3, 0.5, 0.7, 0.9])
        parts = outlines.parts(mask)
        polygons = [outlines._joined(borders) for borders in parts]
        assert np.array_equal(outlines.fill(polygons, mask.shape), mask)
        for line in (line for borders in parts for line in borders):
            # sides along the axes, corners at each point
            steps = np.sign(np.roll(line, -1, axis=0) - line)
            assert (np.abs(steps).sum(1) == 1).all()
            assert (steps != np.roll(steps, 1, axis=0)).any(1).all()
    ((square, hole),) = outlines.parts(np.pad(np.zeros((1, 1), bool), 1, constant_values=True))
    assert sorted(square.tolist()) == [[0, 0], [0, 3], [3, 0], [3, 3]]
    assert sorted(hole.tolist()) == [[1, 1], [1, 2], [2, 1], [2, 2]]
    assert len(outlines.parts(np.eye(9, dtype=bool))) == 1  # pixels that meet at corners are one


@pytest.mark.parametrize("kind", ["labelme", "coco-instances"])
def test_predictions_come_back_through_import(kind, tmp_path):
    maps = hard_maps()
    rows = write_exchange(tmp_path, maps)
    assert exchange.next_step(tmp_path, rows, CELLS).endswith(" --background glass --out NEW")
    least, count = import_exchange(kind, tmp_path, maps, background="glass")
    assert least >= 0.95 and count == 11 + 4 + 1


@pytest.mark.parametrize("kind", ["labelme", "coco-instances"])
def test_random_blobs_that_touch_come_back_through_import(kind, tmp_path):
    rng, maps = np.random.default_rng(3), {}
    for i in range(6):
        # cells of the nearest seed, some left out, frayed by noise; stuff of two classes
        seeds, shape = rng.integers(0, 70, (40, 2)), (64, 70)
        grid = np.stack(np.mgrid[:64, :70], -1)[:, :, None] + rng.normal(0, 0.4, (*shape, 1, 2))
        nearest = np.square(grid - seeds).sum(-1).argmin(-1)
        kept = rng.permutation(40)[:30]
        segment_map = np.zeros(shape, np.int32)
        for k in (k for k in kept if (nearest == k).any()):
            segment_map[nearest == k] = segment_map.max() + 1
        labels = [*rng.integers(0, 2, segment_map.max() - 2), 2, 3]
        maps[f"{i}.png"] = segment_map, labels
    names, things = ("a", "b", "sky", "grass"), (True, True, False, False)
    taxonomy = ground_truth.Taxonomy(names, things, (1, 2, 3, 4))
    rows = write_exchange(tmp_path, maps, taxonomy)
    assert exchange.next_step(tmp_path, rows, taxonomy).endswith(" --stuff sky,grass --out NEW")
    unseen = exchange.next_step(tmp_path, [], taxonomy)
    assert "--stuff" not in unseen  # import would refuse it
    assert "to be named as well if you draw it: sky, grass\nto correct them: " in unseen
    least, count = import_exchange(kind, tmp_path, maps, taxonomy, stuff="sky,grass")
    assert least >= 0.95 and count == sum(len(labels) for _, labels in maps.values())


def test_simple_outlines_of_many_take_little_of_one_between_them(tmp_path):
    # a web of walls between cells that are smaller than all of it, and so on top of it
    seeds = np.random.default_rng(0).integers(0, 96, (30, 2))
    grid = np.stack(np.mgrid[:96, :96], -1)[:, :, None]
    distances = np.sqrt(np.square(grid - seeds).sum(-1))
    first, second = np.partition(distances, 1, axis=-1)[..., :2].transpose(2, 0, 1)
    cells = np.where(second - first > 1.0, distances.argmin(-1) + 2, 1)
    segment_map = np.unique(cells, return_inverse=True)[1].reshape(cells.shape).astype(np.int32) + 1
    areas = np.bincount(segment_map.ravel())[1:]
    assert areas[0] > areas[1:].max()
    maps = dict.fromkeys(("a.png", "b.png"), (segment_map, [1] + [0] * (len(areas) - 1)))
    write_exchange(tmp_path, maps)
    least, count = import_exchange("labelme", tmp_path, maps)
    assert least >= 0.95 and count == 2 * len(areas)


def test_outlines_are_simple_where_that_costs_little():
    ys, xs = np.mgrid[:80, :80]
    box, disc = (ys > 9) & (ys < 40) & (xs > 9) & (xs < 70), (ys - 60) ** 2 + (xs - 40) ** 2 < 200
    segment_map = drawn_map(box, disc)
    (rectangle,), (circle,) = outlines.outlines(
        segment_map, np.bincount(segment_map.ravel())[1:], np.array([True, True])
    )
    assert sorted(rectangle.tolist()) == [[10, 10], [10, 40], [70, 10], [70, 40]]
    exact = outlines.parts(disc)[0][0]
    assert len(circle) < 20 < len(exact)
    filled = outlines.fill([circle], disc.shape)
    assert (filled & disc).sum() / (filled | disc).sum() >= outlines.LEAST


def test_coco_instances_of_predictions_are_what_pycocotools_reads(tmp_path):
    coco = pytest.importorskip("pycocotools.coco")
    maps = hard_maps()
    rows = write_exchange(tmp_path, maps)
    data = coco.COCO(str(tmp_path / "out" / "instances.json"))
    assert [c["name"] for c in data.loadCats(data.getCatIds())] == ["rod", "cell, blood cell"][::-1]
    assert [i["file_name"] for i in data.loadImgs(data.getImgIds())] == sorted(maps)
    for number, row in enumerate(rows, 1):
        segments = [s for s in row["annotation"]["segments_info"] if s["category_id"] != 9]
        annotations = data.loadAnns(data.getAnnIds(imgIds=number))
        assert len(annotations) == len(segments)
        for a, segment in zip(annotations, segments):
            same = "category_id area bbox iscrowd score".split()
            assert [a[key] for key in same] == [segment[key] for key in same] and not a["iscrowd"]
            mask = maps[row["image"]["file_name"]][0] == segment["id"]
            filled = data.annToMask(a) > 0
            assert (filled & mask).sum() / (filled | mask).sum() >= 0.95


def test_objects_and_counts_are_tables_of_what_was_found(tmp_path):
    disc = np.zeros((6, 8), bool)
    disc[1:4, 2:6] = True
    dot = np.zeros((6, 8), bool)
    dot[5, 7] = True
    maps = {
        "a, b.png": (drawn_map(np.ones((6, 8), bool), disc, dot), [2, 0, 1]),
        "none.png": (np.zeros((3, 5), np.int32), []),
    }
    write_exchange(tmp_path, maps)
    assert (tmp_path / "out" / "objects.csv").read_text() == (
        "picture,number,class,score,area,diameter,x,y,left,top,width,height\n"
        '"a, b.png",2,cell,0.7,12,3.91,4.0,2.5,2,1,4,3\n'
        '"a, b.png",3,rod,0.9,1,1.13,7.5,5.5,7,5,1,1\n'
    )
    assert (tmp_path / "out" / "counts.csv").read_text() == (
        "picture,width,height,cell,rod,cell (pixels),rod (pixels),glass (pixels),no answer (pixels)\n"
        '"a, b.png",8,6,1,1,12,1,35,0\nnone.png,5,3,0,0,0,0,0,15\n'
    )
    # names that share their first word are told apart, and classes may be more than 255
    many = tuple(f"crane, kind {k}" if k < 2 else f"c{k}" for k in range(300))
    taxonomy = ground_truth.Taxonomy(many, (True,) * 300, tuple(range(1, 301)))
    write_exchange(tmp_path / "many", {"a.png": (drawn_map(disc, dot), [1, 299])}, taxonomy)
    header, row = (tmp_path / "many" / "out" / "counts.csv").read_text().splitlines()
    assert header.startswith('picture,width,height,"crane, kind 0","crane, kind 1",c2,')
    *counts, rest = (int(value) for value in row.split(",")[3:])
    counts, pixels = counts[:300], counts[300:]
    assert [k for k, count in enumerate(counts) if count] == [1, 299] and sum(counts) == 2
    assert (pixels[1], pixels[299], sum(pixels), rest) == (12, 1, 13, 48 - 13)


def test_labelme_finds_its_files_and_pictures_of_one_stem_do_not_meet(tmp_path):
    assert exchange.labelme_files(["a.jpg", "b/a.png", "c.tif"]) == {
        "a.jpg": "a.json",
        "b/a.png": "b/a.json",
        "c.tif": "c.json",
    }
    files = exchange.labelme_files(["a.jpg", "A.png", "a.png.png", "b.jpg"])
    assert files == {
        "a.jpg": "a.jpg.json",
        "A.png": "A.png.json",
        "a.png.png": "a.png.png.json",
        "b.jpg": "b.json",
    }
    write_exchange(tmp_path, hard_maps())
    folder = tmp_path / "out" / "labelme"
    content = json.loads((folder / "day 1" / "touching.json").read_text())
    assert content["imagePath"] == "touching.png" and content["imageData"] is None
    assert (content["imageHeight"], content["imageWidth"]) == (60, 80)
    assert (folder / "day 1" / "touching.png").samefile(
        tmp_path / "pictures" / "day 1" / "touching.png"
    )
    assert {shape["label"] for shape in content["shapes"]} == {"cell, blood cell", "rod"}
    assert content["shapes"][-1]["description"] == "score 0.90"  # the smallest, so it can be picked
    assert json.loads((folder / "day 1" / "nothing.json").read_text())["shapes"] == []
    groups = [s["group_id"] for s in json.loads((folder / "hard.json").read_text())["shapes"]]
    assert sorted(group for group in groups if group) == [9, 9, 9] and groups.count(None) == 10


def test_pictures_of_any_size_and_mode_are_predicted_as_they_are_shown(small_run, tmp_path):
    pictures, out = tmp_path / "pictures", tmp_path / "out"
    pictures.mkdir()
    scene = Image.fromarray(microcosm.scene("val", 0).image).resize((96, 64))
    exif = Image.Exif()
    exif[0x0112] = 6
    scene.convert("L").save(pictures / "grey.png")
    Image.fromarray((np.asarray(scene.convert("L")).astype(np.uint16) << 8)).save(
        pictures / "deep.png"
    )
    (
        scene.convert("RGBA").save(pictures / "alpha.png"),
        scene.convert("CMYK").save(pictures / "cmyk.tif"),
        scene.save(pictures / "turned.jpg", exif=exif),
    )
    sizes = {
        "grey.png": (64, 96),
        "deep.png": (64, 96),
        "alpha.png": (64, 96),
        "cmyk.tif": (64, 96),
        "turned.jpg": (96, 64),
    }
    for name, size in {"wide.png": (5000, 20), "one.png": (1, 1), "tall.png": (1, 50)}.items():
        scene.resize(size).save(pictures / name)
        sizes[name] = size[::-1]
    assert predict_stage(small_run, "--input", pictures, "--out", out, "--test-max", 256) == 0
    for image in json.loads((out / "panoptic.json").read_text())["images"]:
        assert (image["height"], image["width"]) == sizes[image["id"]]
        for kind in ("panoptic", "semantic"):
            assert Image.open(out / kind / f"{image['id']}.png").size[::-1] == sizes[image["id"]]
    ids = {name: panoptic.segment_ids(out / "panoptic" / f"{name}.png") for name in sizes}
    assert (
        np.array_equal(ids["grey.png"], ids["deep.png"]) and len(np.unique(ids["turned.jpg"])) > 1
    )
    model = dearli.load(small_run / "run", test_max=256, device="cpu")
    array = np.asarray(scene)
    for given in (scene, array, scene.convert("RGBA")):
        assert np.array_equal(model(given).segment_map, ids["alpha.png"])
    assert np.array_equal(
        model(array[..., 0]).segment_map, model(Image.fromarray(array[..., 0])).segment_map
    )
    for given in (array.astype(np.float32)[..., 0], array[..., :2]):
        with pytest.raises((ValueError, TypeError)):
            model(given)
    with pytest.raises(TypeError, match="no flag where"):
        dearli.load(small_run / "run", where="here")


def test_a_run_is_applied_without_its_data_set_and_an_older_one_asks_for_it(
    small_run, tmp_path, capsys
):
    root, picture = write_coco_folder(tmp_path / "set"), small_run / "pictures" / "a.png"
    flags = [
        "--dataset",
        "custom",
        "--data-root",
        root,
        "--runs",
        tmp_path / "runs",
        "--steps",
        1,
        "--workers",
        0,
        "--no-eval",
    ]
    assert run("--stage", "sup", *flags) == 0
    folder = tmp_path / "runs" / "set-sup-4"
    assert json.loads((folder / "config.json").read_text())["taxonomy"]["ids"][:2] == [7, 17]
    root.rename(tmp_path / "elsewhere")
    assert predict_stage(None, "--input", picture, "--out", tmp_path / "out", weights=folder) == 0
    assert {
        s["category_id"] % 10
        for a in json.loads((tmp_path / "out" / "panoptic.json").read_text())["annotations"]
        for s in a["segments_info"]
    } <= {7}
    path = checkpoint.steps(folder)[-1]
    state = tensor_files.load(path)
    capsys.readouterr()

    def change(taxonomy):
        state["config"].pop("taxonomy", None)
        state["config"] |= {} if taxonomy is None else {"taxonomy": taxonomy}
        checkpoint.save(folder, state["step"], state)
        return predict_stage(
            None, "--input", picture, "--out", tmp_path / "out", "--force", weights=folder
        ), capsys.readouterr().err.splitlines()[-1]

    code, error = change(None)
    assert (
        code == 2
        and f"error: {folder}: does not store its classes" in error
        and f"{root}: no such folder" in error
    )
    (tmp_path / "elsewhere").rename(root)
    assert change(None)[0] == 0
    for broken in (
        {},
        [],
        {"names": ["a"], "things": [True, False], "ids": [1], "palette": None},
        {"names": [], "things": [], "ids": [], "palette": None},
        {"names": ["a"], "things": [1], "ids": [1], "palette": None},
        {"names": ["a"], "things": [True], "ids": [1], "palette": [[1, 2]]},
        {"names": ["a"], "things": [True], "ids": [1], "palette": [[1, 2, 256]]},
    ):
        code, error = change(broken)
        assert code == 2 and f"error: {folder}: its taxonomy is " in error, error

    # an older run is resumed, one of other classes is not
    def differs(stored):
        return sameness.differing(stored, {"stage": "sup", "taxonomy": {"names": ["b"]}})

    assert differs({"stage": "sup"}) == [] and differs(
        {"stage": "sup", "taxonomy": {"names": ["a"]}}
    ) == ["taxonomy"]


def test_an_official_file_predicts_what_its_run_predicts(small_run, tmp_path):
    assert (
        dearli.main(
            [
                "--stage",
                "export",
                "--weights",
                str(small_run / "run"),
                "--out",
                str(tmp_path / "student.pth"),
            ]
        )
        == 0
    )
    picture = Image.open(small_run / "pictures" / "a.png")
    config = checkpoint.newest(small_run / "run")["config"]
    numbers = {name: config[name] for name in READS["predict"] - DEEPLAB_FIELDS}
    del numbers["object_width"]  # refused where images are shown by their short side
    del numbers["least_score"], numbers["least_quality"]  # and these of segments that compete
    one, two = (
        dearli.load(small_run / "run", device="cpu")(picture),
        dearli.load(tmp_path / "student.pth", dataset="mini", device="cpu", **numbers)(picture),
    )
    assert (
        np.array_equal(one.segment_map, two.segment_map)
        and np.array_equal(one.semantic, two.semantic)
        and one.names == two.names
    )


def test_the_snippets_of_the_documents_work(small_run, tmp_path, monkeypatch, capsys):
    (tmp_path / "runs").mkdir()
    shutil.copytree(small_run / "run", tmp_path / "runs" / "mini-dearli-16")
    shutil.copy(small_run / "pictures" / "a.png", tmp_path / "picture.jpg")
    monkeypatch.chdir(tmp_path)
    readme = (ROOT / "README.md").read_text()
    snippet = textwrap.dedent(
        predict.__doc__.split("(`--stage predict`).")[1].split("For a picture")[0]
    )
    for snippet in [snippet, *re.findall(r"```python\n(.*?)```", readme, re.S)]:
        (tmp_path / "overlay.png").unlink(missing_ok=True)
        exec(snippet, {})
        assert (
            Image.open(tmp_path / "overlay.png").size == (640, 640)
            and "(128, 128)" in capsys.readouterr().out
        )


def test_force_leaves_nothing_of_an_earlier_call(small_run, tmp_path, capsys):
    pictures, out = tmp_path / "in", tmp_path / "out"
    shutil.copytree(small_run / "pictures", pictures)
    assert predict_stage(small_run, "--input", pictures, "--out", out) == 0
    (out / "results.json").write_text("[]")  # of a run of instances
    (pictures / "a.png").unlink()
    edited = out / "labelme" / "a.json"
    own = edited.read_text()
    rewrite(edited, lambda content: content["shapes"].append({"label": "x"}))
    assert predict_stage(small_run, "--input", pictures, "--out", out, "--force") == 2
    assert "a.json: not as predict wrote it" in capsys.readouterr().err and edited.exists()
    edited.write_text(own)
    assert predict_stage(small_run, "--input", pictures, "--out", out, "--force") == 0
    assert not [path for path in out.rglob("*") if path.name.startswith(("a.", "results"))]
    assert sorted(path.name for path in (out / "labelme").rglob("*.json")) == ["b.json", "c.json"]
    (pictures / "b.png").write_text("no picture any more")
    assert predict_stage(small_run, "--input", pictures, "--out", out, "--force") == 2
    assert not [path for path in out.rglob("*") if path.name.startswith("b.")]
    shutil.copy(small_run / "pictures" / "b.png", pictures)
    assert predict_stage(small_run, "--input", pictures, "--out", out, "--force") == 0
    # going on keeps what is there, and says what of it is not of these pictures
    shutil.copytree(small_run / "pictures" / "more", tmp_path / "other")
    capsys.readouterr()
    flags = ("--input", tmp_path / "other", "--out", out, "--resume")
    assert predict_stage(small_run, *flags) == 0
    said = capsys.readouterr().out
    assert f"2 pictures of earlier calls as well, which are not in {tmp_path / 'other'}" in said


def test_what_predict_wrote_is_no_input_of_the_call_that_replaces_it(small_run, tmp_path, capsys):
    out = tmp_path / "out"
    assert predict_stage(small_run, "--input", small_run / "pictures", "--out", out) == 0
    before = fingerprint(out)
    for folder in (out / "labelme", out / "labelme" / "more", out / "overlay"):
        assert predict_stage(small_run, "--input", folder, "--out", out, "--force") == 2
        assert f"{folder}: is what --out {out} holds" in capsys.readouterr().err
    assert fingerprint(out) == before
    one = out / "labelme" / "a.png"
    assert predict_stage(small_run, "--input", one, "--out", out, "--force") == 0 and one.exists()


def test_corrections_in_folders_are_found_too(tmp_path):
    (tmp_path / "labelme" / "day1").mkdir(parents=True)
    (tmp_path / "instances.json").write_text("{}")
    (tmp_path / "labelme" / "day1" / "a.json").write_text('{"shapes": []}')
    with pytest.raises(UserError, match=r"1 files in .* are corrected \('day1/a.json'\)"):
        exchange.require_corrections("coco-instances", tmp_path)


def test_a_data_set_is_no_matter_of_a_prediction_by_a_run(small_run, tmp_path, capsys):
    for flag in (("--split", 3), ("--dataset", "coco")):
        flags = ("--input", small_run / "pictures", "--out", tmp_path / "out", *flag)
        assert predict_stage(small_run, *flags) == 2
        assert f"error: {flag[0]}: {small_run / 'run'} knows its classes" in capsys.readouterr().err
