"""One exact pass over the tokens of a split, for evaluation. Shapes: B batch, L context."""

from collections.abc import Iterator

import numpy as np

from sparse_lm.core.errors import UserError


def eval_batches(
  tokens: np.ndarray,
  *,
  context: int,
  batch: int,
  split: str = 'validation',
  stride: int | None = None,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
  """Yields one pass over 1-D `tokens`, in which each of the N - 1 predictions has weight 1 exactly once.

  Yields `(tokens_BxL1, weight_BxL)`, int32 and float32. Padding of the last window and the last batch has
  id 0 and weight 0.

  Args:
    tokens: the tokens of the split.
    context: L.
    batch: B.
    split: name of the split, for the message.
    stride: distance between the starts of windows, from 1 to `context` (the default). Predictions that
      an earlier window has made get weight 0: their tokens are context only.

  Raises:
    UserError: the tokens have no prediction (raised at the call).
  """
  check_prediction(tokens, split)
  return _eval_batches(tokens, context, batch, stride or context)


def windows(predictions: int, context: int, stride: int) -> int:
  """Returns the number of windows in which `eval_batches` makes this many predictions."""
  return 1 + max(0, -(-(predictions - context) // stride))


def _eval_batches(
  tokens: np.ndarray, context: int, batch: int, stride: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
  predictions = len(tokens) - 1
  count, place_L = windows(predictions, context, stride), np.arange(context)
  step = (batch - 1) * stride + context
  for first in range(0, count, batch):
    begin = first * stride
    chunk = tokens[begin : begin + step + 1]
    padded = np.zeros(step + 1, np.int32)
    padded[: len(chunk)] = chunk
    found = np.lib.stride_tricks.sliding_window_view(padded, context + 1)[::stride].copy()
    window_Bx1 = np.arange(first, first + batch)[:, None]
    new_BxL = (place_L >= context - stride) | (window_Bx1 == 0)
    weight_BxL = new_BxL & (window_Bx1 * stride + place_L < predictions) & (window_Bx1 < count)
    yield np.where(window_Bx1 < count, found, 0), weight_BxL.astype(np.float32)


def check_prediction(tokens: np.ndarray, split: str) -> None:
  """Raises a UserError that names the split if its tokens have no prediction."""
  if len(tokens) < 2:
    raise UserError(
      f'the {split} split has {len(tokens)} tokens, too few for a prediction; '
      'valid: a larger fraction for it in config.data.split, or more text'
    )
