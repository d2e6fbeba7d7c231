"""What stands in for a CUDA graph on a CPU: operators are written down with their tensors, and called
again.

As with CUDA's, capturing computes nothing: what its operators wrote is undone. A replay calls the same
operators on the same memory, with the Python numbers of the capture, and runs nothing else of Python. What
makes the host wait for a number is refused. Not so: memory is never reused here, and there is one stream.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch._C._distributed_c10d import FakeWork, Work
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

aten: Any = torch.ops.aten
WAITS = (aten._local_scalar_dense, aten.nonzero, aten.equal, aten.is_nonzero, aten.masked_select)


class RecordedGraph:
    """torch.cuda.CUDAGraph's part that training uses."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, tuple, dict, list[Tensor]]] = []

    def register_generator_state(self, state: Any) -> None:
        pass

    def replay(self) -> None:
        with torch.no_grad(), torch._C._AutoDispatchBelowAutograd():
            for function, args, kwargs, made in self.calls:
                again = _tensors(_call(function, args, kwargs))
                for mine, new in zip(made, again, strict=True):
                    if _memory(mine) not in map(_memory, _tensors((args, kwargs))):
                        mine.copy_(new)


class _Recorder(TorchDispatchMode):
    def __init__(self, graph: RecordedGraph) -> None:
        super().__init__()
        self._graph = graph
        self._own: set[int] = set()
        self._before: dict[int, tuple[Any, Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.overloadpacket in WAITS:
            raise RuntimeError(
                f"{func}: the host would wait for a number while a graph is captured"
            )
        for tensor in _written(func, args, kwargs):
            storage = tensor.untyped_storage()
            if _memory(tensor) not in self._own:
                self._before.setdefault(_memory(tensor), (storage, storage.clone()))
        output = _call(func, args, kwargs)
        made = _tensors(output)
        self._own |= {_memory(t) for t in made} - {_memory(t) for t in _tensors((args, kwargs))}
        self._graph.calls.append((func, args, kwargs, made))
        return output

    def undo(self) -> None:
        for storage, before in self._before.values():
            storage.copy_(before)


@contextlib.contextmanager
def recorded(graph: RecordedGraph, **_: Any) -> Iterator[None]:
    """torch.cuda.graph's part."""
    recorder = _Recorder(graph)
    with recorder:
        yield
    recorder.undo()


def _call(function: Any, args: tuple, kwargs: dict) -> Any:
    """A collective is done when it returns: a replay waits for none."""

    def done(leaf: Any) -> Any:
        if isinstance(leaf, torch.ScriptObject):
            Work.unbox(leaf).wait()
            return Work.boxed(FakeWork())
        return leaf

    output = function(*args, **kwargs)
    return tree_map(done, output) if function.namespace == "c10d" else output


def _written(function: Any, args: tuple, kwargs: dict) -> list[Tensor]:
    if function.namespace == "c10d":  # it does not say what it writes
        return _tensors(args)
    named = dict(zip((a.name for a in function._schema.arguments), args, strict=False)) | kwargs
    return [
        tensor
        for argument in function._schema.arguments
        if argument.alias_info is not None and argument.alias_info.is_write
        for tensor in _tensors(named.get(argument.name))
    ]


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
