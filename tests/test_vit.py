"""The vision transformer: hidden tokens are skipped, and that changes nothing."""

import pytest
import torch
from support import write_parquet, write_recipe
from torch.nn import functional as F

import certipatch as cp
from certipatch import evidence, model_check
from certipatch import views as vw
from certipatch.errors import InputError
from certipatch.models import ViT, ViTSettings, vit
from certipatch.models.vit import cut, from_timm, sizes_of, visible_tokens
from certipatch.views.render import null, render

SIZE = (8, 12)


def masks() -> vw.PixelSets:
    """Everything but a rectangle, anything random, nothing, and everything."""
    generator = torch.Generator().manual_seed(0)
    sets = torch.ones(6, *SIZE, dtype=torch.bool)
    sets[0, 2:5, 3:9] = False
    sets[1, :, 4:8] = False
    sets[2] = torch.rand(SIZE, generator=generator) < 0.04
    sets[3] = torch.rand(SIZE, generator=generator) < 0.2
    sets[4] = False
    return vw.PixelSets(sets)


VIEWS = [vw.Columns(4, 4), vw.Columns(3), vw.Columns(4, 3, wrap=False), vw.Rows(2, 2), vw.Blocks(4, 2), vw.Cross(4, 2),
         vw.Columns(2, count=2), masks()]  # fmt: skip


def network(patch_size: int = 4, channels: int = 2, **sizes: int) -> ViT:
    """A small ViT in float64 whose every parameter matters."""
    generator = torch.Generator().manual_seed(1)
    sizes = {"embed_dim": 8, "depth": 2, "num_heads": 2} | sizes
    found = ViT(None, channels, 3, SIZE, patch_size=patch_size, **sizes).double().eval()
    for tensor in found.parameters():
        tensor.data += 0.3 * torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
    return found


def pictures(count: int = 2, channels: int = 2) -> torch.Tensor:
    return torch.rand(count, channels, *SIZE, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


@pytest.mark.parametrize("patch", [2, 4])
@pytest.mark.parametrize("views", VIEWS, ids=lambda v: type(v).__name__)
def test_skipping_tokens_equals_masked_attention_over_all_of_them(views, patch):
    model, images = network(patch), pictures()
    rendered = render("null", images, views, torch.arange(views.number(SIZE))).flatten(0, 1)
    skipped = model(rendered)
    model.skip_hidden = False
    dense = model(rendered)
    torch.testing.assert_close(skipped, dense, rtol=1e-11, atol=1e-11)
    assert dense.unflatten(0, (2, -1)).std(1).min() > 1e-3  # views differ


@pytest.mark.slow
@pytest.mark.parametrize("views", VIEWS, ids=lambda v: type(v).__name__)
def test_the_model_check_passes_and_gradients_stay_within_the_view(views):
    model = network()
    model_check.check_model(model, views, pictures())
    visible = views.visible(SIZE)
    for v in range(0, len(visible), 3):
        images = pictures(1).requires_grad_()
        answer = model(render("null", images, views, torch.tensor([v])).flatten(0, 1))
        (gradient,) = torch.autograd.grad(answer.square().sum(), images, allow_unused=True)
        if gradient is not None:
            assert (gradient[:, :, ~visible[v]] == 0).all()
            if visible[v].any():
                assert (gradient[:, :, visible[v]] != 0).double().mean() > 0.9


def test_only_visible_tokens_are_computed():
    model, images = network(), pictures(3)
    computed = []
    model.blocks[0].register_forward_hook(lambda _, inputs, output: computed.append(output.shape[0] * output.shape[1]))
    aligned = vw.Columns(4, 4)  # one column of two tokens, and the first token
    evidence.logits(model, aligned, images)  # once, to find how many rows a pass has
    computed.clear()
    assert len(evidence.logits(model, aligned, images).flatten(0, 1)) == 9
    assert set(computed) == {vit.ROWS * (2 + 1)}
    computed.clear()
    evidence.logits(model, vw.Columns(4, 2), images)  # every second band lies across two columns of tokens
    assert set(computed) == {vit.ROWS * (2 + 1), vit.ROWS * (4 + 1)}  # views of as many tokens share passes
    with torch.enable_grad():
        computed.clear()
        rendered = render("null", images, aligned, torch.arange(3)).flatten(0, 1)
        model(rendered)
        assert computed == [9 * (2 + 1)]
    computed.clear()
    assert model(images).shape == (3, 3)
    assert computed == [3 * 7]


def test_whole_pictures_are_views_that_show_everything():
    model, images = network(), pictures()
    whole = torch.ones(1, *SIZE, dtype=torch.bool)
    torch.testing.assert_close(model(images), model(null(images, whole)[:, 0]), rtol=0, atol=0)
    assert visible_tokens(null(torch.zeros_like(images), whole)[:, 0], 4).all()  # black is not hidden
    pieces = cut(images, 4)
    assert torch.equal(pieces[1, 4].view(2, 4, 4), images[1, :, 4:8, 4:8])


def timm_weights(dim: int, depth: int, patch: int, tokens: int, classes: int) -> dict[str, torch.Tensor]:
    """Random weights under the names of a timm ViT."""
    generator = torch.Generator().manual_seed(3)
    shapes = {"cls_token": (1, 1, dim), "pos_embed": (1, tokens + 1, dim), "patch_embed.proj.weight": (dim, 3, patch, patch),
              "patch_embed.proj.bias": (dim,), "norm.weight": (dim,), "norm.bias": (dim,), "head.weight": (classes, dim),
              "head.bias": (classes,)}  # fmt: skip
    for n in range(depth):
        for name, rows, columns in (("attn.qkv", 3 * dim, dim), ("attn.proj", dim, dim), ("mlp.fc1", 4 * dim, dim),
                                    ("mlp.fc2", dim, 4 * dim), ("norm1", dim, None), ("norm2", dim, None)):  # fmt: skip
            shapes[f"blocks.{n}.{name}.weight"] = (rows,) if columns is None else (rows, columns)
            shapes[f"blocks.{n}.{name}.bias"] = (rows,)
    return {name: torch.randn(shape, generator=generator, dtype=torch.float64) / 2 for name, shape in shapes.items()}


def timm_forward(w: dict[str, torch.Tensor], images: torch.Tensor, patch: int, depth: int, heads: int) -> torch.Tensor:
    """A plain ViT as its paper says, one head at a time, from weights under timm's names."""
    x = F.conv2d((images - 0.5) / 0.5, w["patch_embed.proj.weight"], w["patch_embed.proj.bias"], stride=patch)
    x = torch.cat([w["cls_token"].expand(len(x), -1, -1), x.flatten(2).mT], 1) + w["pos_embed"]
    dim = x.shape[2]

    def linear(name: str, values: torch.Tensor) -> torch.Tensor:
        return values @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def norm(name: str, values: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(values, (dim,), w[f"{name}.weight"], w[f"{name}.bias"], 1e-6)

    for n in range(depth):
        q, k, v = linear(f"blocks.{n}.attn.qkv", norm(f"blocks.{n}.norm1", x)).split(dim, 2)
        heads_out = []
        for part in torch.arange(dim).chunk(heads):
            weight = (q[..., part] @ k[..., part].mT / len(part) ** 0.5).softmax(-1)
            heads_out.append(weight @ v[..., part])
        x = x + linear(f"blocks.{n}.attn.proj", torch.cat(heads_out, 2))
        x = x + linear(f"blocks.{n}.mlp.fc2", F.gelu(linear(f"blocks.{n}.mlp.fc1", norm(f"blocks.{n}.norm2", x))))
    return linear("head", norm("norm", x[:, 0]))


def test_timm_weights_give_a_plain_vit():
    weights = timm_weights(8, 2, 4, 6, 5)
    ours = from_timm(weights)
    model = ViT(None, 3, 5, SIZE, num_heads=2, **sizes_of(ours)).double().eval()
    model.load_state_dict(ours)
    images = pictures(3, channels=3)
    torch.testing.assert_close(model(images), timm_forward(weights, images, 4, 2, 2), rtol=1e-9, atol=1e-9)
    hidden = torch.zeros(1, *SIZE, dtype=torch.bool)
    hidden[0, :, :6] = True  # hidden pixels of a shown token weigh as much as mean ones
    filled = torch.where(hidden | (torch.arange(12) >= 8), images, 0.5)
    seen = null(images, hidden)[:, 0]
    torch.testing.assert_close(
        model.embed(cut(seen, 4))[:, 1], model.embed(cut(null(filled, torch.ones_like(hidden))[:, 0], 4))[:, 1]
    )
    for change, message in ((lambda w: w.pop("cls_token"), "cls_token is missing"),
                            (lambda w: w.update(reg_token=torch.zeros(1)), "reg_token is unknown"),
                            (lambda w: w.update({"blocks.1.ls1.gamma": torch.zeros(8)}), "ls1.gamma is unknown")):  # fmt: skip
        bad = dict(weights)
        change(bad)
        with pytest.raises(InputError, match=message):
            from_timm(bad)
    with pytest.raises(InputError, match="3 channels"):
        from_timm(weights, mean=(0.5,))


def test_timm_itself():
    timm = pytest.importorskip("timm", reason="needs timm, which needs torchvision")
    theirs = timm.create_model("vit_tiny_patch16_224", pretrained=False, num_classes=7).eval()
    ours = from_timm(theirs.state_dict())
    model = ViT(None, 3, 7, (224, 224), num_heads=3, **sizes_of(ours)).eval()
    model.load_state_dict(ours)
    images = torch.rand(1, 3, 224, 224)
    torch.testing.assert_close(model(images), theirs((images - 0.5) / 0.5), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_recipes_train_it_and_the_defense_loads_and_certifies(tmp_path):
    from certipatch.training.recipe import read
    from certipatch.training.train import train

    data = write_parquet(tmp_path / "data")
    changes = {
        "views": {"name": "columns", "width": 4, "stride": 2},
        "model": {"name": "vit", "patch_size": 2, "embed_dim": 16, "depth": 2, "num_heads": 2},
        "objective": {"views_per_step": 3},
        "epochs": 15,
        "learning_rate": 0.01,
    }
    recipe = read(write_recipe(tmp_path / "recipe.yaml", **changes), [f"data={data}"])
    train(recipe, tmp_path / "model")
    defense = cp.load(str(tmp_path / "model"))
    pictures = cp.data.load(str(data), "test")
    found = defense.certify(pictures.images(range(40)), cp.PatchThreat(1))
    right = found.label == torch.from_numpy(pictures.labels)
    assert right.double().mean() > 0.8
    assert (right & found.certified).any()
    assert cp.testing.check_defense(defense, pictures.images(range(4)), cp.PatchThreat(2), trials=4).attacks > 0


def test_what_does_not_fit_is_refused():
    with pytest.raises(InputError, match="do not fill 8x12"):
        ViT(None, 1, 2, SIZE, patch_size=5)
    with pytest.raises(InputError, match="too many for 4096x4096"):
        ViT(None, 1, 2, (4096, 4096), patch_size=1)
    with pytest.raises(InputError, match="cannot share"):
        ViT(None, 1, 2, SIZE, embed_dim=10, num_heads=4)
    with pytest.raises(InputError, match="not \\(3, 8, 12\\)"):
        network()(torch.rand(1, 3, *SIZE, dtype=torch.float64))
    with pytest.raises(ValueError, match="validation error"):
        ViTSettings(embed_dim=4096)
    with pytest.raises(
        ValueError, match="the vit network has no 'widths'; it has name, patch_size, embed_dim, depth, num_heads"
    ):
        ViTSettings(**{"widths": (4,)})
