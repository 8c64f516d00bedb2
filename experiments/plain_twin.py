"""The default architecture in plain Flax, a reference for the speed of the training step.

It computes the same function as `model/lm.py` with `activation.name=gelu`: a test copies the parameters
and compares logits. It is written with `nn.Dense`, `nn.RMSNorm`, `jax.nn.dot_product_attention` and the
erf GELU, without slots, masks or a count of costs.
"""

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from flax.training.train_state import TrainState

from sparse_lm.core.tree import Tree
from sparse_lm.layers.spec import Spec


def _rotary(x: jax.Array, positions: jax.Array) -> jax.Array:
  half = x.shape[-1] // 2
  angle = positions[:, None, None] / 10_000.0 ** (jnp.arange(half) / half)
  cos, sin = jnp.cos(angle), jnp.sin(angle)
  a, b = x[..., :half], x[..., half:]
  return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1)


class PlainBlock(nn.Module):
  """One pre-norm layer of attention and MLP."""

  spec: Spec

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Maps activations `[B, L, D]` to `[B, L, D]`."""
    b, l, d = x.shape
    spec = self.spec
    h = nn.RMSNorm(epsilon=1e-5, name='norm_1')(x)
    q, k, v = (
      nn.Dense(d, use_bias=False, name=name)(h).reshape(b, l, spec.heads, spec.head_dim)
      for name in ('query', 'key', 'value')
    )
    positions = jnp.arange(l)
    q, k = _rotary(q, positions), _rotary(k, positions)
    out = jax.nn.dot_product_attention(q, k, v, is_causal=True).reshape(b, l, d)
    x = x + nn.Dense(d, use_bias=False, name='out')(out)
    h = nn.RMSNorm(epsilon=1e-5, name='norm_2')(x)
    h = nn.gelu(nn.Dense(spec.hidden, use_bias=False, name='up')(h), approximate=False)
    return x + nn.Dense(d, use_bias=False, name='down')(h)


class PlainLM(nn.Module):
  """A language model of pre-norm layers."""

  spec: Spec

  @nn.compact
  def __call__(self, tokens: jax.Array) -> jax.Array:
    """Maps int32 tokens `[B, L]` to logits `[B, L, V]`."""
    spec = self.spec
    x = nn.Embed(spec.vocab, spec.width, name='embed')(tokens)
    for layer in range(spec.layers):
      x = PlainBlock(spec, name=f'block_{layer}')(x)
    x = nn.RMSNorm(epsilon=1e-5, name='norm')(x)
    return nn.Dense(spec.vocab, use_bias=False, name='head')(x)


def create(spec: Spec, tx: optax.GradientTransformation, seed: int) -> TrainState:
  """Creates Flax's train state at step 0."""
  model = PlainLM(spec)
  tokens = jnp.zeros((1, spec.context), jnp.int32)
  params = model.init(jax.random.key(seed), tokens)['params']
  return TrainState.create(apply_fn=model.apply, params=params, tx=tx)


def train_step(state: TrainState, tokens: jax.Array) -> tuple[TrainState, jax.Array]:
  """Runs one optimizer step on tokens `[B, L + 1]`. Returns the new state and the loss."""

  def loss(params: Tree) -> jax.Array:
    logits = state.apply_fn({'params': params}, tokens[:, :-1])
    return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

  value, grads = jax.value_and_grad(loss)(state.params)
  return state.apply_gradients(grads=grads), value
