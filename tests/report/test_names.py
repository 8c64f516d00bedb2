"""Display names of methods, patterns and formats are declared in their own files."""

import pytest

from sparse_lm.core import discovery
from sparse_lm.inference import formats
from sparse_lm.report.names import display


@pytest.mark.parametrize('label, shown', [
  ('hybrid: rigl + token_gate', 'hybrid: RigL + token gate'),
  ('block:16', 'blocks of 16'), ('block', 'block'), ('floor:4', 'at least 4 for each channel'),
  ('2:8', '2:8'), ('per_output', 'per output'), ('global:raw:0.01', 'global:raw:0.01'),
  ('rigl: block:64', 'RigL: blocks of 64'), ('rigl:64', 'rigl:64'), ('{}:3', '{}:3'), ('a{}', 'a{}'),
])  # fmt: skip
def test_labels_have_the_display_names_of_their_files(label, shown):
  assert display(label) == shown


def test_no_pattern_or_format_is_shown_with_an_underscore():
  names = [*formats.names(), *discovery.names('sparse_lm.patterns')]
  assert not any('_' in display(name) or '{' in display(name) for name in names)
