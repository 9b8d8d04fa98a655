"""Many tasks on one frozen backbone: named sets of prompts that are switched, or run together."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from mmengine.runner.checkpoint import CheckpointLoader
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from .base_weights import wrong_base
from .checkpoints import identities
from .files import whole_file
from .identity import KEY, Identity
from .loading import check_tuned
from .probe import with_checkpoints
from .prompted import PromptedBlock, choice, sets_of
from .tuned import backbones, heads, prompts

_used: ContextVar[WeakKeyDictionary | None] = ContextVar('protune_mm_used_set', default=None)
"""Backbone to the name of the set that this thread (or task of asyncio) uses."""
STOCK = None
"""Instead of a name: no prompts, which is the stock backbone."""


class PromptSets:
    """Named sets of prompts on one frozen backbone.

    All sets have the places and the prompt type of the backbone; what differs is their weights.
    The prompts that the backbone has already are the first set.

    - :meth:`add`, :meth:`load`, :meth:`save`, :meth:`remove`, ``list(sets)``: the sets.
    - :meth:`switch` chooses for everyone, :meth:`use` for a ``with`` block of this thread. A
      forward pass that has begun keeps its set.
    - :meth:`disable` (or ``switch(None)``): exactly the stock backbone.
    - :meth:`together`: several tasks for the same images in one call.

    Args:
        model: a Pro-tuned backbone, or a model with one.
        name: of the set that its prompts are. Default ``'default'``.

    Raises:
        ValueError: there is not exactly one Pro-tuned backbone with prompts, or it has sets
            already.

    Example:
        >>> sets = protune_mm.PromptSets(backbone, 'birds')
        >>> sets.load('cars', 'cars.pth')
        >>> with sets.use('cars'):
        ...     maps = backbone(images)
        >>> maps = sets.together(images, ['birds', 'cars'])['birds']
    """

    def __init__(self, model: nn.Module, name: str = 'default') -> None:
        found = list(backbones(model).values())
        if len(found) != 1 or not prompts(found[0]):
            raise ValueError(
                f'{type(model).__name__} has {len(found)} Pro-tuned backbones'
                f'{", without prompts" if found else ""}: prompt sets need one with prompts'
            )
        self.backbone = found[0]
        if self.backbone in sets_of:
            raise ValueError(f'{type(self.backbone).__name__} has prompt sets already')
        self._blocks = [m for m in self.backbone.modules() if isinstance(m, PromptedBlock)]
        asked = with_checkpoints(self.backbone)
        inside = [list(module.modules())[1:] for module in asked]
        # What only hands the flag on has others with it inside, and computes nothing again.
        again = {m for parts in inside if not any(each in asked for each in parts) for m in parts}
        self._recomputed = any(block in again for block in self._blocks)
        self._sets: dict[str, tuple[nn.Module, ...]] = {}
        self._sets[_checked(name)] = tuple(block.prompt for block in self._blocks)
        self.current: str | None = name
        sets_of[self.backbone] = self

    def __iter__(self) -> Iterator[str]:
        return iter(list(self._sets))

    def __len__(self) -> int:
        return len(self._sets)

    def __contains__(self, name: object) -> bool:
        return name in self._sets

    def __getitem__(self, name: str) -> tuple[nn.Module, ...]:
        """The prompts of a set, in the order of the backbone's modules.

        Raises:
            KeyError: there is no such set.
        """
        if name not in self._sets:
            raise KeyError(f"there is no prompt set '{name}': there are {', '.join(self._sets)}")
        return self._sets[name]

    def add(self, name: str) -> None:
        """Add a set at its start, which (but for ``last='series'``) changes nothing until trained.

        Raises:
            ValueError: the name is taken.
        """
        self._put(name, [self._fresh(block) for block in self._blocks])

    def load(self, name: str, source: str | Path | dict) -> None:
        """Add a set from a checkpoint of a model that was tuned on the same base.

        Args:
            name: of the set.
            source: a file (or address), tuned-only or whole, of the backbone or of a whole model;
                or a ``state_dict``. Neck and head in it are left to who uses them.

        Raises:
            ValueError: the name is taken, the file cannot be read, or its prompts are of another
                type, size or place.
            RuntimeError: it was tuned on another base.
        """
        if not isinstance(source, dict):
            loaded = CheckpointLoader.load_checkpoint(str(source), map_location='cpu')
            source = loaded.get('state_dict', loaded)
        state = {key.removeprefix('module.'): value for key, value in source.items()}
        places = [key for key in state if f'.{key}'.endswith(f'.{KEY}.fingerprint')]
        if len(places) != 1:
            raise ValueError(
                f"prompt set '{name}': the checkpoint holds the prompts of {len(places)} backbones "
                'of protune_mm, not of one'
            )
        prefix = places[0].removesuffix(f'{KEY}.fingerprint')
        told = Identity.pop(state, prefix)
        check_tuned(self.backbone, told, state, prefix)
        if self.backbone.protune_fingerprint() != told.fingerprint:
            raise RuntimeError(wrong_base(self.backbone, told))
        made = []
        for path, block in zip(prompts(self.backbone), self._blocks, strict=True):
            prompt = self._fresh(block)
            start = f'{prefix}{path}.'
            own = {k.removeprefix(start): v for k, v in state.items() if k.startswith(start)}
            prompt.load_state_dict(own)
            made.append(prompt)
        self._put(name, made)

    def save(self, name: str, path: str | Path) -> None:
        """Write a set as a tuned-only checkpoint of the backbone."""
        state: dict[str, Tensor] = {}
        for place, prompt in zip(prompts(self.backbone), self[name], strict=True):
            state |= {f'{place}.{key}': value for key, value in prompt.state_dict().items()}
        for place, head in heads(self.backbone).items():
            state |= {f'{place}.{key}': value for key, value in head.state_dict().items()}
        with whole_file(Path(path)) as partial:
            torch.save(dict(state_dict={**state, **identities(self.backbone)}), partial)

    def remove(self, name: str) -> None:
        """Forget a set.

        Raises:
            KeyError: there is no such set.
            ValueError: it is the one in use.
        """
        prompts_of = self[name]
        if name == self.current or self._blocks[0].prompt is prompts_of[0]:
            raise ValueError(f"prompt set '{name}' is in use: switch to another one first")
        del self._sets[name]

    def switch(self, name: str | None) -> None:
        """Choose the set of every forward pass that begins from now on, in all threads.

        It also becomes what ``tuned_parameters``, ``state_dict`` and an optimizer built from now
        on see: so it can be trained.

        Args:
            name: of a set; None: no prompts.

        Raises:
            KeyError: there is no such set.
        """
        if name is not STOCK:
            for block, prompt in zip(self._blocks, self[name], strict=True):
                block._modules['prompt'] = prompt
        self.current = name

    def disable(self) -> None:
        """Run the stock backbone until the next :meth:`switch`."""
        self.switch(STOCK)

    @contextmanager
    def use(self, name: str | None) -> Iterator[None]:
        """Choose the set for this thread, inside a ``with`` block.

        Args:
            name: of a set; None: no prompts.

        Raises:
            KeyError: there is no such set.
        """
        if name is not STOCK:
            self[name]
        before = _used.get()
        token = _used.set(WeakKeyDictionary({**(before or {}), self.backbone: name}))
        try:
            yield
        finally:
            _used.reset(token)

    def together(self, images: Tensor, names: Sequence[str | None]) -> dict[str | None, Any]:
        """Run several tasks on the same images; what is frozen before the first prompt runs once.

        After the first prompt the tasks run as one batch. A backbone that joins maps from before
        and after its first prompt runs the tasks one by one.

        Args:
            images: what the backbone takes, ``(B, 3, H, W)``.
            names: of sets; None for the stock backbone.

        Returns:
            dict: name to what the backbone returns for it.

        Raises:
            KeyError: there is no such set.
            ValueError: no name, one twice, or the backbone is in training mode.
        """
        names = list(names)
        if not names or len(set(names)) != len(names):
            raise ValueError(f'together({names}): name each set once, and one at least')
        if any(module.training for group in self._sets.values() for module in group):
            raise ValueError('together() is for inference: call eval() first')
        several = _Several(self.backbone, [self._chosen(name) for name in names], len(images))
        token = choice.set(several)
        try:
            out = self.backbone(images)
            parts = several.split(out)
        except RuntimeError:
            # Maps of B and of T * B images do not go together.
            parts = None
        finally:
            choice.reset(token)
        if parts is None:
            parts = []
            for name in names:
                with self.use(name):
                    parts.append(self.backbone(images))
        return dict(zip(names, parts, strict=True))

    def to(self, *args: Any, **kwargs: Any) -> PromptSets:
        """Move all sets, as ``nn.Module.to``; the backbone moves those in use itself."""
        for group in self._sets.values():
            for prompt in group:
                prompt.to(*args, **kwargs)
        return self

    def train(self, mode: bool = True) -> PromptSets:
        """Set the mode of all sets; ``train`` and ``eval`` of the backbone do it."""
        for group in self._sets.values():
            for prompt in group:
                prompt.train(mode)
        return self

    def chosen(self) -> _One:
        """The prompts of a forward pass that begins now.

        Raises:
            RuntimeError: they are not those that blocks with ``with_cp=True`` find in backward.
        """
        used = _used.get()
        name = used[self.backbone] if used and self.backbone in used else self.current
        chosen = self._chosen(name)
        other = any(prompt is not block.prompt for block, prompt in chosen.items())
        if other and self._recomputed and torch.is_grad_enabled():
            raise RuntimeError(
                f'{type(self.backbone).__name__} has with_cp=True: its blocks are computed again '
                f"in backward, with other prompts than those of '{name}'; switch('{name}') first, "
                'use with_cp=False, or torch.no_grad()'
            )
        return _One(chosen)

    def _chosen(self, name: str | None) -> dict[nn.Module, nn.Module | None]:
        if name is STOCK:
            return dict.fromkeys(self._blocks)
        return dict(zip(self._blocks, self[name], strict=True))

    def _fresh(self, block: nn.Module) -> nn.Module:
        prompt = copy.deepcopy(block.prompt)
        with torch.random.fork_rng(devices=[]):
            prompt.init_weights()
        return prompt

    def _put(self, name: str, made: list[nn.Module]) -> None:
        if name in self._sets:
            raise ValueError(f"prompt set '{name}' is there already: remove it first")
        self._sets[_checked(name)] = tuple(made)


def _checked(name: object) -> str:
    if not isinstance(name, str) or not name:
        raise ValueError(f'{name!r} is no name of a prompt set: use a string')
    return name


def _join(block: nn.Module, prompt: nn.Module | None, out: Any, args: tuple, kwargs: dict) -> Any:
    site = block._protune_site
    return out if prompt is None else site.layout.join(site, prompt, out, args, kwargs)


@dataclass
class _One:
    """One set, for one forward pass."""

    prompts: dict[nn.Module, nn.Module | None]

    def begin(self, backbone: nn.Module) -> None:
        """A forward pass begins: there is nothing to forget."""

    def join(self, block: nn.Module, out: Any, args: tuple, kwargs: dict) -> Any:
        return _join(block, self.prompts.get(block, block.prompt), out, args, kwargs)


@dataclass
class _Several:
    """Several sets, for one forward pass: from the first prompt on they are one batch."""

    backbone: nn.Module
    sets: list[dict[nn.Module, nn.Module | None]]
    images: int
    joined: bool = False

    def begin(self, backbone: nn.Module) -> None:
        """A forward pass begins, with one batch for all."""
        if backbone is self.backbone:
            self.joined = False

    def join(self, block: nn.Module, out: Any, args: tuple, kwargs: dict) -> Any:
        made = []
        for i, prompts_of in enumerate(self.sets):
            mine = (out, args, kwargs)
            if self.joined:
                mine = tree_map(lambda x, i=i: self._part(x, i), mine)
            made.append(_join(block, prompts_of.get(block, block.prompt), *mine))
        self.joined = True
        leaves, spec = zip(*(tree_flatten(m) for m in made), strict=True)
        merged = [
            torch.cat(group) if isinstance(group[0], Tensor) else group[0]
            for group in zip(*leaves, strict=True)
        ]
        return tree_unflatten(merged, spec[0])

    def _part(self, x: Any, i: int) -> Any:
        if not isinstance(x, Tensor) or x.ndim < 2 or len(x) % len(self.sets):
            return x
        return x.chunk(len(self.sets))[i]

    def split(self, out: Any) -> list:
        """What the backbone would return for each set alone."""
        whole = self.images * len(self.sets)

        def part(x: Any, i: int) -> Any:
            if isinstance(x, Tensor) and self.joined and len(x) == whole:
                return x.chunk(len(self.sets))[i]
            return x

        return [tree_map(lambda x, i=i: part(x, i), out) for i in range(len(self.sets))]
