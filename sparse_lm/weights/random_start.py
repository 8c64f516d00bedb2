"""Random masks, shuffled masks, and the rescaling of weights for a smaller fan-in."""

import functools
import zlib
from collections.abc import Iterable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from sparse_lm.core import tree
from sparse_lm.core.errors import unknown
from sparse_lm.core.tree import Tree
from sparse_lm.core.units import Pattern, Units
from sparse_lm.weights.method import Array, Sparse, apply_masks, restrict_to

RESCALES = ('none', 'layer', 'unit')


def random_start(
  key: Array, params: Tree, target: Tree, units: Pattern, rescale: str
) -> tuple[Tree, Sparse]:
  """Draws random masks at the target densities, and rescales the weights for their smaller fan-in.

  Args:
    key: key of the random masks.
    params: initial dense parameters, kernels `[..., in, out]`.
    target: densities, `None` = dense.
    units: the pattern.
    rescale: 'none'; 'layer' divides a kernel by sqrt(density); 'unit' divides the weights of each output
      by the square root of its density (both as in RigL's initialisers; Evci et al. 2020, 2022).
  """
  prunable = restrict_to(params, target)
  shapes = jax.eval_shape(units.pool, prunable)
  draws = uniform(path_keys(key, shapes), shapes)
  chosen = units.select(draws, units.densities(target, prunable), prunable)
  masks = units.expand(chosen, prunable)
  if rescale != 'none':
    params = tree.where_sparse(
      lambda w, m, d: _rescaled(w, m, d, rescale), params, masks, target, dense=lambda w: w
    )
  return {'params': apply_masks(params, masks), 'learned': {}}, Sparse(masks, target)


def shuffled(key: Array, masks: Tree) -> Tree:
  """Shuffles each mask: every matrix `[in, out]` keeps as many weights as before, at random places."""

  def mix(path: str, mask: Array) -> Array:
    flat = mask.reshape(*mask.shape[:-2], -1)
    mixed = jax.random.permutation(path_key(key, path), flat, axis=-1, independent=True)
    return mixed.reshape(mask.shape)

  return tree.map_named(mix, masks)


def check(rescale: str) -> None:
  """Raises UserError for an unknown rescaling."""
  if rescale not in RESCALES:
    raise unknown('config.weight.rescale', rescale, RESCALES)


def uniform(keys: Array, like: Mapping[str, Array]) -> Units:
  """Draws uniform numbers from [0, 1) by name, in the shapes of `like`.

  Arrays of equal shape are drawn in one operation, which is compiled once. The values of an array depend
  only on its key.

  Args:
    keys: a key for each name, such as the result of `path_keys`.
    like: arrays or shape structs by name.
  """
  places: dict[tuple[int, ...], dict[str, int]] = {}
  for place, (name, array) in enumerate(like.items()):
    places.setdefault(array.shape, {})[name] = place
  drawn = {}
  for shape, group in places.items():
    draw = jax.vmap(functools.partial(jax.random.uniform, shape=shape))
    # Without the barrier, XLA would fuse the draw into every GPU kernel that reads it, and so repeat it.
    drawn |= zip(group, jax.lax.optimization_barrier(draw(keys[np.array([*group.values()])])))
  return {name: drawn[name] for name in like}


def path_keys(key: Array, paths: Iterable[str]) -> Array:
  """Returns the `path_key` of each path, in one operation."""
  data = np.array([zlib.crc32(path.encode()) for path in paths], np.uint32)
  return jax.vmap(jax.random.fold_in, (None, 0))(key, data)


def path_key(key: Array, path: str) -> Array:
  """Returns a key that depends on the path, so that other parameters do not change it."""
  return jax.random.fold_in(key, zlib.crc32(path.encode()))


def _rescaled(w: Array, mask: Array, density: Array, rescale: str) -> Array:
  if rescale == 'layer' or w.ndim < 2:
    return (w / jnp.sqrt(density)).astype(w.dtype)
  fan_in = jnp.maximum(1, jnp.sum(mask, axis=-2, keepdims=True))
  return (w * jnp.sqrt(w.shape[-2] / fan_in)).astype(w.dtype)
