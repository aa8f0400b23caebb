"""The workflows: actions are pinned to commits, and permissions are the least."""

import re
from pathlib import Path

import pytest
import yaml

WORKFLOWS = sorted((Path(__file__).parents[1] / ".github" / "workflows").glob("*.yml"))
ALLOWED = {"ci": {"contents": "read"}, "release": {"contents": "read", "id-token": "write", "attestations": "write"}}


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_actions_are_pinned_and_permissions_are_the_least(path):
    text = path.read_text()
    workflow = yaml.safe_load(text)
    used = re.findall(r"uses: *(\S+)(.*)", text)
    assert used
    for action, comment in used:
        assert re.fullmatch(r"[\w.-]+/[\w./-]+@[0-9a-f]{40}", action), action
        assert re.fullmatch(r" # v\d+\.\d+\.\d+", comment), f"{action} says its version"
    for job in workflow["jobs"].values():
        assert job.get("permissions", workflow["permissions"]) == ALLOWED[path.stem]
        assert "timeout-minutes" in job
        for step in job["steps"]:
            if step.get("uses", "").startswith("actions/checkout@"):
                assert step["with"]["persist-credentials"] is False
            assert "${{" not in step.get("run", ""), "nothing from outside is pasted into a shell"
