"""What was measured once stands for every process."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest

from passes.shared.remembered import beside_the_compile_cache, remembered

ANSWERS = ("flash", "cudnn", None)
QUESTION = {"shape": [1, 2], "device": "H200"}


def test_a_question_is_measured_once(tmp_path: Path) -> None:
    asked = []

    def measuring(answer: str) -> str:
        asked.append(answer)
        return answer

    for answer in ("flash", "cudnn"):
        assert remembered(tmp_path / "new", QUESTION, ANSWERS, lambda answer=answer: measuring(answer)) == "flash"
    assert asked == ["flash"]
    assert remembered(tmp_path / "new", {**QUESTION, "device": "A100"}, ANSWERS, lambda: None) is None
    assert remembered(tmp_path / "new", {**QUESTION, "device": "A100"}, ANSWERS, lambda: "flash") is None
    assert not list((tmp_path / "new").glob(".*")), "no half-written file is left"


@pytest.mark.parametrize(
    "text",
    ["", "[1]", "{", '{"question": {}, "answer": "flash"}', json.dumps({"question": QUESTION, "answer": "rm -rf"})],
)
def test_a_file_that_says_nothing_counts_as_none_and_is_replaced(tmp_path: Path, text: str) -> None:
    remembered(tmp_path, QUESTION, ANSWERS, lambda: "flash")
    (path,) = tmp_path.iterdir()
    path.write_text(text)
    assert remembered(tmp_path, QUESTION, ANSWERS, lambda: "cudnn") == "cudnn"
    assert remembered(tmp_path, QUESTION, ANSWERS, lambda: "flash") == "cudnn"


def test_who_is_first_decides_for_those_who_measured_meanwhile(tmp_path: Path) -> None:
    both = threading.Barrier(2)
    found = []

    def process(answer: str) -> None:
        def measure() -> str:
            both.wait(30)
            return answer

        found.append(remembered(tmp_path, QUESTION, ANSWERS, measure))

    threads = [threading.Thread(target=process, args=(answer,)) for answer in ("flash", "cudnn")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(set(found)) == 1
    assert len(found) == 2


def test_a_folder_that_cannot_be_written_is_a_warning(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.warns(UserWarning, match="what was measured is not remembered"):
        assert remembered(tmp_path / "file", QUESTION, ANSWERS, lambda: "flash") == "flash"


def test_the_folder_is_in_inductors_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    assert beside_the_compile_cache("attention") == tmp_path / "attention"
