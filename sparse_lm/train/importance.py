"""Importances of the hidden units, heads, channels and layers of a model on calibration text."""

from collections.abc import Collection
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from sparse_lm.core.groups import Group
from sparse_lm.core.paths import Place
from sparse_lm.core.tree import Tree
from sparse_lm.model.lm import LM
from sparse_lm.model.plans import plan_of
from sparse_lm.train import expert_use
from sparse_lm.train.layerwise import Layers, Parts

NEURON, HEAD, SIGNAL = 'neuron', 'head', 'x_sq'


class Importances(NamedTuple):
  """Importances of the units of a model; larger means more important.

  Attributes:
    width_D: for each channel of the residual stream, the root mean square of the normalised inputs of
      attention and MLPs, summed over all of these modules (Minitron, Muralidharan et al. 2024).
    units: by the name of each group of hidden units or heads, the mean squared activation of each unit.
      Activations of heads are the inputs of the output projection.
    influence_L: the block influence of each layer: 1 minus the mean cosine similarity of its input and
      its output (ShortGPT, Men et al. 2024).
    experts: contributions of the experts of each layer (`train/expert_use.py`), if they were asked for.
  """

  width_D: np.ndarray
  units: dict[str, np.ndarray]
  influence_L: np.ndarray
  experts: list[np.ndarray]


def importances(
  model: LM,
  parts: Parts,
  batches: list[np.ndarray],
  reads_width: Collection[str],
  experts: bool = False,
) -> Importances:
  """Measures the importances of a dense model, with one layer in memory at a time.

  Args:
    model: the model.
    parts: its weights.
    batches: calibration tokens, int32 `[B, L]` each.
    reads_width: paths of the kernels whose inputs are the channels of the residual stream.
    experts: whether to measure experts; every layer must then have a mixture of experts.
  """
  layers = Layers(model, (SIGNAL,), {})
  groups = [group for group in plan_of(model).units if group.kind in (NEURON, HEAD)]
  stream = layers.embed(parts.read(None)[0], batches)
  width_D, units, influence, used = np.zeros(model.spec.width), {}, [], []
  bar = tqdm(range(model.spec.layers), 'measuring', unit='layer', dynamic_ncols=True, disable=None)
  for layer in bar:
    params = jax.tree.map(jnp.asarray, parts.read(layer)[0])
    sums, counts = layers.sums(layer, params, stream)
    means = {path: np.asarray(x) / counts[path] for path, x in sums[SIGNAL].items()}
    readers = {str(Place.parse(path).module.module): path for path in means if path in reads_width}
    width_D += sum(np.sqrt(means[path]) for path in readers.values())
    units |= _of_groups([g for g in groups if Place.parse(g.path).layer == layer], means)
    if experts:
      used.append(expert_use.contributions(layers, layer, params, stream))
    before = list(stream)
    layers.run(layer, params, stream)
    similar = [float(_mean_cosine(*pair)) for pair in zip(before, stream)]
    tokens = [x.shape[0] for x in before]
    influence.append(1 - np.average(similar, weights=tokens))
  return Importances(width_D, units, np.array(influence), used)


def _of_groups(groups: list[Group], means: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Returns the mean squared activation of each unit, for groups whose activations were measured."""
  found = {}
  for group in groups:
    read = [means[m.path] for m in group.members if m.axis == -2 and m.path in means]
    if read:
      found[group.name] = np.mean([x.reshape(group.units, -1).mean(axis=1) for x in read], axis=0)
  return found


@jax.jit
def _mean_cosine(x_BxLxD: jax.Array, y_BxLxD: jax.Array) -> jax.Array:
  x, y = x_BxLxD.astype(jnp.float32), y_BxLxD.astype(jnp.float32)
  norms = jnp.linalg.norm(x, axis=-1) * jnp.linalg.norm(y, axis=-1)
  return jnp.mean(jnp.sum(x * y, axis=-1) / jnp.maximum(norms, 1e-30))


def largest(scores: np.ndarray, count: int) -> np.ndarray:
  """Returns the ascending indices of the `count` largest scores; ties go to the lower index."""
  return np.sort(np.argsort(-scores, kind='stable')[:count])


def sliced(leaf: np.ndarray, axes: dict[int, np.ndarray], units: dict[int, int]) -> np.ndarray:
  """Returns the slices of some units along some axes.

  Args:
    leaf: a parameter.
    axes: indices of the kept units, by axis.
    units: number of units along each of these axes. A unit is a block of consecutive entries, and all
      units of an axis have the same length.
  """
  for axis, kept in axes.items():
    size = leaf.shape[axis] // units[axis]
    index = (kept[:, None] * size + np.arange(size)).ravel()
    leaf = np.take(leaf, index, axis)
  return leaf


def renamed(params: Tree, layer: int) -> Tree:
  """Returns the parameters of a layer under the names that they have in another layer."""
  places = {key: Place.parse(key) for key in params}
  return {place.part.of(layer): params[key] for key, place in places.items()}
