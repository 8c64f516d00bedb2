"""Calibrates the thresholds of activations on text, layer by layer (`layers/threshold.py`)."""

import dataclasses
import fnmatch
import functools
from collections.abc import Iterator, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax.stages import Wrapped
from tqdm import tqdm

from sparse_lm.core import tree
from sparse_lm.core.errors import UserError
from sparse_lm.core.paths import Part, Place
from sparse_lm.core.tree import Tree
from sparse_lm.layers.threshold import THRESHOLDS
from sparse_lm.model.lm import LM, Layer
from sparse_lm.model.plans import plan_of
from sparse_lm.plan import sites
from sparse_lm.train import layerwise
from sparse_lm.train.layerwise import Layers, Parts

DENSITY = 'density'  # the field of every method that has thresholds


def densities(model: LM) -> dict[str, float]:
  """Returns the fraction of activations that the config keeps, by the name of each site with a threshold.

  Raises UserError if the model has no thresholds, or has some at a site that cannot be calibrated.
  """
  plan, layers = plan_of(model), model.spec.layers
  activations = next(slot for slot in model.slots if slot.slot == 'activation').by_layer(layers)
  where, found = model.site.module(model.spec).where, {}
  for path in tree.named(plan.variables.get(THRESHOLDS, {})):
    of_site = any(fnmatch.fnmatchcase(path, pattern) for pattern in where)
    own = model.site if of_site else activations[Place.parse(path).layer or 0]
    found[path] = float(dict(own.fields)[DENSITY])
    if Place.parse(path).layer is None or plan.sites[path].shape[:2] != (1, model.spec.context):
      raise UserError(
        f'{path} has a threshold, but its activations are not one row for each token of a layer; valid: '
        'sites in the layers of a model without experts'
      )
  if not found:
    raise UserError(
      f'config.activation.name={activations[0].name!r} and config.site.name={model.site.name!r} have no '
      'thresholds to calibrate; valid: a method with thresholds in either slot'
    )
  return found


def threshold(magnitudes: np.ndarray, density: float) -> float:
  """Returns a number that all but a fraction `density` of the magnitudes are below."""
  below = min(round((1 - density) * magnitudes.size), magnitudes.size - 1)
  return float(np.partition(magnitudes, below)[below]) if below else 0.0


def calibrate(model: LM, parts: Parts, model_state: Tree, batches: list[np.ndarray]) -> Tree:
  """Returns the model's collections with calibrated thresholds.

  Each threshold is a quantile of the magnitudes of its site's activations, over all tokens that reach it.
  Sites are calibrated in the order of the forward pass, with the zeros of all earlier sites. So on the
  calibration text, each site keeps the fraction that the config asks for.

  Args:
    model: the model.
    parts: its parameters.
    model_state: its collections; thresholds in it are replaced.
    batches: calibration tokens, int32 `[B, L]` each.
  """
  wanted = densities(model)
  found = dict.fromkeys(wanted, 0.0)
  layers = _with_thresholds(Layers(model, (), model_state), found)
  stream = layers.embed(parts.read(None)[0], batches)
  for layer in tqdm(range(model.spec.layers), 'calibrating layers', disable=None):
    params = parts.read(layer)[0]
    for names in _stages(model, layer, wanted):
      magnitudes = _magnitudes(layers, layer, params, stream, names[0])
      found |= {name: threshold(magnitudes, wanted[name]) for name in names}
      layers = _with_thresholds(layers, found)
    layers.run(layer, params, stream)
  return layers.model_state


def _with_thresholds(layers: Layers, found: Mapping[str, float]) -> Layers:
  shapes = plan_of(layers.model).variables[THRESHOLDS]
  values = tree.map_named(lambda path, _: jnp.float32(found[path]), shapes)
  return dataclasses.replace(layers, model_state=layers.model_state | {THRESHOLDS: values})


def _stages(model: LM, layer: int, wanted: Mapping[str, float]) -> Iterator[tuple[str, ...]]:
  """Yields the sites of a layer in the order of the forward pass; those with the same inputs together."""
  plan, done = plan_of(model), set()
  together = [{str(Place.parse(part) / 'input') for part in parts} for parts in plan.fused.values()]
  for path in plan.sites:
    if path in wanted and path not in done and Place.parse(path).layer == layer:
      group = next((names for names in together if path in names), {path})
      names = tuple(name for name in plan.sites if name in group and name in wanted)
      done.update(names)
      yield names


def _magnitudes(
  layers: Layers, layer: int, params: Tree, stream: list[jax.Array], name: str
) -> np.ndarray:
  """Returns the magnitudes of a site's activations, for all tokens that enter the layer, flat."""
  module = layers.module(layer)
  (own,) = layerwise.moved({name: None}, module.layer)
  read, variables = _compiled(module, own), layers.variables(module, layer, params)
  found = []
  for x_BxLxD in stream:
    values, enters_BxL = jax.device_get(read(variables, x_BxLxD))
    found.append(values[enters_BxL].ravel())
  return np.concatenate(found)


@functools.lru_cache(maxsize=64)
def _compiled(module: Layer, name: str) -> Wrapped:
  enters = str(Place((Part.BLOCK.of(module.layer), 'valid')))

  def read(variables: Tree, x_BxLxD: jax.Array) -> tuple[jax.Array, jax.Array]:
    _, seen = sites.run(module, variables, x_BxLxD, read=[enters, name])
    return jnp.abs(seen[name]).astype(jnp.float32), seen[enters]

  return jax.jit(read)
