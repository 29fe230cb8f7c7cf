"""The stages: one short function each, in the order of the method; what they wire together is in the files they import.

`dearli.py` reads the command line and calls one of them. `resolve` makes of the flags a `Job` (what is asked for) and a `Config`
(the numbers): those of the data set's preset, or those that a run has stored, and then the flags.
"""

import argparse
import contextlib
import dataclasses
import html
import io
import json
import multiprocessing
import os
import re
import signal
import statistics
import sys
import tempfile
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import config
import dewa
from clip_ensemble import (
    TEMPLATES,
    Backbone,
    ClipBackbone,
    Vocabulary,
    alpha_of_share,
    text_embeddings,
)
from config import PAPERS_DATASETS, PRESETS, Config, ablations, numbers_of, require_semi_supervised
from data import LabeledBatches, SemiSupervisedBatches
from engine import checkpoint, rehearsal
from engine.command_line import (
    DATASETS,
    MAKES,
    check,
    configure,
    given,
    parser,
    require_of_the_run,
    require_sense,
    steps_of,
)
from engine.evaluation import (
    evaluate,
    frequency_groups,
    group_quality,
    papers_reading,
    posterior_alphas,
    predict,
)
from engine.optim import build_optimizer
from engine.training import MAY_CHANGE, Run, Stopped, differing, require_free
from ground import files, ranks, tensor_files
from ground.errors import UserError, choose, refuse
from ground.identity import differences, of_tensors
from mean_teacher import train_step
from mini.scenes import load_mini, mini_taxonomy
from model import Segmenter
from pretrained import foundation, official
from readers import mask_files
from readers.checks import limits, require_files, require_images, require_truth
from readers.downloads import default_root
from readers.exposure import see
from readers.ground_truth import DataSet, Taxonomy
from readers.panoptic import load_folder
from readers.pictures import ImageFolder
from report import drawing, gallery, page, run_folder, tables, watch
from tools import importer, prepare, validate
from tools.predict import Pictures, Predictor
from tools.zeroshot import flatten, zero_shot

# What a decoder has to have in common with the one whose weights it takes
DECODER = (
    "backbone",
    "pretrained",
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
)
MAKES_MASKS = (
    "sam",
    "sam_weights",
    "points_per_side",
    "pred_iou_thresh",
    "stability_thresh",
    "mask_nms_thresh",
)
SHARED = ("masks", "dewa", "sup", "ssl", "eval")  # stages that several ranks can work on
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclasses.dataclass(frozen=True)
class Job:
    """What the command line asks for, beside the numbers in Config."""

    dataset: str = "mini"
    data_root: str = ""
    variant: str = ""
    split: str = "16"
    method: str = "dearli"
    eval_on: str = "val"
    runs: Path = Path("runs")
    out: Path | None = None
    init: Path | None = None
    masks: Path | None = None
    images: Path | None = None
    json: Path | None = None
    groups: int = 0
    watch: int = 16
    weights: Path | None = None
    input: Path | None = None
    source_format: str = ""
    background: str = ""
    val_share: float = 0.2
    stuff: str = ""
    masks_are: str = ""
    classes: str = ""
    posterior: str = ""
    which: str = "student"
    force: bool = False
    palette: str = "dataset"
    preset: str | None = None
    dry_run: bool = False
    log: str = ""
    compare: tuple[Path, ...] = ()
    report_images: int = 12
    state: dict | None = None  # what `weights` holds, read once (`read_run`)
    assets: Path | None = None
    format: str = "official"
    resume: bool = False
    make: bool = True  # first what an earlier stage has not made
    steps: int | None = None
    given: frozenset[str] = frozenset()  # fields of Config that the command line names
    evaluate: bool = True
    later: bool = False  # train only: the same call without it evaluates
    device: torch.device = torch.device("cpu")
    precision: torch.dtype = torch.float32
    seeds: int = 3
    jobs: int = 0

    @property
    def name(self) -> str:
        """Of the images, in the names of run folders."""
        folder = self.images or (self.data_root if self.dataset == "custom" else None)
        return Path(folder).resolve().name if folder else self.dataset

    def folder(self, kind: str, cfg: Config) -> Path:
        """runs/DATASET-KIND, with the seed if it is not 0."""
        return self.runs / f"{self.name}-{kind}{f'-seed{cfg.seed}' if cfg.seed else ''}"


# ------------------------------------------------------------------------------------------- data and model


def load_data(
    job: Job, cfg: Config, complain=refuse, config: dict | None = None, source=None
) -> DataSet:
    """complain: called with every fault that allows to read on.

    config: of a run, whose order and names of classes the data set then takes; source: where it is
    from.   Raises: UserError if it has other classes.
    """
    dataset = _load_data(job, cfg, complain)
    classes = classes_of(config or {}, source)
    if classes is not None:
        dataset.follow(classes, source)
    return dataset


def classes_of(config: dict, source) -> Taxonomy | None:
    """The classes that a run stores; the warm-up has none, and older runs do not store them."""
    stored = config.get("taxonomy")
    return None if stored is None else Taxonomy.from_config(stored, source)


def _load_data(job: Job, cfg: Config, complain) -> DataSet:
    if job.dataset == "mini":
        return load_mini(job.split, job.eval_on)
    if not job.data_root:
        raise UserError(
            f"--dataset {job.dataset} needs --data-root DIR: a folder in COCO panoptic format"
        )
    if job.dataset in PAPERS_DATASETS:
        dataset = prepare.load(job.dataset, Path(job.data_root), job.split, cfg.seed, complain)
    else:
        dataset = load_folder(Path(job.data_root), job.split, cfg.seed, job.variant, complain)
    see(cfg.white, dataset.train, dataset.val)
    return dataset


def load_images(job: Job, cfg: Config):
    """What SAM segments and the decoder is warmed up on: a folder of images, or the training images of the data set."""
    if job.images:
        images = ImageFolder(job.images)
        see(cfg.white, images)
        return images
    images = load_data(job, cfg).train
    require_images(images)
    require_files(images, range(len(images)), "training", maps=False)
    return images


def require_training_files(dataset: DataSet, cfg: Config, evaluate: bool) -> None:
    """What a training run reads of labelled and validation images is there: asked before the first step, not after the last."""
    require_truth(dataset, measure=evaluate)
    require_files(dataset.train, dataset.labeled, "labelled", classes=cfg.labels == "semantic")
    require_files(dataset.val, range(len(dataset.val)), "validation", classes=True)


def settle(cfg: Config, dataset: DataSet) -> Config:
    """What the data set decides, as numbers: `--white 0` and `--alpha labeled`."""
    cfg = dataclasses.replace(cfg, white=dataset.train.white)
    if cfg.alpha != "labeled":
        return cfg
    require_truth(dataset, measure=False)  # no share without labelled images
    share = len(dataset.labeled) / (len(dataset.labeled) + len(dataset.unlabeled))
    return dataclasses.replace(cfg, alpha=round(alpha_of_share(share), 3))


def build(job: Job, cfg: Config, taxonomy: Taxonomy, clip_weights: dict | None = None) -> Segmenter:
    """A segmenter with a random decoder (by seed) on the backbone of the configuration, or of a checkpoint that brings its own."""
    if foundation.is_timm(cfg.backbone):
        if cfg.has_ensemble or clip_weights is not None:
            raise UserError(
                f"backbone {cfg.backbone} has no text tower: it needs --classifier linear, and --method ssl in the semi-supervised stage"
            )
        trunk = foundation.load_timm(cfg)
        torch.manual_seed(cfg.seed)
        return Segmenter(
            Backbone(trunk, frozen=not cfg.train_backbone), None, cfg, len(taxonomy)
        ).to(job.device)
    clip, tokenize = foundation.load_clip(cfg, clip_weights)
    names = [name for names in taxonomy.synonyms for name in names]
    embed = lambda: text_embeddings(clip.to(job.device), tokenize, names)
    if cfg.backbone == "mini" or cfg.pretrained == "random" or clip_weights is not None:
        embeddings = embed()
    else:
        tower = {
            name: value
            for name, value in clip.state_dict().items()
            if not name.startswith("visual.")
        }
        key = [
            "text",
            cfg.backbone,
            of_tensors(tower),
            TEMPLATES,
            names,
        ]  # what is in a file, not what it is called
        embeddings = tensor_files.cached(foundation.CACHE, key, embed)
    vocabulary = Vocabulary(embeddings, [len(s) for s in taxonomy.synonyms])
    torch.manual_seed(cfg.seed)
    return Segmenter(
        ClipBackbone(clip, frozen=not cfg.train_backbone), vocabulary, cfg, len(taxonomy)
    ).to(job.device)


# ------------------------------------------------------------------------------------------------------ stages


def stage_prepare(job: Job, cfg: Config) -> Path:
    """The paper's data sets: check the downloads, fetch partitions and class names, make panoptic ground truth."""
    choose("data set to prepare", job.dataset, PAPERS_DATASETS)
    folder = prepare.prepare(job.dataset, Path(job.data_root), job.assets, cfg.workers)
    dataset = prepare.load(job.dataset, Path(job.data_root), "1")
    print(
        f"{folder}: ready; {len(dataset.taxonomy)} classes, {len(dataset.train)} training and {len(dataset.val)} validation images"
    )
    return folder


def stage_import(job: Job, cfg: Config) -> Path:
    """Annotations of other tools, as a folder that every stage reads (`importer.py`)."""
    named = {"stuff": job.stuff, "masks_are": job.masks_are, "classes": job.classes}
    result = importer.import_folder(
        job.source_format, job.input, job.out, job.background, job.val_share, cfg.seed, **named
    )
    print(importer.summary(result, job.out))
    return job.out


def stage_validate(job: Job, cfg: Config) -> dict:
    """Read the whole data set, list what it holds and all that is wrong with it. Raises UserError if anything is."""
    faults: list[UserError] = []
    try:
        dataset = load_data(job, cfg, faults.append)
        result = validate.check(dataset, faults, cfg.workers, job.masks, cfg)
    except UserError as error:  # so broken that it cannot be opened
        result, dataset = {"refused": str(error)}, None
    if job.json:
        files.write_atomic(
            job.json,
            json.dumps(
                {"dataset": job.dataset, "data_root": job.data_root, "split": job.split, **result},
                indent=1,
            ).encode(),
        )
    if dataset is None:
        raise UserError(result["refused"])
    print(validate.report(result, f"{job.name}, split {job.split}", job.data_root))
    if validate.summary(result):
        raise UserError(
            f"{job.data_root or job.name}: {validate.summary(result)}, listed above{f' and in {job.json}' if job.json else ''}"
        )
    return result


def stage_masks(job: Job, cfg: Config) -> Path:
    """SAM's masks of all training images, labelled and unlabelled alike."""
    images, folder = load_images(job, cfg), job.out or job.runs / f"{job.name}-masks"
    if job.dry_run:
        generator = foundation.load_sam(cfg, job.precision)(job.device)
        rehearsal.say_repeated(
            "masks", len(images), lambda k: generator.generate(np.asarray(images.image(k))), 1
        )
        rehearsal.say_memory(job.device)
        return folder
    files.require_writable(folder)
    done = mask_files.generate_masks(
        images, foundation.load_sam(cfg, job.precision)(job.device), folder
    )
    print(f"{folder}: masks of {len(images)} images, {done} of them made now")
    return folder


def stage_dewa(job: Job, cfg: Config) -> Path:
    """Decoder warm-up, L_loc on all SAM masks."""
    cfg = dataclasses.replace(cfg, teacher_posterior="decoder")  # there is no teacher
    images, folder = load_images(job, cfg), job.out or job.folder("dewa", cfg)
    before = begun(job, folder)
    cfg = as_begun(job, dataclasses.replace(cfg, white=images.white), before, "dewa_steps")
    with masks_for(job, cfg, images, folder) as (masks, those):
        about = {"data": images.fingerprint(), "masks": mask_files.made_of(masks, images, those)}
        say_maker(job, cfg, about["masks"])
        run = begin(
            job, folder, cfg, {"stage": "dewa", "dataset": job.name, **about}, before=before
        )
        model = build(job, cfg, dewa.TAXONOMY)
        run.config["foundation"] = require_foundation(before.config, model, folder)
        optimizer = build_optimizer(model, cfg)
        step = lambda batch, t: dewa.dewa_step(model, optimizer, batch, cfg, t, job.precision)
        batches = dewa.DewaBatches(images, masks, cfg, cfg.dewa_steps)
        batches.indices = those
        run.train({"student": model}, optimizer, batches, step, job.device, "DeWa")
    if not job.dry_run and ranks.rank() == 0:
        write_report(job, cfg, folder, None, None)
    return folder


def require_place(job: Job, folder: Path) -> None:
    """Raise UserError if a run cannot go into its folder: asked before what it needs is made."""
    require_free(folder, job.resume)
    files.require_writable(folder)


@contextlib.contextmanager
def masks_for(job: Job, cfg: Config, images, run: Path):
    """SAM's masks of all images: the folder, and the images that it holds masks of. Those that are
    missing are made first, with the numbers of this run.

    They are in --masks, or beside the images (as in SA-1B), which are somebody's own and not added
    to; or in RUNS/DATASET-masks.
    With --dry-run a few are made, in a folder that does not stay, and it is said how long all of
    them would take.
    Raises: UserError if masks are missing and may not be made.
    """
    beside = job.images and mask_files.mask_file(job.images, images.name(0)).exists()
    folder = job.masks or (job.images if beside else job.runs / f"{job.name}-masks")
    missing = mask_files.missing_masks(folder, images)
    ranks.wait()  # all have looked before one of them writes
    what = (
        "no SAM masks"
        if len(missing) == len(images)
        else f"no SAM masks of {len(missing)} of {len(images)} images ({images.name(missing[0])})"
        if missing
        else ""
    )
    own = job.masks or beside
    if missing and (len(missing) == len(images) if own else not job.make):
        raise UserError(
            f"{folder}: {what}; make them with --stage "
            f"masks{' --out ' + str(folder) if job.masks else ''}, or name their folder with "
            f"--masks DIR"
        )
    if missing and own:
        print(f"warning: {folder}: {what}; a step that takes such an image will end the run")
        yield folder, range(len(images))
        return
    if missing and job.dry_run:
        rehearsal.say("first", f"{folder}: {what}; they would be made first (--no-make forbids it)")
        generator = foundation.load_sam(cfg, job.precision)(job.device)
        with tempfile.TemporaryDirectory() as scratch:
            rehearsal.say_repeated(
                "masks",
                len(missing),
                lambda k: mask_files.segment(images, missing[k], generator, Path(scratch)),
                1,
            )
            yield Path(scratch), missing[:2]  # those that were tried
        return
    if missing:
        require_place(job, run)
        build(job, cfg, dewa.TAXONOMY)  # its weights are asked for before hours of work
        print(f"{folder}: {what}; they are made first (--no-make forbids it)")
        stage_masks(dataclasses.replace(job, out=None), cfg)
    yield folder, range(len(images))


def say_maker(job: Job, cfg: Config, made: dict | None) -> None:
    """Masks that are there count, whatever made them, unless the command line asks for others.
    made: of `dewa.made_of`.

    Raises: UserError if they were made with another value of a flag that is given.
    """
    if made is None:
        return
    there, folder = made["generator"], made["folder"]
    if there is None:
        print(f"{folder}: these masks do not say what made them; taken as they are")
        return
    now = dict(foundation.mask_settings(cfg))
    if "sam_weights" in job.given and now["kind"] == "sam":
        now["weights"] = foundation.load_sam(cfg)(torch.device("cpu")).about["weights"]
    differs = [key for key in now if there.get(key) != now[key]]
    asked = {"kind", "sam"} if "sam" in job.given else set()
    asked |= {"weights"} if "sam_weights" in job.given else set()
    wrong = [key for key in differs if key in asked or key in job.given]
    said = differences(
        *({key: of[key] for key in wrong or differs if key in of} for of in (there, now))
    )
    if wrong:
        raise UserError(
            f"{folder}: masks made with other settings ({said}); without these flags they are "
            f"taken as they are; for others name another folder "
            f"with --masks, made by --stage masks --out, or delete this one"
        )
    if differs:
        print(
            f"{folder}: masks made with other settings than the preset's ({said}); taken as they "
            f"are"
        )


def stage_sup(job: Job, cfg: Config) -> Path:
    """The supervised baseline: labelled images only."""
    folder = job.out or job.folder(f"sup-{job.split}", cfg)
    before = begun(job, folder)
    dataset = load_data(job, cfg, config=before.config, source=folder)
    cfg = as_begun(job, settle(cfg, dataset), before, "sup_steps")
    require_training_files(dataset, cfg, job.evaluate)
    start, init = beginning(job, folder, before, job.init)
    about = {
        "data": dataset.train.fingerprint(dataset.labeled),
        "truth": dataset.truth_fingerprint(unlabeled=False),
        "init": init,
    }
    run = begin(
        job, folder, cfg, {**identity(job, "sup", dataset.taxonomy), **about}, dataset, before
    )
    say_ablations(cfg, "sup")
    student = build(job, cfg, dataset.taxonomy, start.get("clip"))
    run.config["foundation"] = require_foundation(before.config, student, folder)
    start_from(start, init, student, dataset)
    optimizer, things = (
        build_optimizer(student, cfg),
        torch.tensor(dataset.taxonomy.things) & (cfg.labels == "panoptic"),
    )
    step = lambda batch, t: train_step(
        student, None, optimizer, batch, None, things, cfg, t, precision=job.precision
    )
    run.watch = watch.watcher(
        folder, {"student": student}, dataset, cfg, job.device, job.watch if job.evaluate else 0
    )
    run.train(
        {"student": student},
        optimizer,
        LabeledBatches(dataset, cfg, cfg.sup_steps),
        step,
        job.device,
        "supervised",
    )
    finish(job, cfg, dataset, {"student": student}, folder)
    return folder


def stage_ssl(job: Job, cfg: Config) -> Path:
    """The semi-supervised stage: ssl, dear or dearli."""
    folder = job.out or job.folder(f"{job.method}-{job.split}", cfg)
    before = begun(job, folder)
    dataset = load_data(job, cfg, config=before.config, source=folder)
    cfg = as_begun(job, settle(cfg, dataset), before, "ssl_steps")
    if not dataset.unlabeled:
        raise UserError(
            f"--split {job.split}: all images of {job.name} are labelled, none is left for the semi-supervised stage; choose fewer, or --stage sup"
        )
    require_training_files(dataset, cfg, job.evaluate)
    require_files(dataset.train, dataset.unlabeled, "unlabelled", maps=False)
    source = job.init
    if job.method == "dearli" and source is None and not before.knows_init:
        source = warm_up(job, cfg, dataset, folder)
    elif idle := sorted(job.given & MAKES["ssl"]):  # only with --resume: else they are refused
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in idle)
        print(f"{folder}: goes on with the warm-up that it began with; {flags} change nothing")
    start, init = beginning(job, folder, before, source)
    # of a --dry-run there may be no DeWa weights yet: its steps are those of a run that has them
    warm = init is not None or job.method == "dearli"
    require_semi_supervised(cfg, warm)
    about = {
        "data": dataset.train.fingerprint(),
        "truth": dataset.truth_fingerprint(),
        "init": init,
    }
    run = begin(
        job, folder, cfg, {**identity(job, job.method, dataset.taxonomy), **about}, dataset, before
    )
    say_ablations(cfg, "ssl", warm)
    student = build(job, cfg, dataset.taxonomy, start.get("clip"))
    run.config["foundation"] = require_foundation(before.config, student, folder)
    start_from(start, init, student, dataset)
    teacher = student.teacher()
    optimizer, things = (
        build_optimizer(student, cfg),
        torch.tensor(dataset.taxonomy.things) & (cfg.labels == "panoptic"),
    )
    models = {"student": student, "teacher": teacher}
    step = lambda batch, t: train_step(
        student, teacher, optimizer, *batch, things, cfg, t, warm, job.precision
    )
    run.watch = watch.watcher(
        folder, models, dataset, cfg, job.device, job.watch if job.evaluate else 0, warm
    )
    run.train(
        models,
        optimizer,
        SemiSupervisedBatches(dataset, cfg, cfg.ssl_steps, warm),
        step,
        job.device,
        job.method,
    )
    finish(job, cfg, dataset, models, folder)
    return folder


def warm_up(job: Job, cfg: Config, dataset: DataSet, run: Path) -> Path | None:
    """The DeWa run of --method dearli without --init: the one of this name, if it is of these
    images, of this decoder and finished; else it is made or goes on.

    Returns: its folder; None with --dry-run, if there is none that is finished.   Raises:
    UserError if it is of something else, or may not be made.
    """
    folder = job.folder("dewa", cfg)
    state = read_run(folder) if checkpoint.steps(folder) else None
    taken, steps = (state.get("step"), state.get("steps")) if state else (0, cfg.dewa_steps)
    if state:
        config, fields = (
            state["config"],
            [*DECODER, *sorted(name for name in job.given if name.startswith("dewa_"))],
        )
        differs = differences(
            *({key: of.get(key) for key in fields if key in config} for of in (config, vars(cfg)))
        )
        if config.get("data") is None:
            print(f"warning: {folder}: an older DeWa run, which does not say of which images it is")
        elif config["data"] != dataset.train.fingerprint():
            other = f"other training images, those of a data set called {config.get('dataset')}"
            differs = f"{other}; {differs}" if differs else other
        if differs:
            raise UserError(
                f"{folder}: a DeWa run of something else ({differs}); name the one to start from "
                f"with --init, choose other folders with --runs, "
                f"or delete it, and it is made anew"
            )
        say_maker(job, cfg, config.get("masks"))
        if steps is None or taken >= steps:
            return folder
    what = f"DeWa stopped at step {taken} of {steps}" if state else "no DeWa weights"
    if not job.make:
        raise UserError(
            f"{folder}: {what} for --method dearli; make them with `python dearli.py --stage dewa "
            f"--dataset {job.dataset}` (same --seed and "
            f"--data-root{'; --resume goes on' if state else ''}), or go without: --method dear"
        )
    if job.dry_run:
        rehearsal.say(
            "first", f"{folder}: {what}; the warm-up would come first (--no-make forbids it)"
        )
    else:
        require_place(job, run)
        build(job, cfg, dataset.taxonomy)  # as in `masks_for`
        print(f"{folder}: {what}; the warm-up comes first (--no-make forbids it)")
    ranks.wait()  # all have looked before one of them writes
    stage_dewa(
        dataclasses.replace(
            job,
            resume=True,
            out=None,
            init=None,
            steps=cfg.dewa_steps if "dewa_steps" in job.given else None,
        ),
        cfg,
    )
    ranks.wait()  # the last checkpoint is written by one of them, and read by all
    return None if job.dry_run else folder


@dataclasses.dataclass(frozen=True)
class Begun:
    """What is in the folder of a run that goes on. state: its newest checkpoint;  config: what it
    stores of itself;  note: what an older run says of its --init."""

    state: dict | None = None
    config: dict = dataclasses.field(default_factory=dict)
    note: str = ""

    @property
    def knows_init(self) -> bool:
        """What the run began with is on record (an older run's is in the weights of its
        checkpoint, at least)."""
        return self.state is not None or isinstance(self.config.get("init"), dict)


def begun(job: Job, folder: Path) -> Begun:
    """With --resume: what is there. The folder is held from here on, as by `trainer.Run`."""
    if not job.resume:
        return Begun()
    said = {}
    with contextlib.suppress(
        UserError
    ):  # no run there yet, or one whose checkpoint will say what it is
        said = run_folder.read(folder).config
    if not checkpoint.steps(folder):
        return Begun(None, said)
    if not job.dry_run:
        if ranks.rank() == 0:
            files.claim(folder)
        ranks.wait()
    state = checkpoint.newest(folder)
    config = state.get("config")
    note = said.get("init")
    return Begun(
        state, config if isinstance(config, dict) else {}, note if isinstance(note, str) else ""
    )


def as_begun(job: Job, cfg: Config, before: Begun, steps: str) -> Config:
    """With --resume, the length and the burn-in that the run was begun with, unless they are named. steps: the field of its length."""
    names = {steps, "ssl_steps", "burn_in", "burn_in_warm"} & before.config.keys()
    stored = {
        name: before.config[name] for name in names if type(before.config[name]) in (int, float)
    }
    length = {name: stored[name] for name in {"ssl_steps"} & stored.keys()}
    begun = dataclasses.replace(cfg, **length).settled()
    kept = {}
    for name in stored:
        if name not in (job.given | {"ssl_steps"}) or name == steps and job.steps is None:
            kept[name] = stored[name]
        elif (
            name.startswith("burn_in") and getattr(begun, name) == stored[name]
        ):  # named again as a share: what that share was
            kept[name] = stored[name]
    return dataclasses.replace(
        cfg, **kept
    ).settled()  # the burn-in does not move when the run is made longer


def say_ablations(cfg: Config, stage: str, warm: bool = False) -> None:
    for line in ablations(cfg, stage, warm):
        print(f"warning: {line}")


def beginning(
    job: Job, folder: Path, before: Begun, source: Path | None
) -> tuple[dict, dict | None]:
    """What a run starts from, which is part of what it is: on --resume it is that of the run, with
    --init or without.

    source: --init, or the DeWa run; None: nothing.
    Returns: what there is to take (as `read_run`; of a run that goes on, whose weights are in its
    checkpoint, only a CLIP that its start brought along);
        and {"source", "sha256": of the weights, "clip": whether it brought one}, None for nothing.
    Raises: UserError if the run began with something else, or what it needs is not there any more.
    """
    stored = before.config.get("init")
    stored = stored if isinstance(stored, dict) else None
    known = before.state is not None and "init" in before.config
    if known and stored is None and source is not None:
        raise UserError(
            f"{folder}: began without --init, and cannot be resumed with {source}; leave --init "
            f"out, or choose another folder with --out"
        )
    if known and source is None and not (stored or {}).get("clip"):
        return {}, stored
    if source is None and stored is not None:
        source = Path(str(stored.get("source")))
        if not source.exists():
            raise UserError(
                f"{source}: not there any more; {folder} began with it and needs "
                f"{'its CLIP' if known else 'its weights'}: name it with --init"
            )
    if source is None:
        return {}, {
            "source": before.note.rsplit(": ", 1)[0],
            "sha256": None,
            "clip": False,
            "taken": before.note,
        } if before.note else None
    state = read_run(source)
    if "student" not in state:
        raise UserError(f"{source}: holds no student")
    init = {
        "source": str(source),
        "sha256": of_tensors(
            {**{f"clip.{name}": t for name, t in state.get("clip", {}).items()}, **state["student"]}
        ),
        "clip": "clip" in state,
    }
    if stored is not None and stored.get("sha256") not in (None, init["sha256"]):
        raise UserError(
            f"{folder}: began with other weights than those of {source} now (with "
            f"{stored.get('source')}, SHA-256 {str(stored['sha256'])[:12]}... there, "
            f"{init['sha256'][:12]}... now); leave --init out, or choose another folder with --out"
        )
    if before.state is not None:
        return {key: state[key] for key in ("clip",) if key in state}, stored or init
    return state, init


def begin(
    job: Job,
    folder: Path,
    cfg: Config,
    identity: dict,
    dataset: DataSet | None = None,
    before: Begun = Begun(),
) -> "Run | rehearsal.Rehearsal":
    """The run in `folder`, or with --dry-run what stands in for it."""
    print("".join(f"warning: {line}\n" for line in limits(dataset, cfg)) if dataset else "", end="")
    if job.dry_run:
        if dataset is not None:
            rehearsal.say_data(dataset, job.split)
        return rehearsal.Rehearsal(folder, cfg, identity, PRESETS[job.preset or job.dataset])
    run = Run(folder, cfg, identity, job.resume, before.state)
    if job.log and ranks.rank() == 0:
        from torch.utils.tensorboard import SummaryWriter

        run.curves = SummaryWriter(folder)
    return run


def stage_eval(job: Job, cfg: Config) -> Path:
    """PQ and mIoU of a run, or of an official file: student and teacher, decoder alone and ensembled."""
    stored = job.state.get("config", {})
    dataset, folder = load_data(job, cfg, config=stored, source=job.weights), results_folder(job)
    cfg = settle(cfg, dataset)
    others = [
        f"{name} {stored[name]} there, {value} now"
        for name, value in vars(cfg).items()
        if stored.get(name, value) != value and name not in MAY_CHANGE
    ]
    if others and folder == job.weights:
        raise UserError(
            f"{folder}: its results are of other numbers ({', '.join(others)}) and would be replaced; name a folder for the new ones with --out"
        )
    if folder == job.weights and elsewhere(job, stored, dataset):
        raise UserError(
            f"{folder}: its results are of {stored['data_root']} and would be replaced by those of "
            f"{job.data_root}, which has other training images; name a folder for the new ones "
            "with --out"
        )
    if checkpoint.steps(folder) and folder.resolve() != job.weights.resolve():
        raise UserError(
            f"{folder}: holds another run, whose results would be replaced by those of "
            f"{job.weights}; choose another folder with --out"
        )
    files.require_writable(folder)
    require_truth(dataset, learn=False)
    require_files(dataset.val, range(len(dataset.val)), "validation", classes=True)
    finish(
        dataclasses.replace(job, evaluate=True),
        cfg,
        dataset,
        load_models(job, cfg, dataset.taxonomy),
        folder,
    )
    return folder


def elsewhere(job: Job, stored: dict, dataset: DataSet) -> bool:
    """Whether a data set is another one than that of a run: in another place, and not the same
    training images."""
    there = stored.get("data_root")
    if not there or Path(job.data_root).resolve() == Path(there).resolve():
        return False
    indices = dataset.labeled if stored.get("stage") == "sup" else None
    return stored.get("data") not in (None, dataset.train.fingerprint(indices))


def stage_predict(job: Job, cfg: Config) -> Path:
    """A run, or an official file, applied to pictures of one's own (`predict.py`)."""
    folder = job.out or Path("predictions")
    pictures = Pictures(job.input, folder, job.force, job.resume)
    done = pictures.fill(predictor(job, cfg))
    print(f"{folder}: predictions of {len(pictures.names)} pictures, {done} of them made now")
    return folder


def load(weights, **flags) -> Predictor:
    """A run, or an official file, as a function of images (see `predict.py`). flags: those of the command line, as `which="teacher", device="cpu"`."""
    args = parser().parse_args(["--stage", "predict", "--weights", str(weights), "--input", "."])
    unknown = next((name for name in flags if not hasattr(args, name)), None)
    if unknown:
        raise TypeError(f"load: no flag {unknown}; available: {', '.join(vars(args))}")
    return predictor(
        *resolve(argparse.Namespace(**{**vars(args), **flags, "flags": args.flags | flags.keys()}))
    )


def predictor(job: Job, cfg: Config) -> Predictor:
    """The student or the teacher of `job.state`, with its own classes."""
    if cfg.alpha == "labeled" or job.state.get("config", {}).get("stage") == "dewa":
        raise UserError(
            "--alpha labeled: expected a number, pictures have no labelled share"
            if cfg.alpha == "labeled"
            else f"{job.weights}: a DeWa run knows no classes; expected one of --stage sup or --stage ssl"
        )
    usual = papers_reading(cfg.teacher_posterior).split("/")[1]
    posterior = choose("posterior of this run", job.posterior or usual, posterior_alphas(cfg))
    choose(
        f"model of {job.weights}",
        job.which,
        [name for name in ("student", "teacher") if name in job.state],
    )
    taxonomy = repainted(job, taxonomy_of(job, cfg))
    model = load_models(job, cfg, taxonomy)[job.which]
    return Predictor(
        model,
        taxonomy,
        cfg,
        job.device,
        posterior,
        {"weights": str(job.weights), "which": job.which},
    )


def taxonomy_of(job: Job, cfg: Config) -> Taxonomy:
    """The classes that a run stores; of official files and of older runs, which store none, those of the data set."""
    stored = job.state.get("config", {}).get("taxonomy")
    if stored is not None:
        return Taxonomy.from_config(stored, job.weights)
    if job.dataset == "mini":
        return mini_taxonomy()
    try:
        return load_data(job, cfg).taxonomy
    except UserError as error:
        raise UserError(
            f"{job.weights}: does not store its classes, so they are read from the data set (--dataset, --data-root): {error}"
        ) from None


def stage_report(job: Job, cfg: Config) -> Path:
    """report.html of a run, beside those of --compare; without its data or its weights, what can be said without them."""
    folder, warm_up = results_folder(job), job.state["config"].get("stage") == "dewa"
    files.require_writable(folder)
    run, *others = [
        run_folder.read(source, job.state["config"])
        for source in (job.weights if job.weights.is_dir() else folder, *job.compare)
    ]
    job = dataclasses.replace(job, eval_on=run.metrics.get("evaluated_on", "val"))
    dataset, cards, missing = (
        None,
        {},
        "the warm-up knows no class"
        if warm_up
        else ""
        if run.reading
        else "the run was not evaluated",
    )
    try:
        dataset = load_data(job, cfg, config=job.state["config"], source=job.weights)
        dataset.taxonomy = repainted(job, dataset.taxonomy)
        if not missing and job.report_images:
            cfg = settle(cfg, dataset)
            cards = draw_cards(
                job,
                cfg,
                dataset,
                load_models(job, cfg, dataset.taxonomy),
                run,
                others_readings(job, cfg, dataset, others),
            )
    except UserError as error:
        missing = str(error)
        print(f"warning: no pictures: {error}")
    print(page.write(folder, [run, *others], dataset, cards, missing))
    return folder


def draw_cards(
    job: Job,
    cfg: Config,
    dataset: DataSet,
    models: dict[str, Segmenter],
    run: run_folder.Stored,
    others=(),
) -> dict:
    stage, data = run.config.get("stage"), run.config.get("data")
    own = data in (
        None,
        dataset.train.fingerprint(dataset.labeled if stage == "sup" else None),
    )  # its pseudo-labels were drawn on the run's own images
    return gallery.gallery(
        models,
        dataset,
        cfg,
        job.device,
        run.reading,
        job.report_images,
        job.masks or job.runs / f"{job.name}-masks",
        run.folder if own else None,
        others,
    )


def others_readings(job: Job, cfg: Config, dataset: DataSet, others: list) -> list[gallery.Reading]:
    """What the runs of --compare say of an image, in the paper's reading of each; one without weights, or of other classes, says nothing."""
    readings = []
    for run in others:
        try:
            if not checkpoint.steps(run.folder) or not run.reading:
                raise UserError(f"{run.folder}: no weights, or not evaluated")
            state = read_run(run.folder)
            own = dataclasses.replace(cfg, **numbers_of(state["config"]))
            if own.white not in (0, dataset.val.white):
                raise UserError(f"{run.folder}: sees 16-bit images by another white point")
            own = settle(own, dataset)
            which, posterior = run.reading.split("/")
            theirs = dataclasses.replace(job, state=state, weights=run.folder)
            readings.append(
                gallery.Reading(
                    html.escape(run.name),
                    load_models(theirs, own, dataset.taxonomy)[which],
                    own,
                    posterior_alphas(own)[posterior],
                )
            )
        except (UserError, KeyError) as error:
            print(f"warning: no pictures of a run beside this one: {error}")
    return readings


def repainted(job: Job, taxonomy: Taxonomy) -> Taxonomy:
    """With the colours of --palette."""
    return taxonomy if job.palette == "dataset" else dataclasses.replace(taxonomy, palette=None)


def results_folder(job: Job) -> Path:
    """Where the results of a run go, or of an official file."""
    return job.out or (job.weights if job.weights.is_dir() else job.runs / job.weights.stem)


def load_models(job: Job, cfg: Config, taxonomy: Taxonomy) -> dict[str, Segmenter]:
    """Student and teacher of --weights, as far as they are there."""
    names = [name for name in ("student", "teacher") if name in job.state]
    if not names:
        raise UserError(f"{job.weights}: no checkpoint (step_*.pt) in this folder")
    student = build(job, cfg, taxonomy, clip_of(job))
    require_foundation(job.state.get("config", {}), student, job.weights)
    require_classes(job.state, len(taxonomy), job.weights)
    order = class_order(job.state, taxonomy, job.name, job.weights)
    models = {name: student if name == "student" else student.teacher() for name in names}
    for name, model in models.items():
        take(job.state, name, model, f"{job.weights} ({name})", order=order)
    return models


def clip_of(job: Job) -> dict | None:
    """The CLIP that --weights bring along: an official file its own; a run that began with such a
    file, which stores no frozen CLIP, that of the file."""
    init = job.state.get("config", {}).get("init")
    if "clip" in job.state or not (isinstance(init, dict) and init.get("clip")):
        return job.state.get("clip")
    try:
        return read_run(Path(str(init.get("source")))).get("clip")
    except UserError as error:
        raise UserError(
            f"{job.weights}: began with {init.get('source')}, and needs the CLIP that is in it: "
            f"{error}"
        ) from None


def require_foundation(config: dict, model: Segmenter, source) -> str:
    """SHA-256 of what of a model is not trained, its CLIP's image tower as a rule, which no
    checkpoint stores.   config: of a run, which says which it had.

    Raises: UserError if that was another.
    """
    trained = model.trained()
    digest = of_tensors(
        {
            name: value
            for name, value in model.backbone.state_dict().items()
            if f"backbone.{name}" not in trained
        }
    )
    if config.get("foundation") not in (None, digest):
        raise UserError(
            f"{source}: was trained on a backbone of other weights (SHA-256 "
            f"{str(config['foundation'])[:12]}... there, {digest[:12]}... now): name the file "
            f"that it had with --pretrained, or choose another folder with --out"
        )
    return digest


def identity(job: Job, stage: str, taxonomy: Taxonomy) -> dict:
    """What makes a run that run, beside its numbers: compared on --resume, read back by --stage eval and --stage predict."""
    return {
        "stage": stage,
        "dataset": job.name,
        "data_root": job.data_root,
        "variant": job.variant,
        "split": job.split,
        "taxonomy": taxonomy.to_config(),
    }


def start_from(state: dict, init: dict | None, student: Segmenter, dataset: DataSet) -> None:
    """Start from another run or file, if there is something to take (`beginning`), and note in
    `init` what was taken. Classes are joined by name; a
    linear class head stays random after DeWa, which knows no classes."""
    if "student" not in state:
        return
    source, config = init["source"], state.get("config", {})
    if config.get("stage") == "dewa":
        if config.get("data") not in (None, dataset.train.fingerprint()):
            print(
                f"{source}: was warmed up on other images than the training images of this run "
                f"({config.get('dataset')})"
            )
    elif "weights" not in state or state["weights"].kind != "dewa":
        require_classes(state, len(dataset.taxonomy), source)
    order = class_order(state, dataset.taxonomy, dataset.name, source)
    init["taken"] = take(
        state,
        "student",
        student,
        str(source),
        may_differ=("decoder.classify.weight", "decoder.classify.bias"),
        order=order,
    )
    print(init["taken"])


def class_order(state: dict, taxonomy: Taxonomy, here: str, source) -> np.ndarray | None:
    """The place of every class of `taxonomy` among those that the weights were trained on; None if
    these do not say, or know no classes.

    Raises: UserError if they are other classes, or (of older runs) another number of them.
    """
    config = state.get("config", {})
    if (
        "weights" in state or config.get("stage") == "dewa"
    ):  # official files say how many: `require_classes`
        return None
    stored = classes_of(config, source)
    if stored is not None:
        return taxonomy.order_in(stored, here, str(source))
    heads = [
        t
        for which in ("student", "teacher")
        for name, t in state.get(which, {}).items()
        if name.endswith("decoder.classify.weight")
    ]
    if heads and len(heads[0]) != len(taxonomy) + 1:
        raise UserError(
            f"{source}: trained on {len(heads[0]) - 1} classes, {here} has {len(taxonomy)}; choose "
            f"the data set it belongs to"
        )
    print(
        f"warning: {source}: an older run, which does not store the names of its classes; make "
        f"sure that they are those of {here}, in that order"
    )
    return None


def take(
    state: dict,
    which: str,
    model: Segmenter,
    source: str,
    may_differ: tuple[str, ...] = (),
    order: np.ndarray | None = None,
) -> str:
    """Weights of the student or the teacher of `read_run`; a backbone that came with its whole
    CLIP is in the model already (`build`).
    order: of `class_order`; the rows of a linear class head follow it, no-object stays the last
    one."""
    if which not in state:
        raise UserError(f"{source}: holds no {which}")
    into = {
        name: p
        for name, p in model.trained().items()
        if "clip" not in state or name.startswith("head.")
    }
    weights = dict(state[which])
    for name in (
        [
            name
            for name in weights
            if name.endswith(("decoder.classify.weight", "decoder.classify.bias"))
        ]
        if order is not None
        else ()
    ):
        if len(weights[name]) == len(order) + 1:  # else it says itself that it does not fit
            weights[name] = weights[name][[*order.tolist(), len(order)]]
    return checkpoint.load_weights(into, weights, source, may_differ)


def read_run(folder: Path | None) -> dict:
    """A run's newest checkpoint, or an official or exported file: {"student" and / or "teacher": weights, "config" or "clip": ...}."""
    if folder is None:
        raise UserError(
            "this stage needs --weights runs/NAME, or a checkpoint of the official code"
        )
    if Path(folder).is_dir():
        state = checkpoint.newest(folder)
        if state is None:
            raise UserError(f"{folder}: no checkpoint (step_*.pt) in this folder")
        return require_run(state, folder)
    weights = official.read(folder)
    if weights is None:
        return require_run(tensor_files.load(folder), folder)
    print(f"{folder}: {weights.summary()}")
    return {"student": weights.head, "clip": weights.clip, "weights": weights}


def require_run(state: dict, source: Path) -> dict:
    """The state, if it is one that a run has saved; UserError otherwise."""
    models, config = (
        [state[name] for name in ("student", "teacher") if name in state],
        state.get("config"),
    )
    if (
        not models
        or not isinstance(config, dict)
        or not all(
            isinstance(m, dict)
            and all(isinstance(n, str) and isinstance(t, torch.Tensor) for n, t in m.items())
            for m in models
        )
    ):
        raise UserError(
            f"{source}: neither a checkpoint of a run (with config, and the weights of student or teacher) nor one of the official code"
        )
    require_config(config, source)
    return state


def require_config(config: dict, source: Path) -> dict:
    for field in dataclasses.fields(Config):
        value, kind = config.get(field.name, field.default), type(field.default)
        if type(value) not in ({float, int} if kind is float else {kind}) | (
            {str} if field.name == "alpha" else set()
        ):
            raise UserError(
                f"{source}: its config has {field.name} = {value!r:.60}, expected {kind.__name__}"
            )
    return config


def require_classes(state: dict, expected: int, source: Path) -> None:
    """Raise if an official file says that it was trained on another number of classes (a language head would not notice)."""
    found = state["weights"].num_classes if "weights" in state else None
    if found not in (None, expected):
        raise UserError(
            f"{source}: trained on {found} classes, the data set has {expected}; choose the data set it belongs to"
        )


def finish(
    job: Job, cfg: Config, dataset: DataSet, models: dict[str, Segmenter], folder: Path
) -> None:
    """Evaluate, write metrics.json and report.html, print the table."""
    if job.later:
        return
    if job.dry_run:
        rehearsal.say_repeated(
            "evaluation",
            len(dataset.val),
            lambda k: evaluate(models, dataset, cfg, job.device, 1, title=""),
        )
        return
    if job.evaluate:
        metrics = evaluate(models, dataset, cfg, job.device)
        if job.groups:
            groups = frequency_groups(dataset, job.groups)
            for reading in metrics:
                metrics[reading]["groups"] = group_quality(
                    metrics[reading], dataset.taxonomy, groups
                )
                print(
                    f"{reading}: PQ of {job.groups} groups of classes, least to most frequent: "
                    + ", ".join(
                        f"{100 * group['pq']:.1f}" if group["n"] else "n/a"
                        for group in metrics[reading]["groups"]
                    )
                )
        content = {
            "evaluated_on": job.eval_on if job.dataset == "mini" else "val",
            "images": len(dataset.val),
            **metrics,
        }
        if ranks.rank() == 0:
            files.write_atomic(folder / "metrics.json", json.dumps(content, indent=1).encode())
        print(tables.table([(reading, metrics[reading]) for reading in metrics]))
        print(f"{folder / 'metrics.json'}")
    if ranks.rank() == 0:
        write_report(job, cfg, folder, dataset, models)


def write_report(
    job: Job,
    cfg: Config,
    folder: Path,
    dataset: DataSet | None,
    models: dict[str, Segmenter] | None,
) -> None:
    """report.html at the end of a stage. models: None, if there is nothing to be drawn."""
    try:
        run = run_folder.read(
            folder, {**(job.state or {}).get("config", {}), **dataclasses.asdict(cfg)}
        )
        cards = (
            draw_cards(job, cfg, dataset, models, run)
            if models and run.reading and job.report_images
            else {}
        )
        print(page.write(folder, [run], dataset, cards))
    except Exception as error:  # a picture of the run is not worth the run
        print(
            f"warning: {folder / 'report.html'}: not written ({type(error).__name__}: {error}); again with --stage report --weights {folder}"
        )


# ------------------------------------------------------------------------------------- demo and ladder (mini)


@dataclasses.dataclass(frozen=True)
class Rung:
    """A row of a table: what is trained, what is changed in the configuration, and the reading that the paper takes."""

    title: str
    kind: str  # sup, ssl, dear or dearli
    reading: str
    changes: tuple[tuple[str, object], ...] = ()

    @property
    def run(self) -> str:
        """Name of what is trained; rows that differ in the reading alone share it."""
        return "-".join(
            [self.kind, *(f"{key}-{value}".replace(":", "-") for key, value in self.changes)]
        )


RUNGS = (
    Rung("M2F-Lang, supervised", "sup", "student/decoder"),
    Rung("  + P_ENS at evaluation", "sup", "student/ensemble"),  # Table 1
    Rung("M2F-Lang + SSL", "ssl", "student/decoder"),
    Rung("DEAR", "dear", "student/ensemble"),
    Rung("DEARLi", "dearli", "student/ensemble"),
)
ALPHAS = tuple(
    Rung(f"DEAR, alpha {value}", "dear", "student/ensemble", (("alpha", value),))
    for value in (0.5, 0.6, 0.7, "0.4:0.8", "labeled")
)  # Table 8


def require_rungs(cfg: Config, rungs: tuple["Rung", ...]) -> None:
    """Raise UserError for a configuration that some rung cannot be trained with, before the first one is."""
    if cfg.ssl_steps <= cfg.dewa_steps and any(rung.kind == "dearli" for rung in rungs):
        raise UserError(
            f"--steps {cfg.ssl_steps}: DEARLi's warm-up alone takes {cfg.dewa_steps} of them (--dewa-steps); expected more"
        )
    for kind in {rung.kind for rung in rungs} - {"sup"}:
        require_semi_supervised(rung_config(cfg, kind), kind == "dearli")
    if cfg.classifier != "language" or foundation.is_timm(cfg.backbone):
        raise UserError(
            "the rungs are those of M2F-Lang: demo, ladder and alpha need --classifier language and a CLIP; for others use --stage sup and --stage ssl"
        )


def run_rung(job: Job, cfg: Config, rung: Rung) -> dict | None:
    """Train one rung unless its metrics are there already; returns them, or with job.later None. Every rung takes sup_steps optimiser steps in all."""
    folder = job.folder(f"{rung.run}-{job.split}", cfg)
    kind, wanted = rung.kind, rung_config(dataclasses.replace(cfg, **dict(rung.changes)), rung.kind)
    # a table is of the numbers that it says: masks and a warm-up of others are refused, as if all
    # flags were given
    job = dataclasses.replace(
        job, resume=True, steps=cfg.ssl_steps, out=None, given=frozenset(vars(cfg))
    )
    if (folder / "metrics.json").exists():
        dataset, metrics = load_data(job, cfg), json.loads((folder / "metrics.json").read_text())
        labeled = dataset.labeled if kind == "sup" else None
        about = {
            "data": dataset.train.fingerprint(labeled),
            "truth": dataset.truth_fingerprint(unlabeled=kind != "sup"),
        }
        if kind == "dearli":
            source = warm_up(job, wanted, dataset, folder)
            about["init"] = beginning(job, folder, Begun(), source)[1]
        stored, expected = (
            json.loads((folder / "config.json").read_text()),
            {
                **identity(job, kind, dataset.taxonomy),
                **about,
                **dataclasses.asdict(settle(wanted, dataset)),
            },
        )
        if (
            about.keys() <= stored.keys()
            and not differing(stored, expected)
            and all(stored[k] == expected[k] for k in ("sup_steps", "ssl_steps", "dewa_steps"))
            and metrics.get("evaluated_on") == (job.eval_on if job.dataset == "mini" else "val")
        ):
            return metrics
    if kind == "sup":
        stage_sup(dataclasses.replace(job, out=folder), wanted)
    else:
        stage_ssl(dataclasses.replace(job, out=folder, method=kind), wanted)
    return None if job.later else json.loads((folder / "metrics.json").read_text())


def run_rungs(job: Job, tasks: list[tuple[Config, Rung]]) -> list[dict]:
    """Train rungs that do not depend on each other, --jobs of them at a time, each in a process of its own; their metrics, in order."""
    jobs = min(job.jobs or (min(os.cpu_count(), 8) if job.device.type == "cpu" else 1), len(tasks))
    if jobs == 1:
        return [run_rung(job, cfg, rung) for cfg, rung in tasks]
    logs = {job.folder(f"{rung.run}-{job.split}", cfg) / "log.jsonl" for cfg, rung in tasks}
    logs |= {job.folder("dewa", cfg) / "log.jsonl" for cfg, rung in tasks if rung.kind == "dearli"}
    taken = lambda: sum(log.read_bytes().count(b"\n") for log in logs if log.exists())
    with (
        ProcessPoolExecutor(
            jobs,
            multiprocessing.get_context("spawn"),
            _in_silence,
            (max(1, os.cpu_count() // jobs),),
        ) as pool,
        tqdm(
            total=sum(cfg.ssl_steps for cfg, _ in tasks),
            desc=f"{len(tasks)} runs, {jobs} at a time",
            unit="step",
            dynamic_ncols=True,
        ) as bar,
    ):
        # the longest first: DEARLi has masks and warm-up to make, a supervised step is the shortest. What has been trained is evaluated by whichever process is free
        longest = sorted(
            range(len(tasks)),
            key=lambda k: ("dearli", "dear", "ssl", "sup").index(tasks[k][1].kind),
        )
        running, metrics = (
            {
                pool.submit(_rung, dataclasses.replace(job, later=True), *tasks[k]): k
                for k in longest
            },
            {},
        )
        try:
            while running:
                for future in wait(running, timeout=1, return_when=FIRST_COMPLETED).done:
                    k = running.pop(future)
                    metrics[k] = future.result()
                    if metrics[k] is None:
                        running[pool.submit(_rung, job, *tasks[k])] = k
                bar.n = taken()
                bar.refresh()
        except BaseException:  # after Ctrl-C the processes have got it, too: each saves its run
            pool.shutdown(cancel_futures=True)
            raise
    return [metrics[k] for k in range(len(tasks))]


def _rung(job: Job, cfg: Config, rung: Rung) -> dict | None:
    """`run_rung` in a process of `run_rungs`, which after Ctrl-C takes no other: the pool has handed out one more than it can cancel."""
    global _stopped
    if _stopped:
        raise Stopped(signal.SIGINT, "not begun, stopped")
    try:
        return run_rung(job, cfg, rung)
    except (Stopped, KeyboardInterrupt):
        _stopped = True
        raise


_stopped = False


def _in_silence(threads: int) -> None:
    """A process of `run_rungs`: its lines would run into those of the others; what matters is in the run's folder."""
    torch.set_num_threads(threads)
    sys.stdout = sys.stderr = open(os.devnull, "w")


def rung_config(cfg: Config, kind: str) -> Config:
    """Equal optimiser steps: what DEARLi spends on its warm-up is taken from its semi-supervised stage. A burn-in is a share of all of them."""
    cfg = cfg.settled()
    if kind == "sup":
        return dataclasses.replace(cfg, sup_steps=cfg.ssl_steps, teacher_posterior="decoder")
    steps = cfg.ssl_steps - (cfg.dewa_steps if kind == "dearli" else 0)
    return dataclasses.replace(
        cfg, teacher_posterior="decoder" if kind == "ssl" else "ensemble", ssl_steps=steps
    )


def stage_demo(job: Job, cfg: Config) -> Path:
    """All stages on the miniature world, a table, and a picture of what each rung sees."""
    require_rungs(cfg, RUNGS)
    files.require_writable(job.out or job.runs)
    shown = [rung for rung in RUNGS if rung.kind in ("sup", "dear", "dearli")]
    trained = {rung.run: rung for rung in shown}  # two rows read the same run
    metrics = dict(zip(trained, run_rungs(job, [(cfg, rung) for rung in trained.values()])))
    print("\n" + tables.table([(rung.title, metrics[rung.run][rung.reading]) for rung in shown]))
    dataset = load_data(job, cfg)
    path = (job.out or job.runs) / "demo.png"
    draw(job, settle(cfg, dataset), dataset, path)
    print(f"\n{path}: images, ground truth and predictions side by side")
    return path


def draw(job: Job, cfg: Config, dataset: DataSet, path: Path, images=(0, 1, 2, 3)) -> None:
    """A picture of the first validation images, their ground truth, and the prediction of each rung of the demo."""
    things = torch.tensor(dataset.taxonomy.things)
    titles, models = ["image", "ground truth"], []
    for title, kind, posterior in (
        ("supervised", "sup", "decoder"),
        ("DEAR", "dear", "ensemble"),
        ("DEARLi", "dearli", "ensemble"),
    ):
        model = build(job, cfg, dataset.taxonomy)
        checkpoint.load_weights(
            model.trained(), read_run(job.folder(f"{kind}-{job.split}", cfg))["student"], kind
        )
        titles, models = titles + [title], models + [(model, posterior_alphas(cfg)[posterior])]
    rows = []
    for i in images:
        image, truth = dataset.val.image(i), dataset.val.truth(i)
        maps = [(truth.segment_map, truth.labels)]
        for model, alpha in models:
            segment_map, labels, _ = predict(model, image, things, cfg, job.device, alpha)
            maps.append((segment_map.cpu().numpy(), labels.cpu().numpy()))
        rows.append((image, maps))
    caption = (
        f"Panoptic segmentation: every pixel belongs to one segment; things are counted one by one, stuff is not; black: no answer. "
        f"Learned from {len(dataset.labeled)} labelled and {len(dataset.unlabeled)} unlabelled images."
    )
    drawing.picture(rows, titles, dataset.taxonomy, path, caption)


def stage_ladder(job: Job, cfg: Config) -> Path:
    """The paper's Table 1 in miniature."""
    return compare(job, cfg, RUNGS, "ladder")


def stage_alpha(job: Job, cfg: Config) -> Path:
    """The paper's Table 8 in miniature, and an alpha that grows or follows the labelled share (supplement C)."""
    return compare(job, cfg, ALPHAS, "alpha")


def compare(job: Job, cfg: Config, rungs: tuple[Rung, ...], name: str) -> Path:
    """Every rung over several seeds, all readings, mean and standard deviation: two tables, and the raw figures in NAME.json."""
    require_rungs(cfg, rungs)
    files.require_writable(job.out or job.runs)
    if any(rung.kind == "dearli" for rung in rungs):
        stage_masks(dataclasses.replace(job, out=None), cfg)  # all seeds share them
    tasks = [
        (dataclasses.replace(cfg, seed=seed), rung)
        for rung in {r.run: r for r in rungs}.values()
        for seed in range(cfg.seed, cfg.seed + job.seeds)
    ]
    results: dict[str, list[dict]] = {}
    for (_, rung), metrics in zip(tasks, run_rungs(job, tasks)):
        results.setdefault(rung.run, []).append(metrics)

    def spread(run, reading, *keys):
        values = []
        for metrics in results[run]:
            for key in (reading, *keys):
                metrics = metrics[key]
            values.append(100 * metrics)
        return f"{statistics.mean(values):.1f} ± {statistics.stdev(values) if len(values) > 1 else 0:.1f}"

    keys = (
        ("PQ", ("all", "pq")),
        ("PQ things", ("things", "pq")),
        ("PQ stuff", ("stuff", "pq")),
        ("mIoU", ("miou",)),
    )
    lines = [
        "| rung (the paper's reading) | " + " | ".join(title for title, _ in keys) + " |",
        "|---" * (len(keys) + 1) + "|",
    ]
    lines += [
        f"| {r.title.strip()} | " + " | ".join(spread(r.run, r.reading, *k) for _, k in keys) + " |"
        for r in rungs
    ]
    readings = ("student/decoder", "student/ensemble", "teacher/decoder", "teacher/ensemble")
    lines += ["", "| PQ | " + " | ".join(readings) + " |", "|---" * 5 + "|"]
    lines += [
        f"| {run} | "
        + " | ".join(spread(run, r, "all", "pq") if r in results[run][0] else "" for r in readings)
        + " |"
        for run in results
    ]
    print("\n" + "\n".join(lines))
    slim = {
        run: [
            {
                r: {
                    "pq": m[r]["all"]["pq"],
                    "sq": m[r]["all"]["sq"],
                    "rq": m[r]["all"]["rq"],
                    "pq_things": m[r]["things"]["pq"],
                    "pq_stuff": m[r]["stuff"]["pq"],
                    "miou": m[r]["miou"],
                }
                for r in readings
                if r in m
            }
            for m in metrics
        ]
        for run, metrics in results.items()
    }
    path = (job.out or job.runs) / f"{name}.json"
    versions = {"python": sys.version.split()[0], "torch": torch.__version__}
    content = {
        "command": "python " + " ".join(sys.argv),
        "seeds": list(range(cfg.seed, cfg.seed + job.seeds)),
        "split": job.split,
        "evaluated_on": job.eval_on,
        "versions": versions,
        "config": dataclasses.asdict(cfg),
        "results": slim,
    }
    files.write_atomic(path, json.dumps(content, indent=1).encode())
    print(f"\n{path}")
    return path


def stage_zeroshot(job: Job, cfg: Config) -> Path:
    """PQ of CLIP alone on given masks of the validation images: the true ones (Figure 3) or SAM's (section 3.3)."""
    dataset, folder = (
        load_data(job, cfg),
        job.out or job.folder(f"zeroshot-{job.masks.name if job.masks else 'gt'}", cfg),
    )
    files.require_writable(folder)
    require_truth(dataset, learn=False)
    require_files(dataset.val, range(len(dataset.val)), "validation")
    if foundation.is_timm(cfg.backbone):
        raise UserError(
            f"--stage zeroshot: backbone {cfg.backbone} has no text tower; expected an OpenCLIP ConvNeXt such as {', '.join(config.TAGS)}"
        )
    if job.masks is None or str(job.masks) == "gt":
        partition = lambda i: dataset.val.truth(i).segment_map
    else:
        masks = job.masks
        if str(masks) == "sam":
            masks = job.runs / f"{job.name}-masks-{job.eval_on}"
            mask_files.generate_masks(dataset.val, foundation.load_sam(cfg)(job.device), masks)
        partition = lambda i: flatten(
            mask_files.read_masks(
                masks, dataset.val.name(i), dataset.val.image(i).size[::-1], dataset.val.digest(i)
            )
        )
    metrics = zero_shot(build(job, cfg, dataset.taxonomy), dataset, cfg, job.device, partition)
    files.write_atomic(
        folder / "metrics.json",
        json.dumps({"images": len(dataset.val), "zero-shot": metrics}, indent=1).encode(),
    )
    print(tables.table([("zero-shot", metrics)], tables.COLUMNS[:-1]))
    print(f"{folder / 'metrics.json'}")
    return folder


def stage_export(job: Job, cfg: Config) -> Path:
    """A run, or an official file, as one file: for the official code, or as safetensors."""
    state = job.state
    weights = state.get("weights")
    if weights is None:
        weights = whole_model(job, cfg, state)
    path = job.out or Path(job.weights).with_suffix(
        ".pth" if job.format == "official" else ".safetensors"
    )
    if path.exists():
        raise UserError(f"{path}: exists already; name another file with --out")
    official.write(path, weights, job.format)
    print(f"{path}: {weights.summary()}")
    return path


def whole_model(job: Job, cfg: Config, state: dict) -> official.Weights:
    """The student of a run with its CLIP and the criterion's buffers, which runs do not store."""
    if foundation.is_timm(cfg.backbone):
        raise UserError(
            f"--stage export: a file holds a whole CLIP, and backbone {cfg.backbone} has none; its runs are used as they are (--weights, --init)"
        )
    warm_up = state["config"]["stage"] == "dewa"
    taxonomy = dewa.TAXONOMY if warm_up else taxonomy_of(job, cfg)
    clip = foundation.load_clip(cfg, clip_of(job))[0].state_dict()
    trained = {
        n.replace("backbone.", "visual.", 1): t
        for n, t in state["student"].items()
        if n.startswith("backbone.")
    }
    kind = "dewa" if warm_up or state["config"]["stage"] == "sup" else "student"
    return official.Weights(
        kind,
        {n: t for n, t in state["student"].items() if n.startswith("head.")},
        {**clip, **trained},
        official.criterion(kind, len(taxonomy), cfg.no_object_weight),
    )


def stage_mini_clip(job: Job, cfg: Config) -> None:
    from mini import mini_clip

    mini_clip.train(job.out or mini_clip.WEIGHTS, seed=cfg.seed)


def stage_mini_sam(job: Job, cfg: Config) -> None:
    from mini import mini_sam

    mini_sam.train(job.out or mini_sam.WEIGHTS, seed=cfg.seed)


STAGES = {
    "prepare": stage_prepare,
    "import": stage_import,
    "validate": stage_validate,
    "masks": stage_masks,
    "dewa": stage_dewa,
    "sup": stage_sup,
    "ssl": stage_ssl,
    "eval": stage_eval,
    "predict": stage_predict,
    "report": stage_report,
    "zeroshot": stage_zeroshot,
    "export": stage_export,
    "demo": stage_demo,
    "ladder": stage_ladder,
    "alpha": stage_alpha,
    "mini-clip": stage_mini_clip,
    "mini-sam": stage_mini_sam,
}


# ------------------------------------------------------------------------------------------------ the command line


def resolve(args: argparse.Namespace) -> tuple[Job, Config]:
    """Command line -> job and configuration: the preset of the data set (or the numbers of a run), then the flags."""
    check(args)
    state, stored = None, {}
    split, variant, data_root = args.split, args.variant, args.data_root
    if args.stage == "report" and args.weights is None:  # its page goes where it is
        args.weights = args.out
    if args.stage == "report" and args.weights and args.weights.is_dir():
        state = (
            read_run(args.weights)
            if checkpoint.steps(args.weights)
            else {"config": require_config(run_folder.read(args.weights).config, args.weights)}
        )
        args.dataset = (
            run_folder.data_set(state["config"])[0] if args.dataset == "mini" else args.dataset
        )
    if args.stage in ("eval", "predict", "export", "report"):
        state = state or read_run(args.weights)
        stored = state.get("config", {})
        own = (
            args.stage == "predict"
            or args.stage in ("eval", "export")
            and "dataset" not in args.flags
        )
        if (
            own and "dataset" in stored
        ):  # the run's own, under its name or as a folder of somebody's own
            args.dataset = stored["dataset"] if stored["dataset"] in DATASETS else "custom"
    if state is not None:
        split, variant, data_root = (
            split or stored.get("split"),
            variant or stored.get("variant", ""),
            data_root or stored.get("data_root", ""),
        )
    if not data_root and args.dataset in PAPERS_DATASETS:  # of an official file, which does not say
        data_root = str(default_root(args.dataset))
    args.split = split
    cfg = configure(args, None if state is None else stored)
    require_sense(args, cfg)
    if state is not None:
        require_of_the_run(args, stored)
    if ranks.started_by_torchrun() and args.stage not in SHARED:
        raise UserError(
            f"--stage {args.stage}: works in one process; torchrun serves {', '.join(SHARED)}"
        )
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(ranks.local_device(device))
        torch.empty(0, device=device)
        ranks.start(device)
    except (RuntimeError, AssertionError, ImportError):  # torch's own words are a wall of text
        there = ", ".join(devices())
        raise UserError(f"device '{device}': not available here; available: {there}") from None
    if args.precision == "bf16" and device.type == "cpu" and not multiplies_bf16():
        print(
            "warning: --precision bf16: this CPU has no instructions for it and takes several "
            "times as long as with fp32"
        )
    keep = {f.name: getattr(args, f.name) for f in dataclasses.fields(Job) if hasattr(args, f.name)}
    numbers = given(args)
    keep |= {"steps": numbers.get(steps_of(args.stage)), "given": frozenset(numbers)}
    return Job(
        **{
            **keep,
            "split": split or prepare.default_split(args.dataset),
            "variant": variant,
            "data_root": data_root,
            "method": args.method or Job.method,
            "state": state,
            "device": device,
            "precision": PRECISIONS[args.precision],
        }
    ), cfg


def devices() -> list[str]:
    """As --device names them."""
    found = ["cpu", *(f"cuda:{k}" for k in range(torch.cuda.device_count()))]
    return [*found, "mps"] if torch.backends.mps.is_available() else found


def multiplies_bf16(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether the CPU multiplies bf16 itself, as Linux says; elsewhere nobody says, and it is taken to."""
    try:
        flags = re.findall(r"^(?:flags|Features)\s*:(.*)$", cpuinfo.read_text(), re.M)
    except OSError:
        return True
    return not flags or not {"avx512_bf16", "amx_bf16", "bf16"}.isdisjoint(flags[0].split())


def run(args: argparse.Namespace) -> int:
    """Do what the command line asks for; returns the exit code. Raises: UserError."""
    try:
        job, cfg = resolve(args)
        if args.print_config:
            print(json.dumps(dataclasses.asdict(cfg), indent=1))
            return 0
        with contextlib.redirect_stdout(sys.stdout if ranks.rank() == 0 else io.StringIO()):
            STAGES[args.stage](job, cfg)
        ranks.stop()
    except Stopped as stop:
        print(stop, file=sys.stderr)
        return stop.code
    return 0
