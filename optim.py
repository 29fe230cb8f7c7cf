"""The optimiser of every stage: AdamW with Mask2Former's parameter groups, poly schedule, clipping of the whole gradient.

Source: the official training scripts. Norm layers and nn.Embedding weights have no weight decay; bare parameters (logit_scale,
level_embed of the pixel decoder) do. A trained backbone learns at a fraction of the rate.
"""

import math

import torch
from torch import Tensor, nn

from config import Config


def build_optimizer(model: nn.Module, cfg: Config) -> torch.optim.AdamW:
    """AdamW over the parameters of `model` that require gradients; each group keeps its own `lr_factor` of the schedule."""
    groups: dict[tuple[float, float], list[Tensor]] = {}
    for module_name, module in model.named_modules():
        for param in module.parameters(recurse=False):
            if not param.requires_grad:
                continue
            exempt = isinstance(module, (nn.LayerNorm, nn.GroupNorm, nn.Embedding))
            factor = cfg.backbone_lr_multiplier if module_name.startswith("backbone") else 1.0
            groups.setdefault((factor, 0.0 if exempt else cfg.weight_decay), []).append(param)
    return torch.optim.AdamW([{"params": params, "lr": cfg.lr * factor, "lr_factor": factor, "weight_decay": decay}
                              for (factor, decay), params in groups.items()], lr=cfg.lr)


def set_lr(optimizer: torch.optim.Optimizer, step: int, steps: int, cfg: Config) -> float:
    """Poly schedule: lr(t) = lr * (1 - t / steps) ** power, t from 0. Returns lr(t)."""
    lr = cfg.lr * (1 - step / steps) ** cfg.poly_power
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_factor"]
    return lr


def descend(optimizer: torch.optim.Optimizer, loss: Tensor, cfg: Config) -> float:
    """One step down the gradient of the loss, whose total L2 norm is clipped. Returns the norm before clipping.

    Raises: NotFinite if that norm is not, with weights and optimiser untouched: clipped, an infinite gradient is NaN.
    """
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    params = [p for group in optimizer.param_groups for p in group["params"]]
    norm = float(nn.utils.clip_grad_norm_(params, cfg.clip_norm))
    if not math.isfinite(norm):
        raise NotFinite(f"norm of the gradient is {norm}")
    optimizer.step()
    return norm


class NotFinite(ArithmeticError):
    """A loss, a gradient or a weight became NaN or infinite; `trainer.Run` adds the step and its images."""


def require_finite(loss: Tensor, **terms: Tensor) -> None:
    """Raise NotFinite, naming the terms, before a NaN reaches the weights."""
    if not torch.isfinite(loss):
        listed = ", ".join(f"{name} {float(term):.3g}" for name, term in terms.items())
        raise NotFinite(f"loss is {float(loss.detach())} ({listed})")
