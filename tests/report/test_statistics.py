"""Statistics against SciPy's tests, brute force and simulation."""

import itertools
import math

import numpy as np
import pytest
import scipy.stats

from sparse_lm.report import statistics
from sparse_lm.report.statistics import Difference


def samples(n, mean=0.03, std=0.02, seed=0):
  random = np.random.default_rng(seed)
  base = random.normal(2.0, 0.1, n)
  own = base + random.normal(mean, std, n)
  return dict(enumerate(own.tolist())), dict(enumerate(base.tolist()))


def test_mean_and_sample_standard_deviation():
  assert statistics.mean_std([1.0, 2.0, 4.0]) == pytest.approx((7 / 3, 1.5275252316519468))
  assert statistics.mean_std([0.1, 0.1, 0.1]) == (0.1, 0.0)
  mean, std = statistics.mean_std([5.0])
  assert mean == 5 and math.isnan(std)
  assert all(map(math.isnan, statistics.mean_std([])))
  assert math.isnan(statistics.mean_std([1.0, math.nan])[0])
  assert math.isnan(statistics.mean_std([math.nan, 1.0])[0])
  assert statistics.mean_std([1.0, math.inf])[0] == math.inf


@pytest.mark.parametrize('n', [2, 3, 5, 12])
@pytest.mark.parametrize('mean', [0.0, 0.03, -0.2])
def test_interval_and_p_value_are_those_of_scipys_paired_t_test(n, mean):
  own, base = samples(n, mean, seed=n)
  found = Difference.paired(own, base)
  wanted = scipy.stats.ttest_rel(list(own.values()), list(base.values()))
  assert found.p == pytest.approx(wanted.pvalue, rel=1e-9)
  assert found.interval() == pytest.approx(tuple(wanted.confidence_interval(0.95)), rel=1e-9)
  assert found.interval(0.9) == pytest.approx(tuple(wanted.confidence_interval(0.9)), rel=1e-9)


def test_only_common_seeds_are_compared():
  found = Difference.paired({0: 1.0, 1: 2.0, 7: 9.0}, {1: 1.5, 0: 0.75, 3: -5.0})
  assert (found.n, found.mean) == (2, 0.375)
  assert Difference.paired({0: 1.0}, {1: 1.0}).n == 0


@pytest.mark.parametrize('values', [{}, {0: 1.0}, {0: 1.0, 1: math.nan}])
def test_too_few_or_diverged_seeds_give_no_interval_and_no_test(values):
  found = Difference.paired(values, {0: 0.5, 1: 0.5})
  numbers = [*found.interval(), found.p, found.equivalence_p(0.1), found.seeds_for_equivalence(0.1)]
  assert all(map(math.isnan, numbers))


def test_differences_without_spread_are_certain():
  found = Difference.paired({0: 1.5, 1: 2.5}, {0: 1.0, 1: 2.0})
  assert found.interval() == (0.5, 0.5) and found.p == 0
  assert (found.equivalence_p(0.6), found.equivalence_p(0.4)) == (0, 1)
  assert found.seeds_for_equivalence(0.6) == 2
  assert Difference.paired({0: 1.0, 1: 2.0}, {0: 1.0, 1: 2.0}).p == 1


@pytest.mark.parametrize('mean', [0.0, 0.012, -0.015, 0.05])
def test_equivalence_is_two_one_sided_t_tests_and_the_90_percent_interval(mean):
  own, base = samples(6, mean, 0.01, seed=3)
  found = Difference.paired(own, base)
  differences = [own[seed] - base[seed] for seed in own]
  for margin in (0.005, 0.02, 0.08):
    above = scipy.stats.ttest_1samp(differences, -margin, alternative='greater').pvalue
    below = scipy.stats.ttest_1samp(differences, margin, alternative='less').pvalue
    assert found.equivalence_p(margin) == pytest.approx(max(above, below), rel=1e-9)
    low, high = found.interval(0.9)
    assert (found.equivalence_p(margin) < 0.05) == (-margin < low and high < margin)


@pytest.mark.parametrize(('mean', 'n'), [(0.0, 4), (0.008, 6), (-0.01, 20), (0.03, 8)])
def test_power_of_the_equivalence_test_is_that_of_a_simulation(mean, n):
  std, margin, times = 0.012, 0.02, 20_000
  draws = np.random.default_rng(n).normal(mean, std, (times, n))
  half = scipy.stats.t.ppf(0.95, n - 1) * draws.std(axis=1, ddof=1) / math.sqrt(n)
  center = draws.mean(axis=1)
  passed = np.mean((center - half > -margin) & (center + half < margin))
  error = 4 * math.sqrt(0.25 / times)
  assert statistics.equivalence_power(mean, std, n, margin) == pytest.approx(passed, abs=error)


def test_seeds_for_equivalence_are_the_first_number_that_reaches_the_power():
  found = Difference(4, 0.008, 0.012)
  powers = {n: statistics.equivalence_power(0.008, 0.012, n, 0.02) for n in range(2, 40)}
  assert found.seeds_for_equivalence(0.02) == next(n for n, p in powers.items() if p >= 0.8)
  assert Difference(4, 0.02, 0.001).seeds_for_equivalence(0.02) == math.inf
  assert Difference(4, 0.0199, 0.5).seeds_for_equivalence(0.02) == math.inf


def test_holm_is_the_closed_test_of_all_subsets():
  p_values = [0.01, 0.04, 0.03, 0.005, 0.03]
  found = statistics.holm(p_values)
  for i, corrected in enumerate(found):
    # A hypothesis is rejected where Bonferroni's test rejects every subset that holds it.
    subsets = [
      subset
      for size in range(1, len(p_values) + 1)
      for subset in itertools.combinations(range(len(p_values)), size)
      if i in subset
    ]
    wanted = max(len(subset) * min(p_values[j] for j in subset) for subset in subsets)
    assert corrected == pytest.approx(min(1, wanted))


def test_holm_does_not_count_rows_without_a_test():
  assert statistics.holm([0.02, math.nan, 0.03]) == pytest.approx(
    [0.04, math.nan, 0.04], nan_ok=True
  )
  assert statistics.holm([]) == []
