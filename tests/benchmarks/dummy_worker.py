"""A worker without a model: replays the seconds it is given and logs when it is at work.

``python dummy_worker.py SIDE DIARY PEAK_MB SECONDS…``; when the seconds run out it dies with a message.
"""

from __future__ import annotations

import json
import os
import sys


def main() -> None:
    side, diary, peak, *seconds = sys.argv[1:]
    left = [float(value) for value in seconds]
    print("a library says hello")
    facts = {"threads": 1, "tunables": os.environ.get("GLIBC_TUNABLES")}
    print(json.dumps({"ready": facts}), flush=True)
    for line in sys.stdin:
        command = json.loads(line)["cmd"]
        if command == "peak":
            print(json.dumps({"peak_mb": float(peak)}), flush=True)
            continue
        if not left:
            sys.exit("out of seconds")
        with open(diary, "a") as file:
            file.write(f"{side} begins\n")
        with open(diary, "a") as file:
            file.write(f"{side} ends\n")
        print(json.dumps({"seconds": left.pop(0)}), flush=True)


if __name__ == "__main__":
    main()
