from transformers import AutoModelForImageTextToText, AutoProcessor, Qwen2_5_VLForConditionalGeneration

from mmr5_train.common.config import compose_stage
from mmr5_train.models.loading import TINY
from mmr5_train.ranking.prompt import render_completion
from scripts import pretrain_tiny


def test_tiny_model_is_small_and_loads_with_transformers():
    assert sum(path.stat().st_size for path in TINY.iterdir()) < 6_000_000
    model = AutoModelForImageTextToText.from_pretrained(TINY)
    assert type(model) is Qwen2_5_VLForConditionalGeneration
    processor = AutoProcessor.from_pretrained(TINY)
    assert type(processor).__name__ == "Qwen2_5_VLProcessor"
    assert model.config.image_token_id == processor.image_token_id


def test_tokenizer_has_tag_tokens_and_round_trips_any_text(processor):
    tokenizer = processor.tokenizer
    for token in (*pretrain_tiny.SPECIAL, *pretrain_tiny.TAGS):
        assert tokenizer(token).input_ids == [tokenizer.convert_tokens_to_ids(token)]
    text = render_completion("Image 1: Prévisions – 表 ☂ 12,5 %\n\tend", [3, 1, 2])
    assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) == text


def test_pretraining_writes_the_same_architecture(tmp_path):
    config = compose_stage(pretrain_tiny.TinyStage, "tiny", [f"out={tmp_path}/tiny", "pages=48"])
    short = {name: phase.model_copy(update={"steps": 2}) for name, phase in config.phases.items()}
    pretrain_tiny.main(config.model_copy(update={"phases": short}))
    rebuilt = AutoModelForImageTextToText.from_pretrained(tmp_path / "tiny")
    shipped = AutoModelForImageTextToText.from_pretrained(TINY)
    assert {n: p.shape for n, p in rebuilt.named_parameters()} == {
        n: p.shape for n, p in shipped.named_parameters()
    }
    old, new = AutoProcessor.from_pretrained(TINY), AutoProcessor.from_pretrained(tmp_path / "tiny")
    assert old.tokenizer.get_vocab() == new.tokenizer.get_vocab()
    assert old.chat_template == new.chat_template
