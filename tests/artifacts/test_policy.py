"""Policies: who is asked for the width before a request, and when."""

import copy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from mbq.artifacts.errors import InputError
from mbq.artifacts.loading import load_model

IDS = torch.arange(24)[None] * 7 % 320
ROOT = Path(__file__).parents[2]


def test_a_policy_is_asked_before_every_request(finished_run: Any) -> None:
    model: Any = load_model(finished_run.checkpoint)
    widths = iter([2.0, 8.0])
    model.set_policy(lambda: next(widths))
    ids = IDS[:1, :6]
    for expected in (2.0, 8.0):
        model.generate(ids, max_new_tokens=3, do_sample=False)
        assert model.realised_bits() == expected
    model.set_policy(None)
    model.generate(ids, max_new_tokens=3, do_sample=False)
    assert model.realised_bits() == 8.0
    model.set_policy(lambda: 9.0)
    with pytest.raises(InputError, match="must lie between 2 and 8"):
        model.generate(ids, max_new_tokens=3)


def test_a_policy_leaves_a_users_own_generate_alone(finished_run: Any) -> None:
    model: Any = load_model(finished_run.checkpoint)
    plain, seen = model.generate, []

    def traced(*arguments: Any, **options: Any) -> Any:
        seen.append(len(seen))
        return plain(*arguments, **options)

    model.generate = traced
    for policy, expected in ((lambda: 2.0, 2.0), (lambda: 3.0, 3.0), (None, 3.0)):
        model.set_policy(policy)
        model.generate(IDS[:1, :4], max_new_tokens=2, do_sample=False)
        assert model.realised_bits() == pytest.approx(expected, abs=0.2)
    assert seen == [0, 1, 2]


def test_the_policy_set_last_is_asked_once(finished_run: Any) -> None:
    model: Any = load_model(finished_run.checkpoint)
    asked: list[float] = []

    def policy(bits: float) -> Any:
        return lambda: asked.append(bits) or bits

    def generate() -> None:
        model.generate(IDS[:1, :4], max_new_tokens=2, do_sample=False)

    model.set_policy(policy(2.0))
    asking = model.generate
    # A user's around ours, and one instead of it.
    model.generate = lambda *arguments, **options: asking(*arguments, **options)
    model.set_policy(policy(3.0))
    generate()
    model.generate = partial(type(model).generate, model)
    model.set_policy(policy(4.0))
    generate()
    model.generate = asking
    model.set_policy(policy(8.0))
    generate()
    assert asked == [3.0, 4.0, 8.0]


def test_a_copy_follows_its_policy_itself(finished_run: Any) -> None:
    model: Any = load_model(finished_run.checkpoint)
    model.set_policy(lambda: 2.0)
    other = copy.deepcopy(model)
    other.generate(IDS[:1, :4], max_new_tokens=2, do_sample=False)
    assert other.realised_bits() == 2.0
    with pytest.raises(InputError, match="no token"):
        model.realised_bits()
