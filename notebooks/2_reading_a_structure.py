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
# # 2. Reading a structure
#
# What did a search buy, is that more than chance, and what does the literature say about the same
# positions? The structure is one that comes with the package: 2,271 single channels, 0.01 % of
# MiniLM, found on `agreement` by `searchpet search --budget 0.01%`.

# %%
# %matplotlib inline
# %config InlineBackend.figure_formats = ["retina"]
import warnings

warnings.filterwarnings("ignore", "IProgress")  # of progress bars, which none here shows

import pandas as pd

import searchpet
from searchpet import plot

spec = searchpet.Spec.load("searchpet:minilm-agreement-0.01")
plot.structure(spec)

# %% [markdown]
# The same by layer and by role, in parameters:

# %%
plot.parameters(spec)

# %% [markdown]
# ## More than chance?
#
# A wide layer has more channels to buy. So beside what was bought stands what there was: of all
# bias and scale channels of the backbone, which share was kept at each role, over the share that
# was kept in all. 1 is chance.

# %%
from searchpet.survey import sites_of

there = pd.DataFrame([(s.role, kind, s.d_out) for s in sites_of(spec.backbone.name)
                      if s.form in ("linear", "norm") for kind in ("bias", "scale")],
                     columns=["role", "kind", "channels"]).groupby(["role", "kind"]).sum()
kept = pd.DataFrame([(e.role, e.kind, len(e.kept)) for e in spec.entries],
                    columns=["role", "kind", "kept"]).groupby(["role", "kind"]).sum()
both = there.join(kept).fillna(0).astype(int)
ratio = (both["kept"] / both["channels"]) / (both["kept"].sum() / both["channels"].sum())
both.assign(times_chance=ratio.round(2))["times_chance"].unstack().sort_values(
    "bias", ascending=False)

# %% [markdown]
# Two things stand out. Where 384 channels at each of six places could have been bought, **no bias
# of a key** was: it adds the same number to all scores of a query, and the softmax takes that away
# again, so it cannot help. The search was not told. And **scales of norms** were bought half as
# often again as chance. All else lies between 0.7 and 1.3 times chance,
# but for biases of the first norm, and those are few.

# %% [markdown]
# ## Two structures: `diff`
#
# A second search, a small one on another task, `negation`: is a statement praise or blame? (It is
# the one of the first notebook; if that has run, this cell finds it.) What do both keep?

# %%
SMALL = {"task": "negation", "steps": 40, "batch_size": 16, "max_length": 16, "resume": True}
found = searchpet.search(budget="0.01%", out="runs/quick", **SMALL).spec
plot.changes(spec, found)

# %% [markdown]
# `searchpet diff A B` counts it, beside what two draws of as many units would have in common.
# Jaccard's index is the share that both keep of all that either keeps:

# %%
compared = searchpet.diff(spec, found)
pd.DataFrame(compared.overlap).round(3)

# %% [markdown]
# They share no more single channels than two draws would: with one seed on each of two tasks, no
# channel as such shows to matter. By place they differ most here:

# %%
pd.DataFrame(compared.changes)[["role", "layer", "kind", "only_a", "both", "only_b"]].head(6)

# %% [markdown]
# ## Why this one: `explain`
#
# A search leaves the score of every unit, kept or not. So each kept unit has a margin: how far its
# worth lies above the best that was left out. `searchpet explain RUN` shows what was kept,

# %%
told = searchpet.explain(found)
columns = ["role", "layer", "kind", "coordinate", "cost", "rank", "worth", "margin"]
print(f"chosen by {told.by}: {len(told.kept):,} units kept")
pd.DataFrame(told.kept)[columns].head(5)

# %% [markdown]
# what a tenth more of the budget would buy next,

# %%
pd.DataFrame(told.enters)[columns].head(5)

# %% [markdown]
# and what would go first with a tenth less:

# %%
pd.DataFrame(told.leaves)[columns].tail(5)

# %% [markdown]
# ## What the literature says about the same positions
#
# - **Biases of the query and of the feed-forward's input.** BitFit: of all biases of BERT these
#   change most, and tuning them alone costs little (Ben Zaken et al. 2022,
#   [arXiv:2106.10199](https://arxiv.org/abs/2106.10199)).
# - **Scales of key, value and the feed-forward's hidden layer.** IA3 puts its vectors there and
#   nowhere else (Liu et al. 2022, [arXiv:2205.05638](https://arxiv.org/abs/2205.05638)).
# - **LoRA on query and value**, the usual places (Hu et al. 2021,
#   [arXiv:2106.09685](https://arxiv.org/abs/2106.09685)). Nothing of it was bought here: an atom
#   costs 768 parameters on a square layer, a channel one.
# - **All kinds at once, chosen by a search.** S3PET: with 0.01 % of the parameters more than 99 %
#   of full fine-tuning, by its abstract (Hu et al. 2022,
#   [arXiv:2206.07382](https://arxiv.org/abs/2206.07382)). Its space is `s3pet_mix` here, its
#   search `--strategy s3pet`.

# %%
total = spec.budget.used
places = {
    "BitFit: biases of query, ffn.in":
        [("attention.query", "bias"), ("ffn.in", "bias")],
    "IA3: scales of key, value, ffn.in":
        [("attention.key", "scale"), ("attention.value", "scale"), ("ffn.in", "scale")],
    "norms, scale and bias": [(role, kind) for role, kind in both.index if "norm" in role],
}
rows = []
for name, rooms in places.items():
    bought, offered = both.loc[rooms, "kept"].sum(), both.loc[rooms, "channels"].sum()
    rows.append((name, f"{bought / total:.0%}", f"{offered / both['channels'].sum():.0%}"))
pd.DataFrame(rows, columns=["places", "share of what was bought", "share of what there was"])

# %% [markdown]
# Each recipe's places were bought about as often as there are such places: this structure follows
# none of them, it spreads over all. Whether that is better is a question for measurements, not
# for pictures: on trec6 at the same budget, with the learning rate swept alike and three seeds,
# the search is ahead of all folklore, but of norms alone by less than the spread.
# `experiments/foundation/` says how, and its file is read here:
#
#     searchpet grid experiments/foundation/run.toml --data DIR

# %%
runs = pd.read_json("../experiments/foundation/before/results.jsonl", lines=True)
runs = runs[runs["task"] == "trec6"]
runs.groupby("method")["score"].agg(["mean", "std", "count"]).sort_values(
    "mean", ascending=False).round(4)
