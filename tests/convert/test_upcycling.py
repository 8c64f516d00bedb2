"""A mixture of copies of a dense model's MLPs computes what the dense model does."""

import pathlib

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from sparse_lm.convert import __main__ as convert_command
from sparse_lm.convert.exporting import export
from sparse_lm.convert.importing import convert
from sparse_lm.convert.upcycling import Upcycling, upcycle
from sparse_lm.core.errors import UserError
from sparse_lm.runs.trained import load

MODELS = pathlib.Path(__file__).parent / 'models'


@pytest.mark.parametrize('name', ['llama3', 'gpt2'])
def test_step_0_equals_the_dense_model(name, tmp_path, call):
  convert(str(MODELS / name), str(tmp_path / 'dense'), context=24)
  arguments = [
    f'--workdir={tmp_path / "dense"}',
    '--upcycle=experts:5,k:2',
    f'--out={tmp_path / "moe"}',
  ]
  code, out, err = call(convert_command, arguments)
  assert code == 0 and '5 experts in each layer' in out, err
  dense, moe = load(str(tmp_path / 'dense')), load(str(tmp_path / 'moe'))
  tokens = np.load(MODELS / name / 'logits.npz')['tokens']
  assert_allclose(moe.logits(tokens), dense.logits(tokens), atol=2e-5)
  kernel = dense.params['block_1']['mlp']['up']['kernel']
  assert_array_equal(moe.params['block_1']['mlp']['experts']['up'], np.stack([kernel] * 5))
  router = np.asarray(moe.params['block_1']['mlp']['router']['kernel'])
  assert router.std() == pytest.approx((0.1 / router.shape[0]) ** 0.5, rel=0.3)
  # The experts are alike, and what they compute is not trivial.
  assert np.abs(dense.params['block_1']['mlp']['down']['kernel']).max() > 0.1


def test_an_upcycled_llama_is_a_mixtral(tmp_path):
  convert(str(MODELS / 'llama3'), str(tmp_path / 'dense'))
  upcycle(str(tmp_path / 'dense'), str(tmp_path / 'moe'), Upcycling(3, 2))
  assert export(str(tmp_path / 'moe'), str(tmp_path / 'hf')).family == 'mixtral'
  with pytest.raises(UserError, match=r"config\.mlp\.name='moe_topk' .* valid: gated or dense"):
    upcycle(str(tmp_path / 'moe'), str(tmp_path / 'again'), Upcycling(3, 2))


@pytest.mark.parametrize(
  'text', ['', '8', 'experts:8', 'experts:8,k:1', 'experts:2,k:3', 'experts:x,k:2', 'experts:8,j:2']
)
def test_other_sizes_are_refused(text):
  with pytest.raises(UserError, match=r"such as 'experts:8,k:2'"):
    Upcycling.parse(text)
