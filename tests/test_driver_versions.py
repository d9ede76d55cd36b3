from __future__ import annotations

import dataclasses
import os
import platform

import pytest

from raypipe.driver.cluster import Session
from raypipe.driver.versions import NodeInfo, check_versions
from raypipe.errors import ResourcesError

DRIVER = NodeInfo("a" * 56, "10.0.0.1", 7, "3.12.4", "2.13.0", "2.60.0", "0.1.0")


def test_equal_software_on_another_node_is_fine() -> None:
    check_versions(DRIVER, [DRIVER, dataclasses.replace(DRIVER, node="b" * 56, ip="10.0.0.2", pid=9)])


@pytest.mark.parametrize("name", ["python", "torch", "ray", "raypipe"])
def test_a_difference_names_the_node_and_both_versions(name: str) -> None:
    other = dataclasses.replace(DRIVER, ip="10.0.0.2", **{name: "9.9"})
    ours = getattr(DRIVER, name)
    sentence = rf"node 10\.0\.0\.2 has {name} 9\.9, but the driver has {name} {ours}; install the same version"
    with pytest.raises(ResourcesError, match=sentence):
        check_versions(DRIVER, [DRIVER, other])


@pytest.mark.ray
def test_a_process_knows_its_own(ray_session: Session) -> None:
    here = NodeInfo.here()
    assert (here.pid, here.python) == (os.getpid(), platform.python_version())
    assert "+" not in here.torch
