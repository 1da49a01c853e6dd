import hashlib

from fulgurite.reports.examples import choose, evenly_spread, example_html, group_of, outcome_groups
from fulgurite.samples import Sample, Video


def groups_of(test):
    return outcome_groups("dynamic", list(test.names), test.names)


def test_every_question_falls_into_the_group_of_its_outcome(continual):
    groups = groups_of(continual)
    found = {a["id"]: group_of(a, groups) for a in continual.answers}
    assert found == {
        "red/0": 3,
        "red/1": 0,
        "red/2": 1,
        "red/3": 2,
        "red/4": 5,
        "red/5": 2,
        "blue/0": 3,
        "blue/1": 0,
        "blue/2": 4,
        "blue/3": 2,
    }


def test_choice_follows_the_rule_and_not_the_order_of_the_answers(continual):
    groups = groups_of(continual)
    chosen = [a["id"] for a in choose(continual.answers, ["red", "blue"], groups, 5)]
    first_of_two = min(("red/3", "red/5"), key=lambda i: hashlib.sha256(i.encode()).hexdigest())
    # red goes through the groups 0, 1, 2, ...; blue starts at 1, has none there, and goes on with 2, 3.
    assert chosen == ["red/1", "blue/3", "red/2", "blue/0", first_of_two]
    assert [a["id"] for a in choose(continual.answers[::-1], ["red", "blue"], groups, 5)] == chosen
    everything = choose(continual.answers, ["red", "blue"], groups, 99)
    assert sorted(a["id"] for a in everything) == sorted(a["id"] for a in continual.answers)


def test_single_mode_has_right_and_wrong(continual):
    groups = outcome_groups("dynamic", ["dynamic"], continual.names)
    assert [group_of(a, groups) for a in continual.answers[:3]] == [0, 0, 1]


def test_answers_are_marked_right_and_wrong(continual):
    answer = continual.answers[1]
    html = example_html(answer, continual.samples[1], continual.names, "an outcome")
    assert '<dt>dynamic merging</dt><dd><span class="right">✓ yes</span></dd>' in html
    assert '<dt>router only</dt><dd><span class="wrong">✗ &lt;i&gt;no&lt;/i&gt;</span></dd>' in html
    assert "Is &lt;red/1&gt; it?" in html
    assert "width:75.0%" in html


def test_partly_accepted_answer_says_how_much(continual):
    answer = continual.answers[0] | {"gold": {"yes": 0.5}}
    assert "✓ yes (50 %)" in example_html(answer, None, {"dynamic": "dynamic"}, "")


def test_frames_are_the_spread_ones(continual, moving_square):
    sample = Sample(id="x", domain="red", question="?", video=Video(moving_square))
    html = example_html(continual.answers[0], sample, continual.names, "", frames=4)
    assert evenly_spread(12, 4) == [1, 4, 7, 10]
    assert [html.count(f'alt="frame {i}"') for i in (1, 4, 7, 10)] == [1, 1, 1, 1]
    assert html.count("data:image/jpeg") == 4
    assert evenly_spread(2, 5) == [0, 1]


def test_missing_video_is_said_on_the_page(continual, tmp_path):
    sample = Sample(id="x", domain="red", question="?", video=Video(tmp_path / "gone<1>.mp4"))
    html = example_html(continual.answers[0], sample, continual.names, "")
    assert "could not be read" in html
    assert "gone&lt;1&gt;.mp4" in html
