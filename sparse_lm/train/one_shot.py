"""One-shot pruning of a trained model, layer by layer; each layer sees the outputs of pruned layers."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from sparse_lm.core import rng, tree
from sparse_lm.core.errors import UserError
from sparse_lm.core.tree import Tree
from sparse_lm.kernels.cross_entropy import cross_entropy
from sparse_lm.model.lm import LM
from sparse_lm.signals import from_calibration, from_training
from sparse_lm.train import layerwise
from sparse_lm.train.layerwise import InMemory, Layers, Parts, of_part
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
  run = Pruning(program.model, method, target, model_state, in_batches(tokens_NxL, batch), seed)
  trainable, sparse = method.init(rng.stream(seed, 'masks'), params, target)
  gradients = {
    name: _gradient_signals(run, part, params, parts.own(method, name, target))
    for name, part in method.parts.items()
  }
  calibrated = run.calibrated  # the other parts prune all layers at once
  if at_once := tuple(name for name in method.parts if name not in calibrated):
    signals = {name: gradients[name] for name in at_once}
    change = run.updated(at_once, trainable, sparse, signals)
    trainable, sparse = change.trainable, change.sparse
  if not calibrated:
    return trainable, sparse
  model = InMemory(trainable['params'], sparse.masks)
  run.prune_layers(model, calibrated, gradients)
  return trainable | {'params': model.params}, sparse.replace(masks=model.masks)


def check_layerwise(method: WeightMethod) -> None:
  """Raises UserError unless the method can prune a model that is read one layer at a time."""
  for name, part in method.parts.items():
    field = f'config.weight.rules.{name}' if name else 'config.weight'
    gradients = bool(from_training(part.traits.needs))
    if gradients or part.units.spans_layers:
      what = 'reads gradients of the whole model' if gradients else 'ranks units of several layers'
      raise UserError(
        f'{field}: {type(part).__name__} {what}, but the weights of this workdir are read one layer at a '
        'time; valid: a method that reads weights and inputs alone, with a pattern whose units each '
        'belong to one layer'
      )


def in_batches(tokens_NxL: np.ndarray, batch: int) -> list[np.ndarray]:
  """Splits sequences into batches."""
  return [tokens_NxL[i : i + batch] for i in range(0, len(tokens_NxL), batch)]


@dataclasses.dataclass(frozen=True)
class Pruning:
  """One-shot pruning of a model.

  Attributes:
    model: the model.
    method: its weight method, which prunes trained models.
    target: final densities, `None` = dense.
    model_state: the model's collections besides the parameters.
    batches: calibration tokens, int32 `[B, L]` each.
    seed: seed of the run.
  """

  model: LM
  method: WeightMethod
  target: Tree
  model_state: Tree
  batches: list[np.ndarray]
  seed: int

  @functools.cached_property
  def needs(self) -> dict[str, tuple[str, ...]]:
    """The signals that each part of the method reads from calibration text."""
    return {
      name: tuple(from_calibration(part.traits.needs)) for name, part in self.method.parts.items()
    }

  @property
  def calibrated(self) -> tuple[str, ...]:
    """The parts of the method that read calibration text."""
    return tuple(name for name, needs in self.needs.items() if needs)

  def check_reached(self) -> None:
    """Raises UserError if a parameter gets no signal that its part of the method reads from text."""
    for name in self.calibrated:
      layers = Layers(self.model, self.needs[name], self.model_state)
      layers.check_reached(parts.own(self.method, name, self.target))

  def updated(
    self,
    names: tuple[str, ...],
    trainable: Tree,
    sparse: Sparse,
    signals: dict[str, dict[str, Tree]],
  ) -> MaskUpdate:
    """Returns the last update of these parts. Raises Diverged if a score is NaN or infinite."""
    step, key = jnp.int32(self.method.total_steps), rng.stream(self.seed, 'steps')
    change = self.method.update_parts(names, trainable, sparse, signals, step, key)
    checks.raise_for(self.method, jax.device_get(change.non_finite), 'on the calibration text')
    return change

  def prune_layers(
    self, model: Parts, names: tuple[str, ...], gradients: dict[str, dict[str, Tree]]
  ) -> None:
    """Prunes a model layer by layer with these parts of the method.

    Each layer is written as soon as it is pruned. Layers that an earlier process pruned are run, but not
    pruned again.

    Args:
      model: the weights.
      names: the parts of the method.
      gradients: signals from gradients by part, for all layers.
    """
    every = tuple(dict.fromkeys(need for name in names for need in self.needs[name]))
    layers = Layers(self.model, every, self.model_state)
    self.check_reached()
    outside = model.pruned(None)
    if outside is None:
      free = tuple(name for name in names if not self.needs[name])
      outside, masks = self._prune_part(None, *model.read(None), free, {name: {} for name in free})
      model.write(None, outside, masks)
    stream = layers.embed(outside, self.batches) if every else []
    del outside
    numbers = range(self.model.spec.layers)
    for layer in tqdm(numbers, 'pruning', unit='layer', dynamic_ncols=True, disable=None):
      params = model.pruned(layer)
      if params is None:
        before, masks = model.read(layer)
        sums, counts = layers.sums(layer, before, stream) if every else ({}, {})
        signals = {name: self._signals(name, layer, sums, counts, gradients) for name in names}
        params, masks = self._prune_part(layer, before, masks, names, signals)
        model.write(layer, params, masks)
      if every and layer < numbers[-1]:
        layers.run(layer, params, stream)

  def _signals(
    self,
    name: str,
    layer: int,
    sums: dict[str, dict[str, Array]],
    counts: dict[str, Array],
    gradients: dict[str, dict[str, Tree]],
  ) -> dict[str, Tree]:
    """Returns the signals of a layer for one part of the method: trees like the layer's parameters."""
    target = of_part(parts.own(self.method, name, self.target), layer)
    own = {need: sums[need] for need in self.needs[name]}
    found = layerwise.means(own, counts, target)
    reached = [path for path in tree.named(target) if path in counts]
    slopes = {
      need: tree.only(reached, of_part(signal, layer)) for need, signal in gradients[name].items()
    }
    return found | slopes

  def _prune_part(
    self,
    part: int | None,
    params: Tree,
    masks: Tree,
    names: tuple[str, ...],
    signals: dict[str, dict[str, Tree]],
  ) -> tuple[Tree, Tree]:
    """Prunes a part of the model; returns its parameters and masks.

    Args:
      part: number of the layer, or `None`.
      params: the part's parameters.
      masks: masks that other parts of the method have chosen already.
      names: the parts of the method that prune now.
      signals: their signals.
    """
    target = of_part(self.target, part)
    trainable, sparse = self.method.init(rng.stream(self.seed, 'masks'), params, target)
    sparse = sparse.replace(masks=tree.merge(sparse.masks, masks))
    if names:
      change = self.updated(names, trainable, sparse, signals)
      trainable, sparse = change.trainable, change.sparse
    return trainable['params'], sparse.masks


def _gradient_signals(
  run: Pruning, method: WeightMethod, params: Tree, target: Tree
) -> dict[str, Tree]:
  """Returns the signals of a method that come from gradients, as means over the batches.

  The gradient is that of the mean loss per token, in nats, with the model in evaluation mode.
  """
  names = from_training(method.traits.needs)
  if not names:
    return {}

  def nats(params: Tree, tokens_BxL: Array) -> Array:
    variables = {'params': params, **run.model_state}
    predicted = run.model.apply(variables, tokens_BxL[:, :-1], mode='eval', readout=True)
    return cross_entropy(predicted, tokens_BxL[:, 1:])[0]

  @jax.jit
  def add(collected: Collected, params: Tree, tokens_BxL: Array) -> Collected:
    return collect.add(collected, Gradients(params, jax.grad(nats)(params, tokens_BxL)))

  collected = collect.start(names, params, target)
  for tokens_BxL in run.batches:
    collected = add(collected, params, tokens_BxL)
  return collect.means(collected)
