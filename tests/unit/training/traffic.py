"""What a training step costs a GPU's host: waiting for the device, and launching operations.

A machine without a GPU counts it with PyTorch's "meta" device in the GPU's place: tensors there
have no values, so each operation that would make the host wait for one is seen, and answered by a
one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

DEVICE = torch.device("meta")
HOST = torch.device("cpu")
_aten = torch.ops.aten
_WAITS = {  # their result's value or size depends on values
    _aten._local_scalar_dense.default,
    _aten.is_nonzero.default,
    _aten.nonzero.default,
    _aten.masked_select.default,
    _aten.equal.default,
    _aten._unique2.default,
}
_NOTHING = {  # computed, that is
    _aten.empty.memory_format,
    _aten.empty_like.default,
    _aten.empty_strided.default,
    _aten._unsafe_view.default,
    _aten.detach.default,
}
_COPIES = {_aten._to_copy.default, _aten.copy_.default}


class Traffic:
    """What was counted.

    Attributes:
        waits: how often the host waited for the device, by operation.
        launches: operations that the device computed, by name; views aren't any.
    """

    def __init__(self) -> None:
        self.waits: Counter[str] = Counter()
        self.launches: Counter[str] = Counter()


@contextmanager
def counted() -> Iterator[Traffic]:
    """Counts what happens inside."""
    traffic = Traffic()
    with _Calls(traffic), _Operations(traffic):
        yield traffic


class _Calls(TorchFunctionMode):
    """Sees numbers that become a device's tensors, which no operation below tells of."""

    def __init__(self, traffic: Traffic) -> None:
        super().__init__()
        self._traffic = traffic

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        made = func in (torch.tensor, torch.as_tensor) and not isinstance(args[0], Tensor)
        if made and result.device == DEVICE:
            self._traffic.waits["copy to device"] += 1
        return result


class _Operations(TorchDispatchMode):
    def __init__(self, traffic: Traffic) -> None:
        super().__init__()
        self._waits, self._launches = traffic.waits, traffic.launches

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        options = dict(kwargs or {})
        given = _tensors([args, options])
        on_device = any(tensor.device == DEVICE for tensor in given)
        if func in _WAITS and on_device:
            self._waits[str(func)] += 1
            return 1.0 if func is _aten._local_scalar_dense.default else True
        copied = func is _aten._to_copy.default and on_device
        if copied and options.get("device") is not None and options["device"].type == "cpu":
            self._waits["copy to host"] += 1
            return torch.ones(args[0].shape, dtype=options.get("dtype") or args[0].dtype)
        result = func(*args, **options)
        made = _tensors(result)
        devices = {tensor.device for tensor in [*given, *made]}
        if func in _COPIES and len(devices) > 1:
            queued = options.get("non_blocking", False) or any(arg is True for arg in args)
            if not queued:
                self._waits["copy to device"] += 1
        if func is _aten.index.Tensor and len(devices) > 1:
            self._waits["indices to device"] += 1
        computes = not func.is_view and func not in _NOTHING
        if computes and DEVICE in {tensor.device for tensor in made}:
            self._launches[str(func)] += 1
        return result


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
