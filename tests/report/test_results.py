import json
import math
import multiprocessing
import resource
import signal

import pytest

from sparse_lm.core.errors import UserError
from sparse_lm.report import results as lines


def line(run='a', seed=0, labels=None, **metrics):
  return {'study': 's', 'run': run, 'labels': labels or {}, 'seed': seed, 'metrics': metrics}


def test_half_a_last_line_is_left_out_and_named(tmp_path, capsys):
  file = tmp_path / 'runs.jsonl'
  file.write_text(json.dumps(line('a')) + '\n' + json.dumps(line('b'))[:-9])
  assert [found['run'] for found in lines.read([file])] == ['a']
  assert 'runs.jsonl:2' in capsys.readouterr().err


def test_a_line_cut_within_a_character_is_left_out(tmp_path):
  file = tmp_path / 'runs.jsonl'
  file.write_bytes(json.dumps(line('a')).encode() + b'\n{"run": "\xc3')
  assert [found['run'] for found in lines.read([file])] == ['a']


def test_a_whole_last_line_without_newline_counts(tmp_path):
  file = tmp_path / 'runs.jsonl'
  file.write_text(json.dumps(line('a')))
  assert len(lines.read([file])) == 1


def test_append_recovers_from_half_a_line(tmp_path):
  file = tmp_path / 'new' / 'runs.jsonl'
  lines.append(file, line('a'))
  with file.open('a') as stream:
    stream.write('{"run": "half')
  lines.append(file, line('b'))
  assert [found['run'] for found in lines.read([file])] == ['a', 'b']


def test_later_lines_replace_earlier_ones_in_place(tmp_path):
  first, second = tmp_path / '1.jsonl', tmp_path / '2.jsonl'
  lines.append(first, line('a', loss=1))
  lines.append(first, line('b', loss=2))
  lines.append(second, line('a', loss=3))
  read = lines.read([first, second])
  assert [(found['run'], found['metrics']['loss']) for found in read] == [('a', 3), ('b', 2)]


@pytest.mark.parametrize('content', [None, '', '\n\n', '{"run": "ha', '{"step": 1}\n', '3\n'])
def test_what_is_no_results_file_is_named(tmp_path, content):
  file = tmp_path / 'runs.jsonl'
  if content is not None:
    file.write_text(content)
  with pytest.raises(UserError, match=r'runs\.jsonl'):
    lines.read([file])


def _append_many(file, name):
  for index in range(50):
    lines.append(file, line(f'{name}{index}', text=name * 5000))


def test_lines_of_several_processes_do_not_mix(tmp_path):
  file = tmp_path / 'runs.jsonl'
  context = multiprocessing.get_context('spawn')
  processes = [context.Process(target=_append_many, args=(file, name)) for name in 'xy']
  for process in processes:
    process.start()
  for process in processes:
    process.join()
  whole = [json.loads(text) for text in file.read_text().split('\n') if text]
  assert sorted(found['run'] for found in whole) == sorted(
    f'{n}{i}' for n in 'xy' for i in range(50)
  )


def test_groups_keep_the_order_of_first_appearance():
  labels = [{'m': 'b', 's': 1}, {'m': 'a'}, {'m': 'b', 's': 1}]
  found = lines.group([line(str(i), i, label) for i, label in enumerate(labels)], ['m', 's'])
  assert list(found) == [('b', 1), ('a', None)]
  assert [member['seed'] for member in found['b', 1]] == [0, 2]


def test_a_group_that_mixes_more_than_seeds_is_refused():
  mixed = [line('x', 0, {'m': 'a', 's': 1}), line('y', 1, {'m': 'a', 's': 2})]
  with pytest.raises(UserError, match="add 's' to the rows"):
    lines.group(mixed, ['m'])
  with pytest.raises(UserError, match='x and y'):
    lines.group([line('x', 0, {'m': 'a'}), line('y', 0, {'m': 'a'})], ['m'])
  with pytest.raises(UserError, match="did you mean 'm1'"):
    lines.group([line('x', 0, {'m1': 'a'})], ['m2'])


def test_a_metric_that_is_no_number_is_refused():
  with pytest.raises(UserError, match='not a number'):
    lines.by_seed([line(device='cpu')], 'device')


def test_a_full_disk_leaves_no_half_line(tmp_path):
  path = tmp_path / 'runs.jsonl'
  lines.append(path, {'run': 'a'})
  before = path.read_bytes()
  limits = resource.getrlimit(resource.RLIMIT_FSIZE)
  ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
  try:
    resource.setrlimit(resource.RLIMIT_FSIZE, (200, limits[1]))
    with pytest.raises(UserError, match=r'runs\.jsonl cannot be written'):
      lines.append(path, {'run': 'b' * 500})
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    signal.signal(signal.SIGXFSZ, ignored)
  assert path.read_bytes() == before


def test_a_run_that_diverged_has_nan_for_every_metric(tmp_path):
  path = tmp_path / 'runs.jsonl'
  head = {'labels': {'m': 'a'}, 'study': 's'}
  lines.append(path, head | {'run': 'x', 'seed': 0, 'metrics': {'loss': 1.0, 'time': 2}})
  lines.append(path, head | {'run': 'y', 'seed': 1} | lines.diverged('loss is nan'))
  fine, lost = lines.read([path])
  assert not lines.has_diverged(fine) and lines.has_diverged(lost)
  assert fine['metrics'] == {'loss': 1.0, 'time': 2}
  assert lost['metrics'].keys() == fine['metrics'].keys()
  assert all(math.isnan(value) for value in lost['metrics'].values())


def test_a_line_that_was_changed_is_refused_and_one_without_a_digest_is_read(tmp_path):
  path = tmp_path / 'runs.jsonl'
  lines.append(path, line(val_loss=2.0432))
  (read,) = lines.read([path])
  assert read == line(val_loss=2.0432)
  text = path.read_text()
  path.write_text(text.replace('2.0432', '2.0332'))
  with pytest.raises(UserError, match=r'runs.jsonl:1 .* changed since it was written'):
    lines.read([path])
  path.write_text(json.dumps(line(val_loss=2.0332)))
  assert lines.read([path])[0]['metrics'] == {'val_loss': 2.0332}
