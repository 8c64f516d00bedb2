"""Functions that run once, compiled for the host's CPU."""

from collections.abc import Callable
from concurrent.futures import Executor, Future

import jax

from sparse_lm.core.tree import Tree


class OnHost:
  """Compiles `function` for the host's CPU, runs it there and moves its outputs to the device.

  The initial state has random numbers and masks for every leaf of a model. XLA takes much longer to
  compile these for a GPU than it takes to compile them for the host, run them there and copy the results.
  Where an argument is traced, or JAX has no CPU backend, this is `jax.jit(function)`.

  Attributes:
    compiled: `jax.jit(function)`.
  """

  def __init__(self, function: Callable[..., Tree]) -> None:
    self.compiled = jax.jit(function)

  def __call__(self, *arguments: Tree) -> Tree:
    """The function's outputs."""
    device, host = jax.local_devices()[0], host_device()
    traced = any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(arguments))
    if traced or host is None or device == host:
      return self.compiled(*arguments)
    with jax.default_device(host):
      made = self.compiled(*jax.device_get(arguments))
    return jax.device_put(made, device)

  def later(self, pool: Executor, *arguments: Tree) -> tuple[Tree, Future[Tree]]:
    """The shape structs of the outputs, and a future of the outputs, which a thread of `pool` computes.

    The function is traced before this returns, because tracing uses state that threads share.
    """
    device, given = jax.local_devices()[0], jax.device_get(arguments)
    with jax.default_device(host_device() or device):
      lowered = self.compiled.lower(*given)
    made = pool.submit(lambda: jax.device_put(lowered.compile()(*given), device))
    return lowered.out_info, made


def host_device() -> jax.Device | None:
  """The host's CPU as a JAX device; `None` where JAX_PLATFORMS leaves out the CPU."""
  try:
    return jax.local_devices(backend='cpu')[0]
  except RuntimeError:  # JAX_PLATFORMS names other devices alone
    return None
