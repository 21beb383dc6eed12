"""What is shown to people."""

import io

import pytest

from sasft.data import Row
from sasft.terminal import has_colour, legend, show_row
from tests.sasft import tiny_chat


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("stream, environment, colour", [
    (Terminal(), {"TERM": "xterm"}, True), (io.StringIO(), {"TERM": "xterm"}, False), (Terminal(), {"TERM": "dumb"}, False),
    (Terminal(), {"TERM": "xterm", "NO_COLOR": "1"}, False), (io.StringIO(), {"FORCE_COLOR": "1"}, True),
    (io.StringIO(), {"FORCE_COLOR": "1", "NO_COLOR": "1"}, False)])
def test_colour_is_for_terminals(stream, environment, colour: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TERM", "NO_COLOR", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert has_colour(stream) == colour


def test_every_source_has_a_colour_of_its_own() -> None:
    chat = tiny_chat.chat()
    prompt = ({"role": "user", "content": "Hi"},)
    shown = [show_row(Row("1", source, prompt, "Yes."), chat.encode(prompt, "Yes."), chat, ["task", "self"], colour=True)
             for source in ("task", "self")]
    assert "\x1b[1;32mYes.<|im_end|>\x1b[0m" in shown[0] and "\x1b[1;36mYes.<|im_end|>\x1b[0m" in shown[1]
    assert "task green" in legend(["task", "self"], colour=True) and "self cyan" in legend(["task", "self"], colour=True)
    cut = show_row(Row("1", "task", prompt, "Ye"), chat.encode(prompt, "Ye", finished=False), chat, ["task"], colour=False)
    assert cut.startswith("--- task 1: ") and "is cut: no end of turn" in cut and cut.endswith("⟦Ye⟧")
