from __future__ import annotations

import math
import pickle
from typing import Any

import pytest

from raypipe.schedule import Costs, Op, build


def test_a_number_stands_for_every_chunk_and_boundary() -> None:
    costs = Costs(forward=1.5, backward=(2.0, 3.0, 4.0), boundary_bytes=10, activation_bytes=(7, 8, 9))
    assert costs.table(3) == {
        Op.FORWARD: (1.5, 1.5, 1.5),
        Op.BACKWARD: (2.0, 3.0, 4.0),
        Op.INPUT: (1.0, 1.0, 1.0),
        Op.WEIGHT: (1.0, 1.0, 1.0),
    }
    assert costs.crossing(3) == ((10, 10), (10, 10))
    assert costs.kept(3) == (7, 8, 9)
    assert costs.crossing(1) == ((), ())


def test_gradients_may_weigh_something_else() -> None:
    assert Costs(boundary_bytes=(4.0, 6.0)).crossing(3) == ((4.0, 6.0), (4.0, 6.0))
    assert Costs(boundary_bytes=(4.0, 6.0), gradient_bytes=0).crossing(3) == ((4.0, 6.0), (0, 0))


def test_channels() -> None:
    assert Costs(latency=2).channel(0, 1) == (2, math.inf)
    of_each = Costs(latency={(0, 1): 1.0, (1, 0): 3.0}, bandwidth={(0, 1): 8.0, (1, 0): 4.0})
    assert of_each.channel(0, 1) == (1.0, 8.0)
    assert of_each.channel(1, 0) == (3.0, 4.0)


def test_they_are_values() -> None:
    given = {(0, 1): 1.0}
    costs = Costs(latency=given, bandwidth=5)
    given[0, 1] = 9.0
    assert costs.latency == {(0, 1): 1.0}
    assert pickle.loads(pickle.dumps(costs)) == costs
    assert hash(Costs(forward=(1.0, 2.0))) == hash(Costs(forward=(1.0, 2.0)))


@pytest.mark.parametrize(
    ("arguments", "error", "sentence"),
    [
        (
            {"latency": "1"},
            TypeError,
            "the cost latency is '1', but it must be a number, or a mapping {.source stage, t",
        ),
        ({"latency": {(0, 1): "x"}}, TypeError, "the cost latency is .* must be a number, or a mapping"),
        ({"latency": {(0, 1): -1}}, ValueError, "the cost latency is .* costs are finite and not negative"),
        ({"latency": {0: 1.0}}, ValueError, "the cost latency has the key 0, but its keys are channels"),
        ({"latency": {(0, 1, 2): 1.0}}, ValueError, "the key .0, 1, 2., but its keys are channels"),
        ({"latency": {(-1, 0): 1.0}}, ValueError, "but its keys are channels"),
        ({"latency": {(1, 1): 1.0}}, ValueError, "a stage's message to itself is free; leave it out"),
        ({"bandwidth": 0}, ValueError, "the cost bandwidth is 0, but nothing crosses at 0; leave it out for no limit"),
        ({"bandwidth": {(0, 1): 0.0}}, ValueError, "nothing crosses at 0"),
        ({"bandwidth": math.inf}, ValueError, "the cost bandwidth is inf"),
        ({"boundary_bytes": None}, TypeError, "a number, or a tuple with one for each boundary"),
        ({"gradient_bytes": (1, -1)}, ValueError, "the cost gradient_bytes is"),
        ({"activation_bytes": [1]}, TypeError, "a number, or a tuple with one for each chunk"),
        ({"input_share": 1.5}, ValueError, "the cost input_share is 1.5, but a share is from 0 to 1"),
        ({"input_share": math.nan}, ValueError, "a share is from 0 to 1"),
        ({"input_share": (0.5,)}, TypeError, "it must be a number from 0 to 1"),
    ],
)
def test_wrong_costs_are_refused(arguments: dict[str, Any], error: type[Exception], sentence: str) -> None:
    with pytest.raises(error, match=sentence):
        Costs(**arguments)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"boundary_bytes": (1, 2)}, "the cost boundary_bytes has 2 numbers, but there is 1 boundary; give one each"),
        ({"gradient_bytes": ()}, "the cost gradient_bytes has 0 numbers, but there is 1 boundary; give one each"),
        ({"activation_bytes": (1,)}, "the cost activation_bytes has 1 number, but there are 2 chunks; give one each"),
        ({"latency": {(0, 1): 1}}, "latency has no number for the channel from stage 1 to stage 0, .* for .1, 0."),
        ({"bandwidth": {(1, 0): 1}}, "bandwidth has no number for the channel from stage 0 to stage 1, which the"),
    ],
)
def test_costs_that_do_not_fit_the_schedule_are_refused(arguments: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        build("gpipe", 2, 2).simulate(Costs(**arguments))


def test_a_channel_that_is_not_used_needs_no_number() -> None:
    forwards = build("gpipe", 2, 2).forwards(2)
    assert forwards.simulate(Costs(latency={(0, 1): 5.0})).makespan == 8
