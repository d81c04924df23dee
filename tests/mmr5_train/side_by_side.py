"""TRL's GRPOTrainer and SharedPrefixGRPOTrainer with equal settings. As a script, trains both under a launcher.

    accelerate launch … tests/mmr5_train/side_by_side.py FOLDER OUT '[{"max_steps": 6}]'

Reads questions.jsonl and page images in FOLDER. Trains with each of the settings. Writes OUT/histories.json: the
logs of both trainers for each of the settings, the kind of launch and the number of processes.
"""

import json
import sys
from pathlib import Path

import yaml
from peft import LoraConfig
from trl import GRPOConfig, GRPOTrainer

from mmr5_train.common.files import read_records
from mmr5_train.models.loading import ModelConfig, load_model, load_processor, vision_token_ids
from mmr5_train.ranking.prompt import Prompt
from mmr5_train.ranking.records import RankingTask
from mmr5_train.training.dataset import prompt_dataset
from mmr5_train.training.shared_grpo import SharedPrefixGRPOTrainer

ROOT = Path(__file__).resolve().parents[2]
TRAINERS = {"stock": GRPOTrainer, "shared": SharedPrefixGRPOTrainer}
ADAPTERS = {"r": 8, "lora_alpha": 16, "target_modules": r".*language_model.*(q_proj|v_proj|o_proj|up_proj)"}


def odd_token_reward(completions, completion_ids, images, **_):
    """A reward that varies within each group: it grows with the number of odd token ids and with the length."""
    # Reward functions may read the images column.
    assert all(len(row) == 3 for row in images)
    return [sum(token % 2 for token in ids) / 8 + len(ids) / 64 for ids in completion_ids]


def make_trainer(trainer_class, tiny, prompt, processor, tasks, folder, out, settings):
    """A trainer for 20 steps of 2 questions × 4 completions, with a constant learning rate and without dropout."""
    settings = dict(settings)
    lora = settings.pop("lora", True)
    model = load_model(tiny.model_copy(update={"freeze_vision": settings.pop("freeze_vision", True)}))
    values = {
        "per_device_train_batch_size": 8,
        "num_generations": 4,
        "max_steps": 20,
        "learning_rate": 1e-4,
        "lr_scheduler_type": "constant",
        "max_completion_length": 20,
        "temperature": 1.0,
        "beta": 0.0,
        "bf16": False,
        "gradient_checkpointing": False,
        "generation_kwargs": {"suppress_tokens": vision_token_ids(processor)},
        "save_strategy": "no",
        "report_to": "none",
        "logging_steps": 1,
        "remove_unused_columns": False,
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        **settings,
    }
    rows = [{"query_id": task.query_id} for task in tasks]
    shown = [task.candidates for task in tasks]
    return trainer_class(
        model=model,
        reward_funcs=[odd_token_reward],
        args=GRPOConfig(output_dir=str(out), seed=3, **values),
        train_dataset=prompt_dataset(rows, [t.query for t in tasks], shown, folder, prompt, processor),
        processing_class=processor,
        peft_config=LoraConfig(**ADAPTERS, task_type="CAUSAL_LM") if lora else None,
    )


def main(folder, out, settings):
    folder, out = Path(folder), Path(out)
    tiny = ModelConfig.model_validate(yaml.safe_load((ROOT / "configs/model/tiny.yaml").read_text()))
    prompt = Prompt.model_validate(yaml.safe_load((ROOT / "configs/prompt/default.yaml").read_text()))
    tasks = read_records(folder / "questions.jsonl", RankingTask)
    histories = {name: [] for name in TRAINERS}
    for values in json.loads(settings):
        for name, trainer_class in TRAINERS.items():
            trainer = make_trainer(
                trainer_class, tiny, prompt, load_processor(tiny), tasks, folder, out / name, values
            )
            trainer.train()
            histories[name].append([entry for entry in trainer.state.log_history if "loss" in entry])
    if trainer.accelerator.is_main_process:
        state = trainer.accelerator.state
        launched = f"{state.distributed_type.value} {state.num_processes}"
        (out / "histories.json").write_text(json.dumps(histories | {"launched": launched}))


if __name__ == "__main__":
    main(*sys.argv[1:])
