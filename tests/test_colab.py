"""The notebooks are their jupytext sources, and run from top to bottom."""

import base64
import pathlib

import jupytext
import nbclient
import nbformat
import pytest

ROOT = pathlib.Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / 'colab').glob('*.ipynb'))


def test_every_source_has_its_notebook():
  sources = {path.stem for path in (ROOT / 'colab').glob('*.py')}
  assert sources == {path.stem for path in NOTEBOOKS} != set()


@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_equals_its_source(path):
  source = jupytext.read(path.with_suffix('.py'))
  notebook = nbformat.read(path, as_version=4)
  assert [(c.cell_type, c.source) for c in notebook.cells] == [
    (c.cell_type, c.source) for c in source.cells
  ], f'run: make notebooks ({path.name} is older than its source)'
  assert not any(cell.get('outputs') for cell in notebook.cells), 'commit notebooks without outputs'


@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs_and_draws(path, monkeypatch):
  # Notebooks train for hundreds of steps: there compilation is not what takes long.
  monkeypatch.setenv('JAX_DISABLE_MOST_OPTIMIZATIONS', '0')
  notebook = nbformat.read(path, as_version=4)
  client = nbclient.NotebookClient(notebook, timeout=300, resources={'metadata': {'path': ROOT}})
  client.execute()
  outputs = [out for cell in notebook.cells for out in cell.get('outputs', [])]
  images = [out.data['image/png'] for out in outputs if 'image/png' in out.get('data', {})]
  assert len(images) >= 2
  assert all(base64.b64decode(image).startswith(b'\x89PNG') for image in images)
