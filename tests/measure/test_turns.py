"""What a turn times and what it does not."""

from sparse_lm.measure import turns


def test_a_turn_is_prepared_before_its_clock_starts():
  seen = []

  class Array:
    def block_until_ready(self):
      seen.append('awaited')
      return self

  class Call(turns.Prepared):
    def prepare(self):
      seen.append('prepared')
      return {'cache': Array()}

    def __call__(self):
      seen.append('called')

  turns.interleaved({'one': Call()}, repeats=1, warmup=0)
  assert seen == ['prepared', 'awaited', 'called']
