"""Tests, in the order of the files. CPU, seeded, no network, no file outside the repository.

test_fault_NN_... provokes a fault that the project must survive, for real: a kill, a full disk, a
cut file; NN numbers the kinds. `python test_dearli.py --soak 50` kills a run 50 times, `--fuzz 2000` reads
so many mutated files. Tests on real images use the folder named by DEARLI_TEST_DATA (default
../shared/data) and are skipped where it is absent.
"""

import colorsys
import contextlib
import copy
import dataclasses
import hashlib
import itertools
import json
import math
import os
import random
import re
import shutil
import signal
import struct
import tempfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageFilter
from torch import nn
from torchvision.transforms.v2 import functional as TF

import clip_ensemble
import data
import dearli
import deformable_cpu
import dewa
import inference
import matcher
import mean_teacher
import model as m2f
from clip_ensemble import Vocabulary, alpha_of_share, geometric_ensemble, mask_pool
from config import (
    BEFORE,
    MINI,
    OFFICIAL,
    Config,
    CostWeights,
    LossConfig,
    alpha_at,
    numbers_of,
)
from deformable import (
    DeformableAttention,
    Pyramid,
    grid_samples,
    pixel_centres,
    weighted_samples,
)
from engine import begin, checkpoint, optim, sameness, stored
from engine.checkpoint import state_of
from engine.ranges import require_ranges
from engine.request import Course, Machine, Place, Source
from engine.stored import Stored
from ground import files
from ground.errors import UserError
from inference import panoptic_inference, semantic_inference
from losses import class_loss, mask_losses, point_generators, set_loss, uncertain_points
from matcher import Target, match, matching_cost, point_sample
from mean_teacher import MeanTeacher, Supervised
from mini import microcosm, scenes
from model import Attention, attention_mask, mask_logits
from panoptic_eval import MeanIoU, PanopticQuality
from pretrained import foundation
from pretrained.sam import MaskGenerator
from readers import checks, exposure, ground_truth, mask_files, panoptic, pictures, sixteen_bit
from readers.runs import to_runs
from report import watch
from tests.helpers import (
    CPU,
    TINY,
    Answers,
    FakeSam,
    counts,
    features,
    png_of_16_bits,
    predict_stage,
    quarters,
    run,
    run_folder,
    sizes,
    tiny_head,
    tiny_segmenter,
    validated,
    write_coco_folder,
)
from tests.test_fuzz import fuzz
from tests.test_survival import soak
from tools import predict

# --------------------------------------------------------------------------------------- matcher.py


def test_point_sample_reads_pixel_centres_and_mixes_between_them():
    # 1 x 2 map [0, 4]: centres at x = 0.25 and 0.75; halfway 2; at x = 0 the outside (0) has
    # weight 1/2
    maps = torch.tensor([[[0.0, 4.0]]])
    points = torch.tensor([[0.25, 0.5], [0.75, 0.5], [0.5, 0.5], [1.0, 0.5]])
    assert point_sample(maps, points[None]).tolist() == [[0.0, 4.0, 2.0, 2.0]]


def test_targets_are_sampled_as_their_binary_masks_would_be():
    segment_map = torch.randint(
        0, 4, (9, 7), generator=torch.Generator().manual_seed(0), dtype=torch.int32
    )
    masks = torch.stack([segment_map == k for k in (1, 2, 3)])
    labels, points = (
        torch.zeros(3, dtype=torch.int64),
        torch.rand(3, 50, 2, generator=torch.Generator().manual_seed(1)),
    )
    expected = torch.zeros(3, 50)
    for m, p in itertools.product(range(3), range(50)):  # four neighbours by hand, 0 outside
        x, y = points[m, p, 0].item() * 7 - 0.5, points[m, p, 1].item() * 9 - 0.5
        for xx, yy in itertools.product(
            (math.floor(x), math.floor(x) + 1), (math.floor(y), math.floor(y) + 1)
        ):
            if 0 <= xx < 7 and 0 <= yy < 9:
                expected[m, p] += (1 - abs(x - xx)) * (1 - abs(y - yy)) * masks[m, yy, xx]
    for target in (Target(labels, segment_map), Target(labels, masks=masks)):
        torch.testing.assert_close(target.sample(points, torch.arange(3)), expected)
        torch.testing.assert_close(
            target.sample_all(points[0]), point_sample(masks.float(), points[:1].expand(3, -1, -1))
        )


def test_matching_cost_of_one_pair_is_the_sum_worked_out_by_hand():
    # one query, one segment, P = 2 points with targets 1 and 0; mask logits 0 there: p = 1/2
    # class: logits 0, 0 -> -1/2; BCE = ln 2; dice = 1 - (2 * 1/2 + 1) / (1 + 1 + 1) = 1/3
    target = Target(torch.tensor([0]), torch.tensor([[1, 0]], dtype=torch.int32))
    points = torch.tensor([[0.25, 0.5], [0.75, 0.5]])
    cost = matching_cost(
        torch.zeros(1, 2), torch.zeros(1, 1, 2), target, points, CostWeights(2, 5, 5)
    )
    assert cost.item() == pytest.approx(2 * -0.5 + 5 * math.log(2) + 5 / 3, rel=1e-6)


def test_matching_cost_in_small_parts_is_the_cost_of_every_pair_by_the_loss_itself(monkeypatch):
    monkeypatch.setattr(matcher, "PART", 5 * 7)  # 7 of 50 points at once, for 5 queries
    g = torch.Generator().manual_seed(0)
    target, logits, points = (
        Target(torch.tensor([0, 1, 0]), quarters()),
        3 * torch.randn(5, 4, 4, generator=g),
        torch.rand(50, 2, generator=g),
    )
    classes = torch.randn(5, 3, generator=g)
    cost = matching_cost(classes, logits, target, points, CostWeights(2, 5, 4))
    for q, n in ((0, 0), (4, 1), (2, 2)):
        bce, dice = mask_losses(
            logits[q][None], target.sample(points[None], torch.tensor([n])), points[None]
        )
        assert cost[q, n].item() == pytest.approx(
            (-2 * classes.softmax(-1)[q, target.labels[n]] + 5 * bce + 4 * dice).item(), rel=1e-5
        )


def test_match_finds_the_query_that_draws_the_segment():
    target = Target(torch.tensor([0, 1, 2]), quarters())
    masks = torch.stack(
        [10.0 * (quarters() == k) - 5 for k in (3, 1, 0, 2)]
    )  # query 0 draws segment 3, ...
    points = torch.rand(64, 2, generator=torch.Generator().manual_seed(0))
    [(queries, segments)] = match(
        [matching_cost(torch.zeros(4, 4), masks, target, points, CostWeights())]
    )
    assert queries.tolist() == [0, 1, 3] and segments.tolist() == [2, 0, 1]


def test_fault_18_match_with_more_segments_than_queries_uses_every_query_once():
    [(queries, segments)] = match([torch.rand(2, 3)])
    assert queries.tolist() == [0, 1] and len(set(segments.tolist())) == 2


def test_match_of_several_costs_keeps_them_apart_and_without_segments_is_empty():
    first, second, third = match(
        [
            torch.tensor([[1.0, 0.0], [0.0, 1.0]]),
            torch.zeros(2, 0),
            torch.tensor([[5.0], [4.0], [6.0]]),
        ]
    )
    assert [x.tolist() for x in (*first, *second, *third)] == [[0, 1], [1, 0], [], [], [1], [0]]


def test_fault_14_a_cost_that_is_not_finite_gets_some_assignment_and_the_loss_says_so():
    [(queries, segments)] = match([torch.tensor([[math.nan, math.inf], [-math.inf, 1.0]])])
    assert sorted(segments.tolist()) == [0, 1] and queries.tolist() == [0, 1]
    layers, mask_features = tiny_head()(features())
    layers[0][0].data[0, 0, 0] = math.nan
    losses = set_loss(
        layers, mask_features, [Target(torch.tensor([0, 1, 2]), quarters())] * 2, TINY.loss, draws()
    )
    with pytest.raises(optim.NotFinite, match="class nan"):
        optim.require_finite(losses)


def test_target_refuses_labels_and_masks_of_different_number():
    with pytest.raises(ValueError, match=r"expected \(5, H, W\) for 5 labels"):
        Target(torch.zeros(5, dtype=torch.int64), masks=torch.zeros(4, 8, 8, dtype=torch.bool))


# ---------------------------------------------------------------------------------------- losses.py


def test_class_loss_is_weighted_with_a_light_no_object():
    # 2 queries, 1 class; query 0 is matched (p = 0.8), query 1 is not (p_void = 0.5): -ln 0.8 -
    # 0.1 ln 0.5
    logits = torch.tensor([[[math.log(0.8), math.log(0.2)], [0.0, 0.0]]])
    target = [Target(torch.tensor([0]), torch.ones(2, 2, dtype=torch.int32))]
    loss = class_loss(logits, target, [(torch.tensor([0]), torch.tensor([0]))], 0.1)
    assert loss.item() == pytest.approx(-math.log(0.8) - 0.1 * math.log(0.5), rel=1e-6)
    empty, one = torch.zeros(1, 1, 1), torch.zeros(1, 2, 1)  # the set loss divides by 1.1
    losses = set_loss(
        [(logits, one)],
        empty.unsqueeze(0),
        target,
        LossConfig(),
        point_generators(0, 0, 0, 1, torch.device("cpu")),
    )
    assert losses["class"].item() == pytest.approx(
        2 * (-math.log(0.8) - 0.1 * math.log(0.5)) / 1.1, rel=1e-6
    )


def test_mask_losses_of_an_undecided_mask():
    # logits 0 at P = 2 points with targets 1, 0: BCE ln 2, dice 1 - (1 + 1) / (1 + 1 + 1) = 1/3
    points = torch.tensor([[[0.25, 0.5], [0.75, 0.5]]])
    bce, dice = mask_losses(torch.zeros(1, 1, 2), torch.tensor([[1.0, 0.0]]), points)
    assert bce.item() == pytest.approx(math.log(2)) and dice.item() == pytest.approx(1 / 3)


def test_uncertain_points_lie_where_the_logits_are_small():
    logits = torch.full((1, 8, 8), 9.0)
    logits[:, :, 3:5] = 0.1  # x from 3/8 to 5/8
    points = uncertain_points(
        logits, LossConfig(num_points=40, oversample=10), torch.Generator().manual_seed(0)
    )
    near = (points[0, :30, 0] > 0.25) & (points[0, :30, 0] < 0.75)
    assert points.shape == (1, 40, 2) and near.all()


def draws(images=2):
    return point_generators(0, 0, 0, images, torch.device("cpu"))


def test_set_loss_forms_only_the_masks_it_needs_and_equals_the_loss_of_all_of_them():
    layers, mask_features = tiny_head()(features())
    targets = [
        Target(torch.tensor([0, 1, 2]), quarters()),
        Target(torch.tensor([1]), (quarters() == 2).int()),
    ]
    g = torch.Generator().manual_seed(0)
    points = [
        (torch.rand(2, 40, 2, generator=g), torch.rand(4, 40, 2, generator=g)) for _ in layers
    ]
    ours = sum(set_loss(layers, mask_features, targets, TINY.loss, points=points).values())
    whole = 0.0
    for (class_logits, embeddings), (shared, where) in zip(layers, points):
        masks = mask_logits(embeddings, mask_features)  # of all queries, with gradient
        matches = match(
            [
                matching_cost(c, m, t, p, TINY.loss.weights)
                for c, m, t, p in zip(class_logits, masks, targets, shared)
            ]
        )
        chosen = torch.cat([m[q] for m, (q, _) in zip(masks, matches)])
        bce, dice = mask_losses(
            chosen,
            torch.cat(
                [t.sample(p, s) for t, p, (_, s) in zip(targets, where.split([3, 1]), matches)]
            ),
            where,
        )
        label = class_loss(class_logits, targets, matches, 0.1) / (
            4 + 0.1 * 8
        )  # 12 queries, 4 of them matched
        whole = whole + 2 * label + 5 * bce / 4 + 5 * dice / 4
    torch.testing.assert_close(ours, whole)
    tensors = [mask_features, *(t for layer in layers for t in layer)]
    for a, b in zip(
        torch.autograd.grad(ours, tensors, retain_graph=True), torch.autograd.grad(whole, tensors)
    ):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_set_loss_does_not_depend_on_the_order_of_segments():
    layers, mask_features = tiny_head()(features())
    swapped = torch.tensor([0, 2, 1, 3])[quarters().long()].int()

    def loss(segment_map, labels):
        targets = [Target(torch.tensor(labels), segment_map)] * 2
        return {
            k: v.item()
            for k, v in set_loss(layers, mask_features, targets, TINY.loss, draws()).items()
        }

    assert loss(quarters(), [0, 1, 2]) == pytest.approx(loss(swapped, [1, 0, 2]), rel=1e-5)


@pytest.mark.parametrize("masks", [False, True])
def test_fault_17_set_loss_without_any_segment_is_finite_and_reaches_every_parameter(masks):
    head = tiny_head()
    none = torch.zeros(0, dtype=torch.int64)
    target = (
        Target(none, masks=torch.zeros(0, 8, 8, dtype=torch.bool))
        if masks
        else Target(none, torch.zeros(8, 8, dtype=torch.int32))
    )
    losses = set_loss(*head(features()), [target] * 2, TINY.loss, draws())
    sum(losses.values()).backward()
    assert losses["mask"] == 0 and losses["dice"] == 0 and losses["class"] > 0
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in head.parameters())


def test_dewa_loss_gives_the_class_head_a_gradient_of_exactly_zero():
    head = tiny_head()
    masks = torch.zeros(8, 8, 8, dtype=torch.bool)  # 8 masks for 6 queries, overlapping
    for k in range(8):
        masks[k, : k + 1] = True
    sum(
        set_loss(
            *head(features()),
            [Target(torch.zeros(8, dtype=torch.int64), masks=masks)] * 2,
            TINY.loss_dewa,
            draws(),
        ).values()
    ).backward()
    grads = {name: p.grad.abs().sum().item() for name, p in head.named_parameters()}
    assert (
        all(g == 0 for name, g in grads.items() if ".classify." in name)
        and grads["decoder.mask_embed.layers.2.weight"] > 0
    )


# --------------------------------------------------------------------------------- clip_ensemble.py


def test_mask_pool_is_the_mean_under_the_mask_and_zero_where_there_is_none():
    features = torch.tensor([[[[1.0, 3.0]], [[10.0, 30.0]]]])  # (1, 2, 1, 2)
    masks = torch.tensor([[[[1.0, 1.0]], [[-1.0, 2.0]], [[-1.0, -1.0]]]])
    torch.testing.assert_close(
        mask_pool(features, masks), torch.tensor([[[2.0, 20.0], [3.0, 30.0], [0.0, 0.0]]])
    )


def test_mask_pool_resizes_the_logits_before_it_thresholds():
    # 1 x 4 logits [3, -1, -1, -1] become [1, -1] on a 1 x 2 grid: one cell, although a quarter of
    # the mask is on
    pooled = mask_pool(torch.tensor([[[[1.0, 2.0]]]]), torch.tensor([[[[3.0, -1.0, -1.0, -1.0]]]]))
    assert pooled.item() == pytest.approx(1.0)


def test_geometric_ensemble_of_two_classes_by_hand():
    # decoder: p = (0.6, 0.2), void 0.2, so p_MT = (3/4, 1/4); CLIP (1/5, 4/5); alpha 1/2:
    # sqrt(3/20) : sqrt(4/20)
    class_logits, clip_logits = torch.tensor([0.6, 0.2, 0.2]).log(), torch.tensor([0.2, 0.8]).log()
    a, b = math.sqrt(3 / 20), math.sqrt(4 / 20)
    expected = torch.tensor([0.8 * a / (a + b), 0.8 * b / (a + b), 0.2])
    torch.testing.assert_close(geometric_ensemble(class_logits, clip_logits, 0.5).exp(), expected)


def test_geometric_ensemble_at_its_ends_is_one_of_the_two_and_never_touches_void():
    class_logits, clip_logits = torch.randn(4, 7, 6), torch.randn(4, 7, 5)
    p = class_logits.softmax(-1)
    torch.testing.assert_close(geometric_ensemble(class_logits, clip_logits, 1.0).exp(), p)
    torch.testing.assert_close(
        geometric_ensemble(class_logits, clip_logits, 0.0)[..., :-1].exp(),
        clip_logits.softmax(-1) * (1 - p[..., -1:]),
    )
    for alpha in (0.0, 0.3, 1.0):
        ens = geometric_ensemble(class_logits, clip_logits, alpha).exp()
        torch.testing.assert_close(ens[..., -1], p[..., -1])
        torch.testing.assert_close(ens.sum(-1), torch.ones(4, 7))


def test_fault_15_geometric_ensemble_survives_probabilities_that_are_zero_in_single_precision():
    class_logits = torch.tensor([[0.0, -500.0, -1000.0], [-500.0, -400.0, 500.0]])
    for alpha in (0.0, 0.6, 1.0):
        ens = geometric_ensemble(
            class_logits, torch.tensor([[-900.0, 0.0], [900.0, 0.0]]), alpha
        ).exp()
        assert torch.isfinite(ens).all() and torch.allclose(ens.sum(-1), torch.ones(2))


def test_alpha_is_a_constant_a_schedule_or_follows_the_labelled_share():
    assert alpha_at(0.6, 0.0) == alpha_at(0.6, 1.0) == 0.6
    assert [alpha_at("0.4:0.8", p) for p in (0.0, 0.5, 1.0)] == pytest.approx([0.4, 0.6, 0.8])
    # Table 8: the vertex of the parabola through (0.5, 26.70), (0.6, 27.67), (0.7, 24.35) and so
    # on, kept to 0.5 ... 0.7; a line through all
    table = [
        (26.70, 27.67, 24.35),
        (31.22, 32.27, 31.05),
        (34.60, 34.77, 34.88),
        (36.88, 38.27, 37.80),
        (39.66, 40.62, 41.42),
    ]
    best = [min(max(0.6 + 0.05 * (c - a) / (2 * b - a - c), 0.5), 0.7) for a, b, c in table]
    slope, middle = np.polyfit(np.arange(-7, -2) + 5, best, 1)
    assert (round(slope, 3), round(middle, 2)) == (0.028, 0.64)
    assert alpha_of_share(1 / 32) == pytest.approx(0.64) and alpha_of_share(
        1 / 16
    ) == pytest.approx(0.668)
    assert (alpha_of_share(1e-6), alpha_of_share(1.0)) == (0.5, 0.7)


def test_alpha_grows_only_while_there_are_pseudo_labels():
    cfg = dataclasses.replace(TINY, alpha="0.4:0.8", ssl_steps=30, burn_in=10, burn_in_warm=20)
    assert [mean_teacher.teacher_alpha(cfg, step, False) for step in (10, 20)] == pytest.approx(
        [0.4, 0.6]
    )
    assert [mean_teacher.teacher_alpha(cfg, step, True) for step in (20, 25)] == pytest.approx(
        [0.4, 0.6]
    )
    fixed = [
        mean_teacher.teacher_alpha(dataclasses.replace(cfg, teacher_posterior=p), 20, False)
        for p in ("decoder", "clip")
    ]
    assert fixed == [1.0, 0.0]


def test_vocabulary_takes_the_best_synonym_and_passes_it_the_whole_gradient():
    vocabulary = Vocabulary(torch.eye(4), [1, 3])
    e = torch.tensor([[0.0, 0.1, 0.9, 0.2]], requires_grad=True)
    cosine = vocabulary.cosine(F.normalize(e, dim=-1))
    expected = F.normalize(e, dim=-1).detach()
    torch.testing.assert_close(cosine.detach(), torch.stack([expected[:, 0], expected[:, 2]], -1))
    cosine[0, 0].backward()  # the only name of class 0
    other = e.detach().clone().requires_grad_()
    F.normalize(other, dim=-1)[0, 0].backward()
    torch.testing.assert_close(e.grad, other.grad)
    with pytest.raises(ValueError, match="expected 5 rows"):
        Vocabulary(torch.eye(4), [2, 3])


def test_text_embeddings_average_normalised_templates():
    class Clip(nn.Linear):
        def encode_text(self, tokens):
            return tokens

    def tokenize(prompts):
        return torch.tensor([[float(len(p)), 1.0] for p in prompts])

    e = clip_ensemble.text_embeddings(Clip(1, 1), tokenize, ["cat", "zebra"], batch=5)
    rows = F.normalize(
        torch.tensor([[float(len(t.format("zebra"))), 1.0] for t in clip_ensemble.TEMPLATES]),
        dim=-1,
    )
    assert len(clip_ensemble.TEMPLATES) == 14
    torch.testing.assert_close(e[1], F.normalize(rows.mean(0), dim=-1))


def dropping(small_openclip, train_backbone=False):
    """A segmenter on a real OpenCLIP ConvNeXt that has drop path, as OpenCLIP hands it over: in
    training mode."""
    cfg = dataclasses.replace(TINY, backbone=small_openclip, train_backbone=train_backbone)
    return tiny_segmenter(cfg)


def test_fault_44_a_frozen_openclip_with_drop_path_is_in_eval_mode_and_cannot_leave_it(
    small_openclip,
):
    import open_clip

    images = torch.randint(
        0, 256, (2, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    clip = open_clip.create_model(small_openclip)
    assert (
        any(hasattr(m, "drop_prob") and m.drop_prob > 0 for m in clip.modules()) and clip.training
    )
    differ = [clip.encode_image(images.float()) for _ in range(2)]
    assert not torch.equal(*differ)  # the test can fail: noise, where nothing is frozen
    student = dropping(small_openclip)
    whole = student.backbone(images)

    def unchanged(model):
        answers = [model.backbone(images) for _ in range(2)]
        assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(*answers, whole))
        pooled = torch.randn(1, 2, whole[-1].shape[1], generator=torch.Generator().manual_seed(0))
        assert torch.equal(model.backbone.embed(pooled), model.backbone.embed(pooled))
        assert not any(m.training for m in model.backbone.modules())

    for spoil in (
        lambda m: None,
        lambda m: m.train(),
        lambda m: m.backbone.train(),
        lambda m: m.backbone.trunk.train(),
        lambda m: m.backbone.head.train(),
        lambda m: [part.train() for part in m.modules()],
    ):
        for model in (student, student.teacher(), copy.deepcopy(student)):
            spoil(model)
            unchanged(model)
    assert not any(m.training for m in foundation.load_clip(student.cfg)[0].modules())
    assert not any(
        m.training
        for m in foundation.load_timm(
            dataclasses.replace(TINY, backbone="convnext_atto.d2_in1k")
        ).modules()
    )


def test_fault_44_a_trained_backbone_drops_paths_while_it_trains_but_no_teacher_and_no_clips_head(
    small_openclip,
):
    student = dropping(small_openclip, train_backbone=True)
    teacher = student.teacher()

    def modes(model):
        return {name: m.training for name, m in model.named_modules()}

    begun = modes(student)
    student.eval()
    assert not any(modes(student).values())
    for model in (student, teacher):
        model.train()
    assert modes(student) == begun and not any(modes(teacher).values())
    assert not any(
        on
        for name, on in begun.items()
        if name.startswith(("backbone.head", "backbone.trunk.head"))
    )
    assert all(
        on for name, on in begun.items() if name.startswith(("head", "backbone.trunk.stages"))
    )
    images = torch.zeros(1, 3, 64, 64, dtype=torch.uint8)
    assert not torch.equal(student.backbone(images)[-1], student.backbone(images)[-1])
    assert torch.equal(teacher.backbone(images)[-1], teacher.backbone(images)[-1])


@pytest.mark.parametrize("stage", [["dewa"], ["sup"], ["ssl", "--method", "dear"]])
def test_fault_44_every_training_stage_and_what_follows_it_reads_the_features_of_a_frozen_openclip(
    stage, small_openclip, small_mini, tmp_path, monkeypatch
):
    if stage == ["dewa"]:
        mask_files.generate_masks(scenes.load_mini("4").train, FakeSam(), tmp_path / "masks")
    forward, seen = clip_ensemble.Backbone.forward, []

    def checked(self, images):
        maps, again = forward(self, images), forward(self, images)
        seen.append(all(map(torch.equal, maps, again)))
        return maps

    monkeypatch.setattr(clip_ensemble.Backbone, "forward", checked)
    clip, out = (
        ["--backbone", small_openclip, "--pretrained", "random"],
        ["--out", tmp_path / "run"],
    )
    masks = ["--masks", tmp_path / "masks"] if stage == ["dewa"] else []
    watched = ["--checkpoint-every", 1, *([] if stage == ["dewa"] else ["--watch", 1])]
    assert run("--stage", *stage, *clip, *masks, "--steps", 2, *watched, *out) == 0
    assert run("--stage", *stage, *clip, *masks, "--steps", 3, *watched, "--resume", *out) == 0
    trained = len(seen)
    if stage == ["sup"]:
        assert run("--stage", "zeroshot", *clip, "--out", tmp_path / "zeroshot") == 0
        Image.fromarray(microcosm.scene("val", 0).image).save(tmp_path / "a.png")
        assert (
            predict_stage(
                tmp_path / "predicted",
                "--input",
                tmp_path / "a.png",
                "--out",
                tmp_path / "predictions",
                weights=tmp_path / "run",
            )
            == 0
        )
        assert len(seen) > trained
    assert trained >= 3 and all(seen)


def test_a_trained_backbone_with_drop_path_trains_alike_watched_or_stopped_and_resumed(
    small_openclip, small_mini, tmp_path
):
    args = [
        "--stage",
        "sup",
        "--backbone",
        small_openclip,
        "--pretrained",
        "random",
        "--train-backbone",
        "--checkpoint-every",
        1,
        "--no-eval",
    ]
    assert run(*args, "--steps", 3, "--out", tmp_path / "alone") == 0
    with (
        pytest.MonkeyPatch.context() as patch
    ):  # a look at the models after every step, as `watch` has it
        patch.setattr(
            watch,
            "watcher",
            lambda folder, method, *rest: (
                lambda step: [model.eval() for model in method.models.values()]
            ),
        )
        assert run(*args, "--steps", 3, "--out", tmp_path / "watched") == 0
        patch.setattr(
            Supervised,
            "step",
            lambda *args, step=Supervised.step: os.kill(os.getpid(), signal.SIGTERM) or step(*args),
        )
        assert run(*args, "--steps", 3, "--out", tmp_path / "stopped") == 143
    assert run(*args, "--steps", 3, "--out", tmp_path / "stopped", "--resume") == 0
    alone = checkpoint.newest(tmp_path / "alone")["student"]
    for name in ("watched", "stopped"):
        other = checkpoint.newest(tmp_path / name)["student"]
        assert all(torch.equal(alone[k], other[k]) for k in alone)


@pytest.mark.parametrize("size", [(64, 96), (70, 45), (1, 33)])
def test_sides_that_are_no_multiple_of_32_are_padded_with_the_mean_colour(size):
    backbone = tiny_segmenter().backbone
    images = torch.randint(
        0, 256, (2, 3, *size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    mean, std = (
        torch.tensor(v).view(3, 1, 1) for v in (clip_ensemble.PIXEL_MEAN, clip_ensemble.PIXEL_STD)
    )
    height, width = (math.ceil(side / 32) * 32 for side in size)
    x = torch.zeros(2, 3, height, width)  # as the official code: normalised, and then padded with 0
    x[:, :, : size[0], : size[1]] = (images.float() - mean) / std
    x = backbone.trunk.stem(x)
    for stage, feature_map in zip(backbone.trunk.stages, backbone(images)):
        x = stage(x)
        assert torch.equal(x, feature_map)
    assert clip_ensemble.padded_size(*size) == (height, width)


# ----------------------------------------------------------------------------------------- model.py


def test_deformable_attention_equals_its_definition():
    # one level of 3 x 4 pixels, two heads; every sample is read by hand with zeros outside
    torch.manual_seed(0)
    heads, points, c, (h, w) = 2, 3, 8, (3, 4)
    attention = DeformableAttention(c, heads, 1, points)
    for p in attention.parameters():
        nn.init.normal_(p, std=0.5)
    src, query = torch.randn(1, h * w, c), torch.randn(1, h * w, c)
    out = attention(query, src, Pyramid.of([(h, w)], heads, points, "cpu"))
    reference = pixel_centres(h, w, "cpu")
    value = attention.value_proj(src)[0].view(h, w, heads, c // heads)
    offsets = attention.sampling_offsets(query)[0].view(h * w, heads, points, 2)
    weights = attention.attention_weights(query)[0].view(h * w, heads, points).softmax(-1)
    expected = torch.zeros(h * w, heads, c // heads)
    for s in range(h * w):
        for head in range(heads):
            for k in range(points):
                x, y = (reference[s] * torch.tensor([w, h]) - 0.5 + offsets[s, head, k]).tolist()
                for yy in (math.floor(y), math.floor(y) + 1):
                    for xx in (math.floor(x), math.floor(x) + 1):
                        if 0 <= yy < h and 0 <= xx < w:
                            expected[s, head] += (
                                weights[s, head, k]
                                * (1 - abs(x - xx))
                                * (1 - abs(y - yy))
                                * value[yy, xx, head]
                            )
    torch.testing.assert_close(
        out[0], attention.output_proj(expected.flatten(1)), rtol=1e-4, atol=1e-5
    )


def test_attention_equals_torch_multihead_attention_with_a_mask():
    torch.manual_seed(0)
    ours, theirs = Attention(16, 4), nn.MultiheadAttention(16, 4, batch_first=True)
    ours.load_state_dict(theirs.state_dict())
    q, kv, allowed = torch.randn(2, 5, 16), torch.randn(2, 9, 16), torch.rand(2, 1, 5, 9) > 0.5
    allowed[..., 0] = True
    expected, _ = theirs(q, kv, kv, attn_mask=~allowed.expand(2, 4, 5, 9).flatten(0, 1))
    torch.testing.assert_close(ours(q, kv, kv, allowed), expected, rtol=1e-4, atol=1e-5)


def samples(shapes, heads: int, points: int, images: int, d: int):
    """A pyramid, and values, positions (many of them outside) and weights of noise."""
    g = torch.Generator().manual_seed(0)
    pyramid = Pyramid.of(shapes, heads, points, "cpu")
    offsets = torch.randn(images, *pyramid.centres.shape, generator=g) * 2
    value = torch.randn(images, sum(h * w for h, w in shapes), heads, d, generator=g)
    weights = torch.rand(images, *pyramid.centres.shape[1:], generator=g)
    return pyramid, value, pyramid.centres + offsets, weights


def test_samples_by_sparse_matrix_and_their_gradients_are_those_of_grid_sampling():
    shapes = [(1, 1), (2, 1), (3, 4)]  # maps of one row or column, too
    pyramid, value, positions, weights = samples(shapes, heads=2, points=2, images=3, d=5)
    positions[0] = positions[0].round()  # where the slope has a step: as a new model's do
    given = [t.requires_grad_() for t in (value, positions, weights)]
    assert pyramid.table.fits
    ours, plain = weighted_samples(*given, pyramid), grid_samples(*given, shapes)
    assert "SparseSamples" in type(ours.grad_fn).__name__
    torch.testing.assert_close(ours, plain)
    change = torch.randn(ours.shape, generator=torch.Generator().manual_seed(1))
    of_ours = torch.autograd.grad(ours, given, change)
    of_plain = torch.autograd.grad(plain, given, change)
    for a, p in zip(of_ours[::2], of_plain[::2]):
        torch.testing.assert_close(a, p, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(of_ours[1][1:], of_plain[1][1:], rtol=1e-4, atol=1e-5)
    # on a step grid sampling takes either side, as it rounds
    assert of_ours[1][0].isfinite().all() and of_ours[1][0].abs().sum() > 0


def test_samples_of_maps_too_small_for_the_matrix_are_read_by_the_grid(monkeypatch):
    pyramid = Pyramid.of([(1, 1), (1, 2)], 1, 16, "cpu")  # 128 entries a row
    assert pyramid.table.rows == 25 + 30 and not pyramid.table.fits
    monkeypatch.setattr(deformable_cpu, "SparseSamples", None)
    value = torch.ones(2, 3, 1, 4, requires_grad=True)
    weights = torch.full((2, 3, 1, 2, 16), 0.25, requires_grad=True)
    positions = pyramid.centres.expand(2, -1, -1, -1, -1, -1).clone().requires_grad_()
    out = weighted_samples(value, positions, weights, pyramid)
    # 1 x 1 map: the pixel itself; 1 x 2: halfway between two ones
    assert out[0, 0, 0, 0].item() == pytest.approx(8)
    out.sum().backward()
    assert all(t.grad.isfinite().all() for t in (value, positions, weights))
    assert weights.grad[0, 0, 0, 0, 0].item() == pytest.approx(4)


def test_where_positions_are_not_finite_neither_is_the_answer_and_nothing_fails():
    pyramid = Pyramid.of([(2, 2)], 1, 1, "cpu")
    positions = pyramid.centres[None].clone()
    positions[0, 0, 1], positions[0, 1, 2], positions[0, 0, 3] = (
        float("nan"),
        float("inf"),
        1e30,
    )  # far away is just outside
    out = weighted_samples(torch.ones(1, 4, 1, 3), positions, torch.ones(1, 4, 1, 1, 1), pyramid)
    assert (
        out[0, :, 0, 0].isfinite().tolist() == [True, False, False, True]
        and out[0, 3, 0, 0].item() == 0
    )


def test_a_query_looks_inside_its_mask_and_everywhere_if_its_mask_is_empty():
    embeddings, coarse = (
        torch.tensor([[[1.0, 0.0], [0.0, -1.0]]]),
        torch.tensor([[[[1.0, -1.0], [-1.0, 1.0]], [[1.0, 1.0], [1.0, 1.0]]]]),
    )
    assert attention_mask(embeddings, coarse)[0, 0].tolist() == [
        [True, False, False, True],
        [True] * 4,
    ]


def test_sine_position_depends_on_both_axes_and_ends_at_one_turn():
    p = m2f.sine_position(torch.zeros(1, 8, 3, 5))
    assert (
        p.shape == (1, 8, 3, 5)
        and torch.equal(p[0, :4, :, 0], p[0, :4, :, 4])
        and torch.equal(p[0, 4:, 0], p[0, 4:, 2])
    )
    assert p[0, 0, 2, 0].item() == pytest.approx(0, abs=1e-5)  # sin(2 pi)


def test_the_decoder_predicts_after_every_layer_and_once_before():
    layers, mask_features = tiny_head()(features())
    assert len(layers) == TINY.decoder_layers + 1
    assert all(
        c.shape == (2, 6, 4) and mask_logits(e, mask_features).shape == (2, 6, 16, 16)
        for c, e in layers
    )
    linear, _ = tiny_head(dataclasses.replace(TINY, classifier="linear"))(features())
    assert linear[-1][0].shape == (2, 6, 4)


def test_the_last_prediction_alone_equals_the_last_of_all():
    head = tiny_head(dataclasses.replace(TINY, decoder_layers=7))
    with torch.no_grad():
        for parameter in head.decoder.mask_embed.parameters():
            parameter.mul_(3)  # masks that differ from query to query
        (every, mask_features), (last, _) = head(features()), head(features(), last_only=True)
    assert len(every) == 8 and len(last) == 1
    masks = mask_logits(every[-1][1], mask_features).sigmoid()
    assert (masks > 0.6).any() and (masks < 0.4).any()
    for a, b in zip(every[-1], last[0]):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_panoptic_inference_merges_stuff_keeps_things_apart_and_drops_void():
    masks = torch.full((4, 4, 8), -9.0)
    masks[0, :, :2], masks[1, :, 2:4], masks[2, :, 4:6], masks[3, :, 6:] = 9, 9, 9, 9
    posterior = torch.tensor([[0.1, 0.8, 0.1], [0.1, 0.7, 0.2], [0.9, 0.0, 0.1], [0.1, 0.1, 0.8]])
    segment_map, labels, scores = panoptic_inference(
        posterior, masks, torch.tensor([True, False]), sizes(4, 8)
    )
    assert segment_map[0].tolist() == [1, 1, 1, 1, 2, 2, 0, 0] and labels.tolist() == [1, 0]
    assert scores.tolist() == pytest.approx([0.8, 0.9])
    segment_map, labels, _ = panoptic_inference(
        posterior, masks, torch.tensor([True, True]), sizes(4, 8)
    )
    assert segment_map[0].tolist() == [1, 1, 2, 2, 3, 3, 0, 0] and labels.tolist() == [1, 1, 0]


def test_panoptic_inference_drops_a_query_that_keeps_less_than_the_overlap_threshold():
    masks = torch.full((2, 1, 10), -9.0)
    masks[0, 0, :10], masks[1, 0, :3] = 9, 9  # query 1 wins 3 of query 0's 10 pixels
    posterior = torch.tensor([[0.6, 0.4], [0.9, 0.1]])
    things = torch.tensor([True])
    assert panoptic_inference(posterior, masks, things, sizes(1, 10), 0.0, 0.8)[1].tolist() == [
        0
    ]  # 7/10 < 0.8
    assert (
        panoptic_inference(posterior, masks, things, sizes(1, 10), 0.0, 0.7)[0][0].tolist()
        == [2] * 3 + [1] * 7
    )


def test_joined_stuff_is_one_segment_a_class_and_things_stay_apart():
    things = [True, False, False]  # 0 thing, 1 and 2 stuff
    labels = [1, 0, 2, 1, 0, 2]
    # stuff 1 is segment 1, the thing 2, stuff 2 is 3; the second stuff 1 joins 1, the second thing
    # is 4
    first, number = inference.join_stuff(labels, [True] * 6, things)
    assert (first, number) == ([0, 1, 2, 4], [1, 2, 3, 1, 4, 3])
    #   a candidate that is absent is no segment: stuff 1 begins with its second
    present = [False, True, False, True, False, True]
    first, number = inference.join_stuff(labels, present, torch.tensor(things))
    assert (first, number) == ([1, 3, 5], [0, 1, 0, 2, 0, 3])
    assert inference.join_stuff([], [], things) == ([], [])
    assert inference.join_stuff([1, 1], [False, False], things) == ([], [0, 0])


def test_inference_of_nothing_is_an_empty_map():
    posterior = torch.tensor([[0.1, 0.9]])
    segment_map, labels, _ = panoptic_inference(
        posterior, torch.ones(1, 2, 2), torch.tensor([True]), sizes(4, 4)
    )
    assert segment_map.eq(0).all() and segment_map.shape == (4, 4) and len(labels) == 0


def test_masks_are_cut_from_the_padding_before_they_are_resized():
    masks = torch.full((1, 4, 4), -9.0)
    masks[:, :, :2] = 9  # all of the unpadded half
    segment_map, _, _ = panoptic_inference(
        torch.tensor([[0.9, 0.1]]), masks, torch.tensor([True]), ((16, 16), (16, 8), (32, 12))
    )
    assert segment_map.shape == (32, 12) and segment_map[:, :11].eq(1).all()


def test_queries_compete_alike_whether_few_or_all_are_looked_at_at_once(monkeypatch):
    g = torch.Generator().manual_seed(0)
    posterior = torch.randn(40, 4, generator=g).mul(2).softmax(-1)
    masks = F.interpolate(
        torch.randn(1, 40, 6, 6, generator=g) * 4, size=(24, 24), mode="bilinear"
    )[0]
    things = torch.tensor([True, True, False])
    given = (posterior, masks, things, ((96, 96), (90, 80), (45, 40)), 0.0, 0.0)
    together = panoptic_inference(*given)
    assert len(together[1]) > 5
    monkeypatch.setattr(
        inference, "CPU_CHUNK", 3 * 45 * 40
    )  # three queries at once, and one left over
    for a, b in zip(together, panoptic_inference(*given)):
        assert torch.equal(a, b)
    masks = inference.resize_masks(masks, *given[3]).sigmoid()
    for a, b in zip(together, panoptic_inference(*given, masks=masks)):
        assert torch.equal(a, b)


def test_semantic_inference_sums_over_queries_and_never_says_void():
    masks = torch.tensor([[[9.0, 9.0]], [[9.0, -9.0]]])
    posterior = torch.tensor([[0.3, 0.1, 0.6], [0.0, 0.5, 0.5]])
    assert semantic_inference(posterior, masks, sizes(1, 2)).tolist() == [
        [1, 0]
    ]  # 0.3 < 0.1 + 0.5; 0.3 > 0.1


def test_teacher_shares_a_frozen_backbone_and_copies_a_trained_one():
    student = tiny_segmenter()
    teacher = student.teacher()
    assert teacher.backbone is student.backbone and teacher.head is not student.head
    assert all(name.startswith("head.") for name in state_of(student))
    assert not any(p.requires_grad for p in student.backbone.parameters())
    student = tiny_segmenter(dataclasses.replace(TINY, train_backbone=True))
    assert student.teacher().backbone is not student.backbone
    assert any(name.startswith("backbone.") for name in state_of(student))


# --------------------------------------------------------------------- config.py, data.py, optim.py


def test_weak_views_move_image_and_map_together():
    ramp = np.arange(48 * 64, dtype=np.int32).reshape(48, 64) // 16 % 200  # map value = grey level
    image = Image.fromarray(np.repeat(ramp[..., None].astype(np.uint8), 3, -1))
    cfg = dataclasses.replace(
        TINY, crop=32, scale_min=1.5, scale_max=1.5
    )  # short side 48: not resampled
    for seed in range(20):
        view, (layer,) = data.weak_view(data.Sample(image, [ramp]), cfg, random.Random(seed))
        assert view.shape == (3, 32, 32) and np.array_equal(view[0].numpy(), layer)


def test_image_and_map_stay_aligned_at_every_scale():
    y, x = np.mgrid[0:90, 0:120]
    image, layers = Image.fromarray(np.stack([2 * x, 2 * y, 0 * x], -1).astype(np.uint8)), [x, y]
    cfg = dataclasses.replace(TINY, crop=80)  # short sides 40 to 160
    for seed in range(60):
        view, moved = data.weak_view(data.Sample(image, layers), cfg, random.Random(seed))
        for channel, layer in zip(view.numpy(), moved):  # two grey levels a pixel of the source
            assert np.abs(channel - 2.0 * layer).max() <= 3, (
                "less than two pixels of the source apart"
            )


def test_with_turns_image_and_map_lie_in_any_of_four_ways_and_together():
    ramp = np.arange(48 * 64, dtype=np.int32).reshape(48, 64) // 16 % 200
    image = Image.fromarray(np.repeat(ramp[..., None].astype(np.uint8), 3, -1))
    cfg = dataclasses.replace(TINY, crop=32, scale_min=1.5, scale_max=1.5)
    still, turned = set(), set()
    for seed in range(40):
        for ways, turns in ((still, False), (turned, True)):
            one = dataclasses.replace(cfg, turns=turns)
            view, (layer,) = data.weak_view(data.Sample(image, [ramp]), one, random.Random(seed))
            assert np.array_equal(view[0].numpy(), layer)
            down, right = layer[-1, 0] - layer[0, 0], layer[0, -1] - layer[0, 0]
            ways.add((abs(down) > abs(right), down + right > 0))
    assert len(still) == 1 and len(turned) == 4


def test_a_part_is_resized_as_if_it_were_cropped_from_the_whole():
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (61, 83, 3), np.uint8))
    layer = np.arange(61 * 83).reshape(61, 83)
    for size, part in (
        ((166, 122), (7, 0, 107, 100)),
        ((40, 30), (3, 5, 40, 25)),
        ((95, 70), (20, 30, 95, 70)),
        ((83, 61), (1, 2, 50, 60)),
    ):
        whole = data.resize_part(data.Sample(noise, [layer]), size, (0, 0, *size))
        assert np.array_equal(
            np.asarray(whole.image), np.asarray(noise.resize(size, Image.Resampling.BILINEAR))
        )
        got, (left, top, right, bottom) = (
            data.resize_part(data.Sample(noise, [layer]), size, part),
            part,
        )
        difference = np.asarray(got.image).astype(int) - np.asarray(whole.image.crop(part))
        assert np.abs(difference).max() <= 2 and abs(difference.mean()) < 0.05
        assert np.array_equal(got.layers[0], whole.layers[0][top:bottom, left:right])


def test_resizing_keeps_the_long_side_below_its_limit():
    assert data.output_size(100, 50, 64, 1000) == (128, 64)
    assert data.output_size(5000, 20, 64, 256) == (256, 1)


def test_cutmix_boxes_lie_inside_and_have_the_area_that_was_drawn():
    rng = random.Random(0)
    for top, bottom, left, right in (data.cutmix_box(80, 120, rng) for _ in range(200)):
        assert (
            0 <= top <= bottom <= 80
            and 0 <= left <= right <= 120
            and (bottom - top) * (right - left) <= 0.4 * 80 * 120
        )


@pytest.mark.parametrize(
    "size", [(60, 640), (640, 60), (1, 5000), (5000, 1), (3, 700), (1, 1), (2, 2)]
)
def test_a_cutmix_box_is_found_in_a_view_of_any_shape(size):
    rng = random.Random(0)
    for top, bottom, left, right in (data.cutmix_box(*size, rng) for _ in range(20)):
        assert 0 <= top <= bottom <= size[0] and 0 <= left <= right <= size[1]
        assert min(size) < 3 or (bottom - top) * (right - left) > 0


def test_where_no_cutmix_box_of_the_area_fits_it_is_the_largest_that_does():
    # 15 360 pixels of 60 x 640: 60 high, and 200 wide at the flattest aspect of 0.3
    share = (0.4, 0.4)
    boxes = [data.cutmix_box(60, 640, random.Random(seed), share) for seed in range(20)]
    assert {(bottom - top, right - left) for top, bottom, left, right in boxes} == {
        (60, 200)
    } and len(set(boxes)) > 15


def test_counting_the_cutmix_boxes_that_fit_gives_what_drawing_until_one_fits_gives(monkeypatch):
    def many(tries):
        monkeypatch.setattr(data, "CUTMIX_TRIES", tries)
        rng = random.Random(0)
        top, bottom, left, right = np.array(
            [data.cutmix_box(24, 32, rng) for _ in range(8000)]
        ).T.astype(float)
        w, h = right - left, bottom - top
        return np.array(
            [values.mean() for values in (w, h, w * h, w * w, h * h, top, left, top * h, left * w)]
        )

    counted, drawn = many(0), many(10**6)
    assert (
        np.abs(counted / drawn - 1).max() < 0.04
    )  # of 8 000 boxes; without the weights of the corners the widths are 9 % off


def test_half_of_the_images_get_a_box_and_only_those_a_partner(small_mini):
    batches = data.SemiSupervisedBatches(
        scenes.load_mini("4"),
        dataclasses.replace(TINY, burn_in=0, labeled_batch=1, unlabeled_batch=100),
        1,
    )
    unlabeled = batches[0][1]
    mixed = sum(box is not None for box in unlabeled.boxes)
    assert 30 < mixed < 70 and len(unlabeled.weak) == len(unlabeled.boxes) == 100
    assert len(unlabeled.partner_weak) == len(unlabeled.partner_strong) == mixed
    for prob in (0.0, 1.0):
        batches.cfg = dataclasses.replace(batches.cfg, unlabeled_batch=2, cutmix_prob=prob)
        assert len(batches[0][1].partner_weak) == 2 * prob


def test_strong_and_colour_views_keep_the_size_and_change_the_pixels():
    image = torch.from_numpy(microcosm.scene("train", 0).image).permute(2, 0, 1)
    for view in (lambda image, rng: data.strong_view(image, OFFICIAL, rng), data.ssd_colour):
        changed = [view(image, random.Random(seed)) for seed in range(8)]
        assert all(
            v.shape == (3, 128, 128) and v.dtype == torch.uint8 for v in changed
        ) and not torch.equal(changed[0], changed[1])


def noise_and_greys(side=64):
    """(3, side, side) uint8: random colours, a quarter of them dull, and a ramp of greys."""
    image = torch.randint(
        0, 256, (3, side, side), generator=torch.Generator().manual_seed(0), dtype=torch.uint8
    )
    image[:, :, side // 2 :] = image[:1, :, side // 2 :] // 2 + image[:, :, side // 2 :] // 8
    image[:, 0] = torch.arange(side) * 4
    return image


def test_hue_and_saturation_shift_as_in_hsv():
    image = noise_and_greys()
    for turn in (0.2, 0.031, 0.0, -0.11, -0.2, 0.5):
        difference = (
            data.to_bytes(data.shift_hsv(image / 255, turn)).int()
            - TF.adjust_hue(image, turn).int()
        )
        assert difference.abs().max() <= 1
    for r, g, b in (image[:, ::7, ::7] / 255).flatten(1).T.tolist():
        h, s, v = colorsys.rgb_to_hsv(r, g, b)
        shifted = data.shift_hsv(torch.tensor([r, g, b])[:, None, None], 0.3, 1.5).flatten()
        assert shifted.tolist() == pytest.approx(
            colorsys.hsv_to_rgb((h + 0.3) % 1, min(1.5 * s, 1), v), abs=1e-4
        )


def test_the_jitter_is_that_of_the_official_code_without_its_rounding():
    image, no_blur = noise_and_greys(), dataclasses.replace(OFFICIAL, blur_prob=0.0)
    picture = Image.fromarray(image.permute(1, 2, 0).numpy())

    def composed(x, rng):
        steps = [
            (TF.adjust_brightness, 0.8),
            (TF.adjust_contrast, 0.8),
            (TF.adjust_saturation, 0.8),
            (TF.adjust_hue, 0.2),
        ]
        rng.shuffle(steps)
        for adjust, reach in steps:
            x = adjust(x, rng.uniform(-reach, reach) + (adjust is not TF.adjust_hue))
        return TF.rgb_to_grayscale(x, num_output_channels=3) if rng.random() < 0.2 else x

    rounded = []
    for seed in range(30):
        strong = data.strong_view(image, no_blur, random.Random(seed)).int()
        assert (strong - 255 * composed(image / 255, random.Random(seed))).abs().max() <= 0.51, (
            "torchvision's, in floating point"
        )
        rounded.append(
            (strong - TF.pil_to_tensor(composed(picture, random.Random(seed))).int()).abs().float()
        )
    assert torch.stack(rounded).mean() < 2, (
        "Pillow cuts off what is behind the point in each step, and keeps 8 bits of hue"
    )


@pytest.mark.parametrize("radius", [0.1, 0.4, 1.0, 1.4, 1.5, 2.0, 4.0])
def test_the_blur_is_that_of_pillow_without_its_rounding(radius):
    image = noise_and_greys()
    reach = 3 * int(radius + 1)  # nearer to the edge Pillow repeats pixels three times
    blurred = data.to_bytes(data.gaussian_blur(image / 255, radius)).int()
    pillow = TF.pil_to_tensor(
        Image.fromarray(image.permute(1, 2, 0).numpy()).filter(ImageFilter.GaussianBlur(radius))
    ).int()
    difference = (blurred - pillow)[:, reach:-reach, reach:-reach]
    assert (
        blurred.shape == image.shape
        and difference.abs().max() <= 4
        and difference.float().abs().mean() < 1
    )
    one = torch.zeros(1, 65, 65)
    one[0, 32, 32] = 1
    spread = data.gaussian_blur(one, radius)[0].sum(0)
    assert spread.sum() == pytest.approx(1) and (
        spread * (torch.arange(65) - 32) ** 2
    ).sum() == pytest.approx(radius**2, rel=1e-4)
    assert torch.allclose(data.gaussian_blur(torch.full((3, 5, 7), 0.3), radius), torch.tensor(0.3))


def test_crowd_and_vanished_segments_are_no_training_targets():
    target = data.to_target(
        np.array([[1, 2, 4]], np.int32),
        np.array([5, 6, 7, 8]),
        np.array([False, True, False, False]),
    )
    assert target.labels.tolist() == [5, 8] and target.segment_map.tolist() == [[1, 0, 2]]


def test_fault_28_a_batch_depends_on_seed_and_step_only_and_not_on_workers(small_mini):
    dataset = scenes.load_mini("4")
    cfg = dataclasses.replace(TINY, burn_in=0)
    alone = [data.SemiSupervisedBatches(dataset, cfg, 3)[s] for s in (2, 0, 1)]
    for workers in (0, 2):
        loaded = list(data.loader(data.SemiSupervisedBatches(dataset, cfg, 3), 0, workers))
        for (l1, u1), (l2, u2) in zip([alone[1], alone[2], alone[0]], loaded):
            assert (
                torch.equal(l1.images, l2.images)
                and torch.equal(u1.strong, u2.strong)
                and u1.boxes == u2.boxes
            )
            assert all(
                torch.equal(a.segment_map, b.segment_map) for a, b in zip(l1.targets, l2.targets)
            )
    other = data.SemiSupervisedBatches(dataset, dataclasses.replace(cfg, seed=1), 3)[0]
    assert not torch.equal(other[1].weak, alone[1][1].weak)


def test_every_labelled_image_is_seen_once_a_pass(small_mini):
    batches = data.LabeledBatches(scenes.load_mini("5"), TINY, 100)
    seen = [
        batches.pick(batches.dataset.labeled, step, slot, 2)
        for step in range(10)
        for slot in range(2)
    ]
    assert all(sorted(seen[i : i + 5]) == [0, 1, 2, 3, 4] for i in range(0, 20, 5))


def reversed_categories(root, target, names=None):
    """A copy of a data set that lists its categories the other way round, or calls some
    otherwise."""
    shutil.copytree(root, target)
    for part in ("train", "val"):
        path = target / f"panoptic_{part}.json"
        content = json.loads(path.read_text())
        content["categories"].reverse()
        for category in content["categories"]:
            category["name"] = (names or {}).get(category["name"], category["name"])
        path.write_text(json.dumps(content))
    return target


def test_classes_are_joined_by_name_and_never_by_place(tmp_path):
    abc = ground_truth.Taxonomy(("a, alpha", "b", "c"), (True, False, True), (1, 2, 3))
    cba = ground_truth.Taxonomy(("c", "b", "a"), (True, False, True), (7, 8, 9))
    assert abc.order_in(cba, "here", "there").tolist() == [
        2,
        1,
        0,
    ]  # synonyms are no part of what a class is called
    for other, words in (
        (
            ground_truth.Taxonomy(("a", "b", "d"), abc.things, abc.ids),
            "only in there: d; only in here: c",
        ),
        (
            ground_truth.Taxonomy(("a", "b"), (True, False), (1, 2)),
            "here: its classes are not those of there; only in here: c",
        ),
        (
            dataclasses.replace(cba, things=(True, True, True)),
            "here: b: stuff here, but not in there",
        ),
    ):
        with pytest.raises(UserError, match=words):
            abc.order_in(other, "here", "there")
    dataset = panoptic.load_folder(write_coco_folder(tmp_path / "set"), "3")
    other = panoptic.load_folder(reversed_categories(tmp_path / "set", tmp_path / "reversed"), "3")
    assert (
        other.taxonomy.names == dataset.taxonomy.names[::-1]
        and other.taxonomy.ids == dataset.taxonomy.ids[::-1]
    )
    other.follow(dataset.taxonomy, "run")
    assert (
        other.taxonomy == dataset.taxonomy
        and other.truth_fingerprint() == dataset.truth_fingerprint()
    )
    for part in ("train", "val"):
        assert getattr(other, part).taxonomy == dataset.taxonomy  # `limits` looks for stuff there
        for i in range(2):
            one, two = (getattr(d, part).truth(i) for d in (dataset, other))
            assert np.array_equal(one.labels, two.labels) and np.array_equal(
                one.semantic(), two.semantic()
            )
    mini = scenes.load_mini("4")
    before = mini.val.truth(0).labels
    mini.follow(
        ground_truth.Taxonomy(
            mini.taxonomy.names[::-1], mini.taxonomy.things[::-1], mini.taxonomy.ids
        ),
        "run",
    )
    assert (19 - before).tolist() == mini.val.truth(0).labels.tolist()


def test_a_validation_json_may_count_its_categories_otherwise(tmp_path):
    root = write_coco_folder(tmp_path / "set")
    expected = panoptic.load_folder(root, "3").val.truth(0).labels.tolist()
    content = json.loads((root / "panoptic_val.json").read_text())
    for rows in (content["categories"], *(a["segments_info"] for a in content["annotations"])):
        for row in rows:
            key = "category_id" if "category_id" in row else "id"
            row[key] = 1000 - row[key]  # 7, 17, ... 197 become 993, 983, ... 803
    (root / "panoptic_val.json").write_text(json.dumps(content))
    assert panoptic.load_folder(root, "3").val.truth(0).labels.tolist() == expected
    content["categories"][0]["isthing"] = 0
    (root / "panoptic_val.json").write_text(json.dumps(content))
    with pytest.raises(
        UserError, match="panoptic_val.json: .* is stuff, but a thing in panoptic_train.json"
    ):
        panoptic.load_folder(root, "3")


def test_the_results_of_a_run_are_not_replaced_by_those_of_other_images(tmp_path):
    root, other = write_coco_folder(tmp_path / "set"), write_coco_folder(tmp_path / "other")
    moved = reversed_categories(root, tmp_path / "moved")
    Image.new("RGB", (64, 64)).save(other / "images" / "train0.png")
    dataset = panoptic.load_folder(root, "all")
    config = {
        "data_root": str(root),
        "stage": "sup",
        "data": dataset.train.fingerprint(dataset.labeled),
        "taxonomy": dataset.taxonomy.to_config(),
    }
    trained = Stored(tmp_path, {"student": {}, "config": config})
    for place, expected in ((root, False), (moved, False), (other, True)):
        source = Source("custom", str(place), split="all")
        there = panoptic.load_folder(place, "all")
        assert begin.elsewhere(config, source, there) == expected
    with pytest.raises(UserError, match="other training images; name a folder .* with --out"):
        dearli.stage_eval(trained, source, Place(), Machine(), Config(), Course(), None)


def test_the_rows_of_a_linear_class_head_follow_the_names():
    cfg = dataclasses.replace(TINY, classifier="linear")
    there, here = (
        ground_truth.Taxonomy(names, (True,) * 3, (1, 2, 3))
        for names in (("a", "b", "c"), ("c", "a", "b"))
    )
    one, two = tiny_segmenter(cfg, there), tiny_segmenter(cfg, here)
    weights = {name: value.clone() for name, value in state_of(one).items()}
    trained = Stored(Path("run"), {"student": weights, "config": {"taxonomy": there.to_config()}})
    order = stored.class_order(trained, here, "here")
    assert order.tolist() == [2, 0, 1]
    stored.take(trained, "student", two, "run", order=order)
    for kind in ("weight", "bias"):  # c, a, b and no-object
        name = f"head.decoder.classify.{kind}"
        assert torch.equal(state_of(two)[name], weights[name][[2, 0, 1, 3]])
    older = Stored(Path("run"), {"student": weights, "config": {}})
    with pytest.raises(UserError, match="run: trained on 3 classes, here has 2"):
        fewer = ground_truth.Taxonomy(("a", "b"), (True,) * 2, (1, 2))
        stored.class_order(older, fewer, "here", two.class_rows)
    with pytest.raises(UserError, match="run: trained on 3 classes, here has 4"):
        more = ground_truth.Taxonomy(tuple("abcd"), (True,) * 4, (1, 2, 3, 4))
        stored.class_order(older, more, "here", two.class_rows)  # no-object is no fourth class


def test_a_coco_panoptic_folder_is_read_as_it_was_written(tmp_path):
    dataset = panoptic.load_folder(write_coco_folder(tmp_path / "set"), "1_3")
    assert (
        dataset.labeled == [0, 3]
        and dataset.unlabeled == [1, 2, 4, 5]
        and len(dataset.taxonomy) == 20
    )
    s, truth = microcosm.scene("train", 3, 64), dataset.train.truth(3)
    assert np.array_equal(truth.segment_map, s.segment_map) and np.array_equal(
        truth.labels, s.labels
    )
    assert truth.crowd.tolist() == [k == 1 for k in range(len(s.labels))]
    assert np.array_equal(truth.semantic(), s.labels[s.segment_map - 1])
    assert len(panoptic.load_folder(tmp_path / "set", "2").labeled) == 2


def test_images_without_annotation_are_unlabelled_images(tmp_path):
    root = write_coco_folder(tmp_path / "set", images=3)
    path = root / "panoptic_train.json"
    content = json.loads(path.read_text())
    Image.new("RGB", (20, 16)).save(root / "images" / "new.png")
    content["images"].append({"id": "new", "file_name": "new.png", "width": 20, "height": 16})
    path.write_text(json.dumps(content))
    (root / "panoptic_val.json").write_text(json.dumps(content))
    dataset = panoptic.load_folder(root, "2")
    assert (
        len(dataset.train) == 4
        and len(dataset.val) == 3
        and len(dataset.labeled) == 2
        and 3 in dataset.unlabeled
    )
    assert dataset.train.image(3).size == (20, 16)
    checks.require_files(dataset.train, dataset.unlabeled, "unlabelled", maps=False)
    (root / "list.txt").write_text("new.png\n")
    with pytest.raises(UserError, match="'new.png' has no annotation"):
        panoptic.load_folder(root, str(root / "list.txt"))
    with pytest.raises(UserError, match="expected 1 to 3 labelled images"):
        panoptic.load_folder(root, "4")


def tiff_of_16_bits(path, values, order="<", packed=False):
    """A TIFF of (H, W, 3) values, 16 bits each, least or most significant byte first, as they are
    or deflated.
    """
    height, width = values.shape[:2]
    content, place = values.astype(f"{order}u2").tobytes(), 8 + 2 + 10 * 12 + 4
    content = zlib.compress(content) if packed else content
    short = {256: width, 257: height, 259: 8 if packed else 1, 262: 2, 277: 3, 278: height}
    entries = [
        (tag, struct.pack(f"{order}HHIHH", tag, 3, 1, value, 0)) for tag, value in short.items()
    ]
    entries += [
        (258, struct.pack(f"{order}HHII", 258, 3, 3, place)),
        (273, struct.pack(f"{order}HHII", 273, 4, 1, place + 6)),
        (279, struct.pack(f"{order}HHII", 279, 4, 1, len(content))),
        (339, struct.pack(f"{order}HHIHH", 339, 3, 1, 1, 0)),
    ]
    path.write_bytes(
        {"<": b"II", ">": b"MM"}[order]
        + struct.pack(f"{order}HIH", 42, 8, 10)
        + b"".join(e for _, e in sorted(entries))
        + struct.pack(f"{order}I3H", 0, 16, 16, 16)
        + content
    )


def test_sixteen_bits_become_eight_by_a_white_point_in_every_kind_of_file(tmp_path):
    values = np.random.default_rng(0).integers(0, 4096, (5, 7, 4)).astype(np.uint16)
    values[0, 0] = 4095, 16, 15, 9
    files = {
        "grey.png": np.repeat(values[..., :1], 3, -1),
        "grey-alpha.png": np.repeat(values[..., :1], 3, -1),
        "rgba.png": values[..., :3],
    }
    png_of_16_bits(tmp_path / "grey.png", values[..., 0])
    png_of_16_bits(tmp_path / "grey-alpha.png", values[..., :2])
    png_of_16_bits(tmp_path / "rgba.png", values)
    png_of_16_bits(tmp_path / "rgb.png", values[..., :3])
    Image.fromarray(values[..., 0]).save(tmp_path / "grey.tif")
    files |= {"rgb.png": values[..., :3], "grey.tif": files["grey.png"]}
    for order, packed in (("<", False), ("<", True), (">", False), (">", True)):
        name = f"{'little' if order == '<' else 'big'}{packed}.tif"
        tiff_of_16_bits(tmp_path / name, values[..., :3], order, packed)
        files[name] = values[..., :3]
    for name, true in files.items():
        # 4095 is 12 bits: a shift by 4. 65535: by 8, as ever. 1000: 500 becomes 500 * 256 / 1001 =
        # 127.9, and what is above 1000 is cut off
        assert np.array_equal(
            np.asarray(pictures.open_image(tmp_path / name, white=4095)), true >> 4
        ), name
        assert np.array_equal(np.asarray(pictures.open_image(tmp_path / name)), true >> 8), name
        cut = np.asarray(pictures.open_image(tmp_path / name, white=1000))
        assert (
            np.array_equal(cut, np.minimum(true.astype(int) * 256 // 1001, 255))
            and cut[0, 0, 0] == 255
        ), name
        assert (
            exposure.above_white(tmp_path / name, 4095)
            == 0
            < exposure.above_white(tmp_path / name, 4094)
            < 0.2
        ), name
    signed = Image.fromarray(np.array([[-5, 4000]], np.int32))
    signed.save(tmp_path / "signed.tif")
    with pytest.raises(UserError, match="signed.tif: .*sign, or of 32 bits"):
        pictures.open_image(tmp_path / "signed.tif", white=4095)


def test_the_white_point_is_that_of_all_training_images_and_jpegs_are_not_opened(
    tmp_path, monkeypatch
):
    for name, largest in {"a.png": 300, "b.png": 2500, "sub/c.PNG": 100}.items():
        (tmp_path / "set" / name).parent.mkdir(parents=True, exist_ok=True)
        png_of_16_bits(tmp_path / "set" / name, [[0, largest]])
    Image.new("L", (4, 4), 255).save(tmp_path / "set" / "eight.png")  # says nothing of 16 bits
    (tmp_path / "set" / "cut.png").write_bytes(
        (tmp_path / "set" / "a.png").read_bytes()[:40]
    )  # whoever needs it will say so
    (tmp_path / "set" / "d.jpg").write_bytes(b"not opened")
    opened, open_it = [], Image.open
    monkeypatch.setattr(
        Image, "open", lambda path, **more: opened.append(Path(path).name) or open_it(path, **more)
    )
    images = pictures.ImageFolder(tmp_path / "set")
    assert exposure.white_point(images) == 4095 and "d.jpg" not in opened  # 2500 < 4096 = 2^12
    exposure.see(0, False, images)
    assert np.asarray(images.image(images.names.tolist().index("b.png")))[0, 1, 0] == 2500 >> 4
    assert (
        np.asarray(images.image(images.names.tolist().index("a.png")))[0, 1, 0] == 300 >> 4
    )  # still darker than b.png
    for largest, white in ((40, 255), (255, 255), (256, 511), (32767, 32767), (32768, 65535)):
        png_of_16_bits(tmp_path / "one.png", [[0, largest]])
        (tmp_path / str(largest)).mkdir()
        (tmp_path / "one.png").rename(tmp_path / str(largest) / "one.png")
        assert exposure.white_point(pictures.ImageFolder(tmp_path / str(largest))) == white
    opened.clear()
    shutil.rmtree(tmp_path / "set" / "sub")
    for path in (tmp_path / "set").glob("*.png"):
        path.unlink()
    assert (
        exposure.white_point(pictures.ImageFolder(tmp_path / "set")) == sixteen_bit.WHITE
        and not opened
    )
    many = [f"{i:04}.png" for i in range(3000)]
    monkeypatch.setattr(exposure, "_largest", lambda path: opened.append(path.name) or 7)
    images.names = np.array(many)
    assert (
        exposure.white_point(images) == 255
        and len(opened) == exposure.MEASURED
        and opened[:2] == ["0000.png", "0003.png"]
        and opened[-1] == "2997.png"
    )


def test_a_run_stores_the_white_point_that_it_was_trained_with(tmp_path, capsys):
    root = write_coco_folder(tmp_path / "set", images=2)
    size = Image.open(root / "images" / "train0.png").size
    png_of_16_bits(root / "images" / "train1.png", np.full(size[::-1], 900))
    flags = ("--split", "1", "--steps", 1, "--no-eval", "--no-stretch")
    assert run_folder("sup", root, *flags) == 0
    config = json.loads((tmp_path / "set-sup-1" / "config.json").read_text())
    assert config["white"] == 1023  # 900 < 1024 = 2^10
    png_of_16_bits(root / "images" / "train1.png", np.full(size[::-1], 9000))
    assert (
        run_folder("sup", root, *flags, "--resume") == 2
        and "white: 1023 there, 16383 now" in capsys.readouterr().err
    )
    # versions before this number divided by 256; what is no run has no numbers
    assert numbers_of({"alpha": 0.5}) == {**BEFORE, "alpha": 0.5} and numbers_of({}) == {}
    assert BEFORE["white"] == 65535 and BEFORE["optimizer"] == "adamw"
    assert not BEFORE["seen_width"] and not BEFORE["window"]  # they saw whole images
    old = {name: value for name, value in config.items() if name not in BEFORE}
    assert sameness.differing(old, {**config, **BEFORE}) == []
    assert sameness.differing(old, {**config, **BEFORE, "white": 1023}) == ["white"]
    for white, sound in (
        (0, True),
        (255, True),
        (65535, True),
        (254, False),
        (65536, False),
        (-1, False),
    ):
        with contextlib.nullcontext() if sound else pytest.raises(UserError, match="--white"):
            require_ranges(dataclasses.replace(TINY, white=white))


def test_a_list_goes_before_a_number_of_its_name_and_a_number_before_a_file(tmp_path, monkeypatch):
    root = write_coco_folder(tmp_path / "set")
    (root / "splits" / "3").mkdir()
    (root / "splits" / "3" / "labeled.txt").write_text("train5.png\n")
    assert (
        panoptic.load_folder(root, "3").labeled == [5]
        and len(panoptic.load_folder(root, "2").labeled) == 2
    )
    monkeypatch.chdir(tmp_path)
    for name in ("2", "1_3", "list"):
        (tmp_path / name).write_text("train1.png\n")
    assert len(panoptic.load_folder(root, "2").labeled) == 2 and panoptic.load_folder(
        root, "1_3"
    ).labeled == [0, 3]
    assert (
        panoptic.load_folder(root, "./2").labeled
        == panoptic.load_folder(root, "list").labeled
        == [1]
    )
    for split in ("", "all"):
        assert panoptic.load_folder(root, split).labeled == [0, 1, 2, 3, 4, 5]
    (root / "splits" / "all").mkdir()
    (root / "splits" / "4").mkdir()  # a folder without a list is no number
    for split in ("all", "", "4"):
        with pytest.raises(
            UserError, match=f"splits/{split or 'all'}/labeled.txt: no such file, though --split"
        ):
            panoptic.load_folder(root, split)
    (root / "splits" / "all" / "labeled.txt").write_text("train2.png\ntrain4.png\n")
    for split in ("", "all"):
        assert panoptic.load_folder(root, split).labeled == [2, 4]


def test_a_data_root_reads_the_same_maps_however_it_is_spelled(tmp_path, monkeypatch):
    root = write_coco_folder(tmp_path / "set", images=2)
    (root / "annotations").mkdir()
    for part in ("train", "val"):
        (root / f"panoptic_{part}.json").rename(root / "annotations" / f"panoptic_{part}.json")
        shutil.copytree(root / "panoptic", root / "annotations" / f"panoptic_{part}")
    (tmp_path / "link").symlink_to(root)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for spelling in (root, "set", "./set/", "set/../set", "link", "~/set"):
        read = panoptic.load_folder(spelling, "all").train
        assert read.maps.resolve() == root / "annotations" / "panoptic_train" and len(
            read.truth(1).labels
        ), spelling
    monkeypatch.chdir(root)
    assert (
        panoptic.load_folder(".", "all").train.maps.resolve()
        == root / "annotations" / "panoptic_train"
    )
    shutil.rmtree(root / "panoptic")
    assert len(panoptic.load_folder(".", "all").val.truth(0).labels)


def test_what_a_picture_is_is_one_rule(tmp_path):
    folder = tmp_path / "pictures"
    names = ["a.jpg", "a.png", "b.TIF", "c.webp", "d.bmp", "sub/e.jp2", "sub/deep/f.gif"]
    hidden = ["._a.png", ".ipynb_checkpoints/a.png", "__MACOSX/a.png", "sub/.g.png", ".git/x/y.png"]
    for name in (*names, *hidden, "notes.txt", "a.json", "sub/table.csv"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "g.png").touch()
    (folder / "linked").symlink_to(outside)
    (folder / "sub" / "loop").symlink_to(folder)  # without end, if it were followed
    (outside / "itself").symlink_to(outside)
    others = []
    assert pictures.pictures(folder, others.append) == sorted([*names, "linked/g.png"])
    assert sorted(others) == sorted(
        [
            "._a.png",
            ".ipynb_checkpoints/",
            "__MACOSX/",
            "sub/.g.png",
            ".git/",
            "notes.txt",
            "a.json",
            "sub/table.csv",
            "sub/loop/",
            "linked/itself/",
        ]
    )
    assert (
        pictures.ImageFolder(folder).names.tolist()
        == predict.Pictures(folder, tmp_path / "out").names
        == pictures.pictures(folder)
    )
    files.release(tmp_path / "out")


def test_what_cannot_be_learned_or_measured_is_refused_before_the_first_step(tmp_path, capsys):
    root = write_coco_folder(tmp_path / "set", images=3)
    whole = {
        part: json.loads((root / f"panoptic_{part}.json").read_text()) for part in ("train", "val")
    }

    def refused(part, change, words):
        for other in ("train", "val"):
            content = json.loads(json.dumps(whole[other]))
            (root / f"panoptic_{other}.json").write_text(
                json.dumps(change(content) or content if other == part else content)
            )
        for stage in ("sup", "ssl --method ssl"):
            capsys.readouterr()
            assert run_folder(stage, root, "--split", "2" if "ssl" in stage else "all") == 2
            error = capsys.readouterr().err.splitlines()[-1]
            assert re.search(words, error), error
        _, errors, content = validated(root, code=2, capsys=capsys)
        assert any(re.search(words, text) for text in content["problems"]["nothing"]["faults"])
        assert not list(tmp_path.glob("*-sup-*")) and not list(tmp_path.glob("*-ssl-*"))

    def all_crowd(content):
        for s in (s for a in content["annotations"] for s in a["segments_info"]):
            s["iscrowd"] = 1

    def void(content):
        for a in content["annotations"]:
            a["segments_info"] = []

    refused(
        "val",
        lambda c: {**c, "annotations": []},
        "panoptic_val.json: no image is annotated, so nothing can be measured",
    )
    refused(
        "val",
        lambda c: {**c, "annotations": [], "images": []},
        "panoptic_val.json: no image is annotated",
    )
    refused("val", all_crowd, "panoptic_val.json: none of the 2 validation images has a segment")
    refused(
        "train", all_crowd, r"panoptic_train.json: none of the \d labelled images has a segment"
    )
    content = json.loads(json.dumps(whole["train"]))
    void(content)
    (root / "panoptic_train.json").write_text(json.dumps(content))
    (root / "panoptic_val.json").write_text(json.dumps(whole["val"]))
    with pytest.raises(UserError, match="none of the 3 labelled images has a segment"):
        checks.require_truth(panoptic.load_folder(root, "all"))
    (root / "panoptic_train.json").write_text(json.dumps({**whole["train"], "annotations": []}))
    shutil.rmtree(root / "panoptic")  # nobody needs maps then
    (root / "panoptic_val.json").write_text(json.dumps({**whole["val"], "annotations": []}))
    for stage in ("sup", "ssl --method ssl"):
        capsys.readouterr()
        assert run_folder(stage, root, "--classifier", "language", "--alpha", "labeled") == 2
        assert (
            "panoptic_train.json: no image is annotated, so nothing can be learned"
            in capsys.readouterr().err
        )
    (root / "panoptic_train.json").write_text(
        json.dumps({**whole["train"], "annotations": [], "images": []})
    )
    for stage in ("masks", "dewa"):
        assert run_folder(stage, root) == 2
        assert "its list of images is empty" in capsys.readouterr().err


def test_objects_out_of_reach_are_counted_from_the_index(tmp_path, capsys):
    root = write_coco_folder(tmp_path / "set", images=3)
    dataset = panoptic.load_folder(root, "2")
    counts = [
        sum(not s["iscrowd"] for s in a["segments_info"])
        for a in json.loads((root / "panoptic_train.json").read_text())["annotations"]
    ]
    val = [
        sum(not s["iscrowd"] for s in a["segments_info"])
        for a in json.loads((root / "panoptic_val.json").read_text())["annotations"]
    ]
    counts = [counts[i] for i in dataset.labeled]
    assert (
        checks.objects(dataset.train, dataset.labeled).tolist() == counts
        and checks.objects(dataset.val, [1, 0]).tolist() == val[::-1]
    )
    cfg = dataclasses.replace(TINY, num_queries=2)

    def line(counts, what):
        over = [c for c in counts if c > 2]
        return (
            f"{len(over)} of {len(counts)} {what} images have more than 2 segments (up to "
            f"{max(over)}): "
            f"{sum(over) - 2 * len(over)} of {sum(counts)} objects cannot be found; raise "
            f"--num-queries"
        )

    expected = [line(counts, "labelled"), line(val, "validation")]
    assert (
        checks.out_of_reach(dataset, cfg) == expected
        and checks.out_of_reach(dataset, dataclasses.replace(cfg, num_queries=max(counts + val)))
        == []
    )
    whole = ["--split", "2", "--num-queries", "2", "--seen-width", "0", "--window", "0"]
    out, _, content = validated(root, *whole, code=0, capsys=capsys)
    assert content["notices"][:2] == expected and all(f"note: {text}" in out for text in expected)
    assert run_folder("sup", root, *whole, "--dry-run") == 0
    out = capsys.readouterr().out
    assert all(f"warning: {text}\n" in out for text in expected)
    # windows share the queries: of an image of 64 x 48 pixels one shows a fourth, if it is half as
    # wide and half as high
    cfg = dataclasses.replace(cfg, num_queries=1, seen_width=40.0, object_width=30.0, window=32)
    size = pictures.image_header(dataset.val.path(0))[0]
    share = min(1, 24 / size[0]) * min(1, 24 / size[1])
    in_view = [round(n * share) if n > 1 else n for n in val]
    lines = checks.out_of_reach(dataset, cfg)
    assert any("validation" in text for text in lines) == any(n > 1 for n in in_view)
    assert share < 0.5 and max(in_view) < max(val)


def test_an_error_in_a_loader_process_is_one_line(tmp_path):
    root = write_coco_folder(tmp_path / "set", images=2)
    dataset = panoptic.load_folder(root, "1")
    for path in (root / "images").iterdir():
        path.write_bytes(path.read_bytes()[:60])
    for workers in (0, 1):
        with pytest.raises(UserError, match="not a readable image") as error:
            next(iter(data.loader(data.LabeledBatches(dataset, TINY, 1), 0, workers)))
        assert "\n" not in str(error.value) and str(root) in str(error.value)


def test_weight_decay_spares_norms_and_embeddings_only():
    student = tiny_segmenter()
    optimizer = optim.build_optimizer(student, TINY)
    decay = {id(p): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    named = {name: decay[id(p)] for name, p in student.head.named_parameters()}
    for name in (
        "pixel_decoder.level_embed",
        "decoder.classify.logit_scale",
        "decoder.layers.0.linear1.bias",
        "pixel_decoder.lateral.0.weight",
    ):
        assert named[name] == 0.05, name
    for name in (
        "decoder.query_feat.weight",
        "decoder.level_embed.weight",
        "decoder.classify.void_embedding.weight",
        "pixel_decoder.lateral.1.weight",
        "decoder.decoder_norm.bias",
    ):
        assert named[name] == 0.0, name


def test_the_learning_rate_rises_in_a_line_where_a_share_of_the_steps_says_so():
    layer = nn.Linear(2, 1, bias=False)
    for schedule in ("poly", "multistep"):
        flat = dataclasses.replace(Config(), lr=2.0, schedule=schedule)
        cfg = dataclasses.replace(flat, lr_warmup=0.25)
        optimizer = optim.build_optimizer(layer, cfg)
        plain = [optim.set_lr(optimizer, step, 40, flat) for step in range(40)]
        rates = [optim.set_lr(optimizer, step, 40, cfg) for step in range(40)]
        assert [a / b for a, b in zip(rates, plain)] == pytest.approx(
            [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, *[1.0] * 31]
        )
        assert optimizer.param_groups[0]["lr"] == rates[-1]


def test_poly_schedule_and_clipping_of_the_whole_gradient():
    layer = nn.Linear(2, 1, bias=False)
    cfg = dataclasses.replace(Config(), lr=1.0, clip_norm=0.5)
    optimizer = optim.build_optimizer(layer, cfg)
    assert optim.set_lr(optimizer, 0, 100, cfg) == 1.0 and optim.set_lr(
        optimizer, 50, 100, cfg
    ) == pytest.approx(0.5**0.9)
    (layer.weight * torch.tensor([[3.0, 4.0]])).sum().backward()
    norm = optim.descend(optimizer, cfg)
    assert norm == pytest.approx(5.0) and layer.weight.grad.norm().item() == pytest.approx(
        0.5, rel=1e-4
    )


# ---------------------------------------------------------------------------------- mean_teacher.py


def test_teacher_is_the_average_of_the_student():
    student = tiny_segmenter()
    teacher = student.teacher()
    before = {k: v.clone() for k, v in state_of(teacher).items()}
    with torch.no_grad():
        for p in student.head.parameters():
            p.add_(1.0)
    mean_teacher.update_teacher(teacher, student, 0.9)
    for name, p in state_of(teacher).items():
        torch.testing.assert_close(p, before[name] + 0.1, rtol=1e-5, atol=1e-6)


def test_the_teacher_averages_statistics_copies_counters_and_leaves_what_is_constant():
    class Normed(nn.Module):
        constant = ("frozen.",)

        def __init__(self):
            super().__init__()
            self.frozen, self.norm = nn.Linear(2, 2), nn.BatchNorm1d(2)

    student, teacher = Normed(), Normed()
    student.norm.running_mean.copy_(torch.tensor([10.0, 20.0]))  # the teacher's are 0 and 1
    student.norm.running_var.copy_(torch.tensor([2.0, 3.0]))
    student.norm.num_batches_tracked.fill_(7)
    kept = teacher.frozen.weight.clone()
    mean_teacher.update_teacher(teacher, student, 0.9)
    torch.testing.assert_close(teacher.norm.running_mean, torch.tensor([1.0, 2.0]))
    torch.testing.assert_close(teacher.norm.running_var, torch.tensor([1.1, 1.2]))
    assert teacher.norm.num_batches_tracked == 7  # a count, of which there is no average
    assert torch.equal(teacher.frozen.weight, kept)
    student.norm.running_var[0] = math.inf
    with pytest.raises(optim.Broken, match="not finite: norm.running_var; the teacher was left"):
        mean_teacher.update_teacher(teacher, student, 0.9)
    assert teacher.norm.running_var.isfinite().all()


def test_fault_13_a_nan_in_the_student_never_reaches_the_teacher():
    student = tiny_segmenter()
    teacher = student.teacher()
    student.head.decoder.query_feat.weight.data[0, 0] = math.nan
    with pytest.raises(optim.NotFinite, match="query_feat"):
        mean_teacher.update_teacher(teacher, student, 0.9)
    assert all(torch.isfinite(p).all() for p in teacher.parameters())


def test_fault_13_a_step_that_spoils_a_weight_ends_it_before_the_teacher_hears_of_it():
    student = tiny_segmenter()
    teacher = student.teacher()
    before = {k: v.clone() for k, v in state_of(teacher).items()}
    optimizer = optim.build_optimizer(student, TINY)
    for group in optimizer.param_groups:
        group["lr"] = 3e38  # the gradient is finite, what it leads to is not
    for p in student.head.parameters():
        p.grad = torch.ones_like(p)
    student.head.decoder.query_feat.weight.data[0, 0] = 3e38
    with pytest.raises(optim.Broken, match="the step made weights infinite or NaN"):
        optim.descend(optimizer, TINY)
    assert all(torch.equal(p, before[k]) for k, p in state_of(teacher).items()) and issubclass(
        optim.Broken, optim.NotFinite
    )


def test_both_ema_schedules():
    cold = dataclasses.replace(Config(), ema_decay=0.999, burn_in=0)
    assert [mean_teacher.ema_decay(t, cold, warm=False) for t in (0, 1, 9, 10**6)] == [
        0.0,
        0.5,
        0.9,
        0.999,
    ]
    assert [mean_teacher.ema_decay(t, cold, warm=True) for t in (0, 1)] == [0.999, 0.999]
    burnt = dataclasses.replace(cold, burn_in=2)
    assert [mean_teacher.ema_decay(t, burnt, warm=False) for t in (0, 1, 2)] == [0.0, 0.0, 0.999]


def test_cutmix_of_labels_merges_stuff_drops_what_vanished_and_pastes_void():
    things = torch.tensor([True, False])  # class 0 thing, 1 stuff
    first = Target(torch.tensor([0, 1, 0]), torch.tensor([[1, 2, 2, 3]], dtype=torch.int32))
    second = Target(torch.tensor([1, 0]), torch.tensor([[2, 2, 0, 1]], dtype=torch.int32))
    mixed = mean_teacher.mix_target(
        first, second, (0, 1, 2, 4), things
    )  # right half from the second
    # pixel 0 thing, pixel 1 stuff of the first; pixel 2 void and pixel 3 stuff of the second; the
    # first's second thing is gone
    assert mixed.segment_map.tolist() == [[1, 2, 0, 2]] and mixed.labels.tolist() == [0, 1]
    mixed = mean_teacher.mix_target(
        first, second, (0, 1, 0, 2), things
    )  # left half: things stay apart
    assert mixed.segment_map.tolist() == [[3, 3, 1, 2]] and mixed.labels.tolist() == [1, 0, 0]
    assert first.segment_map.tolist() == [[1, 2, 2, 3]]  # nothing edited in place


def test_cutmix_of_images_and_labels_uses_the_same_box(small_mini):
    dataset = scenes.load_mini("4")
    batches = data.SemiSupervisedBatches(
        dataset, dataclasses.replace(TINY, burn_in=0, cutmix_prob=1.0, unlabeled_batch=3), 1
    )
    u = batches[0][1]
    mixed = mean_teacher.mix_images(u.strong, u.partner_strong, u.boxes)
    for k, (top, bottom, left, right) in enumerate(u.boxes):
        inside = torch.zeros(64, 64, dtype=torch.bool)
        inside[top:bottom, left:right] = True
        assert torch.equal(mixed[k][:, inside], u.partner_strong[k][:, inside]) and torch.equal(
            mixed[k][:, ~inside], u.strong[k][:, ~inside]
        )


def test_pseudo_labels_obey_the_clip_switch():
    teacher = tiny_segmenter().teacher()
    f = teacher.backbone(torch.randint(0, 255, (1, 3, 64, 64), dtype=torch.uint8))
    class_logits, mask_logits = teacher.predict(f)
    decoder = teacher.posterior(f, class_logits, mask_logits, 1.0)
    torch.testing.assert_close(decoder, class_logits.softmax(-1))
    assert not torch.allclose(teacher.posterior(f, class_logits, mask_logits, 0.6), decoder)
    clip = teacher.posterior(
        f, class_logits, mask_logits, 0.0
    )  # P_CLIP, and the decoder's own no-object
    p_clip = clip_ensemble.zero_shot_logits(
        teacher.backbone, f[-1], mask_logits, teacher.vocabulary
    ).softmax(-1)
    torch.testing.assert_close(
        clip,
        torch.cat([p_clip * (1 - decoder[..., -1:]), decoder[..., -1:]], -1),
        rtol=1e-4,
        atol=1e-6,
    )


def test_semantic_labels_are_one_segment_a_class(small_mini):
    truth = ground_truth.Truth(
        np.array([[0, 1, 2], [3, 3, 1]], np.int32),
        np.array([4, 2, 4]),
        np.array([2, 1, 2]),
        np.zeros(3, bool),
    )
    merged = truth.by_class()  # segments 1 and 3 are of class 4
    assert (
        merged.segment_map.tolist() == [[0, 2, 1], [2, 2, 2]]
        and merged.labels.tolist() == [2, 4]
        and merged.areas.tolist() == [1, 4]
    )
    own = dataclasses.replace(
        truth, classes=lambda: np.array([[0, ground_truth.IGNORE, 1], [1, 1, 1]])
    )  # where the data set has class maps
    assert own.by_class().segment_map.tolist() == [
        [1, 0, 2],
        [2, 2, 2],
    ] and own.by_class().labels.tolist() == [0, 1]
    cfg = dataclasses.replace(TINY, burn_in=0, labels="semantic")
    dataset = scenes.load_mini("4")
    method = MeanTeacher(dataclasses.replace(cfg, ssl_steps=1), dataset.taxonomy, CPU)
    labeled, unlabeled = method.batches(dataset)[0]
    assert all(len(t.labels.unique()) == len(t) for t in labeled.targets)
    maps = method.models["teacher"].backbone(unlabeled.weak)
    for pseudo in method.pseudo_labels(maps, ((64, 64),) * 3, 0):
        assert (
            len(pseudo.labels.unique()) == len(pseudo)
            and (pseudo.segment_map > 0).all()
            and pseudo.segment_map.max() == len(pseudo)
        )
    losses = method.step((labeled, unlabeled), 0)
    assert math.isfinite(losses["loss"]) and losses["unlabeled/mask"] > 0


@pytest.mark.parametrize("train_backbone", [False, True])
@pytest.mark.parametrize("classifier", ["language", "linear"])
def test_a_semi_supervised_step_moves_student_and_teacher_and_leaves_a_frozen_backbone_alone(
    small_mini, classifier, train_backbone
):
    cfg = dataclasses.replace(TINY, burn_in=0, classifier=classifier, train_backbone=train_backbone)
    dataset = scenes.load_mini("4")
    method = MeanTeacher(cfg, dataset.taxonomy, CPU)
    student, teacher = method.models["student"], method.models["teacher"]
    backbone = [p.clone() for p in student.backbone.trunk.stem.parameters()]
    head = {k: p.clone() for k, p in state_of(student).items()}
    losses = method.step(data.SemiSupervisedBatches(dataset, cfg, 1)[0], 0)
    assert math.isfinite(losses["loss"]) and losses["grad_norm"] > 0
    assert losses["loss"] == pytest.approx(sum(v for k, v in losses.items() if "/" in k), rel=1e-5)
    assert sum(not torch.equal(p, head[k]) for k, p in state_of(student).items()) > 0.9 * len(
        [k for k in head if k.startswith("head")]
    )
    assert (
        all(torch.equal(a, b) for a, b in zip(backbone, student.backbone.trunk.stem.parameters()))
        != train_backbone
    )
    assert all(
        torch.equal(p, state_of(student)[k]) for k, p in state_of(teacher).items()
    )  # decay 0 at the first step


def test_fault_17_a_step_with_empty_pseudo_labels_is_finite(small_mini, monkeypatch):
    cfg = dataclasses.replace(TINY, burn_in=0)
    dataset = scenes.load_mini("4")
    nothing = Target(torch.zeros(0, dtype=torch.int64), torch.zeros(64, 64, dtype=torch.int32))
    monkeypatch.setattr(
        MeanTeacher, "pseudo_labels", lambda self, features, *rest: [nothing] * len(features[0])
    )
    batch = data.SemiSupervisedBatches(dataset, cfg, 1)[0]
    losses = MeanTeacher(cfg, dataset.taxonomy, CPU).step(batch, 0)
    assert (
        losses["unlabeled/mask"] == 0
        and math.isfinite(losses["loss"])
        and losses["pseudo_segments"] == 0
    )


def test_fault_15_bf16_keeps_losses_in_single_precision(small_mini):
    cfg = dataclasses.replace(TINY, burn_in=0)
    dataset = scenes.load_mini("4")
    batch = data.SemiSupervisedBatches(dataset, cfg, 1)[0]

    def loss(precision):
        return MeanTeacher(cfg, dataset.taxonomy, CPU, precision).step(batch, 0)["loss"]

    assert loss(torch.bfloat16) == pytest.approx(loss(torch.float32), rel=0.05)


# --------------------------------------------------------------------------------- panoptic_eval.py


def pq_of(pred, pred_labels, true, true_labels, num_classes=2, things=None, **more):
    """Result of one image; a map given as a list is one row of pixels."""
    quality = PanopticQuality(num_classes)
    quality.add(np.atleast_2d(pred), pred_labels, np.atleast_2d(true), true_labels, **more)
    return quality.result(np.zeros(num_classes, bool) if things is None else things)


def test_pq_of_a_perfect_prediction_is_one_whatever_the_order_of_segments():
    true = np.array([[1, 1, 2, 2], [3, 3, 0, 2]])
    pred = np.array([[2, 2, 3, 3], [1, 1, 0, 3]])
    result = pq_of(pred, [1, 0, 0], true, [0, 0, 1], things=np.array([True, False]))
    for group, n in (("all", 2), ("things", 1), ("stuff", 1)):
        assert result[group] == {"pq": 1.0, "sq": 1.0, "rq": 1.0, "n": n}


def test_pq_does_not_punish_pixels_over_void():
    # truth of 10 px; the prediction covers 8 of them and 2 void px: IoU = 8 / (10 + 10 - 8 - 2) =
    # 0.8
    result = pq_of([0, 0] + [1] * 8 + [1, 1], [0], [1] * 10 + [0, 0], [0])
    assert counts(result) == (1, 0, 0) and result["all"]["pq"] == pytest.approx(0.8)


def test_pq_is_sq_times_rq_for_one_match_one_false_positive_and_one_miss():
    # segment 1: 3 of 4 px, IoU 3/4; prediction 2 (2 px) lies on 1 px of segment 1 and 1 px of
    # segment 2 (3 px):
    # IoU 1 / (2 + 3 - 1), no match. tp fp fn = 1 1 1: sq 3/4, rq 1 / (1 + 1/2 + 1/2) = 1/2, pq 3/8
    result = pq_of([1, 1, 1, 2, 2, 0, 0], [0, 0], [1, 1, 1, 1, 2, 2, 2], [0, 0])
    assert counts(result) == (1, 1, 1)
    assert [result["all"][key] for key in ("pq", "sq", "rq")] == pytest.approx(
        [3 / 8, 3 / 4, 1 / 2]
    )


def test_pq_an_iou_of_exactly_one_half_is_no_match():
    assert counts(pq_of([1, 1, 0, 0], [0], [1, 1, 1, 1], [0])) == (0, 1, 1)  # 2 / 4
    assert counts(pq_of([1, 1, 1, 0, 0], [0], [1, 1, 1, 1, 1], [0])) == (1, 0, 0)  # 3 / 5


def test_pq_needs_the_same_class():
    result = pq_of([1, 1], [1], [1, 1], [0])
    assert counts(result, 0) == (0, 0, 1) and counts(result, 1) == (0, 1, 0)
    assert result["all"] == {
        "pq": 0.0,
        "sq": 0.0,
        "rq": 0.0,
        "n": 2,
    }  # a class only predicted is in the mean


def test_pq_classes_that_occur_nowhere_are_not_in_the_mean():
    result = pq_of([1, 1], [3], [1, 1], [3], num_classes=133)
    assert (
        result["all"] == {"pq": 1.0, "sq": 1.0, "rq": 1.0, "n": 1}
        and len(result["per_class"]) == 133
    )


def test_pq_an_unmatched_prediction_mostly_on_void_is_no_false_positive_but_one_half_on_void_is():
    assert counts(pq_of([1, 1, 1], [0], [1, 0, 0], [1])) == (0, 0, 0)  # 2 of 3 px on void
    assert counts(pq_of([1, 1, 1, 1], [0], [1, 1, 0, 0], [1])) == (0, 1, 0)  # 2 of 4


def test_fault_32_pq_crowd_is_never_missed_and_never_matched():
    crowd = dict(true_crowd=[True])
    assert counts(pq_of([0, 0], [], [1, 1], [0], **crowd)) == (0, 0, 0)
    assert counts(pq_of([1, 1], [0], [1, 1], [0], **crowd)) == (
        0,
        0,
        0,
    )  # forgiven, but no true positive
    assert counts(pq_of([1, 1], [1], [1, 1], [0], **crowd), 1) == (
        0,
        1,
        0,
    )  # a crowd of another class forgives nothing


def test_fault_32_pq_void_and_crowd_are_added_before_the_half_is_taken():
    # 5 px: 2 on void, 1 on the crowd of its class, 2 on another segment: 3/5 forgiven; each alone
    # would not do
    result = pq_of([1] * 5, [0], [0, 0, 1, 2, 2], [0, 1], true_crowd=[True, False])
    assert counts(result, 0) == (0, 0, 0) and counts(result, 1) == (0, 0, 1)


def test_pq_crowd_pixels_stay_in_the_union_of_a_match():
    # truth of 4 px found whole, and 2 px of crowd with it: IoU 4 / (6 + 4 - 4) = 2/3; on void it
    # would be 1
    result = pq_of([1] * 6, [0], [1, 1, 1, 1, 2, 2], [0, 0], true_crowd=[False, True])
    assert counts(result) == (1, 0, 0) and result["all"]["pq"] == pytest.approx(2 / 3)


def test_pq_of_several_crowd_regions_of_a_class_only_the_last_listed_forgives():
    pred, true = [1, 1, 1, 2, 2, 2], [1, 1, 1, 2, 2, 2]
    assert counts(pq_of(pred, [0, 0], true, [0, 0], true_crowd=[True, True])) == (0, 1, 0)
    assert counts(
        pq_of([0] * 6 + [1], [0], [1, 1, 1, 2, 2, 2, 2], [0, 0], true_crowd=[True, True])
    ) == (0, 0, 0)
    assert counts(
        pq_of([1] + [0] * 6, [0], [1, 1, 1, 2, 2, 2, 2], [0, 0], true_crowd=[True, True])
    ) == (0, 1, 0)


def test_pq_takes_the_area_of_the_truth_from_the_json():
    # 4 px found whole; stated 5: IoU 4 / (4 + 5 - 4) = 0.8; stated 8: exactly 1/2, no match;
    # stated 2: 4 / 2 = 2, as the API
    areas = {5: ((1, 0, 0), 0.8), 8: ((0, 1, 1), 0.0), 2: ((1, 0, 0), 2.0), 0: ((0, 1, 1), 0.0)}
    for area, (expected, pq) in areas.items():
        result = pq_of([1] * 4, [0], [1] * 4, [0], true_areas=[area])
        assert counts(result) == expected and result["all"]["pq"] == pytest.approx(pq), area


def test_fault_31_pq_of_an_empty_prediction_misses_every_segment():
    result = pq_of([0, 0, 0], [], [1, 2, 2], [0, 0])
    assert counts(result) == (0, 0, 2) and result["all"] == {
        "pq": 0.0,
        "sq": 0.0,
        "rq": 0.0,
        "n": 1,
    }


def test_fault_31_pq_of_all_void_truth_counts_nothing_and_divides_by_nothing():
    with np.errstate(all="raise"):
        result = pq_of([1, 1, 2], [0, 1], [0, 0, 0], [], things=np.array([True, False]))
    for group in ("all", "things", "stuff"):
        assert result[group] == {"pq": 0.0, "sq": 0.0, "rq": 0.0, "n": 0}


def test_fault_31_pq_without_any_image_or_any_thing_class_is_zero_over_zero_classes():
    nothing = {"pq": 0.0, "sq": 0.0, "rq": 0.0, "n": 0}
    assert PanopticQuality(3).result(np.ones(3, bool))["all"] == nothing
    result = pq_of([1], [0], [1], [0], things=np.zeros(2, bool))
    assert (
        result["things"] == nothing
        and result["stuff"] == result["all"]
        and result["all"]["pq"] == 1.0
    )


@pytest.mark.parametrize("number, dtype", [(250, np.uint8), (300, np.uint16), (70_000, np.uint32)])
def test_pq_ids_do_not_overflow_the_type_of_the_maps(number, dtype):
    # every segment one pixel, all found: products of two ids exceed 8, 16 and 32 bits
    ids = np.arange(1, number + 1, dtype=dtype).reshape(10, -1)
    result = pq_of(ids, np.zeros(number, int), ids, np.zeros(number, int))
    assert counts(result) == (number, 0, 0) and result["all"]["pq"] == 1.0


def test_pq_a_true_segment_without_a_pixel_is_missed():
    assert counts(pq_of([1, 1], [0], [1, 1], [0, 0])) == (1, 0, 1)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (([3, 1], [0, 0], [1, 1], [0]), r"pred_map: expected values in \[0, 2\], got 1 to 3"),
        (([1, 1], [0], [1, -1], [0]), r"true_map: expected values in \[0, 1\], got -1 to 1"),
        (([1, 1], [0, 0], [1, 1], [0]), "pred_map: segment 2 of 2 has a label but no pixel"),
        (([1, 1], [2], [1, 1], [0]), r"pred_labels: expected values in \[0, 1\], got 2 to 2"),
        (
            ([1.0, 1.0], [0], [1, 1], [0]),
            r"pred_map: expected \(H, W\) integers, got \(1, 2\) float64",
        ),
        (
            ([1, 1], [0], [1, 1, 1], [0]),
            r"pred_map and true_map: expected one shape, got \(1, 2\) and \(1, 3\)",
        ),
    ],
)
def test_pq_refuses_what_does_not_fit_and_counts_nothing_of_it(arguments, message):
    quality = PanopticQuality(2)
    with pytest.raises(ValueError, match=message):
        quality.add(
            np.atleast_2d(arguments[0]), arguments[1], np.atleast_2d(arguments[2]), arguments[3]
        )
    assert quality.result([True, False])["all"]["n"] == 0


def random_panoptic(rng, num_classes=4):
    """An image with void, crowd (several of a class), half-right predictions and JSON areas that
    are off by up to a third."""
    coarse = rng.integers(0, 9, (6, 8))  # 0 = void
    num_true = 9  # the 9th never has a pixel
    true = np.kron(coarse, np.ones((4, 4), int))
    pred = np.roll(
        np.where(rng.random((6, 8)) < 0.3, rng.integers(0, 9, (6, 8)), coarse)
        .repeat(4, 0)
        .repeat(4, 1),
        rng.integers(0, 3),
        axis=1,
    )
    true_labels, crowd = rng.integers(0, num_classes, num_true), rng.random(num_true) < 0.3
    labels_of = np.where(rng.random(9) < 0.8, true_labels, rng.integers(0, num_classes, 9))
    present, pred = np.unique(pred, return_inverse=True)  # predictions that have a pixel
    pred, present = pred.reshape(true.shape) + (present[0] != 0), present[present != 0]
    areas = np.bincount(true.ravel(), minlength=num_true + 1)[1:]
    areas = np.where(
        rng.random(num_true) < 0.5,
        areas,
        (areas * rng.uniform(0.67, 1.33, num_true)).astype(int) + 1,
    )
    return dict(
        pred_map=pred,
        pred_labels=labels_of[present - 1],
        true_map=true,
        true_labels=true_labels,
        true_areas=areas,
        true_crowd=crowd,
    )


def test_fault_32_pq_agrees_with_the_coco_panoptic_api_on_random_maps(
    tmp_path, num_images=60, num_classes=4
):
    evaluation = pytest.importorskip("panopticapi.evaluation")
    from panopticapi.utils import id2rgb
    from PIL import Image

    rng, quality, pairs = np.random.default_rng(0), PanopticQuality(num_classes), []
    for i in range(num_images):
        image = random_panoptic(rng, num_classes)
        quality.add(**image)
        annotation = {}
        for side in ("pred", "true"):
            labels = image[f"{side}_labels"]
            ids = np.concatenate(
                [[0], rng.choice(256**3 - 1, len(labels), replace=False) + 1]
            )  # in RGB, all 24 bits
            Image.fromarray(id2rgb(ids[image[f"{side}_map"]])).save(tmp_path / f"{side}{i}.png")
            annotation[side] = {
                "image_id": i,
                "file_name": f"{side}{i}.png",
                "segments_info": [
                    {"id": int(ids[k + 1]), "category_id": int(c)} for k, c in enumerate(labels)
                ],
            }
        for k, segment in enumerate(annotation["true"]["segments_info"]):
            segment.update(area=int(image["true_areas"][k]), iscrowd=int(image["true_crowd"][k]))
        pairs.append((annotation["true"], annotation["pred"]))
    categories = {c: {"isthing": int(c < 2)} for c in range(num_classes)}
    theirs = evaluation.pq_compute_single_core(0, pairs, str(tmp_path), str(tmp_path), categories)
    ours = quality.result(np.arange(num_classes) < 2)
    for c in range(num_classes):
        assert counts(ours, c) == (theirs[c].tp, theirs[c].fp, theirs[c].fn)
        assert ours["per_class"][c]["iou"] == pytest.approx(theirs[c].iou, rel=1e-12)
        assert min(counts(ours, c)) > 0  # the images do exercise the rules
    for group, isthing in (("all", None), ("things", True), ("stuff", False)):
        assert ours[group] == pytest.approx(theirs.pq_average(categories, isthing)[0], rel=1e-12)


def test_pq_and_miou_merged_over_uneven_processes_equal_one_process_and_are_json():
    rng = np.random.default_rng(1)
    images = [random_panoptic(rng) for _ in range(7)]
    whole, parts = PanopticQuality(4), [PanopticQuality(4) for _ in range(3)]  # 6, 1 and 0 images
    whole_miou, miou_parts = MeanIoU(4), [MeanIoU(4) for _ in range(3)]
    for i, image in enumerate(images):
        pred, true = image["pred_map"] % 4, image["true_map"] % 4
        for quality, miou in ((whole, whole_miou), (parts[i == 6], miou_parts[i == 6])):
            quality.add(**image)
            miou.add(pred, true)
    for total, rest in ((parts[0], parts[1:]), (miou_parts[0], miou_parts[1:])):
        for part in rest:
            total.merge(part)
    names, things = ["cat", "dog", "sky", "sea"], [True, True, False, False]
    merged, expected = parts[0].result(things, names), whole.result(things, names)
    assert (
        merged["all"] == pytest.approx(expected["all"], rel=1e-12)
        and list(merged["per_class"]) == names
    )
    assert miou_parts[0].result(names) == whole_miou.result(names)
    assert json.loads(json.dumps(merged)) == merged  # no numpy number in it
    assert json.loads(json.dumps(whole_miou.result(names))) == whole_miou.result(names)
    with pytest.raises(ValueError, match="merge: expected 4 classes, got 5"):
        whole.merge(PanopticQuality(5))


def test_miou_by_hand_without_void_and_without_classes_that_the_truth_lacks():
    # the void px counts nowhere. class 0: tp 2, fn 1 (said 1): 2/3. class 1: tp 1, fp 1, fn 1
    # (said 2): 1/3.
    # class 2 is only predicted, class 3 occurs nowhere: neither is in the mean, (2/3 + 1/3) / 2
    miou = MeanIoU(4)
    miou.add(np.array([[0, 0, 1], [1, 2, 0]]), np.array([[0, 0, 0], [1, 1, 255]], np.uint8))
    result = miou.result()
    assert result["miou"] == pytest.approx(0.5) and result["n"] == 2
    assert result["per_class"][0] == {"iou": pytest.approx(2 / 3), "tp": 2, "fp": 0, "fn": 1}
    assert result["per_class"][2] == {"iou": 0.0, "tp": 0, "fp": 1, "fn": 0}


def test_fault_31_miou_of_all_void_is_zero_over_zero_classes():
    miou = MeanIoU(2)
    miou.add(np.zeros((2, 2), int), np.full((2, 2), 255))
    assert (miou.result()["miou"], miou.result()["n"]) == (0.0, 0)


def test_miou_refuses_a_void_value_that_is_a_class_and_labels_beyond_the_classes():
    with pytest.raises(ValueError, match="ignore: 255 is also one of the 300 classes"):
        MeanIoU(300).add(np.zeros((1, 1), int), np.zeros((1, 1), int))
    with pytest.raises(ValueError, match=r"true: expected values in \[0, 1\], got 0 to 2"):
        MeanIoU(2).add(np.zeros((1, 2), int), np.array([[0, 2]]))


# ------------------------------------------------------------------------------------------ dewa.py


def test_masks_on_disk_have_the_official_keys_and_an_interrupted_call_goes_on(small_mini, tmp_path):
    images, sam = scenes.load_mini("4").train, FakeSam()
    assert mask_files.generate_masks(images, sam, tmp_path) == 12 and sam.calls == 12
    content = json.loads((tmp_path / "train_00003.png.json").read_text())
    pixels = hashlib.sha256(np.asarray(images.image(3)).tobytes()).hexdigest()
    assert content["image"] == {
        "image_id": "train_00003",
        "file_name": "train_00003.png",
        "height": 128,
        "width": 128,
        "sha256": pixels,
    }
    assert set(content["annotations"][0]) == {
        "id",
        "segmentation",
        "area",
        "predicted_iou",
        "stability_score",
        "crop_box",
        "point_coords",
    }
    (tmp_path / "train_00003.png.json").unlink()
    assert mask_files.generate_masks(images, sam, tmp_path) == 1 and sam.calls == 13
    masks = mask_files.read_masks(tmp_path, "train_00003.png", (128, 128))
    assert masks.shape == (128, 128, 2) and masks[..., 0].sum() == 40 * 128


def two_stems(folder, count=2):
    """Images a0.jpg, a0.png, ... of noise, the two of a stem different ones."""
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True)
    for k in range(count):
        for ending in ("jpg", "png"):
            Image.fromarray(rng.integers(0, 256, (30, 40, 3), np.uint8)).save(
                folder / f"a{k}.{ending}"
            )


class ImagesOf:
    """The images of a folder, as `data.ImageFolder` has them."""

    def __init__(self, folder):
        self.folder, self.names = folder, sorted(path.name for path in folder.iterdir())

    def __len__(self):
        return len(self.names)

    def name(self, i):
        return self.names[i]

    def image(self, i):
        return pictures.open_image(self.folder / self.names[i])

    def digest(self, i):
        return hashlib.sha256((self.folder / self.names[i]).read_bytes()).hexdigest()


def test_two_images_of_one_stem_have_masks_of_their_own(tmp_path):
    two_stems(tmp_path / "images")
    images = ImagesOf(tmp_path / "images")
    assert mask_files.generate_masks(images, Answers(4), tmp_path / "masks") == 4
    assert sorted(path.name for path in (tmp_path / "masks").glob("*.json")) == [
        "a0.jpg.json",
        "a0.png.json",
        "a1.jpg.json",
        "a1.png.json",
    ]
    for i in range(4):
        masks = mask_files.read_masks(
            tmp_path / "masks", images.name(i), (30, 40), images.digest(i)
        )
        assert masks[..., 0].sum() == int(np.asarray(images.image(i))[0].sum()) % 1000


def test_older_files_of_masks_count_for_the_image_that_they_name_and_no_other(tmp_path, capsys):
    two_stems(tmp_path / "images", 3)
    images, masks = ImagesOf(tmp_path / "images"), tmp_path / "masks"
    mask_files.generate_masks(images, Answers(4), masks)
    for name, stated in (
        ("a0.jpg", "a0.jpg"),
        ("a1.png", None),
    ):  # of an older version; of nobody knows which
        content = json.loads((masks / f"{name}.json").read_text())
        del content["generator"], content["image"]["sha256"]
        content["image"] |= {"file_name": stated} if stated else {}
        content["image"].pop("file_name") if stated is None else None
        (masks / f"{name[:2]}.json").write_text(json.dumps(content))
        (masks / f"{name}.json").unlink()
    assert mask_files.missing_masks(masks, images) == [images.names.index("a1.png")]
    (masks / "a0.png.json").unlink()
    assert mask_files.read_masks(masks, "a0.jpg", (30, 40), images.digest(0)).shape == (30, 40, 2)
    with pytest.raises(UserError, match="a0.json: states that it is of 'a0.jpg', not of a0.png"):
        mask_files.read_masks(masks, "a0.png", (30, 40))
    capsys.readouterr()
    assert (
        mask_files.generate_masks(images, Answers(4), masks) == 2
        and (masks / "a1.png.json").exists()
        and (masks / "a0.png.json").exists()
    )
    assert (
        "1 files do not say of which image they are and what made them; taken as they are"
        in capsys.readouterr().out
    )


def test_masks_of_other_images_or_settings_are_refused_and_kept(tmp_path):
    for k, name in enumerate(("first", "second")):
        (tmp_path / name).mkdir()
        Image.fromarray(np.full((30, 40, 3), 9 + k, np.uint8)).save(tmp_path / name / "0000.png")
    first, second, masks = (
        ImagesOf(tmp_path / "first"),
        ImagesOf(tmp_path / "second"),
        tmp_path / "masks",
    )
    mask_files.generate_masks(first, Answers(4), masks)
    kept = (masks / "0000.png.json").read_bytes()
    with pytest.raises(
        UserError,
        match=(
            "masks: 1 of 1 files .*0000.png.json is of another image of that name than the one "
            "at hand, or of another exposure of it, .*; choose another folder"
        ),
    ):
        mask_files.generate_masks(second, Answers(4), masks)
    with pytest.raises(
        UserError,
        match=(
            r"0000.png.json was made with other settings \(points_per_side: 4 there, 8 now\); "
            r"choose another folder"
        ),
    ):
        mask_files.generate_masks(first, Answers(8), masks)
    for read in (
        lambda: mask_files.read_masks(masks, "0000.png", (30, 40), second.digest(0)),
        lambda: mask_files.made_of(masks, second),
    ):
        with pytest.raises(
            UserError, match="masks of another image of that name than the 0000.png at hand"
        ):
            read()
    assert (masks / "0000.png.json").read_bytes() == kept and mask_files.generate_masks(
        first, Answers(4), masks
    ) == 0
    shutil.copytree(
        tmp_path / "first", tmp_path / "moved"
    )  # the same data under another path is the same
    assert mask_files.generate_masks(ImagesOf(tmp_path / "moved"), Answers(4), masks) == 0
    assert mask_files.made_of(masks, first)["generator"] == Answers(4).about


def test_what_masks_are_made_of_counts_every_setting_that_they_depend_on():
    from mini import mini_sam

    sam = mini_sam.build().eval()
    about = MaskGenerator(sam, MINI).about
    assert (
        MaskGenerator(sam, dataclasses.replace(MINI, points_per_batch=1)).about
        == about
        == json.loads(json.dumps(about))
    )
    for name, value in (
        ("points_per_side", 4),
        ("pred_iou_thresh", 0.1),
        ("stability_thresh", 0.1),
        ("mask_nms_thresh", 0.1),
    ):
        other = MaskGenerator(sam, dataclasses.replace(MINI, **{name: value})).about
        assert {key for key in about if other[key] != about[key]} == {name}
    assert (
        MaskGenerator(sam, MINI, torch.bfloat16).about["precision"] == "bfloat16"
        and about["precision"] == "float32"
    )
    with torch.no_grad():
        next(sam.parameters()).add_(1)
    assert MaskGenerator(sam, MINI).about["weights"] != about["weights"]


def test_dewa_batches_keep_masks_that_the_crop_empties_unless_told_otherwise(small_mini, tmp_path):
    dataset, cfg = scenes.load_mini("4"), dataclasses.replace(TINY, scale_min=2.0, scale_max=2.0)
    mask_files.generate_masks(dataset.train, FakeSam(), tmp_path)
    emptied, masked = 0, dewa.MaskedImages(dataset.train, tmp_path, range(12))
    seen_only = dataclasses.replace(cfg, dewa_keep_empty=False)
    for step in range(4):
        batch = dewa.DewaBatches(masked, cfg, 4)[step]
        assert all(
            len(t) == 2 and t.masks.shape == (2, 64, 64) and t.labels.eq(0).all()
            for t in batch.targets
        )
        shown = dewa.DewaBatches(masked, seen_only, 4)[step]
        for every, left in zip(batch.targets, shown.targets):
            assert torch.equal(left.masks, every.masks[every.masks.any(2).any(1)]) and len(
                left.labels
            ) == len(left.masks)
            emptied += len(every) - len(left)
    assert emptied > 0
    (tmp_path / "train_00000.png.json").write_text('{"image": {"height": 1')
    with pytest.raises(UserError, match="train_00000.png.json"):
        mask_files.read_masks(tmp_path, "train_00000.png", (128, 128))


def test_the_decoder_is_warmed_up_on_a_folder_with_masks_beside_the_images_as_in_sa1b(tmp_path):
    rng = np.random.default_rng(0)
    for i in range(3):
        path = tmp_path / "SA1B" / "sa_000000" / f"sa_{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (70, 90, 3), np.uint8)).save(path)
        mask = np.zeros((70, 90), bool)
        mask[10:40, 20:60] = True
        annotation = {
            "id": 400 + i,
            "segmentation": to_runs(mask),
            "bbox": [20, 10, 40, 30],
            "area": 1200,
            "predicted_iou": 0.9,
            "stability_score": 0.9,
            "crop_box": [0, 0, 90, 70],
            "point_coords": [[30.0, 20.0]],
        }
        path.with_suffix(".json").write_text(
            json.dumps(
                {
                    "image": {"image_id": i, "width": 90, "height": 70, "file_name": path.name},
                    "annotations": [annotation],
                }
            )
        )
    images = pictures.ImageFolder(tmp_path / "SA1B")
    assert (
        len(images) == 3
        and mask_files.read_masks(tmp_path / "SA1B", images.name(1), (70, 90))[..., 0].sum() == 1200
    )
    assert (
        run("--stage", "dewa", "--images", tmp_path / "SA1B", "--runs", tmp_path, "--steps", 2) == 0
    )
    assert checkpoint.steps(tmp_path / "SA1B-dewa")


def test_a_folder_of_images_says_of_which_images_masks_are_made(tmp_path):
    rng, folder = np.random.default_rng(0), tmp_path / "pictures"
    folder.mkdir()
    for i in range(2):
        Image.fromarray(rng.integers(0, 256, (32, 40, 3), np.uint8)).save(folder / f"{i}.png")
    images = pictures.ImageFolder(folder)
    before = images.fingerprint()
    assert images.digest(1) == pictures.file_digest(folder / "1.png")
    Image.new("RGB", (40, 32)).save(folder / "0.png")
    assert images.fingerprint() != before


def test_stable_regions_find_discs_and_what_they_lie_on_without_any_label():
    from pretrained import regions

    yy, xx = np.mgrid[0:64, 0:80]
    truth = [(yy - 20) ** 2 + (xx - 20) ** 2 < 100, (yy - 40) ** 2 + (xx - 58) ** 2 < 200]
    grey = 20 + 100 * truth[0] + 160 * truth[1]
    image = np.repeat(grey[..., None], 3, -1).astype(np.uint8)
    masks = [record["segmentation"] for record in regions.StableRegions().generate(image)]

    def iou(a, b):
        return (a & b).sum() / (a | b).sum()

    for wanted in (*truth, ~(truth[0] | truth[1])):
        assert max(iou(mask, wanted) for mask in masks) > 0.85
    assert all(iou(a, b) < 0.9 for k, a in enumerate(masks) for b in masks[:k])
    assert len(regions.StableRegions().generate(np.full((32, 32, 3), 7, np.uint8))) <= 1


if __name__ == "__main__":
    import argparse

    parser = argparse.ArgumentParser(
        description="The tests run by `pytest`; this runs longer searches for faults."
    )
    parser.add_argument(
        "--soak",
        type=int,
        default=0,
        metavar="N",
        help="kill a run N times and compare what it ends with",
    )
    parser.add_argument("--fuzz", type=int, default=0, metavar="N", help="read N mutated files")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    if arguments.soak:
        scenes.MINI_TRAIN, scenes.MINI_DEV, scenes.MINI_VAL = 12, 4, 4
        with tempfile.TemporaryDirectory() as scratch:
            print(soak(arguments.soak, scratch))
    if arguments.fuzz:
        for kind, counter in fuzz(arguments.fuzz, arguments.seed).items():
            print(f"{kind:26}{counter['read']:6} read{counter['refused']:6} refused in one line")
