"""Publish a compressed model with its card, and load it by name as anyone would.

    hf auth login
    python examples/share_on_the_hub.py small-bert me/small-bert --private
    python examples/share_on_the_hub.py small-bert me/small-bert --dry-run

With HF_ENDPOINT it talks to another Hub than huggingface.co.
"""

import argparse

from transformers import AutoModel

from hf_lowrank import push_to_hub
from hf_lowrank.records.wording import megabytes


def main() -> None:
    """Run the example."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", help="folder of a saved compressed model")
    parser.add_argument("repo", help="owner/name on the Hub")
    parser.add_argument("--private", action="store_true")
    parser.add_argument("--dry-run", action="store_true", help="list the files and send nothing")
    arguments = parser.parse_args()

    push = push_to_hub(arguments.folder, arguments.repo, private=arguments.private, dry_run=arguments.dry_run)
    for name, size in push.files.items():
        print(f"{megabytes(size):>10}  {name}")
    if push.commit is None:
        return
    print(f"published: {push.url}")

    # The commit pins the code that runs: nobody can change it under you.
    model = AutoModel.from_pretrained(push.repo_id, revision=push.commit.oid, trust_remote_code=True)
    print(f"loaded: {type(model).__name__} of {sum(p.numel() for p in model.parameters()):,} parameters")


if __name__ == "__main__":
    main()
