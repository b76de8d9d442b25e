"""Image classification: its inputs, its training against a plain loop, whole runs, and what is rejected."""

import copy
import json
import re
import tracemalloc
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import datasets
import numpy as np
import peft
import pytest
import torch
import transformers
from PIL import Image
from torch.nn import functional
from torch.testing import assert_close

from fedlora import Experiment, export, resume, run
from fedlora.adapter import Scaling, lora_init, pack
from fedlora.config.experiment import build
from fedlora.config.sections import Train
from fedlora.data.images import image_reader
from fedlora.data.sources import column_values
from fedlora.errors import UserError
from fedlora.federated_data import FederatedData
from fedlora.linalg.lowrank import LowRank
from fedlora.messages import Fit
from fedlora.models.adapted import AdaptedModel
from fedlora.models.targets import head_modules
from fedlora.parts.dense import Dense
from fedlora.randomness import generator
from fedlora.runs.start import opened
from fedlora.session import Session, check
from fedlora.tasks.image_classification import ImageClassification
from fedlora.train.batched import train_together
from fedlora.train.batches import epoch
from fedlora.train.independence import safe_clients_per_step
from fedlora.train.job import Job
from tiny_images import SMALL, tiny_npz, tiny_pictures, tiny_vision, tiny_vit, vit_processor

from wired import assert_same_runs

LABELS = ("left", "middle", "right")
SETTINGS = Train(lr=1e-2, epochs=2, batch_size=4, batches="by-length")
CONVNEXT = transformers.ConvNextConfig(hidden_sizes=[8, 12, 16, 24], depths=[1, 1, 1, 1], image_size=32)
SWIN = transformers.SwinConfig(image_size=32, patch_size=4, embed_dim=12, depths=[1, 1], num_heads=[2, 2], window_size=4)


def set_up(folder, channels=1, task=None, targets=None, n=18):
    """A model with LoRA layers, a plain copy of it, the encoded pictures and clients of several sizes."""
    task = task or ImageClassification()
    model, encoder, checkpoint = task.load(str(folder), LABELS, 0)
    plain, head = copy.deepcopy(model), head_modules(model, checkpoint.new)
    pixels, labels = tiny_pictures(n)
    cells = list(map(image_reader(None), pixels))
    examples = task.encode(encoder, {"image": cells, "label": labels.tolist()}, 128)
    adapted = AdaptedModel(model, Scaling(16.0), targets, head=head, classes=len(LABELS))
    starts = [start_of(adapted, i) for i in range(3)]
    jobs = [
        Job(Fit(start, frozenset("baw")), torch.tensor(own), seed=i, shared_order_seed=9)
        for i, (start, own) in enumerate(zip(starts, (range(9), range(9, 12), range(12, 18)), strict=True))
    ]
    return SimpleNamespace(
        task=task, encoder=encoder, plain=plain, pixels=pixels, examples=examples, adapted=adapted, jobs=jobs, labels=labels
    )


def start_of(adapted, seed):
    rng = torch.Generator().manual_seed(seed)
    factors = {n: LowRank(torch.randn(p.b.shape, generator=rng) / 9, p.a) for n, p in lora_init(adapted.spec, 2, 2).items()}
    return {**factors, **{name: Dense(w) for name, w in adapted.spec.head.items()}}


def trained(setup, jobs, max_tokens=1000, **more):
    settings = SETTINGS.model_copy(update=more)
    return train_together(setup.adapted, setup.task, setup.examples, jobs, settings, max_tokens)


def plain_loop(setup, job, mirrored=lambda n: [False] * n):
    """PEFT's model, trained as anybody would write it on the processor's own output for Pillow's images."""
    names = [name for name, part in job.request.start.items() if isinstance(part, LowRank)]
    twin = peft.get_peft_model(
        copy.deepcopy(setup.plain),
        peft.LoraConfig(r=2, lora_alpha=16, target_modules=names, modules_to_save=["classifier"]),
    ).train()
    for name in names:
        layer, part = twin.get_submodule(f"base_model.model.{name}"), job.request.start[name]
        layer.lora_A["default"].weight.data.copy_(part.a)
        layer.lora_B["default"].weight.data.copy_(part.b / 8)
    optimizer = torch.optim.AdamW([x for x in twin.parameters() if x.requires_grad], lr=SETTINGS.lr, weight_decay=0.0)
    order, losses = generator(job.seed, "order"), []
    for index in range(SETTINGS.epochs):
        losses = []
        batches = epoch(
            torch.ones(len(job.rows), dtype=torch.long), 4, True, order, generator(job.shared_order_seed, "pace", index)
        )
        for batch in batches:
            rows = job.rows[batch].tolist()
            images = [Image.fromarray(setup.pixels[row]).convert(setup.encoder.mode) for row in rows]
            turned = [
                x.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if y else x
                for x, y in zip(images, mirrored(len(rows)), strict=True)
            ]
            pixel_values = torch.from_numpy(np.stack(setup.encoder.processor(turned, return_tensors="np")["pixel_values"]))
            loss = twin(pixel_values=pixel_values.float(), labels=torch.from_numpy(setup.labels[rows])).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses += [loss.item()] * len(rows)
    found = {name.removeprefix("base_model.model."): x for name, x in peft.get_peft_model_state_dict(twin).items()}
    adapter = {name: Dense(found[name]) for name in job.request.start if name not in names}
    adapter |= {n: LowRank(found[f"{n}.lora_B.weight"] * 8, found[f"{n}.lora_A.weight"]) for n in names}
    return adapter, sum(losses) / len(losses)


@pytest.mark.parametrize("channels", [1, 3])
def test_one_client_trains_as_a_plain_peft_loop_on_the_processor_s_output(channels, tmp_path):
    setup = set_up(tiny_vit(tmp_path, channels))
    (found,) = trained(setup, setup.jobs[:1])
    expected, loss = plain_loop(setup, setup.jobs[0])
    assert_close(pack(found.adapter), pack(expected), rtol=1e-4, atol=1e-5)
    assert found.loss == pytest.approx(loss, rel=1e-5)


def test_half_of_the_images_are_mirrored_in_training_by_the_client_s_own_generator(tmp_path):
    setup = set_up(tiny_vit(tmp_path), task=ImageClassification(augment="flip"))
    draws, seen = generator(setup.jobs[0].seed, "augment"), []

    def mirrored(n):
        seen.append((torch.randint(1 << 31, (n,), generator=draws) % 2 == 1).tolist())
        return seen[-1]

    expected, _ = plain_loop(setup, setup.jobs[0], mirrored)
    (found,) = trained(setup, setup.jobs[:1])
    assert_close(pack(found.adapter), pack(expected), rtol=1e-4, atol=1e-5)
    assert {True, False} == {one for batch in seen for one in batch}
    cut = trained(setup, setup.jobs[:1], max_tokens=3, accumulate=True)[0]
    assert_close(pack(cut.adapter), pack(expected), rtol=1e-4, atol=1e-5)
    rows = torch.arange(4)
    plain, _ = setup.examples.batch(rows, torch.device("cpu"))
    turned, _ = setup.examples.batch(rows, torch.device("cpu"), torch.tensor([0, 1, 2, 3]))
    assert_close(turned["pixel_values"][[0, 2]], plain["pixel_values"][[0, 2]], rtol=0, atol=0)
    assert_close(turned["pixel_values"][[1, 3]], plain["pixel_values"][[1, 3]].flip(-1), rtol=0, atol=0)


@pytest.mark.parametrize("augment", ["none", "flip"])
def test_random_crops_are_all_parts_of_the_padded_image_equally_often(augment, tmp_path):
    setup = set_up(tiny_vit(tmp_path), task=ImageClassification(augment=augment, crop_padding=2), n=3)
    count, pixels = 2 * 25, setup.examples.features["pixel_values"][0]
    rows, draws = torch.zeros(count, dtype=torch.long), torch.arange(count)
    keeping = replace(setup.examples, decode=None)
    found = keeping.batch(rows, torch.device("cpu"), draws)[0]["pixel_values"][:, 0].numpy()
    padded = np.pad(pixels.numpy(), ((0, 0), (2, 2), (2, 2)))
    parts = [padded[:, top : top + 28, left : left + 28] for top in range(5) for left in range(5)]
    others = [part[:, :, ::-1] for part in parts] if augment == "flip" else parts
    assert Counter(x.tobytes() for x in found) == Counter(x.tobytes() for x in [*parts, *others])
    unchanged = keeping.batch(rows, torch.device("cpu"))[0]["pixel_values"]
    assert_close(unchanged, pixels.expand_as(unchanged), rtol=0, atol=0)


def test_a_padding_as_large_as_the_images_is_rejected(tmp_path):
    with pytest.raises(
        UserError, match=r"^task.crop_padding = 28: the model's images have 28 x 28 pixels; set .* most 27$"
    ):
        set_up(tiny_vit(tmp_path), task=ImageClassification(crop_padding=28))


def test_encoding_holds_no_more_than_the_pixels_of_the_model_s_size_beside_the_images(tmp_path):
    """Images of 28 x 28 pixels with three channels for a model of one: their files are three times as large."""
    task = ImageClassification()
    _, encoder = task.outline(str(tiny_vit(tmp_path)), LABELS)
    noise = np.random.default_rng(0).integers(0, 256, (1500, 28, 28, 3), np.uint8)
    rows = {"image": list(map(image_reader(None), noise)), "label": [0] * len(noise)}
    examples = column_values(datasets.Dataset.from_dict(rows))
    task.encode(encoder, column_values(datasets.Dataset.from_dict(rows).select([0])), 128)  # imports what it needs
    tracemalloc.start()
    try:
        found = task.encode(encoder, examples, 128).features["pixel_values"]
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert found.numel() == 1500 * 28 * 28 and found.dtype == torch.uint8
    assert most < 1.5 * found.numel()


MODELS = {
    "vit": lambda folder: tiny_vit(folder, 3),
    "convnext": lambda folder: tiny_vision(folder, CONVNEXT),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", MODELS)
def test_clients_trained_in_one_step_get_what_each_gets_alone(kind, tmp_path):
    targets = {"convnext": ["pwconv1", "pwconv2"]}.get(kind)
    setup = set_up(MODELS[kind](tmp_path), task=ImageClassification(augment="flip"), targets=targets)
    assert safe_clients_per_step(setup.adapted, setup.task, setup.encoder, 3, 128) == 3
    alone = [trained(setup, [job])[0] for job in setup.jobs]
    for max_tokens in (1000, 5):
        for one, other in zip(trained(setup, setup.jobs, max_tokens), alone, strict=True):
            assert_close(pack(one.adapter), pack(other.adapter), rtol=1e-3, atol=2e-5)
            assert one.loss == pytest.approx(other.loss, rel=1e-4)


PROCESSORS = {
    "as large": vit_processor(1),
    "larger": vit_processor(3, size={"height": 40, "width": 36}),
    "cropped": vit_processor(3, size={"shortest_edge": 32}, do_center_crop=True, crop_size={"height": 28, "width": 28}),
    "not normalized": vit_processor(3, do_normalize=False),
    "not rescaled": vit_processor(3, do_rescale=False),
    "other scale": vit_processor(1, rescale_factor=1 / 127.5, image_mean=[1.0], image_std=[1.0]),
}


@pytest.mark.parametrize("kind", PROCESSORS)
def test_pixels_are_kept_as_bytes_and_become_the_processor_s_output(kind, tmp_path):
    processor = PROCESSORS[kind]
    channels = len(processor.image_mean)
    tiny_vit(tmp_path, channels)
    processor.save_pretrained(tmp_path)
    _, encoder = ImageClassification().outline(str(tmp_path), LABELS)
    images = [Image.fromarray(one).convert("RGB" if channels == 3 else "L") for one in tiny_pictures(3, (50, 44))[0]]
    expected = torch.from_numpy(np.stack(processor(images, return_tensors="np")["pixel_values"])).float()
    pixels = encoder.pixels(images, len(images))
    assert pixels.dtype == torch.uint8 and pixels.shape == expected.shape
    assert_close(encoder.normalized(pixels), expected, rtol=1e-5, atol=1e-5)


def test_a_model_without_a_processor_gets_images_of_its_size_from_minus_one_to_one_and_the_user_is_told(tmp_path):
    _, encoder, checkpoint = ImageClassification().load(str(tiny_vit(tmp_path, 3, processor=False)), LABELS, 0)
    found = encoder.normalized(encoder.pixels([Image.new("L", (9, 9), value) for value in (0, 255)], 2))
    assert_close(found, torch.tensor([-1.0, 1.0])[:, None, None, None].expand(2, 3, 28, 28))
    assert "28 x 28" in checkpoint.notes[0] and "-1..1" in checkpoint.notes[0]


def several_sizes(folder):
    vit_processor(3, do_resize=False).save_pretrained(tiny_vit(folder, 3))


def other_channels(folder):
    vit_processor(3).save_pretrained(tiny_vit(folder, 1))


def damaged(folder):
    (tiny_vit(folder, 3) / "preprocessor_config.json").write_text("{")


def batch_norm(folder):
    tiny_vision(folder, transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1]))


REJECTED = {
    several_sizes: "set do_resize, size, image_mean and image_std in preprocessor_config.json",
    other_channels: "into one of 1 channels and of one size",
    damaged: "cannot be loaded",
    batch_norm: "'resnet' have batch normalization",
}


@pytest.mark.parametrize("make", REJECTED)
def test_a_processor_or_a_model_that_does_not_fit_is_rejected_in_one_line(make, tmp_path):
    make(tmp_path)
    for load in (
        lambda: ImageClassification().load(str(tmp_path), LABELS, 0),
        lambda: ImageClassification().outline(str(tmp_path), LABELS),
    ):
        with pytest.raises(UserError, match=REJECTED[make]) as rejected:
            load()
        assert "\n" not in str(rejected.value)


def test_only_images_can_be_augmented():
    with pytest.raises(UserError, match=r"task.augment is not supported by task.kind = 'classification'"):
        build({"task": {"kind": "classification", "augment": "flip"}})


def test_stochastic_depth_is_switched_off_and_the_user_is_told(tmp_path):
    setup_model, _, checkpoint = ImageClassification().load(str(tiny_vision(tmp_path, SWIN)), LABELS, 0)
    pixel_values = torch.zeros(2, 3, 32, 32)
    setup_model.train()
    with torch.no_grad():
        assert_close(setup_model(pixel_values).logits, setup_model(pixel_values).logits, rtol=0, atol=0)
    assert any("stochastic depth" in note for note in checkpoint.notes)


def test_a_model_without_default_targets_or_without_linear_modules_is_rejected_with_what_it_has(tmp_path):
    tiny_vision(tmp_path / "convnext", CONVNEXT)
    tiny_vision(tmp_path / "pool", transformers.PoolFormerConfig(hidden_sizes=[8, 8, 8, 8], depths=[1, 1, 1, 1]))
    for kind, message in (("convnext", "available: pwconv1, pwconv2"), ("pool", "no linear modules outside their head")):
        what = experiment(tmp_path, model=str(tmp_path / kind))
        with pytest.raises(UserError, match=message):
            check(what, FederatedData.make(what))


def experiment(home, **tables):
    """A run of three clients; the first call writes its model and its images."""
    if not (home / "rows.npz").exists():
        tiny_vit(home / "vit")
        tiny_npz(home / "rows.npz", 48)
        (home / "labels.json").write_text(json.dumps(LABELS))
    given = {
        "model": str(home / "vit"),
        "data": str(home / "rows.npz"),
        "task": "image-classification",
        "rounds": 1,
        "clients": {"count": 3, "partition": "iid"},
        "train": {"lr": 0.01, "device": "cpu"},
        **tables,
    }
    return Experiment.model_validate(given)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("images")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ce-lora", "flora", "fed-dpa"])
def test_features_base_updates_and_frozen_extra_adapters_work_with_images(name, home, tmp_path):
    result = run(experiment(home, method={"name": name, "rank": 2}), tmp_path / "run", progress=False)
    assert np.isfinite(result.rows[-1].train_loss) and np.isfinite(result.rows[-1].clients["loss"].mean)


@pytest.mark.slow
def test_a_run_learns_and_resumes_bit_for_bit_with_mirrored_images(home, tmp_path):
    settings = {"task": {"kind": "image-classification", "augment": "flip"}, "method": {"name": "fedit", "rank": 4}}
    settings |= {"train": {"lr": 0.02, "epochs": 4, "device": "cpu"}, "clients": {"count": 2, "partition": "dirichlet"}}
    whole = run(experiment(home, **settings, rounds=2), tmp_path / "whole", progress=False)
    run(experiment(home, **settings, rounds=1), tmp_path / "part", progress=False)
    part = resume(tmp_path / "part", progress=False, overrides=["rounds=2"])
    assert_same_runs(whole.folder, part.folder)
    assert whole.rows[-1].global_["loss"] < whole.rows[0].global_["loss"] - 0.1


def test_the_base_can_compute_in_bf16(home, tmp_path):
    train = {"lr": 0.01, "device": "cpu", "precision": "bf16"}
    rows = run(experiment(home, train=train), tmp_path / "run", progress=False).rows
    plain = run(experiment(home), tmp_path / "plain", progress=False).rows
    assert rows[-1].train_loss == pytest.approx(plain[-1].train_loss, rel=0.05)


def test_the_exported_adapter_and_the_merged_model_compute_what_the_run_does(home, tmp_path, monkeypatch):
    folder = run(experiment(home), tmp_path / "run", progress=False).folder
    images = [Image.fromarray(one) for one in tiny_pictures(4, (35, 30))[0]]
    with opened(folder) as (run_folder, settings):
        done, state = run_folder.restore()
        session = Session.make(settings, FederatedData.make(settings))
        session.adapted.load_clients([session.adapters(state, run_folder, done)[""]])
        encoder = session.tokenizer
        with torch.no_grad():
            expected = session.adapted.model.eval()(pixel_values=encoder.normalized(encoder.pixels(images, 4))).logits
    (code,) = re.findall(r"```python\n(.*?)```", (folder / "adapter" / "README.md").read_text(), re.DOTALL)
    monkeypatch.chdir(folder / "adapter")
    loaded = {}
    exec(code, loaded)
    export(folder, "merged", tmp_path / "merged")
    merged = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "merged")
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "merged")
    assert loaded["model"].config.id2label == merged.config.id2label == dict(enumerate(LABELS))
    for model, reader in ((loaded["model"], loaded["processor"]), (merged, processor)):
        inputs = reader(images, return_tensors="pt")
        with torch.no_grad():
            assert_close(model.eval()(**inputs).logits, expected, rtol=1e-4, atol=1e-5)


def test_a_client_on_another_machine_trains_on_its_own_file(home, tmp_path):
    own = FederatedData.of_client(experiment(home), "clinic", str(tiny_npz(tmp_path / "own.npz", 12)), 2, LABELS)
    check(experiment(home), own)
    session = Session.make(experiment(home), own)
    assert [(client.id, client.examples) for client in session.clients] == [("clinic", 11)]
    assert set(session.trainer.examples.targets.tolist()) == {0, 1, 2}


def test_a_model_in_memory_is_passed_with_its_image_processor(home, tmp_path):
    model = transformers.AutoModelForImageClassification.from_pretrained(experiment(home).model, num_labels=3)
    rows = [{"image": x, "label": int(y)} for x, y in zip(*tiny_pictures(24), strict=True)]
    settings = experiment(home).model_copy(update={"data": Experiment().data})
    result = run(settings, tmp_path / "run", progress=False, data=rows, model=model, tokenizer=vit_processor(1))
    assert (result.folder / "model" / "preprocessor_config.json").is_file()


def test_a_changed_processor_is_a_changed_model(home, tmp_path):
    tiny_vit(tmp_path / "vit")
    run(experiment(home, model=str(tmp_path / "vit")), tmp_path / "run", progress=False)
    vit_processor(1, image_mean=[0.1]).save_pretrained(tmp_path / "vit")
    with pytest.raises(UserError, match=r"preprocessor_config\.json"):
        resume(tmp_path / "run", progress=False, overrides=["rounds=2"])


CLIP = transformers.CLIPConfig(vision_config={"image_size": 28, "patch_size": 7, **SMALL}, text_config=SMALL)


@pytest.mark.parametrize(("config", "width"), [(CONVNEXT, 24), (SWIN, 24), (CLIP, 32)])
def test_every_architecture_has_features_of_the_last_layer_s_width(config, width, tmp_path):
    setup = set_up(tiny_vision(tmp_path, config), targets="all-linear")
    inputs, _ = setup.examples.batch(torch.arange(4), torch.device("cpu"))
    found = setup.task.features(setup.adapted.model.eval(), inputs)
    assert found.shape == (4, width) and setup.adapted.spec.features == width
    assert found.std(0).min() > 0


def test_the_features_are_the_first_token_that_the_head_reads(tmp_path):
    setup = set_up(tiny_vit(tmp_path))
    inputs, targets = setup.examples.batch(torch.arange(4), torch.device("cpu"))
    found = setup.task.features(setup.plain, inputs)
    logits = setup.plain.classifier(found)
    assert found.shape == (4, setup.adapted.spec.features)
    assert_close(
        functional.cross_entropy(logits, targets, reduction="none"), setup.task.losses(setup.plain, inputs, targets)[0]
    )
