"""Packed folders: written whole, read back alike, refused where they do not fit; and the commands."""

import dataclasses
import shutil
import sys

import jax
import numpy as np
import pytest
from numpy.testing import assert_array_equal
from safetensors.numpy import load_file

import sparse_lm.generate as generate_command
import sparse_lm.pack as pack_command
import sparse_lm.speed as speed_command
from sparse_lm.core import tree
from sparse_lm.core.errors import UserError
from sparse_lm.inference import formats, pack
from sparse_lm.inference.sample import Sampling
from sparse_lm.runs import packed_folder as saved
from sparse_lm.runs import runnable, runtime
from sparse_lm.runs.loop import train
from sparse_lm.runs.trained import load
from sparse_lm.runs.workdir import read_json, write_json

FIELDS = {
  'tiles': {
    'weight__pattern': 'block:16',
    'model__width': 32,
    'model__hidden': 64,
    'data__context': 224,
  },
  'n of m': {'weight__pattern': '2:4'},
  'weights': {'weight__pattern': 'unstructured', 'weight__sparsity': 0.8},
  'neurons': {'weight__pattern': 'neuron', 'model__layers': 2},
  'experts': {'weight__pattern': 'head', 'mlp__name': 'moe_topk', 'mlp__experts': 12},
}
# What other tests of this file pack too; `make test-slow` runs them all.
QUICK = ('n of m', 'weights', 'neurons')
EACH = pytest.mark.parametrize(
  'name', [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in FIELDS]
)


@pytest.fixture(scope='module')
def packed(tiny_config, tmp_path_factory, packed_by_bytes):
  """`packed(name) -> (workdir, packed folder, what the command's function returned)`."""
  made = {}

  def build(name):
    if name not in made:
      folder = tmp_path_factory.mktemp('packed')
      base = {'weight__name': 'static', 'weight__sparsity': 0.5, 'train__steps': 3}
      train(tiny_config(**base | FIELDS[name]), str(folder / 'run'), progress=False)
      found = pack_command.pack(str(folder / 'run'), str(folder / 'packed'))
      made[name] = str(folder / 'run'), str(folder / 'packed'), found
    return made[name]

  return build


def copy(folder, tmp_path):
  return shutil.copytree(folder, tmp_path / 'copy')


@EACH
def test_a_packed_folder_loads_as_it_was_saved(name, packed):
  workdir, folder, found = packed(name)
  assert found['largest_error'] < 1e-5
  tokens = 200 if name == 'tiles' else 15  # the context, less one to begin with
  assert found['same_text'] == {'tokens': tokens, 'margin': None}
  run = load(workdir)
  fresh = pack.pack(run.program.model, run.params, run.masks, run.model_state)
  there = saved.load(folder)
  assert there.packed.model == fresh.model and there.packed.removed == fresh.removed
  before, after = (jax.device_get(p.variables) for p in (fresh, there.packed))
  assert jax.tree.structure(before) == jax.tree.structure(after)
  jax.tree.map(assert_array_equal, before, after)
  assert there.tokenizer.digest == run.tokenizer.digest and there.config == run.config


@pytest.mark.slow
def test_tuples_of_arrays_keep_their_order(packed):
  _, folder, _ = packed('experts')
  matrices = saved.load(folder).packed.matrices
  stored = {formats.name_of(matrix.stored) for p, matrix in matrices.items() if 'experts' in p}
  assert stored == {'unstacked_experts'}  # twelve: '10' sorts before '2'


@EACH
def test_the_plain_file_holds_every_parameter_under_its_path(name, packed):
  workdir, folder, _ = packed(name)
  plain = load_file(f'{folder}/model.safetensors')
  params = tree.named(jax.device_get(load(workdir).params))
  assert plain.keys() == params.keys()
  for path, array in params.items():
    assert_array_equal(plain[path], array)


@EACH
def test_bytes_on_disk_are_those_that_are_reported(name, packed):
  _, folder, found = packed(name)
  arrays = load_file(f'{folder}/packed.safetensors')
  assert sum(array.nbytes for array in arrays.values()) == found['stored_bytes']
  assert found['stored_bytes'] < found['dense_bytes']


def test_a_folder_that_exists_is_left_alone(packed, tmp_path):
  workdir, folder, _ = packed('n of m')
  copied = copy(folder, tmp_path)
  with pytest.raises(UserError, match='exists'):
    pack_command.pack(workdir, str(copied))
  assert sorted(p.name for p in tmp_path.iterdir()) == ['copy']


def flip(folder):
  file = folder / 'packed.safetensors'
  data = bytearray(file.read_bytes())
  data[-1] ^= 1
  file.write_bytes(data)


def other_version(folder):
  manifest = read_json(folder / 'packed.json')
  write_json(folder / 'packed.json', manifest | {'version': 99, 'written_by': '9.9'})


@pytest.mark.parametrize(
  ('harm', 'named'),
  [
    (flip, 'does not match the sha256'),
    (lambda folder: (folder / 'packed.safetensors').unlink(), 'no such file'),
    (other_version, r'by sparse_lm 9\.9 \(format 99\); this is sparse_lm'),
    (lambda folder: (folder / 'packed.json').write_text('{'), 'damaged'),
    (lambda folder: (folder / 'packed.json').unlink(), 'holds no run'),
  ],
)
def test_a_damaged_folder_is_refused(harm, named, packed, tmp_path):
  copied = copy(packed('n of m')[1], tmp_path)
  harm(copied)
  (copied / 'config.json').unlink() if named == 'holds no run' else None
  with pytest.raises(UserError, match=named):
    runnable.load(str(copied))


def rewritten(folder, change):
  """Changes packed.json and gives it the digest that belongs to what it holds."""
  manifest = read_json(folder / 'packed.json')
  change(manifest)
  write_json(folder / 'packed.json', manifest)


@pytest.mark.parametrize('name', (*saved.READ, saved.MANIFEST))
def test_a_flipped_bit_is_refused(name, packed, tmp_path):
  folder = copy(packed('n of m')[1], tmp_path)
  file = folder / name
  whole = file.read_bytes()
  ends = range(8 * 8, 8 * 80, 61)  # of safetensors: within the header
  for place in (*ends, 8 * (len(whole) // 2)):
    flipped = bytearray(whole)
    flipped[place // 8] ^= 1 << place % 8
    file.write_bytes(flipped)
    with pytest.raises(UserError, match=name) as refused:
      saved.load(str(folder))
    assert '\n' not in str(refused.value)


@pytest.mark.parametrize(
  ('change', 'said'),
  [
    (lambda m: m.pop('matrices'), "it has no 'matrices'"),
    (lambda m: m.update(matrices=[1, 2]), 'matrices is a list and not an object'),
    (lambda m: m.update(step='3'), "step is '3' and not a whole number"),
    (lambda m: m['sha256'].clear(), 'does not match the sha256'),
    (lambda m: matrix(m).pop('runs'), "has no 'runs'"),
    (lambda m: matrix(m).update(stored='os'), "unknown format 'os'"),
    (lambda m: matrix(m).update(runs='..pack'), "unknown format '..pack'"),
    (lambda m: matrix(m).update(stored='block'), 'does not fit its arrays'),
    (lambda m: matrix(m)['fields'].update(inputs=10**12), 'that of the model (16, 32)'),
    (lambda m: matrix(m)['fields'].update(m=2**60), 'does not fit its arrays'),
    (lambda m: matrix(m)['fields'].update(inputs=1), 'does not fit its arrays'),
    (lambda m: m['matrices'].update(none=matrix(m)), "the matrix 'none' does not fit"),
  ],
)
def test_another_manifest_is_one_line_before_anything_is_allocated(change, said, packed, tmp_path):
  folder = copy(packed('n of m')[1], tmp_path)
  rewritten(folder, change)
  with pytest.raises(UserError) as refused:
    saved.load(str(folder))
  assert said in str(refused.value) and '\n' not in str(refused.value)


def matrix(manifest):
  return manifest['matrices']['block_0/mlp/up/kernel']


def test_bits_of_a_larger_kernel_than_the_models_are_not_unpacked(packed, tmp_path):
  folder = copy(packed('weights')[1], tmp_path)
  rewritten(folder, lambda m: matrix(m)['fields'].update(dimensions=[10**9, 10**9]))
  with pytest.raises(
    UserError, match=r'\(1000000000, 1000000000\), and that of the model \(16, 32\)'
  ):
    saved.load(str(folder))


def test_files_of_another_run_do_not_fit(packed, tmp_path):
  folder = copy(packed('n of m')[1], tmp_path)
  values = read_json(folder / 'config.json')
  values['model']['norm'] = 'layernorm'
  write_json(folder / 'config.json', values)
  with pytest.raises(UserError, match=r'config\.json does not match the sha256 in packed\.json'):
    saved.load(str(folder))


def test_loading_a_packed_folder_as_a_run_names_the_right_function(packed):
  with pytest.raises(UserError, match=r'holds a packed model; valid: .*sparse_lm\.load'):
    load(packed('n of m')[1])


def test_loaded_models_are_shown_in_one_short_line(packed):
  run = runnable.load(packed('n of m')[1])
  shown = saved.load(packed('n of m')[1])
  assert repr(run).startswith(f'Runnable({run.path!r}, 1 layers of width 16, Chars(')
  assert repr(shown).startswith(f'Saved({run.path!r}, PackedModel(') and len(repr(shown)) < 250
  one = shown.packed.matrices['block_0/mlp/up/kernel']
  assert repr(one) == "Matrix('block_0/mlp/up/kernel', runs dense_in_out, stored n_of_m)"


def test_a_packed_model_with_other_logits_is_not_written(packed, tmp_path, monkeypatch):
  workdir, _, _ = packed('n of m')
  monkeypatch.setattr(pack_command, 'largest_error', lambda trained, packed: 0.5)
  with pytest.raises(UserError, match=r'off by 5\.0e-01'):
    pack_command.pack(workdir, str(tmp_path / 'out'))
  assert not list(tmp_path.iterdir())


def test_largest_error_compares_logits(packed):
  run = load(packed('n of m')[0])
  other = pack.dense_twin(run.program.model)
  assert pack_command.largest_error(run, other) > 0.1
  tokens = np.random.default_rng(0).integers(0, run.tokenizer.vocab_size, (4, 16)).astype(np.int32)
  want = np.asarray(run.logits(tokens))
  got = np.asarray(other.model.apply(other.variables, tokens))
  error = np.abs(got - want).max() / np.abs(want).max()
  assert pack_command.largest_error(run, other) == pytest.approx(error, rel=1e-4)


def command(module, arguments, monkeypatch):
  monkeypatch.setattr(sys, 'argv', ['x', *arguments])
  monkeypatch.setattr(runtime, 'prepare', lambda: None)
  module.main()


def test_the_pack_command_prints_the_format_of_each_matrix(packed, tmp_path, monkeypatch, capsys):
  workdir, _, _ = packed('weights')
  out = str(tmp_path / 'out')
  command(pack_command, [f'--workdir={workdir}', f'--out={out}'], monkeypatch)
  shown = capsys.readouterr().out
  (row,) = [line for line in shown.splitlines() if 'block_0/mlp/up/kernel' in line]
  assert 'bitmask' in row and 'block: no tile size (128, 64, 32, 16) divides' in row
  assert 'logits differ by at most' in shown
  assert f'packed from {workdir}: the newest checkpoint, step' in shown


def test_both_folders_generate_the_same_text(packed):
  texts = []
  for folder in packed('neurons')[:2]:
    run = runnable.load(folder)
    *_, last = generate_command.generate(run, ['the cat', 'a'], 6, Sampling(temperature=0))
    texts.append(last)
  assert texts[0] == texts[1] and all(len(text) == 6 for text in texts[0])


def test_a_text_ends_before_its_stop(packed):
  run = runnable.load(packed('neurons')[1])
  *_, (whole,) = generate_command.generate(run, ['the'], 10, Sampling(temperature=3.0))
  stop = whole[4:6]
  steps = list(generate_command.generate(run, ['the'], 10, Sampling(temperature=3.0), stop=stop))
  assert steps[-1] == [whole[: whole.index(stop)]] and len(steps) == whole.index(stop) + 2


def test_the_beginning_of_a_stop_is_not_shown(capsys):
  texts = iter([['a'], ['ab'], ['abE'], ['abEN'], ['abENc'], ['abENcE'], ['abENc']])
  assert generate_command._stream(texts, 'END') == ['abENc']
  assert capsys.readouterr().out == 'abENc\n'


def test_the_generate_command_streams_what_it_makes(packed, monkeypatch, capsys):
  run = runnable.load(packed('neurons')[1])
  *_, (text,) = generate_command.generate(run, ['the cat'], 5, Sampling(temperature=0))
  arguments = [f'--workdir={run.path}', '--prompt=the cat', '--tokens=5', '--temperature=0']
  command(generate_command, arguments, monkeypatch)
  shown = capsys.readouterr()
  assert (
    shown.out == f'the cat{text}\n'
    and '5 tokens per prompt in' in shown.err
    and 'energy: ' in shown.err
    and f'{run.path}: packed from ' in shown.err
  )


@pytest.mark.parametrize(
  ('argument', 'named'),
  [
    ('--top_q=3', "unknown argument '--top_q': did you mean '--top_p'?"),
    ('--top_k=x', "argument --top_k: 'x' is not valid; valid: a whole number in [0, 2^31)"),
    ('--top_p=2', "argument --top_p: '2' is not valid; valid: a float32 number in (0, 1]"),
    ('--prompt=' + 'the ' * 9, 'tokens; valid: 1 to 15'),
    ('--workdir=nowhere', 'holds no run'),
    ('--tokens=-1', "argument --tokens: '-1' is not valid"),
    ('--tokens=99', '--tokens=99 after a prompt of 3'),
  ],
)
def test_bad_input_is_one_line_and_code_2(argument, named, packed, monkeypatch, capsys):
  arguments = [f'--workdir={packed("neurons")[1]}', '--prompt=the', argument]
  if argument.startswith('--prompt'):
    arguments.remove('--prompt=the')
  with pytest.raises(SystemExit) as stopped:
    command(generate_command, arguments, monkeypatch)
  out, shown = capsys.readouterr()
  assert stopped.value.code == 2 and named in shown and shown.count('\n') == 1 and not out


def test_greedy_texts_may_differ_only_where_the_largest_logits_are_nearly_equal(packed):
  run = load(packed('weights')[0])
  params = jax.tree.map(np.array, run.params)
  other = jax.tree.map(np.array, run.params)
  draw = np.random.default_rng(0)
  other['embed']['head']['kernel'] += draw.normal(
    size=other['embed']['head']['kernel'].shape
  ).astype('f')
  masks = jax.tree.map(lambda _: None, params)
  differing = pack.pack(run.program.model, other, masks, {})
  with pytest.raises(
    UserError, match=r'greedy text of the packed model differs from token [0-9]+ on'
  ):
    pack_command.same_text(run, differing)
  params['embed']['head']['kernel'][:] = 0
  equal = dataclasses.replace(run, params=params)
  assert pack_command.same_text(equal, differing) == {'tokens': 0, 'margin': 0.0}


def test_a_prompt_that_is_no_text_is_named(packed):
  run = runnable.load(packed('neurons')[1])
  with pytest.raises(UserError, match=r'--prompt=.* is not UTF-8'):
    next(generate_command.generate(run, ['a\udcff'], 2))


@pytest.mark.parametrize('name', ['config.json', 'tokenizer.json'])
def test_a_folder_that_lacks_a_file_is_named(name, packed, tmp_path):
  folder = copy(packed('neurons')[1], tmp_path)
  (folder / name).unlink()
  with pytest.raises(UserError, match=f'{name} cannot be read'):
    saved.load(str(folder))


def test_models_that_read_other_tokens_or_contexts_are_not_timed_in_turns(
  packed, tiny_config, tmp_path
):
  folder = packed('neurons')[1]
  with pytest.raises(UserError, match='a context above 16'):
    speed_command.speed([folder])
  train(tiny_config(data__context=24, train__steps=1), str(tmp_path / 'other'), progress=False)
  with pytest.raises(UserError, match='another tokenizer or context'):
    speed_command.speed([folder, str(tmp_path / 'other')])
