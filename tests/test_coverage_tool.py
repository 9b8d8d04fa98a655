"""tools/coverage.py tries stock configs, notes each result at once, and goes on where it was."""

import json

from tests.conftest import run_tool

CONFIGS = (
    'mmpretrain::shufflenet_v2/shufflenet-v2-1x_16xb64_in1k.py',
    'mmpretrain::mae/mae_vit-base-p16_8xb512-amp-coslr-300e_in1k.py',
)


def run(folder, *more):
    few = ['--config', *CONFIGS, '--jobs', 1, '--work-dir', folder]
    return run_tool('tools/coverage.py', *few, *more)


def test_a_sample_of_configs(tmp_path):
    done = run(tmp_path)
    results = tmp_path / 'results.jsonl'
    rows = [json.loads(line) for line in results.read_text().splitlines()]
    kinds = {kind: [r for r in rows if r['key'].startswith(kind)] for kind in ('config', 'build')}
    assert len(kinds['config']) == 2
    assert {row['status'] for row in rows} == {'read', 'ok', 'refused'}
    backbones = [row for row in rows if row['key'].startswith('backbone')]
    assert [row['status'] for row in backbones] == ['ok', 'refused']
    assert 0 < backbones[0]['prompts'] < 0.08
    assert 'masks its own tokens' in backbones[1]['reason']
    steps = [row for row in rows if row['key'].startswith('step')]
    assert [row['file'] for row in steps] == [CONFIGS[0]]
    assert '| mmpretrain | ImageClassifier | ok | shufflenet_v2/' in done.stdout
    assert '1 of 1 types train' in done.stdout
    assert '1 configs: 1 ok (100.0%); 0 with an ok backbone' in done.stdout
    assert '1 configs: 0 ok (0.0%); 0 with an ok backbone in a model' in done.stdout
    assert '[1/' in done.stdout

    # A line that was cut off is done again, and nothing else.
    text = results.read_text()
    results.write_text(text[: text.rindex('{"key"') + 20])
    again = run(tmp_path)
    assert next(line for line in again.stdout.splitlines() if line.startswith('[')).startswith(
        '[1/1,'
    )
    assert run(tmp_path, '--table').stdout.count('ImageClassifier') == 1
