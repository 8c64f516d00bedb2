"""Costs of packed formats: read from a device's file, and fitted to times."""

import sys

import numpy as np
import pytest

from sparse_lm import format_costs as command
from sparse_lm.inference import costs, formats, time_formats
from sparse_lm.inference.costs import FormatCost
from sparse_lm.inference.time_formats import Times, fit_line
from sparse_lm.measure import device

KINDS = [path.stem for path in costs.FOLDER.glob('*.json')]


@pytest.fixture
def fresh():
  """The costs are read anew, before and after."""
  costs.current.cache_clear()
  yield
  costs.current.cache_clear()


def test_a_device_has_its_own_costs_and_another_the_fallback(fresh, monkeypatch):
  assert costs.FALLBACK in KINDS
  for kind in KINDS:
    monkeypatch.setattr(device, 'kind', lambda kind=kind: kind)
    costs.current.cache_clear()
    assert costs.current().source == kind
  monkeypatch.setattr(device, 'kind', lambda: 'some-accelerator')
  costs.current.cache_clear()
  assert costs.current() == costs.read(costs.FALLBACK)


@pytest.mark.parametrize('kind', KINDS)
def test_every_file_has_every_format_that_multiplies_one_kernel(kind):
  found = costs.read(kind).by_name
  running = {n for n in formats.names() if formats.load(n).runs and not formats.load(n).stacks}
  assert found.keys() == running
  for name, cost in found.items():
    assert 0.3 < cost.slowdown < 10 and 0 <= cost.fixed < 5e7, name


def test_a_prediction_is_a_line_in_the_bytes_that_are_read():
  kernel = np.ones((64, 256), np.float32)
  stored = formats.load('dense_out_in').pack(kernel, kernel > 0)
  by_name = {'dense_out_in': FormatCost(slowdown=2.0, fixed=100.0)}
  own = costs.FormatCosts('a test', by_name)
  assert own.predicted(stored) == 2 * 64 * 256 * 4 + 100
  assert own.predicted(stored, read=0.25) == 2 * 64 * 256 + 100
  # What was not measured is taken for a dense format.
  assert costs.FormatCosts('a test', {}).predicted(stored) == 64 * 256 * 4 + 30e3


def test_the_line_is_found_on_a_machine_that_is_slower_now_and_then():
  draw = np.random.default_rng(0)
  dense_sizes = np.array([1e5, 4e5, 1e6, 4e6, 9e6])
  slower = [1 + 3 * (draw.random(15) < 0.3) for _ in dense_sizes]
  rate = 20e9  # bytes a second
  beside = [Times(b, b, s * (b + 5e4) / rate) for b, s in zip(dense_sizes, slower)]
  dense = fit_line([Times(b, b, np.full(15, (b + 5e4) / rate)) for b in dense_sizes])
  assert dense.slowdown == 1 and dense.fixed == pytest.approx(5e4)
  own = [Times(0.3 * b, b, s * (1.7 * 0.3 * b + 2e5) / rate) for b, s in zip(dense_sizes, slower)]
  found = fit_line(own, beside, dense)
  assert (found.slowdown, found.fixed) == (pytest.approx(1.7), pytest.approx(2e5))
  # One case gives no line of its own.
  found = fit_line(own[3:4], beside[3:4], dense)
  factor = (1.7 * 0.3 * 4e6 + 2e5) / (0.3 * 4e6 + 5e4)
  assert (found.slowdown, found.fixed) == (pytest.approx(factor), pytest.approx(factor * 5e4))
  # A line that would cross zero begins there.
  steep = [Times(b, b, s * max(1.5 * b - 1e5, 1e3) / rate) for b, s in zip(dense_sizes, slower)]
  assert fit_line(steep, beside, dense).fixed == 0


@pytest.mark.parametrize('precision', ['float32', pytest.param('bfloat16', marks=pytest.mark.slow)])
def test_formats_are_measured_on_this_device(precision, monkeypatch):
  monkeypatch.setattr(time_formats, 'CACHES', 4000)
  monkeypatch.setattr(time_formats, 'precision_here', lambda asked: precision)
  few = {'densities': (0.5,), 'kernels': 2, 'most': 3, 'masks': 2, 'calls': 2, 'flood': False}
  cases = time_formats.Cases(((64, 128), (64, 256)), bytes=64 * 128 * 4 * 3, **few)
  assert cases.count((64, 128), np.dtype('f')) == 3 and cases.count((64, 256), np.dtype('f')) == 2
  found = time_formats.measure(1, cases)
  assert found.keys() == costs.read(costs.FALLBACK).by_name.keys()
  assert all(cost.slowdown >= 0 and cost.fixed >= 0 for cost in found.values())


@pytest.mark.parametrize('out', [True, False])
def test_the_command_writes_what_packing_reads(out, fresh, tmp_path, monkeypatch, capsys):
  measured = {'gather': FormatCost(1.234, 123456.0), 'block': FormatCost(2.0, 0.0)}
  monkeypatch.setattr(time_formats, 'measure', lambda repeats: measured if repeats == 3 else None)
  monkeypatch.setattr(costs, 'FOLDER', tmp_path)
  file = tmp_path / f'{device.kind()}.json'
  arguments = [f'--out={file}'] if out else []
  monkeypatch.setattr(sys, 'argv', ['format_costs', '--repeats=3', *arguments])
  command.main()
  assert str(file) in capsys.readouterr().out
  found = costs.current()
  assert found.source == file.stem
  assert found.by_name == {'gather': FormatCost(1.2, 120e3), 'block': FormatCost(2.0, 0.0)}
