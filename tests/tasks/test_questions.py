"""Evaluation by generated answers."""

import json
import stat

import pytest
import torch
import transformers

from fedlora.api import run
from fedlora.config.experiment import build
from fedlora.errors import UserError
from fedlora.federated_data import FederatedData
from fedlora.session import Session, check
from fedlora.tasks.causal_lm import CausalLM
from fedlora.tasks.questions import Question, grouped, spread
from fedlora.tasks.text_metrics import TEXT_METRICS
from tiny_lm import CHATML, lm_tokenizer, pair, pair_rows, tiny_lm

TALK = [
    {"role": "user", "content": "bab bad"},
    {"role": "assistant", "content": "ceb"},
    {"role": "user", "content": "baf"},
    {"role": "assistant", "content": "ced cef"},
]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("home")
    tiny_lm(home / "llama", "llama", CHATML, initializer_range=0.5)
    pair_rows(home / "rows.jsonl", 20)
    return home


def experiment(home, columns, **evaluate):
    return build(
        {
            "model": str(home / "llama"),
            "task": "causal-lm",
            "data": {"source": str(home / "rows.jsonl"), **columns},
            "rounds": 1,
            "clients": {"count": 2, "partition": "iid"},
            "method": {"name": "fedit", "rank": 2},
            "train": {"max_length": 32, "device": "cpu", "lr": 1e-2},
            "evaluate": {"generate": 2, "max_new_tokens": 5, **evaluate},
        }
    )


def test_a_question_is_what_precedes_the_last_answer_and_the_whole_answer_is_its_reference():
    tokenizer = lm_tokenizer(CHATML)
    columns = {"messages": [TALK, TALK[:2]]}
    found = CausalLM().questions(tokenizer, columns, 64)
    assert [tokenizer.decode(one.prompt) for one in found] == [
        "<|im_start|> user bab bad </s> <|im_start|> assistant ceb </s> <|im_start|> user baf </s> <|im_start|> assistant",
        "<|im_start|> user bab bad </s> <|im_start|> assistant",
    ]
    assert [one.references for one in found] == [("ced cef",), ("ceb",)]


def test_the_reference_is_whole_also_if_the_example_was_truncated():
    tokenizer, columns = lm_tokenizer(), {"prompt": ["bab bad baf"], "response": ["ceb ced cef"]}
    (cut,) = CausalLM().questions(tokenizer, columns, 3)
    assert cut.references == ("ceb ced cef",)


@pytest.mark.parametrize("max_length", [1, 2, 3, 4, 64])
def test_a_prompt_is_its_own_end_whatever_the_length_of_the_answer(max_length):
    tokenizer, answers = lm_tokenizer(), ["ceb", "ceb ced", "ceb ced cef cek cel"]
    columns = {"prompt": ["bab bad baf"] * 3, "response": answers}
    (one,) = grouped(CausalLM(separator=" ").questions(tokenizer, columns, max_length))
    assert tokenizer.decode(one.prompt).split() == ["bab", "bad", "baf"][-max_length:]
    assert one.references == tuple(answers)


@pytest.mark.parametrize("max_length", [5, 6])
def test_a_prompt_keeps_the_system_message_if_there_is_room_for_more(max_length):
    tokenizer = lm_tokenizer(CHATML)
    system = [{"role": "system", "content": "nuk mok"}]  # 5 ids
    columns = {"messages": [[*system, *TALK[:2]], [*system, *TALK]]}
    found = [tokenizer.decode(one.prompt).split() for one in CausalLM().questions(tokenizer, columns, max_length)]
    whole = [tokenizer.decode(one.prompt).split() for one in CausalLM().questions(tokenizer, columns, 64)]
    kept = 5 if max_length > 5 else 1
    assert found == [[*words[:kept], *words[kept - max_length :]] for words in whole]


def test_an_answer_that_training_truncates_away_is_asked_for_by_its_own_prompt():
    tokenizer, length = lm_tokenizer(CHATML), 8
    talk = [*TALK[:2], {"role": "user", "content": "bak"}, {"role": "assistant", "content": " ".join(["ced"] * length)}]
    (one,) = CausalLM().questions(tokenizer, {"messages": [talk]}, length)
    assert tokenizer.decode(one.prompt).endswith("<|im_start|> user bak </s> <|im_start|> assistant")
    assert one.references == (talk[-1]["content"],)


def test_prompts_that_occur_several_times_are_one_question_with_all_references():
    one, other = torch.tensor([1, 2]), torch.tensor([1])
    found = grouped([Question(one, ("a",)), Question(other, ("b",)), Question(one.clone(), ("c",))])
    assert [(question.prompt.tolist(), question.references) for question in found] == [([1, 2], ("a", "c")), ([1], ("b",))]


@pytest.mark.parametrize(
    ("count", "chosen"), [(0, []), (2, [0, 2]), (3, [0, 1, 3]), (5, [0, 1, 2, 3, 4]), (9, [0, 1, 2, 3, 4])]
)
def test_questions_are_chosen_at_equal_distances(count, chosen):
    questions = [Question(torch.tensor([i]), ()) for i in range(5)]
    assert [int(one.prompt) for one in spread(questions, count)] == chosen


@pytest.mark.slow
@pytest.mark.parametrize("columns", [{"prompt": "prompt", "response": "response"}, {"messages": "messages"}])
def test_a_run_scores_and_stores_the_answers_that_the_model_gives_to_each_prompt_alone(home, tmp_path, columns):
    chosen = experiment(home, columns, text_metrics=["exact-match", "chrf"])
    result = run(chosen, tmp_path / "run")
    assert [row.round for row in result.rows] == [0, 1]
    session = Session.make(chosen, FederatedData.make(chosen))
    model = transformers.AutoModelForCausalLM.from_pretrained(home / "llama").eval()
    answers = []
    for question in session.generation.questions:
        prompt = question.prompt[None]
        found = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=5,
            do_sample=False,
            eos_token_id=1,
            pad_token_id=1,
        )
        answers.append(session.tokenizer.decode(found[0, prompt.shape[1] :], skip_special_tokens=True))
    file = tmp_path / "run/samples/round-0.jsonl"
    stored = [json.loads(line) for line in file.read_text().splitlines()]
    assert [row["answer"] for row in stored] == answers and any(answers)
    assert [row["prompt"] for row in stored] == [session.tokenizer.decode(q.prompt) for q in session.generation.questions]
    references = [row["references"] for row in stored]
    assert {text for own in references for text in own} < {pair(i)[1] for i in range(20)}
    chrf = TEXT_METRICS["chrf"]
    expected = chrf.metrics(chrf.statistics(answers, references).sum(0), 2)
    assert result.rows[0].global_.items() >= {"exact_match": 0.0, **expected}.items()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600 and (tmp_path / "run/samples/round-1.jsonl").is_file()


@pytest.mark.parametrize(("method", "noted"), [("fedit", []), ("fedsa-lora", ["an adapter for each client"])])
def test_a_note_tells_that_a_personal_method_generates_no_answers(home, method, noted):
    given = experiment(home, {"prompt": "prompt", "response": "response"})
    given = build({**given.model_dump(exclude_none=True), "method": {"name": method, "rank": 2}})
    found = [note for note in check(given, FederatedData.make(given)) if "evaluate.generate = 2" in note]
    assert len(found) == len(noted) and all(text in note for text, note in zip(noted, found, strict=True))


def test_texts_without_prompts_cannot_be_evaluated_by_generation(home):
    chosen = experiment(home, {})
    with pytest.raises(UserError, match=r"evaluate\.generate: plain texts have no answers"):
        Session.make(chosen, FederatedData.make(chosen))


def test_a_task_that_generates_no_text_cannot_be_evaluated_by_generation(home):
    chosen = experiment(home, {"label": "user"})
    tiny = build(
        {**chosen.model_dump(exclude_none=True), "task": "classification", "clients": {"count": 2, "partition": "iid"}}
    )
    with pytest.raises(UserError, match=r"evaluate\.generate: task\.kind = 'classification' generates no text"):
        Session.make(tiny, FederatedData.make(tiny))


@pytest.mark.parametrize("checked", [check, Session.make])
def test_too_few_positions_for_the_answers_are_refused_before_training(checked, home):
    given = experiment(home, {"prompt": "prompt", "response": "response"}, max_new_tokens=100_000)
    with pytest.raises(UserError, match="an answer of up to 100000 tokens need"):
        checked(given, FederatedData.make(given))
