"""What is computed from whole sequences before they are divided: MTP's labels, and which tokens go to experts.

Shapes: B rows, S tokens of a sequence, M = 1 + MTP depth predictions of each token.
"""

import torch
import torch.nn.functional as F

from megatron_deepseek.device import send


def shifted_labels(labels_BS: torch.Tensor, weights_BS: torch.Tensor, mtp_depth: int,
                   documents_BS: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Return labels and their weights for the main prediction and each MTP depth, [B, M, S] each.

    Depth k predicts the label k places further on; the last k positions have none. The input token of depth k at
    position i is the label of depth k - 1 there; if it belongs to another document than token i (`documents_BS` given),
    that depth has no label.
    """
    labels, weights, shifted_BS = [labels_BS], [weights_BS], weights_BS
    for depth in range(1, mtp_depth + 1):
        labels.append(F.pad(labels[-1][:, 1:], (0, 1)))
        shifted_BS = F.pad(shifted_BS[:, 1:], (0, 1))
        stays_BS = 1 if documents_BS is None else send(_stays(documents_BS, depth), labels_BS.device)
        weights.append(shifted_BS * stays_BS)
    return torch.stack(labels, 1), torch.stack(weights, 1)


def routed_tokens(real_BS: torch.Tensor, mtp_depth: int, documents_BS: torch.Tensor | None = None) -> torch.Tensor:
    """Return which positions go to routed experts and count for their balance, [B, M, S] bool.

    For the main model these are all tokens that are `real_BS`, no padding, whether their label counts or not. For depth
    k they are those whose input, the token k places further on, exists, is real, and belongs to the same document: so
    not the last k positions. A token that is left out has no label, and comes after every token of its document that
    has one.
    """
    routed = [real_BS]
    for depth in range(1, mtp_depth + 1):
        ahead_BS = F.pad(real_BS[:, depth:], (0, min(depth, real_BS.shape[1])))
        both_BS = real_BS & ahead_BS
        routed.append(both_BS if documents_BS is None else both_BS & send(_stays(documents_BS, depth), real_BS.device))
    return torch.stack(routed, 1)


def _stays(documents_BS: torch.Tensor, depth: int) -> torch.Tensor:
    """Return whether the token `depth` places further on is in the same document; documents are known to the host."""
    return documents_BS == F.pad(documents_BS[:, depth:], (0, min(depth, documents_BS.shape[1])), value=-1)
