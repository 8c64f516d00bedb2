"""Prunes a trained model layer by layer, each on what the pruned layers before it hand on."""

import functools
from collections.abc import Collection
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from sparse_lm.core import rng, tree
from sparse_lm.core.errors import UserError
from sparse_lm.core.paths import Part, Place
from sparse_lm.core.tree import Tree
from sparse_lm.layers.embed import Embed
from sparse_lm.model.lm import LM, Layer
from sparse_lm.model.plans import plan_of
from sparse_lm.plan import sites
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
  sites_of = _sites(model)
  _check_reached(sites_of, target)
  embed = jax.jit(functools.partial(_embed, model))
  batches = [tokens_NxL[i : i + batch] for i in range(0, len(tokens_NxL), batch)]
  stream = [embed(params['embed'], tokens_BxL) for tokens_BxL in batches]
  layers = range(model.spec.layers)
  for layer in tqdm(layers, 'pruning', unit='layer', dynamic_ncols=True, disable=None):
    module = Layer(model.spec, model.slots, layer)
    run = jax.jit(lambda variables, x, module=module: module.apply(variables, x))
    own = {path: name for path, name in sites_of.items() if Place.parse(path).layer == layer}
    gather = jax.jit(functools.partial(_signals, module, method.needs, own))
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
  return {
    name: {key: value for key, value in tree_.items() if Place.parse(key).layer == module.layer}
    for name, tree_ in ({'params': params} | model_state).items()
  }


def _sites(model: LM) -> dict[str, str]:
  """By the path of a kernel of a layer, the site of what it multiplies: a row for each token.

  Stacks of matrices are left out, and matrices that read rows in another order than the tokens'.
  """
  plan = plan_of(model)
  return {
    path: site.name
    for path, site in plan.inputs.items()
    if Place.parse(path).layer is not None
    and site.shape == (1, model.spec.context, *plan.shapes[path].shape[:-1])
  }


def _signals(
  module: Layer,
  needs: tuple[str, ...],
  sites_of: dict[str, str],
  variables: Tree,
  x_BxLxD: Array,
) -> tuple[dict[str, dict[str, Array]], dict[str, Array]]:
  """For each need its sum over the tokens that reach a kernel, by its path; and how many those are.

  Kernels of the block are reached by the tokens that enter the layer, others of the layer by all:
  evaluation runs a layer for the tokens that skip it too, and drops what it gives them.
  """
  enters = str(Place((Part.BLOCK.of(module.layer), 'valid')))
  names = [enters, *sites_of.values()]
  _, seen = sites.run(module, variables, x_BxLxD, read=names)
  everyone_BxL = jnp.ones_like(seen[enters])
  rows, counts = {}, {}
  for path, name in sites_of.items():
    reaches_BxL = seen[enters] if Place.parse(path).part is Part.BLOCK else everyone_BxL
    x = seen[name]
    rows[path] = jnp.where(reaches_BxL[..., None], x, 0).reshape(-1, x.shape[-1])
    counts[path] = jnp.sum(reaches_BxL, dtype=jnp.int32)
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


def _check_reached(reached: Collection[str], target: Tree) -> None:
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
