# Needs make and a Python from 3.11 to 3.13, nothing else. Environments: .venv for everything; .venv-newest,
# on the newest Python found, for the tests that need no torch. Both are brought up to date when pyproject.toml
# changes. One of the tests puts a compiler for GPUs that are not there into .cache.

NEWEST := 3.13 3.12
DEPENDENCIES := $(shell cksum < pyproject.toml | tr -dc '0-9')
READY := .venv/.jaxmoe-run-$(DEPENDENCIES)
READY_TO_TEST := .venv/.jaxmoe-test-$(DEPENDENCIES)
READY_NEWEST := .venv-newest/.jaxmoe-test-$(DEPENDENCIES)

.PHONY: help
help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-12s %s\n", $$1, $$2 }' Makefile

.PHONY: quickstart
quickstart: $(READY) ## train, export, reload and fine-tune a small model, in minutes on a CPU
	.venv/bin/python -m jaxmoe.train
	.venv/bin/python -m jaxmoe.train configs/quickstart-finetune.yaml

.PHONY: quickstart-chat
quickstart-chat: $(READY) ## train a small model on conversations and let it answer, in minutes on a CPU
	.venv/bin/python -m jaxmoe.inspect data configs/quickstart-chat.yaml --rows 1
	.venv/bin/python -m jaxmoe.train configs/quickstart-chat.yaml
	.venv/bin/python -m jaxmoe.generate --chat runs/quickstart-chat/export "What does os.path.join do?"

.PHONY: test
test: lint types ## everything that must pass: lint, types, packaging, tests on two Pythons
	.venv/bin/python -m pytest -n 2 --durations=20
	@$(MAKE) --no-print-directory test-newest

.PHONY: test-newest
test-newest: ## the tests that need no torch, on the newest Python found
	@if .ci/find-python $(NEWEST) >/dev/null; then \
		$(MAKE) --no-print-directory pytest-newest; \
	else \
		echo "second pass left out: found no Python 3.13 or 3.12 that can make environments"; \
	fi

.PHONY: pytest-newest
pytest-newest: $(READY_NEWEST)
	.venv-newest/bin/python -m pytest -n 2 --durations=20 -m "not once"

.PHONY: readme
readme: $(READY_TO_TEST) ## write the README's tables of keys and of supported models anew
	cd tests && ../.venv/bin/python -m helpers.readme

.PHONY: kernels
kernels: $(READY_TO_TEST) ## compile the GPU kernels of real models without a GPU, on two Pythons: registers, spills
	@.ci/compile-kernels .venv/bin/python
	@if .ci/find-python $(NEWEST) >/dev/null; then $(MAKE) --no-print-directory kernels-newest; fi

.PHONY: kernels-newest
kernels-newest: $(READY_NEWEST)
	@.ci/compile-kernels .venv-newest/bin/python

.PHONY: recipes
recipes: $(READY_TO_TEST) ## compile the training steps of configs/ for GPUs that are not there: memory of each
	@.ci/compile-recipes .venv/bin/python

.PHONY: hostile
hostile: $(READY_TO_TEST) ## attack the commands: bad inputs, damaged folders, kills, signals, full disks; some minutes
	cd tests && ../.venv/bin/python -m hostile.campaign

.PHONY: long-rows
long-rows: $(READY_TO_TEST) ## gradients of every family in bfloat16 over 8,192 tokens; some minutes
	cd tests && ../.venv/bin/python -m helpers.long_rows

.PHONY: older-folders
older-folders: $(READY_TO_TEST) ## read folders that older transformers write: the tables of interop/OLDER_FOLDERS.md
	cd tests && ../.venv/bin/python -m older_folders

.PHONY: lint
lint: $(READY_TO_TEST) ## ruff: rules and formatting
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .

# Types are checked on an installed wheel, which also shows that it is complete.
.PHONY: types
types: wheel ## mypy, on the wheel
	cd .cache/wheel && ../../.venv/bin/mypy --config-file ../../pyproject.toml --cache-dir ../mypy -p jaxmoe

.PHONY: format
format: $(READY_TO_TEST) ## let ruff mend and format the code
	.venv/bin/ruff check --fix .
	.venv/bin/ruff format .

.PHONY: wheel
wheel: $(READY_TO_TEST) ## build dist/*.whl and try it in another folder
	@rm -rf build dist .cache/wheel
	.venv/bin/pip wheel --quiet --no-deps --no-build-isolation --wheel-dir dist .
	.venv/bin/pip install --quiet --no-deps --target .cache/wheel dist/jaxmoe-*.whl
	@rm -rf build
	cd .cache/wheel && ../../.venv/bin/python -m jaxmoe.train --help >/dev/null

.PHONY: clean
clean: ## remove build outputs and caches; environments and runs stay
	rm -rf build dist .cache/wheel .cache/mypy .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -not -path './.venv*' -prune -exec rm -rf {} +

# An environment that has no pip was left half-made, or its Python is gone: it is made anew.
$(READY):
	@.venv/bin/python -m pip --version >/dev/null 2>&1 || { \
		python=$$(.ci/find-python 3.11 default $(NEWEST)) || { \
			echo "error: found no Python 3.11, 3.12 or 3.13 that can make environments (with venv): install one" >&2; \
			exit 1; \
		}; \
		echo "$$python -m venv .venv"; \
		"$$python" -m venv --clear .venv; \
	}
	.venv/bin/pip install --quiet -e .
	@rm -f .venv/.jaxmoe-run-* && touch $@

# torch is the oracle of some tests, and a large download: on one Python is enough.
$(READY_TO_TEST): $(READY)
	@if .venv/bin/python -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))'; then \
		echo ".venv/bin/pip install torch==2.13.0" && .venv/bin/pip install --quiet torch==2.13.0 && \
		echo ".venv/bin/pip install -e '.[torch,test]'" && .venv/bin/pip install --quiet -e '.[torch,test]'; \
	else \
		echo ".venv/bin/pip install -e '.[test]'" && .venv/bin/pip install --quiet -e '.[test]'; \
	fi
	@rm -f .venv/.jaxmoe-test-* && touch $@

$(READY_NEWEST):
	@.venv-newest/bin/python -m pip --version >/dev/null 2>&1 || \
		"$$(.ci/find-python $(NEWEST))" -m venv --clear .venv-newest
	.venv-newest/bin/pip install --quiet -e '.[test]'
	@rm -f .venv-newest/.jaxmoe-test-* && touch $@
