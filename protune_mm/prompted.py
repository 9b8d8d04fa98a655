"""The block that carries a prompt, and which prompts and maps a forward pass uses."""

from __future__ import annotations

from contextvars import ContextVar
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn
from torch.utils._pytree import tree_map

plain_maps: ContextVar[list[tuple[Tensor, Tensor]] | None] = ContextVar(
    'protune_mm_plain_maps', default=None
)
"""Prompted and plain output of each block whose stage shows the plain one, in this forward."""
choice: ContextVar[Any] = ContextVar('protune_mm_choice', default=None)
"""Which prompts this forward pass uses; None: those that the blocks carry."""
sets_of: WeakKeyDictionary = WeakKeyDictionary()
"""Backbone to its :class:`protune_mm.prompt_sets.PromptSets`."""


class PromptedBlock:
    """Mixin for the block that carries a prompt, as its child ``prompt``."""

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Run the stock block and join the prompt to its output."""
        out = super().forward(*args, **kwargs)
        site = self._protune_site
        chosen = choice.get()
        if chosen is None:
            joined = site.layout.join(site, self.prompt, out, args, kwargs)
        else:
            joined = chosen.join(self, out, args, kwargs)
        plain = plain_maps.get()
        if plain is not None and site.plain:
            plain.append((joined, out))
        return joined


def show_plain(backbone: nn.Module, out: Any, plain: list[tuple[Tensor, Tensor]]) -> Any:
    """What a backbone returns, with the maps of its stages as they are before their prompt.

    Args:
        backbone: a :class:`protune_mm.frozen.ProTunedBackbone` with ``features='plain'``.
        out: what it returns.
        plain: prompted and plain output of the blocks at the end of all stages but the last.

    Raises:
        RuntimeError: it returns none of these outputs itself, but what it computes from them.
    """
    replaced = 0

    def replace(x: Any) -> Any:
        nonlocal replaced
        for prompted, before in plain:
            if x is prompted:
                replaced += 1
                return before
        return x

    shown = tree_map(replace, out)
    if plain and not replaced:
        raise RuntimeError(
            f"prompt.features='plain': {type(backbone).__name__} returns no output of a stage "
            "before the last as it is: use features='prompted'"
        )
    return shown
