"""Mistakes on the command lines beside train.py's: one line that says it, its code, and nothing written."""

import importlib

import pytest

MISTAKES = [  # command, exit code, what the line must say
    ("launch.compare", 64, "required: RUN"),
    ("launch.compare run --other", 64, "--other"),
    ("launch.compare EMPTY", 64, "RUN: is empty"),
    ("launch.compare nowhere", 66, "nowhere: does not exist"),
    ("launch.compare file", 66, "file: holds no run"),
    ("launch.compare nowhere --output page.txt", 64, "ends in .html"),
    ("launch.dashboard more", 64, "unrecognized"),
    ("launch.dashboard --project EMPTY", 64, "--project: is empty"),
    ("launch.dashboard --output .", 64, "--output .: not writable"),
    ("launch.dashboard --output file/view.json", 64, "not writable"),
    ("launch.upload", 64, "required: RUN"),
    ("launch.upload run --timeout nan", 64, "--timeout: nan"),
    ("launch.upload run --timeout soon", 64, "'soon'"),
    ("launch.submit --nodes=0 data.path=x", 64, "processes=0"),
    ("launch.submit --nodes=1 experiment=null data.path=x", 64, "experiment=null"),
    ("launch.plan --gpu tpu", 64, "choose from 'h200'"),
    ("launch.plan --gpus 0", 64, "--gpus: 0"),
    ("launch.plan --network nan", 64, "--network: nan"),
    ("launch.plan -m model=160m,1b", 64, "unrecognized arguments: -m"),
    ("launch.plan model=null", 64, "model=null"),
    ("launch.plan =3", 64, "names no option"),
    ("launch.bench --rows 3gpu", 64, "'3gpu'"),
    ("launch.bench --row tiny --limit nan", 64, "--limit: nan"),
    ("launch.bench --row tiny --json .", 64, "--json .: not writable"),
    ("launch.supervise -n x", 64, "argument -n"),
    ("launch.supervise -n 1 --nodes 2 data.path=x", 64, "--head absent"),
    ("launch.supervise -n 1 --nodes 2 --node 1 --head localhost:99999 data.path=x", 64, "--head localhost:99999"),
    ("launch.dashboard --project a/b --output view.json", 64, "wandb.project=a/b"),
    ("launch.export run", 64, "required: DIR"),
    ("launch.export EMPTY out", 64, "RUN: is empty"),
    ("launch.export nowhere out", 66, "nowhere: not readable"),
    ("data.prepare --input EMPTY --output out", 64, "--input: is empty"),
    ("data.prepare --input file --output EMPTY", 64, "--output: is empty"),
    ("data.prepare --input file --output out --limit-mb inf", 64, "--limit-mb: inf"),
    ("data.prepare --input file --output out --tokenizer bpe:99999999999", 65, "at most"),
    ("data.inspect EMPTY", 64, "is empty"),
    ("data.bench --passes 0", 64, "--passes: 0"),
    ("data.bench --directory nowhere", 64, "--directory nowhere"),
    ("nsa.bench --tflops 0", 64, "--tflops: 0"),
]


@pytest.mark.parametrize(("command", "code", "says"), MISTAKES, ids=[m[0] for m in MISTAKES])
def test_a_mistake_is_one_line_and_nothing_is_written(command, code, says, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("a text\n")
    monkeypatch.chdir(tmp_path)
    module, *arguments = command.split()
    assert importlib.import_module(module).main(["" if a == "EMPTY" else a for a in arguments]) == code
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert said.count("\n") == 1
    assert says in said
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
