"""What holds for every notebook; each has a test file of its own, since workers share tests by file.

What takes long comes first: a worker with two tests left is given another file.
"""

import base64
import pathlib

import jupytext
import nbclient
import nbformat

ROOT = pathlib.Path(__file__).resolve().parents[2]


class Notebook:
  """The tests of the notebook `name`."""

  name: str

  @property
  def path(self):
    return ROOT / 'colab' / f'{self.name}.ipynb'

  def test_notebook_runs_and_draws(self):
    notebook = nbformat.read(self.path, as_version=4)
    client = nbclient.NotebookClient(notebook, timeout=300, resources={'metadata': {'path': ROOT}})
    client.execute()
    outputs = [out for cell in notebook.cells for out in cell.get('outputs', [])]
    drawn = [out.data['image/png'] for out in outputs if 'image/png' in out.get('data', {})]
    assert len(drawn) >= 2
    assert all(base64.b64decode(image).startswith(b'\x89PNG') for image in drawn)

  def test_notebook_equals_its_source(self):
    pair = nbformat.read(self.path, as_version=4), jupytext.read(self.path.with_suffix('.py'))
    notebook, source = ([(c.cell_type, c.source) for c in found.cells] for found in pair)
    assert notebook == source, f'run: make notebooks ({self.path.name} is older than its source)'

  def test_notebook_is_kept_without_outputs(self):
    cells = nbformat.read(self.path, as_version=4).cells
    assert not any(cell.get('outputs') for cell in cells), 'commit notebooks without outputs'
