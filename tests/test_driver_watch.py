from __future__ import annotations

import time

import pytest
import ray

from raypipe.driver.actors import CONTROL
from raypipe.driver.cluster import Session
from raypipe.driver.watch import Watch
from raypipe.stage.protocol import Progress


@pytest.mark.ray
def test_answers_are_kept_and_silence_is_timed(ray_session: Session) -> None:
    class Rank:
        """Answers late, or not at all."""

        def __init__(self, delay_s: float) -> None:
            self.delay_s = delay_s

        def progress(self) -> Progress:
            if self.delay_s < 0:
                raise OSError("no answer")
            time.sleep(self.delay_s)
            return Progress(1, "0F0", 4.0)

    # Defined in here, it travels by value: the workers cannot import this file.
    remote = ray.remote(concurrency_groups={CONTROL: 1})(Rank)
    actors = [remote.options(num_cpus=0).remote(delay_s) for delay_s in (0.0, 60.0, -1.0)]
    ray.wait([actors[0].__ray_ready__.remote(), actors[1].__ray_ready__.remote()], num_returns=2)
    watch = Watch(actors)
    watch.poll(range(3))
    deadline = time.monotonic() + 10
    while watch.views(range(2))[0].progress is None and time.monotonic() < deadline:
        time.sleep(0.05)
    watch.poll(range(3))
    prompt, silent, broken = watch.views(range(2))
    assert prompt.progress == Progress(1, "0F0", 4.0)
    assert prompt.silent_s < silent.silent_s
    assert silent.progress is None
    assert broken.progress is None
    assert (prompt.finished, silent.finished, broken.finished) == (False, False, True)
    for actor in actors:
        ray.kill(actor)
