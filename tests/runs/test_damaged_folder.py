"""A folder of checkpoints that storage cannot open is refused in one line."""

import orbax.checkpoint as ocp
import pytest

from sparse_lm.core.errors import UserError
from sparse_lm.runs.checkpoint import Checkpoints


@pytest.mark.parametrize('text', ['0.5', '[1]'])
def test_metadata_that_is_no_object(text, tmp_path):
  folder = tmp_path / 'checkpoints'
  options = ocp.CheckpointManagerOptions(create=True, enable_async_checkpointing=False)
  with ocp.CheckpointManager(folder, options=options) as manager:
    manager.save(1, args=ocp.args.Composite(meta=ocp.args.JsonSave({'a': 1})))
  (folder / '1' / '_CHECKPOINT_METADATA').write_text(text)
  with pytest.raises(UserError, match='cannot be opened'):
    Checkpoints(tmp_path)
