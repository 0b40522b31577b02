"""`nplora plan`"""

import re
from pathlib import Path

import pytest

from nplora import cli


def test_plan_shows_what_changes_a_plan_and_takes_all_of_finetune(
    model: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        cli.main(["plan", "--help"])
    shown = set(re.findall(r"--([a-z-]+)", capsys.readouterr().out))
    assert {"rank", "layers", "batch-tokens", "max-length", "memory", "keep-prefix"} <= shown
    hidden = {
        "alpha",
        "lr",
        "warmup",
        "resume",
        "overwrite",
        "sample",
        "output",
        "save-every",
        "save-minutes",
    }
    assert not shown & hidden
    others = "--targets q_proj,v_proj --lr 1e-3 --output out --save-every 5 --overwrite --sample x"
    assert cli.main(["plan", str(model), "--data", str(data), *others.split()]) == 0
    assert "MB at most" in capsys.readouterr().out


def test_the_old_name_of_recompute_is_still_taken_and_not_shown(
    model: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("--recompute", "--checkpoint-blocks"):
        assert cli.main(["plan", str(model), "--data", str(data), name]) == 0
        assert capsys.readouterr().out.startswith("float32, activations recomputed: ")
    with pytest.raises(SystemExit):
        cli.main(["finetune", "--help"])
    assert "checkpoint-blocks" not in capsys.readouterr().out


def test_the_command_lists_all_plans_on_request(
    model: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["plan", str(model), "--data", str(data), "--memory", "9G", "--batch-examples", "20"]
    counts = []
    for more in ([], ["--verbose"]):
        assert cli.main([*arguments, *more]) == 0
        lines = capsys.readouterr().out.splitlines()
        counts.append(sum(line.startswith(("or: ", "too large: ")) for line in lines))
    assert counts[0] <= 2 < counts[1]


def test_the_command_takes_targets_as_finetune_does(
    model: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["plan", str(model), "--data", str(data), "--targets", "q_proj,v_proj", "--targets", "o_proj"]
    assert cli.main(arguments) == 0, capsys.readouterr().err
