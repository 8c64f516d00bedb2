"""Notebooks, and how they are run."""

import base64
import pathlib

import jupytext
import nbclient
import nbformat
import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]


@pytest.fixture
def images():
  """`images(name)`: the PNGs that the notebook draws, run from top to bottom."""

  def run(name):
    notebook = nbformat.read(ROOT / 'colab' / f'{name}.ipynb', as_version=4)
    client = nbclient.NotebookClient(notebook, timeout=300, resources={'metadata': {'path': ROOT}})
    client.execute()
    outputs = [out for cell in notebook.cells for out in cell.get('outputs', [])]
    found = [out.data['image/png'] for out in outputs if 'image/png' in out.get('data', {})]
    return [base64.b64decode(image) for image in found]

  return run


@pytest.fixture
def cells():
  """`cells(name) -> (the notebook's cells, its source's)`."""

  def read(name):
    path = ROOT / 'colab' / f'{name}.ipynb'
    source = jupytext.read(path.with_suffix('.py'))
    return nbformat.read(path, as_version=4).cells, source.cells

  return read
