import os
import subprocess
import sys

from mmr5_train.common.environment import drop_secrets, without_secrets

SECRETS = ("HF_TOKEN", "OPENAI_API_KEY", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "GITHUB_PAT", "DATABASE_URL")


def test_only_allowed_variables_are_passed_on(monkeypatch):
    for name in SECRETS:
        monkeypatch.setenv(name, "secret")
    code = "import os; print('secret' in os.environ.values(), 'PATH' in os.environ)"
    command = [sys.executable, "-c", code]
    child = subprocess.run(command, env=without_secrets(), capture_output=True, text=True, check=True)
    assert child.stdout.split() == ["False", "True"]


def test_drop_secrets_changes_this_process(monkeypatch):
    for name in SECRETS:
        monkeypatch.setenv(name, "secret")
    environment = dict(os.environ)
    try:
        drop_secrets()
        assert "PATH" in os.environ
        assert "secret" not in os.environ.values()
    finally:
        os.environ.update(environment)
