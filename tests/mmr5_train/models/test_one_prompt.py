"""The one-prompt contract: SFT, GRPO, evaluation and an HTTP server get the same token ids and pixels."""

import json

import torch
from transformers import AutoProcessor
from transformers.cli.serving.utils import BaseHandler, Modality
from trl import GRPOConfig, GRPOTrainer
from trl.data_utils import prepare_multimodal_messages
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

from mmr5_train.chat.client import encode as encode_request
from mmr5_train.models.inputs import data_url, encode, load_pages, openai_messages
from mmr5_train.models.loading import TINY, load_model
from mmr5_train.ranking.prompt import render_completion
from mmr5_train.training.dataset import prompt_dataset


def with_urls(messages, images):
    """The messages as a server gets them: `ChatClient` puts the images into the encoded request."""
    return json.loads(encode_request({"messages": messages}, [data_url(image) for image in images]))["messages"]


def test_every_stage_gets_the_same_prompt(page_folder, tasks, tiny, prompt, processor, tmp_path):
    prompted = [task.in_prompt_order("shuffled", seed=3) for task in tasks]
    queries, shown = [task.query for task in tasks], [p.shown for p in prompted]
    images = [load_pages(candidates, page_folder, processor) for candidates in shown]
    completion = [{"role": "assistant", "content": render_completion("Image 1: a note.", [2, 1, 3])}]
    rows = [{"completion": completion, "pages": 3, "positives": [1]} for _ in tasks]
    dataset = prompt_dataset(rows, queries, shown, page_folder, prompt, processor)

    trainer = GRPOTrainer(
        load_model(tiny),
        reward_funcs=[lambda completions, **_: [0.0] * len(completions)],
        args=GRPOConfig(tmp_path, bf16=False, per_device_train_batch_size=2, num_generations=2, report_to="none"),
        train_dataset=dataset,
        processing_class=processor,
    )
    server_processor = AutoProcessor.from_pretrained(TINY)
    collate = DataCollatorForVisionLanguageModeling(processor, completion_only_loss=True)

    for i in range(len(tasks)):
        evaluation = encode(processor, prompt, [queries[i]], [images[i]])
        ids, pixels = evaluation["input_ids"][0], evaluation["pixel_values"]
        assert len(ids) > 50
        assert pixels.shape[0] == 3 * 48  # three pages of 84 × 112 pixels, in patches of 14 × 14

        sft = collate([dataset[i]])
        n = len(ids)
        assert torch.equal(sft["input_ids"][0, :n], ids)
        assert torch.equal(sft["pixel_values"], pixels)
        assert (sft["labels"][0, :n] == -100).all(), "the loss must not include the prompt"
        text = processor.tokenizer.decode(sft["labels"][0, n:])
        assert text.startswith("<think>")
        assert text.rstrip().endswith("</answer><|im_end|>")

        row = dataset[i]
        grpo_ids, _, fields = trainer._tokenize_prompts(
            [prepare_multimodal_messages(row["prompt"], images=row["images"])]
        )
        assert grpo_ids[0] == ids.tolist()
        assert torch.equal(torch.as_tensor(fields["pixel_values"]), pixels)

        messages = BaseHandler.get_processor_inputs_from_messages(
            with_urls(openai_messages(prompt, queries[i], len(images[i])), images[i]), Modality.VLM
        )
        served = server_processor.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True, tokenize=True
        )
        assert torch.equal(served["input_ids"][0], ids)
        assert torch.equal(served["pixel_values"], pixels)


def test_padding_does_not_change_a_prompt(page_folder, tasks, prompt, processor):
    images = [load_pages(task.candidates, page_folder, processor) for task in tasks]
    images[1] = images[1][:1]
    queries = [task.query for task in tasks]
    batch = encode(processor, prompt, queries, images)
    for i in range(len(tasks)):
        single = encode(processor, prompt, [queries[i]], [images[i]])
        is_token = batch["attention_mask"][i].bool()
        assert torch.equal(batch["input_ids"][i][is_token], single["input_ids"][0])
