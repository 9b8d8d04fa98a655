"""Find and check the annotation files and images of a COCO-format folder, for quickstart.py."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any


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
    val = find_annotations(root, 'val', 'test', but=train)
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


def find_annotations(root: Path, *words: str, but: Path | None = None) -> Path:
    """The annotation file of a split, and not ``but``: the first word that has one decides."""
    for word in words:
        # Some exports keep the annotations of a split beside its images.
        for pattern in ('annotations/*.json', '*.json', '*/*.json'):
            files = [f for f in sorted(root.glob(pattern)) if f != but]
            found = [f for f in files if word in f'{f.relative_to(root)}']
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


def check_keys(path: Path, kind: str, entries: object, keys: Iterable[str]) -> None:
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise BadInputError(
            f'{path} is not in COCO format: its {kind} entries are no list of objects'
        )
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
