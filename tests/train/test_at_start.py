"""Masks that are chosen before the first step, without any other change of the state."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import SMALL
from numpy.testing import assert_allclose, assert_array_equal

from sparse_lm.core import rng, tree
from sparse_lm.plan import sites
from sparse_lm.runs import cost_report
from sparse_lm.runs.at_start import prune_at_start
from sparse_lm.runs.loop import train
from sparse_lm.runs.setup import setup
from sparse_lm.runs.trained import load
from sparse_lm.train import __main__ as command
from sparse_lm.train.step import Program
from sparse_lm.weights import collect, parts

SNIP = {
  'weight__name': 'snip',
  'weight__sparsity': 0.75,
  'weight__pattern': 'global:raw:0.1',
  'weight__batches': 3,
  'model__init': 'gpt2',
  'optimizer__ema': 0.9,
}
MLP = ('block_0/mlp/up/kernel', 'block_0/mlp/down/kernel')


@pytest.fixture(scope='module')
def pruned(tiny_config):
  """The run, its state before and after its masks were chosen, and its first batches."""
  run = setup(tiny_config(**SNIP))
  before = jax.device_get(run.start())
  batches = run.data.train_iterator(rng.data_seed(0))
  return (
    run,
    before,
    jax.device_get(prune_at_start(run, run.start())),
    [next(batches) for _ in range(4)],
  )


def signal_of(run, state, batches):
  """The mean gradient that the run reads from these batches before step 0, by path."""
  program = run.program
  collected = parts.collect_at_start(program.method, state.trainable['params'], run.target)
  for number, tokens in enumerate(batches):
    collected = program.collect_at_start(state, collected, tokens, None, number, ('',))
  return tree.named(jax.device_get(collect.means(collected['']))['grads'])


def mlp_loss(run, params, tokens):
  """`{path: kernel} -> mean nats`, in float64 from what the MLP reads on."""
  read = jax.jit(lambda params, t: sites.run(run.program.model, {'params': params}, t, read=['*']))
  _, values = read(params, tokens[:, :-1])
  x = np.float64(values['residual_0'] + values['block_0/attention/output'])
  leaf = {name: np.float64(array) for name, array in tree.named(params).items()}

  def norm(x, scale):
    return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + 1e-5) * scale

  def loss(kernels):
    up, down = (kernels.get(name, leaf[name]) for name in MLP)
    hidden = np.maximum(norm(x, leaf['block_0/norm_2/scale']) @ up, 0) ** 2
    logits = norm(x + hidden @ down, leaf['norm/scale']) @ leaf['embed/head/kernel']
    logits -= np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    return -np.take_along_axis(logits, tokens[:, 1:, None], axis=-1).mean()

  return loss


def test_the_signal_is_the_mean_gradient_by_finite_differences_in_float64(pruned):
  run, before, _, batches = pruned
  got = signal_of(run, before, batches[:3])
  params = before.trainable['params']
  losses = [mlp_loss(run, params, tokens) for tokens in batches[:3]]
  for path in MLP:
    kernel = np.float64(tree.named(params)[path])
    largest = np.argsort(-np.abs(got[path]), axis=None)[[0, 10, 100]]
    for place in zip(*np.unravel_index(largest, kernel.shape)):
      moved = [kernel.copy(), kernel.copy()]
      moved[0][place] += 1e-4
      moved[1][place] -= 1e-4
      ends = [np.mean([loss({path: one}) for loss in losses]) for one in moved]
      assert_allclose(got[path][place], (ends[0] - ends[1]) / 2e-4, rtol=1e-3), (path, place)


def gradient_of(run, params, tokens):
  """The gradient of the mean nats over all of `tokens` together, written without the training step."""

  def nats(params):
    logits = run.program.model.apply({'params': params}, tokens[:, :-1], mode='eval')
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]))

  return tree.named(jax.device_get(jax.jit(jax.grad(nats))(params)))


def wanted(run, params, tokens):
  """The masks by stable sorts: a tenth of each matrix, then the largest of all, 512 of 2048."""
  grads = gradient_of(run, params, tokens)
  scores = {path: np.abs(grads[path] * tree.named(params)[path]) for path in tree.named(run.target)}
  for array in scores.values():
    array.ravel()[np.argsort(-array, axis=None, kind='stable')[: round(array.size / 10)]] += 1e9
  every = np.concatenate([array.ravel() for array in scores.values()])
  mask = np.zeros(every.size, bool)
  mask[np.argsort(-every, kind='stable')[:512]] = True
  ends = np.cumsum([array.size for array in scores.values()])[:-1]
  return {
    path: part.reshape(scores[path].shape) for path, part in zip(scores, np.split(mask, ends))
  }


def test_masks_are_one_ranking_of_the_mean_gradient_times_the_weight_with_a_floor(pruned):
  run, before, after, batches = pruned
  want = wanted(run, before.trainable['params'], np.concatenate(batches[:3]))
  got = tree.named(after.sparse.masks)
  assert got.keys() == want.keys() and sum(mask.sum() for mask in got.values()) == 512
  assert (
    len({mask.mean() for mask in got.values()}) > 3
  )  # a ranking of each matrix would be uniform
  for path, mask in got.items():
    assert mask.sum() >= round(mask.size / 10)
    assert (mask != want[path]).mean() <= 0.004, path  # equal but for what rounding ties
  # Absolute values of each batch, meaned after, would rank otherwise.
  other = np.mean(
    [np.abs(gradient_of(run, before.trainable['params'], b)[MLP[0]]) for b in batches[:3]], axis=0
  )
  mean = np.abs(gradient_of(run, before.trainable['params'], np.concatenate(batches[:3]))[MLP[0]])
  assert np.abs(other - mean).max() > 0.1 * mean.max()


def test_only_masks_and_dropped_weights_have_changed(pruned):
  run, before, after, _ = pruned
  assert int(after.step) == 0 and np.array_equal(
    jax.random.key_data(after.key), jax.random.key_data(before.key)
  )
  for held in ('trainable', 'ema'):
    old, new = (tree.named(getattr(state, held)['params']) for state in (before, after))
    for path, weights in new.items():
      mask = tree.named(after.sparse.masks).get(path, True)
      assert_array_equal(weights, np.where(mask, old[path], 0))
  jax.tree.map(assert_array_equal, after.opt_state, before.opt_state)
  assert not any(map(run.program.method.due, range(run.config.train.steps)))


def test_microbatches_give_the_same_masks(pruned, tiny_config):
  split = setup(tiny_config(**SNIP, train__accumulation=4))
  masks = tree.named(jax.device_get(prune_at_start(split, split.start()).sparse.masks))
  for path, mask in tree.named(pruned[2].sparse.masks).items():
    assert (mask != masks[path]).mean() <= 0.004, path


def test_running_thresholds_do_not_move_and_every_expert_has_its_floor(tiny_config):
  run = setup(tiny_config(**SNIP, mlp__name='expert_choice'))
  before = jax.device_get(run.start().model_state)
  after = prune_at_start(run, run.start())
  assert jax.tree.leaves(before)
  jax.tree.map(assert_array_equal, after.model_state, before)
  for path, mask in tree.named(after.sparse.masks).items():
    each = np.asarray(mask).reshape(-1, *mask.shape[-2:])
    assert (each.sum(axis=(1, 2)) >= round(each[0].size / 10)).all(), path


def test_the_control_shuffles_each_matrix_and_keeps_its_count(pruned, tiny_config):
  masks = [
    tree.named(jax.device_get(prune_at_start(run, run.start()).sparse.masks))
    for run in (setup(tiny_config(**SNIP, weight__shuffle=True, seed=seed)) for seed in (0, 0, 1))
  ]
  for path, mask in tree.named(pruned[2].sparse.masks).items():
    one, again, other = (found[path] for found in masks)
    assert one.sum() == mask.sum()
    assert_array_equal(one, again)
    # Two random masks of density d differ in 2 d (1 - d) of the places.
    d = mask.mean()
    assert (one != mask).mean() == pytest.approx(2 * d * (1 - d), rel=0.35)
    assert (one != other).any()


def test_rules_read_their_own_number_of_batches_beside_other_methods(tiny_config):
  own = {'name': 'snip', 'sparsity': 0.5, 'pattern': 'unstructured'}
  rules = {'weight__order': ('mlp', 'out', 'rest')}
  for name, fields in {
    'mlp': own | {'batches': 1},
    'out': own | {'batches': 3, 'match': ('attention/out',)},
    'rest': {'name': 'static', 'sparsity': 0.5, 'rescale': 'none', 'match': ('attention',)},
  }.items():
    rules |= {f'weight__rules__{name}__{field}': value for field, value in fields.items()}
  run = setup(tiny_config(model__init='gpt2', **rules))
  before = jax.device_get(run.start())
  masks = tree.named(jax.device_get(prune_at_start(run, run.start()).sparse.masks))
  data = run.data.train_iterator(rng.data_seed(0))
  batches = [next(data) for _ in range(3)]
  params = before.trainable['params']  # sparse where the static rule has its masks
  for path, count in {MLP[0]: 1, 'block_0/attention/out/kernel': 3}.items():
    grads = gradient_of(run, params, np.concatenate(batches[:count]))[path]
    scores = np.abs(grads * tree.named(params)[path])
    want = scores >= np.sort(scores, axis=None)[scores.size // 2]
    assert (masks[path] != want).mean() <= 0.004, path
  old = tree.named(before.sparse.masks)
  assert_array_equal(masks['block_0/attention/query/kernel'], old['block_0/attention/query/kernel'])
  # A batch before step 0 is dense where masks are chosen, forwards and backwards.
  target = {path: float(density) for path, density in tree.named(run.target).items()}
  dense = {
    path: 0.5 if 'query' in path or 'key' in path or 'value' in path else 1 for path in target
  }
  assert run.program.start_flops(target) == pytest.approx(
    3 * run.program.costs.training_pass(dense)
  )
  assert run.meter().at_start() == pytest.approx(3 * 64 * run.program.start_flops(target))


def test_a_method_without_signals_needs_no_batch(tiny_config):
  run = setup(
    tiny_config(weight__name='magnitude', weight__schedule='at_start', weight__sparsity=0.75)
  )
  before, after = run.start(), prune_at_start(run, run.start())
  assert run.meter().at_start() == 0
  for path, mask in tree.named(after.sparse.masks).items():
    w = np.abs(np.asarray(tree.named(before.trainable['params'])[path]))
    assert_array_equal(mask, w >= np.sort(w, axis=None)[-w.size // 4])
  assert run.program.method.density(0.25, 0) == 0.25 and not run.program.method.due(0)


@pytest.fixture
def texts(monkeypatch):
  """By the number of the step, the tokens that the last run's steps were given."""
  seen, step = {}, Program.step

  def spied(program, number):
    compiled = step(program, number)

    def run(state, tokens, taught):
      seen[number] = np.array(tokens)
      return compiled(state, tokens, taught)

    return run

  monkeypatch.setattr(Program, 'step', spied)
  return seen


@pytest.mark.slow
def test_a_run_reads_its_siblings_text_pays_for_the_batches_and_resumes_exactly(
  pruned, texts, tiny_config, train_until, tmp_path
):
  sibling = tiny_config(model__init='gpt2', train__steps=4)
  train(sibling, str(tmp_path / 'none'), progress=False)
  dense = dict(texts)
  config = tiny_config(**SNIP, train__steps=4)
  result = train(config, str(tmp_path / 'snip'), progress=False)
  assert len(texts) == 4
  for step, tokens in texts.items():
    assert_array_equal(tokens, dense[step])
  # Three dense steps before the first, and four at a quarter of the weights of the kernels.
  kernels, rest = 2 * 2048, 2 * 2 * 16 * 16 + 2 * 16 * pruned[0].data.tokenizer.vocab_size
  spent = 3 * (3 * (kernels + rest) + 4 * (kernels / 4 + rest)) / 4
  assert result['metrics']['flops_training'] == pytest.approx(spent)
  target = {path: float(density) for path, density in tree.named(pruned[0].target).items()}
  assert cost_report.predicted(setup(config).program, target) == pytest.approx(spent)
  train_until(config, tmp_path / 'cut', 2)
  train(config, str(tmp_path / 'cut'), progress=False)
  params, masks = [], []
  for name in ('snip', 'cut'):
    run = load(str(tmp_path / name))
    params.append(run.params)
    masks.append(run.masks)
    assert run.work.own == pytest.approx(spent * 4 * 64)
  jax.tree.map(assert_array_equal, *params)
  jax.tree.map(assert_array_equal, *masks)
  jax.tree.map(assert_array_equal, masks[0], pruned[2].sparse.masks)  # and to the end


@pytest.mark.parametrize(('given', 'words'), [
  ({'weight.batches': 1000}, ['config.weight.batches=1000', 'valid: up to 1', 'data.batch']),
  ({'weight.pattern': 'global:raw:0.5'}, ['config.weight.pattern', '0.5', 'leaves 512']),
  ({'weight.pattern': '2:4', 'weight.sparsity': 0.5, 'weight.shuffle': True},
   ['config.weight.pattern', 'config.weight.shuffle=True']),
  ({'weight.schedule': 'cubic', 'weight.shuffle': True}, ['config.weight.shuffle=True', 'at_start']),
  ({'weight.name': 'magnitude', 'weight.schedule': 'at_start', 'weight.apply': 'soft',
    'weight.pattern': 'unstructured'}, ['config.weight.schedule', 'cubic or at_once']),
  ({'model.init': 'fan_in'}, ['is zero before step 0', 'config.model.init=gpt2', '6 such']),
])  # fmt: skip
def test_bad_input_is_one_line_with_exit_code_2(given, words, text_file, call, tmp_path):
  own = {name.replace('__', '.'): value for name, value in SNIP.items()}
  fields = SMALL | own | {'data.path': str(text_file)} | given
  arguments = [f'--config.{name}={value}' for name, value in fields.items()]
  code, _, err = call(
    command, ['--config=configs/tiny.py', f'--workdir={tmp_path / "run"}', *arguments]
  )
  lines = [line for line in err.splitlines() if 'config.' in line]
  assert code == 2 and len(lines) == 1 and all(word in lines[0] for word in words), err
  assert not (tmp_path / 'run').exists()
