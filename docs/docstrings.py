"""Turns the layout of this project's docstrings into reStructuredText.

Docstrings are read in an editor first. They align terms with their explanations in two columns, and
write options of a field as a list of quoted values. reStructuredText wants lists for both.
"""

import re

# A term, two spaces or more, and its explanation.
ENTRY = re.compile(r'^(\s*)(\S(?:.{0,38}\S)?)\s{2,}(?=\S)')
# A value of a field, in quotes, in the section of the attributes.
OPTION = re.compile(r"^(\s+)('[\w:]+'(?:, '[\w:]+')*: .*)$")
# Code that a letter follows, as in `None`s: reStructuredText needs an escaped space between the two.
CODE = re.compile(r'(?<!`)(`[^`]+`)(?=\w)')
# The first line of the part of a config's docstring that says how to run it.
COMMAND = re.compile(r'^Command:  ')


def converted(lines: list[str]) -> list[str]:
  """The lines of a docstring as reStructuredText."""
  return [CODE.sub(r'\1\\ ', line) for line in _options(_aligned(lines))]


def literal_from_command(lines: list[str]) -> list[str]:
  """The lines of a config's docstring, from 'Command:' on as they are."""
  first = next((i for i, line in enumerate(lines) if COMMAND.match(line)), len(lines))
  if first == len(lines):
    return lines
  return [*lines[:first], '::', '', *(f'  {line}' for line in lines[first:])]


def _column(line: str) -> int:
  """The column at which the explanation of an entry starts, or -1."""
  found = ENTRY.match(line)
  return found.end() if found else -1


def _indent(line: str) -> int:
  return len(line) - len(line.lstrip())


def _aligned(lines: list[str]) -> list[str]:
  """Two columns become a definition list, if they have two entries or more."""
  done: list[str] = []
  start = 0
  while start < len(lines):
    column, end = _column(lines[start]), start + 1
    if column < 0:
      done.append(lines[start])
      start = end
      continue
    while end < len(lines) and lines[end].strip():
      if _column(lines[end]) != column and _indent(lines[end]) < column:
        break
      end += 1
    group = lines[start:end]
    entries = [line for line in group if _column(line) == column and _indent(line) < column]
    if len(entries) < 2:
      done.append(lines[start])
      start += 1
      continue
    done.append('')
    for line in group:
      if line in entries:
        indent, term = ENTRY.match(line).groups()
        done += [f'{indent}{term}', f'{indent}  {line[column:]}']
      else:
        done.append(f'{indent}  {line[column:]}')
    done.append('')
    start = end
  return done


def _options(lines: list[str]) -> list[str]:
  """Quoted values of a field become a bulleted list."""
  done: list[str] = []
  inside = -1
  for line in lines:
    if found := OPTION.match(line):
      if inside < 0:
        done.append('')
      inside = len(found[1])
      done.append(f'{found[1]}- {found[2]}')
    elif inside >= 0 and line.strip() and _indent(line) >= inside:
      done.append(f'{" " * inside}  {line.strip()}')
    else:
      if inside >= 0 and line.strip():
        done.append('')
      inside = -1
      done.append(line)
  return done
