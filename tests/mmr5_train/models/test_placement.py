"""A model on one device, or spread over several."""

import pytest
from accelerate import dispatch_model

from mmr5_train.common.files import InputError
from mmr5_train.inference.local import load_backend
from mmr5_train.models import placement
from mmr5_train.models.config import CheckpointOptions
from mmr5_train.models.placement import place_model


@pytest.fixture
def spread(tiny):
    return tiny.model_copy(update={"device_map": "auto"})


def answers(backend, page_folder, **options):
    from mmr5_train.models.pages import load_page

    images = [[load_page(page_folder / f"page-{i}.png", backend.limits) for i in pages] for pages in ([0, 1], [2])]
    return backend.generate(["a red page", "a blue page"], images, **options)


def test_a_spread_model_gives_the_same_answers(tiny, spread, page_folder, tmp_path, monkeypatch):
    """Without GPUs, the second half of the model stays on the disk instead of in CPU memory."""

    def dispatch(model, device_map, **options):
        blocks = [name for name, _ in model.named_modules() if name.rpartition(".")[0].endswith("layers")]
        device_map = {name: "cpu" for name, _ in model.named_children()}
        device_map = {"model.visual": "disk", "model.language_model.embed_tokens": "cpu"}
        device_map |= {name: "disk" if i else "cpu" for i, name in enumerate(blocks)}
        device_map |= {
            "model.language_model.norm": "cpu",
            "model.language_model.rotary_emb": "cpu",
            "lm_head": "cpu",
        }
        return dispatch_model(model, device_map, offload_dir=str(tmp_path / "offload"), **options)

    whole = load_backend("tiny", CheckpointOptions(model=tiny), max_new_tokens=12)
    monkeypatch.setattr(placement, "dispatch_model", dispatch)
    split = load_backend("tiny", CheckpointOptions(model=spread), max_new_tokens=12)
    assert {parameter.device.type for parameter in split.model.parameters()} == {"cpu", "meta"}
    assert answers(split, page_folder) == answers(whole, page_folder)
    sampled = {"samples": 2, "seed": 3}
    assert answers(split, page_folder, **sampled) == answers(whole, page_folder, **sampled)
    for backend in (split, whole):
        backend.mode = "logits"
    for [one], [other] in zip(answers(split, page_folder), answers(whole, page_folder), strict=True):
        assert one.order == other.order
        assert one.scores == pytest.approx(other.scores, abs=1e-5)  # with a cache, or in a packed row


def test_a_model_that_can_not_be_spread_is_an_error(tiny, spread, monkeypatch):
    from mmr5_train.models.loading import load_model

    model = load_model(tiny)
    with monkeypatch.context() as patch:
        patch.setattr(placement, "get_balanced_memory", lambda *_, **__: {"cpu": 10_000})
        with pytest.raises(InputError, match="tiny: does not fit the memory of this machine's GPUs and CPUs"):
            place_model(model, spread, "cpu")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="device_map=auto: spreads one model over all GPUs, found 2 processes"):
        place_model(model, spread, "cpu")
