"""DeepSpeed trains the unsplit model too, where it is installed."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from test_benchmarks_peer import STEPS, task, unsplit_losses

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.deepspeed_peer import SCHEDULE, DeepSpeedPeer, missing


@pytest.mark.slow
@pytest.mark.skipif(missing() is not None, reason=str(missing()))
def test_it_trains_as_the_unsplit_model() -> None:
    given = task((3, 3))
    with DeepSpeedPeer(given) as peer:
        found = [peer.run(SCHEDULE, 1).loss for _ in range(STEPS)]
    assert found == pytest.approx(unsplit_losses(given), rel=1e-5)


def test_several_chunks_are_refused() -> None:
    with pytest.raises(ValueError, match="chunks is 2, but DeepSpeed's stages hold one"):
        DeepSpeedPeer(task((1, 2, 1, 2), 2))


def test_its_absence_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert missing() == "DeepSpeed is not installed (pip install -e '.[bench]')"
