"""The optimiser, its schedule and the means of an epoch; and which files may know Ray Train."""

import ast
import math
import pickle
from pathlib import Path

import pytest
import torch
from torch import nn

import ask_ray
from ask_ray.config import ModelSettings, load
from ask_ray.data.batches import Batch
from ask_ray.models import registry
from ask_ray.training.step import Stepper, TrainingDiverged, make_optimizer, make_scheduler
from ask_ray.training.worker import Means


def factors(steps: int, warmup: int, count: int) -> list[float]:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = make_scheduler(optimizer, steps, warmup)
    made = []
    for _ in range(count):
        made.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return made


def test_the_rate_rises_in_a_line_then_falls_as_a_cosine_to_zero():
    made = factors(steps=20, warmup=4, count=26)
    assert made[:5] == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0])
    assert made[4:20] == pytest.approx([0.5 * (1 + math.cos(math.pi * n / 16)) for n in range(16)])
    assert made[12] == pytest.approx(0.5)
    assert made[20:] == pytest.approx([0.0] * 6)


@pytest.mark.parametrize(("steps", "warmup"), [(10, 0), (1, 0), (1, 1), (5, 5)])
def test_the_first_step_moves_and_the_rate_is_a_share(steps, warmup):
    made = factors(steps, warmup, 12)
    assert made[0] > 0
    assert all(0 <= rate <= 1 for rate in made)
    assert max(made) == 1


def test_only_matrices_decay():
    model = registry.build(ModelSettings(width=0.1, dim=8), 8000)
    next(iter(model.text.parameters())).requires_grad_(False)
    optimizer = make_optimizer(model, 0.01, 0.3)
    decays = {id(parameter): group["weight_decay"] for group in optimizer.param_groups for parameter in group["params"]}
    wanted = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert decays.keys() == {id(parameter) for parameter in wanted}
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(wanted)
    assert all(decays[id(parameter)] == (0.3 if parameter.ndim >= 2 else 0.0) for parameter in wanted)
    assert decays[id(model.log_temperature)] == 0.0
    assert isinstance(optimizer, torch.optim.AdamW)
    assert {group["lr"] for group in optimizer.param_groups} == {0.01}


def test_a_gradient_that_is_not_finite_is_refused_before_it_changes_a_weight():
    settings = load({"model": {"width": 0.1, "dim": 8}})
    torch.manual_seed(0)
    model = registry.build(settings.model, 8000)
    stepper = Stepper(model, model, settings, 10, torch.device("cpu"))
    words, mask = model.tokenise(["a dog", "a bell"])
    batch = Batch(torch.randn(2, 8000) * 0.1, torch.tensor([8000, 8000]), words, mask, torch.arange(2), torch.zeros(2).long())
    stepper.take(batch, None)
    with torch.no_grad():
        model.log_temperature.fill_(torch.nan)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(TrainingDiverged, match=r"gradient of step 1 .* training\.learning_rate"):
        stepper.take(batch, None)
    assert all(torch.equal(value.nan_to_num(), before[name].nan_to_num()) for name, value in model.state_dict().items())
    assert pickle.loads(pickle.dumps(TrainingDiverged.at(3, "the gradient"))).args == TrainingDiverged.at(3, "the gradient").args


def test_means_leave_out_what_is_not_finite_or_not_given_and_start_over():
    means = Means()
    for value in (1.0, torch.nan, 5.0, torch.inf):
        means.add(loss=torch.tensor(value), never=torch.tensor(torch.nan), absent=None)
    means.add(late=torch.tensor(7.0, dtype=torch.float64))
    assert means.take() == {"loss": 3.0, "late": 7.0}
    assert means.take() == {}
    means.add(loss=torch.tensor(2.0))
    assert means.take() == {"loss": 2.0}


def test_means_go_on_from_their_state():
    means, other = Means(), Means()
    for value in (1.0, torch.nan, 4.0):
        means.add(loss=torch.tensor(value))
    other.restore(means.state(), torch.device("cpu"))
    for made in (means, other):
        made.add(loss=torch.tensor(10.0))
    assert means.take() == other.take() == {"loss": 5.0}
    other.restore({}, torch.device("cpu"))
    assert other.take() == other.state() == {}


def test_means_keep_no_graph_and_add_in_double_precision():
    means = Means()
    for _ in range(3):
        means.add(loss=torch.tensor(16_777_217.0, dtype=torch.float64, requires_grad=True) * 1)
    assert not means.sums["loss"].requires_grad
    assert means.take() == {"loss": 16_777_217.0}


# --- who knows Ray Train ---

PACKAGE = Path(ask_ray.__file__).parent


def names_of(tree: ast.AST) -> set[str]:
    """Every module that a file imports, and every attribute chain that it reads, dotted."""
    made = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            made |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            made |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Attribute):
            made.add(ast.unparse(node))
    return made


def knows_ray_train(source: str) -> bool:
    return any(name == "ray.train" or name.startswith("ray.train.") for name in names_of(ast.parse(source)))


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import ray.train.torch", True),
        ("from ray import train", True),
        ("from ray.train import Result", True),
        ("import ray\nray.train.report({})", True),
        ("def f():\n    import ray.train as t", True),
        ("import ray\nray.get(1)", False),
        ("from ask_ray.training import trainer\ntrainer.train()", False),
    ],
)
def test_the_check_sees_every_way_to_ray_train(source, expected):
    assert knows_ray_train(source) == expected


def test_nothing_outside_training_knows_ray_train():
    knowing = {path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py") if knows_ray_train(path.read_text("utf-8"))}
    assert Path("training/worker.py") in knowing
    assert {path for path in knowing if path.parts[0] != "training"} == set()


def test_the_method_knows_neither_ray_nor_files():
    for path in (PACKAGE / "method").glob("*.py"):
        roots = {name.split(".")[0] for name in names_of(ast.parse(path.read_text("utf-8")))}
        assert not roots & {"ray", "faiss", "pyarrow", "mlflow", "pathlib", "os"}, path
