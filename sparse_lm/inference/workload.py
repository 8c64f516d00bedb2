"""The timed workload of decoding: a prompt that is read at once, followed by single tokens."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sparse_lm.core.errors import UserError
from sparse_lm.core.tree import Tree
from sparse_lm.inference.decode import Decoder
from sparse_lm.measure import machine, turns

DECODED = 16  # number of tokens that a turn decodes


class Workload(NamedTuple):
  """The tokens to prefill and decode.

  Attributes:
    tokens_BxL: int32 tokens.
    prompt: number of tokens per sequence to prefill; `DECODED` more tokens are decoded.
  """

  tokens_BxL: np.ndarray
  prompt: int

  @property
  def batch(self) -> int:
    """Number of sequences."""
    return len(self.tokens_BxL)


def workload(tokens: np.ndarray, context: int, batch: int) -> Workload:
  """Cuts a text into `batch` sequences of `context` tokens. Raises a UserError if it is too short."""
  if context <= DECODED or len(tokens) < batch * context:
    raise UserError(
      f'--batch={batch} with config.data.context={context} is not valid for a text of {len(tokens)} '
      f'tokens; valid: a context above {DECODED}, and no more tokens in the batch than in the text'
    )
  rows = np.asarray(tokens[: batch * context], np.int32).reshape(batch, context)
  return Workload(rows, context - DECODED)


class DecodeCall(turns.Prepared):
  """Decodes the tokens after the prompt, each time from the cache after the prompt."""

  def __init__(self, decoder: Decoder, work: Workload) -> None:
    self.decoder, self.work = decoder, work
    length_B = np.full(work.batch, work.prompt, np.int32)
    cache = decoder.cache(work.batch)
    _, self.begun = decoder.prefill(
      decoder.variables, cache, work.tokens_BxL[:, : work.prompt], length_B
    )
    self.prepare()

  def prepare(self) -> Tree:
    """Copies the cache after the prompt, because decoding donates it."""
    self.cache = jax.tree.map(jnp.copy, self.begun)
    return self.cache

  def __call__(self) -> jax.Array:
    """Returns the logits after the last token, `[B, V]`."""
    for place in range(self.work.prompt, self.work.prompt + DECODED):
      position_B = np.full(self.work.batch, place, np.int32)
      token_B = self.work.tokens_BxL[:, place]
      logits, self.cache = self.decoder.decode(
        self.decoder.variables, self.cache, token_B, position_B
      )
    return logits

  @property
  def peak_memory(self) -> int | None:
    """Peak memory of a decoding step in bytes, according to XLA."""
    token_B = self.work.tokens_BxL[:, 0]
    lowered = self.decoder.decode.lower(self.decoder.variables, self.cache, token_B, token_B)
    return machine.peak_memory(lowered.compile())


class PrefillCall(turns.Prepared):
  """Prefills an empty cache with whole sequences."""

  def __init__(self, decoder: Decoder, work: Workload) -> None:
    self.decoder, self.work = decoder, work
    self.length_B = np.full(work.batch, work.tokens_BxL.shape[1], np.int32)
    self.empty = decoder.cache(work.batch)
    self.prepare()

  def prepare(self) -> Tree:
    """Copies the empty cache, because prefilling donates it."""
    self.cache = jax.tree.map(jnp.copy, self.empty)
    return self.cache

  def __call__(self) -> tuple[jax.Array, Tree]:
    """Returns the logits after the last token of each sequence, `[B, V]`, and the cache."""
    return self.decoder.prefill(
      self.decoder.variables, self.cache, self.work.tokens_BxL, self.length_B
    )
