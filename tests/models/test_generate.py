"""Greedy generation with many adapters against full forward passes of one prompt at a time."""

from functools import cache

import pytest
import torch
import transformers
from torch import Tensor

from fedlora.adapter import Adapter, Scaling, lora_init
from fedlora.errors import UserError
from fedlora.linalg.lowrank import LowRank
from fedlora.models.adapted import AdaptedModel
from fedlora.models.generate import generate

from architectures import CONFIGS

KINDS = ("llama", "gpt2", "t5", "bart")
LENGTHS = ((5, 1, 9), (3,), (12, 2))
"""Number of tokens in each prompt of each client."""
NEW = 8


class Tie(Exception):
    """Two tokens are almost equally likely, so that rounding chooses between them."""


@cache
def adapted_model(kind: str) -> AdaptedModel:
    """A language model whose weights are so large that its answers vary, and with dropout."""
    special = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3, "vocab_size": 96}
    config = transformers.AutoConfig.for_model(kind, **{**special, **CONFIGS[kind]})
    auto = transformers.AutoModelForSeq2SeqLM if config.is_encoder_decoder else transformers.AutoModelForCausalLM
    model, rng = auto.from_config(config), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.3, generator=rng)
    return AdaptedModel(model, Scaling(8.0), "all-linear", dropout=0.5)


@cache
def asked(kind: str) -> list[tuple[list[Tensor], Adapter]]:
    """Three clients' prompts and adapters, of unequal numbers, lengths and ranks."""
    return asked_with(kind, seed_of(kind))


@cache
def seed_of(kind: str) -> int:
    """A seed with which no two tokens are almost equally likely, on this machine."""
    for seed in range(1, 50):
        try:
            answers_to(kind, seed)
        except Tie:
            continue
        return seed
    raise AssertionError("every seed has almost equally likely tokens")


def asked_with(kind: str, seed: int) -> list[tuple[list[Tensor], Adapter]]:
    rng = torch.Generator().manual_seed(seed)
    prompts = [[torch.randint(4, 96, (n,), generator=rng) for n in lengths] for lengths in LENGTHS]
    start = [lora_init(adapted_model(kind).spec, 1 + i % 2, seed=i) for i in range(len(LENGTHS))]
    adapters = [{n: LowRank(torch.randn(x.b.shape, generator=rng), x.a) for n, x in one.items()} for one in start]
    return list(zip(prompts, adapters, strict=True))


@cache
def plain_answers(kind: str) -> list[list[Tensor]]:
    """The answers of NEW tokens by one whole forward pass per token, without cache and padding."""
    return answers_to(kind, seed_of(kind))


@cache
def answers_to(kind: str, seed: int) -> list[list[Tensor]]:
    adapted = adapted_model(kind)
    model, found = adapted.model, []
    for prompts, adapter in asked_with(kind, seed):
        adapted.load_clients([adapter])
        model.eval()
        found.append([_plain_answer(model, prompt) for prompt in prompts])
    return found


@torch.no_grad()
def _plain_answer(model: transformers.PreTrainedModel, prompt: Tensor) -> Tensor:
    start = [model.config.decoder_start_token_id] if model.config.is_encoder_decoder else prompt.tolist()
    ids = torch.tensor([start])
    for _ in range(NEW):
        call = (
            {"input_ids": prompt[None], "decoder_input_ids": ids} if model.config.is_encoder_decoder else {"input_ids": ids}
        )
        logits, tokens = model(**call).logits[:, -1].topk(2)
        if logits[0, 0] - logits[0, 1] < 1e-3:
            raise Tie
        ids = torch.cat([ids, tokens[:, :1]], 1)
    return ids[0, len(start) :]


def lists(answers: list[list[Tensor]]) -> list[list[list[int]]]:
    return [[one.tolist() for one in own] for own in answers]


def cut(answers: list[list[Tensor]], stop: set[int]) -> list[list[list[int]]]:
    """The answers up to the first of these tokens."""
    return [[one[: next((i for i, x in enumerate(one) if x in stop), len(one))] for one in own] for own in lists(answers)]


@pytest.mark.parametrize("batch_size", [6, 64])
@pytest.mark.parametrize("kind", KINDS)
def test_many_adapters_in_one_batch_answer_as_one_prompt_at_a_time_without_cache(kind, batch_size):
    adapted = adapted_model(kind)
    adapted.model.train()  # dropout must be switched off
    plain = lists(plain_answers(kind))
    assert lists(generate(adapted, asked(kind), NEW, (), batch_size)) == plain
    assert len({tuple(one) for own in plain for one in own}) > 3


@pytest.mark.parametrize("kind", KINDS)
def test_an_answer_depends_on_its_own_adapter(kind):
    prompts, adapters = asked(kind)[0][0], [adapter for _, adapter in asked(kind)]
    found = lists(generate(adapted_model(kind), [(prompts, adapter) for adapter in adapters], NEW, (), 64))
    assert found[0] == lists(plain_answers(kind))[0]
    assert found[0] != found[1] != found[2] != found[0]


@pytest.mark.parametrize("kind", KINDS)
def test_answers_end_before_stop_tokens_and_finished_rows_do_not_change_others(kind):
    plain = plain_answers(kind)
    stop = {int(plain[0][2][0]), int(plain[1][0][4])}  # the first token of one answer, the fifth of another
    expected = cut(plain, stop)
    assert expected[0][2] == [] and max(len(one) for own in expected for one in own) > 4
    assert lists(generate(adapted_model(kind), asked(kind), NEW, stop, 64)) == expected


@pytest.mark.parametrize("kind", KINDS)
def test_answers_of_fewer_tokens_are_the_beginning_of_longer_ones(kind):
    found = lists(generate(adapted_model(kind), asked(kind), 3, (), 64))
    assert found == [[one[:3] for one in own] for own in lists(plain_answers(kind))]


@pytest.mark.parametrize("kind", KINDS)
def test_settings_of_the_checkpoint_are_not_used_and_are_kept(kind):
    model = adapted_model(kind).model
    original = model.generation_config
    first = [int(own[0][0]) for own in plain_answers(kind)]
    model.generation_config = own = transformers.GenerationConfig(
        do_sample=True,
        temperature=5.0,
        repetition_penalty=9.0,
        no_repeat_ngram_size=1,
        min_new_tokens=6,
        suppress_tokens=[token for token in first if token != 7],
        forced_bos_token_id=7,
        forced_eos_token_id=7,
        eos_token_id=first,
        decoder_start_token_id=9,
        num_return_sequences=2,
        use_cache=False,
        max_length=3,
    )
    try:
        assert lists(generate(adapted_model(kind), asked(kind), NEW, (), 64)) == lists(plain_answers(kind))
        assert model.generation_config is own
    finally:
        model.generation_config = original


def test_generation_ends_with_the_last_answer_though_clients_have_unequal_numbers_of_prompts():
    adapted, passes = adapted_model("llama"), []
    first = {int(one[0]) for own in plain_answers("llama") for one in own}
    hook = adapted.model.register_forward_hook(lambda *_: passes.append(1))
    try:
        assert lists(generate(adapted, asked("llama"), NEW, first, 64)) == [[[]] * len(own) for own in LENGTHS]
    finally:
        hook.remove()
    assert len(passes) == 1


def test_a_client_without_prompts_has_no_answers():
    (prompts, adapter), others = asked("gpt2")[0], [([], asked("gpt2")[1][1])]
    found = generate(adapted_model("gpt2"), [*others, (prompts, adapter)], NEW, (), 2)
    assert lists(found) == [[], lists(plain_answers("gpt2"))[0]]
    assert generate(adapted_model("gpt2"), others, NEW, (), 2) == [[]]


@pytest.mark.parametrize(("kind", "new"), [("gpt2", 53), ("llama", 53), ("bart", 65)])
def test_more_tokens_than_positions_are_rejected(kind, new):
    with pytest.raises(UserError, match=f"a prompt of 12 tokens .* the model has 64; generate at most {new - 1} tokens"):
        generate(adapted_model(kind), asked(kind), new, (), 64)
    longest = [(asked(kind)[2][0], asked(kind)[2][1])]
    assert {len(one) for one in generate(adapted_model(kind), longest, new - 1, (), 64)[0]} == {new - 1}
