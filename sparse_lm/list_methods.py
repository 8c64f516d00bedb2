"""`python -m sparse_lm.list_methods`: every method, from its own docstring and declarations.

A method's class docstring holds `Paper: ...` and `Saves: ...`; what it declares about causality is
what the tests hold it to.
"""

import inspect
import re

from sparse_lm.commands.parser import Parser, one_line
from sparse_lm.model import lm, slots

HEADER = ('method', 'slot', 'paper', 'saves', 'causal in')


def said(docstring: str, what: str) -> str:
  """The text after `what:` in a docstring, up to the next such line or an empty one.

  Raises ValueError where there is none.
  """
  pattern = rf'^{what}: (.*?)(?=\n[A-Z]\w*(?: \w+)*:|\n\s*\n|\Z)'
  found = re.search(pattern, inspect.cleandoc(docstring), re.M | re.S)
  if not found:
    raise ValueError(f'the docstring has no line {what}: ...')
  return ' '.join(found[1].split()).removesuffix('.')


def rows() -> list[tuple[str, ...]]:
  """A row for each method, in the order of `HEADER`; the method's name links to its file."""
  found = []
  for slot in slots.SLOTS:
    for name in slots.names(slot):
      cls = slots.method(slot, name)
      modes = ', '.join(filter(None, (_mode(slot, name, mode) for mode in lm.MODES)))
      link = f'[{name}](sparse_lm/methods/{slot}/{name}.py)'
      found.append((link, slot, said(cls.__doc__, 'Paper'), said(cls.__doc__, 'Saves'), modes))
  return found


def _mode(slot: str, name: str, mode: str) -> str:
  """The mode, if the method is causal in it, and whether by default the sequences of a batch couple."""
  if slot == 'weight':
    return mode
  choice = slots.Choice(slot, name)
  if not choice.causal(mode):
    return ''
  return f'{mode} (sequences compete)' if choice.couples(mode) else mode


def table() -> str:
  """A Markdown table of all methods."""
  lines = [HEADER, tuple('---' for _ in HEADER), *rows()]
  return '\n'.join(f'| {" | ".join(line)} |' for line in lines)


@one_line
def main() -> None:
  """Prints the table."""
  Parser('python -m sparse_lm.list_methods').parse_args()
  print(table())


if __name__ == '__main__':
  main()
