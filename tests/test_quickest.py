"""The fastest way to run a network: measured, the same answers, gradients as before, counted as given."""

import itertools

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import certipatch as cp
from certipatch import cli
from certipatch.models import ConvNet, quickest
from certipatch.plumbing.distributed import Workers
from certipatch.runs.evaluate import choose_engine

THREAT = cp.PatchThreat(3)
IMAGES = torch.rand(6, 3, 12, 12, generator=torch.Generator().manual_seed(0))


def defense(kind: type = cp.PatchCleanser):
    torch.manual_seed(0)
    return kind(ConvNet(None, 3, 4, (12, 12), (8, 16)).eval(), THREAT, masks=3)


@pytest.fixture
def later_is_faster(monkeypatch):
    """Every way that is tried seems faster than those before it."""
    falling = itertools.count(100.0, -1.0)
    monkeypatch.setattr(quickest, "_seconds", lambda run, pictures: 2.0 ** next(falling))
    monkeypatch.setattr(quickest, "MIN_WORKLOAD_SECONDS", 0.0)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [cp.PatchCleanser, cp.MinorityReports])
def test_a_quick_defense_answers_as_before(kind, later_is_faster):
    pytest.importorskip("onnxruntime")
    slow, quick = defense(kind), defense(kind)
    quick.select_backend(IMAGES[:1], 6)
    assert quick.model.fast_forward is not None
    assert "OnnxNetwork" in str(quick.model.fast_forward)
    assert len(list(quick.model.parameters())) == len(list(slow.model.parameters()))
    one, other = slow.certify(IMAGES, THREAT), quick.certify(IMAGES, THREAT)
    assert torch.equal(one.label, other.label)
    finite = torch.isfinite(one.margin) & torch.isfinite(other.margin)
    assert torch.allclose(one.margin[finite], other.margin[finite], atol=1e-4)
    picture = IMAGES[:2].clone().requires_grad_()
    quick.model(picture).sum().backward()
    assert picture.grad is not None
    assert picture.grad.abs().sum() > 0
    counts = []
    for one in (slow, quick):
        with FlopCounterMode(display=False) as counter, one.reference_backend():
            one.evidence(IMAGES[:1])
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0
    assert quick.model.fast_forward is not None


@pytest.mark.slow
def test_what_is_quick_is_forgotten_with_its_weights(later_is_faster):
    quick, other = defense(), defense()
    quick.select_backend(IMAGES[:1], 6)
    for weight in other.model.parameters():
        weight.data.add_(torch.randn_like(weight))
    quick.model.model.load_state_dict(other.model.model.state_dict())
    one, two = quick.certify(IMAGES, THREAT), other.certify(IMAGES, THREAT)
    assert torch.equal(one.label, two.label)
    assert torch.equal(one.margin, two.margin)


def test_without_onnx_channels_last_is_taken_where_it_is_faster(later_is_faster, monkeypatch):
    monkeypatch.setattr(quickest, "find_spec", lambda name: None)
    quick = defense()
    quick.select_backend(IMAGES[:1], 6)
    assert torch.allclose(quick.model.fast_forward(IMAGES), quick.model.model(IMAGES), atol=1e-4)
    assert "ConvNet" in str(quick.model.fast_forward)


@pytest.mark.slow
def test_what_onnx_cannot_hold_or_is_another_network_is_not_taken(later_is_faster, monkeypatch):
    class Odd(nn.Module):
        """Looks at its data to decide, as user code may."""

        def __init__(self):
            super().__init__()
            self.net = nn.Linear(432, 3)

        def forward(self, x):
            return self.net(x.flatten(1)) if x.mean() > 0.2 else self.net(x.flatten(1)).relu()

    monkeypatch.setattr(quickest, "_channels_last", lambda network, pictures: lambda x: network(x) + 1)
    assert quickest.fastest_backend(Odd().eval(), IMAGES, 10**6) == ("torch", None)


@pytest.mark.slow
def test_the_way_that_is_named_is_taken(monkeypatch):
    pytest.importorskip("onnxruntime")
    falling = itertools.count(1.0, 1.0)  # every way seems slower than those before it
    monkeypatch.setattr(quickest, "_seconds", lambda run, pictures: next(falling))
    quick = defense()
    for name in ("onnxruntime", "channels last", "torch"):
        assert quick.select_backend(IMAGES[:1], 6, name) == name
        assert (quick.model.fast_forward is None) == (name == "torch")
    monkeypatch.setattr(quickest, "find_spec", lambda name: None)
    assert quick.select_backend(IMAGES[:1], 6, "onnxruntime") == "torch"
    assert cp.IntervalBounds(quick.model.model).select_backend(IMAGES[:1], 6) is None


class Listed(list):
    """Pictures, as a run asks for them."""

    def images(self, indices):
        return IMAGES[list(indices)]


def test_a_run_keeps_to_the_way_that_it_began_with(tmp_path, monkeypatch):
    """A resumed run, and one that several processes share, have one kind of rounding."""
    pytest.importorskip("onnxruntime")
    found, asked = defense(), []
    true = type(found).select_backend
    monkeypatch.setattr(
        type(found), "select_backend", lambda self, *given: asked.append(given[2]) or true(self, *given)
    )
    crew = Workers()
    assert choose_engine(found, Listed(IMAGES), tmp_path, torch.device("cpu"), crew) == "torch"
    (tmp_path / "config.yaml").write_text("engine: channels last\ncommand: evaluate\n")
    assert choose_engine(found, Listed(IMAGES), tmp_path, torch.device("cpu"), crew) == "channels last"
    assert asked == [None, "channels last"]
    (tmp_path / "summary.json").write_text("{}")  # another worker may be done before this one asks
    assert choose_engine(found, Listed(IMAGES), tmp_path, torch.device("cpu"), crew) == "channels last"
    assert asked == [None, "channels last"]


def test_little_work_is_not_worth_it():
    quick = defense()
    assert quick.select_backend(IMAGES[:1], 1) == "torch"
    assert quick.model.fast_forward is None


@pytest.mark.slow
def test_a_run_with_an_engine_is_reported_again(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = [
        "certipatch",
        "evaluate",
        "--defense",
        "patchcleanser",
        "--model",
        "mnist-plain",
        "--data",
        "fashion-sample",
        "--patch",
    ]
    for command in (
        [*arguments, "5", "--set", "masks=2", "--limit", "3", "--out", "run"],
        ["certipatch", "report", "run"],
    ):
        monkeypatch.setattr("sys.argv", command)
        with pytest.raises(SystemExit) as ended:
            cli.main()
        assert not ended.value.code
    assert "engine: torch" in (tmp_path / "run" / "config.yaml").read_text()
