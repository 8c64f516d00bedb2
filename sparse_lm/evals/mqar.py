"""Multi-query associative recall: a sequence shows keys with values, and later repeats the keys.

Arora et al. 2023, "Zoology: Measuring and Improving Recall in Efficient Language Models".
"""

import dataclasses

import numpy as np

from sparse_lm.core.errors import require
from sparse_lm.core.records import JsonObject
from sparse_lm.evals import EvalData, EvalModel, Evaluation, Values
from sparse_lm.inference.likelihood import likelihoods

_LONGEST = 256  # default length in tokens, unless the context is shorter
_TOKENS_PER_PAIR = 16  # as in the paper: 4 pairs in 64 tokens, 8 in 128, 16 in 256
_POWER = 0.01  # the paper's exponent of the power law of gaps before a query


@dataclasses.dataclass(frozen=True)
class Mqar(Evaluation):
  """Measures associative recall on random tokens of the model's vocabulary, without training on the task.

  A sequence begins with pairs of a key and a value. Later each key occurs once more (a query), after a
  gap whose length is drawn from a power law, and the model has to predict the value as the next token.
  Keys are drawn from the lower half of the vocabulary, values and the tokens in between from the upper
  half. Differs from the paper: a query is also followed by its value, and no key occurs a third time.

  The metrics are `mqar_accuracy`, the share of queries whose value is the likeliest token (chance is
  1 / vocabulary), and `mqar_loss`, nats per query.

  Attributes:
    sequences: number of sequences.
    length: tokens per sequence; 0 = the context, up to 256.
    associations: pairs per sequence; 0 = one for every 16 tokens.
    seed: seed of the sequences.
  """

  reads_text = False

  sequences: int = 64
  length: int = 0
  associations: int = 0
  seed: int = 0

  def run(self, model: EvalModel, data: EvalData) -> Values:
    """Returns the metrics of the class. Raises UserError if the pairs do not fit the sequence."""
    tokens_NxL, place_NxP = self._draw(model, data)
    label = 'recall' if data.progress else ''
    found = likelihoods(model.model, model.variables, list(tokens_NxL), data.batch, label)
    # The first token of a sequence has no prediction.
    right = [each.likeliest[place_P - 1] for each, place_P in zip(found, place_NxP)]
    log_p = [each.log_p[place_P - 1] for each, place_P in zip(found, place_NxP)]
    return {
      'mqar_accuracy': float(np.mean(right)),
      'mqar_loss': -float(np.mean(log_p, dtype=np.float64)),
    }

  def card(self, model: EvalModel, data: EvalData) -> JsonObject:
    """Returns the numbers of sequences, tokens and pairs, the vocabulary, the seed and the units."""
    length, pairs = self._sizes(model, data)
    return {
      'sequences': self.sequences,
      'length': length,
      'associations': pairs,
      'vocabulary': model.model.spec.vocab,
      'seed': self.seed,
      'unit': {'mqar_accuracy': 'share of queries', 'mqar_loss': 'nats per query'},
    }

  def _sizes(self, model: EvalModel, data: EvalData) -> tuple[int, int]:
    """Returns the tokens and the pairs of a sequence."""
    length = self.length or min(data.context, _LONGEST)
    pairs = self.associations or max(length // _TOKENS_PER_PAIR, 1)
    spec = model.model.spec
    require(self.sequences >= 1, 'sequences', self.sequences, '1 or more')
    require(4 <= length <= spec.context, 'length', length, f'4 to {spec.context}, the context')
    most = min(length // 4, spec.vocab // 2)
    valid = f'1 to {most}, by 4 tokens per pair and half the vocabulary'
    require(1 <= pairs <= most, 'associations', pairs, valid)
    return length, pairs

  def _draw(self, model: EvalModel, data: EvalData) -> tuple[np.ndarray, np.ndarray]:
    """Returns the sequences `[N, L]`, int32, and the places of the values to predict, `[N, P]`."""
    length, pairs = self._sizes(model, data)
    vocab, rng = model.model.spec.vocab, np.random.default_rng(self.seed)
    half = vocab // 2
    slots = (length - 2 * pairs) // 2  # a query and its value take a slot of two tokens
    chance = _POWER * np.arange(1, slots + 1) ** (_POWER - 1)
    tokens_NxL = rng.integers(half, vocab, (self.sequences, length), dtype=np.int32)
    place_NxP = np.empty((self.sequences, pairs), np.int64)
    for tokens_L, place_P in zip(tokens_NxL, place_NxP):
      key_P = rng.choice(half, pairs, replace=False)
      value_P = rng.integers(half, vocab, pairs)
      tokens_L[: 2 * pairs : 2], tokens_L[1 : 2 * pairs : 2] = key_P, value_P
      query_P = 2 * pairs + 2 * rng.choice(slots, pairs, replace=False, p=chance / chance.sum())
      place_P[:] = query_P + 1
      tokens_L[query_P], tokens_L[place_P] = key_P, value_P
    return tokens_NxL, place_NxP
