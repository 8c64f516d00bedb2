"""Numbers of a study's lines, for sentences in documents (see `documents`)."""

import dataclasses
import functools

from experiments.study import Study
from sparse_lm.core.errors import UserError
from sparse_lm.core.records import Json, JsonObject
from sparse_lm.report import formats, results, statistics, table
from sparse_lm.report.names import display, label_text


@dataclasses.dataclass(frozen=True)
class Findings:
  """The results of a finished study, such as `findings.mean('val_loss', method='rigl')`.

  Every number is a mean over the seeds of one row of the table, which is given by its labels. UserError
  is raised if the study lacks runs, or if the labels do not match exactly one row.
  """

  study: Study

  @functools.cached_property
  def lines(self) -> list[results.Line]:
    """The lines of all runs of the study."""
    found = self.study.finished()
    if lacking := [run for run in self.study.runs if run not in found]:
      raise UserError(
        f'{self.study.file} lacks {len(lacking)} of the {len(self.study.runs)} runs of '
        f'{self.study.name}, such as {lacking[0]}; valid: all runs that the study plans now'
      )
    return list(found.values())

  @functools.cached_property
  def table(self) -> str:
    """The study's table in Markdown. Also draws the study's figures, in its folder."""
    return self.study.module.report(self.lines, self.study.folder).strip()

  @functools.cached_property
  def machine(self) -> str:
    """The machine, or machines, on which the runs were made."""
    return '; and on '.join(results.machines(self.lines))

  def compared(self, metric: str, margin: float = 0.0, **baseline: Json) -> str:
    """A Markdown table of a metric's paired differences from the rows with the labels `baseline`.

    Args:
      metric: one whose column has a difference, such as 'val_loss'.
      margin: of the equivalence test, in the metric's unit; 0 = no test.
      baseline: labels of the row, or of one row for each value of the other labels.
    """
    rows = results.label_names(self.lines)
    column = dataclasses.replace(table.column(metric), paired=True, margin=margin)
    names = ','.join(f'{name}={label_text(value)}' for name, value in baseline.items())
    test = f' --margin={metric}={margin:g}' if margin else ''
    command = (
      f'python -m sparse_lm.report results/{self.study.name}/runs.jsonl --rows={",".join(rows)} '
      f'--columns={metric} --baseline={names}{test}'
    )
    frame = table.summarise(self.lines, rows, [column], baseline)
    caption = f'{column.title or metric} compared with {names}'
    return formats.markdown(frame, caption, command).strip()

  def mean(self, metric: str, **labels: Json) -> float:
    """The mean of a metric over the seeds of a row."""
    return self._statistics(metric, labels)[0]

  def text(self, metric: str, digits: int = 3, **labels: Json) -> str:
    """`mean ± std` over the seeds of a row, or the mean alone if there is no spread."""
    mean, std = self._statistics(metric, labels)
    return f'{mean:.{digits}f} ± {std:.{digits}f}' if std > 0 else f'{mean:.{digits}f}'

  def differences(self, metric: str, than: JsonObject, **labels: Json) -> list[float]:
    """The metric minus that of the row with the labels `than`, for each seed that both rows have."""
    own, other = (results.by_seed(self._row(row), metric) for row in (labels, than))
    return [own[seed] - other[seed] for seed in own if seed in other]

  def rows(self, metric: str, by: str, **labels: Json) -> dict[Json, float]:
    """The mean of a metric for each value of the label `by`, among the rows with `labels`."""
    values = [line['labels'].get(by) for line in self.lines if results.matches(line, labels)]
    return {value: self.mean(metric, **labels, **{by: value}) for value in dict.fromkeys(values)}

  def lowest(self, metric: str, by: str, **labels: Json) -> Json:
    """The value of the label `by` whose row has the lowest mean, among the rows with `labels`."""
    rows = self.rows(metric, by, **labels)
    return min(rows, key=rows.__getitem__)

  def highest(self, metric: str, by: str, **labels: Json) -> Json:
    """The value of the label `by` whose row has the highest mean, among the rows with `labels`."""
    rows = self.rows(metric, by, **labels)
    return max(rows, key=rows.__getitem__)

  def names(self, label: str) -> list[str]:
    """The display names of a label's values, in the order of the table."""
    return list(dict.fromkeys(display(line['labels'].get(label)) for line in self.lines))

  def spread(self, metric: str) -> float:
    """The largest standard deviation over seeds of any row."""
    rows = {str(line['labels']): line['labels'] for line in self.lines}.values()
    return max(self._statistics(metric, labels)[1] for labels in rows)

  def furthest(self, metric: str, value: float, **labels: Json) -> float:
    """The largest difference over the seeds of a row between the metric and `value`."""
    return max(abs(own - value) for own in results.by_seed(self._row(labels), metric).values())

  def _statistics(self, metric: str, labels: JsonObject) -> tuple[float, float]:
    row = self._row(labels)
    results.check_metric(row, metric)
    return statistics.mean_std(list(results.by_seed(row, metric).values()))

  def _row(self, labels: JsonObject) -> list[results.Line]:
    found = [line for line in self.lines if results.matches(line, labels)]
    rows = {str(line['labels']) for line in found}
    if len(rows) != 1:
      raise UserError(f'{len(rows)} rows of {self.study.name} have the labels {labels}; valid: one')
    return found
