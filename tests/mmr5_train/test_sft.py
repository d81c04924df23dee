"""SFT with the shipped model on generated traces: losses, checkpoints, adapters and error messages."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
from trl.trainer import utils as trl_utils

from mmr5_train import sft
from mmr5_train.common.config import compose_stage
from mmr5_train.common.files import InputError, read_manifest, read_records, write_json, write_records
from mmr5_train.inference.reranker import Reranker
from mmr5_train.models.lengths import count_tokens, image_sizes
from mmr5_train.models.loading import TINY, read_settings
from mmr5_train.ranking.prompt import render_completion
from mmr5_train.ranking.records import Skipped, Trace
from mmr5_train.training.checkpoints import last_checkpoint

ROOT = Path(__file__).resolve().parents[2]
SHORT = ["trainer.per_device_train_batch_size=4", "trainer.logging_steps=1", "trainer.warmup_steps=0"]


def run(traces, out, *overrides):
    config = compose_stage(sft.SftStage, "sft", [f"data={traces}", f"out={out}", *SHORT, *overrides])
    sft.main(config)
    return json.loads((out / "log_history.json").read_text())


def test_the_loss_falls_and_the_checkpoint_loads(traces, tmp_path, capsys):
    history = run(traces, tmp_path / "out", "trainer.max_steps=12", "trainer.learning_rate=2e-3")
    losses = [entry["loss"] for entry in history if "loss" in entry]
    assert len(losses) == 12
    assert losses[-1] < 0.7 * losses[0]
    before = AutoModelForImageTextToText.from_pretrained(TINY)
    after = AutoModelForImageTextToText.from_pretrained(tmp_path / "out/model")
    pairs = zip(before.named_parameters(), after.parameters(), strict=True)
    changed = {name for (name, old), new in pairs if not torch.equal(old, new)}
    assert changed
    assert not [name for name in changed if "visual" in name], "the vision tower must stay frozen"
    assert AutoProcessor.from_pretrained(tmp_path / "out/model").tokenizer.chat_template
    ranked = Reranker(tmp_path / "out/model", max_new_tokens=40).rank("Which?", [traces.parent / "page-0.png"])
    assert ranked.order == [0]
    manifest = json.loads((tmp_path / "out/manifest.json").read_text())
    assert manifest["finished"]
    assert manifest["counts"]["steps"] == 12
    assert manifest["counts"]["with_verdicts"] == 4
    assert read_settings(tmp_path / "out/model").verdicts is True
    assert str(traces) in manifest["inputs"]
    assert "sft: 4 traces, 12 steps" in capsys.readouterr().out


@pytest.mark.parametrize("think", [True, False])
def test_checkpoint_records_that_its_answers_state_no_verdicts(think, traces, tmp_path, capsys):
    if think:
        refined = "Images 1 and 3 do not help. Image 2 shows it, which is relevant to the question."
        records = [trace.model_copy(update={"think": refined}) for trace in read_records(traces, Trace)]
        write_records(traces, records)
    run(traces, tmp_path / "out", "trainer.max_steps=1", f"think={think}", "override_checkpoint=true")
    assert "sft: 0 of 4 answers state a verdict on each page\n" in capsys.readouterr().out
    assert read_settings(tmp_path / "out/model").verdicts is False


def test_the_same_seed_gives_the_same_losses(traces, tmp_path):
    steps = "trainer.max_steps=2"
    first, second = run(traces, tmp_path / "a", steps), run(traces, tmp_path / "b", steps)
    other = run(traces, tmp_path / "c", steps, "seed=7", "trainer.per_device_train_batch_size=2")
    assert [entry.get("loss") for entry in first] == [entry.get("loss") for entry in second]
    assert first[0]["loss"] != other[0]["loss"]


def test_accumulation_does_not_change_a_step(traces, tmp_path):
    """Completions differ in length, so a mean over the means of micro-batches would weight tokens differently."""
    records = [json.loads(line) for line in traces.read_text().splitlines()]
    for i, record in enumerate(records):
        record["think"] += "\nand nothing else" * i
    traces.write_text("".join(json.dumps(record) + "\n" for record in records))
    settings = ["trainer.max_steps=3", "trainer.lr_scheduler_type=constant", "trainer.learning_rate=1e-4"]
    one_batch = run(traces, tmp_path / "one_batch", *settings)
    split = ["trainer.per_device_train_batch_size=1", "trainer.gradient_accumulation_steps=4"]
    micro_batches = run(traces, tmp_path / "micro_batches", *settings, *split)
    losses = [[entry["loss"] for entry in history if "loss" in entry] for history in (one_batch, micro_batches)]
    assert len(losses[0]) == 3
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_the_head_computes_logits_of_labeled_positions_only(traces, tmp_path, monkeypatch):
    positions, head = [], trl_utils._ChunkedLogProbFunction

    class Counting:
        @staticmethod
        def apply(hidden, *rest):
            positions.append(len(hidden))
            return head.apply(hidden, *rest)

    monkeypatch.setattr(trl_utils, "_ChunkedLogProbFunction", Counting)
    run(traces, tmp_path / "out", "trainer.max_steps=1")
    tokenizer = AutoProcessor.from_pretrained(TINY).tokenizer
    texts = [render_completion(trace.think, trace.answer) for trace in read_records(traces, Trace)]
    assert positions == [sum(len(tokenizer(f"{text}<|im_end|>\n")["input_ids"]) for text in texts)]


def test_lora_saves_an_adapter_and_a_merged_model(traces, tmp_path):
    run(traces, tmp_path / "out", "trainer.max_steps=2", "model.lora={r: 4, alpha: 8}")
    assert (tmp_path / "out/adapter/adapter_model.safetensors").is_file()
    merged = AutoModelForImageTextToText.from_pretrained(tmp_path / "out/model")
    base = AutoModelForImageTextToText.from_pretrained(TINY)
    assert not any("lora" in name for name, _ in merged.named_parameters())
    name = "model.language_model.layers.0.self_attn.q_proj.weight"
    assert not torch.equal(merged.get_parameter(name), base.get_parameter(name))
    assert torch.equal(merged.get_input_embeddings().weight, base.get_input_embeddings().weight)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["+trainer.learning_rat=1"],
            r"trainer\.learning_rat: SFTConfig has no such field; did you mean learning_rate",
        ),
        (["+trainer.seed=1"], r"trainer\.seed: is set from the stage"),
        (["+trainer.optim=adamn"], "rejects these settings"),
        (["trainer.learning_rate=fast"], r"trainer\.learning_rate: expected a number, found 'fast'"),
        (["trainer.per_device_train_batch_size=1.5"], "expected a whole number, found 1.5"),
        (["model.min_pixels=9501", "model.max_pixels=9500"], r"min_pixels must be at most max_pixels \(9500\)"),
        (["model.path=./nowhere"], "no such checkpoint folder"),
        (["model.path=no/where"], "no/where: is not a folder, and as a hub id its config can't be loaded"),
    ],
)
def test_wrong_settings_are_named_and_keep_an_earlier_result(traces, tmp_path, overrides, message):
    write_json(tmp_path / "out/manifest.json", {"finished": True, "stage": "sft"})
    with pytest.raises(InputError, match=message):
        run(traces, tmp_path / "out", "overwrite=true", *overrides)
    assert read_manifest(tmp_path / "out")["stage"] == "sft"


@pytest.mark.parametrize(
    "setting", ["model.lora={r: 2, alpha: 2, target_modules: [nope]}", "trainer.report_to=nosuch"]
)
def test_settings_that_trl_or_peft_rejects_are_input_errors(traces, tmp_path, setting):
    with pytest.raises(InputError, match=r"sft: TRL or PEFT rejects these settings: .*(nope|nosuch)"):
        run(traces, tmp_path / "out", setting)


def test_a_missing_page_image_is_named_before_training(traces, tmp_path):
    moved = tmp_path / "elsewhere" / traces.name
    moved.parent.mkdir()
    moved.write_bytes(traces.read_bytes())
    with pytest.raises(InputError, match="no such page image; build the data again"):
        run(moved, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_adapters_train_on_a_4bit_base_and_full_training_is_rejected(traces, tmp_path):
    quantized = "model.load_in_4bit=true"
    run(traces, tmp_path / "out", "trainer.max_steps=2", "model.lora={r: 4, alpha: 8}", quantized)
    merged = AutoModelForImageTextToText.from_pretrained(tmp_path / "out/model")
    assert {parameter.dtype for parameter in merged.parameters()} == {torch.float32}
    with pytest.raises(InputError, match="4-bit weights can't be trained; add adapters"):
        run(traces, tmp_path / "full", "trainer.max_steps=2", quantized)


FULL_DISK = """
import resource, signal, sys
from mmr5_train import sft
from mmr5_train.common.config import run_stage
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # a write above the limit fails, as on a full disk
train = sft.train
def train_with_limit(run, trainer, **rest):
    class Limit(sft.TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            if state.global_step == 2:
                resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    trainer.add_callback(Limit())
    train(run, trainer, **rest)
from transformers import TrainerCallback
sft.TrainerCallback, sft.train = TrainerCallback, train_with_limit
run_stage(sft.main, sft.SftStage, "sft")
"""


def test_a_full_disk_keeps_the_last_complete_checkpoint(traces, tmp_path):
    out = tmp_path / "out"
    command = [sys.executable, "-c", FULL_DISK, f"data={traces}", f"out={out}", *SHORT]
    command += ["trainer.max_steps=3", "trainer.save_steps=1"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert result.returncode == 2, result.stderr[-3000:]
    assert f"{out}: the disk is full, a checkpoint can't be written" in result.stderr
    assert f"{out}/checkpoint-1 is complete" in result.stderr
    assert last_checkpoint(out) == out / "checkpoint-1"


def test_five_pages_of_2000_by_2600_pixels_do_not_stop_a_run_at_their_step(
    traces, standin, tmp_path, monkeypatch, capsys
):
    """They have 33,015 visual tokens, more than the published max_length. The sizes are read before any step."""
    Image.new("L", (2000, 2600), 200).save(tmp_path / "scan.png")
    short, long = read_records(traces, Trace)[:2]
    small = [page.model_copy(update={"image": str(traces.parent / page.image)}) for page in short.shown]
    shown = [page.model_copy(update={"image": "scan.png", "page": i}) for i, page in enumerate([small[0]] * 5)]
    fields = {"shown": shown, "notes": ["a scan"] * 5, "answer": [1, 2, 3, 4, 5], "positive_ids": [1]}
    long = Trace.model_validate(long.model_dump() | fields)
    write_records(tmp_path / "traces.jsonl", [short.model_copy(update={"shown": tuple(small)}), long])
    model = ["model=qwen2_5_vl_7b", f"model.path={standin}", "model.dtype=float32", "model.max_pixels=12845056"]
    settings = [*model, "trainer.max_steps=1", "trainer.save_strategy=no"]
    with monkeypatch.context() as patch:
        patch.setattr(sft, "load_model", lambda *_: pytest.fail("the model was loaded"))
        with pytest.raises(
            InputError, match=rf"1 of 2 examples have more than 32,768 .* {long.query_id}: 33,\d+ tokens"
        ):
            run(tmp_path / "traces.jsonl", tmp_path / "out", *settings)
    assert not (tmp_path / "out").exists()
    history = run(tmp_path / "traces.jsonl", tmp_path / "out", *settings, "max_too_long=0.5")
    assert history[0]["loss"] > 1
    [skipped] = read_records(tmp_path / "out/skipped.jsonl", Skipped)
    assert (skipped.query_id, skipped.reason) == (long.query_id, "too many tokens")
    assert "(pages 33,015 + text" in skipped.detail
    counts = read_manifest(tmp_path / "out")["counts"]
    assert (counts["traces"], counts["too many tokens"]) == (1, 1)
    printed = capsys.readouterr().out
    assert "raise trainer.max_length, or lower model.max_pixels, or use fewer candidates" in printed
    assert str(tmp_path / "out/skipped.jsonl") in printed


def test_completions_that_would_be_cut_are_not_trained(traces, processor, prompt, tmp_path):
    """TRL cuts them without a message, and a run in which no label is left reports a loss of 0."""
    records = read_records(traces, Trace)
    sizes = image_sizes(records[0].shown + records[1].shown + records[2].shown + records[3].shown, traces.parent)
    counts = count_tokens(processor, prompt, [t.query for t in records], [t.shown for t in records], sizes)
    longest = max(count.prompt for count in counts)
    with pytest.raises(
        InputError, match=rf"4 of 4 examples have more than {longest} tokens .* \+ completion \d+\)"
    ):
        run(traces, tmp_path / "out", f"trainer.max_length={longest}", "max_too_long=1")
    assert not (tmp_path / "out").exists()


def test_held_out_questions_must_fit_the_context(traces, questions, tmp_path):
    with pytest.raises(
        InputError, match=r"heldout: .*questions\.jsonl: 2 of 2 prompts .* less heldout\.max_new_tokens"
    ):
        run(
            traces,
            tmp_path / "out",
            f"heldout={{data:{questions},limit:2,max_new_tokens:32700}}",
            "trainer.save_total_limit=3",
        )
