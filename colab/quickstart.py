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
# # Sparse language models in two CPU minutes
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/sparse-lm/sparse_lm/blob/main/colab/quickstart.ipynb)
#
# This notebook trains a small dense transformer and three sparse ones on the source code of Python's
# standard library. It compares them in a table and a figure, and then shows text, log and masks of one
# of them.

# %%
# Installs the missing packages. Packages that are already installed keep their versions.
import importlib.util

if importlib.util.find_spec('sparse_lm') is None:
  # !git clone -q https://github.com/sparse-lm/sparse_lm
  # %cd -q sparse_lm
  # !sh colab/install.sh
  pass

# %%
import tempfile

import numpy as np

import sparse_lm
from sparse_lm.report import plot, table
from sparse_lm.runs import configs, runtime
from sparse_lm.runs.loop import train

# %matplotlib inline
runtime.prepare()
results = tempfile.mkdtemp()

# %% [markdown]
# A config is a Python file. `configs.load` reads it and changes fields by name. Here every model trains
# for 100 steps.

# %%
METHODS = {
  'dense': {'weight.name': 'none'},
  'static': {'weight.name': 'static', 'weight.sparsity': 0.9},
  'RigL': {'weight.name': 'rigl', 'weight.sparsity': 0.9, 'weight.period': 10},
  # STE keeps the weights of largest magnitude in every step, while the other weights go on learning.
  'STE': {
    'weight.name': 'magnitude',
    'weight.apply': 'straight_through',
    'weight.schedule': 'at_once',
    'weight.start': 0.0,
    'weight.sparsity': 0.9,
  },
}
lines = []
for name, fields in METHODS.items():
  config = configs.load('configs/ablation.py', {'train.steps': 100, **fields})
  result = train(config, f'{results}/{name}', progress=False)
  labels = {'method': name, 'sparsity': config.weight.sparsity}
  lines.append({'run': name, 'labels': labels, 'seed': config.seed, **result})
  print(f'{name}: validation loss {result["metrics"]["val_loss"]:.3f} nats per byte')

# %% [markdown]
# The table shows validation loss, theoretical compute, stored bytes and measured time side by side.
# Training multiplies the weights by masks, so a sparse run is not faster than a dense one. Only packed
# models are compared by their speed. One seed and 100 steps prove nothing; `make ablation` trains for
# more steps and with several seeds.

# %%
columns = [
  table.column(metric)
  for metric in (
    'val_loss',
    'sparsity_prunable',
    'sparsity_total',
    'flops_forward_ratio',
    'flops_training_ratio',
    'stored_bytes',
    'train_step_ms',
  )
]
frame = table.summarise(lines, ['method', 'sparsity'], columns, {'method': 'dense'})
frame[['method', 'val_loss_mean', 'val_loss_delta_mean', 'stored_bytes_mean', 'train_step_ms_mean']]

# %%
plot.curves(lines, 'stored_bytes', 'val_loss', 'method')

# %% [markdown]
# `sparse_lm.load` returns a run as one Python object, which gives logits, sampled text, masks, costs,
# the training log and more. The notebook `analyse_a_run` shows all of these.

# %%
run = sparse_lm.load(f'{results}/RigL')
text = 'def __init__(self'
likely = np.argsort(run.logits(text)[0, -1])[::-1][:5]
print(f'likeliest bytes after {text!r}:', [run.tokenizer.decode([token]) for token in likely])
print(run.generate(text, max_new_tokens=40, temperature=0.7))

# %%
run.plot()

# %% [markdown]
# This is the mask of the up-projection in the first layer. A black cell is a connection that exists
# after training with RigL.

# %%
from matplotlib.figure import Figure

mask = run.masks['block_0/mlp/up/kernel']
figure = Figure(figsize=(7, 2.2), layout='constrained')
axes = figure.add_subplot()
axes.imshow(mask, cmap='Greys', interpolation='nearest', aspect='auto')
axes.set(
  xlabel='hidden unit', ylabel='input', title=f'{mask.mean():.1%} of the connections are kept'
)
figure
