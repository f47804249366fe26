"""What docs/learning.md's figures mean: the paired comparison with PEFT, and the cells of the study."""

from typing import Any

import pytest

from benchmarks.learning import CONTESTANTS, cells
from benchmarks.learning_peers import PEERS, difference, pairs, time_to
from benchmarks.learning_sets import SETS, UNSEEN


def record(hits: str, looks: tuple[Any, ...] = ()) -> dict[str, Any]:
    return {"hits": hits, "looks": looks}


def test_a_difference_is_in_points_and_tested_on_the_rows_that_differ() -> None:
    pair = ("movies", record("1111100000" + "1" * 90), record("0000000000" + "1" * 90))
    points, (low, high), p = difference([pair])
    assert points == pytest.approx(5.0)
    assert p == pytest.approx(2 * 0.5**5)  # 5 of 5 for one side
    assert 0 <= low < 5 < high < 12
    back, _, same = difference([(pair[0], pair[2], pair[1])])
    assert (back, same) == (pytest.approx(-5.0), pytest.approx(p))


def test_seeds_that_say_the_same_do_not_narrow_an_interval() -> None:
    pair = ("movies", record("1" * 20 + "0" * 80), record("0" * 10 + "1" * 10 + "0" * 80))
    one, three = difference([pair])[1], difference([pair] * 3)[1]
    assert three[1] - three[0] == pytest.approx(one[1] - one[0], rel=0.1)


def test_equal_answers_differ_by_nothing() -> None:
    points, interval, p = difference([("movies", record("1010"), record("1010"))])
    assert (points, interval, p) == (0.0, (0.0, 0.0), 1.0)


def test_data_sets_weigh_the_same() -> None:
    found = [("movies", record("1" * 10), record("0" * 10)), ("glosses", record("0" * 40), record("0" * 40))]
    assert difference(found)[0] == pytest.approx(50.0)


def test_the_time_to_a_loss_is_a_part_of_the_others_whole_time() -> None:
    theirs = record("", ((5, 2.0, 0, 1.5), (40, 16.0, 0, 0.5)))
    assert time_to(record("", ((5, 4.0, 0, 0.6), (10, 8.0, 0, 0.5))), theirs) == pytest.approx(0.5)
    assert time_to(record("", ((40, 9.0, 0, 0.51),)), theirs) is None


def test_pairs_are_of_one_data_set_and_seed() -> None:
    names = [f"{data}/{title}/{seed}" for title in ("P-tuning", "PEFT p-tuning") for data in SETS for seed in (0, 1)]
    records = {name: {"name": name} for name in names if name != "movies/PEFT p-tuning/1"}
    found = list(pairs(records, "P-tuning", "PEFT p-tuning"))
    assert len(found) == 2 * len(SETS) - 1
    assert all(one["name"].replace("P-tuning", "PEFT p-tuning") == other["name"] for _, one, other in found)


def test_cells_are_known_and_named_once() -> None:
    names = list(cells(3, quick=False))
    assert len(names) == len(set(names))
    for name in names:
        data, title, seed = name.split("/")
        assert data in SETS | UNSEEN
        assert not (CONTESTANTS[title].variant and seed != "0")
    assert set(cells(3, quick=True)) < set(names)
    assert all(peer in CONTESTANTS for pair in PEERS.items() for peer in pair)
