"""Prefill and decoding: two compiled functions with a cache that is allocated once."""

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.stages import Wrapped

from sparse_lm.core.errors import UserError
from sparse_lm.core.tree import Tree
from sparse_lm.inference.sample import Sampling
from sparse_lm.layers.spec import ROTARY
from sparse_lm.model import lm
from sparse_lm.model.lm import LM
from sparse_lm.plan import sites
from sparse_lm.plan.sites import Replacement

Array = jax.Array
_ROUNDED = 64  # so that few lengths must be compiled


@functools.partial(jax.jit, static_argnums=0)
def _draw(sampling: Sampling, logits_BxV: Array, key: Array, place: int) -> Array:
  return sampling.draw(logits_BxV, jax.random.fold_in(key, place))


def shortened(model: LM, tokens: int) -> LM:
  """Returns the model with a context of `tokens`, rounded up, so that its cache is small.

  A model with learned positions keeps its context.
  """
  spec = model.spec
  room = -(-tokens // _ROUNDED) * _ROUNDED
  if spec.positions != ROTARY or room >= spec.context:
    return model
  return model.clone(spec=dataclasses.replace(spec, context=room))


class Decoder:
  """Decodes a batch of sequences.

  The constructor raises a UserError if a method of the model cannot decode.

  Attributes:
    model: the model.
    variables: all collections except the cache.
    replace: functions of the activations at sites, see `plan.sites.run`. They are called with the
      activations of the prompt, and then with those of each new token. With them nothing is compiled and
      prompts are not padded, so the functions may use NumPy.
  """

  def __init__(
    self, model: LM, variables: Tree, replace: Mapping[str, Replacement] | None = None
  ) -> None:
    lm.check_decodes(model)
    self.model, self.variables, self.replace = model, variables, replace or {}

  def cache(self, batch: int, together: int = 1) -> Tree:
    """Returns an empty cache.

    Args:
      batch: number of sequences.
      together: the most tokens that continue a sequence in one call.
    """
    shapes = lm.cache_shapes(self.model, self.variables, batch, together)
    return jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), shapes)

  @functools.cached_property
  def prefill(self) -> Wrapped:
    """`(variables, cache, tokens_BxL, length_B) -> (logits_BxV of the last tokens, cache)`.

    Sequences are padded on the right; tokens beyond `length_B` are ignored.
    """
    return jax.jit(self._prefill, donate_argnums=1)

  @functools.cached_property
  def decode(self) -> Wrapped:
    """`(variables, cache, token_B, position_B) -> (logits_BxV, cache)`, one token per sequence."""
    return jax.jit(self._decode, donate_argnums=1)

  def _prefill(
    self, variables: Tree, cache: Tree, tokens_BxL: Array, length_B: Array
  ) -> tuple[Array, Tree]:
    place_BxL = jnp.broadcast_to(jnp.arange(tokens_BxL.shape[1]), tokens_BxL.shape)
    valid_BxL = place_BxL < length_B[:, None]
    given = {'tokens_BxL': tokens_BxL, 'positions_BxL': place_BxL, 'valid_BxL': valid_BxL}
    logits_BxLxV, cache = self.apply(variables, cache, **given)
    last_Bx1x1 = (length_B - 1)[:, None, None]
    return jnp.take_along_axis(logits_BxLxV, last_Bx1x1, axis=1)[:, 0], cache

  def _decode(
    self, variables: Tree, cache: Tree, token_B: Array, position_B: Array
  ) -> tuple[Array, Tree]:
    given = {'tokens_BxL': token_B[:, None], 'positions_BxL': position_B[:, None]}
    logits, cache = self.apply(variables, cache, **given)
    return logits[:, 0], cache

  def apply(self, variables: Tree, cache: Tree, **given: Array | int | bool) -> tuple[Array, Tree]:
    """Calls the model in mode 'decode'; returns its output and the new cache."""
    before = {**variables, 'cache': cache}
    with sites.replacing(self.replace):
      out, changed = self.model.apply(before, mode='decode', mutable=['cache'], **given)
    return out, changed['cache']

  def begin(
    self, prompts: Sequence[np.ndarray], together: int = 1
  ) -> tuple[Array, Tree, np.ndarray]:
    """Reads prompts; returns the logits after each prompt, the cache, and the prompts' lengths.

    Prompts are padded to a power of two, so that few lengths must be compiled.

    Args:
      prompts: int tokens of each prompt.
      together: the most tokens that will continue a sequence in one call.

    Raises:
      UserError: a prompt is empty or fills the context.
    """
    self.check_prompts(prompts)
    length_B = np.array([len(prompt) for prompt in prompts], np.int32)
    longest = int(length_B.max())
    padded = min(self.model.spec.context, 1 << (longest - 1).bit_length())
    room = longest if self.replace else padded
    tokens_BxL = np.zeros((len(prompts), room), np.int32)
    for row, prompt in zip(tokens_BxL, prompts):
      row[: len(prompt)] = prompt
    cache = self.cache(len(prompts), together)
    prefill = self._prefill if self.replace else self.prefill
    logits, cache = prefill(self.variables, cache, tokens_BxL, length_B)
    return logits, cache, length_B

  def check_prompts(self, prompts: Sequence[np.ndarray]) -> None:
    """Raises a UserError if a prompt is empty or fills the context."""
    context = self.model.spec.context
    for length in map(len, prompts):
      if not 1 <= length < context:
        raise UserError(
          f'--prompt has {length} tokens; valid: 1 to {context - 1} (config.data.context={context}, with '
          'room for at least one new token)'
        )

  def check_room(self, prompts: Sequence[np.ndarray], tokens: int) -> None:
    """Raises a UserError if the context has no room for `tokens` new tokens after the longest prompt."""
    room = self.model.spec.context - max(len(prompt) for prompt in prompts)
    if not 1 <= tokens <= max(room, 1):
      raise UserError(
        f'--tokens={tokens} after a prompt of {self.model.spec.context - room} tokens; valid: 1 to '
        f'{room} (config.data.context={self.model.spec.context})'
      )

  def generate(
    self, prompts: Sequence[np.ndarray], tokens: int, sampling: Sampling, seed: int = 0
  ) -> Iterator[np.ndarray]:
    """Yields the next token of each sequence, int32 `[B]`, `tokens` times.

    Raises:
      UserError: the context has no room for so many tokens, or a prompt is not valid.
    """
    sampling.check(self.model.spec.vocab)
    self.check_room(prompts, tokens)
    logits, cache, position_B = self.begin(prompts)
    key, decode = jax.random.key(seed), self._decode if self.replace else self.decode
    for i in range(tokens):
      token_B = _draw(sampling, logits, key, i)
      yield np.asarray(token_B)
      if i + 1 < tokens:
        logits, cache = decode(self.variables, cache, token_B, position_B + i)
