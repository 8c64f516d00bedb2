"""A mixture of experts by itself, and its experts in NumPy: what tests of routers share."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from configs import base
from sparse_lm.core import tree
from sparse_lm.layers.sow import SOWN
from sparse_lm.layers.spec import Spec
from sparse_lm.model import slots
from sparse_lm.plan import sites

BATCH, LENGTH, WIDTH, HIDDEN, EXPERTS = 3, 8, 8, 12, 6
# Plain gradient descent: rounding is not amplified, so routing stays comparable.
SGD = {
  'optimizer__name': 'sgd',
  'optimizer__schedule': 'constant',
  'optimizer__warmup': 0.0,
  'optimizer__weight_decay': 0.1,
  'optimizer__learning_rate': 0.1,
}


def mixture(name, **fields):
  config = base.get_config()
  config.model.update({'width': WIDTH, 'hidden': HIDDEN, 'bias': True})
  spec = Spec.from_config(config.model, vocab=11, context=LENGTH)
  relu2 = functools.partial(slots.method('activation', 'relu2'), name='activation')
  cls = slots.method('mlp', name)
  return cls(spec=spec, activation=relu2, **{'experts': EXPERTS, **fields})


@functools.cache
def applied(module, mode):
  """`(variables, x) -> (y, what was sown and the router's state)`."""
  return jax.jit(lambda v, x: module.apply(v, x, mode, mutable=[*SOWN, 'router']))


def numbers(module, seed, shape=(BATCH, LENGTH, WIDTH)):
  """Random parameters and state, and inputs."""
  draw = np.random.default_rng(seed)
  x = draw.standard_normal(shape).astype('f')
  found = jax.eval_shape(lambda: module.init(jax.random.key(0), x, 'eval'))
  kept = {name: found[name] for name in ('params', 'router')}
  return jax.tree.map(lambda a: draw.normal(0, 0.5, a.shape).astype('f'), kept), x


def mlp(p, x):
  """Squared ReLU between two matrices."""
  return np.maximum(x @ np.float64(p['up']) + p['up_bias'], 0) ** 2 @ p['down'] + p['down_bias']


def by_loop(params, x_TxD, weight_TxE):
  """Every token through the experts of non-zero weight, and through the shared ones."""
  y_TxD = np.zeros(x_TxD.shape)
  for t, e in zip(*np.nonzero(weight_TxE)):
    own = {name: a[e] for name, a in params['experts'].items()}
    y_TxD[t] += weight_TxE[t, e] * mlp(own, x_TxD[t])
  if 'shared' in params:
    flat = tree.named(params['shared'])
    names = {
      'up/kernel': 'up',
      'up/bias': 'up_bias',
      'down/kernel': 'down',
      'down/bias': 'down_bias',
    }
    y_TxD += mlp({short: flat[path] for path, short in names.items()}, x_TxD)
  return y_TxD


@functools.cache
def _reads(model):
  return jax.jit(lambda v, t: sites.run(model, v, t, read=['*mlp/router/*'])[1])


def router_logits(model, state, tokens):
  """By layer, the logits `[T, E]` of its router at the state of a run, for all tokens of a batch."""
  variables = {'params': state.trainable['params'], **state.model_state}
  found = _reads(model)(variables, tokens[:, :-1])
  return {
    path.removesuffix('/router/output'): np.float64(a).reshape(-1, a.shape[-1])
    for path, a in found.items()
    if path.endswith('output')
  }


def steps(run, batches, start):
  """The states of a run on the host, from `start` on, and what its steps logged."""
  # Steps donate their state, and `start` serves other runs too.
  state, states, logged = jax.tree.map(jnp.copy, start), [start], []
  for tokens in batches:
    state, metrics = run.program.step(len(logged))(state, tokens)
    states.append(jax.device_get(state))
    logged.append(jax.device_get(metrics))
  return states, logged
