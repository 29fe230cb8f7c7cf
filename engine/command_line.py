"""The command line: stages, flags and who knows them, help pages.

A flag is a row of FLAGS, with the stages that know it: given to another it is an error and not passed over in silence. Every number of `Config`
is a flag, too, with the comment beside it as its help; READS says which stages read it. What a stage reads, but not with the other numbers at
hand, is refused as well (`idle`). `--help` is one screen; `--stage NAME --help` has all flags of a stage.
"""

import argparse
import dataclasses
import importlib.util
import inspect
import re
import sys
import textwrap
from pathlib import Path

from config import (
    ALIASES,
    PAPERS_DATASETS,
    PAPERS_SPLITS,
    PRESETS,
    SUP_STEPS_A_SPLIT,
    TAGS,
    Config,
    alpha_at,
    numbers_of,
    require_learning,
    require_ranges,
    require_semi_supervised,
)
from ground.errors import UserError, choose, nearest
from readers.downloads import default_root, require

DATASETS = ("mini", "custom", *PAPERS_DATASETS)
METHODS = {
    "ssl": "Mean Teacher, pseudo-labels from the decoder alone",
    "dear": "pseudo-labels from the ensemble with CLIP",
    "dearli": "dear, starting from the DeWa weights",
}
FORMATS = ("official", "safetensors")
SOURCES = ("labelme", "coco-instances", "cityscapes", "masks")  # `annotations.READERS`
MASK_FORMS = ("instances", "classes", "binary")  # `annotations.FORMS`
PALETTES, LOGS, PRECISIONS = ("dataset", "safe"), ("tensorboard",), ("fp32", "bf16")
# By group, in the order in which they are used: what a stage does, in a line of `--help`.
STAGES = {
    "data": {
        "prepare": "the paper's data sets: check downloads, fetch partitions, make panoptic maps",
        "import": f"annotations of other tools as a data set: {', '.join(SOURCES)}",
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
        "ladder": "the paper's Table 1, over several seeds",
        "alpha": "its Table 8, and an alpha that changes",
        "mini-clip": "train the miniature CLIP anew",
        "mini-sam": "train the miniature SAM anew",
    },
}
ALL = tuple(name for group in STAGES.values() for name in group)
TRAIN, TABLES, STORED = (
    ("dewa", "sup", "ssl"),
    ("demo", "ladder", "alpha"),
    ("eval", "predict", "export", "report"),
)  # STORED: read a run
OPENS = (
    "prepare",
    "validate",
    "masks",
    *TRAIN,
    "zeroshot",
    *TABLES,
)  # open a data set that the command line names
DATA = (
    "prepare",
    "validate",
    "masks",
    *TRAIN,
    *STORED,
    "zeroshot",
    *TABLES,
)  # read a data set, or fall back on one
PICTURED = ("sup", "ssl", "eval", "report", *TABLES)  # end with a report that has pictures


def _reads() -> dict[str, frozenset[str]]:
    """Fields of Config by stage: those that change what the stage does."""
    clip = {"backbone", "pretrained"}
    model = {
        *clip,
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
    masks = {
        "sam",
        "sam_weights",
        "points_per_side",
        "pred_iou_thresh",
        "stability_thresh",
        "mask_nms_thresh",
        "points_per_batch",
    }
    views = {"crop", "scale_min", "scale_max"}
    strong = {"jitter", "jitter_hue", "grayscale_prob", "blur_prob", "blur_radius"}
    sizes = {"test_size", "test_max", "white"}
    posterior = {"alpha", "clip_scale", "teacher_posterior"}
    inference = {"object_mask_threshold", "overlap_threshold", *sizes, *posterior}
    training = {
        *model,
        *views,
        "backbone_lr_multiplier",
        "lr",
        "weight_decay",
        "clip_norm",
        "poly_power",
        "mask_weight",
        "dice_weight",
        "num_points",
        "oversample",
        "importance",
        "workers",
        "seed",
        "checkpoint_every",
        "log_every",
    }
    supervised = {
        *training,
        *inference,
        "class_weight",
        "no_object_weight",
        "labels",
        "labeled_batch",
        "eval_batch",
    }
    stages = {
        "prepare": {"workers"},
        "import": {"seed"},
        "validate": {"workers", "seed", "num_queries", "labels", "white"},
        "mini-clip": {"seed"},
        "mini-sam": {"seed"},
        "masks": {*masks, "white", "seed"},
        # sizes at evaluation are those of a run's images: a warm-up has them like its sisters, and keeps them
        "dewa": {
            *training,
            *sizes,
            "eval_batch",
            "dewa_steps",
            "dewa_batch",
            "dewa_crop",
            "dewa_keep_empty",
        },
        "sup": {*supervised, "sup_steps"},
        "ssl": {
            *supervised,
            *strong,
            "ssl_steps",
            "unlabeled_batch",
            "lambda_u",
            "ema_decay",
            "burn_in",
            "burn_in_warm",
            "cutmix_prob",
        },
        "eval": {*model, *inference, "eval_batch", "seed"},
        "predict": {*model, *inference, "seed"},
        "report": {*model, *inference, "seed"},
        "export": {*clip, "no_object_weight", "seed"},
        "zeroshot": {*clip, *sizes, *masks, "clip_scale", "seed"},
    }
    stages["alpha"] = stages["ssl"] - {"burn_in_warm"}
    stages["demo"] = stages["ladder"] = (
        stages["masks"] | stages["dewa"] | stages["ssl"]
    )  # a supervised rung takes ssl_steps
    return {stage: frozenset(fields) for stage, fields in stages.items()}


READS = _reads()
# What an earlier stage reads that a stage makes up for: masks before the warm-up, both before DEARLi
MAKES = {
    "dewa": READS["masks"] - READS["dewa"],
    "ssl": (READS["masks"] | READS["dewa"]) - READS["ssl"],
}


def reads(stage: str) -> frozenset[str]:
    """Fields of Config that a stage reads, or one that it makes up for."""
    return READS[stage] | MAKES.get(stage, frozenset())


# Of a run that is stored: what its weights are part of, and what they were trained on
OF_THE_RUN = (
    "backbone",
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
    "no_object_weight",
    "seed",
)
# What other programs call it, or what there is on purpose none of: a hint, where the nearest name would mislead.
HINTS = {
    "batch-size": "it is --labeled-batch and --unlabeled-batch, --dewa-batch in the warm-up, "
    "--eval-batch at evaluation",
    "epochs": "training is counted in optimiser steps: --steps N",
    "iters": "it is --steps N, optimiser steps",
    "learning-rate": "it is --lr",
    "warmup": "there is none; for the decoder's warm-up see --stage dewa, for steps without "
    "pseudo-labels --burn-in",
    "momentum": "the optimiser is AdamW; the teacher's average is --ema-decay",
    "optimizer": "it is AdamW; see --lr, --weight-decay and --clip-norm",
    "scheduler": "it is a polynomial one: --poly-power",
    "gpu": "it is --device cuda, or cuda:N for one of several",
    "gpus": "one process a GPU: torchrun --nproc_per_node=N dearli.py ...; one of several is "
    "--device cuda:N",
    "cpu": "it is --device cpu",
    "num-workers": "it is --workers N, loader processes",
    "ema": "it is --ema-decay",
    "resume-from": "it is --resume, which goes on with the run in --out or in its usual folder; "
    "--init FOLDER starts another one from it",
    "checkpoint": "it is --weights of a run that is applied, --init of one to start from",
    "pretrain": "it is --pretrained, of the backbone, or --init, a run or file to start from",
    "load-from": "it is --init FOLDER, a run or file to start from",
    "config": "there is no file of settings: --preset NAME and flags; --print-config shows all "
    "numbers",
    "data": "it is --data-root DIR, with --dataset NAME",
    "output-dir": "it is --out DIR, or --runs DIR for the folder above it",
    "model": "it is --weights of a run that is applied, --backbone of one that is trained",
    "image-size": "it is --crop in training and --test-size at evaluation",
    "num-classes": "the data set says how many there are",
    "amp": "it is --precision bf16",
    "save": "it is --out DIR, where the result goes",
    "verbose": "every stage says what it does; --log-every N, steps between lines",
    "tensorboard": "it is --log tensorboard",
    "wandb": "it is --log tensorboard, or the lines of log.jsonl in the run's folder",
    "threads": "it is the variable OMP_NUM_THREADS",
}
OTHER_NAMES = {
    other: name
    for name, others in {
        "batch-size": "bs b batch train-batch-size",
        "epochs": "epoch num-epochs max-epochs",
        "iters": "iterations num-iters max-iter max-iters num-steps max-steps",
        "learning-rate": "lr-rate base-lr lrate",
        "warmup": "warm-up warmup-steps warmup-iters",
        "optimizer": "optim",
        "scheduler": "lr-scheduler",
        "gpu": "cuda gpu-id gpu-ids",
        "gpus": "num-gpus devices",
        "num-workers": "j worker n-workers",
        "ema": "ema-rate ema-momentum",
        "resume-from": "resume-path continue",
        "checkpoint": "ckpt",
        "load-from": "load",
        "config": "cfg config-file",
        "data": "data-dir data-path dataset-path dataroot root",
        "output-dir": "outdir out-dir output-folder work-dir save-dir save-path exp name project",
        "model": "arch model-path",
        "image-size": "img-size imgsz size resolution",
        "amp": "fp16 half mixed-precision",
        "verbose": "v debug",
        "threads": "num-threads",
    }.items()
    for other in others.split()
}
# Of torch's devices, those that one can train on.
TORCH_DEVICES = ("cpu", "cuda", "mps", "xpu", "hpu", "mtia", "xla")
WIDTH = 110  # characters of a help page


class Flag:
    """name: without the dashes.   stages: that know it.   more: for `add_argument`."""

    def __init__(self, name: str, stages: tuple[str, ...], help: str, **more):
        self.name, self.stages, self.help, self.more = name, stages, help, more
        self.dest = more.get("dest", name.replace("-", "_"))


FLAGS = (
    Flag("dataset", DATA, ", ".join(DATASETS), default="mini"),
    Flag(
        "data-root",
        DATA,
        "folder of the data set (datasets/NAME, or $DEARLI_DATASETS/NAME; custom: to be named, in COCO panoptic format)",
        default="",
    ),
    Flag(
        "variant",
        tuple(stage for stage in DATA if stage != "prepare"),
        "ending of the JSON names of a custom data set, as in panoptic_train_4class.json",
        default="",
    ),
    Flag(
        "split",
        tuple(stage for stage in DATA if stage != "prepare"),
        "labelled images: a number, a name below DATA_ROOT/splits (which goes before a number), all, or a "
        "file of image names (mini: 16; custom: all; masks and dewa take all images)",
    ),
    Flag(
        "method",
        ("ssl",),
        "; ".join(f"{k}: {v}" for k, v in METHODS.items())
        + " (dearli; custom with a linear classifier: ssl)",
    ),
    Flag(
        "eval-on",
        ("validate", "sup", "ssl", "eval", "zeroshot", *TABLES),
        "mini: val to report, dev to tune",
        default="val",
    ),
    Flag(
        "preset",
        ("masks", *TRAIN, *STORED, "zeroshot", *TABLES),
        f"numbers to start from: {', '.join(PRESETS)}; default: the one of the data set",
    ),
    Flag(
        "runs",
        ALL,
        "where run folders go and are looked for (runs)",
        type=Path,
        default=Path("runs"),
    ),
    Flag(
        "out",
        tuple(stage for stage in ALL if stage not in ("prepare", "validate")),
        "where the result goes, instead of RUNS/DATASET-STAGE-SPLIT; also --output",
        type=Path,
    ),
    Flag(
        "init",
        ("sup", "ssl"),
        "start from this run or file (dearli: the DeWa run of the data set)",
        type=Path,
    ),
    Flag(
        "masks",
        ("dewa", "sup", "ssl", "eval", "report", "validate", "zeroshot"),
        "folder of SAM masks (RUNS/DATASET-masks); validate: read them, too; "
        "zeroshot: gt, sam or a folder",
        type=Path,
    ),
    Flag(
        "images",
        ("masks", "dewa"),
        "a folder of images instead of the training images (SA-1B, masks beside the images)",
        type=Path,
    ),
    Flag("json", ("validate",), "write the whole report to this file, too", type=Path),
    Flag(
        "groups",
        ("sup", "ssl", "eval"),
        "also the PQ of so many groups of classes, by their share of the labelled pixels (0: none)",
        type=int,
        default=0,
    ),
    Flag(
        "watch",
        (*TRAIN, *TABLES),
        "validation images whose PQ is measured at every checkpoint, for the report alone (16; 0: none)",
        type=int,
        default=16,
    ),
    Flag(
        "weights",
        ("eval", "predict", "report", "export"),
        "a run, or a checkpoint of the official code",
        type=Path,
    ),
    Flag(
        "input",
        ("predict", "import"),
        "predict: a picture, or a folder of pictures; import: the folder of the annotations",
        type=Path,
    ),
    Flag("from", ("import",), ", ".join(SOURCES), dest="source_format", default=""),
    Flag(
        "background",
        ("import",),
        "name of a class for all pixels without instance (without: they are void)",
        default="",
    ),
    Flag(
        "stuff",
        ("import",),
        "classes that are stuff, separated by commas: one segment of each in an image",
        default="",
    ),
    Flag(
        "masks-are",
        ("import",),
        f"--from masks, what the values mean: {', '.join(MASK_FORMS)} (else guessed, and said)",
        default="",
    ),
    Flag(
        "classes",
        ("import",),
        "--from masks, names of the values of maps of classes: "
        "NAME,NAME,... from 1 on, or 7:NAME,11:NAME",
        default="",
    ),
    Flag(
        "val-share",
        ("import",),
        "share of the labelled images for validation, where the source has no division of its own (0.2)",
        type=float,
        default=0.2,
    ),
    Flag(
        "posterior",
        ("predict",),
        "decoder, ensemble (default: the paper's reading: the decoder's for sup and ssl, else the ensemble's)",
        default="",
    ),
    Flag("which", ("predict",), "student, teacher", default="student"),
    Flag("force", ("predict",), "replace earlier predictions", action="store_true"),
    Flag(
        "palette",
        ("predict", "report"),
        "dataset: its own colours, where it has them; safe: those that colour-blind people can tell apart",
        default="dataset",
    ),
    Flag("compare", ("report",), "other runs to put beside it", type=Path, nargs="+", default=()),
    Flag(
        "report-images",
        ("dewa", *PICTURED),
        "validation images in report.html, half of them the worst and half the best of 4 times as many "
        "(12; 0: no pictures)",
        type=int,
        default=12,
    ),
    Flag(
        "assets",
        ("prepare",),
        "a copy of the official repository, instead of the network",
        type=Path,
    ),
    Flag("format", ("export",), ", ".join(FORMATS), default="official"),
    Flag(
        "resume", (*TRAIN, "predict", *TABLES), "go on where the run stopped", action="store_true"
    ),
    Flag(
        "no-eval",
        (*TRAIN, "masks"),
        "do not evaluate after training",
        dest="evaluate",
        action="store_false",
    ),
    Flag(
        "no-make",
        ("dewa", "ssl"),
        "do not make first what an earlier stage has not made (masks, "
        "DeWa weights): end in an error",
        dest="make",
        action="store_false",
    ),
    Flag(
        "dry-run",
        ("masks", *TRAIN),
        "say what would be done, on how much data, for how long and in how much memory, from a few steps that are forgotten; "
        "nothing is written",
        action="store_true",
    ),
    Flag(
        "log",
        TRAIN,
        "tensorboard: curves for it in the run's folder, beside log.jsonl (needs the package)",
        default="",
    ),
    Flag("device", ALL, "as torch names it (cuda where there is one, else cpu)"),
    Flag("precision", ("masks", *TRAIN, *TABLES), "fp32, bf16", default="fp32"),
    Flag("seeds", ("ladder", "alpha"), "number of seeds (3)", type=int, default=3),
    Flag(
        "jobs",
        TABLES,
        "runs at a time, each in a process of its own (0: as many as CPU cores, at most 8; one on a GPU)",
        type=int,
        default=0,
    ),
    Flag("steps", (*TRAIN, *TABLES), "optimiser steps of the stage at hand", type=int),
    Flag(
        "print-config",
        ALL,
        "print every number of the run that the other flags describe, and stop",
        action="store_true",
    ),
)


class Parser(argparse.ArgumentParser):
    """One that raises UserError, names the nearest flag, and has our pages as its help.

    bare: the same parser without defaults. What it finds is what was said, be it the default: `flags` of the result.
    """

    bare: "Parser | None" = None

    def error(self, message: str):
        raise UserError(message.replace("argument ", "", 1))

    def parse_args(self, args=None, namespace=None):
        parsed, unknown = self.parse_known_args(args, namespace)
        parsed.flags = (
            frozenset(vars(self.bare.parse_known_args(args)[0])) if self.bare else frozenset()
        )
        if unknown:
            flags = [option for action in self._actions for option in action.option_strings]
            raise UserError(
                f"unknown flag '{unknown[0]}'{hint(unknown[0], flags)}; --help lists the stages, --stage NAME --help the flags of one"
                if unknown[0].startswith("-")
                else f"'{unknown[0]}': expected a flag such as --stage; --help lists them"
            )
        return parsed


def hint(unknown: str, flags: list[str]) -> str:
    """To append to an error about a flag that there is not: what does its work here, or the nearest
    name; empty if there is neither."""
    asked = unknown.split("=")[0]
    name = asked.lstrip("-").lower().replace("_", "-")
    if f"--{name}" in flags:
        return f" (did you mean --{name}?)"
    found = HINTS.get(OTHER_NAMES.get(name, name))
    return f" ({found})" if found else nearest(asked, flags)


def parser() -> Parser:
    p = _parser()
    p.bare = _parser()
    for action in p.bare._actions:
        action.default = argparse.SUPPRESS
    return p


def _parser() -> Parser:
    p = Parser(prog="dearli.py", add_help=False, allow_abbrev=False)
    p.add_argument("-h", "--help", action="store_true")
    p.add_argument("--version", action="store_true")
    p.add_argument("--stage", default="demo")
    for flag in FLAGS:
        p.add_argument(
            *(["--out", "--output"] if flag.name == "out" else [f"--{flag.name}"]), **flag.more
        )
    for field in dataclasses.fields(Config):
        name = "--" + field.name.replace("_", "-")
        if field.type is bool:
            p.add_argument(name, action=argparse.BooleanOptionalAction, default=None)
        else:
            p.add_argument(
                name,
                type=field.type if isinstance(field.type, type) else number_or_text,
                default=None,
            )
    return p


def number_or_text(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


def require_known(args: argparse.Namespace) -> None:
    """Raise UserError for a flag that the stage does not know, or a number that it does not read."""
    known = {flag.dest: (flag.name, flag.stages) for flag in FLAGS}
    known |= {
        f.name: (f.name.replace("_", "-"), tuple(stage for stage in ALL if f.name in reads(stage)))
        for f in dataclasses.fields(Config)
    }
    for dest, (name, stages) in known.items():
        if dest in args.flags and args.stage not in stages:
            raise UserError(
                f"--{name}: only --stage {', '.join(stages[:-1])}{' and ' if stages[1:] else ''}{stages[-1]} "
                f"know{'' if stages[1:] else 's'} it, not --stage {args.stage}"
            )


def idle(args: argparse.Namespace, cfg: Config) -> dict[str, str]:
    """Flags, by dest, that the stage knows and that do nothing with the others as they are; with what would make them count."""
    found: dict[str, str] = {}

    def without(condition: bool, names, counts: str) -> None:
        if condition:
            found.update(dict.fromkeys(names, counts))

    begins = (
        args.stage == "ssl" and not args.resume
    )  # a run that goes on knows what it started from
    without(
        begins and is_warm(args),
        ("burn_in",),
        "a run that starts from other weights (--method dearli, or --init) has --burn-in-warm",
    )
    without(
        begins and not is_warm(args),
        ("burn_in_warm",),
        "a run that starts from a random decoder has --burn-in",
    )
    without(not cfg.train_backbone, ("backbone_lr_multiplier",), "it counts with --train-backbone")
    without(
        not cfg.has_ensemble and args.stage != "zeroshot",
        ("alpha", "clip_scale"),
        "CLIP has no say here; it counts with --classifier language, or with --method dear and dearli",
    )
    without(
        not cfg.importance,
        ("oversample",),
        "no point is chosen by uncertainty; it counts with --importance above 0",
    )
    without(
        not cfg.blur_prob,
        ("blur_radius",),
        "nothing is blurred; it counts with --blur-prob above 0",
    )
    without(
        not cfg.decoder_layers,
        ("decoder_ffn",),
        "the decoder has no layers; it counts with --decoder-layers above 0",
    )
    without(
        args.stage == "dewa" and cfg.dewa_crop > 0 and "dewa_crop" not in args.flags,
        ("crop",),
        f"the warm-up crops to --dewa-crop {cfg.dewa_crop}; name that one, or set it to 0",
    )
    network = (
        "sam_weights",
        "points_per_side",
        "pred_iou_thresh",
        "stability_thresh",
        "mask_nms_thresh",
        "points_per_batch",
    )
    without(
        cfg.sam == "regions",
        network,
        "stable regions (--sam regions) have no network; it counts with --sam mini or vit_h",
    )
    without(
        args.stage == "zeroshot" and str(args.masks) != "sam",
        ("sam", *network),
        "it counts with --masks sam",
    )
    without(args.dataset != "mini", ("eval_on",), "only --dataset mini has images to tune on")
    without(args.dataset != "custom", ("variant",), "it counts with --dataset custom")
    without(
        args.dataset == "mini",
        ("data_root",),
        f"--dataset mini is drawn, not read; it counts with --dataset {', '.join(DATASETS[1:])}",
    )
    without(
        args.images is not None,
        ("data_root", "variant", "split"),
        "the images are those of --images; it counts without",
    )
    without(
        args.dataset == "mini" and args.stage not in STORED and not args.images,
        ("white",),
        "images of --dataset mini have 8 bits",
    )
    made = args.stage == "ssl" and (args.method != "dearli" or args.init is not None)
    without(
        made,
        (*MAKES["ssl"], "make"),
        "no masks and no warm-up are made here; it counts with --method dearli and without --init",
    )
    without(
        args.stage in TRAIN and not args.evaluate,
        ("groups",),
        "nothing is evaluated; it counts without --no-eval",
    )
    return found


def is_warm(args: argparse.Namespace) -> bool:
    """Stage ssl starts from the weights of another run."""
    return args.method == "dearli" or args.init is not None


def require_use(args: argparse.Namespace, cfg: Config) -> None:
    """Raise UserError for a flag that would be passed over in silence, the other numbers being as they are."""
    for dest, counts in idle(args, cfg).items():
        if dest in args.flags:
            raise UserError(f"--{dest.replace('_', '-')}: {counts}")


def require_of_the_run(args: argparse.Namespace, stored: dict) -> None:
    """Raise UserError for a flag that would make another model of a run that is stored. stored: its configuration; empty: an official file."""
    for name in OF_THE_RUN:
        value = getattr(args, name)
        if name in args.flags and stored.get(name, value) != value:
            raise UserError(
                f"--{name.replace('_', '-')} {value}: {args.weights} fits another configuration, it was trained with {stored[name]}; leave the flag out"
            )
    if "preset" in args.flags and "num_queries" in stored:
        raise UserError(
            f"--preset: the numbers are those that {args.weights} was trained with; leave the flag out"
        )


def require_split(args: argparse.Namespace) -> None:
    """Raise UserError where the number of labelled images matters and a data set of the paper is named alone."""
    reads = (
        args.stage in ("sup", "ssl")
        or args.stage in TABLES
        and not args.print_config
        or args.stage == "eval"
        and args.groups
    )
    if args.dataset in PAPERS_DATASETS and args.split is None and reads:
        raise UserError(
            f"--dataset {args.dataset}: say with --split which images are labelled: {', '.join(PAPERS_SPLITS[args.dataset])} (the paper's partitions), "
            f"a number of images, or a file of image names"
        )


# ---------------------------------------------------------------------------------------------- flags -> configuration


def check(args: argparse.Namespace) -> None:
    """Raise UserError for all that can be known to be wrong before anything is read or imported: within a moment, not after libraries."""
    args.dataset = ALIASES.get(args.dataset, args.dataset)
    choose("stage", args.stage, ALL), choose("data set", args.dataset, DATASETS)
    if args.stage == "ssl":
        args.method = choose("method", args.method or usual_method(args), METHODS)
    choose("precision", args.precision, PRECISIONS), choose("format", args.format, FORMATS)
    require_known(args)
    choose("palette", args.palette, PALETTES), choose("log", args.log or LOGS[0], LOGS)
    opens = args.stage in OPENS and not args.images
    if opens and args.dataset in PAPERS_DATASETS and not args.data_root:
        args.data_root = str(default_root(args.dataset))
    if args.steps is not None and args.steps != given(args)[steps_of(args.stage)]:
        raise UserError(
            f"--steps {args.steps}: --{steps_of(args.stage).replace('_', '-')} says {given(args)[steps_of(args.stage)]}; expected one of them"
        )
    if args.stage not in STORED:
        cfg = configure(args)
        require_sense(args, cfg)
        require_split(args)


def usual_method(args: argparse.Namespace) -> str:
    """The --method of a command line without it. On a folder of one's own, a classifier without
    words is trained without CLIP, too."""
    preset = PRESETS[choose("preset", args.preset or args.dataset, PRESETS)]
    linear = (args.classifier or preset.classifier) == "linear"
    return "ssl" if args.dataset == "custom" and linear and not args.teacher_posterior else "dearli"


def require_there(args: argparse.Namespace) -> None:
    """Raise UserError for a file or folder that a stage is given and that is not there, and for
    other things that the machine knows at once.

    What is in the files is for the stage to say. After `check`, and apart from it: a command line
    can be understood where its files are not.
    """
    stage = args.stage
    if stage == "prepare":
        choose("data set to prepare", args.dataset, PAPERS_DATASETS)
    if args.device is not None and not re.fullmatch(
        rf"({'|'.join(TORCH_DEVICES)})(:\d+)?", args.device
    ):
        raise UserError(f"device '{args.device}': expected cpu, cuda, cuda:N or mps")
    if stage in OPENS and args.dataset == "custom" and not args.data_root and not args.images:
        raise UserError("--dataset custom needs --data-root DIR: a folder in COCO panoptic format")
    if (
        stage in OPENS
        and args.dataset == "custom"
        and args.data_root
        and not Path(args.data_root).is_dir()
    ):
        raise UserError(
            f"{args.data_root}: no such folder; --data-root names a folder in COCO panoptic format"
        )
    if stage in OPENS and args.dataset in PAPERS_DATASETS and not args.images:
        known = PAPERS_SPLITS[args.dataset]
        if (
            args.split
            and not args.split.isdecimal()
            and args.split not in known
            and not Path(args.split).is_file()
        ):
            raise UserError(
                f"unknown split '{args.split}' of {args.dataset}; available: {', '.join(known)}, "
                "a number, or a file of image names"
            )
        require(args.dataset, Path(args.data_root), prepared=stage != "prepare")
    weights = args.weights or (args.out if stage == "report" else None)
    if stage in STORED and weights is None:
        raise UserError(
            "this stage needs --weights runs/NAME, or a checkpoint of the official code"
        )
    for flag, path in (
        ("weights", weights),
        ("init", args.init),
        *(("compare", path) for path in args.compare),
    ):
        if path is not None and not path.exists():
            raise UserError(f"{path}: no such run or file (--{flag}){_runs(path, args.runs)}")
    if (
        stage in ("eval", "predict", "export")
        and weights.is_dir()
        and not any(weights.glob("step_*.pt"))
    ):
        raise UserError(
            f"{weights}: no checkpoint (step_*.pt) in this folder{_runs(weights, args.runs)}"
        )
    if stage == "predict" and not args.input.exists():
        raise UserError(f"{args.input}: no such picture or folder of pictures")
    if stage == "import" and not args.input.is_dir():
        raise UserError(f"{args.input}: no such folder of annotated images")
    if args.images is not None and not args.images.is_dir():
        raise UserError(f"{args.images}: no such folder of images")
    if args.assets is not None and not args.assets.is_dir():
        raise UserError(
            f"{args.assets}: no such folder; --assets names a copy of the official repository"
        )
    if (
        stage == "zeroshot"
        and args.masks is not None
        and str(args.masks) not in ("gt", "sam")
        and not args.masks.is_dir()
    ):
        raise UserError(f"{args.masks}: no such folder of masks; expected one, or gt or sam")
    if stage == "export" and args.out is not None and args.out.exists():
        raise UserError(f"{args.out}: exists already; name another file with --out")
    for flag, folder in (
        ("out", None if stage in ("export", "mini-clip", "mini-sam") else args.out),
        ("runs", args.runs),
    ):
        above = (
            next((path for path in (folder, *folder.parents) if path.exists()), None)
            if folder
            else None
        )
        if above is not None and not above.is_dir():
            raise UserError(
                f"{folder}: cannot be written, {above} is a file; expected a folder for results; "
                f"choose another with --{flag}"
            )
    if (
        args.log == "tensorboard"
        and "torch.utils.tensorboard" not in sys.modules
        and importlib.util.find_spec("tensorboard") is None
    ):
        raise ModuleNotFoundError(name="tensorboard")


def _runs(path: Path, runs: Path) -> str:
    """The runs that there are, to append to an error about one that there is not."""
    names = sorted(str(folder) for folder in runs.glob("*") if any(folder.glob("step_*.pt")))
    listed = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
    return f"; there are {listed}{nearest(str(path), names)}" if names else f"; no run is in {runs}"


def stopped(args: argparse.Namespace | None) -> str:
    """What Ctrl-C ends with, where the stage has not said it itself: how to go on."""
    stage = args.stage if args else ""
    if any(stage in flag.stages for flag in FLAGS if flag.name == "resume"):
        return "stopped; go on with --resume"
    if stage in ("prepare", "masks"):
        return "stopped; the same command goes on where it was"
    if stage == "import":
        return "stopped; the same command begins again"
    return "stopped; nothing is kept of it, the same command begins again" if stage else "stopped"


def given(args: argparse.Namespace) -> dict:
    """The fields of Config that the command line names, with the optimiser steps of the stage at hand under their own name."""
    values = {
        f.name: getattr(args, f.name)
        for f in dataclasses.fields(Config)
        if getattr(args, f.name) is not None
    }
    if args.steps is not None:
        values.setdefault(steps_of(args.stage), args.steps)
    return values


def steps_of(stage: str) -> str:
    """The field of Config with the optimiser steps of a stage."""
    return {"dewa": "dewa_steps", "sup": "sup_steps"}.get(stage, "ssl_steps")


def configure(args: argparse.Namespace, stored: dict | None = None) -> Config:
    """Preset -> what a run has stored (`stored`, of the stages that read one) -> flags."""
    values, cfg = given(args), PRESETS[choose("preset", args.preset or args.dataset, PRESETS)]
    if stored is not None:
        cfg = dataclasses.replace(cfg, **numbers_of(stored))
    elif args.stage in ("sup", "ssl"):
        values.setdefault(
            "teacher_posterior",
            "ensemble" if args.stage == "ssl" and args.method != "ssl" else "decoder",
        )
    if "pretrained" not in values and values.get("backbone", cfg.backbone) != cfg.backbone:
        values["pretrained"] = TAGS.get(values["backbone"], "")
    splits = PAPERS_SPLITS.get(args.dataset, ())
    if args.split in splits:
        cfg = dataclasses.replace(cfg, sup_steps=SUP_STEPS_A_SPLIT * (splits.index(args.split) + 1))
    return dataclasses.replace(cfg, **values)


def require_sense(args: argparse.Namespace, cfg: Config) -> None:
    """Raise UserError for a value that does not exist, and for a flag that the stage would pass over in silence."""
    for name, values in (
        ("classifier", ("language", "linear")),
        ("teacher_posterior", ("decoder", "clip", "ensemble")),
        ("labels", ("panoptic", "semantic")),
    ):
        choose(name.replace("_", " "), getattr(cfg, name), values)
    try:
        sound = cfg.alpha == "labeled" or all(
            0 <= alpha_at(cfg.alpha, end) <= 1 for end in (0.0, 1.0)
        )
    except ValueError:
        sound = False
    if not sound:
        raise UserError(
            f"--alpha {cfg.alpha}: expected a number from 0 to 1, two of them with a colon (0.4:0.8: from the first to the last step), or `labeled`"
        )
    require_ranges(cfg)
    require_use(args, cfg)
    for stage in TRAIN if args.stage in TABLES else {args.stage} & {*TRAIN}:
        require_learning(cfg, stage)
    if (
        args.stage == "ssl" and not args.resume
    ):  # a run that goes on may have been begun with more steps
        require_semi_supervised(cfg, is_warm(args))
    if args.stage in TABLES:
        require_semi_supervised(cfg, warm=False)
    if (
        args.stage in ("demo", "ladder") and cfg.ssl_steps > cfg.dewa_steps
    ):  # else another error: `stages.require_rungs`
        require_semi_supervised(
            dataclasses.replace(cfg.settled(), ssl_steps=cfg.ssl_steps - cfg.dewa_steps), warm=True
        )
    if args.stage == "predict" and (args.input is None or args.force and args.resume):
        raise UserError(
            "--force and --resume: expected one of them"
            if args.input
            else "--stage predict needs --input: a picture, or a folder of pictures"
        )
    if args.stage == "import":
        if not (args.input and args.out):
            raise UserError(
                "--stage import needs --input DIR, a folder of annotated images, and --out NEW, the folder to make of it"
            )
        choose("kind of annotations (--from)", args.source_format, SOURCES)
    if args.report_images < 0:
        raise UserError(
            f"--report-images {args.report_images}: expected the number of validation images in report.html, 0 or more"
        )
    for name, least in (("watch", 0), ("groups", 0), ("jobs", 0), ("seeds", 1)):
        if getattr(args, name) < least:
            raise UserError(
                f"--{name} {getattr(args, name)}: expected a number of at least {least}"
            )
    for name in {
        "ladder": ("teacher_posterior",),
        "demo": ("teacher_posterior",),
        "alpha": ("teacher_posterior", "alpha"),
    }.get(args.stage, ()):
        if name in given(args):
            raise UserError(
                f"--{name.replace('_', '-')}: the rungs of --stage {args.stage} set it themselves; use --stage ssl"
            )


# -------------------------------------------------------------------------------------------------------- help pages


def overview() -> str:
    """What `--help` says: one screen."""
    rows = [
        f"  {group if k == 0 else '':<10} {name:<10} {line}"
        for group, stages in STAGES.items()
        for k, (name, line) in enumerate(stages.items())
    ]
    return "\n".join(
        [
            "DEARLi: semi-supervised panoptic segmentation with few labelled images",
            "",
            "  python dearli.py [--stage STAGE] [flags]            without any flag: the demo",
            "",
            *rows,
            "",
            "  --dataset NAME      " + ", ".join(DATASETS) + " (mini: nothing to download)",
            "  --data-root DIR     the folder of any other data set (datasets/NAME)",
            "  --split N           labelled images: a number, the name of a partition, all, or a file of image names",
            "  --out DIR           where the result goes (RUNS/DATASET-STAGE-SPLIT)",
            "  --device, --seed, --workers, --resume, --dry-run; and every number of the method: --lr 3e-4 --alpha 0.5",
            "",
            "  python dearli.py --stage ssl --help                 all flags of a stage, with their units and defaults",
            "  python dearli.py --stage ssl --print-config         the numbers of a run",
            "  python dearli.py --stage ssl --dry-run              its time and memory, before it begins",
            "  python dearli.py --version                          of this program, Python and torch",
        ]
    )


def stage_page(stage: str, preset: Config) -> str:
    """What `--stage NAME --help` says. preset: whose numbers are the defaults."""
    line = next(stages[stage] for stages in STAGES.values() if stage in stages)
    own = [
        (f"--{flag.name}", flag.help, flag.more.get("default"))
        for flag in FLAGS
        if stage in flag.stages
    ]
    parts = [
        f"python dearli.py --stage {stage} [flags]",
        f"  {line}",
        "",
        *[row for name, text, default in own for row in _row(name, text, default)],
    ]
    for title, fields in numbers().items():
        rows = [
            row
            for name, text in fields
            if name in reads(stage)
            for row in _row("--" + name.replace("_", "-"), text, getattr(preset, name))
        ]
        parts += ["", title, *rows] if rows else []
    return "\n".join(parts)


def numbers() -> dict[str, list[tuple[str, str]]]:
    """The fields of Config with the comments beside them, by the comment above each section."""
    sections: dict[str, list[tuple[str, str]]] = {}
    for line in inspect.getsource(Config).splitlines():
        if found := re.match(r"    # (\S.*)", line):
            sections[found[1]] = fields = []
        elif found := re.match(r"    (\w+): .*?  *# (.*)", line):
            fields.append((found[1], found[2]))
        elif found := re.match(r"    #  +(.*)", line):
            fields[-1] = (fields[-1][0], f"{fields[-1][1]} {found[1]}")
    return sections


def _row(name: str, text: str, default) -> list[str]:
    shown = (
        ""
        if default is None
        or default is False
        or default == ()
        or default == ""
        or f"({default}" in text
        else f" [{'yes' if default is True else default}]"
    )
    lines = textwrap.wrap(text + shown, WIDTH - 28)
    return [f"  {name:<25} {lines[0]}", *[f"  {'':<25} {rest}" for rest in lines[1:]]]


def help_page(args: argparse.Namespace) -> str:
    """For `--help`: of the stage, if one is given."""
    if args.stage == "demo":
        return overview()
    choose("stage", args.stage, ALL)
    return stage_page(
        args.stage,
        PRESETS[
            choose(
                "preset",
                args.preset
                or choose("data set", ALIASES.get(args.dataset, args.dataset), DATASETS),
                PRESETS,
            )
        ],
    )
