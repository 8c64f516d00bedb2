"""Distillation: the divergence, its weight in the gradient, and the teacher's inputs."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose

from sparse_lm.core import rng
from sparse_lm.runs.loop import train
from sparse_lm.runs.setup import setup
from sparse_lm.runs.trained import load


@pytest.fixture(scope='module')
def dense(tiny_config, tmp_path_factory):
  """The workdir of a dense run."""
  workdir = tmp_path_factory.mktemp('dense')
  train(tiny_config(), str(workdir), progress=False)
  return str(workdir)


def softened(logits, temperature):
  scaled = logits.astype(np.float64) / temperature
  scaled -= scaled.max(-1, keepdims=True)
  return scaled - np.log(np.exp(scaled).sum(-1, keepdims=True))


def kl(student, teacher, temperature):
  """KL(teacher || student) in nats a token, times the temperature's square."""
  ours, theirs = softened(student, temperature), softened(teacher, temperature)
  return temperature**2 * (np.exp(theirs) * (theirs - ours)).sum(-1).mean()


# The change of the weights in one step is the gradient, times -1.
PLAIN = {
  'optimizer__name': 'sgd',
  'optimizer__learning_rate': 1.0,
  'optimizer__schedule': 'constant',
  'optimizer__warmup': 0.0,
  'optimizer__momentum': 0.0,
  'optimizer__weight_decay': 0.0,
  'optimizer__clip': 0.0,
}


def first_step(config, teacher=None):
  """Metrics and gradient of the first step; `teacher` says what it learns from on its batch."""
  run = setup(config)
  tokens = next(run.data.train_iterator(rng.data_seed(config.seed)))
  state = run.start()
  before = jax.device_get(state.trainable['params'])
  taught = None if teacher is None else teacher(tokens[:, :-1])
  after, metrics = run.program.train_step(state, tokens, taught)
  change = jax.tree.map(lambda a, b: a - np.asarray(b), before, after.trainable['params'])
  return jax.device_get(metrics), change, tokens


def distilled(tiny_config, parent, **fields):
  fields = {f'distill__{name}': value for name, value in fields.items()}
  return tiny_config(init_from=parent, distill__teacher=parent, **fields, **PLAIN)


@pytest.fixture(scope='module')
def trained(dense):
  return load(dense)


@pytest.fixture(scope='module')
def other(trained):
  """A teacher that disagrees with the run: the same network, its head turned around."""
  params = jax.tree.map(lambda a: a, trained.params)
  params['embed']['head']['kernel'] = -0.5 * params['embed']['head']['kernel']
  return dataclasses.replace(trained, params=params)


def near(got, want, scale):
  sizes = [np.abs(leaf).max() for leaf in jax.tree.leaves(want)]
  jax.tree.map(lambda a, b: assert_allclose(a, b, rtol=0, atol=scale * max(sizes)), got, want)


def test_a_model_that_teaches_itself_learns_nothing(dense, trained, tiny_config):
  config = distilled(tiny_config, dense, weight=1.0, temperature=2.0)
  metrics, change, _ = first_step(config, trained.readout)
  assert abs(metrics['divergence']) < 1e-6
  assert metrics['gradient_norm'] < 1e-5 and metrics['loss'] > 0.1
  assert max(np.abs(leaf).max() for leaf in jax.tree.leaves(change)) < 1e-6
  assert first_step(config)[0]['gradient_norm'] > 0.01  # the text would have moved it


def test_the_gradient_is_the_weighted_mean_of_both_and_the_teachers_is_that_of_kl(
  dense, trained, other, tiny_config
):
  temperature = 2.0
  steps = {
    weight: first_step(
      distilled(tiny_config, dense, weight=weight, temperature=temperature), other.readout
    )
    for weight in (0.0, 0.3, 1.0)
  }
  metrics, mixed, tokens = steps[0.3]
  text, taught = steps[0.0][1], steps[1.0][1]
  near(mixed, jax.tree.map(lambda a, b: 0.7 * a + 0.3 * b, text, taught), 1e-5)

  logits = other.logits(tokens[:, :-1])
  assert metrics['divergence'] == pytest.approx(
    kl(np.asarray(trained.logits(tokens[:, :-1])), np.asarray(logits), temperature), rel=1e-4
  )
  chosen = jnp.exp(jnp.asarray(softened(np.asarray(logits), temperature), jnp.float32))

  def crossed(params):
    """KL less the teacher's own entropy, which has no gradient."""
    ours = trained.program.model.apply({'params': params}, tokens[:, :-1]) / temperature
    return -(temperature**2) * jnp.mean(jnp.sum(chosen * jax.nn.log_softmax(ours), axis=-1))

  near(taught, jax.device_get(jax.jit(jax.grad(crossed))(trained.params)), 1e-4)
  assert max(np.abs(leaf).max() for leaf in jax.tree.leaves(taught)) > 0.01


def test_weight_0_is_training_without_a_teacher(dense, other, tiny_config):
  with_teacher = first_step(
    distilled(tiny_config, dense, weight=0.0, temperature=2.0), other.readout
  )
  without = first_step(tiny_config(init_from=dense, **PLAIN))
  near(with_teacher[1], without[1], 1e-6)
  assert with_teacher[0]['loss'] == pytest.approx(without[0]['loss'], rel=1e-6)
  assert 'divergence' not in without[0] and with_teacher[0]['divergence'] > 0.01


def test_microbatches_give_the_gradient_of_the_batch(dense, other, tiny_config):
  config = distilled(tiny_config, dense, weight=0.3, temperature=2.0)
  parts = config.copy_and_resolve_references()
  parts.train.accumulation = 4
  (_, whole, _), (_, split, _) = (first_step(c, other.readout) for c in (config, parts))
  near(split, whole, 1e-5)
  # A teacher may also give its logits.
  near(first_step(parts, other.logits)[1], whole, 1e-5)


def test_training_asks_the_teacher_about_the_text_that_it_reads(
  dense, trained, tiny_config, tmp_path
):
  config = tiny_config(
    distill__teacher=dense, distill__temperature=3.0, train__steps=1, train__log_every=1
  )
  train(config, str(tmp_path), progress=False)
  logged = json.loads((tmp_path / 'metrics.jsonl').read_text().splitlines()[0])
  run = setup(config)
  tokens = next(run.data.train_iterator(rng.data_seed(config.seed)))[:, :-1]
  params = run.start().trainable['params']
  student = jax.jit(run.program.model.apply)({'params': params}, tokens)
  want = kl(np.asarray(student), np.asarray(trained.logits(tokens)), 3.0)
  assert logged['divergence'] == pytest.approx(want, rel=1e-4) and want > 0.01
