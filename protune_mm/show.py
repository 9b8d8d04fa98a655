"""Hooks that show what a Pro-tuned training does: numbers in its log, pictures in its folder."""

from __future__ import annotations

import resource
from collections.abc import Sequence
from functools import partial

import cv2
import numpy as np
import torch
from mmengine.dist import is_main_process
from mmengine.hooks import Hook
from mmengine.runner import Runner
from mmengine.visualization import Visualizer
from torch import Tensor, nn

from .features import Beside
from .registry import HOOKS
from .report import frozen_share, parameter_counts
from .tuned import backbones, prompts, unwrapped, whole_name

TITLE = 20
"""Height of the line above a picture, in pixels."""
COLUMNS = 6
"""Pictures side by side."""


@HOOKS.register_module()
class TuningReportHook(Hook):
    """Parameters, frozen share and memory, beside the step time that mmengine logs.

    Everything goes the stock way: the counts to the visualizer once, when training starts, as
    ``parameters/frozen``, ``parameters/prompts``, ``parameters/neck_and_head`` and
    ``parameters/frozen_share`` (percent of the model); ``memory`` into the log and the visualizer
    at every logged step, in MiB. On a GPU that is mmengine's own, the most that PyTorch held since
    the last; elsewhere the most the process has held so far.
    """

    priority = 'NORMAL'

    def before_train(self, runner: Runner) -> None:
        """Tell the counts."""
        n = parameter_counts(unwrapped(runner.model))
        runner.visualizer.add_scalars(
            {
                'parameters/frozen': n['frozen'] + n['rest_frozen'],
                'parameters/prompts': n['prompts'],
                'parameters/neck_and_head': n['rest'],
                'parameters/frozen_share': frozen_share(n),
            },
            step=runner.iter,
        )

    def after_train_iter(self, runner: Runner, *args: object, **kwargs: object) -> None:
        """Note the memory, where mmengine does not."""
        if not torch.cuda.is_available():
            held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
            runner.message_hub.update_scalar('train/memory', held)


@HOOKS.register_module()
class PromptVisualizationHook(Hook):
    """Draw what each prompt adds to its stage, for the first images of a validation or a test.

    One picture for each image goes through the stock visualizer, so into ``vis_data/vis_image`` of
    the work folder and wherever else it writes (TensorBoard, say): the image as the backbone
    receives it, and over it, for each prompt, how much it changes each place. Red is where it
    changes most. The title names the block and tells, in percent, the norm of what the prompt adds
    over the norm of what it is added to, over all places and channels; of a prompt beside a layer,
    over that of what it reads.

    Prompts that see no places, as LoRA beside a linear layer, and those beside layers with a stride
    are left out.

    Args:
        images: how many. Default 4.
        interval: validations from one drawing to the next. Default 1.
        size: of one picture's longer side, in pixels. Default 224.

    Raises:
        ValueError: a number below one.
    """

    # After EMAHook: it is the averaged weights that are validated.
    priority = 'LOW'

    def __init__(self, images: int = 4, interval: int = 1, size: int = 224) -> None:
        for name, value in (('images', images), ('interval', interval), ('size', size)):
            if value < 1:
                raise ValueError(f'PromptVisualizationHook: {name}={value} must be 1 or more')
        self.images, self.interval, self.size = images, interval, size
        self._validations = 0
        self._left = 0
        self._handles: list = []
        self._seen: dict[str, tuple[Tensor, Tensor]] = {}
        self._input: Tensor | None = None
        self._told = False

    def before_val_epoch(self, runner: Runner) -> None:
        """Draw in this validation, or not."""
        due = self._validations % self.interval == 0
        self._validations += 1
        self._left = self.images if due and is_main_process() else 0

    def before_test_epoch(self, runner: Runner) -> None:
        """Draw in every test."""
        self._left = self.images if is_main_process() else 0

    def before_val_iter(self, runner: Runner, *args: object, **kwargs: object) -> None:
        """Listen to the backbone and its prompts while there are images left."""
        if self._left > 0:
            self._listen(unwrapped(runner.model, twin=False))

    def after_val_iter(self, runner: Runner, *args: object, **kwargs: object) -> None:
        """Draw what was heard."""
        if self._handles:
            self._draw(runner, 'prompts')

    before_test_iter = before_val_iter

    def after_test_iter(self, runner: Runner, *args: object, **kwargs: object) -> None:
        """Draw what was heard."""
        if self._handles:
            self._draw(runner, 'prompts_test')

    def _listen(self, model: nn.Module) -> None:
        self._seen, self._input = {}, None
        for prefix, backbone in backbones(model).items():
            self._handles.append(backbone.register_forward_pre_hook(self._note_input))
            for name, prompt in prompts(backbone).items():
                block = name.removesuffix('.prompt')
                site = backbone.get_submodule(block)._protune_site
                alone = site.series and not isinstance(site.layout, Beside)
                name = whole_name(f'{prefix}.{block}').removeprefix('backbone.')
                note = partial(self._note, name, alone)
                self._handles.append(prompt.register_forward_hook(note))

    def _note_input(self, module: nn.Module, args: tuple) -> None:
        """Of the first of several forward passes, as in sliding windows."""
        if self._input is None and args and isinstance(args[0], Tensor):
            self._input = args[0].detach()

    def _note(self, name: str, alone: bool, _: nn.Module, args: tuple, out: Tensor) -> None:
        """Keep norms over the channels, (B, H, W), of what is added and of what it is added to."""
        given = args[0]
        places = min(out.shape[-2:]) > 1 and given.shape[-2:] == out.shape[-2:]
        if name in self._seen or not places:
            return
        added = out - given if alone and out.shape == given.shape else out
        self._seen[name] = (added.detach().float().norm(dim=1), given.detach().float().norm(dim=1))

    def _draw(self, runner: Runner, title: str) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []
        if not self._seen or self._input is None:
            if not self._told:
                runner.logger.warning(
                    'PromptVisualizationHook: no prompt of this model sees places of an image: '
                    'nothing is drawn'
                )
                self._told = True
            self._left = 0
            return
        pictures = _pictures(self._input, unwrapped(runner.model, twin=False))
        for i, picture in enumerate(pictures[: self._left]):
            number = self.images - self._left + i
            sheet = self._sheet(
                picture, {name: (a[i], b[i]) for name, (a, b) in self._seen.items()}
            )
            # A test before any training builds no loop.
            trained = not isinstance(runner._train_loop, dict) and runner._train_loop is not None
            step = runner.iter if trained else 0
            runner.visualizer.add_image(f'{title}_{number}', sheet, step)
        self._left -= min(self._left, len(pictures))
        self._seen, self._input = {}, None

    def _sheet(self, picture: np.ndarray, seen: dict[str, tuple[Tensor, Tensor]]) -> np.ndarray:
        """All pictures of one image, RGB."""
        scale = self.size / max(picture.shape[:2])
        size = tuple(max(1, round(side * scale)) for side in picture.shape[1::-1])
        picture = cv2.resize(picture, size, interpolation=cv2.INTER_AREA)
        cells = [_titled(picture, 'input')]
        for name, (added, given) in seen.items():
            share = 100 * float(added.norm() / given.norm().clamp_min(1e-12))
            drawn = picture
            # A prompt that adds nothing, as before its first step, has no picture.
            if float(added.max()) > 0:
                drawn = Visualizer.draw_featmap(
                    added[None].cpu(), picture, channel_reduction=None, topk=-1, alpha=0.4
                )
            cells.append(_titled(drawn, f'{name}: {share:.3g} %'))
        blank = np.full_like(cells[0], 255)
        cells += [blank] * (-len(cells) % min(COLUMNS, len(cells)))
        columns = min(COLUMNS, len(cells))
        rows = [np.hstack(cells[i : i + columns]) for i in range(0, len(cells), columns)]
        return np.vstack(rows)


def _pictures(inputs: Tensor, model: nn.Module) -> Sequence[np.ndarray]:
    """The images of a batch as the backbone receives them, (H, W, 3) RGB of 0 to 255."""
    images = inputs[:, :3].float()
    if images.shape[1] != 3:
        images = images[:, :1].expand(-1, 3, -1, -1)
    preprocessor = getattr(model, 'data_preprocessor', None)
    mean, std = (getattr(preprocessor, key, None) for key in ('mean', 'std'))
    if isinstance(mean, Tensor) and isinstance(std, Tensor) and len(mean) in (1, 3):
        images = images * std.view(1, -1, 1, 1) + mean.view(1, -1, 1, 1)
    # The three libraries each have a name of their own for the same switch.
    names = ('to_rgb', '_channel_conversion', 'channel_conversion')
    if not any(getattr(preprocessor, name, False) for name in names):
        images = images.flip(1)
    images = images.round().clamp(0, 255).byte().permute(0, 2, 3, 1).cpu().numpy()
    return [np.ascontiguousarray(image) for image in images]


def _titled(picture: np.ndarray, title: str) -> np.ndarray:
    line = np.full((TITLE, picture.shape[1], 3), 255, np.uint8)
    cv2.putText(line, title, (2, TITLE - 6), cv2.FONT_HERSHEY_SIMPLEX, 0.4, (0, 0, 0), 1)
    return np.vstack([line, picture])
