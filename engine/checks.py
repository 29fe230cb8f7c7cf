"""All that can be refused before anything is read or imported.

`check` knows the command line alone, `require_there` the files that it names. What a stage reads,
but not with the other numbers at hand, is refused as well (`idle`). Imports no library.
"""

import argparse
import importlib.util
import re
import sys
from dataclasses import fields, replace
from pathlib import Path

from config import ALIASES, METHODS, PAPERS_DATASETS, PAPERS_SPLITS, Config, dashed, require_ranges
from engine.flags import (
    ALL,
    DATASETS,
    FIELDS,
    FLAGS,
    LABELED,
    MAKES,
    SOURCES,
    STORED,
    TABLES,
    TRAIN,
    WARM,
    WITH_CLIP,
    configure,
    given,
    is_warm,
    opens,
    reads,
    rows,
    steps_of,
    usual_method,
)
from ground.errors import UserError, choose, nearest
from readers.downloads import default_root, require

TORCH_DEVICES = ("cpu", "cuda", "mps", "xpu", "hpu", "mtia", "xla")  # that one can train on
# Of a run that is stored: what its weights are part of, and what they were trained on
OF_THE_RUN = (
    *("backbone", *FIELDS["DECODER"], "network", *FIELDS["DEEPLAB"], *FIELDS["PROJECTOR"]),
    "contrast_weight",
    *("labels", "no_object_weight", "seed"),
)


def check(args: argparse.Namespace) -> None:
    """Raise UserError for all that can be known to be wrong before anything is read or imported.

    Fills in what follows from the rest: the method, and the folder of one of the paper's data sets.
    """
    args.dataset = ALIASES.get(args.dataset, args.dataset)
    choose("stage", args.stage, ALL)
    choose("data set", args.dataset, DATASETS)
    require_known(args)
    require_values(args)
    if args.stage == "ssl":
        args.method = args.method or usual_method(args)
    if opens(args) and args.dataset in PAPERS_DATASETS and not args.data_root:
        args.data_root = str(default_root(args.dataset))
    steps = steps_of(args.stage)
    if args.steps not in (None, given(args).get(steps)):
        raise UserError(
            f"--steps {args.steps}: {dashed(steps)} says {given(args)[steps]}; expected one of them"
        )
    if args.stage not in STORED:
        require_sense(args, configure(args))
        require_split(args)


# --------------------------------------------------------------------- the command line alone


def require_known(args: argparse.Namespace) -> None:
    """Raise UserError for a flag that the stage does not know, a number that it does not read."""
    known = [(flag.dest, f"--{flag.name}", flag.stages) for flag in FLAGS]
    for f in fields(Config):
        known.append((f.name, dashed(f.name), [s for s in ALL if f.name in reads(s)]))
    for dest, name, stages in known:
        if dest in args.flags and args.stage not in stages:
            *others, last = stages
            who = f"{', '.join(others)} and {last} know" if others else f"{last} knows"
            raise UserError(f"{name}: only --stage {who} it, not --stage {args.stage}")


def require_values(args: argparse.Namespace) -> None:
    """Raise UserError for a value that a flag cannot have; those of numbers: `require_ranges`."""
    for flag in FLAGS:
        value = getattr(args, flag.dest)
        if flag.choices and value is not None:
            choose(flag.what, value, flag.choices)
        if flag.least is not None and value < flag.least:
            raise UserError(f"--{flag.name} {value}: expected a number of at least {flag.least}")


def require_sense(args: argparse.Namespace, cfg: Config) -> None:
    """Raise UserError for numbers that no run can use, and for flags that contradict each other."""
    require_ranges(cfg)
    require_use(args, cfg)
    if args.stage == "ssl":
        require_method(args)
    for stage in TRAIN if args.stage in TABLES else {args.stage} & {*TRAIN}:
        require_learning(cfg, stage)
    if args.stage == "ssl" and not args.resume:  # one that goes on may have had more steps
        require_semi_supervised(cfg, is_warm(args))
    if args.stage in TABLES:
        require_semi_supervised(cfg, warm=False)
    longer = cfg.ssl_steps - cfg.dewa_steps  # of DEARLi's rung; too few: `ladder.require_rungs`
    if args.stage in ("demo", "ladder") and longer > 0:
        require_semi_supervised(replace(cfg.settled(), ssl_steps=longer), warm=True)
    if args.stage in ("predict", "import"):
        require_input(args)


def require_use(args: argparse.Namespace, cfg: Config) -> None:
    """Raise UserError for a flag that would be passed over in silence beside the others."""
    names = {flag.dest: f"--{flag.name}" for flag in FLAGS}
    for dest, counts in idle(args, cfg).items():
        if dest in args.flags:
            raise UserError(f"{names.get(dest, dashed(dest))}: {counts}")


# Flags by dest that a stage knows and that may do nothing: when (see `idle`), and what would count.
_IDLE = """
warm | burn_in | a run that starts from other weights (--method {warm}, or --init) has
    --burn-in-warm
cold | burn_in_warm | a run that starts from a random decoder has --burn-in
frozen | backbone_lr_multiplier | it counts with --train-backbone
no clip | alpha clip_scale | CLIP has no say here; it counts with --classifier language, or with
    --method {clip}
no choice | oversample | no point is chosen by uncertainty; it counts with --importance above 0
no width | object_width | images are shown by their short side; it counts with --seen-width above 0
by width | test_max | images are shown by the width of their objects; it counts with
    --seen-width 0
no blur | blur_radius | nothing is blurred; it counts with --blur-prob above 0
no layers | decoder_ffn | the decoder has no layers; it counts with --decoder-layers above 0
own crop | crop | the warm-up crops to --dewa-crop {cfg.dewa_crop}; name that one, or set it to 0
no network | NETWORK | stable regions (--sam regions) have no network; it counts with --sam mini or
    vit_h
no sam | sam NETWORK | it counts with --masks sam
no warm-up | WARM_UP make | no masks and no warm-up are made here; it counts with --method {warm}
    and without --init
deeplab | QUERIES | DeepLabv3+ has no queries; it counts with --network mask2former
deeplab | groups | it is about PQ, and there are no segments; it counts with --network mask2former
mask2former | DEEPLAB SOFT CONTRAST | it is of DeepLabv3+; it counts with --network
    deeplab (--stage sup), or with --method esl or hard
no contrast | CONTRAST | no parts are told apart; it counts with
    --contrast-weight above 0
no mining | ohem_kept | it counts with --ohem above 0
adamw | momentum | it counts with --optimizer sgd
stepped | epochs | --steps says how long the run is; expected one of them
rungs | teacher_posterior | the rungs of --stage {args.stage} set it themselves; use --stage ssl
alphas | alpha | the rungs of --stage alpha set it themselves; use --stage ssl
not mini | eval_on | only --dataset mini has images to tune on
not custom | variant | it counts with --dataset custom
mini | data_root | --dataset mini is drawn, not read; it counts with --dataset custom or another
bytes | white | images of --dataset mini have 8 bits
images | data_root variant split | the images are those of --images; it counts without
no eval | groups watch | nothing is evaluated; it counts without --no-eval
no graph | which posterior GRAPH | it counts with --format onnx
graph | no_object_weight | there is no loss in it; it counts with --format official or safetensors
no figures | report_images | pictures are of an evaluation; it counts without --no-eval
"""
IDLE = [row.split(" | ") for row in rows(_IDLE)]
GROUPS = {
    **{name: FIELDS[name] for name in ("NETWORK", "GRAPH", "QUERIES", "SOFT", "CONTRAST")},
    "DEEPLAB": (*FIELDS["DEEPLAB"], *FIELDS["PROJECTOR"], "ohem", "ohem_kept", "colour"),
    "WARM_UP": tuple(MAKES["ssl"]),
}


def idle(args: argparse.Namespace, cfg: Config) -> dict[str, str]:
    """Flags, by dest, that the stage knows and that do nothing with the others as they are; with
    what would make them count. With --dry-run all may be said that the run itself takes.
    """
    stage, mini = args.stage, args.dataset == "mini"
    begins = stage == "ssl" and not args.resume  # one that goes on knows what it started from
    unmeasured = stage in LABELED and not args.evaluate
    holds = {
        "warm": begins and is_warm(args),
        "cold": begins and not is_warm(args),
        "frozen": not cfg.train_backbone,
        "no clip": not cfg.has_ensemble and stage != "zeroshot",
        "no choice": not cfg.importance,
        "no width": not cfg.seen_width,
        "by width": cfg.seen_width > 0,
        "no blur": not cfg.blur_prob,
        "no layers": not cfg.decoder_layers,
        "own crop": stage == "dewa" and cfg.dewa_crop > 0 and "dewa_crop" not in args.flags,
        "no network": cfg.sam == "regions",
        "no sam": stage == "zeroshot" and str(args.masks) != "sam",
        "no warm-up": stage == "ssl" and not (args.method in WARM and args.init is None),
        "deeplab": cfg.network == "deeplab",
        "mask2former": cfg.network != "deeplab",
        "no contrast": stage == "ssl" and not cfg.contrast_weight,
        "no mining": not cfg.ohem,
        "adamw": cfg.optimizer != "sgd",
        "stepped": steps_of(stage) in given(args),
        "rungs": stage in TABLES,
        "alphas": stage == "alpha",
        "not mini": not mini,
        "not custom": args.dataset != "custom",
        "mini": mini,
        "bytes": mini and stage not in STORED and not args.images,
        "images": args.images is not None,
        "no eval": unmeasured,
        "no graph": stage == "export" and args.format != "onnx",
        "graph": stage == "export" and args.format == "onnx",
        "no figures": unmeasured and not args.resume,
    }
    named = {"warm": " or ".join(WARM), "clip": " and ".join(WITH_CLIP)}
    return {
        dest: counts.format(args=args, cfg=cfg, **named)
        for condition, names, counts in IDLE
        if holds[condition]
        for name in names.split()
        for dest in GROUPS.get(name, (name,))
    }


def require_method(args: argparse.Namespace) -> None:
    """Raise UserError for a number that makes another method of --method."""
    numbers = METHODS[args.method].numbers
    alike = {
        key: other
        for key, other in METHODS.items()
        if other.numbers.get("network") == numbers.get("network")
    }
    for name, value in numbers.items():
        asked = getattr(args, name)
        fitting = [key for key, other in alike.items() if asked in other.values(name)]
        if asked is not None and args.method not in fitting:
            raise UserError(
                f"{dashed(name)} {asked}: --method {args.method} has {value}; expected "
                + (f"--method {' or '.join(fitting)}" if fitting else "no other")
                + (", with --init FOLDER from a warm-up" if args.method in WARM else "")
            )


def require_input(args: argparse.Namespace) -> None:
    """Raise UserError if a stage that reads files of one's own does not know which, or where to."""
    if args.stage == "predict" and not args.input:
        raise UserError("--stage predict needs --input: a picture, or a folder of pictures")
    if args.stage == "predict" and args.force and args.resume:
        raise UserError("--force and --resume: expected one of them")
    if args.stage == "import" and not (args.input and args.out):
        raise UserError(
            "--stage import needs --input DIR, a folder of annotated images, and --out NEW, the "
            "folder to make of it"
        )
    if args.stage == "import" and not args.source_format:
        raise UserError(
            f"--stage import needs --from, the kind of annotations: {', '.join(SOURCES)}"
        )


def require_split(args: argparse.Namespace) -> None:
    """Raise UserError where one of the paper's data sets is named without its labelled images."""
    tables = args.stage in TABLES and not args.print_config
    matters = args.stage in LABELED or tables or args.stage == "eval" and args.groups
    if args.dataset in PAPERS_DATASETS and args.split is None and matters:
        raise UserError(
            f"--dataset {args.dataset}: say with --split which images are labelled: "
            f"{', '.join(PAPERS_SPLITS[args.dataset])} (the paper's partitions), a number of "
            "images, or a file of image names"
        )


def require_of_the_run(args: argparse.Namespace, stored: dict) -> None:
    """Raise UserError for a flag that would make another model of a run that is stored.

    stored: its configuration; empty: an official file.
    """
    for name in OF_THE_RUN:
        value = getattr(args, name)
        if name in args.flags and stored.get(name, value) != value:
            raise UserError(
                f"{dashed(name)} {value}: {args.weights} fits another configuration, it was "
                f"trained with {stored[name]}; leave the flag out"
            )
    if "labels" in args.flags and not stored:
        raise UserError(f"--labels: {args.weights} has no teacher, whose pseudo-labels it is about")
    if "preset" in args.flags and "num_queries" in stored:
        raise UserError(
            f"--preset: the numbers are those that {args.weights} was trained with; leave it out"
        )


def require_learning(cfg: Config, stage: str) -> None:
    """Raise UserError for numbers with which stage dewa, sup or ssl would learn nothing."""
    if cfg.lr == 0:
        raise UserError("--lr 0: nothing would be learned; expected a number above 0")
    if cfg.lr * cfg.weight_decay >= 1:
        raise UserError(
            f"--weight-decay {cfg.weight_decay}: at --lr {cfg.lr} a step would take all of a "
            f"weight away; expected less than {1 / cfg.lr:g}"
        )
    if cfg.train_backbone and cfg.backbone_lr_multiplier == 0:
        raise UserError(
            "--backbone-lr-multiplier 0: the backbone would not be trained; "
            "leave --train-backbone out"
        )
    terms = ["class_weight"] * (stage != "dewa") + ["mask_weight", "dice_weight"]
    if not any(getattr(cfg, name) for name in terms):
        flags = " and ".join(map(dashed, terms))
        raise UserError(f"{flags} are 0: there is nothing to learn; expected one above 0")


def require_semi_supervised(cfg: Config, warm: bool) -> None:
    """Raise UserError if a run of stage ssl would end before its first unlabelled image.

    warm: it starts from DeWa weights.
    """
    burn_in = cfg.burn_in_steps(warm)
    if burn_in >= cfg.ssl_steps:
        raise UserError(
            f"{'--burn-in-warm' if warm else '--burn-in'} {burn_in}: all {cfg.ssl_steps} steps of "
            "the run (--steps) would pass without an unlabelled image; expected fewer, or a share "
            "of the steps such as 0.5"
        )


def ablations(cfg: Config, stage: str, warm: bool = False) -> list[str]:
    """What numbers that a run may well have, as an experiment, make of the method: a line each."""
    lines = []
    if stage != "dewa" and not cfg.class_weight:
        lines.append("--class-weight 0: no classes are learned")
    if stage != "dewa" and not (cfg.mask_weight or cfg.dice_weight):
        lines.append("--mask-weight 0 and --dice-weight 0: no masks are learned")
    if stage == "ssl" and not cfg.lambda_u:
        lines.append("--lambda-u 0: the unlabelled images change nothing, a supervised run")
    if stage == "ssl" and cfg.ema_decay == 1 and (warm or cfg.burn_in):
        lines.append("--ema-decay 1: the teacher stays as it is after the burn-in")
    if stage == "ssl" and cfg.teacher_posterior == "ensemble" and str(cfg.alpha) in ("1", "1.0"):
        lines.append("--alpha 1: CLIP has no say, as with --method ssl")
    return lines


# ----------------------------------------------------------------------------- the files it names


def require_there(args: argparse.Namespace) -> None:
    """Raise UserError for a file or folder that a stage is given and that is not there, and for
    other things that the machine knows at once.

    What is in the files is for the stage to say. After `check`, and apart from it: a command line
    can be understood where its files are not.
    """
    if args.stage == "prepare":
        choose("data set to prepare", args.dataset, PAPERS_DATASETS)
    devices = "|".join(TORCH_DEVICES)
    if args.device is not None and not re.fullmatch(rf"({devices})(:\d+)?", args.device):
        raise UserError(f"device '{args.device}': expected cpu, cuda, cuda:N or mps")
    if opens(args):
        _require_data(args)
    _require_runs(args)
    _require_folders(args)
    _require_room(args)
    if args.log == "tensorboard" and "torch.utils.tensorboard" not in sys.modules:
        if importlib.util.find_spec("tensorboard") is None:
            raise ModuleNotFoundError(name="tensorboard")
    if args.stage == "export" and args.format == "onnx":
        for package in ("onnx", "onnxscript"):
            if sys.modules.get(package, package) is None or not importlib.util.find_spec(package):
                raise ModuleNotFoundError(name=package)


def _require_data(args: argparse.Namespace) -> None:
    """The data set that is named: a folder, and of the paper's what belongs to them."""
    if args.dataset == "custom" and not args.data_root:
        raise UserError("--dataset custom needs --data-root DIR: a folder in COCO panoptic format")
    if args.dataset == "custom" and not Path(args.data_root).is_dir():
        raise UserError(
            f"{args.data_root}: no such folder; --data-root names a folder in COCO panoptic format"
        )
    if args.dataset not in PAPERS_DATASETS:
        return
    known = PAPERS_SPLITS[args.dataset]
    split = args.split or known[0]
    if not (split.isdecimal() or split in known or Path(split).is_file()):
        raise UserError(
            f"unknown split '{args.split}' of {args.dataset}; available: {', '.join(known)}, "
            "a number, or a file of image names"
        )
    require(args.dataset, Path(args.data_root), prepared=args.stage != "prepare")


def _require_runs(args: argparse.Namespace) -> None:
    """Runs and weights that a stage starts from, or is about."""
    weights = args.weights or (args.out if args.stage == "report" else None)
    if args.stage in STORED and weights is None:
        raise UserError(
            "this stage needs --weights runs/NAME, or a checkpoint of the official code"
        )
    named = [("weights", weights), ("init", args.init)]
    for flag, path in named + [("compare", path) for path in args.compare]:
        if path is not None and not path.exists():
            raise UserError(f"{path}: no such run or file (--{flag}){_runs(path, args.runs)}")
    applied = args.stage in ("eval", "predict", "export") and weights.is_dir()
    if applied and not any(weights.glob("step_*.pt")):
        raise UserError(
            f"{weights}: no checkpoint (step_*.pt) in this folder{_runs(weights, args.runs)}"
        )


def _runs(path: Path, runs: Path) -> str:
    """The runs that there are, to append to an error about one that there is not."""
    names = sorted(str(folder) for folder in runs.glob("*") if any(folder.glob("step_*.pt")))
    listed = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
    return f"; there are {listed}{nearest(str(path), names)}" if names else f"; no run is in {runs}"


def _require_folders(args: argparse.Namespace) -> None:
    """Pictures, and folders of them, of masks and of the official code."""
    if args.stage == "predict" and not args.input.exists():
        raise UserError(f"{args.input}: no such picture or folder of pictures")
    masks = (
        args.masks if args.stage == "zeroshot" and str(args.masks) not in ("gt", "sam") else None
    )
    for folder, what in (
        (args.input if args.stage == "import" else None, "folder of annotated images"),
        (args.images, "folder of images"),
        (args.assets, "folder; --assets names a copy of the official repository"),
        (masks, "folder of masks; expected one, or gt or sam"),
    ):
        if folder is not None and not folder.is_dir():
            raise UserError(f"{folder}: no such {what}")


def _require_room(args: argparse.Namespace) -> None:
    """Where the result goes: a file that is not there yet, or a folder that can be made."""
    if args.stage == "export" and args.out is not None and args.out.exists():
        raise UserError(f"{args.out}: exists already; name another file with --out")
    out = None if args.stage in ("export", "mini-clip", "mini-sam") else args.out
    for flag, folder in (("out", out), ("runs", args.runs)):
        above = [path for path in (folder, *folder.parents) if path.exists()] if folder else []
        if above and not above[0].is_dir():
            raise UserError(
                f"{folder}: cannot be written, {above[0]} is a file; expected a folder for "
                f"results; choose another with --{flag}"
            )
