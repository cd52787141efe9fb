"""Trains with smaller batches after memory ran out; their summed gradients equal the whole batch's."""

from fastai.vision.all import CancelBatchException, GradientAccumulation


def smaller(batch: int, current: int) -> int:
    """Return the largest divisor of `batch` that is at most half of `current`; 0 if there is none."""
    return next((n for n in range(current // 2, 0, -1) if batch % n == 0), 0)


class AccumulateGradients(GradientAccumulation):
    """Sum gradients over parts of a batch, so that the step equals the whole batch's, also with class weights.

    The loss of a batch is sum(w * l) / sum(w). fastai's `GradientAccumulation` weights the losses of the parts by their
    number of images, as if all had the same sum(w). This class weights them by sum(w). Batch norm still sees parts when
    it trains. At the end of an epoch, parts that make no whole batch are dropped, as the loader drops such images.
    """

    def before_train(self):
        self.count, self.total = 0, 0.0

    def after_loss(self):
        self.part = float(self.loss_func.total_weight(self.yb[0]))
        # keeps the loss near one, which half precision needs; `before_step` applies the exact factor
        self.learn.loss_grad = self.loss_grad * (self.part / self.n_acc)

    def before_step(self):
        self.count, self.total = self.count + len(self.yb[0]), self.total + self.part
        if self.count < self.n_acc:
            raise CancelBatchException
        for parameter in self.model.parameters():
            if parameter.grad is not None:
                parameter.grad *= self.n_acc / self.total
        self.count, self.total = 0, 0.0

    def after_train(self):
        self.opt.zero_grad()
