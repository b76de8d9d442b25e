"""The clients of `with_flower.py`, in a module of their own, which Ray's processes import."""

import os
from functools import cache

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from peft import PeftModel
from work import Work, put, state

WORK, AFRESH = "FEDLORA_BENCHMARK_WORK", "FEDLORA_BENCHMARK_AFRESH"
"""Environment variables: the work's file; whether each client loads the model."""

app = ClientApp()


@cache
def shared() -> Work:
    """The work, read once in each process."""
    torch.set_num_threads(1)
    return Work.read(os.environ[WORK])


@cache
def resident() -> PeftModel:
    """The model, loaded once in each process."""
    return shared().make()


@app.train()
def train(message: Message, context: Context) -> Message:
    """One client's round."""
    work = shared()
    model = work.make() if AFRESH in os.environ else resident()
    put(model, message.content["arrays"].to_torch_state_dict())
    batches = work.shuffled(int(context.node_config["partition-id"]))
    work.train(model, batches)
    records = {"arrays": ArrayRecord(state(model)), "metrics": MetricRecord({"num-examples": sum(map(len, batches))})}
    return Message(RecordDict(records), reply_to=message)
