"""TRL's GRPOTrainer with shared prompts: each prompt is read once for its whole group of completions.

`SharedPrefixGRPOTrainer` computes the same numbers as TRL's trainer with less work:

- A prompt is tokenized, and its images are processed, once per group.
- The completions of a group are sampled after one prefill of their prompt.
- Old, reference and policy log-probabilities come from one packed row (`models.shared_prefix`).
- With a frozen vision tower, page features are computed once per rollout batch and used in all its forward passes.
  They replace the pixels in the buffered batch and are smaller: a visual token takes 4 × 1,176 float32 values as
  pixels, and `hidden_size` values of the model's dtype as features.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from trl import GRPOTrainer
from trl.data_utils import prepare_multimodal_messages
from trl.models import unwrap_model_for_generation
from trl.trainer.utils import split_tensor_dict

from mmr5_train.models.shared_prefix import (
    SharedPrompt,
    generate,
    pack,
    share_prefixes,
    shared_prompts,
    unsupported_reason,
)

PIXEL_FIELDS = ("pixel_values", "image_grid_thw")


def unsupported(model: Any, args: Any) -> str | None:
    """The reason why a run with these settings (`args` is a GRPOConfig) can't share prompts, or None."""
    if args.per_device_train_batch_size % args.num_generations:
        return (
            f"trainer.per_device_train_batch_size ({args.per_device_train_batch_size}) is not a multiple of "
            f"trainer.num_generations ({args.num_generations}), so a micro-batch would split a group"
        )
    if getattr(args, "use_transformers_continuous_batching", False):
        return "transformers' continuous batching samples the rollouts"
    return unsupported_reason(model)


class SharedPrefixGRPOTrainer(GRPOTrainer):
    """Takes the arguments of GRPOTrainer. Raises `ValueError` for settings that `unsupported` rejects.

    A batch contains its prompts: in the multimodal fields from tokenization to sampling, and under
    "shared_prompts" from the rollout to the loss. TRL's `_get_per_token_logps_and_entropies` receives token ids
    but not the batch, so `_bind_prompts` stores the prompts during the call that scores them.
    """

    args: Any  # GRPOConfig; the base class declares TrainingArguments
    model: Any
    num_generations: Any
    num_generations_eval: Any
    _buffered_inputs: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        base = _without_adapter(self.accelerator.unwrap_model(self.model))
        reason = unsupported(base, self.args)
        if reason is not None:
            raise ValueError(f"prompts can't be shared: {reason}")
        for model in (base, self.ref_model):
            if model is not None:
                share_prefixes(self.accelerator.unwrap_model(model))
        tower = getattr(base.base_model, "visual", None)
        self._tower_is_frozen = tower is not None and not any(p.requires_grad for p in tower.parameters())
        self._bound_prompts: list[SharedPrompt] | None = None

    def _prepare_inputs(self, generation_batch: Any) -> Any:
        """Like TRL's method, but keeps groups together when it splits a rollout batch into micro-batches."""
        if not self.model.training:
            return super()._prepare_inputs(generation_batch)
        micro_steps_per_rollout = self.args.steps_per_generation * self.num_iterations
        if self._step % micro_steps_per_rollout == 0 or self._buffered_inputs is None:
            batch = self._generate_and_score_completions(generation_batch)
            batch = _shuffle_groups(batch, self.num_generations)
            self._buffered_inputs = split_tensor_dict(batch, self.args.steps_per_generation)
        return self._buffered_inputs[self._step % self.args.steps_per_generation]

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        # TRL would run the image processor on every copy of a prompt that has an "images" column.
        examples = [_move_images_into_prompt(example) for example in inputs]
        with self._bind_prompts([]) as prompts:  # `_generate_single_turn` fills the list
            output: dict[str, Any] = super()._generate_and_score_completions(examples)
        output["shared_prompts"] = prompts
        return output

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        with self._bind_prompts(inputs["shared_prompts"]):
            return super()._compute_loss(model, inputs)

    @contextmanager
    def _bind_prompts(self, prompts: list[SharedPrompt]) -> Iterator[list[SharedPrompt]]:
        """Stores the prompts, one per row of a batch, for the log-probability calls inside the block."""
        if self._bound_prompts is not None:
            raise RuntimeError("the prompts of another batch are bound")
        self._bound_prompts = prompts
        try:
            yield prompts
        finally:
            self._bound_prompts = None

    def _calculate_rewards(self, inputs: list[dict[str, Any]], prompts: list[Any], *rest: Any) -> Any:
        """Restores the "images" column, which reward functions may read, and calls TRL's method."""
        examples = [
            example if (images := _images_of(messages)) is None else {**example, "images": images}
            for example, messages in zip(inputs, prompts, strict=True)
        ]
        return super()._calculate_rewards(examples, prompts, *rest)

    def _group_size(self) -> int:
        return int(self.num_generations if self.model.training else self.num_generations_eval)

    def _tokenize_prompts(self, prompts: list[Any]) -> tuple[list[list[int]], None, dict[str, Any]]:
        """Tokenizes each prompt once. TRL passes the third value to `_generate_single_turn` unchanged.

        `prompts` holds each prompt `_group_size()` times in a row. The second value, TRL's images, stays empty so
        that TRL does not process the images of every copy.
        """
        size = self._group_size()
        ids, images, fields = super()._tokenize_prompts(prompts[::size])
        return _repeat(ids, size), None, {**fields, "images": images}

    def _generate_single_turn(
        self, prompt_ids: list[list[int]], images: None, multimodal_fields: Any, num_generations: int, *rest: Any
    ) -> Any:
        """Samples the completions of each group after one prefill. Adds the batch's prompts to the bound list."""
        size = self._group_size()
        fields = dict(multimodal_fields)
        group_images = fields.pop("images")
        assert self._bound_prompts is not None, "sampling happens inside _generate_and_score_completions"
        if self.use_vllm:  # vLLM's prefix cache shares the prefill
            base = _without_adapter(self.accelerator.unwrap_model(self.model))
            self._bound_prompts += _repeat(
                self._shared_prompts(base, prompt_ids[::size], group_images, fields), size
            )
            row_images = group_images and _repeat(group_images, size)
            return super()._generate_single_turn(prompt_ids, row_images, {}, num_generations, *rest)
        with (
            unwrap_model_for_generation(
                self.model_wrapped,
                self.accelerator,
                gather_deepspeed3_params=self.args.ds3_gather_for_generation,
                generation_kwargs=self.generation_kwargs,
                gradient_checkpointing_kwargs=self.args.gradient_checkpointing_kwargs,
            ) as model,
            torch.no_grad(),
        ):
            base = _without_adapter(model)
            prompts = self._shared_prompts(base, prompt_ids[::size], group_images, fields)
            self._bound_prompts += _repeat(prompts, size)
            tokens = generate(base, prompts, size, self.generation_config)
        return [_until_end(ids, self.eos_token_ids) for ids in tokens.tolist()], None

    def _shared_prompts(
        self, base: Any, prompt_ids: list[list[int]], images: list[Any] | None, fields: dict[str, Any]
    ) -> list[SharedPrompt]:
        """The distinct prompts of a batch, with page features instead of pixels if the tower is frozen."""
        device = self.accelerator.device
        pixels = {key: torch.as_tensor(fields[key]).to(device) for key in PIXEL_FIELDS if images}
        types = fields.get("mm_token_type_ids")
        return shared_prompts(
            base,
            [torch.tensor(ids, device=device) for ids in prompt_ids],
            None if types is None else [torch.tensor(prompt_types, device=device) for prompt_types in types],
            pixels or None,
            [len(prompt_images or []) for prompt_images in images or []],
            keep_features=self._tower_is_frozen,
        )

    def _get_per_token_logps_and_entropies(
        self,
        model: Any,
        input_ids: Tensor,
        attention_mask: Tensor,
        logits_to_keep: int,
        batch_size: int | None = None,
        compute_entropy: bool = False,
        **_: Any,
    ) -> tuple[Tensor, Tensor | None, None]:
        """(N, C) log-probabilities and entropies of the completions, `batch_size` of them in one packed row.

        Raises `RuntimeError` if the bound prompts are not those of `input_ids`.
        """
        row_prompts = self._bound_prompts
        _check_prompts(row_prompts, input_ids[:, :-logits_to_keep], attention_mask[:, :-logits_to_keep])
        completions = input_ids[:, -logits_to_keep:]
        mask = attention_mask[:, -logits_to_keep:]
        batch_size = batch_size or len(input_ids)
        log_probs, entropies = [], []
        for start in range(0, len(input_ids), batch_size):
            rows = slice(start, start + batch_size)
            prompts, counts = _runs(row_prompts[rows])  # type: ignore[index]
            packed = pack(prompts, completions[rows].split(counts), mask[rows])
            with self.accelerator.autocast():
                outputs = model(**packed.inputs, labels=packed.labels, fused_lm_head=True)
            log_probs.append(packed.unpack(outputs.log_probs))
            if compute_entropy:
                entropies.append(packed.unpack(outputs.entropy))
        return torch.cat(log_probs), torch.cat(entropies) if compute_entropy else None, None


def _without_adapter(model: Any) -> Any:
    """The base model in which PEFT has placed its adapter layers, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _check_prompts(row_prompts: Sequence[SharedPrompt] | None, ids: Tensor, mask: Tensor) -> None:
    """Raises `RuntimeError` unless row i of the left-padded (N, P) `ids` is `row_prompts[i]`."""
    if row_prompts is None or len(row_prompts) != len(ids):
        raise RuntimeError(f"expected {len(ids)} bound prompts, one per row, found {len(row_prompts or [])}")
    lengths = mask.sum(1).tolist()
    for i, prompt in enumerate(row_prompts):
        if not torch.equal(ids[i, ids.shape[1] - int(lengths[i]) :], prompt.ids):
            raise RuntimeError(f"row {i}: its prompt differs from the bound prompt")


def _repeat(values: Sequence[Any], times: int) -> list[Any]:
    """Each value `times` times in a row."""
    return [value for value in values for _ in range(times)]


def _runs(prompts: Sequence[SharedPrompt]) -> tuple[list[SharedPrompt], list[int]]:
    """Each prompt once, and its number of consecutive rows."""
    groups = [list(group) for _, group in groupby(prompts, key=id)]
    return [group[0] for group in groups], [len(group) for group in groups]


def _move_images_into_prompt(example: dict[str, Any]) -> dict[str, Any]:
    if example.get("images") is None:
        return example
    prompt = prepare_multimodal_messages(example["prompt"], images=example["images"])
    return {**{key: value for key, value in example.items() if key != "images"}, "prompt": prompt}


def _images_of(messages: Any) -> list[Any] | None:
    """The images in a prompt's messages, in order; None if the messages contain no images."""
    contents = [message["content"] for message in messages if isinstance(message, dict)]
    parts = [part for content in contents if isinstance(content, list) for part in content]
    return [part["image"] for part in parts if part["type"] == "image"] or None


def _until_end(ids: list[int], end_ids: Sequence[int]) -> list[int]:
    """The tokens of a completion up to its first end token, which is included."""
    end = next((i for i, token in enumerate(ids) if token in end_ids), len(ids) - 1)
    return ids[: end + 1]


def _shuffle_groups(batch: dict[str, Any], size: int) -> dict[str, Any]:
    """Shuffles a rollout batch and keeps groups together. Draws as many random numbers as TRL's shuffle."""
    rows = len(batch["shared_prompts"])
    groups = dict.fromkeys((torch.randperm(rows) // size).tolist())  # in order of first appearance
    order = torch.tensor([group * size + i for group in groups for i in range(size)])

    def reorder(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value[order.to(value.device)] if value.ndim else value
        return None if value is None else [value[i] for i in order.tolist()]

    return {key: reorder(value) for key, value in batch.items()}
