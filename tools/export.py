"""Turn a trained checkpoint into what is published, shared or deployed.

    python tools/export.py tuned CONFIG CHECKPOINT OUT.pth     # prompts, neck and head alone
    python tools/export.py full CONFIG CHECKPOINT OUT.pth      # with the frozen base
    python tools/export.py merged CONFIG CHECKPOINT OUT.pth    # a stock file (LoRA, ScaleShift)
    python tools/export.py onnx CONFIG CHECKPOINT OUT.onnx --shape 224 224

`--half` writes float16, `--publish` puts the start of the file's SHA-256 into its name, as MM
libraries do. Optimizer and loop state are left out. `onnx` exports the whole classifier or
segmentor, or with `--backbone` the backbone, and compares onnxruntime with PyTorch.
"""

from __future__ import annotations

import argparse
import hashlib
from pathlib import Path

import torch
from mmengine.config import Config, DictAction
from mmengine.registry import MODELS, init_default_scope
from mmengine.runner.checkpoint import _load_checkpoint, _load_checkpoint_to_model
from stock_configs.backbones import difference
from torch import Tensor, nn

import protune_mm
from protune_mm import cli
from protune_mm.checkpoints import identities, tuned_state_dict
from protune_mm.config import is_protuned, library
from protune_mm.files import whole_file
from protune_mm.policies import POLICIES
from protune_mm.tuned import backbones, frozen_keys, frozen_tensors

TOLERANCE = 1e-3
"""Part of the largest output by which onnxruntime may differ from PyTorch, in float32."""


def main() -> None:
    parser = argparse.ArgumentParser(description='Export a Pro-tuned checkpoint')
    parser.add_argument('what', choices=['tuned', 'full', 'merged', 'onnx'], help='see above')
    parser.add_argument('config', help='config file, or package::path')
    parser.add_argument('checkpoint', help='checkpoint file, tuned-only or whole')
    parser.add_argument('out', help='file to write')
    parser.add_argument('--half', action='store_true', help='float16 instead of float32')
    parser.add_argument('--publish', action='store_true', help='a hash in the name of the file')
    parser.add_argument('--backbone', action='store_true', help='onnx: the backbone alone')
    parser.add_argument(
        '--shape', type=int, nargs=2, metavar=('H', 'W'), help='onnx: pixels; default: 224 224'
    )
    parser.add_argument('--protune', action='store_true', help='Pro-tune a stock config')
    parser.add_argument('--policy', metavar='|'.join(POLICIES), help='as in train.py')
    parser.add_argument('--cfg-options', nargs='+', action=DictAction, help='as in train.py')
    args = parser.parse_args()
    if args.what == 'onnx' and (args.half or args.publish):
        parser.error('--half and --publish are for checkpoints, not for onnx')
    if args.what != 'onnx' and (args.backbone or args.shape):
        parser.error(f'--backbone and --shape are for onnx, not for {args.what}')
    out = Path(args.out)
    if not out.parent.is_dir():
        parser.error(f'{out.parent} is no folder')
    chosen = args.protune, args.policy, args.cfg_options
    model, meta, cfg = load(args.config, args.checkpoint, *chosen)
    if args.what == 'onnx':
        worst = to_onnx(model, cfg, out, tuple(args.shape or (224, 224)), args.backbone)
        print(f'{out}: {size(out)}, differs from PyTorch by {worst:.1e} of the largest output')
        return
    path = write(dict(meta=meta, state_dict=weights(model, args.what, args.half)), out)
    if args.publish:
        path = publish(path)
    print(f'{path}: {size(path)}')


def load(
    config: str,
    checkpoint: str,
    protune: bool = False,
    policy: str | None = None,
    options: dict | None = None,
) -> tuple[nn.Module, dict, Config]:
    """The model of a config with the weights of a checkpoint, the file's meta, and the config.

    Raises:
        ValueError: the config is not Pro-tuned, a file cannot be read, or it holds not all weights
            of a frozen backbone.
        RuntimeError: the base is not the one of the checkpoint.
    """
    cfg = cli.read_config(config, protune, policy, options)
    if not is_protuned(cfg):
        raise ValueError(f'{config} is not Pro-tuned; add --protune')
    init_default_scope(cfg.get('default_scope', 'mmengine'))
    preprocessor = cfg.get('data_preprocessor')
    if preprocessor and 'data_preprocessor' not in cfg.model:
        cfg.model.data_preprocessor = dict(preprocessor)
        if library(cfg) == 'mmpretrain':
            cfg.model.data_preprocessor.setdefault('type', 'ClsDataPreprocessor')
    model = MODELS.build(cfg.model)
    loaded = _load_checkpoint(checkpoint, map_location='cpu')
    _load_checkpoint_to_model(model, loaded)
    for backbone in backbones(model).values():
        problem = backbone._protune.loads.problem(backbone, dict(frozen_tensors(backbone)))
        if problem:
            raise ValueError(f'{checkpoint}: {problem}')
    meta = {k: v for k, v in loaded.get('meta', {}).items() if k in ('dataset_meta', 'cfg')}
    return model.eval(), meta, cfg


def weights(model: nn.Module, what: str, half: bool = False) -> dict[str, Tensor]:
    """The ``state_dict`` to write.

    Raises:
        ValueError: ``'merged'`` for prompts that are no change of weights.
    """
    if what == 'tuned':
        state = tuned_state_dict(model)
    elif what == 'merged':
        state = protune_mm.merge(model).state_dict()
    else:
        state = model.state_dict()
        # The fingerprint is of the weights in full precision.
        state = state if half else {**state, **identities(model)}
    if half:
        # Frozen weights of no file are told by their fingerprint, which is of full precision.
        whole = frozen_keys(model) if what == 'tuned' else ()
        state = {
            k: v.half() if v.dtype == torch.float32 and k not in whole else v
            for k, v in state.items()
        }
    return {key: tensor.detach().cpu() for key, tensor in state.items()}


def write(checkpoint: dict, path: Path) -> Path:
    """Write a file so that a crash leaves none, or the whole one."""
    with whole_file(path) as partial:
        torch.save(checkpoint, partial)
    return path


def publish(path: Path) -> Path:
    """Put the start of a file's SHA-256 into its name."""
    digest = hashlib.sha256(path.read_bytes()).hexdigest()[:8]
    return path.replace(path.with_name(f'{path.stem}-{digest}{path.suffix}'))


def size(path: Path) -> str:
    """Size of a file in words."""
    return f'{path.stat().st_size / 1e6:.2f} MB'


class _Forward(nn.Module):
    """What a classifier or segmentor computes from preprocessed images, as tensors."""

    def __init__(self, model: nn.Module, whole: bool) -> None:
        super().__init__()
        self.model, self.whole = model, whole

    def forward(self, images: Tensor) -> Tensor | tuple[Tensor, ...]:
        out = self.model(images, mode='tensor') if self.whole else self.model(images)
        if isinstance(out, tuple | list):
            return out[0] if len(out) == 1 else tuple(out)
        return out


def to_onnx(
    model: nn.Module, cfg: object, path: Path, shape: tuple[int, int], backbone: bool
) -> float:
    """Export to ONNX and compare with PyTorch.

    Args:
        model: in evaluation mode.
        cfg: its config.
        path: file to write; none is left where the comparison fails.
        shape: height and width, in pixels, of preprocessed images ``(1, 3, H, W)``.
        backbone: the backbone alone.

    Returns:
        float: largest difference, as a part of the largest output.

    Raises:
        ValueError: a detector as a whole, more or less than one Pro-tuned backbone, a library that
            is missing, or outputs that differ.
    """
    if library(cfg) == 'mmdet' and not backbone:
        raise ValueError('onnx: a whole detector needs mmdeploy; use --backbone')
    try:
        import onnxruntime
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ValueError(f'onnx: pip install onnx onnxruntime onnxscript ({error})') from error
    part = model
    if backbone:
        found = backbones(model)
        if len(found) != 1:
            there = ', '.join(found) or 'none'
            raise ValueError(f'onnx: --backbone needs one Pro-tuned backbone, there is: {there}')
        (part,) = found.values()
    if library(cfg) == 'mmpretrain' and not backbone and hasattr(model, 'head'):
        part = _Classifier(model)
    module = _Forward(part, whole=not backbone and not isinstance(part, _Classifier)).eval()
    images = torch.randn(1, 3, *shape, generator=torch.Generator().manual_seed(0))
    with whole_file(path) as partial:
        with torch.no_grad():
            torch.onnx.export(module, (images,), str(partial), dynamo=True, external_data=False)
            expected = module(images)
        expected = list(expected) if isinstance(expected, tuple) else [expected]
        session = onnxruntime.InferenceSession(str(partial))
        got = session.run(None, {session.get_inputs()[0].name: images.numpy()})
        worst = difference(expected, list(map(torch.from_numpy, got)))
        if not worst <= TOLERANCE:
            raise ValueError(
                f'onnx: onnxruntime differs from PyTorch by {worst:.1e} of the largest output: '
                'no file is written'
            )
    return worst


class _Classifier(nn.Module):
    """A classifier as a function from images to scores."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return self.model.head(self.model.extract_feat(images))


if __name__ == '__main__':
    cli.run(main)
