"""How many bytes a forward pass keeps for backward: exact, on any device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Storages(TorchDispatchMode):
    """Weak references to every storage that operations make."""

    def __init__(self) -> None:
        super().__init__()
        self.made: dict[int, tuple[StorageWeakRef, int]] = {}

    def alive(self) -> int:
        """Bytes of those that are still there."""
        return sum(size for storage, size in self.made.values() if not storage.expired())

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if is_tensor(t)}
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            # A view of, or a change to, something older makes no storage.
            if is_tensor(leaf) and leaf.untyped_storage()._cdata not in given:
                storage = leaf.untyped_storage()
                self.made[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        return out


def kept_bytes(forward: Callable[..., Any], *inputs: Any) -> int:
    """Bytes that one forward pass leaves alive for its backward pass.

    Every storage that the forward pass made and that is alive once its outputs and temporaries
    are dropped counts, also what is kept outside ``save_for_backward``. Parameters, buffers,
    inputs and values that an earlier pass made (folded weights) do not.

    Args:
        forward: a module, in the mode in which it is to be measured, or any function that returns
            tensors, or lists or dicts of them. It runs twice.
        *inputs: handed to ``forward``.

    Returns:
        int: bytes.
    """
    forward(*inputs)  # Values that are made once are made here.
    with Storages() as storages:
        # The node of a view holds the graph behind it, but no data; the Python object of a node of
        # our own would not hold it.
        outputs = [leaf for leaf in tree_leaves(forward(*inputs)) if is_tensor(leaf)]
        nodes = [out.view_as(out).grad_fn for out in outputs]
        del outputs
    alive = storages.alive()
    del nodes
    return alive


def is_tensor(value: object) -> bool:
    """Whether a value is a tensor."""
    return isinstance(value, Tensor)
