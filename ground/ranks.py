"""Several processes that work as one, started by torchrun: who takes which share, and how shares
become a whole.

A rank is a process with a device of its own. Losses are normalised by counts of the whole batch, so
the ranks' losses and gradients add up to those of one process with that batch; no figure of the
method depends on the number of ranks.
Source: PyTorch's distributed package (gloo on CPUs, NCCL on GPUs). With a single process nothing
    here does anything.
Try: `torchrun --nproc_per_node=2 dearli.py --stage sup --steps 20 --no-eval --out runs/try-ranks`:
the log.jsonl of one process, up to rounding.
"""

import os
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

# For another rank: one may have more images to evaluate or to label.
PATIENCE = timedelta(minutes=30)


def started_by_torchrun() -> bool:
    return int(os.environ.get("WORLD_SIZE", 1)) > 1


def start(device: torch.device) -> None:
    """Join the other processes if torchrun started this one (it sets WORLD_SIZE). device: this
    rank's own, see `local_device`.
    """
    if started_by_torchrun() and not dist.is_initialized():
        if device.type == "cuda":
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=PATIENCE)


def stop() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def local_device(device: str) -> str:
    """`cuda` becomes this rank's own GPU."""
    return (
        f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
        if device == "cuda" and started_by_torchrun()
        else device
    )


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def count() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def share(n: int, of: int | None = None, among: int | None = None) -> range:
    """The part of 0 ... n-1 that this rank takes (or rank `of` of `among`), in one piece; parts
    differ by at most one.
    """
    of, among = rank() if of is None else of, among or count()
    return range(of * n // among, (of + 1) * n // among)


def total(x: Tensor) -> Tensor:
    """The sum over ranks, the same on all of them. No gradient flows through it."""
    x = x.detach().clone()
    if count() > 1:
        dist.all_reduce(x)
    return x


def add_gradients(params: list[Tensor]) -> None:
    """Every gradient becomes the sum of the ranks'. All of them have one (a loss reaches every
    trained parameter).
    """
    if count() == 1:
        return
    grads = [p.grad for p in params]
    flat = torch.cat([g.flatten() for g in grads])
    dist.all_reduce(flat)
    for grad, part in zip(grads, flat.split([g.numel() for g in grads])):
        grad.copy_(part.view_as(grad))


def gather(value) -> list:
    """What every rank gives, in the order of ranks, on all of them."""
    if count() == 1:
        return [value]
    values = [None] * count()
    dist.all_gather_object(values, value)
    return values


def agree(tensors: list[Tensor]) -> None:
    """Every tensor becomes that of rank 0."""
    if count() > 1:
        for tensor in tensors:
            dist.broadcast(tensor, 0)


def wait() -> None:
    """Until all ranks are here."""
    if count() > 1:
        dist.barrier()
