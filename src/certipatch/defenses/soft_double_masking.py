"""Double masking for attacks: every mask alone, and with one second mask that is drawn anew at each step."""

import torch
from jaxtyping import Float
from torch import Generator, Tensor, nn

from certipatch import evidence as ev
from certipatch.rules.double_mask import double_mask_leads, number_of_masks
from certipatch.rules.soft import leads_of_each
from certipatch.views import Views
from certipatch.views.masks import pair_table
from certipatch.views.render import image_size


def sampled_pair_leads(
    model: nn.Module,
    pairs: Views,
    maps: Float[Tensor, "N C H W"],
    generator: Generator,
    unmasked: Float[Tensor, "N K"] | None = None,
) -> Float[Tensor, "N K"]:
    """Leads under double masking of images, or of the maps that a network reads; ``unmasked`` are those in the
    unmasked image."""
    number = number_of_masks(pairs.number(image_size(maps)))
    table, every = pair_table(number), torch.arange(number)
    second = (every + torch.randint(1, max(2, number), (number,), generator=generator)) % number
    index = torch.cat([table[every, every], table[every, second]])
    logits = ev.differentiable_logits(model, pairs, maps, index).float()
    alone, paired = leads_of_each(logits).split(number, 1)
    return double_mask_leads(alone, paired, unmasked)
