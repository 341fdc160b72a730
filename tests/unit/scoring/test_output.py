"""What a job refuses to call a success."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from helpers_scoring import batch, write

from hpgr.artifacts import Folder
from hpgr.errors import ArtifactError
from hpgr.scoring import output
from hpgr.scoring.finished import Finished


@pytest.mark.parametrize("told", [(), ("written",), ("written", "pairs")])
@pytest.mark.parametrize("kind", ["pairs", "all"])
def test_pairs_that_do_not_add_up_are_no_success_whatever_the_shard_says(
    finished: Finished,
    pairs: str,
    tmp_path: Path,
    items: list[str],
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    told: tuple[str, ...],
) -> None:
    commit = output.commit

    def losing(request: Any, shard: int, outcome: Any) -> Any:
        lost = outcome.scores.slice(1)
        return commit(request, shard, outcome._replace(
            scores=lost, account=outcome.account | dict.fromkeys(told, lost.num_rows)))  # fmt: skip

    monkeypatch.setattr(output, "commit", losing)
    asked = pairs if kind == "pairs" else write(tmp_path / "items.parquet", {"item_id": items[:2]})
    with pytest.raises(ArtifactError, match="differ"):
        batch(finished, tmp_path / "out", candidates=asked)
    assert not (tmp_path / "out/_SUCCESS").exists()


def test_a_part_of_other_rows_than_its_record_says_is_not_published(
    finished: Finished, pairs: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish = output.publish

    def damaged(request: Any, records: Any) -> None:
        file = next(iter(records[0]["files"].values()))
        publish(
            request,
            {
                **records,
                0: records[0]
                | {"files": {k: v | {"rows": v["rows"] + (v is file)} for k, v in records[0]["files"].items()}},
            },
        )

    monkeypatch.setattr(output, "publish", damaged)
    with pytest.raises(ArtifactError, match="does not hold the"):
        batch(finished, tmp_path / "out", candidates=pairs)
    assert not (tmp_path / "out/_SUCCESS").exists()


def test_a_folder_is_claimed_by_one_request_whatever_keys_another_has(tmp_path: Path) -> None:
    """An earlier or later version may record more or fewer keys: that is another request too."""
    folder, record = Folder(str(tmp_path)), {"run": "r", "explain": False}
    assert [output.claim(folder, record), output.claim(folder, record)] == [False, False]
    with pytest.raises(ArtifactError, match="another request: top is 3 and there None;"):
        output.claim(folder, record | {"top": 3})
    with pytest.raises(ArtifactError, match="another request: explain is None and there False;"):
        output.claim(folder, {"run": "r"})
    folder.write_json(output.SUCCESS, {})
    assert output.claim(folder, record)
