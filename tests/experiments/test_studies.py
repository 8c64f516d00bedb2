"""The studies plan what their tables claim."""

from experiments import component_speed, smoke, sparsity_vs_accuracy, train_step_speed
from experiments.plain_twin import PlainLM
from sparse_lm.core import config as configs
from sparse_lm.train import cost
from sparse_lm.train.setup import build


def sizes(run):
  config = configs.load(run.config, run.overrides)
  program, target = build(config, vocab=256)
  return cost.report(program, target)


def test_the_small_dense_model_has_the_parameters_that_the_sparsest_keep():
  runs = sparsity_vs_accuracy.runs()
  small = next(run for run in runs if run.labels['method'] == 'small dense')
  sparse = next(run for run in runs if run.labels['sparsity'] == 0.95)
  kept = sizes(sparse)['nonzero_params']
  assert abs(sizes(small)['params'] - kept) < 0.01 * kept


def test_each_method_meets_each_sparsity_on_the_same_seeds():
  seeds = {}
  for run in sparsity_vs_accuracy.runs():
    seeds.setdefault(tuple(run.labels.values()), set()).add(run.overrides['seed'])
  assert len(seeds) == 2 + 5 * 3
  assert set(map(frozenset, seeds.values())) == {frozenset({0, 1})}


def test_the_smoke_study_runs_every_method_once():
  methods = [run.labels['method'] for run in smoke.runs()]
  assert sorted(methods) == sorted({run.labels['method'] for run in sparsity_vs_accuracy.runs()})


def test_speed_studies_plan_runs_that_load():
  for run in [*train_step_speed.runs(), *component_speed.runs()]:
    configs.load(run.config, run.overrides)


def test_the_twin_has_as_many_parameters_as_the_default_model():
  import jax
  import jax.numpy as jnp

  program, target = build(configs.load('configs/base.py'), vocab=256)
  tokens = jnp.zeros((1, 8), jnp.int32)
  twin = PlainLM(program.model.spec)
  params = jax.eval_shape(twin.init, jax.random.key(0), tokens)['params']
  count = sum(leaf.size for leaf in jax.tree.leaves(params))
  assert count == cost.report(program, target)['params']
