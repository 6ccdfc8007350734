"""Completion: what is offered, what it costs, and what the real shells make of it."""

import argparse
import io
import os
import shutil
import subprocess
import sys
from pathlib import Path

import mlflow
import pexpect
import pytest
from argcomplete.finders import CompletionFinder

from mnist_exp.cli.command import COMMANDS
from mnist_exp.cli.commands import shell_code
from mnist_exp.cli.completion import FILES, candidates, complete
from mnist_exp.tracking import store as tracking
from tests.helpers import ROOT, command, fresh_store

MODELS = ["cnn", "cnn_pooled", "lenet5", "linear", "mlp", "resnet"]
BREAKS = " \t\n\"'><=;|&(:"  # bash's COMP_WORDBREAKS, unless somebody has changed it


def offered(words: str) -> list[str]:
    """Without the descriptions; the last word begins behind the last blank."""
    return list(candidates(words.split(" ")))


def asking(shell: str, line: str, breaks: str = "") -> dict[str, str]:
    """The variables that a shell asks with, where the cursor is at the end of a line."""
    variables = {"COMP_LINE": line, "COMP_POINT": str(len(line)), "_ARGCOMPLETE": "1"}
    variables |= {"_ARGCOMPLETE_SHELL": shell, "_ARGCOMPLETE_SUPPRESS_SPACE": "1"}
    return variables | {"_ARGCOMPLETE_COMP_WORDBREAKS": breaks}


def answer(shell: str, line: str, breaks: str = "") -> list[str]:
    """What a shell gets."""
    output = io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in asking(shell, line, breaks).items():
            patch.setenv(name, value)
        # which would take what is file 9 here, and close it
        patch.setattr(CompletionFinder, "_init_debug_stream", lambda self: None)
        with pytest.raises(SystemExit) as ended:
            complete(output)
    assert not ended.value.code
    return output.getvalue().split("\013") if output.getvalue() else []


@pytest.mark.parametrize(
    "words, expected",
    [
        ("tr", ["train"]),
        ("--v", ["--version"]),
        ("nonsense mod", []),
        ("completion ", ["bash", "zsh", "fish"]),
        ("sync ", [FILES]),
        ("train mod", ["model.", "model="]),
        ("train model=", [f"model={name}" for name in MODELS]),
        ("train aug", ["augmentation.", "augmentation="]),
        ("train augmentation=e", ["augmentation=elastic", "augmentation=erase"]),
        ("train augmentation=elastic augmentation.rot", ["augmentation.rotation="]),
        ("train +model=c", ["+model=cnn", "+model=cnn_pooled"]),
        ("train ~mod", ["~model", "~model."]),
        ("train -m model=cnn,m", ["model=cnn,mlp"]),
        ("train -m model=cnn,mlp sched", ["schedule.", "schedule="]),
        ("train model=cnn model.w", ["model.width="]),
        ("train model.ch", []),
        ("train model=nonsense training.ep", ["training.epochs="]),
        ("train seed=1,2 optimizer.l", ["optimizer.lr="]),
        ("train optimizer.lr=", ["optimizer.lr=0.1"]),
        ("train training.compile=", [f"training.compile={v}" for v in ("auto", "always", "never")]),
        ("train tracking.required=t", ["tracking.required=true"]),
        ("train experiments=se", ["experiments=seed_mlp", "experiments=seed_mlp_tuned"]),
        ("train experiments=best/", [FILES]),
        ("train dataset.root=", [FILES]),
        ("train hydra/launcher=j", ["hydra/launcher=joblib"]),
        ("train hydra/launcher=joblib hydra.launcher.n", ["hydra.launcher.n_jobs="]),
        ("train --mul", ["--multirun"]),
        ("train --cf", ["--cfg"]),
        ("train --cfg j", ["job"]),
        ("train --cfg job mod", ["model.", "model="]),
        ("train --cfg=j", ["--cfg=job"]),
        ("train --shell", []),
        ("show --output my", [FILES]),
        ("show dataset=km", ["dataset=kmnist"]),
        ("ui --port ", []),
        ("ui tracking.ur", ["tracking.uri="]),
        ("resume last tracking.ur", ["tracking.uri="]),
    ],
)
def test_candidates(words: str, expected: list[str]) -> None:
    assert offered(words) == expected


def test_every_command_and_flag_is_offered() -> None:
    assert offered("") == list(COMMANDS)
    for each in COMMANDS.values():
        flags = {
            name
            for action in each.parser()._actions
            for name in action.option_strings
            if name.startswith("--") and action.help != argparse.SUPPRESS
        }
        assert flags <= {*offered(f"{each.name} --")}


def test_folder_of_ones_own_groups(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "wide.yaml").write_text("width: 512\n")
    assert offered(f"train --config-dir {tmp_path} model=w") == ["model=wide"]
    assert offered(f"train -cd {tmp_path} model=wide model.w") == ["model.width="]


@pytest.mark.parametrize(
    "line, expected",
    [
        ("mnist-exp train model=len", ["lenet5"]),
        ("mnist-exp train model=", MODELS),
        ("mnist-exp train 'model=len", ["model=lenet5"]),  # bash does not divide what is in quotes
        ('mnist-exp train "model=len', ["model=lenet5"]),
        ("mnist-exp train 'seed=1' optimizer.l", ["optimizer.lr="]),
        ("mnist-exp tr", ["train"]),
        ("mnist-exp show -o x", ["x/", "x.png"]),
        ("mnist-exp show --output=x/", ["x/y\\ z"]),
        ("mnist-exp train dataset.root=x", ["x/", "x.png"]),
        ("mnist-exp", []),
    ],
)
def test_bash_replaces_what_stands_behind_a_break(
    line: str, expected: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x").mkdir()
    for name in ("x.png", "x/y z"):
        (tmp_path / name).touch()
    assert answer("bash", line, BREAKS) == expected
    whole = answer("bash", line, BREAKS.replace("=", ""))
    assert [text.replace("\\", "") for text in whole] == answer("fish", line)


@pytest.mark.parametrize(
    "line",
    [
        "mnist-exp report last; mnist-exp tra",
        "cd here && mnist-exp tra",
        "A=1 mnist-exp tra",
        "sudo ~/bin/mnist-exp tra",
    ],
)
def test_zsh_hands_over_all_commands_of_a_line(line: str) -> None:
    assert answer("zsh", line) == [f"train:{COMMANDS['train'].summary}"]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Three runs and a sweep, of which two ids begin alike, and two that were deleted."""
    uri = fresh_store(tmp_path_factory.mktemp("store"))
    client = mlflow.MlflowClient(uri)
    experiments = [client.create_experiment(name) for name in ("kept", "deleted")]
    for second, (name, tags) in enumerate(
        [("one", {}), ("two", {}), ("swept", {"sweep": "true"}), ("three", {}), ("gone", {})]
    ):
        run = client.create_run(experiments[0], 1000 + second, tags, name)
    client.delete_run(run.info.run_id)
    client.create_run(experiments[1], 9000, {}, "with its experiment")
    client.delete_experiment(experiments[1])
    return uri


@pytest.mark.parametrize("sweep", [True, False, None])
def test_runs_are_those_that_are_found(sweep: bool | None, store: str) -> None:
    runs = tracking.Store(store).of_kind(sweep)
    expected = [(run.id, run.name) for run in runs]
    assert tracking.list_runs(store, sweep) == expected
    names = {
        True: ["swept"],
        False: ["three", "two", "one"],
        None: ["three", "swept", "two", "one"],
    }
    assert [name for _, name in expected] == names[sweep]


@pytest.mark.parametrize("chosen", ["environment", "word"])
def test_runs(chosen: str, store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    word = []
    if chosen == "environment":
        monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
    else:
        monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
        word = [f"tracking.uri={store}"]
    for name, sweep in (("predict", False), ("report", True), ("resume", None)):
        short = [(run_id[:8], name) for run_id, name in tracking.list_runs(store, sweep)]
        found = candidates([name, *word, ""])
        assert list(found.items()) == [("last", "the newest"), *short]
        assert candidates([name, *word, short[0][0][:6]]) == dict(short[:1])


def test_ids_that_begin_alike(store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = ["01234567" + "a" * 24, "01234567" + "b" * 24, "c" * 32]
    monkeypatch.setattr(tracking, "list_runs", lambda uri, sweep: [(i, "name") for i in ids])
    assert offered(f"evaluate tracking.uri={store} ")[1:] == [ids[0], ids[1], "c" * 8]


@pytest.mark.parametrize(
    "line, heavy",
    [
        ("mnist-exp tr", {"hydra", "omegaconf", "numpy", "yaml"}),
        ("mnist-exp evaluate tracking.uri={store} ", {"numpy"}),
        ("mnist-exp evaluate tracking.uri=sqlite:///{here}/none.db ", {"numpy"}),
        ("mnist-exp evaluate tracking.uri=http://127.0.0.1:9 ", set()),
        ("mnist-exp evaluate tracking.uri=nonsense ", set()),
        ("mnist-exp train model={{[ mod", set()),
        ("mnist-exp train --config-dir nowhere mod", set()),
    ],
)
def test_it_is_light_silent_and_leaves_nothing(
    line: str, heavy: set[str], store: str, tmp_path: Path
) -> None:
    line = line.format(store=store, here=tmp_path)
    code = "import sys; from mnist_exp.cli import main as cli; sys.argv[0] = 'mnist-exp'\n"
    code += "try: cli.main()\n"
    code += "finally: print('\\n', *sys.modules)"
    answered = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={k: v for k, v in os.environ.items() if k != "MLFLOW_TRACKING_URI"}
        | asking("zsh", line)
        | {"PYTHONPATH": str(ROOT), "_ARGCOMPLETE_STDOUT_FILENAME": os.devnull},
        capture_output=True,
        text=True,
    )
    assert (answered.returncode, answered.stderr) == (0, "")
    libraries = {name.split(".")[0] for name in answered.stdout.splitlines()[-1].split()}
    assert "argparse" in libraries  # else nothing was read
    assert libraries & ({"torch", "mlflow", "matplotlib"} | heavy) == set()
    assert list(tmp_path.iterdir()) == []


def test_unknown_shell(tmp_path: Path) -> None:
    status, out, err = command("completion", "tcsh", folder=tmp_path)
    assert (status, out) == (2, "")
    assert "tcsh" in err and "bash" in err and "fish" in err


# the shells


@pytest.fixture
def program(tmp_path: Path) -> Path:
    """The command as it is typed, in a folder with files."""
    (tmp_path / "my folder").mkdir()
    (tmp_path / "my folder" / "a b.png").touch()
    path = tmp_path / "bin" / "mnist-exp"
    path.parent.mkdir()
    # which sets variables of its own, COMP_WORDBREAKS among them
    path.write_text(f'#!/usr/bin/env bash\nexec {sys.executable} -m mnist_exp "$@"\n')
    path.chmod(0o755)
    return path


def environment(program: Path, **more: str) -> dict[str, str]:
    home = program.parent.parent
    path = f"{program.parent}:{os.environ['PATH']}"
    return {**os.environ, "PYTHONPATH": str(ROOT), "PATH": path, "HOME": str(home), **more}


def typed_in(shell: str, script: str, program: Path, **more: str) -> list[str]:
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    flags = {"bash": ["--norc"], "zsh": ["-f"], "fish": ["--no-config"]}[shell]
    answered = subprocess.run(
        [shell, *flags, "-c", script],
        cwd=program.parent.parent,
        env=environment(program, **more),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert answered.returncode == 0 and answered.stderr == ""
    return answered.stdout.splitlines()


LINES = [
    ("mnist-exp tra", ["train"]),
    ("mnist-exp train --mul", ["--multirun"]),
    ("mnist-exp train model=len", ["model=lenet5"]),
    ("mnist-exp report ", ["last", "{sweep}"]),
    ("bin/mnist-exp tra", ["train"]),
    ("mnist-exp nonsense ", []),
]


def expectation(texts: list[str], store: str) -> list[str]:
    ((sweep, _),) = tracking.list_runs(store, True)
    return [text.format(sweep=sweep[:8]) for text in texts]


@pytest.mark.parametrize("line, expected", LINES)
def test_bash(line: str, expected: list[str], program: Path, store: str) -> None:
    script = f"""
        eval "$(mnist-exp completion bash)"
        compopt() {{ :; }}  # which only works while somebody types
        COMP_LINE='{line}' COMP_POINT={len(line)}
        _python_argcomplete {line.split()[0]}
        printf '%s\\n' "${{COMPREPLY[@]}}"
    """
    found = typed_in("bash", script, program, MLFLOW_TRACKING_URI=store)
    behind = [text.rpartition("=")[2] for text in expectation(expected, store)]
    assert [text for text in found if text] == behind


@pytest.mark.parametrize("line, expected", LINES)
def test_fish(line: str, expected: list[str], program: Path, store: str) -> None:
    script = f"mnist-exp completion fish | source; complete -C '{line}'"
    found = typed_in("fish", script, program, MLFLOW_TRACKING_URI=store)
    assert [text.partition("\t")[0] for text in found] == expectation(expected, store)


@pytest.mark.parametrize("word", ["my", "my\\ folder/"])
def test_fish_completes_files(word: str, program: Path) -> None:
    ends = {"my": "my folder/", "my\\ folder/": "my folder/a b.png"}
    for before in ("mnist-exp show --output ", "mnist-exp show dataset.root="):
        script = f"mnist-exp completion fish | source; complete -C '{before}{word}'"
        (found,) = typed_in("fish", script, program)
        assert found.partition("\t")[0] == before.split(" ")[-1] + ends[word]


def terminal(shell: str, program: Path, store: str) -> "pexpect.spawn[str]":
    """A shell in which somebody types, with completion switched on."""
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    flags = {"bash": ["--norc", "--noprofile"], "zsh": ["-f"]}[shell]
    child = pexpect.spawn(
        shell,
        flags,
        env=environment(program, MLFLOW_TRACKING_URI=store, PS1="> ", TERM="dumb"),
        cwd=str(program.parent.parent),
        encoding="utf-8",
        timeout=30,
        dimensions=(40, 200),
    )
    child.expect("> ")
    child.sendline(f'eval "$(mnist-exp completion {shell})"; echo re""ady')
    child.expect("ready")
    child.expect("> ")
    return child


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_what_a_person_sees(shell: str, program: Path, store: str) -> None:
    with terminal(shell, program, store) as child:
        for keys, seen in (
            ("mnist-exp tra\t", "in "),
            ("mod\t", "el"),
            ("=len\t", "et5 "),
            ("--mul\t", "tirun "),
            ("seed\t", "="),  # and no blank: the value comes next
            ("7 'optimizer=adamw\t", "' "),
        ):
            child.send(keys)
            child.expect_exact(seen)
        child.sendcontrol("u")
        child.send("mnist-exp evaluate \t" + "\t" * (shell == "bash"))  # which lists at the second
        runs = tracking.list_runs(store, False)
        for word in ("last", *(run_id[:8] for run_id, _ in runs)):
            child.expect_exact(word)
        child.sendcontrol("u")
        child.send("mnist-exp show --output my\t")
        child.expect_exact("my\\ folder/")
        child.sendcontrol("u")
        child.send("exit\r")
        child.expect(pexpect.EOF)


def test_scripts_are_for_the_shells_that_can_be_asked_for() -> None:
    codes = {shell: shell_code(shell) for shell in offered("completion ")}
    assert list(codes) == ["bash", "zsh", "fish"]
    assert all("_ARGCOMPLETE" in code and "mnist-exp" in code for code in codes.values())
    assert " -k " in codes["fish"] and "-o nosort" in codes["bash"]  # the newest run is first
