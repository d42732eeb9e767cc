"""A CUDA device for a machine without one: tensors that say "cuda", hold their values, and refuse to meet the CPU's.

`FakeTensorMode` alone cannot run this project: it has no values, so a decode loop cannot choose a token; its autograd
asks the driver for a stream; it accepts a CPU generator for a CUDA tensor. So every operation here runs on the CPU with
real values, and each storage carries the device that it would be on. Where an operation meets tensors of two devices,
`FakeTensorMode` is asked whether torch allows it, and refuses in torch's own words.

What is refused besides: a generator of the other device, `numpy()` of a CUDA tensor, `torch.autocast("cpu")`, an
operation that has no CUDA kernel, and a clock that is read while work is queued (`FakeCuda.clock`).
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
_ANY = torch.device("mtia")  # of what an operation makes for itself: it is wherever it is needed
_TorchGenerator = torch.Generator
# What torch takes because the values are on a CPU; on a GPU it would take another.
_CPU_TWINS = ("flash_attention_for_cpu", "mkldnn")


def device_of(tensor: Tensor) -> torch.device:
    """Where a tensor would be."""
    if tensor.device.type != "cpu":
        return tensor.device
    device: torch.device = getattr(tensor.untyped_storage(), "fake_device", CPU)
    return device


def _put(value: Any, device: torch.device) -> Any:
    for tensor in tree_leaves(value):
        if isinstance(tensor, Tensor) and tensor.device.type == "cpu":
            tensor.untyped_storage().fake_device = device  # type: ignore[attr-defined]
    return value


def _is_cuda(device: object) -> bool:
    return isinstance(device, (str, torch.device, int)) and torch.device(device).type == "cuda"


class _Generator(_TorchGenerator):
    """`torch.Generator`, also of the device that is not there."""

    fake_device = CPU

    def __new__(cls, device: torch.device | str = "cpu") -> _Generator:
        made: _Generator = super().__new__(cls)
        made.fake_device = CUDA if _is_cuda(device) else CPU
        return made

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return self.fake_device


class _Operations(TorchDispatchMode):
    """Beneath autograd, forward and backward: what each operation is given, and where its results are."""

    def __init__(self) -> None:
        super().__init__()
        self.num_queued = 0  # operations on CUDA tensors that nothing has waited for
        self.num_on_cuda = 0
        self.generator_device = CPU  # of the generator that the program has given last; torch wraps it again
        self.factory_device: torch.device | None = None  # what the program asks for; None: torch itself makes a tensor

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        devices = {device_of(tensor) for tensor in tensors} - {_ANY}
        requested_device = kwargs.get("device")
        if _is_cuda(requested_device):
            kwargs["device"], device = CPU, CUDA
        elif len(devices) > 1:
            device = _judge(func, args, kwargs)
        elif devices:
            device = devices.pop()
        else:
            device = _ANY if self.factory_device is None else self.factory_device
        if kwargs.get("generator") is not None and device not in (self.generator_device, _ANY):
            raise RuntimeError(
                f"{func}: Expected a '{device.type}' device type for generator but found '{self.generator_device.type}'"
            )
        known = {tensor.untyped_storage()._cdata for tensor in tensors}
        result = _run(func, args, kwargs)
        new = [t for t in tree_leaves(result) if isinstance(t, Tensor) and t.untyped_storage()._cdata not in known]
        _put(new, device)
        if device == CUDA:
            _check_kernel(func)
            self.num_on_cuda += 1
            is_read = not any(isinstance(leaf, Tensor) for leaf in tree_leaves(result)) and func._schema.returns
            self.num_queued = 0 if is_read else self.num_queued + 1
        return result


@contextlib.contextmanager
def _fake_mode() -> Iterator[FakeTensorMode]:
    """`FakeTensorMode`; torch 2.11's would begin with a tensor on the GPU that it is told of."""
    with mock.patch.object(torch.cuda, "is_available", lambda: False), FakeTensorMode() as mode:
        yield mode


def _judge(func: Any, args: Any, kwargs: Any) -> torch.device:
    """Where the results of an operation on tensors of both devices are.

    Raises:
        RuntimeError: torch does not allow it.
    """

    def fake(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        device = CUDA if device_of(leaf) == _ANY else device_of(leaf)
        return torch.empty_strided(leaf.size(), leaf.stride(), dtype=leaf.dtype, device=device)

    with _fake_mode():
        try:
            result = func(*tree_map(fake, args), **tree_map(fake, kwargs))
        except (DynamicOutputShapeException, DataDependentOutputException):
            return device_of(args[0])
    results = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
    return results[0].device if results else CUDA


def _run(func: Any, args: Any, kwargs: Any) -> Any:
    """The operation's result; of one that has no kernel for CPUs the shape is right, and the values are zeros."""
    try:
        return func(*args, **kwargs)
    except NotImplementedError:
        _check_kernel(func)
        with _fake_mode() as mode:
            fakes = tree_map(lambda leaf: mode.from_tensor(leaf) if isinstance(leaf, Tensor) else leaf, (args, kwargs))
            shapes = func(*fakes[0], **fakes[1])
        return tree_map(
            lambda leaf: torch.zeros(leaf.shape, dtype=leaf.dtype) if isinstance(leaf, Tensor) else leaf, shapes
        )


def _check_kernel(func: Any) -> None:
    name = func.name()
    if torch.version.cuda is None or any(twin in name for twin in _CPU_TWINS):
        return
    if not torch._C._dispatch_has_computed_kernel_for_dispatch_key(name, "CUDA"):
        raise NotImplementedError(f"{name} has no kernel for CUDA tensors")


class _Functions(TorchFunctionMode):
    """Above autograd: what a program asks about devices, and moves between them."""

    def __init__(self, operations: _Operations) -> None:
        super().__init__()
        self.operations = operations

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if isinstance(generator := kwargs.get("generator"), _TorchGenerator):
            self.operations.generator_device = getattr(generator, "fake_device", CPU)
        if func in _QUESTIONS:
            return _QUESTIONS[func](device_of(args[0]))
        if func in _MOVES:
            return self._move(func, *args, **kwargs)
        if func in (Tensor.numpy, Tensor.__array__) and device_of(args[0]) == CUDA:
            raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first.")
        if func is Tensor.backward:  # what runs again on the way back is to see this device, too
            with self:
                return torch.autograd.backward(args[0], *args[1:], **_renamed(kwargs))
        if func is torch._C._nn._parse_to:  # of `Module.to`: it makes nothing
            return func(*args, **kwargs)
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if not given or kwargs.get("device") is not None:
            return self._make(func, given, *args, **kwargs)
        result = func(*args, **kwargs)
        if func in (Tensor.tolist, Tensor.item):
            self.operations.num_queued = 0
        made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor) and device_of(leaf) == _ANY]
        if made:  # by torch itself, where its arguments are
            devices = {device_of(tensor) for tensor in given} - {_ANY}
            _put(made, devices.pop() if len(devices) == 1 else _ANY)
        return result

    def _make(self, func: Any, given: list[Tensor], *args: Any, **kwargs: Any) -> Any:
        """A tensor from nothing, from numbers, or like another one, on a device that is asked for."""
        device = torch.device(kwargs.get("device") or CPU)
        if device.type == "meta":
            return func(*args, **kwargs)
        device = CUDA if device.type == "cuda" else CPU
        if device == CUDA:
            kwargs["device"] = CPU
        before, self.operations.factory_device = self.operations.factory_device, device
        try:
            result = func(*args, **kwargs)
        finally:
            self.operations.factory_device = before
        if any(result is tensor for tensor in given):
            return result.to(device)
        return _put(result, device)

    def _move(self, func: Any, tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """`to`, `cpu` and `cuda`."""
        source = device_of(tensor)
        if tensor.is_meta:
            return func(tensor, *args, **kwargs)  # type: ignore[no-any-return]
        if func is Tensor.cpu:
            device, dtype = CPU, tensor.dtype
        elif func is Tensor.cuda:
            device, dtype = CUDA, tensor.dtype
        elif args and isinstance(args[0], Tensor):
            device, dtype = device_of(args[0]), args[0].dtype
            device = source if device == _ANY else device
        else:
            copy = kwargs.pop("copy", False)
            target_device, dtype, _, _ = torch._C._nn._parse_to(*args, **kwargs)
            kwargs["copy"] = copy
            device = source if target_device is None else CUDA if _is_cuda(target_device) else target_device
            dtype = tensor.dtype if dtype is None else dtype
        if device.type == "meta":
            return func(tensor, *args, **kwargs)  # type: ignore[no-any-return]
        if device == source:
            return tensor.to(dtype=dtype, copy=kwargs.get("copy", False))
        assert device == CUDA or not kwargs.get("non_blocking"), "what is copied so may be read before it has come"
        moved: Tensor = _put(tensor.to(dtype=dtype, copy=True), device)
        if device == CPU:
            self.operations.num_queued = 0
        return moved


_QUESTIONS: dict[Any, Callable[[torch.device], Any]] = {
    Tensor.device.__get__: lambda device: CUDA if device == _ANY else device,  # type: ignore[attr-defined]
    Tensor.is_cuda.__get__: lambda device: device.type == "cuda",  # type: ignore[attr-defined]
    Tensor.is_cpu.__get__: lambda device: device.type == "cpu",  # type: ignore[attr-defined]
    Tensor.get_device: lambda device: 0 if device.type == "cuda" else -1,
}
_MOVES = {Tensor.to, Tensor.cpu, Tensor.cuda}


def _renamed(kwargs: dict[str, Any]) -> dict[str, Any]:
    """`Tensor.backward`'s arguments as `torch.autograd.backward` calls them."""
    return {{"gradient": "grad_tensors"}.get(name, name): value for name, value in kwargs.items()}


class FakeCuda:
    """What a test may ask of the device."""

    def __init__(self, operations: _Operations) -> None:
        self._operations = operations

    @property
    def num_operations(self) -> int:
        """On CUDA tensors, so far."""
        return self._operations.num_on_cuda

    def synchronize(self, device: object = None) -> None:
        self._operations.num_queued = 0

    def clock(self) -> float:
        """`time.perf_counter` for a module that measures: what is queued must have been waited for.

        Raises:
            AssertionError: it was not.
        """
        assert not self._operations.num_queued, f"the clock is read while {self._operations.num_queued} operations run"
        return time.monotonic()


@contextlib.contextmanager
def fake_cuda(patch: pytest.MonkeyPatch) -> Iterator[FakeCuda]:
    """While it lasts there is one CUDA device, of compute capability 9.0, on this thread."""
    operations = _Operations()
    device = FakeCuda(operations)
    _patch_torch(patch, device)
    with _Functions(operations), operations:
        yield device


def _patch_torch(patch: pytest.MonkeyPatch, device: FakeCuda) -> None:
    cuda_functions: dict[str, Any] = {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": lambda _: None,
        "synchronize": device.synchronize,
        "get_device_name": lambda *_: "a GPU that is not there",
        "get_device_capability": lambda *_: (9, 0),
        "get_device_properties": lambda *_: SimpleNamespace(major=9, minor=0, total_memory=1 << 36),
        "is_bf16_supported": lambda *_, **__: True,
        "is_current_stream_capturing": lambda: False,
        "empty_cache": lambda: None,
        "max_memory_allocated": lambda *_: 1 << 30,
        "reset_peak_memory_stats": lambda *_: None,
        "mem_get_info": lambda *_: (1 << 36, 1 << 36),
        "get_rng_state": lambda *_: torch.get_rng_state(),
        "set_rng_state": lambda state, *_: torch.set_rng_state(state),
        "manual_seed_all": lambda _: None,
    }
    for name, function in cuda_functions.items():
        patch.setattr(torch.cuda, name, function)
    patch.setattr(torch, "Generator", _Generator)
    for module in (torch, torch.amp, torch.amp.autocast_mode):
        patch.setattr(module, "autocast", _autocast)
    is_enabled, dtype_of = torch.is_autocast_enabled, torch.get_autocast_dtype
    patch.setattr(torch, "is_autocast_enabled", lambda device_type="cuda": device_type == "cuda" and is_enabled("cpu"))
    patch.setattr(torch, "get_autocast_dtype", lambda _: dtype_of("cpu"))
    patch.setattr(torch.accelerator, "current_stream", lambda *_: SimpleNamespace(is_capturing=lambda: False))
    patch.setenv("HF_DEACTIVATE_ASYNC_LOAD", "1")  # this device is known to one thread


class _autocast(torch.amp.autocast_mode.autocast):
    """Autocasting as it is asked for on the device; the values are on a CPU."""

    def __init__(self, device_type: str, dtype: torch.dtype | None = None, enabled: bool = True, **kwargs: Any) -> None:
        self._is_on_cuda = device_type == "cuda"
        assert self._is_on_cuda or not enabled, f"autocast is asked for on {device_type!r}"
        super().__init__("cpu", dtype, enabled, **kwargs)

    def __enter__(self) -> Any:
        return super().__enter__() if self._is_on_cuda else self

    def __exit__(self, *error: Any) -> Any:
        return super().__exit__(*error) if self._is_on_cuda else None
