"""What stock models need that a computer without network, weights or a second process lacks."""

from __future__ import annotations

import contextlib
import functools
import os
import string
import tempfile
from collections.abc import Iterator
from pathlib import Path

from mmengine.config import Config

from .reading import home


def adapt(cfg: Config) -> Config:
    """Make the model of a config one that builds here; nothing in it changes the backbone.

    Weights are not fetched, a text encoder is a small one with random weights, and a batch norm
    that asks for a process group is one that does not.

    Args:
        cfg: changed in place.

    Returns:
        Config: the same object.
    """
    _adapt(cfg.get('model'))
    return cfg


def _adapt(value: object) -> None:
    if isinstance(value, list | tuple):
        for item in value:
            _adapt(item)
    if not isinstance(value, dict):
        return
    for key in ('pretrained', 'teacher_ckpt', 'checkpoint_path'):
        if value.get(key):
            value.pop(key)
    if value.get('type') == 'AppearanceFreeLink':
        value['checkpoint'] = ''
    rules = value.get('init_cfg')
    if isinstance(rules, dict) and rules.get('type') == 'Pretrained':
        value.pop('init_cfg')
    if value.get('type') == 'MMSyncBN':
        value['type'] = 'SyncBN'
    if value.get('eps') == 0:
        value['eps'] = 1e-5  # PyTorch 2.11 refuses 0.
    if value.get('type') == 'BertModel':
        value['name'] = text_encoder()
    if 'lang_model_name' in value:
        value['lang_model_name'] = text_encoder()
    for item in list(value.values()):
        _adapt(item)


@functools.cache
def text_encoder() -> str:
    """Folder of a BERT of one layer with random weights, whose words are letters."""
    from transformers import BertConfig, BertModel, BertTokenizer

    folder = Path(_scratch().name)
    letters = [*string.ascii_lowercase, *string.digits]
    words = ['[PAD]', '[UNK]', '[CLS]', '[SEP]', '[MASK]', '.', '?', ',', *letters]
    words += [f'##{letter}' for letter in letters]
    (folder / 'vocab.txt').write_text('\n'.join(words))
    BertTokenizer(str(folder / 'vocab.txt')).save_pretrained(folder)
    BertModel(BertConfig(vocab_size=len(words), num_hidden_layers=1)).save_pretrained(folder)
    return str(folder)


@functools.cache
def _scratch() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory(prefix='coverage_bert_')  # gone when this process ends


@contextlib.contextmanager
def in_repository(file: str) -> Iterator[None]:
    """Some configs name others by the path in their library's repository: work there."""
    before = Path.cwd()
    os.chdir(home(file.partition('::')[0]))
    try:
        yield
    finally:
        os.chdir(before)
