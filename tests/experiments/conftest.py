"""What the tests of studies share."""

import types

import pytest

from experiments import run as runner


@pytest.fixture
def run_study(call):
  """`run_study(argument, ...)`: what `python -m experiments.run` does with these arguments."""

  def run(*arguments):
    code, out, err = call(runner, arguments)
    return types.SimpleNamespace(code=code, out=out, err=err)

  return run
