#!/usr/bin/env python
"""Compare models and ablations on the same data, seeds and budget: Ray, paired bootstrap over users.

python jobs/compare.py --config jobs/configs/compare-smoke.yaml                       # the generated log, minutes
python jobs/compare.py --config jobs/configs/compare-ml-100k.yaml --set data.path=ml-100k.parquet --rows hpgr mtgr
python jobs/compare.py --run runs/mine --resume                                       # go on after an interruption
python jobs/compare.py --run runs/mine --resume --set compare.seeds=[0,1,2,3,4]       # ... with more seeds
ray job submit --working-dir . -- python jobs/compare.py --config jobs/configs/compare-ml-1m.yaml \\
    --set data.path=s3://bucket/ml-1m.parquet --run s3://bucket/all
"""

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from hpgr.on_ray import command

MATRIX = "compare."


def job(argv: Sequence[str]) -> None:
    parser = command.parser(str(__doc__), "matrix, such as jobs/configs/compare-smoke.yaml (needed unless --resume)")
    parser.add_argument("--run", metavar="DIR", help="its folder, local or s3://, gs:// (default: runs/...)")
    parser.add_argument("--rows", metavar="ROW", nargs="+", help="these rows of the matrix alone, and their studies")
    parser.add_argument("--resume", action="store_true", help="go on with the comparison in --run")
    arguments = parser.parse_args(argv)
    if arguments.resume and not arguments.run:
        parser.error("--resume needs --run DIR, the comparison to go on with")
    if not arguments.resume and not arguments.config:
        parser.error("--config FILE is missing: a matrix, such as jobs/configs/compare-smoke.yaml")

    from hpgr.search.matrix import load_matrix, stored_plan

    own = [text.removeprefix(MATRIX) for text in arguments.overrides if text.startswith(MATRIX)]
    others = [text for text in arguments.overrides if not text.startswith(MATRIX)]
    plan = load_matrix(arguments.config, others, own) if arguments.config else stored_plan(arguments.run, others, own)
    if arguments.rows is not None:
        plan = plan.only(arguments.rows)
    if arguments.print_config:
        return command.print_config(plan.base)

    from hpgr.on_ray.compare import CompareRequest, compare
    from hpgr.report.compare import compare_summary

    run = arguments.run or command.new_run(plan.matrix.name)
    with command.resumable(argv, run):
        _, data = compare(CompareRequest(run, plan, arguments.resume), command.say)
    print(compare_summary(data, next_commands(data.run)), flush=True)
    return None


def next_commands(run: str) -> list[str]:
    """What one would type next."""
    more = f"python jobs/compare.py --run {shlex.quote(run)} --resume --set compare.seeds=[0,1,2,3,4]"
    return [more, f"python -m json.tool {shlex.quote(run)}/compare.json | less"]


if __name__ == "__main__":
    command.main(job)
