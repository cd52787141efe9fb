"""The network of the tests that need some network: a ResNet with 65,000 weights instead of ResNet18's 11 million.

A step takes a tenth of ResNet18's time, and files have 0.3 instead of 45 MB. Processes that a test starts do not know
it, except those that call `allow` and `register`.
"""

from collections import OrderedDict
from dataclasses import fields, replace
from functools import cache

from xray_fastai.config.choices import ARCHITECTURES, Architecture
from xray_fastai.config.fit_config import FitConfig
from xray_fastai.config.setting import setting_of

NAME = "small_resnet"
WIDTHS = (8, 16, 32, 64)
TORCHVISIONS = tuple(ARCHITECTURES)
"""The architectures that users have."""
KINDS = ("resnet18", "resnet50", *(name for name in TORCHVISIONS if not name.startswith("resnet")))
"""One of each kind of block: ResNet34 has ResNet18's, ResNet101 has ResNet50's."""


def allow() -> None:
    """Let `--arch` and `model.json` have the name, before the modules that read the table are imported."""
    ARCHITECTURES[NAME] = Architecture(WIDTHS[-1], "fc", early_layers=6)
    (option,) = (option for option in fields(FitConfig) if option.name == "arch")
    option.metadata = {"setting": replace(setting_of(option), choices=tuple(ARCHITECTURES))}


@cache
def register() -> None:
    """Let torchvision build the network, and the check of weights know its tensors."""
    import torch
    from torch import nn
    from torchvision.models._api import register_model
    from torchvision.models.resnet import BasicBlock

    from xray_fastai.export import weights_file
    from xray_fastai.model.architectures import build_backbone

    def layer(inputs: int, outputs: int, stride: int) -> nn.Sequential:
        smaller = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
        return nn.Sequential(BasicBlock(inputs, outputs, stride, smaller if stride > 1 else None))

    def build(**_) -> nn.Module:
        layers = {
            "conv1": nn.Conv2d(3, WIDTHS[0], 7, 2, 3, bias=False),
            "bn1": nn.BatchNorm2d(WIDTHS[0]),
            "relu": nn.ReLU(inplace=True),
            "maxpool": nn.MaxPool2d(3, 2, 1),
            "layer1": layer(WIDTHS[0], WIDTHS[0], 1),
        }
        for i in (1, 2, 3):
            layers[f"layer{i + 1}"] = layer(WIDTHS[i - 1], WIDTHS[i], 2)
        network = nn.Sequential(OrderedDict(layers, avgpool=nn.AdaptiveAvgPool2d(1), fc=nn.Linear(WIDTHS[-1], 1000)))
        for part in network.modules():  # as torchvision's
            if isinstance(part, nn.Conv2d):
                nn.init.kaiming_normal_(part.weight, mode="fan_out", nonlinearity="relu")
        return network

    register_model(NAME)(build)
    with torch.device("meta"):
        state = build_backbone(NAME)[:-1].state_dict()
    weights_file._backbones()[NAME] = {f"0.{name}": list(tensor.shape) for name, tensor in state.items()}


if __name__ == "__main__":  # the command line of a process that knows the network
    allow()
    register()
    from xray_fastai.cli import app

    app(prog_name="xray-fastai")
