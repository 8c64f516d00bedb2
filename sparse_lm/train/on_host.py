"""Compiles functions that run only once for the host's CPU, and traces without garbage collection."""

import contextlib
import gc
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future

import jax

from sparse_lm.core.tree import Tree


class OnHost:
  """Compiles `function` for the host's CPU, runs it there and copies its outputs to the device.

  The initial state has random numbers and masks for every leaf of a model. Compiling them for a GPU takes
  XLA much longer than compiling and running them on the host and copying the results. If an argument is
  traced, or JAX has no CPU backend, this is `jax.jit(function)`.

  Attributes:
    compiled: `jax.jit(function)`.
  """

  def __init__(self, function: Callable[..., Tree]) -> None:
    self.compiled = jax.jit(function)

  def __call__(self, *arguments: Tree) -> Tree:
    """Returns the function's outputs, on the device."""
    device, host = jax.local_devices()[0], host_device()
    traced = any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(arguments))
    if traced or host is None or device == host:
      return self.compiled(*arguments)
    with jax.default_device(host):
      made = self.compiled(*jax.device_get(arguments))
    return jax.device_put(made, device)

  def later(self, pool: Executor, *arguments: Tree) -> tuple[Tree, Future[Tree]]:
    """Returns shape structs of the outputs, and a future of the outputs, which `pool` computes.

    The function is traced before this returns, because tracing uses state that threads share.
    """
    device, given = jax.local_devices()[0], jax.device_get(arguments)
    with jax.default_device(host_device() or device):
      lowered = self.compiled.lower(*given)
    made = pool.submit(lambda: jax.device_put(lowered.compile()(*given), device))
    return lowered.out_info, made


def host_device() -> jax.Device | None:
  """Returns the host's CPU as a JAX device; `None` if JAX_PLATFORMS excludes the CPU."""
  try:
    return jax.local_devices(backend='cpu')[0]
  except RuntimeError:  # JAX_PLATFORMS names only other devices
    return None


@contextlib.contextmanager
def no_garbage_collected() -> Iterator[None]:
  """Pauses Python's garbage collector, because tracing makes many objects and would often trigger it."""
  enabled = gc.isenabled()
  gc.disable()
  try:
    yield
  finally:
    if enabled:
      gc.enable()
