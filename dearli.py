"""DEARLi from the command line: every stage of the method, and the whole of it on a miniature world.

    python dearli.py                                                    the demo: all stages on `mini`, a table, a picture
    python dearli.py --stage import --from labelme --input DIR --out NEW   annotations of other tools as a data set of one's own
    python dearli.py --stage validate --dataset custom --data-root DIR  read a whole data set, list what it holds and all that is wrong
    python dearli.py --stage masks --dataset mini                       SAM's masks of all training images
    python dearli.py --stage dewa --dataset mini                        decoder warm-up on them
    python dearli.py --stage sup --dataset mini --split 16              supervised baseline
    python dearli.py --stage ssl --dataset mini --split 16 --method dearli
    python dearli.py --stage eval --dataset mini --weights runs/mini-dearli-16
    python dearli.py --stage predict --weights runs/mini-dearli-16 --input DIR --out predictions      a run applied to pictures
    python dearli.py --stage report --weights runs/mini-dearli-16       its page anew: report.html; --compare runs/A runs/B puts others beside it
    python dearli.py --stage ladder --dataset mini --seeds 3            the paper's Table 1 in miniature; `alpha`: its Table 8

The stages themselves are in `stages.py`, which is imported when the command line is sound: a page of help and a refusal wait for no library.
"""

import importlib.metadata
import os
import sys

from engine.checks import check, require_there
from engine.parser import help_page, parser, stopped
from ground.errors import UserError

if sys.version_info < (3, 10):
    here = f"{sys.version.split()[0]} ({sys.executable})"
    sys.exit(f"error: Python 3.10 or newer is needed, this is {here}")

__version__ = "0.1.0"
PACKAGES = {
    "open_clip": "open_clip_torch>=2.30",
    "timm": "timm>=1.0.12",
    "segment_anything": "segment-anything>=1.0",
    "huggingface_hub": "huggingface_hub",
    "tensorboard": "tensorboard",
    "pycocotools": "pycocotools>=2.0.7",
}

# Of every stage.
REQUIRED = ("torch", "torchvision", "numpy", "PIL", "scipy", "tqdm", "safetensors")


def main(argv: list[str] | None = None) -> int:
    """Run one stage; returns the exit code: 0, 2 after an error that the user can mend, 128 + signal after a stop."""
    args = None
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a name that a console cannot show stops no run
            stream.reconfigure(errors="backslashreplace")
    try:
        args = parser().parse_args(argv)
        if args.help:
            print(help_page(args))
            return 0
        if args.version:
            print(version())
            return 0
        said = args.method
        check(args)
        if not args.print_config:
            require_there(args)
        if args.stage == "ssl" and said is None and args.method != "dearli" and rank() == "":
            print(
                f"--method {args.method}: the default for --dataset {args.dataset} with a linear "
                "classifier; others are named with --method"
            )
        from engine import stages

        return stages.run(args)
    except UserError as error:
        print(f"{rank()}error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(stopped(args), file=sys.stderr)
        return 130
    except ModuleNotFoundError as error:
        if error.name in REQUIRED:
            print(
                f"error: {error.name} is not installed for {sys.executable}; activate the "
                "environment that the README makes (source .venv/bin/activate), or make it: "
                "python3 -m venv .venv && .venv/bin/python -m pip install -r requirements.txt",
                file=sys.stderr,
            )
            return 2
        if error.name not in PACKAGES:
            raise
        print(
            f"error: {error.name} is not installed, and --stage {args.stage} needs it; python -m pip install '{PACKAGES[error.name]}'",
            file=sys.stderr,
        )
        return 2


def version() -> str:
    """This program, Python and the libraries that decide on results; none of them is imported."""
    found = [f"dearli {__version__}", f"python {sys.version.split()[0]}"]
    for package in ("torch", "torchvision"):
        try:
            found.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            found.append(f"{package} not installed")
    return ", ".join(found)


def rank() -> str:
    """Which process of several an error is of, as torchrun says; empty for the first."""
    number = os.environ.get("RANK", "0")
    return "" if number == "0" else f"rank {number}: "


def load(weights, **flags):
    """A run, or an official file, as a function of images, a `predict.Predictor`. flags: those of the command line, as `which="teacher", device="cpu"`."""
    from engine import stages

    return stages.load(weights, **flags)


if __name__ == "__main__":
    sys.exit(main())
