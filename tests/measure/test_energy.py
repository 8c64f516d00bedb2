"""Energy is read if there is a meter."""

from sparse_lm.measure import energy


def counter(folder, joules, wraps=1000.0):
  (folder / 'max_energy_range_uj').write_text(str(int(wraps * 1e6)))
  (folder / 'energy_uj').write_text(str(int(joules * 1e6)))


def test_a_counter_is_read_across_its_wrap(tmp_path, monkeypatch):
  monkeypatch.setattr(energy, 'RAPL', tmp_path)
  counter(tmp_path, 990)
  with energy.meter() as measured:
    assert measured.joules is None
    counter(tmp_path, 15)
  assert measured.joules == 25
  assert energy.per_token(measured.joules, 50) == '0.5 J/token'


def test_without_a_counter_nothing_is_measured(tmp_path, monkeypatch):
  for harm in (lambda: None, lambda: (tmp_path / 'energy_uj').write_text('x')):
    harm()
    monkeypatch.setattr(energy, 'RAPL', tmp_path)
    with energy.meter() as measured:
      pass
    assert measured.joules is None
    assert energy.per_token(measured.joules, 50) == 'not measured'
