"""Test (and evaluate) a checkpoint of any of the three libraries.

python tools/test.py configs/mask_rcnn_protune_r50_coco.py CHECKPOINT
"""

import argparse

from mmengine.evaluator import DumpResults
from mmengine.fileio import dump

from protune_mm import cli, tta


def main() -> None:
    parser = argparse.ArgumentParser(description='Test a Pro-tuned model')
    cli.add_common_arguments(parser, checkpoint=True)
    parser.add_argument('--out', help='write predictions (.pkl) or metrics (.json) to this file')
    parser.add_argument('--show', action='store_true', help='show predictions in a window')
    parser.add_argument('--show-dir', help='write pictures of predictions to this directory')
    parser.add_argument('--wait-time', type=float, default=2, help='seconds for each window')
    parser.add_argument('--tta', action='store_true', help='test-time augmentation')
    cfg, args = cli.parse(parser)
    if args.out and not args.out.endswith(('.pkl', '.pickle', '.json')):
        parser.error(f'--out {args.out}: use .pkl for predictions or .json for metrics')

    cfg.load_from = args.checkpoint
    cfg.resume = False  # A config dumped by a training that was resumed says True.
    if args.show or args.show_dir:
        cli.draw_predictions(cfg, args)
    if args.tta:
        tta.use_tta(cfg)
    if str(cfg.get('runner_type')).endswith('ProTuneFlexibleRunner'):
        # FSDP is for training; its checkpoints are like all others.
        cfg.runner_type = 'protune_mm.ProTuneRunner'
    runner = cli.build_runner(cfg)
    if args.out and not args.out.endswith('.json'):
        runner.test_evaluator.metrics.append(DumpResults(out_file_path=args.out))
    metrics = runner.test()
    if args.out and args.out.endswith('.json'):
        dump(metrics, args.out)


if __name__ == '__main__':
    cli.run(main)
