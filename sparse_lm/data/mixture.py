"""Several corpora in one, each with a weight: `stdlib=0.5, files:texts/*.txt=0.3, tfds:~/wiki=0.2`.

Weights are shares of the training windows. Which component a window comes from follows from the
window's number alone, evenly spread: the shares are exact, not a matter of luck, and a training run
continues anywhere without a history. Held-out text is all of every component's.
"""

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from sparse_lm.core.errors import UserError, unknown
from sparse_lm.data.corpus import SPLITS, Corpus, join

CYCLE = 10_000  # windows, after which the components' order repeats: weights have four decimals


def load(spec: str, readers: Mapping[str, Callable[[str], Corpus]]) -> Corpus:
  """The components that `spec` (config.data.path) names, joined in its order.

  `readers` gives the corpus of a path by kind of source. The card has `components`: by entry without
  its weight (`files:texts/*.txt`), the component's own card and its `weight`, normalised.

  Raises `UserError`, naming the entry, as `parse` does and for what a component's source raises.
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
  """`'stdlib=3, files:a/*.txt=1'` as `{'stdlib': 0.75, 'files:a/*.txt': 0.25}`.

  A path may contain `=` but no comma. Raises `UserError`, naming the entry, for one without a
  weight, a weight that is not above 0 or too small a share, an unknown kind and one named twice.
  """
  weights: dict[str, float] = {}
  for entry in spec.split(','):
    name, equals, weight = (part.strip() for part in entry.strip().rpartition('='))
    what = f'config.data.path entry {entry.strip()!r}'
    kind, colon, _ = name.partition(':')
    if not equals:
      raise UserError(f"{what} has no weight; valid: such as 'stdlib=0.5, files:texts/*.txt=0.5'")
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
  """Whose turn it is: `[N]` window numbers to `[N]` components and `[N]` numbers within them.

  Of any stretch of n windows, component k gets `n * weights[k]` up to rounding of a window or two.
  """
  quota_K = np.floor(np.asarray(weights) * CYCLE).astype(int)
  missing = CYCLE - quota_K.sum()
  quota_K[np.argsort(quota_K - np.asarray(weights) * CYCLE, kind='stable')[:missing]] += 1
  # Each component's turns stand evenly in the cycle; sorting by place interleaves them.
  place_C = np.concatenate([(np.arange(quota) + 0.5) / quota for quota in quota_K])
  order_C = np.argsort(place_C, kind='stable')
  component_C = np.repeat(np.arange(len(quota_K)), quota_K)[order_C]
  turn_C = np.concatenate([np.arange(quota) for quota in quota_K])[order_C]

  def turns(index_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    cycle_N, place_N = np.divmod(index_N, CYCLE)
    component_N = component_C[place_N]
    return component_N, cycle_N * quota_K[component_N] + turn_C[place_N]

  return turns
