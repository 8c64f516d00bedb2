"""What is timed of a model that decodes: a prompt, read at once, and tokens that follow one by one."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sparse_lm.core.errors import UserError
from sparse_lm.core.tree import Tree
from sparse_lm.inference.decode import Decoder
from sparse_lm.measure import machine, turns

DECODED = 16  # tokens of a turn


class Workload(NamedTuple):
  """What is prefilled and decoded.

  Attributes:
    tokens_BxL: int32.
    prompt: tokens of each sequence that are prefilled, before `DECODED` more are decoded.
  """

  tokens_BxL: np.ndarray
  prompt: int

  @property
  def batch(self) -> int:
    """Sequences side by side."""
    return len(self.tokens_BxL)


def workload(tokens: np.ndarray, context: int, batch: int) -> Workload:
  """Sequences of a text as long as a context. Raises UserError where the text is too short."""
  if context <= DECODED or len(tokens) < batch * context:
    raise UserError(
      f'--batch={batch} sequences of config.data.context={context}: a context of more than {DECODED} and '
      f'{batch * context} tokens of text are needed, of which there are {len(tokens)}'
    )
  rows = np.asarray(tokens[: batch * context], np.int32).reshape(batch, context)
  return Workload(rows, context - DECODED)


class DecodeCall(turns.Prepared):
  """Decodes the tokens after the prompt, each time from the cache that the prompt left."""

  def __init__(self, decoder: Decoder, work: Workload) -> None:
    self.decoder, self.work = decoder, work
    length_B = np.full(work.batch, work.prompt, np.int32)
    cache = decoder.cache(work.batch)
    _, self.begun = decoder.prefill(
      decoder.variables, cache, work.tokens_BxL[:, : work.prompt], length_B
    )
    self.prepare()

  def prepare(self) -> Tree:
    """Copies the cache after the prompt: decoding donates it."""
    self.cache = jax.tree.map(jnp.copy, self.begun)
    return self.cache

  def __call__(self) -> jax.Array:
    """Logits after the last token, `[B, V]`."""
    for place in range(self.work.prompt, self.work.prompt + DECODED):
      position_B = np.full(self.work.batch, place, np.int32)
      token_B = self.work.tokens_BxL[:, place]
      logits, self.cache = self.decoder.decode(
        self.decoder.variables, self.cache, token_B, position_B
      )
    return logits

  @property
  def peak_memory(self) -> int | None:
    """Bytes that a step allocates at once, by XLA's account."""
    token_B = self.work.tokens_BxL[:, 0]
    lowered = self.decoder.decode.lower(self.decoder.variables, self.cache, token_B, token_B)
    return machine.peak_memory(lowered.compile())


class PrefillCall(turns.Prepared):
  """Reads whole sequences into an empty cache."""

  def __init__(self, decoder: Decoder, work: Workload) -> None:
    self.decoder, self.work = decoder, work
    self.length_B = np.full(work.batch, work.tokens_BxL.shape[1], np.int32)
    self.empty = decoder.cache(work.batch)
    self.prepare()

  def prepare(self) -> Tree:
    """Copies the empty cache: prefilling donates it."""
    self.cache = jax.tree.map(jnp.copy, self.empty)
    return self.cache

  def __call__(self) -> tuple[jax.Array, Tree]:
    """Logits after the last token of each sequence, `[B, V]`, and the cache."""
    return self.decoder.prefill(
      self.decoder.variables, self.cache, self.work.tokens_BxL, self.length_B
    )
