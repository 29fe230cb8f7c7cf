"""Optimisers and schedules, by the names that the configuration gives them, and a step down the
gradients.

Source: the official training scripts: AdamW with Mask2Former's parameter groups, poly schedule,
clipping of the whole gradient. Norm layers and nn.Embedding weights have no weight decay; bare
parameters (logit_scale, level_embed of the pixel decoder) do. A trained backbone learns at a
fraction of the rate. The rise of the learning rate (--lr-warmup) is not theirs; the preset `custom`
alone has it.
Try: `python dearli.py --stage sup --steps 250 --clip-norm 1000000 --out runs/try-clip`: no
clipping, which AdamW makes up for.
"""

import math

import torch
from torch import Tensor, nn

from config import Config, shares_of
from ground import ranks


def build_optimizer(model: nn.Module, cfg: Config) -> torch.optim.Optimizer:
    """The optimiser that `cfg.optimizer` names, over the parameters of `model` that require
    gradients; each group keeps its own `lr_factor` of the schedule.
    """
    groups: dict[tuple[float, float], list[Tensor]] = {}
    for module_name, module in model.named_modules():
        for param in module.parameters(recurse=False):
            if not param.requires_grad:
                continue
            exempt = isinstance(module, (nn.LayerNorm, nn.GroupNorm, nn.Embedding))
            factor = cfg.backbone_lr_multiplier if module_name.startswith("backbone") else 1.0
            groups.setdefault((factor, 0.0 if exempt else cfg.weight_decay), []).append(param)
    parts = [
        {"params": params, "lr": cfg.lr * factor, "lr_factor": factor, "weight_decay": decay}
        for (factor, decay), params in groups.items()
    ]
    return OPTIMIZERS[cfg.optimizer](parts, cfg)


def adamw(groups: list[dict], cfg: Config) -> torch.optim.AdamW:
    return torch.optim.AdamW(groups, lr=cfg.lr, fused=True)


def sgd(groups: list[dict], cfg: Config) -> torch.optim.SGD:
    return torch.optim.SGD(groups, lr=cfg.lr, momentum=cfg.momentum)


def poly(step: int, steps: int, cfg: Config) -> float:
    """Share of cfg.lr at a step, from 0: (1 - t / steps) ** power."""
    return (1 - step / steps) ** cfg.poly_power


def multistep(step: int, steps: int, cfg: Config) -> float:
    """Share of cfg.lr at a step, from 0: a tenth of it after each of `milestones`."""
    passed = [share for share in shares_of(cfg.milestones) if step >= round(share * steps)]
    return 0.1 ** len(passed)


# By the names that `engine.ranges.CHOICES` lists.
OPTIMIZERS = {"adamw": adamw, "sgd": sgd}
SCHEDULES = {"poly": poly, "multistep": multistep}


def set_lr(optimizer: torch.optim.Optimizer, step: int, steps: int, cfg: Config) -> float:
    """Set the learning rate of step t, from 0, by the schedule of `cfg.schedule`; returns it. In
    the first `cfg.lr_warmup` of the steps it is (t + 1) / (their number) of that.
    """
    rise = cfg.lr_warmup * steps
    lr = cfg.lr * SCHEDULES[cfg.schedule](step, steps, cfg)
    lr *= min((step + 1) / rise, 1.0) if rise else 1.0
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_factor"]
    return lr


def descend(optimizer: torch.optim.Optimizer, cfg: Config) -> float:
    """One step down the gradients, summed over ranks, whose total L2 norm is clipped. Returns the
    norm before clipping.

    Raises: NotFinite if that norm is not, with weights and optimiser untouched: clipped, an
        infinite gradient is NaN; Broken if the step itself left a weight that is not finite.
    """
    params = [p for group in optimizer.param_groups for p in group["params"]]
    ranks.add_gradients(params)
    norm = float(nn.utils.clip_grad_norm_(params, cfg.clip_norm))
    if not math.isfinite(norm):
        raise NotFinite(f"norm of the gradient is {norm}")
    optimizer.step()
    if not torch.isfinite(torch.stack(torch._foreach_norm(params))).all():
        raise Broken("the step made weights infinite or NaN")
    return norm


class NotFinite(ArithmeticError):
    """A loss or a gradient is NaN or infinite, weights are as they were; `training.Run` adds the
    step and its images.
    """


class Broken(NotFinite):
    """A weight became NaN or infinite, which no later step can mend: skipping this one would not
    do.
    """


def require_finite(terms: dict[str, Tensor]) -> dict[str, float]:
    """The terms of a loss, summed over ranks, as numbers. Raises NotFinite, naming them, before a
    NaN reaches the weights.
    """
    values = dict(zip(terms, ranks.total(torch.stack(list(terms.values()))).tolist()))
    if not all(map(math.isfinite, values.values())):
        raise NotFinite(
            "loss is not finite: "
            + ", ".join(f"{name} {value:.3g}" for name, value in values.items())
        )
    return values
