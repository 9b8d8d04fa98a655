"""What the benchmarks compare: models, and ways to train them. Shared by all of them."""

from __future__ import annotations

import argparse
import json
import logging
import re
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from torch import Tensor, nn

import protune_mm
from protune_mm.compat import processor, stack_versions
from protune_mm.registry import PROMPTS

ROOT = Path(__file__).resolve().parent.parent.parent
PROMPT = dict(ratio=4)
"""The default block, but for the ratio."""

BACKBONES: dict[str, dict] = {
    'ResNet-50': dict(type='mmpretrain.ResNet', depth=50, out_indices=(0, 1, 2, 3)),
    'MobileNetV2': dict(type='mmpretrain.MobileNetV2', out_indices=(1, 2, 4, 6)),
    'ConvNeXt-T': dict(type='mmpretrain.ConvNeXt', arch='tiny', out_indices=(0, 1, 2, 3)),
    'Swin-T': dict(type='mmdet.SwinTransformer'),
    'ViT-B': dict(
        type='mmpretrain.VisionTransformer', arch='base', img_size=256, out_type='featmap'
    ),
}
LORA = {
    'Swin-T': ('qkv', 'proj', 'ffn.layers.0.0', 'ffn.layers.1'),
    'ViT-B': ('qkv', 'proj', 'ffn.layers.0.0', 'ffn.layers.1'),
    'ConvNeXt-T': ('pointwise_conv1', 'pointwise_conv2'),
}
"""Linear layers that LoRA adapts, by backbone. mmpretrain's has no form for convolutions."""

DETECTORS: dict[str, str] = {
    'Mask R-CNN R50-FPN': 'configs/mask_rcnn_protune_r50_coco.py',
    'Mask R-CNN Swin-T': 'configs/mask_rcnn_protune_swin-t_coco.py',
}
SEGMENTORS: dict[str, str] = {
    'UPerNet R50': 'configs/upernet_protune_r50_ade20k.py',
    'UPerNet Swin-T': 'configs/upernet_protune_swin-t_ade20k.py',
}
ROWS: dict[str, dict] = {
    'full fine-tuning': dict(policy='full'),
    'stock frozen_stages': dict(policy='full', frozen_stages=1),
    'head-only': dict(policy='head-only'),
    'Pro-tuning, lean off': dict(lean=False),
    'Pro-tuning, least memory': dict(lean='memory'),
    'Pro-tuning, least time': dict(lean='time'),
}
PROMPTS.import_from_location()
for _kind in PROMPTS.module_dict:
    if _kind != 'ProTuningBlock':
        ROWS[f'{_kind}, lean off'] = dict(lean=False, prompt=dict(type=_kind))
        ROWS[f'{_kind}, least memory'] = dict(lean='memory', prompt=dict(type=_kind))
GPU_ROWS: dict[str, dict] = {
    'Pro-tuning, least memory, channels-last': dict(lean=dict(channels_last=True)),
    'Pro-tuning, least time, channels-last': dict(lean=dict(prefer='time', channels_last=True)),
}
"""What is the default on the CPU, and to be measured on a GPU."""
AMP_ROWS: dict[str, dict] = {
    'Pro-tuning, least memory, channels-last, weights in half': dict(
        lean=dict(channels_last=True, dtype='bfloat16')
    ),
}
"""With ``dtype`` replaced by :func:`half_of`."""
BASELINE = 'Pro-tuning, lean off'
LORA_ROW = "LoRA (mmpretrain's, rank 8)"
PEFT_ROW = 'LoRA (Hugging Face peft, rank 8)'

_peft: Path | None = None


def use_peft(folder: str) -> None:
    """Let the rows of Hugging Face peft in.

    Args:
        folder: where it was installed, apart from the rest: see requirements/peft.txt.
    """
    global _peft
    if not (Path(folder) / 'peft').is_dir():
        sys.exit(f"--peft: no package 'peft' in '{folder}'; see requirements/peft.txt")
    # mmpretrain cannot be imported beside transformers: it comes first.
    import mmpretrain.models  # noqa: F401

    sys.path.append(str(Path(folder).resolve()))
    _peft = Path(folder)


def backbone_rows() -> list[str]:
    """Ways to train a backbone alone: ours, and where the row applies, its rivals."""
    return [*ROWS, LORA_ROW, *([PEFT_ROW] if _peft else [])]


def quiet() -> None:
    """No log lines and warnings of the stack between the rows of a table."""
    logging.disable(logging.WARNING)
    warnings.simplefilter('ignore')


def backbone(name: str, row: str) -> nn.Module | None:
    """A backbone as one row trains it; None where the row does not apply to it.

    Args:
        name: key of :data:`BACKBONES`.
        row: one of :func:`backbone_rows`.
    """
    torch.manual_seed(0)
    config = dict(BACKBONES[name])
    if row == LORA_ROW:
        if name not in LORA:
            return None
        from mmpretrain.models.peft import LoRAModel

        targets = [dict(type=f'.*{target}') for target in LORA[name]]
        return LoRAModel(config, alpha=8, rank=8, targets=targets).train()
    if row == PEFT_ROW:
        return with_peft(MODELS.build(config), LORA.get(name))
    options = dict(ROWS[row])
    if 'frozen_stages' in options:
        config['frozen_stages'] = options.pop('frozen_stages')
    if options.get('policy', 'prompts') == 'prompts':
        options.setdefault('prompt', PROMPT)
    module = protune_mm.protune(MODELS.build(config), **options)
    module.train()
    return module


def with_peft(module: nn.Module, targets: tuple[str, ...] | None) -> nn.Module:
    """A backbone with peft's LoRA.

    Args:
        module: the stock backbone.
        targets: ends of the names of the layers to adapt. None: all convolutions but depth-wise
            ones, which peft cannot.
    """
    from peft import LoraConfig, inject_adapter_in_model

    names = [
        name
        for name, layer in module.named_modules()
        if (targets and name.endswith(targets))
        or (targets is None and isinstance(layer, nn.Conv2d) and layer.groups == 1)
    ]
    config = LoraConfig(r=8, lora_alpha=8, target_modules=names)
    module = inject_adapter_in_model(config, module)
    module.train()  # Some of the libraries' return None.
    return module


def half_of(name: str) -> torch.dtype:
    """What a model computes in under autocast: mmcv's RoIAlign has no kernel for bfloat16."""
    return torch.float16 if name in DETECTORS else torch.bfloat16


def whole_model(name: str, row: str) -> nn.Module:
    """A detector or segmentor as one row trains it, with random weights.

    Args:
        name: key of :data:`DETECTORS` or :data:`SEGMENTORS`.
        row: key of :data:`ROWS`.
    """
    torch.manual_seed(0)
    cfg = Config.fromfile(str(ROOT / {**DETECTORS, **SEGMENTORS}[name]))
    init_default_scope(cfg.default_scope)
    options = dict(ROWS[row])
    # Stock configs freeze the stem and the first stage; "full" trains everything.
    frozen = options.pop('frozen_stages', -1)
    if isinstance(options.get('lean'), dict) and 'dtype' in options['lean']:
        half = str(half_of(name)).removeprefix('torch.')
        options['lean'] = {**options['lean'], 'dtype': half}
    if options.get('policy') == 'full':
        cfg.model.backbone.frozen_stages = frozen
    cfg.model.backbone.update(options)
    cfg.model.backbone.init_cfg = None
    cfg.model.pop('pretrained', None)
    replace_sync_bn(cfg.model)
    model = MODELS.build(cfg.model)
    model.train()
    return model


def replace_sync_bn(cfg: dict) -> None:
    """SyncBN needs a process group to train."""
    for key, value in cfg.items():
        if isinstance(value, dict):
            replace_sync_bn(value)
        elif isinstance(value, list):
            for item in value:
                if isinstance(item, dict):
                    replace_sync_bn(item)
        elif key == 'type' and value == 'SyncBN':
            cfg[key] = 'BN'


def loss_of(
    name: str, model: nn.Module, size: tuple[int, int], batch: int
) -> Callable[[], list[Tensor]]:
    """A function that runs one forward pass with random images and labels to its losses.

    Args:
        name: key of :data:`DETECTORS` or :data:`SEGMENTORS`.
        model: of that name.
        size: height and width of the images, in pixels.
        batch: number of images.
    """
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(batch, 3, *size, generator=generator).to(device)
    make = detection_labels if name in DETECTORS else segmentation_labels
    samples = [make(size, generator).to(device) for _ in range(batch)]

    def run() -> list[Tensor]:
        torch.manual_seed(0)  # Proposals are sampled.
        losses = model.loss(images, samples)
        flat = [
            v for value in losses.values() for v in (value if isinstance(value, list) else [value])
        ]
        return [loss for loss in flat if loss.requires_grad]

    return run


def detection_labels(size: tuple[int, int], generator: torch.Generator) -> object:
    """Ten random boxes with masks."""
    import numpy as np
    from mmdet.structures import DetDataSample
    from mmdet.structures.mask import BitmapMasks
    from mmengine.structures import InstanceData

    height, width = size
    corner = torch.rand(10, 2, generator=generator) * torch.tensor([width * 0.7, height * 0.7])
    extent = torch.rand(10, 2, generator=generator) * torch.tensor([width, height]) * 0.25 + 8
    boxes = torch.cat((corner, corner + extent), dim=1)
    masks = np.zeros((10, height, width), dtype=np.uint8)
    for mask, (x1, y1, x2, y2) in zip(masks, boxes.int().tolist(), strict=True):
        mask[y1:y2, x1:x2] = 1
    sample = DetDataSample(
        metainfo=dict(
            img_shape=size, ori_shape=size, pad_shape=size, batch_input_shape=size,
            scale_factor=(1.0, 1.0),
        )
    )  # fmt: skip
    sample.gt_instances = InstanceData(
        bboxes=boxes,
        labels=torch.randint(0, 80, (10,), generator=generator),
        masks=BitmapMasks(masks, height, width),
    )
    sample.ignored_instances = InstanceData(bboxes=boxes[:0], labels=torch.zeros(0).long())
    return sample


def segmentation_labels(size: tuple[int, int], generator: torch.Generator) -> object:
    """A random map of classes."""
    from mmengine.structures import PixelData
    from mmseg.structures import SegDataSample

    sample = SegDataSample(metainfo=dict(img_shape=size, ori_shape=size, pad_shape=size))
    sample.gt_sem_seg = PixelData(data=torch.randint(0, 150, (1, *size), generator=generator))
    return sample


def check_tests(*files: str, skip: bool = False) -> None:
    """Refuse to report numbers of code whose tests fail.

    Args:
        files: of the tests.
        skip: they were run just before.
    """
    if skip:
        return
    print(f'running {" ".join(files)} first ...', flush=True)
    done = subprocess.run(
        [sys.executable, '-m', 'pytest', '-q', '-x', *files],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    last = (done.stdout.strip().splitlines() or [''])[-1]
    # Where all are skipped, for want of a GPU say, pytest is content.
    if done.returncode or not re.search(r'\d passed', last):
        why = 'the tests fail' if done.returncode else 'no test has passed'
        sys.exit(f'{done.stdout[-2000:]}{done.stderr[-2000:]}\nno benchmark: {why}')
    print(last, flush=True)


def environment(device: str) -> dict:
    """Machine and versions, for the reader of a table."""
    name = torch.cuda.get_device_name() if device == 'cuda' else processor()
    return dict(device=name, threads=torch.get_num_threads(), versions=stack_versions())


FOLDER = 'docs/benchmark'
OPTIONS = {
    '--cases': dict(nargs='+', help='names of models, for a part of the table; default: all'),
    '--peft': dict(help='folder that Hugging Face peft is installed in: adds a row'),
}


def arguments(description: str, *more: str) -> argparse.ArgumentParser:
    """The options that all benchmarks have, and ``more`` of :data:`OPTIONS`."""
    parser = argparse.ArgumentParser(description=description)
    for name in more:
        parser.add_argument(name, **OPTIONS[name])
    parser.add_argument('--skip-tests', action='store_true', help='they were run just before')
    parser.add_argument('--out', help=f'folder of JSON and table; default: {FOLDER}')
    return parser


def chosen(
    parser: argparse.ArgumentParser, args: argparse.Namespace, names: Iterable[str]
) -> list[str]:
    """Names of the cases to measure: those of ``--cases``, or all.

    Ends the program where one is unknown, and where a part is to replace the whole table.
    """
    names = list(names)
    for case in args.cases or ():
        if case not in names:
            parser.error(f"--cases: '{case}' is unknown: there are {'; '.join(names)}")
    refuse_part(parser, args, 'cases')
    return [name for name in names if not args.cases or name in args.cases]


def refuse_part(parser: argparse.ArgumentParser, args: argparse.Namespace, option: str) -> None:
    """End the program where an option chooses a part and nothing says where it is to go."""
    if getattr(args, option) and not args.out:
        parser.error(f'--{option} measures a part, {FOLDER} holds all: name a folder with --out')


def write(out: str | None, name: str, rows: list[dict], text: str, device: str) -> None:
    """Write ``name.json`` and ``name.md``; without a folder into :data:`FOLDER`."""
    folder = Path(out or FOLDER)
    folder.mkdir(parents=True, exist_ok=True)
    facts = environment(device)
    (folder / f'{name}.json').write_text(json.dumps(dict(**facts, rows=rows), indent=1) + '\n')
    versions = ', '.join(f'{k} {v}' for k, v in facts['versions'].items())
    foot = f'Run on {facts["device"]}, {facts["threads"]} threads, seed 0, with {versions}.'
    (folder / f'{name}.md').write_text(f'{text}\n{foot}\n')
    print(f'wrote {folder / name}.json and .md')
