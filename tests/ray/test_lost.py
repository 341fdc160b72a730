"""What Ray loses under a job comes to its user in words."""

from __future__ import annotations

import os

import pytest

from hpgr.errors import HpgrError
from hpgr.on_ray.session import session


class Mortal:
    def die(self) -> None:
        os._exit(1)


@pytest.mark.usefixtures("local_ray")
def test_a_lost_actor_is_an_error_that_a_job_can_go_on_from() -> None:
    import ray  # after hpgr.on_ray, which settles how a local Ray authenticates

    with pytest.raises(HpgrError, match="Ray lost a part of the job: ActorDiedError") as caught, session(print):
        ray.get(ray.remote(num_cpus=0)(Mortal).remote().die.remote())
    assert caught.value.goes_on
