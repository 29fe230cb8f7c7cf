"""PL-DC and Guided Distillation: the formulas, one step by hand, and runs."""

import dataclasses
import json
import math
import random

import pytest
import timm
import torch
from torch import nn

import clip_ensemble
import config
import cutout
import data
import dearli
import losses
import mean_teacher
import pldc
from config import MINI
from engine import checkpoint, checks, optim
from engine.checkpoint import state_of
from engine.flags import configure, usual_method
from engine.parser import parser
from ground.errors import UserError
from matcher import Target
from mini import microcosm, mini_clip, scenes
from pretrained import foundation
from readers.ground_truth import Taxonomy
from readers.instances import things_only
from tests.helpers import CPU, TINY, back_to, log_of, run, same, tiny_segmenter
from tests.test_ranks import ranks_run

THINGS = Taxonomy(microcosm.THINGS, (True,) * 12, tuple(range(1, 13)))

# ------------------------------------------------------------------------------------ the formulas


def logits(*probabilities):
    return torch.tensor(probabilities).logit()


def test_mask_quality_is_the_mean_probability_inside_of_a_mask():
    # inside: 0.9 and 0.7, mean 0.8; 0.5 is not inside
    masks = logits([[0.9, 0.7], [0.5, 0.2]], [[0.5, 0.5], [0.5, 0.5]], [[0.1, 0.1], [0.1, 0.1]])
    quality = pldc.mask_quality(masks)
    torch.testing.assert_close(quality, torch.tensor([0.8, 0.0, 0.0]), atol=1e-6, rtol=0)
    assert pldc.mask_quality(torch.zeros(3, 0, 4, 4)).shape == (3, 0)
    assert pldc.mask_quality(masks[None, None]).shape == (1, 1, 3)


def naive_kept(class_probs, mask_logits, c_t, m_t, least_area, coupled):
    """Eq. (3)-(5), a query and a pixel at a time."""
    kept = []
    for k, (probs, mask) in enumerate(zip(class_probs.tolist(), mask_logits.tolist())):
        inside = [s for row in mask for s in (1 / (1 + math.exp(-x)) for x in row) if s > 0.5]
        c, m = max(probs[:-1]), sum(inside) / len(inside) if inside else 0.0
        good = c * m >= coupled if coupled is not None else c >= c_t and m >= m_t
        if good and len(inside) > least_area:
            kept.append((k, probs.index(c)))
    return kept


@pytest.mark.parametrize("coupled", [None, 0.3])
def test_kept_instances_are_those_of_a_loop_over_queries_and_pixels(coupled):
    g = torch.Generator().manual_seed(0)
    for _ in range(20):
        probs = (3 * torch.randn(30, 5, generator=g, dtype=torch.float64)).softmax(-1)
        masks = 2 * torch.randn(30, 4, 4, generator=g, dtype=torch.float64)
        query, label = pldc.keep_instances(probs, masks.float(), 0.5, 0.75, 6, coupled=coupled)
        kept = naive_kept(probs, masks, 0.5, 0.75, 6, coupled)
        assert list(zip(query.tolist(), label.tolist())) == kept and 0 < len(kept) < 30


def test_two_thresholds_refuse_what_their_product_would_keep():
    mask = logits([0.97, 0.97, 0.97], [0.97, 0.97, 0.97])
    masks = torch.stack([mask, logits([0.8] * 3, [0.8] * 3), mask, mask])
    probs = torch.tensor([[0.8, 0.1, 0.1], [0.99, 0.0, 0.01], [0.05, 0.9, 0.05], [0.0, 0.1, 0.9]])
    # c * m: 0.776, 0.792, 0.873, 0.097
    query, label = pldc.keep_instances(probs, masks, 0.85, 0.9)
    assert query.tolist() == [2] and label.tolist() == [1]
    query, label = pldc.keep_instances(probs, masks, 0.85, 0.9, coupled=0.765)
    assert query.tolist() == [0, 1, 2] and label.tolist() == [0, 0, 1]
    assert len(pldc.keep_instances(probs, masks, 0.85, 0.9, least_area=6)[0]) == 0  # not above 6
    nothing = pldc.keep_instances(probs, masks, 0.99, 0.99)
    assert [len(part) for part in nothing] == [0, 0] and nothing[1].dtype == torch.int64
    no_query = pldc.keep_instances(torch.zeros(0, 3), torch.zeros(0, 2, 3), 0.0, 0.0)
    assert [len(part) for part in no_query] == [0, 0]
    flat = torch.zeros(4, 2, 3)  # all pixels at 0.5: no mask, whatever the thresholds are
    assert len(pldc.keep_instances(probs, flat, 0.0, 0.0, 0)[0]) == 0
    assert len(pldc.keep_instances(probs, flat, 0.0, 0.0, 0, coupled=0.0)[0]) == 0


def test_one_class_is_kept_as_class_0():
    probs = torch.tensor([[0.9, 0.1], [0.1, 0.9]])
    query, label = pldc.keep_instances(probs, torch.full((2, 3, 3), 9.0), 0.85, 0.9)
    assert query.tolist() == [0] and label.tolist() == [0]
    one = torch.ones(2, 1)
    assert pldc.correct_classes(one, one, 0.5).tolist() == [0, 0]


def test_clips_weight_falls_from_a_half_to_none_along_a_cosine():
    values = [pldc.clip_weight(step, 20, 120) for step in (20, 45, 70, 95, 120)]
    quarter = math.cos(math.pi / 4)
    expected = [0.5, 0.25 * (1 + quarter), 0.25, 0.25 * (1 - quarter), 0.0]
    assert values == pytest.approx(expected, abs=1e-6)
    assert pldc.clip_weight(0, 0, 7) == 0.5


def test_classes_are_corrected_by_the_sum_that_the_weight_makes():
    teacher = torch.tensor([[0.6, 0.4, 0.0], [0.9, 0.1, 0.0], [0.2, 0.3, 0.5]])
    clip = torch.tensor([[0.1, 0.9, 0.0], [0.0, 0.6, 0.4], [0.2, 0.3, 0.5]])
    # at 0.5: 0.35 0.65 0.00; 0.45 0.35 0.20; unchanged
    assert pldc.correct_classes(teacher, clip, 0.5).tolist() == [1, 0, 2]
    assert pldc.correct_classes(teacher, clip, 0.0).tolist() == [0, 0, 2]
    assert pldc.correct_classes(teacher, clip, 1.0).tolist() == [1, 1, 2]
    nothing = pldc.correct_classes(torch.zeros(0, 3), torch.zeros(0, 3), 0.5)
    assert nothing.shape == (0,) and nothing.dtype == torch.int64


def test_a_pixel_counts_as_much_as_the_teacher_is_sure_of_it():
    masks = logits([0.5, 1.0, 0.0], [0.75, 0.25, 0.9])
    expected = torch.tensor([[0.0, 1.0, 1.0], [0.5, 0.5, 0.8]])
    torch.testing.assert_close(pldc.certainty(masks), expected, atol=1e-6, rtol=0)
    x = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    loop = [1 - (1 - 2 * abs(1 / (1 + math.exp(-v)) - 0.5)) for v in x.flatten().tolist()]
    made = pldc.certainty(x).flatten().double()
    torch.testing.assert_close(made, torch.tensor(loop, dtype=torch.float64), atol=1e-6, rtol=0)


# ------------------------------------------------------------------------- the loss and its weights


def test_a_point_counts_in_the_bce_as_the_certainty_there_and_dice_does_not_change():
    masks = torch.zeros(1, 2, 2)  # undecided: BCE = ln 2 at each point
    wanted, points = torch.tensor([[1.0, 0.0]]), torch.tensor([[[0.25, 0.5], [0.75, 0.5]]])
    bce, dice = losses.mask_losses(masks, wanted, points, torch.tensor([[1.0, 0.25]]))
    assert float(bce) == pytest.approx(1.25 / 2 * math.log(2))
    whole, same_dice = losses.mask_losses(masks, wanted, points)
    assert float(whole) == pytest.approx(math.log(2)) and dice == same_dice


def one_layer(target, points):
    """The set loss of one image, one query that is undecided everywhere, at given points."""
    layers = [(torch.zeros(1, 1, 3), torch.zeros(1, 1, 4))]
    cfg = dataclasses.replace(MINI, num_points=2).loss
    at = [(torch.rand(1, 2, 2), points)]
    return losses.set_loss(layers, torch.zeros(1, 4, 8, 8), [target], cfg, points=at)


def test_the_set_loss_reads_certainty_at_the_points_of_the_mask_loss():
    label, mask = torch.tensor([1]), torch.ones(1, 8, 8, dtype=torch.bool)
    half = torch.zeros(1, 8, 8)
    half[..., :4] = 0.8
    points = torch.tensor([[[0.25, 0.5], [0.75, 0.5]]])  # 0.8 and 0
    plain = one_layer(Target(label, masks=mask), points)
    weighted = one_layer(Target(label, masks=mask, certainty=half), points)
    sure = one_layer(Target(label, masks=mask, certainty=torch.ones(1, 8, 8)), points)
    assert float(plain["mask"]) == pytest.approx(5 * math.log(2))
    assert float(weighted["mask"]) == pytest.approx(5 * 0.4 * math.log(2))
    assert plain == sure and all(plain[name] == weighted[name] for name in ("class", "dice"))
    nothing = Target(label[:0], masks=mask[:0], certainty=half[:0])
    empty = one_layer(nothing, points[:0])
    assert float(empty["mask"]) == 0 == float(empty["dice"]) and math.isfinite(empty["class"])


# -------------------------------------------------------------- cutout.py, views, schedule, backbone


def test_cutout_erases_a_rectangle_of_each_pattern_and_leaves_the_image_alone():
    image = torch.zeros(3, 200, 100, dtype=torch.uint8)
    seen = {}
    for k, pattern in enumerate(cutout.PATTERNS["paper"]):
        hits = 0
        for seed in range(200):
            cut = cutout.cut_out(image, [pattern], random.Random(seed))
            again = cutout.cut_out(image, [pattern], random.Random(seed))
            assert torch.equal(cut, again) and not image.any()
            where = cut.any(0)
            rows, columns = where.any(1).sum().item(), where.any(0).sum().item()
            if not rows:
                continue
            hits += 1
            assert where.float().mean() > 0.99 * rows * columns / where.numel()  # noise is rarely 0
            chance, (least, most), aspect = pattern
            assert 0.9 * least < rows * columns / 20_000 < 1.1 * most
            assert 0.9 * aspect[0] < rows / columns < 1.1 * aspect[1]
            seen.setdefault(k, set()).add((rows, columns))
        assert abs(hits / 200 - chance) < 0.12 and len(seen[k]) > 20
    assert cutout.cut_out(image, cutout.PATTERNS["none"], random.Random(0)) is image
    lies = [p[2][1] for p in cutout.PATTERNS["code"]]
    assert lies == [3.3, 6.0, 8.0] and [p[0] for p in cutout.PATTERNS["code"]] == [0.7, 0.5, 0.3]


def test_cutout_needs_no_other_change_of_a_view():
    image = torch.full((3, 64, 64), 128, dtype=torch.uint8)
    cfg = dataclasses.replace(MINI, jitter=0.0, jitter_hue=0.0, grayscale_prob=0.0, blur_prob=0.0)
    assert torch.equal(data.strong_view(image, cfg, random.Random(0)), image)
    cfg = dataclasses.replace(cfg, cutout="paper")
    views = [data.strong_view(image, cfg, random.Random(seed)) for seed in range(20)]
    assert sum(not torch.equal(view, image) for view in views) > 10


def test_the_jitter_has_a_chance_and_a_view_its_side():
    image = torch.randint(0, 256, (3, 24, 32), dtype=torch.uint8)
    cfg = dataclasses.replace(MINI, jitter_prob=0.0, grayscale_prob=0.0, blur_prob=0.0)
    assert torch.equal(data.strong_view(image, cfg, random.Random(0)), image)
    often = dataclasses.replace(cfg, jitter_prob=0.8)
    same = [
        torch.equal(data.strong_view(image, often, random.Random(k)), image) for k in range(100)
    ]
    assert 8 <= sum(same) <= 32
    # 100 x 50 at k = 0.8 of a crop of 128: int(102.4) on the short side, or on the long one
    one = dataclasses.replace(MINI, scale_min=0.8, scale_max=0.8)
    assert data.training_size(100, 50, one, random.Random(0)) == (204, 102)
    long = dataclasses.replace(one, scaled_side="long")
    assert data.training_size(100, 50, long, random.Random(0)) == (102, 51)


def test_the_rate_falls_to_a_tenth_at_each_milestone():
    cfg = dataclasses.replace(MINI, milestones="0.5:0.9")
    factors = [optim.multistep(t, 100, cfg) for t in (0, 49, 50, 89, 90, 99)]
    assert factors == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01])
    assert round(config.INSTANCES.ssl_steps * 0.9231) == 340_393  # public code: 340 385


def test_a_resnet_is_four_maps_of_timms_own_and_its_batch_norms_are_fixed(tmp_path):
    made = timm.create_model("resnet18", num_classes=10)
    for module in made.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
    torch.save(made.state_dict(), tmp_path / "resnet.pth")
    cfg = dataclasses.replace(
        TINY,
        backbone="resnet18.tv_in1k",
        classifier="linear",
        teacher_posterior="decoder",
        pretrained=str(tmp_path / "resnet.pth"),
        train_backbone=True,
    )
    student = tiny_segmenter(cfg).train()
    images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    maps = student.backbone(images)
    assert [m.shape[1:] for m in maps] == [(64, 16, 16), (128, 8, 8), (256, 4, 4), (512, 2, 2)]
    mean, std = (
        torch.tensor(v).view(3, 1, 1) for v in ((123.675, 116.28, 103.53), (58.395, 57.12, 57.375))
    )
    expected = made.eval().forward_intermediates((images - mean) / std, intermediates_only=True)[1:]
    for one, other in zip(maps, expected):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)
    assert not any("bn" in name for name, _ in student.backbone.named_parameters())
    frozen = tiny_segmenter(dataclasses.replace(cfg, train_backbone=False))
    assert frozen.teacher().backbone is frozen.backbone
    assert not any(p.requires_grad for p in frozen.backbone.parameters())
    (tmp_path / "foreign.pth").write_bytes((tmp_path / "resnet.pth").read_bytes())
    torch.save({"conv1.weight": torch.zeros(1)}, tmp_path / "foreign.pth")
    with pytest.raises(UserError, match="foreign.pth: not weights of resnet18"):
        foundation.load_timm(dataclasses.replace(cfg, pretrained=str(tmp_path / "foreign.pth")))


# ------------------------------------------------------------------------------------ CLIP's opinion


def test_a_patch_is_the_box_of_an_instance_with_its_margin_and_grey_around_the_mask():
    image = torch.arange(8 * 8).view(1, 8, 8).expand(3, 8, 8).to(torch.uint8)
    masks = torch.zeros(2, 8, 8, dtype=torch.bool)
    masks[0, 2:4, 4:6], masks[1, 0, 0] = True, True
    masks[0, 2, 4] = False
    seen = pldc.patches(image, masks, 2)
    assert seen.shape == (2, 3, 2, 2)
    torch.testing.assert_close(seen[0, 0], image[0, 2:4, 4:6].float())  # 2 x 2 stays 2 x 2
    assert (seen[1] == 0).all()
    grey = pldc.patches(image, masks, 2, masked=True)
    torch.testing.assert_close(grey[0, 0], torch.tensor([[128.0, 21.0], [28.0, 29.0]]))
    wide = pldc.patches(image, masks, 4, margin=0.5)  # a pixel more on each side of two
    torch.testing.assert_close(wide[0, 0], image[0, 1:5, 3:7].float())
    assert pldc.patches(image, masks, 4, margin=9.0)[1].shape == (3, 4, 4)  # ends at the image
    assert pldc.patches(image, masks[:0], 4).shape == (0, 3, 4, 4)


def namer(view, **numbers):
    cfg = dataclasses.replace(MINI, clip_view=view, **numbers)
    return pldc.build_namer(cfg, THINGS, CPU)


def test_clip_says_of_a_crop_what_it_says_of_the_picture_and_of_a_mask_what_eq_5_says():
    scene = microcosm.scene("val", 1)
    image = torch.from_numpy(scene.image).permute(2, 0, 1)
    masks = torch.from_numpy(scene.segment_map)[None] == torch.arange(1, 3).view(2, 1, 1)
    clip = mini_clip.load()
    seen = pldc.patches(image, masks, mini_clip.SIDE).permute(0, 2, 3, 1)
    whole = clip.encode_image(mini_clip.normalize(seen.numpy()), normalize=True)
    asked = namer("crop")
    expected = (asked.scale * asked.vocabulary.cosine(whole)).softmax(-1)
    torch.testing.assert_close(asked(image, 2.0 * masks - 1), expected, atol=1e-5, rtol=1e-5)
    pooled, backbone = namer("pool"), clip_ensemble.ClipBackbone(clip)
    maps = backbone(image[None])
    logits = clip_ensemble.zero_shot_logits(
        backbone, maps[-1], (2.0 * masks - 1)[None], pooled.vocabulary
    )
    torch.testing.assert_close(pooled(image, 2.0 * masks - 1), logits[0].softmax(-1))
    assert not any(p.requires_grad for p in asked.parameters()) and not asked.training


def test_another_clip_than_the_backbones_is_asked_and_one_without_a_map_cannot_pool(small_openclip):
    other = namer("masked", clip_model=small_openclip, clip_pretrained="random")
    assert other.side == 64 and other(torch.zeros(3, 8, 8), torch.ones(2, 8, 8)).shape == (2, 12)
    clip = nn.Module()
    clip.visual = nn.Identity()  # as a ResNet's or a ViT's: no trunk
    with pytest.raises(UserError, match="--clip-view pool: pools the last map of a ConvNeXt"):
        pldc.Namer(clip, other.vocabulary, "pool", 0.0)


def test_openais_weights_get_openais_gelu(monkeypatch):
    asked = []

    def create(name, pretrained, force_quick_gelu):
        asked.append(force_quick_gelu)
        return nn.Identity()

    monkeypatch.setattr("open_clip.create_model", create)
    monkeypatch.setattr("open_clip.get_tokenizer", lambda name: None)
    monkeypatch.setattr(foundation, "hub_file", lambda *args: "file")
    for tag in ("openai", "yfcc15m", "random"):
        foundation._open_clip("RN50", tag)
    assert asked == [True, True, False]  # YFCC's were trained with it, too


def test_one_class_needs_no_clip_and_classes_that_are_the_same_words_are_refused():
    one = Taxonomy(("nucleus",), (True,), (1,))
    assert pldc.build_namer(MINI, one, CPU) is None and namer("none") is None
    same = Taxonomy(("erythrocyte", "leukocyte"), (True, True), (1, 2))  # words it has never read
    with pytest.raises(UserError, match="classes 'erythrocyte' and 'leukocyte' are the same words"):
        pldc.build_namer(MINI, same, CPU)
    nameless = Taxonomy(("ball", " -"), (True, True), (1, 2))
    with pytest.raises(UserError, match="class '-' has no name to CLIP"):
        pldc.build_namer(MINI, nameless, CPU)


# --------------------------------------------------------------------------------- one step by hand

SMALL = dataclasses.replace(
    dataclasses.replace(TINY, **config.METHODS["pldc"].on("mini")),
    ssl_steps=8,
    burn_in=2,
    checkpoint_every=1,
    class_threshold=0.05,
    mask_threshold=0.0,
)


def made(kind=pldc.Pldc, **numbers):
    return kind(dataclasses.replace(SMALL, **numbers), things().taxonomy, CPU)


def things():
    return things_only(scenes.load_mini("4"))


def answers(method, monkeypatch):
    """A teacher that always says the same of two images: of the first three queries, of which one
    is sure of class 1 and of its mask, one unsure of its mask, one of its class; nothing of the
    second. (the masks' probabilities, on the mask grid)"""
    posterior = torch.zeros(2, 3, 13)
    posterior[0, 0, 1], posterior[0, 0, 2], posterior[0, 0, 12] = 0.88, 0.09, 0.03
    posterior[0, 1, 4], posterior[0, 1, 12] = 0.95, 0.05
    posterior[0, 2, 5], posterior[0, 2, 12] = 0.6, 0.4
    posterior[1, :, 12] = 1
    masks = torch.full((2, 3, 16, 16), 0.02)
    masks[:, 0, :, :8], masks[:, 1, :, :8], masks[:, 2, :, 8:] = 0.97, 0.8, 0.97
    monkeypatch.setattr(method, "teacher_answer", lambda features, t: (posterior, masks.logit()))
    return masks


@pytest.mark.parametrize("kind", [pldc.Pldc, pldc.Guided])
def test_a_picture_of_pseudo_labels_may_be_without_any(kind, small_mini, monkeypatch):
    """Sizes differ from the mask grid: nothing is resized, to nothing."""
    method = made(kind, class_threshold=0.85, mask_threshold=0.9, ssl_steps=10)
    answers(method, monkeypatch)
    posterior, masks = method.teacher_answer(None, None)
    nothing = posterior[1:], masks[1:]
    monkeypatch.setattr(method, "teacher_answer", lambda features, t: nothing)
    images, sizes = torch.zeros(1, 3, 64, 64, dtype=torch.uint8), [((64, 64), (100, 90))]
    ((*_, answer),) = method.pseudo_predictions(images, sizes, None, sums=False)
    assert len(answer.labels) == 0 and answer.segment_map.shape == (100, 90)


def test_the_pseudo_labels_of_a_step_are_filtered_renamed_and_weighted(small_mini, monkeypatch):
    method = made(class_threshold=0.85, mask_threshold=0.9, ssl_steps=10)
    answers(method, monkeypatch)
    asked = []

    def clip(image, masks):
        asked.append((image, masks))
        return torch.eye(12)[[2]]  # sure of class 2

    method.clip = clip
    weak = torch.zeros(2, 3, 64, 64, dtype=torch.uint8)
    sizes = ((64, 64),) * 3
    first, second = method.pseudo_labels(None, sizes, 2, weak)
    # DDTF: the first query alone. DICC at w = 0.5: 0.5 + 0.5 * 0.09 / 0.97 beats 0.5 * 0.88 / 0.97
    assert first.labels.tolist() == [2] and first.masks.shape == (1, 64, 64) and len(second) == 0
    assert len(asked) == 1 and asked[0][1].shape == (1, 64, 64)
    inside = first.masks[0]
    assert inside[:, :31].all() and not inside[:, 33:].any()
    # PMUA: 2 |0.97 - 0.5| and 2 |0.02 - 0.5| away from the edge, less at it
    sure = first.certainty[0]
    assert float(sure[0, 0]) == pytest.approx(0.94) and float(sure[0, 63]) == pytest.approx(0.96)
    assert sure[:, 31:33].max() < 0.9
    # w = 0.25 (cos(pi 6 / 8) + 1) = 0.0732: 0.073 + 0.927 * 0.093 = 0.159 loses against 0.841
    assert method.pseudo_labels(None, sizes, 8, weak)[0].labels.tolist() == [1]
    coupled = made(coupled=0.7, clip_view="none", pixel_certainty=False, ssl_steps=10)
    answers(coupled, monkeypatch)
    (first, _) = coupled.pseudo_labels(None, sizes, 2, weak)
    # c m: 0.88 * 0.97 = 0.85, 0.95 * 0.8 = 0.76 and 0.6 * 0.97 = 0.58
    assert first.labels.tolist() == [1, 4] and first.certainty is None


def test_guided_distillation_asks_for_the_class_and_some_area_on_the_mask_grid(
    small_mini, monkeypatch
):
    method = made(pldc.Guided, **config.METHODS["guided"].usual[""], guided_steps=2)
    masks = answers(method, monkeypatch)
    masks[0, 1] = 0.02
    masks[0, 1, 0, :1] = 0.8  # 0.8 + 255 * 0.02 = 5.9 > 5, and one pixel inside
    first, second = method.pseudo_labels(None, ((64, 64),) * 3, 2, torch.zeros(2, 3, 64, 64))
    assert first.labels.tolist() == [1, 4] and first.masks.shape == (2, 16, 16)
    assert first.masks.sum((1, 2)).tolist() == [128, 1] and len(second) == 0
    masks[0, 1] = 0.002
    masks[0, 1, 0, :4] = 0.99  # 4 pixels: 3.96 + 252 * 0.002 = 4.5
    assert len(method.pseudo_labels(None, ((64, 64),) * 3, 2, torch.zeros(2, 3, 64, 64))[0]) == 1


def test_guided_distillation_shows_clip_and_people_its_masks_without_the_padding(small_mini):
    method = made(pldc.Guided)
    cells = torch.full((3, 32, 40), -0.5)  # of 128 x 160 pixels, of which the image has 96 x 100
    cells[0, 4:14, 4:14], cells[1, 20, 20], cells[2, 2, 38] = 3.0, 0.05, 3.0  # the last: padding
    seen = method.seen(cells, ((128, 160), (96, 100), (96, 100))) > 0
    rows, columns = seen[0].any(1).sum(), seen[0].any(0).sum()
    assert seen.shape == (3, 96, 100) and rows == columns == 40 and seen[1].any()
    assert not seen[2].any()
    posterior = torch.zeros(3, 13)
    posterior[:, 1], posterior[:, 2], posterior[:, 12] = 0.6, 0.3, 0.1
    asked = []

    def clip(image, masks):
        asked.append(masks > 0)
        return torch.eye(12)[5].expand(len(masks), -1)

    method.clip = clip
    cells[1] += 0.6  # enough of an area to be kept
    sizes = (128, 160), (96, 100), (96, 100)
    target = method.instances(posterior, cells, torch.zeros(3, 96, 100), sizes, method.burn_in)
    assert len(target) == 3 and len(asked[0]) == 2 and bool(asked[0].flatten(1).any(1).all())
    assert target.labels.tolist() == [5, 5, 1]  # CLIP has half the weight, and is surer


def test_a_step_learns_two_views_of_each_label_and_what_the_teacher_says(small_mini, monkeypatch):
    method, seen = made(class_threshold=0.85, mask_threshold=0.9), {}
    answers(method, monkeypatch)
    method.clip = None
    labeled, unlabeled = method.batches(things())[3]
    assert len(labeled.images) == 4 and labeled.names[0] == labeled.names[1]
    assert torch.equal(labeled.targets[0].segment_map, labeled.targets[1].segment_map)
    assert not torch.equal(labeled.images[0], labeled.images[1])
    assert len(unlabeled.strong) == 2 and unlabeled.boxes == [None, None]

    def noted(head, features, targets, cfg, generators, precision, weight):
        seeds = [g.initial_seed() for g in generators]
        seen[len(targets)] = targets, seeds, weight
        return losses.learn(head, features, targets, cfg, generators, precision, weight)

    monkeypatch.setattr(mean_teacher, "learn", noted)
    row = method.step((labeled, unlabeled), 3)
    (pseudo, seeds, weight), (_, labeled_seeds, _) = seen[2], seen[4]
    assert [t.labels.tolist() for t in pseudo] == [[1], []] and weight == 1.0
    # a generator an image, none twice: slots 0 to 3 for the views, 4 and 5 for the unlabelled
    assert [seed % 1024 for seed in labeled_seeds + seeds] == [*range(6)]
    assert row["pseudo_segments"] == 0.5 and row["unlabeled/mask"] > 0
    terms = {name: value for name, value in row.items() if "/" in name}
    assert row["loss"] == pytest.approx(sum(terms.values())) and len(terms) == 6


@pytest.mark.parametrize("kind", [pldc.Pldc, pldc.Guided])
def test_a_step_without_any_pseudo_label_is_finite(kind, small_mini):
    method = made(kind, class_threshold=1.0)
    row = method.step(method.batches(things())[3], 3)
    assert all(map(math.isfinite, row.values())) and row["pseudo_segments"] == 0
    assert row["unlabeled/mask"] == 0 == row["unlabeled/dice"]
    # the public code of PL-DC learns nothing of it, Guided Distillation that there is no object
    assert (row["unlabeled/class"] > 0) == (kind is pldc.Guided)


# --------------------------------------------------------------------------- teacher and student


def weights(model):
    return {name: value.clone() for name, value in state_of(model).items()}


def taken(method, steps):
    """The method after each of so many steps: (student, teacher as it labels, teacher after). A
    step of the student adds its number to every weight.
    """
    after = []
    for t in range(steps):
        method.prepare(t)
        labels = weights(method.models["teacher"])
        for value in state_of(method.models["student"]).values():
            value.add_(t + 1)
        if not method.cfg.ema_first:
            method.average(t)
        after.append((weights(method.models["student"]), labels, weights(method.models["teacher"])))
    return after


def averaged(teacher, student, decay):
    return {name: decay * value + (1 - decay) * student[name] for name, value in teacher.items()}


def close(a, b):
    return all(torch.allclose(a[name], b[name], atol=1e-6) for name in a)


def test_the_teacher_is_the_student_at_the_end_of_the_burn_in_and_its_average_after_it(small_mini):
    before, after = (taken(made(ema_decay=0.9, ema_first=first), 5) for first in (True, False))
    students, labels, _ = zip(*before)
    assert close(labels[2], students[1])  # in step 2, the first with pseudo-labels
    assert close(labels[3], averaged(students[1], students[2], 0.9))
    assert close(labels[4], averaged(labels[3], students[3], 0.9))
    # whichever order: the same pseudo-labels; only what is left at the end is a step apart
    assert all(close(a[1], b[1]) for a, b in zip(before, after))
    assert close(before[4][2], labels[4])
    assert close(after[4][2], averaged(labels[4], students[4], 0.9))


def test_guided_distillation_has_a_new_student_under_a_teacher_that_stays(small_mini):
    method = made(pldc.Guided, guided_steps=2, ema_decay=0.9, ema_first=True)
    new = weights(method.models["student"])
    some = next(iter(method.models["student"].head.parameters()))
    method.optimizer.state[some] = {"step": torch.tensor(3.0)}
    students, labels, _ = zip(*taken(method, 6))
    assert close(labels[2], students[1]) and close(labels[3], students[1])  # of labels alone
    assert close(students[2], {name: value + 3 for name, value in new.items()})
    assert not method.optimizer.state
    assert close(labels[4], students[3])  # then it is the student
    assert close(labels[5], averaged(students[3], students[4], 0.9))


def test_the_second_stage_of_guided_distillation_is_a_share_of_the_steps():
    cfg = dataclasses.replace(MINI, ssl_steps=800, burn_in=0.5, guided_steps=0.25)
    assert (cfg.settled().burn_in, cfg.settled().guided_steps) == (400, 200)
    assert dataclasses.replace(cfg.settled(), ssl_steps=900).settled() == dataclasses.replace(
        cfg.settled(), ssl_steps=900
    )  # longer runs keep it
    assert config.changes(vars(cfg.settled()), cfg) == {}
    assert checks.ablations(cfg, "ssl") == []
    (line,) = checks.ablations(dataclasses.replace(cfg, guided_steps=0.5), "ssl")
    assert line == "--guided-steps 400: the run ends before the student becomes the teacher"
    (line,) = checks.ablations(dataclasses.replace(cfg, ssl_steps=2), "ssl")
    assert line == "--guided-steps 0.25: of so few steps none, no second stage"


def test_a_guided_run_that_starts_from_another_has_it_as_teacher_at_once(small_mini):
    cfg = dataclasses.replace(SMALL, burn_in_warm=0, guided_steps=3)
    method = pldc.Guided(cfg, things().taxonomy, CPU, warm=True)
    new = weights(method.models["student"])
    for value in state_of(method.models["student"]).values():  # as --init does
        value.add_(0.01)
    other = weights(method.models["student"])
    method.prepare(0)
    assert same(weights(method.models["teacher"]), other)
    assert same(weights(method.models["student"]), new)


# --------------------------------------------------------------------------------------------- runs

RUN = ["--no-eval", "--burn-in", 1, "--steps", 4, "--checkpoint-every", 1]
RUN += ["--class-threshold", 0.05, "--mask-threshold", 0]
GUIDED = [
    "--stage",
    "ssl",
    "--method",
    "guided",
    "--guided-steps",
    2,
    "--clip-view",
    "masked",
    *RUN,
]


@pytest.mark.parametrize("flags", [["--stage", "ssl", "--method", "pldc", *RUN], GUIDED])
def test_a_run_that_is_stopped_equals_one_that_is_not_bit_for_bit(flags, small_mini, tmp_path):
    folder = tmp_path / "run"
    assert run(*flags, "--out", folder) == 0
    whole, rows = checkpoint.newest(folder), log_of(folder)
    assert [row["step"] for row in rows] == [*range(4)]
    assert any(row.get("pseudo_segments") for row in rows)
    assert not any(name.startswith("clip") for name in whole["student"].keys() | whole.keys())
    back_to(folder, 3)
    assert run(*flags, "--out", folder, "--resume") == 0
    assert same(checkpoint.newest(folder), whole) and log_of(folder) == rows
    assert run(*flags, "--out", folder, "--resume", "--class-threshold", 0.06) == 2


def test_two_processes_take_the_steps_of_one(small_mini, tmp_path):
    flags = ["--stage", "ssl", "--method", "pldc", *RUN, "--burn-in", 1, "--steps", 3]
    one, two = tmp_path / "one", tmp_path / "two"
    assert run(*flags, "--out", one) == 0
    said = tmp_path / "said1.txt"
    assert ranks_run(2, tmp_path / "said", *flags, "--out", two) == [0, 0], said.read_text()
    for a, b in zip(log_of(one), log_of(two), strict=True):
        assert a.keys() == b.keys() and a["loss"] == pytest.approx(b["loss"], rel=1e-3)
        assert a.get("pseudo_segments") == b.get("pseudo_segments")
    assert log_of(one)[-1]["pseudo_segments"] > 0


def test_a_run_is_evaluated_shown_and_goes_on_only_with_the_clip_that_it_asked(
    small_mini, tmp_path, capsys
):
    flags = ["--stage", "ssl", "--method", "pldc", "--burn-in", 1, "--steps", 2]
    flags += ["--class-threshold", 0.05, "--mask-threshold", 0, "--out", tmp_path / "run"]
    assert run(*flags) == 0
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    figures = metrics["student/decoder"]
    assert metrics.keys() >= {"student/decoder", "teacher/decoder"} and "ap" in figures
    assert (tmp_path / "run" / "report.html").exists()
    path = tmp_path / "run" / "step_0000002.pt"
    state = torch.load(path, weights_only=True)
    assert len(state["config"]["clip_weights"]) == 64
    assert run("--stage", "eval", "--weights", tmp_path / "run", "--out", tmp_path / "eval") == 0
    state["config"]["clip_weights"] = "0" * 64
    checkpoint.save(tmp_path / "run", 2, state)
    capsys.readouterr()
    assert run(*flags, "--resume") == 2
    assert "asked a CLIP of other weights (SHA-256 000000000000..." in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags, words",
    [
        ("--method dear --class-threshold 0.5", "it counts with --method guided or pldc"),
        ("--method pldc --cutmix-prob 0.5", "mixes no images; it counts with --method ssl, dear"),
        ("--method pldc --labels panoptic", "--method pldc has instances; expected --method ssl"),
        (
            "--method dear --labels instances",
            "pseudo-labels that do not overlap; expected --stage sup or --method",
        ),
        ("--method pldc --coupled 0.7 --mask-threshold 0.5", "it counts with --coupled 0"),
        ("--method pldc --guided-steps 5", "it counts with --method guided"),
        ("--method guided --clip-model RN50", "it counts with --clip-view crop, masked or pool"),
        ("--method pldc --clip-view pool --clip-margin 1", "it counts with --clip-view crop or"),
        ("--method pldc --milestones 0.5", "it counts with --schedule multistep"),
        ("--method pldc --schedule multistep --milestones 0.9:0.5", "expected rising shares"),
        ("--method pldc --schedule multistep --milestones x", "expected rising shares"),
        ("--method pldc --schedule multistep --poly-power 1", "it counts with --schedule poly"),
        ("--method pldc --jitter-prob 0 --jitter 0.5", "it counts with --jitter-prob above 0"),
        ("--method pldc --classifier language --alpha 2", "expected a number from 0 to 1"),
    ],
)
def test_what_does_not_go_together_is_refused_in_a_line(flags, words, capsys):
    assert dearli.main(["--stage", "ssl", *flags.split()]) == 2
    message = capsys.readouterr().err
    assert words in message and message.count("\n") == 1


def test_the_numbers_of_the_paper_are_the_presets_and_flags_change_them():
    def numbers(*words):
        args = parser().parse_args(["--stage", "ssl", *words])
        args.method = args.method or usual_method(args)
        return configure(args)

    coco = numbers("--preset", "coco-instances")
    assert (coco.class_threshold, coco.mask_threshold, coco.ema_decay) == (0.85, 0.9, 0.9996)
    assert (coco.burn_in, coco.ssl_steps, coco.labeled_batch, coco.lambda_u) == (
        20_000,
        368_750,
        8,
        1,
    )
    assert (coco.clip_model, coco.clip_view, coco.cutout) == ("RN50", "crop", "paper")
    assert not coco.train_backbone and coco.weight_decay == coco.lr == 1e-4 and not coco.cutmix_prob
    city = numbers("--preset", "cityscapes-instances", "--method", "pldc")
    assert (city.ssl_steps, city.unlabeled_batch, city.test_max) == (180_000, 4, 2048)
    guided = numbers("--preset", "coco-instances", "--method", "guided")
    assert (guided.class_threshold, guided.mask_threshold, guided.lambda_u) == (0.7, 0, 2)
    assert guided.train_backbone and not guided.pixel_certainty and guided.clip_view == "none"
    changed = numbers("--method", "guided", "--mask-threshold", "0.9", "--clip-view", "crop")
    assert (changed.mask_threshold, changed.clip_view, changed.lambda_u) == (0.9, "crop", 2)
    assert numbers("--labels", "instances") == numbers("--method", "pldc")
