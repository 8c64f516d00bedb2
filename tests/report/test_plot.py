import subprocess
import sys

import matplotlib.colors
import numpy as np
import pytest

from sparse_lm.core.errors import UserError
from sparse_lm.report import plot, style
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
  assert list(by_label) == ['SET', 'RigL']
  data, _, bars = by_label['SET'].lines
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
  np.testing.assert_allclose(drawn['SET'][0].get_xydata(), [[0.1, 4.0], [0.5, 2.1]])
  assert drawn['RigL'][2] == ()


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
  points = found[:, [0, 2]]
  beaten = [
    any((other <= point).all() and (other < point).any() for other in points) for point in points
  ]
  (axes,) = plot.curves(lines, 'flops', 'loss', 'method', front=True).axes
  (step,) = [each for each in axes.lines if each.get_label() == 'Pareto front']
  np.testing.assert_array_equal(step.get_xydata(), np.unique(points[~np.array(beaten)], axis=0))
  drawn = [c.lines[0] for c in axes.containers]
  assert sorted(map(tuple, np.concatenate([d.get_xydata() for d in drawn]))) == sorted(
    map(tuple, points)
  )
  assert {d.get_linestyle() for d in drawn} == {'None'}


def legend(figure):
  return [text.get_text() for text in figure.legends[0].get_texts()]


def test_no_two_series_of_a_panel_look_alike_in_grey():
  lines = [line(f'm{i}', 0.5, 0, 1.0 + i) for i in range(6)]
  (axes,) = plot.curves(lines, 'sparsity', 'val_loss', 'method').axes
  looks = {
    (c.lines[0].get_marker(), c.lines[0].get_markerfacecolor() == 'white') for c in axes.containers
  }
  assert (
    len(looks)
    == len({matplotlib.colors.to_hex(c.lines[0].get_color()) for c in axes.containers})
    == 6
  )
  assert len({str(series.line) for series in style.SERIES}) == len(style.SERIES)


def test_twenty_series_have_a_panel_each_with_all_others_in_grey(lines):
  many = [line(f'm{i}', 0.5, 0, 1.0 + i) for i in range(20)]
  figure = plot.curves(
    [*many, *lines], 'sparsity', 'val_loss', 'method', {'method': 'dense'}, reference=['rigl']
  )
  assert [axes.get_title() for axes in figure.axes] == [f'm{i}' for i in range(20)] + ['SET']
  for i, axes in enumerate(figure.axes[:20]):
    (own,) = axes.containers
    np.testing.assert_allclose(own.lines[0].get_xydata(), [[0.5, 1.0 + i]])
    others = axes.lines[0].get_ydata()
    assert sorted(others) == sorted([*(1.0 + k for k in range(20) if k != i), 2.1, 4.0])
    by_label = {each.get_label(): each for each in axes.lines}
    np.testing.assert_allclose(by_label['RigL'].get_xydata(), [[0.5, 1.5]])
    np.testing.assert_allclose(by_label['dense'].get_ydata(), 1.5)
  assert legend(figure) == [
    'this method',
    'all others',
    'RigL',
    'dense',
    'mean ± std, 1 to 2 seeds',
  ]


def test_the_legend_says_what_error_bars_are(lines):
  assert legend(plot.curves(lines[2:6], X, 'val_loss', 'method'))[-1] == 'mean ± std, 2 seeds'
  alone = [each for each in lines if each['seed'] == 0]
  assert legend(plot.curves(alone, 'flops', 'val_loss', 'method')) == ['dense', 'SET', 'RigL']


def test_a_line_marks_where_a_ratio_is_1(lines):
  ratio = Column('flops', 'FLOPs', unit='× the dense twin')
  figure = plot.curves(lines, ratio, 'val_loss', 'method')
  (even,) = [each for each in figure.axes[0].lines if each.get_label() == 'ratio of 1']
  assert list(even.get_xdata()) == [1, 1] and 'ratio of 1' in legend(figure)


def test_several_dense_twins_are_told_apart():
  lines = [line('dense', s, 0, loss) for s, loss in ((0.5, 1.0), (0.9, 2.0))]
  figure = plot.curves([*lines, line('set', 0.5, 0, 3.0)], 'sparsity', 'val_loss', 'method',
                       {'method': 'dense'})  # fmt: skip
  assert legend(figure) == ['SET', 'dense 0.5', 'dense 0.9']


def test_all_text_lies_within_one_column_of_a_paper(lines):
  figure = plot.curves(lines, X, 'val_loss', 'method', {'method': 'dense'})
  assert figure.get_figwidth() == style.WIDTH
  figure.draw_without_rendering()
  legend, axes = figure.legends[0].get_window_extent(), figure.axes[0].get_tightbbox()
  assert legend.y1 <= axes.y0 + 1
  for box in (legend, axes):
    assert figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1 and figure.bbox.y0 <= box.y0


def test_files_are_written_whole_and_reproducibly(lines, tmp_path):
  figure = plot.curves(lines, X, 'val_loss', 'method', {'method': 'dense'})
  written = plot.save(figure, tmp_path / 'new', 'loss')
  assert [path.name for path in written] == ['loss.png', 'loss.pdf']
  assert sorted(path.name for path in (tmp_path / 'new').iterdir()) == ['loss.pdf', 'loss.png']
  png, pdf = (path.read_bytes() for path in written)
  assert png.startswith(b'\x89PNG') and pdf.startswith(b'%PDF')
  assert int.from_bytes(png[16:20]) == 792  # 3.3 inches of 240 dots
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
