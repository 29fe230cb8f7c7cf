"""Enhanced soft labels: the formulas by hand and against loops."""

import math

import pytest
import torch
import torch.nn.functional as F

from esl import PartBank, contrastive_loss, kmeans, soft_cross_entropy, soft_label


def pixel(*probs) -> torch.Tensor:
    """One pixel: (1, C, 1, 1)."""
    return torch.tensor(probs).reshape(1, -1, 1, 1)


def labelled(*probs, eta=0.95) -> list[float]:
    return soft_label(pixel(*probs), eta).flatten().tolist()


# -------------------------------------------------------------------------------- soft labels


def test_a_soft_label_keeps_the_fewest_classes_that_reach_eta_together():
    # 0.6 + 0.3 = 0.9 < 0.95, + 0.06 = 0.96: three of four
    expected = [0.3 / 0.96, 0.6 / 0.96, 0, 0.06 / 0.96]
    assert labelled(0.3, 0.6, 0.04, 0.06) == pytest.approx(expected, abs=1e-6)
    assert labelled(0.3, 0.6, 0.04, 0.06, eta=0.85) == pytest.approx([1 / 3, 2 / 3, 0, 0], abs=1e-6)


def test_a_sure_pixel_has_a_hard_label():
    assert labelled(0.02, 0.96, 0.02) == [0, 1, 0]
    assert labelled(0.125, 0.5, 0.375, eta=0.5) == [0, 1, 0]  # reaches eta exactly


def test_eta_0_is_the_argmax_and_eta_1_keeps_the_probabilities():
    assert labelled(0.3, 0.36, 0.34, eta=0.0) == [0, 1, 0]
    assert labelled(0.25, 0.5, 0.25, eta=1.0) == pytest.approx([0.25, 0.5, 0.25])
    probs = torch.rand(2, 7, 5, 5, generator=torch.Generator().manual_seed(0)).softmax(1)
    assert torch.allclose(soft_label(probs, 1.0), probs, atol=1e-6)  # whatever the sum rounds to
    hard = F.one_hot(probs.argmax(1), 7).permute(0, 3, 1, 2).float()
    assert torch.equal(soft_label(probs, 0.0), hard)


def test_classes_that_tie_with_the_last_one_needed_are_in():
    assert labelled(0.5, 0.25, 0.25, eta=0.7) == pytest.approx([0.5, 0.25, 0.25])
    assert labelled(0.5, 0.5, eta=0.0) == [0.5, 0.5]


def test_one_class_or_two():
    assert labelled(1.0) == [1.0]
    assert labelled(0.7, 0.3) == pytest.approx([0.7, 0.3])
    assert labelled(0.7, 0.3, eta=0.6) == [1.0, 0.0]


@pytest.mark.parametrize("eta", [0.0, 0.3, 0.8, 0.95, 1.0])
def test_soft_labels_are_those_of_a_loop_over_pixels(eta):
    generator = torch.Generator().manual_seed(1)
    probs = (3 * torch.randn(2, 6, 4, 5, generator=generator, dtype=torch.float64)).softmax(1)
    expected = torch.zeros_like(probs)
    for b in range(2):
        for y in range(4):
            for x in range(5):
                p = probs[b, :, y, x].tolist()
                total, last = 0.0, None
                for q in sorted(p, reverse=True):
                    total, last = total + q, q
                    if total >= eta:
                        break
                dominant = [q if q >= last else 0.0 for q in p]
                expected[b, :, y, x] = torch.tensor(dominant) / sum(dominant)
    found = soft_label(probs, eta)
    assert torch.allclose(found, expected, atol=1e-6)
    assert torch.allclose(found.sum(1), torch.ones(2, 4, 5, dtype=torch.float64))


def test_the_soft_cross_entropy_is_that_of_a_loop_over_valid_pixels():
    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(2, 4, 3, 3, generator=generator)
    soft = torch.rand(2, 4, 3, 3, generator=generator).softmax(1)
    valid = torch.rand(2, 3, 3, generator=generator) < 0.6
    total = 0.0
    for b, y, x in valid.nonzero().tolist():
        norm = math.log(sum(math.exp(v) for v in logits[b, :, y, x].tolist()))
        total -= sum(s * (v - norm) for s, v in zip(soft[b, :, y, x], logits[b, :, y, x])).item()
    found = soft_cross_entropy(logits, soft, valid)
    assert float(found) == pytest.approx(total / valid.sum().item(), abs=1e-6)


def test_with_hard_labels_it_is_the_ordinary_cross_entropy():
    logits = torch.randn(2, 5, 4, 4, generator=torch.Generator().manual_seed(3))
    target = logits.roll(1, 1).argmax(1)
    soft = F.one_hot(target, 5).permute(0, 3, 1, 2).float()
    valid = torch.ones(2, 4, 4, dtype=torch.bool)
    expected = F.cross_entropy(logits, target)
    assert float(soft_cross_entropy(logits, soft, valid)) == pytest.approx(float(expected))


def test_without_a_valid_pixel_the_loss_is_0_and_so_is_its_gradient():
    logits = torch.randn(1, 3, 2, 2, requires_grad=True)
    loss = soft_cross_entropy(logits, torch.full((1, 3, 2, 2), torch.nan), torch.zeros(1, 2, 2) > 0)
    assert float(loss.detach()) == 0
    loss.backward()
    assert torch.equal(logits.grad, torch.zeros_like(logits))


# -------------------------------------------------------------------------------------- parts


def filled_bank(classes=2, parts=2, size=3, dim=4, entries=3, seed=0) -> PartBank:
    """Random prototypes, and so many random entries in every queue."""
    generator = torch.Generator().manual_seed(seed)
    bank = PartBank(classes, parts, 5, dim, size)
    bank.prototypes.copy_(torch.randn(classes, parts, 5, generator=generator))
    bank.queues.copy_(torch.randn(classes, parts, size, dim, generator=generator))
    bank.pushed.fill_(entries)
    return bank


def test_a_pixel_belongs_to_the_prototype_of_its_class_with_the_largest_cosine():
    bank = PartBank(2, 2, 2, 4, 3)
    bank.prototypes.copy_(torch.tensor([[[1.0, 0], [0, 9]], [[1, 1], [-1, 0]]]))
    features = torch.tensor([[2.0, 1], [2, 1], [1, 2], [-5, 0.1], [1, 1]])
    parts = bank.part_of(features, torch.tensor([0, 1, 0, 1, 0]))
    assert parts.tolist() == [0, 0, 1, 1, 0]  # the last one: a tie
    assert bank.part_of(features[:0], torch.zeros(0, dtype=torch.int64)).shape == (0,)


def test_parts_are_those_of_a_loop():
    bank = filled_bank(3, 4)
    generator = torch.Generator().manual_seed(4)
    features = torch.randn(50, 5, generator=generator)
    classes = torch.randint(3, (50,), generator=generator)
    expected = [
        max(range(4), key=lambda k: float(F.cosine_similarity(f, bank.prototypes[c, k], dim=0)))
        for f, c in zip(features, classes)
    ]
    assert bank.part_of(features, classes).tolist() == expected


def test_an_image_puts_the_mean_of_each_part_into_its_queue():
    bank = PartBank(2, 2, 1, 1, 2, theta=0.75)
    bank.prototypes.fill_(4.0)
    # class 1, part 0: image 5 has 1 and 3, image 7 has 8; class 0, part 1: image 5 has 6
    images, classes = torch.tensor([7, 5, 5, 5]), torch.tensor([1, 1, 0, 1])
    parts = torch.tensor([0, 0, 1, 0])
    z, features = torch.tensor([8.0, 1, 6, 3])[:, None], torch.tensor([1.0, 2, 0, 3])[:, None]
    bank.update(features, z, classes, parts, images)
    assert bank.pushed.tolist() == [[0, 1], [2, 0]]
    assert bank.queues[1, 0].flatten().tolist() == [2, 8]  # the image of the lower slot first
    assert bank.queues[0, 1, 0].item() == 6
    # (1 + 2 + 3) / 3 = 2, the mean over the batch: 0.75 * 4 + 0.25 * 2
    assert bank.prototypes.flatten().tolist() == pytest.approx([4, 3, 3.5, 4])


def test_queues_are_first_in_first_out():
    bank, one = PartBank(1, 1, 1, 1, 3), torch.zeros(1, dtype=torch.int64)
    for value in range(5):
        bank.update(torch.ones(1, 1), torch.full((1, 1), float(value)), one, one, one)
    assert sorted(bank.queues.flatten().tolist()) == [2, 3, 4]
    # more at once than it holds: the newest stay
    images = torch.arange(5)
    z = torch.arange(10.0, 15)[:, None]
    bank.update(torch.ones(5, 1), z, images * 0, images * 0, images)
    assert sorted(bank.queues.flatten().tolist()) == [12, 13, 14]
    assert bank.filled.item() == 3


def test_a_batch_without_a_pixel_leaves_the_bank_as_it_was():
    bank, none = filled_bank(), torch.zeros(0, dtype=torch.int64)
    before = {name: value.clone() for name, value in bank.state_dict().items()}
    bank.update(torch.zeros(0, 5), torch.zeros(0, 4), none, none, none)
    assert all(torch.equal(value, bank.state_dict()[name]) for name, value in before.items())


def test_a_positive_is_of_the_own_queue_and_negatives_of_all_others():
    bank = filled_bank(2, 2, size=3)
    bank.pushed.copy_(torch.tensor([[3, 0], [1, 2]]))  # entries 0 1 2 | 3 | 4 5
    classes, parts = torch.tensor([0, 1, 1, 0]), torch.tensor([0, 0, 1, 1])
    torch.manual_seed(0)
    positive, negative = bank.sample(classes, parts, 400)
    assert positive[3] == -1  # an empty queue
    assert [set(row.tolist()) for row in negative] == [
        {3, 4, 5},
        {0, 1, 2, 4, 5},
        {0, 1, 2, 3},
        {0, 1, 2, 3, 4, 5},
    ]
    assert positive[0] in (0, 1, 2) and positive[1] == 3 and positive[2] in (4, 5)
    counts = negative[0].bincount(minlength=6)[3:]
    assert counts.min() > 90  # about 133 each: entries, not queues, have equal chances


def test_the_contrastive_loss_is_that_of_a_loop():
    bank = filled_bank(3, 2, size=4, dim=6)
    generator = torch.Generator().manual_seed(5)
    anchors = torch.randn(9, 6, generator=generator)
    classes = torch.tensor([0, 0, 2, 2, 2, 0, 0, 2, 2])  # class 1 has no anchor
    parts = torch.tensor([0, 1, 0, 1, 1, 0, 1, 0, 0])
    draws = torch.rand(9, 1 + 7, generator=generator)
    positive, negative = bank.sample(classes, parts, 7, draws)
    entries, by_class = bank.entries(), {0: [], 2: []}

    def phi(a, b):
        return math.exp(float(a @ b / (a.norm() * b.norm())) / 0.5)

    for j, anchor in enumerate(anchors):
        near = phi(anchor, entries[positive[j]])
        far = sum(phi(anchor, entries[n]) for n in negative[j])
        by_class[int(classes[j])].append(-math.log(near / (near + far)))
    expected = sum(sum(terms) / len(terms) for terms in by_class.values()) / 2
    found = contrastive_loss(anchors, classes, parts, bank, 0.5, 7, draws)
    assert float(found) == pytest.approx(expected, abs=1e-6)


def test_the_contrastive_loss_by_hand():
    bank = PartBank(2, 1, 1, 2, 1)
    bank.queues.copy_(torch.tensor([[[[3.0, 0]]], [[[0, 2]]]]))
    bank.pushed.fill_(1)
    anchor, zero = torch.tensor([[5.0, 0]], requires_grad=True), torch.zeros(1, dtype=torch.int64)
    loss = contrastive_loss(anchor, zero, zero, bank, 0.5, 255)
    # cosines 1 and 0: -log(e^2 / (e^2 + 255))
    assert float(loss.detach()) == pytest.approx(math.log(1 + 255 / math.exp(2)), abs=1e-6)
    loss.backward()
    assert torch.isfinite(anchor.grad).all()


@pytest.mark.parametrize("entries", [0, 3])
def test_without_an_anchor_or_with_empty_queues_the_loss_is_0(entries):
    bank = filled_bank(entries=entries)
    anchors = torch.randn(0 if entries else 6, 4, requires_grad=True)
    place = torch.zeros(len(anchors), dtype=torch.int64)
    loss = contrastive_loss(anchors, place, place, bank, 0.5, 255)
    assert float(loss.detach()) == 0
    loss.backward()
    assert torch.equal(anchors.grad, torch.zeros_like(anchors))


def test_a_lonely_queue_has_no_negatives_and_a_loss_of_0():
    bank = filled_bank()
    bank.pushed.copy_(torch.tensor([[2, 0], [0, 0]]))
    anchors = torch.randn(3, 4, generator=torch.Generator().manual_seed(6), requires_grad=True)
    loss = contrastive_loss(anchors, torch.tensor([0, 0, 1]), torch.zeros(3).long(), bank, 0.5, 255)
    assert float(loss.detach()) == pytest.approx(0, abs=1e-6)
    loss.backward()
    assert torch.isfinite(anchors.grad).all()


def test_the_bank_is_whole_in_its_state():
    bank, other = filled_bank(entries=2), PartBank(2, 2, 5, 4, 3)
    other.load_state_dict(bank.state_dict())
    assert torch.equal(bank.entries(), other.entries()) and torch.equal(bank.filled, other.filled)
    assert not list(bank.parameters())


def test_kmeans_finds_clusters_and_does_with_too_few_points():
    generator = torch.Generator().manual_seed(7)
    means = torch.tensor([[0.0, 0], [10, 0], [0, 10], [10, 10]])
    points = (means[:, None] + torch.randn(4, 30, 2, generator=generator) * 0.3).flatten(0, 1)
    centres = kmeans(points, 4, torch.Generator().manual_seed(0))
    expected = points.view(4, 30, 2).mean(1)
    assert torch.allclose(centres[centres.sum(1).argsort()][[0, 3]], expected[[0, 3]], atol=1e-4)
    assert torch.cdist(expected, centres).min(1).values.max() < 1e-4
    two = kmeans(torch.tensor([[1.0, 1], [1, 1], [2, 2]]), 4, torch.Generator().manual_seed(0))
    assert sorted(two.tolist()) == [[0, 0], [0, 0], [1, 1], [2, 2]]
    assert torch.equal(kmeans(torch.zeros(0, 2), 3, generator), torch.zeros(3, 2))


def test_a_part_without_a_pixel_is_nobodys_part():
    """Features may have any sign: beside a prototype that looks the other way 0 would be nearer."""
    bank = PartBank(2, 3, 2, 4, 2)
    bank.prototypes[1, 0] = torch.tensor([1.0, 0.0])
    features = torch.tensor([[-1.0, 0.1], [1.0, 0.2], [-1.0, 0.1]])
    assert bank.part_of(features, torch.tensor([1, 1, 0])).tolist() == [0, 0, 0]
