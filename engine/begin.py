"""How a run begins, or goes on: what is in its folder, what it starts from, and what it has to have
in common with before.

A run is what it was made of: its numbers, its images and their ground truth, its classes, the
weights that it started from, its masks, its frozen backbone. All of it is stored, and on --resume
it is compared, or taken from what is stored.
"""

import json
from dataclasses import dataclass, field, replace
from pathlib import Path

from clip_ensemble import alpha_of_share
from config import BEFORE, METHODS, PHASES, Config
from engine import checkpoint, masks, rehearsal, stored
from engine.checkpoint import require_free
from engine.checks import ablations
from engine.flags import preset_of
from engine.method import Method
from engine.request import Course, Source
from engine.sameness import MAY_CHANGE
from engine.stored import Stored
from engine.training import Run
from ground import files, ranks
from ground.errors import UserError
from ground.identity import differences, of_tensors, of_text
from readers.checks import limits, require_files, require_truth
from readers.ground_truth import DataSet, Taxonomy
from readers.scale import object_width, scale_text

# What a decoder has to have in common with the one whose weights it takes.
DECODER = (
    "backbone pretrained train_backbone classifier num_queries hidden heads encoder_layers "
    "encoder_ffn encoder_points decoder_layers decoder_ffn"
).split()


def require_place(folder: Path, resume: bool) -> None:
    """Raise UserError if a run cannot go into its folder: asked before what it needs is made."""
    require_free(folder, resume)
    files.require_writable(folder)


def require_training_files(dataset: DataSet, cfg: Config, evaluate: bool) -> None:
    """What a training run reads of labelled and validation images is there: asked before the first
    step.
    """
    require_truth(dataset, measure=evaluate)
    require_files(dataset.train, dataset.labeled, "labelled", classes=cfg.labels == "semantic")
    require_files(dataset.val, range(len(dataset.val)), "validation", classes=True)


def settle(cfg: Config, dataset: DataSet) -> Config:
    """What the data set decides, as numbers: `--white 0`, `--object-width 0`, `--alpha labeled`;
    and that the miniature world is not stretched, whatever the preset."""
    cfg = replace(cfg, white=dataset.train.white, stretch=dataset.train.stretch)
    cfg = scaled(cfg, dataset) if dataset.labeled else cfg  # none: whoever needs some will say so
    if cfg.alpha != "labeled":
        return cfg
    require_truth(dataset, measure=False)  # no share without labelled images
    share = len(dataset.labeled) / (len(dataset.labeled) + len(dataset.unlabeled))
    return replace(cfg, alpha=round(alpha_of_share(share), 3))


def in_steps(cfg: Config, dataset: DataSet) -> Config:
    """With `--epochs` in steps. A supervised run has as many as a semi-supervised one."""
    if not cfg.epochs:
        return cfg
    steps = max(1, round(cfg.epochs * len(dataset.unlabeled) / cfg.unlabeled_batch))
    return replace(cfg, ssl_steps=steps, sup_steps=steps)


def scaled(cfg: Config, dataset: DataSet | None) -> Config:
    """With the width of the objects, if it counts and nobody has said it. dataset: None: images
    alone. Raises: UserError if there is nothing to measure it on.
    """
    if not cfg.seen_width or cfg.object_width:
        return cfg
    width = object_width(dataset, cfg) if dataset else 0.0
    if not width:
        raise UserError(
            f"--seen-width {cfg.seen_width:g}: no labelled image says how wide the objects are; "
            "say it with --object-width PIXELS, or take whole images with --seen-width 0"
        )
    return replace(cfg, object_width=width)


def identity(source: Source, stage: str, taxonomy: Taxonomy) -> dict:
    """What makes a run that run, beside its numbers: compared on --resume, read back by the stages
    that use a run.
    """
    return {
        "stage": stage,
        "dataset": source.name,
        "data_root": source.data_root,
        "variant": source.variant,
        "split": source.split,
        "taxonomy": taxonomy.to_config(),
    }


def warm_up_identity(source: Source, images, masks: dict | None) -> dict:
    """The same of a warm-up, which has no classes and takes all images; of a folder of them
    (--images) it stores the name only."""
    return {
        "stage": "dewa",
        "dataset": source.name,
        "data_root": "" if source.images else source.data_root,
        "variant": "" if source.images else source.variant,
        "data": images.fingerprint(),
        "masks": masks,
    }


@dataclass(frozen=True)
class Begun:
    """What is in the folder of a run that goes on. state: its newest checkpoint;  config: what it
    stores of itself;
    note: what an older run says of its --init."""

    state: dict | None = None
    config: dict = field(default_factory=dict)
    note: str = ""

    @property
    def knows_init(self) -> bool:
        """What the run began with is on record (an older run's is in the weights of its checkpoint,
        at least).
        """
        return self.state is not None or isinstance(self.config.get("init"), dict)


def begun(course: Course, folder: Path) -> Begun:
    """With --resume: what is there. The folder is held from here on, as by `training.Run`."""
    if not course.resume:
        return Begun()
    written = stored.written_config(folder)
    if not checkpoint.steps(folder):
        return Begun(None, written)
    if not course.dry_run:
        if ranks.rank() == 0:
            files.claim(folder)
        ranks.wait()
    state = checkpoint.newest(folder)
    config, note = state.get("config"), written.get("init")
    config = config if isinstance(config, dict) else {}
    return Begun(state, config, note if isinstance(note, str) else "")


def as_begun(course: Course, cfg: Config, before: Begun, steps: str) -> Config:
    """With --resume, the length and the phases that the run was begun with, unless they are named.

    steps: the field of its length.   A phase that is named as the share that it was is not a
    change; it does not move when the run is made longer.
    """
    names = {steps, "ssl_steps", *PHASES, "object_width"} & before.config.keys()
    numbers = {n: before.config[n] for n in names if type(before.config[n]) in (int, float)}
    length = {"ssl_steps": numbers["ssl_steps"]} if "ssl_steps" in numbers else {}
    asked = replace(cfg, **length).settled()
    taken = {}
    for name, value in numbers.items():
        named = name in course.given | {"ssl_steps"} and not (
            name == steps and course.steps is None
        )
        same_share = name in PHASES and getattr(asked, name) == value
        if not named or same_share:
            taken[name] = value
    return replace(cfg, **taken).settled()


def beginning(
    folder: Path, before: Begun, source: Path | None
) -> tuple[Stored | None, dict | None]:
    """What a run starts from, which is part of what it is: on --resume it is that of the run, with
    --init or without.

    source: --init, or the DeWa run; None: nothing.
    Returns: what there is to take (of a run that goes on, whose weights are in its checkpoint, only
        a CLIP that its start brought along); and {"source", "sha256": of the weights, "clip":
        whether it brought one}, None for nothing.
    Raises: UserError if the run began with something else, or what it needs is not there any more.
    """
    recorded = before.config.get("init")
    recorded = recorded if isinstance(recorded, dict) else None
    known = before.state is not None and "init" in before.config
    if known and recorded is None and source is not None:
        raise UserError(
            f"{folder}: began without --init, and cannot be resumed with {source}; leave --init "
            "out, or choose another folder with --out"
        )
    if known and source is None and not (recorded or {}).get("clip"):
        return None, recorded
    if source is None and recorded is not None:
        source = Path(str(recorded.get("source")))
        if not source.exists():
            raise UserError(
                f"{source}: not there any more; {folder} began with it and needs "
                f"{'its CLIP' if known else 'its weights'}: name it with --init"
            )
    if source is None:
        return None, _noted(before.note)
    start = stored.read(source)
    if "student" not in start.state:
        raise UserError(f"{source}: holds no student")
    clip = {f"clip.{name}": t for name, t in start.state.get("clip", {}).items()}
    digest = of_tensors({**clip, **start.state["student"]})
    init = {"source": str(source), "sha256": digest, "clip": "clip" in start.state}
    if recorded is not None and recorded.get("sha256") not in (None, digest):
        raise UserError(
            f"{folder}: began with other weights than those of {source} now (with "
            f"{recorded.get('source')}, SHA-256 {str(recorded['sha256'])[:12]}... there, "
            f"{digest[:12]}... now); leave --init out, or choose another folder with --out"
        )
    if before.state is not None:
        state = {key: start.state[key] for key in ("clip",) if key in start.state}
        return Stored(source, state), recorded or init
    return start, init


def _noted(note: str) -> dict | None:
    """What an older run's note of its --init says, in today's form."""
    if not note:
        return None
    return {"source": note.rsplit(": ", 1)[0], "sha256": None, "clip": False, "taken": note}


def begin(
    course: Course,
    folder: Path,
    cfg: Config,
    about: dict,
    preset: str,
    before: Begun,
    dataset: DataSet | None = None,
) -> "Run | rehearsal.Rehearsal":
    """The run in `folder`, or with --dry-run what stands in for it. about: its identity.   preset:
    that of the data set.
    """
    for line in limits(dataset, cfg) if dataset else ():
        print(f"warning: {line}")
    if dataset and cfg.magnification and ranks.rank() == 0:
        rehearsal.say("scale", scale_text(dataset, cfg))
    if course.dry_run:
        if dataset is not None:
            rehearsal.say_data(dataset, about["split"])
        return rehearsal.Rehearsal(
            folder, cfg, about, preset_of(course.preset or preset, cfg.network)
        )
    run = Run(folder, cfg, about, course.resume, before.state)
    if dataset:
        parts = {"labelled": dataset.labeled, "unlabelled": dataset.unlabeled}
        run.counts = {
            what: len(those) for what, those in {**parts, "validation": dataset.val}.items()
        }
    if course.log and ranks.rank() == 0:
        from torch.utils.tensorboard import SummaryWriter

        run.curves = SummaryWriter(folder)
    return run


def say_ablations(cfg: Config, stage: str, warm: bool = False) -> None:
    for line in ablations(cfg, stage, warm):
        print(f"warning: {line}")


def start_from(start: Stored | None, init: dict | None, method: Method, dataset: DataSet) -> None:
    """Start from another run or file, if there is something to take (`beginning`), and note in
    `init` what was taken: the student, by student and teacher alike (official code).

    Classes are joined by name; a linear class head stays random after DeWa, which knows no classes.
    """
    if start is None or "student" not in start.state:
        return
    if start.is_warm_up:
        if start.config.get("data") not in (None, dataset.train.fingerprint()):
            print(
                f"{start.path}: was warmed up on other images than the training images of this "
                f"run ({start.config.get('dataset')}), or saw them by another exposure"
            )
    elif "weights" not in start.state or start.state["weights"].kind != "dewa":
        stored.require_classes(start, len(dataset.taxonomy))
    say_other_sight(start, method.cfg)
    student = method.models["student"]
    class_rows = getattr(student, "class_rows", ())
    order = stored.class_order(start, dataset.taxonomy, dataset.name, class_rows)
    may_differ = (*class_rows, *getattr(student, "begins_anew", ()))
    what = start, "student"
    init["taken"] = stored.take(*what, student, str(start.path), may_differ, order)
    print(init["taken"])
    if "teacher" in method.models:
        stored.take(*what, method.models["teacher"], str(start.path), may_differ, order)


def say_other_sight(start: Stored, cfg: Config) -> None:
    """A warning where what a run starts from saw objects by a tenth larger or smaller, or images of
    another exposure."""
    if start.config and start.config.get("stretch", False) != cfg.stretch:
        ways = {True: "stretched", False: "as they are"}
        print(
            f"warning: {start.path}: saw images {ways[not cfg.stretch]}, this run sees them "
            f"{ways[cfg.stretch]}; expected --stretch in both, or in neither"
        )
    there = [start.config.get(name) or 0 for name in ("seen_width", "object_width")]
    if not (all(there) and cfg.magnification):
        return
    before = there[0] / there[1]
    if not 0.9 < before / cfg.magnification < 1.1:
        print(
            f"warning: {start.path}: saw images {before:.2f} times as large as they are, this run "
            f"sees them {cfg.magnification:.2f} times; for one scale say in both which images are "
            "labelled (--split), or --object-width PIXELS"
        )


def warm_up_there(
    folder: Path, source: Source, cfg: Config, course: Course, dataset: DataSet, method: str
) -> str:
    """What is missing of the DeWa run in a folder, for a run of a method that starts from it; empty
    if nothing is.

    Raises: UserError if it is of other images or of another decoder, or something is missing and
        may not be made.
    """
    state = stored.read(folder).state if checkpoint.steps(folder) else None
    taken, steps = (state.get("step"), state.get("steps")) if state else (0, cfg.dewa_steps)
    if state:
        _require_same_warm_up(folder, state["config"], cfg, course, dataset)
        masks.say_maker(course.given, cfg, state["config"].get("masks"))
        if steps is None or taken >= steps:
            return ""
    what = f"DeWa stopped at step {taken} of {steps}" if state else "no DeWa weights"
    if not course.make:
        go_on = "; --resume goes on" if state else ""
        without = ", ".join(name for name, entry in METHODS.items() if not entry.warm)
        raise UserError(
            f"{folder}: {what} for --method {method}; make them with `python dearli.py --stage "
            f"dewa --dataset {source.dataset}` (same --seed and --data-root{go_on}), or go "
            f"without: --method {without}"
        )
    return what


def _require_same_warm_up(folder: Path, config: dict, cfg: Config, course: Course, dataset) -> None:
    fields = [*DECODER, *sorted(name for name in course.given if name.startswith("dewa_"))]
    fields = [name for name in fields if name in config]
    there, now = ({name: of.get(name) for name in fields} for of in (config, vars(cfg)))
    differs = differences(there, now)
    if config.get("data") is None:
        print(f"warning: {folder}: an older DeWa run, which does not say of which images it is")
    elif config["data"] != dataset.train.fingerprint():
        other = (
            f"other training images, those of a data set called {config.get('dataset')}, or of "
            "another exposure, see --stretch"
        )
        differs = f"{other}; {differs}" if differs else other
    if differs:
        raise UserError(
            f"{folder}: a DeWa run of something else ({differs}); name the one to start from with "
            "--init, choose other folders with --runs, or delete it, and it is made anew"
        )


def require_own_results(
    folder: Path, run: Stored, source: Source, cfg: Config, dataset: DataSet
) -> None:
    """Raise UserError if results in a folder would be replaced by those of something else."""
    require_own_numbers(folder, run, cfg)
    require_own_measure(folder, run, dataset)
    if folder == run.path and elsewhere(run.config, source, dataset):
        raise UserError(
            f"{folder}: its results are of {run.config['data_root']} and would be replaced by "
            f"those of {source.data_root}, which has other training images; name a folder for the "
            "new ones with --out"
        )
    if checkpoint.steps(folder) and folder.resolve() != run.path.resolve():
        raise UserError(
            f"{folder}: holds another run, whose results would be replaced by those of "
            f"{run.path}; choose another folder with --out"
        )


def require_own_numbers(folder: Path, run: Stored, cfg: Config) -> None:
    """The same of a run's own folder and other numbers alone."""
    there = {**BEFORE, **run.config} if run.config else {}
    others = [
        f"{name} {there[name]} there, {value} now"
        for name, value in vars(cfg).items()
        if there.get(name, value) != value and name not in MAY_CHANGE
    ]
    if folder == run.path and others:
        raise UserError(
            f"{folder}: its results are of other numbers ({', '.join(others)}) and would be "
            "replaced; name a folder for the new ones with --out"
        )


def require_own_measure(folder: Path, run: Stored, dataset: DataSet) -> None:
    """The same of the figures in a folder, and another run or other validation images."""
    path = folder / "metrics.json"
    try:
        there = json.loads(path.read_text())
    except (OSError, ValueError):
        return
    for key, now in measured_by(run.config or {}, dataset).items():
        if there.get(key, now) != now and (key != "run" or folder != run.path):
            what = {"run": "another run", "validation": "other validation images, or other truth"}
            raise UserError(
                f"{path}: is of {what[key]}, and would be replaced; name another folder for "
                "the new figures with --out"
            )


def measured_by(config: dict, dataset: DataSet) -> dict[str, str]:
    """What figures are of, for metrics.json. config: of a stored run; empty: not known, or the run
    itself."""
    fixed = {key: value for key, value in config.items() if key not in MAY_CHANGE}
    run = {"run": of_text(json.dumps(fixed, sort_keys=True, default=str))} if config else {}
    return {**run, "validation": dataset.measure_fingerprint()}


def elsewhere(config: dict, source: Source, dataset: DataSet) -> bool:
    """Whether a data set is another one than that of a run: in another place, and not the same
    training images.
    """
    there = config.get("data_root")
    if not there or Path(source.data_root).resolve() == Path(there).resolve():
        return False
    indices = dataset.labeled if config.get("stage") == "sup" else None
    return config.get("data") not in (None, dataset.train.fingerprint(indices))
