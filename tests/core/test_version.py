"""There is one version number, and files of another format are refused with it."""

import pathlib
import tomllib

import pytest

from sparse_lm.core.version import VERSION, format_mismatch

ROOT = pathlib.Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
  ('found', 'written_by', 'writer'),
  [
    (1, None, 'sparse_lm 0.1 (format 1)'),
    (1, '0.2.0', 'sparse_lm 0.2.0 (format 1)'),
    (3, '0.3.0', 'sparse_lm 0.3.0 (format 3)'),
    (3, None, 'a later version (format 3)'),
    (None, None, 'a later version (format None)'),
  ],
)
def test_a_file_of_another_format_is_refused_by_the_version_that_wrote_it(
  found, written_by, writer
):
  line = format_mismatch('x.json', found, 2, written_by)
  assert line == (
    f'x.json was written by {writer}; this is sparse_lm {VERSION}, which reads format 2'
  )


def test_the_package_is_built_with_this_version():
  project = tomllib.loads((ROOT / 'pyproject.toml').read_text())
  assert 'version' in project['project']['dynamic'] and 'version' not in project['project']
  assert project['tool']['setuptools']['dynamic']['version'] == {
    'attr': 'sparse_lm.core.version.VERSION'
  }
