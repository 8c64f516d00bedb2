"""Losses of single tokens without a gradient, for evaluation, in chunks of the vocabulary.

With a large vocabulary, most of the loss is the product with the head's matrix, which is larger than a
CPU's caches. Chunks of tokens (`cross_entropy.py`) read the whole matrix once for each chunk. Chunks of
the vocabulary read it once for the whole batch, and the sums of the softmax are updated from chunk to
chunk. The head of SmolLM2 (576 x 49,152) and the losses of 1,024 tokens took 1.2 s in chunks of tokens
and 0.39 s in chunks of the vocabulary on 2 CPU cores, where the product alone took 0.33 s.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from sparse_lm.kernels.cross_entropy import (
  LOGITS_BYTES,
  Head,
  Readout,
  all_logits,
  cross_entropy,
)

Array = jax.Array
CHUNK = 2048  # tokens of the vocabulary in a chunk on a CPU


class TokenLosses(NamedTuple):
  """What evaluations need of each prediction, `[B, L]`.

  Attributes:
    nats: cross-entropy with the target token, float32.
    likeliest: bool, whether no token has a larger logit than the target.
  """

  nats: Array
  likeliest: Array


def token_losses(predicted: Readout | Array, targets_BxL: Array) -> TokenLosses:
  """Returns the losses of predictions.

  Args:
    predicted: a `Readout`, or the logits, float32 `[B, L, V]`.
    targets_BxL: int32, the next tokens.
  """
  chunk = _chunk(predicted, targets_BxL.size)
  if chunk is None:
    logits_BxLxV = all_logits(predicted)
    own = jnp.take_along_axis(logits_BxLxV, targets_BxL[..., None], axis=-1)[..., 0]
    nats = cross_entropy(predicted, targets_BxL)[1].nats
    return TokenLosses(nats, own >= jnp.max(logits_BxLxV, axis=-1))
  hidden_TxD = predicted.hidden_BxLxD.reshape(-1, predicted.hidden_BxLxD.shape[-1])
  losses = _over_vocabulary(hidden_TxD, predicted.head, targets_BxL.reshape(-1), chunk)
  return TokenLosses(*(a.reshape(targets_BxL.shape) for a in losses))


def token_nats(predicted: Readout | Array, targets_BxL: Array) -> Array:
  """Returns the cross-entropies of predictions, float32 `[B, L]`: the `nats` of `token_losses` alone."""
  if _chunk(predicted, targets_BxL.size) is None:
    return cross_entropy(predicted, targets_BxL)[1].nats
  return token_losses(predicted, targets_BxL).nats


def _vocabulary(head: Head) -> int:
  return head.kernel_DxV.shape[1] if head.table_VxD is None else head.table_VxD.shape[0]


def _chunk(predicted: Readout | Array, tokens: int) -> int | None:
  """Returns the size of a chunk of the vocabulary; `None` if chunks would not pay."""
  if not isinstance(predicted, Readout) or predicted.head.bigrams_VxV is not None:
    return None
  on_cpu = jax.default_backend() == 'cpu'
  chunk = CHUNK if on_cpu else max(CHUNK, LOGITS_BYTES // (4 * tokens))
  return chunk if _vocabulary(predicted.head) > chunk else None


def _over_vocabulary(hidden_TxD: Array, head: Head, targets_T: Array, size: int) -> TokenLosses:
  """Returns the losses `[T]`, from one chunk of logits `[T, size]` after the other."""
  vocab = _vocabulary(head)

  def step(carry: tuple[Array, Array, Array], first: Array) -> tuple[tuple, None]:
    largest_T, sum_T, own_T = carry
    # The last chunk overlaps the one before it, whose logits it leaves out.
    begin = jnp.minimum(first, vocab - size)
    logits_TxC = _logits(hidden_TxD, head, begin, size)
    place_C = begin + jnp.arange(size)
    logits_TxC = jnp.where(place_C >= first, logits_TxC, -jnp.inf)
    above_T = jnp.maximum(largest_T, jnp.max(logits_TxC, axis=-1))
    terms_T = jnp.sum(jnp.exp(logits_TxC - above_T[:, None]), axis=-1)
    place_T = targets_T - begin
    found_T = jnp.take_along_axis(logits_TxC, jnp.clip(place_T, 0, size - 1)[:, None], axis=-1)
    here_T = (targets_T >= first) & (place_T < size)
    own_T = jnp.where(here_T, found_T[:, 0], own_T)
    return (above_T, sum_T * jnp.exp(largest_T - above_T) + terms_T, own_T), None

  none_T = jnp.full(targets_T.shape, -jnp.inf)
  start = none_T, jnp.zeros(targets_T.shape), none_T
  (largest_T, sum_T, own_T), _ = jax.lax.scan(step, start, jnp.arange(0, vocab, size))
  return TokenLosses(largest_T + jnp.log(sum_T) - own_T, own_T >= largest_T)


def _logits(hidden_TxD: Array, head: Head, begin: Array, size: int) -> Array:
  """Returns float32 logits of consecutive tokens of the vocabulary, rounded as in `cross_entropy.py`."""

  def part(a: Array, axis: int) -> Array:
    return jax.lax.dynamic_slice_in_dim(a, begin, size, axis)

  if head.table_VxD is None:
    product = hidden_TxD @ part(head.kernel_DxV, 1).astype(hidden_TxD.dtype)
  else:
    product = hidden_TxD @ part(head.table_VxD, 0).astype(hidden_TxD.dtype).T
  logits_TxC = product.astype(jnp.float32)
  if head.bias_V is None:
    return logits_TxC
  return logits_TxC + part(head.bias_V, 0).astype(jnp.float32)
