"""Other sequences of a batch, and later tokens, change logits only in the declared modes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_lm.core.errors import UserError
from sparse_lm.layers.sow import SOWN
from sparse_lm.model import lm
from sparse_lm.model.plans import plan_of

CASES = {
  'a capacity in training': {'mlp__name': 'moe_topk', 'mlp__experts': 4},
  'no capacity': {'mlp__name': 'moe_topk', 'mlp__experts': 4, 'mlp__capacity': 0.0},
  'a capacity in evaluation': {
    'mlp__name': 'moe_topk',
    'mlp__experts': 4,
    'mlp__capacity': 0.0,
    'mlp__eval_capacity': 1.0,
  },
  'expert choice': {'mlp__name': 'expert_choice', 'mlp__experts': 4},
  'a dense model': {},
}
COUPLED = {
  'a capacity in training': {'train'},
  'a capacity in evaluation': {'eval'},
  'expert choice': {'train'},
}


@pytest.mark.parametrize('mode', lm.MODES)
@pytest.mark.parametrize('case', CASES)
def test_sequences_of_a_batch_change_each_other_exactly_where_that_is_declared(
  case, mode, tiny_config
):
  model = lm.from_config(tiny_config(**CASES[case]), vocab=11)
  draw = np.random.default_rng(0)
  shapes = plan_of(model).variables
  variables = jax.tree.map(
    lambda a: jnp.asarray(draw.normal(0.3 * (a.ndim < 2), 0.4, a.shape), a.dtype),
    {name: shapes[name] for name in shapes if name not in SOWN},
  )

  @jax.jit
  def run(tokens):
    draws = {'dropout': jax.random.key(1), 'gates': jax.random.key(2)}
    mutable = [*SOWN, *(name for name in variables if name != 'params')]
    return model.apply(variables, tokens, mode=mode, rngs=draws, mutable=mutable)[0]

  tokens = draw.integers(0, 11, (4, 16)).astype(np.int32)
  beside, later = tokens.copy(), tokens.copy()
  beside[:3] = draw.integers(0, 11, (3, 16))
  later[:, 8:] = draw.integers(0, 11, (4, 8))
  logits, among_others, before_others = (np.asarray(run(t)) for t in (tokens, beside, later))
  couples = np.abs(among_others[3] - logits[3]).max() > 1e-4
  leaks = np.abs(before_others[:, :8] - logits[:, :8]).max() > 1e-4
  assert couples == (mode in COUPLED.get(case, ()))
  assert lm.batch_independent(model)[mode] == (not couples)
  # Seats that go by position are taken from no token by a later one, of any sequence.
  assert lm.causal(model)[mode] == (not leaks)


@pytest.mark.parametrize('case', ['a capacity in training', 'expert choice'])
def test_a_policy_beside_sequences_that_change_each_other_is_refused_in_one_line(case, tiny_config):
  policy = {'depth__name': 'token_gate', 'depth__estimator': 'reinforce'}
  with pytest.raises(UserError) as refused:
    lm.from_config(tiny_config(**policy, **CASES[case]), vocab=11)
  line = str(refused.value)
  assert "config.depth.estimator='reinforce'" in line and '\n' not in line
  assert f"config.mlp.name='{CASES[case]['mlp__name']}'" in line


@pytest.mark.parametrize('case', ['no capacity', 'a capacity in evaluation', 'a dense model'])
def test_a_policy_beside_sequences_that_train_alone_is_accepted(case, tiny_config):
  policy = {'depth__name': 'token_gate', 'depth__estimator': 'reinforce'}
  assert lm.from_config(tiny_config(**policy, **CASES[case]), vocab=11)
