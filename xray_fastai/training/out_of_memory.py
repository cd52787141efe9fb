"""Out of memory: smaller batches, whose gradients are summed up to what the batch asked for would have given."""

import torch
from fastai.vision.all import CancelBatchException, GradientAccumulation

# What torch raises as a plain RuntimeError: its CPU allocator, MPS, and cuDNN's and cuBLAS's own allocations.
WORDS = (
    "DefaultCPUAllocator: can't allocate memory",
    "MPS backend out of memory",
    "CUDNN_STATUS_ALLOC_FAILED",
    "CUBLAS_STATUS_ALLOC_FAILED",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a smaller batch may help."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(word in str(error) for word in WORDS)


def smaller(batch: int, at_once: int) -> int:
    """The largest number of images at once that divides `batch` and is at most half of `at_once`; 0 where none is."""
    return next((n for n in range(at_once // 2, 0, -1) if batch % n == 0), 0)


class AccumulateGradients(GradientAccumulation):
    """fastai's, with the same step as a whole batch makes also where the loss weighs classes.

    The loss of a batch is sum(w * l) / sum(w). fastai's weighs the losses of its parts by their images, as if each had
    the same sum(w); here they are weighed by sum(w) itself. Batch norm, where it trains, still sees parts. Parts that
    make no whole batch at the end of an epoch are dropped, as the loader drops images that make none.
    """

    def before_train(self):
        self.count, self.total = 0, 0.0

    def after_loss(self):
        self.part = float(self.loss_func.total_weight(self.yb[0]))
        # in the order of one, where half precision is at ease; `before_step` mends the rest
        self.learn.loss_grad = self.loss_grad * (self.part / self.n_acc)

    def before_step(self):
        self.count, self.total = self.count + len(self.yb[0]), self.total + self.part
        if self.count < self.n_acc:
            raise CancelBatchException
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        torch._foreach_mul_(gradients, self.n_acc / self.total)
        self.count, self.total = 0, 0.0

    def after_train(self):
        self.opt.zero_grad()
