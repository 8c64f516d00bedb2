"""How much faster than their dense twins are packed models of 113 M parameters?

The models have 16 layers of width 768, context 256, float32, and bytes as tokens. Weights are random,
and masks and gates keep the fraction that the row names, which is enough for timing. Decoding uses
batch 1, prefill batch 2. Experts are timed beside a dense model of equal active parameters. In rows
that select neurons, the MLPs of all layers are also timed alone, for one token.

Blocks that are drawn at random leave some neurons and heads without any weight, and packing removes
these. At 90 % sparsity every mask of 128 × 128 tiles does so: a matrix of 768 x 3072 weights keeps 14
tiles, which cannot reach all of its 24 columns of tiles. So rows of equal sparsity differ in the
weights that remain after packing, and the table has a column for them.
"""

import functools
import math
import pathlib
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from experiments.sweep import FLOAT32, Overrides, Run
from sparse_lm.core import tree
from sparse_lm.core.paths import Part, Place
from sparse_lm.core.records import JsonObject
from sparse_lm.core.tree import Tree
from sparse_lm.core.units import kept_count
from sparse_lm.evals import EvalData, EvalModel
from sparse_lm.evals.speed import Speed
from sparse_lm.inference.pack import PackedModel, dense_twin, pack
from sparse_lm.measure import turns
from sparse_lm.model import lm
from sparse_lm.model.plans import plan_of
from sparse_lm.model.slots import SlotConfig
from sparse_lm.patterns import pattern
from sparse_lm.report import categories, plot, results, table
from sparse_lm.runs import configs, runtime
from sparse_lm.runs.environment import environment
from sparse_lm.weights.method import apply_masks

CONFIG = 'configs/base.py'
SIZE = {
  'data.context': 256,
  'model.layers': 16,
  'model.width': 768,
  'model.hidden': 3072,
  'model.heads': 12,
  'model.kv_heads': 12,
}
VOCAB, PREFILLED = 256, 2
REPEATS = {'prefill': 7, 'decode': 15}
PREDICTOR = {'mlp.name': 'predictor_topk', 'mlp.density': 0.1}
EXPERTS = {'mlp.name': 'moe_topk', 'mlp.experts': 16, 'mlp.k': 2, 'mlp.hidden': 768}
HALF_DEPTH = {'depth.name': 'mixture_of_depths', 'depth.layers': '1::2'}
ACTIVE = {'model.hidden': 2 * 768}  # as many hidden units as two experts have
# By row: overrides, patterns of the masks, density, and the overrides of the dense model beside which the
# row is timed (None = the dense twin).
ROWS: dict[str, tuple[Overrides, tuple[str, ...], float, Overrides | None]] = {
  'dense': ({}, (), 1.0, None),
  'shrink: half of the neurons and heads': ({}, ('neuron', 'head'), 0.5, None),
  'blocks of 32, 90 %': ({}, ('block:32',), 0.1, None),
  'blocks of 64, 90 %': ({}, ('block:64',), 0.1, None),
  'blocks of 128, 90 %': ({}, ('block:128',), 0.1, None),
  'blocks of 64, 75 %': ({}, ('block:64',), 0.25, None),
  'predictor, 10 % of the neurons': (PREDICTOR, (), 1.0, None),
  'predictor that reads a quarter of the inputs, 10 %': (
    PREDICTOR | {'mlp.split': 0.25},
    (),
    1.0,
    None,
  ),
  'exact top-k, 10 % of the neurons': (
    {'activation.name': 'topk', 'activation.density': 0.1},
    (),
    1.0,
    None,
  ),
  '2 of 16 experts, 4 layers': (
    EXPERTS | {'model.layers': 4},
    (),
    1.0,
    ACTIVE | {'model.layers': 4},
  ),
  'mixture of depths, 12.5 % of every second layer': (HALF_DEPTH, (), 1.0, None),
}


def runs() -> list[Run]:
  """One run for each row."""
  return [
    Run(CONFIG, SIZE | overrides, {'model': name}, execute)
    for name, (overrides, *_) in ROWS.items()
  ]


def execute(run: Run, workdir: pathlib.Path) -> JsonObject:
  """Packs a model with random weights and times it."""
  runtime.prepare()
  config = configs.load(run.config, run.overrides | FLOAT32)
  model = lm.from_config(config, VOCAB)
  _, patterns, density, beside = ROWS[run.labels['model']]
  packed = _packed(model, patterns, density)
  twin = dense_twin(model)
  if beside is not None:
    twin = dense_twin(lm.from_config(configs.load(run.config, SIZE | beside | FLOAT32), VOCAB))
  metrics: JsonObject = {}
  for what, batch in (('prefill', PREFILLED), ('decode', 1)):
    text = np.random.default_rng(0).integers(0, VOCAB, batch * config.data.context)
    data = EvalData(text, config.data.context, batch)
    metrics |= Speed(REPEATS[what], (what,)).run(EvalModel.of_packed(packed, twin), data)
  if beside is None and _neurons(model) != _neurons(twin.model):
    metrics |= _mlps_alone(packed, twin)
  metrics['params'] = sum(math.prod(a.shape) for a in jax.tree.leaves(plan_of(model).params))
  return {'metrics': metrics, 'config': configs.to_json(config), 'env': environment()}


def _neurons(model: lm.LM) -> list[SlotConfig]:
  """The slots that decide which neurons run."""
  return [slot for slot in model.slots if slot.slot in ('activation', 'mlp')]


def _mlps_alone(packed: PackedModel, twin: PackedModel) -> dict[str, float]:
  """The speed-up of the MLPs of all layers, for one token."""
  calls = {'packed': _mlps(packed), 'dense': _mlps(twin)}
  seconds = turns.interleaved(calls, REPEATS['decode'])
  ratio = turns.ratio(seconds['dense'], seconds['packed'])
  return {key.replace('ratio', 'mlp_speedup'): value for key, value in ratio.items()}


def _mlps(packed: PackedModel) -> Callable[[], jax.Array]:
  spec, count = packed.model.spec, packed.model.spec.layers
  slots = {slot.slot: slot for slot in packed.model.slots}

  def run(variables: Tree, x: jax.Array) -> jax.Array:
    for layer in range(count):
      block = Part.BLOCK.of(layer)
      activation = functools.partial(slots['activation'].at(layer, count).make, {'spec': spec})
      mlp = slots['mlp'].at(layer, count).make({'spec': spec, 'activation': activation})
      own = {
        name: held[block]['mlp'] for name, held in variables.items() if 'mlp' in held.get(block, {})
      }
      x = x + mlp.apply(own, x * jax.lax.rsqrt(jnp.mean(jnp.square(x))), mode='decode')
    return x

  token = np.random.default_rng(0).standard_normal((1, 1, spec.width), np.float32)
  return functools.partial(jax.jit(run), packed.variables, jnp.asarray(token))


def _packed(model: lm.LM, patterns: tuple[str, ...], density: float) -> PackedModel:
  draw = np.random.default_rng(0)
  shapes = plan_of(model).params
  params = tree.map_named(functools.partial(_random, draw), shapes)
  masks: dict[str, np.ndarray] = {}
  for name in patterns:
    masks |= _masks(model, name, density, draw)
  masks_tree = tree.map_named(lambda path, w: masks.get(path), params)
  return pack(model, jax.device_get(apply_masks(params, masks_tree)), masks_tree, {})


def _random(draw: np.random.Generator, path: str, leaf: jax.ShapeDtypeStruct) -> np.ndarray:
  if path.endswith('scale'):
    return np.ones(leaf.shape, np.float32)
  if 'router_predictor' in path:
    # For inputs of unit mean square the logits are normal, so an eighth of them exceeds 1.15.
    width = leaf.shape[0]
    return (
      np.full(1, -1.15, 'f')
      if leaf.ndim == 1
      else draw.normal(0, width**-0.5, leaf.shape).astype('f')
    )
  return 0.02 * draw.standard_normal(leaf.shape, np.float32)


def _masks(
  model: lm.LM, name: str, density: float, draw: np.random.Generator
) -> dict[str, np.ndarray]:
  """Masks that keep random units of every kernel in the layers, a fraction `density` of each group."""
  units = pattern(name, plan_of(model).units)
  covered = tree.map_named(
    lambda path, w: (
      w
      if Place.parse(path).part is Part.BLOCK and w.ndim == 2 and units.covers(path, w.shape)
      else None
    ),
    plan_of(model).params,
  )
  pooled = jax.eval_shape(units.pool, covered)
  chosen = {}
  for unit, shape in pooled.items():
    order = draw.permutation(math.prod(shape.shape)).reshape(shape.shape)
    chosen[unit] = jnp.asarray(order < int(kept_count(order.size, density)))
  return {
    path: np.asarray(mask) for path, mask in tree.named(units.expand(chosen, covered)).items()
  }


def _beside(model: str) -> str:
  return 'its dense twin' if ROWS[model][-1] is None else 'a dense model of equal active parameters'


def report(lines: list[results.Line], folder: pathlib.Path) -> str:
  """Writes the table, and a bar chart of the speed-ups in decoding."""
  columns = [
    table.Column('decode_ms', 'decode', '.2f', 'ms/token'),
    *table.speedup('decode_speedup', 'decode'),
    *table.speedup('mlp_speedup', 'MLPs alone', 'MLPs'),
    *table.speedup('prefill_speedup', 'prefill'),
    table.Column('kept_weights', 'kernel weights after packing', '.2f', '%', 100),
    table.Column('weights_bytes', 'size of the weights', ',.0f', 'MB', 1e-6),
    table.Column('read_bytes', 'memory read', ',.0f', 'MB/token', 1e-6),
    table.Column('bandwidth', 'bandwidth used / peak', '.2f', '×'),
    table.Column('memory_bandwidth', 'peak bandwidth', '.1f', 'GB/s', 1e-9),
    table.Column('peak_memory', 'peak memory', ',.0f', 'MB', 1e-6),
    table.Column('params', 'parameters', ',.0f', 'M', 1e-6),
  ]
  frame = table.summarise(lines, ['model'], columns)
  caption = (
    'Packed models beside their dense twins (experts beside a dense model of equal active '
    f'parameters): float32, context 256, decoding with batch 1, prefill with batch {PREFILLED}. Times '
    f'are medians of {REPEATS["decode"]} turns (decoding) and {REPEATS["prefill"]} turns (prefill), '
    'with quartiles over the turns. Random tiles leave some neurons and heads without any weight, '
    'larger tiles more of them, and packing removes these. The peak bandwidth is measured beside each '
    'row'
  )
  ratio = table.Column('decode_speedup', 'decode: dense time / packed time', unit='×')
  shown = [
    line | {'labels': line['labels'] | {'compared with': _beside(line['labels']['model'])}}
    for line in lines
  ]
  figure = categories.bars(
    shown, 'model', ratio, 'decode_speedup_low', 'decode_speedup_high', 'compared with'
  )
  plot.save(figure, folder, 'packed_speed')
  return table.write(frame, folder, caption, 'python -m experiments.run packed_speed')
