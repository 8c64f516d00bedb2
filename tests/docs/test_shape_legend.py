"""The letters in the names of arrays are those of the shape legend."""

import re

import guide

# `h_BxLxF`: axes after an underscore, each a letter, or a number for an axis of that length.
NAME = re.compile(r'\b[a-z_]+_((?:[A-Z]|\d+)(?:x(?:[A-Z]|\d+))*)\b')


def letters(text):
  return {axis for name in NAME.findall(text) for axis in name.split('x') if axis.isalpha()}


def test_every_letter_is_in_the_legend():
  legend = (guide.ROOT / 'docs/concepts/vocabulary.md').read_text(encoding='utf-8')
  legend = legend.partition('## Shape legend')[2]
  explained = set(re.findall(r'\b[A-Z]\b', ' '.join(re.findall(r'^\| (.*?) \|', legend, re.M))))
  used = set()
  for path in (guide.ROOT / 'sparse_lm').rglob('*.py'):
    used |= letters(path.read_text(encoding='utf-8'))
  assert used <= explained
  assert {'B', 'L', 'D'} <= used


def test_names_with_axes_are_found():
  assert letters('h_BxLxF = f(x_1xD, LONG_NAME, a_bXc)') == {'B', 'L', 'F', 'D'}
