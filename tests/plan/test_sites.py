"""Activation sites are read and replaced, against a model in NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from numpy.testing import assert_allclose

from sparse_lm.core.errors import UserError
from sparse_lm.layers.linear import Linear
from sparse_lm.model import lm
from sparse_lm.model.plans import plan_of
from sparse_lm.plan import record, sites

LAYERS, WIDTH, HIDDEN, HEADS, KEY_HEADS, VOCAB, LENGTH, BATCH = 2, 16, 24, 4, 2, 11, 16, 2
HEAD = WIDTH // HEADS
FIELDS = {
  'model.layers': LAYERS,
  'model.hidden': HIDDEN,
  'model.heads': HEADS,
  'model.kv_heads': KEY_HEADS,
  'model.bias': True,
  'activation.name': 'relu',
}
TOKENS = np.random.default_rng(0).integers(VOCAB, size=(BATCH, LENGTH)).astype(np.int32)


@pytest.fixture(scope='module')
def model(tiny_config):
  return lm.from_config(tiny_config(**FIELDS), VOCAB)


@pytest.fixture(scope='module')
def params(model):
  return drawn(model)


def drawn(model):
  draw = np.random.default_rng(1).normal
  return jax.tree.map(
    lambda a: draw(0.5 * (a.ndim == 1), 0.3, a.shape).astype('f'), plan_of(model).params
  )


def normed(x, scale):
  return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + 1e-5) * scale


def rotated(x_BxLxHxK):
  """Pairs of features as complex numbers, turned by their position."""
  half = HEAD // 2
  turns = np.arange(LENGTH)[:, None] * 10_000.0 ** (-np.arange(half) / half)
  pairs = x_BxLxHxK[..., :half] + 1j * x_BxLxHxK[..., half:]
  pairs = pairs * np.exp(1j * turns)[None, :, None]
  return np.concatenate([pairs.real, pairs.imag], axis=-1)


def softmax(x):
  e = np.exp(x - x.max(axis=-1, keepdims=True))
  return e / e.sum(axis=-1, keepdims=True)


def by_numpy(params, replace=None):
  """Logits and the activations at every site, in float64; `replace` as `sites.run` takes it."""
  seen = {}

  def site(name, value):
    seen[name] = (replace or {}).get(name, lambda v: v)(value)
    return seen[name]

  def linear(name, x):
    layer = functools.reduce(lambda node, key: node[key], name.split('/'), params)
    return site(f'{name}/output', site(f'{name}/input', x) @ layer['kernel'] + layer['bias'])

  def heads(name, y):
    return y.reshape(BATCH, LENGTH, -1, HEAD)

  x = np.float64(params['embed']['tokens'])[TOKENS]
  for i in range(LAYERS):
    x, at = site(f'residual_{i}', x), f'block_{i}'
    site(f'{at}/valid', np.ones((BATCH, LENGTH), bool))
    h = site(f'{at}/attention/input', normed(x, params[at]['norm_1']['scale']))
    q, k, v = (heads(n, linear(f'{at}/attention/{n}', h)) for n in ('query', 'key', 'value'))
    q, k = site(f'{at}/attention/q', rotated(q)), site(f'{at}/attention/k', rotated(k))
    v = site(f'{at}/attention/v', v)
    groups = HEADS // KEY_HEADS
    scores = np.einsum('blgrk,bsgk->bgrls', q.reshape(BATCH, LENGTH, KEY_HEADS, groups, HEAD), k)
    later = np.arange(LENGTH)[None, :] > np.arange(LENGTH)[:, None]
    weights = softmax(np.where(later, -np.inf, scores / np.sqrt(HEAD)))
    weights = site(f'{at}/attention/attention/weights', weights)
    out = np.einsum('bgrls,bsgk->blgrk', weights, v).reshape(BATCH, LENGTH, WIDTH)
    a = site(f'{at}/attention/output', linear(f'{at}/attention/out', out))
    h = site(f'{at}/mlp/input', normed(x + a, params[at]['norm_2']['scale']))
    h = linear(f'{at}/mlp/up', h)
    h = site(f'{at}/mlp/hidden', np.maximum(h, 0))
    x = x + a + site(f'{at}/mlp/output', linear(f'{at}/mlp/down', h))
  x = normed(site(f'residual_{LAYERS}', x), params['norm']['scale'])
  return linear('embed/head', x), seen


def run(model, params, **acts):
  """Compiled."""
  return jax.jit(lambda p: sites.run(model, {'params': p}, TOKENS, **acts))(params)


def test_every_site_holds_what_numpy_computes_there(model, params):
  logits, seen = run(model, params, read=['*'])
  want, all_ = by_numpy(params)
  assert_allclose(logits, want, rtol=1e-4, atol=1e-4)
  # The plan lists them all, in the order of the forward pass.
  assert list(plan_of(model).sites) == list(all_) and set(seen) == set(all_)
  for name, value in seen.items():
    assert_allclose(value, all_[name], rtol=1e-4, atol=1e-4, err_msg=name)
    assert value.shape == (BATCH, *plan_of(model).sites[name].shape[1:])
    assert value.dtype == plan_of(model).sites[name].dtype


def test_names_are_stable_and_patterns_select_them(model, params):
  _, seen = run(model, params, read=['*/hidden', 'residual_2', 'block_1/attention/[qk]'])
  assert set(seen) == {
    'block_0/mlp/hidden', 'block_1/attention/q', 'block_1/attention/k', 'block_1/mlp/hidden',
    'residual_2',
  }  # fmt: skip
  kernels = {path for path, leaf in plan_of(model).shapes.items() if leaf.ndim > 1}
  inputs = {path: site.name for path, site in plan_of(model).inputs.items()}
  assert inputs == {
    path: path.replace('kernel', 'input') for path in kernels if path != 'embed/tokens'
  }


def test_a_heads_output_is_zeroed_as_without_its_rows_of_the_projection(model, params):
  head = slice(HEAD, 2 * HEAD)
  name = 'block_1/attention/out/input'
  got, seen = run(model, params, replace={name: lambda x: x.at[..., head].set(0)}, read=[name])
  cut = jax.tree.map(np.copy, params)
  cut['block_1']['attention']['out']['kernel'][head] = 0
  want = model.apply({'params': cut}, TOKENS)
  assert_allclose(got, want, rtol=1e-4, atol=1e-4)
  assert not np.any(seen[name][..., head]) and np.all(np.any(seen[name], axis=(0, 1))[:HEAD])
  assert np.abs(got - model.apply({'params': params}, TOKENS)).max() > 0.01


VECTOR = np.random.default_rng(2).normal(size=WIDTH).astype('f')
REPLACED = {
  'a vector in the residual stream': {'residual_1': lambda x: x + VECTOR},
  'what attention adds': {'block_0/attention/output': lambda a: a * 0.5},
  'what the MLP adds': {'block_1/mlp/output': lambda m: m * 0},
  'queries and values': {
    'block_0/attention/q': lambda q: q * 2,
    'block_1/attention/v': lambda v: v[..., ::-1],
  },
  'attention weights': {'block_0/attention/attention/weights': lambda w: w[:, ::-1]},
  'hidden units': {'block_0/mlp/hidden': lambda h: h * (h > 0.5)},
  'the last residual stream': {'residual_2': lambda x: x - VECTOR},
}


@pytest.mark.parametrize('remat', ['none', 'full'])
@pytest.mark.parametrize('what', REPLACED)
def test_replaced_activations_give_what_numpy_computes_with_them(what, remat, tiny_config, params):
  model = lm.from_config(tiny_config(**FIELDS, model__remat=remat), VOCAB)
  got, seen = run(model, params, replace=REPLACED[what], read=list(REPLACED[what]))
  want, all_ = by_numpy(params, REPLACED[what])
  assert_allclose(got, want, rtol=1e-4, atol=1e-4)
  for name, value in seen.items():
    assert_allclose(value, all_[name], rtol=1e-4, atol=1e-4)
  assert np.abs(want - by_numpy(params)[0]).max() > 0.01


def test_a_run_can_be_differentiated_and_mapped(model, params):
  def total(vector):
    replace = {'residual_1': lambda x: x + vector}
    return jnp.sum(sites.run(model, {'params': params}, TOKENS, replace=replace)[0] ** 2)

  def by_hand(vector):
    return np.sum(by_numpy(params, {'residual_1': lambda x: x + vector})[0] ** 2)

  grad = jax.jit(jax.grad(total))(VECTOR)
  step = 1e-4 * np.eye(WIDTH)
  slopes = [(by_hand(VECTOR + s) - by_hand(VECTOR - s)) / 2e-4 for s in step]
  assert_allclose(grad, slopes, rtol=1e-2, atol=1e-2 * np.abs(slopes).max())
  vectors = np.stack([VECTOR, 0 * VECTOR])
  want = [by_hand(vector) for vector in vectors]
  assert_allclose(jax.jit(jax.vmap(total))(vectors), want, rtol=1e-4)


SLOTS = {
  'experts': {'mlp.name': 'moe_topk'},
  'gates': {'depth.name': 'token_gate', 'attention.name': 'head_gate', 'mlp.name': 'gated'},
  'predictor': {'mlp.name': 'predictor_topk', 'activation.name': 'topk', 'model.tied': True},
}


@pytest.mark.parametrize('mode', ['train', 'eval', 'decode'])
@pytest.mark.parametrize('slots', SLOTS)
def test_sites_that_nobody_acts_on_leave_the_program_as_it_is(
  slots, mode, tiny_config, monkeypatch
):
  model = lm.from_config(tiny_config(**SLOTS[slots]), VOCAB)
  variables = dict(plan_of(model).variables)
  if mode == 'decode':
    variables['cache'] = lm.cache_shapes(model, variables, BATCH)

  def program():
    rngs, mutable = {'gates': jax.random.key(0)}, ['cache'] if mode == 'decode' else True
    apply = lambda v, t: model.apply(v, t, mode=mode, rngs=rngs, mutable=mutable)  # noqa: E731
    tokens = TOKENS[:, :1] if mode == 'decode' else TOKENS
    return str(jax.make_jaxpr(apply)(variables, tokens))

  with_sites = program()
  monkeypatch.setattr(record, 'site', lambda module, name, value, kernel=None: value)
  monkeypatch.setattr(record, 'hook', lambda module, name: None)
  assert program() == with_sites


def test_an_unknown_site_is_refused_with_the_nearest_name(model, params):
  for acts in ({'read': ['block_0/mlp/hiden']}, {'replace': {'block_0/mlp/hiden': lambda x: x}}):
    with pytest.raises(UserError, match=r"unknown site 'block_0/mlp/hiden': did you mean") as e:
      run(model, params, **acts)
    assert 'block_*/mlp/hidden' in str(e.value) and '\n' not in str(e.value)


def test_a_replacement_of_another_shape_or_type_is_refused(model, params):
  for function, found in (
    (lambda x: x[..., :3], r'float32\[2, 16, 3\]'),
    (lambda x: x.astype(jnp.bfloat16), r'bfloat16\[2, 16, 24\]'),
  ):
    with pytest.raises(UserError, match=rf'is {found}; valid: float32\[2, 16, 24\]'):
      run(model, params, replace={'block_0/mlp/hidden': function})


def test_a_layer_that_decoding_may_skip_is_not_read_but_may_be_changed(tiny_config):
  model = lm.from_config(tiny_config(depth__name='token_gate'), VOCAB)
  variables = {'params': drawn(model)}
  run = functools.partial(sites.run, model, variables, TOKENS, mode='decode')
  with pytest.raises(UserError, match=r"block_0/mlp/hidden cannot be read .*valid: mode 'eval'"):
    run(read=['*/hidden'])
  out, seen = run(read=['residual_1'], replace={'block_0/mlp/hidden': lambda h: 2 * h})
  doubled = jax.tree.map(np.copy, variables['params'])
  doubled['block_0']['mlp']['down']['kernel'] *= 2
  want = model.apply({'params': doubled}, TOKENS, mode='decode')
  assert_allclose(out, want, rtol=1e-4, atol=1e-4)
  assert seen['residual_1'].shape == (BATCH, LENGTH, WIDTH)
  assert np.abs(want - model.apply(variables, TOKENS, mode='decode')).max() > 0.01


class Cell(nn.Module):
  """A layer in the form that `nn.scan` takes."""

  @nn.compact
  def __call__(self, x, _=None):
    return record.site(self, 'point', x * 2), None


@pytest.mark.parametrize('handed_out', [True, False])
def test_sites_in_a_loop_are_read_per_iteration_if_the_loop_returns_them(handed_out):
  axes = {'sites': 0} if handed_out else {}
  scan = nn.scan(Cell, variable_axes=axes, split_rngs={}, length=3)
  once = functools.partial(sites.run, scan(name='cells'), {}, jnp.ones(2), None)
  if not handed_out:
    with pytest.raises(UserError, match=r"point .*valid: variable_axes=\{'sites': 0\}"):
      once(read=['point'])
    return
  out, seen = once(read=['point'], replace={'point': lambda x: x + 1})
  want = [np.full(2, v) for v in (3, 7, 15)]  # each pass doubles and adds 1
  assert_allclose(seen['point'], want)
  assert_allclose(out[0], want[-1])


class SparseInputs(nn.Module):
  """A method of a user's, which acts on the sites of what is inside of it."""

  spec: object
  threshold: float

  @nn.compact
  def __call__(self, x):
    large = lambda x: jnp.where(jnp.abs(x) > self.threshold, x, 0)  # noqa: E731
    with sites.replacing({'*inner/input': large}):
      x = Linear(self.spec, WIDTH, name='inner')(x)
    return Linear(self.spec, WIDTH, name='inner_2')(x)


def test_a_method_may_act_on_the_sites_inside_of_it(model):
  module = SparseInputs(model.spec, 0.5)
  x = np.random.default_rng(0).normal(size=(3, WIDTH)).astype('f')
  variables = module.init(jax.random.key(0), x)
  out, seen = sites.run(module, variables, x, read=['inner/input', 'inner_2/input'])
  kernels = {name: np.float64(p['kernel']) for name, p in variables['params'].items()}
  sparse = np.where(np.abs(x) > 0.5, x, 0)
  assert_allclose(seen['inner/input'], sparse)
  assert_allclose(seen['inner_2/input'], sparse @ kernels['inner'], rtol=1e-5, atol=1e-5)
  assert_allclose(out, sparse @ kernels['inner'] @ kernels['inner_2'], rtol=1e-5, atol=1e-5)
  # Analysis outside sees what the method made of them, and may replace that.
  ones = {'inner/input': jnp.ones_like}
  out, _ = sites.run(module, variables, x, replace=ones)
  want = np.ones_like(x) @ kernels['inner'] @ kernels['inner_2']
  assert_allclose(out, want, rtol=1e-5, atol=1e-5)
  misspelt = {'*/imput': jnp.ones_like}
  with pytest.raises(UserError, match='unknown site'), sites.replacing(misspelt):
    module.apply(variables, x)
