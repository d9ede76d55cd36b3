from __future__ import annotations

import dataclasses
import inspect

import cloudpickle
import pytest
import torch
from torch import nn

from raypipe import PipelineTrainer
from raypipe.options import NOT_YET, Options, ScheduleMaker, default_optimizer, opened_sources
from raypipe.schedule import Schedule, build


def test_a_schedule_by_name_fits_any_number_of_microbatches() -> None:
    make = ScheduleMaker("gpipe", 3)
    assert [make(count).microbatches for count in (1, 2, 7)] == [1, 2, 7]
    assert make(2) == build("gpipe", 3, 2)
    assert cloudpickle.loads(cloudpickle.dumps(make))(2) == make(2)


def test_a_schedule_object_of_its_own_making_is_for_its_own_number() -> None:
    named = build("1f1b", 2, 4)
    given = Schedule("mine", named.programs, 4)
    options = Options(2, schedule=given)
    assert options.most_microbatches == 4
    assert options.make_schedule(4) is given
    assert Options(2, schedule=named).make_schedule(3) == build("1f1b", 2, 3)
    with pytest.raises(ValueError, match="for 2 stages and 4 microbatches, but this step has 2 and 3; give a name"):
        options.make_schedule(3)


def test_a_schedule_for_other_stages_or_microbatches_is_refused_at_once() -> None:
    with pytest.raises(ValueError, match="for 3 stages and 4 microbatches, but this step has 2 and 4"):
        Options(2, schedule=build("1f1b", 3, 4))
    with pytest.raises(ValueError, match="microbatches=8, but the schedule '1f1b' has 4; leave microbatches out"):
        Options(2, schedule=build("1f1b", 2, 4), microbatches=8)


def test_a_callable_schedule_is_held_to_what_was_asked() -> None:
    def mine(stages: int, microbatches: int) -> Schedule:
        return build("gpipe", stages, microbatches)

    assert Options(2, schedule=mine).make_schedule(5) == build("gpipe", 2, 5)
    with pytest.raises(ValueError, match="for 3 stages"):
        ScheduleMaker(lambda stages, microbatches: mine(stages + 1, microbatches), 2)(4)
    with pytest.raises(TypeError, match=r"gave a str; it must return a raypipe\.Schedule"):
        ScheduleMaker(lambda stages, microbatches: "gpipe", 2)(4)  # type: ignore[arg-type, return-value]


def test_the_defaults_of_options_are_those_of_the_trainer() -> None:
    shown = inspect.signature(PipelineTrainer).parameters
    for field in dataclasses.fields(Options):
        if field.name not in ("stages", "metrics"):
            assert shown[field.name].default == field.default, field.name
    assert not set(NOT_YET) & set(shown)


def test_the_default_optimizer() -> None:
    made = default_optimizer(list(nn.Linear(2, 2).named_parameters()))
    assert isinstance(made, torch.optim.AdamW)
    assert made.defaults["lr"] == 1e-3


def test_sources_are_opened_once() -> None:
    sources = opened_sources({"train": [1], "valid": [2]}, evaluate_every=3)
    assert list(sources) == ["train", "valid"]
    assert opened_sources(None, None) == {}


def test_compile_and_recompute() -> None:
    assert Options(2, recompute="full").compile is False
    with pytest.raises(TypeError, match="compile is 1, but must be True or False"):
        Options(2, compile=1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="recompute is 'half', but must be 'none', 'full', or a callable"):
        Options(2, recompute="half")


def test_tensor_groups_need_processes_and_a_whole_number() -> None:
    assert Options(2, tensor_parallel=2).tensor_parallel == 2
    assert Options(2, tensor_parallel=1, backend="local").tensor_parallel == 1
    with pytest.raises(ValueError, match="tensor_parallel is 0, but must be at least 1"):
        Options(2, tensor_parallel=0)
    with pytest.raises(ValueError, match="use backend='ray', or tensor_parallel=1"):
        Options(2, tensor_parallel=2, backend="local")
    with pytest.raises(TypeError, match=r"tensor_parallel_plan is \{'up': 'colwise'\}, but must be a dict of patterns"):
        Options(2, tensor_parallel_plan={"up": "colwise"})  # type: ignore[dict-item]
