"""Suggestions: an option or a command of another program is refused with the one that was meant."""

import re

import pytest

from nplora import cli
from nplora.cli.parser import COMMANDS, parser_of


@pytest.mark.parametrize(
    ("option", "ours"),
    [
        ("--learning-rate", "--lr"), ("--learning_rate=1e-4", "--lr"), ("--r", "--rank"), ("-r", "--rank"),
        ("--lora-alpha", "--alpha"), ("--num_train_epochs", "--epochs"), ("--batch-size", "--batch-examples"),
        ("--per-device-train-batch-size", "--batch-examples"), ("--max-seq-length", "--max-length"),
        ("--target-modules", "--targets"), ("--warmup-ratio", "--warmup, a number of steps"),
        ("--output-dir", "--output"), ("--train-file", "--data"), ("--batch_examples", "--batch-examples"),
        ("--shedule", "--schedule"), ("--save-steps", "--save-every"), ("--int8", "--compute int8"),
        ("--cosine=1", "--schedule cosine"), ("--eval", "--eval-every"), ("--filter", "--filter-vocabulary"),
    ],
)  # fmt: skip
def test_an_option_of_another_program_is_refused_with_ours(
    option: str, ours: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_:
        cli.main(["finetune", "m", option, "1"])
    assert exit_.value.code == 2
    word = option.partition("=")[0]
    message = f"nplora: error: no option {word}; did you mean {ours}? (try nplora finetune --help)\n"
    assert capsys.readouterr().err == message


@pytest.mark.parametrize("option", ["--logging-steps", "--log-every"])
def test_an_option_that_has_no_match_here_gets_no_suggestion(
    option: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["finetune", "m", "--data", "d", "--output", "o", option, "1"]) == 2
    message = f"nplora: error: unrecognized arguments: {option} 1 (try nplora finetune --help)\n"
    assert capsys.readouterr().err == message


def test_an_option_is_suggested_only_if_the_command_has_it(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["generate", "m", "x", "--max-tokens", "3"])
    assert "no option --max-tokens; did you mean --max-new-tokens?" in capsys.readouterr().err
    assert cli.main(["info", "f", "--learning-rate", "1"]) == 2
    assert "unrecognized arguments: --learning-rate 1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["generate", "m", "x", "--max-length", "3"],
            "mean --max-new-tokens, which does not count the prompt?",
        ),
        (
            ["generate", "m", "x", "--do-sample", "1"],
            "mean --temperature, where 0 always takes the most likely",
        ),
        (["generate", "m", "x", "--num-beams", "3"], "no option --num-beams; nplora generates one text"),
        (["eval", "m", "d", "--batch-size", "3"], "no option --batch-size; nplora forms the batches itself"),
        (
            ["finetune", "m", "--load_in_4bit"],
            "no option --load_in_4bit; nplora keeps the weights in the dtype of",
        ),
        (["generate", "m", "x", "--device", "cpu"], "no option --device; nplora computes on the CPU"),
    ],
)
def test_a_setting_that_works_otherwise_here_is_explained(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        cli.main(words)
    assert message in capsys.readouterr().err


def test_a_command_that_generates_no_text_explains_no_batches(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["info", "f", "--batch-size", "1"]) == 2
    assert "unrecognized arguments: --batch-size 1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["--", "-r"], {"prompt": "-r"}),
        (["-learning_rate is low"], {"prompt": "-learning_rate is low"}),
        (["-"], {"prompt": "-"}),
    ],
)
def test_words_that_argparse_understands_are_left_to_it(words: list[str], found: dict[str, object]) -> None:
    line = ["generate", "m", *([] if "prompt" in found else ["x"]), *words]
    assert vars(parser_of(line).parse_args(line)).items() >= found.items()


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--filter-vocabulary", "P (probability such as 1e-6)"),
        ("--compute", "one of float32, bfloat16, int8"),
        ("--rank", "INT (rank of the LoRA factors)"),
        ("--columns", "OURS=THEIRS (names of fields in the data, as in prompt=question,completion=answer)"),
    ],
)
def test_a_missing_value_is_described(option: str, value: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["finetune", "m", "--data", "d", "--output", "o", option])
    message = (
        f"nplora: error: argument {option}: expected one argument: {value} (try nplora finetune --help)\n"
    )
    assert capsys.readouterr().err == message


@pytest.mark.parametrize(
    ("option", "value"), [("--lr", "FLOAT"), ("--report-to", "NAMES"), ("--output", "a value")]
)
def test_a_missing_value_of_a_hidden_option_is_named(
    option: str, value: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        cli.main(["plan", "m", "--data", "d", option])
    assert f"argument {option}: expected one argument: {value} (try nplora plan" in capsys.readouterr().err


def test_the_help_states_a_default_once(capsys: pytest.CaptureFixture[str]) -> None:
    for command in COMMANDS:
        with pytest.raises(SystemExit):
            cli.main([command, "--help"])
        text = " ".join(capsys.readouterr().out.split())
        assert not re.search(r"\(default: [^()]*\) \(default: ", text), command


@pytest.mark.parametrize(
    ("word", "ours"), [("train", "finetune"), ("evaluate", "eval"), ("run", "generate"), ("fuse", "merge")]
)
def test_a_command_of_another_program_is_refused_with_ours(
    word: str, ours: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ours in COMMANDS
    with pytest.raises(SystemExit) as exit_:
        cli.main([word, "m"])
    assert exit_.value.code == 2
    message = f"nplora: error: no command {word!r}; did you mean {ours}? (try nplora --help)\n"
    assert capsys.readouterr().err == message


@pytest.mark.parametrize(
    ("line", "argument", "example"),
    [
        ("finetune --model m --data d --output o", "MODEL", "nplora finetune MODEL"),
        ("eval --base-model m --data d", "MODEL", "nplora eval MODEL"),
        ("generate m --prompt Hi", "PROMPT", "nplora generate MODEL PROMPT"),
        ("generate m --text Hi", "PROMPT", "nplora generate MODEL PROMPT"),
        ("merge --base b --output o", "BASE", "nplora merge BASE ADAPTER"),
    ],
)
def test_an_argument_that_is_given_as_an_option_is_refused_with_an_example(
    line: str, argument: str, example: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(line.split())
    assert ended.value.code == 2
    words = f"; did you mean {argument}, which is given without an option: {example}? (try nplora "
    assert words in capsys.readouterr().err


def test_all_unknown_options_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    line = "finetune m --foo --seed -1 --lora_r 4 --num_train_epochs=2 --device cpu"
    with pytest.raises(SystemExit):
        cli.main(line.split())
    assert capsys.readouterr().err == (
        "nplora: error: no options --lora_r (did you mean --rank?), --num_train_epochs (did you mean "
        "--epochs?), --device (nplora computes on the CPU and uses no GPU), --foo (try nplora finetune "
        "--help)\n"
    )
