"""Settings of the model."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from hpgr.config.base import Count, Natural, Section, Share


class Pgsa(Section):
    enabled: bool = True
    """False is dense attention."""
    scope: Literal["candidate", "all"] = "all"
    """Who attends sparsely: candidates only, or history events too."""
    top_k: Count = 32
    """Anchors a query."""
    sigma: Annotated[float, Field(ge=0, le=1000)] = 2.0
    """Width of the Gaussian around an anchor, in events; 0 keeps the anchors alone."""
    max_keys: Annotated[int, Field(ge=1)] | None = 128
    """Most events a query keeps: the largest weights, of equal ones the more recent. null keeps all that its
    Gaussians cover, up to top_k * (2 * ceil(3 * sigma) + 1) events."""
    sessions: Count | None = None
    """A query's anchors come from so many past sessions, those whose mean item vectors are nearest to its own, and from
    the last session that it sees events of; null: from all events. For very long histories, where choosing anchors
    takes most of the time."""
    anchors: Literal["frozen", "live"] = "frozen"
    """Item vectors that choose anchors: a frozen copy of stage 1's table, or the table being trained."""
    summaries: Natural = 4
    """Averages of what the user did with the anchors of a candidate, added to its token, each at a learnt sharpness;
    0 leaves them out. They do not depend on `enabled`, which is about attention."""
    impl: Literal["reference", "gather", "triton", "auto"] = "auto"
    """How it is computed. reference: weights over the whole history. gather: kept keys alone, time and memory linear in
    them; scores agree to 1e-5. triton: the same as fused kernels, on a CUDA GPU with the package triton and a C
    compiler, for up to 262,144 events; they screen anchors in half precision first (more than 496, or those of
    sessions, torch chooses). auto: keys chosen the fast way; on a CPU gather where a batch's padded histories are long
    (256 events, and four times the keys a query may keep), on a GPU triton where it can run and histories are 200
    events or more, else the whole history with its weights."""


class Sem(Section):
    intra_layers: Count = 1
    """Transformer blocks inside sessions."""
    inter_layers: Count = 1
    """Transformer blocks over summaries of sessions."""
    dropout: Share = 0.2
    """Dropout of the module's blocks."""
    rotary: bool = False
    """Tell its attention how far apart events of a session are, and sessions (rotary positions). Without it an event
    knows its place in its session alone, and only up to the 64th. Names next items better; predicts clicks no better
    where we tried."""
    in_stage2: bool = True
    """Carry the SEM into stage 2; both its branches are gated from zero there."""
    user_vector: bool = True
    """Make a vector of the user of what the SEM says in stage 2, and add to the encoder's logit its dot product with
    the candidate's vector, the one that chooses anchors."""


class Asvd(Section):
    factors: Natural = 64
    """Numbers an item has in it, twice, on logs of ratings three times; 0 leaves it out."""
    dropout: Share = 0.7
    """Dropout of the products of two items' factors; small logs of ratings want more."""
    baselines: bool = False
    """Give it to hstu, mtgr and din too, to see how much of HPGR's distance to them it is."""


class Lists(Section):
    enabled: bool = True
    """Compare a candidate with the list it is shown in (`data.columns.request`): how many the list holds, how many of
    those the user engaged with before, and how far each numeric feature of the item or candidate is from the list's
    mean and from that of the one engaged with last. A position tells what stands above what as a numeric feature."""
    baselines: bool = False
    """Give it to hstu, mtgr and din too, to see how much of HPGR's distance to them it is."""


class Mtgr(Section):
    mlp_ratio: Count = 2
    """Width of a block's MLP, in model widths."""


class Din(Section):
    attention_units: Count = 32
    """Hidden units of the activation unit."""


class Model(Section):
    name: Literal["hpgr", "hstu", "mtgr", "din", "logistic"] = "hpgr"
    """The click model of stage 2. The sections `pgsa`, `asvd` and `lists` (the last two unless their `baselines` is
    true), `sem.in_stage2` and `sem.user_vector` belong to hpgr alone; the others attend densely to the flat history.
    Any of them can start from stage 1: its event tokens are alike in all."""
    width: Annotated[int, Field(ge=4)] = 64
    """Width of all token vectors; a multiple of `heads`."""
    heads: Count = 2
    """Attention heads."""
    layers: Count = 2
    """Layers of the encoder."""
    dropout: Share = 0.2
    """Dropout of tokens and layers."""
    silu_on: Literal["u", "uvqk"] = "uvqk"
    """Activation after the input projection: U alone (ranking form) or all four (research form)."""
    hstu_form: Literal["platform", "research"] = "platform"
    """Form of HSTU's layers (hstu, hpgr): `research` is the authors' published research code (see HstuLayer)."""
    time_buckets: Annotated[int, Field(ge=4, le=64)] = 40
    """Buckets of log2 time differences."""
    match_features: bool = True
    """Candidates carry how often the user engaged with them, and when, how and how many events ago for the last time
    (visible past only)."""
    sem: Sem = Sem()
    pgsa: Pgsa = Pgsa()
    asvd: Asvd = Asvd()
    lists: Lists = Lists()
    mtgr: Mtgr = Mtgr()
    din: Din = Din()

    @property
    def sparse(self) -> bool:
        """Whether the click model attends by PGSA."""
        return self.name == "hpgr" and self.pgsa.enabled

    @property
    def by_vectors(self) -> bool:
        """Whether the click model compares items by their vectors, in PGSA or in summaries."""
        return self.name == "hpgr" and (self.pgsa.enabled or self.pgsa.summaries > 0)

    @property
    def with_asvd(self) -> bool:
        """Whether the click model has Asymmetric-SVD beside its encoder."""
        return self.asvd.factors > 0 and (self.name == "hpgr" or self.asvd.baselines)

    @property
    def with_lists(self) -> bool:
        """Whether the click model compares candidates with their lists, where the log tells lists."""
        return self.lists.enabled and (self.name == "hpgr" or self.lists.baselines)

    @model_validator(mode="after")
    def _divides(self) -> Model:
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of heads {self.heads}")
        return self
