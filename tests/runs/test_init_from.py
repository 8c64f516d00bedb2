"""Runs that start from another run, and runs that learn from another's predictions."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_array_equal

from sparse_lm.core import rng, tree
from sparse_lm.core.errors import UserError
from sparse_lm.cost import predict
from sparse_lm.prune import prune
from sparse_lm.runs import configs
from sparse_lm.runs.checkpoint import Checkpoints
from sparse_lm.runs.console import opening
from sparse_lm.runs.loop import train
from sparse_lm.runs.setup import setup
from sparse_lm.runs.trained import load
from sparse_lm.train.step import Program
from sparse_lm.train.work import Work

STEPS, CUT = 10, 5
SPARSITY = 0.625  # of 16 and of 32 inputs alike
# Everything that could wake a dropped weight, or move a kept one before the first step.
TUNED = {
  'weight__name': 'static',
  'optimizer__weight_decay': 0.5,
  'optimizer__learning_rate': 1e-2,
  'optimizer__ema': 0.8,
  'train__steps': STEPS,
}


@pytest.fixture(scope='module')
def dense(tiny_config, tmp_path_factory):
  """The workdir of a dense run."""
  workdir = tmp_path_factory.mktemp('dense')
  train(tiny_config(), str(workdir), progress=False)
  return str(workdir)


@pytest.fixture(scope='module')
def sparse(dense, tmp_path_factory):
  """The workdir of the dense run, pruned."""
  out = str(tmp_path_factory.mktemp('sparse') / 'run')
  prune(dense, out, {'weight.name': 'wanda', 'weight.sparsity': SPARSITY}, segments=4)
  return out


@pytest.fixture(scope='module')
def tuned(sparse, tiny_config, tmp_path_factory):
  """Config, workdir and result of a run that trains what the pruned one keeps."""
  config = tiny_config(init_from=sparse, **TUNED)
  workdir = tmp_path_factory.mktemp('tuned')
  return config, workdir, train(config, str(workdir), progress=False)


def last_state(config, workdir):
  run = setup(config)
  checkpoints = Checkpoints(pathlib.Path(workdir))
  batches = run.data.train_iterator(rng.data_seed(config.seed))
  state = checkpoints.restore(run.program.init(0, run.target), batches)
  checkpoints.close()
  return jax.device_get(state.replace(key=None)), next(batches)


def equal(a, b):
  assert jax.tree.structure(a) == jax.tree.structure(b)
  jax.tree.map(assert_array_equal, a, b)


def test_a_run_starts_from_its_parents_weights_and_masks(sparse, tuned):
  parent, state = load(sparse), setup(tuned[0]).start()
  assert int(state.step) == 0 and parent.is_sparse
  equal(state.trainable['params'], parent.params)
  equal(state.ema, state.trainable)
  equal(state.sparse.masks, parent.masks)
  moments = [leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim]
  assert moments and not any(leaf.any() for leaf in moments)
  for path, density in tree.named(state.sparse.target).items():
    assert float(density) == pytest.approx(np.mean(tree.named(parent.masks)[path]))


def test_zeros_survive_decay_momentum_and_averages(sparse, tuned):
  config, workdir, _ = tuned
  masks = tree.named(load(sparse).masks)
  before = tree.named(load(sparse).params)
  state, _ = last_state(config, workdir)
  assert int(state.step) == STEPS and len(masks) == 6
  equal(tree.named(state.sparse.masks), masks)
  for params in (state.trainable['params'], state.ema['params'], load(str(workdir)).params):
    for path, mask in masks.items():
      mask, now = np.asarray(mask), np.asarray(tree.named(params)[path])
      assert not now[~mask].any() and now[mask].all()
      assert np.abs(now - before[path])[mask].mean() > 1e-4  # it did train


@pytest.mark.parametrize('held', ['trainable', 'ema'])
def test_a_state_that_is_less_sparse_than_its_masks_is_not_saved(
  held, sparse, tiny_config, tmp_path, monkeypatch
):
  compiled = Program.step

  def waking(program, number):
    def step(*arguments):
      state, metrics = compiled(program, number)(*arguments)
      tree_ = jax.tree.map(jnp.copy, getattr(state, held))
      kernel = tree_['params']['block_0']['mlp']['up']['kernel']
      mask = state.sparse.masks['block_0']['mlp']['up']['kernel']
      tree_['params']['block_0']['mlp']['up']['kernel'] = jnp.where(mask, kernel, 0.5)
      return state.replace(**{held: tree_}), metrics

    return step

  monkeypatch.setattr(Program, 'step', waking)
  config = tiny_config(init_from=sparse, **TUNED)
  with pytest.raises(ValueError, match=rf'320 dropped weights of block_0/mlp/up/kernel \({held}\)'):
    train(config, str(tmp_path), progress=False)
  checkpoints = Checkpoints(tmp_path)
  assert not checkpoints.steps()
  checkpoints.close()


def test_the_result_reports_the_masks_sparsity_and_not_the_configs(sparse, tuned):
  config, workdir, result = tuned
  masks = jax.tree.leaves(load(sparse).masks)
  dropped = sum(int((~np.asarray(mask)).sum()) for mask in masks)
  share = dropped / sum(mask.size for mask in masks)
  assert config.weight.sparsity == 0 and share == SPARSITY
  assert result['metrics']['sparsity_prunable'] == pytest.approx(share, rel=1e-6)
  lines = [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]
  assert [line['density'] for line in lines if 'density' in line] == pytest.approx(
    [1 - share] * STEPS
  )


def test_a_loaded_run_costs_what_its_result_says(tuned):
  costs, metrics = load(str(tuned[1])).costs(), tuned[2]['metrics']
  assert {name: metrics[name] for name in costs} == costs


def forward_flops(density, vocab):
  """Per token of conftest's model: its matrices, scores and values of 16 keys, and the head."""
  return 2 * (4 * 16 * 16 + 2 * 16 * 32) * density + 2 * 2 * 16 * 16 + 2 * 16 * vocab


def test_training_costs_what_ran_in_this_run_and_in_those_before_it(dense, sparse, tuned):
  parent, pruned, child = (load(path) for path in (dense, sparse, str(tuned[1])))
  vocab = parent.tokenizer.vocab_size
  whole, left = forward_flops(1, vocab), forward_flops(1 - SPARSITY, vocab)
  costs = [run.costs() for run in (parent, pruned, child)]
  ratios = [
    (c['flops_training_ratio'], c['flops_training_total_ratio'], c['flops_training']) for c in costs
  ]
  assert ratios[0] == pytest.approx((1, 1, 3 * whole))
  assert ratios[1] == pytest.approx((0, 1, 0))  # pruning trains nothing
  own, before = left / whole, parent.step / STEPS
  assert ratios[2] == pytest.approx((own, own + before, 3 * left))


def test_a_teachers_forward_pass_is_part_of_a_step(dense, sparse, tiny_config):
  for teacher, density in ((dense, 1), (sparse, 1 - SPARSITY)):
    run = setup(tiny_config(init_from=sparse, distill__teacher=teacher, **TUNED))
    vocab = run.data.tokenizer.vocab_size
    assert run.meter().teacher == pytest.approx(forward_flops(density, vocab))
  meter, tokens = run.meter(), run.config.data.batch * run.config.data.context
  assert meter.step(0, 1000.0) == pytest.approx(tokens * (3 * 1000 + meter.teacher))
  assert f'{SPARSITY:.1%} of 2,048 to be dropped' in opening(run, 'x', 0)
  assert run.inherited == Work(0.0, load(sparse).work.total) and run.inherited.total > 0


def test_the_prediction_of_a_distilled_run_counts_parent_and_teacher(dense, sparse, tiny_config):
  config = tiny_config(init_from=sparse, distill__teacher=dense, **TUNED)
  _, _, report = predict(config)
  vocab = load(dense).tokenizer.vocab_size
  whole, left = forward_flops(1, vocab), forward_flops(1 - SPARSITY, vocab)
  own, before = (3 * left + whole) / (3 * whole), load(dense).step / STEPS
  assert report['flops_training_ratio'] == pytest.approx(own)
  assert report['flops_training_total_ratio'] == pytest.approx(own + before)


def test_a_run_continued_is_exact_and_does_not_start_again(
  sparse, tuned, tiny_config, train_until, tmp_path
):
  config, workdir, _ = tuned
  train_until(config, tmp_path, CUT)
  train(config, str(tmp_path), progress=False)
  (state, batch), (want, other_batch) = (last_state(config, w) for w in (tmp_path, workdir))
  equal(state, want)
  assert_array_equal(batch, other_batch)
  steps = [json.loads(line) for line in (tmp_path / 'metrics.jsonl').read_text().splitlines()]
  assert [line['step'] for line in steps if 'loss' in line] == list(range(1, STEPS + 1))


def test_masks_of_what_the_config_calls_dense_are_refused_or_kept(dense, tiny_config, tmp_path):
  fields = {'weight.name': 'magnitude', 'weight.sparsity': 0.5, 'weight.dense': ('norm', 'head')}
  prune(dense, str(tmp_path / 'parent'), fields, segments=1)
  config = tiny_config(init_from=str(tmp_path / 'parent'), **TUNED)  # its embedding is dense
  try:
    state = setup(config).start()
  except UserError as refused:
    assert 'config.weight.dense' in str(refused)
    return
  equal(state.sparse.masks, load(str(tmp_path / 'parent')).masks)


def test_a_parent_that_pruned_less_leaves_the_rest_full(dense, tiny_config, tmp_path):
  fields = {
    'weight.name': 'magnitude',
    'weight.sparsity': 0.5,
    'weight.dense': ('embed', 'norm', 'head', 'attention'),
  }
  prune(dense, str(tmp_path / 'parent'), fields, segments=1)
  parent = load(str(tmp_path / 'parent'))
  state = setup(tiny_config(init_from=str(tmp_path / 'parent'), **TUNED)).start()
  equal(state.trainable['params'], parent.params)
  for path, mask in tree.named(state.sparse.masks).items():
    if 'attention' in path:
      assert mask.all() and float(tree.named(state.sparse.target)[path]) == 1
    else:
      assert_array_equal(mask, tree.named(parent.masks)[path])


STE = {'weight__name': 'magnitude', 'weight__apply': 'straight_through', 'weight__start': 0.0}
STE |= {'weight__schedule': 'at_once'}


@pytest.mark.parametrize('name', ['magnitude', 'rigl', 'ste', 'none'])
def test_a_dense_parent_hands_on_its_weights_to_any_method(name, dense, tiny_config):
  sparsity = {} if name == 'none' else {'weight__sparsity': 0.5}
  own = STE if name == 'ste' else {'weight__name': name}
  run = setup(tiny_config(init_from=dense, **own, **sparsity))
  state, parent = run.start(), load(dense).params
  seen, density = run.program.method.effective(state.trainable, state.sparse, 'train', 0, None)
  if name in ('magnitude', 'ste', 'none'):  # these keep dense weights at first
    equal(state.trainable['params'], parent)
  if name in ('rigl', 'ste'):
    assert [float(d) for d in tree.named(density).values()] == pytest.approx([0.5] * 6, abs=0.01)
  fresh = tree.named(setup(tiny_config(**own, **sparsity)).start().trainable['params'])
  for path, weights in tree.named(seen).items():
    kept = np.asarray(weights) != 0
    # Random masks of a smaller fan-in may be scaled; where the weights are from is not in doubt.
    ratio = np.asarray(weights)[kept] / np.asarray(tree.named(parent)[path])[kept]
    assert (ratio > 0).all() and (name == 'rigl' or (ratio == 1).all()), path
    if not path.endswith('scale') and fresh[path].any():
      assert not np.allclose(fresh[path], tree.named(parent)[path], atol=1e-3)


@pytest.mark.parametrize('tokenizer', ['chars', 'bpe'])
def test_fine_tuning_reads_other_text_in_the_tokens_of_its_parent(
  tokenizer, text_file, tiny_config, tmp_path
):
  parent = tiny_config(data__tokenizer=tokenizer, data__vocab_size=270, train__steps=1)
  train(parent, str(tmp_path / 'parent'), progress=False)
  other = tmp_path / 'other.txt'
  other.write_text('the cat runs over the lazy tree ' * 100)  # it lacks characters of the first
  fields = {'init_from': str(tmp_path / 'parent'), 'data.path': str(other), 'train.steps': 1}
  config = configs.load('configs/tiny.py', fields | MODEL)
  assert (config.data.tokenizer, config.data.context) == (tokenizer, 16)
  result = train(config, str(tmp_path / 'child'), progress=False)
  saved = configs.from_json(json.loads((tmp_path / 'child' / 'config.json').read_text()))
  assert saved.data == config.data and saved.data.path == str(other)
  tokens = load(str(tmp_path / 'parent')).tokenizer
  child = load(str(tmp_path / 'child'))
  assert child.tokenizer == tokens == setup(config).data.tokenizer
  assert result['data']['tokenizer_sha256'] == tokens.digest
  pruned = prune(
    str(tmp_path / 'child'), str(tmp_path / 'pruned'), {'weight.name': 'magnitude'}, segments=1
  )
  assert pruned['data']['tokenizer_sha256'] == tokens.digest


# What `tiny_config` says of the model, without its data.
MODEL = {
  'model.layers': 1,
  'model.width': 16,
  'model.hidden': 32,
  'model.heads': 2,
  'model.kv_heads': 2,
}

BAD = {
  'a method that loses masks': ({'weight__name': 'magnitude'}, ['config.init_from', "'static'"]),
  'rigl': ({'weight__name': 'rigl', 'weight__sparsity': 0.5}, ['config.init_from', "'static'"]),
  'no method': ({'weight__name': 'none'}, ['config.init_from', "'static'"]),
  'a sparsity of its own': ({'weight__sparsity': 0.7}, ['config.weight.sparsity=0.7', 'valid: 0']),
  'width': ({'model__width': 32}, ['config.init_from', 'block_0/attention/key/kernel', '(16, 16)']),
  'hidden': ({'model__hidden': 48}, ['config.init_from', 'block_0/mlp/down/kernel', '(48, 16)']),
  'more layers': ({'model__layers': 2}, ['config.init_from', 'block_1/', 'missing there']),
  'fewer parameters': ({'model__tied': True}, ['embed/head/kernel', 'missing here']),
  'another tokenizer': ({'data__tokenizer': 'bytes'}, ['config.init_from', 'tokenizer']),
  'no such run': ({'init_from': 'no/such/run'}, ['no/such/run', 'holds no run']),
  'teacher of another shape': (
    {'model__width': 32, 'init_from': '', 'distill__teacher': True},
    ['config.distill.teacher', 'block_0/attention/key/kernel'],
  ),
  'no such teacher': ({'distill__teacher': 'no/such/run'}, ['no/such/run', 'holds no run']),
}


@pytest.mark.parametrize('case', BAD)
def test_bad_input_is_refused_in_one_line_and_leaves_no_folder(case, sparse, tiny_config, tmp_path):
  given, expected = BAD[case]
  fields = {'init_from': sparse, **TUNED, **given}
  if fields.get('distill__teacher') is True:
    fields['distill__teacher'] = sparse
  with pytest.raises(UserError) as refused:
    train(tiny_config(**fields), str(tmp_path / 'run'), progress=False)
  line = str(refused.value)
  assert all(part in line for part in expected) and '\n' not in line, line
  assert not list(tmp_path.iterdir())
