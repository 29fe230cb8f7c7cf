"""What the command line asks for, beside the numbers of `Config`: which images, where results go,
on what machine, and how a run is to go on. A stage takes those of these that it needs.
"""

import dataclasses
import re
from dataclasses import dataclass
from pathlib import Path

import torch

from config import PAPERS_DATASETS, Config
from ground import ranks
from ground.errors import UserError, refuse
from mini.scenes import load_mini
from readers import class_maps, papers
from readers.checks import require_files, require_images
from readers.exposure import see
from readers.ground_truth import DataSet, Taxonomy
from readers.instances import (
    instance_json,
    load_instances,
    require_every_pixel,
    things_only,
)
from readers.panoptic import has_maps, load_folder
from readers.pictures import ImageFolder

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Source:
    """Which images: a data set and its split, or (masks and warm-up) a folder of images."""

    dataset: str = "mini"
    data_root: str = ""
    variant: str = ""
    split: str = "16"
    eval_on: str = "val"
    images: Path | None = None

    @property
    def name(self) -> str:
        """Of the images, in the names of run folders."""
        folder = self.images or (self.data_root if self.dataset == "custom" else None)
        return Path(folder).resolve().name if folder else self.dataset

    @property
    def evaluated_on(self) -> str:
        return self.eval_on if self.dataset == "mini" else "val"

    def load(
        self, cfg: Config, complain=refuse, config: dict | None = None, origin=None
    ) -> DataSet:
        """The data set.

        complain: called with every fault that allows to read on.   config: of a run, whose order
        and names of classes the data set then takes; origin: where that is from.   Raises:
        UserError if it has other classes.
        """
        dataset = self._read(cfg, complain)
        if cfg.labels == "instances":
            dataset = things_only(dataset)
        else:
            require_every_pixel(dataset)
        classes = classes_of(config or {}, origin)
        if classes is not None:
            dataset.follow(classes, origin)
        return dataset

    def _read(self, cfg: Config, complain) -> DataSet:
        if self.dataset == "mini":
            return load_mini(self.split, self.eval_on)
        if not self.data_root:
            raise UserError(
                f"--dataset {self.dataset} needs --data-root DIR: a folder in COCO panoptic format"
            )
        root = Path(self.data_root)
        if self.dataset in PAPERS_DATASETS:
            dataset = papers.load(self.dataset, root, self.split, cfg.seed, complain)
        elif self._has_class_maps_alone(root):
            dataset = class_maps.load(root, self.split, cfg.seed, complain)
        else:
            load = load_instances if self._as_instances(root, cfg) else load_folder
            dataset = load(root, self.split, cfg.seed, self.variant, complain)
        see(cfg.white, cfg.stretch, dataset.train, dataset.val)
        return dataset

    def _has_class_maps_alone(self, root: Path) -> bool:
        """A list of classes may lie beside a JSON, which says more."""
        listed = has_maps(root, self.variant) or instance_json(root, "train", self.variant)
        return class_maps.is_one(root) and not listed

    def _as_instances(self, root: Path, cfg: Config) -> bool:
        """A folder may hold instances, panoptic maps or both: then it is as the labels want it."""
        there, maps = instance_json(root, "train", self.variant), has_maps(root, self.variant)
        if cfg.labels == "instances":
            return there is not None or not maps  # of neither, what instances want is said
        return there is not None and not maps

    def load_images(self, cfg: Config):
        """What SAM segments and the decoder is warmed up on: the folder of images, and None; or all
        training images, and the data set.
        """
        if self.images:
            images = ImageFolder(self.images)
            see(cfg.white, cfg.stretch, images)
            return images, None
        dataset = self._read(cfg, refuse)  # whatever its labels are of
        images = dataset.train
        require_images(images)
        require_files(images, range(len(images)), "training", maps=False)
        return images, dataset


def classes_of(config: dict, origin) -> Taxonomy | None:
    """The classes that a run stores; the warm-up has none, and older runs do not store them."""
    stored = config.get("taxonomy")
    return None if stored is None else Taxonomy.from_config(stored, origin)


@dataclass(frozen=True)
class Place:
    """Where results go: in `out`, or below `runs` under a name of their own."""

    runs: Path = Path("runs")
    out: Path | None = None

    def folder(self, source: Source, kind: str, seed: int = 0) -> Path:
        """RUNS/DATASET-KIND, with the seed if it is not 0."""
        return self.runs / f"{source.name}-{kind}{f'-seed{seed}' if seed else ''}"

    def masks(self, source: Source) -> Path:
        """Where the masks of all training images are, unless somebody names another folder."""
        return self.runs / f"{source.name}-masks"


@dataclass(frozen=True)
class Machine:
    """precision: of the model's matrix products; losses and the ensemble are always fp32."""

    device: torch.device = torch.device("cpu")
    precision: torch.dtype = torch.float32


@dataclass(frozen=True)
class Course:
    """How a training run is to go.

    given: fields of Config that the command line names;  steps: the length of the stage, if it is
    one of them.
    make: first what an earlier stage has not made.   evaluate, report_images, groups, watch: what
    is measured and shown.
    report: with dry_run, a page of what the network will see.
    later: train only, the same call without it evaluates.
    """

    resume: bool = False
    make: bool = True
    dry_run: bool = False
    report: bool = False
    evaluate: bool = True
    later: bool = False
    steps: int | None = None
    given: frozenset[str] = frozenset()
    preset: str | None = None
    groups: int = 0
    watch: int = 8
    report_images: int = 12
    log: str = ""


def machine(device: str | None, precision: str) -> Machine:
    """This process's share of it, which joins the others of torchrun. Raises: UserError if the
    device is not there.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        place = torch.device(ranks.local_device(device))
        torch.empty(0, device=place)
        ranks.start(place)
    except (RuntimeError, AssertionError, ImportError):  # torch's own words are a wall of text
        there = ", ".join(_devices())
        raise UserError(f"device '{device}': not available here; available: {there}") from None
    if precision == "bf16" and place.type == "cpu" and not multiplies_bf16():
        print(
            "warning: --precision bf16: this CPU has no instructions for it and takes several "
            "times as long as with fp32"
        )
    return Machine(place, PRECISIONS[precision])


def _devices() -> list[str]:
    """As --device names them."""
    names = ["cpu", *(f"cuda:{k}" for k in range(torch.cuda.device_count()))]
    return [*names, "mps"] if torch.backends.mps.is_available() else names


def multiplies_bf16(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether the CPU multiplies bf16 itself, as Linux says; elsewhere nobody says, and it is taken
    to.
    """
    try:
        flags = re.findall(r"^(?:flags|Features)\s*:(.*)$", cpuinfo.read_text(), re.M)
    except OSError:
        return True
    return not flags or not {"avx512_bf16", "amx_bf16", "bf16"}.isdisjoint(flags[0].split())


def part(kind: type, values: dict):
    """The fields of one of these classes, from flags by name."""
    names = {field.name for field in dataclasses.fields(kind)}
    return kind(**{name: value for name, value in values.items() if name in names})
