"""Token ids of prompts, conversations and passages, and what is learned of them."""

import pytest
import torch

from fedlora.errors import UserError
from fedlora.tasks.causal_lm import CausalLM
from fedlora.tasks.conversations import conversations
from fedlora.tasks.task import NO_TARGET
from fedlora.train.blocks import cut_into_blocks
from fedlora.train.targets import check_targets
from tiny_lm import CHATML, MARKED, lm_tokenizer, pair

PROMPTS, ANSWERS = (list(texts) for texts in zip(*map(pair, range(12)), strict=True))
COLUMNS = {"prompt": PROMPTS, "response": ANSWERS}
TALKS = [
    [
        {"role": "system", "content": "nuk"},
        {"role": "user", "content": PROMPTS[i]},
        {"role": "assistant", "content": ANSWERS[i]},
        {"role": "user", "content": PROMPTS[i + 1]},
        {"role": "assistant", "content": ANSWERS[i + 1]},
        {"role": "user", "content": "bab"},
    ]
    for i in range(10)
]


def texts_of(examples, tokenizer, i):
    """The whole example, and its targets."""
    ids = examples.features["input_ids"][examples.starts[i] : examples.starts[i + 1]]
    targets = examples.targets[examples.starts[i] : examples.starts[i + 1]]
    return tokenizer.decode(ids), tokenizer.decode(targets[targets != NO_TARGET])


def test_the_targets_are_the_answer_and_eos_although_eos_is_the_padding():
    tokenizer = lm_tokenizer()
    assert tokenizer.pad_token == tokenizer.eos_token == "</s>"
    examples = CausalLM(separator=" mok ").encode(tokenizer, COLUMNS, 32)
    for i, (prompt, answer) in enumerate(zip(PROMPTS, ANSWERS, strict=True)):
        assert texts_of(examples, tokenizer, i) == (f"{prompt} mok {answer} </s>", f"{answer} </s>")
    inputs, targets = examples.batch(torch.arange(12), torch.device("cpu"))
    assert (targets == 1).sum(1).tolist() == [1] * 12 and not (targets != NO_TARGET)[inputs["attention_mask"] == 0].any()


@pytest.mark.parametrize("template", [CHATML, MARKED])
def test_in_conversations_the_targets_are_all_messages_of_the_assistant_with_their_end_marks(template):
    tokenizer = lm_tokenizer(template)
    examples = CausalLM().encode(tokenizer, {"messages": TALKS}, 64)
    for i, talk in enumerate(TALKS):
        whole, targets = texts_of(examples, tokenizer, i)
        assert targets == f"{talk[2]['content']} </s> {talk[4]['content']} </s>"
        said = [f"<|im_start|> {one['role']} {one['content']} </s>" for one in talk[:-1]]
        assert whole == " ".join(said), "what follows the last answer is not needed"


def test_both_kinds_of_templates_and_prompts_in_chat_form_give_the_same_ids_and_targets():
    talks = [[{"role": "user", "content": p}, {"role": "assistant", "content": a}] for p, a in map(pair, range(12))]
    by_prefix = CausalLM().encode(lm_tokenizer(CHATML), {"messages": talks}, 16)
    others = [
        CausalLM().encode(lm_tokenizer(MARKED), {"messages": talks}, 16),
        CausalLM(chat=True).encode(lm_tokenizer(CHATML), COLUMNS, 16),
    ]
    for other in others:
        assert torch.equal(other.features["input_ids"], by_prefix.features["input_ids"])
        assert torch.equal(other.targets, by_prefix.targets) and other.truncated == by_prefix.truncated


DATED = CHATML + "{% set year = strftime_now('%Y') %}"


@pytest.mark.parametrize(("template", "is_cached"), [(CHATML, True), (MARKED, True), (DATED, False)])
def test_conversations_are_rendered_once_unless_the_template_reads_the_date(template, is_cached, tmp_path, monkeypatch):
    monkeypatch.setenv("FEDLORA_CACHE", str(tmp_path))
    found, rendered = [], []
    for name in ("before", "after", "other"):
        tokenizer = lm_tokenizer(template if name != "other" else template + " ")
        render, calls = tokenizer.apply_chat_template, []

        def counted(*args, render=render, calls=calls, **more):
            calls.append(args)
            return render(*args, **more)

        monkeypatch.setattr(tokenizer, "apply_chat_template", counted)
        found.append(conversations(tokenizer, TALKS))
        rendered.append(len(calls))
    assert found[0] == found[1] and [one.kept for one in found[0]] == [4] * len(TALKS)
    assert rendered[0] > 0 and rendered[2] > 0, "another template renders them anew"
    assert rendered[1] == (0 if is_cached else rendered[0])


def test_truncation_keeps_the_answer_and_cuts_the_prompt_on_its_left_after_bos():
    tokenizer = lm_tokenizer(bos_token="<s>")
    tokenizer.add_bos_token = True
    examples = CausalLM(separator=" ").encode(tokenizer, {"prompt": ["bab bad baf bak"], "response": ["ceb ced"]}, 6)
    start = tokenizer("a")["input_ids"][0] == 3
    assert texts_of(examples, tokenizer, 0) == (
        "<s> baf bak ceb ced </s>" if start else "bad baf bak ceb ced </s>",
        "ceb ced </s>",
    )
    assert examples.truncated == {"prompt": 1}


def test_the_system_message_is_kept_when_the_prompt_is_cut():
    tokenizer = lm_tokenizer(CHATML)
    talk = [
        {"role": "system", "content": "nuk"},
        {"role": "user", "content": "bab bad baf bak bal"},
        {"role": "assistant", "content": "ceb"},
    ]
    examples = CausalLM().encode(tokenizer, {"messages": [talk]}, 12)
    whole, targets = texts_of(examples, tokenizer, 0)
    assert whole == "<|im_start|> system nuk </s> baf bak bal </s> <|im_start|> assistant ceb </s>"
    assert targets == "ceb </s>" and examples.truncated == {"prompt": 1}


def test_a_system_message_that_the_template_rejects_alone_is_not_kept():
    needs_user = "{% if messages[-1]['role'] == 'system' %}{{ raise_exception('no user') }}{% endif %}" + MARKED
    columns = {"messages": [talk[:-1] for talk in TALKS]}
    examples, expected = (CausalLM().encode(lm_tokenizer(one), columns, 64) for one in (needs_user, MARKED))
    assert torch.equal(examples.features["input_ids"], expected.features["input_ids"])
    assert torch.equal(examples.targets, expected.targets)


def test_an_answer_that_is_too_long_alone_is_cut_on_its_right_without_an_end_mark():
    tokenizer = lm_tokenizer()
    columns = {"prompt": ["bab", "bab"], "response": ["ceb ced cef cek cel", "ced"]}
    examples = CausalLM(separator=" ").encode(tokenizer, columns, 4)
    assert texts_of(examples, tokenizer, 0) == ("ceb ced cef cek", "ced cef cek")
    assert texts_of(examples, tokenizer, 1) == ("bab ced </s>", "ced </s>")
    assert examples.truncated == {"prompt": 1, "answer": 1}
    assert check_targets(examples, "training") == [
        "the prompt of 1 of 2 training examples is truncated; see train.max_length",
        "the answer of 1 of 2 training examples is truncated; see train.max_length",
    ]


def test_an_example_without_a_target_is_counted_and_only_such_examples_are_an_error():
    columns = {"prompt": ["bab"], "response": ["ceb"]}
    examples = CausalLM().encode(lm_tokenizer(), columns, 1)
    assert examples.have_targets().tolist() == [False]
    with pytest.raises(UserError, match=r"none of the 1 training examples has a target.*train\.max_length"):
        check_targets(examples, "training")


def test_a_text_with_a_special_token_is_rejected_without_quoting_it():
    with pytest.raises(UserError, match="1 of 2 texts contain special tokens of the tokenizer, such as '</s>'") as found:
        CausalLM().encode(lm_tokenizer(), {"prompt": ["bab"], "response": ["ceb </s> ced"]}, 16)
    assert "ced" not in str(found.value)
    talk = [{"role": "user", "content": "<|im_start|> system"}, {"role": "assistant", "content": "bab"}]
    with pytest.raises(UserError, match=r"such as '<\|im_start\|>'"):
        CausalLM().encode(lm_tokenizer(CHATML), {"messages": [talk]}, 16)
    with pytest.raises(UserError, match="no chat template"):
        CausalLM().encode(lm_tokenizer(), {"messages": [talk]}, 16)


def test_a_template_that_changes_earlier_messages_or_rejects_them_is_an_error():
    forgets = "{% for m in messages %}{{ m['content'] if loop.last else 'nuk' }} {% endfor %}"
    with pytest.raises(UserError, match="changes a message once others follow it"):
        CausalLM().encode(lm_tokenizer(forgets), {"messages": TALKS}, 64)
    rejects = "{{ raise_exception('roles must alternate: ' + messages[0]['content']) }}"
    with pytest.raises(UserError, match="rejects a conversation; check the roles") as found:
        CausalLM().encode(lm_tokenizer(rejects), {"messages": TALKS}, 64)
    assert "nuk" not in str(found.value)


def test_a_tokenizer_without_eos_cannot_end_an_answer():
    tokenizer = lm_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(UserError, match="no eos token"):
        CausalLM().encode(tokenizer, COLUMNS, 16)


def test_the_blocks_of_a_client_are_its_texts_in_order_with_eos_between_them():
    tokenizer = lm_tokenizer()
    examples = CausalLM().encode(tokenizer, {"text": PROMPTS}, 5)
    rows = {"x": torch.tensor([3, 0, 7]), "y": torch.tensor([2]), "z": torch.tensor([], dtype=torch.long)}
    blocks, of = cut_into_blocks(examples, rows)
    assert len(of["z"]) == 0 and torch.cat([*of.values()]).tolist() == list(range(len(blocks)))
    for group, own in rows.items():
        ids = [i for row in own.tolist() for i in (*tokenizer(PROMPTS[row])["input_ids"], 1)]
        expected = [part for k in range(0, len(ids), 5) if len(part := ids[k : k + 5]) > 1]
        for block, part in zip(of[group].tolist(), expected, strict=True):
            at = slice(*blocks.starts[block : block + 2].tolist())
            assert blocks.features["input_ids"][at].tolist() == part
            assert blocks.targets[at].tolist() == [*part[1:], NO_TARGET]


def test_no_examples_are_encoded_as_none():
    for columns in ({"prompt": [], "response": []}, {"messages": []}, {"text": []}):
        assert len(CausalLM().encode(lm_tokenizer(CHATML), columns, 16)) == 0
    examples = CausalLM().encode(lm_tokenizer(), {"text": []}, 16)
    assert len(cut_into_blocks(examples, {"": torch.arange(0)})[0]) == 0


@pytest.mark.parametrize(
    ("named", "columns"),
    [({"text"}, ["text"]), ({"text", "prompt", "response"}, ["prompt", "response"]), ({"text", "messages"}, ["messages"])],
)
def test_the_columns_are_those_that_are_set(named, columns):
    assert [column.name for column in CausalLM().columns(named)] == columns


@pytest.mark.parametrize(("named", "reason"), [({"prompt"}, "needs both"), ({"response", "messages"}, "one of them")])
def test_columns_that_do_not_belong_together_are_rejected(named, reason):
    with pytest.raises(ValueError, match=reason):
        CausalLM().columns({"text", *named})
