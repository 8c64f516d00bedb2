"""Every package has a page in the reference, and the diagram shows the imports as they are."""

import importlib.util

import guide
import pytest

DOCS = guide.ROOT / 'docs'


@pytest.fixture
def architecture():
  spec = importlib.util.spec_from_file_location('architecture', DOCS / 'architecture.py')
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


def test_every_package_has_a_page():
  folders = {path.parent for path in (guide.ROOT / 'sparse_lm').rglob('*.py')}
  packages = {'.'.join(folder.relative_to(guide.ROOT).parts) for folder in folders}
  listed = (DOCS / 'reference' / 'index.md').read_text(encoding='utf-8').split()
  assert packages - {'sparse_lm.methods'} <= set(listed)


def test_arrows_lead_down_and_leave_nothing_out(architecture):
  rows = {name: i for i, row in enumerate(architecture.rows()) for name in row}
  assert set(rows) == set(architecture.imports())
  assert all(rows[start] > rows[end] for start, end in architecture.arrows())
  # What arrows lead to, directly or in steps, is what is imported, directly or in steps.
  below = {name: {name} for name in rows}
  for name in sorted(rows, key=rows.get):
    for start, end in architecture.arrows():
      if start == name:
        below[name] |= below[end]
  for name in rows:
    assert below[name] - {name} == architecture.reachable(name)


def test_the_table_says_what_every_folder_holds(architecture):
  lines = architecture.table().splitlines()[2:]
  assert len(lines) == len(architecture.imports())
  for line in lines:
    _, folder, holds, imports, _ = line.split('|')
    assert holds.strip() and imports.strip(), folder


def test_the_diagram_is_drawn(architecture, tmp_path):
  architecture.draw(tmp_path / 'diagram.svg')
  drawn = (tmp_path / 'diagram.svg').read_text()
  assert drawn.count('arrow') or drawn.count('patch')
  assert len(drawn) > 10_000
