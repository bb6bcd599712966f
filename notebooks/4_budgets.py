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
# # 4. Budgets and Pareto
#
# How much does a task need? A budget is a share of the backbone (`0.01%`), a count (`2271`) or
# stored bytes (`9KB`). This notebook looks at what budgets buy, searches once for several of them,
# and lets the outer loop look for what is best for its size.

# %%
# %matplotlib inline
# %config InlineBackend.figure_formats = ["retina"]
import warnings
from itertools import pairwise
from pathlib import Path

warnings.filterwarnings("ignore", "IProgress")  # of progress bars, which none here shows

import pandas as pd

import searchpet
from searchpet import plot

SMALL = {"task": "negation", "steps": 30, "batch_size": 16, "max_length": 16, "resume": True}
MODEL = "sentence-transformers/all-MiniLM-L6-v2"

# %% [markdown]
# ## What a budget buys
#
# The default space, `nano`, has a unit for every rank-1 LoRA atom and for every single channel of
# a bias or a scale. On the command line: `searchpet space nano --budget 0.01%`.

# %%
from searchpet.survey import survey

bought = survey("nano", MODEL, "0.01%")
print(f"{bought['units']:,} units of {bought['parameters']:,} parameters;",
      f"{bought['budget']} is {bought['limit']:,} parameters")
pd.DataFrame(bought["kinds"])

# %% [markdown]
# ## One search, several budgets
#
# The search runs at the geometric middle of the budgets, and its scores choose a structure for
# each, every one a part of the next. All are trained. On the command line it is
# `searchpet search --budget 0.001%,0.01%,0.1%`.

# %%
found = searchpet.search(budget="0.001%,0.01%,0.1%", controls=0, out="runs/budgets", **SMALL)
rows = pd.DataFrame(found.values["budgets"])
rows

# %% [markdown]
# The curve over budgets; where more buys little, it marks the knee. More is not better by itself
# in so few steps: with 80 of them, a structure of the largest size reaches 0.95 in
# [prune and tune](5_prune_and_tune.ipynb), on a smaller model even. One seed and 120 rows,
# so only large steps mean something.

# %%
plot.draw(["runs/budgets"], "budget")

# %% [markdown]
# Every structure is a run of its own in the folder. A smaller one is part of the next, so what was
# found once can be cut down later:

# %%
def coordinates(run):
    """What a run's spec keeps, one by one."""
    spec = searchpet.Spec.load(Path("runs/budgets") / run)
    return {(e.path, e.kind, i) for e in spec.entries for i in e.kept}


kept = [coordinates(run) for run in rows["run"]]
assert all(small < large for small, large in pairwise(kept))
[len(one) for one in kept]

# %% [markdown]
# ## The outer loop: a Pareto front
#
# A search takes its settings as given: which kinds, which layers, how large a share of the budget.
# `searchpet tune` turns them as knobs. Here it looks for structures that score well and for such
# that are small, at once. Four short trials show how it goes; a real study has fifty and more.
#
#     searchpet tune --knobs runs/knobs.toml --metric score,trainable --trials 4

# %%
from searchpet.tune import tune

Path("runs").mkdir(exist_ok=True)
Path("runs/knobs.toml").write_text("""
description = "how much of the budget is spent, and how deep"

[[knob]]
name = "spend"
low = 0.05
high = 1.0
log = true
default = 1.0

[[knob]]
name = "layers"
choices = ["all", "last 50%"]
""")
best = tune(knobs="runs/knobs.toml", metric="score,trainable", trials=4, budget="0.01%",
            out="runs/tuned", say=lambda line: None, **{**SMALL, "steps": 20})
print("of the front, the best score:", best.values["study"]["params"], f"{best.score:.3f}")

# %% [markdown]
# Every point is a trial; those on the line are not beaten in both by any other.

# %%
plot.draw(["runs/tuned"], "front")
