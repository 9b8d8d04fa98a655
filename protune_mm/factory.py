"""``ProTuned``: what a config names to get a Pro-tuned backbone."""

from __future__ import annotations

import difflib
from typing import Any

from mmengine.registry import MODELS as ROOT
from mmengine.registry import DefaultScope
from torch import nn

from .inject import protune
from .registry import MODELS
from .stages import refusal


@MODELS.register_module()
def ProTuned(  # noqa: N802  (a registered type, spelled like one)
    base: str | type | None = None,
    *,
    stages: str | list[str] | None = None,
    prompt: str | dict | None = None,
    lean: bool | str | dict = True,
    policy: str = 'prompts',
    affine: bool = False,
    require_weights: bool = False,
    base_checkpoint: str | None = None,
    **backbone: Any,
) -> nn.Module:
    """Build a stock backbone and Pro-tune it.

    In a config: ``backbone=dict(type='protune_mm.ProTuned', base='ResNet', ...)``.

    Args:
        base: type of the stock backbone; without a prefix it is looked up in the current scope,
            as in a stock config.
        stages: see :func:`protune_mm.protune`, as all options down to ``base_checkpoint``.
        prompt: see there.
        lean: see there.
        policy: see there.
        affine: see there.
        require_weights: see there. Default False: a frozen backbone into which no weights were
            loaded warns at the first forward pass or the start of training.
        **backbone: the stock backbone's own arguments, forwarded unchanged.

    Returns:
        nn.Module: the stock backbone object itself, with prompts, frozen.

    Raises:
        ValueError: no or unknown ``base``, and what :func:`protune_mm.protune` raises.
    """
    if base is None:
        raise ValueError("type='protune_mm.ProTuned' needs base='...', the stock backbone's type")
    if _is_protuned(base):
        raise ValueError("base='protune_mm.ProTuned' nests Pro-tuning: name the stock backbone")
    kind = _look_up(base) if isinstance(base, str) else base
    reason = refusal(kind) if isinstance(kind, type) and policy != 'full' else None
    if reason:  # Told before it is built: it may need a library that is not there.
        raise ValueError(f'{kind.__name__} cannot be Pro-tuned: {reason}')
    built = ROOT.build(dict(type=base, **backbone))
    return protune(
        built,
        stages=stages,
        prompt=prompt,
        lean=lean,
        policy=policy,
        affine=affine,
        require_weights=require_weights,
        # Built just now, so its weights are still random and somebody has to load them, but where
        # its constructor has, as TIMMBackbone's does, and says by this that nothing is to be drawn.
        weights_given=bool(getattr(built, '_is_init', False)),
        base_checkpoint=base_checkpoint,
    )


def _is_protuned(kind: object) -> bool:
    """Whether a config's ``type`` is this factory, by name or as the object itself."""
    if isinstance(kind, str):
        return kind in ('protune_mm.ProTuned', f'{ProTuned.__module__}.ProTuned')
    return kind is ProTuned


def _look_up(base: str) -> type:
    with ROOT.switch_scope_and_registry(None) as registry:
        found = registry.get(base)
        if found is not None:
            return found
        known = list(registry.module_dict)
        scope = DefaultScope.get_current_instance()
        where = f"scope '{scope.scope_name}'" if scope else 'mmengine (no default scope is set)'
    near = difflib.get_close_matches(base.rpartition('.')[2], known, 1)
    hint = f"did you mean '{near[0]}'?" if near else "give its library, e.g. 'mmdet.ResNet'"
    raise ValueError(f"base='{base}' is no model of {where}: {hint}")
