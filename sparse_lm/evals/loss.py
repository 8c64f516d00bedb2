"""Measures the cross-entropy on a split, and statistics of gates and hidden units."""

import collections
import dataclasses
import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.stages import Wrapped

from sparse_lm.core import tree
from sparse_lm.core.aot import AotFunction, Call
from sparse_lm.core.errors import UserError
from sparse_lm.core.records import JsonObject
from sparse_lm.core.tree import Tree
from sparse_lm.data.corpus import SEPARATOR
from sparse_lm.data.tokenizers import Tokenizer
from sparse_lm.evals import EvalData, EvalModel, Evaluation, Values
from sparse_lm.kernels.token_losses import token_nats
from sparse_lm.layers.sow import SOWN
from sparse_lm.measure import device, machine
from sparse_lm.measure.observe import scalars
from sparse_lm.model import plans
from sparse_lm.model.lm import LM
from sparse_lm.train.objective import observed

SHORT = {'validation': 'val'}  # names of splits in tables


@dataclasses.dataclass(frozen=True)
class Loss(Evaluation):
  """Computes the mean loss over all predictions of a split.

  The metrics are those of `mean_losses` and:

  - `perplexity`: the exponential of the loss in nats per token. It depends on the tokenizer.
  - `word_perplexity`: the exponential of the loss in nats per word, if the tokens are text. Words are
    separated by white space, and each end of a line counts as one more word, as in WikiText (Merity et
    al. 2017). Words are counted in the decoded text. Word perplexities can be compared between
    tokenizers.
  """

  def run(self, model: EvalModel, data: EvalData) -> Values:
    """Returns the metrics of the class.

    Raises a UserError if the split has no prediction, and if a batch does not fit in memory.
    """
    _check_memory(model, data)
    values = mean_losses(model, data)
    loss = values[f'{_short(data)}_loss']
    values['perplexity'] = _exp(loss)
    if model.tokenizer is not None:
      tokens, words = _sizes(data, model.tokenizer)
      values['word_perplexity'] = _exp(loss * tokens / words) if words else None
    return values

  def card(self, model: EvalModel, data: EvalData) -> JsonObject:
    """Returns the card of the text and its windows, and the unit of each metric."""
    short = _short(data)
    units = {
      f'{short}_loss': 'nats per token',
      'perplexity': 'exp(nats per token)',
      f'{short}_bits_per_byte': 'bits per byte of UTF-8 text',
      'word_perplexity': 'exp(nats per word), words separated by white space and ends of lines',
    }
    return data.card | {'unit': units}


def mean_losses(model: EvalModel, data: EvalData) -> Values:
  """Returns the mean loss over all predictions of a split, as training measures it.

  For the validation split, the metrics are `val_loss` in nats per token; `val_bits_per_byte`, if the
  number of bytes is known; `val_loss/<name>` for each component of a mixture; and `val/<name>` for
  statistics that modules sowed, averaged over full batches.

  Raises a UserError if the split has no prediction.
  """
  sums, step = _Sums(data), eval_step(model.model)
  for name, tokens_BxL1, weight_BxL in data.passes():
    summed, seen = jax.device_get(step(model.variables, tokens_BxL1, weight_BxL))
    sums.add(name, weight_BxL, summed, seen)
  return sums.values()


def _check_memory(model: EvalModel, data: EvalData) -> None:
  """Raises a UserError if a batch of windows does not fit in memory, before the first one runs."""
  spec, room = model.model.spec, device.memory()
  scores = 4 * data.batch * spec.heads * data.context**2  # bytes, if a layer stores them
  if 8 * scores < room:
    return
  shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), model.variables)
  tokens_BxL1 = jax.ShapeDtypeStruct((data.batch, data.context + 1), np.int32)
  weight_BxL = jax.ShapeDtypeStruct((data.batch, data.context), np.float32)
  step = eval_step(model.model).lower(shapes, tokens_BxL1, weight_BxL)
  needed = machine.peak_memory(step.compile()) or 0
  if needed > room:
    raise UserError(
      f'context={data.context} and batch={data.batch} take {needed / 2**30:,.1f} GiB of '
      f'{room / 2**30:,.1f} GiB of memory; valid: a smaller --context or --batch'
    )


def _short(data: EvalData) -> str:
  return SHORT.get(data.split, data.split)


def _exp(nats: float) -> float:
  """Returns the exponential, or infinity if it is too large for a float."""
  with np.errstate(over='ignore'):
    return float(np.exp(nats))


def _sizes(data: EvalData, tokenizer: Tokenizer) -> tuple[int, int]:
  """Returns the number of tokens and the number of words (see `Loss`) of the data."""
  tokens = words = 0
  for part in data.parts.values():
    text = tokenizer.decode(part).replace(SEPARATOR.decode(), '\n')  # a document ends a line
    tokens += len(part)
    words += len(text.split()) + text.count('\n')
  return tokens, words


def run_packed(model: LM, variables: Tree, data: EvalData) -> list[Values]:
  """Returns the metrics of `mean_losses` for N models, which are evaluated at once on the same batches.

  Args:
    model: the model.
    variables: all collections, with a leading axis of N.
    data: the data.
  """
  step = packed_eval_step(model)
  found = [
    (name, weight_BxL, step(variables, tokens_BxL1, weight_BxL))
    for name, tokens_BxL1, weight_BxL in data.passes()
  ]
  sums = [_Sums(data) for _ in range(len(jax.tree.leaves(variables)[0]))]
  for name, weight_BxL, outputs in jax.device_get(found):
    for number, own in enumerate(sums):
      own.add(name, weight_BxL, *tree.at_index(outputs, number))
  return [own.values() for own in sums]


class _Sums:
  """Sums over the batches of a split, for one model."""

  def __init__(self, data: EvalData) -> None:
    self._data = data
    self._nats: collections.Counter[str] = collections.Counter()
    self._tokens: collections.Counter[str] = collections.Counter()
    self._full: list[dict[str, float]] = []
    self._partly: list[dict[str, float]] = []

  def add(
    self, name: str, weight_BxL: np.ndarray, summed: np.ndarray, seen: dict[str, np.ndarray]
  ) -> None:
    """Adds the outputs of `eval_step` for a batch of the component `name`."""
    self._nats[name] += float(summed)
    self._tokens[name] += float(weight_BxL.sum())
    # Statistics of batches with padding are used only if there are no full batches.
    (self._full if weight_BxL[:, -1].all() else self._partly).append(scalars(seen))

  def values(self) -> Values:
    """Returns the metrics of `mean_losses` for all batches so far."""
    nats, tokens, data = self._nats, self._tokens, self._data
    split = _short(data)
    loss = nats.total() / tokens.total()
    values: Values = {f'{split}_loss': loss}
    if data.bytes_per_token:
      values[f'{split}_bits_per_byte'] = loss / math.log(2) / data.bytes_per_token
    values |= {f'{split}_loss/{name}': nats[name] / tokens[name] for name in nats if name}
    counted = self._full or self._partly
    for name in counted[0]:
      values[f'{split}/{name}'] = float(np.mean([seen[name] for seen in counted]))
    return values


def separated(values: Values, split: str = 'validation') -> tuple[Values, dict[str, float]]:
  """Returns the metrics for tables, and the statistics of modules without their prefix."""
  prefix = f'{SHORT.get(split, split)}/'
  seen = {name.removeprefix(prefix): x for name, x in values.items() if name.startswith(prefix)}
  return {name: x for name, x in values.items() if not name.startswith(prefix)}, seen


@functools.lru_cache(maxsize=16)
def eval_step(model: LM) -> Wrapped:
  """Returns the compiled `(variables, tokens_BxL1, weight_BxL) -> (summed nats, statistics)`, float32."""
  return jax.jit(_of_batch(model))


@functools.cache  # as `train.packed.packed`
def packed_eval_step(model: LM) -> AotFunction:
  """Returns `eval_step`, vmapped over the variables; all models read the same batch."""
  return AotFunction(jax.vmap(_of_batch(model), in_axes=(0, None, None)))


def packed_call(model: LM, variables: Tree, batch: int) -> Call:
  """Returns the evaluation step of `run_packed` with the shapes of its arguments, for compilation.

  Args:
    model: the model.
    variables: arrays or shape structs, with a leading axis of models.
    batch: number of sequences in a batch.
  """
  context = model.spec.context
  tokens_BxL1 = jax.ShapeDtypeStruct((batch, context + 1), np.int32)
  weight_BxL = jax.ShapeDtypeStruct((batch, context), np.float32)
  return Call(packed_eval_step(model), (variables, tokens_BxL1, weight_BxL))


def _of_batch(
  model: LM,
) -> Callable[[Tree, jax.Array, jax.Array], tuple[jax.Array, dict[str, jax.Array]]]:
  """Returns the function that `eval_step` compiles."""

  def run(
    variables: Tree, tokens_BxL1: jax.Array, weight_BxL: jax.Array
  ) -> tuple[jax.Array, dict[str, jax.Array]]:
    predicted, sown = model.apply(
      variables, tokens_BxL1[:, :-1], mode='eval', readout=True, mutable=SOWN
    )
    nats_BxL = token_nats(predicted, tokens_BxL1[:, 1:])
    return jnp.sum(nats_BxL * weight_BxL), observed(plans.ledger(model, model.spec.context), sown)

  return run
