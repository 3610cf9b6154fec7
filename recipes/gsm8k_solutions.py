"""Turn grade-school-math's ``model_solutions.jsonl`` into ranked groups: right solutions above wrong ones.

    python recipes/gsm8k_solutions.py model_solutions.jsonl solutions.jsonl

One row a question that has both; every solution is rated 1 (right) or 0 (wrong). Standard library only.
"""

from __future__ import annotations

import json
import sys


def main(source: str, target: str) -> None:
    """Write the groups; say how many questions had nothing to compare."""
    kept = alike = 0
    with open(source, encoding="utf-8") as rows, open(target, "w", encoding="utf-8") as out:
        for line in rows:
            row = json.loads(line)
            solutions = [value for value in row.values() if isinstance(value, dict)]
            rated: dict[str, float] = {}
            for solution in solutions:
                if solution["solution"].strip():
                    rated[solution["solution"].strip()] = float(solution["is_correct"])
            if len(set(rated.values())) < 2:
                alike += 1
                continue
            kept += 1
            group = {
                "prompt": row["question"] + "\n",
                "responses": list(rated),
                "ratings": list(rated.values()),
            }
            out.write(json.dumps(group, ensure_ascii=False) + "\n")
    print(
        f"{target}: {kept} questions with right and wrong solutions; {alike} with one kind only are left out"
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
