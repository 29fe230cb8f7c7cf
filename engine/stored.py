"""A run, or a file of the official code, as it is stored: what it says of itself, and its weights
in a method.

What is stored is compared by name and by content, never by place: classes by their names, a frozen
backbone by the SHA-256 of its weights.
"""

import contextlib
import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from config import Config
from engine import checkpoint
from engine.checkpoint import state_of
from engine.method import Method, find
from engine.request import Source, classes_of
from ground import tensor_files
from ground.errors import UserError
from ground.identity import of_tensors
from mini.scenes import mini_taxonomy
from pretrained import official
from readers.ground_truth import Taxonomy


@dataclass(frozen=True)
class Stored:
    """path: a run folder or a file.   state: {"student" and / or "teacher": weights, "config"; of
    official files "clip", "weights"}; of a run whose checkpoints are gone its configuration
    alone."""

    path: Path
    state: dict = field(default_factory=dict)

    @property
    def config(self) -> dict:
        return self.state.get("config", {})

    @property
    def method(self) -> type[Method]:
        """The class of its method; official files are DEARLi's."""
        return find(self.config.get("stage", "dearli"), self.network)

    @property
    def network(self) -> str:
        return self.config.get("network", "mask2former")

    @property
    def no_object(self) -> int:
        """Rows of a class head beside those of the classes."""
        return int(self.network == "mask2former")

    @property
    def is_warm_up(self) -> bool:
        return self.config.get("stage") == "dewa"

    @property
    def names(self) -> list[str]:
        """Of the models that are there."""
        return [name for name in ("student", "teacher") if name in self.state]

    def taxonomy(self, source: Source, cfg: Config) -> Taxonomy:
        """Its classes; official files and older runs store none: then those of the data set."""
        if self.config.get("taxonomy") is not None:
            return Taxonomy.from_config(self.config["taxonomy"], self.path)
        if source.dataset == "mini":
            return mini_taxonomy()
        try:
            return source.load(cfg).taxonomy
        except UserError as error:
            raise UserError(
                f"{self.path}: does not store its classes, so they are read from the data set "
                f"(--dataset, --data-root): {error}"
            ) from None


def read(path: Path | None) -> Stored:
    """A run's newest checkpoint, or an official or exported file. Raises: UserError if it is
    neither.
    """
    if path is None:
        raise UserError(
            "this stage needs --weights runs/NAME, or a checkpoint of the official code"
        )
    if Path(path).is_dir():
        state = checkpoint.newest(path)
        if state is None:
            raise UserError(f"{path}: no checkpoint (step_*.pt) in this folder")
        return Stored(path, require_run(state, path))
    weights = official.read(path)
    if weights is None:
        return Stored(path, require_run(tensor_files.load(path), path))
    print(f"{path}: {weights.summary()}")
    return Stored(path, {"student": weights.head, "clip": weights.clip, "weights": weights})


def written_config(folder: Path) -> dict:
    """config.json of a run folder; empty if there is none that can be read."""
    with contextlib.suppress(OSError, ValueError):
        config = json.loads((Path(folder) / "config.json").read_text())
        return config if isinstance(config, dict) else {}
    return {}


def require_run(state: dict, source: Path) -> dict:
    """The state, if it is one that a run has saved; UserError otherwise."""
    models = [state[name] for name in ("student", "teacher") if name in state]
    config = state.get("config")
    if not models or not isinstance(config, dict) or not all(map(_are_weights, models)):
        raise UserError(
            f"{source}: neither a checkpoint of a run (with config, and the weights of student or "
            "teacher) nor one of the official code"
        )
    require_config(config, source)
    return state


def _are_weights(model) -> bool:
    return isinstance(model, dict) and all(
        isinstance(name, str) and isinstance(value, torch.Tensor) for name, value in model.items()
    )


def require_config(config: dict, source: Path) -> dict:
    """The configuration, if its numbers are of the types that `Config` has; UserError otherwise."""
    for number in dataclasses.fields(Config):
        value, kind = config.get(number.name, number.default), type(number.default)
        kinds = {float, int} if kind is float else {kind}
        if type(value) not in kinds | ({str} if number.name == "alpha" else set()):
            raise UserError(
                f"{source}: its config has {number.name} = {value!r:.60}, expected {kind.__name__}"
            )
    return config


def restore(stored: Stored, cfg: Config, taxonomy: Taxonomy, device, name: str) -> Method:
    """A method with the weights of a run or file in it, of those models that it stores. name: of
    the data set.
    """
    if not stored.names:
        raise UserError(f"{stored.path}: no checkpoint (step_*.pt) in this folder")
    warm = bool(stored.config.get("init"))
    method = stored.method(cfg, taxonomy, device, clip=clip_of(stored), warm=warm)
    require_foundation(stored.config, method.models["student"], stored.path)
    require_classes(stored, len(taxonomy))
    order = class_order(stored, taxonomy, name, _class_rows(method.models["student"]))
    method.models = {key: model for key, model in method.models.items() if key in stored.state}
    for key, model in method.models.items():
        take(stored, key, model, f"{stored.path} ({key})", order=order)
    return method


def clip_of(stored: Stored) -> dict | None:
    """The CLIP that it brings along: an official file its own; a run that began with such a file,
    which stores no frozen CLIP, that of the file."""
    init = stored.config.get("init")
    if "clip" in stored.state or not (isinstance(init, dict) and init.get("clip")):
        return stored.state.get("clip")
    try:
        return read(Path(str(init.get("source")))).state.get("clip")
    except UserError as error:
        raise UserError(
            f"{stored.path}: began with {init.get('source')}, and needs the CLIP that is in it: "
            f"{error}"
        ) from None


def require_foundation(config: dict, model: torch.nn.Module, source) -> str:
    """SHA-256 of what of a model is not trained, its CLIP's image tower as a rule, which no
    checkpoint stores.

    config: of a run, which says which it had.   Raises: UserError if that was another.
    """
    trained, everything = state_of(model), model.state_dict()
    frozen = {
        n.removeprefix("backbone."): everything[n] for n in everything.keys() - trained.keys()
    }
    what = f"{source}: was trained on a backbone", "--pretrained"
    return _require_same(config.get("foundation"), of_tensors(frozen), *what)


def require_clip(config: dict, clip: torch.nn.Module, source) -> str:
    """The same of a second CLIP, which pseudo-labels ask."""
    what = f"{source}: asked a CLIP", "--clip-pretrained"
    return _require_same(config.get("clip_weights"), of_tensors(clip.state_dict()), *what)


def _require_same(there: str | None, now: str, what: str, flag: str) -> str:
    """The digest now, unless there was another."""
    if there not in (None, now):
        raise UserError(
            f"{what} of other weights (SHA-256 {str(there)[:12]}... there, {now[:12]}... now): "
            f"name the file that it had with {flag}, or choose another folder with --out"
        )
    return now


def require_classes(stored: Stored, expected: int) -> None:
    """Raise if an official file says that it was trained on another number of classes (a language
    head would not notice).
    """
    count = stored.state["weights"].num_classes if "weights" in stored.state else None
    if count not in (None, expected):
        raise UserError(
            f"{stored.path}: trained on {count} classes, the data set has {expected}; choose the "
            "data set it belongs to"
        )


def class_order(
    stored: Stored, taxonomy: Taxonomy, here: str, class_rows: tuple[str, ...] = ()
) -> np.ndarray | None:
    """The place of every class of `taxonomy` among those that the weights were trained on.

    None if these do not say, or know no classes.   here: name of the data set.   class_rows: of the
    model.
    Raises: UserError if they are other classes, or (of older runs) another number of them.
    """
    if "weights" in stored.state or stored.is_warm_up:  # official files: `require_classes`
        return None
    trained_on = classes_of(stored.config, stored.path)
    if trained_on is not None:
        return taxonomy.order_in(trained_on, here, str(stored.path))
    for which in stored.names:
        for name in class_rows:
            value = stored.state[which].get(name)
            if value is not None and len(value) != len(taxonomy) + stored.no_object:
                there = len(value) - stored.no_object
                raise UserError(
                    f"{stored.path}: trained on {there} classes, {here} has {len(taxonomy)}; "
                    "choose the data set it belongs to"
                )
    print(
        f"warning: {stored.path}: an older run, which does not store the names of its classes; "
        f"make sure that they are those of {here}, in that order"
    )
    return None


def take(stored: Stored, which: str, model, source: str, may_differ=(), order=None) -> str:
    """Weights of the student or the teacher into a model; a backbone that came with its whole CLIP
    is in it already.

    may_differ: parts of names that may be missing or of another shape.   order: of `class_order`:
    the rows of a linear class head follow it, no-object stays the last one.   Returns: a line that
    says what was taken.
    """
    if which not in stored.state:
        raise UserError(f"{source}: holds no {which}")
    into = state_of(model)
    if "clip" in stored.state:
        into = {name: value for name, value in into.items() if name.startswith("head.")}
    weights = dict(stored.state[which])
    for name in _class_rows(model) if order is not None else ():
        # of another length it says itself that it does not fit
        if name in weights and len(weights[name]) == len(order) + stored.no_object:
            weights[name] = weights[name][[*order.tolist(), *[len(order)] * stored.no_object]]
    return checkpoint.load_weights(into, weights, source, may_differ)


def _class_rows(model: torch.nn.Module) -> tuple[str, ...]:
    """Names in its state of what has a row a class, and no-object last."""
    return getattr(model, "class_rows", ())
