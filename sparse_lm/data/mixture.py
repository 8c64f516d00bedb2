"""Mixtures of weighted corpora, such as `stdlib=0.5, files:texts/*.txt=0.3, tfds:~/wiki=0.2`.

Weights are fractions of the training windows. The number of a window alone decides its component, and
each component's windows are evenly spread. So the fractions are exact, and training can resume at any
window. The validation and test splits contain all held-out text of every component.
"""

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from sparse_lm.core.errors import UserError, unknown
from sparse_lm.data.corpus import SPLITS, Corpus, join

CYCLE = 10_000  # number of windows after which the order repeats, so weights have four decimals


def load(spec: str, readers: Mapping[str, Callable[[str], Corpus]]) -> Corpus:
  """Loads and joins the components of a mixture, in order.

  Args:
    spec: value of `config.data.path`.
    readers: for each kind of source, a function that reads the corpus of a path.

  Returns:
    The joined corpus. Its card has `components`: the card of each component with its normalised `weight`,
    by the entry without the weight (`files:texts/*.txt`).

  Raises:
    UserError: an entry is not valid, or its source raised an error. The message names the entry.
  """
  weights = parse(spec, readers)
  corpora = {}
  for name in weights:
    kind, _, path = name.partition(':')
    try:
      corpora[name] = readers[kind](path)
    except UserError as error:
      raise UserError(f'config.data.path entry {name!r}: {error}') from error
  members = {
    split: [corpus.splits[split] for corpus in corpora.values() if corpus.splits[split]]
    for split in SPLITS
  }
  cards = {name: {'weight': weights[name], **corpus.card} for name, corpus in corpora.items()}
  return join(members, {'source': 'mixture', 'path': spec, 'components': cards})


def parse(spec: str, kinds: Mapping[str, object]) -> dict[str, float]:
  """Parses `'stdlib=3, files:a/*.txt=1'` to `{'stdlib': 0.75, 'files:a/*.txt': 0.25}`.

  A path may contain `=`, but no comma.

  Raises:
    UserError: an entry has no weight, a weight that is not above 0 or too small, an unknown kind, or
      appears twice. The message names the entry.
  """
  weights: dict[str, float] = {}
  for entry in spec.split(','):
    name, equals, weight = (part.strip() for part in entry.strip().rpartition('='))
    what = f'config.data.path entry {entry.strip()!r}'
    kind, colon, _ = name.partition(':')
    if not equals:
      raise UserError(
        f"{what} has no weight; valid: for example 'stdlib=0.5, files:texts/*.txt=0.5'"
      )
    if kind not in kinds:
      raise unknown(f'source in {what}:', kind, kinds)
    if kind == 'stdlib' and colon:
      raise UserError(f'{what}: stdlib takes no path; valid: stdlib={weight}')
    if name in weights:
      raise UserError(f'{what} names {name!r} a second time; valid: one entry with both weights')
    weights[name] = _weight(weight, what)
  whole = sum(weights.values())
  for name, weight in weights.items():
    if weight / whole * CYCLE < 1:
      raise UserError(
        f'config.data.path entry {name!r} has a share of {weight / whole:.2g}; '
        f'valid: {1 / CYCLE} of all weights or more'
      )
  return {name: weight / whole for name, weight in weights.items()}


def _weight(text: str, what: str) -> float:
  try:
    weight = float(text)
  except ValueError:
    weight = math.nan
  if not (math.isfinite(weight) and weight > 0):
    raise UserError(f'{what} has the weight {text!r}; valid: a number above 0')
  return weight


def schedule(weights: Sequence[float]) -> Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]:
  """Returns a function from window numbers `[N]` to components `[N]` and numbers within them `[N]`.

  Of any n consecutive windows, component k gets `n * weights[k]`, up to one or two windows.
  """
  quota_K = np.floor(np.asarray(weights) * CYCLE).astype(int)
  missing = CYCLE - quota_K.sum()
  quota_K[np.argsort(quota_K - np.asarray(weights) * CYCLE, kind='stable')[:missing]] += 1
  # The windows of each component are evenly spaced in the cycle; sorting interleaves the components.
  place_C = np.concatenate([(np.arange(quota) + 0.5) / quota for quota in quota_K])
  order_C = np.argsort(place_C, kind='stable')
  component_C = np.repeat(np.arange(len(quota_K)), quota_K)[order_C]
  turn_C = np.concatenate([np.arange(quota) for quota in quota_K])[order_C]

  def turns(index_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    cycle_N, place_N = np.divmod(index_N, CYCLE)
    component_N = component_C[place_N]
    return component_N, cycle_N * quota_K[component_N] + turn_C[place_N]

  return turns
