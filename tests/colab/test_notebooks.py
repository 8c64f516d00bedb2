"""What holds for the notebooks together. Each has a test file of its own: workers share tests by file."""

import pathlib

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = pathlib.Path(__file__).resolve().parents[2]


def test_every_source_has_its_notebook_and_its_test():
  sources = {path.stem for path in (ROOT / 'colab').glob('*.py')}
  assert sources == {path.stem for path in (ROOT / 'colab').glob('*.ipynb')} != set()
  tested = {path.stem.removeprefix('test_') for path in (ROOT / 'tests/colab').glob('test_*.py')}
  assert sources == tested - {'notebooks'}


def required(path):
  lines = (ROOT / path).read_text().splitlines()
  return [Requirement(line) for line in lines if line and not line.startswith('#')]


def test_bounds_admit_what_colab_preinstalls():
  found = {
    canonicalize_name(r.name): str(r.specifier)[2:] for r in required('colab/preinstalled.txt')
  }
  wanted = {canonicalize_name(r.name): r.specifier for r in required('requirements.txt')}
  shared = found.keys() & wanted.keys()
  assert len(shared) >= 12
  assert [name for name in shared if found[name] not in wanted[name]] == []
