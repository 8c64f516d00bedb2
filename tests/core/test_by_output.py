"""Compiled output by output, a function gives what it gives as a whole, from a few programs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from sparse_lm.core import by_output
from sparse_lm.core.by_output import ByOutput
from sparse_lm.runs.build import build
from sparse_lm.train import states

LEAVES = 12


def programs_of(split):
  (parts,) = split._parts.values()
  return {part.program for part in parts}


def same(function, *arguments):
  """Checks `function` against itself as one program, to the bit, and returns how it was split."""
  split = ByOutput(function)
  got, want = split(*arguments), jax.jit(function)(*arguments)
  assert jax.tree.structure(got) == jax.tree.structure(want)
  for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(want)):
    assert one.aval == other.aval
    np.testing.assert_array_equal(one, other)
  return split


def drawn(seed, number, scale=0.02, shape=(5, 3)):
  return scale * jax.random.normal(jax.random.fold_in(jax.random.key(seed), number), shape)


def test_leaves_that_differ_in_their_keys_share_a_program():
  split = same(lambda seed: [drawn(seed, 7 * n) for n in range(LEAVES)], 3)
  assert len(programs_of(split)) == 1
  assert len({float(leaf[0, 0]) for leaf in split(3)}) == LEAVES
  split(4)
  assert split.traces == 1


@pytest.mark.parametrize(
  'other', [{'scale': 0.03}, {'shape': (3, 5)}, {'scale': np.arange(3, dtype=np.float32)}]
)
def test_what_differs_otherwise_has_a_program_of_its_own(other):
  def function(seed):
    return [drawn(seed, n) for n in range(LEAVES)], drawn(seed, 50, **other)

  assert len(programs_of(same(function, 0))) == 2


def test_constants_inside_loops_are_told_apart(monkeypatch):
  monkeypatch.setattr(by_output, 'ALIKE', 1)

  def looped(x, by):
    return lax.fori_loop(0, 3, lambda _, y: y * jnp.float32(by) + jnp.asarray([by, 1.0]), x)

  def function(x):
    return [looped(x, by) for by in (2, 2, 3)], looped(x, 2)

  assert len(programs_of(same(function, jnp.ones(2)))) > 1


def test_outputs_that_share_more_than_scalars_are_computed_together():
  def function(seed, density):
    found = []
    for n in range(LEAVES):
      w = drawn(seed, n)
      mask = jnp.abs(w) > density
      found.append((w * mask, mask, jnp.sum(mask)))
    return found

  split = same(function, 1, jnp.float32(0.01))
  (parts,) = split._parts.values()
  assert {len(part.outputs) for part in parts} == {3} and len(programs_of(split)) == 1


def test_scalars_of_large_values_join_those_who_read_them():
  def function(seed):
    leaves = [drawn(seed, n) for n in range(LEAVES)]
    norm = jnp.sqrt(sum(jnp.sum(leaf**2) for leaf in leaves))
    return [leaf / norm for leaf in leaves], [drawn(seed, 50 + n) for n in range(LEAVES)]

  split = same(function, 1)
  (parts,) = split._parts.values()
  assert sorted(len(part.outputs) for part in parts) == [1] * LEAVES + [LEAVES]


def test_arguments_constants_and_numbers_may_be_outputs():
  def function(x, y):
    return x, 3, y + 1, jnp.float32(2), [jnp.full(4, 5) for _ in range(LEAVES)]

  same(function, jnp.ones(2), 4)


def test_a_function_of_few_outputs_is_one_program():
  split = same(lambda seed: (drawn(seed, 0), drawn(seed, 1), jnp.zeros(3)), 0)
  assert list(split._parts.values()) == [[]]


def test_traced_arguments_are_traced_through():
  split = ByOutput(lambda seed: [drawn(seed, n) for n in range(LEAVES)])
  got = jax.vmap(split)(jnp.arange(2))
  for seed in range(2):
    for leaf, want in zip(got, split(seed)):
      np.testing.assert_allclose(leaf[seed], want, rtol=1e-6)


def test_the_state_of_a_deep_model_is_that_of_one_program(tiny_config):
  config = tiny_config(weight__name='static', weight__sparsity=0.5, model__layers=6)
  program, target = build(config, 11)
  objective = program.objective
  create = functools.partial(
    states.create, objective.model, objective.method, program.optimizer, objective.budget
  )
  split = ByOutput(lambda seed, target: create(seed, target).replace(key=None))
  got, want = split(0, target), jax.jit(create)(0, target).replace(key=None)
  jax.tree.map(np.testing.assert_array_equal, got, want)
  (parts,) = split._parts.values()
  assert len(programs_of(split)) < 20 < 100 < len(parts)
