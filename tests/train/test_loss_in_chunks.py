"""Training and evaluation with a chunked loss: values, costs and memory."""

import functools
import math
import re
from unittest import mock

import jax
import numpy as np
import pytest
from jax.extend.core import ClosedJaxpr, Jaxpr
from numpy.testing import assert_allclose

from sparse_lm.evals.loss import eval_step
from sparse_lm.inference.pack import pack
from sparse_lm.kernels import cross_entropy as kernel
from sparse_lm.kernels.cross_entropy import Readout, cross_entropy
from sparse_lm.model import lm, plans
from sparse_lm.plan import executed
from sparse_lm.runs.build import build
from sparse_lm.train.objective import Batch

VOCAB, BATCH, LENGTH = 24, 4, 16
LOGITS = BATCH * LENGTH * VOCAB
TOKENS = np.random.default_rng(0).integers(0, VOCAB, (BATCH, LENGTH + 1)).astype('i')
EXITS = {'stack__name': 'layer_skip', 'model__layers': 2}
POLICY = {'depth__name': 'token_gate', 'depth__estimator': 'reinforce'}
# The change of the weights is the gradient.
PLAIN = {'optimizer__name': 'sgd', 'optimizer__warmup': 0.0, 'optimizer__clip': 0.0}
TAUGHT = {'distill__teacher': 'a run', 'distill__weight': 0.4, 'distill__temperature': 2.0}


def chunks_of(rows):
  """Inside of it programs that are traced have so many tokens in a chunk at most."""
  return mock.patch.object(kernel, 'LOGITS_BYTES_ON_CPU', 4 * rows * VOCAB)


def shapes_in(jaxpr):
  """Of every array of a program, functions inside of it included."""
  for equation in jaxpr.eqns:
    yield from (v.aval.shape for v in (*equation.invars, *equation.outvars) if hasattr(v, 'aval'))
    for value in equation.params.values():
      for item in value if isinstance(value, tuple | list) else (value,):
        if isinstance(item, ClosedJaxpr):
          yield from shapes_in(item.jaxpr)
        elif isinstance(item, Jaxpr):
          yield from shapes_in(item)


def holds_logits(shapes):
  """Whether an array is as large as the logits of the batch, with an axis for the vocabulary."""
  return any(VOCAB in shape and math.prod(shape) >= LOGITS for shape in shapes)


def holds_logits_compiled(compiled):
  arrays = re.findall(r'f32\[([\d,]+)\]', compiled.as_text())
  return holds_logits(tuple(map(int, dims.split(','))) for dims in arrays)


def step_of(config, rows):
  """What the compiled first step gives, and whether its program holds the logits of the batch."""
  program, target = build(config, VOCAB)
  state, teacher = program.init(0, target), None
  if config.distill.teacher:
    params = program.init(1, target).trainable['params']
    apply = jax.jit(functools.partial(program.model.apply, readout=True))
    teacher = apply({'params': params}, TOKENS[:, :-1])
  with chunks_of(rows):
    traced = jax.jit(program.transition).trace(state, TOKENS, teacher)
    compiled = traced.lower().compile()
  after, metrics = compiled(state, TOKENS, teacher)
  held = holds_logits(shapes_in(traced.jaxpr.jaxpr)), holds_logits_compiled(compiled)
  return (after.trainable, metrics), held


@pytest.mark.parametrize(
  'rows, fields',
  [
    (24, EXITS | POLICY | TAUGHT | {'model__tied': True}),  # of 64 tokens: 22, 22 and 20
    pytest.param(16, {'model__bigram': True, 'model__bias': True}, marks=pytest.mark.slow),
  ],
  ids=['exits, policy, teacher', 'bigrams'],
)
def test_a_step_in_chunks_is_the_step_and_never_holds_the_logits_of_a_batch(
  rows, fields, tiny_config
):
  config = tiny_config(model__init='gpt2', **PLAIN, **fields)
  whole, held = step_of(config, BATCH * LENGTH)
  assert held == (True, True)
  chunked, held = step_of(config, rows)
  assert held == (False, False)
  jax.tree.map(lambda a, b: assert_allclose(a, b, rtol=1e-5, atol=1e-6), chunked, whole)


def test_the_loss_combines_text_exits_and_teacher(tiny_config):
  program, _ = build(tiny_config(**TAUGHT), VOCAB)
  own, early, teacher = np.random.default_rng(1).normal(size=(3, BATCH, LENGTH, VOCAB)).astype('f')
  loss, losses, metrics = program.objective.learned(own, [(early, 0.5)], Batch(TOKENS, teacher))

  def nats(logits):
    return float(cross_entropy(logits, TOKENS[:, 1:])[0])

  divergence = float(np.mean(losses.divergence))
  text = (nats(own) + 0.5 * nats(early)) / 1.5
  assert float(loss) == pytest.approx(0.6 * text + 0.4 * divergence, rel=1e-5)
  want = {'loss': nats(own), 'exits_loss': text, 'divergence': divergence}
  assert {name: float(value) for name, value in metrics.items()} == pytest.approx(want, rel=1e-5)


@pytest.fixture(scope='module')
def model(tiny_config):
  """A model and its parameters."""
  found = lm.from_config(tiny_config(model__bias=True), VOCAB)
  draw = np.random.default_rng(0)
  params = plans.plan_of(found).params
  return found, jax.tree.map(lambda a: draw.normal(0, 0.3, a.shape).astype('f'), params)


def test_evaluation_never_holds_the_logits_of_a_batch(model):
  own, params = model
  given_ = {'params': params}, TOKENS, np.ones((BATCH, LENGTH), 'f')
  step = eval_step.__wrapped__(own)
  whole = step(*given_)[0]
  with chunks_of(24):
    step = eval_step.__wrapped__(own)
    traced = step.trace(*given_)
    compiled = traced.lower().compile()
  assert not holds_logits(shapes_in(traced.jaxpr.jaxpr)) and not holds_logits_compiled(compiled)
  assert_allclose(compiled(*given_)[0], whole, rtol=1e-6)


@pytest.mark.parametrize('tied', [False, True])
def test_a_loss_in_chunks_executes_the_flops_that_the_plan_charges(tied, tiny_config):
  own = lm.from_config(tiny_config(model__tied=tied, model__bigram=True), VOCAB)
  variables = plans.plan_of(own).variables

  def loss(variables, chunked):
    predicted = own.apply(variables, TOKENS[:, :-1], mode='train', readout=chunked)
    return cross_entropy(predicted, TOKENS[:, 1:])[0]

  with chunks_of(24):
    forward = executed.trace(functools.partial(loss, chunked=True), variables)
    learning = [
      executed.trace(jax.grad(functools.partial(loss, chunked=chunked)), variables).flops
      for chunked in (True, False)
    ]
  assert forward.per_token(TOKENS[:, 1:].size).ledger == plans.ledger(own, LENGTH, 'train')
  assert forward.flops == sum(matmul.flops for matmul in forward.ledger.values())
  # The head is not run again for the gradient.
  assert learning[0] == learning[1] == pytest.approx(3 * forward.flops)


@pytest.mark.parametrize('point', ['input', 'output'])
@pytest.mark.parametrize('tied', [False, True])
def test_a_method_acts_on_what_the_head_reads_and_on_logits(point, tied, tiny_config):
  site = {'site__name': 'abs_topk', 'site__where': (f'embed/head/{point}',)}
  own = lm.from_config(tiny_config(model__tied=tied, **site), VOCAB)
  params = jax.tree.map(
    lambda a: np.random.default_rng(a.size).normal(0, 0.3, a.shape).astype('f'),
    plans.plan_of(own).params,
  )
  predicted, logits = (
    own.apply({'params': params}, TOKENS[:, :-1], readout=readout) for readout in (True, False)
  )
  assert isinstance(predicted, Readout) == (point == 'input')
  assert_allclose(kernel.all_logits(predicted), logits, rtol=1e-5, atol=1e-6)
  if point == 'input':
    assert 0 < np.mean(predicted.hidden_BxLxD != 0) < 0.5
  else:
    assert 0 < np.mean(np.asarray(logits) != 0) < 0.5


def test_a_packed_head_computes_logits(tiny_config, packed_by_bytes):
  chosen = {'weight__name': 'static', 'weight__sparsity': 0.5, 'weight__dense': ('norm',)}
  program, target = build(tiny_config(**chosen, weight__pattern='column'), VOCAB)
  packed = pack(program.model, *program.finalize(program.init(0, target)), {})
  apply = functools.partial(program.model.apply, packed.variables, TOKENS[:, :-1])
  assert 'head' in packed.variables['packed'].get('embed', {})
  assert_allclose(apply(readout=True), apply(), rtol=1e-6)
