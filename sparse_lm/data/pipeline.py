"""Token arrays to batches: an endless shuffled stream for training, one exact pass for evaluation.

Training goes through grain, whose iterator state is one counter, so a checkpoint resumes exactly.
Shapes: B batch, L context.
"""

import dataclasses
import functools
import sys
from collections.abc import Iterator
from typing import Any

import grain
import numpy as np

from sparse_lm.core.errors import UserError, unknown
from sparse_lm.data import sources, tokenizers


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
  _check_window(tokens, context, batch)
  windows = np.lib.stride_tricks.sliding_window_view(tokens, context + 1)  # [every start, L + 1]
  stretches = -(-len(windows) // context)

  @functools.lru_cache(maxsize=2)  # consecutive epochs, so that a batch may straddle them
  def starts(epoch: int) -> np.ndarray:
    rng = np.random.default_rng((seed, epoch))
    start = rng.permutation(stretches) * context + rng.integers(context, size=stretches)
    return start % len(windows)

  def cut(index: int) -> np.ndarray:
    epoch_B, place_B = np.divmod(np.arange(index * batch, (index + 1) * batch), stretches)
    parts = [starts(epoch)[place_B[epoch_B == epoch]] for epoch in np.unique(epoch_B).tolist()]
    return windows[np.concatenate(parts)].astype(np.int32)

  # A grain element is a whole batch, one gather. Cutting and stacking window by window is some ten
  # times slower, and grain's own shuffle takes milliseconds per element where there are few.
  batches = grain.MapDataset.range(sys.maxsize).map(cut)
  # One thread hides the work behind the step; more would only contend for the interpreter lock.
  read = grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)
  return iter(batches.to_iter_dataset(read))


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
  """

  tokens: dict[str, np.ndarray]
  tokenizer: tokenizers.Tokenizer
  card: dict[str, Any]
  context: int
  batch: int

  def train_iterator(self, seed: int) -> grain.DatasetIterator:
    return train_iterator(self.tokens['train'], context=self.context, batch=self.batch, seed=seed)

  def eval_batches(self, split: str = 'validation') -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Raises `UserError` for an unknown split or one without a prediction."""
    if split not in self.tokens:
      raise unknown('split', split, self.tokens)
    return eval_batches(self.tokens[split], context=self.context, batch=self.batch, split=split)


def load(config: Any) -> Data:
  """What `config.{source, path, split, tokenizer, vocab_size, context, batch}` describe.

  Raises `UserError` for a bad source, path, split or tokenizer, and where training or validation
  would find too little text: before any long work, not at the first evaluation.
  """
  corpus = sources.load(config)
  tokenizer = tokenizers.build(config.tokenizer, corpus, config.vocab_size)
  tokens = {name: tokenizer.encode(text) for name, text in corpus.splits.items()}
  _check_window(tokens['train'], config.context, config.batch)
  _check_prediction(tokens['validation'], 'validation')
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
  return Data(tokens, tokenizer, card, config.context, config.batch)


def _check_window(tokens: np.ndarray, context: int, batch: int) -> None:
  for name, value in (('context', context), ('batch', batch)):
    if value < 1:
      raise UserError(f'config.data.{name} {value}: valid: 1 or more')
  if len(tokens) < context + 1:
    raise UserError(
      f'config.data.context {context} needs {context + 1} training tokens, there are {len(tokens)}; '
      f'valid: config.data.context up to {max(len(tokens) - 1, 0)}, or more text'
    )


def _check_prediction(tokens: np.ndarray, split: str) -> None:
  if len(tokens) < 2:
    raise UserError(
      f'the {split} split has {len(tokens)} tokens, which leaves nothing to predict; '
      'valid: a larger share for it in config.data.split, or more text'
    )
