"""The common study: methods at several sparsities over seeds, in one table and one figure.

This is a whole study (see `run`)::

  STUDY = Comparison(
    config='configs/tiny.py',
    methods={'RigL': {'weight.name': 'rigl'}, 'SET': {'weight.name': 'set'}},
    sparsities=(0.5, 0.9),
    seeds=(0, 1, 2),
    caption='Connections that move, at two sparsities',
  )
  runs, report = STUDY.runs, STUDY.report

A study that shows more wraps `report`: it adds metrics with `with_metric` and draws figures of its own.
"""

import dataclasses
import pathlib
from collections.abc import Callable, Mapping, Sequence

from experiments.study import reproduce
from experiments.sweep import Overrides, Run, fixed, grid, product
from sparse_lm.core.errors import require
from sparse_lm.core.records import Json
from sparse_lm.report import plot, results, table

LOSS = 'val_loss'  # the metric that figures show and that `margin` is about
# Metrics of a table, if the study names none.
COLUMNS = (
  LOSS,
  'sparsity_prunable',
  'flops_forward_ratio',
  'flops_training_ratio',
  'stored_bytes',
  'train_step_ms',
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Comparison:
  """A study that trains every method at every sparsity, beside dense models, over the same seeds.

  Attributes:
    config: path of the config file that all runs start from.
    methods: by the method's name in the table, the fields that it sets, such as
      `{'RigL': {'weight.name': 'rigl'}}`.
    sparsities: values of `config.weight.sparsity`, each above 0 and below 1.
    seeds: values of `config.seed`.
    caption: what the table shows, in one line without a full stop.
    dense: by name, the fields that a dense model sets. The first dense model is the baseline of the
      differences.
    common: fields that all runs set.
    columns: metrics of the table; a `table.Column` also gives heading, unit and format.
    margin: margin of the equivalence test of the validation loss, in nats per token (see
      `table.Column`); 0 means no test.
  """

  config: str
  methods: Mapping[str, Overrides]
  sparsities: Sequence[float]
  seeds: Sequence[int]
  caption: str
  dense: Mapping[str, Overrides] = dataclasses.field(default_factory=lambda: {'dense': {}})
  common: Overrides = dataclasses.field(default_factory=dict)
  columns: Sequence[str | table.Column] = COLUMNS
  margin: float = 0.0

  def __post_init__(self) -> None:
    for field in ('methods', 'sparsities', 'seeds', 'dense', 'columns'):
      value = vars(self)[field]
      require(bool(value), field, value, 'at least one')
    for value in self.sparsities:
      require(0 < value < 1, 'sparsities', value, 'numbers above 0 and below 1')
    require(self.margin >= 0, 'margin', self.margin, 'at least 0')
    if self.margin:
      known = [table.column(c).metric for c in self.columns]
      require(LOSS in known, 'margin', self.margin, f'0, or columns with {LOSS!r}')
    for name in self.methods:
      require(name not in self.dense, 'methods', name, 'names that no dense model has')

  def runs(self) -> list[Run]:
    """The dense models, then every method at every sparsity, each over the seeds."""
    seeds = product(fixed(self.common), grid('seed', self.seeds))
    dense = [
      Run(self.config, overrides, {'method': name, 'sparsity': 0.0})
      for name, fields in self.dense.items()
      for overrides in product(fixed(fields), seeds)
    ]
    return dense + [
      Run(self.config, overrides, {'method': name, 'sparsity': overrides['weight.sparsity']})
      for name, fields in self.methods.items()
      for overrides in product(fixed(fields), grid('weight.sparsity', self.sparsities), seeds)
    ]

  def report(self, lines: list[results.Line], folder: pathlib.Path) -> str:
    """Writes the table and a figure of validation loss against sparsity; returns the table."""
    baseline = {'method': next(iter(self.dense))}
    columns = [self._tested(table.column(c)) for c in self.columns]
    frame = table.summarise(lines, ['method', 'sparsity'], columns, baseline)
    sparsity = table.Column('sparsity', 'sparsity', '.0f', '%', 100)
    figure = plot.curves(lines, sparsity, LOSS, 'method', {'sparsity': 0.0})
    plot.save(figure, folder, folder.name)
    return table.write(frame, folder, self.caption, reproduce(lines, folder))

  def _tested(self, column: table.Column) -> table.Column:
    """Returns the column, with the equivalence test if it is that of the validation loss."""
    return table.with_margin(column, self.margin) if column.metric == LOSS else column


def with_metric(
  lines: Sequence[results.Line], name: str, function: Callable[[Mapping[str, Json]], float]
) -> list[results.Line]:
  """Adds a metric to each line, which `function` computes from the line's other metrics."""
  return [line | {'metrics': line['metrics'] | {name: function(line['metrics'])}} for line in lines]
