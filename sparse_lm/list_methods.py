"""`python -m sparse_lm.list_methods`: prints a table of all methods, from their traits.

Tests check the declared causality of each method.
"""

from sparse_lm.commands.parser import Parser, one_line
from sparse_lm.layers.spec import Spec
from sparse_lm.model import lm, slots
from sparse_lm.runs import configs

HEADER = ('method', 'slot', 'paper', 'saves', 'causal in')


def rows(root: str = '') -> list[tuple[str, ...]]:
  """Returns a row for each method, in the order of `HEADER`.

  Args:
    root: what precedes the paths of the methods' files in links.
  """
  # The traits are those of a method with its default fields in the default model.
  default = configs.load(str(configs.BASE))
  spec = Spec.from_config(default.model, vocab=256, context=default.data.context)
  found = []
  for slot in slots.SLOTS:
    for name in slots.names(slot):
      link = f'[{name}]({root}sparse_lm/methods/{slot}/{name}.py)'
      found.append((link, slot, *_declared(slot, name, spec)))
  return found


def _declared(slot: str, name: str, spec: Spec) -> tuple[str, str, str]:
  """Returns the paper, the savings and the causal modes of a method.

  A mode is marked if sequences of a batch compete in it.
  """
  if slot == 'weight':
    traits = slots.method(slot, name).traits
    return traits.paper, traits.saves, ', '.join(lm.MODES)
  traits = slots.MethodConfig(slot, name).traits(spec)
  modes = [
    f'{mode} (sequences compete)' if mode in traits.couples else mode
    for mode in lm.MODES
    if mode not in traits.non_causal
  ]
  return traits.paper, traits.saves, ', '.join(modes)


def table(root: str = '') -> str:
  """Returns a Markdown table of all methods; see `rows`."""
  lines = [HEADER, tuple('---' for _ in HEADER), *rows(root)]
  return '\n'.join(f'| {" | ".join(line)} |' for line in lines)


@one_line
def main() -> None:
  """Prints the table of methods."""
  Parser('python -m sparse_lm.list_methods').parse_args()
  print(table())


if __name__ == '__main__':
  main()
