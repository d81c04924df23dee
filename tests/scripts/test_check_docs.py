import check_docs
import pytest


def test_documents_are_true():
    assert [mistake for path in check_docs.documents() for mistake in check_docs.check(path)] == []


TRUE = """
# A title: `code`, and more
## A title: `code`, and more

[here](#a-title-code-and-more-1) and [there](doc.md#a-title-code-and-more), [elsewhere](https://example.org/x#y)

```bash
export OPENAI_API_KEY=…                     # no command of the project
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


def check(tmp_path, text):
    (tmp_path / "doc.md").write_text(text, encoding="utf-8")
    return [mistake.partition(": ")[2] for mistake in check_docs.check(tmp_path / "doc.md")]


def test_true_document_has_no_mistakes(tmp_path):
    option = "```yaml\n# mine/teacher/other.yaml\ndefaults: [extractive, _self_]\n```\n"

    assert check(tmp_path, option + TRUE) == []


@pytest.mark.parametrize(
    ("line", "mistake"),
    [
        ("python -m data_construction.syntetic out=x", "no such module: data_construction.syntetic"),
        ("python -m mmr5_train.common.files out=x", "mmr5_train.common.files is not a command"),
        ("mmr5 sinthetic out=x", "mmr5 has no command sinthetic"),
        ("mmr5 synthetic documnts=3", "did you mean documents?"),
        ("mmr5 synthetic documents=few", "documents: Input should be a valid integer"),
        ("mmr5 candidates corpus=nothing", "corpus=nothing: no such option"),
        ("mmr5 synthetic documents", "not an override: documents"),
        ("mmr5 recipe -m seed=0,1 exprimnt=mm_r5", "exprimnt"),
        ("mmr5 traces --config-dir nowhere teacher=x", "no YAML block above says what is in it"),
        ("make everything", "make has no target everything"),
        ("scripts/ablation.sh", "no such file: scripts/ablation.sh"),
        ("scripts/ablations.sh --small", "has no option --small"),
        ("SEEDZ=3 scripts/ablations.sh", "reads no variable SEEDZ"),
        ("pip install '.[server]'", "no such extra: server"),
        ("pip install mmr5-train", "is on no package index"),
        ("pyton -m x", "no such program: pyton"),
    ],
)
def test_false_command_is_named(tmp_path, line, mistake):
    (found,) = check(tmp_path, f"```bash\n\n{line}\n```\n")
    assert mistake in found
    (tmp_path / "doc.md").write_text(f"A\n\n```bash\n\n{line}\n```\n", encoding="utf-8")
    assert check_docs.check(tmp_path / "doc.md")[0].startswith(f"{tmp_path / 'doc.md'}:5: ")


def test_unknown_field_of_the_trainer_is_named(tmp_path):
    (found,) = check(tmp_path, "```bash\nmmr5 sft +trainer.learning_rat=1\n```\n")
    assert "trainer.learning_rat: trl.SFTConfig has no such field" in found


@pytest.mark.parametrize(
    ("text", "mistake"),
    [
        ("[x](nothing.md)", "dead link: no such file as nothing.md"),
        ("# Title\n[x](#titel)", "has no heading for #titel"),
        ("`mmr5 sinthetic`", "mmr5 has no command sinthetic"),
        ("`corpus=nothing`", "no such option"),
        ("`configs/model/huge.yaml`", "no such path"),
        ("`mmr5_train.ranking.prompt.Promt`", "no such name"),
        ("`nothing.py`", "no such file anywhere"),
        ("```python\nimport (\n```", "not Python"),
        ("```python\nfrom mmr5_train import Rerankr\n```", "no such name: mmr5_train.Rerankr"),
        ("```python\nfrom mmr5_train import Reranker\nr = Reranker('x')\nr.rnk()\n```", "no attribute rnk"),
        ("```python\nfrom mmr5_train import Reranker\nr = Reranker('x')\nr.rank('q', [], k=3)\n```", "'k'"),
        ("```python run\nraise ValueError('no')\n```", "the block fails: ValueError: no"),
    ],
)
def test_false_text_is_named(tmp_path, text, mistake):
    (found,) = check(tmp_path, f"{text}\n")
    assert mistake in found


def test_examples_in_docstrings_and_configs_are_checked(tmp_path):
    module, config = tmp_path / "module.py", tmp_path / "config.yaml"
    module.write_text(
        '"""What it is.\n\n    python -m mmr5_train.sft \\\\\n        dta=x\n    mmr5 sft data=…\n"""\n'
    )
    config.write_text("# accelerate launch --config_file x -m mmr5_train.sft data=x\n# mmr5 sft limt=3\nout: x\n")
    ((line, message),) = [mistake.split(": ", 1) for mistake in check_docs.check(module)]
    assert line == f"{module}:3"
    assert "dta: no such field; did you mean data?" in message
    assert ["did you mean limit?" in mistake for mistake in check_docs.check(config)] == [True]
