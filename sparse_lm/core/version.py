"""The version of this package, and what is said of a file that another version wrote."""

VERSION = '0.2.0.dev0'
WRITTEN_BY = 'written_by'  # the key under which files say which version wrote them
BEFORE = '0.1'  # what wrote the files that do not say so


def other_format(what: str, found: object, reads: int, written_by: object = None) -> str:
  """Says that `what` has the format `found`, which version wrote it, and what this version reads."""
  older = isinstance(found, int) and found < reads
  writer = f'sparse_lm {written_by or BEFORE}' if written_by or older else 'a later version'
  return (
    f'{what} was written by {writer} (format {found}); this is sparse_lm {VERSION}, which reads format '
    f'{reads}'
  )
