"""All that can be refused before anything is read or imported.

`check` knows the command line alone, `require_there` the files that it names. What a stage reads,
but not with the other numbers at hand, is refused as well (`engine.idle`). Imports no library.
"""

import argparse
import importlib.util
import re
import sys
from dataclasses import fields
from pathlib import Path

from config import ALIASES, METHODS, PAPERS_DATASETS, PAPERS_SPLITS, Config, dashed
from engine.flags import (
    ALL,
    DATASETS,
    FIELDS,
    FLAGS,
    LABELED,
    LADDERS,
    SOURCES,
    STORED,
    TABLES,
    TRAIN,
    WARM,
    configure,
    given,
    is_warm,
    opens,
    reads,
    steps_of,
    usual_method,
)
from engine.idle import idle
from engine.ranges import require_ranges
from ground.errors import UserError, choose, nearest
from readers.downloads import default_root, require

TORCH_DEVICES = ("cpu", "cuda", "mps", "xpu", "hpu", "mtia", "xla")  # that one can train on
# Of a run that is stored: what its weights are part of, and what they were trained on
OF_THE_RUN = (
    *("backbone", *FIELDS["DECODER"], "network", *FIELDS["DEEPLAB"], *FIELDS["PROJECTOR"]),
    *("contrast_weight", *FIELDS["BANK"]),
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
    own = args.stage == "ladder" and args.method is not None
    if own:
        require_ladder(args)
    elif args.stage in TABLES and args.labels == "instances":
        raise UserError(
            f"--labels instances: the rungs of --stage {args.stage} are of every pixel; expected "
            "--stage sup"
        )
    if args.stage == "ssl" or own:
        require_method(args, cfg)
    for stage in LABELED if own else TRAIN if args.stage in TABLES else {args.stage} & {*TRAIN}:
        require_learning(cfg, stage)
    if args.stage == "ssl" and not args.resume:  # one that goes on may have had more steps
        require_semi_supervised(cfg, is_warm(args))
    if args.stage in TABLES:
        require_semi_supervised(cfg, warm=False)
    if args.stage in ("demo", "ladder") and not own:
        require_semi_supervised(cfg, warm=True)
    if args.stage in ("predict", "import"):
        require_input(args)


def require_use(args: argparse.Namespace, cfg: Config) -> None:
    """Raise UserError for a flag that would be passed over in silence beside the others."""
    names = {flag.dest: f"--{flag.name}" for flag in FLAGS}
    for dest, counts in idle(args, cfg).items():
        if dest in args.flags:
            raise UserError(f"{names.get(dest, dashed(dest))}: {counts}")


def require_ladder(args: argparse.Namespace) -> None:
    """Raise UserError for a method that has no ladder of its own."""
    if args.method not in LADDERS:
        raise UserError(
            f"--method {args.method}: --stage ladder has those of {' and '.join(LADDERS)}, and "
            "without --method the one from supervised to DEARLi; expected one of them"
        )


def require_method(args: argparse.Namespace, cfg: Config) -> None:
    """Raise UserError for a number that makes another method of --method."""
    if cfg.labels == "instances":
        fitting = [key for key, other in METHODS.items() if cfg.labels in other.values("labels")]
        if args.method not in fitting:
            raise UserError(
                f"--labels instances: --method {args.method} makes pseudo-labels that do not "
                f"overlap; expected --stage sup{''.join(f' or --method {m}' for m in fitting)}"
            )
    numbers = METHODS[args.method].numbers
    for name, value in numbers.items():
        asked = getattr(args, name)
        kind = {"network", "labels"} - {name}  # of methods of another, no number need fit
        fitting = [
            key
            for key, other in METHODS.items()
            if all(other.numbers.get(k) == numbers.get(k) for k in kind)
            and (name not in other.numbers or asked in other.values(name))
        ]
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
    if args.join and "val_share" in args.flags:
        raise UserError(
            f"--val-share: {args.join} has validation images; leave it out beside --join"
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
    known = stored.get("taxonomy") is not None and args.stage == "predict"
    for name in ("dataset", "data_root", "variant", "split") if known else ():
        if name in args.flags:
            raise UserError(
                f"{dashed(name)}: {args.weights} knows its classes, and nothing else of a data set "
                "is read here; leave the flag out"
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
    guided = cfg.settled().guided_steps
    if stage == "ssl" and guided and cfg.burn_in_steps(warm) + guided >= cfg.ssl_steps:
        lines.append(
            f"--guided-steps {guided}: the run ends before the student becomes the teacher"
        )
    if stage == "ssl" and cfg.guided_steps and not guided:
        lines.append(f"--guided-steps {cfg.guided_steps}: of so few steps none, no second stage")
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
        raise UserError(
            "--dataset custom needs --data-root DIR: a folder in COCO panoptic format, or with "
            "COCO instances"
        )
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
    named = args.stage == "zeroshot" and str(args.masks) in ("gt", "sam")
    read = args.stage in ("zeroshot", "eval", "report")  # others make them, or say themselves
    masks = args.masks if read and not named else None
    for folder, what in (
        (args.input if args.stage == "import" else None, "folder of annotated images"),
        (args.join, "data set to join"),
        (args.images, "folder of images"),
        (args.assets, "folder; --assets names a copy of the official repository"),
        (masks, f"folder of masks{'; expected one, or gt or sam' * (args.stage == 'zeroshot')}"),
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
