"""The masks that a warm-up learns from: found, checked against what is asked for, or made first."""

import contextlib
import tempfile
from pathlib import Path

import numpy as np
import torch

from config import Config
from engine import rehearsal
from engine.request import Course, Machine, Place, Source
from ground import files, ranks
from ground.errors import UserError
from ground.identity import differences
from pretrained import foundation
from readers import mask_files


def make(
    source: Source, folder: Path, machine: Machine, cfg: Config, dry_run: bool = False
) -> None:
    """SAM's masks of all training images, labelled and unlabelled alike; what is there already
    stays.
    """
    images, _ = source.load_images(cfg)
    if dry_run:
        generator = foundation.load_sam(cfg, machine.precision)(machine.device)

        def segment(k):
            return generator.generate(np.asarray(images.image(k)))

        rehearsal.say_repeated("masks", len(images), segment, 1)
        rehearsal.say_memory(machine.device)
        return
    files.require_writable(folder)
    generator = foundation.load_sam(cfg, machine.precision)(machine.device)
    done = mask_files.generate_masks(images, generator, folder)
    print(f"{folder}: masks of {len(images)} images, {done} of them made now")


@contextlib.contextmanager
def provided(
    source: Source,
    place: Place,
    machine: Machine,
    cfg: Config,
    course: Course,
    images,
    masks: Path | None,
    prepare,
):
    """SAM's masks of all images: the folder, and the indices of the images that it holds masks of.
    Those that are missing are made first, with the numbers of this run.

    masks: --masks; None: beside the images (as in SA-1B), or RUNS/DATASET-masks. Folders of
    somebody's own are not added to. prepare(): called before any are made: what else the run needs
    is asked for before hours of work. With --dry-run a few are made, in a folder that does not
    stay, and it is said how long all of them would take.
    Raises: UserError if masks are missing and may not be made.
    """
    beside = source.images and mask_files.mask_file(source.images, images.name(0)).exists()
    folder = masks or (source.images if beside else place.masks(source))
    missing = mask_files.missing_masks(folder, images)
    ranks.wait()  # all have looked before one of them writes
    own, none = masks or beside, len(missing) == len(images)
    what = "no SAM masks"
    if missing and not none:
        what += f" of {len(missing)} of {len(images)} images ({images.name(missing[0])})"
    if missing and (none if own else not course.make):
        out = f" --out {folder}" if masks else ""
        raise UserError(
            f"{folder}: {what}; make them with --stage masks{out}, or name their folder with "
            "--masks DIR"
        )
    if missing and own:
        print(f"warning: {folder}: {what}; a step that takes such an image will end the run")
    elif missing and course.dry_run:
        rehearsal.say("first", f"{folder}: {what}; they would be made first (--no-make forbids it)")
        with _tried(images, missing, machine, cfg) as scratch:
            yield scratch, missing[:2]  # those that were tried
        return
    elif missing:
        prepare()
        print(f"{folder}: {what}; they are made first (--no-make forbids it)")
        make(source, place.masks(source), machine, cfg)
    yield folder, range(len(images))


@contextlib.contextmanager
def _tried(images, missing: list[int], machine: Machine, cfg: Config):
    """A folder with masks of the first few of the missing images, which does not stay."""
    generator = foundation.load_sam(cfg, machine.precision)(machine.device)
    with tempfile.TemporaryDirectory() as scratch:

        def segment(k):
            mask_files.segment(images, missing[k], generator, Path(scratch))

        rehearsal.say_repeated("masks", len(missing), segment, 1)
        yield Path(scratch)


def say_maker(given: frozenset[str], cfg: Config, made: dict | None) -> None:
    """Masks that are there count, whatever made them, unless the command line asks for others.

    given: fields of Config that it names.   made: of `mask_files.made_of`.
    Raises: UserError if they were made with another value of a flag that is given.
    """
    if made is None:
        return
    there, folder = made["generator"], made["folder"]
    if there is None:
        print(f"{folder}: these masks do not say what made them; taken as they are")
        return
    now = dict(foundation.mask_settings(cfg))
    if "sam_weights" in given and now["kind"] == "sam":
        now["weights"] = foundation.load_sam(cfg)(torch.device("cpu")).about["weights"]
    differs = [key for key in now if there.get(key) != now[key]]
    asked = set(given)
    asked |= {"kind"} if "sam" in given else set()
    asked |= {"weights"} if "sam_weights" in given else set()
    wrong = [key for key in differs if key in asked]
    shown = wrong or differs
    text = differences(*({k: made[k] for k in shown if k in made} for made in (there, now)))
    if wrong:
        raise UserError(
            f"{folder}: masks made with other settings ({text}); without these flags they are "
            "taken as they are; for others name another folder with --masks, made by --stage "
            "masks --out, or delete this one"
        )
    if differs:
        print(
            f"{folder}: masks made with other settings than the preset's ({text}); taken as they "
            "are"
        )
