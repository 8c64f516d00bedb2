"""Log-likelihoods of the tokens of sequences of different lengths, as benchmarks ask for them."""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np
from jax.stages import Wrapped
from tqdm import tqdm

from sparse_lm.core.errors import UserError
from sparse_lm.core.tree import Tree
from sparse_lm.data.tokenizers import Tokenizer
from sparse_lm.kernels.token_losses import TokenLosses, token_losses
from sparse_lm.model import lm
from sparse_lm.model.lm import LM

# Sequences are padded to a multiple of this length, so that few lengths are compiled.
_MULTIPLE = 16


class Likelihood(NamedTuple):
  """What a model says of the tokens of a sequence after the first, each given all tokens before it.

  Attributes:
    log_p: log-probability of each token in nats, float32 `[tokens - 1]`.
    likeliest: bool `[tokens - 1]`, whether no token is likelier.
  """

  log_p: np.ndarray
  likeliest: np.ndarray


def likelihoods(
  model: LM,
  variables: Tree,
  sequences: Sequence[np.ndarray],
  batch: int,
  progress: str = '',
) -> list[Likelihood]:
  """Returns the likelihood of each sequence.

  A result does not depend on the other sequences. Models that let the sequences of a batch influence each
  other in evaluation, such as experts of limited capacity, run as in decoding.

  Args:
    model: the model.
    variables: all collections that it reads.
    sequences: 1-D token ids, 2 to `context + 1` each.
    batch: sequences that are evaluated together.
    progress: label of a progress bar on a terminal; '' = none.

  Raises:
    UserError: a sequence is too short or too long, or a method of the model can only decide for a whole
      batch.
  """
  _check(model, sequences)
  step = _step(model)
  order = sorted(range(len(sequences)), key=lambda number: -len(sequences[number]))
  found: dict[int, Likelihood] = {}
  bar = tqdm(
    total=len(order),
    desc=progress,
    leave=False,
    unit='sequence',
    disable=None if progress else True,
  )
  with bar:
    for first in range(0, len(order), batch):
      numbers = order[first : first + batch]
      rows = [np.asarray(sequences[number], np.int32) for number in numbers]
      length = min(-(-(len(rows[0]) - 1) // _MULTIPLE) * _MULTIPLE, model.spec.context)
      tokens_BxL1 = np.zeros((batch, length + 1), np.int32)
      for row, tokens in enumerate(rows):
        tokens_BxL1[row, : len(tokens)] = tokens
      losses = jax.device_get(step(variables, tokens_BxL1))
      for number, tokens, nats, likeliest in zip(numbers, rows, *losses):
        count = len(tokens) - 1
        found[number] = Likelihood(-nats[:count], likeliest[:count])
      bar.update(len(rows))
  return [found[number] for number in range(len(sequences))]


def beginning(tokenizer: Tokenizer) -> tuple[np.ndarray, str]:
  """Returns the token that begins a text, `[1]` or `[0]`, and its name.

  It is the token 'bos', else 'eos', as in lm-eval; for a tokenizer without them, the zero byte between
  documents. If the vocabulary lacks that, too, there is none, and the first token of a sentence is not
  predicted.
  """
  for name, token in (('bos', tokenizer.bos), ('eos', tokenizer.eos)):
    if token is not None:
      return np.array([token], np.int32), name
  try:
    return tokenizer.encode('\0').astype(np.int32), 'zero byte'
  except UserError:
    return np.empty(0, np.int32), 'nothing'


def _check(model: LM, sequences: Sequence[np.ndarray]) -> None:
  if not lm.batch_independent(model)['eval']:
    lm.check_decodes(model)
  most = model.spec.context + 1
  for tokens in sequences:
    if not 2 <= len(tokens) <= most:
      valid = f'2 to {most}, one more than the context'
      raise UserError(f'a sequence has {len(tokens)} tokens; valid: {valid}')


@functools.lru_cache(maxsize=16)
def _step(model: LM) -> Wrapped:
  """Returns the compiled `(variables, tokens_BxL1) -> TokenLosses`."""
  mode = 'eval' if lm.batch_independent(model)['eval'] else 'decode'

  def run(variables: Tree, tokens_BxL1: jax.Array) -> TokenLosses:
    predicted = model.apply(variables, tokens_BxL1[:, :-1], mode=mode, readout=True)
    return token_losses(predicted, tokens_BxL1[:, 1:])

  return jax.jit(run)
