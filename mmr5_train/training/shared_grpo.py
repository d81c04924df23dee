"""TRL's GRPOTrainer with shared prompts: rollouts, log-probabilities and loss each read a prompt once a group.

`SharedPrefixGRPOTrainer` changes how four things are computed and no number: the prompt's tokens and images are
prepared once a group; completions are sampled behind one prefill; old, reference and policy log-probabilities come
from one packed row (`models.shared_prefix`); and with a frozen tower the page features are computed once an
optimization step and used in every pass of it. They replace the pixels in the buffered batch, of which they are
the smaller part (a visual token is 4 × 1,176 float32 of pixels, and `hidden` numbers of the model's own dtype).
"""

from __future__ import annotations

from collections.abc import Sequence
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
    unsupported_model,
)

PIXELS = ("pixel_values", "image_grid_thw")


def unsupported(model: Any, args: Any) -> str | None:
    """Why a training with these settings (`args` is a GRPOConfig) can't share its prompts, None if it can."""
    if args.per_device_train_batch_size % args.num_generations:
        return (
            f"trainer.per_device_train_batch_size ({args.per_device_train_batch_size}) is not a multiple of "
            f"trainer.num_generations ({args.num_generations}), so groups are torn apart"
        )
    if getattr(args, "use_transformers_continuous_batching", False):
        return "continuous batching makes the rollouts"
    return unsupported_model(model)


class SharedPrefixGRPOTrainer(GRPOTrainer):
    """See the module. Takes what GRPOTrainer takes, and refuses (`ValueError`) what `unsupported` names."""

    args: Any  # GRPOConfig; the base classes declare less than they hold
    model: Any
    num_generations: Any
    num_generations_eval: Any
    _buffered_inputs: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        base = self._base_model()
        reason = unsupported(base, self.args)
        if reason is not None:
            raise ValueError(f"prompts can't be shared: {reason}")
        for model in (base, self.ref_model):
            if model is not None:
                share_prefixes(self.accelerator.unwrap_model(model))
        tower = getattr(base.base_model, "visual", None)
        self._tower_is_frozen = tower is not None and not any(p.requires_grad for p in tower.parameters())
        self._row_images: list[Any] = []
        self._rollout_pixels: dict[str, Any] = {}
        self._rollout_images: list[Any] | None = None
        self._row_prompts: list[SharedPrompt] = []  # of each row of the batch at work

    def _base_model(self) -> Any:
        model: Any = self.accelerator.unwrap_model(self.model)
        return model.get_base_model() if hasattr(model, "get_base_model") else model

    def _prepare_inputs(self, generation_batch: Any) -> Any:
        """As TRL's, but groups stay whole when rollouts are dealt out to micro-batches."""
        if not self.model.training:
            return super()._prepare_inputs(generation_batch)
        every = self.args.steps_per_generation * self.num_iterations
        if self._step % every == 0 or self._buffered_inputs is None:
            batch = self._generate_and_score_completions(generation_batch)
            batch = _shuffle_groups(batch, self.num_generations)
            self._buffered_inputs = split_tensor_dict(batch, self.args.steps_per_generation)
        return self._buffered_inputs[self._step % self.args.steps_per_generation]

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        # TRL would run the image processor on all G copies again; inside the messages, images are left to us.
        self._row_images = [row.get("images") for row in inputs]
        hidden = [_with_images_in_prompt(row) for row in inputs]
        output: dict[str, Any] = super()._generate_and_score_completions(hidden)
        output["shared_prompts"] = self._row_prompts
        return output

    def _calculate_rewards(self, inputs: list[dict[str, Any]], *args: Any) -> Any:
        rows = zip(inputs, self._row_images, strict=True)
        return super()._calculate_rewards(
            [row if images is None else {**row, "images": images} for row, images in rows], *args
        )

    def _group_size(self) -> int:
        return int(self.num_generations if self.model.training else self.num_generations_eval)

    def _tokenize_prompts(self, prompts: list[Any]) -> Any:
        """Prompts come G times in a row; each is rendered, and its images processed, once."""
        size = self._group_size()
        ids, self._rollout_images, self._rollout_pixels = super()._tokenize_prompts(prompts[::size])
        return [row for row in ids for _ in range(size)], None, {}

    def _generate_single_turn(
        self, prompt_ids: list[list[int]], images: Any, multimodal_fields: Any, num_generations: int, *rest: Any
    ) -> Any:
        size = self._group_size()
        unique = prompt_ids[::size]
        if self.use_vllm:  # its prefix cache does there what `generate` does here
            self._share(self._base_model(), unique, size)
            rows = self._rollout_images and [row for row in self._rollout_images for _ in range(size)]
            return super()._generate_single_turn(prompt_ids, rows, {}, num_generations, *rest)
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
            base = model.get_base_model() if hasattr(model, "get_base_model") else model
            prompts = self._share(base, unique, size)
            tokens = generate(base, prompts, size, self.generation_config)
        return [_until_end(row, self.eos_token_ids) for row in tokens.tolist()], None

    def _share(self, base: Any, prompt_ids: list[list[int]], size: int) -> list[SharedPrompt]:
        """The batch's prompts, with page features where the tower is frozen; sets them as the rows' prompts."""
        device = self.accelerator.device
        fields = {
            key: torch.as_tensor(self._rollout_pixels[key]).to(device) for key in PIXELS if self._rollout_images
        }
        types = self._rollout_pixels.get("mm_token_type_ids")
        prompts = shared_prompts(
            base,
            [torch.tensor(row, device=device) for row in prompt_ids],
            None if types is None else [torch.tensor(row, device=device) for row in types],
            fields or None,
            [len(row or []) for row in self._rollout_images or []],
            keep_features=self._tower_is_frozen,
        )
        self._row_prompts = [prompt for prompt in prompts for _ in range(size)]
        return prompts

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        self._row_prompts = inputs["shared_prompts"]
        return super()._compute_loss(model, inputs)

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
        """(N, C) log-probabilities and entropies of the completions, `batch_size` of them in one packed row."""
        completions = input_ids[:, -logits_to_keep:]
        mask = attention_mask[:, -logits_to_keep:]
        batch_size = batch_size or len(input_ids)
        parts = []
        for start in range(0, len(input_ids), batch_size):
            rows = slice(start, start + batch_size)
            prompts, counts = _runs(self._row_prompts[rows])
            packed = pack(prompts, completions[rows].split(counts), mask[rows])
            with self.accelerator.autocast():
                outputs = model(**packed.inputs, labels=packed.labels, fused_lm_head=True)
            entropy = packed.unpack(outputs.entropy) if compute_entropy else None
            parts.append((packed.unpack(outputs.log_probs), entropy))
        log_probs = torch.cat([part[0] for part in parts])
        entropies = torch.cat([part[1] for part in parts]) if compute_entropy else None  # type: ignore[misc]
        return log_probs, entropies, None


def _runs(prompts: Sequence[SharedPrompt]) -> tuple[list[SharedPrompt], list[int]]:
    """Each prompt once, and how many rows in a row have it."""
    groups = [list(group) for _, group in groupby(prompts, key=id)]
    return [group[0] for group in groups], [len(group) for group in groups]


def _with_images_in_prompt(row: dict[str, Any]) -> dict[str, Any]:
    if row.get("images") is None:
        return row
    prompt = prepare_multimodal_messages(row["prompt"], images=row["images"])
    return {**{key: value for key, value in row.items() if key != "images"}, "prompt": prompt}


def _until_end(ids: list[int], end_ids: Sequence[int]) -> list[int]:
    """The tokens of a completion up to and with its first end token."""
    end = next((i for i, token in enumerate(ids) if token in end_ids), len(ids) - 1)
    return ids[: end + 1]


def _shuffle_groups(batch: dict[str, Any], size: int) -> dict[str, Any]:
    """TRL's shuffle of a rollout batch with groups kept whole; it draws as many random numbers as TRL's does."""
    rows = len(batch["shared_prompts"])
    groups = dict.fromkeys((torch.randperm(rows) // size).tolist())  # in the order in which they first appear
    order = torch.tensor([group * size + i for group in groups for i in range(size)])

    def ordered(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value[order.to(value.device)] if value.ndim else value
        return None if value is None else [value[i] for i in order.tolist()]

    return {key: ordered(value) for key, value in batch.items()}
