"""The block that carries a prompt, and which prompts and maps a forward pass uses."""

from __future__ import annotations

from contextvars import ContextVar
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor

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
