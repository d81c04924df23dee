from pathlib import Path

import check_docs
import pytest

ROOT = Path(__file__).parents[2]


def test_repository_has_no_problems():
    assert [problem for path in check_docs.default_files() for problem in check_docs.check_file(path)] == []


CORRECT_DOCUMENT = """
```yaml
# mine/teacher/other.yaml
defaults: [extractive, _self_]
```

# A title: `code`, and more
## A title: `code`, and more

[here](#a-title-code-and-more-1) and [there](doc.md#a-title-code-and-more), [elsewhere](https://example.org/x#y)

```bash
export OPENAI_API_KEY=…                     # not a command of the project
OMP_NUM_THREADS=1 python -m data_construction.synthetic documents=3 \\
    out=outputs/corpus && mmr5 select 'difficulty={checkpoint:outputs/sft/model,samples:4}'
mmr5 recipe -m 'experiment=[recommended],[recommended,rl_only]' seed=0,1 size=tiny
mmr5 traces --config-dir mine teacher=other teacher.helps=x
make demo SEED=1
SEEDS="0 1" scripts/ablations.sh --tiny outputs/x
python scripts/import_prompt.py FOLDER out.yaml
pip install '.[serve,dense]'
curl http://127.0.0.1:8000 -d @- <<'END'
{"query": "not a command"}
END
```

`python -m data_construction.candidates corpus=pdf_folder …`, `retriever=dense`, `experiment=[mm_r5,no_think]`,
`configs/model/tiny.yaml`, `mmr5_train.ranking.prompt.Prompt`, `rewards.py`, `tests/`

```python run
import mmr5_train
print("run")
```

```python
from mmr5_train import Reranker

reranker = Reranker("x", max_new_tokens=4)
reranker.rank("question", pages, top_k=3)
```
"""


def messages(tmp_path, text):
    """The messages of the problems in a document, without FILE:LINE."""
    (tmp_path / "doc.md").write_text(text, encoding="utf-8")
    return [problem.partition(": ")[2] for problem in check_docs.check_file(tmp_path / "doc.md")]


def test_correct_document_has_no_problems(tmp_path):
    assert messages(tmp_path, CORRECT_DOCUMENT) == []


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        ("python -m data_construction.syntetic out=x", "no such module: data_construction.syntetic"),
        ("python -m mmr5_train.common.files out=x", "mmr5_train.common.files is not a command"),
        ("mmr5 sinthetic out=x", "mmr5 has no command sinthetic"),
        ("mmr5 synthetic documnts=3", "did you mean documents?"),
        ("mmr5 synthetic documents=few", "documents: Input should be a valid integer"),
        ("mmr5 candidates corpus=nothing", "corpus=nothing: no such option"),
        ("mmr5 synthetic documents", "not an override: documents"),
        ("mmr5 recipe -m seed=0,1 exprimnt=mm_r5", "exprimnt"),
        ("mmr5 traces --config-dir nowhere teacher=x", "no YAML block above starts with '# nowhere/"),
        ("mmr5 sft +trainer.learning_rat=1", "trainer.learning_rat: trl.SFTConfig has no such field"),
        ("make everything", "make has no target everything"),
        ("scripts/ablation.sh", "no such file: scripts/ablation.sh"),
        ("scripts/ablations.sh --small", "has no option --small"),
        ("SEEDZ=3 scripts/ablations.sh", "reads no variable SEEDZ"),
        ("sbatch --nodes=1 scripts/train.slurm mmr5_train.sft dta=x", "did you mean data?"),
        ("pip install '.[server]'", "no such extra: server"),
        ("pip install mmr5-train", "is on no package index"),
        ("pyton -m x", "unknown program: pyton"),
    ],
)
def test_wrong_command_is_reported(tmp_path, command, expected):
    (message,) = messages(tmp_path, f"```bash\n\n{command}\n```\n")
    assert expected in message


def test_problem_starts_with_file_and_line(tmp_path):
    document = tmp_path / "doc.md"
    document.write_text("A\n\n```bash\n\nmake everything\n```\n", encoding="utf-8")
    assert check_docs.check_file(document) == [f"{document}:5: make has no target everything"]


def test_exit_code_and_output(tmp_path, capsys):
    document = tmp_path / "doc.md"
    document.write_text("`make everything`\n\n`make nothing`\n", encoding="utf-8")
    assert check_docs.main([str(document)]) == 1
    output = capsys.readouterr()
    assert [line.partition(": ")[0] for line in output.out.splitlines()] == [f"{document}:1", f"{document}:3"]
    assert output.err == "files: 1, problems: 2\n"
    document.write_text("`make test`\n", encoding="utf-8")
    assert check_docs.main([str(document)]) == 0


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[x](nothing.md)", "dead link: no such file: nothing.md"),
        ("# Title\n[x](#titel)", "has no heading for #titel"),
        ("`mmr5 sinthetic`", "mmr5 has no command sinthetic"),
        ("`corpus=nothing`", "no such option"),
        ("`configs/model/huge.yaml`", "no such path"),
        ("`mmr5_train.ranking.prompt.Promt`", "no such name"),
        ("`nothing.py`", "no file in the repository has this name: nothing.py"),
        ("```python\nimport (\n```", "not Python"),
        ("```python\nfrom mmr5_train import Rerankr\n```", "no such name: mmr5_train.Rerankr"),
        ("```python\nfrom mmr5_train import Reranker\nr = Reranker('x')\nr.rnk()\n```", "no attribute rnk"),
        ("```python\nfrom mmr5_train import Reranker\nr = Reranker('x')\nr.rank('q', [], k=3)\n```", "'k'"),
        ("```python run\nraise ValueError('no')\n```", "the block fails: ValueError: no"),
    ],
)
def test_wrong_text_is_reported(tmp_path, text, expected):
    (message,) = messages(tmp_path, f"{text}\n")
    assert expected in message


def test_commands_in_docstrings_are_checked(tmp_path):
    module = tmp_path / "module.py"
    module.write_text(
        '"""A module.\n\n    python -m mmr5_train.sft \\\\\n        dta=x\n    mmr5 sft data=…\n"""\n',
        encoding="utf-8",
    )
    (problem,) = check_docs.check_file(module)
    assert problem.startswith(f"{module}:3: ")
    assert "dta: no such field; did you mean data?" in problem


def test_commands_in_config_comments_are_checked(tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text(
        "# accelerate launch --config_file x -m mmr5_train.sft data=x\n# mmr5 sft limt=3\nout: x\n",
        encoding="utf-8",
    )
    (problem,) = check_docs.check_file(config)
    assert problem.startswith(f"{config}:2: ")
    assert "did you mean limit?" in problem


def test_files_are_short_enough_to_read():
    """At most 400 lines of code, and 120 and 200 lines in the two documents that everyone reads first."""
    limits = {"README.md": 120, "docs/architecture.md": 200}
    folders = ("mmr5_train", "data_construction", "scripts", "tests")
    code = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    assert len(code) > 200
    files = {ROOT / name: limit for name, limit in limits.items()} | dict.fromkeys(code, 400)
    lengths = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in files}
    assert {path: n for path, n in lengths.items() if n > files[path]} == {}
