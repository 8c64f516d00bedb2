"""Random configs end in one line or in numbers, within the limits of fuzz_worker.py."""

import pytest
from fuzz_worker import Worker

SEEDS = 500


@pytest.fixture(scope='module')
def worker(tmp_path_factory):
  started = Worker('fuzz_configs', tmp_path_factory.mktemp('fuzz_configs'))
  yield started
  started.close()


@pytest.mark.fuzz
@pytest.mark.parametrize('seed', range(SEEDS))
def test_random_config(seed, worker):
  found = worker.run(seed)
  again = f"python -m pytest -m fuzz 'tests/fuzz/test_fuzz_configs.py::test_random_config[{seed}]'"
  assert not found['fault'], f'{found["fault"]}: {found["command"]}\n{found["shown"]}\n{again}'
