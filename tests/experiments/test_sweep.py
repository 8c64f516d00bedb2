import re
import shlex
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments.sweep import Run, chain, fixed, grid, product, together

values = st.lists(st.integers(0, 9), max_size=4)


def test_by_hand():
  methods = chain(fixed({'weight.name': 'rigl'}, batch=8), fixed({'weight.name': 'set'}))
  assert product(methods, grid('seed', [0, 1])) == [
    {'weight.name': 'rigl', 'batch': 8, 'seed': 0},
    {'weight.name': 'rigl', 'batch': 8, 'seed': 1},
    {'weight.name': 'set', 'seed': 0},
    {'weight.name': 'set', 'seed': 1},
  ]
  assert together(grid('a', [1, 2]), grid('b', 'xy')) == [{'a': 1, 'b': 'x'}, {'a': 2, 'b': 'y'}]


@given(values, values, values)
def test_product_is_associative_and_counts(a, b, c):
  a, b, c = grid('a', a), grid('b', b), grid('c', c)
  assert product(a, product(b, c)) == product(product(a, b), c) == product(a, b, c)
  assert len(product(a, b)) == len(a) * len(b)
  assert product(a, fixed()) == product(fixed(), a) == a == chain(a) == chain(a, [])
  assert product(a, []) == []


@given(values, values, values)
def test_product_distributes_over_chain(a, b, c):
  a, b, c = grid('x', a), grid('x', b), grid('y', c)
  assert product(chain(a, b), c) == chain(product(a, c), product(b, c))


def test_conflicts_and_unequal_lengths_are_refused():
  with pytest.raises(ValueError, match='set twice: a'):
    product(grid('a', [1]), grid('a', [2]))
  with pytest.raises(ValueError, match='set twice: a'):
    together(grid('a', [1]), fixed(a=2))
  with pytest.raises(ValueError, match='set twice: a'):
    fixed({'a': 1}, a=2)
  with pytest.raises(ValueError, match=r'shorter|longer'):
    together(grid('a', [1, 2]), grid('b', [1]))


def test_sweeps_do_not_share_their_dicts():
  one = fixed(a=1)
  chain(one)[0]['a'] = product(one)[0]['a'] = together(one)[0]['a'] = 2
  assert one == [{'a': 1}]


def a_run(**changes):
  run = {
    'config': 'configs/tiny.py',
    'overrides': {'weight.name': 'rigl', 'weight.sparsity': 0.9, 'seed': 1},
    'labels': {'method': 'rigl', 'sparsity': 0.9},
  }
  return Run(**run | changes)


def test_id_is_readable_and_the_same_in_every_process():
  run_id = a_run().id('demo')
  assert re.fullmatch(r'rigl-sparsity0\.9-seed1-[0-9a-f]{8}', run_id)
  code = (
    'from experiments.sweep import Run; print(Run("configs/tiny.py", '
    '{"seed": 1, "weight.sparsity": .9, "weight.name": "rigl"}, '
    '{"method": "rigl", "sparsity": .9}).id("demo"))'
  )
  for seed in ('1', '2'):
    environment = {'PYTHONHASHSEED': seed, 'PYTHONPATH': ':'.join(filter(None, sys.path))}
    command = [sys.executable, '-c', code]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.strip() == run_id


def test_id_changes_with_what_is_run():
  runs = [
    a_run(),
    a_run(config='configs/base.py'),
    a_run(overrides={'weight.name': 'set', 'seed': 1}),
    a_run(labels={'method': 'rigl', 'sparsity': 0.9, 'format': 'gather'}),
  ]
  assert len({run.id('demo')[-8:] for run in runs} | {a_run().id('other')[-8:]}) == 5


@given(st.dictionaries(st.text(min_size=1).filter(lambda name: name != 'seed'), st.text()))
def test_id_is_a_safe_folder_name(labels):
  run_id = a_run(labels=labels).id('demo')
  assert re.fullmatch(r'[A-Za-z0-9_][A-Za-z0-9._-]*', run_id) and len(run_id) < 80


def test_command_survives_the_shell():
  overrides = {
    'weight.distribution': 'attention=0.5, mlp=$HOME',
    'data.split': (0.9, 0.1),
    'seed': 3,
  }
  words = shlex.split(a_run(overrides=overrides).command('results/a b/runs/x'))
  assert words == [
    'python', '-m', 'sparse_lm.train', '--config=configs/tiny.py',
    '--config.weight.distribution=attention=0.5, mlp=$HOME', '--config.data.split=(0.9, 0.1)',
    '--config.seed=3', '--workdir=results/a b/runs/x',
  ]  # fmt: skip


def test_the_command_gives_the_config_that_the_runner_loads():
  from sparse_lm.commands.config_arguments import overrides_from_args
  from sparse_lm.runs import configs as config

  overrides = {'weight.name': 'rigl', 'weight.sparsity': 0.9, 'model.tied': True, 'seed': 3}
  overrides['data.split'] = (0.8, 0.1, 0.1)
  typed = [w for w in shlex.split(a_run(overrides=overrides).command('x')) if w[:9] == '--config.']
  loaded = config.load('configs/tiny.py', overrides_from_args(typed))
  assert config.to_json(loaded) == config.to_json(config.load('configs/tiny.py', overrides))


def test_numpy_values_become_numbers():
  numpy = product(grid('seed', np.arange(1, 2)), grid('weight.sparsity', np.array([0.5])))
  plain = [{'seed': 1, 'weight.sparsity': 0.5}]
  assert [a_run(overrides=o).id('s') for o in numpy] == [a_run(overrides=o).id('s') for o in plain]
  assert 'np.' not in a_run(overrides=numpy[0]).command('x')


def test_the_seed_is_no_label():
  with pytest.raises(ValueError, match='not a label'):
    a_run(labels={'seed': 1})
