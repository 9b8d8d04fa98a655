"""The fifteen common corruptions, as a transform for the test pipelines of all three libraries."""

from __future__ import annotations

import copy
import functools
import hashlib
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from statistics import mean

import numpy as np
from mmcv.transforms import BaseTransform
from mmengine.evaluator import BaseMetric
from mmengine.hooks import CheckpointHook

from ..registry import TRANSFORMS, type_name

CORRUPTIONS = (
    'gaussian_noise', 'shot_noise', 'impulse_noise', 'defocus_blur', 'glass_blur', 'motion_blur',
    'zoom_blur', 'snow', 'frost', 'fog', 'brightness', 'contrast', 'elastic_transform', 'pixelate',
    'jpeg_compression',
)  # fmt: skip
"""Names, as in *Benchmarking Neural Network Robustness to Common Corruptions and Perturbations*,
arXiv 1903.12261."""


_corrupted_images: dict[tuple, np.ndarray] = {}
"""Corrupted images by path, checksum of the image, shape, corruption and severity."""
CACHE_BYTES = 2**30
"""What they take in one process, at most; images beyond are made anew each time."""


@TRANSFORMS.register_module()
class Corrupt(BaseTransform):
    """Corrupt an image with the library ``imagecorruptions``, the same way each time.

    Its strengths are made for photographs of ImageNet's size: images of 32x32 pixels are hit
    harder than in CIFAR-10-C. The random numbers follow from the path of the image as the config
    has it, or from the image itself where it has none, so that every model that is tested on that
    path sees the same images.

    Args:
        corruption: one of :data:`CORRUPTIONS`.
        severity: 1 to 5; 0 leaves the image as it is.
        cache: keep corrupted images in this process, up to a GiB, for the next model that is tested
            on them. Default False.
        rgb: the channels are in the order RGB, as those of sets that hold their images. Default
            False: BGR, as files are loaded.

    Raises:
        ValueError: the corruption or the severity is unknown.
        ModuleNotFoundError: the library is not installed.

    Required key: ``img``, (H, W, 3), or (H, W) and (H, W, 1) in grey, from 32x32 pixels on, of any
    type of number that holds whole pixels from 0 to 255, which it keeps. Optional key:
    ``img_path``. Changed key: ``img``.
    """

    def __init__(
        self, corruption: str, severity: int, cache: bool = False, rgb: bool = False
    ) -> None:
        if corruption not in CORRUPTIONS:
            raise ValueError(
                f"corruption='{corruption}' is unknown: use one of {', '.join(CORRUPTIONS)}"
            )
        if severity not in range(6):
            raise ValueError(f'severity={severity} is unknown: use 0 (none) to 5')
        self.corruption, self.severity, self.cache = corruption, severity, cache
        self.rgb = rgb
        if severity:
            self._corrupt = _library()

    def transform(self, results: dict) -> dict:
        """Corrupt ``results['img']``.

        Raises:
            ValueError: there is no image yet, or one that the library does not take.
        """
        if not self.severity:
            return results
        given = results.get('img')
        if given is None:
            raise ValueError(
                'no image to corrupt: the data set has none, and no step before loads it (its '
                "type has 'Load' in its name)"
            )
        image = _pixels(given)
        path = results.get('img_path') or hashlib.sha1(image.tobytes()).hexdigest()
        key, made = (), None
        if self.cache:  # Sets with several images in a file tell one path for all of them.
            checksum = zlib.crc32(np.ascontiguousarray(image))
            key = (path, checksum, image.shape, self.corruption, self.severity, self.rgb)
            made = _corrupted_images.get(key)
        if made is None:
            made = self._made(image, zlib.crc32(f'{path} {self.corruption}'.encode()))
            held = sum(image.nbytes for image in _corrupted_images.values()) if self.cache else 0
            if self.cache and held + made.nbytes <= CACHE_BYTES:
                _corrupted_images[key] = made
        results['img'] = made.astype(given.dtype, copy=self.cache)
        return results

    def _made(self, image: np.ndarray, seed: int) -> np.ndarray:
        # The library wants RGB, and some corruptions have a colour.
        coloured = image.ndim == 3 and image.shape[-1] == 3
        turn = slice(None, None, -1 if coloured and not self.rgb else 1)
        with _seeded(seed):
            made = self._corrupt(
                np.ascontiguousarray(image[..., turn]) if coloured else image,
                corruption_name=self.corruption,
                severity=self.severity,
            )
        if not coloured:
            # The library makes three channels of one; each of them is as noisy as it is to be.
            return np.ascontiguousarray(made[..., 0]).reshape(image.shape)
        return np.ascontiguousarray(made[..., turn])


def _pixels(image: np.ndarray) -> np.ndarray:
    """An image as the library takes it.

    Raises:
        ValueError: it has another shape, is too small, or has no whole pixels from 0 to 255.
    """
    if image.ndim not in (2, 3) or image.shape[2:] not in ((), (1,), (3,)):
        raise ValueError(
            f'an image has the shape {image.shape}: corruptions are for (H, W, 3), and (H, W) or '
            '(H, W, 1) in grey'
        )
    height, width = image.shape[:2]
    if min(height, width) < 32:
        raise ValueError(
            f'an image has {height}x{width} pixels: corruptions need at least 32x32, so add a '
            'Resize before them'
        )
    if image.dtype == np.uint8:
        return image
    with np.errstate(invalid='ignore'):  # Of what is no number.
        whole = image.clip(0, 255).astype(np.uint8)
    if not np.array_equal(whole, image):
        raise ValueError(
            f'an image of {image.dtype} has no whole pixels from 0 to 255, which corruptions are '
            'for: leave the normalization to model.data_preprocessor'
        )
    return whole


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seed all three sources of random numbers that the library draws from."""
    state, new = np.random.get_state(), np.random.default_rng
    np.random.seed(seed)
    _numba_seeder()(seed)
    np.random.default_rng = lambda given=None: new(seed if given is None else given)
    try:
        yield
    finally:
        np.random.default_rng = new
        np.random.set_state(state)


@functools.cache
def _numba_seeder() -> Callable[[int], None]:
    import numba

    # Compiled functions have random numbers of their own.
    return numba.njit(lambda seed: np.random.seed(seed))


def _library() -> object:
    try:
        from imagecorruptions import corrupt
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f'{error}: pip install -r requirements/robustness.txt for corruptions'
        ) from error
    return corrupt


def corrupted(dataloader: dict, corruption: str, severity: int, cache: bool = False) -> dict:
    """A copy of a test dataloader's config whose images are corrupted as soon as they are loaded.

    Args:
        dataloader: the config, unchanged.
        corruption, severity, cache: as of :class:`Corrupt`.

    Raises:
        ValueError: its data set has no pipeline.
    """
    step = dict(type='protune_mm.Corrupt', corruption=corruption, severity=severity, cache=cache)
    dataloader = copy.deepcopy(dataloader)
    dataloader['dataset'] = _with_steps(
        dataloader['dataset'], lambda held: [dict(step, rgb=True) if held else step]
    )
    return dataloader


def after_loading(dataloader: dict, steps: list[dict]) -> dict:
    """A copy of a test dataloader's config with transforms right after an image is loaded.

    Data sets that hold their images (CIFAR, MNIST) load none: there the transforms come first. Of
    joined data sets each gets them.

    Args:
        dataloader: the config, unchanged.
        steps: the transforms.

    Raises:
        ValueError: its data set has no pipeline.
    """
    dataloader = copy.deepcopy(dataloader)
    dataloader['dataset'] = _with_steps(dataloader['dataset'], lambda held: steps)
    return dataloader


def _with_steps(dataset: dict, steps: Callable[[bool], list[dict]]) -> dict:
    """A copy of a data set's config with transforms after the first that loads an image.

    Args:
        dataset: the config, unchanged: joined data sets may share a pipeline.
        steps: makes them, from whether the data set holds its images, so that no step loads one.
    """
    dataset = copy.copy(dataset)
    if dataset.get('datasets'):
        dataset['datasets'] = [_with_steps(each, steps) for each in dataset['datasets']]
    elif isinstance(dataset.get('dataset'), dict):
        dataset['dataset'] = _with_steps(dataset['dataset'], steps)
    elif dataset.get('pipeline'):
        types = [type_name(step) for step in dataset['pipeline']]
        loads = [i for i, name in enumerate(types) if 'Load' in name and 'Annotation' not in name]
        place = loads[0] + 1 if loads else 0
        before, after = dataset['pipeline'][:place], dataset['pipeline'][place:]
        dataset['pipeline'] = [*before, *copy.deepcopy(steps(not loads)), *after]
    else:
        raise ValueError(
            f'the test data set, {dataset.get("type")}, has no `pipeline`: no step can be added'
        )
    return dataset


_TO_ONE = {
    'coco', 'lvis', 'lvis_fixed_ap', 'pascal_voc', 'openimages', 'cityscapes', 'crowd_human', 'dod',
    'youtube_vis',
}  # fmt: skip
"""Prefixes of MMDetection's metrics whose scores go to 1; all others go to 100."""
_TO_ONE_ALONE = {'averageScoreCategories', 'averageScoreInstCategories', 'd1', 'd2', 'd3'}
"""Scores of MMSegmentation's ``CityscapesMetric`` and ``DepthMetric``, which have no prefix; they
go to 1."""
_TO_100 = {'occluded_recall', 'separated_recall'}
"""Scores of MMDetection's ``CocoOccludedSeparatedMetric``, among others that go to 1."""
_ERRORS = {
    'mmr', 'rmse', 'rmse_log', 'abs_rel', 'sq_rel', 'log10', 'silog', 'mae', 'mse', 'error', 'epe',
    'nme', 'fid',
}  # fmt: skip
"""Names of scores, in lower case, of which the least is the best."""


def per_cent(metric: str) -> bool:
    """Whether the scores of a metric go to 100, such as accuracy, rather than to 1, such as AP.

    Args:
        metric: its whole name, such as ``'accuracy/top1'``, ``'coco/bbox_mAP'``, ``'mIoU'``; with
            another prefix its last part tells, and one prefix may stand before another.
    """
    *prefixes, last = metric.split('/')
    ap = re.match(r'(bbox|segm|proposal)_m?A[PR]', last)
    to_one = _TO_ONE.intersection(prefixes) or ap or last in _TO_ONE_ALONE
    return last in _TO_100 or not to_one


def check_metric(metric: str) -> None:
    """Refuse a metric of which the least is the best, where the most would be chosen.

    Args:
        metric: see :func:`per_cent`. One of an unknown name counts as better where it is higher.

    Raises:
        ValueError: it is one.
    """
    last = metric.rpartition('/')[2].lower()
    losses = CheckpointHook._default_less_keys
    if last in _ERRORS or any(key in last for key in losses):
        raise ValueError(
            f"metric '{metric}' is better where it is lower, and a higher score is to be better: "
            'write a metric that returns 100 minus it'
        )


def found_nothing(metric: str, scores: Mapping[str, float], metrics: Iterable[BaseMetric]) -> bool:
    """Whether a detector found nothing in any image: CocoMetric tells no score at all then.

    So does LVISMetric, which is one.

    Args:
        metric: name of the score that is wanted.
        scores: those that there are.
        metrics: of the evaluator. One that is no CocoMetric, has another prefix or only writes its
            results is no reason that the score is not there.
    """
    prefix, _, name = metric.rpartition('/')
    if any(key.startswith(f'{prefix}/') for key in scores):
        return False
    kind = 'proposal' if name.startswith('AR') else name.partition('_')[0]
    return any(
        'CocoMetric' in [base.__name__ for base in type(each).__mro__]
        and each.prefix == prefix.rpartition('/')[2]
        and not each.format_only
        and kind in each.metrics
        for each in metrics
    )


def summary(
    clean: float,
    scores: Mapping[tuple[str, int], float],
    per_cent: bool,
    baseline: Mapping[tuple[str, int], float] | None = None,
) -> dict[str, float]:
    """Mean scores under corruption.

    Args:
        clean: the score without corruption.
        scores: (corruption, severity) to score.
        per_cent: scores go to 100 rather than to 1: see :func:`per_cent`.
        baseline: those of another network. Default: none.

    Returns:
        dict[str, float]: ``mPC``, the mean performance under corruption; ``rPC``, relative to the
        clean one, in per cent (both of arXiv 1907.07484); ``mCE``, the mean corruption error in
        per cent, not divided by another network's; and with a baseline ``mCE over baseline``, as
        arXiv 1903.12261 has it with AlexNet: the mean over corruptions of the error over all
        severities, divided by the baseline's, in per cent.

    Raises:
        ValueError: the baseline lacks a corruption, or makes no error under one, or a score is out
            of range.
    """
    unit = 1 if per_cent else 100
    _check_range('the clean score', clean, unit)
    for (name, severity), score in scores.items():
        _check_range(f'the score under {name} {severity}', score, unit)
    performance = mean(scores.values())
    found = {
        'mPC': performance,
        'rPC': 100 * performance / clean if clean else 0.0,
        'mCE': 100 - unit * performance,
    }
    if baseline is not None:
        lacking = [
            f'{name} {severity}' for name, severity in scores if (name, severity) not in baseline
        ]
        if lacking:
            raise ValueError(f'the baseline has no score under {lacking[0]}: test it there, too')
        for name, severity in scores:
            _check_range(
                f"the baseline's score under {name} {severity}", baseline[name, severity], unit
            )
        ratios = []
        for corruption in dict.fromkeys(name for name, _ in scores):
            keys = [key for key in scores if key[0] == corruption]
            errors, others = (
                sum(100 - unit * values[key] for key in keys) for values in (scores, baseline)
            )
            if not others:
                raise ValueError(f'the baseline makes no error under {corruption}: use another')
            ratios.append(100 * errors / others)
        found['mCE over baseline'] = mean(ratios)
    return found


def _check_range(which: str, score: float, unit: int) -> None:
    if not -1e-3 <= unit * score <= 100.001:  # But for rounding.
        raise ValueError(
            f'{which}, {score}, is not within 0 and {100 // unit}, so there is no error rate of '
            'it: use a metric that is'
        )
