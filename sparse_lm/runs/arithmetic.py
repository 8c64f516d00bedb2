"""Choosing the precision and the attention kernel of a run on this device.

Both are chosen once, when a run is set up, and recorded, because 'auto' means different things on
different devices. config.json holds the chosen precision in place of 'auto', and `env.attention` in
result.json names the attention kernels that ran.
"""

import functools

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from sparse_lm.core.errors import UserError
from sparse_lm.kernels import attention, device
from sparse_lm.layers.spec import AUTO, precision_here
from sparse_lm.model.lm import LM
from sparse_lm.model.plans import plan_of


def resolved(config: ConfigDict) -> ConfigDict:
  """Returns the config with precision 'auto' replaced by this device's precision.

  Raises UserError for bfloat16 on a GPU without bfloat16 units.
  """
  precision = config.model.precision
  if precision == 'bfloat16' and device.is_old_gpu():
    raise UserError(
      f'config.model.precision={precision!r} does not run well on {device.name()}, which has no '
      "bfloat16 units; valid: 'float32', or 'auto'"
    )
  config = config.copy_and_resolve_references().unlock()
  config.model.precision = precision_here(precision)
  return config.lock()


def notes(asked: ConfigDict, reasons: tuple[str, ...]) -> list[str]:
  """Returns a sentence for each field of 'auto' that falls back to a slower choice on this accelerator.

  Args:
    asked: the config before `resolved`.
    reasons: why attention is not fused, from `attention_kernels`.
  """
  if asked.model.precision == AUTO and (device.is_old_gpu() or device.is_other_gpu()):
    why = 'has neither bfloat16 units nor fused attention'
    if device.is_other_gpu():
      why = 'is not an NVIDIA GPU: attention is not fused there, and bfloat16 was never timed there'
    return [f'config.model.precision={AUTO!r} is float32 on {device.name()}, which {why}']
  if reasons and asked.model.attention_kernel == AUTO:
    return [f'config.model.attention_kernel={AUTO!r} is {attention.EINSUM} here: {_first(reasons)}']
  return []


def attention_kernels(model: LM) -> tuple[tuple[str, ...], tuple[str, ...]]:
  """Returns the attention kernels of a training step on this device, and why some are not fused.

  Returns:
    The names of the kernels, and the reasons. There are no reasons on a device without fused attention.

  Raises UserError if `config.model.attention_kernel` asks for the fused kernel and it cannot run.
  """
  asked, fused = model.spec.attention_kernel, device.has_fused_attention()
  if asked != attention.CUDNN and (asked == attention.EINSUM or not fused):
    return (attention.EINSUM,), ()
  reasons = _calls_of_training(model)
  unfused = tuple(dict.fromkeys(filter(None, reasons)))
  lacking = (
    ''
    if fused
    else (
      'it needs cuDNN and an NVIDIA GPU of compute capability 8.0 or above, and this is '
      f'{device.name()}'
    )
  )
  if asked == attention.CUDNN and (lacking or unfused):
    raise UserError(
      f'config.model.attention_kernel={asked!r} cannot run here: {lacking or _first(unfused)}; valid: '
      f'{AUTO!r}, or {attention.EINSUM!r}'
    )
  used = {attention.EINSUM if reason else attention.CUDNN for reason in reasons}
  return tuple(sorted(used)), unfused


@functools.lru_cache(maxsize=32)
def _calls_of_training(model: LM) -> tuple[str, ...]:
  """Returns what `kernels.attention.why_unfused` says of each attention call of a training step."""
  tokens = jax.ShapeDtypeStruct((1, model.spec.context), jnp.int32)
  key = jax.random.key(0)
  run = functools.partial(
    model.apply, mode='train', mutable=True, rngs={'dropout': key, 'gates': key}
  )
  with attention.collect_fused_refusals() as found:
    jax.eval_shape(run, plan_of(model).variables, tokens)
  return tuple(found)


def _first(reasons: tuple[str, ...]) -> str:
  """Returns the first reason, and how many more there are."""
  more = f' (and {len(reasons) - 1} more)' if len(reasons) > 1 else ''
  return f'{reasons[0]}{more}'
