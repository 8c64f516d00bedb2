"""Display names of methods, estimators and other values of labels in tables and figures.

A method's file may declare a display name: `DISPLAY_NAME = 'RigL'`. By default, the display name is the
method's name with spaces instead of underscores.
"""

import functools
import pathlib
import re

from sparse_lm.core.records import Json

ABSENT = '—'
METHODS = pathlib.Path(__file__).resolve().parents[1] / 'methods'
# Display names of terms that are not methods: estimators, and magnitude pruning with straight-through.
TERMS = {
  'gumbel_sigmoid': 'Gumbel-sigmoid',
  'hard_concrete': 'hard concrete',
  'reinforce': 'REINFORCE',
  'ste': 'STE',
  'straight_through': 'straight-through',
}
_DECLARED = re.compile(r"^DISPLAY_NAME = '(.+)'$", re.MULTILINE)
_BETWEEN = re.compile(r'(, | \+ |: )')


def label_text(value: Json) -> str:
  """Returns a label's value as text, in the form that the command line accepts."""
  if value is None:
    return ABSENT
  if isinstance(value, list | tuple):
    return ', '.join(map(label_text, value))
  return f'{value:g}' if isinstance(value, float) else str(value)


def display(value: Json) -> str:
  """Returns a label's value as tables and figures show it.

  `'hybrid: rigl + token_gate'` becomes `'hybrid: RigL + token gate'`: each part between commas, colons
  and plus signs that names a method or a term is replaced by the display name.
  """
  parts = _BETWEEN.split(label_text(value))
  return ''.join(_display_names().get(part, part) for part in parts)


@functools.cache
def _display_names() -> dict[str, str]:
  found = dict(TERMS)
  for file in METHODS.glob('[a-z]*/[a-z]*.py'):
    name = file.stem.rstrip('_')
    declared = _DECLARED.search(file.read_text(encoding='utf-8'))
    found[name] = declared[1] if declared else name.replace('_', ' ')
  return found
