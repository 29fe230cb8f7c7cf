"""The parser of the command line, and what it says: pages of help, and hints for unknown flags.

`--help` is one screen; `--stage NAME --help` has all flags of a stage, and of the numbers of Config
those that it reads, with the comments beside them (`numbers`). Imports no library.
"""

import argparse
import dataclasses
import inspect
import os
import re
import sys
import textwrap

from config import ALIASES, METHODS, PRESETS, Config, dashed
from engine import flags
from engine.flags import ALL, DATASETS, FLAGS, STAGES, STORED, reads, rows
from ground.errors import UserError, choose, nearest

WIDTH = 110  # characters of a help page
# Names that other programs have for a flag, where the nearest name here would mislead: what it is.
_HINTS = """
batch-size bs batch: it is --labeled-batch and --unlabeled-batch, --dewa-batch in the warm-up,
    --eval-batch at evaluation
epoch num-epochs max-epochs: it is --steps N, optimiser steps, or --epochs N over the unlabelled
    images
iters iterations num-iters max-iter max-iters max-steps: it is --steps N, optimiser steps
learning-rate lr-rate base-lr: it is --lr
gpu gpus cuda gpu-id gpu-ids num-gpus devices: it is --device cuda, or cuda:N for one of several;
    for all of them torchrun --nproc_per_node=N dearli.py ...
num-workers j: it is --workers N, loader processes
checkpoint ckpt model: it is --weights of a run that is applied, --init of one to start from
resume-from continue: it is --resume, which goes on with the run in --out or in its usual folder;
    --init FOLDER starts another one from it
load-from load pretrain: it is --init FOLDER, a run or file to start from; --pretrained is of the
    backbone
config cfg config-file: there is no file of settings: --preset NAME and flags; --print-config
    shows all numbers
data data-dir data-path root: it is --data-root DIR, with --dataset NAME
output-dir out-dir work-dir save-dir: it is --out DIR, or --runs DIR for the folder above it
image-size img-size imgsz size: it is --crop in training and --test-size at evaluation
amp fp16 mixed-precision: it is --precision bf16
wandb tensorboard: it is --log tensorboard, or the lines of log.jsonl in the run's folder
threads num-threads: it is the variable OMP_NUM_THREADS
"""
_ROWS = [row.split(": ", 1) for row in rows(_HINTS)]
HINTS = {name: words for names, words in _ROWS for name in names.split()}


class Parser(argparse.ArgumentParser):
    """One that raises UserError, names the nearest flag, and has our pages as its help.

    bare: the same parser without defaults. What it finds is what was said, be it the default:
        `flags` of the result.
    """

    bare: "Parser | None" = None

    def error(self, message: str):
        raise UserError(message.replace("argument ", "", 1))

    def parse_args(self, args=None, namespace=None):
        parsed, unknown = self.parse_known_args(args, namespace)
        said = vars(self.bare.parse_known_args(args)[0]) if self.bare else ()
        parsed.flags = frozenset(said)
        if unknown and unknown[0].startswith("-"):
            known = [option for action in self._actions for option in action.option_strings]
            raise UserError(
                f"unknown flag '{unknown[0]}'{hint(unknown[0], known)}; --help lists the stages, "
                "--stage NAME --help the flags of one"
            )
        if unknown:
            raise UserError(f"'{unknown[0]}': expected a flag such as --stage; --help lists them")
        return parsed


def parser() -> Parser:
    """Of all flags and all numbers; what a stage does not know is for `checks.check` to say."""
    whole = _parser()
    whole.bare = _parser()
    for action in whole.bare._actions:
        action.default = argparse.SUPPRESS
    return whole


def _parser() -> Parser:
    made = Parser(prog="dearli.py", add_help=False, allow_abbrev=False)
    made.add_argument("-h", "--help", action="store_true")
    made.add_argument("--version", action="store_true")
    made.add_argument("--stage", default="demo")
    for flag in FLAGS:
        flag.add_to(made)
    for field in dataclasses.fields(Config):
        if field.type is bool:
            options = {"action": argparse.BooleanOptionalAction}
        else:
            options = {"type": field.type if isinstance(field.type, type) else number_or_text}
        made.add_argument(dashed(field.name), default=None, **options)
    return made


def number_or_text(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


def hint(unknown: str, known: list[str]) -> str:
    """To append to an error about a flag that there is not: what does its work here, or the nearest
    name; empty if there is neither."""
    asked = unknown.split("=")[0]
    name = asked.lstrip("-").lower().replace("_", "-")
    if f"--{name}" in known:
        return f" (did you mean --{name}?)"
    return f" ({HINTS[name]})" if name in HINTS else nearest(asked, known)


def help_page(args: argparse.Namespace) -> str:
    """For `--help`: of the stage, if one is given."""
    if args.stage == "demo":
        return overview()
    choose("stage", args.stage, ALL)
    dataset = choose("data set", ALIASES.get(args.dataset, args.dataset), DATASETS)
    return stage_page(args.stage, PRESETS[choose("preset", args.preset or dataset, PRESETS)])


def overview() -> str:
    """What `--help` says: one screen."""
    rows = [
        f"  {group if k == 0 else '':<10} {name:<10} {line}"
        for group, stages in STAGES.items()
        for k, (name, line) in enumerate(stages.items())
    ]
    datasets = f"\n{22 * ' '}".join(textwrap.wrap(", ".join(DATASETS), WIDTH - 22))
    return OVERVIEW.format(stages="\n".join(rows), datasets=datasets).strip()


OVERVIEW = """
DEARLi: semi-supervised panoptic segmentation with few labelled images

  python dearli.py [--stage STAGE] [flags]            without any flag: the demo

{stages}

  --dataset NAME      {datasets}
                      (mini: nothing to download)
  --data-root DIR     the folder of any other data set (datasets/NAME)
  --split N           labelled images: a number, a partition's name, all, or a file of image names
  --out DIR           where the result goes (RUNS/DATASET-STAGE-SPLIT)
  --device, --seed, --workers, --resume, --dry-run; all numbers of the method: --lr 3e-4 --alpha 0.5

  python dearli.py --stage ssl --help                 all flags of a stage, with units and defaults
  python dearli.py --stage ssl --print-config         the numbers of a run
  python dearli.py --stage ssl --dry-run              its time and memory, before it begins
  python dearli.py --version                          of this program, Python and torch
"""


def stage_page(stage: str, preset: Config) -> str:
    """What `--stage NAME --help` says. preset: whose numbers are the defaults."""
    lines = [f"python dearli.py --stage {stage} [flags]"]
    lines += [f"  {stages[stage]}" for stages in STAGES.values() if stage in stages] + [""]
    texts = flag_texts()
    for flag in FLAGS:
        if stage in flag.stages:
            default = None if isinstance(flag.default, bool) else flag.default
            lines += _row(f"--{flag.name}", texts[flag.name], default)
    usual = "the run's" if stage in STORED else ""
    for title, fields in numbers().items():
        read = [(name, text) for name, text in fields if name in reads(stage)]
        lines += ["", title] * bool(read)
        for name, text in read:
            lines += _row(dashed(name), text, usual or getattr(preset, name))
    return "\n".join(lines)


def flag_texts() -> dict[str, str]:
    """The flags with their choices and the comments below them."""
    texts = {flag.name: ", ".join(flag.choices) for flag in FLAGS}
    texts["method"] = "; ".join(f"{name}: {method.help}" for name, method in METHODS.items())
    for line in inspect.getsource(flags).splitlines():
        if row := re.match(r'    Flag\("([\w-]+)"', line):
            name = row[1]
        elif more := re.match(r"    #    (.*)", line):
            texts[name] = f"{texts[name]} {more[1]}".strip()
    return texts


def numbers() -> dict[str, list[tuple[str, str]]]:
    """The fields of Config with the comments beside them, by the comment above each section."""
    sections: dict[str, list[tuple[str, str]]] = {}
    for line in inspect.getsource(Config).splitlines():
        if section := re.match(r"    # (\S.*)", line):
            sections[section[1]] = fields = []
        elif field := re.match(r"    (\w+): .*?  *# (.*)", line):
            fields.append((field[1], field[2]))
        elif more := re.match(r"    #  +(.*)", line):
            fields[-1] = (fields[-1][0], f"{fields[-1][1]} {more[1]}")
    return sections


def _row(name: str, text: str, default) -> list[str]:
    """A flag, what it says, and its default unless that is nothing or said already."""
    nothing = default is None or default is False or default in ((), "")
    if not nothing and f"({default}" not in text:
        text += f" [{'yes' if default is True else default}]"
    first, *rest = textwrap.wrap(text, WIDTH - 28)
    return [f"  {name:<25} {first}", *(f"  {'':<25} {line}" for line in rest)]


def show(page: str) -> None:
    """Print a page, of which whoever reads it may have enough before its end (`| head`)."""
    try:
        print(page, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


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
