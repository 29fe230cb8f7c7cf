"""The contract of `engine.method`: methods that the frame has never heard of train, go on and are
measured."""

import dataclasses
import json
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from config import METHODS
from data import LabeledBatches
from engine import checkpoint, rehearsal
from engine.checkpoint import state_of
from engine.evaluation import evaluate, predict_image, views
from engine.optim import build_optimizer, descend, require_finite
from engine.training import Run
from ground.errors import UserError
from inference import PSEUDO, Prediction
from mean_teacher import MeanTeacher
from mini import scenes
from panoptic_eval import PanopticScore, SemanticScore
from report import watch
from tests.helpers import CPU, SSL, TINY, back_to, log_of, run, same, tiny_segmenter

TWO_STEPS = dataclasses.replace(TINY, ssl_steps=2, sup_steps=2, burn_in=0, checkpoint_every=1)


class Squared(MeanTeacher):
    """A teacher that is surer than it is: its class posterior squared, and made a posterior
    again."""

    title = "squared"

    def teacher_answer(self, features, t):
        posterior, mask_logits = super().teacher_answer(features, t)
        squared = posterior.square()
        return squared / squared.sum(-1, keepdim=True), mask_logits


class Memory(nn.Module):
    """State without a gradient: the mean colour of what was seen, a queue, a counter, and a table
    that stays."""

    constant = ("table",)

    def __init__(self):
        super().__init__()
        self.register_buffer("colour", torch.zeros(3))
        self.register_buffer("queue", torch.zeros(4, 3))
        self.register_buffer("seen", torch.tensor(0))
        self.register_buffer("table", torch.randn(5, generator=torch.Generator().manual_seed(0)))

    @torch.no_grad()
    def see(self, images):
        colour = images.mean((0, 2, 3))
        self.queue[self.seen % 4] = colour
        self.seen += 1
        self.colour.lerp_(colour, 1 / self.seen.item())


class Pixels:
    """No queries, no teacher, no CLIP: a class for every pixel, from its colour beside the mean
    colour of what was seen."""

    title = "pixels"
    metrics = (PanopticScore, SemanticScore)
    readings = {"student/pixels": "pixel by pixel"}
    reading = "student/pixels"
    pictured: dict[str, str] = {}

    def __init__(self, cfg, taxonomy, device, precision=torch.float32, clip=None, warm=False):
        self.cfg, self.taxonomy, self.device = cfg, taxonomy, device
        torch.manual_seed(cfg.seed)
        layers = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()
        student = nn.Sequential(*layers, nn.Conv2d(8, len(taxonomy), 1))
        self.models = {"student": student.to(device), "memory": Memory().to(device)}
        self.optimizer = build_optimizer(student, cfg)

    def batches(self, dataset):
        return LabeledBatches(dataset, self.cfg, self.cfg.sup_steps)

    def logits(self, images):
        colour = self.models["memory"].colour.view(3, 1, 1)
        return self.models["student"](images / 255 - colour)

    def step(self, batch, step):
        self.models["memory"].see(batch.images / 255)
        self.optimizer.zero_grad(set_to_none=True)
        truths = [torch.tensor([-1, *t.labels])[t.segment_map.long()] for t in batch.targets]
        loss = F.cross_entropy(self.logits(batch.images), torch.stack(truths), ignore_index=-1)
        loss.backward()
        terms = require_finite({"labeled/pixels": loss.detach()})
        norm = descend(self.optimizer, self.cfg)
        return {"loss": sum(terms.values()), **terms, "grad_norm": norm}

    @torch.no_grad()
    def predict(self, images, sizes, readings, t=None, semantic=True):
        self.models["student"].eval()
        for k, (_, size) in enumerate(sizes):
            maps = F.interpolate(self.logits(images[k : k + 1]), size=size, mode="bilinear")
            classes = maps[0].argmax(0).numpy()
            labels, segment_map = torch.from_numpy(classes).unique(return_inverse=True)
            segment_map = (segment_map + 1).int().numpy()
            scores = torch.ones(len(labels)).numpy()
            for reading in readings:
                yield k, reading, Prediction(segment_map, labels.numpy(), scores, classes)


def trained(kind, folder, dataset, resume=False):
    """A method after its steps in a folder."""
    made = kind(TWO_STEPS, dataset.taxonomy, CPU)
    training = Run(folder, TWO_STEPS, {"stage": kind.title}, resume)
    training.watch = watch.watcher(folder, made, dataset, 1)
    training.train(made, made.batches(dataset))
    return made


@pytest.mark.parametrize("kind", [Squared, Pixels])
def test_a_method_of_ones_own_trains_goes_on_bit_for_bit_and_is_measured(
    kind, small_mini, tmp_path
):
    dataset, folder = scenes.load_mini("4"), tmp_path / "run"
    made = trained(kind, folder, dataset)
    whole, rows = checkpoint.newest(folder), log_of(folder)
    assert [row["step"] for row in rows] == [0, 1] and whole.keys() >= made.models.keys()
    assert all(math.isfinite(row["loss"]) for row in rows)
    assert [row["step"] for row in watch.read(folder)] == [1, 2]
    back_to(folder, 1)
    again = trained(kind, folder, dataset, resume=True)
    assert same(checkpoint.newest(folder), whole) and log_of(folder) == rows
    results = evaluate(made, dataset, 2)
    assert results == evaluate(again, dataset, 2) and results.keys() == made.readings.keys()
    for result in results.values():
        assert {"all", "miou", "per_class"} <= result.keys() and 0 <= result["miou"] <= 1
        assert result["per_class"][dataset.taxonomy.short_names[0]].keys() >= {"pq", "semantic_iou"}
    image = dataset.val.image(0)
    answer = predict_image(made, image, [made.reading])[made.reading]
    assert answer.segment_map.shape == image.size[::-1]


@pytest.mark.parametrize("kind", [Squared, Pixels])
def test_a_method_of_ones_own_is_rehearsed(kind, small_mini, tmp_path, capsys):
    dataset = scenes.load_mini("4")
    made = kind(TWO_STEPS, dataset.taxonomy, CPU)
    tried = rehearsal.Rehearsal(tmp_path / "run", TWO_STEPS, {"stage": kind.title}, TINY)
    tried.train(made, made.batches(dataset))
    said = capsys.readouterr().out
    assert all(f"{name}: " in said for name in made.models) and "1 to 2: " in said
    assert not (tmp_path / "run").exists()


def test_a_squared_posterior_makes_the_pseudo_labels_and_nothing_else(small_mini):
    dataset = scenes.load_mini("4")
    usual, squared = (kind(TWO_STEPS, dataset.taxonomy, CPU) for kind in (MeanTeacher, Squared))
    weak = usual.batches(dataset)[0][1].weak
    maps = usual.models["teacher"].backbone(weak)
    with torch.no_grad():
        (p, masks), (q, same_masks) = (made.teacher_answer(maps, 0) for made in (usual, squared))
    torch.testing.assert_close(q, p**2 / (p**2).sum(-1, keepdim=True))
    assert torch.equal(masks, same_masks) and q.max(-1).values.mean() > p.max(-1).values.mean()
    sizes = (weak.shape[-2:],) * 3
    labels = [made.pseudo_labels(maps, sizes, 0) for made in (usual, squared)]
    assert [len(made) for made in labels] == [len(weak)] * 2
    sizes = [((64, 64), (64, 64))] * len(weak)
    answers = [list(made.predict(weak, sizes, ["student/decoder"])) for made in (usual, squared)]
    for (_, _, one), (_, _, other) in zip(*answers):
        assert (one.segment_map == other.segment_map).all()


@pytest.mark.parametrize("labels", ["panoptic", "semantic"])
def test_pictures_of_pseudo_labels_show_what_the_student_gets(small_mini, labels):
    class Three(MeanTeacher):
        """A teacher that always says class 3."""

        def teacher_answer(self, features, t):
            posterior, masks = super().teacher_answer(features, t)
            return F.one_hot(torch.full(posterior.shape[:2], 3), posterior.shape[-1]).float(), masks

    dataset = scenes.load_mini("4")
    cfg = dataclasses.replace(TINY, labels=labels, overlap_threshold=0.0)
    made = Three(cfg, dataset.taxonomy, CPU)
    image = dataset.train.image(5)
    batch, ((view, size),) = views([image], made.cfg)
    maps = made.models["teacher"].backbone(batch)
    (target,) = made.pseudo_labels(maps, (view, view, size), 1)
    answer = predict_image(made, image, [PSEUDO], 1)[PSEUDO]
    assert (answer.segment_map == target.segment_map.numpy()).all() and answer.segment_map.any()
    assert set(answer.labels) == {3} == set(target.labels.tolist())
    assert labels == "panoptic" or len(answer.labels) == 1


def test_a_stage_runs_resumes_evaluates_and_shows_a_method_that_is_named_in_the_table(
    small_mini, tmp_path, monkeypatch, capsys
):
    answer, asked = Squared.teacher_answer, []

    def noted(self, features, t):
        asked.append(t)
        return answer(self, features, t)

    monkeypatch.setattr(Squared, "teacher_answer", noted)
    squared = dataclasses.replace(METHODS["dear"], place=f"{__name__}.Squared")
    monkeypatch.setitem(METHODS, "dear", squared)
    steps = ["--steps", 2, "--checkpoint-every", 1, "--burn-in", 0]
    usual = [word for word in SSL if word != "--no-eval"]
    assert run(*usual, *steps, "--out", tmp_path / "run") == 0
    whole = checkpoint.newest(tmp_path / "run")
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert (tmp_path / "run" / "report.html").exists()
    # two steps, and pictures of its own pseudo-labels: of every checkpoint, and of the end
    assert asked[:1] == [0] and {0, 1, None} == set(asked) - {2}
    assert "not written" not in capsys.readouterr().out
    back_to(tmp_path / "run", 1)
    assert run(*usual, *steps, "--out", tmp_path / "run", "--resume") == 0
    assert same(checkpoint.newest(tmp_path / "run"), whole)
    assert run("--stage", "eval", "--weights", tmp_path / "run", "--out", tmp_path / "eval") == 0
    again = json.loads((tmp_path / "eval" / "metrics.json").read_text())
    assert again.pop("run") and again == metrics


# ---------------------------------------------------------- state: what training changes of a model


@pytest.mark.parametrize("classifier", ["language", "linear"])
@pytest.mark.parametrize("train_backbone", [False, True])
def test_the_state_of_a_segmenter_is_its_parameters_without_a_frozen_backbone(
    classifier, train_backbone
):
    cfg = dataclasses.replace(TINY, classifier=classifier, train_backbone=train_backbone)
    student = tiny_segmenter(cfg)
    names = {name for name, _ in student.named_parameters()}
    names = {name for name in names if train_backbone or name.startswith("head.")}
    assert state_of(student).keys() == names == state_of(student.teacher()).keys()
    assert any(name.startswith("backbone.") for name in names) == train_backbone
    assert "backbone.logit_scale" in student.state_dict()  # a number of CLIP's, for ever


def test_the_state_of_a_model_has_its_buffers_and_not_what_it_calls_constant():
    memory = Memory()
    assert list(state_of(memory)) == ["colour", "queue", "seen"]
    assert state_of(memory)["queue"].data_ptr() == memory.queue.data_ptr()  # no copy
    norm = nn.BatchNorm1d(2)
    names = ["weight", "bias", "running_mean", "running_var", "num_batches_tracked"]
    assert list(state_of(norm)) == names


def test_statistics_and_counters_are_saved_and_resumed_and_what_is_constant_is_not(
    small_mini, tmp_path
):
    dataset = scenes.load_mini("4")
    made = trained(Pixels, tmp_path / "run", dataset)
    stored = checkpoint.newest(tmp_path / "run")
    assert stored["memory"].keys() == {"colour", "queue", "seen"} and stored["memory"]["seen"] == 2
    assert stored["student"]["1.num_batches_tracked"] == 2
    assert stored["student"]["1.running_mean"].abs().sum() > 0
    assert (stored["memory"]["queue"].abs().sum(1) > 0).tolist() == [True, True, False, False]
    again = trained(Pixels, tmp_path / "run", dataset, resume=True)  # nothing to do
    for name, model in made.models.items():
        assert same(state_of(model), state_of(again.models[name])), name
    assert torch.equal(made.models["memory"].table, again.models["memory"].table)


def test_a_statistic_that_is_not_finite_is_never_saved(small_mini, tmp_path, monkeypatch):
    see, steps = Memory.see, []

    def spoiled(self, images):
        see(self, images)
        steps.append(len(steps))
        self.queue[0, 0] = math.nan if len(steps) == 2 else 0.0

    monkeypatch.setattr(Memory, "see", spoiled)
    with pytest.raises(UserError, match=r"weights are not finite at step 2 \(memory: queue\)"):
        trained(Pixels, tmp_path / "run", scenes.load_mini("4"))
    assert checkpoint.newest(tmp_path / "run")["step"] == 1
