"""Fractions of outliers in the layers of a model, for the distribution 'owl' (`core/distribution.py`)."""

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from sparse_lm.core import tree
from sparse_lm.core.paths import Part
from sparse_lm.core.tree import Tree
from sparse_lm.model.lm import LM
from sparse_lm.train import layerwise
from sparse_lm.train.layerwise import Layers, Parts, of_part

SIGNAL = 'x_sq'


def fractions(
  model: LM,
  parts: Parts,
  model_state: Tree,
  targets: dict[str, Tree],
  multiples: dict[str, float],
  batches: list[np.ndarray],
) -> dict[str, dict[str, float]]:
  """Returns the fraction of outliers in each block of a dense model, for several sets of matrices.

  A weight is an outlier if its `|weight| * norm(input)` exceeds a multiple of the mean of this product
  over all weights of the set in the block.

  Args:
    model: the model.
    parts: its weights.
    model_state: its other collections.
    targets: for each set, by its name, a tree like the parameters; leaves that are not `None` are in it.
    multiples: the multiple for each set, by its name.
    batches: calibration tokens, int32 `[B, L]` each.

  Returns:
    For each set, by its name, the fraction of each block by the name of the block. Blocks without a
    matrix of the set are left out.

  Raises:
    UserError: a matrix gets no signal.
  """
  layers = Layers(model, (SIGNAL,), model_state)
  for target in targets.values():
    check_reached(model, target)
  stream = layers.embed(parts.read(None)[0], batches)
  found: dict[str, dict[str, float]] = {name: {} for name in targets}
  for layer in tqdm(
    range(model.spec.layers), 'outliers', unit='layer', dynamic_ncols=True, disable=None
  ):
    params = jax.tree.map(jnp.asarray, parts.read(layer)[0])
    sums, counts = layers.sums(layer, params, stream)
    for name, target in targets.items():
      own = of_part(target, layer)
      squares = tree.named(layerwise.means(sums, counts, own)[SIGNAL])
      if squares:
        scores = _scores(params, squares)
        limit = multiples[name] * jnp.mean(scores)
        found[name][Part.BLOCK.of(layer)] = float(jnp.mean(scores > limit))
    layers.run(layer, params, stream)
  return found


def check_reached(model: LM, target: Tree) -> None:
  """Raises UserError if a matrix gets no signal; the leaves of `target` that are not `None` name them."""
  Layers(model, (SIGNAL,), {}).check_reached(target)


def _scores(params: Tree, squares: dict[str, jax.Array]) -> jax.Array:
  """Returns `|weight| * norm(input)` for all weights of the matrices in `squares`, `[N]`."""
  named = tree.named(params)
  return jnp.concatenate(
    [(jnp.abs(named[path]) * jnp.sqrt(square)[:, None]).ravel() for path, square in squares.items()]
  )
