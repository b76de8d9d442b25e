"""The clients of `with_flower.py`, in a module of their own, which Ray's processes import."""

import os
from functools import cache

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from peft import PeftModel
from work import Work, put, state

WORK = "FEDLORA_BENCHMARK_WORK"
"""The environment variable that names the work's file."""

app = ClientApp()


@cache
def resident() -> tuple[Work, PeftModel]:
    """The work and the model, loaded once in each process."""
    work = Work.read(os.environ[WORK])
    torch.set_num_threads(1)
    return work, work.make()


@app.train()
def train(message: Message, context: Context) -> Message:
    """One client's round."""
    work, model = resident()
    put(model, message.content["arrays"].to_torch_state_dict())
    batches = work.shuffled(int(context.node_config["partition-id"]))
    work.train(model, batches)
    records = {"arrays": ArrayRecord(state(model)), "metrics": MetricRecord({"num-examples": sum(map(len, batches))})}
    return Message(RecordDict(records), reply_to=message)
