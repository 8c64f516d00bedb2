"""Windows that are cut on the device equal those that the host cuts."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_lm.data import pipeline, windows


@pytest.fixture(params=['files', 'mixture'])
def data(request, tmp_path):
  rng = np.random.default_rng(0)
  for name, size in (('a', 150), ('b', 400)):
    (tmp_path / f'{name}.txt').write_bytes(bytes(rng.integers(97, 123, size).tolist()))
  path = {
    'files': f'{tmp_path}/b.txt',
    'mixture': f'files:{tmp_path}/a.txt=0.4, files:{tmp_path}/b.txt=0.6',
  }[request.param]
  fields = {'source': request.param, 'path': path, 'split': (0.7, 0.2, 0.1), 'vocab_size': 260}
  return pipeline.load(SimpleNamespace(**fields, tokenizer='bytes', context=9, batch=5))


def test_windows_cut_from_starts_are_the_windows_of_training(data):
  tokens_N, cut = jnp.asarray(data.tokens['train']), jax.jit(windows.gather, static_argnums=2)
  starts_KxB = data.starts(3)(0, 40)
  assert starts_KxB.dtype == np.int32 and starts_KxB.shape == (40, 5)
  for want, starts_B in zip(data.train_iterator(3), starts_KxB):
    got = cut(tokens_N, starts_B, 10)
    assert got.dtype == jnp.int32
    np.testing.assert_array_equal(got, want)


def test_starts_continue_where_windows_were_saved(data):
  saved, second = data.train_iterator(3), data.train_iterator(3)
  for _ in range(13):
    next(saved)
  second.set_state(saved.get_state())
  tokens = data.tokens['train']
  for want, starts_B in zip(second, data.starts(3)(13, 9)):
    np.testing.assert_array_equal([tokens[start : start + 10] for start in starts_B], want)


def test_packed_runs_share_the_tokens(data):
  tokens_N = jnp.asarray(data.tokens['train'])
  starts_NxB = np.concatenate([data.starts(seed)(0, 1) for seed in range(3)])
  got = jax.vmap(windows.gather, in_axes=(None, 0, None))(tokens_N, starts_NxB, 10)
  want = np.stack([next(data.train_iterator(seed)) for seed in range(3)])
  np.testing.assert_array_equal(got, want)
