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
# stored bytes (`9KB`). This notebook looks at what budgets buy, searches under several, and lets
# the outer loop look for what is best for its size.

# %%
# %matplotlib inline
# %config InlineBackend.figure_formats = ["retina"]
import warnings
from itertools import pairwise

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
# ## Several budgets
#
# The same search under three budgets, and what was trained for each:

# %%
budgets = ["0.001%", "0.01%", "0.1%"]
found = [searchpet.search(budget=text, controls=0, out=f"runs/budget-{text}", **SMALL)
         for text in budgets]
pd.DataFrame([(run.spec.budget.text, run.spec.budget.limit, run.spec.budget.used,
               len(run.spec.entries), run.score) for run in found],
             columns=["budget", "limit", "used", "places", "accuracy"]).round(3)

# %% [markdown]
# The curve over budgets, with its knee where one shows: more than that buys little. One seed and
# 120 rows, so only large steps mean something.

# %%
plot.draw([run.path for run in found], "budget")

# %% [markdown]
# How much of the smaller structure is in the larger one? Searches are noisy: they agree on more
# than chance and on less than all.

# %%
def coordinates(spec):
    """What a spec keeps, one by one."""
    return {(e.path, e.kind, i) for e in spec.entries for i in e.kept}


sets = [coordinates(run.spec) for run in found]
pd.DataFrame([(a.spec.budget.text, b.spec.budget.text, len(one & two), len(one))
              for (a, one), (b, two) in pairwise(zip(found, sets, strict=True))],
             columns=["smaller", "larger", "kept in both", "kept in the smaller"])

# %% [markdown]
# ## The outer loop: a Pareto front
#
# A search takes its settings as given: which kinds, which layers, how large a share of the budget.
# `searchpet tune` turns them as knobs. Here it looks for structures that score well and for such
# that are small, at once. Four short trials show how it goes; a real study has fifty and more.
#
#     searchpet tune --knobs runs/knobs.toml --metric score,trainable --trials 4

# %%
from pathlib import Path

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
