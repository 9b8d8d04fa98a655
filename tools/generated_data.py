"""Random images with labels for one training step of any stock model."""

from __future__ import annotations

from collections.abc import Iterator

import torch

SIZE = (128, 128)
"""Height and width of the images, in pixels."""


def batches(library: str, size: tuple[int, int] = SIZE) -> Iterator[dict]:
    """Batches of two images for models of one library, the most usual kind first.

    Args:
        library: 'mmdet', 'mmseg' or 'mmpretrain'.
        size: height and width of the images, in pixels.

    Yields:
        dict: ``inputs`` and ``data_samples``, as a data loader of that library collates them.
    """
    torch.manual_seed(0)
    yield from {'mmdet': _detection, 'mmseg': _segmentation, 'mmpretrain': _images}[library](size)


def _images(size: tuple[int, int]) -> Iterator[dict]:
    from mmpretrain.structures import DataSample

    pictures = [torch.randint(0, 255, (3, *size), dtype=torch.uint8) for _ in range(2)]
    samples = [DataSample().set_gt_label(i) for i in range(2)]
    yield dict(inputs=pictures, data_samples=samples)


def _segmentation(size: tuple[int, int]) -> Iterator[dict]:
    from mmengine.structures import PixelData
    from mmseg.structures import SegDataSample

    pictures = [torch.randint(0, 255, (3, *size), dtype=torch.uint8) for _ in range(2)]
    for edges in (False, True):
        samples = []
        for _ in pictures:
            meta = dict(img_shape=size, ori_shape=size, pad_shape=size)
            sample = SegDataSample(metainfo=meta)
            sample.gt_sem_seg = PixelData(data=torch.randint(0, 2, (1, *size)))
            if edges:
                sample.gt_edge_map = PixelData(data=torch.randint(0, 2, (1, *size)))
            samples.append(sample)
        yield dict(inputs=pictures, data_samples=samples)


def _detection(size: tuple[int, int]) -> Iterator[dict]:
    from mmdet.testing import demo_mm_inputs, demo_mm_proposals, demo_track_inputs

    shapes = [(3, *size)] * 2
    for boxes in (False, True):
        data = demo_mm_inputs(
            2, shapes, num_items=[3, 4], num_classes=2, with_mask=True, with_semantic=True,
            use_box_type=boxes,
        )  # fmt: skip
        for sample in data['data_samples']:
            sample.gt_instances.labels.zero_()
            # Smaller boxes than the ignored ones would leave nothing to learn.
            sample.ignored_instances = sample.ignored_instances[:0]
        yield data
    for sample, proposals in zip(data['data_samples'], demo_mm_proposals(shapes, 50), strict=True):
        sample.proposals = proposals
    yield data
    track = demo_track_inputs(
        2,
        num_frames=2,
        key_frames_inds=[0],
        image_shapes=shapes[0],
        num_items=[2, 2],
        with_mask=True,
    )
    yield track
