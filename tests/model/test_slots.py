import importlib
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import base
from sparse_lm.core.errors import UserError
from sparse_lm.layers.spec import Spec
from sparse_lm.model import lm, slots
from sparse_lm.model.slots import Choice
from sparse_lm.runs import configs

SPEC = Spec.from_config(base.get_config().model, vocab=11, context=16)


def test_names_are_the_files_of_the_folder():
  assert {'dense', 'gated'} <= set(slots.names('mlp'))
  assert {'none', 'static', 'magnitude', 'set', 'rigl', 'ste'} <= set(slots.names('weight'))
  assert not any(name.startswith('_') for slot in slots.SLOTS for name in slots.names(slot))


def test_every_method_is_one_class_and_has_defaults():
  for slot in slots.SLOTS:
    for name in slots.names(slot):
      cls = slots.method(slot, name)
      assert cls.__module__ == f'sparse_lm.methods.{slot}.{name}'
      # What the builder supplies, and what Flax adds, are no config keys.
      assert not {'spec', 'activation', 'total_steps', 'parent', 'name'} & set(
        slots.defaults(slot, name)
      )


def test_defaults_are_those_of_the_class():
  assert slots.defaults('activation', 'gelu') == {'approximate': False}
  found = slots.defaults('weight', 'rigl')
  assert (found['period'], found['end'], found['drop_fraction']) == (100, 0.75, 0.3)
  assert slots.defaults('mlp', 'dense') == {}


def test_an_unknown_method_names_the_nearest():
  with pytest.raises(UserError, match=r"config\.mlp\.name 'gate'.*did you mean 'gated'.*dense"):
    slots.method('mlp', 'gate')


@pytest.mark.parametrize('text, chosen', [
  (':', [0, 1, 2, 3, 4]),
  ('1::2', [1, 3]),
  ('-1:', [4]),
  ('2:4', [2, 3]),
  (' : 1', [0]),
  ('::-1', [0, 1, 2, 3, 4]),
])  # fmt: skip
def test_layers_are_a_python_slice(text, chosen):
  choice = Choice('mlp', 'gated', layers=text)
  assert sorted(choice.chosen_layers(5)) == chosen
  assert [layer for layer in range(5) if choice.chosen(layer, 5)] == chosen


@pytest.mark.parametrize('text', ['', '3', 'a:b', '1:2:3:4', '::0', '1.5:', '1,3'])
def test_what_is_no_slice_is_refused(text):
  with pytest.raises(UserError, match=r'^config\.mlp\.layers='):
    Choice('mlp', 'gated', layers=text).chosen_layers(5)


def test_a_slice_without_layers_is_refused():
  with pytest.raises(UserError, match=r"^config\.mlp\.layers='5:' matches none of the 5 layers"):
    Choice('mlp', 'gated', layers='5:').chosen_layers(5)


def test_a_choice_builds_each_layers_method():
  otherwise = Choice('activation', 'relu2')
  choice = Choice('activation', 'gelu', (('approximate', True),), '1:', otherwise)
  first, second = (choice.build(layer, 2, spec='not a field') for layer in (0, 1))
  assert type(first) is slots.method('activation', 'relu2')
  assert type(second) is slots.method('activation', 'gelu') and second.approximate


def test_a_choice_is_hashable_and_equal_by_value():
  section = base.get_config().mlp
  one, two = Choice.from_config('mlp', section), Choice.from_config('mlp', section)
  assert one == two and hash(one) == hash(two)
  rest = Choice('mlp', 'dense')
  assert (one.name, one.layers, one.otherwise, one.fields) == ('dense', ':', rest, ())


def loaded(slot, **fields):
  overrides = {f'{slot}.{field.replace("__", ".")}': value for field, value in fields.items()}
  return Choice.from_config(slot, configs.load('configs/base.py', overrides)[slot])


def test_a_method_that_wraps_is_handed_a_maker_of_the_other():
  gate = loaded(
    'attention', name='head_gate', otherwise__name='sliding_window', otherwise__window=3
  )
  gate = gate.build(0, 1, spec='a spec', name='attention')
  inner = gate.inner()
  assert type(inner) is slots.method('attention', 'sliding_window')
  assert (inner.window, inner.spec, inner.name) == (3, 'a spec', 'inner')


def test_the_dense_twin_runs_the_other_where_that_is_dense_and_else_the_declared_one():
  assert loaded('mlp', name='gated').dense(SPEC).name == 'gated'
  assert loaded('mlp', name='moe_topk').dense(SPEC).name == 'dense'
  assert loaded('mlp', name='moe_topk', otherwise__name='gated').dense(SPEC).name == 'gated'
  window = loaded('attention', name='head_gate', otherwise__name='sliding_window').dense(SPEC)
  assert (window.name, window.layers, window.fields) == ('full', ':', ())
  # A dense method in some layers only is its own twin there.
  assert loaded('mlp', name='gated', layers='1:').dense(SPEC).layers == '1:'


def test_a_choice_says_what_its_method_declares_of_the_past():
  routed = loaded('mlp', name='expert_choice')
  assert routed.traits(SPEC).non_causal == ('train',)
  assert loaded('mlp').traits(SPEC).non_causal == ()


def test_fields_of_the_other_method_are_config_keys_of_its_group():
  config = configs.load('configs/base.py', {'attention.otherwise.name': 'topk_keys'})
  assert config.attention.otherwise.k == 16 and 'k' not in config.attention
  with pytest.raises(UserError, match=r"config\.attention\.otherwise\.name 'topk'.*topk_keys"):
    configs.load('configs/base.py', {'attention.otherwise.name': 'topk'})


NEW_METHOD = '''
"""An MLP that scales its output, keeps a mean and charges for it."""

import jax.numpy as jnp
from flax import linen as nn

from sparse_lm.layers.linear import Linear
from sparse_lm.layers.method import LayerMethod, Traits


class Scaled(LayerMethod):
  """Has a config key, an auxiliary loss, an observation and a variable of its own."""

  spec: object
  activation: object
  scale: float = 2.0

  @property
  def traits(self):
    return Traits(paper='none', saves='nothing')

  @nn.compact
  def __call__(self, x, mode):
    h = self.activation()(Linear(self.spec, self.spec.hidden, name='up')(x), mode)
    mean = self.variable('router', 'mean', lambda: jnp.zeros(()))
    if mode == 'train':
      mean.value = 0.5 * mean.value + 0.5 * jnp.mean(jnp.abs(h))
    self.sow('losses', 'balance', 0.25 * jnp.mean(h**2))
    self.sow('stats', 'active', jnp.mean(h > 0))
    return self.scale * Linear(self.spec, self.spec.width, role='out', name='down')(h)
'''


@pytest.fixture
def new_method(tmp_path, monkeypatch):
  (tmp_path / 'scaled.py').write_text(textwrap.dedent(NEW_METHOD).lstrip())
  package = importlib.import_module('sparse_lm.methods.mlp')
  monkeypatch.setattr(package, '__path__', [*package.__path__, str(tmp_path)])
  importlib.invalidate_caches()
  yield 'scaled'
  sys.modules.pop('sparse_lm.methods.mlp.scaled', None)
  vars(package).pop('scaled', None)


def config_file(tmp_path):
  file = tmp_path / 'config_of_scaled.py'
  file.write_text(
    'from configs import base\n\n'
    'def get_config():\n'
    '  config = base.get_config()\n'
    "  config.data.update({'context': 8, 'batch': 4})\n"
    "  config.model.update({'layers': 2, 'width': 8, 'hidden': 16, 'heads': 2, 'kv_heads': 2})\n"
    "  config.mlp.update({'name': 'scaled', 'layers': '1:'})\n"
    '  return config\n'
  )
  return str(file)


def applied(model, mode):
  written = ['losses', 'stats', 'router']
  return jax.jit(lambda v, tokens: model.apply(v, tokens, mode=mode, mutable=written))


def test_a_new_method_is_one_file_and_one_config(new_method, tmp_path):
  assert new_method in slots.names('mlp')
  config = configs.load(config_file(tmp_path), {'mlp.scale': '3'})
  assert config.mlp.scale == 3.0
  model = lm.from_config(config, vocab=11)
  tokens = jnp.arange(8)[None] % 11
  variables = jax.jit(model.init)(jax.random.key(0), tokens)
  # The dense MLP of layer 0 keeps no such variable.
  assert variables['router'] == {'block_1': {'mlp': {'mean': 0.0}}}

  kept = {name: variables[name] for name in ('params', 'router')}
  kept['params']['embed']['head']['kernel'] = jax.random.normal(jax.random.key(1), (8, 11))
  logits, after = applied(model, 'train')(kept, tokens)
  assert logits.shape == (1, 8, 11) and np.isfinite(logits).all()
  mean = float(after['router']['block_1']['mlp']['mean'])
  assert mean > 0
  (loss,) = after['losses']['block_1']['mlp']['balance']
  assert float(loss) > 0 and 'active' in after['stats']['block_1']['mlp']
  # Evaluation reads the variable and does not move it.
  _, later = applied(model, 'eval')(kept | {'router': after['router']}, tokens)
  assert float(later['router']['block_1']['mlp']['mean']) == mean

  # The config key reaches the module: a scale of zero is a `down` of zeros.
  silent = lm.from_config(configs.load(config_file(tmp_path), {'mlp.scale': '0'}), vocab=11)
  found = applied(silent, 'eval')(kept, tokens)[0]
  down = kept['params']['block_1']['mlp']['down']
  down['kernel'] = jnp.zeros_like(down['kernel'])
  np.testing.assert_allclose(found, applied(model, 'eval')(kept, tokens)[0], atol=1e-6)
  assert np.abs(found - logits).max() > 1e-3


def test_a_new_method_is_in_the_ledger_and_the_trainers_loss(new_method, tmp_path):
  from sparse_lm.runs.build import build

  config = configs.load(config_file(tmp_path))
  program, target = build(config, 11)
  assert 'block_1/mlp/up/linear' in lm.ledger(program.model, 8)
  state = program.init(0, target)
  assert set(state.model_state) == {'router'}
  tokens = jax.random.randint(jax.random.key(0), (4, 9), 0, 11)
  state, metrics = program.train_step(state, tokens)
  assert float(metrics['auxiliary']) > 0
  assert float(state.model_state['router']['block_1']['mlp']['mean']) > 0


def test_a_method_file_with_two_classes_is_a_mistake_of_its_author(tmp_path, monkeypatch):
  (tmp_path / 'double.py').write_text('class A: pass\nclass B: pass\nclass _Hidden: pass\n')
  package = importlib.import_module('sparse_lm.methods.mlp')
  monkeypatch.setattr(package, '__path__', [*package.__path__, str(tmp_path)])
  importlib.invalidate_caches()
  with pytest.raises(TypeError, match='one public class, not 2'):
    slots.method('mlp', 'double')
  sys.modules.pop('sparse_lm.methods.mlp.double', None)
