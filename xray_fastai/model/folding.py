"""Folds batch norm into the convolutions before it, by torch's documented `torch.fx` and `fuse_conv_bn_eval`.

A folded network can give its last layer's input besides its output.
"""

from torch import fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from xray_fastai.model.timm_networks import TimmBackbone, with_plain_batch_norm


def fold_batch_norm(model: nn.Module) -> fx.GraphModule:
    """Return a copy of a network in eval mode, in which each convolution does the work of the batch norm behind it.

    The outputs differ by rounding only. A batch norm that follows something else than a convolution stays.
    """
    folded = _traced(with_plain_batch_norm(model))
    layers = dict(folded.named_modules())
    for node in list(folded.graph.nodes):
        if node.op != "call_module" or not isinstance(layers[node.target], nn.BatchNorm2d):
            continue
        before = node.args[0]
        convolution = layers[before.target] if before.op == "call_module" else None
        if isinstance(convolution, nn.Conv2d) and len(before.users) == 1:
            folded.set_submodule(before.target, fuse_conv_bn_eval(convolution, layers[node.target]))
            node.replace_all_uses_with(before)
            folded.graph.erase_node(node)
    folded.delete_all_unused_submodules()
    folded.recompile()
    return folded


class _Tracer(fx.Tracer):
    """Keeps each convolution whole, timm's with the padding of TensorFlow, too; and all of a backbone if told so."""

    def __init__(self, whole: type[nn.Module] | None = None):
        super().__init__()
        self.whole = whole

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        kept = isinstance(m, nn.Conv2d) or (self.whole is not None and isinstance(m, self.whole))
        return kept or super().is_leaf_module(m, module_qualified_name)


def _traced(model: nn.Module) -> fx.GraphModule:
    """Return the graph of a network. Where values decide what timm's network computes, it stays one step of it."""
    tracer = _Tracer()
    try:
        return fx.GraphModule(model, tracer.trace(model))
    except fx.proxy.TraceError:
        tracer = _Tracer(whole=TimmBackbone)
        return fx.GraphModule(model, tracer.trace(model))


def with_features(network: fx.GraphModule) -> fx.GraphModule:
    """Let a network that ends with a layer return its output (B, classes) and that layer's input (B, features)."""
    (end,) = (node for node in network.graph.nodes if node.op == "output")
    (logits,) = end.args
    end.args = ((logits, logits.args[0]),)
    network.recompile()
    return network
