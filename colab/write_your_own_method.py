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
# A method is one file. In this notebook we write a learned gate that decides for each token whether the
# token skips the MLP of a layer. A gate has no exact gradient, so a *gradient estimator* trains it, and
# a *budget controller* keeps the FLOPs of the model at a target. We predict the cost of the method,
# check that it is causal, train it, and look at its decisions.

# %%
# Installs the missing packages. Packages that are already installed keep their versions.
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
from sparse_lm.report import plot, table
from sparse_lm.runs import configs, cost_report, runtime
from sparse_lm.runs.loop import train
from sparse_lm.runs.setup import setup

# %matplotlib inline
runtime.prepare()
folder = pathlib.Path(tempfile.mkdtemp())

# %% [markdown]
# ## The method
#
# The method is a Flax Linen module. Each of its fields with a default value becomes a config field
# (`estimator` and `open` come from `LearnedGate`). The model sets the fields without a default. For
# example, `inner` creates the MLP that the gate wraps. The FLOPs of matmuls inside
# `record.gated(self.path, self.traits.gating)` are counted times the fraction of tokens for which the
# gate is open.
#
# In a clone of the repository, the file is `sparse_lm/methods/mlp/skip.py`. To try a method without a
# clone, append a folder of your own to the search path of the package, as the last line of the cell
# does.

# %%
source = '''
"""A gate that lets tokens skip the MLP."""

from collections.abc import Callable
from typing import ClassVar

from flax import linen as nn

from sparse_lm.layers.gate import LearnedGate
from sparse_lm.layers.router import Router
from sparse_lm.plan import record


class SkipMLP(LearnedGate, kw_only=True):
  """A gate around the MLP `config.mlp.inner` that decides for each token."""

  inner: Callable[[], nn.Module]
  slot: ClassVar[str] = 'mlp'

  @property
  def traits(self):
    return self.gate_traits(
      paper='none',
      saves='the MLP of tokens that skip it',
      twin='dense',
      skips=False,  # decoding runs the MLP for every token
    )

  @nn.compact
  def __call__(self, x_BxLxD, mode):
    router = Router(self.spec, 1, bias=self.first_logit, name='router')
    decision = self.decide(router(x_BxLxD), mode)
    with record.gated(self.path, self.traits.gating):
      y_BxLxD = self.inner()(x_BxLxD, mode)
    return y_BxLxD * decision.factor.astype(y_BxLxD.dtype)
'''
(folder / 'skip.py').write_text(source)
sparse_lm.methods.mlp.__path__.append(str(folder))

# %% [markdown]
# ## Predict its cost
#
# The cost can be computed before training. The project knows which matmuls the gate can skip, so it
# refuses a budget below the cost of all other matmuls.

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
# ## Check that it is causal
#
# A method is causal if a change of later tokens does not change earlier logits. A test checks this for
# every method in the package. Here we check it ourselves.

# %%
model, tokens = run.program.model, np.arange(64, dtype=np.int32)[None] % 256
variables = model.init(jax.random.key(0), tokens)
variables['params']['embed']['head']['kernel'] = jax.random.normal(jax.random.key(1), (64, 256))
apply = jax.jit(lambda tokens: model.apply({'params': variables['params']}, tokens))
changed = tokens.copy()
changed[:, 32:] += 1
difference = np.abs(apply(changed) - apply(tokens)).max(axis=(0, 2))
print('largest change of earlier logits:', difference[:32].max())
print('smallest change of later logits:', difference[32:].min())
assert difference[:32].max() < 1e-5 < difference[32:].min()

# %% [markdown]
# ## Train it
#
# We compare gates trained by two estimators, straight-through and REINFORCE, with random gates that are
# open equally often, and with the dense model.

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
# One seed and 100 steps prove nothing. `python -m experiments.run dynamic_compute` compares learned
# gates with dense models of equal FLOPs, over several seeds.
#
# ## Look at its decisions
#
# Each row is a layer, and each column is a byte of the text. A dark cell means that the byte enters the
# MLP of the layer. The gate is open where the output of its router is positive.

# %%
run = sparse_lm.load(folder / 'straight_through')
text = 'def __init__(self, name, value=None):\n    self.name = name\n    return'[:64]
outputs = run.activations(text, sites='block_*/mlp/router/output')
opened = np.stack([output[0, :, 0] > 0 for output in outputs.values()])

figure = Figure(figsize=(9, 1.6), layout='constrained')
axes = figure.add_subplot()
axes.imshow(opened, cmap='Greys', interpolation='nearest', aspect='auto', vmin=-0.3, vmax=1.3)
axes.set_xticks(range(len(text)), [c if c.strip() else '·' for c in text], fontsize=7)
axes.set_yticks(range(len(opened)), [f'layer {layer}' for layer in range(len(opened))])
figure
