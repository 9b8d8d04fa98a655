"""The fifteen common corruptions, as a transform for the test pipelines of all three libraries."""

from __future__ import annotations

import copy
import functools
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from statistics import mean

import numpy as np
from mmcv.transforms import BaseTransform

from ..registry import TRANSFORMS

CORRUPTIONS = (
    'gaussian_noise', 'shot_noise', 'impulse_noise', 'defocus_blur', 'glass_blur', 'motion_blur',
    'zoom_blur', 'snow', 'frost', 'fog', 'brightness', 'contrast', 'elastic_transform', 'pixelate',
    'jpeg_compression',
)  # fmt: skip
"""Names, as in *Benchmarking Neural Network Robustness to Common Corruptions and Perturbations*,
arXiv 1903.12261."""


_corrupted_images: dict[tuple, np.ndarray] = {}
"""Corrupted images by path, shape, corruption and severity."""


@TRANSFORMS.register_module()
class Corrupt(BaseTransform):
    """Corrupt an image with the library ``imagecorruptions``, the same way each time.

    The random numbers follow from the path of the image, so that every model sees the same images.

    Args:
        corruption: one of :data:`CORRUPTIONS`.
        severity: 1 to 5; 0 leaves the image as it is.
        cache: keep corrupted images in this process for the next model that is tested on them.
            Default False.

    Raises:
        ValueError: the corruption or the severity is unknown.
        ModuleNotFoundError: the library is not installed.

    Required keys: ``img``, (H, W, 3), uint8, and ``img_path``. Changed key: ``img``.
    """

    def __init__(self, corruption: str, severity: int, cache: bool = False) -> None:
        if corruption not in CORRUPTIONS:
            raise ValueError(
                f"corruption='{corruption}' is unknown: use one of {', '.join(CORRUPTIONS)}"
            )
        if severity not in range(6):
            raise ValueError(f'severity={severity} is unknown: use 0 (none) to 5')
        self.corruption, self.severity, self.cache = corruption, severity, cache
        if severity:
            self._corrupt = _library()

    def transform(self, results: dict) -> dict:
        """Corrupt ``results['img']``."""
        if not self.severity:
            return results
        path, image = results['img_path'], results['img']
        key = (path, image.shape, self.corruption, self.severity)
        made = _corrupted_images.get(key) if self.cache else None
        if made is None:
            made = self._made(image, zlib.crc32(f'{path} {self.corruption}'.encode()))
        if self.cache:
            _corrupted_images[key] = made
        results['img'] = made.copy() if self.cache else made
        return results

    def _made(self, image: np.ndarray, seed: int) -> np.ndarray:
        # The library wants RGB, and some corruptions have a colour.
        image = np.ascontiguousarray(image[..., ::-1])
        with _seeded(seed):
            made = self._corrupt(image, corruption_name=self.corruption, severity=self.severity)
        return np.ascontiguousarray(made[..., ::-1])


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
        ValueError: its pipeline loads no image.
    """
    step = dict(type='protune_mm.Corrupt', corruption=corruption, severity=severity, cache=cache)
    return after_loading(dataloader, [step])


def after_loading(dataloader: dict, steps: list[dict]) -> dict:
    """A copy of a test dataloader's config with transforms right after an image is loaded.

    Args:
        dataloader: the config, unchanged.
        steps: the transforms.

    Raises:
        ValueError: its pipeline loads no image.
    """
    dataloader = copy.deepcopy(dataloader)
    dataset = dataloader['dataset']
    while 'pipeline' not in dataset and 'dataset' in dataset:
        dataset = dataset['dataset']
    pipeline = dataset.get('pipeline', [])
    loads = [i for i, step in enumerate(pipeline) if 'LoadImage' in str(step.get('type'))]
    if not loads:
        raise ValueError('the test pipeline has no LoadImageFromFile: nothing can follow it')
    pipeline[loads[0] + 1 : loads[0] + 1] = steps
    return dataloader


def summary(
    clean: float, scores: Mapping[tuple[str, int], float], per_cent: bool
) -> dict[str, float]:
    """Mean scores under corruption.

    Args:
        clean: the score without corruption.
        scores: (corruption, severity) to score.
        per_cent: scores go to 100 rather than to 1.

    Returns:
        dict[str, float]: ``mPC``, the mean performance under corruption; ``rPC``, relative to the
        clean one, in per cent (both of arXiv 1907.07484); and ``mCE``, the mean corruption error in
        per cent, not divided by another network's.
    """
    performance = mean(scores.values())
    unit = 1 if per_cent else 100
    return {
        'mPC': performance,
        'rPC': 100 * performance / clean if clean else 0.0,
        'mCE': 100 - unit * performance,
    }
