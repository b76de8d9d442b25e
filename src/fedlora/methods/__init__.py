"""Table of the methods by name, the only list of their names."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from fedlora.method import AnyMethod
from fedlora.methods.averaging import FactorAveraging
from fedlora.methods.ce_lora import CELoRA
from fedlora.methods.ditto import Ditto
from fedlora.methods.fed_dpa import FedDPA
from fedlora.methods.fed_sb import FedSB
from fedlora.methods.fedex_lora import FedExLoRA
from fedlora.methods.fedhm import FedHMLoRA
from fedlora.methods.fedlease import FedLEASE
from fedlora.methods.fedloru import FedLoRU, MFedLoRU, PFedLoRU
from fedlora.methods.fedrot_lora import FedRotLoRA
from fedlora.methods.fedrpca import FedRPCA
from fedlora.methods.fedsvd import FedSVD
from fedlora.methods.fl_tac import FLTAC
from fedlora.methods.flasc import FLASC
from fedlora.methods.flexlora import FlexLoRA, FRALoRA
from fedlora.methods.flora import FLoRA
from fedlora.methods.flora_na import FLoRANA
from fedlora.methods.frlora import FRLoRA
from fedlora.methods.fslora import FSLoRA
from fedlora.methods.hetlora import HetLoRA
from fedlora.methods.lora_a2 import LoRAA2
from fedlora.methods.lora_fair import LoRAFAIR
from fedlora.methods.ravan import Ravan

Head = Literal["frozen", "averaged", "local", "method-managed"]
Weights = Literal["examples", "uniform"]


@dataclass(frozen=True)
class Row:
    """One method: its constructor, source, traffic and properties.

    `up` and `down` are formulas for floats per adapted layer, client and round, in r (the client's rank), in, out; the head
    is sent in addition. If traffic depends on the round they are tuples, repeated cyclically. `base_update` is sent in
    addition to `down`, to a client that participated in the previous round, if that round changed the base; also in K, the
    round's clients, and R, the sum of their ranks. In all three, `rank` and other settings are the method's; E is the
    number of experts, which depends on the clients' data. For a method that sends selected values and their positions,
    `index_counts` and `index_counts_down` are the numbers of selected and of all values, per layer; they determine the
    bytes of the positions (`linalg.sparse.position_bytes`), which are sent in addition to the floats.

    `first_upload` has the floats, and the bytes of integers, that a client uploads in addition to `up` in its first
    participation, for all layers together; also in `features` and `classes`, the width of the model's last layer and the
    number of labels. It applies to clients that have all labels.

    `head` "method-managed" is for a method that manages the head itself; it is sent with the factors.

    `norms`: whether the paper trains the layer norms too; they are then part of the head.

    `weights` are the clients' weights, in the mean of the factors and of the head, unless `method.weights` is set: by
    number of examples, or the same for all.

    `exact`, `secure` and `private` are short answers, optionally followed by a colon and the reason. `secure`: whether the
    sum of all uploads suffices, so that they can be masked; by default derived from `needs_individual_uploads`.
    `private`: whether noise, in training or on the clipped upload, can cover every upload. "open" means unknown.

    `known_failures` maps the name of a law that cannot hold, for all cases or ("law, mixed ranks") for unequal ranks
    only, to the reason.
    """

    name: str
    make: Callable[..., AnyMethod]
    paper: str
    summary: str
    exact: str
    up: tuple[str, ...] = ("r * (out + in)",)
    down: tuple[str, ...] = ("r * (out + in)",)
    head: Head = "averaged"
    norms: bool = False
    weights: Weights = "examples"
    personal: bool = False
    mixed_ranks: bool = False
    needs_individual_uploads: bool = False
    secure: str = ""
    private: str = "open"
    base_update: str = "0"
    first_upload: tuple[str, str] = ("0", "0")
    index_counts: tuple[str, str] | None = None
    index_counts_down: tuple[str, str] | None = None
    known_failures: Mapping[str, str] = field(default_factory=dict)
    fixed_settings: Mapping[str, Any] = field(default_factory=dict)

    def secure_sums(self) -> str:
        """Whether the method works with secure aggregation, which reveals only sums of uploads to the server."""
        return self.secure or ("no: the server needs each upload by itself" if self.needs_individual_uploads else "yes")

    def settings(self) -> dict[str, Any]:
        """The user's settings, with their defaults."""
        return {f.name: f.default for f in fields(self.make) if f.name not in self.fixed_settings}  # type: ignore[arg-type]


_ROWS = (
    Row(
        name="fedit",
        make=FactorAveraging,
        fixed_settings={"shared": "ba", "schedule": ("ba",)},
        paper="Zhang et al. 2024, arXiv:2305.05644",
        summary="averages b and a separately",
        exact="no: off by the covariance of the factors",
        private="yes: noise enters through b and a, and through the product of both",
    ),
    Row(
        name="ffa-lora",
        make=FactorAveraging,
        fixed_settings={"shared": "b", "schedule": ("b",)},
        paper="Sun et al. 2024, arXiv:2403.12313",
        summary="freezes a common random a, trains and averages b",
        exact="yes",
        up=("r * out",),
        down=("r * out",),
        head="frozen",
        private="yes: noise enters once, through b",
    ),
    Row(
        name="rolora",
        make=FactorAveraging,
        fixed_settings={"shared": "ba", "schedule": ("b", "a")},
        paper="Chen et al. 2025, arXiv:2502.01755",
        summary="trains and averages b and a in alternate rounds",
        exact="yes, in each round",
        up=("r * out", "r * in"),
        private="yes: noise enters once in a round, in time through both factors",
    ),
    Row(
        name="fedsa-lora",
        make=FactorAveraging,
        fixed_settings={"shared": "a", "schedule": ("ba",)},
        paper="Guo et al. 2025, arXiv:2410.01463",
        summary="averages a; b and the head stay personal",
        exact="a only: there is no global model",
        up=("r * in",),
        down=("r * in",),
        head="local",
        personal=True,
        private="yes: noise on a alone, as long as nobody hands out a personal model",
    ),
    Row(
        name="local-only",
        make=FactorAveraging,
        fixed_settings={"shared": "", "schedule": ("ba",)},
        paper="a baseline, no paper",
        summary="sends nothing: each client trains b, a and its head alone",
        exact="nothing is merged",
        up=("0",),
        down=("0",),
        head="local",
        personal=True,
        private="yes: nothing leaves a client",
        known_failures={"test_a_bad_upload_is_refused_and_the_round_goes_on": "there is nothing in it that could be bad"},
    ),
    Row(
        name="flexlora",
        make=FlexLoRA,
        paper="Bai et al. 2024, arXiv:2402.11505",
        summary="averages products; each client gets the best fit of its own rank",
        exact="up to the rank: the best fit to the mean of the products",
        mixed_ranks=True,
        needs_individual_uploads=True,
        secure='dense only: with upload = "dense"',
        private="yes: noise on both factors, of which the cut to the rank removes a part",
    ),
    Row(
        name="fra-lora",
        make=FRALoRA,
        paper="Trautmann et al. 2025, arXiv:2501.06332",
        summary="averages products and factorises the mean again",
        exact="up to the rank: the best fit to the mean of the products",
        needs_individual_uploads=True,
        secure='dense only: with upload = "dense"',
        private="yes: noise on both factors, of which the cut to the rank removes a part",
        known_failures={
            "test_alpha_is_no_more_than_the_unit_of_the_updates": "the best fit is split evenly, with alpha / rank in b"
        },
    ),
    Row(
        name="flora",
        make=FLoRA,
        paper="Wang et al. 2024, arXiv:2409.05976",
        summary="stacks the factors into the base and starts from fresh ones",
        exact="yes",
        down=("0",),
        base_update="min(R * (out + in), out * in)",
        mixed_ranks=True,
        needs_individual_uploads=True,
        private="yes: but the noise stays in the base, with a rank that grows",
        known_failures={"test_identical_clients_are_as_one": "each client draws an a of its own"},
    ),
    Row(
        name="fedex-lora",
        make=FedExLoRA,
        paper="Singhal et al. 2025, arXiv:2410.09432",
        summary="averages b and a separately; what that misses goes into the base",
        exact="yes",
        base_update="min((K - 1) * r * (out + in), out * in)",
        needs_individual_uploads=True,
        secure="no: only for the factors, not for what goes into the base",
        private="yes: but products of noise stay in the base",
    ),
    Row(
        name="flora-na",
        make=FLoRANA,
        paper="Nguyen et al. 2025, arXiv:2509.26399",
        summary="combines b and a by coefficients fitted to the mean of the products",
        exact="no: between averaged factors and the best fit of the rank",
        mixed_ranks=True,
        needs_individual_uploads=True,
        private="yes: the search shrinks clients with much noise",
    ),
    Row(
        name="lora-fair",
        make=LoRAFAIR,
        paper="Bian et al. 2025, arXiv:2411.14961",
        summary="averages b and a, and corrects b towards the mean of the products",
        exact="no: only what lies in the rows of the mean a",
        needs_individual_uploads=True,
        secure="no: it would take a second exchange in each round",
        private="yes: the correction is pulled to zero, which dampens noise",
    ),
    Row(
        name="frlora",
        make=FRLoRA,
        paper="Yan et al. 2025, ICLR, openreview e0rQRMUhs7",
        summary="starts from the principal part of the weights; updates the base",
        exact="no: off by the covariance of the factors; yes if b alone is trained",
        base_update="min(2 * r * (out + in), out * in)",
        private="yes: on changes, not on the large factors themselves; the noise stays in the base",
        known_failures={
            "test_alpha_is_no_more_than_the_unit_of_the_updates": "the start is split by `scale_in_init`, whatever alpha is"
        },
    ),
    Row(
        name="fedloru",
        make=FedLoRU,
        paper="Park and Klabjan 2024, arXiv:2409.12371",
        summary="averages b and a; adds their product to the base every few rounds",
        exact="no: off by the covariance of the factors",
        base_update="min(r * (out + in), out * in)",
        private="yes: but each base update puts noise into the base",
    ),
    Row(
        name="pfedloru",
        make=PFedLoRU,
        paper="Park and Klabjan 2024, arXiv:2409.12371",
        summary="FedLoRU with a second, personal pair of factors that never travels",
        exact="no: off by the covariance of the factors",
        base_update="min(r * (out + in), out * in)",
        personal=True,
        private="yes: but each base update puts noise into the base",
    ),
    Row(
        name="mfedloru",
        make=MFedLoRU,
        paper="Park and Klabjan 2024, arXiv:2409.12371",
        summary="FedLoRU, whose clients upload changes of b and a at their own rank",
        exact="no: off by the covariance of the factors, and by what the clients' ranks cut",
        up=("r * (out + in + 2 * rank)",),
        down=("rank * (out + in)",),
        base_update="min(rank * (out + in), out * in)",
        mixed_ranks=True,
        needs_individual_uploads=True,
        private="yes: but each base update puts noise into the base",
        known_failures={"test_one_client_alone_trains_locally, mixed ranks": "its upload is cut to its rank"},
    ),
    Row(
        name="hetlora",
        make=HetLoRA,
        paper="Cho et al. 2024, arXiv:2401.06432",
        summary="averages zero-padded ranks by norm; clients prune their own rank",
        exact="no: off by the covariance of the padded factors",
        mixed_ranks=True,
        needs_individual_uploads=True,
        secure="no: the server weighs each upload by its norm",
        private="no: weights and ranks follow the clients' data",
        known_failures={"test_factors_and_head_are_averaged_with_the_same_weights": "factors weigh by norm, by definition"},
    ),
    Row(
        name="fedhm-lora",
        make=FedHMLoRA,
        paper="Yao et al. 2021, arXiv:2111.14655",
        summary="averages products by capacity; each client gets a balanced best fit",
        exact="up to the rank: the best fit to the mean of the products",
        mixed_ranks=True,
        needs_individual_uploads=True,
        private="yes: noise on both factors, of which the cut to the rank removes a part",
        known_failures={
            "test_factors_and_head_are_averaged_with_the_same_weights": "factors weigh by capacity, by definition",
            "test_alpha_is_no_more_than_the_unit_of_the_updates": "the best fit is split evenly, with alpha / rank in b",
        },
    ),
    Row(
        name="fedsvd",
        make=FedSVD,
        paper="Lee et al. 2025, arXiv:2505.12805",
        summary="trains and averages b; the server orthonormalizes the common a",
        exact="yes",
        up=("r * out",),
        head="frozen",
        private="yes: noise enters once, through b, and the orthonormal a does not enlarge it",
    ),
    Row(
        name="fedrot-lora",
        make=FedRotLoRA,
        paper="Zhang et al. 2026, arXiv:2602.23638",
        summary="rotates clients' factors towards the shared ones, and averages them",
        exact="no: off by the covariance of the turned factors",
        private="yes: turning comes before clipping and keeps the norm",
    ),
    Row(
        name="fedrpca",
        make=FedRPCA,
        paper="Jhunjhunwala et al. 2025, arXiv:2506.01194",
        summary="splits changes into common and sparse parts; amplifies the sparse",
        exact="no: a rescaled mean of the factors",
        needs_individual_uploads=True,
        private="yes: but noise counts as sparse, and is amplified",
        known_failures={"test_identical_clients_are_as_one": "from min_clients on: see how it works"},
    ),
    Row(
        name="fslora",
        make=FSLoRA,
        paper="Fang et al. 2025, arXiv:2501.19389",
        summary="clients train random ranks of each module, scaled to be unbiased",
        exact="no: a mean of factors, of which each client saw a random part",
        down=("rank * (out + in)",),
        weights="uniform",
        mixed_ranks=True,
        secure="yes: with zeros for what was not drawn; what was is public",
        private="yes: what is drawn does not depend on data, and only that needs noise",
        known_failures={
            "test_one_client_alone_trains_locally, mixed ranks": "it trains a scaled part of what it is evaluated with",
            "test_identical_clients_are_as_one, mixed ranks": "each draws ranks of its own",
        },
    ),
    Row(
        name="flasc",
        make=FLASC,
        paper="Kuo et al. 2024, arXiv:2406.05233",
        summary="sends the largest weights down, and the largest changes up",
        exact="no: a mean of the factors' largest changes",
        up=("density_up * r * (out + in)",),
        down=("density_down * r * (out + in)",),
        index_counts=("density_up * r * (out + in)", "rank * (out + in)"),
        index_counts_down=("density_down * r * (out + in)", "rank * (out + in)"),
        weights="uniform",
        mixed_ranks=True,
        secure="no: clients send different entries; filled up with zeros they save nothing",
        private="no: which entries a client sends depends on its data",
        known_failures={
            "test_one_client_alone_trains_locally": "small changes stay at home, and the server takes its own step",
            "test_traffic_is_what_the_row_declares, mixed ranks": "a client's rank thins modules of fixed rank too",
            "test_rounds_without_the_largest_client_still_teach_every_rank": "small entries are not sent, whoever is there",
        },
    ),
    Row(
        name="lora-a2",
        make=LoRAA2,
        paper="Koo et al. 2025, arXiv:2410.22815",
        summary="alternates b and a; clients train only the ranks that move most",
        exact="yes, in each round",
        up=("r * out", "r * in"),
        down=("rank * (out + in)",),
        index_counts=("r", "rank"),
        head="frozen",
        mixed_ranks=True,
        secure="no: clients send different ranks; filled up with zeros they save nothing",
        private="no: which ranks a client sends depends on its data",
        known_failures={
            "test_traffic_is_what_the_row_declares, mixed ranks": "a budget counts ranks, and wide ones have more floats",
        },
    ),
    Row(
        name="fed-sb",
        make=FedSB,
        paper="Singhal et al. 2025, arXiv:2502.15436",
        summary="freezes a common b and a; trains and averages a small core c",
        exact="yes",
        up=("r * r",),
        down=("r * (out + in + r)",),
        private="yes: noise enters once, on rank^2 numbers",
        known_failures={
            "test_alpha_is_no_more_than_the_unit_of_the_updates": "b and a are frozen, and c learns as in b c a"
        },
    ),
    Row(
        name="ravan",
        make=Ravan,
        paper="Raje et al. 2025, arXiv:2506.05568",
        summary="freezes several random heads; averages the small core of each",
        exact="yes, for each head",
        up=("r * head_rank * head_rank",),
        down=("rank * head_rank * head_rank",),
        index_counts_down=("r", "rank"),
        mixed_ranks=True,
        secure="yes: with zeros for heads that were not trained, and a count for each",
        private="yes: noise enters once, on the small cores; heads chosen by gradient tell of the data besides",
        known_failures={
            "test_identical_clients_are_as_one, mixed ranks": "each client draws heads of its own",
            "test_factors_and_head_are_averaged_with_the_same_weights, mixed ranks": "each head has its own mean",
            "test_alpha_is_no_more_than_the_unit_of_the_updates": "b and a are frozen, and c learns as in b c a",
        },
    ),
    Row(
        name="ce-lora",
        make=CELoRA,
        paper="Li et al. 2025, arXiv:2503.23869",
        summary="keeps b and a personal; mixes cores c by data and core similarity",
        exact="cores only: there is no global model",
        up=("r * r",),
        down=("r * r",),
        norms=True,
        first_upload=("3 * classes * (1 + 2 * features)", "8 * classes"),
        head="local",
        personal=True,
        needs_individual_uploads=True,
        private="no: mixtures of features leave a client; with data_weight 0 yes, noise on the small cores alone",
    ),
    Row(
        name="fl-tac",
        make=FLTAC,
        paper="Ping et al. 2024, arXiv:2404.15384",
        summary="an adapter for each task; averages adapters within clusters",
        exact="no: off by the covariance of the factors within a cluster",
        head="method-managed",
        personal=True,
        needs_individual_uploads=True,
        private="yes: noise on each adapter, of which an owner of several tasks sends several",
    ),
    Row(
        name="fed-dpa",
        make=FedDPA,
        paper="Yang et al. 2024, arXiv:2403.19211",
        summary="FedIT, and a personal pair of factors trained beside the shared one",
        exact="no: off by the covariance of the factors",
        head="local",
        personal=True,
        private="yes: as FedIT; the personal pair stays at home",
    ),
    Row(
        name="ditto",
        make=Ditto,
        paper="Li et al. 2021, arXiv:2012.04221",
        summary="FedIT, and personal factors that are pulled towards the shared ones",
        exact="no: off by the covariance of the factors",
        head="local",
        personal=True,
        private="yes: as FedIT; the personal factors stay at home",
    ),
    Row(
        name="fedlease",
        make=FedLEASE,
        paper="Wang et al. 2025, arXiv:2509.15087",
        summary="clusters clients; each cluster trains an expert, routers mix them",
        exact="no: off by the covariance of the factors, in each cluster; there is no global model",
        up=("r * (out + in) + (2 * E - 1) * in",),
        down=("E * r * (out + in) + (2 * E - 1) * in",),
        head="local",
        personal=True,
        needs_individual_uploads=True,
        secure="no: the clusters need each upload; after them a sum for each cluster would do",
        private="yes: if the uploads of the warm-up get noise too",
        known_failures={
            "test_traffic_is_what_the_row_declares": "E is found in the warm-up, which has pairs up and nothing down",
            "test_identical_clients_are_as_one": "equal ones make clusters too, and each trains its own expert alone",
            "test_factors_and_head_are_averaged_with_the_same_weights": "each cluster has a mean of its own",
        },
    ),
)

TABLE: Mapping[str, Row] = {row.name: row for row in _ROWS}
