"""The base model's features of a client's own examples, against transformers called on one text at a time."""

import copy
from dataclasses import replace

import pytest
import torch
import transformers
from torch.testing import assert_close

from fedlora.adapter import lora_init
from fedlora.config.sections import Train
from fedlora.messages import ClientInfo
from fedlora.models.adapted import AdaptedModel, Scaling
from fedlora.tasks.classification import Classification
from fedlora.tasks.task import Examples
from fedlora.train.features import features
from fedlora.train.local import LocalTrainer

from tiny import LABELS, tiny_bert

LENGTHS = (3, 9, 1, 5, 9, 2, 7)
SHAPE = {"vocab_size": 50, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 16}


def encoded() -> Examples:
    starts = torch.tensor([0, *LENGTHS]).cumsum(0)
    ids = torch.randint(5, 50, (int(starts[-1]),), generator=torch.Generator().manual_seed(0))
    parts = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return Examples(parts, starts, torch.arange(len(LENGTHS)) % 3, {"input_ids": 0, "attention_mask": 0})


@pytest.fixture(scope="module", params=["bert", "gpt2"])
def model(request, tmp_path_factory):
    if request.param == "bert":
        return Classification().load(str(tiny_bert(tmp_path_factory.mktemp("model"))), LABELS, seed=0)[0]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = transformers.GPT2Config(**SHAPE, num_labels=3, pad_token_id=0, bos_token_id=1, eos_token_id=1)
        return transformers.GPT2ForSequenceClassification(config)


def test_features_are_the_last_layer_at_the_first_token_or_the_last_of_a_model_that_looks_back(model):
    examples, rows = encoded(), torch.tensor([5, 1, 2, 6])
    adapted = AdaptedModel(copy.deepcopy(model), Scaling(8.0), dropout=0.5, head=["classifier", "score"], classes=3)
    adapted.load_clients([{n: replace(p, b=p.b + 1) for n, p in lora_init(adapted.spec, 2, 0).items()}])
    found = features(adapted, Classification(), examples, rows, batch_size=3)
    place = 0 if model.config.model_type == "bert" else -1
    for own, row in zip(found, rows.tolist(), strict=True):
        one = {name: x[examples.starts[row] : examples.starts[row + 1]][None] for name, x in examples.features.items()}
        with torch.inference_mode():
            hidden = model.eval()(**one, output_hidden_states=True).hidden_states[-1]
        assert_close(own, hidden[0, place], rtol=1e-4, atol=1e-5)
    assert found.shape == (4, adapted.spec.features) and adapted.spec.classes == 3


def test_a_trainer_answers_with_the_clients_own_training_examples(model):
    adapted = AdaptedModel(copy.deepcopy(model), Scaling(8.0), head=["classifier", "score"], classes=3)
    examples, rows = encoded(), {"x": torch.tensor([4, 0]), "y": torch.tensor([1, 2, 3])}
    trainer = LocalTrainer(adapted, Classification(), examples, rows, {}, examples, Train(), eval_batch_size=2)
    seen = trainer.features(ClientInfo("y", 2, 3))
    assert torch.equal(seen.labels, examples.targets[1:4]) and seen.classes == 3
    assert_close(seen.features, features(adapted, Classification(), examples, rows["y"], 1), rtol=1e-4, atol=1e-5)
