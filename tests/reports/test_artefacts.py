from fulgurite.reports.artefacts import artefacts_section, scores_by_mode

NAMES = {"dynamic": "dynamic merging", "oracle": "oracle domain"}
METRICS = {
    "test/dynamic/accuracy/a": 0.5,
    "test/dynamic/accuracy/b": 0.25,
    "test/oracle/accuracy/a": 0.9,
    "test/oracle/accuracy/b": 0.9,
    "test/dynamic/average": 0.1,
    "test/accuracy": 0.2,
    "val/accuracy/a": 0.3,
}


def test_modes_are_read_from_the_names_of_their_metrics():
    assert scores_by_mode(METRICS, NAMES) == {
        "dynamic merging": {"test/accuracy": 0.375, "test/accuracy/a": 0.5, "test/accuracy/b": 0.25},
        "oracle domain": {"test/accuracy": 0.9, "test/accuracy/a": 0.9, "test/accuracy/b": 0.9},
    }
    assert scores_by_mode({"test/accuracy/a": 0.5}, NAMES) == {
        "trained weights": {"test/accuracy": 0.5, "test/accuracy/a": 0.5}
    }


def cells_of(printed):
    return [list(row) for row in zip(*(column._cells for column in printed.columns))]


def test_one_table_with_modes_and_artefacts_the_best_untold_one_bold():
    artefacts = {"<ties>": {"val/accuracy": 0.7, "test/accuracy": 0.6, "test/accuracy/a": 0.6, "test/accuracy/b": 0.6}}
    section = artefacts_section("Artefacts", scores_by_mode(METRICS, NAMES), artefacts, NAMES)
    assert cells_of(section.printed) == [
        ["dynamic merging", "–", "37.5", "50.0", "25.0"],
        ["oracle domain", "–", "90.0", "90.0", "90.0"],
        ["<ties>", "70.0", "60.0", "60.0", "60.0"],
    ]
    assert "&lt;ties&gt;" in section.html
    assert section.html.count('class="best">60.0') == 3
    assert 'class="best">90.0' not in section.html


def test_scores_of_validation_alone_give_its_domains():
    section = artefacts_section("Artefacts", {}, {"x": {"val/accuracy": 0.5, "val/accuracy/a": 0.5}}, NAMES)
    assert cells_of(section.printed) == [["x", "50.0", "50.0"]]
    assert "val questions" in section.html


def test_an_artefact_on_which_nothing_was_counted_is_named():
    assert "<td>ties</td>" in artefacts_section("Artefacts", {}, {"ties": {}}, NAMES).html


def test_artefacts_of_retrieval_have_recalls():
    scores = {"test/text_to_video/R@1": 12.5, "test/text_to_video/R@5": 50.0, "test/text_to_video/MdR": 3.0}
    section = artefacts_section("Artefacts", {}, {"soup": scores, "none": {}}, NAMES)
    assert "<tr><td>soup</td><td>12.5</td><td>50.0</td></tr>" in section.html
    assert "<tr><td>none</td><td>–</td><td>–</td></tr>" in section.html
    assert "<th>test text to video R@5</th>" in section.html
