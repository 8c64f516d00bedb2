"""The arithmetic of a run on this device: its precision, and the kernel of its attention.

Both are decided once, when a run is set up, and recorded, because 'auto' means different things on
different devices: config.json holds the precision itself in place of 'auto', and `env.attention` in
result.json names the kernels that attention ran.
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
  """The config with the precision that 'auto' stands for on this device; any other precision stays.

  Raises UserError for bfloat16 on a GPU that cannot run it well.
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
  """A line for each 'auto' of a config that does not stand for the fast choice on this accelerator.

  Args:
    asked: the config before `resolved`.
    reasons: the reasons that `attention_kernels` returns.
  """
  if asked.model.precision == AUTO and (device.is_old_gpu() or device.is_other_gpu()):
    why = 'has neither bfloat16 units nor fused attention'
    if device.is_other_gpu():
      why = 'is no NVIDIA GPU: whether bfloat16 is faster there is not known, and attention is not fused'
    return [f'config.model.precision={AUTO!r} is float32 on {device.name()}, which {why}']
  if reasons and asked.model.attention_kernel == AUTO:
    return [f'config.model.attention_kernel={AUTO!r} is {attention.EINSUM} here: {_first(reasons)}']
  return []


def attention_kernels(model: LM) -> tuple[tuple[str, ...], tuple[str, ...]]:
  """The kernels that attention runs in a training step on this device, and why not all of them are fused.

  Returns:
    The names of the kernels, and the reasons, of which there are none on a device without fused
    attention.

  Raises UserError where `config.model.attention_kernel` asks for the fused one and it cannot run.
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
  """What `kernels.attention.why_unfused` says of each call of attention in a training step."""
  tokens = jax.ShapeDtypeStruct((1, model.spec.context), jnp.int32)
  key = jax.random.key(0)
  run = functools.partial(
    model.apply, mode='train', mutable=True, rngs={'dropout': key, 'gates': key}
  )
  with attention.collect_fused_refusals() as found:
    jax.eval_shape(run, plan_of(model).variables, tokens)
  return tuple(found)


def _first(reasons: tuple[str, ...]) -> str:
  """The first of several reasons, with the number of the others."""
  more = f' (and {len(reasons) - 1} more)' if len(reasons) > 1 else ''
  return f'{reasons[0]}{more}'
