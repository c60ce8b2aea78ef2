"""A ViT and its token head as one branch, student or teacher."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from ssl_distill.backbones.create import check_crop_size, create_backbone, embed_dim_of
from ssl_distill.backbones.vit import VisionTransformer
from ssl_distill.heads.network import per_view
from ssl_distill.heads.token import TokenHead


class TeacherTokens(NamedTuple):
    """What a teacher says of its views.

    Attributes:
        class_logits: Of every view.
        patch_logits: Of the M masked patches, in the order in which the mask lists them.
        mean_patch_logits: Mean over all patches, masked or not, of every view.
    """

    class_logits: Float[Tensor, "T B K"]
    patch_logits: Float[Tensor, "M K2"]
    mean_patch_logits: Float[Tensor, "T B K2"]


class StudentTokens(NamedTuple):
    """What a student says of all crops.

    Attributes:
        class_features: The backbone's class tokens, global crops first.
        class_logits: Their logits.
        patch_logits: Of the M masked patches of the global crops, in the order in which the mask lists them.
    """

    class_features: Float[Tensor, "V B D"]
    class_logits: Float[Tensor, "V B K"]
    patch_logits: Float[Tensor, "M K2"]


class TokenNetwork(nn.Module):
    """ViT and token head. The head never sees a patch whose logits nobody asks for.

    Args:
        backbone: Must tell its tokens.
        head: A `TokenHead` or `SeparateTokenHead`.

    Raises:
        ValueError: If one of them is of another kind.
    """

    def __init__(self, backbone: nn.Module, head: nn.Module) -> None:
        super().__init__()
        if not isinstance(backbone, VisionTransformer):
            raise ValueError(
                f"`backbone` must be one of timm's plain ViTs, whose patches can be masked, got"
                f" {type(backbone).__name__}; try vit_small_patch16_224."
            )
        if not isinstance(head, TokenHead):
            raise ValueError(f"`head` must make a TokenHead or SeparateTokenHead, got {type(head).__name__}.")
        self.backbone = backbone
        self.head = head

    def forward(
        self,
        global_crops: Float[Tensor, "T B 3 H W"],
        local_crops: Float[Tensor, "L B 3 h w"],
        masked: Bool[Tensor, "T B N"],
        mask_token: Float[Tensor, "1 D"],
        attend: Bool[Tensor, "T B N"] | None = None,
    ) -> StudentTokens:
        """The student's part: masked global crops and whole local ones.

        Args:
            global_crops: Crops whose masked patches are hidden.
            local_crops: Crops seen as they are; L may be 0.
            masked: Patches that are hidden.
            mask_token: What takes their place.
            attend: Patches that the class token of a global crop may attend to; None for all.
        """
        tokens = self._tokens(global_crops, attend, masked=masked.flatten(0, 1), mask_token=mask_token)
        class_features = tokens.class_tokens[:, 0].unflatten(0, global_crops.shape[:2])
        if len(local_crops):
            class_features = torch.cat([class_features, per_view(self.backbone, local_crops)])
        logits = self.head(class_features, tokens.patch_tokens[masked.flatten(0, 1)])
        return StudentTokens(class_features, *logits)

    def teach(
        self,
        global_crops: Float[Tensor, "T B 3 H W"],
        masked: Bool[Tensor, "T B N"],
        attend: Bool[Tensor, "T B N"] | None = None,
    ) -> TeacherTokens:
        """The teacher's part: it sees the whole crops, and tells of those patches that are hidden from the student."""
        tokens = self._tokens(global_crops, attend)
        logits, mean = self.head.masked_and_mean(tokens.class_tokens[:, 0], tokens.patch_tokens, masked.flatten(0, 1))
        views = global_crops.shape[:2]
        return TeacherTokens(logits.class_logits.unflatten(0, views), logits.patch_logits, mean.unflatten(0, views))

    def _tokens(self, crops: Tensor, attend: Tensor | None, **kwargs: Any) -> Any:
        attend = None if attend is None else attend.flatten(0, 1)[:, None]  # (T B, one class token, N)
        return self.backbone.tokens(crops.flatten(0, 1), attend=attend, **kwargs)


def student_and_teacher(
    backbone: str | nn.Module,
    backbone_kwargs: dict[str, Any] | None,
    drop_path_rate: float,
    head: Callable[[int], nn.Module],
) -> tuple[TokenNetwork, TokenNetwork]:
    """Two networks with the same weights; the teacher has no stochastic depth and gets no gradients.

    Args:
        backbone: A plain ViT of timm by name, or such a module.
        backbone_kwargs: Further arguments of the timm model.
        drop_path_rate: Stochastic depth of the student.
        head: Made from the tokens' width, once for each.
    """
    kwargs = backbone_kwargs or {}
    backbones = [
        create_backbone(backbone, drop_path_rate=drop_path_rate, **kwargs),
        create_backbone(backbone, **kwargs),
    ]
    student, teacher = (TokenNetwork(each, head(embed_dim_of(each))) for each in backbones)
    teacher.load_state_dict(student.state_dict())
    return student, teacher.requires_grad_(False)


def check_crops(backbone: VisionTransformer, augment: Any) -> None:
    """Refuse masks made for patches of another size, and local crops that the patches do not tile.

    Args:
        backbone: The ViT.
        augment: Has `patch_size` and `crops`, a `MultiCropAugment`.

    Raises:
        ValueError: If they do not fit.
    """
    actual = backbone.patch_embed.patch_size
    if actual != (augment.patch_size, augment.patch_size):
        raise ValueError(
            f"`augment.patch_size` must be that of the backbone, {' x '.join(map(str, actual))} pixels, got"
            f" {augment.patch_size}."
        )
    if augment.crops.num_local:
        check_crop_size(backbone, augment.crops.local_size, "local_size")
