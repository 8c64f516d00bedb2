"""Runs equal layers as one scan, so that they are traced and compiled only once.

Each layer keeps its own variables under its own name. A step stacks them for the scan, which copies
weights and gradients, and stores the values that the scan sows under each layer's name. XLA does not
fuse operations across iterations of the scan, and copies residuals of the backward pass into stacked
arrays.
"""

from collections.abc import Iterator, Mapping, Sequence

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.extend.core import Primitive

from sparse_lm.core.paths import Place
from sparse_lm.core.tree import Tree
from sparse_lm.layers import draws
from sparse_lm.layers.method import Run
from sparse_lm.layers.spec import AUTO
from sparse_lm.layers.tokens import Tokens

# The layers that each iteration (pass) of a scan runs. All passes have equal layers.
Passes = tuple[tuple[int, ...], ...]
# The fewest layers that a scan covers by default. Without a scan, compile time grows with the number of
# layers. But a scan makes each step slower, because it copies weights, gradients and residuals into
# stacked arrays. So it pays only for deep models.
MIN_LAYERS = 32
# Elementwise operations. The backward pass recomputes them inside the kernels that need their results,
# instead of reading stacked arrays. Without a scan, XLA does this by itself. The results of all other
# operations (matmuls, attention, selections, random numbers, sums) are saved.
_ELEMENTWISE = """
  abs add add_any and bitcast_convert_type broadcast_in_dim ceil clamp convert_element_type copy cos div
  eq erf exp exp2 expand_dims expm1 floor ge gt integer_pow is_finite le log log1p logistic lt max min mul
  ne neg not or pow real reduce_precision reshape round rsqrt select_n sign sin slice split sqrt square
  squeeze stop_gradient sub tanh transpose xor
"""


def _keeps(primitive: Primitive, *_: object, **__: object) -> bool:
  return primitive.name not in _ELEMENTWISE.split()


def min_layers(how: str) -> int | None:
  """Returns the fewest layers that a scan covers, given `config.model.scan_layers`; `None` means no scan.

  By default, nothing is scanned on a CPU, where a scan saves no compile time: the optimizer's updates
  then read slices of stacked gradients and take longer to compile.
  """
  if how == 'always':
    return 2
  return MIN_LAYERS if how == AUTO and jax.default_backend() != 'cpu' else None


def split(layers: Sequence[int], kinds: Sequence[object], least: int) -> Iterator[Passes]:
  """Splits layers into maximal runs of equal groups of layers; all other layers stay single.

  If several runs begin at a layer, the one that covers the most layers is taken, and among those the one
  with the smallest groups.

  Args:
    layers: numbers of the layers.
    kinds: the kind of each layer; a layer can only stand for layers of the same kind.
    least: the fewest layers of a run; layers of shorter runs stay single.

  Yields:
    The passes of a run, at least two; for a single layer, one pass with this layer.
  """
  first = 0
  while first < len(layers):
    sizes = range(1, (len(layers) - first) // 2 + 1)
    runs = [(size, size * _times(kinds[first:], size)) for size in sizes]
    size, covered = max(
      (run for run in runs if run[1] >= max(2 * run[0], least)),
      key=lambda run: run[1],
      default=(1, 1),
    )
    starts = range(first, first + covered, size)
    yield tuple(tuple(layers[start : start + size]) for start in starts)
    first += covered


def _times(kinds: Sequence[object], size: int) -> int:
  """Returns how many times the first `size` kinds repeat in a row."""
  group, times = kinds[:size], 1
  while kinds[times * size : (times + 1) * size] == group:
    times += 1
  return times


def kind(variables: Tree, layer: int) -> tuple[object, ...]:
  """Returns the structure, shapes and dtypes of a layer's variables, which must be equal in a scan."""
  leaves, structure = jax.tree.flatten(_of_layers(variables, {layer: 0}))
  return structure, *((leaf.shape, leaf.dtype) for leaf in leaves)


def run(parent: nn.Module, module: nn.Module, passes: Passes, recomputes: bool) -> Run:
  """Returns a function that runs all passes as one scan.

  Args:
    parent: the model, whose call makes and calls the function.
    module: `(tokens, mode) -> residual stream [B, L, D]` after the layers of the first pass. Its
      variables are named as in the model.
    passes: the layers of each pass.
    recomputes: whether the module has its own remat policy.

  Returns:
    `(tokens, mode) -> residual stream [B, L, D]` after the last pass. Sowed and changed variables are
    stored in the parent as if each layer had run by itself. Random numbers are identical, too
    (`layers/draws.py`).
  """
  stands_for = {layer: tuple(of[at] for of in passes) for at, layer in enumerate(passes[0])}

  def scanned(tokens: Tokens, mode: str) -> jax.Array:
    rngs, mutable = parent.scope.rngs, parent.scope.mutable or []

    def one(x_BxLxD: jax.Array, own: tuple[jax.Array, Tree]) -> tuple[jax.Array, Tree]:
      index, variables = own
      keys = {name: jax.random.fold_in(rng.as_jax_rng(), index) for name, rng in rngs.items()}
      with draws.representing_layers(draws.Pass(stands_for, index, rngs, parent.path)):
        at = tokens.replace(x=x_BxLxD)
        return module.apply(variables, at, mode, rngs=keys, mutable=mutable)

    of_passes = [
      _of_layers(parent.variables, dict(zip(layers, passes[0], strict=True))) for layers in passes
    ]
    if not recomputes:
      one = jax.checkpoint(one, policy=_keeps, prevent_cse=False)
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *of_passes)
    x_BxLxD, changed = jax.lax.scan(one, tokens.x, (jnp.arange(len(passes)), stacked))
    for collection, parts in changed.items():
      for name, stack in parts.items():
        place = Place.parse(name)
        for index, layer in enumerate(stands_for[place.layer]):
          own = jax.tree.map(lambda leaf, index=index: leaf[index], stack)
          parent.put_variable(collection, place.part.of(layer), own)
    return x_BxLxD

  return scanned


def _of_layers(variables: Tree, renamed: Mapping[int, int]) -> Tree:
  """Returns, by collection, the variables of the layers in `renamed`, under their new layer numbers."""
  return {
    collection: {
      place.part.of(renamed[place.layer]): parts[str(place)]
      for place in map(Place.parse, parts)
      if place.layer in renamed
    }
    for collection, parts in variables.items()
  }
