"""The notebook quickstart, see one_notebook.py."""

from one_notebook import Notebook


class TestQuickstart(Notebook):
  name = 'quickstart'
