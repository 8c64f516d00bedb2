"""Square tiles of weights."""

import dataclasses
import re
from typing import ClassVar

from sparse_lm.core.groups import Group
from sparse_lm.core.tiles import Tiles

DISPLAY_NAME = 'blocks of {}'


@dataclasses.dataclass(frozen=True)
class Block(Tiles):
  """Tiles of B x B weights are kept or dropped together, written 'block:B'."""

  spelling: ClassVar[str] = 'block:16'

  @classmethod
  def parse(cls, name: str, declared: tuple[Group, ...]) -> 'Block | None':
    """Recognises 'block:B' with B at least 1."""
    match = re.fullmatch(r'block:([1-9]\d{0,8})', name)
    return match and cls(int(match[1]), int(match[1]))
