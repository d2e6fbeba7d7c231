"""What stands in for a CUDA graph on a CPU: operators are written down with their tensors, and called
again.

As with CUDA's, capturing computes nothing: what its operators wrote is undone. A replay calls the same
operators on the same memory, with the Python numbers of the capture, and runs nothing else of Python. What
makes the host wait for a number is refused, and a replay on memory that was made before the capture and
that nobody else holds any more: CUDA's would be on memory given out again. Not so: there is one stream.
"""

import collections
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
        self.inputs: dict[Tensor, int] = {}
        """One tensor of each memory that was there before, and how many there are of it in `calls`."""

    def register_generator_state(self, state: Any) -> None:
        pass

    def replay(self) -> None:
        for tensor, mine in self.inputs.items():
            if torch._C._storage_Use_Count(tensor.untyped_storage()._cdata) <= mine + 1:
                raise RuntimeError(
                    f"memory of {tuple(tensor.shape)} was given back since the capture"
                )
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
        if func is aten.lift_fresh.default:
            self._own |= {_memory(args[0])}  # a number of Python's
        self._own |= {_memory(t) for t in made} - {_memory(t) for t in _tensors((args, kwargs))}
        # As they are now: Transformer Engine empties a tensor, whose memory it has no more use for.
        held = tree_map(lambda x: x.detach() if isinstance(x, Tensor) else x, (args, kwargs, made))
        self._graph.calls.append((func, *held))
        return output

    def end(self) -> None:
        for storage, before in self._before.values():
            storage.copy_(before)
        held = {id(t): t for call in self._graph.calls for t in _tensors(call[1:])}.values()
        count = collections.Counter(map(_memory, held))
        inputs = {_memory(t): t for t in held if _memory(t) not in self._own}
        self._graph.inputs = {t: count[memory] for memory, t in inputs.items()}


@contextlib.contextmanager
def recorded(graph: RecordedGraph, **_: Any) -> Iterator[None]:
    """torch.cuda.graph's part."""
    recorder = _Recorder(graph)
    with recorder:
        yield
    recorder.end()


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
