"""Adversarial attacks on classifiers, in pixels, through the model's own data preprocessor."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from mmengine.dist import get_world_size
from mmengine.runner import Runner, TestLoop
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ..registry import LOOPS

ATTACKS = ('fgsm', 'pgd', 'autoattack')
PGD_STEPS = 10
AUTO_STEPS = 100
AUTO_TARGETS = 9


class PixelModel(nn.Module):
    """A classifier of MMPretrain that takes pixels from 0 to 1 and returns logits.

    Args:
        model: the classifier, with its data preprocessor.
        answers: the classes that count, such as those of a :class:`protune_mm.ClassMap`. Default:
            all.

    Raises:
        ValueError: the model is no classifier, or returns other than a score for each class.

    Shape: ``(B, 3, H, W) -> (B, answers)``, in the order of channels of the data loader.
    """

    def __init__(self, model: nn.Module, answers: Sequence[int] | None = None) -> None:
        super().__init__()
        if not hasattr(model, 'head') or not hasattr(model.head, 'num_classes'):
            raise ValueError(
                f'attacks are for classifiers of MMPretrain; {type(model).__name__} is none'
            )
        self.model = model
        self.answers = list(range(model.head.num_classes) if answers is None else answers)

    def forward(self, pixels: Tensor) -> Tensor:
        """Return the logits."""
        inputs = self.model.data_preprocessor(dict(inputs=255 * pixels))['inputs']
        scores = self.model(inputs, mode='tensor')
        if not isinstance(scores, Tensor) or scores.dim() != 2:
            raise ValueError(
                'attacks are for classifiers with one score for each class; '
                f'{type(self.model.head).__name__} returns others'
            )
        return scores[:, self.answers]


def robust_accuracy(
    model: nn.Module,
    batches: Iterable[dict],
    attack: str,
    budgets: Sequence[float],
    answers: Sequence[int] | None = None,
) -> dict[float, float]:
    """Accuracy under attack, for growing budgets.

    An image that one budget breaks is broken for every larger one, whose perturbations include
    the smaller ones.

    Args:
        model: a classifier, in evaluation mode.
        batches: of a test data loader, each with ``inputs`` and ``data_samples``.
        attack: one of :data:`ATTACKS`, run by the library ``torchattacks`` under the maximum norm.
            ``'pgd'`` takes ten steps of a quarter of the budget from a random start (arXiv
            1706.06083); ``'autoattack'`` is the standard version of arXiv 2003.01690: APGD on the
            cross-entropy, APGD and FAB on nine targets (or as many as there are), 100 steps each,
            and 5000 queries of Square.
        budgets: largest changes of a pixel, from 0 to 1, in growing order. 0 is no attack.
        answers: see :class:`PixelModel`.

    Returns:
        dict[float, float]: budget to accuracy, in per cent.

    Raises:
        ValueError: an unknown attack, budgets that do not grow, too few classes, images of several
            classes or of no pixels from 0 to 255, or a model with other outputs than a score for
            each class.
        ModuleNotFoundError: the library is not installed.
    """
    check_attack(model, attack, budgets, answers)
    budgets = list(budgets)
    pixel_model = PixelModel(model, answers).eval()
    position = {label: i for i, label in enumerate(pixel_model.answers)}
    device = next(model.parameters()).device
    right, total = dict.fromkeys(budgets, 0), 0
    for batch in batches:
        pixels = _pixels(batch['inputs']).to(device).float() / 255
        labels = [s.gt_label.flatten().tolist() for s in batch['data_samples']]
        for found in labels:
            if len(found) != 1:
                raise ValueError(
                    f'attacks are for images of one class; one of these has the classes {found}'
                )
        labels = torch.tensor([position[label] for (label,) in labels], device=device)
        total += len(labels)
        with torch.no_grad():
            standing = pixel_model(pixels).argmax(1) == labels
        pixels, labels = pixels[standing], labels[standing]
        for budget in budgets:
            if budget and len(labels):
                attacker = _attacker(attack, pixel_model, budget)
                # A random start that is the same each time, and takes nothing from the generator.
                with torch.random.fork_rng(devices=_devices(device)), torch.enable_grad():
                    torch.manual_seed(0)
                    changed = attacker(pixels, labels).detach()
                with torch.no_grad():
                    standing = pixel_model(changed).argmax(1) == labels
                pixels, labels = pixels[standing], labels[standing]
            right[budget] += len(labels)
    return {budget: 100 * count / max(1, total) for budget, count in right.items()}


def _devices(device: torch.device) -> list[torch.device]:
    return [device] if device.type == 'cuda' else []


def check_budgets(attack: str, budgets: Sequence[float]) -> None:
    """Refuse an attack that is unknown, or budgets that do not grow.

    Raises:
        ValueError: it is, or they do not.
    """
    if attack not in ATTACKS:
        raise ValueError(f"attack='{attack}' is unknown: use one of {', '.join(ATTACKS)}")
    budgets = list(budgets)
    if not budgets or budgets[0] < 0 or budgets != sorted(set(budgets)):
        raise ValueError(f'budgets={budgets} do not grow from 0 on')


def check_attack(
    model: nn.Module, attack: str, budgets: Sequence[float], answers: Sequence[int] | None = None
) -> None:
    """Refuse an attack that cannot be run, before anything else is.

    Args:
        model: see :func:`robust_accuracy`.
        attack: see there.
        budgets: see there.
        answers: see there.

    Raises:
        ValueError: an unknown attack, budgets that do not grow, too few classes, or no classifier.
        ModuleNotFoundError: the library is not installed.
    """
    check_budgets(attack, budgets)
    classes = len(PixelModel(model, answers).answers)
    if attack == 'autoattack' and classes < 4:
        raise ValueError(
            f'autoattack needs at least 4 classes; there are {classes}: its loss compares with '
            'the third best'
        )
    attack_library()


def _pixels(inputs: Tensor | list[Tensor]) -> Tensor:
    """The images of a batch, which an attack cuts to the range of pixels."""
    images = inputs if isinstance(inputs, Tensor) else torch.stack(inputs)
    low, high = float(images.min()), float(images.max())
    # Normalized images lie around zero. Some ways to resize float ones end a little past the range,
    # and one that is black is all zero.
    if low < -64 or (images.is_floating_point() and high <= 16 and (low or high)):
        raise ValueError(
            f'attacks are on pixels from 0 to 255; the test pipeline gives {low:.4g} to '
            f'{high:.4g}: leave the normalization to model.data_preprocessor'
        )
    return images


def attack_library() -> Any:
    """The library that attacks.

    Raises:
        ModuleNotFoundError: it is not installed.
    """
    try:
        import torchattacks
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f'{error}: pip install -r requirements/robustness.txt for attacks'
        ) from error
    return torchattacks


def _attacker(attack: str, model: PixelModel, budget: float) -> Any:
    torchattacks = attack_library()
    if attack == 'fgsm':
        return torchattacks.FGSM(model, eps=budget)
    if attack == 'pgd':
        return torchattacks.PGD(model, eps=budget, alpha=budget / 4, steps=PGD_STEPS)
    # The library's own AutoAttack takes ten steps, and as many targets as there are classes.
    common = dict(eps=budget, seed=0)
    classes = min(len(model.answers), AUTO_TARGETS + 1)
    return torchattacks.MultiAttack(
        [
            torchattacks.APGD(model, steps=AUTO_STEPS, loss='ce', **common),
            torchattacks.APGDT(model, steps=AUTO_STEPS, n_classes=classes, **common),
            torchattacks.FAB(
                model, steps=AUTO_STEPS, n_classes=classes, multi_targeted=True, **common
            ),
            torchattacks.Square(model, n_queries=5000, **common),
        ]
    )


@LOOPS.register_module()
class AttackLoop(TestLoop):
    """Test loop of a classifier under attack, with the hooks before and after every test.

    So the model is what a test would see: loaded from its checkpoint, its averaged weights in
    place. Where the data set is a :class:`protune_mm.ClassMap` only its classes are answers.

    Args:
        runner: the runner.
        dataloader: of the test split, or its config.
        attack: see :func:`robust_accuracy`.
        budgets: see there.
        evaluator: what a runner gives to every test loop; not used.

    Raises:
        RuntimeError: several processes test, of which each would see a part of the images.

    Its result has a score ``'ATTACK, BUDGET/255'`` for each budget, in per cent.
    """

    def __init__(
        self,
        runner: Runner,
        dataloader: DataLoader | dict,
        attack: str,
        budgets: Sequence[float],
        evaluator: object = None,
    ) -> None:
        super().__init__(runner, dataloader, evaluator=[])
        self.attack, self.budgets = attack, budgets

    def run(self) -> dict[str, float]:
        """Attack, and return the scores."""
        if get_world_size() > 1:
            raise RuntimeError('attacks run in one process: test without a launcher')
        self.runner.call_hook('before_test')
        self.runner.call_hook('before_test_epoch')
        found = robust_accuracy(
            self.runner.model.eval(),
            self.dataloader,
            self.attack,
            self.budgets,
            self.dataloader.dataset.metainfo.get('subset'),
        )
        scores = {f'{self.attack}, {255 * b:g}/255': value for b, value in found.items()}
        self.runner.call_hook('after_test_epoch', metrics=scores)
        self.runner.call_hook('after_test')
        return scores
