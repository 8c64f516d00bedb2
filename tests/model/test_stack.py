"""Stack methods run the layers and may pass anything from one layer to the next."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose

from sparse_lm.model import lm, plans
from sparse_lm.plan import executed

VOCAB, LENGTH = 11, 16
HEADER = '''
  """A stack method of a user's."""

  import jax
  import jax.numpy as jnp

  from sparse_lm.core.ranges import ranged
  from sparse_lm.layers.method import LayerMethod, Traits
  from sparse_lm.plan import record
  from sparse_lm.plan.cost import Gating
  from sparse_lm.layers.sow import sow


'''
# Runs the whole stack several times over, with the same weights.
RECURSION = """
  class Recursion(LayerMethod):
    times: int = ranged(3, '[1, 2^10]')

    @property
    def traits(self):
      return Traits(paper='Dehghani et al. 2018', saves='nothing')

    def __call__(self, layers, tokens, mode):
      x = tokens.x
      for _ in range(self.times):
        for run in layers:
          x = run(tokens.replace(x=x), mode)
      return x
"""
# A token leaves for good once its norm exceeds a bound; the carry says which are still there.
EXIT = """
  class EarlyExit(LayerMethod):
    bound: float = ranged(4.0, '(0, inf)')

    @property
    def traits(self):
      return Traits(
        paper='Graves 2016',
        saves='the layers after the one at which a token leaves',
        twin='sequential',
        gating=Gating(planned=1.0, skips=False),
      )

    def __call__(self, layers, tokens, mode):
      x, stays = tokens.x, tokens.valid
      ran = jnp.zeros(stays.shape, jnp.float32)
      for run in layers:
        with record.gated(self.path, self.traits.gating):
          after = run(tokens.replace(x=x, valid=stays), mode)
        x = jnp.where(stays[..., None], after, x)
        ran += stays / len(layers)
        stays &= jnp.linalg.norm(x, axis=-1) < self.bound
      sow(self, 'gates', 'active', ran)
      return x
"""


def model_of(tiny_config, **fields):
  model = lm.from_config(tiny_config(model__layers=3, **fields), VOCAB)
  tokens = jax.random.randint(jax.random.key(0), (2, LENGTH), 0, VOCAB)
  variables = jax.jit(model.init)(jax.random.key(1), tokens)
  draw = np.random.default_rng(0)
  head = variables['params']['embed']['head']['kernel']
  variables['params']['embed']['head']['kernel'] = jnp.asarray(draw.normal(size=head.shape), 'f')
  return model, {'params': variables['params']}, tokens


def layers_of(model, variables, x_BxLxD):
  """The residual stream before the first layer and after each, one module after the other."""
  found = [x_BxLxD]
  for layer in range(model.spec.layers):
    own = (f'block_{layer}', f'depth_{layer}')
    params = {name: variables['params'][name] for name in own if name in variables['params']}
    module = lm.Layer(model.spec, model.slots, layer, model.site)
    found.append(module.apply({'params': params}, found[-1]))
  return found


def logits_after(model, variables, x_BxLxD):
  """By a model that has no layers left."""
  params = variables['params']
  scale = params['norm']['scale']
  unit = x_BxLxD / np.sqrt(np.mean(np.square(x_BxLxD), axis=-1, keepdims=True) + 1e-5)
  return (unit * scale) @ params['embed']['head']['kernel']


@pytest.mark.slow
def test_a_stack_may_run_its_layers_again(method, tiny_config):
  method('stack', 'recursion', HEADER + RECURSION)
  model, variables, tokens = model_of(tiny_config, stack__name='recursion', stack__times=2)
  x = variables['params']['embed']['tokens'][tokens]
  for _ in range(2):
    x = layers_of(model, variables, x)[-1]
  want = logits_after(model, variables, np.asarray(x))
  assert_allclose(model.apply(variables, tokens), want, rtol=1e-4, atol=1e-4)
  # Twice the FLOPs of every layer, and each kernel in the ledger.
  once, _, _ = model_of(tiny_config)
  found, single = plans.ledger(model, LENGTH), plans.ledger(once, LENGTH)
  assert found.keys() == single.keys()
  for path, matmul in found.items():
    factor = 2 if path.startswith('block_') else 1
    assert matmul.flops == factor * single[path].flops, path


def test_a_stack_can_carry_which_tokens_have_exited(method, tiny_config):
  method('stack', 'early_exit', HEADER + EXIT)
  model, variables, tokens = model_of(tiny_config, stack__name='early_exit', stack__bound=4.7)
  x = variables['params']['embed']['tokens'][tokens]
  # With as many tokens as there are, none reads another: a token alone tells which layers it runs.
  first, alone = tokens[:, :1], x[:, :1]
  streams = layers_of(model, variables, alone)
  norms = [np.linalg.norm(stream, axis=-1) for stream in streams]
  want, left = np.array(streams[1]), norms[1] >= 4.7
  for stream, norm in zip(streams[2:], norms[2:]):
    want = np.where(left[..., None], want, stream)
    left |= norm >= 4.7
  logits, sown = model.apply(variables, first, mutable=['gates'])
  assert_allclose(logits, logits_after(model, variables, want), rtol=1e-4, atol=1e-4)
  active = np.asarray(sown['gates']['stack']['active'])
  assert active.min() > 0 and active.max() <= 1 + 1e-6
  ledger = plans.ledger(model, LENGTH)
  gates = {path: [gate.path for gate in matmul.gates] for path, matmul in ledger.items()}
  assert all(found == ['stack'] for path, found in gates.items() if path.startswith('block_'))
  assert not executed.differences(ledger, plans.traced(model, LENGTH)).get(executed.NO_REASON)
  assert lm.dense_twin(model).stack.name == 'sequential'


def test_embeddings_enter_in_place_of_tokens(tiny_config):
  for fields in ({}, {'model__positions': 'learned', 'model__precision': 'bfloat16'}):
    model, variables, tokens = model_of(tiny_config, **fields)
    embeddings = variables['params']['embed']['tokens'][tokens]
    want = model.apply(variables, tokens)
    assert_allclose(model.apply(variables, embeddings_BxLxD=embeddings), want, rtol=1e-6, atol=1e-6)
    # Anything of the model's width may enter, and every vector counts.
    image = jax.random.normal(jax.random.key(2), (2, LENGTH, model.spec.width))
    moved = model.apply(variables, embeddings_BxLxD=image.at[:, 3].add(1.0))
    before = model.apply(variables, embeddings_BxLxD=image)
    assert np.abs(moved - before)[:, 3:].max() > 1e-3
    assert_allclose(moved[:, :3], before[:, :3], rtol=1e-5, atol=1e-5)
  for given in ({}, {'tokens_BxL': tokens, 'embeddings_BxLxD': embeddings}):
    with pytest.raises(ValueError, match='exactly one of tokens_BxL'):
      model.apply(variables, **given)
