"""``wan-jax verify FILE``: does a clip say that it was generated, by what, and was it changed?"""

from __future__ import annotations

import argparse


def add_parser(subparsers) -> argparse.ArgumentParser:
    description = "Print the manifest, the watermarks in picture and sound, the settings and the consent of a file."
    parser = subparsers.add_parser("verify", help="look for the marks of a generated clip", description=description)
    parser.add_argument("path", help="a video, picture or sound")
    parser.add_argument("--watermark-key", help="the secret that it was marked with; the public key by default")
    parser.add_argument("--trust", metavar="PEM", help="certificate authorities to trust as signers of the manifest")
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser


def run(args: argparse.Namespace) -> int:
    from wan_jax.provenance import verify

    report = verify(args.path, args.watermark_key, trust=args.trust)
    print(report.to_json() if args.json else report)
    return 0
