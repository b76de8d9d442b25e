"""The same work with an SFTTrainer of TRL for each client, as users write it: python with_trl.py WORK.json

For language models. In an environment of its own: pip install trl torch transformers peft gguf. One process with all
threads. The examples are given as token ids, so that they are truncated as for the other sides.
"""

import statistics
import sys
import tempfile
import time

import torch
from datasets import Dataset
from memory import Memory, say
from transformers import AutoTokenizer
from trl import SFTConfig, SFTTrainer
from work import IGNORED, Work, put, state

if __name__ == "__main__":
    memory, work = Memory(), Work.read(sys.argv[1])
    folder, more = work.source()
    tokenizer = AutoTokenizer.from_pretrained(folder, **more)
    model = work.make()
    mean, seconds = state(model), []

    def rows(client: int) -> Dataset:
        """The client's examples, with a mask of the learned tokens."""
        own = work.clients[client]
        masks = [[int(label != IGNORED) for label in work.labels[row]] for row in own]
        return Dataset.from_dict({"input_ids": [work.ids[row] for row in own], "completion_mask": masks})

    with tempfile.TemporaryDirectory() as out:
        settings = SFTConfig(
            output_dir=out,
            per_device_train_batch_size=work.batch,
            num_train_epochs=1,
            learning_rate=work.lr,
            lr_scheduler_type="constant",
            weight_decay=0.0,
            max_length=None,
            bf16=False,
            gradient_checkpointing=False,
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
        )
        for _ in range(work.rounds):
            started, cohort = time.perf_counter(), torch.randperm(len(work.clients))[: work.chosen].tolist()
            total = {name: torch.zeros_like(x) for name, x in mean.items()}
            for client in cohort:
                put(model, mean)
                SFTTrainer(model, args=settings, train_dataset=rows(client), processing_class=tokenizer).train()
                for name, x in state(model).items():
                    total[name] += x / len(cohort)
            put(model, mean := total)
            seconds.append(time.perf_counter() - started)
    say(seconds=statistics.median(seconds), accuracy=work.accuracy(model), peak_mb=memory.peak_mb)
