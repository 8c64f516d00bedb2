"""Cross-entropy on a split, and what gates and hidden units did on it."""

import collections
import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.stages import Wrapped

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
    nats, tokens = collections.Counter(), collections.Counter()
    full, partly = [], []
    step = eval_step(model.model)
    for name, tokens_BxL1, weight_BxL in data.passes():
      summed, seen = jax.device_get(step(model.variables, tokens_BxL1, weight_BxL))
      nats[name] += float(summed)
      tokens[name] += float(weight_BxL.sum())
      # Padding is no text: gates that saw any count only where there is nothing else.
      (full if weight_BxL.all() else partly).append(scalars(seen))
    split = SHORT.get(data.split, data.split)
    loss = nats.total() / tokens.total()
    values: Values = {f'{split}_loss': loss}
    if data.bytes_per_token:
      values[f'{split}_bits_per_byte'] = loss / math.log(2) / data.bytes_per_token
    values |= {f'{split}_loss/{name}': nats[name] / tokens[name] for name in nats if name}
    counted = full or partly
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

  return jax.jit(run)
