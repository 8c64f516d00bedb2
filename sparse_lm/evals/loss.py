"""Cross-entropy on a split, and what gates and hidden units did on it."""

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
from sparse_lm.core.tree import Tree
from sparse_lm.evals import EvalData, EvalModel, Evaluation, Values
from sparse_lm.kernels.cross_entropy import cross_entropy
from sparse_lm.layers.sow import SOWN
from sparse_lm.measure.observe import scalars
from sparse_lm.model import plans
from sparse_lm.model.lm import LM
from sparse_lm.train.objective import observed

SHORT = {'validation': 'val'}  # what tables call a split


@dataclasses.dataclass(frozen=True)
class Loss(Evaluation):
  """The mean loss over each prediction of a split.

  With 'val' standing for the split, it gives `val_loss` in nats per token; `val_bits_per_byte`, where
  bytes are known; `val_loss/<name>` of each component of a mixture; and `val/<name>` of what modules
  observed, averaged over the full batches.
  """

  def run(self, model: EvalModel, data: EvalData) -> Values:
    """See the class. Raises UserError where the split has no prediction."""
    sums, step = _Sums(data), eval_step(model.model)
    for name, tokens_BxL1, weight_BxL in data.passes():
      summed, seen = jax.device_get(step(model.variables, tokens_BxL1, weight_BxL))
      sums.add(name, weight_BxL, summed, seen)
    return sums.values()


def run_packed(model: LM, variables: Tree, data: EvalData) -> list[Values]:
  """`Loss.run` for N models at once: each batch is read once for all of them.

  Args:
    variables: all collections, with a leading axis of N models.
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
    """Adds a batch of the component `name` and what `eval_step` found on it."""
    self._nats[name] += float(summed)
    self._tokens[name] += float(weight_BxL.sum())
    # Padding is no text: gates that saw any count only where there is nothing else.
    (self._full if weight_BxL.all() else self._partly).append(scalars(seen))

  def values(self) -> Values:
    """The numbers that `Loss` gives for all batches so far."""
    nats, tokens, data = self._nats, self._tokens, self._data
    split = SHORT.get(data.split, data.split)
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
  """The numbers that tables hold, and what modules observed on a split, by their names for it."""
  prefix = f'{SHORT.get(split, split)}/'
  seen = {name.removeprefix(prefix): x for name, x in values.items() if name.startswith(prefix)}
  return {name: x for name, x in values.items() if not name.startswith(prefix)}, seen


@functools.lru_cache(maxsize=16)
def eval_step(model: LM) -> Wrapped:
  """Compiled `(variables, tokens_BxL+1, weight_BxL) -> (summed nats, observations)`, float32."""
  return jax.jit(_of_batch(model))


@functools.cache  # as `train.packed.packed`
def packed_eval_step(model: LM) -> AotFunction:
  """`eval_step` over the leading axis of the variables; all models read the same batch."""
  return AotFunction(jax.vmap(_of_batch(model), in_axes=(0, None, None)))


def packed_call(model: LM, variables: Tree, batch: int) -> Call:
  """The evaluation step of `run_packed`, with the shapes of its arguments, so that it can be compiled.

  Args:
    variables: arrays or shape structs, with a leading axis of models.
    batch: sequences in a batch.
  """
  context = model.spec.context
  tokens_BxL1 = jax.ShapeDtypeStruct((batch, context + 1), np.int32)
  weight_BxL = jax.ShapeDtypeStruct((batch, context), np.float32)
  return Call(packed_eval_step(model), (variables, tokens_BxL1, weight_BxL))


def _of_batch(
  model: LM,
) -> Callable[[Tree, jax.Array, jax.Array], tuple[jax.Array, dict[str, jax.Array]]]:
  """The function that `eval_step` compiles."""

  def run(
    variables: Tree, tokens_BxL1: jax.Array, weight_BxL: jax.Array
  ) -> tuple[jax.Array, dict[str, jax.Array]]:
    predicted, sown = model.apply(
      variables, tokens_BxL1[:, :-1], mode='eval', readout=True, mutable=SOWN
    )
    _, losses = cross_entropy(predicted, tokens_BxL1[:, 1:])
    return jnp.sum(losses.nats * weight_BxL), observed(
      plans.ledger(model, model.spec.context), sown
    )

  return run
