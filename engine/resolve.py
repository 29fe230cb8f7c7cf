"""From the command line to what a stage needs: the preset of the data set, or the numbers of a run,
and then the flags.
"""

import argparse
from dataclasses import fields
from numbers import Integral, Real
from pathlib import Path

from config import PAPERS_DATASETS, Config
from engine import checkpoint, stored
from engine.checks import check, require_of_the_run, require_sense
from engine.flags import DATASETS, configure, given, steps_of
from engine.parser import parser
from engine.request import Course, Place, Source, machine, part
from engine.stored import Stored, require_config, written_config
from ground import ranks
from ground.errors import UserError
from readers.downloads import default_root
from readers.papers import default_split

SHARED = ("masks", "dewa", "sup", "ssl", "eval")  # stages that several ranks can work on


def resolve(args: argparse.Namespace) -> dict:
    """Flags by name, and what is made of several of them: source, place, machine, course, cfg,
    stored.

    Raises: UserError for what does not go together, or with the run that is named.
    """
    check(args)
    run = _stored(args)
    config = run.config if run else {}
    if args.stage == "predict" or args.stage in ("eval", "export") and "dataset" not in args.flags:
        name = config.get("dataset", args.dataset)  # under its name, or a folder of somebody's own
        args.dataset = name if name in DATASETS else "custom"
    split, variant = args.split or config.get("split"), args.variant or config.get("variant", "")
    root = args.data_root or config.get("data_root", "")
    if not root and args.dataset in PAPERS_DATASETS:  # of an official file, which does not say
        root = str(default_root(args.dataset))
    args.split = split
    cfg = configure(args, config if run else None)
    require_sense(args, cfg)
    if run:
        require_of_the_run(args, config)
    if ranks.started_by_torchrun() and args.stage not in SHARED:
        raise UserError(
            f"--stage {args.stage}: works in one process; torchrun serves {', '.join(SHARED)}"
        )
    numbers, flags = given(args), vars(args)
    place = {"split": split or default_split(args.dataset), "variant": variant, "data_root": root}
    course = {"steps": numbers.get(steps_of(args.stage)), "given": frozenset(numbers)}
    return {
        **flags,
        "cfg": cfg,
        "stored": run,
        "source": part(Source, {**flags, **place}),
        "place": part(Place, flags),
        "machine": machine(args.device, args.precision),
        "course": part(Course, {**flags, **course}),
    }


def _stored(args: argparse.Namespace) -> Stored | None:
    """The run or file that a stage reads. The page of a run can be made without its weights."""
    if args.stage == "report":
        args.weights = args.weights or args.out  # its page goes where it is
        folder = args.weights
        if folder and folder.is_dir() and not checkpoint.steps(folder):
            run = Stored(folder, {"config": require_config(written_config(folder), folder)})
        else:
            run = stored.read(folder)
        if args.dataset == "mini" and run.config:
            args.dataset = data_set(run.config)
        return run
    return stored.read(args.weights) if args.stage in ("eval", "predict", "export") else None


def data_set(config: dict) -> str:
    """--dataset of a run that is stored, for its page: the images of somebody's own are stored
    under their name. Of a folder of images (--images) a run knows the name only."""
    name, root = config.get("dataset", "mini"), config.get("data_root")
    if not root and name != "mini":
        return "mini"
    return name if name in PAPERS_DATASETS or not root else "custom"


def resolve_load(weights: str | Path, flags: dict) -> dict:
    """The same for `dearli.load`. flags: by name. Raises: TypeError for one that does not exist, or
    has a value of another type."""
    args = parser().parse_args(["--stage", "predict", "--weights", str(weights), "--input", "."])
    unknown = next((name for name in flags if not hasattr(args, name)), None)
    if unknown:
        raise TypeError(f"load: no flag {unknown}; available: {', '.join(vars(args))}")
    for field in fields(Config):
        value = flags.get(field.name)
        kind = {bool: bool, int: Integral, float: Real}.get(field.type)
        wrong = kind and (not isinstance(value, kind) or isinstance(value, bool) != (kind is bool))
        if value is not None and wrong:
            raise TypeError(f"load: {field.name}={value!r}: expected {field.type.__name__}")
    return resolve(
        argparse.Namespace(**{**vars(args), **flags, "flags": args.flags | flags.keys()})
    )
