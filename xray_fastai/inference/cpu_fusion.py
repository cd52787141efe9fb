"""Fuses a network for inference on a CPU, so that oneDNN computes several layers while the data is in the cache.

Batch norm is folded into the convolutions (`torch.fx`). An activation, or the sum with a shortcut, becomes part of the
convolution before it. The operators are those that `torch.compile` uses on a CPU, without its half minute of compiling.
"""

import operator

import torch
from torch import fx, nn

ACTIVATIONS = {nn.ReLU: "relu", nn.SiLU: "swish"}
"""Modules that oneDNN can apply within a convolution, and oneDNN's names for them."""
PART = 8
"""Images that go through the network at a time, so that their feature maps stay in the cache. The fastest of 4, 8, 16
and 32 (ResNet50, 224 px, 2 cores)."""


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
    """Runs a fused network over parts of a batch."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Map images (B, 3, height, width) to logits (B, classes), both in the network's precision."""
        return torch.cat([self.model(part) for part in images.split(PART)])


def fused_for_cpu(model: nn.Module, precision: torch.dtype = torch.bfloat16) -> Fused:
    """Return a fused copy of a network in eval mode, in `precision` and channels_last."""
    from torch.fx.experimental.optimization import fuse  # whose import prints a warning of torch's

    graph = fuse(model).to(precision, memory_format=torch.channels_last)
    layers = dict(graph.named_modules())

    def layer(node: fx.Node) -> nn.Module | None:
        return layers.get(node.target) if node.op == "call_module" else None

    def follower(node: fx.Node) -> fx.Node | None:
        """Return the node that uses this one's result, if it is a single one."""
        return next(iter(node.users)) if len(node.users) == 1 else None

    for node in list(graph.graph.nodes):
        convolution = layer(node)
        if not isinstance(convolution, nn.Conv2d) or convolution.padding_mode != "zeros":
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
    return Fused(graph)
