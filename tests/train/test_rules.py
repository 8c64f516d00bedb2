"""2:4 by magnitude on the MLP beside RigL on blocks of attention: training, costs, bad configs."""

import io
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_array_equal

from sparse_lm.core import rng, tree
from sparse_lm.core.errors import UserError
from sparse_lm.runs import cost_report
from sparse_lm.runs.build import build
from sparse_lm.runs.checkpoint import Checkpoints
from sparse_lm.runs.loop import train
from sparse_lm.runs.setup import setup
from sparse_lm.runs.trained import load
from sparse_lm.train import one_shot

# Plain gradient descent: what rests and what moves is seen in the weights.
PLAIN = {
  'model__init': 'gpt2',
  'optimizer__name': 'sgd',
  'optimizer__momentum': 0.9,
  'optimizer__schedule': 'constant',
  'optimizer__warmup': 0.0,
  'optimizer__learning_rate': 0.1,
  'optimizer__clip': 0.0,  # the norm of all gradients would tie the leaves together
}
WIDTH, HIDDEN, CONTEXT, STEPS = 16, 32, 16, 12
MLP = {
  'name': 'magnitude',
  'pattern': '2:4',
  'sparsity': 0.5,
  'start': 0.0,
  'end': 0.5,
  'period': 2,
}
ATTENTION = {'name': 'rigl', 'pattern': 'block:4', 'sparsity': 0.75, 'period': 3, 'end': 1.0}


def rules(**groups):
  """Overrides that make the rules, in their order."""
  found = {'weight__order': tuple(groups)}
  for name, fields in groups.items():
    found |= {f'weight__rules__{name}__{field}': value for field, value in fields.items()}
  return found


def alone(fields, *dense):
  """Overrides for one method in the whole model, but for what stays dense."""
  stays = ('embed', 'head', 'norm', 'bias', 'router', *dense)
  return {f'weight__{field}': value for field, value in fields.items()} | {'weight__dense': stays}


BOTH = PLAIN | rules(mlp=MLP, attention=ATTENTION)


def start(config):
  run = setup(config)
  batches = run.data.train_iterator(rng.data_seed(0))
  return run, run.program.init(0, run.target), [next(batches) for _ in range(STEPS)]


@pytest.fixture(scope='module')
def trained(tiny_config):
  """The run, its states on the host from step 0 to the last, and what each step logged."""
  run, state, batches = start(tiny_config(**BOTH, optimizer__ema=0.9))
  states, logged = [jax.device_get(state)], []
  for step in range(STEPS):
    state, metrics = run.program.step(step)(state, batches[step])
    states.append(jax.device_get(state))
    logged.append(jax.device_get(metrics))
  return run, states, logged, batches


def owned(path):
  return next((name for name in ('mlp', 'attention') if f'/{name}/' in path), None)


def copied(state):
  """On the device, in buffers of its own: a step donates its state."""
  return jax.tree.map(jnp.copy, state)


def moments(state):
  like = jax.tree.structure(state.trainable['params'])
  found = jax.tree.leaves(state.opt_state, is_leaf=lambda node: jax.tree.structure(node) == like)
  return [tree.named(t) for t in found if jax.tree.structure(t) == like]


def test_every_rule_meets_its_own_pattern_and_sparsity(trained):
  run, states, _, _ = trained
  masks = tree.named(run.program.finalize(states[-1])[1])
  assert {owned(path) for path in masks} == {'mlp', 'attention'} and len(masks) == 6
  for path, mask in masks.items():
    mask = np.asarray(mask)
    if owned(path) == 'mlp':
      assert set(mask.reshape(-1, 4, mask.shape[1]).sum(axis=1).ravel()) == {2}
    else:
      tiles = mask.reshape(4, 4, 4, 4).sum(axis=(1, 3))
      assert sorted(tiles.ravel()) == [0] * 12 + [16] * 4
  for state in states:  # RigL's density holds from the first step, the ramp starts dense
    for path, mask in tree.named(state.sparse.masks).items():
      assert owned(path) == 'mlp' or mask.mean() == 0.25
      for held in (state.trainable, state.ema):
        assert not np.asarray(tree.named(held['params'])[path])[~mask].any()
  assert all(
    mask.all() for path, mask in tree.named(states[0].sparse.masks).items() if 'mlp' in path
  )


def test_a_step_that_rewires_rests_for_the_rules_own_leaves_alone(trained):
  run, states, _, batches = trained
  step = 3  # RigL updates its masks and magnitude does not
  assert [part.due(step) for part in run.program.method.parts.values()] == [False, True]
  before, after = states[step], states[step + 1]
  plain, _ = run.program.compiled()(copied(before), batches[step])
  weights, new, other = (tree.named(s.trainable['params']) for s in (before, after, plain))
  (held,), (now,), (moved) = moments(before), moments(after), moments(plain)
  rewired = 0
  for path, value in weights.items():
    if owned(path) == 'attention':
      old, mask = (tree.named(s.sparse.masks)[path] for s in (before, after))
      stayed = old & mask
      assert_array_equal(new[path][stayed], value[stayed])
      assert_array_equal(now[path], np.where(old != mask, 0, held[path]))
      assert not new[path][mask & ~old].any()
      rewired += int((old != mask).sum())
    else:  # as if there were no other rule
      assert_array_equal(new[path], np.asarray(other[path]))
      assert_array_equal(now[path], np.asarray(moved[0][path]))
      assert (new[path] != value).any(), path
  assert rewired > 0
  assert int(after.step) == step + 1


@pytest.mark.parametrize(('name', 'fields', 'other', 'step'), [
  ('mlp', MLP, 'attention', 2),
  ('attention', ATTENTION, 'mlp', 3),
])  # fmt: skip
def test_an_update_is_that_of_the_method_alone_on_its_own_leaves(
  name, fields, other, step, trained, tiny_config
):
  run, states, _, batches = trained
  program, target = build(
    tiny_config(**PLAIN, **alone(fields, other)), run.data.tokenizer.vocab_size
  )
  before, after = states[step], states[step + 1]
  state = jax.eval_shape(lambda: program.init(0, target))
  keep = {path for path in tree.named(before.sparse.masks) if owned(path) == name}
  # The same weights, masks of the method alone, and the moments of the run.
  theirs = tree.named(before.opt_state)
  state = state.replace(
    step=before.step,
    key=before.key,
    trainable={'params': before.trainable['params'], 'learned': {}},
    sparse=state.sparse.replace(
      masks=tree.only(keep, before.sparse.masks), target=tree.only(keep, before.sparse.target)
    ),
    opt_state=tree.map_named(lambda path, _: theirs[path], state.opt_state),
  )
  assert program.method.due(step)
  found, _ = program.step(step)(copied(state), batches[step])
  masks, params = tree.named(found.sparse.masks), tree.named(found.trainable['params'])
  assert keep == set(masks) and len(keep) == (2 if name == 'mlp' else 4)
  for path in keep:
    mask = tree.named(after.sparse.masks)[path]
    assert_array_equal(masks[path], mask)
    assert_array_equal(params[path], tree.named(after.trainable['params'])[path])


def test_costs_equal_a_hand_count_and_the_executed_flops(trained):
  run, states, logged, _ = trained
  report = cost_report.report(run.program, run.target)
  attention, mlp, vocab = 4 * WIDTH**2, 2 * WIDTH * HIDDEN, run.data.tokenizer.vocab_size
  assert report['prunable_params'] == attention + mlp
  assert report['sparsity_prunable'] == pytest.approx(
    (0.75 * attention + 0.5 * mlp) / (attention + mlp)
  )
  rest = 4 * WIDTH * CONTEXT + 2 * WIDTH * vocab  # scores over all pairs, and the head

  def forward(attention_density, mlp_density):
    return 2 * attention * attention_density + 2 * mlp * mlp_density + rest

  assert report['flops_forward'] == pytest.approx(forward(0.25, 0.5))

  def training(mlp_density, step):
    # In a step that rewires, attention's gradient is dense, and the MLP's is not.
    own = 1.0 if step in (3, 6, 9) else 0.25
    return 2 * forward(0.25, mlp_density) + forward(own, mlp_density)

  planned, held = 0.0, 1.0
  for step in range(STEPS):
    planned += training(held, step)
    if step <= 6 and step % 2 == 0:
      held = 1 - 0.5 * (1 - (1 - step / 6) ** 3)
  assert report['flops_training'] == pytest.approx(planned / STEPS, rel=1e-5)
  # Whole groups of four keep another share than the ramp asks for while it is under way.
  kept = [np.mean(s.sparse.masks['block_0']['mlp']['up']['kernel']) for s in states]
  ran = sum(training(kept[step], step) for step in range(STEPS))
  meter = run.meter()
  spent = sum(meter.step(step, float(m['flops_pass'])) for step, m in enumerate(logged))
  assert ran == pytest.approx(planned, rel=0.02) and ran != pytest.approx(planned, rel=1e-3)
  assert spent / cost_report.tokens(run.config, STEPS) == pytest.approx(ran / STEPS, rel=5e-3)


@pytest.mark.parametrize('name', ['rigl', 'magnitude'])
def test_one_rule_for_everything_trains_as_the_method_does_to_the_bit(name, tiny_config):
  fields = {'name': name, 'sparsity': 0.75, 'period': 3}
  losses = []
  for given in (alone(fields), rules(all=fields | {'match': ('.',)})):
    run, state, batches = start(tiny_config(**given))
    for step in range(8):
      state, metrics = run.program.step(step)(state, batches[step])
      losses.append(float(metrics['loss']))
  assert losses[:8] == losses[8:]


def test_steps_with_the_same_updates_share_an_executable(trained, tiny_config):
  run, *_ = trained
  other, _ = build(
    tiny_config(**(BOTH | {'weight__rules__attention__sparsity': 0.5}), optimizer__ema=0.9, seed=3),
    run.data.tokenizer.vocab_size,
  )
  assert other is run.program
  due = {
    step: tuple(n for n, p in other.method.parts.items() if p.due(step)) for step in range(STEPS)
  }
  assert set(due.values()) == {(), ('mlp',), ('attention',), ('mlp', 'attention')}
  assert other.step(1) is other.train_step and other.step(6) is other.mask_update_step
  assert other.step(2) is other.step(4) and other.step(3) is other.step(9)


def test_save_and_restore_round_trip(trained, tmp_path):
  run, states, _, _ = trained
  checkpoints = Checkpoints(tmp_path)
  checkpoints.save(states[-1], run.data.train_iterator(0))
  restored = checkpoints.restore(run.program.init(1, run.target))
  checkpoints.close()
  restored, want = restored.replace(key=None), states[-1].replace(key=None)
  assert jax.tree.structure(restored) == jax.tree.structure(want)
  jax.tree.map(assert_array_equal, restored, want)


def test_a_run_reports_what_each_rule_drops_and_how_rules_overlap(
  tiny_config, tmp_path, monkeypatch
):
  given = rules(mlp=MLP, rest={'name': 'static', 'sparsity': 0.25, 'match': ('query', 'mlp')})
  monkeypatch.setattr(sys, 'stderr', io.StringIO())
  config = tiny_config(**given)
  train(config, str(tmp_path / 'run'))
  lines = sys.stderr.getvalue().splitlines()
  assert (
    '50.0% of 1,024 of rule mlp to be dropped, 25.0% of 256 of rule rest to be dropped' in lines[0]
  )
  assert lines[1].startswith("the rules 'mlp' and 'rest' both match block_0/mlp/down/kernel, ")
  assert lines[2].startswith('no rule matches block_0/attention/key/kernel, ')
  found = load(str(tmp_path / 'run'))
  assert {path: float(np.mean(mask)) for path, mask in tree.named(found.masks).items()} == {
    'block_0/attention/query/kernel': 0.75,
    'block_0/mlp/up/kernel': 0.5,
    'block_0/mlp/down/kernel': 0.5,
  }


BAD = {
  'matches nothing': (
    rules(mpl=MLP),
    ["config.weight.rules.mpl.match=('mpl',)", 'block_0/mlp/up/kernel'],
  ),
  'owns nothing': (
    rules(all=MLP | {'match': ('block',)}, mlp=MLP),
    ['config.weight.rules.mlp.match', 'earlier rules (all)'],
  ),
  'dense alone': (rules(norm=MLP), ["config.weight.rules.norm.match=('norm',)", 'no prunable']),
  'a pattern that does not fit': (
    rules(mlp=MLP | {'pattern': '2:5'}),
    ["config.weight.rules.mlp.pattern '2:5'", 'divisor'],
  ),
  'a sparsity that units cannot express': (
    rules(mlp=MLP | {'sparsity': 0.4}),
    ['config.weight.rules.mlp.pattern', 'config.weight.rules.mlp.sparsity=0.5'],
  ),
  'units that the rule has none of': (
    rules(attention=MLP | {'pattern': 'neuron'}),
    ['config.weight.rules.attention.match', 'block_0/attention/key/kernel', 'none of them'],
  ),
  'units that cannot grow': (
    rules(attention=ATTENTION | {'pattern': 'head'}),
    ["config.weight.rules.attention.pattern='head'"],
  ),
  'a sparsity without a method': (
    rules(mlp={'name': 'none', 'sparsity': 0.5}),
    [
      'config.weight.rules.mlp.sparsity=0.5',
      'needs a method',
      "config.weight.rules.mlp.name='none'",
    ],
  ),
  'a sparsity that is learned': (
    rules(mlp={'name': 'l0', 'sparsity': 0.5}),
    ['config.weight.rules.mlp.sparsity=0.5', 'learns its sparsity'],
  ),
  'a ramp that ends before it starts': (
    rules(mlp=MLP | {'start': 0.8}),
    ['config.weight.rules.mlp.end=0.5', 'config.weight.rules.mlp.start=0.8'],
  ),
}


@pytest.mark.parametrize('case', BAD)
def test_bad_rules_are_one_line_that_names_the_rules_field(case, tiny_config):
  given, words = BAD[case]
  with pytest.raises(UserError) as refused:
    build(tiny_config(**given), 23)
  line = str(refused.value)
  assert '\n' not in line and all(word in line for word in words), line


def test_a_rule_whose_method_does_not_train_points_to_the_command(tiny_config):
  given = rules(mlp={'name': 'wanda', 'sparsity': 0.5}, attention=ATTENTION)
  with pytest.raises(
    UserError, match=r"config\.weight\.rules\.mlp\.name='wanda'.*sparse_lm\.prune"
  ):
    setup(tiny_config(**given))


def test_pruning_by_rules_is_each_methods_own(tiny_config):
  mlp, attention = {'name': 'wanda', 'sparsity': 0.5}, {'name': 'sparsegpt', 'sparsity': 0.75}
  tokens = np.random.default_rng(0).integers(0, 23, (6, CONTEXT)).astype(np.int32)

  def drawn(path, w):
    normal = np.random.default_rng(sum(map(ord, path))).normal
    return jnp.asarray(normal(0, 0.3, w.shape), jnp.float32)

  def pruned(given):
    program, target = build(tiny_config(**given), 23)
    params = tree.map_named(drawn, program.init(0, target).trainable['params'])
    trainable, sparse = one_shot.prune(program, params, {}, target, tokens, 4, seed=0)
    return tree.named(trainable['params']), tree.named(sparse.masks)

  params, masks = pruned(rules(mlp=mlp, attention=attention))
  assert {owned(path) for path in masks} == {'mlp', 'attention'}
  # In the only layer both read what no pruning has changed.
  for fields, other in ((mlp, 'attention'), (attention, 'mlp')):
    own_params, own_masks = pruned(alone(fields, other))
    for path, mask in own_masks.items():
      assert_array_equal(masks[path], mask)
      assert_array_equal(params[path], own_params[path])
