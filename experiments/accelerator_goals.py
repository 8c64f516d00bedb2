"""The goals of the accelerator studies on a GPU and on a CPU, and the names of the studies' rows."""

import dataclasses

# The names of the rows that have goals.
DENSE = 'dense'
DEFAULT = 'dense, RMSNorm and rotary positions'
STATIC, MAGNITUDE, SET, RIGL, STE = 'static', 'magnitude', 'SET', 'RigL', 'STE'
EXPERTS, DEPTHS = '1 of 8 experts', 'mixture of depths, 12.5 % of every second layer'
PEAK, START, PACKED = 'matmul and memory', 'first step', '16 packed runs'
STUDY, NANOGPT = 'study of 57 packed runs', "nanoGPT's GPU setting"


@dataclasses.dataclass(frozen=True)
class Goal:
  """An upper limit for a metric of a row.

  Attributes:
    study: the study that measures the metric.
    row: the row of the study.
    metric: the metric's name in the study's lines.
    most: the limit, in the metric's own unit.
    what: the row and the metric in words.
    format, unit, scale: how values are printed, after multiplication by `scale`.
  """

  study: str
  row: str
  metric: str
  most: float
  what: str
  format: str = '.2f'
  unit: str = ''
  scale: float = 1.0

  def text(self, value: float) -> str:
    """Formats a value with its unit."""
    return f'{value * self.scale:{self.format}}{f" {self.unit}" if self.unit else ""}'


def _main(row: str, metric: str, most: float, *shown: str | float) -> Goal:
  return Goal('accelerator', row, metric, most, *shown)


def _more(row: str, metric: str, most: float, *shown: str | float) -> Goal:
  return Goal('accelerator_all', row, metric, most, *shown)


def _ratio(row: str, most: float) -> Goal:
  return _main(row, 'ratio', most, f'{row}: step / dense step', '.2f', '×')


# On one H100 or H200.
GPU = (
  _main(DENSE, 'ratio', 1.15, 'dense: step / step of the torch.compile twin', '.2f', '×'),
  _main(DENSE, 'peak_memory', 10e9, 'dense: peak memory', '.1f', 'GB', 1e-9),
  *(_ratio(row, 1.03) for row in (STATIC, MAGNITUDE, SET, RIGL)),
  _ratio(STE, 1.10),
  _ratio(EXPERTS, 1.25),
  _ratio(DEPTHS, 0.78),
  _main(START, 'cold_s', 25.0, 'first step, empty cache of compiled programs', '.1f', 's'),
  _main(START, 'warm_s', 6.0, 'first step, filled cache of compiled programs', '.1f', 's'),
  _main(PACKED, 'step_ms', 3.9, "16 packed runs of nanoGPT's CPU size: step", '.2f', 'ms'),
  _more(
    STUDY,
    'total_s',
    360.0,
    '57 such runs of 2000 steps: time of the study',
    '.0f',
    's',
  ),
  _more(NANOGPT, 'best_val_loss', 1.475, "nanoGPT's GPU setting: best validation loss", '.4f'),
  _more(NANOGPT, 'total_s', 100.0, "nanoGPT's GPU setting: time of the run", '.0f', 's'),
)
# On two CPU cores, at width 256 in float32, beside the twin in two threads.
CPU = (
  Goal(
    'accelerator_quick', DENSE, 'ratio', 1.05, 'dense: step / step of the PyTorch twin', '.2f', '×'
  ),
)


def goals(study: str, device: str) -> tuple[Goal, ...]:
  """The goals of a study on a device, given by JAX's name of the device."""
  return tuple(goal for goal in (CPU if device == 'cpu' else GPU) if goal.study == study)
