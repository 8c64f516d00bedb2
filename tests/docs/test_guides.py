"""The code in every guide runs and prints what the guide says."""

import os
import pathlib
import subprocess
import sys

import guide
import pytest

FOLDER = guide.ROOT / 'docs' / 'guides'
GUIDES = sorted(str(path.relative_to(FOLDER).with_suffix('')) for path in FOLDER.rglob('*.md'))


def run(path, folder, cache):
  command = [sys.executable, guide.__file__, str(path), str(folder)]
  env = os.environ | {
    'JAX_COMPILATION_CACHE_DIR': str(cache / 'guides'),
    'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0.2',
  }
  return subprocess.run(command, capture_output=True, text=True, timeout=540, env=env, check=False)


@pytest.fixture
def cache(request):
  return pathlib.Path(request.config.cache.mkdir('compiled'))


@pytest.mark.slow
@pytest.mark.parametrize('name', GUIDES)
def test_the_code_of_a_guide_runs(name, tmp_path, cache):
  done = run(FOLDER / f'{name}.md', tmp_path, cache)
  assert done.returncode == 0, done.stdout + done.stderr


EXAMPLE = """
# A guide

```{code-block} python
:caption: experiments/answer.py
ANSWER = 42
```

```python
from experiments.answer import ANSWER
print(f'{ANSWER} of 100: {ANSWER / 100}')
```

```text
42 of 100: 0.42
```

1. Blocks in lists run, too, and share the names:

   ```python
   ANSWER += 1
   ```

```sh
echo "seconds:   $(python -c 'from experiments import answer; print(answer.ANSWER)')"
echo 'any'
echo 'last 1.001'
```

```text
seconds: ...
...
last 1.0
```

```json
{"not": "executed"}
```

```python
assert ANSWER == 43
```
"""


def test_a_guide_runs_in_a_copy_of_the_checkout(tmp_path, cache):
  path = tmp_path / 'example.md'
  path.write_text(EXAMPLE)
  done = run(path, tmp_path / 'copy', cache)
  assert done.returncode == 0, done.stderr
  assert not (guide.ROOT / 'experiments' / 'answer.py').exists()


@pytest.mark.parametrize(
  ('now', 'then', 'message'),
  [
    ('42 of 100: 0.42', '42 of 100: 0.40', 'example.md, line 15: the output differs'),
    ('42 of 100: 0.42', '43 of 100: 0.42', 'example.md, line 15: the output differs'),
    ('last 1.0', 'last', 'example.md, line 31: the output differs'),
    ("echo 'any'", 'false', 'example.md, line 25: exit code 1'),
    ('assert ANSWER == 43', 'assert ANSWER == 44', 'line 41'),
    (':caption: experiments/answer.py\n', '', 'needs a :caption:'),
  ],
)
def test_a_guide_that_is_wrong_fails_at_its_line(now, then, message, tmp_path, cache):
  path = tmp_path / 'example.md'
  assert now in EXAMPLE
  path.write_text(EXAMPLE.replace(now, then))
  done = run(path, tmp_path / 'copy', cache)
  assert done.returncode == 1 and message in done.stderr


@pytest.mark.parametrize(
  ('expected', 'printed', 'same'),
  [
    ('loss 2.00', 'loss 2.03', True),
    ('loss 2.00', 'loss 2.05', False),
    ('loss -2.00', 'loss 2.00', False),
    ('0.01', '0.02', True),  # one unit of the last digit shown
    ('1,000.0 bytes', '1,010.0 bytes', True),
    ('1e-3', '1.01e-3', True),
    ('12 steps', '13 steps', False),
    ('a ... b 1.5', 'a x 9.9 y b 1.51', True),
    ('a ... b', 'a x c', False),
    ('version 0.10.2', 'version 0.10.2', True),
    ('| a   | 1.0 |', '| a | 1.0 |', True),
  ],
)
def test_lines_match_up_to_ellipses_and_two_percent(expected, printed, same):
  assert guide.matches(expected, printed) is same
