"""Equal layers that run as one scan, so that they are traced and compiled once.

Every layer keeps its own variables under its own name. A step stacks them for the scan, which copies the
weights and their gradients, and stores what the scan sows under the name of each layer. XLA does not fuse
operations across passes of the scan, and copies residuals for the backward pass into stacks.
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

# The layers that each pass of a scan runs in turn; every pass has as many, equal to those of the others.
Passes = tuple[tuple[int, ...], ...]
# The fewest layers that a scan covers by default. Compile time grows with the number of layers that are
# not scanned, and a scan makes each step slower: it copies weights, gradients and residuals into stacks.
# A scan is therefore for deep stacks alone.
DEEP = 32
# Elementwise operations: the backward pass computes them again inside the kernels that need their
# results, instead of reading them from a stack over all passes. XLA does this by itself where layers are
# unrolled. All other results (matmuls, attention, selections, draws, sums) are kept.
_ELEMENTWISE = """
  abs add add_any and bitcast_convert_type broadcast_in_dim ceil clamp convert_element_type copy cos div
  eq erf exp exp2 expand_dims expm1 floor ge gt integer_pow is_finite le log log1p logistic lt max min mul
  ne neg not or pow real reduce_precision reshape round rsqrt select_n sign sin slice split sqrt square
  squeeze stop_gradient sub tanh transpose xor
"""


def _keeps(primitive: Primitive, *_: object, **__: object) -> bool:
  return primitive.name not in _ELEMENTWISE.split()


def least(how: str) -> int | None:
  """The fewest layers that a scan covers under `config.model.scan_layers`; `None` = nothing is scanned.

  By default nothing is scanned on a CPU, where a scan saves no time in compilation: the optimizer's
  updates, which then read slices of stacked gradients, take longer to compile.
  """
  if how == 'always':
    return 2
  return DEEP if how == AUTO and jax.default_backend() != 'cpu' else None


def split(layers: Sequence[int], kinds: Sequence[object], least: int) -> Iterator[Passes]:
  """Splits layers into maximal runs of equal groups of layers; all other layers stay single.

  Of the runs that begin at a layer, the one that covers most layers is taken, and among those the one
  with the smallest groups.

  Args:
    kinds: the kind of each layer; layers of equal kinds can share one pass.
    least: the fewest layers of a run; layers of shorter runs stay single.

  Yields:
    The passes of a run, at least two; for a single layer, one pass with that layer.
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
  """How often the first `size` kinds follow one another."""
  group, times = kinds[:size], 1
  while kinds[times * size : (times + 1) * size] == group:
    times += 1
  return times


def kind(variables: Tree, layer: int) -> tuple[object, ...]:
  """The tree, shapes and dtypes of a layer's variables, which must be equal for layers of one scan."""
  leaves, structure = jax.tree.flatten(_of_layers(variables, {layer: 0}))
  return structure, *((leaf.shape, leaf.dtype) for leaf in leaves)


def run(parent: nn.Module, module: nn.Module, passes: Passes, recomputes: bool) -> Run:
  """One scan over all passes.

  Args:
    parent: the model, in whose call the scan is made and called.
    module: `(tokens, mode) -> residual stream [B, L, D]` after the layers of the first pass, with the
      variables of these layers named as in the model.
    recomputes: whether the module decides by itself what its backward pass computes again.

  Returns:
    `(tokens, mode) -> the residual stream [B, L, D]` after the last pass. It leaves in the parent what
    modules sow and change, as if every layer had run by itself; random draws are the same to the bit
    (`layers/draws.py`).
  """
  stands_for = {layer: tuple(of[at] for of in passes) for at, layer in enumerate(passes[0])}

  def scanned(tokens: Tokens, mode: str) -> jax.Array:
    rngs, mutable = parent.scope.rngs, parent.scope.mutable or []

    def one(x_BxLxD: jax.Array, own: tuple[jax.Array, Tree]) -> tuple[jax.Array, Tree]:
      index, variables = own
      keys = {name: jax.random.fold_in(rng.as_jax_rng(), index) for name, rng in rngs.items()}
      with draws.standing_for(draws.Pass(stands_for, index, rngs, parent.path)):
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
  """By collection, the variables of the layers in `renamed`, under the names of the layers it maps to."""
  return {
    collection: {
      place.part.of(renamed[place.layer]): parts[str(place)]
      for place in map(Place.parse, parts)
      if place.layer in renamed
    }
    for collection, parts in variables.items()
  }
