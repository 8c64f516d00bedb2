"""Functions that are compiled ahead of time."""

import jax
import jax.numpy as jnp

from sparse_lm.core.aot import AotFunction, Call, compile_together


def test_what_was_compiled_before_is_called_and_not_traced_again():
  traces = []

  def add(x, y):
    traces.append(x.shape)
    return x + y

  function, other = AotFunction(add), AotFunction(lambda x: 2 * x)
  shape = jax.ShapeDtypeStruct((3,), jnp.float32)
  compile_together([Call(function, (shape, shape)), Call(other, (shape,))])
  x = jnp.arange(3.0)
  assert function(x, x).tolist() == other(x).tolist() == [0, 2, 4]
  assert traces == [(3,)]
  assert function.compiled(shape, shape) is function.compiled(x, x)
  # Another shape is compiled where it is met first.
  assert function(jnp.ones(2), jnp.ones(2)).tolist() == [2, 2]
  assert traces == [(3,), (2,)]


def test_outputs_are_the_shapes_of_the_results():
  shape = jax.ShapeDtypeStruct((3, 2), jnp.float32)
  assert AotFunction(lambda x: x.sum(axis=1)).outputs(shape).shape == (3,)
