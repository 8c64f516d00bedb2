"""How much time do mask selection and the input pipeline take, beside a reference?

The references are `jnp.sort` for selecting 10 % of a matrix of 768 x 3072 weights, `jax.lax.top_k` for
selecting 8 % of each row of a matrix of 2048 x 1024 weights, and a training step for the input pipeline
that feeds it. A component and its reference are timed in turns.
"""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from experiments.sweep import Run
from sparse_lm.core.records import JsonObject
from sparse_lm.core.tree import Tree
from sparse_lm.data.pipeline import train_iterator
from sparse_lm.kernels.topk import topk_mask, topk_rows
from sparse_lm.measure import turns
from sparse_lm.report import results, table
from sparse_lm.runs import configs, runtime
from sparse_lm.runs.arithmetic import resolved
from sparse_lm.runs.build import build
from sparse_lm.runs.environment import environment

CONFIG = 'configs/base.py'
VOCAB = 256
REPEATS = 15
SHAPE = (768, 3072)
BATCHES = 50  # batches of the input pipeline in a turn, because one is too short to time


def runs() -> list[Run]:
  """One run for each component."""
  return [
    Run(CONFIG, {}, {'component': 'mask update of 768 x 3072', 'reference': 'jnp.sort'}, execute),
    Run(
      CONFIG,
      {},
      {'component': 'top 82 of each row, 2048 x 1024', 'reference': 'jax.lax.top_k'},
      execute,
    ),
    Run(
      CONFIG, {}, {'component': 'input pipeline, per batch', 'reference': 'training step'}, execute
    ),
  ]


def execute(run: Run, workdir: pathlib.Path) -> JsonObject:
  """Times a component in turns with its reference."""
  runtime.prepare()
  config = resolved(configs.load(run.config, run.overrides))
  seconds = MEASURES[run.labels['reference']](config)
  metrics = {
    'ms': 1e3 * float(np.median(seconds['component'])),
    'reference_ms': 1e3 * float(np.median(seconds['reference'])),
    **turns.ratio(seconds['reference'], seconds['component']),
  }
  return {'metrics': metrics, 'config': configs.to_json(config), 'env': environment()}


def _selection(config: ConfigDict) -> dict[str, np.ndarray]:
  scores = jnp.abs(jax.random.normal(jax.random.key(0), SHAPE))
  k = jnp.int32(scores.size // 10)

  def by_sorting(scores: jax.Array, k: jax.Array) -> jax.Array:
    return scores >= jnp.sort(scores.ravel())[scores.size - k]

  select, sort = jax.jit(topk_mask), jax.jit(by_sorting)
  calls = {'component': lambda: select(scores, k), 'reference': lambda: sort(scores, k)}
  return turns.interleaved(calls, REPEATS, 'mask update')


def _rows(config: ConfigDict) -> dict[str, np.ndarray]:
  scores, k = jax.random.normal(jax.random.key(0), (2048, 1024)), 82
  select = jax.jit(lambda scores: topk_rows(scores, k))
  top_k = jax.jit(lambda scores: jax.lax.top_k(scores, k))
  calls = {'component': lambda: select(scores), 'reference': lambda: top_k(scores)}
  return turns.interleaved(calls, REPEATS, 'rows')


def _pipeline(config: ConfigDict) -> dict[str, np.ndarray]:
  tokens = np.random.default_rng(0).integers(0, VOCAB, 10_000_000).astype(np.uint8)
  batches = train_iterator(tokens, context=config.data.context, batch=config.data.batch, seed=0)
  program, target = build(config, VOCAB)
  state, batch = program.init(0, target), next(batches)

  def step() -> Tree:
    nonlocal state
    state, metrics = program.train_step(state, batch)
    return metrics

  calls = {'component': lambda: [next(batches) for _ in range(BATCHES)], 'reference': step}
  seconds = turns.interleaved(calls, REPEATS, 'input pipeline')
  return seconds | {'component': seconds['component'] / BATCHES}


MEASURES = {'jnp.sort': _selection, 'jax.lax.top_k': _rows, 'training step': _pipeline}


def report(lines: list[results.Line], folder: pathlib.Path) -> str:
  """Writes the table of times and ratios."""
  columns = [
    table.Column('ms', 'component', '.2f', 'ms'),
    table.Column('reference_ms', 'reference', '.1f', 'ms'),
    *table.ratio('ratio', 'reference / component', '.1f'),
  ]
  frame = table.summarise(lines, ['component', 'reference'], columns)
  caption = (
    f'Components of a training step, each timed in turns with a reference; medians of {REPEATS} turns, '
    'with quartiles of the ratio over the turns'
  )
  return table.write(frame, folder, caption, 'python -m experiments.run component_speed')
