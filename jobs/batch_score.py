#!/usr/bin/env python
"""Score candidates, or choose the best items, for every user with a finished run: exactly once, restartable.

python jobs/batch_score.py --run runs/mine --candidates pairs.parquet --output scores/monday
python jobs/batch_score.py --run runs/mine --top-n 20 --drop-seen --output scores/top        # retrieve, then rank
python jobs/batch_score.py --run runs/mine --users /logs/today/ --candidates items.parquet --output scores/today
ray job submit --working-dir . -- python jobs/batch_score.py --run s3://bucket/run --top-n 20 --output s3://bucket/top

Candidates are Parquet with the run's own column names: pairs (user, item), lists (user, list of items), or items alone
for all users; time, request columns and features are optional. The same command goes on after any interruption.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from hpgr.on_ray import command


def job(argv: Sequence[str]) -> None:
    arguments = parser().parse_args(argv)

    from hpgr.on_ray.score import Pool, batch_score
    from hpgr.scoring.job import Wish, account_lines

    wish = Wish(**{name: getattr(arguments, name) for name in Wish.__dataclass_fields__})
    least, most = workers(arguments.workers) if arguments.workers else (None, None)
    with command.resumable(argv):
        summary = batch_score(wish, Pool(least, most, arguments.gpu), command.say)
    print("\n".join(["", *account_lines(summary), *next_commands(summary)]), flush=True)


def parser() -> argparse.ArgumentParser:
    """The job's arguments; those of `Wish` bear its names."""
    out = argparse.ArgumentParser(description=str(__doc__), formatter_class=argparse.RawDescriptionHelpFormatter)
    out.add_argument("--run", required=True, metavar="DIR", help="finished run folder, local or s3://, gs://")
    out.add_argument("--users", metavar="PATH", help="new logs of the users (default: the run's own timelines)")
    what = out.add_mutually_exclusive_group(required=True)
    what.add_argument("--candidates", metavar="PATH", help="Parquet file, folder or glob: pairs, lists, or one list")
    what.add_argument("--top-n", type=positive, default=0, metavar="N", help="choose the N best items of the catalogue")
    out.add_argument("--retrieve", type=positive, metavar="M", help="items stage 1 hands to stage 2 (max(10 N, 200))")
    seen = out.add_mutually_exclusive_group()
    seen.add_argument("--drop-seen", action="store_true", help="leave the user's past items out of --top-n")
    seen.add_argument("--keep-seen", action="store_false", dest="drop_seen", help="keep them (the default)")
    out.add_argument(
        "--output", required=True, metavar="DIR", help="folder of the scores; a new one, or this job's own"
    )
    out.add_argument("--at", metavar="TIME", help="moment of candidates without one: ISO date, or number in the log's "
                     "unit (default: a second after the users' last event)")  # fmt: skip
    out.add_argument("--explain", action="store_true", help="the past events behind each score")
    out.add_argument("--embeddings", action="store_true", help="item and user vectors, in _embeddings/")
    out.add_argument("--measure", action="store_true", help="with --top-n: HR@k and NDCG@k on held-out next events, "
                     "with and without ranking, into _metrics.json")  # fmt: skip
    out.add_argument("--resume", action="store_true", help="only go on with a job; never start one")
    out.add_argument("--prepared", metavar="DIR", help="the run's prepared log, where it was moved")
    out.add_argument("--workers", metavar="MIN[:MAX]", help="pool of workers (default: the run's resources.scoring)")
    out.add_argument("--shard-pairs", type=positive, default=1 << 16, metavar="P", help="pairs a shard should hold")
    out.add_argument(
        "--gpu", action=argparse.BooleanOptionalAction, help="a GPU for each worker (default: the run's resources.gpu)"
    )
    return out


def positive(text: str) -> int:
    """A whole number of 1 or more."""
    if not text.strip().isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a whole number of 1 or more")
    return int(text)


def workers(text: str) -> tuple[int, int | None]:
    """`MIN` or `MIN:MAX`."""
    from hpgr.errors import ConfigError

    least, _, most = text.partition(":")
    try:
        bounds = positive(least), positive(most) if most else None
    except argparse.ArgumentTypeError:
        raise ConfigError(f"--workers: got {text!r}, expected MIN or MIN:MAX, for example 2:8") from None
    if bounds[1] is not None and bounds[0] > bounds[1]:
        raise ConfigError(f"--workers: got {text!r}, at least is more than at most")
    return bounds


def next_commands(summary: dict[str, object]) -> list[str]:
    """What one would type next."""
    read = f"import pyarrow.dataset as d; print(d.dataset({summary['output']!r}).head(10).to_pandas())"
    return [f'next       python -c "{read}"']


if __name__ == "__main__":
    command.main(job)
