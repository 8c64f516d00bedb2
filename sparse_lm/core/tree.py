"""Names of leaves and maps over trees in which `None` means dense.

Parameters lead every map: `jax.tree.map(f, params, masks)` hands `None` to `f` where a leaf is
dense, because a tree prefix stops at the parameters' leaves.
"""

import re
from collections.abc import Callable, Container
from typing import Any

import jax

from sparse_lm.core.errors import UserError

# A pytree, and so also one leaf of it: no narrower type says that. Nothing else is typed `Any`.
Tree = Any


def path_name(path: tuple) -> str:
  """`'block_0/mlp/up/kernel'` for a key path of `jax.tree_util`."""
  return jax.tree_util.keystr(path, simple=True, separator='/')


def named(tree: Tree) -> dict[str, Tree]:
  """Every leaf of `tree` (without `None`s) by its path."""
  return {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def map_named(f: Callable, tree: Tree, *rest: Tree) -> Tree:
  """`jax.tree.map` whose function is handed the leaf's path first."""
  return jax.tree_util.tree_map_with_path(lambda path, *x: f(path_name(path), *x), tree, *rest)


def only(paths: Container[str], tree: Tree) -> Tree:
  """The leaves of `tree` at `paths`, `None` elsewhere."""
  return map_named(lambda path, leaf: leaf if path in paths else None, tree)


def merge(tree: Tree, new: Tree) -> Tree:
  """`tree` with the leaves of `new` in their places; where `new` has none, `tree` stays as it is."""
  found = named(new)
  return map_named(lambda path, leaf: found.get(path, leaf), tree)


def matches(expressions: tuple[str, ...], path: str, field: str) -> bool:
  """Whether one of the regular expressions is found anywhere in `path`.

  Raises UserError, naming `field`, for one that is no regular expression.
  """
  try:
    return any(re.search(expression, path) for expression in expressions)
  except re.error as error:
    raise UserError(f'{field}: {error.pattern!r} is no path expression: {error}') from None


def where_sparse(f: Callable, params: Tree, masks: Tree, *rest: Tree, dense: Callable) -> Tree:
  """`f(param, mask, *rest)` on the leaves that have a mask, `dense(param)` on the others."""
  return jax.tree.map(
    lambda param, mask, *x: dense(param) if mask is None else f(param, mask, *x),
    params,
    masks,
    *rest,
  )


def part(stacked: Tree, number: int) -> Tree:
  """The part of a stacked tree that its leading axis has at `number`."""
  return jax.tree.map(lambda leaf: leaf[number], stacked)


def nbytes(tree: Tree) -> int:
  """Bytes of all leaves, which are arrays or shape structs."""
  return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
