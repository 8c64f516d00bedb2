# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Write your own sparse method
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/sparse-lm/sparse_lm/blob/main/colab/write_your_own_method.ipynb)
#
# A method is one file. Here: tokens that skip the MLP of a layer, by a gate that any estimator can
# train and the budget controller can hold. Then it is checked, trained and looked at.

# %%
# Installs what is missing; every package that is already here stays as it is.
import importlib.util

if importlib.util.find_spec('sparse_lm') is None:
  # !git clone -q https://github.com/sparse-lm/sparse_lm
  # %cd -q sparse_lm
  # !sh colab/install.sh
  pass

# %%
import pathlib
import tempfile

import jax
import numpy as np
from matplotlib.figure import Figure

import sparse_lm.methods.mlp
from sparse_lm.cost import summary
from sparse_lm.runs import configs, runtime
from sparse_lm.runs.trained import load
from sparse_lm.report import plot, table
from sparse_lm.runs import cost_report
from sparse_lm.runs.loop import train
from sparse_lm.runs.setup import setup

# %matplotlib inline
runtime.prepare()
folder = pathlib.Path(tempfile.mkdtemp())

# %% [markdown]
# ## The method
#
# A layer method is a Linen module. Fields with a default are config keys (`estimator` and `open` come
# with `LearnedGate`); fields without one are supplied. `inner` makes the MLP that runs inside. What
# runs inside `record.gated(self.path, self.traits.gating)` costs as much as the gate is open.
#
# In a clone of the repository the file's place is `sparse_lm/methods/mlp/skip.py`; while you try it
# out, a folder of your own will do.

# %%
source = '''
"""Tokens that skip the MLP."""

from collections.abc import Callable
from typing import ClassVar

from flax import linen as nn

from sparse_lm.layers.gate import LearnedGate
from sparse_lm.layers.router import Router
from sparse_lm.plan import record


class SkipMLP(LearnedGate, kw_only=True):
  """A gate for every token around any MLP, `config.mlp.inner`."""

  inner: Callable[[], nn.Module]
  slot: ClassVar[str] = 'mlp'

  @property
  def traits(self):
    return self.gate_traits(
      paper='none',
      saves='the MLP of tokens that skip it',
      twin='dense',
      skips=False,  # decoding computes closed MLPs too
    )

  @nn.compact
  def __call__(self, x_BxLxD, mode):
    router = Router(self.spec, 1, bias=self.first_logit, name='router')
    decision = self.decide(router(x_BxLxD), mode)
    with record.gated(self.path, self.traits.gating):
      y_BxLxD = self.inner()(x_BxLxD, mode)
    return y_BxLxD * decision.weight.astype(y_BxLxD.dtype)
'''
(folder / 'skip.py').write_text(source)
sparse_lm.methods.mlp.__path__.append(str(folder))

# %% [markdown]
# ## Its cost, before any training
#
# The ledger knows what the gate can skip, so a target below what it cannot is refused at once.

# %%
STEPS = 100
gated = configs.load(
  'configs/ablation.py', {'mlp.name': 'skip', 'budget.target': 0.75, 'train.steps': STEPS}
)
run = setup(gated)
print(summary(cost_report.report(run.program, run.target)))

# %%
from sparse_lm.core.errors import UserError

try:
  setup(configs.load('configs/ablation.py', {'mlp.name': 'skip', 'budget.target': 0.3}))
except UserError as error:
  print(error)

# %% [markdown]
# ## Does it keep to the past?
#
# Substituting later tokens must change no earlier logit. The contract test does this for every method
# that it finds in the folders; here it is by hand.

# %%
model, tokens = run.program.model, np.arange(64, dtype=np.int32)[None] % 256
variables = model.init(jax.random.key(0), tokens)
variables['params']['embed']['head']['kernel'] = jax.random.normal(jax.random.key(1), (64, 256))
apply = jax.jit(lambda tokens: model.apply({'params': variables['params']}, tokens))
changed = tokens.copy()
changed[:, 32:] += 1
difference = np.abs(apply(changed) - apply(tokens)).max(axis=(0, 2))
print('earlier logits moved by', difference[:32].max(), 'and later ones by', difference[32:].max())
assert difference[:32].max() < 1e-5 < difference[32:].min()

# %% [markdown]
# ## Train it, beside random gates at equal rate and the dense model

# %%
ROWS = {
  'dense': {},
  'straight_through': {'mlp.name': 'skip', 'budget.target': 0.75},
  'reinforce': {'mlp.name': 'skip', 'budget.target': 0.75, 'mlp.estimator': 'reinforce'},
  'random': {'mlp.name': 'skip', 'mlp.estimator': 'random', 'mlp.open': 0.5},
}
lines = []
for name, fields in ROWS.items():
  chosen = configs.load('configs/ablation.py', {'train.steps': STEPS, **fields})
  result = train(chosen, str(folder / name), progress=False)
  lines.append({'run': name, 'labels': {'gates': name}, 'seed': chosen.seed, **result})
columns = [table.column(name) for name in ('val_loss', 'flops_forward_ratio', 'active_params')]
frame = table.summarise(lines, ['gates'], columns, {'gates': 'dense'})
frame[['gates', 'val_loss_mean', 'val_loss_delta_mean', 'flops_forward_ratio_mean']]

# %%
plot.curves(lines, 'flops_forward_ratio', 'val_loss', 'gates')

# %% [markdown]
# One seed and 100 steps decide nothing. `python -m experiments.run dynamic_compute` compares gates of
# this kind over seeds, with dense models of equal FLOPs beside them.
#
# ## What did the gates let through?
#
# Each row is a layer, each column a byte of the text; dark where the byte entered the MLP.

# %%
trained = load(str(folder / 'straight_through'))
text = 'def __init__(self, name, value=None):\n    self.name = name\n    return'[:64]
tokens = trained.tokenizer.encode(text.encode())[None].astype(np.int32)
_, seen = trained.program.model.apply(
  {'params': trained.params}, tokens, mutable=['intermediates'], capture_intermediates=True
)
layers = [seen['intermediates'][f'block_{layer}']['mlp']['router'] for layer in range(2)]
opened = np.stack([np.asarray(layer['__call__'][0])[0, :, 0] > 0 for layer in layers])

figure = Figure(figsize=(9, 1.6), layout='constrained')
axes = figure.add_subplot()
axes.imshow(opened, cmap='Greys', interpolation='nearest', aspect='auto', vmin=-0.3, vmax=1.3)
axes.set_xticks(range(len(text)), [c if c.strip() else '·' for c in text], fontsize=7)
axes.set_yticks(range(2), ['layer 0', 'layer 1'])
figure
