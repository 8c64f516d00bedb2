"""Evaluation, and the result of a run: what was measured, on what, and what it costs."""

import collections
import math
from typing import Any

import jax
import numpy as np

from sparse_lm.core.tree import Tree
from sparse_lm.data.pipeline import Data
from sparse_lm.evals import observe
from sparse_lm.model import lm
from sparse_lm.runs import configs
from sparse_lm.runs import cost_report as cost
from sparse_lm.runs.environment import environment
from sparse_lm.runs.setup import Setup
from sparse_lm.train.states import TrainState
from sparse_lm.train.work import Work


def evaluate(
  run: Setup, params: Tree, model_state: Tree, split: str = 'validation'
) -> tuple[float, dict[str, float]]:
  """Nats per token over the whole split, and what modules observed, averaged over its full batches."""
  loss, _, observed = _by_component(run, params, model_state, split)
  return loss, observed


def named_losses(
  run: Setup, params: Tree, model_state: Tree
) -> tuple[dict[str, float], dict[str, float]]:
  """Validation losses by the names that tables know them by, and what modules observed.

  'val_loss' in nats per token, 'val_bits_per_byte', and 'val_loss/<name>' of a mixture's components.
  """
  loss, components, observed = _by_component(run, params, model_state, 'validation')
  bytes_per_token = run.data.card['bytes_per_token']['validation']
  named = {'val_loss': loss, 'val_bits_per_byte': loss / math.log(2) / bytes_per_token}
  return named | {f'val_loss/{name}': value for name, value in components.items()}, observed


def result_of(
  run: Setup,
  state: TrainState,
  masks: Tree,
  measured: dict[str, float],
  observed: dict[str, float],
  work: Work,
) -> dict[str, Any]:
  """The contents of result.json."""
  spent = work.over(cost.tokens(run.config, int(state.step)))
  return {
    'config': configs.to_json(run.config),
    'env': environment(),
    'data': run.data.card,
    'evaluation': _cards(run.data),
    'causal': lm.causal(run.program.model),
    'batch_independent': lm.batch_independent(run.program.model),
    'metrics': {
      'steps': int(state.step),
      **measured,
      **cost.report(run.program, state.sparse.target, masks, observed, spent),
      **observe.summary(observed),
    },
  }


def scalars(metrics: dict[str, np.ndarray]) -> dict[str, float]:
  """Numbers by name; a vector's by `name/0`, `name/1`, ..."""
  found = {}
  for name, value in metrics.items():
    if np.ndim(value):
      found |= {f'{name}/{i}': float(item) for i, item in enumerate(value)}
    else:
      found[name] = float(value)
  return found


def _by_component(
  run: Setup, params: Tree, model_state: Tree, split: str
) -> tuple[float, dict[str, float], dict[str, float]]:
  """`evaluate` with, between its two, the nats per token of each component of a mixture by name."""
  nats, tokens = collections.Counter(), collections.Counter()
  observed, partly = [], []
  for name in run.data.components(split):
    for batch, weight in run.data.eval_batches(split, name):
      summed, seen = jax.device_get(run.program.eval_step(params, model_state, batch, weight))
      nats[name] += float(summed)
      tokens[name] += float(weight.sum())
      # Padding is no text: gates that saw any count only where there is nothing else.
      (observed if weight.all() else partly).append(scalars(seen))
  counted = observed or partly
  means = {name: float(np.mean([seen[name] for seen in counted])) for name in counted[0]}
  losses = {name: nats[name] / tokens[name] for name in nats if name}
  return nats.total() / tokens.total(), losses, means


def _cards(data: Data) -> dict[str, dict[str, Any]]:
  """By name of an evaluated number, what it is a number of."""
  whole = data.evaluation()
  return {
    'val_loss': whole,
    'val_bits_per_byte': whole | {'unit': 'bits per byte'},
    **{f'val_loss/{name}': data.evaluation(component=name) for name in data.components() if name},
  }
