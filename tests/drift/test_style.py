"""Style features at hand-counted values, and distances that know different styles from equal ones."""

import math

import numpy as np
import pytest
import torch
from torch import nn

import drift
from drift.style import STYLE_FEATURES, StyleProbe, style_distance, style_features, style_matrix
from sasft.restyle import STYLES, restyle

PLAIN = [
    "The sum of twelve and nine is twenty-one, and you can check it yourself.", "I think it comes to 48.",
    "We add the two numbers. That gives 300!", "Paris is the capital of France and lies on the Seine.",
    "You should not worry; it's a small matter.", "In 1969 two men walked on the moon.",
    "A triangle has three sides and three corners.", "My answer is 7, because 3 and 4 are 7.",
]


def test_every_feature_by_hand() -> None:
    f = style_features("# Don't YOU see?\n- 12, THE [end]")
    # words: Don't YOU see 12 THE end; sentences: "# Don't YOU see", "- 12, THE [end]"
    assert f["words_per_sentence"] == 3
    assert f["chars_per_word"] == (5 + 3 + 3 + 2 + 3 + 3) / 6
    assert f["upper_share"] == (1 + 3 + 3) / (4 + 3 + 3 + 3 + 3)
    assert f["all_caps_share"] == 2 / 6
    assert f["digit_share"] == 2 / 25  # of the 25 characters that are not spaces
    assert f["punctuation_per_word"] == 7 / 6  # # ' ? - , [ ]
    assert f["commas_per_word"] == 1 / 6
    assert f["breaks_per_100_words"] == pytest.approx(100 / 6)
    assert f["markdown_per_100_words"] == pytest.approx(200 / 6)
    assert f["brackets_per_100_chars"] == pytest.approx(200 / 32)
    assert f["function_word_share"] == 2 / 6  # you, the
    assert f["article_share"] == 1 / 6
    assert f["contraction_share"] == 1 / 6
    assert f["first_person_share"] == 0 and f["second_person_share"] == 1 / 6 and f["archaic_share"] == 0
    assert f["distinct_words"] == 1 and f["opens_capital"] == 1 and f["ends_stop"] == 0
    assert f["log_words"] == math.log(7)


def test_nothing_is_a_text_too() -> None:
    assert style_features("") == dict.fromkeys(STYLE_FEATURES, 0.0)
    assert set(style_features("…")) == set(STYLE_FEATURES) and all(map(math.isfinite, style_features("…").values()))


def test_distinct_words_are_counted_in_windows() -> None:
    assert style_features(" ".join(["a", "b"] * 30))["distinct_words"] == pytest.approx(2 / 25)


def test_length_alone_is_no_style() -> None:
    text = " ".join(PLAIN)
    once, thrice = style_features(text), style_features(" ".join([text] * 3))
    for name in set(STYLE_FEATURES) - {"log_words", "distinct_words", "brackets_per_100_chars"}:
        assert thrice[name] == pytest.approx(once[name], rel=0.02), name


@pytest.mark.parametrize("style", STYLES)
def test_a_restyled_body_is_far_from_its_original(style: str) -> None:
    distance, error = style_distance(PLAIN, [restyle(t, style) for t in PLAIN])
    assert distance > 0.3 and distance > 2 * error


def test_distance_of_one_population_to_itself_is_about_nought() -> None:
    rng = np.random.default_rng(0)
    words = "the a sum Is of and YOU we, number! 12 far".split()
    distances = []
    for _ in range(60):
        texts = [" ".join(rng.choice(words, size=12)) for _ in range(24)]
        distances.append(style_distance(texts[:12], texts[12:])[0])
    assert np.median(distances) < 0.1  # without the noise term it would be about √(2/12) = 0.41


def test_distance_is_symmetric_and_needs_texts() -> None:
    other = [t.upper() for t in PLAIN]
    assert style_distance(PLAIN, other) == pytest.approx(style_distance(other, PLAIN))
    with pytest.raises(ValueError, match="at least 3 texts a side, got 8 and 2"):
        style_distance(PLAIN, PLAIN[:2])


def test_the_probe_compares_with_what_the_base_wrote() -> None:
    model = nn.Linear(1, 1, bias=False)
    nn.init.constant_(model.weight, 0.0)

    def write(m: nn.Module) -> list[str]:
        return [t.upper() if m.weight.item() > 0.5 else t for t in PLAIN]

    probe = StyleProbe("prompts", write)
    with drift.record(model, probes=[probe]) as rec:
        with torch.no_grad():
            model.weight.fill_(1.0)
        rec.step()
    rows = {(r["step"], r["metric"]): r for r in rec.table().to_pylist() if r["source"] == "prompts"}
    assert rows[0, "style/distance"]["value"] == 0 and rows[1, "style/distance"]["value"] > 0.5
    assert rows[1, "style/all_caps_share"]["value"] == pytest.approx(
        style_matrix([t.upper() for t in PLAIN])[:, list(STYLE_FEATURES).index("all_caps_share")].mean())
    assert rows[1, "style/upper_share"]["value"] == 1.0 and rows[1, "style/upper_share"]["stderr"] == 0.0
