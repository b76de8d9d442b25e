"""Conversations with trained language models."""

import pytest
import torch

from fedlora import UserError, predict
from fedlora.chatting import Chat
from tiny_lm import CHATML, tiny_lm

NEW_TOKENS = "evaluate.max_new_tokens=4"


@pytest.fixture(scope="module")
def talkative(trained, tmp_path_factory):
    """A run of a model with large weights, which writes several words."""
    model = tiny_lm(tmp_path_factory.mktemp("talkative") / "llama", template=CHATML, initializer_range=0.5)
    return trained("causal-lm", model=str(model))


@pytest.fixture(scope="module")
def chat(talkative):
    return open_chat(talkative.run)


def open_chat(path, *overrides):
    return Chat.open(path, overrides=[NEW_TOKENS, *overrides])


@pytest.mark.parametrize("name", ["run", "adapter", "merged"])
def test_an_answer_is_that_of_a_prediction_and_comes_in_pieces(name, talkative):
    pieces = []
    found = open_chat(getattr(talkative, name)).answer("bab bad baf", on_text=pieces.append)
    assert [{"answer": found}] == predict(talkative.run, ["bab bad baf"], overrides=[NEW_TOKENS])
    assert "".join(pieces) == found and len(pieces) > 1


def test_a_question_follows_the_conversation_before_it(chat, talkative):
    assert chat.remembers
    history = [("bab bad", chat.answer("bab bad"))]
    messages = [
        {"role": "user", "content": "bab bad"},
        {"role": "assistant", "content": history[0][1]},
        {"role": "user", "content": "ceb"},
    ]
    (expected,) = predict(talkative.run, [{"messages": messages}], overrides=[NEW_TOKENS])
    assert chat.answer("ceb", history) == expected["answer"]


def test_the_model_before_training_is_that_of_round_0(talkative):
    chat = open_chat(talkative.adapter)
    base = chat.experiment.model
    untrained = open_chat(base, "task=causal-lm", "data.messages=messages")
    for text in ("bab bad", "ceb", "dib dif"):
        assert chat.answer(text, base=True) == untrained.answer(text)
    assert not untrained.adapter


def test_an_answer_ends_when_it_is_stopped_and_the_next_one_is_whole(chat):
    pieces = []
    whole = chat.answer("bab bad baf")
    assert len(whole.split()) > 1
    part = chat.answer("bab bad baf", on_text=pieces.append, stopped=lambda: bool(pieces))
    assert part == "".join(pieces) and whole.startswith(part) and len(part) < len(whole)
    assert chat.answer("bab bad baf") == whole


def test_sampled_answers_differ_and_greedy_ones_do_not(chat):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        assert len({chat.answer("bab", temperature=9.0) for _ in range(4)}) > 1
        assert len({chat.answer("bab") for _ in range(3)}) == 1


@pytest.mark.parametrize("text", ["", "  ", "bab </s>", "bab\ud800"])
def test_what_the_model_cannot_read_is_rejected(text, chat):
    with pytest.raises(UserError):
        chat.answer(text)


def test_a_conversation_that_is_too_long_loses_its_beginning(chat):
    history = [("bab " * 20, "bad")] * 3  # more than the 64 positions
    assert isinstance(chat.answer("ceb", history), str)


@pytest.mark.parametrize("columns", [{"prompt": "prompt", "response": "response"}, {"text": "text"}])
def test_single_prompts_and_texts_are_answered_without_the_questions_before(columns, talkative, tmp_path):
    one = talkative
    settings = [NEW_TOKENS, "task=causal-lm", *(f"data.{key}={value}" for key, value in columns.items())]
    (one.adapter / "fedlora.toml").rename(tmp_path / "fedlora.toml")
    try:
        chat = Chat.open(one.adapter, overrides=settings)
        assert not chat.remembers
        found = chat.answer("bab bad", [("ceb", "ced")])
        assert found == chat.answer("bab bad")
        (expected,) = predict(one.adapter, ["bab bad"], overrides=settings)
        assert found == expected["answer"]
    finally:
        (tmp_path / "fedlora.toml").rename(one.adapter / "fedlora.toml")


@pytest.mark.slow
def test_an_encoder_decoder_answers_as_it_predicts(trained):
    (expected,) = predict(trained("seq2seq").run, ["bab bad"], overrides=[NEW_TOKENS])
    assert open_chat(trained("seq2seq").run).answer("bab bad") == expected["answer"]


def test_a_model_that_writes_no_text_names_the_command_for_it(trained):
    with pytest.raises(UserError, match=r"task\.kind = 'classification' generates no text; use fedlora predict"):
        Chat.open(trained("classification").run)
