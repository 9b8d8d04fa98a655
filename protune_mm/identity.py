"""Which base a Pro-tuned backbone runs on, as tensors beside its prompts.

A file of prompts alone is right on one base only. What says which base that is has to be in the
``state_dict``: neither ``meta`` nor ``init_cfg`` reaches a model built by the libraries' own
inference functions.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from .weights import BY_SIZE

KEY = 'prompt_base'
"""Below this name, inside a backbone, lie the tensors that say what it was tuned on."""


@dataclass
class Identity:
    """What a file says of the backbone that its prompts belong to.

    Attributes:
        fingerprint: of the frozen weights, 32 hexadecimal digits; empty: unknown.
        origin: where these weights came from: ``checkpoint`` (URL or path) and, where only a part
            of that file was read, ``prefix``. Empty: unknown.
        options: what of the way it was Pro-tuned decides what its prompts compute.
    """

    fingerprint: str = ''
    origin: dict = field(default_factory=dict)
    options: dict = field(default_factory=dict)

    def tensors(self, prefix: str = '') -> dict[str, Tensor]:
        """The identity as uint8 tensors: what is added to a ``state_dict``.

        Args:
            prefix: name of the backbone inside the model, with a dot at its end.
        """
        return {
            f'{prefix}{KEY}.fingerprint': _bytes(bytes.fromhex(self.fingerprint)),
            f'{prefix}{KEY}.origin': _bytes(_json(self.origin)),
            f'{prefix}{KEY}.options': _bytes(_json(self.options)),
        }

    @classmethod
    def pop(cls, state_dict: dict, prefix: str = '') -> Identity | None:
        """Take the identity out of a ``state_dict``; None where it holds none.

        Raises:
            ValueError: what is there cannot be read.
        """
        found = {}
        for part in ('fingerprint', 'origin', 'options'):
            tensor = state_dict.pop(f'{prefix}{KEY}.{part}', None)
            if tensor is not None:
                found[part] = tensor
        if not found:
            return None
        try:
            raw = {part: bytes(tensor.cpu().tolist()) for part, tensor in found.items()}
            told = cls(
                raw['fingerprint'].hex(), json.loads(raw['origin']), json.loads(raw['options'])
            )
        except (KeyError, ValueError, AttributeError, TypeError) as error:
            raise ValueError(
                f'the checkpoint does not say on which base it was tuned ({prefix}{KEY} is '
                f'damaged: {error}): use another copy of it'
            ) from error
        if not isinstance(told.origin, dict) or not isinstance(told.options, dict):
            raise ValueError(f'the checkpoint is damaged: {prefix}{KEY} holds no names')
        return told

    def base(self) -> str:
        """The base in words, for messages."""
        return describe(self.fingerprint, self.origin)


def describe(fingerprint: str, origin: dict) -> str:
    """A base in words: its fingerprint, and where it came from."""
    where = origin.get('checkpoint')
    return f'{fingerprint[:12]} ({where or "of unknown origin"})'


def _json(value: dict) -> bytes:
    return json.dumps(value, sort_keys=True, default=str).encode()


def _bytes(raw: bytes) -> Tensor:
    return torch.tensor(list(raw), dtype=torch.uint8)


def identifying(backbone: nn.Module, frozen: Iterable[tuple[str, Tensor]]) -> Iterator[tuple]:
    """The frozen tensors that a base is known by: all weights, no counters, no tables.

    Args:
        backbone: the backbone.
        frozen: names inside it, and tensors.
    """
    for name, tensor in frozen:
        if not tensor.is_floating_point():
            continue
        owner, _, key = name.rpartition('.')
        if key in BY_SIZE:
            continue
        if key not in backbone.get_submodule(owner)._non_persistent_buffers_set:
            yield name, tensor


def fingerprint(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """32 hexadecimal digits that depend on every bit, name, shape and dtype of some tensors."""
    h = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(tensors, key=lambda item: item[0]):
        h.update(name.encode())
        h.update(digest(tensor))
    return h.hexdigest()


def digest(tensor: Tensor) -> bytes:
    """16 bytes that depend on every bit, the shape and the dtype of a tensor."""
    flat = tensor.detach().to('cpu').contiguous().reshape(-1)
    h = hashlib.blake2b(f'{tensor.dtype}{tuple(tensor.shape)}'.encode(), digest_size=16)
    h.update(flat.view(torch.uint8).numpy())
    return h.digest()
