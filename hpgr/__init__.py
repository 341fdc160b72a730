"""hpgr: train, tune and run HPGR (arXiv 2603.00980) on a Ray cluster.

    import hpgr
    trained = hpgr.train("jobs/configs/ml-100k.yaml", ["data.path=ml-100k.parquet"])
    scores = hpgr.Scorer(trained.run).score(pairs)

The names below load what they need (Ray, torch) when they are first used, not before.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hpgr.on_ray.api import prepare, train
    from hpgr.scoring.tables import Scorer

__version__ = "0.1.0"
__all__ = ["Scorer", "__version__", "prepare", "train"]

_PLACES = {"prepare": "hpgr.on_ray.api", "train": "hpgr.on_ray.api", "Scorer": "hpgr.scoring.tables"}


def __getattr__(name: str) -> Any:
    if name in _PLACES:
        return getattr(import_module(_PLACES[name]), name)
    raise AttributeError(f"module 'hpgr' has no attribute {name!r}; it has {', '.join(sorted(__all__))}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
