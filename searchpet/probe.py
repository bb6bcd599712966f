"""A transformer on random input: what verification compares and what FLOPs are counted on."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


def random_inputs(model: nn.Module, batch: int, length: int,
                  generator: torch.Generator) -> dict[str, Tensor]:
    """Token ids (batch, length), for encoder-decoders on both sides, or images of the model's own
    size.  Length is cut to the model's positions.  generator: on the CPU.
    """
    config: Any = model.config
    device = next(model.parameters()).device
    if getattr(model, "main_input_name", "") == "pixel_values":
        size = config.image_size
        height, width = size if isinstance(size, list | tuple) else (size, size)
        shape = (batch, config.num_channels, height, width)
        pixels = torch.randn(shape, generator=generator).to(device)
        return {"pixel_values": pixels.to(next(model.parameters()).dtype)}
    length = min(length, positions(model))
    named = [v for k, v in config.to_dict().items() if k.endswith("_token_id")]
    specials = {i for v in named for i in (v if isinstance(v, list) else [v])}
    words = torch.tensor([i for i in range(min(config.vocab_size, 1000)) if i not in specials])
    ids = words[torch.randint(len(words), (batch, length), generator=generator)]
    end = config.eos_token_id
    if isinstance(end, int) and end < config.vocab_size:
        ids[:, -1] = end  # encoder-decoder classifiers read their answer there
    ids = ids.to(device)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if "decoder_input_ids" in inspect.signature(model.forward).parameters:
        inputs["decoder_input_ids"] = ids
    return inputs


SHAPES = ((1, 5), (2, 16), (3, 11))  # rows and length: one alone, several, an odd number


def varied(model: nn.Module, generator: torch.Generator, extra: Collection[str] = (),
           ) -> list[dict[str, Tensor]]:
    """Random inputs of several shapes, as a tokenizer would give them: the last rows of a batch
    are padded, and there are `token_type_ids` if `extra` names them.  generator: on the CPU.
    """
    config: Any = model.config
    pad = getattr(config.get_text_config(), "pad_token_id", None)
    typed = "token_type_ids" in {*extra} & {*inspect.signature(model.forward).parameters}
    found = []
    for count, length in SHAPES:
        inputs = random_inputs(model, count if pad is not None else 1, length, generator)
        inputs.pop("decoder_input_ids", None)  # classifiers make them by themselves
        if "input_ids" in inputs:
            ids, mask = inputs["input_ids"], inputs["attention_mask"]
            for row in range(1, len(ids)):
                end = ids.shape[1] - row
                ids[row, end - 1] = ids[row, -1]  # what a text ends with
                ids[row, end:] = 0 if pad is None else pad
                mask[row, end:] = 0
            if typed:
                types = torch.arange(ids.shape[1]) >= ids.shape[1] // 2
                inputs["token_type_ids"] = types.long().expand_as(ids).clone()
        found.append(inputs)
    return found


def positions(model: nn.Module) -> int:
    """The longest input that a model has positions for."""
    config: Any = model.config
    limit = getattr(config, "max_position_embeddings", None) or 1 << 30
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding):
            skipped = 0 if module.padding_idx is None else module.padding_idx + 1  # RoBERTa's
            limit = min(limit, module.num_embeddings - skipped)
    return int(limit)


def rows(model: nn.Module) -> int:
    """Examples of a probe: a classifier that does not know padding takes one at a time."""
    config: Any = model.config
    return 1 if getattr(config, "pad_token_id", None) is None else 2


@torch.no_grad()
def outputs(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """The first output: logits, or the last hidden state of a model without a head."""
    with evaluating(model):
        found: Tensor = model(**inputs)[0]
    return found


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, and afterwards each module's own mode again."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
