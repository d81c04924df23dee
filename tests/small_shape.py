"""A small shape of Qwen2.5-VL that replaces one of `mmr5_train.models.shapes` in the tests of benchmarks."""

SMALL = {
    "text_config": {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "layer_types": ["full_attention"] * 2,
        "rope_parameters": {"mrope_section": [2, 3, 3], "rope_theta": 1e6, "rope_type": "default"},
    },
    "vision_config": {"out_hidden_size": 64},
}
