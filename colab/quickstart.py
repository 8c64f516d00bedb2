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
# Trains a small dense transformer on the source text of Python's standard library, and sparse ones
# beside it, then prints a table and draws the connections that one of them kept.

# %%
# Installs what is missing; every package that is already here stays as it is.
import importlib.util

if importlib.util.find_spec('sparse_lm') is None:
  # !git clone -q https://github.com/sparse-lm/sparse_lm
  # %cd -q sparse_lm
  # !sh colab/install.sh
  pass

# %%
import tempfile

import numpy as np

from sparse_lm.runs import configs, runtime
from sparse_lm.runs.trained import load
from sparse_lm.report import plot, table
from sparse_lm.runs.loop import train

# %matplotlib inline
runtime.prepare()
results = tempfile.mkdtemp()

# %% [markdown]
# A config is a file; overrides name its fields. Here every model trains for 100 steps.

# %%
METHODS = {
  'none': {'weight.name': 'none'},
  'static': {'weight.name': 'static', 'weight.sparsity': 0.9},
  'rigl': {'weight.name': 'rigl', 'weight.sparsity': 0.9, 'weight.period': 10},
  # The largest magnitudes in every step, while dropped weights go on learning.
  'ste': {
    'weight.name': 'magnitude',
    'weight.apply': 'straight_through',
    'weight.schedule': 'at_once',
    'weight.start': 0.0,
    'weight.sparsity': 0.9,
  },
}
lines = []
for name, fields in METHODS.items():
  model = configs.load('configs/ablation.py', {'train.steps': 100, **fields})
  result = train(model, f'{results}/{name}', progress=False)
  labels = {'method': name, 'sparsity': model.weight.sparsity}
  lines.append({'run': name, 'labels': labels, 'seed': model.seed, **result})
  print(f'{name}: {result["metrics"]["val_loss"]:.3f} nats per byte')

# %% [markdown]
# Accuracy, theoretical compute, stored bytes and measured time, side by side. These runs multiply by
# masks: their time is shown as measured and is no claim of speed. One seed and 100 steps decide
# nothing; `make ablation` trains the same models for longer, over seeds.

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
frame = table.summarise(lines, ['method', 'sparsity'], columns, {'method': 'none'})
frame[['method', 'val_loss_mean', 'val_loss_delta_mean', 'stored_bytes_mean', 'train_step_ms_mean']]

# %%
plot.curves(lines, 'stored_bytes', 'val_loss', 'method')

# %% [markdown]
# A trained run is a plain Python object: parameters with exact zeros, masks, logits, costs.

# %%
trained = load(f'{results}/rigl')
mask = np.asarray(trained.masks['block_0']['mlp']['up']['kernel'])
print(f'{mask.mean():.1%} of the connections are left')
text = 'def __init__(self'
tokens = trained.tokenizer.encode(text.encode())[None].astype(np.int32)
likely = np.argsort(np.asarray(trained.logits(tokens))[0, -1])[::-1][:5]
print(f'after {text!r}:', [trained.tokenizer.decode([token]) for token in likely])

# %%
from matplotlib.figure import Figure

figure = Figure(figsize=(7, 2.2), layout='constrained')
axes = figure.add_subplot()
axes.imshow(mask, cmap='Greys', interpolation='nearest', aspect='auto')
axes.set(
  xlabel='hidden unit', ylabel='input', title="Connections of the first layer's up-projection"
)
figure
