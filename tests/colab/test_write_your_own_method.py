"""The notebook write_your_own_method, see one_notebook.py."""

from one_notebook import Notebook


class TestWriteYourOwnMethod(Notebook):
  name = 'write_your_own_method'
