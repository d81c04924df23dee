"""The short training of the stand-in checkpoint: its approximations are close to the model's own loss."""

import random

import pytest
import standin_form
import torch
from rehearsal_data import A4_36_DPI
from standin_form import UsedEmbeddings, form_completion, form_loss, form_prompt, tokenize
from transformers import AutoModelForImageTextToText, AutoProcessor


@pytest.mark.parametrize("family", ["standin", "qwen3_standin"])
def test_form_loss_is_close_to_the_loss_of_the_complete_model(family, request, monkeypatch):
    checkpoint = request.getfixturevalue(family)
    processor = AutoProcessor.from_pretrained(checkpoint)
    model = AutoModelForImageTextToText.from_pretrained(checkpoint, dtype=torch.float32)
    weight = model.get_input_embeddings().weight.detach()
    encoded = []
    encode_prompt = standin_form.encode_prompt
    monkeypatch.setattr(standin_form, "encode_prompt", lambda *a: encoded.append(encode_prompt(*a)) or encoded[0])
    prompt = form_prompt(model, processor, 2, A4_36_DPI, random.Random(0))
    [completion] = tokenize(processor, [form_completion(2, random.Random(0))])
    with torch.no_grad():
        [inputs] = encoded
        added = {"input_ids": completion, "attention_mask": torch.ones_like(completion)}
        added["mm_token_type_ids"] = torch.zeros_like(completion)
        inputs |= {key: torch.cat([inputs[key], values[None]], dim=1) for key, values in added.items()}
        logits = model(**inputs).logits[0, -len(completion) - 1 : -1]
        expected = torch.nn.functional.cross_entropy(logits, completion).item()

        embeddings = UsedEmbeddings(weight, torch.cat([prompt.ids_T, completion]).unique())
        embeddings.weight /= 5  # as in the complete model
        losses = {}
        for page_tokens in (len(prompt.pages[0]), 4):
            monkeypatch.setattr(standin_form, "PAGE_TOKENS", page_tokens)
            loss = form_loss(model.model.language_model, embeddings, prompt, [completion] * 2, random.Random(0))
            losses[page_tokens] = loss.item()
    all_tokens, few_tokens = losses.values()
    assert all_tokens == pytest.approx(expected, abs=0.01)
    assert few_tokens == pytest.approx(expected, abs=0.05)
