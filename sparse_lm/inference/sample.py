"""Sampling of the next token."""

import dataclasses

import jax
import jax.numpy as jnp

from sparse_lm.core.ranges import Range

TEMPERATURE = Range(float, '0 or [0.0001, inf)')
TOP_P = Range(float, '(0, 1]')


@dataclasses.dataclass(frozen=True)
class Sampling:
  """Options for sampling a token from logits.

  Attributes:
    temperature: divisor of the logits; 0 chooses the largest logit, and the lower id among equal ones.
    top_k: only the `top_k` largest logits can be drawn; 0 means all.
    top_p: only the smallest set of most likely tokens whose probabilities sum to at least `top_p` can be
      drawn (nucleus sampling, Holtzman et al. 2020); 1 means all. The most likely token is always in it.
  """

  temperature: float = 1.0
  top_k: int = 0
  top_p: float = 1.0

  def check(self, vocab: int) -> None:
    """Raises a UserError if an option is out of its range."""
    TEMPERATURE.require('--temperature', self.temperature)
    TOP_P.require('--top_p', self.top_p)
    Range(int, f'[0, {vocab}]').require('--top_k', self.top_k)

  def draw(self, logits_BxV: jax.Array, key: jax.Array) -> jax.Array:
    """Draws one token per sequence, int32 `[B]`, from float32 logits."""
    if self.temperature == 0:
      return jnp.argmax(logits_BxV, axis=-1).astype(jnp.int32)
    allowed_BxV = self.filtered(logits_BxV / self.temperature)
    return jax.random.categorical(key, allowed_BxV).astype(jnp.int32)

  def filtered(self, logits_BxV: jax.Array) -> jax.Array:
    """Sets the logits of tokens outside `top_k`, then of those outside `top_p`, to -inf."""
    order_BxV = jnp.argsort(-logits_BxV, axis=-1, stable=True)
    rank_BxV = jnp.argsort(order_BxV, axis=-1)
    kept_BxV = rank_BxV < (self.top_k or logits_BxV.shape[-1])
    if self.top_p < 1:
      likely_BxV = jax.nn.softmax(jnp.where(kept_BxV, logits_BxV, -jnp.inf))
      sorted_BxV = jnp.take_along_axis(likely_BxV, order_BxV, axis=-1)
      before_BxV = jnp.cumsum(sorted_BxV, axis=-1) - sorted_BxV
      kept_BxV &= jnp.take_along_axis(before_BxV, rank_BxV, axis=-1) < self.top_p
    return jnp.where(kept_BxV, logits_BxV, -jnp.inf)
