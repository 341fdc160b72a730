#!/usr/bin/env python
"""Search a space of settings over the cluster: Ray Tune, Optuna, ASHA.

python jobs/tune.py --space tune_spaces/smoke.yaml                          # the generated log, a local Ray, minutes
python jobs/tune.py --space tune_spaces/sessions.yaml --config jobs/configs/ml-100k.yaml --set data.path=ml-100k.parquet
python jobs/tune.py --run runs/mine --resume                                # go on with an interrupted search
python jobs/tune.py --run runs/mine --resume --set space.budget.trials=64   # ... with a larger budget
ray job submit --working-dir . -- python jobs/tune.py --space tune_spaces/two_stage.yaml --run s3://bucket/search
"""

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from hpgr.on_ray import command

SPACE = "space."


def job(argv: Sequence[str]) -> None:
    parser = command.parser(str(__doc__))
    parser.add_argument("--space", metavar="FILE", help="what may vary, a file of tune_spaces/; --set space.a.b=c")
    parser.add_argument("--run", metavar="DIR", help="folder of the search, local or s3://, gs:// (default: runs/...)")
    parser.add_argument("--resume", action="store_true", help="go on with the search in --run")
    arguments = parser.parse_args(argv)
    if arguments.resume and not arguments.run:
        parser.error("--resume needs --run DIR, the search to go on with")
    if not arguments.resume and not arguments.space:
        parser.error("--space FILE is missing, such as tune_spaces/smoke.yaml")

    own = [text.removeprefix(SPACE) for text in arguments.overrides if text.startswith(SPACE)]
    arguments.overrides = [text for text in arguments.overrides if not text.startswith(SPACE)]
    config = None if arguments.resume and not arguments.config else command.configuration(arguments)
    if arguments.print_config and config is not None:
        return command.print_config(config)

    from hpgr.on_ray.pipeline import stored_config
    from hpgr.on_ray.tune import SearchRequest, search, stored_space
    from hpgr.report.search import search_summary
    from hpgr.search.space import load_space

    config = config or stored_config(arguments.run, arguments.overrides, "search")
    if arguments.print_config:
        return command.print_config(config)
    space = load_space(arguments.space, own) if arguments.space else stored_space(arguments.run, own)
    run = arguments.run or command.new_run(space.name if space else "search")
    request = SearchRequest(run, config, space, arguments.resume)
    with command.resumable(argv, run):
        result, data = search(request, command.say)
    print(search_summary(data, next_commands(data.run, result["best"]["run"])), flush=True)
    return None


def next_commands(folder: str, best: str) -> list[str]:
    """What one would type next."""
    commands = [f"python jobs/batch_score.py --run {shlex.quote(best)} --top-n 10 --output scores"]
    if "://" in folder:
        return commands
    again = f"python jobs/two_stage.py --config {shlex.quote(folder)}/best.yaml --set seed=1"
    return [
        again,
        *commands,
        f"pip install optuna-dashboard && optuna-dashboard sqlite:///{shlex.quote(folder)}/study.db",
    ]


if __name__ == "__main__":
    command.main(job)
