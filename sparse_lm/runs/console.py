"""The progress bar and messages of a training run, on stderr."""

import sys

import jax
from tqdm import tqdm

from sparse_lm.core import tree
from sparse_lm.model import lm
from sparse_lm.model.plans import plan_of
from sparse_lm.runs.setup import Setup
from sparse_lm.weights import parts


def opening(run: Setup, name: str, first: int) -> str:
  """Returns a line that describes the run: parameters, sparsity, device, precision, tokens and steps.

  Args:
    run: the run.
    name: the run's name.
    first: steps that are already done.
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
  """Returns sentences about choices that a user may not expect."""
  return (*run.notes, *run.program.method.notes, *lm.notes(run.program.model))


def _dropped(run: Setup) -> str:
  """Returns the share of the prunable weights that will be dropped, in words, for each rule."""
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
  """A progress bar with messages above it. If stderr is not a terminal, there is no bar.

  Attributes:
    shown: if False, only warnings are shown.
  """

  def __init__(self, shown: bool, name: str, first: int, steps: int) -> None:
    self.shown = shown
    self._bar = tqdm(
      total=steps,
      initial=first,
      disable=None if shown else True,  # None disables the bar if stderr is not a terminal
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
    """Advances the bar by `count` steps."""
    self._bar.update(count)

  def status(self, text: str) -> None:
    """Shows a short text at the end of the bar."""
    self._bar.set_postfix_str(text)

  def say(self, line: str, always: bool = False) -> None:
    """Prints a line above the bar. With `always` it is printed even if `shown` is False."""
    if self.shown or always:
      tqdm.write(line, file=sys.stderr)

  def warn_once(self, kind: str, line: str | None) -> None:
    """Prints a warning unless `line` is `None` or a warning of this kind was already printed."""
    if line is not None and kind not in self._warned:
      self._warned.add(kind)
      self.say(f'warning: {line}', always=True)
