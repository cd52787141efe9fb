"""The fused network for a CPU gives the outputs of the trained one; compared in fp32, where they differ least."""

import pytest
import torch
import torchvision

from xray_fastai.config import ARCHITECTURES
from xray_fastai.inference.cpu_fusion import PART, Convolution, fused_for_cpu

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="PyTorch was built without oneDNN")


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_fused_gives_what_the_network_gives(arch):
    torch.manual_seed(0)
    model = getattr(torchvision.models, arch)(weights=None, num_classes=2).eval()
    for layer in model.modules():
        if isinstance(layer, torch.nn.BatchNorm2d):  # as far from the identity as trained ones
            torch.nn.init.normal_(layer.running_mean, std=0.1)
            torch.nn.init.uniform_(layer.running_var, 0.5, 2)
            torch.nn.init.normal_(layer.bias, std=0.1)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    fused = fused_for_cpu(model, torch.float32)
    images = torch.randn(PART + 3, 3, 64, 64)
    with torch.inference_mode():
        exact = model(images)
        torch.testing.assert_close(fused(images), exact, rtol=1e-4, atol=1e-5 * float(exact.abs().max()))
        torch.testing.assert_close(fused(images[:1]), exact[:1], rtol=1e-4, atol=1e-5 * float(exact.abs().max()))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    within = [layer for layer in fused.modules() if isinstance(layer, Convolution)]
    assert len(within) == sum(isinstance(layer, torch.nn.Conv2d) for layer in model.modules())
