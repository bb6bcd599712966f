# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 1. Quick start: search, look, use
#
# `searchpet` finds which places of a frozen transformer should get which parameter-efficient
# modules, under a budget that is never exceeded. This notebook searches a structure, looks at it
# and uses it. It runs offline: the `notebooks` extra brings a backbone of 22.7M parameters.
#
#     pip install -c constraints.txt -e '.[notebooks]'
#
# The task is small, so that a search takes seconds: is a statement praise or blame? `not`,
# `hardly` and `anything but` turn one into the other, so single words do not tell, and no
# adjective of the validation rows was ever trained on.

# %%
# %matplotlib inline
# %config InlineBackend.figure_formats = ["retina"]
import warnings
from pathlib import Path

warnings.filterwarnings("ignore", "IProgress")  # of progress bars, which none here shows

import pandas as pd

import searchpet
from searchpet import plot

SMALL = {"task": "negation", "steps": 40, "batch_size": 16, "max_length": 16, "resume": True}
pd.read_json("negation/train.jsonl", lines=True).head(6)

# %% [markdown]
# ## Search
#
# One call searches a structure of at most 0.01 % of the parameters, trains it further than the
# search has, and trains two random structures of the same budget beside it, from the start: one of
# whole modules, one of single channels. (`inherit=False` trains all three from the start.)
# With `resume=True` a second run of the cell finds what the first has left in `runs/quick`.

# %%
found = searchpet.search(budget="0.01%", out="runs/quick", **SMALL)

rows = [("found", found.score, found.values["trainable"])]
rows += [(c["name"], c["score"], c["trainable"]) for c in found.values["controls"]]
pd.DataFrame(rows, columns=["structure", "accuracy", "trained parameters"]).round(3)

# %% [markdown]
# One seed and 120 rows: a difference of a few points can be chance. What a claim takes is in
# `experiments/`: several seeds, swept learning rates, and the controls beside the result.
#
# ## Look
#
# The structure: layers from left to right, positions from top to bottom, a bar for each kind. Its
# height is how many channels the kind keeps there; on the right is what a position got in all.

# %%
plot.structure(found.spec)

# %% [markdown]
# How the trainings went, step by step:

# %%
plot.draw(["runs/quick"], "learning")

# %% [markdown]
# The budget is a contract: a count, never exceeded, counted again when the file is loaded.

# %%
found.spec.budget.model_dump()

# %% [markdown]
# The run folder has a page about the run, `report.html`, and everything that it takes to use it.

# %%
files = sorted(f for f in Path("runs/quick").iterdir() if f.is_file())
pd.DataFrame([(f.name, f.stat().st_size) for f in files], columns=["file", "bytes"])

# %% [markdown]
# ## Use
#
# On new texts, in a CSV file with the task's columns; on the command line it is
# `searchpet predict runs/quick new.csv`.

# %%
from searchpet.engine import predict

texts = ["the soup was hardly terrible", "this idea is anything but clever", "her garden is a joy",
         "the weather was not too bad"]
pd.DataFrame({"text": texts}).to_csv("runs/new.csv", index=False)
pd.DataFrame(predict("runs/quick", "runs/new.csv"))

# %% [markdown]
# In Python it is the transformers class that you know, with the structure grafted onto it.
# `merge` folds the structure into the weights: the same logits, no cost at inference.

# %%
import torch

torch.manual_seed(0)
model = searchpet.load("runs/quick")
words = {"input_ids": torch.randint(1000, 2000, (2, 8)), "attention_mask": torch.ones(2, 8)}
with torch.no_grad():
    before = model(**words).logits
    merged = searchpet.merge(model)
    after = merged(**words).logits
print(type(merged).__name__, "largest difference:", f"{(after - before).abs().max():.0e}")

# %% [markdown]
# ## The same at full size
#
# `searchpet search --budget 0.01%` does it with 300 steps on the task `agreement`, which takes
# minutes. What it found comes with the package:

# %%
spec = searchpet.Spec.load("searchpet:minilm-agreement-0.01")
plot.structure(spec)

# %% [markdown]
# Next: [reading a structure](2_reading_a_structure.ipynb), [transfer](3_transfer.ipynb),
# [budgets](4_budgets.ipynb), [prune and tune](5_prune_and_tune.ipynb), and
# [your own kinds, grains, strategies and tasks](6_your_own.ipynb).
