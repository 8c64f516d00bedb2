"""What a run shows on stderr while it trains."""

import sys

import jax
from tqdm import tqdm

from sparse_lm.core import tree
from sparse_lm.model import lm
from sparse_lm.model.plans import plan_of
from sparse_lm.runs.setup import Setup
from sparse_lm.weights import parts


def opening(run: Setup, name: str, first: int) -> str:
  """One line on what is about to train: parameters, sparsity, device, precision, tokens and steps.

  Args:
    run: a checked config.
    name: of the run.
    first: steps that are done already.
  """
  shapes = plan_of(run.program.model).shapes
  data, train = run.config.data, run.config.train
  relatives = ''.join(
    f'; {role} {relative.source}'
    for role, relative in (('starts from', run.parent), ('learns from', run.teacher))
    if relative is not None
  )
  devices = f'{jax.device_count()} × {jax.devices()[0].device_kind} ({jax.default_backend()})'
  devices += f' in {run.program.model.spec.precision}'
  return (
    f'{name}: {sum(leaf.size for leaf in shapes.values()):,} parameters, {_dropped(run)}; {devices}; '
    f'{len(run.data.tokens["train"]):,} training tokens; steps {first + 1:,} to {train.steps:,} of '
    f'{data.batch * data.context:,} tokens each{relatives}'
  )


def notes(run: Setup) -> tuple[str, ...]:
  """Lines on choices that a user of the run may not expect."""
  return (*run.notes, *run.program.method.notes, *lm.notes(run.program.model))


def _dropped(run: Setup) -> str:
  """The share of the prunable weights that is to be dropped: of all, or of those that each rule owns."""
  method, shapes = run.program.method, plan_of(run.program.model).shapes
  found = []
  for part in method.parts:
    own = tree.named(parts.own(method, part, run.final))
    prunable = sum(shapes[path].size for path in own)
    if prunable:
      kept = sum(shapes[path].size * float(density) for path, density in own.items())
      of = f' of rule {part}' if part else ''
      found.append(f'{1 - kept / prunable:.1%} of {prunable:,}{of} to be dropped')
  return ', '.join(found) or 'dense'


class Console:
  """A progress bar, and lines that stay. A stderr that is no terminal gets the lines alone.

  Attributes:
    shown: whether to show anything but warnings.
  """

  def __init__(self, shown: bool, name: str, first: int, steps: int) -> None:
    self.shown = shown
    self._bar = tqdm(
      total=steps,
      initial=first,
      disable=None if shown else True,  # None: only where stderr is no terminal
      unit='step',
      desc=name[-40:],
      dynamic_ncols=True,
      file=sys.stderr,
    )
    self._warned: set[str] = set()

  def __enter__(self) -> 'Console':
    return self

  def __exit__(self, *_: object) -> None:
    self._bar.close()

  def step(self, count: int = 1) -> None:
    """Advances the bar by `count` dispatched steps."""
    self._bar.update(count)

  def status(self, text: str) -> None:
    """Shows at the bar what is going on."""
    self._bar.set_postfix_str(text)

  def say(self, line: str, always: bool = False) -> None:
    """Prints a line above the bar; `always`: even where nothing else is shown."""
    if self.shown or always:
      tqdm.write(line, file=sys.stderr)

  def warn_once(self, kind: str, line: str | None) -> None:
    """Prints a warning, even without a bar, unless `line` is `None` or its kind was printed before."""
    if line is not None and kind not in self._warned:
      self._warned.add(kind)
      self.say(f'warning: {line}', always=True)
