"""Path ids and levels as labels."""

from __future__ import annotations

import numpy as np
import pytest

from aivo_core.encoding import PATHS, Event, fit_encoder, path_name
from aivo_core.encoding.labels import path_id, relation
from aivo_core.ordinal import level_weights


def test_the_24_path_ids_have_24_names() -> None:
    ids = {path_id(relation=r, decile_change=change, after_break=False) for r in range(6) for change in (-5, 0, 5)}
    ids |= {path_id(relation=r, decile_change=0, after_break=True) for r in range(6)}
    assert ids == set(range(PATHS))
    assert len({path_name(path) for path in ids}) == PATHS == 24
    assert path_name(5) == "same_category/harder"
    assert path_name(18) == "repeat_item/after_break"
    with pytest.raises(ValueError, match=r"0\.\.23"):
        path_name(24)


@pytest.mark.parametrize(("change", "step"), [(-9, 0), (-2, 0), (-1, 1), (0, 1), (1, 1), (2, 2), (9, 2)])
def test_a_step_is_harder_or_easier_from_two_deciles_on(change: int, step: int) -> None:
    assert path_id(relation=1, decile_change=change, after_break=False) == 3 + step


def test_the_first_relation_that_holds_counts() -> None:
    assert relation(item_seen=True, same_category=True, category_seen=True, same_subject=True) == 0
    assert relation(item_seen=False, same_category=True, category_seen=True, same_subject=True) == 1
    assert relation(item_seen=False, same_category=False, category_seen=True, same_subject=True) == 2
    assert relation(item_seen=False, same_category=False, category_seen=True, same_subject=False) == 3
    assert relation(item_seen=False, same_category=False, category_seen=False, same_subject=True) == 4
    assert relation(item_seen=False, same_category=False, category_seen=False, same_subject=False) == 5


# Ten items of one category, one per decile: i0 everybody gets right, i9 nobody.
SCALE = fit_encoder(
    (f"l{n:02d}", [Event("a", f"i{i}", "s", float(n / 20 > (i + 0.5) / 10)) for i in range(10)]) for n in range(20)
).encoder


def test_paths_of_a_short_history_are_what_a_teacher_would_say() -> None:
    events = [
        Event("a", "i4", "s", 1.0, seconds=0.0),
        Event("a", "i5", "s", 1.0, seconds=60.0),
        Event("a", "i9", "s", 0.0, seconds=90.0),
        Event("a", "i4", "s", 1.0, seconds=120.0),
        Event("b", "", "s", 1.0, seconds=150.0),
        Event("a", "i0", "s", 1.0, seconds=1950.0),
        Event("a", "i1", "s", 1.0, seconds=3751.0),
        Event("c", "", "other", 1.0, seconds=3760.0),
        Event("a", "i2", "s", 1.0, seconds=None),
        Event("a", "i3", "s", 1.0, seconds=99_999.0),
    ]
    samples, _ = SCALE.encode(events)
    names = [path_name(path) for path in samples.path.tolist()]
    assert [name.split("/")[0] for name in names] == [
        "same_category",
        "same_category",
        "repeat_item",
        "new_same_subject",
        "review_same_subject",
        "same_category",
        "review_other_subject" if SCALE.slot("c") == SCALE.slot("b") else "new_other_subject",
        "review_other_subject",
        "same_category",
    ]
    assert [name.split("/")[1] for name in names[:3]] == ["same", "harder", "easier"]
    # A gap of exactly 1,800 s is no break, one second more is; an unknown time begins no session, before or after it.
    assert names[4].endswith("/easier")
    assert names[5].endswith("/after_break")
    assert not names[7].endswith("/after_break")
    assert not names[8].endswith("/after_break")


def test_the_last_score_never_enters_a_path() -> None:
    items = ["i1", "i5", "i9", "i1", "i2"]
    paths = [SCALE.encode([Event("a", item, "s", score) for item in items])[0].path.tolist() for score in (0.0, 0.5, 1.0)]
    assert paths[0] == paths[1] == paths[2]


def test_the_level_label_reads_the_success_curve_at_its_place() -> None:
    samples, _ = SCALE.encode([Event("a", f"i{i}", "s", 1.0) for i in (0, 0, 3, 9)])
    assert samples.level.tolist() == pytest.approx([0.5 + 9 * q for q in (0.05, 0.35, 0.95)])
    p = np.arange(10) / 45
    weights = level_weights(samples.level)
    for level, row in zip(samples.level.astype(float), weights, strict=True):
        low = int(level)
        curve = np.append(p[::-1].cumsum()[::-1], 0.0)
        assert row @ p == pytest.approx((1 - (level - low)) * curve[low] + (level - low) * curve[low + 1], rel=1e-5)
