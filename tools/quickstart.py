"""Pro-tune Mask R-CNN on a few hundred images and show what it has learnt.

    python tools/quickstart.py                  # drawn shapes, about two minutes on two cores
    python tools/quickstart.py --data FOLDER    # any COCO-format folder with masks

It fetches a pre-trained backbone, draws the data where none is given, trains the stock Mask R-CNN
of MMDetection with its backbone Pro-tuned, and ends with box AP, mask AP and a picture.
"""

import argparse
import contextlib
import itertools
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from coco_folder import BadInputError, Layout, find_layout
from mobilenetv2_weights import find_weights

# The heavy imports are inside functions: bad input and --help are answered at once.

ROOT = Path(__file__).resolve().parents[1]
CONFIG = ROOT / 'configs' / 'small' / 'mask_rcnn_protune_mobilenetv2_shapes.py'
SHAPES = ROOT / 'data' / 'shapes'
POLICIES = ('prompts', 'head-only', 'full')
STEPS = 4

LONGEST_SIDE = 320
# The config expects a few large shapes in a picture; own data may have many small objects.
OWN_DATA = {
    'model.rpn_head.anchor_generator.scales': [4],
    'model.train_cfg.rpn.sampler.num': 128,
    'model.train_cfg.rpn_proposal': {'nms_pre': 500, 'max_per_img': 200},
    'model.train_cfg.rcnn.sampler.num': 64,
    'model.test_cfg.rpn': {'nms_pre': 300, 'max_per_img': 100},
    'model.test_cfg.rcnn.max_per_img': 100,
}
PICTURE_ROWS = 4
PICTURE_WIDTH = 640
GAP = 8
SCORE = 0.5
# Told apart by colour-blind readers too (Okabe and Ito); further classes start again.
COLOURS = [(230, 159, 0), (86, 180, 233), (0, 158, 115), (240, 228, 66), (213, 94, 0)]
COLOURS += [(204, 121, 167), (0, 114, 178)]


def main() -> None:
    args = parse()
    begin = time.time()
    step(1, 'data')
    layout = find_layout(args.data) if args.data else shapes()
    say(f'{layout.train.count} training images: {show(layout.train.annotations)}')
    say(f'{layout.val.count} validation images: {show(layout.val.annotations)}')
    say(f'{len(layout.classes)} classes: {", ".join(layout.classes)}')
    step(2, 'pre-trained backbone')
    weights = find_weights()
    say(f'MobileNetV2, ImageNet: {show(weights)}')
    step(3, 'training and validation')
    cfg = configure(args, layout, weights)
    runner, checkpoint = train(cfg)
    # Of the file itself, so that the numbers are those a user gets from it.
    runner.load_checkpoint(str(checkpoint))
    metrics = runner.val_loop.run()
    step(4, 'picture of predictions')
    picture = Path(cfg.work_dir) / 'predictions.png'
    draw(runner, layout, picture)
    say(show(picture))
    summarize(runner, metrics, checkpoint, picture, layout, time.time() - begin)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog='quickstart', description='Pro-tune Mask R-CNN on a few hundred images.'
    )
    parser.add_argument(
        '--data',
        type=Path,
        help='COCO-format folder with annotations/*train*.json, *val*.json (or *test*.json) and '
        'the images they name; default: drawn shapes, in data/shapes',
    )
    parser.add_argument('--epochs', type=int, help='default: as the config says, 8')
    parser.add_argument(
        '--work-dir',
        default=str(ROOT / 'work_dirs' / 'quickstart'),
        help='folder of logs, checkpoints and the picture; default: work_dirs/quickstart',
    )
    parser.add_argument(
        '--policy',
        choices=POLICIES,
        default='prompts',
        help="what trains besides the head: 'prompts' (Pro-tuning, the default), nothing more "
        "('head-only') or the whole backbone ('full')",
    )
    args = parser.parse_args()
    if args.epochs is not None and args.epochs < 1:
        parser.error(f'--epochs {args.epochs}: at least 1')
    return args


def step(number: int, title: str) -> None:
    print(f'\n== quickstart {number}/{STEPS}: {title}', flush=True)


def say(text: str) -> None:
    print(f'   {text}', flush=True)


def show(path: Path) -> str:
    """A path as short as it can be from here."""
    with contextlib.suppress(ValueError):
        return str(Path(path).resolve().relative_to(Path.cwd()))
    return str(path)


def shapes() -> Layout:
    """The set of drawn shapes, made where it is missing."""
    if not SHAPES.exists():
        say('drawing images of shapes')
        SHAPES.parent.mkdir(exist_ok=True)
        maker = [sys.executable, str(ROOT / 'tools' / 'make_shapes.py'), str(SHAPES)]
        subprocess.run(maker, check=True)
    return find_layout(SHAPES)


def configure(args: argparse.Namespace, layout: Layout, weights: Path) -> Any:
    """The config of the run: the quickstart config, with this data, weights and policy."""
    # The config reads the folder from the environment, as all small configs do.
    os.environ['PROTUNE_WEIGHTS'] = str(weights.parent)
    from protune_mm import cli

    cfg = cli.read_config(str(CONFIG), policy=args.policy)
    cfg.work_dir = args.work_dir
    if args.epochs:
        cfg.train_cfg.max_epochs = args.epochs
    set_data(cfg, layout)
    set_classes(cfg.model.roi_head, len(layout.classes))
    if args.data:
        cfg.merge_from_dict(OWN_DATA)
    batches = -(-layout.train.count // cfg.train_dataloader.batch_size)
    say(f'{cfg.train_cfg.max_epochs} epochs of {batches} iterations, policy {args.policy}')
    return cfg


def set_data(cfg: Any, layout: Layout) -> None:
    """Point loaders and evaluators of a config to a layout."""
    side = max(64, min(LONGEST_SIDE, layout.side))
    for loader, split in (
        (cfg.train_dataloader, layout.train),
        (cfg.val_dataloader, layout.val),
        (cfg.test_dataloader, layout.val),
    ):
        loader.dataset.update(
            data_root='',
            ann_file=str(split.annotations.resolve()),
            data_prefix=dict(img=f'{split.images.resolve()}/'),
            metainfo=dict(classes=layout.classes),
        )
        for transform in loader.dataset.pipeline:
            if transform.type == 'Resize':
                # With keep_ratio: the longer side, whichever it is.
                transform.scale = (side, side)
    for evaluator in (cfg.val_evaluator, cfg.test_evaluator):
        evaluator.ann_file = str(layout.val.annotations.resolve())


def set_classes(roi_head: Any, count: int) -> None:
    roi_head.bbox_head.num_classes = count
    roi_head.mask_head.num_classes = count


def train(cfg: Any) -> tuple[Any, Path]:
    """Train, and return the runner and the best checkpoint of the run."""
    from protune_mm import cli

    runner = cli.build_runner(cfg)
    runner.train()
    best = runner.message_hub.get_info('best_ckpt', None)
    return runner, Path(best or runner.message_hub.get_info('last_ckpt'))


# Results


def draw(runner: Any, layout: Layout, out: Path) -> None:
    """Write a picture: a row for each image, ground truth on the left, prediction on the right."""
    import cv2
    import numpy as np
    import torch
    from mmdet.visualization import DetLocalVisualizer
    from mmengine.dataset import pseudo_collate

    dataset = runner.val_dataloader.dataset
    visualizer = DetLocalVisualizer(name='quickstart', line_width=2)
    colours = list(itertools.islice(itertools.cycle(COLOURS), len(layout.classes)))
    runner.model.eval()
    rows = []
    for index in np.linspace(0, len(dataset) - 1, min(PICTURE_ROWS, len(dataset))).astype(int):
        item = dataset[int(index)]
        with torch.no_grad():
            sample = runner.model.test_step(pseudo_collate([item]))[0].cpu()
        image = cv2.cvtColor(cv2.imread(sample.img_path), cv2.COLOR_BGR2RGB)
        size = (PICTURE_WIDTH, round(image.shape[0] * PICTURE_WIDTH / image.shape[1]))
        large = cv2.resize(image, size, interpolation=cv2.INTER_LINEAR)
        found = sample.pred_instances
        columns = [
            draw_instances(visualizer, large, instances, layout.classes, colours)
            for instances in (sample.gt_instances, found[found.scores > SCORE])
        ]
        rows.append(np.concatenate(columns, axis=1))
    header = np.full((40, 2 * PICTURE_WIDTH, 3), 255, np.uint8)
    for column, text in enumerate(('ground truth', f'prediction, score over {SCORE}')):
        place = (column * PICTURE_WIDTH, 28)
        cv2.putText(header, text, place, cv2.FONT_HERSHEY_SIMPLEX, 0.9, 0, 2, cv2.LINE_AA)
    # White between the columns and between the rows.
    parts = [
        np.pad(
            np.insert(part, [PICTURE_WIDTH] * GAP, 255, axis=1),
            ((0, GAP), (GAP, GAP), (0, 0)),
            constant_values=255,
        )
        for part in (header, *rows)
    ]
    out.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(out), cv2.cvtColor(np.concatenate(parts), cv2.COLOR_RGB2BGR))


def draw_instances(
    visualizer: Any, image: Any, instances: Any, classes: tuple[str, ...], colours: list
) -> Any:
    """Draw instances on a picture that may be larger than the one they belong to.

    MMDetection's own drawing changes colour by instance and font size by area, which hides that
    both sides show the same thing.

    Args:
        image: (H, W, 3), uint8, RGB.
        colours: one for each class.

    Returns:
        ndarray: (H, W, 3), uint8, RGB.
    """
    import cv2
    import numpy as np
    from mmdet.structures.mask import bitmap_to_polygon

    height, width = image.shape[:2]
    visualizer.set_image(image)
    if not len(instances):
        return visualizer.get_image()
    colours = [colours[int(label)] for label in instances.labels]
    masks = instances.masks
    masks = masks.to_ndarray() if hasattr(masks, 'to_ndarray') else masks.numpy()
    factor = width / masks.shape[2]
    masks = np.stack([cv2.resize(m.astype(np.float32), (width, height)) > 0.5 for m in masks])
    visualizer.draw_binary_masks(masks, colors=colours, alphas=0.55)
    outlines = [outline for mask in masks for outline in bitmap_to_polygon(mask)[0]]
    if outlines:  # Every mask may be empty.
        visualizer.draw_polygons(outlines, edge_colors='w', line_widths=1.5)
    boxes = getattr(instances.bboxes, 'tensor', instances.bboxes) * factor
    visualizer.draw_bboxes(boxes, edge_colors=colours, line_widths=2)
    texts = [classes[int(label)] for label in instances.labels]
    if 'scores' in instances:
        texts = [f'{t} {s:.2f}' for t, s in zip(texts, instances.scores, strict=True)]
    # Above the box where there is room, so that the label hides none of a small object.
    places = boxes[:, :2].clone()
    above = places[:, 1] > 20
    places[above, 1] -= 20
    style = dict(facecolor='black', alpha=0.7, pad=1.5, edgecolor='none')
    visualizer.draw_texts(texts, places, font_sizes=11, colors='white', bboxes=[style] * len(texts))
    return visualizer.get_image()


def summarize(
    runner: Any, metrics: dict, checkpoint: Path, picture: Path, layout: Layout, seconds: float
) -> None:
    from protune_mm.report import parameter_line

    minutes, rest = divmod(round(seconds), 60)
    print(f'\n== quickstart: done in {minutes} min {rest:02d} s')
    on = f'COCO AP on {layout.val.count} validation images'
    if not metrics:
        say('nothing was found: train longer (--epochs), or on more images of each class')
    say(f'box AP   {metrics.get("coco/bbox_mAP", 0.0):.3f}   {on}')
    say(f'mask AP  {metrics.get("coco/segm_mAP", 0.0):.3f}   {on}')
    say(parameter_line(runner.model))
    say(f'checkpoint  {show(checkpoint)}')
    say(f'picture     {show(picture)}')


if __name__ == '__main__':
    try:
        main()
    except BadInputError as error:
        print(f'error: {error}', file=sys.stderr)
        sys.exit(2)
