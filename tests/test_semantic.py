"""DeepLabv3+ and the methods on it: in the frame, resumed, over ranks, and at their edges."""

import dataclasses
import json
import re
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import clip_ensemble
import dearli
import deeplab
import esl
import semantic
from config import Config
from data import Labeled, Unlabeled
from deeplab import IGNORE, cross_entropy, hard_pixels
from deeplab_presets import PRESETS
from engine import checkpoint, stored
from engine.begin import in_steps
from engine.checkpoint import state_of
from engine.optim import NotFinite
from ground.errors import UserError
from mini.scenes import load_mini
from pretrained.segmenter import build_deeplab
from readers.ground_truth import Taxonomy
from tests.helpers import CPU, back_to, log_of, run, same
from tests.test_ranks import ranks_run

TINY = dataclasses.replace(
    PRESETS["mini"],
    hidden=32,
    heads=2,
    pretrained="random",
    crop=64,
    labeled_batch=2,
    unlabeled_batch=2,
    projection=8,
    kmeans_pixels=64,
    queue=4,
    anchors_max=8,
    negatives=15,
    burn_in=0,
    ssl_steps=4,
    sup_steps=4,
)
THREE = Taxonomy(("sky", "ball", "grass"), (False, True, False), (1, 2, 3))
ESL = ["--stage", "ssl", "--method", "esl", "--no-eval", "--kmeans-pixels", 64]


def tiny_network(head=False, **numbers):
    cfg = dataclasses.replace(TINY, **numbers)
    return build_deeplab(cfg, THREE, CPU, head)


# ----------------------------------------------------------------------------------- the network


def test_the_logits_are_of_stride_4_and_cover_the_image():
    network = tiny_network(True).eval()
    images = torch.randint(256, (1, 3, 64, 96), dtype=torch.uint8)
    maps = network(images)
    assert maps.logits.shape == (1, 3, 16, 24) and maps.encoder.shape[2:] == (8, 12)
    assert network.project(maps.decoder).shape == (1, 8, 16, 24)
    assert network.upsample(maps.logits, (64, 96)).shape == (1, 3, 64, 96)
    assert (network.project(maps.decoder) >= 0).all()  # Conv-BN-ReLU, as stated
    assert (tiny_network(True, projector="conv").eval().project(maps.decoder) < 0).any()
    odd = network(images[..., :50, :70])  # grows to 64 x 96 inside
    assert network.upsample(odd.logits, (50, 70)).shape == (1, 3, 50, 70)


@pytest.mark.parametrize("name, stride", [("resnet18", 8), ("resnet50", 16), ("xception65", 16)])
def test_timm_networks_have_dilated_stages(name, stride):
    network = tiny_network(backbone=name, output_stride=stride, aux_weight=0.4).eval()
    with torch.no_grad():
        maps = network(torch.zeros(1, 3, 65, 65, dtype=torch.uint8))
    assert maps.logits.shape[2:] == (17, 17) and maps.auxiliary.shape[1] == 3
    assert maps.encoder.shape[2:] == ((9, 9) if stride == 8 else (5, 5))
    assert all(p.requires_grad for p in network.parameters())


def test_a_timm_file_fills_all_of_the_network(tmp_path):
    import timm

    torch.manual_seed(1)
    whole = timm.create_model("resnet18")
    torch.save(whole.state_dict(), tmp_path / "resnet18.pth")
    network = tiny_network(backbone="resnet18", pretrained=str(tmp_path / "resnet18.pth"))
    state = network.backbone.network.state_dict()
    assert torch.equal(state["layer4.1.conv2.weight"], whole.layer4[1].conv2.weight)
    cut = {name: w for name, w in whole.state_dict().items() if "layer3" not in name}
    torch.save(cut, tmp_path / "cut.pth")
    with pytest.raises(UserError, match="not weights of resnet18"):
        tiny_network(backbone="resnet18", pretrained=str(tmp_path / "cut.pth"))
    with pytest.raises(UserError, match="unknown backbone 'resnet5'"):
        tiny_network(backbone="resnet5")
    with pytest.raises(UserError, match="gives no maps|has maps of strides"):
        tiny_network(backbone="vit_tiny_patch16_224")


def test_cross_entropy_is_the_mean_over_labelled_pixels():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 3, 4, 4, generator=generator)
    classes = torch.randint(-1, 3, (2, 4, 4), generator=generator)
    expected = F.cross_entropy(logits, classes, ignore_index=IGNORE)
    assert float(cross_entropy(logits, classes, Config())) == pytest.approx(float(expected))
    none = torch.full_like(classes, IGNORE)
    assert float(cross_entropy(logits, none, Config())) == 0


def test_hard_pixels_are_those_below_the_threshold_or_the_hardest():
    pixels = -torch.tensor([0.9, 0.8, 0.6, 0.5, 0.1]).log()
    labelled = torch.tensor([True, True, True, True, False])
    assert hard_pixels(pixels, labelled, 0.7, 1).tolist() == [False, False, True, True, False]
    assert hard_pixels(pixels, labelled, 0.7, 3).tolist() == [False, True, True, True, False]
    assert hard_pixels(pixels, labelled, 0.01, 4).tolist() == labelled.tolist()


def test_answers_are_partitions_with_a_segment_a_class():
    probs = torch.tensor(
        [[[0.7, 0.1], [0.2, 0.6]], [[0.2, 0.1], [0.1, 0.1]], [[0.1, 0.8], [0.7, 0.3]]]
    )
    answer = semantic.by_class(probs, sums=True)
    assert answer.labels.tolist() == [0, 2]
    assert answer.segment_map.tolist() == [[1, 2], [2, 1]]
    assert answer.semantic.tolist() == [[0, 2], [2, 0]]
    assert answer.scores.tolist() == pytest.approx([0.65, 0.75])
    assert np.array_equal(answer.sums, probs.numpy())


def test_the_grey_at_the_edge_of_a_view_is_no_image():
    views = torch.randint(256, (2, 3, 6, 6), dtype=torch.uint8, generator=torch.Generator())
    views[0, :, 4:] = 128
    views[1, :, :, 5:] = 128
    views[1, :, 2, 2] = 128  # grey within stays
    shown = semantic.image_shown(views)
    assert shown[0].sum() == 24 and shown[0, :4].all()
    assert shown[1].sum() == 30 and shown[1, :, :5].all()


# ----------------------------------------------------------------------------------- the methods


def batch(seed=0, boxes=((8, 40, 0, 64), None), side=64):
    """Two labelled images, and two unlabelled ones of which one has a partner."""
    dataset = load_mini("4")
    labeled = esl.LabeledBatches(dataset, TINY, 4)[seed]
    generator = torch.Generator().manual_seed(seed)
    weak = torch.randint(256, (3, 3, side, side), dtype=torch.uint8, generator=generator)
    views = weak[:2], weak[:2], list(boxes), weak[2:], weak[2:]
    return labeled, Unlabeled(*views, ["a", "b"])


def method(kind=esl.ESL, **numbers):
    dataset = load_mini("4")
    made = kind(dataclasses.replace(TINY, **numbers), dataset.taxonomy, CPU)
    made.batches(dataset)
    return made


def test_a_step_learns_moves_the_teacher_and_fills_the_bank():
    made = method(anchor_confidence=0.0)
    before = {n: t.clone() for n, t in state_of(made.models["teacher"]).items()}
    rows = [made.step(batch(t), t) for t in range(3)]
    assert made.models["bank"].ready and made.models["bank"].pushed.sum() > 0
    assert rows[0]["unlabeled/contrast"] == 0 and rows[1]["unlabeled/contrast"] > 0
    assert all(np.isfinite(value) for row in rows for value in row.values())
    after = state_of(made.models["teacher"])
    moved = [n for n in before if not torch.equal(before[n], after[n])]
    assert any("running_var" in n for n in moved) and any("classify.2.weight" in n for n in moved)


def test_losses_are_finite_without_a_confident_pixel_and_without_a_label():
    made = method(anchor_confidence=1.0)
    labeled, unlabeled = batch()
    void = [dataclasses.replace(t, segment_map=t.segment_map * 0) for t in labeled.targets]
    labeled = Labeled(labeled.images, void, labeled.names)
    for t in range(2):
        row = made.step((labeled, unlabeled), t)
    assert row["labeled/class"] == 0 and row["unlabeled/contrast"] == 0
    assert row["unlabeled/soft"] > 0 and np.isfinite(row["grad_norm"])


def test_parts_are_shown_within_the_classes_one_shade_a_part():
    made = method(anchor_confidence=0.0)
    assert esl.PARTS not in made.pictured  # no part is known yet
    for t in range(2):
        made.step(batch(t), t)
    assert esl.PARTS in made.pictured
    bank, side = made.models["bank"], 64
    images, sizes = batch()[1].weak, [((64, 64), (64, 64)), ((40, 64), (80, 128))]
    readings = ["student/decoder", esl.PARTS]
    answers = {(k, r): answer for k, r, answer in made.predict(images[:2], sizes, readings)}
    for k, (_, size) in enumerate(sizes):
        plain, parts = (answers[k, reading] for reading in readings)
        assert np.array_equal(parts.semantic, plain.semantic) and parts.segment_map.shape == size
        there = np.unique(plain.semantic)
        assert parts.labels.tolist() == np.repeat(there, bank.parts).tolist()
        assert np.array_equal(parts.labels[parts.segment_map - 1], plain.semantic)
    # the middles of the grid's cells, by the definition
    maps = made.models["student"].eval()(images[:1])
    grid = maps.logits.shape[-2:]
    features = clip_ensemble.resize(maps.encoder.float(), grid)[0]
    step, answer = side // grid[0], answers[0, esl.PARTS]
    number = (answer.segment_map - 1) % bank.parts
    for y in range(0, grid[0], 3):
        for x in range(0, grid[1], 3):
            place = y * step + step // 2, x * step + step // 2
            label = torch.tensor([int(answer.semantic[place])])
            assert number[place] == int(bank.part_of(features[:, y, x][None], label))


def test_hard_labels_have_one_class_and_no_bank():
    made = method(eta=0.0, contrast_weight=0.0)
    row = made.step(batch(), 0)
    assert row["soft_classes"] == 1 and "bank" not in made.models
    assert made.models["student"].projector is None
    assert method().step(batch(), 0)["soft_classes"] > 1


def test_soft_labels_are_mixed_with_the_boxes_of_the_images():
    made = method(contrast_weight=0.0)
    labeled, unlabeled = batch()
    seen = made.seen(labeled.images, unlabeled)
    soft, valid = made.soft_labels(seen, unlabeled)
    teacher = made.models["teacher"]
    whole = [
        esl.soft_label(teacher.upsample(teacher(x).logits, (64, 64)).softmax(1), TINY.eta)
        for x in (unlabeled.weak, unlabeled.partner_weak)
    ]
    assert valid.all()
    assert torch.allclose(soft[0, :, 8:40], whole[1][0, :, 8:40], atol=1e-5)
    assert torch.allclose(soft[0, :, 40:], whole[0][0, :, 40:], atol=1e-5)
    assert torch.allclose(soft[1], whole[0][1], atol=1e-5)
    grid = esl.mix_grids(torch.tensor([1, 2, 3])[:, None, None].expand(3, 16, 16), unlabeled)
    assert (grid[0, 2:10] == 3).all() and (grid[0, 10:] == 1).all() and (grid[1] == 2).all()


def test_anchors_are_a_share_of_each_class_drawn_by_seed_step_and_slot():
    made = method(anchor_share=0.1, anchors_max=5)
    classes = torch.full((2, 10, 10), IGNORE)
    classes[0, :3] = 1  # 30 pixels: 3
    classes[0, 3:] = 0  # 70: 7, at most 5
    vectors = torch.arange(200.0).view(2, 1, 10, 10)
    draw = lambda t: made.anchors(vectors, classes, classes * 0, [0, 1], t)  # noqa: E731
    chosen, own, part, draws = draw(0)
    assert own.bincount().tolist() == [5, 3] and draws.shape == (8, 16)
    assert ((chosen[:, 0] < 30) == (own == 1)).all()
    assert torch.equal(chosen, draw(0)[0]) and not torch.equal(chosen, draw(1)[0])


@pytest.mark.parametrize("kind", ["average", "student", "batch"])
def test_batch_norm_statistics_of_the_teacher_are_whose_the_flag_says(kind):
    made = method(teacher_norm=kind, contrast_weight=0.0, ema_decay=0.5)
    for t in range(2):
        made.step(batch(t), t + 5)
    name = "classify.0.0.1.running_mean"
    student, teacher = (state_of(made.models[m])[name] for m in ("student", "teacher"))
    assert torch.equal(student, teacher) == (kind == "student")
    if kind == "batch":  # its own: two steps of momentum 0.1 from 0
        assert teacher.abs().sum() > 0


def test_a_step_that_is_not_taken_leaves_no_trace(monkeypatch):
    made = method()
    made.step(batch(), 0)
    before = {n: {k: v.clone() for k, v in state_of(m).items()} for n, m in made.models.items()}

    def fail(terms):
        raise NotFinite("loss")

    monkeypatch.setattr(semantic, "require_finite", fail)
    with pytest.raises(NotFinite):
        made.step(batch(1), 1)
    assert all(same(before[n], dict(state_of(m))) for n, m in made.models.items())


def test_batch_norm_over_ranks_is_that_of_all_pixels(monkeypatch):
    # one rank that is told it is one of two, whose other half is its own double
    norm, plain = nn.BatchNorm2d(3), nn.BatchNorm2d(3)
    x = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(deeplab.ranks, "count", lambda: 2)
    monkeypatch.setattr(deeplab.ranks, "total", lambda value: 2 * value)
    monkeypatch.setattr(deeplab.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(deeplab.dist_grad, "all_reduce", lambda value: 2 * value)
    deeplab.synchronise(norm)
    y, expected = norm(x), plain(torch.cat([x, x]))[:2]
    assert torch.allclose(y, expected, atol=1e-5)
    assert torch.allclose(norm.running_var, plain.running_var, atol=1e-6)
    assert torch.allclose(norm.running_mean, plain.running_mean, atol=1e-6)


def test_a_class_head_without_no_object_follows_the_names_of_the_classes():
    network = tiny_network()
    before = {name: value.clone() for name, value in state_of(network).items()}
    start = stored.Stored("run", {"student": dict(before), "config": {"network": "deeplab"}})
    stored.take(start, "student", network, "run", order=np.array([2, 0, 1]))
    after = state_of(network)["classify.2.weight"]
    assert torch.equal(after, before["classify.2.weight"][[2, 0, 1]])


def test_epochs_are_passes_over_the_unlabelled_images():
    dataset = load_mini("4")
    cfg = in_steps(dataclasses.replace(TINY, epochs=2, unlabeled_batch=4), dataset)
    assert cfg.ssl_steps == cfg.sup_steps == round(2 * len(dataset.unlabeled) / 4)


# ---------------------------------------------------------------------------------- in the frame


def test_a_run_is_resumed_bit_for_bit_with_bank_and_statistics(small_mini, tmp_path):
    steps = ["--steps", 4, "--checkpoint-every", 2, "--burn-in", 1]
    assert run(*ESL, *steps, "--out", tmp_path / "one") == 0
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    back_to(tmp_path / "two", 2)
    assert run(*ESL, *steps, "--out", tmp_path / "two", "--resume") == 0
    one, two = (checkpoint.newest(tmp_path / name) for name in ("one", "two"))
    assert {"queues", "prototypes"} <= one["bank"].keys()
    assert "aspp.branches.0.1.running_var" in one["teacher"]
    assert one["bank"]["pushed"].sum() > 0
    assert all(same(one[key], two[key]) for key in ("student", "teacher", "bank", "optimizer"))
    assert log_of(tmp_path / "one") == log_of(tmp_path / "two")


def test_two_ranks_do_what_one_does(small_mini, tmp_path, monkeypatch):
    monkeypatch.setattr(deeplab, "DROPOUT", 0.0)  # each rank draws its own
    flags = [*ESL, "--steps", 4, "--burn-in", 0, "--anchor-confidence", 0.2]
    assert run(*flags, "--out", tmp_path / "one") == 0
    said = ranks_run(2, tmp_path / "said", *flags, "--out", tmp_path / "two")
    assert said == [0, 0], (tmp_path / "said1.txt").read_text()
    for x, y in zip(log_of(tmp_path / "one"), log_of(tmp_path / "two")):
        for key in ("loss", "labeled/class", "unlabeled/soft", "unlabeled/contrast"):
            assert x[key] == pytest.approx(y[key], rel=2e-3), (x, y)
    one, two = (checkpoint.newest(tmp_path / name)["bank"] for name in ("one", "two"))
    assert torch.equal(one["pushed"].sum(1) > 0, two["pushed"].sum(1) > 0)


def test_the_frame_measures_shows_and_predicts(small_mini, tmp_path, capsys):
    out = tmp_path / "run"
    flags = ["--kmeans-pixels", 64, "--watch", 2]
    assert run("--stage", "ssl", "--method", "esl", "--steps", 2, *flags, "--out", out) == 0
    metrics = json.loads((out / "metrics.json").read_text())
    assert 0 <= metrics["teacher/decoder"]["miou"] <= 1 and "all" not in metrics["teacher/decoder"]
    page = (out / "report.html").read_text()
    assert "mIoU" in page and "student, parts of objects" in page
    assert re.search("<figcaption[^>]*>student <b>", page)  # its one reading has no other name

    def applied(stage, *words):
        return dearli.main(["--stage", stage, "--weights", str(out), *map(str, words)])

    assert applied("eval", "--window", 32, "--out", tmp_path / "ev") == 0
    assert applied("report", "--report-images", 2, "--out", tmp_path / "again") == 0
    assert "parts of objects" in (tmp_path / "again" / "report.html").read_text()
    assert applied("eval", "--parts", 9, "--out", tmp_path / "ev2") == 2
    assert "--parts 9" in capsys.readouterr().err
    load_mini("4").val.image(0).save(tmp_path / "picture.png")
    words = ["--input", tmp_path / "picture.png", "--which", "teacher"]
    assert applied("predict", *words, "--out", tmp_path / "said") == 0
    assert any((tmp_path / "said").rglob("*.json"))
    assert applied("export", "--out", tmp_path / "file.pth") == 2
    assert "DeepLabv3+" in "".join(capsys.readouterr())
    assert run("--stage", "sup", "--network", "deeplab", "--steps", 2, "--out", tmp_path / "s") == 0
    assert run("--stage", "ssl", "--method", "hard", "--steps", 1, "--dry-run") == 0


def test_esl_starts_from_a_supervised_run_and_back_with_a_projector_of_its_own(
    small_mini, tmp_path, capsys
):
    sup = ["--stage", "sup", "--network", "deeplab", "--no-eval"]
    esl = ["--stage", "ssl", "--method", "esl", "--steps", 2, "--burn-in-warm", 1, "--no-eval"]
    assert run(*sup, "--steps", 1, "--out", tmp_path / "sup") == 0
    assert run(*esl, "--init", tmp_path / "sup", "--out", tmp_path / "esl") == 0
    lacks = capsys.readouterr().out
    assert "projector.0.0.weight is missing" in lacks and "classify" not in lacks
    assert run(*sup, "--steps", 1, "--init", tmp_path / "esl", "--out", tmp_path / "again") == 0


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--method", "esl", "--num-queries", "9"], "DeepLabv3+ has no queries"),
        (["--method", "dear", "--eta", "0.5"], "--eta: it is of DeepLabv3+"),
        (["--method", "hard", "--queue", "9"], "--queue: no parts are told apart"),
        (["--method", "esl", "--labels", "panoptic"], "knows classes, and no things"),
        (["--method", "esl", "--network", "mask2former"], "--method esl has deeplab"),
        (["--method", "esl", "--eta", "1.5"], "--eta 1.5: expected a share"),
        (["--method", "esl", "--steps", "9", "--epochs", "2"], "--epochs: --steps says"),
    ],
)
def test_flags_that_would_do_nothing_are_refused(flags, words, capsys):
    import dearli

    assert dearli.main(["--stage", "ssl", *flags]) == 2
    assert words in "".join(capsys.readouterr())
