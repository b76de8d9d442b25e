"""Generation of one answer, token by token."""

from collections.abc import Callable, Collection
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from fedlora.adapter import Adapter
from fedlora.models.adapted import AdaptedModel
from fedlora.models.generate import check_positions, decoding


def stream(
    adapted: AdaptedModel,
    prompt: Int[Tensor, " tokens"],
    adapter: Adapter,
    max_new_tokens: int,
    stop: Collection[int],
    on_token: Callable[[int], bool],
    temperature: float = 0.0,
) -> None:
    """Calls `on_token` with each token of the answer, as soon as it is known, until it returns False.

    The answer ends as in `generate`, and is the same if it is greedy; with a temperature above 0, it is sampled.

    Raises:
        UserError: prompt and answer need more positions than the model has.
    """
    check_positions(adapted.model, len(prompt), max_new_tokens)
    adapted.load_clients([adapter])
    adapted.model.eval()
    model: Any = adapted.model
    streamer, ids = _Streamer(on_token, frozenset(stop)), prompt[None].to(model.device)
    with torch.inference_mode(), decoding(model, max_new_tokens, stop, temperature):
        model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            streamer=streamer,
            stopping_criteria=[lambda ids, _: torch.full((len(ids),), streamer.ended, device=ids.device)],
        )


class _Streamer:
    """Passes on new tokens, one at a time, in the form that transformers' `generate` requires.

    `generate` first puts the prompt, or the decoder's start token.
    """

    def __init__(self, on_token: Callable[[int], bool], stop: frozenset[int]) -> None:
        self._on_token, self._stop = on_token, stop
        self._started = self.ended = False

    def put(self, ids: Tensor) -> None:
        if not self._started:
            self._started = True
        elif not self.ended:
            token = int(ids)
            self.ended = token in self._stop or not self._on_token(token)

    def end(self) -> None:
        """Nothing is held back."""
