"""Display names of methods, patterns, formats and other values of labels in tables and figures.

The file of a method, pattern or packed format may declare a display name: `DISPLAY_NAME = 'RigL'`. By
default, the display name is the name with spaces instead of underscores. A pair of braces stands for what
follows the name after a colon: with `'blocks of {}'` in block.py, 'block:16' is shown as 'blocks of 16'.
"""

import functools
import pathlib
import re

from sparse_lm.core.records import Json

ABSENT = '—'
PACKAGE = pathlib.Path(__file__).resolve().parents[1]
# The files that may declare a display name.
FILES = ('methods/[a-z]*/[a-z]*.py', 'patterns/[a-z]*.py', 'inference/formats/[a-z]*.py')
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
  and plus signs that names a method, pattern, format or term is replaced by the display name.
  """
  return ''.join(map(_part, _BETWEEN.split(label_text(value))))


def _part(text: str) -> str:
  """Returns the display name of a part, or the part itself if there is none."""
  name, colon, argument = text.partition(':')
  shown = _display_names().get(name)
  if shown is None:
    return text
  if '{}' in shown:
    return shown.format(argument) if colon else name
  return text if colon else shown


@functools.cache
def _display_names() -> dict[str, str]:
  found = dict(TERMS)
  for file in (file for files in FILES for file in sorted(PACKAGE.glob(files))):
    name = file.stem.rstrip('_')
    declared = _DECLARED.search(file.read_text(encoding='utf-8'))
    found[name] = declared[1] if declared else name.replace('_', ' ')
  return found
