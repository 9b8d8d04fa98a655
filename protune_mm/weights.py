"""Know whether a frozen backbone has received its pre-trained weights.

A frozen backbone without them is worthless, and stock loading of a file whose keys do not match
only logs a list of keys and goes on.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor, nn

from .lean import version_of

COMPUTED = ('relative_coords_table',)
"""Buffers that stock loading leaves out: MMPretrain's SwinTransformerV2 makes them anew."""
BY_SIZE = ('freqs_cos', 'freqs_sin')
"""Buffers that follow from the size of the image: MMPretrain's ViTEVA02 makes them in forward."""


@dataclass
class LoadRecord:
    """Which frozen tensors of one backbone have been loaded.

    Attributes:
        given: the weights were there before the backbone was Pro-tuned, so nothing is asked but
            that they stay.
        names: names, inside the backbone, of the tensors loaded so far.
        versions: identity and version of these tensors, as they were loaded: autograd counts
            changes in place, but for those of ``tensor.data``.
        redrawn: names of those that an initialization has drawn anew since.
        prefix: name of the backbone inside the model of the load that is going on.
        foreign: keys of the last load that the backbone does not have.
        misshapen: names whose tensor in the last load had another shape, which PyTorch reports
            apart from missing keys and mmengine only logs.
        checked: the weights have been checked since the last load.
        untold: the last load brought some of them, and did not say which base they are of.
    """

    given: bool = True
    names: set[str] = field(default_factory=set)
    versions: dict[str, tuple[int, int]] = field(default_factory=dict)
    redrawn: set[str] = field(default_factory=set)
    prefix: str = ''
    foreign: list[str] = field(default_factory=list)
    misshapen: set[str] = field(default_factory=set)
    checked: bool = False
    untold: bool = False

    def note(
        self,
        own: dict[str, Tensor],
        missing: set[str],
        unexpected: list[str],
        untold: bool = True,
    ) -> None:
        """Record one load.

        Args:
            own: all frozen tensors inside the backbone by name.
            missing: full names that the loaded file lacks.
            unexpected: full names in the file that nothing asked for.
            untold: the file does not say which base its prompts are of. Default True.
        """
        found = {
            name
            for name in own
            if f'{self.prefix}{name}' not in missing and name not in self.misshapen
        }
        self.names |= found
        self.redrawn -= found
        self.versions |= {name: _state(own[name]) for name in found}
        self.foreign = [key for key in unexpected if key.startswith(self.prefix)]
        self.checked = False
        self.untold = untold and bool(found)

    def watch(self, own: dict[str, Tensor]) -> None:
        """Note weights that are there already, so that it is told when they are drawn anew.

        Args:
            own: all frozen tensors inside the backbone by name.
        """
        self.versions = {name: _state(tensor) for name, tensor in own.items()}

    def forget_redrawn(self, own: dict[str, Tensor]) -> None:
        """Count as not loaded what has changed since, as stock rules run after ``init_cfg`` can.

        mmengine's modules skip their own rules for an ``init_cfg`` that is a dict of the type
        ``'Pretrained'``, and for no other: not for a list with one.

        Args:
            own: all frozen tensors inside the backbone by name.
        """
        changed = set()
        for name in own if self.given else self.names & own.keys():
            before, now = self.versions.get(name), _state(own[name])
            # A copy of the module has other tensors, which were not seen loading.
            if before is not None and before[0] == now[0] and before != now:
                changed.add(name)
        self.names -= changed
        self.redrawn |= changed
        if changed:
            self.checked = False

    def problem(self, backbone: nn.Module, tensors: dict[str, Tensor]) -> str | None:
        """One line about missing weights, or None where all is well.

        Integer tensors (counters, index tables), tables that a backbone computes and does not load,
        and the affine parameters of output norms, that
        is of layer and group norms right below the backbone, are exempt: where a checkpoint lacks
        them, as ImageNet checkpoints lack those of Swin, their fixed start is what a user expects.

        Args:
            backbone: the backbone, for its class name.
            tensors: its frozen tensors by name.
        """
        if self.given and not self.redrawn:
            return None
        norms = {
            name
            for name, module in backbone.named_children()
            if isinstance(module, nn.LayerNorm | nn.GroupNorm)
        }
        lacking = [
            name
            for name, tensor in tensors.items()
            if tensor.is_floating_point()
            and name.rpartition('.')[2] not in COMPUTED + BY_SIZE
            and name not in self.names
            and (not self.given or name in self.redrawn)
            and (name.rpartition('.')[0] not in norms or name in self.misshapen)
        ]
        if not lacking:
            return None
        kind = type(backbone).__name__
        if self.given:
            return (
                f'{kind} is frozen, but {len(lacking)} of its tensors, first {lacking[0]}, were '
                'drawn anew after the backbone had come with its weights: rules in the init_cfg of '
                'the model around it reach all layers inside; take them out, or load the weights '
                'after init_weights()'
            )
        if lacking[0] in self.redrawn:
            return (
                f'{kind} is frozen, but {len(self.redrawn.intersection(lacking))} of its tensors, '
                f'first {lacking[0]}, were drawn anew after they had been loaded: give init_cfg='
                "dict(type='Pretrained', checkpoint=...), a dict and no list (with _delete_=True "
                'where it takes the place of a list), or load after init_weights()'
            )
        if self.names or self.foreign or self.misshapen:
            foreign = f'; the file has e.g. {self.foreign[0]} instead' if self.foreign else ''
            if lacking[0] in self.misshapen:
                foreign = ', which has another shape there'
            return (
                f'{kind} is frozen, but the loaded weights lack {len(lacking)} of its '
                f'{len(tensors)} tensors, first {lacking[0]}{foreign}: load a checkpoint of this '
                'very backbone, from this library'
            )
        return (
            f'{kind} is frozen, but no weights were loaded into it: give init_cfg='
            "dict(type='Pretrained', checkpoint=...), load_from=... or a checkpoint; a backbone "
            'that loads them in its constructor says so by self._is_init = True there'
        )


def _state(tensor: Tensor) -> tuple[int, int]:
    return id(tensor), version_of(tensor)
