"""The fields that pretrained families need, against a forward pass in NumPy that knows all of them."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats
from numpy.testing import assert_allclose

from sparse_lm.core import tree
from sparse_lm.core.errors import UserError
from sparse_lm.inference import pack
from sparse_lm.inference.decode import Decoder
from sparse_lm.kernels.cross_entropy import cross_entropy
from sparse_lm.model import lm
from sparse_lm.model.plans import plan_of
from sparse_lm.patterns import pattern
from sparse_lm.weights.method import apply_masks

VOCAB, LENGTH = 37, 12
SIZES = {
  'layers': 2,
  'width': 20,
  'hidden': 28,
  'heads': 5,
  'kv_heads': 5,
  'precision': 'float32',
}
LLAMA3 = {'rope_scaling': 'llama3', 'rope_factor': 4.0, 'rope_low': 1.5, 'rope_context': 32}
# By shape of a family: fields of config.model, the activation, and the MLP.
FAMILIES = {
  'GPT-2': (
    {'norm': 'layernorm', 'positions': 'learned', 'bias': True, 'tied': True, 'norm_epsilon': 1e-3},
    {'name': 'gelu', 'approximate': True},
    {'name': 'dense'},
  ),
  'Llama 3': (
    {'heads': 4, 'kv_heads': 2, 'head_width': 6, 'rope_base': 500.0, 'rope_high': 3.5} | LLAMA3,
    {'name': 'silu'},
    {'name': 'gated'},
  ),
  'Qwen 2, scaled': (
    {
      'heads': 2,
      'kv_heads': 1,
      'rope_base': 300.0,
      'biases': ('query', 'key', 'value'),
      'tied': True,
    },
    {'name': 'silu'},
    {'name': 'gated'},
  ),
  'Qwen 3': (
    {'heads': 4, 'kv_heads': 2, 'head_width': 8, 'query_key_norm': 'head', 'norm_epsilon': 1e-2},
    {'name': 'silu'},
    {'name': 'gated'},
  ),
  'GPT-NeoX': (
    {
      'heads': 2,
      'kv_heads': 2,
      'norm': 'layernorm',
      'rope_fraction': 0.4,
      'parallel_residual': True,
      'biases': ('query', 'key', 'value', 'out', 'up', 'down', 'norm'),
    },
    {'name': 'gelu'},
    {'name': 'dense'},
  ),
  'OLMoE': (
    {
      'heads': 5,
      'kv_heads': 1,
      'query_key_norm': 'all',
      'rope_scaling': 'linear',
      'rope_factor': 2.0,
    },
    {'name': 'silu'},
    {'name': 'moe_topk', 'experts': 5, 'k': 2, 'gated': True, 'normalise': False, 'hidden': 12},
  ),
  'Mixtral': (
    {'kv_heads': 5, 'biases': ('gate', 'down', 'head')},
    {'name': 'silu'},
    {'name': 'moe_topk', 'experts': 4, 'k': 3, 'gated': True},
  ),
}


@functools.cache
def config_of(name, load):
  fields, activation, mlp = FAMILIES[name]
  given = {f'model__{field}': value for field, value in (SIZES | fields).items()}
  given |= {f'mlp__{field}': value for field, value in mlp.items()}
  given |= {f'activation__{field}': value for field, value in activation.items()}
  return load(data__context=LENGTH, **given)


def params_of(model, seed=0):
  """Every parameter is far from what it starts at, scales and biases too."""
  draw = np.random.default_rng(seed)

  def one(path, leaf):
    near = 1.0 if path.endswith('scale') else 0.0
    return jnp.asarray(near + 0.3 * draw.standard_normal(leaf.shape), leaf.dtype)

  return tree.map_named(one, plan_of(model).params)


def tokens_of(batch=3):
  return np.random.default_rng(1).integers(0, VOCAB, (batch, LENGTH))


# The same in NumPy and float64: one sequence of hidden states `[L, D]` at a time.


def norm(x, own, kind, epsilon):
  if kind == 'layernorm':
    x = x - x.mean(-1, keepdims=True)
  x = x / np.sqrt((x**2).mean(-1, keepdims=True) + epsilon)
  return x * own['scale'] + own.get('bias', 0.0)


def linear(x, own):
  return x @ own['kernel'] + own.get('bias', 0.0)


def wavelengths(c, rotated):
  """Of each pair, in tokens; those of Llama 3 as its authors write them, case by case."""
  plain = 2 * np.pi * c.rope_base ** (np.arange(0, rotated, 2) / rotated)
  if c.rope_scaling == 'none':
    return plain
  if c.rope_scaling == 'linear':
    return plain * c.rope_factor
  found = []
  for length in plain:
    if length < c.rope_context / c.rope_high:
      found.append(length)
    elif length > c.rope_context / c.rope_low:
      found.append(length * c.rope_factor)
    else:
      share = (c.rope_context / length - c.rope_low) / (c.rope_high - c.rope_low)
      found.append(1 / ((1 - share) / (length * c.rope_factor) + share / length))
  return np.array(found)


def rotated(c, x):
  """Pairs as complex numbers, multiplied by `exp(2 pi i position / wavelength)`."""
  size = int(x.shape[-1] * c.rope_fraction)
  turn = np.exp(2j * np.pi * np.arange(len(x))[:, None, None] / wavelengths(c, size))
  z = (x[..., : size // 2] + 1j * x[..., size // 2 : size]) * turn
  return np.concatenate([z.real, z.imag, x[..., size:]], axis=-1)


def attention(c, x, own):
  q, k, v = (linear(x, own[name]) for name in ('query', 'key', 'value'))
  if c.query_key_norm == 'all':
    q, k = (norm(a, own[f'{n}_norm'], 'rms', c.norm_epsilon) for n, a in (('query', q), ('key', k)))
  width = c.head_width or c.width // c.heads
  q, k, v = (a.reshape(len(x), -1, width) for a in (q, k, v))
  if c.query_key_norm == 'head':
    q, k = (norm(a, own[f'{n}_norm'], 'rms', c.norm_epsilon) for n, a in (('query', q), ('key', k)))
  if c.positions == 'rotary':
    q, k = rotated(c, q), rotated(c, k)
  out = np.zeros_like(q)
  for head in range(c.heads):
    shared = head // (c.heads // c.kv_heads)
    for t in range(len(x)):
      score = np.exp(k[: t + 1, shared] @ q[t, head] / np.sqrt(width))
      out[t, head] = score / score.sum() @ v[: t + 1, shared]
  return linear(out.reshape(len(x), -1), own['out'])


def act(activation, x):
  if activation.name == 'silu':
    return x / (1 + np.exp(-x))
  if activation.approximate:
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))
  return x * scipy.stats.norm.cdf(x)


def mlp(config, x, own):
  if config.mlp.name == 'moe_topk':
    return np.stack([mixture(config, row, own) for row in x])
  up, gated = linear(x, own['up']), config.mlp.name == 'gated'
  hidden = (
    act(config.activation, linear(x, own['gate'])) * up if gated else act(config.activation, up)
  )
  return linear(hidden, own['down'])


def mixture(config, row, own):
  """The experts that one token visits, one after the other."""
  chance = np.exp(row @ own['router']['kernel'])
  chance /= chance.sum()
  chosen = np.argsort(-chance)[: config.mlp.k]
  total = chance[chosen].sum() if config.mlp.normalise else 1.0
  experts, out = own['experts'], 0
  for e in chosen:
    of = {
      n: {'kernel': experts[n][e], 'bias': experts.get(f'{n}_bias', np.zeros(99))[e]}
      for n in ('gate', 'up', 'down')
    }
    hidden = act(config.activation, linear(row, of['gate'])) * linear(row, of['up'])
    out = out + chance[e] / total * linear(hidden, of['down'])
  return out


def forward(config, params, tokens):
  c, p = config.model, jax.tree.map(lambda a: np.asarray(a, np.float64), params)
  table = p['embed']['tokens']
  x = c.embed_scale * table[tokens]
  if c.positions == 'learned':
    x = x + p['embed']['positions'][: len(tokens)]
  for layer in range(c.layers):
    own = p[f'block_{layer}']
    a = attention(c, norm(x, own['norm_1'], c.norm, c.norm_epsilon), own['attention'])
    read = x if c.parallel_residual else x + a
    x = x + a + mlp(config, norm(read, own['norm_2'], c.norm, c.norm_epsilon), own['mlp'])
  x = norm(x, p['norm'], c.norm, c.norm_epsilon)
  if c.tied:
    return c.logit_scale * x @ table.T
  head = p['embed']['head']
  return c.logit_scale * x @ head['kernel'] + head.get('bias', 0.0)


@functools.cache
def made(name, load):
  """The config, the model, its parameters, tokens, and the logits that NumPy computes."""
  config = config_of(name, load)
  model = lm.from_config(config, VOCAB)
  params, tokens = params_of(model), tokens_of()
  return config, model, params, tokens, np.stack([forward(config, params, row) for row in tokens])


@functools.cache
def applied(model):
  return jax.jit(functools.partial(model.apply, mode='eval'))


@pytest.mark.parametrize('name', FAMILIES)
def test_logits_are_those_of_numpy_in_one_pass_and_token_by_token(name, tiny_config):
  _, model, params, tokens, want = made(name, tiny_config)
  close = functools.partial(assert_allclose, rtol=0, atol=1e-5 * np.abs(want).max())
  close(jax.jit(functools.partial(model.apply, mode='eval'))({'params': params}, tokens), want)
  close(decoded(model, {'params': params}, tokens), want[:, FIRST - 1 :])


FIRST = 5  # length of the prompts


def decoded(model, variables, tokens):
  decoder = Decoder(model, variables)
  logits, cache, position = decoder.begin([row[:FIRST] for row in tokens])
  found = [logits]
  for t in range(FIRST, LENGTH):
    logits, cache = decoder.decode(variables, cache, tokens[:, t], position + t - FIRST)
    found.append(logits)
  return np.stack(found, 1)


# One family shows what all share; `make test-slow` runs the others.
MOSTLY_SLOW = pytest.mark.parametrize(
  'name',
  [
    'Qwen 2, scaled',
    *(pytest.param(n, marks=pytest.mark.slow) for n in FAMILIES if 'scaled' not in n),
  ],
)


@MOSTLY_SLOW
def test_a_loss_in_chunks_and_a_scan_give_the_same_gradients(name, tiny_config):
  _, model, params, tokens, want = made(name, tiny_config)
  scans = model.clone(spec=dataclasses.replace(model.spec, scan_layers='always'))

  @functools.partial(jax.jit, static_argnums=(1, 2))
  def gradient(params, model, readout):
    out = model.apply({'params': params}, tokens, mode='eval', readout=readout)
    return cross_entropy(out, np.roll(tokens, -1, 1))[0]

  found, plain = (
    jax.jit(jax.value_and_grad(functools.partial(gradient, model=m, readout=r)))(params)
    for m, r in ((scans, True), (model, False))
  )
  chance = want - scipy.special.logsumexp(want, axis=-1, keepdims=True)
  loss = -np.take_along_axis(chance, np.roll(tokens, -1, 1)[..., None], -1).mean()
  assert_allclose([found[0], plain[0]], loss, rtol=1e-5)
  for path, leaf in tree.named(plain[1]).items():
    close = 1e-6 + 1e-4 * np.abs(leaf).max()
    assert_allclose(tree.named(found[1])[path], leaf, rtol=0, atol=close, err_msg=path)


@pytest.mark.parametrize('kind', ['neuron', 'head'])
@MOSTLY_SLOW
def test_packed_and_shrunk_it_gives_the_same_logits(name, kind, tiny_config, packed_by_bytes):
  _, model, params, tokens, _ = made(name, tiny_config)
  units = pattern(kind, plan_of(model).units)

  def ranked(path, w):
    covered = w.ndim >= 2 and 'block' in path and units.covers(path, w.shape)
    return np.abs(w) if covered and not path.endswith('bias') else None

  scores = tree.map_named(ranked, params)
  masks = units.masks(scores, jax.tree.map(lambda _: jnp.float32(0.6), scores))
  params = apply_masks(params, masks)
  found = pack.pack(model, params, masks, {})
  want = jax.jit(functools.partial(model.apply, mode='eval'))({'params': params}, tokens)
  close = functools.partial(assert_allclose, rtol=0, atol=1e-5 * np.abs(want).max())
  close(decoded(model, found.variables, tokens), want[:, FIRST - 1 :])
  whole = FAMILIES[name][0].get('query_key_norm') == 'all'
  assert bool(found.removed) == (kind == 'neuron' or (model.spec.kv_heads > 1 and not whole))


@pytest.mark.parametrize('name', FAMILIES)
def test_every_weight_of_a_matrix_is_charged(name, tiny_config):
  """Two FLOPs for each weight that a token reads; an expert for the part of the tokens that visit."""
  config, model, params, _, _ = made(name, tiny_config)
  sizes = {path: leaf.size for path, leaf in tree.named(params).items() if leaf.ndim > 1}
  charged = dict.fromkeys(sizes, 0.0)
  for entry in plan_of(model).ledger.values():
    if entry.kernel is not None:
      charged[entry.kernel] += entry.flops
  for path, size in sizes.items():
    visits = config.mlp.k / config.mlp.experts if '/experts/' in path else 1
    looked_up = path.endswith('_bias') or path == 'embed/positions'
    looked_up |= path == 'embed/tokens' and not model.spec.tied
    assert charged[path] == pytest.approx(0 if looked_up else 2 * size * visits), path


@pytest.mark.parametrize('said, fields', [
  ("config.model.rope_factor=2.0 is not valid; valid: 1.0 with config.model.rope_scaling='none'",
   {'rope_factor': 2.0}),
  ('config.model.rope_high=0.5 is not valid; valid: a number above config.model.rope_low=1.0',
   {'rope_scaling': 'llama3', 'rope_high': 0.5}),
  ("config.model.rope_scaling='linear' is not valid; valid: 'none' with config.model.positions='learned'",
   {'rope_scaling': 'linear', 'positions': 'learned'}),
  ("did you mean 'llama3'", {'rope_scaling': 'llama'}),
  ("'keys': did you mean 'key'", {'biases': ('keys',)}),
  ('because config.model.bias=True', {'biases': ('key',), 'bias': True}),
  ("only config.model.norm='layernorm'", {'biases': ('norm',)}),
  ('no layer of this model is named', {'biases': ('gate',)}),
  ('even width', {'head_width': 5}),
  ('even width', {'rope_fraction': 0.7}),
  ('query_key_norm', {'query_key_norm': 'heads'}),
  ('weights_dtype', {'weights_dtype': 'float16'}),
])  # fmt: skip
def test_fields_that_make_no_sense_are_one_line(said, fields, tiny_config):
  config = tiny_config(**{f'model__{field}': value for field, value in fields.items()})
  with pytest.raises(UserError, match=said) as refused:
    plan_of(lm.from_config(config, VOCAB))
  assert '\n' not in str(refused.value)
