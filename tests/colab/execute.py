"""`python tests/colab/execute.py` writes the notebooks from their sources, with outputs."""

import pathlib

import jupytext
import nbclient
import nbformat

ROOT = pathlib.Path(__file__).resolve().parents[2]
SOURCES = sorted((ROOT / 'colab').glob('*.py'))


def executed(source: pathlib.Path) -> nbformat.NotebookNode:
  """The notebook of a source after all its cells have run in the root of the repository."""
  notebook = jupytext.read(source)
  resources = {'metadata': {'path': ROOT}}
  client = nbclient.NotebookClient(notebook, timeout=300, record_timing=False, resources=resources)
  client.execute()
  # What differs from run to run though nothing has changed.
  notebook.metadata.pop('language_info')
  for number, cell in enumerate(notebook.cells):
    cell.id = f'cell-{number}'
  return notebook


if __name__ == '__main__':
  for path in SOURCES:
    nbformat.write(executed(path), path.with_suffix('.ipynb'))
