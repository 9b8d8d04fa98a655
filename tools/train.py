"""Train any MMDetection, MMSegmentation or MMPretrain config, Pro-tuned.

python tools/train.py configs/mask_rcnn_protune_r50_coco.py
python tools/train.py mmdet::retinanet/retinanet_r50_fpn_1x_coco.py --protune
"""

import argparse

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
        cfg.resume = True
        # A job that is put back into a queue has --resume from its first start on.
        cfg.first_load_from = cfg.get('load_from') if args.resume == 'auto' else None
        cfg.load_from = None if args.resume == 'auto' else args.resume
    if args.auto_scale_lr:
        if 'base_batch_size' not in (cfg.get('auto_scale_lr') or {}):
            parser.error(f'--auto-scale-lr: {args.config} has no auto_scale_lr.base_batch_size')
        cfg.auto_scale_lr.enable = True
    if args.no_validate:
        cfg.val_cfg = cfg.val_dataloader = cfg.val_evaluator = None
    cli.build_runner(cfg).train()


if __name__ == '__main__':
    cli.run(main)
