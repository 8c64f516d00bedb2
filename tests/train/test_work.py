"""Training FLOPs are those of the steps that ran."""

import json
import math

import jax
import numpy as np
import pytest

from sparse_lm.runs import cost_report as cost
from sparse_lm.runs.loop import train
from sparse_lm.runs.setup import setup
from sparse_lm.train.work import Work


def forward_flops(density, vocab):
  """Per token of conftest's model: its matrices, scores and values of 16 keys, and the head."""
  return 2 * (4 * 16 * 16 + 2 * 16 * 32) * density + 2 * 2 * 16 * 16 + 2 * 16 * vocab


def products(jaxpr):
  """FLOPs of the products in a jaxpr, those of the functions that it calls included."""
  total = 0
  for equation in jaxpr.eqns:
    if equation.primitive.name == 'dot_general':
      (contracted, _), _ = equation.params['dimension_numbers']
      left, result = equation.invars[0].aval.shape, equation.outvars[0].aval.shape
      total += 2 * math.prod(result) * math.prod(left[axis] for axis in contracted)
    for value in equation.params.values():
      inside = getattr(value, 'jaxpr', value)
      total += products(inside) if hasattr(inside, 'eqns') else 0
  return total


@pytest.mark.parametrize(
  ('fields', 'left_out'),
  [
    ({}, 0),
    ({'activation.name': 'topk'}, 0),
    ({'model.remat': 'full'}, 0),
    ({'depth.name': 'token_gate', 'attention.name': 'head_gate'}, 0),
    ({'depth.name': 'token_gate', 'depth.estimator': 'reinforce'}, 0),
    # The predictor learns, and nothing before it learns from it: one product less for 17 inputs.
    ({'depth.name': 'mixture_of_depths', 'depth.capacity': 0.25}, 2 * 17),
  ],
)
def test_a_step_is_charged_what_its_program_executes(fields, left_out, tiny_config):
  run = setup(tiny_config(**fields))
  program, batch = run.program, run.config.data.batch
  state = jax.eval_shape(program.init, 0, run.target)
  tokens = jax.ShapeDtypeStruct((batch, 17), np.int32)
  executed = products(jax.make_jaxpr(program.transition)(state, tokens).jaxpr) / (batch * 16)
  charged = cost.report(program, run.target)['flops_training']
  assert executed == pytest.approx(charged - left_out)


def test_work_adds_up_and_is_spread_over_tokens():
  work = Work(own=6.0, ancestors=12.0)
  assert work.total == 18 and work.over(3) == Work(2.0, 4.0)
  assert work.plus(0.5) == Work(6.5, 12.0)


def test_a_run_continued_with_more_steps_costs_what_ran(tiny_config, tmp_path):
  fields = {
    'weight__name': 'magnitude',
    'weight__sparsity': 0.75,
    'weight__period': 2,
    'weight__start': 0.0,
  }
  for steps in (6, 12):
    config = tiny_config(train__steps=steps, **fields)
    result = train(config, str(tmp_path), progress=False)['metrics']
  lines = [json.loads(line) for line in (tmp_path / 'metrics.jsonl').read_text().splitlines()]
  densities = [line['density'] for line in lines if 'loss' in line]
  assert len(densities) == 12 and min(densities) < 0.3
  run = setup(config)
  vocab = run.data.tokenizer.vocab_size
  want = np.mean([forward_flops(density, vocab) for density in densities])
  assert result['flops_training'] == pytest.approx(3 * want, rel=1e-3)
  assert result['flops_training_ratio'] == pytest.approx(want / forward_flops(1, vocab), rel=1e-3)
  assert result['flops_training_total'] == result['flops_training']
  # The config would have cost another run's schedule.
  assert cost.report(run.program, run.target)['flops_training'] != pytest.approx(3 * want, rel=0.01)
