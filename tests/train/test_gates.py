"""Learned gates through whole training steps, and bad input about them at the command line."""

import functools
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from scipy.special import expit, logsumexp

import sparse_lm.train.__main__ as train_command
from sparse_lm.core.errors import UserError
from sparse_lm.methods.depth.token_gate import TokenGate
from sparse_lm.runs import cost_report as cost
from sparse_lm.runs import runtime
from sparse_lm.runs.evaluate import evaluate
from sparse_lm.runs.setup import setup
from sparse_lm.train.control import Control
from sparse_lm.train.objective import Batch, EffectiveParams
from sparse_lm.train.step import Program
from sparse_lm.weights.method import densities

ROOT = pathlib.Path(__file__).resolve().parents[2]
STEPS = 150
# At learned positions gates can tell tokens apart finely enough to meet a target.
LEARNING = {
  'depth__name': 'token_gate',
  'data__batch': 16,
  'model__positions': 'learned',
  'optimizer__learning_rate': 0.02,
  'optimizer__warmup': 0.0,
  'optimizer__weight_decay': 0.0,
  'train__steps': STEPS,
}
CONSTANT = {'budget__target': 0.6, 'budget__weight': 0.0, 'budget__rate': 0.0}

# FLOPs a token of conftest's model: 4 matrices of 16 x 16 and 2 of 16 x 32, and the scores and
# values of 16 keys; the router's 16 weights and the head are outside of the gate.
BLOCK = 2 * (4 * 16 * 16 + 2 * 16 * 32) + 2 * 2 * 16 * 16
ROUTER = 2 * 16


def fraction(active, vocab):
  """Of the dense twin's forward FLOPs, where that share of the tokens enters the layer."""
  head = 2 * 16 * vocab
  return (BLOCK * active + ROUTER + head) / (BLOCK + head)


def trained(config, price=None):
  """The share of the corpus' tokens that enter after training, its fraction, and all metrics."""
  run = setup(config)
  state = run.program.init(0, run.target)
  if price is not None:
    state = state.replace(control=Control(jnp.float32(price), jnp.float32(1)))
  batches, metrics = run.data.train_iterator(0), []
  for step in range(config.train.steps):
    state, seen = run.program.step(step)(state, next(batches))
    metrics.append(seen)
  params, _ = run.program.finalize(state)
  seen = evaluate(run, params, state.model_state, 'train')
  active = seen['train/gates/depth_0']
  return active, fraction(active, run.data.tokenizer.vocab_size), jax.device_get(metrics)


@pytest.mark.parametrize('estimator', ['straight_through', 'reinforce'])
def test_the_controller_brings_what_evaluation_runs_to_its_target(estimator, tiny_config):
  held = {'budget__target': 0.6, 'budget__weight': 10.0, 'depth__estimator': estimator}
  _, ran, metrics = trained(tiny_config(**LEARNING, **held))
  assert ran == pytest.approx(0.6, abs=0.05)
  assert metrics[0]['flops_fraction'] > 0.8
  assert all(np.isfinite(value).all() for seen in metrics for value in seen.values())
  # Every step's price and average, from the fractions that the steps ran.
  measured, price = 1.0, 0.0
  for seen in metrics:
    measured = 0.9 * measured + 0.1 * seen['flops_fraction']
    price += 0.02 * (measured - 0.6)
    assert seen['budget/measured'] == pytest.approx(measured, abs=1e-5)
    assert seen['budget/price'] == pytest.approx(price, abs=1e-5)
  assert price > 0.03


def test_without_a_budget_gates_stay_open(tiny_config):
  active, _, metrics = trained(tiny_config(**LEARNING))
  assert active > 0.9
  assert not any(name.startswith('budget') for name in metrics[0])
  assert not any(seen['auxiliary'] for seen in metrics)


@pytest.mark.parametrize('estimator', ['straight_through', 'reinforce'])
def test_a_zero_price_keeps_gates_open_and_a_large_one_closes_them(estimator, tiny_config):
  slow = {'optimizer__learning_rate': 0.01, 'optimizer__schedule': 'constant'}
  config = tiny_config(**LEARNING | CONSTANT | slow, depth__estimator=estimator)
  free, _, _ = trained(config, price=0.0)
  dear, ran, metrics = trained(config, price=50.0)
  assert free > 0.9 and dear < 0.02
  assert ran == pytest.approx(fraction(0, setup(config).data.tokenizer.vocab_size), abs=0.02)
  assert {float(seen['budget/price']) for seen in metrics} == {50}


@pytest.fixture(scope='module')
def policy(tiny_config):
  """A setup with sampled gates, its state at a price, tokens, and the loss' gradient."""
  run = setup(
    tiny_config(
      depth__name='token_gate',
      depth__estimator='reinforce',
      model__init='gpt2',  # no zero head, so that actions matter from the first step
      budget__target=0.6,
    )
  )
  state = run.program.init(0, run.target)
  state = state.replace(control=Control(jnp.float32(0.7), jnp.float32(0.9)))
  tokens = next(run.data.train_iterator(0))

  @jax.jit
  def gradient(params, key):
    seen = EffectiveParams(params, densities(state.sparse.masks), jnp.float32(0))
    grads, beside = jax.grad(run.program.objective.loss, has_aux=True)(
      seen, state, {}, Batch(tokens, None), key
    )
    return grads.params['depth_0']['router'], beside.metrics

  return run, state, np.asarray(tokens), gradient


@functools.cache
def forward(model):
  return jax.jit(
    lambda params, tokens, rngs: model.apply(
      {'params': params}, tokens, mode='train', rngs=rngs, mutable=['policy']
    )
  )


def passes(run, params, tokens, key):
  """Nats by token, actions and their chance of being open: of the sampled and the greedy pass."""
  seen = []
  for rngs in ({'gates': jax.random.fold_in(key, 1)}, {}):
    logits, sown = forward(run.program.model)(params, tokens[:, :-1], rngs)
    logits, own = np.asarray(logits, np.float64), sown['policy']['depth_0']
    nats = logsumexp(logits, axis=-1) - np.take_along_axis(logits, tokens[:, 1:, None], 2)[..., 0]
    opened, taken = np.asarray(own['open']), np.exp(np.asarray(own['log_prob'], np.float64))
    seen.append((nats, opened, np.where(opened, taken, 1 - taken)))
  return seen


def test_a_sampled_gates_gradient_is_the_self_critical_policy_gradient(policy):
  run, state, tokens, gradient = policy
  params = dict(state.trainable['params'])
  # The layer is to matter as much as its price, and gates are to close as often as they open.
  params['block_0'] = jax.tree.map(lambda a: 8 * a, params['block_0'])
  router = params['depth_0']['router']
  params['depth_0'] = {'router': router | {'bias': jnp.array([0.3])}}
  key = jax.random.key(5)
  (sampled, action, p), (greedy, best, again) = passes(run, params, tokens, key)
  assert_allclose(p, again, rtol=1e-5)  # both see the same logits
  assert_array_equal(best, p > 0.5)
  assert 0.2 < action.mean() < 0.8 and np.abs(sampled - greedy).max() > 0.01

  vocab = run.data.tokenizer.vocab_size
  share = fraction(1, vocab) - fraction(0, vocab)
  price = 0.7 + 2 * 3.0 * (fraction(best.mean(), vocab) - 0.6)
  advantage = (greedy - sampled) - price * share * (action - best)
  to_go = np.cumsum(advantage[:, ::-1], axis=1)[:, ::-1]
  logits = np.log(p / (1 - p))
  by_logit = (-to_go * (action - p) + 0.01 * logits * p * (1 - p)) / action.size
  x = np.asarray(params['embed']['tokens'], np.float64)[tokens[:, :-1]]
  x /= np.sqrt((x**2).mean(axis=-1, keepdims=True) + 1e-5)
  got, metrics = gradient(params, key)
  assert_allclose(got['bias'], [by_logit.sum()], rtol=1e-3)
  assert_allclose(got['kernel'][:, 0], np.einsum('bl,bld->d', by_logit, x), rtol=1e-2, atol=1e-5)
  assert_allclose(metrics['loss'], sampled.mean(), rtol=1e-5)
  assert_allclose(metrics['flops_fraction'], fraction(best.mean(), vocab), rtol=1e-5)


def test_sampled_actions_equal_to_greedy_ones_leave_only_the_entropy_bonus(policy):
  run, state, tokens, gradient = policy
  logit = 6.0
  router = {'kernel': jnp.zeros((16, 1)), 'bias': jnp.array([logit])}
  params = {**state.trainable['params'], 'depth_0': {'router': router}}
  alone = 0.01 * logit * expit(logit) * expit(-logit)
  found = {True: 0, False: 0}
  for seed in range(12):
    key = jax.random.key(seed)
    (_, action, _), (_, best, _) = passes(run, params, tokens, key)
    same = bool((action == best).all())
    assert best.all()
    (got,) = np.asarray(gradient(params, key)[0]['bias'])
    assert same == bool(np.isclose(got, alone, rtol=1e-3, atol=0))
    found[same] += 1
  assert min(found.values()) > 0


def test_random_gates_are_not_controlled_and_run_at_their_rate(tiny_config):
  run = setup(tiny_config(depth__name='token_gate', depth__estimator='random', depth__open=0.3))
  gates = {gate for matmul in run.program.costs.ledger.values() for gate in matmul.gates}
  (gate,) = (gate for gate in gates if gate.path == 'depth_0')
  assert gate.planned == 0.3 and not gate.controlled
  vocab = run.data.tokenizer.vocab_size
  planned = cost.report(run.program, run.target)
  assert planned['flops_forward_ratio'] == pytest.approx(fraction(0.3, vocab))
  state = run.program.init(0, run.target)
  seen = evaluate(run, state.trainable['params'], {})
  assert seen['val/gates/depth_0'] == 19 / 64  # the nearest to 0.3 of 4 x 16 tokens
  assert not hasattr(state.control, 'price')


def test_which_gates_random_ones_open_does_not_depend_on_their_router(tiny_config):
  spec = setup(tiny_config()).program.model.spec
  gate = TokenGate(spec, estimator='random', open=0.25)
  draw = np.random.default_rng(0)
  logits = [draw.normal(shift, 3, (4, 16, 1)).astype(np.float32) for shift in (-5, 5)]
  evaluated = jax.jit(lambda l: gate.apply({}, l, 'eval', method='decide').open)
  trained = jax.jit(
    lambda key: gate.apply({}, logits[0], 'train', method='decide', rngs={'gates': key}).open
  )
  opened = [evaluated(l) for l in logits]
  assert_array_equal(*opened)
  assert int(opened[0].sum()) == 16
  drawn = [trained(jax.random.key(seed)) for seed in (0, 1)]
  assert (drawn[0] != drawn[1]).any()


def test_a_gate_refuses_an_estimator_that_it_cannot_take(tiny_config):
  class Narrow(TokenGate, kw_only=True):
    estimators = ('soft', 'straight_through')

  spec = setup(tiny_config()).program.model.spec
  Narrow(spec, estimator='soft').check()
  with pytest.raises(UserError) as refused:
    Narrow(spec, estimator='reinforce').check()
  message = str(refused.value)
  assert 'config.depth.estimator' in message and "'reinforce'" in message and '\n' not in message
  assert message.endswith('valid: soft, straight_through')


GATED = {'depth.name': 'token_gate'}
POLICY = {'depth.name': 'token_gate', 'depth.estimator': 'reinforce', 'depth.layers': '0:1'}
BAD = {
  'misspelt estimator': (
    GATED | {'depth.estimator': 'gumble_sigmoid'},
    ("'gumble_sigmoid'", "did you mean 'gumbel_sigmoid'?"),
  ),
  # Of 2 x 5120 FLOPs of the layers and 32 for each of 23 characters: all but one layer.
  'target below the floor': (
    GATED | {'budget.target': 0.3, 'depth.layers': '0:1', 'model.layers': 2},
    ('config.budget.target=0.3', f'{5888 / 10976:.3f}', 'block_1/mlp/up', f'{1024 / 10976:.3f}'),
  ),
  'no gate': (
    {'budget.target': 0.5},
    ('config.budget.target=0.5', 'a learned gate', 'config.weight.name=l0'),
  ),
  'random gates alone': (
    GATED | {'budget.target': 0.5, 'depth.estimator': 'random'},
    ('config.budget.target=0.5', 'random gates'),
  ),
  'no such layer': (GATED | {'depth.layers': '7:'}, ("config.depth.layers='7:'", 'none of the 1')),
  'acausal beside a policy': (
    POLICY | {'mlp.name': 'expert_choice'},
    ('config.depth.estimator', "config.mlp.name='expert_choice'", 'causal'),
  ),
  'sequences that compete beside a policy': (
    POLICY | {'mlp.name': 'moe_topk'},
    ('config.depth.estimator', "config.mlp.name='moe_topk'", 'sequences of a batch'),
  ),
  'acausal in the layers of no policy': (
    POLICY | {'depth.fallback.name': 'mixture_of_depths', 'model.layers': 2},
    ('config.depth.estimator', 'mixture_of_depths', 'causal'),
  ),
  'bad field inside a gate': (
    {'attention.name': 'head_gate', 'attention.inner.name': 'topk_keys'}
    | {'attention.inner.k': 99},
    ('k=99', '1 to config.data.context, 16'),
  ),
  'a gate inside a gate': (
    {'attention.name': 'head_gate', 'attention.inner.name': 'head_gate'},
    ('config.attention.inner',),
  ),
}


@pytest.mark.parametrize('case', BAD)
def test_bad_input_is_one_line_before_anything_compiles(
  case, tiny_config, tmp_path, monkeypatch, capfd
):
  given, expected = BAD[case]
  config = tiny_config()
  fields = {f'data.{name}': config.data[name] for name in ('source', 'tokenizer', 'path')}
  fields |= {f'model.{name}': config.model[name] for name in config.model}
  fields |= {'data.context': 16, 'data.batch': 4, 'train.steps': 2} | given
  command = ['sparse_lm', '--config=configs/tiny.py', f'--workdir={tmp_path / "run"}']
  monkeypatch.chdir(ROOT)
  monkeypatch.setattr(sys, 'argv', command + [f'--config.{k}={v}' for k, v in fields.items()])
  monkeypatch.setattr(runtime, 'prepare', lambda: None)
  monkeypatch.setattr(Program, 'init', property(lambda _: pytest.fail('a program was compiled')))
  with pytest.raises(SystemExit) as stopped:
    train_command.main()
  out, err = capfd.readouterr()
  assert stopped.value.code == 2 and not out
  assert err.startswith('error: ') and err.count('\n') == 1, err
  assert all(part in err for part in expected), err
  assert not list(tmp_path.iterdir())
