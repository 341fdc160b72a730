#!/usr/bin/env python
"""Prepare a log: validated, split, encoded timelines in Parquet, for any number of runs.

python jobs/prepare.py                                            # the generated log
python jobs/prepare.py --config jobs/configs/ml-1m.yaml --set data.path=s3://bucket/ml-1m/
ray job submit --working-dir . -- python jobs/prepare.py --config jobs/configs/ml-1m.yaml \\
    --set data.path=s3://bucket/ml-1m/ --set data.prepared=s3://bucket/prepared
"""

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from hpgr.on_ray import command


def job(argv: Sequence[str]) -> None:
    arguments = command.parser(str(__doc__)).parse_args(argv)
    config = command.configuration(arguments)
    if arguments.print_config:
        return command.print_config(config)

    from hpgr.on_ray.pipeline import prepare_only

    with command.resumable(argv):
        prepared = prepare_only(config, command.say)
    account = prepared.manifest["account"]
    for name, part in account["splits"].items():
        print(f"{name:<12}{part['impressions']:,} impressions, {part['positives']:,} clicks")
    print(f"{'history':<12}{account['history_events']:,} events\n{'users':<12}{account['users']:,}")
    print(f"{'prepared':<12}{prepared.folder.uri}")
    return None


if __name__ == "__main__":
    command.main(job)
