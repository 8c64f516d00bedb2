"""What holds for every notebook; each has a test file of its own, since workers share tests by file."""

import base64
import re

import jupytext
import nbformat
import pytest
from execute import ROOT, executed

# Where a machine keeps its files, and what a library says to its own developers.
_NOISE = re.compile(r'/(tmp|home|root|Users|content|work)/|WARNING|Warning|Traceback')


def outputs(notebook):
  return [output for cell in notebook.cells for output in cell.get('outputs', [])]


def pictures(notebook):
  return [out.data['image/png'] for out in outputs(notebook) if 'image/png' in out.get('data', {})]


class Notebook:
  """The tests of the notebook `name`."""

  name: str

  @property
  def path(self):
    return ROOT / 'colab' / f'{self.name}.ipynb'

  @pytest.mark.notebook
  def test_notebook_runs_and_draws(self):
    drawn = pictures(executed(self.path.with_suffix('.py')))
    assert len(drawn) >= 2
    assert all(base64.b64decode(image).startswith(b'\x89PNG') for image in drawn)

  def test_notebook_equals_its_source(self):
    pair = nbformat.read(self.path, as_version=4), jupytext.read(self.path.with_suffix('.py'))
    notebook, source = ([(c.cell_type, c.source) for c in found.cells] for found in pair)
    assert notebook == source, f'run: make notebooks ({self.path.name} is older than its source)'

  def test_notebook_is_kept_with_its_outputs_and_nothing_else(self):
    notebook = nbformat.read(self.path, as_version=4)
    assert len(pictures(notebook)) >= 2
    for output in outputs(notebook):
      assert output.output_type in ('stream', 'execute_result', 'display_data')
      assert output.get('name') != 'stderr', output
      texts = [output.get('text', ''), *output.get('data', {}).values()]
      assert not [text for text in texts if _NOISE.search(str(text))]
    assert self.path.stat().st_size < 150_000

  def test_first_cell_installs_through_the_script_that_is_tested(self):
    code = [cell.source for cell in nbformat.read(self.path, as_version=4).cells]
    assert '\n  !sh colab/install.sh' in code[1] and (ROOT / 'colab/install.sh').exists()
