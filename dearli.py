"""DEARLi from the command line: every stage of the method, and all of them on a miniature world.

    python dearli.py                  the demo: all stages on `mini`, a table, a picture
    python dearli.py --stage import --from labelme --input DIR --out NEW    annotations of tools
    python dearli.py --stage validate --dataset custom --data-root DIR      what is wrong with it
    python dearli.py --stage masks --dataset mini                           SAM's masks
    python dearli.py --stage dewa --dataset mini                            decoder warm-up on them
    python dearli.py --stage sup --dataset mini --split 16                  supervised baseline
    python dearli.py --stage ssl --dataset mini --split 16 --method dearli
    python dearli.py --stage eval --dataset mini --weights runs/mini-dearli-16
    python dearli.py --stage predict --weights runs/mini-dearli-16 --input DIR --out predictions
    python dearli.py --stage report --weights runs/mini-dearli-16 --compare runs/mini-sup-16
    python dearli.py --stage ladder --dataset mini --seeds 3                Table 1 in miniature

A stage is a function here, wiring only: its parameters are what it needs of the command line
(`engine.request`). It imports what it uses when it is called: a page of help waits for no library.
"""

import os
import sys

if sys.version_info < (3, 10):
    here = f"{sys.version.split()[0]} ({sys.executable})"
    sys.exit(f"error: Python 3.10 or newer is needed, this is {here}")

import contextlib
import dataclasses
import inspect
import io
import json

from config import METHODS
from engine.checks import check, require_there
from engine.flags import MAKES
from engine.parser import help_page, parser, show, stopped
from ground import packages
from ground.errors import UserError, choose

__version__ = "0.1.0"


# -------------------------------------------------------------------------------------------- data


def stage_prepare(source, cfg, assets):
    """The paper's data sets: check downloads, fetch partitions and names, make panoptic truth."""
    from pathlib import Path

    from config import PAPERS_DATASETS
    from readers import papers
    from tools import prepare

    choose("data set to prepare", source.dataset, PAPERS_DATASETS)
    folder = prepare.prepare(source.dataset, Path(source.data_root), assets, cfg.workers)
    dataset = papers.load(source.dataset, Path(source.data_root), "1")
    print(
        f"{folder}: ready; {len(dataset.taxonomy)} classes, {len(dataset.train)} training and "
        f"{len(dataset.val)} validation images"
    )
    return folder


def stage_import(
    input, out, source_format, background, val_share, stuff, masks_are, classes, join, cfg
):
    """Annotations of other tools, as a folder that every stage reads."""
    from tools import importer

    named = {"stuff": stuff, "masks_are": masks_are, "classes": classes, "join": join}
    settings = source_format, input, out, background, val_share, cfg.seed
    result = importer.import_folder(*settings, **named)
    print(importer.summary(result, out))
    return out


def stage_validate(source, cfg, masks, json):
    """Read the whole data set, list what it holds and all that is wrong with it. Raises UserError
    if anything is.
    """
    from tools import validate

    return validate.validate(source, cfg, masks, json)


def stage_masks(source, place, machine, cfg, dry_run):
    """SAM's masks of all training images, labelled and unlabelled alike."""
    from engine import masks

    folder = place.out or place.masks(source)
    masks.make(source, folder, machine, cfg, dry_run)
    return folder


# ---------------------------------------------------------------------------------------- training


def stage_dewa(source, place, machine, cfg, course, masks=None):
    """Decoder warm-up, L_loc on all SAM masks."""
    import dewa
    from engine.begin import as_begun, begin, begun, require_place, scaled, warm_up_identity
    from engine.masks import provided, say_maker
    from engine.stored import require_foundation
    from pretrained.segmenter import build
    from readers.mask_files import made_of
    from report.finish import finish_warm_up

    cfg = dataclasses.replace(cfg, teacher_posterior="decoder")  # there is no teacher
    folder = place.out or place.folder(source, "dewa", cfg.seed)
    images, dataset = source.load_images(cfg)
    before = begun(course, folder)
    cfg = dataclasses.replace(cfg, white=images.white, stretch=images.stretch)
    cfg = scaled(cfg, dataset)
    cfg = as_begun(course, cfg, before, "dewa_steps")

    def prepare():
        require_place(folder, course.resume)
        build(cfg, dewa.TAXONOMY, machine.device)  # its weights are asked for before hours of work

    with provided(source, place, machine, cfg, course, images, masks, prepare) as (there, those):
        made = made_of(there, images, those)
        say_maker(course.given, cfg, made)
        about = warm_up_identity(source, images, made)
        run = begin(course, folder, cfg, about, source.dataset, before)
        method = dewa.Dewa(cfg, dewa.TAXONOMY, machine.device, machine.precision)
        student = method.models["student"]
        run.config["foundation"] = require_foundation(before.config, student, folder)
        batches = method.batches(dewa.MaskedImages(images, there, those))
        run.train(method, batches)
        finish_warm_up(method, batches, folder, course, there)
    return folder


def stage_sup(source, place, machine, cfg, course, init=None, masks=None):
    """The supervised baseline: labelled images only."""
    from engine.begin import as_begun, beginning, begun, in_steps, require_training_files, settle

    kind = "sup" if cfg.network == "mask2former" else f"sup-{cfg.network}"
    folder = place.out or place.folder(source, f"{kind}-{source.split}", cfg.seed)
    before = begun(course, folder)
    dataset = source.load(cfg, config=before.config, origin=folder)
    cfg = as_begun(course, in_steps(settle(cfg, dataset), dataset), before, "sup_steps")
    require_training_files(dataset, cfg, course.evaluate)
    start, record = beginning(folder, before, init)
    about = {
        "data": dataset.train.fingerprint(dataset.labeled),
        "truth": dataset.truth_fingerprint(unlabeled=False),
        "labeled": dataset.labeled_fingerprint(),
        "init": record,
    }
    masks = masks or place.masks(source)
    train("sup", source, machine, cfg, course, folder, dataset, before, start, about, masks)
    return folder


def stage_ssl(source, place, machine, cfg, course, method="dearli", init=None, masks=None):
    """The semi-supervised stage, by one of the methods of `config.METHODS`."""
    from engine.begin import as_begun, beginning, begun, in_steps, require_training_files, settle
    from engine.checks import require_semi_supervised
    from readers.checks import require_files

    folder = place.out or place.folder(source, f"{method}-{source.split}", cfg.seed)
    before = begun(course, folder)
    dataset = source.load(cfg, config=before.config, origin=folder)
    cfg = as_begun(course, in_steps(settle(cfg, dataset), dataset), before, "ssl_steps")
    if not dataset.unlabeled:
        raise UserError(
            f"--split {source.split}: all images of {source.name} are labelled, none is left for "
            "the semi-supervised stage; choose fewer, or --stage sup"
        )
    require_training_files(dataset, cfg, course.evaluate)
    require_files(dataset.train, dataset.unlabeled, "unlabelled", maps=False)
    if METHODS[method].warm and init is None and not before.knows_init:
        init = warm_up(source, place, machine, cfg, course, dataset, folder, masks, method)
    elif METHODS[method].warm and (idle := sorted(course.given & MAKES["ssl"])):  # with --resume
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in idle)
        print(f"{folder}: goes on with the warm-up that it began with; {flags} change nothing")
    start, record = beginning(folder, before, init)
    # of a --dry-run there may be no DeWa weights yet: its steps are those of a run that has them
    warm = record is not None or METHODS[method].warm
    require_semi_supervised(cfg, warm)
    about = {
        "data": dataset.train.fingerprint(),
        "truth": dataset.truth_fingerprint(),
        "labeled": dataset.labeled_fingerprint(),
        "init": record,
    }
    masks = masks or place.masks(source)
    train(method, source, machine, cfg, course, folder, dataset, before, start, about, masks, warm)
    return folder


def train(
    name, source, machine, cfg, course, folder, dataset, before, start, about, masks, warm=False
):
    """A run of a method, from its begin to its figures. about: what it is made of;  start: what it
    starts from.
    """
    from engine.begin import begin, identity, say_ablations, start_from
    from engine.method import find
    from engine.stored import require_clip, require_foundation
    from report.finish import Pictures, finish
    from report.watch import watcher

    about = {**identity(source, name, dataset.taxonomy), **about}
    run = begin(course, folder, cfg, about, source.dataset, before, dataset)
    say_ablations(cfg, "sup" if name == "sup" else "ssl", warm)
    clip = start.state.get("clip") if start else None
    settings = cfg, dataset.taxonomy, machine.device, machine.precision, clip, warm
    method = find(name, cfg.network)(*settings)
    method.title = "supervised" if name == "sup" else name
    student = method.models["student"]
    run.config["foundation"] = require_foundation(before.config, student, folder)
    if getattr(method, "clip", None) is not None:
        run.config["clip_weights"] = require_clip(before.config, method.clip, folder)
    start_from(start, about["init"], method, dataset)
    run.watch = watcher(folder, method, dataset, course.watch if course.evaluate else 0)
    run.train(method, method.batches(dataset))
    pictures = Pictures(course.report_images, masks)
    finish(method, dataset, folder, source, course, pictures)


def warm_up(source, place, machine, cfg, course, dataset, run, masks, method):
    """The DeWa run of a method that starts from one: the one of this name, if it is of these
    images, of this decoder and finished; else it is made or goes on.

    run: the folder of who needs it.   Returns: its folder; None with --dry-run, if there is none
    that is finished.
    Raises: UserError if it is of something else, or may not be made.
    """
    from engine.begin import require_place, warm_up_there
    from engine.rehearsal import say
    from ground import ranks
    from pretrained.segmenter import build

    folder = place.folder(source, "dewa", cfg.seed)
    what = warm_up_there(folder, source, cfg, course, dataset, method)
    if not what:
        return folder
    if course.dry_run:
        say("first", f"{folder}: {what}; the warm-up would come first (--no-make forbids it)")
    else:
        require_place(run, course.resume)
        build(cfg, dataset.taxonomy, machine.device)  # asks for its weights before hours of work
        print(f"{folder}: {what}; the warm-up comes first (--no-make forbids it)")
    ranks.wait()  # all have looked before one of them writes
    steps = cfg.dewa_steps if "dewa_steps" in course.given else None
    its_course = dataclasses.replace(course, resume=True, steps=steps)
    stage_dewa(source, dataclasses.replace(place, out=None), machine, cfg, its_course, masks)
    ranks.wait()  # the last checkpoint is written by one of them, and read by all
    return None if course.dry_run else folder


# ----------------------------------------------------------------------------------------- results


def stage_eval(stored, source, place, machine, cfg, course, masks):
    """The figures of a run, or of an official file: every metric of every reading."""
    from engine.begin import require_own_results, settle
    from engine.stored import restore
    from ground.files import require_writable
    from readers.checks import require_files, require_truth
    from report.finish import Pictures, finish

    dataset = source.load(cfg, config=stored.config, origin=stored.path)
    cfg, folder = settle(cfg, dataset), results_folder(stored, place)
    require_own_results(folder, stored, source, cfg, dataset)
    require_writable(folder)
    require_truth(dataset, learn=False)
    require_files(dataset.val, range(len(dataset.val)), "validation", classes=True)
    method = restore(stored, cfg, dataset.taxonomy, machine.device, source.name)
    pictures = Pictures(course.report_images, masks or place.masks(source))
    finish(method, dataset, folder, source, course, pictures, stored.config)
    return folder


def stage_predict(
    stored, source, machine, cfg, out, input, which, posterior, palette, force, resume
):
    """A run, or an official file, applied to pictures of one's own."""
    from pathlib import Path

    from tools.predict import Pictures, predictor

    folder = out or Path("predictions")
    pictures = Pictures(input, folder, force, resume)
    done = pictures.fill(predictor(stored, source, machine, cfg, which, posterior, palette))
    print(f"{folder}: predictions of {len(pictures.names)} pictures, {done} of them made now")
    return folder


def stage_report(stored, source, place, machine, cfg, compare, masks, report_images, palette):
    """report.html of a run, beside those of --compare; without its data or weights, what can be
    said without them.
    """
    from ground.files import require_writable
    from report.finish import Pictures, report_again

    folder = results_folder(stored, place)
    require_writable(folder)
    pictures = Pictures(report_images, masks or place.masks(source))
    safe = palette == "safe"
    return report_again(stored, source, machine.device, cfg, folder, compare, pictures, safe)


def stage_zeroshot(source, place, machine, cfg, masks):
    """PQ of CLIP alone on given masks of the validation images: the true ones (Figure 3) or SAM's
    (section 3.3).
    """
    from tools import zeroshot

    folder = place.out or place.folder(
        source, f"zeroshot-{masks.name if masks else 'gt'}", cfg.seed
    )
    zeroshot.run(source, place, machine, cfg, masks, folder)
    return folder


def stage_export(stored, source, cfg, out, format, which, posterior):
    """A run, or an official file, as one file: for the official code, as safetensors or ONNX."""
    from tools import export, onnx_export

    export.require_mask2former(cfg, stored)
    if format == "onnx":
        return onnx_export.export(stored, source, cfg, out, which, posterior)
    return export.export(stored, source, cfg, out, format)


def results_folder(stored, place):
    """Where the results of a run go, or of an official file."""
    path = stored.path
    return place.out or (path if path.is_dir() else place.runs / path.stem)


# ----------------------------------------------------------------------- the paper's tables (mini)


def stage_demo(source, place, machine, cfg, course, jobs):
    """All stages on the miniature world, a table, and a picture of what each rung sees."""
    from engine.begin import settle
    from engine.stored import read, restore
    from ground.files import require_writable
    from report import tables
    from tools import ladder

    ladder.require_rungs(cfg, ladder.RUNGS)
    top = place.out or place.runs
    require_writable(top)
    # two rows read the same run; the picture is of the first
    rungs = {rung.run: rung for rung in reversed(ladder.SHOWN)}
    rungs = dict(reversed(rungs.items()))
    tasks = [(rung, cfg) for rung in rungs.values()]
    metrics = ladder.run_rungs(trainer(source, place, machine, course), tasks, jobs)
    metrics = dict(zip(rungs, metrics))
    rows = [(rung.title, metrics[rung.run][rung.reading]) for rung in ladder.SHOWN]
    print("\n" + tables.table(rows))
    dataset, methods = source.load(cfg), []
    cfg = settle(cfg, dataset)
    for rung in rungs.values():
        stored = read(rung.folder(place, source, cfg))
        method = restore(stored, cfg, dataset.taxonomy, machine.device, source.name)
        title = "supervised" if rung.kind == "sup" else rung.title
        methods.append((title, method, rung.reading))
    ladder.picture(methods, dataset, top / "demo.png")
    page = ladder.SHOWN[-1].folder(place, source, cfg) / "report.html"
    print(f"{page}: open it in a browser, for the figures, curves and pictures of DEARLi")
    return top / "demo.png"


def stage_ladder(source, place, machine, cfg, course, method, seeds, jobs):
    """The paper's Table 1 in miniature, or that of another method."""
    from tools.ladder import ladder, table

    train = trainer(source, place, machine, course)
    return table(*ladder(method, source.dataset), train, cfg, seeds, jobs)


def stage_alpha(source, place, machine, cfg, course, seeds, jobs):
    """The paper's Table 8 in miniature, and an alpha that changes (supplement C)."""
    from tools.ladder import ALPHAS, table

    return table(ALPHAS, "alpha", trainer(source, place, machine, course), cfg, seeds, jobs)


def trainer(source, place, machine, course):
    """What trains the rungs of a table, by the stages above."""
    from tools.ladder import Trainer

    return Trainer(source, place, machine, course, stage_sup, stage_ssl, warm_up)


def stage_mini_clip(out, cfg):
    """Train the miniature CLIP anew."""
    from mini import mini_clip

    mini_clip.train(out or mini_clip.WEIGHTS, seed=cfg.seed)


def stage_mini_sam(out, cfg):
    """Train the miniature SAM anew."""
    from mini import mini_sam

    mini_sam.train(out or mini_sam.WEIGHTS, seed=cfg.seed)


# -------------------------------------------------------------------------------- the command line


def main(argv: list[str] | None = None) -> int:
    """Run one stage; returns the exit code: 0, 2 after an error that the user can mend, 128 +
    signal after a stop.
    """
    args = None
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a name that a console cannot show stops no run
            stream.reconfigure(errors="backslashreplace")
    try:
        args = parser().parse_args(argv)
        if args.help or args.version:
            show(help_page(args) if args.help else packages.version(__version__))
            return 0
        said = args.method
        check(args)
        if not args.print_config:
            require_there(args)
        if args.stage == "ssl" and said is None and args.method != "dearli" and rank() == "":
            kind = "a linear classifier" if args.method == "ssl" else "--labels instances"
            print(
                f"--method {args.method}: the default for --dataset {args.dataset} with {kind}; "
                "others are named with --method"
            )
        return run(args)
    except UserError as error:
        print(f"{rank()}error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(stopped(args), file=sys.stderr)
        return 130
    except ModuleNotFoundError as error:
        advice = packages.missing(error.name, args.stage)
        if advice is None:
            raise
        print(f"error: {advice}", file=sys.stderr)
        return 2


def run(args) -> int:
    """Do what the command line asks for; returns the exit code. Raises: UserError."""
    from engine.resolve import resolve
    from engine.training import Stopped
    from ground import ranks

    try:
        request = resolve(args)
        if args.print_config:
            show(json.dumps(dataclasses.asdict(request["cfg"]), indent=1))
            return 0
        with contextlib.redirect_stdout(sys.stdout if first_rank() else io.StringIO()):
            call(args.stage, request)
        ranks.stop()
    except Stopped as stop:
        print(stop, file=sys.stderr)
        return stop.code
    return 0


def call(stage: str, request: dict):
    """A stage with what its parameters ask for. request: as `engine.resolve.resolve` returns."""
    function = globals()[f"stage_{stage.replace('-', '_')}"]
    return function(**{name: request[name] for name in inspect.signature(function).parameters})


def first_rank() -> bool:
    from ground import ranks

    return ranks.rank() == 0


def rank() -> str:
    """Which process of several an error is of, as torchrun says; empty for the first."""
    number = os.environ.get("RANK", "0")
    return "" if number == "0" else f"rank {number}: "


def load(weights, **flags):
    """A run, or an official file, as a function of images, a `tools.predict.Predictor`.

    flags: those of the command line, as `which="teacher", device="cpu"`.
    """
    from engine.resolve import resolve_load
    from tools.predict import predictor

    request = resolve_load(weights, flags)
    names = inspect.signature(predictor).parameters
    return predictor(**{name: request[name] for name in names})


if __name__ == "__main__":
    sys.exit(main())
