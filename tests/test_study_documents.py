"""docs/study: the committed tables are what the committed results say."""

import importlib
import itertools
import json

import pytest

from protune_mm.compat import stack_versions
from tests.conftest import ROOT

FOLDERS = [
    ('cpu', '', 'results.jsonl'),
    ('ablation', '', 'ablations.jsonl'),
    ('held_out', 'held-out', 'results.jsonl'),
    ('attack', 'attack', 'results.jsonl'),
    ('attack_gpu', 'attack-gpu', 'results.jsonl'),
    ('gpu', 'gpu', 'results.jsonl'),
]


@pytest.mark.parametrize(('name', 'folder', 'results'), FOLDERS)
def test_a_committed_table_is_what_its_results_say(name, folder, results, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / 'tools'))
    monkeypatch.chdir(ROOT)
    plan, report, study = (
        importlib.import_module(module)
        for module in ('study_parts.plan', 'study_parts.report', 'study')
    )
    out = (ROOT / 'docs' / 'study' / folder).relative_to(ROOT)
    rows = [json.loads(line) for line in (out / results).read_text().splitlines()]
    if not stack_versions().items() <= rows[0]['versions'].items():
        pytest.skip('results are of other versions, whose configs may differ')
    chosen = plan.Study(f'configs/study/{name}.py')
    chosen.results_name = results
    settings = {run.key: chosen.setting(run) for run in chosen.runs()}
    known = study.StudyResults(out / results, 1, settings).known
    # Pictures take a minute: only their names count here.
    numbers = itertools.count()
    monkeypatch.setattr(report, 'draw', lambda *_: f'picture {next(numbers)}')
    monkeypatch.setattr(report, 'draw_fractions', lambda *_: [])
    written = []
    monkeypatch.setattr(type(out), 'write_text', lambda path, text: written.append(text))
    lines = [line for row in known.values() for line in row['lines']]
    report.write_report(chosen, lines, out, results)
    stem = 'README' if results == 'results.jsonl' else 'ablations'
    committed = (out / f'{stem}.md').read_text()
    (text,) = written
    assert without_pictures(text) == without_pictures(committed)


def without_pictures(text):
    return [line for line in text.splitlines() if line and not line.startswith('![')]
