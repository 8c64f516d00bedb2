"""The PyTorch twin is the model, the loss and the optimizer that it stands beside."""

import numpy as np
import pytest

from sparse_lm.core import tree
from sparse_lm.runs import configs
from sparse_lm.runs.build import build

torch = pytest.importorskip('torch', reason='PyTorch is no requirement: the twin is a yardstick')

from experiments.torch_twin import Sizes, Trainer  # noqa: E402

SIZES = Sizes(layers=2, width=16, hidden=24, heads=2, context=12, batch=3, vocab=19)
SIZE = {
  'data.context': 12,
  'data.batch': 3,
  'model.layers': 2,
  'model.width': 16,
  'model.hidden': 24,
  'model.heads': 2,
  'model.kv_heads': 2,
  'model.norm': 'layernorm',
  'model.positions': 'learned',
  'optimizer.schedule': 'constant',
  'optimizer.warmup': 0.0,
}


def named_as_ours(model):
  """The twin's parameters by our paths, each with the slice of rows and whether it is transposed."""
  found = {
    'embed/tokens': (model.embed.weight, slice(None), False),
    'embed/positions': (model.position.weight, slice(None), False),
    'embed/head/kernel': (model.head.weight, slice(None), True),
    'norm/scale': (model.norm.weight, slice(None), False),
  }
  for number, block in enumerate(model.blocks):
    own = f'block_{number}'
    for place, name in enumerate(('query', 'key', 'value')):
      rows = slice(16 * place, 16 * (place + 1))
      found[f'{own}/attention/{name}/kernel'] = (block.qkv.weight, rows, True)
    found[f'{own}/attention/out/kernel'] = (block.out.weight, slice(None), True)
    found[f'{own}/mlp/up/kernel'] = (block.up.weight, slice(None), True)
    found[f'{own}/mlp/down/kernel'] = (block.down.weight, slice(None), True)
    for norm in ('norm_1', 'norm_2'):
      found[f'{own}/{norm}/scale'] = (getattr(block, norm).weight, slice(None), False)
  return found


def test_both_learn_the_same_from_the_same_weights():
  program, target = build(configs.load('configs/base.py', SIZE), SIZES.vocab)
  state = program.init(0, target)
  trainer = Trainer(SIZES)
  ours, theirs = tree.named(state.trainable['params']), named_as_ours(trainer.model)
  assert ours.keys() == theirs.keys()
  assert sum(w.size for w in ours.values()) == sum(p.numel() for p in trainer.model.parameters())
  with torch.no_grad():
    for path, (weight, rows, transposed) in theirs.items():
      value = np.asarray(ours[path])
      weight[rows] = torch.tensor(value.T.copy() if transposed else value)
  tokens = np.random.default_rng(0).integers(0, SIZES.vocab, (3, 13)).astype(np.int32)
  trainer.tokens = torch.tensor(tokens, dtype=torch.int64)
  for _ in range(5):
    state, metrics = program.train_step(state, tokens)
    assert float(metrics['loss']) == pytest.approx(float(trainer.step()), abs=2e-5)
  for path, value in tree.named(state.trainable['params']).items():
    weight, rows, transposed = theirs[path]
    twin = weight.detach().numpy()[rows]
    np.testing.assert_allclose(np.asarray(value), twin.T if transposed else twin, atol=3e-4)
