from __future__ import annotations

from itertools import product

from made_by_hand import mine

from raypipe.schedule import Action
from raypipe.schedule.numbers import OPS, Plan, number_of


def test_each_action_has_a_number_of_its_own() -> None:
    actions = [Action(chunk, op, microbatch) for chunk, microbatch, op in product(range(4), range(3), OPS)]
    plan = Plan((tuple(actions),), 3, False)
    assert plan.numbers == [list(range(48))]
    assert [plan.action(number) for number in plan.numbers[0]] == actions
    assert plan.action(number_of(2 * 3 + 1, OPS.index(actions[1].op))) == Action(2, actions[1].op, 1)


def test_all_are_walked_stage_by_stage() -> None:
    schedule = mine("0F0 0B0", "1F0 1I0 1W0", microbatches=1)
    plan = Plan(schedule.programs, 1, False)
    assert [(stage, index, str(action)) for stage, index, action in plan.actions()] == [
        (0, 0, "0F0"),
        (0, 1, "0B0"),
        (1, 0, "1F0"),
        (1, 1, "1I0"),
        (1, 2, "1W0"),
    ]
    assert [(stage, index, str(plan.action(number))) for stage, index, number in plan.numbered()] == [
        (stage, index, str(action)) for stage, index, action in plan.actions()
    ]
