"""Which precision and kernels a run computes with on this device, recorded and refused."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from sparse_lm import generate, prune
from sparse_lm.core.errors import UserError
from sparse_lm.kernels import device
from sparse_lm.runs import arithmetic, configs, runnable
from sparse_lm.runs.loop import train
from sparse_lm.runs.run_folder import read_config
from sparse_lm.runs.setup import setup
from sparse_lm.runs.trained import load

SIZES = {'train__steps': 4, 'train__checkpoint_every': 2}
PRUNED = {'weight.name': 'magnitude', 'weight.sparsity': 0.5}
T4 = 'Tesla T4 (compute capability 7.5)'


@pytest.fixture
def named(monkeypatch):
  """`named(text)`: the device is called so in messages."""
  return lambda text: monkeypatch.setattr(device, 'name', lambda: text)


@pytest.mark.parametrize('capability, asked, found', [
  (None, 'auto', 'float32'),
  ((7, 5), 'auto', 'float32'),
  ((8, 0), 'auto', 'bfloat16'),
  ((9, 0), 'auto', 'bfloat16'),
  (None, 'bfloat16', 'bfloat16'),
  ((9, 0), 'float32', 'float32'),
  ((7, 5), 'float32', 'float32'),
])  # fmt: skip
def test_auto_is_decided_by_the_device(capability, asked, found, tiny_config, on_nvidia):
  if capability is not None:
    on_nvidia(*capability)
  config = tiny_config(model__precision=asked)
  run = setup(config)
  assert run.config.model.precision == run.program.model.spec.precision == found
  assert config.model.precision == asked  # the caller's stays as it is
  same = {**configs.flat(config), 'model.precision': found}
  assert configs.flat(run.config) == same
  old = capability == (7, 5) and asked == 'auto'
  assert any('is float32 on' in note for note in run.notes) == old


def test_an_old_gpu_says_so_in_one_line(tiny_config, on_nvidia, named):
  on_nvidia(7, 5)
  named(T4)
  assert setup(tiny_config(model__precision='auto')).notes == (
    f"config.model.precision='auto' is float32 on {T4}, which has neither bfloat16 units nor fused "
    'attention',
  )


def test_a_gpu_of_another_maker_says_so_in_one_line(tiny_config, monkeypatch):
  class Client:
    platform_version = 'rocm 60300'

  class Other:
    platform, device_kind, client = 'gpu', 'AMD Instinct MI300X', Client

  with monkeypatch.context() as patched:
    patched.setattr(device.jax, 'local_devices', lambda: [Other])
    found = arithmetic.notes(tiny_config(model__precision='auto'), ())
    assert arithmetic.notes(tiny_config(model__precision='float32'), ()) == []
  (note,) = found
  assert note.startswith(
    "config.model.precision='auto' is float32 on AMD Instinct MI300X, which is no"
  )


def test_a_run_reports_slower_fallbacks(tiny_config, on_nvidia, named, tmp_path, capfd):
  on_nvidia(7, 5)
  named(T4)
  train(tiny_config(model__precision='auto', **SIZES), str(tmp_path / 'run'))
  opening, note, *_ = capfd.readouterr().err.splitlines()
  assert ' in float32; ' in opening and note.startswith(
    "config.model.precision='auto' is float32 on"
  )


def test_precision_that_the_device_cannot_run_is_refused(tiny_config, on_nvidia, named):
  on_nvidia(7, 5)
  named(T4)
  with pytest.raises(UserError) as refused:
    setup(tiny_config(model__precision='bfloat16'))
  assert str(refused.value) == (
    f"config.model.precision='bfloat16' does not run well on {T4}, which has no bfloat16 units; valid: "
    "'float32', or 'auto'"
  )


@pytest.mark.parametrize('field', ['precision', 'attention_kernel'])
def test_unknown_choices_are_refused(field, tiny_config):
  with pytest.raises(UserError, match=rf"unknown config.model.{field} 'x': valid: .*auto"):
    setup(tiny_config(**{f'model__{field}': 'x'}))


@pytest.mark.parametrize('field', ['dtype', 'param_dtype'])
def test_former_fields_are_refused_by_the_one_that_replaces_them(field, tiny_config, tmp_path):
  with pytest.raises(
    UserError, match=rf'model.{field} is not a field any more; valid: .*precision'
  ):
    tiny_config(**{f'model__{field}': 'bfloat16'})
  file = tmp_path / 'mine.py'
  text = 'from configs import base\n\ndef get_config():\n  config = base.get_config()\n'
  file.write_text(text + f"  config.model.{field} = 'bfloat16'\n  return config\n")
  with pytest.raises(
    UserError, match=rf'model.{field} is not a field any more; valid: .*precision'
  ):
    configs.load(str(file))
  file.write_text(text + '  config.model.widht = 3\n  return config\n')
  with pytest.raises(UserError, match=r"unknown field 'config.model.widht'.*config.model.width"):
    setup(configs.load(str(file)))
  file.write_text(text + '  config.optimizer.momentun = 3\n  return config\n')
  with pytest.raises(UserError, match=r"unknown field 'config.optimizer.momentun'.*momentum"):
    configs.load(str(file))


REFUSED = {
  'device': ({}, None, 'compute capability 8.0 or above, and this is the device'),
  'old device': ({'precision': 'float32'}, (7, 5), 'and this is the device'),
  'precision': ({'precision': 'float32'}, (9, 0), 'config.model.precision is float32'),
  'dropout': ({'dropout': 0.1}, (9, 0), 'config.model.dropout'),
  'width of heads': ({'width': 24, 'heads': 2}, (9, 0), 'but these have width 12'),
  'selection': ({'attention__name': 'topk_keys'}, (9, 0), 'by their scores'),
  'blocks': ({'attention__name': 'moba'}, (9, 0), 'another mask'),
  'tokens left out': (
    {'depth__name': 'mixture_of_depths', 'depth__capacity': 0.5},
    (9, 0),
    'tokens are left out',
  ),
}


def given(fields, **more):
  """Fields of `config.model`, but for those of a group of their own."""
  fields = {'precision': 'bfloat16', **fields} | more
  return {name if '__' in name else f'model__{name}': value for name, value in fields.items()}


@pytest.mark.parametrize('case', REFUSED)
def test_what_the_fused_kernel_cannot_do_is_refused_in_one_line(
  case, tiny_config, on_nvidia, named
):
  fields, capability, reason = REFUSED[case]
  named('the device')
  if capability is not None:
    on_nvidia(*capability)
  with pytest.raises(UserError) as refused:
    setup(tiny_config(**given(fields, attention_kernel='cudnn')))
  line = str(refused.value)
  assert line.startswith("config.model.attention_kernel='cudnn' cannot run here: ")
  assert line.endswith("; valid: 'auto', or 'einsum'") and reason in line and '\n' not in line
  # By itself it is einsum there, which is said where the device has something faster.
  run = setup(tiny_config(**given(fields)))
  assert 'einsum' in run.kernels
  said = [note for note in run.notes if "config.model.attention_kernel='auto'" in note]
  assert len(said) == (capability == (9, 0)) and all(reason in note for note in said)


def test_layers_of_two_kinds_have_two_kernels(tiny_config, on_nvidia):
  on_nvidia(8, 0)
  fields = {'attention__name': 'topk_keys', 'attention__layers': '1:', 'layers': 2}
  run = setup(tiny_config(**given(fields)))
  assert run.kernels == ('cudnn', 'einsum') and len(run.notes) == 1
  fused = setup(tiny_config(**given({'attention__name': 'sliding_window', 'kv_heads': 1})))
  assert fused.kernels == ('cudnn',) and not fused.notes


@pytest.fixture(scope='module')
def half(tiny_config, tmp_path_factory):
  """A workdir whose run was trained in bfloat16."""
  folder = str(tmp_path_factory.mktemp('half') / 'run')
  result = train(tiny_config(model__precision='bfloat16', **SIZES), folder, progress=False)
  return folder, result


def test_the_chosen_precision_and_kernel_are_recorded(half, tiny_config, tmp_path):
  folder, result = half
  assert result['config']['model']['precision'] == 'bfloat16'
  assert result['env']['attention'] == 'einsum'
  plain = str(tmp_path / 'run')
  result = train(tiny_config(model__precision='auto', **SIZES), plain, progress=False)
  assert result['config']['model']['precision'] == 'float32'
  for workdir, precision in ((folder, 'bfloat16'), (plain, 'float32')):
    with open(f'{workdir}/config.json') as file:
      assert json.load(file)['model']['precision'] == precision


def test_a_run_is_not_continued_in_another_precision(half, tiny_config, on_nvidia):
  folder, _ = half
  longer = tiny_config(model__precision='auto', train__steps=6, train__checkpoint_every=2)
  with pytest.raises(UserError, match=r"precision='bfloat16', not 'float32'; valid: that value"):
    train(longer, folder, progress=False)
  on_nvidia(9, 0)
  assert setup(longer).config.model.precision == 'bfloat16'  # where it began, 'auto' continues


def test_a_loaded_run_computes_as_it_was_trained(half, on_nvidia):
  folder, _ = half
  tokens = np.zeros((1, 4), np.int32)
  want = np.asarray(load(folder).logits(tokens))
  on_nvidia(7, 5)  # which would not begin such a run
  found = load(folder)
  assert found.program.model.spec.precision == 'bfloat16'
  exact = dataclasses.replace(found.program.model.spec, precision='float32')
  other = jax.jit(found.program.model.clone(spec=exact).apply)({'params': found.params}, tokens)
  np.testing.assert_array_equal(found.logits(tokens), want)
  assert np.abs(np.asarray(other) - want).max() > 0
  (*_, text) = generate.generate(runnable.load(folder), ['the '], tokens=3)
  assert len(text) == 1


@pytest.mark.slow
def test_a_run_is_pruned_in_its_own_precision(half, on_nvidia, tmp_path):
  folder, _ = half
  on_nvidia(7, 5)
  pruned = prune.prune(folder, str(tmp_path / 'out'), PRUNED, 2)
  assert pruned['config']['model']['precision'] == 'bfloat16'
  assert read_config(tmp_path / 'out')['model']['precision'] == 'bfloat16'


def test_a_run_of_a_fused_kernel_loads_on_a_device_without_one(tiny_config, half):
  folder, _ = half
  config = tiny_config(model__precision='bfloat16', model__attention_kernel='cudnn')
  with pytest.raises(UserError, match='cannot run here'):
    setup(config)
  model = load(folder).program.model
  asks = model.clone(spec=dataclasses.replace(model.spec, attention_kernel='cudnn'))
  params, tokens = load(folder).params, np.zeros((1, 4), np.int32)
  np.testing.assert_array_equal(
    jax.jit(asks.apply)({'params': params}, tokens), load(folder).logits(tokens)
  )


def test_a_message_holds_the_first_of_several_reasons():
  assert arithmetic._first(('a',)) == 'a' and arithmetic._first(('a', 'b')) == 'a (and 1 more)'
