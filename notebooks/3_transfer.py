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
# # 3. Transfer: a new task, a larger backbone
#
# A structure is a file of some kilobytes. It can be trained on another task as it is, carried to
# another backbone, and several of them can be voted into one.

# %%
# %matplotlib inline
# %config InlineBackend.figure_formats = ["retina"]
import json
import warnings
from pathlib import Path

warnings.filterwarnings("ignore", "IProgress")  # of progress bars, which none here shows

import pandas as pd

import searchpet
from searchpet import plot

SMALL = {"task": "negation", "steps": 40, "batch_size": 16, "max_length": 16, "resume": True}
SPEC = "searchpet:minilm-agreement-0.01"  # comes with the package: found on the task agreement

# %% [markdown]
# ## A new task
#
# The structure was found on `agreement` (does the verb agree with its subject?). Here it is
# trained on `negation` (is it praise or blame?), beside a random structure of the same budget and
# the head alone. On the command line: `searchpet train SPEC --task NEW`.

# %%
moved = searchpet.train(SPEC, out="runs/moved", **SMALL)
drawn = searchpet.search(strategy="random:unit", budget="0.01%", controls=0, out="runs/drawn",
                         **SMALL)
head = searchpet.train(reference="head", out="runs/head", **SMALL)

rows = [("found on agreement", moved), ("random channels", drawn), ("head only", head)]
pd.DataFrame([(name, run.score, run.values["trainable"]) for name, run in rows],
             columns=["structure", "accuracy on negation", "trained parameters"]).round(3)

# %% [markdown]
# One seed and 120 rows: this shows how it is done, not how well it works. Differences of a few
# points are chance at this size.
#
# ## A larger backbone
#
# Nothing is fetched here, so a backbone is made: twice the layers, a third more width, weights
# drawn at random, the tokenizer of the first. With yours, write `model="bert-base-uncased"` and
# leave the cell out.

# %%
import torch
from transformers import AutoTokenizer, BertConfig, BertModel
from transformers.utils import logging

from searchpet.source import DEFAULT, locate

logging.disable_progress_bar()
torch.manual_seed(0)
tokenizer = AutoTokenizer.from_pretrained(locate(DEFAULT).folder)
config = BertConfig(vocab_size=len(tokenizer), hidden_size=512, num_hidden_layers=12,
                    num_attention_heads=8, intermediate_size=2048)
BertModel(config).save_pretrained("runs/larger")
files = tokenizer.save_pretrained("runs/larger")

# %% [markdown]
# `transfer` maps every entry by role and relative depth, takes the same share of the larger
# backbone for a budget, and solves that exactly. Channel numbers mean nothing there, so as many
# are chosen anew: by gradients where a task is given, by the size of the weights here.

# %%
larger = searchpet.transfer(SPEC, model="runs/larger", train=False, out="runs/on-larger",
                            resume=True)
report = larger.values
pd.DataFrame([{"backbone": Path(report[side]["backbone"]).name, **{
    key: report[side][key] for key in ("denominator", "limit", "used", "slack")}}
    for side in ("source", "target")])

# %% [markdown]
# What became of the entries, and the coordinates by role, before and after:

# %%
print(report["counts"], *report["notes"], sep="\n- ")
roles = pd.DataFrame(report["roles"])
roles.pivot(index="role", columns="kind", values=["source", "target"]).fillna(0).astype(int)

# %%
plot.structure(searchpet.Spec.load(SPEC))

# %%
plot.structure(larger.spec)

# %% [markdown]
# ## From an encoder to a decoder
#
# Roles are found by structure, so LLaMA has a query and a value as BERT has. What has no
# counterpart there is approximated or dropped, and the report says why.

# %%
from transformers import LlamaConfig, LlamaModel

config = LlamaConfig(vocab_size=len(tokenizer), hidden_size=256, num_hidden_layers=12,
                     num_attention_heads=8, intermediate_size=688)
LlamaModel(config).save_pretrained("runs/decoder")
files = tokenizer.save_pretrained("runs/decoder")
decoder = searchpet.transfer(SPEC, model="runs/decoder", train=False, budget="0.02%",
                             out="runs/on-decoder", resume=True)
entries = pd.DataFrame(decoder.values["entries"])
entries.groupby(["verdict", "why"]).size().rename("entries").reset_index()

# %% [markdown]
# ## One structure for several tasks
#
# A vote keeps what most of the specs keep, within the same budget.

# %%
shared = searchpet.vote([SPEC, drawn.spec])
votes = shared.provenance["votes"]
print(f"{shared.budget.used} parameters; units by how many of the two specs keep them: {votes}")

# %% [markdown]
# `searchpet specs` keeps specs on a shelf, a folder or a repository on the hub, with scores and
# provenance. Those with names as `searchpet:NAME` come with the package, each with the hash of
# its file and the command that made it:

# %%
from searchpet import shelf

card = json.loads((shelf.at(SPEC) / "card.json").read_text())
pd.Series(card).drop("sha256").to_frame("")
