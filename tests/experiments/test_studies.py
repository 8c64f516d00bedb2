"""The studies plan what their tables claim."""

import json

import numpy as np
import pytest

from experiments import (
  ablation_setting,
  accuracy_vs_time,
  block_attention,
  break_even,
  budget_control,
  component_speed,
  dynamic_compute,
  dynamic_smoke,
  packed_speed,
  self_speculation,
  smoke,
  sparsity_vs_accuracy,
  train_step_speed,
)
from experiments.plain_twin import PlainLM
from experiments.sweep import Run
from sparse_lm.core.errors import UserError
from sparse_lm.model import lm
from sparse_lm.report.results import append
from sparse_lm.runs import configs
from sparse_lm.runs import cost_report as cost
from sparse_lm.runs.build import build


def sizes(run):
  config = configs.load(run.config, run.overrides)
  program, target = build(config, vocab=256)
  return cost.report(program, target)


def test_the_small_dense_model_has_the_parameters_that_the_sparsest_keep():
  runs = sparsity_vs_accuracy.runs()
  small = next(run for run in runs if run.labels['method'] == 'small dense')
  sparse = next(
    run for run in runs if run.labels['sparsity'] == max(sparsity_vs_accuracy.STUDY.sparsities)
  )
  kept = sizes(sparse)['nonzero_params']
  assert abs(sizes(small)['params'] - kept) < 0.01 * kept


def test_each_method_meets_each_sparsity_on_the_same_seeds():
  seeds = {}
  for run in sparsity_vs_accuracy.runs():
    seeds.setdefault(tuple(run.labels.values()), set()).add(run.overrides['seed'])
  assert len(seeds) == 2 + 3 * 2
  assert set(map(frozenset, seeds.values())) == {frozenset({20, 21, 22, 23})}


def test_the_first_table_has_the_setting_that_was_chosen():
  chosen = configs.load(ablation_setting.CONFIG, ablation_setting.SETTINGS[ablation_setting.CHOSEN])
  first = configs.load(sparsity_vs_accuracy.STUDY.config)
  differing = {
    name for name, value in configs.flat(chosen).items() if configs.flat(first)[name] != value
  }
  assert differing <= {'train.checkpoint_every'}
  assert not set(ablation_setting.SEEDS) & set(sparsity_vs_accuracy.STUDY.seeds)


def test_the_smoke_study_runs_every_method_once():
  methods = [run.labels['method'] for run in smoke.runs()]
  assert sorted(methods) == sorted({run.labels['method'] for run in sparsity_vs_accuracy.runs()})


def test_speed_studies_plan_runs_that_load():
  for study in (
    train_step_speed,
    component_speed,
    packed_speed,
    break_even,
    block_attention,
    self_speculation,
  ):
    runs = study.runs()
    assert len({run.id('x') for run in runs}) == len(runs) > 2
    for run in runs:
      configs.load(run.config, run.overrides)


@pytest.mark.parametrize('name', ['block:32', 'channels', 'gather'])
def test_each_format_is_timed_beside_dense_matrices(name, monkeypatch, tmp_path):
  monkeypatch.setattr(break_even, 'REPEATS', 2)
  labels = {'format': name, 'matrix': '64x128', 'batch': 1, 'density': 0.25}
  found = break_even.execute(Run(break_even.CONFIG, {}, labels), tmp_path)['metrics']
  assert found['speedup'] > 0 and found['density'] == 0.25
  assert found['speedup_low'] <= found['speedup'] <= found['speedup_high']


def test_a_format_pays_up_to_the_largest_density_at_which_it_is_faster(tmp_path):
  speedups = {0.75: 0.6, 0.5: 1.2, 0.25: 0.9, 0.1: 3.0, 0.05: 4.0}
  env = {'cpu': 'c', 'cores': 2, 'device': 'cpu', 'jax': '0'}
  lines = [
    {
      'run': run.id('x'),
      'labels': run.labels,
      'seed': 0,
      'env': env,
      'metrics': {
        'speedup': speedups[run.labels['density']] * (run.labels['format'] != 'gather'),
        'dense_us': 5.0,
        'density': run.labels['density'],
      },
    }
    for run in break_even.runs()
  ]
  shown = break_even.report(lines, tmp_path).splitlines()
  rows = [[cell.strip() for cell in line.split('|')[1:-1]] for line in shown if '768x' in line]
  assert len(rows) == (4 * 3 + 1) * 2
  assert {row[4] for row in rows if row[0] != 'gathered rows'} == {'0.50'}
  assert {row[4] for row in rows if row[0] == 'gathered rows'} == {'0.00'}
  assert (tmp_path / 'break_even.png').exists()


def test_decoding_of_blocks_is_timed_beside_full_attention(monkeypatch, tmp_path):
  monkeypatch.setattr(block_attention, 'REPEATS', 2)
  sizes = {'model.layers': 1, 'model.width': 16, 'model.hidden': 16}
  sizes |= {'model.heads': 2, 'model.kv_heads': 2}
  monkeypatch.setattr(block_attention, 'SIZE', sizes)
  monkeypatch.setattr(block_attention, 'ROWS', [(8, 64)])
  (run,) = block_attention.runs()
  line = {'run': 'x', 'labels': run.labels, 'seed': 0} | run.execute(run, tmp_path)
  found = line['metrics']
  assert found['speedup_low'] <= found['speedup'] <= found['speedup_high']
  # Rows of 16 numbers: 80 slots of keys and of values; three blocks of 8 of both, and 8 means.
  assert found['full_cache_bytes'] == 2 * 80 * 64
  assert found['blocks_cache_bytes'] == (2 * 24 + 8) * 64
  assert f'{found["speedup"]:.2f}' in block_attention.report([line], tmp_path)
  assert (tmp_path / 'block_attention.png').exists()


@pytest.mark.slow
def test_every_model_that_decodes_is_timed_and_each_is_found_again():
  runs = accuracy_vs_time.runs()
  studies = {s: m.runs() for s, m in accuracy_vs_time.STUDIES.items()}
  random = [run for run in studies['dynamic_compute'] if 'random' in run.labels['method']]
  planned = sum(map(len, studies.values())) - len(random)
  assert len({run.id('x') for run in runs}) == len(runs) == planned and len(random) == 3 * 3
  assert any('hybrid' in run.labels['method'] for run in runs)
  for study, origins in studies.items():
    assert len({str(sorted(run.overrides.items())) for run in origins}) == len(origins)
    dense = accuracy_vs_time._dense(study)
    assert dense.weight.name == 'none' and dense.depth.name == 'residual'


def test_times_of_runs_from_busy_and_idle_hours_compare_by_their_ratios():
  def line(study, dense, packed):
    metrics = {'dense_decode_ms': dense, 'decode_speedup': dense / packed}
    return {'labels': {'study': study}, 'metrics': metrics}

  idle, busy, again = line('a', 2.0, 1.0), line('a', 6.0, 3.0), line('a', 2.0, 4.0)
  lines = accuracy_vs_time.with_time([idle, busy, again, line('b', 5.0, 5.0)])
  assert [line['metrics']['time_ms'] for line in lines] == [1.0, 1.0, 4.0, 5.0]


def test_a_study_is_compared_with_its_dense_model_at_the_losses_of_its_lines(tmp_path):
  lines = []
  for run in accuracy_vs_time.runs():
    dense, deep = run.labels['method'] == 'dense', run.labels['study'] == 'dynamic_compute'
    if dense or run.labels['method'] == 'moe_topk':
      metrics = dict.fromkeys(
        (f'{what}_speedup{end}' for what in ('decode', 'prefill') for end in ('', '_low', '_high')),
        1.0,
      )
      metrics |= dict.fromkeys(('weights_bytes', 'read_bytes'), 1e3) | {
        'dense_decode_ms': 0.2 + deep
      }
      measured = {'val_loss': 2.0 + deep + 0.25 * (not dense), 'flops_forward': 1e3}
      line = {'run': run.id('x'), 'labels': run.labels, 'seed': run.overrides['seed']}
      env = {'cpu': 'c', 'cores': 2, 'device': 'cpu', 'jax': '0'}
      lines.append(line | {'origin': run.id('origin'), 'metrics': metrics, 'env': env})
      origin = line | {'run': run.id('origin'), 'metrics': measured}
      append(tmp_path / run.labels['study'] / 'runs.jsonl', origin)
  folder = tmp_path / 'accuracy_vs_time'
  shown = accuracy_vs_time.report(lines, folder).splitlines()
  rows = [line for line in shown if 'MoE' in line]
  assert len(rows) == 3 and all('+0.2500' in row and '1.200' in row for row in rows)
  assert (folder / 'accuracy_vs_time.png').exists()
  with pytest.raises(UserError, match='no line of the run'):
    accuracy_vs_time.report([lines[0] | {'origin': 'another'}], folder)


def test_random_masks_of_the_speed_study_keep_their_share():
  config = {'model.layers': 2, 'model.width': 64, 'model.hidden': 128, 'model.heads': 4}
  model = lm.from_config(configs.load('configs/base.py', config | {'model.kv_heads': 4}), 256)
  draw = np.random.default_rng(0)
  for name in ('neuron', 'head', 'block:16'):
    masks = packed_speed._masks(model, name, 0.5, draw)
    assert masks and all(mask.mean() == 0.5 for mask in masks.values())


def test_the_budget_study_holds_every_estimator_that_a_price_moves_by_both_controllers(tmp_path):
  runs = budget_control.runs()
  assert len({tuple(run.labels.values()) for run in runs}) == len(runs) / 3 == 5 * 2
  assert 'random' not in {run.labels['estimator'] for run in runs}
  lines = [
    {'run': run.id('x'), 'labels': run.labels, 'seed': 0, 'metrics': metrics}
    for run, metrics in zip(
      [run for run in runs if run.overrides['seed'] == 0],
      [{'flops_forward_ratio': 0.58 + i / 100, 'val_loss': 2.0 + i} for i in range(10)],
    )
  ]
  table = budget_control.report(lines, tmp_path)
  assert '-0.020' in table and '+0.070' in table and (tmp_path / 'budget_control.png').exists()
  program, _ = build(configs.load(runs[0].config, runs[0].overrides), vocab=256)
  assert program.objective.budget.target == 0.6


def test_the_twin_has_as_many_parameters_as_the_default_model():
  import jax
  import jax.numpy as jnp

  program, target = build(configs.load('configs/base.py'), vocab=256)
  tokens = jnp.zeros((1, 8), jnp.int32)
  twin = PlainLM(program.model.spec)
  params = jax.eval_shape(twin.init, jax.random.key(0), tokens)['params']
  count = sum(leaf.size for leaf in jax.tree.leaves(params))
  assert count == cost.report(program, target)['params']


def dynamic(method, seed=0):
  return [
    run
    for run in dynamic_compute.runs()
    if run.labels['method'] == method and run.overrides['seed'] == seed
  ]


@pytest.mark.slow
def test_the_narrower_dense_models_cost_what_the_gates_are_held_at():
  (full,) = dynamic('dense')
  whole = sizes(full)['flops_forward']
  for run, target in zip(dynamic('dense, narrower'), dynamic_compute.TARGETS):
    assert sizes(run)['flops_forward'] / whole == pytest.approx(target, abs=0.005)


@pytest.mark.slow
def test_random_gates_have_the_rate_that_costs_the_target():
  for run, target in zip(dynamic('token_gate, random'), dynamic_compute.TARGETS):
    assert sizes(run)['flops_forward_ratio'] == pytest.approx(target, abs=0.001)
    learned = dynamic('token_gate, straight_through')
    assert any(other.overrides['budget.target'] == target for other in learned)


def test_each_row_of_the_dynamic_study_has_three_seeds_and_says_what_its_training_sees():
  seeds, training = {}, {}
  for run in dynamic_compute.runs():
    row = (run.labels['method'], run.labels['setting'])
    seeds.setdefault(row, set()).add(run.overrides['seed'])
    training[run.labels['method']] = run.labels['training']
  assert set(map(frozenset, seeds.values())) == {frozenset({0, 1, 2})}
  assert training['mixture_of_depths'] == 'sees later tokens'
  assert training['moe_topk'] == 'causal, sequences compete'  # for the slots of an expert
  assert training['hybrid: rigl + token_gate'] == 'causal'


def test_the_dynamic_smoke_study_runs_every_method_once():
  methods = [run.labels['method'] for run in dynamic_smoke.runs()]
  assert sorted(methods) == sorted({run.labels['method'] for run in dynamic_compute.runs()})


def test_the_dynamic_report_puts_flops_over_those_of_the_dense_model(tmp_path):
  lines = []
  for index, (method, flops) in enumerate((('dense', 200.0), ('moe_topk', 120.0))):
    labels = {'method': method, 'setting': '1 of 2 experts', 'training': 'causal'}
    metrics = {
      'val_loss': 2.0 + index,
      'flops_forward': flops,
      'flops_forward_ratio': 1.0,
      'flops_training_ratio': 1.0,
      'active': 0.3,
      **dict.fromkeys(('params', 'active_params', 'stored_bytes', 'train_step_ms'), 8.0),
      'sparsity_prunable': 0.0,
    } | ({'max_violation': 0.5} if index else {})
    lines.append({'run': f'r{index}', 'labels': labels, 'seed': 0, 'metrics': metrics})
  history = tmp_path / 'runs' / 'r1' / 'metrics.jsonl'
  history.parent.mkdir(parents=True)
  logged = {'block_0/mlp/load/0': 0.4, 'block_0/mlp/load/1': 0.6, 'block_0/mlp/entropy': 0.6}
  history.write_text(json.dumps({'step': 10} | logged) + '\n')
  assert '0.600' in dynamic_compute.report(lines, tmp_path)
  assert {path.name for path in tmp_path.glob('*.png')} == {
    'dynamic_compute.png',
    'router_health_top1.png',
  }
