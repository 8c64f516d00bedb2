"""Capabilities of JAX's default device, which decide the kernels and the precision."""

import jax
import jax.numpy as jnp

# NVIDIA GPUs since the A100 (2020). Older ones have no fast bfloat16 and cannot run cuDNN's fused
# attention.
_FIRST_WITH_BFLOAT16 = 8, 0


# XLA merges matmuls that share an operand, by default up to 32 MB each. But cuDNN's attention takes
# queries, keys and values as separate arrays, so XLA must split the result of a merged projection by
# copies, and concatenate the gradients by copies. Merging makes small matmuls faster, but not large
# ones.
_LARGEST_MERGED = 8  # MB


def compiler_options() -> dict[str, int] | None:
  """Returns the compiler options of a training step on this device; `None` means the defaults."""
  if compute_capability() is None:
    return None
  return {'xla_gpu_dot_merger_threshold_mb': _LARGEST_MERGED}


def compute_capability() -> tuple[int, int] | None:
  """Returns the compute capability of an NVIDIA GPU, and `None` for any other device."""
  device = jax.local_devices()[0]
  if device.platform != 'gpu' or 'cuda' not in device.client.platform_version:
    return None
  major, minor = device.compute_capability.split('.')
  return int(major), int(minor)


def name() -> str:
  """Returns the device's name, with the compute capability of an NVIDIA GPU."""
  capability, kind = compute_capability(), jax.local_devices()[0].device_kind
  if capability is None:
    return kind
  major, minor = capability
  return f'{kind} (compute capability {major}.{minor})'


def is_recent_gpu() -> bool:
  """Returns whether the device is an NVIDIA GPU with fast bfloat16 (since the A100)."""
  capability = compute_capability()
  return capability is not None and capability >= _FIRST_WITH_BFLOAT16


def is_old_gpu() -> bool:
  """Returns whether the device is an NVIDIA GPU without fast bfloat16, such as a T4."""
  return compute_capability() is not None and not is_recent_gpu()


def is_other_gpu() -> bool:
  """Returns whether the device is a GPU of another vendor, whose capabilities are unknown here."""
  return jax.local_devices()[0].platform == 'gpu' and compute_capability() is None


def has_fast_bfloat16() -> bool:
  """Returns whether bfloat16 is faster than float32: on TPUs and recent NVIDIA GPUs."""
  return jax.default_backend() == 'tpu' or is_recent_gpu()


def has_fused_attention() -> bool:
  """Returns whether cuDNN's fused attention runs on this device.

  Checks the compute capability, and whether JAX finds a cuDNN version that supports the GPU.
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
