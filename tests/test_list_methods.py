"""The table of methods is made from what the methods declare."""

from sparse_lm import list_methods


def test_every_method_names_its_paper_and_what_it_saves():
  for link, _, paper, saves, modes in list_methods.rows():
    assert paper and saves and modes, link
    assert not paper.endswith('.') and not saves.endswith('.') and '\n' not in paper + saves
