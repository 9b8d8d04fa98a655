"""Random images with labels for one training step of any stock model."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch

SIZES = ((128, 128), (224, 224), (384, 384))
"""Heights and widths of the images, in pixels, in the order they are tried."""


def batches(library: str) -> Iterator[dict]:
    """Batches of two images for the models of one library, the most usual kind first.

    Args:
        library: 'mmdet', 'mmseg' or 'mmpretrain'.

    Yields:
        dict: ``inputs`` and ``data_samples``, as a data loader of that library collates them.
    """
    torch.manual_seed(0)
    makers = {'mmdet': _detection, 'mmseg': _segmentation, 'mmpretrain': _images}
    first = makers.pop(library)
    for size in SIZES:
        yield from first(size)
    # A few configs borrow the model of another library.
    for maker in makers.values():
        yield from maker(SIZES[0])


def _pictures(size: tuple[int, int], count: int = 2) -> list[torch.Tensor]:
    return [torch.randint(0, 255, (3, *size), dtype=torch.uint8) for _ in range(count)]


def _images(size: tuple[int, int]) -> Iterator[dict]:
    from mmpretrain.structures import DataSample

    samples = [DataSample().set_gt_label(i) for i in range(2)]
    yield dict(inputs=_pictures(size), data_samples=samples)


def _segmentation(size: tuple[int, int]) -> Iterator[dict]:
    from mmengine.structures import PixelData
    from mmseg.structures import SegDataSample

    for more in ('', 'gt_edge_map', 'gt_depth_map'):
        samples = []
        for _ in range(2):
            meta = dict(img_shape=size, ori_shape=size, pad_shape=size)
            sample = SegDataSample(metainfo=meta)
            sample.gt_sem_seg = PixelData(data=torch.randint(0, 2, (1, *size)))
            if more:
                labels = torch.randint(0, 2, (1, *size))
                labels = labels if more == 'gt_edge_map' else labels + 1.0  # metres
                setattr(sample, more, PixelData(data=labels))
            samples.append(sample)
        yield dict(inputs=_pictures(size), data_samples=samples)


def _detection(size: tuple[int, int]) -> Iterator[dict]:
    from mmdet.testing import demo_mm_proposals, demo_track_inputs

    shapes = [(3, *size)] * 2
    for boxes in (False, True):
        data = _boxes(size, boxes)
        yield data
    for sample, proposals in zip(data['data_samples'], demo_mm_proposals(shapes, 50), strict=True):
        sample.proposals = proposals
    yield data
    yield _views(size)
    for frames, key_frames in ((2, [0]), (3, [0, 1])):
        yield demo_track_inputs(
            2,
            num_frames=frames,
            key_frames_inds=key_frames,
            image_shapes=shapes[0],
            num_items=[2, 2],
            with_mask=True,
        )
    yield _identities((256, 128))


def _boxes(size: tuple[int, int], boxes: bool) -> dict:
    """Boxes, masks, a semantic map and the names of the classes."""
    from mmdet.testing import demo_mm_inputs

    data = demo_mm_inputs(
        2, [(3, *size)] * 2, num_items=[3, 4], num_classes=2, with_mask=True, with_semantic=True,
        use_box_type=boxes, texts=[('cat', 'dog')] * 2, custom_entities=True,
    )  # fmt: skip
    for sample in data['data_samples']:
        sample.gt_instances.labels.zero_()
        # Smaller boxes than the ignored ones would leave nothing to learn.
        sample.ignored_instances = sample.ignored_instances[:0]
    return data


def _views(size: tuple[int, int]) -> dict:
    """Labelled images, and two views of others: for a student and its teacher."""
    data = _boxes(size, True)
    for sample in data['data_samples']:
        sample.set_metainfo(dict(homography_matrix=torch.eye(3).numpy()))
    names = ('sup', 'unsup_teacher', 'unsup_student')
    return {
        part: {name: copy.deepcopy(value) for name in names} for part, value in dict(data).items()
    }


def _identities(size: tuple[int, int]) -> dict:
    """Pictures of two people, two each."""
    from mmdet.structures import ReIDDataSample

    samples = [ReIDDataSample().set_gt_label(i // 2) for i in range(4)]
    return dict(inputs=_pictures(size, 4), data_samples=samples)
