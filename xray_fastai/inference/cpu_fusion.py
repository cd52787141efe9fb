"""Fuses a network for inference on a CPU, so that oneDNN computes several layers while the data is in the cache.

Batch norm is folded into the convolutions. An activation, or the sum with a shortcut, becomes part of the convolution
before it. The operators are those that `torch.compile` uses on a CPU, without its half minute of compiling. torch does
not document them, so the network without them stands by: it computes where they fail or give other outputs.
"""

import copy
import operator
import warnings

import torch
from torch import fx, nn

from xray_fastai.model.folding import fold_batch_norm, with_features

ACTIVATIONS = {nn.ReLU: "relu", nn.SiLU: "swish"}
"""Modules that oneDNN can apply within a convolution, and oneDNN's names for them."""
PART = 8
"""Images that go through the network at a time, so that their feature maps stay in the cache. The fastest of 4, 8, 16
and 32 (ResNet50, 224 px, 2 cores)."""
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1}
"""The largest difference of a logit that is accepted, as a fraction of the largest logit, or of 1 where that is less.
With random weights it was at most 3e-6 in fp32 (ResNet18 and ResNet34, 32 and 64 px), and 0.004 in bf16 (ResNet18, 32
px, not fused). Two logits that differ by 1e-3 each change a probability of two classes by at most 0.0005."""


class Convolution(nn.Module):
    """Computes a convolution, the sum with `other` (of the result's shape) if it is given, and an activation."""

    def __init__(self, layer: nn.Conv2d, activation: str):
        super().__init__()
        self.weight, self.bias, self.activation = layer.weight, layer.bias, activation
        self.shape = (layer.padding, layer.stride, layer.dilation, layer.groups)

    def forward(self, x: torch.Tensor, other: torch.Tensor | None = None) -> torch.Tensor:
        convolve = torch.ops.mkldnn._convolution_pointwise
        if other is None:
            return convolve(x, self.weight, self.bias, *self.shape, self.activation, [], "")
        activation = self.activation if self.activation != "none" else None
        return convolve.binary(
            x, other, self.weight, self.bias, *self.shape, "add", 1.0, activation, [], "" if activation else None
        )


class Fused(nn.Module):
    """Runs a fused network over parts of a batch, or the plain one once the fused one has failed."""

    def __init__(self, fused: nn.Module, plain: nn.Module):
        super().__init__()
        self.fused, self.plain = fused, plain  # they share their tensors

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Map images (B, 3, height, width) to logits (B, classes) and features (B, F), all in one precision."""
        if self.fused is not None:
            try:
                return _in_parts(self.fused, images)
            except Exception as error:  # of what class is not documented
                self.take_plain(f"raises {type(error).__name__}: {error}")
        return _in_parts(self.plain, images)

    def take_plain(self, reason: str) -> None:
        """Compute with the plain network from now on, and warn why: the predictions stay right, but take longer."""
        self.fused = None
        warnings.warn(
            f"the network runs without fused convolutions, slower: torch {torch.__version__} {reason}", stacklevel=2
        )

    def check(self, images: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
        """Compare the fused network with the logits of the unfused one, and take the plain one where they differ.

        Args:
            images: (2, 3, height, width), as `forward` takes them; compared as a batch of two and one of one, whose
                memory layout is ambiguous. `forward` catches what a larger batch raises.
            expected: their logits (2, classes).
            tolerance: see `TOLERANCE`.
        """
        with torch.inference_mode():
            found = torch.cat([self(images)[0], self(images[:1])[0]]).float()  # (3, classes)
        difference = float((found - expected[[0, 1, 0]]).abs().max() / expected.abs().max().clamp_min(1))
        if self.fused is not None and not difference <= tolerance:  # NaN is not accepted either
            self.take_plain(f"gives logits that differ by {difference:.2g} of the largest")


def fused_for_cpu(model: nn.Module, precision: torch.dtype, images: torch.Tensor, expected: torch.Tensor) -> Fused:
    """Return a fused copy of a network in eval mode, in `precision` and channels_last.

    It gives logits and features (`folding.with_features`).

    Args:
        model: the network.
        precision: torch.float32 or torch.bfloat16.
        images: (2, 3, height, width), the kind of images that come later.
        expected: the logits (2, classes) that the network gives for them in fp32. Where the fused copy's differ by more
            than `TOLERANCE`, or it raises, the copy returned computes without undocumented operators.
    """
    plain = with_features(fold_batch_norm(model)).to(precision, memory_format=torch.channels_last)
    network = Fused(_fused(plain), plain)
    network.check(images.to(precision, memory_format=torch.channels_last), expected, TOLERANCE[precision])
    return network


def _in_parts(network: nn.Module, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    logits, features = zip(*(network(part) for part in images.split(PART)), strict=True)
    return torch.cat(logits), torch.cat(features)


def _fused(folded: fx.GraphModule) -> fx.GraphModule:
    """Return a network with the same tensors, in which convolutions compute the activations and sums behind them."""
    graph = fx.GraphModule(folded, copy.deepcopy(folded.graph))
    layers = dict(graph.named_modules())

    def layer(node: fx.Node) -> nn.Module | None:
        return layers.get(node.target) if node.op == "call_module" else None

    def follower(node: fx.Node) -> fx.Node | None:
        """Return the node that uses this one's result, if it is a single one."""
        return next(iter(node.users)) if len(node.users) == 1 else None

    for node in list(graph.graph.nodes):
        convolution = layer(node)
        if type(convolution) is not nn.Conv2d or convolution.padding_mode != "zeros":
            continue
        last, inputs = node, node.args
        following = follower(last)
        if following is not None and following.target in (operator.add, operator.iadd):
            other = [value for value in following.args if value is not node]
            if len(other) == 1 and isinstance(other[0], fx.Node):
                last, inputs = following, (*node.args, *other)
        following = follower(last)
        activation = ACTIVATIONS.get(type(layer(following)), "none") if following is not None else "none"
        if activation != "none":
            last = following
        name = f"fused_{node.name}"
        graph.add_submodule(name, Convolution(convolution, activation))
        with graph.graph.inserting_before(last):
            last.replace_all_uses_with(graph.graph.call_module(name, inputs))
    graph.graph.eliminate_dead_code()
    graph.delete_all_unused_submodules()
    graph.recompile()
    return graph
