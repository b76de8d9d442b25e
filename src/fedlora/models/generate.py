"""Greedy generation for the evaluation of adapters; many clients share a batch."""

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from jaxtyping import Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from fedlora.adapter import Adapter
from fedlora.errors import UserError
from fedlora.models.adapted import AdaptedModel
from fedlora.models.tokenizers import positions


def generate(
    adapted: AdaptedModel,
    asked: Sequence[tuple[Sequence[Int[Tensor, " _"]], Adapter]],
    max_new_tokens: int,
    stop: Collection[int],
    batch_size: int,
) -> list[list[Int[Tensor, " _"]]]:
    """Each adapter's greedy answers to its own prompts, as token ids on the CPU; the adapters share forward passes.

    A prompt has at least one token: a decoder continues it, an encoder-decoder reads it in its encoder. An answer ends
    before the first token in `stop`, at the latest after `max_new_tokens`. The checkpoint's own `generation_config`, such
    as its penalties, is not used.

    The prompts are processed in order of length to save padding, `batch_size` in one pass. In fp32 an answer does not
    depend on the other prompts of its pass; in bf16 it can, if two tokens are almost equally likely.

    Raises:
        UserError: the longest prompt and the answer need more positions than the model has.
    """
    longest = max((len(prompt) for prompts, _ in asked for prompt in prompts), default=0)
    check_positions(adapted.model, longest, max_new_tokens)
    adapted.load_clients([adapter for _, adapter in asked])
    adapted.model.eval()
    order = [sorted(range(len(prompts)), key=lambda i: len(prompts[i])) for prompts, _ in asked]
    answers: list[dict[int, Tensor]] = [{} for _ in asked]
    rows_per_adapter, max_rows = max(1, batch_size // len(asked)), max(len(rows) for rows in order)
    with torch.inference_mode(), decoding(adapted.model, max_new_tokens, stop):
        for start in range(0, max_rows, rows_per_adapter):
            batches = [rows[start : start + rows_per_adapter] for rows in order]
            run = max(len(rows) for rows in batches)
            places = [(client, i) for client, rows in enumerate(batches) for i in [*rows, *[None] * (run - len(rows))]]
            found = _continue(adapted.model, [None if i is None else asked[client][0][i] for client, i in places])
            for (client, i), ids in zip(places, found, strict=True):
                if i is not None:
                    ends = torch.isin(ids, torch.tensor([*stop], dtype=torch.long)).nonzero()
                    answers[client][i] = ids[: ends[0]] if len(ends) else ids
    return [[own[i] for i in range(len(own))] for own in answers]


def _continue(model: Any, prompts: Sequence[Int[Tensor, " _"] | None]) -> Int[Tensor, "rows new"]:
    """The new tokens of each row; a row without a prompt is finished from the start. Finished rows get padding."""
    pad, separate = model.generation_config.pad_token_id, model.config.is_encoder_decoder
    side = "right" if separate else "left"  # a decoder's next token follows the last place
    given = [torch.tensor([pad]) if prompt is None else prompt for prompt in prompts]
    ids = pad_sequence(given, batch_first=True, padding_value=pad, padding_side=side).to(model.device)
    mask = pad_sequence([torch.ones_like(one) for one in given], batch_first=True, padding_side=side).to(model.device)
    finished = torch.tensor([prompt is None for prompt in prompts], device=model.device)
    found: Tensor = model.generate(input_ids=ids, attention_mask=mask, stopping_criteria=[lambda *_: finished])
    return found[:, 1 if separate else ids.shape[1] :].cpu()  # after the decoder's start token, or after the prompt


@contextmanager
def decoding(model: Any, max_new_tokens: int, stop: Collection[int], temperature: float = 0.0) -> Iterator[None]:
    """Replaces the checkpoint's `generation_config`, from which `generate` would take every setting that is not given.

    Decoding is greedy, or samples with a temperature above 0.
    """
    config, original = model.config, model.generation_config
    sampling = (
        {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature else {"do_sample": False}
    )
    model.generation_config = transformers.GenerationConfig(
        max_new_tokens=max_new_tokens,
        **sampling,
        num_beams=1,
        use_cache=True,
        disable_compile=True,
        pad_token_id=config.get_text_config().pad_token_id,
        eos_token_id=[*stop] or None,
        decoder_start_token_id=getattr(config, "decoder_start_token_id", None),
    )
    try:
        yield
    finally:
        model.generation_config = original


def check_positions(model: Any, longest: int, max_new_tokens: int) -> None:
    """Checks that the model has enough positions for prompts of up to this length and their answers.

    Raises:
        UserError: it has too few.
    """
    limit = positions(model)
    needed = max(longest, max_new_tokens) if model.config.is_encoder_decoder else longest + max_new_tokens
    if limit is not None and needed > limit:
        raise UserError(
            f"a prompt of {longest} tokens and an answer of up to {max_new_tokens} tokens need {needed} positions, the "
            f"model has {limit}; generate at most {max_new_tokens - needed + limit} tokens (evaluate.max_new_tokens), or "
            "shorten the prompts"
        )
