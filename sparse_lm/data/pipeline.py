"""Batches of tokens: an endless shuffled stream for training, and one exact pass for evaluation.

Training uses grain, whose iterator state is a single counter, so training resumes exactly from a
checkpoint. Shapes: B batch, L context.
"""

import dataclasses
import functools
import itertools
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence

import grain
import jax
import numpy as np
from ml_collections import ConfigDict

from sparse_lm.core.errors import UserError, unknown
from sparse_lm.core.records import JsonObject
from sparse_lm.data import mixture, sources, tokenizers
from sparse_lm.data.corpus import SEPARATOR
from sparse_lm.data.one_pass import check_prediction, eval_batches


def train_iterator(
  tokens: np.ndarray, *, context: int, batch: int, seed: int
) -> grain.DatasetIterator:
  """Returns an endless grain iterator over int32 `[batch, context + 1]` windows of 1-D `tokens`.

  In each epoch, window i starts at `i * context` plus a random offset from `[0, context)`, and the
  order of the windows is shuffled. So an epoch takes one window from each stretch of `context` tokens.
  (Neighbouring windows may overlap or leave a gap; this averages out over epochs.) A start too close to
  the end wraps around. Everything is determined by `seed` (>= 0), and the order of windows does not
  depend on `batch`.

  Raises:
    UserError: `tokens` is shorter than one window.
  """
  return mixed_iterator({'': (tokens, 1.0)}, context=context, batch=batch, seed=seed)


def mixed_iterator(
  components: Mapping[str, tuple[np.ndarray, float]],
  *,
  context: int,
  batch: int,
  seed: int,
  on_device: bool = False,
) -> grain.DatasetIterator:
  """Like `train_iterator`, over a mixture; `mixture.schedule` decides the component of each window.

  Each component has its own epochs.

  Args:
    components: for each component by name, its 1-D tokens and its fraction of the windows.
    context: L.
    batch: B.
    seed: seed of the order.
    on_device: whether batches are arrays on JAX's default device. The reading thread then copies the next
      batches there while a step runs. The saved position counts only batches that were returned.

  Raises:
    UserError: a component is shorter than one window.
  """
  for name, (tokens, _) in components.items():
    _check_window(tokens, context, batch, name)
  views = [
    np.lib.stride_tricks.sliding_window_view(tokens, context + 1)  # [every start, L + 1]
    for tokens, _ in components.values()
  ]
  order = _order(_sizes(components), context, batch, seed)

  def cut(index: int) -> np.ndarray:
    component_B, start_B = order(index, 1)
    windows_BxL1 = np.empty((batch, context + 1), np.int32)
    for number in np.unique(component_B).tolist():
      mine_B = component_B == number
      windows_BxL1[mine_B] = views[number][start_B[mine_B]]
    return jax.device_put(windows_BxL1) if on_device else windows_BxL1

  return _read(cut)


def _read(element: Callable[[int], np.ndarray]) -> grain.DatasetIterator:
  """Returns an endless iterator over the batches `element(0)`, `element(1)`, ...

  Reading whole batches is faster than reading single windows. An order that is computed here is faster
  than grain's own shuffle if there are few windows.
  """
  batches = grain.MapDataset.range(sys.maxsize).map(element)
  # One thread works while a step runs; more threads would only wait for the interpreter lock.
  read = grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)
  return iter(batches.to_iter_dataset(read))


def _sizes(components: Mapping[str, tuple[np.ndarray, float]]) -> list[tuple[int, float]]:
  return [(len(tokens), share) for tokens, share in components.values()]


def _order(
  components: Sequence[tuple[int, float]], context: int, batch: int, seed: int
) -> Callable[[int, int], tuple[np.ndarray, np.ndarray]]:
  """Returns a function that computes the windows of batches.

  The function maps `(first, count)`, the number of the first batch and the number of batches, to each
  window's component and its start in the component, both `[count * batch]`.

  Args:
    components: number of tokens and fraction of the windows of each component.
    context: L.
    batch: B.
    seed: seed of the order.
  """
  turns = mixture.schedule([share for _, share in components])
  starts = [_endless(size, context, seed, number) for number, (size, _) in enumerate(components)]

  def order(first: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    component_W, place_W = turns(np.arange(first * batch, (first + count) * batch))
    start_W = np.empty(count * batch, np.int64)
    for number in np.unique(component_W).tolist():
      mine_W = component_W == number
      start_W[mine_W] = starts[number](place_W[mine_W])
    return component_W, start_W

  return order


def _endless(size: int, context: int, seed: int, number: int) -> Callable[[np.ndarray], np.ndarray]:
  """Returns a function from ascending window numbers `[N]` of a component to the windows' starts `[N]`.

  Args:
    size: number of tokens of the component.
    context: L.
    seed: seed of the order.
    number: number of the component.
  """
  stretches = _stretches(size, context)

  @functools.lru_cache(maxsize=2)  # consecutive epochs, so that a batch may straddle them
  def starts(epoch: int) -> np.ndarray:
    rng = np.random.default_rng((seed, epoch, number))
    start = rng.permutation(stretches) * context + rng.integers(context, size=stretches)
    return start % (size - context)

  def read(place_N: np.ndarray) -> np.ndarray:
    epoch_N, place_N = np.divmod(place_N, stretches)
    parts = [starts(epoch)[place_N[epoch_N == epoch]] for epoch in np.unique(epoch_N).tolist()]
    return np.concatenate(parts)

  return read


def _stretches(tokens: int, context: int) -> int:
  """Returns the number of windows in an epoch."""
  return -(-(tokens - context) // context)


@dataclasses.dataclass(frozen=True)
class Data:
  """A tokenized corpus.

  Attributes:
    tokens: 1-D tokens by split, in the tokenizer's unsigned integer type.
    tokenizer: the tokenizer.
    card: the corpus' card plus `tokenizer` (its name), `tokenizer_sha256`, `vocab_size`, and by split
      `tokens` and `bytes_per_token` (missing for an empty split). Bits per byte are
      nats per token / ln 2 / bytes_per_token.
    context: tokens per window, L.
    batch: windows per batch, B.
    spans: for a mixture, the slice of each component in each split's tokens, by component and split.
  """

  tokens: dict[str, np.ndarray]
  tokenizer: tokenizers.Tokenizer
  card: JsonObject
  context: int
  batch: int
  spans: dict[str, dict[str, slice]] = dataclasses.field(default_factory=dict)

  def __repr__(self) -> str:
    sizes = ', '.join(f'{name} {len(ids):,}' for name, ids in self.tokens.items())
    return f'Data({self.card["source"]}, tokens of {self.card["tokenizer"]}: {sizes})'

  def train_iterator(self, seed: int, on_device: bool = False) -> grain.DatasetIterator:
    """Returns an iterator over training batches (`mixed_iterator`)."""
    sizes = {'context': self.context, 'batch': self.batch}
    return mixed_iterator(self._shares(), **sizes, seed=seed, on_device=on_device)

  def starts(self, seed: int) -> Callable[[int, int], np.ndarray]:
    """Returns a function that computes the starts of the windows of `train_iterator(seed)`.

    The function maps `(first, count)`, the number of the first batch and the number of batches, to starts
    in `tokens['train']`, int32 `[count, batch]`. From these, `windows.gather` cuts windows on the device.
    """
    spans = [span['train'] for span in self.spans.values()] or [slice(0, None)]
    begin_C = np.array([span.start for span in spans])
    order = _order(_sizes(self._shares()), self.context, self.batch, seed)

    def starts(first: int, count: int) -> np.ndarray:
      component_W, start_W = order(first, count)
      return (begin_C[component_W] + start_W).astype(np.int32).reshape(count, self.batch)

    return starts

  def train_iterator_at(self, seed: int, index: int) -> grain.DatasetIterator:
    """Returns `train_iterator(seed)` at the position after `index` batches."""
    iterator = self.train_iterator(seed)
    iterator.set_state(iterator.get_state() | {'next_index': index})
    return iterator

  @property
  def whole_batches(self) -> int:
    """Number of batches that training reads before any text is repeated."""
    shares = self._shares().values()
    total = sum(share for _, share in shares)
    windows = min(_stretches(len(tokens), self.context) * total / share for tokens, share in shares)
    return int(windows) // self.batch

  def components(self, split: str = 'validation') -> dict[str, np.ndarray]:
    """Returns the 1-D tokens of each component of a split by name; the name is '' without a mixture.

    Components begin and end with the zero byte that separates them from their neighbours, so every token
    of the split except the first is predicted in exactly one component.

    Raises:
      UserError: the split is unknown.
    """
    if split not in self.tokens:
      raise unknown('split', split, self.tokens)
    spans = {name: found[split] for name, found in self.spans.items() if split in found}
    return {
      name: self.tokens[split][max(span.start - 1, 0) : span.stop + 1]
      for name, span in spans.items()
    } or {'': self.tokens[split]}

  def eval_batches(
    self, split: str = 'validation', component: str | None = None
  ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields one pass over a component, or over all of them in order (see the function `eval_batches`).

    Raises:
      UserError: the split is unknown or has no prediction.
    """
    sizes = {'context': self.context, 'batch': self.batch}
    passes = [
      eval_batches(tokens, **sizes, split=split) for tokens in self._chosen(split, component)
    ]
    return itertools.chain.from_iterable(passes)

  def evaluation(self, split: str = 'validation', component: str | None = None) -> JsonObject:
    """Describes a mean loss over `eval_batches(split, component)`, as JSON values.

    After every `stride` tokens, predictions start again without context.
    """
    card = self.card['components'][component] if component else self.card
    return {
      'split': split,
      'data_sha256': card['sha256'][split],
      'context': self.context,
      'stride': self.context,
      'predictions': sum(len(tokens) - 1 for tokens in self._chosen(split, component)),
      'tokenizer_sha256': self.tokenizer.digest,
      'unit': f'nats per token of {self.card["tokenizer"]}',
    }

  def _chosen(self, split: str, component: str | None) -> list[np.ndarray]:
    found = self.components(split)
    return list(found.values()) if component is None else [found[component]]

  def _shares(self) -> dict[str, tuple[np.ndarray, float]]:
    """Returns the training tokens and the weight of each component."""
    tokens = self.tokens['train']
    return {
      name: (tokens[span['train']], self.card['components'][name]['weight'])
      for name, span in self.spans.items()
    } or {'': (tokens, 1.0)}


def load(
  config: ConfigDict, tokenizer: tokenizers.Tokenizer | None = None, training: bool = True
) -> Data:
  """Loads and tokenizes the data of a config.

  Args:
    config: `config.data`.
    tokenizer: a tokenizer to use instead of the one in the config.
    training: whether the data are for training, which needs text in two splits.

  Raises:
    UserError: the source, path, split or tokenizer is not valid, or there is too little text for training
      or validation.
  """
  corpus = sources.load(config)
  if tokenizer is None:
    tokenizer = tokenizers.build(config.tokenizer, corpus, config.vocab_size)
  tokens = {name: tokenizer.encode(text) for name, text in corpus.splits.items()}
  sizes = {name: len(ids) for name, ids in tokens.items()}
  card = {
    **corpus.card,
    'tokenizer': config.tokenizer,
    'tokenizer_sha256': tokenizer.digest,
    'vocab_size': tokenizer.vocab_size,
    'tokens': sizes,
    'bytes_per_token': {
      name: len(corpus.splits[name]) / size for name, size in sizes.items() if size
    },
  }
  spans = _spans(corpus.card.get('components', {}), tokens, tokenizer)
  data = Data(tokens, tokenizer, card, config.context, config.batch, spans)
  if training:
    for name, (ids, _) in data._shares().items():
      _check_window(ids, config.context, config.batch, name)
    check_prediction(tokens['validation'], 'validation')
  return data


def _spans(
  cards: dict[str, JsonObject], tokens: dict[str, np.ndarray], tokenizer: tokenizers.Tokenizer
) -> dict[str, dict[str, slice]]:
  """Returns the slice of each component in each split, found by counting zero bytes between documents."""
  found: dict[str, dict[str, slice]] = {name: {} for name in cards}
  for split, ids in tokens.items():
    documents = {name: card['documents'][split] for name, card in cards.items()}
    documents = {name: count for name, count in documents.items() if count}
    ends = [len(ids)]
    if len(documents) > 1:
      zeros = np.flatnonzero(ids == tokenizer.encode(SEPARATOR)[0])
      ends = [*zeros[np.cumsum(list(documents.values()))[:-1] - 1].tolist(), len(ids)]
    for name, start, stop in zip(documents, [0, *(end + 1 for end in ends)], ends):
      found[name][split] = slice(start, stop)
  return found


def _check_window(tokens: np.ndarray, context: int, batch: int, component: str) -> None:
  for name, value in (('context', context), ('batch', batch)):
    if value < 1:
      raise UserError(f'config.data.{name}={value} is not valid; valid: 1 or more')
  if len(tokens) < context + 1:
    where = f' in {component}' if component else ''
    raise UserError(
      f'config.data.context={context} needs {context + 1} training tokens, but there are {len(tokens)}'
      f'{where}; valid: config.data.context up to {max(len(tokens) - 1, 0)}, or more text'
    )
