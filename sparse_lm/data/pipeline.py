"""Token arrays to batches: an endless shuffled stream for training, one exact pass for evaluation.

Training goes through grain, whose iterator state is one counter, so a checkpoint resumes exactly.
Shapes: B batch, L context.
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


def train_iterator(
  tokens: np.ndarray, *, context: int, batch: int, seed: int
) -> grain.DatasetIterator:
  """An endless grain iterator over int32 `[batch, context + 1]` windows of 1-D `tokens`.

  Window i begins at `i * context` plus an offset drawn afresh from `[0, context)`. An epoch thus
  takes one window from every stretch of `context` tokens, in a new order and cut elsewhere than the
  epoch before. (Neighbours may overlap or leave a gap; over epochs this evens out.) A start too
  near the end wraps round to the beginning. Everything follows from `seed` (>= 0), and the order of
  windows does not depend on `batch`.

  Raises `UserError` where `tokens` is shorter than one window.
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
  """As `train_iterator`, over `components`: by name, 1-D tokens and their share of the windows.

  With `on_device` batches are arrays on JAX's default device: the reading thread moves the next few
  batches there while a step runs. The saved position counts the batches that the iterator has returned.

  Every component has epochs of its own; `mixture.schedule` says which is next. Raises `UserError`
  where one is shorter than a window.
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
  """An endless iterator over `element(0)`, `element(1)`, ..., each of which is a whole batch.

  Cutting and stacking one window after the other would be slower, and so would grain's own shuffle where
  there are few elements.
  """
  batches = grain.MapDataset.range(sys.maxsize).map(element)
  # One thread hides the work behind the step; more would only contend for the interpreter lock.
  read = grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)
  return iter(batches.to_iter_dataset(read))


def _sizes(components: Mapping[str, tuple[np.ndarray, float]]) -> list[tuple[int, float]]:
  return [(len(tokens), share) for tokens, share in components.values()]


def _order(
  components: Sequence[tuple[int, float]], context: int, batch: int, seed: int
) -> Callable[[int, int], tuple[np.ndarray, np.ndarray]]:
  """Makes the function that says which windows the batches hold.

  It maps `(first, count)`, the number of the first batch and how many follow each other, to the component
  of each window and the window's start in that component, both `[count * batch]`.

  Args:
    components: of each component, its number of tokens and its share of the windows.
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
  """Makes the function from `[N]` ascending places in the endless order of windows to their `[N]` starts.

  Args:
    size: the number of tokens that the windows are cut from.
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
  """Windows of an epoch over so many tokens."""
  return -(-(tokens - context) // context)


def eval_batches(
  tokens: np.ndarray, *, context: int, batch: int, split: str = 'validation'
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
  """One pass over 1-D `tokens` in which each of the N - 1 predictions has weight 1 exactly once.

  Yields `(tokens_BxL+1 int32, weight_BxL float32)`. Windows follow each other with a stride of
  `context`; what pads the last window and the last batch has id 0 and weight 0.

  Raises `UserError`, at the call, where the split has no prediction: `split` is its name.
  """
  _check_prediction(tokens, split)
  return _eval_batches(tokens, context, batch)


def _eval_batches(
  tokens: np.ndarray, context: int, batch: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
  step = batch * context
  for begin in range(0, len(tokens) - 1, step):
    chunk = tokens[begin : begin + step + 1]
    padded = np.zeros(step + 1, np.int32)
    padded[: len(chunk)] = chunk
    windows = np.lib.stride_tricks.sliding_window_view(padded, context + 1)[::context]
    weight = np.arange(step) < len(chunk) - 1
    yield windows.copy(), weight.reshape(batch, context).astype(np.float32)


@dataclasses.dataclass(frozen=True)
class Data:
  """A corpus in tokens. `tokens`: {split: 1-D uint8 or uint16}.

  `card` is the corpus' card with `tokenizer` (its name), `tokenizer_sha256`, `vocab_size`, and per
  split `tokens` and `bytes_per_token` (none for an empty split):
  nats per token / ln 2 / bytes_per_token = bits per byte.

  `spans`: of a mixture, by component, where in a split's tokens it lies, for splits that it has.
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
    """`mixed_iterator` over the components of the training split; without any, `train_iterator`."""
    sizes = {'context': self.context, 'batch': self.batch}
    return mixed_iterator(self._shares(), **sizes, seed=seed, on_device=on_device)

  def starts(self, seed: int) -> Callable[[int, int], np.ndarray]:
    """Makes the function that maps batches of `train_iterator(seed)` to the starts of their windows.

    It maps `(first, count)`, the number of the first batch and how many follow each other, to starts in
    `tokens['train']`, int32 `[count, batch]`. `windows.gather` cuts windows from their starts on the
    device.
    """
    spans = [span['train'] for span in self.spans.values()] or [slice(0, None)]
    begin_C = np.array([span.start for span in spans])
    order = _order(_sizes(self._shares()), self.context, self.batch, seed)

    def starts(first: int, count: int) -> np.ndarray:
      component_W, start_W = order(first, count)
      return (begin_C[component_W] + start_W).astype(np.int32).reshape(count, self.batch)

    return starts

  def train_iterator_at(self, seed: int, index: int) -> grain.DatasetIterator:
    """`train_iterator(seed)` after `index` batches have been read."""
    iterator = self.train_iterator(seed)
    iterator.set_state(iterator.get_state() | {'next_index': index})
    return iterator

  @property
  def whole_batches(self) -> int:
    """Batches that training reads before it comes to any stretch of text again."""
    shares = self._shares().values()
    total = sum(share for _, share in shares)
    windows = min(_stretches(len(tokens), self.context) * total / share for tokens, share in shares)
    return int(windows) // self.batch

  def components(self, split: str = 'validation') -> dict[str, np.ndarray]:
    """By name, or under '' where there is but one corpus, the 1-D tokens that make up `split`.

    They begin and end with the zero byte between a component and its neighbour, so that every token
    of the split but the first is predicted in exactly one of them. Raises `UserError` for an unknown
    split.
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
    """One pass over a component, or over one after the other: see the function `eval_batches`.

    Raises `UserError` for an unknown split or one without a prediction.
    """
    sizes = {'context': self.context, 'batch': self.batch}
    passes = [
      eval_batches(tokens, **sizes, split=split) for tokens in self._chosen(split, component)
    ]
    return itertools.chain.from_iterable(passes)

  def evaluation(self, split: str = 'validation', component: str | None = None) -> JsonObject:
    """What a mean loss over `eval_batches(split, component)` is a number of, as JSON values.

    After every `stride` tokens, predictions begin again without a past.
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
    """The training tokens and weight of each component."""
    tokens = self.tokens['train']
    return {
      name: (tokens[span['train']], self.card['components'][name]['weight'])
      for name, span in self.spans.items()
    } or {'': (tokens, 1.0)}


def load(config: ConfigDict, tokenizer: tokenizers.Tokenizer | None = None) -> Data:
  """What `config.{source, path, split, tokenizer, vocab_size, context, batch}` describe.

  A `tokenizer` that is given takes the place of the one that the corpus would make.

  Raises `UserError` for a bad source, path, split or tokenizer, and where training or validation
  would find too little text: before any long work, not at the first evaluation.
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
  for name, (ids, _) in data._shares().items():
    _check_window(ids, config.context, config.batch, name)
  _check_prediction(tokens['validation'], 'validation')
  return data


def _spans(
  cards: dict[str, JsonObject], tokens: dict[str, np.ndarray], tokenizer: tokenizers.Tokenizer
) -> dict[str, dict[str, slice]]:
  """Where each component lies in each split, found by counting its documents' zero bytes."""
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
      raise UserError(f'config.data.{name} {value}: valid: 1 or more')
  if len(tokens) < context + 1:
    where = f' in {component}' if component else ''
    raise UserError(
      f'config.data.context {context} needs {context + 1} training tokens, there are {len(tokens)}'
      f'{where}; valid: config.data.context up to {max(len(tokens) - 1, 0)}, or more text'
    )


def _check_prediction(tokens: np.ndarray, split: str) -> None:
  if len(tokens) < 2:
    raise UserError(
      f'the {split} split has {len(tokens)} tokens, which leaves nothing to predict; '
      'valid: a larger share for it in config.data.split, or more text'
    )
