"""JSON files with a schema: values are read back, and every fault is a one-line error."""

import hashlib
import json
from typing import NotRequired, TypedDict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparse_lm.core import records
from sparse_lm.core.errors import UserError


class Form(TypedDict):
  name: str
  sizes: dict[str, int]
  scores: list[float | None]
  note: NotRequired[str]


GOOD = {'name': 'a', 'sizes': {'x': 3}, 'scores': [0.5, 2, None]}
JSON = st.recursive(
  st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
  lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
  max_leaves=10,
)


@given(st.dictionaries(st.text(), JSON).filter(lambda values: records.SEAL not in values))
def test_sealed_values_are_read_back(tmp_path_factory, values):
  file = tmp_path_factory.getbasetemp() / 'sealed.json'
  file.write_text(records.sealed(values))
  assert records.read(file, dict[str, object]) == values


def test_the_digest_is_that_of_canonical_json():
  canonical = b'{"a":[1,2.5],"b":null}'
  assert records.digest({'b': None, 'a': (1, 2.5)}) == hashlib.sha256(canonical).hexdigest()


def test_every_flipped_bit_is_noticed_or_changes_nothing(tmp_path):
  file = tmp_path / 'x.json'
  whole = records.sealed(GOOD).encode()
  kept = 0
  for place in range(8 * len(whole)):
    flipped = bytearray(whole)
    flipped[place // 8] ^= 1 << place % 8
    file.write_bytes(flipped)
    try:
      assert records.read(file, Form) == GOOD
      kept += 1  # white space of another kind
    except UserError as error:
      assert str(file) in str(error) and '\n' not in str(error)
  assert kept < 0.02 * 8 * len(whole)


def refusal(text, file, form=Form):
  file.write_bytes(text if isinstance(text, bytes) else text.encode())
  with pytest.raises(UserError) as refused:
    records.read(file, form)
  line = str(refused.value)
  assert line.startswith(f'{file} ') and '; valid: ' in line
  assert '\n' not in line and len(line) < 300 + len(str(file))
  return line


@pytest.mark.parametrize(
  ('text', 'said'),
  [
    ('', 'is damaged (Expecting value'),
    ('[1, 2]', 'it is a list and not an object'),
    ('"text"', "it is 'text' and not an object"),
    ('3', 'it is 3 and not an object'),
    ('null', 'it is None and not an object'),
    ('NaN', 'it is nan and not an object'),
    ('{"name": ', 'is damaged (Expecting value'),
    ('{}', 'has no content_sha256'),
    (b'{"\xff": 1}', 'byte 2 is not UTF-8'),
    ('[' * 100_000, 'nested too deeply'),
    ('{"a":' * 100_000, 'nested too deeply'),
    ('{"a": %s}' % ('1' * 5000), 'is damaged (Exceeds the limit'),
    (json.dumps(GOOD), 'has no content_sha256'),
    (records.sealed(GOOD).replace('3', '4', 1), 'changed since it was written'),
  ],
)
def test_a_file_that_is_not_sealed_json_gives_a_one_line_error(text, said, tmp_path):
  assert said in refusal(text, tmp_path / 'x.json')


@pytest.mark.parametrize(
  ('change', 'said'),
  [
    ({'name': 3}, 'name is 3 and not a string'),
    ({'sizes': [1, 2]}, 'sizes is a list and not an object'),
    ({'sizes': {'x': '3'}}, "sizes.x is '3' and not a whole number"),
    ({'sizes': {'x': True}}, 'sizes.x is True and not a whole number'),
    ({'sizes': {'x': 10**18, 'y': 10**400}}, 'sizes.y is 1000'),
    ({'sizes': {'x': 1.5}}, 'sizes.x is 1.5 and not a whole number'),
    ({'scores': [1, 'x']}, "scores[1] is 'x' and not a number"),
    ({'scores': [10**400]}, 'and not a number'),
    ({'scores': None}, 'scores is None and not a list'),
    ({'note': None}, 'note is None and not a string'),
  ],
)
def test_a_value_that_does_not_match_the_schema_is_named(change, said, tmp_path):
  assert said in refusal(records.sealed(GOOD | change), tmp_path / 'x.json')


@pytest.mark.parametrize('name', ['name', 'sizes', 'scores'])
def test_a_missing_key_is_named(name, tmp_path):
  values = {key: value for key, value in GOOD.items() if key != name}
  assert f'it has no {name!r}' in refusal(records.sealed(values), tmp_path / 'x.json')


def test_other_keys_and_numbers_that_are_not_finite_are_kept(tmp_path):
  file = tmp_path / 'x.json'
  file.write_text(records.sealed(GOOD | {'scores': [float('inf')], 'other': [{}]}))
  assert records.read(file, Form)['scores'] == [float('inf')]


def test_a_missing_file_gives_a_one_line_error(tmp_path, monkeypatch):
  for path, said in ((tmp_path / 'none', 'No such file'), (tmp_path, 'it is not a file')):
    with pytest.raises(UserError, match=said):
      records.read(path, Form)
  monkeypatch.setattr(records, 'LARGEST', 10)
  (tmp_path / 'large').write_bytes(b' ' * 11)
  with pytest.raises(UserError, match=r'11 bytes, more than 10'):
    records.read(tmp_path / 'large', Form)


def test_damaged_lines_are_reported_with_their_reason(tmp_path):
  file = tmp_path / 'x.jsonl'
  file.write_bytes(b'{"a": 1}\n\n[1]\n{"a": "x"}\n\xff\xfe\n{"a": 2}\n{"a": ')
  found = list(records.read_lines(file, dict[str, int]))
  assert [(number, values) for number, _, values, fault in found if not fault] == [
    (1, {'a': 1}),
    (6, {'a': 2}),
  ]
  assert [number for number, _, values, fault in found if fault and values is None] == [3, 4, 5, 7]
