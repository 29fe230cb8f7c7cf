"""Tests, in the order of the files. CPU, seeded, no network, no file outside the repository.

test_fault_NN_... provokes fault NN of the list that the project must survive, for real: a kill, a full disk, a cut file. `python test_dearli.py
--soak 50` kills a run 50 times, `--fuzz 2000` reads so many mutated files.
Tests on real images use the folder named by DEARLI_TEST_DATA (default ../shared/data) and are skipped where it is absent.
"""

import ast
import base64
import colorsys
import contextlib
import copy
import dataclasses
import hashlib
import html
import html.parser
import http.server
import io
import itertools
import json
import math
import multiprocessing
import os
import random
import re
import resource
import shlex
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
import zlib
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageFilter, ImageFont
from torch import nn
from torchvision.transforms.v2 import functional as TF

os.environ["HF_HUB_OFFLINE"] = "1"  # no test asks the network

import annotations
import checkpoint
import clip_ensemble
import colours
import command_line
import data
import datasets
import dearli
import dewa
import evaluation
import foundation
import html_report
import identity
import importer
import matcher
import mean_teacher
import microcosm
import model as m2f
import official
import optim
import predict
import ranks
import report
import sam_masks
import stages
import trainer
import validate
import watch
from clip_ensemble import Vocabulary, alpha_at, alpha_of_share, geometric_ensemble, mask_pool
from config import MINI, OFFICIAL, Config, UserError, numbers_of, require_ranges
from deformable import (
    DeformableAttention,
    Pyramid,
    SparseSamples,
    grid_samples,
    pixel_centres,
    weighted_samples,
)
from evaluation import evaluate, flatten, frequency_groups, group_quality, zero_shot
from losses import LossConfig, class_loss, mask_losses, point_generators, set_loss, uncertain_points
from matcher import CostWeights, Target, match, matching_cost, point_sample
from model import (
    Attention,
    Mask2Former,
    attention_mask,
    mask_logits,
    panoptic_inference,
    semantic_inference,
)
from panoptic_eval import MeanIoU, PanopticQuality
from sam_masks import MaskGenerator

REAL_DATA = Path(
    os.environ.get("DEARLI_TEST_DATA", Path(__file__).parent.parent / "shared" / "data")
)
needs_nuclei = pytest.mark.skipif(
    not (REAL_DATA / "nuclei_panoptic").is_dir(),
    reason=f"no real images at {REAL_DATA} (set DEARLI_TEST_DATA)",
)
TINY = dataclasses.replace(
    MINI,
    pretrained="random",
    hidden=32,
    heads=2,
    encoder_layers=1,
    decoder_layers=2,
    encoder_ffn=32,
    decoder_ffn=32,
    num_queries=6,
    num_points=64,
    labeled_batch=2,
    unlabeled_batch=2,
    dewa_batch=2,
    crop=64,
    test_size=64,
)
torch.set_num_threads(min(2, os.cpu_count() or 1))


@pytest.fixture(autouse=True)
def no_network(monkeypatch, tmp_path):
    """Downloads find empty caches and nobody at home."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(foundation, "CACHE", tmp_path / "cache")
    monkeypatch.setattr(foundation, "SAM_ADDRESS", (tmp_path / "nowhere").as_uri())
    monkeypatch.setattr(datasets, "REPOSITORY", (tmp_path / "nowhere").as_uri())


@pytest.fixture(scope="session")
def small_openclip(tmp_path_factory):
    """A real OpenCLIP ConvNeXt with a real tokenizer, only smaller: its name."""
    import open_clip

    path = tmp_path_factory.mktemp("open_clip") / "convnext_test.json"
    vision = dict(
        timm_model_name="convnext_atto",
        timm_model_pretrained=False,
        timm_pool="",
        timm_proj="linear",
        timm_drop=0.0,
        timm_drop_path=0.1,
        image_size=64,
    )
    path.write_text(
        json.dumps(
            dict(
                embed_dim=32,
                vision_cfg=vision,
                text_cfg=dict(context_length=77, vocab_size=49408, width=32, heads=2, layers=1),
            )
        )
    )
    open_clip.add_model_config(path)
    return path.stem


@pytest.fixture
def small_mini(monkeypatch):
    """The miniature world with a handful of images."""
    monkeypatch.setattr(data, "MINI_TRAIN", 12)
    monkeypatch.setattr(data, "MINI_DEV", 4)
    monkeypatch.setattr(data, "MINI_VAL", 4)


def random_vocabulary(counts=(1, 2, 1), dim=16, seed=0):
    return Vocabulary(
        F.normalize(
            torch.randn(sum(counts), dim, generator=torch.Generator().manual_seed(seed)), dim=-1
        ),
        list(counts),
    )


def tiny_head(cfg=TINY, channels=(8, 8, 16, 16), counts=(1, 2, 1)):
    torch.manual_seed(0)
    vocabulary = random_vocabulary(counts)
    return Mask2Former(list(channels), cfg, len(counts), vocabulary)


def features(batch=2, channels=(8, 8, 16, 16), sides=(16, 8, 4, 2)):
    g = torch.Generator().manual_seed(1)
    return [torch.randn(batch, c, s, s, generator=g) for c, s in zip(channels, sides)]


def quarters():
    """A 8 x 8 partition: segment 1 upper left, 2 upper right, 3 below."""
    segment_map = torch.full((8, 8), 3, dtype=torch.int32)
    segment_map[:4, :4], segment_map[:4, 4:] = 1, 2
    return segment_map


# ---------------------------------------------------------------------------------------------------------- matcher.py


def test_point_sample_reads_pixel_centres_and_mixes_between_them():
    # 1 x 2 map [0, 4]: centres at x = 0.25 and 0.75; halfway 2; at x = 0 the outside (0) has weight 1/2
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


# ----------------------------------------------------------------------------------------------------------- losses.py


def test_class_loss_is_weighted_with_a_light_no_object():
    # 2 queries, 1 class; query 0 is matched (p = 0.8), query 1 is not (p_void = 0.5): -ln 0.8 - 0.1 ln 0.5
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


# ---------------------------------------------------------------------------------------------------- clip_ensemble.py


def test_mask_pool_is_the_mean_under_the_mask_and_zero_where_there_is_none():
    features = torch.tensor([[[[1.0, 3.0]], [[10.0, 30.0]]]])  # (1, 2, 1, 2)
    masks = torch.tensor([[[[1.0, 1.0]], [[-1.0, 2.0]], [[-1.0, -1.0]]]])
    torch.testing.assert_close(
        mask_pool(features, masks), torch.tensor([[[2.0, 20.0], [3.0, 30.0], [0.0, 0.0]]])
    )


def test_mask_pool_resizes_the_logits_before_it_thresholds():
    # 1 x 4 logits [3, -1, -1, -1] become [1, -1] on a 1 x 2 grid: one cell, although a quarter of the mask is on
    pooled = mask_pool(torch.tensor([[[[1.0, 2.0]]]]), torch.tensor([[[[3.0, -1.0, -1.0, -1.0]]]]))
    assert pooled.item() == pytest.approx(1.0)


def test_geometric_ensemble_of_two_classes_by_hand():
    # decoder: p = (0.6, 0.2), void 0.2, so p_MT = (3/4, 1/4); CLIP (1/5, 4/5); alpha 1/2: sqrt(3/20) : sqrt(4/20)
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
    # Table 8: the vertex of the parabola through (0.5, 26.70), (0.6, 27.67), (0.7, 24.35) and so on, kept to 0.5 ... 0.7; a line through all
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

    tokenize = lambda prompts: torch.tensor([[float(len(p)), 1.0] for p in prompts])
    e = clip_ensemble.text_embeddings(Clip(1, 1), tokenize, ["cat", "zebra"], batch=5)
    rows = F.normalize(
        torch.tensor([[float(len(t.format("zebra"))), 1.0] for t in clip_ensemble.TEMPLATES]),
        dim=-1,
    )
    assert len(clip_ensemble.TEMPLATES) == 14
    torch.testing.assert_close(e[1], F.normalize(rows.mean(0), dim=-1))


def dropping(small_openclip, train_backbone=False):
    """A segmenter on a real OpenCLIP ConvNeXt that has drop path, as OpenCLIP hands it over: in training mode."""
    cfg = dataclasses.replace(TINY, backbone=small_openclip, train_backbone=train_backbone)
    return stages.build(
        stages.Job(), cfg, data.Taxonomy(("red ball", "grass, lawn"), (True, False), (1, 2))
    )


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


def test_fault_44_a_trained_backbone_drops_paths_while_it_trains_and_its_teacher_and_clips_head_never_do(
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
        dewa.generate_masks(data.load_mini("4").train, FakeSam(), tmp_path / "masks")
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
    watched = ["--watch", 1, "--checkpoint-every", 1]
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
            lambda folder, models, *rest: lambda step: [model.eval() for model in models.values()],
        )
        assert run(*args, "--steps", 3, "--out", tmp_path / "watched") == 0
        patch.setattr(
            stages,
            "train_step",
            lambda *a, step=mean_teacher.train_step, **k: (
                os.kill(os.getpid(), signal.SIGTERM) or step(*a, **k)
            ),
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
    for stage, features in zip(backbone.trunk.stages, backbone(images)):
        x = stage(x)
        assert torch.equal(x, features)
    assert clip_ensemble.padded_size(*size) == (height, width)


# -------------------------------------------------------------------------------------------------------- foundation.py


def test_fault_41_a_download_is_checked_kept_and_missed_in_one_line(tmp_path):
    content = b"weights" * 1000
    (tmp_path / "far").write_bytes(content)
    near, digest, far = (
        tmp_path / "cache" / "w.pth",
        hashlib.sha256(content).hexdigest(),
        (tmp_path / "far").as_uri(),
    )
    with pytest.raises(
        UserError, match="far: cannot be fetched .*invalid hash.* put it to .*w.pth, or else"
    ):
        foundation.fetch(near, far, "0" * 64, "or else")
    assert not list(near.parent.iterdir())  # nothing half-done is left behind
    assert foundation.fetch(near, far, digest, "") == near and near.read_bytes() == content
    (tmp_path / "far").unlink()
    assert foundation.fetch(near, far, digest, "") == near  # from the cache
    near.write_bytes(content[:-1])
    with pytest.raises(UserError, match=f"w.pth: SHA-256 is .*, expected {digest}; delete it"):
        foundation.fetch(near, far, digest, "")


def test_sam_comes_from_a_file_the_cache_or_nowhere(tmp_path, monkeypatch):
    import segment_anything

    import mini_sam

    monkeypatch.setitem(
        segment_anything.sam_model_registry, "vit_b", mini_sam.build
    )  # the size of the model is not the point
    cfg = dataclasses.replace(OFFICIAL, sam="vit_b")
    with pytest.raises(
        UserError,
        match="cannot be fetched .* put it to .*sam_vit_b_01ec64.pth, or name it with --sam-weights FILE",
    ):
        foundation.load_sam(cfg)
    file = tmp_path / "cache" / "sam_vit_b_01ec64.pth"
    file.parent.mkdir(exist_ok=True)
    weights = mini_sam.load(mini_sam.WEIGHTS).state_dict()
    torch.save(weights, file)
    with pytest.raises(UserError, match="sam_vit_b_01ec64.pth: SHA-256 is"):  # not Meta's file
        foundation.load_sam(cfg)
    monkeypatch.setitem(foundation.SAM_FILES, "vit_b", (file.name, foundation.sha256(file)))
    for found in (cfg, dataclasses.replace(cfg, sam_weights=str(file))):
        taken = foundation.load_sam(found)(torch.device("cpu")).sam.state_dict()
        assert all(torch.equal(taken[name], weights[name]) for name in weights)


def test_openclip_weights_come_from_a_file_the_hub_or_nowhere(
    tmp_path, small_openclip, monkeypatch
):

    cfg = dataclasses.replace(OFFICIAL, backbone=small_openclip, pretrained="random")
    clip, tokenize = foundation.load_clip(cfg)
    assert tokenize(["a cat"]).shape == (1, 77)
    torch.save(clip.state_dict(), tmp_path / "clip.pt")
    again, _ = foundation.load_clip(
        dataclasses.replace(cfg, seed=1, pretrained=str(tmp_path / "clip.pt"))
    )
    assert all(
        torch.equal(a, b) for a, b in zip(clip.state_dict().values(), again.state_dict().values())
    )
    (tmp_path / "cut.pt").write_bytes((tmp_path / "clip.pt").read_bytes()[:9000])
    with pytest.raises(UserError, match=f"cut.pt: not weights of {small_openclip}, or damaged"):
        foundation.load_clip(dataclasses.replace(cfg, pretrained=str(tmp_path / "cut.pt")))
    with pytest.raises(
        UserError,
        match="no OpenCLIP weights are called 'laion7b'; available for --pretrained: laion_aesthetic_s13b_b82k, laion_aesthetic_s13b_b82k_augreg",
    ):
        foundation.load_clip(dataclasses.replace(OFFICIAL, pretrained="laion7b"))
    with pytest.raises(
        UserError,
        match="weights cannot be had .* download https://huggingface.co/laion/CLIP-convnext_base_w_320.* name it with --pretrained FILE",
    ) as error:
        foundation.load_clip(OFFICIAL)
    assert "\n" not in str(error.value)
    # the hub's cache names a file by its SHA-256, which is checked
    blob = tmp_path / hashlib.sha256((tmp_path / "clip.pt").read_bytes()).hexdigest()
    shutil.copy(tmp_path / "clip.pt", blob)
    store = tmp_path / "store" / ("f" * 64)  # newer clients keep the bytes in a store of their own
    store.parent.mkdir()
    blob.rename(store)
    blob.symlink_to(store)
    (tmp_path / "snapshot.bin").symlink_to(blob)
    monkeypatch.setattr(
        "huggingface_hub.hf_hub_download",
        lambda repository, name, **more: str(tmp_path / "snapshot.bin"),
    )
    assert (
        foundation._hub_file("laion/some", foundation.CLIP_FILES, "some")
        == tmp_path / "snapshot.bin"
    )
    store.write_bytes(store.read_bytes()[:-1])
    with pytest.raises(UserError, match=f"{store.name}: damaged, its SHA-256 is not {blob.name}"):
        foundation._hub_file("laion/some", foundation.CLIP_FILES, "some")


def test_the_weights_of_the_paper_are_known_to_openclip_and_go_with_their_model(capsys):
    import open_clip

    assert all(
        tag in open_clip.list_pretrained_tags_by_model(model)
        for model, tag in foundation.TAGS.items()
    )
    assert (
        dearli.main(
            [
                "--dataset",
                "coco",
                "--backbone",
                "convnext_large_d_320",
                "--print-config",
                "--device",
                "cpu",
            ]
        )
        == 0
    )
    assert json.loads(capsys.readouterr().out)["pretrained"] == "laion2b_s29b_b131k_ft_soup"


def test_a_timm_backbone_trains_plain_mask2former_and_refuses_what_needs_text(
    small_mini, tmp_path, capsys
):
    timm_flags = ["--backbone", "convnext_atto.d2_in1k", "--classifier", "linear"]
    for extra in ([], ["--train-backbone"]):
        out = tmp_path / f"sup{len(extra)}"
        assert run("--stage", "sup", *timm_flags, *extra, "--steps", 2, "--out", out) == 0
        metrics = json.loads((out / "metrics.json").read_text())
        assert "student/decoder" in metrics and "student/ensemble" not in metrics
    assert run("--stage", "masks", "--runs", tmp_path) == 0
    assert run("--stage", "dewa", *timm_flags, "--runs", tmp_path, "--steps", 2) == 0
    assert (
        run(
            "--stage",
            "ssl",
            "--method",
            "ssl",
            *timm_flags,
            "--init",
            tmp_path / "mini-dewa",
            "--out",
            tmp_path / "ssl",
            "--steps",
            3,
        )
        == 0
    )
    assert run("--stage", "eval", "--weights", tmp_path / "ssl") == 0
    capsys.readouterr()
    for k, (args, words) in enumerate(
        (
            (["--stage", "sup", *timm_flags[:2]], "no text tower: it needs --classifier linear"),
            (["--stage", "ssl", "--method", "dear", *timm_flags], "--method ssl"),
            (["--stage", "zeroshot", *timm_flags[:2]], "has no text tower"),
            (["--stage", "export", "--weights", tmp_path / "ssl"], "has none"),
            (
                ["--stage", "sup", "--backbone", "resnet50"],
                "unknown backbone 'resnet50'; available: mini, an OpenCLIP ConvNeXt",
            ),
        )
    ):
        assert run(*args, "--out", tmp_path / f"refused{k}") == 2
        message = capsys.readouterr().err
        assert words in message and message.count("\n") == 1
    # weights of timm's own making, from a file
    import timm

    made = timm.create_model("convnext_atto", num_classes=10)
    torch.save(made.state_dict(), tmp_path / "timm.pth")
    cfg = dataclasses.replace(
        TINY, backbone="convnext_atto.d2_in1k", pretrained=str(tmp_path / "timm.pth")
    )
    assert torch.equal(foundation.load_timm(cfg).stem[0].weight, made.stem[0].weight)
    torch.save(
        {"model": made.state_dict()}, tmp_path / "wrapped.pth"
    )  # as the original release has them
    assert torch.equal(
        foundation.load_timm(dataclasses.replace(cfg, pretrained=str(tmp_path / "wrapped.pth")))
        .stem[0]
        .weight,
        made.stem[0].weight,
    )
    torch.save({"foo.weight": torch.zeros(3)}, tmp_path / "foreign.pth")
    torch.save({"x": os.system}, tmp_path / "code.pth")
    for name, words in (
        ("foreign.pth", "foreign.pth: not weights of convnext_atto"),
        ("code.pth", "code.pth: not a checkpoint that can be read safely"),
        ("none.pth", "none.pth: no such weights file"),
    ):
        with pytest.raises(UserError, match=words):
            foundation.load_timm(dataclasses.replace(cfg, pretrained=str(tmp_path / name)))
    with pytest.raises(
        UserError, match="unknown backbone 'convnext_base.fb_in21k'"
    ):  # a tag that does not exist
        foundation.is_timm("convnext_base.fb_in21k")
    with pytest.raises(
        UserError, match="weights cannot be had .*huggingface.co/timm/convnext_atto.d2_in1k"
    ):
        foundation.load_timm(dataclasses.replace(cfg, pretrained=""))


# ------------------------------------------------------------------------------------------------------------ model.py


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


@pytest.mark.parametrize("part", (1, 10**9))  # one image at once, and all
def test_samples_by_sparse_matrix_and_their_gradients_are_those_of_grid_sampling(monkeypatch, part):
    monkeypatch.setattr(matcher, "PART", part)
    g = torch.Generator().manual_seed(0)
    b, heads, d, points, shapes = (
        3,
        2,
        5,
        2,
        [(1, 1), (2, 1), (3, 4)],
    )  # maps of one row or column, too
    s, pyramid = sum(h * w for h, w in shapes), Pyramid.of(shapes, heads, points, "cpu")
    value, weights = (
        torch.randn(b, s, heads, d, generator=g),
        torch.rand(b, s, heads, len(shapes), points, generator=g),
    )
    positions = (
        pyramid.centres + torch.randn(b, 2, s, heads, len(shapes), points, generator=g) * 2
    )  # many lie outside
    positions[0] = positions[0].round()  # where the slope has a step: as a new model's do
    given = [t.requires_grad_() for t in (value, positions, weights)]
    ours, plain, first = SparseSamples.apply(*given, pyramid), 0.0, 0
    for level, (h, w) in enumerate(shapes):
        plain = plain + grid_samples(
            value[:, first : first + h * w].unflatten(1, (h, w)),
            positions[:, :, :, :, level],
            weights[:, :, :, level],
        )
        first += h * w
    torch.testing.assert_close(ours, plain)
    change = torch.randn(ours.shape, generator=g)
    of_ours, of_plain = (
        torch.autograd.grad(ours, given, change),
        torch.autograd.grad(plain, given, change),
    )
    for a, p in zip(of_ours[::2], of_plain[::2]):
        torch.testing.assert_close(a, p, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(of_ours[1][1:], of_plain[1][1:], rtol=1e-4, atol=1e-5)
    assert (
        of_ours[1][0].isfinite().all() and of_ours[1][0].abs().sum() > 0
    )  # on a step grid sampling takes either side, as it rounds
    torch.testing.assert_close(weighted_samples(*given, pyramid), plain)  # whichever way it takes


def test_samples_of_maps_too_small_for_the_matrix_are_read_by_the_grid(monkeypatch):
    pyramid = Pyramid.of([(1, 1), (1, 2)], 1, 16, "cpu")  # 128 entries a row
    assert pyramid.rows == 25 + 30
    monkeypatch.setattr(SparseSamples, "apply", lambda *_: pytest.fail("a sparse matrix"))
    value, weights = (
        torch.ones(2, 3, 1, 4, requires_grad=True),
        torch.full((2, 3, 1, 2, 16), 0.25, requires_grad=True),
    )
    positions = pyramid.centres.expand(2, -1, -1, -1, -1, -1).clone().requires_grad_()
    out = weighted_samples(value, positions, weights, pyramid)
    assert out[0, 0, 0, 0].item() == pytest.approx(
        8
    )  # 1 x 1 map: the pixel itself; 1 x 2: halfway between two ones
    out.sum().backward()
    assert all(t.grad.isfinite().all() for t in (value, positions, weights)) and weights.grad[
        0, 0, 0, 0, 0
    ].item() == pytest.approx(4)


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


def sizes(h, w):
    return ((h, w),) * 3


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
    monkeypatch.setattr(m2f, "CPU_CHUNK", 3 * 45 * 40)  # three queries at once, and one left over
    for a, b in zip(together, panoptic_inference(*given)):
        assert torch.equal(a, b)
    masks = m2f.resize_masks(masks, *given[3]).sigmoid()
    for a, b in zip(together, panoptic_inference(*given, masks=masks)):
        assert torch.equal(a, b)


def test_semantic_inference_sums_over_queries_and_never_says_void():
    masks = torch.tensor([[[9.0, 9.0]], [[9.0, -9.0]]])
    posterior = torch.tensor([[0.3, 0.1, 0.6], [0.0, 0.5, 0.5]])
    assert semantic_inference(posterior, masks, sizes(1, 2)).tolist() == [
        [1, 0]
    ]  # 0.3 < 0.1 + 0.5; 0.3 > 0.1


def tiny_segmenter(cfg=TINY, seed=0):
    job = stages.Job()
    return stages.build(
        job,
        dataclasses.replace(cfg, seed=seed),
        data.Taxonomy(("red ball", "grass, lawn"), (True, False), (1, 2)),
    )


def test_teacher_shares_a_frozen_backbone_and_copies_a_trained_one():
    student = tiny_segmenter()
    teacher = student.teacher()
    assert teacher.backbone is student.backbone and teacher.head is not student.head
    assert all(name.startswith("head.") for name in student.trained()) and not any(
        p.requires_grad for p in student.backbone.parameters()
    )
    student = tiny_segmenter(dataclasses.replace(TINY, train_backbone=True))
    assert student.teacher().backbone is not student.backbone
    assert any(name.startswith("backbone.") for name in student.trained())


# ------------------------------------------------------------------------------------------- config.py, data.py, optim.py


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


def test_where_no_cutmix_box_of_the_area_fits_it_is_the_largest_that_does(monkeypatch):
    monkeypatch.setattr(
        data, "CUTMIX_AREA", (0.4, 0.4)
    )  # 15 360 pixels of 60 x 640: 60 high, and 200 wide at the flattest aspect of 0.3
    boxes = [data.cutmix_box(60, 640, random.Random(seed)) for seed in range(20)]
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
        data.load_mini("4"),
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
    dataset = data.load_mini("4")
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
    batches = data.LabeledBatches(data.load_mini("5"), TINY, 100)
    seen = [
        batches.pick(batches.dataset.labeled, step, slot, 2)
        for step in range(10)
        for slot in range(2)
    ]
    assert all(sorted(seen[i : i + 5]) == [0, 1, 2, 3, 4] for i in range(0, 20, 5))


def write_coco_folder(root, images=6, side=64):
    """A data set in COCO panoptic format from the miniature world, with ids above 65535 and a crowd region."""
    (root / "images").mkdir(parents=True)
    (root / "panoptic").mkdir()
    categories = [
        {"id": 10 * k + 7, "name": name.split(",")[0], "isthing": int(k < len(microcosm.THINGS))}
        for k, name in enumerate(microcosm.CLASSES)
    ]
    for part, count in (("train", images), ("val", 2)):
        content = {"images": [], "annotations": [], "categories": categories}
        for i in range(count):
            s = microcosm.scene("train" if part == "train" else "dev", i, side)
            ids = np.array([0] + [70_000 + 300 * k for k in range(len(s.labels))])[s.segment_map]
            Image.fromarray(s.image).save(root / "images" / f"{part}{i}.png")
            Image.fromarray(
                np.stack([ids % 256, ids // 256 % 256, ids // 65536], -1).astype(np.uint8)
            ).save(root / "panoptic" / f"{part}{i}.png")
            segments = [
                {
                    "id": 70_000 + 300 * k,
                    "category_id": 10 * int(label) + 7,
                    "area": int((s.segment_map == k + 1).sum()),
                    "iscrowd": int(k == 1),
                }
                for k, label in enumerate(s.labels)
            ]
            content["images"].append(
                {"id": i, "file_name": f"{part}{i}.png", "height": side, "width": side}
            )
            content["annotations"].append(
                {"image_id": i, "file_name": f"{part}{i}.png", "segments_info": segments}
            )
        (root / f"panoptic_{part}.json").write_text(json.dumps(content))
    (root / "splits" / "1_3").mkdir(parents=True)
    (root / "splits" / "1_3" / "labeled.txt").write_text(
        "train0.png train0.png\ntrain3.png train3.png\n"
    )
    return root


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
    abc = data.Taxonomy(("a, alpha", "b", "c"), (True, False, True), (1, 2, 3))
    cba = data.Taxonomy(("c", "b", "a"), (True, False, True), (7, 8, 9))
    assert abc.order_in(cba, "here", "there").tolist() == [
        2,
        1,
        0,
    ]  # synonyms are no part of what a class is called
    for other, words in (
        (data.Taxonomy(("a", "b", "d"), abc.things, abc.ids), "only in there: d; only in here: c"),
        (
            data.Taxonomy(("a", "b"), (True, False), (1, 2)),
            "here: its classes are not those of there; only in here: c",
        ),
        (
            dataclasses.replace(cba, things=(True, True, True)),
            "here: b: stuff here, but not in there",
        ),
    ):
        with pytest.raises(UserError, match=words):
            abc.order_in(other, "here", "there")
    dataset = data.load_folder(write_coco_folder(tmp_path / "set"), "3")
    other = data.load_folder(reversed_categories(tmp_path / "set", tmp_path / "reversed"), "3")
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
    mini = data.load_mini("4")
    before = mini.val.truth(0).labels
    mini.follow(
        data.Taxonomy(mini.taxonomy.names[::-1], mini.taxonomy.things[::-1], mini.taxonomy.ids),
        "run",
    )
    assert (19 - before).tolist() == mini.val.truth(0).labels.tolist()


def test_a_validation_json_may_count_its_categories_otherwise(tmp_path):
    root = write_coco_folder(tmp_path / "set")
    expected = data.load_folder(root, "3").val.truth(0).labels.tolist()
    content = json.loads((root / "panoptic_val.json").read_text())
    for rows in (content["categories"], *(a["segments_info"] for a in content["annotations"])):
        for row in rows:
            key = "category_id" if "category_id" in row else "id"
            row[key] = 1000 - row[key]  # 7, 17, ... 197 become 993, 983, ... 803
    (root / "panoptic_val.json").write_text(json.dumps(content))
    assert data.load_folder(root, "3").val.truth(0).labels.tolist() == expected
    content["categories"][0]["isthing"] = 0
    (root / "panoptic_val.json").write_text(json.dumps(content))
    with pytest.raises(
        UserError, match="panoptic_val.json: .* is stuff, but a thing in panoptic_train.json"
    ):
        data.load_folder(root, "3")


def test_the_results_of_a_run_are_not_replaced_by_those_of_other_images(tmp_path):
    root, other = write_coco_folder(tmp_path / "set"), write_coco_folder(tmp_path / "other")
    moved = reversed_categories(root, tmp_path / "moved")
    Image.new("RGB", (64, 64)).save(other / "images" / "train0.png")
    dataset = data.load_folder(root, "all")
    config = {
        "data_root": str(root),
        "stage": "sup",
        "data": dataset.train.fingerprint(dataset.labeled),
        "taxonomy": dataset.taxonomy.to_config(),
    }
    for place, expected in ((root, False), (moved, False), (other, True)):
        state = {"student": {}, "config": config}
        job = stages.Job("custom", str(place), split="all", weights=tmp_path, state=state)
        there = data.load_folder(place, "all")
        assert stages.elsewhere(job, config, there) == expected
    with pytest.raises(UserError, match="other training images; name a folder .* with --out"):
        stages.stage_eval(job, Config())


def test_the_rows_of_a_linear_class_head_follow_the_names():
    cfg = dataclasses.replace(TINY, classifier="linear")
    job, names = stages.Job(), [("a", "b", "c"), ("c", "a", "b")]
    one, two = (stages.build(job, cfg, data.Taxonomy(n, (True,) * 3, (1, 2, 3))) for n in names)
    state = {
        "student": {name: p.detach().clone() for name, p in one.trained().items()},
        "config": {"taxonomy": data.Taxonomy(names[0], (True,) * 3, (1, 2, 3)).to_config()},
    }
    order = stages.class_order(
        state, data.Taxonomy(names[1], (True,) * 3, (1, 2, 3)), "here", "run"
    )
    assert order.tolist() == [2, 0, 1]
    stages.take(state, "student", two, "run", order=order)
    for kind in ("weight", "bias"):  # c, a, b and no-object
        assert torch.equal(
            two.trained()[f"head.decoder.classify.{kind}"],
            state["student"][f"head.decoder.classify.{kind}"][[2, 0, 1, 3]],
        )
    older = {**state, "config": {}}
    with pytest.raises(UserError, match="run: trained on 3 classes, here has 2"):
        stages.class_order(older, data.Taxonomy(("a", "b"), (True,) * 2, (1, 2)), "here", "run")


def test_a_coco_panoptic_folder_is_read_as_it_was_written(tmp_path):
    dataset = data.load_folder(write_coco_folder(tmp_path / "set"), "1_3")
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
    assert len(data.load_folder(tmp_path / "set", "2").labeled) == 2


def test_images_without_annotation_are_unlabelled_images(tmp_path):
    root = write_coco_folder(tmp_path / "set", images=3)
    path = root / "panoptic_train.json"
    content = json.loads(path.read_text())
    Image.new("RGB", (20, 16)).save(root / "images" / "new.png")
    content["images"].append({"id": "new", "file_name": "new.png", "width": 20, "height": 16})
    path.write_text(json.dumps(content))
    (root / "panoptic_val.json").write_text(json.dumps(content))
    dataset = data.load_folder(root, "2")
    assert (
        len(dataset.train) == 4
        and len(dataset.val) == 3
        and len(dataset.labeled) == 2
        and 3 in dataset.unlabeled
    )
    assert dataset.train.image(3).size == (20, 16)
    data.require_files(dataset.train, dataset.unlabeled, "unlabelled", maps=False)
    (root / "list.txt").write_text("new.png\n")
    with pytest.raises(UserError, match="'new.png' has no annotation"):
        data.load_folder(root, str(root / "list.txt"))
    with pytest.raises(UserError, match="expected 1 to 3 labelled images"):
        data.load_folder(root, "4")


def png_of_16_bits(path, values):
    """A PNG of (H, W) or (H, W, channels) values, 16 bits each: grey, grey and alpha, RGB or RGBA."""
    values = np.asarray(values)
    values = values[..., None] if values.ndim == 2 else values
    height, width, channels = values.shape

    def chunk(kind, content):
        return (
            struct.pack(">I", len(content))
            + kind
            + content
            + struct.pack(">I", zlib.crc32(kind + content))
        )

    header = struct.pack(">IIBBBBB", width, height, 16, {1: 0, 2: 4, 3: 2, 4: 6}[channels], 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )


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
            np.asarray(data.open_image(tmp_path / name, white=4095)), true >> 4
        ), name
        assert np.array_equal(np.asarray(data.open_image(tmp_path / name)), true >> 8), name
        cut = np.asarray(data.open_image(tmp_path / name, white=1000))
        assert (
            np.array_equal(cut, np.minimum(true.astype(int) * 256 // 1001, 255))
            and cut[0, 0, 0] == 255
        ), name
        assert (
            data.above_white(tmp_path / name, 4095)
            == 0
            < data.above_white(tmp_path / name, 4094)
            < 0.2
        ), name
    signed = Image.fromarray(np.array([[-5, 4000]], np.int32))
    signed.save(tmp_path / "signed.tif")
    with pytest.raises(UserError, match="signed.tif: .*sign, or of 32 bits"):
        data.open_image(tmp_path / "signed.tif", white=4095)


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
    images = data.ImageFolder(tmp_path / "set")
    assert data.white_point(images) == 4095 and "d.jpg" not in opened  # 2500 < 4096 = 2^12
    data.see(0, images)
    assert np.asarray(images.image(images.names.tolist().index("b.png")))[0, 1, 0] == 2500 >> 4
    assert (
        np.asarray(images.image(images.names.tolist().index("a.png")))[0, 1, 0] == 300 >> 4
    )  # still darker than b.png
    for largest, white in ((40, 255), (255, 255), (256, 511), (32767, 32767), (32768, 65535)):
        png_of_16_bits(tmp_path / "one.png", [[0, largest]])
        (tmp_path / str(largest)).mkdir()
        (tmp_path / "one.png").rename(tmp_path / str(largest) / "one.png")
        assert data.white_point(data.ImageFolder(tmp_path / str(largest))) == white
    opened.clear()
    shutil.rmtree(tmp_path / "set" / "sub")
    for path in (tmp_path / "set").glob("*.png"):
        path.unlink()
    assert data.white_point(data.ImageFolder(tmp_path / "set")) == data.WHITE and not opened
    many = [f"{i:04}.png" for i in range(3000)]
    monkeypatch.setattr(data, "_largest", lambda path: opened.append(path.name) or 7)
    images.names = np.array(many)
    assert (
        data.white_point(images) == 255
        and len(opened) == data.MEASURED
        and opened[:2] == ["0000.png", "0003.png"]
        and opened[-1] == "2997.png"
    )


def test_a_run_stores_the_white_point_that_it_was_trained_with(tmp_path, capsys):
    root = write_coco_folder(tmp_path / "set", images=2)
    size = Image.open(root / "images" / "train0.png").size
    png_of_16_bits(root / "images" / "train1.png", np.full(size[::-1], 900))
    flags = ("--split", "1", "--steps", 1, "--no-eval")
    assert run_folder("sup", root, *flags) == 0
    stored = json.loads((tmp_path / "set-sup-1" / "config.json").read_text())
    assert stored["white"] == 1023  # 900 < 1024 = 2^10
    png_of_16_bits(root / "images" / "train1.png", np.full(size[::-1], 9000))
    assert (
        run_folder("sup", root, *flags, "--resume") == 2
        and "white: 1023 there, 16383 now" in capsys.readouterr().err
    )
    # versions before this number divided by 256; what is no run has no numbers
    assert numbers_of({"alpha": 0.5}) == {"alpha": 0.5, "white": 65535} and numbers_of({}) == {}
    old = {name: value for name, value in stored.items() if name != "white"}
    assert trainer.differing(old, {**stored, "white": 65535}) == [] and trainer.differing(
        old, stored
    ) == ["white"]
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
        data.load_folder(root, "3").labeled == [5] and len(data.load_folder(root, "2").labeled) == 2
    )
    monkeypatch.chdir(tmp_path)
    for name in ("2", "1_3", "list"):
        (tmp_path / name).write_text("train1.png\n")
    assert len(data.load_folder(root, "2").labeled) == 2 and data.load_folder(
        root, "1_3"
    ).labeled == [0, 3]
    assert data.load_folder(root, "./2").labeled == data.load_folder(root, "list").labeled == [1]
    for split in ("", "all"):
        assert data.load_folder(root, split).labeled == [0, 1, 2, 3, 4, 5]
    (root / "splits" / "all").mkdir()
    (root / "splits" / "4").mkdir()  # a folder without a list is no number
    for split in ("all", "", "4"):
        with pytest.raises(
            UserError, match=f"splits/{split or 'all'}/labeled.txt: no such file, though --split"
        ):
            data.load_folder(root, split)
    (root / "splits" / "all" / "labeled.txt").write_text("train2.png\ntrain4.png\n")
    for split in ("", "all"):
        assert data.load_folder(root, split).labeled == [2, 4]


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
        read = data.load_folder(spelling, "all").train
        assert read.maps.resolve() == root / "annotations" / "panoptic_train" and len(
            read.truth(1).labels
        ), spelling
    monkeypatch.chdir(root)
    assert (
        data.load_folder(".", "all").train.maps.resolve() == root / "annotations" / "panoptic_train"
    )
    shutil.rmtree(root / "panoptic")
    assert len(data.load_folder(".", "all").val.truth(0).labels)


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
    assert data.pictures(folder, others.append) == sorted([*names, "linked/g.png"])
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
        data.ImageFolder(folder).names.tolist()
        == predict.Pictures(folder, tmp_path / "out").names
        == data.pictures(folder)
    )
    checkpoint.release(tmp_path / "out")


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
        data.require_truth(data.load_folder(root, "all"))
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
    dataset = data.load_folder(root, "2")
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
        data.objects(dataset.train, dataset.labeled).tolist() == counts
        and data.objects(dataset.val, [1, 0]).tolist() == val[::-1]
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
        data.out_of_reach(dataset, cfg) == expected
        and data.out_of_reach(dataset, dataclasses.replace(cfg, num_queries=max(counts + val)))
        == []
    )
    out, _, content = validated(root, "--split", "2", "--num-queries", "2", code=0, capsys=capsys)
    assert content["notices"][:2] == expected and all(f"note: {text}" in out for text in expected)
    assert run_folder("sup", root, "--split", "2", "--num-queries", "2", "--dry-run") == 0
    out = capsys.readouterr().out
    assert all(f"warning: {text}\n" in out for text in expected)


def test_an_error_in_a_loader_process_is_one_line(tmp_path):
    root = write_coco_folder(tmp_path / "set", images=2)
    dataset = data.load_folder(root, "1")
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


# --------------------------------------------------------------------------------------------------------- datasets.py


def test_ade_segments_follow_the_rules_by_hand():
    semantic = np.array(
        [[1, 1, 1, 8], [1, 1, 4, 8], [0, 0, 4, 13]], np.uint8
    )  # wall, floor; bed (8) and person (13) are things
    instances = np.zeros((3, 4, 3), np.uint8)
    instances[0, 2:, 0], instances[0, 2:, 1] = 1, 5  # instance class 1 = bed, hides a wall pixel
    ids, segments = datasets.ade_panoptic(semantic, instances)
    assert ids.tolist() == [
        [1, 1, 3, 3],
        [1, 1, 2, 0],
        [0, 0, 2, 0],
    ]  # things without an instance are void
    assert [(s["category_id"], s["area"], s["bbox"]) for s in segments] == [
        (0, 5, [0, 0, 3, 2]),
        (3, 2, [2, 1, 1, 2]),
        (7, 2, [2, 0, 2, 1]),
    ]
    instances[2, 0] = (2, 5, 0)
    with pytest.raises(ValueError, match=r"instance 5 has classes \[1, 2\]"):
        datasets.ade_panoptic(semantic, instances)


def test_coco_objects_fuse_stuff_and_void_into_one_background():
    ids = np.array([[9, 9, 0, 4], [7, 7, 5, 4]], np.int32)
    segments = [
        {"id": 9, "category_id": 3, "area": 2, "iscrowd": 1},
        {"id": 7, "category_id": 92, "area": 2, "bbox": [0, 1, 2, 1], "iscrowd": 0},
        {"id": 4, "category_id": 1, "area": 2, "iscrowd": 0},
        {"id": 5, "category_id": 200, "area": 1, "iscrowd": 0},
    ]
    fused, kept = datasets.objects_panoptic(ids, segments)
    assert fused.tolist() == [[9, 9, 7, 4], [7, 7, 7, 4]]
    assert kept == [
        segments[0],
        segments[2],
        {"id": 7, "category_id": 0, "area": 4, "bbox": [0, 1, 2, 1], "iscrowd": 0},
    ]
    things_only = [segments[0], segments[2]]
    fused, kept = datasets.objects_panoptic(np.array([[9, 0, 4]], np.int32), things_only)
    assert fused.tolist() == [[9, 1, 4]] and kept[-1] == {
        "id": 1,
        "category_id": 0,
        "area": 1,
        "iscrowd": 0,
    }
    assert datasets.objects_panoptic(np.array([[9, 4]], np.int32), things_only)[1] == things_only


def write_downloads(name, root, monkeypatch):
    """The downloads of a data set in their original layout, two handfuls of pixels each, and its official lists."""
    kind = "ade20k" if name == "ade20k" else "coco"
    base, rng = root / datasets.FOLDERS[kind], np.random.default_rng(0)

    def save(array, path):
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(array).save(path)

    photo = lambda: rng.integers(0, 256, (64, 96, 3), np.uint8)
    if kind == "ade20k":
        stems = {
            "training": [f"ADE_train_{i:08d}" for i in range(1, 5)],
            "validation": ["ADE_val_00000001", "ADE_val_00000002"],
        }
        for part, names in stems.items():
            for stem in names:
                semantic = np.repeat(
                    np.repeat(rng.choice([0, 1, 3, 4, 13, 21], (4, 6)).astype(np.uint8), 16, 0),
                    16,
                    1,
                )
                instances = np.zeros((64, 96, 3), np.uint8)
                instances[8:40, 10:50, :2], instances[30:60, 60:90, :2] = (5, 1), (9, 2)
                save(photo(), base / "images" / part / f"{stem}.jpg")
                save(semantic, base / "annotations" / part / f"{stem}.png")
                save(instances, base / "annotations_instance" / part / f"{stem}.png")
        line = lambda stem: f"images/training/{stem}.jpg annotations/training/{stem}.png\n"
        labeled, unlabeled = (
            line(a) + line(b) for a, b in (stems["training"][:2], stems["training"][2:])
        )
        prompts = ["0:invalid_class_id", *(f"{k}:class {k},synonym {k}" for k in range(1, 151))]
    else:
        categories = [
            {"id": 1, "name": "person", "isthing": 1},
            {"id": 3, "name": "car", "isthing": 1},
            {"id": 92, "name": "banner", "isthing": 0},
            {"id": 200, "name": "rug", "isthing": 0},
        ]
        for part, count in (("train", 4), ("val", 2)):
            content = {"images": [], "annotations": [], "categories": categories}
            for i in range(1, count + 1):
                ids = np.repeat(
                    np.repeat(rng.choice([0, 300, 70_000, 5, 6], (4, 6)), 16, 0), 16, 1
                ).astype(np.int32)
                segments = [
                    {
                        "id": n,
                        "category_id": c,
                        "area": int((ids == n).sum()),
                        "bbox": [0, 0, 96, 64],
                        "iscrowd": int(n == 6),
                    }
                    for n, c in ((300, 1), (70_000, 92), (5, 200), (6, 3))
                    if (ids == n).any()
                ]
                content["images"].append(
                    {"id": i, "file_name": f"{i:012d}.jpg", "width": 96, "height": 64}
                )
                content["annotations"].append(
                    {"image_id": i, "file_name": f"{i:012d}.png", "segments_info": segments}
                )
                save(photo(), base / f"{part}2017" / f"{i:012d}.jpg")
                save(
                    np.asarray(datasets.encode(ids)),
                    base / f"panoptic_{part}2017" / f"{i:012d}.png",
                )
            (base / "annotations").mkdir(exist_ok=True)
            (base / "annotations" / f"panoptic_{part}2017.json").write_text(json.dumps(content))
        labeled, unlabeled = (
            "".join(f"train2017/{i:012d}.jpg masks/{i:012d}.png\n" for i in (1, 2)),
            "",
        )
        prompts = [
            "0:background" if name == "coco-objects" else "0:invalid_class_id",
            "1:person,child",
            "2:invalid_class_id",
            "3:car",
            "92:banner",
            "200:rug",
        ]
    hashes = {}
    for given, _, _ in datasets.lists(name).values():
        path = root / "assets" / given
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(
            "\n".join(prompts)
            if given.startswith("prompts")
            else unlabeled
            if "unlabeled" in given
            else labeled
        )
        hashes[given] = hashlib.sha256(path.read_bytes()).hexdigest()
    monkeypatch.setattr(datasets, "SHA256", hashes)
    return base


@pytest.mark.parametrize(
    "name, classes, split",
    [("ade20k", 150, "1_128"), ("coco", 4, "1_512"), ("coco-objects", 3, "1_512")],
)
def test_a_data_set_of_the_paper_is_prepared_trained_and_evaluated(
    name, classes, split, tmp_path, monkeypatch, capsys
):
    base = write_downloads(name, tmp_path, monkeypatch)
    root = ["--dataset", name, "--data-root", str(tmp_path), "--device", "cpu"]
    assert dearli.main(["--stage", "sup", *root, "--split", split]) == 2
    assert "--stage prepare" in capsys.readouterr().err
    assert (
        dearli.main(
            ["--stage", "prepare", *root, "--assets", str(tmp_path / "assets"), "--workers", "1"]
        )
        == 0
    )
    assert f"{classes} classes, 4 training and 2 validation images" in capsys.readouterr().out
    assert (
        dearli.main(["--stage", "validate", *root, "--split", split, "--workers", "0"]) == 0
        and "no problem found" in capsys.readouterr().out
    )
    dataset = datasets.load(name, tmp_path, split)
    assert (dataset.labeled, dataset.unlabeled) == ([0, 1], [2, 3])
    for i in range(4):
        truth = dataset.train.truth(i)
        assert truth.segment_map.shape == (64, 96) and truth.segment_map.max() <= len(truth.labels)
    if name == "ade20k":  # mIoU against the original semantic map, 0 = ignored
        original = np.asarray(
            Image.open(base / "annotations" / "validation" / "ADE_val_00000001.png")
        )
        assert np.array_equal(dataset.val.truth(0).semantic(), original - 1.0)
    if name == "coco-objects":
        assert dataset.taxonomy.things == (False, True, True) and all(
            (dataset.train.truth(i).segment_map > 0).all() for i in range(4)
        )
    if name == "coco-objects":  # mIoU against UniMatch's maps once they are there
        for stem in ("000000000001", "000000000002"):
            rows = np.repeat(np.array([[0, 1, 2, 255]], np.uint8), 64, 0).repeat(24, 1)
            (base / "masks").mkdir(exist_ok=True)
            Image.fromarray(rows).save(base / "masks" / f"{stem}.png")
        assert np.unique(datasets.load(name, tmp_path, split).val.truth(0).semantic()).tolist() == [
            data.IGNORE,
            0,
            1,
            2,
        ]
    flags = [
        "--preset",
        "mini",
        *TINY_FLAGS[: TINY_FLAGS.index("--split")],
        "--split",
        split,
        "--runs",
        str(tmp_path / "runs"),
        "--workers",
        "0",
    ]
    for args in (["sup"], ["ssl", "--method", "dear"]):
        assert dearli.main(fitting(["--stage", *args, *root, "--steps", "3"], flags)) == 0
    runs = [
        *root,
        "--preset",
        "mini",
        "--pretrained",
        "random",
        "--split",
        split,
        "--runs",
        str(tmp_path / "runs"),
    ]
    assert dearli.main(["--stage", "zeroshot", *runs, "--masks", "gt"]) == 0
    weights = [
        "--weights",
        str(tmp_path / "runs" / f"{name}-dear-{split}"),
        "--out",
        str(tmp_path / "student.pth"),
    ]
    assert (
        dearli.main(["--stage", "export", *root, *weights]) == 0
        and f"{classes} classes" in capsys.readouterr().out
    )
    assert (
        dearli.main(
            fitting(
                ["--stage", "eval", *root, "--weights", tmp_path / "student.pth", "--groups", "2"],
                flags,
            )
        )
        == 0
    )
    assert capsys.readouterr().out.count("student file") == 1  # read once, said once
    metrics = json.loads((tmp_path / "runs" / f"{name}-dear-{split}" / "metrics.json").read_text())
    exported = json.loads((tmp_path / "runs" / "student" / "metrics.json").read_text())[
        "student/ensemble"
    ]
    assert exported["all"] == metrics["student/ensemble"]["all"] and len(exported["groups"]) == 2
    assert (
        0 <= metrics["student/ensemble"]["all"]["pq"] <= 1
        and len(metrics["student/ensemble"]["per_class"]) == classes
    )


def test_lists_come_from_the_repository_and_a_missing_network_is_named(tmp_path, monkeypatch):
    write_downloads("coco", tmp_path, monkeypatch)
    with pytest.raises(UserError, match="cannot be fetched .* name it with --assets DIR"):
        datasets.prepare("coco", tmp_path)
    for given, remote, _ in datasets.lists(
        "coco"
    ).values():  # what the official repository would answer
        (tmp_path / "repository" / remote).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(tmp_path / "assets" / given, tmp_path / "repository" / remote)
    monkeypatch.setattr(datasets, "REPOSITORY", (tmp_path / "repository").as_uri())
    datasets.prepare("coco", tmp_path)
    assert len(datasets.load("coco", tmp_path, "1_512").labeled) == 2


def test_files_that_are_listed_but_absent_stop_a_run_before_it_begins(
    tmp_path, monkeypatch, capsys
):
    base = write_downloads("coco", tmp_path, monkeypatch)
    root = ["--dataset", "coco", "--data-root", str(tmp_path), "--device", "cpu"]
    assert dearli.main(["--stage", "prepare", *root, "--assets", str(tmp_path / "assets")]) == 0
    flags = [
        "--preset",
        "mini",
        *TINY_FLAGS[: TINY_FLAGS.index("--split")],
        "--split",
        "1_512",
        "--runs",
        str(tmp_path / "runs"),
        "--steps",
        "3",
    ]
    for stage, lost, words in (
        (
            ["ssl", "--method", "dear"],
            base / "train2017" / "000000000004.jpg",
            "1 of 2 unlabelled images",
        ),
        (
            ["sup"],
            base / "panoptic_train2017" / "000000000002.png",
            "1 of 2 labelled panoptic maps",
        ),
        (["sup"], base / "val2017" / "000000000001.jpg", "1 of 2 validation images"),
    ):
        content = lost.read_bytes()
        lost.unlink()
        capsys.readouterr()
        assert dearli.main(fitting(["--stage", *stage, *root], flags)) == 2
        message = capsys.readouterr().err
        assert (
            str(lost) in message
            and words in message
            and message.count("\n") == 1
            and not (tmp_path / "runs").exists()
        )
        lost.write_bytes(content)
    everything = tmp_path / "all.txt"
    everything.write_text("".join(f"{i:012d}.jpg\n" for i in range(1, 5)))
    assert (
        dearli.main(
            [
                *fitting(["--stage", "ssl", *root, "--method", "dear"], flags),
                "--split",
                str(everything),
            ]
        )
        == 2
    )
    assert "none is left for the semi-supervised stage" in capsys.readouterr().err
    content = json.loads((base / "annotations" / "panoptic_val2017.json").read_text())
    content["images"][0]["file_name"] = "../elsewhere.jpg"
    (base / "annotations" / "panoptic_val2017.json").write_text(json.dumps(content))
    assert (
        dearli.main(fitting(["--stage", "sup", *root], flags)) == 2
        and "'../elsewhere.jpg' leads out of its folder" in capsys.readouterr().err
    )


def test_class_maps_that_are_absent_are_missed_before_the_run(tmp_path, monkeypatch, capsys):
    base = write_downloads("ade20k", tmp_path, monkeypatch)
    root = ["--dataset", "ade20k", "--data-root", str(tmp_path), "--device", "cpu"]
    assert dearli.main(["--stage", "prepare", *root, "--assets", str(tmp_path / "assets")]) == 0
    flags = [
        "--preset",
        "mini",
        *TINY_FLAGS[: TINY_FLAGS.index("--split")],
        "--split",
        "1_128",
        "--runs",
        str(tmp_path / "runs"),
        "--steps",
        "1",
    ]
    (base / "annotations" / "training" / "ADE_train_00000001.png").unlink()
    assert (
        dearli.main(fitting(["--stage", "sup", *root, "--no-eval"], flags)) == 0
    )  # panoptic labels do not need it
    assert (
        dearli.main(fitting(["--stage", "sup", *root, "--labels", "semantic"], flags)) == 2
        and "labelled class maps" in capsys.readouterr().err
    )
    (base / "annotations" / "validation" / "ADE_val_00000002.png").unlink()
    assert (
        dearli.main(fitting(["--stage", "sup", *root], flags)) == 2
        and "1 of 2 validation class maps" in capsys.readouterr().err
    )


needs_coco = pytest.mark.skipif(
    not (REAL_DATA / "coco_panoptic_sample").is_dir(),
    reason=f"no COCO sample at {REAL_DATA} (set DEARLI_TEST_DATA)",
)


@needs_coco
def test_real_coco_images_through_the_coco_preset_with_a_small_openclip(tmp_path, small_openclip):
    sample, base = REAL_DATA / "coco_panoptic_sample", tmp_path / "coco"
    content = json.loads((sample / "panoptic_examples.json").read_text())
    for part in ("train", "val"):
        shutil.copytree(sample / "input_images", base / f"{part}2017")
        shutil.copytree(sample / "panoptic_examples", base / f"panoptic_{part}2017")
        (base / "annotations").mkdir(exist_ok=True)
        (base / "annotations" / f"panoptic_{part}2017.json").write_text(json.dumps(content))
    root = ["--dataset", "coco", "--data-root", str(tmp_path), "--device", "cpu"]
    assert dearli.main(["--stage", "prepare", *root, "--assets", str(REAL_DATA)]) == 0
    dataset = datasets.load("coco", tmp_path, "1")
    assert [len(dataset.val.truth(i).labels) for i in range(2)] == [18, 32] and len(
        dataset.taxonomy
    ) == 133
    pq = PanopticQuality(133)
    for truth in (dataset.val.truth(i) for i in range(2)):
        whole = ~truth.crowd  # crowd is no segment that could be predicted
        lut = np.concatenate([[0], np.where(whole, np.cumsum(whole), 0)])
        pq.add(
            lut[truth.segment_map],
            truth.labels[whole],
            truth.segment_map,
            truth.labels,
            truth.areas,
            truth.crowd,
        )
    assert pq.result(dataset.taxonomy.things)["all"]["pq"] == pytest.approx(1.0)
    flags = [
        "--backbone",
        small_openclip,
        "--pretrained",
        "random",
        "--runs",
        str(tmp_path / "runs"),
        "--split",
        "1",
        "--crop",
        "128",
        "--num-queries",
        "20",
        "--encoder-layers",
        "1",
        "--decoder-layers",
        "2",
        "--num-points",
        "256",
        "--labeled-batch",
        "1",
        "--unlabeled-batch",
        "1",
        "--workers",
        "1",
    ]
    assert dearli.main(["--stage", "ssl", "--method", "dear", *root, *flags, "--steps", "2"]) == 0
    metrics = json.loads((tmp_path / "runs" / "coco-dear-1" / "metrics.json").read_text())
    assert (
        metrics["images"] == 2
        and 0 <= metrics["student/ensemble"]["all"]["pq"] <= 1
        and len(metrics["student/ensemble"]["per_class"]) == 133
    )
    stored = json.loads((tmp_path / "runs" / "coco-dear-1" / "config.json").read_text())
    assert (stored["test_size"], stored["test_max"], stored["overlap_threshold"]) == (
        512,
        2048,
        0.8,
    )
    assert (
        dearli.main(["--stage", "eval", *root, "--weights", str(tmp_path / "runs" / "coco-dear-1")])
        == 0
    )
    again = json.loads((tmp_path / "runs" / "coco-dear-1" / "metrics.json").read_text())
    assert again["student/ensemble"] == metrics["student/ensemble"]


def test_a_data_set_is_in_datasets_or_below_a_folder_that_the_environment_names(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DEARLI_DATASETS", raising=False)
    ssl = ["--stage", "ssl", "--dataset", "coco", "--split", "1_512"]

    def refused(*args):
        capsys.readouterr()
        assert dearli.main([*map(str, args)]) == 2
        message = capsys.readouterr().err
        assert message.count("\n") == 1
        return message

    message = refused(*ssl)
    assert message.startswith(
        "error: datasets/coco: no such folder; it should hold the downloads of coco: train2017 (from http://"
    )
    assert (
        "python dearli.py --stage prepare --dataset coco`" in message and "--data-root" in message
    )
    (tmp_path / "datasets" / "coco" / "train2017").mkdir(parents=True)
    message = refused(*ssl)  # what is there is not told again
    assert (
        "datasets/coco: 5 of 6 parts of coco are missing: val2017 (from http" in message
        and " train2017 (" not in message
    )
    shutil.rmtree("datasets")
    # the same in the folder that the environment names; COCO-Objects is made of COCO
    monkeypatch.setenv("DEARLI_DATASETS", str(tmp_path / "sets"))
    assert str(tmp_path / "sets" / "ade20k") in refused(
        "--stage", "sup", "--dataset", "ade20k", "--split", "1_128"
    )
    assert str(tmp_path / "sets" / "coco") in refused(
        "--stage", "sup", "--dataset", "coco-objects", "--split", "1_512"
    )
    assert str(tmp_path / "elsewhere") in refused(*ssl, "--data-root", tmp_path / "elsewhere")
    base = write_downloads("ade20k", tmp_path / "made", monkeypatch)
    (tmp_path / "sets").mkdir()
    (tmp_path / "made").rename(
        tmp_path / "sets" / "ade20k"
    )  # as one who unpacks the zip there has it
    name = ["--dataset", "ade20k", "--device", "cpu"]
    sup = fitting(
        ["--stage", "sup", *name, "--split", "1_64", "--backbone", "mini", "--steps", 1],
        TINY_FLAGS[: TINY_FLAGS.index("--split")],
    )
    message = refused(*sup)
    assert "missing; make it with `python dearli.py --stage prepare --dataset ade20k`" in message
    assert (
        dearli.main(
            ["--stage", "prepare", *name, "--assets", str(tmp_path / "sets" / "ade20k" / "assets")]
        )
        == 0
    )
    assert dearli.main([*map(str, sup)]) == 0
    stored = json.loads(Path("runs/ade20k-sup-1_64/config.json").read_text())
    assert stored["data_root"] == str(tmp_path / "sets" / "ade20k")
    metrics = json.loads(Path("runs/ade20k-sup-1_64/metrics.json").read_text())
    monkeypatch.delenv("DEARLI_DATASETS")  # a run knows where its data were
    assert dearli.main(["--stage", "eval", *name, "--weights", "runs/ade20k-sup-1_64"]) == 0
    assert (
        json.loads(Path("runs/ade20k-sup-1_64/metrics.json").read_text())["student/decoder"]
        == metrics["student/decoder"]
    )


def test_an_interrupted_preparation_goes_on_and_wrong_lists_are_refused(tmp_path, monkeypatch):
    base = write_downloads("ade20k", tmp_path, monkeypatch)
    maps, assets = base / "ade20k_panoptic_train", tmp_path / "assets"
    datasets.prepare("ade20k", tmp_path, assets, workers=1)
    target = base / "ade20k_panoptic_train.json"
    whole = json.loads(target.read_text())
    rows = [
        {"key": image["id"], "image": image, "annotation": a}
        for image, a in zip(whole["images"], whole["annotations"])
    ]
    target.with_name(target.name + ".part").write_text(
        "".join(json.dumps(r) + "\n" for r in rows[:2]) + json.dumps(rows[2])[:40]
    )  # cut
    target.unlink()
    before = (maps / "ADE_train_00000001.png").stat().st_mtime_ns
    datasets.prepare("ade20k", tmp_path, assets, workers=1)
    assert (
        json.loads(target.read_text()) == whole
        and (maps / "ADE_train_00000001.png").stat().st_mtime_ns == before
    )
    (base / "dearli" / "ade20k" / "1_64" / "labeled.txt").unlink()
    (assets / "splits" / "ade20k" / "1_64" / "labeled.txt").write_text("another list\n")
    with pytest.raises(UserError, match="labeled.txt: SHA-256 is .* expected"):
        datasets.prepare("ade20k", tmp_path, assets)
    shutil.rmtree(base / "annotations_instance" / "validation")
    with pytest.raises(
        UserError,
        match=r"1 of 6 parts of ade20k are missing: annotations_instance/validation \(from http",
    ):
        datasets.prepare("ade20k", tmp_path, assets)
    with pytest.raises(UserError, match="unknown split '1_512' of .*; available: 1_128, 1_16"):
        datasets.load("ade20k", tmp_path, "1_512")


def test_official_lists_have_the_counts_of_the_paper():
    if not (REAL_DATA / "splits").is_dir():
        pytest.skip(f"no official lists at {REAL_DATA} (set DEARLI_TEST_DATA)")
    for name, counts in (
        ("ade20k", (158, 316, 632, 1263, 2526)),
        ("coco", (232, 463, 925, 1849, 3697)),
    ):
        for given, _, digest in datasets.lists(name).values():
            assert hashlib.sha256((REAL_DATA / given).read_bytes()).hexdigest() == digest
        lines = lambda split: (
            (REAL_DATA / "splits" / name / split / "labeled.txt").read_text().splitlines()
        )
        assert tuple(len(lines(split)) for split in datasets.splits(name)) == counts
    names = [
        datasets.read_names(REAL_DATA / "prompts" / f"{n}_prompts.txt")
        for n in ("ade20k_150", "coco_panoptic", "coco_objects")
    ]
    assert [len(n) for n in names] == [150, 133, 81]  # classes, and all of their names:
    assert [sum(len(v.split(",")) for v in n.values()) for n in names] == [403, 254, 174]


def test_presets_are_the_official_configurations_and_can_be_printed(capsys):
    assert (
        dearli.main(
            [
                "--stage",
                "sup",
                "--dataset",
                "coco_panoptic",
                "--split",
                "1_64",
                "--print-config",
                "--device",
                "cpu",
            ]
        )
        == 0
    )
    printed = json.loads(capsys.readouterr().out)
    assert (
        printed["crop"],
        printed["dewa_crop"],
        printed["test_size"],
        printed["test_max"],
        printed["sup_steps"],
    ) == (512, 640, 512, 2048, 40_000)
    assert (
        dearli.main(
            [
                "--dataset",
                "ade",
                "--split",
                "1_128",
                "--print-config",
                "--device",
                "cpu",
                "--alpha",
                "0.3",
            ]
        )
        == 0
    )
    printed = json.loads(capsys.readouterr().out)
    assert (
        printed["crop"],
        printed["sup_steps"],
        printed["ssl_steps"],
        printed["alpha"],
        printed["clip_norm"],
    ) == (640, 10_000, 80_000, 0.3, 0.01)


# --------------------------------------------------------------------------------- validate.py, and faults in data sets
#
# Fault 26 (archives that unpack outside their folder, or to
# more than fits) has no test because nothing here unpacks an archive: `--stage prepare` names the addresses and reads what was unpacked.


def rewrite(path, change):
    """Change a JSON in place: change(content) edits it, or returns what takes its place."""
    content = json.loads(path.read_text())
    path.write_text(json.dumps(change(content) or content))


def fingerprint(folder):
    """Names and contents of all files, links not followed."""
    return {
        str(p): p.is_symlink()
        and os.readlink(p)
        or p.is_file()
        and hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(folder.rglob("*"))
    }


def png_header(width, height):
    """A PNG that states a size and holds next to nothing."""
    chunk = lambda kind, content: (
        struct.pack(">I", len(content))
        + kind
        + content
        + struct.pack(">I", zlib.crc32(kind + content))
    )
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(bytes(100)))
        + chunk(b"IEND", b"")
    )


def validated(root, *flags, code, capsys):
    """Output, error line and JSON of --stage validate."""
    target = root.parent / "report.json"
    target.unlink(missing_ok=True)
    capsys.readouterr()
    arguments = [
        "--stage",
        "validate",
        "--dataset",
        "custom",
        "--data-root",
        root,
        "--json",
        target,
        "--device",
        "cpu",
        "--workers",
        0,
        *flags,
    ]
    assert dearli.main([str(a) for a in arguments]) == code
    out, err = capsys.readouterr()
    return (
        out,
        [line for line in err.splitlines() if line.startswith("error: ")],
        json.loads(target.read_text()),
    )


def one_refusal(root, words, split="2"):
    """Loading or the first batch of a folder is refused in one line with these words."""
    with pytest.raises(UserError) as error:
        dataset = data.load_folder(root, split)
        for step in range(3):
            data.LabeledBatches(dataset, dataclasses.replace(TINY, labeled_batch=4), 3)[step]
    assert re.search(words, str(error.value)) and "\n" not in str(error.value), str(error.value)


def test_a_sound_data_set_is_described_and_passes(small_mini, tmp_path, capsys):
    root = write_coco_folder(tmp_path / "set")
    out, errors, content = validated(root, "--split", "1_3", code=0, capsys=capsys)
    assert (
        "no problem found" in out
        and not errors
        and not content["problems"]
        and str(root) not in out
    )
    assert (
        content["counts"]["training"]["images"] == 6
        and content["counts"]["labelled"]["images"] == 2
        and content["counts"]["unlabelled"]["images"] == 4
    )
    truths = [data.load_folder(root, "1_3").train.truth(i) for i in range(6)]
    assert (
        content["counts"]["training"]["segments"] == sum(len(t.labels) for t in truths)
        and content["counts"]["training"]["void"] == 0
    )
    for k, row in enumerate(content["classes"]):
        assert row["share"] == pytest.approx(np.mean([t.semantic() == k for t in truths])) and row[
            "images"
        ] == sum(k in t.labels for t in truths)
        assert row["labeled_images"] == sum(k in truths[i].labels for i in (0, 3))
    unseen = [row["name"] for row in content["classes"] if not row["labeled_images"]]
    assert f"{len(unseen)} classes of 20 that no labelled image shows: {', '.join(unseen)}" in out
    assert (
        validated(root, code=0, capsys=capsys)[2]["counts"]["labelled"]["images"] == 6
    )  # without --split: all
    assert (
        dearli.main(["--stage", "validate", "--split", "4", "--device", "cpu"]) == 0
        and "no problem found" in capsys.readouterr().out
    )


def test_all_faults_of_a_folder_are_listed_by_kind_and_nothing_is_changed(tmp_path, capsys):
    root = write_coco_folder(tmp_path / "set", images=16)
    image, panoptic = (
        (lambda i: root / "images" / f"train{i}.png"),
        (lambda i: root / "panoptic" / f"train{i}.png"),
    )
    image(0).write_bytes(image(0).read_bytes()[:-300])
    image(1).write_bytes(b"")
    image(2).unlink()
    image(4).write_bytes(png_header(30_000, 30_000))
    image(5).unlink()
    image(5).symlink_to(tmp_path)
    Image.open(panoptic(6)).resize((20, 30)).save(panoptic(6))

    def change(content):
        segments = lambda i: content["annotations"][i]["segments_info"]
        segments(7)[0]["id"] = 9
        segments(8)[0]["area"] += 5
        segments(9)[0]["category_id"] = 1000
        segments(10).append(dict(segments(10)[0]))
        del segments(11)[0]["iscrowd"]
        segments(12)[0]["area"] = None
        content["images"][13]["file_name"] = "../train13.png"
        content["images"].append(content["images"][14])
        content["annotations"].append(content["annotations"][14])
        content["annotations"].append(["train15"])

    rewrite(root / "panoptic_train.json", change)
    (root / "splits" / "1_3" / "labeled.txt").write_text(
        "train14.png\ntrain15.png\ntrain14.png\nelsewhere.png\n"
    )
    (root / "splits" / "1_3" / "unlabeled.txt").write_text("train3.png\ntrain15.png\n")
    masks = tmp_path / "masks"
    masks.mkdir()
    for i in range(16):
        side = 32 if i == 3 else 64
        (masks / f"train{i}.json").write_text(
            json.dumps({"image": {"height": side, "width": side}, "annotations": []})
            if i != 7
            else "{"
        )
    before = fingerprint(root)
    out, errors, content = validated(
        root, "--split", "1_3", "--masks", masks, code=2, capsys=capsys
    )
    expected = {
        "absent": ["train2"],
        "unreadable": ["train0", "train1"],
        "large": ["train4"],
        "name": ["train13", "train5"],
        "malformed": ["train12", "[16]", "[17]"],
        "image twice": ["train14"],
        "category": ["train9"],
        "segment twice": ["train10"],
        "size": ["train6"],
        "not in json": ["train7"],
        "no pixel": ["train7"],
        "area": ["train8"],
        "split": ["train14", "elsewhere", "train15"],
        "masks": ["train3", "train7"],
    }
    elsewhere = {"stuff twice", "nothing"}  # have tests of their own
    assert list(content["problems"]) == [
        k for k in validate.KINDS if k not in elsewhere
    ]  # in one order
    assert content["problems"].keys() == expected.keys()
    for kind, names in expected.items():
        faults = content["problems"][kind]["faults"]
        assert len(faults) == len(names) and all(
            name in fault for name, fault in zip(names, faults)
        ), (kind, faults)
        assert (
            all(fault.replace(f"{root}/", "") in out for fault in faults)
            and f"{len(names)} x {validate.KINDS[kind][0]}: {validate.KINDS[kind][1]}" in out
        )
    assert (
        errors
        == [
            f"error: {root}: {sum(map(len, expected.values()))} problems of 14 kinds, listed above and in {tmp_path / 'report.json'}"
        ]
        and "note: panoptic_train.json: 1 segment without iscrowd" in out
    )
    assert (
        validated(root, "--split", "1_3", "--masks", masks, "--workers", 2, code=2, capsys=capsys)[
            2
        ]
        == content
    )
    assert fingerprint(root) == before


def test_presets_are_validated_with_their_own_rules_and_class_maps(tmp_path, monkeypatch, capsys):
    base = write_downloads("ade20k", tmp_path, monkeypatch)
    (base / "annotations" / "training" / "ADE_train_00000001.png").unlink()
    semantic = np.ones(
        (64, 96), np.uint8
    )  # wall; the instances hide half of the image, and all of a second kind of stuff
    semantic[8:40, 10:50] = 2
    Image.fromarray(semantic).save(base / "annotations" / "training" / "ADE_train_00000001.png")
    root = [
        "--dataset",
        "ade20k",
        "--data-root",
        str(tmp_path),
        "--device",
        "cpu",
        "--workers",
        "0",
    ]
    assert dearli.main(["--stage", "prepare", *root, "--assets", str(tmp_path / "assets")]) == 0
    truth = datasets.load("ade20k", tmp_path, "1_128").train.truth(0)
    assert (
        np.bincount(truth.segment_map.ravel(), minlength=len(truth.labels) + 1)[1:] == 0
    ).any()  # the official rule lists it all the same
    assert (
        dearli.main(["--stage", "validate", *root, "--split", "1_128"]) == 0
        and "no problem found" in capsys.readouterr().out
    )
    (base / "annotations" / "validation" / "ADE_val_00000001.png").write_bytes(b"")
    rewrite(
        base / "ade20k_panoptic_train.json",
        lambda content: content["annotations"][1]["segments_info"][0].update(area=1),
    )
    assert dearli.main(["--stage", "validate", *root]) == 2
    out = capsys.readouterr().out
    assert (
        "ADE_val_00000001.png: not a readable image (empty file)" in out
        and "the JSON states 1\n" in out
    )


def test_a_json_too_broken_to_open_is_the_one_line_of_the_report(tmp_path, capsys):
    root = write_coco_folder(tmp_path / "set")
    (root / "panoptic_val.json").write_text('{"images": [')
    out, errors, content = validated(root, code=2, capsys=capsys)
    assert (
        not out
        and len(errors) == 1
        and "panoptic_val.json: not a readable JSON file" in errors[0]
        and content["refused"] in errors[0]
    )


def test_many_faults_of_a_kind_are_counted_and_the_first_few_shown(tmp_path, capsys):
    root = write_coco_folder(tmp_path / "set", images=12)
    for path in (root / "images").glob("train*"):
        path.write_bytes(b"")
    out, _, content = validated(root, code=2, capsys=capsys)
    assert (
        "12 x files cannot be read" in out
        and "... and 7 more" in out
        and out.count("(empty file)") == 5
        and len(content["problems"]["unreadable"]["faults"]) == 12
    )


@pytest.mark.parametrize("content", [b"", b"no picture at all", b"\x89PNG\r\n\x1a\n", None])
def test_fault_19_truncated_empty_or_non_image_files_are_named(content, tmp_path):
    root = write_coco_folder(tmp_path / "set", images=2)
    for path in (root / "images" / "train1.png", root / "panoptic" / "train1.png"):
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) * 3 // 4] if content is None else content)
        one_refusal(root, f"{path}: not a readable image")
        path.write_bytes(whole)
    (root / "splits" / "1_3" / "labeled.txt").write_bytes(b"\xff\xfe\x00")
    one_refusal(root, "labeled.txt: not a readable text file", "1_3")


def test_validate_says_what_is_dark_cut_off_unlisted_or_stuff_twice(tmp_path, capsys):
    root = write_coco_folder(tmp_path / "set", images=3)
    out, _, content = validated(root, code=0, capsys=capsys)
    assert not any("range" in line or "picture" in line for line in content["notices"])
    size = Image.open(root / "images" / "train0.png").size
    deep = np.zeros(size[::-1], np.uint16)
    deep[:, ::2] = 4000  # 12 bits; the white point is 4095
    png_of_16_bits(root / "images" / "train0.png", deep)
    png_of_16_bits(
        root / "images" / "val0.png", np.where(deep, 200, 0)
    )  # 200 of 4095 becomes 12: next to nothing
    png_of_16_bits(
        root / "images" / "val1.png", np.where(deep, 9000, 0)
    )  # cut off in half of its pixels
    Image.new("RGB", size, (9, 9, 15)).save(root / "images" / "train1.png")
    Image.new("RGB", size).save(root / "images" / "new.png")
    Image.new("RGB", size).save(root / "images" / ".hidden.png")
    out, _, content = validated(root, code=0, capsys=capsys)
    assert (
        "note: 2 of 5 images that use less than 1/16 of their range, 0 to 255, and show next to "
        "nothing: train1.png (9 to 15), val0.png (0 to 12)" in out
    )
    assert (
        "--white (here 4095)" in out
        and "note: 1 of 5 images of 16 bits that lose what is brighter than --white 4095: "
        "val1.png (50%)"
        in out
    )
    assert (
        "note: 1 picture in images that no JSON lists, which are not used: new.png; list them"
        in out
    )
    out, _, content = validated(
        root, "--white", "65535", code=0, capsys=capsys
    )  # what /256 would do: 4000 becomes 15
    assert "3 of 5 images that use less than 1/16" in out and "train0.png (0 to 15)" in out

    def split_stuff(content):
        ids = [c["id"] for c in content["categories"]]
        things = {c["id"] for c in content["categories"] if c["isthing"]}
        segments = content["annotations"][1]["segments_info"]
        stuff = next(i for i in ids if i not in things)
        segments[0]["category_id"] = segments[2]["category_id"] = segments[1]["category_id"] = (
            stuff  # the second one is crowd
        )

    rewrite(root / "panoptic_train.json", split_stuff)
    whole = [
        s["category_id"]
        for s in json.loads((root / "panoptic_train.json").read_text())["annotations"][1][
            "segments_info"
        ]
    ]
    dataset = data.load_folder(root, "all")
    stuff = dataset.taxonomy.things.index(False)
    count = whole.count(dataset.taxonomy.ids[stuff]) - 1
    assert (
        data.repeated_stuff(dataset.train) == [(1, stuff, count)]
        and data.repeated_stuff(dataset.val) == []
    )
    out, _, content = validated(root, code=2, capsys=capsys)
    assert content["problems"]["stuff twice"]["faults"] == [
        f"train1.png: {count} segments of {dataset.taxonomy.short_names[stuff]}"
    ]
    assert any(
        "1 of 3 labelled images have several segments of one stuff class" in line
        for line in data.limits(dataset, TINY)
    )


def test_validate_looks_at_the_images_that_training_takes(tmp_path, capsys):
    root = write_coco_folder(tmp_path / "set")
    for lists, count in (([], 6), (["train1.png", "train2.png"], 2)):
        if lists:
            (root / "splits" / "all").mkdir()
            (root / "splits" / "all" / "labeled.txt").write_text("\n".join(lists))
        _, _, content = validated(root, code=0, capsys=capsys)
        assert content["counts"]["labelled"]["images"] == count and content["split"] == "all"
        assert run_folder("sup", root, "--dry-run") == 0
        assert f"{count} labelled" in capsys.readouterr().out


def test_a_category_0_is_a_class_like_any_other(tmp_path):
    root = write_coco_folder(tmp_path / "set", images=2)
    for part in ("train", "val"):

        def shift(content):
            first = content["categories"][0]["id"]
            for c in content["categories"]:
                c["id"] -= first
            for s in (s for a in content["annotations"] for s in a["segments_info"]):
                s["category_id"] -= first

        rewrite(root / f"panoptic_{part}.json", shift)
    dataset = data.load_folder(root, "all")
    assert dataset.taxonomy.ids[0] == 0 and np.array_equal(
        dataset.train.truth(1).labels, microcosm.scene("train", 1, 64).labels
    )
    said = predict.Prediction(
        Image.new("RGB", (2, 2)),
        np.ones((2, 2), np.int32),
        np.array([0]),
        np.array([1.0]),
        np.zeros((2, 2), int),
        dataset.taxonomy,
    )
    assert (
        said.segments_info()[0]["category_id"] == 0 and dataset.taxonomy.categories()[0]["id"] == 0
    )


def test_fault_20_every_kind_of_image_becomes_8_bit_rgb_and_stays_aligned(tmp_path):
    side, left = 24, np.zeros((24, 40), bool)
    left[:, :15] = True  # the left is dark, the right bright, of every image
    grey = np.where(left, 30, 200).astype(np.uint8)
    deep = (grey.astype(np.uint16) << 8) + 77  # 16 bits: divided by 256, not clipped to 255
    rgb = Image.fromarray(np.repeat(grey[..., None], 3, -1))
    frames = [rgb, Image.new("RGB", rgb.size)]
    kinds = {
        "grey.png": Image.fromarray(grey),
        "deep.png": Image.fromarray(deep),
        "deep.tif": Image.fromarray(deep),
        "alpha.png": rgb.convert("RGBA"),
        "palette.png": rgb.quantize(4),
        "bilevel.png": Image.fromarray(~left),
        "cmyk.tif": rgb.convert("CMYK"),
        "grey-alpha.png": rgb.convert("LA"),
        "plain.webp": rgb,
    }
    for name, image in kinds.items():
        image.save(tmp_path / name, **({"lossless": True} if name.endswith("webp") else {}))
    rgb.save(tmp_path / "animated.gif", save_all=True, append_images=frames[1:])
    for name in (*kinds, "animated.gif"):
        image = data.open_image(tmp_path / name)
        assert image.mode == "RGB" and image.size == (40, side), name
        expected = np.where(left, 0, 255) if "bilevel" in name else grey
        assert np.abs(np.asarray(image).astype(int) - expected[..., None]).max() <= 1, name
    for name, image in {
        "float.tif": Image.fromarray(grey.astype(np.float32)),
        "wide.tif": Image.fromarray(grey.astype(np.int32)),
    }.items():
        image.save(tmp_path / name)
        with pytest.raises(UserError, match=f"{name}: .*32 bits a channel"):
            data.open_image(tmp_path / name)


@pytest.mark.parametrize("ending", ["jpg", "png", "webp", "tif"])
def test_fault_20_a_map_lies_on_the_image_whatever_its_exif_orientation(ending, tmp_path):
    # The image is bright where segment 1 lies. Annotators drew on the image as shown, or a program on the pixels as stored: the size tells.
    root = write_coco_folder(tmp_path / "set", images=1)
    shown = np.zeros((48, 64), np.uint8)
    shown[:10, :20] = 255
    back = {3: 3, 6: 8, 8: 6, 5: 5, 7: 7, 2: 2, 1: 1}  # orientation -> the one that undoes it

    def change(content):
        content["images"][0]["file_name"] = f"turned.{ending}"
        content["annotations"][0]["segments_info"] = [
            {"id": 1, "category_id": 7, "area": 200, "iscrowd": 0}
        ]

    rewrite(root / "panoptic_train.json", change)
    for orientation, inverse in back.items():
        stored = Image.fromarray(np.repeat(shown[..., None], 3, -1))
        stored = stored.transpose(data.TURN[inverse]) if inverse in data.TURN else stored
        exif = Image.Exif()
        exif[0x0112] = orientation
        stored.save(
            root / "images" / f"turned.{ending}",
            exif=exif,
            **({"quality": 95} if ending != "png" else {}),
        )
        drawn = [shown > 0] + [np.asarray(stored)[..., 0] > 128] * (
            stored.size != (64, 48) and ending != "tif"
        )  # Pillow hides how a TIFF is stored
        for on in drawn:
            datasets.encode(on.astype(np.int32)).save(root / "panoptic" / "train0.png")
            images = data.load_folder(root, "1").train
            bright, truth = np.asarray(images.image(0))[..., 0] > 128, images.truth(0)
            assert bright.shape == truth.segment_map.shape == (48, 64)
            assert (bright == (truth.segment_map == 1)).mean() > 0.98, (ending, orientation)


def test_fault_20_a_broken_exif_block_turns_nothing(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (64, 48)).save(tmp_path / "a.jpg", exif=exif)
    assert (
        data.open_image(tmp_path / "a.jpg").size
        == data.image_header(tmp_path / "a.jpg")[0]
        == (48, 64)
    )
    content = (tmp_path / "a.jpg").read_bytes()
    assert content.count(b"MM\x00*") == 1
    (tmp_path / "a.jpg").write_bytes(content.replace(b"MM\x00*", b"XX\x00*"))
    assert (
        data.open_image(tmp_path / "a.jpg").size
        == data.image_header(tmp_path / "a.jpg")[0]
        == (64, 48)
    )


@pytest.mark.parametrize("size", [(1, 50), (50, 1), (1, 1), (5000, 20), (20, 5000)])
def test_fault_20_thin_and_long_images_make_batches(size, tmp_path):
    root = write_coco_folder(tmp_path / "set", images=1)
    Image.new("RGB", size, (9, 9, 9)).save(root / "images" / "train0.png")
    datasets.encode(np.ones(size[::-1], np.int32)).save(root / "panoptic" / "train0.png")

    def change(content):
        content["annotations"][0]["segments_info"] = [
            {"id": 1, "category_id": 7, "area": size[0] * size[1], "iscrowd": 0}
        ]

    rewrite(root / "panoptic_train.json", change)
    batch = data.LabeledBatches(data.load_folder(root, "1"), TINY, 2)[0]
    for image, target in zip(batch.images, batch.targets):
        assert image.shape == (3, 64, 64) and len(target) == 1
        assert ((image[0] != data.PAD_VALUE) == (target.segment_map == 1)).all()


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_fault_21_a_decompression_bomb_is_refused_with_its_path_before_it_is_unpacked(tmp_path):
    root = write_coco_folder(tmp_path / "set", images=2)
    for width, height in (
        (30_000, 30_000),
        (10_000, 9_000),
    ):  # Pillow refuses the first and would only warn of the second
        for path in (root / "images" / "train1.png", root / "panoptic" / "train1.png"):
            whole = path.read_bytes()
            path.write_bytes(png_header(width, height))
            one_refusal(root, f"{path}: its header states more than 89 million pixels")
            path.write_bytes(whole)


def test_fault_21_masks_do_not_take_more_memory_than_their_image(tmp_path):
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    counts = dewa.encode_rle(np.zeros((1, 1), bool))["counts"]
    for size, counts in (
        ([100_000, 100_000], "0"),
        ([1 << 40, 1 << 40], "0"),
        ([64, 64], "~" * 30 + "0"),
        ([64, 64], counts),
        ([64, 64], "PPT" + "P" * 10 + "1"),
        ([64.0, 64], "0"),
        ("64", "0"),
    ):
        (tmp_path / "a.json").write_text(
            json.dumps(
                {
                    "image": {"height": 64, "width": 64},
                    "annotations": [{"segmentation": {"size": size, "counts": counts}}],
                }
            )
        )
        with pytest.raises(UserError, match="a.json: .*delete it and run --stage masks again"):
            dewa.read_masks(tmp_path, "a.png", (64, 64))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 100_000  # KB


@pytest.mark.parametrize(
    "edit, words",
    [
        (
            lambda s: s[0].update(id=9),
            r"train1.png: segment \d+ has pixels but is not in segments_info",
        ),
        (
            lambda s: s.append({"id": 9, "category_id": 7, "area": 4}),
            "train1.png: segment 9 is in segments_info but has no pixel",
        ),
        (
            lambda s: s[0].update(category_id=1000),
            r"segment 70000 of image train1.png has category 1000",
        ),
        (lambda s: s.append(dict(s[0])), "segment 70000 of image train1.png is listed twice"),
        (lambda s: s[0].update(iscrowd=2), "of image train1.png: expected id .* iscrowd"),
    ],
)
def test_fault_22_map_and_json_that_disagree_name_image_and_segment(edit, words, tmp_path):
    root = write_coco_folder(tmp_path / "set", images=2)
    rewrite(
        root / "panoptic_train.json",
        lambda content: edit(content["annotations"][1]["segments_info"]),
    )
    one_refusal(root, words)


def test_fault_22_a_map_of_another_size_is_named_and_a_missing_iscrowd_is_zero(tmp_path):
    root = write_coco_folder(tmp_path / "set", images=2)
    rewrite(
        root / "panoptic_train.json",
        lambda content: (
            [s.pop("iscrowd") for s in content["annotations"][0]["segments_info"]] and None
        ),
    )
    assert not data.load_folder(root, "2").train.truth(0).crowd.any()
    path = root / "panoptic" / "train1.png"
    Image.open(path).resize((63, 64), Image.Resampling.NEAREST).save(path)
    one_refusal(root, f"{path}: 63 x 64 pixels, but its image train1.png has 64 x 64")
    rewrite(
        root / "panoptic_val.json",
        lambda content: content["categories"][0].update(name="something else"),
    )
    one_refusal(root, "category 7 is 'something else', but")


@pytest.mark.parametrize(
    "text, words",
    [
        ("[" * 100_000, "not a readable JSON"),
        (
            '{"images": {}, "annotations": [], "categories": []}',
            "key 'images' is missing or not a list",
        ),
        ("null", "key 'images'"),
        (
            '{"images": [], "annotations": [], "categories": [{"id": 1e999, "name": "cat", "isthing": 1}]}',
            "expected a whole number as id",
        ),
        (
            '{"images": [], "annotations": [], "categories": [{"id": 1, "name": "cat", "isthing": 1}, {"id": 1, "name": "dog", "isthing": 1}]}',
            "shares its id",
        ),
        (
            '{"images": [], "annotations": [], "categories": [{"id": 1, "name": ["cat"], "isthing": 1}]}',
            "expected a whole number as id, a name",
        ),
    ],
)
def test_fault_23_a_malformed_json_is_one_line(text, words, tmp_path):
    root = write_coco_folder(tmp_path / "set", images=1)
    (root / "panoptic_train.json").write_text(text)
    one_refusal(root, f"panoptic_train.json: .*{words}")


@pytest.mark.parametrize(
    "value",
    [
        "NaN",
        "1e999",
        "1e400",
        "-1",
        "-1e400",
        "99999999999999999999999",
        "16777216",
        "1.5",
        '"70000"',
        "null",
        "[]",
        "{}",
        "[[null]]",
        "true",
    ],
)
def test_fault_23_numbers_that_are_none_are_one_line(value, tmp_path):
    root = write_coco_folder(tmp_path / "set", images=1)
    path = root / "panoptic_train.json"
    text = path.read_text()
    for key, old in (
        ("id", '"id": 70000'),
        ("area", '"area": [0-9]+'),
        ("category_id", '"category_id": [0-9]+'),
        ("image_id", '"image_id": 0'),
        ("images", '"images": [^]]*]'),
    ):
        path.write_text(re.sub(old, f'"{key}": {value}', text, count=1))
        if (key, value) == ("area", "16777216"):
            data.load_folder(root, "1")  # so large an area is possible
        else:
            one_refusal(root, "panoptic_train.json: ", "1")


@pytest.mark.parametrize(
    "name",
    [
        "/etc/hostname",
        "../outside.png",
        "a/../../outside.png",
        "",
        ".",
        "a\x00.png",
        "a\nb.png",
        "\ud800.png",
        "n" * 300,
        ["train0.png"],
        None,
        3,
    ],
)
def test_fault_24_names_that_leave_the_data_root_or_are_none_are_refused(name, tmp_path):
    root = write_coco_folder(tmp_path / "set", images=2)
    for table in ("images", "annotations"):
        whole = (root / "panoptic_train.json").read_text()
        rewrite(
            root / "panoptic_train.json", lambda content: content[table][1].update(file_name=name)
        )
        one_refusal(root, "panoptic_train.json: .*file_name")
        (root / "panoptic_train.json").write_text(whole)


def test_fault_24_preparation_writes_nowhere_else(tmp_path, monkeypatch):
    base = write_downloads("coco-objects", tmp_path, monkeypatch)
    rewrite(
        base / "annotations" / "panoptic_train2017.json",
        lambda content: content["annotations"][0].update(file_name="../../../stray.png"),
    )
    with pytest.raises(UserError, match="file_name '../../../stray.png' leads out of its folder"):
        datasets.prepare("coco-objects", tmp_path, tmp_path / "assets")
    assert not list(tmp_path.parent.glob("stray.png"))


def test_fault_24_links_stay_in_the_data_root(tmp_path):
    root = write_coco_folder(tmp_path / "set", images=2)
    for folder in ("images", "panoptic"):
        path = root / folder / "train1.png"
        outside, inside = tmp_path / f"{folder}.png", root / "raw" / f"{folder}.png"
        inside.parent.mkdir(exist_ok=True)
        shutil.copy(path, inside)
        path.rename(outside)
        path.symlink_to(outside)
        one_refusal(root, f"{path}: is a link that leads out of the data root, to {outside}")
        path.unlink()
        path.symlink_to(Path("..") / "raw" / f"{folder}.png")  # a link within it is no fault
        data.load_folder(root, "2").train.truth(1)
    (root / "images").rename(tmp_path / "disk")
    (root / "images").symlink_to(tmp_path / "disk")  # nor is a whole folder on another disk
    (root / "images" / "train1.png").unlink()
    shutil.copy(root / "raw" / "images.png", root / "images" / "train1.png")
    data.LabeledBatches(data.load_folder(root, "2"), TINY, 1)[0]


@pytest.mark.parametrize(
    "labeled, unlabeled, words",
    [
        ("", None, "labeled.txt: the list is empty"),
        ("\n \n", None, "labeled.txt: the list is empty"),
        (
            "train0.png\nnowhere.png\n",
            None,
            "labeled.txt: 'nowhere.png' is not an image of the training set",
        ),
        ("train0.png\ntrain1.png\ntrain0.png\n", None, "labeled.txt: 'train0.png' is listed twice"),
        (
            "train0.png\n",
            "train1.png\ntrain0.png\n",
            "unlabeled.txt: 'train0.png' is in labeled.txt, too",
        ),
        ("train0.png\n", "", "unlabeled.txt: the list is empty"),
    ],
)
def test_fault_25_lists_that_are_empty_absent_twice_or_overlapping_are_refused(
    labeled, unlabeled, words, tmp_path
):
    root = write_coco_folder(tmp_path / "set", images=3)
    (root / "splits" / "1_3" / "labeled.txt").write_text(labeled)
    if unlabeled is not None:
        (root / "splits" / "1_3" / "unlabeled.txt").write_text(unlabeled)
    one_refusal(root, words, "1_3")


def test_fault_25_fewer_images_than_a_batch_are_taken_again(tmp_path):
    dataset = data.load_folder(write_coco_folder(tmp_path / "set", images=2), "1")
    labeled, unlabeled = data.SemiSupervisedBatches(
        dataset, dataclasses.replace(TINY, labeled_batch=5, unlabeled_batch=3, burn_in=0), 1
    )[0]
    assert (
        labeled.images.shape == (5, 3, 64, 64)
        and len(set(labeled.names)) == 1
        and unlabeled.weak.shape == (3, 3, 64, 64)
    )


def test_fault_29_a_file_that_disappears_after_the_listing_is_named(tmp_path):
    root = write_coco_folder(tmp_path / "set", images=2)
    for path in (root / "images" / "train1.png", root / "panoptic" / "train1.png"):
        dataset, whole = data.load_folder(root, "2"), path.read_bytes()
        data.require_files(dataset.train, range(2), "training")
        path.unlink()
        with pytest.raises(UserError, match=f"{path}: no such file"):
            data.LabeledBatches(dataset, TINY, 1)[0]
        path.write_bytes(whole)


def test_fault_29_unicode_spaces_long_names_and_a_read_only_folder_are_no_fault(tmp_path, capsys):
    root = write_coco_folder(tmp_path / "a set with späces")
    names = [
        "ein Bild.png",
        "写真 1.png",
        "a\u202fb.png",
        "x" * 250 + ".png",
        "sub folder/üñí.png",
        "..dots..png",
    ]
    for kind in ("images", "panoptic"):
        (root / kind / "sub folder").mkdir()
        for i, name in enumerate(names):
            (root / kind / f"train{i}.png").rename(root / kind / name)

    def change(content):
        for image, annotation, name in zip(content["images"], content["annotations"], names):
            image["file_name"] = annotation["file_name"] = name

    rewrite(root / "panoptic_train.json", change)
    (root / "splits" / "1_3" / "labeled.txt").write_text(
        "\ufeff" + "\r\n".join(names[:4]), encoding="utf-8"
    )
    paths = [root, *root.rglob("*")]
    for path in paths:
        path.chmod(0o555 if path.is_dir() else 0o444)
    try:
        dataset, before = data.load_folder(root, "1_3"), fingerprint(root)
        assert [dataset.train.name(i) for i in dataset.labeled] == names[:4] and [
            dataset.train.name(i) for i in dataset.unlabeled
        ] == names[4:]
        out, _, content = validated(root, "--split", "1_3", code=0, capsys=capsys)
        assert content["counts"]["training"]["images"] == 6 and fingerprint(root) == before
    finally:
        for path in paths:
            path.chmod(0o755 if path.is_dir() else 0o644)


def test_fault_30_an_index_keeps_flat_arrays_whatever_the_number_of_images(tmp_path):
    objects = []
    for images in (1, 6):
        folder = data.load_folder(
            write_coco_folder(tmp_path / f"set{images}", images=images), "1"
        ).train
        objects.append(
            sum(
                len(value)
                for value in vars(folder).values()
                if isinstance(value, (list, dict, set, tuple))
            )
        )
        assert len(folder.names) == images and folder.segments.dtype == np.int64
    assert objects[0] == objects[1]


def test_fault_33_segment_ids_use_all_three_bytes(tmp_path):
    ids = np.array([[0, 1, 255, 256], [65_535, 65_536, 70_000, (1 << 24) - 1]], np.int32)
    datasets.encode(ids).save(tmp_path / "ids.png")
    assert np.array_equal(data.segment_ids(tmp_path / "ids.png"), ids)


# ---- a fuzz: `python test_dearli.py --fuzz 2000`

WEIRD = [
    "NaN",
    "1e999",
    "-1e400",
    "-1",
    "0",
    "1.5",
    "99999999999999999999999",
    "16777216",
    "2147483648",
    "null",
    "true",
    "[]",
    "{}",
    '""',
    '"70000"',
    '"../x.png"',
    '"\\ud800"',
    '"a\\u0000b"',
    "[[null]]",
    "[" * 5000,
    "\x00",
    "}",
    ",",
]


def mutate(content, rng):
    """Bytes that differ from the content: flipped bits, a part lost, doubled or overwritten, or (in a text) a value replaced by a weird one."""
    b, kinds = bytearray(content), ["flip", "flip", "head", "cut", "lose", "double", "noise"]
    kind = rng.choice(
        kinds + ["value"] * (20 if content.startswith(b"{") else 3)
    )  # a JSON would hardly ever stay one
    at, size = rng.randrange(len(b)), rng.choice([1, 4, 16, len(b) // 4 + 1])
    tokens = (
        list(re.finditer(rb'"[^"]*"|-?[0-9.]+|[^\s",:]+', content))
        if kind == "value" and b"\x00" not in content
        else []
    )
    if tokens:
        token = rng.choice(tokens)
        b[token.start() : token.end()] = rng.choice(WEIRD).encode()
    elif kind in ("flip", "head", "value"):
        for _ in range(rng.choice([1, 1, 3, 20])):
            b[rng.randrange(min(len(b), 200) if kind == "head" else len(b))] ^= 1 << rng.randrange(
                8
            )
    elif kind == "cut":
        del b[at:]
    elif kind == "lose":
        del b[at : at + size]
    elif kind == "double":
        b[at:at] = b[at : at + size]
    else:
        b[at : at + size] = rng.randbytes(size)
    return bytes(b)


def fuzz_files(folder):
    """Small files of every kind that a user may bring along: {kind: (paths, action that reads them)}."""
    root, masks = write_coco_folder(folder / "set", images=5, side=32), folder / "masks"
    cfg = dataclasses.replace(TINY, crop=32, labeled_batch=3, dewa_batch=5, dewa_crop=32)
    exif = Image.Exif()
    exif[0x0112] = 6
    formats = {
        1: ("jpg", {"exif": exif}),
        2: ("webp", {}),
        3: ("gif", {}),
        4: ("tif", {"compression": "tiff_lzw"}),
    }

    def change(content):
        for i, (ending, options) in formats.items():
            image = content["images"][i]
            with Image.open(root / "images" / image["file_name"]) as opened:
                opened.save(root / "images" / f"train{i}.{ending}", **options)
            image["file_name"] = f"train{i}.{ending}"

    rewrite(root / "panoptic_train.json", change)
    (root / "splits" / "1_3" / "labeled.txt").write_text(
        "".join(f"images/train{i}.{ending} x\n" for i, (ending, _) in formats.items())
    )
    dewa.generate_masks(
        data.load_folder(root, "5").train,
        SimpleNamespace(
            generate=lambda image: [
                {
                    "segmentation": np.tri(*image.shape[:2], k, dtype=bool),
                    "area": 9,
                    "predicted_iou": 0.9,
                    "stability_score": 0.9,
                    "crop_box": [0, 0, 32, 32],
                    "point_coords": [[1.0, 2.0]],
                }
                for k in (-3, 5)
            ]
        ),
        masks,
    )
    torch.manual_seed(0)
    head = {f"head.decoder.layer{k}.weight": torch.randn(64, 8) for k in range(4)}
    model = SimpleNamespace(trained=lambda: {name: torch.zeros_like(t) for name, t in head.items()})
    state = {
        "step": 3,
        "config": {"stage": "ssl", **dataclasses.asdict(cfg)},
        "student": head,
        "teacher": head,
    }
    checkpoint.save(folder / "run", 3, state)
    torch.save(state, folder / "weights.pt")
    official.write(
        folder / "official.pth",
        official.Weights(
            "student",
            {
                n.replace("head.decoder", "head.decoder.classify.class_embed.layers"): t
                for n, t in head.items()
            },
            {"a": torch.zeros(2)},
            official.criterion("student", 2, 0.1),
        ),
        "official",
    )
    official.write(
        folder / "export.safetensors", official.Weights("student", head, {}, {}), "safetensors"
    )

    def load():
        """As training does, and as --stage validate does, which must list whatever training refuses."""
        faults = []
        try:
            found = validate.check(data.load_folder(root, "1_3", complain=faults.append), faults)
            json.dumps(found), validate.report(found, "set")
            strict = bool(found["problems"])
        except UserError:
            strict = True
        try:
            dataset = data.load_folder(root, "1_3")
            (
                [data.LabeledBatches(dataset, cfg, 2)[step] for step in range(2)],
                [
                    (dataset.val.truth(i).semantic(), dataset.val.image(i))
                    for i in range(len(dataset.val))
                ],
            )
        except UserError as error:
            assert strict, f"validate found nothing, but: {error}"
            raise

    images = data.load_folder(root, "5").train

    def restore(path):
        state = stages.read_run(path)
        stages.take(state, "student", model, str(path)), stages.require_classes(state, 2, path)
        dataclasses.replace(
            cfg,
            **{
                f.name: state["config"][f.name]
                for f in dataclasses.fields(Config)
                if f.name in state.get("config", {})
            },
        )

    def only(path, action):
        return [path], lambda: action(path)

    return {
        "images": (sorted((root / "images").glob("*")), load),
        "panoptic maps": (sorted((root / "panoptic").glob("*")), load),
        "panoptic JSON": (sorted(root.glob("*.json")), load),
        "split lists": (sorted(root.glob("splits/*/*")), load),
        "SAM masks": (
            sorted(masks.glob("*.json")),
            lambda: [dewa.DewaBatches(images, masks, cfg, 2)[step] for step in range(2)],
        ),
        "checkpoints of a run": (
            [folder / "run" / "step_0000003.pt"],
            lambda: restore(folder / "run" / "step_0000003.pt"),
        ),
        "checkpoints without hash": only(folder / "weights.pt", restore),
        "official files": only(
            folder / "official.pth", lambda path: official.read(path) or stages.read_run(path)
        ),
        "safetensors": only(folder / "export.safetensors", restore),
    }


def fuzz(count, seed=0, limit=20):
    """Read `count` mutated files, kind by kind: {kind: Counter(read, refused)}.

    Raises: AssertionError naming the case for any other end than success or one line for the user: another exception, more than `limit`
    seconds, a file that was changed or left behind.
    """
    results = {}

    def too_long(*_):
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, too_long)
    with (
        tempfile.TemporaryDirectory() as name,
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        files = fuzz_files(Path(name))
        for n in range(count):
            kind = list(files)[n % len(files)]
            (paths, action), rng = files[kind], random.Random(f"{seed} {n}")
            path = rng.choice(paths)
            whole = path.read_bytes()
            path.write_bytes(mutate(whole, rng))
            there, case = (
                fingerprint(Path(name)),
                f"fuzz case {n} (seed {seed}): {kind}, {path.name}",
            )
            signal.alarm(limit)
            try:
                action()
                end = "read"
            except UserError as error:
                end = "refused"
                assert "\n" not in str(error) and len(str(error)) < 1500, f"{case}: {error}"
            except BaseException as error:
                raise AssertionError(f"{case}: {type(error).__name__}: {error}") from error
            finally:
                signal.alarm(0)
            assert fingerprint(Path(name)) == there, f"{case}: a file was changed"
            path.write_bytes(whole)
            results.setdefault(kind, Counter())[end] += 1
    signal.signal(signal.SIGALRM, before)
    return results


def test_mutated_files_are_read_or_refused_in_one_line(capsys):
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    results = fuzz(153)
    assert sum(c.total() for c in results.values()) == 153 and all(
        c["refused"] for c in results.values()
    ), results
    assert (
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 500_000
    )  # KB; no header makes us allocate what it states


# ----------------------------------------------------------------------------------------------------- mean_teacher.py


def test_teacher_is_the_average_of_the_student():
    student = tiny_segmenter()
    teacher = student.teacher()
    before = {k: v.clone() for k, v in teacher.trained().items()}
    with torch.no_grad():
        for p in student.head.parameters():
            p.add_(1.0)
    mean_teacher.update_teacher(teacher, student, 0.9)
    for name, p in teacher.trained().items():
        torch.testing.assert_close(p, before[name] + 0.1, rtol=1e-5, atol=1e-6)


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
    before = {k: v.clone() for k, v in teacher.trained().items()}
    optimizer = optim.build_optimizer(student, TINY)
    for group in optimizer.param_groups:
        group["lr"] = 3e38  # the gradient is finite, what it leads to is not
    for p in student.head.parameters():
        p.grad = torch.ones_like(p)
    student.head.decoder.query_feat.weight.data[0, 0] = 3e38
    with pytest.raises(optim.Broken, match="the step made weights infinite or NaN"):
        optim.descend(optimizer, TINY)
    assert all(torch.equal(p, before[k]) for k, p in teacher.trained().items()) and issubclass(
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
    # pixel 0 thing, pixel 1 stuff of the first; pixel 2 void and pixel 3 stuff of the second; the first's second thing is gone
    assert mixed.segment_map.tolist() == [[1, 2, 0, 2]] and mixed.labels.tolist() == [0, 1]
    mixed = mean_teacher.mix_target(
        first, second, (0, 1, 0, 2), things
    )  # left half: things stay apart
    assert mixed.segment_map.tolist() == [[3, 3, 1, 2]] and mixed.labels.tolist() == [1, 0, 0]
    assert first.segment_map.tolist() == [[1, 2, 2, 3]]  # nothing edited in place


def test_cutmix_of_images_and_labels_uses_the_same_box(small_mini):
    dataset = data.load_mini("4")
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
    truth = data.Truth(
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
        truth, classes=lambda: np.array([[0, data.IGNORE, 1], [1, 1, 1]])
    )  # where the data set has class maps
    assert own.by_class().segment_map.tolist() == [
        [1, 0, 2],
        [2, 2, 2],
    ] and own.by_class().labels.tolist() == [0, 1]
    cfg = dataclasses.replace(TINY, burn_in=0, labels="semantic")
    dataset = data.load_mini("4")
    student = stages.build(stages.Job(), cfg, dataset.taxonomy)
    teacher, nothing = student.teacher(), torch.zeros(20, dtype=torch.bool)
    labeled, unlabeled = data.SemiSupervisedBatches(dataset, cfg, 1)[0]
    assert all(len(t.labels.unique()) == len(t) for t in labeled.targets)
    for pseudo in mean_teacher.pseudo_labels(
        teacher, teacher.backbone(unlabeled.weak), nothing, (64, 64), 0.6
    ):
        assert (
            len(pseudo.labels.unique()) == len(pseudo)
            and (pseudo.segment_map > 0).all()
            and pseudo.segment_map.max() == len(pseudo)
        )
    losses = mean_teacher.train_step(
        student, teacher, optim.build_optimizer(student, cfg), labeled, unlabeled, nothing, cfg, 0
    )
    assert math.isfinite(losses["loss"]) and losses["unlabeled/mask"] > 0


@pytest.mark.parametrize("train_backbone", [False, True])
@pytest.mark.parametrize("classifier", ["language", "linear"])
def test_a_semi_supervised_step_moves_student_and_teacher_and_leaves_a_frozen_backbone_alone(
    small_mini, classifier, train_backbone
):
    cfg = dataclasses.replace(TINY, burn_in=0, classifier=classifier, train_backbone=train_backbone)
    dataset = data.load_mini("4")
    student = stages.build(stages.Job(), cfg, dataset.taxonomy)
    teacher = student.teacher()
    backbone = [p.clone() for p in student.backbone.trunk.stem.parameters()]
    head = {k: p.clone() for k, p in student.trained().items()}
    batch = data.SemiSupervisedBatches(dataset, cfg, 1)[0]
    losses = mean_teacher.train_step(
        student,
        teacher,
        optim.build_optimizer(student, cfg),
        *batch,
        torch.tensor(dataset.taxonomy.things),
        cfg,
        0,
    )
    assert math.isfinite(losses["loss"]) and losses["grad_norm"] > 0
    assert losses["loss"] == pytest.approx(sum(v for k, v in losses.items() if "/" in k), rel=1e-5)
    assert sum(not torch.equal(p, head[k]) for k, p in student.trained().items()) > 0.9 * len(
        [k for k in head if k.startswith("head")]
    )
    assert (
        all(torch.equal(a, b) for a, b in zip(backbone, student.backbone.trunk.stem.parameters()))
        != train_backbone
    )
    assert all(
        torch.equal(p, student.trained()[k]) for k, p in teacher.trained().items()
    )  # decay 0 at the first step


def test_fault_17_a_step_with_empty_pseudo_labels_is_finite(small_mini, monkeypatch):
    cfg = dataclasses.replace(TINY, burn_in=0)
    dataset = data.load_mini("4")
    student = stages.build(stages.Job(), cfg, dataset.taxonomy)
    nothing = Target(torch.zeros(0, dtype=torch.int64), torch.zeros(64, 64, dtype=torch.int32))
    monkeypatch.setattr(
        mean_teacher, "pseudo_labels", lambda teacher, features, *a: [nothing] * len(features[0])
    )
    batch = data.SemiSupervisedBatches(dataset, cfg, 1)[0]
    losses = mean_teacher.train_step(
        student,
        student.teacher(),
        optim.build_optimizer(student, cfg),
        *batch,
        torch.tensor(dataset.taxonomy.things),
        cfg,
        0,
    )
    assert (
        losses["unlabeled/mask"] == 0
        and math.isfinite(losses["loss"])
        and losses["pseudo_segments"] == 0
    )


def test_fault_15_bf16_keeps_losses_in_single_precision(small_mini):
    cfg = dataclasses.replace(TINY, burn_in=0)
    dataset = data.load_mini("4")
    batch, things = (
        data.SemiSupervisedBatches(dataset, cfg, 1)[0],
        torch.tensor(dataset.taxonomy.things),
    )

    def loss(precision):
        student = stages.build(stages.Job(), cfg, dataset.taxonomy)
        return mean_teacher.train_step(
            student,
            student.teacher(),
            optim.build_optimizer(student, cfg),
            *batch,
            things,
            cfg,
            0,
            precision=precision,
        )["loss"]

    assert loss(torch.bfloat16) == pytest.approx(loss(torch.float32), rel=0.05)


# ---------------------------------------------------------------------------------------------------- panoptic_eval.py


def pq_of(pred, pred_labels, true, true_labels, num_classes=2, things=None, **more):
    """Result of one image; a map given as a list is one row of pixels."""
    quality = PanopticQuality(num_classes)
    quality.add(np.atleast_2d(pred), pred_labels, np.atleast_2d(true), true_labels, **more)
    return quality.result(np.zeros(num_classes, bool) if things is None else things)


def counts(result, c=0):
    return tuple(result["per_class"][c][key] for key in ("tp", "fp", "fn"))


def test_pq_of_a_perfect_prediction_is_one_whatever_the_order_of_segments():
    true = np.array([[1, 1, 2, 2], [3, 3, 0, 2]])
    pred = np.array([[2, 2, 3, 3], [1, 1, 0, 3]])
    result = pq_of(pred, [1, 0, 0], true, [0, 0, 1], things=np.array([True, False]))
    for group, n in (("all", 2), ("things", 1), ("stuff", 1)):
        assert result[group] == {"pq": 1.0, "sq": 1.0, "rq": 1.0, "n": n}


def test_pq_does_not_punish_pixels_over_void():
    # truth of 10 px; the prediction covers 8 of them and 2 void px: IoU = 8 / (10 + 10 - 8 - 2) = 0.8
    result = pq_of([0, 0] + [1] * 8 + [1, 1], [0], [1] * 10 + [0, 0], [0])
    assert counts(result) == (1, 0, 0) and result["all"]["pq"] == pytest.approx(0.8)


def test_pq_is_sq_times_rq_for_one_match_one_false_positive_and_one_miss():
    # segment 1: 3 of 4 px, IoU 3/4; prediction 2 (2 px) lies on 1 px of segment 1 and 1 px of segment 2 (3 px):
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
    # 5 px: 2 on void, 1 on the crowd of its class, 2 on another segment: 3/5 forgiven; each alone would not do
    result = pq_of([1] * 5, [0], [0, 0, 1, 2, 2], [0, 1], true_crowd=[True, False])
    assert counts(result, 0) == (0, 0, 0) and counts(result, 1) == (0, 0, 1)


def test_pq_crowd_pixels_stay_in_the_union_of_a_match():
    # truth of 4 px found whole, and 2 px of crowd with it: IoU 4 / (6 + 4 - 4) = 2/3; on void it would be 1
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
    # 4 px found whole; stated 5: IoU 4 / (4 + 5 - 4) = 0.8; stated 8: exactly 1/2, no match; stated 2: 4 / 2 = 2, as the API
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
    """An image with void, crowd (several of a class), half-right predictions and JSON areas that are off by up to a third."""
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
    # the void px counts nowhere. class 0: tp 2, fn 1 (said 1): 2/3. class 1: tp 1, fp 1, fn 1 (said 2): 1/3.
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


# ------------------------------------------------------------------------------------------------------- sam_masks.py


def _masks_of_both(picture: np.ndarray, cfg: Config) -> tuple[list[dict], list[dict]]:
    """The mini SAM's masks of a picture by segment_anything's own generator, and by ours."""
    from segment_anything import SamAutomaticMaskGenerator

    import mini_sam

    sam = mini_sam.load()
    theirs = SamAutomaticMaskGenerator(
        sam,
        cfg.points_per_side,
        cfg.points_per_batch,
        cfg.pred_iou_thresh,
        cfg.stability_thresh,
        box_nms_thresh=cfg.mask_nms_thresh,
    )
    return theirs.generate(picture), MaskGenerator(sam, cfg).generate(picture)


@pytest.mark.parametrize(
    "change",
    [
        {},
        dict(points_per_side=5, points_per_batch=7, mask_nms_thresh=0.9),
        dict(pred_iou_thresh=0.6, stability_thresh=0.7),
        dict(pred_iou_thresh=-1.0, stability_thresh=0.0, points_per_side=3),
    ],
)
@pytest.mark.parametrize(
    "size", [(128, 128), (75, 100), (210, 160)]
)  # of the model's square; smaller and wide; larger and high
def test_masks_and_their_records_are_those_of_segment_anything(size, change):
    picture = np.asarray(Image.fromarray(microcosm.scene("val", 3).image).resize(size[::-1]))
    theirs, ours = _masks_of_both(picture, dataclasses.replace(MINI, **change))
    assert len(ours) == len(theirs) > 0
    for one, other in zip(ours, theirs):
        assert (
            set(one) == set(other)
            and np.array_equal(one["segmentation"], other["segmentation"])
            and one["segmentation"].shape == size
        )
        for field in ("area", "bbox", "crop_box", "point_coords", "stability_score"):
            assert one[field] == other[field], field
        assert one["predicted_iou"] == pytest.approx(other["predicted_iou"], abs=1e-5)
    json.dumps([{k: v for k, v in one.items() if k != "segmentation"} for one in ours])


def test_a_sam_with_its_own_vision_transformer_is_asked_alike_in_either_precision():
    from segment_anything import SamAutomaticMaskGenerator
    from segment_anything.modeling import (
        ImageEncoderViT,
        MaskDecoder,
        PromptEncoder,
        Sam,
        TwoWayTransformer,
    )

    torch.manual_seed(0)
    encoder = ImageEncoderViT(
        img_size=64,
        patch_size=16,
        embed_dim=32,
        depth=2,
        num_heads=2,
        out_chans=32,
        use_rel_pos=True,
        window_size=2,
        global_attn_indexes=(1,),
    )
    sam = Sam(
        encoder,
        PromptEncoder(32, (4, 4), (64, 64), 16),
        MaskDecoder(transformer_dim=32, transformer=TwoWayTransformer(2, 32, 2, 64)),
    ).eval()
    cfg = dataclasses.replace(
        OFFICIAL,
        points_per_side=4,
        points_per_batch=6,
        pred_iou_thresh=-9.0,
        stability_thresh=0.0,
        mask_nms_thresh=0.95,
    )
    picture = np.asarray(Image.fromarray(microcosm.scene("val", 3).image).resize((90, 50)))
    theirs = SamAutomaticMaskGenerator(sam, 4, 6, -9.0, 0.0, box_nms_thresh=0.95).generate(picture)
    ours, rounded = (
        MaskGenerator(sam, cfg, precision).generate(picture)
        for precision in (torch.float32, torch.bfloat16)
    )
    assert len(ours) == len(theirs) > 1 and len(rounded) > 1
    same = [
        (one["segmentation"] == other["segmentation"]).mean() for one, other in zip(ours, theirs)
    ]
    assert min(same) > 0.99


def test_a_picture_of_which_every_mask_is_rejected_has_none():
    picture = microcosm.scene("val", 3).image
    assert _masks_of_both(picture, dataclasses.replace(MINI, pred_iou_thresh=9.0)) == ([], [])
    assert _masks_of_both(picture, dataclasses.replace(MINI, stability_thresh=1.1)) == ([], [])


def test_boxes_of_masks_by_hand_and_of_an_empty_one():
    logits = torch.full((3, 4, 5), -0.5)
    logits[0, 1:3, 2:4], logits[1, 3, 0] = 1.0, 2.0
    assert sam_masks.boxes(logits).tolist() == [[2, 1, 3, 2], [0, 3, 0, 3], [0, 0, 0, 0]]


def test_masks_with_an_encoder_in_bf16_are_nearly_those_of_fp32():
    import mini_sam

    sam, found = mini_sam.load(), []
    for i in range(4):
        picture = microcosm.scene("val", i).image
        exact, rounded = (
            [one["segmentation"] for one in MaskGenerator(sam, MINI, precision).generate(picture)]
            for precision in (torch.float32, torch.bfloat16)
        )
        found.extend(mini_sam.iou_matrix(exact, rounded).max(1))
    assert len(found) > 20 and np.mean(np.array(found) > 0.95) > 0.9, np.sort(found)


# ------------------------------------------------------------------------------------------------------------ dewa.py


def test_run_lengths_of_coco_by_hand():
    # columns first: 40 zeros = 0b01_01000 -> low group 8 with "more" (32): chr(48 + 40) = "X", then 1: "1"; 2 ones: "2"
    mask = np.zeros((6, 7), bool)
    mask[4:, 6] = True
    assert dewa.encode_rle(mask) == {"size": [6, 7], "counts": "X12"}
    assert dewa.encode_rle(np.ones((2, 2), bool))["counts"] == "04"  # a mask that starts with ones
    # runs 0 5 1 3 1: the fourth is stored as 3 - 5 = -2 -> 0b11110 = 30 -> chr(78) = "N", the fifth as 1 - 1 = 0
    assert (
        dewa.encode_rle(np.array([1, 1, 1, 1, 1, 0, 1, 1, 1, 0], bool)[:, None])["counts"]
        == "051N0"
    )


def test_run_lengths_come_back_as_the_mask_they_were_made_from():
    rng = np.random.default_rng(0)
    for shape in ((1, 1), (5, 3), (64, 48), (300, 200)):
        for density in (0.0, 0.02, 0.5, 1.0):
            mask = rng.random(shape) < density
            assert np.array_equal(dewa.decode_rle(dewa.encode_rle(mask)), mask)
    pycocotools = pytest.importorskip("pycocotools.mask")
    mask = rng.random((37, 53)) < 0.3
    assert (
        pycocotools.encode(np.asfortranarray(mask.astype(np.uint8)))["counts"].decode()
        == dewa.encode_rle(mask)["counts"]
    )


@pytest.mark.parametrize("counts", ["", "X", "X1", "5", "~~~~"])
def test_damaged_run_lengths_are_refused(counts):
    with pytest.raises(ValueError):
        dewa.decode_rle({"size": [6, 7], "counts": counts})


class FakeSam:
    """Two overlapping masks an image; counts its calls."""

    calls = 0

    def generate(self, image):
        self.calls += 1
        first, second = np.zeros(image.shape[:2], bool), np.zeros(image.shape[:2], bool)
        first[:40], second[20:, :50] = True, True
        return [
            {
                "segmentation": m,
                "area": m.sum(),
                "predicted_iou": 0.9,
                "stability_score": 0.9,
                "crop_box": [0, 0, 128, 128],
                "point_coords": [[1.0, 2.0]],
            }
            for m in (first, second)
        ]


def test_masks_on_disk_have_the_official_keys_and_an_interrupted_call_goes_on(small_mini, tmp_path):
    images, sam = data.load_mini("4").train, FakeSam()
    assert dewa.generate_masks(images, sam, tmp_path) == 12 and sam.calls == 12
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
    assert dewa.generate_masks(images, sam, tmp_path) == 1 and sam.calls == 13
    masks = dewa.read_masks(tmp_path, "train_00003.png", (128, 128))
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
        return data.open_image(self.folder / self.names[i])

    def digest(self, i):
        return hashlib.sha256((self.folder / self.names[i]).read_bytes()).hexdigest()


class Answers(FakeSam):
    """A generator that says what it is, and whose masks say of which image they are: as many
    pixels as the sum of its first row."""

    def __init__(self, points):
        self.about = {"kind": "fake", "points_per_side": points, "weights": "0" * 64}

    def generate(self, image):
        found = super().generate(image)
        found[0]["segmentation"] = (
            np.arange(image[..., 0].size) < int(image[0].sum()) % 1000
        ).reshape(image.shape[:2])
        return found


def test_two_images_of_one_stem_have_masks_of_their_own(tmp_path):
    two_stems(tmp_path / "images")
    images = ImagesOf(tmp_path / "images")
    assert dewa.generate_masks(images, Answers(4), tmp_path / "masks") == 4
    assert sorted(path.name for path in (tmp_path / "masks").glob("*.json")) == [
        "a0.jpg.json",
        "a0.png.json",
        "a1.jpg.json",
        "a1.png.json",
    ]
    for i in range(4):
        masks = dewa.read_masks(tmp_path / "masks", images.name(i), (30, 40), images.digest(i))
        assert masks[..., 0].sum() == int(np.asarray(images.image(i))[0].sum()) % 1000


def test_older_files_of_masks_count_for_the_image_that_they_name_and_no_other(tmp_path, capsys):
    two_stems(tmp_path / "images", 3)
    images, masks = ImagesOf(tmp_path / "images"), tmp_path / "masks"
    dewa.generate_masks(images, Answers(4), masks)
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
    assert dewa.missing_masks(masks, images) == [images.names.index("a1.png")]
    (masks / "a0.png.json").unlink()
    assert dewa.read_masks(masks, "a0.jpg", (30, 40), images.digest(0)).shape == (30, 40, 2)
    with pytest.raises(UserError, match="a0.json: states that it is of 'a0.jpg', not of a0.png"):
        dewa.read_masks(masks, "a0.png", (30, 40))
    capsys.readouterr()
    assert (
        dewa.generate_masks(images, Answers(4), masks) == 2
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
    dewa.generate_masks(first, Answers(4), masks)
    kept = (masks / "0000.png.json").read_bytes()
    with pytest.raises(
        UserError,
        match=(
            "masks: 1 of 1 files .*0000.png.json is of another image of that name than the one "
            "at hand; choose another folder"
        ),
    ):
        dewa.generate_masks(second, Answers(4), masks)
    with pytest.raises(
        UserError,
        match=(
            r"0000.png.json was made with other settings \(points_per_side: 4 there, 8 now\); "
            r"choose another folder"
        ),
    ):
        dewa.generate_masks(first, Answers(8), masks)
    for read in (
        lambda: dewa.read_masks(masks, "0000.png", (30, 40), second.digest(0)),
        lambda: dewa.made_of(masks, second),
    ):
        with pytest.raises(
            UserError, match="masks of another image of that name than the 0000.png at hand"
        ):
            read()
    assert (masks / "0000.png.json").read_bytes() == kept and dewa.generate_masks(
        first, Answers(4), masks
    ) == 0
    shutil.copytree(
        tmp_path / "first", tmp_path / "moved"
    )  # the same data under another path is the same
    assert dewa.generate_masks(ImagesOf(tmp_path / "moved"), Answers(4), masks) == 0
    assert dewa.made_of(masks, first)["generator"] == Answers(4).about


def test_what_masks_are_made_of_counts_every_setting_that_they_depend_on():
    import mini_sam

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
    dataset, cfg = data.load_mini("4"), dataclasses.replace(TINY, scale_min=2.0, scale_max=2.0)
    dewa.generate_masks(dataset.train, FakeSam(), tmp_path)
    emptied = 0
    for step in range(4):
        batch = dewa.DewaBatches(dataset.train, tmp_path, cfg, 4)[step]
        assert all(
            len(t) == 2 and t.masks.shape == (2, 64, 64) and t.labels.eq(0).all()
            for t in batch.targets
        )
        shown = dewa.DewaBatches(
            dataset.train, tmp_path, dataclasses.replace(cfg, dewa_keep_empty=False), 4
        )[step]
        for every, left in zip(batch.targets, shown.targets):
            assert torch.equal(left.masks, every.masks[every.masks.any(2).any(1)]) and len(
                left.labels
            ) == len(left.masks)
            emptied += len(every) - len(left)
    assert emptied > 0
    (tmp_path / "train_00000.png.json").write_text('{"image": {"height": 1')
    with pytest.raises(UserError, match="train_00000.png.json"):
        dewa.read_masks(tmp_path, "train_00000.png", (128, 128))


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
            "segmentation": dewa.encode_rle(mask),
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
    images = data.ImageFolder(tmp_path / "SA1B")
    assert (
        len(images) == 3
        and dewa.read_masks(tmp_path / "SA1B", images.name(1), (70, 90))[..., 0].sum() == 1200
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
    images = data.ImageFolder(folder)
    before = images.fingerprint()
    assert images.digest(1) == data.file_digest(folder / "1.png")
    Image.new("RGB", (40, 32)).save(folder / "0.png")
    assert images.fingerprint() != before


def test_stable_regions_find_discs_and_what_they_lie_on_without_any_label():
    import regions

    yy, xx = np.mgrid[0:64, 0:80]
    truth = [(yy - 20) ** 2 + (xx - 20) ** 2 < 100, (yy - 40) ** 2 + (xx - 58) ** 2 < 200]
    grey = 20 + 100 * truth[0] + 160 * truth[1]
    image = np.repeat(grey[..., None], 3, -1).astype(np.uint8)
    masks = [record["segmentation"] for record in regions.StableRegions().generate(image)]
    iou = lambda a, b: (a & b).sum() / (a | b).sum()
    for wanted in (*truth, ~(truth[0] | truth[1])):
        assert max(iou(mask, wanted) for mask in masks) > 0.85
    assert all(iou(a, b) < 0.9 for k, a in enumerate(masks) for b in masks[:k])
    assert len(regions.StableRegions().generate(np.full((32, 32, 3), 7, np.uint8))) <= 1


# ------------------------------------------------------------------------------------------- checkpoint.py, trainer.py


def test_a_flipped_bit_in_exported_weights_or_kept_embeddings_is_noticed(tmp_path, capsys):
    path = tmp_path / "student.safetensors"
    official.write(
        path, official.Weights("student", {"head.a": torch.ones(100)}, {}, {}), "safetensors"
    )
    assert official.read(path).head["head.a"].eq(1).all()
    make = lambda: torch.ones(100)
    checkpoint.cached(tmp_path / "cache", ["key"], make)
    for file in (path, *(tmp_path / "cache").iterdir()):
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)
    with pytest.raises(UserError, match="student.safetensors: damaged, the SHA-256 of its tensors"):
        official.read(path)
    assert (
        torch.equal(checkpoint.cached(tmp_path / "cache", ["key"], make), make())
        and "damaged; made again" in capsys.readouterr().out
    )


def test_a_file_that_no_run_has_saved_is_refused_in_one_line(tmp_path):
    path, config = tmp_path / "some.pt", dataclasses.asdict(TINY)
    for content, words in (
        ([1, 2], "holds a list"),
        ({"weight": torch.zeros(2)}, "neither a checkpoint of a run"),
        ({"student": {"a": 3}, "config": config}, "neither"),
        (
            {"student": {"a": torch.zeros(2)}, "config": {**config, "hidden": "96"}},
            "its config has hidden = '96', expected int",
        ),
        ({"model": {"sem_seg_head.a": "text"}}, "neither"),
        ({"teacher": {"a": torch.zeros(2)}, "config": config}, "some.pt: holds no student"),
    ):
        torch.save(content, path)
        with pytest.raises(UserError, match=words) as error:
            stages.take(stages.read_run(path), "student", None, str(path))
        assert "\n" not in str(error.value) and str(path) in str(error.value)


def test_fault_09_weights_of_another_configuration_are_refused_and_nothing_is_copied():
    into = {"a": torch.zeros(2), "b": torch.zeros(3)}
    with pytest.raises(UserError, match=r"b: expected \(3,\), found \(4,\)"):
        checkpoint.load_weights(into, {"a": torch.ones(2), "b": torch.ones(4)}, "file.pt")
    assert into["a"].eq(0).all()
    assert "1 of 2 tensors taken; not taken: b" in checkpoint.load_weights(
        into, {"a": torch.ones(2), "b": torch.ones(4)}, "file.pt", ("b",)
    )


def test_official_names_map_one_to_one_onto_our_parameters():
    head = Mask2Former([128, 256, 512, 1024], OFFICIAL, 150, random_vocabulary((1,) * 150, 640))
    ours = {f"head.{name}": list(p.shape) for name, p in head.named_parameters()}
    assert (
        sum(math.prod(shape) for shape in ours.values()) == 20_350_913
    )  # trainable, as officially
    shapes = {official.to_ours(name): shape for name, shape in official_shapes().items()}
    assert {name: shape for name, shape in shapes.items() if name.startswith("head.")} == ours


def test_embeddings_are_made_once_for_a_key_and_again_when_damaged(tmp_path, capsys):
    calls = []
    make = lambda: calls.append(1) or torch.arange(6.0).view(2, 3)
    first, second = (checkpoint.cached(tmp_path, ["model", ["a", "b"]], make) for _ in range(2))
    assert torch.equal(first, second) and len(calls) == 1
    checkpoint.cached(tmp_path, ["model", ["a", "c"]], make)
    assert len(calls) == 2
    for path in tmp_path.glob("*.safetensors"):
        path.write_bytes(path.read_bytes()[:40])
    assert (
        torch.equal(checkpoint.cached(tmp_path, ["model", ["a", "b"]], make), first)
        and len(calls) == 3
    )
    assert "damaged" in capsys.readouterr().out


def official_shapes():
    listed = REAL_DATA.parent / "official_keys.json"
    if not listed.exists():
        pytest.skip(f"{listed} with the official names is not there")
    return json.loads(listed.read_text())["shapes"]


def test_an_official_file_of_real_size_loads_runs_and_goes_back_unchanged(tmp_path):
    torch.manual_seed(0)
    sizes = {
        name: [151] if name.endswith("empty_weight") else shape
        for name, shape in official_shapes().items()
    }  # K + 1
    model = {name: torch.randn(shape) * 0.02 for name, shape in sizes.items()}
    weights = official.recognise({"model": model, "iteration": 79_999})
    assert (
        weights.kind == "student"
        and weights.num_classes == 150
        and (len(weights.head), len(weights.clip)) == (298, 493)
    )
    back = official.official(weights)
    assert back.keys() == model.keys() and all(back[name] is model[name] for name in model)
    segmenter = stages.build(
        stages.Job(), OFFICIAL, data.Taxonomy(("a, b", "c"), (True, False), (1, 2)), weights.clip
    )
    assert "298 of 298 tensors taken" in checkpoint.load_weights(
        segmenter.trained(), weights.head, "file"
    )
    with torch.no_grad():
        class_logits, mask_logits = segmenter.eval()(torch.zeros(1, 3, 64, 64, dtype=torch.uint8))
    assert class_logits.shape == (1, 200, 3) and mask_logits.shape == (1, 200, 16, 16)


def test_official_files_are_evaluated_continued_and_written_back(small_mini, tmp_path, capsys):
    runs = ["--runs", tmp_path]
    assert run("--stage", "ssl", "--method", "dear", *runs, "--steps", 3) == 0
    folder, theirs, ours, again = (
        tmp_path / "mini-dear-4",
        tmp_path / "a.pth",
        tmp_path / "b.safetensors",
        tmp_path / "c.pth",
    )
    flags = ["--dataset", "mini", "--device", "cpu"]
    main = lambda *args: dearli.main([str(a) for a in args] + flags)
    assert main("--stage", "export", "--weights", folder, "--out", theirs) == 0
    assert (
        main("--stage", "export", "--weights", theirs, "--format", "safetensors", "--out", ours)
        == 0
    )
    assert main("--stage", "export", "--weights", ours, "--out", again) == 0
    first, second = (torch.load(p, weights_only=True)["model"] for p in (theirs, again))
    assert first.keys() == second.keys() and all(
        torch.equal(first[n], second[n]) and first[n].dtype == second[n].dtype for n in first
    )
    capsys.readouterr()
    assert (
        main("--stage", "export", "--weights", ours, "--out", again) == 2
        and "exists already" in capsys.readouterr().err
    )
    # the file alone gives the figures of the run: it brings its CLIP along (the run's own was random)
    expected = json.loads((folder / "metrics.json").read_text())
    for file in (theirs, ours):
        assert run("--stage", "eval", "--weights", file, "--out", tmp_path / "eval") == 0
        assert (
            json.loads((tmp_path / "eval" / "metrics.json").read_text())["student/ensemble"]
            == expected["student/ensemble"]
        )
    assert (
        run(
            "--stage",
            "ssl",
            "--init",
            theirs,
            "--out",
            tmp_path / "more",
            "--steps",
            2,
            "--no-eval",
        )
        == 0
    )
    # a backbone that was trained along is exported with its CLIP, and trained on from there
    assert (
        run(
            "--stage",
            "sup",
            "--init",
            theirs,
            "--out",
            tmp_path / "along",
            "--steps",
            2,
            "--train-backbone",
        )
        == 0
    )
    assert (
        main("--stage", "export", "--weights", tmp_path / "along", "--out", tmp_path / "along.pth")
        == 0
    )
    assert (
        run("--stage", "eval", "--weights", tmp_path / "along.pth", "--out", tmp_path / "eval") == 0
    )
    one, other = (
        json.loads((tmp_path / d / "metrics.json").read_text())["student/ensemble"]["all"]
        for d in ("along", "eval")
    )
    assert one == other


def test_official_files_are_told_apart_and_what_does_not_fit_is_refused(
    small_mini, tmp_path, capsys
):
    head = {official.to_official(f"head.{n}"): p for n, p in tiny_head().state_dict().items()}
    for extra, kind, classes in (
        ({}, "teacher", None),
        (official.criterion("dewa", 1, 0.1), "dewa", 1),
        (official.criterion("student", 150, 0.1), "student", 150),
    ):
        weights = official.recognise({"model": {**head, **extra}})
        assert (weights.kind, weights.num_classes) == (kind, classes) and len(weights.head) == len(
            head
        )
    assert official.recognise({"step": 3, "student": {}}) is None
    clip = foundation.load_clip(TINY)[0].state_dict()
    whole = official.Weights("student", weights.head, clip, official.criterion("student", 150, 0.1))
    official.write(tmp_path / "ade.pth", whole, "official")
    wrong = {**clip, "visual.head.proj.weight": torch.zeros(1, 1)}
    official.write(tmp_path / "other.pth", dataclasses.replace(whole, clip=wrong), "official")
    (tmp_path / "cut.safetensors").write_bytes(b"12345678")
    for name, words in (
        ("ade.pth", "trained on 150 classes, the data set has 20"),
        ("other.pth", "another CLIP than --backbone mini"),
        ("cut.safetensors", "damaged"),
        ("none.pth", "no such run or file (--weights)"),
    ):
        capsys.readouterr()
        assert run("--stage", "eval", "--weights", tmp_path / name) == 2, name
        message = capsys.readouterr().err
        assert words in message and message.count("\n") == 1


def log_of(folder):
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k != "time"} for row in rows]


TINY_FLAGS = [
    "--pretrained",
    "random",
    "--hidden",
    "32",
    "--heads",
    "2",
    "--encoder-layers",
    "1",
    "--decoder-layers",
    "2",
    "--encoder-ffn",
    "32",
    "--decoder-ffn",
    "32",
    "--num-queries",
    "8",
    "--num-points",
    "64",
    "--labeled-batch",
    "2",
    "--unlabeled-batch",
    "2",
    "--dewa-batch",
    "2",
    "--crop",
    "64",
    "--test-size",
    "64",
    "--burn-in",
    "0.5",
    "--burn-in-warm",
    "0.25",
    "--split",
    "4",
    "--device",
    "cpu",
    "--report-images",
    "1",
]


def fitting(args, flags=TINY_FLAGS):
    """args, and of the pairs in flags those that their stage reads."""
    args = [str(a) for a in args]
    asked = command_line.parser().parse_args([a for a in args if a != "--resume"])
    if asked.stage == "ssl":
        asked.method = asked.method or command_line.usual_method(asked)
    flags = [*map(str, flags)]
    known = {
        flag.dest for flag in command_line.FLAGS if asked.stage in flag.stages
    } | command_line.READS[asked.stage]
    known -= command_line.idle(asked, command_line.configure(asked)).keys()
    pairs = [
        (flag, value)
        for flag, value in zip(flags[::2], flags[1::2])
        if flag[2:].replace("-", "_") in known and flag not in args
    ]
    return args + [word for pair in pairs for word in pair]


def run(*args):
    return dearli.main(fitting(args))


def run_folder(stage, root, *flags):
    """A stage on a folder in COCO panoptic format, beside it; --split is not given unless it is
    among the flags.
    """
    split = TINY_FLAGS.index("--split")
    usual = TINY_FLAGS[:split] + TINY_FLAGS[split + 2 :]
    arguments = [
        "--stage",
        *stage.split(),
        "--dataset",
        "custom",
        "--data-root",
        root,
        "--runs",
        root.parent,
        *flags,
    ]
    return dearli.main(fitting(arguments, usual))


# ------------------------------------------------------- the state of a run: what it must survive, each by the fault itself


def fork(main, output):
    """main() in a process of its own, which has everything loaded; what it says goes to a file. Its return value is the exit code."""

    def target():
        torch.set_num_threads(1)  # no OpenMP after a fork
        os.setpgrp()  # so that a test can signal it with its loader processes
        signal.signal(
            signal.SIGINT, signal.default_int_handler
        )  # a shell's background jobs ignore it, and so do theirs
        with open(output, "w", buffering=1) as sys.stdout:
            sys.stderr = sys.stdout
            os.dup2(sys.stdout.fileno(), 2)
            sys.exit(main())

    process = multiprocessing.get_context("fork").Process(target=target)
    process.start()
    return process


def ended(process, seconds=60):
    """The exit code of a forked process, none of whose own processes is left."""
    process.join(seconds)
    assert process.exitcode is not None, "it hangs"
    for _ in range(100):
        try:
            os.killpg(process.pid, 0)
        except ProcessLookupError:
            return process.exitcode
        time.sleep(0.1)
    pytest.fail("a loader process is left")


def wait_for(condition, seconds=30):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "in vain"
        time.sleep(0.0005)


def same(a, b):
    """Two states of a run, all tensors bit for bit; the time is what it is."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(
            same(a[k], b[k]) for k in a if k not in ("time", "workers")
        )
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if torch.is_tensor(a) else a == b


SSL = ["--stage", "ssl", "--method", "dear", "--no-eval"]


def test_fault_01_08_a_kill_while_saving_leaves_a_whole_checkpoint_and_strays_are_removed(tmp_path):
    def save_for_ever():
        checkpoint.claim(tmp_path)
        for step in range(1, 10**6):
            checkpoint.save(
                tmp_path,
                step,
                {
                    "step": step,
                    "student": torch.full((10**6,), float(step)),
                    "teacher": torch.full((10**6,), float(step)),
                },
            )

    torn = 0
    for kill in range(6):
        process = fork(save_for_ever, tmp_path / "said.txt")
        try:
            wait_for(
                lambda: (
                    checkpoint.steps(tmp_path)
                    and any(p.suffix == ".tmp" for p in tmp_path.iterdir())
                )
            )
        finally:
            process.kill()
        assert ended(process) == -signal.SIGKILL
        torn += any(p.suffix == ".tmp" for p in tmp_path.iterdir())
        state = checkpoint.newest(tmp_path)
        assert (
            state["student"].eq(state["step"]).all() and state["teacher"].eq(state["step"]).all()
        )  # of one step, both
        assert len(checkpoint.steps(tmp_path)) <= checkpoint.KEEP + 1
    assert torn > 0, "no kill was in the middle of a write"
    checkpoint.claim(tmp_path)
    checkpoint.release(tmp_path)
    assert not [p for p in tmp_path.iterdir() if p.suffix == ".tmp"]


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_fault_02_a_signal_finishes_the_step_saves_and_says_so_also_with_loader_processes(
    number, code, small_mini, tmp_path, monkeypatch
):
    train_step = mean_teacher.train_step

    def step(*args, **kwargs):
        if args[7] == 2:
            os.killpg(os.getpgrp(), number)  # as a terminal and a scheduler do: to all of the group
            time.sleep(0.5)
        return train_step(*args, **kwargs)

    monkeypatch.setattr(stages, "train_step", step)
    process = fork(
        lambda: run(*SSL, "--steps", 9, "--workers", 2, "--out", tmp_path / "run"),
        tmp_path / "said.txt",
    )
    assert ended(process) == code
    said = (tmp_path / "said.txt").read_text()
    assert (
        f"stopped at step 3 of 9 by {signal.Signals(number).name}; go on with --resume" in said
        and "Traceback" not in said
    )
    assert checkpoint.newest(tmp_path / "run")["step"] == len(log_of(tmp_path / "run")) == 3
    assert not (tmp_path / "run" / "lock").read_text()


def test_fault_03_a_full_disk_is_named_and_leaves_checkpoint_and_log_whole(
    small_mini, tmp_path, monkeypatch
):
    import resource

    folder, train_step = tmp_path / "run", mean_teacher.train_step
    for full, limit, words in (
        (3, 100_000, "step_0000004.pt: cannot be written (File too large)"),
        (2, 50, "log.jsonl: cannot be written (File too large)"),
    ):

        def step(*args, **kwargs):
            if args[7] == full:
                log = (folder / "log.jsonl").stat().st_size
                resource.setrlimit(resource.RLIMIT_FSIZE, (log + limit, resource.RLIM_INFINITY))
            return train_step(*args, **kwargs)

        monkeypatch.setattr(stages, "train_step", step)
        process = fork(
            lambda: run(*SSL, "--steps", 6, "--checkpoint-every", 2, "--out", folder),
            tmp_path / "said.txt",
        )
        assert ended(process) == 2
        said = (tmp_path / "said.txt").read_text()
        assert f"error: {folder}/{words}" in said and "Traceback" not in said
        assert checkpoint.newest(folder)["step"] == 2 and not [
            p for p in folder.iterdir() if p.suffix == ".tmp"
        ]
        text = (folder / "log.jsonl").read_text()
        assert text.endswith("}\n") and [row["step"] for row in log_of(folder)] == list(
            range(4 if full == 3 else 2)
        )
        shutil.rmtree(folder)


@pytest.mark.parametrize(
    "args",
    [["sup"], ["ssl", "--method", "dear"], ["zeroshot", "--masks", "gt"], ["ladder"], ["masks"]],
)
def test_fault_04_an_output_folder_that_cannot_be_written_is_refused_before_any_model_is_built(
    args, small_mini, tmp_path, monkeypatch, capsys
):
    (tmp_path / "file").touch()
    for name in ("load_sam", "load_clip"):
        monkeypatch.setattr(foundation, name, lambda *a: pytest.fail("a model was built"))
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        assert run("--stage", *args, "--out", out) == 2
        message = capsys.readouterr().err
        assert f"{out}: cannot be written" in message and message.count("\n") == 1


def test_fault_05_06_a_damaged_checkpoint_is_said_and_the_one_before_it_is_used(tmp_path, capsys):
    for step in (1, 2, 3):
        checkpoint.save(tmp_path, step, {"step": step, "x": torch.arange(1000)})
    assert [p.name for p in checkpoint.steps(tmp_path)] == ["step_0000002.pt", "step_0000003.pt"]
    path = tmp_path / "step_0000003.pt"
    whole = path.read_bytes()
    assert (
        torch.load(path, weights_only=True)["x"].sum() == 499500
    )  # a plain torch file all the same
    for place in (
        *range(0, len(whole) - 75, 97),
        *range(len(whole) - 64, len(whole)),
    ):  # one flipped bit, wherever it is
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        assert (
            checkpoint.newest(tmp_path)["step"] == 2
            and f"{path}: damaged" in capsys.readouterr().out
        )
    for size in (0, 1, 100, *range(len(whole) - 95, len(whole))):  # cut short, also within the sum
        path.write_bytes(whole[:size])
        assert (
            checkpoint.newest(tmp_path)["step"] == 2
            and f"warning: {path}: " in capsys.readouterr().out
        )
    checkpoint.save(
        tmp_path, 2, {"step": 2}
    )  # going on from 2: the damaged one goes, not the good one
    checkpoint.save(tmp_path, 1, {"step": 1})
    assert [p.name for p in checkpoint.steps(tmp_path)] == ["step_0000001.pt"]
    (tmp_path / "step_0000001.pt").write_bytes(b"")
    with pytest.raises(
        UserError, match="none of its 1 checkpoints can be read; choose another folder"
    ):
        checkpoint.newest(tmp_path)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("stage", ["dewa", "sup", "ssl"])
def test_fault_07_a_run_that_is_stopped_at_every_step_equals_one_that_is_not_bit_for_bit(
    stage, workers, small_mini, tmp_path, monkeypatch
):
    if stage == "dewa":
        dewa.generate_masks(data.load_mini("4").train, FakeSam(), tmp_path / "masks")
    module, name, place = (dewa, "dewa_step", 4) if stage == "dewa" else (stages, "train_step", 7)
    step_fn, stop_at = getattr(module, name), []

    def step(*args, **kwargs):
        if args[place] in stop_at:
            os.kill(os.getpid(), signal.SIGTERM)
        return {
            **step_fn(*args, **kwargs),
            "drawn": torch.rand(()).item(),
        }  # as drop path of a trained backbone draws

    monkeypatch.setattr(module, name, step)
    args = [
        "--stage",
        stage,
        *(["--method", "dear"] if stage == "ssl" else []),
        "--no-eval",
        "--masks",
        tmp_path / "masks",
        "--steps",
        4,
        "--workers",
        workers,
    ]
    assert run(*args, "--out", tmp_path / "straight") == 0
    stop_at += [0, 1, 2]
    for step in range(4):
        assert run(*args, "--out", tmp_path / "stopped", "--resume") == (143 if step < 3 else 0)
        assert checkpoint.newest(tmp_path / "stopped")["step"] == step + 1
    assert same(checkpoint.newest(tmp_path / "straight"), checkpoint.newest(tmp_path / "stopped"))
    assert log_of(tmp_path / "straight") == log_of(tmp_path / "stopped")
    times = [
        json.loads(line)["time"]
        for line in (tmp_path / "stopped" / "log.jsonl").read_text().splitlines()
    ]
    assert times == sorted(times) and times[0] > 0  # of all sessions together


def test_fault_07_killed_again_and_again_a_run_ends_as_one_that_was_not(small_mini, tmp_path):
    assert soak(3, tmp_path, seed=0)["kills"] == 3


def test_fault_09_another_configuration_is_refused_with_its_keys_and_more_steps_are_said(
    small_mini, tmp_path, capsys
):
    out = ["--out", tmp_path / "run"]
    assert run(*SSL, *out, "--steps", 2) == 0
    assert (
        run(*SSL, *out, "--steps", 2) == 2
        and "holds a run already; go on with --resume" in capsys.readouterr().err
    )
    config, state = (
        (tmp_path / "run" / "config.json").read_bytes(),
        checkpoint.newest(tmp_path / "run"),
    )
    other = ["--split", "5", "--method", "ssl", "--lr", "0.5", "--num-queries", "7"]
    assert dearli.main([*fitting([*SSL, *out, "--resume"]), *other]) == 2
    message = capsys.readouterr().err
    for words in (
        "stage: dear there, ssl now",
        "split: 4 there, 5 now",
        "lr: 0.0006 there, 0.5 now",
        "num_queries: 8 there, 7 now",
    ):
        assert words in message
    assert (tmp_path / "run" / "config.json").read_bytes() == config and same(
        checkpoint.newest(tmp_path / "run"), state
    )
    assert (
        run(*SSL, *out, "--steps", 2, "--resume") == 0
        and "finished at step 2, nothing to do" in capsys.readouterr().out
    )
    (tmp_path / "run" / "metrics.json").touch()  # of the first two steps
    assert run(*SSL, *out, "--steps", 3, "--resume") == 0
    assert (
        "2 steps were taken on the schedule of 2, the rest follows that of 3"
        in capsys.readouterr().out
    )
    assert [row["step"] for row in log_of(tmp_path / "run")] == [0, 1, 2] and not (
        tmp_path / "run" / "metrics.json"
    ).exists()
    torch.save({"model": {}}, tmp_path / "run" / "step_0000009.pt")
    assert (
        run(*SSL, *out, "--steps", 3, "--resume") == 2
        and "is not a checkpoint of a run" in capsys.readouterr().err
    )


def test_fault_10_what_was_taken_from_dewa_is_said_and_kept(small_mini, tmp_path, capsys):
    dewa.generate_masks(data.load_mini("4").train, FakeSam(), tmp_path / "mini-masks")
    runs = ["--runs", tmp_path, "--classifier", "linear"]
    assert run("--stage", "dewa", *runs, "--steps", 1) == 0
    assert run("--stage", "ssl", "--method", "dearli", "--no-eval", *runs, "--steps", 1) == 0
    init = json.loads((tmp_path / "mini-dearli-4" / "config.json").read_text())["init"]
    kept = init["taken"]
    assert init["source"] == str(tmp_path / "mini-dewa") and init["sha256"] == identity.of_tensors(
        checkpoint.newest(tmp_path / "mini-dewa")["student"]
    )
    assert kept in capsys.readouterr().out and kept.startswith(f"{tmp_path / 'mini-dewa'}: ")
    assert (
        "tensors taken; not taken: " in kept
        and "classify.weight: expected (21, 32), found (2, 32)" in kept
    )


def back_to(folder, step):
    """Drop the checkpoints after a step, as if a run had been stopped there."""
    for path in checkpoint.steps(folder):
        if path.stem > f"step_{step:07d}":
            path.unlink()


def test_fault_45_what_a_run_began_with_is_taken_from_it_on_resume_and_nothing_else_is(
    small_mini, tmp_path, capsys
):
    for name, seed in (("start", 0), ("other", 1)):
        assert (
            run(
                "--stage",
                "sup",
                "--no-eval",
                "--steps",
                1,
                "--seed",
                seed,
                "--out",
                tmp_path / name,
            )
            == 0
        )
    ssl = [*SSL, "--steps", 4, "--checkpoint-every", 2, "--out", tmp_path / "run"]
    assert run(*ssl, "--init", tmp_path / "start") == 0
    ended, config = (
        checkpoint.newest(tmp_path / "run"),
        (tmp_path / "run" / "config.json").read_bytes(),
    )
    # burn-in is of 1 step for a run that starts from weights, of 2 for one that does not: without
    # them step 2 would be another
    assert len(log_of(tmp_path / "run")) == 4 and "unlabeled/mask" in log_of(tmp_path / "run")[1]
    shutil.rmtree(tmp_path / "start")  # its weights are in the checkpoint
    for flags in ([], ["--init", tmp_path / "moved"]):
        back_to(tmp_path / "run", 2)
        if flags:  # the same weights under another path
            assert (
                run("--stage", "sup", "--no-eval", "--steps", 1, "--out", tmp_path / "moved") == 0
            )
        assert run(*ssl, "--resume", *flags) == 0
        assert (
            same(checkpoint.newest(tmp_path / "run"), ended)
            and (tmp_path / "run" / "config.json").read_bytes() == config
        )
    capsys.readouterr()
    assert run(*ssl, "--resume", "--init", tmp_path / "other") == 2
    assert "run: began with other weights than those of" in capsys.readouterr().err
    assert (
        run(
            "--stage",
            "sup",
            "--no-eval",
            "--seed",
            1,
            "--out",
            tmp_path / "other",
            "--resume",
            "--init",
            tmp_path / "moved",
        )
        == 2
    )
    assert "other: began without --init, and cannot be resumed with" in capsys.readouterr().err


def test_a_run_of_an_older_version_goes_on_and_what_it_does_not_store_is_said(
    small_mini, tmp_path, capsys
):
    assert run(*SSL, "--steps", 4, "--checkpoint-every", 2, "--out", tmp_path / "run") == 0
    ended = checkpoint.newest(tmp_path / "run")
    back_to(tmp_path / "run", 2)
    state = checkpoint.newest(tmp_path / "run")
    for key in ("data", "truth", "init", "foundation"):
        del state["config"][key]
    checkpoint.save(tmp_path / "run", 2, state)
    capsys.readouterr()
    assert (
        run(*SSL, "--steps", 4, "--checkpoint-every", 2, "--out", tmp_path / "run", "--resume") == 0
    )
    assert (
        "an older run that does not store what it was made of (data, truth, init): not compared"
        in capsys.readouterr().out
    )
    assert same(checkpoint.newest(tmp_path / "run"), ended)


def test_fault_49_the_same_data_elsewhere_is_the_same_and_other_data_in_its_place_is_not(
    tmp_path, capsys
):
    root = write_coco_folder(tmp_path / "set")
    flags = TINY_FLAGS[: TINY_FLAGS.index("--split")] + [
        "--split",
        "2",
        "--device",
        "cpu",
        "--workers",
        "0",
        "--watch",
        "0",
    ]
    usual = ["--stage", "sup", "--dataset", "custom", "--steps", 1, "--no-eval"]
    sup = lambda *args: dearli.main(fitting([*usual, "--out", tmp_path / "run", *args], flags))
    assert sup("--data-root", root) == 0
    moved = root.rename(tmp_path / "moved")
    assert (
        sup("--data-root", moved, "--resume") == 0
        and "finished at step 1, nothing to do" in capsys.readouterr().out
    )
    dataset = data.load_folder(moved, "2")
    name = dataset.train.name(dataset.labeled[0])
    kept = (moved / "images" / name).read_bytes()
    (moved / "images" / name).write_bytes(
        (moved / "images" / dataset.train.name(dataset.labeled[1])).read_bytes()
    )
    assert (
        sup("--data-root", moved, "--resume") == 2
        and "data: other training images than it began with" in capsys.readouterr().err
    )
    (moved / "images" / name).write_bytes(kept)
    content = json.loads((moved / "panoptic_train.json").read_text())
    segment = next(a for a in content["annotations"] if a["file_name"] == name)["segments_info"][0]
    segment["category_id"] = next(
        c["id"] for c in content["categories"] if c["id"] != segment["category_id"]
    )
    (moved / "panoptic_train.json").write_text(json.dumps(content))
    assert (
        sup("--data-root", moved, "--resume") == 2
        and "truth: other ground truth" in capsys.readouterr().err
    )


def test_fault_43_a_warm_up_goes_on_with_its_masks_wherever_they_are_and_with_no_others(
    small_mini, tmp_path, capsys
):
    images = data.load_mini("4").train
    for points in (4, 8):
        dewa.generate_masks(images, Answers(points), tmp_path / f"masks{points}")
    warm = ["--stage", "dewa", "--steps", 1, "--out", tmp_path / "dewa", "--masks"]
    assert run(*warm, tmp_path / "masks4") == 0
    stored = checkpoint.newest(tmp_path / "dewa")["config"]
    assert (
        stored["masks"]["generator"] == Answers(4).about and stored["data"] == images.fingerprint()
    )
    (tmp_path / "masks4").rename(tmp_path / "moved")
    capsys.readouterr()
    assert (
        run(*warm, tmp_path / "moved", "--resume") == 0
        and "nothing to do" in capsys.readouterr().out
    )
    assert run(*warm, tmp_path / "masks8", "--resume") == 2
    assert (
        "masks: points_per_side: 4 there, 8 now (it began with those of" in capsys.readouterr().err
    )
    # looked up by name, it is taken only if it is of these images
    shutil.copytree(tmp_path / "dewa", tmp_path / "runs" / "mini-dewa")
    state = checkpoint.newest(tmp_path / "dewa")
    state["config"]["data"] = "0" * 64
    checkpoint.save(tmp_path / "runs" / "mini-dewa", 1, state)
    ssl = ["--stage", "ssl", "--no-eval", "--steps", 1, "--runs", tmp_path / "runs"]
    assert run(*ssl) == 2
    message = capsys.readouterr().err
    assert (
        "mini-dewa: a DeWa run of something else (other training images" in message
        and message.count("\n") == 1
    )
    assert run(*ssl, "--init", tmp_path / "runs" / "mini-dewa") == 0  # somebody's word
    assert (
        "was warmed up on other images than the training images of this run"
        in capsys.readouterr().out
    )


def test_fault_11_a_checkpoint_that_would_execute_code_is_refused(small_mini, tmp_path, capsys):
    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'owned'}",)

    evil = tmp_path / "run" / "step_0000001.pt"
    checkpoint.save(evil.parent, 1, {"step": Evil(), "config": {}})  # with a sum that fits, too
    with pytest.raises(UserError, match="read safely"):
        checkpoint.load(evil)
    for args in (
        ["ssl", "--method", "dear", "--out", evil.parent, "--resume"],
        ["ssl", "--init", evil],
        ["sup", "--pretrained", evil],
    ):
        assert (
            dearli.main(
                [*fitting(["--stage", args[0], "--runs", tmp_path / "runs"]), *map(str, args[1:])]
            )
            == 2
        )
        assert "step_0000001.pt: not a checkpoint that can be read safely" in "".join(
            capsys.readouterr()
        )
    assert (
        dearli.main(["--stage", "eval", "--weights", str(evil)]) == 2
        and not (tmp_path / "owned").exists()
    )


def test_fault_12_14_steps_that_are_not_finite_are_skipped_and_five_in_a_row_stop_the_run(
    small_mini, tmp_path, monkeypatch, capsys
):
    def spoil_gradient(student):
        return student.head.decoder.query_feat.weight.register_hook(lambda grad: grad * math.inf)

    def spoil_outputs(student):  # reaches the matching
        return student.head.register_forward_hook(
            lambda module, given, out: ([(c * math.nan, e) for c, e in out[0]], out[1])
        )

    spoilt = {1: spoil_gradient, 3: spoil_outputs}

    def step(student, teacher, optimizer, *args, **kwargs):
        handle = spoilt[args[4]](student) if args[4] in spoilt else None
        before = [p.clone() for m in (student, teacher) for p in m.trained().values()]
        try:
            return mean_teacher.train_step(student, teacher, optimizer, *args, **kwargs)
        finally:
            if handle:
                handle.remove()
                assert all(
                    map(
                        torch.equal,
                        before,
                        [p for m in (student, teacher) for p in m.trained().values()],
                    )
                )
                assert all(
                    torch.isfinite(v).all() for s in optimizer.state.values() for v in s.values()
                )

    monkeypatch.setattr(stages, "train_step", step)
    assert run(*SSL, "--steps", 5, "--burn-in", 2, "--out", tmp_path / "run") == 0
    rows, said = log_of(tmp_path / "run"), capsys.readouterr().out
    assert [row["step"] for row in rows if "skipped" in row] == [
        1,
        3,
    ] and "2 steps were skipped" in said
    assert (
        "norm of the gradient is" in rows[1]["skipped"]
        and "loss is not finite: labeled/class nan" in rows[3]["skipped"]
    )
    assert (
        len(rows[1]["images"]) == 2
        and len(rows[3]["images"]) == 4
        and "step 3: loss is not finite" in said
        and rows[3]["images"][0] in said
    )
    assert all(math.isfinite(row["loss"]) for row in rows if "skipped" not in row)
    assert (
        run(*SSL, "--steps", 20, "--burn-in", 2, "--lambda-u", "1e39", "--out", tmp_path / "stop")
        == 2
    )
    message, rows = capsys.readouterr().err, log_of(tmp_path / "stop")
    assert (
        "stopped after 5 steps in a row that were not finite; last: step 5: loss is" in message
        and all(name in message for name in rows[-1]["images"])
    )
    assert len(rows) == 6  # step 0 is burn-in, step 1 is spoilt as before


def test_fault_13_weights_that_are_not_finite_are_never_saved(
    small_mini, tmp_path, monkeypatch, capsys
):
    def step(student, teacher, optimizer, *args, **kwargs):
        if args[4] == 3:
            student.head.decoder.query_feat.weight.data[0, 0] = math.nan
        losses = mean_teacher.train_step(student, teacher, optimizer, *args, **kwargs)
        assert all(torch.isfinite(p).all() for p in teacher.trained().values())
        return losses

    monkeypatch.setattr(stages, "train_step", step)
    assert run(*SSL, "--steps", 6, "--checkpoint-every", 2, "--out", tmp_path / "run") == 2
    assert (
        "weights are not finite at step 4 (student: head.decoder.query_feat.weight"
        in capsys.readouterr().err
    )
    assert checkpoint.newest(tmp_path / "run")["step"] == 2


@pytest.mark.parametrize("stage", [["sup"], ["ssl", "--method", "dear"], ["dewa"]])
def test_fault_13_a_run_whose_step_spoils_a_weight_stops_at_once_and_keeps_its_checkpoint(
    stage, small_mini, tmp_path, monkeypatch, capsys
):
    if stage == ["dewa"]:
        dewa.generate_masks(data.load_mini("4").train, FakeSam(), tmp_path / "masks")
    step, taken = torch.optim.AdamW.step, []

    def spoiling(self, *args, **kwargs):
        step(self, *args, **kwargs)
        taken.append(len(taken))
        if len(taken) == 4:
            self.param_groups[0]["params"][0].data.view(-1)[0] = math.nan

    monkeypatch.setattr(torch.optim.AdamW, "step", spoiling)
    masks = ["--masks", tmp_path / "masks"] if stage == ["dewa"] else []
    assert (
        run(
            "--stage",
            *stage,
            *masks,
            "--steps",
            8,
            "--checkpoint-every",
            2,
            "--watch",
            0,
            "--out",
            tmp_path / "run",
        )
        == 2
    )
    message = capsys.readouterr().err.splitlines()[-1]
    assert (
        "weights are not finite at step 4 (student: " in message
        and "images: " in message
        and "begin again with a lower --lr" in message
    )
    assert len(taken) == 4 and [row["step"] for row in log_of(tmp_path / "run")] == [0, 1, 2]
    state = checkpoint.newest(tmp_path / "run")
    assert state["step"] == 2 and all(
        torch.isfinite(p).all()
        for name in ("student", "teacher")
        for p in state.get(name, {}).values()
    )


def test_fault_16_a_second_run_in_a_folder_is_refused_and_a_stale_lock_is_not(
    small_mini, tmp_path, capsys
):
    folder = tmp_path / "run"

    def hold():
        checkpoint.claim(folder)
        time.sleep(60)

    first = fork(hold, tmp_path / "said.txt")
    wait_for(lambda: (folder / "lock").exists() and (folder / "lock").read_text())
    assert run(*SSL, "--steps", 1, "--out", folder) == 2
    message = capsys.readouterr().err
    assert (
        f"{folder}: process {first.pid} on " in message
        and "is writing there" in message
        and message.count("\n") == 1
    )
    first.kill()
    assert (
        ended(first) == -signal.SIGKILL and str(first.pid) in (folder / "lock").read_text()
    )  # stale
    (folder / "lock").write_text("process 1 on here")  # a number that another process has by now
    assert run(*SSL, "--steps", 1, "--out", folder) == 0


def test_fault_27_a_loader_process_that_is_killed_stops_the_run_in_one_line(
    small_mini, tmp_path, monkeypatch
):
    read = data.LabeledBatches.__getitem__

    def killed(self, step):
        if step == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return read(self, step)

    monkeypatch.setattr(data.LabeledBatches, "__getitem__", killed)
    out = [
        "--stage",
        "sup",
        "--no-eval",
        "--steps",
        9,
        "--workers",
        2,
        "--checkpoint-every",
        1,
        "--out",
        tmp_path / "run",
    ]
    process = fork(
        lambda: run(*out) + len(multiprocessing.active_children()), tmp_path / "said.txt"
    )
    assert ended(process) == 2
    last = (tmp_path / "said.txt").read_text().splitlines()[-1]
    assert last.startswith(
        f"error: {tmp_path / 'run'}: a loader process died (DataLoader worker (pid"
    ) and last.endswith("go on with --resume")
    monkeypatch.setattr(data.LabeledBatches, "__getitem__", read)
    assert run(*out, "--resume") == 0 and [row["step"] for row in log_of(tmp_path / "run")] == list(
        range(9)
    )


def test_a_run_says_everything_once_and_not_every_step(small_mini, tmp_path):
    process = fork(
        lambda: run(*SSL, "--steps", 8, "--workers", 2, "--out", tmp_path / "run"),
        tmp_path / "said.txt",
    )
    assert ended(process) == 0
    lines = [
        line
        for line in (tmp_path / "said.txt").read_text().replace("\r", "\n").splitlines()
        if line.strip() and "step/s" not in line and "s/step" not in line
    ]
    assert len(lines) == len(set(lines)), lines


def test_fault_35_masks_that_were_cut_short_are_made_again_and_strays_removed(small_mini, tmp_path):
    images = data.load_mini("4").train

    class Killed(FakeSam):
        def generate(self, image):
            if self.calls == 5:
                os.kill(os.getpid(), signal.SIGKILL)
            return super().generate(image)

    process = fork(lambda: dewa.generate_masks(images, Killed(), tmp_path), tmp_path / "said.txt")
    assert ended(process) == -signal.SIGKILL and len(list(tmp_path.glob("*.json"))) == 5
    (tmp_path / ".train_00005.png.json.1234.tmp").write_text("{")
    half = tmp_path / "train_00002.png.json"
    content = half.read_text()
    for cut in (
        0,
        1,
        len(content) // 2,
        content.index("]]}") + 3,
        len(content) - 1,
    ):  # also where an annotation ends
        half.write_text(content[:cut])
        assert (
            dewa.generate_masks(images, FakeSam(), tmp_path) == (8 if cut == 0 else 1)
            and half.read_text() == content
        )
    assert dewa.generate_masks(images, FakeSam(), tmp_path) == 0 and not list(
        tmp_path.glob(".*.tmp")
    )


def test_fault_40_help_and_the_miniature_world_need_no_optional_library_and_a_missing_one_is_named(
    tmp_path,
):
    code = f"""if True:
        import sys
        class Missing:
            names = {{"pycocotools", "panopticapi", "detectron2", "cv2", "matplotlib", "pytest", "open_clip", "timm", "segment_anything"}}
            def find_spec(self, name, path=None, target=None):
                if name.split(".")[0] in self.names:
                    raise ModuleNotFoundError(f"No module named {{name}}", name=name)
        sys.meta_path.insert(0, Missing())
        import data, dearli
        data.MINI_TRAIN, data.MINI_VAL = 6, 2
        masks, sup = {[fitting(["--stage", stage, "--runs", tmp_path]) for stage in ("masks", "sup")]!r}
        try:
            dearli.main(["--help"])
        except SystemExit as end:
            assert end.code == 0
        assert dearli.main(masks) == 2
        assert dearli.main(sup) == 2
        Missing.names -= {{"open_clip", "timm"}}
        assert dearli.main([*sup, "--steps", "1"]) == 0
        Missing.names -= {{"segment_anything"}}
        assert dearli.main([*masks, "--points-per-side", "2"]) == 0
    """
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parent
    )
    assert done.returncode == 0, done.stderr
    for name, package in (
        ("segment_anything", "segment-anything>=1.0"),
        ("open_clip", "open_clip_torch>=2.30"),
    ):
        assert (
            f"error: {name} is not installed" in done.stderr
            and f"python -m pip install '{package}'" in done.stderr
        )


def test_fault_41_a_download_that_is_cut_short_leaves_nothing_and_is_resumed_by_running_again(
    tmp_path,
):
    content = b"weights" * 10_000

    class Cut(http.server.BaseHTTPRequestHandler):
        sent = len(content) // 2

        def do_GET(self):
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content[: Cut.sent])

        def log_message(self, *args):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Cut) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        fetch = lambda: foundation.fetch(
            tmp_path / "cache" / "w.pth",
            f"http://127.0.0.1:{server.server_port}/w.pth",
            hashlib.sha256(content).hexdigest(),
            "or else",
        )
        with pytest.raises(UserError, match="w.pth: cannot be fetched") as error:
            fetch()
        assert "\n" not in str(error.value) and not list((tmp_path / "cache").iterdir())
        Cut.sent = len(content)
        assert fetch().read_bytes() == content
        server.shutdown()


def test_fault_42_a_log_whose_last_line_was_cut_is_read_without_it(small_mini, tmp_path):
    assert run(*SSL, "--steps", 3, "--out", tmp_path / "run") == 0
    log = tmp_path / "run" / "log.jsonl"
    whole = log.read_bytes()
    for cut in range(whole.rindex(b"{"), len(whole) - 2):
        log.write_bytes(whole[:cut])
        assert [row["step"] for row in trainer.read_log(log)] == [0, 1]
    assert trainer.read_log(tmp_path / "none") == []
    log.write_bytes(whole + whole[:30])
    assert run(*SSL, "--steps", 4, "--out", tmp_path / "run", "--resume") == 0 and [
        row["step"] for row in log_of(tmp_path / "run")
    ] == [0, 1, 2, 3]


def soak(kills, folder, seed=None):
    """A semi-supervised run that is killed (SIGKILL) so many times, half of them at the sight of a half-written file, and resumed each time, must end
    as one that was left alone: weights, optimiser, log and metrics, bit for bit. Returns what happened; loader processes: 0, 1 or 2, by turns."""
    rng, straight, killed = random.Random(seed), Path(folder) / "straight", Path(folder) / "killed"
    args = [
        "--stage",
        "ssl",
        "--method",
        "dear",
        "--steps",
        8 * kills,
        "--checkpoint-every",
        1,
        "--resume",
    ]
    assert ended(fork(lambda: run(*args, "--out", straight), f"{straight}.txt"), 600 + kills) == 0
    strays = lambda: killed.is_dir() and any(p.suffix == ".tmp" for p in killed.iterdir())
    lines = lambda: (
        len(log.read_bytes().splitlines()) if (log := killed / "log.jsonl").exists() else 0
    )
    happened = {"kills": 0, "in a write": 0, "seconds": time.monotonic()}
    for k in range(kills):
        process = fork(lambda: run(*args, "--out", killed, "--workers", k % 3), f"{killed}.txt")
        until, pause = lines() + rng.randrange(6), rng.uniform(0, 0.3)
        wait_for(lambda: not process.is_alive() or lines() >= until)
        if k % 2:
            time.sleep(pause)
        else:
            wait_for(lambda: not process.is_alive() or strays())
        assert process.is_alive(), (killed.with_suffix(".txt")).read_text()
        process.kill()
        assert ended(process) == -signal.SIGKILL
        happened["kills"] += 1
        happened["in a write"] += strays()
    assert ended(fork(lambda: run(*args, "--out", killed), f"{killed}.txt"), 600 + kills) == 0
    assert same(checkpoint.newest(straight), checkpoint.newest(killed)) and log_of(
        straight
    ) == log_of(killed)
    assert [row["step"] for row in log_of(killed)] == list(range(8 * kills))
    assert (straight / "metrics.json").read_bytes() == (
        killed / "metrics.json"
    ).read_bytes() and not strays()
    return {
        **happened,
        "steps": 8 * kills,
        "seconds": round(time.monotonic() - happened["seconds"], 1),
    }


# ------------------------------------------------------------------------------------------------------------ ranks.py


def ranks_run(number, output, *args):
    """The exit codes of so many processes that share a stage, joined as torchrun would join them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def one(rank):
        os.environ |= {
            "WORLD_SIZE": str(number),
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        try:
            return run(*args)
        finally:
            ranks.stop()

    return [
        ended(p)
        for p in [
            fork(lambda rank=rank: one(rank), f"{output}{rank}.txt") for rank in range(number)
        ]
    ]


def test_the_shares_of_ranks_are_all_there_is():
    for n, of in ((8, 2), (7, 3), (3, 3)):
        shares = [ranks.share(n, k, of) for k in range(of)]
        assert [i for share in shares for i in share] == list(range(n)) and {
            len(s) for s in shares
        } <= {n // of, -(-n // of)}


def test_fault_38_39_several_processes_label_train_and_evaluate_as_one(small_mini, tmp_path):
    assert run("--stage", "masks", "--sam", "regions", "--out", tmp_path / "masks") == 0
    assert (
        ranks_run(
            3,
            tmp_path / "masks-of",
            "--stage",
            "masks",
            "--sam",
            "regions",
            "--out",
            tmp_path / "masks-3",
        )
        == [0] * 3
    )
    assert [p.read_bytes() for p in sorted((tmp_path / "masks").glob("*.json"))] == [
        p.read_bytes() for p in sorted((tmp_path / "masks-3").glob("*.json"))
    ]
    for stage in (["dewa", "--masks", tmp_path / "masks"], ["sup"], ["ssl", "--method", "dear"]):
        one, two, flags = (
            tmp_path / f"{stage[0]}-1",
            tmp_path / f"{stage[0]}-2",
            ["--stage", *stage, "--steps", 6, "--checkpoint-every", 3, "--no-eval"],
        )
        assert run(*flags, "--out", one) == 0
        assert ranks_run(2, tmp_path / "said", *flags, "--out", two) == [0, 0], (
            tmp_path / "said1.txt"
        ).read_text()
        a, b = log_of(one), log_of(two)
        assert [row["step"] for row in b] == list(range(6)) and len(checkpoint.steps(two)) == 2
        for x, y in zip(a, b):  # rounding: sums in another order, and what grows out of it
            assert (
                x.keys() == y.keys()
                and x["loss"] == pytest.approx(y["loss"], rel=1e-3)
                and x["lr"] == y["lr"]
            )
    assert ranks_run(2, tmp_path / "said", *flags, "--steps", 8, "--out", two, "--resume") == [0, 0]
    assert [row["step"] for row in log_of(two)] == list(range(8))
    figures = []
    for number in (1, 3):  # 3 do not divide the images
        ranks_run(
            number,
            tmp_path / "said",
            "--stage",
            "eval",
            "--weights",
            two,
            "--out",
            tmp_path / f"eval{number}",
        )
        figures.append(json.loads((tmp_path / f"eval{number}" / "metrics.json").read_text()))
    assert len(data.load_mini("4").val) % 3 and figures[0] == figures[1]
    assert (
        ranks_run(3, tmp_path / "said", *flags, "--out", tmp_path / "none") == [2] * 3
        and "3 processes cannot share a batch of 2" in (tmp_path / "said0.txt").read_text()
    )
    assert (
        ranks_run(2, tmp_path / "said", "--stage", "demo") == [2, 2]
        and "torchrun serves masks, dewa, sup, ssl, eval" in (tmp_path / "said0.txt").read_text()
    )


def test_several_processes_make_a_warm_up_and_start_from_it_when_it_is_written(
    small_mini, tmp_path, monkeypatch
):
    save = checkpoint.save

    def late(*args):  # rank 0 alone writes, and the other is done with its steps by then
        time.sleep(2)
        return save(*args)

    monkeypatch.setattr(checkpoint, "save", late)
    args = ["--stage", "ssl", "--method", "dearli", "--runs", tmp_path, "--steps", 2]
    args += ["--dewa-steps", 2, "--points-per-side", 2, "--no-eval"]
    assert ranks_run(2, tmp_path / "said", *args) == [0, 0], (tmp_path / "said1.txt").read_text()
    begun = checkpoint.newest(tmp_path / "mini-dearli-4")["config"]["init"]
    warm = checkpoint.newest(tmp_path / "mini-dewa")["student"]
    assert begun["sha256"] == identity.of_tensors(warm)


def test_fault_37_a_dead_rank_ends_the_whole_job(tmp_path):
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node=2",
        "--master_port=0",
        "--rdzv_backend=c10d",
        "--rdzv_endpoint=127.0.0.1:0",
        dearli.__file__,
        *fitting([*SSL, "--steps", "100000", "--out", tmp_path / "run"]),
    ]
    with open(tmp_path / "said.txt", "w") as said:
        job = subprocess.Popen(
            command, stdout=said, stderr=said, env={**os.environ, "OMP_NUM_THREADS": "1"}
        )
    try:
        log = tmp_path / "run" / "log.jsonl"
        wait_for(lambda: job.poll() is not None or log.exists() and log.stat().st_size, 120)
        assert job.poll() is None, (tmp_path / "said.txt").read_text()
        children = Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split()
        os.kill(int(children[1]), signal.SIGKILL)
        assert job.wait(60) != 0
        assert (
            checkpoint.newest(tmp_path / "run") is None
            or checkpoint.newest(tmp_path / "run")["step"] > 0
        )
    finally:
        job.kill()


# -------------------------------------------------------------------------------------------- colours.py, report.py, predict.py


def square(image_side=64):
    """A grey image, and a map with two things of class 0 side by side, stuff of class 1 below, void at the right."""
    segment_map = np.zeros((image_side, image_side), np.int32)
    half, void = image_side // 2, 3 * image_side // 4
    (
        segment_map[:half, : half - 8],
        segment_map[:half, half - 8 : void],
        segment_map[half:, :void],
    ) = 1, 2, 3
    return (
        Image.new("RGB", (image_side, image_side), (128, 128, 128)),
        segment_map,
        np.array([0, 0, 1]),
    )


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
    assert [report.figure(metrics, keys) for _, keys in report.COLUMNS] == [
        1.0,
        1.0,
        None,
        1.0,
        1.0,
        None,
    ]
    assert report.table([("a run", metrics)]).splitlines()[1].split() == [
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
        report.figure({**metrics, "miou_classes": 1}, ("miou",)) == 0.0
        and report.figure({}, ("things", "pq")) is None
    )
    del metrics["miou_classes"]  # as older versions stored it
    assert report.figure(metrics, ("miou",)) == 0.0


def test_instances_of_a_class_differ_in_an_overlay_and_look_the_same_in_every_image(tmp_path):
    image, segment_map, labels = square()
    taxonomy = data.Taxonomy(("cat", "grass"), (True, False), (1, 2))
    drawn = np.asarray(report.overlay(image, segment_map, labels, taxonomy, names=False)).astype(
        int
    )  # ten times as large
    assert drawn.shape == (640, 640, 3)
    first, second, stuff, void = drawn[150, 50], drawn[150, 350], drawn[500, 100], drawn[300, 600]
    mixed = lambda colour: np.round(128 * (1 - report.PAINT) + report.PAINT * np.array(colour))
    assert (
        np.abs(first - mixed(taxonomy.colours[0])).max() <= 1
        and np.abs(stuff - mixed(taxonomy.colours[1])).max() <= 1
    )
    assert np.abs(first - second).max() > 20 and len(set(void)) == 1 and void[0] < 60
    assert drawn[150, 240].min() > 240 and drawn[150, 235:246].min() < 80, (
        "no white border with dark sides"
    )
    other = np.asarray(
        report.overlay(image, segment_map[::-1].copy(), labels, taxonomy, names=False)
    ).astype(int)
    assert (other[490, 50] == first).all() and (other[490, 350] == second).all()
    own = dataclasses.replace(taxonomy, palette=((1, 2, 3), (4, 5, 6)))
    assert own.colours == [(1, 2, 3), (4, 5, 6)]
    root = write_coco_folder(tmp_path / "set", images=1)
    assert data.load_folder(root, "1").taxonomy.palette is None
    rewrite(
        root / "panoptic_train.json",
        lambda content: (
            [c.update(color=[k, 7, 9]) for k, c in enumerate(content["categories"])] and None
        ),
    )
    assert data.load_folder(root, "1").taxonomy.colours[3] == (3, 7, 9)


def test_names_are_written_on_segments_that_have_room_and_inside_the_image():
    image, segment_map, labels = square()
    taxonomy = data.Taxonomy(("cat, feline", "grass"), (True, False), (1, 2))
    written = lambda **flags: (
        np.asarray(report.overlay(image, segment_map, labels, taxonomy, **flags))
        != np.asarray(report.overlay(image, segment_map, labels, taxonomy, names=False))
    ).any(-1)
    plain, scored = written(), written(scores=[0.5, 0.75, 1.0])
    for part in (np.s_[:320, :240], np.s_[:320, 240:480], np.s_[320:, :480]):
        assert plain[part].sum() > 100 and scored[part].sum() > plain[part].sum()
    assert not plain[:, 480:].any()  # nothing on void
    long = dataclasses.replace(taxonomy, names=("cat" * 99, "grass"))
    assert (
        np.asarray(report.overlay(image, segment_map, labels, long))[:300]
        == np.asarray(report.overlay(image, segment_map, labels, taxonomy, names=False))[:300]
    ).all()
    # a name that would hang over too far is not written, nor one whose place another name has taken
    width = ImageFont.load_default(640 // report.PIXELS_A_FONT_SIZE).getlength("m" * 12) + 4

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
                report.overlay(
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
            assert max(report.overlay(image, segment_map, labels, taxonomy).size) == (
                640 if size == (1, 1) else 2560
            )
    with pytest.raises(ValueError, match="segment_map: expected"):
        report.overlay(image, segment_map[1:], labels, taxonomy)


def test_names_that_no_font_writes_are_category_ids_and_are_said_once(monkeypatch, capsys):
    if report.font_of("cat") is None or report.FONTS is None:
        pytest.skip("no scalable font")
    monkeypatch.setattr(
        report, "FONTS", ()
    )  # a system without fonts: only Pillow's own, of Latin letters
    for function in (report.font_of, report.written):
        function.cache_clear()
    image, segment_map, labels = square()
    taxonomy = data.Taxonomy(("\u732b", "grass"), (True, False), (17, 2))
    draw = lambda name: np.asarray(
        report.overlay(
            image, segment_map, labels, dataclasses.replace(taxonomy, names=(name, "grass"))
        )
    )
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
        assert report.font_of(text) is None
    assert report.font_of("traffic light (2)") == "" and report.written(
        ("a b", "\u732b"), (1, 2)
    ) == ("a b", "#2")
    # scripts that must be shaped are in no font without what shapes them
    monkeypatch.setattr(report, "FONTS", ("DejaVuSans.ttf",))
    monkeypatch.setattr(report.features, "check", lambda name: False)
    report.font_of.cache_clear()
    assert report.font_of("\u0642\u0637\u0629") is None
    for function in (report.font_of, report.written):
        function.cache_clear()


def test_names_are_written_by_a_font_of_the_system_that_has_their_letters(monkeypatch, capsys):
    if report._font("DejaVuSans.ttf", 20) is None:
        pytest.skip("no DejaVu Sans here")
    monkeypatch.setattr(report, "FONTS", ("no such font.ttf", "DejaVuSans.ttf"))
    for function in (report.font_of, report.written):
        function.cache_clear()
    name = "\u0441\u043e\u0431\u0430\u043a\u0430"  # dog, in Cyrillic
    assert report.font_of(name) == "DejaVuSans.ttf" and report.written((name,), (3,)) == (name,)
    image, segment_map, labels = square()
    pictures = [
        np.asarray(
            report.overlay(
                image, segment_map, labels, data.Taxonomy((text, "grass"), (True, False), (3, 2))
            )
        )
        for text in (name, name[::-1], "#3")
    ]
    assert (
        not any(np.array_equal(a, b) for a, b in itertools.combinations(pictures, 2))
        and capsys.readouterr().out == ""
    )
    for function in (report.font_of, report.written):
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
    whole = semantic_inference(posterior, logits, sizes, m2f.resize_masks(logits, *sizes).sigmoid())
    for values in (1, 4 * output[1] * 7, 10**9):  # one row, seven rows, all rows at once
        monkeypatch.setattr(m2f, "CPU_CHUNK", values)
        assert torch.equal(semantic_inference(posterior, logits, sizes), whole)


def test_large_images_are_evaluated_in_parts_with_the_figures_of_the_whole(small_mini, monkeypatch):
    # 100 queries: 1.6 GB at 2000 x 2000, for every model
    large = evaluation.shared_masks(
        torch.zeros(100, 128, 128), ((512, 512), (512, 512), (2000, 2000))
    )
    assert large is None
    assert evaluation.shared_masks(
        torch.zeros(5, 16, 16), ((64, 64), (64, 48), (30, 20))
    ).shape == (5, 30, 20)
    cfg = dataclasses.replace(TINY, object_mask_threshold=0.0, overlap_threshold=0.0)
    dataset = data.load_mini("4", "val")
    student = stages.build(stages.Job(), cfg, dataset.taxonomy)
    models = {"student": student, "teacher": student.teacher()}
    whole = evaluate(models, dataset, cfg, torch.device("cpu"), title="")

    def made_whole(*args):
        raise AssertionError("masks of all queries at once")

    monkeypatch.setattr(evaluation, "SHARED_MASKS", 0)
    monkeypatch.setattr(evaluation, "resize_masks", made_whole)
    monkeypatch.setattr(m2f, "CPU_CHUNK", 2 * 128 * 128)  # two of six queries at a time
    assert evaluate(models, dataset, cfg, torch.device("cpu"), title="") == whole
    assert any(
        reading["confusion"] != whole["student/decoder"]["confusion"] for reading in whole.values()
    )


@pytest.fixture(scope="session")
def small_run(tmp_path_factory):
    """A run of the miniature world, hardly trained: its folder, and one with three of its pictures."""
    folder = tmp_path_factory.mktemp("small")
    with pytest.MonkeyPatch.context() as patch:
        for name, count in (("MINI_TRAIN", 12), ("MINI_VAL", 4)):
            patch.setattr(data, name, count)
        assert (
            run(
                "--stage",
                "ssl",
                "--method",
                "dear",
                "--steps",
                4,
                "--burn-in",
                3,
                "--no-eval",
                "--out",
                folder / "run",
                "--overlap-threshold",
                0.1,
                "--eval-batch",
                1,
            )
            == 0
        )
    (folder / "pictures" / "more").mkdir(parents=True)
    for i, name in enumerate(("a.png", "b.png", "more/c.png")):
        Image.fromarray(microcosm.scene("val", i).image).save(folder / "pictures" / name)
    return folder


def predict_stage(folder, *flags, weights=None):
    return dearli.main(
        [
            str(a)
            for a in [
                "--stage",
                "predict",
                "--weights",
                weights or folder / "run",
                "--device",
                "cpu",
                *flags,
            ]
        ]
    )


def truth_of(folder, names, root):
    """A data set of mini ground truth for these pictures."""
    (root / "maps").mkdir(parents=True)
    taxonomy, content = data.mini_taxonomy(), {"images": [], "annotations": []}
    content["categories"] = [
        {"id": i, "name": n, "isthing": int(t)}
        for i, n, t in zip(taxonomy.ids, taxonomy.names, taxonomy.things)
    ]
    for i, name in enumerate(names):
        s = microcosm.scene("val", i)
        datasets.encode(s.segment_map).save(root / "maps" / f"{i}.png")
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
    return data.PanopticFolder(
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
    content, taxonomy = json.loads((out / "panoptic.json").read_text()), data.mini_taxonomy()
    assert data.read_taxonomy(out / "panoptic.json") == dataclasses.replace(
        taxonomy, palette=tuple(taxonomy.colours)
    )
    predicted = data.PanopticFolder(
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
                and segment["bbox"] == datasets.box(p.segment_map == k)
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
    model = stages.build(stages.Job(), cfg, taxonomy)
    stages.take(state, which, model, "run")
    metrics = evaluate(
        {"m": model}, data.DataSet("t", taxonomy, truth, truth, [], []), cfg, torch.device("cpu")
    )[f"m/{posterior}"]
    of = ["decoder", "ensemble"].index(posterior)
    for i, (name, segments) in enumerate(zip(names, seen["pq"][of::2])):
        assert np.array_equal(segments[0], predicted.truth(i).segment_map) and np.array_equal(
            segments[1], predicted.truth(i).labels
        )
        classes = np.asarray(Image.open(out / "semantic" / f"{name}.png"))
        assert classes.dtype == np.uint8 and np.array_equal(
            classes.astype(int) - 1, seen["miou"][of::2][i]
        )
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
        {str(p.relative_to(out / kind)) for p in (out / kind).rglob("*.*")}
        == {f"{name}.png" for name in names}
        for kind in predict.KINDS
    )
    assert (out / "panoptic" / "a.jpg.png").read_bytes() != (
        out / "panoptic" / "a.png.png"
    ).read_bytes()
    assert (
        len(predict.Pictures(pictures, out, resume=True).names) == 8
    )  # what was predicted is not taken for a picture
    checkpoint.release(out)
    # a second call changes nothing, and is refused before there is a model
    monkeypatch.setattr(stages, "build", lambda *a: pytest.fail("a model was built"))
    for kept in ("panoptic.jsonl", "panoptic.json", "panoptic/a.jpg.png", "overlay/b.png.png"):
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
            else [out / kept]
        ):
            path.unlink()
        (out / "overlay/b.png.png").touch()
    monkeypatch.undo()
    assert predict_stage(small_run, "--input", pictures / "b.png", "--out", out, "--force") == 0
    assert [image["id"] for image in json.loads((out / "panoptic.json").read_text())["images"]] == [
        "b.png"
    ] and Image.open(out / "overlay/b.png.png").size == (640, 640)


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
        and "1 pictures that show next to nothing" in dark[1]
        and "--white 65535: 'a.png'" in dark[1]
    )
    assert (
        "1 pictures of 16 bits that lose what is brighter, by the run's --white 255"
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
    write = predict.write_atomic

    def slow(path, content):
        write(path, content)
        time.sleep(0.2)

    def killed(*flags):
        predict.write_atomic = slow  # in the forked process only
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
    relative = lambda folder: {
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
    ids = {name: data.segment_ids(out / "panoptic" / f"{name}.png") for name in sizes}
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
    state = checkpoint.load(path)
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
    differs = lambda stored: trainer.differing(
        stored, {"stage": "sup", "taxonomy": {"names": ["b"]}}
    )
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
    numbers = {name: config[name] for name in command_line.READS["predict"]}
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
    readme = (Path(__file__).parent / "README.md").read_text()
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


# ------------------------------------------------------------------------------------------------------ html_report.py

EVIL = """<script>alert(1)</script>&"'"""


@pytest.fixture(scope="session")
def reported(tmp_path_factory):
    """Folder of a run with masks, on a data set one of whose classes, one image and the folder of the run are named to break a page."""
    root = write_coco_folder(tmp_path_factory.mktemp("reported") / "set")
    name = "<img src=x onerror=alert(1)>&\"'.png"
    for part in ("train", "val"):
        path = root / f"panoptic_{part}.json"
        content = json.loads(path.read_text())
        content["categories"][-1]["name"], content["images"][0]["file_name"] = EVIL, f"{part}{name}"
        (root / "images" / f"{part}0.png").rename(root / "images" / f"{part}{name}")
        path.write_text(json.dumps(content))
    flags = [*TINY_FLAGS[: TINY_FLAGS.index("--split")], "--split", "3", "--device", "cpu"]
    own = ["--dataset", "custom", "--preset", "mini", "--data-root", root, "--runs", root.parent]
    main = lambda *args: dearli.main(fitting([*own, *args], flags))
    folder = root.parent / "a<b>&\"' run"
    assert main("--stage", "masks", "--sam", "regions") == 0
    assert (
        main("--stage", "ssl", "--method", "dear", "--steps", 5, "--lr", "0.0003", "--out", folder)
        == 0
    )
    written = (folder / "report.html").read_bytes()
    assert (
        dearli.main(
            [
                "--stage",
                "report",
                "--out",
                str(folder),
                "--runs",
                str(root.parent),
                "--device",
                "cpu",
            ]
        )
        == 0
    )  # a run knows its data and its numbers
    assert (folder / "report.html").read_bytes() == written
    metrics, rng = (
        json.loads((folder / "metrics.json").read_text()),
        random.Random(0),
    )  # after 5 steps most figures are 0
    tables = [
        t
        for reading in metrics.values()
        if isinstance(reading, dict)
        for t in (
            reading,
            *(reading[g] for g in ("all", "things", "stuff")),
            *reading["per_class"].values(),
        )
    ]
    for figures in tables:
        figures |= {
            k: rng.randint(1, 999) if isinstance(v, int) else rng.random()
            for k, v in figures.items()
            if isinstance(v, (int, float))
        }
    (folder / "metrics.json").write_text(json.dumps(metrics))
    assert (
        dearli.main(
            [
                "--stage",
                "report",
                "--weights",
                str(folder),
                "--runs",
                str(root.parent),
                "--device",
                "cpu",
            ]
        )
        == 0
    )
    return folder


class Outline(html.parser.HTMLParser):
    """Fails on a page whose elements are not closed in order; collects addresses, cells by table, and text."""

    def __init__(self, page):
        super().__init__()
        self.open, self.addresses, self.cells, self.text, self.table = [], [], {}, "", None
        self.feed(page)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.addresses += [
            v
            for k, v in attributes.items()
            if k in ("src", "href", "action", "srcset", "data", "poster")
        ]
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


def page_of(folder, runs=None, **kwargs):
    return (
        html_report.write(
            folder,
            runs or [html_report.read(folder)],
            kwargs.pop("dataset", None),
            kwargs.pop("cards", {}),
            **kwargs,
        )
        .read_bytes()
        .decode()
    )


def numbers_in_svg(page):
    svgs = "".join(re.findall("<svg.*?</svg>", page, re.S))
    return [
        float(v)
        for v in re.findall(r'\b(?:x|y|x1|x2|y1|y2|cx|cy)="([^"]*)"', svgs)
        + re.split("[ML ]+", " ".join(re.findall(r'\bd="M([^"]*)"', svgs)))
        if v
    ]


def test_fault_36_a_report_is_one_sound_file_whose_numbers_are_those_of_the_run_and_whose_names_are_text(
    reported,
):
    page, metrics = (
        (reported / "report.html").read_bytes().decode(),
        json.loads((reported / "metrics.json").read_text()),
    )
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
    assert (
        run(
            "--stage",
            "dewa",
            "--images",
            reported.parent / "set" / "images",
            "--masks",
            reported.parent / "set-masks",
            "--steps",
            1,
            "--out",
            tmp_path / "dewa",
        )
        == 0
    )
    assert (
        run(
            "--stage",
            "ssl",
            "--method",
            "dearli",
            "--init",
            tmp_path / "dewa",
            "--steps",
            1,
            "--burn-in-warm",
            0,
            "--lambda-u",
            0.5,
            "--no-eval",
            "--seed",
            3,
            "--out",
            tmp_path / "warm",
        )
        == 0
    )
    assert (
        run(
            "--stage",
            "ssl",
            "--method",
            "ssl",
            "--preset",
            "custom",
            "--classifier",
            "language",
            "--alpha",
            "0.4:0.8",
            "--steps",
            1,
            "--no-eval",
            "--out",
            tmp_path / "custom",
        )
        == 0
    )
    for folder, number in ((reported, 1), (tmp_path / "warm", 3), (tmp_path / "custom", 1)):
        made = html_report.commands(html_report.read(folder))
        assert len(made) == number
        args = stages.parser().parse_args(shlex.split(made[-1])[2:] + ["--device", "cpu"])
        job, cfg = stages.resolve(args)
        stored = json.loads((folder / "config.json").read_text())
        assert {k: stored[k] for k in dataclasses.asdict(cfg)} == dataclasses.asdict(
            dataclasses.replace(cfg, white=data.WHITE).settled()
        ) and job.out == folder
        assert stages.identity(job, job.method, data.mini_taxonomy()) | {"taxonomy": 0} == {
            k: stored[k] for k in ("stage", "dataset", "data_root", "variant", "split")
        } | {"taxonomy": 0}


def test_runs_without_figures_log_or_weights_still_have_a_page(
    reported, small_mini, tmp_path, capsys
):
    folder, log = tmp_path / "run", (reported / "log.jsonl").read_text().splitlines(keepends=True)
    folder.mkdir()
    shutil.copy(reported / "config.json", folder)
    assert "no metrics.json" in page_of(folder) and "no log.jsonl" in page_of(folder)
    for content, words in (
        ("".join(log[:1]), "1 step;"),
        ("".join(log)[:-30], "4 steps"),
        (log[0].replace('"loss": ', '"loss": NaN, "was": '), "1 step;"),
        (
            "".join(log[:2])
            + json.dumps(
                {"step": 2, "lr": 1e-4, "time": 9.0, "skipped": "loss is nan", "images": [EVIL]}
            )
            + "\n",
            "1 step skipped",
        ),
        ('{"step": 0}\n', "no log.jsonl with a finished step"),
        (
            '{"step": 0, "lr": 1e-4, "loss": 1e308, "time": 1}\n{"step": 1, "loss": -1e308, "time": 2}\n',
            "2 steps",
        ),
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
    assert (
        dearli.main(
            [
                "--stage",
                "report",
                "--weights",
                str(folder),
                "--compare",
                str(reported),
                str(other),
                "--device",
                "cpu",
            ]
        )
        == 0
    )
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
    assert (
        dearli.main(["--stage", "report", "--weights", str(folder), "--device", "cpu"]) == 2
        and "metrics.json: not a readable JSON file" in capsys.readouterr().err
    )
    assert (
        run(
            "--stage",
            "dewa",
            "--masks",
            reported.parent / "set-masks",
            "--images",
            reported.parent / "set" / "images",
            "--steps",
            1,
            "--out",
            tmp_path / "dewa",
        )
        == 0
    )
    assert (
        dearli.main(["--stage", "report", "--weights", str(tmp_path / "dewa"), "--device", "cpu"])
        == 0
        and "the warm-up knows no class" in (tmp_path / "dewa" / "report.html").read_text()
    )


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
    names, rng = [f"class {k}" for k in range(150)], np.random.default_rng(0)
    per_class = {
        name: {
            "pq": 0.5,
            "sq": 0.5,
            "rq": 1.0,
            "iou": 1.0,
            "tp": 2,
            "fp": 0,
            "fn": 0,
            "semantic_iou": 0.5,
        }
        for name in names
    }
    group = {"pq": 0.5, "sq": 0.5, "rq": 1.0, "n": 150}
    confusion = [
        " ".join(map(str, row)) for row in (rng.random((150, 150)) ** 8 * 1000).astype(int).tolist()
    ]
    metrics = {
        "images": 1,
        "student/decoder": {
            "all": group,
            "things": group,
            "stuff": group,
            "per_class": per_class,
            "miou": 0.5,
            "confusion": confusion,
        },
    }
    (tmp_path / "metrics.json").write_text(json.dumps(metrics))
    cards = {
        "worst of 9": [
            html_report.Card(f"{k}.png", "PQ 0.0", [("image", rng.bytes(30_000))]) for k in range(9)
        ]
    }
    whole = page_of(tmp_path, cards=cards)
    assert (
        whole.count("<img ") == 9
        and "28 of 150 classes" in whole
        and whole.count('<g class="') <= 28 * 28
    )
    monkeypatch.setattr(html_report, "MAX_BYTES", 300_000)
    small = page_of(tmp_path, cards=cards)
    assert (
        0 < small.count("<img ") < 9
        and len(small.encode()) <= 300_000
        and "0.png" in small
        and "8.png" not in small
    )


class Browser:
    """A headless Chromium, asked over a pipe (DevTools protocol): browser("Page.navigate", url=...)."""

    def __init__(self, program, folder):
        there, self.to = os.pipe()
        self.back, here = os.pipe()
        command = f'exec "$0" --headless=new --no-sandbox --disable-gpu --disable-dev-shm-usage --remote-debugging-pipe --user-data-dir="$1" about:blank 3<&{there} 4>&{here}'
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
                "[...document.images].every(i => i.complete && i.naturalWidth > 100) && document.images.length"
            )
            == 2 * 5 + 3 * 3 + 3 * 2
        )
        assert browser.ask("document.scripts.length") == 1 and any(
            EVIL in name for name in browser.ask(names)
        )
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


# ------------------------------------------------------------------------------------------- command_line.py, rehearsal.py, watch.py


def test_help_is_one_screen_and_the_pages_of_the_stages_have_every_flag_and_every_number(capsys):
    assert dearli.main(["--help"]) == 0
    screen = capsys.readouterr().out.splitlines()
    assert len(screen) <= 40 and max(map(len, screen)) <= 110
    assert [
        line.split()[1 if line[2] != " " else 0] for line in screen[4 : 4 + len(command_line.ALL)]
    ] == [*command_line.ALL]
    shown = Counter()
    for stage in command_line.ALL:
        if stage != "demo":
            assert dearli.main(["--stage", stage, "--help"]) == 0
            page = capsys.readouterr().out
            assert max(map(len, page.splitlines())) <= command_line.WIDTH
            flags = set(re.findall(r"^  (--[\w-]+)", page, re.M))
            assert {
                f"--{flag.name}" for flag in command_line.FLAGS if stage in flag.stages
            } <= flags
            shown.update(flags)
    assert {f"--{f.name.replace('_', '-')}" for f in dataclasses.fields(Config)} <= shown.keys()
    fields = [
        name
        for section in command_line.numbers().values()
        for name, text in section
        if text.strip()
    ]
    assert fields == [f.name for f in dataclasses.fields(Config)]
    assert dearli.main(["--stage", "ssl", "--dataset", "coco", "--help"]) == 0 and re.search(
        r"--crop .*\[512\]", capsys.readouterr().out
    )  # defaults of the preset


def test_stages_on_the_command_line_are_those_that_there_are():
    assert sorted(command_line.ALL) == sorted(stages.STAGES) and command_line.SOURCES == tuple(
        annotations.READERS
    )
    assert command_line.MASK_FORMS == tuple(annotations.FORMS)
    assert command_line.PRECISIONS == tuple(stages.PRECISIONS)


@pytest.mark.parametrize(
    "flag, words",
    [
        (
            "--batch-size",
            "it is --labeled-batch and --unlabeled-batch, --dewa-batch in the warm-up, --eval-batch at evaluation",
        ),
        ("--batch_size=8", "it is --labeled-batch"),
        ("--epochs", "--steps N"),
        ("--max-iters", "--steps N"),
        ("--lr-rate", "it is --lr"),
        ("--gpu", "--device cuda"),
        ("--gpus", "torchrun --nproc_per_node=N"),
        ("--num-workers", "it is --workers"),
        ("--num_workers", "it is --workers"),
        ("--ema", "--ema-decay"),
        ("--resume-from", "it is --resume"),
        ("--config", "--preset NAME"),
        ("--data", "it is --data-root"),
        ("--output-dir", "it is --out DIR"),
        ("--pretrain", "it is --pretrained"),
        ("--amp", "it is --precision bf16"),
        ("--labeled_batch", "did you mean --labeled-batch?"),
        ("--Lr", "did you mean --lr?"),
        ("--spilt", "did you mean --split?"),
    ],
)
def test_flags_of_other_programs_get_the_name_that_they_have_here(flag, words, capsys):
    assert dearli.main(["--stage", "sup", flag, "3"]) == 2
    message = capsys.readouterr().err
    assert words in message and message.count("\n") == 1 and f"unknown flag '{flag}'" in message


def test_hints_name_flags_that_there_are():
    flags = {
        option for action in command_line.parser()._actions for option in action.option_strings
    }
    for name, hint in command_line.HINTS.items():
        assert (
            f"--{name}" not in flags
            and set(re.findall(r"--[a-z][\w-]+", hint)) - {"--nproc_per_node"} <= flags
        ), name
    for name, other in command_line.OTHER_NAMES.items():
        assert (
            f"--{name}" not in flags
            and other in command_line.HINTS
            and name not in command_line.HINTS
        ), name


def test_the_version_is_of_this_program_python_and_torch(capsys):
    assert dearli.main(["--version"]) == 0 and dearli.main(["--stage", "sup", "--version"]) == 0
    line, again = capsys.readouterr().out.splitlines()
    assert line == again and line.startswith(
        f"dearli {dearli.__version__}, python {sys.version.split()[0]}, torch {torch.__version__.split('+')[0]}"
    )


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--stage", "sup"], "go on with --resume"),
        ([], "go on with --resume"),
        (["--stage", "masks"], "the same command goes on where it was"),
        (
            ["--stage", "import", "--from", "masks", "--input", ".", "--out", "x"],
            "the same command begins again",
        ),
        (["--stage", "zeroshot"], "nothing is kept of it"),
        (["--stage", "validate"], "nothing is kept of it"),
    ],
)
def test_ctrl_c_advises_what_the_stage_has(flags, words, capsys, monkeypatch):
    def interrupted(args):
        raise KeyboardInterrupt

    monkeypatch.setattr(stages, "run", interrupted)
    assert dearli.main(flags) == 130
    said = capsys.readouterr().err
    assert words in said and said.count("\n") == 1 and ("--resume" in said) == ("--resume" in words)


def test_a_folder_of_ones_own_is_trained_without_clip_unless_somebody_says_otherwise():
    def method(*flags):
        args = stages.parser().parse_args(["--stage", "ssl", *flags])
        command_line.check(args)
        return args.method

    custom = ["--dataset", "custom", "--data-root", "DIR"]
    assert (
        method(*custom) == "ssl"
        and method(*custom, "--method", "dear") == "dear"
        and method() == "dearli"
    )
    assert (
        method(*custom, "--preset", "official") == "dearli"
        and method(*custom, "--preset", "official", "--classifier", "linear") == "ssl"
    )
    assert method("--dataset", "coco", "--split", "1_512") == "dearli"
    assert (
        stages.resolve(stages.parser().parse_args(["--stage", "sup", *custom, "--device", "cpu"]))[
            0
        ].method
        == "dearli"
    )


def test_a_cpu_without_bf16_is_told_from_one_with_it(tmp_path, monkeypatch, capsys):
    info = tmp_path / "cpuinfo"
    for flags, expected in (
        ("flags\t\t: fpu avx2 avx512f", False),
        ("flags\t: fpu avx512_bf16 sse", True),
        ("flags\t: amx_tile amx_bf16", True),
        ("Features\t: fp asimd bf16 i8mm", True),
        ("Features\t: fp asimd", False),
        ("nothing", True),
    ):
        info.write_text(f"processor\t: 0\n{flags}\n")
        assert stages.multiplies_bf16(info) == expected
    assert stages.multiplies_bf16(tmp_path / "none")
    monkeypatch.setattr(stages, "multiplies_bf16", lambda: False)
    for precision, count in (("bf16", 1), ("fp32", 0)):
        stages.resolve(
            stages.parser().parse_args(
                ["--stage", "sup", "--device", "cpu", "--precision", precision]
            )
        )
        assert capsys.readouterr().out.count("this CPU has no instructions for it") == count


@pytest.fixture
def small_world(monkeypatch):
    for name, count in (("MINI_TRAIN", 12), ("MINI_VAL", 4)):
        monkeypatch.setattr(data, name, count)


def test_a_dry_run_says_what_a_run_will_take_and_writes_nothing(small_world, tmp_path, capsys):
    masks, runs = (
        ["--points-per-side", 2, "--pred-iou-thresh", 0, "--stability-thresh", 0],
        ["--runs", tmp_path],
    )
    assert run("--stage", "masks", *masks, "--out", tmp_path / "masks") == 0
    before = sorted(tmp_path.rglob("*"))
    capsys.readouterr()
    assert (
        run("--stage", "masks", "--dry-run", *masks, *runs) == 0
        and "12 images of" in capsys.readouterr().out
    )
    assert (
        run("--stage", "dewa", "--dry-run", "--masks", tmp_path / "masks", "--steps", 5, *runs) == 0
        and "1 to 5: " in capsys.readouterr().out
    )
    assert run("--stage", "sup", "--dry-run", "--steps", 7, *runs) == 0
    out = capsys.readouterr().out
    assert (
        "4 labelled and 8 unlabelled images, 4 for validation" in out
        and "1 to 7: " in out
        and "4 images of" in out
    )
    assert (
        run(
            "--stage",
            "ssl",
            "--method",
            "dear",
            "--dry-run",
            "--steps",
            900,
            "--burn-in",
            2,
            "--lr",
            1e-3,
            *runs,
        )
        == 0
    )
    out = capsys.readouterr().out
    assert (
        re.search(r"^steps +1 to 2: ", out, re.M)
        and re.search(r"^steps +3 to 900: ", out, re.M)
        and "lr 0.001" in out
    )  # a burn-in is another kind of step
    parts = [
        (int(n) - int(m) + 1) * (float(a) + float(b))
        for m, n, a, b in re.findall(
            r"^steps +(\d+) to (\d+): ([\d.e-]+) s each; making a batch takes ([\d.e-]+) s more",
            out,
            re.M,
        )
    ]
    said = re.search(r"^time +about (\d+) (seconds|minutes|hours)", out, re.M)
    assert sum(parts) == pytest.approx(
        int(said[1]) * {"seconds": 1, "minutes": 60, "hours": 3600}[said[2]], rel=0.3
    )  # of rounded numbers
    count = re.search(r"student: ([\d,]+) trained parameters, teacher", out)[1]
    student = stages.build(
        stages.Job(),
        stages.resolve(stages.parser().parse_args(fitting(["--stage", "sup"])))[1],
        data.mini_taxonomy(),
    )
    assert int(count.replace(",", "")) == sum(p.numel() for p in student.trained().values())
    assert sorted(tmp_path.rglob("*")) == before


def test_a_run_that_is_watched_is_the_run_that_is_not_and_what_was_seen_is_true(
    small_world, tmp_path, capsys
):
    ssl = [
        "--stage",
        "ssl",
        "--method",
        "dear",
        "--checkpoint-every",
        2,
        "--lr",
        1e-3,
        "--overlap-threshold",
        0.1,
    ]
    assert run(*ssl, "--steps", 6, "--out", tmp_path / "watched", "--watch", 3) == 0
    assert run(*ssl, "--steps", 6, "--out", tmp_path / "alone", "--watch", 0) == 0
    one, two = (checkpoint.newest(tmp_path / name) for name in ("watched", "alone"))
    assert all(torch.equal(one[m][k], two[m][k]) for m in ("student", "teacher") for k in one[m])
    assert (
        not (tmp_path / "alone" / "pq.jsonl").exists()
        and not (tmp_path / "alone" / "pseudo").exists()
    )
    rows = watch.read(tmp_path / "watched")
    assert [(row["step"], row["images"]) for row in rows] == [(2, 3), (4, 3), (6, 3)]
    job, cfg = stages.resolve(
        stages.parser().parse_args(
            ["--stage", "eval", "--weights", str(tmp_path / "watched"), "--device", "cpu"]
        )
    )
    dataset = stages.load_data(job, cfg)
    metrics = evaluate(stages.load_models(job, cfg, dataset.taxonomy), dataset, cfg, job.device, 3)
    assert {reading: of["all"]["pq"] for reading, of in metrics.items()} == {
        k: v for k, v in rows[-1].items() if "/" in k
    }
    pictures = sorted((tmp_path / "watched" / "pseudo").iterdir())
    assert [p.name for p in pictures] == [
        f"{step:08d}-{k}.webp" for step in (2, 4, 6) for k in range(4)
    ]
    page = (tmp_path / "watched" / "report.html").read_text()
    assert page.count("step 4</figcaption>") == 4 and "on 3 validation images" in page
    first = (tmp_path / "watched" / "pq.jsonl").read_text()
    max(
        (tmp_path / "watched").glob("step_*.pt")
    ).unlink()  # back to step 4, and on: what was seen later is seen again
    assert run(*ssl, "--steps", 6, "--out", tmp_path / "watched", "--watch", 3, "--resume") == 0
    assert (tmp_path / "watched" / "pq.jsonl").read_text() == first


def test_a_run_goes_on_to_the_length_it_was_begun_with_and_its_results_are_not_replaced_by_others(
    small_world, tmp_path, capsys
):
    stop = trainer.Run._steps

    def stopped_after_two(self, start, seconds, models, optimizer, batches, *rest):
        batches.steps, length = 2, batches.steps
        stop(self, start, seconds, models, optimizer, batches, *rest)
        batches.steps = length

    out = ["--out", tmp_path / "run"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer.Run, "_steps", stopped_after_two)
        assert run("--stage", "sup", "--steps", 5, "--no-eval", *out) == 0
    assert run("--stage", "sup", "--resume", *out) == 0  # not the 500 of the preset
    assert [row["step"] for row in trainer.read_log(tmp_path / "run" / "log.jsonl")] == [
        0,
        1,
        2,
        3,
        4,
    ]
    metrics = (tmp_path / "run" / "metrics.json").read_text()
    evaluated = [
        "--stage",
        "eval",
        "--weights",
        str(tmp_path / "run"),
        "--object-mask-threshold",
        "0.5",
        "--eval-batch",
        "1",
        "--device",
        "cpu",
        "--report-images",
        "0",
    ]
    capsys.readouterr()
    assert (
        dearli.main(evaluated) == 2
        and "object_mask_threshold 0.0 there, 0.5 now" in capsys.readouterr().err
    )
    assert (tmp_path / "run" / "metrics.json").read_text() == metrics
    assert (
        dearli.main([*evaluated, "--out", str(tmp_path / "other")]) == 0
        and (tmp_path / "other" / "metrics.json").exists()
    )


class Recorder(Config):
    """A configuration that remembers which of its numbers were read, other than to be copied or compared."""

    read: set = set()

    def __getattribute__(self, name):
        frame = sys._getframe(1)
        callers = {frame.f_code.co_name, frame.f_back.f_code.co_name}
        if (
            name in vars(Config)["__dataclass_fields__"]
            and frame.f_code.co_filename != dataclasses.__file__
            and not callers
            & {"settled", "ablations", "require_semi_supervised", "changes", "differing"}
        ):
            Recorder.read.add(name)
        return super().__getattribute__(name)


def test_fault_45_the_table_of_numbers_that_stages_read_is_what_they_read(
    small_mini, tmp_path, monkeypatch
):
    found = {}

    def stage(name, *args):
        asked = stages.parser().parse_args(fitting(["--stage", name, *args]))
        job, cfg = stages.resolve(asked)
        Recorder.read.clear()
        stages.STAGES[name](job, Recorder(**dataclasses.asdict(cfg)))
        found.setdefault(name, set()).update(Recorder.read)

    monkeypatch.setattr(data, "MINI_TRAIN", 6)
    monkeypatch.setattr(data, "MINI_VAL", 2)
    monkeypatch.setattr(importer, "import_folder", lambda *args, **named: None)
    monkeypatch.setattr(importer, "summary", lambda *args: "")
    root, runs, folder = (
        write_coco_folder(tmp_path / "set", images=4),
        ["--runs", tmp_path],
        tmp_path / "run",
    )
    Image.fromarray(microcosm.scene("val", 0).image).save(tmp_path / "a.png")
    own, alone = ["--dataset", "custom", "--data-root", root], ["--report-images", 0]
    stage("import", "--from", "masks", "--input", tmp_path, "--out", tmp_path / "new")
    stage("validate", *own, "--workers", 0)
    stage("masks", *runs, "--points-per-side", 2)
    stage("masks", *runs, *own, "--split", 2)
    stage("dewa", *runs, "--steps", 1, "--train-backbone", "--out", tmp_path / "dewa")
    stage("sup", *runs, "--steps", 1, "--train-backbone", *alone)
    stage(
        "sup", *runs, "--steps", 1, "--classifier", "linear", *alone, "--out", tmp_path / "linear"
    )
    stage("ssl", "--steps", 2, "--method", "dear", "--cutmix-prob", 1, "--out", folder, *alone)
    stage(
        "ssl",
        "--steps",
        1,
        "--method",
        "ssl",
        "--init",
        tmp_path / "dewa",
        "--train-backbone",
        "--no-eval",
        "--out",
        tmp_path / "warm",
    )
    stage("eval", "--weights", folder, *alone)
    stage("eval", "--weights", tmp_path / "linear", *alone)
    stage(
        "predict",
        "--weights",
        folder,
        "--input",
        tmp_path / "a.png",
        "--out",
        tmp_path / "predictions",
    )
    stage("report", "--weights", folder, "--report-images", 1)
    stage("export", "--weights", folder, "--out", tmp_path / "run.pth")
    stage("zeroshot", *runs, "--masks", "sam", "--points-per-side", 2)
    model = {
        "train_backbone",
        "classifier",
        "num_queries",
        "hidden",
        "heads",
        "encoder_layers",
        "encoder_ffn",
        "encoder_points",
        "decoder_layers",
        "decoder_ffn",
    }
    # read, and of no effect: the class term of the warm-up has weight 0, and CLIP alone is asked where a decoder was built
    found["dewa"] -= {"class_weight", "no_object_weight"}
    found["zeroshot"] -= model
    found["dewa"] |= {"test_size", "test_max", "eval_batch"}  # stored with the run for its sisters
    found["import"] |= {"seed"}  # by `import_folder`, which is not called here
    for name in (
        "dewa",
        "sup",
        "ssl",
        *command_line.STORED,
        "zeroshot",
    ):  # of a folder; the miniature world has 8 bits
        found[name] |= {"white"} & command_line.READS[name]
    for name in found:  # no less; and no more than it makes up for
        assert command_line.READS[name] <= found[name] <= command_line.reads(name), (
            name,
            command_line.READS[name] - found[name],
            found[name] - command_line.reads(name),
        )
    assert {name for name in command_line.ALL if name not in found} == {
        "prepare",
        "demo",
        "ladder",
        "alpha",
        "mini-clip",
        "mini-sam",
    }
    assert (
        command_line.READS["demo"]
        == command_line.READS["masks"] | command_line.READS["dewa"] | command_line.READS["ssl"]
    )


@pytest.mark.parametrize(
    "args, words",
    [
        (
            ["--stage", "dewa", "--class-weight", "3"],
            "--class-weight: only --stage sup, ssl, demo, ladder and alpha know it, not --stage dewa",
        ),
        (["--stage", "dewa", "--no-object-weight", "3"], "--no-object-weight: only --stage"),
        (
            ["--stage", "masks", "--alpha", "0.1"],
            "--alpha: only --stage sup, ssl, eval, predict, report",
        ),
        (
            ["--stage", "sup", "--method", "dearli"],
            "--method: only --stage ssl knows it, not --stage sup",
        ),  # its default
        (
            ["--stage", "sup", "--lambda-u", "1"],
            "--lambda-u: only --stage ssl, demo, ladder and alpha know it",
        ),
        (["--stage", "sup", "--burn-in", "0"], "--burn-in: only --stage"),
        (
            ["--stage", "ssl", "--method", "dear", "--dewa-steps", "9"],
            "--dewa-steps: no masks and no warm-up are made here",
        ),
        (
            ["--stage", "sup", "--dewa-steps", "9"],
            "--dewa-steps: only --stage dewa, ssl, demo and ladder know it",
        ),
        (
            ["--stage", "ssl", "--method", "dear", "--no-dewa-keep-empty"],
            "--dewa-keep-empty: no masks and no warm-up are made here",
        ),
        (["--stage", "zeroshot", "--num-queries", "9"], "--num-queries: only --stage"),
        (
            ["--stage", "zeroshot", "--points-per-side", "9"],
            "--points-per-side: it counts with --masks sam",
        ),
        (["--stage", "masks", "--eval-on", "val"], "--eval-on: only --stage"),
        (["--stage", "validate", "--out", "x"], "--out: only --stage"),
        (["--stage", "ladder", "--sup-steps", "9"], "--sup-steps: only --stage sup knows it"),
        (
            ["--stage", "ssl", "--burn-in", "0.2"],
            "--burn-in: a run that starts from other weights (--method dearli, or --init) has --burn-in-warm",
        ),
        (
            ["--stage", "ssl", "--method", "dear", "--burn-in-warm", "0.2"],
            "--burn-in-warm: a run that starts from a random decoder has --burn-in",
        ),
        (
            ["--stage", "sup", "--backbone-lr-multiplier", "0.5"],
            "--backbone-lr-multiplier: it counts with --train-backbone",
        ),
        (
            ["--stage", "masks", "--sam", "regions", "--points-per-side", "9"],
            "--points-per-side: stable regions",
        ),
        (
            ["--stage", "sup", "--classifier", "linear", "--alpha", "0.5"],
            "--alpha: CLIP has no say here",
        ),
        (
            ["--stage", "sup", "--classifier", "linear", "--clip-scale", "9"],
            "--clip-scale: CLIP has no say here",
        ),
        (
            ["--stage", "dewa", "--dataset", "coco", "--crop", "512"],
            "--crop: the warm-up crops to --dewa-crop 640",
        ),
        (
            ["--stage", "ssl", "--method", "dear", "--blur-prob", "0", "--blur-radius", "1"],
            "--blur-radius: nothing is blurred",
        ),
        (
            ["--stage", "sup", "--importance", "0", "--oversample", "2"],
            "--oversample: no point is chosen by uncertainty",
        ),
        (
            ["--stage", "sup", "--dataset", "custom", "--data-root", "x", "--eval-on", "dev"],
            "--eval-on: only --dataset mini",
        ),
        (["--stage", "sup", "--data-root", "x"], "--data-root: --dataset mini is drawn"),
        (["--stage", "sup", "--variant", "_4class"], "--variant: it counts with --dataset custom"),
        (
            ["--stage", "masks", "--images", ".", "--dataset", "coco", "--data-root", "."],
            "--data-root: the images are those of --images",
        ),
        (
            ["--stage", "dewa", "--images", ".", "--split", "4"],
            "--split: the images are those of --images",
        ),
        (["--stage", "sup", "--no-eval", "--groups", "5"], "--groups: nothing is evaluated"),
        (["--stage", "sup", "--steps", "5", "--sup-steps", "6"], "--steps 5: --sup-steps says 6"),
        (["--stage", "ssl", "--jitter", "1.5"], "--jitter 1.5: expected a share, 0 to 1"),
        (
            ["--stage", "ssl", "--jitter-hue", "0.6"],
            "--jitter-hue 0.6: expected a number from 0 to 0.5",
        ),
        (
            ["--stage", "ssl", "--blur-radius", "0"],
            "--blur-radius 0.0: expected a number of at least 0.1",
        ),
        (
            ["--stage", "sup", "--overlap-threshold", "80"],
            "--overlap-threshold 80.0: expected a share",
        ),
        (
            ["--stage", "masks", "--stability-thresh", "95"],
            "--stability-thresh 95.0: expected a share",
        ),
        (
            ["--stage", "sup", "--seed", "99999999999999999999"],
            "--seed 99999999999999999999: expected a number from 0 to 4294967295",
        ),
        (["--stage", "sup", "--scale-max", "1.25"], "--scale-max 1.25: expected a multiple of 0.1"),
        (["--stage", "sup", "--crop", "100"], "--crop 100: expected a multiple of 32"),
        (
            ["--stage", "sup", "--test-size", "1024"],
            "--test-size 1024: expected no more than --test-max 512",
        ),
        (
            ["--stage", "sup", "--num-points", "8", "--importance", "0.1"],
            "--importance 0.1: expected 0, or enough for one of --num-points 8",
        ),
        (["--stage", "ladder", "--seeds", "0"], "--seeds 0: expected a number of at least 1"),
        (["--stage", "sup", "--watch", "-1"], "--watch -1: expected a number of at least 0"),
        (["--stage", "sup", "--lr", "0"], "--lr 0: nothing would be learned"),
        (
            ["--stage", "sup", "--lr", "1", "--weight-decay", "2"],
            "--weight-decay 2.0: at --lr 1.0 a step would take all of a weight away",
        ),
        (
            ["--stage", "sup", "--train-backbone", "--backbone-lr-multiplier", "0"],
            "--backbone-lr-multiplier 0: the backbone would not be trained",
        ),
        (
            ["--stage", "dewa", "--mask-weight", "0", "--dice-weight", "0"],
            "--mask-weight and --dice-weight are 0: there is nothing to learn",
        ),
        (
            ["--stage", "sup", "--class-weight", "0", "--mask-weight", "0", "--dice-weight", "0"],
            "there is nothing to learn",
        ),
        (
            ["--stage", "ssl", "--method", "ssl", "--steps", "800", "--burn-in", "1000"],
            "--burn-in 1000: all 800 steps of the run (--steps) would pass without",
        ),
        (
            [
                "--stage",
                "ssl",
                "--method",
                "ssl",
                "--steps",
                "800",
                "--burn-in",
                "1000",
                "--dry-run",
            ],
            "--burn-in 1000: all 800 steps",
        ),
        (
            ["--stage", "ssl", "--steps", "9", "--burn-in-warm", "9"],
            "--burn-in-warm 9: all 9 steps",
        ),
        (
            ["--stage", "ssl", "--method", "dear", "--burn-in", "1.5"],
            "--burn-in 1.5: expected a share of the steps, below 1, or a whole number of steps",
        ),
        (
            ["--stage", "demo", "--steps", "200", "--burn-in-warm", "60"],
            "--burn-in-warm 60: all 50 steps",
        ),  # 150 are the warm-up's
        (
            ["--stage", "sup", "--dataset", "ade20k"],
            "--dataset ade20k: say with --split which images are labelled: 1_128, 1_64, 1_32, 1_16, 1_8",
        ),
        (
            ["--stage", "ssl", "--dataset", "coco"],
            "--dataset coco: say with --split which images are labelled: 1_512",
        ),
        (
            ["--stage", "ladder", "--dataset", "coco-objects"],
            "--dataset coco-objects: say with --split",
        ),
    ],
)
def test_fault_45_what_a_stage_cannot_use_or_does_not_read_is_refused_before_anything_is_imported(
    args, words, capsys, tmp_path, monkeypatch
):
    monkeypatch.setitem(sys.modules, "stages", None)  # an import of it would fail
    assert dearli.main([*args, "--runs", str(tmp_path)]) == 2
    message = capsys.readouterr().err
    assert words in message and message.count("\n") == 1 and message.startswith("error: ")


def test_fault_45_a_stored_run_keeps_the_numbers_that_its_weights_are_part_of(
    small_run, tmp_path, capsys
):
    evaluated = [
        "--stage",
        "eval",
        "--weights",
        str(small_run / "run"),
        "--device",
        "cpu",
        "--out",
        str(tmp_path / "out"),
    ]
    for flag, words in (
        (["--heads", "4"], "--heads 4: "),
        (["--seed", "3"], "it was trained with 0"),
        (["--preset", "custom"], "--preset: the numbers are those"),
    ):
        assert dearli.main([*evaluated, *flag]) == 2
        message = capsys.readouterr().err
        assert words in message and message.count("\n") == 1 and not (tmp_path / "out").exists()


def test_fault_45_legitimate_ablations_are_said_in_a_line(small_world, tmp_path, capsys):
    out = ["--out", tmp_path / "run", "--dry-run"]
    assert run(*SSL[:-1], "--steps", 3, "--lambda-u", 0, "--alpha", 1, "--ema-decay", 1, *out) == 0
    said = capsys.readouterr().out
    for words in (
        "--lambda-u 0: the unlabelled images change nothing",
        "--alpha 1: CLIP has no say",
        "--ema-decay 1: the teacher stays",
    ):
        assert said.count(f"warning: {words}") == 1
    assert (
        run("--stage", "sup", "--steps", 2, "--class-weight", 0, *out) == 0
        and "warning: --class-weight 0: no classes" in capsys.readouterr().out
    )


def test_a_burn_in_is_a_share_of_the_steps_that_does_not_move_when_a_run_is_made_longer(
    small_mini, tmp_path, capsys
):
    from config import CUSTOM

    for preset, cold, warm in (
        (MINI, 250, 100),
        (CUSTOM, 1000, 300),
        (OFFICIAL, 0, 0),
    ):  # the steps that presets had
        assert (preset.burn_in_steps(False), preset.burn_in_steps(True)) == (cold, warm)
    dearli_rung = stages.rung_config(MINI, "dearli")
    assert (
        dearli_rung.ssl_steps,
        dearli_rung.burn_in_steps(True),
        stages.rung_config(MINI, "dear").burn_in_steps(False),
    ) == (350, 100, 250)
    steps = dataclasses.replace(MINI, burn_in=7, ssl_steps=9)
    assert [mean_teacher.ema_decay(t, steps, False) for t in (6, 7)] == [
        0,
        MINI.ema_decay,
    ] and data.SemiSupervisedBatches(None, steps, 9).parts == [0, 7]
    out, batches = ["--out", tmp_path / "run", "--watch", 0], ["--burn-in", "0.5"]
    assert run(*SSL, "--steps", 4, *batches, *out) == 0
    stored = json.loads((tmp_path / "run" / "config.json").read_text())
    assert stored["burn_in"] == 2 and stored["ssl_steps"] == 4
    flags = [pair for pair in zip(fitting(SSL)[5::2], fitting(SSL)[6::2]) if pair[0] != "--burn-in"]
    again = [
        *SSL,
        "--resume",
        "--out",
        tmp_path / "run",
        *(word for pair in flags for word in pair),
    ]
    assert dearli.main([*map(str, again), "--steps", "8"]) == 0  # the burn-in is not half of 8
    assert json.loads((tmp_path / "run" / "config.json").read_text())["burn_in"] == 2
    assert ["unlabeled/mask" in row for row in log_of(tmp_path / "run")] == [False, False] + [
        True
    ] * 6
    assert dearli.main([*map(str, again), "--steps", "9", "--burn-in", "0.25"]) == 0  # 2 of 8 steps
    capsys.readouterr()
    assert (
        dearli.main([*map(str, again), "--steps", "9", "--burn-in", "3"]) == 2
        and "burn_in: 2 there, 3 now" in capsys.readouterr().err
    )


def test_only_rungs_with_a_warm_up_need_more_steps_than_it_takes():
    stages.require_rungs(dataclasses.replace(MINI, ssl_steps=100), stages.ALPHAS)
    with pytest.raises(UserError, match="--steps 150"):
        stages.require_rungs(dataclasses.replace(MINI, ssl_steps=150), stages.RUNGS)


def test_ctrl_c_ends_runs_side_by_side_and_begins_no_other(tmp_path):
    code = f"import sys; import data; data.MINI_TRAIN, data.MINI_VAL = 12, 4; import dearli; sys.exit(dearli.main({fitting(['--runs', tmp_path, '--steps', 9000, '--jobs', 2])}))"
    # the processes of the pool import nothing of this line: their world is of full size, and drawn in a second or two
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parent,
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # a shell's background jobs ignore it, and so do theirs
    try:
        wait_for(
            lambda: any(path.stat().st_size > 2000 for path in tmp_path.glob("*/log.jsonl")), 120
        )
        os.killpg(process.pid, signal.SIGINT)
        said = process.communicate(timeout=60)[1]
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 130 and "Traceback" not in said, said[-2000:]
    assert not (tmp_path / "mini-sup-4" / "log.jsonl").exists()  # the third of three, two at a time
    begun = [path for path in tmp_path.glob("*/log.jsonl") if path.read_text()]
    assert begun and all(checkpoint.steps(path.parent) for path in begun)


def test_tensorboard_gets_the_log_and_its_absence_is_said(
    small_world, tmp_path, capsys, monkeypatch
):
    class SummaryWriter:
        def __init__(self, folder):
            self.folder = folder

        def add_scalar(self, name, value, step):
            written.append((name, value, step))

    written = []
    monkeypatch.setitem(
        sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=SummaryWriter)
    )
    sup = ["--stage", "sup", "--steps", 2, "--no-eval", "--log", "tensorboard"]
    assert run(*sup, "--out", tmp_path / "run") == 0
    rows = trainer.read_log(tmp_path / "run" / "log.jsonl")
    assert (
        sorted(written)
        == sorted(
            (name, value, row["step"])
            for row in rows
            for name, value in row.items()
            if name != "step"
        )
        and len(written) > 8
    )

    def absent(name, *more):
        raise ModuleNotFoundError(name="tensorboard")

    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard")
    monkeypatch.setitem(sys.modules, "tensorboard", None)  # as if not installed
    capsys.readouterr()
    assert run(*sup, "--out", tmp_path / "other") == 2
    assert "tensorboard is not installed" in capsys.readouterr().err and not checkpoint.steps(
        tmp_path / "other"
    )


def test_a_report_shows_what_other_runs_say_of_the_same_images(
    small_run, small_world, tmp_path, capsys
):
    assert (
        run("--stage", "sup", "--steps", 2, "--out", tmp_path / "<other>", "--eval-batch", 1) == 0
    )
    assert run("--stage", "eval", "--weights", small_run / "run", "--out", tmp_path / "run") == 0
    for file in (small_run / "run").iterdir():
        shutil.copy(file, tmp_path / "run")
    assert (
        dearli.main(
            [
                "--stage",
                "report",
                "--weights",
                str(tmp_path / "run"),
                "--compare",
                str(tmp_path / "<other>"),
                "--report-images",
                "2",
                "--device",
                "cpu",
            ]
        )
        == 0
    )
    page = (tmp_path / "run" / "report.html").read_text()
    assert page.count("<figcaption>&lt;other&gt; <b>") == 2  # the worst and the best image
    next((tmp_path / "<other>").glob("step_*.pt")).unlink()
    capsys.readouterr()
    assert (
        dearli.main(
            [
                "--stage",
                "report",
                "--weights",
                str(tmp_path / "run"),
                "--compare",
                str(tmp_path / "<other>"),
                "--report-images",
                "2",
                "--device",
                "cpu",
            ]
        )
        == 0
    )
    assert "no pictures of a run beside this one" in capsys.readouterr().out


def test_a_palette_is_the_data_sets_own_or_the_safe_one(small_world):
    taxonomy = data.Taxonomy(("a", "b"), (True, False), (1, 2), ((1, 2, 3), (4, 5, 6)))
    assert stages.repainted(stages.Job(), taxonomy).colours == [(1, 2, 3), (4, 5, 6)]
    assert stages.repainted(stages.Job(palette="safe"), taxonomy).colours == colours.palette(2)


# ----------------------------------------------------------------------------------------- annotations.py, importer.py
#
# One scene in every format: on 12 x 10 pixels a cat at x 1 to 4, y 2 to 5 (16 pixels) and a dog at x 4 to 8, y 4 to 7 (20); at x 4, y 4 to 5 they overlap.

BOXES = {"cat": (1, 2, 5, 6), "dog": (4, 4, 9, 8)}  # left, top, right, bottom, in corners of pixels
CORNERS = {
    name: [[left, top], [right, top], [right, bottom], [left, bottom]]
    for name, (left, top, right, bottom) in BOXES.items()
}
CITY_IDS = {"cat": 24_001, "dog": 26_000}  # a person and a car


def scene_mask(name, size=(10, 12)):
    left, top, right, bottom = BOXES[name]
    mask = np.zeros(size, bool)
    mask[top:bottom, left:right] = True
    return mask


def scene_ids():
    """What every format must give: segment 1 the cat, 2 the dog, and the smaller cat on top."""
    ids = np.where(scene_mask("dog"), 2, 0)
    ids[scene_mask("cat")] = 1
    return ids


def photo(path, size=(12, 10), seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), np.uint8)).save(
        path
    )


def write_labelme(root, names=("a", "b", "c"), bare=("d",), shapes=None, size=(12, 10)):
    for k, name in enumerate((*names, *bare)):
        photo(root / f"{name}.png", size, k)
    for name in names:
        drawn = shapes or [
            {"label": label, "points": points, "shape_type": "polygon", "group_id": None}
            for label, points in CORNERS.items()
        ]
        (root / f"{name}.json").write_text(
            json.dumps(
                {
                    "version": "5.4.1",
                    "shapes": drawn,
                    "imagePath": f"{name}.png",
                    "imageData": None,
                    "imageHeight": size[1],
                    "imageWidth": size[0],
                }
            )
        )
    return root


def coco_content(segmentation, names=("a.png", "b.png", "c.png"), bare=("d.png",)):
    images = [
        {"id": 10 + k, "file_name": name, "width": 12, "height": 10}
        for k, name in enumerate((*names, *bare))
    ]
    annotations = [
        {
            "id": 1,
            "image_id": 10 + k,
            "category_id": category,
            "segmentation": segmentation(label),
            "iscrowd": 0,
        }
        for k in range(len(names))
        for label, category in (("cat", 17), ("dog", 3))
    ]
    return {
        "images": images,
        "annotations": annotations,
        "categories": [{"id": 17, "name": "cat"}, {"id": 3, "name": "dog"}],
    }


def write_coco(root, segmentation=lambda label: [np.ravel(CORNERS[label]).tolist()]):
    for k, name in enumerate("abcd"):
        photo(root / "images" / f"{name}.png", seed=k)
    (root / "annotations.json").write_text(json.dumps(coco_content(segmentation)))
    return root


def long_runs(label):
    """Uncompressed run lengths: down the columns, zeros first."""
    flat = np.append(scene_mask(label).ravel(order="F"), False).astype(int)
    edges = np.flatnonzero(np.diff(flat)) + 1
    return {"size": [10, 12], "counts": np.diff([0, *edges, 120]).tolist()}


def write_cityscapes(root, values=None):
    for k, (part, city, annotated) in enumerate(
        (
            ("train", "ulm", True),
            ("train", "bonn", True),
            ("val", "jena", True),
            ("train_extra", "trier", False),
        )
    ):
        stem = f"{city}_000000_000019"
        photo(root / "leftImg8bit" / part / city / f"{stem}_leftImg8bit.png", seed=k)
        if annotated:
            path = root / "gtFine" / part / city / f"{stem}_gtFine_instanceIds.png"
            path.parent.mkdir(parents=True)
            ids = (
                np.array([0, CITY_IDS["cat"], CITY_IDS["dog"]])[scene_ids()]
                if values is None
                else values
            )
            Image.fromarray(ids.astype(np.uint16)).save(path)
    return root


def write_masks(root, value=7):
    for k, name in enumerate("abcd"):
        photo(root / "images" / f"{name}.png", seed=k)
    for label in BOXES:
        (root / "masks" / label).mkdir(parents=True)
        for name in "abc":
            Image.fromarray(
                (scene_mask(label) * value).astype(np.uint16 if value > 255 else np.uint8)
            ).save(root / "masks" / label / f"{name}.png")
    return root


SCENES = {
    "labelme": write_labelme,
    "coco-instances": write_coco,
    "cityscapes": write_cityscapes,
    "masks": write_masks,
}


def imported(kind, source, **flags):
    """The data set that an import makes, read as every stage reads it, and what the import says of it."""
    output = source.parent / f"{source.name}-out"
    result = importer.import_folder(kind, source, output, **flags)
    assert not (output / "import.part").exists()
    return data.load_folder(output, "all"), result


def import_refused(kind, source, words, **flags):
    with pytest.raises(UserError) as error:
        importer.import_folder(kind, source, source.parent / "refused", **flags)
    assert re.search(words, str(error.value)) and "\n" not in str(error.value), str(error.value)


@pytest.mark.parametrize("kind", SCENES)
def test_one_scene_is_the_same_in_every_format(kind, tmp_path):
    dataset, result = imported(kind, SCENES[kind](tmp_path / "source"))
    assert (
        len(dataset.labeled) == 2
        and len(dataset.unlabeled) == 1
        and len(dataset.val) == 1
        and not result["dropped"]
    )
    assert (result["labeled"], result["unlabeled"], result["val"]) == (2, 1, 1)
    for images, i in ((dataset.train, 0), (dataset.train, 1), (dataset.val, 0)):
        truth = images.truth(i)
        assert (
            np.array_equal(truth.segment_map, scene_ids())
            and truth.areas.tolist() == [16, 18]
            and not truth.crowd.any()
        )
        names = [dataset.taxonomy.names[k] for k in truth.labels]
        assert names == (["person", "car"] if kind == "cityscapes" else ["cat", "dog"]) and all(
            dataset.taxonomy.things[k] for k in truth.labels
        )
    content = json.loads((tmp_path / "source-out" / "panoptic_train.json").read_text())
    first = content["annotations"][0]
    assert [s["id"] for s in first["segments_info"]] == [1, 2] and [
        s["bbox"] for s in first["segments_info"]
    ] == [[1, 2, 4, 4], [4, 4, 5, 4]]
    ids = data.segment_ids(tmp_path / "source-out" / "panoptic" / first["file_name"])
    assert np.array_equal(ids, scene_ids())
    assert {c["id"] for c in content["categories"]} == {
        "coco-instances": {3, 17},
        "cityscapes": set(annotations.CITYSCAPES),
    }.get(kind, {1, 2})


def test_run_lengths_are_read_like_polygons(tmp_path):
    for name, segmentation in (
        ("long", long_runs),
        ("short", lambda label: dewa.encode_rle(scene_mask(label))),
    ):
        dataset, _ = imported("coco-instances", write_coco(tmp_path / name, segmentation))
        assert np.array_equal(
            dataset.train.truth(0).segment_map, scene_ids()
        ) and dataset.taxonomy.ids == (17, 3)


def test_pixels_belong_to_a_shape_if_their_centres_do():
    draw = lambda points: annotations._polygon(np.array(points, float), (10, 12))

    def whole(patch, size=(10, 12)):
        mask = np.zeros(size, bool)
        mask[patch[0] : patch[0] + patch[2].shape[0], patch[1] : patch[1] + patch[2].shape[1]] = (
            patch[2]
        )
        return mask

    assert np.array_equal(whole(draw(CORNERS["cat"])), scene_mask("cat")) and np.array_equal(
        whole(draw(np.add(CORNERS["cat"], 0.4))), scene_mask("cat")
    )
    assert np.array_equal(
        whole(draw(np.add(CORNERS["cat"], [-0.5, 0.6]))), np.roll(scene_mask("cat"), 1, 0)
    )  # x: 0.5 and 4.5, down; y: 2.6 and 6.6
    left, right = (
        whole(draw([[0, 0], [6, 0], [6, 10], [0, 10]])),
        whole(draw([[6, 0], [12, 0], [12, 10], [6, 10]])),
    )
    assert (
        not (left & right).any() and (left | right).all()
    )  # neighbours neither overlap nor leave a gap
    assert np.array_equal(
        whole(draw([[-5, -7], [20, -7], [20, 3], [-5, 3]])),
        np.arange(10)[:, None].repeat(12, 1) < 3,
    )  # clipped
    assert (
        draw([[20, 1], [22, 1], [22, 5]])[2].sum()
        == draw([[3.1, 3.1], [3.3, 3.1], [3.3, 3.3]])[2].sum()
        == draw([[1, 1], [5, 5]])[2].sum()
        == 0
    )
    triangle, (ys, xs) = (
        whole(draw([[0, 0], [10, 0], [0, 10]])),
        np.mgrid[:10, :12],
    )  # its long side goes through the centres where x + y = 9
    assert triangle[xs + ys < 9].all() and not triangle[xs + ys > 9].any()
    disc = whole(annotations._circle(np.array([[5.0, 5.0], [7.0, 5.0]]), (10, 12)))
    assert (
        disc.sum() == 12 and disc[3:7, 4:6].all() and disc[4:6, 3:7].all()
    )  # centres within 2 of the corner at (5, 5): 4 + 4 + 4
    assert (
        whole(annotations._circle(np.array([[5.0, 5.0], [6.5, 6.6]]), (10, 12))).sum() == 16
    )  # and within 2.19, so that those 1.5 away on both axes are in


def test_polygons_are_as_large_as_pycocotools_says(tmp_path):
    from pycocotools import mask as coco_mask

    rng, total, exact = np.random.default_rng(0), 0, 0
    for k in range(600):
        side, corners = (3, 8, 20)[k % 3], rng.integers(3, 9)
        angles, radii = np.sort(rng.random(corners)) * 2 * np.pi, side * (0.3 + rng.random(corners))
        points = np.stack([np.cos(angles), np.sin(angles)], 1) * radii[:, None] + rng.uniform(
            5, 55, 2
        )  # concave, and partly outside, too
        points = (np.round(points) if k % 2 else points).clip(-30, 110)
        points = (
            np.concatenate([points, points[:2] + 4, points[:1]]) if k % 5 == 0 else points
        )  # crosses itself
        top, left, mask = annotations._polygon(points, (50, 60))
        whole = np.zeros((50, 60), bool)
        whole[top : top + mask.shape[0], left : left + mask.shape[1]] = mask
        assert np.array_equal(
            whole,
            dewa.decode_rle(
                {
                    "size": [50, 60],
                    "counts": coco_mask.frPyObjects([points.ravel().tolist()], 50, 60)[0][
                        "counts"
                    ].decode(),
                }
            ),
        )
        if k % 5 and points.min() >= 0 and (points.max(0) <= (60, 50)).all():
            x, y = points.T
            total, exact = (
                total + mask.sum(),
                exact + abs((x * np.roll(y, 1) - y * np.roll(x, 1)).sum()) / 2,
            )
    assert abs(total / exact - 1) < 0.01 and exact > 1000
    # a square with a square hole, as tools write it in one outline: out along a cut, around the
    # hole, and back along the cut
    ring = [[1, 1], [9, 1], [9, 9], [1, 9], [1, 1], [3, 3], [3, 6], [6, 6], [6, 3], [3, 3]]
    assert annotations._polygon(np.array(ring, float), (10, 12))[2].sum() == 64 - 9
    # two parts of one instance, which overlap: COCO's union, 9 + 9 - 4
    parts = lambda label: (
        [[1, 1, 4, 1, 4, 4, 1, 4], [2, 2, 5, 2, 5, 5, 2, 5]]
        if label == "cat"
        else [np.ravel(np.add(CORNERS["dog"], [0, 2])).tolist()]
    )
    assert imported("coco-instances", write_coco(tmp_path / "parts", parts))[0].train.truth(
        0
    ).areas.tolist() == [14, 20]


def test_run_lengths_are_those_of_pycocotools(tmp_path):
    from pycocotools import mask as coco_mask

    for name, form in (
        ("long", long_runs),
        ("short", lambda label: dewa.encode_rle(scene_mask(label))),
    ):
        rle = form("dog")
        theirs = (
            coco_mask.frPyObjects(rle, 10, 12)
            if name == "long"
            else {**rle, "counts": rle["counts"].encode()}
        )
        assert coco_mask.area(theirs) == 20 and coco_mask.toBbox(theirs).tolist() == [4, 4, 5, 4]
        top, left, mask = annotations._rle(rle, (10, 12), "")
        assert (top, left) == (0, 0) and np.array_equal(mask, scene_mask("dog"))


def test_labelme_shapes_groups_and_masks(tmp_path):
    held = io.BytesIO()
    Image.fromarray(np.array([[1, 0, 1]], np.uint8)).save(held, "PNG")
    shapes = [
        {"label": "leaf", "points": [[0, 0], [2, 1]], "shape_type": "rectangle", "group_id": 4},
        {
            "label": "leaf",
            "points": [[11, 3], [9, 1]],
            "shape_type": "rectangle",
            "group_id": 4,
        },  # drawn from its lower right
        {
            "label": "stem",
            "points": [[4, 0], [5, 1]],
            "shape_type": "rectangle",
            "group_id": 4,
        },  # another label
        {"label": "disc", "points": [[5, 7], [6, 7]], "shape_type": "circle"},
        {
            "label": "spot",
            "points": [[8, 9], [10, 9]],
            "shape_type": "mask",
            "mask": base64.b64encode(held.getvalue()).decode(),
        },
        {"label": "leaf", "points": [[0, 9], [3, 9], [3, 10], [0, 10]], "shape_type": None},
        {"label": "nothing", "points": [[1, 1]], "shape_type": "point"},
        {"label": "nothing", "points": [[1, 1], [2, 2]], "shape_type": "line"},
        {"label": "__ignore__", "points": [[6, 0], [8, 2]], "shape_type": "rectangle"},
        {"label": "stem", "points": [[7, 7], [7.2, 7], [7.2, 7.2]], "shape_type": "polygon"},
    ]
    dataset, result = imported("labelme", write_labelme(tmp_path / "s", ("a", "b"), (), shapes))
    expected = np.zeros((10, 12), int)
    expected[0, :2] = expected[1:3, 9:11] = 1  # one instance in two parts
    expected[0, 4], expected[6:8, 4:6], expected[9, [8, 10]], expected[9, :3] = 2, 3, 4, 5
    truth = dataset.train.truth(0)
    assert np.array_equal(truth.segment_map, expected) and truth.areas.tolist() == [6, 1, 4, 2, 3]
    assert [dataset.taxonomy.names[k] for k in truth.labels] == [
        "leaf",
        "stem",
        "disc",
        "spot",
        "leaf",
    ] and dataset.taxonomy.names == ("disc", "leaf", "spot", "stem")
    assert (
        result["dropped"]
        == {"points and lines": 4, "shapes labelled __ignore__": 2, "instances without a pixel": 2}
        and result["instances"]["leaf"] == 4
    )


def test_labelme_images_are_found_by_path_by_stem_or_in_the_json(tmp_path):
    root = tmp_path / "s"
    write_labelme(root / "json", ("a", "b", "c"), ())
    photo(root / "images" / "moved.png")
    photo(root / ".thumbnails" / "moved.png")
    photo(root / "__MACOSX" / "moved.png")
    (root / "json" / "a.png").unlink()
    rewrite(
        root / "json" / "a.json", lambda content: content.update(imagePath="..\\images\\moved.png")
    )
    rewrite(
        root / "json" / "b.json", lambda content: content.update(imagePath="/somewhere/else/x.png")
    )
    held = base64.b64encode((root / "json" / "c.png").read_bytes()).decode()
    (root / "json" / "c.png").rename(tmp_path / "c.png")
    rewrite(root / "json" / "c.json", lambda content: content.update(imageData=held))
    dataset, _ = imported("labelme", root)
    assert sorted(p.name for p in (tmp_path / "s-out" / "images").iterdir()) == [
        "images_moved.png",
        "json_b.png",
        "json_c.png",
    ]
    assert (tmp_path / "s-out" / "images" / "json_c.png").read_bytes() == (
        tmp_path / "c.png"
    ).read_bytes() and len(dataset.labeled) == 2


def test_labelme_images_may_be_in_a_json_that_names_itself_or_beside_it_by_another_name(tmp_path):
    root = write_labelme(tmp_path / "s", ("a", "b"), ("c", "other"))
    held = base64.b64encode((root / "a.png").read_bytes()).decode()
    (root / "a.png").unlink()
    rewrite(root / "a.json", lambda content: content.update(imagePath="a.json", imageData=held))
    (root / "b.json").rename(root / "z.json")
    rewrite(root / "z.json", lambda content: content.update(imagePath="C:\\pictures\\other.png"))
    dataset, result = imported("labelme", root)
    assert sorted(p.name for p in (tmp_path / "s-out" / "images").iterdir()) == [
        "a.png",
        "b.png",
        "c.png",
        "other.png",
    ]
    listed = (
        json.loads((tmp_path / "s-out" / "panoptic_train.json").read_text()),
        json.loads((tmp_path / "s-out" / "panoptic_val.json").read_text()),
    )
    assert {a["file_name"] for content in listed for a in content["annotations"]} == {
        "a.png",
        "other.png",
    } and result["unlabeled"] == 2


def test_labelme_rotated_rectangles_are_read_and_unknown_shapes_stop_nothing(tmp_path):
    diamond = [[4, 1], [7, 4], [4, 7], [1, 4]]  # area 18
    shapes = [
        {"label": "cat", "points": diamond, "shape_type": "oriented_rectangle"},
        {"label": "bolt", "points": [[8, 1], [11, 1], [11, 4]], "shape_type": "spline"},
        {"label": "dog", "points": [[8, 6], [11, 9]], "shape_type": "rectangle"},
    ]
    dataset, result = imported(
        "labelme", write_labelme(tmp_path / "s", ("a", "b"), (), shapes), background="lawn"
    )
    truth = dataset.train.truth(0)
    assert dataset.taxonomy.names == ("cat", "dog", "lawn") and truth.areas[:2].tolist() == [
        annotations._polygon(np.array(diamond, float), (10, 12))[2].sum(),
        9,
    ]
    assert (
        17 <= truth.areas[0] <= 19
        and (truth.segment_map[1:4, 8:11] == 0).all()
        and (truth.segment_map == 0).sum() == 9
    )
    assert (
        result["dropped"] == {"shapes of the unknown type 'spline'": 2}
        and "2 regions are void" in result["notes"][0]
    )


def test_what_is_ignored_or_has_no_mask_is_void_and_not_background(tmp_path):
    square = lambda label, x, y, side, **more: {
        "label": label,
        "points": [[x, y], [x + side, y + side]],
        "shape_type": "rectangle",
        **more,
    }
    shapes = [
        square("cat", 10, 10, 20),
        square("__ignore__", 14, 14, 6),
        square("_background_", 22, 22, 4),
        square("__ignore__", 40, 0, 10),
        {"label": "nose", "points": [[12, 12]], "shape_type": "point"},
        {"label": "nose", "points": [[50, 50]], "shape_type": "point"},
        {"label": "wire", "points": [[0, 40], [20, 40]], "shape_type": "line"},
        {"label": "dog", "points": [[60, 5], [60.2, 5], [60.2, 5.2]]},
    ]
    root = write_labelme(tmp_path / "s", ("a", "b"), (), shapes, (64, 56))
    dataset, result = imported("labelme", root, background="lawn")
    truth, cat, lawn = dataset.train.truth(0), 1, 2
    ids = truth.segment_map
    assert [dataset.taxonomy.names[k] for k in truth.labels] == ["cat", "lawn"]
    assert (ids[14:20, 14:20] == 0).all() and (
        ids[0:10, 40:50] == 0
    ).all()  # ignored, on top of what is larger and beside it
    assert (ids[22:26, 22:26] == lawn).all() and ids[
        12, 12
    ] == cat  # labelled as background: a hole; a point on an object takes nothing from it
    assert ids[50, 50] == 0 and ids[40, 10] == 0 and ids[5, 60] == 0 and ids[30, 40] == lawn
    assert truth.areas[0] == 400 - 36 - 16
    assert result["dropped"] == {
        "shapes labelled __ignore__": 4,
        "shapes labelled _background_": 2,
        "points and lines": 6,
        "instances without a pixel": 2,
    }
    assert any(
        note.startswith("12 regions are void, neither learnt nor measured")
        for note in result["notes"]
    )


def test_coco_boxes_without_a_mask_and_ignored_objects_are_void(tmp_path):
    root = write_coco(tmp_path / "s")

    def edit(content):
        rows = content["annotations"]
        rows[0].update(
            segmentation=[], bbox=[0, 0, 6, 3]
        )  # the cat: only a box, over the dog's corner at no pixel
        rows[2].update(
            segmentation=None, bbox=[3, 3, 3, 3]
        )  # only a box, partly over the dog: the dog's mask is known
        rows[4].update(ignore=1)
        rows[5].update(
            segmentation=np.ravel(CORNERS["dog"]).tolist()
        )  # one polygon, not a list of them

    rewrite(root / "annotations.json", edit)
    dataset, result = imported("coco-instances", root, background="lawn", val_share=0.1)
    of = {
        images.name(i): images.truth(i).segment_map
        for images in (dataset.train, dataset.val)
        for i in range(images.annotated)
    }
    dog = scene_mask("dog")
    assert (
        (of["a.png"][:3, :6] == 0).all()
        and np.array_equal(of["a.png"] == 1, dog)
        and (of["a.png"] == 2).sum() == 120 - 18 - 20
    )
    assert (
        np.array_equal(of["b.png"] == 1, dog)
        and (of["b.png"] == 0).sum() == 9 - 4
        and of["b.png"][3, 3] == 0
    )
    assert (
        np.array_equal(of["c.png"] == 0, scene_mask("cat")) and (of["c.png"] == 1).sum() == 20 - 2
    )
    assert result["dropped"] == {
        "instances without a pixel": 2,
        "objects marked as to be ignored": 1,
    }


def test_an_image_turned_by_exif_is_annotated_as_it_is_shown(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    root = write_labelme(tmp_path / "s", ("a", "b"), ())
    for name in "ab":
        (root / f"{name}.png").unlink()
        Image.new("RGB", (10, 12)).save(
            root / f"{name}.jpg", exif=exif
        )  # stored 10 x 12, shown 12 x 10
    assert np.array_equal(imported("labelme", root)[0].train.truth(0).segment_map, scene_ids())
    for name in "ab":
        rewrite(
            root / f"{name}.json", lambda content: content.update(imageHeight=12, imageWidth=10)
        )
    import_refused("labelme", root, r"a.json: states an image of \(12, 10\), but it is \(10, 12\)")


def test_coco_keeps_crowd_ids_and_its_own_division(tmp_path):
    root = write_coco(tmp_path / "s")
    (root / "annotations.json").unlink()
    (root / "annotations").mkdir()
    whole = coco_content(long_runs)
    whole["annotations"][0]["iscrowd"] = 1
    whole["annotations"][3]["segmentation"] = []  # only a box
    for part, ids in (("train", (10, 11)), ("val", (12, 13))):
        rows = {
            "images": [i for i in whole["images"] if i["id"] in ids],
            "annotations": [a for a in whole["annotations"] if a["image_id"] in ids],
        }
        (root / "annotations" / f"instances_{part}2017.json").write_text(
            json.dumps({**whole, **rows})
        )
    (root / "annotations" / "captions_train2017.json").write_text("{}")
    (root / "val2017").mkdir()
    (root / "images" / "c.png").rename(root / "val2017" / "c.png")
    dataset, result = imported("coco-instances", root, val_share=0.9)
    assert (
        dataset.train.names.tolist() == ["a.png", "b.png"]
        and dataset.val.names.tolist() == ["c.png"]
        and not dataset.unlabeled
    )
    assert dataset.train.truth(0).crowd.tolist() == [True, False] and dataset.train.truth(
        1
    ).areas.tolist() == [16]
    assert result["dropped"] == {
        "instances without a pixel": 1,
        "validation images without annotation": 1,
    }
    assert [
        c["id"]
        for c in json.loads((tmp_path / "s-out" / "panoptic_val.json").read_text())["categories"]
    ] == [17, 3]


def write_layout(root, files, ids=(0, 1), before=()):
    """The JSON files of an export in COCO's format, by path -> file names that each lists; before:
    further categories."""
    for path, names in files.items():
        content = coco_content(lambda label: [np.ravel(CORNERS[label]).tolist()], names, ())
        content["categories"] = [
            *before,
            {"id": ids[0], "name": "cat", "supercategory": "pets"},
            {"id": ids[1], "name": "dog", "supercategory": "pets"},
        ]
        for place, a in enumerate(content["annotations"]):
            a["category_id"] = ids[place % 2]
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(json.dumps(content))
    return root


# JSON -> what it lists; where the pictures are; the names they get; numbers of labelled, unlabelled
# and validation images; what is left out.
LAYOUTS = {
    "roboflow": (
        {
            f"{part}/_annotations.coco.json": [f"{part}_{k}_png.rf.1.png" for k in range(2)]
            for part in ("train", "valid", "test")
        },
        [
            *(
                f"{part}/{part}_{k}_png.rf.1.png"
                for part in ("train", "valid", "test")
                for k in range(2)
            ),
            "train/bare.png",
        ],
        [
            "bare.png",
            "train_0_png.rf.1.png",
            "train_1_png.rf.1.png",
            "valid_0_png.rf.1.png",
            "valid_1_png.rf.1.png",
        ],
        (2, 1, 2),
        {"images of a test set": 2},
    ),
    "fiftyone": (
        {"labels.json": ["a.png", "in/b.png"]},
        ["data/a.png", "data/in/b.png", "data/bare.png"],
        ["a.png", "bare.png", "in_b.png"],
        (1, 1, 1),
        {},
    ),
    "label-studio": (
        {"result.json": ["images\\1f-a.png", "images\\2e-b.png"]},
        ["images/1f-a.png", "images/2e-b.png"],
        ["images_1f-a.png", "images_2e-b.png"],
        (1, 0, 1),
        {},
    ),
    "label-studio-path": (
        {"result.json": ["/data/upload/7/1f-a.png", "../../media/upload/7/2e-b.png"]},
        ["images/1f-a.png", "images/2e-b.png"],
        ["1f-a.png", "2e-b.png"],
        (1, 0, 1),
        {},
    ),
    "label-studio-url": (
        {"result.json": ["http://host/data/local-files/?d=x/a%20b.png", "s3://bucket/c.png"]},
        ["images/a b.png", "images/c.png"],
        ["a b.png", "c.png"],
        (1, 0, 1),
        {},
    ),
    "another-disk": (
        {"dataset.json": ["/home/bob/pictures/a.png", "C:\\pictures\\b.png"]},
        ["images/a.png", "images/b.png"],
        ["a.png", "b.png"],
        (1, 0, 1),
        {},
    ),
    "cvat": (
        {"annotations/instances_default.json": ["a.png", "b.png"]},
        ["images/default/a.png", "images/default/b.png"],
        ["a.png", "b.png"],
        (1, 0, 1),
        {},
    ),
    "cvat-subsets": (
        {
            f"annotations/instances_{part}.json": [f"{part[0]}.png"]
            for part in ("Train", "Validation")
        },
        [
            "images/Train/T.png",
            "images/Train/bare.png",
            "images/Validation/V.png",
            "images/Validation/bare2.png",
        ],
        ["T.png", "V.png", "bare.png"],
        (1, 1, 1),
        {"validation images without annotation": 1},
    ),
    "labelme2coco": (
        {"annotations.json": ["JPEGImages/a.png", "JPEGImages/b.png"]},
        [f"{folder}/{name}.png" for folder in ("JPEGImages", "Visualization") for name in "ab"],
        ["JPEGImages_a.png", "JPEGImages_b.png"],
        (1, 0, 1),
        {"pictures that no JSON lists": 2},
    ),
    "detection": (
        {f"annotations/{part}.json": [f"{part}.png"] for part in ("train", "val")},
        ["images/train/train.png", "images/val/val.png"],
        ["train.png", "val.png"],
        (1, 0, 1),
        {},
    ),
    "train-and-test": (
        {f"{part}/_annotations.coco.json": [f"{part}.png"] for part in ("train", "test")},
        ["train/train.png", "test/test.png"],
        ["test.png", "train.png"],
        (1, 0, 1),
        {},
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_exports_in_cocos_format_are_imported_as_they_are(layout, tmp_path):
    files, pictures, names, counts, left_out = LAYOUTS[layout]
    before = {
        "roboflow": ({"id": 5, "name": "pets", "supercategory": "none"},),
        "labelme2coco": ({"id": 7, "name": "_background_", "supercategory": None},),
    }.get(layout, ())
    root = write_layout(tmp_path / layout, files, before=before)
    for k, name in enumerate(pictures):
        photo(root / name, seed=k)
    dataset, result = imported("coco-instances", root, val_share=0.5)
    assert sorted(path.name for path in (tmp_path / f"{layout}-out" / "images").iterdir()) == names
    assert (result["labeled"], result["unlabeled"], result["val"]) == counts and result[
        "dropped"
    ] == left_out
    assert dataset.taxonomy.names == ("cat", "dog") and dataset.taxonomy.ids == (0, 1)
    assert np.array_equal(dataset.train.truth(0).segment_map, scene_ids()) and np.array_equal(
        dataset.val.truth(0).segment_map, scene_ids()
    )


def test_categories_of_files_are_joined_by_name_and_unused_ones_of_a_taken_name_are_left_out(
    tmp_path,
):
    root = write_layout(
        tmp_path / "s",
        {"train/_annotations.coco.json": ["a.png"]},
        (1, 2),
        ({"id": 0, "name": "cat", "supercategory": "none"},),
    )
    write_layout(
        root, {"valid/_annotations.coco.json": ["b.png"]}, (2, 1)
    )  # numbered the other way round
    photo(root / "train" / "a.png"), photo(root / "valid" / "b.png")
    dataset, result = imported("coco-instances", root)
    assert (
        dataset.taxonomy.names == ("cat", "dog")
        and dataset.taxonomy.ids == (1, 2)
        and dataset.val.truth(0).labels.tolist() == dataset.train.truth(0).labels.tolist() == [0, 1]
    )
    assert result["notes"] == [
        "category 0, 'cat', is left out: nothing uses it, and another has its name"
    ]
    rewrite(
        root / "train" / "_annotations.coco.json",
        lambda content: content["annotations"].append(
            {**content["annotations"][0], "category_id": 0}
        ),
    )
    import_refused(
        "coco-instances",
        root,
        r"category 1: the class 'cat' is called like the class 'cat'; rename one of them",
    )


def test_pictures_that_no_json_lists_are_unlabelled_images_where_listed_ones_lie(tmp_path):
    root = write_coco(tmp_path / "s")
    for name in (
        "images/more.png",
        "images/deeper/x.png",
        "images/masks/a.png",
        "unlabeled/u.png",
        "maps/a.png",
        "images/._a.png",
    ):
        photo(root / name)
    dataset, result = imported("coco-instances", root)
    assert [dataset.train.name(i) for i in dataset.unlabeled] == [
        "d.png",
        "deeper_x.png",
        "more.png",
        "unlabeled_u.png",
    ]
    assert (
        result["dropped"] == {"pictures that no JSON lists": 2}
        and "left out are the pictures in images/masks, maps: no JSON lists one there"
        in result["notes"][0]
    )


def test_one_file_under_two_ids_and_two_files_of_one_name(tmp_path):
    root = write_coco(tmp_path / "ids")

    def twice(content):
        content["images"][1]["file_name"] = "a.png"  # b's dog and cat are a's as well
        content["annotations"] = [
            a
            for a in content["annotations"]
            if (a["image_id"], a["category_id"]) not in ((10, 3), (11, 17))
        ]

    rewrite(root / "annotations.json", twice)
    dataset, result = imported("coco-instances", root)
    assert (
        result["dropped"] == {"entries of images that are listed twice (joined)": 1}
        and result["unlabeled"] == 2
    )  # b.png, d.png
    truth = {
        images.name(i): images.truth(i).segment_map
        for images in (dataset.train, dataset.val)
        for i in range(images.annotated)
    }
    assert sorted(truth) == ["a.png", "c.png"] and np.array_equal(truth["a.png"], scene_ids())
    root = write_layout(
        tmp_path / "names",
        {f"annotations/instances_{part}2017.json": ["00.png"] for part in ("train", "val")},
    )
    photo(root / "train2017" / "00.png", seed=1), photo(root / "val2017" / "00.png", seed=2)
    dataset, result = imported("coco-instances", root)
    assert (dataset.train.names.tolist(), dataset.val.names.tolist()) == (
        ["train2017_00.png"],
        ["val2017_00.png"],
    )
    assert (tmp_path / "names-out" / "images" / "val2017_00.png").samefile(
        root / "val2017" / "00.png"
    ) and "2 images share their names" in result["notes"][0]
    (root / "annotations" / "instances_val2017.json").unlink()
    import_refused(
        "coco-instances",
        root,
        r"'00.png' is .*train2017/00.png as well as .*val2017/00.png; put the folder into",
    )


def test_an_image_of_the_training_and_the_validation_file_is_for_validation_alone(tmp_path):
    files = {"annotations/train.json": ["a.png", "b.png"], "annotations/val.json": ["b.png"]}
    root = write_layout(tmp_path / "s", files)
    for name in "abc":
        photo(root / "images" / f"{name}.png")
    dataset, result = imported("coco-instances", root)
    assert (dataset.train.names.tolist(), dataset.val.names.tolist()) == (
        ["a.png", "c.png"],
        ["b.png"],
    )
    assert result["dropped"] == {"entries of train.json whose image val has, too": 1}


def test_images_that_differ_by_their_endings_or_folders_alone_get_names_of_their_own(tmp_path):
    root = write_labelme(tmp_path / "s")
    (
        photo(root / "d.jpg", seed=8),
        photo(root / "x" / "d.png", seed=9),
        photo(root / "x_d.png", seed=10),
    )
    dataset, result = imported("labelme", root)
    assert [dataset.train.name(i) for i in dataset.unlabeled] == [
        "d.jpg",
        "d_png.png",
        "x_d.png",
        "x_d_png.png",
    ]
    assert (tmp_path / "s-out" / "images" / "d_png.png").samefile(
        root / "d.png"
    ) and "2 images are renamed" in result["notes"][0]


def test_linked_folders_are_followed_and_said_but_a_linked_file_may_not_lead_out(tmp_path):
    root, elsewhere = write_masks(tmp_path / "s"), tmp_path / "elsewhere"
    (root / "masks" / "dog").rename(elsewhere)
    (root / "masks" / "dog").symlink_to(elsewhere)
    (elsewhere / "again").symlink_to(elsewhere)  # a loop
    dataset, result = imported("masks", root)
    assert np.array_equal(dataset.train.truth(0).segment_map, scene_ids()) and result["notes"] == [
        f"1 linked folders are followed: masks/dog -> {elsewhere}"
    ]
    (elsewhere / "a.png").rename(elsewhere / "a")
    (elsewhere / "a.png").symlink_to(elsewhere / "a")  # inside of the linked folder
    importer.import_folder("masks", root, tmp_path / "two")
    shutil.copy(elsewhere / "a", tmp_path / "out.png")
    (elsewhere / "a.png").unlink()
    (elsewhere / "a.png").symlink_to(tmp_path / "out.png")
    import_refused(
        "masks", root, r"dog/a.png: is a link that leads out of the source, to .*out.png"
    )
    for kind, write in (
        ("labelme", write_labelme),
        ("coco-instances", write_coco),
        ("cityscapes", write_cityscapes),
    ):
        source = write(tmp_path / kind)
        folder = {
            "labelme": source / "day",
            "coco-instances": source / "images",
            "cityscapes": source / "leftImg8bit",
        }[kind]
        if kind == "labelme":
            write_labelme(folder)
        folder.rename(tmp_path / f"{kind}-there")
        folder.symlink_to(tmp_path / f"{kind}-there")
        assert imported(kind, source)[1]["labeled"] == {"labelme": 5}.get(kind, 2)


def test_stuff_is_one_segment_of_its_class_and_is_no_crowd(tmp_path):
    shapes = [
        {"label": label, "points": [[x, 2], [x + 2, 4]], "shape_type": "rectangle"}
        for label, x in (("road", 0), ("cat", 3), ("road", 6), ("cat", 9))
    ]
    root = write_labelme(tmp_path / "s", ("a", "b"), (), shapes)
    dataset, result = imported("labelme", root, stuff="road", background="lawn")
    truth = dataset.train.truth(0)
    assert [
        (dataset.taxonomy.names[k], area) for k, area in zip(truth.labels, truth.areas.tolist())
    ] == [("road", 8), ("cat", 4), ("cat", 4), ("lawn", 104)]
    assert dict(zip(dataset.taxonomy.names, dataset.taxonomy.things)) == {
        "cat": True,
        "road": False,
        "lawn": False,
    }
    assert (truth.segment_map[2:4, [0, 1, 6, 7]] == 1).all() and result["instances"] == {
        "cat": 4,
        "road": 2,
        "lawn": 2,
    }
    import_refused(
        "labelme", root, r"--stuff rod: no such class; available: cat, road", stuff="road,rod"
    )
    city = write_cityscapes(tmp_path / "city")
    dataset, _ = imported("cityscapes", city, stuff="person")
    assert not dataset.taxonomy.things[dataset.taxonomy.names.index("person")]
    coco = write_coco(tmp_path / "coco" / "s")
    rewrite(
        coco / "annotations.json",
        lambda content: [a.update(iscrowd=1) for a in content["annotations"]] and None,
    )
    import_refused(
        "coco-instances",
        coco,
        r"all 6 instances are crowd .*; if they are single objects, set it to 0: sed",
    )
    dataset, _ = imported("coco-instances", coco, stuff="cat, dog")  # all of it is stuff
    assert not any(dataset.taxonomy.things) and not dataset.train.truth(0).crowd.any()
    rewrite(coco / "annotations.json", lambda content: content["annotations"][0].update(iscrowd=0))
    result = importer.import_folder("coco-instances", coco, tmp_path / "some")
    assert result["notes"] == [
        "5 of 6 instances are crowd, neither learnt nor measured; nothing else is there of ['dog']"
    ]


def test_cityscapes_has_stuff_groups_and_void(tmp_path):
    values = np.zeros((10, 12), int)
    values[:3], values[3:5, :6], values[3:5, 6:], values[6, :4], values[7, :4] = (
        23,
        26_003,
        26,
        29_001,
        7,
    )
    values[8, :2], values[9, :2], values[9, 5], values[9, 6] = (
        7,
        65_535,
        9,
        7_001,
    )  # stuff has no instances: void
    dataset, result = imported("cityscapes", write_cityscapes(tmp_path / "s", values))
    truth = dataset.train.truth(0)
    names = [dataset.taxonomy.names[k] for k in truth.labels]
    assert sorted(zip(names, truth.areas.tolist(), truth.crowd.tolist())) == [
        ("car", 12, False),
        ("car", 12, True),
        ("road", 6, False),
        ("sky", 36, False),
    ]
    assert (
        (truth.segment_map > 0).sum() == 66
        and len(dataset.taxonomy) == 19
        and sum(dataset.taxonomy.things) == 8
    )
    assert (
        dataset.taxonomy.colours[dataset.taxonomy.names.index("car")] == (0, 0, 142)
        and result["instances"]["truck"] == 0
    )
    assert (
        dataset.train.names.tolist()[2:]
        == ["trier_000000_000019_leftImg8bit.png"]
        == [dataset.train.name(i) for i in dataset.unlabeled]
    )
    import_refused(
        "cityscapes",
        tmp_path / "s",
        "--background: Cityscapes has stuff of its own",
        background="rest",
    )


def test_masks_may_have_16_bits_a_palette_or_one_class(tmp_path):
    assert np.array_equal(
        imported("masks", write_masks(tmp_path / "deep", 40_000))[0].train.truth(0).segment_map,
        scene_ids(),
    )
    root = write_masks(tmp_path / "flat")
    shutil.rmtree(root / "masks")
    (root / "masks").mkdir()
    for name in "abc":
        image = Image.fromarray(np.array([0, 3, 200], np.uint8)[scene_ids()])
        image.putpalette([0] * 768)  # every colour is black: only the indices tell
        image.save(root / "masks" / f"{name}.png")
    photo(root / "images" / "deeper" / "x.png")
    dataset, result = imported("masks", root, masks_are="instances")
    assert (
        result["dropped"] == {"images in folders of images/": 1}
        and dataset.taxonomy.names == ("object",)
        and np.array_equal(dataset.train.truth(0).segment_map, scene_ids())
        and len(dataset.unlabeled) == 1
    )


def masks_scene(root, form, array, names="abc", **more):
    """images/a.png to d.png, and an array as the mask of some of them, at masks/`form`."""
    for k, name in enumerate("abcd"):
        photo(root / "images" / f"{name}.png", seed=k)
    for name in names:
        path = root / "masks" / form.format(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".npy":
            np.save(path, array)
        else:
            image = Image.fromarray(array)
            if "palette" in more:
                image.putpalette(more["palette"])
            image.save(path, **{key: value for key, value in more.items() if key != "palette"})
    return root


def two_squares():
    squares = np.zeros((10, 12), np.uint8)
    squares[1:4, 1:4] = squares[6:9, 6:10] = 255
    return squares


def test_a_map_of_classes_is_read_with_its_names_and_is_never_guessed_to_be_instances(tmp_path):
    ids = np.zeros((10, 12), np.uint8)
    ids[:3], ids[3], ids[5:8, :3], ids[5:8, 6:9] = 15, 255, 3, 3
    palette = [*[0] * 765, 224, 224, 192]  # of 255, as in Pascal VOC
    voc = masks_scene(tmp_path / "voc", "{}.png", ids, palette=palette)
    ade = masks_scene(tmp_path / "ade", "{}.png", np.where(ids == 255, 0, ids).astype(np.uint8))
    for root in (voc, ade):
        import_refused(
            "masks",
            root,
            r"may be classes or instances .*say --masks-are classes, with --classes NAME,NAME",
        )
    import_refused(
        "masks", voc, r"nothing says what the values mean; expected --classes", masks_are="classes"
    )
    import_refused(
        "masks", voc, r"has the value 3, which has no name", masks_are="classes", classes="15:sky"
    )
    dataset, result = imported(
        "masks", voc, masks_are="classes", classes="3:cat,15:sky", background="lawn"
    )
    expected = np.select([ids == 3, ids == 15, ids == 255], [1, 2, 0], 3)
    assert (
        np.array_equal(dataset.train.truth(0).segment_map, expected)
        and dataset.taxonomy.names == ("cat", "sky", "lawn")
        and not any(dataset.taxonomy.things)
    )
    assert (
        dataset.taxonomy.ids == (3, 15, 16)
        and "classes without --stuff: each is stuff, one segment an image" in result["notes"]
    )
    result = importer.import_folder(
        "masks", voc, tmp_path / "things", masks_are="classes", classes="3:cat,15:sky", stuff="sky"
    )
    assert result["instances"] == {"cat": 6, "sky": 3}  # each connected region
    (ade / "classes.txt").write_text("".join(f"c{k}\n" for k in range(1, 16)))
    result = importer.import_folder("masks", ade, tmp_path / "listed")
    assert (
        result["instances"]["c3"] == result["instances"]["c15"] == 3
        and "masks: taken as maps of classes, since their values have names" in result["notes"][0]
    )
    (ade / "classes.txt").write_text("background\n" + "".join(f"c{k}\n" for k in range(1, 16)))
    assert importer.import_folder("masks", ade, tmp_path / "from-zero")["instances"]["c3"] == 3
    result = importer.import_folder("masks", voc, tmp_path / "instances", masks_are="instances")
    assert result["instances"] == {"object": 6} and any(
        "3 regions are void" in note for note in result["notes"]
    )  # 255 of this palette is void
    zero = masks_scene(tmp_path / "zero", "{}.png", (ids == 3).astype(np.uint8))
    assert importer.import_folder(
        "masks", zero, tmp_path / "zero-named", masks_are="classes", classes="0:road,1:cat"
    )["instances"] == {"road": 3, "cat": 3}


def test_binary_masks_are_guessed_and_said_and_grey_edges_become_no_instances(tmp_path):
    hard = masks_scene(tmp_path / "hard", "disc/{}.png", two_squares())
    dataset, result = imported("masks", hard)
    assert (
        dataset.train.truth(0).areas.tolist() == [9, 12]
        and "masks/disc: taken as binary masks, each connected region an instance"
        in result["notes"][0]
    )
    assert importer.import_folder("masks", hard, tmp_path / "one", masks_are="instances")[
        "instances"
    ] == {"disc": 3}
    assert importer.import_folder("masks", hard, tmp_path / "stuff", stuff="disc")["instances"] == {
        "disc": 3
    }
    for steps in (4, 255):  # of a supersampled edge, and of a smooth one
        grey = np.zeros((10, 12))
        grey[2:8, 2:8] = 255
        grey[2] = grey[2] * np.linspace(
            0.2, 0.8, 12
        )  # the upper edge: half of white is between the columns 5 and 6
        soft = (np.round(grey / 255 * steps) / steps * 255).astype(np.uint8)
        dataset, result = imported(
            "masks", masks_scene(tmp_path / f"soft{steps}", "disc/{}.png", soft)
        )
        assert (
            dataset.train.truth(0).areas.tolist() == [(soft >= 128).sum()]
            and "3 of 3 masks have grey levels between black and white" in result["notes"][0]
        )
    jpeg = masks_scene(tmp_path / "jpeg", "disc/{}.jpg", two_squares(), quality=60)
    dataset, result = imported("masks", jpeg)
    assert dataset.train.truth(0).areas.tolist() == [9, 12] and "grey levels" in result["notes"][0]
    import_refused(
        "masks",
        jpeg,
        r"disc/a.jpg: JPEG keeps no exact values; .*, or say --masks-are binary",
        masks_are="instances",
    )
    result = importer.import_folder(
        "masks",
        masks_scene(
            tmp_path / "grey", "disc/{}.png", np.where(two_squares(), 15, 0).astype(np.uint8)
        ),
        tmp_path / "weak",
        masks_are="binary",
    )
    assert result["instances"] == {"disc": 6}


@pytest.mark.parametrize(
    "form", ["disc/{}/one.png", "{}/one.png", "disc/{}_1.png", "{}_1.png", "disc/{}-mask-1.png"]
)
def test_one_file_may_be_one_instance(form, tmp_path):
    root, label = tmp_path / "s", "disc" if form.startswith("disc") else "object"
    first, second = two_squares(), two_squares()
    first[5:], second[:5] = 0, 0
    masks_scene(root, form, first)
    masks_scene(root, form.replace("1", "2").replace("one", "two"), second)
    dataset, result = imported("masks", root)
    assert (
        dataset.train.truth(0).areas.tolist() == [9, 12]
        and result["instances"] == {label: 6}
        and "6 files are taken for one instance each" in result["notes"][0]
    )
    masks_scene(root, "disc/{}.png", two_squares(), "d")  # now a folder of maps as well
    if form == "disc/{}_1.png":
        import_refused("masks", root, r"disc/a_1.png: expected masks/CLASS/NAME.png, and an image")


@pytest.mark.parametrize(
    "lines, areas",
    [
        (["0 background", "1 road", "2 car"], {"road": 10, "car": 12, "lawn": 98}),
        (["0, background", "1, road", "2, car"], {"road": 10, "car": 12, "lawn": 98}),
        (["1\troad", "2\tcar"], {"road": 10, "car": 12, "lawn": 98}),
        (["unlabeled", "road", "car"], {"road": 10, "car": 12}),
        (["void", "road", "car"], {"road": 10, "car": 12}),
        (["road", "car"], {"road": 10, "car": 12, "lawn": 98}),
        (["2 wheeler", "car"], {"2 wheeler": 10, "car": 12, "lawn": 98}),
    ],
)
def test_a_list_of_classes_may_have_numbers_or_begin_with_what_is_none(lines, areas, tmp_path):
    ids = np.zeros((10, 12), np.uint8)
    ids[:, 11], ids[0, :11], ids[1, 0] = 1, 2, 2
    root = masks_scene(tmp_path / "s", "{}.png", ids)
    (root / "classes.txt").write_text("\n".join(lines))
    dataset, _ = imported("masks", root, background="lawn")
    truth = dataset.train.truth(0)
    names = [dataset.taxonomy.names[k] for k in truth.labels]
    assert dict(zip(names, truth.areas.tolist())) == areas


def test_values_that_are_taken_for_instances_of_a_class_are_said(tmp_path):
    ids = np.where(two_squares(), scene_ids() + 1, 0).astype(np.uint8)
    ids[6:9] = np.where(ids[6:9], 255, 0)
    _, result = imported("masks", masks_scene(tmp_path / "s", "disc/{}.png", ids))
    assert "masks/disc: every value is taken for an instance" in " ".join(result["notes"])


def test_polygons_in_shares_of_the_image_are_refused(tmp_path):
    def shares(content):
        for a in content["annotations"]:
            a["segmentation"] = [[0.1, 0.1, 0.5, 0.1, 0.5, 1]]

    root = SCENES["coco-instances"](tmp_path / "s")
    rewrite(root / "annotations.json", shares)
    import_refused("coco-instances", root, r"no point of a polygon is above 1, .*expected pixels")


def test_masks_of_what_is_no_class_are_void_or_background(tmp_path):
    squares, one = two_squares(), np.zeros((10, 12), np.uint8)
    one[:, 11] = 255
    for name in ("__ignore__", "_background_"):
        root = masks_scene(tmp_path / name, "disc/{}.png", squares)
        masks_scene(root, name + "/{}.png", one)
        dataset, _ = imported("masks", root, background="lawn")
        truth = dataset.train.truth(0)
        void = 10 if name == "__ignore__" else 0
        assert dataset.taxonomy.names == ("disc", "lawn")
        assert truth.areas.tolist() == [9, 12, 120 - 9 - 12 - void]


@pytest.mark.parametrize("white", [1, 2, 128, 200, 255, 65535])
def test_the_one_value_of_a_class_is_white_whatever_its_number(white, tmp_path):
    kind = np.uint16 if white > 255 else np.uint8
    squares = np.where(two_squares(), white, 0).astype(kind)
    dataset, result = imported("masks", masks_scene(tmp_path / "s", "disc/{}.png", squares))
    assert dataset.train.truth(0).areas.tolist() == [9, 12]
    assert "masks/disc: taken as binary masks" in result["notes"][0]
    if white in (1, 255, 65535):
        flat = masks_scene(tmp_path / "flat", "{}.png", squares)
        assert importer.import_folder("masks", flat, tmp_path / "o")["instances"] == {"object": 6}


def test_binary_masks_may_have_a_palette_with_white_first_or_an_alpha_channel(tmp_path):
    squares = two_squares()
    inverse = np.where(squares, 0, 1).astype(np.uint8)
    palette = [255, 255, 255, 0, 0, 0]  # index 0 is white
    root = masks_scene(tmp_path / "palette", "disc/{}.png", inverse, palette=palette)
    assert imported("masks", root)[0].train.truth(0).areas.tolist() == [9, 12]
    opaque = np.full_like(squares, 255)
    for layers in ((squares,) * 3, (squares,)):
        array = np.dstack([*layers, opaque])
        root = masks_scene(tmp_path / f"alpha{len(layers)}", "disc/{}.png", array)
        assert imported("masks", root)[0].train.truth(0).areas.tolist() == [9, 12]
    clear = np.dstack([opaque, opaque, opaque, squares])
    root = masks_scene(tmp_path / "clear", "disc/{}.png", clear)
    import_refused("masks", root, r"expected a map of whole numbers with one channel")


@pytest.mark.parametrize(
    "form, kind",
    [
        ("cat/{}.tif", np.uint16),
        ("cat/{}.tif", np.int32),
        ("cat/{}.tif", np.float32),
        ("cat/{}.npy", np.int64),
        ("cat/{}_mask.png", np.uint8),
        ("cat/{}.png.png", np.uint8),
    ],
)
def test_maps_of_instances_may_be_tiff_or_arrays_with_many_bits(form, kind, tmp_path):
    ids = scene_ids() * (1 if kind == np.uint8 else 300)
    dataset, _ = imported("masks", masks_scene(tmp_path / "s", form, ids.astype(kind)))
    assert np.array_equal(dataset.train.truth(0).segment_map, scene_ids())
    if kind == np.float32:
        masks_scene(tmp_path / "s", form, ids.astype(kind) + np.float32(0.5))
        import_refused(
            "masks",
            tmp_path / "s",
            r"cat/a.tif: float32 of shape \(10, 12\), expected a map of whole numbers",
        )


def test_masks_may_be_divided_into_training_and_validation(tmp_path):
    root = tmp_path / "s"
    for part in ("train", "val"):
        photo(root / "images" / part / "0.png")
        (root / "masks" / part / "cat").mkdir(parents=True)
        Image.fromarray(scene_mask("cat").astype(np.uint8)).save(
            root / "masks" / part / "cat" / "0.png"
        )
    dataset, _ = imported("masks", root)
    assert (dataset.train.names.tolist(), dataset.val.names.tolist()) == (
        ["images_train_0.png"],
        ["images_val_0.png"],
    )
    assert dataset.train.truth(0).areas.tolist() == [16]


@pytest.mark.parametrize("kind", ["labelme", "coco-instances", "masks"])
def test_other_pixels_are_one_segment_of_the_named_background(kind, tmp_path):
    dataset, _ = imported(kind, SCENES[kind](tmp_path / "s"), background="lawn")
    truth, k = dataset.train.truth(0), dataset.taxonomy.names.index("lawn")
    assert (
        truth.areas.tolist() == [16, 18, 120 - 34]
        and truth.labels[2] == k
        and not dataset.taxonomy.things[k]
    )
    assert dataset.taxonomy.ids[k] == 1 + max(
        i for i in dataset.taxonomy.ids if i != dataset.taxonomy.ids[k]
    ) and np.array_equal(truth.segment_map, np.where(scene_ids() == 0, 3, scene_ids()))


def test_of_two_segments_the_smaller_is_on_top_and_what_is_hidden_is_counted(tmp_path):
    square = lambda label, left, top, side: {
        "label": label,
        "points": [[left, top], [left + side, top + side]],
        "shape_type": "rectangle",
    }
    for name, order in (("one", 1), ("two", -1)):
        shapes = [
            square("big", 0, 0, 8),
            square("small", 2, 2, 3),
            square("hidden", 2, 2, 4),
            square("cover", 4, 2, 2),
            square("cover", 2, 4, 2),
            square("cover", 4, 4, 2),
            square("top", 2, 2, 2),
        ][::order]
        dataset, result = imported(
            "labelme", write_labelme(tmp_path / name, ("a", "b"), (), shapes)
        )
        truth = dataset.train.truth(0)
        areas = {dataset.taxonomy.names[k]: area for k, area in zip(truth.labels, truth.areas)}
        assert (
            sorted(truth.areas.tolist()) == [4, 4, 4, 4, 48]
            and areas["big"] == 48
            and areas["top"] == 4
            and "hidden" not in areas
            and "small" not in areas
        )
        assert (
            result["dropped"] == {"instances hidden below others": 4}
            and np.bincount(truth.segment_map.ravel())[1:].tolist() == truth.areas.tolist()
        )


def test_the_share_for_validation_is_drawn_by_seed(tmp_path):
    root = write_labelme(tmp_path / "s", [f"{k:02}" for k in range(10)])
    chosen = lambda name, **flags: (
        importer.import_folder("labelme", root, tmp_path / name, **flags),
        json.loads((tmp_path / name / "panoptic_val.json").read_text()),
    )
    sets = {
        name: {i["file_name"] for i in chosen(name, val_share=0.3, seed=seed)[1]["images"]}
        for name, seed in (("a", 0), ("b", 0), ("c", 1))
    }
    assert sets["a"] == sets["b"] != sets["c"] and len(sets["a"]) == 3
    assert sets["a"] == {f"{k:02}.png" for k in np.random.default_rng(0).permutation(10)[:3]}
    assert (
        chosen("least", val_share=0.001)[0]["val"] == 1
        and chosen("most", val_share=0.999)[0]["labeled"] == 1
    )


def edit_json(name, change):
    return lambda root: rewrite(root / name, change)


def edit_shape(**fields):
    return edit_json("b.json", lambda content: content["shapes"][1].update(fields))


def edit_annotation(**fields):
    return edit_json("annotations.json", lambda content: content["annotations"][1].update(fields))


def save(name, array):
    return lambda root: Image.fromarray(array).save(root / name)


IMPORT_FAULTS = [
    (
        "labelme",
        lambda root: (root / "b.json").write_text("{"),
        r"b.json: not a readable JSON file",
    ),
    (
        "labelme",
        lambda root: (root / "b.json").write_text("[" * 100_000),
        r"b.json: not a readable JSON file",
    ),
    ("labelme", lambda root: (root / "z.json").write_text("[1]"), r"z.json: has no list `shapes`"),
    (
        "labelme",
        lambda root: [path.unlink() for path in root.glob("*.json")],
        r"no \*.json in this folder",
    ),
    (
        "labelme",
        lambda root: [(root / f"{name}.json").unlink() for name in "ab"],
        r"s: 1 images with a segment; expected at least 2",
    ),
    (
        "labelme",
        lambda root: [
            rewrite(path, lambda content: content.update(shapes=[])) for path in root.glob("*.json")
        ],
        r"not one instance with a pixel",
    ),
    (
        "labelme",
        edit_shape(points=[[1, 1], [float("nan"), 2], [3, 3]]),
        r"b.json: shapes\[1\]: points .*expected pairs of numbers",
    ),
    ("labelme", edit_shape(points=[[1, 1], [1e9, 2], [3, 3]]), r"shapes\[1\]: points .*12 x 10"),
    ("labelme", edit_shape(points=[[1, 1], [1], [3, 3]]), r"shapes\[1\]: points"),
    ("labelme", edit_shape(points={"x": 1}), r"shapes\[1\]: points"),
    ("labelme", edit_shape(shape_type=[]), r"shapes\[1\]"),
    ("labelme", edit_shape(shape_type={"a": 1}), r"shapes\[1\] has shape_type"),
    ("labelme", edit_shape(shape_type="circle"), r"shapes\[1\]: a circle of 4 points, expected 2"),
    (
        "labelme",
        edit_shape(shape_type="mask", points=[[0, 0], [1, 1]], mask="no"),
        r"shapes\[1\]: its mask 'no' is no PNG",
    ),
    ("labelme", edit_shape(label=None), r"shapes\[1\] is .*expected an object with label"),
    ("labelme", edit_shape(label=" , x"), r"shapes\[1\]: ' , x' cannot be the name of a class"),
    ("labelme", edit_shape(label="cat, kitten"), r"'cat, kitten' is called like the class 'cat'"),
    ("labelme", edit_shape(label="rest"), r"'rest' is called like the background"),
    ("labelme", edit_shape(group_id=[1]), r"shapes\[1\] is "),
    (
        "labelme",
        edit_json("b.json", lambda content: content["shapes"].append(3)),
        r"shapes\[2\] is 3",
    ),
    (
        "labelme",
        edit_json("b.json", lambda content: content.update(imageWidth=13)),
        r"b.json: states an image of \(10, 13\), but it is \(10, 12\)",
    ),
    (
        "labelme",
        edit_json("b.json", lambda content: content.update(imagePath="a.png")),
        r"b.json: its image 'a.png' has another JSON already",
    ),
    (
        "labelme",
        lambda root: (root / "b.png").unlink(),
        r"b.json: imagePath 'b.png' is not there, no image is called b and imageData is empty",
    ),
    (
        "labelme",
        lambda root: [
            (root / "b.png").unlink(),
            rewrite(root / "b.json", lambda content: content.update(imagePath="../b.png")),
        ],
        r"b.json: .*leads out of its folder",
    ),
    (
        "labelme",
        lambda root: [
            (root / "b.png").unlink(),
            rewrite(root / "b.json", lambda content: content.update(imageData="bm8=")),
        ],
        r"imageData is no image",
    ),
    ("labelme", lambda root: (root / "d.png").write_bytes(b"no"), r"d.png: not a readable image"),
    (
        "labelme",
        lambda root: [
            photo(root / "b.jpg"),
            rewrite(root / "b.json", lambda content: content.update(imagePath="gone.png")),
        ],
        r"b.json: imagePath 'gone.png' is not there, and b.jpg and b.png have the stem of this JSON",
    ),
    (
        "labelme",
        lambda root: [
            (root / "d.png").rename(root.parent / "d.png"),
            (root / "d.png").symlink_to(root.parent / "d.png"),
        ],
        r"d.png: is a link that leads out of the source, to .*d.png; expected a file",
    ),
    ("labelme", lambda root: photo(root / f"{'n' * 240}.png"), r"rename the image"),
    (
        "coco-instances",
        lambda root: (root / "annotations.json").write_text("{}"),
        r"annotations.json: key 'images' is missing",
    ),
    (
        "coco-instances",
        lambda root: (root / "other.json").write_text("{}"),
        r"s: .*annotations.json.*expected instances_train\*.json",
    ),
    (
        "coco-instances",
        lambda root: (root / "images" / "b.png").unlink(),
        r"images/b.png: no such file, nor in .*train2017, .*val2017, ",
    ),
    (
        "coco-instances",
        edit_json(
            "annotations.json", lambda content: content["images"][1].update(file_name="../b.png")
        ),
        r"image 11: file_name '../b.png' leads out",
    ),
    (
        "coco-instances",
        edit_json("annotations.json", lambda content: content["images"][1].update(file_name=5)),
        r"image 11: file_name 5 is not a file name",
    ),
    (
        "coco-instances",
        edit_json("annotations.json", lambda content: content["images"][1].update(id=10)),
        r"has the id of another image",
    ),
    (
        "coco-instances",
        edit_json("annotations.json", lambda content: content["images"].append([])),
        r"images\[4\] is \[\]",
    ),
    (
        "coco-instances",
        edit_json("annotations.json", lambda content: content["images"][1].update(height=12)),
        r"states \(12, 12\) for image b.png, but it is \(10, 12\)",
    ),
    (
        "coco-instances",
        edit_annotation(image_id=77),
        r"annotations\[1\] is of image 77, which is not among the images",
    ),
    ("coco-instances", edit_annotation(image_id=[]), r"annotations\[1\] is "),
    ("coco-instances", edit_annotation(category_id=4), r"annotations\[1\] has category 4"),
    (
        "coco-instances",
        edit_annotation(segmentation=[[1, 2, 3, 4, 5]]),
        r"annotations\[1\]: points",
    ),
    (
        "coco-instances",
        edit_annotation(segmentation=[[1, 2, 3, float("inf"), 5, 6]]),
        r"annotations\[1\]: points",
    ),
    ("coco-instances", edit_annotation(segmentation=[None]), r"annotations\[1\]: points None"),
    ("coco-instances", edit_annotation(segmentation="3"), r"annotations\[1\]: segmentation '3'"),
    ("coco-instances", edit_annotation(iscrowd=2), r"iscrowd 2; expected"),
    (
        "coco-instances",
        edit_annotation(segmentation={"size": [12, 10], "counts": [120]}),
        r"annotations\[1\]: run lengths .*\[10, 12\]",
    ),
    (
        "coco-instances",
        edit_annotation(segmentation={"size": [10, 12], "counts": [60, 61]}),
        r"annotations\[1\]: run lengths .*do not fill it",
    ),
    (
        "coco-instances",
        edit_annotation(segmentation={"size": [10, 12], "counts": [-60, 180]}),
        r"annotations\[1\]: run lengths",
    ),
    (
        "coco-instances",
        edit_annotation(segmentation={"size": [10, 12], "counts": "~"}),
        r"annotations\[1\]: run lengths",
    ),
    (
        "coco-instances",
        edit_annotation(segmentation={"size": 3, "counts": [10]}),
        r"annotations\[1\]: run lengths",
    ),
    (
        "coco-instances",
        edit_annotation(segmentation={"counts": [10]}),
        r"annotations\[1\]: run lengths",
    ),
    (
        "coco-instances",
        edit_json("annotations.json", lambda content: content["categories"][0].update(id=-1)),
        r"category .*whole number from 0 on",
    ),
    (
        "coco-instances",
        edit_json("annotations.json", lambda content: content["categories"][0].update(id=3)),
        r"category .*of one category",
    ),
    (
        "coco-instances",
        edit_json("annotations.json", lambda content: content["categories"][0].update(name="rest")),
        r"'rest' is called like the background",
    ),
    (
        "coco-instances",
        edit_json(
            "annotations.json", lambda content: content["categories"][0].pop("name") and None
        ),
        r"None cannot be the name of a class",
    ),
    (
        "cityscapes",
        lambda root: shutil.rmtree(root / "leftImg8bit"),
        r"leftImg8bit: no PART/CITY/\*_leftImg8bit.png",
    ),
    (
        "cityscapes",
        lambda root: shutil.rmtree(root / "gtFine" / "val"),
        r"2 labelled training and 0 labelled validation images, 1 validation images without annotation",
    ),
    (
        "cityscapes",
        save(
            "gtFine/train/ulm/ulm_000000_000019_gtFine_instanceIds.png",
            np.zeros((10, 13), np.uint16),
        ),
        r"13 x 10 pixels, but its image has 12 x 10",
    ),
    (
        "cityscapes",
        save(
            "gtFine/train/ulm/ulm_000000_000019_gtFine_instanceIds.png",
            np.eye(12, 3, dtype=np.uint8)[:10, None].repeat(12, 1),
        ),
        r"expected a map of whole numbers",
    ),
    ("masks", lambda root: shutil.rmtree(root / "images"), r"images: no images in this folder"),
    (
        "masks",
        save("masks/cat/e.png", np.zeros((10, 12), np.uint8)),
        r"cat/e.png: expected masks/CLASS/NAME.png, and an image",
    ),
    (
        "masks",
        save("masks/cat/a.tif", np.zeros((10, 12), np.uint8)),
        r"cat/a.tif: .*cat/a.png is the map of this class and image already",
    ),
    (
        "masks",
        save("masks/cat/a.png", np.eye(12, 3, dtype=np.uint8)[:10, None].repeat(12, 1)),
        r"cat/a.png: uint8 of shape \(10, 12, 3\), expected a map",
    ),
    (
        "masks",
        save("masks/cat/a.png", np.zeros((12, 10), np.uint8)),
        r"cat/a.png: 10 x 12 pixels, but its image has 12 x 10",
    ),
    (
        "masks",
        lambda root: (root / "masks" / "cat" / "a.png").write_bytes(b""),
        r"cat/a.png: not a readable image",
    ),
    ("masks", lambda root: shutil.rmtree(root / "masks"), r"not one instance with a pixel"),
    (
        "masks",
        lambda root: (root / "masks" / "cat").rename(root / "masks" / "rest"),
        r"'rest' is called like the background",
    ),
]


@pytest.mark.parametrize(
    "kind, break_it, words",
    IMPORT_FAULTS,
    ids=[f"{kind}-{k}" for k, (kind, *_) in enumerate(IMPORT_FAULTS)],
)
def test_faulty_annotations_get_one_clear_line(kind, break_it, words, tmp_path):
    root = SCENES[kind](tmp_path / "s")
    flags = {} if kind == "cityscapes" else {"background": "rest"}
    importer.import_folder(kind, root, tmp_path / "sound", **flags)
    break_it(root)
    import_refused(kind, root, words, **flags)


def test_nothing_that_exists_is_overwritten_and_nothing_of_the_source_is_changed(tmp_path):
    root = write_labelme(tmp_path / "s")
    before = fingerprint(root)
    importer.import_folder("labelme", root, tmp_path / "out")
    there = fingerprint(tmp_path / "out")
    with pytest.raises(
        UserError, match=r"panoptic_train.json: exists already; choose another folder with --out"
    ):
        importer.import_folder("labelme", root, tmp_path / "out")
    mark = json.dumps({"from": "labelme", "input": str(root.resolve()), "background": ""})
    (tmp_path / "out" / "import.part").write_text(
        mark
    )  # killed between the last JSON and the removal of the mark: it is whole
    with pytest.raises(
        UserError, match=r"panoptic_train.json: exists already; choose another folder with --out"
    ):
        importer.import_folder("labelme", root, tmp_path / "out")
    (tmp_path / "out" / "import.part").unlink()
    (tmp_path / "mine" / "images").mkdir(parents=True)
    (tmp_path / "mine" / "images" / "a.png").write_bytes(b"precious")
    with pytest.raises(UserError, match=r"mine/images: exists already; choose another folder"):
        importer.import_folder("labelme", root, tmp_path / "mine")
    for output in (root, root / "sub", tmp_path):
        with pytest.raises(UserError, match="is inside the other"):
            importer.import_folder("labelme", root, output)
    assert (
        (tmp_path / "mine" / "images" / "a.png").read_bytes() == b"precious"
        and fingerprint(root) == before
        and fingerprint(tmp_path / "out") == there
    )


def test_images_are_hard_links_or_copies_where_there_can_be_none(tmp_path, monkeypatch):
    root = write_labelme(tmp_path / "s")
    (root / "a.png").rename(root / "elsewhere")
    (root / "a.png").symlink_to(root / "elsewhere")
    importer.import_folder("labelme", root, tmp_path / "linked")
    for name in "abcd":
        target = tmp_path / "linked" / "images" / f"{name}.png"
        assert target.samefile(root / f"{name}.png") and not target.is_symlink()

    def no_links(*_):
        raise OSError(18, "another disk")

    monkeypatch.setattr(os, "link", no_links)
    importer.import_folder("labelme", root, tmp_path / "copied")
    for name in "abcd":
        target = tmp_path / "copied" / "images" / f"{name}.png"
        assert (
            not target.samefile(root / f"{name}.png")
            and target.read_bytes() == (root / f"{name}.png").read_bytes()
        )


def test_an_interrupted_import_is_no_data_set_and_is_run_again(tmp_path, monkeypatch):
    root, out = write_labelme(tmp_path / "s"), tmp_path / "out"
    importer.import_folder("labelme", root, tmp_path / "whole")
    expected = {
        path.removeprefix(str(tmp_path / "whole")): content
        for path, content in fingerprint(tmp_path / "whole").items()
    }
    written, write = [], importer.write_atomic
    for after in range(9):  # the mark, 3 maps, the list, 2 JSON files
        shutil.rmtree(out, ignore_errors=True)
        written.clear()

        def interrupt(path, content):
            if len(written) == after:
                raise KeyboardInterrupt
            written.append(path)
            write(path, content)

        monkeypatch.setattr(importer, "write_atomic", interrupt)
        try:
            importer.import_folder("labelme", root, out)
            break
        except KeyboardInterrupt:
            assert not (out / "panoptic_train.json").exists()
        monkeypatch.setattr(importer, "write_atomic", write)
        if after > 1:  # after the mark alone there is nothing to mix up
            with pytest.raises(
                UserError,
                match="exists already; an interrupted import of another source or kind began it",
            ):
                importer.import_folder("masks", write_masks(tmp_path / f"m{after}"), out)
        importer.import_folder("labelme", root, out)
        assert {
            path.removeprefix(str(out)): content for path, content in fingerprint(out).items()
        } == expected
    assert after == 7


def test_an_imported_set_is_validated_and_trained_on(tmp_path, capsys):
    root = write_labelme(
        tmp_path / "source",
        ("a", "b", "c"),
        ("d", "e"),
        [
            {"label": "cat", "points": [[8, 8], [30, 8], [30, 30], [8, 30]]},
            {"label": "dog", "points": [[44, 44], [60, 44]], "shape_type": "circle"},
        ],
        (64, 64),
    )
    out = tmp_path / "set"
    assert (
        dearli.main(
            [
                "--stage",
                "import",
                "--from",
                "labelme",
                "--input",
                str(root),
                "--output",
                str(out),
                "--background",
                "lawn",
                "--val-share",
                "0.3",
            ]
        )
        == 0
    )
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        f"{out}: 2 labelled, 2 unlabelled and 1 validation images; left out: nothing",
        "segments: cat 3, dog 3, lawn 3",
        f"next: python dearli.py --stage validate --dataset custom --data-root {out}",
    ]
    assert "no problem found" in validated(out, code=0, capsys=capsys)[0]
    own = [
        "--dataset",
        "custom",
        "--data-root",
        str(out),
        "--runs",
        str(tmp_path / "runs"),
        "--workers",
        "0",
    ]
    flags = TINY_FLAGS[: TINY_FLAGS.index("--split")] + ["--device", "cpu", "--report-images", "0"]
    assert (
        dearli.main(fitting(["--stage", "sup", "--split", "all", "--steps", "2", *own], flags)) == 0
    )
    assert (
        dearli.main(
            fitting(
                ["--stage", "ssl", "--method", "ssl", "--split", "all", "--steps", "1", *own], flags
            )
        )
        == 0
    )
    (row,) = log_of(tmp_path / "runs" / "set-ssl-all")
    assert len(log_of(tmp_path / "runs" / "set-sup-all")) == 2 and np.isfinite(row["loss"])
    assert "student/decoder" in json.loads(
        (tmp_path / "runs" / "set-sup-all" / "metrics.json").read_text()
    )


@pytest.mark.parametrize(
    "args, words",
    [
        (["--stage", "import", "--from", "labelme"], "--stage import needs --input DIR"),
        (
            ["--stage", "import", "--from", "voc", "--input", "x", "--out", "y"],
            "unknown kind of annotations (--from) 'voc'; available: labelme, coco-instances, cityscapes, masks",
        ),
        (
            ["--stage", "import", "--from", "masks", "--input", "/no/such/folder", "--out", "y"],
            "/no/such/folder: no such folder of annotated images",
        ),
        (
            [
                "--stage",
                "import",
                "--from",
                "masks",
                "--input",
                ".",
                "--out",
                "/tmp/y",
                "--val-share",
                "1.5",
            ],
            "--val-share 1.5: expected a share",
        ),
        (["--stage", "sup", "--from", "labelme"], "--from: only --stage import knows it"),
        (["--stage", "sup", "--background", "lawn"], "--background: only --stage import knows it"),
        (["--stage", "sup", "--stuff", "lawn"], "--stuff: only --stage import knows it"),
        (
            [
                "--stage",
                "import",
                "--from",
                "masks",
                "--masks-are",
                "things",
                "--input",
                ".",
                "--out",
                "y",
            ],
            "--masks-are things: expected one of instances, classes, binary",
        ),
        (
            [
                "--stage",
                "import",
                "--from",
                "labelme",
                "--classes",
                "cat",
                "--input",
                ".",
                "--out",
                "y",
            ],
            "--classes: is for --from masks, not for labelme",
        ),
        (
            ["--stage", "predict", "--val-share", "0.3", "--weights", "x"],
            "--val-share: only --stage import knows it",
        ),
    ],
)
def test_mistakes_in_an_import_command_get_one_clear_line(args, words, capsys):
    assert dearli.main(args) == 2
    message = capsys.readouterr().err
    assert words in message and message.count("\n") == 1 and message.startswith("error: ")


# ---------------------------------------------------------------------------------------------- microcosm and its models


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
    import mini_clip

    quality = mini_clip.evaluate(mini_clip.load(), "val", images=40)
    assert quality["class_mean"] > 0.5  # chance 1/20


def test_the_mini_sam_is_remade_by_one_call(tmp_path):
    import mini_sam

    phases = (
        dict(name="encoder", steps=1, images=1, points=3, lr=2e-3, prompts=False, affinity_on=True),
        dict(name="refine", steps=2, images=2, points=3, lr=2e-3, prompts=True, affinity_on=True),
    )
    quality = mini_sam.train(tmp_path / "sam.safetensors", phases=phases, scenes=2, test_images=1)
    assert quality["steps"] == {"encoder": 1, "refine": 2} and 0 <= quality["recall50"] <= 1
    assert (
        mini_sam.evaluate(mini_sam.load(tmp_path / "sam.safetensors"), images=1)["masks_max"]
        == quality["masks_max"]
    )


def test_mini_sam_draws_wholes_and_parts_through_the_automatic_generator():
    import mini_sam

    quality = mini_sam.evaluate(mini_sam.load(), "val", images=16)
    assert quality["recall50"] > 0.7 and quality["part_recall50"] > 0 and quality["masks_max"] <= 40


# ------------------------------------------------------------------------------------------------------ whole pipelines


def test_two_images_can_be_learned_by_heart(small_mini):
    cfg = dataclasses.replace(
        MINI, labeled_batch=2, num_points=256, lr=1e-3, scale_min=1.0, scale_max=1.0
    )
    dataset = data.load_mini("2")
    dataset.val = dataset.train
    student = stages.build(stages.Job(), cfg, dataset.taxonomy)
    optimizer, things = optim.build_optimizer(student, cfg), torch.tensor(dataset.taxonomy.things)
    batches = data.LabeledBatches(dataset, cfg, 140)
    for step in range(140):
        optim.set_lr(optimizer, step, 140, cfg)
        mean_teacher.train_step(student, None, optimizer, batches[step], None, things, cfg, step)
    metrics = evaluate({"student": student}, dataset, cfg, torch.device("cpu"), limit=2)[
        "student/decoder"
    ]
    assert metrics["all"]["pq"] > 0.6, metrics["all"]


def test_the_whole_pipeline_at_its_smallest(small_mini, tmp_path, capsys):
    runs = ["--runs", tmp_path]
    assert run("--stage", "ssl", "--no-make", *runs) == 2  # DEARLi without DeWa weights
    message = capsys.readouterr().err
    assert "--stage dewa" in message and "--method dear" in message and message.count("\n") == 1
    assert (
        run("--stage", "dewa", "--no-make", *runs) == 2
        and "--stage masks" in capsys.readouterr().err
    )
    assert run("--stage", "masks", *runs, "--points-per-side", 4) == 0
    assert len(list((tmp_path / "mini-masks").glob("*.json"))) == 12
    assert run("--stage", "dewa", *runs, "--steps", 2) == 0
    assert all(row["loss"] > 0 for row in log_of(tmp_path / "mini-dewa"))
    for args in (
        ["sup"],
        ["ssl", "--method", "ssl"],
        ["ssl", "--method", "dear"],
        ["ssl", "--method", "dearli"],
    ):
        assert run("--stage", *args, *runs, "--steps", 4) == 0
    metrics = json.loads((tmp_path / "mini-dearli-4" / "metrics.json").read_text())
    assert {"student/decoder", "student/ensemble", "teacher/decoder", "teacher/ensemble"} <= set(
        metrics
    )
    assert (
        0 <= metrics["teacher/ensemble"]["all"]["pq"] <= 1
        and len(metrics["student/decoder"]["per_class"]) == 20
    )
    (tmp_path / "mini-dearli-4" / "metrics.json").unlink()
    assert (
        dearli.main(
            [
                "--stage",
                "eval",
                "--dataset",
                "mini",
                "--weights",
                str(tmp_path / "mini-dearli-4"),
                "--device",
                "cpu",
            ]
        )
        == 0
    )
    assert (
        json.loads((tmp_path / "mini-dearli-4" / "metrics.json").read_text()) == metrics
    )  # every flag is remembered


def test_a_stage_makes_what_an_earlier_one_has_not_made_or_goes_on_with_it(
    small_mini, tmp_path, capsys
):
    ssl = [
        "--stage",
        "ssl",
        "--runs",
        tmp_path,
        "--steps",
        2,
        "--dewa-steps",
        4,
        "--checkpoint-every",
        2,
        "--points-per-side",
        2,
        "--no-eval",
    ]
    assert run(*ssl, "--dry-run") == 0 and not list(tmp_path.rglob("*.json"))
    said = capsys.readouterr().out
    assert (
        "mini-dewa: no DeWa weights; the warm-up would come first" in said
        and "mini-masks: no SAM masks; they would be made first" in said
    )
    assert (
        re.search(r"^masks +about \d+ seconds: 12 images", said, re.M)
        and said.count("\ntime ") == 2
    )
    assert run(*ssl) == 0
    said = capsys.readouterr().out
    assert (
        "mini-dewa: no DeWa weights; the warm-up comes first" in said
        and "mini-masks: masks of 12 images, 12 of them made now" in said
    )
    warm = checkpoint.newest(tmp_path / "mini-dewa")
    assert warm["step"] == 4 and checkpoint.newest(tmp_path / "mini-dearli-4")["config"]["init"][
        "sha256"
    ] == identity.of_tensors(warm["student"])
    assert run(*ssl, "--dewa-steps", 9, "--resume") == 0
    said = capsys.readouterr().out
    assert "that it began with; --dewa-steps, --points-per-side change nothing" in said
    # what was stopped on the way goes on: a warm-up at its second step, masks at their eleventh
    # image
    back_to(tmp_path / "mini-dewa", 2)
    (tmp_path / "mini-masks" / "train_00011.png.json").unlink()
    assert (
        run(*ssl, "--no-make", "--out", tmp_path / "not") == 2
        and "mini-dewa: DeWa stopped at step 2 of 4" in capsys.readouterr().err
    )
    assert run(*ssl, "--out", tmp_path / "again") == 0
    said = capsys.readouterr().out
    assert (
        "mini-dewa: DeWa stopped at step 2 of 4; the warm-up comes first" in said
        and "masks of 12 images, 1 of them made now" in said
    )
    assert same(checkpoint.newest(tmp_path / "mini-dewa"), warm)
    # by numbers that are asked for and are not those of what is there: refused; by numbers of the
    # preset: said
    for flags, words in (
        (
            ["--points-per-side", 3],
            "masks made with other settings (points_per_side: 2 there, 3 now)",
        ),
        (["--dewa-steps", 5], "dewa_steps: 4 there, 5 now"),
        (["--hidden", 64], "hidden: 32 there, 64 now"),
    ):
        assert run(*ssl, *flags, "--out", tmp_path / "not") == 2
        message = capsys.readouterr().err
        assert words in message and message.count("\n") == 1
    assert (
        run(
            "--stage",
            "ssl",
            "--runs",
            tmp_path,
            "--steps",
            2,
            "--no-eval",
            "--out",
            tmp_path / "preset",
        )
        == 0
    )
    assert (
        "masks made with other settings than the preset's (points_per_side: 2 there, 12 now); "
        "taken as they are" in capsys.readouterr().out
    )


def test_what_refuses_a_run_does_so_before_what_it_needs_is_made(
    small_mini, tmp_path, monkeypatch, capsys
):
    assert run("--stage", "sup", "--steps", 1, "--no-eval", "--out", tmp_path / "there") == 0
    monkeypatch.setattr(
        stages, "stage_masks", lambda *args: pytest.fail("hours of work, and then an error")
    )
    timm = ["--backbone", "convnext_atto.d2_in1k", "--pretrained", "random"]
    for flags, words in (
        (["--out", tmp_path / "there"], "holds a run already"),
        (["--out", "/proc/there"], "cannot be written"),
        (["--pretrained", tmp_path / "no.pt"], "no such weights file"),
        (["--backbone", "convnext_foo"], "unknown backbone"),
    ):
        for stage in (["dewa"], ["ssl", "--method", "dearli"]):
            capsys.readouterr()
            assert run("--stage", *stage, "--runs", tmp_path / "runs", *flags) == 2
            assert words in capsys.readouterr().err
    # a warm-up has no use for words, DEARLi has
    linear = ["--stage", "ssl", "--method", "dearli", *timm, "--classifier", "linear"]
    assert run(*linear, "--runs", tmp_path / "runs") == 2
    assert "no text tower" in capsys.readouterr().err
    assert not list((tmp_path / "runs").rglob("*.json"))


def test_zero_shot_on_true_masks_beats_chance_and_sam_is_flattened(small_mini, tmp_path):
    flags = [
        "--dataset",
        "mini",
        "--split",
        4,
        "--device",
        "cpu",
        "--runs",
        tmp_path,
        "--stage",
        "zeroshot",
    ]
    main = lambda *args: dearli.main([str(a) for a in [*flags, *args]])
    assert main("--masks", "gt") == 0
    metrics = json.loads((tmp_path / "mini-zeroshot-gt" / "metrics.json").read_text())["zero-shot"]
    assert metrics["all"]["pq"] > 0.4
    assert all(
        c["sq"] == pytest.approx(1) for c in metrics["per_class"].values() if c["tp"]
    )  # true masks, only the classes may be wrong
    assert main("--masks", "sam", "--points-per-side", 4) == 0
    sam = json.loads((tmp_path / "mini-zeroshot-sam" / "metrics.json").read_text())["zero-shot"]
    assert 0 <= sam["all"]["pq"] < metrics["all"]["pq"]
    dataset = data.load_mini("4")
    model = stages.build(stages.Job(), MINI, dataset.taxonomy)
    nothing = zero_shot(
        model, dataset, MINI, torch.device("cpu"), lambda i: np.zeros((128, 128), np.int32)
    )
    assert nothing["all"]["pq"] == 0 and sum(c["fn"] for c in nothing["per_class"].values()) > 0
    masks = np.zeros((4, 6, 3), bool)
    masks[:, :, 1], masks[1:3, 1:4, 0], masks[1, 1, 2] = (
        True,
        True,
        True,
    )  # large, small on top, one pixel
    assert flatten(masks, least=2).tolist() == [
        [2] * 6,
        [2, 0, 1, 1, 2, 2],
        [2, 1, 1, 1, 2, 2],
        [2] * 6,
    ]


def test_groups_of_classes_by_labelled_pixels(small_mini):
    dataset = data.load_mini("4")
    groups = frequency_groups(dataset, 5)
    assert (
        sorted(k for g in groups for k in g) == list(range(20))
        and [len(g) for g in groups] == [4] * 5
    )
    pixels = sum(
        np.bincount(dataset.train.truth(i).semantic().ravel().astype(int), minlength=20)
        for i in dataset.labeled
    )
    assert max(pixels[groups[0]]) <= min(pixels[groups[-1]])
    per_class = {
        n: {"pq": k / 20, "tp": k % 2, "fp": 0, "fn": 0}
        for k, n in enumerate(dataset.taxonomy.short_names)
    }
    rows = group_quality({"per_class": per_class}, dataset.taxonomy, groups)
    for group, row in zip(groups, rows):
        odd = [k for k in group if k % 2]
        assert row["n"] == len(odd) and row["pq"] == pytest.approx(np.mean(odd) / 20 if odd else 0)


def test_the_confusion_that_is_stored_is_that_of_the_stored_miou(small_mini):
    dataset = data.load_mini("4")
    result = evaluate(
        {"student": stages.build(stages.Job(), MINI, dataset.taxonomy)},
        dataset,
        MINI,
        torch.device("cpu"),
    )["student/ensemble"]
    confusion = np.array([[int(v) for v in row.split()] for row in result["confusion"]])
    assert (
        confusion.sum(1).tolist()
        == sum(
            np.bincount(dataset.val.truth(i).semantic().ravel().astype(int), minlength=20)
            for i in range(4)
        ).tolist()
    )
    iou = confusion.diagonal() / np.maximum(
        confusion.sum(0) + confusion.sum(1) - confusion.diagonal(), 1
    )
    assert result["miou"] == pytest.approx(iou[confusion.sum(1) > 0].mean())


def test_demo_and_ladder_end_with_tables_and_a_picture(small_mini, tmp_path, capsys):
    sizes = [
        "--runs",
        tmp_path,
        "--ssl-steps",
        4,
        "--dewa-steps",
        2,
        "--points-per-side",
        4,
        "--jobs",
        1,
    ]
    assert run(*sizes) == 0
    assert "DEARLi" in capsys.readouterr().out and Image.open(tmp_path / "demo.png").size[0] > 500
    assert run("--stage", "ladder", "--seeds", 2, *sizes) == 0
    content = json.loads((tmp_path / "ladder.json").read_text())
    assert content["seeds"] == [0, 1] and {k: len(v) for k, v in content["results"].items()} == {
        "sup": 2,
        "ssl": 2,
        "dear": 2,
        "dearli": 2,
    }
    # equal optimiser steps: what DEARLi warms up is taken from its semi-supervised stage
    assert len(log_of(tmp_path / "mini-sup-4")) == len(log_of(tmp_path / "mini-dear-4")) == 4
    assert len(log_of(tmp_path / "mini-dewa")) + len(log_of(tmp_path / "mini-dearli-4")) == 4


def test_runs_in_processes_of_their_own_are_those_made_one_after_the_other(tmp_path):
    cfg = dataclasses.replace(TINY, ssl_steps=3, burn_in=1, eval_batch=32)
    rungs = [(cfg, rung) for rung in stages.RUNGS if rung.title in ("M2F-Lang, supervised", "DEAR")]
    torch.set_num_threads(1)  # as in the processes: sums in the same order
    one, two = (
        stages.run_rungs(
            stages.Job(split="4", eval_on="dev", runs=tmp_path / str(jobs), jobs=jobs), rungs
        )
        for jobs in (1, 2)
    )
    torch.set_num_threads(min(2, os.cpu_count() or 1))
    assert one == two and len(one) == 2
    with pytest.raises(UserError, match="unknown split '400' of data set mini"):
        stages.run_rungs(stages.Job(split="400", runs=tmp_path / "3", jobs=2), rungs)


def test_a_folder_of_ones_own_runs_through_every_stage(tmp_path):
    root = write_coco_folder(tmp_path / "set")
    own = ["--dataset", "custom", "--data-root", root, "--runs", tmp_path / "runs"]
    flags = TINY_FLAGS[: TINY_FLAGS.index("--split")] + [
        "--split",
        "1_3",
        "--device",
        "cpu",
        "--workers",
        "0",
    ]
    for args in (
        ["masks"],
        *(
            [*stage, "--steps", 2]
            for stage in (
                ["dewa"],
                ["sup"],
                ["ssl", "--method", "ssl"],
                ["ssl", "--method", "dearli"],
            )
        ),
    ):
        assert dearli.main(fitting(["--stage", *args, *own], flags)) == 0
    metrics = json.loads((tmp_path / "runs" / "set-ssl-1_3" / "metrics.json").read_text())
    assert 0 <= metrics["student/decoder"]["all"]["pq"] <= 1


@needs_nuclei
def test_real_microscopy_images_train_and_evaluate(tmp_path):
    flags = TINY_FLAGS[: TINY_FLAGS.index("--split")] + [
        "--split",
        "1_32",
        "--device",
        "cpu",
        "--workers",
        "0",
    ]
    dataset = data.load_folder(REAL_DATA / "nuclei_panoptic", "1_32")
    assert (len(dataset.train), len(dataset.val), len(dataset.labeled), len(dataset.unlabeled)) == (
        513,
        128,
        16,
        497,
    )
    for i in (0, 100):
        truth = dataset.train.truth(i)
        assert np.array_equal(
            np.bincount(truth.segment_map.ravel(), minlength=len(truth.labels) + 1)[1:], truth.areas
        )
    args = [
        "--stage",
        "ssl",
        "--method",
        "ssl",
        "--dataset",
        "custom",
        "--data-root",
        REAL_DATA / "nuclei_panoptic",
        "--runs",
        tmp_path,
        "--steps",
        3,
        "--no-eval",
    ]
    assert dearli.main(fitting(args, flags)) == 0


# ------------------------------------------------------------------------------------------------- mistakes at the door


@pytest.mark.parametrize(
    "args, words",
    [
        (
            ["--stage", "sup", "--compare", "runs/a"],
            "--compare: only --stage report knows it, not --stage sup",
        ),
        (["--stage", "report"], "this stage needs --weights runs/NAME"),
        (
            ["--stage", "report", "--weights", "."],
            "holds no config.json, metrics.json or log.jsonl; expected the folder of a run",
        ),
        (
            ["--stage", "sup", "--report-images", "-1"],
            "--report-images -1: expected the number of validation images",
        ),
        (
            ["--stage", "evall"],
            "unknown stage 'evall'; available: prepare, import, validate, masks",
        ),
        (["--stage", "evall"], "(did you mean eval?)"),
        (["--stage", "sup", "--spilt", "4"], "unknown flag '--spilt' (did you mean --split?)"),
        (["--stage", "sup", "--lerning-rate", "4"], "unknown flag '--lerning-rate'"),
        (["sup"], "'sup': expected a flag such as --stage"),
        (["--stage", "sup", "--steps", "many"], "--steps: invalid int value: 'many'"),
        (["--stage", "sup", "--help", "--dataset", "coko"], "unknown data set 'coko'"),
        (
            ["--stage", "eval", "--dry-run"],
            "--dry-run: only --stage masks, dewa, sup and ssl know it, not --stage eval",
        ),
        (["--steps", "5"], "--steps 5: DEARLi's warm-up alone takes 150 of them"),
        (
            ["--stage", "ladder", "--steps", "150"],
            "--steps 150: DEARLi's warm-up alone takes 150 of them",
        ),
        (["--stage", "sup", "--lr", "-1"], "--lr -1.0: expected a number of at least 0"),
        (
            ["--stage", "sup", "--num-queries", "0"],
            "--num-queries 0: expected a number of at least 1",
        ),
        (["--stage", "sup", "--hidden", "97"], "--hidden 97: expected a multiple of 32"),
        (["--stage", "sup", "--steps", "0"], "--sup-steps 0: expected a number of at least 1"),
        (["--stage", "sup", "--workers", "-1"], "--workers -1: expected a number of at least 0"),
        (["--stage", "ssl", "--cutmix-prob", "1.5"], "--cutmix-prob 1.5: expected a share, 0 to 1"),
        (["--stage", "ssl", "--ema-decay", "nan"], "--ema-decay nan: expected a share"),
        (
            ["--stage", "sup", "--scale-min", "3"],
            "--scale-min 3.0: expected at least 0.1, and no more than --scale-max",
        ),
        (["--stage", "sup", "--log", "wandb"], "unknown log 'wandb'; available: tensorboard"),
        (
            ["--stage", "report", "--palette", "coco"],
            "unknown palette 'coco'; available: dataset, safe",
        ),
        (
            ["--dataset", "cityscapes"],
            "unknown data set 'cityscapes'; available: mini, custom, ade20k, coco, coco-objects",
        ),
        (
            ["--stage", "ssl", "--method", "dearly"],
            "unknown method 'dearly'; available: ssl, dear, dearli",
        ),
        (["--stage", "sup", "--split", "0"], "unknown split '0' of data set mini"),
        (["--stage", "sup", "--split", "1_32"], "unknown split '1_32' of data set mini"),
        (["--stage", "sup", "--precision", "fp8"], "unknown precision 'fp8'"),
        (["--stage", "sup", "--backbone", "resnet50"], "unknown backbone 'resnet50'"),
        (
            ["--stage", "sup", "--classifier", "mlp"],
            "unknown classifier 'mlp'; available: language, linear",
        ),
        (["--stage", "sup", "--dataset", "custom"], "--data-root"),
        (
            ["--stage", "sup", "--dataset", "custom", "--data-root", "/no/such/folder"],
            "/no/such/folder: no such folder",
        ),
        (["--stage", "eval"], "--weights"),
        (["--stage", "eval", "--weights", "/no/such/run"], "/no/such/run"),
        (["--stage", "masks", "--sam", "vit_b"], "sam_vit_b_01ec64.pth: cannot be fetched"),
        (["--stage", "sup", "--device", "tpu"], "device 'tpu': expected cpu, cuda, cuda:N or mps"),
        (["--stage", "sup", "--device", "gpu"], "device 'gpu': expected cpu, cuda, cuda:N or mps"),
        (["--stage", "sup", "--device", "0"], "device '0': expected cpu, cuda, cuda:N or mps"),
        (["--stage", "sup", "--device", "hpu"], "device 'hpu': not available here; available: cpu"),
        (
            ["--stage", "sup", "--init", "/no/such/run"],
            "/no/such/run: no such run or file (--init)",
        ),
        (
            ["--stage", "sup", "--out", __file__],
            "test_dearli.py is a file; expected a folder for results; choose another with --out",
        ),
        (
            ["--stage", "sup", "--out", f"{__file__}/x"],
            "test_dearli.py is a file; expected a folder for results",
        ),
        (
            ["--stage", "zeroshot", "--masks", "/no/such/folder"],
            "/no/such/folder: no such folder of masks; expected one, or gt or sam",
        ),
        (
            ["--stage", "predict", "--weights", __file__, "--input", "/no/such/picture"],
            "/no/such/picture: no such picture or folder of pictures",
        ),
        (
            ["--stage", "report", "--weights", ".", "--compare", "/no/such/run"],
            "/no/such/run: no such run or file (--compare)",
        ),
        (
            ["--stage", "sup", "--dataset", "ade20k", "--split", "1_512"],
            "unknown split '1_512' of ade20k; available: 1_128",
        ),
        (
            ["--stage", "prepare"],
            "unknown data set to prepare 'mini'; available: ade20k, coco, coco-objects",
        ),
        (
            ["--stage", "masks", "--sam", "vit_b", "--sam-weights", "/no/such/file"],
            "/no/such/file: no such weights file; expected the vit_b checkpoint",
        ),
        (
            ["--stage", "masks", "--images", "/no/such/folder"],
            "/no/such/folder: no such folder of images",
        ),
        (["--stage", "ssl", "--alpha", "1.2"], "--alpha 1.2: expected a number from 0 to 1"),
        (["--stage", "ssl", "--alpha", "often"], "--alpha often: expected"),
        (["--stage", "ssl", "--alpha", "0.4:2"], "--alpha 0.4:2: expected"),
        (
            ["--stage", "ssl", "--teacher-posterior", "mt"],
            "unknown teacher posterior 'mt'; available: decoder, clip, ensemble",
        ),
        (
            ["--stage", "ssl", "--labels", "instance"],
            "unknown labels 'instance'; available: panoptic, semantic",
        ),
        (["--stage", "sup", "--input", "/tmp"], "--input: only --stage predict"),
        (["--stage", "predict", "--input", "/tmp"], "--weights"),
        (
            ["--stage", "sup", "--images", "/tmp"],
            "--images: only --stage masks and dewa know it, not --stage sup",
        ),
        (
            ["--stage", "alpha", "--alpha", "0.3"],
            "--alpha: the rungs of --stage alpha set it themselves",
        ),
        (["--stage", "ladder", "--classifier", "linear"], "need --classifier language"),
        (
            ["--stage", "sup", "--backbone", "convnext_base"],
            "no OpenCLIP weights are called ''; available for --pretrained: laion400m_s13b_b51k",
        ),
    ],
)
def test_a_mistake_on_the_command_line_gets_one_clear_line(args, words, capsys, tmp_path):
    assert dearli.main([*args, "--runs", str(tmp_path)]) == 2
    message = capsys.readouterr().err
    assert words in message and message.count("\n") == 1 and message.startswith("error: ")


@pytest.mark.parametrize(
    "content, words",
    [
        ("{", "not a readable JSON"),
        ("[]", "key 'images' is missing"),
        ('{"images": [], "annotations": []}', "key 'categories' is missing"),
        ('{"images": [], "annotations": [], "categories": [{"id": 1, "name": "cat"}]}', "isthing"),
        (
            '{"images": [], "annotations": [{"image_id": 3}], "categories": [{"id": 1, "name": "cat", "isthing": 1}]}',
            "no entry for 3",
        ),
    ],
)
def test_a_json_without_what_is_needed_gets_one_clear_line(content, words, tmp_path):
    root = write_coco_folder(tmp_path / "set", images=1)
    (root / "panoptic_train.json").write_text(content)
    with pytest.raises(UserError, match=words) as error:
        data.load_folder(root, "1")
    assert "panoptic_train.json" in str(error.value) and "\n" not in str(error.value)


def test_a_folder_with_missing_or_wrong_files_says_which(tmp_path):
    root = write_coco_folder(tmp_path / "set")
    with pytest.raises(UserError, match="available: 1_3"):
        data.load_folder(root, "1_64")
    (root / "splits" / "1_3" / "labeled.txt").write_text("train0.png\nnowhere.png\n")
    with pytest.raises(UserError, match="'nowhere.png' is not an image of the training set"):
        data.load_folder(root, "1_3")
    (root / "images" / "train1.png").write_bytes(b"not a picture")
    with pytest.raises(UserError, match="train1.png: not a readable image"):
        data.load_folder(root, "2").train.image(1)
    Image.fromarray(np.full((64, 64, 3), 9, np.uint8)).save(root / "panoptic" / "train2.png")
    with pytest.raises(
        UserError, match="train2.png: segment 592137 has pixels but is not in segments_info"
    ):
        data.load_folder(root, "2").train.truth(2)


def test_weights_of_another_configuration_are_named(small_mini, tmp_path, capsys):
    assert run("--stage", "sup", "--steps", 1, "--no-eval", "--out", tmp_path / "run") == 0
    capsys.readouterr()
    assert (
        dearli.main(
            [
                "--stage",
                "eval",
                "--weights",
                str(tmp_path / "run"),
                "--hidden",
                "64",
                "--device",
                "cpu",
                "--out",
                str(tmp_path / "other"),
            ]
        )
        == 2
    )
    assert "fits another configuration" in capsys.readouterr().err


def test_a_damaged_or_foreign_foundation_gets_one_clear_line(small_mini, tmp_path, capsys):
    import mini_clip
    import mini_sam

    cut, foreign, pickled = (
        tmp_path / "cut.safetensors",
        mini_clip.WEIGHTS,
        tmp_path / "sam_vit_b.pth",
    )
    cut.write_bytes(mini_sam.WEIGHTS.read_bytes()[:10_000])
    torch.save({"hook": print}, pickled)  # code in a weights file is not run
    for args, words in (
        (("masks", "--sam-weights", cut), "cut.safetensors: damaged"),
        (
            ("masks", "--sam-weights", foreign),
            "mini_clip.safetensors: weights of another model than Sam",
        ),
        (
            ("masks", "--sam", "vit_b", "--sam-weights", pickled),
            "sam_vit_b.pth: not a checkpoint that can be read safely",
        ),
        (("sup", "--pretrained", cut), "cut.safetensors: damaged"),
    ):
        flags = [
            str(a)
            for a in (
                "--stage",
                *args,
                "--runs",
                tmp_path / "runs",
                "--split",
                "4",
                "--device",
                "cpu",
            )
        ]
        assert dearli.main(flags) == 2, args
        message = capsys.readouterr().err
        assert words in message and message.count("\n") == 1, message


# ------------------------------------------------------------------------------------------------------------- documents


def commands(text):
    """What follows `python dearli.py` in the code of a document."""
    return [
        line.split("#")[0].split("python dearli.py", 1)[1].split()
        for line in text.splitlines()
        if line.startswith("python dearli.py")
    ]


def test_every_command_of_the_documents_is_one_that_the_program_knows():
    here = Path(__file__).parent
    listed = [
        command
        for page in ("README.md", "docs/course.md", "docs/own-data.md")
        for command in commands((here / page).read_text())
    ]
    tried = [
        code
        for path in here.glob("*.py")
        for code in re.findall(
            r"^Try\b[^`]*`([^`]*)`", ast.get_docstring(ast.parse(path.read_text())) or "", re.M
        )
    ]
    assert len(tried) > 12
    listed += [
        shlex.split(code.split("dearli.py", 1)[1])
        for code in tried
        if "dearli.py" in code and "test_dearli.py" not in code
    ]
    prefix, outs = [], {}
    for line in (here / "TABLES.md").read_text().splitlines():
        if line.startswith("## "):
            name = (
                "coco-objects"
                if "Objects" in line
                else "coco"
                if "on COCO-Panoptic (" in line
                else "ade20k"
            )
            prefix = [
                "--dataset",
                name,
                "--data-root",
                "ROOT",
                "--split",
                "1_512" if name.startswith("coco") else "1_128",
            ]
        listed += [
            [*prefix, *code.split()] for code in line.split("`")[1::2] if code.startswith("--stage")
        ]
        listed += [
            code.split()[2:]
            for code in line.split("`")[1::2]
            if code.startswith("python dearli.py --stage")
        ]
        for folder in [
            code.split()[code.split().index("--out") + 1]
            for code in line.split("`")[1::2]
            if "--out" in code and "--stage" in code
        ]:
            assert outs.setdefault(folder, name) == name, f"{folder} is a run of two data sets"
    assert len(listed) > 50 and len(outs) > 20
    for arguments in listed:
        args = stages.parser().parse_args([*arguments, "--device", "cpu"])
        if args.stage not in (
            "eval",
            "predict",
            "export",
            "report",
            "import",
        ):  # these read the run that they are about
            stages.resolve(args)


def test_the_guide_to_data_of_ones_own_runs_word_for_word(tmp_path, monkeypatch, capsys):
    text = (Path(__file__).parent / "docs" / "own-data.md").read_text()
    (snippet,), (block,) = (
        re.findall(f"```{language}\n(.*?)```", text, re.S) for language in ("python", "sh")
    )
    monkeypatch.chdir(tmp_path)
    exec(snippet, {})
    listed = commands(block)
    assert [args[1] for args in listed] == [
        "import",
        "validate",
        "sup",
        "ssl",
        "ssl",
        "predict",
        "report",
    ]
    smaller = TINY_FLAGS[: TINY_FLAGS.index("--crop")] + [
        "--workers",
        "0",
        "--device",
        "cpu",
        "--report-images",
        "1",
    ]
    for args in listed:
        assert dearli.main(fitting(args, smaller)) == 0, args
    out = capsys.readouterr().out
    assert (
        "6 labelled, 4 unlabelled and 2 validation images; left out: nothing" in out
        and "segments: bar 8, disc 8, ground 8" in out
        and "no problem found" in out
    )
    assert (
        len(list((tmp_path / "predictions" / "overlay").iterdir())) == 12
        and (tmp_path / "runs" / "shapes-ssl-all" / "report.html").is_file()
    )
    assert (
        json.loads((tmp_path / "runs" / "shapes-ssl-2" / "config.json").read_text())["split"] == "2"
    )
    assert all(
        row["unlabeled/mask"] >= 0 for row in log_of(tmp_path / "runs" / "shapes-ssl-all")
    )  # the teacher has had its say


@pytest.mark.parametrize(
    "flags",
    [
        ["--help"],
        ["--stage", "ssl", "--help"],
        ["--stage", "sssl"],
        ["--stage", "sup", "--alpha", "4"],
        ["--lrr", "1"],
        [
            "--stage",
            "ssl",
            "--dataset",
            "coco",
            "--split",
            "1_512",
            "--data-root",
            "/no/such/folder",
        ],
        ["--version"],
        ["--stage", "eval", "--weights", "/no/such/run"],
        ["--stage", "sup", "--out", __file__],
        ["--stage", "prepare"],
        ["--stage", "sup", "--device", "gpu"],
        ["--stage", "predict", "--weights", ".", "--input", "/no/such/picture"],
    ],
)
def test_a_page_of_help_and_a_refusal_wait_for_no_library(flags):
    code = f"import sys, dearli; code = dearli.main({flags!r}); print(code, sorted({{'torch', 'numpy', 'PIL', 'scipy'}} & sys.modules.keys()))"
    said = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parent
    )
    assert (
        said.stdout.splitlines()[-1]
        == f"{0 if '--help' in flags or '--version' in flags else 2} []"
    )


def test_a_stage_that_builds_no_model_waits_for_none_of_its_libraries():
    heavy = {
        "torchvision",
        "open_clip",
        "timm",
        "segment_anything",
        "transformers",
        "scipy.optimize",
    }
    code = f"import sys, stages; print(sorted({heavy} & sys.modules.keys()))"
    said = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parent
    )
    assert said.stdout == "[]\n", said.stderr


def test_a_library_that_is_missing_is_told_with_the_environment_that_has_it(capsys, monkeypatch):
    def absent(args):
        raise ModuleNotFoundError("No module named 'torch'", name="torch")

    monkeypatch.setattr(stages, "run", absent)
    assert dearli.main(["--stage", "sup"]) == 2
    message = capsys.readouterr().err
    assert (
        "torch is not installed for" in message
        and ".venv/bin/activate" in message
        and message.count("\n") == 1
    )


@pytest.mark.parametrize("kind", ["run", "test"])
def test_the_two_commands_make_their_own_environment_in_an_ignored_folder(kind, tmp_path):
    here = Path(__file__).parent
    text = (here / "README.md").read_text()
    command = re.search(rf"<!-- {kind} command -->\n```sh\n(.+)\n```", text)[1]
    assert "\n" not in command
    make, install, use = command.split(" && ")
    assert (
        make == "python3 -m venv .venv"
        and install == ".venv/bin/python -m pip install -r requirements.txt"
    )
    assert (
        use
        == {
            "run": ".venv/bin/python dearli.py",
            "test": ".venv/bin/python -m pytest -q test_dearli.py",
        }[kind]
    )
    ignored = (here / ".gitignore").read_text().splitlines()
    assert ".venv*/" in ignored and "/datasets/" in ignored


def test_files_import_from_those_below_them_in_the_picture_of_the_readme():
    here = Path(__file__).parent
    picture = (here / "README.md").read_text().split("```text\n")[1].split("```")[0]
    order = [
        name
        for line in picture.splitlines()
        for name in re.split(r"\s{3,}(?=\S+ \S+ )|\s{7,}", line)[0].split()
    ]
    assert sorted(order) == sorted(
        path.stem for path in here.glob("*.py") if path.name != "test_dearli.py"
    )
    for place, name in enumerate(order):
        for node in ast.walk(ast.parse((here / f"{name}.py").read_text())):
            for used in (
                [a.name for a in node.names]
                if isinstance(node, ast.Import)
                else [node.module]
                if isinstance(node, ast.ImportFrom)
                else []
            ):
                assert used not in order[: place + 1], f"{name} imports {used}"


if __name__ == "__main__":
    import argparse

    parser = argparse.ArgumentParser(
        description="The tests run by `pytest test_dearli.py`; this runs longer searches for faults."
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
        data.MINI_TRAIN, data.MINI_DEV, data.MINI_VAL = 12, 4, 4
        with tempfile.TemporaryDirectory() as scratch:
            print(soak(arguments.soak, scratch))
    if arguments.fuzz:
        for kind, counter in fuzz(arguments.fuzz, arguments.seed).items():
            print(f"{kind:26}{counter['read']:6} read{counter['refused']:6} refused in one line")
