"""A second device for machines without a GPU: inside `second_device()` torch has the device `lazy`.

Its tensors lie on the CPU, and the CPU computes with them: a set of storages says which they are. So values are exact,
down to the random numbers, and the optimizer, batch norm and automatic differentiation are torch's own. As on CUDA, an
operation takes no tensors of two devices, and numpy cannot read a tensor on the device. It is stricter in three points:
such a tensor is not pickled, a copy to the CPU has to block, and there is no float64, as on MPS.

It sees functions of torch that Python calls in this thread. torch's own `lazy` backend, whose name it borrows, is no
replacement (torch 2.14): `module.to` makes new parameters there, so that the optimizer trains none; batch norm does not
update its statistics; the fused Adam raises; `cpu_tensor[lazy_index]` does not; and a step of ResNet18 took half a
minute.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, replace

import pytest
import torch
from fastai.vision.all import TensorBase
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from xray_fastai.config.fit_config import FitConfig
from xray_fastai.config.predict_config import PredictConfig
from xray_fastai.config.setting import setting_of
from xray_fastai.inference import model as inference_model
from xray_fastai.training import plan

NAME = "lazy"
DEVICE = torch.device(NAME, 0)

Tensor = torch.Tensor
# they copy between devices, or look at no values
MEETINGS = {Tensor.copy_, Tensor.__setitem__, Tensor.data.__set__, torch._has_compatible_shallow_copy_type}
JOINS = {torch.cat, torch.stack}  # they take no number from the CPU either
PARSERS = {torch._C._nn._parse_to}  # they read the name of a device, and make no tensor
READERS = {Tensor.numpy, Tensor.__array__}


class SecondDevice(TorchFunctionMode):
    """Keeps account of which storages are on the device, and refuses what CUDA refuses."""

    def __init__(self):
        super().__init__()
        self.storages: set[StorageWeakRef] = set()

    def holds(self, tensor: Tensor) -> bool:
        with torch._C.DisableTorchFunction():
            return tensor.device.type == "cpu" and StorageWeakRef(tensor.untyped_storage()) in self.storages

    def put(self, result) -> None:
        """Let all tensors of a function's result be on the device."""
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.device.type == "cpu":
                if tensor.dtype == torch.float64:
                    raise TypeError("the device has no float64")
                self.storages.add(StorageWeakRef(tensor.untyped_storage()))

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        here = [tensor for tensor in tensors if self.holds(tensor)]
        if function in (Tensor.to, Tensor.cpu):
            return self.moved(function, args, kwargs)
        if function == Tensor.device.__get__ and here:  # made anew at each access
            return DEVICE
        if here and function in READERS:
            raise TypeError(f"can't convert {DEVICE} device type tensor to numpy; use Tensor.cpu() first")
        self.check(function, args, kwargs, here, tensors)
        wanted = kwargs.get("device")
        made = wanted is not None and function not in PARSERS and torch.device(wanted).type == NAME
        if made:
            kwargs["device"] = "cpu"
        result = function(*args, **kwargs)
        if made or (here and wanted is None and function is not Tensor.copy_):
            self.put(result)
        return result

    def check(self, function, args, kwargs, here, tensors) -> None:
        """Raise where CUDA does, or where a value could be read before it has arrived."""
        known = {id(tensor) for tensor in here}
        elsewhere = [t for t in tensors if id(t) not in known and (t.dim() or function in JOINS)]
        index_from_cpu = function is Tensor.__getitem__ and here and id(args[0]) in known
        if here and elsewhere and function not in MEETINGS and not index_from_cpu:
            raise RuntimeError(
                f"{function.__name__}: expected all tensors to be on the same device, not {NAME} and cpu"
            )
        if function is Tensor.copy_ and here and id(args[0]) not in known and (kwargs.get("non_blocking") or args[2:]):
            raise RuntimeError("copy_: may be read before it has arrived")

    def moved(self, function, args, kwargs):
        """Return what `Tensor.to` and `Tensor.cpu` do."""
        tensor, *options = args
        was_here, copies = self.holds(tensor), kwargs.pop("copy", False)
        if function is Tensor.cpu:
            options = ["cpu", *options]
        elif options and isinstance(options[0], Tensor):
            options = [DEVICE if self.holds(options[0]) else options[0].device, options[0].dtype, *options[1:]]
        device, dtype, non_blocking, layout = torch._C._nn._parse_to(*options, **kwargs)
        if device is not None and device.type not in (NAME, "cpu"):
            return function(*args, **kwargs)
        is_here = was_here if device is None else device.type == NAME
        if was_here and not is_here and non_blocking:
            raise RuntimeError("to: a copy to the CPU may be read before it has arrived")
        layout = {} if layout is None else {"memory_format": layout}
        result = tensor.to("cpu", dtype or tensor.dtype, copy=copies or is_here != was_here, **layout)
        if is_here:
            self.put(result)
        return result

    def refusing_pickle(self, reduce):
        """Return a method that pickles tensors, except those on the device."""

        def reduce_here(tensor, protocol):
            if self.holds(tensor):
                raise TypeError(f"a tensor on {DEVICE} is pickled")
            return reduce(tensor, protocol)

        return reduce_here


@contextmanager
def second_device() -> Iterator[SecondDevice]:
    """Give torch the device `lazy`, and the package the option `--device lazy`."""
    autocast, choose_device = torch.autocast, plan.choose_device
    with pytest.MonkeyPatch.context() as patch, SecondDevice() as device:
        patch.setattr(torch, "autocast", lambda name, *a, **k: autocast("cpu" if name == NAME else name, *a, **k))
        for kind, name in ((Tensor, "_reduce_ex_internal"), (TensorBase, "__reduce_ex__")):
            patch.setattr(kind, name, device.refusing_pickle(getattr(kind, name)))
        for module in (plan, inference_model):
            patch.setattr(module, "choose_device", lambda name: DEVICE if name == NAME else choose_device(name))
        for config in (FitConfig, PredictConfig):
            (option,) = (option for option in fields(config) if option.name == "device")
            setting = setting_of(option)
            patch.setattr(option, "metadata", {"setting": replace(setting, choices=(*setting.choices, NAME))})
        yield device
