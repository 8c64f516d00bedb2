"""Commands, configs and attributes that a page names exist, also where no test executes the page."""

import importlib.util
import re

import guide
import pytest

from sparse_lm.loading import Run

ROOT = guide.ROOT
PAGES = sorted(
  path
  for path in (*(ROOT / 'docs').rglob('*.md'), *ROOT.glob('*.md'))
  if not {'templates', 'generated'} & set(path.relative_to(ROOT).parts)
  and path.name != 'CHANGELOG.md'
)
TARGETS = set(
  re.findall(r'^([\w-]+):', (ROOT / 'Makefile').read_text(encoding='utf-8'), re.MULTILINE)
)


def missing(text):
  """What a page names that does not exist, one line each."""
  for target in re.findall(r'(?:^|`|\$ )make ([a-z][\w-]*)', text, re.MULTILINE):
    if target not in TARGETS:
      yield f'make {target}'
  for module in re.findall(r'python -m ((?:sparse_lm|experiments)[\w.]*\w)', text):
    if importlib.util.find_spec(module) is None:
      yield f'python -m {module}'
  for config in re.findall(r'(?<![\w/])configs/\w+\.py', text):
    if not (ROOT / config).exists():
      yield config


@pytest.mark.parametrize('page', PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_and_configs_of_a_page_exist(page):
  found = list(missing(page.read_text(encoding='utf-8')))
  if 'guides' in page.parts:  # a guide may name a config that its reader writes
    found = [name for name in found if not name.startswith('configs/')]
  assert found == []


def test_the_first_page_shows_attributes_that_a_run_has():
  page = (ROOT / 'docs' / 'index.md').read_text(encoding='utf-8')
  names = set(re.findall(r'\brun\.(\w+)', page))
  fields = set(dir(Run)) | set(Run.__annotations__)
  assert names and names <= fields


def test_what_is_missing_is_found():
  text = '`make nothing` `make test`\npython -m sparse_lm.nothing --config=configs/nothing.py\n'
  assert list(missing(text)) == [
    'make nothing',
    'python -m sparse_lm.nothing',
    'configs/nothing.py',
  ]
