"""Imported models against the logits of the library transformers, which `oracle.py` stored."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from sparse_lm.convert import family, hf_folder
from sparse_lm.convert.importing import convert
from sparse_lm.core import tree
from sparse_lm.inference.decode import Decoder
from sparse_lm.runs import runnable

MODELS = pathlib.Path(__file__).parent / 'models'
NAMES = sorted(path.name for path in MODELS.iterdir())


@pytest.fixture(scope='module')
def imported(tmp_path_factory):
  """`imported(name)`: the workdir of a stored model, in float32."""
  made = {}

  def get(name):
    if name not in made:
      made[name] = str(tmp_path_factory.mktemp('imported') / name)
      convert(str(MODELS / name), made[name], dtype='float32')
    return made[name]

  return get


def test_every_family_has_a_stored_model():
  found = {type(hf_folder.read(MODELS / name).family).__name__ for name in NAMES}
  assert found == {type(family.family(name, '')).__name__ for name in family.names()}


@pytest.mark.parametrize('name', NAMES)
def test_logits_are_those_of_transformers(imported, name):
  stored, run = np.load(MODELS / name / 'logits.npz'), runnable.load(imported(name))
  apply = jax.jit(lambda variables, tokens: run.model.apply(variables, tokens, mode='eval'))
  got = np.asarray(apply(run.variables, stored['tokens']))
  largest = np.abs(stored['logits']).max()
  assert largest > 1
  assert np.abs(got - stored['logits']).max() <= 1e-5 * largest


@pytest.mark.parametrize('name', NAMES)
def test_decoding_with_a_cache_gives_the_logits_of_the_whole_pass(imported, name):
  stored, run = np.load(MODELS / name / 'logits.npz'), runnable.load(imported(name))
  decoder = Decoder(run.model, run.variables)
  token_L, want_LxV = stored['tokens'][0], stored['logits'][0]
  logits_BxV, cache = decoder.begin([token_L[:5]])[:2]
  assert_allclose(logits_BxV[0], want_LxV[4], atol=1e-5 * np.abs(want_LxV).max())
  for place in range(5, 9):
    logits_BxV, cache = decoder.decode(
      decoder.variables, cache, token_L[place][None], np.full(1, place, np.int32)
    )
    assert_allclose(logits_BxV[0], want_LxV[place], atol=1e-5 * np.abs(want_LxV).max())


def test_bfloat16_stays_bfloat16_unless_asked_otherwise(imported, tmp_path):
  convert(str(MODELS / 'qwen2'), str(tmp_path / 'own'))
  own, wide = runnable.load(str(tmp_path / 'own')), runnable.load(imported('qwen2'))
  assert own.config.model.weights_dtype == 'bfloat16'
  assert {leaf.dtype for leaf in jax.tree.leaves(own.variables)} == {jnp.dtype('bfloat16')}
  for path, leaf in tree.named(own.variables).items():
    assert_array_equal(leaf.astype(jnp.float32), tree.named(wide.variables)[path])
  assert runnable.load(imported('llama3')).config.model.weights_dtype == 'float32'
