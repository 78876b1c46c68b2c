"""transformers' Trainer under accelerate's FSDP2: what a checkpoint holds and who writes it.

The Trainer itself would gather the base model and write it with every checkpoint.
"""

import os

import torch
from accelerate.utils import save_fsdp_optimizer
from torch import nn
from transformers import Trainer
from transformers.trainer import SCHEDULER_NAME


def wanted() -> bool:
    """Whether `accelerate launch` asked for shards."""
    return os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"


class ShardedTrainer(Trainer):
    """The Trainer, plain where nothing is sharded.

    Raises ValueError where shards are asked for and accelerate would quietly make whole copies, or shards of
    FSDP's first version, whose flat parameters have no adapters in them.
    """

    def create_accelerator_and_postprocess(self):
        """accelerate knows FSDP2 on accelerators alone, and says nothing where there are none."""
        super().create_accelerator_and_postprocess()
        if not wanted():
            return
        if not self.is_fsdp_enabled:
            raise ValueError(
                "train: accelerate shards a model over GPUs alone, and there are none; without --use_fsdp,"
                " which gives each process the whole model, would be right"
            )
        if self.accelerator.state.fsdp_plugin.fsdp_version != 2:
            raise ValueError(
                "train: FSDP's version 1 came; accelerate launch --fsdp_version 2 would be right"
            )

    def _wrap_model(self, model, training=True, dataloader=None):
        if self.is_fsdp_enabled and training:
            check(model)
        return super()._wrap_model(model, training, dataloader)

    def save_model(self, output_dir=None, _internal_call=False):
        """The adapter; under FSDP2 every process comes to give its shards."""
        if self.is_fsdp_enabled:
            self._save(output_dir or self.args.output_dir)
        else:
            super().save_model(output_dir, _internal_call)

    def _save_optimizer_and_scheduler(self, output_dir):
        if not self.is_fsdp_enabled:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        plugin = self.accelerator.state.fsdp_plugin
        save_fsdp_optimizer(plugin, self.accelerator, self.optimizer, self.model, output_dir)
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), os.path.join(output_dir, SCHEDULER_NAME))


def check(model: nn.Module) -> None:
    """Raises ValueError for a model that FSDP2 would stop at with a word of its own insides."""
    trained = {str(p.dtype).removeprefix("torch.") for p in model.parameters() if p.requires_grad}
    if len(trained) > 1:
        raise ValueError(
            f"train: FSDP2 wants what trains in one dtype, here are {' and '.join(sorted(trained))};"
            " training.dtype: float32, and --mixed_precision bf16 to compute in bf16, would be right"
        )
    table, words = model.get_input_embeddings(), model.get_output_embeddings()
    if words is not None and table._parameters["weight"] is words._parameters["weight"]:
        if table.weight is not words.weight:
            raise ValueError(
                "train: FSDP2 does not take a table of embeddings that is also the output layer and of which"
                " some entries train; targets without it would be right"
            )
