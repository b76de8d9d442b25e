"""The sections of an experiment, but for `method`."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, model_validator

from fedlora.ranges import (
    AtMost,
    FiniteFloat,
    Fraction,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Range,
    UnitInterval,
)

RankNames = Literal["uniform", "heavy-tail-light", "heavy-tail-strong", "normal"]
Schedule = Literal["constant", "linear", "cosine"]


class Section(BaseModel):
    """A table of `experiment.toml`."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Data(Section):
    """The source of the examples, and the names of their columns. `data = "FILE"` sets only `data.source`."""

    source: str = "stdlib-docs"
    """`stdlib-docs` or `stdlib-signatures`, which every Python has (docs/data.md), a hub data set (`name` or
    `name:subset`), or a local file: JSON Lines (.jsonl, .json), CSV, both also with .gz, Parquet, or NumPy arrays (.npz). A
    file `labels.json` in the same folder, a list of names, gives the names of numeric labels (docs/data.md). `none`: a
    server without examples, which needs `data.labels` if the task has labels. `memory`: rows passed from Python
    (docs/python.md)."""
    test: str | None = None
    """The test set: a file, or the name of a split of the hub data set. If omitted, the split `test` of a hub data set that
    has one, else a random part of the examples.

    Example: "test.jsonl"
    """
    test_fraction: Annotated[float, Range(gt=0, lt=1)] = 0.1
    """The fraction of the examples that becomes the test set, if there is no other test set."""
    text: str = "text"
    """The column with the text."""
    text_pair: str | None = None
    """The column with a second text, for tasks on pairs. If omitted, there is one text.

    Example: "question"
    """
    image: str = "image"
    """The column with the image, for tasks on images: a path relative to the file, or the image itself (docs/data.md)."""
    label: str = "label"
    """The column with the label, or, in a regression, with the score."""
    tokens: str = "tokens"
    """The column with the words of a text that is tagged: a list."""
    tags: str = "tags"
    """The column with the tags: a list with one for each word."""
    prompt: str | None = None
    """The column with the prompt of a language model or an encoder-decoder, which it does not learn to write, or with the
    question of multiple choice.

    Example: "prompt"
    """
    response: str | None = None
    """The column with the answer to the prompt.

    Example: "response"
    """
    messages: str | None = None
    """The column with conversations: lists of messages, each with `role` and `content`. A language model learns the
    messages of the assistant, in the form of the tokenizer's chat template.

    Example: "messages"
    """
    options: str | None = None
    """The column with the options of a question: a list of two texts or more.

    Example: "choices"
    """
    answer: str | None = None
    """The column with the right option: its text, or its index, counted from 0.

    Example: "answer"
    """
    user: str | None = None
    """The column that names the owner of an example; the natural partition needs it.

    Example: "branch"
    """
    task: str | None = None
    """The column that names the task of an example. A client takes part once for each of its tasks, as CLIENT/TASK. If
    omitted, there is one task.

    Example: "kind"
    """
    rows: PositiveInt | None = None
    """The number of training examples to use, chosen at random. If omitted, all.

    Example: 1000
    """
    test_rows: PositiveInt | None = None
    """The number of test examples to use, chosen at random. If omitted, all.

    Example: 200
    """
    labels: list[str] | None = None
    """The labels' names, in the order of their numbers. If omitted, those given with the data, else those that occur in
    the training and the test set (docs/data.md).

    Example: ["negative", "positive"]
    """


_ONLY_OF = {
    "label_smoothing": ("classification", "image-classification"),
    "class_weights": ("classification", "image-classification"),
    "augment": ("image-classification",),
    "crop_padding": ("image-classification",),
    "prefix": ("seq2seq",),
    "max_target_length": ("seq2seq",),
    "objective": ("multiple-choice",),
    "all_subwords": ("tagging",),
    "center": ("regression",),
    "separator": ("causal-lm",),
    "chat": ("causal-lm",),
}
"""Settings of `[task]` that only some kinds of tasks have."""


class Task(Section):
    """The task that the model is fine-tuned for (docs/tasks.md). `task = "KIND"` sets only `task.kind`."""

    kind: Literal[
        "classification", "regression", "image-classification", "tagging", "multiple-choice", "causal-lm", "seq2seq"
    ] = "classification"
    """The kind of task. classification: a text, or a pair of texts, has one of the labels. regression: it has a score.
    image-classification: an image has one of the labels. tagging: each word has a tag, such as those of named entities.
    multiple-choice: a language model answers a question by the likelihoods of its options. causal-lm: a language model
    learns to answer prompts (`data.prompt` and `data.response`), to continue conversations (`data.messages`), or, with
    neither, to write texts (`data.text`). seq2seq: an encoder-decoder, such as T5 or BART, learns to answer prompts."""
    center: FiniteFloat = 0.0
    """A number near the scores of a regression, such as their mean. It changes only the rounding of the Pearson
    correlation, and is needed if the scores differ by less than a ten-thousandth of their size."""
    objective: Literal["choice", "answer"] = "choice"
    """The training loss of multiple choice. choice: the cross-entropy of the right option among those of its question, by
    their log-likelihoods. answer: that of the tokens of the right option alone, as in instruction tuning."""
    all_subwords: bool = False
    """Whether tagging is trained on all tokens of a word, not only the first; with a B- tag, the others have the I- tag.
    Predictions are those at the first token."""
    label_smoothing: Annotated[float, Range(ge=0, lt=1)] = 0.0
    """The fraction of the target probability of a classification that is spread evenly over all labels, in training."""
    class_weights: list[PositiveFloat] | None = None
    """The weight of each label in the training loss of a classification, in the order of the labels' numbers. A batch's
    loss is the weighted mean, as in torch. If omitted, all weights are 1.

    Example: [1.0, 4.0]
    """
    augment: Literal["none", "flip"] = "none"
    """How images are changed at random in training. flip: half of them are mirrored, left to right."""
    crop_padding: NonNegativeInt = 0
    """The padding of random crops in training, in pixels of the model's images: an image is padded with black on all sides,
    and a part of the original size is cut out at random. 4 is usual for images of 32 x 32 pixels. 0: no random crops."""
    separator: str = "\n"
    """The text between the prompt and the answer of a language model."""
    chat: bool = False
    """Whether a language model gets prompt and answer as a conversation, in the form of the tokenizer's chat template."""
    prefix: str = ""
    """The text before each prompt of an encoder-decoder, such as `sst2 sentence: `."""
    max_target_length: PositiveInt = 128
    """Tokens of an answer of an encoder-decoder; longer answers are truncated. Its prompts have
    `train.max_length`."""

    @model_validator(mode="after")
    def _all_used(self) -> "Task":
        for key, kinds in _ONLY_OF.items():
            if self.kind not in kinds and getattr(self, key) != type(self).model_fields[key].default:
                raise ValueError(f"task.{key} is not supported by task.kind = {self.kind!r}")
        return self


class Clients(Section):
    """The partition of the examples among the clients."""

    count: PositiveInt | None = None
    """The number of clients. If omitted, 10, or, in the natural partition, one for each user. In the natural partition
    a number selects the users with the most examples.

    Example: 20
    """
    partition: Literal["iid", "dirichlet", "pathological", "shards", "natural", "length", "clusters"] = "dirichlet"
    """How the examples are partitioned. iid: at random. dirichlet: random label proportions for each client.
    pathological: a few labels per client. shards: contiguous pieces of the data sorted by label. natural: by the column
    `data.user`. length: by the number of characters, the shortest for the first client. clusters: as dirichlet, with
    clusters of the base model's embeddings in place of the labels, in every task. In a regression, five equal intervals
    between the smallest and the largest score take the place of the labels; for an encoder-decoder, the answers do, if
    they are few (docs/tasks.md)."""
    alpha: PositiveFloat = 0.5
    """Concentration parameter of the dirichlet and the clusters partition: the smaller, the more the clients' labels, or
    clusters, differ."""
    clusters: Annotated[int, Range(ge=2)] = 10
    """The number of clusters of the clusters partition."""
    min_size: PositiveInt = 2
    """The minimum number of examples of a client, including held-out ones."""
    classes: PositiveInt = 2
    """The number of labels per client in the pathological partition."""
    shards: PositiveInt = 2
    """The number of shards per client in the shards partition."""
    held_out: Annotated[float, Range(ge=0, lt=1)] = 0.1
    """The fraction of each client's examples that is held out for its evaluation. With `privacy.unit = "record"`, which
    allows no such scores, it is ignored, and none are."""
    ranks: list[PositiveInt] | RankNames | None = None
    """Each client's LoRA rank: a list with one rank per client, or a named distribution up to `method.rank`. If
    omitted, `method.rank` for all. Different ranks require a method that supports mixed ranks.

    Example: "uniform"
    """

    @property
    def size(self) -> int | None:
        """The number of clients, None if it depends on the data."""
        return self.count if self.count is not None or self.partition == "natural" else 10


class Lora(Section):
    """The modules with LoRA factors, and the scale of the factors."""

    alpha: PositiveFloat = 16.0
    """PEFT's `lora_alpha`: the update is scaled by alpha / rank."""
    rslora: bool = False
    """Scale by alpha / sqrt(rank) instead of alpha / rank."""
    dora: bool = False
    """PEFT's `use_dora`: also trains magnitudes m, the norms of the changed weight's rows. W becomes diag(m / n) (W + b a),
    where n are the norms of the rows of W + b a. Only some methods support it (see their pages). With any of them, the
    average of factors and magnitudes is not that of the clients' weights. vLLM and llama.cpp need a merged model."""
    init: Literal["uniform", "gaussian", "pissa"] = "uniform"
    """The initial factors, as PEFT's `init_lora_weights`. uniform: PEFT's default, b = 0. gaussian: a normal a, b = 0.
    pissa: the principal part of the pretrained weight, which the base then lacks; weight decay would shrink it. Not all
    methods support it (see their pages)."""
    dropout: Annotated[float, Range(ge=0, lt=1)] = 0.0
    """Dropout probability on the input of the factors."""
    targets: list[str] | str | None = None
    """PEFT's `target_modules`: a list of names or name suffixes, or one regular expression, or "all-linear". If
    omitted, PEFT's defaults for the architecture. A list can also name embeddings and the output layer of a language model,
    such as "embed_tokens" and "lm_head".

    Example: ["query", "value"]
    """
    rank_pattern: dict[str, PositiveInt] = {}
    """PEFT's `rank_pattern`: fixed ranks of single modules, as name, name suffix or regular expression = rank.

    Example: { "layer.0.attention.self.query" = 4 }
    """
    alpha_pattern: dict[str, PositiveFloat] = {}
    """PEFT's `alpha_pattern`: the alphas of single modules, as name, name suffix or regular expression = alpha.

    Example: { "layer.0.attention.self.query" = 32.0 }
    """
    layers: list[NonNegativeInt] | None = None
    """PEFT's `layers_to_transform`: the layers of the model with LoRA factors, counted from 0. If omitted, all.

    Example: [10, 11]
    """


class Train(Section):
    """The local training on each client."""

    optimizer: Literal["adamw", "sgd"] = "adamw"
    """The optimizer of the local training; it starts with a new state in each round."""
    lr: PositiveFloat = 1e-3
    """The learning rate of the local training."""
    schedule: Schedule = "constant"
    """The learning rate over the steps of a client in one round, as transformers' schedule of that name: constant, or
    decreasing to 0. Each client's schedule spans its own number of steps."""
    warmup: NonNegativeInt | Annotated[float, Range(ge=0, lt=1)] = 0
    """The number of steps at the start of each client's round over which the learning rate increases linearly from 0, or,
    below 1, their fraction of its steps, rounded up. The first of them has the learning rate 0."""
    round_schedule: Schedule = "constant"
    """The learning rate over the rounds, by which `train.schedule` is multiplied: constant, or decreasing from the first
    round on. Then `rounds` of a run cannot be increased."""
    min_lr_rate: UnitInterval = 0.0
    """The fraction of `train.lr` to which `train.round_schedule` decreases, reached after the last round."""
    weight_decay: NonNegativeFloat = 0.0
    """The optimizer's weight decay. Biases and weights of normalization layers do not decay. Some methods need 0 (see their
    pages)."""
    beta1: Annotated[float, Range(ge=0, lt=1)] = 0.9
    """The decay of adamw's mean of gradients."""
    beta2: Annotated[float, Range(ge=0, lt=1)] = 0.999
    """The decay of adamw's mean of squared gradients."""
    eps: PositiveFloat = 1e-8
    """The number that adamw adds to the root of the mean square, against division by zero."""
    momentum: Annotated[float, Range(ge=0, lt=1)] = 0.0
    """The momentum of sgd."""
    nesterov: bool = False
    """Whether the momentum of sgd is Nesterov's."""
    clip_norm: PositiveFloat | None = None
    """The largest gradient norm; larger gradients are scaled down to it. If omitted, gradients are not clipped.

    Example: 1.0
    """
    epochs: PositiveInt = 1
    """The number of passes over a client's examples in each round."""
    max_steps: PositiveInt | None = None
    """The number of steps of each client in each round, which may be more than an epoch. If given, `train.epochs` has no
    effect.

    Example: 10
    """
    batch_size: PositiveInt = 8
    """Training examples per batch; the expected number with `privacy.unit` = record."""
    reduction: Literal["token", "example"] = "token"
    """The mean loss that a client's step reduces. token: over all targets of its batch, so that examples with many weigh
    more. example: over the examples, of each one's mean. They agree if all examples have equally many targets, as in
    classification and regression. With `privacy.unit` = record it is always over the examples."""
    batches: Literal["auto", "random", "by-length"] = "auto"
    """How examples are grouped into batches. random: at random. by-length: examples of similar length, which saves
    padding but may cost accuracy. auto: random if padding is avoided (see `train.packed`), else by-length. With
    `privacy.unit` = record each example is in a batch with the same probability, independently of all others."""
    packed: bool = True
    """Whether to avoid padding, if the model supports it. Affects results only by rounding."""
    clients_per_step: PositiveInt = 16
    """The number of clients trained in one step. Affects results only by rounding. It is reduced to 1 for models in
    which clients would influence each other, which is tested when the model is loaded."""
    activation_memory_mb: PositiveInt = 256
    """The activation memory of one forward and backward pass, in MB. A step with many clients is split into several
    passes; a client's batch only with `train.accumulate`."""
    accumulate: bool = False
    """Whether a client's batch beyond `train.activation_memory_mb` is split into several passes, whose gradients are
    accumulated to that of the whole batch. Affects results only by rounding, and by the choice of dropout masks."""
    gradient_checkpointing: bool = False
    """Whether the activations of the model's blocks are not stored, but computed again in the backward pass, which takes
    longer and saves memory. Affects results only by rounding, if more clients then share a pass."""
    max_length: PositiveInt = 128
    """Tokens per example; longer examples are truncated: prompts of language models on the left, all other texts on the
    right. The answers of an encoder-decoder have `task.max_target_length`."""
    precision: Literal["auto", "fp32", "bf16"] = "fp32"
    """The precision of the frozen base; factors, heads, optimizer and base updates are fp32. auto: bf16 if the
    processor has matrix instructions for it. Without these, bf16 is up to a hundred times slower than fp32."""
    device: str = "auto"
    """The device: `auto`, `cpu`, `cuda` or `cuda:1`."""
    devices: PositiveInt | Literal["auto"] = 1
    """The number of devices that train clients in parallel, each with its own process and model. auto: all GPUs, or one
    CPU. Affects results only by rounding. Processes on the CPU share its cores."""

    @model_validator(mode="after")
    def _all_used(self) -> "Train":
        other = {"adamw": ("momentum", "nesterov"), "sgd": ("beta1", "beta2", "eps")}[self.optimizer]
        for key in other:
            if getattr(self, key) != type(self).model_fields[key].default:
                raise ValueError(f"train.{key} is not supported by train.optimizer = {self.optimizer!r}")
        if self.nesterov and not self.momentum:
            raise ValueError("train.nesterov needs train.momentum above 0")
        if self.min_lr_rate and self.round_schedule == "constant":
            raise ValueError("train.min_lr_rate needs train.round_schedule = 'linear' or 'cosine'")
        return self


class Sampling(Section):
    """The sampling of clients in a round, and the limits of accepted uploads."""

    fraction: Fraction = 1.0
    """The fraction of the clients sampled in each round; at least one client. With `privacy.unit = "client"`, the
    probability with which each client takes part in a round, which may have none."""
    min_replies: Annotated[PositiveInt, AtMost("clients.count")] = 1
    """The number of accepted uploads that a round needs; with fewer, the round is repeated with other clients."""
    attempts: PositiveInt = 3
    """The number of attempts of a round before the run stops."""
    max_norm: PositiveFloat | None = None
    """The largest Frobenius norm, over all tensors, of the difference between an upload and what it would be without
    training; uploads beyond it are rejected. If omitted, any finite norm is accepted.

    Example: 10.0
    """
    check_cohort: bool | None = None
    """Whether each upload is compared with the others of its round, if there are at least three. If the norm of its
    change, or the spectral norm of the change of a weight, is above 3 times the median, the change is scaled down to
    that; above 30 times the median, the upload is rejected. No weight is above 2 times the median weight. If omitted: in
    deployments without `privacy.unit`, not in simulations.

    Example: true
    """
    max_examples: PositiveInt = 1_000_000
    """The largest number of examples that a client may report, which is its weight in the mean; uploads beyond it are
    rejected."""


class Evaluate(Section):
    """The schedule of evaluations, and the clients that are evaluated."""

    every: PositiveInt = 1
    """The number of rounds between evaluations; the last round is always evaluated."""
    before: bool = True
    """Whether the model is also evaluated before the first round, as round 0 of the log. No clients are evaluated then if
    `evaluate.clients` is chosen."""
    clients: Literal["all", "chosen", "none"] = "all"
    """The clients that are evaluated on their held-out examples: all, those whose uploads were accepted in the round
    (chosen), or none."""
    batch_size: PositiveInt = 64
    """Examples per batch of an evaluation."""
    generate: NonNegativeInt = 0
    """The number of test examples whose answers are generated, greedily, with each evaluation on the server; for tasks that
    answer prompts. The answers are stored in `samples/` of the run directory, with prompts and references. Examples with
    the same prompt are one, with several references."""
    max_new_tokens: PositiveInt = 128
    """The largest number of tokens of a generated answer."""
    text_metrics: list[Literal["exact-match", "squad", "gsm8k", "rouge", "bleu", "chrf"]] = ["exact-match", "rouge"]
    """The metrics of generated answers (docs/tasks.md)."""
    stop_after: PositiveInt | None = None
    """The number of evaluations without improvement of `evaluate.metric` after which the run stops. The exported adapter is
    that of the best round, which may be the model before training. If omitted, all rounds are run, and the last adapter is
    exported.

    Example: 3
    """
    metric: str = "clients.loss.mean"
    """The metric of `evaluate.stop_after` on the clients' held-out examples, as a round's row names it:
    `clients.NAME.mean` or `clients.NAME.worst_decile`. The test set must not choose the round."""

    @model_validator(mode="after")
    def _can_stop(self) -> "Evaluate":
        where, *rest = self.metric.split(".")
        if where == "global":
            raise ValueError(
                f"evaluate.metric = {self.metric!r}: a test set that chooses the round no longer gives an unbiased score; "
                "use the clients' held-out examples, such as 'clients.loss.mean'"
            )
        if where != "clients" or len(rest) != 2 or rest[1] not in ("mean", "worst_decile"):
            raise ValueError(
                f"evaluate.metric = {self.metric!r}: expected 'clients.NAME.mean' or 'clients.NAME.worst_decile'"
            )
        if self.stop_after is not None and self.clients == "none":
            raise ValueError("evaluate.stop_after needs evaluate.clients = 'all' or 'chosen'")
        return self


class Deploy(Section):
    """The time that a server waits for clients on other machines."""

    deadline: PositiveFloat = 3600.0
    """The seconds after which a round continues without missing replies (see `sampling.min_replies`)."""
    wait: PositiveFloat = 600.0
    """The seconds within which `clients.count` clients must connect; otherwise the run stops."""
    poll: PositiveFloat = 0.5
    """The polling interval for replies, in seconds."""


def sections(experiment: type[BaseModel]) -> dict[str, type[BaseModel]]:
    """Maps names of TOML tables to their classes; the top level, named "", is first."""
    kinds = {name: field.annotation for name, field in experiment.model_fields.items()}
    return {"": experiment} | {
        name: kind for name, kind in kinds.items() if isinstance(kind, type) and issubclass(kind, BaseModel)
    }


def all_keys(experiment: type[BaseModel]) -> list[str]:
    """All keys that an experiment has with every method, each with its section."""
    keys = [
        f"{name}.{key}" if name else key for name, section in sections(experiment).items() for key in section.model_fields
    ]
    return ["method.rank", *keys]
