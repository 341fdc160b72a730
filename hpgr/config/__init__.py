"""The configuration: one closed, frozen tree. YAML and `--set a.b=c` meet before validation, never after.

No validator changes a value; a default of `auto` or null is resolved where it is used and logged there.
"""

from hpgr.config.base import Count, Natural, Positive, Section, Share
from hpgr.config.data import (
    Columns,
    Data,
    Feature,
    LabelRule,
    Rule,
    Split,
    Stream,
    Synthetic,
    Vocabulary,
    utc_us,
)  # fmt: skip
from hpgr.config.model import Asvd, Din, Model, Mtgr, Pgsa, Sem
from hpgr.config.plain import plain_mapping
from hpgr.config.reading import dump, faults_of, load_config, override, to_yaml, validate
from hpgr.config.training import Checkpoints, Evaluation, Optimiser, Resources, Scoring, Stage1, Stage2, Tracking
from hpgr.config.tree import Config

__all__ = [
    "Asvd", "Checkpoints", "Columns", "Config", "Count", "Data", "Din", "Evaluation", "Feature", "LabelRule", "Model",
    "Mtgr", "Natural", "Optimiser", "Pgsa", "Positive", "Resources", "Rule", "Scoring", "Section", "Sem", "Share",
    "Split", "Stage1", "Stage2", "Stream", "Synthetic", "Tracking", "Vocabulary", "dump", "faults_of", "load_config",
    "override", "plain_mapping", "to_yaml", "utc_us", "validate",
]  # fmt: skip
