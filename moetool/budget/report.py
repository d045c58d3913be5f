"""A plan as one document: everything that the page, the HTML file and `--json` show is in it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from moetool.budget import law
from moetool.budget.commands import commands
from moetool.budget.fit import fit
from moetool.budget.known import known_tokens
from moetool.budget.meshes import ALONE, NETWORK, REACHED, SPARE, Choice, Cluster, choices
from moetool.budget.options import MFU, PlanOptions
from moetool.budget.rules import ON_LEARNING_RATE, ON_UPCYCLING, learning_rate, skywork
from moetool.budget.shapes import Models, plan_models
from moetool.budget.ways import NAMES, TITLES, Speed, Way, cost, recommend, speed
from moetool.checkpoint.reader import CheckpointReader
from moetool.cost.operations import flops_per_token
from moetool.errors import ConfigError

SCHEMA = 1
DEFAULT_SEQ_LEN, DEFAULT_BATCH, FEWEST_STEPS = 4096, 1024, 500
UPCYCLED_PER_SECOND = 5.11e9 / 7.04  # bytes on two cores (docs/benchmarks/upcycle.md)
KEPT = 3  # step folders on the disk at once: two that are kept, and the next before the older is deleted
CURVE = [10 ** (9 + n / 20) for n in range(61)]  # training tokens, 1 B to 1 T


@dataclass(frozen=True)
class Plan:
    """A plan before it is a document.

    Attributes:
        options: of the command.
        models: dense and planned.
        cluster: the GPUs.
        dense_tokens: of DENSE; None where not known.
        seq_len: tokens of a sequence.
        batch: sequences of a step.
        measured: tokens per second that a probe measured, and on what; None where there was none.
    """

    options: PlanOptions
    models: Models
    cluster: Cluster
    dense_tokens: tuple[int, str] | None
    seq_len: int
    batch: int
    measured: tuple[float, str] | None = None

    @property
    def train_tokens(self) -> int:
        """Tokens of the planned training."""
        return self.options.train_tokens

    def speed(self, best: Choice | None) -> Speed:
        """The GPUs' speed with a mesh: where none was given, no more is assumed than its traffic leaves.

        Args:
            best: the mesh; None where none fits.
        """
        options, flops = self.options, flops_per_token(self.models.moe, self.seq_len)
        if self.measured:
            return speed(self.cluster, 0, self.measured[0], flops, self.measured[1])
        if options.mfu is not None:
            return speed(self.cluster, float(options.mfu), None, flops, "given")
        if options.tokens_per_second:
            typed = f"from {options.tokens_per_second:,} tokens/s"
            return speed(self.cluster, 0, options.tokens_per_second, flops, typed)
        left = ALONE * best.overlapped if best else 1.0
        source = "assumed" if left >= MFU else "assumed: limited by the mesh's traffic"
        return speed(self.cluster, min(float(MFU), left), None, flops, source)


def make_plan(options: PlanOptions, reader: CheckpointReader) -> Plan:
    """Read headers and set the options that were left open.

    Args:
        options: of the command.
        reader: of DENSE.

    Raises:
        ConfigError: the options do not fit DENSE.
        CheckpointError: DENSE is damaged.
    """
    models = plan_models(reader, options.recipe(), tuple(options.for_))
    positions = reader.config.get("max_position_embeddings")
    most = positions if type(positions) is int and positions > 0 else DEFAULT_SEQ_LEN
    seq_len = options.seq_len or min(DEFAULT_SEQ_LEN, most)
    if seq_len > most and type(positions) is int:
        raise ConfigError(f"--seq-len {seq_len}: the model has only {most} positions; give at most that")
    batch = options.global_batch_size or usual_batch(options.num_gpus, options.train_tokens // seq_len)
    if options.train_tokens < batch * seq_len:
        raise ConfigError(
            f"--train-tokens {options.train_tokens} is less than one step of {batch} x {seq_len} tokens; give a smaller"
            " --global-batch-size, or more tokens"
        )
    typed = options.dense_tokens
    tokens = (typed, "given") if typed else known_tokens(options.dense)
    return Plan(options, models, options.cluster(), tokens, seq_len, batch)


def usual_batch(num_gpus: int, sequences: int) -> int:
    """Sequences of a step where none are given: as many for each GPU, and a power of two, so that all meshes fit.

    Args:
        num_gpus: all of them.
        sequences: of the whole training.
    """
    each = 1
    while 2 * each * num_gpus <= min(DEFAULT_BATCH, sequences // FEWEST_STEPS):
        each *= 2
    return each * num_gpus


def document(plan: Plan) -> dict[str, Any]:
    """All of a plan, as plain values.

    Args:
        plan: settled.
    """
    models, options, cluster = plan.models, plan.options, plan.cluster
    moe_flops, dense_flops = (flops_per_token(one, plan.seq_len) for one in (models.moe, models.dense))
    had = plan.dense_tokens[0] * dense_flops if plan.dense_tokens else None
    said = _law(plan, plan.train_tokens * moe_flops / dense_flops)
    verdict = law.Verdict(**said["verdict"]) if said["verdict"] else None
    way, why = recommend(
        verdict, (said["same_cost"] or {}).get("loss"), moe_flops * plan.train_tokens, had, models.unfit
    )
    found = choices(models.moe, cluster, plan.seq_len, plan.batch)
    dense_found = choices(models.dense, cluster, plan.seq_len, plan.batch)
    best = (dense_found if way == "dense" else found)[:1]
    around = cluster, plan.seq_len, plan.batch
    spread = models.num_bytes > cluster.room
    reached = plan.speed(found[0] if found else None)
    return {
        "schema_version": SCHEMA,
        "model": options.dense,
        "law": said,
        "recommended": {"way": way, "title": TITLES[way], "because": why},
        "family": models.dense.family,
        "target": "" if models.unfit else models.moe.family,
        "unfit": models.unfit,
        "num_experts": models.moe.num_experts,
        "top_k": models.moe.top_k,
        "granularity": models.recipe.granularity,
        "shared_experts": models.recipe.shared_experts,
        "parameters": {"dense": models.dense.total, "total": models.moe.total, "active": models.moe.active},
        "dense_tokens": plan.dense_tokens and {"tokens": plan.dense_tokens[0], "source": plan.dense_tokens[1]},
        "train_tokens": plan.train_tokens,
        "seq_len": plan.seq_len,
        "global_batch_size": plan.batch,
        "steps": plan.train_tokens // (plan.batch * plan.seq_len),
        "ways": _ways(plan, verdict, moe_flops, dense_flops, found, dense_found),
        "rules": {
            "cost_ratio": moe_flops * plan.train_tokens / had if had else None,
            "skywork": skywork(moe_flops * plan.train_tokens, had) if had else None,
            "findings": [asdict(one) for one in ON_UPCYCLING],
        },
        "cluster": {
            "gpu": cluster.gpu.name, "num_gpus": cluster.num_gpus, "gpus_per_node": cluster.node,
            "memory": cluster.gpu.memory, "peak_flops": cluster.gpu.peak_flops, "mfu": reached.mfu,
            "speed": reached.source, "room": cluster.room,
        },
        "meshes": fit(models.moe, *around, found, None if models.unfit else models.recipe.granularity),
        "dense_meshes": fit(models.dense, *around, dense_found, None) if way == "dense" else None,
        "upcycling": _upcycling(plan),
        "disk": _disk(plan, models.moe.total, models.num_bytes),
        "dense_disk": _disk(plan, models.dense.total, models.dense_bytes),
        "learning_rate": asdict(learning_rate(plan.train_tokens))
        | {"findings": [asdict(one) for one in ON_LEARNING_RATE]},
        "commands": commands(
            way, options.dense, options.recipe(), tuple(options.for_), cluster, best[0] if best else None,
            plan.train_tokens, plan.seq_len, plan.batch, spread,
        ),
        "assumptions": {
            "memory_share": SPARE, "bandwidth_share": REACHED, "network": NETWORK, "one_gpu_mfu": ALONE,
            "disk_speed": options.disk_speed, "precision": "bf16", "gradient_checkpointing": True,
        },
    }  # fmt: skip


def _law(plan: Plan, same_cost: float) -> dict[str, Any]:
    """What the law says, and why it does not where the case is outside its range.

    Args:
        plan: settled.
        same_cost: tokens on which the dense model can be trained with the operations of the Mixture of Experts.
    """
    recipe, parameters = plan.models.recipe, plan.models.dense.total
    said: dict[str, Any] = {
        "inside": False,
        "reasons": [],
        "source": law.SOURCE,
        "range": {"parameters": law.PARAMETERS, "dense_tokens": law.DENSE_TOKENS, "train_tokens": law.TRAIN_TOKENS},
        "verdict": None,
        "same_cost": None,
        "curves": None,
    }
    if plan.dense_tokens is None:
        return said | {
            "reasons": ["the number of tokens that the dense model was trained on is unknown; give --dense-tokens"]
        }
    dense, tokens = plan.dense_tokens[0], plan.train_tokens
    shape = recipe.num_experts, recipe.top_k, recipe.granularity, recipe.shared_experts or 0
    said["reasons"] = law.outside(parameters, dense, tokens, *shape, plan.models.dense_layers)
    if said["reasons"]:
        return said
    curves = {
        "dense": [law.dense_loss(dense + D2, parameters) for D2 in CURVE],
        "upcycled": [law.upcycled_loss(dense, D2, parameters) for D2 in CURVE],
        "scratch": [law.scratch_loss(D2, parameters) for D2 in CURVE],
    }
    found = asdict(law.verdict(parameters, dense, tokens))
    said["same_cost"] = {"tokens": same_cost, "loss": law.dense_loss(dense + same_cost, parameters)}
    return said | {"inside": True, "verdict": found, "curves": {"tokens": CURVE, **curves}}


def _ways(
    plan: Plan, verdict: law.Verdict | None, moe: int, dense: int, found: list[Choice], dense_found: list[Choice]
) -> list[dict[str, Any]]:
    price = plan.options.price_per_gpu_hour
    losses: dict[Way, float | None] = {
        "dense": verdict.dense if verdict else None,
        "copy": verdict.upcycled if verdict else None,
        "drop": None,  # there is no law for it
        "scratch": verdict.scratch if verdict else None,
    }
    rows = []
    for way in TITLES:
        if plan.models.unfit and way == "drop":
            continue
        flops, best = (dense, dense_found) if way == "dense" else (moe, found)
        money = None if price is None else float(price)
        rows.append({
            "way": way, "name": NAMES[way], "title": TITLES[way], "loss": losses[way],
            **cost(float(flops * plan.train_tokens), plan.speed(best[0] if best else None), plan.cluster, money),
            "flops_per_token": flops,
            "mesh": str(best[0].mesh) or "one GPU" if best else None,
            "memory": best[0].memory["total"] if best else None,
        })  # fmt: skip
    return rows


def _upcycling(plan: Plan) -> dict[str, Any]:
    """What `moetool upcycle` takes on a machine with two cores and one disk."""
    models = plan.models
    return {
        "reads": models.dense_bytes,
        "writes": models.num_bytes,
        "memory": models.upcycle_memory,
        "seconds": models.num_bytes / min(UPCYCLED_PER_SECOND, plan.options.disk_speed),
    }


def _disk(plan: Plan, parameters: int, num_bytes: int) -> dict[str, Any]:
    """Checkpoints of a training: weights as they are saved, fp32 ones beside rounded ones, and two moments."""
    rounded = num_bytes < 3 * parameters
    step = num_bytes + (12 if rounded else 8) * parameters
    return {
        "checkpoint": num_bytes,
        "step_folder": step,
        "most": KEPT * step + num_bytes,
        "seconds_to_save": step / plan.options.disk_speed,
    }


def summary(found: Mapping[str, Any]) -> dict[str, Any]:
    """The figures of a plan by which plans are compared.

    Args:
        found: its document.
    """
    way = next(one for one in found["ways"] if one["way"] == "copy")
    best = found["meshes"]["recommended"]
    return {
        "total": found["parameters"]["total"],
        "active": found["parameters"]["active"],
        "checkpoint": found["disk"]["checkpoint"],
        "gpu_hours": way["gpu_hours"],
        "money": way["money"],
        "loss": way["loss"],
        "mesh": best and best["mesh"],
        "memory": (best or found["meshes"]["others"][0])["memory"]["total"],
        "fits": best is not None,
    }
