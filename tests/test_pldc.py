"""PL-DC and Guided Distillation: the formulas, one step by hand, and runs."""

import math

import pytest
import torch

import pldc

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
