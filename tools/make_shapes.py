"""Write a small, deterministic COCO-format instance-segmentation set of drawn shapes.

    python tools/make_shapes.py data/shapes

Circles, squares and triangles of varying colour, size and place on a textured background; each
has a box, a polygon and a class. The same arguments give the same bytes.
"""

import argparse
import json
import math
import re
import shutil
import tempfile
from pathlib import Path

import cv2
import numpy as np

CLASSES = ('circle', 'square', 'triangle')
CATEGORIES = [{'id': i, 'name': name} for i, name in enumerate(CLASSES, 1)]
FILES = re.compile(r'images/(train|val)/\d{4,}\.png|annotations/(train|val)\.json')
"""All that is in a folder that this tool has drawn."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('out', help='folder to write: images/{train,val}, annotations/*.json')
    parser.add_argument('--train', type=int, default=160, help='training images')
    parser.add_argument('--val', type=int, default=40, help='validation images')
    parser.add_argument('--size', type=int, nargs=2, default=(192, 144), help='width and height')
    parser.add_argument('--seed', type=int, default=0)
    args = parser.parse_args()
    out = Path(args.out).resolve()
    if out.exists() and not may_replace(out):
        parser.error(f'{out} is there, and is no folder of shapes alone: name a new one')
    out.parent.mkdir(parents=True, exist_ok=True)
    # Written beside and renamed, so that a folder that exists is a complete one.
    with tempfile.TemporaryDirectory(prefix=f'.{out.name}.', dir=out.parent) as beside:
        part = Path(beside, out.name)
        for index, (split, count) in enumerate((('train', args.train), ('val', args.val))):
            write_split(part, split, count, args.size, np.random.default_rng([args.seed, index]))
        if out.exists():
            shutil.rmtree(out)
        part.rename(out)
    print(f'{args.out}: {args.train} training and {args.val} validation images of shapes')


def may_replace(folder: Path) -> bool:
    """Whether a folder is empty, or holds what this tool has drawn and nothing else."""
    if not folder.is_dir():
        return False
    files = []
    for path in folder.rglob('*'):  # To the first that is none of ours: a home folder has millions.
        if not path.is_dir():
            if not FILES.fullmatch(path.relative_to(folder).as_posix()):
                return False
            files.append(path)
    # A set of somebody else may have such names, too.
    found = [json.dumps(CATEGORIES) in path.read_text() for path in files if path.suffix == '.json']
    return all(found) and bool(found or not files)


def write_split(root: Path, split: str, count: int, size: tuple, rng: np.random.Generator) -> None:
    """Write ``count`` images and their annotation file."""
    folder = root / 'images' / split
    folder.mkdir(parents=True)
    (root / 'annotations').mkdir(exist_ok=True)
    images, annotations = [], []
    for image_id in range(1, count + 1):
        picture, shapes = draw(size, rng)
        name = f'{image_id:04d}.png'
        cv2.imwrite(str(folder / name), picture)
        images.append({'id': image_id, 'file_name': name, 'width': size[0], 'height': size[1]})
        for category, polygon in shapes:
            # Pixel i covers [i, i + 1] in COCO's coordinates; OpenCV draws around its centre.
            polygon = polygon + 0.5
            x, y = polygon.min(0)
            w, h = polygon.max(0) - polygon.min(0)
            annotations.append(
                {
                    'id': len(annotations) + 1,
                    'image_id': image_id,
                    'category_id': category + 1,
                    'bbox': [float(x), float(y), float(w), float(h)],
                    'area': float(cv2.contourArea(polygon.astype(np.float32))),
                    'segmentation': [[float(v) for v in polygon.reshape(-1)]],
                    'iscrowd': 0,
                }
            )
    document = {
        'images': images,
        'annotations': annotations,
        'categories': CATEGORIES,
    }
    (root / 'annotations' / f'{split}.json').write_text(json.dumps(document))


def draw(size: tuple, rng: np.random.Generator) -> tuple:
    """One picture (H, W, 3), uint8, and its shapes as (class, polygon (N, 2) in pixels)."""
    width, height = size
    coarse = rng.integers(60, 200, (height // 16 + 1, width // 16 + 1, 3)).astype(np.float32)
    picture = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)
    picture = np.clip(picture + rng.normal(0, 8, picture.shape), 0, 255).astype(np.uint8)
    shapes: list = []
    taken: list = []
    for _ in range(int(rng.integers(1, 4))):
        radius = float(rng.uniform(0.12, 0.22) * min(size))
        centre = rng.uniform((radius + 2,) * 2, (width - radius - 2, height - radius - 2))
        if any(math.dist(centre, c) < radius + r + 4 for c, r in taken):
            continue
        category = int(rng.integers(len(CLASSES)))
        corners = (40, 4, 3)[category]
        angles = rng.uniform(0, 2 * math.pi) + np.arange(corners) * 2 * math.pi / corners
        polygon = centre + radius * np.stack((np.cos(angles), np.sin(angles)), 1)
        colour = rng.integers(0, 256, 3).tolist()
        cv2.fillPoly(picture, [np.round(polygon).astype(np.int32)], colour)
        taken.append((tuple(centre), radius))
        shapes.append((category, polygon))
    return picture, shapes


if __name__ == '__main__':
    main()
