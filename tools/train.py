"""Train any MMDetection, MMSegmentation or MMPretrain config, Pro-tuned.

python tools/train.py configs/mask_rcnn_protune_r50_coco.py
python tools/train.py mmdet::retinanet/retinanet_r50_fpn_1x_coco.py --protune
"""

import argparse

from mmengine.runner import find_latest_checkpoint

from protune_mm import cli


def main() -> None:
    parser = argparse.ArgumentParser(description='Train a Pro-tuned model')
    cli.add_common_arguments(parser)
    parser.add_argument('--amp', action='store_true', help='automatic mixed precision')
    parser.add_argument(
        '--resume',
        nargs='?',
        const='auto',
        help='checkpoint to resume from; without a value, the latest one in the work directory',
    )
    parser.add_argument(
        '--auto-scale-lr',
        action='store_true',
        help='scale the learning rate by the real batch size over auto_scale_lr.base_batch_size',
    )
    parser.add_argument('--no-validate', action='store_true', help='skip validation')
    cfg, args = cli.parse(parser)

    if args.amp:
        cfg.optim_wrapper.type = 'AmpOptimWrapper'
        cfg.optim_wrapper.setdefault('loss_scale', 'dynamic')
    if args.resume:
        # A job that is put back into a queue has --resume from its first start on.
        if args.resume != 'auto':
            cfg.resume, cfg.load_from = True, args.resume
        elif cli.is_careful(cfg):
            cfg.resume, cfg.first_load_from, cfg.load_from = True, cfg.get('load_from'), None
        elif find_latest_checkpoint(cfg.work_dir):
            cfg.resume, cfg.load_from = True, None
    if args.auto_scale_lr:
        if 'base_batch_size' not in (cfg.get('auto_scale_lr') or {}):
            parser.error(f'--auto-scale-lr: {args.config} has no auto_scale_lr.base_batch_size')
        cfg.auto_scale_lr.enable = True
    if args.no_validate:
        cfg.val_cfg = cfg.val_dataloader = cfg.val_evaluator = None
    cli.build_runner(cfg).train()


if __name__ == '__main__':
    cli.run(main)
