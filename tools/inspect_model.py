"""Print where the prompts of a config sit, their shapes, and what trains and what is frozen.

python tools/inspect_model.py configs/mask_rcnn_protune_r50_coco.py
"""

import argparse

from mmengine.config import DictAction
from mmengine.registry import MODELS, init_default_scope
from rich.console import Console
from rich.table import Table
from torch import Tensor

from protune_mm import cli
from protune_mm.config import library
from protune_mm.policies import POLICIES
from protune_mm.probe import PROBE_SIZE, probe_outputs
from protune_mm.report import parameter_counts, parameter_line, prompt_rows
from protune_mm.stages.family import image_size
from protune_mm.tuned import backbones


def main() -> None:
    parser = argparse.ArgumentParser(description='Print the table of stages and prompts')
    parser.add_argument('config', help='config file, or package::path, stock or Pro-tuned')
    parser.add_argument('--protune', action='store_true', help='Pro-tune a stock config')
    parser.add_argument(
        '--policy', metavar='|'.join(POLICIES), help='twin of the config to inspect'
    )
    parser.add_argument('--cfg-options', nargs='+', action=DictAction, help='override settings')
    parser.add_argument(
        '--shape',
        type=int,
        nargs=2,
        metavar=('HEIGHT', 'WIDTH'),
        help='input size for the column of shapes, in pixels; default: the native size of the '
        f'backbone, else {PROBE_SIZE[0]} {PROBE_SIZE[1]}',
    )
    args = parser.parse_args()
    cfg = cli.read_config(args.config, args.protune, args.policy, args.cfg_options)
    init_default_scope(library(cfg))
    model = MODELS.build(cfg.model)

    console = Console(width=140)
    if not backbones(model):
        console.print(
            f'{args.config} has no frozen backbone: it is stock, or its policy is full; '
            '--protune Pro-tunes it'
        )
    for name, backbone in backbones(model).items():
        size = tuple(args.shape or image_size(backbone) or PROBE_SIZE)
        rows = prompt_rows(backbone)
        try:
            outputs = probe_outputs(backbone, [row['block'] for row in rows], size)
        except ValueError as error:
            # Custom kernels know no fake tensors; the rest of the table needs no shapes.
            outputs = {}
            console.print(f'no shapes: {str(error).splitlines()[0]}')
        table = Table(
            'stage', 'block', 'prompt', 'output', 'joined', 'trainable', 'frozen in stage'
        )
        frozen = frozen_up_to(backbone, [row['block'] for row in rows])
        for row in rows:
            table.add_row(
                row['stage'],
                row['block'],
                row['type'],
                shape(outputs.get(row['block'])),
                row['join'],
                f'{row["parameters"]:,}',
                f'{frozen[row["block"]]:,}',
            )
        console.print(f'{name}: {type(backbone).__name__}, input 3x{size[0]}x{size[1]}')
        if rows:
            console.print(table)
    counts = parameter_counts(model)
    total = sum(counts.values())
    trained = counts['prompts'] + counts['rest']
    if backbones(model):
        console.print(parameter_line(model))
    console.print(f'trainable {trained:,} of {total:,} parameters ({100 * trained / total:.2f}%)')


def frozen_up_to(backbone, blocks: list) -> dict:
    """Frozen parameters that run since the prompt before, in the order of the parameters."""
    counts, pending = {}, 0
    remaining = list(blocks)
    owner = None
    for name, parameter in backbone.named_parameters():
        block = next((b for b in remaining if name.startswith(f'{b}.')), None)
        if owner is not None and block != owner:
            counts[owner], pending = pending, 0
            remaining.remove(owner)
        owner = block
        pending += 0 if parameter.requires_grad else parameter.numel()
    if owner is not None:
        counts[owner] = pending
    return {block: counts.get(block, 0) for block in blocks}


def shape(output: object) -> str:
    return 'x'.join(map(str, output.shape[1:])) if isinstance(output, Tensor) else '?'


if __name__ == '__main__':
    cli.run(main)
