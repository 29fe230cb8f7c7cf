"""Stages and flags of the command line, each said once, and the configuration that they make.

A flag is a row of FLAGS, with the stages that know it. Every number of `Config` is a flag, too, and
READS says which stages read it. A flag given to another stage is an error (`checks.py`) and not
passed over in silence. Imports no library, so that a page of help and a refusal are quick.
"""

import argparse
import re
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path

import deeplab_presets
from config import (
    DEMO,
    INSTANCE_DATASETS,
    METHODS,
    PAPERS_DATASETS,
    PAPERS_SPLITS,
    PRESETS,
    SUP_STEPS_A_SPLIT,
    TAGS,
    Config,
    numbers_of,
)

DATASETS = ("mini", "custom", *PAPERS_DATASETS)
# The keys of `annotations.READERS`.
SOURCES = ("labelme", "coco-instances", "cityscapes", "masks", "yolo", "label-studio")
ANNOTATIONS = "kind of annotations (--from)"
# By group, in the order in which they are used: what a stage does, in a line of `--help`.
STAGES = {
    "data": {
        "prepare": "the paper's data sets: check downloads, fetch partitions, make panoptic maps",
        "import": f"a data set from {', '.join(SOURCES)}",
        "validate": "read a whole data set: what it holds, and all that is wrong with it",
    },
    "training": {
        "masks": "SAM's masks of all training images",
        "dewa": "decoder warm-up on these masks",
        "sup": "the supervised baseline: labelled images only",
        "ssl": f"the semi-supervised stage, --method {', '.join(METHODS)}",
    },
    "results": {
        "eval": "PQ and mIoU of student and teacher, decoder alone and ensembled",
        "predict": "a run applied to your pictures",
        "report": "report.html of a run, beside others (--compare)",
        "zeroshot": "PQ of CLIP alone on given masks",
        "export": "a run as one file",
    },
    "miniature": {
        "demo": "all stages, a table and a picture; what runs without any flag",
        "ladder": "the paper's Table 1 over several seeds; --method pldc or esl: those of theirs",
        "alpha": "its Table 8, and an alpha that changes",
        "mini-clip": "train the miniature CLIP anew",
        "mini-sam": "train the miniature SAM anew",
    },
}
ALL = tuple(name for group in STAGES.values() for name in group)
TRAIN = ("dewa", "sup", "ssl")
LABELED = ("sup", "ssl")  # training on labelled images, which ends with an evaluation
TABLES = ("demo", "ladder", "alpha")
LADDERS = ("pldc", "esl")  # methods with a ladder of their own
WARM = tuple(name for name, method in METHODS.items() if method.warm)
OF_INSTANCES = tuple(
    name for name, method in METHODS.items() if method.numbers.get("labels") == "instances"
)
WITH_CLIP = tuple(name for name, method in METHODS.items() if method.has_clip)
STORED = ("eval", "predict", "export", "report")  # read a run
RUNNING = ("masks", *TRAIN, *STORED, "zeroshot", *TABLES)  # with a model, and a folder of runs
OPENS = ("prepare", "validate", "masks", *TRAIN, "zeroshot", *TABLES)  # the data set that is named
DATA = (*OPENS, *STORED)  # read a data set, or fall back on one
DIVIDED = tuple(stage for stage in DATA if stage != "prepare")  # of which a part is labelled
EVALUATED = ("validate", *LABELED, "eval", "zeroshot", *TABLES)  # on its validation images


@dataclass
class Flag:
    """A flag that is no number of Config. Its type is that of the default: a truth value is a
    switch, of a tuple there may be several. The comment below it is its help, after the choices.
    """

    name: str  # without the dashes
    stages: tuple[str, ...]  # that know it
    default: object = None
    type: Callable | None = None  # where there is no default
    choices: tuple[str, ...] = ()
    least: int | None = None
    what: str = ""  # what an error calls the value; else its name
    dest: str = ""

    def __post_init__(self):
        self.what = self.what or self.name
        self.dest = self.dest or self.name.replace("-", "_")

    def add_to(self, parser: argparse.ArgumentParser) -> None:
        names = ["--out", "--output"] if self.name == "out" else [f"--{self.name}"]
        options = {"default": self.default, "type": self.type or str}
        if isinstance(self.default, bool):
            options = {"action": "store_false" if self.default else "store_true"}
        elif isinstance(self.default, tuple):
            options["nargs"] = "+"
        elif self.default is not None:
            options["type"] = type(self.default)
        parser.add_argument(*names, dest=self.dest, **options)


FLAGS = (
    Flag("dataset", DATA, "mini"),
    #    mini, custom, ade20k, coco, coco-objects, coco-instances, cityscapes-instances, voc,
    #    cityscapes
    Flag("data-root", DATA, ""),
    #    folder of the data set (datasets/NAME, or $DEARLI_DATASETS/NAME; custom: to be named, in
    #    COCO panoptic format, with class maps, or with COCO's instances)
    Flag("variant", DIVIDED, ""),
    #    ending of the JSON names of a custom data set, as in panoptic_train_4class.json
    Flag("split", DIVIDED),
    #    labelled images: a number, a name below DATA_ROOT/splits (which goes before a number), all,
    #    or a file of image names (mini: 16; custom: all; masks and dewa take all images)
    Flag("method", ("ssl", "ladder"), choices=tuple(METHODS)),
    #    (dearli; custom with a linear classifier: ssl)
    Flag("eval-on", EVALUATED, "val", choices=("val", "dev"), what="evaluation set"),
    #    (mini: val to report, dev to tune)
    Flag("preset", RUNNING, choices=tuple(PRESETS)),
    #    (numbers to start from; default: the one of the data set)
    Flag("runs", RUNNING, Path("runs")),
    #    where run folders go and are looked for
    Flag("out", tuple(stage for stage in ALL if stage not in ("prepare", "validate")), type=Path),
    #    where the result goes, instead of RUNS/DATASET-STAGE-SPLIT; also --output
    Flag("init", LABELED, type=Path),
    #    start from this run or file (dearli: the DeWa run of the data set)
    Flag("masks", (*TRAIN, "eval", "report", "validate", "zeroshot"), type=Path),
    #    folder of SAM masks (RUNS/DATASET-masks); validate: read them, too; zeroshot: gt, sam or a
    #    folder
    Flag("images", ("masks", "dewa"), type=Path),
    #    a folder of images instead of the training images (SA-1B, masks beside the images)
    Flag("json", ("validate",), type=Path),
    #    write the whole report to this file, too
    Flag("groups", (*LABELED, "eval"), 0, least=0),
    #    also the PQ of so many groups of classes, by their share of the labelled pixels (0: none)
    Flag("watch", (*LABELED, *TABLES), 8, least=0),
    #    validation images whose PQ is measured ten times a run, or at every checkpoint if there are
    #    more, for the report alone (0: none)
    Flag("weights", STORED, type=Path),
    #    a run, or a checkpoint of the official code
    Flag("input", ("predict", "import"), type=Path),
    #    predict: a picture, or a folder of pictures; import: the folder of the annotations
    Flag("from", ("import",), dest="source_format", choices=SOURCES, what=ANNOTATIONS),
    Flag("background", ("import",), ""),
    #    name of a class for all pixels without instance (without: they are void)
    Flag("stuff", ("import",), ""),
    #    classes that are stuff, separated by commas: one segment of each in an image
    Flag("masks-are", ("import",), ""),
    #    --from masks, what values mean: instances, classes, both (256 * class + instance), binary
    #    (else guessed, and said)
    Flag("classes", ("import",), ""),
    #    --from masks, names of the values of maps of classes: NAME,NAME,... from 1 on (from 0 where
    #    the first is background or void), or 7:NAME,11:NAME
    Flag("join", ("import",), type=Path),
    #    a data set that the annotations are for: OUT holds what it has, and these
    Flag("val-share", ("import",), 0.2),
    #    share of the labelled images for validation, where the source has no division of its own
    Flag("posterior", ("predict", "export"), choices=("decoder", "ensemble")),
    #    (default: the reading of its method's paper: the ensemble's of dear and dearli, else the
    #    decoder's)
    Flag("which", ("predict", "export"), "student", choices=("student", "teacher"), what="model"),
    Flag("force", ("predict",), False),
    #    replace earlier predictions
    Flag("palette", ("predict", "report"), "dataset", choices=("dataset", "safe")),
    #    (the data set's own colours, where it has them; those that colour-blind people tell apart)
    Flag("compare", ("report",), (), Path),
    #    other runs to put beside it
    Flag("report-images", (*LABELED, "eval", "report", *TABLES), 12, least=0),
    #    validation images in report.html, half of them the worst and half the best of 4 times as
    #    many (0: no pictures)
    Flag("assets", ("prepare",), type=Path),
    #    a copy of the official repository, instead of the network
    Flag("format", ("export",), "official", choices=("official", "safetensors", "onnx")),
    #    (onnx: images in, class probabilities and masks out, at --test-size or --window)
    Flag("resume", (*TRAIN, "predict", *TABLES), False),
    #    go on where the run stopped
    Flag("no-eval", LABELED, True, dest="evaluate"),
    #    do not evaluate after training
    Flag("no-make", ("dewa", "ssl"), True, dest="make"),
    #    do not make first what an earlier stage has not made (masks, DeWa weights): end in an error
    Flag("dry-run", ("masks", *TRAIN), False),
    #    say what would be done, on how much data, for how long and in how much memory, from a few
    #    steps that are forgotten; nothing is written
    Flag("report", TRAIN, False),
    #    with --dry-run: also a page of what the network will see (views of the first steps, their
    #    targets, sizes), RUNS/NAME-views.html beside the folder of the run
    Flag("log", TRAIN, choices=("tensorboard",)),
    #    (curves for it in the run's folder, beside log.jsonl; needs the package)
    Flag("device", tuple(stage for stage in RUNNING if stage != "export")),
    #    as torch names it (cuda where there is one, else cpu)
    Flag("precision", ("masks", *TRAIN, *TABLES), "fp32", choices=("fp32", "bf16")),
    Flag("seeds", ("ladder", "alpha"), 3, least=1),
    #    number of seeds
    Flag("jobs", TABLES, 0, least=0),
    #    runs at a time, each in a process of its own (0: as many as CPU cores, at most 8; one on a
    #    GPU)
    Flag("steps", (*TRAIN, *TABLES), type=int),
    #    optimiser steps of the stage at hand
    Flag("print-config", ALL, False),
    #    print every number of the run that the other flags describe, and stop
)


def rows(text: str) -> list[str]:
    """Of a table that is written as text: lines, which are indented where they go on."""
    return [" ".join(row.split()) for row in re.split(r"\n(?=\S)", text.strip())]


def _fields(text: str) -> dict[str, tuple[str, ...]]:
    """Rows `NAME: word word ...`; a word in capitals is a row above."""
    table: dict[str, tuple[str, ...]] = {}
    for row in rows(text):
        name, words = row.split(": ")
        table[name] = tuple(
            f for word in words.split() for f in (table[word] if word.isupper() else (word,))
        )
    return table


# Fields of Config by stage: those that change what it does. Sizes at evaluation are those of a
# run's images: a warm-up keeps them for its sisters. The supervised rung of a table has ssl_steps.
FIELDS = _fields("""
CLIP: backbone pretrained
DEEPLAB: output_stride atrous aux_weight
DEEPLAB_TRAINING: network DEEPLAB ohem ohem_kept momentum epochs
SOFT: eta contrast_weight teacher_norm cutmix_min cutmix_max
PROJECTOR: projection projector
BANK: parts part_momentum queue
CONTRAST: contrast_start BANK kmeans_pixels anchor_share anchor_confidence anchors_max negatives
    contrast_temperature PROJECTOR
MERGING: merging least_quality object_mask_threshold overlap_threshold
QUERIES: classifier num_queries heads encoder_layers encoder_ffn encoder_points decoder_layers
    decoder_ffn class_weight mask_weight dice_weight no_object_weight num_points oversample
    importance MERGING
DECODER: train_backbone classifier num_queries hidden heads encoder_layers encoder_ffn
    encoder_points decoder_layers decoder_ffn
NETWORK: sam_weights points_per_side pred_iou_thresh stability_thresh mask_nms_thresh
    points_per_batch
EXPOSURE: white stretch
SIZES: test_size test_max EXPOSURE
SCALE: seen_width object_width window
ANSWER: MERGING alpha clip_scale teacher_posterior
INFERENCE: SIZES SCALE ANSWER least_score
GRAPH: DECODER test_size EXPOSURE SCALE ANSWER
STUDENT: CLIP DECODER INFERENCE
TRAINING: CLIP DECODER crop crop_height scale_min scale_max SCALE turns optimizer schedule
    backbone_lr_multiplier lr lr_warmup weight_decay clip_norm poly_power mask_weight dice_weight
    num_points oversample importance workers seed checkpoint_every log_every eval_batch milestones
    scaled_side
MASKS: sam NETWORK EXPOSURE seed
DEWA: TRAINING SIZES dewa_steps dewa_batch dewa_crop dewa_keep_empty
SUPERVISED: TRAINING INFERENCE class_weight no_object_weight labels labeled_batch colour
NAMER: clip_view clip_margin clip_model clip_pretrained
INSTANCES: class_threshold mask_threshold coupled NAMER pixel_certainty ema_first guided_steps
SEMI: SUPERVISED jitter jitter_hue grayscale_prob blur_prob blur_radius ssl_steps unlabeled_batch
    lambda_u ema_decay burn_in cutmix_prob jitter_prob cutout
prepare: workers
import: seed
validate: workers seed num_queries labels EXPOSURE test_size SCALE
masks: MASKS
dewa: DEWA
sup: SUPERVISED sup_steps DEEPLAB_TRAINING
ssl: SEMI INSTANCES burn_in_warm DEEPLAB_TRAINING SOFT CONTRAST
eval: STUDENT labels eval_batch seed DEEPLAB contrast_weight PROJECTOR BANK
predict: STUDENT seed DEEPLAB contrast_weight PROJECTOR BANK
report: STUDENT labels seed DEEPLAB contrast_weight PROJECTOR BANK
zeroshot: CLIP SIZES MASKS clip_scale labels NAMER
export: CLIP GRAPH no_object_weight seed network
demo: MASKS DEWA SEMI burn_in_warm
ladder: MASKS DEWA SEMI burn_in_warm INSTANCES DEEPLAB ohem ohem_kept momentum epochs SOFT CONTRAST
alpha: SEMI
mini-clip: seed
mini-sam: seed
""")
READS = {stage: frozenset(FIELDS[stage]) for stage in ALL}
# What earlier stages read that a stage makes up for: masks before the warm-up, both before DEARLi
MAKES = {
    "dewa": READS["masks"] - READS["dewa"],
    "ssl": (READS["masks"] | READS["dewa"]) - READS["ssl"],
}


def reads(stage: str) -> frozenset[str]:
    """Fields of Config that a stage reads, or one that it makes up for."""
    return READS[stage] | MAKES.get(stage, frozenset())


def configure(args: argparse.Namespace, stored: dict | None = None) -> Config:
    """Preset -> the method, or what a run has stored (of stages that read one) -> flags."""
    values, entry = given(args), METHODS.get(args.method)
    network = (entry.numbers if entry else {}).get("network", "mask2former")
    network = (stored or values).get("network", network)
    cfg = preset_of(args.preset or args.dataset, network)
    if stored is not None:
        cfg = replace(cfg, **numbers_of(stored))
    elif args.stage == "demo" and cfg == PRESETS["mini"]:
        cfg = replace(cfg, **DEMO)
    elif args.stage == "sup":
        cfg = replace(cfg, teacher_posterior="decoder")
    elif args.method or names_instances(args):
        cfg = replace(cfg, **METHODS[args.method or "pldc"].on(args.preset or args.dataset))
    if "pretrained" not in values and values.get("backbone", cfg.backbone) != cfg.backbone:
        values["pretrained"] = TAGS.get(values["backbone"], "")
    if cfg.stretch and values.get("stretch") is False:  # it has no white point: to be measured
        values.setdefault("white", 0)
    splits = PAPERS_SPLITS.get(args.dataset, ())
    if args.split in splits and args.dataset not in INSTANCE_DATASETS:
        cfg = replace(cfg, sup_steps=SUP_STEPS_A_SPLIT * (splits.index(args.split) + 1))
    if steps_of(args.stage) in values:
        values.setdefault("epochs", 0.0)
    return replace(cfg, **values)


def preset_of(name: str, network: str) -> Config:
    """The numbers of a preset for a network. Of data without a class for every pixel, a DeepLab has
    those of another: such data are refused when they are read."""
    if network == "deeplab":
        return deeplab_presets.PRESETS.get(name, deeplab_presets.PRESETS["official"])
    return PRESETS[name]


def given(args: argparse.Namespace) -> dict:
    """The fields of Config that the command line names, the steps of the stage at hand too."""
    values = {f.name: getattr(args, f.name) for f in fields(Config)}
    values = {name: value for name, value in values.items() if value is not None}
    if args.steps is not None:
        values.setdefault(steps_of(args.stage), args.steps)
    return values


def steps_of(stage: str) -> str:
    """The field of Config with the optimiser steps of a stage."""
    return {"dewa": "dewa_steps", "sup": "sup_steps"}.get(stage, "ssl_steps")


def usual_method(args: argparse.Namespace) -> str:
    """The --method of a command line without it. On a folder of one's own, a classifier without
    words is trained without CLIP, too; instances are PL-DC's."""
    if (args.labels or PRESETS[args.preset or args.dataset].labels) == "instances":
        return "pldc"
    linear = (args.classifier or PRESETS[args.preset or args.dataset].classifier) == "linear"
    alone = args.teacher_posterior in (None, "decoder")
    return "ssl" if args.dataset == "custom" and linear and alone else "dearli"


def names_instances(args: argparse.Namespace) -> bool:
    """Stage zeroshot is about true instances, which CLIP names as PL-DC's pseudo-labels are."""
    labels = args.labels or PRESETS[args.preset or args.dataset].labels
    return args.stage == "zeroshot" and labels == "instances"


def is_warm(args: argparse.Namespace) -> bool:
    """Stage ssl starts from the weights of another run."""
    return args.method in WARM or args.init is not None


def opens(args: argparse.Namespace) -> bool:
    """The stage opens the data set that the command line names."""
    return args.stage in OPENS and not args.images
