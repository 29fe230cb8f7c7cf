"""A run on disk: what its folder says of itself, and the commands that make it again."""

import dataclasses
import json
import re
import shlex
from dataclasses import replace
from pathlib import Path

from config import BEFORE, METHODS, PRESETS, Config, changes
from engine import sessions
from engine.flags import READS, preset_of
from engine.idle import idle
from engine.parser import parser
from engine.resolve import data_set
from engine.run_log import read_log
from ground.errors import UserError
from inference import papers_reading
from report import watch
from report.tables import columns_of, figure

STAGES = ("dewa", "sup", *METHODS)  # in config.json: what trains
FIELDS = tuple(field.name for field in dataclasses.fields(Config))


@dataclasses.dataclass(frozen=True)
class Stored:
    """What a run folder says of itself; a file that is not there is empty."""

    folder: Path
    config: dict
    metrics: dict
    log: list[dict]
    watched: list[dict]  # PQ as training went on (`watch.py`)
    sessions: list[dict] = ()  # when and on what it was trained

    @property
    def name(self) -> str:
        return self.folder.resolve().name

    @property
    def readings(self) -> dict[str, dict]:
        return {k: v for k, v in self.metrics.items() if isinstance(v, dict) and "per_class" in v}

    @property
    def papers(self) -> str:
        """The reading that the paper takes for this method."""
        posterior = self.config.get("teacher_posterior")
        return papers_reading(posterior or usual_posterior(self.config.get("stage")))

    @property
    def reading(self) -> str | None:
        """The paper's, or what there is."""
        return self.papers if self.papers in self.readings else next(iter(self.readings), None)

    def figures(self, reading: str | None, columns=None) -> list[float | None]:
        """The figures of a reading, in the order of columns; None: those of the run."""
        columns = columns_of(self.readings.values()) if columns is None else columns
        return [figure(self.readings.get(reading), keys) for _, keys in columns]


def read(folder: Path, config: dict | None = None) -> Stored:
    """config: of a folder that has none.

    Raises: UserError if this is no folder of a run, or a file in it cannot be read.
    """
    folder = Path(folder)
    own, metrics = (_object(folder / f"{name}.json") for name in ("config", "metrics"))
    log = read_log(folder / "log.jsonl")
    if not (own or metrics or log):
        names = "config.json, metrics.json or log.jsonl"
        raise UserError(f"{folder}: holds no {names}; expected the folder of a run")
    return Stored(
        folder, own or config or {}, metrics, log, watch.read(folder), sessions.read(folder)
    )


def _object(path: Path) -> dict:
    """What a JSON file holds; empty without the file."""
    again = "delete it and evaluate again (--stage eval)"
    try:
        content = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not a readable JSON file ({error}); {again}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds a {type(content).__name__}, expected an object; {again}")
    return content


def usual_posterior(stage: str | None) -> str:
    """What makes the pseudo-labels of a method, if any; an official file is one of DEARLi."""
    if stage in METHODS:
        return METHODS[stage].numbers.get("teacher_posterior", "ensemble")
    return "decoder" if stage in STAGES else "ensemble"


def nearest_preset(config: dict) -> tuple[str, dict]:
    """The preset with the fewest other numbers, and what differs from it; what a version did not
    know yet was as it then did."""
    own, config = data_set(config), {**BEFORE, **config}
    network = config.get("network", "mask2former")
    numbers = {name: preset_of(name, network) for name in PRESETS}
    presets = sorted(PRESETS, key=lambda preset: preset != own)
    nearest = min(presets, key=lambda preset: len(changes(config, numbers[preset])))
    return nearest, changes(config, numbers[nearest])


def _data_flags(config: dict) -> list[str]:
    """The flags that name the data; of a folder of images (--images) a run knows the name only."""
    name, root = config.get("dataset", "mini"), config.get("data_root")
    if not root and name != "mini":
        return ["--images", name]
    flags = {"--dataset": data_set(config), "--data-root": root}
    flags |= {f"--{key}": config.get(key) for key in ("variant", "split")}
    return [word for flag, value in flags.items() if value for word in (flag, value)]


def commands(run: Stored, depth: int = 3) -> list[str]:
    """What remakes the run, and before it the runs that it began with.

    Precision and number of processes are not stored, and not said.
    """
    stage = run.config.get("stage")
    if stage not in STAGES:
        return []
    flags = _data_flags(run.config)
    preset = nearest_preset(run.config)[0]
    changed = _changed(stage, run.config, preset)
    if preset != data_set(run.config):
        flags += ["--preset", preset]

    def command(*words, out=("--out", run.folder)):
        words = [*words, *_numbers(words, run.config, changed), *out]
        return shlex.join(["python", "dearli.py", *map(str, words)])

    if stage == "dewa":
        masks = command("--stage", "masks", *flags, out=())
        return [masks, command("--stage", "dewa", *flags)]
    earlier = []
    if start := _beginning(run.config.get("init")):
        flags += ["--init", start]
        if depth and (Path(start) / "config.json").exists():
            earlier = commands(read(start), depth - 1)
    if run.metrics.get("evaluated_on") == "dev":
        flags += ["--eval-on", "dev"]
    return [*earlier, command("--stage", *_stage_flags(stage, run.config), *flags)]


def _changed(stage: str, config: dict, preset: str) -> dict:
    """The numbers that a command has to name: what neither preset nor method sets."""
    usual = preset_of(preset, config.get("network", "mask2former"))
    if stage in METHODS:
        usual = replace(usual, **METHODS[stage].on(preset))
    changed = changes({**BEFORE, **config}, usual)
    posterior = config.get("teacher_posterior", usual_posterior(stage))
    changed.pop("teacher_posterior", None)  # the stage has its own
    if posterior != usual_posterior(stage):
        changed["teacher_posterior"] = posterior
    if "backbone" in changed:  # its weights would follow it
        changed["pretrained"] = config["pretrained"]
    return changed


def _stage_flags(stage: str, config: dict) -> list[str]:
    """What follows --stage; a supervised run names its network, which a method implies."""
    if stage != "sup":
        return ["ssl", "--method", stage]
    network = config.get("network", "mask2former")
    return ["sup", "--network", network] if network != "mask2former" else ["sup"]


def _beginning(init) -> str | None:
    """Where a run took its first weights from. init: of config.json; older runs say it in words."""
    if isinstance(init, dict):
        return init.get("source")
    words = re.match(r"(.*?): \d+ of \d+ tensors taken", str(init))
    return words and words[1]


def _numbers(words: list, config: dict, changed: dict) -> list:
    """The numbers of `changed` that a command reads, as its flags. words: of the command so far."""
    args = parser().parse_args(list(map(str, words)))
    unused = idle(args, Config(**{key: config[key] for key in FIELDS if key in config}))
    flags = []
    for key in [key for key in changed if key in READS[args.stage] and key not in unused]:
        name, value = key.replace("_", "-"), changed[key]
        if isinstance(value, bool):
            flags.append(f"--{name}" if value else f"--no-{name}")
        else:
            flags += [f"--{name}", value]
    return flags
