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
# # 5. Prune and tune
#
# One search can say both: which attention heads, groups of neurons and sublayers go, and which
# modules are tuned on what is left. What goes is really taken out, so the model gets faster.

# %%
# %matplotlib inline
# %config InlineBackend.figure_formats = ["retina"]
import time
import warnings

warnings.filterwarnings("ignore", "IProgress")  # of progress bars, which none here shows

import pandas as pd
import torch

import searchpet
from searchpet import plot

SMALL = {"task": "negation", "steps": 80, "batch_size": 16, "max_length": 16, "resume": True}

# %% [markdown]
# ## Two budgets at once
#
# At most 80 % of the blocks' FLOPs stay, and at most 0.1 % of the parameters are tuned. On the
# command line: `searchpet search --budget 0.1% --keep-flops 80%`.

# %%
found = searchpet.search(budget="0.1%", keep_flops="80%", controls=0, out="runs/pruned", **SMALL)
print(f"accuracy {found.score:.3f} after {SMALL['steps']} steps")
plot.structure(found.spec)

# %% [markdown]
# What is left, position by position: `plan` says the same as shares by role and relative depth,
# which is what a transfer to another backbone goes by.

# %%
plan = pd.DataFrame([ratio.model_dump() for ratio in found.spec.plan])
plan.groupby(["role", "kind"])["kept"].describe()[["count", "min", "mean", "max"]].round(2)

# %% [markdown]
# ## Counted again
#
# `verify` believes nothing that the files say: it counts parameters and FLOPs on the model itself,
# and compares the logits of the removed model with those of the masked one.

# %%
from searchpet.verify import verify

pd.DataFrame([(c.what, c.claimed, c.found, c.holds) for c in verify("runs/pruned")],
             columns=["what", "claimed", "found", "holds"])

# %% [markdown]
# ## Smaller and faster
#
# `searchpet.load` returns the model with the units removed, and `merge` folds what was tuned into
# its weights. Times are those of the machine that ran this notebook: 16 texts of 128 tokens on one
# thread, the least processor time of eight; `experiments/speed/` measures them with more care.

# %%
from searchpet.backbone import load_backbone

torch.set_num_threads(1)
dense = load_backbone(found.spec.backbone.name, outputs=2, regression=False, seed=0).model
small = searchpet.merge(searchpet.load("runs/pruned"))
batch = {"input_ids": torch.randint(1000, 2000, (16, 128))}


def seconds(model):
    """The least processor time of eight forward passes."""
    taken = []
    with torch.inference_mode():
        for _ in range(8):
            began = time.process_time()
            model(**batch)
            taken.append(time.process_time() - began)
    return min(taken)


sizes = [sum(p.numel() for p in m.base_model.encoder.parameters()) for m in (dense, small)]
pd.DataFrame({"parameters in blocks": sizes, "seconds": [seconds(dense), seconds(small)]},
             index=["whole", "pruned and tuned"]).round(2)

# %% [markdown]
# ## What the experiments say
#
# `experiments/prune/` compares methods on trec6 with three seeds, at 60 % of the FLOPs and 1 % of
# PET, with the learning rate swept alike for all. These are its own files, read and nothing else:
#
#     searchpet grid experiments/prune/run.toml --data DIR

# %%
results = pd.read_json("../experiments/prune/results.jsonl", lines=True).fillna({"keep": 1.0})
table = results.groupby(["method", "keep"])["score"].agg(["mean", "std", "count"])
table.sort_values("mean", ascending=False).round(4)

# %% [markdown]
# What is pruned matters: units chosen by a search, or by Wanda before one (`prune_first`), keep
# what full fine-tuning reaches; drawn ones and dropped layers do not. Which side is searched
# first makes no difference at this share; with 60 % of the FLOPs removed it does:

# %%
shares = pd.read_json("../experiments/prune/shares/results.jsonl", lines=True)
at_60 = results[results["method"].isin(shares["method"].unique()) & (results["keep"] < 1)]
both = pd.concat([shares, at_60])
both.pivot_table(index="method", columns="keep", values="score").round(4)

# %% [markdown]
# The orders of the literature are presets (`searchpet list strategies`): `prune_first` is that of
# Shears (Munoz et al. 2024, [arXiv:2404.10934](https://arxiv.org/abs/2404.10934)), and there are
# `apt`, `dsee`, `imp` and others, each with a page in the documentation that says what differs
# from the paper.
