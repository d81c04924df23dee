"""The private methods and functions of TRL and transformers that this project overrides or replaces.

They may change in any release. When a test here fails after an upgrade, read the new source and adapt the named
module before you update the signature below.
"""

import ast
import inspect
import textwrap

import pytest
from transformers import Trainer
from trl import GRPOTrainer, SFTTrainer
from trl.trainer import utils
from trl.trainer.utils import RepeatSampler

GRPO = "mmr5_train/training/shared_grpo.py"
FINITE = "mmr5_train/training/callbacks.py"
RUN = "mmr5_train/training/run.py"
DISTILLATION = "mmr5_train/training/distillation.py"
OVERRIDDEN = {
    (GRPOTrainer, "training_step"): (GRPO, "(self, model, inputs, num_items_in_batch)"),
    (GRPOTrainer, "_prepare_inputs"): (GRPO, "(self, generation_batch)"),
    (GRPOTrainer, "_generate_and_score_completions"): (GRPO, "(self, inputs)"),
    (GRPOTrainer, "_compute_loss"): (GRPO, "(self, model, inputs)"),
    (GRPOTrainer, "_calculate_rewards"): (GRPO, "(self, inputs, prompts, completions, completion_ids_list)"),
    (GRPOTrainer, "_tokenize_prompts"): (GRPO, "(self, prompts)"),
    (GRPOTrainer, "_generate_single_turn"): (
        GRPO,
        "(self, prompt_ids, images, multimodal_fields, num_generations, has_tool_images=False)",
    ),
    (GRPOTrainer, "_get_per_token_logps_and_entropies"): (
        GRPO,
        "(self, model, input_ids, attention_mask, logits_to_keep, batch_size=None, compute_entropy=False, "
        "compute_aux_loss=False, pixel_values=None, image_grid_thw=None, num_images=None, "
        "pixel_attention_mask=None, spatial_shapes=None, num_tiles=None, image_sizes=None, token_type_ids=None, "
        "mm_token_type_ids=None, image_position_ids=None)",
    ),
    (SFTTrainer, "compute_loss"): (
        DISTILLATION,
        "(self, model, inputs, return_outputs=False, num_items_in_batch=None)",
    ),
    (Trainer, "_get_num_items_in_batch"): (DISTILLATION, "(self, batch_samples, device)"),
    (Trainer, "training_step"): (FINITE, "(self, model, inputs, num_items_in_batch=None)"),
    (Trainer, "_get_grad_norm"): (FINITE, "(self, model, grad_norm=None)"),
    (utils, "_use_triton"): (RUN, "(device)"),
}


def plain_signature(function):
    """The parameters with their defaults, without annotations."""
    signature = inspect.signature(function)
    parameters = [p.replace(annotation=inspect.Parameter.empty) for p in signature.parameters.values()]
    return str(signature.replace(parameters=parameters, return_annotation=inspect.Signature.empty))


@pytest.mark.parametrize(("owner", "name"), OVERRIDDEN, ids=lambda value: getattr(value, "__name__", value))
def test_an_overridden_method_has_its_known_signature(owner, name):
    module, expected = OVERRIDDEN[owner, name]
    signature = plain_signature(getattr(owner, name))
    assert signature == expected, (
        f"{owner.__name__}.{name} has changed its signature to {signature}; {module} overrides it: read the new "
        "source, adapt that module, then update this test"
    )


def test_trl_calls_the_overridden_methods_in_the_expected_order():
    """SharedPrefixGRPOTrainer hands a batch's prompts from one of these calls to the next."""
    generate = inspect.getsource(GRPOTrainer._generate)
    assert generate.index("self._tokenize_prompts(prompts)") < generate.index("self._generate_single_turn(")
    rollout = inspect.getsource(GRPOTrainer._generate_and_score_completions)
    calls = ("self._generate(prompts)", "self._get_per_token_logps_and_entropies(", "self._calculate_rewards(")
    positions = [rollout.index(call) for call in calls]
    assert positions == sorted(positions)
    assert "self._get_per_token_logps_and_entropies(" in inspect.getsource(GRPOTrainer._compute_loss)


def test_the_loss_uses_the_model_only_for_log_probabilities():
    """SharedPrefixGRPOTrainer passes the log-probabilities of a micro-batch in place of the model."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(GRPOTrainer._compute_loss)))
    names = [node for node in ast.walk(tree) if isinstance(node, ast.Name) and node.id == "model"]
    assert len(names) == 1


def test_trl_logs_the_list_of_prompts_that_rewards_receive():
    """`RolloutPagesTrainer` (mmr5_train/training/rollout_pages.py) removes the images from this list."""
    rollout = inspect.getsource(GRPOTrainer._generate_and_score_completions)
    rewards = rollout.index("self._calculate_rewards(inputs, prompts, completions, completion_ids_list)")
    assert rewards < rollout.index('self._logs["prompt"].extend(gather_object(prompts))')
    assert "prompts = " not in rollout[rewards:]


def test_the_sampler_draws_an_epoch_from_its_generator():
    """`ResumeSampler` (mmr5_train/training/checkpoints.py) sets this generator to an epoch's start."""
    sampler = RepeatSampler(list(range(5)), mini_repeat_count=1, batch_size=1, repeat_count=1, seed=3)
    first, second = list(sampler), list(sampler)
    assert first != second
    sampler.generator.manual_seed(3)
    assert list(sampler) == first
    assert sampler.num_samples == 5
