"""A small ViT, pretrained on the classes 0-4 of Fashion-MNIST, and fine-tuned by federation on the classes 5-9.

    python benchmarks/vit_pretrain.py FOLDER MODEL [--epochs 8] [--rounds 10] [--seeds 0 1 2] [--write FILE]

FOLDER has train.npz and test.npz, with the images `x` and the labels `y`. The model is trained centrally and saved in
MODEL, if it is not there yet, as a checkpoint with its image processor. The federation has 10 clients under Dirichlet 0.5
labels, which train LoRA of rank 8 on query and value, and the head. Only the training images of the five new classes are
used, and only their test images are counted; before the first round, the head is random.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import transformers
from torch.nn import functional

from fedlora.api import run
from fedlora.config.experiment import build
from fedlora.models.loading import quiet

SHAPE = {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 128}
SIDE = 28
MEAN, STD = 0.286, 0.353  # of the training images

HOW = (
    "A ViT of 4 layers and width 64 is trained centrally on the classes 0-4, then by 10 clients under Dirichlet 0.5 labels "
    "on the classes 5-9: FedIT, rank 8 on query and value, and a new head. Accuracy on the test images of the classes 5-9."
)


def half(file: Path, classes: range) -> tuple[np.ndarray, np.ndarray]:
    """The images of these classes, and their labels."""
    with np.load(file) as arrays:
        kept = np.isin(arrays["y"], classes)
        return arrays["x"][kept], arrays["y"][kept]


def pretrain(data: Path, model: Path, epochs: int) -> None:
    """Trains the model centrally and saves it without its head."""
    images, labels = half(data / "train.npz", range(5))
    inputs = torch.from_numpy((images[:, None] / 255 - MEAN) / STD).float()
    targets = torch.from_numpy(labels)
    torch.manual_seed(0)
    config = transformers.ViTConfig(image_size=SIDE, patch_size=7, num_channels=1, num_labels=5, **SHAPE)
    net = transformers.ViTForImageClassification(config).train()
    steps = epochs * -(-len(inputs) // 64)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-3, total_steps=steps)
    start = time.monotonic()
    for epoch in range(epochs):
        losses = []
        for rows in torch.randperm(len(inputs)).split(64):
            loss = functional.cross_entropy(net(pixel_values=inputs[rows]).logits, targets[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
        print(f"epoch {epoch + 1}: loss {statistics.mean(losses):.3f}, {time.monotonic() - start:.0f} s", flush=True)
    net.vit.save_pretrained(model)
    transformers.ViTImageProcessor(
        size={"height": SIDE, "width": SIDE}, image_mean=[MEAN], image_std=[STD]
    ).save_pretrained(model)


def federate(data: Path, model: Path, rounds: int, seed: int) -> tuple[float, float, float]:
    """The accuracy on the new classes before the first round and after the last one, and the seconds."""
    with tempfile.TemporaryDirectory() as folder:
        for split in ("train", "test"):
            images, labels = half(data / f"{split}.npz", range(5, 10))
            np.savez(Path(folder, f"{split}.npz"), image=images, label=labels)
        experiment = build(
            {
                "model": str(model),
                "task": "image-classification",
                "data": {"source": f"{folder}/train.npz", "test": f"{folder}/test.npz"},
                "rounds": rounds,
                "seed": seed,
                "clients": {"count": 10, "partition": "dirichlet", "alpha": 0.5},
                "method": {"name": "fedit", "rank": 8},
                "train": {"lr": 3e-3, "batch_size": 32, "device": "cpu"},
                "evaluate": {"every": rounds, "batch_size": 256},
            }
        )
        start = time.monotonic()
        rows = run(experiment, Path(folder, "run"), progress=False).rows
        seconds = time.monotonic() - start
        return rows[0].global_["accuracy"], rows[-1].global_["accuracy"], seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("model", type=Path)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--write", type=Path, help="a Markdown file for the table")
    given = parser.parse_args()
    quiet()
    if not (given.model / "config.json").exists():
        pretrain(given.data, given.model, given.epochs)
    found = [federate(given.data, given.model, given.rounds, seed) for seed in given.seeds]
    lines = [f"| {seed} | {a:.3f} | {b:.3f} | {s:.0f} |" for seed, (a, b, s) in zip(given.seeds, found, strict=True)]
    table = "\n".join(["| seed | accuracy before | after | seconds |", "|---|---|---|---|", *lines])
    print(table)
    if given.write:
        title = "# A ViT pretrained on half of the classes of Fashion-MNIST"
        budget = f"`benchmarks/vit_pretrain.py`: {given.epochs} epochs of pretraining, {given.rounds} rounds. {HOW}"
        given.write.write_text(f"{title}\n\n{budget}\n\n{table}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
