"""Cross-entropy from hidden states in chunks of tokens, without the logits of a whole batch.

The logits of all tokens would be the largest array of a training step: in float32, `[16384, 50304]`
logits take 3.3 GB, and their softmax takes the same again. Here the head processes one chunk of tokens
after the other. The loss is the last operation of the forward pass, so the gradient of a chunk's logits
follows from the logits themselves:

  d CE / d logits = softmax(logits) - onehot(target)

Therefore the forward pass of a differentiated loss also computes the gradients of the hidden states and
of the head, and the backward pass only scales them by the loss's gradient. The head runs once per
chunk, and each chunk's logits are freed after it.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

Array = jax.Array

# Largest size of a chunk's float32 logits in bytes. On one H100, with 16,384 tokens and a vocabulary of
# 50,304, the loss and its gradient took 8.0 ms in chunks of 4,096 tokens (which this limit gives) and
# 9.7 ms in chunks of 1,024. On a CPU, a chunk should fit the last-level cache.
LOGITS_BYTES, LOGITS_BYTES_ON_CPU = 2**30, 2**23


class Head(NamedTuple):
  """The parameters of an output head: logits are `hidden @ kernel + bias + bigrams[token]`.

  Attributes:
    kernel_DxV: the kernel, which is cast to the dtype of the hidden states. `None` in a tied head.
    table_VxD: the embedding table, whose transpose is the kernel of a tied head; else `None`.
    bias_V: the bias, or `None`.
    bigrams_VxV: logits to add for each input token, or `None`.
  """

  kernel_DxV: Array | None = None
  table_VxD: Array | None = None
  bias_V: Array | None = None
  bigrams_VxV: Array | None = None


class Readout(NamedTuple):
  """The inputs of the logits: hidden states and the head.

  Attributes:
    hidden_BxLxD: outputs of the last norm.
    head: the head's parameters.
    tokens_BxL: int32, the input tokens; `None` for a head without bigrams.
  """

  hidden_BxLxD: Array
  head: Head
  tokens_BxL: Array | None = None


class Losses(NamedTuple):
  """The losses of each token in nats, float32, without a gradient.

  Attributes:
    nats: cross-entropy with the target token.
    divergence: `temperature^2 KL(teacher || model)`, with both distributions at the given temperature;
      `None` without a teacher.
  """

  nats: Array
  divergence: Array | None


class _Known(NamedTuple):
  """The inputs of the loss that get no gradient, `[T, ...]`."""

  tokens: Array | None
  targets: Array
  teacher_hidden: Array | None = None
  teacher_tokens: Array | None = None


def cross_entropy(
  predicted: Readout | Array,
  targets_BxL: Array,
  teacher: Readout | Array | None = None,
  weights: tuple[float | Array, float | Array] = (1.0, 0.0),
  temperature: float = 1.0,
) -> tuple[Array, Losses]:
  """Returns the training loss: a weighted sum of the mean cross-entropy and the mean divergence.

  Args:
    predicted: a `Readout`, from which logits are computed in chunks; or the logits, float32 `[B, L, V]`.
    targets_BxL: int32, the next tokens.
    teacher: a `Readout` or the logits of a teacher with the same vocabulary, which gets no gradient; or
      `None`.
    weights: weights of the cross-entropy and of the divergence.
    temperature: temperature of both distributions of the divergence (see `Losses`).

  Returns:
    The loss, a float32 scalar, and the losses of each token, `[B, L]`.
  """
  if not isinstance(predicted, Readout) or not isinstance(teacher, Readout | None):
    # The logits already exist, so chunks would save no memory.
    logits, theirs = all_logits(predicted), None if teacher is None else all_logits(teacher)
    losses = _losses(logits, theirs, targets_BxL, temperature)
    return _weighted(losses, weights), jax.lax.stop_gradient(losses)
  hidden_BxLxD, head, tokens_BxL = predicted
  known = _Known(tokens_BxL, targets_BxL)
  if teacher is not None:
    known = known._replace(teacher_hidden=teacher.hidden_BxLxD, teacher_tokens=teacher.tokens_BxL)
  flat_hidden, flat = jax.tree.map(
    lambda a: a.reshape(targets_BxL.size, *a.shape[2:]), (hidden_BxLxD, known)
  )
  weights = tuple(jnp.asarray(weight, jnp.float32) for weight in weights)
  loss, losses = _in_chunks(temperature, flat_hidden, head, weights, flat, teacher and teacher.head)
  return loss, jax.tree.map(lambda a: a.reshape(targets_BxL.shape), losses)


def chunk_rows(tokens: int, vocab: int) -> int:
  """Returns the number of tokens in a chunk, so that its logits stay below the size limit.

  Chunks have equal sizes if that takes less than twice the smallest possible number of chunks.
  """
  limit = LOGITS_BYTES_ON_CPU if jax.default_backend() == 'cpu' else LOGITS_BYTES
  most = max(1, limit // (4 * vocab))
  needed = -(-tokens // most)
  for chunks in range(needed, 2 * needed):
    if tokens % chunks == 0:
      return tokens // chunks
  return -(-tokens // needed)


def all_logits(predicted: Readout | Array) -> Array:
  """Returns the logits of all tokens, float32 `[..., V]`."""
  if not isinstance(predicted, Readout):
    return predicted
  hidden_BxLxD, head, tokens_BxL = predicted
  hidden_TxD = hidden_BxLxD.reshape(-1, hidden_BxLxD.shape[-1])
  tokens_T = None if tokens_BxL is None else tokens_BxL.reshape(-1)
  logits_TxV = _logits(hidden_TxD, tokens_T, _cast(head, hidden_TxD))
  return logits_TxV.reshape(*hidden_BxLxD.shape[:-1], -1)


def _logits(hidden: Array, tokens: Array | None, head: Head) -> Array:
  """Returns float32 logits `[..., V]`; the result of the matmul is rounded to the hidden states' dtype.

  In bfloat16, the result takes half the memory traffic.
  """
  product = hidden @ (head.kernel_DxV if head.table_VxD is None else head.table_VxD.T)
  logits = product.astype(jnp.float32)
  if head.bias_V is not None:
    logits += head.bias_V.astype(jnp.float32)
  if head.bigrams_VxV is not None:
    logits += head.bigrams_VxV[tokens].astype(jnp.float32)
  return logits


def _losses(logits: Array, theirs: Array | None, targets: Array, temperature: float) -> Losses:
  chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
  nats = jax.nn.logsumexp(logits, axis=-1, keepdims=True)[..., 0] - chosen
  if theirs is None:
    return Losses(nats, None)
  ours, theirs = (jax.nn.log_softmax(x / temperature) for x in (logits, theirs))
  return Losses(nats, temperature**2 * jnp.sum(jnp.exp(theirs) * (theirs - ours), axis=-1))


def _weighted(losses: Losses, weights: tuple[float | Array, float | Array]) -> Array:
  loss = weights[0] * jnp.mean(losses.nats)
  return loss if losses.divergence is None else loss + weights[1] * jnp.mean(losses.divergence)


def _gradient(
  logits: Array,
  theirs: Array | None,
  targets: Array,
  weights: tuple[Array, Array],
  temperature: float,
) -> Array:
  """Returns the gradient of each token's weighted losses with respect to its logits."""
  onehot = targets[..., None] == jnp.arange(logits.shape[-1])
  # `_losses` computes the same sums; the compiler computes them once.
  chances = jnp.exp(logits - jax.nn.logsumexp(logits, axis=-1, keepdims=True))
  gradient = weights[0] * (chances - onehot)
  if theirs is None:
    return gradient
  ours, theirs = (jnp.exp(jax.nn.log_softmax(x / temperature)) for x in (logits, theirs))
  return gradient + weights[1] * temperature * (ours - theirs)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _in_chunks(
  temperature: float,
  hidden_TxD: Array,
  head: Head,
  weights: tuple[Array, Array],
  known: _Known,
  teacher: Head | None,
) -> tuple[Array, Losses]:
  """Returns the weighted loss and the losses of each token, `[T]`.

  It is differentiable with respect to the hidden states, the head and the weights.
  """
  head, teacher = _cast(head, hidden_TxD), _cast(teacher, known.teacher_hidden)

  def chunk(carry: None, some: tuple[Array, _Known]) -> tuple[None, Losses]:
    logits, theirs = _both_logits(head, teacher, *some)
    return carry, _losses(logits, theirs, some[1].targets, temperature)

  _, losses = _over_chunks(chunk, None, (hidden_TxD, known), head)
  return _weighted(losses, weights), losses


class _Saved(NamedTuple):
  """Residuals for the backward pass: gradients of the sum of the losses, and both mean losses."""

  hidden_TxD: Array
  head: Head
  means: tuple[Array, Array]


def _forward(
  temperature: float,
  hidden_TxD: Array,
  head: Head,
  weights: tuple[Array, Array],
  known: _Known,
  teacher: Head | None,
) -> tuple[tuple[Array, Losses], _Saved]:
  """Computes the loss together with its gradient."""
  stored, head = head, _cast(head, hidden_TxD)
  teacher = _cast(teacher, known.teacher_hidden)

  def chunk(total: Head, some: tuple[Array, _Known]) -> tuple[Head, tuple[Losses, Array]]:
    hidden, known = some
    logits, theirs = _both_logits(head, teacher, hidden, known)
    losses = _losses(logits, theirs, known.targets, temperature)
    gradient = _gradient(logits, theirs, known.targets, weights, temperature)
    own, total = _through_head(gradient, hidden, known.tokens, head, total)
    return total, (losses, own)

  zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, jnp.float32), head)
  total, (losses, own) = _over_chunks(chunk, zeros, (hidden_TxD, known), head)
  total = jax.tree.map(lambda a, like: a.astype(like.dtype), total, stored)
  divergence = jnp.zeros(()) if losses.divergence is None else jnp.mean(losses.divergence)
  means = jnp.mean(losses.nats), divergence
  return (_weighted(losses, weights), losses), _Saved(own, total, means)


def _backward(
  temperature: float, saved: _Saved, cotangents: tuple[Array, Losses]
) -> tuple[Array, Head, tuple[Array, Array], None, None]:
  """Scales the gradients of the forward pass. The losses of single tokens have no gradient."""
  cotangent, _ = cotangents
  scale = cotangent / saved.hidden_TxD.shape[0]
  hidden_TxD, head = jax.tree.map(
    lambda a: (scale * a).astype(a.dtype), (saved.hidden_TxD, saved.head)
  )
  return hidden_TxD, head, tuple(cotangent * mean for mean in saved.means), None, None


_in_chunks.defvjp(_forward, _backward)


def _through_head(
  gradient: Array, hidden: Array, tokens: Array | None, head: Head, total: Head
) -> tuple[Array, Head]:
  """Returns the gradient of a chunk's hidden states, and `total` plus the gradients of the head, float32.

  Args:
    gradient: float32 gradient of the chunk's logits; it is rounded to the hidden states' dtype.
    hidden: hidden states of the chunk.
    tokens: input tokens of the chunk.
    head: the head's parameters.
    total: sum of the head's gradients over earlier chunks.
  """
  rounded = gradient.astype(hidden.dtype)
  product = functools.partial(jnp.matmul, preferred_element_type=jnp.float32)
  if head.table_VxD is None:
    own = rounded @ head.kernel_DxV.T
    total = total._replace(kernel_DxV=total.kernel_DxV + product(hidden.T, rounded))
  else:
    own = rounded @ head.table_VxD
    total = total._replace(table_VxD=total.table_VxD + product(rounded.T, hidden))
  if head.bias_V is not None:
    total = total._replace(bias_V=total.bias_V + jnp.sum(gradient, axis=0))
  if head.bigrams_VxV is not None:
    total = total._replace(bigrams_VxV=total.bigrams_VxV.at[tokens].add(gradient))
  return own, total


def _cast(head: Head | None, hidden: Array | None) -> Head | None:
  """Casts the head's matrix to the hidden states' dtype, once instead of in each chunk."""
  if head is None:
    return None
  kernel, table = jax.tree.map(lambda a: a.astype(hidden.dtype), (head.kernel_DxV, head.table_VxD))
  return head._replace(kernel_DxV=kernel, table_VxD=table)


def _both_logits(
  head: Head, teacher: Head | None, hidden: Array, known: _Known
) -> tuple[Array, Array | None]:
  logits = _logits(hidden, known.tokens, head)
  if teacher is None:
    return logits, None
  return logits, _logits(known.teacher_hidden, known.teacher_tokens, teacher)


def _over_chunks(
  step: Callable, carry: Head | None, known: tuple[Array, _Known], head: Head
) -> tuple[Head | None, tuple]:
  """Applies `jax.lax.scan` to equal chunks of tokens, then `step` to the remaining tokens."""
  tokens = known[0].shape[0]
  vocab = head.kernel_DxV.shape[1] if head.table_VxD is None else head.table_VxD.shape[0]
  rows = chunk_rows(tokens, vocab)
  if rows == tokens:
    return step(carry, known)
  even = tokens // rows * rows
  chunks = jax.tree.map(lambda a: a[:even].reshape(-1, rows, *a.shape[1:]), known)
  carry, found = jax.lax.scan(step, carry, chunks)
  found = jax.tree.map(lambda a: a.reshape(even, *a.shape[2:]), found)
  if even == tokens:
    return carry, found
  carry, rest = step(carry, jax.tree.map(lambda a: a[even:], known))
  return carry, jax.tree.map(lambda a, b: jnp.concatenate([a, b]), found, rest)
