from __future__ import annotations

import torch

from raypipe.model.seeds import Seeds, kept_state, pass_by, run_keyed, run_under


def test_what_is_drawn_does_not_depend_on_what_ran_before() -> None:
    def drawn(runs: bool) -> list[float]:
        Seeds(0, 1, 2).start()
        if runs:
            run_keyed(lambda: torch.rand(100))
        else:
            pass_by()
        return [float(torch.rand(())), float(run_keyed(lambda: torch.rand(())))]

    assert drawn(True) == drawn(False)


def test_every_key_and_every_place_draws_its_own() -> None:
    seen = set()
    for seeds in (Seeds(0, 0, 0), Seeds(1, 0, 0), Seeds(0, 1, 0), Seeds(0, 0, 1)):
        seeds.start()
        for _ in range(3):
            seen |= {float(torch.rand(())), float(run_keyed(lambda: torch.rand(())))}
    assert len(seen) == 24


def test_a_restored_state_replays() -> None:
    Seeds(0, 0, 0).start()
    with torch.random.fork_rng():
        first = [run_keyed(lambda: torch.rand(2)) for _ in range(2)]
    again = [run_keyed(lambda: torch.rand(2)) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_the_callers_state_is_kept() -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    with kept_state():
        Seeds(0, 0, 0).start()
    assert torch.equal(torch.get_rng_state(), before)


def test_a_link_can_be_run_under_once_more() -> None:
    Seeds(0, 0, 0).start()
    links: list[int] = []

    def draw() -> torch.Tensor:
        links.append(torch.default_generator.initial_seed())
        return torch.rand(3)

    first = run_keyed(draw)
    state = torch.get_rng_state()
    assert torch.equal(run_under(links[0], draw), first)
    assert torch.equal(torch.get_rng_state(), state)
    assert links[0] == links[1]
