"""The capabilities of JAX's default device, by which kernels and precision are chosen."""

import jax
import jax.numpy as jnp

# NVIDIA's GPUs from A100 (2020) on. Those before have no fast bfloat16, and cuDNN's fused attention
# does not run on them.
_FIRST_WITH_BFLOAT16 = 8, 0


# XLA merges matmuls that share an operand into one, by default up to 32 MB each. cuDNN's attention takes
# queries, keys and values as separate arrays, so after a merged projection XLA copies the three parts out
# of its result, and copies their gradients together again. Large matmuls are no faster for being merged;
# small ones are.
_LARGEST_MERGED = 8  # MB


def compiler_options() -> dict[str, int] | None:
  """The compiler options of `jax.jit` for a training step on this device; `None` = the defaults."""
  if compute_capability() is None:
    return None
  return {'xla_gpu_dot_merger_threshold_mb': _LARGEST_MERGED}


def compute_capability() -> tuple[int, int] | None:
  """NVIDIA's compute capability of the GPU that arrays are on, `None` on any other device."""
  device = jax.local_devices()[0]
  if device.platform != 'gpu' or 'cuda' not in device.client.platform_version:
    return None
  major, minor = device.compute_capability.split('.')
  return int(major), int(minor)


def name() -> str:
  """The device's name, with its compute capability if it is an NVIDIA GPU."""
  capability, kind = compute_capability(), jax.local_devices()[0].device_kind
  if capability is None:
    return kind
  major, minor = capability
  return f'{kind} (compute capability {major}.{minor})'


def is_recent_gpu() -> bool:
  """Whether arrays are on an NVIDIA GPU with fast bfloat16: since A100."""
  capability = compute_capability()
  return capability is not None and capability >= _FIRST_WITH_BFLOAT16


def is_old_gpu() -> bool:
  """Whether arrays are on an NVIDIA GPU without fast bfloat16, such as a T4."""
  return compute_capability() is not None and not is_recent_gpu()


def is_other_gpu() -> bool:
  """Whether arrays are on a GPU that is not NVIDIA's, of whose units nothing is known here."""
  return jax.local_devices()[0].platform == 'gpu' and compute_capability() is None


def has_fast_bfloat16() -> bool:
  """Whether bfloat16 is faster than float32 here: on newer NVIDIA GPUs, and on TPUs."""
  return jax.default_backend() == 'tpu' or is_recent_gpu()


def has_fused_attention() -> bool:
  """Whether cuDNN's fused attention runs here.

  Besides the compute capability, JAX itself is asked whether it finds a version of cuDNN that supports
  the GPU.
  """
  if not is_recent_gpu():
    return False
  one = jax.ShapeDtypeStruct((1, 64, 1, 64), jnp.bfloat16)
  attend = jax.nn.dot_product_attention
  try:
    jax.eval_shape(
      lambda q, k, v: attend(q, k, v, is_causal=True, implementation='cudnn'), one, one, one
    )
  except (NotImplementedError, RuntimeError):
    return False
  return True
