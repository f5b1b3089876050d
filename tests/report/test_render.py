"""The report: one safe, self-contained page that shows what was measured, for any number of classes
and any names."""

from __future__ import annotations

import base64
import dataclasses
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import finetune
from finetune import metrics
from finetune.metrics import Estimate
from finetune.report import render
from finetune.report.render import (
    Candidate,
    Contender,
    Curve,
    Distance,
    Matrix,
    Mistake,
    ReportData,
)

PNG = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)
VOID = {"meta", "br", "img", "line", "polyline"}


class Page(HTMLParser):
    """The page as a reader of HTML sees it: tags, attributes, text, and whether every tag is closed
    in its turn."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.texts: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {key: value or "" for key, value in attrs}))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {key: value or "" for key, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert tag == self.open.pop(), f"</{tag}> closes another tag, line {self.getpos()}"

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] not in ("style", "script"):
            self.texts.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.texts))

    def count(self, tag: str, **attributes: str) -> int:
        return sum(
            name == tag
            and all(found.get(key.rstrip("_")) == value for key, value in attributes.items())
            for name, found in self.tags
        )


def counts(n_classes: int, per_class: int = 10, wrong: int = 2) -> NDArray[np.int64]:
    matrix = np.eye(n_classes, dtype=np.int64) * (per_class - wrong)
    for i in range(n_classes):
        matrix[i, (i + 1) % n_classes] += wrong
    return matrix


def data(n_classes: int = 3, **changes: Any) -> ReportData:
    confusion = changes.pop("confusion", counts(n_classes))
    names = tuple(f"class {i}" for i in range(n_classes))
    top1 = Estimate(0.8, 0.62, 0.91, 30, "wilson")
    base = ReportData(
        title="shapes",
        made="1 May 2026",
        headline="Ship the SVM on stage5/3x3: it names 80.0% right.",
        second="Nothing was fine-tuned.",
        shipped="svm",
        classes=names,
        training=(40,) * n_classes,
        confusion=confusion,
        metrics={
            "top1": top1,
            "balanced": top1,
            "macro_f1": top1,
            "ece": 0.051,
            "nll": 0.7,
            "majority": 1 / 3,
        },
        matrix=Matrix(
            ("few", "many"),
            ("near", "far"),
            (("svm", "svm"), ("half", "full")),
            (1, 0),
            "half",
            ("a reason",),
            ("collect more",),
        ),
        distance=Distance(
            "near", 0.05, 0.04, 0.06, 128, 0.1, 0.2, "5-NN is right for 75%.", ("a note",)
        ),
        seconds=(("features", 12.0), ("svm", 4.0)),
        commands=(("Predict", "finetune predict runs/x img.jpg"),),
    )
    return dataclasses.replace(base, **changes)


def full(**changes: Any) -> ReportData:
    y = np.repeat([0, 1, 2], 10)
    return data(
        contenders=(
            Contender(
                "SVM", Estimate(0.8, 0.7, 0.9, 30, "wilson"), "30 test images", False, "linear"
            ),
            Contender("Fine-tuned", Estimate(0.9, 0.8, 0.94, 30, "wilson"), "30 test images", True),
        ),
        pair=metrics.paired(y, (y + (np.arange(30) % 5 == 0)) % 3, y),
        pair_on="30 validation images",
        candidates=(
            Candidate("pooled", 0.75, 0.02, "C = 1"),
            Candidate("stage5/3x3", 0.8, 0.01, "C = 10", True),
        ),
        curves=(
            Curve("Loss", "training", [0, 1, 2], [1.0, 0.5, 0.25]),
            Curve("Loss", "validation", [0, 1, 2], [1.1, float("nan"), 0.5]),
        ),
        best_epoch=2,
        diagnosis=("It learns.",),
        mistakes=(
            Mistake("a/1.jpg", "class 0", "class 1", 0.97, PNG),
            Mistake("a/2.jpg", "class 1", "class 2", 0.6, b""),
        ),
        facts=(("Seed", "0"),),
        **changes,
    )


@pytest.mark.parametrize(
    "value", [data(1), data(2), data(10), data(100), full(), data(warnings=("one", "two"))]
)
def test_every_page_is_well_formed(value: ReportData) -> None:
    """Tags close in turn, ids are unique and every reference to one holds, for few and for many
    classes."""
    page = Page(render.render(value))
    ids = [found["id"] for _, found in page.tags if "id" in found]

    assert not page.open
    assert len(ids) == len(set(ids))
    assert {
        found["aria-labelledby"] for _, found in page.tags if "aria-labelledby" in found
    } <= set(ids)


def test_the_page_loads_nothing() -> None:
    """No address of anything outside stands in the page, and its own policy forbids the rest."""
    html = render.render(full())
    page = Page(html)

    assert not re.search(r"https?:|url\(|@import|//[a-z]", html)
    assert not [
        tag for tag, _ in page.tags if tag in ("link", "iframe", "object", "embed", "base", "form")
    ]
    assert {"data:image/png;base64," + base64.b64encode(PNG).decode()} == {
        found["src"] for _, found in page.tags if "src" in found
    }
    policy = next(
        found["content"]
        for _, found in page.tags
        if found.get("http-equiv") == "Content-Security-Policy"
    )
    assert policy.startswith("default-src 'none'; img-src data:;")


EVIL = '<script>alert("1")</script>&\'"><img src=x onerror=alert(1)>'


def test_every_text_is_escaped() -> None:
    """A class, path, reason or command that looks like HTML is shown as it is, and adds no tag."""
    plain, value = full(), full(warnings=("loud",))
    names = (EVIL, "class 1", "class 2")
    evil = dataclasses.replace(
        value,
        title=EVIL,
        made=EVIL,
        headline=EVIL,
        second=EVIL,
        warnings=(EVIL,),
        classes=names,
        matrix=Matrix(
            (EVIL, EVIL), (EVIL, EVIL), ((EVIL, EVIL), (EVIL, EVIL)), (1, 0), EVIL, (EVIL,), (EVIL,)
        ),
        distance=dataclasses.replace(value.distance, word=EVIL, second_opinion=EVIL, notes=(EVIL,)),
        seconds=((EVIL, 1.0), ("svm", 2.0)),
        commands=((EVIL, EVIL),),
        contenders=tuple(
            dataclasses.replace(c, name=EVIL, on=EVIL, detail=EVIL) for c in value.contenders[:1]
        )
        + value.contenders[1:],
        pair_on=EVIL,
        candidates=tuple(dataclasses.replace(c, name=EVIL, detail=EVIL) for c in value.candidates),
        curves=tuple(dataclasses.replace(c, name=EVIL, panel=EVIL) for c in value.curves),
        diagnosis=(EVIL,),
        mistakes=tuple(
            dataclasses.replace(m, path=EVIL, true=EVIL, predicted=EVIL) for m in value.mistakes
        ),
        facts=((EVIL, EVIL),),
    )
    tame, page = (
        Page(render.render(dataclasses.replace(plain, warnings=("loud",)))),
        Page(render.render(evil)),
    )

    assert [tag for tag, _ in tame.tags] == [tag for tag, _ in page.tags]
    assert not [found for _, found in page.tags if "onerror" in found]
    assert page.text.count('<script>alert("1")</script>') > 30


def test_the_verdict_comes_first_and_the_numbers_carry_their_intervals() -> None:
    """Headline, second sentence, and the tiles with value, interval and method."""
    html = render.render(data())
    page = Page(html)

    assert 1 == page.count("h1")
    assert (
        html.index("<h1>Ship the SVM on stage5/3x3")
        < html.index("Nothing was fine-tuned.")
        < html.index("<main>")
    )
    assert "Accuracy 80.0% 62.0–91.0% (wilson) test images named right" in page.text
    assert "Calibration error 5.1%" in page.text
    assert "Majority baseline 33.3%" in page.text
    assert "Right among 5" not in page.text


def test_warnings_stand_above_the_verdict() -> None:
    """What must not be missed is read out and stands before everything else."""
    html = render.render(data(warnings=("The weights are RANDOM.", "2 images were left out.")))

    assert 2 == Page(html).count("div", role="alert")
    assert html.index("RANDOM") < html.index("<h1>")
    assert 0 == Page(render.render(data())).count("div", role="alert")


def test_the_chosen_cell_of_the_matrix_is_marked() -> None:
    """Exactly one cell is current, that of the chosen row and column; none where nothing was
    chosen."""
    html = render.render(data())

    assert ["half"] == re.findall(r'<td aria-current="true">(\w+)<small>your images', html)
    assert "aria-current=" not in render.render(
        data(matrix=dataclasses.replace(data().matrix, chosen=None))
    )
    assert "a reason" in html
    assert "collect more" in html


def test_the_ruler_places_the_value_among_its_borders() -> None:
    """A value on a border lies on it, the interval ends where it should, and the bands fill the
    ruler."""
    on_border = render._ruler(Distance("moderate", 0.2, 0.1, 0.2, 64, 0.1, 0.2, ""))

    assert on_border is not None
    assert [on_border["low"], on_border["value"]] == [left for left, _ in on_border["borders"]]
    assert pytest.approx(on_border["value"]) == on_border["low"] + on_border["width"]
    assert pytest.approx(100) == sum(width for _, _, width in on_border["bands"])
    for value in (0.001, 0.05, 3.0):
        ruler = render._ruler(Distance("near", value, value * 0.9, value * 1.1, 64, 0.1, 0.2, ""))
        assert ruler is not None
        assert 0 <= ruler["low"] < ruler["value"] < 100


def test_the_interval_of_the_distance_says_its_level() -> None:
    """The distance carries its own kind of interval, which is not that of the other figures."""
    page = Page(render.render(data()))

    assert (
        "0.050, 90% bootstrap interval 0.040 to 0.060 from 128 images; near below 0.1, far "
        "above 0.2." in page.text
    )


def test_an_unknown_distance_is_said_in_words() -> None:
    """Without a measurement there is no ruler, and the page says so."""
    page = Page(
        render.render(
            data(
                distance=Distance(
                    "unknown",
                    None,
                    None,
                    None,
                    0,
                    0.1,
                    0.2,
                    "No opinion.",
                    ("another pretraining",),
                )
            )
        )
    )

    assert (
        "Distance to the photographs of ImageNet: unknown No distance was measured. No "
        "opinion. another pretraining" in page.text
    )
    assert 0 == page.count("div", class_="ruler")


def test_the_comparison_shows_both_models_and_the_paired_result() -> None:
    """Values, intervals, which one ships, the paired difference with its test, and the rule."""
    page = Page(render.render(full()))

    assert 1 == page.text.count("ships")
    assert "Fine-tuned ships 30 test images 90.0% 80.0–94.0" in page.text
    assert "Best rival minus SVM on 30 validation images: +20.0 points" in page.text
    assert "right on 6 of 30 images, the SVM alone on 0; p = 0.031 (exact McNemar)" in page.text


def test_intervals_are_drawn_where_their_numbers_say() -> None:
    """On an axis from 65 % to 95 %: 70 % at a sixth, 90 % at five sixths."""
    view = render._contenders(full())

    assert view is not None
    assert [(16.67, "70%"), (50.0, "80%"), (83.33, "90%")] == view["ticks"]
    assert [50.0, 83.33] == [row["value"] for row in view["rows"]]
    assert pytest.approx([16.67, 50.0]) == [row["low"] for row in view["rows"]]
    assert pytest.approx([66.66, 46.67], abs=0.02) == [row["width"] for row in view["rows"]]


def test_candidates_are_ordered_and_the_chosen_one_is_marked() -> None:
    """The best candidate stands first with the longest bar; the one that was chosen carries a
    tag."""
    rows = render._candidates(full().candidates)
    html = render.render(full())

    assert ["stage5/3x3", "pooled"] == [c.name for c, _ in rows]
    assert 100.0 == rows[0][1] > rows[1][1] > 0
    assert 1 == html.count('<tr class="chosen">')
    assert [100.0, 100.0] == [
        length for _, length in render._candidates((Candidate("a", 0.5, 0), Candidate("b", 0.5, 0)))
    ]


def test_curves_are_drawn_in_their_square() -> None:
    """Every point lies within 0 … 100, a value that is not a number leaves a gap, and the kept
    epoch is marked."""
    (panel,) = render._panels(full())
    pieces = [piece for line in panel["lines"] for piece in line["pieces"]]
    numbers = [float(n) for piece in pieces for n in re.split("[ ,]", piece)]

    assert 3 == len(pieces)
    assert 0 <= min(numbers) <= max(numbers) <= 100
    assert 100.0 == panel["best"]
    assert "training: from 1 to 0.25; validation: from 1.1 to 0.5" == panel["words"]
    # the first loss is high, so its point is far from the bottom
    assert "0,100" not in pieces[0].split()[0]


@pytest.mark.parametrize(
    "ys", [[0.5], [0.5, 0.5], [0.0, 0.0], [float("nan"), float("inf")], [-1.0, 2.0], [1e-9, 2e-9]]
)
def test_odd_curves_still_draw(ys: list[float]) -> None:
    """One epoch, a flat line, zeros, no finite value, negative and tiny values give a page, with
    numbers alone in its lines."""
    value = data(curves=(Curve("Loss", "training", list(range(len(ys))), ys),))
    page = Page(render.render(value))
    lines = [found["points"].split() for tag, found in page.tags if tag == "polyline"]

    assert not page.open
    assert "nan" not in page.text
    assert np.isfinite(ys).any() == bool(lines) == bool(render._panels(value))
    for points in lines:
        assert len(points) >= 2  # one point alone would not be seen
        assert all(0 <= float(n) <= 100 for point in points for n in point.split(","))


def test_a_value_that_is_not_finite_does_not_stretch_the_axis() -> None:
    """An infinite loss leaves a gap; the other points fill the panel as if it were not there."""
    (with_gap,) = render._panels(
        data(curves=(Curve("Loss", "a", [0, 1, 2], [2.0, float("inf"), 1.0]),))
    )
    (without,) = render._panels(data(curves=(Curve("Loss", "a", [0, 2], [2.0, 1.0]),)))

    assert without["y"] == with_gap["y"]
    assert without["lines"][0]["pieces"][0].split() == [
        piece.split()[0] for piece in with_gap["lines"][0]["pieces"]
    ]


def test_a_small_confusion_matrix_is_drawn_and_a_large_one_listed() -> None:
    """Up to 25 classes every cell is shown; beyond, the 15 most frequent confusions stand for
    them."""
    small, large = Page(render.render(data(25))), Page(render.render(data(26)))

    assert 25 == small.count("td", class_="right")
    assert 25 == small.count("td", class_="wrong")
    assert 0 == large.count("td", class_="right")
    assert 15 == large.text.count("2 of 10 ") - large.text.count("2 of 10 taken for")


def test_confused_pairs_by_hand() -> None:
    """Pairs are ordered by images, then by the share of their class; the diagonal is no
    confusion."""
    pairs = render.confused(np.array([[7, 3, 0], [1, 9, 0], [3, 0, 2]]), ["a", "b", "c"])

    assert [("c", "a", 3, 5), ("a", "b", 3, 10), ("b", "a", 1, 10)] == [
        (p["true"], p["predicted"], p["count"], p["of"]) for p in pairs
    ]
    assert [100.0, 100.0, 33.3] == [p["bar"] for p in pairs]


def test_a_faultless_model_has_no_confusions() -> None:
    """Where nothing went wrong the page says that, and shows no empty table."""
    page = Page(render.render(data(confusion=counts(3, wrong=0))))

    assert "Every test image was named right." in page.text
    assert "Taken for one another" not in page.text


def test_mistakes_show_picture_truth_prediction_and_certainty() -> None:
    """Each picture has a text for those who cannot see it; one that could not be made says so."""
    page = Page(render.render(full()))

    assert ["a/1.jpg: is class 0, taken for class 1"] == [
        found["alt"] for tag, found in page.tags if tag == "img"
    ]
    assert "is class 0 said class 1 97% sure · a/1.jpg" in page.text
    assert "no picture" in page.text


@pytest.mark.parametrize(
    ("picture", "kind"),
    [
        (b"\xff\xd8\xff\xe0", "data:image/jpeg;base64,"),
        (PNG, "data:image/png;base64,"),
        (b"RIFF1234WEBP", "data:image/webp;base64,"),
        (b"<svg", ""),
    ],
)
def test_only_pictures_become_pictures(picture: bytes, kind: str) -> None:
    """The kind follows from the bytes; what is no JPEG, PNG or WebP is not embedded."""
    url = render._data_url(picture)

    assert kind == url[: len(kind)]
    assert bool(kind) == bool(url)


def test_classes_are_sorted_by_f1_and_advised() -> None:
    """The weakest class first, one without test images last, each with what its numbers suggest."""
    confusion = np.array([[20, 0, 0, 0], [6, 14, 0, 0], [0, 0, 4, 1], [0, 0, 0, 0]])
    rows = render.class_rows(data(4, confusion=confusion, training=(100, 12, 50, 3)))
    words = {row["name"]: re.sub("[\u2068\u2069]", "", row["advice"]) for row in rows}

    assert ["class 1", "class 0", "class 2", "class 3"] == [row["name"] for row in rows]
    assert "6 of 20 taken for class 0. Only 12 training images: collect more." == words["class 1"]
    assert "6 images of other classes land here." == words["class 0"]
    assert (
        "1 of 5 taken for class 3. Only 5 test images: these figures are rough." == words["class 2"]
    )
    assert "No test images: nothing is known about this class." == words["class 3"]
    assert pytest.approx(2 * 14 / (20 + 14)) == rows[0]["f1"]


def test_many_classes_are_folded_away() -> None:
    """The 25 weakest of 100 classes are shown at once, the other 75 on demand."""
    page = Page(render.render(data(100)))

    assert "The other 75 classes" in page.text
    assert 100 == page.count("th", role="rowheader")
    assert 0 == Page(render.render(data(25))).count("details")


def test_time_is_shown_in_proportion() -> None:
    """Shares of the bar follow the seconds, and the legend names them."""
    assert [("features", "12 s", 75.0), ("svm", "4.0 s", 25.0)] == [
        (t["name"], t["text"], t["share"]) for t in render._times(data().seconds)
    ]
    assert [0.0] == [t["share"] for t in render._times((("nothing", 0.0),))]


def test_the_page_says_how_often_the_test_images_were_used() -> None:
    """Once is the rule; anything else is counted."""
    assert "The test images were looked at once, at the end." in Page(render.render(data())).text
    assert (
        "The test images were looked at 3 times, at the end."
        in Page(render.render(data(test_evaluations=3))).text
    )


def test_commands_can_be_copied_as_they_are() -> None:
    """The command stands in the page without line breaks or quotes of its own."""
    assert "<code>finetune predict runs/x img.jpg</code>" in render.render(data())


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.04, "0.0 s"),
        (9.94, "9.9 s"),
        (9.96, "10 s"),
        (99.4, "99 s"),
        (99.6, "2 min"),
        (5940, "99 min"),
        (6000, "1 h 40 min"),
    ],
)
def test_durations_read_well(seconds: float, text: str) -> None:
    """Seconds, then minutes, then hours, never more digits than help."""
    assert text == render.duration(seconds)


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0249, "+2.5"), (-0.008, "−0.8"), (0.0001, "±0.0"), (-0.0004, "±0.0"), (0.0, "±0.0")],
)
def test_differences_carry_their_sign(value: float, text: str) -> None:
    """Points are signed, with a true minus; what rounds to nothing has no sign."""
    assert text == render.points(value)


@pytest.mark.parametrize(
    ("value", "text"), [(1.0, "= 1.00"), (0.1234, "= 0.12"), (0.0312, "= 0.031"), (1e-9, "< 0.001")]
)
def test_chances_read_well(value: float, text: str) -> None:
    """Two digits where it does not matter, three where it does, and no powers of ten."""
    assert text == render.chance(value)


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1.0]),
        (0, 12, [0, 2, 4, 6, 8, 10, 12]),
        (0.62, 0.71, [0.62, 0.64, 0.66, 0.68, 0.7]),
        (3, 3, [3]),
        (-1, 1, [-1, -0.5, 0, 0.5, 1]),
    ],
)
def test_ticks_are_round_numbers_inside_the_axis(
    low: float, high: float, expected: list[float]
) -> None:
    """Steps of 1, 2 or 5 times a power of ten, none outside."""
    assert pytest.approx(expected) == render.ticks(low, high)


def luminance(colour: str) -> float:
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("theme", [0, 1])
@pytest.mark.parametrize(
    ("ink", "paper"),
    [
        ("ink", "paper"),
        ("ink", "soft"),
        ("ink", "warn-tint"),
        ("muted", "paper"),
        ("accent", "paper"),
        ("accent", "card"),
        ("on-accent", "accent"),
        ("wrong", "paper"),
        ("wrong", "warn-tint"),
    ],
)
def test_text_stands_out_in_both_themes(theme: int, ink: str, paper: str) -> None:
    """Every pair of text and ground has a contrast of at least 4.5 to 1 (WCAG 2 AA), light and
    dark."""
    themes = re.findall(r":root \{(.*?)\}", render.render(data()), re.DOTALL)
    colours = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6});", themes[theme]))
    light, dark = sorted((luminance(colours[ink]), luminance(colours[paper])), reverse=True)

    assert (light + 0.05) / (dark + 0.05) >= 4.5


def test_the_page_fits_a_phone_and_follows_the_theme() -> None:
    """It names the device's width and has rules for small screens, dark themes and printing."""
    html = render.render(data())

    assert '<meta name="viewport" content="width=device-width, initial-scale=1">' in html
    for rule in (
        "@media (max-width: 34rem)",
        "@media (prefers-color-scheme: dark)",
        "@media print",
    ):
        assert rule in html


def test_tables_name_their_headers_and_regions_can_be_reached() -> None:
    """Every header says what it heads, every scrolling region takes the keyboard and has a name."""
    page = Page(render.render(full()))

    assert not [found for tag, found in page.tags if tag == "th" and "scope" not in found]
    for _, found in page.tags:
        if found.get("class") == "scroll":
            assert found["tabindex"] == "0"
            assert found["aria-label"]
        if found.get("role") == "img":
            assert found["aria-label"]


def test_rendering_loads_nothing_heavy() -> None:
    """The report draws by itself: neither torch nor matplotlib nor scikit-learn is loaded for
    it."""
    heavy = "{'torch', 'matplotlib', 'sklearn', 'timm'}"
    code = (
        f"import sys; from finetune.report import render; render._template(); "
        f"print(sys.modules.keys() & {heavy})"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(finetune.__file__).parent.parent)}

    assert (
        "set()\n"
        == subprocess.run(
            [sys.executable, "-c", code],
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    )
