import math

from rich.console import Console

from fulgurite.reports.tables import best_cells, html_table, percent, terminal_table, uncounted


def test_percent():
    assert [percent(v) for v in (0.12345, 1.0, -0.0001, math.nan, None)] == ["12.3", "100.0", "0.0", "–", "–"]


def test_best_cells_tie_as_shown_and_skip_rows():
    values = [[0.5001, None], [0.5004, 0.1], [0.9, math.nan], [0.4, 0.2]]
    assert best_cells(values, skip=[2]) == {(0, 0), (1, 0), (3, 1)}


def test_marks_of_a_table():
    table = html_table(["a", "b"], [["1", "2"], ["3", "4"]], {(1, 1)}, {0: "chosen"}, [1])
    assert '<tr class="chosen"><td>1</td><td class="text">2</td></tr>' in table
    assert '<tr><td>3</td><td class="best text">4</td></tr>' in table


def test_all_texts_are_escaped():
    assert html_table(["<a>"], [["<b>"]], {(0, 0)}, text_columns=[0]) == (
        '<div class="scroll"><table><thead><tr><th class="text">&lt;a&gt;</th></tr></thead>'
        '<tbody><tr><td class="best text">&lt;b&gt;</td></tr></tbody></table></div>'
    )


def test_terminal_table_breaks_long_names_before_numbers(continual):
    domains = ["vizdoom", "minigrid", "crafter", "emoji_names", "emoji_motion"]
    modes = {m: s | {"matrix": [[0.5] * 5]} for m, s in continual.results["modes"].items()}
    console = Console(width=80, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    results = continual.results | {"modes": modes, "domains": domains}
    console.print(terminal_table(results, {"dynamic": "dynamic merging with a [long] name"}))
    assert console.export_text().count(" 50.0") == 4 * 5


def test_terminal_table_keeps_order_and_every_number_in_eighty_columns(continual):
    console = Console(width=80, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(terminal_table(continual.results, continual.mode_names))
    lines = [line.split() for line in console.export_text().splitlines() if any(c.isdigit() for c in line)]
    assert lines == [
        ["dynamic", "merging", "*", "70.8", "0.0", "66.7", "75.0"],
        ["router", "only", "58.3", "0.0", "66.7", "50.0"],
        ["last", "adapter", "58.3", "73.3", "16.7", "100.0"],
        ["oracle", "domain", "70.8", "0.0", "66.7", "75.0"],
    ]


def test_domains_that_were_not_counted_are_told(continual):
    assert uncounted([0.5, 0.0]) == ""
    assert uncounted([0.5, math.nan, None]) == "not counted, for want of test questions: 2 of 3 domains"
    modes = {m: s | {"matrix": [[0.5, math.nan]]} for m, s in continual.results["modes"].items()}
    console = Console(width=80, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(terminal_table(continual.results, {}))
    assert "not counted" not in console.export_text()
    console.print(terminal_table(continual.results | {"modes": modes}, {}))
    assert "not counted, for want of test questions: 1 of 2 domains" in " ".join(console.export_text().split())
