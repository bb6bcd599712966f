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
# # 6. Your own kind, grain, strategy and task
#
# What a search puts together can all be yours: a module, the way its coordinates are grouped, the
# way they are chosen, the data. Each is about ten lines, registered with `catalog.add`; nothing of
# the package is edited. In a file of its own, say `mine.py`, the same lines work on the command
# line: `searchpet search --plugin mine --strategy missed ...`.

# %%
# %matplotlib inline
# %config InlineBackend.figure_formats = ["retina"]
import random
import warnings
from pathlib import Path

warnings.filterwarnings("ignore", "IProgress")  # of progress bars, which none here shows

import pandas as pd
import torch

import searchpet
from searchpet import catalog, plot

# %% [markdown]
# ## A kind
#
# A delta is what a module adds to the output y of its site. It has coordinates, each with a gate
# z, says where it fits and what a coordinate costs, and can be made thinner. This one is a learned
# skip around a square layer, y + z s x; an example, from no paper.

# %%
from searchpet.deltas import Channels, Delta, each


class Skip(Delta):
    """Skip: y + z * s * x around a square layer."""

    @classmethod
    def fits(cls, site): return site.form == "linear" and site.d_in == site.d_out

    def __init__(self, site, *, channels=None):
        super().__init__(width=len(channels.value) if channels else site.d_out)
        self.site, self.skip = site, channels or Channels(site.d_out)

    def cost(self): return each(self.width, 1)
    def forward(self, x, y, z): return self.skip(z) * x
    def thin(self, keep): return Skip(self.site, channels=self.skip.thin(keep))


catalog.add("deltas", "skip", Skip)

# %% [markdown]
# What every kind must obey, tried on this one: it adds nothing before it has learned, and a
# thinner delta is the same function as gates that are 0 or 1. (`tests/laws/` has all of them.)

# %%
site = searchpet.Site("query", "attention.query", 0, "linear", "encoder", d_in=8, d_out=8, heads=2)
skip, x, keep = Skip(site), torch.randn(2, 8), torch.arange(8) < 3
assert not skip(x, x, torch.ones(8)).any()
torch.nn.init.normal_(skip.skip.value)
assert torch.equal(skip(x, x, keep.float()), skip.thin(keep)(x, x, torch.ones(3)))
assert int(skip.cost().sum()) == sum(p.numel() for p in skip.parameters())

# %% [markdown]
# ## A grain
#
# Coordinates of the same name live or die together. Here eight neighbouring channels are a unit,
# and a unit of a skip and of a bias at the same place are one.

# %%
def octet(site, kind, width):
    """Eight neighbouring channels of all kinds at a site."""
    return [(site.path, channel // 8) for channel in range(width)]


catalog.add("grains", "octet", octet)

# %% [markdown]
# ## A strategy
#
# It sees the loss, the units with their prices, and the limits; it returns a score for every unit
# and which are kept. This one trains everything for some steps, then asks what the loss would
# miss most for each parameter spent. Keyword arguments are its hyperparameters
# (`--set missed.warmup=20`).

# %%
from searchpet.strategies import Ranking, descend


def missed(problem, *, warmup: int = 10):
    """Units by |dL/dz| per parameter after a short training of all."""
    net, price = problem.net, problem.space.cost
    net.z = torch.ones(len(problem.space))
    learn = torch.optim.AdamW(net.groups(problem.rates))
    for step in range(warmup):
        descend(problem, problem.train[step], learn)
    net.z = torch.ones(len(problem.space), requires_grad=True)
    slope, = torch.autograd.grad(problem.spread(problem.valid[warmup]), net.z)
    score = slope.abs().cpu() / price
    return Ranking(score, problem.limits.fill(score))


catalog.add("strategies", "missed", missed)

# %% [markdown]
# ## A task
#
# A function of a seed that returns rows. A folder of CSV or JSON Lines needs no code at all.

# %%
NUMBERS = "one two three four five six seven eight nine ten eleven twelve twenty fifty".split()


def larger(seed=0):
    """Is the first number larger than the second?"""
    pairs = [(a, b) for a in range(14) for b in range(14) if a != b]
    random.Random(seed).shuffle(pairs)
    rows = [{"text": f"{NUMBERS[a]} is more than {NUMBERS[b]}", "label": int(a > b)}
            for a, b in pairs]
    meta = {"name": "larger", "version": "1", "type": "classification", "fields": ["text"],
            "label": "label", "labels": ["no", "yes"], "metrics": ["accuracy"]}
    return {"train": rows[:110], "validation": rows[110:146], "test": rows[146:], "meta": meta}


catalog.add("tasks", "larger", larger)

# %% [markdown]
# ## A space, and a search with all of them
#
# What to choose from is a TOML file: the new kind and biases, both by octets, on every square
# linear.

# %%
Path("runs").mkdir(exist_ok=True)
Path("runs/octets.toml").write_text("""
description = "skips and biases, eight channels of a place at a time"

[[rule]]
kind = "skip"
grain = "octet"

[[rule]]
kind = "bias"
grain = "octet"
select = { role = ["attention.query", "attention.key", "attention.value", "attention.output"] }
""")

found = searchpet.search(task="larger", strategy="missed", space="runs/octets.toml", budget="1KB",
                         steps=40, batch_size=16, max_length=16, controls=0, out="runs/own",
                         resume=True)
spec = found.spec
pd.DataFrame([(e.role, e.layer, e.kind, list(e.kept)[:8], len(e.kept)) for e in spec.entries],
             columns=["role", "layer", "kind", "first channels kept", "channels"]).head(8)

# %%
print(f"{spec.budget.text} = {spec.budget.limit} parameters, {spec.budget.used} used;",
      f"accuracy {found.score:.3f} on {found.values['task']}")
plot.structure(spec)

# %% [markdown]
# The run is like any other: it loads, trains again, transfers. A process that has not registered
# the kind says so instead of guessing; a spec never causes an import.

# %%
model = searchpet.load("runs/own")
type(model).__name__, sum(p.numel() for p in model.searchpet.parameters())

# %% [markdown]
# The tests of `tests/laws/` run over every member of the package. Put your file there
# (`searchpet/deltas/skip.py`, ending with `KIND = Skip`), and it is listed, documented and tested
# by existing: see `CONTRIBUTING.md`.
