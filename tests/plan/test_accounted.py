"""Every kernel and every gate is charged."""

import textwrap

import pytest

from sparse_lm.core.errors import UserError
from sparse_lm.model import lm, plans, slots
from sparse_lm.plan import cost, executed
from sparse_lm.runs import cost_report as train_cost
from sparse_lm.runs import setup as setups
from sparse_lm.runs.build import build
from sparse_lm.runs.setup import setup

VOCAB, CONTEXT, WIDTH, HIDDEN = 11, 16, 16, 32
HEADER = '''
  """A method of a user's."""

  from typing import Any, ClassVar

  import jax
  import jax.numpy as jnp
  from flax import linen as nn

  from sparse_lm.layers.linear import Linear
  from sparse_lm.layers.method import LayerMethod, Traits
  from sparse_lm.layers.sow import sow
  from sparse_lm.plan import cost, record


  class _Plain(LayerMethod):
    @property
    def traits(self):
      return Traits(paper='none', saves='nothing')


'''


@pytest.fixture
def add(method):
  """`add(slot, name, text)` puts a class below the imports of `HEADER` into a file among its slot's."""
  return lambda slot, name, text: method(
    slot, name, textwrap.dedent(HEADER) + textwrap.dedent(text)
  )


def refused(tiny_config, **fields):
  with pytest.raises(UserError) as error:
    setup(tiny_config(**fields))
  message = str(error.value)
  assert '\n' not in message and '; valid: ' in message
  return message


FOUR = """
  class FourDense(_Plain):
    spec: Any

    @nn.compact
    def __call__(self, x, mode):
      for features in (self.spec.hidden, self.spec.hidden, self.spec.hidden, self.spec.width):
        x = nn.Dense(features, use_bias=False)(x)
      return x
"""


def test_plain_flax_layers_are_refused_by_name_before_data_is_read(add, tiny_config, monkeypatch):
  add('mlp', 'four_dense', FOUR)

  def read(config):
    raise AssertionError('data was read')

  monkeypatch.setattr(setups, 'data_of', read)
  found = refused(tiny_config, mlp__name='four_dense')
  assert 'no FLOPs are recorded for parameter block_0/mlp/Dense_0/kernel[16, 32] (4 such' in found
  assert 'Linear of sparse_lm.layers.linear' in found and 'record.matmul' in found


def test_a_dense_twin_of_plain_flax_layers_is_refused_too(add, tiny_config):
  add('mlp', 'four_plain', FOUR)
  add('mlp', 'halves_of_four', GATE.replace('gating=', "twin='four_plain', gating="))
  found = refused(tiny_config, mlp__name='halves_of_four')
  assert 'block_0/mlp/Dense_0/kernel' in found


NOTED = """
  class Noted(_Plain):
    spec: Any

    @nn.compact
    def __call__(self, x, mode):
      for i, features in enumerate((self.spec.hidden, self.spec.hidden, self.spec.width)):
        y = nn.Dense(features, use_bias=False, name=f'dense_{i}')(x)
        x = record.matmul(y, (*self.path, f'dense_{i}'), 'linear', 2 * x.size * features, 'kernel')
      return x
"""


def test_noted_layers_of_any_kind_are_charged_at_the_density_of_their_kernels(add, tiny_config):
  add('mlp', 'noted', NOTED)
  weights = {'weight.name': 'static', 'weight.sparsity': 0.75}
  weights['weight.dense'] = ('embed', 'norm', 'attention')
  program, target = build(tiny_config(**{'mlp.name': 'noted', **weights}), VOCAB)
  ledger = plans.ledger(program.model, CONTEXT)
  mlp = 2 * (WIDTH * HIDDEN + HIDDEN * HIDDEN + HIDDEN * WIDTH)
  charged = {path: m.flops for path, m in ledger.items() if path.startswith('block_0/mlp/')}
  assert sum(charged.values()) == mlp and len(charged) == 3
  traced = plans.traced(program.model, CONTEXT)
  assert set(executed.differences(ledger, traced)) == {executed.PAIRS}
  whole = cost.forward_flops(ledger, {})
  report = train_cost.report(program, target)
  assert report['flops_forward'] == pytest.approx(whole - 0.75 * mlp)


MISSPELT = """
  class Misspelt(_Plain):
    spec: Any

    @nn.compact
    def __call__(self, x, mode):
      kernel = self.param('weight', nn.initializers.zeros, (self.spec.width, self.spec.width))
      y = record.matmul(x @ kernel, self.path, 'linear', 2 * x.size * self.spec.width, 'wieght')
      other = self.param('other', nn.initializers.zeros, (self.spec.width, self.spec.width))
      return y + other[0] * 0
"""


def test_flops_that_are_noted_for_no_parameter_are_refused(add, tiny_config):
  add('mlp', 'misspelt', MISSPELT.replace("'wieght'", "'weight'"))
  assert 'parameter block_0/mlp/other[16, 16] (1 such' in refused(tiny_config, mlp__name='misspelt')
  declared = "record.matmul(other[0], self.path, 'lookup', 0, 'other')"
  text = MISSPELT.replace('other[0]', declared)
  add('mlp', 'misspelt_kernel', text.replace("'wieght'", "'weight'"))
  assert setup(tiny_config(mlp__name='misspelt_kernel'))
  add('mlp', 'misspelt_twice', text.replace("self.param('weight'", "self.param('wait'"))
  assert 'block_0/mlp/wait[16, 16]' in refused(tiny_config, mlp__name='misspelt_twice')
  text = text.replace('return y', "return record.matmul(y, self.path, 'again', 0, 'weight')")
  add('mlp', 'misspelt_note', text)
  found = refused(tiny_config, mlp__name='misspelt_note')
  assert 'FLOPs are recorded for block_0/mlp/wieght, which is not a parameter' in found
  assert 'block_0/mlp/weight' in found


GATE = """
  class Halves(LayerMethod):
    spec: Any
    open: float = 0.25

    @property
    def traits(self):
      return Traits(paper='none', saves='three quarters', gating=cost.Gating(planned=0.25))

    @nn.compact
    def __call__(self, x, mode):
      sow(self, 'gates', 'active', jnp.float32(0.25))
      with record.gated(self.path, self.traits.gating):
        return Linear(self.spec, self.spec.width, name='only')(x)
"""


def test_a_gate_is_charged_as_it_plans(add, tiny_config):
  add('mlp', 'halves', GATE)
  program, _ = build(tiny_config(mlp__name='halves'), VOCAB)
  ledger = plans.ledger(program.model, CONTEXT)
  gate = cost.Gate(path='block_0/mlp', planned=0.25)
  assert ledger['block_0/mlp/only/linear'].gates == (gate,)
  found = executed.differences(ledger, plans.traced(program.model, CONTEXT))
  assert found.keys() == {executed.GATES, executed.PAIRS}
  assert found[executed.GATES] == 0.75 * 2 * WIDTH * WIDTH


@pytest.mark.parametrize('word', ['paper', 'saves', 'gating', 'planned'])
def test_a_method_that_misspells_what_it_declares_is_refused(word, add, tiny_config):
  name = f'halves_without_{word}'
  add('mlp', name, GATE.replace(f'{word}=', f'{word[:-2]}='))
  found = refused(tiny_config, mlp__name=name)
  assert f'{name}.Halves' in found and f"'{word[:-2]}'" in found


def test_a_method_without_the_base_class_is_refused(add, tiny_config):
  add('mlp', 'halves_alone', GATE.replace('(LayerMethod)', '(nn.Module)'))
  found = refused(tiny_config, mlp__name='halves_alone')
  assert 'halves_alone.Halves is not a LayerMethod' in found


def test_every_method_has_traits(tiny_config):
  model = lm.from_config(tiny_config(), VOCAB)
  for slot in lm.LAYER_SLOTS:
    for name in slots.names(slot):
      traits = slots.MethodConfig(slot, name).traits(model.spec)
      assert traits.paper and traits.saves and not traits.paper.endswith('.')
      # What a gate leaves out is saved, compared with a dense method of the slot.
      assert not traits.gating or traits.twin
      assert not traits.twin or not slots.MethodConfig(slot, traits.twin).traits(model.spec).twin
