import json
import math
from dataclasses import replace

from fulgurite.reports import Section, render_page
from fulgurite.reports.video_qa import PICTURE, sections_of_continual, sections_of_plain
from fulgurite.samples import Stage


def by_title(sections: list[Section]) -> dict[str, Section]:
    return {s.title: s for s in sections}


def test_sections_pictures_and_terminal(continual):
    sections = by_title(sections_of_continual(continual))
    assert list(sections) == ["Modes", "Over the stages", "Router", "Kinds of question", "Example questions"]
    assert sections["Over the stages"].files[PICTURE].startswith(b"\x89PNG")
    assert sections["Modes"].printed is not None
    render_page("t", "s", list(sections.values()), {})


def test_mode_table_shades_the_configured_mode_and_leaves_the_oracle_out(continual):
    html = by_title(sections_of_continual(continual))["Modes"].html
    assert (
        '<tr class="chosen"><td>dynamic merging</td><td class="best">70.8</td><td>0.0</td>'
        '<td class="best">66.7</td><td>75.0</td></tr>'
    ) in html
    assert '<tr class="quiet"><td>oracle domain</td><td>70.8</td>' in html
    assert '<td class="best">100.0</td>' in html


def test_modes_are_compared_question_by_question(continual):
    html = by_title(sections_of_continual(continual))["Modes"].html
    # dynamic alone right: red/1, blue/1; router alone right: red/2. Ties of 3 say nothing: p = 1.
    assert "<tr><td>router only</td><td>2</td><td>1</td><td>1.000</td></tr>" in html
    # last: dynamic alone right at red/1, red/3, red/5, last alone at blue/2; 2 * (1 + 4) / 16.
    assert "<tr><td>last adapter</td><td>3</td><td>1</td><td>0.625</td></tr>" in html
    # sqrt(2/3 * 1/3 / 6) and sqrt(3/4 * 1/4 / 4); their root of summed squares over 2.
    assert "<td>standard error</td><td>14.5</td><td>19.2</td><td>21.7</td>" in html


def test_scores_of_the_stream_are_shown_where_they_exist(continual):
    results = json.loads(json.dumps(continual.results))
    results["modes"]["last"]["forward_transfer"] = -0.055
    html = by_title(sections_of_continual(replace(continual, results=results)))["Over the stages"].html
    assert "<th>mode</th><th>forgetting, from the best</th><th>forward transfer</th>" in html
    assert "<tr><td>last adapter</td><td>73.3</td><td>-5.5</td></tr>" in html
    assert "<tr><td>router only</td><td>0.0</td><td>–</td></tr>" in html


def test_kinds_without_questions_are_left_out(continual):
    html = by_title(sections_of_continual(continual))["Kinds of question"].html
    assert '<td>red</td><td class="text">colour</td><td>3</td><td>50.0</td>' in html
    assert '<td>blue</td><td class="text">count</td><td>2</td><td>75.0</td>' in html
    assert "order" not in html


def test_outcome_counts_sum_to_the_questions(continual):
    html = by_title(sections_of_continual(continual))["Example questions"].html
    assert "<tr><td>dynamic merging right, router only wrong</td><td>1</td><td>1</td><td>2</td></tr>" in html
    assert html.count('class="example"') == len(continual.answers)


def test_before_any_stage_there_is_no_router_and_no_boundary(continual):
    results = json.loads(json.dumps(continual.results))
    for scores in results["modes"].values():
        scores["matrix"] = scores["matrix"][:1]
        del scores["average"], scores["forgetting"]
    results["confusion"] = [[[0, 0], [0, 0]]]
    early = replace(continual, results=results)
    assert early.rows == ["zero-shot"]
    assert early.trained_from == [None, None]
    assert "Router" not in by_title(sections_of_continual(early))


def test_a_stage_may_train_several_domains(continual):
    joint = replace(continual, stages=[Stage("all", ("blue", "red"), 1, 3), continual.stages[1]])
    assert joint.trained_from == [1, 1]
    assert joint.rows == ["zero-shot", "after all", "after blue"]


def test_without_answers_and_samples_the_rest_stands(continual):
    titles = by_title(sections_of_continual(replace(continual, answers=[], samples=[])))
    assert "Example questions" not in titles
    assert "How exact" not in titles["Modes"].html


def test_plain_test_has_accuracy_with_its_error_and_by_kind(continual):
    results = {
        "domains": ["red", "blue", "green"],
        "kinds": ["colour", "count"],
        "matrix": [[0.5, 0.75, math.nan]],
        "top10": [1.0, 0.8, math.nan],
        "by_kind": [[0.25, 0.75], [math.nan, 0.6], [math.nan, math.nan]],
    }
    (section,) = sections_of_plain(results, continual.samples)
    assert "<tr><td>red</td><td>50.0</td><td>20.4</td><td>100.0</td><td>6</td></tr>" in section.html
    assert "<tr><td>blue</td><td>75.0</td><td>21.7</td><td>80.0</td><td>4</td></tr>" in section.html
    assert "green" not in section.html
    assert '<tr><td>blue</td><td class="text">count</td><td>60.0</td>' in section.html
    assert [column.header for column in section.printed.columns][:2] == ["domain", "accuracy, %"]
    assert section.printed.row_count == 2


def test_domains_that_were_not_counted_are_told_beside_the_means(continual):
    note = "not counted, for want of test questions: 1 of 2 domains"
    assert note not in by_title(sections_of_continual(continual))["Modes"].html
    results = json.loads(json.dumps(continual.results))
    for scores in results["modes"].values():
        for row in scores["matrix"]:
            row[1] = math.nan
        del scores["forgetting"]
    answers = [a for a in continual.answers if a["domain"] == "red"]
    html = by_title(sections_of_continual(replace(continual, results=results, answers=answers)))["Modes"].html
    assert note in html
    plain = {"domains": ["red", "blue"], "kinds": [], "matrix": [[0.5, math.nan]], "top10": [1.0, math.nan]}
    (section,) = sections_of_plain(plain | {"by_kind": [[], []]}, continual.samples)
    assert note in section.html
    assert section.printed.caption == note
