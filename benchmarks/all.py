"""Every benchmark in turn, within a budget of minutes; what was measured is kept after each.

    python benchmarks/all.py                                         # prints alone
    python benchmarks/all.py --minutes 9 --out FOLDER --peer diffusers
    python benchmarks/all.py --minutes 9 --out FOLDER --only dit     # those whose name has "dit" in it

On a CPU the small shapes of each; on an accelerator published models at their own sizes, the most telling first. Each
runs in a process of its own, which is ended when the time is up; one that has its figures in the folder already is
left out, so that the command may be repeated.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import measure

CPU = {
    "dit_step": "dit_step --guidance none batch",
    "vae_decode": "vae_decode",
    "text_encoder": "text_encoder --tokens 128",
    "cold_start": "cold_start --repeats 1 --num-steps 2",
    "end_to_end": "end_to_end --num-steps 2",
}
ACCELERATOR = {
    "dit_step-1.3b": "dit_step",
    "vae_decode-480p": "vae_decode",
    "dit_step-14b-720p": "dit_step --model wan2.1-t2v-14b --size 1280x720",
    "text_encoder": "text_encoder",
    "end_to_end-1.3b-4-steps": "end_to_end --num-steps 4",
    "dit_step-1.3b-guided": "dit_step --guidance batch sequential",
    "dit_step-5b": "dit_step --model wan2.2-ti2v-5b",
    "vae_decode-720p": "vae_decode --model wan2.1-t2v-14b --size 1280x720",
    "vae_decode-2.2": "vae_decode --model wan2.2-ti2v-5b",
    "dit_step-dreamid-omni": "dit_step --model dreamid-omni --guidance none batch sequential",
    "cold_start": "cold_start",
}
LINES = 20  # shown, of what a benchmark says
WITHOUT_PEER = ("cold_start", "end_to_end", "dit_step-dreamid-omni")  # models that diffusers lacks


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30, help="after which nothing runs any more (default 30)")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="takes NAME.json and NAME.txt")
    parser.add_argument("--peer", choices=("diffusers",), help="where there is one")
    parser.add_argument("--only", default="", metavar="TEXT", help="in the names")
    args = parser.parse_args()
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        return run(args, args.out)
    with tempfile.TemporaryDirectory() as folder:
        return run(args, Path(folder))


def run(args: argparse.Namespace, folder: Path) -> int:
    end, failed = time.monotonic() + 60 * args.minutes, False
    for name, words in (CPU if measure.on_cpu() else ACCELERATOR).items():
        result, said = folder / f"{name}.json", folder / f"{name}.txt"
        if args.only not in name or result.exists():
            continue
        script, *options = words.split()
        if args.peer and name not in WITHOUT_PEER:
            options += ["--peer", args.peer]
        print(f"== {name}: {script}.py {' '.join(options)}", flush=True)
        command = [sys.executable, Path(__file__).with_name(f"{script}.py"), *options, "--json", result]
        left = max(end - time.monotonic(), 1)
        try:
            with open(said, "w") as file:
                subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, timeout=left, check=True)
            fault = ""
        except subprocess.TimeoutExpired:
            fault = "   failed: the time is up"
        except subprocess.CalledProcessError as error:
            fault = f"   failed: exit code {error.returncode}"
        print(*said.read_text(errors="replace").splitlines()[-LINES:], *[fault] * bool(fault), sep="\n", flush=True)
        failed = failed or bool(fault)
        if time.monotonic() >= end:
            break
    return failed


if __name__ == "__main__":
    sys.exit(main())
