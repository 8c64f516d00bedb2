import subprocess
import sys

import matplotlib.colors
import numpy as np
import pytest

from sparse_lm.core.errors import UserError
from sparse_lm.report import plot
from sparse_lm.report.table import Column


def line(method, sparsity, seed, loss):
  labels = {'method': method} | ({} if sparsity is None else {'sparsity': sparsity})
  metrics = {'val_loss': loss, 'flops': 1 - (sparsity or 0)}
  run = f'{method}{sparsity}{seed}'
  return {'study': 's', 'run': run, 'labels': labels, 'seed': seed, 'metrics': metrics}


@pytest.fixture
def lines():
  return [
    line('dense', None, 0, 1.0), line('dense', None, 1, 2.0),
    line('set', 0.9, 0, 3.0), line('set', 0.9, 1, 5.0),
    line('set', 0.5, 0, 2.0), line('set', 0.5, 1, 2.2),
    line('rigl', 0.5, 0, 1.5),
  ]  # fmt: skip


X = Column('sparsity', 'sparsity', unit='%', scale=100)


def test_points_error_bars_and_band(lines):
  axes = plot.curves(lines, X, 'val_loss', 'method', {'method': 'dense'}).axes[0]
  by_label = {c.get_label(): c for c in axes.containers}
  assert list(by_label) == ['set', 'rigl']
  data, _, bars = by_label['set'].lines
  np.testing.assert_allclose(data.get_xydata(), [[50, 2.1], [90, 4.0]])
  low_high = [segment[:, 1] for segment in bars[0].get_segments()]
  spread = np.std([2.0, 2.2], ddof=1), np.std([3.0, 5.0], ddof=1)
  np.testing.assert_allclose(
    low_high, [[2.1 - spread[0], 2.1 + spread[0]], [4 - spread[1], 4 + spread[1]]]
  )
  dense = next(each for each in axes.lines if each.get_label() == 'dense')
  np.testing.assert_allclose(dense.get_ydata(), 1.5)
  std = np.std([1.0, 2.0], ddof=1)
  band = axes.patches[0].get_extents().transformed(axes.transData.inverted())
  np.testing.assert_allclose([band.y0, band.y1], [1.5 - std, 1.5 + std])
  assert axes.get_xlabel() == 'sparsity (%)'
  assert axes.get_ylabel() == 'validation loss (nats/token)'


def test_a_metric_as_x_and_one_seed_without_error_bar(lines):
  axes = plot.curves(lines, 'flops', 'val_loss', 'method', {'method': 'dense'}).axes[0]
  drawn = {c.get_label(): c.lines for c in axes.containers}
  np.testing.assert_allclose(drawn['set'][0].get_xydata(), [[0.1, 4.0], [0.5, 2.1]])
  assert drawn['rigl'][2] == ()


def test_the_front_holds_what_no_other_point_beats():
  draw = np.random.default_rng(0)
  found = draw.integers(0, 12, (20, 3)).astype(float)  # two costs and a loss, with ties
  lines = [
    {
      'study': 's',
      'run': str(i),
      'labels': {'method': 'ab'[i % 2], 'setting': i},
      'seed': 0,
      'metrics': {'flops': flops, 'ms': ms, 'loss': loss},
    }
    for i, (flops, ms, loss) in enumerate(found)
  ]
  figure = plot.fronts(lines, ['flops', 'ms'], 'loss', 'method')
  for column, axes in enumerate(figure.axes):
    points = found[:, [column, 2]]
    beaten = [
      any((other <= point).all() and (other < point).any() for other in points) for point in points
    ]
    front = np.unique(points[~np.array(beaten)], axis=0)
    (step,) = [each for each in axes.lines if each.get_color() == '#999999']
    np.testing.assert_array_equal(step.get_xydata(), front)
    drawn = [c.lines[0] for c in axes.containers]
    assert sorted(map(tuple, np.concatenate([d.get_xydata() for d in drawn]))) == sorted(
      map(tuple, points)
    )
    assert {d.get_linestyle() for d in drawn} == {'None'}
  assert [text.get_text() for text in figure.legends[0].get_texts()] == ['a', 'b', 'Pareto front']


def test_twenty_series_look_different():
  lines = [line(f'm{i}', 0.5, 0, 1.0 + i) for i in range(20)]
  axes = plot.curves(lines, 'sparsity', 'val_loss', 'method').axes[0]
  looks = {
    (matplotlib.colors.to_hex(c.lines[0].get_color()), c.lines[0].get_marker(), c.lines[0].get_ls())
    for c in axes.containers
  }
  assert len(looks) == 20


def test_several_dense_twins_are_told_apart():
  lines = [line('dense', s, 0, loss) for s, loss in ((0.5, 1.0), (0.9, 2.0))]
  figure = plot.curves([*lines, line('set', 0.5, 0, 3.0)], 'sparsity', 'val_loss', 'method',
                       {'method': 'dense'})  # fmt: skip
  names = [text.get_text() for text in figure.legends[0].get_texts()]
  assert names == ['dense 0.5', 'dense 0.9', 'set']


def test_the_legend_stands_beside_the_data(lines):
  figure = plot.curves(lines, X, 'val_loss', 'method', {'method': 'dense'})
  figure.draw_without_rendering()
  legend, axes = figure.legends[0].get_window_extent(), figure.axes[0].get_window_extent()
  assert legend.x0 >= axes.x1


def test_files_are_written_whole_and_reproducibly(lines, tmp_path):
  figure = plot.curves(lines, X, 'val_loss', 'method', {'method': 'dense'})
  written = plot.save(figure, tmp_path / 'new', 'loss')
  assert [path.name for path in written] == ['loss.png', 'loss.pdf']
  assert sorted(path.name for path in (tmp_path / 'new').iterdir()) == ['loss.pdf', 'loss.png']
  png, pdf = (path.read_bytes() for path in written)
  assert png.startswith(b'\x89PNG') and pdf.startswith(b'%PDF')
  assert int.from_bytes(png[16:20]) == 1024  # 6.4 inches of 160 dots
  plot.save(figure, tmp_path / 'new', 'loss')
  assert (png, pdf) == tuple(path.read_bytes() for path in written)


def test_bad_names(lines):
  with pytest.raises(UserError, match="did you mean 'sparsity'"):
    plot.curves(lines, 'sparsty', 'val_loss', 'method', {'method': 'dense'})
  with pytest.raises(UserError, match="did you mean 'val_loss'"):
    plot.curves(lines, 'sparsity', 'val_los', 'method', {'method': 'dense'})
  with pytest.raises(UserError, match='baseline'):
    plot.curves(lines, 'sparsity', 'val_loss', 'method', {'method': 'den'})
  with pytest.raises(UserError, match='series dense is None, not a number'):
    plot.curves(lines, 'sparsity', 'val_loss', 'method')


def test_pyplot_stays_out():
  code = 'import sys, sparse_lm.report.plot; sys.exit("matplotlib.pyplot" in sys.modules)'
  assert subprocess.run([sys.executable, '-c', code]).returncode == 0
