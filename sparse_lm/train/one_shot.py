"""Prunes a trained model layer by layer, each on what the pruned layers before it hand on."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from sparse_lm.core import rng, tree
from sparse_lm.core.errors import UserError
from sparse_lm.core.tree import Tree
from sparse_lm.layers.embed import Embed
from sparse_lm.model.lm import LM, Layer
from sparse_lm.train.step import Program
from sparse_lm.weights.method import Sparse

Array = jax.Array
# What a kernel `[in, out]` is pruned by, from the rows `[tokens, in]` that it reads: sums over tokens.
SIGNALS = {
  'x_sq': lambda x: jnp.sum(jnp.square(x), axis=0),
  'xtx': lambda x: x.T @ x,
}


def prune(
  program: Program,
  params: Tree,
  model_state: Tree,
  target: Tree,
  tokens_NxL: np.ndarray,
  batch: int,
  seed: int,
) -> tuple[Tree, Sparse]:
  """The trainable tree and masks of a one-shot method at its target.

  Args:
    program: its method prunes trained models.
    params, model_state: of the trained model.
    target: final densities, `None` = dense.
    tokens_NxL: int32 calibration sequences; not read by a method that needs no signals.
    batch: sequences that are run together; one Gram matrix per kernel of one layer is held at a time.

  Raises:
    UserError: a kernel with a target that no signal reaches, before anything is pruned; or a layer that
      all calibration tokens skip.
  """
  method, model = program.method, program.model
  trainable, sparse = method.init(rng.stream(seed, 'masks'), params, target)
  step, key = jnp.int32(method.total_steps), rng.stream(seed, 'steps')
  if not method.needs:
    change = method.update(trainable, sparse, {}, step, key)
    return change.trainable, change.sparse
  _check_reached(model, target, tokens_NxL.shape[1])
  embed = jax.jit(functools.partial(_embed, model))
  batches = [tokens_NxL[i : i + batch] for i in range(0, len(tokens_NxL), batch)]
  stream = [embed(params['embed'], tokens_BxL) for tokens_BxL in batches]
  layers = range(model.spec.layers)
  for layer in tqdm(layers, 'pruning', unit='layer', dynamic_ncols=True, disable=None):
    module = Layer(model.spec, model.slots, layer)
    run = jax.jit(lambda variables, x, module=module: module.apply(variables, x))
    gather = jax.jit(functools.partial(_signals, module, method.needs))
    total = None
    for x_BxLxD in stream:
      sums = gather(_variables(module, trainable['params'], model_state), x_BxLxD)
      total = sums if total is None else jax.tree.map(jnp.add, total, sums)
    signals = _means(*total, params, target)
    change = method.update(trainable, sparse, signals, step, key)
    trainable, sparse = change.trainable, change.sparse
    stream = [run(_variables(module, trainable['params'], model_state), x) for x in stream]
  return trainable, sparse


def calibration(tokens: np.ndarray, segments: int, context: int, seed: int) -> np.ndarray:
  """`segments` sequences of `context` tokens each, int32, from places of their own.

  Raises UserError where the text is too short for them.
  """
  room = len(tokens) // context
  if not 1 <= segments <= room:
    raise UserError(
      f'--segments={segments} sequences of {context} tokens: the training split has {len(tokens)} '
      f'tokens; valid: 1 to {room}'
    )
  places = np.random.default_rng(seed).choice(room, segments, replace=False)
  return np.stack([tokens[p * context : (p + 1) * context] for p in places]).astype(np.int32)


def _embed(model: LM, params: Tree, tokens_BxL: Array) -> Array:
  positions_BxL = jnp.broadcast_to(jnp.arange(tokens_BxL.shape[1]), tokens_BxL.shape)
  return Embed(model.spec).apply({'params': params}, tokens_BxL, positions_BxL)


def _variables(module: Layer, params: Tree, model_state: Tree) -> dict[str, Tree]:
  """The layer's part of each collection."""
  own = (f'block_{module.layer}', f'depth_{module.layer}')
  return {
    name: {key: variables[key] for key in own if key in variables}
    for name, variables in ({'params': params} | model_state).items()
  }


def _signals(
  module: Layer, needs: tuple[str, ...], variables: Tree, x_BxLxD: Array
) -> tuple[dict[str, dict[str, Array]], dict[str, Array]]:
  """For each need its sum over the tokens that reach a kernel, by its path; and how many those are.

  Kernels of the block are reached by the tokens that enter the layer, others of the layer by all.
  """
  _, seen = module.apply(variables, x_BxLxD, mutable=['intermediates'])
  noted = tree.named(seen['intermediates'])
  block = f'block_{module.layer}/'
  enters_BxL = noted[f'{block}entering']
  everyone_BxL = jnp.ones_like(enters_BxL)
  rows, counts = {}, {}
  for path, x in noted.items():
    if not path.endswith('/inputs'):
      continue
    kernel = path.removesuffix('inputs') + 'kernel'
    reaches_BxL = enters_BxL if path.startswith(block) else everyone_BxL
    rows[kernel] = jnp.where(reaches_BxL[..., None], x, 0).reshape(-1, x.shape[-1])
    counts[kernel] = jnp.sum(reaches_BxL, dtype=jnp.int32)
  sums = {
    need: {path: SIGNALS[need](x.astype(jnp.float32)) for path, x in rows.items()} for need in needs
  }
  return sums, counts


def _means(
  sums: dict[str, dict[str, Array]], counts: dict[str, Array], params: Tree, target: Tree
) -> dict[str, Tree]:
  """The signals of a layer: trees like `params`. Raises UserError where no token reached a kernel."""
  missed = [path for path in tree.named(target) if path in counts and not int(counts[path])]
  if missed:
    raise UserError(
      f'all calibration tokens skip the layer of {missed[0]} ({len(missed)} such parameters); valid: '
      'more --segments, or name them in config.weight.dense'
    )
  return {
    need: _like(params, {path: value / counts[path] for path, value in found.items()}, target)
    for need, found in sums.items()
  }


def _check_reached(model: LM, target: Tree, length: int) -> None:
  x = jax.ShapeDtypeStruct((1, length, model.spec.width), model.spec.compute)
  reached: set[str] = set()
  for layer in range(model.spec.layers):
    module = Layer(model.spec, model.slots, layer)
    variables = jax.eval_shape(module.init, jax.random.key(0), x)
    sums, _ = jax.eval_shape(functools.partial(_signals, module, ('x_sq',)), variables, x)
    reached |= sums['x_sq'].keys()
  missed = [path for path in tree.named(target) if path not in reached]
  if missed:
    raise UserError(
      f'no calibration text reaches {missed[0]} ({len(missed)} such parameters); valid: name them in '
      'config.weight.dense'
    )


def _like(params: Tree, found: dict[str, Any], target: Tree) -> Tree:
  """A tree like `params` with what was found for its prunable leaves, `None` elsewhere."""
  prunable = tree.named(target)
  return tree.map_named(lambda path, _: found.get(path) if path in prunable else None, params)
