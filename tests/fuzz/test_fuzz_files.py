"""Damaged files end in one line or are read as the whole ones, within the limits of fuzz_worker.py."""

import pytest
from fuzz_worker import Worker

SEEDS = 300


@pytest.fixture(scope='module')
def worker(tmp_path_factory):
  started = Worker('fuzz_files', tmp_path_factory.mktemp('fuzz_files'))
  yield started
  started.close()


@pytest.mark.fuzz
@pytest.mark.parametrize('seed', range(SEEDS))
def test_damaged_file(seed, worker):
  found = worker.run(seed)
  again = f"python -m pytest -m fuzz 'tests/fuzz/test_fuzz_files.py::test_damaged_file[{seed}]'"
  assert not found['fault'], f'{found["fault"]}: {found["command"]}\n{found["shown"]}\n{again}'
