"""Batch norm over the batch of all processes, as one process would see it: torch's own on GPUs, and one for CPUs."""

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional


class CpuSyncBatchNorm(nn.BatchNorm2d):
    """What `nn.SyncBatchNorm` is on GPUs, for which alone torch has it."""

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
    """(B, C, H, W) with mean 0 and variance 1 of each channel over all processes, times weight, plus bias (Ioffe and
    Szegedy 2015). Also gives mean (C,) and unbiased variance (C,)."""

    @staticmethod
    def forward(ctx, x, weight, bias, eps):
        variance, mean = torch.var_mean(x.float(), (0, 2, 3), correction=0)
        told = torch.stack([torch.full_like(mean, x.numel() / len(mean)), mean, variance])
        parts = [torch.empty_like(told) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, told)
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


def sync_batch_norm(model: nn.Module, device: torch.device) -> list[tuple[nn.Module, str, nn.Module]]:
    """Put one that sees the whole batch, with the same tensors, in the place of each batch norm.

    Returns:
        Parent, name in it, and module of those that were there.
    """
    found = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if isinstance(child, nn.BatchNorm2d)
    ]
    for parent, name, child in found:
        if device.type == "cuda":
            new = nn.SyncBatchNorm.convert_sync_batchnorm(child)
        else:
            new = CpuSyncBatchNorm(child.num_features, child.eps, child.momentum)
            for tensor in (*child._parameters, *child._buffers):
                setattr(new, tensor, getattr(child, tensor))
        setattr(parent, name, new)
    return found
