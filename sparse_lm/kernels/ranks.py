"""The rank of each entry within its group, in array order."""

import jax
import jax.numpy as jnp

Array = jax.Array

ROW_ENTRIES = 128  # `by_counting` compares the entries of such a row with each other
MAX_COMPARISONS = 2**27  # above this number of comparisons, ranks are computed by a sort


def ranks(group_P: Array, groups: int) -> tuple[Array, Array]:
  """Returns the number of earlier entries in the same group, int32 `[P]`, and the `sizes` of the groups.

  An NVIDIA GPU counts them, because its sort takes several dependent passes over memory. Other devices
  sort.

  Args:
    group_P: int32, the group of each entry. The value `groups` means no group; the rank of such an entry
      is undefined.
    groups: number of groups, E.
  """
  if -(-group_P.size // ROW_ENTRIES) * groups * group_P.size // ROW_ENTRIES > MAX_COMPARISONS:
    return by_sorting(group_P, groups)
  return jax.lax.platform_dependent(
    group_P,
    cuda=lambda group_P: by_counting(group_P, groups),
    default=lambda group_P: by_sorting(group_P, groups),
  )


def sizes(group_P: Array, groups: int) -> Array:
  """Returns the number of entries in each group, int32 `[E]`."""
  return jnp.sum(group_P[:, None] == jnp.arange(groups), axis=0, dtype=jnp.int32)


def by_sorting(group_P: Array, groups: int) -> tuple[Array, Array]:
  """Computes `ranks` by a stable sort by group."""
  size_E = sizes(group_P, groups)
  order_P = jnp.argsort(group_P, stable=True)
  first_E = jnp.cumsum(size_E) - size_E
  sorted_P = jnp.minimum(group_P[order_P], groups - 1)
  rank_P = jnp.arange(group_P.size, dtype=jnp.int32) - first_E[sorted_P]
  return jnp.zeros(group_P.size, jnp.int32).at[order_P].set(rank_P), size_E


def by_counting(group_P: Array, groups: int) -> tuple[Array, Array]:
  """Computes `ranks` by comparisons within rows of `ROW_ENTRIES` entries, plus counts of earlier rows."""
  padded = jnp.pad(group_P, (0, -group_P.size % ROW_ENTRIES), constant_values=groups)
  group_RxL = padded.reshape(-1, ROW_ENTRIES)
  rows = len(group_RxL)
  earlier_LxL = jnp.tril(jnp.ones((ROW_ENTRIES, ROW_ENTRIES), bool), -1)
  same_RxLxL = group_RxL[:, :, None] == group_RxL[:, None]
  within_RxL = jnp.sum(same_RxLxL & earlier_LxL, axis=2, dtype=jnp.int32)
  own_RxLxE = group_RxL[:, :, None] == jnp.arange(groups)
  count_RxE = jnp.sum(own_RxLxE, axis=1, dtype=jnp.int32)
  earlier_RxR = jnp.tril(jnp.ones((rows, rows), bool), -1)
  before_RxE = jnp.sum(jnp.where(earlier_RxR[:, :, None], count_RxE, 0), axis=1, dtype=jnp.int32)
  before_RxL = jnp.sum(jnp.where(own_RxLxE, before_RxE[:, None], 0), axis=2, dtype=jnp.int32)
  rank_P = (within_RxL + before_RxL).reshape(-1)[: group_P.size]
  return rank_P, jnp.sum(count_RxE, axis=0, dtype=jnp.int32)
