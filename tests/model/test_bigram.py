"""The table of bigram logits."""

import jax
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from sparse_lm.core import tree
from sparse_lm.core.errors import UserError
from sparse_lm.model import lm
from sparse_lm.model.plans import plan_of
from sparse_lm.runs.build import build

VOCAB = 11
TOKENS = np.random.default_rng(0).integers(0, VOCAB, (2, 12)).astype(np.int32)


@pytest.fixture(scope='module')
def models(tiny_config):
  """The same model with and without the table, and parameters of the one with."""
  model, plain = (lm.from_config(tiny_config(model__bigram=has), VOCAB) for has in (True, False))
  draw = np.random.default_rng(1)
  params = jax.tree.map(lambda a: draw.normal(size=a.shape).astype('f'), plan_of(model).params)
  return model, plain, params


def test_each_tokens_row_is_added_to_its_logits(models):
  model, plain, params = models
  table = params['embed']['bigrams']
  without = params | {'embed': {k: v for k, v in params['embed'].items() if k != 'bigrams'}}
  want = jax.jit(plain.apply)({'params': without}, TOKENS) + table[TOKENS]
  found = jax.jit(model.apply)({'params': params}, TOKENS)
  assert_allclose(found, want, rtol=1e-5, atol=1e-5)
  # A row learns from its own token alone.
  grad = jax.jit(jax.grad(lambda p: model.apply({'params': p}, TOKENS[:, :3]).sum()))(params)
  rows = np.asarray(grad['embed']['bigrams'])
  assert_array_equal(np.unique(np.nonzero(rows)[0]), np.unique(TOKENS[:, :3]))


def test_the_table_costs_parameters_and_no_flops(models):
  model, plain, _ = models
  found, without = plan_of(model), plan_of(plain)
  assert found.shapes.keys() - without.shapes.keys() == {'embed/bigrams'}
  assert found.shapes['embed/bigrams'].shape == (VOCAB, VOCAB)
  entry = {name: m for name, m in found.ledger.items() if name not in without.ledger}
  assert [(m.kernel, m.flops) for m in entry.values()] == [('embed/bigrams', 0)]


def test_it_is_pruned_only_where_a_config_leaves_it_to_the_method(tiny_config):
  fields = {'model__bigram': True, 'weight__name': 'static', 'weight__sparsity': 0.5}
  for dense, pruned in ((None, False), (('bigrams', 'norm'), False), (('norm',), True)):
    own = {} if dense is None else {'weight__dense': dense}
    _, target = build(tiny_config(**fields, **own), VOCAB)
    assert ('embed/bigrams' in tree.named(target)) == pruned


def test_embeddings_in_place_of_tokens_are_refused(models):
  model, _, params = models
  with pytest.raises(UserError, match='the bigram table needs tokens'):
    jax.jit(model.apply)({'params': params}, embeddings_BxLxD=np.zeros((1, 4, 16), 'f'))
