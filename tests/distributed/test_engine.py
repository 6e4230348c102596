"""One golden trajectory: every ZeRO stage, world size, accumulation and method follows plain PyTorch.

And one golden checkpoint: what one stage and world size saved, every other one continues.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import trajectory
from diffusers import Flux2Transformer2DModel
from pool import launch, measured_loading

from flux2_ds.checkpoint import manager as checkpoint
from flux2_ds.config.parse import shipped_directory
from flux2_ds.config.plan import read_deepspeed

STEPS = 4
TOLERANCE = 1e-5  # relative, on every loss; measured: 1e-7
CONFIGS = sorted(path.stem for path in shipped_directory("ds_configs").glob("*.json"))
CONFIGS.remove("zero3_hpz")  # which needs four processes to differ from zero3
# What plan.py adds for a full fine-tune in bf16.
BF16 = {
    "bf16": {"enabled": True, "check_grad_overflow": True},
    "data_types": {"grad_accum_dtype": "fp32"},
}
pytestmark = pytest.mark.dist


def configs() -> dict[str, dict[str, Any]]:
    """Every shipped config; offload at stage 3 needs a C++ compiler for DeepSpeed's CPU Adam."""
    found = {name: read_deepspeed(name) for name in CONFIGS}
    for name in (name for name in CONFIGS if name.startswith("zero3")):
        # The shipped threshold would keep every parameter of so small a model gathered.
        found[name]["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    if shutil.which("c++") is None:
        found = {name: value for name, value in found.items() if "zero3_offload" not in name}
    return found


@pytest.fixture(scope="module")
def references() -> dict[str, Any]:
    return {method: trajectory.reference(method, STEPS) for method in ("lora", "dora", "full")}


def assert_follows(losses: list[float], expected: list[float], what: str) -> None:
    assert losses == pytest.approx(expected, rel=TOLERANCE), what


def test_the_reference_learns(references: dict[str, Any]) -> None:
    """A trajectory that updates nothing must not pass for one that does."""
    model = trajectory.build("lora")
    frozen = [
        trajectory.loss_of(lambda **x: model(**x, return_dict=False)[0], trajectory.global_batch(s))
        for s in range(STEPS)
    ]
    moved = max(abs(a.item() - b) / b for a, b in zip(frozen, references["lora"][0], strict=True))
    assert moved > 1000 * TOLERANCE


@pytest.mark.parametrize("world_size", [1, 2])
def test_every_config_follows_plain_pytorch(
    world_size: int, references: dict[str, Any], tmp_path: Path
) -> None:
    cases = [  # in two micro-batches
        {"method": method, "name": name, "deepspeed": config, "micro": 2 // world_size, "steps": STEPS}
        for name, config in configs().items()
        for method in ("lora", "full")
    ]  # fmt: skip
    for case in [case for case in cases if case["name"] in ("zero2", "zero3")]:
        if case["method"] == "full":
            cases.append({**case, "micro": 4 // world_size})
            blocks = {"checkpointed": 3, "compiled": False, "offload": case["name"] == "zero3"}
            cases.append({**case, "blocks": blocks})
        else:
            cases.append({**case, "method": "dora", "previewed": True})
    full = next(case for case in cases if (case["method"], case["name"]) == ("full", "zero2"))
    zero = full["deepspeed"]["zero_optimization"]
    for own in {"reduce_scatter": True}, {"contiguous_gradients": False}, {"overlap_comm": False}:
        cases.append({**full, "deepspeed": {"zero_optimization": zero | own}, "own": own})
    cases += [
        case | {"group": 20_000}
        for case in cases
        if case["method"] == "full" and case["name"] in ("zero1", "zero2_offload")
    ]
    cases += [
        case | {"base": True, "steps": 2}
        for case in cases
        if case["method"] != "full" and case["name"] in ("zero0", "zero2", "zero3", "zero3_offload")
    ]
    cases = [case | {"norms": references[case["method"]][2]} for case in cases]
    for case, losses in zip(cases, launch(world_size, cases, tmp_path), strict=True):
        described = {key: value for key, value in case.items() if key not in ("deepspeed", "norms")}
        expected = references[case["method"]][0][: case["steps"]]
        assert_follows(losses, expected, f"{world_size} processes, {described}")


def test_fp8_products_are_the_same_at_every_stage(
    references: dict[str, Any], tmp_path: Path
) -> None:
    """The first loss to the last digits, the next ones to 1 %: weights that differ by 1e-7 give losses that differ by
    0.01 % after two steps of plain PyTorch, too, because values fall to the other of two codes."""
    cases = [
        {"method": "full", "compute": "fp8", "deepspeed": configs()[name], "micro": 1, "steps": 3}
        for name in ("zero0", "zero2", "zero3")
    ]
    first, *others = launch(2, cases, tmp_path)
    assert first == pytest.approx(references["full"][0][:3], rel=3e-2)
    assert abs(first[0] / references["full"][0][0] - 1) > 1e-3  # it is in fp8
    for other in others:
        assert other[0] == pytest.approx(first[0], rel=1e-6)
        assert other == pytest.approx(first, rel=1e-2)


def test_bf16_stays_near(references: dict[str, Any], tmp_path: Path) -> None:
    """In bf16 every stage is as near to fp32 as bf16's 8 bits allow, and nearer to the others.

    For as long as rounding has not grown: with clipping far below the norms the losses then part.
    """
    cases = [
        {"method": method, "deepspeed": configs()[name] | extra, "dtype": "bfloat16", "micro": 1,
         "name": name, "steps": STEPS}
        for method, extra, names in (
            ("full", BF16, ("zero1", "zero2", "zero3")), ("lora", {}, ("zero0", "zero2", "zero3"))
        )
        for name in names
    ]  # fmt: skip
    # DeepSpeed reduces gradients in bf16 unless it is told otherwise.
    fp32 = {"communication_data_type": "fp32"}
    cases += [case | {"deepspeed": case["deepspeed"] | fp32} for case in cases[1:3]]
    found: dict[str, list[list[float]]] = {"full": [], "lora": []}
    all_losses = launch(2, cases, tmp_path)
    assert all_losses[1] != all_losses[-2] and all_losses[2] != all_losses[-1]
    for case, losses in zip(cases, all_losses, strict=True):
        assert losses == pytest.approx(references[case["method"]][0], rel=2e-2), case
        found[case["method"]].append(losses)
    for first, *others in found.values():
        for other in others:
            assert other == pytest.approx(first, rel=5e-3)


def test_a_partitioned_model_follows_plain_pytorch(
    references: dict[str, Any], tmp_path: Path
) -> None:
    """Every process reads its own parts of a sharded checkpoint; shipped persistence threshold."""
    trajectory.base().save_pretrained(tmp_path / "transformer", max_shard_size="100KB")
    assert len(list(tmp_path.glob("transformer/*.safetensors"))) > 2
    config = read_deepspeed("zero3")
    kept_whole = config["zero_optimization"]["stage3_param_persistence_threshold"]
    assert kept_whole > 1000  # so that what persists is trained here, too
    cases = [
        {"method": method, "deepspeed": settings, "files": str(tmp_path), "micro": 1,
         "steps": STEPS}
        for method, settings in (
            ("lora", config), ("dora", config), ("full", config), ("full", configs()["zero3"])
        )
    ]  # fmt: skip
    if shutil.which("c++") is not None:  # for DeepSpeed's CPU Adam
        blocks = {"checkpointed": 2, "compiled": False}
        cases.append(cases[0] | {"deepspeed": read_deepspeed("zero3_offload"), "blocks": blocks})
    # What ZeRO-3 keeps gathered must not keep the values from before a resume either.
    half = STEPS // 2
    cases[0] |= {"save": str(tmp_path / "half"), "save_at": half}
    cases.append(
        {**cases[0], "load": cases[0]["save"], "load_at": half, "save": str(tmp_path / "on")}
    )
    for case, losses in zip(cases, launch(2, cases, tmp_path), strict=True):
        assert_follows(losses, references[case["method"]][0][case.get("load_at", 0) :], str(case))


def test_hpz_in_groups_of_two_follows_zero3_and_each_continues_the_other(
    references: dict[str, Any], tmp_path: Path
) -> None:
    """Four processes, loaded as train.py does; a checkpoint of either continues in the other."""
    trajectory.base().save_pretrained(tmp_path / "transformer")
    zero3 = configs()["zero3"]
    hpz = {"zero_optimization": zero3["zero_optimization"] | {"zero_hpz_partition_size": 2}}
    cases = [
        {"method": method, "deepspeed": config, "files": str(tmp_path), "micro": 1,
         "steps": STEPS, "save": str(tmp_path / f"{method}-{name}"), "save_at": STEPS // 2}
        for method in ("full", "lora")
        for name, config in (("hpz", hpz), ("zero3", zero3))
    ]  # fmt: skip
    cases += [
        case
        | {"deepspeed": case["deepspeed"] | BF16, "save": f"{case['save']}-bf16"}
        | {"dtype": "bfloat16"}
        for case in cases[:2]
    ]
    for case, other in zip(cases[:2], (zero3, hpz), strict=True):
        half = {"load": case["save"], "load_at": STEPS // 2, "save": f"{case['save']}-on"}
        cases.append(case | half | {"deepspeed": other})
    losses = launch(4, cases, tmp_path)
    for case, found in zip(cases, losses, strict=True):
        expected = references[case["method"]][0][case.get("load_at", 0) :]
        assert found == pytest.approx(expected, rel=2e-2 if "dtype" in case else TOLERANCE), case
    for one, two in ((0, 1), (2, 3), (4, 5)):
        assert losses[one] == losses[two]
        saved = [checkpoint.newest(Path(cases[n]["save"]))[0] for n in (one, two)]
        assert saved[0].kinds() == saved[1].kinds()
        for kind in saved[0].kinds():
            tensors, others = (each.tensors(kind) for each in saved)
            assert tensors.keys() == others.keys()
            for name, value in tensors.items():
                assert torch.equal(value, others[name]), (cases[one]["method"], kind, name)
    # To the last bit, whichever goes on.
    assert losses[6] == losses[7] == losses[0][STEPS // 2 :]


def test_no_process_holds_more_than_its_part_and_one_tensor(tmp_path: Path) -> None:
    """Peak resident memory of two processes that load 261 MB of weights from sharded files."""
    model = Flux2Transformer2DModel(
        num_layers=2,
        num_single_layers=4,
        num_attention_heads=8,
        attention_head_dim=128,
        joint_attention_dim=512,
    ).bfloat16()
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data.random_(generator=generator)
    model.save_pretrained(tmp_path / "transformer", max_shard_size="100MB")
    sizes = [p.numel() * p.element_size() for p in model.parameters()]
    whole, largest = sum(sizes), max(sizes)
    assert len(list(tmp_path.glob("transformer/*.safetensors"))) > 2
    measured = measured_loading(2, tmp_path)
    for results in measured:
        for how, result in results.items():
            assert result["wrong"] == [], how
            # A tensor is held three times at most: built whole, its rows in the file, its rows read.
            # What the process allocates beside them, threads' arenas above all, varies by some MB.
            assert result["used"] < result["own"] + 3 * largest + 24e6, (how, result)
        assert results["partitioned"]["own"] == pytest.approx(whole / 2, rel=1e-3)
        assert results["partitioned"]["own"] + 3 * largest + 24e6 < 0.9 * whole
    for placement in ("host", "sharded"):  # each block is read once
        first, second = (results[placement] for results in measured)
        assert first["own"] == second["own"] == (whole + first["shared"]) / 2


def test_a_checkpoint_continues_on_any_stage_and_world_size(
    references: dict[str, Any], tmp_path: Path
) -> None:
    """Two processes save at stages 2 and 3; all configs continue on one, some on two processes."""
    half = STEPS // 2
    origins = [
        {"method": method, "deepspeed": configs()[name], "micro": 1, "steps": half,
         "save": str(tmp_path / f"{method}-{name}")}
        for method in ("lora", "full")
        for name in ("zero2", "zero3")
    ]  # fmt: skip
    launch(2, origins, tmp_path)

    def continued(method: str, name: str, world_size: int) -> list[dict[str, Any]]:
        return [
            {"method": method, "deepspeed": configs()[name], "micro": 1, "steps": STEPS,
             "load": origin["save"], "save": f"{origin['save']}-{name}-{world_size}"}
            for origin in origins
            if origin["method"] == method
        ]  # fmt: skip

    work = {
        1: [case for name in configs() for case in continued("full", name, 1)],
        2: [case for name in ("zero0", "zero2", "zero3") for case in continued("lora", name, 2)],
        4: [*continued("full", "zero3", 4)[:1], *continued("lora", "zero2", 4)[1:]],
    }
    for world_size, cases in work.items():
        for case, losses in zip(cases, launch(world_size, cases, tmp_path), strict=True):
            expected_losses, expected_weights, _ = references[case["method"]]
            assert_follows(losses, expected_losses[half:], case["save"])
            found, _ = checkpoint.newest(Path(case["save"]))
            assert found is not None
            for name, value in found.tensors("weights").items():
                # Adam divides by the root of tiny second moments, so single elements differ more
                # than the tensor does when the order of a sum changes.
                error = (value - expected_weights[name]).norm() / expected_weights[name].norm()
                assert error < 1e-4, f"{case['save']}: {name} differs by {error:.1e}"


def test_a_rehearsal_leaves_no_trace(tmp_path: Path) -> None:
    """The same losses to the last bit, with accumulation."""
    kinds = [("lora", name) for name in ("zero0", "zero2", "zero3")]
    kinds += [("full", name) for name in ("zero1", "zero2_offload")]
    cases = [
        {"method": method, "name": name, "deepspeed": configs()[name], "micro": 1, "steps": 3}
        for method, name in kinds
    ]
    losses = launch(2, [*cases, *({**case, "rehearse": True} for case in cases)], tmp_path)
    for case, plain, rehearsed in zip(cases, losses, losses[len(cases) :], strict=False):
        assert rehearsed == plain, f"{case['method']} {case['name']}"


def test_replayed_passes_change_nothing(tmp_path: Path) -> None:
    """The same losses to the last bit, with and without accumulation."""
    names = ["zero0", "zero1", "zero2", "zero2_offload"]
    cases = [
        {"method": method, "name": name, "deepspeed": configs()[name], "micro": micro, "steps": 4}
        for method, name, micro in (
            *(("lora", name, 1) for name in names),
            *(("lora", name, 2) for name in names),
            ("dora", "zero0", 1),
        )
    ]
    losses = launch(2, [*cases, *({**case, "replayed": True} for case in cases)], tmp_path)
    for case, plain, replayed in zip(cases, losses, losses[len(cases) :], strict=False):
        assert replayed == plain, f"{case['method']} {case['name']} {case['micro']}"


EXACT = [
    ("lora", "zero0", {}),
    ("lora", "zero2", {}),
    ("lora", "zero3", {"ema_decay": 0.9}),
    ("full", "zero1 bf16", {}),
    ("full", "zero2 bf16", {"ema_decay": 0.9}),
    ("full", "zero3 bf16 fp8", {"ema_decay": 0.9}),
    ("lora", "zero0", {"name": "adafactor"}),
    ("dora", "zero0", {"name": "prodigy"}),
    ("lora", "zero0", {"name": "muon"}),
    ("lora", "zero0", {"name": "adamw8bit"}),
    ("full", "zero2_offload bf16", {"ema_decay": 0.9}),
    ("full", "zero2 bf16", {"name": "adamw8bit"}),
    ("full", "zero3 bf16", {"name": "adamw8bit_paged"}),
]


def test_resuming_on_the_same_configuration_is_exact(tmp_path: Path) -> None:
    """N + N steps are 2N steps, to the last bit: losses, weights and the optimizer's state."""
    cases = []
    for number, (method, name, optimizer) in enumerate(EXACT):
        config, _, low = name.partition(" ")
        settings = configs()[config] | (BF16 if low else {})
        common = {"method": method, "deepspeed": settings, "micro": 2, "optimizer": optimizer,
                  "compute": "fp8" if "fp8" in low else "precision"}  # fmt: skip
        whole, half = str(tmp_path / f"w{number}"), STEPS // 2
        cases += [
            {**common, "steps": STEPS, "save": whole, "save_at": half},
            {**common, "steps": STEPS, "load": whole, "load_at": half, "save": str(tmp_path / f"r{number}")},
        ]  # fmt: skip
    results = launch(1, cases, tmp_path)
    for number, what in enumerate(EXACT):
        uninterrupted, resumed = results[2 * number : 2 * number + 2]
        assert resumed == uninterrupted[STEPS // 2 :], what
        one, _ = checkpoint.newest(tmp_path / f"w{number}")
        two, _ = checkpoint.newest(tmp_path / f"r{number}")
        assert one is not None and two is not None
        assert one.state() == two.state(), what  # with the sha256 of each file
        assert one.state()["updates"] == STEPS
        # Weights, and what the optimizer keeps: Muon has its momentum only.
        assert len(one.kinds()) >= (2 if what[2].get("name") == "muon" else 3)


def test_optimizers_follow_themselves_without_deepspeed(
    references: dict[str, Any], tmp_path: Path
) -> None:
    """Two processes against plain PyTorch; 8-bit state, which ZeRO cuts into other blocks, loosely."""
    half = STEPS // 2
    eight_bit = {"name": "adamw8bit", "ema_decay": 0.9}
    common = {"method": "lora", "micro": 1}
    cases = [
        *(
            {**common, "deepspeed": configs()["zero0"], "optimizer": {"name": name}, "steps": STEPS}
            for name in ("adafactor", "prodigy", "muon", "adamw8bit")
        ),
        {**common, "deepspeed": configs()["zero2"], "optimizer": eight_bit, "steps": half,
         "save": str(tmp_path / "half")},
        {**common, "deepspeed": configs()["zero3"], "optimizer": eight_bit, "steps": STEPS,
         "load": str(tmp_path / "half"), "save": str(tmp_path / "whole")},
    ]  # fmt: skip
    *without_zero, first_half, second_half = launch(2, cases, tmp_path)
    for case, losses in zip(cases, without_zero, strict=False):
        expected, *_ = trajectory.reference("lora", STEPS, **case["optimizer"])
        # What lies on the edge of two 8-bit codes falls to either side; Muon iterates in bf16.
        rounds = case["optimizer"]["name"] in ("adamw8bit", "muon")
        tolerance = 1e-4 if rounds else TOLERANCE
        assert losses == pytest.approx(expected, rel=tolerance), case["optimizer"]
        assert losses != pytest.approx(references["lora"][0], rel=TOLERANCE)  # it is another one
    expected, *_ = references["lora"]
    assert first_half + second_half == pytest.approx(expected, rel=5e-3)
    found, _ = checkpoint.newest(tmp_path / "whole")
    assert found is not None
    averages = found.tensors("ema")
    for name, value in found.tensors("weights").items():
        start = trajectory.transformer.trainable(trajectory.build("lora"))[name].detach()
        assert 0 < (averages[name] - start).norm() < (value - start).norm(), name


def test_a_step_that_is_not_finite_is_as_if_it_had_never_been(
    references: dict[str, Any], tmp_path: Path
) -> None:
    """One process of two has an infinite loss: no stage updates, and all go on without a trace."""
    bad = 1
    kinds: list[Any] = [("lora", name, {}) for name in ("zero0", "zero1", "zero2", "zero3")]
    kinds += [("full", "zero1", BF16), ("full", "zero2_offload", BF16)]
    offloaded = {"stage": 1, "offload_optimizer": {"device": "cpu"}}
    kinds += [("full", "zero0", BF16 | {"zero_optimization": offloaded})]
    cases = [
        {"method": method, "deepspeed": configs()[name] | extra, "micro": 1, "poison": bad,
         "optimizer": {"ema_decay": 0.9}, "steps": STEPS, "save": str(tmp_path / f"{number}-{name}")}
        for number, (method, name, extra) in enumerate(kinds)
    ]  # fmt: skip
    cases.append({**cases[0], "fused": True, "save": str(tmp_path / "fused")})
    shipped = {"deepspeed": read_deepspeed("zero3"), "save": str(tmp_path / "kept-whole")}
    cases.append({**cases[0], **shipped})
    expected, *_ = trajectory.reference("lora", STEPS, skipped=bad)
    assert expected != pytest.approx(references["lora"][0], rel=TOLERANCE)
    for case, losses in zip(cases, launch(2, cases, tmp_path), strict=True):
        if case["method"] == "lora":
            assert_follows(losses, expected, case["save"])
        found, _ = checkpoint.newest(Path(case["save"]))
        assert found is not None
        assert found.state()["updates"] == STEPS - 1, case["save"]
        for kind in found.kinds():
            for name, value in found.tensors(kind).items():
                assert value.isfinite().all(), f"{case['save']}: {kind} of {name}"


def test_a_checkpoint_before_the_first_update_continues(tmp_path: Path) -> None:
    """The first step is skipped and saved; the optimizer has no state yet."""
    kinds: list[Any] = [("lora", name, {}, "adamw") for name in ("zero0", "zero2", "zero3")]
    kinds += [("full", name, BF16, "adamw") for name in ("zero1", "zero3")]
    kinds += [("lora", "zero0", {}, name) for name in ("muon", "prodigy")]
    kinds += [("lora", "zero3", {}, "adamw8bit")]
    kinds += [("full", "zero2_offload", BF16, "adamw")]
    common = {"micro": 2, "poison": 0, "steps": 3}
    cases: list[dict[str, Any]] = []
    for number, (method, name, extra, optimizer) in enumerate(kinds):
        root = str(tmp_path / str(number))
        case = {**common, "method": method, "deepspeed": configs()[name] | extra,
                "optimizer": {"name": optimizer}, "name": name}  # fmt: skip
        cases += [case | {"save": root, "save_at": 1}, case | {"load": root, "load_at": 1}]
    results = launch(2, cases, tmp_path)
    for number, kind in enumerate(kinds):
        uninterrupted, resumed = results[2 * number : 2 * number + 2]
        assert resumed == uninterrupted[1:], kind
        found = checkpoint.find(tmp_path / str(number))[0]
        assert (found.state()["updates"], found.kinds()) == (0, ["weights"]), kind


def test_an_ema_that_is_switched_on_late_starts_from_the_weights(tmp_path: Path) -> None:
    cases = []
    for name in ("zero0", "zero2", "zero3"):
        common = {
            "method": "lora",
            "deepspeed": configs()[name],
            "micro": 2,
            "save": str(tmp_path / name),
        }
        late = common | {"optimizer": {"ema_decay": 0.15}, "load": common["save"]}
        cases += [common | {"steps": 2}, late | {"steps": 4, "save_at": 3}]
    launch(2, cases, tmp_path)
    for name in ("zero0", "zero2", "zero3"):
        found = checkpoint.find(tmp_path / name)
        start, *weights = [one.tensors("weights") for one in found]
        averages = [one.tensors("ema") for one in found[1:]]
        assert len(averages) == 2
        for parameter, value in start.items():
            ema = value
            for n, (now, average) in enumerate(zip(weights, averages, strict=True), start=1):
                ema = ema.lerp(now[parameter], 1 - min(0.15, (1 + n) / (10 + n)))
                torch.testing.assert_close(average[parameter], ema)


def test_a_checkpoint_in_the_background_has_the_bytes_of_one_that_is_waited_for(
    tmp_path: Path,
) -> None:
    cases = []
    for number, (method, name, optimizer) in enumerate(
        [
            ("lora", "zero2", {"ema_decay": 0.9}),
            ("full", "zero2 bf16", {"name": "adamw8bit"}),
            ("full", "zero3 bf16", {}),
        ]
    ):
        config, _, low = name.partition(" ")
        case = {"method": method, "deepspeed": configs()[config] | (BF16 if low else {}), "micro": 2,
                "optimizer": optimizer, "save": str(tmp_path / f"{number}-0"), "save_at": 2, "steps": 4}  # fmt: skip
        cases += [case, case | {"save": str(tmp_path / f"{number}-1"), "background": 2}]
    launch(2, cases, tmp_path)
    for number in range(3):
        for step in (2, 4):
            waited, beside = (
                {file.name: file.read_bytes() for file in folder.iterdir()}
                for folder in sorted(tmp_path.glob(f"{number}-?/step_0000000{step}"))
            )
            assert len(waited) > 3 and waited == beside


@pytest.mark.parametrize(
    "kill",
    [
        {"kill": [2, 1]},  # in the middle of a step
        {"kill_saving": [3, 1, "write_files"]},  # one part is written, the other process waits
        {"kill_saving": [3, 0, "finish"]},  # the checkpoint is complete, nobody knows
        {"kill_saving": [3, 1, "write_files"], "background": 3, "steps": 9},
    ],
)
def test_killing_a_process_loses_no_checkpoint(
    kill: dict[str, Any], references: dict[str, Any], tmp_path: Path
) -> None:
    root = tmp_path / "checkpoints"
    case = {"method": "full", "deepspeed": configs()["zero2"], "micro": 2, "save": str(root),
            "save_at": 1, "steps": 3}  # fmt: skip
    launch(2, [case | kill], tmp_path, killed=True)
    found, damaged = checkpoint.newest(root)
    assert found is not None
    assert (found.step, damaged) == (3 if "finish" in str(kill) else 1, {})
    (losses,) = launch(2, [case | {"load": str(root), "steps": STEPS}], tmp_path)
    assert_follows(losses, references["full"][0][found.step :], str(kill))
    assert not list(root.glob(".*"))
