"""A verdict is kept for the same files and tools, and for nothing else."""

import pytest
import verdicts


@pytest.fixture
def asked(tmp_path):
    """Asks about one source file; the second result is how often the check has run."""
    source = tmp_path / "sources" / "a.py"
    source.parent.mkdir()
    source.write_text("one")
    runs = []

    def ask(*said, text=None, fails=False):
        if text is not None:
            source.write_text(text)
            verdicts._digest.cache_clear()

        def check():
            runs.append(said)
            assert not fails
            return {"calls": len(runs)}

        return verdicts.kept("test", [source.parent], said, check, tmp_path / "home"), len(runs)

    return ask


def test_the_same_question_is_asked_once(asked):
    assert asked("gcc 12", "address") == asked("gcc 12", "address") == ({"calls": 1}, 1)


@pytest.mark.parametrize("change", [{"said": ("gcc 13",)}, {"text": "two"}])
def test_another_tool_or_source_is_another_question(asked, change):
    asked("gcc 12")
    assert asked(*change.get("said", ("gcc 12",)), text=change.get("text"))[1] == 2


def test_a_failed_check_is_not_kept(asked):
    for run in (1, 2):
        with pytest.raises(AssertionError):
            asked("gcc 12", fails=True)
        assert asked("gcc 12", str(run))[1] == 2 * run
