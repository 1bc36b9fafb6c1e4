"""Correctness and speed on a GPU: eager calls, CUDA graphs, and compiled blocks under CUDA graphs.

    python benchmarks/gpu.py                                    # SDXL with random weights on the GPU, under 4 minutes
    python benchmarks/gpu.py --sections correctness calls       # some sections
    python benchmarks/gpu.py --device cpu --model mini --size 64 --steps 4    # rehearsal; tapes stand in for graphs

Nothing is downloaded. Sections run in the order of their importance; each one writes the report when it is complete,
and those that would begin after `--seconds` are skipped and named. Everything is warmed up before it is timed, at least
three rounds are timed alternately, and medians are reported.
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.full_size import make_masks_compact, random_pipeline
from benchmarks.report import rounded
from benchmarks.tape import TapeBackend
from benchmarks.workbench import (
    APPROXIMATIONS,
    Workbench,
    benchmark_request,
    peak_bytes,
    seconds,
    time_alternately,
)
from realcustom import Generation, RealCustomPipeline, Request
from realcustom.assets import MINI_MODEL
from realcustom.execution import EagerExecutor, GraphExecutor, ReplayExecutor
from realcustom.request import seed_variations

Report = dict[str, Any]


class GpuBenchmark:
    """A pipeline with a stock pipeline on the same weights, and the sections of the report.

    Args:
        args: the command line.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self.device, self.rounds = torch.device(args.device), args.rounds
        on_gpu = self.device.type == "cuda"
        self.dtype = torch.bfloat16 if on_gpu else torch.float32
        start = time.monotonic()
        if args.model == "mini":
            pipeline = RealCustomPipeline.from_pretrained(MINI_MODEL, dtype=self.dtype).to(self.device)
        else:
            pipeline = random_pipeline(args.model, str(self.device), self.dtype)
        sampling = pipeline.sampling
        steps = args.steps or sampling.num_inference_steps
        stop = max(1, round(steps * sampling.early_stop_step / sampling.num_inference_steps))
        self.request = benchmark_request(args.size or sampling.height, steps, stop, num_subjects=1)
        self.bench = Workbench(pipeline, self.request, execution="eager")
        self.pipeline = self.bench.pipeline
        if args.model != "mini":
            make_masks_compact(self.pipeline)
        self.load_seconds = time.monotonic() - start
        denoiser = self.pipeline.denoiser
        self.eager = EagerExecutor(denoiser.attention, denoiser.method)
        self.graphs = self.new_graphs()
        self.batches = args.batch
        self.compiled = False
        denoiser.executor = self.graphs

    def new_graphs(self) -> GraphExecutor:
        denoiser = self.pipeline.denoiser
        backend = None if self.device.type == "cuda" else TapeBackend()
        return GraphExecutor(denoiser.attention, denoiser.method, backend)

    @contextmanager
    def executed(self, executor: EagerExecutor | GraphExecutor) -> Iterator[None]:
        """Run the UNet calls with another executor inside the context."""
        denoiser = self.pipeline.denoiser
        before, denoiser.executor = denoiser.executor, executor
        try:
            yield
        finally:
            denoiser.executor = before

    def generate(self, batch_size: int = 1, **settings) -> list[Generation]:
        """Run all steps of `batch_size` images."""
        return self.bench.realcustom(batch_size, **settings)

    def eagerly(self, work: Callable[..., Any], *args, **settings) -> Callable[[], Any]:
        def run() -> Any:
            with self.executed(self.eager):
                return work(*args, **settings)

        return run

    def times(self, works: dict[str, Callable[[], object]]) -> dict[str, float]:
        """Median seconds of each work. Every work runs twice before: graphs are captured at the second occurrence."""
        for work in works.values():
            for _ in range(2):
                work()
        return time_alternately(works, self.device, self.rounds + 1)  # discards the first round

    # ---- sections --------------------------------------------------------------------------------------------------

    def correctness(self) -> Report:
        """Graphs against eager execution, alone against in a batch, random joins and leaves, and the golden numbers."""
        short = dict(num_inference_steps=min(6, self.request.num_inference_steps), early_stop_step=3)
        difference = lambda a, b: max(float((x.latents - y.latents).abs().max()) for x, y in zip(a, b, strict=True))
        report: Report = {}
        for name, settings in {"one subject": {}, "text only": {"subjects": ()}}.items():
            eager = self.eagerly(self.generate, 2, **short, **settings)()
            for _ in range(2):
                graphs = self.generate(2, **short, **settings)
            report[f"{name}, graphs against eager"] = difference(eager, graphs)
            report[f"{name}, largest latent"] = max(float(g.latents.abs().max()) for g in eager)
        alone = [self._run([r], **short)[0] for r in seed_variations(self.request, 3)]
        together = self._run(seed_variations(self.request, 3), **short)
        report["alone against in a batch of 3"] = difference(alone, together)
        report |= self._joins_and_leaves()
        report |= self._changed_weights(short)
        report["golden numbers"] = self._golden()
        return report

    def _run(self, requests: Sequence[Request], **settings) -> list[Generation]:
        generations = [self.pipeline.prepare(replace(r, **settings)) for r in requests]
        self.pipeline.run(generations)
        return generations

    def _joins_and_leaves(self, number: int = 24) -> Report:
        """Images that join at different steps, by graphs and eagerly."""

        def mix() -> list[Generation]:
            active: list[Generation] = []
            finished: list[Generation] = []
            for index in range(number):
                subjects = self.request.subjects if index % 3 else ()
                request = replace(self.request, seed=index, subjects=subjects, num_inference_steps=4, early_stop_step=2)
                active.append(self.pipeline.prepare(request))
                self.pipeline.step(active)
                finished += [g for g in active if g.done]
                active = [g for g in active if not g.done]
            self.pipeline.run(active)
            return finished + active

        expected = self.eagerly(mix)()
        before = self.graphs.statistics.captures
        memory = []
        for _ in range(2):
            computed = mix()
            memory.append(torch.cuda.memory_reserved() if self.device.type == "cuda" else 0)
        pairs = zip(expected, computed, strict=True)
        return {
            "joins and leaves, graphs against eager": max(float((a.latents - b.latents).abs().max()) for a, b in pairs),
            "joins and leaves, captures": self.graphs.statistics.captures - before,
            "joins and leaves, growth of reserved MB": (memory[1] - memory[0]) / 1e6,
        }

    def _changed_weights(self, short: dict) -> Report:
        """A weight that is replaced, and then changed in place, between two images."""
        parameters = self.pipeline.unet.conv_in._parameters
        original = parameters["weight"]
        assert original is not None
        parameters["weight"] = torch.nn.Parameter(original * 1.2, requires_grad=False)
        replaced = [work() for work in (self.eagerly(self.generate, 1, **short), lambda: self.generate(1, **short))]
        with torch.no_grad():
            parameters["weight"].mul_(1.1)
        in_place = [work() for work in (self.eagerly(self.generate, 1, **short), lambda: self.generate(1, **short))]
        parameters["weight"] = original
        compare = lambda pair: float((pair[0][0].latents - pair[1][0].latents).abs().max())
        return {"replaced weight": compare(replaced), "weight changed in place": compare(in_place)}

    def _golden(self) -> str:
        """The golden numbers of the authors' release in fp32 on this device."""
        root = Path(__file__).parents[1]
        command = [sys.executable, "-m", "pytest", "-o", "addopts=-q", "tests/test_golden.py"]
        command += ["--device", self.device.type]
        done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=120)
        return (done.stdout.strip().splitlines() or [done.stderr.strip()[-200:]])[-1]

    def images(self) -> Report:
        """Seconds of all steps of one image and of the whole image, eagerly and by graphs."""
        text_only = dict(subjects=())
        works: dict[str, Callable[[], object]] = {
            "text_to_image, diffusers eager": self.bench.text_to_image,
            "realcustom eager": self.eagerly(self.generate),
            "text_to_image graphs": lambda: self.generate(1, **text_only),
            "realcustom graphs": self.generate,
            "realcustom graphs with decode": lambda: self.pipeline.decode(self.generate()),
        }
        return self._ratios(self.times(works))

    def _ratios(self, times: dict[str, float]) -> Report:
        report: Report = {f"{name} s": value for name, value in times.items()}
        if "realcustom graphs" in times:
            ours = times["realcustom graphs"]
            for name in ("text_to_image, diffusers eager", "text_to_image graphs", "realcustom eager"):
                if name in times:
                    report[f"realcustom graphs / {name}"] = ours / times[name]
        return report

    def calls(self) -> Report:
        """Milliseconds of each kind of UNet call: on the GPU by its clock, and as seen by Python."""
        (generation,) = self.generate(1, num_inference_steps=2, early_stop_step=1)
        (fresh,) = self.bench.prepare()
        fresh.set_masks(generation.guidance_masks)
        (text_only,) = self.bench.prepare(subjects=())
        denoiser = self.pipeline.denoiser
        works = {
            "guidance": lambda: denoiser.guidance_branch([fresh]),
            "generation": lambda: denoiser.generation_branch([fresh]),
            "text_to_image": lambda: denoiser.generation_branch([text_only]),
        }
        report: Report = {}
        for mode, executor in (("eager", self.eager), ("graphs", self.graphs)):
            with self.executed(executor):
                for name, work in works.items():
                    report[f"{name} {mode}"] = self._call_times(work)
        report["host ms per step, graphs"] = 1e3 * self._host_seconds_per_step()
        return report

    def _call_times(self, work: Callable[[], object], number: int = 10) -> Report:
        for _ in range(3):
            work()
        wall = statistics.median(seconds(work, self.device) for _ in range(number))
        if self.device.type != "cuda":
            return {"wall ms": 1e3 * wall}
        gpu = []
        for _ in range(number):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            work()
            end.record()
            torch.cuda.synchronize()
            gpu.append(start.elapsed_time(end))
        return {"wall ms": 1e3 * wall, "gpu ms": statistics.median(gpu)}

    def _host_seconds_per_step(self) -> float:
        """Time that Python takes to start a step without a new mask, for which the GPU need not be waited for."""
        settings = dict(num_inference_steps=12, early_stop_step=1)
        self.generate(1, **settings)
        (generation,) = self.bench.prepare(**settings)
        for _ in range(3):
            self.pipeline.step([generation])
        times = []
        for _ in range(8):
            self._synchronize()
            start = time.perf_counter()
            self.pipeline.step([generation])
            times.append(time.perf_counter() - start)
        return statistics.median(times)

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def memory(self) -> Report:
        """Peak memory beyond weights, and what the graphs take."""
        report: Report = {}
        self.pipeline.clear_caches()
        self.graphs.retire()
        self._release()
        free = self._free()
        for name, work in (
            ("text_to_image, diffusers eager", self.bench.text_to_image),
            ("realcustom eager", self.eagerly(self.generate)),
        ):
            report[f"{name}, peak MB"] = peak_bytes(work, self.device) / 1e6
        self.generate()
        report["realcustom graphs, peak MB"] = peak_bytes(self.generate, self.device) / 1e6
        self._release()
        report["reserved with graphs, caches and slots MB"] = (free - self._free()) / 1e6
        report["graphs"] = self.graphs.num_graphs
        slots = [s.nbytes for s in (self.graphs.texts, self.graphs.references) if s is not None]
        report["slots MB"] = sum(slots) / 1e6
        report["captures so far"] = self.graphs.statistics.captures
        report["seconds per capture"] = self.graphs.statistics.capture_seconds / max(1, self.graphs.statistics.captures)
        return report

    def _free(self) -> int:
        return torch.cuda.mem_get_info()[0] if self.device.type == "cuda" else 0

    def _release(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.empty_cache()

    def batch(self) -> Report:
        """Images per second of several images together, by graphs, exact and with masks of the generation branch."""
        report: Report = {}
        steps = max(2, self.request.num_inference_steps // 3)
        settings = dict(num_inference_steps=steps, early_stop_step=max(1, steps * 12 // 25))
        scale = self.request.num_inference_steps / steps
        for number in self.batches:
            works = {
                "realcustom graphs": lambda n=number: self.generate(n, **settings),
                "realcustom graphs, mask of the generation branch": lambda n=number: self.generate(
                    n, mask_source="generation_branch", **settings
                ),
                "text_to_image graphs": lambda n=number: self.generate(n, subjects=(), **settings),
            }
            times = {name: scale * value for name, value in self.times(works).items()}
            text_to_image = times["text_to_image graphs"]
            for name, value in times.items():
                report[f"{number} images, {name}"] = {
                    "s": value,
                    "images/s": number / value,
                    "/ text_to_image": value / text_to_image,
                }
        report["note"] = f"measured with {steps} steps and scaled to {self.request.num_inference_steps}"
        return report

    def approximations(self) -> Report:
        """Time of each approximate mode, by graphs."""
        works = {name: (lambda s=settings: self.generate(1, **s)) for name, settings in APPROXIMATIONS.items()}
        times = self.times({"text_to_image graphs": lambda: self.generate(1, subjects=()), **works})
        text_to_image = times.pop("text_to_image graphs")
        return {name: {"s": value, "/ text_to_image": value / text_to_image} for name, value in times.items()}

    def prepare_and_decode(self) -> Report:
        """Seconds of encoding a new prompt and reference, and of decoding."""
        generations = self.generate()

        def prepare() -> None:
            self.pipeline.clear_caches()
            self.bench.prepare()

        works = {"prepare, new prompt and reference": prepare, "decode": lambda: self.pipeline.decode(generations)}
        return {f"{name} s": value for name, value in self.times(works).items()}

    def small(self) -> Report:
        """One image at half the size, eagerly and by graphs."""
        settings = dict(height=self.request.height // 2, width=self.request.width // 2)
        works = {
            "text_to_image graphs": lambda: self.generate(1, subjects=(), **settings),
            "realcustom eager": self.eagerly(self.generate, 1, **settings),
            "realcustom graphs": lambda: self.generate(1, **settings),
        }
        return {"px": settings["height"], **self._ratios(self.times(works))}

    def switches(self) -> Report:
        """The generation call under alternatives that only a GPU can decide between."""
        unet = self.pipeline.unet
        (generation,) = self.generate(1, num_inference_steps=2, early_stop_step=1)
        (fresh,) = self.bench.prepare()
        fresh.set_masks(generation.guidance_masks)
        work = lambda: self.pipeline.denoiser.generation_branch([fresh])
        report: Report = {"channels_last": self._call_times(work)}
        unet.to(memory_format=torch.contiguous_format)
        self.graphs.retire()
        report["contiguous"] = self._call_times(work)
        unet.to(memory_format=torch.channels_last)
        self.pipeline.fuse_projections()
        self.graphs.retire()
        report["fused projections"] = self._call_times(work)
        self.pipeline.denoiser.attention.unfuse_projections()
        for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION):
            self.graphs.retire()
            try:
                with sdpa_kernel([backend, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH], set_priority=True):
                    report[backend.name] = self._call_times(work)
            except RuntimeError as error:
                report[backend.name] = str(error)[:200]
        self.graphs.retire()
        return report

    def blocks(self) -> Report:
        """Compiled transformer blocks under graphs."""
        return self._compile(resnets=False)

    def resnets(self) -> Report:
        """Compiled transformer and residual blocks under graphs."""
        return self._compile(resnets=True)

    def _compile(self, *, resnets: bool) -> Report:
        denoiser = self.pipeline.denoiser
        options = {}
        if self.device.type != "cuda":  # a tape cannot record compiled functions; padded calls stand in for graphs
            options, self.graphs = {"backend": "eager"}, ReplayExecutor(denoiser.attention, denoiser.method)
        self.pipeline.compile(resnets=resnets, **options)
        denoiser.executor = self.graphs
        start = time.monotonic()
        if self.device.type == "cuda":
            for settings in ({}, {"subjects": ()}):
                with self.graphs.capturing_at_once():
                    self.generate(1, num_inference_steps=2, early_stop_step=2, **settings)
        first = time.monotonic() - start
        works = {
            "text_to_image graphs": lambda: self.generate(1, subjects=()),
            "realcustom graphs": self.generate,
            "realcustom graphs with decode": lambda: self.pipeline.decode(self.generate()),
        }
        return {"compilation and capture s": first, **self._ratios(self.times(works)), "calls": self.calls()}


SECTIONS = (
    "correctness",
    "images",
    "calls",
    "memory",
    "prepare_and_decode",
    "approximations",
    "batch",
    "small",
    "switches",
    "blocks",
    "resnets",
)


def machine(device: torch.device) -> str:
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"{platform.processor() or 'CPU'} (rehearsal)"
    return f"{name}; torch {torch.__version__}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--model", choices=("sdxl", "sd15", "mini"), default="sdxl")
    parser.add_argument("--size", type=int, help="image size in px (default: the model's)")
    parser.add_argument("--steps", type=int, help="(default: the model's)")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 2, 4, 8], help="(default: 1 2 4 8)")
    parser.add_argument("--rounds", type=int, default=3, help="timed rounds (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=220, help="no section begins later (default: %(default)s)")
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=SECTIONS)
    parser.add_argument("--out", type=Path, help="write the report to this JSON file after each section")
    args = parser.parse_args()
    if args.rounds < 3:
        parser.error("--rounds must be at least 3; fewer may contain a capture or a compilation.")

    start = time.monotonic()
    torch.set_grad_enabled(False)
    benchmark = GpuBenchmark(args)
    request = benchmark.request
    report: Report = {
        "machine": machine(benchmark.device),
        "setting": f"{args.model}, {request.height} px, {request.num_inference_steps} steps, "
        f"T_stop {request.early_stop_step}, one subject, {benchmark.dtype}",
        "load s": benchmark.load_seconds,
    }
    print(json.dumps(rounded(report), indent=2), flush=True)
    for name in args.sections:
        if time.monotonic() - start > args.seconds:
            report.setdefault("skipped for lack of time", []).append(name)
            continue
        begun = time.monotonic()
        report[name] = getattr(benchmark, name)()
        report[name]["section s"] = time.monotonic() - begun
        print(json.dumps(rounded({name: report[name]}), indent=2), flush=True)
        if args.out:
            args.out.parent.mkdir(parents=True, exist_ok=True)
            args.out.write_text(json.dumps(rounded(report), indent=2) + "\n")
    print(table(rounded(report)))


def table(report: Report) -> str:
    """The report as a Markdown table, one row per number."""
    lines = ["| section | measurement | value |", "|---|---|---|"]
    for section, values in report.items():
        rows = values.items() if isinstance(values, dict) else [("", values)]
        for name, value in rows:
            text = ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else value
            lines.append(f"| {section} | {name} | {text} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
