"""Trains in several processes with the result of one: DistributedDataParallel through fastai and Accelerate.

The batch size is that of all processes together. Each process loads its part of every batch and computes it. Gradients,
losses, batch norm and validation outputs are those of the whole batch. So all processes record and decide the same,
with the code for one process. Except for augmentation and dropout, the result is that of one process.
"""

import os
import warnings
from collections.abc import Sequence
from copy import copy
from itertools import accumulate, pairwise
from signal import SIG_IGN, SIGTERM, signal

import numpy as np
import torch
import torch.distributed as dist
from accelerate.utils import DistributedDataParallelKwargs
from fastai.distributed import DistributedDL, DistributedTrainer
from fastai.vision.all import DataLoader, L, set_seed, to_detach
from torch import nn
from torch.nn import functional

from xray_fastai.system.distributed import rank, share, world_size


class SharedLoader(DistributedDL):
    """Loads this process's part of each batch of a loader; the parts differ by one image at most.

    fastai's `DistributedDL` splits the epoch instead of the batches, so that the batches differ from the loader's, and
    pads it. Here only a process without an image of the last batch gets an extra one, which `gathered` drops.
    """

    def __init__(
        self,
        dl: DataLoader,  # for one process
    ):
        super().__init__(dl, rank(), world_size(), device=dl.device)
        self.bs = -(-dl.bs // self.world_size)

    def __len__(self):
        return len(self.dl)

    def get_idxs(self):
        idxs = share(list(self.dl.get_idxs()))
        self.n = len(self.dl) * self.dl.bs if self.dl.drop_last else len(idxs)
        own = []
        for first in range(0, self.n, self.dl.bs):
            batch = idxs[first : min(first + self.dl.bs, self.n)]
            start, end = list(pairwise(accumulate(self._shares(len(batch)), initial=0)))[self.rank]
            own += batch[start:end] or batch[:1]
        return own

    def _shares(self, images: int) -> list[int]:
        return [images // self.world_size + (r < images % self.world_size) for r in range(self.world_size)]

    def shares(self, number: int) -> list[int]:
        "Return how many images of a batch, numbered from 0, each process has."
        return self._shares(min(self.dl.bs, self.n - number * self.dl.bs))

    def create_batches(self, samps):
        dl = copy(self.dl)
        dl.bs, dl.drop_last = self.bs, False
        return dl.create_batches(samps)

    def to_detach(self, b, cpu=True, gather=True):
        return to_detach(b, cpu, gather=False)  # the metrics' inputs are gathered already

    def wif(self):
        "Keep a loading process alive until its own process ends it, when SIGTERM is sent to the whole job."
        signal(SIGTERM, SIG_IGN)


class TrainTogether(DistributedTrainer):
    """Makes each step, loss and epoch equal to those of one process with the whole batch.

    Only forward passes in training go through `DistributedDataParallel`, which copies the first process's weights to
    all when it is made, and averages gradients. `learn.model` stays the plain model otherwise.
    """

    def __init__(
        self,
        device: torch.device,
        seed: Sequence[int],  # of this fit and this phase
    ):
        if device.type == "cuda" and not gpus_reach_each_other():
            os.environ |= {"NCCL_P2P_DISABLE": "1", "NCCL_IB_DISABLE": "1"}
        # buffers are equal in all processes, because batch norm computes them from the whole batch
        options = DistributedDataParallelKwargs(broadcast_buffers=False)
        super().__init__(cpu=device.type == "cpu", kwargs_handlers=[options])
        self.device, self.seed = device, seed

    def before_fit(self):
        self.whole = self.model
        self.norms = sync_batch_norm(self.whole, self.device)
        self.spread = self.accelerator.prepare(self.whole)

    def after_fit(self):
        for parent, name, norm in self.norms:
            setattr(parent, name, norm)
        self.learn.model, self.spread = self.whole, None
        self.accelerator.free_memory()

    def before_train(self):
        self.learn.dl = SharedLoader(self.dl)

    def before_validate(self):
        self.learn.dl = SharedLoader(self.dl)

    def before_epoch(self):
        # the first process keeps its random state, so it draws what a single process would; a checkpoint stores this
        # state alone
        if rank():
            set_seed(int(np.random.SeedSequence([*self.seed, self.epoch, rank()]).generate_state(1)[0]))

    def before_batch(self):
        if self.training:
            self.learn.model = self.spread

    def after_pred(self):
        self.learn.model = self.whole
        if not self.training:
            shares = self.dl.shares(self.iter)
            self.learn.pred, self.learn.yb = gathered(self.pred, shares), (gathered(self.yb[0], shares),)

    def after_loss(self):
        """Compute the loss of the whole batch, sum(w * l) / sum(w), which is not the mean of its parts' losses.

        The gradient of `loss_grad`, averaged over the processes, is the gradient of that loss.
        """
        if self.training:
            weight = self.loss_func.total_weight(self.yb[0])
            sums = torch.stack([self.loss.detach() * weight, weight]).as_subclass(torch.Tensor)
            dist.all_reduce(sums)
            self.learn.loss_grad = self.loss_grad * (world_size() * weight / sums[1])
            self.learn.loss = sums[0] / sums[1]

    def after_epoch(self):
        self.recorder.log = L(share(list(self.recorder.log)))  # different machines may round differently


def gpus_reach_each_other() -> bool:
    """Return whether NCCL may copy from GPU to GPU, which some GeForce GPUs do not support.

    `accelerate launch` asks the same. Accelerate does not document its function. Where it fails, NCCL copies through
    memory, which always works, but is slower.
    """
    try:
        from accelerate.utils import check_cuda_p2p_ib_support

        return check_cuda_p2p_ib_support()
    except Exception as error:  # of what class is not documented
        warnings.warn(
            f"NCCL copies through memory, slower: accelerate raises {type(error).__name__}: {error}", stacklevel=2
        )
        return False


def gathered(part: torch.Tensor, shares: Sequence[int]) -> torch.Tensor:
    """Return the batch (B, ...) from the parts (rows, ...) of all processes; rows beyond a share are dropped."""
    padded = part.new_zeros(max(shares), *part.shape[1:]).as_subclass(torch.Tensor)
    padded[: shares[rank()]] = part[: shares[rank()]]
    parts = [torch.empty_like(padded) for _ in shares]
    dist.all_gather(parts, padded)
    return torch.cat([rows[:n] for rows, n in zip(parts, shares, strict=True)]).as_subclass(type(part))


class CpuSyncBatchNorm(nn.BatchNorm2d):
    """Does on CPUs what `nn.SyncBatchNorm` does; torch has it only for GPUs."""

    def forward(self, x):
        if not self.training:
            return super().forward(x)
        y, mean, variance = _Normalised.apply(x, self.weight, self.bias, self.eps)
        with torch.no_grad():
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance, self.momentum)
            self.num_batches_tracked += 1
        return y


class _Normalised(torch.autograd.Function):
    """Normalises (B, C, H, W) by each channel's mean and variance over all processes (Ioffe and Szegedy 2015).

    Returns the normalised tensor times weight plus bias, the mean (C,), and the unbiased variance (C,).
    """

    @staticmethod
    def forward(ctx, x, weight, bias, eps):
        variance, mean = torch.var_mean(x.float(), (0, 2, 3), correction=0)
        own = torch.stack([torch.full_like(mean, x.numel() / len(mean)), mean, variance])
        parts = [torch.empty_like(own) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, own)
        counts, means, variances = torch.stack(parts, dim=1)  # (processes, C) each
        total = counts.sum(0)
        mean = (counts * means).sum(0) / total
        variance = (counts * (variances + (means - mean) ** 2)).sum(0) / total
        ctx.save_for_backward(x, weight, mean, (variance + eps).rsqrt(), total)
        y = functional.batch_norm(x, mean, variance, weight, bias, eps=eps)
        unbiased = variance * total / (total - 1)
        ctx.mark_non_differentiable(mean, unbiased)
        return y, mean, unbiased

    @staticmethod
    def backward(ctx, gradient, *_):
        x, weight, mean, scale, total = ctx.saved_tensors

        def spread(values):
            return values[:, None, None]

        normal = (x.float() - spread(mean)) * spread(scale)
        gradient = gradient.float()
        of_bias, of_weight = gradient.sum((0, 2, 3)), (gradient * normal).sum((0, 2, 3))
        sums = torch.stack([of_bias, of_weight])
        dist.all_reduce(sums)
        through_mean, through_variance = sums / total
        of_x = (gradient - spread(through_mean) - normal * spread(through_variance)) * spread(weight * scale)
        return of_x.to(x.dtype), of_weight, of_bias, None


def _activated(norm: nn.Module, _: tuple, normalised: torch.Tensor) -> torch.Tensor:
    return norm.act(norm.drop(normalised))


def sync_batch_norm(model: nn.Module, device: torch.device) -> list[tuple[nn.Module, str, nn.Module]]:
    """Replace each batch norm by one with the same tensors that sees the whole batch.

    Returns:
        For each replaced module: its parent, its name there, and the module.
    """
    replaced = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if isinstance(child, nn.BatchNorm2d)
    ]
    for parent, name, child in replaced:
        if device.type == "cuda":
            new = nn.SyncBatchNorm.convert_sync_batchnorm(child)
        else:
            new = CpuSyncBatchNorm(child.num_features, child.eps, child.momentum)
            for tensor, value in (*child.named_parameters(recurse=False), *child.named_buffers(recurse=False)):
                setattr(new, tensor, value)
        if hasattr(child, "act"):  # timm's batch norm has the activation inside
            new.drop, new.act = child.drop, child.act
            new.register_forward_hook(_activated)
        setattr(parent, name, new)
    return replaced
