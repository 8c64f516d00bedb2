"""One-shot pruning of a trained model, layer by layer; each layer sees the outputs of pruned layers."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from sparse_lm.core import rng, tree
from sparse_lm.core.errors import UserError
from sparse_lm.core.paths import Part, Place
from sparse_lm.core.tree import Tree
from sparse_lm.kernels.cross_entropy import cross_entropy
from sparse_lm.layers.embed import Embed
from sparse_lm.model.lm import LM, Layer
from sparse_lm.model.plans import plan_of
from sparse_lm.plan import sites
from sparse_lm.signals import from_calibration, from_training
from sparse_lm.train.step import Program
from sparse_lm.weights import checks, collect, parts
from sparse_lm.weights.collect import Collected, Gradients
from sparse_lm.weights.method import MaskUpdate, Sparse, WeightMethod

Array = jax.Array


def prune(
  program: Program,
  params: Tree,
  model_state: Tree,
  target: Tree,
  tokens_NxL: np.ndarray,
  batch: int,
  seed: int,
) -> tuple[Tree, Sparse]:
  """Prunes a trained model to its target with a one-shot method; returns the trainable tree and masks.

  Args:
    program: the program, whose weight method prunes trained models.
    params, model_state: parameters and other collections of the trained model.
    target: final densities; `None` for dense leaves.
    tokens_NxL: int32 calibration sequences; not read if the method needs no signals.
    batch: number of sequences that run together. Only the signals of one layer are in memory at a time.
    seed: seed of the run.

  Raises:
    UserError: a kernel gets no signal (raised before pruning), all calibration tokens skip a layer, or a
      score is NaN or infinite.
  """
  method = program.method
  own = {name: parts.own(method, name, target) for name in method.parts}
  batches = [tokens_NxL[i : i + batch] for i in range(0, len(tokens_NxL), batch)]
  update = functools.partial(_updated, method, rng.stream(seed, 'steps'))
  trainable, sparse = method.init(rng.stream(seed, 'masks'), params, target)
  gradients = {
    name: _gradient_signals(program, part, params, model_state, own[name], batches)
    for name, part in method.parts.items()
  }
  needs = {name: tuple(from_calibration(part.traits.needs)) for name, part in method.parts.items()}
  layerwise = tuple(name for name in needs if needs[name])  # other parts prune all layers at once
  if at_once := tuple(name for name in needs if not needs[name]):
    change = update(at_once, trainable, sparse, {name: gradients[name] for name in at_once})
    trainable, sparse = change.trainable, change.sparse
  if not layerwise:
    return trainable, sparse
  every = tuple(dict.fromkeys(need for name in layerwise for need in needs[name]))
  layers = _Layers(program.model, every, model_state)
  for name in layerwise:
    layers.check_reached(own[name])
  stream = layers.embed(params, batches)
  numbers = range(program.model.spec.layers)
  for layer in tqdm(numbers, 'pruning', unit='layer', dynamic_ncols=True, disable=None):
    sums, counts = layers.sums(layer, trainable['params'], stream)
    signals = {
      name: _of_layer(
        {need: sums[need] for need in needs[name]}, counts, gradients[name], own[name]
      )
      for name in layerwise
    }
    change = update(layerwise, trainable, sparse, signals)
    trainable, sparse = change.trainable, change.sparse
    stream = layers.run(layer, trainable['params'], stream)
  return trainable, sparse


def calibration(tokens: np.ndarray, segments: int, context: int, seed: int) -> np.ndarray:
  """Draws `segments` disjoint sequences of `context` tokens, int32.

  Raises:
    UserError: the text is too short.
  """
  room = len(tokens) // context
  if not 1 <= segments <= room:
    raise UserError(
      f'--segments={segments}: the training split has only {len(tokens)} tokens, too few for this many '
      f'sequences of {context} tokens; valid: 1 to {room}'
    )
  places = np.random.default_rng(seed).choice(room, segments, replace=False)
  return np.stack([tokens[p * context : (p + 1) * context] for p in places]).astype(np.int32)


def _updated(
  method: WeightMethod,
  key: Array,
  names: tuple[str, ...],
  trainable: Tree,
  sparse: Sparse,
  signals: dict[str, dict[str, Tree]],
) -> MaskUpdate:
  """Returns the last update of these parts. Raises Diverged if a score is NaN or infinite."""
  step = jnp.int32(method.total_steps)
  change = method.update_parts(names, trainable, sparse, signals, step, key)
  checks.raise_for(method, jax.device_get(change.non_finite), 'on the calibration text')
  return change


def _gradient_signals(
  program: Program,
  method: WeightMethod,
  params: Tree,
  model_state: Tree,
  target: Tree,
  batches: list[np.ndarray],
) -> dict[str, Tree]:
  """Returns the signals of a method that come from gradients, as means over the batches.

  The gradient is that of the mean loss per token, in nats, with the model in evaluation mode.
  """
  names = from_training(method.traits.needs)
  if not names:
    return {}

  def nats(params: Tree, tokens_BxL: Array) -> Array:
    variables = {'params': params, **model_state}
    predicted = program.model.apply(variables, tokens_BxL[:, :-1], mode='eval', readout=True)
    return cross_entropy(predicted, tokens_BxL[:, 1:])[0]

  @jax.jit
  def add(collected: Collected, params: Tree, tokens_BxL: Array) -> Collected:
    return collect.add(collected, Gradients(params, jax.grad(nats)(params, tokens_BxL)))

  collected = collect.start(names, params, target)
  for tokens_BxL in batches:
    collected = add(collected, params, tokens_BxL)
  return collect.means(collected)


@dataclasses.dataclass(frozen=True)
class _Layers:
  """Runs a model layer by layer.

  Attributes:
    model: the model.
    needs: names of the signals that are computed from the inputs of kernels.
    model_state: the model's collections besides the parameters.
  """

  model: LM
  needs: tuple[str, ...]
  model_state: Tree

  def embed(self, params: Tree, batches: list[np.ndarray]) -> list[Array]:
    """Returns the inputs of the first layer for each batch, `[B, L, D]`."""
    embed = jax.jit(functools.partial(_embed, self.model))
    return [embed(params['embed'], tokens_BxL) for tokens_BxL in batches]

  @functools.cached_property
  def sites(self) -> dict[str, str]:
    """The site of each kernel's inputs, by the path of the kernel, for kernels in layers.

    Omits stacked matrices, and matrices whose inputs are not one row per token in order.
    """
    plan = plan_of(self.model)
    return {
      path: site.name
      for path, site in plan.inputs.items()
      if Place.parse(path).layer is not None
      and site.shape == (1, self.model.spec.context, *plan.shapes[path].shape[:-1])
    }

  def module(self, layer: int) -> Layer:
    """Returns the module of a layer."""
    return Layer(self.model.spec, self.model.slots, layer, self.model.site)

  def sums(
    self, layer: int, params: Tree, stream: list[Array]
  ) -> tuple[dict[str, dict[str, Array]], dict[str, Array]]:
    """Returns the result of `_signals` for a layer, summed over all batches of its inputs `stream`."""
    module, total = self.module(layer), None
    own = {path: name for path, name in self.sites.items() if Place.parse(path).layer == layer}
    gather = jax.jit(functools.partial(_signals, module, self.needs, own))
    for x_BxLxD in stream:
      sums = gather(_variables(module, params, self.model_state), x_BxLxD)
      total = sums if total is None else jax.tree.map(jnp.add, total, sums)
    return total

  def run(self, layer: int, params: Tree, stream: list[Array]) -> list[Array]:
    """Returns a layer's outputs for its inputs `stream`."""
    module = self.module(layer)
    apply = jax.jit(module.apply)
    return [apply(_variables(module, params, self.model_state), x_BxLxD) for x_BxLxD in stream]

  def check_reached(self, target: Tree) -> None:
    """Raises a UserError if a kernel with a target gets no signal."""
    missed = [path for path in tree.named(target) if path not in self.sites]
    if missed:
      raise UserError(
        f'this method gets no calibration signal for {missed[0]} ({len(missed)} such parameters); valid: '
        'keep them dense by config.weight.dense'
      )


def _embed(model: LM, params: Tree, tokens_BxL: Array) -> Array:
  positions_BxL = jnp.broadcast_to(jnp.arange(tokens_BxL.shape[1]), tokens_BxL.shape)
  return Embed(model.spec).apply({'params': params}, tokens_BxL, positions_BxL)


def _variables(module: Layer, params: Tree, model_state: Tree) -> dict[str, Tree]:
  """Returns the layer's part of each collection."""
  return {
    name: {key: value for key, value in tree_.items() if Place.parse(key).layer == module.layer}
    for name, tree_ in ({'params': params} | model_state).items()
  }


def _signals(
  module: Layer,
  needs: tuple[str, ...],
  sites_of: dict[str, str],
  variables: Tree,
  x_BxLxD: Array,
) -> tuple[dict[str, dict[str, Array]], dict[str, Array]]:
  """Returns the signals of each kernel, summed over the tokens that reach it, and the tokens' number.

  Both are dicts by the kernel's path; the signals have one dict per name.

  Kernels of the block are reached by the tokens that enter the layer, other kernels by all tokens. In
  evaluation, a layer also computes tokens that skip it and drops their outputs.
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
    need: {path: signal.of_inputs(x.astype(jnp.float32)) for path, x in rows.items()}
    for need, signal in from_calibration(needs).items()
  }
  return sums, counts


def _of_layer(
  sums: dict[str, dict[str, Array]],
  counts: dict[str, Array],
  gradients: dict[str, Tree],
  target: Tree,
) -> dict[str, Tree]:
  """Returns the signals of a layer's kernels: trees like the parameters, with `None` for other leaves.

  Args:
    sums: first result of `_signals` for the layer.
    counts: second result of `_signals`.
    gradients: signals from gradients, for all layers.
    target: target densities; leaves with a target are prunable.

  Raises:
    UserError: no token reached a kernel.
  """
  reached = [path for path in tree.named(target) if path in counts]
  missed = [path for path in reached if not int(counts[path])]
  if missed:
    raise UserError(
      f'all calibration tokens skip the layer of {missed[0]} ({len(missed)} such parameters); valid: '
      'more --segments, or keep them dense by config.weight.dense'
    )
  here = tree.only(reached, target)
  means = {
    need: tree.map_named(lambda path, _, found=found: found[path] / counts[path], here)
    for need, found in sums.items()
  }
  return means | {name: tree.only(reached, signal) for name, signal in gradients.items()}
