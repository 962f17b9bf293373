"""Several networks that answer together (Lakshminarayanan et al. 2017, of logits): errors that they do not share cancel."""

from collections.abc import Sequence

from torch import nn

from certipatch.errors import InputError


class Ensemble(nn.Module):
    """The mean of the logits of networks that read the same, as separately trained ones (start: one model for each).

    Args:
        parts: the networks; all read the same ``encoding``, and masks of the same ``fill``.

    ``forward`` maps what they read (N, C, H, W) to logits (N, K). Errors: InputError where they read something else.
    """

    def __init__(self, parts: Sequence[nn.Module]):
        super().__init__()
        read = {(getattr(part, "encoding", "null"), getattr(part, "fill", 0.5)) for part in parts}
        if len(read) > 1:
            raise InputError("the members of an ensemble must read pictures in the same way, with masks of one fill")
        ((self.encoding, self.fill),) = read
        self.parts = nn.ModuleList(parts)

    def forward(self, views):  # torch.fx calls it with a proxy, which has no shape to check
        first, *others = self.parts
        answer = first(views)
        for part in others:
            answer = answer + part(views)
        return answer / len(self.parts)
