import math
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from helpers.ledger import claims, rules
from helpers.ledger.claims import CLAIMS, SETUPS, Claim, Part
from helpers.ledger.rules import INCONCLUSIVE, NOT_JUDGED, NOT_REPRODUCED, REPRODUCED, Ledger, missing

REFERENCE = Path(__file__).parents[2] / "outputs" / "reference" / "claims.csv"

EXACT = {"dataset": "mnist", "num_train": 60_000, "epochs": 30, "lr": 0.01, "batch_sizes": [64, 256, 1024]}


@pytest.fixture
def judge(monkeypatch):
    """Judge one part by a rule: ``judge(values, low, high, exact, **used)`` → its row of the table."""

    def judge(values, low=1.0, high=2.0, exact=False, **used):
        part = Part("part", "a ratio", low, high, "1.5", "stated", exact)
        monkeypatch.setitem(CLAIMS, "test", Claim("It holds", "a test", "shen", {"part": part}))
        ledger = Ledger("99_test", **EXACT | used)
        ledger.judge("test", {"part": values})
        return ledger.table().iloc[0]

    return judge


def table_of(**verdicts):
    """A table of one claim with these verdicts; a part whose name begins with ``_`` is exact and does not count."""
    return pd.DataFrame([
        {"claim": "c", "statement": "s", "source": "x", "notebook": "n", "part": part, "verdict": verdict,
         "why": f"why {part}", "exact": part.startswith("_"), "counts": part[0] != "_" and verdict != NOT_JUDGED}
        for part, verdict in verdicts.items()
    ])  # fmt: skip


# Intervals


def test_the_interval_of_three_figures_by_hand():
    mean, low, high = rules.interval([1.0, 2.0, 3.0])
    half = 4.302653 / math.sqrt(3)  # t of 2 degrees of freedom at 97.5 %, times a standard deviation of 1
    assert (mean, low, high) == (2.0, pytest.approx(2 - half, abs=1e-6), pytest.approx(2 + half, abs=1e-6))


@pytest.mark.parametrize("level", [0.95, 0.8])
def test_the_interval_is_students(level):
    values = np.random.default_rng(0).normal(size=7)
    expected = stats.t.interval(level, 6, loc=values.mean(), scale=stats.sem(values))
    assert rules.interval(values, level)[1:] == pytest.approx(expected)


def test_one_figure_has_no_interval():
    mean, low, high = rules.interval([5.0])
    assert mean == 5.0
    assert math.isnan(low)
    assert math.isnan(high)


# Verdicts on a part


@pytest.mark.parametrize(
    ("values", "low", "high", "verdict"),
    [
        ([1.49, 1.5, 1.51], 1.0, 2.0, REPRODUCED),
        ([1.5, 1.5, 1.5], 1.5, 1.5, REPRODUCED),
        ([2.49, 2.5, 2.51], 1.0, 2.0, NOT_REPRODUCED),
        ([0.49, 0.5, 0.51], 1.0, 2.0, NOT_REPRODUCED),
        ([1.9, 2.0, 2.1], 1.0, 2.0, INCONCLUSIVE),
        ([0.9, 1.0, 1.1], 1.0, 2.0, INCONCLUSIVE),
        ([0.0, 1.5, 3.0], 1.0, 2.0, INCONCLUSIVE),
        ([5.0, 5.1, 5.2], 1.0, math.inf, REPRODUCED),
        ([5.0, 5.1, 5.2], -math.inf, 1.0, NOT_REPRODUCED),
    ],
)
def test_the_interval_inside_outside_or_across_the_rule_decides(judge, values, low, high, verdict):
    row = judge(values, low, high)
    assert row["verdict"] == verdict
    assert (row["ours"], row["low"], row["high"]) == pytest.approx(rules.interval(values))
    assert row["n"] == 3
    assert row["why"] == ("the interval reaches across the rule's bound: more seeds are needed" if
                          verdict == INCONCLUSIVE else "")  # fmt: skip


def test_two_seeds_decide_nothing(judge):
    row = judge([1.5, 1.5])
    assert (row["verdict"], row["why"]) == (INCONCLUSIVE, "too few seeds: 2, and 3 are needed")


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_seed_that_diverged_decides_nothing(judge, bad):
    row = judge([1.5, 1.5, 1.5, bad])
    assert (row["verdict"], row["why"]) == (INCONCLUSIVE, "a seed diverged")


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize(
    ("used", "why"),
    [({"dataset": "digits"}, "dataset digits instead of mnist"), ({"lr": 0.1}, "lr 0.1 instead of 0.01")],
)
def test_another_set_up_decides_nothing(judge, exact, used, why):
    for values in ([1.5, 1.5, 1.5], [9.0, 9.0, 9.0]):
        row = judge(values, exact=exact, **used)
        assert (row["verdict"], row["why"]) == (INCONCLUSIVE, f"another set-up: {why}")


@pytest.mark.parametrize(("values", "verdict"), [([1.5] * 3, REPRODUCED), ([9.0] * 3, NOT_REPRODUCED)])
def test_a_reduced_scale_decides_a_direction_and_is_noted(judge, values, verdict):
    row = judge(values, num_train=6_000)
    assert row["verdict"] == verdict
    assert row["why"] == "at a reduced scale: num_train 6000 instead of 60000"
    assert row["counts"]


def test_a_reduced_scale_does_not_decide_a_published_figure(judge):
    row = judge([1.5] * 3, exact=True, epochs=2, num_train=6_000)
    assert row["verdict"] == INCONCLUSIVE
    assert row["why"] == "reduced set-up: num_train 6000 instead of 60000, epochs 2 instead of 30"
    assert not row["counts"]


def test_the_exact_set_up_decides_a_published_figure(judge):
    row = judge([1.5] * 3, exact=True)
    assert (row["verdict"], row["why"]) == (REPRODUCED, "")
    assert row["counts"]


@pytest.mark.parametrize("parts", [[], ["64-1024", "64", "256"], ["64-1024", "64", "256", "1024", "2048"]])
def test_a_claim_is_judged_by_all_its_parts_and_no_other(parts):
    ledger = Ledger("02", **EXACT)
    with pytest.raises(KeyError, match="sweep-gap is judged by"):
        ledger.judge("sweep-gap", {part: [1.0, 1.0, 1.0] for part in parts})
    assert ledger.rows == []


def test_an_unknown_claim_is_refused():
    with pytest.raises(KeyError):
        Ledger("02", **EXACT).judge("no-such-claim", {})


# Verdicts on a claim


@pytest.mark.parametrize(
    ("parts", "verdict"),
    [
        ({"a": REPRODUCED, "b": REPRODUCED}, REPRODUCED),
        ({"a": REPRODUCED, "b": NOT_REPRODUCED}, NOT_REPRODUCED),
        ({"a": INCONCLUSIVE, "b": NOT_REPRODUCED}, NOT_REPRODUCED),
        ({"a": REPRODUCED, "b": INCONCLUSIVE}, INCONCLUSIVE),
        ({"a": INCONCLUSIVE}, INCONCLUSIVE),
        ({"a": REPRODUCED, "_b": INCONCLUSIVE}, REPRODUCED),
        ({"_a": INCONCLUSIVE}, INCONCLUSIVE),
        ({"a": NOT_JUDGED, "b": NOT_JUDGED}, NOT_JUDGED),
        ({"_a": INCONCLUSIVE, "b": NOT_JUDGED}, NOT_JUDGED),
        ({"_a": NOT_JUDGED}, NOT_JUDGED),
        ({"a": REPRODUCED, "b": NOT_JUDGED}, INCONCLUSIVE),
        ({"a": NOT_REPRODUCED, "b": NOT_JUDGED}, NOT_REPRODUCED),
        ({"a": REPRODUCED, "_b": NOT_JUDGED}, REPRODUCED),
    ],
)
def test_a_claim_is_judged_by_its_parts_that_count(parts, verdict):
    row = rules.summary(table_of(**parts)).to_dict("records")
    assert [r["verdict"] for r in row] == [verdict]
    judged = [part for part, verdict in parts.items() if part[0] != "_" and verdict != NOT_JUDGED]
    counted = judged + [part for part in parts if part[0] != "_" and part not in judged] if judged else list(parts)
    assert row[0]["why"] == "; ".join(f"why {part}" for part in counted)


def test_the_summary_has_a_row_per_claim_in_the_tables_order():
    table = pd.concat([table_of(a=NOT_REPRODUCED), table_of(a=REPRODUCED, b=REPRODUCED).assign(claim="b")])
    assert rules.summary(table)["claim"].tolist() == ["c", "b"]
    assert rules.summary(table)["verdict"].tolist() == [NOT_REPRODUCED, REPRODUCED]


# The ledger's own text and files


def test_the_claims_reproduce_the_committed_reference():
    reference = rules.read(REFERENCE)
    columns = ["statement", "source", "part", "measured", "published", "known", "rule", "above", "below", "exact"]
    ours = pd.DataFrame(
        {"claim": c, "statement": claim.statement, "source": claim.source, "part": p.label, "measured": p.measured,
         "published": p.published, "known": p.known, "rule": p.rule, "above": p.low, "below": p.high, "exact": p.exact}
        for c, claim in CLAIMS.items() for p in claim.parts.values()
    )  # fmt: skip
    for claim_id, parts in reference.groupby("claim"):
        same = ours[ours["claim"] == claim_id]
        pd.testing.assert_frame_equal(same[columns].reset_index(drop=True), parts[columns].reset_index(drop=True))
    assert set(ours["claim"]) >= set(reference["claim"])  # a new claim waits for the next reference
    assert {claim.setup for claim in CLAIMS.values()} == set(SETUPS)


GOOD = """
- claim: c
  statement: It holds
  source: a test
  setup: any
  parts: [{key: a/b, label: a ÷ b, measured: a ratio, low: 1, published: above 1, known: stated}]
"""


@pytest.mark.parametrize(
    ("good", "bad", "message"),
    [
        ("claim: c", "claim: 7", "7: claim is 7; expected a str"),
        ("statement: It holds", "statment: It holds", "c: statement is None; expected a str"),
        ("setup: any", "setup: other", "c: unknown setup 'other'; one of any"),
        ("parts: [", "parts: [7, ", "c: 7: is 7; expected fields and values"),
        ("key: a/b", "key: a ÷ b", "a ÷ b: a key is plain ASCII without spaces"),
        ("low: 1", "low: 1e-5", "a/b: low is '1e-5'; expected a number"),
        ("low: 1", "low: 1, high: 0.5", "a/b: low 1 and high 0.5 are no range"),
        ("low: 1, ", "", "a/b: low -inf and high inf are no range"),
        ("low: 1", "low: 1, note: x", "a/b: unknown field note"),
        ("published: above 1", "margin: 0.1, published: above 1", "published is 'above 1'; expected a number"),
        ("known: stated", "known: guessed", "known is 'guessed'; expected one of stated"),
        ("known: stated}", "known: stated}, {key: a/b, label: x, measured: y, low: 1, published: z, known: stated}",
         "c: two parts have the key 'a/b'"),
        ("- claim: c", "- claim: [", "bad.yml: while parsing"),
        (GOOD, GOOD + GOOD, "c: a claim of that name exists already"),
    ],
)  # fmt: skip
def test_a_malformed_claim_is_refused_in_one_line(tmp_path, good, bad, message):
    (tmp_path / "setups.yml").write_text("any: {}")
    (tmp_path / "good.yml").write_text(GOOD.replace("claim: c", "claim: fine"))
    assert claims.load(tmp_path)[1]["fine"].parts["a/b"].rule == "above 1"
    (tmp_path / "bad.yml").write_text(GOOD.replace(good, bad), encoding="utf-8")
    with pytest.raises(ValueError, match=re.escape(message)) as refused:
        claims.load(tmp_path)
    assert str(refused.value).startswith("bad.yml: ") and "\n" not in str(refused.value)


def test_a_part_that_was_not_measured_is_not_judged_and_says_why():
    ledger = Ledger("03_gradient_norms", **EXACT)
    ledger.judge("walk-norm-grows", {"64/2": missing("no batch of 2"), "1024/64": [1.4, 1.5, 1.6]})
    row = ledger.table().iloc[0]
    assert (row["verdict"], row["why"], row["n"], row["counts"]) == (NOT_JUDGED, "no batch of 2", 0, False)
    assert row[["ours", "low", "high"]].isna().all()
    assert rules.readable(ledger.table())["ours [95 %]"].tolist() == ["–", "1.5 [1.252, 1.748]"]
    assert rules.summary(ledger.table())[["verdict", "why"]].values.tolist() == [[INCONCLUSIVE, "no batch of 2"]]


def test_every_claim_can_come_true_and_can_fail():
    for claim_id, claim in CLAIMS.items():
        inside, outside = {}, {}
        for name, part in claim.parts.items():
            low, high = max(part.low, -1e9), min(part.high, 1e9)
            inside[name] = [(low + high) / 2] * 3
            outside[name] = [part.high + 1 if math.isfinite(part.high) else part.low - 1] * 3
        for measured, verdict in ((inside, REPRODUCED), (outside, NOT_REPRODUCED)):
            ledger = Ledger("n", **{"dataset": "any", **SETUPS[claim.setup].must_match, **SETUPS[claim.setup].scale})
            ledger.judge(claim_id, measured)
            assert set(ledger.table()["verdict"]) == {verdict}, claim_id


def test_the_rule_says_its_range():
    assert Part("", "x", -math.inf, 0.5).rule == "below 0.5"
    assert Part("", "x", 1.0, math.inf).rule == "above 1"
    assert Part("", "x", 97.6, 98.2).rule == "97.6 to 98.2"


@pytest.mark.parametrize("value", [2.0, 9.0], ids=["all reproduced", "none"])
@pytest.mark.parametrize("claim_ids", [["init-norm"], ["early-larger", "sweep-gap"], ["norm-spread"]])
def test_a_saved_ledger_reads_back_the_same(tmp_path, claim_ids, value):
    ledger = Ledger("02_mnist_sweep", **EXACT)
    for claim_id in claim_ids:
        ledger.judge(claim_id, {part: [value] * 3 for part in CLAIMS[claim_id].parts})
    file = ledger.save(tmp_path)
    assert file == tmp_path / "claims" / "02_mnist_sweep.csv"
    back = pd.read_csv(file)
    pd.testing.assert_frame_equal(rules.summary(back), rules.summary(ledger.table()))
    readable = [rules.readable(table).astype(str) for table in (back, ledger.table())]
    pd.testing.assert_frame_equal(*readable)


def test_people_read_rounded_figures_with_their_interval(judge):
    judge([1.0, 2.0, 3.0])
    ledger = Ledger("02", **EXACT)
    ledger.judge("test", {"part": [1.0, 2.0, 3.0]})
    row = rules.readable(ledger.table()).iloc[0]
    assert row["ours [95 %]"] == "2 [-0.4841, 4.484]"
    assert row["published"] == "1.5 (stated)"
    assert row["rule"] == "1 to 2"
    html = rules.show(ledger.table()).to_html()
    assert "2 [-0.4841, 4.484]" in html
    assert INCONCLUSIVE in html
