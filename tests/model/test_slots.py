import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import base
from sparse_lm.core.errors import UserError
from sparse_lm.layers.spec import Spec
from sparse_lm.model import lm, plans, slots
from sparse_lm.model.slots import MethodConfig, SlotConfig
from sparse_lm.runs import configs

SPEC = Spec.from_config(base.get_config().model, vocab=11, context=16)


def test_names_are_the_files_of_the_folder():
  assert {'dense', 'gated'} <= set(slots.names('mlp'))
  assert {'none', 'static', 'magnitude', 'set', 'rigl', 'l0'} <= set(slots.names('weight'))
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


def mlp(name, layers=':', fallback='dense'):
  return SlotConfig('mlp', ((layers, MethodConfig('mlp', name)),), MethodConfig('mlp', fallback))


@pytest.mark.parametrize('text, chosen', [
  (':', [0, 1, 2, 3, 4]),
  ('1::2', [1, 3]),
  ('-1:', [4]),
  ('2:4', [2, 3]),
  (' : 1', [0]),
  ('::-1', [0, 1, 2, 3, 4]),
])  # fmt: skip
def test_layers_are_a_python_slice(text, chosen):
  slot = mlp('gated', text)
  assert [layer for layer in range(5) if slot.at(layer, 5).name == 'gated'] == chosen
  assert {slot.at(layer, 5).name for layer in {*range(5)} - {*chosen}} <= {'dense'}


@pytest.mark.parametrize('text', ['', '3', 'a:b', '1:2:3:4', '::0', '1.5:', '1,3'])
def test_a_text_that_is_not_a_slice_is_refused(text):
  with pytest.raises(UserError, match=r'^config\.mlp\.layers='):
    loaded('mlp', layers=text).at(0, 5)


def test_a_slice_without_layers_is_refused():
  with pytest.raises(UserError, match=r"^config\.mlp\.layers='5:' selects none of the 5 layers"):
    loaded('mlp', layers='5:').at(0, 5)


def test_each_layer_gets_its_method():
  gelu = MethodConfig('activation', 'gelu', (('approximate', True),))
  slot = SlotConfig('activation', (('1:', gelu),), MethodConfig('activation', 'relu2'))
  first, second = (slot.at(layer, 2).make({'spec': 'not a field'}) for layer in (0, 1))
  assert type(first) is slots.method('activation', 'relu2')
  assert type(second) is slots.method('activation', 'gelu') and second.approximate


def test_a_slot_is_hashable_and_equal_by_value():
  section = base.get_config().mlp
  one, two = SlotConfig.from_config('mlp', section), SlotConfig.from_config('mlp', section)
  assert one == two == mlp('dense') and hash(one) == hash(two)


def loaded(slot, **fields):
  overrides = {f'{slot}.{field.replace("__", ".")}': value for field, value in fields.items()}
  return SlotConfig.from_config(slot, configs.load('configs/base.py', overrides)[slot])


def test_the_first_rule_that_holds_a_layer_counts_and_the_fallback_holds_the_rest():
  slot = loaded(
    'attention',
    order="('near', 'far')",
    name='sliding_window',
    window=9,
    rules__near__layers=':3',
    rules__near__window=3,
    rules__far__layers='2::2',
    rules__far__name='head_gate',
    rules__far__inner__name='topk_keys',
    rules__far__inner__k=5,
    fallback__name='full',
  )
  found = [slot.at(layer, 6) for layer in range(6)]
  assert [own.name for own in found] == [*['sliding_window'] * 3, 'full', 'head_gate', 'full']
  assert dict(found[0].fields) == {'window': 3} and dict(found[4].inner.fields) == {'k': 5}
  assert [own.name for own in slot.running(6)] == [
    'sliding_window',
    'full',
    'head_gate',
    'topk_keys',
  ]
  assert found[4].group == 'config.attention.rules.far'
  assert slot.notes(6) == [
    'config.attention.rules.far: earlier rules already cover layers 2',
    "config.attention: no rule names layers 3, 5, which run 'full'",
  ]
  assert loaded('attention', name='head_gate', layers='1:').notes(6) == []


def test_a_rule_starts_with_the_fields_of_its_slot():
  config = configs.load(
    'configs/base.py',
    {'mlp.name': 'moe_topk', 'mlp.k': 2, 'mlp.order': "('a', 'b')", 'mlp.rules.a.layers': ':1'}
    | {'mlp.rules.b.name': 'predictor_topk', 'mlp.rules.b.layers': '1:'},
  )
  assert (config.mlp.rules.a.name, config.mlp.rules.a.k) == ('moe_topk', 2)
  # Another method has its own fields, and none of the slot's.
  assert set(config.mlp.rules.b) == {'name', 'layers', 'inner', 'density', 'split', 'selector'}


@pytest.mark.parametrize(
  ('fields', 'message'),
  [
    ({'order': "('a', 'b')"}, r"^config\.mlp\.rules\.b\.layers=':': earlier rules .*0, 1, 2"),
    ({'order': "('a', 'a')"}, r'^config\.mlp\.order='),
    ({'order': "('a',)", 'rules__b__layers': ':'}, r"config\.mlp\.rules\.b\.layers'"),
    ({'order': "('a',)", 'rules__a__layers': '9:'}, r"^config\.mlp\.rules\.a\.layers='9:'"),
    ({'order': "('a',)", 'rules__a__name': 'gate'}, r"config\.mlp\.rules\.a\.name 'gate'.*gated"),
    ({'order': "('a',)", 'rules__a__hiden': 3}, r'config\.mlp\.rules\.a\.hiden'),
    ({'order': "('a',)", 'rules__a__name': 'moe_topk', 'rules__a__k': 0}, r'mlp\.rules\.a\.k=0'),
  ],
)
def test_bad_rules_are_named(fields, message):
  with pytest.raises(UserError, match=message):
    loaded('mlp', **fields).at(0, 3)


def test_rules_of_a_config_file_stand_behind_those_of_the_command_line(tmp_path):
  file = tmp_path / 'ruled.py'
  file.write_text(
    'from configs import base\n\n'
    'def get_config():\n'
    '  config = base.get_config()\n'
    "  config.mlp.order = ('a', 'b')\n"
    "  config.mlp.rules = {'a': {'layers': ':1', 'name': 'gated'}, 'b': {'layers': '1:2'}}\n"
    '  return config\n'
  )
  config = configs.load(str(file), {'mlp.rules.b.layers': '1:', 'mlp.fallback.name': 'gated'})
  slot = SlotConfig.from_config('mlp', config.mlp)
  assert [slot.at(layer, 3).name for layer in range(3)] == ['gated', 'dense', 'dense']
  saved = configs.of_run(configs.to_json(config), tmp_path / 'config.json')
  assert saved == config and SlotConfig.from_config('mlp', saved.mlp) == slot


def test_a_wrapping_method_gets_a_constructor_of_its_inner_method():
  gate = loaded('attention', name='head_gate', inner__name='sliding_window', inner__window=3)
  gate = gate.at(0, 1).make({'spec': 'a spec', 'name': 'attention'})
  inner = gate.inner()
  assert type(inner) is slots.method('attention', 'sliding_window')
  assert (inner.window, inner.spec, inner.name) == (3, 'a spec', 'inner')


def test_an_inner_config_of_a_method_that_wraps_none_is_refused():
  with pytest.raises(UserError, match=r"^config\.attention\.inner\.name='full'.*head_gate"):
    loaded('attention', name='sliding_window', inner__name='full')


def twin(slot, **fields):
  return loaded(slot, **fields).dense(SPEC).at(0, 2)


def test_the_dense_twin_runs_a_dense_inner_method_and_else_the_declared_one():
  assert twin('mlp', name='gated').name == 'gated'
  assert (
    twin('mlp', name='moe_topk').name == twin('mlp', name='moe_topk', fallback__name='gated').name
  )
  assert twin('activation', name='topk', inner__name='gelu').name == 'gelu'
  window = twin('attention', name='head_gate', inner__name='sliding_window')
  assert (window.name, window.fields) == ('full', ())
  # Layers that run another method have a twin of their own.
  dense = loaded('mlp', name='gated', layers='1:').dense(SPEC)
  assert [dense.at(layer, 2).name for layer in (0, 1)] == ['dense', 'gated']


def test_traits_declare_in_which_modes_a_method_is_causal():
  assert loaded('mlp', name='expert_choice').at(0, 1).traits(SPEC).non_causal == ('train',)
  assert loaded('mlp').at(0, 1).traits(SPEC).non_causal == ()


def test_fields_of_the_other_method_are_config_keys_of_its_group():
  config = configs.load('configs/base.py', {'attention.fallback.name': 'topk_keys'})
  assert config.attention.fallback.k == 16 and 'k' not in config.attention
  with pytest.raises(UserError, match=r"config\.attention\.fallback\.name 'topk'.*topk_keys"):
    configs.load('configs/base.py', {'attention.fallback.name': 'topk'})


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
def new_method(method):
  method('mlp', 'scaled', NEW_METHOD)
  return 'scaled'


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
  assert 'block_1/mlp/up/linear' in plans.ledger(program.model, 8)
  state = program.init(0, target)
  assert set(state.model_state) == {'router'}
  tokens = jax.random.randint(jax.random.key(0), (4, 9), 0, 11)
  state, metrics = program.train_step(state, tokens)
  assert float(metrics['auxiliary']) > 0
  assert float(state.model_state['router']['block_1']['mlp']['mean']) > 0


def test_a_method_file_with_two_classes_is_a_mistake_of_its_author(method):
  method('mlp', 'double', 'class A: pass\nclass B: pass\nclass _Hidden: pass\n')
  with pytest.raises(TypeError, match='one public class, not 2'):
    slots.method('mlp', 'double')


TWICE = '''
"""Two MLPs in one."""

from flax import linen as nn

from sparse_lm.layers.method import LayerMethod, Traits


class Twice(LayerMethod):
  """Applies the activation twice, each time as a new module."""

  activation: object

  @property
  def traits(self):
    return Traits(paper='none', saves='nothing')

  @nn.compact
  def __call__(self, x_BxLxD, mode):
    return self.activation()(self.activation()(x_BxLxD, mode), mode)
'''


def test_a_second_activation_in_one_mlp_is_refused_in_one_line(method):
  method('mlp', 'twice', TWICE)
  with pytest.raises(UserError) as refused:
    plans.plan_of(lm.from_config(configs.load('configs/tiny.py', {'mlp.name': 'twice'}), vocab=11))
  message = str(refused.value)
  assert '"activation" in Module Twice, because it has one' in message and '\n' not in message
  assert 'one call of self.activation()' in message
