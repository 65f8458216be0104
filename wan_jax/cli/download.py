"""``wan-jax download NAME``: fetch, pin and verify a published model, or list what that would transfer."""

from __future__ import annotations

import argparse

from wan_jax.weights import hub


def add_parser(subparsers) -> argparse.ArgumentParser:
    parser = subparsers.add_parser("download", help="download a published model", description=__doc__)
    parser.add_argument("name", help="a model, or a hub id such as Wan-AI/Wan2.1-T2V-1.3B-Diffusers")
    parser.add_argument("--revision", help="branch, tag or commit, in place of the recorded one")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--offline", action="store_true", help="verify what is there, say what is missing")
    mode.add_argument("--dry-run", action="store_true", help="list files and sizes, transfer nothing")
    return parser


def run(args: argparse.Namespace) -> int:
    if args.dry_run:
        for i, repository in enumerate(hub.repositories(args.name)):
            print(_listing(hub.plan(repository, revision=None if i else args.revision)))
    else:
        hub.repositories(args.name)  # a published model, and not a folder that has its name
        print(hub.resolve(args.name, revision=args.revision, offline=args.offline or None))
    return 0


def _listing(plan: hub.Plan) -> str:
    lines = [f"{plan.record.repo_id}, commit {plan.record.revision}"]
    missing = set(plan.missing())
    for name, file in sorted(plan.files.items()):
        state = "missing" if name in missing else "present"
        lines.append(f"{hub.format_bytes(file.size):>10}  {state}  {name}")
    total = hub.format_bytes(sum(file.size for file in plan.files.values()))
    lines.append(
        f"{total:>10}  in all, {hub.format_bytes(plan.missing_bytes())} to transfer to {plan.folder}"
    )
    return "\n".join(lines)
