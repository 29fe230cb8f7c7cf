"""What a method is to the frame. The frame (steps, checkpoints, evaluation, report, predict, dry
run) knows nothing else of it.

To add one: its file at the top level with a class that has these names, a line in `config.METHODS`,
its numbers in `Config`. `mean_teacher.MeanTeacher` and `dewa.Dewa` are the first users, and
`mean_teacher.Supervised` the shortest.
"""

import importlib
from typing import Iterable, Iterator, Protocol

import torch
from torch import Tensor, nn

from config import METHODS, Config
from data import Batches
from inference import Prediction
from readers.ground_truth import DataSet, Taxonomy, Truth

# Runs of stages that have no --method.
BASELINES = {
    "dewa": "dewa.Dewa",
    "sup": "mean_teacher.Supervised",
    "sup deeplab": "semantic.Baseline",
}


class Metric(Protocol):
    """A figure over many images, and over processes. columns: (heading, path in the result) of
    the tables.
    """

    columns: tuple[tuple[str, tuple[str, ...]], ...]

    def __init__(self, taxonomy: Taxonomy): ...

    def add(self, prediction: Prediction, truth: Truth) -> None: ...

    def merge(self, other: "Metric") -> None: ...

    def result(self) -> dict:
        """Plain numbers for JSON, 0 to 1; "per_class" by name. Results of several metrics are put
        together.
        """


class Method(Protocol):
    """One method on one set of classes.

    title: of the progress bar.   models: by name, "student" first; whatever has state: what
    training changes of it (`engine.checkpoint.state_of`) is saved and resumed.   optimizer: of
    those that learn by gradient.
    A model may say `constant`, beginnings of names in its state_dict() that training never changes,
    and `class_rows`, names of what has a row a class and no-object last (joined by name), and
    `begins_anew`, parts of names of what --init may lack.
    metrics: what is measured of every reading.   readings: names such as "student/ensemble" of ways
    to predict, each with its caption;  reading: the one that the paper reports;  pictured: further
    ones that pictures show; `inference.PSEUDO` is the pseudo-labels themselves.
    """

    title: str
    cfg: Config
    taxonomy: Taxonomy
    device: torch.device
    models: dict[str, nn.Module]
    optimizer: torch.optim.Optimizer
    metrics: tuple[type[Metric], ...]
    readings: dict[str, str]
    reading: str
    pictured: dict[str, str]

    def __init__(self, cfg, taxonomy, device, precision=torch.float32, clip=None, warm=False):
        """Precision, device and all schedules are settled here, before the first step.

        clip: weights of a whole CLIP that a file brings along, instead of the configuration's.
        warm: starts from DeWa.
        """

    def batches(self, dataset: DataSet) -> Batches:
        """The training set as a map from step to batch, which has `to(device)` and `names`, or is a
        tuple of such.
        """

    def step(self, batch, t: int) -> dict[str, float]:
        """One step of training, t from 0. Returns its terms; "loss" is their sum.

        Raises: optim.NotFinite, with all models as they were; optim.Broken, if a weight is lost.
        """

    def predict(
        self,
        images: Tensor,
        sizes: list[tuple],
        readings: Iterable[str],
        t: int | None = None,
        semantic: bool = True,
        sums: bool = False,
    ) -> Iterator[tuple[int, str, Prediction]]:
        """As `inference.predict`. t: the step whose pseudo-labels PSEUDO means; None: those of the
        end.
        """


def find(name: str, network: str = "mask2former") -> "type[Method]":
    """The class of a method, or of the stage of a run that has none: "dear", "sup", "dewa".
    network: as in `Config`: "sup" is another baseline on each.
    """
    place = BASELINES.get(f"{name} {network}") or BASELINES.get(name) or METHODS[name].place
    module, _, kind = place.rpartition(".")
    return getattr(importlib.import_module(module), kind)
