"""The public face `sparse_lm.load`, of a workdir and of the packed folder that was made from it."""

import dataclasses
import pathlib
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

import sparse_lm
from sparse_lm.core import tree
from sparse_lm.core.errors import UserError
from sparse_lm.evals import Evaluation
from sparse_lm.model import lm
from sparse_lm.pack import pack
from sparse_lm.plan import sites
from sparse_lm.runs import trained
from sparse_lm.runs.loop import train
from sparse_lm.runs.workdir import read_json, write_json

CONTEXT = 16
HIDDEN = 'block_*/mlp/hidden'


@pytest.fixture(scope='module')
def folders(tiny_config, tmp_path_factory, packed_by_bytes):
  """A run that has learned something, and the same run packed."""
  folder = tmp_path_factory.mktemp('face')
  config = tiny_config(
    model__layers=2, weight__name='static', weight__sparsity=0.5, train__eval_every=6,
    weight__dense=('embed', 'norm', 'head'), optimizer__learning_rate=0.02, train__steps=12,
  )  # fmt: skip
  train(config, str(folder / 'run'), progress=False)
  pack(str(folder / 'run'), str(folder / 'packed'))
  return folder / 'run', folder / 'packed'


@pytest.fixture(scope='module', params=[0, 1], ids=['workdir', 'packed'])
def run(request, folders):
  return sparse_lm.load(folders[request.param])


@pytest.fixture(scope='module')
def reference(folders):
  """The run as training's own code loads it."""
  return trained.load(str(folders[0]))


@dataclasses.dataclass(frozen=True)
class Context(Evaluation):
  """An evaluation of a user, with an option."""

  times: int = 1

  def run(self, model, data):
    return {'contexts': self.times * data.context}


def refused(call, *said):
  with pytest.raises(UserError) as error:
    call()
  line = str(error.value)
  assert '\n' not in line and all(words in line for words in said), line


def test_importing_the_package_imports_no_jax():
  code = 'import sys, sparse_lm; assert "jax" not in sys.modules; print(dir(sparse_lm))'
  shown = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
  assert "'Run'" in shown.stdout and "'load'" in shown.stdout, shown.stderr
  with pytest.raises(AttributeError, match="no attribute 'laod'"):
    sparse_lm.laod  # noqa: B018


def test_logits_are_those_of_the_run_whatever_form_the_input_has(run, reference):
  text = 'the cat'
  ids = reference.tokenizer.encode(text)
  want = reference.logits(ids[None])
  assert np.abs(want).max() > 0.1
  for x in (text, ids, list(map(int, ids)), ids[None], jnp.asarray(ids), [text], tuple(ids)):
    logits = run.logits(x)
    assert isinstance(logits, np.ndarray) and logits.dtype == np.float32
    assert_allclose(logits, want, rtol=1e-4, atol=1e-4)
  both = run.logits([text, 'the dog'])
  assert both.shape == (2, 7, reference.tokenizer.vocab_size)
  assert_allclose(
    both[1:], reference.logits(reference.tokenizer.encode('the dog')[None]), atol=1e-4
  )


@pytest.mark.parametrize(
  ('x', 'said'),
  [
    (
      None,
      'x is NoneType; valid: a text, a list of texts, a list of token ids, or an integer array',
    ),
    ([], 'x is an empty list; valid: a text'),
    ({'text': 1}, 'x is dict'),
    (['the', 'a'], 'x holds sequences of 1, 3 tokens; valid: sequences of equal length'),
    ([[1, 2], [3]], 'x holds sequences of 1, 2 tokens'),
    ('', 'a sequence has 0 tokens; valid: 1 to 16'),
    ('the ' * 9, 'a sequence has 36 tokens; valid: 1 to 16'),
    ([0.5, 1.0], 'type float64; valid: an integer array'),
    (['a', 1], 'type object'),
    ([1, None], 'type object'),
    (np.zeros((1, 2, 3), int), 'shape (1, 2, 3)'),
    (np.zeros((0, 2), int), 'shape (0, 2); valid: at least one sequence'),
    ([10**30], 'type object'),
    ([-1], 'token ids range from -1 to -1; valid: 0 to'),
    ('É', "no token for 'É'"),
  ],
)
def test_input_of_another_kind_is_one_line(x, said, run):
  refused(lambda: run.logits(x), said)
  refused(lambda: run.activations(x, HIDDEN), said)


def test_activations_are_what_the_model_computes_at_its_sites(run, reference):
  variables = {'params': reference.params}
  tokens = run.tokens(['the cat', 'the dog'])
  _, want = sites.run(reference.program.model, variables, tokens, read=['*'])
  found = run.activations(['the cat', 'the dog'])
  # Packing may join the query, key and value matrices, whose inputs are the same.
  joined = {name for name in found if 'query_key_value' in name}
  lost = {
    f'block_{i}/attention/{name}/input' for i in range(2) for name in ('query', 'key', 'value')
  }
  assert {*found} in ({*want}, ({*want} - lost) | joined)
  for name, value in ((name, found[name]) for name in found if name not in joined):
    assert isinstance(value, np.ndarray)
    assert_allclose(value, want[name], rtol=1e-4, atol=1e-4, err_msg=name)
  some = run.activations('the cat', ['residual_0', HIDDEN])
  assert list(some) == ['residual_0', 'block_0/mlp/hidden', 'block_1/mlp/hidden']
  assert {name: (1, CONTEXT, *value.shape[2:]) for name, value in some.items()} == {
    name: run.sites()[name] for name in some
  }
  assert list(run.sites()) == list(found)


def test_attention_weights_are_a_causal_distribution(run):
  (maps, *_) = run.activations('the cat', 'block_*/attention/attention/weights').values()
  assert maps.shape == (1, 2, 1, 7, 7)
  assert_allclose(maps.sum(axis=-1), 1, rtol=1e-5)
  assert_array_equal(maps > 0, np.broadcast_to(np.tril(np.ones((7, 7), bool)), maps.shape))


def test_an_intervention_acts_as_the_weights_that_would_do_the_same(run, reference):
  """The second layer's MLP adds nothing, as if its last kernel were zero."""
  params = jax.tree.map(np.array, reference.params)
  params['block_1']['mlp']['down']['kernel'][:] = 0
  tokens = run.tokens('the cat')
  want = reference.program.model.apply({'params': params}, tokens)
  for zero in (jnp.zeros_like, lambda value: np.zeros(value.shape, np.float32)):
    found = run.logits('the cat', interventions={'block_1/mlp/output': zero})
    assert_allclose(found, want, rtol=1e-4, atol=1e-4)
  assert np.abs(found - run.logits('the cat')).max() > 1e-2
  seen = run.activations('the cat', 'residual_2', {'block_1/mlp/output': jnp.zeros_like})
  plain = run.activations('the cat', ['block_1/mlp/output', 'residual_2'])
  ends = plain['residual_2'] - plain['block_1/mlp/output']
  assert_allclose(seen['residual_2'], ends, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
  ('interventions', 'said'),
  [
    ([jnp.zeros_like], 'interventions is not a dict from names to functions; valid: a dict'),
    ({'residual_1': 0.0}, 'interventions is not a dict'),
    ({1: jnp.zeros_like}, 'interventions is not a dict'),
    ({'block_0/mlp/hiden': jnp.zeros_like}, "did you mean 'block_*/mlp/hidden'?"),
    (
      {'residual_1': lambda x: x[..., :1]},
      'residual_1: the replacement is float32[1, 7, 1]; valid: float32',
    ),
    ({'residual_1': lambda x: None}, 'the replacement is no array but NoneType; valid: float32[1'),
    ({'residual_1': lambda x: {}}, 'the replacement is no array but dict; valid: float32[1'),
    ({'residual_1': lambda x: 'off'}, 'the replacement is no array but str; valid: float32[1'),
    ({'residual_1': lambda x: [[1], [1, 2]]}, 'the replacement is no array but list; valid'),
  ],
)
def test_interventions_of_another_kind_are_one_line(interventions, said, run):
  refused(lambda: run.logits('the cat', interventions=interventions), said)


@pytest.mark.parametrize('unknown', ['block_0/mlp/hiden', ['residual_0', 'block_0/mlp/hiden']])
def test_an_unknown_site_is_named_with_the_nearest(unknown, run):
  refused(
    lambda: run.activations('the', unknown), "'block_0/mlp/hiden': did you mean 'block_*/mlp/"
  )
  refused(lambda: run.activations('the', [3]), 'sites=[3] is not valid')
  refused(lambda: run.activations('the', None), 'sites=None is not valid')


def test_a_continuation_under_interventions_follows_the_logits_under_them(run):
  seen = []

  def turned(value):
    seen.append(value.shape[1])
    return -np.asarray(value)

  made = run.generate('the cat', 2, temperature=0, interventions={'residual_2': turned})
  assert seen == [7, 1]  # the prompt, and then each new token but the last
  assert made != run.generate('the cat', 2, temperature=0)
  logits = run.logits('the cat' + made, {'residual_2': lambda value: -value})
  assert made == run.tokenizer.decode(logits[0, 6:8].argmax(axis=-1).tolist())
  refused(lambda: run.generate('the', 1, interventions={'residual_0': 0}), 'is not a dict from')


def test_sampling_follows_the_logits(run, reference):
  text = 'the cat'
  for _ in range(5):
    ids = reference.tokenizer.encode(text)
    padded = np.pad(ids, (0, CONTEXT - len(ids)))[None]  # later tokens change no earlier logits
    text += reference.tokenizer.decode([np.argmax(reference.logits(padded)[0, len(ids) - 1])])
  assert run.generate('the cat', max_new_tokens=5, temperature=0) == text[7:]
  assert run.generate('the cat', max_new_tokens=5, top_k=1, seed=9) == text[7:]
  assert run.generate('the cat', max_new_tokens=5, top_p=1e-6) == text[7:]
  assert run.generate('the', 2, temperature=2**70, top_k=1) == run.generate('the', 2, top_k=1)
  number = np.int64
  options = {'max_new_tokens': number(3), 'seed': number(1), 'top_k': number(3)}
  assert run.generate('the', **options, temperature=np.float32(0.5)) == run.generate(
    'the', 3, seed=1, top_k=3, temperature=0.5
  )
  warm = [run.generate('the', temperature=5.0, seed=seed) for seed in (0, 0, 1)]
  assert warm[0] == warm[1] != warm[2] and len(warm[0]) == CONTEXT - 3


@pytest.mark.parametrize(
  ('options', 'said'),
  [
    ({'prompt': ['the']}, 'prompt of type list; valid: a text'),
    ({'prompt': ''}, 'prompt of 0 tokens; valid: 1 to 15'),
    ({'prompt': 'the ' * 4}, 'prompt of 16 tokens; valid: 1 to 15'),
    ({'max_new_tokens': 14}, 'max_new_tokens=14 is not valid; valid: a whole number in [1, 13]'),
    ({'max_new_tokens': 0}, 'max_new_tokens=0 is not valid'),
    ({'temperature': -1}, 'temperature=-1 is not valid'),
    ({'top_k': 999}, 'top_k=999 is not valid'),
    ({'top_p': 0}, 'top_p=0 is not valid'),
    ({'seed': 1.5}, 'seed=1.5 is not valid'),
  ],
)
def test_options_of_sampling_are_named(options, said, run):
  refused(lambda: run.generate(**{'prompt': 'the', **options}), said)


def test_evaluation_gives_the_numbers_of_the_training_run(run, folders):
  metrics = read_json(folders[0] / 'result.json')['metrics']
  values = run.evaluate()
  assert values['val_loss'] == pytest.approx(metrics['val_loss'], rel=1e-5)
  assert run.evaluate('loss', split='test', batch=2).keys() >= {'test_loss', 'test_bits_per_byte'}
  context = run.config.data.context
  assert run.evaluate(Context(3), 'loss') == values | {'contexts': 3 * context}
  refused(lambda: run.evaluate('los'), "unknown evaluation 'los': did you mean 'loss'")
  refused(lambda: run.evaluate(['loss']), 'unknown evaluation')
  refused(lambda: run.evaluate(split='valid'), "unknown split 'valid': did you mean 'validation'")
  refused(lambda: run.evaluate(batch=0), 'batch=0 is not valid')


def test_masks_parameters_and_costs_are_those_of_the_run(run, folders, reference):
  jax.tree.map(assert_array_equal, run.params, reference.params)
  want = tree.named(reference.masks)
  assert run.masks.keys() == want.keys() != set()
  for path, mask in run.masks.items():
    assert mask.dtype == bool and isinstance(mask, np.ndarray)
    assert_array_equal(mask, want[path])
  metrics = read_json(folders[0] / 'result.json')['metrics']
  costs = run.costs()
  assert costs == {name: pytest.approx(metrics[name]) for name in costs}
  assert costs['sparsity_prunable'] == pytest.approx(0.5, abs=1e-3)
  assert run.step == 12 and run.config == reference.config
  assert lm.from_config(run.config, run.tokenizer.vocab_size) == run.model


def test_the_log_is_a_frame_and_a_figure(run):
  log = run.metrics
  assert list(log.index) == list(range(1, 13)) and log['loss'].notna().all()
  assert list(log['val_loss'].dropna().index) == [6, 12]
  (panel,) = run.plot().axes
  assert panel.get_ylabel() == 'nats/token' and len(panel.lines) == 2
  loss, val_loss = panel.lines
  assert_array_equal(loss.get_ydata(), log['loss'])
  assert_array_equal(val_loss.get_xdata(), [6, 12])
  above, below = run.plot('val_loss', 'gradient_norm').axes
  assert 'validation loss' in above.get_ylabel() and below.get_ylabel() == 'gradient norm'
  assert below.get_xlabel() == 'optimizer step'
  refused(lambda: run.plot('los'), "unknown metric 'los': did you mean 'loss'")
  refused(lambda: run.plot(['loss']), "unknown metric ['loss']: did you mean 'loss'")


@pytest.mark.parametrize(
  ('content', 'said'),
  [
    (None, 'has no metrics.jsonl; valid: a run that was trained'),
    ('', 'metrics.jsonl has no intact line; valid: the log of a run'),
  ],
)
def test_a_run_without_a_log_says_so(content, said, folders, tmp_path):
  copy = tmp_path / 'packed'
  copy.mkdir()
  for file in folders[1].iterdir():
    if file.name != 'metrics.jsonl':
      (copy / file.name).write_bytes(file.read_bytes())
  if content is not None:
    (copy / 'metrics.jsonl').write_text(content)
  refused(lambda: sparse_lm.load(copy).plot(), said)


def test_weights_of_a_packed_folder_are_compared_with_its_digests(folders, tmp_path):
  for name, change in (
    ('flipped', lambda f: f.write_bytes(f.read_bytes()[:-1] + b'~')),
    ('gone', pathlib.Path.unlink),
  ):
    copy = tmp_path / name
    copy.mkdir()
    for file in folders[1].iterdir():
      (copy / file.name).write_bytes(file.read_bytes())
    change(copy / 'model.safetensors')
    run = sparse_lm.load(copy)
    assert run.logits('the').shape[:2] == (1, 3)
    refused(lambda run=run: run.masks, 'model.safetensors')


def test_best_and_home_are_paths_too(folders, monkeypatch):
  monkeypatch.setenv('HOME', str(folders[0].parent))
  assert sparse_lm.load('~/run/best').step in (6, 12)
  assert len(sparse_lm.load('~/run/best').metrics) == 12
  assert sparse_lm.load('~/packed').step == 12


def test_a_path_without_a_model_is_refused(tmp_path):
  refused(
    lambda: sparse_lm.load(tmp_path / 'no'), 'no holds no run (there is no such folder); valid: a'
  )
  refused(lambda: sparse_lm.load(tmp_path), 'holds no run (no config.json); valid: a folder that')
  refused(lambda: sparse_lm.load(3), 'path of type int; valid: the path of a workdir')


def test_a_run_is_shown_in_one_short_line(run, reference):
  count = sum(leaf.size for leaf in jax.tree.leaves(reference.params))
  kind = 'packed' if run.loaded.packed else 'trained'
  shown = f'{kind} model, step 12, 2 layers of width 16, {count:,} parameters, Chars('
  assert re.fullmatch(rf"Run\('{re.escape(run.path)}': {re.escape(shown)}\d+ tokens\)\)", repr(run))


def test_an_older_packed_folder_is_refused_by_its_number(folders, tmp_path):
  copy = tmp_path / 'packed'
  copy.mkdir()
  for file in folders[1].iterdir():
    (copy / file.name).write_bytes(file.read_bytes())
  manifest = read_json(copy / 'packed.json')
  write_json(copy / 'packed.json', manifest | {'version': 5})
  refused(lambda: sparse_lm.load(copy), '(format 5)', 'reads format 6', 'pack the run again')
