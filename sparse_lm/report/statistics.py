"""Statistics over seeds: spread, paired differences, correction for many rows, equivalence.

Runs with the same seed share their initial weights and their batches, so their difference varies less
than either run. All comparisons here therefore use differences between runs of the same seed.
"""

import bisect
import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np
from scipy.special import chdtri, ndtr, stdtr, stdtrit

CONFIDENCE = 0.95  # of intervals
ALPHA = 0.05  # rate of false positives of every test
POWER = 0.8  # of the equivalence test, for the number of seeds that it needs
MOST_SEEDS = 1000  # the largest number of seeds that the search tries


def mean_std(values: Sequence[float]) -> tuple[float, float]:
  """Returns the mean and the sample standard deviation (n - 1); nan if there are too few values."""
  n = len(values)
  if n == 0:
    return math.nan, math.nan
  mean = math.fsum(values) / n if all(map(math.isfinite, values)) else sum(values) / n
  if n == 1:
    return mean, math.nan
  if all(value == values[0] for value in values):
    return values[0], 0.0  # exactly: a rounding error would pass for a spread
  return mean, math.dist(values, n * [mean]) / math.sqrt(n - 1)  # no square of its own overflows


@dataclasses.dataclass(frozen=True)
class Difference:
  """The mean of paired differences over seeds.

  Attributes:
    n: number of seeds that both sides have.
    mean: of the differences; nan without a common seed.
    std: their sample standard deviation; nan for one seed.
  """

  n: int
  mean: float
  std: float

  @classmethod
  def paired(cls, values: Mapping[int, float], baseline: Mapping[int, float]) -> 'Difference':
    """Returns `values - baseline` over the seeds that both have, given values by seed."""
    differences = [values[seed] - baseline[seed] for seed in values if seed in baseline]
    return cls(len(differences), *mean_std(differences))

  @property
  def error(self) -> float:
    """Standard error of the mean."""
    return self.std / math.sqrt(self.n) if self.n else math.nan

  def interval(self, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Confidence interval of the mean by Student's t distribution; nan for fewer than two seeds."""
    if self.n < 2:
      return math.nan, math.nan
    half = float(stdtrit(self.n - 1, (1 + confidence) / 2)) * self.error
    return self.mean - half, self.mean + half

  @property
  def p(self) -> float:
    """Two-sided p-value of the paired t test that the mean is zero; nan for fewer than two seeds."""
    return 2 * _upper_tail(abs(self.mean), self)

  def equivalence_p(self, margin: float) -> float:
    """p-value of two one-sided paired t tests (TOST) that the mean lies within `±margin`.

    It is the larger p-value of the tests `mean > -margin` and `mean < margin`; nan for fewer than two
    seeds.
    """
    return _upper_tail(margin - abs(self.mean), self)

  def seeds_for_equivalence(self, margin: float) -> float:
    """Returns how many seeds the equivalence test needs to succeed with a probability of `POWER`.

    It assumes that the observed mean and standard deviation are the true ones. The result is inf if no
    number up to `MOST_SEEDS` suffices, for example because the mean lies outside the margin. It is nan if
    there are fewer than two seeds.
    """
    if math.isnan(self.mean) or math.isnan(self.std):
      return math.nan
    if abs(self.mean) >= margin:
      return math.inf
    numbers = range(2, MOST_SEEDS + 1)
    i = bisect.bisect_left(
      numbers, POWER, key=lambda n: equivalence_power(self.mean, self.std, n, margin)
    )
    return numbers[i] if i < len(numbers) else math.inf


def _upper_tail(mean: float, difference: Difference) -> float:
  """Returns the p-value of the t test that `mean` is above 0, given the error of `difference`."""
  if difference.n < 2 or math.isnan(mean):
    return math.nan
  if difference.error == 0:
    return 0.5 if mean == 0 else float(mean < 0)
  return float(stdtr(difference.n - 1, -mean / difference.error))


def equivalence_power(mean: float, std: float, n: int, margin: float) -> float:
  """Returns the probability that the equivalence test at level `ALPHA` succeeds with `n` seeds.

  Args:
    mean: true mean of the paired differences, which are assumed to be normally distributed.
    std: their true standard deviation.
    n: number of seeds, at least 2.
    margin: margin of the test.
  """
  if std == 0:
    return float(abs(mean) < margin)
  # Given the sample's standard deviation, the test succeeds if the sample's mean lies within
  # ±(margin - t * error). This probability is averaged over quantiles of the standard deviation.
  quantiles = (np.arange(2000) + 0.5) / 2000
  sample = np.sqrt(chdtri(n - 1, quantiles) / (n - 1))
  half = margin * math.sqrt(n) / std - stdtrit(n - 1, 1 - ALPHA) * sample
  center = mean * math.sqrt(n) / std
  return float(np.mean(np.maximum(ndtr(half - center) - ndtr(-half - center), 0)))


def holm(p_values: Sequence[float]) -> list[float]:
  """Returns p-values after Holm's correction for their number.

  If the results with a corrected p-value below a level are called significant, the probability of any
  false positive is below that level. nan stays nan and is not counted.
  """
  order = sorted(
    (i for i, p in enumerate(p_values) if not math.isnan(p)), key=lambda i: p_values[i]
  )
  corrected = [math.nan] * len(p_values)
  largest = 0.0
  for rank, i in enumerate(order):
    largest = max(largest, min(1.0, (len(order) - rank) * p_values[i]))
    corrected[i] = largest
  return corrected
