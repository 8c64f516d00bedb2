"""The notebook analyse_a_run, see one_notebook.py."""

from one_notebook import Notebook


class TestAnalyseARun(Notebook):
  name = 'analyse_a_run'
