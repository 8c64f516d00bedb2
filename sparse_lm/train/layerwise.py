"""Runs a model layer by layer on calibration text, with one layer's weights in memory at a time.

A *part* of a model is the number of a layer, or `None` for the parameters outside the layers.
"""

import dataclasses
import functools
from collections.abc import Iterable
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.stages import Wrapped

from sparse_lm.core import tree
from sparse_lm.core.errors import UserError
from sparse_lm.core.paths import Part, Place
from sparse_lm.core.tree import Tree
from sparse_lm.layers.embed import Embed
from sparse_lm.model.lm import LM, Layer
from sparse_lm.model.plans import plan_of
from sparse_lm.plan import sites
from sparse_lm.signals import from_calibration

Array = jax.Array


class Parts(Protocol):
  """The weights of a model, part by part."""

  def read(self, part: int | None) -> tuple[Tree, Tree]:
    """Returns the subtree of the parameters of a part, and the masks so far, `None` = dense."""

  def pruned(self, part: int | None) -> Tree | None:
    """Returns the parameters of a part that an earlier process pruned, or `None`."""

  def write(self, part: int | None, params: Tree, masks: Tree) -> None:
    """Keeps the pruned parameters of a part, and their masks."""


def calibration(
  tokens: np.ndarray, segments: int, context: int, seed: int, field: str = '--segments'
) -> np.ndarray:
  """Draws `segments` disjoint sequences of `context` tokens, int32.

  Raises:
    UserError: the text is too short; the message names `field`.
  """
  room = len(tokens) // context
  if not 1 <= segments <= room:
    raise UserError(
      f'{field}={segments}: the training split has only {len(tokens)} tokens, too few for this many '
      f'sequences of {context} tokens; valid: 1 to {room}'
    )
  places = np.random.default_rng(seed).choice(room, segments, replace=False)
  return np.stack([tokens[p * context : (p + 1) * context] for p in places]).astype(np.int32)


def of_part(values: Tree, part: int | None) -> Tree:
  """Returns the part's entries of a tree like the parameters of a whole model."""
  return {key: value for key, value in values.items() if Place.parse(key).layer == part}


@dataclasses.dataclass
class InMemory:
  """The parts of a model that is in memory.

  Attributes:
    params: all parameters; those of pruned parts are replaced.
    masks: all masks, `None` = dense.
  """

  params: Tree
  masks: Tree

  def read(self, part: int | None) -> tuple[Tree, Tree]:
    """Returns the parameters and masks of a part."""
    return of_part(self.params, part), of_part(self.masks, part)

  def pruned(self, part: int | None) -> Tree | None:
    """`None`: no earlier process has pruned anything."""
    return None

  def write(self, part: int | None, params: Tree, masks: Tree) -> None:
    """Replaces the parameters and masks of a part."""
    self.params, self.masks = self.params | params, self.masks | masks


@dataclasses.dataclass(frozen=True)
class Layers:
  """Runs the layers of a model one by one. Equal layers share their compiled programs.

  Attributes:
    model: the model.
    needs: names of the signals that are computed from the inputs of kernels.
    model_state: the model's collections besides the parameters.
  """

  model: LM
  needs: tuple[str, ...]
  model_state: Tree

  def embed(self, params: Tree, batches: Iterable[np.ndarray]) -> list[Array]:
    """Returns the inputs of the first layer for each batch, `[B, L, D]`.

    Args:
      params: the parameters outside the layers.
      batches: token ids, int32 `[B, L]`.
    """
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
    """Returns a module that computes the layer: that of the first layer with the same methods."""
    model, spec = self.model, self.model.spec
    if sites.alike(model.site.module(spec).where):
      kinds = [tuple(slot.at(i, spec.layers) for slot in model.slots) for i in range(spec.layers)]
      layer = kinds.index(kinds[layer])
    return Layer(spec, model.slots, layer, model.site)

  def sums(
    self, layer: int, params: Tree, stream: list[Array]
  ) -> tuple[dict[str, dict[str, Array]], dict[str, Array]]:
    """Returns the signals of each kernel, summed over all tokens that reach it, and the tokens' number.

    Both are dicts by the kernel's path; the signals have one dict per name.

    Args:
      layer: number of the layer.
      params: the layer's parameters.
      stream: the inputs of the layer for each batch, `[B, L, D]`.
    """
    module, total = self.module(layer), None
    own = tuple(
      (path, name) for path, name in self.sites.items() if Place.parse(path).layer == module.layer
    )
    gather = _compiled_signals(module, self.needs, own)
    variables = self.variables(module, layer, params)
    for x_BxLxD in stream:
      sums = gather(variables, x_BxLxD)
      total = sums if total is None else jax.tree.map(jnp.add, total, sums)
    signals, counts = total
    signals = {need: moved(by_path, layer) for need, by_path in signals.items()}
    return signals, moved(counts, layer)

  def run(self, layer: int, params: Tree, stream: list[Array]) -> None:
    """Replaces the inputs `stream` of a layer by its outputs."""
    module = self.module(layer)
    apply, variables = _compiled_pass(module), self.variables(module, layer, params)
    for i, x_BxLxD in enumerate(stream):
      stream[i] = apply(variables, x_BxLxD)

  def check_reached(self, target: Tree) -> None:
    """Raises a UserError if a kernel with a target gets no signal."""
    missed = [path for path in tree.named(target) if path not in self.sites]
    if missed:
      raise UserError(
        f'this method gets no calibration signal for {missed[0]} ({len(missed)} such parameters); valid: '
        'keep them dense by config.weight.dense'
      )

  def variables(self, module: Layer, layer: int, params: Tree) -> dict[str, Tree]:
    """Returns the layer's part of each collection, under the names that `module` gives them."""
    return {
      name: moved(of_part(values, layer), module.layer)
      for name, values in ({'params': params} | self.model_state).items()
    }


def _embed(model: LM, params: Tree, tokens_BxL: Array) -> Array:
  positions_BxL = jnp.broadcast_to(jnp.arange(tokens_BxL.shape[1]), tokens_BxL.shape)
  return Embed(model.spec).apply({'params': params}, tokens_BxL, positions_BxL)


def moved(by_path: dict[str, Tree], layer: int) -> dict[str, Tree]:
  """Returns the values under the paths that they have in another layer."""
  places = {path: Place.parse(path) for path in by_path}
  return {
    str(Place((places[path].part.of(layer), *places[path].names[1:]))): value
    for path, value in by_path.items()
  }


@functools.lru_cache(maxsize=16)
def _compiled_pass(module: Layer) -> Wrapped:
  return jax.jit(module.apply)


@functools.lru_cache(maxsize=16)
def _compiled_signals(
  module: Layer, needs: tuple[str, ...], sites_of: tuple[tuple[str, str], ...]
) -> Wrapped:
  return jax.jit(functools.partial(_signals, module, needs, dict(sites_of)))


def _signals(
  module: Layer,
  needs: tuple[str, ...],
  sites_of: dict[str, str],
  variables: Tree,
  x_BxLxD: Array,
) -> tuple[dict[str, dict[str, Array]], dict[str, Array]]:
  """Returns the result of `Layers.sums` for one batch.

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


def means(
  sums: dict[str, dict[str, Array]], counts: dict[str, Array], target: Tree
) -> dict[str, Tree]:
  """Returns the mean signals of a layer's kernels: trees like `target`, `None` where it is `None`.

  Args:
    sums, counts: the results of `Layers.sums`.
    target: target densities of the layer; kernels without one need no signal.

  Raises:
    UserError: no token reached a kernel.
  """
  reached = [path for path in tree.named(target) if path in counts]
  if missed := [path for path in reached if not int(counts[path])]:
    raise UserError(
      f'all calibration tokens skip the layer of {missed[0]} ({len(missed)} such parameters); valid: '
      'more --segments, or keep them dense by config.weight.dense'
    )
  here = tree.only(reached, target)
  return {
    need: tree.map_named(lambda path, _, found=found: found[path] / counts[path], here)
    for need, found in sums.items()
  }
