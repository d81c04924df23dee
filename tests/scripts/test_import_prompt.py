import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from import_prompt import import_prompt, main, write_prompt
from omegaconf import OmegaConf
from PIL import Image
from transformers import AutoProcessor

from mmr5_train.common.files import InputError
from mmr5_train.models.inputs import encode
from mmr5_train.models.pages import page_limits, prepare_page
from mmr5_train.ranking.prompt import Prompt, build_messages

# The structure of the released examples/reranker.py with other text. Importing this module would fail.
RERANKER = """
import a_package_that_is_not_there
raise SystemExit("this file was run")

SYSTEM_PROMPT = (
    "Sort the pages. First <think> notes </think>, "
    "then <answer> ids </answer>. Braces {stay}."
)

question_template = (
    "Which pages answer it? Reply as [id, id, ...].\\n"
    "Asked: {Question}"
    "\\nPages: {image_num}, numbered 1 to {image_num_end}:\\n"
)

class QueryReranker:
    def rerank(self, query, image_list):
        messages = [
            {"role": "system", "content": [{"type": "text", "text": SYSTEM_PROMPT}]},
            {"role": "user", "content": [{"type": "text", "text": question_template.format(
                Question=query, image_num=len(image_list), image_num_end=len(image_list))}]},
        ]
        for i, image_path in enumerate(image_list):
            messages[-1]["content"].extend(
                [
                    {"type": "text", "text": f"\\nPage {i+1}: "},
                    {"type": "image", "image": image_path},
                ]
            )
        return messages
"""

RUNNABLE = RERANKER.replace("import a_package_that_is_not_there", "").replace("raise SystemExit", "str")


@pytest.fixture
def repo(tmp_path):
    def make(source=RERANKER, path="examples/reranker.py"):
        target = tmp_path / "repo" / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(source)
        return tmp_path / "repo"

    return make


def test_fields_are_renamed(repo):
    assert import_prompt(repo()) == Prompt(
        name="mm_r5",
        system="Sort the pages. First <think> notes </think>, then <answer> ids </answer>. Braces {stay}.",
        question="Which pages answer it? Reply as [id, id, ...].\n"
        "Asked: {query}\nPages: {n}, numbered 1 to {n}:\n",
        image_label="\nPage {i}: ",
        images_first=False,
    )


def source_messages(query, images):
    """The messages that the source's own class builds."""
    namespace = {}
    exec(RUNNABLE, namespace)
    return namespace["QueryReranker"]().rerank(query, images)


def test_messages_equal_those_of_the_source(repo):
    expected = source_messages("how many?", ["a", "b", "c"])
    for message in expected:
        for part in message["content"]:
            part.pop("image", None)
    assert build_messages(import_prompt(repo()), "how many?", 3) == expected


@pytest.mark.parametrize("n", [2, 5, 10, 20])
def test_ids_and_pixels_equal_those_of_the_source(repo, standin, n):
    """The source renders its messages to text and gives text and opened images to the checkpoint's processor."""
    sizes = [(300 + 40 * i, 400 - 10 * i) for i in range(n)]
    images = [Image.new("RGB", size, (10 * i, 99, 200)) for i, size in enumerate(sizes)]
    processor = AutoProcessor.from_pretrained(standin)
    messages = source_messages("how many?", images)
    text = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    expected = processor(text=[text], images=images, padding=True, return_tensors="pt")

    limits = page_limits(processor)
    pages = [prepare_page(image, limits) for image in images]
    inputs = encode(processor, import_prompt(repo()), ["how many?"], [pages])
    for key in ("input_ids", "pixel_values", "image_grid_thw"):
        assert torch.equal(inputs[key], expected[key]), key


def test_code_variants_are_read(repo):
    source = RERANKER.replace("{Question}", "{{braces}} {query}").replace("question_template", "self.TEMPLATE")
    source = source.replace("self.TEMPLATE = (", "class Words:\n  TEMPLATE: str = (", 1)
    source = source.replace('"Which pages', '"Which" + " pages').replace("i+1", "index + 1")
    prompt = import_prompt(repo(source))
    assert prompt.question.startswith("Which pages answer it?")
    assert "{braces} {query}" in prompt.question


def test_images_before_the_question_and_a_missing_label_are_detected(repo):
    head, _, rest = RERANKER.partition("        messages = [")
    source = f'{head}        first = [{{"type": "image"}} for _ in image_list]\n        messages = [{rest}'
    source = source.replace('{"type": "text", "text": f"\\nPage {i+1}: "},', "")
    prompt = import_prompt(repo(source))
    assert prompt.images_first
    assert prompt.image_label == ""


def test_released_file_is_preferred_to_other_files(repo):
    repo()
    folder = repo(RERANKER.replace("Sort", "Order"), "src/rl/other.py")
    assert import_prompt(folder).system.startswith("Sort")
    (folder / "examples/reranker.py").unlink()
    repo("def broken(:\n", "src/broken.py")
    repo(RERANKER, ".venv/lib/copy.py")
    assert import_prompt(folder).system.startswith("Order")
    repo(RERANKER.replace("Sort", "Order"), "src/sft/same.py")
    assert import_prompt(folder).system.startswith("Order")
    repo(RERANKER, "src/sft/different.py")
    with pytest.raises(
        InputError, match=r"expected one reranking prompt, found 2 in .*other\.py, .*different\.py"
    ):
        import_prompt(folder)
    assert import_prompt(folder / "src/sft/different.py").system.startswith("Sort")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("SYSTEM_PROMPT", "WORDS", 'expected one constant with "system" in its name, found none'),
        ("{Question}", "{Wording}", r"expected one string constant with the field \{Question\}, found none"),
        ("{image_num}", "{language}", r"has the field \{language\}, expected"),
        ("{image_num}", "{image_num:>3}", "has the field {image_num}, expected"),
        ("{image_num}", "{}", "has the field {}, expected"),
        ("{image_num}", "{{n}}", "as text, which can't be imported"),
        ("i+1", "i", "expected an image label such as f'Page {i \\+ 1}: '"),
        ('"type": "image"', '"type": "video"', '"type": "image", found none'),
        ("{Question}", "{Question} {query}", "must contain {query} exactly once"),
        ('text": question_template.format', 'text": str', "question_template is never used"),
        ("import a_package", "import .", r"reranker\.py: not valid Python"),
        ("import a_package", "\0", r"reranker\.py: not valid Python"),
    ],
)
def test_error_names_the_missing_part(repo, old, new, message):
    assert old in RERANKER
    with pytest.raises(InputError, match=message):
        import_prompt(repo(RERANKER.replace(old, new)))


def test_missing_folder_missing_prompt_and_large_file_are_errors(repo, tmp_path):
    with pytest.raises(InputError, match="no such folder"):
        import_prompt(tmp_path / "nowhere")
    folder = repo("x = 1\n", "src/x.py")
    with pytest.raises(InputError, match=r"no examples/reranker\.py, and no other Python file"):
        import_prompt(folder)
    with pytest.raises(InputError, match="larger than"):
        import_prompt(repo("#" * 1_000_001))


def test_written_file_is_a_config_option_with_the_same_text(repo, tmp_path):
    source = RERANKER.replace("Braces {stay}.", "Costs ${price}, \\\\x, 'single', \"double\": # ü")
    prompt = import_prompt(repo(source.replace('"double"', '\\"double\\"')), name="theirs")
    assert "${price}" in prompt.system
    write_prompt(prompt, tmp_path / "configs" / "prompt" / "theirs.yaml")
    (tmp_path / "configs" / "entry.yaml").write_text("defaults:\n  - prompt: theirs\n  - _self_\n")
    with initialize_config_dir(version_base="1.3", config_dir=str(tmp_path / "configs")):
        composed = OmegaConf.to_container(compose("entry"), resolve=True)
    assert Prompt.model_validate(composed["prompt"]) == prompt


def test_command_line_writes_the_file_and_does_not_overwrite_it(repo, tmp_path):
    def run(*arguments):
        command = [sys.executable, "scripts/import_prompt.py", *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])

    out = tmp_path / "theirs.yaml"
    process = run(repo(), out)
    assert process.returncode == 0, process.stderr
    assert "select it with prompt=theirs" in process.stdout
    assert OmegaConf.load(out).name == "theirs"
    second_run = run(repo(), out)
    assert second_run.returncode == 2
    assert second_run.stderr == f"error: {out}: already exists; delete it, or choose another name\n"


def test_output_must_be_a_yaml_file():
    with pytest.raises(InputError, match=r"x\.txt: expected a file name that ends in \.yaml"):
        main(["repository", "x.txt"])


@pytest.mark.parametrize("arguments", [[], ["repository"]])
def test_both_arguments_are_required(arguments, capsys):
    with pytest.raises(SystemExit):
        main(arguments)
    assert "the following arguments are required" in capsys.readouterr().err
