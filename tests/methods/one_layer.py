"""A layer of a few units around a block that is written twice: what the tests of the depth slot share."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from hypothesis import strategies as st

from configs import base
from sparse_lm.core.estimator import ESTIMATORS
from sparse_lm.layers.sow import SOWN
from sparse_lm.layers.spec import Spec
from sparse_lm.layers.tokens import Tokens
from sparse_lm.model import slots
from sparse_lm.model.block import Block

BATCH, LENGTH, WIDTH, HIDDEN, VOCAB = 2, 8, 8, 12, 11
SEEDS = st.integers(0, 2**31)
MODES = pytest.mark.parametrize('mode', ('train', 'eval'))
BY_ESTIMATOR = pytest.mark.parametrize('estimator', ESTIMATORS)
DRAWS = {'gates': jax.random.key(5)}
HERE = 0.7  # of what the block reads of its own token


def small(**depth):
  config = base.get_config()
  config.data.context = LENGTH
  config.model.update({'layers': 2, 'width': WIDTH, 'hidden': HIDDEN, 'heads': 2, 'kv_heads': 2})
  with config.unlocked():
    config.depth.update(depth)
  return config


SPEC = Spec.from_config(small().model, vocab=VOCAB, context=LENGTH)


def plain_block(tokens, mode):
  """A block that is soon written twice: reads earlier valid tokens, the less the farther away."""
  apart = tokens.positions[:, :, None] - tokens.positions[:, None, :]
  reads = jnp.where((apart > 0) & tokens.valid[:, None, :], 1 / (1 + jnp.abs(apart)), 0.0)
  return jnp.tanh(HERE * tokens.x + jnp.einsum('bls,bsd->bld', reads, tokens.x))


def plain_loop(x_BxLxD, positions_BxL, enters_BxL):
  """What it returns for tokens that enter, which are all that it reads; zeros for the others."""
  y = np.zeros(x_BxLxD.shape)
  for b, t in zip(*np.nonzero(enters_BxL)):
    total = HERE * x_BxLxD[b, t].astype(np.float64)
    for s in np.flatnonzero(enters_BxL[b, :t]):
      total += x_BxLxD[b, s] / (1 + positions_BxL[b, t] - positions_BxL[b, s])
    y[b, t] = np.tanh(total)
  return y


class Layer(nn.Module):
  """One layer as the model builds it."""

  depth: Callable[[], nn.Module]
  real: bool

  @nn.compact
  def __call__(self, x, positions, valid, mode):
    block = REAL(name='block') if self.real else plain_block
    return self.depth()(block, Tokens(x, positions, valid), mode)


def method(slot, name, /, **fields):
  return functools.partial(slots.method(slot, name), **fields)


REAL = functools.partial(
  Block,
  SPEC,
  method('attention', 'full', spec=SPEC, name='attention'),
  method('mlp', 'dense', spec=SPEC, name='mlp', activation=method('activation', 'relu2')),
)


@functools.cache
def layer(name, /, real=False, **fields):
  spec = {} if name == 'residual' else {'spec': SPEC}
  return Layer(method('depth', name, name='depth', **spec, **fields), real)


@functools.cache
def applied(module, mode):
  """`(params, x, positions, valid, rngs) -> (y, what was sown)`."""
  return jax.jit(
    lambda params, x, positions, valid, rngs=None: module.apply(
      {'params': params}, x, positions, valid, mode, rngs=rngs, mutable=list(SOWN)
    )
  )


@functools.cache
def shapes(module):
  inputs = jnp.zeros((1, LENGTH, WIDTH)), jnp.zeros((1, LENGTH), int), jnp.ones((1, LENGTH), bool)
  return jax.eval_shape(lambda: module.init(jax.random.key(0), *inputs, 'eval')).get('params', {})


def numbers(module, seed, batch=BATCH):
  """Random parameters, inputs, places with gaps between them, and no token that is not valid."""
  draw = np.random.default_rng(seed)
  params = jax.tree.map(lambda a: draw.normal(0, 0.5, a.shape).astype('f'), shapes(module))
  x = draw.normal(0, 2, (batch, LENGTH, WIDTH)).astype('f')
  positions = np.cumsum(draw.integers(1, 4, (batch, LENGTH)), axis=1)
  return params, (x, positions, np.ones((batch, LENGTH), bool))


def unit(x):
  x = x.astype(np.float64)
  return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5)


def sigmoid(logits):
  return 1 / (1 + np.exp(-logits))
