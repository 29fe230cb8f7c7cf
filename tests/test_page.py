"""report.html: its numbers, its names, its commands, and how a browser shows it."""

import dataclasses
import html
import html.parser
import json
import math
import os
import platform
import random
import re
import shlex
import shutil
import subprocess
from datetime import datetime

import numpy as np
import pytest
import torch

import dearli
from config import METHODS, dashed
from engine import sessions
from engine.begin import identity
from engine.flags import configure, preset_of
from engine.parser import parser
from engine.resolve import resolve
from mini import scenes
from readers import sixteen_bit
from report import charts, gallery, page, run_folder, warm_up
from tests.helpers import TINY_FLAGS, fitting, run, wait_for, write_coco_folder

EVIL = """<script>alert(1)</script>&"'"""


def report(folder, *flags):
    flags = ["--weights", folder, "--device", "cpu", *flags]
    return dearli.main(["--stage", "report", *map(str, flags)])


@pytest.fixture(scope="session")
def reported(tmp_path_factory):
    """Folder of a run with masks, on a data set one of whose classes, one image and the folder of
    the run are named to break a page.
    """
    root = write_coco_folder(tmp_path_factory.mktemp("reported") / "set")
    name = "<img src=x onerror=alert(1)>&\"'.png"
    for part in ("train", "val"):
        path = root / f"panoptic_{part}.json"
        content = json.loads(path.read_text())
        content["categories"][-1]["name"], content["images"][0]["file_name"] = EVIL, f"{part}{name}"
        (root / "images" / f"{part}0.png").rename(root / "images" / f"{part}{name}")
        path.write_text(json.dumps(content))
    flags = [*TINY_FLAGS[: TINY_FLAGS.index("--split")], "--split", "3", "--device", "cpu"]
    flags += ["--report-images", "12"]
    own = ["--dataset", "custom", "--preset", "mini", "--data-root", root, "--runs", root.parent]
    folder = root.parent / "a<b>&\"' run"
    ssl = ["--stage", "ssl", "--method", "dear", "--steps", 5, "--lr", "0.0003", "--out", folder]
    for stage in (["--stage", "masks", "--sam", "regions"], ssl):
        assert dearli.main(fitting([*own, *stage], flags)) == 0
    written = (folder / "report.html").read_bytes()
    again = ["--stage", "report", "--out", folder, "--runs", root.parent, "--device", "cpu"]
    assert dearli.main(list(map(str, again))) == 0  # a run knows its data and its numbers
    assert (folder / "report.html").read_bytes() == written
    metrics, rng = json.loads((folder / "metrics.json").read_text()), random.Random(0)
    tables = []
    for reading in metrics.values():
        if isinstance(reading, dict):
            tables += [reading, *(reading[group] for group in ("all", "things", "stuff"))]
            tables += reading["per_class"].values()
    for figures in tables:  # after 5 steps most are 0
        figures |= {
            k: rng.randint(1, 999) if isinstance(v, int) else rng.random()
            for k, v in figures.items()
            if isinstance(v, (int, float))
        }
    (folder / "metrics.json").write_text(json.dumps(metrics))
    assert report(folder, "--runs", root.parent) == 0
    return folder


class Outline(html.parser.HTMLParser):
    """Fails on a page whose elements are not closed in order; collects addresses, cells by table,
    and text.
    """

    def __init__(self, page):
        super().__init__()
        self.open, self.addresses, self.cells, self.text, self.table = [], [], {}, "", None
        self.feed(page)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        links = ("src", "href", "action", "srcset", "data", "poster")
        self.addresses += [v for k, v in attributes.items() if k in links]
        assert not any(k.startswith("on") for k in attributes)
        self.table = attributes.get("id") if tag == "table" else self.table
        if tag == "td" and attributes.get("data-v"):
            self.cells.setdefault(self.table, []).append(float(attributes["data-v"]))
        if tag not in ("meta", "link", "img"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        pass  # <line ... /> inside of an SVG

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, text):
        self.text += text


def page_of(folder, cards=None):
    return page.write(folder, [run_folder.read(folder)], None, cards or {}).read_bytes().decode()


def numbers_in_svg(page):
    svgs = "".join(re.findall("<svg.*?</svg>", page, re.S))
    places = re.findall(r'\b(?:x|y|x1|x2|y1|y2|cx|cy)="([^"]*)"', svgs)
    places += re.split("[ML ]+", " ".join(re.findall(r'\bd="M([^"]*)"', svgs)))
    return [float(place) for place in places if place]


def test_a_report_is_one_sound_file_with_the_numbers_of_the_run_and_names_that_are_text(reported):
    page = (reported / "report.html").read_bytes().decode()
    metrics = json.loads((reported / "metrics.json").read_text())
    outline = Outline(page)
    assert (
        page.count("<script") == 1
        and EVIL in outline.text
        and "val<img src=x onerror=alert(1)>&\"'.png" in outline.text
        and "<h1>a&lt;b&gt;&amp;" in page
    )
    assert all(a.startswith(("data:", "#")) for a in outline.addresses) and "//" not in re.sub(
        '"data:[^"]*"', "", page
    )
    readings = ["student/decoder", "student/ensemble", "teacher/decoder", "teacher/ensemble"]
    figures = [("all", "pq"), ("things", "pq"), ("stuff", "pq"), ("all", "sq"), ("all", "rq")]
    assert outline.cells["readings"] == [
        v for r in readings for v in [*(metrics[r][a][b] for a, b in figures), metrics[r]["miou"]]
    ]
    rows = metrics["student/ensemble"]["per_class"].values()
    assert {
        row[k] for row in rows for k in ("pq", "sq", "rq", "semantic_iou", "tp", "fp", "fn")
    } <= set(outline.cells["classes"]) and len(outline.cells["classes"]) == 8 * len(rows)
    assert (
        page.count("the paper’s reading</em>") == 1
        and page.index("student, with the ensemble <em") > 0
        and outline.text.count("SAM masks") == 3
    )  # 3 unlabelled images
    assert numbers_in_svg(page) and all(map(math.isfinite, numbers_in_svg(page)))


def test_the_commands_of_a_report_remake_the_configuration(reported, small_mini, tmp_path):
    images, masks = reported.parent / "set" / "images", reported.parent / "set-masks"
    dewa = ["--stage", "dewa", "--images", images, "--masks", masks, "--steps", 1]
    assert run(*dewa, "--out", tmp_path / "dewa") == 0
    ssl = ["--stage", "ssl", "--steps", 1, "--no-eval"]
    warm = ["--method", "dearli", "--init", tmp_path / "dewa", "--burn-in-warm", 0, "--seed", 3]
    assert run(*ssl, *warm, "--lambda-u", 0.5, "--out", tmp_path / "warm") == 0
    custom = ["--method", "ssl", "--preset", "custom", "--classifier", "language"]
    assert run(*ssl, *custom, "--alpha", "0.4:0.8", "--out", tmp_path / "custom") == 0
    for folder, number in ((reported, 1), (tmp_path / "warm", 3), (tmp_path / "custom", 1)):
        made = run_folder.commands(run_folder.read(folder))
        assert len(made) == number
        args = parser().parse_args(shlex.split(made[-1])[2:] + ["--device", "cpu"])
        request = resolve(args)
        cfg = request["cfg"]
        stored = json.loads((folder / "config.json").read_text())
        assert {k: stored[k] for k in dataclasses.asdict(cfg)} == dataclasses.asdict(
            dataclasses.replace(cfg, white=sixteen_bit.WHITE, stretch=False).settled()
        ) and request["place"].out == folder
        taxonomy = scenes.mini_taxonomy()
        assert identity(request["source"], args.method or "ssl", taxonomy) | {"taxonomy": 0} == {
            k: stored[k] for k in ("stage", "dataset", "data_root", "variant", "split")
        } | {"taxonomy": 0}


@pytest.mark.parametrize("method", METHODS)
def test_the_command_names_what_its_method_would_set_otherwise(method, tmp_path):
    """Steps and more of the preset's own values, where a method has others."""
    flags = ["--stage", "ssl", "--method", method, "--dataset", "mini", "--steps", "500"]
    sets = METHODS[method].on("mini").keys() & {"jitter_prob", "class_threshold", "guided_steps"}
    preset = preset_of("mini", METHODS[method].numbers.get("network", "mask2former"))
    for key in sorted(sets):
        flags += [dashed(key), str(getattr(preset, key))]
    cfg = configure(parser().parse_args(flags)).settled()
    numbers = {"stage": method, "dataset": "mini", "split": "16", **dataclasses.asdict(cfg)}
    (tmp_path / "config.json").write_text(json.dumps(numbers))
    made = run_folder.commands(run_folder.read(tmp_path))[-1]
    again = configure(parser().parse_args(shlex.split(made)[2:])).settled()
    assert again == cfg, made


def test_runs_without_figures_log_or_weights_still_have_a_page(
    reported, small_mini, tmp_path, capsys
):
    folder, log = tmp_path / "run", (reported / "log.jsonl").read_text().splitlines(keepends=True)
    skipped = {"step": 2, "lr": 1e-4, "time": 9.0, "skipped": "loss is nan", "images": [EVIL]}
    huge = [{"step": k, "lr": 1e-4, "loss": (-1) ** k * 1e308, "time": k + 1} for k in range(2)]
    folder.mkdir()
    shutil.copy(reported / "config.json", folder)
    assert "no metrics.json" in page_of(folder) and "no log.jsonl" in page_of(folder)
    assert "--stage eval --weights</code> with its folder does it" in page_of(folder)
    for content, words in (
        ("".join(log[:1]), "1 step;"),
        ("".join(log)[:-30], "4 steps"),
        (log[0].replace('"loss": ', '"loss": NaN, "was": '), "1 step;"),
        ("".join(log[:2]) + json.dumps(skipped) + "\n", "1 step skipped"),
        ('{"step": 0}\n', "no log.jsonl with a finished step"),
        ("".join(json.dumps(row) + "\n" for row in huge), "2 steps"),
    ):
        (folder / "log.jsonl").write_text(content)
        outline = Outline(page := page_of(folder))
        assert (
            words in outline.text
            and page.count("<script") == 1
            and all(map(math.isfinite, numbers_in_svg(page)))
        ), content
    shutil.copy(reported / "metrics.json", folder)
    other = shutil.copytree(reported, tmp_path / "other", ignore=lambda *_: ["report.html"])
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(
        json.dumps({**config, "stage": "ssl", "teacher_posterior": "decoder", "num_queries": 77})
    )
    assert report(folder, "--compare", reported, other) == 0
    assert "no checkpoint" in capsys.readouterr().out
    outline = Outline(page := (folder / "report.html").read_text())
    assert (
        "Without pictures" in page and len(outline.cells["runs"]) == 3 * 7 and "warm-up" not in page
    )
    differs = page[page.index("What differs") : page.index("Curves</h2>")]
    assert (
        "num_queries" in differs
        and ">77<" in differs
        and ">8<" in differs
        and "<code>lr" not in differs
        and "student, decoder alone</em>" in page
    )
    (folder / "metrics.json").write_text('{"images": ')
    assert report(folder) == 2
    assert "metrics.json: not a readable JSON file" in capsys.readouterr().err
    images, masks = reported.parent / "set" / "images", reported.parent / "set-masks"
    dewa = ["--stage", "dewa", "--images", images, "--masks", masks, "--steps", 1]
    assert run(*dewa, "--out", tmp_path / "dewa") == 0
    assert report(tmp_path / "dewa") == 0
    again = (tmp_path / "dewa" / "report.html").read_text()
    assert "does not say where its images are (a folder of --images" in again


def test_the_page_of_a_warm_up_shows_what_the_decoder_draws(reported, tmp_path, capsys):
    root, masks, folder = reported.parent / "set", reported.parent / "set-masks", tmp_path / "dewa"
    own = ["--dataset", "custom", "--preset", "mini", "--data-root", root, "--masks", masks]
    assert run("--stage", "dewa", *own, "--steps", 1, "--out", folder) == 0
    page = (folder / "report.html").read_bytes()
    text = Outline(page.decode()).text
    assert len(re.findall(r"\d+ of \d+ masks are drawn with an IoU of at least 0.5", text)) == 6
    assert page.count(b"<img ") == 3 * 6 and "Without pictures" not in text
    words = shlex.split(run_folder.commands(run_folder.read(folder))[-1])
    assert "--images" not in words and words[words.index("--data-root") + 1] == str(root)
    assert report(folder, "--masks", masks) == 0
    assert (folder / "report.html").read_bytes() == page
    assert report(folder, "--masks", tmp_path) == 0
    assert "no SAM masks of 6 of 6 images" in (folder / "report.html").read_text()


def test_masks_of_the_decoder_are_compared_by_their_overlap():
    true = torch.zeros(2, 4, 4, dtype=torch.bool)
    true[0, :2], true[1, 2:, :2] = True, True
    drawn = torch.zeros(3, 4, 4, dtype=torch.bool)
    drawn[0, :3], drawn[2, 2:, :2] = True, True
    assert torch.allclose(
        warm_up.overlaps(drawn, true), torch.tensor([[2 / 3, 2 / 14], [0, 0], [0, 1.0]])
    )


def test_a_page_says_how_many_things_were_found(reported, tmp_path):
    metrics = json.loads((reported / "metrics.json").read_text())
    config = json.loads((reported / "config.json").read_text())
    (tmp_path / "metrics.json").write_text(json.dumps(metrics))
    for changed, said in (({}, True), ({"labels": "semantic"}, False)):
        (tmp_path / "config.json").write_text(json.dumps({**config, **changed}))
        found = re.search(r"\d+ of \d+ things are found", page_of(tmp_path))
        assert bool(found) == said
    whole = (reported / "report.html").read_text()
    assert re.search(r"<h4>[^<]* <span>\d+ of \d+ things found, \d+ without a match", whole)


def test_few_numbers_are_dots_of_their_curve():
    short, long = ([*range(n)] for n in (5, charts.FEW + 1))
    panel = charts.chart("PQ", "", [("a", short, [1.0] * 5), ("b", long, [2.0] * len(long))])
    assert [k for k, *_ in panel["dots"]] == [0] * 5
    assert [k for kind, k, _ in panel["paths"] if kind == "smooth"] == [0, 1]


def test_a_curve_says_where_its_average_ends():
    none, rising = [], [*range(200)]
    panel = charts.chart("loss", "", [("a", rising, rising), ("b", none, none)])
    assert panel["curves"] == [("a", "194"), ("b", "–")]  # of the last 10, 190 to 199
    jump = [1.0] * 100 + [3.0] * 100
    panel = charts.chart("loss", "", [("a", rising, jump)], window=50)
    smooth = next(path for kind, _, path in panel["paths"] if kind == "smooth")
    places = [tuple(map(float, place.split())) for place in smooth[1:].split("L")]
    middle = (charts.LEFT + charts.WIDTH - charts.RIGHT) / 2
    before = [y for x, y in places if x < middle]
    # what has not happened yet moves no mean: the curve is flat until the jump
    assert len(set(before)) == 1 and len({y for x, y in places if x > middle}) > 40
    panel = charts.chart("rate", "", [("a", rising, [0.0006 - 3e-6 * t for t in rising])], window=1)
    assert panel["curves"] == [("a", "3e-06")] and {kind for kind, *_ in panel["paths"]} == {
        "smooth"
    }
    assert [label for _, label in panel["rows"]] == ["0", "2e-4", "4e-4", "6e-4"]


def test_words_are_explained_where_they_stand_and_only_those_of_the_run(reported, tmp_path):
    def words(metrics):
        (tmp_path / "metrics.json").write_text(json.dumps({"images": 2, **metrics}))
        page = page_of(tmp_path)
        return page, set(re.findall(r"<dt>([^<]*)</dt><dd>[A-Z]", page))

    panoptic = json.loads((reported / "metrics.json").read_text())
    page, there = words(panoptic)
    assert {"PQ", "SQ", "RQ", "mIoU", "reading", "with the ensemble"} <= there
    assert "AP" not in there and "makes the pseudo-labels" in page
    assert page.index('id="readings"') < page.index("What these words mean")
    page, there = words({"student/decoder": panoptic["student/decoder"]})
    assert "PQ" in there and "with the ensemble" not in there and "pseudo-labels" not in page
    names = {"ap": 0.5, "ap50": 0.6, "ap75": 0.4, "instances": 3}
    _, there = words({"student/decoder": {"ap": 0.5, "per_class": {"cat": names}}})
    assert {"AP", "reading"} <= there and not {"PQ", "mIoU"} & there


def test_curves_of_runs_side_by_side_are_marked_where_each_sees_unlabelled_images(tmp_path):
    def one(name, steps, begin, **config):
        folder = tmp_path / name
        folder.mkdir()
        rows = [{"step": t, "loss": 9.0, "labeled/dice": 1.0} for t in range(1, steps + 1)]
        for row in rows[begin - 1 :] if begin else ():
            row["unlabeled/dice"] = 1.0
        (folder / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (folder / "config.json").write_text(json.dumps(config))
        return run_folder.read(folder)

    digest = "0123456789abcdef" * 4
    start = {"source": "runs/dewa", "sha256": digest}
    runs = one("late", 20, 11, init=start), one("sup", 20, 0, init=None), one("soon", 10, 3)
    shown = page.comparison(list(runs))
    for chart in shown["charts"]:  # steps 1 to 20 are drawn from 44 to 370
        places = [(round((x - 44) / 326 * 19) + 1, text, k) for x, text, k in chart["begins"]]
        late, soon = (f"{name}: unlabelled images begin at step" for name in ("late", "soon"))
        assert places == [(11, f"{late} 11", 0), (3, f"{soon} 3", 2)]
    assert dict(shown["differing"])["init"] == [
        "source runs/dewa; sha256 0123456789ab…",
        "–",
        "–",
    ]
    content = page.write(tmp_path, list(runs), None, {}).read_text()
    assert content.count('class="begin c0"') == content.count('class="begin c2"') == 2
    assert content.count('class="begin"') == 3  # of the run alone, in each of its charts


def test_all_curves_of_a_run_have_one_axis_of_steps(tmp_path):
    rows = [{"step": t, "loss": 9.0} for t in range(1, 21)]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    watched = [{"step": t, "images": 8, "student/decoder": 0.5} for t in (10, 15)]
    (tmp_path / "pq.jsonl").write_text("".join(json.dumps(row) + "\n" for row in watched))
    pq, loss = page.curves(run_folder.read(tmp_path))["charts"]
    assert pq["columns"] == loss["columns"]
    assert pq["unit"] == ("percent, on the first 8 validation images alone: not those of the table")


def test_shares_of_a_preset_are_said_to_be_shares_and_a_class_without_a_label_has_none(reported):
    content = (reported / "report.html").read_text()
    assert "0.5 of the steps" in content  # of burn_in, which the run has in steps
    assert "taken for …" in content and "true class" in content
    colours = re.search('<p class="colours">(.*?)</p>', content, re.S)[1]
    assert colours.count('class="swatch"') == len(re.findall("thing</em>|stuff</em>", content))


def test_a_page_of_classes_alone_has_no_columns_of_segments(tmp_path):
    classes = {"cat": {"semantic_iou": 0.25}, "dog": {"semantic_iou": 0.75}}
    result = {"miou": 0.5, "miou_classes": 2, "per_class": classes}
    (tmp_path / "metrics.json").write_text(json.dumps({"student/decoder": result}))
    page = page_of(tmp_path)
    cells = Outline(page).cells
    assert cells["readings"] == [0.5] and sorted(cells["classes"]) == [0.25, 0.75]
    assert ">mIoU<" in page and ">PQ<" not in page and ">FN<" not in page


def test_a_page_says_when_on_what_and_of_how_many_images_a_run_was_trained(
    reported, small_mini, tmp_path, monkeypatch
):
    page = (reported / "report.html").read_bytes().decode()
    (session,) = sessions.read(reported)
    assert (session["from"], session["to"]) == (0, 5)
    about = page[page.index('<dl class="about">') : page.index("</header>")]
    for said in (
        f"{session['labelled']} labelled, {session['unlabelled']} unlabelled, ",
        f"Python {platform.python_version()}, torch {torch.__version__}",
        html.escape(sessions.cpu()),
        f"{datetime.fromisoformat(session['begun']):%d %B %Y}",
    ):
        assert said in about
    sup = ["--stage", "sup", "--watch", 0, "--report-images", 0, "--out", tmp_path / "run"]
    assert run(*sup, "--steps", 2) == 0
    monkeypatch.setattr(sessions, "cpu", lambda: "another <machine>")
    monkeypatch.setattr(sessions, "commit", lambda: "abc1234")
    assert run(*sup, "--steps", 4, "--resume") == 0  # it is not what makes a run that run
    assert [(row["from"], row["to"]) for row in sessions.read(tmp_path / "run")] == [(0, 2), (2, 4)]
    page = (tmp_path / "run" / "report.html").read_text()
    assert "; then another &lt;machine&gt;, " in page and ", in 2 sessions" in page
    assert "commit abc1234" in page and "unlabelled" not in page.partition("</header>")[0]
    for content in ("", "[1, {}]", '[{"begun": 3, "machine": null, "labelled": "x"}]'):
        (tmp_path / "run" / "sessions.json").write_text(content)
        assert "Python" not in page_of(tmp_path / "run")
    (tmp_path / "run" / "sessions.json").unlink()  # of an older version
    assert 'class="about"' not in page_of(tmp_path / "run")


def test_a_commit_is_that_of_this_program_or_of_nobody(tmp_path):
    assert sessions.commit(tmp_path) == ""
    assert re.fullmatch(r"([0-9a-f]{7,}(-dirty)?)?", sessions.commit())
    (tmp_path / "cpuinfo").write_text("processor : 0\nmodel name\t: Fast CPU @ 3 GHz\n")
    assert sessions.cpu(tmp_path / "cpuinfo").startswith("Fast CPU @ 3 GHz, ")
    assert sessions.cpu(tmp_path / "nothing")


def test_a_report_that_cannot_be_written_does_not_cost_the_run(small_mini, tmp_path, capsys):
    (tmp_path / "run" / "report.html").mkdir(parents=True)
    assert run("--stage", "sup", "--steps", 1, "--out", tmp_path / "run") == 0
    assert (
        "warning" in (said := capsys.readouterr().out)
        and "again with --stage report" in said
        and (tmp_path / "run" / "metrics.json").exists()
    )


def test_pictures_are_left_out_until_the_page_is_small_enough_and_many_classes_stay_readable(
    tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)  # the template is found from anywhere
    rng = np.random.default_rng(0)
    quality = {"pq": 0.5, "sq": 0.5, "rq": 1.0}
    one = {**quality, "iou": 1.0, "tp": 2, "fp": 0, "fn": 0, "semantic_iou": 0.5}
    pixels = (rng.random((150, 150)) ** 8 * 1000).astype(int).tolist()
    reading = {
        **{group: {**quality, "n": 150} for group in ("all", "things", "stuff")},
        "per_class": {f"class {k}": one for k in range(150)},
        "miou": 0.5,
        "confusion": [" ".join(map(str, row)) for row in pixels],
    }
    (tmp_path / "metrics.json").write_text(json.dumps({"images": 1, "student/decoder": reading}))
    shown = [gallery.Card(f"{k}.png", "PQ 0.0", [("image", rng.bytes(30_000))]) for k in range(9)]
    cards = {"worst of 9": shown}
    whole = page_of(tmp_path, cards)
    assert whole.count("<img ") == 9 and "28 of 150 classes" in whole
    assert whole.count('<g class="') <= 28 * 28
    monkeypatch.setattr(page, "MAX_BYTES", 300_000)
    small = page_of(tmp_path, cards)
    assert 0 < small.count("<img ") < 9 and len(small.encode()) <= 300_000
    assert "0.png" in small and "8.png" not in small


class Browser:
    """A headless Chromium, asked over a pipe (DevTools protocol): browser("Page.navigate", ...)."""

    def __init__(self, program, folder):
        there, self.to = os.pipe()
        self.back, here = os.pipe()
        flags = "--headless=new --no-sandbox --disable-gpu --disable-dev-shm-usage"
        pipe = f'--remote-debugging-pipe --user-data-dir="$1" about:blank 3<&{there} 4>&{here}'
        command = f'exec "$0" {flags} {pipe}'
        self.process = subprocess.Popen(
            ["bash", "-c", command, program, str(folder)],
            pass_fds=(there, here),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(there), os.close(here)
        self.number, self.buffer, self.events, self.session = 0, b"", [], {}
        target = self("Target.createTarget", url="about:blank")["targetId"]
        self.session = {
            "sessionId": self("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        }

    def __call__(self, method, **params):
        self.number += 1
        os.write(
            self.to,
            json.dumps(
                {"id": self.number, "method": method, "params": params, **self.session}
            ).encode()
            + b"\0",
        )
        while (answer := self.message()).get("id") != self.number:
            self.events.append(answer)
        return answer["result"]

    def message(self):
        while b"\0" not in self.buffer:
            self.buffer += (got := os.read(self.back, 1 << 16))
            assert got, "the browser is gone"
        message, _, self.buffer = self.buffer.partition(b"\0")
        return json.loads(message)

    def open(self, address):
        self.events = []
        self("Page.navigate", url="about:blank"), self("Page.navigate", url=address)
        while (
            not any(e["method"] == "Page.loadEventFired" for e in self.events)
            or self.ask("document.readyState + location.protocol") != "completefile:"
        ):
            self.events.append(self.message())

    def ask(self, script):
        answer = self("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")


def test_a_browser_shows_the_report_without_error_or_network_and_sorts_its_tables(
    reported, tmp_path
):
    program = (
        shutil.which("chromium")
        or shutil.which("chromium-browser")
        or shutil.which("google-chrome")
    )
    if program is None:
        pytest.skip("no Chromium is installed (Debian: apt-get install chromium)")
    browser = Browser(program, tmp_path)
    try:
        for domain in ("Page", "Runtime", "Log", "Network"):
            browser(f"{domain}.enable")
        address = (reported / "report.html").as_uri()
        browser.open(f"{address}#sort=classes:fn:asc")
        column = (
            "[...document.querySelectorAll('#classes tbody tr')].map(r => r.cells[9 - 1].dataset.v)"
        )
        ascending = list(map(float, browser.ask(column)))
        assert ascending == sorted(ascending) and ascending[0] < ascending[-1]
        browser.ask("document.querySelector('#classes th[data-key=fn] button').click()")
        wait_for(
            lambda: (
                browser.ask("location.hash") == "#sort=classes:fn:desc"
                and list(map(float, browser.ask(column))) == ascending[::-1]
            )
        )
        assert (
            browser.ask("document.querySelector('#classes th[data-key=fn]').ariaSort")
            == "descending"
        )
        browser.ask("document.querySelector('#classes th[data-key=class] button').click()")
        names = "[...document.querySelectorAll('#classes tbody th')].map(h => h.textContent.trim())"
        wait_for(
            lambda: browser.ask(
                f"{names}.join() === {names}.sort((a, b) => a.localeCompare(b)).join()"
            )
        )
        assert (
            browser.ask(
                "[...document.images].every(i => i.complete && i.naturalWidth > 100)"
                " && document.images.length"
            )
            == 2 * 5 + 3 * 3 + 3 * 6  # all for validation; unlabelled; training
        )
        assert browser.ask("document.scripts.length") == 1 and any(
            EVIL in name for name in browser.ask(names)
        )
        place = (
            "[...document.querySelectorAll('.cells figure')].findIndex(f => f.matches('.grown'))"
        )
        click = "document.querySelector('.ways [aria-label={}]').click()".format
        browser.ask("document.querySelector('.cells img').click()")
        places = [browser.ask(place)]
        for way in ("next", "next", "previous", "close"):
            browser.ask(click(way))
            places.append(browser.ask(place))
        assert places == [0, 1, 2, 1, -1] and browser.ask("document.activeElement.tagName") == "IMG"
        wait_for(lambda: browser.ask("history.state") is None)
        browser.ask("document.querySelector('.cells img').click()")
        assert browser.ask(place) == 0 and browser.ask("history.state") == "grown"
        browser.ask("history.back()")
        wait_for(lambda: browser.ask(place) == -1)
        for width, scheme in ((320, "dark"), (1200, "light")):
            browser(
                "Emulation.setDeviceMetricsOverride",
                width=width,
                height=800,
                deviceScaleFactor=1,
                mobile=width < 600,
            )
            browser(
                "Emulation.setEmulatedMedia",
                features=[{"name": "prefers-color-scheme", "value": scheme}],
            )
            assert (
                browser.ask("document.documentElement.scrollWidth") <= width
            )  # nothing hangs over
            assert (
                sum(
                    map(
                        int,
                        re.findall(
                            r"\d+", browser.ask("getComputedStyle(document.body).backgroundColor")
                        ),
                    )
                )
                < 200
            ) == (scheme == "dark")
        seen = {e["method"]: e["params"] for e in browser.events}
        assert (
            not {
                "Page.javascriptDialogOpening",
                "Runtime.exceptionThrown",
                "Runtime.consoleAPICalled",
                "Log.entryAdded",
            }
            & seen.keys()
        ), seen
        asked = [
            e["params"]["request"]["url"]
            for e in browser.events
            if e["method"] == "Network.requestWillBeSent"
        ]
        assert asked and all(url.startswith(("data:", address, "about:")) for url in asked)
    finally:
        browser.process.kill()
        browser.process.wait()
