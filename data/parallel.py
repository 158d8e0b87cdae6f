"""Data parallelism on torch.distributed: `torchrun --nproc_per_node=N train.py NAME`. One process: every call is a no-op.

Each rank draws the same global batch and noise, keeps its own slice (`shard`), and averages gradients in `descend`:
N processes and one process at the same global batch agree to rounding.
"""
import gc
import os

import torch
import torch.distributed as dist
from torch import nn


def start(device):
    """Join torchrun's process group (NCCL on CUDA, gloo on CPU).   -> this rank's torch.device"""
    if "WORLD_SIZE" not in os.environ or int(os.environ["WORLD_SIZE"]) == 1:
        return device
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return device


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def world():
    return dist.get_world_size() if dist.is_initialized() else 1


def wait():
    """Until every rank is here: one that left early would look like a crash to the others."""
    if dist.is_initialized():
        dist.barrier()


def stop():
    """Leave the process group and free it now: cycles keep it alive, and threads that outlive the interpreter abort it."""
    if dist.is_initialized():
        dist.destroy_process_group()
        gc.collect()


def shard(x):
    """This rank's equal part of a tensor (or list) that every rank holds whole, cut along dim 0."""
    if len(x) % world():
        raise ValueError(f"a global batch of {len(x)} cannot be cut into {world()} equal parts; change --batch")
    part = len(x) // world()
    return x[rank() * part : (rank() + 1) * part]


def average_(tensors):
    """Replace each tensor by its mean over ranks, in one flat all-reduce per dtype."""
    if world() == 1:
        return
    for dtype in {t.dtype for t in tensors}:
        group = [t for t in tensors if t.dtype == dtype]
        flat = torch.cat([t.reshape(-1) for t in group])
        dist.all_reduce(flat)
        for t, part in zip(group, flat.div_(world()).split([t.numel() for t in group]), strict=True):
            t.copy_(part.view_as(t))


class _Total(torch.autograd.Function):
    """Sum of a tensor over ranks; its gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx, x):
        x = x.clone()
        dist.all_reduce(x)
        return x

    backward = forward


class _Global:
    """Batch norm whose statistics are those of the global batch: ranks add up their sums, and gradients flow through them.

    torch.nn.SyncBatchNorm is the same for GPUs only. Sums are float32 under autocast, as in PyTorch's own layer.
    """

    def forward(self, x):
        if world() == 1 or not self.training:
            return super().forward(x)
        dtype, x = x.dtype, x.float()
        axes = [axis for axis in range(x.dim()) if axis != 1]
        count = _Total.apply(x.new_tensor(x.numel() / x.shape[1]))                  # ranks may hold unlike numbers of samples
        mean = _Total.apply(x.sum(axes)) / count
        shape = [-1 if axis == 1 else 1 for axis in range(x.dim())]
        var = _Total.apply((x - mean.view(shape)).square().sum(axes)) / count
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var * count / (count - 1), self.momentum)
        x = (x - mean.view(shape)) * (var + self.eps).rsqrt().view(shape)
        return (x * self.weight.view(shape) + self.bias.view(shape)).to(dtype)


class BatchNorm1d(_Global, nn.BatchNorm1d):
    pass


class BatchNorm2d(_Global, nn.BatchNorm2d):
    pass


def broadcast(number):
    """Rank 0's Python float on every rank, so that all of them take the same decision."""
    if world() == 1:
        return number
    value = torch.tensor([number], dtype=torch.float64)
    if dist.get_backend() == "nccl":
        value = value.cuda()
    dist.broadcast(value, 0)
    return value.item()


def descend(optimiser, loss, clip=None):
    """One optimiser step: zero_grad, backward, average over ranks, optional clipping of the total norm, step."""
    optimiser.zero_grad(set_to_none=True)
    loss.backward()
    parameters = [p for group in optimiser.param_groups for p in group["params"] if p.grad is not None]
    average_([p.grad for p in parameters])
    if clip is not None:
        torch.nn.utils.clip_grad_norm_(parameters, clip)
    optimiser.step()
