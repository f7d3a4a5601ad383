"""A stand-in for a GPU on a machine that has none.

Inside `StandInGPU`, tensors on ``cuda`` have a shape, a type, a layout and a device, but no
numbers (PyTorch's FakeTensorMode). Tensors on the CPU are real. Code that mixes devices or types
fails as on a GPU. Operations for which the host would wait for the GPU are noted.

It needs a build of PyTorch with CUDA. It also needs a process of its own, because it changes
PyTorch's accelerator. It cannot show numbers, SyncBatchNorm, the reducer of
DistributedDataParallel, CUDA graphs, Triton or fused attention. It uses several private names of
PyTorch, because there is no public way. If a new version of PyTorch changes them, the tests fail
at once.
"""

import contextlib
import traceback
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple
from unittest import mock

import torch
import torch._dynamo
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils import _pytree, backend_registration
from torch.utils._python_dispatch import TorchDispatchMode

import moco
from scripts.gpu_parts.waiting_operations import WAITING_OPERATIONS

GPU = torch.device("cuda", 0)
PACKAGE = str(Path(moco.__file__).resolve().parent) + "/"
GPU_MEMORY = 2**36
PRODUCTS = {"addmm", "baddbmm", "bmm", "convolution", "mm"}
TYPE_OF_DEVICE = torch.ops.prim.device.default


class Wait(NamedTuple):
    """Something that makes the host wait for the GPU."""

    what: str
    where: str
    """File and function of the innermost frame of our package, such as ``bad_steps.py: _read``."""


# One for the whole process: every stand-in uses what the package caches, such as window grids.
FAKE = FakeTensorMode(allow_non_fake_inputs=True)


class StandInGPU(TorchDispatchMode):
    """Inside this context, ``cuda`` is a GPU without numbers.

    Attributes:
        waits: all that would have made the host wait, in order.
    """

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[Wait] = []
        self.in_engine = False  # autograd's engine is running a backward pass
        self.patches = contextlib.ExitStack()

    def __enter__(self):
        torch._C._ensureCUDADeviceGuardSet()
        with contextlib.suppress(RuntimeError):  # once in a process
            # Autograd's engine then asks no driver for streams.
            backend_registration._setup_privateuseone_for_python_backend("standin")
        before = torch._C._only_lift_cpu_tensors()
        self.patches.callback(torch._C._set_only_lift_cpu_tensors, before)
        # torch.tensor(..., device="cuda") is made on the CPU first.
        torch._C._set_only_lift_cpu_tensors(True)
        for target, name, value in [*self.cuda(), *self.internals()]:
            self.patches.enter_context(mock.patch.object(target, name, value))
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self.patches.close()

    def cuda(self) -> Iterator[tuple[object, str, object]]:
        """Yield the patches of `torch.cuda`, and those that save and move fake tensors."""
        state = torch.zeros(16, dtype=torch.uint8)
        properties = SimpleNamespace(name="a stand-in", total_memory=GPU_MEMORY, major=9, minor=0)
        answers = {
            "_lazy_init": None,
            "current_device": 0,
            "device_count": 1,
            "empty_cache": None,
            "get_device_capability": (9, 0),
            "get_device_name": "a stand-in",
            "get_device_properties": properties,
            "get_rng_state": state,
            "get_rng_state_all": [state],
            "is_available": True,
            "is_bf16_supported": True,
            "manual_seed_all": None,
            "set_device": None,
            "set_rng_state": None,
            "set_rng_state_all": None,
        }
        for name, answer in answers.items():
            yield torch.cuda, name, lambda *_, answer=answer, **__: answer
        yield torch.cuda, "synchronize", lambda *_: self.note("synchronize")
        yield torch.accelerator, "current_accelerator", lambda *_, **__: torch.device("cuda")
        yield torch.Tensor, "pin_memory", lambda tensor, *_: tensor
        # Weights without numbers stay where they are.
        yield torch.nn.Module, "cpu", lambda module: module
        save = torch.save

        def save_zeros(content, *more, **options):
            save(with_zeros(content), *more, **options)

        yield torch, "save", save_zeros

    def internals(self) -> Iterator[tuple[object, str, object]]:
        """Yield the patches by which autograd's engine and fake tensors need no driver."""
        run = torch.autograd.graph._engine_run_backward
        device_of = fake_tensor._DISPATCH_META_HANDLERS[TYPE_OF_DEVICE]

        def run_backward(*args, **kwargs):
            self.in_engine = True
            try:
                with torch.autograd.set_multithreading_enabled(False):
                    return run(*args, **kwargs)
            finally:
                self.in_engine = False

        def device_asked_for(args):
            # The engine would look for a stream of the device.
            return torch.device("meta") if self.in_engine else device_of(args)

        handlers = {**fake_tensor._DISPATCH_META_HANDLERS, TYPE_OF_DEVICE: device_asked_for}
        yield fake_tensor, "_DISPATCH_META_HANDLERS", handlers
        yield FakeTensorMode, "avoid_device_init", property(lambda _: True)
        yield torch.autograd, "_engine_run_backward", run_backward
        yield torch.autograd.graph, "_engine_run_backward", run_backward

    def note(self, what: str) -> None:
        """Note that the host would wait here."""
        where = "outside"
        for frame in reversed(traceback.extract_stack()):
            if frame.filename.startswith(PACKAGE):
                where = f"{Path(frame.filename).name}: {frame.name}"
                break
        self.waits.append(Wait(what, where))

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        # Within a kernel, it is not the engine that asks for the device of a tensor.
        in_engine = self.in_engine
        self.in_engine = False
        try:
            return self.compute(function, args, dict(kwargs or {}), in_engine)
        finally:
            self.in_engine = in_engine

    def compute(self, function, args, kwargs, in_engine):
        """Run an operation, or its replacement on the GPU."""
        name = function.overloadpacket.__name__
        if name == "device":
            if not isinstance(args[0], FakeTensor):
                return function(*args)
            return torch.device("meta") if in_engine else args[0].fake_device
        if in_engine and str(kwargs.get("device")) == "meta":
            kwargs["device"] = GPU
        leaves = _pytree.arg_tree_leaves(*args, **kwargs)
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        given = kwargs.get("device")
        target = None if given is None else torch.device(given).type
        if target != "cuda" and not any(isinstance(tensor, FakeTensor) for tensor in tensors):
            return function(*args, **kwargs)
        if name in WAITING_OPERATIONS:
            self.note(name)
            if name == "_local_scalar_dense":
                return number_for(tensors[0])
            if name == "bincount":
                bins = args[2] if len(args) > 2 else kwargs.get("minlength", 0)
                with FAKE:
                    return torch.empty(max(bins, 1), dtype=torch.long, device=GPU)
            if name == "nonzero":
                with FAKE:
                    return torch.empty(0, tensors[0].ndim, dtype=torch.long, device=GPU)
        if name == "_to_copy":
            if isinstance(tensors[0], FakeTensor) and target == "cpu":
                self.note("copy to the host")
                return torch.zeros(tensors[0].shape, dtype=kwargs.get("dtype") or tensors[0].dtype)
            if not isinstance(tensors[0], FakeTensor) and not kwargs.get("non_blocking"):
                self.note("copy from the host")
        if name == "copy_" and not all(isinstance(tensor, FakeTensor) for tensor in tensors[:2]):
            is_blocking = not (kwargs.get("non_blocking") or (len(args) > 2 and args[2]))
            if is_blocking:
                self.note("copy_ between devices")
            return args[0]
        if (
            name.startswith(("index", "_index_put"))
            and len(args) > 1
            and isinstance(args[1], (list, tuple))
        ):
            indices = [index for index in args[1] if index is not None]
            if any(index.dtype is torch.bool for index in indices):
                self.note("index that is a mask")
                return args[0]
            if not all(isinstance(index, FakeTensor) for index in indices):
                self.note("index on the host")
        if name in PRODUCTS:
            kinds = {tensor.dtype for tensor in tensors}
            assert len(kinds) == 1, f"{name} of {sorted(map(str, kinds))}"
        if name.startswith("_fused_"):  # there are none without numbers
            assert {tensor.device for tensor in tensors} == {GPU}, name
            return None
        with FAKE:
            return function(*args, **kwargs)


def number_for(tensor):
    """Return a number that a healthy run might read.

    A truth value is true where the code asks whether something is finite, and false elsewhere.
    """
    if tensor.dtype is torch.bool:
        for frame in traceback.extract_stack()[-14:]:
            line = frame.line or ""
            if ".isfinite()" in line and "~" not in line:
                return True
        return False
    return 0.5 if tensor.is_floating_point() else 1


def with_zeros(content):
    """Return the content with zeros on the CPU in place of tensors without numbers."""
    return _pytree.tree_map_only(
        FakeTensor, lambda tensor: torch.zeros(tensor.shape, dtype=tensor.dtype), content
    )
