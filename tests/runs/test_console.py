"""What a run shows: lines that stay, a bar on terminals alone, and warnings that name a remedy."""

import io
import re
import sys

import pytest

from sparse_lm.runs.console import Console
from sparse_lm.runs.loop import train


class Terminal(io.StringIO):
  def isatty(self):
    return True


@pytest.fixture
def shown(monkeypatch):
  """`shown(stream, config, workdir)`: what training writes to such a stderr."""

  def run(stream, config, workdir, progress=True):
    monkeypatch.setattr(sys, 'stderr', stream)
    train(config, str(workdir), progress=progress)
    return stream.getvalue()

  return run


@pytest.fixture
def static(tiny_config):
  return tiny_config(
    weight__name='static', weight__sparsity=0.75, train__eval_every=5, train__log_every=4
  )


def test_stderr_in_a_file_gets_lines_and_no_bar(static, tmp_path, shown):
  lines = shown(io.StringIO(), static, tmp_path / 'run').splitlines()
  assert len(lines) == 4 and not any('\r' in line for line in lines)
  # Of one block: 4 attention matrices of 16 x 16 and 2 of the MLP of 16 x 32.
  assert re.fullmatch(
    r'run: [\d,]+ parameters, 75.0% of 2,048 to be dropped; \d+ × .+ in float32; [\d,]+ training tokens; '
    r'steps 1 to 12 of 64 tokens each',
    lines[0],
  )
  found = [re.match(r'step (\d+): validation loss (\d\.\d{4})', line) for line in lines[1:]]
  assert [match[1] for match in found] == ['5', '10', '12']


def test_a_terminal_gets_a_bar(static, tmp_path, shown):
  text = shown(Terminal(), static, tmp_path / 'run')
  assert '12/12' in text and 'loss ' in text
  last = text[text.rindex('loss', 0, text.rindex('step 12: validation loss')) :]
  assert 'evaluating' in text[: text.rindex('step 12: validation loss')]
  assert 'step 12: validation loss' in last


def test_nothing_is_shown_without_progress(static, tmp_path, shown):
  assert shown(io.StringIO(), static, tmp_path / 'run', progress=False) == ''


def test_a_continued_run_says_where_it_is_and_that_schedules_are_stretched(
  tiny_config, tmp_path, shown
):
  config = tiny_config()
  shown(io.StringIO(), config, tmp_path / 'run')
  longer = tiny_config(train__steps=24)
  lines = shown(io.StringIO(), longer, tmp_path / 'run').splitlines()
  assert 'dense' in lines[0] and 'steps 13 to 24 of 64' in lines[0]
  assert lines[1] == (
    'warning: steps 1 to 12 ran on schedules of 12 steps, and config.train.steps is 24 now: from here on '
    'all schedules span 24 steps (the learning rate goes from 0.0005 to 0.0029)'
  )
  assert shown(io.StringIO(), longer, tmp_path / 'run') == ''


def test_a_warning_comes_once_for_each_kind(capsys):
  with Console(False, 'x', 0, 1) as console:
    for kind in 'aab':
      console.warn_once(kind, kind)
  assert capsys.readouterr().err == 'warning: a\nwarning: b\n'
