"""Which parameters modules take packed, noted while they are traced."""

import contextlib
import contextvars
import dataclasses
from collections.abc import Iterable, Iterator


@dataclasses.dataclass
class Packable:
  """What modules take packed.

  Attributes:
    paths: of parameters.
    fused: by the path of a linear layer, the layers that it can replace, in the order of their outputs.
  """

  paths: list[str] = dataclasses.field(default_factory=list)
  fused: dict[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)


_open: contextvars.ContextVar[Packable | None] = contextvars.ContextVar('packable', default=None)


def note(path: tuple[str, ...], *names: str) -> None:
  """Says that the module at `path` takes these parameters packed, if it has them; see `recording`."""
  found = _open.get()
  if found is not None:
    found.paths.extend('/'.join((*path, name)) for name in names)


def note_fused(path: tuple[str, ...], name: str, parts: Iterable[str]) -> None:
  """Says that the module at `path` takes one linear layer in place of several of the same inputs."""
  found = _open.get()
  if found is not None:
    found.fused['/'.join((*path, name))] = tuple('/'.join((*path, part)) for part in parts)


@contextlib.contextmanager
def recording() -> Iterator[Packable]:
  """Collects what may be packed in the traces inside."""
  token = _open.set(Packable())
  try:
    yield _open.get()
  finally:
    _open.reset(token)
