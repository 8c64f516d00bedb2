"""The rank of each entry among those of its group, in the order of their arrival."""

import jax
import jax.numpy as jnp

Array = jax.Array

TOGETHER = 128  # entries of a row, all of which counting compares with each other
MOST_COMPARISONS = 2**27  # the most of counting; beyond it ranks come from a sort


def ranks(group_P: Array, groups: int) -> tuple[Array, Array]:
  """The number of earlier entries of each entry's group, int32 `[P]`, and the `sizes` of the groups.

  A GPU counts them, because its sort takes several passes over memory, each of which waits for the last.

  Args:
    group_P: int32, the group of each entry; `groups` = no group, and the rank of such an entry is
      undefined.
    groups: E.
  """
  if -(-group_P.size // TOGETHER) * groups * group_P.size // TOGETHER > MOST_COMPARISONS:
    return by_sorting(group_P, groups)
  return jax.lax.platform_dependent(
    group_P,
    cuda=lambda group_P: by_counting(group_P, groups),
    default=lambda group_P: by_sorting(group_P, groups),
  )


def sizes(group_P: Array, groups: int) -> Array:
  """Entries of each group, int32 `[E]`."""
  return jnp.sum(group_P[:, None] == jnp.arange(groups), axis=0, dtype=jnp.int32)


def by_sorting(group_P: Array, groups: int) -> tuple[Array, Array]:
  """`ranks` from a stable sort by group."""
  size_E = sizes(group_P, groups)
  order_P = jnp.argsort(group_P, stable=True)
  first_E = jnp.cumsum(size_E) - size_E
  sorted_P = jnp.minimum(group_P[order_P], groups - 1)
  rank_P = jnp.arange(group_P.size, dtype=jnp.int32) - first_E[sorted_P]
  return jnp.zeros(group_P.size, jnp.int32).at[order_P].set(rank_P), size_E


def by_counting(group_P: Array, groups: int) -> tuple[Array, Array]:
  """`ranks` by comparisons inside rows of `TOGETHER` entries, plus the counts of earlier rows."""
  padded = jnp.pad(group_P, (0, -group_P.size % TOGETHER), constant_values=groups)
  group_RxL = padded.reshape(-1, TOGETHER)
  rows = len(group_RxL)
  earlier_LxL = jnp.tril(jnp.ones((TOGETHER, TOGETHER), bool), -1)
  same_RxLxL = group_RxL[:, :, None] == group_RxL[:, None]
  within_RxL = jnp.sum(same_RxLxL & earlier_LxL, axis=2, dtype=jnp.int32)
  own_RxLxE = group_RxL[:, :, None] == jnp.arange(groups)
  count_RxE = jnp.sum(own_RxLxE, axis=1, dtype=jnp.int32)
  earlier_RxR = jnp.tril(jnp.ones((rows, rows), bool), -1)
  before_RxE = jnp.sum(jnp.where(earlier_RxR[:, :, None], count_RxE, 0), axis=1, dtype=jnp.int32)
  before_RxL = jnp.sum(jnp.where(own_RxLxE, before_RxE[:, None], 0), axis=2, dtype=jnp.int32)
  rank_P = (within_RxL + before_RxL).reshape(-1)[: group_P.size]
  return rank_P, jnp.sum(count_RxE, axis=0, dtype=jnp.int32)
