"""Every notebook has a source, and a test file of its own: workers share tests by file."""

import pathlib

ROOT = pathlib.Path(__file__).resolve().parents[2]


def test_every_source_has_its_notebook_and_its_test():
  sources = {path.stem for path in (ROOT / 'colab').glob('*.py')}
  assert sources == {path.stem for path in (ROOT / 'colab').glob('*.ipynb')} != set()
  tested = {path.stem.removeprefix('test_') for path in (ROOT / 'tests/colab').glob('test_*.py')}
  assert sources == tested - {'notebooks'}
