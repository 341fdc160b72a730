#!/usr/bin/env python
"""Train HPGR: prepare the log, stage 1, stage 2, test once, report.

python jobs/two_stage.py                                          # a generated log, a local Ray
python jobs/two_stage.py --config jobs/configs/ml-100k.yaml --set data.path=ml-100k.parquet
python jobs/two_stage.py --run runs/mine --resume                 # go on with an interrupted run
python jobs/two_stage.py --run runs/mine --resume --set resources.workers=2   # ... with other resources
ray job submit jobs/two_stage.py                                  # from the repository root
ray job submit --working-dir . -- python jobs/two_stage.py --config jobs/configs/ml-100k.yaml \\
    --set data.path=s3://bucket/ml-100k.parquet --run s3://bucket/runs/mine
"""

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from hpgr.on_ray import command


def job(argv: Sequence[str]) -> None:
    parser = command.parser(str(__doc__))
    parser.add_argument("--run", metavar="DIR", help="run folder, local or s3://, gs:// (default: runs/<name>-<time>)")
    parser.add_argument("--resume", action="store_true", help="go on with the run in --run")
    arguments = parser.parse_args(argv)
    if arguments.resume and not arguments.run:
        parser.error("--resume needs --run DIR, the run to go on with")
    config = None if arguments.resume and not arguments.config else command.configuration(arguments)
    if arguments.print_config and config is not None:
        return command.print_config(config)

    from hpgr.on_ray.pipeline import Request, stored_config, two_stage
    from hpgr.report.run import summary_text

    config = config or stored_config(arguments.run, arguments.overrides)
    if arguments.print_config:
        return command.print_config(config)
    run = arguments.run or command.new_run(config.name)
    with command.resumable(argv, run):
        metrics, folder = two_stage(Request(run, config, arguments.resume), command.say)
    print(summary_text(metrics, folder, next_commands(folder)), flush=True)
    return None


def next_commands(folder: str) -> list[str]:
    """What one would type next."""
    quoted = shlex.quote(folder)
    return [
        f"tensorboard --logdir {quoted}/tensorboard",
        f"python jobs/two_stage.py --config {quoted}/config.yaml --set seed=1",
    ]


if __name__ == "__main__":
    command.main(job)
