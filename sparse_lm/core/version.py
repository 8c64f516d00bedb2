"""The version of this package, and the message about a file that another version wrote."""

VERSION = '0.2.0.dev0'
WRITTEN_BY = 'written_by'  # the key in files for the version that wrote them
UNMARKED_VERSION = '0.1'  # the version that wrote files without this key


def format_mismatch(what: str, found: object, reads: int, written_by: object = None) -> str:
  """Returns the message that another version wrote `what`, in format `found` instead of `reads`."""
  older = isinstance(found, int) and found < reads
  writer = (
    f'sparse_lm {written_by or UNMARKED_VERSION}' if written_by or older else 'a later version'
  )
  return (
    f'{what} was written by {writer} (format {found}); this is sparse_lm {VERSION}, which reads format '
    f'{reads}'
  )
