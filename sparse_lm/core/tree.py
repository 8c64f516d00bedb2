"""Paths of leaves, and maps over trees in which `None` means dense.

In every map, the parameters come first: `jax.tree.map(f, params, masks)` follows the structure of
`params`, so `f` gets `None` as the mask of a dense parameter.
"""

import re
from collections.abc import Callable, Container
from typing import Any

import jax

from sparse_lm.core.errors import UserError

# A pytree. A single leaf is a pytree too, so no narrower type fits. Nothing else is typed `Any`.
Tree = Any


def path_name(path: tuple) -> str:
  """Converts a key path of `jax.tree_util` to a string such as 'block_0/mlp/up/kernel'."""
  return jax.tree_util.keystr(path, simple=True, separator='/')


def named(tree: Tree) -> dict[str, Tree]:
  """Returns a dict from path to leaf, without `None` leaves."""
  return {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def map_named(f: Callable, tree: Tree, *rest: Tree) -> Tree:
  """`jax.tree.map` for a function whose first argument is the leaf's path."""
  return jax.tree_util.tree_map_with_path(lambda path, *x: f(path_name(path), *x), tree, *rest)


def only(paths: Container[str], tree: Tree) -> Tree:
  """Returns `tree` with `None` for every leaf whose path is not in `paths`."""
  return map_named(lambda path, leaf: leaf if path in paths else None, tree)


def merge(tree: Tree, new: Tree) -> Tree:
  """Returns `tree` with the leaves of `new` instead of its own at the same paths."""
  found = named(new)
  return map_named(lambda path, leaf: found.get(path, leaf), tree)


def matches(expressions: tuple[str, ...], path: str, field: str) -> bool:
  """Returns whether one of the regular expressions matches anywhere in `path`.

  Raises:
    UserError: an expression is not a regular expression; the message names the config field `field`.
  """
  try:
    return any(re.search(expression, path) for expression in expressions)
  except re.error as error:
    raise UserError(
      f'{field}: {error.pattern!r} is not valid ({error}); valid: a regular expression'
    ) from None


def where_sparse(f: Callable, params: Tree, masks: Tree, *rest: Tree, dense: Callable) -> Tree:
  """Maps `f(param, mask, *rest)` over the leaves that have a mask, `dense(param)` over the others."""
  return jax.tree.map(
    lambda param, mask, *x: dense(param) if mask is None else f(param, mask, *x),
    params,
    masks,
    *rest,
  )


def at_index(stacked: Tree, number: int) -> Tree:
  """Indexes the leading axis of every leaf of a stacked tree."""
  return jax.tree.map(lambda leaf: leaf[number], stacked)


def nbytes(tree: Tree) -> int:
  """Returns the bytes of all leaves, which are arrays or shape structs."""
  return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
