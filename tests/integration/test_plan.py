"""`moetool plan`: the page, the document, the commands and the HTML file, on headers alone."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import typer

from moetool.budget.report import usual_batch
from moetool.cli import app
from tests import recipes, tiny
from tests.hub import served

LLAMA = "meta-llama/Llama-3.2-1B"


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The headers of Llama-3.2-1B, in a folder whose name says nothing."""
    return recipes.save_headers(LLAMA, tmp_path_factory.mktemp("plan") / "dense")


def plan(*arguments: object) -> dict[str, Any]:
    code, out, err = tiny.in_process("plan", *arguments, "--json")
    assert code == 0, err
    document: dict[str, Any] = json.loads(out)
    return document


def test_the_papers_own_case_is_inside(dense: Path) -> None:
    found = plan(dense, "--dense-tokens", "74B", "--train-tokens", "37B")
    law = found["law"]
    assert law["inside"]
    assert law["reasons"] == []
    # 8.83 x 74e9^-0.088 + 12.3 x 1235814400^-0.116 + 0.165, with logarithms from a table.
    assert law["verdict"]["start"] == pytest.approx(2.226, abs=1e-3)
    assert [one["way"] for one in found["ways"]] == ["dense", "copy", "drop", "scratch"]
    dense_way, copies, drop, scratch = found["ways"]
    assert drop["loss"] is None
    assert copies["operations"] == drop["operations"] == scratch["operations"]
    assert copies["loss"] == law["verdict"]["upcycled"] < dense_way["loss"]
    assert len(law["curves"]["tokens"]) == len(law["curves"]["dense"])


def test_at_15_trillion_tokens_there_is_no_verdict(dense: Path, tmp_path: Path) -> None:
    page = tmp_path / "plan.html"
    arguments = (dense, "--dense-tokens", "15T", "--train-tokens", "37B")
    found = plan(*arguments, "--html", page)
    assert not found["law"]["inside"]
    assert found["law"]["verdict"] is found["law"]["curves"] is None
    assert all(one["loss"] is None for one in found["ways"])
    code, out, _ = tiny.in_process("plan", *arguments)
    assert code == 0
    assert out.startswith("OUTSIDE the range of the scaling law: no prediction of the loss.\n  15 T dense tokens")
    assert " nats; " not in out
    assert "Skywork-MoE's rule" in out
    assert "OUTSIDE the range" in page.read_text()
    assert "<polyline" not in page.read_text()


def test_the_page_says_first_whether_the_law_may_be_believed(dense: Path) -> None:
    _, out, _ = tiny.in_process("plan", dense, "--dense-tokens", "74B", "--train-tokens", "37B")
    assert out.startswith("INSIDE the range of the scaling law of plain copies")
    assert "The dense model starts at 2.226 nats" in out
    _, out, _ = tiny.in_process("plan", dense)
    assert out.startswith("OUTSIDE")
    assert "is unknown; give --dense-tokens" in out


def test_cost_by_hand(dense: Path) -> None:
    found = plan(dense, "--dense-tokens", "1T", "--train-tokens", "10B", "--num-gpus", 16, "--mfu", "0.4",
                 "--price-per-gpu-hour", "2.5")  # fmt: skip
    # 16 layers of q, o 2048x2048, k, v 512x2048, three matrices of 8192x2048 and two norms; tied embeddings; a norm.
    layer, embedding = 2 * 2048 * 2048 + 2 * 512 * 2048 + 2 * 2048, 128256 * 2048
    ffn, router = 3 * 8192 * 2048, 8 * 2048
    total = 16 * (layer + ffn) + embedding + 2048
    assert found["parameters"]["dense"] == total
    assert found["parameters"]["total"] == total + 16 * (7 * ffn + router)
    active = total + 16 * (ffn + router)
    assert found["parameters"]["active"] == active
    # PaLM, appendix B: 6 per parameter, and attention's 12 L H Q T; a tied embedding is the head.
    attention = 12 * 16 * 32 * 64 * 4096
    (way,) = (one for one in found["ways"] if one["way"] == "drop")
    assert way["operations"] == (6 * active + attention) * 10**10
    hours = way["operations"] / (0.4 * 989e12) / 3600
    assert way["gpu_hours"] == pytest.approx(hours)
    assert way["days"] == pytest.approx(hours / 16 / 24)
    assert way["money"] == pytest.approx(2.5 * hours)
    assert found["rules"]["cost_ratio"] == pytest.approx((6 * active + attention) / (6 * total + attention) / 100)
    assert found["rules"]["skywork"] == "upcycle"
    assert found["disk"]["step_folder"] == 14 * found["parameters"]["total"]
    assert found["disk"]["seconds_to_save"] == pytest.approx(14 * found["parameters"]["total"] / 1e9)


def test_a_speed_that_was_measured_gives_the_share_of_the_peak(dense: Path) -> None:
    found = plan(dense, "--tokens-per-second", "100k", "--num-gpus", 8, "--train-tokens", "10B")
    (way,) = (one for one in found["ways"] if one["way"] == "drop")
    assert way["days"] == pytest.approx(10e9 / 1e5 / 86400)
    assert found["cluster"]["mfu"] == pytest.approx(1e5 * way["flops_per_token"] / 8 / 989e12)
    (other,) = (one for one in found["ways"] if one["way"] == "dense")
    assert other["gpu_hours"] / way["gpu_hours"] == pytest.approx(other["flops_per_token"] / way["flops_per_token"])


@pytest.mark.parametrize(
    ("arguments", "way"),
    [
        (("--dense-tokens", "74B", "--train-tokens", "37B"), "drop"),
        (("--dense-tokens", "74B", "--train-tokens", "5B"), "dense"),
        (("--dense-tokens", "10B", "--train-tokens", "100B"), "scratch"),
        (("--num-gpus", 32, "--granularity", 4, "--num-experts", 64, "--dtype", "bf16"), "drop"),
        (("--num-gpus", 1, "--gpu", "b200", "--train-tokens", "1B", "--for", "vllm", "--shared-experts", 1,
          "--target", "glm4_moe"), "drop"),
    ],
)  # fmt: skip
def test_every_command_is_one_that_moetool_takes(
    dense: Path, arguments: tuple[object, ...], way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = plan(dense, *arguments)
    group = typer.main.get_command(app)
    kinds = []
    for line in found["commands"]:
        words = shlex.split(line)
        monkeypatch.delenv("WORLD_SIZE", raising=False)
        if words[0] == "accelerate":
            monkeypatch.setenv("WORLD_SIZE", words[words.index("--num_processes") + 1])
            words = words[words.index("-m") + 1 :]
        assert words[0] == "moetool"
        command = group.commands[words[1]]  # type: ignore[attr-defined]
        context = command.make_context(words[1], words[2:])
        kinds.append(words[1])
        if words[1] == "cpt":  # what the options mean together is checked by their config
            from moetool.commands.options import _build
            from moetool.train.config import TrainConfig

            _build(TrainConfig, context.params).check(frozenset())
    assert found["recommended"]["way"] == way
    assert kinds == (["cpt", "eval"] if way == "dense" else ["upcycle", "cpt", "analyze-routing", "eval"])
    assert ("--method scratch" in found["commands"][0]) == (way == "scratch")


def test_the_recommended_mesh_is_the_one_of_the_commands(dense: Path) -> None:
    found = plan(dense, "--dense-tokens", "74B")
    best = found["meshes"]["recommended"]
    (line,) = (line for line in found["commands"] if " cpt " in line)
    assert f"--fsdp {best['sizes']['fsdp']} " in line
    assert f"--micro-batch-size {best['micro_batch_size']} " in line
    assert best["memory"]["total"] <= 0.9 * 80e9
    assert all(one["memory"]["total"] > 0.9 * 80e9 for one in found["meshes"]["others"] if one["why"] == "too large")
    assert found["meshes"]["fitting"][0] == best


def test_the_meshes_and_the_disk_are_those_of_the_recommended_way(dense: Path) -> None:
    found = plan(dense, "--dense-tokens", "74B", "--train-tokens", "5B")
    assert found["recommended"]["way"] == "dense"
    best = found["dense_meshes"]["recommended"]
    (line,) = (line for line in found["commands"] if " cpt " in line)
    assert f"--micro-batch-size {best['micro_batch_size']} " in line
    assert (best["sizes"]["fsdp"] == 1) == (" --fsdp " not in line)
    assert found["dense_disk"]["step_folder"] == 14 * found["parameters"]["dense"]
    _, out, _ = tiny.in_process("plan", dense, "--dense-tokens", "74B", "--train-tokens", "5B")
    assert "meshes of the dense model that fit" in out
    assert "By Skywork-MoE's rule alone that is" in out
    assert "step folders of 17.3 GB" in out
    assert "upcycling  reads" not in out
    assert plan(dense, "--dense-tokens", "74B")["dense_meshes"] is None


@pytest.mark.parametrize(("gpus", "batch"), [(8, 1024), (1, 1024), (24, 768), (40, 640), (4096, 4096)])
def test_the_usual_batch_can_be_shared_by_any_number_of_gpus(gpus: int, batch: int) -> None:
    assert usual_batch(gpus, 10**9) == batch
    assert usual_batch(gpus, 500 * 4 * gpus) == 4 * gpus if 4 * gpus <= 1024 else gpus
    assert usual_batch(gpus, 1) == gpus


def test_any_number_of_machines_has_a_mesh(dense: Path) -> None:
    assert plan(dense, "--num-gpus", 24)["meshes"]["recommended"]["sizes"]["replicas"] == 3


def test_a_batch_that_cannot_be_shared_out_is_said(dense: Path) -> None:
    (said,) = plan(dense, "--global-batch-size", 7)["meshes"]["advice"]
    assert said.startswith("memory is enough (fsdp")
    assert "--global-batch-size 7 is not a multiple of" in said


def test_8_gpus_are_advised_where_7_cannot_share_8_experts(dense: Path) -> None:
    assert "8 such GPUs are enough" in plan(dense, "--num-gpus", 7)["meshes"]["advice"]


def test_a_crossing_outside_the_range_is_called_so(dense: Path, tmp_path: Path) -> None:
    # The range ends at 368 B training tokens.
    page = tmp_path / "plan.html"
    arguments = (dense, "--dense-tokens", "600B", "--train-tokens", "200B")
    verdict = plan(*arguments, "--html", page)["law"]["verdict"]
    assert 368e9 < verdict["scratch_wins"] < 1e12
    _, out, _ = tiny.in_process("plan", *arguments)
    assert re.search(r"from scratch passes copies after about \d+ B tokens, which is outside the range", out)
    assert "which is outside the range" in page.read_text()


def test_as_many_operations_on_the_dense_model(dense: Path) -> None:
    found = plan(dense, "--dense-tokens", "74B", "--train-tokens", "37B")
    dense_way, copies = found["ways"][:2]
    tokens = 37e9 * copies["operations"] / dense_way["operations"]
    assert found["law"]["same_cost"]["tokens"] == pytest.approx(tokens)
    # 8.83 x (74e9 + 56.8e9)^-0.088 + 12.3 x 1235814400^-0.116 + 0.165
    assert found["law"]["same_cost"]["loss"] == pytest.approx(2.178, abs=1e-3)


def test_layers_without_experts_are_outside_the_range(dense: Path) -> None:
    found = plan(dense, "--dense-tokens", "74B", "--moe-layers", "2-", "--target", "glm4_moe", "--shared-experts", 1)
    assert "2 layers without experts, and the law is that of experts in all" in found["law"]["reasons"]


def test_what_decides_comes_first_in_the_document(dense: Path) -> None:
    found = plan(dense)
    assert list(found)[:4] == ["schema_version", "model", "law", "recommended"]
    assert list(found["law"])[:2] == ["inside", "reasons"]


def test_names_are_whole_in_80_columns(dense: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    _, out, _ = tiny.in_process("plan", dense, "--num-gpus", 64, "--price-per-gpu-hour", 2)
    assert re.search(r"^redrawn +\d", out, re.MULTILINE)
    assert re.search(r"^replicas 8 fsdp 8 ep 8 +\d", out, re.MULTILINE)
    assert "…" not in out


def test_where_nothing_fits_it_says_what_would(dense: Path) -> None:
    found = plan(dense, "--gpu", "rtx-4090", "--num-gpus", 1)
    assert found["meshes"]["recommended"] is None
    said = " ".join(found["meshes"]["advice"])
    assert "such GPUs are enough" in said
    assert [line.split()[1] for line in found["commands"]] == ["upcycle"]
    code, out, _ = tiny.in_process("plan", dense, "--gpu", "rtx-4090", "--num-gpus", 1)
    assert code == 0
    assert "the training does not fit on one RTX 4090" in out
    assert "without a mesh" not in out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--gpu", "mi300"), "--gpu mi300 is not known"),
        (("--gpu", "h100e", "--gpu-memory", "96GB"), "did you mean 'h100'?"),
        (("--gpu-memory", "96GB"), "a GPU without a name needs both figures; give --gpu-memory and"),
        (("--gpu", "h100", "--gpu-memory", "96GB"), "--gpu-memory has no effect with --gpu h100"),
        (("--mfu", "0.3", "--tokens-per-second", "1000"), "give --mfu or --tokens-per-second, not both"),
        (("--num-gpus", 12), "is not a multiple of --gpus-per-node 8"),
        (("--sweep", "gpus=1,2"), "expected OPTION=A,B"),
        (("--sweep", "num-experts=4,x"), "a whole number of at least 2"),
        (("--sweep", "num-experts=4", "--sweep", "num-experts=8"), "given twice"),
        (("--sweep", "mfu=0.3,2"), "--sweep mfu=2: 2 is not between 0 and 1"),
        (("--train-tokens", "9" * 400), "--train-tokens must be between 1 and"),
        (("--mfu", "1e-900"), "--mfu must be between 0.001 and 1"),
        (("--gpu", "x", "--gpu-memory", "9GB", "--gpu-tflops", "1e-400"), "--gpu-tflops must be between 0.001 and"),
        (("--html", "."), "--html . is a folder; give a file, such as plan.html"),
    ],
)
def test_mistakes_are_errors_of_usage(dense: Path, arguments: tuple[object, ...], said: str) -> None:
    code, _, err = tiny.in_process("plan", dense, *arguments)
    assert code == 2
    assert said in " ".join(err.replace("│", " ").split())


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--num-experts", 4, "--top-k", 8), "--top-k 8 is not between 1 and the number of experts, 4"),
        (("--seq-len", 10**6), "the model has only 131072 positions"),
        (("--train-tokens", 1000, "--global-batch-size", 64), "is less than one step of 64 x 4096 tokens"),
    ],
)
def test_what_does_not_fit_the_model_can_be_fixed(dense: Path, arguments: tuple[object, ...], said: str) -> None:
    assert said in tiny.refusal("plan", dense, *arguments)


def test_an_unknown_gpu_is_fine_with_its_data_sheet(dense: Path) -> None:
    found = plan(dense, "--gpu", "mi300x", "--gpu-memory", "192GB", "--gpu-tflops", "1307")
    assert found["cluster"]["gpu"] == "mi300x"
    assert found["cluster"]["memory"] == 192e9
    assert found["cluster"]["peak_flops"] == 1307e12


def test_the_tokens_of_a_known_model_are_those_of_its_card(tmp_path: Path) -> None:
    folder = recipes.save_headers(LLAMA, tmp_path / "Llama-3.2-1B")
    found = plan(folder)
    assert found["dense_tokens"]["tokens"] == 9 * 10**12
    assert found["dense_tokens"]["source"].startswith("the card of meta-llama/Llama-3.2-1B, by the folder's name")
    assert plan(folder, "--dense-tokens", "1T")["dense_tokens"] == {"tokens": 10**12, "source": "given"}


def test_a_sweep_has_a_row_for_each_combination(dense: Path, tmp_path: Path) -> None:
    page = tmp_path / "plan.html"
    found = plan(dense, "--dense-tokens", "74B", "--sweep", "num-experts=4,8,16", "--sweep", "granularity=1,4",
                 "--html", page)  # fmt: skip
    rows = found["sweep"]
    assert [row["settings"] for row in rows] == [
        {"num-experts": experts, "granularity": parts} for experts in (4, 8, 16) for parts in (1, 4)
    ]
    assert [bool(row["error"]) for row in rows] == [False, True, False, False, False, False]
    assert "--top-k 8 is not between" in rows[1]["error"]
    ones = {row["settings"]["num-experts"]: row for row in rows if row["settings"]["granularity"] == 1}
    assert ones[4]["total"] < ones[8]["total"] < ones[16]["total"]
    assert [bool(ones[n]["loss"]) for n in (4, 8, 16)] == [False, True, False]
    assert page.read_text().count('<circle class="dot') == 5 + 1
    code, out, _ = tiny.in_process("plan", dense, "--sweep", "train-tokens=5B,20B")
    assert code == 0
    assert re.search(r"^5B .*^20B ", out, re.MULTILINE | re.DOTALL)


class _Links(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.links += [value for name, value in attrs if name in ("src", "href", "srcset", "action")]
        if tag not in ("meta", "line", "rect", "circle", "polyline"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in ("line", "rect", "circle", "polyline"):
            assert self.open.pop() == tag


def test_the_html_page_opens_offline_and_escapes_names(dense: Path, tmp_path: Path) -> None:
    evil = tmp_path / "<script>alert(1)<" / "script>"
    evil.parent.mkdir(parents=True)
    evil.symlink_to(dense)
    page = tmp_path / "plan.html"
    plan(evil, "--dense-tokens", "74B", "--train-tokens", "37B", "--html", page)
    text = page.read_text()
    parser = _Links()
    parser.feed(text)
    assert parser.open == []
    assert parser.links == []
    assert "://" not in text
    assert "<script" not in text
    assert text.count("<polyline") == 3
    assert text.count('class="crossing"') == 3
    assert 'class="fitted"' in text
    assert "prefers-color-scheme: dark" in text


CODE = """
import sys
from moetool.cli import run

assert run(["plan", sys.argv[1], "--dense-tokens", "74B", "--html", sys.argv[2], "--quiet"]) == 0
loaded = {"torch", "numpy", "transformers", "accelerate", "matplotlib"} & sys.modules.keys()
assert not loaded, loaded
"""


def test_it_loads_no_torch_and_takes_less_than_two_seconds_of_a_processor(dense: Path, tmp_path: Path) -> None:
    import resource

    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    command = [sys.executable, "-c", CODE, str(dense), str(tmp_path / "plan.html")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before < 2


def test_a_family_that_cannot_be_upcycled_gets_cost_and_memory(tmp_path: Path) -> None:
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = Gemma3TextConfig(vocab_size=300, head_dim=8, num_key_value_heads=2, **sizes)
    Gemma3ForCausalLM(config).save_pretrained(tmp_path / "gemma")
    found = plan(tmp_path / "gemma", "--dense-tokens", "74B", "--train-tokens", "1B")
    assert "it scales embeddings" in found["unfit"]
    assert [one["way"] for one in found["ways"]] == ["dense", "copy", "scratch"]
    assert all(one["memory"] and one["gpu_hours"] for one in found["ways"])
    assert found["recommended"]["way"] == "dense"
    assert found["commands"][0].endswith("--gradient-checkpointing")
    code, out, _ = tiny.in_process("plan", tmp_path / "gemma", "--dense-tokens", "74B", "--train-tokens", "1B")
    assert code == 0
    assert "cannot be upcycled" in out
    assert "so upcycle" not in out
    said = tiny.refusal("plan", tmp_path / "gemma", "--target", "mixtral")
    assert "--target: " in said
    assert "leave it out to see only cost and memory" in said


def test_a_model_of_the_hub_is_planned_from_headers(tmp_path: Path) -> None:
    folder = tiny.save_llama(tmp_path / "hub" / LLAMA, hidden_size=128, intermediate_size=512, vocab_size=3000)
    weights = (folder / "model.safetensors").stat().st_size
    with served(tmp_path / "hub", tmp_path / "cache") as (env, asked):
        told = tiny.cli("plan", LLAMA, "--json", env=env)
    assert told.returncode == 0, told.stderr
    found = json.loads(told.stdout)
    assert found["dense_tokens"] == {
        "tokens": 9 * 10**12,
        "source": f"the card of {LLAMA}: token count up to 9T",
    }
    assert found["parameters"] == plan(folder)["parameters"]
    assert found["commands"][0] == f"moetool upcycle {LLAMA} models/llama-3.2-1b-moe"
    assert 0 < sum(size for name, size in asked if name.endswith(".safetensors")) <= 100_001 < weights


def test_a_mixture_of_experts_is_refused(mixtral: Path) -> None:
    assert "it is already a Mixture of Experts" in tiny.refusal("plan", mixtral)
